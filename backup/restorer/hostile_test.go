package restorer_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/restorer"
)

// TestSharedSubtrees: a snapshot of a few kilobytes that unfolds to a billion
// files is refused before it fills the memory.
func TestSharedSubtrees(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		var files []backup.Node
		for i := range 10 {
			files = append(files, w.file(fmt.Sprint(i), []byte("x")))
		}
		id := w.tree(files...)
		for range 8 {
			var dirs []backup.Node
			for i := range 10 {
				d := w.dir(fmt.Sprint(i))
				d.Subtree = id
				dirs = append(dirs, d)
			}
			id = w.tree(dirs...)
		}
		return id
	})
	root, err := os.OpenRoot(t.TempDir())
	must(t, err)
	defer root.Close()
	const limit = 16 << 20
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	_, err = restorer.Prepare(t.Context(), r, sn, root, restorer.Options{MaxMemory: limit})
	runtime.ReadMemStats(&after)
	if !errors.Is(err, restorer.ErrTooLarge) {
		t.Errorf("%v", err)
	}
	if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 4*limit {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
}

func TestHostileNodes(t *testing.T) {
	r := newRepo(t, mem.New())
	missing := backup.Hash([]byte("missing"))
	sn := snapshot(t, r, func(w writer) backup.ID {
		bigger, smaller, lost := w.file("bigger", []byte("data")), w.file("smaller", []byte("data")), w.file("lost", []byte("data"))
		bigger.Size, smaller.Size = 1<<60, 3
		lost.Content[0] = missing
		attrs := w.file("attrs", []byte("data"))
		attrs.Xattrs = []backup.Xattr{{Name: "", Value: nil}, {Name: "user.\x00", Value: nil}, {Name: "no-namespace", Value: []byte("v")}, {Name: "user.good", Value: []byte("v")}}
		huge := w.file("huge-attr", []byte("data"))
		huge.Xattrs = []backup.Xattr{{Name: "user.huge", Value: make([]byte, 1<<20)}}
		link := backup.Node{Name: "link", Type: backup.Symlink, LinkTarget: strings.Repeat("x", 5000), ModTime: stamp}
		empty := backup.Node{Name: "empty-link", Type: backup.Symlink, ModTime: stamp}
		return w.tree(bigger, smaller, lost, attrs, huge, link, empty, w.file("good", []byte("good")))
	})
	dir := t.TempDir()
	var failed []string
	_, err := prepare(t, r, sn, dir, restorer.Options{}).Execute(t.Context(), restorer.Observer{Failure: func(f restorer.Failure) { failed = append(failed, f.Path) }})
	partial, ok := errors.AsType[*restorer.PartialError](err)
	if !ok || partial.Count != 7 || len(failed) != 7 || !errors.Is(err, restorer.ErrDamaged) || !errors.Is(err, repo.ErrNoBlob) {
		t.Errorf("%v; failed: %q", err, failed)
	}
	noTemps(t, dir)
	for _, name := range []string{"attrs", "huge-attr"} { // their contents are there
		if get(t, filepath.Join(dir, name)) != "data" {
			t.Error(name)
		}
	}
	if value := xattrs(t, filepath.Join(dir, "attrs")); len(value) != 1 || value[0].Name != "user.good" {
		t.Errorf("attributes %q", value)
	}
	if get(t, filepath.Join(dir, "good")) != "good" {
		t.Error("the good one is missing")
	}
	for _, name := range []string{"bigger", "smaller", "lost"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLargeListing: a listing of many short entries does not unfold in memory,
// and one that does not fit is refused.
func TestLargeListing(t *testing.T) {
	r := newRepo(t, mem.New())
	const n = 40_000
	sn := snapshot(t, r, func(w writer) backup.ID {
		nodes := make([]backup.Node, n)
		for i := range nodes {
			nodes[i] = backup.Node{Name: fmt.Sprintf("%06d", i), Type: backup.FIFO}
		}
		return w.tree(nodes...)
	})
	dir := t.TempDir()
	if c := prepare(t, r, sn, dir, restorer.Options{}).Counts(); c.Created != n {
		t.Errorf("%+v", c)
	}
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	if _, err := restorer.Prepare(t.Context(), r, sn, root, restorer.Options{MaxMemory: 8 << 20}); !errors.Is(err, restorer.ErrTooLarge) {
		t.Errorf("%v", err)
	}
}

func TestDeepFolders(t *testing.T) {
	r := newRepo(t, mem.New())
	name := strings.Repeat("d", 200)
	const depth = 30 // 6000 bytes of path
	sn := snapshot(t, r, func(w writer) backup.ID {
		id := w.tree(w.file("f", []byte("deepest")))
		for range depth {
			d := w.dir(name)
			d.Subtree = id
			id = w.tree(d, w.file("f", []byte("f")))
		}
		return id
	})
	dir := t.TempDir()
	_, err := prepare(t, r, sn, dir, restorer.Options{}).Execute(t.Context(), restorer.Observer{})
	if partial, ok := errors.AsType[*restorer.PartialError](err); !ok || partial.Count != 1 || !errors.Is(err, unix.ENAMETOOLONG) {
		t.Errorf("%v", err)
	}
	// All that a path can name is there: the target, 20 folders, their files.
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	n := 0
	for rel := "f"; ; rel = name + "/" + rel {
		if _, err := root.Lstat(rel); err != nil {
			break
		}
		n++
	}
	if n != 21 {
		t.Errorf("%d levels", n)
	}
	c := prepare(t, r, sn, dir, restorer.Options{Delete: true}).Counts()
	if c.Unchanged != 42 || c.Created+c.Changed+c.Deleted+c.Metadata != 0 {
		t.Errorf("again: %+v", c)
	}
}

// TestManyFiles: memory grows little with the number of files.
func TestManyFiles(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	const folders, files = 40, 250
	sn := snapshot(t, r, func(w writer) backup.ID {
		var dirs []backup.Node
		for d := range folders {
			var nodes []backup.Node
			for i := range files {
				nodes = append(nodes, w.file(fmt.Sprintf("file-%04d.go", i), fmt.Appendf(nil, "contents of %d in %d", i, d)))
			}
			dirs = append(dirs, w.dir(fmt.Sprintf("folder-%03d", d), nodes...))
		}
		return w.tree(dirs...)
	})
	dir, err := os.MkdirTemp("/dev/shm", "restorer-many-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	p := prepare(t, r, sn, dir, restorer.Options{})
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / (folders * files); each > 250 {
		t.Errorf("the plan takes %d bytes for each file", each)
	}
	stats, err := p.Execute(t.Context(), restorer.Observer{})
	must(t, err)
	if stats.Files != folders*files || stats.Folders != folders {
		t.Errorf("%+v", stats)
	}
	noTemps(t, dir)
	for range 200 {
		d, i := stats.Files%folders, stats.Folders%files
		if got, want := get(t, filepath.Join(dir, fmt.Sprintf("folder-%03d/file-%04d.go", d, i))), fmt.Sprintf("contents of %d in %d", i, d); got != want {
			t.Errorf("%q, want %q", got, want)
		}
		stats.Files, stats.Folders = stats.Files*7+1, stats.Folders*11+3
		stats.Files &= 1<<30 - 1
		stats.Folders &= 1<<30 - 1
	}
}
