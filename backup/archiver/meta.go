package archiver

import (
	"errors"
	"io/fs"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// stat follows links.
func stat(path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Stat(path, &st) })
	return st, err
}

// lstatAt looks at one entry of an open folder.
func lstatAt(dir int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	return st, err
}

// retry repeats a system call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// openAt opens an entry of an open folder for reading, never through a link,
// never waiting for a FIFO, and without touching its access time where that is
// allowed.
func openAt(dir int, name string, flags int) (fd int, err error) {
	flags |= unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_LARGEFILE
	err = retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_NOATIME, 0)
		if errors.Is(err, unix.EPERM) {
			fd, err = unix.Openat(dir, name, flags, 0)
		}
		return err
	})
	return fd, err
}

// mode turns a st_mode into what a Node records.
func mode(m uint32) fs.FileMode {
	out := fs.FileMode(m & 0o777)
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		out |= fs.ModeDir
	case unix.S_IFLNK:
		out |= fs.ModeSymlink
	case unix.S_IFBLK:
		out |= fs.ModeDevice
	case unix.S_IFCHR:
		out |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFIFO:
		out |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		out |= fs.ModeSocket
	}
	if m&unix.S_ISUID != 0 {
		out |= fs.ModeSetuid
	}
	if m&unix.S_ISGID != 0 {
		out |= fs.ModeSetgid
	}
	if m&unix.S_ISVTX != 0 {
		out |= fs.ModeSticky
	}
	return out
}

func nodeType(m uint32) backup.NodeType {
	switch m & unix.S_IFMT {
	case unix.S_IFREG:
		return backup.File
	case unix.S_IFDIR:
		return backup.Dir
	case unix.S_IFLNK:
		return backup.Symlink
	case unix.S_IFBLK:
		return backup.Device
	case unix.S_IFCHR:
		return backup.CharDevice
	case unix.S_IFIFO:
		return backup.FIFO
	case unix.S_IFSOCK:
		return backup.Socket
	}
	return ""
}

// fill sets what n takes from st. The access time equals the modification
// time: the true one would make every tree change with every reader.
func (ns *names) fill(n *backup.Node, st *unix.Stat_t) {
	n.Type = nodeType(st.Mode)
	n.Mode = mode(st.Mode)
	n.ModTime = time.Unix(st.Mtim.Unix())
	n.AccessTime = n.ModTime
	n.ChangeTime = time.Unix(st.Ctim.Unix())
	n.UID, n.GID = st.Uid, st.Gid
	n.User, n.Group = ns.user(st.Uid), ns.group(st.Gid)
	n.Inode = uint64(st.Ino)
	switch n.Type {
	case backup.File:
		n.Size = uint64(st.Size)
		n.Links = uint64(st.Nlink)
		n.Content = []backup.ID{}
		if n.Links > 1 {
			n.DeviceID = uint64(st.Dev)
		}
	case backup.Symlink:
		n.Links = uint64(st.Nlink)
	case backup.Device, backup.CharDevice:
		n.Links = uint64(st.Nlink)
		n.Device = uint64(st.Rdev)
	}
}

// readlinkAt returns the target of a link.
func readlinkAt(dir int, name string) (string, error) {
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		var n int
		err := retry(func() (err error) {
			n, err = unix.Readlinkat(dir, name, buf)
			return err
		})
		if err != nil || n < size {
			return string(buf[:max(n, 0)]), err
		}
	}
}

// xattrs returns the extended attributes of an entry of an open folder, in the
// kernel's order. File systems without them give none.
func (a *archive) xattrs(dir int, name string) ([]backup.Xattr, error) {
	// There is no llistxattrat before Linux 6.13; the link in /proc leads to
	// the open folder itself, wherever that has been moved.
	path := "/proc/self/fd/" + strconv.Itoa(dir) + "/" + name
	return a.attributes(
		func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) },
		func(key string, buf []byte) (int, error) { return unix.Lgetxattr(path, key, buf) })
}

// fileXattrs returns the extended attributes of an open file.
func (a *archive) fileXattrs(fd int) ([]backup.Xattr, error) {
	return a.attributes(
		func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) },
		func(key string, buf []byte) (int, error) { return unix.Fgetxattr(fd, key, buf) })
}

func (a *archive) attributes(list func([]byte) (int, error), get func(string, []byte) (int, error)) ([]backup.Xattr, error) {
	buf := a.listing.Get().(*[listSize]byte)
	defer a.listing.Put(buf)
	keys, err := grow(buf[:], list)
	if errors.Is(err, unix.ENOTSUP) || len(keys) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []backup.Xattr
	for key := range strings.SplitSeq(strings.TrimSuffix(string(keys), "\x00"), "\x00") {
		value, err := grow(make([]byte, 256), func(buf []byte) (int, error) { return get(key, buf) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, backup.Xattr{Name: key, Value: value})
	}
	return out, nil
}

// grow calls get with larger and larger buffers until the answer fits.
func grow(buf []byte, get func([]byte) (int, error)) ([]byte, error) {
	for {
		var n int
		err := retry(func() (err error) {
			n, err = get(buf)
			return err
		})
		if errors.Is(err, unix.ERANGE) && len(buf) < 1<<20 {
			buf = make([]byte, 4*len(buf))
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n:n], nil
	}
}

// coarse reports whether an open file's file system keeps neither inode numbers
// nor change times that mean something: FAT, exFAT, SMB and FUSE.
func coarse(fd int) bool {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(fd, &st) }); err != nil {
		return true // the careful answer
	}
	const exfatMagic, smb2Magic = 0x2011BAB0, 0xFE534D42
	switch uint32(st.Type) {
	case unix.MSDOS_SUPER_MAGIC, exfatMagic, unix.SMB_SUPER_MAGIC, 0xFF534D42, smb2Magic, unix.FUSE_SUPER_MAGIC:
		return true
	}
	return false
}

// names finds the names of users and groups, each once.
type names struct {
	mu     sync.RWMutex
	users  map[uint32]string
	groups map[uint32]string
}

func newNames() *names { return &names{users: map[uint32]string{}, groups: map[uint32]string{}} }

func (ns *names) user(uid uint32) string {
	return ns.find(ns.users, uid, func(id string) string {
		if u, err := user.LookupId(id); err == nil {
			return u.Username
		}
		return ""
	})
}

func (ns *names) group(gid uint32) string {
	return ns.find(ns.groups, gid, func(id string) string {
		if g, err := user.LookupGroupId(id); err == nil {
			return g.Name
		}
		return ""
	})
}

func (ns *names) find(known map[uint32]string, id uint32, lookup func(string) string) string {
	ns.mu.RLock()
	name, ok := known[id]
	ns.mu.RUnlock()
	if ok {
		return name
	}
	name = lookup(strconv.FormatUint(uint64(id), 10))
	ns.mu.Lock()
	known[id] = name
	ns.mu.Unlock()
	return name
}
