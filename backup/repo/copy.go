package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
)

// ErrSameRepository says that a repository was to be copied to itself.
var ErrSameRepository = errors.New("both are the same repository")

// copyBatch is how many bytes of plaintext are copied at least, if there are
// that many, before the snapshots that need them are saved: few small packs,
// and not too much to do again.
const copyBatch = 256 << 20

// A CopyObserver is told how a copy goes on. Its functions may be nil.
type CopyObserver struct {
	// Planned is called for each snapshot to be copied, in turn, with the
	// bytes of plaintext that are missing for it.
	Planned func(s *backup.Snapshot, missing uint64)
	// Blob is called with the length of each copied blob's plaintext, from
	// several goroutines.
	Blob func(plain int)
	// Done is called when a snapshot has been copied, with the copy, or
	// with the one that was there already.
	Done func(s, copied *backup.Snapshot, known bool)
}

// A CopyResult counts what a copy did.
type CopyResult struct {
	Copied, Known int    // snapshots that were copied, and that were there
	Blobs         int    // blobs that were copied
	Plain, Stored uint64 // bytes of these, as plaintext and in the packs
}

// Origin returns the ID that a snapshot had when it was first saved: copies
// and changed tags keep it.
func Origin(s *backup.Snapshot) backup.ID {
	if s.Original != nil && !s.Original.IsZero() {
		return *s.Original
	}
	return s.ID
}

// Copy copies snapshots, oldest first, from src to dst, which have different
// master keys: what dst has no blob for is opened, verified, and sealed again
// as it is packed, so that nothing is compressed twice. A copy has the
// snapshot's times, tags and summary, and its Origin as Original; its parent is
// the copy of the parent, if there is one. A snapshot of which dst has a
// copy, or the original, is passed over.
//
// It may be stopped at any moment: what dst holds is complete, and running it
// again copies only what is still missing. A damaged or missing blob in src
// ends it with an error; the snapshots before it are copied.
//
// The chunker polynomials may differ. Blobs are copied as they are, so that
// later backups to dst of the same files find none of their chunks there; a
// repository that is made for copies gets the polynomial of src by InitLike.
//
// The caller holds shared locks on both and has loaded both indexes.
func Copy(ctx context.Context, dst, src *Repo, snapshots []*backup.Snapshot, obs CopyObserver) (CopyResult, error) {
	c := &copying{dst: dst, src: src, obs: obs, seen: map[backup.ID]struct{}{}, wanted: map[backup.Blob]struct{}{}}
	if err := c.run(ctx, snapshots); err != nil {
		return c.result, fmt.Errorf("copy snapshots: %w", err)
	}
	return c.result, nil
}

type copying struct {
	dst, src *Repo
	obs      CopyObserver
	result   CopyResult
	copies   map[backup.ID]*backup.Snapshot // in dst, by origin

	// seen holds the trees of src that dst has, or will have with the
	// current batch, with all below them.
	seen map[backup.ID]struct{}
	// wanted holds the blobs that the batch needs and dst lacks.
	wanted map[backup.Blob]struct{}
	plain  uint64
	batch  []*backup.Snapshot
}

func (c *copying) run(ctx context.Context, snapshots []*backup.Snapshot) error {
	if c.src.cfg.ID == c.dst.cfg.ID {
		return ErrSameRepository
	}
	if err := c.dst.writable(); err != nil {
		return err
	}
	there, err := c.dst.Snapshots(ctx)
	if err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	c.copies = map[backup.ID]*backup.Snapshot{}
	for _, s := range there {
		c.copies[Origin(s)] = s
	}
	sorted := slices.SortedFunc(slices.Values(snapshots), func(a, b *backup.Snapshot) int {
		return cmp.Or(a.Time.Compare(b.Time), slices.Compare(a.ID[:], b.ID[:]))
	})
	// What a snapshot shares with one that dst has need not be looked at.
	// The nearest of the same volume shares most.
	type series struct{ host, volume string }
	bases := map[series]backup.ID{}
	for _, s := range sorted {
		k := series{s.Hostname, s.Volume()}
		if known := c.copies[Origin(s)]; known != nil && *known.Tree == *s.Tree {
			c.result.Known++
			bases[k] = *s.Tree
			if c.obs.Done != nil {
				c.obs.Done(s, known, true)
			}
			continue
		}
		before := c.plain
		if err := c.want(ctx, *s.Tree, bases[k], 0); err != nil {
			err = fmt.Errorf("snapshot %s: %w", s.ID.Short(), err)
			if saveErr := c.save(ctx); saveErr != nil { // those before it
				err = fmt.Errorf("%w (and afterwards: %w)", err, saveErr)
			}
			return err
		}
		if c.obs.Planned != nil {
			c.obs.Planned(s, c.plain-before)
		}
		bases[k] = *s.Tree
		c.batch = append(c.batch, s)
		if c.plain >= copyBatch {
			if err := c.save(ctx); err != nil {
				return err
			}
		}
	}
	return c.save(ctx)
}

// maxCopyDepth bounds the nesting of folders.
const maxCopyDepth = 10_000

// want notes what dst lacks of a tree and all below it. Of base, the same
// folder in a snapshot that dst has, nothing is lacking; it may be zero.
//
// A tree that dst has may come from a copy that was stopped: only what a
// snapshot there names is known to be whole.
func (c *copying) want(ctx context.Context, id, base backup.ID, depth int) error {
	if _, ok := c.seen[id]; ok || id == base {
		return nil
	}
	if depth > maxCopyDepth {
		return fmt.Errorf("tree %s: folders are nested more than %d deep: %w", id.Short(), maxCopyDepth, ErrDamaged)
	}
	tree, err := c.src.Tree(ctx, id)
	if err != nil {
		return err
	}
	var old []backup.Node
	if !base.IsZero() {
		// Without it there is only more to look at.
		if t, err := c.src.Tree(ctx, base); err == nil {
			old = t.Nodes
		}
	}
	for i := range tree.Nodes {
		n := &tree.Nodes[i]
		for len(old) > 0 && old[0].Name < n.Name {
			old = old[1:]
		}
		var was *backup.Node
		if len(old) > 0 && old[0].Name == n.Name {
			was = &old[0]
		}
		if n.Type == backup.Dir {
			var sub backup.ID
			if was != nil {
				sub = was.Subtree
			}
			if err := c.want(ctx, n.Subtree, sub, depth+1); err != nil {
				return err
			}
		}
		if was != nil && slices.Equal(was.Content, n.Content) {
			continue
		}
		for _, blob := range n.Content {
			if err := c.wantBlob(backup.Blob{Kind: backup.DataBlob, ID: blob}); err != nil {
				return fmt.Errorf("file %.100q: %w", n.Name, err)
			}
		}
	}
	c.seen[id] = struct{}{}
	return c.wantBlob(backup.Blob{Kind: backup.TreeBlob, ID: id})
}

func (c *copying) wantBlob(b backup.Blob) error {
	if _, ok := c.wanted[b]; ok || c.dst.Index().Has(b) {
		return nil
	}
	n, ok := c.src.Index().PlainLength(b)
	if !ok {
		return fmt.Errorf("%s: %w", b, ErrNoBlob)
	}
	c.wanted[b] = struct{}{}
	c.plain += uint64(n)
	return nil
}

// save copies the blobs of the batch, then saves its snapshots.
func (c *copying) save(ctx context.Context) error {
	if len(c.wanted) > 0 {
		if err := c.dst.Update(ctx, c.copyBlobs); err != nil {
			return err
		}
	}
	clear(c.wanted)
	c.plain = 0
	for _, s := range c.batch {
		copied := *s
		copied.ID = backup.ID{}
		origin := Origin(s)
		copied.Original, copied.Parent = &origin, nil
		if s.Parent != nil {
			if p := c.copies[*s.Parent]; p != nil {
				copied.Parent = &p.ID
			}
		}
		id, err := c.dst.SaveSnapshot(ctx, &copied)
		if err != nil {
			return err
		}
		copied.ID = id
		// A snapshot's copy is also found by the ID that it has in src.
		c.copies[origin], c.copies[s.ID] = &copied, &copied
		c.result.Copied++
		if c.obs.Done != nil {
			c.obs.Done(s, &copied, false)
		}
	}
	c.batch = nil
	return nil
}

// copyBlobs copies what is wanted, pack by pack.
func (c *copying) copyBlobs(ctx context.Context, w *Writer) error {
	packs := map[backup.ID][]PackedBlob{}
	for b := range c.wanted {
		for loc := range c.src.Index().Lookup(b) {
			packs[loc.Pack] = append(packs[loc.Pack], loc.PackedBlob)
			break
		}
	}
	type count struct {
		blobs         int
		plain, stored uint64
	}
	counts := make([]count, max(2, workers()))
	next := make(chan backup.ID)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(next)
		for pack := range packs {
			select {
			case next <- pack:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for i := range counts {
		g.Go(func() error {
			n := &counts[i]
			for pack := range next {
				blobs := packs[pack]
				slices.SortFunc(blobs, func(a, b PackedBlob) int { return cmp.Compare(a.Offset, b.Offset) })
				err := c.src.readBlobs(ctx, pack, blobs, func(b PackedBlob, packed, plain []byte, err error) error {
					if err != nil {
						// There may be an intact copy elsewhere.
						if plain, err = c.src.Blob(ctx, b.Kind, b.ID); err != nil {
							return err
						}
						packed = nil
					}
					stored, err := w.copyBlob(ctx, b, packed, plain)
					if err != nil || stored == 0 {
						return err
					}
					n.blobs++
					n.plain += uint64(len(plain))
					n.stored += uint64(stored)
					if c.obs.Blob != nil {
						c.obs.Blob(len(plain))
					}
					return nil
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	for _, n := range counts {
		c.result.Blobs += n.blobs
		c.result.Plain += n.plain
		c.result.Stored += n.stored
	}
	return err
}

// copyBlob stores a blob of another repository as it is packed there, if it is
// compressed there, and else as this one does. It returns the bytes that it
// takes, or 0 if it was there.
func (w *Writer) copyBlob(ctx context.Context, b PackedBlob, packed, plain []byte) (int, error) {
	if !w.claim(b.Blob) {
		return 0, nil
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if packed == nil || !b.Compressed() {
		return w.pack(ctx, b.Blob, plain)
	}
	return w.place(ctx, PackedBlob{Blob: b.Blob, Plain: b.Plain}, packed)
}
