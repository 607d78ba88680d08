package smb

import (
	"fmt"
	"io/fs"
	"strings"
	"unicode/utf8"
)

// SMB forbids some characters that POSIX allows in names, and treats a dot or
// a space at a name's end as if it weren't there. They travel as characters
// of Unicode's private use area instead, the way macOS and the kernel's
// client ("mapposix", its default) do it, so that all three see the same
// names.
const (
	privateControl = 0xF000 // 0x01 to 0x1F
	privateSpace   = 0xF028 // at the end only
	privatePeriod  = 0xF029 // at the end only
)

var privateOf = map[rune]rune{
	'"': 0xF020, '*': 0xF021, ':': 0xF022, '<': 0xF023, '>': 0xF024,
	'?': 0xF025, '\\': 0xF026, '|': 0xF027,
}

// maxName is the longest name that Samba and Windows take, in UTF-16 units,
// and that Linux takes, in bytes.
const maxName = 255

// encodePath turns a slash-separated path below a share's root, as
// [io/fs.ValidPath] wants it, into the server's form. "." is the root.
func encodePath(path string) (string, error) {
	if path == "." {
		return "", nil
	}
	// ValidPath refuses "", "..", "/a", "a//b" and what isn't UTF-8.
	if !fs.ValidPath(path) || strings.IndexByte(path, 0) >= 0 {
		return "", fmt.Errorf("%w: %q", ErrName, path)
	}
	var b strings.Builder
	b.Grow(len(path))
	for name := range strings.SplitSeq(path, "/") {
		if len(name) > maxName {
			return "", fmt.Errorf("%w: %q has more than %d bytes", ErrName, name, maxName)
		}
		if b.Len() > 0 {
			b.WriteByte('\\')
		}
		encodeName(&b, name)
	}
	return b.String(), nil
}

func encodeName(b *strings.Builder, name string) {
	for i, r := range name {
		switch p := privateOf[r]; {
		case p != 0:
			r = p
		case r < 0x20:
			r += privateControl
		case r == '.' && i == len(name)-1:
			r = privatePeriod
		case r == ' ' && i == len(name)-1:
			r = privateSpace
		}
		b.WriteRune(r)
	}
}

// decodeName turns a name from the server into a local one. It answers false
// for names that no server may send and that could lead a reader elsewhere:
// "", ".", "..", and those with a slash, a backslash or NUL.
func decodeName(name string) (string, bool) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\\\x00") || !utf8.ValidString(name) {
		return "", false
	}
	if !strings.ContainsFunc(name, func(r rune) bool { return r >= privateControl && r <= privatePeriod }) {
		return name, len(name) <= 4*maxName
	}
	var b strings.Builder
	for i, r := range name {
		last := i+utf8.RuneLen(r) == len(name)
		switch {
		case r > privateControl && r < privateControl+0x20:
			r -= privateControl
		case r == privatePeriod && last:
			r = '.'
		case r == privateSpace && last:
			r = ' '
		default:
			for c, p := range privateOf {
				if p == r {
					r = c
					break
				}
			}
		}
		b.WriteRune(r)
	}
	// The mapping itself may have made one of the forbidden names. A mapped
	// backslash is an ordinary character here and stays.
	if s := b.String(); s != "." && s != ".." {
		return s, len(s) <= 4*maxName
	}
	return "", false
}
