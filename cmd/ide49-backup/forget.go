package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/retention"
	"github.com/iot49/ide49-backup/policy"
)

// errPinned says that a snapshot can't be removed since it is pinned.
var errPinned = errors.New("the snapshot is pinned; run `ide49-backup unpin` first")

type forgetFlags struct {
	rules      retention.Rules
	tags       []string
	host       string
	allHosts   bool
	volumes    []string
	dryRun     bool
	trustClock bool
}

func (a *app) forgetCommand() *cobra.Command {
	var f forgetFlags
	cmd := &cobra.Command{
		Use:   "forget [SNAPSHOT…]",
		Short: "Remove snapshots that no rule keeps",
		Long: `Removes the snapshots of this device that no rule keeps, volume by volume. Without
rules these are kept: the last 3, and the newest of 7 days, 4 weeks and 12 months.
A volume never loses its newest complete snapshot, nor falls below three, nor
loses a pinned one; and a clock that can't be right removes nothing.

With SNAPSHOTs, removes exactly those. The space they took is free after prune.`,
		Example: `  ide49-backup forget --dry-run
  ide49-backup forget --keep-last 3 --keep-daily 14 --keep-within-monthly 2y
  ide49-backup forget 2c70e12b`,
		ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, args []string) error {
			given := false
			cmd.Flags().Visit(func(fl *pflag.Flag) { given = given || strings.HasPrefix(fl.Name, "keep-") })
			if !given {
				f.rules = retention.Default()
			}
			return a.forget(cmd.Context(), f, given, args)
		},
	}
	fl := cmd.Flags()
	r := &f.rules
	for _, c := range []struct {
		to         *int
		name, what string
	}{
		{&r.Last, "last", "the last `N` snapshots"},
		{&r.Hourly, "hourly", "the newest of the last `N` hours that have one"},
		{&r.Daily, "daily", "the newest of the last `N` days that have one"},
		{&r.Weekly, "weekly", "the newest of the last `N` weeks that have one"},
		{&r.Monthly, "monthly", "the newest of the last `N` months that have one"},
		{&r.Yearly, "yearly", "the newest of the last `N` years that have one"},
	} {
		fl.IntVar(c.to, "keep-"+c.name, 0, "keep "+c.what+" (-1: all)")
		complete(cmd, "keep-"+c.name, cobra.NoFileCompletions)
	}
	for _, s := range []struct {
		to         *retention.Span
		name, what string
	}{
		{&r.Within, "within", "all"},
		{&r.WithinHourly, "within-hourly", "the newest of each hour"},
		{&r.WithinDaily, "within-daily", "the newest of each day"},
		{&r.WithinWeekly, "within-weekly", "the newest of each week"},
		{&r.WithinMonthly, "within-monthly", "the newest of each month"},
		{&r.WithinYearly, "within-yearly", "the newest of each year"},
	} {
		fl.TextVar(s.to, "keep-"+s.name, retention.Span{}, "keep "+s.what+" within this `span` before the newest, as 1y6m")
		complete(cmd, "keep-"+s.name, cobra.NoFileCompletions)
	}
	fl.StringArrayVar(&f.tags, "keep-tag", nil, "keep those with this `tag`, or with all of several joined by commas; may be given more than once")
	fl.StringVar(&f.host, "host", "", "of this `device` (default this one)")
	fl.BoolVar(&f.allHosts, "all-hosts", false, "of every device")
	fl.StringArrayVar(&f.volumes, "volume", nil, "of this `volume` only; may be given more than once")
	fl.BoolVarP(&f.dryRun, "dry-run", "n", false, "show what would be removed, and why not")
	fl.BoolVar(&f.trustClock, "trust-clock", false, "the clock is right, although it jumped")
	complete(cmd, "keep-tag", cobra.NoFileCompletions)
	complete(cmd, "host", a.completeHosts)
	complete(cmd, "volume", a.completeVolumes)
	return cmd
}

func (a *app) forget(ctx context.Context, f forgetFlags, given bool, ids []string) error {
	if len(ids) > 0 && (given || len(f.volumes) > 0 || f.host != "" || f.allHosts) {
		return usagef("give either snapshots or rules, not both")
	}
	for _, text := range f.tags {
		var l retention.TagList
		if err := l.UnmarshalText([]byte(text)); err != nil {
			return &usageError{fmt.Errorf("--keep-tag: %w", err)}
		}
		f.rules.Tags = append(f.rules.Tags, l)
	}
	if err := f.rules.Validate(); err != nil {
		return &usageError{err}
	}
	cfg, err := a.config()
	if err != nil {
		return err
	}
	p, err := a.place(cfg, a.repoName)
	if err != nil {
		return err
	}
	if f.host == "" && !f.allHosts {
		if f.host, err = a.device(cfg); err != nil {
			return err
		}
	}
	state, err := a.state()
	if err != nil {
		return err
	}
	return a.withRepository(ctx, p, access{readOnly: f.dryRun, brief: f.dryRun}, func(ctx context.Context, s *session) error {
		if len(ids) > 0 {
			return a.forgetThese(ctx, cfg, s, ids, f.dryRun)
		}
		c, err := policy.Clock(state, a.now())
		if err != nil {
			a.warn("%v", err)
		}
		c.Trusted = c.Trusted || f.trustClock
		doubt := c.Doubt(s.snapshots)
		all := retention.Apply(f.rules, s.snapshots, c)
		decisions := slices.DeleteFunc(all, func(d retention.Decision) bool {
			return !f.allHosts && d.Snapshot.Hostname != f.host || len(f.volumes) > 0 && !slices.Contains(f.volumes, d.Snapshot.Volume())
		})
		if err := a.carryOut(ctx, cfg, s, decisions, doubt, f.dryRun); err != nil {
			return err
		}
		if doubt != "" {
			a.warn("nothing may be removed: %s", doubt)
			return errWarned
		}
		if !f.dryRun {
			if err := policy.RememberClock(state, c.Now); err != nil {
				return err
			}
		}
		if s.unread != nil {
			return errWarned
		}
		return nil
	})
}

// forgetThese removes the snapshots that a person names.
func (a *app) forgetThese(ctx context.Context, cfg *policy.Config, s *session, ids []string, dryRun bool) error {
	var decisions []retention.Decision
	for _, id := range ids {
		sn, err := repo.Find(s.snapshots, id)
		if err != nil {
			return err
		}
		if sn.HasTag(backup.PinTag) {
			return fmt.Errorf("snapshot %s: %w", sn.ID.Short(), errPinned)
		}
		if !slices.ContainsFunc(decisions, func(d retention.Decision) bool { return d.Snapshot == sn }) {
			decisions = append(decisions, retention.Decision{Snapshot: sn})
		}
	}
	return a.carryOut(ctx, cfg, s, decisions, "", dryRun)
}

type decisionLine struct {
	ID      string    `json:"id"`
	Volume  string    `json:"volume"`
	Device  string    `json:"device"`
	Time    time.Time `json:"time"`
	Keep    bool      `json:"keep"`
	Reasons []string  `json:"reasons"`
}

// carryOut removes what is not to be kept, unless dryRun is set, and prints all
// decisions.
func (a *app) carryOut(ctx context.Context, cfg *policy.Config, s *session, decisions []retention.Decision, doubt string, dryRun bool) error {
	lines := []decisionLine{}
	t := newTable("Volume", "Time", "Snapshot", "", "Because")
	several := slices.ContainsFunc(decisions, func(d retention.Decision) bool { return d.Snapshot.Hostname != decisions[0].Snapshot.Hostname })
	gone, last := 0, ""
	for _, d := range decisions {
		sn := d.Snapshot
		lines = append(lines, decisionLine{sn.ID.String(), sn.Volume(), sn.Hostname, sn.Time, d.Keep, append([]string{}, d.Reasons...)})
		volume, word, reasons := sn.Volume(), "keep", slices.Clone(d.Reasons)
		if several {
			volume = sn.Hostname + ": " + volume
		}
		if volume == last {
			volume = ""
		} else {
			last = volume
		}
		if i := slices.Index(reasons, doubt); i >= 0 {
			reasons[i] = "the clock can't be trusted" // said in full below
		}
		if !d.Keep {
			gone++
			word, reasons = "remove", nil
		}
		t.add(volume, clock(sn.Time, cfg.Location()), sn.ID.Short(), word, strings.Join(reasons, "; "))
	}
	if a.json {
		if err := a.printJSON(lines); err != nil {
			return err
		}
	} else if len(decisions) > 0 && !a.quiet {
		if err := t.print(a, ""); err != nil {
			return err
		}
	}
	if dryRun {
		a.say("%s of %d would be removed", count(gone, "snapshot", "snapshots"), len(decisions))
		return nil
	}
	for _, d := range decisions {
		if d.Keep {
			continue
		}
		if err := s.repo.RemoveSnapshot(ctx, d.Snapshot.ID); err != nil {
			return err
		}
	}
	a.say("%s of %d removed", count(gone, "snapshot", "snapshots"), len(decisions))
	return nil
}
