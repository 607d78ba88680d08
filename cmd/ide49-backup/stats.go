package main

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/browse"
)

func (a *app) statsCommand() *cobra.Command {
	var runs bool
	cmd := &cobra.Command{
		Use:   "stats",
		Short: "Show sizes, deduplication, compression and growth",
		Long: `Shows how much the snapshots hold (the sum of their files), how much of that is
different, how much space it takes in the repository, and what each volume added.`,
		Example:           "  ide49-backup stats\n  ide49-backup stats --runs\n  ide49-backup stats --json",
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&runs, "runs", false, "show what each snapshot added")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := a.config()
		if err != nil {
			return err
		}
		p, err := a.place(cfg, a.repoName)
		if err != nil {
			return err
		}
		return a.withRepository(cmd.Context(), p, access{readOnly: true, brief: true, index: true}, func(ctx context.Context, s *session) error {
			st, err := browse.New(s.repo, browse.Options{}).Stats(ctx, s.snapshots)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(newStatistics(s.place, st, cfg.Location()))
			}
			return a.printStats(s.place, st, runs, cfg.Location())
		})
	}
	return cmd
}

type statistics struct {
	Repository  string             `json:"repository"`
	Snapshots   int                `json:"snapshots"`
	Logical     uint64             `json:"bytes_logical"` // of the files in all snapshots
	Unique      uint64             `json:"bytes_unique"`  // of all blobs, before compression
	Stored      uint64             `json:"bytes_stored"`  // of all blobs in packs
	Blobs       int                `json:"blobs"`
	Packs       int                `json:"packs"`
	Dedup       float64            `json:"deduplication_ratio"` // logical by unique
	Compression float64            `json:"compression_ratio"`   // unique by stored
	Volumes     []volumeStatistics `json:"volumes"`
}

type volumeStatistics struct {
	Device string         `json:"device"`
	Volume string         `json:"volume"`
	Runs   []runStatistic `json:"runs"`
}

type runStatistic struct {
	Snapshot string    `json:"snapshot"`
	Time     time.Time `json:"time"`
	Files    uint64    `json:"files"`
	Bytes    uint64    `json:"bytes"`
	Added    uint64    `json:"bytes_added"`
	Stored   uint64    `json:"bytes_stored"`
	// Computed says that the snapshot does not tell what it added: it is what
	// no older one holds.
	Computed bool `json:"computed,omitempty"`
}

func newStatistics(p place, st *browse.Stats, loc *time.Location) statistics {
	out := statistics{
		Repository: p.String(), Snapshots: st.Snapshots, Logical: st.Logical, Unique: st.Plain, Stored: st.Stored, Blobs: st.Blobs, Packs: st.Packs,
		Dedup: hundredths(st.Deduplication()), Compression: hundredths(st.Compression()), Volumes: []volumeStatistics{},
	}
	for _, v := range st.Volumes {
		vs := volumeStatistics{Device: v.Host, Volume: v.Volume}
		for _, r := range v.Runs {
			vs.Runs = append(vs.Runs, runStatistic{r.ID.String(), r.Time.In(loc), r.Files, r.Bytes, r.Added, r.Stored, r.Computed})
		}
		out.Volumes = append(out.Volumes, vs)
	}
	return out
}

func hundredths(f float64) float64 { return math.Round(f*100) / 100 }

func (a *app) printStats(p place, st *browse.Stats, runs bool, loc *time.Location) error {
	t := newTable("Device", "Volume", ">Snapshots", ">Files", ">Newest", ">Added", ">Stored")
	for _, v := range st.Volumes {
		newest := v.Runs[len(v.Runs)-1]
		added, stored := v.Added()
		t.add(v.Host, v.Volume, fmt.Sprint(len(v.Runs)), fmt.Sprint(newest.Files), bytesText(newest.Bytes), bytesText(added), bytesText(stored))
	}
	if err := t.print(a, ""); err != nil {
		return err
	}
	for _, v := range st.Volumes {
		if !runs {
			break
		}
		a.say("\n%s of %s", printable(v.Volume), printable(v.Host))
		t := newTable("Snapshot", "Time", ">Files", ">Size", ">Added", ">Stored")
		for _, r := range v.Runs {
			t.add(r.ID.Short(), clock(r.Time, loc), fmt.Sprint(r.Files), bytesText(r.Bytes), bytesText(r.Added), bytesText(r.Stored))
		}
		if err := t.print(a, "  "); err != nil {
			return err
		}
	}
	a.say("")
	a.say("%s in %s", count(st.Snapshots, "snapshot", "snapshots"), printable(p.String()))
	a.say("all snapshots    %11s", bytesText(st.Logical))
	a.say("different        %11s  deduplication %.2f : 1", bytesText(st.Plain), st.Deduplication())
	a.say("stored           %11s  compression %.2f : 1, in %s and %s", bytesText(st.Stored), st.Compression(),
		count(st.Packs, "pack", "packs"), count(st.Blobs, "blob", "blobs"))
	return nil
}
