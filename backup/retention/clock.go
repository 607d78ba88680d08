package retention

import (
	"fmt"
	"time"

	"github.com/iot49/ide49-backup/backup"
)

// maxJump is how far the clock may move, beyond the time that surely passed,
// before a time source must vouch for it.
const maxJump = 24 * time.Hour

// A Clock is what is known about the clock when retention runs. The zero
// Clock is one that is wrong, so that nothing is removed.
type Clock struct {
	// Now is what the clock shows.
	Now time.Time
	// LastRun is what it showed when retention last ran and trusted it; zero
	// if that is not known.
	LastRun time.Time
	// Elapsed is the least time that surely passed since LastRun, by a clock
	// that can't be set: 0 if nothing is known.
	Elapsed time.Duration
	// Trusted says that a time source vouches for Now: network time, a clock
	// with a battery, or a person.
	Trusted bool
}

// Doubt returns why the clock can't be trusted to remove any of the snapshots,
// in one line, or "" if it can. The clock is doubtful when it is behind the
// newest snapshot, even if a time source vouches for it: then that snapshot's
// time is wrong. It is also doubtful when it moved by more than a day against
// the time that passed since the last run, in either direction, and no time
// source vouches for it.
func (c Clock) Doubt(snaps []*backup.Snapshot) string {
	for _, s := range snaps {
		if s.Time.After(c.Now) {
			return fmt.Sprintf("the clock shows %s, but snapshot %s is of %s: set the clock, or remove that snapshot if its time is wrong",
				show(c.Now), s.ID.Short(), show(s.Time))
		}
	}
	if c.Trusted || c.LastRun.IsZero() {
		return ""
	}
	jump := c.Now.Sub(c.LastRun) - c.Elapsed
	if jump > maxJump || jump < -maxJump {
		return fmt.Sprintf("the clock moved from %s to %s since the last run, and no time source vouches for it: check the clock, then run `ide49-backup forget --trust-clock`",
			show(c.LastRun), show(c.Now))
	}
	return ""
}

func show(t time.Time) string { return t.Format("2006-01-02 15:04 -07:00") }
