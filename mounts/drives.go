package mounts

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// DriveEvents are called by Run when something happens, one at a time and
// never after Run returned. They must return soon and may call List, but
// nothing that waits for Run. Any may be nil.
type DriveEvents struct {
	// Changed is called when a drive comes, and when its state, path or reason
	// changes.
	Changed func(Drive)
	// Removed is called when a drive went away. Loss says what is known about
	// data that had not been written when it was pulled out.
	Removed func(d Drive, loss Loss)
	// Failed is called for what concerns no single drive, as an unreadable
	// mount table. Run goes on.
	Failed func(error)
}

// A Loss says whether data was lost when a drive was pulled out.
type Loss int

// The answers.
const (
	NoLoss       Loss = iota // it was not mounted, read-only, or everything had been written
	PossibleLoss             // something was still to be written
)

// Drives looks after the drives of this machine. Make it with NewDrives and
// call Run once; the other methods may be called from any goroutine.
type Drives struct {
	cfg    DriveConfig
	events DriveEvents
	sysfs  string
	proc   string
	watch  func(context.Context) iter.Seq2[udev.Event, error]

	once bool // mount nothing by itself and unmount nothing at the end
	peek bool // change nothing at all, beside another process that does

	calls   chan func(*driveLoop)
	stopped chan struct{}

	mu      sync.Mutex
	started bool
	list    []Drive
}

// ErrNotRunning is answered by methods of Drives that need Run.
var ErrNotRunning = errors.New("drives are not being looked after")

// NewDrives checks a configuration and returns Drives for it. Nothing is
// touched before Run.
func NewDrives(cfg DriveConfig, events DriveEvents) (*Drives, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Drives{
		cfg: cfg, events: events, sysfs: udev.Sysfs, proc: "/proc", watch: udev.Watch,
		calls: make(chan func(*driveLoop)), stopped: make(chan struct{}),
	}, nil
}

// List returns the present drives by name as of the latest change, and their
// use of space as of now.
func (d *Drives) List() []Drive {
	d.mu.Lock()
	list := slices.Clone(d.list)
	d.mu.Unlock()
	for i := range list {
		list[i].measure()
	}
	return list
}

// measure asks a mounted file system how full it is.
func (d *Drive) measure() {
	if d.State != DriveMounted || d.Plugging.Check(d.Path) != nil {
		return
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.Path, &st); err != nil {
		return
	}
	d.Used = int64(st.Blocks-st.Bfree) * int64(st.Bsize)
	d.Free = int64(st.Bavail) * int64(st.Bsize)
}

// Find returns the drive with a name, label, UUID, device name or mount
// folder. Several answers, as for two drives with one label, are an error, and
// so is none: errors.Is(err, ErrNoDrive).
func (d *Drives) Find(what string) (Drive, error) { return findDrive(d.List(), what) }

// ErrNoDrive is wrapped when a drive that was asked for is not plugged in.
var ErrNoDrive = errors.New("no such drive is plugged in")

func findDrive(list []Drive, what string) (Drive, error) {
	device := strings.TrimPrefix(what, "/dev/")
	for _, same := range []func(Drive) bool{
		func(d Drive) bool { return d.Name == what || d.Path != "" && d.Path == what },
		func(d Drive) bool { return d.Device == device },
		func(d Drive) bool { return d.UUID != "" && strings.EqualFold(d.UUID, what) },
		func(d Drive) bool { return d.Label != "" && d.Label == what },
	} {
		var found []Drive
		for _, drive := range list {
			if same(drive) {
				found = append(found, drive)
			}
		}
		switch len(found) {
		case 0:
			continue
		case 1:
			return found[0], nil
		}
		var names []string
		for _, f := range found {
			names = append(names, f.Name)
		}
		return Drive{}, fmt.Errorf("%q means several drives (%s); name one of them", what, strings.Join(names, ", "))
	}
	return Drive{}, fmt.Errorf("drive %q: %w; `ide49-backup drives` lists those that are", what, ErrNoDrive)
}

// Run looks after the drives until ctx is done. It first removes what an
// earlier run left behind, or takes it over. At the end it unmounts the drives
// that nobody uses and leaves the others mounted for the next run. Only one
// Run at a time works with a state folder.
func (d *Drives) Run(ctx context.Context) error {
	d.mu.Lock()
	again := d.started
	d.started = true
	d.mu.Unlock()
	if again {
		return errors.New("drives: Run was called twice")
	}
	defer close(d.stopped)

	if !d.peek {
		lock, err := lockState(d.cfg.StateDir)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	l, err := newDriveLoop(d)
	if err != nil {
		return err
	}
	return l.run(ctx)
}

// Once calls f with Drives that mount and unmount only what f asks for, for
// use without a daemon: what f mounted stays mounted afterwards, and a later
// Run takes it over. It answers ErrDrivesBusy while a Run works with the same
// state folder; ask that one then.
func Once(ctx context.Context, cfg DriveConfig, events DriveEvents, f func(context.Context, *Drives) error) error {
	d, err := NewDrives(cfg, events)
	if err != nil {
		return err
	}
	d.once = true
	return d.during(ctx, f)
}

// Present lists the drives that are plugged in, without a daemon or beside
// one, and changes nothing. What only the daemon knows is not in it: which
// drives were ejected, and why one could not be mounted.
func Present(ctx context.Context, cfg DriveConfig) ([]Drive, error) {
	var errs []error
	d, err := NewDrives(cfg, DriveEvents{Failed: func(err error) { errs = append(errs, err) }})
	if err != nil {
		return nil, err
	}
	d.once, d.peek = true, true
	// A place of its own: the daemon's nodes stay untouched.
	d.cfg.RunDir = filepath.Join(d.cfg.RunDir, fmt.Sprintf("look-%d", os.Getpid()))
	defer os.Remove(d.cfg.RunDir) // it is there only if nodes were made
	var list []Drive
	err = d.during(ctx, func(ctx context.Context, d *Drives) error {
		if err := d.settle(ctx); err != nil {
			return err
		}
		list = d.List()
		return nil
	})
	return list, errors.Join(append(errs, err)...)
}

// settle waits until every drive was looked at.
func (d *Drives) settle(ctx context.Context) error {
	done := make(chan struct{})
	if err := d.call(ctx, func(l *driveLoop) {
		l.waiting = append(l.waiting, func() bool {
			for _, k := range l.drives {
				if k.working || k.verdict.Action == ProbeDrive && !l.ending {
					return false
				}
			}
			l.answers = append(l.answers, func() { close(done) })
			return true
		})
	}); err != nil {
		return err
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// during calls f while Run runs.
func (d *Drives) during(ctx context.Context, f func(context.Context, *Drives) error) error {
	running, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- d.Run(running) }()
	// The first call is answered when Run has looked around, or ended.
	err := d.call(ctx, func(*driveLoop) {})
	if err == nil {
		err = f(ctx, d)
	} else if errors.Is(err, ErrNotRunning) {
		err = nil // Run says why
	}
	stop()
	return errors.Join(err, <-ran)
}

// lockState makes sure that no other process works with the same state.
func lockState(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("drives: making the state folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "drives.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("drives: locking the state folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if err == unix.EWOULDBLOCK {
			err = ErrDrivesBusy
		}
		return nil, errors.Join(fmt.Errorf("drives: locking the state folder %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// ErrDrivesBusy says that another process looks after the drives.
var ErrDrivesBusy = errors.New("another process looks after the drives")

// call runs f in the loop and waits until it ran.
func (d *Drives) call(ctx context.Context, f func(*driveLoop)) error {
	done := make(chan struct{})
	select {
	case d.calls <- func(l *driveLoop) { defer close(done); f(l) }:
		<-done
		return nil
	case <-d.stopped:
		return ErrNotRunning
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
