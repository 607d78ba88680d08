package mounts

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test program be the daemon itself, so that a test can kill
// it. The daemon prints its drives as JSON lines.
func TestMain(m *testing.M) {
	conf := os.Getenv("IDE49_TEST_DRIVES")
	if conf == "" {
		os.Exit(m.Run())
	}
	if err := childDaemon(conf); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func childDaemon(conf string) error {
	var cfg DriveConfig
	if err := json.Unmarshal([]byte(conf), &cfg); err != nil {
		return err
	}
	if os.Getenv("IDE49_TEST_FROZEN") != "" {
		if err := freezeDev(); err != nil {
			return fmt.Errorf("freezing /dev: %w", err)
		}
	}
	out := json.NewEncoder(os.Stdout)
	d, err := NewDrives(cfg, DriveEvents{
		Changed: func(d Drive) { _ = out.Encode(d) },
		Failed:  func(err error) { fmt.Fprintln(os.Stderr, err) },
	})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	return d.Run(ctx)
}

// freezeDev gives this process a /dev of its own that gains no devices, as a
// container has.
func freezeDev() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("frozen", "/dev", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	return unix.Mknod("/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
}

// A child is a daemon in a process of its own.
type child struct {
	*exec.Cmd
	t     *testing.T
	lines *bufio.Scanner
}

func startChild(t *testing.T, cfg DriveConfig, attr *syscall.SysProcAttr, env ...string) *child {
	t.Helper()
	conf, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c := &child{Cmd: exec.Command("/proc/self/exe"), t: t}
	c.Env = append(append(os.Environ(), "IDE49_TEST_DRIVES="+string(conf)), env...)
	c.Stderr = os.Stderr
	c.SysProcAttr = attr
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Process.Kill(), c.Wait() })
	c.lines = bufio.NewScanner(out)
	return c
}

// wait reads what the child tells until a device is in a state.
func (c *child) wait(device string, state DriveState) Drive {
	c.t.Helper()
	stop := time.AfterFunc(20*time.Second, func() { _ = c.Process.Kill() })
	defer stop.Stop()
	for c.lines.Scan() {
		var d Drive
		if err := json.Unmarshal(c.lines.Bytes(), &d); err != nil {
			c.t.Fatal(err)
		}
		if d.Device == device && d.State == state {
			return d
		}
	}
	c.t.Fatalf("the daemon ended before %s was %s", device, state)
	return Drive{}
}

func (c *child) end(sig os.Signal) {
	c.t.Helper()
	if err := c.Process.Signal(sig); err != nil {
		c.t.Fatal(err)
	}
	if err := c.Wait(); err != nil && sig == unix.SIGTERM {
		c.t.Errorf("the daemon ended with %v", err)
	}
}

// TestCrash kills the daemon and expects that the next takes the mount over,
// also when it is busy, and cleans up when the drive went meanwhile.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	s := newSlot(t)
	cfg := DriveConfig{Also: []string{s.name}, Mount: filepath.Join(dir, "mnt"), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")}
	file := image(t, 8, "mkfs.ext4", "-q", "-L", "CRASH")
	s.plug(file)
	c := startChild(t, cfg, nil)
	before := c.wait(s.name, DriveMounted)
	c.end(unix.SIGKILL)
	t.Cleanup(func() { _ = unix.Unmount(before.Path, unix.MNT_DETACH) })
	if _, err := os.Stat(filepath.Join(before.Path, "lost+found")); err != nil {
		t.Fatalf("the mount should have outlived the daemon: %v", err)
	}
	open, err := os.Create(filepath.Join(before.Path, "open"))
	if err != nil {
		t.Fatal(err)
	}

	// The next run takes it over, and leaves it when it ends, since it is busy.
	c = startChild(t, cfg, nil)
	if after := c.wait(s.name, DriveMounted); after.Path != before.Path || after.Plugging.MountID != before.Plugging.MountID || after.Label != "CRASH" || after.Type != "ext4" || !after.Since.Equal(before.Since) {
		t.Errorf("taken over: %+v", after)
	}
	c.end(unix.SIGTERM)
	if id, err := mountID(unix.AT_FDCWD, before.Path); err != nil || id != before.Plugging.MountID {
		t.Errorf("the busy mount after the end: %d, %v", id, err)
	}
	// The run after that unmounts it, since nobody uses it any more.
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	c = startChild(t, cfg, nil)
	c.wait(s.name, DriveMounted)
	c.end(unix.SIGTERM)
	if _, err := os.Lstat(before.Path); !os.IsNotExist(err) {
		t.Errorf("the folder after the end: %v", err)
	}

	// Killed again; the drive goes while nobody looks.
	c = startChild(t, cfg, nil)
	c.wait(s.name, DriveMounted)
	c.end(unix.SIGKILL)
	edit(t, cfg.StateDir, func(r *record) { r.Claims[0].DiskSeq-- }) // as if it were another plugging
	c = startChild(t, cfg, nil)
	again := c.wait(s.name, DriveMounted)
	if again.Path != before.Path || again.Plugging.MountID == before.Plugging.MountID && again.Plugging.DiskSeq == before.Plugging.DiskSeq-1 {
		t.Errorf("mounted anew: %+v", again)
	}
	table, err := mountsOf("/proc", "self")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range table {
		if strings.HasPrefix(m.Mountpoint, dir+"/mnt") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d mounts", n)
	}
	c.end(unix.SIGTERM)
}

// edit changes the record of mounts.
func edit(t *testing.T, dir string, change func(*record)) {
	t.Helper()
	r, err := loadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	change(r)
	if err := r.save(); err != nil {
		t.Fatal(err)
	}
}

// TestLeftovers starts over the leftovers of a crash at each moment, and of a
// power cut, and expects that only our own are removed.
func TestLeftovers(t *testing.T) {
	boot, err := bootID("/proc")
	if err != nil {
		t.Fatal(err)
	}
	inode := func(t *testing.T, path string) uint64 {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	for _, tt := range []struct {
		name  string
		boot  string
		setup func(t *testing.T, path string) claim
		stays bool
	}{
		{"claimed, not made yet", boot, func(t *testing.T, path string) claim { return claim{Path: path} }, false},
		{"made, not mounted yet", boot, func(t *testing.T, path string) claim {
			return claim{Path: path, Ino: mkdir(t, path, inode)}
		}, false},
		{"made, not written down yet", boot, func(t *testing.T, path string) claim {
			mkdir(t, path, inode)
			return claim{Path: path}
		}, false},
		{"power cut", "another boot", func(t *testing.T, path string) claim {
			return claim{Path: path, Ino: mkdir(t, path, inode), SDev: "8:1", Device: "sda1"}
		}, false},
		{"folder that was there before", boot, func(t *testing.T, path string) claim {
			return claim{Path: path, Ino: mkdir(t, path, inode), Existed: true}
		}, true},
		{"another folder at its place", boot, func(t *testing.T, path string) claim {
			return claim{Path: path, Ino: mkdir(t, path, inode) + 1}
		}, true},
		{"somebody put files in it", boot, func(t *testing.T, path string) claim {
			ino := mkdir(t, path, inode)
			if err := os.WriteFile(filepath.Join(path, "file"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return claim{Path: path, Ino: ino}
		}, true},
		{"somebody's file at its place", boot, func(t *testing.T, path string) claim {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return claim{Path: path}
		}, true},
		{"somebody's link at its place", boot, func(t *testing.T, path string) claim {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(t.TempDir(), path); err != nil {
				t.Fatal(err)
			}
			return claim{Path: path}
		}, true},
		{"somebody's mount at its place", boot, func(t *testing.T, path string) claim {
			ino := mkdir(t, path, inode)
			if err := unix.Mount("other", path, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(path, 0) })
			return claim{Path: path, Ino: ino, SDev: "8:1", Device: "sda1"}
		}, true},
		{"our mount of a drive that is gone", boot, func(t *testing.T, path string) claim {
			ino := mkdir(t, path, inode)
			if err := unix.Mount("ours", path, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			table, err := mountsOf("/proc", "self")
			if err != nil {
				t.Fatal(err)
			}
			m := topMount(table, path)
			t.Cleanup(func() { _ = unix.Unmount(path, 0) })
			return claim{Path: path, Ino: ino, SDev: fmt.Sprintf("%d:%d", m.Major, m.Minor), Device: "sdzz", Major: 8, Minor: 9999}
		}, false},
		{"a mount of an earlier boot can't be ours", "another boot", func(t *testing.T, path string) claim {
			ino := mkdir(t, path, inode)
			if err := unix.Mount("other", path, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			table, err := mountsOf("/proc", "self")
			if err != nil {
				t.Fatal(err)
			}
			m := topMount(table, path)
			t.Cleanup(func() { _ = unix.Unmount(path, 0) })
			return claim{Path: path, Ino: ino, SDev: fmt.Sprintf("%d:%d", m.Major, m.Minor), Device: "sdzz"}
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "mnt", "LEFT")
			state := filepath.Join(dir, "state")
			if err := os.MkdirAll(state, 0o700); err != nil {
				t.Fatal(err)
			}
			c := tt.setup(t, path)
			r := &record{Boot: tt.boot, Claims: []claim{c, {Path: "relative"}, {Path: "/"}, {Path: "/a/../b"}}, file: filepath.Join(state, recordFile)}
			if err := r.save(); err != nil {
				t.Fatal(err)
			}
			err := Once(t.Context(), DriveConfig{Mount: filepath.Join(dir, "mnt"), StateDir: state, RunDir: filepath.Join(dir, "run")}, DriveEvents{
				Failed: func(err error) { t.Error(err) },
			}, func(context.Context, *Drives) error { return nil })
			if err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(path); (err == nil) != tt.stays {
				t.Errorf("afterwards: %v", err)
			}
			after, err := loadRecord(state)
			if err != nil || len(after.Claims) != 0 || after.Boot != boot {
				t.Errorf("record %+v, %v", after, err)
			}
		})
	}
}

func mkdir(t *testing.T, path string, inode func(*testing.T, string) uint64) uint64 {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return inode(t, path)
}

// TestTornState starts with files that a bad disk has damaged.
func TestTornState(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{namesFile, recordFile} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(`{"Boot":`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var failed []error
	err := Once(t.Context(), DriveConfig{Mount: filepath.Join(dir, "mnt"), StateDir: dir, RunDir: filepath.Join(dir, "run")},
		DriveEvents{Failed: func(err error) { failed = append(failed, err) }},
		func(context.Context, *Drives) error { return nil })
	if err != nil || len(failed) != 2 {
		t.Errorf("%v, told %v", err, failed)
	}
}

// TestFrozenDev runs the daemon in a namespace whose /dev gains no devices.
func TestFrozenDev(t *testing.T) {
	dir := t.TempDir()
	s := newSlot(t)
	cfg := DriveConfig{Also: []string{s.name}, Mount: filepath.Join(dir, "mnt"), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")}
	c := startChild(t, cfg, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, "IDE49_TEST_FROZEN=1")
	c.wait(s.name, DriveEmpty)
	s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "FROZEN"))
	d := c.wait(s.name, DriveMounted)
	if d.Path != filepath.Join(dir, "mnt", "FROZEN") {
		t.Errorf("%+v", d)
	}
	if _, err := os.Stat(filepath.Join("/proc", fmt.Sprint(c.Process.Pid), "root", d.Path, "lost+found")); err != nil {
		t.Error(err)
	}
	c.end(unix.SIGTERM)
	for _, left := range []string{d.Path, filepath.Join(dir, "run", "dev")} {
		if _, err := os.Lstat(left); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", left, err)
		}
	}
}

func TestOnce(t *testing.T) {
	dir := t.TempDir()
	a, b := newSlot(t), newSlot(t)
	cfg := DriveConfig{Mount: filepath.Join(dir, "mnt"), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")}
	a.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "ONE"))
	b.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "TWO"))
	cfg.Also = []string{a.name, b.name}
	at := filepath.Join(dir, "elsewhere", "x")
	var got Drive
	err := Once(t.Context(), cfg, DriveEvents{}, func(ctx context.Context, d *Drives) (err error) {
		if err := Once(ctx, cfg, DriveEvents{}, nil); !errors.Is(err, ErrDrivesBusy) {
			t.Errorf("a second one meanwhile: %v", err)
		}
		got, err = d.Mount(ctx, "/dev/"+a.name, DriveMountOptions{At: at, ReadOnly: true})
		if other, ferr := d.Find(b.name); ferr != nil || other.State == DriveMounted {
			t.Errorf("the other drive: %+v, %v", other, ferr)
		}
		if _, err := d.Mount(ctx, a.name, DriveMountOptions{}); err == nil || !strings.Contains(err.Error(), "already") {
			t.Errorf("mounted twice: %v", err)
		}
		if _, err := d.Mount(ctx, "nosuch", DriveMountOptions{}); !errors.Is(err, ErrNoDrive) {
			t.Errorf("mounting nothing: %v", err)
		}
		if _, err := d.Mount(ctx, a.name, DriveMountOptions{At: "x/../y"}); err == nil {
			t.Error("mounted at a relative path")
		}
		return err
	})
	if err != nil || got.Path != at || !got.ReadOnly || got.State != DriveMounted {
		t.Fatalf("%+v, %v", got, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	if err := got.Plugging.Check(at); err != nil {
		t.Errorf("after Once: %v", err)
	}
	record, rerr := os.ReadFile(filepath.Join(cfg.StateDir, recordFile))
	list, err := Present(t.Context(), cfg)
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	if d, err := findDrive(list, a.name); err != nil || d.State != DriveMounted || d.Path != at || d.Label != "ONE" || d.Used == 0 {
		t.Errorf("%+v, %v", d, err)
	}
	if d, err := findDrive(list, b.name); err != nil || d.State != DriveReady || d.Path != "" || d.Label != "TWO" || d.Name != "TWO" {
		t.Errorf("%+v, %v", d, err)
	}
	if after, err := os.ReadFile(filepath.Join(cfg.StateDir, recordFile)); rerr != nil || err != nil || string(after) != string(record) {
		t.Errorf("looking changed the record: %s, before %s, %v, %v", after, record, rerr, err)
	}
	err = Once(t.Context(), cfg, DriveEvents{}, func(ctx context.Context, d *Drives) error {
		e, err := d.Eject(ctx, "x", EjectOptions{})
		if !e.Safe {
			t.Errorf("%+v", e)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(at); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}
