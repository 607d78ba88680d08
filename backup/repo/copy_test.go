package repo_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
)

// history makes n snapshots of two volumes, each with some files of the one
// before, some new ones and a folder that stays.
func history(t *testing.T, r *repo.Repo, n int) []*backup.Snapshot {
	t.Helper()
	for i := range n {
		s := &backup.Snapshot{
			Time: time.Date(2026, 1, 1+i, 3, 0, 0, 0, time.UTC), Hostname: "pi", Paths: []string{"/v"},
			Tags: []string{fmt.Sprint(backup.VolumeTag, "v", i%2)}, Summary: &backup.Summary{DataAdded: uint64(i)},
		}
		all, err := r.Snapshots(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if i >= 2 {
			s.Parent = &all[i-2].ID
		}
		err = r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
			folder := func(nodes ...backup.Node) (backup.ID, error) {
				saved, err := w.SaveTree(ctx, &backup.Tree{Nodes: nodes})
				return saved.ID, err
			}
			file := func(name string, seed uint64, size int) (backup.Node, error) {
				saved, err := w.Save(ctx, backup.DataBlob, payload(seed, size))
				return backup.Node{Name: name, Type: backup.File, Size: uint64(size), Content: []backup.ID{saved.ID}}, err
			}
			stays, err1 := file("stays", uint64(1000+i%2), 300_000)
			fixed, err2 := folder(stays)
			a, err3 := file("a", uint64(i), 50_000)
			b, err4 := file("b", uint64(i+2), 50_000)
			moving, err5 := folder(a, b)
			root, err6 := folder(backup.Node{Name: "fixed", Type: backup.Dir, Subtree: fixed}, backup.Node{Name: "moving", Type: backup.Dir, Subtree: moving})
			s.Tree = &root
			return errors.Join(err1, err2, err3, err4, err5, err6)
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.SaveSnapshot(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	all, err := r.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// whole fails the test unless everything that snapshots name can be read.
func whole(t *testing.T, r *repo.Repo) []*backup.Snapshot {
	t.Helper()
	all, err := r.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var visit func(id backup.ID)
	visit = func(id backup.ID) {
		tree, err := r.Tree(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range tree.Nodes {
			for _, c := range n.Content {
				if _, err := r.Blob(t.Context(), backup.DataBlob, c); err != nil {
					t.Fatal(err)
				}
			}
			if n.Type == backup.Dir {
				visit(n.Subtree)
			}
		}
	}
	for _, s := range all {
		visit(*s.Tree)
	}
	return all
}

func copyAll(t *testing.T, dst, src *repo.Repo) repo.CopyResult {
	t.Helper()
	all, err := src.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	res, err := repo.Copy(t.Context(), dst, src, all, repo.CopyObserver{})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestCopy(t *testing.T) {
	src := newRepo(t, mem.New(), repo.Options{})
	from := history(t, src, 8)
	be := mem.New()
	dst := newRepo(t, be, repo.Options{})

	if res := copyAll(t, dst, src); res.Copied != 8 || res.Known != 0 || res.Blobs == 0 || res.Stored == 0 {
		t.Errorf("first copy: %+v", res)
	}
	again := reopen(t, be)
	to := whole(t, again)
	for i, s := range to {
		w := from[i]
		if *s.Original != w.ID || !s.Time.Equal(w.Time) || *s.Tree != *w.Tree || !slices.Equal(s.Tags, w.Tags) || s.Summary.DataAdded != w.Summary.DataAdded {
			t.Errorf("snapshot %d: %+v from %+v", i, s, w)
		}
		if (s.Parent != nil) != (w.Parent != nil) || s.Parent != nil && *s.Parent != to[i-2].ID {
			t.Errorf("snapshot %d: parent %v", i, s.Parent)
		}
	}
	if got, want := again.Index().Len(), src.Index().Len(); got != want {
		t.Errorf("%d blobs copied of %d", got, want)
	}
	// What is compressed is copied as it is, so that both take the same.
	if a, b := stored(src), stored(again); a != b {
		t.Errorf("%d bytes became %d", a, b)
	}

	if res := copyAll(t, again, src); res.Copied != 0 || res.Known != 8 || res.Blobs != 0 {
		t.Errorf("second copy: %+v", res)
	}
	// And back: what comes from there is known there.
	if res := copyAll(t, src, again); res.Copied != 0 || res.Known != 8 {
		t.Errorf("copy back: %+v", res)
	}
	history(t, src, 9) // eight again, at the same times, and a new one
	if res := copyAll(t, again, src); res.Copied != 9 || res.Blobs == 0 || res.Blobs > 4 {
		t.Errorf("copy of one more: %+v", res)
	}
	if _, err := repo.Copy(t.Context(), src, src, from, repo.CopyObserver{}); !errors.Is(err, repo.ErrSameRepository) {
		t.Errorf("copy to itself: %v", err)
	}
}

func stored(r *repo.Repo) (sum uint64) {
	for _, blobs := range r.Index().Packs() {
		for _, b := range blobs {
			sum += uint64(b.Length)
		}
	}
	return sum
}

func TestInitLike(t *testing.T) {
	src := newRepo(t, mem.New(), repo.Options{})
	be := mem.New()
	r, err := repo.InitLike(t.Context(), be, "other", cheap, repo.Options{}, src)
	if err != nil {
		t.Fatal(err)
	}
	if r.Config().Polynomial != src.Config().Polynomial || r.Config().ID == src.Config().ID {
		t.Errorf("%+v like %+v", r.Config(), src.Config())
	}
	if _, err := repo.InitLike(t.Context(), be, "other", cheap, repo.Options{}, src); !errors.Is(err, repo.ErrExists) {
		t.Errorf("twice: %v", err)
	}
}

// A copy that dies at any write leaves a repository whose snapshots are whole,
// and the next one finishes it.
func TestCopyCrash(t *testing.T) {
	src := newRepo(t, mem.New(), repo.Options{})
	from := history(t, src, 6)
	empty := mem.New()
	newRepo(t, empty, repo.Options{})
	crashes := 0
	for n := 1; ; n++ {
		done := false
		for _, applied := range []bool{false, true} {
			be := empty.Clone()
			store := faulty.CrashAt(be, n, applied)
			dst, err := repo.Open(t.Context(), store, "pw", repo.Options{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = repo.Copy(t.Context(), dst, src, from, repo.CopyObserver{})
			if !store.Crashed() {
				if err != nil {
					t.Fatal(err)
				}
				done = true
				break
			}
			crashes++
			if !errors.Is(err, faulty.ErrCrashed) {
				t.Fatalf("crash at %d: %v", n, err)
			}
			again := reopen(t, be)
			had := len(whole(t, again))
			res := copyAll(t, again, src)
			if res.Known != had || res.Copied != 6-had {
				t.Errorf("crash at %d: %d snapshots, then %+v", n, had, res)
			}
			if all := whole(t, reopen(t, be)); len(all) != 6 {
				t.Errorf("crash at %d: %d snapshots in the end", n, len(all))
			}
		}
		if done {
			break
		}
	}
	if crashes < 10 {
		t.Errorf("only %d crashes", crashes)
	}
}

// A tree that a stopped copy left behind does not make the next copy believe
// that what is below it is there.
func TestCopyDoesNotTrustTrees(t *testing.T) {
	src := newRepo(t, mem.New(), repo.Options{})
	from := history(t, src, 1)
	be := mem.New()
	dst := newRepo(t, be, repo.Options{})
	root, err := src.Tree(t.Context(), *from[0].Tree)
	if err != nil {
		t.Fatal(err)
	}
	err = dst.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		_, err := w.SaveTree(ctx, root)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	copyAll(t, dst, src)
	whole(t, reopen(t, be))
}

func TestCopyFromDamaged(t *testing.T) {
	be := mem.New()
	src := newRepo(t, be, repo.Options{})
	from := history(t, src, 3)
	// Damage one data pack.
	for info, err := range be.List(t.Context(), backend.Packs) {
		if err != nil {
			t.Fatal(err)
		}
		if blobs := src.Index().PackBlobs(info.Key.ID); blobs[0].Kind == backup.DataBlob {
			data, err := be.Get(t.Context(), info.Key, 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			data[10] ^= 1
			if err := be.Put(t.Context(), info.Key, data); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	to := mem.New()
	dst := newRepo(t, to, repo.Options{})
	if _, err := repo.Copy(t.Context(), dst, src, from, repo.CopyObserver{}); !errors.Is(err, repo.ErrDamaged) {
		t.Errorf("copy of damaged data: %v", err)
	}
	whole(t, reopen(t, to))
}
