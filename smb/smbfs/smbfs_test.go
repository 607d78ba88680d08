package smbfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbfs"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

// mount mounts a fresh folder of the server's share RW, and returns where and
// the folder on the server's disk.
func mount(t testing.TB, s *smbtest.Server, change func(*smb.Options)) (at, behind string) {
	t.Helper()
	o := smb.Options{
		Server:      s.Addr(),
		Credentials: smb.Credentials{Username: smbtest.User, Password: smbtest.Password},
	}
	if change != nil {
		change(&o)
	}
	c, err := smb.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	sh, err := c.Share(smbtest.RW)
	if err != nil {
		t.Fatal(err)
	}
	at = t.TempDir()
	dir := filepath.Base(at) + fmt.Sprint(rand.Uint32())
	if err := sh.Mkdir(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	m, err := smbfs.New(sh, dir, at, smbfs.Options{Owner: uint32(os.Getuid()), Group: uint32(os.Getgid()), FileMode: 0o755, DirMode: 0o755})
	if err != nil {
		t.Fatalf("mounting (needs root and /dev/fuse): %v", err)
	}
	t.Cleanup(func() {
		if err := m.Unmount(false); err != nil {
			t.Errorf("Unmount: %v", err)
			_ = m.Unmount(true)
		}
	})
	return at, filepath.Join(s.Path(smbtest.RW), dir)
}

// quick makes failures of the server show soon.
func quick(o *smb.Options) {
	o.DialTimeout, o.MetaTimeout, o.DataTimeout = time.Second, 2*time.Second, 3*time.Second
}

// TestPOSIX runs go-fuse's tests of file systems. Those left out need what
// shares don't have; docs/smb.md lists the differences.
func TestPOSIX(t *testing.T) {
	without := map[string]string{
		"Link":             "hard links",
		"LinkUnlinkRename": "hard links",
		"XAttr":            "extended attributes",
		// It wants locks to be per descriptor where POSIX, and the kernel
		// that keeps ours, has them per process.
		"FcntlFlockLocksFile": "locks per descriptor",
	}
	s := smbtest.Start(t)
	for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
		if without[name] != "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			at, _ := mount(t, s, nil)
			posixtest.All[name](t, at)
		})
	}
}

func write(t testing.TB, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestUse(t *testing.T) {
	s := smbtest.Start(t)
	at, behind := mount(t, s, nil)
	p := func(name string) string { return filepath.Join(at, name) }

	t.Run("close to open", func(t *testing.T) {
		write(t, p("a"), []byte("one"))
		if got := read(t, filepath.Join(behind, "a")); string(got) != "one" {
			t.Errorf("after close the server has %q", got)
		}
		// Another client changes it.
		write(t, filepath.Join(behind, "a"), []byte("number two"))
		time.Sleep(1100 * time.Millisecond)
		if got := read(t, p("a")); string(got) != "number two" {
			t.Errorf("after another client's change: %q", got)
		}
	})
	t.Run("random writes and reads", func(t *testing.T) {
		f, err := os.OpenFile(p("random"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		rng := rand.New(rand.NewPCG(3, 4))
		want := make([]byte, 0, 9<<20)
		for range 400 {
			off := rng.IntN(8 << 20)
			data := bytes.Repeat([]byte{byte(rng.Uint32())}, 1+rng.IntN(60_000))
			if rng.IntN(2) == 0 {
				off = len(want) // sequential, as most writes are
			}
			if off+len(data) > cap(want) {
				continue
			}
			if end := off + len(data); end > len(want) {
				want = want[:end]
			}
			copy(want[off:], data)
			if _, err := f.WriteAt(data, int64(off)); err != nil {
				t.Fatal(err)
			}
			if rng.IntN(10) == 0 {
				at := rng.IntN(len(want))
				got := make([]byte, min(len(want)-at, 100_000))
				if _, err := f.ReadAt(got, int64(at)); err != nil || !bytes.Equal(got, want[at:at+len(got)]) {
					t.Fatalf("read at %d: wrong, %v", at, err)
				}
			}
			if st, err := f.Stat(); err != nil || st.Size() != int64(len(want)) {
				t.Fatalf("Stat = %d, %v; want %d", st.Size(), err, len(want))
			}
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(read(t, filepath.Join(behind, "random")), want) {
			t.Error("the server has something else")
		}
	})
	t.Run("append by two descriptors", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 2 {
			wg.Go(func() {
				f, err := os.OpenFile(p("log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
				if err != nil {
					t.Error(err)
					return
				}
				defer f.Close()
				for range 200 {
					if _, err := fmt.Fprintf(f, "line %d\n", i); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if lines := strings.Count(string(read(t, p("log"))), "\n"); lines != 400 {
			t.Errorf("%d lines, want 400", lines)
		}
	})
	t.Run("data doesn't wait for close", func(t *testing.T) {
		f, err := os.Create(p("slow"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString("hello"); err != nil {
			t.Fatal(err)
		}
		for start := time.Now(); len(read(t, filepath.Join(behind, "slow"))) == 0; time.Sleep(20 * time.Millisecond) {
			if time.Since(start) > 5*time.Second {
				t.Fatal("after 5 s nothing is on the server")
			}
		}
	})
	t.Run("renames", func(t *testing.T) {
		write(t, p("from"), []byte("new"))
		write(t, p("onto"), []byte("old"))
		old, err := os.Open(p("onto"))
		if err != nil {
			t.Fatal(err)
		}
		moving, err := os.OpenFile(p("from"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(p("from"), p("onto")); err != nil {
			t.Fatal(err)
		}
		if got := read(t, p("onto")); string(got) != "new" {
			t.Errorf("the name leads to %q", got)
		}
		b := make([]byte, 3)
		if _, err := old.ReadAt(b, 0); err != nil || string(b) != "old" {
			t.Errorf("the replaced file that is open reads %q, %v", b, err)
		}
		if _, err := moving.WriteAt([]byte("NEW"), 0); err != nil {
			t.Error(err)
		}
		if err := errors.Join(old.Close(), moving.Close()); err != nil {
			t.Error(err)
		}
		if got := read(t, p("onto")); string(got) != "NEW" {
			t.Errorf("a write to the moved file: %q", got)
		}
		if err := unix.Renameat2(unix.AT_FDCWD, p("onto"), unix.AT_FDCWD, p("log"), unix.RENAME_NOREPLACE); err != unix.EEXIST {
			t.Errorf("RENAME_NOREPLACE: %v, want EEXIST", err)
		}
		// The kernel tells of a close a little later.
		for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			hidden, err := filepath.Glob(filepath.Join(behind, ".ide49-*"))
			if err != nil || len(hidden) == 0 {
				break
			}
			if time.Since(start) > 5*time.Second {
				t.Fatalf("%v are left on the server", hidden)
			}
		}
	})
	t.Run("folder with open files moves", func(t *testing.T) {
		if err := os.MkdirAll(p("d1/sub"), 0o700); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(p("d1/sub/file"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("before "); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(p("d1"), p("d2")); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("after"); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if got := read(t, filepath.Join(behind, "d2/sub/file")); string(got) != "before after" {
			t.Errorf("%q", got)
		}
	})
	t.Run("links", func(t *testing.T) {
		for _, to := range []string{"a", "/absolute/place", "../up", "ünïcode", strings.Repeat("long/", 204)} {
			name := p(fmt.Sprintf("link%d", len(to)))
			if err := os.Symlink(to, name); err != nil {
				t.Fatal(err)
			}
			if got, err := os.Readlink(name); err != nil || got != to {
				t.Errorf("Readlink = %q, %v; want %q", got, err, to)
			}
		}
		if err := os.Symlink(strings.Repeat("x", 1025), p("too-long")); !errors.Is(err, unix.ENAMETOOLONG) {
			t.Errorf("a target of 1025 bytes: %v, want ENAMETOOLONG", err)
		}
		entries, err := os.ReadDir(at)
		if err != nil {
			t.Fatal(err)
		}
		links := 0
		for _, e := range entries {
			if e.Type() == fs.ModeSymlink {
				links++
			}
		}
		if links != 5 {
			t.Errorf("the listing shows %d links, want 5", links)
		}
		// A file that only looks like one in size stays a file.
		write(t, p("like"), make([]byte, 1067))
		if st, err := os.Lstat(p("like")); err != nil || !st.Mode().IsRegular() {
			t.Errorf("Lstat = %v, %v", st, err)
		}
	})
	t.Run("modes and owners", func(t *testing.T) {
		write(t, p("mode"), nil)
		for _, tc := range []struct{ set, want fs.FileMode }{{0o644, 0o755}, {0o444, 0o555}, {0o700, 0o755}} {
			if err := os.Chmod(p("mode"), tc.set); err != nil {
				t.Fatal(err)
			}
			if st, err := os.Stat(p("mode")); err != nil || st.Mode() != tc.want {
				t.Errorf("after chmod %o: %v, %v; want %v", tc.set, st.Mode(), err, tc.want)
			}
		}
		if err := os.Chown(p("mode"), os.Getuid(), os.Getgid()); err != nil {
			t.Errorf("chown to the owner that it has: %v", err)
		}
		if err := os.Chown(p("mode"), 12345, -1); !errors.Is(err, unix.EPERM) {
			t.Errorf("chown to another: %v, want EPERM", err)
		}
		if err := os.Link(p("mode"), p("hard")); !errors.Is(err, unix.EPERM) {
			t.Errorf("hard link: %v, want EPERM", err)
		}
		if err := unix.Mkfifo(p("fifo"), 0o600); err != unix.EPERM {
			t.Errorf("fifo: %v, want EPERM", err)
		}
	})
	t.Run("times survive a close", func(t *testing.T) {
		f, err := os.Create(p("timed"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("x"); err != nil {
			t.Fatal(err)
		}
		when := time.Date(2015, 5, 6, 7, 8, 9, 123456700, time.UTC)
		if err := os.Chtimes(p("timed"), when, when); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1100 * time.Millisecond)
		if st, err := os.Stat(p("timed")); err != nil || !st.ModTime().Equal(when) {
			t.Errorf("ModTime = %v, %v; want %v", st.ModTime(), err, when)
		}
	})
	t.Run("names", func(t *testing.T) {
		for _, name := range []string{`a:b*c?"<>|\`, "dot.", "space ", "tab\t", strings.Repeat("n", 255)} {
			write(t, p(name), []byte(name))
			if got := read(t, p(name)); string(got) != name {
				t.Errorf("%q holds %q", name, got)
			}
			if err := os.Remove(p(name)); err != nil {
				t.Error(err)
			}
		}
		if err := os.WriteFile(p(strings.Repeat("n", 256)), nil, 0o600); !errors.Is(err, unix.ENAMETOOLONG) {
			t.Errorf("a name of 256 bytes: %v", err)
		}
	})
	t.Run("locks", func(t *testing.T) {
		write(t, p("lock"), nil)
		a, err := os.Open(p("lock"))
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		b, err := os.Open(p("lock"))
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if err := unix.Flock(int(a.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
			t.Errorf("a second flock: %v, want EWOULDBLOCK", err)
		}
	})
	t.Run("shared mapping", func(t *testing.T) {
		write(t, p("map"), make([]byte, 8192))
		f, err := os.OpenFile(p("map"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		copy(m[4096:], "mapped")
		if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m), f.Close()); err != nil {
			t.Fatal(err)
		}
		if got := read(t, filepath.Join(behind, "map")); string(got[4096:4102]) != "mapped" {
			t.Errorf("the server has %q", got[4096:4102])
		}
	})
	t.Run("space", func(t *testing.T) {
		var st, real unix.Statfs_t
		if err := errors.Join(unix.Statfs(at, &st), unix.Statfs(behind, &real)); err != nil {
			t.Fatal(err)
		}
		if got, want := st.Blocks*uint64(st.Bsize), real.Blocks*uint64(real.Bsize); got != want {
			t.Errorf("%d bytes, want %d", got, want)
		}
	})
	t.Run("git", func(t *testing.T) {
		if _, err := exec.LookPath("git"); err != nil {
			t.Fatal("git is missing: apt-get install git")
		}
		script := `set -e
			git init -q r; cd r; git config user.email a@b; git config user.name n
			for i in 1 2 3; do echo $i > f$i; git add .; git commit -qm $i; done
			git mv f1 g1; git commit -qam mv; git gc -q; git fsck --strict; git status --porcelain`
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = at
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*")
		if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("10,000 entries", func(t *testing.T) {
		dir := filepath.Join(behind, "many")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range 10_000 {
			write(t, filepath.Join(dir, fmt.Sprintf("f%05d", i)), []byte("x"))
		}
		start := time.Now()
		out, err := exec.Command("ls", "-l", p("many")).Output()
		if lines := bytes.Count(out, []byte("\n")); err != nil || lines != 10_001 {
			t.Errorf("ls -l: %d lines, %v", lines, err)
		}
		d := time.Since(start)
		t.Logf("ls -l of 10,000 entries: %v", d)
		if d > 5*time.Second { // 0.5 s on a machine at rest; one request each takes 11 s
			t.Errorf("ls -l took %v", d)
		}
	})
}

// TestAway checks that programs get errors and no hangs while the server is
// away, and that their open files go on when it is back.
func TestAway(t *testing.T) {
	for _, tc := range []struct {
		name       string
		away, back func(*smbtest.Server)
	}{
		{"killed", (*smbtest.Server).Kill, (*smbtest.Server).Restart},
		{"frozen", (*smbtest.Server).Freeze, (*smbtest.Server).Thaw},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := smbtest.Start(t)
			at, behind := mount(t, s, quick)
			name := filepath.Join(at, "x")
			f, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString("durable "); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			tc.away(s)
			start := time.Now()
			if _, err := os.Stat(filepath.Join(at, "other")); !errors.Is(err, unix.EHOSTDOWN) {
				t.Errorf("stat: %v, want EHOSTDOWN", err)
			}
			if _, err := os.ReadDir(at); !errors.Is(err, unix.EHOSTDOWN) {
				t.Errorf("readdir: %v, want EHOSTDOWN", err)
			}
			if _, err := f.WriteString("buffered"); err != nil {
				t.Errorf("a write into the buffer: %v", err)
			}
			if err := f.Sync(); !errors.Is(err, unix.EHOSTDOWN) {
				t.Errorf("fsync: %v, want EHOSTDOWN", err)
			}
			if d := time.Since(start); d > 15*time.Second {
				t.Errorf("the calls took %v", d)
			}
			tc.back(s)
			// What was buffered is not lost, and the descriptor still works.
			for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
				err := f.Sync()
				if err == nil {
					break
				}
				if time.Since(start) > 20*time.Second {
					t.Fatalf("fsync 20 s after the server is back: %v", err)
				}
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if got := read(t, filepath.Join(behind, "x")); string(got) != "durable buffered" {
				t.Errorf("the server has %q", got)
			}
		})
	}
	t.Run("fsync tells of writes that may be lost", func(t *testing.T) {
		s := smbtest.Start(t)
		at, _ := mount(t, s, nil)
		f, err := os.Create(filepath.Join(at, "x"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(make([]byte, 5<<20)); err != nil { // more than the buffer: it is sent
			t.Fatal(err)
		}
		s.Restart()
		for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			err := f.Sync()
			if errors.Is(err, syscall.EIO) {
				break
			}
			if err == nil || time.Since(start) > 20*time.Second {
				t.Fatalf("fsync: %v, want EIO once", err)
			}
		}
		if err := f.Sync(); err != nil {
			t.Errorf("the next fsync: %v", err)
		}
	})
}

func TestReadOnlyAndBusy(t *testing.T) {
	s := smbtest.Start(t)
	c, err := smb.New(smb.Options{Server: s.Addr(), Credentials: smb.Credentials{Username: smbtest.User, Password: smbtest.Password}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sh, err := c.Share(smbtest.RO)
	if err != nil {
		t.Fatal(err)
	}
	at := t.TempDir()
	if _, err := smbfs.New(sh, "missing", at, smbfs.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("New of a missing folder: %v", err)
	}
	write(t, filepath.Join(s.Path(smbtest.RO), "film"), []byte("frames"))
	m, err := smbfs.New(sh, ".", at, smbfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("a write to a read-only share: %v, want EROFS", err)
	}
	f, err := os.Open(filepath.Join(at, "film"))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Unmount(false); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Unmount of a file system in use: %v, want EBUSY", err)
	}
	if err := m.Unmount(true); err != nil {
		t.Errorf("lazy Unmount: %v", err)
	}
	b := make([]byte, 6)
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != "frames" {
		t.Errorf("a file that was open: %q, %v", b, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	m.Wait()
}
