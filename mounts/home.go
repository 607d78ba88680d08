package mounts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// HomeFSType is the type that a share in user space has in the mount table.
const HomeFSType = "fuse.ide49-smb"

// A HomeClient says which client mounts the share.
type HomeClient string

// The clients.
const (
	ClientAuto   HomeClient = "auto"   // the kernel's if it has one
	ClientKernel HomeClient = "kernel" // cifs
	ClientUser   HomeClient = "user"   // FUSE
)

// A HomeShare is the share that takes the home's place. All methods return
// soon after ctx has ended, and may be called again after they failed.
type HomeShare interface {
	// Probe proves that the share can be used for a home: it writes, syncs,
	// reads and removes a file. It touches no mount.
	Probe(ctx context.Context) error
	// Source is what the mount table shows for it, whichever client.
	Source() string
	// Kernel returns the options for the kernel's client. They hold the
	// password; the caller overwrites them.
	Kernel(ctx context.Context) (options []byte, err error)
	// User mounts it in user space. The mount serves until it is unmounted.
	User(ctx context.Context, at string) (UserMount, error)
}

// A UserMount is a share that this process serves.
type UserMount interface {
	// Unmount writes what is buffered and unmounts. If programs use it, it
	// fails with unix.EBUSY, or with lazy vanishes from the tree at once.
	Unmount(lazy bool) error
}

// HomeConfig says what the home is.
type HomeConfig struct {
	Share HomeShare
	Path  string // "/home/iot"
	Local string // where the local home stays visible, also under the share
	// LocalPaths are folders, relative to the home, that show the local
	// home's also while the share is there, such as ".jupyter".
	LocalPaths []string
	Client     HomeClient // empty: ClientAuto
	// Wait is how long after a start the share may take its place without
	// the local home being known to be unchanged; 0: 20 seconds.
	Wait time.Duration
	// SwitchNever switches over only at a start or on request, and not when
	// nobody uses the local home.
	SwitchNever bool
	// Changed, if set, is told about each new state, one at a time. It must
	// return soon.
	Changed func(HomeState)
}

// A HomeState is what the home shows, and why.
type HomeState struct {
	Mode    HomeMode
	Since   time.Time  // when Mode began
	Client  HomeClient // of a share: kernel or user
	Reason  string
	Remedy  string
	Holders []HomeHolder // who is in the way
}

// A Home keeps a share over the local home. It is used by one process at a
// time.
type Home struct {
	cfg   HomeConfig
	start time.Time

	mu    sync.Mutex // of the fields below
	state HomeState
	wish  HomeWish

	acting sync.Mutex // held while the home is looked at or changed
	user   UserMount
	fails  int

	kick chan struct{}
}

// NewHome returns a home that does nothing yet.
func NewHome(cfg HomeConfig) (*Home, error) {
	for _, p := range []*string{&cfg.Path, &cfg.Local} {
		if !filepath.IsAbs(*p) || filepath.Clean(*p) == "/" {
			return nil, fmt.Errorf("home: %q is no absolute path of a folder", *p)
		}
		*p = filepath.Clean(*p)
	}
	if under(cfg.Local, cfg.Path) || under(cfg.Path, cfg.Local) {
		return nil, fmt.Errorf("home: path %s and local %s must not lie in each other", cfg.Path, cfg.Local)
	}
	for _, p := range cfg.LocalPaths {
		if !fs.ValidPath(p) || p == "." {
			return nil, fmt.Errorf("home: local_paths: %q is no path below the home", p)
		}
	}
	switch cfg.Client {
	case "":
		cfg.Client = ClientAuto
	case ClientAuto, ClientKernel, ClientUser:
	default:
		return nil, fmt.Errorf("home: client %q: want auto, kernel or user", cfg.Client)
	}
	if cfg.Wait <= 0 {
		cfg.Wait = 20 * time.Second
	}
	return &Home{cfg: cfg, start: time.Now(), kick: make(chan struct{}, 1)}, nil
}

// State returns what the home showed when it was last looked at.
func (h *Home) State() HomeState {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state
}

// Run keeps the home as configured until ctx ends. A share that the kernel
// mounts stays then, and the next Run takes it over; one in user space is
// unmounted.
func (h *Home) Run(ctx context.Context) error {
	for {
		h.Look(ctx)
		h.acting.Lock()
		pause := homePause(h.State().Mode, h.fails)
		if time.Since(h.start) < h.cfg.Wait {
			pause = min(pause, time.Second)
		}
		h.acting.Unlock()
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return h.end()
		case <-timer.C:
		case <-h.kick:
			timer.Stop()
		}
	}
}

// end unmounts what can't outlive this process.
func (h *Home) end() error {
	h.acting.Lock()
	defer h.acting.Unlock()
	if h.user == nil {
		return nil
	}
	return h.uncover(true)
}

// Mount puts the share over the local home now, also if programs use that.
func (h *Home) Mount(ctx context.Context) error { return h.ask(ctx, WishShare, HomeShared) }

// Unmount shows the local home, until Mount or the next start. If programs use
// the share it fails with [ErrHomeInUse], unless it is forced.
func (h *Home) Unmount(ctx context.Context, force bool) error {
	if force {
		return h.ask(ctx, WishRelease, HomeLocal)
	}
	return h.ask(ctx, WishLocal, HomeLocal)
}

func (h *Home) ask(ctx context.Context, wish HomeWish, want HomeMode) error {
	h.mu.Lock()
	before := h.wish
	h.wish = wish
	h.mu.Unlock()
	s := h.Look(ctx)
	if s.Mode == want {
		if wish == WishRelease {
			wish = WishLocal
		}
		if wish == WishShare {
			wish = WishAuto
		}
		before = wish
	}
	h.mu.Lock()
	h.wish = before
	h.mu.Unlock()
	select {
	case h.kick <- struct{}{}:
	default:
	}
	switch {
	case s.Mode == want:
		return nil
	case len(s.Holders) > 0:
		return fmt.Errorf("home %s: %w: %s; %s", h.cfg.Path, ErrHomeInUse, s.Reason, s.Remedy)
	}
	return fmt.Errorf("home %s: %s", h.cfg.Path, s.Reason)
}

// Look finds out what the home shows, does what is due, and returns the new
// state. It never waits for a file system that doesn't answer.
func (h *Home) Look(ctx context.Context) HomeState {
	h.acting.Lock()
	defer h.acting.Unlock()
	var d HomeDecision
	var f HomeFacts
	for range 4 { // detach, cover, bind, and look at the result
		var err error
		if f, err = h.facts(ctx); err != nil {
			d = HomeDecision{Mode: HomeFailed, Reason: err.Error()}
			break
		}
		d = PlanHome(f)
		if d.Step == StepNone {
			break
		}
		if err := h.do(ctx, d.Step, f); err != nil {
			d.Mode, d.Reason = HomeFailed, err.Error()
			break
		}
	}
	if d.Mode == HomeShared {
		h.fails = 0
	} else {
		h.fails++
	}
	s := HomeState{Mode: d.Mode, Reason: d.Reason, Remedy: d.Remedy, Holders: f.Holders}
	if d.Mode == HomeShared || d.Mode == HomeAway {
		s.Client = ClientKernel
		if h.user != nil {
			s.Client = ClientUser
		}
	}
	h.mu.Lock()
	old := h.state
	if s.Since = old.Since; s.Mode != old.Mode {
		s.Since = time.Now()
	}
	h.state = s
	h.mu.Unlock()
	if h.cfg.Changed != nil && (s.Mode != old.Mode || s.Reason != old.Reason) {
		h.cfg.Changed(s)
	}
	return s
}

func (h *Home) do(ctx context.Context, step HomeStep, f HomeFacts) error {
	switch step {
	case StepCover:
		return h.cover(ctx)
	case StepBind:
		return h.bind(f.Unbound)
	case StepReveal:
		return h.uncover(false)
	case StepDetach:
		return h.uncover(true)
	}
	return nil
}

// homeProbeLimit bounds the question whether the server is there.
const homeProbeLimit = 8 * time.Second

func (h *Home) facts(ctx context.Context) (HomeFacts, error) {
	table, err := readTable("/proc/self/mountinfo")
	if err != nil {
		return HomeFacts{}, err
	}
	h.mu.Lock()
	f := HomeFacts{Wish: h.wish, Never: h.cfg.SwitchNever, Starting: time.Since(h.start) < h.cfg.Wait}
	h.mu.Unlock()
	f.Top = h.top(table)
	pctx, cancel := context.WithTimeout(ctx, homeProbeLimit)
	defer cancel()
	if f.Probe = h.cfg.Share.Probe(pctx); f.Probe != nil && ctx.Err() != nil {
		return f, ctx.Err()
	}
	switch f.Top {
	case TopLocal:
		if f.Probe == nil && f.Wish == WishAuto {
			if tree, ok := treeOf(table, h.cfg.Path); ok {
				f.Holders, f.Blind, err = tree.holders("/proc", os.Getpid())
			}
			if len(f.Holders) == 0 && !f.Starting && !f.Never && !f.Blind {
				f.Changed = changedSince(h.cfg.Path, h.start)
			}
		}
	case TopShare:
		if f.Wish == WishLocal {
			if tree, ok := treeOf(table, h.cfg.Path); ok {
				f.Holders, f.Blind, err = tree.holders("/proc", os.Getpid())
			}
		}
		for _, p := range h.cfg.LocalPaths {
			at := filepath.Join(h.cfg.Path, p)
			if !slices.ContainsFunc(table, func(m *mountinfo.Info) bool { return m.Mountpoint == at && !isShare(m) }) {
				f.Unbound = append(f.Unbound, p)
			}
		}
	}
	return f, err
}

// isShare reports whether a mount is a Samba share by either client.
func isShare(m *mountinfo.Info) bool {
	return m.FSType == "cifs" || m.FSType == "smb3" || m.FSType == HomeFSType
}

// top says what is on top at the home's path.
func (h *Home) top(table []*mountinfo.Info) HomeTop {
	var top *mountinfo.Info
	for _, m := range table {
		if m.Mountpoint == h.cfg.Path {
			top = m
		}
	}
	switch {
	case top == nil:
		return TopLocal
	case isShare(top) && top.Source != h.cfg.Share.Source():
		return TopForeign
	case top.FSType == HomeFSType && h.user == nil:
		// A file system in user space whose process is gone answers at once.
		var st unix.Statfs_t
		if err := unix.Statfs(h.cfg.Path, &st); err == unix.ENOTCONN {
			return TopDead
		}
		return TopForeign // another process serves it
	case isShare(top):
		return TopShare
	case strings.HasPrefix(top.FSType, "fuse"), strings.HasPrefix(top.FSType, "nfs"):
		return TopForeign
	}
	return TopLocal // the volume of the local home
}

// changedSince reports whether anything below a folder was changed since a
// moment. When in doubt it was.
func changedSince(dir string, since time.Time) bool {
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if ctimeOf(info).After(since) {
			return errChanged
		}
		return nil
	})
	return err != nil
}

var errChanged = errors.New("changed")
