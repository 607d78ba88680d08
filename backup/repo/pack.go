package repo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

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

// ReadHeader returns the blobs that a pack's own header names; size is the
// pack file's length. The header is verified, the blobs are not.
func (r *Repo) ReadHeader(ctx context.Context, pack backup.ID, size int64) ([]PackedBlob, error) {
	k := backend.Key{Kind: backend.Packs, ID: pack}
	damaged := func(err error) error {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return fmt.Errorf("header of %s: %w", k, err)
	}
	if size < headerLength+crypt.Overhead {
		return nil, damaged(fmt.Errorf("the pack has only %d bytes: %w", size, ErrDamaged))
	}
	// One read is enough for most headers.
	guess := min(size, 64<<10)
	tail, err := r.be.Get(ctx, k, size-guess, guess)
	if err != nil {
		return nil, damaged(err)
	}
	n := int64(binary.LittleEndian.Uint32(tail[len(tail)-headerLength:]))
	if n < crypt.Overhead || n > maxHeader || n > size-headerLength {
		return nil, damaged(fmt.Errorf("it claims %d bytes: %w", n, ErrDamaged))
	}
	if n+headerLength > guess {
		if tail, err = r.be.Get(ctx, k, size-n-headerLength, n+headerLength); err != nil {
			return nil, damaged(err)
		}
	}
	sealed := tail[int64(len(tail))-headerLength-n : len(tail)-headerLength]
	plain, err := r.key.Open(nil, sealed)
	if err != nil {
		return nil, damaged(fmt.Errorf("%w: %w", ErrDamaged, err))
	}
	blobs, err := DecodeHeader(plain)
	if err != nil {
		return nil, damaged(err)
	}
	end := int64(0)
	if len(blobs) > 0 {
		last := blobs[len(blobs)-1]
		end = int64(last.Offset) + int64(last.Length)
	}
	if end != size-headerLength-n {
		return nil, damaged(fmt.Errorf("its blobs end at %d instead of %d: %w", end, size-headerLength-n, ErrDamaged))
	}
	return blobs, nil
}

// open returns the verified plaintext of a sealed blob. It uses the memory of
// sealed, and that of dst where it is large enough.
func (r *Repo) open(b PackedBlob, sealed, dst []byte) ([]byte, error) {
	plain, err := r.key.OpenInPlace(sealed)
	if err == nil && b.Compressed() {
		plain, err = r.zip.decompress(dst, plain, int(b.Plain))
	}
	if err == nil && backup.Hash(plain) != b.ID {
		err = errors.New("its contents have another hash")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", b.Blob, ErrDamaged, err)
	}
	return plain, nil
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
	k := backend.Key{Kind: backend.Packs, ID: pack}
	var scratch []byte
	for len(blobs) > 0 {
		start := uint64(blobs[0].Offset)
		end := start + uint64(blobs[0].Length)
		n := 1
		for n < len(blobs) {
			off := uint64(blobs[n].Offset)
			if next := off + uint64(blobs[n].Length); off < end || off-end > maxGap || next-start > maxRead {
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
				if err := r.ReadBlobs(ctx, pack, blobs[i:i+1], fn); err != nil {
					return err
				}
			}
			blobs = blobs[n:]
			continue
		}
		for _, b := range blobs[:n] {
			var plain []byte
			blobErr := err
			if err == nil {
				at := uint64(b.Offset) - start
				if b.Compressed() && cap(scratch) < int(b.Plain) {
					scratch = make([]byte, 0, b.Plain)
				}
				if plain, blobErr = r.open(b, buf[at:at+uint64(b.Length)], scratch); blobErr != nil {
					blobErr = fmt.Errorf("read %s: %w", k, blobErr)
				}
			}
			if err := fn(b, plain, blobErr); err != nil {
				return err
			}
		}
		blobs = blobs[n:]
	}
	return nil
}
