package retention_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/retention"
)

var update = flag.Bool("update", false, "write the golden tables anew")

// Each file in testdata is one case: lines that set the rules and the clock,
// then a table of snapshots, each with the decision and its reasons behind "|".
// Lines that begin with # explain.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d tables, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := runTable(t, string(text))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if got != string(text) {
				t.Errorf("the decisions differ from the table; got\n%s", got)
			}
		})
	}
}

func runTable(t *testing.T, text string) string {
	t.Helper()
	var rules retention.Rules
	var clock retention.Clock
	var snaps []*backup.Snapshot
	var out []string
	at := map[*backup.Snapshot]int{} // index in out
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		left, _, _ := strings.Cut(line, "|")
		f := strings.Fields(left)
		out = append(out, line)
		switch {
		case len(f) == 0 || f[0] == "#":
		case f[0] == "keep":
			rules = parseRules(t, f[1:])
		case f[0] == "clock":
			clock = parseClock(t, f[1:])
		default:
			s := &backup.Snapshot{Time: moment(t, f[0]), Paths: []string{"/v"}, Hostname: "pi", ID: backup.Hash([]byte(strings.TrimSpace(left)))}
			if len(f) > 1 {
				host, volume, _ := strings.Cut(f[1], "/")
				s.Hostname, s.Paths = host, []string{"/" + volume}
				s.Tags = append(f[2:], backup.VolumeTag+volume)
			}
			at[s] = len(out) - 1
			out[len(out)-1] = fmt.Sprintf("%-52s| ", strings.TrimRight(left, " "))
			snaps = append(snaps, s)
		}
	}
	for _, d := range retention.Apply(rules, snaps, clock) {
		word := "-"
		if d.Keep {
			word = "keep: " + strings.Join(d.Reasons, "; ")
		}
		out[at[d.Snapshot]] += word
	}
	return strings.Join(out, "\n") + "\n"
}

func moment(t *testing.T, text string) time.Time {
	t.Helper()
	at, err := time.Parse("2006-01-02T15:04Z07:00", text)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func parseClock(t *testing.T, fields []string) (c retention.Clock) {
	t.Helper()
	for _, f := range fields {
		name, value, _ := strings.Cut(f, "=")
		switch name {
		case "now":
			c.Now = moment(t, value)
		case "last":
			c.LastRun = moment(t, value)
		case "trusted":
			c.Trusted = true
		case "elapsed":
			d, err := time.ParseDuration(value)
			if err != nil {
				t.Fatal(err)
			}
			c.Elapsed = d
		default:
			t.Fatalf("clock %q", f)
		}
	}
	return c
}

func parseRules(t *testing.T, fields []string) (r retention.Rules) {
	t.Helper()
	v := reflect.ValueOf(&r).Elem()
	for _, f := range fields {
		name, value, _ := strings.Cut(f, "=")
		field := v.FieldByNameFunc(func(n string) bool { return strings.EqualFold(n, strings.ReplaceAll(name, "-", "")) })
		switch field.Interface().(type) {
		case int:
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			field.SetInt(int64(n))
		case retention.Span:
			if err := field.Addr().Interface().(*retention.Span).UnmarshalText([]byte(value)); err != nil {
				t.Fatal(err)
			}
		default:
			var l retention.TagList
			if err := l.UnmarshalText([]byte(value)); err != nil {
				t.Fatal(err)
			}
			r.Tags = append(r.Tags, l)
		}
	}
	return r
}

// history returns n snapshots of a few volumes with random tags and times.
func history(rng *rand.Rand, n int) []*backup.Snapshot {
	tags := []string{backup.IncompleteTag, backup.SuspectTag, backup.BeforeRestoreTag, backup.PinTag, "x"}
	var all []*backup.Snapshot
	at := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	for i := range n {
		at = at.Add(-time.Duration(rng.ExpFloat64() * float64(20*time.Hour)))
		s := &backup.Snapshot{Time: at, Hostname: "pi", ID: backup.Hash([]byte{byte(i), byte(i >> 8)})}
		s.Tags = []string{backup.VolumeTag + string(rune('a'+rng.IntN(3)))}
		for _, t := range tags {
			if rng.IntN(5) == 0 {
				s.Tags = append(s.Tags, t)
			}
		}
		all = append(all, s)
	}
	return all
}

func someRules(rng *rand.Rand) retention.Rules {
	var r retention.Rules
	v := reflect.ValueOf(&r).Elem()
	for range 1 + rng.IntN(3) {
		switch f := v.Field(rng.IntN(v.NumField())); f.Kind() {
		case reflect.Int:
			f.SetInt(int64(rng.IntN(6) - 1))
		case reflect.Struct:
			f.Set(reflect.ValueOf(retention.Span{Months: rng.IntN(2), Days: rng.IntN(9), Hours: rng.IntN(30)}))
		case reflect.Slice:
			r.Tags = append(r.Tags, retention.TagList{"x"})
		default:
			panic(f.Kind())
		}
	}
	return r
}

// What must hold for any rules and history.
func TestNeverTooFew(t *testing.T) {
	for seed := range uint64(1000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		snaps, rules := history(rng, rng.IntN(60)), someRules(rng)
		clock := retention.Clock{Now: time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)}
		decisions := retention.Apply(rules, snaps, clock)
		kept, all, newest := map[string]int{}, map[string]int{}, map[string]*backup.Snapshot{}
		if len(decisions) != len(snaps) {
			t.Fatalf("seed %d: %d decisions on %d snapshots", seed, len(decisions), len(snaps))
		}
		stays := map[backup.ID]bool{}
		for _, d := range decisions {
			v := d.Snapshot.Volume()
			all[v]++
			if d.Keep {
				kept[v]++
				stays[d.Snapshot.ID] = true
			}
			if d.Keep != (len(d.Reasons) > 0) {
				t.Errorf("seed %d: kept %v for %q", seed, d.Keep, d.Reasons)
			}
			if newest[v] == nil && d.Snapshot.Complete() {
				newest[v] = d.Snapshot
				if !d.Keep {
					t.Errorf("seed %d: the newest complete snapshot of %s goes", seed, v)
				}
			}
			if d.Snapshot.HasTag(backup.PinTag) && !d.Keep {
				t.Errorf("seed %d: a pinned snapshot goes", seed)
			}
		}
		for v, n := range kept {
			if n < min(all[v], retention.Floor) {
				t.Errorf("seed %d: %d of %d snapshots of %s stay", seed, n, all[v], v)
			}
		}
		// What is no full picture never makes one go.
		var sound []*backup.Snapshot
		for _, s := range snaps {
			if s.Complete() && !s.HasTag(backup.SuspectTag) && !s.HasTag(backup.BeforeRestoreTag) {
				sound = append(sound, s)
			}
		}
		for _, d := range retention.Apply(rules, sound, clock) {
			if d.Keep && !stays[d.Snapshot.ID] {
				t.Errorf("seed %d: others push out snapshot of %v", seed, d.Snapshot.Time)
			}
		}
		// Removing and deciding again removes nothing more of the sound ones.
		var rest []*backup.Snapshot
		for _, d := range decisions {
			if d.Keep {
				rest = append(rest, d.Snapshot)
			}
		}
		for _, d := range retention.Apply(rules, rest, clock) {
			if !d.Keep && sound != nil && len(sound) == len(snaps) {
				t.Errorf("seed %d: a second run removes more", seed)
			}
		}
		for _, d := range retention.Apply(rules, snaps, retention.Clock{}) {
			if !d.Keep {
				t.Fatalf("seed %d: removed although nothing is known of the clock", seed)
			}
		}
		// The order of the input does not matter.
		rng.Shuffle(len(snaps), func(i, j int) { snaps[i], snaps[j] = snaps[j], snaps[i] })
		if again := retention.Apply(rules, snaps, clock); !reflect.DeepEqual(again, decisions) {
			t.Errorf("seed %d: another order of the same snapshots is decided otherwise", seed)
		}
	}
}

func TestSpan(t *testing.T) {
	for text, want := range map[string]retention.Span{
		"2y5m7d3h": {Years: 2, Months: 5, Days: 7, Hours: 3},
		"3h2y":     {Years: 2, Hours: 3},
		"0d":       {},
		"36h":      {Hours: 36},
	} {
		var s retention.Span
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%q: %v, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "5", "d", "-2d", "1d2d", "2w", "1.5d", " 2d", "2D", "1000000000y", "99999999999999999999h", "2d3"} {
		var s retention.Span
		if err := s.UnmarshalText([]byte(text)); !errors.Is(err, retention.ErrRules) || s != (retention.Span{}) {
			t.Errorf("%q: %v, %v", text, s, err)
		}
	}
}

func FuzzSpan(f *testing.F) {
	f.Add("2y5m7d3h")
	f.Fuzz(func(t *testing.T, text string) {
		var s, again retention.Span
		if s.UnmarshalText([]byte(text)) != nil {
			return
		}
		if err := (&retention.Rules{Within: s}).Validate(); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if !s.IsZero() && (again.UnmarshalText([]byte(s.String())) != nil || again != s) {
			t.Errorf("%q reads as %v, that as %v", text, s, again)
		}
	})
}

func TestBadRulesKeepEverything(t *testing.T) {
	snaps := history(rand.New(rand.NewPCG(1, 1)), 50)
	for _, rules := range []retention.Rules{
		{Last: 1, Daily: -2},
		{Last: 1, Within: retention.Span{Days: -1}},
		{Last: 1, WithinYearly: retention.Span{Years: 1 << 30}},
		{Tags: []retention.TagList{{}}},
	} {
		if err := rules.Validate(); !errors.Is(err, retention.ErrRules) {
			t.Errorf("%+v: %v", rules, err)
		}
		for _, d := range retention.Apply(rules, snaps, retention.Clock{Now: time.Now()}) {
			if !d.Keep || !slices.Equal(d.Reasons, []string{retention.ReasonBadRules}) {
				t.Fatalf("%+v: %+v", rules, d)
			}
		}
	}
}

func TestRulesInJSON(t *testing.T) {
	rules := retention.Rules{Last: 3, WithinDaily: retention.Span{Years: 1}, Tags: []retention.TagList{{"a", "b"}}}
	text, err := json.Marshal(rules)
	if want := `{"last":3,"within_daily":"1y","tags":["a,b"]}`; err != nil || string(text) != want {
		t.Errorf("%s, %v", text, err)
	}
	var back retention.Rules
	if err := json.Unmarshal(text, &back); err != nil || !reflect.DeepEqual(back, rules) {
		t.Errorf("%+v, %v", back, err)
	}
	if err := json.Unmarshal([]byte(`{"tags":["a,,b"]}`), &back); !errors.Is(err, retention.ErrRules) {
		t.Errorf("an empty tag: %v", err)
	}
}

func BenchmarkApply(b *testing.B) {
	snaps := history(rand.New(rand.NewPCG(1, 1)), 3000)
	rules := retention.Rules{Last: 3, Hourly: 24, Daily: 7, Weekly: 4, Monthly: 12, Yearly: 3}
	for b.Loop() {
		retention.Apply(rules, snaps, retention.Clock{Now: time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)})
	}
}
