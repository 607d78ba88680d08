package mounts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// deviceNodes finds or makes the node of a block device. A container's /dev
// does not gain nodes for drives that are plugged in later, so they are made on
// a small file system of our own.
type deviceNodes struct {
	dir     string // mount point of our own file system
	mounted bool
}

// path returns a node for d. The device number is compared, since a node may
// be left over from an earlier device.
func (n *deviceNodes) path(d udev.Device) (string, error) {
	dev := unix.Mkdev(d.Major, d.Minor)
	node := filepath.Join("/dev", strings.ReplaceAll(d.Name, "!", "/"))
	if isNode(node, dev) {
		return node, nil
	}
	node = filepath.Join(n.dir, d.Name)
	if n.mounted && isNode(node, dev) {
		return node, nil
	}
	if err := n.mount(); err != nil {
		return "", fmt.Errorf("/dev has no %s, and making a place for it failed: %w", d.Name, err)
	}
	if err := os.Remove(node); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("making a node for %s: %w", d.Name, err)
	}
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(dev)); err != nil {
		return "", fmt.Errorf("/dev has no %s, and making a node for it failed (the container needs the capability MKNOD): %w", d.Name, err)
	}
	return node, nil
}

// mount puts a tmpfs on which device nodes work at n.dir.
func (n *deviceNodes) mount() error {
	if n.mounted {
		return nil
	}
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return err
	}
	// What an earlier run that was killed left there.
	for unix.Unmount(n.dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH) == nil {
	}
	if err := unix.Mount("ide49-dev", n.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700,size=64k"); err != nil {
		return err
	}
	n.mounted = true
	return unix.Mount("", n.dir, "", unix.MS_PRIVATE, "")
}

func (n *deviceNodes) Close() error {
	if !n.mounted {
		return nil
	}
	n.mounted = false
	return errors.Join(unix.Unmount(n.dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH), os.Remove(n.dir))
}

func isNode(path string, dev uint64) bool {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == dev
}
