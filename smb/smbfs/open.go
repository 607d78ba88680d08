package smbfs

import (
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/iot49/ide49-backup/smb"
)

const (
	// bufferSize is how much is collected before it is sent, with several
	// requests at a time.
	bufferSize = 4 << 20
	// bufferTime is how long data waits for more.
	bufferTime = time.Second
)

// An openFile is what all handles of a node share. It is guarded by the node's
// lock: for reading as long as f is used and stays the same.
type openFile struct {
	handles  int
	f        *smb.File // nil: not opened yet, or suspended
	writable bool      // f may be written to
	write    bool      // some handle writes, or did

	buf    []byte // written by programs, not sent yet
	off    int64  // of buf
	timer  *time.Timer
	failed error // of a write that nobody was told about

	unsynced bool  // sent, but not synced
	syncErr  error // what was sent was lost with the connection, perhaps

	seen smb.Info // when the kernel's cache was last known to be right
}

// end returns where the buffered data ends, or 0.
func (o *openFile) end() int64 {
	if len(o.buf) == 0 {
		return 0
	}
	return o.off + int64(len(o.buf))
}

var errLostWrites = errors.New("the connection was lost before the data was synced")

// ready makes sure that the file is open on the server, with write also for
// writing. n.mu is held for writing.
func (n *node) ready(write bool) error {
	o := &n.file
	if o.f != nil && o.f.Stale() {
		if o.unsynced {
			o.syncErr, o.unsynced = errLostWrites, false
		}
		_ = o.f.Close(n.m.ctx) // gives only our side back
		o.f = nil
	}
	if o.f != nil && (o.writable || !write) {
		return nil
	}
	if o.f != nil {
		if err := n.closeFile(); err != nil {
			return err
		}
	}
	f, writable, err := n.openFile(write)
	if err != nil {
		return err
	}
	if f.Info().Dir {
		_ = f.Close(n.m.ctx)
		return smb.ErrIsDir
	}
	o.f, o.writable = f, writable
	return nil
}

// openFile opens the file. A program that may write keeps that right when the
// file becomes read-only, as POSIX wants it; the server doesn't.
func (n *node) openFile(write bool) (*smb.File, bool, error) {
	sh, ctx, p := n.m.sh, n.m.ctx, n.path()
	if !write && !n.file.write {
		f, err := sh.Open(ctx, p, os.O_RDONLY)
		return f, false, err
	}
	f, err := sh.Open(ctx, p, os.O_RDWR)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return f, true, err
	}
	if !write {
		f, err := sh.Open(ctx, p, os.O_RDONLY)
		return f, false, err
	}
	info, serr := sh.Stat(ctx, p)
	if serr != nil || !info.ReadOnly || n.file.handles == 0 || !n.file.write {
		return nil, false, err
	}
	if err := sh.SetReadOnly(ctx, p, false); err != nil {
		return nil, false, err
	}
	f, err = sh.Open(ctx, p, os.O_RDWR)
	if rerr := sh.SetReadOnly(ctx, p, true); err == nil && rerr != nil {
		_ = f.Close(ctx)
		return nil, false, rerr
	}
	return f, true, err
}

// use calls fn with the open file, and again over a new connection if the one
// it had was lost; with write it may be written to. n.mu is held for writing.
func (n *node) use(write bool, fn func(*smb.File) error) error {
	for attempt := 1; ; attempt++ {
		if err := n.ready(write); err != nil {
			return err
		}
		err := fn(n.file.f)
		if attempt == 2 || !errors.Is(err, smb.ErrStale) {
			return err
		}
	}
}

// flush sends what is buffered. While the server is away the data stays; any
// other failure drops it, and the error is what the program gets. n.mu is
// held for writing.
func (n *node) flush() error {
	o := &n.file
	if o.timer != nil {
		o.timer.Stop()
	}
	if err := o.failed; err != nil {
		o.failed = nil
		return err
	}
	if len(o.buf) == 0 {
		return nil
	}
	err := n.use(true, func(f *smb.File) error { return f.WriteAt(n.m.ctx, o.buf, o.off) })
	if err == nil {
		o.unsynced = true
	}
	if err == nil || !smb.Away(err) {
		o.buf = o.buf[:0]
	}
	return err
}

// flushLater runs when a buffer has waited long enough.
func (n *node) flushLater() {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	o := &n.file
	if o.handles == 0 || len(o.buf) == 0 || o.failed != nil || n.m.ctx.Err() != nil {
		return
	}
	if err := n.flush(); err != nil {
		if smb.Away(err) {
			o.timer.Reset(5 * bufferTime)
			return
		}
		o.failed = err
	}
}

// closeFile closes the file on the server; handles stay.
func (n *node) closeFile() error {
	o := &n.file
	if o.f == nil {
		return nil
	}
	err := o.f.Close(n.m.ctx)
	o.f = nil
	if errors.Is(err, smb.ErrStale) {
		if o.unsynced {
			o.syncErr, o.unsynced = errLostWrites, false
		}
		err = nil
	}
	return err
}

// suspend sends what is buffered and closes the file on the server, until it
// is used again. n.mu is held for writing.
func (n *node) suspend() error {
	if err := n.flush(); err != nil {
		return err
	}
	return n.closeFile()
}

func (n *node) truncate(size int64) error {
	if err := n.flush(); err != nil {
		return err
	}
	if n.file.handles > 0 && n.file.write {
		err := n.use(true, func(f *smb.File) error { return f.Truncate(n.m.ctx, size) })
		n.file.unsynced = n.file.unsynced || err == nil
		return err
	}
	return n.m.sh.Truncate(n.m.ctx, n.path(), size)
}

// Open implements fs.NodeOpener.
func (n *node) Open(_ context.Context, flags uint32) (gofs.FileHandle, uint32, syscall.Errno) {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	o := &n.file
	write := flags&syscall.O_ACCMODE != syscall.O_RDONLY
	// Data that this machine wrote must be part of what is seen.
	err := n.flush()
	if err == nil {
		err = n.ready(write)
	}
	if err == nil && flags&syscall.O_TRUNC != 0 {
		err = n.use(true, func(f *smb.File) error { return f.Truncate(n.m.ctx, 0) })
	}
	if err == nil {
		if _, ok, lerr := n.m.readLink(n.path(), o.f.Info()); ok || lerr != nil {
			// It has become a link since it was looked up. The kernel looks
			// again when it reads this.
			err = cmp.Or(lerr, error(syscall.ESTALE))
		}
	}
	if err != nil {
		if o.handles == 0 {
			_ = n.closeFile()
		}
		return nil, 0, errno(err)
	}
	o.write = o.write || write
	n.handle(+1)
	info, keep := o.f.Info(), uint32(0)
	if o.seen.Modified.Equal(info.Modified) && o.seen.Size == info.Size && o.seen.Changed.Equal(info.Changed) {
		keep = fuse.FOPEN_KEEP_CACHE
	}
	o.seen = info
	if o.write {
		o.seen = smb.Info{}
	}
	return new(handle), keep, 0
}

// A handle stands for one open of a node; everything about it is in the node.
// go-fuse doesn't release what has none.
type handle struct{ _ byte }

// handle counts handles. n.mu is held for writing.
func (n *node) handle(by int) {
	n.file.handles += by
	n.m.mu.Lock()
	defer n.m.mu.Unlock()
	if n.file.handles > 0 {
		n.m.open[n] = struct{}{}
	} else {
		delete(n.m.open, n)
	}
}

// Create implements fs.NodeCreater.
func (n *node) Create(ctx context.Context, name string, flags, _ uint32, out *fuse.EntryOut) (*gofs.Inode, gofs.FileHandle, uint32, syscall.Errno) {
	if no := checkName(name); no != 0 {
		return nil, nil, 0, no
	}
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	p := path.Join(n.path(), name)
	flag := os.O_RDWR | os.O_CREATE | int(flags)&(os.O_EXCL|os.O_TRUNC)
	f, err := n.m.sh.Open(n.m.ctx, p, flag)
	if err != nil {
		return nil, nil, 0, errno(err)
	}
	n.forgetName(name)
	info := f.Info()
	if flag&os.O_EXCL != 0 {
		info, err = f.Stat(n.m.ctx)
	}
	if err == nil && info.Dir {
		err = smb.ErrIsDir
	}
	if err != nil {
		_ = f.Close(n.m.ctx)
		return nil, nil, 0, errno(err)
	}
	inode := n.enter(ctx, name, info, "", out)
	c := inode.Operations().(*node)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.file.f != nil {
		if err := c.suspend(); err != nil {
			_ = f.Close(n.m.ctx)
			return nil, nil, 0, errno(err)
		}
	}
	c.file.f, c.file.write, c.file.writable, c.file.seen = f, true, true, smb.Info{}
	c.handle(+1)
	return inode, new(handle), 0, 0
}

// Read implements fs.NodeReader.
func (n *node) Read(_ context.Context, _ gofs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	for attempt := 1; ; attempt++ {
		n.mu.RLock()
		o := &n.file
		if o.f == nil || o.f.Stale() || len(o.buf) > 0 || o.failed != nil {
			n.mu.RUnlock()
			n.mu.Lock()
			err := n.flush()
			if err == nil {
				err = n.ready(false)
			}
			n.mu.Unlock()
			if err != nil {
				return nil, errno(err)
			}
			n.mu.RLock()
		}
		if o.f == nil { // suspended by another just now
			n.mu.RUnlock()
			continue
		}
		got, err := o.f.ReadAt(n.m.ctx, dest, off)
		n.mu.RUnlock()
		if err == nil || err == io.EOF {
			return fuse.ReadResultData(dest[:got]), 0
		}
		if attempt == 2 || !errors.Is(err, smb.ErrStale) {
			return nil, errno(err)
		}
	}
}

// Write implements fs.NodeWriter.
func (n *node) Write(_ context.Context, _ gofs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	if n.parent != nil {
		n.parent.forgetName(n.name) // its size in the listing is no longer true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	o := &n.file
	if err := o.failed; err != nil {
		o.failed = nil
		return 0, errno(err)
	}
	if len(o.buf) > 0 && (off != o.end() || len(o.buf)+len(data) > bufferSize) {
		if err := n.flush(); err != nil {
			return 0, errno(err)
		}
	}
	if len(o.buf) == 0 {
		o.off = off
		if o.timer == nil {
			o.timer = time.AfterFunc(bufferTime, n.flushLater)
		} else {
			o.timer.Reset(bufferTime)
		}
	}
	o.buf = append(o.buf, data...)
	if len(o.buf) >= bufferSize {
		if err := n.flush(); err != nil {
			// The program is told that this write failed; it isn't kept.
			if end := len(o.buf) - len(data); end >= 0 {
				o.buf = o.buf[:end]
			}
			return 0, errno(err)
		}
	}
	return uint32(len(data)), 0
}

// Flush implements fs.NodeFlusher: a program closes one of its descriptors. If
// it wrote, the file is closed on the server too: then everyone sees the data,
// the final time and no lock, and the program gets every error.
func (n *node) Flush(context.Context, gofs.FileHandle) syscall.Errno {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file.unsynced || len(n.file.buf) > 0 || n.file.failed != nil {
		return errno(n.suspend())
	}
	return 0
}

// Fsync implements fs.NodeFsyncer.
func (n *node) Fsync(context.Context, gofs.FileHandle, uint32) syscall.Errno {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	if n.IsDir() {
		return errno(n.m.sh.SyncDir(n.m.ctx, n.path()))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.flush(); err != nil {
		return errno(err)
	}
	o := &n.file
	if o.write {
		err := n.use(true, func(f *smb.File) error { return f.Sync(n.m.ctx) })
		if err != nil {
			return errno(err)
		}
	}
	o.unsynced = false
	if err := o.syncErr; err != nil {
		o.syncErr = nil
		return syscall.EIO
	}
	return 0
}

// Release implements fs.NodeReleaser: the last descriptor of one open is
// closed.
func (n *node) Release(context.Context, gofs.FileHandle) syscall.Errno {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.handle(-1)
	if n.file.handles > 0 {
		return 0
	}
	err := n.flush()
	if cerr := n.closeFile(); err == nil {
		err = cerr
	}
	if n.deleted {
		if rerr := n.m.sh.Remove(n.m.ctx, n.path()); err == nil && !errors.Is(rerr, fs.ErrNotExist) {
			err = rerr
		}
	}
	seen := n.file.seen
	n.file = openFile{seen: seen}
	return errno(err)
}

// Allocate implements fs.NodeAllocater: it makes a file longer. Shares reserve
// no room.
func (n *node) Allocate(_ context.Context, _ gofs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	const keepSize = 1
	if mode&^keepSize != 0 {
		return syscall.ENOTSUP
	}
	if mode&keepSize != 0 {
		return 0
	}
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.flush(); err != nil {
		return errno(err)
	}
	return errno(n.use(true, func(f *smb.File) error {
		info, err := f.Stat(n.m.ctx)
		if err != nil || info.Size >= int64(off+size) {
			return err
		}
		return f.Truncate(n.m.ctx, int64(off+size))
	}))
}
