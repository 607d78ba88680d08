package mounts

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/udev"
)

// A DriveView is everything that the decision about drives depends on.
type DriveView struct {
	Config  DriveConfig
	Devices []udev.Device
	Probes  map[string]Probe // by kernel name; absent: not probed yet
	Names   Names

	// Kept names the disks that must not be touched, with the reason: the
	// disks that hold a mounted device that is not ours, and swap.
	Kept map[string]string
	// Ours names the devices that Drives itself mounted or opened.
	Ours map[string]bool
	// Asked names the devices that a person wants mounted, by kernel name.
	Asked map[string]DriveMountOptions
	// Occupied says of a path that it can't be a mount folder: it exists and
	// is neither ours nor an empty folder.
	Occupied func(path string) bool
}

// A DriveAction is what Plan wants done with a device.
type DriveAction int

// The actions.
const (
	LeaveDrive  DriveAction = iota // nothing
	ProbeDrive                     // find out what is on it
	MountDrive                     // mount it as Spec says
	UnlockDrive                    // open it with Spec.KeyFile
)

// A DriveVerdict is the decision about one device.
type DriveVerdict struct {
	Device udev.Device
	Probe  Probe
	Action DriveAction

	State          DriveState // of a device that is left alone
	Reason, Remedy string
	Hidden         bool // not worth showing: a disk of which partitions are shown, the system's disks

	ID   string // identity of the file system, the key in Names
	Name string
	Spec MountSpec // for MountDrive and UnlockDrive
}

// A MountSpec says how a drive is mounted.
type MountSpec struct {
	Type    string
	Path    string
	Options DriveOptions
	KeyFile string
	// Media says that nothing can be written: the device is read-only.
	Media bool
}

// Plan decides for every device whether it is mounted, where and how, or why
// not. It has no side effects: it is called again whenever a probe or a
// device changed. The names it gives to new drives are in the second result,
// which equals v.Names when there is nothing to remember.
func Plan(v DriveView) ([]DriveVerdict, Names) {
	names := maps.Clone(v.Names)
	if names == nil {
		names = Names{}
	}
	p := planner{
		DriveView: v,
		byName:    make(map[string]udev.Device, len(v.Devices)),
		owner:     map[string]string{},
		paths:     map[string]string{},
		names:     names,
	}
	for _, d := range v.Devices {
		p.byName[d.Name] = d
	}
	devices := slices.Clone(v.Devices)
	slices.SortStableFunc(devices, func(a, b udev.Device) int {
		// What is mounted keeps its identity and its folder; then the older
		// plugging comes first.
		return cmp.Or(ours(v, b)-ours(v, a), cmp.Compare(a.DiskSeq, b.DiskSeq), strings.Compare(a.Name, b.Name))
	})
	verdicts := make([]DriveVerdict, 0, len(devices))
	for _, d := range devices {
		verdicts = append(verdicts, p.decide(d))
	}
	slices.SortStableFunc(verdicts, func(a, b DriveVerdict) int { return strings.Compare(a.Device.Name, b.Device.Name) })
	return verdicts, names
}

func ours(v DriveView, d udev.Device) int {
	if v.Ours[d.Name] {
		return 1
	}
	return 0
}

type planner struct {
	DriveView
	byName map[string]udev.Device
	owner  map[string]string // identity -> device that has it
	paths  map[string]string // mount folder -> device that gets it
	names  Names
}

// cryptPrefix begins the device-mapper name of every drive that we open.
const cryptPrefix = "ide49-"

func (p *planner) decide(d udev.Device) DriveVerdict {
	v := DriveVerdict{Device: d, State: DriveLeft, Hidden: true}
	disk, ok := p.byName[d.Disk]
	if !ok {
		disk = d
	}
	if !p.candidate(d, disk) {
		return v
	}
	v.Hidden = false
	leave := func(state DriveState, reason, remedy string) DriveVerdict {
		v.Action, v.State, v.Reason, v.Remedy = LeaveDrive, state, reason, remedy
		return v
	}
	if reason, kept := p.Kept[d.Disk]; kept {
		return leave(DriveLeft, reason, "")
	}
	if len(disk.Partitions) > 0 && !d.IsPartition() {
		v.Hidden = true
		return v
	}
	if !d.MediaPresent() {
		if d.IsPartition() {
			v.Hidden = true
			return v
		}
		return leave(DriveEmpty, "there is no medium in it", "insert a card")
	}
	probe, probed := p.Probes[d.Name]
	v.Probe = probe
	asked, isAsked := p.Asked[d.Name]
	if rule := p.Config.rule(d, probe); rule.Ignore && !isAsked {
		return leave(DriveLeft, "a rule in the configuration says to ignore it", "")
	}
	if !probed {
		v.Action, v.State = ProbeDrive, DriveBusy
		return v
	}
	if reason, remedy, hidden := unmountable(d, probe); reason != "" {
		v.Hidden = hidden
		return leave(DriveLeft, reason, remedy)
	}
	if probe.Outcome == ProbeUnreadable {
		return leave(DriveFailed, "it can't be read: "+probe.Detail, "plug it in again, at another port or with another cable")
	}
	if len(d.Holders) > 0 && p.openedHere(d) {
		v.Hidden = true // what was opened from it is shown
		return v
	}
	if len(d.Holders) > 0 && !p.Ours[d.Name] {
		return leave(DriveLeft, "it is in use as part of "+p.holder(d), "")
	}

	rule := p.Config.rule(d, probe)
	v.ID = probe.identity(d)
	if other, taken := p.owner[v.ID]; taken {
		return leave(DriveFailed, "it has the same UUID as "+other, "eject that drive first, or give one of them a new UUID")
	}
	p.owner[v.ID] = d.Name
	v.Spec = MountSpec{Type: probe.Type, Options: rule.options(p.Config.Options), KeyFile: rule.KeyFile, Media: d.ReadOnly}
	if probe.Type == "crypto_LUKS" {
		if rule.KeyFile == "" {
			return leave(DriveLocked, "it is encrypted (LUKS) and no key file is configured", "add a rule with its uuid and a key_file")
		}
		v.Action, v.State = UnlockDrive, DriveReady
		v.Name = d.Name
		return v
	}

	v.Spec.Options.ReadOnly = v.Spec.Options.ReadOnly || asked.ReadOnly
	v.Spec.Path = cmp.Or(asked.At, rule.Path)
	if v.Spec.Path == "" {
		v.Name = p.names.assign(v.ID, wantedName(d, probe))
		p.names[v.ID] = v.Name
		v.Spec.Path = filepath.Join(p.Config.Mount, v.Name)
		if !p.Ours[d.Name] {
			for i := 2; p.Occupied != nil && p.Occupied(v.Spec.Path); i++ {
				// Not remembered: the name is taken back when the folder goes.
				v.Spec.Path = filepath.Join(p.Config.Mount, fmt.Sprintf("%s-%d", v.Name, i))
			}
		}
	} else {
		v.Name = filepath.Base(v.Spec.Path)
		if !p.Ours[d.Name] && p.Occupied != nil && p.Occupied(v.Spec.Path) {
			return leave(DriveFailed, v.Spec.Path+" exists and is not an empty folder", "remove it, or change the path in the rule")
		}
	}
	if other, taken := p.paths[v.Spec.Path]; taken {
		return leave(DriveFailed, v.Spec.Path+" belongs to "+other, "eject that drive first, or change the rules")
	}
	p.paths[v.Spec.Path] = d.Name
	v.Action, v.State = MountDrive, DriveReady
	return v
}

// candidate reports whether a device could be a drive of the user at all: on
// USB, removable, named by the configuration or a person, or ours already.
func (p *planner) candidate(d, disk udev.Device) bool {
	if d.Hidden || disk.Hidden {
		return false
	}
	if _, asked := p.Asked[d.Name]; asked || p.Ours[d.Name] || openedByUs(d) {
		return true
	}
	if disk.USB || disk.Removable {
		return true
	}
	return slices.ContainsFunc(p.Config.Also, func(pattern string) bool { return globs(pattern, disk.Name) })
}

// openedByUs tells an encrypted drive that we opened.
func openedByUs(d udev.Device) bool {
	return strings.HasPrefix(d.DMName, cryptPrefix) && strings.HasPrefix(d.DMUUID, "CRYPT-LUKS")
}

// openedHere reports whether we opened the encrypted drive d.
func (p *planner) openedHere(d udev.Device) bool {
	h, ok := p.byName[d.Holders[0]]
	return ok && openedByUs(h)
}

func (p *planner) holder(d udev.Device) string {
	name := d.Holders[0]
	if h, ok := p.byName[name]; ok && h.DMName != "" {
		return printable(h.DMName)
	}
	return name
}

// unmountable names what is found on drives and is not for mounting.
func unmountable(d udev.Device, p Probe) (reason, remedy string, hidden bool) {
	switch p.Outcome {
	case ProbeAmbivalent:
		return "it has traces of several file systems, so mounting it would be a guess", "wipe the old traces (wipefs), or prepare it anew", false
	case ProbeNothing:
		if p.PartType != "" || p.Table != "" {
			break
		}
		return "nothing that can be mounted was found on it", "ide49-backup drives prepare " + d.Name + " makes a file system", false
	}
	switch strings.ToLower(p.PartType) {
	case "0x5", "0xf", "0x85":
		return "it is an extended partition", "", true
	case "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef":
		return "it is an EFI system partition", "", false
	case "e3c9e316-0b5c-4db8-817d-f92df00215ae":
		return "it is reserved by Windows", "", true
	}
	if strings.HasPrefix(p.Label, "resin-") {
		return "it belongs to balenaOS (label " + printable(p.Label) + ")", "", false
	}
	switch {
	case p.Outcome == ProbeUnreadable || p.Type == "crypto_LUKS":
		return "", "", false
	case p.Type == "" && p.Table != "":
		return "it has a partition table (" + p.Table + ") in which the kernel sees no partition", "plug it in again, or prepare it anew", false
	case p.Type == "":
		return "nothing that can be mounted was found on it", "ide49-backup drives prepare " + d.Name + " makes a file system", false
	case p.Type == "swap" || p.Type == "swsuspend":
		return "it is swap space", "", false
	case p.Type == "LVM2_member" || p.Type == "LVM1_member":
		return "it is part of an LVM volume group", "", false
	case p.Type == "zfs_member" || p.Type == "bcache":
		return "it is part of a " + strings.TrimSuffix(p.Type, "_member") + " pool", "", false
	case p.Usage == "raid" || strings.HasSuffix(p.Type, "_raid_member"):
		return "it is part of a RAID array (" + p.Type + ")", "", false
	case p.Type == "BitLocker":
		return "it is encrypted by BitLocker, which is not supported", "copy it to another drive on Windows", false
	case p.Usage == "crypto":
		return "it is encrypted (" + p.Type + "), which is not supported", "", false
	case !supported(p.Type):
		return "its file system " + p.Type + " is not supported", "use ext4 or exFAT", false
	}
	return "", "", false
}

// identity names the file system on d for good: by its own UUID, else by what
// else is particular to it.
func (p Probe) identity(d udev.Device) string {
	switch {
	case p.UUID != "":
		return p.Type + ":" + strings.ToLower(p.UUID)
	case p.PartUUID != "":
		return "part:" + strings.ToLower(p.PartUUID)
	case d.Serial != "":
		return fmt.Sprintf("serial:%s:%d", printable(d.Serial), d.Partition)
	}
	return fmt.Sprintf("model:%s:%d:%d", printable(d.Model), d.Size, d.Partition)
}

// wantedName is the folder name for a drive: its label, else its model and the
// beginning of its UUID.
func wantedName(d udev.Device, p Probe) string {
	if name := cleanName(p.Label); name != "" {
		return name
	}
	model := cleanName(strings.ReplaceAll(strings.Join(strings.Fields(d.Model), "-"), "/", "-"))
	if model == "" {
		model = "drive"
	}
	id := strings.ReplaceAll(p.UUID, "-", "")
	if id == "" {
		return fmt.Sprintf("%s-%d", model, d.Partition)
	}
	return model + "-" + id[:min(len(id), 8)]
}
