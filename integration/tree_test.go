package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tool returns the path of a program that a test needs.
func tool(t testing.TB, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: install Debian's package %s (make test does it as root)", name, pkg)
	}
	return path
}

// run runs a program and returns what it prints.
func run(t testing.TB, env []string, name string, args ...string) string {
	t.Helper()
	out, err := command(env, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func command(env []string, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// random returns n bytes that do not compress.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	_, _ = rand.NewChaCha8(key).Read(b) // never fails
	return b
}

// wildTree makes a folder with every kind of file, name, attribute and time
// that a Linux file system keeps and Debian's restic both records and restores;
// wilderTree adds what only we do.
func wildTree(t testing.TB, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test makes device nodes and must run as root")
	}
	write := func(name string, data []byte) string {
		t.Helper()
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, data, 0o644))
		return p
	}
	write("empty", nil)
	write("one byte", []byte{0})
	write("text/log", bytes.Repeat([]byte("2026-11-22 03:00:00 a line that repeats itself\n"), 20_000))
	write("large", random(1, 20<<20))
	write("text/large again", append(random(2, 100), random(1, 20<<20)...))
	for i := range 200 {
		write(fmt.Sprintf("many/%d/file %03d", i%7, i), random(uint64(100+i), i*37))
	}
	for _, size := range []int{512<<10 - 1, 512 << 10, 512<<10 + 1, 8 << 20} {
		write(fmt.Sprintf("sizes/%d", size), random(uint64(size), size))
	}
	// Names.
	for _, name := range []string{
		"new\nline", "tab\t", "quote\"'`", "back\\slash", "not utf-8 \xff\xfe", "\x01control", "del\x7f", "<html>&amp;", "ünï", "e\u0301", "日本",
		"\U0001f600", "\u2028", " ", "-rf", "*", "?", "~", "#", "$HOME", ".hidden", "..twodots", strings.Repeat("x", 255), strings.Repeat("ü", 127),
	} {
		write("names/"+name, []byte(name))
	}
	deep := strings.Repeat("deep folder/", 40)
	write(deep+"bottom", []byte("down here"))
	must(t, os.MkdirAll(filepath.Join(dir, "empty folder"), 0o755))
	// Links.
	must(t, os.Symlink("large", filepath.Join(dir, "link")))
	must(t, os.Symlink("/nowhere/at all", filepath.Join(dir, "dangling")))
	must(t, os.Symlink("..", filepath.Join(dir, "up")))
	must(t, os.Symlink(strings.Repeat("long/", 600), filepath.Join(dir, "long link")))
	for i := range 3 {
		must(t, os.Link(filepath.Join(dir, "large"), filepath.Join(dir, fmt.Sprintf("hard link %d", i))))
	}
	// Special files.
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	must(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(filepath.Join(dir, "loop"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 200))))
	// Modes and owners.
	for _, mode := range []uint32{0, 0o400, 0o777, 0o4755, 0o2755, 0o1777, 0o7777} {
		must(t, unix.Chmod(write(fmt.Sprintf("modes/%04o", mode), []byte("x")), mode))
	}
	must(t, os.Mkdir(filepath.Join(dir, "modes/sticky"), 0o755))
	must(t, unix.Chmod(filepath.Join(dir, "modes/sticky"), 0o1777))
	must(t, os.Lchown(write("owners/someone", nil), 1000, 100))
	must(t, os.Lchown(write("owners/nobody at all", nil), 4_000_000_000, 3_999_999_999))
	must(t, os.Lchown(filepath.Join(dir, "dangling"), 33, 33))
	// Attributes, ACLs, capabilities.
	x := write("attributes/file", []byte("x"))
	must(t, unix.Lsetxattr(x, "user.comment", []byte("with\x00zero"), 0))
	must(t, unix.Lsetxattr(x, "user.ünï", random(9, 1500), 0))
	must(t, unix.Lsetxattr(filepath.Dir(x), "trusted.folder", []byte("yes"), 0))
	run(t, nil, tool(t, "setfacl", "acl"), "-m", "u:1000:rw,g:100:r", x)
	run(t, nil, "setfacl", "-d", "-m", "u:33:rwx", filepath.Dir(x))
	c := write("attributes/capable", []byte("x"))
	must(t, unix.Lsetxattr(c, "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	// Holes.
	sparse := write("sparse", []byte("begin"))
	must(t, os.Truncate(sparse, 40<<20))
	f, err := os.OpenFile(sparse, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(random(5, 100_000), 17<<20)
	must(t, err)
	must(t, f.Close())
	// Times, last: nanoseconds, before 1970, after 2038. Folders deepest first.
	stamp := func(name string, ts time.Time) {
		t.Helper()
		spec := unix.NsecToTimespec(ts.UnixNano())
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Join(dir, name), []unix.Timespec{spec, spec}, unix.AT_SYMLINK_NOFOLLOW))
	}
	stamp("empty", time.Date(1965, 3, 4, 5, 6, 7, 89, time.UTC))
	stamp("one byte", time.Date(2038, 1, 20, 0, 0, 0, 999_999_999, time.UTC))
	stamp("large", time.Date(2026, 3, 29, 1, 30, 0, 1, time.UTC))
	stamp("text/log", time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC))
	stamp("dangling", time.Date(2001, 2, 3, 4, 5, 6, 7, time.UTC))
	stamp("fifo", time.Date(2002, 2, 3, 4, 5, 6, 7, time.UTC))
	stamp("many/3", time.Date(2003, 2, 3, 4, 5, 6, 7, time.UTC))
	stamp("empty folder", time.Date(1999, 12, 31, 23, 59, 59, 0, time.UTC))
	stamp("", time.Date(2020, 2, 29, 0, 0, 0, 5, time.UTC))
}

// wilderTree is wildTree with sockets, which Debian's restic leaves out, a link
// target that is not UTF-8, which it stores with replacement characters, and
// attributes of a symlink, which it does not record.
func wilderTree(t testing.TB, dir string) {
	t.Helper()
	wildTree(t, dir)
	sub := filepath.Join(dir, "wilder")
	must(t, os.Mkdir(sub, 0o700))
	must(t, unix.Mknod(filepath.Join(sub, "socket"), unix.S_IFSOCK|0o755, 0))
	must(t, os.Symlink("to \xff\xfe", filepath.Join(sub, "link")))
	must(t, unix.Lsetxattr(filepath.Join(sub, "link"), "trusted.link", []byte("x"), 0))
}

// sameTree fails unless rsync finds no difference at all between two folders:
// contents, types, modes, owners, times, hard links, ACLs and attributes.
func sameTree(t testing.TB, want, got string) {
	t.Helper()
	out := run(t, nil, tool(t, "rsync", "rsync"), "-nacHAX", "--delete", "--itemize-changes", want+"/", got+"/")
	if strings.TrimSpace(out) != "" {
		t.Errorf("%s differs from %s:\n%.3000s", got, want, out)
	}
}
