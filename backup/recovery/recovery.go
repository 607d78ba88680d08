// Package recovery writes the page to print and keep: where the repositories
// are, what they are called by, and how to get everything back, with this
// program or with stock restic, on a machine that has neither this device nor
// its configuration.
//
// It only renders what it is given. Every name may be hostile: text is
// escaped, commands are quoted for a POSIX shell.
package recovery

import (
	_ "embed"
	"fmt"
	htmltemplate "html/template"
	"io"
	"slices"
	"strings"
	texttemplate "text/template"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/iot49/ide49-backup/backup"
)

// A Kit is what the page tells.
type Kit struct {
	Device       string       `json:"device"`  // name in snapshots
	Made         time.Time    `json:"made"`    // shown in its zone
	Program      string       `json:"program"` // name and version of this program
	Repositories []Repository `json:"repositories"`
}

// A Repository is one place to recover from.
type Repository struct {
	Name    string `json:"name"`    // in the configuration; may be ""
	Address string `json:"address"` // what --repo and restic's -r take
	// Problem says why the repository could not be looked at; then ID, Keys
	// and Volumes are empty.
	Problem string   `json:"problem,omitempty"`
	ID      string   `json:"id,omitzero"` // of the repository, hexadecimal
	Keys    []Key    `json:"keys"`
	Volumes []Volume `json:"volumes"`
	// PasswordFile is where the device keeps the password; may be "".
	PasswordFile string `json:"password_file,omitempty"`
	// Password is printed if it is not "". Otherwise there is a line to write
	// it on.
	Password string `json:"password,omitempty"`
}

// A Key is a key of a repository. Its fingerprint is the beginning of its ID,
// which is the SHA-256 of the key's file.
type Key struct {
	ID      backup.ID `json:"id,omitzero"`
	Created time.Time `json:"created"`
	Owner   string    `json:"owner"`   // user and host
	Current bool      `json:"current"` // the repository was opened with it
}

// Fingerprint returns the first 16 digits of the key's ID in groups of four.
func (k Key) Fingerprint() string { return grouped(k.ID.String()[:16]) }

// A Volume is one source of snapshots.
type Volume struct {
	Name   string    `json:"name"`
	Path   string    `json:"path"` // as recorded in its newest snapshot
	Newest time.Time `json:"newest"`
}

// Volumes returns the volumes of a device in snapshots, by name. The path of
// each is that of its newest snapshot.
func Volumes(snaps []*backup.Snapshot, device string) []Volume {
	byName := map[string]Volume{}
	for _, s := range snaps {
		v, known := byName[s.Volume()]
		if s.Hostname != device || len(s.Paths) == 0 || known && s.Time.Before(v.Newest) {
			continue
		}
		byName[s.Volume()] = Volume{s.Volume(), s.Paths[0], s.Time}
	}
	var all []Volume
	for _, v := range byName {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b Volume) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// PasswordName is the file that the commands read the password from.
const PasswordName = "password.txt"

var (
	//go:embed kit.txt.tmpl
	textSource string
	//go:embed kit.html.tmpl
	htmlSource string
)

// functions are what both templates call.
func functions(k *Kit) map[string]any {
	return map[string]any{
		"grouped":  grouped,
		"safe":     safe,
		"time":     func(t time.Time) string { return t.In(k.Made.Location()).Format("2006-01-02 15:04 -07:00") },
		"day":      func(t time.Time) string { return t.In(k.Made.Location()).Format(time.DateOnly) },
		"password": func() string { return PasswordName },
		"ours": func(r Repository, args ...string) string {
			return command(append([]string{"ide49-backup", "--repo", r.Address, "--password-file", PasswordName}, args...)...)
		},
		"restic": func(r Repository, args ...string) string {
			return command(append([]string{"restic", "-r", r.Address, "--password-file", PasswordName}, args...)...)
		},
		"line": func(c string) string { return strings.Repeat(c, 72) },
	}
}

// Text writes the kit as plain text of lines that fit a page. Commands stand
// on lines of their own after "    $ ".
func (k *Kit) Text(w io.Writer) error {
	t, err := texttemplate.New("kit").Funcs(functions(k)).Parse(textSource)
	if err == nil {
		err = t.Execute(w, k)
	}
	if err != nil {
		return fmt.Errorf("write recovery kit: %w", err)
	}
	return nil
}

// HTML writes the kit as one page to print, which asks for nothing from any
// network.
func (k *Kit) HTML(w io.Writer) error {
	t, err := htmltemplate.New("kit").Funcs(functions(k)).Parse(htmlSource)
	if err == nil {
		err = t.Execute(w, k)
	}
	if err != nil {
		return fmt.Errorf("write recovery kit: %w", err)
	}
	return nil
}

// grouped puts a space after every fourth character, so that a person can
// compare long numbers.
func grouped(s string) string {
	var b strings.Builder
	for i, r := range s {
		if i > 0 && i%4 == 0 {
			b.WriteByte(' ')
		}
		b.WriteRune(r)
	}
	return b.String()
}

// safe returns s with everything escaped that does not print as it is.
func safe(s string) string {
	if plain(s) {
		return s
	}
	return fmt.Sprintf("%q", s)
}

func plain(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// command returns a line for a POSIX shell that runs a program with exactly
// these arguments.
func command(args ...string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = quote(a)
	}
	return strings.Join(quoted, " ")
}

const harmless = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./_-"

// quote returns a word of a shell. What does not print becomes an octal escape
// in $'…', which Bash, Zsh, BusyBox and POSIX of 2024 know.
func quote(s string) string {
	switch {
	case s != "" && strings.Trim(s, harmless) == "":
		return s
	case plain(s):
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	var b strings.Builder
	b.WriteString("$'")
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1 || !unicode.IsPrint(r):
			for _, c := range []byte(s[i : i+n]) {
				fmt.Fprintf(&b, `\%03o`, c)
			}
		case r == '\'' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		default:
			b.WriteRune(r)
		}
		i += n
	}
	b.WriteByte('\'')
	return b.String()
}
