package check_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/check"
	"github.com/iot49/ide49-backup/backup/repo"
)

// Rolling reads reach every pack once a round, and say since when all was read.
func TestRolling(t *testing.T) {
	be := house(t)
	packs := objects(t, be, backend.Packs)
	// In a few packs a byte is wrong that only a full read shows.
	r := opened(t, be)
	bad := map[backup.ID]int{}
	for i, o := range packs {
		b := r.Index().PackBlobs(o.key.ID)
		if i%3 != 0 || b[0].Kind != backup.DataBlob {
			continue
		}
		o.data[20] ^= 1
		must(t, be.Put(t.Context(), o.key, o.data))
		bad[o.key.ID] = 0
	}
	var round check.Round
	began := time.Now().Round(0)
	runs := 0
	for ; round.Since.IsZero(); runs++ {
		if runs > len(packs) {
			t.Fatalf("no end after %d runs", runs)
		}
		// The state is stored between two runs.
		text, err := json.Marshal(round)
		must(t, err)
		round = check.Round{}
		must(t, json.Unmarshal(text, &round))
		before := round.Next
		for _, p := range run(t, open(t, be), check.Options{Read: check.Rolling(20, &round)}) {
			bad[p.Object.ID]++
		}
		if round.Since.IsZero() && slices.Compare(round.Next[:], before[:]) <= 0 {
			t.Fatalf("run %d: no advance: %+v", runs, round)
		}
	}
	for id, n := range bad {
		if n != 1 {
			t.Errorf("pack %s was found to be damaged %d times", id.Short(), n)
		}
	}
	if len(bad) < 3 || runs < 4 || runs > 6 {
		t.Errorf("%d packs in %d runs", len(bad), runs)
	}
	if round.Since.Before(began) || round.Ended.Before(round.Since) || !round.Began.IsZero() {
		t.Errorf("%+v", round)
	}
}

// An interrupted run has moved on over what it read, and no further.
func TestRollingInterrupted(t *testing.T) {
	be := house(t)
	var round check.Round
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	reads := 0
	store := faulty.New(be, func(c faulty.Call) faulty.Fault {
		if c.Op == faulty.Get && c.Key.Kind == backend.Packs {
			if reads++; reads == 10 {
				cancel()
			}
		}
		return faulty.Fault{}
	})
	for _, err := range check.Run(ctx, open(t, store), check.Options{Read: check.Rolling(100, &round), Workers: 1}) {
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	names := objects(t, be, backend.Packs)
	at := slices.IndexFunc(names, func(o object) bool { return slices.Compare(o.key.ID[:], round.Next[:]) >= 0 })
	if at < 1 || at > 9 || !round.Since.IsZero() {
		t.Errorf("%+v: at %d", round, at)
	}
}

// What was just written is read again, and only that.
func TestWritten(t *testing.T) {
	dir := t.TempDir()
	be, err := local.Create(dir+"/r", local.Options{})
	must(t, err)
	r, err := repo.Init(t.Context(), be, "pw", cheap, repo.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	var packs []backup.ID
	rng := rand.New(rand.NewPCG(1, 1))
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		_, err := w.Save(ctx, backup.DataBlob, noise(rng, 100_000))
		return err
	}))
	for f, err := range r.PackFiles(t.Context()) {
		must(t, err)
		packs = append(packs, f.ID)
	}
	for _, p := range run(t, r, check.Options{Read: check.Written(packs)}) {
		if !p.Harmless || !errors.Is(p.Err, check.ErrCached) || !errors.Is(p.Err, errors.ErrUnsupported) {
			t.Error(p) // where the temporary folder is in memory this is said
		}
	}
	// In memory it can't be done, which is said once.
	inMemory := house(t)
	all := objects(t, inMemory, backend.Packs)
	two := []backup.ID{all[0].key.ID, all[1].key.ID}
	found := run(t, open(t, inMemory), check.Options{Read: check.Written(two)})
	if len(found) != 1 || !errors.Is(found[0].Err, check.ErrCached) {
		t.Error(found)
	}
	// One that was written and is gone, and one that is damaged.
	must(t, inMemory.Put(t.Context(), all[1].key, append(bytes.Clone(all[1].data[:50]), all[1].data[49:len(all[1].data)-1]...)))
	gone := backup.Hash([]byte("gone"))
	problems := damage(run(t, open(t, inMemory), check.Options{Read: check.Written(append(two, gone))}))
	if len(problems) != 2 {
		t.Error(problems)
	}
}

func TestDrill(t *testing.T) {
	be := house(t)
	r := opened(t, be)
	all, err := r.Snapshots(t.Context())
	must(t, err)
	rng := rand.New(rand.NewPCG(9, 9))
	files, err := check.Sample(t.Context(), r, all, 30, 1<<20, rng)
	must(t, err)
	if len(files) != 30 {
		t.Errorf("%d files", len(files))
	}
	dir := t.TempDir()
	scratch, err := os.OpenRoot(dir)
	must(t, err)
	defer scratch.Close()
	drill := func(r *repo.Repo, files []check.Sampled) (bad int) {
		t.Helper()
		n := 0
		must(t, check.Drill(t.Context(), r, files, scratch, func(s check.Sampled, err error) {
			n++
			if err != nil {
				bad++
			}
		}))
		if n != len(files) {
			t.Errorf("%d of %d tried", n, len(files))
		}
		return bad
	}
	if bad := drill(r, files); bad != 0 {
		t.Errorf("%d files differ", bad)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left in the scratch folder: %v, %v", left, err)
	}
	// Data that is lost, and a size that is wrong.
	i := slices.IndexFunc(files, func(s check.Sampled) bool { return len(s.Content) > 1 })
	wrong := files[i]
	wrong.Size++
	lost := be.Clone()
	lose(t, lost, files[i].Content[0])
	if bad := drill(opened(t, lost), []check.Sampled{files[i], wrong}); bad != 2 {
		t.Errorf("%d bad", bad)
	}
	must(t, scratch.Close())
	if err := check.Drill(t.Context(), r, files, scratch, func(s check.Sampled, err error) { t.Error(s, err) }); err == nil {
		t.Error("a scratch folder that is gone is no error")
	}
}

func TestCompare(t *testing.T) {
	be := mem.New()
	newEmpty(t, be)
	one, two := []byte("one"), []byte("second")
	snapshot(t, opened(t, be), "v", time.Now(), map[string][][]byte{"a/b/c": {one, two}})
	r := opened(t, be)
	s := check.Sampled{Size: 9, Content: []backup.ID{backup.Hash(one), backup.Hash(two)}}
	if err := s.Compare(r, strings.NewReader("onesecond")); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "one", "onesecon", "onesecond!", "oneSecond", "xxxxxxxxx"} {
		if err := s.Compare(r, strings.NewReader(bad)); !errors.Is(err, check.ErrDiffers) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	fault := errors.New("fault")
	if err := s.Compare(r, iotest.ErrReader(fault)); !errors.Is(err, fault) || errors.Is(err, check.ErrDiffers) {
		t.Error(err)
	}
	s.Content = append(s.Content, backup.Hash([]byte("nowhere")))
	if err := s.Compare(r, strings.NewReader("onesecond")); !errors.Is(err, repo.ErrNoBlob) {
		t.Error(err)
	}
}
