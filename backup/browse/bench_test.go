package browse_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/browse"
	"github.com/iot49/ide49-backup/backup/repo"
)

// large makes snapshots of folders with 100 small files each; every snapshot
// changes ten folders.
func large(b *testing.B, folders, snapshots int) (*repo.Repo, []*backup.Snapshot) {
	b.Helper()
	r := newRepo(b, mem.New())
	trees := make([]backup.ID, folders)
	var all []*backup.Snapshot
	for i := range snapshots {
		var root backup.ID
		must(b, r.Update(b.Context(), func(ctx context.Context, w *repo.Writer) error {
			change := folders
			if i > 0 {
				change = 10
			}
			for k := range change {
				k = (k + i*10) % folders
				t := &backup.Tree{}
				for f := range 100 {
					content := backup.Hash(fmt.Append(nil, i, k, f))
					t.Nodes = append(t.Nodes, backup.Node{
						Name: fmt.Sprintf("file%04d", f), Type: backup.File, Mode: 0o644, ModTime: noon, AccessTime: noon, ChangeTime: noon,
						Inode: uint64(1000*k + f), User: "root", Group: "root", Size: uint64(f), Links: 1, Content: []backup.ID{content},
					})
				}
				s, err := w.SaveTree(ctx, t)
				if err != nil {
					return err
				}
				trees[k] = s.ID
			}
			// Folders of 50 folders.
			top := &backup.Tree{}
			for at := 0; at < folders; at += 50 {
				t := &backup.Tree{}
				for k := at; k < min(at+50, folders); k++ {
					t.Nodes = append(t.Nodes, backup.Node{Name: fmt.Sprintf("dir%06d", k), Type: backup.Dir, ModTime: noon, Subtree: trees[k]})
				}
				s, err := w.SaveTree(ctx, t)
				if err != nil {
					return err
				}
				top.Nodes = append(top.Nodes, backup.Node{Name: fmt.Sprintf("top%06d", at), Type: backup.Dir, ModTime: noon, Subtree: s.ID})
			}
			s, err := w.SaveTree(ctx, top)
			root = s.ID
			return err
		}))
		s := &backup.Snapshot{Time: noon.Add(time.Duration(i) * time.Hour), Hostname: "pi", Paths: []string{"/"}, Tree: &root}
		id, err := r.SaveSnapshot(b.Context(), s)
		must(b, err)
		s.ID = id
		all = append(all, s)
	}
	return r, all
}

// BenchmarkFirstListing lists one folder of a repository of 300,000 files whose
// index is loaded.
func BenchmarkFirstListing(b *testing.B) {
	r, all := large(b, 3000, 1)
	b.ReportAllocs()
	for b.Loop() {
		v := browse.New(r, browse.Options{})
		n := 0
		for _, err := range v.Ls(b.Context(), all[0], "/top001500/dir001525", false) {
			must(b, err)
			n++
		}
		if n != 100 {
			b.Fatal(n)
		}
	}
}

func BenchmarkLs(b *testing.B) {
	r, all := large(b, 1000, 1)
	b.ReportAllocs()
	for b.Loop() {
		v := browse.New(r, browse.Options{})
		n := 0
		for _, err := range v.Ls(b.Context(), all[0], "/", true) {
			must(b, err)
			n++
		}
		if n != 101_020 {
			b.Fatal(n)
		}
	}
}

func BenchmarkFind(b *testing.B) {
	r, all := large(b, 1000, 50)
	b.ReportAllocs()
	for b.Loop() {
		v := browse.New(r, browse.Options{})
		n := 0
		for f, err := range v.Find(b.Context(), all, browse.Query{Patterns: []string{"file0007"}}) {
			must(b, err)
			n += len(f.Versions)
		}
		if n != 1490 { // ten folders in each of 49 snapshots
			b.Fatal(n)
		}
	}
}

func BenchmarkDiff(b *testing.B) {
	r, all := large(b, 1000, 2)
	b.ReportAllocs()
	for b.Loop() {
		v := browse.New(r, browse.Options{})
		n := 0
		root := func(s *backup.Snapshot) browse.Entry {
			e, err := v.Lookup(b.Context(), s, "/")
			must(b, err)
			return e
		}
		for _, err := range v.Diff(b.Context(), root(all[0]), root(all[1]), nil) {
			must(b, err)
			n++
		}
		if n != 1000 {
			b.Fatal(n)
		}
	}
}
