package mounts

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/udev"
)

// A DriveState says what became of a drive.
type DriveState string

// The states of a drive.
const (
	DriveBusy    DriveState = "busy"     // being probed, checked, mounted or ejected
	DriveReady   DriveState = "ready"    // can be mounted; nobody asked for it yet
	DriveMounted DriveState = "mounted"  // usable at Path
	DriveEjected DriveState = "ejected"  // unmounted on request; mounted again when it is plugged in again
	DriveFailed  DriveState = "failed"   // could not be mounted; tried again when something changes
	DriveLocked  DriveState = "locked"   // encrypted, and no key file opens it
	DriveLeft    DriveState = "left"     // left alone on purpose, for Reason
	DriveEmpty   DriveState = "no media" // a card reader without a card
)

// A Drive is one thing that could be mounted: a partition, or a disk without
// partitions. Text that comes from the device has no control characters in it.
type Drive struct {
	Name   string // folder name, also after it was ejected; the kernel name if it never had a folder
	Device string // kernel name, "sda1"
	Disk   string // kernel name of its disk, "sda"

	Vendor, Model, Serial string
	Label                 string // as on the drive, control characters replaced
	Type                  string // file system as blkid calls it: vfat, ext4, crypto_LUKS
	UUID, PartUUID        string
	Size                  int64 // of the partition, in bytes
	Used, Free            int64 // bytes in the mounted file system; Free is what may be written

	State    DriveState
	Path     string // where it is mounted
	ReadOnly bool
	Since    time.Time // when State began
	Reason   string    // why it is not mounted, or mounted read-only
	Remedy   string    // what to do about it
	Note     string    // anything else worth knowing: mounted elsewhere too, dirty before
	Plugging *Plugging // of a mounted drive: proves that it is still there
}

// DriveConfig says what is done with drives. The zero value with a StateDir
// mounts every USB drive below /mnt.
type DriveConfig struct {
	Mount string // folder the drives are mounted below; default "/mnt"

	// StateDir is a folder that survives restarts and power cuts. It holds
	// the names of drives and the record of our mounts.
	StateDir string
	// RunDir holds device nodes when /dev has none; default "/run/ide49-backup".
	RunDir string

	Options DriveOptions
	Fsck    FsckPolicy
	// FsckLimit ends a check that takes longer; the drive is mounted read-only
	// then. Default ten minutes.
	FsckLimit time.Duration

	Rules []DriveRule

	// Also names, by patterns of kernel names as "sdb" or "loop*", disks that
	// count as drives although they are neither on USB nor removable.
	Also []string
}

// DriveOptions are the choices for mounting.
type DriveOptions struct {
	ReadOnly bool
	Exec     bool // allow programs on the drive to be started
	// Owner and Group own all files on file systems that keep no owners.
	Owner, Group int
}

// A FsckPolicy says when a file system is checked before it is mounted.
type FsckPolicy string

// The policies.
const (
	FsckAuto  FsckPolicy = "auto"  // when it was not unmounted cleanly; also the meaning of ""
	FsckNever FsckPolicy = "never" // not at all
)

// A DriveRule changes what is done with the drives that match. The first rule
// that matches counts.
type DriveRule struct {
	Match    DriveMatch
	Ignore   bool
	ReadOnly *bool
	Exec     *bool
	Owner    *int
	Group    *int
	Path     string // absolute; instead of a folder named after the label
	KeyFile  string // opens an encrypted drive
}

// A DriveMatch matches a drive when all of its non-empty patterns do. In a
// pattern * stands for any characters, ? for one and [a-z] for one of a range;
// UUIDs are compared without regard to case. An empty match matches nothing.
type DriveMatch struct {
	Label, UUID, Serial, Model, Device string
}

// matches reports whether m selects a drive.
func (m DriveMatch) matches(d udev.Device, p Probe) bool {
	if m == (DriveMatch{}) {
		return false
	}
	return globs(m.Label, p.Label) &&
		(globs(strings.ToLower(m.UUID), strings.ToLower(p.UUID)) || m.UUID != "" && p.PartUUID != "" && globs(strings.ToLower(m.UUID), strings.ToLower(p.PartUUID))) &&
		globs(m.Serial, d.Serial) && globs(m.Model, d.Model) && globs(m.Device, d.Name)
}

// globs matches s against a pattern; an empty pattern matches everything.
func globs(pattern, s string) bool {
	if pattern == "" {
		return true
	}
	// path.Match treats a slash as a border; in a label it is a letter.
	slash := strings.NewReplacer("/", "\x00")
	ok, err := path.Match(slash.Replace(pattern), slash.Replace(s))
	return ok && err == nil
}

// withDefaults returns c with its defaults filled in, or what is wrong with it.
func (c DriveConfig) withDefaults() (DriveConfig, error) {
	c.Mount = filepath.Clean(cmp.Or(c.Mount, "/mnt"))
	c.RunDir = filepath.Clean(cmp.Or(c.RunDir, "/run/ide49-backup"))
	c.Fsck = cmp.Or(c.Fsck, FsckAuto)
	c.FsckLimit = cmp.Or(c.FsckLimit, 10*time.Minute)
	c.Rules = slices.Clone(c.Rules)
	var errs []error
	if !filepath.IsAbs(c.Mount) || c.Mount == "/" {
		errs = append(errs, fmt.Errorf("drives: the mount folder is %q; give an absolute path below /", c.Mount))
	}
	if !filepath.IsAbs(c.StateDir) {
		errs = append(errs, fmt.Errorf("drives: the state folder is %q; give an absolute path", c.StateDir))
	}
	if !slices.Contains([]FsckPolicy{FsckAuto, FsckNever}, c.Fsck) {
		errs = append(errs, fmt.Errorf("drives: fsck is %q; say auto or never", c.Fsck))
	}
	seen := map[string]int{}
	for i, r := range c.Rules {
		if r.Match == (DriveMatch{}) {
			errs = append(errs, fmt.Errorf("drives: rule %d matches nothing; give a label, uuid, serial, model or device", i+1))
		}
		for _, pattern := range []string{r.Match.Label, r.Match.UUID, r.Match.Serial, r.Match.Model, r.Match.Device} {
			if _, err := path.Match(pattern, ""); err != nil {
				errs = append(errs, fmt.Errorf("drives: rule %d has the pattern %q: %w", i+1, pattern, err))
			}
		}
		if r.Path == "" {
			continue
		}
		c.Rules[i].Path = filepath.Clean(r.Path)
		if !filepath.IsAbs(r.Path) || c.Rules[i].Path == "/" || c.Rules[i].Path == c.Mount {
			errs = append(errs, fmt.Errorf("drives: rule %d mounts at %q; give an absolute path below %s or elsewhere", i+1, r.Path, c.Mount))
		}
		if j, ok := seen[c.Rules[i].Path]; ok {
			errs = append(errs, fmt.Errorf("drives: rules %d and %d both mount at %s", j, i+1, c.Rules[i].Path))
		}
		seen[c.Rules[i].Path] = i + 1
	}
	for _, pattern := range c.Also {
		if _, err := path.Match(pattern, ""); err != nil {
			errs = append(errs, fmt.Errorf("drives: also has the pattern %q: %w", pattern, err))
		}
	}
	return c, errors.Join(errs...)
}

// rule returns the first rule for a drive, or an empty one.
func (c DriveConfig) rule(d udev.Device, p Probe) DriveRule {
	for _, r := range c.Rules {
		if r.Match.matches(d, p) {
			return r
		}
	}
	return DriveRule{}
}

// options returns the choices for one drive.
func (r DriveRule) options(o DriveOptions) DriveOptions {
	set(&o.ReadOnly, r.ReadOnly)
	set(&o.Exec, r.Exec)
	set(&o.Owner, r.Owner)
	set(&o.Group, r.Group)
	return o
}

func set[T any](dst *T, src *T) {
	if src != nil {
		*dst = *src
	}
}
