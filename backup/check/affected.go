package check

import (
	"context"
	"slices"
	"sync"

	"github.com/iot49/ide49-backup/backup"
)

// An edge says that a folder is in another one. Both are numbers of trees.
type edge struct{ child, parent uint32 }

// affected fills in the files that each problem affects. It reads all trees
// again, this time noting what is below what, and descends only into those
// with damage in or below them.
func (c *checker) affected(ctx context.Context) error {
	c.phase(FindingAffects, 0)
	index := c.r.Index()
	dirty := index.NewSet()
	var mu sync.Mutex
	var edges []edge
	var queue []uint32
	err := c.r.Walk(ctx, c.roots(), func(id backup.ID, t *backup.Tree, err error) error {
		defer c.advance(1)
		self, known := index.Number(tree(id))
		if !known {
			return nil // its parents see that
		}
		hit := err != nil
		var below []edge
		if err == nil {
			for i := range t.Nodes {
				n := &t.Nodes[i]
				if n.Type == backup.Dir {
					if child, ok := index.Number(tree(n.Subtree)); ok {
						below = append(below, edge{child, self})
					} else {
						hit = true
					}
				}
				hit = hit || c.hits(n)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		edges = append(edges, below...)
		if hit {
			dirty.Add(tree(id))
			queue = append(queue, self)
		}
		return nil
	})
	if err != nil {
		return err
	}
	// From each folder with damage up to those that hold it.
	slices.SortFunc(edges, func(a, b edge) int { return int(int64(a.child) - int64(b.child)) })
	isDirty := make(map[uint32]bool, len(queue))
	for _, n := range queue {
		isDirty[n] = true
	}
	for len(queue) > 0 {
		n := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		at, _ := slices.BinarySearchFunc(edges, n, func(e edge, n uint32) int { return int(int64(e.child) - int64(n)) })
		for ; at < len(edges) && edges[at].child == n; at++ {
			if p := edges[at].parent; !isDirty[p] {
				isDirty[p] = true
				queue = append(queue, p)
			}
		}
	}
	d := &descent{checker: c, dirty: func(id backup.ID) bool {
		n, known := index.Number(tree(id))
		return !known || isDirty[n]
	}}
	for _, s := range c.snapshots {
		if err := d.snapshot(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func tree(id backup.ID) backup.Blob { return backup.Blob{Kind: backup.TreeBlob, ID: id} }

// hits reports whether contents of a file are lost.
func (c *checker) hits(n *backup.Node) bool {
	for _, id := range n.Content {
		if _, bad := c.lost(backup.Blob{Kind: backup.DataBlob, ID: id}); bad {
			return true
		}
	}
	return false
}

// A descent goes down from the roots of snapshots to what is damaged.
type descent struct {
	*checker
	dirty  func(tree backup.ID) bool
	listed int
	visits int
}

func (d *descent) snapshot(ctx context.Context, s *backup.Snapshot) error {
	type folder struct {
		id   backup.ID
		path string // with a slash at the end
	}
	stack := []folder{{*s.Tree, "/"}}
	if !d.dirty(*s.Tree) {
		return nil
	}
	for len(stack) > 0 {
		f := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if d.visits++; d.visits > maxVisits || d.listed >= maxListed {
			d.giveUp()
			return nil
		}
		t, err := d.r.Tree(ctx, f.id)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			owners, _ := d.lost(tree(f.id))
			d.list(owners, File{s.ID, f.path})
			continue
		}
		var below []folder
		for i := range t.Nodes {
			n := &t.Nodes[i]
			path := f.path + n.Name
			if n.Type == backup.Dir && d.dirty(n.Subtree) {
				if len(path) > maxPath {
					d.giveUp()
					continue
				}
				below = append(below, folder{n.Subtree, path + "/"})
			}
			for _, id := range n.Content {
				if owners, bad := d.lost(backup.Blob{Kind: backup.DataBlob, ID: id}); bad {
					d.list(owners, File{s.ID, path})
				}
			}
		}
		slices.Reverse(below)
		stack = append(stack, below...)
	}
	return nil
}

// giveUp marks that no list may be complete.
func (d *descent) giveUp() {
	for _, p := range d.problems {
		p.More = p.More || !p.Harmless
	}
}

// list adds a file to problems, within bounds.
func (d *descent) list(owners []*Problem, f File) {
	for _, p := range owners {
		switch {
		case p == nil || len(p.Files) > 0 && p.Files[len(p.Files)-1] == f:
		case len(p.Files) >= d.opt.MaxFiles:
			p.More = true
		default:
			p.Files = append(p.Files, f)
			d.listed++
		}
	}
}
