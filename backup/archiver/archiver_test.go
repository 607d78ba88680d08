package archiver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/archiver"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
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

// write makes files below dir from pairs of name and content.
func write(t testing.TB, dir string, pairs ...string) {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		p := filepath.Join(dir, pairs[i])
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, []byte(pairs[i+1]), 0o644))
	}
}

func random(seed uint64, n int) string {
	b := make([]byte, n)
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return string(b)
}

// age makes all of dir an hour old, so that no change hides in the granularity
// of times.
func age(t testing.TB, dir string) {
	t.Helper()
	old := time.Now().Add(-time.Hour)
	must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chtimes(p, old, old))
	}))
}

type taken struct {
	*archiver.Result
	problems map[string]error
}

// take records src as the volume "v".
func take(t testing.TB, r *repo.Repo, src archiver.Source, tags ...string) taken {
	t.Helper()
	all, err := r.Snapshots(t.Context())
	must(t, err)
	out := taken{problems: map[string]error{}}
	var mu sync.Mutex
	src.Volume.Name = "v"
	res, err := archiver.Run(t.Context(), r, []archiver.Source{src}, archiver.Job{Time: time.Now(), Hostname: "pi", Tags: tags, History: all}, archiver.Observer{
		Problem: func(_ backup.Volume, p archiver.Problem) {
			mu.Lock()
			defer mu.Unlock()
			out.problems[p.Path] = p.Err
		},
	})
	must(t, err)
	out.Result = res[0]
	return out
}

func volume(dir string) archiver.Source { return archiver.Source{Volume: backup.Volume{Path: dir}} }

// contents reads a snapshot back: path below the volume to content, or to the
// type of what is no file.
func contents(t testing.TB, r *repo.Repo, s *backup.Snapshot) map[string]string {
	t.Helper()
	out := map[string]string{}
	var walk func(id backup.ID, rel string)
	walk = func(id backup.ID, rel string) {
		tree, err := r.Tree(t.Context(), id)
		must(t, err)
		for _, n := range tree.Nodes {
			p := rel + "/" + n.Name
			switch n.Type {
			case backup.File:
				var b bytes.Buffer
				for _, id := range n.Content {
					data, err := r.Blob(t.Context(), backup.DataBlob, id)
					must(t, err)
					b.Write(data)
				}
				if uint64(b.Len()) != n.Size {
					t.Errorf("%s: %d bytes, size %d", p, b.Len(), n.Size)
				}
				out[p] = b.String()
			case backup.Dir:
				walk(n.Subtree, p)
				fallthrough
			default:
				out[p] = string(n.Type)
			}
		}
	}
	walk(*s.Tree, "")
	inside := map[string]string{}
	for p, c := range out {
		if rel, ok := strings.CutPrefix(p, s.Paths[0]+"/"); ok {
			inside[rel] = c
		}
	}
	return inside
}

func names(m map[string]string) string {
	var out []string
	for n := range m {
		out = append(out, n)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestFirstAndNextSnapshot(t *testing.T) {
	dir := t.TempDir()
	r := newRepo(t, mem.New())
	write(t, dir, "a", "1", "sub/b", "2", "sub/c", random(1, 3<<20), "empty/x", "")
	age(t, dir)
	first := take(t, r, volume(dir))
	must(t, first.Err)
	if s := first.Snapshot.Summary; s.FilesNew != 4 || s.DirsNew != 2 || s.TotalBytesProcessed != 2+3<<20 || s.DataAdded < 2+3<<20 || s.DataAdded > 2+3<<20+8000 || first.Snapshot.Parent != nil {
		t.Errorf("first: %+v", s)
	}
	again := take(t, r, volume(dir))
	if s := again.Snapshot.Summary; s.FilesUnmodified != 4 || s.DirsUnmodified != 2 || s.DataBlobs+s.TreeBlobs != 0 || *again.Snapshot.Tree != *first.Snapshot.Tree || *again.Snapshot.Parent != first.Snapshot.ID {
		t.Errorf("again: %+v", s)
	}
	write(t, dir, "sub/b", "changed", "sub/d", "new")
	must(t, os.Remove(filepath.Join(dir, "a")))
	third := take(t, r, volume(dir))
	if s := third.Snapshot.Summary; s.FilesNew != 1 || s.FilesChanged != 1 || s.FilesUnmodified != 2 || s.DirsChanged != 1 || s.DirsUnmodified != 1 || s.DataAdded < 10 || s.DataAdded > 8000 {
		t.Errorf("third: %+v", s)
	}
	got := contents(t, r, third.Snapshot)
	if names(got) != "empty empty/x sub sub/b sub/c sub/d" || got["sub/b"] != "changed" || got["sub/c"] != random(1, 3<<20) {
		t.Errorf("third holds %s", names(got))
	}
	if third.Snapshot.Volume() != "v" || !third.Snapshot.Complete() || third.Snapshot.Hostname != "pi" {
		t.Errorf("%+v", third.Snapshot)
	}
}

// A change that keeps size and modification time is still seen by its change
// time; one that falls into the granularity of the parent's time, by reading.
func TestHiddenChanges(t *testing.T) {
	dir := t.TempDir()
	r := newRepo(t, mem.New())
	write(t, dir, "old", "aaaa", "young", "aaaa")
	past := time.Now().Add(-time.Hour)
	must(t, os.Chtimes(filepath.Join(dir, "old"), past, past))
	must(t, take(t, r, volume(dir)).Err)
	write(t, dir, "old", "bbbb")
	must(t, os.Chtimes(filepath.Join(dir, "old"), past, past))
	got := contents(t, r, take(t, r, volume(dir)).Snapshot)
	if got["old"] != "bbbb" {
		t.Errorf("old holds %q", got["old"])
	}
}

func TestWhatIsLeftOut(t *testing.T) {
	dir := t.TempDir()
	mnt := filepath.Join(dir, "mounted")
	write(t, dir,
		"keep", "1", "drop", "2", "sub/drop", "3", "sub/keep", "4", "large", random(1, 2000),
		"cache/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n# made by a test", "cache/x", "5", "cache/sub/y", "6",
		"fake/CACHEDIR.TAG", "Signature: something else", "fake/x", "7",
		"marked/.nobackup", "", "marked/x", "8", "mounted/below", "9", "repository/config", "10")
	must(t, unix.Mount("none", mnt, "tmpfs", 0, "size=1m"))
	defer func() { must(t, unix.Unmount(mnt, 0)) }()
	write(t, mnt, "above", "11")
	src := volume(dir)
	src.Exclude = func(rel string, isDir bool) bool { return !isDir && filepath.Base(rel) == "drop" }
	src.OneFileSystem, src.ExcludeCaches = true, true
	src.ExcludeIfPresent = []string{".nobackup"}
	src.LargerThan = 1000
	r := newRepo(t, mem.New())
	res, err := archiver.Run(t.Context(), r, []archiver.Source{src}, archiver.Job{Skip: []string{filepath.Join(dir, "repository"), dir + "/none"}}, archiver.Observer{})
	must(t, err)
	must(t, res[0].Err)
	want := "cache cache/CACHEDIR.TAG fake fake/CACHEDIR.TAG fake/x keep marked marked/.nobackup mounted sub sub/keep"
	if got := names(contents(t, r, res[0].Snapshot)); got != want || res[0].Problems != 0 {
		t.Errorf("got  %s\nwant %s\n%d problems", got, want, res[0].Problems)
	}
	got := names(contents(t, r, take(t, r, volume(dir)).Snapshot))
	if !strings.Contains(got, "mounted/above") || !strings.Contains(got, "cache/sub/y") || strings.Contains(got, "below") {
		t.Errorf("without options: %s", got)
	}
}

func TestVolumeErrors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "file", "x")
	must(t, os.Symlink(dir, filepath.Join(dir, "link")))
	r := newRepo(t, mem.New())
	for path, want := range map[string]error{"/none": fs.ErrNotExist, "/file": syscall.ENOTDIR, "/link": nil, "/../x": nil} {
		if res := take(t, r, volume(dir+path)); res.Err == nil || want != nil && !errors.Is(res.Err, want) || res.Snapshot != nil {
			t.Errorf("%s: %v", path, res.Err)
		}
	}
	res, err := archiver.Run(t.Context(), r, []archiver.Source{volume(dir)}, archiver.Job{Skip: []string{dir}}, archiver.Observer{})
	if err != nil || res[0].Err == nil || !strings.Contains(res[0].Err.Error(), "repository") {
		t.Errorf("the repository as a volume: %v, %v", res[0].Err, err)
	}
	// One volume's failure leaves the others alone.
	res, err = archiver.Run(t.Context(), r, []archiver.Source{volume(dir + "/none"), volume(dir)}, archiver.Job{}, archiver.Observer{})
	if err != nil || res[0].Err == nil || res[1].Err != nil || res[1].Snapshot.ID.IsZero() {
		t.Errorf("%v: %+v, %+v", err, res[0], res[1])
	}
	if all, err := r.Snapshots(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%d snapshots, %v", len(all), err)
	}
}

func TestEmptied(t *testing.T) {
	dir := t.TempDir()
	r := newRepo(t, mem.New())
	if res := take(t, r, volume(dir)); res.Err != nil || res.Emptied {
		t.Errorf("empty from the start: %+v", res.Result)
	}
	write(t, dir, "a", "1")
	must(t, take(t, r, volume(dir)).Err)
	must(t, os.Remove(dir+"/a"))
	if res := take(t, r, volume(dir)); res.Err != nil || !res.Emptied || !res.Snapshot.Complete() {
		t.Errorf("emptied: %+v", res.Result)
	}
}

// Unreadable files and folders are reported; the snapshot holds the rest and is
// marked. Root can read everything, so this runs as another user.
func TestUnreadable(t *testing.T) {
	if os.Getuid() == 0 {
		// The binary and the temporary folder must be reachable for nobody.
		bin := filepath.Join(publicDir(t), "test")
		data, err := os.ReadFile("/proc/self/exe")
		must(t, err)
		must(t, os.WriteFile(bin, data, 0o755))
		cmd := exec.Command(bin, "-test.run=^TestUnreadable$", "-test.v")
		cmd.Env = []string{"TMPDIR=" + publicDir(t)}
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestUnreadable")) {
			t.Errorf("as nobody: %v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	write(t, dir, "a", "1", "secret", "2", "closed/x", "3", "sub/b", "4")
	must(t, os.Chmod(dir+"/secret", 0))
	must(t, os.Chmod(dir+"/closed", 0))
	defer func() { must(t, os.Chmod(dir+"/closed", 0o700)) }()
	r := newRepo(t, mem.New())
	res := take(t, r, volume(dir))
	must(t, res.Err)
	if got := names(contents(t, r, res.Snapshot)); got != "a closed sub sub/b" || res.Snapshot.Complete() || res.Problems != 2 {
		t.Errorf("%s, %d problems, tags %v", got, res.Problems, res.Snapshot.Tags)
	}
	for _, name := range []string{"secret", "closed"} {
		if !errors.Is(res.problems[name], fs.ErrPermission) {
			t.Errorf("%s: %v", name, res.problems[name])
		}
	}
	// An incomplete snapshot is nobody's parent.
	if next := take(t, r, volume(dir)); next.Snapshot.Parent != nil {
		t.Errorf("parent %v", next.Snapshot.Parent)
	}
}

func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "archiver-test-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.Chmod(dir, 0o777))
	return dir
}

// While files grow, vanish and change their kind, every snapshot holds what was
// there at some moment, and nothing is left out in silence.
func TestLiveFolder(t *testing.T) {
	dir := t.TempDir()
	r := newRepo(t, mem.New())
	write(t, dir, "growing", random(1, 6<<20))
	for i := range 300 {
		write(t, dir, fmt.Sprintf("flicker/%03d", i), "x")
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		f, err := os.OpenFile(dir+"/growing", os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			p := fmt.Sprintf("%s/flicker/%03d", dir, i%300)
			os.RemoveAll(p)
			switch i % 3 {
			case 0:
				os.Mkdir(p, 0o755)
			case 1:
				os.WriteFile(p, []byte("y"), 0o644)
			}
			fmt.Fprintln(f, "one more line")
		}
	})
	sawChange := false
	for range 5 {
		res := take(t, r, volume(dir))
		must(t, res.Err)
		contents(t, r, res.Snapshot) // whatever it holds is whole
		if res.Snapshot.Complete() != (len(res.problems) == 0) {
			t.Errorf("%d problems, tags %v", len(res.problems), res.Snapshot.Tags)
		}
		if errors.Is(res.problems["growing"], archiver.ErrChanging) {
			sawChange = true
		}
	}
	close(stop)
	wg.Wait()
	if !sawChange {
		t.Error("a file that grows all the time was never reported")
	}
}

func TestHardLinksAreReadOnce(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a", random(1, 2<<20))
	for i := range 5 {
		must(t, os.Link(dir+"/a", fmt.Sprintf("%s/link%d", dir, i)))
	}
	var read atomic.Int64
	r := newRepo(t, mem.New())
	res, err := archiver.Run(t.Context(), r, []archiver.Source{volume(dir)}, archiver.Job{Workers: 1}, archiver.Observer{Read: func(_ backup.Volume, n int) { read.Add(int64(n)) }})
	must(t, err)
	if got := contents(t, r, res[0].Snapshot); len(got) != 6 || got["link3"] != random(1, 2<<20) {
		t.Errorf("%s", names(got))
	}
	if read.Load() > 3*2<<20 { // at most each worker once
		t.Errorf("%d bytes read", read.Load())
	}
}

// What is missing from the repository is read again, although the parent says
// it is there.
func TestHealing(t *testing.T) {
	be := mem.New()
	dir := t.TempDir()
	write(t, dir, "a", random(1, 1000), "sub/b", random(2, 1000))
	age(t, dir)
	r := newRepo(t, be)
	first := take(t, r, volume(dir))
	must(t, first.Err)
	for info, err := range be.List(t.Context(), backend.Indexes) {
		must(t, err)
		must(t, be.Delete(t.Context(), info.Key))
	}
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	must(t, err)
	must(t, r.LoadIndex(t.Context()))
	again := take(t, r, volume(dir))
	must(t, again.Err)
	if got := contents(t, r, again.Snapshot); got["sub/b"] != random(2, 1000) || len(got) != 3 {
		t.Errorf("%s", names(got))
	}
}

func TestStream(t *testing.T) {
	r := newRepo(t, mem.New())
	data := random(1, 5<<20)
	src := archiver.Source{Volume: backup.Volume{Path: "/dumps/db.sql"}, Stream: strings.NewReader(data)}
	res := take(t, r, src)
	must(t, res.Err)
	tree, err := r.Tree(t.Context(), *res.Snapshot.Tree)
	must(t, err)
	if tree, err = r.Tree(t.Context(), tree.Nodes[0].Subtree); err != nil || tree.Nodes[0].Name != "db.sql" || tree.Nodes[0].Size != 5<<20 {
		t.Errorf("%+v, %v", tree, err)
	}
	boom := errors.New("pg_dump failed")
	src.Stream = io.MultiReader(strings.NewReader(data), errReader{boom})
	if res := take(t, r, src); !errors.Is(res.Err, boom) || res.Snapshot != nil {
		t.Errorf("a failing stream: %+v", res.Result)
	}
	if all, err := r.Snapshots(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%d snapshots, %v", len(all), err)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

// A source that is no longer the right one, such as a pulled drive, gives no
// snapshot, whenever that happens.
func TestAlive(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a", "1", "b", "2")
	r := newRepo(t, mem.New())
	gone := errors.New("the drive BACKUP is gone")
	for n := range 2 {
		src, asked := volume(dir), 0
		src.Alive = func() error {
			if asked++; asked > n {
				return gone
			}
			return nil
		}
		if res := take(t, r, src); !errors.Is(res.Err, gone) || res.Snapshot != nil {
			t.Errorf("gone when asked %d times: %+v", n, res.Result)
		}
	}
}

// Whenever the repository fails or the run is cancelled, Run ends soon, without
// a snapshot and without leaking what it opened.
func TestFailures(t *testing.T) {
	dir := t.TempDir()
	for i := range 100 {
		write(t, dir, fmt.Sprintf("%d/%d", i%10, i), random(uint64(i), 60_000))
	}
	write(t, dir, "large", random(1000, 20<<20))
	open := fds(t)
	for n := 1; ; n++ {
		inner := mem.New()
		newRepo(t, inner)
		be := faulty.CrashAt(inner, n, n%2 == 0)
		r, err := repo.Open(t.Context(), be, "pw", repo.Options{PackSize: repo.MinPackSize})
		must(t, err)
		_, err = archiver.Run(t.Context(), r, []archiver.Source{volume(dir)}, archiver.Job{}, archiver.Observer{})
		if !be.Crashed() {
			must(t, err)
			if n < 6 {
				t.Errorf("only %d writes", n)
			}
			break
		}
		if !errors.Is(err, faulty.ErrCrashed) {
			t.Errorf("crash at write %d: %v", n, err)
		}
	}
	for n := range 40 {
		ctx, cancel := context.WithCancel(t.Context())
		var items atomic.Int64
		r := newRepo(t, mem.New())
		_, err := archiver.Run(ctx, r, []archiver.Source{volume(dir)}, archiver.Job{}, archiver.Observer{Item: func(backup.Volume, string, archiver.Change, uint64) {
			if items.Add(1) == int64(n*2) {
				cancel()
			}
		}})
		cancel()
		if n > 0 && !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled after %d files: %v", n*2, err)
		}
	}
	if now := fds(t); now > open {
		t.Errorf("%d descriptors are open, before it were %d", now, open)
	}
}

func fds(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(list)
}

func TestParent(t *testing.T) {
	at := time.Now()
	snap := func(age time.Duration, host, path string, tags ...string) *backup.Snapshot {
		return &backup.Snapshot{Time: at.Add(-age), Hostname: host, Paths: []string{path}, Tags: tags}
	}
	want := snap(2*time.Hour, "pi", "/a")
	all := []*backup.Snapshot{
		snap(3*time.Hour, "pi", "/a"), want, snap(time.Hour, "pi", "/b"), snap(time.Hour, "other", "/a"),
		snap(time.Hour, "pi", "/a", backup.IncompleteTag), snap(time.Hour, "pi", "/a", backup.BeforeRestoreTag),
		{Time: at, Hostname: "pi", Paths: []string{"/a", "/b"}},
	}
	if got := archiver.Parent(all, "pi", "/a"); got != want {
		t.Errorf("%+v", got)
	}
	if got := archiver.Parent(nil, "pi", "/a"); got != nil {
		t.Errorf("%+v", got)
	}
}
