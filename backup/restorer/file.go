package restorer

import (
	"bytes"
	"container/list"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// A part is a file that is put together from several chunks, in any order.
type part struct {
	entry uint32

	mu      sync.Mutex
	missing int32 // chunks still to come
	created bool  // it has a temporary name
	failed  bool
	fd      int    // plus one; zero while it is not open
	ino     uint64 // to know it again
	dev     uint64
	place   *list.Element // in openParts, guarded by that
}

// maxOpenParts bounds the descriptors of unfinished files.
const maxOpenParts = 128

// openParts knows which parts are open, the one used last in front.
type openParts struct {
	mu   sync.Mutex
	list list.List
}

// use notes that p, which its caller has locked, is open, and closes another
// one if there are too many.
func (o *openParts) use(p *part) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p.place != nil {
		o.list.MoveToFront(p.place)
		return
	}
	p.place = o.list.PushFront(p)
	for e := o.list.Back(); e != nil && o.list.Len() > maxOpenParts; {
		old, prev := e.Value.(*part), e.Prev()
		if old != p && old.mu.TryLock() { // one that is in use stays
			old.close()
			o.list.Remove(e)
			old.place = nil
			old.mu.Unlock()
		}
		e = prev
	}
}

func (o *openParts) drop(p *part) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p.place != nil {
		o.list.Remove(p.place)
		p.place = nil
	}
}

// closeAll closes what is open; no worker runs any more.
func (o *openParts) closeAll() {
	for e := o.list.Front(); e != nil; e = e.Next() {
		e.Value.(*part).close()
	}
	o.list.Init()
}

func (p *part) close() {
	if p.fd > 0 {
		unix.Close(p.fd - 1)
		p.fd = 0
	}
}

// writePart puts one chunk in its file, and completes the file with the last.
func (w *worker) writePart(p *part, r ref, plain []byte, blobErr error) error {
	x := w.x
	p.mu.Lock()
	defer p.mu.Unlock()
	p.missing--
	if p.failed {
		return nil
	}
	err := blobErr
	if err == nil {
		err = w.openPart(p)
	}
	if err == nil {
		err = writeSparse(p.fd-1, plain, int64(r.pos))
	}
	if err == nil && p.missing == 0 {
		err = w.completePart(p)
	}
	if err == nil {
		return nil
	}
	var incomplete metadataError
	if errors.As(err, &incomplete) {
		return x.settle(p.entry, err)
	}
	p.failed = true
	p.close()
	x.open.drop(p)
	if p.created {
		if dir, err := w.folders.entry(x.entries[p.entry].parent); err == nil {
			_ = unix.Unlinkat(dir, x.tempName(p.entry), 0)
		}
	}
	if blobErr != nil {
		return x.fail(p.entry, err)
	}
	return x.settle(p.entry, err)
}

// openPart opens the temporary file of p, making it first if need be.
func (w *worker) openPart(p *part) error {
	if p.fd > 0 {
		w.x.open.use(p)
		return nil
	}
	dir, err := w.folders.entry(w.x.entries[p.entry].parent)
	if err != nil {
		return err
	}
	how := unix.O_WRONLY
	if !p.created {
		how |= unix.O_CREAT | unix.O_EXCL
	}
	fd, err := openat(dir, w.x.tempName(p.entry), how, 0o600)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return err
	}
	switch {
	case !p.created:
		p.created, p.dev, p.ino = true, st.Dev, st.Ino
	case st.Dev != p.dev || st.Ino != p.ino:
		unix.Close(fd)
		return fmt.Errorf("its temporary file: %w", ErrChanged)
	}
	p.fd = fd + 1
	w.x.open.use(p)
	return nil
}

// completePart adds what the target has already and finishes the file.
func (w *worker) completePart(p *part) error {
	x, e := w.x, &w.x.entries[p.entry]
	rec := x.arena.record(e.rec)
	err := w.keepChunks(p.fd-1, e, &rec)
	if err == nil {
		err = x.finishFile(p.fd-1, p.entry, &rec)
	}
	var incomplete metadataError
	if err == nil || errors.As(err, &incomplete) {
		p.close()
		x.open.drop(p)
		x.done(p.entry, rec.Size)
	}
	return err
}

// whole writes a file with at most one chunk from a pack, which is plain.
func (w *worker) whole(i uint32, plain []byte) error {
	x, e := w.x, &w.x.entries[i]
	rec := x.arena.record(e.rec)
	dir, err := w.folders.entry(e.parent)
	if err != nil {
		return err
	}
	fd, err := openat(dir, x.tempName(i), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	if plain != nil {
		err = writeSparse(fd, plain, 0)
	} else {
		err = w.keepChunks(fd, e, &rec)
	}
	if err == nil {
		err = x.finishFile(fd, i, &rec)
	}
	closeErr := unix.Close(fd)
	var incomplete metadataError
	if err == nil || errors.As(err, &incomplete) {
		if closeErr == nil {
			x.done(i, rec.Size)
			return err
		}
		err = closeErr // network file systems report errors of writing so
	}
	if dir, dirErr := w.folders.entry(e.parent); dirErr == nil {
		_ = unix.Unlinkat(dir, x.tempName(i), 0)
	}
	return err
}

// keepChunks copies the chunks that the existing file has to the new one,
// verifying them again: the file may have changed since the plan was made.
func (w *worker) keepChunks(fd int, e *entry, rec *record) error {
	if bytes.IndexByte(rec.chunks, chunkKept) < 0 {
		return nil
	}
	x := w.x
	dir, err := w.folders.entry(e.parent)
	if err != nil {
		return err
	}
	old, oldErr := openat(dir, rec.Name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if oldErr == nil {
		defer unix.Close(old)
	}
	pos := int64(0)
	for c, state := range rec.chunks {
		id := rec.id(c)
		length, _ := x.r.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
		if state == chunkKept {
			if cap(w.buf) < int(length) {
				w.buf = make([]byte, length)
			}
			chunk := w.buf[:length]
			if oldErr != nil || preadFull(old, chunk, pos) != nil || backup.Hash(chunk) != id {
				var err error
				if chunk, err = x.r.Blob(x.ctx, backup.DataBlob, id); err != nil {
					return storeError{err}
				}
			} else {
				x.reused.Add(uint64(length))
			}
			if err := writeSparse(fd, chunk, pos); err != nil {
				return err
			}
		}
		pos += int64(length)
	}
	return nil
}

// finishFile sets the length and the metadata of a file whose bytes are there.
func (x *execution) finishFile(fd int, i uint32, rec *record) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if uint64(st.Size) != rec.Size { // it ends in a hole
		if err := ignoringEINTR(func() error { return unix.Ftruncate(fd, int64(rec.Size)) }); err != nil {
			return fmt.Errorf("set size: %w", err)
		}
	}
	err := x.setMetadata(handle{fd: fd}, rec, &st, x.inherit, func() string { return x.path(i) })
	var incomplete metadataError
	if err != nil && !errors.As(err, &incomplete) {
		return err
	}
	x.written.Add(rec.Size)
	if st.Dev != x.t.dev {
		if err := unix.Fsync(fd); err != nil { // sync does not reach it
			return err
		}
	}
	return err
}

const page = 4096

// zeroes is compared with pages of files; it is never written.
var zeroes [page]byte

// writeSparse writes data at pos, leaving out zeroes at the beginning, at the
// end and in whole pages: what is not written to a new file is zero.
func writeSparse(fd int, data []byte, pos int64) error {
	head := min(int(-pos&(page-1)), len(data))
	if isZero(data[:head]) {
		pos += int64(head)
		data = data[head:]
		head = 0
	}
	if tail := (len(data) - head) % page; isZero(data[len(data)-tail:]) {
		data = data[:len(data)-tail]
	}
	from := 0
	for at := head; at+page <= len(data); at += page {
		if !isZero(data[at : at+page]) {
			continue
		}
		if at > from {
			if err := pwriteFull(fd, data[from:at], pos+int64(from)); err != nil {
				return err
			}
		}
		from = at + page
	}
	if from < len(data) {
		return pwriteFull(fd, data[from:], pos+int64(from))
	}
	return nil
}

// isZero reports whether b, of a page at most, has only zeroes.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b, zeroes[:len(b)])
}

// special makes a symbolic link, FIFO, socket or device node.
func (w *worker) special(i uint32, e *entry) error {
	x := w.x
	rec := x.arena.record(e.rec)
	dir, err := w.folders.entry(e.parent)
	if err != nil {
		return err
	}
	temp := x.tempName(i)
	if e.kind == kSymlink {
		err = unix.Symlinkat(rec.LinkTarget, dir, temp)
	} else {
		err = unix.Mknodat(dir, temp, e.kind.typeBits()|0o600, int(rec.Device))
	}
	if err == unix.EPERM && (e.kind == kDevice || e.kind == kCharDevice) {
		x.warn("device", func() string { return x.path(i) }, errors.New("device nodes can be made by root only, outside of containers; left out"))
		return nil
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", kinds[e.kind], err)
	}
	err = w.setSpecial(dir, temp, i, e, &rec, true)
	var incomplete metadataError
	if err == nil || errors.As(err, &incomplete) {
		x.done(i, 0)
		return err
	}
	_ = unix.Unlinkat(dir, temp, 0)
	return err
}

// setSpecial sets the metadata of name in dir without opening it for reading.
func (w *worker) setSpecial(dir int, name string, i uint32, e *entry, rec *record, created bool) error {
	fd, err := openat(dir, name, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	// Another file, or another name of a file elsewhere, must not get our
	// owner and mode.
	if st.Mode&unix.S_IFMT != e.kind.typeBits() || st.Nlink != 1 {
		return ErrChanged
	}
	h := handle{fd: fd, isPath: true, link: e.kind == kSymlink}
	return w.x.setMetadata(h, rec, &st, w.x.inherit || !created, func() string { return w.x.path(i) })
}

// metadata changes the metadata of an existing entry.
func (w *worker) metadata(i uint32, e *entry) error {
	dir, err := w.folders.entry(e.parent)
	if err != nil {
		return err
	}
	rec := w.x.arena.record(e.rec)
	if err := w.setSpecial(dir, rec.Name, i, e, &rec, false); err != nil {
		return err
	}
	w.x.metadata.Add(1)
	return nil
}

// verify reads files again and compares them with the snapshot.
func (x *execution) verify() error {
	var which []uint32
	for i := range x.entries {
		e, n := &x.entries[i], uint32(i)
		written := e.action == Create || e.action == Replace
		if e.kind == kFile && e.flags&(fLink|fKept) == 0 && (written || e.flags&fTrusted != 0) && !x.isBad(n) {
			which = append(which, n)
		}
	}
	g, ctx := errgroup.WithContext(x.ctx)
	jobs := make(chan uint32)
	g.Go(func() error {
		defer close(jobs)
		for _, i := range which {
			select {
			case jobs <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range x.opt.Workers {
		g.Go(func() error {
			w := worker{x: x, folders: folders{x: x}}
			defer w.folders.close()
			for i := range jobs {
				err := w.verify(i)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err == nil {
					x.verified.Add(1)
				} else if err := x.fail(i, fmt.Errorf("verify: %w", err)); err != nil {
					return err
				}
				x.progress(false)
			}
			return nil
		})
	}
	return g.Wait()
}

func (w *worker) verify(i uint32) error {
	x := w.x
	e := &x.entries[i]
	rec := x.arena.record(e.rec)
	dir, err := w.folders.entry(e.parent)
	if err != nil {
		return err
	}
	fd, err := openat(dir, rec.Name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || uint64(st.Size) != rec.Size {
		return fmt.Errorf("it has %d bytes instead of %d: %w", st.Size, rec.Size, ErrContents)
	}
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) // so that the drive is read where possible
	pos := int64(0)
	for c := range rec.chunks {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		id := rec.id(c)
		length, ok := x.r.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
		if !ok {
			return fmt.Errorf("chunk %s is unknown: %w", id.Short(), ErrDamaged)
		}
		if cap(w.buf) < int(length) {
			w.buf = make([]byte, length)
		}
		if err := preadFull(fd, w.buf[:length], pos); err != nil {
			return err
		}
		if backup.Hash(w.buf[:length]) != id {
			return fmt.Errorf("bytes %d to %d: %w", pos, pos+int64(length), ErrContents)
		}
		pos += int64(length)
	}
	return nil
}
