package mounts

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// longestName is the length in bytes that a cleaned name is cut to. File
// systems allow 255; a suffix and a temporary name must fit too.
const longestName = 128

// cleanName makes one folder name of a label: visible Unicode stays, whatever
// could leave the folder, hide or forge a line becomes "_". The result is
// empty when nothing visible is left.
func cleanName(label string) string {
	label = strings.Map(func(r rune) rune {
		switch {
		case r == utf8.RuneError, r == '/', unicode.IsControl(r), unicode.Is(unicode.Cf, r),
			unicode.Is(unicode.Co, r), unicode.Is(unicode.Zl, r), unicode.Is(unicode.Zp, r):
			return '_'
		case unicode.Is(unicode.Zs, r):
			return ' '
		}
		return r
	}, strings.ToValidUTF8(label, "_"))
	label = strings.TrimSpace(label)
	if len(label) > longestName {
		label = label[:longestName]
		for !utf8.ValidString(label) {
			label = label[:len(label)-1]
		}
		label = strings.TrimSpace(label)
	}
	// A leading dot would hide the folder, and "." and ".." are none; a
	// leading dash reads as a flag.
	if strings.HasPrefix(label, ".") || strings.HasPrefix(label, "-") {
		label = "_" + label[1:]
	}
	if strings.Trim(label, "_ .") == "" {
		return ""
	}
	return label
}

// Names remembers which folder name belongs to which file system, so that a
// name does not depend on the order of plugging. Keys are identities as
// Probe.identity makes them.
type Names map[string]string

// assign returns the name for an identity: the one it had before, or wanted,
// or wanted with the first suffix "-2", "-3", … that no other identity has.
func (n Names) assign(id, wanted string) string {
	if name, ok := n[id]; ok {
		return name
	}
	owner := make(map[string]string, len(n))
	for other, name := range n {
		owner[name] = other
	}
	name := wanted
	for i := 2; ; i++ {
		if _, taken := owner[name]; !taken {
			return name
		}
		name = wanted + "-" + strconv.Itoa(i)
	}
}

const namesFile = "drive-names.json"

// loadNames reads the names from a state folder. A missing file is an empty
// set. Names that a folder can't have are dropped: the file is an input too.
func loadNames(dir string) (Names, error) {
	b, err := os.ReadFile(filepath.Join(dir, namesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Names{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the names of drives: %w", err)
	}
	return parseNames(b)
}

func parseNames(b []byte) (Names, error) {
	names := Names{}
	if err := json.Unmarshal(b, &names); err != nil {
		return nil, fmt.Errorf("reading the names of drives: %w", err)
	}
	maps.DeleteFunc(names, func(id, name string) bool {
		return id == "" || name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 255
	})
	return names, nil
}

func (n Names) save(dir string) error {
	b, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return fmt.Errorf("saving the names of drives: %w", err)
	}
	if err := writeFile(filepath.Join(dir, namesFile), append(b, '\n')); err != nil {
		return fmt.Errorf("saving the names of drives: %w", err)
	}
	return nil
}
