package browse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/backup"
)

// A Format is a kind of archive.
type Format uint8

// The formats of archives.
const (
	// Tar is POSIX.1-2001's: hard links, devices, extended attributes (as
	// SCHILY.xattr records, which GNU tar, star and bsdtar read) and holes
	// (as GNU tar's sparse format 1.0) are kept. Sockets are left out.
	Tar Format = iota
	// Zip keeps files, folders and links with their permissions. A byte of
	// a name that means something on another system, or is not UTF-8, is
	// written as % and two hexadecimal digits.
	Zip
)

// Errors of what an archive can't hold.
var (
	ErrNotInArchive = errors.New("this kind of archive can't hold it; it is left out")
	errAttributes   = errors.New("an archive can't hold all its extended attributes; some are left out")
	errNameTooLong  = errors.New("its name is too long for an archive; it is left out")
)

// An archive is a format's writer. begin returns a *skipError for what concerns
// only one entry.
type archive interface {
	// begin starts an entry.
	begin(e Entry, f *File) error
	// contents takes the next blob of the file that was begun last.
	contents(p *piece) error
	end() error
}

// A skipError says why one entry is not in an archive.
type skipError struct{ err error }

func (e *skipError) Error() string { return e.err.Error() }
func (e *skipError) Unwrap() error { return e.err }

// Dump writes what is at a path, with everything below it, to w as an archive.
// Names in it are whole paths without the slash at the beginning. It streams:
// memory does not grow with the number or size of files, but for about 100
// bytes and the path for each file with hard links of which not all have been
// met yet.
//
// What can't be read or is not for this format is left out and given to
// problem, which may be nil. A file that turns out to be damaged after its
// beginning has been written ends the dump with an error, as nothing in the
// archive would tell.
func (v *View) Dump(ctx context.Context, w io.Writer, format Format, top Entry, problem func(path string, err error)) error {
	if problem == nil {
		problem = func(string, error) {}
	}
	var a archive
	switch format {
	case Tar:
		a = newTar(w, problem)
	case Zip:
		a = newZip(v, w)
	default:
		return fmt.Errorf("dump: unknown format %d", format)
	}
	entries := func(yield func(Entry, error) bool) {
		if top.Node.Type == backup.Dir && top.Path != "/" && !yield(top, nil) {
			return
		}
		v.below(ctx, top, true)(yield)
	}
	var path string
	skip := false
	err := v.stream(ctx, entries, func(p piece) error {
		err := p.err
		if p.entry != nil {
			path, skip = p.entry.Path, false
			if err == nil {
				err = a.begin(*p.entry, p.file)
			} else {
				err = &skipError{err}
			}
		} else if skip {
			return nil
		} else if err == nil {
			err = a.contents(&p)
		}
		if s, ok := errors.AsType[*skipError](err); ok && ctx.Err() == nil {
			skip = true
			problem(path, s.err)
			return nil
		}
		if err != nil {
			return &fs.PathError{Op: "archive", Path: path, Err: err}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := a.end(); err != nil {
		return fmt.Errorf("finish the archive: %w", err)
	}
	return nil
}

// A linkKey is what names of one file have in common.
type linkKey struct{ device, inode uint64 }

// A firstName is the first of a file's names.
type firstName struct {
	path    string
	content []backup.ID
	left    uint64 // names still to come
}

// hardLinks finds the names of one file among the entries of a snapshot.
type hardLinks map[linkKey]*firstName

// first returns the name under which a file has been met before, or "". Files
// that claim to be one but have other contents are not.
func (h hardLinks) first(path string, n *backup.Node) string {
	if n.Type != backup.File || n.Links < 2 || n.Inode == 0 {
		return ""
	}
	k := linkKey{n.DeviceID, n.Inode}
	known, ok := h[k]
	if !ok {
		h[k] = &firstName{path, n.Content, n.Links - 1}
		return ""
	}
	if !slices.Equal(known.content, n.Content) {
		return ""
	}
	if known.left--; known.left == 0 {
		delete(h, k)
	}
	return known.path
}

// relative returns a path as a name in an archive.
func relative(path string) string { return strings.TrimPrefix(path, "/") }
