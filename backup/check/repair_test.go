package check_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/check"
	"github.com/iot49/ide49-backup/backup/repo"
)

// contents returns a hash of each file of all snapshots that can be read, by
// the snapshot that it was in at first. What can't be read is left out.
func contents(t testing.TB, be backend.Backend) map[check.File]backup.ID {
	t.Helper()
	ctx := t.Context()
	r := open(t, be)
	must(t, r.LoadIntactIndex(ctx, func(backup.ID, error) error { return nil }))
	trees := map[backup.ID]*backup.Tree{}
	blobs := map[backup.ID][]byte{}
	out := map[check.File]backup.ID{}
	var visit func(s, id backup.ID, path string)
	visit = func(s, id backup.ID, path string) {
		tree, known := trees[id]
		if !known {
			tree, _ = r.Tree(ctx, id)
			trees[id] = tree
		}
		if tree == nil {
			return
		}
	nodes:
		for _, n := range tree.Nodes {
			if n.Type == backup.Dir {
				visit(s, n.Subtree, path+n.Name+"/")
				continue
			}
			var all []byte
			for _, id := range n.Content {
				b, known := blobs[id]
				if !known {
					b, _ = r.Blob(ctx, backup.DataBlob, id)
					blobs[id] = b
				}
				if b == nil {
					continue nodes
				}
				all = append(all, b...)
			}
			out[check.File{Snapshot: s, Path: path + n.Name}] = backup.Hash(all)
		}
	}
	must(t, r.EachSnapshot(ctx, func(id backup.ID, s *backup.Snapshot, err error) error {
		if err == nil {
			if s.Original != nil {
				id = *s.Original
			}
			visit(id, *s.Tree, "/")
		}
		return nil
	}))
	return out
}

// repair does all repairs in order, and returns the files that they said would
// be lost.
func repair(ctx context.Context, r *repo.Repo) (map[check.File]bool, error) {
	lost := map[check.File]bool{}
	note := func(l check.Loss) {
		files, _ := l.Files()
		for _, f := range files {
			lost[f] = true
		}
	}
	index, err := check.PlanIndex(ctx, r, false)
	if err == nil {
		note(index.Loss)
		err = index.Execute(ctx)
	}
	if err != nil {
		return nil, err
	}
	var bad []backup.ID
	for p, err := range check.Run(ctx, r, check.Options{Read: check.All()}) {
		if err != nil {
			return nil, err
		}
		if p.Object.Kind == check.Pack && !p.Harmless {
			bad = append(bad, p.Object.ID)
		}
	}
	packs, err := check.PlanPacks(ctx, r, bad)
	if err == nil {
		note(packs.Loss)
		err = packs.Execute(ctx)
	}
	if err != nil {
		return nil, err
	}
	snapshots, err := check.PlanSnapshots(ctx, r)
	if err != nil {
		return nil, err
	}
	note(snapshots.Loss)
	for _, p := range snapshots.Hopeless {
		for _, f := range p.Files {
			lost[f] = true
		}
	}
	return lost, snapshots.Execute(ctx, true)
}

// Whatever is damaged, repair keeps every file that is not affected, says of
// each that is, and leaves a repository that check finds whole.
func TestBitRot(t *testing.T) {
	be := house(t)
	pristine := opened(t, be)
	all := objects(t, be, decay...)
	before := contents(t, be)
	mended := 0
	for seed := range uint64(*rotCases) {
		w := ruin(t, be, all, rand.New(rand.NewPCG(seed, 1)))
		findDamage(t, pristine, w, seed)
		kept := contents(t, w.be)
		said, err := repair(t.Context(), open(t, w.be))
		if err != nil {
			t.Fatalf("seed %d: %s: %v", seed, w.what, err)
		}
		after := contents(t, w.be)
		for f, hash := range kept {
			// A lost index may come back from its packs: then nothing is lost.
			if after[f] != hash {
				t.Errorf("seed %d: %s: lost the intact %v", seed, w.what, f)
			}
		}
		for f, hash := range after {
			if original, ok := before[f]; ok && original != hash {
				t.Errorf("seed %d: %s: %v has changed", seed, w.what, f)
			} else if !ok && !strings.Contains(f.Path, ".damaged") {
				t.Errorf("seed %d: %s: %v comes from nowhere", seed, w.what, f)
			}
		}
		for f := range before {
			if _, ok := after[f]; !ok && !said[f] && !under(said, f) && !w.touched[backend.Key{Kind: backend.Snapshots, ID: f.Snapshot}] {
				t.Errorf("seed %d: %s: nothing was said of losing %v", seed, w.what, f)
			}
		}
		if left := damage(run(t, open(t, w.be), check.Options{Read: check.All()})); len(left) != 0 {
			t.Errorf("seed %d: %s: still %v", seed, w.what, left)
		}
		if len(said) > 0 {
			mended++
		}
		if t.Failed() {
			return
		}
	}
	if mended < *rotCases/3 {
		t.Errorf("only %d cases had losses", mended)
	}
}

// under reports whether a folder above f, or all of its snapshot, is in files.
func under(files map[check.File]bool, f check.File) bool {
	for i := range f.Path {
		if f.Path[i] == '/' && files[check.File{Snapshot: f.Snapshot, Path: f.Path[:i+1]}] {
			return true
		}
	}
	return false
}

// What is lost of a file is left out, and no more than that; the rest is under
// another name.
func TestMending(t *testing.T) {
	be := mem.New()
	newEmpty(t, be)
	rng := rand.New(rand.NewPCG(3, 3))
	one, two, three := noise(rng, 1000), noise(rng, 1100), noise(rng, 1200)
	old := snapshot(t, opened(t, be), "v", time.Unix(1_800_000_000, 0), map[string][][]byte{
		"a/b/cut": {one, two, three}, "a/b/cut.damaged": {one}, "a/b/gone": {two}, "a/b/whole": {three}, "a/c/empty": {}, "a/c/other": {one},
	})
	lose(t, be, backup.Hash(two))
	if _, err := repair(t.Context(), open(t, be)); err != nil {
		t.Fatal(err)
	}
	want := map[check.File]backup.ID{}
	for name, data := range map[string][]byte{
		"a/b/cut.damaged": one, "a/b/cut.damaged2": append(bytes.Clone(one), three...), "a/b/whole": three, "a/c/empty": nil, "a/c/other": one,
	} {
		want[check.File{Snapshot: old, Path: "/" + name}] = backup.Hash(data)
	}
	if got := contents(t, be); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	all, err := opened(t, be).Snapshots(t.Context())
	must(t, err)
	if len(all) != 1 || !all[0].HasTag(backup.MendedTag) || all[0].Original == nil || *all[0].Original != old || all[0].Volume() != "v" {
		t.Errorf("%+v", all[0])
	}
	// The next repair has nothing to do.
	p, err := check.PlanSnapshots(t.Context(), open(t, be))
	if err != nil || !p.Empty() {
		t.Errorf("%+v, %v", p, err)
	}
}

func newEmpty(t testing.TB, be backend.Backend) {
	t.Helper()
	_, err := repo.Init(t.Context(), be, "pw", cheap, repo.Options{})
	must(t, err)
}

// lose flips a byte in the only copy of a data blob.
func lose(t testing.TB, be *mem.Store, id backup.ID) {
	t.Helper()
	for loc := range opened(t, be).Index().Lookup(backup.Blob{Kind: backup.DataBlob, ID: id}) {
		k := backend.Key{Kind: backend.Packs, ID: loc.Pack}
		data, err := be.Get(t.Context(), k, 0, -1)
		must(t, err)
		data[loc.Offset+20] ^= 1
		must(t, be.Put(t.Context(), k, data))
	}
}

// Repairs are refused in the wrong order, as they would drop what can be saved.
func TestRepairOrder(t *testing.T) {
	be := house(t)
	packs, indexes := objects(t, be, backend.Packs), objects(t, be, backend.Indexes)
	noIndex, noPack := be.Clone(), be.Clone()
	must(t, noIndex.Put(t.Context(), indexes[0].key, indexes[0].data[1:]))
	must(t, noPack.Delete(t.Context(), packs[0].key))
	if _, err := check.PlanSnapshots(t.Context(), open(t, noIndex)); !errors.Is(err, check.ErrIndexFirst) {
		t.Error(err)
	}
	if _, err := check.PlanPacks(t.Context(), open(t, noIndex), nil); !errors.Is(err, check.ErrIndexFirst) {
		t.Error(err)
	}
	if _, err := check.PlanSnapshots(t.Context(), open(t, noPack)); !errors.Is(err, check.ErrPacksFirst) {
		t.Error(err)
	}
	if _, err := check.PlanPacks(t.Context(), open(t, noPack), []backup.ID{packs[0].key.ID}); !errors.Is(err, check.ErrIndexFirst) {
		t.Error(err)
	}
	if _, err := check.PlanPacks(t.Context(), open(t, be), []backup.ID{backup.Hash(nil)}); !errors.Is(err, check.ErrMissing) {
		t.Error(err)
	}
	whole, err := check.PlanPacks(t.Context(), open(t, be), []backup.ID{packs[0].key.ID})
	if err != nil || len(whole.Packs) != 0 {
		t.Errorf("%+v, %v", whole, err)
	}
}

// All index files are gone: they come back from the packs, with all copies.
func TestIndexFromNothing(t *testing.T) {
	be := house(t)
	before := contents(t, be)
	want := opened(t, be).Index().Len()
	for _, o := range objects(t, be, backend.Indexes) {
		must(t, be.Delete(t.Context(), o.key))
	}
	r := open(t, be)
	p, err := check.PlanIndex(t.Context(), r, true)
	must(t, err)
	if len(p.Add) == 0 || len(p.Loss.Problems) != 0 {
		t.Errorf("%+v", p)
	}
	must(t, p.Execute(t.Context()))
	if n := r.Index().Len(); n != want || !maps.Equal(contents(t, be), before) {
		t.Errorf("%d blobs, want %d", n, want)
	}
	if all := run(t, open(t, be), check.Options{Read: check.All()}); len(all) != 0 {
		t.Error(all)
	}
}

// Stopped at any write or delete, a repair loses nothing more, and can be made
// again.
func TestRepairCrashes(t *testing.T) {
	be := house(t)
	all := objects(t, be, decay...)
	pristine := opened(t, be)
	crashes := 0
	for seed := range uint64(4) {
		w := ruin(t, be, all, rand.New(rand.NewPCG(seed, 4)))
		if len(expected(t, pristine, w)) == 0 {
			continue
		}
		kept := contents(t, w.be)
		done := w.be.Clone()
		if _, err := repair(t.Context(), open(t, done)); err != nil {
			t.Fatalf("seed %d: %s: %v", seed, w.what, err)
		}
		want := contents(t, done)
		for n := 1; ; n++ {
			store := w.be.Clone()
			crashing := faulty.CrashAt(store, n, n%2 == 0)
			_, err := repair(t.Context(), open(t, crashing))
			if !crashing.Crashed() {
				must(t, err)
				break
			}
			crashes++
			if !errors.Is(err, faulty.ErrCrashed) {
				t.Fatalf("seed %d, crash %d: %v", seed, n, err)
			}
			between := contents(t, store)
			for f, hash := range kept {
				if between[f] != hash {
					t.Fatalf("seed %d: %s: after crash %d: lost %v", seed, w.what, n, f)
				}
			}
			if _, err := repair(t.Context(), open(t, store)); err != nil {
				t.Fatalf("seed %d, after crash %d: %v", seed, n, err)
			}
			if got := contents(t, store); !maps.Equal(got, want) {
				t.Fatalf("seed %d: %s: after crash %d: %d files, want %d", seed, w.what, n, len(got), len(want))
			}
			if left := damage(run(t, open(t, store), check.Options{Read: check.All()})); len(left) != 0 {
				t.Fatalf("seed %d: %s: after crash %d: %v", seed, w.what, n, left)
			}
			snaps, err := opened(t, store).Snapshots(t.Context())
			must(t, err)
			var originals []string
			for _, s := range snaps {
				if s.Original != nil {
					originals = append(originals, s.Original.String())
				}
			}
			slices.Sort(originals)
			if n := len(originals); n != len(slices.Compact(originals)) {
				t.Fatalf("seed %d: a snapshot was mended twice", seed)
			}
		}
	}
	if crashes < 15 {
		t.Errorf("only %d crashes", crashes)
	}
}

func TestLossIsBounded(t *testing.T) {
	var l check.Loss
	for i := range 3 {
		l.Problems = append(l.Problems, check.Problem{Files: []check.File{{Path: fmt.Sprint("/", i)}, {Path: "/same"}}, More: i == 1})
	}
	if files, more := l.Files(); len(files) != 4 || !more {
		t.Errorf("%v %v", files, more)
	}
}
