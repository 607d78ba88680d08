package policy

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// A Moment is a point in time that a person named. Snapshots not later than
// it are the ones meant.
type Moment struct {
	// Time is the last instant of what the text names: of a day, or of a
	// minute or second, since a snapshot shown as 14:30 belongs to "14:30".
	// It is in the zone that the text was read in, and lies ahead of now
	// where that day or minute is not over yet.
	Time time.Time
	// Day says that the text named a whole day.
	Day bool
	// Text is what the person wrote.
	Text string
}

// String returns the moment for a sentence, as it is shown before anything
// happens: "the end of Friday 2026-11-20 PST" or "Friday 2026-11-20 14:30:59
// PST".
func (m Moment) String() string {
	if m.Day {
		return "the end of " + m.Time.Format("Monday 2006-01-02 MST")
	}
	return m.Time.Format("Monday 2006-01-02 15:04:05 MST")
}

// Errors of ParseMoment, for errors.Is.
var (
	// ErrNoMoment means that the text is no time.
	ErrNoMoment = errors.New("not a time")
	// ErrFuture means that the text names a time that has not begun.
	ErrFuture = errors.New("in the future")
)

// A momentError is one line that says what is wrong and what to write.
type momentError struct {
	text   string
	reason string
	is     error
}

func (e *momentError) Error() string { return e.text + ": " + e.reason }
func (e *momentError) Unwrap() error { return e.is }

// momentForms ends the errors that need it.
const momentForms = `write a moment ("2026-11-20 14:30", "14:30", "yesterday 14:30"), a day ("today", "yesterday", "2026-11-20", "monday", "last friday") or an age ("36h", "3d", "2 weeks ago")`

// maxMoment is the length in bytes of the longest text worth reading.
const maxMoment = 64

// ParseMoment reads a time as a person writes it. Case does not count, nor
// does how much space there is. Times without a zone are in loc, and now
// says what "today" is. The forms are
//
//   - a moment: "2026-11-20 14:30", "2026-11-20T14:30:05", RFC 3339 with "Z"
//     or an offset, "14:30" (today), or a day and a time as "monday 14:30"
//     and "yesterday at 9:05"; "now";
//   - a day: "today", "yesterday", "2026-11-20", a weekday in full or by its
//     first three letters (the latest such day, today included), or "last"
//     and a weekday (the latest before today);
//   - an age: whole numbers of seconds, minutes, hours, days, weeks, months
//     and years, largest first and each at most once: "36h", "3d", "1d 12h",
//     "2 weeks ago", "an hour ago". "m" is minutes, "mo" months. Days and
//     longer are counted on the calendar, so that "1d" is the same time of
//     day even when the clocks were changed; a day that the month lacks
//     becomes its last.
//
// Where the clocks go back and a local time comes twice, the second is
// meant; where they go forward and it never comes, the moment of the change.
// Both keep "not later than" true of what the clock on the wall showed.
//
// The error is one line and wraps ErrNoMoment or ErrFuture.
func ParseMoment(text string, now time.Time, loc *time.Location) (Moment, error) {
	p := momentParser{text: text, now: now.In(loc), loc: loc}
	m, err := p.parse()
	if err != nil {
		return Moment{}, err
	}
	m.Text = text
	return m, nil
}

type momentParser struct {
	text string
	now  time.Time
	loc  *time.Location
}

func (p *momentParser) fail(format string, args ...any) error {
	return &momentError{quoteShort(p.text), fmt.Sprintf(format, args...), ErrNoMoment}
}

func (p *momentParser) future(hint string) error {
	return &momentError{quoteShort(p.text), fmt.Sprintf("that is in the future: the clock here shows %s; %s",
		p.now.Format("Monday 2006-01-02 15:04 MST"), hint), ErrFuture}
}

func (p *momentParser) parse() (Moment, error) {
	if len(p.text) > maxMoment {
		return Moment{}, p.fail("not a time: %s", momentForms)
	}
	words := strings.Fields(strings.ToLower(p.text))
	if len(words) == 0 {
		return Moment{}, p.fail("not a time: %s", momentForms)
	}
	if len(words) == 1 && words[0] == "now" {
		return Moment{Time: p.now}, nil
	}
	if t, ok, err := p.age(words); ok || err != nil {
		return Moment{Time: t}, err
	}

	today := civilDay(p.now)
	day, rest, hasDay, err := p.day(words, today)
	if err != nil {
		return Moment{}, err
	}
	if hasDay && len(rest) == 0 {
		if day.After(today) {
			return Moment{}, p.future("if that is wrong, choose a snapshot by its id")
		}
		_, last := onClock(day.AddDate(0, 0, 1).Add(-1), p.loc)
		return Moment{Time: last, Day: true}, nil
	}
	if hasDay && rest[0] == "at" {
		rest = rest[1:]
	}
	if !hasDay {
		day = today
	}
	clock, zone, ok := parseClock(rest)
	if !ok {
		return Moment{}, p.fail("not a time: %s", momentForms)
	}
	if clock.reason != "" {
		return Moment{}, p.fail("%s", clock.reason)
	}
	var first, last time.Time
	wall := day.Add(clock.since)
	if zone != nil {
		first = wall.Add(-*zone).In(p.loc)
		last = first.Add(clock.unit - 1)
	} else {
		first, _ = onClock(wall, p.loc)
		_, last = onClock(wall.Add(clock.unit-1), p.loc)
	}
	if first.After(p.now) {
		if !hasDay {
			return Moment{}, p.future(fmt.Sprintf("write %q for the day before", "yesterday "+rest[0]))
		}
		return Moment{}, p.future("if that is wrong, choose a snapshot by its id")
	}
	return Moment{Time: last}, nil
}

// civilDay returns the date that t shows, as midnight in UTC: UTC has no
// clock changes, so dates and clock times can be reckoned there.
func civilDay(t time.Time) time.Time {
	y, m, d := t.Date()
	return time.Date(y, m, d, 0, 0, 0, 0, time.UTC)
}

// day reads a day at the start of words and returns it as midnight in UTC,
// with the words after it.
func (p *momentParser) day(words []string, today time.Time) (day time.Time, rest []string, ok bool, err error) {
	w, rest := words[0], words[1:]
	switch w {
	case "today":
		return today, rest, true, nil
	case "yesterday":
		return today.AddDate(0, 0, -1), rest, true, nil
	case "last":
		if len(rest) == 0 {
			return time.Time{}, nil, false, p.fail(`not a time: "last" wants a weekday after it, as "last friday"`)
		}
		wd, ok := weekday(rest[0])
		if !ok {
			return time.Time{}, nil, false, p.fail(`not a time: "last" wants a weekday after it, as "last friday"; an age is "2 weeks ago"`)
		}
		back := (int(today.Weekday()) - int(wd) + 7) % 7
		if back == 0 {
			back = 7
		}
		return today.AddDate(0, 0, -back), rest[1:], true, nil
	}
	if wd, ok := weekday(w); ok {
		back := (int(today.Weekday()) - int(wd) + 7) % 7
		return today.AddDate(0, 0, -back), rest, true, nil
	}
	// A date, alone or joined to a time by "t".
	date, clock, joined := strings.Cut(w, "t")
	if len(date) != len("2006-01-02") || date[4] != '-' || date[7] != '-' {
		return time.Time{}, words, false, nil
	}
	y, ok1 := digits(date[:4])
	mo, ok2 := digits(date[5:7])
	d, ok3 := digits(date[8:])
	if !ok1 || !ok2 || !ok3 || joined && clock == "" {
		return time.Time{}, words, false, nil
	}
	day = time.Date(y, time.Month(mo), d, 0, 0, 0, 0, time.UTC)
	if y == 0 || day.Day() != d || day.Month() != time.Month(mo) {
		return time.Time{}, nil, false, p.fail("there is no such day")
	}
	if joined {
		rest = append([]string{clock}, rest...)
	}
	return day, rest, true, nil
}

func weekday(w string) (time.Weekday, bool) {
	for wd := time.Sunday; wd <= time.Saturday; wd++ {
		full := strings.ToLower(wd.String())
		if w == full || w == full[:3] {
			return wd, true
		}
	}
	return 0, false
}

// A clockTime is a time of day: unit is how much of it the text left open.
type clockTime struct {
	since  time.Duration // since midnight
	unit   time.Duration // at least 1 ns
	reason string        // why it is no time of any day
}

// parseClock reads "15:04", "15:04:05" or "15:04:05.999", followed in the
// same word or the next by "z" or an offset.
func parseClock(words []string) (c clockTime, zone *time.Duration, ok bool) {
	if len(words) == 0 || len(words) > 2 {
		return c, nil, false
	}
	text := strings.Join(words, "")
	if i := strings.IndexAny(text, "z+-"); i >= 0 {
		off, ok := parseOffset(text[i:])
		if !ok {
			return c, nil, false
		}
		zone, text = &off, text[:i]
		if len(words) == 2 && len(words[0]) != i {
			return c, nil, false
		}
	} else if len(words) == 2 {
		return c, nil, false
	}
	text, frac, hasFrac := strings.Cut(text, ".")
	parts := strings.Split(text, ":")
	if len(parts) < 2 || len(parts) > 3 || hasFrac && len(parts) != 3 {
		return c, nil, false
	}
	var n [3]int
	for i, s := range parts {
		v, ok := digits(s)
		if !ok || len(s) != 2 && !(i == 0 && len(s) == 1) {
			return c, nil, false
		}
		n[i] = v
	}
	if n[0] > 23 || n[1] > 59 || n[2] > 59 {
		c.reason = "there is no such time of day; hours go from 0 to 23, minutes and seconds to 59"
		return c, zone, true
	}
	c.since = time.Duration(n[0])*time.Hour + time.Duration(n[1])*time.Minute + time.Duration(n[2])*time.Second
	c.unit = time.Minute
	if len(parts) == 3 {
		c.unit = time.Second
	}
	if hasFrac {
		v, ok := digits(frac)
		if !ok || len(frac) > 9 {
			return c, nil, false
		}
		for range len(frac) {
			c.unit /= 10
		}
		c.since += time.Duration(v) * c.unit
	}
	return c, zone, true
}

// parseOffset reads "z", "+01:00" or "-08:00".
func parseOffset(s string) (time.Duration, bool) {
	if s == "z" {
		return 0, true
	}
	if len(s) != len("+01:00") || s[3] != ':' {
		return 0, false
	}
	h, ok1 := digits(s[1:3])
	m, ok2 := digits(s[4:])
	if !ok1 || !ok2 || h > 23 || m > 59 {
		return 0, false
	}
	d := time.Duration(h)*time.Hour + time.Duration(m)*time.Minute
	if s[0] == '-' {
		d = -d
	}
	return d, true
}

// digits reads one to nine decimal digits and nothing else.
func digits(s string) (int, bool) {
	if len(s) == 0 || len(s) > 9 || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil
}

// ageUnit returns the rank of a unit of time, largest first, or -1.
func ageUnit(w string) int {
	switch w {
	case "y", "year", "years":
		return 0
	case "mo", "month", "months":
		return 1
	case "w", "week", "weeks":
		return 2
	case "d", "day", "days":
		return 3
	case "h", "hour", "hours":
		return 4
	case "m", "min", "minute", "minutes":
		return 5
	case "s", "sec", "second", "seconds":
		return 6
	}
	return -1
}

// age reads an age; ok is false where words are something else.
func (p *momentParser) age(words []string) (t time.Time, ok bool, err error) {
	if words[len(words)-1] == "ago" {
		words = words[:len(words)-1]
	}
	if len(words) == 2 && (words[0] == "a" || words[0] == "an") {
		words = []string{"1", words[1]}
	}
	var n [7]int
	last := -1
	for s := strings.Join(words, " "); s != ""; s = strings.TrimPrefix(s, " ") {
		num := s[:len(s)-len(strings.TrimLeft(s, "0123456789"))]
		s = strings.TrimPrefix(s[len(num):], " ")
		end := strings.IndexAny(s, " 0123456789")
		if end < 0 {
			end = len(s)
		}
		v, isNum := digits(num)
		u := ageUnit(s[:end])
		if !isNum || u < 0 {
			return time.Time{}, false, nil
		}
		if u <= last {
			return time.Time{}, false, p.fail("an age names each unit once, the largest first, as \"1d 12h\"")
		}
		if len(num) > 6 {
			return time.Time{}, false, p.fail("that is longer ago than any snapshot")
		}
		n[u], last = v, u
		s = s[end:]
		if s == "" {
			break
		}
	}
	if last < 0 {
		return time.Time{}, false, nil
	}
	t = p.now
	if months, days := 12*n[0]+n[1], 7*n[2]+n[3]; months != 0 || days != 0 {
		y, mo, d := t.Date()
		first := time.Date(y, mo-time.Month(months), 1, 0, 0, 0, 0, time.UTC)
		d = min(d, first.AddDate(0, 1, -1).Day())
		day := first.AddDate(0, 0, d-1-days)
		h, mi, s := t.Clock()
		_, t = onClock(time.Date(day.Year(), day.Month(), day.Day(), h, mi, s, t.Nanosecond(), time.UTC), p.loc)
	}
	t = t.Add(-time.Duration(n[4]) * time.Hour).
		Add(-time.Duration(n[5]) * time.Minute).
		Add(-time.Duration(n[6]) * time.Second)
	if t.Year() < 1 {
		return time.Time{}, false, p.fail("that is longer ago than any snapshot")
	}
	return t, true, nil
}

// onClock returns the first and the last instant at which clocks in loc
// show wall, which holds date and time of day in UTC. They differ where the
// clocks go back. Where the clocks go forward past wall, first is the moment
// of the change and last the instant before it.
func onClock(wall time.Time, loc *time.Location) (first, last time.Time) {
	// No zone is a day or more away from UTC, so what lies around wall
	// covers every rule that could apply.
	at := wall.Add(-24 * time.Hour).In(loc)
	var change time.Time
	for {
		_, end := at.ZoneBounds()
		_, offset := at.Zone()
		t := wall.Add(-time.Duration(offset) * time.Second).In(loc)
		start, _ := at.ZoneBounds()
		switch {
		case !start.IsZero() && t.Before(start):
			// This rule is too late for wall. If the one before was too
			// early, wall falls between them.
			if first.IsZero() && change.IsZero() {
				change = start
			}
		case !end.IsZero() && !t.Before(end):
			// This rule is too early.
		default:
			if first.IsZero() {
				first = t
			}
			last = t
		}
		if end.IsZero() || end.After(wall.Add(24*time.Hour)) {
			break
		}
		at = end.In(loc)
	}
	if first.IsZero() {
		return change, change.Add(-1)
	}
	return first, last
}

// quoteShort quotes what a person wrote, cut where it is long, on one line.
func quoteShort(s string) string {
	if len(s) > maxMoment {
		s = strings.ToValidUTF8(s[:maxMoment], "") + "…"
	}
	return strconv.Quote(s)
}
