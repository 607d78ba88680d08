package mounts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrDriveGone is wrapped by errors that say that a drive was pulled out, or
// is another one than before.
var ErrDriveGone = errors.New("the drive is gone")

// ErrNotOnDrive is wrapped by errors that say that a path does not lie on the
// mount of a drive.
var ErrNotOnDrive = errors.New("not on the drive")

// A Plugging is one drive in one plugging, mounted at one folder. It stays
// valid as a value after the drive went; its methods say so then. They read
// sysfs only and never touch the drive, so they don't hang when it does.
type Plugging struct {
	Device       string // kernel name
	Major, Minor uint32
	DiskSeq      uint64 // 0 where the kernel has none; UUID and device number must do then
	Partition    int
	UUID         string // of the file system
	Path         string // the folder it is mounted at
	MountID      uint64 // the kernel's number of that mount, in the namespace of this process

	// Under is the encrypted device that this one was opened from.
	Under *Plugging

	sysfs string
}

// Alive returns nil while the drive is plugged in, and an error that wraps
// ErrDriveGone once it is not. File systems don't tell: a FAT drive that was
// pulled out looks like an empty folder.
func (p *Plugging) Alive() error {
	gone := func(why string) error {
		return fmt.Errorf("drive at %s (%s): %w: %s", p.Path, p.Device, ErrDriveGone, why)
	}
	root := p.sysfs
	if root == "" {
		root = "/sys"
	}
	dir := filepath.Join(root, "dev/block", fmt.Sprintf("%d:%d", p.Major, p.Minor))
	target, err := os.Readlink(dir)
	if errors.Is(err, os.ErrNotExist) {
		return gone("it was pulled out")
	}
	if err != nil {
		return fmt.Errorf("drive at %s (%s): asking the kernel: %w", p.Path, p.Device, err)
	}
	// Resolved once, so that all answers are about one device.
	dir = filepath.Join(filepath.Dir(dir), target)
	disk := dir
	if p.Partition > 0 {
		if n := sysNumber(dir, "partition"); n != uint64(p.Partition) {
			return gone("another one is in its place")
		}
		disk = filepath.Dir(dir)
	}
	if filepath.Base(dir) != p.Device {
		return gone("another one is in its place")
	}
	if seq := sysNumber(disk, "diskseq"); seq != p.DiskSeq {
		return gone("another one, or another medium, is in its place")
	}
	switch state := sysText(disk, "device/state"); state {
	case "offline", "cancel", "deleted", "transport-offline", "dead", "deleting":
		return gone("it does not answer any more (" + state + ")")
	}
	if p.Under != nil {
		return p.Under.Alive()
	}
	return nil
}

// Check returns nil while the drive is plugged in and path lies on its mount.
// Otherwise the error wraps ErrDriveGone or ErrNotOnDrive. Ask before, during
// and after each use: what was read or written in between two good answers
// came from, or went to, this drive.
func (p *Plugging) Check(path string) error {
	if err := p.Alive(); err != nil {
		return err
	}
	id, err := mountID(unix.AT_FDCWD, path)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", path, ErrNotOnDrive, err)
	}
	if id != p.MountID {
		return fmt.Errorf("%s: %w %s: something else is mounted there, or nothing", path, ErrNotOnDrive, p.Path)
	}
	return nil
}

func sysText(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func sysNumber(dir, name string) uint64 {
	n, _ := strconv.ParseUint(sysText(dir, name), 10, 64)
	return n
}
