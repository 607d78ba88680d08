package chunk_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/restic/chunker"

	"github.com/iot49/ide49-backup/backup/chunk"
)

const (
	// testPol is the polynomial that most tests use.
	testPol chunk.Pol = 0x3da3358b4dc173

	kib = 1 << 10
	mib = 1 << 20
)

func newTables(tb testing.TB, pol chunk.Pol) *chunk.Tables {
	tb.Helper()
	t, err := chunk.NewTables(pol)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func random(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func repeat(pattern []byte, n int) []byte {
	return bytes.Repeat(pattern, n/len(pattern)+1)[:n]
}

// text returns n bytes of log lines.
func text(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	words := strings.Fields("mqtt client connected from port sensor temperature topic retained ping timeout closed")
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%010d: %s %s %d\n", 1700000000+i, words[r.IntN(len(words))], words[r.IntN(len(words))], r.IntN(100))
	}
	return b.Bytes()[:n]
}

// libraryEnds returns the ends of the chunks that the library cuts data into.
func libraryEnds(tb testing.TB, data []byte, pol chunk.Pol) []int {
	tb.Helper()
	c := chunker.New(bytes.NewReader(data), chunker.Pol(pol))
	var ends []int
	buf := make([]byte, min(len(data), chunk.MaxSize))
	for {
		got, err := c.Next(buf)
		if err == io.EOF {
			return ends
		}
		if err != nil {
			tb.Fatal(err)
		}
		ends = append(ends, int(got.Start+got.Length))
	}
}

// cutEnds returns the same by Cut.
func cutEnds(tb testing.TB, data []byte, t *chunk.Tables) []int {
	tb.Helper()
	var ends []int
	for end := 0; end < len(data); {
		n, ok := t.Cut(data[end:])
		if n <= 0 || !ok && end+n != len(data) {
			tb.Fatalf("Cut at %d of %d returned %d, %v", end, len(data), n, ok)
		}
		end += n
		ends = append(ends, end)
	}
	return ends
}

// readEnds returns the same by a Reader, and compares the chunks with data.
func readEnds(tb testing.TB, data []byte, r *chunk.Reader) []int {
	tb.Helper()
	buf := make([]byte, min(len(data)+1, chunk.MaxSize))
	var ends []int
	end := 0
	for {
		got, err := r.Next(buf)
		if err == io.EOF {
			if end != len(data) {
				tb.Fatalf("chunks hold %d bytes of %d", end, len(data))
			}
			return ends
		}
		if err != nil {
			tb.Fatal(err)
		}
		if len(got) == 0 || end+len(got) > len(data) || !bytes.Equal(got, data[end:end+len(got)]) {
			tb.Fatalf("chunk of %d bytes at %d is not what was read", len(got), end)
		}
		end += len(got)
		ends = append(ends, end)
	}
}

func checkEnds(tb testing.TB, data []byte, pol chunk.Pol, t *chunk.Tables) {
	tb.Helper()
	want := libraryEnds(tb, data, pol)
	if got := cutEnds(tb, data, t); !slices.Equal(got, want) {
		tb.Errorf("Cut ends chunks at %v, the library at %v", got, want)
	}
	if got := readEnds(tb, data, chunk.New(bytes.NewReader(data), t)); !slices.Equal(got, want) {
		tb.Errorf("Reader ends chunks at %v, the library at %v", got, want)
	}
}

func TestLibraryCutsTheSame(t *testing.T) {
	tables := newTables(t, testPol)
	zeroHoles := random(8*mib, 2)
	for i := 300 * kib; i < len(zeroHoles); i += 777 * kib {
		clear(zeroHoles[i : i+i%(70*kib)])
	}
	for name, data := range map[string][]byte{
		"empty":          nil,
		"random":         random(12*mib, 1),
		"zeros":          make([]byte, 3*mib+17),
		"ones":           repeat([]byte{0xff}, 8*mib+9),
		"period 3":       repeat([]byte("abc"), 8*mib+9),
		"period 64":      repeat(random(64, 3), 4*mib),
		"period 3264":    repeat(random(3264, 5), 4*mib),
		"period 700,001": repeat(random(700_001, 7), 4*mib),
		"text":           text(6 * mib),
		"zero holes":     zeroHoles,
	} {
		t.Run(name, func(t *testing.T) { checkEnds(t, data, testPol, tables) })
	}
}

func TestSizesAroundTheLimits(t *testing.T) {
	tables := newTables(t, testPol)
	// No window of one repeated byte ends a chunk, so only MaxSize does.
	uncut := repeat([]byte{1}, chunk.MaxSize+1)
	noise := random(2*mib, 8)
	for _, size := range []int{
		0, 1, 2, 63, 64, 65, 127, 128, 4095,
		511 * kib, chunk.MinSize - 65, chunk.MinSize - 64, chunk.MinSize - 63, chunk.MinSize - 1, chunk.MinSize,
		chunk.MinSize + 1, chunk.MinSize + 63, chunk.MinSize + 64, chunk.MinSize + 65,
		640*kib - 1, 640 * kib, 640*kib + 1, mib - 1, mib, mib + 1, 2 * mib,
	} {
		checkEnds(t, noise[:size], testPol, tables)
		checkEnds(t, make([]byte, size), testPol, tables)
	}
	for _, size := range []int{
		chunk.MaxSize - 1, chunk.MaxSize, chunk.MaxSize + 1,
	} {
		checkEnds(t, uncut[:size], testPol, tables)
		if n, ok := tables.Cut(uncut[:size]); n != min(size, chunk.MaxSize) || ok != (n == chunk.MaxSize) {
			t.Errorf("Cut of %d bytes returned %d, %v", size, n, ok)
		}
	}
}

// A window of zeros always calls for a cut, so a cut can be planted anywhere.
func TestPlantedCuts(t *testing.T) {
	tables := newTables(t, testPol)
	data := repeat([]byte{1}, chunk.MaxSize+1)
	plant := func(ends ...int) {
		for _, n := range ends {
			clear(data[n-64 : n])
		}
	}
	heal := func(ends ...int) {
		for _, n := range ends {
			copy(data[n-64:n], data[:64])
		}
	}
	check := func(want int) {
		t.Helper()
		if n, ok := tables.Cut(data); n != want || !ok {
			t.Fatalf("Cut returned %d, %v; want %d", n, ok, want)
		}
		// Where the input ends must make no difference to what is before.
		for _, size := range []int{want, want + 1} {
			if n, ok := tables.Cut(data[:size]); n != want || !ok {
				t.Fatalf("Cut of %d bytes returned %d, %v; want %d", size, n, ok, want)
			}
		}
		if n, ok := tables.Cut(data[:want-1]); n != want-1 || ok {
			t.Fatalf("Cut of %d bytes, one short of the cut, returned %d, %v", want-1, n, ok)
		}
	}

	// All over the first two blocks, and near the edges of their lanes.
	for n := chunk.MinSize; n < chunk.MinSize+34_000; n += 101 {
		plant(n)
		check(n)
		heal(n)
	}
	for lane := range 11 {
		for _, d := range []int{-65, -64, -63, -2, -1, 0, 1, 2, 62, 63, 64, 65} {
			if n := chunk.MinSize + lane*3264 + d; n >= chunk.MinSize {
				plant(n)
				check(n)
				heal(n)
			}
		}
	}
	for _, n := range []int{chunk.MaxSize - 1} {
		plant(n)
		check(n)
		heal(n)
	}
	// Several at once, in any order of time in the lanes: the earliest counts.
	r := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		ends := make([]int, 2+r.IntN(6))
		for i := range ends {
			ends[i] = chunk.MinSize + r.IntN(34_000)
		}
		plant(ends...)
		check(slices.Min(ends))
		heal(ends...)
	}
	// One too early to count.
	plant(chunk.MinSize-1, chunk.MinSize+5000)
	check(chunk.MinSize + 5000)
}

func TestRandomPolynomials(t *testing.T) {
	data := random(4*mib, 9)
	for range 5 {
		pol, err := chunk.Random()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("polynomial %v", pol)
		checkEnds(t, data, pol, newTables(t, pol))
	}
}

// irreducible returns an irreducible polynomial of a degree.
func irreducible(degree int) chunk.Pol {
	for p := chunker.Pol(1)<<degree | 1; ; p += 2 {
		if p.Irreducible() {
			return chunk.Pol(p)
		}
	}
}

func TestOtherDegrees(t *testing.T) {
	data := append(random(2*mib, 10), text(mib)...)
	for _, degree := range []int{8, 9, 19, 20, 21, 31, 32, 33, 45, 52} {
		pol := irreducible(degree)
		checkEnds(t, data, pol, newTables(t, pol))
	}
}

func TestPolynomials(t *testing.T) {
	for _, text := range []string{"", "0x3da3358b4dc173", "-1", "+1", "3da3_358b", "g", "10000000000000000", strings.Repeat("9", 1000)} {
		if p, err := chunk.ParsePol(text); !errors.Is(err, chunk.ErrPolynomial) {
			t.Errorf("ParsePol(%.20q) = %v, %v", text, p, err)
		} else if len(err.Error()) > 120 {
			t.Errorf("error of %d bytes", len(err.Error()))
		}
	}
	for _, text := range []string{"0", "1", "ff", "3da3358b4dc172", "7da3358b4dc173", "ffffffffffffffff", "8000000000000001"} {
		p, err := chunk.ParsePol(text)
		if err != nil || p.String() != text {
			t.Errorf("ParsePol(%q) = %v, %v", text, p, err)
		}
		if _, err := chunk.NewTables(p); !errors.Is(err, chunk.ErrPolynomial) {
			t.Errorf("NewTables(%v): %v", p, err)
		}
	}
	p, err := chunk.ParsePol("3DA3358B4dc173")
	if p != testPol || err != nil || p.String() != "3da3358b4dc173" {
		t.Errorf("ParsePol = %v, %v", p, err)
	}
}

// emptyReads is a reader that returns 0, nil between its reads.
type emptyReads struct {
	io.Reader
	n int
}

func (r *emptyReads) Read(p []byte) (int, error) {
	if r.n++; r.n%3 != 0 {
		return 0, nil
	}
	return r.Reader.Read(p)
}

// uneven is a reader of reads of any lengths.
type uneven struct {
	io.Reader
	rand *rand.Rand
}

func (r *uneven) Read(p []byte) (int, error) {
	return r.Reader.Read(p[:min(len(p), 1+r.rand.IntN(200*kib))])
}

func TestReaders(t *testing.T) {
	tables := newTables(t, testPol)
	whole := random(5*mib, 11)
	r := chunk.New(nil, tables)
	for name, wrap := range map[string]func(io.Reader) io.Reader{
		"plain":         func(r io.Reader) io.Reader { return r },
		"half":          iotest.HalfReader,
		"one byte":      iotest.OneByteReader,
		"data with EOF": iotest.DataErrReader,
		"empty reads":   func(r io.Reader) io.Reader { return &emptyReads{Reader: r} },
		"uneven":        func(r io.Reader) io.Reader { return &uneven{r, rand.New(rand.NewPCG(5, 6))} },
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{0, 1, 4095, 4096, chunk.MinSize - 1, chunk.MinSize, 640 * kib, 640*kib + 1, len(whole)} {
				data := whole[:size]
				want := libraryEnds(t, data, testPol)
				r.Reset(wrap(bytes.NewReader(data)))
				if got := readEnds(t, data, r); !slices.Equal(got, want) {
					t.Errorf("%d bytes: chunks end at %v, the library's at %v", size, got, want)
				}
				if _, err := r.Next(nil); err != io.EOF {
					t.Errorf("after the end: %v", err)
				}
			}
		})
	}
}

// Next must do with any buffer, and must not touch a chunk it has handed out.
func TestBuffers(t *testing.T) {
	tables := newTables(t, testPol)
	data := random(3*mib, 12)
	want := libraryEnds(t, data, testPol)
	for _, size := range []int{0, 1, 100, 64 * kib, chunk.MinSize, chunk.MinSize + 1, 3 * mib, chunk.MaxSize, chunk.MaxSize + 5} {
		r := chunk.New(bytes.NewReader(data), tables)
		var chunks [][]byte
		for {
			c, err := r.Next(make([]byte, size))
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if cap(c) > max(size, chunk.MaxSize) {
				t.Errorf("a chunk has an array of %d bytes", cap(c))
			}
			chunks = append(chunks, c)
		}
		end := 0
		for i, c := range chunks {
			end += len(c)
			if end != want[i] {
				t.Fatalf("buffers of %d: chunk %d ends at %d, not %d", size, i, end, want[i])
			}
		}
		if !bytes.Equal(bytes.Join(chunks, nil), data) {
			t.Errorf("buffers of %d: the chunks are not the input", size)
		}
	}
	// A file of a known size fits a buffer of one byte more.
	buf := make([]byte, 0, 1001)
	got, err := chunk.New(bytes.NewReader(data[:1000]), tables).Next(buf)
	if err != nil || len(got) != 1000 || &got[0] != &buf[:1][0] {
		t.Errorf("chunk of %d bytes, %v, perhaps in another array", len(got), err)
	}
}

func TestReadErrors(t *testing.T) {
	tables := newTables(t, testPol)
	data := random(8*mib, 13)
	ends := libraryEnds(t, data, testPol)
	failure := errors.New("the drive is gone")
	for _, size := range []int{0, 1, chunk.MinSize - 1, chunk.MinSize, ends[0] - 1, ends[0], ends[0] + 1, ends[2] + 100} {
		for _, withData := range []bool{false, true} {
			src := io.MultiReader(bytes.NewReader(data[:size]), iotest.ErrReader(failure))
			if withData {
				src = iotest.DataErrReader(src)
			}
			r := chunk.New(src, tables)
			end := 0
			for {
				c, err := r.Next(nil)
				if err != nil {
					if err != failure || c != nil {
						t.Errorf("%d bytes: Next returned %d bytes, %v", size, len(c), err)
					}
					break
				}
				if end += len(c); !slices.Contains(ends, end) {
					t.Errorf("%d bytes: a chunk ends at %d", size, end)
				}
			}
			if next, found := slices.BinarySearch(ends, size); !found && next > 0 && end != ends[next-1] {
				t.Errorf("%d bytes: the last chunk ends at %d", size, end)
			}
			if _, err := r.Next(nil); err != failure {
				t.Errorf("%d bytes: the error was forgotten: %v", size, err)
			}
			r.Reset(bytes.NewReader(data[:10]))
			if c, err := r.Next(nil); err != nil || !bytes.Equal(c, data[:10]) {
				t.Errorf("after Reset: %d bytes, %v", len(c), err)
			}
		}
	}

	if _, err := chunk.New(stuck{}, tables).Next(nil); err != io.ErrNoProgress {
		t.Errorf("a reader that never reads: %v", err)
	}
	for _, n := range []int{-1, 1 << 30} {
		if _, err := chunk.New(liar(n), tables).Next(nil); err == nil || err == io.EOF {
			t.Errorf("a reader that returns %d: %v", n, err)
		}
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

type liar int

func (n liar) Read([]byte) (int, error) { return int(n), nil }

func TestNoAllocations(t *testing.T) {
	tables := newTables(t, testPol)
	data := random(6*mib, 14)
	src := bytes.NewReader(data)
	r := chunk.New(src, tables)
	buf := make([]byte, chunk.MaxSize)
	run := func() {
		src.Reset(data)
		r.Reset(src)
		for {
			if _, err := r.Next(buf); err != nil {
				return
			}
		}
	}
	if n := testing.AllocsPerRun(3, run); n != 0 {
		t.Errorf("%v allocations for a file, once warm", n)
	}
}

// Tables are shared; the race detector watches.
func TestSharedTables(t *testing.T) {
	tables := newTables(t, testPol)
	data := random(3*mib, 15)
	want, _ := tables.Cut(data)
	done := make(chan int)
	for range 4 {
		go func() { n, _ := tables.Cut(data); done <- n }()
	}
	for range 4 {
		if n := <-done; n != want {
			t.Errorf("Cut returned %d and %d", n, want)
		}
	}
}

// FuzzCut compares with the library on inputs that are made of the fuzzer's
// bytes, repeated beyond MinSize, with noise and planted zeros.
func FuzzCut(f *testing.F) {
	f.Add([]byte("a"), uint32(600_000), uint32(540_000), uint16(64), uint64(testPol))
	f.Add([]byte{}, uint32(1_200_000), uint32(530_000), uint16(63), uint64(testPol))
	f.Add([]byte{0}, uint32(chunk.MinSize), uint32(0), uint16(0), uint64(0x3f0b51d4ab0a7f))
	f.Add([]byte("0123456789"), uint32(900_000), uint32(524_287), uint16(500), uint64(0))
	f.Add([]byte{1, 2, 3, 4}, uint32(63), uint32(1), uint16(65), uint64(1<<53|0x4d))
	f.Fuzz(func(t *testing.T, pattern []byte, size, hole uint32, holeSize uint16, p uint64) {
		size %= 2 * mib
		var data []byte
		if len(pattern) > 0 {
			data = repeat(pattern, int(size))
		} else {
			data = random(int(size), byte(p))
		}
		hole = min(hole, size)
		clear(data[hole:min(hole+uint32(holeSize), size)])
		// Most numbers are no polynomial to use; then the usual one serves.
		pol := chunk.Pol(p)
		tables, err := chunk.NewTables(pol)
		if err != nil {
			pol, tables = testPol, newTables(t, testPol)
		}
		checkEnds(t, data, pol, tables)
	})
}

func BenchmarkChunk(b *testing.B) {
	noise := random(32*mib, 16)
	for name, data := range map[string][]byte{
		"random": noise,
		"zeros":  make([]byte, 32*mib),
		"ones":   repeat([]byte{1}, 32*mib),
		"text":   text(32 * mib),
	} {
		buf := make([]byte, chunk.MaxSize)
		src := bytes.NewReader(data)
		b.Run(name+"/library", func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			c := chunker.New(src, chunker.Pol(testPol))
			for b.Loop() {
				src.Reset(data)
				c.Reset(src, chunker.Pol(testPol))
				for {
					if _, err := c.Next(buf); err != nil {
						break
					}
				}
			}
		})
		tables := newTables(b, testPol)
		b.Run(name+"/Reader", func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			r := chunk.New(src, tables)
			for b.Loop() {
				src.Reset(data)
				r.Reset(src)
				for {
					if _, err := r.Next(buf); err != nil {
						break
					}
				}
			}
		})
		b.Run(name+"/Cut", func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				for rest := data; len(rest) > 0; {
					n, _ := tables.Cut(rest)
					rest = rest[n:]
				}
			}
		})
	}
}

func BenchmarkSmallFiles(b *testing.B) {
	data := random(3*kib, 17)
	buf := make([]byte, 4*kib)
	src := bytes.NewReader(data)
	b.Run("library", func(b *testing.B) {
		b.ReportAllocs()
		c := chunker.New(src, chunker.Pol(testPol))
		for b.Loop() {
			src.Reset(data)
			c.Reset(src, chunker.Pol(testPol))
			if _, err := c.Next(buf); err != nil {
				b.Fatal(err)
			}
		}
	})
	tables := newTables(b, testPol)
	b.Run("Reader", func(b *testing.B) {
		b.ReportAllocs()
		r := chunk.New(src, tables)
		for b.Loop() {
			src.Reset(data)
			r.Reset(src)
			if _, err := r.Next(buf); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkNewTables(b *testing.B) {
	for b.Loop() {
		newTables(b, testPol)
	}
}
