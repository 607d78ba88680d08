package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

// Times of locks, which restic shares.
const (
	lockRefresh = 5 * time.Minute
	lockStale   = 30 * time.Minute
	// lockGiveUp is the age at which a lock that could not be refreshed
	// stops its holder, well before others take it for stale.
	lockGiveUp = 20 * time.Minute
	lockRetry  = 10 * time.Second
)

var (
	// ErrLocked says that somebody else uses the repository in a way that
	// does not go together with what was asked for.
	ErrLocked = errors.New("the repository is locked")
	// ErrLockLost says that a lock could not be refreshed in time.
	ErrLockLost = errors.New("the lock on the repository could not be refreshed; stopped before it goes stale")
)

// A Lock is the contents of a lock file.
type Lock struct {
	Time      time.Time `json:"time"`
	Exclusive bool      `json:"exclusive"`
	Hostname  string    `json:"hostname"`
	Username  string    `json:"username"`
	PID       int       `json:"pid"`
	UID       uint32    `json:"uid,omitempty"`
	GID       uint32    `json:"gid,omitempty"`
}

// DecodeLock parses the plaintext of a lock file.
func DecodeLock(plain []byte) (Lock, error) {
	var l Lock
	if err := json.Unmarshal(plain, &l); err != nil {
		return l, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return l, nil
}

// String tells who holds the lock since when.
func (l Lock) String() string {
	kind := "shared"
	if l.Exclusive {
		kind = "exclusive"
	}
	return fmt.Sprintf("%s lock of process %d of %s on %s, made %s", kind, l.PID, l.Username, l.Hostname, l.Time.Format(time.DateTime))
}

// Stale reports whether nobody can hold the lock any more: it was not
// refreshed for half an hour, or was made on this host by a process that is
// gone.
func (l Lock) Stale(at time.Time) bool {
	if at.Sub(l.Time) > lockStale {
		return true
	}
	host, err := os.Hostname()
	return err == nil && host == l.Hostname && l.PID > 0 && errors.Is(syscall.Kill(l.PID, 0), syscall.ESRCH)
}

func newLock(exclusive bool) Lock {
	l := Lock{Time: now(), Exclusive: exclusive, PID: os.Getpid()}
	l.Username, l.Hostname = whoami()
	if u, err := user.Current(); err == nil {
		uid, _ := strconv.ParseUint(u.Uid, 10, 32) // numeric on Linux
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		l.UID, l.GID = uint32(uid), uint32(gid)
	}
	return l
}

// WithLock runs fn under a lock: a shared one lets other readers and writers
// in, an exclusive one nobody. It fails with ErrLocked at once when another
// lock forbids it. The lock is refreshed while fn runs; when that is not
// possible for too long, fn's context is cancelled with the cause ErrLockLost.
//
// On a repository that can't be written, a shared lock is neither possible nor
// needed, and fn runs without one.
func (r *Repo) WithLock(ctx context.Context, exclusive bool, fn func(ctx context.Context) error) error {
	if err := r.checkLocks(ctx, exclusive, backup.ID{}); err != nil {
		return err
	}
	lock := newLock(exclusive)
	id, err := r.saveLock(ctx, lock)
	if err != nil {
		if !exclusive && (errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)) {
			return fn(ctx)
		}
		return fmt.Errorf("lock repository: %w", err)
	}
	h := &heldLock{r: r, lock: lock, id: id}
	defer h.remove(ctx)
	// Another may have made a lock at the same moment: both look again, and
	// at least one steps back.
	if err := r.checkLocks(ctx, exclusive, id); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.refresh(ctx, cancel)
	}()
	err = fn(ctx)
	if cause := context.Cause(ctx); errors.Is(cause, ErrLockLost) && err != nil {
		err = fmt.Errorf("%w (%w)", cause, err)
	}
	cancel(nil)
	<-done
	return err
}

func (r *Repo) saveLock(ctx context.Context, l Lock) (backup.ID, error) {
	plain, err := json.Marshal(l)
	if err != nil {
		return backup.ID{}, err
	}
	return r.SaveFile(ctx, backend.Locks, plain)
}

// checkLocks returns ErrLocked if a lock other than own forbids a new one.
func (r *Repo) checkLocks(ctx context.Context, exclusive bool, own backup.ID) error {
	err := r.EachLock(ctx, func(id backup.ID, l Lock, err error) error {
		switch {
		case id == own:
		case err != nil:
			// A lock that can't be read may be one that is just being
			// written on a share: count it, as it may be exclusive.
			return fmt.Errorf("%w by one that can't be read (%w); if it stays, run `ide49-backup unlock`", ErrLocked, err)
		case (exclusive || l.Exclusive) && !l.Stale(time.Now()):
			return fmt.Errorf("%w by a %s; wait, or if that is surely gone run `ide49-backup unlock`", ErrLocked, l)
		}
		return nil
	})
	if err != nil && !errors.Is(err, ErrLocked) {
		return fmt.Errorf("list locks: %w", err)
	}
	return err
}

// EachLock calls fn for every lock, or with what is wrong with one.
func (r *Repo) EachLock(ctx context.Context, fn func(id backup.ID, l Lock, err error) error) error {
	return r.EachFile(ctx, backend.Locks, func(id backup.ID, plain []byte, err error) error {
		var l Lock
		if err == nil {
			l, err = DecodeLock(plain)
		}
		return fn(id, l, err)
	})
}

type heldLock struct {
	r    *Repo
	lock Lock
	id   backup.ID // changed by refresh alone, read after it has ended
}

// refresh renews the lock until ctx ends.
func (h *heldLock) refresh(ctx context.Context, cancel context.CancelCauseFunc) {
	renewed := time.Now() // monotonic: a clock that is set does not matter
	timer := time.NewTimer(lockRefresh)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		next := h.lock
		next.Time = now()
		attempt, stop := context.WithDeadline(ctx, renewed.Add(lockGiveUp))
		id, err := h.r.saveLock(attempt, next)
		stop()
		if err == nil {
			old := h.id
			h.lock, h.id, renewed = next, id, time.Now()
			// If this fails the old one goes stale by itself.
			_ = h.r.be.Delete(ctx, backend.Key{Kind: backend.Locks, ID: old})
			timer.Reset(lockRefresh)
			continue
		}
		if time.Since(renewed) >= lockGiveUp {
			cancel(fmt.Errorf("%w: %w", ErrLockLost, err))
			return
		}
		timer.Reset(lockRetry)
	}
}

// remove takes the lock away, also when ctx is cancelled.
func (h *heldLock) remove(ctx context.Context) {
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	// If this fails the lock goes stale by itself.
	_ = h.r.be.Delete(late, backend.Key{Kind: backend.Locks, ID: h.id})
}
