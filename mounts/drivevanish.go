package mounts

import (
	"fmt"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// detach removes the mount of a drive that is gone, busy or not, and the folder
// with it where it is ours. A mount that somebody else removed is no error.
func (c claim) detach() error {
	if !c.Existed && vanish(c) == nil {
		return nil
	}
	err := unix.Unmount(c.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmounting %s: %w", c.Path, err)
	}
	return nil
}

// vanish removes a mount folder of ours together with what is mounted on it,
// in one step. In two steps, unmount and rmdir, a program that writes by path
// could make files in the bare folder in between: they would land on the
// system's disk.
//
// The kernel refuses rmdir only for mount points of the caller's own mount
// namespace; everywhere else it detaches what is mounted on the removed folder
// (rmdir(2), mount_namespaces(7), Linux 3.18). So the folder is removed from a
// namespace in which nothing is mounted on it any more. Nothing is changed
// after an error.
func vanish(c claim) error {
	if err := onSpareThread(func() error { return vanishElsewhere(c) }); err != nil {
		return fmt.Errorf("removing the mount folder %s with its mount: %w", c.Path, err)
	}
	return nil
}

// onSpareThread runs f on a thread of its own that ends with f, so that f may
// change the namespaces of that thread. It is never the first thread of the
// process: the runtime can't end that one, and /proc/self shows its namespaces.
func onSpareThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Kept here, the first thread can't be given to the next one.
			defer runtime.UnlockOSThread()
			done <- onSpareThread(f)
			return
		}
		// Never unlocked: the thread and its namespaces end with this goroutine.
		done <- f()
	}()
	return <-done
}

func vanishElsewhere(c claim) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	// Else the unmounting would be passed on to where we came from.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	for {
		err := unix.Unmount(c.Path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == unix.EINVAL {
			break // nothing is mounted there any more
		}
		if err != nil {
			return fmt.Errorf("unmounting: %w", err)
		}
	}
	parent, err := openParent(c.Path, false)
	if err != nil {
		return err
	}
	defer parent.Close()
	name := filepath.Base(c.Path)
	var st unix.Stat_t
	if err := unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Ino != c.Ino {
		return errOccupied // somebody put another folder there
	}
	return unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
}
