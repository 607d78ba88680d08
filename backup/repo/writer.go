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
)

// Bounds of one index file.
const (
	maxIndexBlobs = 50_000
	maxIndexAge   = 10 * time.Minute
)

// dataPacks is how many packs of data blobs are filled side by side. Each blob
// goes to one at random, so that the sizes of the blobs in a pack don't tell
// which file they are from.
const dataPacks = 2

// flushTimeout bounds the time in which an interrupted Update still makes an
// index for the packs that it wrote.
const flushTimeout = 5 * time.Second

// A Writer adds blobs to a repository during an Update. Its methods may be
// called concurrently.
type Writer struct {
	r       *Repo
	packers [dataPacks + 1]packer // the last one for trees
	uploads chan []byte           // buffers of packs that may be written at once
	scratch sync.Pool             // *scratch

	mu       sync.Mutex
	pending  map[backup.Blob]struct{} // saved, but not in the index yet
	file     IndexFile                // durable packs that no index file names
	blobs    int                      // blobs in file
	began    time.Time                // when file got its first pack
	written  uint64
	newPacks []backup.ID
}

type packer struct {
	mu    sync.Mutex
	buf   []byte
	blobs []PackedBlob
}

type scratch struct{ packed, sealed []byte }

// Update runs fn with a Writer, then makes everything that fn saved durable:
// packs first, then the index. What fn saved is in the repository only when
// Update returns nil.
//
// When fn fails, or ctx is cancelled, packs that are durable already still get
// an index, so that the next run need not send them again.
//
// The caller holds a shared lock. Memory is bounded by PackSize times three
// plus the number of uploads.
func (r *Repo) Update(ctx context.Context, fn func(ctx context.Context, w *Writer) error) error {
	if err := r.writable(); err != nil {
		return err
	}
	w := &Writer{
		r:       r,
		uploads: make(chan []byte, r.opt.Uploads),
		scratch: sync.Pool{New: func() any { return new(scratch) }},
		pending: map[backup.Blob]struct{}{},
	}
	for range r.opt.Uploads {
		w.uploads <- nil
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
}

// Save stores a blob unless it is there already. It does not keep plain.
func (w *Writer) Save(ctx context.Context, kind backup.BlobKind, plain []byte) (Saved, error) {
	b := backup.Blob{Kind: kind, ID: backup.Hash(plain)}
	s := Saved{ID: b.ID}
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

// SaveTree encodes and stores a tree.
func (w *Writer) SaveTree(ctx context.Context, t *backup.Tree) (Saved, error) {
	sc := w.scratch.Get().(*scratch)
	defer w.scratch.Put(sc)
	plain, err := t.AppendJSON(sc.packed[:0])
	sc.packed = plain[:0]
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

// pack compresses, seals and appends a blob to a pack.
func (w *Writer) pack(ctx context.Context, b backup.Blob, plain []byte) (int, error) {
	sc := w.scratch.Get().(*scratch)
	defer w.scratch.Put(sc)
	packed, compressed := w.r.zip.compress(sc.packed[:0], b.Kind, plain)
	sc.packed = packed[:0]
	entry := PackedBlob{Blob: b}
	if compressed {
		entry.Plain = uint32(len(plain))
	} else {
		packed = plain
	}
	sc.sealed = w.r.key.Seal(sc.sealed[:0], packed)
	entry.Length = uint32(len(sc.sealed))

	p := &w.packers[dataPacks]
	if b.Kind == backup.DataBlob {
		p = &w.packers[rand.IntN(dataPacks)]
	}
	return len(sc.sealed), w.append(ctx, p, entry, sc.sealed)
}

// append adds a sealed blob to a pack, and writes the pack if it is full then.
func (w *Writer) append(ctx context.Context, p *packer, entry PackedBlob, sealed []byte) error {
	p.mu.Lock()
	if p.buf == nil {
		p.buf = make([]byte, 0, w.r.opt.PackSize+w.r.opt.PackSize/8)
	}
	entry.Offset = uint32(len(p.buf))
	p.buf = append(p.buf, sealed...)
	p.blobs = append(p.blobs, entry)
	if len(p.buf) < w.r.opt.PackSize {
		p.mu.Unlock()
		return nil
	}
	return w.finish(ctx, p)
}

// finish takes a pack out of p, whose lock it gives back, and writes it. It
// takes a place among the uploads first, so that no more packs wait in memory
// than there are places.
func (w *Writer) finish(ctx context.Context, p *packer) error {
	var spare []byte
	select {
	case spare = <-w.uploads:
	case <-ctx.Done():
		p.mu.Unlock()
		return ctx.Err()
	}
	buf, blobs := p.buf, p.blobs
	p.buf, p.blobs = spare, nil
	p.mu.Unlock()
	defer func() { w.uploads <- buf[:0] }()

	header := w.r.key.Seal(nil, appendHeader(nil, blobs))
	buf = append(buf, header...)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(header)))
	id := backup.Hash(buf)
	if err := w.r.be.Put(ctx, backend.Key{Kind: backend.Packs, ID: id}, buf); err != nil {
		return err
	}
	return w.addPack(ctx, id, blobs, len(buf))
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
		p := &w.packers[i]
		p.mu.Lock()
		if len(p.blobs) == 0 {
			p.mu.Unlock()
			continue
		}
		if err := w.finish(ctx, p); err != nil {
			return err
		}
	}
	return w.saveIndex(ctx)
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
	plain, err := file.Encode()
	if err != nil {
		return fmt.Errorf("encode index: %w", err)
	}
	id, err := w.r.SaveFile(ctx, backend.Indexes, plain)
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
