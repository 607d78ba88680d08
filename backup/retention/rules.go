package retention

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/backup"
)

// Rules say which snapshots of one volume stay. A snapshot stays when any
// rule keeps it; without any rule all stay.
//
// Hours, days, weeks (ISO 8601), months and years are those of the calendar
// in each snapshot's own time zone, as restic counts them. The newest
// snapshot of such a period stands for it, and periods without a snapshot are
// not counted.
type Rules struct {
	// How many to keep: the newest, and the newest of each hour, day and so
	// on. All means without limit.
	Last    int `yaml:"last,omitempty" json:"last,omitempty" jsonschema:"minimum=-1" jsonschema_description:"Keep this many of the newest snapshots of each volume; -1 keeps all."`
	Hourly  int `yaml:"hourly,omitempty" json:"hourly,omitempty" jsonschema:"minimum=-1" jsonschema_description:"Keep the newest snapshot of each of the last N hours that have one."`
	Daily   int `yaml:"daily,omitempty" json:"daily,omitempty" jsonschema:"minimum=-1" jsonschema_description:"Keep the newest snapshot of each of the last N days that have one."`
	Weekly  int `yaml:"weekly,omitempty" json:"weekly,omitempty" jsonschema:"minimum=-1" jsonschema_description:"Keep the newest snapshot of each of the last N weeks that have one."`
	Monthly int `yaml:"monthly,omitempty" json:"monthly,omitempty" jsonschema:"minimum=-1" jsonschema_description:"Keep the newest snapshot of each of the last N months that have one."`
	Yearly  int `yaml:"yearly,omitempty" json:"yearly,omitempty" jsonschema:"minimum=-1" jsonschema_description:"Keep the newest snapshot of each of the last N years that have one."`

	// All snapshots, or the newest of each hour, day and so on, that are
	// younger than a span, measured back from the volume's newest snapshot.
	Within        Span `yaml:"within,omitempty" json:"within,omitzero" jsonschema_description:"Keep every snapshot made within this span before the newest, for example 2y5m7d3h."`
	WithinHourly  Span `yaml:"within_hourly,omitempty" json:"within_hourly,omitzero" jsonschema_description:"Keep the newest snapshot of each hour within this span."`
	WithinDaily   Span `yaml:"within_daily,omitempty" json:"within_daily,omitzero" jsonschema_description:"Keep the newest snapshot of each day within this span."`
	WithinWeekly  Span `yaml:"within_weekly,omitempty" json:"within_weekly,omitzero" jsonschema_description:"Keep the newest snapshot of each week within this span."`
	WithinMonthly Span `yaml:"within_monthly,omitempty" json:"within_monthly,omitzero" jsonschema_description:"Keep the newest snapshot of each month within this span."`
	WithinYearly  Span `yaml:"within_yearly,omitempty" json:"within_yearly,omitzero" jsonschema_description:"Keep the newest snapshot of each year within this span."`

	// Tags keeps each snapshot that has all tags of one of the lists.
	Tags []TagList `yaml:"tags,omitempty" json:"tags,omitempty" jsonschema_description:"Keep snapshots with these tags; one text may name several tags, joined by commas, that a snapshot must all have."`
}

// Default returns the rules where the user gives none.
func Default() Rules { return Rules{Last: 3, Daily: 7, Weekly: 4, Monthly: 12} }

// All is a count without limit.
const All = -1

// ErrRules says that rules make no sense.
var ErrRules = errors.New("bad rules for keeping snapshots")

// A count keeps the newest snapshots of n periods.
type count struct {
	name string
	n    int
	in   period
}

func (r *Rules) counts() []count {
	return []count{
		{"last", r.Last, each}, {"hourly", r.Hourly, hour}, {"daily", r.Daily, day},
		{"weekly", r.Weekly, week}, {"monthly", r.Monthly, month}, {"yearly", r.Yearly, year},
	}
}

// A within keeps the newest snapshot of each period of a span.
type within struct {
	name string
	span Span
	in   period
}

func (r *Rules) withins() []within {
	return []within{
		{"within", r.Within, each}, {"hourly within", r.WithinHourly, hour}, {"daily within", r.WithinDaily, day},
		{"weekly within", r.WithinWeekly, week}, {"monthly within", r.WithinMonthly, month}, {"yearly within", r.WithinYearly, year},
	}
}

// Empty reports whether there is no rule, so that every snapshot stays.
func (r *Rules) Empty() bool {
	return len(r.Tags) == 0 &&
		!slices.ContainsFunc(r.counts(), func(c count) bool { return c.n != 0 }) &&
		!slices.ContainsFunc(r.withins(), func(w within) bool { return !w.span.IsZero() })
}

// Validate returns an error that matches ErrRules if a number is out of
// range or a list names no tag. Apply keeps everything under such rules.
func (r *Rules) Validate() error {
	for _, c := range r.counts() {
		if c.n < All {
			return fmt.Errorf("%w: %s: %d is less than -1 (all)", ErrRules, c.name, c.n)
		}
	}
	for _, w := range r.withins() {
		if err := w.span.validate(); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrRules, w.name, err)
		}
	}
	for _, l := range r.Tags {
		if len(l) == 0 || slices.Contains(l, "") {
			return fmt.Errorf("%w: an empty tag", ErrRules)
		}
	}
	return nil
}

// A TagList is tags that a snapshot must all have. Its text joins them by
// commas.
type TagList []string

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *TagList) UnmarshalText(text []byte) error {
	tags := strings.Split(string(text), ",")
	for i, t := range tags {
		if tags[i] = strings.TrimSpace(t); tags[i] == "" {
			return fmt.Errorf("%w: %.60q holds an empty tag", ErrRules, text)
		}
	}
	*l = tags
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (l TagList) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

func (l TagList) String() string { return strings.Join(l, ",") }

func (l TagList) match(s *backup.Snapshot) bool {
	return !slices.ContainsFunc(l, func(tag string) bool { return !s.HasTag(tag) })
}

// A Span is a length of time by the calendar, such as 2y5m7d3h: years,
// months, days and hours. Its zero value is no span.
type Span struct {
	Years, Months, Days, Hours int
}

// maxSpan bounds each number of a span.
const maxSpan = 100_000

// IsZero reports whether s is no span.
func (s Span) IsZero() bool { return s == Span{} }

func (s Span) validate() error {
	for _, n := range []int{s.Years, s.Months, s.Days, s.Hours} {
		if n < 0 || n > maxSpan {
			return fmt.Errorf("a span of %d is not between 0 and %d", n, maxSpan)
		}
	}
	return nil
}

// before returns the moment that lies a span before t: hours are exact, the
// others go by the calendar of t's zone.
func (s Span) before(t time.Time) time.Time {
	return t.AddDate(-s.Years, -s.Months, -s.Days).Add(-time.Duration(s.Hours) * time.Hour)
}

// UnmarshalText implements encoding.TextUnmarshaler. It reads whole numbers,
// each followed by y, m, d or h, in any order, each unit at most once.
func (s *Span) UnmarshalText(text []byte) error {
	bad := func() error {
		return fmt.Errorf("%w: %.60q is no span; write years, months, days and hours such as 2y5m7d3h", ErrRules, text)
	}
	var out Span
	units := map[byte]*int{'y': &out.Years, 'm': &out.Months, 'd': &out.Days, 'h': &out.Hours}
	rest := string(text)
	if rest == "" {
		return bad()
	}
	for rest != "" {
		end := strings.IndexFunc(rest, func(c rune) bool { return c < '0' || c > '9' })
		if end < 1 {
			return bad()
		}
		n, err := strconv.Atoi(rest[:end])
		to := units[rest[end]]
		if err != nil || n > maxSpan || to == nil {
			return bad()
		}
		*to = n
		delete(units, rest[end])
		rest = rest[end+1:]
	}
	*s = out
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Span) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String returns the span as UnmarshalText reads it, "" for no span.
func (s Span) String() string {
	var b strings.Builder
	for _, u := range []struct {
		n    int
		unit byte
	}{{s.Years, 'y'}, {s.Months, 'm'}, {s.Days, 'd'}, {s.Hours, 'h'}} {
		if u.n != 0 {
			b.WriteString(strconv.Itoa(u.n))
			b.WriteByte(u.unit)
		}
	}
	return b.String()
}

// A period returns a number for the period that a moment falls into. The nr-th
// snapshot of a list is in a period of its own for rules that count each.
type period func(t time.Time, nr int) int

func each(_ time.Time, nr int) int { return nr }
func hour(t time.Time, _ int) int  { return day(t, 0)*100 + t.Hour() }
func day(t time.Time, _ int) int   { return month(t, 0)*100 + t.Day() }
func month(t time.Time, _ int) int { return t.Year()*100 + int(t.Month()) }
func year(t time.Time, _ int) int  { return t.Year() }
func week(t time.Time, _ int) int {
	y, w := t.ISOWeek()
	return y*100 + w
}
