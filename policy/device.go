package policy

import "fmt"

// maxDevice is what Linux allows for a host name, in bytes.
const maxDevice = 64

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
		return fmt.Errorf("%q is no device name; use up to %d letters, digits, -, _ and ., a letter or digit first", s, maxDevice)
	}
	*d = DeviceName(s)
	return nil
}
