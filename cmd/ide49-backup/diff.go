package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/browse"
)

func (a *app) diffCommand() *cobra.Command {
	var at []string
	var metadata bool
	cmd := &cobra.Command{
		Use:   "diff A B [PATH] | diff VOLUME [PATH] --at TIME [--at TIME]",
		Short: "Compare two snapshots of a volume",
		Long: `Compares two snapshots of a volume, or one folder in both: + was added, - removed,
M has other contents, T is of another type, and with --metadata U has other
permissions, times or attributes. With one --at, the newest is the other side.
` + snapshotHelp,
		Example: `  ide49-backup diff mosquitto@yesterday mosquitto
  ide49-backup diff mosquitto --at "last friday" --at yesterday
  ide49-backup diff 3f2a81c0 77b1e2f4 data --metadata`,
		ValidArgsFunction: a.completeSnapshot(2),
	}
	cmd.Flags().StringArrayVar(&at, "at", nil, "`time` of a side, as \"yesterday\"; may be given twice")
	cmd.Flags().BoolVar(&metadata, "metadata", false, "also what differs in permissions, times and attributes only")
	complete(cmd, "at", completeTimes)
	host := a.hostFlag(cmd)
	cmd.Args = positional(func(cmd *cobra.Command, args []string) error {
		if len(at) == 0 {
			return cobra.RangeArgs(2, 3)(cmd, args)
		}
		return cobra.RangeArgs(1, 2)(cmd, args)
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch len(at) {
		case 0:
		case 1, 2:
			at = append(at, "now")
			args = append([]string{args[0] + "@" + at[0], args[0] + "@" + at[1]}, args[1:]...)
		default:
			return usagef("--at: there are two sides")
		}
		return a.look(cmd.Context(), *host, func(ctx context.Context, l *looker) error {
			return a.diff(ctx, l, args, metadata)
		})
	}
	return cmd
}

func (a *app) diff(ctx context.Context, l *looker, args []string, metadata bool) error {
	var sn [2]*backup.Snapshot
	var side [2]browse.Entry
	rel := ""
	if len(args) > 2 {
		rel = args[2]
	}
	for i := range sn {
		var err error
		if sn[i], err = a.pick(l.cfg, l.session, l.host, args[i]); err != nil {
			return err
		}
	}
	if sn[0].Volume() != sn[1].Volume() {
		return usagef("snapshot %s is of the volume %s and %s of %s; compare two of one volume",
			sn[0].ID.Short(), sn[0].Volume(), sn[1].ID.Short(), sn[1].Volume())
	}
	for i := range sn {
		var err error
		if side[i], err = entry(ctx, l.view, sn[i], rel); err != nil {
			return err
		}
	}
	loc := l.cfg.Location()
	a.say("snapshot %s of %s, %s", sn[0].ID.Short(), printable(sn[0].Volume()), clock(sn[0].Time, loc))
	a.say("    with %s, %s", sn[1].ID.Short(), clock(sn[1].Time, loc))
	t := troubles{a: a}
	var total browse.DiffTotal
	for c, err := range l.view.Diff(ctx, side[0], side[1], &total) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			t.tell(err)
			continue
		}
		if err := a.printChange(c, side[1].Path, metadata); err != nil {
			return err
		}
	}
	if err := a.printDiffTotal(total); err != nil {
		return err
	}
	return t.err(l.unread)
}

func (a *app) printChange(c browse.Change, top string, metadata bool) error {
	n, sign := c.After, "U"
	switch {
	case c.Before == nil:
		sign = "+"
	case c.After == nil:
		n, sign = c.Before, "-"
	case c.What&browse.DiffersType != 0:
		sign = "T"
	case c.What&browse.DiffersContent != 0:
		sign = "M"
	}
	if sign == "U" && !metadata {
		return nil
	}
	name := strings.TrimPrefix(c.Path, strings.TrimSuffix(top, "/")+"/")
	var err error
	if a.json {
		line := struct {
			Event  string          `json:"event"` // "change"
			Change string          `json:"change"`
			Path   string          `json:"path"`
			Raw    string          `json:"path_raw,omitempty"`
			What   string          `json:"what,omitempty"`
			Type   backup.NodeType `json:"type"`
			Before *uint64         `json:"size_before,omitempty"`
			After  *uint64         `json:"size_after,omitempty"`
		}{"change", sign, name, rawPath(name), c.What.String(), n.Type, nil, nil}
		if c.Before != nil {
			line.Before = &c.Before.Size
		}
		if c.After != nil {
			line.After = &c.After.Size
		}
		err = a.printLine(line)
	} else {
		what := ""
		if c.What&^browse.DiffersContent != 0 && sign != "T" {
			what = "  (" + c.What.String() + ")"
		}
		_, err = fmt.Fprintf(a.stdout, "%s %s%s\n", sign, shown(name, n), what)
	}
	return err
}

func (a *app) printDiffTotal(d browse.DiffTotal) error {
	if a.json {
		type total struct {
			Files   uint64 `json:"files"`
			Folders uint64 `json:"folders"`
			Others  uint64 `json:"others"`
			Bytes   uint64 `json:"bytes"`
		}
		return a.printLine(struct {
			Event       string `json:"event"` // "total"
			Added       total  `json:"added"`
			Removed     total  `json:"removed"`
			Changed     total  `json:"changed"`
			Metadata    uint64 `json:"metadata"`
			DataAdded   uint64 `json:"data_added"`
			DataRemoved uint64 `json:"data_removed"`
		}{"total", total(d.Added), total(d.Removed), total(d.Changed), d.Metadata, d.DataAdded, d.DataRemoved})
	}
	row := func(name string, t browse.Total) {
		a.say("%-8s %s, %s, %s", name, count(t.Files, "file", "files"), count(t.Folders, "folder", "folders"), bytesText(t.Bytes))
	}
	a.say("")
	row("added", d.Added)
	row("removed", d.Removed)
	row("changed", d.Changed)
	a.say("other metadata only: %d; new data %s, data no longer there %s", d.Metadata, bytesText(d.DataAdded), bytesText(d.DataRemoved))
	return nil
}
