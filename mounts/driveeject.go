package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// EjectOptions are choices for an eject.
type EjectOptions struct {
	// Wait waits until nobody uses the drive, as long as the context lasts.
	// Otherwise a drive in use is an *InUseError and stays mounted.
	Wait bool
	// KeepPower leaves the port on, so that the drive stays visible.
	KeepPower bool
	// Progress is told how it goes, about twice a second. May be nil.
	Progress func(EjectProgress)
}

// EjectProgress says how far an eject came.
type EjectProgress struct {
	Step    EjectStep
	Written int64    // bytes written to the disk since the eject began
	Left    int64    // bytes that the whole system has still to write: at most so much
	Holders []Holder // in StepWait: who uses the drive
}

// An EjectStep is a part of an eject.
type EjectStep string

// The steps, in their order.
const (
	StepSync    EjectStep = "writing"      // what is in memory goes to the drive
	StepWait    EjectStep = "waiting"      // somebody uses the drive
	StepUnmount EjectStep = "unmounting"   //
	StepPower   EjectStep = "powering off" //
)

// Ejected says how an eject ended.
type Ejected struct {
	Disk    string   // kernel name
	Drives  []string // names of the drives on it that were unmounted
	Safe    bool     // everything is written and nobody uses the disk: safe to remove
	Power   bool     // the port was powered off
	Comment string   // why it is not safe, or why the power stayed on
}

// Eject writes everything to the disk that holds the drive, unmounts all its
// drives, and powers the port off where that is possible. What says which
// drive, as in Find. The disk may be pulled out when Safe is set, and only then.
// When a drive is in use, everything stays mounted.
func (d *Drives) Eject(ctx context.Context, what string, opt EjectOptions) (Ejected, error) {
	type answer struct {
		e   Ejected
		err error
	}
	done := make(chan answer, 1)
	if err := d.call(ctx, func(l *driveLoop) {
		reply := func(e Ejected, err error) {
			l.answers = append(l.answers, func() { done <- answer{e, err} })
		}
		l.waiting = append(l.waiting, func() bool { return l.startEject(ctx, what, opt, reply) })
	}); err != nil {
		return Ejected{}, err
	}
	select {
	case a := <-done:
		return a.e, a.err
	case <-ctx.Done():
		// The worker ends as soon as the kernel lets it.
		return Ejected{}, fmt.Errorf("ejecting %s: %w", what, context.Cause(ctx))
	}
}

// physical returns the disk that a device lies on, through encryption.
func (l *driveLoop) physical(d udev.Device) string {
	for range 8 {
		if len(d.Slaves) == 0 {
			break
		}
		below, ok := l.drives[d.Slaves[0]]
		if !ok {
			break
		}
		d = below.dev
	}
	return d.Disk
}

// startEject starts the worker once no other is busy with the disk, and
// reports whether it did or gave up.
func (l *driveLoop) startEject(ctx context.Context, what string, opt EjectOptions, reply func(Ejected, error)) bool {
	if err := ctx.Err(); err != nil {
		reply(Ejected{}, context.Cause(ctx))
		return true
	}
	if l.ending {
		reply(Ejected{}, ErrNotRunning)
		return true
	}
	list := make([]Drive, 0, len(l.drives))
	for _, k := range l.drives {
		if !k.verdict.Hidden {
			list = append(list, k.show())
		}
	}
	target, err := findDrive(list, what)
	if err != nil {
		reply(Ejected{}, err)
		return true
	}
	disk := l.physical(l.drives[target.Device].dev)
	if reason, kept := l.kept[disk]; kept {
		reply(Ejected{}, fmt.Errorf("drive %s is left alone: %s", what, reason))
		return true
	}
	var all []*drive
	for _, k := range l.drives {
		if l.physical(k.dev) == disk {
			if k.working {
				return false
			}
			all = append(all, k)
		}
	}
	slices.SortFunc(all, func(a, b *drive) int { return strings.Compare(a.dev.Name, b.dev.Name) })
	job := ejectJob{sysfs: l.sysfs, proc: l.proc, disk: l.drives[disk].dev, opt: opt}
	for _, k := range all {
		k.working = true
		if k.mount != nil {
			k.folder = k.mount.claim.Path
			job.mounts = append(job.mounts, k.mount)
		}
		if openedByUs(k.dev) {
			job.mappers = append(job.mappers, k.dev.DMName)
		}
	}
	job.node, err = l.nodes.path(job.disk)
	l.work(func(wctx context.Context) func() {
		var e Ejected
		if err == nil {
			both, cancel := context.WithCancelCause(wctx)
			stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
			e, err = job.run(both)
			stop()
			cancel(nil)
		}
		return func() {
			for _, k := range all {
				switch {
				case k.mount != nil && slices.Contains(job.unmounted, k.mount):
					if derr := errors.Join(k.mount.claim.removeDir(), l.record.drop(k.mount.claim.Path)); derr != nil {
						l.failed(derr)
					}
					e.Drives = append(e.Drives, k.verdict.Name)
					k.mount = nil
					k.ejected = err == nil
				case k.mount == nil && err == nil:
					k.ejected = true
				}
				k.ejectedID = k.verdict.ID
				l.free(k)
			}
			reply(e, err)
		}
	})
	return true
}

// An ejectJob takes one disk out of use. It runs beside the loop.
type ejectJob struct {
	sysfs, proc string
	disk        udev.Device
	node        string
	mounts      []*mounted
	mappers     []string
	opt         EjectOptions

	unmounted []*mounted
}

// ejectTick is how often progress is told and a busy drive tried again.
const ejectTick = 500 * time.Millisecond

func (j *ejectJob) run(ctx context.Context) (Ejected, error) {
	e := Ejected{Disk: j.disk.Name}
	begin := sectorsWritten(j.sysfs, j.disk.Name)
	tell := func(p EjectProgress) {
		if j.opt.Progress != nil {
			p.Written = (sectorsWritten(j.sysfs, j.disk.Name) - begin) * 512
			p.Left = unwritten(j.proc)
			j.opt.Progress(p)
		}
	}
	for _, m := range j.mounts {
		if err := j.sync(m, tell); err != nil {
			return e, err
		}
		if err := ctx.Err(); err != nil {
			return e, context.Cause(ctx)
		}
	}
	for _, m := range j.mounts {
		if err := j.unmount(ctx, m, tell); err != nil {
			return e, err
		}
		j.unmounted = append(j.unmounted, m)
	}
	for _, name := range j.mappers {
		if err := closeMapper(ctx, name); err != nil {
			return e, err
		}
	}
	tell(EjectProgress{Step: StepPower})
	j.finish(&e)
	return e, nil
}

// sync writes what is in memory and tells meanwhile how much is left.
func (j *ejectJob) sync(m *mounted, tell func(EjectProgress)) error {
	if m.readOnly {
		return nil
	}
	root, err := os.OpenFile(m.claim.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("writing to %s: %w", m.claim.Path, err)
	}
	defer root.Close()
	// What the descriptor leads to must be the drive, not a folder below it.
	if id, err := mountID(int(root.Fd()), ""); err != nil || id != m.plugging.MountID {
		return fmt.Errorf("writing to %s: %w", m.claim.Path, errors.Join(ErrNotOnDrive, err))
	}
	done := make(chan error, 1)
	go func() { done <- unix.Syncfs(int(root.Fd())) }()
	tick := time.NewTicker(ejectTick)
	defer tick.Stop()
	tell(EjectProgress{Step: StepSync})
	for {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("writing to %s failed, and data may be lost: %w", m.claim.Path, err)
			}
			return nil
		case <-tick.C:
			tell(EjectProgress{Step: StepSync})
		}
	}
}

// unmount unmounts for real, not lazily, and waits for that if it shall.
func (j *ejectJob) unmount(ctx context.Context, m *mounted, tell func(EjectProgress)) error {
	tell(EjectProgress{Step: StepUnmount})
	tick := time.NewTicker(ejectTick)
	defer tick.Stop()
	for {
		err := unix.Unmount(m.claim.Path, unix.UMOUNT_NOFOLLOW)
		if err == nil {
			// At once, so that nobody writes into the bare folder. The loop
			// does it again and tells what fails.
			_ = m.claim.removeDir()
			return nil
		}
		if err != unix.EBUSY {
			return fmt.Errorf("unmounting %s: %w", m.claim.Path, err)
		}
		who := holders(j.proc, j.sysfs, m.plugging, m.claim.SDev)
		if !j.opt.Wait {
			return &InUseError{Path: m.claim.Path, Holders: who}
		}
		tell(EjectProgress{Step: StepWait, Holders: who})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", &InUseError{Path: m.claim.Path, Holders: who}, context.Cause(ctx))
		}
	}
}

// finish proves that nobody uses the disk, flushes it and powers it off.
func (j *ejectJob) finish(e *Ejected) {
	used, err := inUse(j.node)
	if err != nil {
		e.Comment = "it can't be proved that everything is written: " + err.Error()
		return
	}
	if used {
		e.Comment = "it is still in use elsewhere, by a process that can't be seen from here"
		for _, m := range j.mounts {
			if who := holders(j.proc, j.sysfs, m.plugging, m.claim.SDev); len(who) > 0 {
				e.Comment = "it is still in use elsewhere, by " + who[0].String()
			}
		}
		return
	}
	if err := flush(j.node); err != nil {
		e.Comment = "its last writes failed: " + err.Error()
		return
	}
	e.Safe = true
	if j.opt.KeepPower {
		return
	}
	e.Power, e.Comment = j.powerOff()
}

// flush writes the device's own cache to the medium.
func flush(node string) error {
	f, err := os.Open(node)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// powerOff takes the disk off its USB port, if the port has no other disk and
// the disk is not the slot of a card reader.
func (j *ejectJob) powerOff() (bool, string) {
	if j.disk.USBPort == "" {
		return false, "it is on no USB port that could be powered off"
	}
	if j.disk.Removable && j.disk.PollsMedia {
		return false, "a card reader stays on"
	}
	devices, err := udev.List(j.sysfs)
	if err != nil {
		return false, err.Error()
	}
	for _, d := range devices {
		if d.USBPort == j.disk.USBPort && d.Disk != j.disk.Name {
			return false, "there is another disk, " + d.Disk + ", on the same USB device"
		}
	}
	// The kernel's own way out: the disk's cache is flushed and its motor
	// stopped, then the device leaves the bus and its port is suspended.
	base := filepath.Join(j.sysfs, "class/block", j.disk.Name)
	if now, err := udev.Read(j.sysfs, j.disk.Name); err != nil || !now.SamePlugging(j.disk) {
		return false, "it was pulled out already"
	}
	if err := os.WriteFile(filepath.Join(base, "device/delete"), []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, "powering off is not allowed here: " + err.Error()
	}
	if err := os.WriteFile(filepath.Join(j.sysfs, j.disk.USBPort, "remove"), []byte("1"), 0); err != nil {
		return false, "the port could not be powered off: " + err.Error()
	}
	return true, ""
}

// sectorsWritten returns how many sectors of 512 bytes were written to a disk.
func sectorsWritten(sysfs, disk string) int64 {
	fields := strings.Fields(sysText(filepath.Join(sysfs, "class/block", disk), "stat"))
	if len(fields) < 7 {
		return 0
	}
	n, _ := strconv.ParseInt(fields[6], 10, 64)
	return n
}

// unwritten returns how many bytes the system has still to write, to any disk.
func unwritten(proc string) int64 {
	b, err := os.ReadFile(filepath.Join(proc, "meminfo"))
	if err != nil {
		return 0
	}
	var sum int64
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		if key != "Dirty" && key != "Writeback" {
			continue
		}
		n, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
		sum += n * 1024
	}
	return sum
}
