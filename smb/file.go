package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sync"
	"sync/atomic"

	"github.com/hirochachacha/go-smb2"
	"golang.org/x/sync/errgroup"
)

// piece is the most that one request carries; parallel is how many requests
// of one call are under way at a time.
const (
	piece    = 1 << 20
	parallel = 4
)

// A File is an open file. It belongs to the connection over which it was
// opened: when that is lost, every method answers [ErrStale], and the file
// must be opened again. A File must be closed. Its methods may be called from
// any number of goroutines, except that Close must be the last.
type File struct {
	sh      *Share
	path    string
	s       *session
	release func()
	f       *smb2.File
	info    Info
	written atomic.Bool
	closing sync.Once
}

// Open opens a file or folder. Of the flags of package os it takes O_RDONLY,
// O_WRONLY, O_RDWR, O_CREATE, O_EXCL and O_TRUNC. While it is open, others may
// read and write the file but not rename or remove it.
func (sh *Share) Open(ctx context.Context, name string, flag int) (*File, error) {
	const known = os.O_RDONLY | os.O_WRONLY | os.O_RDWR | os.O_CREATE | os.O_EXCL | os.O_TRUNC
	if flag&^known != 0 {
		return nil, &Error{Op: "open", Target: target(sh.c.opt.Server, sh.name, name), Kind: errors.ErrUnsupported, Err: fmt.Errorf("flag %#x", flag&^known)}
	}
	stat := flag&os.O_EXCL == 0 // what is new is empty
	f, err := sh.open(ctx, "open", name, flag, stat)
	if flag&(os.O_CREATE|os.O_TRUNC) == 0 && errors.Is(err, ErrConnectionLost) {
		f, err = sh.open(ctx, "open", name, flag, stat)
	}
	sh.c.note(err)
	return f, err
}

func (sh *Share) open(ctx context.Context, op, name string, flag int, stat bool) (*File, error) {
	where := target(sh.c.opt.Server, sh.name, name)
	p, err := encodePath(name)
	if err != nil {
		return nil, fail(op, where, err)
	}
	s, release, err := sh.c.lease(ctx)
	if err != nil {
		return nil, fail(op, where, err)
	}
	t, err := s.tree(ctx, sh.name, sh.c.opt.MetaTimeout)
	if err != nil {
		release()
		return nil, fail(op, where, err)
	}
	f := &File{sh: sh, path: name, s: s, release: release, info: Info{Name: path.Base(name)}}
	err = s.run(ctx, 16, sh.c.opt.MetaTimeout, func() error {
		file, err := t.OpenFile(p, flag, 0o666)
		if err != nil {
			return err
		}
		forget(file)
		f.f = file
		if !stat {
			return nil
		}
		st, err := file.Stat()
		if err == nil {
			f.info, err = infoOf(st, path.Base(name))
		}
		if err != nil {
			_ = file.Close() // the first error counts
		}
		return err
	})
	if err != nil {
		release()
		return nil, fail(op, where, t.explain(err))
	}
	return f, nil
}

// Info describes the file as it was when it was opened. Of one that was opened
// with O_EXCL it holds nothing but the name.
func (f *File) Info() Info { return f.info }

// Path returns the path that the file was opened by.
func (f *File) Path() string { return f.path }

// Stale reports whether the connection is lost over which the file was opened.
func (f *File) Stale() bool { return f.s.dead() }

func (f *File) fail(op string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrConnectionLost) {
		err = fmt.Errorf("%w: %w", ErrStale, err)
	}
	err = fail(op, target(f.sh.c.opt.Server, f.sh.name, f.path), err)
	f.sh.c.note(err)
	return err
}

// ReadAt fills b from offset off. As with [io.ReaderAt], a short count comes
// with an error, which is io.EOF at the end of the file.
func (f *File) ReadAt(ctx context.Context, b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, f.fail("read", os.ErrInvalid)
	}
	if len(b) <= piece {
		n, err := f.readPiece(ctx, b, off)
		if err == io.EOF {
			return n, io.EOF
		}
		return n, f.fail("read", err)
	}
	counts := make([]int, (len(b)+piece-1)/piece)
	eof := atomic.Bool{}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i := range counts {
		g.Go(func() (err error) {
			lo := i * piece
			counts[i], err = f.readPiece(gctx, b[lo:min(lo+piece, len(b))], off+int64(lo))
			if err == io.EOF {
				eof.Store(true)
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return 0, f.fail("read", err)
	}
	n := 0
	for i, got := range counts {
		n += got
		if got < min(piece, len(b)-i*piece) {
			break // what follows a gap doesn't count, whoever wrote it meanwhile
		}
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (f *File) readPiece(ctx context.Context, b []byte, off int64) (n int, err error) {
	for n < len(b) {
		var m int
		err := f.s.run(ctx, weight(len(b)-n), f.sh.c.opt.DataTimeout, func() (err error) {
			m, err = f.f.ReadAt(b[n:], off+int64(n))
			return err
		})
		n += max(m, 0)
		if err != nil {
			return n, err
		}
		if m <= 0 {
			return n, io.EOF
		}
		// A short answer isn't the end of the file; only the server's word
		// for it is.
	}
	return n, nil
}

// WriteAt writes b at offset off. When it fails, any part of b may have been
// written.
func (f *File) WriteAt(ctx context.Context, b []byte, off int64) error {
	if off < 0 {
		return f.fail("write", os.ErrInvalid)
	}
	f.written.Store(true)
	if len(b) <= piece {
		return f.fail("write", f.writePiece(ctx, b, off))
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for lo := 0; lo < len(b); lo += piece {
		g.Go(func() error {
			return f.writePiece(gctx, b[lo:min(lo+piece, len(b))], off+int64(lo))
		})
	}
	err := g.Wait()
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return f.fail("write", err)
}

func (f *File) writePiece(ctx context.Context, b []byte, off int64) error {
	var n int
	err := f.s.run(ctx, weight(len(b)), f.sh.c.opt.DataTimeout, func() (err error) {
		n, err = f.f.WriteAt(b, off)
		return err
	})
	if err == nil && n != len(b) {
		err = fmt.Errorf("%w: %d of %d bytes written", ErrProtocol, n, len(b))
	}
	return err
}

// weight returns how many credits a request with so much data needs.
func weight(n int) int64 { return int64(max(1, (min(n, piece)+65535)/65536)) }

// Sync makes what was written durable on the server.
func (f *File) Sync(ctx context.Context) error {
	return f.fail("sync", f.s.run(ctx, 1, f.sh.c.opt.DataTimeout, f.f.Sync))
}

// Truncate sets the file's size.
func (f *File) Truncate(ctx context.Context, size int64) error {
	f.written.Store(true)
	return f.fail("truncate", f.s.run(ctx, 1, f.sh.c.opt.MetaTimeout, func() error { return f.f.Truncate(size) }))
}

// Stat describes the file as it is now.
func (f *File) Stat(ctx context.Context) (info Info, err error) {
	err = f.s.run(ctx, 16, f.sh.c.opt.MetaTimeout, func() error {
		st, err := f.f.Stat()
		if err == nil {
			info, err = infoOf(st, f.info.Name)
		}
		return err
	})
	return info, f.fail("stat", err)
}

// Close closes the file, also when ctx has ended. If the connection is lost
// the server has closed it already; that is an error only if it was written
// to.
func (f *File) Close(ctx context.Context) (err error) {
	f.closing.Do(func() {
		defer f.release()
		limit := f.sh.c.opt.MetaTimeout
		if ctx.Err() != nil {
			ctx, limit = context.WithoutCancel(ctx), min(grace, limit)
		}
		err = f.s.run(ctx, 1, limit, f.f.Close)
		forget(f.f)
		if errors.Is(err, ErrConnectionLost) && !f.written.Load() {
			err = nil
		}
		err = f.fail("close", err)
	})
	return err
}
