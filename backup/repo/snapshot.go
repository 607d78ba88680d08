package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

// ErrNoSnapshot says that no snapshot has an ID, and ErrAmbiguous that more
// than one begins with it.
var (
	ErrNoSnapshot = errors.New("there is no such snapshot; `ide49-backup snapshots` lists them")
	ErrAmbiguous  = errors.New("more than one snapshot begins so; give more digits")
)

// DecodeSnapshot parses and checks the plaintext of a snapshot file.
func DecodeSnapshot(id backup.ID, plain []byte) (*backup.Snapshot, error) {
	s := &backup.Snapshot{}
	if err := json.Unmarshal(plain, s); err != nil {
		return nil, fmt.Errorf("snapshot %s: %w: %w", id.Short(), ErrDamaged, err)
	}
	if s.Tree == nil || s.Tree.IsZero() {
		return nil, fmt.Errorf("snapshot %s: %w: it names no tree", id.Short(), ErrDamaged)
	}
	s.ID = id
	return s, nil
}

// SaveSnapshot stores a snapshot: from then on it exists. All that it names
// must be durable, so call it after Update has returned. It returns the
// snapshot's ID.
func (r *Repo) SaveSnapshot(ctx context.Context, s *backup.Snapshot) (backup.ID, error) {
	if err := r.writable(); err != nil {
		return backup.ID{}, fmt.Errorf("save snapshot: %w", err)
	}
	plain, err := json.Marshal(s)
	if err != nil {
		return backup.ID{}, fmt.Errorf("save snapshot: %w", err)
	}
	id, err := r.SaveFile(ctx, backend.Snapshots, plain)
	if err != nil {
		return id, fmt.Errorf("save snapshot: %w", err)
	}
	return id, nil
}

// EachSnapshot calls fn, one call at a time, for every snapshot, or with what
// is wrong with one. The first error that fn returns ends it.
func (r *Repo) EachSnapshot(ctx context.Context, fn func(id backup.ID, s *backup.Snapshot, err error) error) error {
	return r.EachFile(ctx, backend.Snapshots, func(id backup.ID, plain []byte, err error) error {
		if err != nil {
			return fn(id, nil, err)
		}
		s, err := DecodeSnapshot(id, plain)
		return fn(id, s, err)
	})
}

// Snapshots returns all snapshots that can be read, oldest first, those of the
// same moment by ID. What is wrong with the others is in the joined error,
// which comes beside the snapshots.
func (r *Repo) Snapshots(ctx context.Context) ([]*backup.Snapshot, error) {
	var all []*backup.Snapshot
	var problems error
	err := r.EachSnapshot(ctx, func(_ backup.ID, s *backup.Snapshot, err error) error {
		if err != nil {
			problems = errors.Join(problems, err)
			return nil
		}
		all = append(all, s)
		return nil
	})
	slices.SortFunc(all, func(a, b *backup.Snapshot) int {
		return cmp.Or(a.Time.Compare(b.Time), slices.Compare(a.ID[:], b.ID[:]))
	})
	if err != nil {
		return all, fmt.Errorf("list snapshots: %w", err)
	}
	return all, problems
}

// RemoveSnapshot removes a snapshot, under at least a shared lock. What only
// it needed stays in the repository until it is pruned. One that is gone
// already is no error.
func (r *Repo) RemoveSnapshot(ctx context.Context, id backup.ID) error {
	if err := r.lockHeld(ctx); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id.Short(), err)
	}
	err := r.be.Delete(ctx, backend.Key{Kind: backend.Snapshots, ID: id})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove snapshot %s: %w", id.Short(), err)
	}
	return nil
}

// Retag puts a snapshot with other tags in place of s, under at least a shared
// lock, and returns the new one. As files are named by their contents it has
// another ID; Original keeps the first. The new one is stored before the old
// one goes: a crash in between leaves both, and doing it again, with all as
// the snapshots there are then, removes the old one.
func (r *Repo) Retag(ctx context.Context, all []*backup.Snapshot, s *backup.Snapshot, tags []string) (*backup.Snapshot, error) {
	next := *s
	next.Tags = slices.Clone(tags)
	if next.Original == nil {
		next.Original = &s.ID
	}
	// next but for its ID, which depends on a random number
	same := func(o *backup.Snapshot) bool {
		return o.ID != s.ID && o.Original != nil && *o.Original == *next.Original && o.Time.Equal(s.Time) && *o.Tree == *s.Tree && slices.Equal(o.Tags, tags)
	}
	if i := slices.IndexFunc(all, same); i >= 0 {
		next.ID = all[i].ID
	} else {
		id, err := r.SaveSnapshot(ctx, &next)
		if err != nil {
			return nil, fmt.Errorf("change tags of snapshot %s: %w", s.ID.Short(), err)
		}
		next.ID = id
	}
	if err := r.RemoveSnapshot(ctx, s.ID); err != nil {
		return &next, fmt.Errorf("change tags of snapshot %s: it is stored as %s, but the old one stays: %w", s.ID.Short(), next.ID.Short(), err)
	}
	return &next, nil
}

// Find returns the snapshot whose ID begins with prefix.
func Find(all []*backup.Snapshot, prefix string) (*backup.Snapshot, error) {
	var found *backup.Snapshot
	for _, s := range all {
		if prefix == "" || !strings.HasPrefix(s.ID.String(), prefix) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("snapshot %q: %w", prefix, ErrAmbiguous)
		}
		found = s
	}
	if found == nil {
		return nil, fmt.Errorf("snapshot %q: %w", prefix, ErrNoSnapshot)
	}
	return found, nil
}
