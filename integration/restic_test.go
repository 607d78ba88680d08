package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/archiver"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

const password = "correct horse"

// A place is a repository in a folder, used by us and by stock restic.
type place struct {
	dir string
	env []string
}

func newPlace(t testing.TB) *place {
	t.Helper()
	tool(t, "restic", "restic")
	dir := filepath.Join(t.TempDir(), "repository")
	return &place{dir, []string{"RESTIC_REPOSITORY=" + dir, "RESTIC_PASSWORD=" + password, "RESTIC_CACHE_DIR=" + t.TempDir(), "RESTIC_PROGRESS_FPS=0"}}
}

func (p *place) restic(t testing.TB, args ...string) string {
	t.Helper()
	return run(t, p.env, "restic", args...)
}

func (p *place) init(t testing.TB) {
	t.Helper()
	be, err := local.Create(p.dir, local.Options{})
	must(t, err)
	r, err := repo.Init(t.Context(), be, password, crypt.MinParams, repo.Options{})
	must(t, err)
	must(t, r.Close())
}

func (p *place) open(t testing.TB) *repo.Repo {
	t.Helper()
	be, err := local.Open(p.dir, local.Options{})
	must(t, err)
	r, err := repo.Open(t.Context(), be, password, repo.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	must(t, r.LoadIndex(t.Context()))
	return r
}

// backup takes a snapshot of one folder with us.
func (p *place) backup(t testing.TB, dir string) *archiver.Result {
	t.Helper()
	r := p.open(t)
	all, err := r.Snapshots(t.Context())
	must(t, err)
	res, err := archiver.Run(t.Context(), r, []archiver.Source{{Volume: backup.Volume{Name: filepath.Base(dir), Path: dir}}},
		archiver.Job{Time: time.Now(), Hostname: "pi", Program: "test", History: all},
		archiver.Observer{Problem: func(_ backup.Volume, p archiver.Problem) { t.Errorf("%s: %v", p.Path, p.Err) }})
	must(t, err)
	must(t, res[0].Err)
	return res[0]
}

// check is restic's own check of every byte.
func (p *place) check(t testing.TB) {
	t.Helper()
	if out := p.restic(t, "check", "--read-data"); !strings.Contains(out, "no errors were found") {
		t.Errorf("restic check: %s", out)
	}
}

func TestResticReadsOurs(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wildTree(t, src)
	p := newPlace(t)
	p.init(t)
	res := p.backup(t, src)
	p.check(t)

	dst := t.TempDir()
	p.restic(t, "restore", res.Snapshot.ID.String(), "--target", dst)
	sameTree(t, src, filepath.Join(dst, src))

	if out := p.restic(t, "snapshots"); !strings.Contains(out, res.Snapshot.ID.Short()) || !strings.Contains(out, "volume:volume") {
		t.Errorf("restic snapshots: %s", out)
	}
	if out := p.restic(t, "ls", "latest"); !strings.Contains(out, "/names/ünï") {
		t.Errorf("restic ls: %.1000s", out)
	}
	if got := p.restic(t, "dump", "latest", src+"/text/log"); got != string(read(t, src+"/text/log")) {
		t.Errorf("restic dump: %d bytes", len(got))
	}
	must(t, os.WriteFile(src+"/new file", []byte("x"), 0o600))
	second := p.backup(t, src)
	if out := p.restic(t, "diff", res.Snapshot.ID.String(), second.Snapshot.ID.String()); !strings.Contains(out, "new file") {
		t.Errorf("restic diff: %s", out)
	}
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return b
}

var (
	deviceID = regexp.MustCompile(`,"device_id":[0-9]+`)
	subtree  = regexp.MustCompile(`"subtree":"[0-9a-f]{64}"`)
)

// Both programs record the same folder in one repository: the second adds no
// file data, and each tree is equal byte for byte but for device_id, which
// Debian's restic writes for every file.
func TestTreesEqualRestics(t *testing.T) {
	for _, zone := range []string{"UTC", "America/Los_Angeles", "Asia/Kolkata"} {
		t.Run(zone, func(t *testing.T) {
			loc, err := time.LoadLocation(zone)
			must(t, err)
			defer func(l *time.Location) { time.Local = l }(time.Local)
			time.Local = loc

			src := filepath.Join(t.TempDir(), "volume")
			wildTree(t, src)
			p := newPlace(t)
			p.env = append(p.env, "TZ="+zone)
			p.restic(t, "init")
			theirs := p.restic(t, "backup", "--json", "--host", "pi", src)
			r := p.open(t)

			ours := p.backup(t, src)
			if ours.Snapshot.Summary.DataBlobs != 0 || ours.Snapshot.Summary.FilesNew != 0 {
				t.Errorf("we added file data to what restic had stored: %+v", ours.Snapshot.Summary)
			}
			var summary struct {
				ID string `json:"snapshot_id"`
			}
			lines := strings.Split(strings.TrimSpace(theirs), "\n")
			must(t, json.Unmarshal([]byte(lines[len(lines)-1]), &summary))
			all, err := r.Snapshots(t.Context())
			must(t, err)
			their, err := repo.Find(all, summary.ID)
			must(t, err)
			r = p.open(t)
			parent := filepath.Dir(src) // above it, others may have changed times
			compareTrees(t, r, descend(t, r, *their.Tree, parent), descend(t, r, *ours.Snapshot.Tree, parent), "")

			// And the other way round: restic adds no file data after us.
			q := newPlace(t)
			q.env = append(q.env, "TZ="+zone)
			q.init(t)
			q.backup(t, src)
			blobs := dataBlobs(q.open(t))
			q.restic(t, "backup", "--host", "pi", src)
			if after := dataBlobs(q.open(t)); after != blobs {
				t.Errorf("restic added %d data blobs to what we had stored", after-blobs)
			}
			q.check(t)
		})
	}
}

func dataBlobs(r *repo.Repo) (n int) {
	for _, blobs := range r.Index().Packs() {
		for _, b := range blobs {
			if b.Kind == backup.DataBlob {
				n++
			}
		}
	}
	return n
}

// descend returns the tree of a folder in a snapshot.
func descend(t testing.TB, r *repo.Repo, root backup.ID, path string) backup.ID {
	t.Helper()
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		tree, err := r.Tree(t.Context(), root)
		must(t, err)
		i := slices.IndexFunc(tree.Nodes, func(n backup.Node) bool { return n.Name == name })
		if i < 0 {
			t.Fatalf("no %q in the snapshot", path)
		}
		root = tree.Nodes[i].Subtree
	}
	return root
}

func compareTrees(t *testing.T, r *repo.Repo, theirs, ours backup.ID, path string) {
	t.Helper()
	a, err := r.Blob(t.Context(), backup.TreeBlob, theirs)
	must(t, err)
	b, err := r.Blob(t.Context(), backup.TreeBlob, ours)
	must(t, err)
	strip := func(tree []byte) []byte {
		return subtree.ReplaceAll(deviceID.ReplaceAll(tree, nil), []byte(`"subtree":""`))
	}
	if x, y := strip(a), strip(b); !bytes.Equal(x, y) {
		i := 0
		for i < min(len(x), len(y)) && x[i] == y[i] {
			i++
		}
		from := max(0, i-300)
		t.Errorf("folder %q differs at byte %d:\nrestic …%.600s\nours   …%.600s", path, i, x[from:], y[from:])
		return
	}
	ta, err := backup.DecodeTree(a)
	must(t, err)
	tb, err := backup.DecodeTree(b)
	must(t, err)
	for i := range ta.Nodes {
		if ta.Nodes[i].Type == backup.Dir {
			compareTrees(t, r, ta.Nodes[i].Subtree, tb.Nodes[i].Subtree, path+"/"+ta.Nodes[i].Name)
		}
	}
}

// Both write to one repository in turn, and each takes the other's snapshot as
// the parent.
func TestWriteInTurn(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	must(t, os.Mkdir(src, 0o755))
	p := newPlace(t)
	p.init(t)
	for i := range 6 {
		must(t, os.WriteFile(filepath.Join(src, fmt.Sprint("file ", i)), random(uint64(i), 300_000), 0o644))
		if i%2 == 0 {
			p.backup(t, src)
		} else {
			p.restic(t, "backup", "--host", "pi", src)
		}
	}
	p.check(t)
	all, err := p.open(t).Snapshots(t.Context())
	must(t, err)
	if len(all) != 6 {
		t.Errorf("%d snapshots", len(all))
	}
	for i, s := range all[1:] {
		if s.Parent == nil || *s.Parent != all[i].ID {
			t.Errorf("snapshot %d: parent %v, want %v", i+1, s.Parent, all[i].ID)
		}
	}
}
