package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/bits"
	"os"
	"path"
	"strings"
	"time"

	"github.com/hirochachacha/go-smb2"
)

// A Share is one share of a [Client]'s server. Paths are slash-separated and
// relative to its root, which is "."; see [fs.ValidPath]. Links that the
// server keeps are not followed by Stat and ReadDir.
//
// All methods may be called from any number of goroutines. A method that only
// looks is tried a second time when the connection breaks; the others are not,
// since nobody knows whether the server did what it was told.
type Share struct {
	c    *Client
	name string
}

// Share returns the share of that name. The server is not asked.
func (c *Client) Share(name string) (*Share, error) {
	if _, ok := decodeName(name); !ok || strings.ContainsAny(name, `:*?"<>|`) {
		return nil, &Error{Op: "use", Target: target(c.opt.Server, "", ""), Kind: ErrNoShare, Err: fmt.Errorf("%q is no name of a share", name)}
	}
	return &Share{c: c, name: name}, nil
}

// Name returns the share's name.
func (sh *Share) Name() string { return sh.name }

// Client returns the pool that the share uses.
func (sh *Share) Client() *Client { return sh.c }

// An Info describes a file or folder.
type Info struct {
	Name       string // last element of the path, as POSIX has it
	Size       int64  // bytes; 0 for folders
	Allocated  int64  // bytes on the server's disk, as it reports them
	Dir        bool
	Link       bool   // a reparse point: a link or mount point that the server keeps
	ReadOnly   bool   // has the attribute "read-only"
	Attributes uint32 // FILE_ATTRIBUTE_* of [MS-FSCC] 2.6
	Modified   time.Time
	Changed    time.Time // of the data or the attributes; the server's clock sets it
	Accessed   time.Time
	Created    time.Time
}

const (
	attrReadOnly  = 0x1
	attrDirectory = 0x10
	attrReparse   = 0x400
)

// infoOf takes what the library knows, with the name that we used.
func infoOf(st os.FileInfo, name string) (Info, error) {
	f, ok := st.(*smb2.FileStat)
	if !ok || f.EndOfFile < 0 || f.AllocationSize < 0 {
		return Info{}, fmt.Errorf("%w: a negative size", ErrProtocol)
	}
	i := Info{
		Name:       name,
		Size:       f.EndOfFile,
		Allocated:  f.AllocationSize,
		Dir:        f.FileAttributes&attrDirectory != 0,
		Link:       f.FileAttributes&attrReparse != 0,
		ReadOnly:   f.FileAttributes&attrReadOnly != 0,
		Attributes: f.FileAttributes,
		Modified:   f.LastWriteTime,
		Changed:    f.ChangeTime,
		Accessed:   f.LastAccessTime,
		Created:    f.CreationTime,
	}
	if i.Dir {
		i.Size = 0
	}
	return i, nil
}

// do runs fn on a session that has the share, with the path in the server's
// form. With again it does so once more on another session if the first was
// lost.
func (sh *Share) do(ctx context.Context, op, name string, again bool, need int64, limit time.Duration, fn func(*smb2.Share, string) error) error {
	where := target(sh.c.opt.Server, sh.name, name)
	p, err := encodePath(name)
	if err != nil {
		return fail(op, where, err)
	}
	for attempt := 1; ; attempt++ {
		err := sh.once(ctx, need, limit, func(t *smb2.Share) error { return fn(t, p) })
		if err == nil {
			return nil
		}
		err = fail(op, where, err)
		if attempt == 1 && again && errors.Is(err, ErrConnectionLost) {
			continue
		}
		sh.c.note(err)
		return err
	}
}

func (sh *Share) once(ctx context.Context, need int64, limit time.Duration, fn func(*smb2.Share) error) error {
	s, release, err := sh.c.lease(ctx)
	if err != nil {
		return err
	}
	defer release()
	t, err := s.tree(ctx, sh.name, sh.c.opt.MetaTimeout)
	if err != nil {
		return err
	}
	return t.explain(s.run(ctx, need, limit, func() error { return fn(t.Share) }))
}

func (sh *Share) look(ctx context.Context, op, name string, need int64, fn func(*smb2.Share, string) error) error {
	return sh.do(ctx, op, name, true, need, sh.c.opt.MetaTimeout, fn)
}

func (sh *Share) change(ctx context.Context, op, name string, fn func(*smb2.Share, string) error) error {
	return sh.do(ctx, op, name, false, 1, sh.c.opt.MetaTimeout, fn)
}

// Stat describes a file or folder.
func (sh *Share) Stat(ctx context.Context, name string) (info Info, err error) {
	err = sh.look(ctx, "stat", name, 1, func(t *smb2.Share, p string) error {
		st, err := t.Lstat(p)
		if err != nil {
			return err
		}
		info, err = infoOf(st, path.Base(name))
		return err
	})
	return info, err
}

// maxEntries bounds a listing, so that a server that sends entries without
// end doesn't fill the memory.
const maxEntries = 1 << 21

// ReadDir returns what a folder holds, in no order. It is an error if the
// server sends a name that could lead outside of the folder.
func (sh *Share) ReadDir(ctx context.Context, name string) (infos []Info, err error) {
	for attempt := 1; ; attempt++ {
		infos, err = sh.readDir(ctx, name)
		if attempt == 1 && (errors.Is(err, ErrConnectionLost) || errors.Is(err, ErrStale)) {
			continue
		}
		sh.c.note(err)
		return infos, err
	}
}

func (sh *Share) readDir(ctx context.Context, name string) (infos []Info, err error) {
	where := target(sh.c.opt.Server, sh.name, name)
	f, err := sh.open(ctx, "list", name, os.O_RDONLY, true)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := f.Close(ctx); err == nil && cerr != nil {
			err = cerr
		}
	}()
	if !f.info.Dir {
		return nil, &Error{Op: "list", Target: where, Kind: ErrNotDir}
	}
	for {
		var batch []os.FileInfo
		err := f.s.run(ctx, 16, sh.c.opt.MetaTimeout, func() (err error) {
			batch, err = f.f.Readdir(4096)
			return err
		})
		if err == io.EOF {
			return infos, nil
		}
		if err != nil {
			return nil, fail("list", where, err)
		}
		for _, st := range batch {
			local, ok := decodeName(st.Name())
			if !ok {
				return nil, &Error{Op: "list", Target: where, Kind: ErrProtocol, Err: fmt.Errorf("it holds the name %q", st.Name())}
			}
			info, err := infoOf(st, local)
			if err != nil {
				return nil, fail("list", where, err)
			}
			infos = append(infos, info)
		}
		if len(infos) > maxEntries {
			return nil, &Error{Op: "list", Target: where, Kind: ErrProtocol, Err: fmt.Errorf("more than %d entries", maxEntries)}
		}
	}
}

// Mkdir makes one folder.
func (sh *Share) Mkdir(ctx context.Context, name string) error {
	return sh.change(ctx, "make folder", name, func(t *smb2.Share, p string) error { return t.Mkdir(p, 0o777) })
}

// MkdirAll makes a folder and those above it that are missing. It is safe to
// repeat.
func (sh *Share) MkdirAll(ctx context.Context, name string) error {
	info, err := sh.Stat(ctx, name)
	switch {
	case err == nil && info.Dir:
		return nil
	case err == nil:
		return &Error{Op: "make folder", Target: target(sh.c.opt.Server, sh.name, name), Kind: ErrNotDir}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if up := path.Dir(name); up != "." {
		if err := sh.MkdirAll(ctx, up); err != nil {
			return err
		}
	}
	if err := sh.Mkdir(ctx, name); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// Remove removes a file or an empty folder, also a read-only one. A file that
// somebody has open is [ErrInUse].
func (sh *Share) Remove(ctx context.Context, name string) error {
	return sh.change(ctx, "remove", name, func(t *smb2.Share, p string) error { return t.Remove(p) })
}

// Rename moves a file or folder. It never replaces: if there is something at
// the new name already, it fails with [fs.ErrExist]. What is open can't be
// moved ([ErrInUse]).
func (sh *Share) Rename(ctx context.Context, from, to string) error {
	q, err := encodePath(to)
	if err != nil {
		return fail("rename", target(sh.c.opt.Server, sh.name, to), err)
	}
	return sh.change(ctx, "rename", from, func(t *smb2.Share, p string) error { return t.Rename(p, q) })
}

// SetTimes sets when a file or folder was read and modified, with a precision
// of 100 ns.
func (sh *Share) SetTimes(ctx context.Context, name string, accessed, modified time.Time) error {
	return sh.change(ctx, "set times of", name, func(t *smb2.Share, p string) error { return t.Chtimes(p, accessed, modified) })
}

// SetReadOnly sets or clears the attribute "read-only", which is all that the
// protocol has of a file mode.
func (sh *Share) SetReadOnly(ctx context.Context, name string, on bool) error {
	mode := fs.FileMode(0o666)
	if on {
		mode = 0o444
	}
	return sh.change(ctx, "set mode of", name, func(t *smb2.Share, p string) error { return t.Chmod(p, mode) })
}

// Truncate sets the size of a file that isn't open here.
func (sh *Share) Truncate(ctx context.Context, name string, size int64) error {
	return sh.change(ctx, "truncate", name, func(t *smb2.Share, p string) error { return t.Truncate(p, size) })
}

// A Space tells how much room a share has, in bytes.
type Space struct {
	Total     uint64
	Free      uint64 // on the disk
	Available uint64 // to this user, who may have a quota
	Block     uint64 // size of an allocation unit
}

// Space returns how much room there is at a folder.
func (sh *Share) Space(ctx context.Context, name string) (space Space, err error) {
	err = sh.look(ctx, "get free space of", name, 1, func(t *smb2.Share, p string) error {
		fi, err := t.Statfs(p)
		if err != nil {
			return err
		}
		unit := mulCapped(fi.BlockSize(), fi.FragmentSize()) // bytes per sector, sectors per unit
		space = Space{
			Block:     unit,
			Total:     mulCapped(unit, fi.TotalBlockCount()),
			Free:      mulCapped(unit, fi.FreeBlockCount()),
			Available: mulCapped(unit, fi.AvailableBlockCount()),
		}
		return nil
	})
	return space, err
}

// mulCapped multiplies numbers that a server sent.
func mulCapped(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	if hi != 0 || lo > math.MaxInt64 {
		return math.MaxInt64
	}
	return lo
}

// SyncDir makes the names in a folder durable, where the server can do that:
// Samba syncs the folder to its disk. Servers that refuse are taken to do it
// anyway.
func (sh *Share) SyncDir(ctx context.Context, name string) error {
	f, err := sh.open(ctx, "sync", name, os.O_RDWR, false)
	if err != nil {
		if noSync(err) {
			return nil
		}
		return err
	}
	err = f.Sync(ctx)
	if cerr := f.Close(ctx); err == nil {
		err = cerr
	}
	if noSync(err) {
		return nil
	}
	return err
}

// noSync reports that the server doesn't sync folders.
func noSync(err error) bool {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, ErrIsDir) {
		return true
	}
	e, ok := errors.AsType[*smb2.ResponseError](err)
	return ok && (e.Code == statusNotSupported || e.Code == statusInvalidDeviceRequest || e.Code == statusInvalidParameter)
}
