// Package mem is a store in memory, for tests.
package mem

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/iot49/ide49-backup/backup/backend"
)

// A Store keeps objects in a map. It implements [backend.Backend].
type Store struct {
	mu      sync.Mutex
	objects map[backend.Key][]byte
}

// New returns an empty store.
func New() *Store { return &Store{objects: map[backend.Key][]byte{}} }

// Clone returns a store with the same objects, independent of s.
func (s *Store) Clone() *Store {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Store{objects: maps.Clone(s.objects)} // objects are never changed in place
}

// Put implements backend.Backend.
func (s *Store) Put(ctx context.Context, k backend.Key, data []byte) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("write %s: %w", k, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[k] = bytes.Clone(data)
	return nil
}

// Get implements backend.Backend.
func (s *Store) Get(ctx context.Context, k backend.Key, off, n int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", k, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	data, ok := s.objects[k]
	if !ok {
		return nil, fmt.Errorf("read %s: %w", k, fs.ErrNotExist)
	}
	size := int64(len(data))
	if n < 0 {
		n = max(size-off, 0)
	}
	if off > size || n > size-off {
		return nil, fmt.Errorf("read %s: %d bytes from %d of %d: %w", k, n, off, size, io.ErrUnexpectedEOF)
	}
	return append([]byte{}, data[off:off+n]...), nil
}

// List implements backend.Backend.
func (s *Store) List(ctx context.Context, kind backend.Kind) iter.Seq2[backend.Info, error] {
	return func(yield func(backend.Info, error) bool) {
		s.mu.Lock()
		keys := slices.Collect(maps.Keys(s.objects))
		s.mu.Unlock()
		for _, k := range keys {
			if err := ctx.Err(); err != nil {
				yield(backend.Info{}, fmt.Errorf("list %s: %w", kind, err))
				return
			}
			if k.Kind != kind {
				continue
			}
			s.mu.Lock()
			data, ok := s.objects[k]
			s.mu.Unlock()
			if ok && !yield(backend.Info{Key: k, Size: int64(len(data))}, nil) {
				return
			}
		}
	}
}

// Delete implements backend.Backend.
func (s *Store) Delete(ctx context.Context, k backend.Key) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("delete %s: %w", k, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[k]; !ok {
		return fmt.Errorf("delete %s: %w", k, fs.ErrNotExist)
	}
	delete(s.objects, k)
	return nil
}

// Close implements backend.Backend. The objects stay.
func (s *Store) Close() error { return nil }
