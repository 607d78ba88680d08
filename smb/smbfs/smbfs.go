// Package smbfs shows a folder of a share as a file system, in user space
// (FUSE), for machines whose kernel has no cifs module.
//
// Consistency is close-to-open: what a program wrote is on the server when
// its close returned without an error, and whoever opens the file after that
// sees it. Attributes may be a second old. Files are durable after fsync; if
// the connection is lost between a write and its fsync, the fsync fails, as
// nobody can know what the server kept. While the server is away calls fail
// with "host is down" within the client's time-outs; open files go on when it
// is back.
//
// The protocol has no owners and no modes but "read-only": every file belongs
// to the mount's owner, and of a chmod only the owner's write bit has an
// effect. Hard links, devices, sockets and extended attributes are refused.
// Symbolic links are kept in small files in the form that the kernel's client
// calls mfsymlinks. Locks hold between the programs of this machine and are
// unknown to others. Names that differ only by case are one file. Renaming
// onto an existing file is two steps on the server: another client can see the
// moment between them.
package smbfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/mounts"
	"github.com/iot49/ide49-backup/smb"
)

// FSType is the type of the file system in the mount table.
const FSType = mounts.HomeFSType

// Options say how the share appears.
type Options struct {
	Owner, Group      uint32
	FileMode, DirMode fs.FileMode // permissions; 0: 0700
	ReadOnly          bool
	// Cache is how old attributes and names may be; 0: 1 second.
	Cache time.Duration
	// Private keeps other users than root out.
	Private bool
	// Source is shown in the mount table; empty: //server/share/folder.
	Source string
}

func (o *Options) complete(source string) {
	if o.FileMode == 0 {
		o.FileMode = 0o700
	}
	if o.DirMode == 0 {
		o.DirMode = 0o700
	}
	if o.Cache <= 0 {
		o.Cache = time.Second
	}
	if o.Source == "" {
		o.Source = source
	}
}

// A Mount is a share that is mounted. Its memory holds at most 4 MiB per file
// that is open for writing.
type Mount struct {
	sh     *smb.Share
	dir    string // of the share
	at     string // on this machine
	opt    Options
	server *fuse.Server
	ctx    context.Context // ends with the file system
	cancel context.CancelFunc

	// tree guards where nodes are. Whoever uses a path holds it for reading
	// as long as the path is in use; renames hold it for writing. It is
	// taken before any node's own lock.
	tree sync.RWMutex

	mu    sync.Mutex
	open  map[*node]struct{} // files with handles
	space smb.Space
	asked time.Time // when space was learnt
}

// New mounts folder dir of a share at the folder at, which must exist.
func New(sh *smb.Share, dir, at string, opt Options) (*Mount, error) {
	opt.complete(smb.Location{Server: sh.Client().Server(), Share: sh.Name(), Path: dir}.String())
	m := &Mount{sh: sh, dir: path.Clean(dir), at: at, opt: opt, open: make(map[*node]struct{})}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	if info, err := sh.Stat(m.ctx, m.dir); err != nil {
		m.cancel()
		return nil, err
	} else if !info.Dir {
		m.cancel()
		return nil, fmt.Errorf("%s: %w", opt.Source, smb.ErrNotDir)
	}
	options := []string{"default_permissions"}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if opt.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	zero := time.Duration(0)
	server, err := gofs.Mount(at, &node{m: m}, &gofs.Options{
		MountOptions: fuse.MountOptions{
			AllowOther:        !opt.Private,
			Options:           options,
			FsName:            opt.Source,
			Name:              strings.TrimPrefix(FSType, "fuse."),
			MaxWrite:          1 << 20,
			MaxReadAhead:      1 << 20,
			MaxBackground:     32,
			DisableXAttrs:     true,
			DirectMountStrict: true,
			DirectMountFlags:  flags,
		},
		EntryTimeout:    &opt.Cache,
		AttrTimeout:     &opt.Cache,
		NegativeTimeout: &zero,
		NullPermissions: true,
	})
	if err != nil {
		m.cancel()
		return nil, fmt.Errorf("mount %s at %s: %w", opt.Source, at, err)
	}
	m.server = server
	m.readAhead()
	go func() { // lives as long as the file system does
		server.Wait()
		m.cancel()
	}()
	return m, nil
}

// readAhead lets the kernel read further ahead than the 128 KiB that it allows
// file systems in user space, so that several requests are under way. Where
// /sys can't be written to, reading is slower and that is all.
//
// It asks the mount table and not the mount: a process that is killed while it
// waits for its own file system hangs for good, and the mount with it.
func (m *Mount) readAhead() {
	table, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(m.at))
	if err != nil || len(table) == 0 {
		return
	}
	name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", table[0].Major, table[0].Minor)
	_ = os.WriteFile(name, []byte("4096"), 0)
}

// Point returns the folder where the share is mounted.
func (m *Mount) Point() string { return m.at }

// Unmount sends what is still buffered and unmounts. A file system in use is
// an error that matches [unix.EBUSY], unless lazy is set: then it vanishes from
// the tree at once. It is served until its last user is gone, which may be
// another container that has a copy of the mount.
func (m *Mount) Unmount(lazy bool) error {
	flushErr := m.flushAll()
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	if err := unix.Unmount(m.at, flags); err != nil {
		return fmt.Errorf("unmount %s: %w", m.at, err)
	}
	// As a rule it ends with this, and nothing uses the client afterwards.
	select {
	case <-m.ctx.Done():
	case <-time.After(time.Second):
	}
	return flushErr
}

// Wait returns when the file system is no longer mounted, by whomever, and
// nobody uses it any more.
func (m *Mount) Wait() { <-m.ctx.Done() }

func (m *Mount) flushAll() error {
	m.tree.RLock()
	defer m.tree.RUnlock()
	m.mu.Lock()
	nodes := make([]*node, 0, len(m.open))
	for n := range m.open {
		nodes = append(nodes, n)
	}
	m.mu.Unlock()
	var errs []error
	for _, n := range nodes {
		n.mu.Lock()
		errs = append(errs, n.flush())
		n.mu.Unlock()
	}
	return errors.Join(errs...)
}

// errno turns an error of package smb into what programs understand.
func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if no, ok := errors.AsType[syscall.Errno](err); ok && no == syscall.ESTALE {
		return no
	}
	for _, c := range []struct {
		kind error
		no   syscall.Errno
	}{
		{smb.ErrReadOnly, syscall.EROFS}, // before the permission that it is too
		{fs.ErrNotExist, syscall.ENOENT},
		{fs.ErrExist, syscall.EEXIST},
		{fs.ErrPermission, syscall.EACCES},
		{smb.ErrFull, syscall.ENOSPC},
		{smb.ErrInUse, syscall.EBUSY},
		{smb.ErrNotEmpty, syscall.ENOTEMPTY},
		{smb.ErrNotDir, syscall.ENOTDIR},
		{smb.ErrIsDir, syscall.EISDIR},
		{smb.ErrName, syscall.EINVAL},
		{smb.ErrShareDenied, syscall.EACCES},
		{smb.ErrCredentials, syscall.EACCES},
		{smb.ErrBusy, syscall.EAGAIN},
	} {
		if errors.Is(err, c.kind) {
			return c.no
		}
	}
	if smb.Away(err) {
		return syscall.EHOSTDOWN
	}
	return syscall.EIO
}
