package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup/retention"
)

// clockFile is where RememberClock writes, in the state folder.
const clockFile = "clock.json"

// maxClock is more than the file has.
const maxClock = 4096

// A clockRecord is what a clock showed once.
type clockRecord struct {
	Wall time.Time     `json:"wall"`
	Boot string        `json:"boot"`       // the kernel's name of that boot
	Up   time.Duration `json:"since_boot"` // with the time asleep
}

// Clock returns what is known of the clock, for retention: what it shows, what
// it showed at the last RememberClock with the same folder, how much time
// surely passed since, and whether a time source vouches for it: the kernel
// knows that network time keeps it, or it was set from a clock with a battery.
// A record that can't be read counts as none, beside the error.
func Clock(stateDir string, now time.Time) (retention.Clock, error) {
	return machine{"/", trusted, sinceBoot}.clock(stateDir, now)
}

// RememberClock notes what the clock shows now. Call it after a run of
// retention that had no doubt about the clock.
func RememberClock(stateDir string, now time.Time) error {
	return machine{"/", trusted, sinceBoot}.remember(stateDir, now)
}

// A machine is what clocks are read from.
type machine struct {
	root      string
	kept      func() bool // by network time
	sinceBoot func() time.Duration
}

func (m machine) clock(stateDir string, now time.Time) (retention.Clock, error) {
	c := retention.Clock{Now: now, Trusted: m.kept() || m.battery()}
	last, err := readClock(filepath.Join(stateDir, clockFile))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return c, err
	}
	c.LastRun, c.Elapsed = last.Wall, m.sinceBoot()
	if last.Boot == m.boot() {
		c.Elapsed -= last.Up
	}
	c.Elapsed = max(0, c.Elapsed)
	return c, nil
}

func (m machine) remember(stateDir string, now time.Time) error {
	text, err := json.Marshal(clockRecord{now.Round(0), m.boot(), m.sinceBoot()})
	if err == nil {
		err = writeDurably(filepath.Join(stateDir, clockFile), append(text, '\n'))
	}
	if err != nil {
		return fmt.Errorf("remember the clock: %w", err)
	}
	return nil
}

func readClock(path string) (r clockRecord, err error) {
	f, err := openRegular(path)
	if err != nil {
		return r, fmt.Errorf("what the clock showed: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxClock))
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return clockRecord{}, fmt.Errorf("what the clock showed: %s: %w; remove the file", path, err)
	}
	return r, nil
}

// boot returns the kernel's random name of this boot, or "".
func (m machine) boot() string {
	b, _ := os.ReadFile(filepath.Join(m.root, "proc/sys/kernel/random/boot_id"))
	return strings.TrimSpace(string(b))
}

// battery reports whether the kernel set its clock from a hardware one when it
// started. One whose battery is empty shows a time long past, and that is
// noticed otherwise.
func (m machine) battery() bool {
	files, _ := filepath.Glob(filepath.Join(m.root, "sys/class/rtc/rtc*/hctosys")) // the pattern is valid
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == "1" {
			return true
		}
	}
	return false
}

// trusted reports whether the kernel's clock is kept by network time
// (adjtimex(2)).
func trusted() bool {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	const timeError = 5 // TIME_ERROR: not synchronised
	return err == nil && state != timeError && t.Status&unix.STA_UNSYNC == 0
}

// sinceBoot is CLOCK_BOOTTIME, which nobody can set.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
