// Package faulty wraps a store and makes it fail as real ones do: with errors,
// with damaged bytes, and by a crash in the middle of a series of writes. It
// is for tests.
package faulty

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"

	"github.com/iot49/ide49-backup/backup/backend"
)

// ErrCrashed is what every operation returns after a simulated crash.
var ErrCrashed = errors.New("simulated crash")

// An Op is a method of a Backend.
type Op string

// The operations that a hook sees.
const (
	Put    Op = "put"
	Get    Op = "get"
	List   Op = "list"
	Delete Op = "delete"
)

// A Call is one operation, before it happens.
type Call struct {
	Op  Op
	Key backend.Key // for List only the kind is set
	N   int         // how many calls there were of this Op, with this one
}

// A Fault says how a call goes wrong. The zero Fault lets it pass.
type Fault struct {
	Err     error               // returned instead of the result
	Applied bool                // the call is carried out although it returns Err
	Damage  func([]byte) []byte // changes what a Get returns
}

// A Store passes calls on to another Backend unless its hook says otherwise.
type Store struct {
	inner backend.Backend
	hook  func(Call) Fault

	mu      sync.Mutex
	count   map[Op]int
	crashed bool
}

// New wraps inner. The hook is called for every operation, one call at a time.
func New(inner backend.Backend, hook func(Call) Fault) *Store {
	return &Store{inner: inner, hook: hook, count: map[Op]int{}}
}

// CrashAt wraps inner so that the n-th Put or Delete, counted together from 1,
// is the last: it is carried out if applied is set, and it and all later calls
// return ErrCrashed.
func CrashAt(inner backend.Backend, n int, applied bool) *Store {
	changes := 0
	return New(inner, func(c Call) Fault {
		if c.Op != Put && c.Op != Delete {
			return Fault{}
		}
		if changes++; changes != n {
			return Fault{}
		}
		return Fault{Err: ErrCrashed, Applied: applied}
	})
}

// Crashed reports whether a simulated crash has happened.
func (s *Store) Crashed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.crashed
}

func (s *Store) fault(op Op, k backend.Key) Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.crashed {
		return Fault{Err: ErrCrashed}
	}
	s.count[op]++
	f := s.hook(Call{op, k, s.count[op]})
	s.crashed = errors.Is(f.Err, ErrCrashed)
	return f
}

// change runs a Put or Delete under a fault.
func (s *Store) change(op Op, k backend.Key, do func() error) error {
	f := s.fault(op, k)
	if f.Err == nil {
		return do()
	}
	if f.Applied {
		if err := do(); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s %s: %w", op, k, f.Err)
}

// Put implements backend.Backend.
func (s *Store) Put(ctx context.Context, k backend.Key, data []byte) error {
	return s.change(Put, k, func() error { return s.inner.Put(ctx, k, data) })
}

// Delete implements backend.Backend.
func (s *Store) Delete(ctx context.Context, k backend.Key) error {
	return s.change(Delete, k, func() error { return s.inner.Delete(ctx, k) })
}

// Get implements backend.Backend.
func (s *Store) Get(ctx context.Context, k backend.Key, off, n int64) ([]byte, error) {
	f := s.fault(Get, k)
	if f.Err != nil {
		return nil, fmt.Errorf("%s %s: %w", Get, k, f.Err)
	}
	data, err := s.inner.Get(ctx, k, off, n)
	if err == nil && f.Damage != nil {
		data = f.Damage(data)
	}
	return data, err
}

// List implements backend.Backend.
func (s *Store) List(ctx context.Context, kind backend.Kind) iter.Seq2[backend.Info, error] {
	return func(yield func(backend.Info, error) bool) {
		if f := s.fault(List, backend.Key{Kind: kind}); f.Err != nil {
			yield(backend.Info{}, fmt.Errorf("%s %s: %w", List, kind, f.Err))
			return
		}
		s.inner.List(ctx, kind)(yield)
	}
}

// Close implements backend.Backend.
func (s *Store) Close() error { return s.inner.Close() }
