package policy

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup/retention"
)

func TestClock(t *testing.T) {
	root, state := t.TempDir(), t.TempDir()
	write := func(name, text string) {
		t.Helper()
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	up := time.Hour
	m := machine{root, func() bool { return false }, func() time.Duration { return up }}
	write("proc/sys/kernel/random/boot_id", "one\n")
	start := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	expect := func(when string, now time.Time, want retention.Clock) {
		t.Helper()
		want.Now = now
		if got, err := m.clock(state, now); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", when, got, err, want)
		}
	}
	expect("at first", start, retention.Clock{})
	if err := m.remember(state, start); err != nil {
		t.Fatal(err)
	}
	up += 24 * time.Hour
	expect("a day later", start.AddDate(1, 0, 0), retention.Clock{LastRun: start, Elapsed: 24 * time.Hour})
	write("proc/sys/kernel/random/boot_id", "two\n")
	up = 5 * time.Minute
	expect("after a restart", start, retention.Clock{LastRun: start, Elapsed: 5 * time.Minute})
	write("sys/class/rtc/rtc0/hctosys", "0\n")
	expect("with a clock that is not used", start, retention.Clock{LastRun: start, Elapsed: 5 * time.Minute})
	write("sys/class/rtc/rtc1/hctosys", "1\n")
	expect("with a battery", start, retention.Clock{LastRun: start, Elapsed: 5 * time.Minute, Trusted: true})
	m.root = t.TempDir()
	m.kept = func() bool { return true }
	expect("with network time", start, retention.Clock{LastRun: start, Elapsed: 5 * time.Minute, Trusted: true})

	for _, text := range []string{"", "x", `{"wall":"yesterday"}`} {
		if err := os.WriteFile(filepath.Join(state, clockFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if c, err := m.clock(state, start); err == nil || !c.LastRun.IsZero() || c.Now != start {
			t.Errorf("record %q: %+v, %v", text, c, err)
		}
	}
	if err := m.remember(state, start); err != nil {
		t.Fatal(err)
	}
	expect("after damage", start, retention.Clock{LastRun: start, Trusted: true})
}

// The clocks of this machine can be read.
func TestClockHere(t *testing.T) {
	state := t.TempDir()
	now := time.Now()
	if err := RememberClock(state, now); err != nil {
		t.Fatal(err)
	}
	c, err := Clock(state, now.Add(time.Second))
	if err != nil || !c.LastRun.Equal(now) || c.Elapsed < 0 || c.Elapsed > time.Minute || sinceBoot() == 0 || (machine{root: "/"}).boot() == "" {
		t.Errorf("%+v, %v", c, err)
	}
}
