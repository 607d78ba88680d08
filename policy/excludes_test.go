package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/bmatcuk/doublestar/v4"
)

func TestExcludes(t *testing.T) {
	const file, dir = false, true
	for _, test := range []struct {
		patterns string // separated by blanks
		path     string
		isDir    bool
		want     bool
	}{
		{"*.tmp", "a.tmp", file, true},
		{"*.tmp", "x/y/a.tmp", file, true},
		{"*.tmp", ".tmp", file, true},
		{"*.tmp", "a.tmp/b", file, false}, // the walk never gets there
		{"*.tmp", "a.tmpx", file, false},
		{"node_modules", "node_modules", dir, true},
		{"node_modules", "a/node_modules", dir, true},
		{"node_modules", "a/node_modules", file, true},
		{"node_modules", "xnode_modules", dir, false},
		{"cache*", "a/cache-1", dir, true},
		{"cache*", "a/xcache", dir, false},
		{"a*b", "x/ab", file, true},
		{"a*b", "x/a--b", file, true},
		{"a*b", "a/b", file, false},
		{"?", "é", file, true},
		{"?", "ab", file, false},
		{"?", "\xff", file, true},
		{"[a-c]x", "bx", file, true},
		{"[!a-c]x", "bx", file, false},
		{"[^a-c]x", "dx", file, true},
		{"*", "anything", dir, true},
		{"**", "a/b", file, true},
		// Anchored.
		{"/cache", "cache", dir, true},
		{"/cache", "a/cache", dir, false},
		{"data/log", "data/log", file, true},
		{"data/log", "x/data/log", file, false},
		{"data/*.log", "data/a.log", file, true},
		{"data/*.log", "data/x/a.log", file, false},
		{"/*", "top", file, true},
		{"/*", "top/below", file, false},
		// Any number of folders.
		{"**/.cache", ".cache", dir, true},
		{"**/.cache", "a/b/.cache", dir, true},
		{"**/.cache", "a.cache", dir, false},
		{"**/a/b", "a/b", file, true},
		{"**/a/b", "x/y/a/b", file, true},
		{"/**/b", "x/b", file, true},
		{"a/**/b", "a/b", file, true},
		{"a/**/b", "a/x/y/b", file, true},
		{"a/**/b", "x/a/b", file, false},
		{"a/**", "a", dir, false},
		{"a/**", "a/b", file, true},
		{"a/**", "a/b/c", file, true},
		{"**/a/**", "a", dir, false},
		{"**/a/**", "x/a/b", dir, true},
		{"**/**/x", "x", file, true},
		{"**/**", "a", file, true},
		// Folders only.
		{"build/", "x/build", dir, true},
		{"build/", "x/build", file, false},
		{"/build/", "build", dir, true},
		{"/build/", "x/build", dir, false},
		{"a/**/", "a/b", dir, true},
		{"a/**/", "a/b", file, false},
		// Taking back: the last one decides.
		{"*.log !keep.log", "a.log", file, true},
		{"*.log !keep.log", "x/keep.log", file, false},
		{"!keep.log *.log", "keep.log", file, true},
		{"* !*/ !*.go", "a/b.go", file, false},
		{"* !*/ !*.go", "a", dir, false},
		{"* !*/ !*.go", "a/b.c", file, true},
		{"!x", "x", file, false},
		// Alternatives.
		{"*.{tmp,bak}", "a.bak", file, true},
		{"*.{tmp,bak}", "a.log", file, false},
		{"{a,b{c,d}}/x", "bd/x", file, true},
		{"{a,b{c,d}}/x", "b/x", file, false},
		{"{/a,b}", "x/b", file, true},
		{"{/a,b}", "x/a", file, false},
		{"[{]x", "{x", file, true},
		{"!{a,b} c", "a", file, false},
		// Escapes.
		{`\!x`, "!x", file, true},
		{`\*`, "*", file, true},
		{`\*`, "a", file, false},
		{`*\*`, "a*", file, true},
		{`*\*`, "ab", file, false},
		{`a\*`, "a*", file, true},
		{`a\*`, "ab", file, false},
		{`\{a,b\}`, "{a,b}", file, true},
		{`a\b`, "ab", file, true},
		// Bytes are compared as they are.
		{"é", "e\u0301", file, false},
		{"A", "a", file, false},
		{"\ufffd", "\xff", file, false},
		{"*", "\xff\xfe", file, true},
		{"*\ufffd", "a\xff", file, false},
		{"a[\ufffd]", "a\xff", file, true}, // documented: doublestar's view of bytes that are no UTF-8
		// The root stays.
		{"*", "", dir, false},
		{"*", ".", dir, false},
		{"**", "", dir, false},
	} {
		e, err := NewExcludes(strings.Fields(test.patterns)...)
		if err != nil {
			t.Errorf("%q: %v", test.patterns, err)
			continue
		}
		if got := e.Match(test.path, test.isDir); got != test.want {
			t.Errorf("%q on %q (folder: %v): %v", test.patterns, test.path, test.isDir, got)
		}
	}
	var none *Excludes
	if none.Match("a", false) || (&Excludes{}).Match("a", false) || none.Patterns() != nil {
		t.Error("no patterns match something")
	}
	e, err := NewExcludes("b", "a")
	if err != nil || !slices.Equal(e.Patterns(), []string{"b", "a"}) {
		t.Errorf("%q, %v", e.Patterns(), err)
	}
}

func TestBadPatterns(t *testing.T) {
	many := strings.Repeat("{a,b}", 9)
	for _, p := range []string{
		"", "!", "/", "//", "a//b", "./a", "a/..", "[", "[a", "{a", "a}", `a\`, "a\x00b", "\xff", "{,a}/", "{a,}",
		strings.Repeat("x", maxPattern+1), many, "!" + many, strings.Repeat("{", 500) + strings.Repeat("}", 500),
	} {
		_, err := NewExcludes("ok", p)
		var bad *PatternError
		if !errors.As(err, &bad) || strings.ContainsAny(err.Error(), "\n\x00") || !utf8.ValidString(err.Error()) {
			t.Errorf("%.40q: %v", p, err)
		}
	}
	if _, err := NewExcludes(make([]string, maxPatterns+1)...); err == nil {
		t.Error("any number of patterns")
	}
}

func TestMatchDoesNotAllocate(t *testing.T) {
	e := benchmarkExcludes(t)
	for _, p := range benchmarkPaths() {
		if n := testing.AllocsPerRun(10, func() { e.Match(p, false) }); n != 0 {
			t.Errorf("%q: %v allocations", p, n)
		}
	}
}

func benchmarkExcludes(t testing.TB) *Excludes {
	t.Helper()
	e, err := NewExcludes("**/.cache", "**/node_modules", "*.tmp", "/data/**/*.log", "*.{bak,swp}", "~*", "[._]*.s[a-v][a-z]", "build/", "!keep.tmp")
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func benchmarkPaths() []string {
	return []string{
		"home/iot/projects/sensors/src/main.py",
		"data/2026/11/23/readings.csv",
		"data/2026/11/23/readings.log",
		"home/iot/projects/web/node_modules",
		"config/automations.yaml",
		"x.tmp",
	}
}

func BenchmarkMatch(b *testing.B) {
	e, paths := benchmarkExcludes(b), benchmarkPaths()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		e.Match(paths[i%len(paths)], false)
		i++
	}
}

// FuzzExcludes feeds hostile names and patterns, and compares the fast kinds
// of rules with doublestar itself.
func FuzzExcludes(f *testing.F) {
	for _, p := range []string{"*.tmp", "**/.cache", "/a/**/b", "!a{b,c}", "[a-z]?", `\*x`, "a*", "a/**", "{a/,b}", "é"} {
		f.Add(p, "a/b.tmp", false)
		f.Add(p, "a/\xff\x00\n/.cache", true)
	}
	f.Fuzz(func(t *testing.T, pattern, name string, isDir bool) {
		e, err := NewExcludes(pattern)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\x00\x1b") {
				t.Fatalf("%q", err)
			}
			return
		}
		got := e.Match(name, isDir)
		if len(pattern) > 64 || len(name) > 256 || strings.ContainsAny(pattern, "{}") || strings.HasPrefix(pattern, "!") ||
			strings.HasSuffix(pattern, "/") || name == "" || name == "." || strings.Contains(pattern, "\ufffd") || strings.Contains(pattern, `\/`) {
			return
		}
		want := false
		switch {
		case !strings.Contains(pattern, "/"):
			want = doublestar.MatchUnvalidated(pattern, name[strings.LastIndexByte(name, '/')+1:])
		case !strings.HasSuffix(pattern, "**") && !strings.HasPrefix(name, "/") && !strings.Contains(name, "//"):
			want = doublestar.MatchUnvalidated(strings.TrimPrefix(pattern, "/"), name)
		default:
			return
		}
		if got != want {
			t.Fatalf("%q on %q: %v, doublestar says %v", pattern, name, got, want)
		}
	})
}

func ExampleExcludes() {
	e, err := NewExcludes("*.log", "!important.log", "/tmp/")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(e.Match("app/debug.log", false), e.Match("app/important.log", false), e.Match("tmp", true))
	// Output: true false true
}
