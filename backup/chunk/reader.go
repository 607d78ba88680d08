package chunk

import (
	"fmt"
	"io"
)

// readSize is how much a Reader reads between two looks for a cut, so also the
// most it can have read beyond one. The data is still in the processor's cache
// when it is searched.
const readSize = 128 << 10

// A Reader splits an input into chunks, one per call of Next. Reset makes it
// ready for another input, so that one Reader serves for many files; nothing is
// allocated then.
//
// What has been read beyond a cut waits in the Reader, at most 128 KiB, in a
// buffer that is made when first needed. Those bytes are copied twice and no
// others at all. A Reader is not for use by several goroutines at once.
type Reader struct {
	tables *Tables
	src    io.Reader
	err    error  // what src ended with
	rest   []byte // read, but not yet part of a chunk
}

// New returns a Reader over src.
func New(src io.Reader, t *Tables) *Reader { return &Reader{tables: t, src: src} }

// Reset makes r forget its input and begin with src.
func (r *Reader) Reset(src io.Reader) {
	r.src, r.err, r.rest = src, nil, r.rest[:0]
}

// Next returns the next chunk, in the array of dst, of which it uses the whole
// capacity, or in a larger one that it allocates. A capacity of MaxSize always
// suffices; for an input of a known size below that, one byte more than the
// size does. The chunk is the caller's: r keeps no reference to it or to dst.
//
// After the last chunk, and at once for an empty input, the error is io.EOF. Any
// other error is the input's own, as it is; no chunk holds bytes from after a
// read error, nor is a chunk cut short by one. Errors are final until Reset.
func (r *Reader) Next(dst []byte) ([]byte, error) {
	dst = append(dst[:0], r.rest...)
	r.rest = r.rest[:0]
	for r.err == nil {
		// No chunk ends before MinSize, so all up to there is read at once.
		from := max(len(dst), MinSize)
		dst = r.fill(dst, min(from+readSize, MaxSize))
		if n, ok := r.tables.cutFrom(dst, from); ok {
			r.keep(dst[n:])
			return dst[:n], nil
		}
	}
	if len(dst) > 0 && r.err == io.EOF {
		return dst, nil
	}
	return nil, r.err
}

// fill reads until buf has n bytes or the input ends.
func (r *Reader) fill(buf []byte, n int) []byte {
	for empty := 0; len(buf) < n && r.err == nil; {
		if len(buf) == cap(buf) {
			buf = append(make([]byte, 0, min(max(2*cap(buf), 64<<10), MaxSize)), buf...)
		}
		free := buf[len(buf):min(cap(buf), n)]
		got, err := r.src.Read(free)
		if got < 0 || got > len(free) {
			r.err = fmt.Errorf("reading: %T returned %d bytes for a buffer of %d", r.src, got, len(free))
			return buf
		}
		buf, r.err = buf[:len(buf)+got], err
		if got > 0 {
			empty = 0
		} else if empty++; empty == 100 && err == nil {
			r.err = io.ErrNoProgress
		}
	}
	return buf
}

// keep holds b back for the next chunk.
func (r *Reader) keep(b []byte) {
	if r.rest == nil && len(b) > 0 {
		r.rest = make([]byte, 0, readSize)
	}
	r.rest = append(r.rest, b...)
}
