package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/policy"
)

// errAbsent says that the place of a repository is not there at all.
var errAbsent = errors.New("the destination is not present; plug in its drive or mount it, or correct the address")

// config loads the configuration. Its warnings go to stderr; so does, where
// it can't be used, everything that is wrong with it.
func (a *app) config() (*policy.Config, error) {
	cfg, problems, err := policy.Load(a.configFile, a.env)
	if bad, ok := errors.AsType[*policy.Errors](err); ok {
		if perr := policy.Print(a.stderr, bad.Problems, a.colors(a.stderr)); perr != nil {
			return nil, perr
		}
		return nil, usagef("the configuration can't be used; correct it, then run `ide49-backup config check`")
	}
	if err != nil {
		return nil, &usageError{err}
	}
	a.problems(problems)
	return cfg, nil
}

func (a *app) problems(problems []policy.Problem) {
	for _, p := range problems {
		a.warn("%s", p.Error())
	}
}

// A place is a repository that is not open: where it is and its password.
type place struct {
	name     string // in the configuration, or ""
	location policy.Location
	secret   policy.Secret
}

// String returns what to call the repository in a sentence.
func (p place) String() string {
	if p.name == "" {
		return p.location.String()
	}
	return fmt.Sprintf("%s (%s)", p.name, p.location)
}

// place finds the repository that name means: one of the configuration, an
// address, or, if it is empty, the only one.
func (a *app) place(cfg *policy.Config, name string) (place, error) {
	var p place
	n, r, err := cfg.Repository(name)
	switch {
	case err == nil:
		p = place{string(n), r.URL, r.Secret()}
	case strings.ContainsAny(name, "/:") || name == "." || name == "..":
		address := name
		if !filepath.IsAbs(name) && !strings.Contains(name, ":") {
			if address, err = filepath.Abs(name); err != nil {
				return p, fmt.Errorf("repository %s: %w", name, err)
			}
		}
		if p.location, err = policy.ParseLocation(address); err != nil {
			return p, &usageError{fmt.Errorf("--repo: %w", err)}
		}
		for n, r := range cfg.Repositories {
			if r.URL.Path() == p.location.Path() {
				p.name, p.secret = string(n), r.Secret()
			}
		}
	default:
		return p, err
	}
	if a.passwordFile != "" {
		file, err := filepath.Abs(a.passwordFile)
		if err != nil {
			return p, fmt.Errorf("password file %s: %w", a.passwordFile, err)
		}
		p.secret = policy.SecretFile(file)
	}
	if p.secret.IsZero() {
		return p, usagef("no password is known for the repository %s; give --password-file", p.location)
	}
	return p, nil
}

// password returns the repository's password. A missing one is a mistake in
// the configuration.
func (p place) password(ctx context.Context) (string, error) {
	text, err := p.secret.Read(ctx)
	if err != nil {
		if ctx.Err() == nil {
			err = &usageError{err}
		}
		return "", fmt.Errorf("password of the repository %s: %w", p, err)
	}
	defer clear(text)
	return string(text), nil
}

// store opens the folder of a repository. It says apart that the folder holds
// no repository and that what the folder is on is missing.
func (p place) store(readOnly bool) (backend.Backend, error) {
	dir := p.location.Path()
	store, err := local.Open(dir, local.Options{ReadOnly: readOnly})
	if err == nil {
		return store, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, perr := os.Stat(filepath.Dir(dir)); errors.Is(perr, fs.ErrNotExist) {
			return nil, fmt.Errorf("repository %s: there is no folder %s: %w", p, filepath.Dir(dir), errAbsent)
		}
		return nil, fmt.Errorf("repository %s: %w", p, repo.ErrNoRepository)
	}
	return nil, err
}

// An access says how a verb uses a repository.
type access struct {
	readOnly bool // nothing is written but locks
	dryRun   bool // what is written goes nowhere
	brief    bool // no lock: a look that a change meanwhile does not harm
	locksToo bool // no lock: fn takes or removes locks itself
	alone    bool // an exclusive lock: nobody else uses the repository meanwhile
	index    bool // the index is loaded
	options  repo.Options
}

// A session is an open repository.
type session struct {
	place place
	repo  *repo.Repo
	// snapshots are all that can be read, oldest first; unread says what is
	// wrong with the others, or is nil.
	snapshots []*backup.Snapshot
	unread    error
}

// withConfigured is withRepository for the repository that --repo names, or the
// only one of the configuration.
func (a *app) withConfigured(ctx context.Context, acc access, fn func(ctx context.Context, s *session) error) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	p, err := a.place(cfg, a.repoName)
	if err != nil {
		return err
	}
	return a.withRepository(ctx, p, acc, fn)
}

// withRepository opens a repository, locks it, lists its snapshots and runs fn.
func (a *app) withRepository(ctx context.Context, p place, acc access, fn func(ctx context.Context, s *session) error) (err error) {
	be, err := p.store(acc.readOnly && acc.brief)
	if err != nil {
		return err
	}
	if acc.dryRun {
		be = backend.Discard(be)
	}
	if err := present(ctx, be, p); err != nil {
		return errors.Join(err, be.Close())
	}
	password, err := p.password(ctx)
	if err != nil {
		return errors.Join(err, be.Close())
	}
	r, err := repo.Open(ctx, be, password, a.options(acc))
	if err != nil {
		return errors.Join(fmt.Errorf("repository %s: %w", p, err), be.Close())
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if acc.locksToo {
		return fn(ctx, &session{place: p, repo: r})
	}
	work := func(ctx context.Context) error {
		s := &session{place: p, repo: r}
		s.snapshots, s.unread = r.Snapshots(ctx)
		if err := ctx.Err(); err != nil {
			return err
		}
		if s.unread != nil {
			a.warn("some snapshots can't be read: %v", s.unread)
		}
		if acc.index {
			if err := r.LoadIndex(ctx); err != nil {
				return fmt.Errorf("repository %s: %w", p, err)
			}
		}
		return fn(ctx, s)
	}
	if acc.brief {
		return work(ctx)
	}
	return r.WithLock(ctx, acc.alone, work)
}

// options says how a repository is opened. Where there is no place for a
// journal of our locks, their clocks decide which are stale.
func (a *app) options(acc access) repo.Options {
	opt := acc.options
	opt.LockWait = a.wait
	if acc.brief {
		return opt
	}
	if dir, err := a.state(); err == nil {
		opt.Journal = filepath.Join(dir, "locks")
	}
	said := false
	opt.LockWaiting = func(held error) {
		if !said {
			a.warn("waiting up to %s: %v", a.wait, held)
		}
		said = true
	}
	return opt
}

// present returns an error unless be holds a repository: before the password
// is asked for, so that nobody looks for the password of nothing.
func present(ctx context.Context, be backend.Backend, p place) error {
	_, err := be.Get(ctx, backend.ConfigKey, 0, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("repository %s: %w", p, repo.ErrNoRepository)
	}
	return nil // other faults are met, and told better, by opening it
}

// state returns the folder for what is remembered between runs, and makes it.
func (a *app) state() (string, error) {
	dir := a.stateDir
	if dir == "" {
		dir, _ = a.env("IDE49_BACKUP_STATE")
	}
	if dir == "" {
		dir = defaultState
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the state folder: %w; choose another with --state", err)
	}
	return dir, nil
}

// device returns this device's name in snapshots.
func (a *app) device(cfg *policy.Config) (string, error) {
	if cfg.Device != "" {
		return string(cfg.Device), nil
	}
	dir, err := a.state()
	if err != nil {
		return "", err
	}
	name, problems, err := cfg.DeviceName(dir)
	a.problems(problems)
	return string(name), err
}
