package policy

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// Severity tells an error from a warning.
type Severity uint8

// With an error the configuration cannot be used; with a warning it can, but
// perhaps does not do what its writer wanted.
const (
	SeverityError Severity = iota
	SeverityWarning
)

// String returns "error" or "warning".
func (s Severity) String() string {
	if s == SeverityWarning {
		return "warning"
	}
	return "error"
}

// MarshalText implements encoding.TextMarshaler.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// A Problem is one thing wrong with the configuration and where it is.
type Problem struct {
	Severity Severity `json:"severity"`
	// File is the configuration file, "" for what is not in a file.
	File string `json:"file,omitempty"`
	// Line counts from 1; 0 means that no line is to blame. Column counts
	// characters from 1, and Width says how many are meant.
	Line   int `json:"line,omitempty"`
	Column int `json:"column,omitempty"`
	Width  int `json:"width,omitempty"`
	// Key is the path of the setting, as "repositories.local.url".
	Key string `json:"key,omitempty"`
	// Message is one line.
	Message string `json:"message"`
	// Source is the line, with passwords masked and control characters
	// made visible, cut where it is long. Column fits it.
	Source string `json:"source,omitempty"`
}

// Error returns place and message on one line.
func (p Problem) Error() string {
	switch {
	case p.Line > 0:
		return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	case p.File != "":
		return p.File + ": " + p.Message
	}
	return p.Message
}

// Errors says that a configuration cannot be used, and everything that is
// wrong with it.
type Errors struct {
	Problems []Problem // in the order of the file, warnings among them
}

// Error returns the first error and how many more there are, on one line.
func (e *Errors) Error() string {
	var first *Problem
	n := 0
	for i := range e.Problems {
		if e.Problems[i].Severity != SeverityError {
			continue
		}
		if first == nil {
			first = &e.Problems[i]
		}
		n++
	}
	switch {
	case first == nil:
		return "configuration: no error"
	case n == 1:
		return first.Error()
	case n == 2:
		return first.Error() + " (and 1 more error)"
	}
	return fmt.Sprintf("%s (and %d more errors)", first.Error(), n-1)
}

// sortProblems puts problems in the order of the file; what has no line
// comes last.
func sortProblems(ps []Problem) {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		if (a.Line == 0) != (b.Line == 0) {
			return cmp.Compare(b.Line, a.Line)
		}
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
}

// Print writes problems for a person: each with its line and a caret below
// what is meant, then how many there are. Colours are for terminals.
func Print(w io.Writer, problems []Problem, color bool) error {
	out := bufio.NewWriter(w)
	paint := func(code, s string) string {
		if !color || s == "" {
			return s
		}
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	const red, yellow, bold, blue = "1;31", "1;33", "1", "34"
	count := [2]int{}
	for i, p := range problems {
		if i > 0 {
			out.WriteByte('\n')
		}
		count[p.Severity]++
		hue := red
		if p.Severity == SeverityWarning {
			hue = yellow
		}
		fmt.Fprintf(out, "%s: %s\n", paint(hue, p.Severity.String()), paint(bold, p.Message))
		if p.Line == 0 {
			if p.File != "" {
				fmt.Fprintf(out, "  %s %s\n", paint(blue, "in"), p.File)
			}
			continue
		}
		number := fmt.Sprint(p.Line)
		margin := strings.Repeat(" ", len(number))
		fmt.Fprintf(out, "%s %s %s:%d:%d\n", margin, paint(blue, "in"), p.File, p.Line, p.Column)
		fmt.Fprintf(out, " %s %s\n", paint(blue, number+" |"), p.Source)
		pad := ""
		if p.Column > 0 {
			pad = strings.Repeat(" ", p.Column-1)
		}
		fmt.Fprintf(out, " %s %s%s\n", paint(blue, margin+" |"), pad, paint(hue, strings.Repeat("^", max(1, p.Width))))
	}
	if e, w := count[SeverityError], count[SeverityWarning]; e+w > 1 {
		fmt.Fprintf(out, "\n%s\n", tally(e, w))
	}
	return out.Flush()
}

func tally(errors, warnings int) string {
	var parts []string
	for _, c := range []struct {
		n    int
		name string
	}{{errors, "error"}, {warnings, "warning"}} {
		switch c.n {
		case 0:
		case 1:
			parts = append(parts, "1 "+c.name)
		default:
			parts = append(parts, fmt.Sprintf("%d %ss", c.n, c.name))
		}
	}
	return strings.Join(parts, ", ")
}

// maxSource is how many characters of a source line are shown.
const maxSource = 110

// excerpt returns the part of a line around column (counted from 1) that
// fits on a screen, the column within it, and the width that still fits.
// Each character of the result takes one place on a terminal, or the caret
// would miss: tabs become spaces and control characters a substitute.
func excerpt(line string, column, width int) (string, int, int) {
	runes := make([]rune, 0, len(line))
	for i, r := range line {
		switch {
		case r == '\t':
			r = ' '
		case r == utf8.RuneError || notPrintable(r):
			if _, n := utf8.DecodeRuneInString(line[i:]); r != utf8.RuneError || n == 1 {
				r = '�'
			}
		}
		runes = append(runes, r)
	}
	column = min(max(column, 1), len(runes)+1)
	start := 0
	if len(runes) > maxSource && column > maxSource-30 {
		start = min(column-maxSource/2, len(runes)-maxSource+1)
		start = max(start, 0)
	}
	end := min(len(runes), start+maxSource)
	text := string(runes[start:end])
	column -= start
	if end < len(runes) {
		text += "…"
	}
	if start > 0 {
		text = "…" + text
		column++
	}
	width = max(1, min(width, utf8.RuneCountInString(text)-column+1))
	return text, column, width
}
