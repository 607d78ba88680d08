package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// An attempt is one way to mount a file system.
type attempt struct {
	kind     string // as the kernel calls it, or ntfs-3g
	data     []string
	readOnly bool
	// only limits the attempt to failures of the one before that it can
	// mend; nil: any.
	only []error
}

// Failures that a read-only attempt can mend: read-only media, a switch, a
// file system that was left dirty.
var readOnlyErrors = []error{unix.EROFS, unix.EACCES, unix.EPERM}

// supported reports whether Drives mounts a file system, given as blkid names
// it.
func supported(fstype string) bool { return len(attempts(fstype, DriveOptions{}, false)) > 0 }

// attempts returns the ways to mount a file system, best first. With readOnly
// nothing is ever written, not even a journal.
func attempts(fstype string, o DriveOptions, readOnly bool) []attempt {
	owner := []string{"uid=" + strconv.Itoa(o.Owner), "gid=" + strconv.Itoa(o.Group)}
	with := func(more ...string) []string { return slices.Concat(owner, more) }
	rw := func(kind string, data ...string) attempt { return attempt{kind: kind, data: data} }
	ro := func(kind string, data ...string) attempt {
		return attempt{kind: kind, data: data, readOnly: true, only: readOnlyErrors}
	}
	var all []attempt
	switch fstype {
	case "vfat":
		data := with("utf8=1", "shortname=mixed")
		all = []attempt{rw("vfat", append(data, "flush")...), ro("vfat", data...)}
	case "exfat":
		data := with("iocharset=utf8", "errors=remount-ro")
		all = []attempt{rw("exfat", data...), ro("exfat", data...)}
	case "ntfs":
		fuse := with("windows_names")
		all = []attempt{rw("ntfs3", owner...), rw("ntfs-3g", fuse...), ro("ntfs3", owner...), ro("ntfs-3g", fuse...)}
		all[2].only, all[3].only = nil, nil
	case "ext2", "ext3", "ext4":
		all = []attempt{rw(fstype, "errors=remount-ro"), ro(fstype, "errors=remount-ro"), ro(fstype, "noload")}
	case "xfs":
		all = []attempt{rw("xfs"), ro("xfs"), ro("xfs", "norecovery")}
	case "btrfs":
		all = []attempt{rw("btrfs"), ro("btrfs"), ro("btrfs", "rescue=nologreplay")}
	case "f2fs":
		all = []attempt{rw("f2fs"), ro("f2fs"), ro("f2fs", "norecovery")}
	case "iso9660":
		all = []attempt{ro("iso9660", with("iocharset=utf8")...), ro("iso9660", owner...)}
		all[1].only = []error{unix.EINVAL}
	case "udf":
		all = []attempt{rw("udf", with("iocharset=utf8")...), ro("udf", with("iocharset=utf8")...), ro("udf", owner...)}
		all[2].only = []error{unix.EINVAL, unix.EROFS, unix.EACCES}
	case "hfsplus":
		all = []attempt{rw("hfsplus", owner...), ro("hfsplus", owner...)}
	}
	if readOnly {
		all = slices.DeleteFunc(all, func(a attempt) bool { return !a.readOnly })
	}
	return all
}

// A mountError is what the kernel answered to a mount, in its own words where
// it gave some.
type mountError struct {
	kind string // file system
	op   string // step that failed
	said string
	err  error
}

func (e *mountError) Error() string {
	if e.said != "" {
		return fmt.Sprintf("%s: %s (%v)", e.kind, e.said, e.err)
	}
	return fmt.Sprintf("%s: %v", e.kind, e.err)
}

func (e *mountError) Unwrap() error { return e.err }

// tries reports whether a is worth trying after err.
func (a attempt) tries(err error) bool {
	if err == nil || a.only == nil {
		return true
	}
	return slices.ContainsFunc(a.only, func(target error) bool { return errors.Is(err, target) })
}

// mountDevice mounts the device node at the folder dir by the first attempt
// that works and returns that attempt, with why the ones before it failed.
// Nothing is mounted after an error.
func mountDevice(ctx context.Context, node string, dir *mountDir, ways []attempt, exec bool) (done attempt, before, err error) {
	var errs []error
	for _, a := range ways {
		if len(errs) > 0 && !a.tries(errs[len(errs)-1]) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return a, nil, err
		}
		var err error
		if a.kind == "ntfs-3g" {
			err = mountNTFS3G(ctx, node, dir, a, exec)
		} else {
			err = mountKernel(node, dir, a, exec)
		}
		if err == nil {
			return a, joined(errs), nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return attempt{}, nil, errors.New("there is no way to mount it read-only")
	}
	return attempt{}, nil, joined(errs)
}

// joined makes one error of several, each text once.
func joined(errs []error) error {
	seen := map[string]bool{}
	errs = slices.DeleteFunc(errs, func(err error) bool {
		dup := seen[err.Error()]
		seen[err.Error()] = true
		return dup
	})
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return &attemptErrors{errs}
}

// attemptErrors are the failures of several attempts, in one line.
type attemptErrors struct{ errs []error }

func (e *attemptErrors) Unwrap() []error { return e.errs }

func (e *attemptErrors) Error() string {
	texts := make([]string, len(e.errs))
	for i, err := range e.errs {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; then ")
}

// mountKernel mounts by the mount interface of Linux 5.2, which tells why it
// failed and leaves no moment in which a half-made mount is visible, or by
// mount(2) on older kernels.
func mountKernel(node string, dir *mountDir, a attempt, exec bool) error {
	fail := func(op string, fsfd int, err error) error {
		return &mountError{kind: a.kind, op: op, said: kernelSaid(fsfd), err: err}
	}
	fs, err := unix.Fsopen(a.kind, unix.FSOPEN_CLOEXEC)
	if err == unix.ENOSYS || err == unix.EPERM && !hasNewMount() {
		return mountOld(node, dir, a, exec)
	}
	if err == unix.ENODEV {
		return &mountError{kind: a.kind, op: "fsopen", said: "this kernel has no support for it", err: err}
	}
	if err != nil {
		return fail("fsopen", -1, err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", node); err != nil {
		return fail("source", fs, err)
	}
	if a.readOnly {
		if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
			return fail("ro", fs, err)
		}
	}
	for _, o := range a.data {
		if key, value, ok := strings.Cut(o, "="); ok {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return fail(o, fs, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fail("create", fs, err)
	}
	attrs := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOATIME
	if !exec {
		attrs |= unix.MOUNT_ATTR_NOEXEC
	}
	if a.readOnly {
		attrs |= unix.MOUNT_ATTR_RDONLY
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return fail("fsmount", fs, err)
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", dir.fd(), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fail("move_mount", -1, err)
	}
	return nil
}

// hasNewMount reports whether fsopen exists: a container's filter may answer
// EPERM for a call that it does not know.
func hasNewMount() bool {
	_, err := unix.Fsopen("", unix.FSOPEN_CLOEXEC)
	return err != unix.ENOSYS && err != unix.EPERM
}

// kernelSaid returns the messages that the kernel left in a file-system
// context, the errors if there are any, else all.
func kernelSaid(fsfd int) string {
	if fsfd < 0 {
		return ""
	}
	var errs, all []string
	buf := make([]byte, 4096)
	for range 32 {
		n, err := unix.Read(fsfd, buf)
		if err != nil || n <= 0 {
			break
		}
		kind, text, ok := strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
		if !ok || text == "" {
			continue
		}
		text = printable(text)
		all = append(all, text)
		if kind == "e" {
			errs = append(errs, text)
		}
	}
	if len(errs) > 0 {
		all = errs
	}
	return strings.Join(all, "; ")
}

// mountOld mounts by mount(2).
func mountOld(node string, dir *mountDir, a attempt, exec bool) error {
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOATIME)
	if !exec {
		flags |= unix.MS_NOEXEC
	}
	if a.readOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount(node, dir.procPath(), a.kind, flags, strings.Join(a.data, ",")); err != nil {
		e := &mountError{kind: a.kind, op: "mount", err: err}
		if err == unix.ENODEV {
			e.said = "this kernel has no support for it"
		}
		return e
	}
	return nil
}

// mountNTFS3G mounts by the FUSE driver. Its process daemonises and lives
// until the file system is unmounted.
func mountNTFS3G(ctx context.Context, node string, dir *mountDir, a attempt, exec bool) error {
	options := append([]string{"nosuid", "nodev", "noatime"}, a.data...)
	if !exec {
		options = append(options, "noexec")
	}
	if a.readOnly {
		options = append(options, "ro")
	}
	if _, err := runTool(ctx, "ntfs-3g", "-o", strings.Join(options, ","), node, dir.path); err != nil {
		return &mountError{kind: a.kind, op: "mount", err: err}
	}
	return nil
}

// A mountDir is a folder that something is going to be mounted on, held open
// so that nobody can put another in its place meanwhile.
type mountDir struct {
	path string
	file *os.File // O_PATH
	ino  uint64
	made bool // by us, so ours to remove
}

func (d *mountDir) fd() int          { return int(d.file.Fd()) }
func (d *mountDir) procPath() string { return "/proc/self/fd/" + strconv.Itoa(d.fd()) }
func (d *mountDir) Close() error     { return d.file.Close() }

// errOccupied says that a mount folder can't be used.
var errOccupied = errors.New("it exists and is not an empty folder")

// claimDir makes a folder exclusively, or takes an empty one that exists. The
// parents are made as needed.
func claimDir(path string) (*mountDir, error) {
	parent, err := openParent(path, true)
	if err != nil {
		return nil, fmt.Errorf("making the mount folder %s: %w", path, err)
	}
	defer parent.Close()
	name := filepath.Base(path)
	made := true
	// Nobody but root sees a mount folder when nothing is mounted, so that
	// no container takes it for an empty drive.
	err = unix.Mkdirat(int(parent.Fd()), name, 0o700)
	if err == unix.EEXIST {
		made = false
	} else if err != nil {
		return nil, fmt.Errorf("making the mount folder %s: %w", path, err)
	}
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if err == unix.ENOTDIR || err == unix.ELOOP {
			err = errOccupied
		}
		return nil, fmt.Errorf("opening the mount folder %s: %w", path, err)
	}
	d := &mountDir{path: path, file: os.NewFile(uintptr(fd), path), made: made}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the mount folder %s: %w", path, err), d.Close())
	}
	d.ino = st.Ino
	if !made {
		if err := usableDir(parent, d.file); err != nil {
			return nil, errors.Join(fmt.Errorf("taking the mount folder %s: %w", path, err), d.Close())
		}
	}
	return d, nil
}

// openParent opens the folder above path for use with the at-calls.
func openParent(path string, mk bool) (*os.File, error) {
	dir := filepath.Dir(path)
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if mk && errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	}
	return f, err
}

// usableDir answers errOccupied unless dir is empty and nothing is mounted on
// it.
func usableDir(parent, dir *os.File) error {
	a, err := mountID(int(parent.Fd()), "")
	if err != nil {
		return err
	}
	b, err := mountID(int(dir.Fd()), "")
	if err != nil {
		return err
	}
	if a != b {
		return fmt.Errorf("something else is mounted there: %w", errOccupied)
	}
	list, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(dir.Fd())))
	if err != nil {
		return err
	}
	defer list.Close()
	if names, _ := list.Readdirnames(1); len(names) > 0 {
		return errOccupied
	}
	return nil
}

// occupied reports whether path can't be a mount folder. It follows no link at
// its end.
func occupied(path string) bool {
	parent, err := openParent(path, false)
	if err != nil {
		return false // it is made, or the reason shows then
	}
	defer parent.Close()
	fd, err := unix.Openat(int(parent.Fd()), filepath.Base(path), unix.O_PATH|unix.O_NOFOLLOW|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return false
	}
	if err != nil {
		return true
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	return usableDir(parent, dir) != nil
}

// mountID returns the kernel's number of the mount that holds path, or fd
// itself when path is empty. It does not wait for a server or a FUSE process.
func mountID(fd int, path string) (uint64, error) {
	flags := unix.AT_STATX_DONT_SYNC
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, path, flags, unix.STATX_MNT_ID, &st); err != nil {
		return 0, err
	}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		return st.Mnt_id, nil
	}
	// Before Linux 5.8 fdinfo tells it.
	return mountIDFromFdinfo(fd, path)
}

func mountIDFromFdinfo(fd int, path string) (uint64, error) {
	if path != "" {
		f, err := os.OpenFile(path, unix.O_PATH, 0)
		if err != nil {
			return 0, err
		}
		defer f.Close()
		fd = int(f.Fd())
	}
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, errors.New("the kernel does not tell mount numbers")
}
