package mounts

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/iot49/ide49-backup/udev"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A Holder is something that keeps a drive from being unmounted.
type Holder struct {
	PID       int    // 0 for the kernel's own users
	Command   string // name of the process
	Container string // first twelve digits of its container; empty outside of one
	What      string // "open file", "working folder", "loop device loop3", …
	Path      string // file or folder, as the process sees it; may be empty
}

func (h Holder) String() string {
	var b strings.Builder
	if h.PID != 0 {
		fmt.Fprintf(&b, "%s (process %d", h.Command, h.PID)
		if h.Container != "" {
			fmt.Fprintf(&b, " in container %s", h.Container)
		}
		b.WriteString("): ")
	}
	b.WriteString(h.What)
	if h.Path != "" {
		b.WriteString(" " + h.Path)
	}
	return b.String()
}

// An InUseError says that a drive can't be unmounted, and who uses it.
type InUseError struct {
	Path    string
	Holders []Holder // empty when they can't be seen from here
}

func (e *InUseError) Error() string {
	if len(e.Holders) == 0 {
		return fmt.Sprintf("%s is in use by a process that can't be seen from here; run the container with pid: host to see it", e.Path)
	}
	texts := make([]string, 0, 4)
	for i, h := range e.Holders {
		if i == 3 {
			texts = append(texts, fmt.Sprintf("and %d more", len(e.Holders)-i))
			break
		}
		texts = append(texts, h.String())
	}
	return fmt.Sprintf("%s is in use by %s; stop that first", e.Path, strings.Join(texts, ", "))
}

// Unwrap makes errors.Is(err, unix.EBUSY) hold.
func (e *InUseError) Unwrap() error { return unix.EBUSY }

// A view is the mount table of one mount namespace, and one process in it.
type view struct {
	pid   string
	table []*mountinfo.Info
}

// namespaces returns the mount tables of all namespaces that can be seen, our
// own first.
func namespaces(proc string) ([]view, error) {
	own, err := mountsOf(proc, "self")
	if err != nil {
		return nil, err
	}
	views := []view{{"self", own}}
	self, err := os.Readlink(filepath.Join(proc, "self/ns/mnt"))
	if err != nil {
		return nil, fmt.Errorf("reading the own mount namespace: %w", err)
	}
	seen := map[string]bool{self: true}
	for _, pid := range processes(proc) {
		ns, err := os.Readlink(filepath.Join(proc, pid, "ns/mnt"))
		if err != nil || seen[ns] {
			continue // it ended, or is none of our business
		}
		if table, err := mountsOf(proc, pid); err == nil {
			seen[ns] = true
			views = append(views, view{pid, table})
		}
	}
	return views, nil
}

// processes returns the numbers of all processes that can be seen.
func processes(proc string) []string {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	var pids []string
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, e.Name())
		}
	}
	return pids
}

// peerGroups returns the numbers of the peer groups that a mount belongs to or
// receives from.
func peerGroups(m *mountinfo.Info) []string {
	var groups []string
	for tag := range strings.FieldsSeq(m.Optional) {
		if n, ok := strings.CutPrefix(tag, "shared:"); ok {
			groups = append(groups, n)
		}
		if n, ok := strings.CutPrefix(tag, "master:"); ok {
			groups = append(groups, n)
		}
	}
	return groups
}

// mountsFrom returns the mounts that hold for is, in all namespaces, except
// the one with the number id and its copies: they come and go with it.
func mountsFrom(proc string, views []view, id uint64, is func(*mountinfo.Info) bool) []Holder {
	var ours []string
	for _, m := range views[0].table {
		if uint64(m.ID) == id {
			ours = peerGroups(m)
		}
	}
	var found []Holder
	for _, v := range views {
		for _, m := range v.table {
			if !is(m) || v.pid == "self" && uint64(m.ID) == id {
				continue
			}
			if v.pid != "self" && slices.ContainsFunc(peerGroups(m), func(g string) bool { return slices.Contains(ours, g) }) {
				continue
			}
			h := Holder{What: "mounted at", Path: printable(m.Mountpoint)}
			if v.pid != "self" {
				h.describe(proc, v.pid)
			}
			found = append(found, h)
		}
	}
	return found
}

// hasSDev matches the mounts of a file system by its number.
func hasSDev(sdev string) func(*mountinfo.Info) bool {
	return func(m *mountinfo.Info) bool { return fmt.Sprintf("%d:%d", m.Major, m.Minor) == sdev }
}

// isFrom matches the mounts of a device.
func isFrom(d udev.Device) func(*mountinfo.Info) bool {
	x := indexDevices([]udev.Device{d})
	return func(m *mountinfo.Info) bool {
		_, ok := x.source(m)
		return ok
	}
}

// describe fills in who a process is.
func (h *Holder) describe(proc, pid string) {
	h.PID, _ = strconv.Atoi(pid)
	if b, err := os.ReadFile(filepath.Join(proc, pid, "comm")); err == nil {
		h.Command = printable(strings.TrimSpace(string(b)))
	}
	if f, err := os.Open(filepath.Join(proc, pid, "cgroup")); err == nil {
		h.Container = containerOf(f)
		_ = f.Close()
	}
}

// containerID is how Docker, balena, Podman and containerd name a container in
// its control group.
var containerID = regexp.MustCompile(`(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:$|/)`)

// containerOf reads a process's control groups and returns the first twelve
// digits of its container, or nothing.
func containerOf(r io.Reader) string {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if m := containerID.FindStringSubmatch(lines.Text()); m != nil {
			return m[1][:12]
		}
	}
	return ""
}

// holders finds who uses a file system: processes with open files, working or
// root folders or mapped files on it, in whatever namespace, and the kernel's
// own users. It asks no file system, so it does not hang on a dead one.
func holders(proc, sysfs string, p *Plugging, sdev string) []Holder {
	views, err := namespaces(proc)
	if err != nil {
		return nil
	}
	ids := map[uint64]bool{}
	var found []Holder
	for _, v := range views {
		for _, m := range v.table {
			if fmt.Sprintf("%d:%d", m.Major, m.Minor) == sdev {
				ids[uint64(m.ID)] = true
			}
		}
	}
	for _, m := range views[0].table {
		if uint64(m.Parent) == p.MountID {
			found = append(found, Holder{What: "another mount at", Path: printable(m.Mountpoint)})
		}
	}
	found = append(found, mountsFrom(proc, views, p.MountID, hasSDev(sdev))...)
	self := os.Getpid()
	for _, pid := range processes(proc) {
		if n, _ := strconv.Atoi(pid); n == self {
			continue
		}
		what, path := uses(filepath.Join(proc, pid), ids, sdev)
		if what == "" {
			continue
		}
		h := Holder{What: what, Path: printable(path)}
		h.describe(proc, pid)
		found = append(found, h)
	}
	return append(found, kernelHolders(proc, sysfs, p.Path)...)
}

// uses returns how the process with a folder in proc uses one of the mounts.
func uses(dir string, ids map[uint64]bool, sdev string) (what, path string) {
	for _, link := range []struct{ name, what string }{
		{"cwd", "working folder"}, {"root", "root folder"}, {"exe", "running program"},
	} {
		name := filepath.Join(dir, link.name)
		if liesOn(name, ids, sdev) {
			path, _ = os.Readlink(name)
			return link.what, path
		}
	}
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return "", ""
	}
	for _, e := range files {
		name := filepath.Join(dir, "fd", e.Name())
		if liesOn(name, ids, sdev) {
			path, _ = os.Readlink(name)
			return "open file", path
		}
	}
	if f, err := os.Open(filepath.Join(dir, "maps")); err == nil {
		defer f.Close()
		if path := mappedFrom(f, sdev); path != "" {
			return "mapped file", path
		}
	}
	return "", ""
}

// liesOn reports whether a process's link leads to one of the mounts, or to
// the file system by a mount that nobody sees any more. It asks no file system
// anew, so it does not wait for a dead server.
func liesOn(name string, ids map[uint64]bool, sdev string) bool {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st); err != nil {
		return false
	}
	return st.Mask&unix.STATX_MNT_ID != 0 && ids[st.Mnt_id] || fmt.Sprintf("%d:%d", st.Dev_major, st.Dev_minor) == sdev
}

// mappedFrom returns the first file in a list of mappings that lies on a file
// system.
func mappedFrom(r io.Reader, sdev string) string {
	major, minor, _ := strings.Cut(sdev, ":")
	ma, err1 := strconv.ParseUint(major, 10, 32)
	mi, err2 := strconv.ParseUint(minor, 10, 32)
	if errors.Join(err1, err2) != nil {
		return ""
	}
	want := fmt.Sprintf("%02x:%02x", ma, mi)
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		// address perms offset dev inode path
		fields := strings.Fields(lines.Text())
		if len(fields) >= 6 && fields[3] == want {
			return strings.Join(fields[5:], " ")
		}
	}
	return ""
}

// kernelHolders returns the loop devices and swap files that lie below a
// folder.
func kernelHolders(proc, sysfs, path string) []Holder {
	var found []Holder
	below := func(file string) bool { return strings.HasPrefix(file, path+"/") }
	loops, err := filepath.Glob(filepath.Join(sysfs, "block/loop*/loop/backing_file"))
	if err != nil {
		return nil
	}
	for _, name := range loops {
		b, err := os.ReadFile(name)
		if file := strings.TrimSpace(string(b)); err == nil && below(file) {
			dev := filepath.Base(filepath.Dir(filepath.Dir(name)))
			found = append(found, Holder{What: "loop device " + dev + " on", Path: printable(file)})
		}
	}
	if f, err := os.Open(filepath.Join(proc, "swaps")); err == nil {
		defer f.Close()
		files, err := swapDevices(f)
		if err != nil {
			return found
		}
		for _, file := range files {
			if below(file) {
				found = append(found, Holder{What: "swap file", Path: printable(file)})
			}
		}
	}
	return found
}
