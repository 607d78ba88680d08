package browse_test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/browse"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newRepo(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	r, err := repo.Init(t.Context(), be, "pw", crypt.Params{N: 2, R: 1, P: 1}, repo.Options{})
	must(t, err)
	return r
}

func openRepo(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	must(t, err)
	must(t, r.LoadIndex(t.Context()))
	return r
}

// A dir is what a test puts into a folder: a dir, a string (a file), or a
// backup.Node whose missing fields are filled in.
type dir map[string]any

var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

// holes is a file of that many zeros, in blobs as the chunker makes them.
type holes int

// sparse is a file of these parts.
type sparse []any

func saveDir(ctx context.Context, w *repo.Writer, d dir) (backup.ID, error) {
	tree := &backup.Tree{}
	names := make([]string, 0, len(d))
	for name := range d {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		n := backup.Node{Name: name, Type: backup.File, Mode: 0o644, ModTime: noon, AccessTime: noon, ChangeTime: noon, Links: 1}
		switch v := d[name].(type) {
		case dir:
			id, err := saveDir(ctx, w, v)
			if err != nil {
				return id, err
			}
			n.Type, n.Mode, n.Subtree = backup.Dir, fs.ModeDir|0o755, id
		case string:
			if err := saveFile(ctx, w, &n, sparse{v}); err != nil {
				return backup.ID{}, err
			}
		case sparse:
			if err := saveFile(ctx, w, &n, v); err != nil {
				return backup.ID{}, err
			}
		case backup.Node:
			v.Name = name
			if v.ModTime.IsZero() {
				v.ModTime = noon
			}
			n = v
		default:
			return backup.ID{}, fmt.Errorf("%T", v)
		}
		tree.Nodes = append(tree.Nodes, n)
	}
	s, err := w.SaveTree(ctx, tree)
	return s.ID, err
}

func saveFile(ctx context.Context, w *repo.Writer, n *backup.Node, parts sparse) error {
	for _, part := range parts {
		data := []byte(fmt.Sprint(part))
		if size, ok := part.(holes); ok {
			data = make([]byte, size)
		}
		s, err := w.Save(ctx, backup.DataBlob, data)
		if err != nil {
			return err
		}
		n.Content = append(n.Content, s.ID)
		n.Size += uint64(len(data))
	}
	return nil
}

// blobs stores contents and returns a file node with them.
func blobs(t testing.TB, r *repo.Repo, parts ...any) backup.Node {
	t.Helper()
	n := backup.Node{Type: backup.File, Mode: 0o644, ModTime: noon, Links: 1}
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error { return saveFile(ctx, w, &n, parts) }))
	return n
}

func key(id backup.ID) backend.Key { return backend.Key{Kind: backend.Snapshots, ID: id} }

// take makes a snapshot of the volume "v" with d as its root.
func take(t testing.TB, r *repo.Repo, at time.Time, d dir) *backup.Snapshot {
	t.Helper()
	s := &backup.Snapshot{Time: at, Hostname: "pi", Paths: []string{"/"}, Tags: []string{"volume:v"}}
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		id, err := saveDir(ctx, w, d)
		s.Tree = &id
		return err
	}))
	id, err := r.SaveSnapshot(t.Context(), s)
	must(t, err)
	s.ID = id
	return s
}

func random(seed uint64, n int) string {
	b := make([]byte, n)
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return string(b)
}

// generated is a tree with some hundred files.
func generated(seed uint64) dir {
	rng := rand.New(rand.NewPCG(seed, 7))
	var make func(depth int) dir
	make = func(depth int) dir {
		d := dir{}
		for i := range 1 + rng.IntN(6) {
			d[fmt.Sprint("f", i)] = fmt.Sprint("contents ", rng.IntN(50))
		}
		if depth < 5 {
			for i := range rng.IntN(4) {
				d[fmt.Sprint("d", i)] = make(depth + 1)
			}
		}
		return d
	}
	return make(0)
}

// flatten returns the paths below d in the order of a recursive listing.
func flatten(at string, d dir) []string {
	var out []string
	names := make([]string, 0, len(d))
	for name := range d {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		p := path.Join(at, name)
		out = append(out, p)
		if sub, ok := d[name].(dir); ok {
			out = append(out, flatten(p, sub)...)
		}
	}
	return out
}

func list(t testing.TB, v *browse.View, s *backup.Snapshot, p string, recursive bool) []string {
	t.Helper()
	var got []string
	for e, err := range v.Ls(t.Context(), s, p, recursive) {
		must(t, err)
		got = append(got, e.Path)
	}
	return got
}

func TestLs(t *testing.T) {
	r := newRepo(t, mem.New())
	for seed := range uint64(30) {
		d := generated(seed)
		s := take(t, r, noon, d)
		v := browse.New(r, browse.Options{TreeBytes: int64(seed) * 1000}) // some caches hold nothing
		if got, want := list(t, v, s, "/", true), flatten("/", d); !slices.Equal(got, want) {
			t.Fatalf("seed %d:\n%v\nwant\n%v", seed, got, want)
		}
		var want []string
		for _, p := range flatten("/", d) {
			if path.Dir(p) == "/" {
				want = append(want, p)
			}
		}
		if got := list(t, v, s, "", false); !slices.Equal(got, want) {
			t.Fatalf("seed %d: %v, want %v", seed, got, want)
		}
	}
}

func TestLookup(t *testing.T) {
	r := newRepo(t, mem.New())
	s := take(t, r, noon, dir{"a": dir{"b": dir{"c": "x"}}, "z": "y"})
	v := browse.New(r, browse.Options{})
	for p, want := range map[string]error{
		"": nil, "/": nil, "a": nil, "/a/b/": nil, "a//b/c": nil, "/a/./b/../b/c": nil, "../../z": nil,
		"/q": fs.ErrNotExist, "/a/q/c": fs.ErrNotExist, "/z/x": browse.ErrNotFolder, "/a/b/c/": nil,
	} {
		if _, err := v.Lookup(t.Context(), s, p); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", p, err, want)
		}
	}
	if got := list(t, v, s, "/a/b/c", false); !slices.Equal(got, []string{"/a/b/c"}) {
		t.Errorf("ls of a file: %v", got)
	}
	if got := list(t, v, s, "a", true); !slices.Equal(got, []string{"/a/b", "/a/b/c"}) {
		t.Errorf("ls of a folder: %v", got)
	}
}

func TestTotals(t *testing.T) {
	r := newRepo(t, mem.New())
	same := dir{"x": "1234", "y": dir{"z": "56"}}
	s := take(t, r, noon, dir{"a": same, "b": same, "c": dir{}, "l": backup.Node{Type: backup.Symlink, LinkTarget: "a"}, "f": "7"})
	v := browse.New(r, browse.Options{})
	totals := v.NewTotals()
	for p, want := range map[string]browse.Total{
		"/": {Files: 5, Folders: 5, Others: 1, Bytes: 13}, "/a": {Files: 2, Folders: 1, Bytes: 6}, "/c": {}, "/f": {Files: 1, Bytes: 1},
	} {
		e, err := v.Lookup(t.Context(), s, p)
		must(t, err)
		if got, err := totals.Of(t.Context(), e.Node); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", p, got, err, want)
		}
	}
	for seed := range uint64(10) {
		d := generated(seed)
		var want browse.Total
		s := take(t, r, noon, d)
		for e, err := range v.Ls(t.Context(), s, "/", true) {
			must(t, err)
			if e.Node.Type == backup.Dir {
				want.Folders++
			} else {
				want.Files++
				want.Bytes += e.Node.Size
			}
		}
		root, err := v.Lookup(t.Context(), s, "/")
		must(t, err)
		if got, err := totals.Of(t.Context(), root.Node); err != nil || got != want {
			t.Errorf("seed %d: %+v, %v; want %+v", seed, got, err, want)
		}
	}
}

// A folder that can't be read is told and the others are still listed.
func TestDamagedFolder(t *testing.T) {
	r := newRepo(t, mem.New())
	gone := backup.Node{Type: backup.Dir, Mode: fs.ModeDir | 0o755, Subtree: backup.Hash([]byte("gone"))}
	s := take(t, r, noon, dir{"a": dir{"x": "1"}, "b": gone, "c": dir{"y": "2"}})
	v := browse.New(r, browse.Options{})
	var got []string
	for e, err := range v.Ls(t.Context(), s, "/", true) {
		if err != nil {
			if !errors.Is(err, repo.ErrNoBlob) {
				t.Errorf("%s: %v", e.Path, err)
			}
			e.Path += "!"
		}
		got = append(got, e.Path)
	}
	if want := []string{"/a", "/a/x", "/b", "/b!", "/c", "/c/y"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	root, err := v.Lookup(t.Context(), s, "/")
	must(t, err)
	if _, err := v.NewTotals().Of(t.Context(), root.Node); !errors.Is(err, repo.ErrNoBlob) {
		t.Errorf("totals: %v", err)
	}
	got = nil
	for f, err := range v.Find(t.Context(), []*backup.Snapshot{s}, browse.Query{Types: []backup.NodeType{backup.File}}) {
		if err != nil {
			f.Path += "!"
		}
		got = append(got, f.Path)
	}
	if want := []string{"/a/x", "/b!", "/c/y"}; !slices.Equal(got, want) {
		t.Errorf("find: %v, want %v", got, want)
	}
}

// A walk ends soon after its caller does, in any place.
func TestWalkStops(t *testing.T) {
	r := newRepo(t, mem.New())
	d := generated(3)
	s := take(t, r, noon, d)
	v := browse.New(r, browse.Options{TreeBytes: 1})
	all := len(flatten("/", d))
	for stop := range all {
		n := 0
		for range v.Ls(t.Context(), s, "/", true) {
			if n++; n > stop {
				break
			}
		}
		if n != stop+1 {
			t.Fatalf("%d entries, want %d", n, stop+1)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n := 0
	for _, err := range v.Ls(ctx, s, "/", true) {
		if n++; !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	}
	if n != 1 {
		t.Errorf("cancelled: %d entries", n)
	}
}

// Two names for the next folder, sixty deep: no walk could end, but each is
// stopped at once, and what adds up knows the folders that it has seen.
func TestFolderBomb(t *testing.T) {
	r := newRepo(t, mem.New())
	var s *backup.Snapshot
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		id, err := saveDir(ctx, w, dir{"f": "x"})
		for range 70 {
			if err != nil {
				return err
			}
			n := backup.Node{Type: backup.Dir, Mode: fs.ModeDir, Subtree: id}
			id, err = saveDir(ctx, w, dir{"a": n, "b": n})
		}
		s = &backup.Snapshot{Tree: &id, Time: noon, Paths: []string{"/"}}
		return err
	}))
	v := browse.New(r, browse.Options{})
	root, err := v.Lookup(t.Context(), s, "/")
	must(t, err)
	if sum, err := v.NewTotals().Of(t.Context(), root.Node); err != nil || sum.Bytes != ^uint64(0) {
		t.Errorf("%+v, %v", sum, err)
	}
	if _, err := v.Stats(t.Context(), []*backup.Snapshot{s}); err != nil {
		t.Error(err)
	}
	n := 0
	for range v.Ls(t.Context(), s, "/", true) {
		if n++; n == 10_000 {
			break
		}
	}
}

func TestTooDeep(t *testing.T) {
	r := newRepo(t, mem.New())
	var s *backup.Snapshot
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		id, err := saveDir(ctx, w, dir{"f": "x"})
		for range 5000 {
			if err != nil {
				return err
			}
			id, err = saveDir(ctx, w, dir{"d": backup.Node{Type: backup.Dir, Mode: fs.ModeDir, Subtree: id}})
		}
		s = &backup.Snapshot{Tree: &id, Time: noon, Paths: []string{"/"}}
		return err
	}))
	v := browse.New(r, browse.Options{})
	var last error
	n := 0
	for _, err := range v.Ls(t.Context(), s, "/", true) {
		n++
		last = err
	}
	if !errors.Is(last, browse.ErrTooDeep) || n != 4097 {
		t.Errorf("%d entries, %v", n, last)
	}
}

func find(t *testing.T, v *browse.View, all []*backup.Snapshot, q browse.Query) []string {
	t.Helper()
	var got []string
	for f, err := range v.Find(t.Context(), all, q) {
		must(t, err)
		line := f.Path
		for _, ver := range f.Versions {
			line += fmt.Sprintf(" %d:", ver.Node.Size)
			for _, s := range ver.Snapshots {
				line += fmt.Sprint(slices.Index(all, s))
			}
		}
		got = append(got, line)
	}
	return got
}

func TestFind(t *testing.T) {
	r := newRepo(t, mem.New())
	old := blobs(t, r, "old")
	old.ModTime = noon.AddDate(-1, 0, 0)
	fixed := dir{"log.txt": "1", "Readme.TXT": "22", "old.txt": old}
	all := []*backup.Snapshot{
		take(t, r, noon, dir{"v": dir{"fixed": fixed, "moving": dir{"a.txt": "x"}}}),
		take(t, r, noon, dir{"v": dir{"fixed": fixed, "moving": dir{"a.txt": "xx", "b": "b"}}}),
		take(t, r, noon, dir{"v": dir{"fixed": fixed, "moving": dir{"a.txt": "x", "b": "b"}}}),
		take(t, r, noon, dir{"v": dir{"fixed": dir{}, "moving": "now a file"}}),
	}
	v := browse.New(r, browse.Options{})
	files := []backup.NodeType{backup.File}
	for name, c := range map[string]struct {
		q    browse.Query
		want []string
	}{
		"name":        {browse.Query{Patterns: []string{"a.txt"}}, []string{"/v/moving/a.txt 1:02 2:1"}},
		"glob":        {browse.Query{Patterns: []string{"*.txt"}, After: noon}, []string{"/v/fixed/log.txt 1:012", "/v/moving/a.txt 1:02 2:1"}},
		"case":        {browse.Query{Patterns: []string{"readme*"}, IgnoreCase: true}, []string{"/v/fixed/Readme.TXT 2:012"}},
		"two":         {browse.Query{Patterns: []string{"b", "Read*"}}, []string{"/v/fixed/Readme.TXT 2:012", "/v/moving/b 1:12"}},
		"path":        {browse.Query{Patterns: []string{"fixed/l*"}}, []string{"/v/fixed/log.txt 1:012"}},
		"whole path":  {browse.Query{Patterns: []string{"/v/*/b"}}, []string{"/v/moving/b 1:12"}},
		"wrong path":  {browse.Query{Patterns: []string{"/moving/b"}}, nil},
		"before":      {browse.Query{Before: noon.Add(-1)}, []string{"/v/fixed/old.txt 3:012"}},
		"size":        {browse.Query{MinSize: 2, MaxSize: 3}, []string{"/v/fixed/Readme.TXT 2:012", "/v/fixed/old.txt 3:012", "/v/moving/a.txt 2:1"}},
		"folder":      {browse.Query{Patterns: []string{"moving"}}, []string{"/v/moving 0:012 10:3"}},
		"type":        {browse.Query{Patterns: []string{"moving"}, Types: files}, []string{"/v/moving 10:3"}},
		"below":       {browse.Query{Below: "v/moving", Types: files}, []string{"/v/moving/a.txt 1:02 2:1", "/v/moving/b 1:12"}},
		"below wrong": {browse.Query{Below: "/q"}, nil},
	} {
		if got := find(t, v, all, c.q); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	for _, err := range v.Find(t.Context(), all, browse.Query{Patterns: []string{"[a"}}) {
		if !errors.Is(err, browse.ErrPattern) {
			t.Errorf("bad pattern: %v", err)
		}
	}
}

// Find over generated snapshots agrees with looking into each one.
func TestFindAgreesWithLs(t *testing.T) {
	r := newRepo(t, mem.New())
	v := browse.New(r, browse.Options{})
	var all []*backup.Snapshot
	want := map[string]int{}
	for i := range 12 {
		d := generated(uint64(i % 5))
		d["changing"] = dir{"n": fmt.Sprint(i)}
		s := take(t, r, noon.Add(time.Duration(i)*time.Hour), d)
		all = append(all, s)
		for e, err := range v.Ls(t.Context(), s, "/", true) {
			must(t, err)
			want[fmt.Sprint(e.Path, e.Node.Size, e.Node.Type, e.Node.Content)]++
		}
	}
	got := map[string]int{}
	last := ""
	for f, err := range v.Find(t.Context(), all, browse.Query{}) {
		must(t, err)
		if strings.ReplaceAll(f.Path, "/", "\x00") <= last {
			t.Errorf("%q comes after %q", f.Path, last)
		}
		last = strings.ReplaceAll(f.Path, "/", "\x00")
		for _, ver := range f.Versions {
			got[fmt.Sprint(f.Path, ver.Node.Size, ver.Node.Type, ver.Node.Content)] += len(ver.Snapshots)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d found, want %d", len(got), len(want))
	}
	for k, n := range want {
		if got[k] != n {
			t.Errorf("%s: in %d snapshots, want %d", k, got[k], n)
		}
	}
}

// A folder that snapshots share is read once.
func TestFindReadsOnce(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	d := generated(1)
	var all []*backup.Snapshot
	for i := range 20 {
		d["n"] = fmt.Sprint(i)
		all = append(all, take(t, r, noon, d))
	}
	reads := 0
	counted := faulty.New(be, func(c faulty.Call) faulty.Fault {
		if c.Op == faulty.Get && c.Key.Kind == backend.Packs {
			reads++
		}
		return faulty.Fault{}
	})
	v := browse.New(openRepo(t, counted), browse.Options{TreeBytes: 1})
	folders := 20 // roots
	for _, p := range flatten("/", d) {
		if base := path.Base(p); base[0] == 'd' {
			folders++
		}
	}
	for _, err := range v.Find(t.Context(), all, browse.Query{Patterns: []string{"f1"}}) {
		must(t, err)
	}
	if reads > folders+40 { // Below's look-ups take the roots, too
		t.Errorf("%d reads for %d folders", reads, folders)
	}
}

func TestHistory(t *testing.T) {
	r := newRepo(t, mem.New())
	touched := blobs(t, r, "x")
	touched.ModTime = noon.Add(time.Hour)
	var all []*backup.Snapshot
	for i, d := range []dir{
		{}, {"v": dir{"f": "x"}}, {"v": dir{"f": "x", "other": "1"}}, {"v": dir{"f": "xx"}}, {"v": dir{}}, {"v": "file"},
		{"v": dir{"f": "xx"}}, {"v": dir{"f": "xx"}}, {"v": dir{"f": dir{}}}, {"v": dir{"f": "x"}}, {"v": dir{"f": touched}}, {},
	} {
		all = append(all, take(t, r, noon.AddDate(0, 0, i), d))
	}
	v := browse.New(r, browse.Options{})
	var got []string
	for ver, err := range v.History(t.Context(), all, "v/f") {
		must(t, err)
		line := "none"
		if ver.Node != nil {
			line = fmt.Sprint(ver.Node.Type, ver.Node.Size)
		}
		for _, s := range ver.Snapshots {
			line += fmt.Sprint(" ", slices.Index(all, s))
		}
		got = append(got, line)
	}
	want := []string{"file1 1 2", "file2 3", "none 4 5", "file2 6 7", "dir0 8", "file1 9", "file1 10", "none 11"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	for range v.History(t.Context(), all, "no/such") {
		t.Error("versions of nothing")
	}
}

func TestDiff(t *testing.T) {
	r := newRepo(t, mem.New())
	fixed := generated(5)
	chmod := blobs(t, r, "m")
	chmod.Mode, chmod.AccessTime, chmod.ChangeTime, chmod.Inode = 0o600, noon.Add(time.Hour), noon.Add(time.Hour), 99
	sameBut := blobs(t, r, "s")
	sameBut.AccessTime, sameBut.ChangeTime, sameBut.Inode, sameBut.Links = noon.Add(time.Hour), noon.Add(time.Hour), 99, 3
	a := take(t, r, noon, dir{"fixed": fixed, "gone": dir{"x": "12345", "y": "67"}, "chg": "one", "m": "m", "s": "s", "t": "file", "moved": "moving"})
	b := take(t, r, noon, dir{"fixed": fixed, "new": dir{"x": "123456789"}, "chg": "three", "m": chmod, "s": sameBut, "t": dir{"in": "i"}, "moved2": "moving"})
	v := browse.New(r, browse.Options{})
	ea, err := v.Lookup(t.Context(), a, "/")
	must(t, err)
	eb, err := v.Lookup(t.Context(), b, "/")
	must(t, err)
	var got []string
	var total browse.DiffTotal
	for c, err := range v.Diff(t.Context(), ea, eb, &total) {
		must(t, err)
		sign := "M"
		switch {
		case c.Before == nil:
			sign = "+"
		case c.After == nil:
			sign = "-"
		}
		got = append(got, strings.TrimSpace(sign+c.Path+" "+c.What.String()))
	}
	want := []string{"M/chg content", "-/gone", "-/gone/x", "-/gone/y", "M/m mode", "-/moved", "+/moved2", "+/new", "+/new/x", "M/t type,content,mode", "+/t/in"}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	wantTotal := browse.DiffTotal{
		Added: browse.Total{Files: 3, Folders: 1, Bytes: 16}, Removed: browse.Total{Files: 3, Folders: 1, Bytes: 13},
		Changed: browse.Total{Files: 1, Folders: 1, Bytes: 5}, Metadata: 1, DataAdded: 9 + 5 + 1, DataRemoved: 5 + 2 + 3 + 4,
	}
	if total != wantTotal {
		t.Errorf("%+v\nwant %+v", total, wantTotal)
	}
	for c := range v.Diff(t.Context(), ea, ea, &total) {
		t.Errorf("%s differs from itself", c.Path)
	}
	if total != (browse.DiffTotal{}) {
		t.Errorf("%+v between equal folders", total)
	}
}

// Equal folders are not read, wherever they are.
func TestDiffSkipsEqual(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	d := dir{"a": generated(1), "b": dir{"c": generated(2), "x": "1"}}
	a := take(t, r, noon, d)
	d["b"].(dir)["x"] = "2"
	b := take(t, r, noon, d)
	reads := 0
	v := browse.New(openRepo(t, faulty.New(be, func(c faulty.Call) faulty.Fault {
		if c.Op == faulty.Get && c.Key.Kind == backend.Packs {
			reads++
		}
		return faulty.Fault{}
	})), browse.Options{})
	ea, err := v.Lookup(t.Context(), a, "/")
	must(t, err)
	eb, err := v.Lookup(t.Context(), b, "/")
	must(t, err)
	n := 0
	for _, err := range v.Diff(t.Context(), ea, eb, nil) {
		must(t, err)
		n++
	}
	if n != 1 || reads != 4 {
		t.Errorf("%d changes with %d reads", n, reads)
	}
}

func TestCat(t *testing.T) {
	r := newRepo(t, mem.New())
	long := strings.Repeat("0123456789", 300_000)
	wrong := blobs(t, r, "abc")
	wrong.Size = 4
	missing := backup.Node{Type: backup.File, Size: 1, Content: []backup.ID{backup.Hash([]byte("gone"))}}
	s := take(t, r, noon, dir{
		"empty": "", "short": "short", "many": sparse{random(1, 3<<20), random(2, 5<<20), long, random(3, 8<<20), random(4, 8<<20), random(5, 8<<20), "end"},
		"holes": sparse{"a", holes(512 << 10), holes(512 << 10), "b", holes(5000)}, "dir": dir{}, "wrong": wrong, "missing": missing,
	})
	v := browse.New(r, browse.Options{})
	cat := func(p string) (string, error) {
		e, err := v.Lookup(t.Context(), s, p)
		must(t, err)
		var out bytes.Buffer
		err = v.Cat(t.Context(), &out, e)
		return out.String(), err
	}
	for p, want := range map[string]string{
		"empty": "", "short": "short", "many": random(1, 3<<20) + random(2, 5<<20) + long + random(3, 8<<20) + random(4, 8<<20) + random(5, 8<<20) + "end",
		"holes": "a" + string(make([]byte, 1<<20)) + "b" + string(make([]byte, 5000)),
	} {
		if got, err := cat(p); err != nil || got != want {
			t.Errorf("%s: %d bytes, want %d; %v", p, len(got), len(want), err)
		}
		// And at random.
		e, err := v.Lookup(t.Context(), s, p)
		must(t, err)
		f, err := v.Open(e.Node)
		must(t, err)
		rng := rand.New(rand.NewPCG(1, 1))
		for range 50 {
			off := rng.Uint64N(uint64(len(want)) + 10)
			buf := make([]byte, rng.IntN(3<<20))
			n, err := f.ReadAt(t.Context(), buf, off)
			rest := want[min(off, uint64(len(want))):]
			if string(buf[:n]) != rest[:min(len(rest), len(buf))] || (err != nil) != (n < len(buf)) || err != nil && !errors.Is(err, io.EOF) {
				t.Fatalf("%s: %d of %d bytes at %d: %v", p, n, len(buf), off, err)
			}
		}
	}
	for p, want := range map[string]error{"dir": browse.ErrNotFile, "wrong": browse.ErrSize, "missing": repo.ErrNoBlob} {
		if _, err := cat(p); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", p, err, want)
		}
	}
	e, err := v.Lookup(t.Context(), s, "many")
	must(t, err)
	if err := v.Cat(t.Context(), failing{}, e); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("failing writer: %v", err)
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestHoles(t *testing.T) {
	r := newRepo(t, mem.New())
	s := take(t, r, noon, dir{"f": sparse{"abc", holes(512 << 10), holes(512 << 10), "de", holes(4096)}})
	v := browse.New(r, browse.Options{})
	e, err := v.Lookup(t.Context(), s, "f")
	must(t, err)
	f, err := v.Open(e.Node)
	must(t, err)
	const data2 = 3 + 1<<20
	for off, want := range map[uint64][2]uint64{ // data, hole; 0 in the place of none
		0: {0, 3}, 2: {2, 3}, 3: {data2, 3}, 600_000: {data2, 600_000}, data2 + 1: {data2 + 1, data2 + 2}, data2 + 2: {0, data2 + 2}, data2 + 2 + 4096: {0, 0},
	} {
		d, okD := f.Data(off)
		h, okH := f.Hole(off)
		if !okD {
			d = 0
		}
		if !okH {
			h = 0
		}
		if d != want[0] || h != want[1] {
			t.Errorf("at %d: data %d %v, hole %d %v; want %v", off, d, okD, h, okH, want)
		}
	}
}

// special is a tree with everything that an archive may meet.
func special(t testing.TB, r *repo.Repo) dir {
	linked := blobs(t, r, "linked")
	linked.Links, linked.Inode, linked.DeviceID = 2, 7, 1
	liar := blobs(t, r, "liar")
	liar.Links, liar.Inode, liar.DeviceID = 2, 7, 1
	attrs := blobs(t, r, "attrs")
	attrs.Xattrs = []backup.Xattr{{Name: "user.a=b%", Value: []byte("\x00\xff\n")}, {Name: "user.plain", Value: []byte("p")}}
	attrs.UID, attrs.GID, attrs.User, attrs.Mode = 4_000_000_000, 12, "iot", 0o751|fs.ModeSetuid
	return dir{"root": dir{
		"file": "contents", "empty": "", "big": random(9, 2<<20), "a1": linked, "a2": linked, "a3": liar, "attrs": attrs,
		"sparse":       sparse{holes(512 << 10), "middle", holes(512 << 10), holes(512 << 10), "end"},
		"all hole":     sparse{holes(512 << 10), holes(100_000)},
		"ragged":       sparse{"x", holes(4096), "y", holes(5000), random(4, 5000), holes(512 << 10)},
		"link":         backup.Node{Type: backup.Symlink, Mode: fs.ModeSymlink | 0o777, LinkTarget: "/etc/../\xff passwd"},
		"chr":          backup.Node{Type: backup.CharDevice, Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Device: 1<<8 | 3},
		"fifo":         backup.Node{Type: backup.FIFO, Mode: fs.ModeNamedPipe | 0o600},
		"sock":         backup.Node{Type: backup.Socket, Mode: fs.ModeSocket | 0o600},
		"dir":          dir{"in\nside": "1", strings.Repeat("n", 255): dir{strings.Repeat("m", 255): "deep"}},
		"..\\..\\evil": "windows", "C:": dir{"x": "drive"}, "not utf-8 \xff": "bytes", "100%": "percent", "%25": "more", "-rf": "dash",
	}}
}

func TestTar(t *testing.T) {
	r := newRepo(t, mem.New())
	s := take(t, r, noon, special(t, r))
	v := browse.New(r, browse.Options{})
	top, err := v.Lookup(t.Context(), s, "/root")
	must(t, err)
	var out bytes.Buffer
	problems := map[string]error{}
	must(t, v.Dump(t.Context(), &out, browse.Tar, top, func(p string, err error) { problems[p] = err }))
	if len(problems) != 1 || !errors.Is(problems["/root/sock"], browse.ErrNotInArchive) {
		t.Errorf("problems %v", problems)
	}
	// By archive/tar.
	got := map[string]*tar.Header{}
	contents := map[string]string{}
	tr := tar.NewReader(bytes.NewReader(out.Bytes()))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		data, err := io.ReadAll(tr)
		must(t, err)
		if got[h.Name] != nil || strings.HasPrefix(h.Name, "/") {
			t.Errorf("name %q", h.Name)
		}
		got[h.Name], contents[h.Name] = h, string(data)
		if !h.ModTime.Equal(noon) {
			t.Errorf("%s: time %v", h.Name, h.ModTime)
		}
	}
	for e, err := range v.Ls(t.Context(), s, "/", true) {
		must(t, err)
		name := e.Path[1:]
		if e.Node.Type == backup.Dir {
			name += "/"
		}
		h := got[name]
		if e.Node.Type == backup.Socket {
			continue
		}
		if h == nil {
			t.Errorf("%q is missing", name)
			continue
		}
		if e.Node.Type == backup.File && h.Typeflag != tar.TypeLink {
			var want bytes.Buffer
			must(t, v.Cat(t.Context(), &want, e))
			if contents[name] != want.String() {
				t.Errorf("%q: %d bytes, want %d", name, len(contents[name]), want.Len())
			}
		}
	}
	if h := got["root/a2"]; h.Typeflag != tar.TypeLink || h.Linkname != "root/a1" {
		t.Errorf("hard link: %+v", h)
	}
	if h := got["root/a3"]; h.Typeflag != tar.TypeReg {
		t.Errorf("false hard link: %+v", h)
	}
	if h := got["root/attrs"]; h.PAXRecords["SCHILY.xattr.user.a%3Db%25"] != "\x00\xff\n" || h.Uid != 4_000_000_000 || h.Uname != "iot" || h.Mode != 0o4751 {
		t.Errorf("attributes: %+v", h)
	}
	if h := got["root/chr"]; h.Typeflag != tar.TypeChar || h.Devmajor != 1 || h.Devminor != 3 {
		t.Errorf("device: %+v", h)
	}
	if out.Len() > 3<<20 {
		t.Errorf("%d bytes: the holes are stored", out.Len())
	}
	// By GNU tar, holes, links and attributes included.
	file := filepath.Join(t.TempDir(), "x.tar")
	must(t, os.WriteFile(file, out.Bytes(), 0o600))
	dst := t.TempDir()
	if text, err := exec.Command("tar", "-xf", file, "-C", dst, "--xattrs", "--xattrs-include=user.*", "--numeric-owner", "--no-same-owner").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v %s", err, text)
	}
	for _, name := range []string{"sparse", "all hole", "ragged", "big", "a2", "-rf", "not utf-8 \xff", "dir/in\nside"} {
		e, err := v.Lookup(t.Context(), s, "/root/"+name)
		must(t, err)
		var want bytes.Buffer
		must(t, v.Cat(t.Context(), &want, e))
		if data, err := os.ReadFile(filepath.Join(dst, "root", name)); err != nil || string(data) != want.String() {
			t.Errorf("%q by GNU tar: %d bytes, want %d; %v", name, len(data), want.Len(), err)
		}
	}
	a1, err := os.Stat(dst + "/root/a1")
	must(t, err)
	a2, err := os.Stat(dst + "/root/a2")
	must(t, err)
	if !os.SameFile(a1, a2) {
		t.Error("GNU tar made two files of a hard link")
	}
}

func TestZip(t *testing.T) {
	r := newRepo(t, mem.New())
	s := take(t, r, noon, special(t, r))
	v := browse.New(r, browse.Options{})
	top, err := v.Lookup(t.Context(), s, "/")
	must(t, err)
	var out bytes.Buffer
	problems := map[string]error{}
	must(t, v.Dump(t.Context(), &out, browse.Zip, top, func(p string, err error) { problems[p] = err }))
	if len(problems) != 3 {
		t.Errorf("problems %v", problems)
	}
	zr, err := zip.NewReader(bytes.NewReader(out.Bytes()), int64(out.Len()))
	must(t, err)
	got := map[string]*zip.File{}
	for _, f := range zr.File {
		if got[f.Name] != nil || strings.ContainsAny(f.Name, "\\:\x00\n") || !fs.ValidPath(strings.TrimSuffix(f.Name, "/")) {
			t.Errorf("name %q", f.Name)
		}
		got[f.Name] = f
	}
	for name, path := range map[string]string{
		"root/file": "/root/file", "root/sparse": "/root/sparse", "root/..%5C..%5Cevil": "/root/..\\..\\evil", "root/C%3A/x": "/root/C:/x", "root/not utf-8 %FF": "/root/not utf-8 \xff",
		"root/100%25": "/root/100%", "root/%2525": "/root/%25", "root/a2": "/root/a2", "root/big": "/root/big", "root/dir/in%0Aside": "/root/dir/in\nside",
	} {
		if got[name] == nil {
			t.Errorf("%q is missing", name)
			continue
		}
		rc, err := got[name].Open()
		must(t, err)
		data, err := io.ReadAll(rc)
		must(t, err)
		e, err := v.Lookup(t.Context(), s, path)
		must(t, err)
		var want bytes.Buffer
		must(t, v.Cat(t.Context(), &want, e))
		if string(data) != want.String() {
			t.Errorf("%q: %d bytes, want %d", name, len(data), want.Len())
		}
	}
	if m := got["root/link"].Mode(); m&fs.ModeSymlink == 0 {
		t.Errorf("link: %v", m)
	}
	if m := got["root/attrs"].Mode(); m != 0o751|fs.ModeSetuid {
		t.Errorf("mode: %v", m)
	}
}

// A damaged blob leaves out a file that has not been begun, and ends an archive
// whose file it would leave half.
func TestDumpDamaged(t *testing.T) {
	r := newRepo(t, mem.New())
	missing := backup.Node{Type: backup.File, Size: 1, Content: []backup.ID{backup.Hash([]byte("gone"))}}
	s := take(t, r, noon, dir{"a": "1", "m": missing, "z": "2"})
	v := browse.New(r, browse.Options{})
	top, err := v.Lookup(t.Context(), s, "/")
	must(t, err)
	for _, format := range []browse.Format{browse.Tar, browse.Zip} {
		var problems []string
		must(t, v.Dump(t.Context(), io.Discard, format, top, func(p string, err error) { problems = append(problems, p) }))
		if !slices.Equal(problems, []string{"/m"}) {
			t.Errorf("problems %q", problems)
		}
	}
	be := mem.New()
	r = newRepo(t, be)
	s = take(t, r, noon, dir{"a": random(1, 1000)})
	damaged := faulty.New(be, func(c faulty.Call) faulty.Fault {
		if c.Op != faulty.Get || c.Key.Kind != backend.Packs || r.Index().PackBlobs(c.Key.ID)[0].Kind == backup.TreeBlob {
			return faulty.Fault{}
		}
		return faulty.Fault{Damage: func(b []byte) []byte { b[0] ^= 1; return b }}
	})
	v = browse.New(openRepo(t, damaged), browse.Options{})
	top, err = v.Lookup(t.Context(), s, "/")
	must(t, err)
	for _, format := range []browse.Format{browse.Tar, browse.Zip} {
		if err := v.Dump(t.Context(), io.Discard, format, top, nil); !errors.Is(err, repo.ErrDamaged) {
			t.Errorf("damaged contents: %v", err)
		}
	}
	if err := v.Dump(t.Context(), failing{}, browse.Tar, top, nil); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("failing writer: %v", err)
	}
}

// Blobs that move to other packs while a View is open are found again.
func TestReload(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	s := take(t, r, noon, dir{"f": "contents"})
	v := browse.New(openRepo(t, be), browse.Options{})
	old := slices.Collect(func(yield func(backup.ID) bool) {
		for id := range r.Index().Packs() {
			if !yield(id) {
				return
			}
		}
	})
	// The same blobs in other packs, and the old packs and indexes gone.
	var indexes []backup.ID
	for info, err := range be.List(t.Context(), backend.Indexes) {
		must(t, err)
		indexes = append(indexes, info.Key.ID)
	}
	for _, id := range indexes {
		must(t, be.Delete(t.Context(), backend.Key{Kind: backend.Indexes, ID: id}))
	}
	take(t, openRepo(t, be), noon, dir{"f": "contents"})
	for _, id := range old {
		must(t, be.Delete(t.Context(), backend.Key{Kind: backend.Packs, ID: id}))
	}
	e, err := v.Lookup(t.Context(), s, "/f")
	must(t, err)
	var out bytes.Buffer
	if err := v.Cat(t.Context(), &out, e); err != nil || out.String() != "contents" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestStats(t *testing.T) {
	r := newRepo(t, mem.New())
	a, b := strings.Repeat("a", 100_000), strings.Repeat("b", 50_000)
	s1 := take(t, r, noon, dir{"a": a})
	s2 := take(t, r, noon.Add(1), dir{"a": a, "b": b})
	s3 := take(t, r, noon.Add(2), dir{"a": a, "b": b})
	s3.Summary = &backup.Summary{DataAdded: 5, DataAddedPacked: 4, TotalFilesProcessed: 3, TotalBytesProcessed: 2}
	s3.Hostname = "other"
	v := browse.New(r, browse.Options{})
	st, err := v.Stats(t.Context(), []*backup.Snapshot{s1, s2, s3})
	must(t, err)
	if st.Snapshots != 3 || st.Logical != 250_002 || st.Blobs != 4 || st.Deduplication() < 1.6 || st.Deduplication() > 1.7 || st.Compression() < 50 {
		t.Errorf("%+v", st)
	}
	if len(st.Volumes) != 2 || st.Volumes[0].Host != "other" || len(st.Volumes[1].Runs) != 2 {
		t.Fatalf("%+v", st.Volumes)
	}
	runs := st.Volumes[1].Runs
	if runs[0].Bytes != 100_000 || runs[1].Files != 2 || !runs[1].Computed || runs[0].Added < 100_000 || runs[0].Added > 101_000 || runs[1].Added < 50_000 || runs[1].Added > 51_000 {
		t.Errorf("%+v", runs)
	}
	if run := st.Volumes[0].Runs[0]; run.Computed || run.Added != 5 || run.Stored != 4 || run.Bytes != 2 {
		t.Errorf("%+v", run)
	}
	if added, stored := st.Volumes[1].Added(); added != runs[0].Added+runs[1].Added || stored == 0 {
		t.Errorf("%d %d", added, stored)
	}
}

func TestCovers(t *testing.T) {
	s := &backup.Snapshot{Paths: []string{"/service-config/a", "relative"}}
	for p, want := range map[string]bool{
		"/service-config/a": true, "service-config/a/x": true, "/": true, "/service-config": true, "/service-config/ab": false, "/service-config/b": false, "/relative/x": true,
	} {
		if browse.Covers(s, p) != want {
			t.Errorf("%q: %v", p, !want)
		}
	}
}
