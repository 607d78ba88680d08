package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

var fullEnv = testEnv(map[string]string{"THIRD": "/srv/third", "THIRD_PASSWORD": "hunter2"})

func readTestdata(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestFullConfiguration(t *testing.T) {
	c, problems, err := loadText("full.yaml", readTestdata(t, "good/full.yaml"), fullEnv)
	if err != nil || len(problems) != 0 {
		t.Fatal(err, problems)
	}
	if c.Device != "kitchen-pi" || c.Location().String() != "America/Los_Angeles" {
		t.Errorf("device %q in %s", c.Device, c.Location())
	}
	third := c.Repositories["third"]
	if third.URL.Path() != "/srv/third/backup" || c.Repositories["second"].URL.Path() != "/srv/backup" {
		t.Errorf("repositories at %q and %q", third.URL, c.Repositories["second"].URL)
	}
	if pw, err := third.Secret().Read(t.Context()); string(pw) != "hunter2" || err != nil {
		t.Errorf("third password is %q, %v", pw, err)
	}
	if got := c.Repositories["local"].Secret().File(); got != "/service-config/config/backup.key" {
		t.Errorf("password file %q", got)
	}
	v := c.Volumes
	if want := []Pattern{"**/.cache", "**/node_modules", "*.tmp", "price${x}"}; !slices.Equal(v.Exclude, want) {
		t.Errorf("exclude is %q", v.Exclude)
	}
	if v.LargerThan != 2<<30 || v.IfPresent[0] != ".nobackup" {
		t.Errorf("larger than %d, if present %q", v.LargerThan, v.IfPresent)
	}
	g := v.Settings["grafana"]
	if g.LargerThan == nil || *g.LargerThan != 0 || *g.ExcludeCaches || *g.OneFileSystem || len(g.Exclude) != 2 {
		t.Errorf("grafana is %+v", g)
	}
	if v.Settings["media"].Path != "/srv/media" {
		t.Errorf("media at %q", v.Settings["media"].Path)
	}
}

func TestDefaults(t *testing.T) {
	for name, text := range map[string]string{
		"empty":           "",
		"comment":         "# nothing\n",
		"document marker": "---\n",
		"empty sections":  "repositories:\nvolumes:\n  exclude:\n  settings:\n",
		"byte order mark": "\ufeffvolumes: {}\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, problems, err := loadText("x.yaml", text, testEnv(nil))
			if err != nil || len(problems) != 0 {
				t.Fatal(err, problems)
			}
			name, r, err := c.Repository("")
			if err != nil || name != "local" || r.URL.Path() != "/backup" || r.Secret().File() != "/service-config/config/backup.key" {
				t.Errorf("repository %q: %+v, %v", name, r, err)
			}
			if v := c.Volumes; v.Discover != "/service-config" || !v.OneFileSystem || !v.ExcludeCaches {
				t.Errorf("volumes: %+v", v)
			}
		})
	}
	c, _, err := loadText("x.yaml", "volumes: {one_file_system: false}\nrepositories: {mine: {url: /r, password: x}}\n", testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Repositories) != 1 || c.Volumes.OneFileSystem || c.Volumes.Discover != "/service-config" {
		t.Errorf("a file that says a little gives %+v", c)
	}
}

func TestRepositoryByName(t *testing.T) {
	c, _, err := loadText("full.yaml", readTestdata(t, "good/full.yaml"), fullEnv)
	if err != nil {
		t.Fatal(err)
	}
	if n, _, err := c.Repository("second"); n != "second" || err != nil {
		t.Error(n, err)
	}
	for _, name := range []string{"", "nas"} {
		if _, _, err := c.Repository(name); !errors.Is(err, ErrNoRepository) || !strings.Contains(err.Error(), "third") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestLoadOrder(t *testing.T) {
	dir := t.TempDir()
	write := func(name, device string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("device: "+device+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	flagged, named := write("flag.yaml", "from-flag"), write("env.yaml", "from-env")
	env := testEnv(map[string]string{configVariable: named})
	for _, test := range []struct {
		path string
		env  Env
		want DeviceName
		file string
	}{
		{flagged, env, "from-flag", flagged},
		{"", env, "from-env", named},
		{flagged, testEnv(nil), "from-flag", flagged},
	} {
		c, _, err := Load(test.path, test.env)
		if err != nil || c.Device != test.want || c.File != test.file {
			t.Errorf("Load(%q): %+v, %v", test.path, c, err)
		}
	}

	none := filepath.Join(dir, "none.yaml")
	for _, test := range []struct {
		places []string
		want   string
	}{
		{[]string{flagged, named}, flagged}, {[]string{none, named}, named}, {[]string{none}, ""},
	} {
		src, err := findSource("", testEnv(map[string]string{configVariable: ""}), test.places)
		if err != nil || (src == nil) != (test.want == "") || src != nil && src.name != test.want {
			t.Errorf("of %q: %+v, %v", test.places, src, err)
		}
	}
	if _, err := findSource("", testEnv(nil), []string{dir, named}); err == nil {
		t.Error("what is there but cannot be read is passed over")
	}

	for what, path := range map[string]string{"missing": filepath.Join(dir, "none.yaml"), "folder": dir} {
		for _, byEnv := range []bool{false, true} {
			env := testEnv(nil)
			p := path
			if byEnv {
				p, env = "", testEnv(map[string]string{configVariable: path})
			}
			_, _, err := Load(p, env)
			if err == nil || what == "missing" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a %s file that was named: %v", what, err)
			}
		}
	}
	huge := filepath.Join(dir, "huge.yaml")
	if err := os.WriteFile(huge, bytes.Repeat([]byte("#\n"), maxConfig), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(huge, testEnv(nil)); err == nil || !strings.Contains(err.Error(), "64KiB") {
		t.Errorf("a huge file: %v", err)
	}
}

func TestLocation(t *testing.T) {
	for _, test := range []struct {
		text, tz string
		want     string
		warnings int
	}{
		{"timezone: Europe/Berlin", "Asia/Tokyo", "Europe/Berlin", 0},
		{"", "Asia/Tokyo", "Asia/Tokyo", 0},
		{"", ":Asia/Tokyo", "Asia/Tokyo", 0},
		{"", "", "Local", 0},
		{"", "Nowhere/At_All", "Local", 1},
	} {
		c, problems, err := loadText("x.yaml", test.text, testEnv(map[string]string{"TZ": test.tz}))
		if err != nil || c.Location().String() != test.want || len(problems) != test.warnings {
			t.Errorf("%q with TZ=%q: %v, %v, %v", test.text, test.tz, c.Location(), problems, err)
		}
	}
	if (&Config{}).Location() != time.Local {
		t.Error("a Config without a zone is not local")
	}
}

func TestPermissionWarnings(t *testing.T) {
	dir := t.TempDir()
	file, key := filepath.Join(dir, "backup.yaml"), filepath.Join(dir, "key")
	text := "repositories:\n  a: {url: /a, password: hunter2}\n  b: {url: /b, password_file: " + key + "}\n  c: {url: /c, password: \"${PW}\"}\n"
	for path, text := range map[string]string{file: text, key: "hunter2\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := testEnv(map[string]string{"PW": "x"})
	_, problems, err := Load(file, env)
	if err != nil || len(problems) != 0 {
		t.Fatal(problems, err)
	}
	for _, path := range []string{file, key} {
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_, problems, err = Load(file, env)
	if err != nil || len(problems) != 2 || problems[0].Key != "repositories.a.password" || problems[1].Key != "repositories.b.password_file" {
		t.Fatal(problems, err)
	}
	for _, p := range problems {
		if p.Severity != SeverityWarning || strings.Contains(p.Error()+p.Source, "hunter2") || !strings.Contains(p.Message, "chmod 600") {
			t.Errorf("%+v", p)
		}
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"volumes/grafana", "volumes/influx", "volumes/bad\nname", "volumes/keep/repo"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	empty := filepath.Join(dir, "empty.key")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "backup.yaml")
	text := strings.ReplaceAll(`repositories:
  missing: {url: DIR/none, password_file: DIR/none.key}
  file: {url: DIR/empty.key, password_file: DIR/empty.key}
  inside: {url: DIR/volumes/keep/repo, password_command: [no-such-program-here]}
volumes:
  discover: DIR/volumes
  settings:
    graphana: {one_file_system: false}
    media: {path: DIR/media}
`, "DIR", dir)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := Check(path, testEnv(nil))
	bad, ok := err.(*Errors)
	if !ok {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Print(&out, bad.Problems, false); err != nil {
		t.Fatal(err)
	}
	got := strings.ReplaceAll(out.String(), dir, "DIR")
	// Carets move with the length of DIR.
	var lines []string
	for line := range strings.Lines(got) {
		if !strings.Contains(line, "|") && !strings.Contains(line, " in ") || strings.HasPrefix(line, "error") || strings.HasPrefix(line, "warning") {
			lines = append(lines, line)
		}
	}
	got = strings.Join(lines, "")
	if *update {
		if err := os.WriteFile("testdata/check.golden", []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want := readTestdata(t, "check.golden"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if _, problems, err := Load(path, testEnv(nil)); err != nil || len(problems) != 0 {
		t.Errorf("Load looks at the machine: %v, %v", problems, err)
	}
	missing := filepath.Join(dir, "missing.yaml")
	if err := os.WriteFile(missing, []byte("volumes: {discover: "+dir+"/none}\nrepositories: {a: {url: "+dir+", password: x}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, problems, err := Check(missing, testEnv(nil))
	if err != nil || len(problems) != 1 || problems[0].Line != 1 || problems[0].Key != "volumes.discover" {
		t.Errorf("a missing discover folder: %v, %v", problems, err)
	}
}

func TestShow(t *testing.T) {
	c, _, err := loadText("full.yaml", readTestdata(t, "good/full.yaml"), fullEnv)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := c.Show(&out); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("testdata/show.golden", out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want := readTestdata(t, "show.golden"); out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
	if strings.Contains(out.String(), "hunter2") {
		t.Error("a password is shown")
	}
	again, _, err := loadText("full.yaml", out.String(), testEnv(nil))
	if err != nil {
		t.Fatal(err)
	}
	var second bytes.Buffer
	if err := again.Show(&second); err != nil {
		t.Fatal(err)
	}
	if second.String() != out.String() {
		t.Errorf("shown, read and shown again:\n%s", &second)
	}
}

func compileSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	text, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	schema, err := compiler.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return schema
}

func TestSchema(t *testing.T) {
	schema := compileSchema(t)
	for _, test := range []struct {
		name, yaml string
		ok         bool
	}{
		{"full", readTestdata(t, "good/full.yaml"), true},
		{"defaults", string(defaultsYAML), true},
		{"empty", "{}", true},
		{"variables", "volumes: {one_file_system: \"${X}\", exclude_larger_than: \"${Y}\"}", true},
		{"shell command", "repositories: {a: {url: /a, password_command: pass show x}}", true},
		{"no discovery", "volumes: {discover: ''}", true},
		{"unknown key", "colour: red", false},
		{"unknown key below", "volumes: {exlude: []}", false},
		{"unknown setting", "volumes: {settings: {a: {b: c}}}", false},
		{"unknown repository key", "repositories: {a: {url: /a, username: b}}", false},
		{"wrong type", "volumes: {exclude: '*.tmp'}", false},
		{"relative path", "volumes: {discover: a}", false},
		{"no url", "repositories: {a: {password: x}}", false},
		{"other store", "repositories: {a: {url: 'smb://a/b'}}", false},
		{"bad device", "device: a b", false},
		{"bad size", "volumes: {exclude_larger_than: many}", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			asJSON, err := yaml.YAMLToJSON([]byte(test.yaml))
			if err != nil {
				t.Fatal(err)
			}
			doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(asJSON))
			if err != nil {
				t.Fatal(err)
			}
			if err := schema.Validate(doc); (err == nil) != test.ok {
				t.Errorf("the schema says %v", err)
			}
		})
	}
}

// TestSchemaIsDescribed finds keys that an editor could say nothing about.
func TestSchemaIsDescribed(t *testing.T) {
	text, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	var visit func(path string, s map[string]any)
	visit = func(path string, s map[string]any) {
		props, _ := s["properties"].(map[string]any)
		for name, p := range props {
			p := p.(map[string]any)
			if p["description"] == nil {
				t.Errorf("%s.%s has no description", path, name)
			}
			visit(path+"."+name, p)
			if more, ok := p["additionalProperties"].(map[string]any); ok {
				visit(path+"."+name+".NAME", more)
			}
		}
	}
	var s map[string]any
	if err := json.Unmarshal(text, &s); err != nil {
		t.Fatal(err)
	}
	visit("", s)
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "17": 17, "17B": 17, "1K": 1024, "1KiB": 1024, "1KB": 1000, "1kB": 1000, "500MiB": 500 << 20,
		"1.5 GiB": 3 << 29, " 2T ": 2 << 40, "3TB": 3e12, "3G": 3 << 30,
	} {
		var z Size
		if err := z.UnmarshalText([]byte(text)); err != nil || z != want {
			t.Errorf("%q: %d, %v", text, z, err)
		}
		var again Size
		if err := again.UnmarshalText([]byte(z.String())); err != nil || again != z {
			t.Errorf("%q: %s is read as %d, %v", text, z, again, err)
		}
	}
	for _, text := range []string{"", "B", "-1", "1e3", "1.2.3", "1 2", "0x10", "1Mi", "1mib", "5m", "9999999TiB", "NaN", "Inf"} {
		var z Size
		if err := z.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %d", text, z)
		}
	}
}

func TestParseLocation(t *testing.T) {
	for text, want := range map[string]string{
		"/backup": "/backup", "/backup/": "/backup", "file:/backup": "/backup", "file:///backup": "/backup", "FILE:/a/../b": "/b", "/a:b": "/a:b", "/a b": "/a b",
	} {
		if l, err := ParseLocation(text); err != nil || l.Path() != want || l.String() != want {
			t.Errorf("%q is %q, %v", text, l, err)
		}
	}
	for _, text := range []string{"", "backup", "./backup", "~/b", "file:", "file:b", "file://host/b", "/", "file:/", "/../", "C:/b", "s3:x", "SMB://h/s", "me:hunter2@host", "/a\x00b"} {
		if l, err := ParseLocation(text); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q is %q, %v", text, l, err)
		}
	}
}

func TestProblemsAsJSON(t *testing.T) {
	_, _, err := loadText("x.yaml", "volumes: {exlude: []}\n", testEnv(nil))
	bad, ok := err.(*Errors)
	if !ok {
		t.Fatal(err)
	}
	got, err := json.Marshal(bad.Problems)
	want := `[{"severity":"error","file":"x.yaml","line":1,"column":11,"width":6,"key":"volumes.exlude","message":"unknown key \"exlude\" in volumes; did you mean \"exclude\"?","source":"volumes: {exlude: []}"}]`
	if err != nil || string(got) != want {
		t.Errorf("%s, %v", got, err)
	}
}

func TestPrintColor(t *testing.T) {
	var out bytes.Buffer
	if err := Print(&out, []Problem{{Message: "m", File: "f", Line: 3, Column: 2, Width: 2, Source: "abcd"}}, true); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "\x1b[1;31m^^\x1b[0m") {
		t.Errorf("%q", out.String())
	}
}

func TestManyProblems(t *testing.T) {
	_, _, err := loadText("x.yaml", strings.Repeat("a: 1\n", 500), testEnv(nil))
	bad, ok := err.(*Errors)
	if !ok || len(bad.Problems) != maxProblems+1 {
		t.Fatal(err)
	}
	if last := bad.Problems[maxProblems].Error(); !strings.Contains(last, "and 400 more") {
		t.Error(last)
	}
}

func TestManyWarnings(t *testing.T) {
	text := "volumes:\n  exclude:\n" + strings.Repeat("  - /service-config/x\n", 150)
	c, problems, err := loadText("x.yaml", text, testEnv(nil))
	if err != nil || c == nil || len(problems) != maxProblems+1 || problems[maxProblems].Severity != SeverityWarning {
		t.Fatal(len(problems), err)
	}
	if _, _, err := loadText("x.yaml", text+"repositories: {}\ndevice: a b\n", testEnv(nil)); err == nil {
		t.Error("errors behind many warnings are overlooked")
	}
}

// TestHostileFiles are files made to exhaust the reader.
func TestHostileFiles(t *testing.T) {
	fill := func(unit string) string {
		if !strings.Contains(unit, "\n") {
			return strings.Repeat(unit, (maxLine-100)/len(unit))
		}
		return strings.Repeat(unit, min(maxConfig/len(unit), maxLines-10))
	}
	var keys strings.Builder
	for i := range maxLines - 10 {
		keys.WriteString("k")
		keys.WriteString(strings.Repeat("x", i%5))
		keys.WriteString(time.Duration(i).String())
		keys.WriteString(": 1\n")
	}
	for name, text := range map[string]string{
		"brackets":         fill("["),
		"braces":           fill("{a: "),
		"dashes":           fill("- "),
		"question marks":   fill("? "),
		"anchors":          fill("&a "),
		"aliases":          "x: &a 1\ny: [" + fill("*a,"),
		"tags":             fill("!!map "),
		"keys":             keys.String(),
		"same keys":        fill("a: 1\n"),
		"nested keys":      fill("a: "),
		"long line":        "device: " + fill("x"),
		"quotes":           fill(`"`),
		"open quote":       `device: "` + fill("x\n"),
		"comments":         fill("#\n"),
		"documents":        fill("---\n"),
		"literal":          "device: |\n" + fill("  x\n"),
		"colons":           fill(":\n"),
		"list":             "volumes:\n  exclude:\n" + fill("  - a\n"),
		"variables":        "device: " + fill("${A}"),
		"indentation":      deep(400),
		"merge circle":     "volumes: &v\n  <<: *v\n",
		"directive":        "%YAML 1.2\n" + fill("%X\n"),
		"flow list":        "volumes: {exclude: [" + fill("a,"),
		"flow map":         "volumes: {" + fill("a: 1,"),
		"password quotes":  fill("password: '\n"),
		"carriage returns": fill("a:\r"),
		"endless lines":    strings.Repeat("\n", maxConfig),
		"endless line":     strings.Repeat("[", maxConfig),
		"lists of dashes":  fill(strings.Repeat("- ", maxDepth) + "\n"),
		"many flow lists":  fill("- [[[[[[[[[[[[]]]]]]]]]]]]\n"),
	} {
		t.Run(name, func(t *testing.T) {
			if len(text) > maxConfig {
				text = text[:maxConfig]
			}
			start := time.Now()
			_, _, err := loadText("x.yaml", text, testEnv(nil))
			took := time.Since(start)
			t.Logf("%v, %.200v", took, err)
			if took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

// deep returns mappings nested n deep by indentation.
func deep(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(strings.Repeat(" ", i) + "a:\n")
	}
	return b.String()
}

func FuzzLoad(f *testing.F) {
	files, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	for _, text := range []string{"0::", "{0", "*-0", ">\n>", "&{0", "0\n-", "? a\n: b", "<<: {}", "a: &a\n<<: *a"} {
		f.Add(text)
	}
	env := testEnv(map[string]string{"THIRD": "/srv/third", "THIRD_PASSWORD": "hunter2"})
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 4096 {
			return // large files are TestHostileFiles's
		}
		c, problems, err := loadText("fuzz.yaml", text, env)
		var bad *Errors
		if errors.As(err, &bad) {
			problems = bad.Problems
		} else if err != nil {
			t.Fatalf("an error of another kind: %v", err)
		}
		var out bytes.Buffer
		if err := Print(&out, problems, false); err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			if strings.ContainsAny(p.Error()+p.Source, "\n\x1b\x00") {
				t.Fatalf("control characters in %q, %q", p.Error(), p.Source)
			}
		}
		if c != nil {
			out.Reset()
			if err := c.Show(&out); err != nil {
				t.Fatal(err)
			}
			for _, r := range c.Repositories {
				if r.URL.Path() == "" || r.Secret().IsZero() {
					t.Fatalf("an incomplete repository: %+v", r)
				}
			}
		}
	})
}
