// Package local stores a repository in a folder, in the layout that restic
// uses.
package local

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

const (
	tmpDir = "tmp"
	// tmpPrefix marks our own temporary files, which alone are ever swept.
	tmpPrefix = "ide49-"
	// tmpAge is how long an abandoned temporary file is left alone.
	tmpAge = time.Hour
	// piece is how much is written between two looks at the context.
	piece = 1 << 20
)

// Options say how files are made.
type Options struct {
	// GroupAccess lets the folder's group read files (0440 instead of 0400)
	// and use folders (0770 instead of 0700). Open finds out by itself
	// whether a repository was made so: by the mode of its folder.
	GroupAccess bool
	// ReadOnly refuses Put and Delete, and touches nothing.
	ReadOnly bool
}

func (o Options) fileMode() fs.FileMode {
	if o.GroupAccess {
		return 0o440
	}
	return 0o400
}

func (o Options) dirMode() fs.FileMode {
	if o.GroupAccess {
		return 0o770
	}
	return 0o700
}

// A Store is a folder that holds a repository. It implements
// [backend.Backend].
//
// It holds the folder by a handle from Open to Close: when the drive that the
// folder is on is pulled out, or another file system is mounted over it, calls
// fail or still reach the first folder, and never write elsewhere.
type Store struct {
	root *os.Root
	opt  Options
}

// Open returns the store in an existing folder. It never makes the folder:
// where one should be and is not, a drive is likely missing.
func Open(dir string, opt Options) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open repository folder %s: %w", dir, plain(err))
	}
	info, err := root.Stat(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("open repository folder %s: %w", dir, plain(err))
	}
	opt.GroupAccess = opt.GroupAccess || info.Mode()&groupWrite != 0
	s := &Store{root: root, opt: opt}
	if !opt.ReadOnly {
		s.sweep()
	}
	return s, nil
}

// groupWrite is what a repository's folder has if its group may use it.
const groupWrite = 0o020

// Create makes the folders of a new repository in dir and opens it. The
// folder's parent must exist; dir itself must be absent, empty, or hold only
// what a Create that was interrupted left there. Anything else matches
// fs.ErrExist.
func Create(dir string, opt Options) (*Store, error) {
	err := os.Mkdir(dir, opt.dirMode())
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make repository folder %s: %w", dir, plain(err))
	}
	made := err == nil
	if made {
		// Whatever the umask is: the mode of the folder is what says who
		// may use the repository.
		err = os.Chmod(dir, opt.dirMode())
		if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, errors.ErrUnsupported) {
			return nil, fmt.Errorf("make repository folder %s: %w", dir, plain(err))
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("make repository folder %s: %w", dir, plain(err))
	}
	s := &Store{root: root, opt: opt}
	if err := s.lay(made); err != nil {
		root.Close()
		return nil, fmt.Errorf("make repository folder %s: %w", dir, err)
	}
	return s, nil
}

// lay makes the folders below the repository.
func (s *Store) lay(made bool) error {
	dirs := []string{tmpDir}
	for kind := backend.Keys; kind <= backend.Packs; kind++ {
		dirs = append(dirs, kind.String())
	}
	entries, err := s.readDir(".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "lost+found" && (!e.IsDir() || !slices.Contains(dirs, e.Name())) {
			return fmt.Errorf("it holds %q already: %w", e.Name(), fs.ErrExist)
		}
	}
	for i := range 256 {
		dirs = append(dirs, fmt.Sprintf("%s/%02x", backend.Packs, i))
	}
	for _, d := range dirs {
		if err := s.mkdir(d); err != nil {
			return err
		}
	}
	for _, d := range []string{backend.Packs.String(), "."} {
		if err := s.syncDir(d); err != nil {
			return err
		}
	}
	if made {
		return syncPath(path.Dir(path.Clean(s.root.Name())))
	}
	return nil
}

// mkdir makes a folder below the repository, with its mode whatever the umask
// is, unless it is there.
func (s *Store) mkdir(name string) error {
	err := s.root.Mkdir(name, s.opt.dirMode())
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = s.root.Chmod(name, s.opt.dirMode())
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, errors.ErrUnsupported) {
			err = nil // FAT and some network file systems have no modes
		}
	}
	return plain(err)
}

// Put implements backend.Backend.
func (s *Store) Put(ctx context.Context, k backend.Key, data []byte) error {
	if err := s.put(ctx, k, data); err != nil {
		return fmt.Errorf("write %s: %w", k, plain(err))
	}
	return nil
}

func (s *Store) put(ctx context.Context, k backend.Key, data []byte) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.opt.ReadOnly {
		return fmt.Errorf("the repository is opened for reading only: %w", fs.ErrPermission)
	}
	tmp := tmpDir + "/" + tmpPrefix + rand.Text()
	f, err := s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		// The folder is missing from a repository that was copied without
		// its empty folders. The handle on the repository proves the place.
		if err := s.mkdir(tmpDir); err != nil {
			return err
		}
		f, err = s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.root.Remove(tmp)
		}
	}()
	if err := s.fill(ctx, f, data); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	final := k.Path()
	err = s.root.Rename(tmp, final)
	if errors.Is(err, fs.ErrNotExist) && k.Kind != backend.Configs {
		if err := s.mkdir(path.Dir(final)); err != nil {
			return err
		}
		err = s.root.Rename(tmp, final)
	}
	if err != nil {
		return err
	}
	return s.syncDir(path.Dir(final))
}

// fill writes data to a temporary file and makes it durable. The file is
// locked meanwhile, which tells sweep that somebody still writes it.
func (s *Store) fill(ctx context.Context, f *os.File, data []byte) error {
	if err := flock(f); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	for len(data) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(piece, len(data))
		if _, err := f.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	// FAT and some network file systems have no modes; the content is what
	// matters there.
	if err := f.Chmod(s.opt.fileMode()); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return f.Sync()
}

// Get implements backend.Backend.
func (s *Store) Get(ctx context.Context, k backend.Key, off, n int64) ([]byte, error) {
	data, err := s.get(ctx, k, off, n)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", k, plain(err))
	}
	return data, nil
}

func (s *Store) get(ctx context.Context, k backend.Key, off, n int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := s.root.Open(k.Path())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("it is not a regular file but %s", info.Mode().Type())
	}
	size := info.Size()
	if n < 0 {
		n = max(size-off, 0)
	}
	if off > size || n > size-off {
		return nil, fmt.Errorf("%d bytes from %d of %d: %w", n, off, size, io.ErrUnexpectedEOF)
	}
	data := make([]byte, n)
	if _, err := f.ReadAt(data, off); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // it shrank meanwhile
		}
		return nil, err
	}
	return data, nil
}

// Evict implements backend.Evicter. The error matches errors.ErrUnsupported
// where the file is in memory afterwards, as on tmpfs. What the device itself
// caches is out of reach.
func (s *Store) Evict(ctx context.Context, k backend.Key) error {
	err := ctx.Err()
	if err == nil {
		err = s.evict(k)
	}
	if err != nil {
		return fmt.Errorf("read %s past the cache: %w", k, plain(err))
	}
	return nil
}

func (s *Store) evict(k backend.Key) error {
	f, err := s.root.Open(k.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var fdErr error
	err = c.Control(func(fd uintptr) {
		inMemory := fmt.Errorf("the file system keeps the file in memory: %w", errors.ErrUnsupported)
		var st unix.Statfs_t
		if fdErr = unix.Fstatfs(int(fd), &st); fdErr == nil && (uint32(st.Type) == unix.TMPFS_MAGIC || uint32(st.Type) == unix.RAMFS_MAGIC) {
			fdErr = inMemory
		}
		if fdErr != nil {
			return
		}
		if fdErr = unix.Fadvise(int(fd), 0, 0, unix.FADV_DONTNEED); fdErr != nil {
			return
		}
		// A read that may not wait succeeds only if the page is in memory
		// still. Where that can't be asked, take the kernel's word.
		if n, err := unix.Preadv2(int(fd), [][]byte{make([]byte, 1)}, 0, unix.RWF_NOWAIT); err == nil && n > 0 {
			fdErr = inMemory
		}
	})
	return errors.Join(err, fdErr)
}

// List implements backend.Backend. Whatever is not named like an object is
// passed over.
func (s *Store) List(ctx context.Context, kind backend.Kind) iter.Seq2[backend.Info, error] {
	return func(yield func(backend.Info, error) bool) {
		err := s.list(ctx, kind, func(i backend.Info) bool { return yield(i, nil) })
		if err != nil {
			yield(backend.Info{}, fmt.Errorf("list %s: %w", kind, plain(err)))
		}
	}
}

func (s *Store) list(ctx context.Context, kind backend.Kind, yield func(backend.Info) bool) error {
	if kind == backend.Configs {
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := s.root.Lstat(backend.ConfigKey.Path())
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			yield(backend.Info{Key: backend.ConfigKey, Size: info.Size()})
		}
		return err
	}
	dirs := []string{kind.String()}
	if kind == backend.Packs {
		dirs = dirs[:0]
		for i := range 256 {
			dirs = append(dirs, fmt.Sprintf("%s/%02x", kind, i))
		}
	}
	for _, dir := range dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		entries, err := s.readDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, e := range entries {
			id, err := backup.ParseID(e.Name())
			k := backend.Key{Kind: kind, ID: id}
			if err != nil || path.Dir(k.Path()) != dir {
				continue
			}
			info, err := s.root.Lstat(k.Path())
			if errors.Is(err, fs.ErrNotExist) {
				continue // deleted meanwhile
			}
			if err != nil {
				return err
			}
			if info.Mode().IsRegular() && !yield(backend.Info{Key: k, Size: info.Size()}) {
				return nil
			}
		}
	}
	return nil
}

// Delete implements backend.Backend.
func (s *Store) Delete(ctx context.Context, k backend.Key) error {
	err := ctx.Err()
	if err == nil && s.opt.ReadOnly {
		err = fmt.Errorf("the repository is opened for reading only: %w", fs.ErrPermission)
	}
	if err == nil {
		err = s.root.Remove(k.Path())
	}
	if err == nil {
		err = s.syncDir(path.Dir(k.Path()))
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", k, plain(err))
	}
	return nil
}

// Close implements backend.Backend.
func (s *Store) Close() error { return s.root.Close() }

func (s *Store) readDir(name string) ([]fs.DirEntry, error) {
	d, err := s.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

// syncDir makes renames and removals in a folder durable.
func (s *Store) syncDir(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return err
	}
	return syncClose(d)
}

func syncPath(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return syncClose(d)
}

// syncClose passes over file systems that can't sync a folder: they have
// nothing better to offer.
func syncClose(d *os.File) error {
	err := d.Sync()
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EINVAL) {
		err = nil
	}
	return errors.Join(err, d.Close())
}

// sweep removes temporary files that a process left behind when it was killed.
// Errors are of no consequence: the files only take room.
func (s *Store) sweep() {
	entries, err := s.readDir(tmpDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		name := tmpDir + "/" + e.Name()
		info, err := s.root.Lstat(name)
		if err != nil || !info.Mode().IsRegular() || time.Since(info.ModTime()) < tmpAge {
			continue
		}
		f, err := s.root.Open(name)
		if err != nil {
			continue
		}
		if flock(f) == nil {
			s.root.Remove(name)
		}
		f.Close()
	}
}

// flock takes an exclusive lock on f, which its last Close gives back, or
// fails at once.
func flock(f *os.File) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var lockErr error
	if err := c.Control(func(fd uintptr) { lockErr = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		return err
	}
	return lockErr
}

// plain strips the path from a file error, as the caller names the object, and
// marks a full disk.
func plain(err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	} else if e, ok := errors.AsType[*os.LinkError](err); ok {
		err = e.Err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", err, backend.ErrFull)
	}
	return err
}
