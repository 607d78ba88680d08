package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// ErrDiffers says that a restored file is not what its snapshot holds.
var ErrDiffers = errors.New("its contents are not what the snapshot holds")

// A Sampled is a file of a snapshot that a drill restores.
type Sampled struct {
	File
	Size    uint64 // bytes
	Content []backup.ID
}

// Sample picks up to n different files of at most maxSize bytes at random,
// from snapshots, going down from the root to any entry with equal chance. It
// finds fewer where there are few. What can't be read on the way is an error:
// a drill has failed then. r.LoadIndex must have run.
func Sample(ctx context.Context, r *repo.Repo, snapshots []*backup.Snapshot, n int, maxSize uint64, rng *rand.Rand) ([]Sampled, error) {
	var files []Sampled
	seen := map[File]bool{}
	for tries := 20 * n; tries > 0 && len(files) < n && len(snapshots) > 0; tries-- {
		s := snapshots[rng.IntN(len(snapshots))]
		at, path := *s.Tree, "/"
		for len(path) < maxPath {
			t, err := r.Tree(ctx, at)
			if err != nil {
				return files, fmt.Errorf("sample files: snapshot %s: %q: %w", s.ID.Short(), path, err)
			}
			if len(t.Nodes) == 0 {
				break
			}
			node := t.Nodes[rng.IntN(len(t.Nodes))]
			path += node.Name
			if node.Type == backup.Dir {
				at, path = node.Subtree, path+"/"
				continue
			}
			f := File{s.ID, path}
			if node.Type == backup.File && node.Size <= maxSize && !seen[f] {
				seen[f] = true
				files = append(files, Sampled{f, node.Size, node.Content})
			}
			break
		}
	}
	return files, nil
}

// Compare reads a restored file and compares it, blob by blob, with what the
// snapshot holds. An error that matches ErrDiffers says that it is another.
func (s Sampled) Compare(r *repo.Repo, file io.Reader) error {
	var buf []byte
	var offset uint64
	for _, id := range s.Content {
		n, ok := r.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
		if !ok {
			return fmt.Errorf("%q: data %s: %w", s.Path, id.Short(), repo.ErrNoBlob)
		}
		if cap(buf) < int(n) {
			buf = make([]byte, n)
		}
		buf = buf[:n]
		_, err := io.ReadFull(file, buf)
		switch {
		case errors.Is(err, io.EOF) && n > 0 || errors.Is(err, io.ErrUnexpectedEOF):
			return fmt.Errorf("%q ends after less than %d bytes: %w", s.Path, s.Size, ErrDiffers)
		case err != nil && n > 0:
			return fmt.Errorf("%q: %w", s.Path, err)
		case backup.Hash(buf) != id:
			return fmt.Errorf("%q differs in the %d bytes from %d: %w", s.Path, n, offset, ErrDiffers)
		}
		offset += uint64(n)
	}
	if n, err := file.Read(make([]byte, 1)); n > 0 || offset != s.Size {
		return fmt.Errorf("%q has not the %d bytes that the snapshot says: %w", s.Path, s.Size, ErrDiffers)
	} else if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%q: %w", s.Path, err)
	}
	return nil
}

// Drill writes each sampled file into scratch, reads it back and compares it,
// and removes it again. It calls done with what came of each; an error of its
// own says that scratch can't be written. It restores contents alone; to try
// out a whole restore, let the restorer fill scratch and use Compare.
func Drill(ctx context.Context, r *repo.Repo, files []Sampled, scratch *os.Root, done func(Sampled, error)) error {
	for _, s := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		result, err := drill(ctx, r, s, scratch)
		if err != nil {
			return fmt.Errorf("restore drill: write %q to the scratch folder: %w", s.Path, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		done(s, result)
	}
	return nil
}

// drillName is the name of the file that a drill writes.
const drillName = "restore-drill"

// drill returns what came of one file, and what is wrong with scratch.
func drill(ctx context.Context, r *repo.Repo, s Sampled, scratch *os.Root) (result, err error) {
	f, err := scratch.OpenFile(drillName, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close(), scratch.Remove(drillName)) }()
	for _, id := range s.Content {
		b, err := r.Blob(ctx, backup.DataBlob, id)
		if err != nil {
			return fmt.Errorf("%q: %w", s.Path, err), nil
		}
		if _, err := f.Write(b); err != nil {
			return nil, err
		}
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return s.Compare(r, f), nil
}
