package browse

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"iter"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/backup"
)

// A Version is one state of a file or folder and the snapshots that hold it.
type Version struct {
	// Node is shared and must not be changed. In a History it is nil where
	// snapshots lack the file.
	Node *backup.Node
	// Snapshots are in the order in which they were asked about.
	Snapshots []*backup.Snapshot
}

// Differences says in what two nodes differ.
type Differences uint8

// What may differ. Access and change times, inode and device numbers and
// link counts do not count: they are different after every restore.
const (
	DiffersType    Differences = 1 << iota
	DiffersContent             // what a file holds, where a link points to, which device it is
	DiffersMode                // permissions
	DiffersOwner               // user or group, by number
	DiffersTime                // modification time
	DiffersXattrs
)

var differenceNames = []string{"type", "content", "mode", "owner", "time", "attributes"}

// String returns the differences as words joined by commas.
func (d Differences) String() string {
	var words []string
	for i, name := range differenceNames {
		if d&(1<<i) != 0 {
			words = append(words, name)
		}
	}
	return strings.Join(words, ",")
}

// Compare returns in what two nodes differ, names and what is in folders
// excepted.
func Compare(a, b *backup.Node) (d Differences) {
	if a.Type != b.Type {
		d |= DiffersType
	}
	// Whether the size differs is a matter of the content, but for damaged
	// trees.
	if a.Size != b.Size || a.LinkTarget != b.LinkTarget || a.Device != b.Device || !slices.Equal(a.Content, b.Content) {
		d |= DiffersContent
	}
	if a.Mode != b.Mode {
		d |= DiffersMode
	}
	if a.UID != b.UID || a.GID != b.GID {
		d |= DiffersOwner
	}
	if !a.ModTime.Equal(b.ModTime) {
		d |= DiffersTime
	}
	if !slices.EqualFunc(a.Xattrs, b.Xattrs, func(x, y backup.Xattr) bool { return x.Name == y.Name && bytes.Equal(x.Value, y.Value) }) {
		d |= DiffersXattrs
	}
	return d
}

// History yields the versions of what is at a path, in the order of snapshots,
// which should be by time. A file that did not change over several snapshots
// is one version; one that went away and came back is a version with a nil
// Node in between. Snapshots before the first that has it are passed over.
//
// An error concerns one snapshot, which comes alone in the Version.
func (v *View) History(ctx context.Context, snapshots []*backup.Snapshot, p string) iter.Seq2[Version, error] {
	p = clean(p)
	return func(yield func(Version, error) bool) {
		h := &history{v: v, names: strings.FieldsFunc(p, func(r rune) bool { return r == '/' })}
		h.steps = make([]historyStep, len(h.names)+1)
		var last Version
		for _, s := range snapshots {
			if ctx.Err() != nil {
				yield(Version{}, ctx.Err())
				return
			}
			n, err := h.lookup(ctx, *s.Tree)
			switch {
			case err != nil:
				err = fmt.Errorf("snapshot %s: %w", s.ID.Short(), &fs.PathError{Op: "look up", Path: p, Err: err})
				if !yield(Version{Snapshots: []*backup.Snapshot{s}}, err) {
					return
				}
			case last.Snapshots == nil && n == nil:
			case last.Snapshots != nil && sameVersion(last.Node, n):
				last.Snapshots = append(last.Snapshots, s)
			default:
				if last.Snapshots != nil && !yield(last, nil) {
					return
				}
				last = Version{n, []*backup.Snapshot{s}}
			}
		}
		if last.Snapshots != nil {
			yield(last, nil)
		}
	}
}

// sameVersion reports whether two nodes, which may be nil, are one version. Of
// folders also what is in them counts.
func sameVersion(a, b *backup.Node) bool {
	if a == nil || b == nil {
		return a == b
	}
	return Compare(a, b) == 0 && a.Subtree == b.Subtree
}

// A history looks one path up in many snapshots. Where a snapshot has the same
// folder on the way as the one before, the answer is the same.
type history struct {
	v     *View
	names []string
	steps []historyStep
}

type historyStep struct {
	tree backup.ID
	node *backup.Node // what the rest of the path leads to, or nil
}

func (h *history) lookup(ctx context.Context, root backup.ID) (*backup.Node, error) {
	n := rootNode(root)
	var found *backup.Node
	depth := 0
	for ; depth < len(h.names); depth++ {
		if n.Type != backup.Dir {
			break
		}
		if h.steps[depth].tree == n.Subtree {
			found = h.steps[depth].node
			break
		}
		t, err := h.v.tree(ctx, n.Subtree)
		if err != nil {
			clear(h.steps[:depth])
			return nil, err
		}
		h.steps[depth].tree = n.Subtree
		if n = child(t, h.names[depth]); n == nil {
			depth++
			break
		}
	}
	if depth == len(h.names) && n != nil {
		found = n
	}
	for i := range h.steps[:min(depth, len(h.names))] {
		h.steps[i].node = found
	}
	return found, nil
}
