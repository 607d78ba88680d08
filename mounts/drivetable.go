package mounts

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/udev"
	"github.com/moby/sys/mountinfo"
)

// mountsOf reads the mount table of a process, "self" or a number.
func mountsOf(proc, pid string) ([]*mountinfo.Info, error) {
	name := filepath.Join(proc, pid, "mountinfo")
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading the mount table: %w", err)
	}
	defer f.Close()
	table, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return nil, fmt.Errorf("reading the mount table %s: %w", name, err)
	}
	return table, nil
}

// swapDevices returns the sources in /proc/swaps.
func swapDevices(r io.Reader) ([]string, error) {
	var found []string
	lines := bufio.NewScanner(r)
	for first := true; lines.Scan(); first = false {
		if fields := strings.Fields(lines.Text()); !first && len(fields) > 0 {
			found = append(found, fields[0])
		}
	}
	return found, lines.Err()
}

// A deviceIndex finds devices by what the mount table says of them.
type deviceIndex struct {
	byDev, byName, byMapper map[string]udev.Device
}

func indexDevices(devices []udev.Device) deviceIndex {
	x := deviceIndex{map[string]udev.Device{}, map[string]udev.Device{}, map[string]udev.Device{}}
	for _, d := range devices {
		x.byDev[d.Dev()] = d
		x.byName[d.Name] = d
		if d.DMName != "" {
			x.byMapper[d.DMName] = d
		}
	}
	return x
}

// source finds the device behind a mount. File systems over several devices,
// as btrfs, have a number of their own, so the name of the source counts there.
func (x deviceIndex) source(m *mountinfo.Info) (udev.Device, bool) {
	if d, ok := x.byDev[fmt.Sprintf("%d:%d", m.Major, m.Minor)]; ok {
		return d, true
	}
	if m.Major != 0 {
		return udev.Device{}, false
	}
	return x.named(m.Source)
}

// named finds a device by the path of its node.
func (x deviceIndex) named(node string) (udev.Device, bool) {
	if !strings.Contains(node, "/dev/") {
		return udev.Device{}, false
	}
	base := path.Base(node)
	if d, ok := x.byName[base]; ok {
		return d, true
	}
	d, ok := x.byMapper[base]
	return d, ok
}

// disks returns the whole disks that d lies on, through RAID, LVM and
// encryption.
func (x deviceIndex) disks(d udev.Device) []string {
	var found []string
	var visit func(d udev.Device, depth int)
	visit = func(d udev.Device, depth int) {
		if depth > 16 { // no real stack is as high; a fixture may be a ring
			return
		}
		if !slices.Contains(found, d.Disk) {
			found = append(found, d.Disk)
		}
		for _, name := range d.Slaves {
			if s, ok := x.byName[name]; ok {
				visit(s, depth+1)
			}
		}
	}
	visit(d, 0)
	return found
}

// keptDisks names the disks that are in use by somebody else, with the reason:
// one of their devices is mounted in one of the tables, or is swap. Devices in
// ours don't count.
func keptDisks(devices []udev.Device, ours map[string]bool, tables [][]*mountinfo.Info, swaps []string) map[string]string {
	x := indexDevices(devices)
	kept := map[string]string{}
	keep := func(d udev.Device, reason string) {
		for _, disk := range x.disks(d) {
			if _, ok := kept[disk]; !ok {
				kept[disk] = reason
			}
		}
	}
	for _, table := range tables {
		for _, m := range table {
			if d, ok := x.source(m); ok && !ours[d.Name] {
				keep(d, fmt.Sprintf("%s is mounted at %s already, by the system or another program", d.Name, printable(m.Mountpoint)))
			}
		}
	}
	for _, node := range swaps {
		if d, ok := x.named(node); ok {
			keep(d, d.Name+" is the system's swap space")
		}
	}
	return kept
}

// readKept reads what keptDisks needs: the mount tables of this process and of
// process 1, which is the host's with "pid: host", and the swap spaces.
func readKept(proc string, devices []udev.Device, ours map[string]bool) (map[string]string, error) {
	self, err := mountsOf(proc, "self")
	if err != nil {
		return nil, err
	}
	tables := [][]*mountinfo.Info{self}
	switch init, err := mountsOf(proc, "1"); {
	case err == nil:
		tables = append(tables, init)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		// No other table can be seen from here.
	default:
		return nil, err
	}
	var swaps []string
	f, err := os.Open(filepath.Join(proc, "swaps"))
	if err == nil {
		swaps, err = swapDevices(f)
		err = errors.Join(err, f.Close())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the swap spaces: %w", err)
	}
	return keptDisks(devices, ours, tables, swaps), nil
}
