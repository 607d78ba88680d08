package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

func (a *app) copyCommand() *cobra.Command {
	var from, to, toPassword, host string
	cmd := &cobra.Command{
		Use:   "copy --from A --to B [SNAPSHOT…]",
		Short: "Copy snapshots to another repository",
		Long: `Copies snapshots from one repository to another: all, or those that are named by
the first digits of their IDs. What is there already is not copied again, so
that it can be interrupted and repeated. Copies keep their times, tags and the
original's ID.

Blobs are copied as they are. If the repositories cut files differently (their
chunker polynomials differ), later backups to B share nothing with the copies.`,
		Example: `  ide49-backup copy --from local --to drive
  ide49-backup copy --from local --to /mnt/BACKUP/ide49 --volume mosquitto
  ide49-backup copy --from drive --to local 3f2a81c0`,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "`repository` to copy from: its name in the configuration, or a folder")
	f.StringVar(&to, "to", "", "`repository` to copy to")
	f.StringVar(&toPassword, "to-password-file", "", "`file` with the password of --to (--password-file is that of --from)")
	f.StringVar(&host, "host", "", "of this `device` only (default all)")
	volumes := a.volumeFlag(cmd)
	complete(cmd, "from", a.completeRepositories)
	complete(cmd, "to", a.completeRepositories)
	complete(cmd, "to-password-file", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault
	})
	complete(cmd, "host", a.completeHosts)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if from == "" || to == "" {
			return usagef("say from which repository and to which: --from and --to")
		}
		if a.repoName != "" {
			return usagef("copy takes --from and --to, not --repo")
		}
		cfg, err := a.config()
		if err != nil {
			return err
		}
		source, err := a.place(cfg, from)
		if err != nil {
			return err
		}
		other := *a
		other.passwordFile = toPassword
		target, err := other.place(cfg, to)
		if err != nil {
			return err
		}
		wanted := func(s *backup.Snapshot) bool {
			return (host == "" || s.Hostname == host) && (len(*volumes) == 0 || slices.Contains(*volumes, s.Volume()))
		}
		return a.withRepository(cmd.Context(), source, access{readOnly: true, index: true}, func(ctx context.Context, src *session) error {
			list := slices.DeleteFunc(slices.Clone(src.snapshots), func(s *backup.Snapshot) bool { return !wanted(s) })
			if len(args) > 0 {
				list = list[:0]
				for _, prefix := range args {
					s, err := repo.Find(src.snapshots, prefix)
					if err != nil {
						return err
					}
					list = append(list, s)
				}
			}
			return a.withRepository(ctx, target, access{index: true}, func(ctx context.Context, dst *session) error {
				return a.copySnapshots(ctx, dst, src, list, src.repo.Config().Polynomial != dst.repo.Config().Polynomial)
			})
		})
	}
	return cmd
}

func (a *app) copySnapshots(ctx context.Context, dst, src *session, list []*backup.Snapshot, differ bool) error {
	if differ {
		a.say("the repositories cut files differently: later backups to %s share nothing with the copies", printable(dst.place.String()))
	}
	var failed error
	res, err := repo.Copy(ctx, dst.repo, src.repo, list, repo.CopyObserver{
		Done: func(s, copied *backup.Snapshot, known bool) {
			switch {
			case a.json && failed == nil:
				failed = a.printLine(struct {
					Event  string `json:"event"` // "copied" or "known"
					Source string `json:"source"`
					Copy   string `json:"copy"`
				}{map[bool]string{true: "known", false: "copied"}[known], s.ID.String(), copied.ID.String()})
			case !known:
				a.say("copied %s of %s, as %s", s.ID.Short(), printable(s.Volume()), copied.ID.Short())
			}
		},
	})
	if err != nil {
		return err
	}
	if failed != nil {
		return failed
	}
	if a.json {
		return a.printLine(struct {
			Event  string `json:"event"` // "total"
			Copied int    `json:"copied"`
			Known  int    `json:"known"`
			Blobs  int    `json:"blobs"`
			Plain  uint64 `json:"bytes"`
			Stored uint64 `json:"bytes_stored"`
		}{"total", res.Copied, res.Known, res.Blobs, res.Plain, res.Stored})
	}
	a.say("copied %s, %d were there; %s of new data, stored as %s", count(res.Copied, "snapshot", "snapshots"), res.Known, bytesText(res.Plain), bytesText(res.Stored))
	if src.unread != nil || dst.unread != nil {
		return errWarned
	}
	return nil
}
