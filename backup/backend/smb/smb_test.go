package smb_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/backendtest"
	"github.com/iot49/ide49-backup/backup/backend/local"
	store "github.com/iot49/ide49-backup/backup/backend/smb"
	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

func share(t testing.TB, s *smbtest.Server, name string, change func(*smb.Options)) *smb.Share {
	t.Helper()
	o := smb.Options{
		Server:      s.Addr(),
		Credentials: smb.Credentials{Username: smbtest.User, Password: smbtest.Password},
	}
	if change != nil {
		change(&o)
	}
	c, err := smb.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	sh, err := c.Share(name)
	if err != nil {
		t.Fatal(err)
	}
	return sh
}

func create(t testing.TB, sh *smb.Share, dir string, opt store.Options) *store.Store {
	t.Helper()
	s, err := store.Create(t.Context(), sh, dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestConformance(t *testing.T) {
	srv := smbtest.Start(t)
	for name, change := range map[string]func(*smb.Options){
		"signed, one connection": func(o *smb.Options) { o.MaxSessions = 1 },
		"encrypted":              func(o *smb.Options) { o.Encrypt = true },
	} {
		t.Run(name, func(t *testing.T) {
			sh := share(t, srv, smbtest.RW, change)
			dir := "repos/" + strings.Map(func(r rune) rune { return max(r, '-') }, name)
			create(t, sh, dir, store.Options{})
			backendtest.Run(t, func(t *testing.T) backend.Backend {
				s, err := store.Open(t.Context(), sh, dir, store.Options{Verify: true})
				if err != nil {
					t.Fatal(err)
				}
				return s
			})
			left, err := os.ReadDir(filepath.Join(srv.Path(smbtest.RW), dir, "tmp"))
			if err != nil || len(left) > 0 {
				t.Errorf("temporary files are left: %v, %v", left, err)
			}
		})
	}
}

// TestSameAsLocal checks that the exported folder is a repository for the
// local store.
func TestSameAsLocal(t *testing.T) {
	srv := smbtest.Start(t)
	s := create(t, share(t, srv, smbtest.RW, nil), "r", store.Options{})
	data := []byte("a pack")
	k := backend.Key{Kind: backend.Packs, ID: backup.Hash(data)}
	if err := errors.Join(s.Put(t.Context(), k, data), s.Put(t.Context(), backend.ConfigKey, []byte("c"))); err != nil {
		t.Fatal(err)
	}
	l, err := local.Open(filepath.Join(srv.Path(smbtest.RW), "r"), local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got, err := l.Get(t.Context(), k, 0, -1)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("Get = %q, %v", got, err)
	}
}

func TestOpenAndCreate(t *testing.T) {
	srv := smbtest.Start(t)
	sh := share(t, srv, smbtest.RW, nil)
	if _, err := store.Open(t.Context(), sh, "none", store.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of a missing folder: %v, want fs.ErrNotExist", err)
	}
	if err := os.MkdirAll(filepath.Join(srv.Path(smbtest.RW), "other", "photos"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create(t.Context(), sh, "other", store.Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create in a used folder: %v, want fs.ErrExist", err)
	}
	if _, err := store.Create(t.Context(), share(t, srv, smbtest.RO, nil), "r", store.Options{}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Create on a read-only share: %v, want fs.ErrPermission", err)
	}
	create(t, sh, "twice", store.Options{})
	create(t, sh, "twice", store.Options{}) // as after an interrupted one
	ro, err := store.Open(t.Context(), sh, "twice", store.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := ro.Put(t.Context(), backend.ConfigKey, nil); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Put into a store for reading: %v, want fs.ErrPermission", err)
	}
	if err := ro.Delete(t.Context(), backend.ConfigKey); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Delete in a store for reading: %v, want fs.ErrPermission", err)
	}
	if err := ro.Close(); err != nil {
		t.Error(err)
	}
}

func TestFull(t *testing.T) {
	srv := smbtest.Start(t, smbtest.WithFull())
	s := create(t, share(t, srv, smbtest.Full, nil), "r", store.Options{})
	small, big := []byte("small"), make([]byte, 12<<20)
	sk := backend.Key{Kind: backend.Packs, ID: backup.Hash(small)}
	bk := backend.Key{Kind: backend.Packs, ID: backup.Hash(big)}
	if err := s.Put(t.Context(), sk, small); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), bk, big); !errors.Is(err, backend.ErrFull) {
		t.Errorf("Put of 12 MiB on 8: %v, want backend.ErrFull", err)
	}
	if _, err := s.Get(t.Context(), bk, 0, -1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Get of what didn't fit: %v, want fs.ErrNotExist", err)
	}
	if got, err := s.Get(t.Context(), sk, 0, -1); err != nil || !bytes.Equal(got, small) {
		t.Errorf("Get of what was there: %q, %v", got, err)
	}
	left, err := os.ReadDir(filepath.Join(srv.Path(smbtest.Full), "r", "tmp"))
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
	if err := s.Put(t.Context(), bk, big[:1<<20]); err != nil {
		t.Errorf("Put after the failure: %v", err)
	}
}

func TestSweep(t *testing.T) {
	srv := smbtest.Start(t)
	sh := share(t, srv, smbtest.RW, nil)
	s := create(t, sh, "r", store.Options{})
	data := []byte("an object")
	k := backend.Key{Kind: backend.Packs, ID: backup.Hash(data)}
	if err := s.Put(t.Context(), k, data); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(srv.Path(smbtest.RW), "r")
	file := func(name string, age time.Duration) string {
		name = filepath.Join(root, "tmp", name)
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		// The change time can't be set: only files that are old by both
		// times are swept, so that a fresh one stays.
		when := time.Now().Add(-age)
		if err := os.Chtimes(name, when, when); err != nil {
			t.Fatal(err)
		}
		return name
	}
	foreign, fresh := file("somebody-elses", 48*time.Hour), file("ide49-fresh", 0)
	// As if the process had died while it replaced the object.
	aside := filepath.Join(root, "tmp", "ide49-X-replaced-"+strings.ReplaceAll(k.Path(), "/", "-"))
	if err := os.Rename(filepath.Join(root, k.Path()), aside); err != nil {
		t.Fatal(err)
	}
	again, err := store.Open(t.Context(), sh, "r", store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got, err := again.Get(t.Context(), k, 0, -1); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the object that was being replaced: %q, %v", got, err)
	}
	for _, name := range []string{foreign, fresh} {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("%s was removed: %v", name, err)
		}
	}
}

// TestFaults puts, reads, lists and deletes objects while the server is
// killed, frozen and restarted at random. Calls may wait; in the end nothing
// that was stored is missing or damaged.
func TestFaults(t *testing.T) {
	srv := smbtest.Start(t)
	sh := share(t, srv, smbtest.RW, func(o *smb.Options) {
		o.DialTimeout, o.MetaTimeout, o.DataTimeout = 2*time.Second, 2*time.Second, 2*time.Second
	})
	rounds := 6
	waits := 0
	s := create(t, sh, "r", store.Options{Patience: time.Minute, Waiting: func(string, error, time.Duration) { waits++ }})
	rng := rand.New(rand.NewPCG(7, 7))
	want := map[backend.Key][]byte{}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	for round := range rounds {
		done, seed := make(chan error, 1), rng.Uint64()
		go func() { done <- work(ctx, s, seed, want) }()
		pause := time.Duration(rng.IntN(150)) * time.Millisecond
		timer := time.NewTimer(pause)
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			timer.Stop()
			continue
		case <-timer.C:
		}
		start := time.Now()
		switch kind := round % 3; kind {
		case 0:
			srv.Restart()
		case 1:
			srv.Freeze()
			time.Sleep(time.Duration(rng.IntN(1500)) * time.Millisecond)
			srv.Thaw()
		case 2:
			srv.Kill()
			time.Sleep(time.Duration(rng.IntN(800)) * time.Millisecond)
			srv.Restart()
		}
		if err := <-done; err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if d := time.Since(start); d > 30*time.Second {
			t.Errorf("round %d: the store hung for %v", round, d)
		}
	}
	t.Logf("%d objects, %d waits", len(want), waits)
	seen := 0
	for info, err := range s.List(ctx, backend.Packs) {
		if err != nil {
			t.Fatal(err)
		}
		data, ok := want[info.Key]
		if !ok {
			t.Errorf("%s was deleted or never put", info.Key)
			continue
		}
		got, err := s.Get(ctx, info.Key, 0, -1)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v", info.Key, len(got), err)
		}
		seen++
	}
	if seen != len(want) {
		t.Errorf("%d objects are there, want %d", seen, len(want))
	}
}

// work stores a few objects, reads them and deletes one.
func work(ctx context.Context, s *store.Store, seed uint64, want map[backend.Key][]byte) error {
	rng := rand.New(rand.NewPCG(seed, 1))
	var last backend.Key
	for i := range 6 {
		data := fmt.Appendf(nil, "%d-%d ", seed, i)
		data = append(data, bytes.Repeat([]byte{byte(i)}, rng.IntN(1<<20))...)
		k := backend.Key{Kind: backend.Packs, ID: backup.Hash(data)}
		if err := s.Put(ctx, k, data); err != nil {
			return err
		}
		want[k], last = data, k
		got, err := s.Get(ctx, k, 0, -1)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, data) {
			return fmt.Errorf("%s came back differently", k)
		}
	}
	delete(want, last)
	return s.Delete(ctx, last)
}

func TestCancelWhileAway(t *testing.T) {
	srv := smbtest.Start(t)
	s := create(t, share(t, srv, smbtest.RW, nil), "r", store.Options{})
	srv.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := s.Put(ctx, backend.ConfigKey, []byte("x")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Put: %v, want DeadlineExceeded", err)
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("a cancelled Put took %v", d)
	}
}
