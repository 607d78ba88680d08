package browse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"sort"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// readAhead is how many bytes of blobs are read ahead of what is written, at
// least one blob, and readAheadBlobs how many blobs.
const (
	readAhead      = 24 << 20
	readAheadBlobs = 64
)

// ErrSize says that a file's blobs are not as long as its size.
var ErrSize = errors.New("its contents are not as long as its size says; run `ide49-backup check`")

// A File gives access to the contents of a file at random. Its methods may be
// called concurrently.
type File struct {
	v    *View
	node *backup.Node
	ends []uint64 // where each blob ends
}

// Open returns the contents of a file, of which nothing is read yet. It fails
// with ErrSize where they can't be what was recorded, and with repo.ErrNoBlob
// where some are not there.
func (v *View) Open(n *backup.Node) (*File, error) {
	if n.Type != backup.File {
		return nil, ErrNotFile
	}
	f := &File{v: v, node: n, ends: make([]uint64, len(n.Content))}
	var end uint64
	for i, id := range n.Content {
		b := backup.Blob{Kind: backup.DataBlob, ID: id}
		size, ok := v.repo.Index().PlainLength(b)
		if !ok {
			return nil, fmt.Errorf("%s: %w", b, repo.ErrNoBlob)
		}
		end += uint64(size)
		f.ends[i] = end
	}
	if end != n.Size {
		return nil, fmt.Errorf("%d bytes instead of %d: %w", end, n.Size, ErrSize)
	}
	return f, nil
}

// Size returns the length of the file in bytes.
func (f *File) Size() uint64 { return f.node.Size }

// blobAt returns the number of the blob that holds the byte at off.
func (f *File) blobAt(off uint64) int {
	return sort.Search(len(f.ends), func(i int) bool { return f.ends[i] > off })
}

func (f *File) start(i int) uint64 {
	if i == 0 {
		return 0
	}
	return f.ends[i-1]
}

// ReadAt fills p from off on, like io.ReaderAt. Holes are not read.
func (f *File) ReadAt(ctx context.Context, p []byte, off uint64) (n int, err error) {
	for i := f.blobAt(off); i < len(f.ends) && n < len(p); i++ {
		from := off + uint64(n) - f.start(i)
		room := p[n:]
		if size := f.ends[i] - f.start(i); f.hole(i) {
			room = room[:min(uint64(len(room)), size-from)]
			clear(room)
			n += len(room)
			continue
		}
		data, err := f.v.contents(ctx, f.node.Content[i])
		if err != nil {
			return n, err
		}
		n += copy(room, data[min(from, uint64(len(data))):])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// contents returns a data blob by the cache.
func (v *View) contents(ctx context.Context, id backup.ID) ([]byte, error) {
	return v.data.get(ctx, id, func(ctx context.Context) ([]byte, error) {
		return v.blob(ctx, backup.DataBlob, id)
	})
}

// A span is a part of a file, in bytes.
type span struct{ off, size uint64 }

// spans yields the parts of the file that are not holes, in order, none
// touching the next.
func (f *File) spans() iter.Seq[span] {
	return func(yield func(span) bool) {
		for i := 0; i < len(f.ends); {
			if f.hole(i) {
				i++
				continue
			}
			from := f.start(i)
			for i < len(f.ends) && !f.hole(i) {
				i++
			}
			if size := f.ends[i-1] - from; size > 0 && !yield(span{from, size}) {
				return
			}
		}
	}
}

// Data returns where the first data at or behind off begins, and Hole where
// the first hole does, which is at the latest the end. ok is false if there is
// none, or off is not in the file.
func (f *File) Data(off uint64) (at uint64, ok bool) {
	for i := f.blobAt(off); i < len(f.ends); i++ {
		if !f.hole(i) {
			return max(off, f.start(i)), true
		}
	}
	return 0, false
}

// Hole is described at Data.
func (f *File) Hole(off uint64) (at uint64, ok bool) {
	for i := f.blobAt(off); i < len(f.ends); i++ {
		if f.hole(i) {
			return max(off, f.start(i)), true
		}
	}
	return f.Size(), off < f.Size()
}

// hole reports whether a blob holds nothing but zeros.
func (f *File) hole(i int) bool {
	return f.v.isHole(f.node.Content[i])
}

// isHole reports whether a data blob holds nothing but zeros, without reading
// it.
func (v *View) isHole(id backup.ID) bool {
	for loc := range v.repo.Index().Lookup(backup.Blob{Kind: backup.DataBlob, ID: id}) {
		// Zeros compress to next to nothing; whatever does not is no hole.
		if n := loc.PlainLength(); n >= minHole && loc.Compressed() && loc.Length < 256+n/256 {
			return v.zeros.id(n) == id
		}
		return false
	}
	return false
}

// minHole is the length from which on zeros count as a hole: less is not worth
// a jump.
const minHole = 4096

// zeroIDs knows the IDs of blobs of zeros.
type zeroIDs struct {
	mu    sync.Mutex
	known map[uint32]backup.ID
}

// maxZeroIDs bounds how many lengths are remembered. The chunker gives long
// runs of zeros one or two lengths; only the last blob of a file differs.
const maxZeroIDs = 1024

// id returns the ID of n zeros.
func (z *zeroIDs) id(n uint32) backup.ID {
	z.mu.Lock()
	id, ok := z.known[n]
	z.mu.Unlock()
	if ok {
		return id
	}
	id = backup.Hash(make([]byte, n))
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.known == nil || len(z.known) >= maxZeroIDs {
		z.known = map[uint32]backup.ID{}
	}
	z.known[n] = id
	return id
}

// Cat writes the contents of a file to w. It reads ahead, with bounded memory,
// and verifies every blob before any byte of it is written.
func (v *View) Cat(ctx context.Context, w io.Writer, e Entry) error {
	entries := func(yield func(Entry, error) bool) { yield(e, nil) }
	if e.Node.Type != backup.File {
		return &fs.PathError{Op: "read", Path: e.Path, Err: ErrNotFile}
	}
	return v.stream(ctx, entries, func(p piece) error {
		if p.err != nil {
			return &fs.PathError{Op: "read", Path: e.Path, Err: p.err}
		}
		return p.write(w)
	})
}

// A piece of a stream is an entry, or a part of the contents of the file that
// came before.
type piece struct {
	entry *Entry // of the first piece
	file  *File  // of an entry that is a file
	blob  int    // of contents, the number of the blob
	data  []byte // of contents; for a hole nil
	err   error
}

// write writes a piece of contents; of other pieces nothing.
func (p *piece) write(w io.Writer) error {
	if p.entry != nil || p.data != nil {
		_, err := w.Write(p.data)
		return err
	}
	var zeros [32 << 10]byte
	for left := p.file.ends[p.blob] - p.file.start(p.blob); left > 0; {
		n, err := w.Write(zeros[:min(left, uint64(len(zeros)))])
		if err != nil {
			return err
		}
		left -= uint64(n)
	}
	return nil
}

// A pending is a piece whose data may still be on its way.
type pending struct {
	piece
	weight int64
	done   chan struct{} // nil where there is nothing to wait for
}

// stream calls each for all entries in turn, and for files with each blob of
// their contents, while the next ones are being read. An error of each ends
// it and is returned. An entry whose contents can't be read comes as a piece
// with the error; what follows of it is left out.
func (v *View) stream(ctx context.Context, entries iter.Seq2[Entry, error], each func(piece) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	room := semaphore.NewWeighted(readAhead)
	queue := make(chan *pending, readAheadBlobs)
	wg.Go(func() {
		defer close(queue)
		send := func(p *pending) bool {
			select {
			case queue <- p:
				return true
			case <-ctx.Done():
				return false
			}
		}
		for e, err := range entries {
			p := &pending{piece: piece{entry: &e, err: err}}
			if err == nil && e.Node.Type == backup.File {
				p.file, p.err = v.Open(e.Node)
			}
			if !send(p) {
				return
			}
			if p.file == nil || p.err != nil {
				continue
			}
			for i, id := range e.Node.Content {
				b := &pending{piece: piece{file: p.file, blob: i}}
				if !p.file.hole(i) {
					b.weight = min(int64(p.file.ends[i]-p.file.start(i)), readAhead)
					if room.Acquire(ctx, b.weight) != nil {
						return
					}
					b.done = make(chan struct{})
					wg.Go(func() {
						defer close(b.done)
						b.data, b.err = v.blob(ctx, backup.DataBlob, id)
					})
				}
				if !send(b) {
					return
				}
			}
		}
	})
	var broken *File
	for p := range queue {
		if p.done != nil {
			<-p.done
			room.Release(p.weight)
		}
		if p.entry == nil && p.file == broken {
			continue
		}
		if p.entry == nil && p.err != nil {
			broken = p.file
		}
		if err := each(p.piece); err != nil {
			return err
		}
	}
	return ctx.Err()
}
