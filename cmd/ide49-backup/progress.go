package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mattn/go-runewidth"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// How often progress is told where it is not drawn.
const (
	plainEvery = 30 * time.Second
	jsonEvery  = time.Second
	drawEvery  = 120 * time.Millisecond
)

// A meter shows how a job goes on, one row for each volume: drawn on a
// terminal, as plain lines now and then elsewhere, as JSON lines with --json,
// not at all with --quiet. Its methods may be called concurrently.
type meter struct {
	a     *app
	width int           // of the longest name
	bars  *mpb.Progress // nil unless drawn
	quit  chan struct{}
	done  sync.WaitGroup

	mu   sync.Mutex // guards rows and keeps lines whole
	rows []*row
}

// A row is the progress of one volume.
type row struct {
	name   string
	start  time.Time
	expect atomic.Int64 // bytes, an estimate; 0 if unknown
	files  atomic.Int64
	bytes  atomic.Int64 // dealt with: read, or known to be unchanged
	read   atomic.Int64 // what speed is made of
	took   atomic.Int64 // nanoseconds, once it has ended
	told   bool         // its end was told; guarded by meter.mu
	bar    *mpb.Bar
	// What is counted: files or not, bytes or just things. Set at the
	// beginning.
	inFiles, inBytes bool
}

// newMeter starts a meter for the volumes of the given names. The caller stops it.
func (a *app) newMeter(names []string) *meter {
	m := &meter{a: a, quit: make(chan struct{})}
	for _, name := range names {
		m.width = max(m.width, runewidth.StringWidth(printable(name)))
	}
	m.width = min(m.width, 24)
	switch {
	case a.json:
		m.done.Go(func() { m.tick(jsonEvery, m.tellJSON) })
	case a.quiet:
	case terminal(a.stderr):
		m.bars = mpb.New(mpb.WithOutput(a.stderr), mpb.WithRefreshRate(drawEvery))
	default:
		m.done.Go(func() { m.tick(plainEvery, m.tellPlain) })
	}
	return m
}

// begin adds a row; expect is how many bytes there will be, or 0.
func (m *meter) begin(name string, expect uint64) *row {
	r := &row{name: printable(name), start: time.Now(), inFiles: true, inBytes: true}
	r.expect.Store(int64(expect))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rows = append(m.rows, r)
	if m.bars != nil {
		draw := mpb.BarFillerFunc(func(w io.Writer, s decor.Statistics) error {
			_, err := io.WriteString(w, r.line(m.width, s.AvailableWidth))
			return err
		})
		// Adding fails only after stop, when nothing is drawn any more.
		r.bar, _ = m.bars.Add(0, draw, mpb.BarFillerTrim())
	}
	return r
}

// end says that a row is finished. Its line stays until the meter stops.
func (r *row) end() { r.took.Store(int64(max(1, time.Since(r.start)))) }

// stop takes the drawing off the screen and waits until nothing is told any more.
func (m *meter) stop() {
	close(m.quit)
	m.done.Wait()
	if m.bars == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.rows {
		if r.bar != nil {
			r.bar.Abort(true)
		}
	}
	m.bars.Wait()
}

// warn writes a warning above the drawing.
func (m *meter) warn(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bars == nil {
		m.a.warn(format, args...)
		return
	}
	line := fmt.Sprintf("%s %s\n", m.a.paint(m.a.stderr, yellow, "warning:"), printable(fmt.Sprintf(format, args...)))
	// The library writes to the same stderr; when that fails nobody sees.
	_, _ = io.WriteString(m.bars, line)
}

// event writes a line of JSON, if lines of JSON are wanted.
func (m *meter) event(v any) {
	if !m.a.json {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// A reader that went away ends the program by SIGPIPE or does not care.
	_ = m.a.printLine(v)
}

func (m *meter) tick(every time.Duration, tell func(*row)) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-m.quit:
			return
		case <-t.C:
		}
		m.mu.Lock()
		for _, r := range m.rows {
			if !r.told {
				tell(r)
			}
			r.told = r.took.Load() != 0
		}
		m.mu.Unlock()
	}
}

func (m *meter) tellPlain(r *row) {
	fmt.Fprintf(m.a.stderr, "%s: %s\n", r.name, strings.Join(r.facts(), ", "))
}

func (m *meter) tellJSON(r *row) {
	line := struct {
		Event   string  `json:"event"`
		Volume  string  `json:"volume"`
		Files   int64   `json:"files"`
		Bytes   int64   `json:"bytes"`
		Expect  int64   `json:"bytes_expected,omitempty"`
		Seconds float64 `json:"seconds"`
	}{"progress", r.name, r.files.Load(), r.bytes.Load(), r.expect.Load(), r.elapsed().Seconds()}
	_ = m.a.printLine(line) // as in event
}

func (r *row) elapsed() time.Duration {
	if took := r.took.Load(); took != 0 {
		return time.Duration(took)
	}
	return time.Since(r.start)
}

// portion returns how much of the row is done, if that can be told.
func (r *row) portion() (part float64, ok bool) {
	if r.took.Load() != 0 {
		return 1, true
	}
	expect := r.expect.Load()
	if expect <= 0 {
		return 0, false
	}
	return min(1, float64(r.bytes.Load())/float64(expect)), true
}

// facts tell what was done, how fast, and how long it will take.
func (r *row) facts() []string {
	var facts []string
	if r.inFiles {
		facts = append(facts, count(r.files.Load(), "file", "files"))
	}
	if r.inBytes {
		facts = append(facts, bytesText(uint64(r.bytes.Load())))
	} else {
		facts = append(facts, fmt.Sprint(r.bytes.Load()))
	}
	elapsed := r.elapsed()
	if elapsed > time.Second/2 && r.inBytes {
		facts = append(facts, bytesText(uint64(float64(r.read.Load())/elapsed.Seconds()))+"/s")
	}
	if r.took.Load() != 0 {
		return append(facts, "in "+spanText(elapsed))
	}
	if part, ok := r.portion(); ok && part > 0.01 && elapsed > 2*time.Second {
		left := time.Duration(float64(elapsed) * (1 - part) / part)
		facts = append(facts, spanText(left)+" left")
	}
	return facts
}

// line draws the row in at most width cells: a bar, if there is room for one
// and the end is known, and the facts.
func (r *row) line(nameWidth, width int) string {
	name := runewidth.FillRight(runewidth.Truncate(r.name, nameWidth, "…"), nameWidth)
	facts := r.facts()
	for len(facts) > 1 && runewidth.StringWidth(name+"  "+strings.Join(facts, "  ")) > width {
		facts = facts[:len(facts)-1]
	}
	text := fmt.Sprintf("%12s  %10s  %s", facts[0], at(facts, 1), strings.Join(facts[min(2, len(facts)):], "  "))
	part, known := r.portion()
	const cells = 20
	bar := strings.Repeat(" ", cells+7)
	if known {
		full := int(part * cells)
		bar = fmt.Sprintf("%s%s %3.0f %%  ", strings.Repeat("━", full), strings.Repeat("┄", cells-full), part*100)
	}
	line := name + "  " + bar + text
	if runewidth.StringWidth(line) > width {
		line = name + "  " + strings.TrimLeft(text, " ")
	}
	return runewidth.Truncate(strings.TrimRight(line, " "), width, "")
}

func at(list []string, i int) string {
	if i < len(list) {
		return list[i]
	}
	return ""
}

// spanText returns a duration for people, as "0.4 s", "12 s", "3 min 05 s" or
// "2 h 03 min".
func spanText(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < time.Hour:
		d = d.Round(time.Second)
		return fmt.Sprintf("%d min %02d s", d/time.Minute, d%time.Minute/time.Second)
	}
	d = d.Round(time.Minute)
	return fmt.Sprintf("%d h %02d min", d/time.Hour, d%time.Hour/time.Minute)
}
