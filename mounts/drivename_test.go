package mounts

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestCleanName(t *testing.T) {
	for _, tt := range []struct{ label, want string }{
		{"BACKUP", "BACKUP"},
		{"My Photos", "My Photos"},
		{"  padded  ", "padded"},
		{"Ünïcödé 写真 🎞", "Ünïcödé 写真 🎞"},
		{"a/b", "a_b"},
		{"../../etc", "_._.._etc"},
		{"..", ""},
		{".", ""},
		{"", ""},
		{" / ", ""},
		{".hidden", "_hidden"},
		{"-rf", "_rf"},
		{"lab=el", "lab=el"},
		{"a\nb\tc\x00d\x1b[31m", "a_b_c_d_[31m"},
		{"a\u202eb\u200bc", "a_b_c"},
		{"a\u00a0b\u2028c", "a b_c"},
		{"bad\xff\xfeutf8", "bad_utf8"},
		{strings.Repeat("é", 100), strings.Repeat("é", 64)},
		{strings.Repeat("x", 127) + " y", strings.Repeat("x", 127)},
	} {
		if got := cleanName(tt.label); got != tt.want {
			t.Errorf("cleanName(%q) = %q, want %q", tt.label, got, tt.want)
		}
	}
}

func FuzzCleanName(f *testing.F) {
	for _, s := range []string{"BACKUP", "../..", "a/b", "\x00", "é\xff", ".", "-", strings.Repeat("é", 200), "\u202e", " "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, label string) {
		name := cleanName(label)
		if name == "" {
			return
		}
		if len(name) > longestName || !utf8.ValidString(name) || strings.ContainsAny(name, "/\x00\n") || name[0] == '.' || name[0] == '-' {
			t.Errorf("%q became %q", label, name)
		}
		for _, r := range name {
			if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
				t.Errorf("%q became %q with %U", label, name, r)
			}
		}
		if filepath.Join("/mnt", name) != "/mnt/"+name {
			t.Errorf("%q leaves its folder", name)
		}
		if again := cleanName(name); again != name {
			t.Errorf("%q becomes %q and then %q", label, name, again)
		}
	})
}

func TestNames(t *testing.T) {
	dir := t.TempDir()
	n, err := loadNames(dir)
	if err != nil || len(n) != 0 {
		t.Fatalf("%v, %v", n, err)
	}
	for _, tt := range []struct{ id, want, got string }{
		{"ext4:a", "DATA", "DATA"}, {"ext4:b", "DATA", "DATA-2"}, {"ext4:c", "DATA", "DATA-3"},
		{"ext4:d", "DATA-2", "DATA-2-2"}, {"ext4:a", "RENAMED", "DATA"},
	} {
		got := n.assign(tt.id, tt.want)
		if got != tt.got {
			t.Errorf("%s wants %s and gets %s, not %s", tt.id, tt.want, got, tt.got)
		}
		n[tt.id] = got
	}
	if err := n.save(dir); err != nil {
		t.Fatal(err)
	}
	again, err := loadNames(dir)
	if err != nil || len(again) != len(n) || again["ext4:b"] != "DATA-2" {
		t.Errorf("%v, %v", again, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	hostile := `{"a":"../x","b":"..","c":"ok","d":"","":"x","e":"a/b"}`
	if err := os.WriteFile(filepath.Join(dir, namesFile), []byte(hostile), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err = loadNames(dir); err != nil || len(again) != 1 || again["c"] != "ok" {
		t.Errorf("%v, %v", again, err)
	}
	if err := os.WriteFile(filepath.Join(dir, namesFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = loadNames(dir); err == nil {
		t.Error("a torn file was read")
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, content := range []string{"one", "two"} {
		if err := writeFile(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != content {
			t.Errorf("%q, %v", b, err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(filepath.Join(dir, "d"), nil); err == nil {
		t.Error("a folder was replaced by a file")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
