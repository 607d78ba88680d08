package smbshare

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/archiver"
	"github.com/iot49/ide49-backup/backup/backend"
	store "github.com/iot49/ide49-backup/backup/backend/smb"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbfs"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

var (
	rounds = flag.Int("rounds", 3, "rounds of the soak test")
	seed   = flag.Uint64("seed", 1, "seed of the soak test")
)

const (
	password = "correct horse"
	// maxWait is the longest that anything may take beyond the failure that
	// it waits for.
	maxWait = 30 * time.Second
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newShare(t testing.TB, s *smbtest.Server, change func(*smb.Options)) *smb.Share {
	t.Helper()
	o := smb.Options{
		Server:      s.Addr(),
		Credentials: smb.Credentials{Username: smbtest.User, Password: smbtest.Password},
	}
	if change != nil {
		change(&o)
	}
	c, err := smb.New(o)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	sh, err := c.Share(smbtest.RW)
	must(t, err)
	return sh
}

// quick makes a client notice failures in seconds, so that a round is short.
func quick(o *smb.Options) {
	o.DialTimeout, o.MetaTimeout, o.DataTimeout = 2*time.Second, 3*time.Second, 4*time.Second
}

// TestSoak uses a share for everything at once, while its server is killed,
// frozen and restarted and the network is cut at random: a backup runs, what
// it stored is read back, objects are deleted, and a program works in a home
// on the share. Nothing may hang or be lost, and stock restic finds the
// repository whole in the end.
func TestSoak(t *testing.T) {
	for _, tool := range []string{"restic", "diff"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: apt-get install restic diffutils", tool)
		}
	}
	ns := smbtest.NewNamespace(t)
	srv := smbtest.Start(t, smbtest.InNamespace(ns.Name, ns.Address))
	rng := rand.New(rand.NewPCG(*seed, 0))
	t.Logf("seed %d, %d rounds", *seed, *rounds)

	sh := newShare(t, srv, func(o *smb.Options) { quick(o); o.Encrypt = *seed%2 == 0 })
	waits := atomic.Int64{}
	be, err := store.Create(t.Context(), sh, "repo", store.Options{
		Patience: 2 * time.Minute,
		Waiting:  func(string, error, time.Duration) { waits.Add(1) },
	})
	must(t, err)
	r, err := repo.Init(t.Context(), be, password, crypt.MinParams, repo.Options{PackSize: repo.MinPackSize})
	must(t, err)
	defer func() { must(t, r.Close()) }()

	must(t, os.Mkdir(filepath.Join(srv.Path(smbtest.RW), "home"), 0o755))
	at := t.TempDir()
	m, err := smbfs.New(newShare(t, srv, quick), "home", at, smbfs.Options{})
	must(t, err)
	defer func() {
		if err := m.Unmount(false); err != nil {
			t.Error(err)
			_ = m.Unmount(true)
		}
	}()

	src := filepath.Join(t.TempDir(), "volume")
	must(t, os.Mkdir(src, 0o755))
	kept := map[string][]byte{} // files of the home that were synced and renamed
	for round := range *rounds {
		grow(t, rng, src)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		homeSeed := rng.Uint64()
		wg.Go(func() { work(t, at, round, homeSeed, stop, kept) })

		backed := make(chan error, 1)
		wg.Go(func() { backed <- backUp(t.Context(), r, src) })
		kind := fail(rng, srv, ns)
		start := time.Now()
		if err := <-backed; err != nil {
			t.Errorf("round %d, %s: %v", round, kind, err)
		}
		if d := time.Since(start); d > maxWait {
			t.Errorf("round %d, %s: the backup took %v more", round, kind, d)
		}
		close(stop)
		wg.Wait()

		// What was stored is read back, and something deleted, through the
		// next failure.
		read := make(chan error, 1)
		go func() { read <- readBack(t.Context(), r, be) }()
		kind = fail(rng, srv, ns)
		start = time.Now()
		if err := <-read; err != nil {
			t.Errorf("round %d, %s: %v", round, kind, err)
		}
		if d := time.Since(start); d > maxWait {
			t.Errorf("round %d, %s: reading back took %v more", round, kind, d)
		}
		if t.Failed() {
			t.Fatalf("round %d failed", round)
		}
	}
	t.Logf("%d waits, %d files kept in the home", waits.Load(), len(kept))

	for name, want := range kept {
		got, err := os.ReadFile(filepath.Join(srv.Path(smbtest.RW), "home", name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("home: %s: %d bytes of %d, %v", name, len(got), len(want), err)
		}
	}
	restic := func(args ...string) {
		t.Helper()
		cmd := exec.Command("restic", args...)
		cmd.Env = append(os.Environ(), "RESTIC_REPOSITORY="+filepath.Join(srv.Path(smbtest.RW), "repo"),
			"RESTIC_PASSWORD="+password, "RESTIC_CACHE_DIR="+t.TempDir(), "RESTIC_PROGRESS_FPS=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("restic %q: %v\n%s", args, err, out)
		}
	}
	restic("check", "--read-data")
	back := t.TempDir()
	restic("restore", "latest", "--target", back)
	if out, err := exec.Command("diff", "-r", src, filepath.Join(back, src)).CombinedOutput(); err != nil {
		t.Errorf("what restic restores differs: %v\n%s", err, out)
	}
}

// fail does something to the server in a moment, and undoes it later. It
// returns when the server is well again.
func fail(rng *rand.Rand, srv *smbtest.Server, ns *smbtest.Namespace) string {
	nap := func(ms int) { time.Sleep(time.Duration(rng.IntN(ms)) * time.Millisecond) }
	nap(400)
	switch rng.IntN(4) {
	case 0:
		srv.Kill()
		nap(3000)
		srv.Restart()
		return "killed"
	case 1:
		srv.Freeze()
		nap(6000)
		srv.Thaw()
		return "frozen"
	case 2:
		srv.Restart()
		return "restarted"
	}
	ns.Cut()
	nap(6000)
	ns.Mend()
	return "cut"
}

// grow changes the volume a little.
func grow(t *testing.T, rng *rand.Rand, src string) {
	t.Helper()
	for range 12 {
		data := make([]byte, rng.IntN(1<<20))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		must(t, os.WriteFile(filepath.Join(src, fmt.Sprintf("f%02d", rng.IntN(40))), data, 0o644))
	}
}

func backUp(ctx context.Context, r *repo.Repo, src string) error {
	if err := r.LoadIndex(ctx); err != nil {
		return err
	}
	history, err := r.Snapshots(ctx)
	if err != nil {
		return err
	}
	results, err := archiver.Run(ctx, r, []archiver.Source{{Volume: backup.Volume{Name: "volume", Path: src}}},
		archiver.Job{Time: time.Now(), Hostname: "pi", History: history}, archiver.Observer{})
	if err != nil {
		return err
	}
	for _, res := range results {
		if res.Err != nil || res.Problems > 0 {
			return fmt.Errorf("%d problems: %w", res.Problems, res.Err)
		}
	}
	return nil
}

// readBack reads and verifies every blob of the newest snapshot, as a restore
// does, and stores and deletes an object, as prune does.
func readBack(ctx context.Context, r *repo.Repo, be backend.Backend) error {
	all, err := r.Snapshots(ctx)
	if err != nil {
		return err
	}
	newest := all[0]
	for _, s := range all {
		if s.Time.After(newest.Time) {
			newest = s
		}
	}
	if err := readTree(ctx, r, *newest.Tree); err != nil {
		return err
	}
	junk := fmt.Appendf(nil, "unreferenced %v", time.Now())
	k := backend.Key{Kind: backend.Packs, ID: backup.Hash(junk)}
	if err := be.Put(ctx, k, junk); err != nil {
		return err
	}
	return be.Delete(ctx, k)
}

func readTree(ctx context.Context, r *repo.Repo, id backup.ID) error {
	tree, err := r.Tree(ctx, id)
	if err != nil {
		return err
	}
	for _, n := range tree.Nodes {
		for _, c := range n.Content {
			if _, err := r.Blob(ctx, backup.DataBlob, c); err != nil {
				return err
			}
		}
		if !n.Subtree.IsZero() {
			if err := readTree(ctx, r, n.Subtree); err != nil {
				return err
			}
		}
	}
	return nil
}

// work is a program that saves files in the home the careful way. It
// remembers in kept what must be there whatever happens: files of which every
// step succeeded.
func work(t *testing.T, at string, round int, seed uint64, stop <-chan struct{}, kept map[string][]byte) {
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		data := make([]byte, rng.IntN(200_000))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		name := fmt.Sprintf("r%d-%d", round, i%30)
		start := time.Now()
		err := save(filepath.Join(at, name), data)
		if d := time.Since(start); d > 4*maxWait { // four calls
			t.Errorf("saving a file in the home took %v", d)
		}
		switch {
		case err == nil:
			kept[name] = data
		case errors.Is(err, syscall.EHOSTDOWN), errors.Is(err, syscall.EIO), errors.Is(err, syscall.EBUSY), errors.Is(err, fs.ErrNotExist):
			// The server was away; whether the name holds the old or the
			// new content is open. A file that the server still holds open
			// for a lost connection is busy.
			delete(kept, name)
			time.Sleep(20 * time.Millisecond)
		default:
			t.Errorf("saving a file in the home: %v", err)
			return
		}
	}
}

func save(name string, data []byte) error {
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}
