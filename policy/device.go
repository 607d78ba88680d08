package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxDevice is what Linux allows for a host name, in bytes.
const maxDevice = 64

// deviceFile holds the remembered name in the state folder.
const deviceFile = "device"

// A DeviceName is the host name in snapshots: letters, digits, "-", "_" and
// ".", at most 64, starting with a letter or digit.
type DeviceName string

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *DeviceName) UnmarshalText(text []byte) error {
	s := string(text)
	alnum := func(c byte) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
	}
	ok := len(s) > 0 && len(s) <= maxDevice && alnum(s[0])
	for i := range len(s) {
		ok = ok && (alnum(s[i]) || s[i] == '-' || s[i] == '_' || s[i] == '.')
	}
	if !ok {
		return fmt.Errorf("%s is no device name; use up to %d letters, digits, -, _ and ., a letter or digit first", quoteShort(s), maxDevice)
	}
	*d = DeviceName(s)
	return nil
}

// DeviceName returns the host name for snapshots: the configured one, else
// the one remembered in the folder stateDir, else the machine's, which is
// remembered then. Snapshots of one device so keep one name although a
// container's host name changes with each container.
//
// stateDir must exist. The file in it is durable or absent: a crash never
// leaves half a name.
func (c *Config) DeviceName(stateDir string) (DeviceName, []Problem, error) {
	return c.deviceName(stateDir, os.Hostname)
}

func (c *Config) deviceName(stateDir string, hostname func() (string, error)) (DeviceName, []Problem, error) {
	if c.Device != "" {
		return c.Device, nil, nil
	}
	path := filepath.Join(stateDir, deviceFile)
	name, err := readDevice(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return name, nil, err
	}
	host, err := hostname()
	if err != nil {
		return "", nil, fmt.Errorf("device name: %w; set device in the configuration", err)
	}
	if err := name.UnmarshalText([]byte(host)); err != nil {
		return "", nil, fmt.Errorf("device name from the machine: %w; set device in the configuration", err)
	}
	if err := writeDurably(path, []byte(host+"\n")); err != nil {
		return "", nil, fmt.Errorf("remember the device name: %w", err)
	}
	var problems []Problem
	if looksLikeContainer(host) {
		problems = append(problems, Problem{Severity: SeverityWarning, File: c.File, Key: "device", Message: fmt.Sprintf(
			"snapshots are made under the name %s, which seems to be that of a container; set device in the configuration, or correct %s", host, path)})
	}
	return name, problems, nil
}

func readDevice(path string) (name DeviceName, err error) {
	f, err := openRegular(path)
	if err != nil {
		return "", fmt.Errorf("device name: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 4*maxDevice))
	if err != nil {
		return "", fmt.Errorf("device name: %w", err)
	}
	if err := name.UnmarshalText([]byte(strings.TrimRight(string(text), " \t\r\n"))); err != nil {
		return "", fmt.Errorf("device name in %s: %w; correct the file, or set device in the configuration", path, err)
	}
	return name, nil
}

// looksLikeContainer reports whether Docker made up this host name: the
// first 12 digits of the container's id.
func looksLikeContainer(host string) bool {
	return len(host) == 12 && strings.Trim(host, "0123456789abcdef") == ""
}

// writeDurably puts data into a file that is there in full or not at all,
// also after a power cut.
func writeDurably(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	tmp := f.Name()
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
