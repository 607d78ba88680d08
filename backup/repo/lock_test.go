package repo_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
)

func open(t testing.TB, be backend.Backend, opt repo.Options) *repo.Repo {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", opt)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func nothing(context.Context) error { return nil }

// The environment of a process that takes a lock and keeps it until it is
// killed: the repository's folder and the journal's.
const holdRepo, holdJournal = "IDE49_TEST_HOLD", "IDE49_TEST_JOURNAL"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdRepo); dir != "" {
		hold(dir, os.Getenv(holdJournal))
	}
	os.Exit(m.Run())
}

func hold(dir, journal string) {
	be, err := local.Open(dir, local.Options{})
	if err == nil {
		var r *repo.Repo
		if r, err = repo.Open(context.Background(), be, "pw", repo.Options{Journal: journal}); err == nil {
			err = r.WithLock(context.Background(), true, func(ctx context.Context) error {
				fmt.Println("held by", os.Getpid())
				select {}
			})
		}
	}
	fmt.Println(err)
	os.Exit(1)
}

// A process that is killed leaves its lock. Others on this machine see at once
// that it is gone, and see it alive as long as it lives, although it is process
// 1 of its own space.
func TestLockOfAKilledProcess(t *testing.T) {
	for name, flags := range map[string]uintptr{"process": 0, "container's process 1": syscall.CLONE_NEWPID} {
		t.Run(name, func(t *testing.T) {
			dir, journal := filepath.Join(t.TempDir(), "repo"), t.TempDir()
			be, err := local.Create(dir, local.Options{})
			if err != nil {
				t.Fatal(err)
			}
			newRepo(t, be, repo.Options{})
			r := open(t, be, repo.Options{Journal: journal})
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), holdRepo+"="+dir, holdJournal+"="+journal)
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatalf("start a process (this needs root): %v", err)
			}
			line, _ := bufio.NewReader(out).ReadString('\n')
			if !strings.HasPrefix(line, "held by") || flags != 0 && line != "held by 1\n" {
				t.Fatalf("the process says %q", line)
			}
			if err := r.WithLock(t.Context(), false, nothing); !errors.Is(err, repo.ErrLocked) || !strings.Contains(err.Error(), "is running") {
				t.Errorf("while it lives: %v", err)
			}
			if locks, err := r.Unlock(t.Context(), false); err != nil || len(locks) != 1 || locks[0].Removed || !locks[0].Ours {
				t.Errorf("unlock while it lives: %v, %v", locks, err)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // killed
			locks, err := r.Locks(t.Context())
			if err != nil || len(locks) != 1 || !locks[0].Stale || !locks[0].Ours || !strings.Contains(locks[0].String(), "has ended") {
				t.Errorf("when it is gone: %v, %v", locks, err)
			}
			if err := r.WithLock(t.Context(), true, nothing); err != nil {
				t.Errorf("when it is gone: %v", err)
			}
			if n := count(t, be, backend.Locks); n != 0 {
				t.Errorf("%d locks are left", n)
			}
			if left, err := filepath.Glob(journal + "/*/*"); err != nil || len(left) > 1 {
				t.Errorf("notes %q are left, %v", left, err)
			}
		})
	}
}

// faked opens a repository in a bubble of testing/synctest, where the clock
// that counts sleep is the bubble's too.
func faked(t *testing.T, be backend.Backend, opt repo.Options) *repo.Repo {
	r := open(t, be, opt)
	start := time.Now()
	r.SetBoottime(func() time.Duration { return time.Hour + time.Since(start) })
	return r
}

// A foreign lock that is renewed is never stale, whatever the clocks say; one
// that stays the same for half an hour is, although its clock is ahead.
func TestForeignLocksNeedNoClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		be := mem.New()
		newRepo(t, be, repo.Options{})
		r := faked(t, be, repo.Options{Journal: t.TempDir()})
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { // one whose clock is days behind
			other := open(t, be, repo.Options{})
			for ctx.Err() == nil {
				l := repo.Lock{Time: time.Now().AddDate(0, 0, -3), Hostname: "elsewhere", PID: 1}
				if err := other.PutLock(ctx, l); err != nil {
					t.Error(err)
				}
				select {
				case <-ctx.Done():
				case <-time.After(5 * time.Minute):
				}
				err := other.EachLock(context.Background(), func(id backup.ID, l repo.Lock, err error) error {
					if l.Hostname == "elsewhere" {
						err = errors.Join(err, be.Delete(context.Background(), backend.Key{Kind: backend.Locks, ID: id}))
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
		for range 200 {
			time.Sleep(47 * time.Second)
			if err := r.WithLock(t.Context(), false, nothing); err != nil {
				t.Errorf("shared beside shared: %v", err)
			}
			if err := r.WithLock(t.Context(), true, nothing); !errors.Is(err, repo.ErrLocked) {
				t.Errorf("exclusive beside a living shared one: %v", err)
			}
			if _, err := r.Unlock(t.Context(), false); err != nil {
				t.Error(err)
			}
		}
		stop()
		wg.Wait()

		// Now one that crashed, with a clock that is ahead.
		if err := r.PutLock(t.Context(), repo.Lock{Time: time.Now().AddDate(1, 0, 0), Exclusive: true, Hostname: "elsewhere", PID: 1}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for errors.Is(r.WithLock(t.Context(), false, nothing), repo.ErrLocked) {
			time.Sleep(time.Minute)
		}
		if took := time.Since(began); took < 30*time.Minute || took > 32*time.Minute {
			t.Errorf("stale after %v", took)
		}
		if n := count(t, be, backend.Locks); n != 1 {
			t.Errorf("%d locks: what is not ours goes by unlock alone", n)
		}
		locks, err := r.Unlock(t.Context(), false)
		if err != nil || len(locks) != 1 || !locks[0].Removed || locks[0].Ours {
			t.Errorf("%v, %v", locks, err)
		}
	})
}

func TestUnlock(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	r := newRepo(t, be, repo.Options{})
	now := time.Now()
	for _, l := range []repo.Lock{
		{Time: now.Add(-2 * time.Hour), Hostname: "old", PID: 1},
		{Time: now, Hostname: "fresh", PID: 1},
		{Time: now.Add(time.Hour), Hostname: "future", PID: 1},
		// Of a name that other containers may share: a number that is not
		// here may be there.
		{Time: now, Hostname: repo.Hostname(t), PID: 1 << 29},
	} {
		if err := r.PutLock(ctx, l); err != nil {
			t.Fatal(err)
		}
	}
	if err := be.Put(ctx, backend.Key{Kind: backend.Locks, ID: backup.Hash([]byte("half"))}, []byte("half")); err != nil {
		t.Fatal(err)
	}
	for _, all := range []bool{false, true} {
		locks, err := r.Unlock(ctx, all)
		if err != nil {
			t.Error(err)
		}
		for _, s := range locks {
			if s.Why == "" || strings.Contains(s.String(), "\n") {
				t.Errorf("unexplained: %q", s)
			}
			if want := all || s.Lock.Hostname == "old"; s.Removed != want {
				t.Errorf("all %v: removed %v: %s", all, s.Removed, s)
			}
		}
		if want := map[bool]int{false: 5, true: 4}[all]; len(locks) != want {
			t.Errorf("%d locks found, want %d", len(locks), want)
		}
	}
	if n := count(t, be, backend.Locks); n != 0 {
		t.Errorf("%d are left", n)
	}
}

func TestWaitForALock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		be := mem.New()
		newRepo(t, be, repo.Options{})
		var waits atomic.Int32
		opt := repo.Options{LockWait: 10 * time.Minute, LockWaiting: func(err error) {
			waits.Add(1)
			if !errors.Is(err, repo.ErrLocked) {
				t.Errorf("waiting for %v", err)
			}
		}}
		var wg sync.WaitGroup
		holdFor := func(r *repo.Repo, d time.Duration) {
			err := r.WithLock(t.Context(), true, func(context.Context) error { time.Sleep(d); return nil })
			if err != nil {
				t.Error(err)
			}
		}
		began := time.Now()
		wg.Go(func() { holdFor(open(t, be, repo.Options{}), 8*time.Minute) })
		time.Sleep(time.Second)
		holdFor(open(t, be, opt), 0)
		if took := time.Since(began); took < 8*time.Minute || took > 9*time.Minute {
			t.Errorf("waited %v for a lock of eight minutes", took)
		}
		if n := waits.Load(); n < 10 || n > 60 {
			t.Errorf("looked %d times", n)
		}
		wg.Wait()

		wg.Go(func() { holdFor(open(t, be, repo.Options{}), time.Hour) })
		time.Sleep(time.Second)
		began = time.Now()
		if err := open(t, be, opt).WithLock(t.Context(), false, nothing); !errors.Is(err, repo.ErrLocked) {
			t.Errorf("a longer lock: %v", err)
		}
		if took := time.Since(began); took != 10*time.Minute {
			t.Errorf("gave up after %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := open(t, be, opt).WithLock(ctx, false, nothing); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cancelled: %v", err)
		}
		wg.Wait()

		// Many at once get their turn, one at a time.
		var inside atomic.Int32
		for range 8 {
			r := open(t, be, opt)
			wg.Go(func() {
				err := r.WithLock(t.Context(), true, func(context.Context) error {
					if inside.Add(1) > 1 {
						t.Error("two hold an exclusive lock")
					}
					time.Sleep(20 * time.Second)
					inside.Add(-1)
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := count(t, be, backend.Locks); n != 0 {
			t.Errorf("%d locks are left", n)
		}
	})
}

// A machine that slept longer than a lock lives must not go on: others may have
// taken the lock for stale.
func TestSleepEndsALock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		be := mem.New()
		newRepo(t, be, repo.Options{})
		r := open(t, be, repo.Options{})
		var asleep atomic.Int64
		start := time.Now()
		r.SetBoottime(func() time.Duration { return time.Since(start) + time.Duration(asleep.Load()) })
		tree := backup.Hash(nil)
		err := r.WithLock(t.Context(), false, func(ctx context.Context) error {
			time.Sleep(time.Hour)
			asleep.Add(int64(10 * time.Minute))   // shorter: it is renewed
			time.Sleep(time.Minute + time.Second) // between two looks at the lock
			if ctx.Err() != nil {
				t.Errorf("stopped after a nap: %v", context.Cause(ctx))
			}
			asleep.Add(int64(2 * time.Hour))
			if _, err := r.SaveSnapshot(ctx, &backup.Snapshot{Tree: &tree}); !errors.Is(err, repo.ErrLockLost) {
				t.Errorf("a snapshot right after waking up: %v", err)
			}
			if err := r.RemovePacks(ctx, []backup.ID{tree}); !errors.Is(err, repo.ErrLockLost) {
				t.Errorf("removing a pack right after waking up: %v", err)
			}
			if err := r.RemoveSnapshot(ctx, tree); !errors.Is(err, repo.ErrLockLost) {
				t.Errorf("removing a snapshot right after waking up: %v", err)
			}
			woke := time.Now()
			<-ctx.Done()
			if took := time.Since(woke); took > 15*time.Second {
				t.Errorf("noticed after %v", took)
			}
			return ctx.Err()
		})
		if !errors.Is(err, repo.ErrLockLost) {
			t.Error(err)
		}
		if n := count(t, be, backend.Snapshots); n != 0 {
			t.Errorf("%d snapshots", n)
		}
	})
}

func TestRemovedLockStopsItsHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		be := mem.New()
		newRepo(t, be, repo.Options{})
		r := open(t, be, repo.Options{})
		err := r.WithLock(t.Context(), false, func(ctx context.Context) error {
			time.Sleep(time.Minute)
			if _, err := r.Unlock(ctx, true); err != nil {
				t.Error(err)
			}
			<-ctx.Done()
			return ctx.Err()
		})
		if !errors.Is(err, repo.ErrLockLost) || !strings.Contains(err.Error(), "removed") {
			t.Error(err)
		}
	})
}

// On a store that discards what is put, for finding out what would be done, a
// lock is never there, and never missed.
func TestLockOnADiscardingStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		be := mem.New()
		newRepo(t, be, repo.Options{})
		err := open(t, backend.Discard(be), repo.Options{}).WithLock(t.Context(), false, func(ctx context.Context) error {
			time.Sleep(3 * time.Hour)
			return ctx.Err()
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// A journal that can't be written costs nothing but knowledge.
func TestNoPlaceForAJournal(t *testing.T) {
	be := mem.New()
	newRepo(t, be, repo.Options{})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := open(t, be, repo.Options{Journal: file + "/below"})
	if err := r.WithLock(t.Context(), true, nothing); err != nil {
		t.Error(err)
	}
}
