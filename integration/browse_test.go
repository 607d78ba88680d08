package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/browse"
	"github.com/iot49/ide49-backup/backup/repo"
)

// jsonLines decodes each line of out that begins with a brace.
func jsonLines[T any](t testing.TB, out string) []T {
	t.Helper()
	var all []T
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var v T
		must(t, json.Unmarshal([]byte(line), &v))
		all = append(all, v)
	}
	return all
}

// changeTree makes a second state of a wildTree.
func changeTree(t testing.TB, dir string) {
	t.Helper()
	must(t, os.WriteFile(dir+"/text/log", random(50, 3<<20), 0o644))
	must(t, os.WriteFile(dir+"/added file", random(51, 100_000), 0o600))
	must(t, os.MkdirAll(dir+"/added/deep", 0o755))
	must(t, os.WriteFile(dir+"/added/deep/file", random(52, 1000), 0o600))
	must(t, os.Remove(dir+"/large"))
	must(t, os.Remove(dir+"/empty"))
	must(t, os.Mkdir(dir+"/empty", 0o755)) // another type
	must(t, os.Chmod(dir+"/one byte", 0o600))
}

// ls, find and diff tell what Debian's restic tells of the same snapshots.
func TestLooksLikeRestics(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wildTree(t, src)
	p := newPlace(t)
	p.init(t)
	a := p.backup(t, src).Snapshot
	changeTree(t, src)
	b := p.backup(t, src).Snapshot
	r := p.open(t)
	v := browse.New(r, browse.Options{})

	type node struct {
		Path  string
		Type  backup.NodeType
		Size  uint64
		UID   uint32
		Mtime time.Time
	}
	for _, s := range []*backup.Snapshot{a, b} {
		theirs := jsonLines[struct {
			node
			StructType string `json:"struct_type"`
		}](t, p.restic(t, "ls", "--json", s.ID.String()))
		var want []string
		for _, n := range theirs {
			if n.StructType == "node" {
				want = append(want, fmt.Sprintf("%s %s %d %d %d", viaJSON(t, n.Path), n.Type, n.Size, n.UID, n.Mtime.UnixNano()))
			}
		}
		var got []string
		for e, err := range v.Ls(t.Context(), s, "/", true) {
			must(t, err)
			size := e.Node.Size
			got = append(got, fmt.Sprintf("%s %s %d %d %d", viaJSON(t, e.Path), e.Node.Type, size, e.Node.UID, e.Node.ModTime.UnixNano()))
		}
		sameLines(t, "ls", got, want)
	}

	for _, pattern := range []string{"log", "*lar*", "f*", "no such file"} {
		type matches struct {
			Matches  []node
			Snapshot backup.ID
		}
		var found []matches
		must(t, json.Unmarshal([]byte(p.restic(t, "find", "--json", pattern)), &found))
		var want, got []string
		for _, m := range found {
			for _, n := range m.Matches {
				want = append(want, fmt.Sprintf("%s %s %s %d", m.Snapshot.Short(), viaJSON(t, n.Path), n.Type, n.Size))
			}
		}
		for f, err := range v.Find(t.Context(), []*backup.Snapshot{a, b}, browse.Query{Patterns: []string{pattern}}) {
			must(t, err)
			for _, ver := range f.Versions {
				for _, s := range ver.Snapshots {
					got = append(got, fmt.Sprintf("%s %s %s %d", s.ID.Short(), viaJSON(t, f.Path), ver.Node.Type, ver.Node.Size))
				}
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		sameLines(t, "find "+pattern, got, want)
	}

	type line struct {
		MessageType string `json:"message_type"`
		Path        string
		Modifier    string
		Added       struct{ Bytes uint64 }
		Removed     struct{ Bytes uint64 }
	}
	var want, got []string
	var total line
	for _, l := range jsonLines[line](t, p.restic(t, "diff", "--json", a.ID.String(), b.ID.String())) {
		switch l.MessageType {
		case "change":
			want = append(want, l.Modifier+" "+viaJSON(t, strings.TrimSuffix(l.Path, "/")))
		case "statistics":
			total = l
		}
	}
	ea, err := v.Lookup(t.Context(), a, "/")
	must(t, err)
	eb, err := v.Lookup(t.Context(), b, "/")
	must(t, err)
	var sum browse.DiffTotal
	for c, err := range v.Diff(t.Context(), ea, eb, &sum) {
		must(t, err)
		m := "M"
		switch {
		case c.Before == nil:
			m = "+"
		case c.After == nil:
			m = "-"
		case c.What&browse.DiffersType != 0:
			m = "T"
		case c.What&browse.DiffersContent == 0:
			continue // restic tells it with --metadata only
		}
		got = append(got, m+" "+viaJSON(t, c.Path))
	}
	slices.Sort(got)
	slices.Sort(want)
	sameLines(t, "diff", got, want)
	// restic counts tree blobs, too, and whole folders' that stay: compare
	// what is far larger than these.
	if d := int64(total.Added.Bytes) - int64(sum.DataAdded); d < 0 || d > 300_000 {
		t.Errorf("restic: %d bytes added, ours: %d", total.Added.Bytes, sum.DataAdded)
	}
}

// viaJSON returns a string as it comes out of restic's JSON: what is not UTF-8
// is replaced, byte by byte.
func viaJSON(t testing.TB, s string) string {
	t.Helper()
	b, err := json.Marshal(s)
	must(t, err)
	must(t, json.Unmarshal(b, &s))
	return s
}

func sameLines(t *testing.T, what string, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		var g, w string
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Errorf("%s: line %d of %d and %d:\nours   %s\nrestic %s", what, i, len(got), len(want), g, w)
			return
		}
	}
	t.Logf("%s: %d equal lines", what, len(got))
}

// An archive of ours holds what restic's holds.
func TestDumpLikeRestics(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wildTree(t, src)
	p := newPlace(t)
	p.init(t)
	s := p.backup(t, src).Snapshot
	v := browse.New(p.open(t), browse.Options{})
	top, err := v.Lookup(t.Context(), s, src)
	must(t, err)
	var ours bytes.Buffer
	must(t, v.Dump(t.Context(), &ours, browse.Tar, top, nil))
	theirs := p.restic(t, "dump", s.ID.String(), src)

	type file struct {
		h    *tar.Header
		data []byte
	}
	read := func(r io.Reader) map[string]file {
		all := map[string]file{}
		tr := tar.NewReader(r)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				return all
			}
			must(t, err)
			data, err := io.ReadAll(tr)
			must(t, err)
			all[strings.TrimSuffix(h.Name, "/")] = file{h, data}
		}
	}
	got, want := read(&ours), read(strings.NewReader(theirs))
	for name, w := range want {
		g, ok := got[name]
		if !ok {
			t.Errorf("%q is missing", name)
			continue
		}
		if g.h.Typeflag == tar.TypeLink { // restic writes each name's contents
			g.data = got[g.h.Linkname].data
			g.h.Typeflag, g.h.Linkname = tar.TypeReg, ""
		}
		switch g.h.Typeflag {
		case tar.TypeBlock, tar.TypeChar, tar.TypeFifo: // restic 0.14 writes empty files for these
			g.h.Typeflag, g.h.Devmajor, g.h.Devminor = tar.TypeReg, 0, 0
		}
		if !bytes.Equal(g.data, w.data) || g.h.Typeflag != w.h.Typeflag || g.h.Uid != w.h.Uid || g.h.Linkname != w.h.Linkname ||
			g.h.Devmajor != w.h.Devmajor || g.h.Devminor != w.h.Devminor || g.h.Mode&0o777 != w.h.Mode&0o777 || g.h.ModTime.Sub(w.h.ModTime).Abs() >= time.Second {
			t.Errorf("%q: %d bytes, %+v\nrestic: %d bytes, %+v", name, len(g.data), g.h, len(w.data), w.h)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok && "/"+name != src { // restic leaves out the folder itself
			t.Errorf("restic lacks %q", name)
		}
	}
	t.Logf("%d equal entries", len(want))

	// And GNU tar unpacks it to what was backed up.
	dst := t.TempDir()
	file2 := filepath.Join(t.TempDir(), "x.tar")
	var again bytes.Buffer
	must(t, v.Dump(t.Context(), &again, browse.Tar, top, nil))
	must(t, os.WriteFile(file2, again.Bytes(), 0o600))
	run(t, nil, "tar", "-xpf", file2, "-C", dst, "--xattrs", "--xattrs-include=*", "--numeric-owner")
	sameTree(t, src, filepath.Join(dst, src))
}

// Snapshots are copied from us to restic and back, and by restic from us; each
// finds the other's copies.
func TestCopyWithRestic(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wildTree(t, src)
	one := newPlace(t)
	one.init(t)
	one.backup(t, src)
	changeTree(t, src)
	one.backup(t, src)
	one.restic(t, "backup", "--host", "other", src+"/text")

	two := newPlace(t)
	two.restic(t, "init")
	copyAll := func(to, from *place) repo.CopyResult {
		t.Helper()
		a, b := from.open(t), to.open(t)
		all, err := a.Snapshots(t.Context())
		must(t, err)
		res, err := repo.Copy(t.Context(), b, a, all, repo.CopyObserver{})
		must(t, err)
		return res
	}
	if res := copyAll(two, one); res.Copied != 3 || res.Known != 0 {
		t.Errorf("%+v", res)
	}
	two.check(t)
	// restic sees that its copies would be ours.
	if out := run(t, append(two.env, "RESTIC_PASSWORD2="+password), "sh", "-c", `printf %s "$RESTIC_PASSWORD2" >"$1/pw" && restic copy --repo2 "$2" --password-file2 "$1/pw"`, "sh", t.TempDir(), one.dir); strings.Contains(out, "saved") {
		t.Errorf("restic copied back what was there: %s", out)
	}
	dst := t.TempDir()
	all, err := two.open(t).Snapshots(t.Context())
	must(t, err)
	two.restic(t, "restore", all[1].ID.String(), "--target", dst)
	sameTree(t, src, filepath.Join(dst, src))

	// By restic, from one that it made; and ours finds those copies.
	three := newPlace(t)
	three.init(t)
	pw := filepath.Join(t.TempDir(), "pw")
	must(t, os.WriteFile(pw, []byte(password), 0o600))
	two.restic(t, "copy", "--repo2", three.dir, "--password-file2", pw)
	if res := copyAll(three, one); res.Copied != 0 || res.Known != 3 || res.Blobs != 0 {
		t.Errorf("after restic's copy: %+v", res)
	}
	if res := copyAll(one, three); res.Copied != 0 {
		t.Errorf("back: %+v", res)
	}
	three.check(t)
	one.check(t)
}
