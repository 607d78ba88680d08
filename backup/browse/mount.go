package browse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// Errors of Mount.
var (
	// ErrNotEmpty says that files would be hidden by a mount.
	ErrNotEmpty = errors.New("the folder is not empty; choose one that is")
	// ErrInUse says that a mount could be detached but not ended.
	ErrInUse = errors.New("somebody still has files of it open; it ends with this program")
)

// fuseName is the type in the mount table, after "fuse.".
const fuseName = "ide49-backup"

const (
	// shelfTimeout is for how long the kernel and we take the list of
	// snapshots for current.
	shelfTimeout = 10 * time.Second
	// fixedTimeout is the same for what is in a snapshot, which never changes.
	fixedTimeout = 24 * time.Hour
	// useTimeout is how long a mount that is to end waits for those who use
	// it, before they get errors.
	useTimeout = 2 * time.Second
)

// MountOptions say what a mounted file system shows.
type MountOptions struct {
	// Host is the device whose volumes have plain names; others' names end
	// in @ and the device. By default that of the newest snapshot.
	Host string
	// Zone is that of the names of snapshots; nil is time.Local.
	Zone *time.Location
	// Filter, if set, chooses the snapshots that are shown.
	Filter func(*backup.Snapshot) bool
	// Ready, if set, is called when the file system can be used.
	Ready func()
	// Problem, if set, is told what can't be read, from several goroutines.
	// Those who use the file system see EIO.
	Problem func(err error)
}

// Mount shows all snapshots as a read-only file system in dir, an empty
// folder, until ctx is cancelled (then it returns nil) or somebody else
// unmounts it (the same). Snapshots that are made or removed meanwhile appear
// and go. It looks below the folder of a snapshot's volume:
//
//	volumes/NAME/2026-11-22T03-00/…   and latest
//	by-day/2026-11-22/NAME
//
// As root everybody can use it, with the permissions that the files had; else
// only the caller, with all. It is nosuid and nodev. When it is to end while
// files are open, it is detached at once and those who have them get errors
// soon.
//
// A mount of this kind whose program died is taken away first.
func (v *View) Mount(ctx context.Context, dir string, opt MountOptions) error {
	if err := v.mount(ctx, dir, opt); err != nil {
		return fmt.Errorf("mount the snapshots on %s: %w", dir, err)
	}
	return nil
}

func (v *View) mount(ctx context.Context, dir string, opt MountOptions) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := clearDead(dir); err != nil {
		return err
	}
	switch list, err := os.ReadDir(dir); {
	case err != nil:
		return err
	case len(list) > 0:
		return ErrNotEmpty
	}
	if opt.Zone == nil {
		opt.Zone = time.Local
	}
	if opt.Problem == nil {
		opt.Problem = func(error) {}
	}
	m := &mounted{v: v, ctx: ctx, opt: opt}
	if _, err := m.shelves(ctx); err != nil {
		return err
	}
	root := os.Geteuid() == 0
	options := []string{"ro", "noatime"} // for fusermount3, which sets nosuid and nodev itself
	if root {
		options = []string{"default_permissions"} // the others are flags of mount(2)
	}
	short := shelfTimeout
	server, err := fusefs.Mount(dir, &shelfNode{m: m}, &fusefs.Options{
		EntryTimeout: &short, AttrTimeout: &short, NullPermissions: true,
		RootStableAttr: &fusefs.StableAttr{Ino: 1, Gen: 1},
		MountOptions: fuse.MountOptions{
			AllowOther: root, Options: options, FsName: "ide49-backup", Name: fuseName,
			DirectMount: true, DirectMountStrict: root,
			DirectMountFlags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_RDONLY | unix.MS_NOATIME,
			MaxReadAhead:     1 << 20, MaxWrite: 1 << 20,
		},
	})
	if err != nil {
		return err
	}
	// Known while it is mounted: without it nothing can be aborted.
	var st unix.Stat_t
	connection := ""
	if unix.Lstat(dir, &st) == nil {
		connection = strconv.FormatUint(uint64(unix.Minor(st.Dev)), 10)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server.Wait()
	}()
	if opt.Ready != nil {
		opt.Ready()
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
	}
	if server.Unmount() == nil {
		<-ended
		return nil
	}
	// Somebody is in it. Nobody else gets in, and those who are get errors.
	if err := detach(dir); err != nil {
		return err
	}
	select {
	case <-ended:
		return nil
	case <-time.After(useTimeout):
	}
	if err := abort(connection); err != nil {
		return fmt.Errorf("%w (%w)", ErrInUse, err)
	}
	<-ended
	return nil
}

// clearDead takes away mounts of ours on dir whose program is gone.
func clearDead(dir string) error {
	for range 16 { // one may hide another
		// Attributes may come from the kernel's memory; opening can't.
		f, err := os.Open(dir)
		if !errors.Is(err, unix.ENOTCONN) {
			if err == nil {
				err = f.Close()
			}
			return err
		}
		found, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
		if err != nil {
			return err
		}
		if len(found) == 0 || found[0].FSType != "fuse."+fuseName {
			return fmt.Errorf("a dead mount is there that is not ours; unmount it: %w", unix.ENOTCONN)
		}
		if err := detach(dir); err != nil {
			return err
		}
	}
	return unix.ENOTCONN
}

// abort ends a connection of the kernel's FUSE, whoever uses it. The control
// file system may have to be mounted for that.
func abort(connection string) (err error) {
	const control = "/sys/fs/fuse/connections"
	write := func(dir string) error {
		return os.WriteFile(filepath.Join(dir, connection, "abort"), []byte("1"), 0)
	}
	if connection == "" {
		return errors.New("its connection is not known")
	}
	if err := write(control); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir, err := os.MkdirTemp("", "fusectl-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	if err := unix.Mount("fusectl", dir, "fusectl", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return &fs.PathError{Op: "mount fusectl on", Path: dir, Err: err}
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)) }()
	return write(dir)
}

// mounted is what all nodes of a mount share.
type mounted struct {
	v   *View
	ctx context.Context // of Mount
	opt MountOptions

	mu     sync.Mutex
	root   *shelf
	loaded time.Time
}

// with returns an operation's context that also ends with the mount.
func (m *mounted) with(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	release := context.AfterFunc(m.ctx, cancel)
	return ctx, func() { release(); cancel() }
}

// shelves returns the current list of snapshots.
func (m *mounted) shelves(ctx context.Context) (*shelf, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.root != nil && time.Since(m.loaded) < shelfTimeout {
		return m.root, nil
	}
	all, err := m.v.repo.Snapshots(ctx)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		if len(all) == 0 && m.root == nil {
			return nil, err
		}
		m.opt.Problem(err)
		if len(all) == 0 {
			return m.root, nil // the store is away; keep what was seen
		}
	}
	host := m.opt.Host
	var shown []*backup.Snapshot
	for _, s := range all {
		if m.opt.Filter == nil || m.opt.Filter(s) {
			shown = append(shown, s)
		}
	}
	if host == "" && len(shown) > 0 {
		host = shown[len(shown)-1].Hostname
	}
	m.root, m.loaded = shelve(shown, host, m.opt.Zone), time.Now()
	return m.root, nil
}

// errno tells what went wrong and returns what the kernel is told.
func (m *mounted) errno(what string, err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return syscall.EINTR
	}
	m.opt.Problem(fmt.Errorf("%s: %w", what, err))
	return syscall.EIO
}
