package repo

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/iot49/ide49-backup/backup"
)

// A Compression is how much time is spent to make blobs small. The zero value
// is Auto.
type Compression uint8

// The compressions, from cheap to thorough.
const (
	Auto    Compression = iota // zstd level 1 with all literals coded; see below
	Off                        // data blobs as they are; trees and files still compressed
	Fastest                    // zstd level 1
	Better                     // about zstd level 7
	Max                        // about zstd level 11
)

var compressionNames = [...]string{"auto", "off", "fastest", "better", "max"}

// String returns the name that ParseCompression reads.
func (c Compression) String() string {
	if int(c) < len(compressionNames) {
		return compressionNames[c]
	}
	return fmt.Sprintf("Compression(%d)", uint8(c))
}

// ParseCompression reads auto, off, fastest, better or max.
func ParseCompression(s string) (Compression, error) {
	for i, name := range compressionNames {
		if s == name {
			return Compression(i), nil
		}
	}
	return 0, fmt.Errorf("unknown compression %q: use auto, fastest, better, max or off", s)
}

// A compressor holds encoders and decoders, which are costly to make. It is
// safe for concurrent use; each call runs in its caller.
type compressor struct {
	level  Compression
	encode *zstd.Encoder
	decode *zstd.Decoder
}

func newCompressor(level Compression) *compressor {
	// Auto is made for small devices. Level 1 takes about half the time of
	// level 3, which restic uses. Coding all literals makes up for most of
	// the difference in size on source code and logs, and on files of a few
	// KiB it is far ahead of both.
	options := map[Compression][]zstd.EOption{
		Auto:    {zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithAllLitEntropyCompression(true)},
		Off:     {zstd.WithEncoderLevel(zstd.SpeedFastest)},
		Fastest: {zstd.WithEncoderLevel(zstd.SpeedFastest)},
		Better:  {zstd.WithEncoderLevel(zstd.SpeedBetterCompression)},
		Max:     {zstd.WithEncoderLevel(zstd.SpeedBestCompression)},
	}[level]
	// No checksum: blobs carry a MAC and a hash.
	options = append(options, zstd.WithEncoderConcurrency(workers()), zstd.WithEncoderCRC(false), zstd.WithLowerEncoderMem(true))
	c := &compressor{level: level}
	var err error
	if c.encode, err = zstd.NewWriter(nil, options...); err == nil {
		c.decode, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(workers()), zstd.WithDecoderLowmem(true),
			zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(maxFile))
	}
	if err != nil {
		panic(err) // the options are constants
	}
	return c
}

// Of a large blob, probeSize bytes from its middle are compressed first; what
// does not shrink there by at least a 64th is stored as it is.
const (
	probeSize    = 16 << 10
	probeMinBlob = 4 * probeSize
)

// compress appends the compressed form of plain to dst and reports true, or
// appends nothing and reports false where plain is better stored as it is.
// Tree blobs are always compressed, as the format wants it.
func (c *compressor) compress(dst []byte, kind backup.BlobKind, plain []byte) ([]byte, bool) {
	start := len(dst)
	if kind == backup.TreeBlob {
		return c.encode.EncodeAll(plain, dst), true
	}
	if c.level == Off || len(plain) == 0 {
		return dst, false
	}
	if c.level == Auto && len(plain) >= probeMinBlob {
		middle := (len(plain) - probeSize) / 2
		out := c.encode.EncodeAll(plain[middle:middle+probeSize], dst)
		if len(out)-start > probeSize-probeSize/64 {
			return out[:start], false
		}
		dst = out[:start]
	}
	out := c.encode.EncodeAll(plain, dst)
	if len(out)-start >= len(plain) {
		return out[:start], false
	}
	return out, true
}

// decompress returns the plaintext of a compressed blob, which must have size
// bytes.
func (c *compressor) decompress(dst, packed []byte, size int) ([]byte, error) {
	if cap(dst) < size {
		dst = make([]byte, 0, size)
	}
	plain, err := c.decode.DecodeAll(packed, dst[:0:size])
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(plain) != size {
		return nil, fmt.Errorf("decompress: %d bytes instead of %d", len(plain), size)
	}
	return plain, nil
}

func (c *compressor) compressFile(dst, plain []byte) []byte { return c.encode.EncodeAll(plain, dst) }

// decompressFile decompresses a file whose size is not known beforehand. Its
// memory is bounded by the size that the frame claims, which is bounded.
func (c *compressor) decompressFile(packed []byte) ([]byte, error) {
	var h zstd.Header
	if err := h.Decode(packed); err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	size := uint64(0)
	if h.HasFCS {
		size = h.FrameContentSize
	} else {
		size = 64 * uint64(len(packed)) // no encoder of ours or restic's leaves it out
	}
	if size > maxFile {
		return nil, errors.New("decompress: the file claims to be too large")
	}
	plain, err := c.decode.DecodeAll(packed, make([]byte, 0, size))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	return plain, nil
}
