package browse

import (
	"context"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"math/bits"
	"path"
	"sync"

	"github.com/iot49/ide49-backup/backup"
)

// entries walks a folder's nodes.
func (v *View) entries() *walker[*backup.Node] {
	return &walker[*backup.Node]{
		load: func(ctx context.Context, _ string, folder *backup.Node) ([]*backup.Node, error) {
			t, err := v.tree(ctx, folder.Subtree)
			if err != nil {
				return nil, err
			}
			items := make([]*backup.Node, len(t.Nodes))
			for i := range t.Nodes {
				items[i] = &t.Nodes[i]
			}
			return items, nil
		},
		name:     func(n *backup.Node) string { return n.Name },
		isFolder: func(n *backup.Node) bool { return n.Type == backup.Dir },
	}
}

// Ls yields what is in the folder at a path, sorted by name, or the file that
// is there. A recursive listing has each folder's entries after the folder.
//
// An error comes with the Entry that it concerns, and for a folder that can't
// be listed the walk goes on if the caller does.
func (v *View) Ls(ctx context.Context, s *backup.Snapshot, p string, recursive bool) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		top, err := v.Lookup(ctx, s, p)
		if err != nil {
			yield(Entry{Path: clean(p)}, err)
			return
		}
		v.below(ctx, top, recursive)(yield)
	}
}

// below yields the entries of a folder, or top itself if it is none.
func (v *View) below(ctx context.Context, top Entry, recursive bool) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if top.Node.Type != backup.Dir {
			yield(top, nil)
			return
		}
		if !recursive {
			v.list(ctx, top)(yield)
			return
		}
		v.entries().walk(ctx, top.Path, top.Node, func(path string, n *backup.Node, err error) verdict {
			if !yield(Entry{path, n}, listError(path, err)) || ctx.Err() != nil {
				return stop
			}
			return enter
		})
	}
}

// list yields the entries of one folder.
func (v *View) list(ctx context.Context, folder Entry) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		t, err := v.tree(ctx, folder.Node.Subtree)
		if err != nil {
			yield(folder, listError(folder.Path, err))
			return
		}
		for i := range t.Nodes {
			if !yield(Entry{path.Join(folder.Path, t.Nodes[i].Name), &t.Nodes[i]}, nil) {
				return
			}
		}
	}
}

func listError(path string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: "list", Path: path, Err: err}
}

// A Total is what a folder holds with everything below it. Something with
// several hard links counts at each of its names.
type Total struct {
	Files   uint64 // files
	Folders uint64 // folders, without itself
	Others  uint64 // links, devices and the like
	Bytes   uint64 // sizes of the files
}

// add adds o. Sums that a hostile tree lets overflow stay at the largest.
func (t *Total) add(o Total) {
	t.Files = saturate(t.Files, o.Files)
	t.Folders = saturate(t.Folders, o.Folders)
	t.Others = saturate(t.Others, o.Others)
	t.Bytes = saturate(t.Bytes, o.Bytes)
}

func saturate(a, b uint64) uint64 {
	sum, carry := bits.Add64(a, b, 0)
	if carry != 0 {
		return math.MaxUint64
	}
	return sum
}

// addNode counts one entry, for a folder without what is in it.
func (t *Total) addNode(n *backup.Node) {
	switch n.Type {
	case backup.File:
		t.add(Total{Files: 1, Bytes: n.Size})
	case backup.Dir:
		t.add(Total{Folders: 1})
	default:
		t.add(Total{Others: 1})
	}
}

// Totals adds up folders, each distinct one once; NewTotals makes one. Its
// methods may be called concurrently.
type Totals struct {
	v     *View
	mu    sync.Mutex
	known map[backup.ID]Total
}

// NewTotals returns an empty memory of totals. It takes about 100 bytes for
// each distinct folder.
func (v *View) NewTotals() *Totals { return &Totals{v: v, known: map[backup.ID]Total{}} }

// Of returns what is in a file or folder. It fails if any folder below can't
// be read.
func (t *Totals) Of(ctx context.Context, n *backup.Node) (Total, error) {
	var sum Total
	if n.Type != backup.Dir {
		sum.addNode(n)
		return sum, nil
	}
	return t.tree(ctx, n.Subtree)
}

// A partial is a folder whose entries are being added up.
type partial struct {
	id  backup.ID
	sum Total
}

// tree walks below a tree, folders that are known excepted, and knows each
// folder's total when it leaves it.
func (t *Totals) tree(ctx context.Context, id backup.ID) (Total, error) {
	if sum, ok := t.lookup(id); ok {
		return sum, nil
	}
	stack := []partial{{id: id}}
	leave := func(depth int) { // closes folders deeper than depth
		for len(stack) > depth {
			last := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			t.mu.Lock()
			t.known[last.id] = last.sum
			t.mu.Unlock()
			if len(stack) > 0 {
				stack[len(stack)-1].sum.add(last.sum)
			}
		}
	}
	var failed error
	w := t.v.depths()
	w.isFolder = func(d deep) bool {
		if d.node.Type != backup.Dir {
			return false
		}
		_, known := t.lookup(d.node.Subtree)
		return !known
	}
	w.walk(ctx, "/", deep{node: rootNode(id)}, func(_ string, d deep, err error) verdict {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			failed = err
			return stop
		}
		leave(d.depth)
		stack[len(stack)-1].sum.addNode(d.node)
		if d.node.Type != backup.Dir {
			return pass
		}
		if sum, ok := t.lookup(d.node.Subtree); ok { // maybe since its folder was entered
			stack[len(stack)-1].sum.add(sum)
			return pass
		}
		stack = append(stack, partial{id: d.node.Subtree})
		return enter
	})
	if failed != nil {
		return Total{}, fmt.Errorf("add up tree %s: %w", id.Short(), failed)
	}
	leave(0)
	sum, _ := t.lookup(id)
	return sum, nil
}

func (t *Totals) lookup(id backup.ID) (Total, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	sum, ok := t.known[id]
	return sum, ok
}

// A deep is a node with the number of folders that it is in.
type deep struct {
	node  *backup.Node
	depth int
}

func (v *View) depths() *walker[deep] {
	return &walker[deep]{
		load: func(ctx context.Context, _ string, folder deep) ([]deep, error) {
			tree, err := v.tree(ctx, folder.node.Subtree)
			if err != nil {
				return nil, err
			}
			items := make([]deep, len(tree.Nodes))
			for i := range tree.Nodes {
				items[i] = deep{&tree.Nodes[i], folder.depth + 1}
			}
			return items, nil
		},
		name: func(d deep) string { return d.node.Name },
	}
}
