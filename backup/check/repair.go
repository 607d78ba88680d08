package check

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// Repairs are made in this order, each under an exclusive lock from before the
// plan until after its Execute:
//
//  1. PlanIndex makes the index say what packs hold.
//  2. PlanPacks saves the intact blobs of damaged packs; Run with Read All
//     finds those.
//  3. PlanSnapshots takes out of snapshots what is lost for good.
//
// Between 2 and 3, a backup heals what its source files still have.

// Errors of repairs.
var (
	ErrIndexFirst = errors.New("the index is damaged; repair it first, with `ide49-backup repair index`")
	ErrPacksFirst = errors.New("packs are damaged or missing; repair the index and then those packs first")
)

// A Loss lists the files of snapshots that are not whole, because of what has
// been damaged: a repair does not add to it, and can't undo it.
type Loss struct {
	Problems []Problem // each blob that is lost, with the files it affects
}

// Files returns the files that are affected, without doubles, by snapshot and
// path, and whether there are more.
func (l Loss) Files() (files []File, more bool) {
	seen := map[File]bool{}
	for _, p := range l.Problems {
		more = more || p.More
		for _, f := range p.Files {
			if !seen[f] {
				seen[f] = true
				files = append(files, f)
			}
		}
	}
	slices.SortStableFunc(files, func(a, b File) int { return compareFiles(a, b) })
	return files, more
}

// loss finds what is lost with the index that r has.
func loss(ctx context.Context, r *repo.Repo) (Loss, error) {
	c := newChecker(r, Options{})
	var l Loss
	if err := c.loadSnapshots(ctx); err != nil {
		return l, err
	}
	c.problems = nil // what is wrong with snapshots is not of interest here
	if err := c.lookAtTrees(ctx); err != nil {
		return l, err
	}
	if len(c.blobs) > 0 {
		if err := c.affected(ctx); err != nil {
			return l, err
		}
	}
	for _, p := range c.problems {
		l.Problems = append(l.Problems, *p)
	}
	return l, nil
}

// An IndexPlan says what is wrong with the index and how it gets right.
type IndexPlan struct {
	Damaged []backup.ID // index files that can't be read: removed
	Add     []PackState // packs that no readable index names
	Correct []PackState // packs of which the index says something else than they do
	Drop    []backup.ID // packs that are named but missing
	Left    []PackState // packs that no index names and whose header is damaged: left alone
	Loss    Loss        // what is lost then

	r      *repo.Repo
	change repo.IndexChange
}

// A PackState is what is known of a pack.
type PackState struct {
	repo.PackFile
	Blobs int   // that can be read, as far as was tried
	Lost  int   // that can't
	Err   error // why
}

// Empty reports whether there is nothing to do.
func (p *IndexPlan) Empty() bool {
	return len(p.Damaged)+len(p.Add)+len(p.Correct)+len(p.Drop) == 0
}

// PlanIndex compares the index with the packs in the store. The headers of
// packs that are not in the index, or of another size than it says, are read;
// with all set those of all packs. It changes nothing in the store.
func PlanIndex(ctx context.Context, r *repo.Repo, all bool) (*IndexPlan, error) {
	p := &IndexPlan{r: r}
	if err := p.plan(ctx, all); err != nil {
		return nil, fmt.Errorf("plan repair of the index: %w", err)
	}
	return p, nil
}

func (p *IndexPlan) plan(ctx context.Context, all bool) error {
	c := newChecker(p.r, Options{})
	err := p.r.LoadIntactIndex(ctx, func(id backup.ID, err error) error {
		p.Damaged = append(p.Damaged, id)
		return c.alive(ctx, err)
	})
	if err != nil {
		return err
	}
	index := p.r.Index()
	present := map[backup.ID]bool{}
	for f, err := range p.r.PackFiles(ctx) {
		if err != nil {
			return err
		}
		present[f.ID] = true
		indexed := index.PackBlobs(f.ID)
		known := index.HasPack(f.ID)
		if known && !all && repo.PackSize(indexed) == f.Size {
			continue
		}
		header, err := p.r.ReadHeader(ctx, f.ID, f.Size)
		switch {
		case err != nil:
			if err := c.alive(ctx, err); err != nil {
				return err
			}
			if !known {
				p.Left = append(p.Left, PackState{PackFile: f, Err: err})
			}
			continue // what the index says is the best there is
		case slices.Equal(header, indexed) && known:
			continue
		case known:
			p.Correct = append(p.Correct, PackState{PackFile: f, Blobs: len(header)})
		default:
			p.Add = append(p.Add, PackState{PackFile: f, Blobs: len(header)})
		}
		p.change.Add = append(p.change.Add, repo.IndexPack{ID: f.ID, Blobs: header})
	}
	for id := range index.Packs() {
		if !present[id] {
			p.Drop = append(p.Drop, id)
		}
	}
	p.change.Drop, p.change.Remove = p.Drop, p.Damaged
	if err := p.r.PreviewIndex(ctx, p.change); err != nil {
		return err
	}
	p.Loss, err = loss(ctx, p.r)
	return err
}

// Execute makes the index right. Interrupted at any moment, it can be planned
// and made again.
func (p *IndexPlan) Execute(ctx context.Context) error {
	if p.Empty() {
		return p.r.LoadIndex(ctx)
	}
	if err := p.r.ChangeIndex(ctx, p.change); err != nil {
		return fmt.Errorf("repair index: %w", err)
	}
	return p.r.LoadIndex(ctx)
}

// A PackPlan says what can be saved of damaged packs.
type PackPlan struct {
	Packs []PackState // by name
	Loss  Loss        // what is lost with them

	r      *repo.Repo
	intact []repo.IndexPack
}

// PlanPacks reads the given packs and finds out which of their blobs are
// intact. It changes nothing in the store. A pack that turns out to be whole is
// left out of the plan.
func PlanPacks(ctx context.Context, r *repo.Repo, packs []backup.ID) (*PackPlan, error) {
	p := &PackPlan{r: r}
	if err := p.plan(ctx, packs); err != nil {
		return nil, fmt.Errorf("plan repair of packs: %w", err)
	}
	return p, nil
}

func (p *PackPlan) plan(ctx context.Context, packs []backup.ID) error {
	if err := loadIndex(ctx, p.r); err != nil {
		return err
	}
	c := newChecker(p.r, Options{})
	sizes := map[backup.ID]int64{}
	for f, err := range p.r.PackFiles(ctx) {
		if err != nil {
			return err
		}
		sizes[f.ID] = f.Size
	}
	packs = slices.Clone(packs)
	slices.SortFunc(packs, func(a, b backup.ID) int { return slices.Compare(a[:], b[:]) })
	change := repo.IndexChange{}
	for _, id := range slices.Compact(packs) {
		size, ok := sizes[id]
		if !ok {
			if p.r.Index().HasPack(id) {
				return fmt.Errorf("pack %s is missing: %w", id.Short(), ErrIndexFirst)
			}
			return fmt.Errorf("pack %s is %w", id.Short(), ErrMissing)
		}
		state := PackState{PackFile: repo.PackFile{ID: id, Size: size}}
		intact := repo.IndexPack{ID: id}
		var strange error
		whole := p.r.VerifyPack(ctx, id, size, p.r.Index().PackBlobs(id), func(b repo.PackedBlob, err error) {
			if err == nil {
				intact.Blobs = append(intact.Blobs, b)
				return
			}
			state.Lost++
			if !errors.Is(err, repo.ErrDamaged) {
				strange = err
			}
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if strange == nil && whole != nil && !errors.Is(whole, repo.ErrDamaged) {
			strange = whole
		}
		if strange != nil {
			if err := c.alive(ctx, strange); err != nil {
				return err
			}
		}
		if whole == nil && state.Lost == 0 {
			continue
		}
		slices.SortStableFunc(intact.Blobs, func(a, b repo.PackedBlob) int { return cmp.Compare(a.Offset, b.Offset) })
		if state.Blobs = len(intact.Blobs); whole != nil {
			state.Err = oneLine(whole)
		}
		p.Packs = append(p.Packs, state)
		p.intact = append(p.intact, intact)
		change.Add = append(change.Add, intact)
	}
	// As if each pack held no more than what is intact of it.
	if err := p.r.PreviewIndex(ctx, change); err != nil {
		return err
	}
	var err error
	p.Loss, err = loss(ctx, p.r)
	return err
}

// Execute stores the intact blobs of the packs in new ones, then removes the
// old. What is intact is in the repository at any moment.
func (p *PackPlan) Execute(ctx context.Context) error {
	if err := p.execute(ctx); err != nil {
		return fmt.Errorf("repair packs: %w", err)
	}
	return p.r.LoadIndex(ctx)
}

func (p *PackPlan) execute(ctx context.Context) error {
	if len(p.Packs) == 0 {
		return nil
	}
	err := p.r.Update(ctx, func(ctx context.Context, w *repo.Writer) error {
		for _, pack := range p.intact {
			err := p.r.ReadBlobs(ctx, pack.ID, pack.Blobs, func(b repo.PackedBlob, plain []byte, err error) error {
				if err != nil {
					return err // it was intact a moment ago
				}
				// A copy elsewhere may be damaged unnoticed: keep this one.
				return w.SaveCopy(ctx, b.Kind, plain)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	old := make([]backup.ID, len(p.Packs))
	for i, s := range p.Packs {
		old[i] = s.ID
	}
	if err := p.r.ChangeIndex(ctx, repo.IndexChange{Drop: old}); err != nil {
		return err
	}
	return p.r.RemovePacks(ctx, old)
}

// loadIndex loads the index for a repair that needs it whole.
func loadIndex(ctx context.Context, r *repo.Repo) error {
	return r.LoadIntactIndex(ctx, func(_ backup.ID, err error) error { return fmt.Errorf("%w: %w", ErrIndexFirst, err) })
}
