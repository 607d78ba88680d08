package integration

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

// Stock restic and we respect each other's locks. One that a killed restic
// leaves is not taken for stale by its host name and process number, which
// containers share.
func TestLocksWithRestic(t *testing.T) {
	ctx := t.Context()
	p := newPlace(t)
	be, err := local.Create(p.dir, local.Options{})
	must(t, err)
	r, err := repo.Init(ctx, be, password, crypt.Params{N: 2, R: 1, P: 1}, repo.Options{Journal: t.TempDir()})
	must(t, err)
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, []byte("x"), 0o600))

	must(t, r.WithLock(ctx, true, func(context.Context) error {
		if out, err := command(p.env, "restic", "backup", file); err == nil || !strings.Contains(out, "locked") {
			t.Errorf("restic writes beside our exclusive lock: %s", out)
		}
		return nil
	}))
	must(t, r.WithLock(ctx, false, func(context.Context) error {
		p.restic(t, "backup", file)
		if out, err := command(p.env, "restic", "prune"); err == nil || !strings.Contains(out, "locked") {
			t.Errorf("restic prunes beside our shared lock: %s", out)
		}
		return nil
	}))

	// A restic that waits for its standard input holds a shared lock.
	cmd := exec.Command("restic", "backup", "--stdin")
	cmd.Env = append(os.Environ(), p.env...)
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill() // it has ended already
		_ = in.Close()
	}()
	_, err = io.WriteString(in, "begin")
	must(t, err)
	held := func() bool {
		locks, err := r.Locks(ctx)
		must(t, err)
		return slices.ContainsFunc(locks, func(l repo.LockState) bool { return l.Lock.PID == cmd.Process.Pid && !l.Stale && !l.Ours })
	}
	for deadline := time.Now().Add(time.Minute); !held(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("restic takes no lock")
		}
	}
	must(t, r.WithLock(ctx, false, func(context.Context) error { return nil }))
	if err := r.WithLock(ctx, true, func(context.Context) error { return nil }); !errors.Is(err, repo.ErrLocked) {
		t.Errorf("an exclusive lock beside restic's: %v", err)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	if locks, err := r.Unlock(ctx, false); err != nil || len(locks) != 1 || locks[0].Removed {
		t.Errorf("a foreign lock of just now: %v, %v", locks, err)
	}
	if locks, err := r.Unlock(ctx, true); err != nil || len(locks) != 1 || !locks[0].Removed {
		t.Errorf("unlock all: %v, %v", locks, err)
	}
	p.restic(t, "check")
	must(t, r.Close())
}
