package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/policy"
)

// errNothingThatEarly says that no snapshot is as old as was asked for.
var errNothingThatEarly = errors.New("there is no snapshot that early")

// A choice is the snapshot of one volume that a time selects.
type choice struct {
	volume string
	// snapshot is nil if there is none that early.
	snapshot *backup.Snapshot
	// oldest is the oldest snapshot of the volume.
	oldest *backup.Snapshot
}

// choose selects, for each volume of a device, the newest complete snapshot not
// later than a moment; where all that are early enough are incomplete, the
// newest of those. Snapshots that restores made do not count. The result is
// sorted by volume. all is oldest first.
func choose(all []*backup.Snapshot, host string, moment time.Time) []choice {
	byVolume := map[string]*choice{}
	for _, s := range all {
		if s.Hostname != host || s.HasTag(backup.BeforeRestoreTag) {
			continue
		}
		name := s.Volume()
		c := byVolume[name]
		if c == nil {
			c = &choice{volume: name, oldest: s}
			byVolume[name] = c
		}
		if !s.Time.After(moment) && (c.snapshot == nil || s.Complete() || !c.snapshot.Complete()) {
			c.snapshot = s
		}
	}
	var choices []choice
	for _, c := range byVolume {
		choices = append(choices, *c)
	}
	slices.SortFunc(choices, func(a, b choice) int { return strings.Compare(a.volume, b.volume) })
	return choices
}

// tooEarly returns the error for a moment before the oldest of choices.
func tooEarly(m policy.Moment, choices []choice, loc *time.Location) error {
	oldest := slices.MinFunc(choices, func(a, b choice) int { return a.oldest.Time.Compare(b.oldest.Time) })
	return fmt.Errorf("%w as %s; the oldest of %s is of %s", errNothingThatEarly, m, oldest.volume, clock(oldest.oldest.Time, loc))
}

// hosts returns the devices that snapshots are of.
func hosts(all []*backup.Snapshot) []string {
	var names []string
	for _, s := range all {
		names = append(names, s.Hostname)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// noSnapshots says that a repository has none of a device.
func noSnapshots(s *session, host string) error {
	others := hosts(s.snapshots)
	switch {
	case len(others) == 0:
		return fmt.Errorf("the repository %s has no snapshots yet; make some with `ide49-backup backup`", s.place)
	case slices.Contains(others, host):
		return fmt.Errorf("the repository %s has no such snapshots; see `ide49-backup snapshots`", s.place)
	}
	return fmt.Errorf("the repository %s has no snapshots of the device %s; choose with --host: %s", s.place, host, strings.Join(others, ", "))
}

// pick finds the snapshot that a person names: by the beginning of its ID, as
// VOLUME@TIME, or as VOLUME for its newest.
func (a *app) pick(cfg *policy.Config, s *session, host, text string) (*backup.Snapshot, error) {
	volume, at, timed := cutLast(text, "@")
	if !timed {
		volume, at = text, "now"
	}
	var known []choice
	for _, c := range choose(s.snapshots, host, a.now()) {
		if c.volume == volume {
			known = append(known, c)
		}
	}
	if len(known) == 0 && !timed {
		return repo.Find(s.snapshots, text)
	}
	m, err := policy.ParseMoment(at, a.now(), cfg.Location())
	if err != nil {
		return nil, err
	}
	if len(known) == 0 {
		return nil, fmt.Errorf("volume %s: %w", volume, noSnapshots(s, host))
	}
	for _, c := range choose(s.snapshots, host, m.Time) {
		if c.volume == volume && c.snapshot != nil {
			return c.snapshot, nil
		}
	}
	return nil, tooEarly(m, known, cfg.Location())
}

// cutLast is strings.Cut at the last sep.
func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
