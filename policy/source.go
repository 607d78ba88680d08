package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Bounds on a configuration. Real ones have a few thousand bytes in a few
// hundred lines; the YAML lexer and parser take time that grows with the
// square of line length and of lines.
const (
	maxConfig = 64 << 10 // bytes
	maxLine   = 4 << 10  // bytes
	maxLines  = 3000
)

// An Env answers for environment variables; os.LookupEnv is one.
type Env func(name string) (value string, ok bool)

// configVariable names the configuration file when --config does not.
const configVariable = "IDE49_BACKUP_CONFIG"

// configFiles are looked for, in this order, when nobody names one.
func configFiles() []string {
	return []string{"/service-config/config/backup.yaml", "/etc/ide49-backup/backup.yaml"}
}

// A source is the text of a configuration file.
type source struct {
	name   string
	text   string
	public bool     // other users of the machine can read the file
	lines  []string // as in the file
	shown  []string // as they may be shown: without passwords
	hidden []string // what the two differ in
}

// findSource reads the file that path, the environment or the usual places
// name, in this order. It returns nil where none of them does. A file that
// was named must be there; one in a usual place may be missing, but if it is
// there it must be readable.
func findSource(path string, env Env, places []string) (*source, error) {
	if path != "" {
		src, err := readSource(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("configuration: %w; correct --config, or leave it out for the usual places", err)
		}
		return src, err
	}
	if path, ok := env(configVariable); ok && path != "" {
		src, err := readSource(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("configuration: %w; correct or unset $%s", err, configVariable)
		}
		return src, err
	}
	for _, path := range places {
		src, err := readSource(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return src, err
	}
	return nil, nil
}

func readSource(path string) (*source, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if len(text) > maxConfig {
		return nil, fmt.Errorf("configuration: %s: larger than %s; is this the right file?", path, Size(maxConfig))
	}
	src := newSource(path, text)
	if fi, err := f.Stat(); err == nil {
		src.public = othersMayUse(fi.Mode())
	}
	return src, nil
}

// othersMayUse reports whether any user of the machine can read or change a
// file of this mode.
func othersMayUse(mode fs.FileMode) bool { return mode.Perm()&0o006 != 0 }

func newSource(name string, text []byte) *source {
	s := strings.TrimPrefix(string(text), "\ufeff")
	s = strings.ReplaceAll(s, "\r\n", "\n")
	lines := strings.Split(s, "\n")
	src := &source{name: name, text: s, lines: lines, shown: maskPasswords(lines)}
	for i, line := range lines {
		// Where the shown line breaks off, the rest is hidden.
		if kept, _, cut := strings.Cut(src.shown[i], masked); cut && src.shown[i] != line {
			if rest := strings.Trim(strings.TrimPrefix(line, strings.TrimSpace(kept)), " \t\"'"); len(rest) > 2 {
				src.hidden = append(src.hidden, rest)
			}
		}
	}
	return src
}

// hide masks in a message what is hidden in the file. Messages are made not
// to need it; this is for what nobody thought of.
func (s *source) hide(message string) string {
	for _, h := range s.hidden {
		message = strings.ReplaceAll(message, h, masked)
	}
	return message
}

// problem makes a Problem about width characters at line and column, both
// counted from 1; line 0 is the file as a whole.
func (s *source) problem(severity Severity, key string, line, column, width int, message string) Problem {
	p := Problem{Severity: severity, File: s.name, Key: key, Message: message}
	if line >= 1 && line <= len(s.shown) {
		p.Line = line
		p.Source, p.Column, p.Width = excerpt(s.shown[line-1], column, width)
	}
	return p
}

// unreadable returns the first place where the text has bytes that YAML does
// not allow, or a line that is no line.
func (s *source) unreadable() (p Problem, found bool) {
	if len(s.lines) > maxLines {
		return s.problem(SeverityError, "", 0, 0, 0, fmt.Sprintf("%d lines; at most %d are possible", len(s.lines), maxLines)), true
	}
	for i, line := range s.lines {
		if len(line) > maxLine {
			return s.problem(SeverityError, "", i+1, 1, 1, fmt.Sprintf("a line of %d bytes; at most %d are possible", len(line), maxLine)), true
		}
		column := 0
		for j, r := range line {
			column++
			var what string
			switch {
			case r == utf8.RuneError:
				if _, n := utf8.DecodeRuneInString(line[j:]); n != 1 {
					continue
				}
				what = fmt.Sprintf("byte 0x%02x is not UTF-8; save the file as UTF-8", line[j])
			case r < ' ' && r != '\t', r >= 0x7f && r < 0xa0 && r != 0x85, r == 0x2028, r == 0x2029, r == 0x85:
				what = fmt.Sprintf("the character U+%04X has no place in a text file", r)
			default:
				continue
			}
			return s.problem(SeverityError, "", i+1, column, 1, what), true
		}
	}
	return Problem{}, false
}

// maskPasswords returns lines with the values of what look like passwords
// replaced. It works on the text and not on its structure, since lines are
// also shown of files that are no YAML, and hides too much rather than too
// little.
func maskPasswords(lines []string) []string {
	// A key and its colon. A key that ends the line counts too.
	key := regexp.MustCompile(`["']?([\pL\pN_.-]+)["']?[ \t]*:(?:[ \t"'\[{|>&*!]|$)`)
	// A variable is no password, and its name helps.
	variable := regexp.MustCompile(`^["']?\$\{[A-Za-z_][A-Za-z0-9_]*\}["']?[ \t]*(?:#.*)?$`)
	userinfo := regexp.MustCompile(`//[^/@ \t]*@`)
	shown := make([]string, len(lines))
	const none = -1
	inside := none    // indentation of the key whose value goes on
	var quote byte    // the quote that ends it, if it began with one
	needValue := true // nothing of the value was seen yet
	for i, line := range lines {
		trimmed := strings.TrimLeft(line, " \t-")
		indent := len(line) - len(trimmed)
		if inside != none {
			more := trimmed == "" || indent > inside || quote != 0 ||
				needValue && !startsWith(key, trimmed)
			if more {
				if trimmed != "" {
					shown[i] = line[:indent] + masked
					needValue = false
					if quote != 0 && strings.IndexByte(trimmed, quote) >= 0 {
						quote = 0
					}
				}
				continue
			}
			inside = none
		}
		shown[i] = userinfo.ReplaceAllString(line, "//"+masked+"@")
		for _, m := range key.FindAllStringSubmatchIndex(line, -1) {
			if !isSecretKey(line[m[2]:m[3]]) {
				continue
			}
			colon := m[3] + strings.IndexByte(line[m[3]:], ':')
			value := strings.TrimLeft(line[colon+1:], " \t")
			if variable.MatchString(value) {
				break
			}
			shown[i] = userinfo.ReplaceAllString(line[:colon+1], "//"+masked+"@")
			inside, quote, needValue = m[0], 0, value == ""
			if value != "" {
				shown[i] += " " + masked
				if q := value[0]; (q == '"' || q == '\'') && strings.IndexByte(value[1:], q) < 0 {
					quote = q
				}
			}
			break
		}
	}
	return shown
}

func startsWith(re *regexp.Regexp, s string) bool {
	at := re.FindStringIndex(s)
	return at != nil && at[0] == 0
}

// isSecretKey reports whether the value of a key may be a password, also
// when the key is misspelled.
func isSecretKey(key string) bool {
	k := strings.ToLower(key)
	if strings.HasSuffix(k, "_file") || strings.HasSuffix(k, "_command") {
		return false
	}
	for _, part := range []string{"pass", "pwd", "secret", "token", "credential"} {
		if strings.Contains(k, part) {
			return true
		}
	}
	return len(k) < 32 && editDistance(k, "password") <= 3
}
