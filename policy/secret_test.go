package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
)

func TestSecretIsNeverShown(t *testing.T) {
	const text = "hunter2"
	s := NewSecret([]byte(text))
	hex := fmt.Sprintf("%x", text)
	type unexported struct{ s Secret }
	values := map[string]any{
		"value": s, "pointer": &s, "in a repository": Repository{Password: s},
		"in a map": map[string]Secret{"a": s}, "in a list": []Secret{s}, "unexported": unexported{s}, "pointer to unexported": &unexported{s},
		"configuration": &Config{Repositories: map[Name]Repository{"a": {Password: s}}},
	}
	for name, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%10.3s", "%T"} {
			out := fmt.Sprintf(verb, v)
			if strings.Contains(out, text) || strings.Contains(strings.ToLower(out), hex) || strings.Contains(out, "104 117") {
				t.Errorf("%s with %s: %s", name, verb, out)
			}
		}
		asJSON, err := json.Marshal(v)
		if err != nil || bytes.Contains(asJSON, []byte(text)) {
			t.Errorf("%s as JSON: %s, %v", name, asJSON, err)
		}
		if name != "unexported" && name != "pointer to unexported" {
			asYAML, err := yaml.Marshal(v)
			if err != nil || bytes.Contains(asYAML, []byte(text)) {
				t.Errorf("%s as YAML: %s, %v", name, asYAML, err)
			}
		}
		var log bytes.Buffer
		slog.New(slog.NewTextHandler(&log, nil)).Info("m", "v", v)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "v", v)
		if strings.Contains(log.String(), text) {
			t.Errorf("%s in a log: %s", name, &log)
		}
	}
	if s.String() != masked || s.GoString() != masked || fmt.Sprint(s) != masked {
		t.Error("a secret is not masked")
	}
}

func TestSecretFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	for text, want := range map[string]string{
		"hunter2": "hunter2", "hunter2\n": "hunter2", "hunter2\r\n": "hunter2", "hunter2\n\n": "hunter2\n", " two words \n": " two words ", "\xff\x00": "\xff\x00",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := SecretFile(path).Read(t.Context()); err != nil || string(got) != want {
			t.Errorf("%q is read as %q, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "\n", "\r\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := SecretFile(path).Read(t.Context()); !errors.Is(err, ErrNoSecret) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := os.WriteFile(path, make([]byte, maxSecret+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := SecretFile(path).Read(t.Context()); err == nil {
		t.Error("a huge file is a password")
	}
	if _, err := SecretFile(filepath.Join(dir, "none")).Read(t.Context()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "password_file") {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := SecretFile(dir).Read(t.Context()); err == nil {
		t.Error("a folder is a password")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := SecretFile(fifo).Read(t.Context()); err == nil {
		t.Error("a FIFO is a password")
	}
}

func TestSecretCommand(t *testing.T) {
	for _, test := range []struct {
		command Command
		want    string
		fails   string
	}{
		{Command{"printf", "hunter2\n"}, "hunter2", ""},
		{Command{"/bin/sh", "-c", "echo hunter2; echo noise >&2"}, "hunter2", ""},
		{Command{"false"}, "", "exit status 1"},
		{Command{"/bin/sh", "-c", "echo hunter2; exit 3"}, "", "exit status 3"},
		{Command{"/bin/sh", "-c", "echo hunter2 >&2; exit 3"}, "", "exit status 3"},
		{Command{"true"}, "", "it is empty"},
		{Command{"no-such-program-here"}, "", "not found"},
		{Command{"cat", "/dev/zero"}, "", "no password"},
	} {
		got, err := Secret{command: test.command}.Read(t.Context())
		if test.fails == "" && (err != nil || string(got) != test.want) {
			t.Errorf("%q: %q, %v", test.command, got, err)
		}
		if test.fails != "" && (err == nil || got != nil || !strings.Contains(err.Error(), test.fails) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("%q: %q, %v", test.command, got, err)
		}
	}
	// A cancelled command ends with all that it started.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := (Secret{command: Command{"/bin/sh", "-c", "sleep 60 & sleep 60"}}).Read(ctx); err == nil {
		t.Error("a command that hangs succeeds")
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("a cancelled command took %v", took)
	}
}

func TestSecretWipe(t *testing.T) {
	s := NewSecret([]byte("hunter2"))
	inner, duplicate := *s.literal(), s
	got, err := duplicate.Read(t.Context())
	if err != nil || string(got) != "hunter2" {
		t.Fatal(err)
	}
	s.Wipe()
	if string(inner) != strings.Repeat("\x00", 7) {
		t.Errorf("after Wipe it is %q", inner)
	}
	if _, err := duplicate.Read(t.Context()); !errors.Is(err, ErrNoSecret) {
		t.Errorf("a copy of a wiped secret: %v", err)
	}
	if string(got) != "hunter2" {
		t.Error("Wipe reaches what the caller owns")
	}
	var none Secret
	none.Wipe()
	if _, err := none.Read(t.Context()); !errors.Is(err, ErrNoSecret) || !none.IsZero() {
		t.Errorf("no secret: %v", err)
	}
}

func TestShellCommandFromConfiguration(t *testing.T) {
	c, _, err := loadText("x.yaml", "repositories: {a: {url: /a, password_command: \"echo hunter2 | tr 2 3\"}}", testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Repositories["a"].Secret().Read(t.Context())
	if err != nil || string(got) != "hunter3" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestMaskPasswords(t *testing.T) {
	for text, want := range map[string]string{
		"password: hunter2":                       "password: ********",
		"  'password' : hunter2":                  "  'password' : ********",
		"password:\n  hunter2\nurl: /a":           "password:\n  ********\nurl: /a",
		"password:\n\n\n  hunter2\n  more\nb: c":  "password:\n\n\n  ********\n  ********\nb: c",
		"- password: |\n    hunter2\n- url: /a":   "- password: ********\n    ********\n- url: /a",
		"{password:\nhunter2, url: /a}":           "{password:\n********",
		"password: \"hunter2\nhunter2\"\nurl: /a": "password: ********\n********\nurl: /a",
		"password: ${PW}":                         "password: ${PW}",
		"password: \"${PW}\" # from the stack":    "password: \"${PW}\" # from the stack",
		"password: ${PW}hunter2":                  "password: ********",
		"{url: /a, pass: hunter2, x: y}":          "{url: /a, pass: ********",
		"password_file: /run/secrets/a":           "password_file: /run/secrets/a",
		"password_command: [pass, show, x]":       "password_command: [pass, show, x]",
		"passwort: hunter2":                       "passwort: ********",
		"url: rest:https://me:hunter2@host/":      "url: rest:https://********@host/",
		"url: /backup":                            "url: /backup",
		"path: /srv/data":                         "path: /srv/data",
		"api_token: hunter2":                      "api_token: ********",
		"# password: hunter2":                     "# password: ********",
	} {
		if got := strings.Join(maskPasswords(strings.Split(text, "\n")), "\n"); got != want {
			t.Errorf("%q is shown as %q, want %q", text, got, want)
		}
	}
}

// FuzzPasswordIsNotShown puts a password into a configuration that is broken
// elsewhere, and looks for it in what is printed.
func FuzzPasswordIsNotShown(f *testing.F) {
	f.Add("device: [", "    color: red\n", uint8(0))
	f.Add("volumes:\n  exlude: []", "    url: /a\n   x", uint8(1))
	f.Add("", "    password: again\n\t", uint8(2))
	f.Add("'", "- x", uint8(3))
	f.Add("device: \"", "\"", uint8(0))
	f.Add("volumes: {exclude: [\"", "[\"]}", uint8(0))
	f.Add("volumes: {exclude_volumes: ['/", "']}", uint8(1))
	f.Add("device: |\n  x", "", uint8(0))
	f.Add("{\"", "\": 1}", uint8(0))
	f.Add("repositories: {'/", "': 1}", uint8(0))
	const secret = "Qx7Zk9Vw3"
	f.Fuzz(func(t *testing.T, before, after string, form uint8) {
		if len(before)+len(after) > 2000 || strings.Contains(before+after, "Q") {
			return
		}
		line := []string{
			"    password: " + secret, "    password: \"" + secret + "\"", "    password:\n      " + secret, "    password: >-\n      " + secret,
		}[form%4]
		text := before + "\nrepositories:\n  local:\n" + line + "\n" + after
		_, problems, err := loadText("x.yaml", text, testEnv(nil))
		var bad *Errors
		if errors.As(err, &bad) {
			problems = bad.Problems
		}
		var out bytes.Buffer
		if err := Print(&out, problems, false); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), secret) {
			t.Fatalf("%q shows the password:\n%s", text, &out)
		}
	})
}
