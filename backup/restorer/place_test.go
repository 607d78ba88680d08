package restorer_test

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/restorer"
)

func put(t testing.TB, dir, name, data string) string {
	t.Helper()
	p := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(p), 0o755))
	must(t, os.WriteFile(p, []byte(data), 0o644))
	return p
}

func get(t testing.TB, p string) string {
	t.Helper()
	b, err := os.ReadFile(p)
	if err != nil {
		t.Errorf("%v", err)
	}
	return string(b)
}

func TestDeltaKeepsChunks(t *testing.T) {
	r := newRepo(t, mem.New())
	data := payload(1, 10*chunkSize+77)
	sn := snapshot(t, r, func(w writer) backup.ID {
		return w.tree(w.file("f", data), w.file("longer", data), w.file("shorter", data))
	})
	dir := t.TempDir()
	restore(t, r, sn, dir, restorer.Options{})
	want := scan(t, dir)

	changed := bytes.Clone(data)
	changed[3*chunkSize+5] ^= 1
	must(t, os.WriteFile(filepath.Join(dir, "f"), changed, 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "longer"), append(bytes.Clone(data), "tail"...), 0o644))
	must(t, os.Truncate(filepath.Join(dir, "shorter"), 2*chunkSize+1))
	before := stat(t, filepath.Join(dir, "f")).Ino
	p := prepare(t, r, sn, dir, restorer.Options{})
	c := p.Counts()
	// f lacks one chunk; shorter the nine from the third on, f's among them.
	if c.Changed != 3 || c.FetchBlobs != 9 || c.ReuseBytes != uint64(9*chunkSize+77+10*chunkSize+77+2*chunkSize) {
		t.Errorf("%+v", c)
	}
	// What changes after the plan was made is not trusted.
	must(t, os.WriteFile(filepath.Join(dir, "longer"), []byte("quite different"), 0o644))
	if _, err := p.Execute(t.Context(), restorer.Observer{}); err != nil {
		t.Fatal(err)
	}
	diff(t, scan(t, dir), want)
	if stat(t, filepath.Join(dir, "f")).Ino == before {
		t.Error("the file was changed in place")
	}
}

func TestOverwritePolicies(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		return w.tree(w.file("absent", []byte("A")), w.file("liar", []byte("right")), w.file("newer", []byte("snap")), w.file("older", []byte("snap")),
			w.file("same", []byte("same")), w.file("touched", []byte("touched")))
	})
	for policy, want := range map[restorer.Overwrite]string{
		restorer.Changed: "absent:A liar:wrong newer:snap older:snap same:same touched:touched",
		restorer.Always:  "absent:A liar:right newer:snap older:snap same:same touched:touched",
		restorer.Newer:   "absent:A liar:wrong newer:here older:snap same:same touched:touched",
		restorer.Never:   "absent:A liar:wrong newer:here older:here same:same touched:touched",
	} {
		dir := t.TempDir()
		for name, age := range map[string]time.Duration{"liar:wrong": 0, "newer:here": -time.Hour, "older:here": time.Hour, "same:same": 0, "touched:touched": time.Second} {
			name, data, _ := strings.Cut(name, ":")
			p := put(t, dir, name, data)
			must(t, os.Chtimes(p, stamp.Add(-age), stamp.Add(-age)))
		}
		c, _ := restore(t, r, sn, dir, restorer.Options{Overwrite: policy})
		var got []string
		for name := range scan(t, dir) {
			if name != "." {
				got = append(got, name+":"+get(t, filepath.Join(dir, name)))
			}
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%v: %s\nwant %s", policy, s, want)
		}
		if sum := c.Created + c.Changed + c.Metadata + c.Unchanged + c.Kept; sum != 7 || c.Created != 1 {
			t.Errorf("%v: %+v", policy, c)
		}
		if policy == restorer.Changed {
			// The file that lies about its time is found when verifying.
			_, err := prepare(t, r, sn, dir, restorer.Options{Verify: true}).Execute(t.Context(), restorer.Observer{})
			if partial, ok := errors.AsType[*restorer.PartialError](err); !ok || partial.Count != 1 || partial.Failures[0].Path != "liar" || !errors.Is(err, restorer.ErrContents) {
				t.Errorf("verify: %v", err)
			}
		}
		if back, err := restorer.ParseOverwrite(policy.String()); err != nil || back != policy {
			t.Errorf("ParseOverwrite(%q) = %v, %v", policy, back, err)
		}
	}
	if _, err := restorer.ParseOverwrite("sometimes"); err == nil {
		t.Error("no error for an unknown policy")
	}
}

func TestSelectionAndDelete(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		return w.tree(w.dir("conf", w.file("a.yaml", []byte("a")), w.file("b.txt", []byte("b"))), w.dir("logs", w.file("x.log", []byte("x"))), w.file("top.yaml", []byte("t")))
	})
	yaml := func(rel string, isDir bool) bool { return !isDir && strings.HasSuffix(rel, ".yaml") }
	logs := func(rel string, isDir bool) bool { return rel == "logs" || strings.HasSuffix(rel, ".keep") }
	inConf := func(rel string, isDir bool) bool { return rel == "conf" }
	old := []string{"conf/old.yaml", "conf/old.txt", "junk/deep/file", "junk/deep/x.keep", "junk/other/file", "logs/old.log"}
	for name, c := range map[string]struct {
		opt  restorer.Options
		want string
	}{
		"all":            {restorer.Options{}, "conf/a.yaml conf/b.txt conf/old.txt conf/old.yaml junk/deep/file junk/deep/x.keep junk/other/file logs/old.log logs/x.log top.yaml"},
		"all, delete":    {restorer.Options{Delete: true}, "conf/a.yaml conf/b.txt logs/x.log top.yaml"},
		"yaml":           {restorer.Options{Include: yaml}, "conf/a.yaml conf/old.txt conf/old.yaml junk/deep/file junk/deep/x.keep junk/other/file logs/old.log top.yaml"},
		"yaml, delete":   {restorer.Options{Include: yaml, Delete: true}, "conf/a.yaml conf/old.txt junk/deep/file junk/deep/x.keep junk/other/file logs/old.log top.yaml"},
		"conf, delete":   {restorer.Options{Include: inConf, Delete: true}, "conf/a.yaml conf/b.txt junk/deep/file junk/deep/x.keep junk/other/file logs/old.log"},
		"not logs, keep": {restorer.Options{Exclude: logs, Delete: true}, "conf/a.yaml conf/b.txt junk/deep/x.keep logs/old.log top.yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, p := range old {
				put(t, dir, p, "old")
			}
			before := scan(t, dir)
			p := prepare(t, r, sn, dir, c.opt)
			diff(t, scan(t, dir), before) // a plan changes nothing
			overwritten := slices.Sorted(p.Overwritten())
			if _, err := p.Execute(t.Context(), restorer.Observer{}); err != nil {
				t.Fatal(err)
			}
			var got []string
			after := scan(t, dir)
			for rel, s := range after {
				if strings.HasPrefix(s, "mode 1006") {
					got = append(got, rel)
				}
			}
			slices.Sort(got)
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("left: %s\nwant: %s", s, c.want)
			}
			// Whatever existed and is different now was named by the plan,
			// save folders whose only change is that entries came or went.
			for _, rel := range slices.Sorted(maps.Keys(before)) {
				_, named := slices.BinarySearch(overwritten, rel)
				if isDir := strings.HasPrefix(before[rel], "mode 4"); after[rel] != before[rel] && !named && !isDir {
					t.Errorf("%s was changed and is not in the plan", rel)
				}
				if named && after[rel] == before[rel] {
					t.Errorf("%s is in the plan and was not changed", rel)
				}
			}
		})
	}
}

func TestTypesInTheWay(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		return w.tree(w.file("1", []byte("file for full folder")), w.file("2", []byte("file for empty folder")), w.dir("3", w.file("x", []byte("folder for file"))),
			w.dir("4", w.file("x", []byte("folder for link"))), w.file("5", []byte("file for link")),
			backup.Node{Name: "6", Type: backup.Symlink, LinkTarget: "right", ModTime: stamp, Mode: fs.ModeSymlink | 0o777}, backup.Node{Name: "7", Type: backup.FIFO, Mode: fs.ModeNamedPipe | 0o600, ModTime: stamp})
	})
	outside := t.TempDir()
	put(t, outside, "x", "untouched")
	lay := func() string {
		dir := t.TempDir()
		put(t, dir, "1/sub/file", "in the way")
		must(t, os.Mkdir(filepath.Join(dir, "2"), 0o755))
		put(t, dir, "3", "in the way")
		must(t, os.Symlink(outside, filepath.Join(dir, "4")))
		must(t, os.Symlink(filepath.Join(outside, "x"), filepath.Join(dir, "5")))
		must(t, os.Symlink("wrong", filepath.Join(dir, "6")))
		put(t, dir, "7", "in the way")
		return dir
	}
	fresh := t.TempDir()
	restore(t, r, sn, fresh, restorer.Options{})
	want := scan(t, fresh)

	dir := lay()
	restore(t, r, sn, dir, restorer.Options{Delete: true})
	diff(t, scan(t, dir), want)

	dir = lay()
	kept := scan(t, filepath.Join(dir, "1"))
	_, err := prepare(t, r, sn, dir, restorer.Options{}).Execute(t.Context(), restorer.Observer{})
	if partial, ok := errors.AsType[*restorer.PartialError](err); !ok || partial.Count != 1 || !errors.Is(err, restorer.ErrInTheWay) {
		t.Errorf("full folder without Delete: %v", err)
	}
	diff(t, scan(t, filepath.Join(dir, "1")), kept)
	if get(t, filepath.Join(dir, "3/x")) != "folder for file" {
		t.Error("the rest was not restored")
	}
	if _, err := prepare(t, r, sn, lay(), restorer.Options{Overwrite: restorer.Never}).Execute(t.Context(), restorer.Observer{}); !errors.Is(err, restorer.ErrInTheWay) {
		t.Errorf("never: %v", err)
	}
	if get(t, filepath.Join(outside, "x")) != "untouched" || len(scan(t, outside)) != 2 {
		t.Error("something was written through a link")
	}
}

func TestHardLinksAreNotWrittenThrough(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		meta := w.file("metadata", []byte("same"))
		meta.Mode |= fs.ModeSetuid
		return w.tree(w.file("contents", []byte("new")), meta)
	})
	dir, outside := t.TempDir(), t.TempDir()
	for name, data := range map[string]string{"contents": "old", "metadata": "same"} {
		p := put(t, outside, name, data)
		must(t, os.Chtimes(p, stamp, stamp))
		must(t, os.Link(p, filepath.Join(dir, name)))
	}
	before := scan(t, outside)
	before["contents"] = strings.ReplaceAll(before["contents"], " linked to contents", "")
	before["metadata"] = strings.ReplaceAll(before["metadata"], " linked to metadata", "")
	restore(t, r, sn, dir, restorer.Options{Overwrite: restorer.Always})
	diff(t, scan(t, outside), before)
	if get(t, filepath.Join(dir, "contents")) != "new" || stat(t, filepath.Join(dir, "metadata")).Mode&unix.S_ISUID == 0 {
		t.Error("not restored")
	}
}

func TestHardLinksAreMendedAndHostileOnesAreNot(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		var nodes []backup.Node
		for _, name := range []string{"a", "b", "c"} {
			n := w.file(name, []byte("shared"))
			n.Inode, n.DeviceID, n.Links = 7, 8, 3
			nodes = append(nodes, n)
		}
		other := w.file("other", []byte("not the same contents"))
		other.Inode, other.DeviceID, other.Links = 7, 8, 3
		return w.tree(append(nodes, other)...)
	})
	dir := t.TempDir()
	restore(t, r, sn, dir, restorer.Options{})
	want := scan(t, dir)
	if !strings.HasSuffix(want["c"], "linked to a") || get(t, filepath.Join(dir, "other")) != "not the same contents" {
		t.Errorf("%v", want)
	}
	must(t, os.Remove(filepath.Join(dir, "b")))
	put(t, dir, "b", "shared") // no link any more
	restore(t, r, sn, dir, restorer.Options{})
	diff(t, scan(t, dir), want)
	must(t, os.WriteFile(filepath.Join(dir, "c"), []byte("spoilt"), 0o644)) // all three
	restore(t, r, sn, dir, restorer.Options{})
	diff(t, scan(t, dir), want)
}

func TestRoots(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		return w.tree(w.dir("in", w.file("f", []byte("f"))), w.file("g", []byte("g")))
	})
	for root, want := range map[string]string{"": ". g in in/f", "/": ". vol vol/g vol/in vol/in/f", "/vol": ". g in in/f", "vol/in/": ". f"} {
		dir := t.TempDir()
		restore(t, r, sn, dir, restorer.Options{Root: root})
		if got := strings.Join(slices.Sorted(maps.Keys(scan(t, dir))), " "); got != want {
			t.Errorf("%q: %s, want %s", root, got, want)
		}
	}
	for _, root := range []string{"/none", "/vol/g", "/vol/in/f/x", "/vol/.."} {
		dst, err := os.OpenRoot(t.TempDir())
		must(t, err)
		if _, err := restorer.Prepare(t.Context(), r, sn, dst, restorer.Options{Root: root}); !errors.Is(err, restorer.ErrNoPath) {
			t.Errorf("%q: %v", root, err)
		}
		dst.Close()
	}
}

func TestInheritedACLsGo(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID { return w.tree(w.dir("d", w.file("f", []byte("f")))) })
	clean := t.TempDir()
	restore(t, r, sn, clean, restorer.Options{})
	dir := t.TempDir()
	must(t, unix.Setxattr(dir, "system.posix_acl_default", posixACL(), 0))
	restore(t, r, sn, dir, restorer.Options{})
	diff(t, scan(t, dir), scan(t, clean))
}

func TestLeftoversOfAKilledRestoreGo(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID { return w.tree(w.dir("d", w.file("f", []byte("f")))) })
	dir := t.TempDir()
	put(t, dir, "d/.ide49-restore-0123456789abcdef", "half")
	mine := put(t, dir, "d/.ide49-restore-notes", "mine")
	p := prepare(t, r, sn, dir, restorer.Options{})
	_, err := p.Execute(t.Context(), restorer.Observer{})
	must(t, err)
	c := p.Counts()
	if c.Deleted != 0 || get(t, mine) != "mine" {
		t.Errorf("%+v", c)
	}
	if _, err := os.Lstat(filepath.Join(dir, "d/.ide49-restore-0123456789abcdef")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("leftover: %v", err)
	}
}

func TestOneRestoreAtATime(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID { return w.tree(w.file("f", []byte("f"))) })
	dir := t.TempDir()
	first, second := prepare(t, r, sn, dir, restorer.Options{}), prepare(t, r, sn, dir, restorer.Options{})
	tried := false
	_, err := first.Execute(t.Context(), restorer.Observer{Progress: func(restorer.Stats) {
		if tried {
			return
		}
		tried = true
		if _, err := second.Execute(t.Context(), restorer.Observer{}); !errors.Is(err, restorer.ErrBusy) {
			t.Errorf("second: %v", err)
		}
	}})
	must(t, err)
	if _, err := first.Execute(t.Context(), restorer.Observer{}); err == nil {
		t.Error("a plan can be carried out twice")
	}
}
