// Package jsonscan reads JSON of a known shape without reflection and almost
// without allocations: the trees and indexes of a repository, of which there
// are millions of members. It accepts exactly what encoding/json accepts.
package jsonscan

import (
	"encoding/base64"
	"errors"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds the nesting of values that Skip passes over.
const maxDepth = 64

// ErrSyntax says that the input is not JSON, or not of the expected shape.
var ErrSyntax = errors.New("not valid JSON")

// A Scanner reads values one after the other. After an error it is of no use,
// but for Pos.
type Scanner struct {
	data []byte
	pos  int
	buf  []byte // scratch of Bytes
}

// New returns a Scanner at the beginning of data.
func New(data []byte) *Scanner { return &Scanner{data: data} }

// Pos returns how many bytes have been read.
func (d *Scanner) Pos() int { return d.pos }

// End returns an error unless only white space is left.
func (d *Scanner) End() error {
	d.space()
	if d.pos < len(d.data) {
		return errors.New("bytes after the end")
	}
	return nil
}

// Raw passes over one value and returns its bytes, which belong to the input.
func (d *Scanner) Raw() ([]byte, error) {
	d.space()
	start := d.pos
	err := d.Skip()
	return d.data[start:d.pos], err
}

func (d *Scanner) space() {
	for d.pos < len(d.data) {
		switch d.data[d.pos] {
		case ' ', '\t', '\n', '\r':
			d.pos++
		default:
			return
		}
	}
}

// next skips white space and reports whether c follows, consuming it if so.
func (d *Scanner) next(c byte) bool {
	d.space()
	if d.pos < len(d.data) && d.data[d.pos] == c {
		d.pos++
		return true
	}
	return false
}

func (d *Scanner) literal(s string) bool {
	d.space()
	if len(d.data)-d.pos >= len(s) && string(d.data[d.pos:d.pos+len(s)]) == s {
		d.pos += len(s)
		return true
	}
	return false
}

// Null passes over a null and reports whether there was one.
func (d *Scanner) Null() bool { return d.literal("null") }

// Object reads an object and calls member for each of its members; member reads
// the value. key is valid until it does.
func (d *Scanner) Object(member func(key []byte) error) error {
	if !d.next('{') {
		return ErrSyntax
	}
	if d.next('}') {
		return nil
	}
	for {
		key, err := d.Bytes()
		if err != nil {
			return err
		}
		if !d.next(':') {
			return ErrSyntax
		}
		if err := member(key); err != nil {
			return err
		}
		if d.next('}') {
			return nil
		}
		if !d.next(',') {
			return ErrSyntax
		}
	}
}

// Array reads an array and calls element where each of its values begins;
// element reads it.
func (d *Scanner) Array(element func() error) error {
	if !d.next('[') {
		return ErrSyntax
	}
	if d.next(']') {
		return nil
	}
	for {
		if err := element(); err != nil {
			return err
		}
		if d.next(']') {
			return nil
		}
		if !d.next(',') {
			return ErrSyntax
		}
	}
}

// Bytes reads a string. The result is valid until the next call.
func (d *Scanner) Bytes() ([]byte, error) {
	if !d.next('"') {
		return nil, ErrSyntax
	}
	for i := d.pos; i < len(d.data); i++ {
		switch c := d.data[i]; {
		case c == '"':
			s := d.data[d.pos:i]
			d.pos = i + 1
			return s, nil
		case c < ' ':
			return nil, ErrSyntax
		case c == '\\' || c >= utf8.RuneSelf:
			return d.slowBytes()
		}
	}
	return nil, ErrSyntax
}

// slowBytes reads the rest of a string that has escapes or is not ASCII.
func (d *Scanner) slowBytes() ([]byte, error) {
	d.buf = d.buf[:0]
	for d.pos < len(d.data) {
		c := d.data[d.pos]
		switch {
		case c == '"':
			d.pos++
			return d.buf, nil
		case c < ' ':
			return nil, ErrSyntax
		case c == '\\':
			if d.pos+1 >= len(d.data) {
				return nil, ErrSyntax
			}
			e := d.data[d.pos+1]
			d.pos += 2
			switch e {
			case '"', '\\', '/':
				d.buf = append(d.buf, e)
			case 'b':
				d.buf = append(d.buf, '\b')
			case 'f':
				d.buf = append(d.buf, '\f')
			case 'n':
				d.buf = append(d.buf, '\n')
			case 'r':
				d.buf = append(d.buf, '\r')
			case 't':
				d.buf = append(d.buf, '\t')
			case 'u':
				r, ok := d.hex4(d.pos)
				if !ok {
					return nil, ErrSyntax
				}
				d.pos += 4
				if utf16.IsSurrogate(r) {
					r = d.lowSurrogate(r)
				}
				d.buf = utf8.AppendRune(d.buf, r)
			default:
				return nil, ErrSyntax
			}
		case c < utf8.RuneSelf:
			d.buf = append(d.buf, c)
			d.pos++
		default:
			r, size := utf8.DecodeRune(d.data[d.pos:])
			d.buf = utf8.AppendRune(d.buf, r)
			d.pos += size
		}
	}
	return nil, ErrSyntax
}

func (d *Scanner) hex4(pos int) (rune, bool) {
	if len(d.data)-pos < 4 {
		return 0, false
	}
	var r rune
	for _, c := range d.data[pos : pos+4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// lowSurrogate combines the surrogate high with an escape that follows, or
// gives the replacement character.
func (d *Scanner) lowSurrogate(high rune) rune {
	if len(d.data)-d.pos >= 6 && d.data[d.pos] == '\\' && d.data[d.pos+1] == 'u' {
		if low, ok := d.hex4(d.pos + 2); ok {
			if r := utf16.DecodeRune(high, low); r != utf8.RuneError {
				d.pos += 6
				return r
			}
		}
	}
	return utf8.RuneError
}

// Base64 reads a string of base64, or null, which gives nil.
func (d *Scanner) Base64() ([]byte, error) {
	if d.Null() {
		return nil, nil
	}
	b, err := d.Bytes()
	if err != nil {
		return nil, err
	}
	out, err := base64.StdEncoding.AppendDecode(make([]byte, 0, base64.StdEncoding.DecodedLen(len(b))), b)
	if err != nil {
		return nil, errors.New("not valid base64")
	}
	return out, nil
}

// Uint reads a whole number that fits into so many bits.
func (d *Scanner) Uint(bits int) (uint64, error) {
	d.space()
	start := d.pos
	for d.pos < len(d.data) && d.data[d.pos] >= '0' && d.data[d.pos] <= '9' {
		d.pos++
	}
	s := d.data[start:d.pos]
	if len(s) > 1 && s[0] == '0' {
		return 0, ErrSyntax
	}
	v, err := strconv.ParseUint(string(s), 10, bits)
	if err != nil {
		return 0, errors.New("not a whole number that fits")
	}
	return v, nil
}

// Skip passes over one value of any type.
func (d *Scanner) Skip() error { return d.skip(0) }

func (d *Scanner) skip(depth int) error {
	if depth > maxDepth {
		return errors.New("nested too deeply")
	}
	d.space()
	if d.pos >= len(d.data) {
		return ErrSyntax
	}
	switch c := d.data[d.pos]; c {
	case '{':
		return d.Object(func([]byte) error { return d.skip(depth + 1) })
	case '[':
		return d.Array(func() error { return d.skip(depth + 1) })
	case '"':
		_, err := d.Bytes()
		return err
	case 't', 'f', 'n':
		if d.literal("true") || d.literal("false") || d.Null() {
			return nil
		}
		return ErrSyntax
	default:
		return d.number()
	}
}

// number passes over a number: -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)?
func (d *Scanner) number() error {
	digits := func() bool {
		start := d.pos
		for d.pos < len(d.data) && d.data[d.pos] >= '0' && d.data[d.pos] <= '9' {
			d.pos++
		}
		return d.pos > start
	}
	at := func(set string) bool {
		if d.pos < len(d.data) && strings.IndexByte(set, d.data[d.pos]) >= 0 {
			d.pos++
			return true
		}
		return false
	}
	at("-")
	if !at("0") && !digits() {
		return ErrSyntax
	}
	if at(".") && !digits() {
		return ErrSyntax
	}
	if at("eE") {
		at("+-")
		if !digits() {
			return ErrSyntax
		}
	}
	return nil
}
