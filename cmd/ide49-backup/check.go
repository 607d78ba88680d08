package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/check"
)

// errDamageFound says that a check has found damage, which was printed.
var errDamageFound = errors.New("the repository is damaged")

type checkFlags struct {
	read    string
	written bool
	drill   int
}

func (a *app) checkCommand() *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for damage, and name the files it affects",
		Long: `Looks at the structure of the repository: every snapshot and folder is there and
well-formed, every part of a file is in the index, every pack has its size. With
--read, bytes are read and verified too; a share such as 5% goes on where the
last one ended, so that twenty of them read everything. Nothing is changed.`,
		Example: `  ide49-backup check
  ide49-backup check --read 5%
  ide49-backup check --read all
  ide49-backup check --written
  ide49-backup check --drill 20`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := check.ParseSelection(f.read); err != nil {
				return &usageError{fmt.Errorf("--read: %w", err)}
			}
			if f.written && f.read != "" {
				return usagef("--written and --read exclude each other; give one of them")
			}
			if f.drill < 0 {
				return usagef("--drill %d: give a number of files", f.drill)
			}
			return a.withConfigured(cmd.Context(), access{}, func(ctx context.Context, s *session) error {
				if err := a.check(ctx, s, f); err != nil || f.drill == 0 {
					return err
				}
				return a.drill(ctx, s, f.drill)
			})
		},
	}
	cmd.Flags().StringVar(&f.read, "read", "", "verify the bytes of a `part` too: the next share as 5%, a part as 3/10, or all")
	cmd.Flags().BoolVar(&f.written, "written", false, "read again, from the device, what the last backup wrote")
	cmd.Flags().IntVar(&f.drill, "drill", 0, "restore `N` files at random to a scratch folder and compare them")
	complete(cmd, "read", words("5%", "1/10", "all"))
	return cmd
}

type problemLine struct {
	Kind     check.Kind   `json:"kind"`
	ID       string       `json:"id"`
	Error    string       `json:"error"`
	Harmless bool         `json:"harmless"`
	Files    []damageLine `json:"files"`
	More     bool         `json:"more,omitempty"`
}

type damageLine struct {
	Snapshot string `json:"snapshot"`
	Path     string `json:"path"`
}

func (a *app) check(ctx context.Context, s *session, f checkFlags) error {
	selection, done, err := a.selection(s, f)
	if err != nil {
		return err
	}
	problems, failure := a.findDamage(ctx, s, selection)
	if err := done(); err != nil {
		a.warn("remember how far reading has come: %v", err)
	}
	damage := 0
	lines := []problemLine{}
	for _, p := range problems {
		if !p.Harmless {
			damage++
		}
		l := problemLine{p.Object.Kind, p.Object.ID.String(), p.Err.Error(), p.Harmless, []damageLine{}, p.More}
		for _, f := range p.Files {
			l.Files = append(l.Files, damageLine{f.Snapshot.String(), f.Path})
		}
		lines = append(lines, l)
	}
	if a.json {
		if err := a.printJSON(struct {
			Repository string        `json:"repository"`
			Finished   bool          `json:"finished"`
			Damaged    bool          `json:"damaged"`
			Snapshots  int           `json:"snapshots"`
			Problems   []problemLine `json:"problems"`
		}{s.place.String(), failure == nil, damage > 0, len(s.snapshots), lines}); err != nil {
			return err
		}
	} else {
		for i, p := range problems {
			if p.Harmless && a.quiet {
				continue
			}
			kind := "damage"
			if p.Harmless {
				kind = "harmless"
			}
			fmt.Fprintf(a.stdout, "%s: %s\n", a.paint(a.stdout, yellow, kind), printable(p.String()))
			for _, f := range lines[i].Files {
				fmt.Fprintf(a.stdout, "  affects %s %s\n", f.Snapshot[:8], printable(f.Path))
			}
			if p.More {
				fmt.Fprintln(a.stdout, "  and more")
			}
		}
	}
	switch {
	case failure != nil:
		return fmt.Errorf("check %s: %w", s.place, failure)
	case damage > 0:
		return fmt.Errorf("check %s: %w: %s; copies of what it names are in the volumes or in other repositories; back up again", s.place, errDamageFound, count(damage, "object", "objects"))
	}
	a.say("%s: no damage, %s", printable(s.place.String()), count(len(s.snapshots), "snapshot", "snapshots"))
	return nil
}

func (a *app) findDamage(ctx context.Context, s *session, selection check.Selection) ([]check.Problem, error) {
	quiet := *a
	if a.json {
		quiet.json, quiet.quiet = false, true // one document, no lines before it
	}
	m := quiet.newMeter([]string{string(check.FindingAffects)})
	defer m.stop()
	var current *row
	var phase check.Phase
	var problems []check.Problem
	var failure error
	for p, err := range check.Run(ctx, s.repo, check.Options{Read: selection, Progress: func(p check.Progress) {
		if p.Phase != phase {
			if current != nil {
				current.end()
			}
			phase = p.Phase
			current = m.begin(string(phase), 0)
			current.inBytes, current.inFiles = phase == check.ReadingPacks, false
		}
		current.expect.Store(p.Total)
		current.bytes.Store(p.Done)
		current.read.Store(p.Done)
	}}) {
		if err != nil {
			failure = err
			break
		}
		problems = append(problems, p)
	}
	return problems, failure
}
