package repo

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/crypt"
)

// A PackedBlob says where in a pack a blob is. Lengths are bytes.
type PackedBlob struct {
	backup.Blob
	Offset uint32
	Length uint32 // sealed
	Plain  uint32 // plaintext; 0 if the blob is not compressed
}

// Compressed reports whether the blob is stored compressed.
func (b PackedBlob) Compressed() bool { return b.Plain != 0 }

// PlainLength returns the length of the blob's plaintext.
func (b PackedBlob) PlainLength() uint32 {
	if b.Plain != 0 {
		return b.Plain
	}
	return b.Length - crypt.Overhead
}

// validate checks what an index or a header says of a blob.
func (b PackedBlob) validate() error {
	limit := uint32(maxDataBlob)
	if b.Kind == backup.TreeBlob {
		limit = maxTreeBlob
	}
	switch {
	case b.Length < crypt.Overhead:
		return fmt.Errorf("%s has %d bytes, fewer than a seal: %w", b.Blob, b.Length, ErrDamaged)
	case b.PlainLength() > limit || b.Length-crypt.Overhead > limit+limit/64+1024:
		return fmt.Errorf("%s claims %d bytes, too many: %w", b.Blob, b.PlainLength(), ErrDamaged)
	case uint64(b.Offset)+uint64(b.Length) > 1<<32-1:
		return fmt.Errorf("%s ends beyond 4 GiB: %w", b.Blob, ErrDamaged)
	}
	return nil
}

// Sizes of pack header entries, and the length field at the end of a pack.
const (
	plainEntry      = 1 + 4 + backup.IDSize
	compressedEntry = plainEntry + 4
	headerLength    = 4

	maxHeader = 64 << 20
	// compressedBit is set in the type byte of a compressed blob.
	compressedBit = 2
)

// appendHeader appends the plaintext of the header for blobs that stand one
// after the other from the pack's start.
func appendHeader(dst []byte, blobs []PackedBlob) []byte {
	for _, b := range blobs {
		t := byte(b.Kind)
		if b.Compressed() {
			t |= compressedBit
		}
		dst = append(dst, t)
		dst = binary.LittleEndian.AppendUint32(dst, b.Length)
		if b.Compressed() {
			dst = binary.LittleEndian.AppendUint32(dst, b.Plain)
		}
		dst = append(dst, b.ID[:]...)
	}
	return dst
}

// DecodeHeader parses the plaintext of a pack header. Blobs get offsets one
// after the other.
func DecodeHeader(plain []byte) ([]PackedBlob, error) {
	var blobs []PackedBlob
	offset := uint64(0)
	for len(plain) > 0 {
		t := plain[0]
		size := plainEntry
		if t&compressedBit != 0 {
			size = compressedEntry
		}
		if t > compressedBit|byte(backup.TreeBlob) || len(plain) < size {
			return nil, fmt.Errorf("pack header: entry %d is of type %d with %d bytes left: %w", len(blobs), t, len(plain), ErrDamaged)
		}
		b := PackedBlob{
			Blob:   backup.Blob{Kind: backup.BlobKind(t &^ compressedBit), ID: backup.ID(plain[size-backup.IDSize : size])},
			Offset: uint32(offset),
			Length: binary.LittleEndian.Uint32(plain[1:]),
		}
		if t&compressedBit != 0 {
			if b.Plain = binary.LittleEndian.Uint32(plain[5:]); b.Plain == 0 {
				return nil, fmt.Errorf("pack header: %s is compressed from nothing: %w", b.Blob, ErrDamaged)
			}
		}
		if err := b.validate(); err != nil {
			return nil, fmt.Errorf("pack header: %w", err)
		}
		if offset += uint64(b.Length); offset > 1<<32-1 {
			return nil, fmt.Errorf("pack header: blobs beyond 4 GiB: %w", ErrDamaged)
		}
		blobs = append(blobs, b)
		plain = plain[size:]
	}
	return blobs, nil
}

// PackSize returns the bytes of a pack that holds just blobs, one after the
// other, or 0 where they overlap or leave gaps. They are sorted by offset.
func PackSize(blobs []PackedBlob) int64 {
	end, header := int64(0), int64(0)
	for _, b := range blobs {
		if int64(b.Offset) != end {
			return 0
		}
		end += int64(b.Length)
		header += plainEntry
		if b.Compressed() {
			header += compressedEntry - plainEntry
		}
	}
	return end + header + crypt.Overhead + headerLength
}

// ReadHeader returns the blobs that a pack's own header names; size is the
// pack file's length. The header is verified, the blobs are not.
func (r *Repo) ReadHeader(ctx context.Context, pack backup.ID, size int64) ([]PackedBlob, error) {
	k := backend.Key{Kind: backend.Packs, ID: pack}
	// One read is enough for most headers.
	guess := min(size, 64<<10)
	tail, err := r.be.Get(ctx, k, size-guess, guess)
	var n int64
	if err == nil {
		n, err = headerSize(tail, size)
	}
	if err == nil && n+headerLength > guess {
		tail, err = r.be.Get(ctx, k, size-n-headerLength, n+headerLength)
	}
	var blobs []PackedBlob
	if err == nil {
		blobs, err = r.openHeader(tail, n, size)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, fmt.Errorf("header of %s: %w", k, err)
	}
	return blobs, nil
}

// headerSize returns the length of the sealed header of a pack of size bytes
// that ends in tail.
func headerSize(tail []byte, size int64) (int64, error) {
	if size < headerLength+crypt.Overhead {
		return 0, fmt.Errorf("the pack has only %d bytes: %w", size, ErrDamaged)
	}
	n := int64(binary.LittleEndian.Uint32(tail[len(tail)-headerLength:]))
	if n < crypt.Overhead || n > maxHeader || n > size-headerLength {
		return 0, fmt.Errorf("it claims %d bytes: %w", n, ErrDamaged)
	}
	return n, nil
}

// openHeader returns the blobs that the sealed header of n bytes at the end of
// tail names.
func (r *Repo) openHeader(tail []byte, n, size int64) ([]PackedBlob, error) {
	plain, err := r.key.Open(nil, tail[int64(len(tail))-headerLength-n:len(tail)-headerLength])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	blobs, err := DecodeHeader(plain)
	if err != nil {
		return nil, err
	}
	end := int64(0)
	if len(blobs) > 0 {
		last := blobs[len(blobs)-1]
		end = int64(last.Offset) + int64(last.Length)
	}
	if end != size-headerLength-n {
		return nil, fmt.Errorf("its blobs end at %d instead of %d: %w", end, size-headerLength-n, ErrDamaged)
	}
	return blobs, nil
}

// verifyPiece is about how many bytes VerifyPack reads at once.
const verifyPiece = 2 << 20

// VerifyPack reads a whole pack and verifies every byte: that it hashes to its
// name, its header, and each blob that the header or indexed names. indexed is
// what the index says of the pack, sorted by offset; that the header agrees is
// verified too. fn is called for each blob, in order of offsets, with what is
// wrong with it. The result is what is wrong with the pack as a whole; several
// errors may be joined. What can't be read in one piece is tried blob by blob.
func (r *Repo) VerifyPack(ctx context.Context, pack backup.ID, size int64, indexed []PackedBlob, fn func(b PackedBlob, err error)) error {
	k := backend.Key{Kind: backend.Packs, ID: pack}
	hash := sha256.New()
	var problems error
	fail := func(err error) { problems = errors.Join(problems, err) }

	end := int64(0) // of what was verified
	if PackSize(indexed) == size {
		// The layout is likely as it should be: one pass is enough.
		var err error
		if end, err = r.verifyBlobs(ctx, k, indexed, hash, fn); err != nil {
			fail(err)
		}
	}
	for off := end; off < size && ctx.Err() == nil; off += verifyPiece {
		piece, err := r.be.Get(ctx, k, off, min(verifyPiece, size-off))
		if err != nil {
			fail(err)
			break
		}
		hash.Write(piece)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if got := backup.ID(hash.Sum(nil)); problems == nil && got != pack {
		fail(fmt.Errorf("%s: its contents have the hash %s: %w", k, got.Short(), ErrDamaged))
	}
	named, err := r.ReadHeader(ctx, pack, size)
	blobs := named
	switch {
	case err != nil:
		fail(err)
		blobs = indexed
	case slices.Equal(named, indexed), containsAll(named, indexed):
	default:
		fail(fmt.Errorf("%s: its header and the index do not agree: %w", k, ErrDamaged))
		blobs = mergeBlobs(named, indexed)
	}
	if end > 0 {
		if slices.Equal(blobs, indexed) {
			return problems
		}
		blobs = slices.DeleteFunc(slices.Clone(blobs), func(b PackedBlob) bool { return slices.Contains(indexed, b) })
	}
	err = r.ReadBlobs(ctx, pack, blobs, func(b PackedBlob, _ []byte, err error) error {
		fn(b, err)
		return nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(problems, err)
}

// verifyBlobs verifies blobs that stand one after the other from the start of
// a pack, and hashes them on the way. It returns where they end.
func (r *Repo) verifyBlobs(ctx context.Context, k backend.Key, blobs []PackedBlob, hash io.Writer, fn func(b PackedBlob, err error)) (end int64, problem error) {
	var scratch []byte
	for len(blobs) > 0 {
		start := end
		n := 0
		for n < len(blobs) && end-start < verifyPiece {
			end += int64(blobs[n].Length)
			n++
		}
		buf, err := r.be.Get(ctx, k, start, end-start)
		switch {
		case ctx.Err() != nil:
			return end, ctx.Err()
		case err != nil:
			if problem == nil {
				problem = err
			}
			err = r.ReadBlobs(ctx, k.ID, blobs[:n], func(b PackedBlob, _ []byte, err error) error {
				fn(b, err)
				return nil
			})
			if err != nil {
				return end, err
			}
		default:
			hash.Write(buf)
			at := int64(0)
			for _, b := range blobs[:n] {
				if b.Compressed() && cap(scratch) < int(b.Plain) {
					scratch = make([]byte, 0, b.Plain)
				}
				_, err := r.open(b, buf[at:at+int64(b.Length)], scratch)
				if err != nil {
					err = fmt.Errorf("%s: %w", k, err)
				}
				fn(b, err)
				at += int64(b.Length)
			}
		}
		blobs = blobs[n:]
	}
	return end, problem
}

// containsAll reports whether all holds each of some. Both are sorted by
// offset.
func containsAll(all, some []PackedBlob) bool {
	for _, b := range some {
		for len(all) > 0 && all[0].Offset < b.Offset {
			all = all[1:]
		}
		if !slices.Contains(all[:min(len(all), 4)], b) {
			return false
		}
	}
	return true
}

// mergeBlobs returns what either list holds, sorted by offset.
func mergeBlobs(a, b []PackedBlob) []PackedBlob {
	have := make(map[PackedBlob]bool, len(a))
	for _, x := range a {
		have[x] = true
	}
	out := slices.Clone(a)
	for _, x := range b {
		if !have[x] {
			have[x] = true
			out = append(out, x)
		}
	}
	slices.SortStableFunc(out, func(x, y PackedBlob) int { return cmp.Compare(x.Offset, y.Offset) })
	return out
}

// open returns the verified plaintext of a sealed blob. It uses the memory of
// sealed, and that of dst where it is large enough.
func (r *Repo) open(b PackedBlob, sealed, dst []byte) ([]byte, error) {
	_, plain, err := r.unseal(b, sealed, dst)
	return plain, err
}

// unseal is open that also returns the blob as it is packed: the plaintext or
// what that was compressed to.
func (r *Repo) unseal(b PackedBlob, sealed, dst []byte) (packed, plain []byte, err error) {
	packed, err = r.key.OpenInPlace(sealed)
	plain = packed
	if err == nil && b.Compressed() {
		plain, err = r.zip.decompress(dst, packed, int(b.Plain))
	}
	if err == nil && backup.Hash(plain) != b.ID {
		err = errors.New("its contents have another hash")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w: %w", b.Blob, ErrDamaged, err)
	}
	return packed, plain, nil
}

// Blob returns a blob's plaintext, verified against its ID. Where a blob is
// stored more than once, an intact copy is enough.
func (r *Repo) Blob(ctx context.Context, kind backup.BlobKind, id backup.ID) ([]byte, error) {
	b := backup.Blob{Kind: kind, ID: id}
	err := fmt.Errorf("read %s: %w", b, ErrNoBlob)
	for loc := range r.Index().Lookup(b) {
		sealed, getErr := r.be.Get(ctx, backend.Key{Kind: backend.Packs, ID: loc.Pack}, int64(loc.Offset), int64(loc.Length))
		if getErr != nil {
			err = fmt.Errorf("read %s: %w", b, getErr)
			continue
		}
		plain, openErr := r.open(loc.PackedBlob, sealed, nil)
		if openErr == nil {
			return plain, nil
		}
		err = fmt.Errorf("read pack %s: %w", loc.Pack.Short(), openErr)
	}
	return nil, err
}

// Tree returns the tree with the given ID.
func (r *Repo) Tree(ctx context.Context, id backup.ID) (*backup.Tree, error) {
	data, err := r.Blob(ctx, backup.TreeBlob, id)
	if err != nil {
		return nil, err
	}
	t, err := backup.DecodeTree(data)
	if err != nil {
		return nil, fmt.Errorf("tree %s: %w", id.Short(), err)
	}
	return t, nil
}

// Bounds of the reads of ReadBlobs: gaps up to maxGap are read through rather
// than skipped, and one read gets no more than maxRead.
const (
	maxGap  = 256 << 10
	maxRead = 8 << 20
)

// ReadBlobs reads blobs of one pack, which must be sorted by offset, in as few
// and as large reads as memory allows, and calls fn for each in order with its
// verified plaintext or with what is wrong with it. The plaintext is valid
// only until fn returns. An error of fn ends the walk and is returned; so does
// a cancelled context.
func (r *Repo) ReadBlobs(ctx context.Context, pack backup.ID, blobs []PackedBlob, fn func(b PackedBlob, plain []byte, err error) error) error {
	return r.readBlobs(ctx, pack, blobs, func(b PackedBlob, _, plain []byte, err error) error { return fn(b, plain, err) })
}

// readBlobs is ReadBlobs that also gives each blob as it is packed.
func (r *Repo) readBlobs(ctx context.Context, pack backup.ID, blobs []PackedBlob, fn func(b PackedBlob, packed, plain []byte, err error) error) error {
	var scratch []byte
	return r.readSealed(ctx, pack, blobs, maxRead, func(b PackedBlob, sealed []byte, err error) error {
		var packed, plain []byte
		if err == nil {
			if b.Compressed() && cap(scratch) < int(b.Plain) {
				scratch = make([]byte, 0, b.Plain)
			}
			if packed, plain, err = r.unseal(b, sealed, scratch); err != nil {
				err = fmt.Errorf("read pack %s: %w", pack.Short(), err)
			}
		}
		return fn(b, packed, plain, err)
	})
}

// readSealed is ReadBlobs without opening the blobs. One read gets up to limit
// bytes, or one blob. fn may change sealed.
func (r *Repo) readSealed(ctx context.Context, pack backup.ID, blobs []PackedBlob, limit uint64, fn func(b PackedBlob, sealed []byte, err error) error) error {
	k := backend.Key{Kind: backend.Packs, ID: pack}
	for len(blobs) > 0 {
		start := uint64(blobs[0].Offset)
		end := start + uint64(blobs[0].Length)
		n := 1
		for n < len(blobs) {
			off := uint64(blobs[n].Offset)
			if next := off + uint64(blobs[n].Length); off < end || off-end > maxGap || next-start > limit {
				break
			} else {
				end = next
			}
			n++
		}
		buf, err := r.be.Get(ctx, k, int64(start), int64(end-start))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && n > 1 {
			// The pack may be cut in the middle: save what is before it.
			for i := range n {
				if err := r.readSealed(ctx, pack, blobs[i:i+1], limit, fn); err != nil {
					return err
				}
			}
			blobs = blobs[n:]
			continue
		}
		for _, b := range blobs[:n] {
			var sealed []byte
			if err == nil {
				at := uint64(b.Offset) - start
				sealed = buf[at : at+uint64(b.Length)]
			}
			if err := fn(b, sealed, err); err != nil {
				return err
			}
		}
		blobs = blobs[n:]
	}
	return nil
}
