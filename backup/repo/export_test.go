package repo

import (
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/restic/chunker"
)

// InitVersion makes a repository that says it has the given version.
func InitVersion(ctx context.Context, be backend.Backend, password string, kdf crypt.Params, version uint) (*Repo, error) {
	return initWith(ctx, be, password, kdf, Options{}, Config{Version: version, ID: backup.Hash(nil).String(), Polynomial: 0x3DA3358B4DC173})
}

// AddPack makes blobs of a pack known to an index.
func AddPack(x *Index, pack backup.ID, blobs []PackedBlob) { x.add(pack, blobs) }

// Hostname returns the name that locks made here carry.
func Hostname(t *testing.T) string {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func FuzzDecodeKeyFile(f *testing.F) {
	f.Add([]byte(`{"created":"2026-11-22T03:00:00Z","username":"root","hostname":"pi","kdf":"scrypt","N":32768,"r":8,"p":1,"salt":"AAAA","data":"AAAA"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if k, err := decodeKeyFile(data); err == nil {
			if p := k.params(); p.N*p.R > 1<<23 {
				t.Errorf("accepted parameters %+v", p)
			}
		}
	})
}

func FuzzDecodeConfig(f *testing.F) {
	f.Add([]byte(`{"version":2,"id":"` + backup.Hash(nil).String() + `","chunker_polynomial":"3da3358b4dc173"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := decodeConfig(data); err == nil && c.Polynomial.Deg() != chunker.Pol(0x3DA3358B4DC173).Deg() {
			t.Errorf("accepted %+v", c)
		}
	})
}

// SetBoottime replaces the clock that goes on while the machine sleeps.
func (r *Repo) SetBoottime(clock func() time.Duration) {
	r.boottime = clock
	if r.journal != nil {
		r.journal.boottime = clock
	}
}

// PutLock stores a lock as another program would.
func (r *Repo) PutLock(ctx context.Context, l Lock) error {
	plain, err := json.Marshal(l)
	if err != nil {
		return err
	}
	_, err = r.SaveFile(ctx, backend.Locks, plain)
	return err
}
