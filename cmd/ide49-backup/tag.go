package main

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
)

func (a *app) pinCommand() *cobra.Command {
	return a.retagCommand(&cobra.Command{
		Use:   "pin SNAPSHOT…",
		Short: "Keep snapshots whatever retention says",
		Long:  "Gives snapshots the tag pin, so that forget never removes them. Each is named by the beginning of its ID, as VOLUME@TIME, or as VOLUME for its newest. As a snapshot's ID is made of what is in it, that changes.",
		Example: `  ide49-backup pin 2c70e12b
  ide49-backup pin homeassistant@2026-11-20`,
	}, func() (add, remove []string) { return []string{backup.PinTag}, nil })
}

func (a *app) unpinCommand() *cobra.Command {
	return a.retagCommand(&cobra.Command{
		Use:     "unpin SNAPSHOT…",
		Short:   "Leave snapshots to retention again",
		Example: "  ide49-backup unpin 2c70e12b",
	}, func() (add, remove []string) { return nil, []string{backup.PinTag} })
}

func (a *app) tagCommand() *cobra.Command {
	var add, remove []string
	cmd := a.retagCommand(&cobra.Command{
		Use:     "tag SNAPSHOT…",
		Short:   "Change the tags of snapshots",
		Long:    "Adds and removes tags of snapshots, each named as for pin. Tags that this program gives itself, such as volume:NAME, stay as they are.",
		Example: "  ide49-backup tag --add before-upgrade homeassistant\n  ide49-backup tag --remove before-upgrade 2c70e12b",
	}, func() ([]string, []string) { return add, remove })
	cmd.Flags().StringArrayVar(&add, "add", nil, "add this `tag`; may be given more than once")
	cmd.Flags().StringArrayVar(&remove, "remove", nil, "remove this `tag`; may be given more than once")
	complete(cmd, "add", cobra.NoFileCompletions)
	complete(cmd, "remove", cobra.NoFileCompletions)
	return cmd
}

// retagCommand completes a command that changes tags. change says how.
func (a *app) retagCommand(cmd *cobra.Command, change func() (add, remove []string)) *cobra.Command {
	cmd.Args = positional(cobra.MinimumNArgs(1))
	cmd.ValidArgsFunction = a.completeSnapshots
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		add, remove := change()
		return a.retag(cmd.Context(), args, add, remove)
	}
	return cmd
}

// reserved reports whether only this program gives a tag.
func reserved(tag string) bool {
	return strings.HasPrefix(tag, backup.VolumeTag) ||
		slices.Contains([]string{backup.IncompleteTag, backup.BeforeRestoreTag, backup.SuspectTag}, tag)
}

func (a *app) retag(ctx context.Context, args, add, remove []string) error {
	if len(add)+len(remove) == 0 {
		return usagef("say what to change: --add TAG or --remove TAG")
	}
	for _, tag := range append(slices.Clone(add), remove...) {
		if tag == "" || strings.Contains(tag, ",") || printable(tag) != tag || reserved(tag) {
			return usagef("%q can't be used as a tag here", tag)
		}
	}
	cfg, err := a.config()
	if err != nil {
		return err
	}
	p, err := a.place(cfg, a.repoName)
	if err != nil {
		return err
	}
	host, err := a.device(cfg)
	if err != nil {
		return err
	}
	return a.withRepository(ctx, p, access{}, func(ctx context.Context, s *session) error {
		var chosen []*backup.Snapshot
		for _, arg := range args {
			sn, err := a.pick(cfg, s, host, arg)
			if err != nil {
				return err
			}
			if !slices.Contains(chosen, sn) {
				chosen = append(chosen, sn)
			}
		}
		var lines []snapshotLine
		for _, sn := range chosen {
			tags := slices.DeleteFunc(slices.Clone(sn.Tags), func(t string) bool { return slices.Contains(remove, t) })
			for _, t := range add {
				if !slices.Contains(tags, t) {
					tags = append(tags, t)
				}
			}
			next := sn
			if !slices.Equal(tags, sn.Tags) {
				if next, err = s.repo.Retag(ctx, s.snapshots, sn, tags); err != nil {
					return err
				}
			}
			l := newSnapshotLine(next, cfg.Location())
			lines = append(lines, l)
			a.say("%s is now %s, tags: %s", sn.ID.Short(), next.ID.Short(), printable(tagsText(l.Tags)))
		}
		if a.json {
			return a.printJSON(lines)
		}
		return nil
	})
}

func tagsText(tags []string) string {
	if len(tags) == 0 {
		return "none"
	}
	return strings.Join(tags, ", ")
}
