package chunk

import "github.com/restic/chunker"

const (
	// MinSize is the least length of a chunk in bytes; only the last chunk of
	// an input can be shorter.
	MinSize = 512 << 10
	// MaxSize is the greatest length of a chunk in bytes.
	MaxSize = 8 << 20

	windowSize = 64
	splitBits  = 20 // a cut every 2^20 bytes on average, beyond MinSize

	// A block of lanes*stride positions is searched by lanes fingerprints at
	// once. A longer stride spends less on filling the windows at its start, a
	// shorter one less on positions beyond the cut. It is no power of two, so
	// that the lanes do not compete for the same sets of the cache.
	lanes     = 5
	stride    = 3264
	blockSize = lanes * stride

	// How far a fingerprint of the usual degree is from the top of its word,
	// and what is zero there at a cut.
	align   = 64 - maxDegree
	cutMask = (1<<splitBits - 1) << align
)

// Tables holds what a polynomial's fingerprints are computed with, 4 KiB. It
// never changes, so that all goroutines of a run can share one.
//
// Fingerprints are kept at the top of a 64-bit word, that is, multiplied by
// x^(64-degree): then the eight bits that one more byte pushes out are the
// highest of the word, whatever the degree is.
type Tables struct {
	mod   [256]uint64 // by the eight highest bits: what they leave behind on their way out
	out   [256]uint64 // by a byte: its share in the fingerprint once it has left the window
	shift uint        // 64 - degree of the polynomial
}

// NewTables returns the tables of pol, or an ErrPolynomial if it is reducible
// or its degree is not between 8 and 53. It takes some milliseconds: build one
// for a repository, not for a file.
func NewTables(pol Pol) (*Tables, error) {
	if err := pol.validate(); err != nil {
		return nil, err
	}
	t := &Tables{shift: uint(64 - pol.degree())}
	for b := range 256 {
		// The remainder of b(x)*x^degree, then of b(x)*x^(8*windowSize).
		p := chunker.Pol(pol)
		t.mod[b] = uint64((chunker.Pol(b) << pol.degree()).Mod(p)) << t.shift
		h := chunker.Pol(b).Mod(p)
		for range windowSize {
			h = (h << 8).Mod(p)
		}
		t.out[b] = uint64(h) << t.shift
	}
	return t, nil
}

// Cut returns the length n of the first chunk of buf. With ok, the chunk is
// complete: it ends at n whatever follows. Without ok, buf has no cut point and
// n is len(buf): this is the last chunk if the input ends here; otherwise, call
// again with more of it. Bytes beyond the first MaxSize are not looked at. Cut
// neither allocates nor keeps anything.
func (t *Tables) Cut(buf []byte) (n int, ok bool) { return t.cutFrom(buf, MinSize) }

// cutFrom is Cut for a buf that is known to have no cut point below from.
func (t *Tables) cutFrom(buf []byte, from int) (n int, ok bool) {
	limit := min(len(buf), MaxSize)
	n = max(from, MinSize)
	if t.shift == align {
		for ; n+blockSize-1 <= limit; n += blockSize {
			if cut := t.searchBlock((*[windowSize + blockSize]byte)(buf[n-1-windowSize:])); cut > 0 {
				return n - 1 + cut, true
			}
		}
	}
	if cut := t.search(buf, n, limit); cut > 0 {
		return cut, true
	}
	return limit, limit == MaxSize
}

// search returns the least n from first up to and including last for which the
// window that ends at buf[n] calls for a cut, or 0. first is at least windowSize.
func (t *Tables) search(buf []byte, first, last int) int {
	if first > last {
		return 0
	}
	shift := t.shift & 63
	mask := uint64(1<<splitBits-1) << shift
	leaving := buf[first-windowSize : last-windowSize]
	var f uint64
	for _, b := range buf[first-windowSize : first] {
		f = f<<8 ^ uint64(b)<<shift ^ t.mod[f>>56]
	}
	if f&mask == 0 {
		return first
	}
	entering := buf[first:last][:len(leaving)]
	for i, b := range leaving {
		f = f<<8 ^ uint64(entering[i])<<shift ^ t.out[b] ^ t.mod[f>>56]
		if f&mask == 0 {
			return first + i + 1
		}
	}
	return 0
}

// searchBlock is search for the positions 1 to blockSize after the first window
// of p, and for a polynomial of degree 53.
func (t *Tables) searchBlock(p *[windowSize + blockSize]byte) int {
	cut := t.searchLanes(p)
	if cut <= 0 {
		return 0
	}
	// That was the first hit in time. The lanes before it may still have one
	// further on, which is the earlier in the input.
	lane, done := (cut-1)/stride, (cut-1)%stride+1
	for l := range lane {
		if earlier := t.search(p[:], windowSize+l*stride+done+1, windowSize+(l+1)*stride); earlier > 0 {
			return earlier - windowSize
		}
	}
	return cut
}

// searchLanes searches all lanes at the same pace. It returns a position, as
// searchBlock does, at which a lane hit after as many steps as no earlier lane
// and with fewer steps no lane at all has hit, or 0.
func (t *Tables) searchLanes(p *[windowSize + blockSize]byte) int {
	_, _ = t.mod[0], p[0] // check both for nil here and not in the loops
	var f0, f1, f2, f3, f4 uint64
	for i := range windowSize {
		f0 = t.enter(f0, p[i])
		f1 = t.enter(f1, p[i+stride])
		f2 = t.enter(f2, p[i+2*stride])
		f3 = t.enter(f3, p[i+3*stride])
		f4 = t.enter(f4, p[i+4*stride])
	}
	for i := 0; i < stride; i += 2 { // two steps at a time spare moves between registers
		f0 = t.roll(f0, p[i], p[i+windowSize])
		if f0&cutMask == 0 {
			return i + 1
		}
		f1 = t.roll(f1, p[i+stride], p[i+stride+windowSize])
		if f1&cutMask == 0 {
			return i + stride + 1
		}
		f2 = t.roll(f2, p[i+2*stride], p[i+2*stride+windowSize])
		if f2&cutMask == 0 {
			return i + 2*stride + 1
		}
		f3 = t.roll(f3, p[i+3*stride], p[i+3*stride+windowSize])
		if f3&cutMask == 0 {
			return i + 3*stride + 1
		}
		f4 = t.roll(f4, p[i+4*stride], p[i+4*stride+windowSize])
		if f4&cutMask == 0 {
			return i + 4*stride + 1
		}
		f0 = t.roll(f0, p[i+1], p[i+1+windowSize])
		if f0&cutMask == 0 {
			return i + 2
		}
		f1 = t.roll(f1, p[i+stride+1], p[i+stride+1+windowSize])
		if f1&cutMask == 0 {
			return i + stride + 2
		}
		f2 = t.roll(f2, p[i+2*stride+1], p[i+2*stride+1+windowSize])
		if f2&cutMask == 0 {
			return i + 2*stride + 2
		}
		f3 = t.roll(f3, p[i+3*stride+1], p[i+3*stride+1+windowSize])
		if f3&cutMask == 0 {
			return i + 3*stride + 2
		}
		f4 = t.roll(f4, p[i+4*stride+1], p[i+4*stride+1+windowSize])
		if f4&cutMask == 0 {
			return i + 4*stride + 2
		}
	}
	return 0
}

// enter returns the fingerprint f of degree 53 after one more byte.
func (t *Tables) enter(f uint64, in byte) uint64 {
	return f<<8 ^ uint64(in)<<align ^ t.mod[f>>56]
}

// roll returns the fingerprint f of degree 53 of a full window, moved by one
// byte. The look-up that depends on f comes last, since the next step waits for
// it.
func (t *Tables) roll(f uint64, leaving, entering byte) uint64 {
	return (f<<8 ^ uint64(entering)<<align ^ t.out[leaving]) ^ t.mod[f>>56]
}
