package check

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// maxDepth bounds how deep folders may be nested for a snapshot to be mended:
// far more than any path that Linux can name.
const maxDepth = 10_000

// A SnapshotPlan says which snapshots get mended, and what of them is lost.
type SnapshotPlan struct {
	Mend     []backup.ID // snapshots that are rewritten without what is lost, oldest first
	Hopeless []Problem   // snapshots of which nothing can be saved
	Loss     Loss        // what is lost; the files of all that is in Mend

	r         *repo.Repo
	snapshots []*backup.Snapshot // of Mend
	all       []*backup.Snapshot
	malformed map[backup.ID]bool // trees
}

// Empty reports whether there is nothing to do.
func (p *SnapshotPlan) Empty() bool { return len(p.Mend)+len(p.Hopeless) == 0 }

// PlanSnapshots finds out which snapshots name what is not in the repository
// any more. It changes nothing in the store.
func PlanSnapshots(ctx context.Context, r *repo.Repo) (*SnapshotPlan, error) {
	p := &SnapshotPlan{r: r, malformed: map[backup.ID]bool{}}
	if err := p.plan(ctx); err != nil {
		return nil, fmt.Errorf("plan repair of snapshots: %w", err)
	}
	return p, nil
}

func (p *SnapshotPlan) plan(ctx context.Context) error {
	c := newChecker(p.r, Options{})
	if err := c.loadSnapshots(ctx); err != nil {
		return err
	}
	for _, s := range c.problems {
		p.Hopeless = append(p.Hopeless, *s)
	}
	c.problems = nil
	if err := loadIndex(ctx, p.r); err != nil {
		return err
	}
	if err := c.lookAtPacks(ctx); err != nil {
		return err
	}
	if len(c.bad) > 0 {
		return ErrPacksFirst
	}
	if err := c.lookAtTrees(ctx); err != nil {
		return err
	}
	for b := range c.blobs {
		if b.Kind != backup.TreeBlob || !p.r.Index().Has(b) {
			continue
		}
		// It is there, but no tree: as bad as if it were not. If it can't
		// be read, its pack is damaged.
		if _, err := p.r.Tree(ctx, b.ID); !errors.Is(err, backup.ErrMalformed) {
			return fmt.Errorf("%w: %w", ErrPacksFirst, err)
		}
		p.malformed[b.ID] = true
	}
	if len(c.blobs) == 0 {
		return nil
	}
	dirty, err := c.dirty(ctx)
	if err != nil {
		return err
	}
	for _, s := range c.snapshots {
		switch {
		case !dirty(*s.Tree):
		case p.lostTree(*s.Tree):
			p.Hopeless = append(p.Hopeless, Problem{Object: Object{Snapshot, s.ID}, Err: fmt.Errorf("its uppermost folder is lost: %w", repo.ErrNoBlob), Files: []File{{s.ID, "/"}}})
		default:
			p.Mend = append(p.Mend, s.ID)
			p.snapshots = append(p.snapshots, s)
		}
	}
	p.all = c.snapshots
	if err := c.list(ctx, dirty); err != nil {
		return err
	}
	for _, problem := range c.problems {
		if !problem.Harmless {
			p.Loss.Problems = append(p.Loss.Problems, *problem)
		}
	}
	return nil
}

func (p *SnapshotPlan) lostTree(id backup.ID) bool {
	return p.malformed[id] || !p.r.Index().Has(tree(id))
}

// Execute writes a new snapshot for each one to mend, with the tag
// backup.MendedTag and the old one's ID as Original, and then removes the old
// one. Nothing but what is lost is left out:
//
//   - a file of which a part is left keeps that part, under its name with
//     ".damaged" added, so that a restore never puts it in place of a good one;
//   - a file of which nothing is left is left out;
//   - a folder whose list is lost stays, empty.
//
// Hopeless snapshots are removed only if dropHopeless is set.
func (p *SnapshotPlan) Execute(ctx context.Context, dropHopeless bool) error {
	if err := p.execute(ctx, dropHopeless); err != nil {
		return fmt.Errorf("repair snapshots: %w", err)
	}
	return nil
}

func (p *SnapshotPlan) execute(ctx context.Context, dropHopeless bool) error {
	m := &mender{p: p, done: map[backup.ID]backup.ID{}}
	roots := make([]backup.ID, len(p.snapshots))
	err := p.r.Update(ctx, func(ctx context.Context, w *repo.Writer) (err error) {
		for i, s := range p.snapshots {
			if roots[i], err = m.tree(ctx, w, *s.Tree, 0); err != nil {
				return fmt.Errorf("snapshot %s: %w", s.ID.Short(), err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for i, old := range p.snapshots {
		s := *old
		s.Tree = &roots[i]
		if s.Original == nil {
			s.Original = &old.ID
		}
		if !s.HasTag(backup.MendedTag) {
			s.Tags = append(slices.Clone(s.Tags), backup.MendedTag)
		}
		if !p.saved(&s) {
			if _, err := p.r.SaveSnapshot(ctx, &s); err != nil {
				return err
			}
		}
		if err := p.r.RemoveSnapshot(ctx, old.ID); err != nil {
			return err
		}
	}
	if !dropHopeless {
		return nil
	}
	for _, h := range p.Hopeless {
		if err := p.r.RemoveSnapshot(ctx, h.Object.ID); err != nil {
			return err
		}
	}
	return nil
}

// saved reports whether a repair that was interrupted has saved s already.
func (p *SnapshotPlan) saved(s *backup.Snapshot) bool {
	return slices.ContainsFunc(p.all, func(o *backup.Snapshot) bool {
		return o.HasTag(backup.MendedTag) && o.Original != nil && *o.Original == *s.Original && *o.Tree == *s.Tree
	})
}

// A mender rewrites trees.
type mender struct {
	p    *SnapshotPlan
	done map[backup.ID]backup.ID // trees, and what became of them
}

func (m *mender) tree(ctx context.Context, w *repo.Writer, id backup.ID, depth int) (backup.ID, error) {
	if to, ok := m.done[id]; ok {
		return to, nil
	}
	if depth > maxDepth {
		return id, fmt.Errorf("folders are nested more than %d deep", maxDepth)
	}
	var t *backup.Tree
	var err error
	changed := false
	if m.p.lostTree(id) {
		t, changed = &backup.Tree{}, true
	} else if t, err = m.p.r.Tree(ctx, id); err != nil {
		return id, err
	}
	var nodes []backup.Node
	for _, n := range t.Nodes {
		switch n.Type {
		case backup.Dir:
			sub, err := m.tree(ctx, w, n.Subtree, depth+1)
			if err != nil {
				return id, err
			}
			changed = changed || sub != n.Subtree
			n.Subtree = sub
		case backup.File:
			left, size := m.left(&n)
			if len(left) == len(n.Content) {
				break
			}
			changed = true
			if size == 0 {
				continue
			}
			n.Error = fmt.Sprintf("%d of %d bytes are lost", max(n.Size, size)-size, n.Size)
			n.Content, n.Size = left, size
			if n.Name = freeName(t.Nodes, nodes, n.Name); n.Name == "" {
				continue
			}
		}
		nodes = append(nodes, n)
	}
	to := id
	if changed {
		slices.SortFunc(nodes, func(a, b backup.Node) int { return strings.Compare(a.Name, b.Name) })
		s, err := w.SaveTree(ctx, &backup.Tree{Nodes: nodes})
		if err != nil {
			return id, err
		}
		to = s.ID
	}
	m.done[id] = to
	return to, nil
}

// left returns the blobs of a file that are there, and their bytes.
func (m *mender) left(n *backup.Node) (ids []backup.ID, size uint64) {
	for _, id := range n.Content {
		if length, ok := m.p.r.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id}); ok {
			ids = append(ids, id)
			size += uint64(length)
		}
	}
	return ids, size
}

// freeName returns a name for what is left of a file, or "" if all that would
// do are taken.
func freeName(before, after []backup.Node, name string) string {
	taken := func(s string) bool {
		same := func(n backup.Node) bool { return n.Name == s }
		return slices.ContainsFunc(before, same) || slices.ContainsFunc(after, same)
	}
	for _, suffix := range []string{".damaged", ".damaged2", ".damaged3", ".damaged4"} {
		s := name[:min(len(name), backup.MaxNameLen-len(suffix))] + suffix
		if !taken(s) {
			return s
		}
	}
	return ""
}
