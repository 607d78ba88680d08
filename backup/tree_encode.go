package backup

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"
	"unicode/utf8"
)

// AppendJSON appends the stored form of t to dst: the bytes that encoding/json
// would give, followed by a newline. The same folder thus always has the same
// ID, and the same one as in restic.
//
// It fails on names that are not sorted, that stand twice or that CheckName
// refuses, so that no damaged tree is ever written.
func (t *Tree) AppendJSON(dst []byte) ([]byte, error) {
	dst = append(dst, `{"nodes":[`...)
	for i := range t.Nodes {
		n := &t.Nodes[i]
		if err := CheckName(n.Name); err != nil {
			return dst, err
		}
		if i > 0 {
			if prev := t.Nodes[i-1].Name; prev >= n.Name {
				return dst, fmt.Errorf("the name %q comes after %q", n.Name, prev)
			}
			dst = append(dst, ',')
		}
		dst = n.appendJSON(dst)
	}
	return append(dst, "]}\n"...), nil
}

func (n *Node) appendJSON(dst []byte) []byte {
	dst = append(dst, `{"name":"`...)
	dst = appendQuotedName(dst, n.Name)
	dst = append(dst, `","type":`...)
	dst = appendString(dst, string(n.Type))
	dst = appendUint(dst, `,"mode":`, uint64(n.Mode))
	dst = appendTime(dst, `,"mtime":"`, n.ModTime)
	dst = appendTime(dst, `,"atime":"`, n.AccessTime)
	dst = appendTime(dst, `,"ctime":"`, n.ChangeTime)
	dst = append(dst, `,"uid":`...)
	dst = strconv.AppendUint(dst, uint64(n.UID), 10)
	dst = append(dst, `,"gid":`...)
	dst = strconv.AppendUint(dst, uint64(n.GID), 10)
	if n.User != "" {
		dst = appendString(append(dst, `,"user":`...), n.User)
	}
	if n.Group != "" {
		dst = appendString(append(dst, `,"group":`...), n.Group)
	}
	dst = appendUint(dst, `,"inode":`, n.Inode)
	dst = appendUint(dst, `,"device_id":`, n.DeviceID)
	dst = appendUint(dst, `,"size":`, n.Size)
	dst = appendUint(dst, `,"links":`, n.Links)
	if n.LinkTarget != "" {
		dst = appendString(append(dst, `,"linktarget":`...), n.LinkTarget)
		if !utf8.ValidString(n.LinkTarget) {
			dst = appendBase64(append(dst, `,"linktarget_raw":`...), []byte(n.LinkTarget))
		}
	}
	for i, x := range n.Xattrs {
		if i == 0 {
			dst = append(dst, `,"extended_attributes":[`...)
		} else {
			dst = append(dst, ',')
		}
		dst = appendString(append(dst, `{"name":`...), x.Name)
		dst = appendBase64(append(dst, `,"value":`...), x.Value)
		dst = append(dst, '}')
	}
	if len(n.Xattrs) > 0 {
		dst = append(dst, ']')
	}
	if len(n.Generic) > 0 {
		dst = append(append(dst, `,"generic_attributes":`...), n.Generic...)
	}
	dst = appendUint(dst, `,"device":`, n.Device)
	switch {
	case n.Content == nil && n.Type != File:
		dst = append(dst, `,"content":null`...)
	case n.Content == nil:
		dst = append(dst, `,"content":[]`...)
	default:
		dst = append(dst, `,"content":[`...)
		for i := range n.Content {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendID(dst, n.Content[i])
		}
		dst = append(dst, ']')
	}
	if !n.Subtree.IsZero() {
		dst = appendID(append(dst, `,"subtree":`...), n.Subtree)
	}
	if n.Error != "" {
		dst = appendString(append(dst, `,"error":`...), n.Error)
	}
	return append(dst, '}')
}

// appendUint appends a member that is omitted when zero.
func appendUint(dst []byte, key string, v uint64) []byte {
	if v == 0 {
		return dst
	}
	return strconv.AppendUint(append(dst, key...), v, 10)
}

func appendID(dst []byte, id ID) []byte {
	dst = append(dst, '"')
	dst = hex.AppendEncode(dst, id[:])
	return append(dst, '"')
}

func appendBase64(dst, v []byte) []byte {
	if v == nil {
		return append(dst, "null"...)
	}
	dst = append(dst, '"')
	dst = base64.StdEncoding.AppendEncode(dst, v)
	return append(dst, '"')
}

// The years that RFC 3339 can write. File systems store others, so times
// beyond are written as the nearest year, as restic does.
const minYear, maxYear = 0, 9999

// appendTime appends a time in its own zone as time.Time.MarshalJSON does.
func appendTime(dst []byte, key string, t time.Time) []byte {
	switch y := t.Year(); {
	case y < minYear:
		t = t.AddDate(minYear-y, 0, 0)
	case y > maxYear:
		t = t.AddDate(maxYear-y, 0, 0)
	}
	dst = append(dst, key...)
	dst = t.AppendFormat(dst, time.RFC3339Nano)
	return append(dst, '"')
}

// plainName reports whether neither Go quoting nor JSON changes name.
func plainName(name string) bool {
	for i := range len(name) {
		c := name[i]
		if c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}

// appendQuotedName appends strconv.Quote(name) without its quotes, as a JSON
// string without its quotes: the format's way to keep names that are not UTF-8.
func appendQuotedName(dst []byte, name string) []byte {
	if plainName(name) {
		return append(dst, name...)
	}
	var scratch [4*MaxNameLen + 2]byte
	q := strconv.AppendQuote(scratch[:0], name)
	return appendEscaped(dst, string(q[1:len(q)-1]))
}

func appendString(dst []byte, s string) []byte {
	dst = append(dst, '"')
	if plainName(s) {
		dst = append(dst, s...)
	} else {
		dst = appendEscaped(dst, s)
	}
	return append(dst, '"')
}

// appendEscaped appends s as encoding/json would, HTML escapes included and
// invalid UTF-8 replaced, without quotes.
func appendEscaped(dst []byte, s string) []byte {
	const digits = "0123456789abcdef"
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' && c != '<' && c != '>' && c != '&' {
				i++
				continue
			}
			dst = append(dst, s[start:i]...)
			switch c {
			case '"', '\\':
				dst = append(dst, '\\', c)
			case '\b':
				dst = append(dst, '\\', 'b')
			case '\f':
				dst = append(dst, '\\', 'f')
			case '\n':
				dst = append(dst, '\\', 'n')
			case '\r':
				dst = append(dst, '\\', 'r')
			case '\t':
				dst = append(dst, '\\', 't')
			default:
				dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		if (r == utf8.RuneError && size == 1) || r == '\u2028' || r == '\u2029' {
			dst = append(dst, s[start:i]...)
			switch r {
			case '\u2028':
				dst = append(dst, `\u2028`...)
			case '\u2029':
				dst = append(dst, `\u2029`...)
			default:
				dst = append(dst, `\ufffd`...)
			}
			start = i + size
		}
		i += size
	}
	return append(dst, s[start:]...)
}
