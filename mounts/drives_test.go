package mounts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// A fleet runs Drives over loop devices of one test.
type fleet struct {
	*Drives
	t    *testing.T
	root string // mount folder

	mu      sync.Mutex
	changed []Drive
	removed []Drive
	losses  []Loss
	failed  []error
}

// needTools ends the test when a program is missing.
func needTools(t *testing.T, tools ...string) {
	t.Helper()
	packages := map[string]string{
		"mkfs.xfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "mkfs.vfat": "dosfstools", "fsck.vfat": "dosfstools",
		"mkfs.exfat": "exfatprogs", "fsck.exfat": "exfatprogs", "mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs",
		"blkid": "util-linux", "losetup": "mount", "partx": "util-linux", "cryptsetup": "cryptsetup-bin",
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: apt-get install %s", tool, packages[tool])
		}
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// image makes a file of a size in MiB with a file system on it.
func image(t *testing.T, mib int, mkfs ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "drive.img")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(mib) << 20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if len(mkfs) > 0 {
		run(t, mkfs[0], append(mkfs[1:], file)...)
	}
	return file
}

// A slot is a loop device of this test alone: it is made for the test, so no
// other test or program that runs meanwhile takes it.
type slot struct {
	t    *testing.T
	n    int
	name string // kernel name
}

func newSlot(t *testing.T) *slot {
	t.Helper()
	needTools(t, "losetup", "partx")
	s := &slot{t: t, n: -1}
	for n := 100 + os.Getpid()%1000*8; s.n < 0; n++ {
		if got, err := loopControl(unix.LOOP_CTL_ADD, n); err == nil {
			s.n = got
		} else if err != unix.EEXIST {
			t.Fatalf("making a loop device: %v", err)
		}
	}
	s.name = fmt.Sprintf("loop%d", s.n)
	t.Cleanup(func() {
		s.pull()
		// Whoever makes a mount namespace meanwhile, as another test may, keeps
		// what is mounted in ours for a moment.
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			_, err := loopControl(unix.LOOP_CTL_REMOVE, s.n)
			if err == nil {
				break
			}
			if err != unix.EBUSY || time.Now().After(deadline) {
				t.Errorf("removing %s: %v", s.name, err)
				break
			}
		}
	})
	return s
}

func loopControl(request uint, n int) (int, error) {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(n))
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func (s *slot) node() string { return "/dev/" + s.name }

// plug attaches an image. The kernel tells it by a change event.
func (s *slot) plug(file string, flags ...string) {
	s.t.Helper()
	run(s.t, "losetup", append(flags, s.node(), file)...)
}

// pull detaches the image, if there is one.
func (s *slot) pull() {
	s.t.Helper()
	if _, err := os.Stat("/sys/block/" + s.name + "/loop/backing_file"); err != nil {
		return
	}
	parts, err := filepath.Glob("/sys/block/" + s.name + "/" + s.name + "p*")
	if err == nil && len(parts) > 0 {
		run(s.t, "partx", "-d", s.node())
	}
	run(s.t, "losetup", "--detach", s.node())
}

// newFleet starts Drives for the devices in also, and stops it at the end of
// the test.
func newFleet(t *testing.T, cfg DriveConfig) *fleet {
	t.Helper()
	return newFleetAt(t, cfg, udev.Sysfs)
}

// newFleetAt starts Drives with a sysfs of the test's own.
func newFleetAt(t *testing.T, cfg DriveConfig, sysfs string) *fleet {
	t.Helper()
	needTools(t, "blkid")
	dir := t.TempDir()
	if cfg.Mount == "" {
		cfg.Mount = filepath.Join(dir, "mnt")
	}
	if cfg.StateDir == "" {
		cfg.StateDir = filepath.Join(dir, "state")
	}
	cfg.RunDir = filepath.Join(dir, "run")
	f := &fleet{t: t, root: cfg.Mount}
	d, err := NewDrives(cfg, DriveEvents{
		Changed: func(d Drive) { f.note(func() { f.changed = append(f.changed, d) }) },
		Removed: func(d Drive, l Loss) {
			f.note(func() { f.removed, f.losses = append(f.removed, d), append(f.losses, l) })
		},
		Failed: func(err error) { f.note(func() { f.failed = append(f.failed, err) }) },
	})
	if err != nil {
		t.Fatal(err)
	}
	d.sysfs = sysfs
	f.Drives = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("Run did not end")
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, err := range f.failed {
			t.Errorf("failed: %v", err)
		}
	})
	return f
}

func (f *fleet) note(g func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g()
}

// wait polls until a device is in a state.
func (f *fleet) wait(device string, state DriveState) Drive {
	f.t.Helper()
	return f.waitFor(device, string(state), func(d Drive) bool { return d.State == state })
}

func (f *fleet) waitFor(device, what string, ok func(Drive) bool) Drive {
	f.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		d, err := f.Find(device)
		if err == nil && ok(d) {
			return d
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%s is not %s: %+v, %v", device, what, d, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// waitGone polls until a device is not listed any more and nothing is left.
func (f *fleet) waitGone(device, path string) {
	f.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		d, err := f.Find(device)
		if d.State == DriveEmpty { // a loop device without a file stays there
			err = ErrNoDrive
		}
		_, serr := os.Lstat(path)
		if err != nil && os.IsNotExist(serr) {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%s is still there: list %v, folder %v", device, err, serr)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestMountAndRemove(t *testing.T) {
	needTools(t, "mkfs.ext4")
	file := image(t, 8, "mkfs.ext4", "-q", "-L", "BACKUP")
	s := newSlot(t)
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	f.wait(s.name, DriveEmpty)
	s.plug(file)
	d := f.wait(s.name, DriveMounted)
	if want := filepath.Join(f.root, "BACKUP"); d.Path != want || d.Name != "BACKUP" {
		t.Errorf("mounted at %s, want %s", d.Path, want)
	}
	if err := os.WriteFile(filepath.Join(d.Path, "a"), []byte("a"), 0o600); err != nil {
		t.Error(err)
	}
	if err := d.Plugging.Check(filepath.Join(d.Path, "a")); err != nil {
		t.Error(err)
	}
	// Somebody unmounts it: it stays so until it is plugged in again.
	if err := unix.Unmount(d.Path, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Plugging.Check(d.Path); !errors.Is(err, ErrNotOnDrive) {
		t.Errorf("Check after umount: %v", err)
	}
	if err := d.Plugging.Alive(); err != nil {
		t.Errorf("Alive after umount: %v", err)
	}
	f.poke(s.name)
	f.wait(s.name, DriveEjected)
	s.pull()
	f.waitGone(s.name, d.Path)
	if err := d.Plugging.Alive(); !errors.Is(err, ErrDriveGone) {
		t.Errorf("Alive after pull: %v", err)
	}
	s.plug(file)
	if again := f.wait(s.name, DriveMounted); again.Path != d.Path {
		t.Errorf("mounted again at %s, before at %s", again.Path, d.Path)
	}
	if err := d.Plugging.Check(d.Path); !errors.Is(err, ErrDriveGone) {
		t.Errorf("the handle of the plugging before says %v", err)
	}
}

// poke makes the kernel send an event about a device.
func (f *fleet) poke(name string) {
	f.t.Helper()
	if err := os.WriteFile("/sys/class/block/"+name+"/uevent", []byte("change"), 0); err != nil {
		f.t.Fatal(err)
	}
}
