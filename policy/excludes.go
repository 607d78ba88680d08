package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/bmatcuk/doublestar/v4"
)

// Excludes decide what is left out of a volume. They follow .gitignore:
//
//   - A pattern without a slash matches a file or folder of that name at any
//     depth: "*.tmp", "node_modules".
//   - A pattern with a slash at its start or in its middle starts at the
//     volume's root: "/cache", "data/*.log".
//   - A slash at the end makes a pattern match folders only: "build/".
//   - "*" and "?" match within one name, also a leading dot; "[a-z]" and
//     "[!a-z]" match one character; "{a,b}" matches either; "**" as a whole
//     part of the path matches any number of folders, none included:
//     "**/.cache", "a/**/b". "a/**" matches all that is in a, not a itself.
//   - "!" at the start takes back what earlier patterns matched. The last
//     pattern that matches decides. What lies in a folder that is left out
//     cannot be taken back, since nobody looks there.
//   - "\" takes its meaning from the next character: "\!important", "\*".
//
// Paths are compared byte by byte: case counts, and nothing is normalised.
// "?" and "[…]" match one UTF-8 character, or one byte where a name is not
// UTF-8; such a byte counts as U+FFFD.
//
// The zero Excludes and nil match nothing. Safe for concurrent use.
type Excludes struct {
	rules []excludeRule // last pattern first
	text  []string
}

type excludeRule struct {
	kind    ruleKind
	text    string // without wildcards for the kinds that need none
	dirOnly bool
	exclude bool // false for patterns with "!"
}

type ruleKind uint8

const (
	ruleName       ruleKind = iota // text is the last name of the path
	ruleNameSuffix                 // text ends the last name of the path
	ruleNamePrefix                 // text starts the last name of the path
	ruleNameGlob                   // text is a pattern for the last name
	rulePath                       // text is the path
	rulePathGlob                   // text is a pattern for the path
)

// Limits on patterns: each is matched against every file.
const (
	maxPattern  = 1024 // bytes
	maxPatterns = 4096
	maxGlob     = 255 // bytes
	maxRules    = 256 // that one pattern's braces may stand for
)

// A PatternError says why a pattern is not one.
type PatternError struct {
	Pattern string
	Reason  string
}

func (e *PatternError) Error() string {
	return fmt.Sprintf("pattern %q: %s", e.Pattern, e.Reason)
}

// NewExcludes compiles patterns. Its error is a *PatternError.
func NewExcludes(patterns ...string) (*Excludes, error) {
	if len(patterns) > maxPatterns {
		return nil, &PatternError{patterns[maxPatterns], fmt.Sprintf("more than %d patterns", maxPatterns)}
	}
	e := &Excludes{text: slices.Clone(patterns), rules: make([]excludeRule, 0, len(patterns))}
	for _, p := range slices.Backward(patterns) {
		rules, err := compileExclude(p)
		if err != nil {
			return nil, err
		}
		e.rules = append(e.rules, rules...)
	}
	return e, nil
}

// Patterns returns the patterns as they were given.
func (e *Excludes) Patterns() []string {
	if e == nil {
		return nil
	}
	return slices.Clone(e.text)
}

// Match reports whether the file or folder at rel is left out. The path is
// relative to the volume's root, with slashes between its names and none at
// its ends. The root itself ("" or ".") is never left out. Match looks at
// rel alone: a walk asks for each folder before it descends.
//
// It does not allocate.
func (e *Excludes) Match(rel string, isDir bool) bool {
	if e == nil || len(e.rules) == 0 || rel == "" || rel == "." {
		return false
	}
	name := rel[strings.LastIndexByte(rel, '/')+1:]
	for i := range e.rules {
		r := &e.rules[i]
		if r.dirOnly && !isDir {
			continue
		}
		var hit bool
		switch r.kind {
		case ruleName:
			hit = name == r.text
		case ruleNameSuffix:
			hit = strings.HasSuffix(name, r.text)
		case ruleNamePrefix:
			hit = strings.HasPrefix(name, r.text)
		case ruleNameGlob:
			hit = doublestar.MatchUnvalidated(r.text, name)
		case rulePath:
			hit = rel == r.text
		case rulePathGlob:
			hit = doublestar.MatchUnvalidated(r.text, rel)
		}
		if hit {
			return r.exclude
		}
	}
	return false
}

// compileExclude returns the rules that a pattern stands for: one, or one
// for each alternative in its braces.
func compileExclude(pattern string) ([]excludeRule, error) {
	fail := func(reason string) ([]excludeRule, error) {
		return nil, &PatternError{pattern, reason}
	}
	if len(pattern) > maxPattern {
		return nil, &PatternError{strings.ToValidUTF8(pattern[:32], "") + "…", fmt.Sprintf("longer than %d bytes", maxPattern)}
	}
	p, exclude := pattern, true
	if rest, ok := strings.CutPrefix(p, "!"); ok {
		p, exclude = rest, false
	}
	if p == "" {
		return fail("it matches nothing")
	}
	if strings.ContainsRune(p, 0) {
		return fail("the character NUL is in no path")
	}
	// doublestar takes an invalid byte and U+FFFD for the same character.
	if !utf8.ValidString(p) {
		return fail("it is not UTF-8; write ? for bytes that are not")
	}
	if !doublestar.ValidatePattern(p) {
		return fail(`a [ or { has no end, or a \ has nothing after it`)
	}
	alternatives, ok := expandBraces(p)
	if !ok {
		return fail(fmt.Sprintf("its braces stand for more than %d patterns", maxRules))
	}
	rules := make([]excludeRule, 0, len(alternatives))
	for _, alt := range alternatives {
		r, reason := compileRule(alt)
		if reason != "" {
			return fail(reason)
		}
		r.exclude = exclude
		rules = append(rules, r)
	}
	return rules, nil
}

// compileRule compiles a valid pattern without braces, or says why it could
// never match.
func compileRule(p string) (r excludeRule, reason string) {
	if rest, ok := strings.CutSuffix(p, "/"); ok {
		p, r.dirOnly = rest, true
	}
	if p == "" {
		return r, "it matches nothing"
	}
	anchored := strings.Contains(p, "/")
	p = strings.TrimPrefix(p, "/")
	for part := range strings.SplitSeq(p, "/") {
		switch part {
		case "":
			return r, "two slashes in a row match nothing"
		case ".", "..":
			return r, fmt.Sprintf("%q in a path matches nothing; start at the volume's root", part)
		}
	}
	// "**/" before a bare name says what the name alone means.
	if rest := strings.TrimPrefix(p, "**/"); rest != p && rest != "**" && !strings.Contains(rest, "/") {
		p, anchored = rest, false
	}
	// doublestar lets "a/**" match a itself.
	if strings.HasSuffix(p, "/**") {
		p += "/*"
	}
	r.text = p
	literal, isLiteral := unescape(p)
	switch {
	case anchored && isLiteral:
		r.kind, r.text = rulePath, literal
	case anchored:
		r.kind = rulePathGlob
	case isLiteral:
		r.kind, r.text = ruleName, literal
	default:
		r.kind = ruleNameGlob
		if suffix, plain := unescape(strings.TrimPrefix(p, "*")); plain && p[0] == '*' {
			r.kind, r.text = ruleNameSuffix, suffix
		} else if prefix, plain := unescape(strings.TrimSuffix(p, "*")); plain && strings.HasSuffix(p, "*") {
			r.kind, r.text = ruleNamePrefix, prefix
		}
	}
	return r, ""
}

// expandBraces replaces "{a,b}" in a valid pattern by its alternatives, also
// nested ones; ok is false where they are more than maxRules.
func expandBraces(p string) (all []string, ok bool) {
	open := -1
	depth := 0
	var cuts []int // of the commas at depth 1
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '\\':
			i++
		case '[':
			i += classLen(p[i:]) - 1
		case '{':
			if depth++; depth == 1 {
				open = i
			}
		case ',':
			if depth == 1 {
				cuts = append(cuts, i)
			}
		case '}':
			if depth--; depth > 0 {
				continue
			}
			from := open + 1
			for _, cut := range append(cuts, i) {
				more, ok := expandBraces(p[:open] + p[from:cut] + p[i+1:])
				if all = append(all, more...); !ok || len(all) > maxRules {
					return nil, false
				}
				from = cut + 1
			}
			return all, true
		}
	}
	return []string{p}, true
}

// classLen returns the length of the character class at the start of p.
func classLen(p string) int {
	i := 1
	if i < len(p) && (p[i] == '^' || p[i] == '!') {
		i++
	}
	for ; i < len(p); i++ {
		switch p[i] {
		case '\\':
			i++
		case ']':
			return i + 1
		}
	}
	return len(p)
}

// unescape removes the backslashes of p and reports whether p has no
// wildcards.
func unescape(p string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '*', '?', '[', '{', '}':
			return "", false
		case '\\':
			if i++; i == len(p) {
				return "", false
			}
		}
		b.WriteByte(p[i])
	}
	return b.String(), true
}

// A Pattern is one pattern of Excludes.
type Pattern string

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *Pattern) UnmarshalText(text []byte) error {
	if _, err := compileExclude(string(text)); err != nil {
		return err
	}
	*p = Pattern(text)
	return nil
}

// A Glob matches names of volumes: "*" and "?", "[a-z]" and "{a,b}".
type Glob string

// UnmarshalText implements encoding.TextUnmarshaler.
func (g *Glob) UnmarshalText(text []byte) error {
	s := string(text)
	switch {
	case s == "":
		return errors.New("an empty name")
	case strings.Contains(s, "/"):
		return fmt.Errorf("%q is a path; give the name of a volume", s)
	case len(s) > maxGlob || strings.Count(s, "{") > 2 || !doublestar.ValidatePattern(s):
		return fmt.Errorf(`%q is no pattern: a [ or { has no end, or a \ has nothing after it`, s)
	}
	*g = Glob(s)
	return nil
}

// Match reports whether the volume's name fits.
func (g Glob) Match(name string) bool { return doublestar.MatchUnvalidated(string(g), name) }
