package main

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/repo"
)

type pruneFlags struct {
	dryRun               bool
	maxUnused, maxRepack string
	options              repo.PruneOptions
}

func (a *app) pruneCommand() *cobra.Command {
	var f pruneFlags
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Free the space that no snapshot uses",
		Long: `Frees what no snapshot uses any more. Packs without any use go first, which needs
no room; then packs that are mostly unused are rewritten. It can be interrupted
at any moment, and run again. Nothing else uses the repository meanwhile.

On a full disk use --max-repack 0: nothing is rewritten then.`,
		Example: `  ide49-backup prune --dry-run
  ide49-backup prune --max-unused 10% --max-repack 2G
  ide49-backup prune --max-repack 0`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if f.options.MaxUnused, err = repo.ParseUnused(f.maxUnused); err != nil {
				return usagef("--max-unused: %w", err)
			}
			if f.options.MaxRepack, err = parseAmount(f.maxRepack); err != nil {
				return usagef("--max-repack: %w", err)
			}
			return a.withConfigured(cmd.Context(), access{alone: true}, func(ctx context.Context, s *session) error {
				return a.prune(ctx, s, f)
			})
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&f.dryRun, "dry-run", "n", false, "show what would be freed, rewritten and kept")
	fl.StringVar(&f.maxUnused, "max-unused", "5%", "how much unused `space` may stay in packs that are used too: a share, a size, or unlimited")
	fl.StringVar(&f.maxRepack, "max-repack", "unlimited", "rewrite packs of at most this `size` in all")
	fl.BoolVar(&f.options.RepackSmall, "repack-small", false, "merge small packs too")
	fl.BoolVar(&f.options.RepackUncompressed, "repack-uncompressed", false, "compress what an older program stored as it was")
	complete(cmd, "max-unused", words("5%", "0", "unlimited"))
	complete(cmd, "max-repack", words("0", "1G", "unlimited"))
	return cmd
}

// parseAmount reads a number of bytes with or without the suffix K, M, G or T
// (powers of 1024), or unlimited, which gives -1.
func parseAmount(text string) (int64, error) {
	if text == "unlimited" {
		return -1, nil
	}
	digits, unit := text, int64(1)
	if i := len(text) - 1; i >= 0 {
		if power := strings.IndexByte("KMGT", text[i]); power >= 0 {
			digits, unit = text[:i], 1<<(10*(power+1))
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is no size: use one like 500M, or unlimited", text)
	}
	return n * unit, nil
}

type pruneSummary struct {
	DryRun      bool  `json:"dry_run"`
	Snapshots   int   `json:"snapshots"`
	DeletePacks int   `json:"delete_packs"`
	DeleteBytes int64 `json:"delete_bytes"`
	RepackPacks int   `json:"repack_packs"`
	RepackBytes int64 `json:"repack_bytes"`
	KeepPacks   int   `json:"keep_packs"`
	KeepBytes   int64 `json:"keep_bytes"`
	KeepUnused  int64 `json:"keep_unused"`
	Freed       int64 `json:"freed"` // at least
}

func (a *app) prune(ctx context.Context, s *session, f pruneFlags) error {
	plan, err := s.repo.PlanPrune(ctx, f.options)
	if err != nil {
		return fmt.Errorf("prune %s: %w", s.place, err)
	}
	sum := pruneSummary{
		DryRun: f.dryRun, Snapshots: plan.Snapshots, DeletePacks: len(plan.Delete) + len(plan.Leftover), RepackPacks: len(plan.Repack),
		KeepPacks: plan.Keep.Packs, KeepBytes: plan.Keep.Bytes, KeepUnused: plan.Keep.Unused, Freed: plan.Freed,
	}
	for _, p := range plan.Delete {
		sum.DeleteBytes += p.Size
	}
	for _, p := range plan.Leftover {
		sum.DeleteBytes += p.Size
	}
	reasons := map[repo.RepackReason]int{}
	for _, p := range plan.Repack {
		sum.RepackBytes += p.Size
		reasons[p.Reason]++
	}
	if a.json {
		if err := a.printJSON(sum); err != nil {
			return err
		}
	} else if !a.quiet {
		t := newTable("", ">Packs", ">Size", "Why")
		t.add("free", strconv.Itoa(sum.DeletePacks), bytesText(uint64(sum.DeleteBytes)), "no snapshot uses them")
		var why []string
		for _, r := range []repo.RepackReason{repo.PartlyUnused, repo.Mixed, repo.Small, repo.Uncompressed} {
			if n := reasons[r]; n > 0 {
				why = append(why, fmt.Sprintf("%d %s", n, r))
			}
		}
		t.add("rewrite", strconv.Itoa(sum.RepackPacks), bytesText(uint64(sum.RepackBytes)), strings.Join(why, ", "))
		kept := fmt.Sprintf("%s of it unused", bytesText(uint64(sum.KeepUnused)))
		if plan.Skipped > 0 {
			kept += fmt.Sprintf("; %d more would be rewritten but for --max-repack", plan.Skipped)
		}
		t.add("keep", strconv.Itoa(sum.KeepPacks), bytesText(uint64(sum.KeepBytes)), kept)
		if err := t.print(a, ""); err != nil {
			return err
		}
	}
	if f.dryRun {
		a.say("would free at least %s in %s; nothing was changed", bytesText(uint64(sum.Freed)), printable(s.place.String()))
		return nil
	}
	done, err := plan.Execute(ctx, nil)
	if err != nil {
		return fmt.Errorf("prune %s: %w", s.place, err)
	}
	a.say("freed %s in %s", bytesText(uint64(max(0, done.DeletedBytes-done.Written))), printable(s.place.String()))
	return nil
}
