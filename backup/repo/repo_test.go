package repo_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

// cheap makes keys that cost nothing to open.
var cheap = crypt.Params{N: 2, R: 1, P: 1}

func newRepo(t testing.TB, be backend.Backend, opt repo.Options) *repo.Repo {
	t.Helper()
	r, err := repo.Init(t.Context(), be, "pw", cheap, opt)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func reopen(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// payload returns n bytes; even seeds compress well, odd ones do not.
func payload(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
		if seed%2 == 0 {
			b[i] &= 3
		}
	}
	return b
}

func save(t testing.TB, r *repo.Repo, blobs ...[]byte) []backup.ID {
	t.Helper()
	var ids []backup.ID
	err := r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		for _, b := range blobs {
			s, err := w.Save(ctx, backup.DataBlob, b)
			if err != nil {
				return err
			}
			ids = append(ids, s.ID)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func TestRoundTrip(t *testing.T) {
	for _, level := range []repo.Compression{repo.Auto, repo.Off, repo.Fastest, repo.Better, repo.Max} {
		t.Run(level.String(), func(t *testing.T) {
			be := mem.New()
			r := newRepo(t, be, repo.Options{Compression: level})
			blobs := [][]byte{{}, []byte("x"), payload(1, 100), payload(2, 100), payload(3, 3<<20), payload(4, 3<<20), make([]byte, 8<<20)}
			ids := save(t, r, blobs...)
			for _, r := range []*repo.Repo{r, reopen(t, be)} {
				for i, id := range ids {
					got, err := r.Blob(t.Context(), backup.DataBlob, id)
					if err != nil || !bytes.Equal(got, blobs[i]) {
						t.Errorf("blob %d: %d bytes, %v", i, len(got), err)
					}
					if n, ok := r.Index().PlainLength(backup.Blob{ID: id}); !ok || int(n) != len(blobs[i]) {
						t.Errorf("blob %d: length %d, %v", i, n, ok)
					}
					if _, err := r.Blob(t.Context(), backup.TreeBlob, id); !errors.Is(err, repo.ErrNoBlob) {
						t.Errorf("data blob as a tree: %v", err)
					}
				}
			}
		})
	}
}

// Blobs larger than a pack come between small ones without harming them.
func TestBlobsLargerThanPacks(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be, repo.Options{PackSize: repo.MinPackSize, Compression: repo.Off})
	var blobs [][]byte
	for i := range 12 {
		blobs = append(blobs, payload(uint64(100+i), 1000), payload(uint64(200+i), 4<<20+i*400_000), payload(uint64(300+i), 700_000))
	}
	ids := save(t, r, blobs...)
	for i, id := range ids {
		if got, err := reopen(t, be).Blob(t.Context(), backup.DataBlob, id); err != nil || !bytes.Equal(got, blobs[i]) {
			t.Errorf("blob %d of %d bytes: %v", i, len(blobs[i]), err)
		}
	}
}

func TestDeduplication(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be, repo.Options{})
	var stored atomic.Int64
	err := r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range 50 {
					s, err := w.Save(ctx, backup.DataBlob, payload(uint64(i), 1000))
					if err != nil {
						t.Error(err)
					}
					if !s.Known {
						stored.Add(1)
					}
				}
			})
		}
		wg.Wait()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if stored.Load() != 50 || r.Index().Len() != 50 {
		t.Errorf("%d of 50 blobs stored, %d in the index", stored.Load(), r.Index().Len())
	}
	if reopen(t, be).Index().Len() != 50 {
		t.Error("the index on disk differs")
	}
	before := count(t, be, backend.Packs)
	save(t, reopen(t, be), payload(7, 1000))
	if n := count(t, be, backend.Packs); n != before {
		t.Errorf("%d packs, before %d", n, before)
	}
}

func count(t testing.TB, be backend.Backend, kind backend.Kind) (n int) {
	t.Helper()
	for _, err := range be.List(t.Context(), kind) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}

// Packs must describe themselves, and exactly as the index does.
func TestHeadersEqualIndex(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be, repo.Options{PackSize: repo.MinPackSize})
	var blobs [][]byte
	for i := range 2000 {
		blobs = append(blobs, payload(uint64(i), 10+i*5))
	}
	save(t, r, blobs...)
	err := r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		_, err := w.SaveTree(ctx, &backup.Tree{Nodes: []backup.Node{{Name: "a", Type: backup.FIFO}}})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[backup.ID]int64{}
	for info, err := range be.List(t.Context(), backend.Packs) {
		if err != nil {
			t.Fatal(err)
		}
		sizes[info.Key.ID] = info.Size
	}
	packs := 0
	for pack, want := range r.Index().Packs() {
		packs++
		got, err := r.ReadHeader(t.Context(), pack, sizes[pack])
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("pack %s: %d blobs in its header (%v), %d in the index", pack.Short(), len(got), err, len(want))
		}
		n := 0
		err = r.ReadBlobs(t.Context(), pack, want, func(b repo.PackedBlob, plain []byte, err error) error {
			n++
			if err == nil && backup.Hash(plain) != b.ID {
				err = errors.New("another hash")
			}
			return err
		})
		if err != nil || n != len(want) {
			t.Errorf("pack %s: %d of %d blobs read: %v", pack.Short(), n, len(want), err)
		}
		for _, b := range want[1:] {
			if b.Kind != want[0].Kind {
				t.Errorf("pack %s holds trees and data", pack.Short())
			}
		}
	}
	if packs != len(sizes) || packs < 3 {
		t.Errorf("%d packs in the index, %d in the store", packs, len(sizes))
	}
}

func TestInitAndOpenErrors(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	if _, err := repo.Open(ctx, be, "pw", repo.Options{}); !errors.Is(err, repo.ErrNoRepository) {
		t.Errorf("empty store: %v", err)
	}
	newRepo(t, be, repo.Options{})
	if _, err := repo.Init(ctx, be, "pw", cheap, repo.Options{}); !errors.Is(err, repo.ErrExists) {
		t.Errorf("second Init: %v", err)
	}
	if _, err := repo.Open(ctx, be, "wrong", repo.Options{}); !errors.Is(err, repo.ErrPassword) || strings.Contains(err.Error(), "wrong)") {
		t.Errorf("wrong password: %v", err)
	}
	keyed := be.Clone()
	if err := keyed.Delete(ctx, backend.ConfigKey); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Init(ctx, keyed, "pw", cheap, repo.Options{}); !errors.Is(err, repo.ErrDamaged) {
		t.Errorf("Init over a repository that lost its config: %v", err)
	}
}

func TestInitLeavesNothingOfAFailure(t *testing.T) {
	inner := mem.New()
	boom := errors.New("boom")
	be := faulty.New(inner, func(c faulty.Call) faulty.Fault {
		if c.Op == faulty.Put && c.Key == backend.ConfigKey {
			return faulty.Fault{Err: boom}
		}
		return faulty.Fault{}
	})
	if _, err := repo.Init(t.Context(), be, "pw", cheap, repo.Options{}); !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	newRepo(t, inner, repo.Options{})
}

// Every flipped, cut or swapped object is noticed, and never read as valid.
func TestDamageIsNoticed(t *testing.T) {
	ctx := t.Context()
	pristine := mem.New()
	r := newRepo(t, pristine, repo.Options{})
	data := payload(1, 5000)
	id := save(t, r, data, payload(2, 9000))[0]
	tree := backup.Hash(nil)
	sn := &backup.Snapshot{Time: time.Now(), Tree: &tree, Paths: []string{"/x"}}
	if _, err := r.SaveSnapshot(ctx, sn); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(3, 3))
	for kind := backend.Configs; kind <= backend.Packs; kind++ {
		for info, err := range pristine.List(ctx, kind) {
			if err != nil {
				t.Fatal(err)
			}
			for range 30 {
				be := pristine.Clone()
				good, err := be.Get(ctx, info.Key, 0, -1)
				if err != nil {
					t.Fatal(err)
				}
				bad := bytes.Clone(good)
				if rng.IntN(4) == 0 {
					bad = bad[:rng.IntN(len(bad))]
				} else {
					bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
				}
				if err := be.Put(ctx, info.Key, bad); err != nil {
					t.Fatal(err)
				}
				err = readAll(ctx, be, id, data)
				if err == nil && kind != backend.Packs {
					t.Errorf("%s with %d of %d bytes: nothing noticed", info.Key, len(bad), len(good))
				}
				if err != nil && strings.Contains(err.Error(), "\n") {
					t.Errorf("more than one line: %v", err)
				}
			}
		}
	}
}

// readAll opens a repository and reads everything; what it reads as valid must
// be so.
func readAll(ctx context.Context, be backend.Backend, id backup.ID, want []byte) error {
	r, err := repo.Open(ctx, be, "pw", repo.Options{})
	if err != nil {
		return err
	}
	if _, err := r.Snapshots(ctx); err != nil {
		return err
	}
	if err := r.LoadIndex(ctx); err != nil {
		return err
	}
	got, err := r.Blob(ctx, backup.DataBlob, id)
	if err == nil && !bytes.Equal(got, want) {
		panic("damaged bytes were given out")
	}
	return err
}

func TestAnIntactCopyIsEnough(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	a, b := newRepo(t, be, repo.Options{}), reopen(t, be)
	data := payload(1, 5000)
	id := save(t, a, data)[0]
	save(t, b, payload(3, 100), data) // b has not seen what a wrote
	r := reopen(t, be)
	locs := slices.Collect(r.Index().Lookup(backup.Blob{ID: id}))
	if len(locs) != 2 {
		t.Fatalf("%d copies", len(locs))
	}
	for _, loc := range locs {
		k := backend.Key{Kind: backend.Packs, ID: loc.Pack}
		good, err := be.Get(ctx, k, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		bad[loc.Offset+20] ^= 1
		if err := be.Put(ctx, k, bad); err != nil {
			t.Fatal(err)
		}
		if got, err := r.Blob(ctx, backup.DataBlob, id); err != nil || !bytes.Equal(got, data) {
			t.Errorf("with one copy damaged: %v", err)
		}
		if err := be.Put(ctx, k, good); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReadBlobsGivesWhatIsIntact(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	r := newRepo(t, be, repo.Options{Compression: repo.Off})
	var blobs [][]byte
	for i := range 40 {
		blobs = append(blobs, payload(uint64(2*i+1), 3000))
	}
	save(t, r, blobs...)
	total, bad := 0, 0
	for pack, list := range r.Index().Packs() {
		k := backend.Key{Kind: backend.Packs, ID: pack}
		data, err := be.Get(ctx, k, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		data[list[0].Offset+100] ^= 1
		if err := be.Put(ctx, k, data[:list[len(list)-1].Offset+10]); err != nil {
			t.Fatal(err)
		}
		err = r.ReadBlobs(ctx, pack, list, func(b repo.PackedBlob, plain []byte, err error) error {
			total++
			if err != nil {
				bad++
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if total != 40 || bad != 4 { // the first and last of two packs
		t.Errorf("%d blobs, %d of them bad", total, bad)
	}
}

func TestVersions(t *testing.T) {
	ctx := t.Context()
	for version, want := range map[uint]error{0: repo.ErrVersion, 3: repo.ErrVersion, 1: nil} {
		be := mem.New()
		r, err := repo.InitVersion(ctx, be, "pw", cheap, version)
		if err != nil {
			t.Fatal(err)
		}
		_ = r
		r, err = repo.Open(ctx, be, "pw", repo.Options{})
		if !errors.Is(err, want) {
			t.Errorf("version %d: %v, want %v", version, err, want)
		}
		if err != nil {
			continue
		}
		if err := r.Update(ctx, func(context.Context, *repo.Writer) error { return nil }); !errors.Is(err, repo.ErrVersion1) {
			t.Errorf("Update of version 1: %v", err)
		}
		tree := backup.Hash(nil)
		if _, err := r.SaveSnapshot(ctx, &backup.Snapshot{Tree: &tree}); !errors.Is(err, repo.ErrVersion1) {
			t.Errorf("SaveSnapshot to version 1: %v", err)
		}
	}
}

// A crash at any write of an Update leaves a repository that opens, whose
// index names only what is there.
func TestCrashAtEveryWrite(t *testing.T) {
	ctx := t.Context()
	for n := 1; ; n++ {
		for _, applied := range []bool{false, true} {
			inner := mem.New()
			newRepo(t, inner, repo.Options{})
			be := faulty.CrashAt(inner, n, applied)
			r, err := repo.Open(ctx, be, "pw", repo.Options{PackSize: repo.MinPackSize})
			if err != nil {
				t.Fatal(err)
			}
			var ids []backup.ID
			err = r.Update(ctx, func(ctx context.Context, w *repo.Writer) error {
				for i := range 12 {
					s, err := w.Save(ctx, backup.DataBlob, payload(uint64(2*i+1), 1<<20))
					if err != nil {
						return err
					}
					ids = append(ids, s.ID)
				}
				return nil
			})
			if !be.Crashed() {
				if err != nil {
					t.Fatal(err)
				}
				if n < 5 {
					t.Fatalf("only %d writes", n)
				}
				return
			}
			if !errors.Is(err, faulty.ErrCrashed) {
				t.Errorf("crash at write %d: Update returns %v", n, err)
			}
			after := reopen(t, inner)
			for pack, blobs := range after.Index().Packs() {
				err := after.ReadBlobs(ctx, pack, blobs, func(_ repo.PackedBlob, _ []byte, err error) error { return err })
				if err != nil {
					t.Errorf("crash at write %d, applied %v: %v", n, applied, err)
				}
			}
		}
	}
}

// An Update that is cancelled keeps what it has sent, so that the next need
// not send it again.
func TestCancelledUpdateKeepsItsPacks(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be, repo.Options{PackSize: repo.MinPackSize})
	ctx, cancel := context.WithCancel(t.Context())
	err := r.Update(ctx, func(ctx context.Context, w *repo.Writer) error {
		for i := range 20 {
			if _, err := w.Save(ctx, backup.DataBlob, payload(uint64(2*i+1), 1<<20)); err != nil {
				return err
			}
		}
		cancel()
		_, err := w.Save(ctx, backup.DataBlob, payload(1000, 10))
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if n := reopen(t, be).Index().Len(); n < 10 {
		t.Errorf("%d blobs are known afterwards", n)
	}
}

func TestIndexFilesAreSplit(t *testing.T) {
	be := mem.New()
	r := newRepo(t, be, repo.Options{PackSize: repo.MinPackSize, Compression: repo.Off})
	err := r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		for i := range 110_000 {
			if _, err := w.Save(ctx, backup.DataBlob, fmt.Appendf(nil, "%060d", i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := count(t, be, backend.Indexes); n < 2 || n > 4 {
		t.Errorf("%d index files for 110,000 blobs", n)
	}
	if n := reopen(t, be).Index().Len(); n != 110_000 {
		t.Errorf("%d blobs", n)
	}
}

func TestSnapshots(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	r := newRepo(t, be, repo.Options{})
	tree := backup.Hash([]byte("t"))
	base := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	for i := range 20 {
		s := &backup.Snapshot{Time: base.Add(time.Duration((i*7)%20) * time.Hour), Tree: &tree, Paths: []string{"/v"}, Hostname: "pi"}
		if _, err := r.SaveSnapshot(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	all, err := r.Snapshots(ctx)
	if err != nil || len(all) != 20 || !slices.IsSortedFunc(all, func(a, b *backup.Snapshot) int { return a.Time.Compare(b.Time) }) {
		t.Fatalf("%d snapshots, %v", len(all), err)
	}
	if s, err := repo.Find(all, all[3].ID.String()[:12]); err != nil || s != all[3] {
		t.Errorf("Find: %v, %v", s, err)
	}
	if _, err := repo.Find(all, ""); !errors.Is(err, repo.ErrNoSnapshot) {
		t.Errorf("Find nothing: %v", err)
	}
	twin := *all[0]
	twin.ID[31] ^= 1
	if _, err := repo.Find(append(all, &twin), all[0].ID.String()[:40]); !errors.Is(err, repo.ErrAmbiguous) {
		t.Errorf("Find of an ambiguous prefix: %v", err)
	}
	k := backend.Key{Kind: backend.Snapshots, ID: all[5].ID}
	if err := be.Put(ctx, k, []byte("rubbish")); err != nil {
		t.Fatal(err)
	}
	rest, err := r.Snapshots(ctx)
	if !errors.Is(err, repo.ErrDamaged) || len(rest) != 19 {
		t.Errorf("with one damaged: %d snapshots, %v", len(rest), err)
	}
}

func TestLocks(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	r := newRepo(t, be, repo.Options{})
	try := func(exclusive bool) error {
		return r.WithLock(ctx, exclusive, func(context.Context) error { return nil })
	}
	err := r.WithLock(ctx, false, func(context.Context) error {
		if err := try(false); err != nil {
			t.Errorf("shared beside shared: %v", err)
		}
		if err := try(true); !errors.Is(err, repo.ErrLocked) {
			t.Errorf("exclusive beside shared: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = r.WithLock(ctx, true, func(context.Context) error {
		for _, exclusive := range []bool{false, true} {
			if err := try(exclusive); !errors.Is(err, repo.ErrLocked) || strings.Contains(err.Error(), "\n") {
				t.Errorf("beside an exclusive one: %v", err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	if err := r.WithLock(ctx, true, func(context.Context) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("error of the function: %v", err)
	}
	if n := count(t, be, backend.Locks); n != 0 {
		t.Errorf("%d locks are left", n)
	}
}

func TestLockIsRefreshedOrStopsItsHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := mem.New()
		newRepo(t, inner, repo.Options{})
		var broken atomic.Bool
		be := faulty.New(inner, func(c faulty.Call) faulty.Fault {
			if broken.Load() && c.Op == faulty.Put {
				return faulty.Fault{Err: errors.New("share away")}
			}
			return faulty.Fault{}
		})
		r := reopen(t, be)
		began := time.Now()
		err := r.WithLock(t.Context(), false, func(ctx context.Context) error {
			time.Sleep(3 * time.Hour)
			if ctx.Err() != nil {
				t.Errorf("stopped although refreshed: %v", context.Cause(ctx))
			}
			n := 0
			err := r.EachLock(ctx, func(_ backup.ID, l repo.Lock, err error) error {
				n++
				if l.Stale(time.Now()) {
					t.Errorf("stale while held: %v", l)
				}
				return err
			})
			if err != nil || n != 1 {
				t.Errorf("%d locks, %v", n, err)
			}
			broken.Store(true)
			began = time.Now()
			<-ctx.Done()
			return ctx.Err()
		})
		if took := time.Since(began); !errors.Is(err, repo.ErrLockLost) || took > 29*time.Minute {
			t.Errorf("%v after %v", err, took)
		}
	})
}

func TestReadOnlyStoreNeedsNoLock(t *testing.T) {
	inner := mem.New()
	newRepo(t, inner, repo.Options{})
	r := reopen(t, faulty.New(inner, func(c faulty.Call) faulty.Fault {
		if c.Op == faulty.Put {
			return faulty.Fault{Err: fs.ErrPermission}
		}
		return faulty.Fault{}
	}))
	ran := false
	if err := r.WithLock(t.Context(), false, func(context.Context) error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("shared: %v", err)
	}
	if err := r.WithLock(t.Context(), true, func(context.Context) error { return nil }); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("exclusive: %v", err)
	}
}

func FuzzDecodeIndex(f *testing.F) {
	one := (&repo.IndexFile{Packs: []repo.IndexPack{{ID: backup.Hash(nil), Blobs: []repo.PackedBlob{{Blob: backup.Blob{Kind: backup.TreeBlob, ID: backup.Hash(nil)}, Length: 50, Plain: 3}}}}}).Encode()
	f.Add(one)
	f.Add([]byte(`{"supersedes":["x"],"packs":[]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := repo.DecodeIndex(data)
		if err != nil {
			return
		}
		if !json.Valid(data) {
			t.Errorf("accepted what is not JSON: %q", data)
		}
		once := file.Encode()
		if !json.Valid(once) {
			t.Errorf("our own encoding is not JSON: %s", once)
		}
		if again, err := repo.DecodeIndex(once); err != nil || !reflect.DeepEqual(again.Encode(), once) {
			t.Errorf("%v in our own encoding", err)
		}
	})
}

func FuzzDecodeHeader(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{0, 40, 0, 0, 0}, make([]byte, 32)...))
	f.Add(append([]byte{3, 40, 0, 0, 0, 9, 0, 0, 0}, make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		blobs, err := repo.DecodeHeader(data)
		if err == nil && len(blobs) > len(data)/37 {
			t.Errorf("%d blobs in %d bytes", len(blobs), len(data))
		}
	})
}

func FuzzDecodeSnapshot(f *testing.F) {
	id := backup.Hash(nil)
	b, err := json.Marshal(backup.Snapshot{Tree: &id, Time: time.Unix(0, 0)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := repo.DecodeSnapshot(id, data); err == nil && s.Tree.IsZero() {
			t.Error("no tree")
		}
	})
}

func FuzzDecodeLock(f *testing.F) {
	f.Add([]byte(`{"time":"2026-11-22T03:00:00Z","exclusive":true,"hostname":"pi","username":"root","pid":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if l, err := repo.DecodeLock(data); err == nil {
			l.Stale(time.Now())
			_ = l.String()
		}
	})
}

func BenchmarkIndex(b *testing.B) {
	be := mem.New()
	r := newRepo(b, be, repo.Options{})
	var ids []backup.ID
	for i := range 1000 {
		ids = append(ids, save(b, r, fmt.Appendf(nil, "blob %d", i))...)
	}
	i := 0
	for b.Loop() {
		if !r.Index().Has(backup.Blob{ID: ids[i%len(ids)]}) {
			b.Fatal("missing")
		}
		i++
	}
}

// BenchmarkIndexMemory reports the memory that a loaded index of a million
// blobs takes, in bytes a blob.
func BenchmarkIndexMemory(b *testing.B) {
	const packs, each = 1000, 1000
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		x := repo.NewIndex()
		blobs := make([]repo.PackedBlob, each)
		for i := range packs {
			for k := range blobs {
				id := backup.Hash([]byte{byte(i), byte(i >> 8), byte(k), byte(k >> 8)})
				blobs[k] = repo.PackedBlob{Blob: backup.Blob{ID: id}, Offset: uint32(k) * 1000, Length: 1000, Plain: 2000}
			}
			repo.AddPack(x, backup.Hash(blobs[0].ID[:]), blobs)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/packs/each, "B/blob")
		runtime.KeepAlive(x)
	}
}
