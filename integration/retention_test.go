package integration

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/retention"
)

// histories returns snapshots of several volumes, each kept in another way,
// over years of gaps, changes of summer time, equal moments and moved zones.
func histories(t testing.TB, rng *rand.Rand) []*backup.Snapshot {
	t.Helper()
	tree := backup.Hash([]byte("nothing here reads it"))
	var zones []*time.Location
	for _, name := range []string{"America/Los_Angeles", "Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe", "UTC"} {
		loc, err := time.LoadLocation(name)
		must(t, err)
		zones = append(zones, loc)
	}
	la, berlin := zones[0], zones[1]
	var all []*backup.Snapshot
	add := func(volume string, at time.Time, tags ...string) {
		all = append(all, &backup.Snapshot{Time: at, Tree: &tree, Hostname: "pi", Paths: []string{"/service-config/" + volume},
			Tags: append([]string{backup.VolumeTag + volume}, tags...)})
	}
	minutes := func(n int) time.Duration { return time.Duration(rng.IntN(n)) * time.Minute }

	// Every night for two years, with weeks off.
	for day := range 730 {
		if rng.IntN(10) < 3 && day > 30 {
			continue
		}
		at := time.Date(2024, 11, 20+day, 3, 0, 0, rng.IntN(1e9), la).Add(minutes(10))
		if off := day % 200; off > 150 && off < 180 {
			continue
		}
		if rng.IntN(8) == 0 {
			add("nightly", at, "a", "b")
		} else if rng.IntN(8) == 0 {
			add("nightly", at, "a")
		} else {
			add("nightly", at)
		}
	}
	// Every quarter of an hour where summer time ends and begins.
	for i := range 4 * 30 {
		add("often", time.Date(2026, 10, 24, 20, 0, 0, 0, berlin).Add(time.Duration(i)*15*time.Minute))
	}
	for i := range 4 * 20 {
		add("often", time.Date(2026, 3, 28, 20, 0, 0, 0, berlin).Add(time.Duration(i)*15*time.Minute))
	}
	// A device that travels, so that days and hours come in any order.
	at := time.Date(2023, 12, 27, 0, 0, 0, 0, time.UTC)
	for range 200 {
		at = at.Add(time.Duration(rng.ExpFloat64() * float64(11*time.Hour)))
		add("travels", at.In(zones[rng.IntN(len(zones))]))
	}
	// Rarely, over many years and their ends.
	for year := 2009; year < 2026; year++ {
		for _, d := range []int{-3, -1, 0, 1, 2, 40, 200} {
			if rng.IntN(3) > 0 {
				add("rare", time.Date(year, 1, 1+d, 0, 0, 0, 0, la))
			}
		}
	}
	// The same moment several times.
	for i := range 60 {
		at := time.Date(2026, 9, 1, 6*i, 0, 0, 0, la)
		for range 1 + rng.IntN(3) {
			add("twins", at)
		}
	}
	// Snapshots that are no full picture, and some that a person marked.
	marks := []string{backup.IncompleteTag, backup.SuspectTag, backup.BeforeRestoreTag, backup.PinTag, "a"}
	for i := range 150 {
		var tags []string
		for _, m := range marks {
			if rng.IntN(4) == 0 {
				tags = append(tags, m)
			}
		}
		add("marked", time.Date(2026, 11, 1, -13*i, 0, 0, 0, la).Add(minutes(300)), tags...)
	}
	// Some made when the clock was ahead.
	for i := range 20 {
		add("ahead", time.Now().Add(time.Duration(7-i)*9*time.Hour).In(la))
	}
	add("single", time.Date(2026, 11, 1, 3, 0, 0, 0, la))
	return all
}

// ruleSets are rules in restic's flags without the leading --keep-.
var ruleSets = []string{
	"last=3 daily=7 weekly=4 monthly=12",
	"last=1",
	"last=5 hourly=24",
	"hourly=7",
	"hourly=1000 last=2",
	"daily=30 monthly=24",
	"weekly=60",
	"monthly=7 yearly=2",
	"yearly=100",
	"last=3 hourly=24 daily=7 weekly=4 monthly=12 yearly=3",
	"within=2d",
	"within=1y5m7d2h",
	"within=3h",
	"within=1m last=4",
	"within-hourly=2d",
	"within-daily=1m within-weekly=3m within-monthly=1y within-yearly=100y",
	"within-hourly=100y",
	"within-weekly=2y3h daily=3",
	"within=36h within-yearly=5y",
	"tag=a last=1",
	"tag=a,b tag=pin",
	"tag=incomplete daily=2",
}

func parseRules(t testing.TB, set string) (r retention.Rules, flags []string) {
	t.Helper()
	for f := range strings.FieldsSeq(set) {
		name, value, _ := strings.Cut(f, "=")
		flags = append(flags, "--keep-"+name, value)
		counts := map[string]*int{"last": &r.Last, "hourly": &r.Hourly, "daily": &r.Daily, "weekly": &r.Weekly, "monthly": &r.Monthly, "yearly": &r.Yearly}
		spans := map[string]*retention.Span{"within": &r.Within, "within-hourly": &r.WithinHourly, "within-daily": &r.WithinDaily,
			"within-weekly": &r.WithinWeekly, "within-monthly": &r.WithinMonthly, "within-yearly": &r.WithinYearly}
		switch {
		case counts[name] != nil:
			n, err := strconv.Atoi(value)
			must(t, err)
			*counts[name] = n
		case spans[name] != nil:
			must(t, spans[name].UnmarshalText([]byte(value)))
		default:
			var l retention.TagList
			must(t, l.UnmarshalText([]byte(value)))
			r.Tags = append(r.Tags, l)
		}
	}
	must(t, r.Validate())
	return r, flags
}

// A resticSnapshot is one in the output of forget --json.
type resticSnapshot struct {
	ID   backup.ID `json:"id"`
	Time time.Time `json:"time"`
}

// A resticGroup is one element of the output of forget --json.
type resticGroup struct {
	Paths   []string         `json:"paths"`
	Keep    []resticSnapshot `json:"keep"`
	Remove  []resticSnapshot `json:"remove"`
	Reasons []struct {
		Matches []string `json:"matches"`
	} `json:"reasons"`
}

// ourWords turns restic's reasons into ours.
func ourWords(matches []string) []string {
	var out []string
	for _, m := range matches {
		m = strings.TrimSuffix(m, " snapshot")
		if tags, ok := strings.CutPrefix(m, "has tags ["); ok {
			m = "tags " + strings.ReplaceAll(strings.TrimSuffix(tags, "]"), ", ", ",")
		}
		out = append(out, m)
	}
	return out
}

// Stock restic decides as we do, for the same rules, on each snapshot and with
// the same reasons. What ours keeps beyond that says why.
func TestRetentionEqualsRestics(t *testing.T) {
	p := newPlace(t)
	be, err := local.Create(p.dir, local.Options{})
	must(t, err)
	r, err := repo.Init(t.Context(), be, password, crypt.Params{N: 2, R: 1, P: 1}, repo.Options{})
	must(t, err)
	for _, s := range histories(t, rand.New(rand.NewPCG(3, 3))) {
		_, err := r.SaveSnapshot(t.Context(), s)
		must(t, err)
	}
	defer func(l *time.Location) { time.Local = l }(time.Local)
	for i, set := range ruleSets {
		// The process's own zone matters where it is the snapshots' zone:
		// spans then cross summer time.
		zone := []string{"UTC", "America/Los_Angeles", "Europe/Berlin"}[i%3]
		time.Local, err = time.LoadLocation(zone)
		must(t, err)
		all, err := r.Snapshots(t.Context())
		must(t, err)
		p.env = append(p.env, "TZ="+zone)
		t.Run(set, func(t *testing.T) {
			rules, flags := parseRules(t, set)
			var groups []resticGroup
			must(t, json.Unmarshal([]byte(p.restic(t, append([]string{"forget", "--dry-run", "--json", "--no-lock"}, flags...)...)), &groups))
			compareDecisions(t, rules, all, groups)
		})
	}
	must(t, r.Close())
}

func compareDecisions(t *testing.T, rules retention.Rules, all []*backup.Snapshot, groups []resticGroup) {
	t.Helper()
	clock := retention.Clock{Now: time.Now()}
	doubt := clock.Doubt(all)
	if doubt == "" {
		t.Error("no snapshot is later than the clock")
	}
	safety := []string{retention.ReasonFloor, retention.ReasonNewest, retention.ReasonPin, retention.ReasonUndo, doubt}
	safer := func(reason string) bool {
		return slices.Contains(safety, reason) || strings.HasSuffix(reason, retention.SoundSuffix)
	}
	// Of snapshots with equal times restic takes whichever it loaded first,
	// so these are compared as a set.
	times := map[string]int{}
	name := func(paths []string, at time.Time) string {
		return paths[0] + " " + at.UTC().Format(time.RFC3339Nano)
	}
	for _, s := range all {
		times[name(s.Paths, s.Time)]++
	}
	line := func(paths []string, at time.Time, id backup.ID, reasons []string) string {
		n := name(paths, at)
		if times[n] == 1 {
			n += " " + id.Short()
		}
		return fmt.Sprintf("%s %q", n, slices.Sorted(slices.Values(reasons)))
	}
	var ours, theirs []string
	for _, d := range retention.Apply(rules, all, clock) {
		byRule := slices.DeleteFunc(slices.Clone(d.Reasons), safer)
		ours = append(ours, line(d.Snapshot.Paths, d.Snapshot.Time, d.Snapshot.ID, byRule))
	}
	kept := map[backup.ID]bool{}
	for _, g := range groups {
		if len(g.Keep) != len(g.Reasons) {
			t.Fatalf("restic gives %d reasons for %d snapshots", len(g.Reasons), len(g.Keep))
		}
		for i, s := range g.Keep {
			theirs = append(theirs, line(g.Paths, s.Time, s.ID, ourWords(g.Reasons[i].Matches)))
			kept[s.ID] = true
		}
		for _, s := range g.Remove {
			theirs = append(theirs, line(g.Paths, s.Time, s.ID, nil))
		}
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	if len(ours) != len(theirs) {
		t.Fatalf("%d decisions, restic has %d", len(ours), len(theirs))
	}
	bad := 0
	for i := range ours {
		if ours[i] != theirs[i] {
			if bad++; bad <= 5 {
				t.Errorf("ours:   %s\nrestic: %s", ours[i], theirs[i])
			}
		}
	}
	if bad > 0 {
		t.Fatalf("%d of %d decisions differ", bad, len(ours))
	}

	// Where nothing calls for more care, the very same snapshots go.
	timely := slices.DeleteFunc(slices.Clone(all), func(s *backup.Snapshot) bool { return s.Volume() == "ahead" })
	removed := 0
	for _, d := range retention.Apply(rules, timely, clock) {
		s := d.Snapshot
		if kept[s.ID] && !d.Keep && times[name(s.Paths, s.Time)] == 1 {
			t.Errorf("we remove %s of %s, which restic keeps", s.Volume(), s.Time)
		}
		if !d.Keep {
			removed++
		}
		if s.Volume() == "marked" || s.Volume() == "single" || slices.ContainsFunc(d.Reasons, func(r string) bool { return safer(r) && r != retention.ReasonPin }) {
			continue
		}
		if kept[s.ID] != d.Keep && times[name(s.Paths, s.Time)] == 1 {
			t.Errorf("%s of %s: kept %v %q, by restic %v", s.Volume(), s.Time, d.Keep, d.Reasons, kept[s.ID])
		}
	}
	if removed == 0 && rules.WithinHourly.Years == 0 {
		t.Error("nothing at all is removed")
	}
}
