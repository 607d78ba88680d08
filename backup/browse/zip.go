package browse

import (
	"archive/zip"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"unicode/utf8"

	"github.com/iot49/ide49-backup/backup"
)

// zipArchive writes zip. Sizes and checksums follow each file's contents, so
// that nothing has to be read twice.
type zipArchive struct {
	v    *View
	zw   *zip.Writer
	file io.Writer
}

func newZip(v *View, w io.Writer) *zipArchive { return &zipArchive{v: v, zw: zip.NewWriter(w)} }

// maxZipName is the longest name in bytes that the format has room for.
const maxZipName = 1<<16 - 1

func (a *zipArchive) begin(e Entry, f *File) error {
	n := e.Node
	h := &zip.FileHeader{Name: zipName(relative(e.Path)), Modified: tarTime(n.ModTime), Method: zip.Store}
	if n.Type == backup.Dir {
		h.Name += "/"
	}
	if len(h.Name) > maxZipName {
		return &skipError{errNameTooLong}
	}
	mode := n.Mode & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
	switch n.Type {
	case backup.File:
		if a.compresses(f) {
			h.Method = zip.Deflate
		}
	case backup.Dir:
		mode |= fs.ModeDir
	case backup.Symlink:
		mode |= fs.ModeSymlink
	default:
		return &skipError{fmt.Errorf("%s: %w", n.Type, ErrNotInArchive)}
	}
	h.SetMode(mode)
	var err error
	if a.file, err = a.zw.CreateHeader(h); err != nil {
		return err
	}
	if n.Type == backup.Symlink {
		_, err = io.WriteString(a.file, n.LinkTarget)
	}
	return err
}

// compresses reports whether it is worth to compress a file: whether the
// repository found it worth, or could not know.
func (a *zipArchive) compresses(f *File) bool {
	if len(f.node.Content) == 0 {
		return false
	}
	for loc := range a.v.repo.Index().Lookup(backup.Blob{Kind: backup.DataBlob, ID: f.node.Content[0]}) {
		return loc.Compressed()
	}
	return false
}

func (a *zipArchive) contents(p *piece) error { return p.write(a.file) }

func (a *zipArchive) end() error { return a.zw.Close() }

// zipName makes a path safe for whatever system unpacks it, such that no two
// paths become one: Windows takes a backslash as a slash and gives a colon a
// meaning, and what is not UTF-8 or can't be printed depends on the reader.
func zipName(path string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := 0; i < len(path); {
		r, n := utf8.DecodeRuneInString(path[i:])
		if r == utf8.RuneError && n == 1 || r < ' ' || r == 0x7f || strings.ContainsRune(`\:*?"<>|%`, r) {
			b.WriteByte('%')
			b.WriteByte(digits[path[i]>>4])
			b.WriteByte(digits[path[i]&15])
			i++
			continue
		}
		b.WriteString(path[i : i+n])
		i += n
	}
	return b.String()
}
