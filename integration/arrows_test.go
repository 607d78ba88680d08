package integration

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/iot49/ide49-backup/"

// mayImport says which of our packages a package may import, as
// docs/architecture.md draws it. A name that ends in /... stands for all below.
var mayImport = map[string][]string{
	"backup/internal/jsonscan":   {},
	"backup":                     {"backup/internal/jsonscan"},
	"backup/chunk":               {},
	"backup/crypt":               {},
	"udev":                       {},
	"backup/backend":             {"backup"},
	"backup/backend/local":       {"backup", "backup/backend"},
	"backup/backend/mem":         {"backup", "backup/backend"},
	"backup/backend/faulty":      {"backup", "backup/backend"},
	"backup/backend/backendtest": {"backup", "backup/backend"},
	"backup/backend/smb":         {"backup", "backup/backend", "smb"},
	"backup/repo":                {"backup", "backup/backend", "backup/crypt", "backup/internal/jsonscan"},
	"backup/archiver":            {"backup", "backup/repo", "backup/chunk"},
	"backup/restorer":            {"backup", "backup/repo"},
	"backup/check":               {"backup", "backup/backend", "backup/repo"},
	"backup/browse":              {"backup", "backup/repo"},
	"backup/retention":           {"backup"},
	"backup/recovery":            {"backup"},
	"mounts":                     {"udev"},
	"smb":                        {"mounts"},
	"smb/smbtest":                {},
	"smb/smbfs":                  {"mounts", "smb"},
	"policy":                     {"backup", "backup/retention"},
	"service":                    {"backup/...", "mounts", "smb", "smb/smbfs", "udev", "policy", "backup"},
	"web":                        {"service"},
	"cmd/...":                    {"..."},
	"integration/...":            {"..."},
	"integration":                {"..."},
}

func allowed(rules []string, pkg string) bool {
	return slices.ContainsFunc(rules, func(rule string) bool {
		prefix, all := strings.CutSuffix(rule, "...")
		return rule == pkg || all && strings.HasPrefix(pkg, prefix)
	})
}

func TestArrows(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Logf("%s", e.Stderr)
		}
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&pkg); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(pkg.ImportPath, module)
		rules, ok := mayImport[name]
		for rule, r := range mayImport {
			if !ok && strings.HasSuffix(rule, "...") && allowed([]string{rule}, name) {
				rules, ok = r, true
			}
		}
		if !ok {
			t.Errorf("package %s has no place in the house: add it to mayImport and docs/architecture.md", name)
			continue
		}
		for _, imp := range pkg.Imports {
			if ours, ok := strings.CutPrefix(imp, module); ok && !allowed(rules, ours) {
				t.Errorf("%s must not import %s", name, ours)
			}
		}
	}
}
