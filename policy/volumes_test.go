package policy

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// volumeTree makes folders, files (names that end in "." are files) and
// links (a>b) below a new folder.
func volumeTree(t *testing.T, names ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, n := range names {
		var err error
		if link, target, ok := strings.Cut(n, ">"); ok {
			err = os.Symlink(target, filepath.Join(root, link))
		} else if strings.HasSuffix(n, ".") {
			err = os.WriteFile(filepath.Join(root, n), nil, 0o644)
		} else {
			err = os.MkdirAll(filepath.Join(root, n), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func volumeNames(vs []Volume) []string {
	var names []string
	for _, v := range vs {
		names = append(names, v.Name)
	}
	return names
}

func TestVolumes(t *testing.T) {
	root := volumeTree(t, "mosquitto", "grafana/log", "Influx DB", ".hidden", "lost+found", "file.", "link>grafana",
		"duplicati", "backup", "old-1", "old-2", "näme", "own/repo", "new\nline", "bad\xff", "tab\tname", "\u202eevil")
	for _, test := range []struct {
		name, yaml string
		want       []string
		warnings   []string // part of each, in order
	}{
		{"all", "", []string{".hidden", "Influx DB", "backup", "duplicati", "grafana", "mosquitto", "näme", "old-1", "old-2", "own"}, []string{`bad\xff`, `new\nline`, `tab\tname`, `\u202e`}},
		{"excluded", "  exclude_volumes: [duplicati, backup, 'old-*', '.*', \"bad*\", \"new*\", \"tab*\", \"*evil\"]\n",
			[]string{"Influx DB", "grafana", "mosquitto", "näme", "own"}, nil},
		{"named", "  exclude_volumes: ['*']\n  settings:\n    media: {path: ROOT/grafana/log}\n    mosquitto: {path: ROOT/mosquitto}\n",
			[]string{"media", "mosquitto"}, nil},
		{"in place of", "  exclude_volumes: ['[!mg]*']\n  settings: {grafana: {path: ROOT/grafana/log}}\n",
			[]string{"grafana", "mosquitto"}, []string{"ROOT/grafana is not backed up"}},
		{"not there", "  exclude_volumes: ['[!mg]*']\n  settings: {media: {path: ROOT/none}, graphana: {}, file: {path: ROOT/file.}}\n",
			[]string{"file", "grafana", "media", "mosquitto"}, []string{"not a folder", `mean "grafana"`, "no such file"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := "repositories:\n  local: {url: /backup, password: x}\nvolumes:\n  discover: ROOT\n" + test.yaml
			c, problems, err := loadText("x.yaml", strings.ReplaceAll(text, "ROOT", root), testEnv(nil))
			if err != nil || len(problems) > 0 {
				t.Fatal(problems, err)
			}
			vs, problems, err := Volumes(c)
			if err != nil || !slices.Equal(volumeNames(vs), test.want) {
				t.Errorf("%q, %v", volumeNames(vs), err)
			}
			for i, p := range problems {
				if i >= len(test.warnings) || p.Severity != SeverityWarning || p.Line != 0 ||
					!strings.Contains(strings.ReplaceAll(p.Message, root, "ROOT"), test.warnings[i]) {
					t.Errorf("warning %d: %s", i, p)
				}
			}
			if len(problems) != len(test.warnings) {
				t.Errorf("%d warnings, want %d", len(problems), len(test.warnings))
			}
			for _, v := range vs {
				if !filepath.IsAbs(v.Path) || v.Excludes == nil {
					t.Errorf("%+v", v)
				}
			}
		})
	}
}

func TestVolumesLeaveOutRepositories(t *testing.T) {
	root := volumeTree(t, "a", "backup", "b/repo", "all/x")
	text := strings.ReplaceAll("repositories:\n  r: {url: ROOT/backup, password: x}\n  s: {url: ROOT/b/repo, password: x}\nvolumes: {discover: ROOT}\n", "ROOT", root)
	c, _, err := loadText("x.yaml", text, testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	vs, problems, err := Volumes(c)
	if want := []string{"a", "all", "b"}; err != nil || len(problems) > 0 || !slices.Equal(volumeNames(vs), want) {
		t.Errorf("%q, %v, %v", volumeNames(vs), problems, err)
	}
}

func TestVolumeSettings(t *testing.T) {
	root := volumeTree(t, "a", "b")
	text := strings.ReplaceAll(`repositories: {r: {url: /r, password: x}}
volumes:
  discover: ROOT
  exclude: ["*.log", "*.tmp"]
  exclude_if_present: [.nobackup]
  exclude_larger_than: 1MiB
  settings:
    b:
      exclude: ["!keep.log"]
      one_file_system: false
      exclude_caches: false
      exclude_if_present: [.nobackup, .skip]
      exclude_larger_than: 0
`, "ROOT", root)
	c, _, err := loadText("x.yaml", text, testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	vs, _, err := Volumes(c)
	if err != nil || len(vs) != 2 {
		t.Fatal(vs, err)
	}
	a, b := vs[0], vs[1]
	if !a.OneFileSystem || !a.ExcludeCaches || a.LargerThan != 1<<20 || !slices.Equal(a.ExcludeIfPresent, []string{".nobackup"}) ||
		!a.Excludes.Match("keep.log", false) {
		t.Errorf("a is %+v", a)
	}
	if b.OneFileSystem || b.ExcludeCaches || b.LargerThan != 0 || !slices.Equal(b.ExcludeIfPresent, []string{".nobackup", ".skip"}) ||
		b.Excludes.Match("keep.log", false) || !b.Excludes.Match("x.log", false) {
		t.Errorf("b is %+v", b)
	}
	more, err := b.AddPatterns("keep.log")
	if err != nil || !more.Excludes.Match("keep.log", false) || b.Excludes.Match("keep.log", false) {
		t.Errorf("with a pattern more: %+v, %v", more, err)
	}
	if _, err := b.AddPatterns("["); err == nil {
		t.Error("a bad pattern is added")
	}
}

func TestNoVolumes(t *testing.T) {
	empty := volumeTree(t, "file.")
	file := filepath.Join(empty, "file.")
	for discover, want := range map[string]error{empty: ErrNoVolumes, filepath.Join(empty, "none"): fs.ErrNotExist, file: nil} {
		c, _, err := loadText("x.yaml", "volumes: {discover: "+discover+"}\n", testEnv(nil))
		if err != nil {
			t.Fatal(err)
		}
		if vs, _, err := Volumes(c); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", discover, vs, err)
		}
	}
	c, _, err := loadText("x.yaml", "volumes: {discover: "+empty+"/none, settings: {a: {path: "+empty+"}}}\n", testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	if vs, problems, err := Volumes(c); err != nil || len(vs) != 1 || len(problems) != 1 {
		t.Errorf("a volume with a path: %v, %v, %v", vs, problems, err)
	}
}

func TestSelect(t *testing.T) {
	var all []Volume
	for _, n := range []string{"grafana", "influx", "mosquitto"} {
		v := Volume{}
		v.Name = n
		all = append(all, v)
	}
	if vs, err := Select(all, "mosquitto", "grafana", "mosquitto"); err != nil || !slices.Equal(volumeNames(vs), []string{"grafana", "mosquitto"}) {
		t.Errorf("%q, %v", volumeNames(vs), err)
	}
	if _, err := Select(all, "graphana"); err == nil || !strings.Contains(err.Error(), `did you mean "grafana"`) {
		t.Error(err)
	}
	if _, err := Select(all, "x", "y"); err == nil || !strings.Contains(err.Error(), `"influx"`) {
		t.Error(err)
	}
}

func TestDeviceName(t *testing.T) {
	host := func(name string, err error) func() (string, error) {
		return func() (string, error) { return name, err }
	}
	dir := t.TempDir()
	c := &Config{}
	if n, problems, err := (&Config{Device: "attic"}).deviceName(filepath.Join(dir, "none"), host("kitchen", nil)); n != "attic" || problems != nil || err != nil {
		t.Errorf("configured: %q, %v, %v", n, problems, err)
	}
	if n, problems, err := c.deviceName(dir, host("kitchen", nil)); n != "kitchen" || problems != nil || err != nil {
		t.Errorf("first start: %q, %v, %v", n, problems, err)
	}
	if n, _, err := c.deviceName(dir, host("other", nil)); n != "kitchen" || err != nil {
		t.Errorf("second start: %q, %v", n, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the state folder holds %v, %v", entries, err)
	}
	if n, problems, err := c.deviceName(t.TempDir(), host("3f2a9c01b7de", nil)); n != "3f2a9c01b7de" || len(problems) != 1 || err != nil {
		t.Errorf("in a container: %q, %v, %v", n, problems, err)
	}
	for _, name := range []string{"", "a b", "../x", "-x", ".x", "é", "a\nb", strings.Repeat("x", 65)} {
		if _, _, err := c.deviceName(t.TempDir(), host(name, nil)); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("host name %q: %v", name, err)
		}
	}
	broken := errors.New("broken")
	if _, _, err := c.deviceName(t.TempDir(), host("", broken)); !errors.Is(err, broken) {
		t.Error(err)
	}
	// A damaged file is an error: a new name would begin new histories.
	for _, text := range []string{"", "\n", "two words\n", strings.Repeat("x", 5000)} {
		if err := os.WriteFile(filepath.Join(dir, deviceFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if n, _, err := c.deviceName(dir, host("kitchen", nil)); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, deviceFile)) {
			t.Errorf("file with %.20q: %q, %v", text, n, err)
		}
	}
	if _, _, err := c.deviceName(filepath.Join(dir, "none"), host("kitchen", nil)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no state folder: %v", err)
	}
	if n, _, err := c.DeviceName(t.TempDir()); err != nil || n == "" {
		t.Errorf("this machine: %q, %v", n, err)
	}
}
