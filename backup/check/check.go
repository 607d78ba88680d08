package check

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// Options say how thoroughly to look. The zero value looks at the structure:
// every snapshot, index file and tree is read, and the size of every pack is
// compared with the index.
type Options struct {
	Read     Selection // packs whose every byte is verified too
	Workers  int       // packs read at once; 0 means one a processor, at least 2
	MaxFiles int       // files listed for one problem; 0 means 100
	// Progress, if not nil, is called now and then, one call at a time.
	Progress func(Progress)
}

// maxProblems and maxListed bound what a ruined repository makes Run keep.
const (
	maxProblems  = 10_000
	maxListed    = 200_000 // files, of all problems
	maxVisits    = 100_000 // folders looked into for them
	defaultFiles = 100
	maxPath      = 1 << 16
)

// A Phase is a part of the work of Run.
type Phase string

// The phases, in order. The last comes only when there is damage.
const (
	ReadingIndex   Phase = "index"
	ReadingPacks   Phase = "packs"
	ReadingTrees   Phase = "trees"
	FindingAffects Phase = "affected files"
)

// Progress says how far Run is.
type Progress struct {
	Phase    Phase
	Done     int64 // bytes of packs, or trees
	Total    int64 // 0 if not known
	Problems int
}

// A Kind says what an Object is.
type Kind string

// The kinds of objects that something can be wrong with.
const (
	Snapshot Kind = "snapshot"
	Index    Kind = "index"
	Key      Kind = "key"
	Pack     Kind = "pack"
	DataBlob Kind = "data"
	TreeBlob Kind = "tree"
)

// An Object is a file of the repository or a blob.
type Object struct {
	Kind Kind
	ID   backup.ID
}

func (o Object) String() string { return string(o.Kind) + " " + o.ID.Short() }

// A File is a file or folder in a snapshot. Path is as the snapshot records
// it, from the root; "/" is all of the snapshot.
type File struct {
	Snapshot backup.ID
	Path     string
}

// A Problem is what is wrong with one object.
type Problem struct {
	Object Object
	Err    error // one line
	// Harmless is set for what wastes room but endangers nothing, such as
	// packs that an interrupted run left.
	Harmless bool
	// Files are those that can't be restored in full because of it, by
	// snapshot (oldest first) and path. A folder stands for all below it.
	Files []File
	// More is set when Files is not all.
	More bool
}

func compareFiles(a, b File) int {
	return cmp.Or(slices.Compare(a.Snapshot[:], b.Snapshot[:]), strings.Compare(a.Path, b.Path))
}

func (p Problem) String() string {
	if p.Harmless {
		return fmt.Sprintf("%s: %v (harmless)", p.Object, p.Err)
	}
	return fmt.Sprintf("%s: %v", p.Object, p.Err)
}

// Errors of Problems. Others are repo.ErrDamaged, repo.ErrNoBlob and
// backup.ErrMalformed, or come from the store.
var (
	ErrMissing  = errors.New("missing from the store")
	ErrLeftover = errors.New("in no index: left by an interrupted run, or its index is lost; prune removes it")
	ErrCached   = errors.New("what was written could only be read through a cache")
	ErrMany     = errors.New("there are more problems than are listed")
)

// Run looks for damage and yields what it found, one Problem for each object,
// damage first. An error ends the sequence and says why the look could not be
// finished: what was found till then comes before it, without Files.
//
// The caller holds a shared lock. Run loads the index of r itself, as far as
// it can be read. It changes nothing in the store. Its memory is the index,
// two bits a blob, a few MiB for each worker, and bounded lists of what is
// wrong.
func Run(ctx context.Context, r *repo.Repo, opt Options) iter.Seq2[Problem, error] {
	return func(yield func(Problem, error) bool) {
		c := newChecker(r, opt)
		err := c.look(ctx)
		for _, p := range c.problems {
			if !yield(*p, nil) {
				return
			}
		}
		if err != nil {
			yield(Problem{}, err)
		}
	}
}

type checker struct {
	r   *repo.Repo
	opt Options

	snapshots []*backup.Snapshot // those that can be read, oldest first
	packs     map[backup.ID]int64

	cached   sync.Once
	mu       sync.Mutex
	problems []*Problem
	more     int // problems that are not kept
	blobs    map[backup.Blob]*Problem
	bad      map[backup.ID]*badPack
	progress Progress
	told     time.Time
}

// A badPack holds which copies of blobs are lost with a pack.
type badPack struct {
	problem *Problem
	all     bool
	blobs   map[backup.Blob]bool
}

func newChecker(r *repo.Repo, opt Options) *checker {
	if opt.Workers <= 0 {
		opt.Workers = max(2, runtime.GOMAXPROCS(0))
	}
	if opt.MaxFiles <= 0 {
		opt.MaxFiles = defaultFiles
	}
	return &checker{r: r, opt: opt, blobs: map[backup.Blob]*Problem{}, bad: map[backup.ID]*badPack{}}
}

func (c *checker) look(ctx context.Context) error {
	err := c.lookAll(ctx)
	if c.more > 0 {
		c.problems = append(c.problems, &Problem{Err: fmt.Errorf("%w: %d more", ErrMany, c.more)})
	}
	slices.SortStableFunc(c.problems, func(a, b *Problem) int {
		if a.Harmless != b.Harmless {
			if b.Harmless {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.Object.Kind, b.Object.Kind), slices.Compare(a.Object.ID[:], b.Object.ID[:]))
	})
	return err
}

func (c *checker) lookAll(ctx context.Context) error {
	c.phase(ReadingIndex, 0)
	err := c.r.EachKey(ctx, func(id backup.ID, err error) error {
		if err != nil {
			return c.doubt(ctx, Object{Key, id}, err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list keys: %w", err)
	}
	// Snapshots first: what they name is then in the index.
	if err := c.loadSnapshots(ctx); err != nil {
		return err
	}
	err = c.r.LoadIntactIndex(ctx, func(id backup.ID, err error) error { return c.doubt(ctx, Object{Index, id}, err) })
	if err != nil {
		return err
	}
	if err := c.lookAtPacks(ctx); err != nil {
		return err
	}
	if err := c.lookAtTrees(ctx); err != nil {
		return err
	}
	if len(c.bad)+len(c.blobs) > 0 {
		return c.affected(ctx)
	}
	return nil
}

// loadSnapshots lists the snapshots that can be read, and reports the others.
func (c *checker) loadSnapshots(ctx context.Context) error {
	err := c.r.EachSnapshot(ctx, func(id backup.ID, s *backup.Snapshot, err error) error {
		if err != nil {
			return c.doubt(ctx, Object{Snapshot, id}, err)
		}
		c.snapshots = append(c.snapshots, s)
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	slices.SortFunc(c.snapshots, func(a, b *backup.Snapshot) int {
		return cmp.Or(a.Time.Compare(b.Time), slices.Compare(a.ID[:], b.ID[:]))
	})
	return nil
}

// report keeps a problem. It returns nil when there are too many.
func (c *checker) report(o Object, err error, harmless bool) *Problem {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.progress.Problems++
	if len(c.problems) >= maxProblems {
		c.more++
		return nil
	}
	p := &Problem{Object: o, Err: err, Harmless: harmless}
	c.problems = append(c.problems, p)
	return p
}

// doubt reports err as damage of o, or returns it when the store as a whole
// does not answer, as when a drive was pulled out.
func (c *checker) doubt(ctx context.Context, o Object, err error) error {
	if err := c.alive(ctx, err); err != nil {
		return err
	}
	c.report(o, err, false)
	return nil
}

func (c *checker) alive(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, repo.ErrDamaged) || errors.Is(err, repo.ErrNoBlob) || errors.Is(err, backup.ErrMalformed) || errors.Is(err, repo.ErrVersion) {
		return nil
	}
	if dead := c.r.Alive(ctx); dead != nil {
		return fmt.Errorf("the store does not answer any more: %w (after: %w)", dead, err)
	}
	return nil
}

func (c *checker) phase(p Phase, total int64) {
	c.mu.Lock()
	c.progress.Phase, c.progress.Done, c.progress.Total = p, 0, total
	c.told = time.Time{}
	c.mu.Unlock()
	c.advance(0)
}

// advance counts work that is done.
func (c *checker) advance(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.progress.Done += n
	if c.opt.Progress != nil && time.Since(c.told) > 50*time.Millisecond {
		c.told = time.Now()
		c.opt.Progress(c.progress)
	}
}

// lookAtPacks compares packs with the index, and reads those that are selected
// or of a wrong size.
func (c *checker) lookAtPacks(ctx context.Context) error {
	c.packs = map[backup.ID]int64{}
	index := c.r.Index()
	for p, err := range c.r.PackFiles(ctx) {
		if err != nil {
			return err
		}
		if !index.HasPack(p.ID) {
			c.report(Object{Pack, p.ID}, ErrLeftover, true)
			continue
		}
		c.packs[p.ID] = p.Size
	}
	for id := range c.opt.Read.only {
		if c.packs[id] == 0 && !index.HasPack(id) {
			c.report(Object{Pack, id}, fmt.Errorf("it was written, but is in no index, or %w", ErrMissing), false)
		}
	}
	packs := c.opt.Read.pick(c.packs)
	chosen := len(packs)
	picked := make(map[backup.ID]bool, chosen)
	for _, p := range packs {
		picked[p.ID] = true
	}
	for id, blobs := range index.Packs() {
		size, ok := c.packs[id]
		if !ok {
			c.bad[id] = &badPack{problem: c.report(Object{Pack, id}, ErrMissing, false), all: true}
			continue
		}
		if !picked[id] && repo.PackSize(blobs) != size {
			packs = append(packs, repo.PackFile{ID: id, Size: size})
		}
	}
	var total int64
	for _, p := range packs {
		total += p.Size
	}
	c.phase(ReadingPacks, total)
	done := c.opt.Read.track(packs[:chosen])
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(c.opt.Workers)
	for i, p := range packs {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := c.readPack(gctx, p); err != nil {
				return err
			}
			if i < chosen {
				done(i)
			}
			c.advance(p.Size)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// readPack verifies every byte of a pack.
func (c *checker) readPack(ctx context.Context, p repo.PackFile) error {
	if c.opt.Read.fresh {
		if err := c.r.Evict(ctx, p.ID); err != nil {
			if err := c.alive(ctx, err); err != nil {
				return err
			}
			c.cached.Do(func() { c.report(Object{Pack, p.ID}, fmt.Errorf("%w: %w", ErrCached, err), true) })
		}
	}
	indexed := c.r.Index().PackBlobs(p.ID)
	lost := map[backup.Blob]bool{}
	blobs := 0
	var first, strange error
	suspect := func(err error) {
		if err != nil && !errors.Is(err, repo.ErrDamaged) {
			strange = err
		}
	}
	whole := c.r.VerifyPack(ctx, p.ID, p.Size, indexed, func(b repo.PackedBlob, err error) {
		blobs++
		if err != nil {
			lost[b.Blob] = true
			first = cmp.Or(first, err)
			suspect(err)
		}
	})
	suspect(whole)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if strange != nil {
		if err := c.alive(ctx, strange); err != nil {
			return err
		}
	}
	if whole == nil && len(lost) == 0 {
		return nil
	}
	err := oneLine(cmp.Or(whole, first))
	if len(lost) > 0 {
		err = fmt.Errorf("%w; %d of %d blobs can't be read", err, len(lost), blobs)
	}
	problem := c.report(Object{Pack, p.ID}, err, false)
	c.mu.Lock()
	c.bad[p.ID] = &badPack{problem: problem, blobs: lost}
	c.mu.Unlock()
	return nil
}

// lookAtTrees reads all trees and finds blobs that no index names.
func (c *checker) lookAtTrees(ctx context.Context) error {
	c.phase(ReadingTrees, 0)
	index := c.r.Index()
	seen := index.NewSet() // data blobs
	return c.r.Walk(ctx, c.roots(), func(id backup.ID, t *backup.Tree, err error) error {
		defer c.advance(1)
		if err != nil {
			return c.badBlob(ctx, backup.Blob{Kind: backup.TreeBlob, ID: id}, err)
		}
		for i := range t.Nodes {
			for _, b := range t.Nodes[i].Content {
				blob := backup.Blob{Kind: backup.DataBlob, ID: b}
				if _, known := seen.Add(blob); known {
					continue
				}
				if err := c.badBlob(ctx, blob, repo.ErrNoBlob); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// badBlob reports a blob once, unless that follows from what was reported of
// its packs.
func (c *checker) badBlob(ctx context.Context, b backup.Blob, err error) error {
	if owners, bad := c.lost(b); bad && len(owners) > 0 {
		return nil
	}
	if err := c.alive(ctx, err); err != nil {
		return err
	}
	c.mu.Lock()
	_, known := c.blobs[b]
	if !known {
		c.blobs[b] = nil
	}
	c.mu.Unlock()
	if known {
		return nil
	}
	kind := DataBlob
	if b.Kind == backup.TreeBlob {
		kind = TreeBlob
	}
	p := c.report(Object{kind, b.ID}, oneLine(err), false)
	c.mu.Lock()
	c.blobs[b] = p
	c.mu.Unlock()
	return nil
}

// lost reports whether no copy of a blob is intact, as far as is known, and
// the problems that this is due to.
func (c *checker) lost(b backup.Blob) (owners []*Problem, bad bool) {
	c.mu.Lock()
	p, known := c.blobs[b]
	c.mu.Unlock()
	if known {
		return []*Problem{p}, true
	}
	found := false
	for loc := range c.r.Index().Lookup(b) {
		found = true
		p, ok := c.bad[loc.Pack]
		if !ok || !p.all && !p.blobs[b] {
			return nil, false
		}
		owners = append(owners, p.problem)
	}
	return owners, found
}

func (c *checker) roots() []backup.ID {
	roots := make([]backup.ID, len(c.snapshots))
	for i, s := range c.snapshots {
		roots[i] = *s.Tree
	}
	return roots
}

// oneLine puts the lines of a joined error into one.
func oneLine(err error) error {
	if !strings.Contains(err.Error(), "\n") {
		return err
	}
	return joined{err}
}

type joined struct{ error }

func (j joined) Error() string { return strings.ReplaceAll(j.error.Error(), "\n", "; ") }

func (j joined) Unwrap() error { return j.error }
