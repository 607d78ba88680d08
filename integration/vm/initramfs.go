package vm

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

// archive writes an initramfs: a cpio archive of the kind "newc"
// (Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	w    *bufio.Writer
	n    int64
	ino  int
	dirs []string // that are in the archive already
	err  error
}

func newArchive(w io.Writer) *archive { return &archive{w: bufio.NewWriterSize(w, 1<<20)} }

// The kernel's file types, as in stat(2).
const (
	modeDir  = 0o040000
	modeChar = 0o020000
	modeReg  = 0o100000
	modeLink = 0o120000
)

func (a *archive) write(b []byte) {
	if a.err == nil {
		_, a.err = a.w.Write(b)
		a.n += int64(len(b))
	}
}

func (a *archive) pad() {
	if over := a.n % 4; over != 0 {
		a.write(make([]byte, 4-over))
	}
}

// entry writes a header, after which size bytes and pad must follow.
func (a *archive) entry(name string, mode uint32, size int64, major, minor int) {
	a.ino++
	a.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.ino, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0))
	a.write([]byte(name + "\x00"))
	a.pad()
}

// mkdir adds a folder and those above it.
func (a *archive) mkdir(dir string) {
	dir = strings.Trim(path.Clean("/"+dir), "/")
	if dir == "" || slices.Contains(a.dirs, dir) {
		return
	}
	a.mkdir(path.Dir("/" + dir))
	a.dirs = append(a.dirs, dir)
	a.entry(dir, modeDir|0o755, 0, 0, 0)
}

func (a *archive) add(name string, mode uint32, data []byte) {
	a.mkdir(path.Dir("/" + name))
	a.entry(strings.TrimPrefix(path.Clean("/"+name), "/"), mode, int64(len(data)), 0, 0)
	a.write(data)
	a.pad()
}

func (a *archive) file(name string, mode uint32, data []byte) { a.add(name, modeReg|mode, data) }

func (a *archive) symlink(name, target string) { a.add(name, modeLink|0o777, []byte(target)) }

func (a *archive) device(name string, major, minor int) {
	a.mkdir(path.Dir("/" + name))
	a.entry(strings.TrimPrefix(path.Clean("/"+name), "/"), modeChar|0o600, 0, major, minor)
}

// copy adds the file at host, or what its symlink points to.
func (a *archive) copy(name, host string) {
	if a.err != nil {
		return
	}
	info, err := os.Stat(host)
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "copy into the initramfs", Path: host, Err: fs.ErrInvalid}
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(host)
	}
	if err != nil {
		a.err = err
		return
	}
	a.file(name, uint32(info.Mode().Perm()), data)
}

func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, 0, 0, 0)
	if a.err == nil {
		a.err = a.w.Flush()
	}
	return a.err
}

// Marks of the line protocol on the guest's second serial port: two lines in,
// the number of the command and a line of shell; the output out, then the
// mark, that number and the exit code.
const (
	ready  = "@@READY@@\n"
	answer = "\n@@RC:"
)

const initScript = `#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/pts /dev/shm /mnt
mount -t devpts devpts /dev/pts
mount --make-rshared /
stty -F /dev/ttyS1 raw -echo 115200
exec </dev/ttyS1 >/dev/ttyS1 2>&1
while read -r module; do insmod "/lib/modules/$module"; done </etc/modules
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
	ip link set eth0 up
	ip addr add 10.0.2.15/24 dev eth0
	ip route add default via 10.0.2.2
fi
echo "@@READY@@"
while IFS= read -r number && IFS= read -r line; do
	( eval "$line" ) </dev/null
	printf '\n@@RC:%d=%d@@\n' "$number" $?
done
poweroff -f
`

// writeInitramfs makes the guest's whole file system.
func (m *Machine) writeInitramfs(ctx context.Context, name string, cfg Config) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	for _, dir := range []string{"bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin", "var/lib"} {
		a.mkdir(dir)
	}
	a.device("dev/console", 5, 1)
	a.file("init", 0o755, []byte(initScript))
	a.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	a.file("etc/group", 0o644, []byte("root:x:0:\n"))
	a.file("etc/hosts", 0o644, []byte("127.0.0.1 localhost\n10.0.2.2 host\n"))

	if err := m.addPrograms(ctx, a, append(slices.Clone(guestPrograms), cfg.Programs...)); err != nil {
		return err
	}
	loaded := slices.Concat(baseModules, cfg.Modules)
	if cfg.Samba {
		loaded = append(loaded, sambaModules...)
	}
	files, err := m.kernel.modules(loaded...)
	if err != nil {
		return err
	}
	var list strings.Builder
	for _, file := range files {
		fmt.Fprintln(&list, path.Base(file))
	}
	a.file("etc/modules", 0o644, []byte(list.String()))
	onDemand, err := m.kernel.modules(cfg.OnDemand...)
	if err != nil {
		return err
	}
	files = append(files, onDemand...)
	slices.Sort(files)
	for _, file := range slices.Compact(files) {
		a.copy("lib/modules/"+path.Base(file), file)
	}
	for _, guest := range slices.Sorted(maps.Keys(cfg.Files)) {
		a.copy(guest, cfg.Files[guest])
	}
	if err := a.close(); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	return f.Close()
}

// addPrograms adds busybox under the names of all its applets, and programs of
// the host with their libraries.
func (m *Machine) addPrograms(ctx context.Context, a *archive, names []string) error {
	busybox, err := find("busybox")
	if err != nil {
		return err
	}
	if libs, err := libraries(ctx, busybox); err != nil {
		return err
	} else if len(libs) > 0 {
		return fmt.Errorf("%s is not static: %w", busybox, &MissingError{Program: "a static busybox", Package: "busybox-static"})
	}
	applets, err := command(ctx, "", "", "busybox", "--list")
	if err != nil {
		return err
	}
	a.copy("bin/busybox", busybox)
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" && !slices.Contains(names, applet) {
			a.symlink("bin/"+applet, "busybox")
		}
	}
	var all []string
	for _, name := range names {
		program, err := find(name)
		if err != nil {
			return err
		}
		a.copy("usr/sbin/"+name, program)
		libs, err := libraries(ctx, program)
		if err != nil {
			return err
		}
		all = append(all, libs...)
	}
	slices.Sort(all)
	for _, lib := range slices.Compact(all) {
		a.copy(lib, lib)
	}
	return nil
}
