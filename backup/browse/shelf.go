package browse

import (
	"cmp"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/backup"
)

// A shelf is a folder of the mounted file system above the snapshots:
//
//	volumes/NAME/2026-11-22T03-00/…
//	volumes/NAME/latest -> 2026-11-22T03-00
//	by-day/2026-11-22/NAME -> ../../volumes/NAME/2026-11-22T03-00
//
// or a snapshot or link in one.
type shelf struct {
	entries  map[string]*shelf // of a folder
	snapshot *backup.Snapshot  // of a snapshot's folder
	target   string            // of a link
	time     time.Time
}

func newShelf() *shelf { return &shelf{entries: map[string]*shelf{}} }

// folder returns the folder of a name in s, and makes it.
func (s *shelf) folder(name string) *shelf {
	f := s.entries[name]
	if f == nil {
		f = newShelf()
		s.entries[name] = f
	}
	return f
}

// touch makes s as new as t.
func (s *shelf) touch(t time.Time) {
	if t.After(s.time) {
		s.time = t
	}
}

// find returns what is at a path, given by its names, or nil.
func (s *shelf) find(names []string) *shelf {
	for _, name := range names {
		if s = s.entries[name]; s == nil {
			return nil
		}
	}
	return s
}

const (
	minuteLayout = "2006-01-02T15-04"
	dayLayout    = "2006-01-02"
	latestName   = "latest"
	volumesName  = "volumes"
	byDayName    = "by-day"
)

// shelve arranges snapshots. The volumes of host have their plain names, those
// of others NAME@HOST. Of the snapshots of a volume in one minute all but the
// oldest have their ID in the name.
func shelve(snapshots []*backup.Snapshot, host string, zone *time.Location) *shelf {
	sorted := slices.SortedFunc(slices.Values(snapshots), func(a, b *backup.Snapshot) int {
		return cmp.Or(a.Time.Compare(b.Time), slices.Compare(a.ID[:], b.ID[:]))
	})
	root := newShelf()
	volumes, days := root.folder(volumesName), root.folder(byDayName)
	for _, s := range sorted {
		name := s.Volume()
		if s.Hostname != host {
			name += "@" + s.Hostname
		}
		name = fileName(name)
		t := s.Time.In(zone)
		at := t.Format(minuteLayout)
		volume := volumes.folder(name)
		if volume.entries[at] != nil {
			at += "-" + s.ID.Short()
		}
		if volume.entries[at] != nil {
			at = t.Format(minuteLayout) + "-" + s.ID.String()
		}
		volume.entries[at] = &shelf{snapshot: s, time: t}
		volume.entries[latestName] = &shelf{target: at, time: t}
		day := days.folder(t.Format(dayLayout))
		day.entries[name] = &shelf{target: "../../" + volumesName + "/" + name + "/" + at, time: t}
		for _, f := range []*shelf{root, volumes, volume, days, day} {
			f.touch(t)
		}
	}
	return root
}

// fileName makes a volume's name, which may be anything, a name in a folder:
// what a name can't have is written as % and two hexadecimal digits, and what
// is too long is cut and gets a hash.
func fileName(name string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(name) {
		c := name[i]
		if c <= ' ' || c == '/' || c == '%' || c == 0x7f || c == '.' && i == 0 {
			b.WriteByte('%')
			b.WriteByte(digits[c>>4])
			b.WriteByte(digits[c&15])
			continue
		}
		b.WriteByte(c)
	}
	s := b.String()
	if s == "" {
		return "%"
	}
	if len(s) > backup.MaxNameLen/2 { // by-day's links have to fit in a path
		hash := backup.Hash([]byte(name))
		s = s[:backup.MaxNameLen/2-17] + "%" + hex.EncodeToString(hash[:8])
	}
	return s
}

// names returns the names in a folder, sorted.
func (s *shelf) names() []string { return slices.Sorted(maps.Keys(s.entries)) }
