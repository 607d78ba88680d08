package policy

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	_ "time/tzdata" // as in the program: the zone names must not depend on the machine
)

var update = flag.Bool("update", false, "write the golden files anew")

// testEnv is an environment of nothing but what is given.
func testEnv(vars map[string]string) Env {
	return func(name string) (string, bool) { v, ok := vars[name]; return v, ok }
}

// loadText loads a configuration that is not in a file.
func loadText(name, text string, env Env) (*Config, []Problem, error) {
	return loadSource(newSource(name, []byte(text)), env).result()
}

func TestBadConfigurations(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) < 30 {
		t.Fatalf("%d bad configurations, %v", len(files), err)
	}
	env := testEnv(map[string]string{"RELATIVE": "some/folder", "WORD": "maybe"})
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = loadText(filepath.Base(file), string(text), env)
			bad, ok := err.(*Errors)
			if !ok {
				t.Fatalf("error is %v, want *Errors", err)
			}
			var out bytes.Buffer
			if err := Print(&out, bad.Problems, false); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(out.String(), "hunter2") || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a password is shown:\n%s", &out)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if out.String() != string(want) {
				t.Errorf("got\n%s\nwant\n%s", &out, want)
			}
		})
	}
}
