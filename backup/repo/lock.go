package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/user"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

// Times of locks. restic shares the first two.
const (
	lockRefresh = 5 * time.Minute
	lockStale   = 30 * time.Minute
	// lockGiveUp is the age at which a lock that could not be refreshed
	// stops its holder, well before others take it for stale.
	lockGiveUp = 20 * time.Minute
	// lockTick is how often a holder looks at its lock's age, and how soon it
	// tries again after a failure. It bounds how long a machine that slept
	// goes on before it notices.
	lockTick = 10 * time.Second
	// Who waits for a lock looks after the first, then ever more rarely.
	lockPollMin = time.Second
	lockPollMax = 30 * time.Second
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

// Stale reports whether the lock, by the clocks of its maker and of this
// machine, was not refreshed for half an hour. A clock may be wrong; see
// [LockState] for what is certain.
func (l Lock) Stale(at time.Time) bool { return at.Sub(l.Time) > lockStale }

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

// A LockState is a lock that was found, and what is known of its holder.
type LockState struct {
	ID   backup.ID
	Lock Lock  // zero if it can't be read
	Err  error // why it can't be read
	// Stale says that nobody holds the lock any more.
	Stale bool
	// Ours says that a process of this machine made it, as the journal knows.
	Ours bool
	// Why says in a few words how that is known, or since when it is waited.
	Why string
	// Removed says that Unlock has removed it.
	Removed bool
}

// String tells in one line who holds the lock, since when, and whether that is
// still so.
func (s LockState) String() string {
	what := s.Lock.String()
	if s.Err != nil {
		what = fmt.Sprintf("lock that can't be read (%s)", oneLine(s.Err))
	}
	return what + ": " + s.Why
}

// Locks returns every lock with what is known of its holder, oldest first.
//
// One that the journal (see [Options]) knows as ours is stale as soon as its
// process has ended or the machine was restarted. Any other is stale when it
// was seen unchanged for half an hour, since holders renew theirs every five
// minutes; no clock matters for that. Without a journal the clock decides, as
// it does for restic.
func (r *Repo) Locks(ctx context.Context) ([]LockState, error) {
	var all []LockState
	there := map[backup.ID]bool{}
	err := r.EachLock(ctx, func(id backup.ID, l Lock, err error) error {
		s := LockState{ID: id, Lock: l, Err: err}
		r.judge(&s)
		all = append(all, s)
		there[id] = true
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list locks: %w", err)
	}
	r.journal.sweep(there)
	slices.SortFunc(all, func(a, b LockState) int {
		return cmp.Or(a.Lock.Time.Compare(b.Lock.Time), slices.Compare(a.ID[:], b.ID[:]))
	})
	return all, nil
}

// judge finds out whether anybody holds a lock.
func (r *Repo) judge(s *LockState) {
	fate, why := r.journal.ours(s.ID)
	if s.Why = why; fate != unknown {
		s.Ours, s.Stale = true, fate == gone
		return
	}
	if r.journal == nil {
		age := time.Since(s.Lock.Time)
		switch {
		case s.Err != nil:
			s.Why = "it may be just being written; if it stays, it is damaged"
		case s.Lock.Stale(time.Now()):
			s.Stale, s.Why = true, fmt.Sprintf("not refreshed for %s by the clock", round(age))
		default:
			s.Why = fmt.Sprintf("refreshed %s ago by the clock", round(age))
		}
		return
	}
	age := r.journal.seen(s.ID)
	if s.Stale = age >= lockStale; s.Stale {
		s.Why = fmt.Sprintf("nobody has refreshed it for %s", round(age))
		return
	}
	s.Why = fmt.Sprintf("seen here for %s; if it is still there unchanged in %s, nobody holds it", round(age), round(lockStale-age))
}

func round(d time.Duration) time.Duration { return d.Round(time.Second) }

// Unlock removes the stale locks, or with all set every lock, also those of
// living holders: that can lose what they write, so only a person may ask for
// it. It returns what Locks does, with Removed set on those that are gone.
func (r *Repo) Unlock(ctx context.Context, all bool) ([]LockState, error) {
	locks, err := r.Locks(ctx)
	if err != nil {
		return nil, fmt.Errorf("unlock: %w", err)
	}
	var failed error // the first
	for i := range locks {
		s := &locks[i]
		if !s.Stale && !all {
			continue
		}
		err := r.be.Delete(ctx, backend.Key{Kind: backend.Locks, ID: s.ID})
		s.Removed = err == nil || errors.Is(err, fs.ErrNotExist)
		if !s.Removed && failed == nil {
			failed = fmt.Errorf("unlock: %w", err)
		}
	}
	return locks, failed
}

// WithLock runs fn under a lock: a shared one lets other readers and writers
// in, an exclusive one nobody. When another lock forbids it, it waits as long
// as Options.LockWait says, then fails with ErrLocked. Locks that processes of
// this machine left behind are removed, those of others never. The lock is
// refreshed while fn runs; when that is not possible for too long, also because
// the machine slept, or when somebody removed it, fn's context is cancelled
// with the cause ErrLockLost, and snapshots and indexes can't be saved with it.
//
// On a repository that can't be written, a shared lock is neither possible nor
// needed, and fn runs without one.
func (r *Repo) WithLock(ctx context.Context, exclusive bool, fn func(ctx context.Context) error) error {
	h, err := r.lock(ctx, exclusive)
	if err != nil {
		return err
	}
	if h == nil {
		return fn(ctx)
	}
	defer h.remove(ctx)
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, heldKey{r}, h))
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

// lock makes a lock, or returns nil if none is possible nor needed.
func (r *Repo) lock(ctx context.Context, exclusive bool) (*heldLock, error) {
	until := time.Now().Add(r.opt.LockWait)
	pause := lockPollMin
	for {
		h, err := r.tryLock(ctx, exclusive)
		left := time.Until(until)
		if !errors.Is(err, ErrLocked) || left <= 0 {
			return h, err
		}
		if r.opt.LockWaiting != nil {
			r.opt.LockWaiting(err)
		}
		// At random, so that two who step back from each other don't meet
		// again and again.
		wait := time.NewTimer(min(left, pause/2+rand.N(pause)))
		pause = min(2*pause, lockPollMax)
		select {
		case <-ctx.Done():
			wait.Stop()
			return nil, fmt.Errorf("wait for a lock: %w", context.Cause(ctx))
		case <-wait.C:
		}
	}
}

func (r *Repo) tryLock(ctx context.Context, exclusive bool) (*heldLock, error) {
	if _, err := r.checkLocks(ctx, exclusive, backup.ID{}); err != nil {
		return nil, err
	}
	h := &heldLock{r: r, lock: newLock(exclusive)}
	h.renewed.Store(r.moment())
	var err error
	if h.id, h.note, err = r.saveLock(ctx, h.lock); err != nil {
		if !exclusive && (errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)) {
			return nil, nil
		}
		return nil, fmt.Errorf("lock repository: %w", err)
	}
	// Another may have made a lock at the same moment: both look again, and
	// at least one steps back.
	if h.shown, err = r.checkLocks(ctx, exclusive, h.id); err != nil {
		h.remove(ctx)
		return nil, err
	}
	return h, nil
}

// saveLock stores a lock, after noting in the journal that it is ours.
func (r *Repo) saveLock(ctx context.Context, l Lock) (backup.ID, *os.File, error) {
	plain, err := json.Marshal(l)
	if err != nil {
		return backup.ID{}, nil, err
	}
	id, sealed := r.sealFile(plain)
	note := r.journal.own(id)
	if err := r.be.Put(ctx, backend.Key{Kind: backend.Locks, ID: id}, sealed); err != nil {
		// It may have arrived all the same; if not, this is soon said.
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockTick)
		defer cancel()
		_ = r.be.Delete(late, backend.Key{Kind: backend.Locks, ID: id})
		r.journal.disown(id, note)
		return backup.ID{}, nil, err
	}
	return id, note, nil
}

// checkLocks returns ErrLocked if a lock other than own forbids a new one, and
// removes those that processes of this machine left. It reports whether it has
// seen own.
func (r *Repo) checkLocks(ctx context.Context, exclusive bool, own backup.ID) (seen bool, err error) {
	locks, err := r.Locks(ctx)
	if err != nil {
		return false, err
	}
	for _, s := range locks {
		switch {
		case s.ID == own:
			seen = true
		case s.Stale && s.Ours:
			// If this fails, the next who looks tries again.
			_ = r.be.Delete(ctx, backend.Key{Kind: backend.Locks, ID: s.ID})
		case s.Stale:
		case s.Err != nil || exclusive || s.Lock.Exclusive:
			// One that can't be read may be one that is just being written on
			// a share: count it, as it may be exclusive.
			return seen, fmt.Errorf("%w by the %s (wait, or if its holder is surely gone, run `ide49-backup unlock`)", ErrLocked, s)
		}
	}
	return seen, nil
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

// A moment is a time on both clocks that nobody can set: the monotonic one,
// and the one that goes on while the machine sleeps.
type moment struct {
	awake time.Time
	boot  time.Duration
}

func (r *Repo) moment() *moment { return &moment{time.Now(), r.boottime()} }

// since returns how long ago a moment was.
func (r *Repo) since(m *moment) time.Duration {
	return max(time.Since(m.awake), r.boottime()-m.boot)
}

// A heldLock is a lock of this process. lock, id and note are changed by
// refresh alone, and read after it has ended.
type heldLock struct {
	r       *Repo
	lock    Lock
	id      backup.ID
	shown   bool // the store lists it; one that discards what is put does not
	note    *os.File
	renewed atomic.Pointer[moment]
}

// heldKey is the key under which a context carries the lock on a repository.
type heldKey struct{ r *Repo }

// lockHeld returns an error if ctx stands for a lock on the repository that is
// too old, because the machine slept and the holder could not notice yet.
func (r *Repo) lockHeld(ctx context.Context) error {
	if h, ok := ctx.Value(heldKey{r}).(*heldLock); ok {
		if age := r.since(h.renewed.Load()); age >= lockGiveUp {
			return fmt.Errorf("%w: it is %s old", ErrLockLost, round(age))
		}
	}
	return nil
}

// refresh renews the lock until ctx ends.
func (h *heldLock) refresh(ctx context.Context, cancel context.CancelCauseFunc) {
	var last error
	ticker := time.NewTicker(lockTick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		age := h.r.since(h.renewed.Load())
		switch {
		case age >= lockGiveUp && last != nil:
			cancel(fmt.Errorf("%w: %w", ErrLockLost, last))
			return
		case age >= lockGiveUp:
			cancel(fmt.Errorf("%w: the machine slept for %s", ErrLockLost, round(age)))
			return
		case age < lockRefresh:
			continue
		}
		attempt, stop := context.WithTimeout(ctx, lockGiveUp-age)
		last = h.renew(attempt)
		stop()
		if errors.Is(last, ErrLockLost) {
			cancel(last)
			return
		}
	}
}

// renew puts a new lock in place of the old one.
func (h *heldLock) renew(ctx context.Context) error {
	old := backend.Key{Kind: backend.Locks, ID: h.id}
	if _, err := h.r.be.Get(ctx, old, 0, -1); h.shown && errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: somebody removed it", ErrLockLost)
	}
	at := h.r.moment() // before the lock is written: the careful side
	next := h.lock
	next.Time = now()
	id, note, err := h.r.saveLock(ctx, next)
	if err != nil {
		return err
	}
	oldNote := h.note
	h.lock, h.id, h.note = next, id, note
	h.renewed.Store(at)
	if h.r.be.Delete(ctx, old) == nil {
		h.r.journal.disown(old.ID, oldNote)
	} else if oldNote != nil {
		// Nobody renews it any more; the journal knows that its process has
		// ended once the flock is gone.
		_ = oldNote.Close()
	}
	return nil
}

// remove takes the lock away, also when ctx is cancelled.
func (h *heldLock) remove(ctx context.Context) {
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if err := h.r.be.Delete(late, backend.Key{Kind: backend.Locks, ID: h.id}); err == nil || errors.Is(err, fs.ErrNotExist) {
		h.r.journal.disown(h.id, h.note)
	} else if h.note != nil {
		_ = h.note.Close() // the next who looks sees that nobody holds it
	}
}
