package backup

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// ErrMalformed says that stored bytes are not what their kind demands.
var ErrMalformed = errors.New("malformed")

// maxDepth bounds the nesting of unknown members, which the decoder skips.
const maxDepth = 64

// DecodeTree parses the stored form of a tree. Whatever it accepts is safe to
// use: names pass CheckName and are sorted, types are known, modes are within
// ModeMask, files alone have content and folders alone a subtree. Errors match
// ErrMalformed. The memory it takes is proportional to len(data).
func DecodeTree(data []byte) (*Tree, error) {
	d := decoder{data: data}
	t := &Tree{}
	seen := false
	err := d.object(func(key []byte) error {
		if string(key) != "nodes" {
			return d.skip(0)
		}
		if seen {
			return errors.New("two lists of nodes")
		}
		seen = true
		if d.null() {
			return nil
		}
		return d.array(func() error {
			t.Nodes = append(t.Nodes, Node{})
			n := &t.Nodes[len(t.Nodes)-1]
			if err := d.node(n); err != nil {
				return err
			}
			if i := len(t.Nodes) - 2; i >= 0 && t.Nodes[i].Name >= n.Name {
				return fmt.Errorf("the name %q comes after %q", n.Name, t.Nodes[i].Name)
			}
			return nil
		})
	})
	if err == nil {
		d.space()
		switch {
		case d.pos < len(data):
			err = errors.New("bytes after the end")
		case !seen:
			err = errors.New("no list of nodes")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("tree at byte %d: %w: %w", d.pos, ErrMalformed, err)
	}
	return t, nil
}

// A decoder reads the JSON of a tree without reflection. It accepts what
// encoding/json accepts, member names in exact case only.
type decoder struct {
	data []byte
	pos  int
	buf  []byte // scratch of bytes

	user, group string // the last ones; neighbours mostly share them
}

var errSyntax = errors.New("not valid JSON")

func (d *decoder) node(n *Node) error {
	var rawTarget []byte
	hasContent, hasSubtree, hasRaw := false, false, false
	err := d.object(func(key []byte) (err error) {
		switch string(key) {
		case "name":
			var s string
			if s, err = d.str(); err == nil {
				n.Name, err = unquoteName(s)
			}
		case "type":
			n.Type, err = d.nodeType()
		case "mode":
			var v uint64
			v, err = d.uint(32)
			n.Mode = fs.FileMode(v)
		case "mtime":
			n.ModTime, err = d.time(time.Time{})
		case "atime":
			n.AccessTime, err = d.time(n.ModTime)
		case "ctime":
			n.ChangeTime, err = d.time(n.ModTime)
		case "uid":
			var v uint64
			v, err = d.uint(32)
			n.UID = uint32(v)
		case "gid":
			var v uint64
			v, err = d.uint(32)
			n.GID = uint32(v)
		case "user":
			err = d.sameStr(&d.user)
			n.User = d.user
		case "group":
			err = d.sameStr(&d.group)
			n.Group = d.group
		case "inode":
			n.Inode, err = d.uint(64)
		case "device_id":
			n.DeviceID, err = d.uint(64)
		case "size":
			n.Size, err = d.uint(64)
		case "links":
			n.Links, err = d.uint(64)
		case "linktarget":
			n.LinkTarget, err = d.str()
		case "linktarget_raw":
			hasRaw = true
			rawTarget, err = d.base64()
		case "extended_attributes":
			n.Xattrs, err = d.xattrs()
		case "generic_attributes":
			d.space()
			start := d.pos
			if err = d.skip(0); err == nil {
				n.Generic = bytes.Clone(d.data[start:d.pos])
			}
		case "device":
			n.Device, err = d.uint(64)
		case "content":
			n.Content, hasContent, err = d.ids()
		case "subtree":
			if d.null() {
				return nil
			}
			hasSubtree = true
			n.Subtree, err = d.id()
		case "error":
			n.Error, err = d.str()
		default:
			err = d.skip(0)
		}
		return err
	})
	if err != nil {
		return err
	}
	if hasRaw {
		n.LinkTarget = string(rawTarget)
	}
	if err := CheckName(n.Name); err != nil {
		return err
	}
	switch {
	case n.Type == "":
		return fmt.Errorf("%q has no type", n.Name)
	case n.Mode&^ModeMask != 0:
		return fmt.Errorf("%q has the mode bits %#x", n.Name, uint32(n.Mode&^ModeMask))
	case hasContent && n.Type != File:
		return fmt.Errorf("%q is a %s with contents", n.Name, n.Type)
	case hasSubtree != (n.Type == Dir) || hasSubtree && n.Subtree.IsZero():
		return fmt.Errorf("%q is a %s and a subtree does not match that", n.Name, n.Type)
	case strings.IndexByte(n.LinkTarget, 0) >= 0:
		return fmt.Errorf("%q points to a name with a NUL byte", n.Name)
	}
	return nil
}

// unquoteName undoes appendQuotedName.
func unquoteName(s string) (string, error) {
	if strings.IndexByte(s, '\\') < 0 && strings.IndexByte(s, '"') < 0 && strings.IndexByte(s, '\n') < 0 {
		return s, nil
	}
	name, err := strconv.Unquote(`"` + s + `"`)
	if err != nil {
		return "", errors.New("a name with a bad escape")
	}
	return name, nil
}

func (d *decoder) nodeType() (NodeType, error) {
	s, err := d.str()
	switch t := NodeType(s); {
	case err != nil:
		return "", err
	case t == File || t == Dir || t == Symlink || t == Device || t == CharDevice || t == FIFO || t == Socket:
		return t, nil
	}
	return "", fmt.Errorf("unknown type %.40q", s)
}

func (d *decoder) space() {
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
func (d *decoder) next(c byte) bool {
	d.space()
	if d.pos < len(d.data) && d.data[d.pos] == c {
		d.pos++
		return true
	}
	return false
}

func (d *decoder) literal(s string) bool {
	d.space()
	if len(d.data)-d.pos >= len(s) && string(d.data[d.pos:d.pos+len(s)]) == s {
		d.pos += len(s)
		return true
	}
	return false
}

func (d *decoder) null() bool { return d.literal("null") }

// object calls member for each member; key is valid until member reads on.
func (d *decoder) object(member func(key []byte) error) error {
	if !d.next('{') {
		return errSyntax
	}
	if d.next('}') {
		return nil
	}
	for {
		key, err := d.bytes()
		if err != nil {
			return err
		}
		if !d.next(':') {
			return errSyntax
		}
		if err := member(key); err != nil {
			return err
		}
		if d.next('}') {
			return nil
		}
		if !d.next(',') {
			return errSyntax
		}
	}
}

func (d *decoder) array(element func() error) error {
	if !d.next('[') {
		return errSyntax
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
			return errSyntax
		}
	}
}

// bytes reads a string whose result is valid until the next call.
func (d *decoder) bytes() ([]byte, error) {
	if !d.next('"') {
		return nil, errSyntax
	}
	for i := d.pos; i < len(d.data); i++ {
		switch c := d.data[i]; {
		case c == '"':
			s := d.data[d.pos:i]
			d.pos = i + 1
			return s, nil
		case c < ' ':
			return nil, errSyntax
		case c == '\\' || c >= utf8.RuneSelf:
			return d.slowBytes()
		}
	}
	return nil, errSyntax
}

// slowBytes reads the rest of a string that has escapes or is not ASCII.
func (d *decoder) slowBytes() ([]byte, error) {
	d.buf = d.buf[:0]
	for d.pos < len(d.data) {
		c := d.data[d.pos]
		switch {
		case c == '"':
			d.pos++
			return d.buf, nil
		case c < ' ':
			return nil, errSyntax
		case c == '\\':
			if d.pos+1 >= len(d.data) {
				return nil, errSyntax
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
					return nil, errSyntax
				}
				d.pos += 4
				if utf16.IsSurrogate(r) {
					r = d.lowSurrogate(r)
				}
				d.buf = utf8.AppendRune(d.buf, r)
			default:
				return nil, errSyntax
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
	return nil, errSyntax
}

func (d *decoder) hex4(pos int) (rune, bool) {
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
func (d *decoder) lowSurrogate(high rune) rune {
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

func (d *decoder) str() (string, error) {
	b, err := d.bytes()
	return string(b), err
}

// sameStr reads a string into *last, without a copy if it is there already.
func (d *decoder) sameStr(last *string) error {
	b, err := d.bytes()
	if err == nil && string(b) != *last {
		*last = string(b)
	}
	return err
}

func (d *decoder) base64() ([]byte, error) {
	if d.null() {
		return nil, nil
	}
	b, err := d.bytes()
	if err != nil {
		return nil, err
	}
	out, err := base64.StdEncoding.AppendDecode(make([]byte, 0, base64.StdEncoding.DecodedLen(len(b))), b)
	if err != nil {
		return nil, errors.New("not valid base64")
	}
	return out, nil
}

func (d *decoder) uint(bits int) (uint64, error) {
	d.space()
	start := d.pos
	for d.pos < len(d.data) && d.data[d.pos] >= '0' && d.data[d.pos] <= '9' {
		d.pos++
	}
	s := d.data[start:d.pos]
	if len(s) > 1 && s[0] == '0' {
		return 0, errSyntax
	}
	v, err := strconv.ParseUint(string(s), 10, bits)
	if err != nil {
		return 0, errors.New("not a whole number that fits")
	}
	return v, nil
}

// time reads a time; near is one that has likely the same zone.
func (d *decoder) time(near time.Time) (time.Time, error) {
	b, err := d.bytes()
	if err != nil {
		return time.Time{}, err
	}
	var t time.Time
	if err := t.UnmarshalText(b); err != nil {
		return time.Time{}, errors.New("not a time")
	}
	// Each parse of a numeric zone makes a new Location; share one.
	if _, a := t.Zone(); !near.IsZero() {
		if _, b := near.Zone(); a == b {
			t = t.In(near.Location())
		}
	}
	return t, nil
}

func (d *decoder) id() (ID, error) {
	b, err := d.bytes()
	if err != nil {
		return ID{}, err
	}
	var id ID
	err = id.UnmarshalText(b)
	return id, err
}

// ids reads a list of IDs; null gives nil and false.
func (d *decoder) ids() ([]ID, bool, error) {
	if d.null() {
		return nil, false, nil
	}
	ids := []ID{}
	err := d.array(func() error {
		id, err := d.id()
		ids = append(ids, id)
		return err
	})
	return ids, true, err
}

func (d *decoder) xattrs() ([]Xattr, error) {
	if d.null() {
		return nil, nil
	}
	var xs []Xattr
	err := d.array(func() error {
		var x Xattr
		err := d.object(func(key []byte) (err error) {
			switch string(key) {
			case "name":
				x.Name, err = d.str()
			case "value":
				x.Value, err = d.base64()
			default:
				err = d.skip(0)
			}
			return err
		})
		xs = append(xs, x)
		return err
	})
	return xs, err
}

// skip passes over one value of any type.
func (d *decoder) skip(depth int) error {
	if depth > maxDepth {
		return errors.New("nested too deeply")
	}
	d.space()
	if d.pos >= len(d.data) {
		return errSyntax
	}
	switch c := d.data[d.pos]; c {
	case '{':
		return d.object(func([]byte) error { return d.skip(depth + 1) })
	case '[':
		return d.array(func() error { return d.skip(depth + 1) })
	case '"':
		_, err := d.bytes()
		return err
	case 't', 'f', 'n':
		if d.literal("true") || d.literal("false") || d.null() {
			return nil
		}
		return errSyntax
	default:
		return d.number()
	}
}

// number passes over a number: -?(0|[1-9][0-9]*)(.[0-9]+)?([eE][+-]?[0-9]+)?
func (d *decoder) number() error {
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
		return errSyntax
	}
	if at(".") && !digits() {
		return errSyntax
	}
	if at("eE") {
		at("+-")
		if !digits() {
			return errSyntax
		}
	}
	return nil
}
