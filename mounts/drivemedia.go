package mounts

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// kernelPoll makes the kernel ask a card reader for its card every two
// seconds, unless it does already, and reports whether it does now. Where
// udevd runs, it has set that for all devices.
func kernelPoll(sysfs string, d udev.Device) bool {
	if d.MediaPoll > 0 {
		return true
	}
	if d.MediaPoll < 0 && sysNumber(filepath.Join(sysfs, "module/block/parameters"), "events_dfl_poll_msecs") > 0 {
		return true
	}
	return os.WriteFile(filepath.Join(sysfs, d.Path, "events_poll_msecs"), []byte("2000"), 0) == nil
}

// watchMedia sees to it that card changes in a new device are noticed.
func (l *driveLoop) watchMedia(d udev.Device) {
	delete(l.polled, d.Name)
	if l.peek {
		return
	}
	if d.PollsMedia && d.Removable && !d.IsPartition() && !kernelPoll(l.sysfs, d) {
		l.polled[d.Name] = true
	}
}

// pollMedia opens the card readers that the kernel does not ask by itself:
// opening makes it look for the card, and tell by events what changed.
func (l *driveLoop) pollMedia() {
	for name := range l.polled {
		k := l.drives[name]
		if k == nil {
			delete(l.polled, name)
			continue
		}
		l.refresh(k.dev.Disk)
	}
}

// refresh opens a disk, so that the kernel looks at its medium again: size and
// partitions are stale after a change until somebody does. Until then the
// partitions of the disk count as absent.
func (l *driveLoop) refresh(disk string) {
	k := l.drives[disk]
	if k == nil || l.refreshing[disk] {
		return
	}
	node, err := l.nodes.path(k.dev)
	if err != nil {
		l.failed(err)
		return
	}
	l.refreshing[disk] = true
	l.work(func(context.Context) func() {
		if fd, err := unix.Open(node, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
			_ = unix.Close(fd)
		}
		return func() { delete(l.refreshing, disk) }
	})
}

// cutOff sees to it that nothing is written to a card that took the place of a
// mounted one. The kernel refuses to read and write after a swap only until it
// has told of it; what the file systems of the old card had still to write
// would go to the new card then. So the disk is made to refuse everything until
// their mounts are gone, and is looked at anew after that.
func (l *driveLoop) cutOff(devices []udev.Device) {
	for _, d := range devices {
		switch {
		case d.IsPartition():
		case l.cut[d.Name]:
			if l.departing[d.Name] == 0 {
				if err := setState(l.sysfs, d, "running"); err != nil {
					l.failed(err)
				}
				delete(l.cut, d.Name)
				l.changed[d.Name] = true
			}
		case l.swapped(d) && setState(l.sysfs, d, "offline") == nil:
			l.cut[d.Name] = true
			l.again = true
		}
	}
}

// swapped reports whether a drive on disk d is mounted, or being mounted, from
// an earlier medium.
func (l *driveLoop) swapped(d udev.Device) bool {
	for _, k := range l.drives {
		if k.dev.Disk == d.Name && k.dev.DiskSeq != d.DiskSeq && (k.mount != nil || k.folder != "") {
			return true
		}
	}
	return false
}

// setState makes a SCSI disk, as all behind USB are, refuse or accept work.
func setState(sysfs string, d udev.Device, state string) error {
	// Without the end of line the kernel refuses it.
	err := os.WriteFile(filepath.Join(sysfs, d.Path, "device/state"), []byte(state+"\n"), 0)
	if err != nil {
		return fmt.Errorf("setting the state of %s to %s: %w", d.Name, state, err)
	}
	return nil
}
