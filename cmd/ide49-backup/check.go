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

func (a *app) checkCommand() *cobra.Command {
	var read string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for damage, and name the files it affects",
		Long: `Looks at the structure of the repository: every snapshot and folder is there and
well-formed, every part of a file is in the index, every pack has its size. With
--read, bytes are read and verified too. Nothing is changed.`,
		Example: `  ide49-backup check
  ide49-backup check --read 5%
  ide49-backup check --read all`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			selection, err := check.ParseSelection(read)
			if err != nil {
				return &usageError{fmt.Errorf("--read: %w", err)}
			}
			cfg, err := a.config()
			if err != nil {
				return err
			}
			p, err := a.place(cfg, a.repoName)
			if err != nil {
				return err
			}
			return a.withRepository(cmd.Context(), p, access{}, func(ctx context.Context, s *session) error {
				return a.check(ctx, s, selection)
			})
		},
	}
	cmd.Flags().StringVar(&read, "read", "", "verify the bytes of a `part` too: a share as 5%, a part as 3/10, or all")
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

func (a *app) check(ctx context.Context, s *session, selection check.Selection) error {
	problems, failure := a.findDamage(ctx, s, selection)
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
