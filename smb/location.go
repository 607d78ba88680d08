package smb

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path"
	"strings"
)

// A Location is a folder on a share.
type Location struct {
	Server string // host, or host:port
	Share  string
	Path   string // slash-separated, "." for the share's root
	User   string // from the address, or empty
}

// ParseLocation reads smb://[user@]host[:port]/share/path and //host/share/path.
// A password in the address is refused, since addresses are shown and logged.
func ParseLocation(s string) (Location, error) {
	text := s
	if strings.HasPrefix(text, "//") {
		text = "smb:" + text
	}
	bad := func(why error) (Location, error) {
		if u, err := url.Parse(text); err == nil {
			s = u.Redacted()
		} else {
			s = "address" // it may hold a password
		}
		return Location{}, fmt.Errorf("share %q: %w", s, why)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return bad(errors.New("not an address; want smb://server/share/folder"))
	case u.Scheme != "smb" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "":
		return bad(errors.New("want smb://server/share/folder"))
	}
	if _, ok := u.User.Password(); ok {
		return bad(errors.New("a password does not belong into an address; use password_file"))
	}
	share, folder, _ := strings.Cut(strings.Trim(u.Path, "/"), "/")
	if _, ok := decodeName(share); !ok {
		return bad(errors.New("the name of the share is missing; want smb://server/share/folder"))
	}
	if folder = path.Clean(folder); !fs.ValidPath(folder) {
		return bad(errors.New("the folder leads out of the share"))
	}
	return Location{Server: u.Host, Share: share, Path: folder, User: u.User.Username()}, nil
}

// String returns the address without the user.
func (l Location) String() string { return target(l.Server, l.Share, l.Path) }
