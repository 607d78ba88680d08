package policy

import (
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

// stamp shows an instant with its offset, in full.
const stamp = "2006-01-02 15:04:05.999999999 -0700"

func TestParseMoment(t *testing.T) {
	const (
		berlin  = "Europe/Berlin"
		angeles = "America/Los_Angeles"
		howe    = "Australia/Lord_Howe" // clocks change by half an hour
		kolkata = "Asia/Kolkata"        // +05:30
	)
	for _, test := range []struct {
		zone, now, text, want string
	}{
		// Monday 2026-11-23, ten in the morning in winter.
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20 14:30", "2026-11-20 14:30:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20T14:30", "2026-11-20 14:30:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20t14:30:05", "2026-11-20 14:30:05.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20 14:30:05.25", "2026-11-20 14:30:05.259999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20 14:30:05.123456789", "2026-11-20 14:30:05.123456789 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20T14:30:05Z", "2026-11-20 15:30:05.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20T14:30:05-08:00", "2026-11-20 23:30:05.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20 14:30:05 +05:30", "2026-11-20 10:00:05.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20T14:30:05.5+00:00", "2026-11-20 15:30:05.599999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "9:30", "2026-11-23 09:30:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "10:00", "2026-11-23 10:00:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "00:00", "2026-11-23 00:00:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "now", "2026-11-23 10:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "today", "2026-11-23 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "  YESTERDAY\t", "2026-11-22 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "yesterday 14:30", "2026-11-22 14:30:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "yesterday at 9:05", "2026-11-22 09:05:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2026-11-20", "2026-11-20 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "monday", "2026-11-23 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "Last Monday", "2026-11-16 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "tue", "2026-11-17 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "friday", "2026-11-20 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "last friday", "2026-11-20 23:59:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "last sunday 8:00", "2026-11-22 08:00:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "monday 9:00", "2026-11-23 09:00:59.999999999 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "0001-01-01", "0001-01-01 23:59:59.999999999 +0053"},
		// Ages.
		{berlin, "2026-11-23T10:00:00+01:00", "36h", "2026-11-21 22:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "3d", "2026-11-20 10:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "2 weeks ago", "2026-11-09 10:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "1d12h", "2026-11-21 22:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "1 day 12 hours ago", "2026-11-21 22:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "an hour ago", "2026-11-23 09:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "90m", "2026-11-23 08:30:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "30 s", "2026-11-23 09:59:30 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "0h", "2026-11-23 10:00:00 +0100"},
		{berlin, "2026-11-23T10:00:00+01:00", "1mo", "2026-10-23 10:00:00 +0200"},
		{berlin, "2026-11-23T10:00:00+01:00", "a year ago", "2025-11-23 10:00:00 +0100"},
		{berlin, "2026-03-31T10:00:00+02:00", "1 month ago", "2026-02-28 10:00:00 +0100"},
		{berlin, "2026-01-15T10:00:00+01:00", "13mo", "2024-12-15 10:00:00 +0100"},
		// A leap day.
		{berlin, "2028-02-29T10:00:00+01:00", "1y", "2027-02-28 10:00:00 +0100"},
		{berlin, "2028-02-29T10:00:00+01:00", "4y", "2024-02-29 10:00:00 +0100"},
		{berlin, "2028-03-01T10:00:00+01:00", "yesterday", "2028-02-29 23:59:59.999999999 +0100"},
		{berlin, "2028-03-01T10:00:00+01:00", "2028-02-29", "2028-02-29 23:59:59.999999999 +0100"},
		// Clocks went forward on 2026-03-29 at 2:00: 2:30 never came.
		{berlin, "2026-03-29T12:00:00+02:00", "2:30", "2026-03-29 01:59:59.999999999 +0100"},
		{berlin, "2026-03-29T12:00:00+02:00", "2:59", "2026-03-29 01:59:59.999999999 +0100"},
		{berlin, "2026-03-29T12:00:00+02:00", "3:00", "2026-03-29 03:00:59.999999999 +0200"},
		{berlin, "2026-03-29T12:00:00+02:00", "1:59", "2026-03-29 01:59:59.999999999 +0100"},
		{berlin, "2026-03-29T12:00:00+02:00", "24h", "2026-03-28 11:00:00 +0100"},
		{berlin, "2026-03-29T12:00:00+02:00", "1d", "2026-03-28 12:00:00 +0100"},
		{berlin, "2026-03-30T02:30:00+02:00", "1d", "2026-03-29 01:59:59.999999999 +0100"},
		{berlin, "2026-03-29T12:00:00+02:00", "today", "2026-03-29 23:59:59.999999999 +0200"},
		// They went back on 2026-10-25 at 3:00: 2:30 came twice.
		{berlin, "2026-10-25T12:00:00+01:00", "2:30", "2026-10-25 02:30:59.999999999 +0100"},
		{berlin, "2026-10-25T12:00:00+01:00", "2026-10-25T02:30+02:00", "2026-10-25 02:30:59.999999999 +0200"},
		{berlin, "2026-10-25T12:00:00+01:00", "1:59", "2026-10-25 01:59:59.999999999 +0200"},
		{berlin, "2026-10-25T12:00:00+01:00", "24h", "2026-10-24 13:00:00 +0200"},
		{berlin, "2026-10-25T12:00:00+01:00", "1d", "2026-10-24 12:00:00 +0200"},
		{berlin, "2026-10-25T02:30:00+02:00", "0d", "2026-10-25 02:30:00 +0200"},
		{berlin, "2026-10-25T02:10:00+02:00", "02:05", "2026-10-25 02:05:59.999999999 +0100"},
		{angeles, "2026-03-08T12:00:00-07:00", "2:30", "2026-03-08 01:59:59.999999999 -0800"},
		{angeles, "2026-11-01T12:00:00-08:00", "1:30", "2026-11-01 01:30:59.999999999 -0800"},
		{angeles, "2026-11-01T12:00:00-08:00", "yesterday", "2026-10-31 23:59:59.999999999 -0700"},
		{angeles, "2026-11-24T02:00:00Z", "today", "2026-11-23 23:59:59.999999999 -0800"},
		// Lord Howe: forward half an hour on 2026-10-04 at 2:00, back on 2026-04-05.
		{howe, "2026-10-04T12:00:00+11:00", "2:15", "2026-10-04 01:59:59.999999999 +1030"},
		{howe, "2026-10-04T12:00:00+11:00", "2:30", "2026-10-04 02:30:59.999999999 +1100"},
		{howe, "2026-04-05T12:00:00+10:30", "1:45", "2026-04-05 01:45:59.999999999 +1030"},
		{howe, "2026-04-05T12:00:00+10:30", "1:15", "2026-04-05 01:15:59.999999999 +1100"},
		{kolkata, "2026-11-23T00:10:00+05:30", "yesterday", "2026-11-22 23:59:59.999999999 +0530"},
		{kolkata, "2026-11-23T00:10:00+05:30", "2026-11-22T18:35:00Z", "2026-11-23 00:05:00.999999999 +0530"},
		// Clocks that change at midnight: Beirut forward on 2026-03-29 and
		// back on 2026-10-25, Havana back at 1:00, St. John's back at 0:01.
		{"Asia/Beirut", "2026-03-30T12:00:00+03:00", "2026-03-28", "2026-03-28 23:59:59.999999999 +0200"},
		{"Asia/Beirut", "2026-03-30T12:00:00+03:00", "2026-03-29 0:15", "2026-03-28 23:59:59.999999999 +0200"},
		{"Asia/Beirut", "2026-10-30T12:00:00+02:00", "2026-10-24", "2026-10-24 23:59:59.999999999 +0200"},
		{"America/Havana", "2026-11-02T12:00:00-05:00", "2026-10-31", "2026-10-31 23:59:59.999999999 -0400"},
		{"America/St_Johns", "2010-11-08T12:00:00-03:30", "2010-11-06", "2010-11-06 23:59:59.999999999 -0330"},
		// Samoa had no 30 December 2011.
		{"Pacific/Apia", "2012-01-02T12:00:00+14:00", "2011-12-30", "2011-12-29 23:59:59.999999999 -1000"},
		{"Pacific/Apia", "2012-01-02T12:00:00+14:00", "2011-12-31", "2011-12-31 23:59:59.999999999 +1400"},
		{"UTC", "2026-11-23T10:00:00Z", "yesterday", "2026-11-22 23:59:59.999999999 +0000"},
	} {
		now, err := time.Parse(time.RFC3339, test.now)
		if err != nil {
			t.Fatal(err)
		}
		m, err := ParseMoment(test.text, now, zone(t, test.zone))
		if err != nil {
			t.Errorf("%s, %q at %s: %v", test.zone, test.text, test.now, err)
			continue
		}
		if got := m.Time.Format(stamp); got != test.want {
			t.Errorf("%s, %q at %s: %s, want %s", test.zone, test.text, test.now, got, test.want)
		}
		if m.Text != test.text {
			t.Errorf("%q is kept as %q", test.text, m.Text)
		}
	}
}

func TestParseMomentErrors(t *testing.T) {
	loc := zone(t, "Europe/Berlin")
	now := time.Date(2026, 11, 23, 10, 0, 0, 0, loc) // a Monday
	for _, test := range []struct {
		text string
		is   error
		say  string
	}{
		{"", ErrNoMoment, "yesterday"},
		{"   ", ErrNoMoment, "yesterday"},
		{"nonsense", ErrNoMoment, `"2 weeks ago"`},
		{"yesterdayy", ErrNoMoment, `"last friday"`},
		{"12", ErrNoMoment, "write"},
		{"-3d", ErrNoMoment, "write"},
		{"+3d", ErrNoMoment, "write"},
		{"1.5h", ErrNoMoment, "write"},
		{"3 d ays", ErrNoMoment, "write"},
		{"d", ErrNoMoment, "write"},
		{"ago", ErrNoMoment, "write"},
		{"in 3 days", ErrNoMoment, "write"},
		{"3d tomorrow", ErrNoMoment, "write"},
		{"12h 1d", ErrNoMoment, "largest first"},
		{"1d 1d", ErrNoMoment, "once"},
		{"1w 1 week", ErrNoMoment, "once"},
		{"1000000h", ErrNoMoment, "longer ago"},
		{"9999y", ErrNoMoment, "longer ago"},
		{"99999999999999999999d", ErrNoMoment, "write"},
		{"2026-02-29", ErrNoMoment, "no such day"},
		{"2026-13-01", ErrNoMoment, "no such day"},
		{"2026-00-10", ErrNoMoment, "no such day"},
		{"2026-01-00", ErrNoMoment, "no such day"},
		{"0000-01-01", ErrNoMoment, "no such day"},
		{"2026-1-1", ErrNoMoment, "write"},
		{"20261120", ErrNoMoment, "write"},
		{"05/06/2026", ErrNoMoment, "write"},
		{"24:00", ErrNoMoment, "hours go from 0 to 23"},
		{"14:60", ErrNoMoment, "minutes"},
		{"14:30:60", ErrNoMoment, "minutes"},
		{"14:3", ErrNoMoment, "write"},
		{"14:30:", ErrNoMoment, "write"},
		{"14:30.5", ErrNoMoment, "write"},
		{"14:30:05.", ErrNoMoment, "write"},
		{"14:30:05.1234567890", ErrNoMoment, "write"},
		{"14:30 yesterday", ErrNoMoment, "write"},
		{"at 14:30", ErrNoMoment, "write"},
		{"2026-11-20T", ErrNoMoment, "write"},
		{"2026-11-20 at", ErrNoMoment, "write"},
		{"2026-11-20T14:30:05+1:00", ErrNoMoment, "write"},
		{"2026-11-20T14:30:05+24:00", ErrNoMoment, "write"},
		{"2026-11-20T14:30:05Zulu", ErrNoMoment, "write"},
		{"2026-11-20 1 4:30", ErrNoMoment, "write"},
		{"2026-11-20 14:30 +01 :00", ErrNoMoment, "write"},
		{"last", ErrNoMoment, "weekday"},
		{"last week", ErrNoMoment, "weekday"},
		{"friday last", ErrNoMoment, "write"},
		{"monday tuesday", ErrNoMoment, "write"},
		{"yesterday\n14:30\x00", ErrNoMoment, "write"},
		{"\xff\xfe", ErrNoMoment, "write"},
		{strings.Repeat("1d ", 1000), ErrNoMoment, "write"},
		{"tomorrow", ErrNoMoment, "write"},
		{"2026-11-24", ErrFuture, "Monday 2026-11-23 10:00 CET"},
		{"9999-12-31", ErrFuture, "clock"},
		{"10:01", ErrFuture, `"yesterday 10:01"`},
		{"today 23:00", ErrFuture, "clock"},
		{"monday 11:00", ErrFuture, "clock"},
		{"2026-11-23T10:00:01+01:00", ErrFuture, "clock"},
	} {
		m, err := ParseMoment(test.text, now, loc)
		if !errors.Is(err, test.is) {
			t.Errorf("%q: %v, %v; want %v", test.text, m, err, test.is)
			continue
		}
		if s := err.Error(); strings.ContainsAny(s, "\n\x00") || !utf8.ValidString(s) || len(s) > 400 || !strings.Contains(s, test.say) {
			t.Errorf("%q: %q does not say %q in one line", test.text, s, test.say)
		}
	}
}

func TestMomentString(t *testing.T) {
	loc := zone(t, "America/Los_Angeles")
	now := time.Date(2026, 11, 23, 10, 0, 0, 0, loc)
	for text, want := range map[string]string{
		"last friday": "the end of Friday 2026-11-20 PST",
		"9:30":        "Monday 2026-11-23 09:30:59 PST",
	} {
		m, err := ParseMoment(text, now, loc)
		if err != nil || m.String() != want {
			t.Errorf("%q: %s, %v", text, m, err)
		}
	}
}

// TestOnClock compares onClock with a search through every minute of days
// on which clocks changed.
func TestOnClock(t *testing.T) {
	for name, day := range map[string]time.Time{
		"Europe/Berlin":       time.Date(2026, 3, 29, 0, 0, 0, 0, time.UTC),
		"America/Los_Angeles": time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		"Australia/Lord_Howe": time.Date(2026, 4, 5, 0, 0, 0, 0, time.UTC),
		"Asia/Beirut":         time.Date(2026, 10, 25, 0, 0, 0, 0, time.UTC),
		"America/St_Johns":    time.Date(2010, 11, 7, 0, 0, 0, 0, time.UTC),
		"America/Havana":      time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		"Pacific/Apia":        time.Date(2011, 12, 30, 0, 0, 0, 0, time.UTC),
		"Pacific/Kwajalein":   time.Date(1993, 8, 21, 0, 0, 0, 0, time.UTC),
		"UTC":                 time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		loc := zone(t, name)
		// Every minute that passes from two days before to two after, by
		// what a clock on the wall shows.
		seen := map[string][]time.Time{}
		for at := day.Add(-60 * time.Hour); at.Before(day.Add(72 * time.Hour)); at = at.Add(time.Minute) {
			w := at.In(loc).Format("2006-01-02 15:04")
			seen[w] = append(seen[w], at)
		}
		for wall := day.Add(-24 * time.Hour); wall.Before(day.Add(48 * time.Hour)); wall = wall.Add(time.Minute) {
			first, last := onClock(wall, loc)
			shown := wall.Format("2006-01-02 15:04")
			times := seen[shown]
			if len(times) == 0 {
				// Never shown: last shows less, first more, and nothing lies
				// between.
				if first.Sub(last) != 1 || last.In(loc).Format("2006-01-02 15:04") >= shown || first.In(loc).Format("2006-01-02 15:04") <= shown {
					t.Fatalf("%s, %s never comes: %v, %v", name, shown, first, last)
				}
				continue
			}
			if !first.Equal(times[0]) || !last.Equal(times[len(times)-1]) {
				t.Fatalf("%s, %s: %v to %v, want %v", name, shown, first, last, times)
			}
		}
	}
}

func FuzzParseMoment(f *testing.F) {
	for _, s := range []string{
		"yesterday", "2026-11-20 14:30", "2026-11-20T14:30:05.25+05:30", "14:30", "last friday", "monday at 9:05",
		"36h", "1y 2mo 3w 4d 5h 6m 7s ago", "an hour ago", "now", "0001-01-01", "2011-12-30 12:00",
	} {
		f.Add(s, int64(1_795_000_000), uint8(0))
		f.Add(s, int64(-1), uint8(3))
	}
	zones := []*time.Location{time.UTC, zone(f, "Europe/Berlin"), zone(f, "Australia/Lord_Howe"), zone(f, "Pacific/Apia"), zone(f, "Africa/Monrovia")}
	f.Fuzz(func(t *testing.T, text string, unix int64, z uint8) {
		loc := zones[int(z)%len(zones)]
		now := time.Unix(unix%(1<<37), 0) // the years up to 6000
		m, err := ParseMoment(text, now, loc)
		if err != nil {
			if !errors.Is(err, ErrNoMoment) && !errors.Is(err, ErrFuture) || strings.ContainsAny(err.Error(), "\n\x00\x1b") {
				t.Fatalf("%q: %q", text, err)
			}
			return
		}
		if m.Time.Sub(now) > 27*time.Hour {
			t.Fatalf("%q at %v is %v", text, now, m)
		}
		if m.Day && m.Time.Nanosecond() != 999_999_999 {
			t.Fatalf("%q is a day that ends at %v", text, m.Time)
		}
		// What is understood is understood in any spelling.
		again, err := ParseMoment("  "+strings.ToUpper(text)+" ", now, loc)
		if err == nil && !again.Time.Equal(m.Time) {
			t.Fatalf("%q is %v, in capitals %v", text, m, again)
		}
	})
}
