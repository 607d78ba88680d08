package repo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
)

// A history is a repository with some snapshots, and what each must hold.
type history struct {
	be    *mem.Store
	blobs map[backup.ID][][]byte // of each snapshot, in order
}

// take stores a snapshot of one folder whose files hold blobs.
func (h *history) take(t testing.TB, r *repo.Repo, blobs [][]byte) backup.ID {
	t.Helper()
	var root backup.ID
	err := r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		tree := &backup.Tree{}
		for i, b := range blobs {
			s, err := w.Save(ctx, backup.DataBlob, b)
			if err != nil {
				return err
			}
			tree.Nodes = append(tree.Nodes, backup.Node{Name: fmt.Sprintf("%05d", i), Type: backup.File, Content: []backup.ID{s.ID}, Size: uint64(len(b))})
		}
		s, err := w.SaveTree(ctx, tree)
		root = s.ID
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	id, err := r.SaveSnapshot(t.Context(), &backup.Snapshot{Time: time.Unix(int64(1_800_000_000+len(h.blobs)), 0), Tree: &root, Paths: []string{"/x"}})
	if err != nil {
		t.Fatal(err)
	}
	h.blobs[id] = blobs
	return id
}

func (h *history) forget(t testing.TB, id backup.ID) {
	t.Helper()
	if err := reopen(t, h.be).RemoveSnapshot(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	delete(h.blobs, id)
}

// intact reads everything that snapshots hold.
func (h *history) intact(t testing.TB, be backend.Backend) {
	t.Helper()
	r := reopen(t, be)
	all, err := r.Snapshots(t.Context())
	if err != nil || len(all) != len(h.blobs) {
		t.Fatalf("%d snapshots, want %d; %v", len(all), len(h.blobs), err)
	}
	for _, s := range all {
		tree, err := r.Tree(t.Context(), *s.Tree)
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range h.blobs[s.ID] {
			got, err := r.Blob(t.Context(), backup.DataBlob, tree.Nodes[i].Content[0])
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("snapshot %s, file %d: %v", s.ID.Short(), i, err)
			}
		}
	}
}

// tidy checks that the store holds nothing that is not used: every pack is in
// the index with its true header, each blob is there once, and is used.
func (h *history) tidy(t testing.TB, be backend.Backend) {
	t.Helper()
	r := reopen(t, be)
	all, err := r.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	used, err := r.Used(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	packs, seen := 0, map[backup.Blob]bool{}
	for p, err := range r.PackFiles(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		packs++
		header, err := r.ReadHeader(t.Context(), p.ID, p.Size)
		if err != nil || !slices.Equal(header, r.Index().PackBlobs(p.ID)) {
			t.Fatalf("pack %s: header and index differ; %v", p.ID.Short(), err)
		}
		for _, b := range header {
			if !used.Has(b.Blob) || seen[b.Blob] {
				t.Errorf("%s is not used, or a copy", b)
			}
			seen[b.Blob] = true
		}
	}
	named := 0
	for range r.Index().Packs() {
		named++
	}
	if named != packs {
		t.Errorf("%d packs in the index, %d in the store", named, packs)
	}
}

func newHistory(t testing.TB, snapshots int) (*history, []backup.ID) {
	t.Helper()
	h := &history{mem.New(), map[backup.ID][][]byte{}}
	newRepo(t, h.be, repo.Options{})
	rng := rand.New(rand.NewPCG(5, 5))
	files := make([][]byte, 30)
	var ids []backup.ID
	for i := range snapshots {
		for k := range files {
			if i == 0 || rng.IntN(3) == 0 {
				files[k] = payload(rng.Uint64(), 1000+rng.IntN(3000))
			}
		}
		ids = append(ids, h.take(t, reopen(t, h.be), slices.Clone(files)))
	}
	// Two writers that did not know of each other make copies.
	one, two := reopen(t, h.be), reopen(t, h.be)
	files[0], files[1] = payload(101, 5000), payload(102, 5000)
	ids = append(ids, h.take(t, one, slices.Clone(files)), h.take(t, two, slices.Clone(files[1:])))
	return h, ids
}

var everything = repo.PruneOptions{MaxUnused: repo.UnusedBytes(0), MaxRepack: -1, RepackSmall: true}

func prune(t testing.TB, be backend.Backend, opt repo.PruneOptions) (*repo.PrunePlan, repo.PruneProgress) {
	t.Helper()
	r := reopen(t, be)
	plan, err := r.PlanPrune(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	done, err := plan.Execute(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if done.Deleted != done.ToDelete || done.Repacked != done.ToRepack {
		t.Errorf("%+v", done)
	}
	return plan, done
}

func storedBytes(t testing.TB, be backend.Backend, kind backend.Kind) (n int64) {
	t.Helper()
	for info, err := range be.List(t.Context(), kind) {
		if err != nil {
			t.Fatal(err)
		}
		n += info.Size
	}
	return n
}

func TestPruneEverything(t *testing.T) {
	h, ids := newHistory(t, 8)
	junk := []byte("junk")
	if err := h.be.Put(t.Context(), backend.Key{Kind: backend.Packs, ID: backup.Hash(junk)}, junk); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 2, 4, 5, 7} {
		h.forget(t, ids[i])
	}
	before := storedBytes(t, h.be, backend.Packs)
	plan, done := prune(t, h.be, everything)
	if len(plan.Leftover) != 1 || len(plan.Delete) == 0 || len(plan.Repack) == 0 || plan.Keep.Copies != 0 {
		t.Errorf("%+v", plan)
	}
	h.intact(t, h.be)
	h.tidy(t, h.be)
	after := storedBytes(t, h.be, backend.Packs)
	if before-after != done.DeletedBytes-done.Written || max(before-after-plan.Freed, plan.Freed-before+after) > 120*int64(len(plan.Repack)) {
		t.Errorf("freed %d, planned %d, reported %d", before-after, plan.Freed, done.DeletedBytes-done.Written)
	}
	r := reopen(t, h.be)
	again, err := r.PlanPrune(t.Context(), everything)
	if err != nil || !again.Empty() {
		t.Errorf("there is more to do: %+v, %v", again, err)
	}
	if n := count(t, h.be, backend.Packs); n > 4 {
		t.Errorf("%d packs", n)
	}
}

// What each option leaves alone.
func TestPruneOptions(t *testing.T) {
	h, ids := newHistory(t, 8)
	h.forget(t, ids[0])
	h.forget(t, ids[9])
	h.forget(t, ids[4])
	for name, c := range map[string]struct {
		opt                      repo.PruneOptions
		repacks, skips, leavesNo bool
	}{
		"nothing rewritten": {repo.PruneOptions{}, false, true, false},
		"a bound":           {repo.PruneOptions{MaxUnused: repo.UnusedBytes(0), MaxRepack: 40_000}, true, true, false},
		"unlimited unused":  {repo.PruneOptions{MaxUnused: repo.UnusedBytes(1 << 62), MaxRepack: -1}, false, false, false},
		"no unused":         {repo.PruneOptions{MaxUnused: repo.UnusedPercent(0), MaxRepack: -1}, true, false, true},
		"some unused":       {repo.PruneOptions{MaxUnused: repo.UnusedPercent(10), MaxRepack: -1}, true, false, false},
		"everything":        {everything, true, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			be := h.be.Clone()
			plan, done := prune(t, be, c.opt)
			if (len(plan.Repack) > 0) != c.repacks || (plan.Skipped > 0) != c.skips || (done.Written > 0) != c.repacks {
				t.Errorf("%d rewritten, %d skipped", len(plan.Repack), plan.Skipped)
			}
			if c.opt.MaxRepack > 0 && done.ToRepack > c.opt.MaxRepack {
				t.Errorf("%d bytes rewritten", done.ToRepack)
			}
			left := plan.Keep.Unused
			if c.leavesNo != (left == 0) || name == "some unused" && left > plan.Keep.Used/9+1 {
				t.Errorf("%d bytes unused beside %d", left, plan.Keep.Used)
			}
			h.intact(t, be)
			if c.leavesNo {
				h.tidy(t, be)
			}
		})
	}
}

func TestPruneCompresses(t *testing.T) {
	h := &history{mem.New(), map[backup.ID][][]byte{}}
	r := newRepo(t, h.be, repo.Options{Compression: repo.Off})
	h.take(t, r, [][]byte{payload(2, 100_000), payload(4, 100_000), payload(1, 50_000)})
	h.take(t, r, [][]byte{payload(3, 100_000), payload(5, 100_000)}) // does not shrink
	opt := repo.PruneOptions{MaxRepack: -1, RepackUncompressed: true}
	plan, _ := prune(t, h.be, opt)
	if len(plan.Repack) != 2 || plan.Repack[0].Reason != repo.Uncompressed {
		// Two packs of data were open; both have something that shrinks, or
		// one holds all of it.
		if len(plan.Repack) != 1 {
			t.Errorf("%+v", plan.Repack)
		}
	}
	h.intact(t, h.be)
	h.tidy(t, h.be)
	if n := storedBytes(t, h.be, backend.Packs); n > 350_000 {
		t.Errorf("%d bytes", n)
	}
	if again, err := reopen(t, h.be).PlanPrune(t.Context(), opt); err != nil || len(again.Repack) != 0 {
		t.Errorf("compressed again: %+v, %v", again, err)
	}
}

// Stopped at any write or delete: nothing that a snapshot needs is missing, and
// running again finishes the work.
func TestPruneCrashes(t *testing.T) {
	h, ids := newHistory(t, 6)
	for _, i := range []int{0, 2, 3, 7} {
		h.forget(t, ids[i])
	}
	crashes := 0
	for n := 1; ; n++ {
		for _, applied := range []bool{false, true} {
			be := h.be.Clone()
			store := faulty.CrashAt(be, n, applied)
			r := reopen(t, store)
			plan, err := r.PlanPrune(t.Context(), everything)
			if err != nil {
				t.Fatal(err)
			}
			_, err = plan.Execute(t.Context(), nil)
			if !store.Crashed() {
				if err != nil {
					t.Fatal(err)
				}
				if crashes < 30 {
					t.Errorf("only %d crashes", crashes)
				}
				return
			}
			crashes++
			if !errors.Is(err, faulty.ErrCrashed) {
				t.Fatalf("crash %d: %v", n, err)
			}
			h.intact(t, be)
			// A backup may come between: it must not build on what goes.
			between := &history{be, map[backup.ID][][]byte{}}
			for id, blobs := range h.blobs {
				between.blobs[id] = blobs
			}
			if n%3 == 0 {
				between.take(t, reopen(t, be), [][]byte{payload(1001, 2000), payload(1002, 3000)})
			}
			prune(t, be, everything)
			between.intact(t, be)
			between.tidy(t, be)
			if t.Failed() {
				t.Fatalf("crash %d, applied %v", n, applied)
			}
		}
	}
}

// A full disk can be freed as long as there is room for an index file.
func TestPruneOnAFullDisk(t *testing.T) {
	h, ids := newHistory(t, 8)
	for _, id := range ids[:6] {
		h.forget(t, id)
	}
	var mu sync.Mutex
	refused := 0
	full := faulty.New(h.be, func(c faulty.Call) faulty.Fault {
		mu.Lock()
		defer mu.Unlock()
		if c.Op == faulty.Put && c.Key.Kind == backend.Packs {
			refused++
			return faulty.Fault{Err: backend.ErrFull}
		}
		return faulty.Fault{}
	})
	before := storedBytes(t, h.be, backend.Packs)
	r := reopen(t, full)
	plan, err := r.PlanPrune(t.Context(), everything)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plan.Execute(t.Context(), nil); !errors.Is(err, backend.ErrFull) || refused == 0 {
		t.Errorf("%v after %d refusals", err, refused)
	}
	h.intact(t, h.be)
	if after := storedBytes(t, h.be, backend.Packs); after >= before {
		t.Errorf("nothing freed: %d, then %d", before, after)
	}
	if plan, _ := prune(t, full, repo.PruneOptions{}); len(plan.Repack) != 0 {
		t.Error("something is rewritten")
	}
	h.intact(t, h.be)
}

// While anything that is needed is damaged or can't be known, nothing goes.
func TestPruneRefuses(t *testing.T) {
	h, ids := newHistory(t, 4)
	h.forget(t, ids[0])
	before := count(t, h.be, backend.Packs)
	all := slices.Collect(func(yield func(backend.Key) bool) {
		for _, kind := range []backend.Kind{backend.Snapshots, backend.Indexes, backend.Packs} {
			for info, err := range h.be.List(t.Context(), kind) {
				if err != nil {
					t.Fatal(err)
				}
				if !yield(info.Key) {
					return
				}
			}
		}
	})
	refused := 0
	for _, k := range all {
		for _, cut := range []bool{true, false} {
			be := h.be.Clone()
			data, err := be.Get(t.Context(), k, 0, -1)
			if err == nil && cut {
				err = be.Put(t.Context(), k, data[:len(data)/2])
			} else if err == nil && k.Kind != backend.Snapshots {
				err = be.Delete(t.Context(), k)
			}
			if err != nil {
				t.Fatal(err)
			}
			r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
			if err != nil {
				t.Fatal(err)
			}
			packs := count(t, be, backend.Packs)
			plan, err := r.PlanPrune(t.Context(), everything)
			if err == nil {
				_, err = plan.Execute(t.Context(), nil)
			}
			if err == nil {
				h.intact(t, be) // it was of no use
				continue
			}
			refused++
			if !errors.Is(err, repo.ErrDamaged) && !errors.Is(err, repo.ErrNoBlob) {
				t.Errorf("%s, cut %v: %v", k, cut, err)
			}
			if n := count(t, be, backend.Packs); n != packs {
				t.Errorf("%s, cut %v: %d packs of %d left", k, cut, n, before)
			}
		}
	}
	if refused < len(all) {
		t.Errorf("only %d of %d refused", refused, 2*len(all))
	}
}

// A blob that turns out to be damaged while it is moved ends the prune, but
// not if there is another copy.
func TestPruneMeetsDamage(t *testing.T) {
	h, ids := newHistory(t, 4)
	h.forget(t, ids[0])
	h.forget(t, ids[2])
	r := reopen(t, h.be)
	plan, err := r.PlanPrune(t.Context(), everything)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range plan.Repack {
		be := h.be.Clone()
		k := backend.Key{Kind: backend.Packs, ID: p.ID}
		data, err := be.Get(t.Context(), k, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		for i := range data {
			if i%50 == 0 && i < len(data)-2000 {
				data[i] ^= 1
			}
		}
		if err := be.Put(t.Context(), k, data); err != nil {
			t.Fatal(err)
		}
		r := reopen(t, be)
		plan, err := r.PlanPrune(t.Context(), everything)
		if err == nil {
			_, err = plan.Execute(t.Context(), nil)
		}
		if err == nil {
			h.intact(t, be)
			continue
		}
		if _, gone := be.Get(t.Context(), k, 0, 0); !errors.Is(err, repo.ErrDamaged) || gone != nil {
			t.Errorf("%v; pack: %v", err, gone)
		}
	}
}

func TestStalePlan(t *testing.T) {
	h, ids := newHistory(t, 2)
	h.forget(t, ids[0])
	r := reopen(t, h.be)
	plan, err := r.PlanPrune(t.Context(), everything)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := plan.Execute(t.Context(), nil); !errors.Is(err, repo.ErrPlanStale) {
		t.Error(err)
	}
}

func TestCancelledPrune(t *testing.T) {
	h, ids := newHistory(t, 6)
	for _, id := range ids[:4] {
		h.forget(t, id)
	}
	for k := range 12 {
		be := h.be.Clone()
		ctx, cancel := context.WithCancel(t.Context())
		calls := 0
		store := faulty.New(be, func(c faulty.Call) faulty.Fault {
			if c.Op == faulty.Put || c.Op == faulty.Delete {
				if calls++; calls > k {
					cancel()
				}
			}
			return faulty.Fault{}
		})
		r := reopen(t, store)
		plan, err := r.PlanPrune(ctx, everything)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := plan.Execute(ctx, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled after %d changes: %v", k, err)
		}
		cancel()
		h.intact(t, be)
		prune(t, be, everything)
		h.tidy(t, be)
	}
}

// Many small index files become few.
func TestPruneMergesIndexes(t *testing.T) {
	h, _ := newHistory(t, 20)
	if n := count(t, h.be, backend.Indexes); n < 20 {
		t.Fatalf("%d index files", n)
	}
	prune(t, h.be, repo.PruneOptions{})
	if n := count(t, h.be, backend.Indexes); n != 1 {
		t.Errorf("%d index files", n)
	}
	h.intact(t, h.be)
}

func TestParseUnused(t *testing.T) {
	for _, good := range []string{"0%", "5%", "99.5%", "0", "500M", "7K", "2G", "1T", "unlimited"} {
		if _, err := repo.ParseUnused(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "100%", "-1%", "NaN%", "-5", "x", "5 M", "9999999999T", "%", "M"} {
		if u, err := repo.ParseUnused(bad); err == nil {
			t.Errorf("ParseUnused(%q) = %v", bad, u)
		}
	}
}
