package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/browse"
)

func (a *app) browseCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "browse DIR",
		Short: "Mount all snapshots read-only",
		Long: `Mounts all snapshots read-only on an empty folder, until it is interrupted or
somebody unmounts it:

  DIR/volumes/NAME/2026-11-22T03-00/…   and latest
  DIR/by-day/2026-11-22/NAME

Volumes of other devices are NAME@DEVICE. Needs /dev/fuse; who is not root also
needs fusermount3 (Debian's package fuse3).`,
		Example: `  ide49-backup browse /mnt/snapshots
  ide49-backup browse /mnt/snapshots --volume mosquitto`,
		Args: positional(cobra.ExactArgs(1)),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	}
	host, volumes := a.hostFlag(cmd), a.volumeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			err := l.view.Mount(ctx, args[0], browse.MountOptions{
				Host: l.host, Zone: l.cfg.Location(),
				Filter:  func(s *backup.Snapshot) bool { return len(*volumes) == 0 || slices.Contains(*volumes, s.Volume()) },
				Ready:   func() { a.say("mounted on %s; end it with Ctrl-C or umount", printable(args[0])) },
				Problem: func(err error) { a.warn("%v", err) },
			})
			if err != nil {
				return err
			}
			a.say("unmounted")
			return nil
		})
	}
	return cmd
}
