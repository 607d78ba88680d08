package main

import (
	"bufio"
	"context"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/browse"
)

func (a *app) catCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cat SNAPSHOT|VOLUME[@TIME] PATH",
		Short: "Write a file of a snapshot to standard output",
		Long: `Writes a file of a snapshot to standard output. Every byte is verified before it
is written. ` + snapshotHelp,
		Example: `  ide49-backup cat mosquitto@yesterday mosquitto.conf
  ide49-backup cat 3f2a81c0 /service-config/db/dump.sql | psql`,
		Args:              positional(cobra.ExactArgs(2)),
		ValidArgsFunction: a.completeSnapshot(1),
	}
	host := a.hostFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			sn, err := a.pick(l.cfg, l.session, l.host, args[0])
			if err != nil {
				return err
			}
			e, err := entry(ctx, l.view, sn, args[1])
			if err != nil {
				return err
			}
			return l.view.Cat(ctx, a.stdout, e)
		})
	}
	return cmd
}

func (a *app) dumpCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "dump SNAPSHOT|VOLUME[@TIME] [PATH]",
		Short: "Write a folder of a snapshot as an archive to standard output",
		Long: `Writes a folder of a snapshot, or all of it, as a tar or zip archive to standard
output. Tar keeps everything but sockets; zip files, folders, links and their
permissions. What is left out is said. ` + snapshotHelp,
		Example: `  ide49-backup dump nodered@yesterday > nodered.tar
  ide49-backup dump nodered projects --format zip > projects.zip
  ide49-backup dump nodered | ssh pi2 tar -x -C /`,
		Args:              positional(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: a.completeSnapshot(1),
	}
	cmd.Flags().StringVar(&format, "format", "tar", "`format`: tar or zip")
	complete(cmd, "format", words("tar", "zip"))
	host := a.hostFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		kind, ok := map[string]browse.Format{"tar": browse.Tar, "zip": browse.Zip}[format]
		if !ok {
			return usagef("--format: there is no format %q; there are tar and zip", format)
		}
		if terminal(a.stdout) {
			return usagef("an archive is nothing for a terminal; add `> FILE`")
		}
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			sn, err := a.pick(l.cfg, l.session, l.host, args[0])
			if err != nil {
				return err
			}
			rel := ""
			if len(args) > 1 {
				rel = args[1]
			}
			top, err := entry(ctx, l.view, sn, rel)
			if err != nil {
				return err
			}
			t := troubles{a: a}
			out := bufio.NewWriterSize(a.stdout, 64<<10)
			err = l.view.Dump(ctx, out, kind, top, func(path string, err error) { a.warn("%s: %v", path, err); t.some = true })
			if err != nil {
				return err
			}
			if err := out.Flush(); err != nil {
				return err
			}
			return t.err(l.unread)
		})
	}
	return cmd
}
