package main

import (
	"context"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/browse"
)

func (a *app) lsCommand() *cobra.Command {
	var recursive, sizes, names bool
	cmd := &cobra.Command{
		Use:   "ls SNAPSHOT|VOLUME[@TIME] [PATH]",
		Short: "List a folder of a snapshot",
		Long: `Lists a folder of a snapshot: that of its volume if there is no PATH.
` + snapshotHelp,
		Example: `  ide49-backup ls mosquitto
  ide49-backup ls mosquitto@yesterday data --sizes
  ide49-backup ls 3f2a81c0 /service-config/mosquitto/data --recursive`,
		Args:              positional(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: a.completeSnapshot(1),
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "list all that is below, too")
	cmd.Flags().BoolVar(&sizes, "sizes", false, "show for folders the size of all that is below")
	cmd.Flags().BoolVarP(&names, "names", "1", false, "print the paths only")
	host := a.hostFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			return a.ls(ctx, l, args, recursive, sizes, names)
		})
	}
	return cmd
}

func (a *app) ls(ctx context.Context, l *looker, args []string, recursive, sizes, names bool) error {
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
	loc := l.cfg.Location()
	switch {
	case a.json:
		err = a.printLine(struct {
			Event string `json:"event"`
			snapshotLine
		}{"snapshot", newSnapshotLine(sn, loc)})
	case !names:
		a.say("snapshot %s of %s, %s", sn.ID.Short(), printable(sn.Volume()), clock(sn.Time, loc))
	}
	if err != nil {
		return err
	}
	t := troubles{a: a}
	totals := l.view.NewTotals()
	for e, err := range l.view.Ls(ctx, sn, top.Path, recursive) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			if e.Path == top.Path {
				return err
			}
			t.tell(err)
			continue
		}
		size := e.Node.Size
		if sizes && e.Node.Type == backup.Dir {
			sum, err := totals.Of(ctx, e.Node)
			if err != nil {
				t.tell(err)
			}
			size = sum.Bytes
		}
		name := strings.TrimPrefix(e.Path, strings.TrimSuffix(top.Path, "/")+"/")
		if e.Path == top.Path {
			name = path.Base(e.Path)
		}
		if err := a.printEntry(browse.Entry{Path: name, Node: e.Node}, size, names, loc); err != nil {
			return err
		}
	}
	return t.err(l.unread)
}

func (a *app) printEntry(e browse.Entry, size uint64, names bool, loc *time.Location) error {
	n := e.Node
	var err error
	switch {
	case a.json:
		line := entryLine{"entry", e.Path, rawPath(e.Path), newNodeFields(n, loc)}
		line.Size = size
		err = a.printLine(line)
	case names:
		_, err = fmt.Fprintln(a.stdout, printable(e.Path))
	default:
		_, err = fmt.Fprintf(a.stdout, "%s %10s %10s %11s  %s  %s\n", n.Mode, owner(n.User, n.UID), owner(n.Group, n.GID),
			bytesText(size), clock(n.ModTime, loc), shown(e.Path, n))
	}
	return err
}

func owner(name string, id uint32) string {
	if name == "" {
		return fmt.Sprint(id)
	}
	return printable(name)
}
