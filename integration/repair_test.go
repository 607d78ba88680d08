package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/check"
	"github.com/iot49/ide49-backup/backup/repo"
)

// exclusively runs fn with the repository locked.
func (p *place) exclusively(t testing.TB, fn func(ctx context.Context, r *repo.Repo) error) {
	t.Helper()
	r := p.open(t)
	must(t, r.WithLock(t.Context(), true, func(ctx context.Context) error { return fn(ctx, r) }))
}

func (p *place) prune(t testing.TB, opt repo.PruneOptions) {
	t.Helper()
	p.exclusively(t, func(ctx context.Context, r *repo.Repo) error {
		plan, err := r.PlanPrune(ctx, opt)
		if err == nil {
			_, err = plan.Execute(ctx, nil)
		}
		return err
	})
}

// whole is our own check of every byte.
func (p *place) whole(t testing.TB) {
	t.Helper()
	for problem, err := range check.Run(t.Context(), p.open(t), check.Options{Read: check.All()}) {
		must(t, err)
		if !problem.Harmless {
			t.Error(problem)
		}
	}
}

// We and stock restic back up, forget, prune and repair in one repository at
// random; after each change of ours restic finds every byte in order, after
// each of restic's we do.
func TestPruneInTurn(t *testing.T) {
	rng := rand.New(rand.NewPCG(49, 3))
	src := filepath.Join(t.TempDir(), "volume")
	must(t, os.MkdirAll(filepath.Join(src, "sub", "deep"), 0o755))
	p := newPlace(t)
	p.init(t)
	all := func() []*backup.Snapshot {
		list, err := p.open(t).Snapshots(t.Context())
		must(t, err)
		return list
	}
	for step := range 16 {
		for range 4 {
			dir := []string{"", "sub", "sub/deep"}[rng.IntN(3)]
			name := filepath.Join(src, dir, fmt.Sprint("file ", rng.IntN(12)))
			must(t, os.WriteFile(name, random(rng.Uint64(), rng.IntN(700_000)), 0o644))
		}
		op := rng.IntN(8)
		if len(all()) < 4 {
			op %= 2
		}
		switch op {
		case 0:
			p.backup(t, src)
		case 1:
			p.restic(t, "backup", "--host", "pi", src)
		case 2:
			list := all()
			must(t, p.open(t).RemoveSnapshot(t.Context(), list[rng.IntN(len(list)-1)].ID))
		case 3:
			list := all()
			p.restic(t, "forget", list[rng.IntN(len(list)-1)].ID.String())
		case 4:
			p.prune(t, repo.PruneOptions{MaxUnused: repo.UnusedBytes(0), MaxRepack: -1, RepackSmall: true, RepackUncompressed: step%2 == 0})
		case 5:
			p.prune(t, repo.PruneOptions{MaxRepack: int64(rng.IntN(2)) * 3 << 20})
		case 6:
			p.restic(t, "prune", "--max-unused", "0")
		case 7:
			// Somebody deletes an index file.
			files, err := filepath.Glob(filepath.Join(p.dir, "index", "*"))
			must(t, err)
			must(t, os.Remove(files[rng.IntN(len(files))]))
			p.exclusively(t, func(ctx context.Context, r *repo.Repo) error {
				plan, err := check.PlanIndex(ctx, r, true)
				if err == nil {
					err = plan.Execute(ctx)
				}
				return err
			})
		}
		if op == 1 || op == 3 || op == 6 {
			p.whole(t)
		} else {
			p.check(t)
		}
		if t.Failed() {
			t.Fatalf("step %d, operation %d", step, op)
		}
	}
	p.backup(t, src)
	p.prune(t, repo.PruneOptions{MaxUnused: repo.UnusedBytes(0), MaxRepack: -1, RepackSmall: true})
	p.check(t)
	p.whole(t)
	dst := t.TempDir()
	p.restic(t, "restore", "latest", "--target", dst)
	sameTree(t, src, filepath.Join(dst, src))
}

// Packs are damaged on the disk. Check names the files, repair keeps the
// others, the next backup heals from the source, and restic is content.
func TestRepairAndHeal(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wildTree(t, src)
	p := newPlace(t)
	p.init(t)
	p.backup(t, src)
	must(t, os.WriteFile(filepath.Join(src, "new file"), random(1, 3_000_000), 0o600))
	p.backup(t, src)

	packs, err := filepath.Glob(filepath.Join(p.dir, "data", "*", "*"))
	must(t, err)
	for i, name := range packs {
		data := read(t, name)
		must(t, os.Chmod(name, 0o600))
		if i%2 == 0 {
			data[len(data)/3] ^= 1
		} else {
			data = data[:len(data)-10]
		}
		must(t, os.WriteFile(name, data, 0o400))
	}

	var bad []backup.ID
	named := 0
	for problem, err := range check.Run(t.Context(), p.open(t), check.Options{Read: check.All()}) {
		must(t, err)
		named += len(problem.Files)
		if problem.Object.Kind == check.Pack {
			bad = append(bad, problem.Object.ID)
		}
	}
	if len(bad) != len(packs) || named == 0 {
		t.Errorf("%d of %d damaged packs found, %d files named", len(bad), len(packs), named)
	}
	p.exclusively(t, func(ctx context.Context, r *repo.Repo) error {
		index, err := check.PlanIndex(ctx, r, false)
		if err != nil {
			return err
		}
		if err := index.Execute(ctx); err != nil {
			return err
		}
		plan, err := check.PlanPacks(ctx, r, bad)
		if err != nil {
			return err
		}
		if files, _ := plan.Loss.Files(); len(files) == 0 {
			t.Error("the plan names no files")
		}
		return plan.Execute(ctx)
	})
	// The source has it all: a backup brings back what is lost, before the
	// snapshots are mended.
	p.backup(t, src)
	p.exclusively(t, func(ctx context.Context, r *repo.Repo) error {
		plan, err := check.PlanSnapshots(ctx, r)
		if err != nil {
			return err
		}
		return plan.Execute(ctx, true)
	})
	p.prune(t, repo.PruneOptions{MaxUnused: repo.UnusedBytes(0), MaxRepack: -1})
	p.check(t)
	p.whole(t)
	p.backup(t, src)
	p.check(t)
	dst := t.TempDir()
	p.restic(t, "restore", "latest", "--target", dst)
	sameTree(t, src, filepath.Join(dst, src))
	if out := p.restic(t, "snapshots"); !strings.Contains(out, "volume:volume") {
		t.Error(out)
	}
}
