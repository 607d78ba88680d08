// Package browse is the read side for people: what is in snapshots, where a
// file is and which versions of it there are, what differs between two
// snapshots, files and folders as streams and archives, and all of it as a
// read-only file system.
//
// Nothing here writes to a repository or needs a lock on it. A prune that runs
// meanwhile moves blobs; a View that misses one reads the index again.
//
// Trees are taken as hostile: names come checked from [backup.DecodeTree],
// depth and memory are bounded, and sizes are not believed where they decide
// how much is read.
package browse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// Options bound the memory of a View, in bytes. Zero means the default.
type Options struct {
	TreeBytes int64 // for decoded folders; by default 32 MiB
	DataBytes int64 // for file contents that are read at random; by default 64 MiB
}

const (
	defaultTreeBytes = 32 << 20
	defaultDataBytes = 64 << 20
	// reloadEvery is how often at most the index is read again because a
	// blob was missed.
	reloadEvery = 10 * time.Second
)

// A View reads one repository, whose index is loaded. It needs a Repo of its
// own, since it may load the index again. Its methods may be called
// concurrently.
type View struct {
	repo  *repo.Repo
	trees *cache[*backup.Tree]
	data  *cache[[]byte]
	zeros zeroIDs

	reloading sync.Mutex
	reloaded  time.Time
}

// New returns a View of r.
func New(r *repo.Repo, opt Options) *View {
	if opt.TreeBytes == 0 {
		opt.TreeBytes = defaultTreeBytes
	}
	if opt.DataBytes == 0 {
		opt.DataBytes = defaultDataBytes
	}
	return &View{
		repo:  r,
		trees: newCache(opt.TreeBytes, treeCost),
		data:  newCache(opt.DataBytes, func(b []byte) int64 { return int64(cap(b)) }),
	}
}

// treeCost estimates the memory of a tree in bytes.
func treeCost(t *backup.Tree) int64 {
	n := int64(cap(t.Nodes)) * int64(reflect.TypeFor[backup.Node]().Size())
	for i := range t.Nodes {
		node := &t.Nodes[i]
		n += int64(len(node.Name)+len(node.LinkTarget)+len(node.Generic)+len(node.Error)) + int64(cap(node.Content))*backup.IDSize
		for _, x := range node.Xattrs {
			n += int64(len(x.Name)+len(x.Value)) + int64(reflect.TypeFor[backup.Xattr]().Size())
		}
	}
	return n
}

// tree returns a tree, which is shared and must not be changed.
func (v *View) tree(ctx context.Context, id backup.ID) (*backup.Tree, error) {
	return v.trees.get(ctx, id, func(ctx context.Context) (*backup.Tree, error) {
		data, err := v.blob(ctx, backup.TreeBlob, id)
		if err != nil {
			return nil, err
		}
		t, err := backup.DecodeTree(data)
		if err != nil {
			return nil, fmt.Errorf("tree %s: %w", id.Short(), err)
		}
		return t, nil
	})
}

// blob reads a blob. A prune by somebody else may have moved it since the index
// was loaded.
func (v *View) blob(ctx context.Context, kind backup.BlobKind, id backup.ID) ([]byte, error) {
	data, err := v.repo.Blob(ctx, kind, id)
	if err == nil || !errors.Is(err, repo.ErrNoBlob) && !errors.Is(err, fs.ErrNotExist) {
		return data, err
	}
	if reloadErr := v.reload(ctx); reloadErr != nil {
		return nil, fmt.Errorf("%w (and afterwards: %w)", err, reloadErr)
	}
	return v.repo.Blob(ctx, kind, id)
}

// reload reads the index again unless that was done a moment ago.
func (v *View) reload(ctx context.Context) error {
	v.reloading.Lock()
	defer v.reloading.Unlock()
	if !v.reloaded.IsZero() && time.Since(v.reloaded) < reloadEvery {
		return nil
	}
	v.reloaded = time.Now()
	return v.repo.LoadIndex(ctx)
}

// An Entry is one file, folder or other thing at its place in a snapshot.
type Entry struct {
	// Path is absolute and clean, with slashes; the names in it are raw
	// bytes, to be escaped before they are shown.
	Path string
	// Node is shared and must not be changed. The root of a snapshot has one
	// without a name.
	Node *backup.Node
}

// Errors of paths, wrapped in a *fs.PathError.
var (
	// ErrNotFolder says that a path goes through, or leads to, something
	// that is no folder.
	ErrNotFolder = errors.New("it is not a folder")
	// ErrNotFile says that what has no contents was to be read.
	ErrNotFile = errors.New("it is not a file")
	// ErrTooDeep says that folders are nested deeper than anybody nests them.
	ErrTooDeep = errors.New("its folders are nested too deep; the rest is left out")
)

// clean returns path as Entry.Path has it.
func clean(p string) string { return path.Clean("/" + p) }

// Lookup returns what a snapshot holds at a path, which is taken from its root
// whether it begins with a slash or not. A missing one is an error that
// matches fs.ErrNotExist.
func (v *View) Lookup(ctx context.Context, s *backup.Snapshot, p string) (Entry, error) {
	p = clean(p)
	n, err := v.lookup(ctx, *s.Tree, p)
	if err != nil {
		return Entry{}, fmt.Errorf("snapshot %s: %w", s.ID.Short(), &fs.PathError{Op: "look up", Path: p, Err: err})
	}
	return Entry{p, n}, nil
}

// lookup returns the node at a clean path below a tree.
func (v *View) lookup(ctx context.Context, root backup.ID, p string) (*backup.Node, error) {
	n := rootNode(root)
	for name := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if name == "" {
			break // the root itself
		}
		if n.Type != backup.Dir {
			return nil, ErrNotFolder
		}
		t, err := v.tree(ctx, n.Subtree)
		if err != nil {
			return nil, err
		}
		if n = child(t, name); n == nil {
			return nil, fs.ErrNotExist
		}
	}
	return n, nil
}

// rootNode returns the node that stands for the root of a snapshot.
func rootNode(tree backup.ID) *backup.Node {
	return &backup.Node{Type: backup.Dir, Mode: fs.ModeDir | 0o755, Subtree: tree}
}

// child returns the entry of a folder with a name, or nil.
func child(t *backup.Tree, name string) *backup.Node {
	lo, hi := 0, len(t.Nodes)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if t.Nodes[mid].Name < name {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(t.Nodes) && t.Nodes[lo].Name == name {
		return &t.Nodes[lo]
	}
	return nil
}

// Covers reports whether a snapshot records a path, or something above or
// below it: whether its absence there means that it did not exist.
func Covers(s *backup.Snapshot, p string) bool {
	p = clean(p)
	for _, recorded := range s.Paths {
		if recorded = clean(recorded); within(p, recorded) || within(recorded, p) {
			return true
		}
	}
	return false
}

// within reports whether p is dir or below it; both are clean.
func within(p, dir string) bool {
	return dir == "/" || p == dir || strings.HasPrefix(p, dir) && p[len(dir)] == '/'
}
