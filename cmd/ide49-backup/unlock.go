package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/repo"
)

func (a *app) unlockCommand() *cobra.Command {
	var all, dryRun bool
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Explain the locks of the repository, and remove stale ones",
		Long: `Tells of each lock who made it, since when, and whether anybody holds it still.
Those that nobody holds are removed: those of processes of this machine that
have ended, and those of others that were not refreshed for half an hour while
this device looked. A lock of somebody else that is new here needs a second look
half an hour later.

--all removes every lock. What others write to the repository meanwhile may be
lost: use it only if you know that nobody does.`,
		Example: `  ide49-backup unlock --dry-run
  ide49-backup unlock
  ide49-backup unlock --all`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.onRepository(cmd.Context(), access{locksToo: true}, func(ctx context.Context, s *session) error {
				var locks []repo.LockState
				var err error
				if dryRun {
					locks, err = s.repo.Locks(ctx)
				} else {
					locks, err = s.repo.Unlock(ctx, all)
				}
				if perr := a.printLocks(locks); perr != nil {
					return perr
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove every lock, also those in use")
	cmd.Flags().BoolVarP(&dryRun, "dry-run", "n", false, "explain only")
	return cmd
}

// onRepository runs fn on the repository that the flags name.
func (a *app) onRepository(ctx context.Context, acc access, fn func(ctx context.Context, s *session) error) error {
	return a.withConfigured(ctx, acc, fn)
}

type lockLine struct {
	ID        string    `json:"id"`
	Time      time.Time `json:"time"`
	Exclusive bool      `json:"exclusive"`
	Host      string    `json:"host"`
	User      string    `json:"user"`
	PID       int       `json:"pid"`
	Error     string    `json:"error,omitempty"`
	Ours      bool      `json:"ours"`
	Stale     bool      `json:"stale"`
	Removed   bool      `json:"removed"`
	Why       string    `json:"why"`
}

func (a *app) printLocks(locks []repo.LockState) error {
	lines := []lockLine{}
	for _, s := range locks {
		l := lockLine{s.ID.String(), s.Lock.Time, s.Lock.Exclusive, s.Lock.Hostname, s.Lock.Username, s.Lock.PID, "", s.Ours, s.Stale, s.Removed, s.Why}
		if s.Err != nil {
			l.Error = s.Err.Error()
		}
		lines = append(lines, l)
	}
	if a.json {
		return a.printJSON(lines)
	}
	if len(locks) == 0 {
		a.say("no locks")
	}
	for _, s := range locks {
		word := "stays  "
		if s.Removed {
			word = "removed"
		}
		a.say("%s  %s", word, printable(s.String()))
	}
	return nil
}
