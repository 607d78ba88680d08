package repo

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/crypt"
)

// Bounds of one index file.
const (
	maxIndexBlobs = 50_000
	maxIndexAge   = 10 * time.Minute
)

// flushTimeout bounds the time in which an interrupted Update still makes an
// index for the packs that it wrote.
const flushTimeout = 5 * time.Second

// A Writer adds blobs to a repository during an Update. Its methods may be
// called concurrently.
type Writer struct {
	r       *Repo
	packers []packer  // the last one for trees
	scratch sync.Pool // *[]byte

	mu       sync.Mutex
	pending  map[backup.Blob]struct{} // saved, but not in the index yet
	file     IndexFile                // durable packs that no index file names
	blobs    int                      // blobs in file
	began    time.Time                // when file got its first pack
	written  uint64
	newPacks []backup.ID
}

// A packer fills one pack at a time. It is locked while room in the pack is
// given out and while the pack is written, but not while blobs are sealed into
// the room that they got.
type packer struct {
	mu      sync.Mutex
	buf     []byte // its array stays where it is until the pack is written
	blobs   []PackedBlob
	sealing sync.WaitGroup
}

// slack is the room behind PackSize for the last blob of a pack and its header.
// Only huge folders are larger; they get a buffer of their own. What is not
// used takes address space, not memory.
const slack = 9 << 20

// Update runs fn with a Writer, then makes everything that fn saved durable:
// packs first, then the index. What fn saved is in the repository only when
// Update returns nil.
//
// When fn fails, or ctx is cancelled, packs that are durable already still get
// an index, so that the next run need not send them again.
//
// The caller holds a shared lock. Memory is bounded by PackSize times the
// number of DataPacks plus one.
func (r *Repo) Update(ctx context.Context, fn func(ctx context.Context, w *Writer) error) error {
	if err := r.writable(); err != nil {
		return err
	}
	w := &Writer{
		r:       r,
		packers: make([]packer, r.opt.DataPacks+1),
		scratch: sync.Pool{New: func() any { return new([]byte) }},
		pending: map[backup.Blob]struct{}{},
	}
	err := fn(ctx, w)
	if err == nil {
		err = w.flush(ctx)
	}
	if err != nil {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
		defer cancel()
		if flushErr := w.saveIndex(late); flushErr != nil {
			return fmt.Errorf("%w (and afterwards: %w)", err, flushErr)
		}
	}
	return err
}

// Saved says what Save did with a blob.
type Saved struct {
	ID     backup.ID
	Known  bool // it was there already, or is being written
	Stored int  // bytes that it takes in a pack; 0 if known
	Plain  int  // bytes of its plaintext
}

// Save stores a blob unless it is there already. It does not keep plain.
func (w *Writer) Save(ctx context.Context, kind backup.BlobKind, plain []byte) (Saved, error) {
	b := backup.Blob{Kind: kind, ID: backup.Hash(plain)}
	s := Saved{ID: b.ID, Plain: len(plain)}
	if !w.claim(b) {
		s.Known = true
		return s, nil
	}
	if err := ctx.Err(); err != nil {
		return s, err
	}
	n, err := w.pack(ctx, b, plain)
	s.Stored = n
	return s, err
}

// SaveCopy stores a blob even if it is there already: for a copy that is known
// to be intact, beside others that may not be.
func (w *Writer) SaveCopy(ctx context.Context, kind backup.BlobKind, plain []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err := w.pack(ctx, backup.Blob{Kind: kind, ID: backup.Hash(plain)}, plain)
	return err
}

// SaveTree encodes and stores a tree.
func (w *Writer) SaveTree(ctx context.Context, t *backup.Tree) (Saved, error) {
	scratch := w.scratch.Get().(*[]byte)
	defer w.scratch.Put(scratch)
	plain, err := t.AppendJSON((*scratch)[:0])
	*scratch = plain
	if err != nil {
		return Saved{}, fmt.Errorf("encode a folder: %w", err)
	}
	if len(plain) > maxTreeBlob {
		return Saved{}, fmt.Errorf("encode a folder: %d entries are more than one folder may have in a snapshot", len(t.Nodes))
	}
	return w.Save(ctx, backup.TreeBlob, plain)
}

// claim reports whether the caller is the one to store b.
func (w *Writer) claim(b backup.Blob) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.pending[b]; ok || w.r.Index().Has(b) {
		return false
	}
	w.pending[b] = struct{}{}
	return true
}

// pack compresses a blob and seals it into a pack. It returns the bytes that
// the blob takes.
func (w *Writer) pack(ctx context.Context, b backup.Blob, plain []byte) (int, error) {
	scratch := w.scratch.Get().(*[]byte)
	defer w.scratch.Put(scratch)
	packed, compressed := w.r.zip.compress((*scratch)[:0], b.Kind, plain)
	*scratch = packed
	entry := PackedBlob{Blob: b}
	if compressed {
		entry.Plain = uint32(len(plain))
	} else {
		packed = plain
	}
	entry.Length = uint32(len(packed) + crypt.Overhead)
	return int(entry.Length), w.place(ctx, entry, packed, false)
}

// place puts a blob into a pack, which it writes if it is full then. The bytes
// are sealed already, or get sealed.
func (w *Writer) place(ctx context.Context, entry PackedBlob, data []byte, sealed bool) error {
	n := int(entry.Length)
	p := w.lockPacker(entry.Kind)
	if len(p.blobs) > 0 && len(p.buf)+n > cap(p.buf)-slack/2 {
		// No room for this one and a header: it begins the next pack.
		if err := w.finish(ctx, p); err != nil {
			p.mu.Unlock()
			return err
		}
	}
	if size := max(w.r.opt.PackSize, n) + slack; len(p.blobs) == 0 && cap(p.buf) < size {
		p.buf = make([]byte, 0, size)
	}
	off := len(p.buf)
	entry.Offset = uint32(off)
	p.buf = p.buf[:off+n]
	room := p.buf[off : off : off+n]
	p.blobs = append(p.blobs, entry)
	if off+n < w.r.opt.PackSize {
		p.sealing.Add(1)
		p.mu.Unlock()
		w.fill(room, data, sealed)
		p.sealing.Done()
		return nil
	}
	defer p.mu.Unlock()
	w.fill(room, data, sealed)
	return w.finish(ctx, p)
}

func (w *Writer) fill(room, data []byte, sealed bool) {
	if sealed {
		copy(room[:len(data)], data)
		return
	}
	w.r.key.Seal(room, data)
}

// lockPacker returns a packer for blobs of a kind, locked: for data one at
// random among those that are not busy, so that the sizes of the blobs in a
// pack don't tell which file they are from.
func (w *Writer) lockPacker(kind backup.BlobKind) *packer {
	last := len(w.packers) - 1
	if kind == backup.TreeBlob {
		w.packers[last].mu.Lock()
		return &w.packers[last]
	}
	first := rand.IntN(last)
	for i := range last {
		if p := &w.packers[(first+i)%last]; p.mu.TryLock() {
			return p
		}
	}
	w.packers[first].mu.Lock()
	return &w.packers[first]
}

// finish writes the pack of p, which is locked and stays so.
func (w *Writer) finish(ctx context.Context, p *packer) error {
	p.sealing.Wait()
	header := w.r.key.Seal(nil, appendHeader(nil, p.blobs))
	p.buf = append(p.buf, header...)
	p.buf = binary.LittleEndian.AppendUint32(p.buf, uint32(len(header)))
	id := backup.Hash(p.buf)
	if err := w.r.be.Put(ctx, backend.Key{Kind: backend.Packs, ID: id}, p.buf); err != nil {
		return err
	}
	err := w.addPack(ctx, id, p.blobs, len(p.buf))
	p.buf, p.blobs = p.buf[:0], nil
	return err
}

// addPack makes a durable pack known.
func (w *Writer) addPack(ctx context.Context, id backup.ID, blobs []PackedBlob, size int) error {
	w.r.Index().add(id, blobs)
	w.mu.Lock()
	for _, b := range blobs {
		delete(w.pending, b.Blob)
	}
	w.newPacks = append(w.newPacks, id)
	w.written += uint64(size)
	if len(w.file.Packs) == 0 {
		w.began = time.Now()
	}
	w.file.Packs = append(w.file.Packs, IndexPack{id, blobs})
	w.blobs += len(blobs)
	due := w.blobs >= maxIndexBlobs || time.Since(w.began) >= maxIndexAge
	w.mu.Unlock()
	if due {
		return w.saveIndex(ctx)
	}
	return nil
}

// flush writes the packs that are not full, then the index.
func (w *Writer) flush(ctx context.Context) error {
	for i := range w.packers {
		if err := w.flushPacker(ctx, &w.packers[i]); err != nil {
			return err
		}
	}
	return w.saveIndex(ctx)
}

func (w *Writer) flushPacker(ctx context.Context, p *packer) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.blobs) == 0 {
		return nil
	}
	return w.finish(ctx, p)
}

// saveIndex writes an index file for the packs that have none.
func (w *Writer) saveIndex(ctx context.Context) error {
	w.mu.Lock()
	file := w.file
	w.file, w.blobs = IndexFile{}, 0
	w.mu.Unlock()
	if len(file.Packs) == 0 {
		return nil
	}
	id, err := w.r.SaveFile(ctx, backend.Indexes, file.Encode())
	if err != nil {
		return err
	}
	w.r.Index().noteFile(id)
	return nil
}

// Written returns the bytes of all packs written so far.
func (w *Writer) Written() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.written
}

// Packs returns the packs written so far.
func (w *Writer) Packs() []backup.ID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]backup.ID(nil), w.newPacks...)
}
