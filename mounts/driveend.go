package mounts

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/udev"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// adopt takes over the mounts that an earlier run left for us, and removes its
// other leftovers: mounts of drives that are gone, and empty folders. What is
// not in the record, or is not what the record says, is somebody else's.
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
	var keep []claim
	for _, c := range l.record.Claims {
		kept, err := l.adoptOne(c, boot, devices, table)
		if err != nil {
			l.failed(err)
		}
		if kept {
			keep = append(keep, c)
		}
	}
	if l.peek {
		return nil
	}
	l.record.Boot = boot
	l.record.Claims = keep
	return l.record.save()
}

func (l *driveLoop) adoptOne(c claim, boot string, devices []udev.Device, table []*mountinfo.Info) (bool, error) {
	top := topMount(table, c.Path)
	if top == nil {
		if l.peek {
			return false, nil
		}
		return false, c.removeDir()
	}
	if l.record.Boot != boot || c.SDev == "" || fmt.Sprintf("%d:%d", top.Major, top.Minor) != c.SDev {
		return false, nil // somebody else's mount
	}
	p := c.plugging(l.sysfs, uint64(top.ID))
	i := slices.IndexFunc(devices, func(d udev.Device) bool { return d.Name == c.Device })
	if i < 0 || p.Alive() != nil {
		if l.peek {
			return false, nil
		}
		if err := c.detach(); err != nil {
			return true, fmt.Errorf("the drive at %s is gone: %w", c.Path, err)
		}
		return false, c.removeDir()
	}
	m := &mounted{claim: c, plugging: p, readOnly: readOnlyMount(top)}
	if m.readOnly {
		m.reason = "it was mounted read-only by the run before"
	}
	p.Under = l.below(devices[i])
	l.drives[c.Device] = &drive{dev: devices[i], mount: m, under: p.Under, probe: &c.Probe}
	return true, nil
}

// topMount returns the mount that is seen at a path: the last one there.
func topMount(table []*mountinfo.Info, path string) *mountinfo.Info {
	for _, m := range slices.Backward(table) {
		if m.Mountpoint == path {
			return m
		}
	}
	return nil
}

func readOnlyMount(m *mountinfo.Info) bool {
	return slices.Contains(strings.Split(m.Options, ","), "ro") || slices.Contains(strings.Split(m.VFSOptions, ","), "ro")
}

// end unmounts the drives that nobody uses. The others stay mounted for their
// users and for the next run.
func (l *driveLoop) end() error {
	l.ending = true
	l.drain()
	l.look() // tells those who wait that it is over
	if l.once {
		return nil
	}
	var errs []error
	for _, k := range l.drives {
		if k.mount == nil {
			continue
		}
		c := k.mount.claim
		if err := unix.Unmount(c.Path, unix.UMOUNT_NOFOLLOW); err != nil {
			if err != unix.EBUSY {
				errs = append(errs, fmt.Errorf("unmounting %s: %w", c.Path, err))
			}
			continue
		}
		errs = append(errs, c.removeDir(), l.record.drop(c.Path))
	}
	for _, k := range l.drives {
		if openedByUs(k.dev) {
			// Deferred: it closes once its last user is gone.
			errs = append(errs, closeMapper(context.WithoutCancel(l.ctx), k.dev.DMName, "--deferred"))
		}
	}
	return errors.Join(errs...)
}

// DriveMountOptions are what a person asks for when mounting one drive.
type DriveMountOptions struct {
	At       string // absolute folder; empty: as for any drive
	ReadOnly bool
}

// Mount mounts one device on request: one that was ejected, that failed
// before, or that is not taken for a drive by itself. Disks of the system are
// refused. It returns when the drive is mounted, or with the reason why not.
func (d *Drives) Mount(ctx context.Context, device string, opt DriveMountOptions) (Drive, error) {
	type answer struct {
		d   Drive
		err error
	}
	done := make(chan answer, 1)
	device = strings.TrimPrefix(device, "/dev/")
	fail := func(err error) (Drive, error) {
		return Drive{}, fmt.Errorf("mounting %s: %w", device, err)
	}
	if opt.At != "" && !validPath(opt.At) {
		return fail(fmt.Errorf("%q is no absolute, clean path", opt.At))
	}
	var asked bool
	err := d.call(ctx, func(l *driveLoop) {
		l.waiting = append(l.waiting, func() bool {
			reply := func(d Drive, err error) bool {
				l.answers = append(l.answers, func() { done <- answer{d, err} })
				return true
			}
			if err := ctx.Err(); err != nil {
				return reply(Drive{}, context.Cause(ctx))
			}
			if l.ending {
				return reply(Drive{}, ErrNotRunning)
			}
			k := l.drives[device]
			if k == nil {
				if found, err := findDrive(l.List(), device); err == nil {
					k, device = l.drives[found.Device], found.Device
				}
			}
			switch {
			case k == nil:
				return reply(Drive{}, ErrNoDrive)
			case k.working:
				return false
			case !asked:
				asked = true
				if k.mount != nil {
					return reply(k.show(), fmt.Errorf("it is mounted at %s already", k.mount.claim.Path))
				}
				k.asked, k.ejected, k.stuck, k.probe = &opt, false, nil, nil
				l.again = true
				return false
			case k.mount != nil:
				return reply(k.show(), nil)
			case k.stuck == nil && k.verdict.Action != LeaveDrive:
				return false
			}
			s := k.show()
			reason := s.Reason
			if s.Remedy != "" {
				reason += "; " + s.Remedy
			}
			return reply(s, errors.New(reason))
		})
	})
	if err != nil {
		return fail(err)
	}
	select {
	case a := <-done:
		if a.err != nil {
			_, err := fail(a.err)
			return a.d, err
		}
		return a.d, nil
	case <-ctx.Done():
		return fail(context.Cause(ctx))
	}
}
