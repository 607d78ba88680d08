package check

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// A Selection says which packs are read in full. The zero value selects none.
type Selection struct {
	percent float64 // of the packs, at random
	n, t    int     // the n-th of t parts
	only    []backup.ID
	round   *Round
	fresh   bool // past the page cache
}

// All selects every pack.
func All() Selection { return Selection{percent: 100} }

// ParseSelection reads "all", a share such as "5%" or "2.5%", which is taken
// at random, or a part such as "3/10", the third of ten fixed parts that
// together are all packs. The empty text selects nothing.
func ParseSelection(text string) (Selection, error) {
	bad := func() (Selection, error) {
		return Selection{}, fmt.Errorf("%q does not say what to read: use all, a share like 5%%, or a part like 3/10", text)
	}
	switch {
	case text == "":
		return Selection{}, nil
	case text == "all":
		return All(), nil
	case strings.HasSuffix(text, "%"):
		p, err := strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
		if err != nil || !(p > 0 && p <= 100) {
			return bad()
		}
		return Selection{percent: p}, nil
	}
	a, b, ok := strings.Cut(text, "/")
	n, err1 := strconv.Atoi(a)
	t, err2 := strconv.Atoi(b)
	if !ok || err1 != nil || err2 != nil || n < 1 || n > t || t > 256 {
		return bad()
	}
	return Selection{n: n, t: t}, nil
}

// A Round remembers how far rolling reads have come. It is stored as JSON by
// whoever calls, per repository. The zero value has read nothing.
type Round struct {
	Began time.Time `json:"began"` // the round that is under way
	Next  backup.ID `json:"next"`  // packs with smaller names were read in it
	// Since is when the last round that was finished began: every pack that
	// was there then was read in full after that moment.
	Since time.Time `json:"since"`
	Ended time.Time `json:"ended"` // when that round was finished

	last bool // the packs that were picked are the last of the round
}

// Rolling selects the next packs after those that were read before, by name,
// up to percent of all bytes but at least one. Run moves the position in round
// over what it has read, damaged or not, also when it is interrupted. When the
// last pack is read the round is over; the next Run begins another one.
func Rolling(percent float64, round *Round) Selection {
	return Selection{percent: percent, round: round}
}

// pick returns the selected packs, sorted by name.
func (s Selection) pick(packs map[backup.ID]int64) []repo.PackFile {
	all := make([]repo.PackFile, 0, len(packs))
	for id, size := range packs {
		switch {
		case s.only != nil && !slices.Contains(s.only, id):
		case s.t > 0 && int(id[0])%s.t != s.n-1:
		case s.only == nil && s.t == 0 && s.percent == 0:
		default:
			all = append(all, repo.PackFile{ID: id, Size: size})
		}
	}
	slices.SortFunc(all, func(a, b repo.PackFile) int { return slices.Compare(a.ID[:], b.ID[:]) })
	if s.round != nil {
		return s.round.pick(all, s.percent)
	}
	if s.percent > 0 && s.percent < 100 {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		all = all[:int(math.Ceil(float64(len(all))*s.percent/100))]
	}
	return all
}

func (r *Round) pick(all []repo.PackFile, percent float64) []repo.PackFile {
	if r.Began.IsZero() {
		r.Began = time.Now().Round(0)
	}
	var total int64
	for _, p := range all {
		total += p.Size
	}
	from, _ := slices.BinarySearchFunc(all, r.Next, func(p repo.PackFile, id backup.ID) int { return slices.Compare(p.ID[:], id[:]) })
	rest := all[from:]
	budget := int64(math.Ceil(float64(total) * percent / 100))
	r.last = false
	for i, p := range rest {
		if budget <= 0 {
			return rest[:i]
		}
		budget -= p.Size
	}
	r.last = true
	return rest
}

// track returns a function to call, from any goroutine, with the number of
// each pack of those that pick gave when it was read.
func (s Selection) track(packs []repo.PackFile) func(i int) {
	if s.round == nil {
		return func(int) {}
	}
	var mu sync.Mutex
	done := make([]bool, len(packs))
	next := 0
	return func(i int) {
		mu.Lock()
		defer mu.Unlock()
		done[i] = true
		for next < len(done) && done[next] {
			s.round.Next = after(packs[next].ID)
			next++
		}
		if r := s.round; next == len(done) && r.last {
			*r = Round{Since: r.Began, Ended: time.Now().Round(0)}
		}
	}
}

// after returns the name that follows id.
func after(id backup.ID) backup.ID {
	for i := len(id) - 1; i >= 0; i-- {
		id[i]++
		if id[i] != 0 {
			break
		}
	}
	return id
}
