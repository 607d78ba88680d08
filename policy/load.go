package policy

import (
	_ "embed"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
)

//go:embed defaults.yaml
var defaultsYAML []byte

// Load reads the configuration: from path where it is not empty (--config),
// else from the file that $IDE49_BACKUP_CONFIG names, else from
// /service-config/config/backup.yaml or /etc/ide49-backup/backup.yaml, else
// from the built-in defaults. What a file leaves out is as in the defaults.
//
// The problems returned beside a Config are warnings. A configuration that
// cannot be used is an *Errors with all its problems, warnings among them; a
// file that cannot be read is another error, which wraps that of os.
//
// Load reads no password and looks at nothing but the file and the
// permissions of password files.
func Load(path string, env Env) (*Config, []Problem, error) {
	l, err := load(path, env)
	if err != nil {
		return nil, nil, err
	}
	return l.result()
}

// Check does what Load does and also looks at what the configuration names:
// folders, password files and programs that are not there. It reports all it
// finds, in the order of the file.
func Check(path string, env Env) (*Config, []Problem, error) {
	l, err := load(path, env)
	if err != nil {
		return nil, nil, err
	}
	if l.usable() {
		l.checkMachine()
	}
	return l.result()
}

// A loader is a configuration on its way to be one.
type loader struct {
	decoder
	config Config
}

func (l *loader) usable() bool {
	return !l.droppedError && !slices.ContainsFunc(l.problems, func(p Problem) bool { return p.Severity == SeverityError })
}

func (l *loader) result() (*Config, []Problem, error) {
	sortProblems(l.problems)
	if l.dropped > 0 {
		rest := Problem{File: l.src.name, Message: fmt.Sprintf("and %d more problems", l.dropped)}
		if l.usable() {
			rest.Severity = SeverityWarning
		}
		l.problems = append(l.problems, rest)
	}
	if !l.usable() {
		return nil, nil, &Errors{Problems: l.problems}
	}
	return &l.config, l.problems, nil
}

func load(path string, env Env) (*loader, error) {
	src, err := findSource(path, env, configFiles())
	if err != nil {
		return nil, err
	}
	return loadSource(src, env), nil
}

// loadSource decodes and validates src, or the defaults where it is nil.
func loadSource(src *source, env Env) *loader {
	base := &loader{decoder: decoder{src: newSource("built-in defaults", defaultsYAML), env: env}}
	base.decode(&base.config)
	if src == nil {
		base.validate()
		return base
	}
	l := &loader{decoder: decoder{src: src, env: env}, config: base.config}
	l.config.File = src.name
	l.decode(&l.config)
	l.validate()
	return l
}

// validate looks at what no single value shows.
func (l *loader) validate() {
	l.validateRepositories()
	l.validateVolumes()
	l.config.local = time.Local
	if l.config.Timezone.IsZero() {
		if tz, ok := l.env("TZ"); ok && tz != "" && tz != "Local" {
			loc, err := time.LoadLocation(strings.TrimPrefix(tz, ":"))
			if err == nil {
				l.config.local = loc
			} else {
				l.add(Problem{Severity: SeverityWarning, Message: oneLine(fmt.Sprintf(
					"the environment variable TZ is %s, which is no known time zone; set timezone in the configuration", quoteShort(tz)))})
			}
		}
	}
}

func (l *loader) validateRepositories() {
	const section = "repositories"
	_, given := l.at[section]
	if given && len(l.config.Repositories) == 0 && !l.faulty(section) {
		l.setting(SeverityError, section, "repositories has no entry; add one, or remove the key for the default")
	}
	paths := map[string]Name{}
	for _, name := range slices.Sorted(maps.Keys(l.config.Repositories)) {
		key := join(section, string(name))
		if _, ok := l.at[key]; !ok {
			continue // of the defaults
		}
		r := l.config.Repositories[name]
		if l.faulty(key) {
			continue // what seems to be missing may be what is wrong
		}
		l.validateRepository(name, r, key)
		if p := r.URL.Path(); p != "" {
			if other, twice := paths[p]; twice {
				l.setting(SeverityError, key+".url", "repositories %q and %q are the same folder", other, name)
			}
			paths[p] = name
		}
	}
}

func (l *loader) validateRepository(name Name, r Repository, key string) {
	has := func(field string) bool { _, ok := l.at[join(key, field)]; return ok }
	if !has("url") {
		l.setting(SeverityError, key, "repository %q has no url; add url: and the absolute path of a folder", name)
	}
	var forms []string
	for _, f := range []string{"password_file", "password_command", "password"} {
		if has(f) {
			forms = append(forms, f)
		}
	}
	switch len(forms) {
	case 0:
		l.setting(SeverityError, key, "repository %q has no password; add password_file, password_command or password", name)
	case 1:
	default:
		l.setting(SeverityError, join(key, forms[1]), "repository %q has more than one password: %s; keep one", name, strings.Join(forms, ", "))
	}
	if n, ok := l.at[join(key, "password")]; ok && l.src.public {
		if tk := n.GetToken(); tk.Next == nil || tk.Next.Next == nil || !strings.HasPrefix(tk.Next.Next.Value, "${") {
			l.setting(SeverityWarning, join(key, "password"), "every user of this machine can read this password; run: chmod 600 %s", l.src.name)
		}
	}
	if r.PasswordFile != "" {
		fi, err := os.Stat(string(r.PasswordFile))
		if err == nil && fi.Mode().IsRegular() && othersMayUse(fi.Mode()) {
			l.setting(SeverityWarning, join(key, "password_file"), "every user of this machine can read or change the password in %s; run: chmod 600 %s", r.PasswordFile, r.PasswordFile)
		}
	}
}

func (l *loader) validateVolumes() {
	v := l.config.Volumes
	const section = "volumes"
	named := 0
	paths := map[Folder]Name{}
	for _, name := range slices.Sorted(maps.Keys(v.Settings)) {
		s := v.Settings[name]
		key := join(join(section, "settings"), string(name))
		if l.faulty(key) {
			named++ // perhaps it has a path
			continue
		}
		if s.Path == "" {
			if v.Discover == "" {
				l.setting(SeverityError, key, "volume %q has no path, and volumes.discover is off", name)
			} else if slices.ContainsFunc(v.ExcludeVolumes, func(g Glob) bool { return g.Match(string(name)) }) {
				l.setting(SeverityWarning, key, "volume %q is left out by volumes.exclude_volumes; these settings have no effect", name)
			}
		} else {
			named++
			if other, twice := paths[s.Path]; twice {
				l.setting(SeverityError, join(key, "path"), "volumes %q and %q are the same folder", other, name)
			}
			paths[s.Path] = name
		}
		l.validatePatterns(s.Exclude, join(key, "exclude"), s.Path, "")
	}
	if v.Discover == "" && named == 0 {
		l.setting(SeverityError, join(section, "discover"), "there is nothing to back up: volumes.discover is off and no volume has a path")
	}
	l.validatePatterns(v.Exclude, join(section, "exclude"), Folder(v.Discover), " and the volume's name")
}

// validatePatterns warns about patterns that were meant as whole paths:
// they start at the volume's root and so match nothing.
func (l *loader) validatePatterns(patterns []Pattern, key string, root Folder, and string) {
	if root == "" {
		return
	}
	for i, p := range patterns {
		if rest, ok := strings.CutPrefix(strings.TrimPrefix(string(p), "!"), string(root)); ok && (rest == "" || rest[0] == '/') {
			l.setting(SeverityWarning, fmt.Sprintf("%s[%d]", key, i),
				"patterns start at the volume's root, so %q is looked for inside each volume; leave out %s%s", p, root, and)
		}
	}
}

// checkMachine looks at what the configuration names.
func (l *loader) checkMachine() {
	for _, name := range slices.Sorted(maps.Keys(l.config.Repositories)) {
		r := l.config.Repositories[name]
		key := join("repositories", string(name))
		if path := r.URL.Path(); path != "" {
			fi, err := os.Stat(path)
			switch {
			case err == nil && !fi.IsDir():
				l.setting(SeverityError, join(key, "url"), "%s is not a folder", path)
			case err != nil:
				l.setting(SeverityWarning, join(key, "url"), "repository %q: %v; ide49-backup init makes it", name, err)
			}
		}
		// The password of the default repository is made at the first start.
		_, given := l.at[key]
		if path := string(r.PasswordFile); path != "" && given && l.config.File != "" {
			if f, err := openRegular(path); err != nil {
				l.setting(SeverityError, join(key, "password_file"), "password file: %v; make it, readable by its owner only", err)
			} else {
				if fi, err := f.Stat(); err == nil && fi.Size() == 0 {
					l.setting(SeverityError, join(key, "password_file"), "password file %s is empty", path)
				}
				f.Close()
			}
		}
		if len(r.PasswordCommand) > 0 {
			if _, err := exec.LookPath(r.PasswordCommand[0]); err != nil {
				l.setting(SeverityError, join(key, "password_command"), "password command: %v", err)
			}
		}
	}
	volumes, problems, err := Volumes(&l.config)
	for _, p := range problems {
		l.setting(p.Severity, p.Key, "%s", p.Message)
	}
	if err != nil {
		l.setting(SeverityWarning, "volumes.discover", "%v", err)
		return
	}
	for _, v := range volumes {
		for _, name := range slices.Sorted(maps.Keys(l.config.Repositories)) {
			if rel, err := filepath.Rel(v.Path, l.config.Repositories[name].URL.Path()); err == nil && filepath.IsLocal(rel) {
				l.setting(SeverityWarning, join("repositories", string(name))+".url",
					"repository %q lies inside the volume %q and is left out of it; what destroys one destroys both", name, v.Name)
			}
		}
	}
}

// Show writes the configuration as it is after defaults and environment, as
// YAML that Load would read, but for passwords, which are masked.
func (c *Config) Show(w io.Writer) error {
	text, err := yaml.MarshalWithOptions(c, yaml.IndentSequence(true))
	if err != nil {
		return fmt.Errorf("show configuration: %w", err)
	}
	shown := strings.ReplaceAll(string(text), "${", "$${")
	from := "the built-in defaults"
	if c.File != "" {
		from = oneLine(c.File) + " and the built-in defaults"
	}
	_, err = fmt.Fprintf(w, "# From %s.\n%s", from, shown)
	return err
}
