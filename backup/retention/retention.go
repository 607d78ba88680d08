// Package retention decides which snapshots stay, and says why. It is a pure
// function of rules, snapshots and what is known about the clock.
//
// Whatever restic's forget keeps under the same rules stays here too. Beyond
// that a volume never loses its newest complete snapshot, nor falls below
// three; a snapshot that is no full picture of its volume never pushes out one
// that is; and a clock that can't be right removes nothing.
package retention

import (
	"cmp"
	"slices"
	"time"

	"github.com/iot49/ide49-backup/backup"
)

// Floor is how many snapshots of a volume stay whatever the rules say.
const Floor = 3

// undoSpan is how long a snapshot made before a restore stays, so that the
// restore can be undone.
var undoSpan = Span{Days: 7}

// Reasons for keeping that are not the name of a rule. Those of rules are
// "last", "daily" and so on, "within 2y", "daily within 7d", "tags a,b"; the
// same with SoundSuffix when a rule keeps the snapshot only because others,
// which are no full pictures, are not counted.
const (
	ReasonNoRules  = "no rules"
	ReasonBadRules = "bad rules"
	ReasonPin      = "pinned"
	ReasonNewest   = "newest complete"
	ReasonFloor    = "never fewer than 3"
	ReasonUndo     = "undoes a restore"
	SoundSuffix    = ", of those complete"
)

// A Decision says whether a snapshot stays. Reasons tells why it stays, in
// the order of the rules; it is empty for one that goes, since then no rule
// keeps it.
type Decision struct {
	Snapshot *backup.Snapshot
	Keep     bool
	Reasons  []string
}

// Apply decides on each snapshot. It groups them by host and volume (the
// volume's name, or for snapshots of other programs the paths) and applies the
// rules to each group by itself. Decisions come by host, volume and time, the
// newest first. Neither snaps nor what it points to is changed.
//
// When the clock can't be trusted (see [Clock.Doubt]) all snapshots stay, and
// that is the reason given for those which would have gone.
func Apply(rules Rules, snaps []*backup.Snapshot, clock Clock) []Decision {
	sorted := slices.SortedFunc(slices.Values(snaps), func(a, b *backup.Snapshot) int {
		return cmp.Or(cmp.Compare(a.Hostname, b.Hostname), cmp.Compare(a.Volume(), b.Volume()),
			b.Time.Compare(a.Time), slices.Compare(b.ID[:], a.ID[:]))
	})
	out := make([]Decision, 0, len(sorted))
	for len(sorted) > 0 {
		first := sorted[0]
		n := slices.IndexFunc(sorted, func(s *backup.Snapshot) bool {
			return s.Hostname != first.Hostname || s.Volume() != first.Volume()
		})
		if n < 0 {
			n = len(sorted)
		}
		out = append(out, group(&rules, sorted[:n], clock.Now)...)
		sorted = sorted[n:]
	}
	if doubt := clock.Doubt(snaps); doubt != "" {
		for i := range out {
			out[i].keep(doubt, !out[i].Keep)
		}
	}
	return out
}

// keep adds a reason if it applies.
func (d *Decision) keep(reason string, applies bool) {
	if applies {
		d.Keep = true
		d.Reasons = append(d.Reasons, reason)
	}
}

// sound reports whether a snapshot is, as far as is known, a full picture of
// its volume and part of its regular history.
func sound(s *backup.Snapshot) bool {
	return s.Complete() && !s.HasTag(backup.SuspectTag) && !s.HasTag(backup.BeforeRestoreTag)
}

// group decides on the snapshots of one volume, newest first.
func group(rules *Rules, snaps []*backup.Snapshot, now time.Time) []Decision {
	out := make([]Decision, len(snaps))
	var sounds []*backup.Snapshot
	var at []int // where those are in out
	for i, s := range snaps {
		out[i].Snapshot = s
		if sound(s) {
			sounds, at = append(sounds, s), append(at, i)
		}
	}
	switch {
	case rules.Validate() != nil:
		for i := range out {
			out[i].keep(ReasonBadRules, true)
		}
		return out
	case rules.Empty():
		for i := range out {
			out[i].keep(ReasonNoRules, true)
		}
		return out
	}
	rules.apply(snaps, now, func(i int, reason string) { out[i].keep(reason, true) })
	if len(sounds) < len(snaps) {
		rules.apply(sounds, now, func(i int, reason string) {
			d := &out[at[i]]
			if !slices.Contains(d.Reasons, reason) {
				d.keep(reason+SoundSuffix, true)
			}
		})
	}
	undo := undoSpan.before(newest(snaps, now))
	for i, s := range snaps {
		out[i].keep(ReasonPin, s.HasTag(backup.PinTag))
		out[i].keep(ReasonUndo, s.HasTag(backup.BeforeRestoreTag) && s.Time.After(undo))
	}
	guard(out)
	return out
}

// apply calls keep for each snapshot that a rule keeps, with the rule.
func (r *Rules) apply(snaps []*backup.Snapshot, now time.Time, keep func(i int, reason string)) {
	counts, withins := r.counts(), r.withins()
	countAt, withinAt := make([]int, len(counts)), make([]int, len(withins))
	for i := range counts {
		countAt[i], withinAt[i] = -1, -1 // in no period yet
	}
	end := newest(snaps, now)
	for i, s := range snaps {
		for _, l := range r.Tags {
			if l.match(s) {
				keep(i, "tags "+l.String())
			}
		}
		for j := range counts {
			c := &counts[j]
			if c.n == 0 {
				continue
			}
			if p := c.in(s.Time, i); p != countAt[j] {
				countAt[j] = p
				if c.n != All {
					c.n--
				}
				keep(i, c.name)
			}
		}
		for j, w := range withins {
			if w.span.IsZero() || !s.Time.After(w.span.before(end)) {
				continue
			}
			if p := w.in(s.Time, i); p != withinAt[j] {
				withinAt[j] = p
				keep(i, w.name+" "+w.span.String())
			}
		}
	}
}

// newest returns the time of the newest snapshot that is not later than now,
// or the zero time.
func newest(snaps []*backup.Snapshot, now time.Time) time.Time {
	for _, s := range snaps {
		if s.Time.Before(now) {
			return s.Time
		}
	}
	return time.Time{}
}

// guard keeps what no rule may remove, in the decisions on one volume.
func guard(out []Decision) {
	complete := func(s *backup.Snapshot) bool { return s.Complete() }
	anything := func(*backup.Snapshot) bool { return true }
	for _, is := range []func(*backup.Snapshot) bool{complete, sound} {
		if i := slices.IndexFunc(out, func(d Decision) bool { return is(d.Snapshot) }); i >= 0 {
			out[i].keep(ReasonNewest, !out[i].Keep)
		}
	}
	for _, is := range []func(*backup.Snapshot) bool{sound, complete, anything} {
		kept := 0
		for _, d := range out {
			if d.Keep && is(d.Snapshot) {
				kept++
			}
		}
		for i := range out {
			if kept < Floor && !out[i].Keep && is(out[i].Snapshot) {
				out[i].keep(ReasonFloor, true)
				kept++
			}
		}
	}
}
