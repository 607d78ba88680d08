package restorer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// tempPrefix begins the names of unfinished files; 16 hexadecimal digits
// follow: 8 random ones of the run, 8 of the entry.
const tempPrefix = ".ide49-restore-"

// isTemp reports whether name is one that a restore gives to unfinished files.
func isTemp(name string) bool {
	digits, ok := strings.CutPrefix(name, tempPrefix)
	if !ok || len(digits) != 16 {
		return false
	}
	return strings.Trim(digits, "0123456789abcdef") == ""
}

// A target is the folder that is restored to. Folders in it are reached from
// the os.Root's own descriptor without following any symbolic link, not even
// one that stays inside; what is in a folder is reached by its bare name and
// the folder's descriptor. See docs/decisions/0030.
type target struct {
	dir     *os.File
	fd      int
	dev     uint64
	byParts atomic.Bool // the kernel has no openat2
}

func openTarget(root *os.Root) (*target, error) {
	dir, err := root.Open(".")
	if err != nil {
		return nil, fmt.Errorf("open target: %w", err)
	}
	t := &target{dir: dir, fd: int(dir.Fd())}
	var st unix.Stat_t
	if err := unix.Fstat(t.fd, &st); err != nil {
		dir.Close()
		return nil, fmt.Errorf("open target %s: %w", root.Name(), err)
	}
	t.dev = st.Dev
	return t, nil
}

func (t *target) close() error { return t.dir.Close() }

// ignoringEINTR repeats a call that a signal interrupted.
func ignoringEINTR(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

func openat(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = ignoringEINTR(func() error {
		fd, err = unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// open opens the folder rel, "." for the target itself. flags is O_RDONLY to
// read or change it, O_PATH to reach what is in it.
func (t *target) open(rel string, flags int) (int, error) {
	flags |= unix.O_DIRECTORY
	if !t.byParts.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		}
		for {
			fd, err := unix.Openat2(t.fd, rel, &how)
			switch err {
			case unix.EINTR, unix.EAGAIN:
				continue
			case unix.ENOSYS, unix.EPERM: // EPERM: a container's filter that does not know the call
			default:
				return fd, err
			}
			break
		}
		t.byParts.Store(true)
	}
	return t.openByParts(rel, flags)
}

// openByParts does what open does on kernels before 5.6.
func (t *target) openByParts(rel string, flags int) (int, error) {
	fd, parts := t.fd, strings.Split(rel, "/")
	for i, part := range parts {
		f := unix.O_PATH | unix.O_DIRECTORY
		if i == len(parts)-1 {
			f = flags
		}
		next, err := openat(fd, part, f, 0)
		if fd != t.fd {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

// names returns the sorted names in the folder rel.
func (t *target) names(rel string) (fd int, names []string, err error) {
	if fd, err = t.open(rel, unix.O_RDONLY); err != nil {
		return -1, nil, err
	}
	// The copy of the descriptor is for the reading alone.
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	f := os.NewFile(uintptr(dup), rel)
	names, err = f.Readdirnames(-1)
	f.Close()
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	slices.Sort(names)
	return fd, names, nil
}

func lstat(dir int, name string, st *unix.Stat_t) error {
	return ignoringEINTR(func() error { return unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

func readlink(dir int, name string) (string, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(dir, name, buf)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// preadFull reads exactly len(buf) bytes from off.
func preadFull(fd int, buf []byte, off int64) error {
	for len(buf) > 0 {
		n, err := unix.Pread(fd, buf, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		buf, off = buf[n:], off+int64(n)
	}
	return nil
}

func pwriteFull(fd int, buf []byte, off int64) error {
	for len(buf) > 0 {
		n, err := unix.Pwrite(fd, buf, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		buf, off = buf[n:], off+int64(n)
	}
	return nil
}

// procPath names what fd is open on, for calls that take no descriptor.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// split returns the folder and the name of rel.
func split(rel string) (dir, name string) { return path.Dir(rel), path.Base(rel) }

// join is path.Join for a clean folder path and a bare name.
func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

// A storeError comes from the repository, not from the target.
type storeError struct{ error }

func (e storeError) Unwrap() error { return e.error }

// stopping returns the error that must end the whole restore because the
// target as such does not work, or nil if err concerns one entry.
func stopping(err error) error {
	var fromStore storeError
	var incomplete metadataError
	var errno unix.Errno
	if errors.As(err, &fromStore) || errors.As(err, &incomplete) || !errors.As(err, &errno) {
		return nil
	}
	switch errno {
	case unix.ENOSPC, unix.EDQUOT:
		return fmt.Errorf("%w (%w)", ErrFull, err)
	case unix.EIO, unix.EROFS, unix.ENODEV, unix.ENXIO, unix.ESTALE, unix.ENOTCONN, unix.ESHUTDOWN, unix.EHOSTDOWN:
		return fmt.Errorf("%w (%w)", ErrTarget, err)
	}
	return nil
}
