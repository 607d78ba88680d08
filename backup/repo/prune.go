package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

// PruneOptions say how much work a prune may be. The zero value deletes packs
// without any use and rewrites nothing else.
type PruneOptions struct {
	// MaxUnused is how much room unused blobs may keep taking in packs that
	// hold used ones too.
	MaxUnused Unused
	// MaxRepack bounds the bytes of packs that are rewritten; negative means
	// no bound.
	MaxRepack int64
	// RepackSmall merges packs below three quarters of the pack size.
	RepackSmall bool
	// RepackUncompressed compresses what an older program stored as it was.
	// It reads a sample of packs without compression to see if that helps.
	RepackUncompressed bool
}

// Unused is an amount of room that need not be reclaimed. The zero value is 5
// percent.
type Unused struct {
	set     bool
	percent float64
	bytes   int64 // used if percent is 0
}

// UnusedPercent is a share of the size of the repository after the prune.
func UnusedPercent(p float64) Unused { return Unused{set: true, percent: p} }

// UnusedBytes is an amount in bytes.
func UnusedBytes(n int64) Unused { return Unused{set: true, bytes: n} }

// ParseUnused reads a share such as "5%", a number of bytes with or without
// the suffix K, M, G or T (powers of 1024), or "unlimited".
func ParseUnused(text string) (Unused, error) {
	bad := fmt.Errorf("%q is no amount of unused space: use a share like 5%%, a size like 500M, or unlimited", text)
	if text == "unlimited" {
		return UnusedBytes(math.MaxInt64), nil
	}
	if share, ok := strings.CutSuffix(text, "%"); ok {
		p, err := strconv.ParseFloat(share, 64)
		if err != nil || !(p >= 0 && p < 100) {
			return Unused{}, bad
		}
		return UnusedPercent(p), nil
	}
	digits, unit := text, uint64(1)
	for i, suffix := range "KMGT" {
		if d, ok := strings.CutSuffix(text, string(suffix)); ok {
			digits, unit = d, 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseUint(digits, 10, 62)
	if err != nil || n > math.MaxInt64/unit {
		return Unused{}, bad
	}
	return UnusedBytes(int64(n * unit)), nil
}

// of returns the allowed bytes beside used ones.
func (u Unused) of(used int64) int64 {
	switch {
	case !u.set:
		return UnusedPercent(5).of(used)
	case u.percent > 0:
		return int64(u.percent / (100 - u.percent) * float64(used))
	}
	return u.bytes
}

// A PackUse says how much of a pack is in use. Sizes are bytes; Used and
// Unused are those of its sealed blobs.
type PackUse struct {
	PackFile
	Used, Unused           int64
	UsedBlobs, UnusedBlobs int
}

// A RepackReason says why a pack is rewritten.
type RepackReason string

// The reasons to rewrite a pack.
const (
	PartlyUnused RepackReason = "partly unused"
	Small        RepackReason = "small"
	Uncompressed RepackReason = "not compressed"
	Mixed        RepackReason = "mixes folders and data"
)

// A Repack is a pack to be rewritten.
type Repack struct {
	PackUse
	Reason RepackReason
}

// A PruneSum adds up packs. Bytes is their files' size.
type PruneSum struct {
	Packs         int
	Bytes         int64
	Used, Unused  int64 // bytes of blobs
	Blobs, Copies int   // used blobs, and further copies of them
}

// A PrunePlan says what a prune does. Lists are sorted by name, but for Repack,
// whose order is that of the work.
type PrunePlan struct {
	Snapshots int         // that were looked at
	Leftover  []PackFile  // packs in no index
	Absent    []backup.ID // packs that an index names and that are gone, none of them used
	Delete    []PackUse   // packs of which nothing is used
	Repack    []Repack
	Keep      PruneSum
	Skipped   int // packs that would be rewritten but for MaxRepack
	// Freed is what is surely freed in bytes; compression may free more.
	Freed int64

	r     *Repo
	index *Index
	keep  *BlobSet // by entry: the copy of each used blob that stays
	merge bool     // there are many small index files
}

// Empty reports whether there is nothing to do.
func (p *PrunePlan) Empty() bool {
	return len(p.Leftover)+len(p.Absent)+len(p.Delete)+len(p.Repack) == 0 && !p.merge
}

// PlanPrune finds out what of the repository no snapshot uses, and decides
// what to do about it. It changes nothing in the store, and loads the index
// anew. It fails with ErrDamaged if it can't be known what is used: nothing may
// be deleted then.
//
// The caller holds an exclusive lock, from before PlanPrune until Execute has
// ended. Memory is the index, two bits a blob, and the list of packs.
func (r *Repo) PlanPrune(ctx context.Context, opt PruneOptions) (*PrunePlan, error) {
	p, err := r.planPrune(ctx, opt)
	if err != nil {
		return nil, fmt.Errorf("plan prune: %w", err)
	}
	return p, nil
}

func (r *Repo) planPrune(ctx context.Context, opt PruneOptions) (*PrunePlan, error) {
	if err := r.writable(); err != nil {
		return nil, err
	}
	snapshots, err := r.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.LoadIndex(ctx); err != nil {
		return nil, err
	}
	x := r.Index()
	used, err := r.Used(ctx, snapshots)
	if err != nil {
		return nil, err
	}
	p := &PrunePlan{Snapshots: len(snapshots), r: r, index: x, keep: x.NewSet()}
	files := map[backup.ID]int64{}
	for f, err := range r.PackFiles(ctx) {
		if err != nil {
			return nil, err
		}
		if !x.HasPack(f.ID) {
			p.Leftover = append(p.Leftover, f)
			p.Freed += f.Size
			continue
		}
		files[f.ID] = f.Size
	}
	slices.SortFunc(p.Leftover, func(a, b PackFile) int { return slices.Compare(a.ID[:], b.ID[:]) })
	tallies, err := r.tally(ctx, x, used, p.keep, files)
	if err != nil {
		return nil, err
	}
	if err := p.decide(ctx, tallies, opt); err != nil {
		return nil, err
	}
	small := len(x.Files()) - x.Len()/maxIndexBlobs
	p.merge = small > 16
	return p, nil
}

// A tally is what is known of the use of one pack.
type tally struct {
	PackUse
	present, sound bool
	copies         int64 // bytes of used blobs that are elsewhere too
	copiesN        int
	trees, data    bool
	plain          bool // has blobs that are not compressed
}

// tally counts what is used in each pack, and marks in keep the entries of the
// copies that stay. Of several copies, that in the pack with the greatest share
// of used blobs stays: after an interrupted prune, that in the new pack.
func (r *Repo) tally(ctx context.Context, x *Index, used, keep *BlobSet, files map[backup.ID]int64) (map[backup.ID]*tally, error) {
	tallies := make(map[backup.ID]*tally, len(files))
	copies := map[uint32][]uint32{} // of a blob that is used, by its number
	for _, run := range x.runs {
		t := tallies[run.pack]
		if t == nil {
			t = &tally{PackUse: PackUse{PackFile: PackFile{ID: run.pack}}}
			t.Size, t.present = files[run.pack]
			tallies[run.pack] = t
		}
		for i := run.first; i < run.first+run.n; i++ {
			b := x.entry(i).blob()
			t.trees = t.trees || b.Kind == backup.TreeBlob
			t.data = t.data || b.Kind == backup.DataBlob
			t.plain = t.plain || !b.Compressed()
			number, several := uint32(0), 0
			x.probe(b.Blob, func(k uint32) bool {
				if several++; several == 1 {
					number = k
				}
				return several < 2
			})
			switch {
			case !used.get(number):
				t.Unused += int64(b.Length)
				t.UnusedBlobs++
			case several == 1:
				keep.set(i)
				t.Used += int64(b.Length)
				t.UsedBlobs++
			default:
				copies[number] = append(copies[number], i)
				t.copies += int64(b.Length)
				t.copiesN++
			}
		}
	}
	for _, id := range sortedIDs(tallies) {
		t := tallies[id]
		var err error
		if t.sound, err = r.soundSize(ctx, t); err != nil {
			return nil, err
		}
	}
	share := func(t *tally) float64 {
		if !t.sound {
			return -1
		}
		return float64(t.Used+t.copies) / float64(t.Used+t.copies+t.Unused)
	}
	shares := make(map[backup.ID]float64, len(tallies))
	for id, t := range tallies {
		shares[id] = share(t)
	}
	for _, entries := range copies {
		best := slices.MaxFunc(entries, func(a, b uint32) int {
			p, q := tallies[x.packOf(a)], tallies[x.packOf(b)]
			return cmp.Or(cmp.Compare(shares[p.ID], shares[q.ID]), cmp.Compare(p.Size, q.Size), slices.Compare(q.ID[:], p.ID[:]), cmp.Compare(b, a))
		})
		keep.set(best)
		for _, i := range entries {
			t, n := tallies[x.packOf(i)], int64(x.entry(i).blob().Length)
			if i == best {
				t.Used += n
				t.UsedBlobs++
			} else {
				t.Unused += n
				t.UnusedBlobs++
			}
		}
	}
	for _, id := range sortedIDs(tallies) {
		switch t := tallies[id]; {
		case t.UsedBlobs == 0 || t.sound:
		case !t.present:
			return nil, fmt.Errorf("pack %s, of which %d blobs are needed, is missing: %w", id.Short(), t.UsedBlobs, ErrDamaged)
		default:
			return nil, fmt.Errorf("pack %s, of which %d blobs are needed, is not as the index says: %w", id.Short(), t.UsedBlobs, ErrDamaged)
		}
	}
	return tallies, nil
}

// soundSize reports whether a pack is there with the size that the index, or
// its own header, tells.
func (r *Repo) soundSize(ctx context.Context, t *tally) (bool, error) {
	if !t.present {
		return false, nil
	}
	blobs := r.Index().PackBlobs(t.ID)
	if PackSize(blobs) == t.Size {
		return true, nil
	}
	header, err := r.ReadHeader(ctx, t.ID, t.Size)
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return err == nil && containsAll(header, blobs), nil
}

// decide sorts packs into those to delete, to rewrite and to keep.
func (p *PrunePlan) decide(ctx context.Context, tallies map[backup.ID]*tally, opt PruneOptions) error {
	var must, partly, small, keep []*tally
	target := int64(p.r.opt.PackSize)
	usedBytes, unusedBytes := int64(0), int64(0)
	for _, id := range sortedIDs(tallies) {
		t := tallies[id]
		switch {
		case t.UsedBlobs == 0 && !t.present:
			p.Absent = append(p.Absent, id)
			continue
		case t.UsedBlobs == 0:
			p.Delete = append(p.Delete, t.PackUse)
			p.Freed += t.Size
			continue
		}
		usedBytes += t.Used
		switch {
		case t.trees && t.data:
			must = append(must, t)
		case t.UnusedBlobs > 0:
			partly = append(partly, t)
		case opt.RepackSmall && t.Size < target/4*3:
			small = append(small, t)
		default:
			keep = append(keep, t)
		}
	}
	left := opt.MaxRepack
	repack := func(t *tally, reason RepackReason) {
		if opt.MaxRepack >= 0 && t.Size > left {
			p.Skipped++
			keep = append(keep, t)
			return
		}
		left -= t.Size
		p.Repack = append(p.Repack, Repack{t.PackUse, reason})
		p.Freed += t.Unused + int64(t.UnusedBlobs)*plainEntry
	}
	// What frees most for the least work comes first.
	slices.SortStableFunc(partly, func(a, b *tally) int {
		return cmp.Compare(float64(b.Unused)/float64(b.Size), float64(a.Unused)/float64(a.Size))
	})
	for _, t := range partly {
		unusedBytes += t.Unused
	}
	allowed := opt.MaxUnused.of(usedBytes)
	for _, t := range partly {
		if unusedBytes <= allowed {
			keep = append(keep, t)
			continue
		}
		unusedBytes -= t.Unused
		repack(t, PartlyUnused)
	}
	for _, t := range must {
		repack(t, Mixed)
	}
	for _, trees := range []bool{false, true} {
		same := slices.Collect(func(yield func(*tally) bool) {
			for _, t := range small {
				if t.trees == trees && !yield(t) {
					return
				}
			}
		})
		var sum int64
		for _, t := range same {
			sum += t.Size
		}
		// Only if there will be fewer, with one unfinished for each packer.
		if open := p.r.opt.DataPacks; int64(len(same)) <= sum/target+int64(open) {
			keep = append(keep, same...)
			continue
		}
		for _, t := range same {
			repack(t, Small)
		}
	}
	if opt.RepackUncompressed {
		kept := keep
		keep = nil
		for _, t := range kept {
			shrinks := false
			var err error
			if t.plain {
				if shrinks, err = p.r.wouldShrink(ctx, t.ID); err != nil {
					return err
				}
			}
			if shrinks {
				repack(t, Uncompressed)
			} else {
				keep = append(keep, t)
			}
		}
	}
	for _, t := range keep {
		p.Keep.Packs++
		p.Keep.Bytes += t.Size
		p.Keep.Used += t.Used
		p.Keep.Unused += t.Unused
		p.Keep.Blobs += t.UsedBlobs
		p.Keep.Copies += t.copiesN
	}
	return nil
}

// wouldShrink tries a few of a pack's blobs that are not compressed.
func (r *Repo) wouldShrink(ctx context.Context, pack backup.ID) (bool, error) {
	const tries = 8
	plain := slices.DeleteFunc(r.Index().PackBlobs(pack), func(b PackedBlob) bool { return b.Compressed() })
	if slices.ContainsFunc(plain, func(b PackedBlob) bool { return b.Kind == backup.TreeBlob }) {
		return true, nil // the format wants trees compressed
	}
	for i := range min(tries, len(plain)) {
		b := plain[i*len(plain)/min(tries, len(plain))]
		shrinks := false
		err := r.ReadBlobs(ctx, pack, []PackedBlob{b}, func(_ PackedBlob, data []byte, err error) error {
			if err == nil {
				_, shrinks = r.zip.compress(nil, b.Kind, data)
			}
			return nil // damage is found when it is rewritten
		})
		if err != nil || shrinks {
			return shrinks, err
		}
	}
	return false, nil
}

// PruneProgress says how far Execute is, in packs and bytes.
type PruneProgress struct {
	Deleted, ToDelete  int   // packs without use
	Repacked, ToRepack int64 // bytes of packs that are rewritten
	DeletedBytes       int64 // of all packs that are gone
	Written            int64 // of new packs
}

// ErrPlanStale says that the repository is not as it was when a plan was made.
var ErrPlanStale = errors.New("the repository has changed since the plan was made; plan again")

// batchSize is the least bytes of packs that are rewritten before their old
// packs are deleted and the next are taken.
const batchSize = 1 << 30

// Execute does what the plan says. Unused packs go first, which takes no more
// room than one index file; then others are rewritten, some at a time, so that
// room for about a gibibyte is enough. When it is interrupted, at any moment,
// nothing that a snapshot needs is missing, and a new plan takes up where this
// one ended. progress, if not nil, is called one call at a time.
//
// The order is: new packs durable, new index durable, old index gone, old packs
// gone. Each blob that is moved is verified; one that is damaged, with no
// intact copy, ends the prune with ErrDamaged before its pack is deleted.
func (p *PrunePlan) Execute(ctx context.Context, progress func(PruneProgress)) (PruneProgress, error) {
	e := &pruning{PrunePlan: p, report: progress}
	e.now.ToDelete = len(p.Leftover) + len(p.Delete)
	for _, t := range p.Repack {
		e.now.ToRepack += t.Size
	}
	err := e.run(ctx)
	if err != nil {
		err = fmt.Errorf("prune: %w", err)
	}
	return e.now, err
}

type pruning struct {
	*PrunePlan
	report func(PruneProgress)

	mu    sync.Mutex
	sizes map[backup.ID]int64
	now   PruneProgress
}

func (e *pruning) tell(change func(*PruneProgress)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.now)
	if e.report != nil {
		e.report(e.now)
	}
}

func (e *pruning) run(ctx context.Context) error {
	r := e.r
	if r.Index() != e.index {
		return ErrPlanStale
	}
	// Packs that no index names can go at once, which makes room for the
	// new index on a full disk.
	e.sizes = map[backup.ID]int64{}
	var leftover, unused []backup.ID
	for _, f := range e.Leftover {
		leftover = append(leftover, f.ID)
		e.sizes[f.ID] = f.Size
	}
	for _, f := range e.Delete {
		unused = append(unused, f.ID)
		e.sizes[f.ID] = f.Size
	}
	for _, f := range e.Repack {
		e.sizes[f.ID] = f.Size
	}
	counted := func(n *PruneProgress) { n.Deleted++ }
	if err := e.delete(ctx, leftover, counted); err != nil {
		return err
	}
	if drop := slices.Concat(unused, e.Absent); len(drop) > 0 || e.merge {
		if err := r.ChangeIndex(ctx, IndexChange{Drop: drop}); err != nil {
			return err
		}
		if err := e.delete(ctx, unused, counted); err != nil {
			return err
		}
	}
	limit := max(batchSize, e.now.ToRepack/8)
	for todo := e.Repack; len(todo) > 0; {
		n, size := 0, int64(0)
		for n < len(todo) && (n == 0 || size+todo[n].Size <= limit) {
			size += todo[n].Size
			n++
		}
		if err := e.repack(ctx, todo[:n]); err != nil {
			return err
		}
		todo = todo[n:]
	}
	// Free the old index before the new one is loaded.
	e.index, e.keep = nil, nil
	r.index.Store(NewIndex())
	return r.LoadIndex(ctx)
}

func (e *pruning) delete(ctx context.Context, packs []backup.ID, count func(*PruneProgress)) error {
	return e.r.deleteAll(ctx, backend.Packs, packs, func(id backup.ID) {
		e.tell(func(n *PruneProgress) {
			count(n)
			n.DeletedBytes += e.sizes[id]
		})
	})
}

// repack writes the used blobs of packs into new ones and deletes the old.
func (e *pruning) repack(ctx context.Context, packs []Repack) error {
	r := e.r
	before := e.now.Written
	var writer *Writer
	err := r.Update(ctx, func(ctx context.Context, w *Writer) error {
		writer = w
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(max(2, workers()))
		for _, p := range packs {
			if gctx.Err() != nil {
				break
			}
			g.Go(func() error {
				if err := e.move(gctx, w, p); err != nil {
					return err
				}
				e.tell(func(n *PruneProgress) {
					n.Repacked += p.Size
					n.Written = before + int64(w.Written())
				})
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	old := make([]backup.ID, len(packs))
	for i, p := range packs {
		old[i] = p.ID
	}
	if err := r.ChangeIndex(ctx, IndexChange{Drop: old}); err != nil {
		return err
	}
	return e.delete(ctx, old, func(n *PruneProgress) { n.Written = before + int64(writer.Written()) })
}

// move copies the used blobs of a pack into a new one.
func (e *pruning) move(ctx context.Context, w *Writer, p Repack) error {
	blobs := e.index.kept(p.ID, e.keep)
	var copied, scratch []byte
	return e.r.readSealed(ctx, p.ID, blobs, verifyPiece, func(b PackedBlob, sealed []byte, err error) error {
		var plain []byte
		if err == nil {
			copied = append(copied[:0], sealed...)
			if b.Compressed() && cap(scratch) < int(b.Plain) {
				scratch = make([]byte, 0, b.Plain)
			}
			plain, err = e.r.open(b, copied, scratch)
		}
		if err == nil && p.Reason != Uncompressed {
			// As it is: it need not be compressed and sealed again.
			return w.place(ctx, b, sealed, true)
		}
		if err != nil {
			// There may be an intact copy elsewhere.
			if plain, err = e.r.Blob(ctx, b.Kind, b.ID); err != nil {
				return err
			}
		}
		_, err = w.pack(ctx, b.Blob, plain)
		return err
	})
}

// kept returns the blobs of a pack whose entries are in keep, by offset.
func (x *Index) kept(pack backup.ID, keep *BlobSet) []PackedBlob {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var blobs []PackedBlob
	for _, k := range x.known[pack] {
		run := x.runs[k]
		for i := run.first; i < run.first+run.n; i++ {
			if keep.get(i) {
				blobs = append(blobs, x.entry(i).blob())
			}
		}
	}
	slices.SortFunc(blobs, func(a, b PackedBlob) int { return cmp.Compare(a.Offset, b.Offset) })
	return blobs
}
