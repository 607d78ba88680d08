package repo

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

// An IndexChange is what ChangeIndex does to the index files. Packs in Add
// and Drop are not the same ones, except to replace what is said of a pack.
type IndexChange struct {
	Drop   []backup.ID // packs that no index shall name any more
	Add    []IndexPack // packs to name; they are durable
	Remove []backup.ID // index files to remove unread, because they can't be
}

// ChangeIndex rewrites the index files that a change concerns, and merges
// small ones on the way. New files are durable before the old ones go, so that
// whatever was in the index and is not dropped is in it at any moment; an
// interrupted change leaves some packs named twice, which is harmless, and can
// be made again. It takes the memory of two index files.
//
// The index in memory stays as it is. The caller holds an exclusive lock.
func (r *Repo) ChangeIndex(ctx context.Context, c IndexChange) error {
	if err := r.changeIndex(ctx, c); err != nil {
		return fmt.Errorf("rewrite index: %w", err)
	}
	return nil
}

func (r *Repo) changeIndex(ctx context.Context, c IndexChange) error {
	if err := r.writable(); err != nil {
		return err
	}
	drop := make(map[backup.ID]bool, len(c.Drop)+len(c.Add))
	for _, id := range c.Drop {
		drop[id] = true
	}
	remove := make(map[backup.ID]bool, len(c.Remove))
	for _, id := range c.Remove {
		remove[id] = true
	}
	// All names first: files that are written below must not be met again.
	var files []backup.ID
	for info, err := range r.be.List(ctx, backend.Indexes) {
		if err != nil {
			return err
		}
		if !remove[info.Key.ID] {
			files = append(files, info.Key.ID)
		}
	}
	slices.SortFunc(files, func(a, b backup.ID) int { return slices.Compare(a[:], b[:]) })

	w := &indexRewrite{r: r, seed: maphash.MakeSeed(), written: map[backup.ID]uint64{}}
	for _, p := range c.Add {
		if err := w.add(ctx, p); err != nil {
			return err
		}
		drop[p.ID] = true // what the old files say of it
		w.changed = true
	}
	for _, id := range files {
		plain, err := r.LoadFile(ctx, backend.Indexes, id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var f *IndexFile
		if err == nil {
			f, err = DecodeIndex(plain)
		}
		if err != nil {
			return fmt.Errorf("index %s: %w", id.Short(), err)
		}
		blobs := 0
		for _, p := range f.Packs {
			blobs += len(p.Blobs)
		}
		hit := slices.ContainsFunc(f.Packs, func(p IndexPack) bool { return drop[p.ID] })
		if !hit && blobs >= maxIndexBlobs/2 {
			continue
		}
		w.changed = w.changed || hit || len(w.old) > 0
		for _, p := range f.Packs {
			if drop[p.ID] {
				continue
			}
			if err := w.add(ctx, p); err != nil {
				return err
			}
		}
		w.old = append(w.old, id)
	}
	if w.changed {
		if err := w.flush(ctx); err != nil {
			return err
		}
	}
	return r.deleteAll(ctx, backend.Indexes, c.Remove, nil)
}

// PreviewIndex loads the index as it would be after a change, without making
// the change. Index files that can't be read count as removed. The blobs of a
// pack in Add may be fewer than it has.
func (r *Repo) PreviewIndex(ctx context.Context, c IndexChange) error {
	drop := make(map[backup.ID]bool, len(c.Drop)+len(c.Add))
	for _, id := range c.Drop {
		drop[id] = true
	}
	idx := NewIndex()
	for _, p := range c.Add {
		drop[p.ID] = true
		idx.add(p.ID, p.Blobs)
	}
	err := r.eachIndex(ctx, func(id backup.ID, f *IndexFile, err error) error {
		if err != nil {
			if r.Alive(ctx) != nil {
				return err
			}
			return nil
		}
		f.Packs = slices.DeleteFunc(f.Packs, func(p IndexPack) bool { return drop[p.ID] })
		idx.addFile(id, f)
		return nil
	})
	if err != nil {
		return fmt.Errorf("load index: %w", err)
	}
	r.index.Store(idx)
	return nil
}

// An indexRewrite fills new index files and deletes old ones when all that
// they said is durable in new ones.
type indexRewrite struct {
	r       *Repo
	file    IndexFile
	blobs   int
	old     []backup.ID
	changed bool
	// written holds the packs in new files, with a hash of their blobs: what
	// two old files agree on is written once.
	seed    maphash.Seed
	written map[backup.ID]uint64
}

func (w *indexRewrite) add(ctx context.Context, p IndexPack) error {
	var h maphash.Hash
	h.SetSeed(w.seed)
	for _, b := range p.Blobs {
		maphash.WriteComparable(&h, b)
	}
	if sum, ok := w.written[p.ID]; ok && sum == h.Sum64() {
		return nil
	}
	w.written[p.ID] = h.Sum64()
	if w.blobs > 0 && w.blobs+len(p.Blobs) > maxIndexBlobs {
		if err := w.flush(ctx); err != nil {
			return err
		}
		w.changed = true
	}
	w.file.Packs = append(w.file.Packs, p)
	w.blobs += len(p.Blobs)
	return nil
}

func (w *indexRewrite) flush(ctx context.Context) error {
	var name backup.ID
	if len(w.file.Packs) > 0 {
		var err error
		if name, err = w.r.SaveFile(ctx, backend.Indexes, w.file.Encode()); err != nil {
			return err
		}
	}
	old := slices.DeleteFunc(w.old, func(id backup.ID) bool { return id == name })
	w.file, w.blobs, w.old = IndexFile{}, 0, nil
	return w.r.deleteAll(ctx, backend.Indexes, old, nil)
}

// deleteAll deletes objects, several at once; those that are gone already are
// no error. It stops with ErrLockLost once the lock that ctx stands for has
// grown too old. done, if not nil, is called for each, from several goroutines.
func (r *Repo) deleteAll(ctx context.Context, kind backend.Kind, ids []backup.ID, done func(backup.ID)) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, id := range ids {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := r.lockHeld(gctx); err != nil {
				return err
			}
			if err := r.be.Delete(gctx, backend.Key{Kind: kind, ID: id}); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if done != nil {
				done(id)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// RemovePacks deletes packs. No index may name them any more: see ChangeIndex.
func (r *Repo) RemovePacks(ctx context.Context, packs []backup.ID) error {
	if err := r.writable(); err != nil {
		return fmt.Errorf("remove packs: %w", err)
	}
	return r.deleteAll(ctx, backend.Packs, packs, nil)
}

// sortedIDs returns the keys of m in order.
func sortedIDs[V any](m map[backup.ID]V) []backup.ID {
	return slices.SortedFunc(maps.Keys(m), func(a, b backup.ID) int { return slices.Compare(a[:], b[:]) })
}
