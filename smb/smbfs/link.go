package smbfs

import (
	"bytes"
	"crypto/md5"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/iot49/ide49-backup/smb"
)

// Symbolic links are files of exactly this form and size, which macOS and the
// kernel's client (mfsymlinks) use too: "XSym", the target's length with four
// digits, the MD5 of the target, each on a line, and the target, filled up
// with a newline and spaces.
const (
	linkSize   = linkHead + linkTarget
	linkHead   = 5 + 5 + 33
	linkTarget = 1024
)

// encodeLink makes the file for a link, or answers false if its target is too
// long.
func encodeLink(to string) ([]byte, bool) {
	if len(to) == 0 || len(to) > linkTarget {
		return nil, false
	}
	b := fmt.Appendf(make([]byte, 0, linkSize), "XSym\n%04d\n%x\n%s", len(to), md5.Sum([]byte(to)), to)
	if len(b) < linkSize {
		b = append(b, '\n')
	}
	return append(b, bytes.Repeat([]byte{' '}, linkSize-len(b))...), true
}

// decodeLink returns the target of a link, or false if the file isn't one.
func decodeLink(b []byte) (string, bool) {
	if len(b) != linkSize || !bytes.HasPrefix(b, []byte("XSym\n")) || b[9] != '\n' || b[linkHead-1] != '\n' {
		return "", false
	}
	n, err := strconv.ParseUint(string(b[5:9]), 10, 16)
	if err != nil || n == 0 || n > linkTarget {
		return "", false
	}
	to := b[linkHead : linkHead+n]
	if fmt.Sprintf("%x", md5.Sum(to)) != string(b[10:linkHead-1]) || bytes.IndexByte(to, 0) >= 0 {
		return "", false
	}
	return string(to), true
}

// readLink looks whether a file is a link.
func (m *Mount) readLink(name string, info smb.Info) (string, bool, error) {
	if info.Dir || info.Size != linkSize {
		return "", false, nil
	}
	f, err := m.sh.Open(m.ctx, name, os.O_RDONLY)
	if err != nil {
		return "", false, err
	}
	b := make([]byte, linkSize)
	_, err = f.ReadAt(m.ctx, b, 0)
	if cerr := f.Close(m.ctx); err == nil {
		err = cerr
	}
	if err != nil && err != io.EOF {
		return "", false, err
	}
	to, ok := decodeLink(b)
	return to, ok, nil
}
