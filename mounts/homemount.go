package mounts

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// cover mounts the share over the local home, and takes it away again if the
// result isn't what it should be.
func (h *Home) cover(ctx context.Context) error {
	local, err := h.keepLocal()
	if err != nil {
		return err
	}
	if err := h.attach(ctx); err != nil {
		return err
	}
	if err := h.prove(ctx, local); err != nil {
		if uerr := h.uncover(true); uerr != nil {
			err = errors.Join(err, uerr)
		}
		return err
	}
	return nil
}

// keepLocal makes sure that the local home shows at the second place, and
// returns its identity. The home isn't covered yet.
func (h *Home) keepLocal() (fs.FileInfo, error) {
	home, err := os.Stat(h.cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("local home: %w", err)
	}
	if err := os.MkdirAll(h.cfg.Local, 0o700); err != nil {
		return nil, fmt.Errorf("local home: %w", err)
	}
	second, err := os.Stat(h.cfg.Local)
	if err != nil {
		return nil, fmt.Errorf("local home: %w", err)
	}
	if os.SameFile(home, second) {
		return home, nil
	}
	entries, err := os.ReadDir(h.cfg.Local)
	if err != nil {
		return nil, fmt.Errorf("local home: %w", err)
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("local home: %s holds other files than %s; mount the same volume at both, or choose another folder as local", h.cfg.Local, h.cfg.Path)
	}
	if err := unix.Mount(h.cfg.Path, h.cfg.Local, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("binding the local home %s to %s: %w", h.cfg.Path, h.cfg.Local, err)
	}
	if second, err = os.Stat(h.cfg.Local); err != nil || !os.SameFile(home, second) {
		return nil, fmt.Errorf("binding the local home %s to %s had no effect", h.cfg.Path, h.cfg.Local)
	}
	return home, nil
}

// attach mounts the share by the configured client.
func (h *Home) attach(ctx context.Context) error {
	if h.cfg.Client != ClientUser {
		err := h.attachKernel(ctx)
		if err == nil || h.cfg.Client == ClientKernel || !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	m, err := h.cfg.Share.User(ctx, h.cfg.Path)
	if err != nil {
		return err
	}
	h.user = m
	return nil
}

func (h *Home) attachKernel(ctx context.Context) error {
	options, err := h.cfg.Share.Kernel(ctx)
	if err != nil {
		return err
	}
	defer clear(options)
	err = mountBytes(h.cfg.Share.Source(), h.cfg.Path, "cifs", unix.MS_NOSUID|unix.MS_NODEV, options)
	switch {
	case err == nil:
		return nil
	case err == unix.ENODEV:
		return fmt.Errorf("mount %s: the kernel has no cifs client; set client: user: %w", h.cfg.Share.Source(), err)
	case err == unix.ENOENT:
		// Our own client found the share a moment ago.
		return fmt.Errorf("mount %s: the kernel lacks a module for SMB 3.1.1 (cmac, sha512, aes, ccm, gcm); set client: user: %w", h.cfg.Share.Source(), err)
	}
	return fmt.Errorf("mount %s: %w", h.cfg.Share.Source(), err)
}

// uncover unmounts the local paths and the share from the home. Not lazily it
// fails with ErrHomeInUse while programs use it.
func (h *Home) uncover(lazy bool) error {
	table, err := readTable("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	for _, m := range slices.Backward(table) {
		if m.Mountpoint != h.cfg.Path && under(m.Mountpoint, h.cfg.Path) && h.isLocalPath(m.Mountpoint) {
			if err := unix.Unmount(m.Mountpoint, flags); err != nil {
				return homeInUse(m.Mountpoint, err)
			}
		}
	}
	if h.user != nil {
		err := h.user.Unmount(lazy)
		if errors.Is(err, unix.EBUSY) {
			return homeInUse(h.cfg.Path, err)
		}
		h.user = nil
		return err
	}
	if top := h.top(table); top != TopShare && top != TopDead {
		return nil
	}
	if err := unix.Unmount(h.cfg.Path, flags); err != nil {
		return homeInUse(h.cfg.Path, err)
	}
	return nil
}

func (h *Home) isLocalPath(at string) bool {
	rel, err := filepath.Rel(h.cfg.Path, at)
	return err == nil && slices.Contains(h.cfg.LocalPaths, rel)
}

func homeInUse(at string, err error) error {
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmount %s: %w: %w", at, ErrHomeInUse, err)
	}
	return fmt.Errorf("unmount %s: %w", at, err)
}

// verifyLimit bounds the use of a fresh mount. The kernel's client answers
// within twice its echo interval.
const verifyLimit = 30 * time.Second

// prove checks from the mount table and by a file that the home shows the
// share, and the second place the local home.
func (h *Home) prove(ctx context.Context, local fs.FileInfo) error {
	table, err := readTable("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if h.top(table) != TopShare {
		return fmt.Errorf("%s was mounted at %s, but the mount table doesn't show it on top", h.cfg.Share.Source(), h.cfg.Path)
	}
	if err := h.localShows(table); err != nil {
		return err
	}
	second, err := os.Stat(h.cfg.Local)
	if err != nil || !os.SameFile(local, second) {
		return fmt.Errorf("the local home no longer shows at %s", h.cfg.Local)
	}
	if h.user != nil {
		// Probe wrote a file with the same client a moment ago. We must not
		// use the mount itself: a process that is killed while it waits for
		// its own file system hangs for good, and the mount with it.
		return nil
	}
	// A file system that hangs must not hang us: the probe is left behind
	// then, and ends when the kernel's client gives up.
	ctx, cancel := context.WithTimeout(ctx, verifyLimit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- h.proveByFile() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the share at %s doesn't answer: %w", h.cfg.Path, ctx.Err())
	}
}

// localShows checks that the second place of the local home isn't a share.
func (h *Home) localShows(table []*mountinfo.Info) error {
	var best *mountinfo.Info
	for _, m := range table {
		if under(h.cfg.Local, m.Mountpoint) && (best == nil || len(m.Mountpoint) >= len(best.Mountpoint)) {
			best = m
		}
	}
	if best != nil && isShare(best) {
		return fmt.Errorf("local: %s lies on the share %s and not on the local home", h.cfg.Local, best.Source)
	}
	return nil
}

func (h *Home) proveByFile() (err error) {
	name := ".ide49-probe-" + rand.Text()
	at := filepath.Join(h.cfg.Path, name)
	f, err := os.OpenFile(at, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing to the share: %w", err)
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if rerr := os.Remove(at); rerr != nil && err == nil {
			err = fmt.Errorf("removing from the share: %w", rerr)
		}
	}()
	text := []byte(name)
	if _, err := f.Write(text); err != nil {
		return fmt.Errorf("writing to the share: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing to the share: %w", err)
	}
	got := make([]byte, len(text))
	if _, err := f.ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, text) {
		return fmt.Errorf("reading from the share: %q, %w", got, cmpErr(err))
	}
	if _, err := os.Lstat(filepath.Join(h.cfg.Local, name)); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("what is written to %s shows in the local home %s too", h.cfg.Path, h.cfg.Local)
	}
	return nil
}

func cmpErr(err error) error {
	if err == nil {
		return errors.New("which is not what was written")
	}
	return err
}

// bind shows folders of the local home in the share. Missing ones are made on
// both sides. Nothing outside of the home is ever mounted on, whatever links
// somebody planted in the share.
func (h *Home) bind(paths []string) error {
	for _, p := range paths {
		if err := h.bindOne(p); err != nil {
			return fmt.Errorf("local_paths: %s: %w", p, err)
		}
	}
	return nil
}

func (h *Home) bindOne(p string) error {
	from, err := openBelow(h.cfg.Local, p)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := openBelow(h.cfg.Path, p)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	return unix.Mount(fmt.Sprintf("/proc/self/fd/%d", from), fmt.Sprintf("/proc/self/fd/%d", to), "", unix.MS_BIND, "")
}

// openBelow opens a folder below another, makes the parts that are missing,
// and follows no links.
func openBelow(dir, p string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var owner unix.Stat_t
	if err := unix.Fstat(fd, &owner); err != nil {
		unix.Close(fd)
		return -1, err
	}
	for name := range strings.SplitSeq(p, "/") {
		made := unix.Mkdirat(fd, name, 0o700)
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == nil && made == nil {
			// The home's owner must be able to use it; a share has owners of
			// its own and may refuse.
			_ = unix.Fchownat(next, "", int(owner.Uid), int(owner.Gid), unix.AT_EMPTY_PATH)
		}
		unix.Close(fd)
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

// mountBytes is mount(2) with options that can be overwritten afterwards.
func mountBytes(source, target, fstype string, flags uintptr, options []byte) error {
	s, err := unix.BytePtrFromString(source)
	if err != nil {
		return err
	}
	t, err := unix.BytePtrFromString(target)
	if err != nil {
		return err
	}
	ty, err := unix.BytePtrFromString(fstype)
	if err != nil {
		return err
	}
	if bytes.IndexByte(options, 0) >= 0 {
		return unix.EINVAL
	}
	o := append(make([]byte, 0, len(options)+1), options...)
	o = append(o, 0)
	defer clear(o)
	return mountRaw(s, t, ty, flags, o)
}

func ctimeOf(info fs.FileInfo) time.Time {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return time.Unix(st.Ctim.Unix())
	}
	return info.ModTime()
}
