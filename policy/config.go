package policy

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A Config is the whole configuration after defaults, with every value
// checked. The zero Config is not useful: Load or Defaults make one.
type Config struct {
	// File is the file that was read, "" for the built-in defaults.
	File string `yaml:"-"`

	Device       DeviceName          `yaml:"device,omitempty" jsonschema_description:"Host name in snapshots. Default: the machine's name, remembered at the first start."`
	Timezone     Zone                `yaml:"timezone,omitempty" jsonschema_description:"Time zone of schedules and of --at, for example America/Los_Angeles. Default: TZ, then the system's."`
	Repositories map[Name]Repository `yaml:"repositories" jsonschema_description:"Where snapshots are kept, by a name of your choice. Default: one named local, in the folder /backup."`
	Volumes      VolumeRules         `yaml:"volumes" jsonschema_description:"What is backed up."`

	local *time.Location // what an unset Timezone means
}

// Location returns the time zone in which times are read and shown. It is
// never nil.
func (c *Config) Location() *time.Location {
	switch {
	case c.Timezone.loc != nil:
		return c.Timezone.loc
	case c.local != nil:
		return c.local
	}
	return time.Local
}

// ErrNoRepository means that no repository has the name that was asked for,
// or that a name is needed to tell several apart.
var ErrNoRepository = errors.New("no such repository in the configuration")

// Repository returns the repository called name, or for the empty name the
// only one there is. The error wraps ErrNoRepository and says which there are.
func (c *Config) Repository(name string) (Name, Repository, error) {
	names := slices.Sorted(maps.Keys(c.Repositories))
	if name == "" {
		if len(names) == 1 {
			return names[0], c.Repositories[names[0]], nil
		}
		return "", Repository{}, fmt.Errorf("%w: choose one of %s", ErrNoRepository, quotedList(names))
	}
	if r, ok := c.Repositories[Name(name)]; ok {
		return Name(name), r, nil
	}
	return "", Repository{}, fmt.Errorf("%w: %q; there is %s", ErrNoRepository, name, quotedList(names))
}

// A Repository says where snapshots are kept and how they are unlocked.
// Exactly one of the three passwords is set.
type Repository struct {
	URL             Location `yaml:"url" jsonschema:"required" jsonschema_description:"Folder of the repository: an absolute path, or file: and an absolute path."`
	Password        Secret   `yaml:"password,omitempty" jsonschema_description:"The password itself. Prefer password_file or ${ENV}."`
	PasswordFile    Folder   `yaml:"password_file,omitempty" jsonschema_description:"File that holds the password. Only its owner should be able to read it."`
	PasswordCommand Command  `yaml:"password_command,omitempty" jsonschema_description:"Program that prints the password: a list of program and arguments, or one text for /bin/sh."`
}

// Secret returns the password in whichever of the three forms it is given.
func (r Repository) Secret() Secret {
	switch {
	case r.PasswordFile != "":
		return Secret{file: string(r.PasswordFile)}
	case len(r.PasswordCommand) > 0:
		return Secret{command: r.PasswordCommand}
	}
	return r.Password
}

// VolumeRules say which folders are volumes and what is left out of them.
type VolumeRules struct {
	Discover       DiscoverFolder          `yaml:"discover" jsonschema_description:"Every folder directly below this one is a volume. The empty text turns discovery off. Default: /service-config."`
	ExcludeVolumes []Glob                  `yaml:"exclude_volumes,omitempty" jsonschema_description:"Volumes found by discover that are not backed up; * and ? work."`
	Exclude        []Pattern               `yaml:"exclude,omitempty" jsonschema_description:"Files and folders to leave out of every volume, as in .gitignore: a name matches at any depth, a pattern with / starts at the volume's root, ** spans folders, ! takes back."`
	OneFileSystem  bool                    `yaml:"one_file_system" jsonschema_description:"Leave out what is mounted inside a volume. Default: true."`
	ExcludeCaches  bool                    `yaml:"exclude_caches" jsonschema_description:"Leave out the contents of folders marked by a CACHEDIR.TAG file. Default: true."`
	IfPresent      []FileName              `yaml:"exclude_if_present,omitempty" jsonschema_description:"Leave out the contents of folders that hold a file of one of these names."`
	LargerThan     Size                    `yaml:"exclude_larger_than,omitempty" jsonschema_description:"Leave out files larger than this, for example 500MiB. Default: 0, no limit."`
	Settings       map[Name]VolumeSettings `yaml:"settings,omitempty" jsonschema_description:"Settings of single volumes, by name."`
}

// VolumeSettings are what one volume does differently. What is not set is as
// in VolumeRules.
type VolumeSettings struct {
	Path          Folder     `yaml:"path,omitempty" jsonschema_description:"Folder of the volume, for one that discover does not find."`
	Exclude       []Pattern  `yaml:"exclude,omitempty" jsonschema_description:"Patterns for this volume, after those for every volume."`
	OneFileSystem *bool      `yaml:"one_file_system,omitempty" jsonschema_description:"Instead of one_file_system for every volume."`
	ExcludeCaches *bool      `yaml:"exclude_caches,omitempty" jsonschema_description:"Instead of exclude_caches for every volume."`
	IfPresent     []FileName `yaml:"exclude_if_present,omitempty" jsonschema_description:"Names for this volume, besides those for every volume."`
	LargerThan    *Size      `yaml:"exclude_larger_than,omitempty" jsonschema_description:"Instead of exclude_larger_than for every volume; 0 is no limit."`
}

// notYet lists keys of the format that this version cannot serve, so that
// they get a better answer than "unknown key".
func (Config) notYet() []string {
	return []string{"drives", "home", "plans", "verify", "limits", "notify", "web", "metrics"}
}

func (Repository) notYet() []string {
	return []string{"username", "domain", "encrypt"}
}

func (VolumeSettings) notYet() []string {
	return []string{"include_home", "stop", "sqlite", "before", "after", "timeout"}
}

// maxName is what Linux allows for a file name, in bytes.
const maxName = 255

// A Name is what a user calls a repository or volume: not empty, at most 255
// bytes of UTF-8 without "/" and control characters, no "." or "..".
type Name string

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *Name) UnmarshalText(text []byte) error {
	if err := checkName(string(text)); err != nil {
		return err
	}
	*n = Name(text)
	return nil
}

func checkName(s string) error {
	switch {
	case s == "":
		return errors.New("an empty name")
	case s == "." || s == "..":
		return fmt.Errorf("%q is no name", s)
	case len(s) > maxName:
		return fmt.Errorf("a name of %d bytes; at most %d are possible", len(s), maxName)
	case !utf8.ValidString(s):
		return fmt.Errorf("the name %q is not UTF-8", s)
	case strings.Contains(s, "/"):
		return fmt.Errorf("the name %q contains a slash", s)
	case strings.ContainsFunc(s, notPrintable):
		return fmt.Errorf("the name %q contains an invisible character", s)
	}
	return nil
}

// notPrintable finds control characters and the invisible ones that can make
// a name look like another, but allows spaces.
func notPrintable(r rune) bool { return !unicode.IsPrint(r) }

// A FileName is the name of a file, without folders. Bytes other than "/"
// and NUL are allowed, as on the disk.
type FileName string

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *FileName) UnmarshalText(text []byte) error {
	s := string(text)
	switch {
	case s == "" || s == "." || s == "..":
		return fmt.Errorf("%q is no file name", s)
	case len(s) > maxName:
		return fmt.Errorf("a file name of %d bytes; at most %d are possible", len(s), maxName)
	case strings.ContainsAny(s, "/\x00"):
		return fmt.Errorf("%q is a path; give the name of the file only", s)
	}
	*n = FileName(s)
	return nil
}

// A Folder is an absolute, clean path of a folder or file.
type Folder string

// UnmarshalText implements encoding.TextUnmarshaler. It cleans the path.
func (f *Folder) UnmarshalText(text []byte) error {
	s := string(text)
	switch {
	case s == "":
		return errors.New("an empty path")
	case strings.ContainsRune(s, 0):
		return errors.New("a path cannot contain the character NUL")
	case strings.HasPrefix(s, "~"):
		return fmt.Errorf("%q: ~ has no meaning for a service; write the whole path", s)
	case !filepath.IsAbs(s):
		return fmt.Errorf("%q is not an absolute path; it must start with /", s)
	}
	*f = Folder(filepath.Clean(s))
	return nil
}

// A DiscoverFolder is a Folder, or empty for none.
type DiscoverFolder string

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *DiscoverFolder) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*f = ""
		return nil
	}
	return (*Folder)(f).UnmarshalText(text)
}

// A Location is the address of a repository.
type Location struct{ path string }

// ParseLocation reads the address of a repository. This version knows
// absolute paths, with or without "file:" before them.
func ParseLocation(s string) (Location, error) {
	var l Location
	return l, l.UnmarshalText([]byte(s))
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Location) UnmarshalText(text []byte) error {
	s := string(text)
	scheme, rest, found := strings.Cut(s, ":")
	if !found || strings.Contains(scheme, "/") {
		scheme, rest = "", s
	}
	switch strings.ToLower(scheme) {
	case "":
	case "file":
		// file:///p is the URL form of file:/p; a host between the slashes
		// would be another machine.
		if after, ok := strings.CutPrefix(rest, "//"); ok {
			if !strings.HasPrefix(after, "/") {
				return fmt.Errorf("file:// names another machine; write file: and an absolute path")
			}
			rest = after
		}
	case "drive", "smb", "s3", "sftp", "rest":
		return fmt.Errorf("repositories at %s: are not supported by this version yet; use a folder", strings.ToLower(scheme))
	default:
		// The rest of the address may hold a password, so it is not shown.
		return fmt.Errorf("unknown kind of repository %q; use the absolute path of a folder", scheme)
	}
	var f Folder
	if err := f.UnmarshalText([]byte(rest)); err != nil {
		return err
	}
	if f == "/" {
		return errors.New("the root folder cannot be a repository")
	}
	l.path = string(f)
	return nil
}

// Path is the absolute path of the repository's folder.
func (l Location) Path() string { return l.path }

// String returns the address as a user would write it.
func (l Location) String() string { return l.path }

// MarshalText implements encoding.TextMarshaler.
func (l Location) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// A Zone is a time zone by its name in the tz database. The zero Zone is not
// set.
type Zone struct {
	name string
	loc  *time.Location
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (z *Zone) UnmarshalText(text []byte) error {
	name := string(text)
	// LoadLocation takes "" for UTC and "Local" for the system's zone; here
	// leaving the key out means that.
	if name == "" || name == "Local" {
		return fmt.Errorf("%q is no time zone; write a name such as America/Los_Angeles, or leave the key out for the system's", name)
	}
	loc, err := time.LoadLocation(name)
	if err != nil {
		return fmt.Errorf("unknown time zone %q; write a name such as America/Los_Angeles", name)
	}
	*z = Zone{name: name, loc: loc}
	return nil
}

// String returns the zone's name, "" if it is not set.
func (z Zone) String() string { return z.name }

// IsZero reports whether the zone is not set.
func (z Zone) IsZero() bool { return z.loc == nil }

// MarshalText implements encoding.TextMarshaler.
func (z Zone) MarshalText() ([]byte, error) { return []byte(z.name), nil }

// A Size is a number of bytes.
type Size int64

type sizeUnit struct {
	suffix string
	bytes  int64
}

// sizeUnits is ordered so that a suffix comes before those it ends with.
func sizeUnits() []sizeUnit {
	return []sizeUnit{
		{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
		{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3}, {"kB", 1e3},
		{"T", 1 << 40}, {"G", 1 << 30}, {"M", 1 << 20}, {"K", 1 << 10},
		{"B", 1}, {"", 1},
	}
}

// UnmarshalText implements encoding.TextUnmarshaler: a number of bytes with
// an optional unit. KiB or K is 1024, KB is 1000, and so on up to T.
func (z *Size) UnmarshalText(text []byte) error {
	s := strings.TrimSpace(string(text))
	for _, u := range sizeUnits() {
		num, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		num = strings.TrimSpace(num)
		if num == "" || strings.Trim(num, "0123456789.") != "" {
			break
		}
		f, err := strconv.ParseFloat(num, 64)
		if err != nil {
			break
		}
		if f *= float64(u.bytes); f >= 1<<62 {
			return fmt.Errorf("%q is larger than any file", s)
		}
		*z = Size(f)
		return nil
	}
	return fmt.Errorf("%q is no size; write a number and a unit, as 500MiB or 2GiB", s)
}

// String returns the size with the largest binary unit that divides it.
func (z Size) String() string {
	for _, u := range sizeUnits()[:4] {
		if z != 0 && int64(z)%u.bytes == 0 {
			return strconv.FormatInt(int64(z)/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(z), 10)
}

// MarshalText implements encoding.TextMarshaler.
func (z Size) MarshalText() ([]byte, error) { return []byte(z.String()), nil }

// quotedList joins names for a sentence: "a", "b" and "c".
func quotedList[S ~string](names []S) string {
	var b strings.Builder
	for i, n := range names {
		switch {
		case i == 0:
		case i == len(names)-1:
			b.WriteString(" and ")
		default:
			b.WriteString(", ")
		}
		b.WriteString(strconv.Quote(string(n)))
	}
	if b.Len() == 0 {
		return "none"
	}
	return b.String()
}
