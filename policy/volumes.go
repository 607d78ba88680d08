package policy

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/iot49/ide49-backup/backup"
)

// A Volume is a folder to back up and how.
type Volume struct {
	backup.Volume

	Excludes         *Excludes // never nil
	OneFileSystem    bool      // leave out what is mounted inside
	ExcludeCaches    bool      // leave out the contents of folders with a CACHEDIR.TAG
	ExcludeIfPresent []string  // … and of folders with a file of one of these names
	LargerThan       int64     // leave out files of more bytes; 0 is no limit
}

// ErrNoVolumes means that there is nothing to back up.
var ErrNoVolumes = errors.New("no volumes to back up")

// lostFound is what ext4 puts into the root of every file system, for fsck.
const lostFound = "lost+found"

// Volumes returns the volumes that the configuration names and those that
// are there now, sorted by name.
//
// Every folder directly below volumes.discover is a volume, hidden ones too:
// what is not backed up cannot be restored. Not volumes are symbolic links,
// lost+found, names that match volumes.exclude_volumes, and the folder of a
// repository. A volume with a path in volumes.settings is one whether it is
// there or not, and takes the place of a found one of the same name.
//
// The problems are warnings about what is not backed up and might have been
// meant to be. The error wraps ErrNoVolumes, or that of os where the folder
// cannot be read; a folder that is missing matters only if no volume has a
// path.
func Volumes(c *Config) ([]Volume, []Problem, error) {
	f := finder{config: c, found: map[Name]Folder{}}
	if err := f.discover(); err != nil {
		return nil, f.problems, err
	}
	f.named()
	if len(f.found) == 0 {
		return nil, f.problems, fmt.Errorf("%w: %s holds no folder that is one; correct volumes.discover or give a volume a path", ErrNoVolumes, c.Volumes.Discover)
	}
	volumes := make([]Volume, 0, len(f.found))
	for _, name := range slices.Sorted(maps.Keys(f.found)) {
		v, err := c.volume(name, f.found[name])
		if err != nil {
			return nil, f.problems, err
		}
		volumes = append(volumes, v)
	}
	return volumes, f.problems, nil
}

type finder struct {
	config   *Config
	found    map[Name]Folder
	problems []Problem
}

func (f *finder) warn(key, format string, args ...any) {
	f.problems = append(f.problems, Problem{Severity: SeverityWarning, Key: key, Message: oneLine(fmt.Sprintf(format, args...))})
}

func (f *finder) discover() error {
	rules := f.config.Volumes
	root := string(rules.Discover)
	if root == "" {
		return nil
	}
	const key = "volumes.discover"
	entries, err := os.ReadDir(root)
	if err != nil {
		if f.hasPaths() {
			f.warn(key, "%v; only volumes with a path are backed up", err)
			return nil
		}
		return fmt.Errorf("find volumes: %w; correct volumes.discover", err)
	}
	for _, e := range entries {
		name := e.Name()
		if !e.IsDir() || name == lostFound ||
			slices.ContainsFunc(rules.ExcludeVolumes, func(g Glob) bool { return g.Match(name) }) {
			continue
		}
		path := filepath.Join(root, name)
		if f.isRepository(path) {
			continue
		}
		if err := checkName(name); err != nil {
			f.warn(key, "the folder %s is not backed up: %v; rename it, or name it in volumes.settings with its path", strconv.Quote(path), err)
			continue
		}
		f.found[Name(name)] = Folder(path)
	}
	return nil
}

func (f *finder) hasPaths() bool {
	for _, s := range f.config.Volumes.Settings {
		if s.Path != "" {
			return true
		}
	}
	return false
}

// named adds the volumes with a path and warns about settings of none.
func (f *finder) named() {
	rules := f.config.Volumes
	var names []string
	for n := range f.found {
		names = append(names, string(n))
	}
	slices.Sort(names)
	for _, name := range slices.Sorted(maps.Keys(rules.Settings)) {
		path := rules.Settings[name].Path
		key := join("volumes.settings", string(name))
		at, exists := f.found[name]
		switch {
		case path == "" && exists:
		case path == "":
			if rules.Discover == "" || slices.ContainsFunc(rules.ExcludeVolumes, func(g Glob) bool { return g.Match(string(name)) }) {
				continue // Load has said so
			}
			hint := ""
			if s := nearest(string(name), names); s != "" {
				hint = fmt.Sprintf("; did you mean %q?", s)
			}
			f.warn(key, "there is no volume %q below %s%s", name, rules.Discover, hint)
		default:
			if exists && at != path {
				f.warn(join(key, "path"), "the folder %s is not backed up: the volume %q is %s", at, name, path)
			}
			f.found[name] = path
			if fi, err := os.Stat(string(path)); err != nil {
				f.warn(join(key, "path"), "volume %q: %v", name, err)
			} else if !fi.IsDir() {
				f.warn(join(key, "path"), "volume %q: %s is not a folder", name, path)
			}
		}
	}
}

// isRepository reports whether path is the folder of a repository or lies in
// one. A folder that holds a repository among other things is a volume; the
// archiver leaves the repository out.
func (f *finder) isRepository(path string) bool {
	for _, r := range f.config.Repositories {
		if rel, err := filepath.Rel(r.URL.Path(), path); err == nil && filepath.IsLocal(rel) {
			return true
		}
	}
	return false
}

// volume joins the rules for every volume with the settings of one.
func (c *Config) volume(name Name, path Folder) (Volume, error) {
	rules, own := c.Volumes, c.Volumes.Settings[name]
	v := Volume{
		Volume:        backup.Volume{Name: string(name), Path: string(path)},
		OneFileSystem: rules.OneFileSystem,
		ExcludeCaches: rules.ExcludeCaches,
		LargerThan:    int64(rules.LargerThan),
	}
	if own.OneFileSystem != nil {
		v.OneFileSystem = *own.OneFileSystem
	}
	if own.ExcludeCaches != nil {
		v.ExcludeCaches = *own.ExcludeCaches
	}
	if own.LargerThan != nil {
		v.LargerThan = int64(*own.LargerThan)
	}
	for _, n := range slices.Concat(rules.IfPresent, own.IfPresent) {
		if !slices.Contains(v.ExcludeIfPresent, string(n)) {
			v.ExcludeIfPresent = append(v.ExcludeIfPresent, string(n))
		}
	}
	var patterns []string
	for _, p := range slices.Concat(rules.Exclude, own.Exclude) {
		patterns = append(patterns, string(p))
	}
	var err error
	if v.Excludes, err = NewExcludes(patterns...); err != nil {
		return Volume{}, fmt.Errorf("volume %q: %w", name, err)
	}
	return v, nil
}

// AddPatterns returns the volume with patterns added behind its own, as a
// command line asks for.
func (v Volume) AddPatterns(patterns ...string) (Volume, error) {
	e, err := NewExcludes(slices.Concat(v.Excludes.Patterns(), patterns)...)
	if err != nil {
		return Volume{}, err
	}
	v.Excludes = e
	return v, nil
}

// Select returns the volumes of the given names, in the order of all. The
// error names those that are not there and what they might have been.
func Select(all []Volume, names ...string) ([]Volume, error) {
	var have []string
	for _, v := range all {
		have = append(have, v.Name)
	}
	var missing []string
	for _, n := range names {
		if !slices.Contains(have, n) {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		missing = slices.Compact(missing)
		hint := "; there is " + quotedList(have)
		if s := nearest(missing[0], have); len(missing) == 1 && s != "" {
			hint = fmt.Sprintf("; did you mean %q?", s)
		}
		return nil, fmt.Errorf("no such volume: %s%s", quotedList(missing), hint)
	}
	return slices.DeleteFunc(slices.Clone(all), func(v Volume) bool {
		return !slices.Contains(names, v.Name)
	}), nil
}
