package main

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

func (a *app) statsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stats",
		Short: "Show sizes, deduplication and compression",
		Long: `Shows how much the snapshots hold (the sum of their files), how much of that is
different, and how much space it takes in the repository.`,
		Example:           "  ide49-backup stats\n  ide49-backup stats --json",
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			p, err := a.place(cfg, a.repoName)
			if err != nil {
				return err
			}
			return a.withRepository(cmd.Context(), p, access{index: true}, func(ctx context.Context, s *session) error {
				st, err := newStatistics(ctx, s)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(st)
				}
				return st.print(a)
			})
		},
	}
}

type statistics struct {
	Repository  string             `json:"repository"`
	Snapshots   int                `json:"snapshots"`
	Logical     uint64             `json:"bytes_logical"` // of the files in all snapshots
	Unique      uint64             `json:"bytes_unique"`  // of all blobs, before compression
	Stored      uint64             `json:"bytes_stored"`  // of all blobs in packs
	Blobs       uint64             `json:"blobs"`
	Packs       int                `json:"packs"`
	Dedup       float64            `json:"deduplication_ratio"` // logical by unique
	Compression float64            `json:"compression_ratio"`   // unique by stored
	Ratio       float64            `json:"ratio"`               // logical by stored
	Volumes     []volumeStatistics `json:"volumes"`
}

type volumeStatistics struct {
	Device    string `json:"device"`
	Volume    string `json:"volume"`
	Snapshots int    `json:"snapshots"`
	Logical   uint64 `json:"bytes_logical"`
	Files     uint64 `json:"files_newest"`
	Newest    uint64 `json:"bytes_newest"`
	// Added is what the snapshots stored that say so; those of old versions
	// of restic do not.
	Added uint64 `json:"bytes_added"`
}

func newStatistics(ctx context.Context, s *session) (*statistics, error) {
	st := &statistics{Repository: s.place.String(), Snapshots: len(s.snapshots)}
	for _, blobs := range s.repo.Index().Packs() {
		st.Packs++
		for _, b := range blobs {
			st.Blobs++
			st.Unique += uint64(b.PlainLength())
			st.Stored += uint64(b.Length)
		}
	}
	byVolume := map[[2]string]*volumeStatistics{}
	sizes := treeSizes{repo: s.repo, known: map[backup.ID]size{}}
	for _, sn := range s.snapshots { // oldest first
		key := [2]string{sn.Hostname, sn.Volume()}
		v := byVolume[key]
		if v == nil {
			v = &volumeStatistics{Device: key[0], Volume: key[1]}
			byVolume[key] = v
		}
		var sz size
		if sum := sn.Summary; sum != nil {
			sz = size{sum.TotalFilesProcessed, sum.TotalBytesProcessed}
			v.Added += sum.DataAddedPacked
		} else {
			var err error
			if sz, err = sizes.of(ctx, *sn.Tree, 0); err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", sn.ID.Short(), err)
			}
		}
		v.Snapshots++
		v.Files, v.Newest = sz.files, sz.bytes
		v.Logical = plus(v.Logical, sz.bytes)
		st.Logical = plus(st.Logical, sz.bytes)
	}
	st.Volumes = []volumeStatistics{}
	for _, key := range slices.SortedFunc(maps.Keys(byVolume), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		st.Volumes = append(st.Volumes, *byVolume[key])
	}
	st.Dedup, st.Compression, st.Ratio = ratio(st.Logical, st.Unique), ratio(st.Unique, st.Stored), ratio(st.Logical, st.Stored)
	return st, nil
}

// plus adds without running over: sizes come from the repository.
func plus(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

func ratio(a, b uint64) float64 {
	if b == 0 {
		return 1
	}
	return math.Round(float64(a)/float64(b)*100) / 100
}

type size struct{ files, bytes uint64 }

// treeSizes adds up trees, each different one once.
type treeSizes struct {
	repo  *repo.Repo
	known map[backup.ID]size
}

func (t *treeSizes) of(ctx context.Context, id backup.ID, depth int) (size, error) {
	if sz, ok := t.known[id]; ok {
		return sz, nil
	}
	if depth > maxDepth {
		return size{}, fmt.Errorf("folders are nested too deep: %w", repo.ErrDamaged)
	}
	tree, err := t.repo.Tree(ctx, id)
	if err != nil {
		return size{}, err
	}
	var sum size
	for _, n := range tree.Nodes {
		switch n.Type {
		case backup.Dir:
			sub, err := t.of(ctx, n.Subtree, depth+1)
			if err != nil {
				return sum, err
			}
			sum.files, sum.bytes = plus(sum.files, sub.files), plus(sum.bytes, sub.bytes)
		case backup.File:
			sum.files, sum.bytes = plus(sum.files, 1), plus(sum.bytes, n.Size)
		}
	}
	t.known[id] = sum
	return sum, nil
}

func (st *statistics) print(a *app) error {
	t := newTable("Device", "Volume", ">Snapshots", ">Files", ">Newest", ">All snapshots", ">Stored")
	for _, v := range st.Volumes {
		t.add(v.Device, v.Volume, fmt.Sprint(v.Snapshots), fmt.Sprint(v.Files), bytesText(v.Newest), bytesText(v.Logical), bytesText(v.Added))
	}
	if err := t.print(a, ""); err != nil {
		return err
	}
	a.say("")
	a.say("%s in %s", count(st.Snapshots, "snapshot", "snapshots"), printable(st.Repository))
	a.say("all snapshots    %11s", bytesText(st.Logical))
	a.say("different        %11s  deduplication %.2f : 1", bytesText(st.Unique), st.Dedup)
	a.say("stored           %11s  compression %.2f : 1, in %s and %s", bytesText(st.Stored), st.Compression,
		count(st.Packs, "pack", "packs"), count(st.Blobs, "blob", "blobs"))
	a.say("in all                        %.2f : 1", st.Ratio)
	return nil
}
