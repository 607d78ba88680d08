package faulty_test

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/backendtest"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
)

func TestConformance(t *testing.T) {
	s := mem.New()
	backendtest.Run(t, func(*testing.T) backend.Backend {
		return faulty.New(s, func(faulty.Call) faulty.Fault { return faulty.Fault{} })
	})
}

func TestCrash(t *testing.T) {
	ctx := t.Context()
	key := func(i byte) backend.Key { return backend.Key{Kind: backend.Packs, ID: backup.Hash([]byte{i})} }
	for _, applied := range []bool{false, true} {
		inner := mem.New()
		s := faulty.CrashAt(inner, 2, applied)
		if err := s.Put(ctx, key(0), nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Put(ctx, key(1), nil); !errors.Is(err, faulty.ErrCrashed) || !s.Crashed() {
			t.Errorf("second put: %v", err)
		}
		if _, err := s.Get(ctx, key(0), 0, -1); !errors.Is(err, faulty.ErrCrashed) {
			t.Errorf("get after the crash: %v", err)
		}
		if _, err := inner.Get(ctx, key(1), 0, -1); applied != (err == nil) || !applied && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("applied %v, afterwards: %v", applied, err)
		}
	}
}
