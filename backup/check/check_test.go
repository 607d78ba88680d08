package check_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/check"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

// cheap makes keys that cost nothing to open.
var cheap = crypt.Params{N: 2, R: 1, P: 1}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	must(t, err)
	return r
}

func opened(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	r := open(t, be)
	must(t, r.LoadIndex(t.Context()))
	return r
}

func noise(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// A house is a repository for tests: a few snapshots of folders that share
// most of their files, several packs, and some blobs that are stored twice.
func house(t testing.TB) *mem.Store {
	t.Helper()
	be := mem.New()
	_, err := repo.Init(t.Context(), be, "pw", cheap, repo.Options{})
	must(t, err)
	rng := rand.New(rand.NewPCG(7, 7))
	files := map[string][][]byte{} // by path of three names
	for i := range 40 {
		files[fmt.Sprintf("a%d/b%d/f%d", i%3, i%4, i)] = nil
	}
	for round := range 6 {
		for _, name := range slices.Sorted(maps.Keys(files)) {
			if round > 0 && rng.IntN(4) > 0 {
				continue
			}
			var content [][]byte
			for range rng.IntN(4) {
				content = append(content, noise(rng, 20+rng.IntN(3000)))
			}
			files[name] = content
		}
		snapshot(t, opened(t, be), fmt.Sprint("v", round%2), time.Unix(1_800_000_000+int64(round)*3600, 0), files)
		if round == 3 {
			// Two writers that did not know of each other store the same.
			other := opened(t, be)
			one := opened(t, be)
			files["a0/b0/twice"] = [][]byte{noise(rng, 2000), noise(rng, 3000)}
			snapshot(t, one, "v0", time.Unix(1_900_000_000, 0), files)
			snapshot(t, other, "v1", time.Unix(1_900_000_001, 0), files)
		}
	}
	return be
}

// snapshot stores files with three names in their path as a snapshot.
func snapshot(t testing.TB, r *repo.Repo, volume string, at time.Time, files map[string][][]byte) backup.ID {
	t.Helper()
	var root backup.ID
	err := r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		dirs := map[string]*backup.Tree{}
		add := func(dir string, n backup.Node) {
			if dirs[dir] == nil {
				dirs[dir] = &backup.Tree{}
			}
			dirs[dir].Nodes = append(dirs[dir].Nodes, n)
		}
		for _, name := range slices.Sorted(maps.Keys(files)) {
			parts := strings.Split(name, "/")
			n := backup.Node{Name: parts[2], Type: backup.File, Mode: 0o644}
			for _, b := range files[name] {
				s, err := w.Save(ctx, backup.DataBlob, b)
				if err != nil {
					return err
				}
				n.Content = append(n.Content, s.ID)
				n.Size += uint64(len(b))
			}
			add(parts[0]+"/"+parts[1], n)
		}
		for _, depth := range []int{1, 0} {
			for _, dir := range slices.Sorted(maps.Keys(dirs)) {
				if strings.Count(dir, "/") != depth {
					continue
				}
				s, err := w.SaveTree(ctx, dirs[dir])
				if err != nil {
					return err
				}
				parent, name, ok := strings.Cut(dir, "/")
				if !ok {
					parent, name = ".", dir
				}
				if dir != "." {
					add(parent, backup.Node{Name: name, Type: backup.Dir, Mode: fs.ModeDir | 0o755, Subtree: s.ID})
				}
			}
		}
		s, err := w.SaveTree(ctx, dirs["."])
		root = s.ID
		return err
	})
	must(t, err)
	id, err := r.SaveSnapshot(t.Context(), &backup.Snapshot{Time: at, Tree: &root, Paths: []string{"/" + volume}, Hostname: "pi", Tags: []string{backup.VolumeTag + volume}})
	must(t, err)
	return id
}

// run collects what Run finds; a failure to look fails the test.
func run(t testing.TB, r *repo.Repo, opt check.Options) []check.Problem {
	t.Helper()
	var all []check.Problem
	for p, err := range check.Run(t.Context(), r, opt) {
		must(t, err)
		all = append(all, p)
	}
	return all
}

func damage(all []check.Problem) []check.Problem {
	return slices.DeleteFunc(slices.Clone(all), func(p check.Problem) bool { return p.Harmless })
}

func TestIntact(t *testing.T) {
	be := house(t)
	for _, read := range []string{"", "all", "30%", "1/3", "2/3"} {
		sel, err := check.ParseSelection(read)
		must(t, err)
		phases := map[check.Phase]bool{}
		problems := run(t, open(t, be), check.Options{Read: sel, Progress: func(p check.Progress) {
			phases[p.Phase] = true
			if p.Total > 0 && p.Done > p.Total || p.Problems != 0 {
				t.Errorf("%+v", p)
			}
		}})
		if len(problems) != 0 || len(phases) != 3 {
			t.Errorf("read %q: %v, phases %v", read, problems, phases)
		}
	}
}

func TestParseSelection(t *testing.T) {
	for _, bad := range []string{"some", "0%", "101%", "-1%", "NaN%", "0/3", "4/3", "1/257", "1/", "/", "%", "1/3/4"} {
		if _, err := check.ParseSelection(bad); err == nil {
			t.Errorf("ParseSelection(%q) succeeds", bad)
		}
	}
}

// An object is a key with what is stored under it.
type object struct {
	key  backend.Key
	data []byte
}

func objects(t testing.TB, be backend.Backend, kinds ...backend.Kind) (all []object) {
	t.Helper()
	for _, kind := range kinds {
		for info, err := range be.List(t.Context(), kind) {
			must(t, err)
			data, err := be.Get(t.Context(), info.Key, 0, -1)
			must(t, err)
			all = append(all, object{info.Key, data})
		}
	}
	slices.SortFunc(all, func(a, b object) int { return strings.Compare(a.key.Path(), b.key.Path()) })
	return all
}

// A wreck is a repository with damage, and what is known of it.
type wreck struct {
	be      *mem.Store
	what    string
	touched map[backend.Key]bool
}

// ruin damages one to three random objects of be.
func ruin(t testing.TB, be *mem.Store, all []object, rng *rand.Rand) wreck {
	t.Helper()
	w := wreck{be: be.Clone(), touched: map[backend.Key]bool{}}
	put := func(k backend.Key, data []byte) { must(t, w.be.Put(t.Context(), k, data)) }
	for range 1 + rng.IntN(3) {
		o := all[rng.IntN(len(all))]
		if w.touched[o.key] {
			continue
		}
		w.touched[o.key] = true
		switch op := rng.IntN(4); {
		case op == 0:
			data := bytes.Clone(o.data)
			at := rng.IntN(len(data))
			data[at] ^= byte(1 + rng.IntN(255))
			put(o.key, data)
			w.what += fmt.Sprintf("flip %s at %d of %d; ", o.key, at, len(data))
		case op == 1:
			n := rng.IntN(len(o.data))
			put(o.key, o.data[:n])
			w.what += fmt.Sprintf("cut %s to %d of %d; ", o.key, n, len(o.data))
		case op == 2:
			p := all[rng.IntN(len(all))]
			if p.key.Kind != o.key.Kind || w.touched[p.key] {
				put(o.key, noise(rng, len(o.data)))
				w.what += fmt.Sprintf("noise in %s; ", o.key)
				continue
			}
			w.touched[p.key] = true
			put(o.key, p.data)
			put(p.key, o.data)
			w.what += fmt.Sprintf("swap %s and %s; ", o.key, p.key)
		default:
			if o.key.Kind == backend.Snapshots {
				delete(w.touched, o.key) // nothing can tell that it was there
				continue
			}
			must(t, w.be.Delete(t.Context(), o.key))
			w.what += fmt.Sprintf("delete %s; ", o.key)
		}
	}
	return w
}

// expected returns the files of the snapshots that can still be read that are
// not whole any more, found the slow way: by reading every blob of each.
func expected(t testing.TB, pristine *repo.Repo, w wreck) map[check.File]bool {
	t.Helper()
	ctx := t.Context()
	r := open(t, w.be)
	must(t, r.LoadIntactIndex(ctx, func(backup.ID, error) error { return nil }))
	state := map[backup.Blob]bool{}
	lost := func(kind backup.BlobKind, id backup.ID) bool {
		b := backup.Blob{Kind: kind, ID: id}
		if _, known := state[b]; !known {
			_, err := r.Blob(ctx, kind, id)
			state[b] = err != nil
		}
		return state[b]
	}
	files := map[check.File]bool{}
	var visit func(s, id backup.ID, path string)
	visit = func(s, id backup.ID, path string) {
		if lost(backup.TreeBlob, id) {
			files[check.File{Snapshot: s, Path: path}] = true
			return
		}
		tree, err := pristine.Tree(ctx, id)
		must(t, err)
		for _, n := range tree.Nodes {
			if n.Type == backup.Dir {
				visit(s, n.Subtree, path+n.Name+"/")
			}
			if slices.ContainsFunc(n.Content, func(id backup.ID) bool { return lost(backup.DataBlob, id) }) {
				files[check.File{Snapshot: s, Path: path + n.Name}] = true
			}
		}
	}
	must(t, r.EachSnapshot(ctx, func(id backup.ID, s *backup.Snapshot, err error) error {
		if err == nil {
			visit(id, *s.Tree, "/")
		}
		return nil
	}))
	return files
}

var decay = []backend.Kind{backend.Snapshots, backend.Indexes, backend.Packs}

// rotCases is how many random damages TestBitRot tries: each takes about 70 ms
// of a processor.
var rotCases = flag.Int("rot", 200, "random damages to try")

// findDamage checks that Run finds all of a damage, and names all files that
// it affects and no others.
func findDamage(t testing.TB, pristine *repo.Repo, w wreck, seed uint64) {
	t.Helper()
	problems := run(t, open(t, w.be), check.Options{Read: check.All(), MaxFiles: 1000})
	found := map[backup.ID]bool{}
	files := map[check.File]bool{}
	for _, p := range damage(problems) {
		found[p.Object.ID] = true
		if strings.Contains(p.Err.Error(), "\n") || p.More {
			t.Errorf("seed %d: %v", seed, p)
		}
		for _, f := range p.Files {
			files[f] = true
		}
	}
	for k := range w.touched {
		_, err := w.be.Get(t.Context(), k, 0, 0)
		switch {
		case found[k.ID]:
		case k.Kind == backend.Indexes && err != nil:
			// Its absence shows in its packs.
			if len(problems) == 0 {
				t.Errorf("seed %d: %s: nothing found", seed, w.what)
			}
		case k.Kind == backend.Packs && !known(t, w.be, k.ID): // with its index
		default:
			t.Errorf("seed %d: %s: nothing said of %s: %v", seed, w.what, k, problems)
		}
	}
	want := expected(t, pristine, w)
	if !maps.Equal(files, want) {
		t.Errorf("seed %d: %s\n%v\nfiles %v\nwant %v", seed, w.what, problems, files, want)
	}
}

// known reports whether an index that can be read names a pack.
func known(t testing.TB, be backend.Backend, pack backup.ID) bool {
	t.Helper()
	r := open(t, be)
	must(t, r.LoadIntactIndex(t.Context(), func(backup.ID, error) error { return nil }))
	return r.Index().HasPack(pack)
}

// The structure alone shows what is missing and what has a wrong size.
func TestStructure(t *testing.T) {
	be := house(t)
	pristine := opened(t, be)
	for _, o := range objects(t, be, decay...) {
		for _, cut := range []bool{true, false} {
			w := wreck{be: be.Clone(), what: o.key.String()}
			if cut {
				must(t, w.be.Put(t.Context(), o.key, o.data[:len(o.data)-1]))
			} else if must(t, w.be.Delete(t.Context(), o.key)); o.key.Kind == backend.Snapshots {
				continue
			}
			files := map[check.File]bool{}
			problems := run(t, open(t, w.be), check.Options{MaxFiles: 1000})
			for _, p := range problems {
				for _, f := range p.Files {
					files[f] = true
				}
			}
			if want := expected(t, pristine, w); len(problems) == 0 || !maps.Equal(files, want) {
				t.Errorf("%s, cut %v: %v; files %v, want %v", w.what, cut, problems, files, want)
			}
		}
	}
}

func TestKeys(t *testing.T) {
	be := house(t)
	junk := []byte("junk")
	k := backend.Key{Kind: backend.Keys, ID: backup.Hash(junk)}
	must(t, be.Put(t.Context(), k, junk))
	r := open(t, be)
	if all := run(t, r, check.Options{}); len(all) != 1 || all[0].Object != (check.Object{Kind: check.Key, ID: k.ID}) {
		t.Error(all)
	}
}

func TestLeftovers(t *testing.T) {
	be := house(t)
	junk := []byte("junk")
	must(t, be.Put(t.Context(), backend.Key{Kind: backend.Packs, ID: backup.Hash(junk)}, junk))
	all := run(t, open(t, be), check.Options{Read: check.All()})
	if len(all) != 1 || !all[0].Harmless || !errors.Is(all[0].Err, check.ErrLeftover) {
		t.Error(all)
	}
}

// saveTrees stores raw trees and returns their IDs.
func saveRaw(t testing.TB, r *repo.Repo, raw ...string) (ids []backup.ID) {
	t.Helper()
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		for _, text := range raw {
			s, err := w.Save(ctx, backup.TreeBlob, []byte(text))
			if err != nil {
				return err
			}
			ids = append(ids, s.ID)
		}
		return nil
	}))
	return ids
}

func TestHostileTrees(t *testing.T) {
	dir := func(name string, id backup.ID) string {
		return fmt.Sprintf(`{"name":%q,"type":"dir","subtree":%q}`, name, id)
	}
	none := backup.Hash([]byte("nowhere"))
	for name, tree := range map[string]string{
		"unsorted":     `{"nodes":[` + dir("b", none) + `,` + dir("a", none) + `]}`,
		"double":       `{"nodes":[` + dir("a", none) + `,` + dir("a", none) + `]}`,
		"slash":        `{"nodes":[` + dir("a/b", none) + `]}`,
		"parent":       `{"nodes":[` + dir("..", none) + `]}`,
		"no JSON":      `{"nodes":[`,
		"missing tree": `{"nodes":[` + dir("a", none) + `]}`,
		"missing data": `{"nodes":[{"name":"a","type":"file","content":["` + none.String() + `"]}]}`,
	} {
		be := house(t)
		r := opened(t, be)
		bad := saveRaw(t, r, tree)[0]
		root := saveRaw(t, r, `{"nodes":[`+dir("sub", bad)+`]}`)[0]
		id, err := r.SaveSnapshot(t.Context(), &backup.Snapshot{Time: time.Now(), Tree: &root, Paths: []string{"/x"}})
		must(t, err)
		all := run(t, open(t, be), check.Options{})
		want := check.File{Snapshot: id, Path: "/sub/"}
		if strings.HasPrefix(name, "missing") {
			want.Path = "/sub/a"
			if strings.HasSuffix(name, "tree") {
				want.Path += "/"
			}
		}
		if len(all) != 1 || len(all[0].Files) != 1 || all[0].Files[0] != want {
			t.Errorf("%s: %v %v", name, all, want)
		}
	}
}

// Each level refers to the one below twice: 2^64 paths must cost 64 trees. One
// more is lost at the bottom, so that each path is damaged.
func TestManyPaths(t *testing.T) {
	be := mem.New()
	_, err := repo.Init(t.Context(), be, "pw", cheap, repo.Options{})
	must(t, err)
	r := opened(t, be)
	below := backup.Hash([]byte("lost"))
	var trees []string
	for range 64 {
		text := fmt.Sprintf(`{"nodes":[{"name":"a","type":"dir","subtree":%q},{"name":"b","type":"dir","subtree":%q}]}`, below, below)
		trees = append(trees, text)
		below = backup.Hash([]byte(text))
	}
	saveRaw(t, r, trees...)
	_, err = r.SaveSnapshot(t.Context(), &backup.Snapshot{Time: time.Now(), Tree: &below, Paths: []string{"/x"}})
	must(t, err)
	all := run(t, open(t, be), check.Options{})
	if len(all) != 1 || len(all[0].Files) != 100 || !all[0].More {
		t.Errorf("%v", all)
	}
}

// A chain of folders that is longer than any path.
func TestDeepTrees(t *testing.T) {
	be := mem.New()
	_, err := repo.Init(t.Context(), be, "pw", cheap, repo.Options{})
	must(t, err)
	r := opened(t, be)
	below := backup.Hash([]byte("lost"))
	name := strings.Repeat("n", 200)
	must(t, r.Update(t.Context(), func(ctx context.Context, w *repo.Writer) error {
		for range 3000 {
			s, err := w.SaveTree(ctx, &backup.Tree{Nodes: []backup.Node{{Name: name, Type: backup.Dir, Subtree: below}}})
			if err != nil {
				return err
			}
			below = s.ID
		}
		return nil
	}))
	_, err = r.SaveSnapshot(t.Context(), &backup.Snapshot{Time: time.Now(), Tree: &below, Paths: []string{"/x"}})
	must(t, err)
	if all := run(t, open(t, be), check.Options{}); len(all) != 1 || !all[0].More {
		t.Errorf("%v", all)
	}
}

// A drive that is pulled out is a failure to look, not thousands of damages.
func TestStoreThatGoesAway(t *testing.T) {
	inner := house(t)
	reads := 0
	be := faulty.New(inner, func(c faulty.Call) faulty.Fault {
		if c.Op == faulty.Get {
			if reads++; reads > 40 {
				return faulty.Fault{Err: errors.New("input/output error")}
			}
		}
		return faulty.Fault{}
	})
	var last error
	for p, err := range check.Run(t.Context(), open(t, be), check.Options{Read: check.All()}) {
		if err == nil {
			t.Error(p)
		}
		last = err
	}
	if last == nil {
		t.Error("no error")
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := open(t, inner)
	cancel()
	for _, err := range check.Run(ctx, r, check.Options{}) {
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Error(last)
	}
}

// A sector that can't be read costs only the blobs in it.
func TestUnreadableSector(t *testing.T) {
	inner := house(t)
	pristine := opened(t, inner)
	var victim backup.ID
	var blob repo.PackedBlob
	for id, blobs := range pristine.Index().Packs() {
		if len(blobs) > 5 && blobs[0].Kind == backup.DataBlob {
			victim, blob = id, blobs[3]
			break
		}
	}
	be := &badSector{inner, backend.Key{Kind: backend.Packs, ID: victim}, int64(blob.Offset) + 5}
	w := wreck{be: inner}
	all := run(t, open(t, be), check.Options{Read: check.All(), MaxFiles: 1000})
	if len(all) != 1 || !strings.Contains(all[0].Err.Error(), "1 of ") {
		t.Errorf("%v", all)
	}
	for _, f := range all[0].Files {
		if f.Path == "" || len(expected(t, pristine, w)) != 0 {
			t.Error(f)
		}
	}
}

// badSector fails every Get that touches one byte.
type badSector struct {
	*mem.Store
	key backend.Key
	at  int64
}

func (b *badSector) Get(ctx context.Context, k backend.Key, off, n int64) ([]byte, error) {
	if k == b.key && off <= b.at && (n < 0 || b.at < off+n) {
		return nil, errors.New("input/output error")
	}
	return b.Store.Get(ctx, k, off, n)
}
