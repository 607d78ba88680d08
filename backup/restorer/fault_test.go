package restorer_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/restorer"
)

// lay writes the old contents of a volume.
func lay(t testing.TB, dir string, old map[string]string) {
	t.Helper()
	for rel, data := range old {
		put(t, dir, rel, data)
	}
}

// twoStates returns a snapshot of a volume's new contents, and its old ones.
func twoStates(t testing.TB, r *repo.Repo) (sn *backup.Snapshot, old, new map[string]string) {
	t.Helper()
	old, new = map[string]string{}, map[string]string{}
	sn = snapshot(t, r, func(w writer) backup.ID {
		var dirs []backup.Node
		for d := range 4 {
			var files []backup.Node
			for i := range 12 {
				name := fmt.Sprintf("f%d", i)
				seed := uint64(d*100 + i)
				data := payload(seed, 500+i*5_000)
				files = append(files, w.file(name, data))
				rel := fmt.Sprintf("d%d/%s", d, name)
				new[rel] = string(data)
				if i%3 != 0 {
					old[rel] = string(payload(seed, 300+i*2_500)) + "old"
				}
			}
			dirs = append(dirs, w.dir(fmt.Sprintf("d%d", d), files...))
		}
		return w.tree(dirs...)
	})
	return sn, old, new
}

// oldOrNew fails unless every file is as it was or as it shall be.
func oldOrNew(t testing.TB, dir string, old, new map[string]string) (news int) {
	t.Helper()
	noTemps(t, dir)
	for rel, want := range new {
		b, err := os.ReadFile(filepath.Join(dir, rel))
		switch was, existed := old[rel]; {
		case err == nil && string(b) == want:
			news++
		case err == nil && existed && string(b) == was:
		case errors.Is(err, os.ErrNotExist) && !existed:
		default:
			t.Errorf("%s is neither old nor new: %d bytes, %v", rel, len(b), err)
		}
	}
	return news
}

func execute(t testing.TB, ctx context.Context, r *repo.Repo, sn *backup.Snapshot, dir string) error {
	t.Helper()
	_, err := prepare(t, r, sn, dir, restorer.Options{}).Execute(ctx, restorer.Observer{})
	return err
}

func TestDamagedBlobs(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	dir := t.TempDir()
	sn, old, new := twoStates(t, r)
	lay(t, dir, old)
	// Some bytes of every long read are flipped: small blobs survive, read alone.
	flip := func(c faulty.Call) faulty.Fault {
		if c.Op != faulty.Get || c.Key.Kind != backend.Packs {
			return faulty.Fault{}
		}
		return faulty.Fault{Damage: func(b []byte) []byte {
			for i := 2999; i < len(b); i += 3000 {
				b[i] ^= 1
			}
			return b
		}}
	}
	r = reopen(t, faulty.New(be, flip))
	err := execute(t, t.Context(), r, sn, dir)
	partial, ok := errors.AsType[*restorer.PartialError](err)
	if !ok || partial.Count == 0 || partial.Count >= len(new) || !errors.Is(err, repo.ErrDamaged) {
		t.Fatalf("%v", err)
	}
	if n := oldOrNew(t, dir, old, new); n != len(new)-partial.Count {
		t.Errorf("%d of %d files are new and %d failed", n, len(new), partial.Count)
	}
	// With an intact repository the rest follows.
	must(t, execute(t, t.Context(), reopen(t, be), sn, dir))
	if n := oldOrNew(t, dir, old, new); n != len(new) {
		t.Errorf("%d of %d", n, len(new))
	}
}

func TestMissingPack(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	dir := t.TempDir()
	sn, old, new := twoStates(t, r)
	lay(t, dir, old)
	for pack, blobs := range r.Index().Packs() {
		if blobs[0].Kind == backup.DataBlob {
			must(t, be.Delete(t.Context(), backend.Key{Kind: backend.Packs, ID: pack}))
			break
		}
	}
	err := execute(t, t.Context(), reopen(t, be), sn, dir)
	partial, ok := errors.AsType[*restorer.PartialError](err)
	if !ok || partial.Count == 0 || partial.Count != len(new)-oldOrNew(t, dir, old, new) {
		t.Errorf("%v", err)
	}
}

// TestDamagedListing: a folder whose listing can't be read is left alone, even
// with Delete, and the others are restored.
func TestDamagedListing(t *testing.T) {
	r := newRepo(t, mem.New())
	sn := snapshot(t, r, func(w writer) backup.ID {
		lost := w.dir("lost")
		lost.Subtree = backup.Hash([]byte("no such tree"))
		return w.tree(lost, w.file("other", []byte("other")))
	})
	dir := t.TempDir()
	kept := put(t, dir, "lost/file", "kept")
	put(t, dir, "extra", "goes")
	p := prepare(t, r, sn, dir, restorer.Options{Delete: true})
	if f := p.Failures(); f == nil || f.Count != 1 || f.Failures[0].Path != "lost" {
		t.Errorf("%v", f)
	}
	_, err := p.Execute(t.Context(), restorer.Observer{})
	if partial, ok := errors.AsType[*restorer.PartialError](err); !ok || partial.Count != 1 || !errors.Is(err, repo.ErrNoBlob) {
		t.Errorf("%v", err)
	}
	if get(t, kept) != "kept" || get(t, filepath.Join(dir, "other")) != "other" || p.Counts().Deleted != 1 {
		t.Errorf("%+v", p.Counts())
	}
}

// TestUnreachableStore: a store that fails for other reasons than damage ends
// the restore soon, at whichever read it begins to fail.
func TestUnreachableStore(t *testing.T) {
	be := mem.New()
	gone := errors.New("the share does not answer")
	sn, old, new := twoStates(t, newRepo(t, be))
	for at := 1; ; at++ {
		dir := t.TempDir()
		lay(t, dir, old)
		reads := 0
		armed := false
		r := reopen(t, faulty.New(be, func(c faulty.Call) faulty.Fault {
			if !armed || c.Op != faulty.Get {
				return faulty.Fault{}
			}
			if reads++; reads >= at {
				return faulty.Fault{Err: gone}
			}
			return faulty.Fault{}
		}))
		p := prepare(t, r, sn, dir, restorer.Options{})
		armed = true
		_, err := p.Execute(t.Context(), restorer.Observer{})
		n := oldOrNew(t, dir, old, new)
		if err == nil {
			if n != len(new) || at < 2 {
				t.Errorf("read %d: %d of %d", at, n, len(new))
			}
			return
		}
		if _, partial := errors.AsType[*restorer.PartialError](err); !errors.Is(err, gone) && !partial {
			t.Errorf("read %d: %v", at, err)
		}
	}
}

func TestCancelledAtAnyMoment(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	rng := rand.New(rand.NewPCG(1, 2))
	interrupted := 0
	sn, old, new := twoStates(t, r)
	for range 60 {
		dir := t.TempDir()
		lay(t, dir, old)
		p := prepare(t, r, sn, dir, restorer.Options{Workers: 3})
		ctx, cancel := context.WithCancel(t.Context())
		timer := time.AfterFunc(time.Duration(rng.IntN(8_000))*time.Microsecond, cancel)
		_, err := p.Execute(ctx, restorer.Observer{})
		timer.Stop()
		cancel()
		n := oldOrNew(t, dir, old, new)
		switch {
		case err == nil && n != len(new):
			t.Errorf("success with %d of %d files", n, len(new))
		case err != nil && !errors.Is(err, context.Canceled):
			t.Error(err)
		case err != nil:
			interrupted++
		}
	}
	if interrupted == 0 {
		t.Error("no restore was interrupted")
	}
}

// helperEnv tells the test binary to be one of the helpers below.
const helperEnv = "RESTORER_TEST_HELPER"

// TestMain runs helpers: a restore that is killed, one without root's rights.
func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) == "" {
		os.Exit(m.Run())
	}
	if err := helper(os.Getenv(helperEnv)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// TestKilled restores in a process that kills itself at a random moment. Every
// file is old or new; the next restore clears up and completes.
func TestKilled(t *testing.T) {
	killed := 0
	store := filepath.Join(t.TempDir(), "repo")
	be, err := local.Create(store, local.Options{})
	must(t, err)
	r := newRepo(t, be)
	sn, old, new := twoStates(t, r)
	for i := range 20 {
		dir := t.TempDir()
		lay(t, dir, old)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=kill %s %d %s %s", helperEnv, dir, 200+i*400, store, sn.Tree))
		out, err := cmd.CombinedOutput()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
			killed++
		} else if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for rel, want := range new {
			b, err := os.ReadFile(filepath.Join(dir, rel))
			was, existed := old[rel]
			if !(err == nil && (string(b) == want || existed && string(b) == was) || errors.Is(err, os.ErrNotExist) && !existed) {
				t.Errorf("%s is neither old nor new: %d bytes, %v", rel, len(b), err)
			}
		}
		must(t, execute(t, t.Context(), r, sn, dir))
		if n := oldOrNew(t, dir, old, new); n != len(new) {
			t.Errorf("afterwards: %d of %d", n, len(new))
		}
	}
	if killed == 0 {
		t.Error("none was killed")
	}
}

// helper runs in another process.
func helper(arg string) error {
	t := &panicker{}
	args := strings.Fields(arg)
	switch what, dir := args[0], args[1]; what {
	case "kill":
		micros, err := strconv.Atoi(args[2])
		must(t, err)
		be, err := local.Open(args[3], local.Options{})
		must(t, err)
		tree, err := backup.ParseID(args[4])
		must(t, err)
		p := prepare(t, reopen(t, be), &backup.Snapshot{Tree: &tree, Paths: []string{"/vol"}}, dir, restorer.Options{})
		time.AfterFunc(time.Duration(micros)*time.Microsecond, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
		_, err = p.Execute(context.Background(), restorer.Observer{})
		return err
	case "user":
		r, err := repo.Init(context.Background(), mem.New(), "pw", cheapKDF, repo.Options{})
		if err != nil {
			return err
		}
		sn := snapshot(t, r, userTree)
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		p, err := restorer.Prepare(context.Background(), r, sn, root, restorer.Options{})
		if err != nil {
			return err
		}
		_, err = p.Execute(context.Background(), restorer.Observer{Warning: func(path string, err error) { fmt.Printf("warning %s: %v\n", path, err) }})
		return err
	}
	return fmt.Errorf("unknown helper %q", arg)
}

// A panicker is a testing.TB outside of a test.
type panicker struct{ testing.TB }

func (*panicker) Helper()                        {}
func (*panicker) Context() context.Context       { return context.Background() }
func (*panicker) Cleanup(func())                 {}
func (*panicker) Fatal(args ...any)              { panic(fmt.Sprint(args...)) }
func (*panicker) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }
func (*panicker) Errorf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }
func (p *panicker) Error(args ...any)            { p.Fatal(args...) }
func (p *panicker) Logf(format string, a ...any) {}

// userTree has what only root can restore in full.
func userTree(w writer) backup.ID {
	suid := w.file("suid", []byte("program"))
	suid.Mode |= os.ModeSetuid
	suid.UID, suid.GID = 0, 0
	other := w.file("other", []byte("data"))
	other.UID, other.GID = 1, 1
	null := backup.Node{Name: "null", Type: backup.CharDevice, Mode: os.ModeDevice | os.ModeCharDevice | 0o666, ModTime: stamp, Device: unix.Mkdev(1, 3)}
	sealed := w.dir("sealed", w.file("f", []byte("in a folder without rights")))
	sealed.Mode = os.ModeDir | 0o500
	cap := w.file("cap", []byte("program"))
	cap.Xattrs = []backup.Xattr{{Name: "security.capability", Value: []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}}
	return w.tree(suid, other, null, sealed, cap)
}

func TestWithoutRoot(t *testing.T) {
	base, err := os.MkdirTemp("/dev/shm", "restorer-user-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(base) })
	must(t, os.Chmod(base, 0o755))
	dir := filepath.Join(base, "dst")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Chown(dir, 65534, 65534))
	exe := filepath.Join(base, "test")
	b, err := os.ReadFile(os.Args[0])
	must(t, err)
	must(t, os.WriteFile(exe, b, 0o755))
	for range 2 { // the second one finds all as it can be
		cmd := exec.Command(exe)
		cmd.Dir = base
		cmd.Env = []string{helperEnv + "=user " + dir, "TMPDIR=" + base}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if n := strings.Count(string(out), "owner"); n > 1 || !strings.Contains(string(out), "device nodes") {
			t.Errorf("%s", out)
		}
	}
	noTemps(t, dir)
	if st := stat(t, filepath.Join(dir, "suid")); st.Mode&unix.S_ISUID != 0 || st.Uid != 65534 || get(t, filepath.Join(dir, "suid")) != "program" {
		t.Errorf("a set-user-id program without its owner: mode %o, uid %d", st.Mode, st.Uid)
	}
	if st := stat(t, filepath.Join(dir, "sealed")); st.Mode&0o777 != 0o500 || st.Mtim.Nano() != stamp.UnixNano() || get(t, filepath.Join(dir, "sealed/f")) == "" {
		t.Errorf("sealed: mode %o", st.Mode)
	}
}

func TestFullTarget(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be)
	for _, size := range []string{"1m", "4m", "7m"} {
		dir := t.TempDir()
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
		old, new := map[string]string{}, map[string]string{}
		sn := snapshot(t, r, func(w writer) backup.ID {
			var nodes []backup.Node
			for i := range 40 {
				name := fmt.Sprintf("f%02d", i)
				new[name] = string(payload(uint64(i), 250_000))
				if i%10 == 0 {
					old[name] = "old"
					put(t, dir, name, "old")
				}
				nodes = append(nodes, w.file(name, []byte(new[name])))
			}
			return w.tree(nodes...)
		})
		root, err := os.OpenRoot(dir)
		must(t, err)
		p, err := restorer.Prepare(t.Context(), r, sn, root, restorer.Options{})
		must(t, err)
		_, err = p.Execute(t.Context(), restorer.Observer{})
		root.Close()
		if !errors.Is(err, restorer.ErrFull) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", size, err)
		}
		oldOrNew(t, dir, old, new)
		must(t, unix.Unmount(dir, 0)) // no descriptor is left open
	}
}

// TestSwappedLinks has somebody replace folders of the target by links to
// another place, back and forth, while restores run.
func TestSwappedLinks(t *testing.T) {
	r := newRepo(t, mem.New())
	outside := t.TempDir()
	put(t, outside, "f0", "victim")
	must(t, os.Chtimes(filepath.Join(outside, "f0"), stamp.Add(-time.Hour), stamp.Add(-time.Hour)))
	before := scan(t, outside)
	dir := t.TempDir()
	sn, old, _ := twoStates(t, r)
	lay(t, dir, old)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			d := filepath.Join(dir, fmt.Sprintf("d%d", i%4))
			hidden := filepath.Join(dir, "hidden")
			if os.Rename(d, hidden) == nil {
				os.Symlink(outside, d)
				time.Sleep(50 * time.Microsecond)
				os.Remove(d)
				os.Rename(hidden, d)
			}
			f := filepath.Join(d, "f0")
			os.Remove(f)
			os.Symlink(filepath.Join(outside, "f0"), f)
		}
	})
	met := 0
	for i := range 40 {
		root, err := os.OpenRoot(dir)
		must(t, err)
		p, err := restorer.Prepare(t.Context(), r, sn, root, restorer.Options{Overwrite: restorer.Always, Delete: i%2 == 0})
		must(t, err)
		// Whatever fails in the turmoil is reported; nothing gets out.
		if _, err := p.Execute(t.Context(), restorer.Observer{}); err != nil {
			if _, ok := errors.AsType[*restorer.PartialError](err); !ok {
				t.Errorf("%v", err)
			}
			if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
				met++
			}
		}
		root.Close()
	}
	close(stop)
	wg.Wait()
	diff(t, scan(t, outside), before)
	if met == 0 {
		t.Error("no restore met a link in place of a folder")
	}
}
