package recovery_test

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/recovery"
)

var update = flag.Bool("update", false, "write the golden pages anew")

func kit(password string) *recovery.Kit {
	vienna := time.FixedZone("", 3600)
	key := recovery.Key{ID: backup.Hash([]byte("key")), Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Owner: "root@kitchen-pi", Current: true}
	other := key
	other.ID, other.Current, other.Owner = backup.Hash([]byte("other")), false, "ada@laptop"
	return &recovery.Kit{
		Device: "kitchen-pi", Made: time.Date(2026, 11, 23, 3, 0, 0, 0, vienna), Program: "ide49-backup 1.0",
		Repositories: []recovery.Repository{
			{Name: "local", Address: "/backup", ID: backup.Hash([]byte("repository")).String(), Keys: []recovery.Key{key, other},
				PasswordFile: "/service-config/config/backup.key", Password: password,
				Volumes: []recovery.Volume{
					{Name: "mosquitto", Path: "/service-config/mosquitto", Newest: time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)},
					{Name: "it's mine", Path: "/service-config/it's mine", Newest: time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)},
				}},
			{Name: "drive", Address: "/mnt/BACKUP/ide49", Problem: "the destination is not present"},
		},
	}
}

// hostile is a kit of which every name wants to do harm.
func hostile() *recovery.Kit {
	const bad = "</pre><script>alert(1)</script>`reboot`$(reboot)'\"\n; reboot #\x1b[2J\x00\xff\u202e"
	k := kit(bad)
	k.Device, k.Program = bad, bad
	r := &k.Repositories[0]
	r.Name, r.Address, r.PasswordFile, r.ID = bad, bad, bad, backup.Hash(nil).String()
	r.Keys[0].Owner = bad
	r.Volumes[0].Name, r.Volumes[0].Path = bad, bad
	k.Repositories[1].Problem = bad
	return k
}

func render(t *testing.T, k *recovery.Kit) (text, html string) {
	t.Helper()
	var a, b bytes.Buffer
	if err := errors.Join(k.Text(&a), k.HTML(&b)); err != nil {
		t.Fatal(err)
	}
	return a.String(), b.String()
}

func TestGolden(t *testing.T) {
	for name, k := range map[string]*recovery.Kit{"by-hand": kit(""), "with-password": kit("abcde-fghij"), "hostile": hostile()} {
		text, html := render(t, k)
		for ext, got := range map[string]string{"txt": text, "html": html} {
			file := "testdata/" + name + "." + ext
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || got != string(want) {
				t.Errorf("%s differs (%v): look, then go test -update", file, err)
			}
		}
	}
}

func TestPasswordOnlyWhenAsked(t *testing.T) {
	text, html := render(t, kit(""))
	for _, page := range []string{text, html} {
		if strings.Contains(page, "abcde") || !strings.Contains(page, "by hand") {
			t.Error("a page without a password has no place for it")
		}
	}
	text, html = render(t, kit("abcde-fghij"))
	for _, page := range []string{text, html} {
		if strings.Count(page, "abcde-fghij") != 1 || !strings.Contains(page, "by hand") { // the drive's
			t.Error("the password is not printed once")
		}
	}
}

// The page asks for nothing from anywhere, and no name becomes markup.
func TestHTMLIsClosed(t *testing.T) {
	_, html := render(t, hostile())
	for _, bad := range []string{"<script", "src=", "href=", "url(", "@import", "<img", "<link", "http:", "https:"} {
		if strings.Contains(html, bad) {
			t.Errorf("the page holds %q", bad)
		}
	}
	if !strings.Contains(html, "default-src 'none'") {
		t.Error("no policy")
	}
}

func TestTextIsPlain(t *testing.T) {
	text, _ := render(t, hostile())
	for _, bad := range []string{"\x1b", "\x00", "\xff", "\u202e", "\n; reboot"} {
		if strings.Contains(text, bad) {
			t.Errorf("the text holds %q", bad)
		}
	}
	text, _ = render(t, kit(""))
	for line := range strings.Lines(text) {
		if len(line) > 81 && !strings.HasPrefix(line, "    $ ") {
			t.Errorf("too long: %s", line)
		}
	}
}

// A shell gives the programs exactly the names, whatever is in them.
func TestCommandsAreQuoted(t *testing.T) {
	k := hostile()
	noNUL := strings.NewReplacer("\x00", "")
	k.Device = noNUL.Replace(k.Device) // no argument can hold one
	r := &k.Repositories[0]
	r.Address, r.Volumes[0].Path = noNUL.Replace(r.Address), noNUL.Replace(r.Volumes[0].Path)
	text, _ := render(t, k)
	var want = map[string][]string{
		"ide49-backup": {"--repo", r.Address, "--password-file", "password.txt", "restore", "--host", k.Device, "--at", "now", "--to", "restored", "--yes"},
		"restic":       {"-r", r.Address, "--password-file", "password.txt", "restore", "latest", "--host", k.Device, "--path", r.Volumes[0].Path, "--target", "restored-by-restic"},
	}
	for program, args := range want {
		line := regexp.MustCompile(`(?m)^    \$ (` + program + ` .* restore .*)$`).FindStringSubmatch(text)
		if line == nil {
			t.Fatalf("no command of %s", program)
		}
		out, err := exec.Command("bash", "-c", program+`() { printf '%s\0' "$@"; }; `+line[1]).Output()
		if err != nil || string(out) != strings.Join(args, "\x00")+"\x00" {
			t.Errorf("%s becomes %q, %v", line[1], out, err)
		}
	}
}

func TestVolumes(t *testing.T) {
	at := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	snap := func(host, volume, path string, hour int) *backup.Snapshot {
		return &backup.Snapshot{Hostname: host, Time: at.Add(time.Duration(hour) * time.Hour), Paths: []string{path}, Tags: []string{backup.VolumeTag + volume}}
	}
	got := recovery.Volumes([]*backup.Snapshot{snap("pi", "b", "/b", 0), snap("pi", "a", "/new/a", 2), snap("pi", "a", "/a", 1), snap("shed", "c", "/c", 1), {Hostname: "pi"}}, "pi")
	if len(got) != 2 || got[0].Path != "/new/a" || got[1].Name != "b" {
		t.Errorf("%+v", got)
	}
}
