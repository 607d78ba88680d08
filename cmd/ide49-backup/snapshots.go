package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/policy"
)

func (a *app) snapshotsCommand() *cobra.Command {
	var at, host string
	var volumes []string
	cmd := &cobra.Command{
		Use:   "snapshots",
		Short: "List the snapshots by volume and day",
		Long: `Lists the snapshots by volume and day. With --at, lists those that a restore
would take: for each volume the newest complete one not later than that time.`,
		Example: `  ide49-backup snapshots
  ide49-backup snapshots --volume mosquitto
  ide49-backup snapshots --at yesterday
  ide49-backup snapshots --json`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			p, err := a.place(cfg, a.repoName)
			if err != nil {
				return err
			}
			var m policy.Moment
			if at != "" {
				if m, err = policy.ParseMoment(at, a.now(), cfg.Location()); err != nil {
					return &usageError{err}
				}
			}
			return a.withRepository(cmd.Context(), p, access{readOnly: true, brief: true}, func(_ context.Context, s *session) error {
				list := slices.DeleteFunc(slices.Clone(s.snapshots), func(sn *backup.Snapshot) bool {
					return host != "" && sn.Hostname != host || len(volumes) > 0 && !slices.Contains(volumes, sn.Volume())
				})
				if at != "" {
					if list, err = a.snapshotsAt(s, list, m, cfg.Location()); err != nil {
						return err
					}
				}
				if err := a.printSnapshots(list, cfg.Location()); err != nil {
					return err
				}
				if s.unread != nil {
					return errWarned
				}
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&at, "at", "", "those that a restore of this `time` would take, as \"yesterday\" or \"2026-11-20 14:30\"")
	f.StringArrayVar(&volumes, "volume", nil, "of this `volume` only; may be given more than once")
	f.StringVar(&host, "host", "", "of this `device` only")
	complete(cmd, "at", completeTimes)
	complete(cmd, "volume", a.completeVolumes)
	complete(cmd, "host", a.completeHosts)
	return cmd
}

// snapshotsAt returns those of all that a moment selects.
func (a *app) snapshotsAt(s *session, all []*backup.Snapshot, m policy.Moment, loc *time.Location) ([]*backup.Snapshot, error) {
	var chosen []*backup.Snapshot
	var known []choice
	for _, host := range hosts(all) {
		for _, c := range choose(all, host, m.Time) {
			known = append(known, c)
			if c.snapshot != nil {
				chosen = append(chosen, c.snapshot)
			}
		}
	}
	if len(chosen) == 0 && len(known) > 0 {
		return nil, tooEarly(m, known, loc)
	}
	return chosen, nil
}

type snapshotLine struct {
	ID       string    `json:"id"`
	Volume   string    `json:"volume"`
	Device   string    `json:"device"`
	Time     time.Time `json:"time"`
	Paths    []string  `json:"paths"`
	Tags     []string  `json:"tags,omitempty"` // but for those that other fields say
	Complete bool      `json:"complete"`
	Files    *uint64   `json:"files,omitempty"`
	Bytes    *uint64   `json:"bytes,omitempty"`
	Stored   *uint64   `json:"bytes_stored,omitempty"`
	Program  string    `json:"program,omitempty"`
}

func newSnapshotLine(s *backup.Snapshot, loc *time.Location) snapshotLine {
	l := snapshotLine{ID: s.ID.String(), Volume: s.Volume(), Device: s.Hostname, Time: s.Time.In(loc), Paths: s.Paths,
		Complete: s.Complete(), Program: s.ProgramVersion}
	for _, tag := range s.Tags {
		if tag != backup.IncompleteTag && !strings.HasPrefix(tag, backup.VolumeTag) {
			l.Tags = append(l.Tags, tag)
		}
	}
	if sum := s.Summary; sum != nil {
		l.Files, l.Bytes, l.Stored = &sum.TotalFilesProcessed, &sum.TotalBytesProcessed, &sum.DataAddedPacked
	}
	return l
}

func (a *app) printSnapshots(list []*backup.Snapshot, loc *time.Location) error {
	lines := make([]snapshotLine, 0, len(list))
	for _, s := range list {
		lines = append(lines, newSnapshotLine(s, loc))
	}
	// By volume; the order by time stays.
	slices.SortStableFunc(lines, func(x, y snapshotLine) int {
		if c := strings.Compare(x.Device, y.Device); c != 0 {
			return c
		}
		return strings.Compare(x.Volume, y.Volume)
	})
	if a.json {
		return a.printJSON(lines)
	}
	if len(lines) == 0 {
		a.say("no snapshots")
		return nil
	}
	// One table over all volumes, so that their columns are in line.
	t := newTable("Volume", "Day", "Time", "Snapshot", ">Files", ">Size", ">Stored", "")
	number := func(n *uint64, text func(uint64) string) string {
		if n == nil {
			return "?"
		}
		return text(*n)
	}
	several := lines[0].Device != lines[len(lines)-1].Device
	volume, day := "", ""
	for i, l := range lines {
		v, d := l.Volume, l.Time.Format("Mon 2006-01-02")
		if several {
			v = l.Device + ": " + v
		}
		if i > 0 && v == volume {
			v = ""
			if d == day {
				d = ""
			}
		}
		if v != "" {
			volume = v
		}
		if d != "" {
			day = d
		}
		notes := slices.Clone(l.Tags)
		if !l.Complete {
			notes = append([]string{"incomplete"}, notes...)
		}
		t.add(v, d, l.Time.Format("15:04:05"), l.ID[:8],
			number(l.Files, func(n uint64) string { return fmt.Sprint(n) }),
			number(l.Bytes, bytesText), number(l.Stored, bytesText), strings.Join(notes, ", "))
	}
	return t.print(a, "")
}
