package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/browse"
	"github.com/iot49/ide49-backup/policy"
)

func (a *app) findCommand() *cobra.Command {
	var q browse.Query
	var types []string
	var newer, older, larger, smaller string
	cmd := &cobra.Command{
		Use:   "find [PATTERN…]",
		Short: "Find files in all snapshots",
		Long: `Finds files by name in all snapshots of this device, and lists their versions.
A PATTERN is compared with names, or with whole paths if it has a slash: * and ?
stand for anything within a name, ** for folders.`,
		Example: `  ide49-backup find mosquitto.conf
  ide49-backup find '*.db' --larger 10M --newer "last friday"
  ide49-backup find '/service-config/**/flows*.json' --volume nodered`,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := cmd.Flags()
	f.BoolVarP(&q.IgnoreCase, "ignore-case", "i", false, "upper and lower case are the same")
	f.StringVar(&newer, "newer", "", "modified at this `time` or later")
	f.StringVar(&older, "older", "", "modified at this `time` or earlier")
	f.StringVar(&larger, "larger", "", "files of at least this `size`, as 10M")
	f.StringVar(&smaller, "smaller", "", "files of at most this `size`")
	f.StringArrayVar(&types, "type", nil, "of this `type`: file, dir, symlink, dev, chardev, fifo, socket; may be given more than once")
	f.StringVar(&q.Below, "below", "", "only below this absolute `path`")
	complete(cmd, "newer", completeTimes)
	complete(cmd, "older", completeTimes)
	complete(cmd, "type", words("file", "dir", "symlink", "dev", "chardev", "fifo", "socket"))
	host, volumes := a.hostFlag(cmd), a.volumeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		q.Patterns = args
		known := []backup.NodeType{backup.File, backup.Dir, backup.Symlink, backup.Device, backup.CharDevice, backup.FIFO, backup.Socket}
		for _, t := range types {
			if !slices.Contains(known, backup.NodeType(t)) {
				return usagef("--type: there is no type %q; see `ide49-backup find --help`", t)
			}
			q.Types = append(q.Types, backup.NodeType(t))
		}
		for _, b := range []struct {
			flag, text string
			size       *uint64
		}{{"larger", larger, &q.MinSize}, {"smaller", smaller, &q.MaxSize}} {
			if b.text != "" {
				var n policy.Size
				if err := n.UnmarshalText([]byte(b.text)); err != nil {
					return usagef("--%s: %w", b.flag, err)
				}
				*b.size = uint64(n)
			}
		}
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			if newer != "" {
				m, err := policy.ParseMoment(newer, a.now(), l.cfg.Location())
				if err != nil {
					return &usageError{err}
				}
				q.After = beginning(m)
			}
			if older != "" {
				m, err := policy.ParseMoment(older, a.now(), l.cfg.Location())
				if err != nil {
					return &usageError{err}
				}
				q.Before = m.Time
			}
			return a.find(ctx, l, q, *volumes)
		})
	}
	return cmd
}

// beginning returns the first instant of a day that was named, and else the
// moment itself.
func beginning(m policy.Moment) time.Time {
	if !m.Day {
		return m.Time
	}
	y, mo, d := m.Time.Date()
	return time.Date(y, mo, d, 0, 0, 0, 0, m.Time.Location())
}

func (a *app) find(ctx context.Context, l *looker, q browse.Query, volumes []string) error {
	list, err := l.chosen(volumes)
	if err != nil {
		return err
	}
	loc := l.cfg.Location()
	t := troubles{a: a}
	found := 0
	for f, err := range l.view.Find(ctx, list, q) {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, browse.ErrPattern):
			return &usageError{err}
		case err != nil:
			t.tell(err)
			continue
		}
		found++
		if err := a.printFound(f, loc); err != nil {
			return err
		}
	}
	if found == 0 {
		a.say("nothing found in %s", count(len(list), "snapshot", "snapshots"))
	}
	return t.err(l.unread)
}

func (a *app) printFound(f browse.Found, loc *time.Location) error {
	if a.json {
		line := struct {
			Event    string        `json:"event"` // "found"
			Path     string        `json:"path"`
			Raw      string        `json:"path_raw,omitempty"`
			Versions []versionLine `json:"versions"`
		}{"found", f.Path, rawPath(f.Path), nil}
		for _, v := range f.Versions {
			line.Versions = append(line.Versions, versionLine{"", newNodeFields(v.Node, loc), snapshotIDs(v.Snapshots)})
		}
		return a.printLine(line)
	}
	if _, err := fmt.Fprintln(a.stdout, shown(f.Path, f.Versions[0].Node)); err != nil {
		return err
	}
	for _, v := range f.Versions {
		if _, err := fmt.Fprintf(a.stdout, "  %11s  %s  in %s\n", bytesText(v.Node.Size), clock(v.Node.ModTime, loc), span(v.Snapshots, loc)); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) historyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "history PATH",
		Short: "Show every version of one file or folder",
		Long: `Shows the versions of one file or folder, oldest first: when it was changed, its
size, and in which snapshots it is so. PATH is absolute, or below the folder of
--volume.`,
		Example: `  ide49-backup history /service-config/mosquitto/mosquitto.conf
  ide49-backup history flows.json --volume nodered`,
		Args:              positional(cobra.ExactArgs(1)),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	host, volumes := a.hostFlag(cmd), a.volumeFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !path.IsAbs(args[0]) && len(*volumes) != 1 {
			return usagef("%q is not absolute; give the whole path, or --volume", args[0])
		}
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			return a.history(ctx, l, args[0], *volumes)
		})
	}
	return cmd
}

func (a *app) history(ctx context.Context, l *looker, name string, volumes []string) error {
	list, err := l.chosen(volumes)
	if err != nil {
		return err
	}
	name = inSnapshot(list[len(list)-1], name)
	list = slices.DeleteFunc(list, func(s *backup.Snapshot) bool { return !browse.Covers(s, name) })
	if len(list) == 0 {
		return fmt.Errorf("%s: no snapshot is of that place; `ide49-backup snapshots --json` shows their paths", printable(name))
	}
	loc := l.cfg.Location()
	t := troubles{a: a}
	versions := 0
	for v, err := range l.view.History(ctx, list, name) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			t.tell(err)
			continue
		}
		versions++
		switch {
		case a.json && v.Node == nil:
			err = a.printLine(struct {
				Event     string   `json:"event"` // "absent"
				Snapshots []string `json:"snapshots"`
			}{"absent", snapshotIDs(v.Snapshots)})
		case a.json:
			err = a.printLine(versionLine{"version", newNodeFields(v.Node, loc), snapshotIDs(v.Snapshots)})
		case v.Node == nil:
			_, err = fmt.Fprintf(a.stdout, "%11s  %19s  in %s\n", "absent", "", span(v.Snapshots, loc))
		default:
			_, err = fmt.Fprintf(a.stdout, "%11s  %s  in %s\n", bytesText(v.Node.Size), clock(v.Node.ModTime, loc), span(v.Snapshots, loc))
		}
		if err != nil {
			return err
		}
	}
	if versions == 0 && !t.some {
		return fmt.Errorf("%s: in %s: %w", strings.TrimSuffix(printable(name), "/"), count(len(list), "snapshot", "snapshots"), errNoSuchPath)
	}
	return t.err(l.unread)
}
