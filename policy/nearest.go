package policy

import "strings"

// nearest returns the candidate that word is most likely a misspelling of,
// or "". Case, "-" and "_" do not count as mistakes.
func nearest(word string, candidates []string) string {
	if len(word) > 64 {
		return ""
	}
	plain := func(s string) string {
		return strings.NewReplacer("-", "", "_", "", " ", "").Replace(strings.ToLower(s))
	}
	w := plain(word)
	best, bestDistance := "", 0
	for _, c := range candidates {
		p := plain(c)
		d := editDistance(w, p)
		// About one mistake in three letters; more would be a guess.
		if d > max(len(p), len(w))/3 && !(len(w) >= 4 && strings.HasPrefix(p, w)) {
			continue
		}
		if best == "" || d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

// editDistance counts the insertions, deletions, replacements and swaps of
// neighbours that turn a into b.
func editDistance(a, b string) int {
	prev2, prev := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(prev[j]+1, row[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], prev2[j-2]+1)
			}
		}
		prev2, prev = prev, row
	}
	return prev[len(b)]
}
