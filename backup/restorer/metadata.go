package restorer

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
	capability = "security.capability"
)

// ours reports whether an extended attribute that the snapshot does not have
// is removed. Others, such as labels of SELinux, belong to the system.
func ours(name string) bool {
	switch {
	case name == aclAccess, name == aclDefault, name == capability:
		return true
	case strings.HasPrefix(name, "trusted.overlay."):
		return false
	}
	return strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.")
}

// grow calls fn with larger and larger buffers until it does not ask for more.
func grow(fn func(buf []byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := fn(buf)
		if err == unix.ERANGE && size < 1<<20 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

// attrNames returns the names of the extended attributes of what path names,
// following a link at its end or not.
func attrNames(path string, follow bool) ([]string, error) {
	list := unix.Llistxattr
	if follow {
		list = unix.Listxattr
	}
	if n, err := list(path, nil); err != nil || n == 0 {
		return nil, err
	}
	b, err := grow(func(buf []byte) (int, error) { return list(path, buf) })
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"), nil
}

func attr(path, name string, follow bool) ([]byte, error) {
	get := unix.Lgetxattr
	if follow {
		get = unix.Getxattr
	}
	return grow(func(buf []byte) (int, error) { return get(path, name, buf) })
}

// sameAttrs reports whether what stands at path has the attributes of a node.
func sameAttrs(path string, want []backup.Xattr, follow bool) bool {
	names, err := attrNames(path, follow)
	if err != nil {
		return errors.Is(err, unix.ENOTSUP)
	}
	found := 0
	for _, name := range names {
		i := slices.IndexFunc(want, func(x backup.Xattr) bool { return x.Name == name })
		if i < 0 {
			if ours(name) {
				return false
			}
			continue
		}
		value, err := attr(path, name, follow)
		if err != nil || !bytes.Equal(value, want[i].Value) {
			return false
		}
		found++
	}
	return found == len(want)
}

// sameMetadata compares what stat and the attributes say of name in the folder
// dir, or of the folder itself if name is ".", with a node. Who is not root
// can't set owners, so they don't count then.
func sameMetadata(st *unix.Stat_t, n *backup.Node, dir int, name string, root bool) bool {
	if !sameTime(st.Mtim, n.ModTime) {
		return false
	}
	if root && (st.Uid != n.UID || st.Gid != n.GID) {
		return false
	}
	if n.Type != backup.Symlink && st.Mode&0o7777 != unixMode(n.Mode) {
		return false
	}
	return sameAttrs(procPath(dir)+"/"+name, n.Xattrs, name == ".")
}

func sameTime(ts unix.Timespec, t time.Time) bool {
	return int64(ts.Sec) == t.Unix() && int64(ts.Nsec) == int64(t.Nanosecond())
}

// A handle is an open descriptor of one entry whose metadata is set.
type handle struct {
	fd     int
	isPath bool // it was opened with O_PATH
	link   bool // of a symbolic link
}

func (h handle) chown(uid, gid uint32) error {
	if h.isPath {
		return unix.Fchownat(h.fd, "", int(uid), int(gid), unix.AT_EMPTY_PATH)
	}
	return unix.Fchown(h.fd, int(uid), int(gid))
}

func (h handle) chmod(mode uint32) error {
	if h.isPath {
		return unix.Chmod(procPath(h.fd), mode)
	}
	return unix.Fchmod(h.fd, mode)
}

func (h handle) setTimes(atime, mtime time.Time) error {
	var ts [2]unix.Timespec
	for i, t := range [...]time.Time{atime, mtime} {
		var err error
		if ts[i], err = unix.TimeToTimespec(t); err != nil {
			return err
		}
	}
	err := unix.UtimesNanoAt(h.fd, "", ts[:], unix.AT_EMPTY_PATH)
	if err == unix.EINVAL || err == unix.ENOENT { // before Linux 5.8
		err = unix.UtimesNanoAt(unix.AT_FDCWD, procPath(h.fd), ts[:], 0)
	}
	return err
}

// setMetadata gives an entry the owner, attributes, mode and times of its
// record, in the order in which none undoes another. st is its state now;
// inherited says that it may have attributes from its folder. What can't be
// kept for want of rights or support becomes a warning.
func (x *execution) setMetadata(h handle, rec *record, st *unix.Stat_t, inherited bool, path func() string) error {
	mode := unixMode(rec.Mode)
	var errs error
	if st.Uid != rec.UID || st.Gid != rec.GID {
		if err := h.chown(rec.UID, rec.GID); err != nil {
			if stop := stopping(err); stop != nil {
				return stop
			}
			// A program must not run with the rights of whoever restores it.
			mode &^= unix.S_ISUID | unix.S_ISGID
			x.warn("owner", path, fmt.Errorf("owner %d:%d could not be set: %w", rec.UID, rec.GID, err))
		} else {
			st.Mode &^= unix.S_ISUID | unix.S_ISGID // the kernel clears them
		}
	}
	if len(rec.Xattrs) > 0 || inherited {
		if err := x.setAttrs(procPath(h.fd), rec.Xattrs, inherited, path); err != nil {
			errs = errors.Join(errs, err)
		}
		st.Mode |= 1 << 16 // an ACL may have changed it
	}
	if !h.link && st.Mode&^uint32(unix.S_IFMT) != mode {
		if err := h.chmod(mode); err != nil {
			if stop := stopping(err); stop != nil {
				return stop
			}
			if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) {
				x.warn("mode", path, fmt.Errorf("mode %#o could not be set: %w", mode, err))
			} else {
				errs = errors.Join(errs, fmt.Errorf("set mode: %w", err))
			}
		}
	}
	if err := h.setTimes(rec.AccessTime, rec.ModTime); err != nil {
		if stop := stopping(err); stop != nil {
			return stop
		}
		x.warn("times", path, fmt.Errorf("times could not be set: %w", err))
	}
	if errs != nil {
		return metadataError{errs}
	}
	return nil
}

// setAttrs makes the extended attributes of what path names those of want.
func (x *execution) setAttrs(path string, want []backup.Xattr, remove bool, rel func() string) error {
	var errs error
	failed := func(name string, err error) {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EACCES) {
			class, _, _ := strings.Cut(name, ".")
			x.warn("attribute "+class, rel, fmt.Errorf("attribute %q could not be set: %w", name, err))
			return
		}
		// ENOSPC here is about the room in an inode, not on the drive.
		errs = errors.Join(errs, fmt.Errorf("set attribute %q: %w", name, err))
	}
	if remove {
		names, err := attrNames(path, true)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			failed("list", err)
		}
		for _, name := range names {
			if ours(name) && !slices.ContainsFunc(want, func(x backup.Xattr) bool { return x.Name == name }) {
				if err := unix.Removexattr(path, name); err != nil && err != unix.ENODATA {
					failed(name, err)
				}
			}
		}
	}
	for _, a := range want {
		if strings.IndexByte(a.Name, 0) >= 0 || a.Name == "" {
			errs = errors.Join(errs, fmt.Errorf("attribute %q: %w", a.Name, ErrDamaged))
			continue
		}
		if err := unix.Setxattr(path, a.Name, a.Value, 0); err != nil {
			failed(a.Name, err)
		}
	}
	return errs
}

// A metadataError says that contents are in place but not all that goes with
// them.
type metadataError struct{ error }

func (e metadataError) Unwrap() error { return e.error }
