package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/check"
)

type repairFlags struct {
	dryRun, yes  bool
	all          bool // index
	dropHopeless bool // snapshots
}

func (a *app) repairCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "Mend what can be mended of a damaged repository",
		Long: `Mends a damaged repository in three steps, each of which says beforehand what is
lost, file by file: first the index, then packs, then snapshots. Between the
second and the third, a backup heals what the volumes still have.`,
		Example: `  ide49-backup repair index
  ide49-backup repair packs
  ide49-backup backup
  ide49-backup repair snapshots`,
		Args: cobra.ArbitraryArgs,
		RunE: group,
	}
	cmd.AddCommand(
		a.repairVerb("index", "Make the index anew from what the packs say", func(fl *cobra.Command, f *repairFlags) {
			fl.Flags().BoolVar(&f.all, "all", false, "read the headers of all packs, not only of those that look wrong")
		}, cobra.NoArgs, a.repairIndex),
		a.repairVerb("packs [PACK…]", "Save what is intact in damaged packs", func(*cobra.Command, *repairFlags) {}, cobra.ArbitraryArgs, a.repairPacks),
		a.repairVerb("snapshots", "Take out of snapshots what is lost for good", func(fl *cobra.Command, f *repairFlags) {
			fl.Flags().BoolVar(&f.dropHopeless, "drop-hopeless", false, "remove snapshots of which nothing can be saved")
		}, cobra.NoArgs, a.repairSnapshots),
	)
	return cmd
}

func (a *app) repairVerb(use, short string, flags func(*cobra.Command, *repairFlags), args cobra.PositionalArgs,
	do func(context.Context, *session, repairFlags, []string) error) *cobra.Command {
	var f repairFlags
	cmd := &cobra.Command{
		Use:               use,
		Short:             short,
		Long:              short + ". Shows first what will be lost, and asks on a terminal.",
		Args:              positional(args),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withConfigured(cmd.Context(), access{alone: true}, func(ctx context.Context, s *session) error {
				if err := do(ctx, s, f, args); err != nil {
					return fmt.Errorf("repair %s: %w", s.place, err)
				}
				return nil
			})
		},
	}
	cmd.Example = "  ide49-backup repair " + cmd.Name() + " --dry-run\n  ide49-backup repair " + cmd.Name()
	cmd.Flags().BoolVarP(&f.dryRun, "dry-run", "n", false, "show what would be done and lost")
	cmd.Flags().BoolVarP(&f.yes, "yes", "y", false, "don't ask")
	flags(cmd, &f)
	return cmd
}

// A repairReport is what is shown of a plan before it is carried out.
type repairReport struct {
	Repair  string       `json:"repair"`
	DryRun  bool         `json:"dry_run"`
	Actions []string     `json:"actions"`
	Lost    []damageLine `json:"lost"`
	More    bool         `json:"more,omitempty"`
}

// repair shows a plan and carries it out, unless it is empty or not wanted.
func (a *app) repair(ctx context.Context, f repairFlags, what string, empty bool, actions []string, loss check.Loss, execute func() error) error {
	rep := repairReport{Repair: what, DryRun: f.dryRun, Actions: actions, Lost: []damageLine{}}
	files, more := loss.Files()
	rep.More = more
	for _, file := range files {
		rep.Lost = append(rep.Lost, damageLine{file.Snapshot.String(), file.Path})
	}
	if a.json {
		if rep.Actions == nil {
			rep.Actions = []string{}
		}
		if err := a.printJSON(rep); err != nil {
			return err
		}
	} else {
		for _, line := range actions {
			fmt.Fprintln(a.stdout, printable(line))
		}
		for _, l := range rep.Lost {
			fmt.Fprintf(a.stdout, "  lost: %s %s\n", l.Snapshot[:8], printable(l.Path))
		}
		if more {
			fmt.Fprintln(a.stdout, "  and more")
		}
	}
	switch {
	case empty:
		a.say("%s: nothing to repair", what)
		return nil
	case f.dryRun:
		a.say("nothing was changed")
		return nil
	}
	if err := a.confirm(ctx, f.yes, "Repair this?"); err != nil {
		return err
	}
	if err := execute(); err != nil {
		return err
	}
	a.say("%s: repaired; run `ide49-backup check`", what)
	return nil
}

func (a *app) repairIndex(ctx context.Context, s *session, f repairFlags, _ []string) error {
	plan, err := check.PlanIndex(ctx, s.repo, f.all)
	if err != nil {
		return err
	}
	var actions []string
	for _, id := range plan.Damaged {
		actions = append(actions, fmt.Sprintf("remove the damaged index file %s", id.Short()))
	}
	for _, p := range plan.Add {
		actions = append(actions, fmt.Sprintf("add pack %s with %s", p.ID.Short(), count(p.Blobs, "blob", "blobs")))
	}
	for _, p := range plan.Correct {
		actions = append(actions, fmt.Sprintf("correct what is said of pack %s", p.ID.Short()))
	}
	for _, id := range plan.Drop {
		actions = append(actions, fmt.Sprintf("drop pack %s, which is missing", id.Short()))
	}
	for _, p := range plan.Left {
		actions = append(actions, fmt.Sprintf("leave pack %s, which no index names and whose header is damaged: %v", p.ID.Short(), p.Err))
	}
	return a.repair(ctx, f, "index", plan.Empty(), actions, plan.Loss, func() error { return plan.Execute(ctx) })
}

func (a *app) repairPacks(ctx context.Context, s *session, f repairFlags, args []string) error {
	packs, err := a.damagedPacks(ctx, s, args)
	if err != nil {
		return err
	}
	plan, err := check.PlanPacks(ctx, s.repo, packs)
	if err != nil {
		return err
	}
	var actions []string
	for _, p := range plan.Packs {
		actions = append(actions, fmt.Sprintf("replace pack %s: %d of %s are intact", p.ID.Short(), p.Blobs, count(p.Blobs+p.Lost, "blob", "blobs")))
	}
	return a.repair(ctx, f, "packs", len(plan.Packs) == 0, actions, plan.Loss, func() error { return plan.Execute(ctx) })
}

// damagedPacks returns the packs of the given names, or without any all those
// that reading the whole repository finds damaged.
func (a *app) damagedPacks(ctx context.Context, s *session, args []string) ([]backup.ID, error) {
	var packs []backup.ID
	for _, name := range args {
		id, err := backup.ParseID(name)
		if err != nil {
			return nil, usagef("pack %q: give all 64 digits of its name, as `ide49-backup check --json` prints it: %w", name, err)
		}
		packs = append(packs, id)
	}
	if len(args) > 0 {
		return packs, nil
	}
	problems, err := a.findDamage(ctx, s, check.All())
	for _, p := range problems {
		if p.Object.Kind == check.Pack && !p.Harmless {
			packs = append(packs, p.Object.ID)
		}
	}
	return packs, err
}

func (a *app) repairSnapshots(ctx context.Context, s *session, f repairFlags, _ []string) error {
	plan, err := check.PlanSnapshots(ctx, s.repo)
	if err != nil {
		return err
	}
	var actions []string
	for _, id := range plan.Mend {
		actions = append(actions, fmt.Sprintf("write snapshot %s anew without what is lost", id.Short()))
	}
	for _, p := range plan.Hopeless {
		verb := "leave"
		if f.dropHopeless {
			verb = "remove"
		}
		actions = append(actions, fmt.Sprintf("%s snapshot %s, of which nothing can be saved: %v", verb, p.Object.ID.Short(), p.Err))
	}
	empty := len(plan.Mend) == 0 && (len(plan.Hopeless) == 0 || !f.dropHopeless)
	return a.repair(ctx, f, "snapshots", empty, actions, plan.Loss, func() error { return plan.Execute(ctx, f.dropHopeless) })
}
