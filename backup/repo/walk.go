package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
)

// A BlobSet is a set of the blobs that were in an Index when it was made. It
// takes a bit a blob; all copies of a blob are one. Its methods may be called
// concurrently.
type BlobSet struct {
	x    *Index
	bits []uint64 // by the blobs' numbers
}

// NewSet returns an empty set.
func (x *Index) NewSet() *BlobSet { return &BlobSet{x, make([]uint64, (x.Len()+63)/64)} }

// Add adds a blob. known is false for a blob that the index does not have,
// which is not added; added is false for one that was in the set already.
func (s *BlobSet) Add(b backup.Blob) (added, known bool) {
	i, ok := s.x.Number(b)
	if !ok {
		return false, false
	}
	return s.set(i), true
}

// Has reports whether a blob is in the set.
func (s *BlobSet) Has(b backup.Blob) bool {
	i, ok := s.x.Number(b)
	return ok && s.get(i)
}

func (s *BlobSet) set(i uint32) bool {
	if int(i/64) >= len(s.bits) {
		return false
	}
	return atomic.OrUint64(&s.bits[i/64], 1<<(i%64))&(1<<(i%64)) == 0
}

func (s *BlobSet) get(i uint32) bool {
	return int(i/64) < len(s.bits) && atomic.LoadUint64(&s.bits[i/64])&(1<<(i%64)) != 0
}

// walkUnit is how many trees a worker of Walk takes at once.
const walkUnit = 64

// Walk reads every tree that can be reached from roots, each once, and calls
// fn with it or with what is wrong with it: an error that matches ErrNoBlob,
// ErrDamaged or backup.ErrMalformed, or one of the store. fn is called from
// several goroutines at once. Its first error ends the walk and is returned.
//
// Trees come level by level and within one in the order in which they are
// stored, so that they are read in few large pieces. Walk takes four bytes for
// each tree of a level and a bit for each blob.
func (r *Repo) Walk(ctx context.Context, roots []backup.ID, fn func(id backup.ID, t *backup.Tree, err error) error) error {
	w := &walk{r: r, x: r.Index(), fn: fn, missing: map[backup.ID]bool{}}
	w.seen = w.x.NewSet()
	for _, id := range roots {
		if err := w.reach(&w.next, id); err != nil {
			return err
		}
	}
	for len(w.next) > 0 {
		level := w.next
		w.next = nil
		slices.Sort(level)
		if err := w.level(ctx, level); err != nil {
			return err
		}
	}
	return nil
}

type walk struct {
	r    *Repo
	x    *Index
	fn   func(id backup.ID, t *backup.Tree, err error) error
	seen *BlobSet

	mu      sync.Mutex
	next    []uint32 // trees of the next level
	missing map[backup.ID]bool
}

// reach notes a tree for the next level unless it was met before.
func (w *walk) reach(next *[]uint32, id backup.ID) error {
	if i, ok := w.x.Number(backup.Blob{Kind: backup.TreeBlob, ID: id}); ok {
		if w.seen.set(i) {
			*next = append(*next, i)
		}
		return nil
	}
	w.mu.Lock()
	known := w.missing[id]
	w.missing[id] = true
	w.mu.Unlock()
	if known {
		return nil
	}
	return w.fn(id, nil, fmt.Errorf("tree %s: %w", id.Short(), ErrNoBlob))
}

// level visits trees, which are sorted.
func (w *walk) level(ctx context.Context, trees []uint32) error {
	g, ctx := errgroup.WithContext(ctx)
	var at atomic.Int64
	for range max(2, workers()) {
		g.Go(func() error {
			var next []uint32
			var blobs []PackedBlob
			defer func() {
				w.mu.Lock()
				w.next = append(w.next, next...)
				w.mu.Unlock()
			}()
			for {
				end := int(at.Add(walkUnit))
				if end-walkUnit >= len(trees) {
					return nil
				}
				unit := trees[end-walkUnit : min(end, len(trees))]
				for len(unit) > 0 {
					var pack backup.ID
					var n int
					pack, blobs, n = w.x.samePack(blobs[:0], unit)
					unit = unit[n:]
					err := w.r.ReadBlobs(ctx, pack, blobs, func(b PackedBlob, plain []byte, err error) error {
						return w.visit(ctx, &next, b.ID, plain, err)
					})
					if err != nil {
						return err
					}
				}
			}
		})
	}
	return g.Wait()
}

func (w *walk) visit(ctx context.Context, next *[]uint32, id backup.ID, plain []byte, err error) error {
	if err != nil {
		// There may be an intact copy elsewhere.
		plain, err = w.r.Blob(ctx, backup.TreeBlob, id)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var t *backup.Tree
	if err == nil {
		if t, err = backup.DecodeTree(plain); err != nil {
			err = fmt.Errorf("tree %s: %w", id.Short(), err)
		}
	}
	if err != nil {
		return w.fn(id, nil, err)
	}
	if err := w.fn(id, t, nil); err != nil {
		return err
	}
	for i := range t.Nodes {
		if n := &t.Nodes[i]; n.Type == backup.Dir {
			if err := w.reach(next, n.Subtree); err != nil {
				return err
			}
		}
	}
	return nil
}

// samePack returns, sorted by offset, the entries with which numbers, which
// are sorted and not empty, begins and that are in one pack, and their count.
func (x *Index) samePack(dst []PackedBlob, numbers []uint32) (backup.ID, []PackedBlob, int) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	run := x.runOf(numbers[0])
	n := 0
	for n < len(numbers) && numbers[n]-run.first < run.n {
		dst = append(dst, x.entry(numbers[n]).blob())
		n++
	}
	slices.SortFunc(dst, func(a, b PackedBlob) int { return cmp.Compare(a.Offset, b.Offset) })
	return run.pack, dst, n
}

// Used returns the blobs that snapshots need, trees and data. It fails with
// ErrDamaged or ErrNoBlob if any of them can't be known or is not in the index.
func (r *Repo) Used(ctx context.Context, snapshots []*backup.Snapshot) (*BlobSet, error) {
	used := r.Index().NewSet()
	roots := make([]backup.ID, len(snapshots))
	for i, s := range snapshots {
		roots[i] = *s.Tree
	}
	err := r.Walk(ctx, roots, func(id backup.ID, t *backup.Tree, err error) error {
		if err != nil {
			if errors.Is(err, backup.ErrMalformed) {
				err = fmt.Errorf("%w: %w", err, ErrDamaged)
			}
			return err
		}
		used.Add(backup.Blob{Kind: backup.TreeBlob, ID: id})
		for i := range t.Nodes {
			for _, c := range t.Nodes[i].Content {
				b := backup.Blob{Kind: backup.DataBlob, ID: c}
				if _, known := used.Add(b); !known {
					return fmt.Errorf("%s of the file %.100q: %w", b, t.Nodes[i].Name, ErrNoBlob)
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find what snapshots use: %w", err)
	}
	return used, nil
}
