// Package smb stores a repository in a folder of a Samba or Windows share,
// without mounting it, in the layout that restic uses. The exported folder is
// an ordinary repository on the server: backend/local and stock restic read
// it there.
package smb

import (
	"bytes"
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
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/smb"
)

const (
	tmpDir = "tmp"
	// tmpPrefix marks our own temporary files, which alone are ever swept.
	tmpPrefix = "ide49-"
	// replaced is part of the name of an object that makes room for another
	// with the same key; kind and id follow.
	replaced = "-replaced-"
	// tmpAge is how long an abandoned temporary file is left alone, by the
	// server's clock.
	tmpAge = time.Hour

	firstWait = 100 * time.Millisecond
	maxWait   = 5 * time.Second
	// inUseWait bounds how long a file is waited for that somebody holds open.
	inUseWait = 15 * time.Second
)

// Options say how the store behaves.
type Options struct {
	// ReadOnly refuses Put and Delete, and touches nothing.
	ReadOnly bool
	// Verify reads each object back before it gets its name.
	Verify bool
	// Patience is how long a call goes on trying while the server is away; 0
	// means 5 minutes. A backup that runs meanwhile just waits.
	Patience time.Duration
	// Waiting, if set, is told about each failed attempt before the next one.
	Waiting func(op string, err error, wait time.Duration)
	// CloseClient makes Close close the share's client too.
	CloseClient bool
}

// A Store is a repository in a folder of a share. It implements
// [backend.Backend].
//
// An object is written under a temporary name, flushed, its size (and with
// Verify its content) is read back, and only then it gets its name, which is
// flushed too. A call whose connection breaks goes on over a new one.
type Store struct {
	sh  *smb.Share
	dir string
	opt Options

	mu   sync.Mutex
	left []string // temporary files that could not be removed yet
}

// Open returns the store in an existing folder of a share. It never makes the
// folder, and doesn't wait for a server that is away.
func Open(ctx context.Context, sh *smb.Share, dir string, opt Options) (*Store, error) {
	s := newStore(sh, dir, opt)
	info, err := sh.Stat(ctx, s.dir)
	if err == nil && !info.Dir {
		err = fmt.Errorf("%s: %w", s.dir, smb.ErrNotDir)
	}
	if err != nil {
		return nil, fmt.Errorf("open repository folder: %w", err)
	}
	if !opt.ReadOnly {
		s.sweep(ctx)
	}
	return s, nil
}

func newStore(sh *smb.Share, dir string, opt Options) *Store {
	if opt.Patience <= 0 {
		opt.Patience = 5 * time.Minute
	}
	return &Store{sh: sh, dir: path.Clean(dir), opt: opt}
}

// Create makes the folders of a new repository and opens it. The folder must
// be absent, empty, or hold only what a Create that was interrupted left
// there; anything else matches fs.ErrExist. Folders above it are made.
func Create(ctx context.Context, sh *smb.Share, dir string, opt Options) (*Store, error) {
	s := newStore(sh, dir, opt)
	if err := s.create(ctx); err != nil {
		return nil, fmt.Errorf("make repository folder: %w", err)
	}
	return s, nil
}

func (s *Store) create(ctx context.Context) error {
	if err := s.sh.MkdirAll(ctx, s.dir); err != nil {
		return err
	}
	dirs := []string{tmpDir}
	for kind := backend.Keys; kind <= backend.Packs; kind++ {
		dirs = append(dirs, kind.String())
	}
	infos, err := s.sh.ReadDir(ctx, s.dir)
	if err != nil {
		return err
	}
	for _, i := range infos {
		if !i.Dir || !slices.Contains(dirs, i.Name) {
			return fmt.Errorf("%s holds %q already: %w", s.dir, i.Name, fs.ErrExist)
		}
	}
	mkdir := func(ctx context.Context, name string) error {
		err := s.sh.Mkdir(ctx, s.path(name))
		if errors.Is(err, fs.ErrExist) {
			err = nil
		}
		return err
	}
	for _, d := range dirs {
		if err := mkdir(ctx, d); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range 256 {
		g.Go(func() error { return mkdir(gctx, fmt.Sprintf("%s/%02x", backend.Packs, i)) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, d := range []string{backend.Packs.String(), "."} {
		if err := s.sh.SyncDir(ctx, s.path(d)); err != nil {
			return err
		}
	}
	return s.sh.SyncDir(ctx, path.Dir(s.dir))
}

func (s *Store) path(name string) string { return path.Join(s.dir, name) }

// again calls fn until it succeeds, fails for good, or patience is over. fn is
// told whether it was called before.
func (s *Store) again(ctx context.Context, op string, fn func(retry bool) error) error {
	start := time.Now()
	wait := firstWait
	for retry := false; ; retry = true {
		err := fn(retry)
		if err == nil || !smb.Temporary(err) || ctx.Err() != nil {
			return err
		}
		spent := time.Since(start)
		if spent > s.opt.Patience || errors.Is(err, smb.ErrInUse) && spent > inUseWait {
			return err
		}
		if s.opt.Waiting != nil {
			s.opt.Waiting(op, err, wait)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		wait = min(2*wait, maxWait)
	}
}

// explain makes an error of the share one of a store.
func explain(op string, k fmt.Stringer, err error) error {
	if errors.Is(err, smb.ErrFull) {
		err = fmt.Errorf("%w: %w", backend.ErrFull, err)
	}
	return fmt.Errorf("%s %s: %w", op, k, err)
}

var errReadOnly = fmt.Errorf("the repository is opened for reading only: %w", fs.ErrPermission)

// Put implements backend.Backend.
func (s *Store) Put(ctx context.Context, k backend.Key, data []byte) error {
	if s.opt.ReadOnly {
		return explain("write", k, errReadOnly)
	}
	if err := s.again(ctx, "write "+k.String(), func(retry bool) error { return s.put(ctx, k, data, retry) }); err != nil {
		return explain("write", k, err)
	}
	return nil
}

func (s *Store) put(ctx context.Context, k backend.Key, data []byte, retry bool) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.tidy(ctx)
	if retry {
		// The rename may have happened before its answer was lost.
		if same, err := s.holds(ctx, s.path(k.Path()), data); err != nil || same {
			if same {
				err = s.settle(ctx, k)
			}
			return err
		}
	}
	tmp := s.path(tmpDir + "/" + tmpPrefix + rand.Text())
	defer func() {
		if err != nil {
			s.discard(ctx, tmp)
		}
	}()
	if err := s.fill(ctx, tmp, data); err != nil {
		return err
	}
	err = s.sh.Rename(ctx, tmp, s.path(k.Path()))
	switch {
	case errors.Is(err, fs.ErrExist):
		if err := s.replace(ctx, tmp, k, data); err != nil {
			return err
		}
	case errors.Is(err, fs.ErrNotExist) && k.Kind != backend.Configs:
		// The folder is missing from a repository that was copied without
		// its empty folders.
		if err := s.sh.MkdirAll(ctx, path.Dir(s.path(k.Path()))); err != nil {
			return err
		}
		if err := s.sh.Rename(ctx, tmp, s.path(k.Path())); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	return s.settle(ctx, k)
}

// settle makes an object's name durable.
func (s *Store) settle(ctx context.Context, k backend.Key) error {
	return s.sh.SyncDir(ctx, path.Dir(s.path(k.Path())))
}

// fill writes data to a new file and makes sure that the server has it.
func (s *Store) fill(ctx context.Context, name string, data []byte) error {
	f, err := s.sh.Open(ctx, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.sh.MkdirAll(ctx, path.Dir(name)); err != nil {
			return err
		}
		f, err = s.sh.Open(ctx, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	}
	if err != nil {
		return err
	}
	err = f.WriteAt(ctx, data, 0)
	if err == nil {
		err = f.Sync(ctx)
	}
	if err == nil {
		// A full disk may show in the size alone.
		var info smb.Info
		if info, err = f.Stat(ctx); err == nil && info.Size != int64(len(data)) {
			err = fmt.Errorf("the server has %d bytes of %d: %w", info.Size, len(data), io.ErrShortWrite)
		}
	}
	if cerr := f.Close(ctx); err == nil {
		err = cerr
	}
	if err == nil && s.opt.Verify {
		var same bool
		if same, err = s.holds(ctx, name, data); err == nil && !same {
			err = errors.New("what the server has differs from what was written; check its disk and memory")
		}
	}
	return err
}

// holds reports whether a file has exactly this content.
func (s *Store) holds(ctx context.Context, name string, data []byte) (bool, error) {
	f, err := s.sh.Open(ctx, name, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	same := f.Info().Size == int64(len(data)) && !f.Info().Dir
	if same {
		got := make([]byte, len(data))
		if _, err = f.ReadAt(ctx, got, 0); err == nil {
			same = bytes.Equal(got, data)
		}
	}
	if cerr := f.Close(ctx); err == nil {
		err = cerr
	}
	return same, err
}

// replace gives a new object the name of one that exists. The protocol as the
// library has it can't do that at once: the old one steps aside, and steps
// back if the process dies before the new one is there (see sweep). As a rule
// both are equal, and the new one isn't needed.
func (s *Store) replace(ctx context.Context, tmp string, k backend.Key, data []byte) error {
	final := s.path(k.Path())
	same, err := s.holds(ctx, final, data)
	if err != nil {
		return err
	}
	if same {
		s.discard(ctx, tmp)
		return nil
	}
	aside := s.path(tmpDir + "/" + tmpPrefix + rand.Text() + replaced + strings.ReplaceAll(k.Path(), "/", "-"))
	if err := s.sh.Rename(ctx, final, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.sh.Rename(ctx, tmp, final); err != nil {
		if berr := s.sh.Rename(context.WithoutCancel(ctx), aside, final); berr != nil && !errors.Is(berr, fs.ErrExist) {
			err = errors.Join(err, berr)
		}
		return err
	}
	s.discard(ctx, aside)
	return nil
}

// discard removes a temporary file, now or later.
func (s *Store) discard(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := s.sh.Remove(ctx, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.mu.Lock()
		s.left = append(s.left, name)
		s.mu.Unlock()
	}
}

// tidy removes what discard could not. A server may hold a file open for a
// connection that it doesn't know to be lost yet.
func (s *Store) tidy(ctx context.Context) {
	s.mu.Lock()
	left := s.left
	s.left = nil
	s.mu.Unlock()
	for i, name := range left {
		if err := s.sh.Remove(ctx, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.mu.Lock()
			s.left = append(s.left, name)
			if !errors.Is(err, smb.ErrInUse) {
				s.left = append(s.left, left[i+1:]...)
				s.mu.Unlock()
				return
			}
			s.mu.Unlock()
		}
	}
}

// Get implements backend.Backend.
func (s *Store) Get(ctx context.Context, k backend.Key, off, n int64) (data []byte, err error) {
	err = s.again(ctx, "read "+k.String(), func(bool) error {
		data, err = s.get(ctx, k, off, n)
		return err
	})
	if err != nil {
		return nil, explain("read", k, err)
	}
	return data, nil
}

func (s *Store) get(ctx context.Context, k backend.Key, off, n int64) (data []byte, err error) {
	f, err := s.sh.Open(ctx, s.path(k.Path()), os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() {
		if cerr := f.Close(ctx); err == nil {
			err = cerr
		}
	}()
	if f.Info().Dir {
		return nil, smb.ErrIsDir
	}
	size := f.Info().Size
	if n < 0 {
		n = max(size-off, 0)
	}
	if off > size || n > size-off {
		return nil, fmt.Errorf("%d bytes from %d of %d: %w", n, off, size, io.ErrUnexpectedEOF)
	}
	data = make([]byte, n)
	if n == 0 {
		return data, nil
	}
	if _, err := f.ReadAt(ctx, data, off); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // it shrank meanwhile
		}
		return nil, err
	}
	return data, nil
}

// List implements backend.Backend. Whatever isn't named like an object is
// passed over.
func (s *Store) List(ctx context.Context, kind backend.Kind) iter.Seq2[backend.Info, error] {
	return func(yield func(backend.Info, error) bool) {
		infos, err := s.list(ctx, kind)
		if err != nil {
			yield(backend.Info{}, explain("list", kind, err))
			return
		}
		for _, folder := range infos {
			for _, i := range folder {
				if !yield(i, nil) {
					return
				}
			}
		}
	}
}

func (s *Store) list(ctx context.Context, kind backend.Kind) ([][]backend.Info, error) {
	if kind == backend.Configs {
		var info smb.Info
		err := s.again(ctx, "list config", func(bool) (err error) {
			info, err = s.sh.Stat(ctx, s.path(backend.ConfigKey.Path()))
			return err
		})
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return [][]backend.Info{{{Key: backend.ConfigKey, Size: info.Size}}}, err
	}
	top, err := s.readDir(ctx, kind.String())
	if err != nil {
		return nil, err
	}
	if kind != backend.Packs {
		return [][]backend.Info{objects(kind, kind.String(), top)}, nil
	}
	infos := make([][]backend.Info, len(top))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, d := range top {
		if !d.Dir || len(d.Name) != 2 {
			continue
		}
		g.Go(func() error {
			dir := kind.String() + "/" + d.Name
			entries, err := s.readDir(gctx, dir)
			infos[i] = objects(kind, dir, entries)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, err
	}
	return infos, nil
}

// readDir lists a folder; one that is missing is empty.
func (s *Store) readDir(ctx context.Context, name string) (infos []smb.Info, err error) {
	err = s.again(ctx, "list "+name, func(bool) (err error) {
		infos, err = s.sh.ReadDir(ctx, s.path(name))
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return infos, err
}

func objects(kind backend.Kind, dir string, entries []smb.Info) (infos []backend.Info) {
	for _, e := range entries {
		id, err := backup.ParseID(e.Name)
		k := backend.Key{Kind: kind, ID: id}
		if err != nil || e.Dir || e.Link || k.Path() != dir+"/"+e.Name {
			continue
		}
		infos = append(infos, backend.Info{Key: k, Size: e.Size})
	}
	return infos
}

// Delete implements backend.Backend.
func (s *Store) Delete(ctx context.Context, k backend.Key) error {
	if s.opt.ReadOnly {
		return explain("delete", k, errReadOnly)
	}
	name := s.path(k.Path())
	removed := false
	err := s.again(ctx, "delete "+k.String(), func(retry bool) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !removed {
			err := s.sh.Remove(ctx, name)
			// An attempt whose answer was lost may have removed it.
			if err != nil && (!retry || !errors.Is(err, fs.ErrNotExist)) {
				return err
			}
			removed = true
		}
		return s.settle(ctx, k)
	})
	if err != nil {
		return explain("delete", k, err)
	}
	return nil
}

// Close implements backend.Backend. It removes temporary files that are still
// there, if the server lets it.
func (s *Store) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s.tidy(ctx)
	if s.opt.CloseClient {
		return s.sh.Client().Close()
	}
	return nil
}

// sweep removes temporary files that a process left behind when it was killed,
// and puts objects back that were about to be replaced then. Errors are of no
// consequence: the next one sweeps again. A file that somebody has open can't
// be removed, so that only the moment between a file's close and its rename
// needs the age.
func (s *Store) sweep(ctx context.Context) {
	infos, err := s.sh.ReadDir(ctx, s.path(tmpDir))
	if err != nil {
		return
	}
	infos = slices.DeleteFunc(infos, func(i smb.Info) bool { return i.Dir || !strings.HasPrefix(i.Name, tmpPrefix) })
	if len(infos) == 0 {
		return
	}
	now, err := s.serverTime(ctx)
	if err != nil {
		return
	}
	for _, i := range infos {
		name := s.path(tmpDir + "/" + i.Name)
		if _, object, ok := strings.Cut(i.Name, replaced); ok {
			// An object that is gone must not wait for an hour.
			if s.sh.Rename(ctx, name, s.path(strings.ReplaceAll(object, "-", "/"))) == nil {
				continue
			}
		}
		if now.Sub(i.Modified) >= tmpAge && now.Sub(i.Changed) >= tmpAge {
			_ = s.sh.Remove(ctx, name)
		}
	}
}

// serverTime asks for the server's time by making a file, as ours may be
// wrong.
func (s *Store) serverTime(ctx context.Context) (time.Time, error) {
	name := s.path(tmpDir + "/" + tmpPrefix + rand.Text())
	f, err := s.sh.Open(ctx, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return time.Time{}, err
	}
	defer s.discard(ctx, name)
	info, err := f.Stat(ctx)
	return info.Changed, errors.Join(err, f.Close(ctx))
}
