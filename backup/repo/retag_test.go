package repo_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
)

// A crash at any change leaves the snapshot under its old tags, its new ones or
// both, and doing it again leaves it once under the new ones.
func TestRetagSurvivesACrash(t *testing.T) {
	ctx := t.Context()
	tree := backup.Hash([]byte("tree"))
	at := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	crashes := 0
	for n := 1; n <= 3; n++ {
		for _, applied := range []bool{false, true} {
			inner := mem.New()
			id, err := newRepo(t, inner, repo.Options{}).SaveSnapshot(ctx, &backup.Snapshot{Time: at, Tree: &tree, Paths: []string{"/v"}, Tags: []string{"a"}})
			if err != nil {
				t.Fatal(err)
			}
			pin := func(be backend.Backend) error {
				r := open(t, be, repo.Options{})
				all, err := r.Snapshots(ctx)
				if err != nil {
					return err
				}
				for _, s := range all {
					if !s.HasTag(backup.PinTag) {
						if _, err := r.Retag(ctx, all, s, append(slices.Clone(s.Tags), backup.PinTag)); err != nil {
							return err
						}
					}
				}
				return nil
			}
			be := faulty.CrashAt(inner, n, applied)
			err = pin(be)
			if be.Crashed() {
				crashes++
				if !errors.Is(err, faulty.ErrCrashed) {
					t.Errorf("crash at change %d: %v", n, err)
				}
			}
			after := open(t, inner, repo.Options{})
			if all, err := after.Snapshots(ctx); err != nil || len(all) == 0 {
				t.Errorf("crash at change %d, applied %v: %d snapshots, %v", n, applied, len(all), err)
			}
			if err := pin(inner); err != nil {
				t.Errorf("again: %v", err)
			}
			all, err := after.Snapshots(ctx)
			if err != nil || len(all) != 1 || !slices.Equal(all[0].Tags, []string{"a", backup.PinTag}) || *all[0].Original != id || !all[0].Time.Equal(at) {
				t.Errorf("crash at change %d, applied %v: %d snapshots afterwards, %v", n, applied, len(all), err)
			}
			// Removing the tag keeps where it came from; removing twice is fine.
			s, err := after.Retag(ctx, all, all[0], []string{"a"})
			if err != nil || *s.Original != id {
				t.Errorf("%v", err)
			}
			for range 2 {
				if err := after.RemoveSnapshot(ctx, s.ID); err != nil {
					t.Error(err)
				}
			}
			if n := count(t, inner, backend.Snapshots); n != 0 {
				t.Errorf("%d snapshots are left", n)
			}
		}
	}
	if crashes != 4 {
		t.Errorf("%d crashes", crashes)
	}
}
