package browse

import (
	"context"
	"iter"

	"github.com/iot49/ide49-backup/backup"
)

// A Change is one path at which two snapshots differ.
type Change struct {
	Path string
	// Before and After are shared and must not be changed. One of them is nil
	// where something was added or removed; where the type changed, both
	// are there, and a folder's contents follow as added or removed.
	Before, After *backup.Node
	// What differs; 0 where something was added or removed.
	What Differences
}

// A DiffTotal adds up a Diff.
type DiffTotal struct {
	Added   Total // what only the second snapshot has
	Removed Total // what only the first has
	Changed Total // what has other contents or another type, as it is in the second
	// Metadata counts what differs in nothing else.
	Metadata uint64

	// DataAdded are the bytes of the distinct chunks that added and changed
	// files of the second snapshot have and removed and changed files of
	// the first have not; DataRemoved the other way round. Renaming a file
	// changes neither. Equal folders are not looked at: a copy of a file
	// that is in one counts as added.
	DataAdded, DataRemoved uint64
}

// A pair is what two snapshots have at one path.
type pair struct {
	before, after *backup.Node // at most one nil
}

func (p pair) name() string {
	if p.after != nil {
		return p.after.Name
	}
	return p.before.Name
}

// folders returns the folders to compare; either is zero where there is none.
func (p pair) folders() (before, after backup.ID) {
	if p.before != nil && p.before.Type == backup.Dir {
		before = p.before.Subtree
	}
	if p.after != nil && p.after.Type == backup.Dir {
		after = p.after.Subtree
	}
	return before, after
}

// Diff yields what differs between two entries, mostly the same folder of two
// snapshots, by path; the paths are those of the second. Folders that are
// equal are not read. Where total is not nil, it is filled in when the sequence
// has ended by itself.
//
// An error comes with the path of the folder that it concerns; the comparison
// goes on if the caller does, but the totals lack that folder.
func (v *View) Diff(ctx context.Context, before, after Entry, total *DiffTotal) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		var sum DiffTotal
		added, removed := map[backup.ID]struct{}{}, map[backup.ID]struct{}{}
		// one tells of a pair that is not equal, or is a folder's.
		one := func(path string, p pair) bool {
			if p.before != nil {
				note(removed, p.before)
			}
			if p.after != nil {
				note(added, p.after)
			}
			c := Change{Path: path, Before: p.before, After: p.after}
			switch {
			case p.before == nil:
				sum.Added.addNode(p.after)
			case p.after == nil:
				sum.Removed.addNode(p.before)
			default:
				c.What = Compare(p.before, p.after)
				if c.What == 0 {
					return true
				}
				if c.What&(DiffersType|DiffersContent) != 0 {
					sum.Changed.addNode(p.after)
				} else {
					sum.Metadata++
				}
			}
			return yield(c, nil)
		}
		root := pair{before.Node, after.Node}
		if before.Node.Type != backup.Dir || after.Node.Type != backup.Dir {
			if !one(after.Path, root) {
				return
			}
		}
		finished := true
		if b, a := root.folders(); b != a {
			v.pairs().walk(ctx, after.Path, root, func(path string, p pair, err error) verdict {
				switch {
				case ctx.Err() != nil:
					yield(Change{Path: path}, ctx.Err())
				case err != nil && yield(Change{Path: path, Before: p.before, After: p.after}, listError(path, err)):
					return enter
				case err == nil && one(path, p):
					return enter
				}
				finished = false
				return stop
			})
		}
		if finished && total != nil {
			sum.DataAdded, sum.DataRemoved = v.only(added, removed), v.only(removed, added)
			*total = sum
		}
	}
}

func note(set map[backup.ID]struct{}, n *backup.Node) {
	for _, id := range n.Content {
		set[id] = struct{}{}
	}
}

// only returns the bytes of the data blobs in set that are not in others.
func (v *View) only(set, others map[backup.ID]struct{}) (sum uint64) {
	for id := range set {
		if _, ok := others[id]; !ok {
			n, _ := v.repo.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
			sum += uint64(n)
		}
	}
	return sum
}

// pairs walks two folders side by side, without what is equal in them.
func (v *View) pairs() *walker[pair] {
	nodes := func(ctx context.Context, id backup.ID) ([]backup.Node, error) {
		if id.IsZero() {
			return nil, nil
		}
		t, err := v.tree(ctx, id)
		if err != nil {
			return nil, err
		}
		return t.Nodes, nil
	}
	return &walker[pair]{
		load: func(ctx context.Context, _ string, folder pair) ([]pair, error) {
			b, a := folder.folders()
			before, err := nodes(ctx, b)
			if err != nil {
				return nil, err
			}
			after, err := nodes(ctx, a)
			if err != nil {
				return nil, err
			}
			var items []pair
			for len(before) > 0 || len(after) > 0 {
				switch {
				case len(after) == 0 || len(before) > 0 && before[0].Name < after[0].Name:
					items = append(items, pair{before: &before[0]})
					before = before[1:]
				case len(before) == 0 || after[0].Name < before[0].Name:
					items = append(items, pair{after: &after[0]})
					after = after[1:]
				default:
					if p := (pair{&before[0], &after[0]}); !sameVersion(p.before, p.after) {
						items = append(items, p)
					}
					before, after = before[1:], after[1:]
				}
			}
			return items, nil
		},
		name: pair.name,
		isFolder: func(p pair) bool {
			b, a := p.folders()
			return b != a
		},
	}
}
