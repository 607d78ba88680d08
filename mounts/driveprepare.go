package mounts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
	"unsafe"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// Contents says what is on a device that is going to be overwritten, and how
// its owner confirms that.
type Contents struct {
	Device                string // kernel name
	Vendor, Model, Serial string
	Size                  int64
	Parts                 []Part // what was found on it; empty: nothing

	// Ask names what must be typed to confirm, as "the last four characters
	// of its serial number".
	Ask string

	plugging udev.Device
	answer   string
}

// A Part is a partition, or the whole device, with something on it.
type Part struct {
	Device      string
	Type, Label string // Type is empty when nothing known is on it
	Size        int64
}

// PrepareOptions say what Prepare makes.
type PrepareOptions struct {
	Type  string // "ext4", the default, or "exfat"
	Label string // default "BACKUP"
	// Confirm shows a person what is lost and returns what the person typed.
	// An error ends it. Nothing is touched before.
	Confirm func(Contents) (string, error)
}

// ErrNotConfirmed says that what was typed is not what was asked for.
var ErrNotConfirmed = errors.New("not confirmed")

// A maker is a program that makes a file system.
type maker struct {
	tool    []string
	label   string // flag before the label
	longest int    // label: bytes for ext4, characters for exFAT
	count   func(string) int
}

var makers = map[string]maker{
	"ext4":  {[]string{"mkfs.ext4", "-q", "-F", "-m", "0"}, "-L", 16, func(s string) int { return len(s) }},
	"exfat": {[]string{"mkfs.exfat"}, "-L", 11, utf8.RuneCountInString},
}

// Prepare makes a new file system over all of a device, a whole disk or one
// partition, after Confirm returned what Contents asks for. It refuses disks
// of the system, devices that are mounted or otherwise in use, and everything
// that would not be mounted as a drive. The drive is mounted afterwards as any
// other that is plugged in.
func (d *Drives) Prepare(ctx context.Context, device string, opt PrepareOptions) error {
	device = strings.TrimPrefix(device, "/dev/")
	if err := d.prepare(ctx, device, opt); err != nil {
		return fmt.Errorf("preparing %s: %w", device, err)
	}
	return nil
}

func (d *Drives) prepare(ctx context.Context, device string, opt PrepareOptions) error {
	opt.Type, opt.Label = cmp.Or(opt.Type, "ext4"), cmp.Or(opt.Label, "BACKUP")
	mk, ok := makers[opt.Type]
	if !ok {
		return fmt.Errorf("%q can't be made; say ext4 or exfat", opt.Type)
	}
	if cleanName(opt.Label) != opt.Label || mk.count(opt.Label) > mk.longest {
		return fmt.Errorf("the label %q must be a plain name of at most %d characters", opt.Label, mk.longest)
	}
	c, err := d.Contents(ctx, device)
	if err != nil {
		return err
	}
	typed, err := opt.Confirm(c)
	if err != nil {
		return err
	}
	if !strings.EqualFold(strings.TrimSpace(typed), c.answer) {
		return fmt.Errorf("%w: type %s", ErrNotConfirmed, c.Ask)
	}
	done := make(chan error, 1)
	err = d.call(ctx, func(l *driveLoop) {
		reply := func(err error) { l.answers = append(l.answers, func() { done <- err }) }
		all, err := l.overwritable(device)
		if err == nil && !l.drives[device].dev.SamePlugging(c.plugging) {
			err = fmt.Errorf("%w: another one is in its place", ErrDriveGone)
		}
		var node string
		if err == nil {
			node, err = l.nodes.path(c.plugging)
		}
		if err != nil {
			reply(err)
			return
		}
		for _, k := range all {
			k.working = true
		}
		job := prepareJob{sysfs: l.sysfs, device: c.plugging, node: node, maker: mk, label: opt.Label}
		l.work(func(wctx context.Context) func() {
			both, cancel := context.WithCancelCause(wctx)
			stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
			err := job.run(both)
			stop()
			cancel(nil)
			return func() {
				for _, k := range all {
					if job.touched {
						k.probe, k.stuck, k.ejected, k.asked = nil, nil, false, nil
					}
					l.free(k)
				}
				reply(err)
			}
		})
	})
	if err != nil {
		return err
	}
	// Not given up with ctx: half a file system must not go unnoticed. The
	// program that makes it ends with ctx.
	return <-done
}

// Contents says what is on a device and how overwriting it is confirmed, or
// why Prepare would refuse it.
func (d *Drives) Contents(ctx context.Context, device string) (Contents, error) {
	device = strings.TrimPrefix(device, "/dev/")
	var (
		c       Contents
		devices []udev.Device
		nodes   []string
		err     error
	)
	if cerr := d.call(ctx, func(l *driveLoop) {
		var all []*drive
		if all, err = l.overwritable(device); err != nil {
			return
		}
		for _, k := range all {
			var node string
			if node, err = l.nodes.path(k.dev); err != nil {
				return
			}
			devices, nodes = append(devices, k.dev), append(nodes, node)
		}
		c.describe(l.drives[device].dev)
	}); cerr != nil {
		return Contents{}, cerr
	}
	if err != nil {
		return Contents{}, err
	}
	for i, dev := range devices {
		p, err := probe(ctx, nodes[i])
		if err != nil {
			return Contents{}, err
		}
		if p.Outcome == ProbeNothing || p.Type == "" && len(devices) > 1 {
			continue // a disk that has partitions is described by them
		}
		c.Parts = append(c.Parts, Part{Device: dev.Name, Type: p.Type, Label: printable(p.Label), Size: dev.Size})
	}
	return c, nil
}

// describe fills in what a device is and how overwriting it is confirmed.
func (c *Contents) describe(d udev.Device) {
	c.Device, c.Size, c.plugging = d.Name, d.Size, d
	c.Vendor, c.Model, c.Serial = printable(d.Vendor), printable(d.Model), printable(d.Serial)
	serial := []rune(strings.TrimSpace(c.Serial))
	switch {
	case len(serial) == 0:
		c.Ask, c.answer = "its device name, "+d.Name+", as it has no serial number", d.Name
	case len(serial) <= 4:
		c.Ask, c.answer = "its serial number", string(serial)
	default:
		c.Ask, c.answer = "the last four characters of its serial number", string(serial[len(serial)-4:])
	}
}

// overwritable returns a device and its partitions, or why it must not be
// overwritten.
func (l *driveLoop) overwritable(device string) ([]*drive, error) {
	l.look() // what was mounted since the last look came by no event
	if l.blind != nil {
		return nil, fmt.Errorf("it can't be told which disks the system uses: %w", l.blind)
	}
	target := l.drives[device]
	if target == nil {
		return nil, ErrNoDrive
	}
	if reason, kept := l.kept[target.dev.Disk]; kept {
		return nil, errors.New(reason)
	}
	disk := target.dev
	if d, ok := l.drives[target.dev.Disk]; ok {
		disk = d.dev
	}
	p := planner{DriveView: DriveView{Config: l.cfg}}
	if !p.candidate(target.dev, disk) {
		return nil, errors.New("it is neither on USB nor removable; name it below drives.also in the configuration if it is meant")
	}
	all := []*drive{target}
	for _, name := range target.dev.Partitions {
		if k := l.drives[name]; k != nil {
			all = append(all, k)
		}
	}
	for _, k := range all {
		switch {
		case k.mount != nil:
			return nil, fmt.Errorf("%s is mounted at %s; eject it first: ide49-backup drives eject --keep-power %s", k.dev.Name, k.mount.claim.Path, k.verdict.Name)
		case k.working:
			return nil, fmt.Errorf("%s is being worked on; try again in a moment", k.dev.Name)
		case len(k.dev.Holders) > 0:
			return nil, fmt.Errorf("%s is in use as part of %s", k.dev.Name, k.dev.Holders[0])
		case k.dev.ReadOnly:
			return nil, fmt.Errorf("%s is read-only", k.dev.Name)
		case !k.dev.MediaPresent():
			return nil, fmt.Errorf("%s has no medium in it", k.dev.Name)
		case k.probe != nil && strings.HasPrefix(k.probe.Label, "resin-"):
			return nil, fmt.Errorf("%s belongs to balenaOS", k.dev.Name)
		}
	}
	return all, nil
}

// A prepareJob overwrites one device. It runs beside the loop.
type prepareJob struct {
	sysfs  string
	device udev.Device
	node   string
	maker  maker
	label  string

	touched bool // something was written
}

func (j *prepareJob) run(ctx context.Context) error {
	// While it is open, its number and name can't go to another device.
	held, err := os.OpenFile(j.node, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer held.Close()
	now, err := udev.Read(j.sysfs, j.device.Name)
	if err != nil || !now.SamePlugging(j.device) || !isNode(j.node, unix.Mkdev(now.Major, now.Minor)) {
		return fmt.Errorf("%w: it was pulled out", ErrDriveGone)
	}
	if used, err := inUse(j.node); err != nil || used {
		return cmp.Or(err, errors.New("it is in use elsewhere, in another container or by the system"))
	}
	j.touched = true
	// The old partitions go first: they would lie below the new file system.
	for _, name := range now.Partitions {
		p, err := udev.Read(j.sysfs, name)
		if err != nil {
			return err
		}
		if err := deletePartition(held, p.Partition); err != nil {
			return fmt.Errorf("removing the partition %s: %w", name, err)
		}
	}
	if _, err := runTool(ctx, "wipefs", "--all", "--force", j.node); err != nil {
		return err
	}
	if _, err := runTool(ctx, j.maker.tool[0], slices.Concat(j.maker.tool[1:], []string{j.maker.label, j.label, j.node})...); err != nil {
		return err
	}
	if err := held.Sync(); err != nil {
		return err
	}
	// Tells everybody to look at it again, also a daemon that runs beside us.
	_ = os.WriteFile(filepath.Join(j.sysfs, "class/block", j.device.Name, "uevent"), []byte("change"), 0)
	return nil
}

// deletePartition makes the kernel forget a partition; nothing is written.
func deletePartition(disk *os.File, number int) error {
	// struct blkpg_partition of linux/blkpg.h.
	part := struct {
		start, length int64
		number        int32
		names         [128]byte
	}{number: int32(number)}
	arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_DEL_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, disk.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 && errno != unix.ENXIO {
		return errno
	}
	return nil
}
