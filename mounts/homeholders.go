package mounts

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// hostPIDs is the inode of the first PID namespace, which the kernel has
// fixed (PROC_PID_INIT_INO). In another one most programs can't be seen.
const hostPIDs = "pid:[4026531836]"

// homeTree is a folder by what all mount namespaces agree on: a file system
// and a folder on it. In containers it has other paths.
type homeTree struct {
	Major, Minor int
	Root         string
}

// treeOf finds the folder in a mount table.
func treeOf(table []*mountinfo.Info, path string) (homeTree, bool) {
	var best *mountinfo.Info
	for _, m := range table { // the last of several at one place is on top
		if under(path, m.Mountpoint) && (best == nil || len(m.Mountpoint) >= len(best.Mountpoint)) {
			best = m
		}
	}
	if best == nil {
		return homeTree{}, false
	}
	rest := strings.TrimPrefix(path, strings.TrimSuffix(best.Mountpoint, "/"))
	return homeTree{best.Major, best.Minor, filepath.Join(best.Root, rest)}, true
}

// under reports whether a path is a folder or something below it.
func under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// places returns where a tree, or a part of it, shows in a mount table. What
// is covered by another mount is included: programs may still use it.
func (h homeTree) places(table []*mountinfo.Info) (paths []string) {
	for _, m := range table {
		if m.Major != h.Major || m.Minor != h.Minor {
			continue
		}
		switch {
		case under(h.Root, m.Root): // the mount shows the tree and more
			paths = append(paths, filepath.Join(m.Mountpoint, strings.TrimPrefix(h.Root, strings.TrimSuffix(m.Root, "/"))))
		case under(m.Root, h.Root): // only a part of the tree
			paths = append(paths, m.Mountpoint)
		}
	}
	return paths
}

// holders looks through a /proc for programs that have files, their working
// folder or a mapping in a tree. It answers blind if it runs where it can't
// see all programs. Programs that end meanwhile are passed over.
func (h homeTree) holders(proc string, self int) (hs []HomeHolder, blind bool, err error) {
	if ns, err := os.Readlink(filepath.Join(proc, "self/ns/pid")); err != nil || ns != hostPIDs {
		blind = true
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, true, err
	}
	tables := map[string][]string{} // by mount namespace
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			continue
		}
		dir := filepath.Join(proc, e.Name())
		ns, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil {
			// Kernel threads have none that we may read; other programs
			// that we can't look into make us blind.
			if !errors.Is(err, fs.ErrNotExist) && !kernelThread(dir) {
				blind = true
			}
			continue
		}
		places, ok := tables[ns]
		if !ok {
			if table, err := readTable(filepath.Join(dir, "mountinfo")); err == nil {
				places = h.places(table)
			}
			tables[ns] = places
		}
		if len(places) == 0 {
			continue
		}
		if used := homeUses(dir, places); used != "" {
			comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
			name := strings.Map(func(r rune) rune {
				if r < 0x20 || r == 0x7f {
					return '?'
				}
				return r
			}, strings.TrimSpace(string(comm)))
			hs = append(hs, HomeHolder{PID: pid, Name: name, Path: used})
		}
	}
	return hs, blind, nil
}

func kernelThread(dir string) bool {
	b, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	return err == nil && len(b) == 0
}

// homeUses returns a path below one of places that a program uses, or "".
func homeUses(dir string, places []string) string {
	match := func(link string) string {
		to, err := os.Readlink(link)
		if err != nil {
			return ""
		}
		return inPlaces(strings.TrimSuffix(to, " (deleted)"), places)
	}
	for _, l := range []string{"cwd", "root", "exe"} {
		if p := match(filepath.Join(dir, l)); p != "" {
			return p
		}
	}
	fds, _ := os.ReadDir(filepath.Join(dir, "fd"))
	for _, fd := range fds {
		if p := match(filepath.Join(dir, "fd", fd.Name())); p != "" {
			return p
		}
	}
	maps, _ := os.ReadFile(filepath.Join(dir, "maps"))
	for line := range bytes.Lines(maps) {
		// The path is the sixth field and may hold blanks.
		if i := bytes.IndexByte(line, '/'); i > 0 {
			if p := inPlaces(strings.TrimSuffix(strings.TrimSpace(string(line[i:])), " (deleted)"), places); p != "" {
				return p
			}
		}
	}
	return ""
}

func inPlaces(path string, places []string) string {
	for _, p := range places {
		if under(path, p) {
			return path
		}
	}
	return ""
}

func readTable(name string) ([]*mountinfo.Info, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseTable(f)
}

func parseTable(r io.Reader) ([]*mountinfo.Info, error) { return mountinfo.GetMountsFromReader(r, nil) }
