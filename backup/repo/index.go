package repo

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"slices"
	"sort"
	"strconv"
	"sync"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/internal/jsonscan"
)

// A Location says where a blob is stored.
type Location struct {
	Pack backup.ID
	PackedBlob
}

// An Index knows the packs of a repository and the blobs in them. It takes
// about 50 bytes a blob. Its methods may be called concurrently.
type Index struct {
	seed maphash.Seed

	mu    sync.RWMutex
	runs  []run     // sorted by first
	segs  [][]entry // all but the last are full
	count int       // entries in segs
	// table is a hash table with linear probing: the number of an entry
	// plus one, or zero. Its length is a power of two.
	table []uint32
	files map[backup.ID]bool     // the index files that were read or written
	known map[backup.ID][]uint32 // the numbers of each pack's runs
}

// A run is a series of entries in one pack. A pack has one, unless index files
// differ on what it holds.
type run struct {
	pack  backup.ID
	first uint32 // number of the first entry
	n     uint32
}

// An entry is one blob, in as little memory as a plain array allows. Its pack
// is found through runs.
type entry struct {
	id     backup.ID
	offset uint32
	length uint32 // treeBit set for tree blobs; lengths are far below
	plain  uint32
}

const (
	treeBit = 1 << 31
	segSize = 1 << 12
)

// NewIndex returns an empty index.
func NewIndex() *Index {
	return &Index{seed: maphash.MakeSeed(), table: make([]uint32, 1<<10), files: map[backup.ID]bool{}, known: map[backup.ID][]uint32{}}
}

func (x *Index) entry(i uint32) *entry { return &x.segs[i/segSize][i%segSize] }

func (e *entry) kind() backup.BlobKind { return backup.BlobKind(e.length >> 31) }

func (e *entry) blob() PackedBlob {
	return PackedBlob{backup.Blob{Kind: e.kind(), ID: e.id}, e.offset, e.length &^ treeBit, e.plain}
}

// hash mixes the whole ID with a random seed, so that a hostile index can't
// choose IDs that collide in the table.
func (x *Index) hash(id backup.ID) uint64 { return maphash.Bytes(x.seed, id[:]) }

// probe yields the numbers of the entries of b.
func (x *Index) probe(b backup.Blob, yield func(i uint32) bool) {
	mask := uint64(len(x.table) - 1)
	for h := x.hash(b.ID) & mask; x.table[h] != 0; h = (h + 1) & mask {
		i := x.table[h] - 1
		if e := x.entry(i); e.id == b.ID && e.kind() == b.Kind && !yield(i) {
			return
		}
	}
}

// Number returns a small number that stands for a blob, the same for all its
// copies, smaller than Len. Numbers never change.
func (x *Index) Number(b backup.Blob) (n uint32, ok bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	// Of equal keys, linear probing without removals meets the oldest first.
	x.probe(b, func(i uint32) bool {
		n, ok = i, true
		return false
	})
	return n, ok
}

// Has reports whether a blob is stored.
func (x *Index) Has(b backup.Blob) bool {
	_, ok := x.PlainLength(b)
	return ok
}

// PlainLength returns the length in bytes of a blob's plaintext.
func (x *Index) PlainLength(b backup.Blob) (n uint32, ok bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	x.probe(b, func(i uint32) bool {
		n, ok = x.entry(i).blob().PlainLength(), true
		return false
	})
	return n, ok
}

// Lookup yields every place where a blob is stored.
func (x *Index) Lookup(b backup.Blob) iter.Seq[Location] {
	return func(yield func(Location) bool) {
		x.mu.RLock()
		var room [2]Location // mostly one
		found := room[:0]
		x.probe(b, func(i uint32) bool {
			found = append(found, Location{x.packOf(i), x.entry(i).blob()})
			return true
		})
		x.mu.RUnlock()
		for _, loc := range found {
			if !yield(loc) {
				return
			}
		}
	}
}

func (x *Index) packOf(i uint32) backup.ID { return x.runOf(i).pack }

func (x *Index) runOf(i uint32) run {
	n := sort.Search(len(x.runs), func(k int) bool { return x.runs[k].first > i })
	return x.runs[n-1]
}

// Len returns how many blobs are stored, counting copies.
func (x *Index) Len() int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.count
}

// HasPack reports whether the index knows a pack.
func (x *Index) HasPack(pack backup.ID) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	_, ok := x.known[pack]
	return ok
}

// Packs yields every pack with its blobs sorted by offset. Packs that are
// added meanwhile may be missing. The slice is valid until the next step.
func (x *Index) Packs() iter.Seq2[backup.ID, []PackedBlob] {
	return func(yield func(backup.ID, []PackedBlob) bool) {
		var blobs []PackedBlob
		for k := 0; ; k++ {
			x.mu.RLock()
			if k == len(x.runs) {
				x.mu.RUnlock()
				return
			}
			pack := x.runs[k].pack
			first := x.known[pack][0] == uint32(k) // the other runs come with the first
			if first {
				blobs = x.appendBlobs(blobs[:0], pack)
			}
			x.mu.RUnlock()
			if first && !yield(pack, blobs) {
				return
			}
		}
	}
}

// PackBlobs returns the blobs of a pack sorted by offset, or nil.
func (x *Index) PackBlobs(pack backup.ID) []PackedBlob {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.appendBlobs(nil, pack)
}

func (x *Index) appendBlobs(dst []PackedBlob, pack backup.ID) []PackedBlob {
	for _, k := range x.known[pack] {
		r := x.runs[k]
		for i := range r.n {
			dst = append(dst, x.entry(r.first+i).blob())
		}
	}
	byOffset := func(a, b PackedBlob) int { return cmp.Compare(a.Offset, b.Offset) }
	if !slices.IsSortedFunc(dst, byOffset) {
		slices.SortFunc(dst, byOffset)
	}
	return dst
}

// Files returns the names of the index files that the index was made from.
func (x *Index) Files() []backup.ID {
	x.mu.RLock()
	defer x.mu.RUnlock()
	ids := make([]backup.ID, 0, len(x.files))
	for id := range x.files {
		ids = append(ids, id)
	}
	return ids
}

// add makes blobs of a pack known.
func (x *Index) add(pack backup.ID, blobs []PackedBlob) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if have := x.appendBlobs(nil, pack); len(have) > 0 {
		// Two index files may name one pack, after a prune that was
		// interrupted or two repairs at once. What they agree on counts once.
		twice := make(map[PackedBlob]bool, len(have))
		for _, b := range have {
			twice[b] = true
		}
		blobs = slices.DeleteFunc(slices.Clone(blobs), func(b PackedBlob) bool { return twice[b] })
		if len(blobs) == 0 {
			return
		}
	}
	x.known[pack] = append(x.known[pack], uint32(len(x.runs)))
	x.runs = append(x.runs, run{pack, uint32(x.count), uint32(len(blobs))})
	for _, b := range blobs {
		x.insert(b)
	}
}

func (x *Index) insert(b PackedBlob) {
	if x.count%segSize == 0 {
		x.segs = append(x.segs, make([]entry, segSize))
	}
	e := x.entry(uint32(x.count))
	*e = entry{b.ID, b.Offset, b.Length | uint32(b.Kind)<<31, b.Plain}
	x.count++
	if x.count > len(x.table)/4*3 {
		x.table = make([]uint32, 2*len(x.table))
		for i := range x.count {
			x.place(uint32(i))
		}
		return
	}
	x.place(uint32(x.count - 1))
}

func (x *Index) place(i uint32) {
	mask := uint64(len(x.table) - 1)
	h := x.hash(x.entry(i).id) & mask
	for x.table[h] != 0 {
		h = (h + 1) & mask
	}
	x.table[h] = i + 1
}

func (x *Index) addFile(id backup.ID, f *IndexFile) {
	for _, p := range f.Packs {
		x.add(p.ID, p.Blobs)
	}
	x.noteFile(id)
}

func (x *Index) noteFile(id backup.ID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.files[id] = true
}

// An IndexFile is the contents of one index file.
type IndexFile struct {
	Packs []IndexPack
}

// An IndexPack is a pack in an index file.
type IndexPack struct {
	ID    backup.ID
	Blobs []PackedBlob
}

// DecodeIndex parses and checks the plaintext of an index file.
func DecodeIndex(plain []byte) (*IndexFile, error) {
	if len(plain) > 0 && plain[0] == plainArray {
		return nil, fmt.Errorf("the index is of the format before version 1: %w", ErrVersion)
	}
	d := jsonscan.New(plain)
	f := &IndexFile{}
	err := d.Object(func(key []byte) error {
		if string(key) != "packs" || d.Null() {
			return d.Skip()
		}
		return d.Array(func() error {
			p, err := decodeIndexPack(d)
			f.Packs = append(f.Packs, p)
			return err
		})
	})
	if err == nil {
		err = d.End()
	}
	if err != nil && !errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("byte %d: %w: %w", d.Pos(), ErrDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func decodeIndexPack(d *jsonscan.Scanner) (IndexPack, error) {
	var p IndexPack
	err := d.Object(func(key []byte) (err error) {
		switch string(key) {
		case "id":
			p.ID, err = decodeID(d)
		case "blobs":
			if d.Null() {
				return nil
			}
			err = d.Array(func() error {
				b, err := decodeIndexBlob(d)
				p.Blobs = append(p.Blobs, b)
				return err
			})
		default:
			err = d.Skip()
		}
		return err
	})
	if err == nil && p.ID.IsZero() {
		err = fmt.Errorf("a pack without a name: %w", ErrDamaged)
	}
	return p, err
}

func decodeIndexBlob(d *jsonscan.Scanner) (PackedBlob, error) {
	var b PackedBlob
	typed := false
	number := func(to *uint32) error {
		v, err := d.Uint(32)
		*to = uint32(v)
		return err
	}
	err := d.Object(func(key []byte) (err error) {
		switch string(key) {
		case "id":
			b.ID, err = decodeID(d)
		case "type":
			var t []byte
			if t, err = d.Bytes(); err != nil {
				return err
			}
			switch string(t) {
			case "data":
			case "tree":
				b.Kind = backup.TreeBlob
			default:
				return fmt.Errorf("a blob of type %.20q: %w", t, ErrDamaged)
			}
			typed = true
		case "offset":
			err = number(&b.Offset)
		case "length":
			err = number(&b.Length)
		case "uncompressed_length":
			err = number(&b.Plain)
		default:
			err = d.Skip()
		}
		return err
	})
	if err == nil && !typed {
		err = fmt.Errorf("a blob without a type: %w", ErrDamaged)
	}
	if err != nil {
		return b, err
	}
	return b, b.validate()
}

func decodeID(d *jsonscan.Scanner) (backup.ID, error) {
	text, err := d.Bytes()
	if err != nil {
		return backup.ID{}, err
	}
	var id backup.ID
	err = id.UnmarshalText(text)
	return id, err
}

// Encode returns the plaintext of an index file.
func (f *IndexFile) Encode() []byte {
	blobs := 0
	for _, p := range f.Packs {
		blobs += len(p.Blobs)
	}
	dst := make([]byte, 0, 100*len(f.Packs)+160*blobs+20)
	dst = append(dst, `{"packs":[`...)
	for i, p := range f.Packs {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendMember(dst, `{"id":"`, p.ID)
		dst = append(dst, `,"blobs":[`...)
		for k, b := range p.Blobs {
			if k > 0 {
				dst = append(dst, ',')
			}
			dst = appendMember(dst, `{"id":"`, b.ID)
			dst = append(append(append(dst, `,"type":"`...), b.Kind.String()...), '"')
			dst = strconv.AppendUint(append(dst, `,"offset":`...), uint64(b.Offset), 10)
			dst = strconv.AppendUint(append(dst, `,"length":`...), uint64(b.Length), 10)
			if b.Plain != 0 {
				dst = strconv.AppendUint(append(dst, `,"uncompressed_length":`...), uint64(b.Plain), 10)
			}
			dst = append(dst, '}')
		}
		dst = append(dst, "]}"...)
	}
	return append(dst, "]}"...)
}

func appendMember(dst []byte, key string, id backup.ID) []byte {
	dst = hex.AppendEncode(append(dst, key...), id[:])
	return append(dst, '"')
}
