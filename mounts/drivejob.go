package mounts

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// A mountJob mounts one drive. It runs beside the loop and owns its claim
// until it returns.
type mountJob struct {
	sysfs, proc string
	node        string
	device      udev.Device
	claim       claim
	spec        MountSpec
	fsck        FsckPolicy
	fsckLimit   time.Duration
}

// run checks the file system where the policy says so, makes the folder,
// mounts, and proves that the drive is still the one that was meant. After an
// error nothing is mounted; the folder is the caller's to remove.
func (j *mountJob) run(ctx context.Context) (*mounted, error) {
	m := &mounted{spec: j.spec}
	readOnly := j.spec.Options.ReadOnly || j.spec.Media
	if j.spec.Media {
		m.reason = "the medium is read-only"
	}
	shared, err := inUse(j.node)
	if err != nil {
		return nil, err
	}
	if shared {
		m.note = j.elsewhere()
	} else if j.fsck == FsckAuto && !readOnly {
		if why := checkFileSystem(ctx, j.node, j.spec.Type, j.fsckLimit); why != "" {
			readOnly, m.reason = true, why
			m.remedy = "eject it and check it by hand, here or on a computer"
		}
	}

	dir, err := claimDir(j.claim.Path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	j.claim.Ino, j.claim.Existed = dir.ino, !dir.made
	way, before, err := mountDevice(ctx, j.node, dir, attempts(j.spec.Type, j.spec.Options, readOnly), j.spec.Options.Exec)
	if err != nil {
		return nil, err
	}
	undo := func(err error) (*mounted, error) {
		return nil, errors.Join(err, unix.Unmount(j.claim.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
	}
	id, err := mountID(unix.AT_FDCWD, j.claim.Path)
	if err != nil {
		return undo(fmt.Errorf("looking at the new mount %s: %w", j.claim.Path, err))
	}
	table, err := mountsOf(j.proc, "self")
	if err != nil {
		return undo(err)
	}
	top := topMount(table, j.claim.Path)
	if top == nil || uint64(top.ID) != id {
		return undo(fmt.Errorf("the new mount at %s is not in the mount table", j.claim.Path))
	}
	j.claim.SDev = fmt.Sprintf("%d:%d", top.Major, top.Minor)
	j.claim.Since = time.Now()
	m.claim = j.claim
	m.plugging = j.claim.plugging(j.sysfs, id)
	if err := m.plugging.Alive(); err != nil {
		return undo(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(j.claim.Path, &st); err != nil {
		return undo(fmt.Errorf("looking at the new mount %s: %w", j.claim.Path, err))
	}
	m.readOnly = st.Flags&unix.ST_RDONLY != 0
	switch {
	case m.readOnly && way.readOnly && m.reason == "" && before != nil:
		m.reason = "mounted read-only, since writing is not possible: " + before.Error()
		m.remedy = "flip the drive's switch if it has one, or check it on a computer"
	case m.readOnly && !way.readOnly:
		m.reason = "the kernel mounted it read-only, since the file system has faults or lacks support for writing"
		m.remedy = "check it on a computer"
	}
	return m, nil
}

// elsewhere says who else has mounted the device.
func (j *mountJob) elsewhere() string {
	who := "in another container or by the system"
	if views, err := namespaces(j.proc); err == nil {
		if others := mountsFrom(j.proc, views, 0, isFrom(j.device)); len(others) > 0 {
			who = others[0].String()
		}
	}
	return "it is in use elsewhere too (" + who + "); the options are those of its first mount"
}

func (c claim) plugging(sysfs string, mountID uint64) *Plugging {
	return &Plugging{
		Device: c.Device, Major: c.Major, Minor: c.Minor, DiskSeq: c.DiskSeq, Partition: c.Partition,
		UUID: c.UUID, Path: c.Path, MountID: mountID, sysfs: sysfs,
	}
}

// inUse reports whether a device is mounted or otherwise claimed by anybody in
// any namespace: the kernel gives it exclusively to one user.
func inUse(node string) (bool, error) {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == unix.EBUSY {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening %s: %w", node, err)
	}
	return false, unix.Close(fd)
}

// takeDown removes the mount of a drive that is gone. The mount disappears at
// once for everybody; whoever has files open gets errors. It reports whether
// something had not been written.
func takeDown(m *mounted) (Loss, error) {
	// Opened before, since afterwards nothing leads there.
	root, openErr := unix.Open(m.claim.Path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	err := m.claim.detach()
	if openErr != nil {
		if m.readOnly {
			return NoLoss, err
		}
		return PossibleLoss, err
	}
	loss := NoLoss
	if !m.readOnly {
		withoutBarrier(root, m.claim.Type)
		if unix.Syncfs(root) != nil {
			loss = PossibleLoss
		}
	}
	return loss, errors.Join(err, unix.Close(root))
}

// withoutBarrier keeps ext4 from flushing the cache of a device that is gone.
// It does that at every sync, also when nothing is to be written, so the error
// would say nothing about lost data.
func withoutBarrier(root int, fstype string) {
	if !strings.HasPrefix(fstype, "ext") {
		return
	}
	// When this fails, as before Linux 5.2, a loss is reported too often.
	fs, err := unix.Fspick(root, "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return
	}
	if unix.FsconfigSetFlag(fs, "nobarrier") == nil {
		_ = unix.FsconfigReconfigure(fs)
	}
	_ = unix.Close(fs)
}
