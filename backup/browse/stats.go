package browse

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/iot49/ide49-backup/backup"
)

// storedBytes returns what all blobs take in packs, in bytes.
func (v *View) storedBytes() uint64 {
	var sum uint64
	for _, blobs := range v.repo.Index().Packs() {
		for _, b := range blobs {
			sum += uint64(b.Length)
		}
	}
	return sum
}

// dataBytes returns the bytes of a file that are not holes.
func (v *View) dataBytes(n *backup.Node) uint64 {
	sum := n.Size
	for _, id := range n.Content {
		if v.isHole(id) {
			size, _ := v.repo.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
			sum -= min(sum, uint64(size))
		}
	}
	return sum
}

// Stats say what a repository holds and how it grew. Sizes are bytes.
type Stats struct {
	Snapshots int
	// Logical is what restoring every snapshot by itself would write.
	Logical uint64
	// Plain is what the distinct blobs hold, and Stored what they take,
	// sealed and mostly compressed. Blobs that no snapshot needs any more
	// count until a prune.
	Plain, Stored uint64
	Blobs, Packs  int
	Volumes       []VolumeStats // sorted by host and name
}

// Deduplication returns how many times more the snapshots hold than the
// repository's distinct blobs; 0 for an empty repository.
func (s *Stats) Deduplication() float64 { return ratio(s.Logical, s.Plain) }

// Compression returns how many times larger the distinct blobs are than what
// they take; 0 for an empty repository.
func (s *Stats) Compression() float64 { return ratio(s.Plain, s.Stored) }

func ratio(a, b uint64) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}

// VolumeStats are those of one volume of one device.
type VolumeStats struct {
	Host, Volume string
	Runs         []Run // oldest first
}

// Added returns what all runs added, as plaintext and as stored.
func (v *VolumeStats) Added() (plain, stored uint64) {
	for _, r := range v.Runs {
		plain, stored = saturate(plain, r.Added), saturate(stored, r.Stored)
	}
	return plain, stored
}

// A Run is what one snapshot holds and added.
type Run struct {
	ID    backup.ID
	Time  time.Time
	Files uint64
	Bytes uint64 // sizes of the files
	// Added is the plaintext of the blobs that were new, and Stored what
	// they take. The summary of the snapshot says so, as it was when it was
	// made; without a summary it is Computed: what no older snapshot that
	// there still is holds.
	Added, Stored uint64
	Computed      bool
}

// Stats looks at snapshots, all of the repository's, oldest first. Where all
// have summaries it reads nothing; else it reads each distinct folder once,
// with about 60 bytes of memory for each blob.
func (v *View) Stats(ctx context.Context, snapshots []*backup.Snapshot) (*Stats, error) {
	st := &Stats{Snapshots: len(snapshots)}
	for _, blobs := range v.repo.Index().Packs() {
		st.Packs++
		st.Blobs += len(blobs)
		for _, b := range blobs {
			st.Plain += uint64(b.PlainLength())
			st.Stored += uint64(b.Length)
		}
	}
	type key struct{ host, volume string }
	volumes := map[key]*VolumeStats{}
	totals := v.NewTotals()
	var seen map[backup.Blob]struct{}
	if slices.ContainsFunc(snapshots, func(s *backup.Snapshot) bool { return s.Summary == nil }) {
		seen = map[backup.Blob]struct{}{}
	}
	for _, s := range snapshots {
		run := Run{ID: s.ID, Time: s.Time}
		if seen != nil {
			var err error
			if run.Added, run.Stored, err = v.grow(ctx, *s.Tree, seen); err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", s.ID.Short(), err)
			}
		}
		if sum := s.Summary; sum != nil {
			run.Files, run.Bytes, run.Added, run.Stored = sum.TotalFilesProcessed, sum.TotalBytesProcessed, sum.DataAdded, sum.DataAddedPacked
		} else {
			run.Computed = true
			total, err := totals.Of(ctx, rootNode(*s.Tree))
			if err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", s.ID.Short(), err)
			}
			run.Files, run.Bytes = total.Files, total.Bytes
		}
		st.Logical = saturate(st.Logical, run.Bytes)
		k := key{s.Hostname, s.Volume()}
		if volumes[k] == nil {
			volumes[k] = &VolumeStats{Host: k.host, Volume: k.volume}
		}
		volumes[k].Runs = append(volumes[k].Runs, run)
	}
	for _, vs := range volumes {
		st.Volumes = append(st.Volumes, *vs)
	}
	slices.SortFunc(st.Volumes, func(a, b VolumeStats) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Volume, b.Volume))
	})
	return st, nil
}

// grow adds what a tree needs to seen and returns the size of what was not
// there.
func (v *View) grow(ctx context.Context, root backup.ID, seen map[backup.Blob]struct{}) (plain, stored uint64, err error) {
	add := func(b backup.Blob) bool {
		if _, ok := seen[b]; ok {
			return false
		}
		seen[b] = struct{}{}
		for loc := range v.repo.Index().Lookup(b) {
			plain += uint64(loc.PlainLength())
			stored += uint64(loc.Length)
			break
		}
		return true
	}
	if !add(backup.Blob{Kind: backup.TreeBlob, ID: root}) {
		return 0, 0, nil
	}
	w := v.entries()
	w.isFolder = func(n *backup.Node) bool {
		_, ok := seen[backup.Blob{Kind: backup.TreeBlob, ID: n.Subtree}]
		return n.Type == backup.Dir && !ok
	}
	w.walk(ctx, "/", rootNode(root), func(path string, n *backup.Node, failed error) verdict {
		if failed != nil {
			err = listError(path, failed)
			return stop
		}
		for _, id := range n.Content {
			add(backup.Blob{Kind: backup.DataBlob, ID: id})
		}
		if n.Type == backup.Dir && !add(backup.Blob{Kind: backup.TreeBlob, ID: n.Subtree}) {
			return pass
		}
		return enter
	})
	return plain, stored, err
}
