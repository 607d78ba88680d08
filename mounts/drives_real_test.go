package mounts

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

// optionsAt returns the options of the mount at a path, per mount and of the
// file system.
func optionsAt(t *testing.T, path string) (fstype string, options []string) {
	t.Helper()
	table, err := mountsOf("/proc", "self")
	if err != nil {
		t.Fatal(err)
	}
	m := topMount(table, path)
	if m == nil {
		t.Fatalf("nothing is mounted at %s", path)
	}
	return m.FSType, append(strings.Split(m.Options, ","), strings.Split(m.VFSOptions, ",")...)
}

func TestFileSystems(t *testing.T) {
	for _, tt := range []struct {
		fstype  string
		mib     int
		mkfs    []string
		options []string
	}{
		{"ext4", 16, []string{"mkfs.ext4", "-q", "-L", "four"}, []string{"errors=remount-ro"}},
		{"ext2", 8, []string{"mkfs.ext2", "-q", "-L", "two"}, []string{"errors=remount-ro"}},
		{"xfs", 300, []string{"mkfs.xfs", "-q", "-L", "ex"}, nil},
		{"btrfs", 120, []string{"mkfs.btrfs", "-q", "-L", "butter fs"}, nil},
	} {
		t.Run(tt.fstype, func(t *testing.T) {
			t.Parallel()
			needTools(t, tt.mkfs[0])
			s := newSlot(t)
			s.plug(image(t, tt.mib, tt.mkfs...))
			f := newFleet(t, DriveConfig{Also: []string{s.name}})
			d := f.wait(s.name, DriveMounted)
			if d.Type != tt.fstype || d.UUID == "" || d.ReadOnly || d.Reason != "" || d.Note != "" || d.Path != filepath.Join(f.root, d.Label) {
				t.Errorf("%+v", d)
			}
			if d.Size != int64(tt.mib)<<20 || d.Free <= 0 || d.Used+d.Free > d.Size {
				t.Errorf("size %d used %d free %d", d.Size, d.Used, d.Free)
			}
			fstype, options := optionsAt(t, d.Path)
			if fstype != tt.fstype {
				t.Errorf("mounted as %s", fstype)
			}
			for _, o := range append(tt.options, "nosuid", "nodev", "noexec", "noatime", "rw") {
				if !slices.Contains(options, o) {
					t.Errorf("option %s is missing in %v", o, options)
				}
			}
			file := filepath.Join(d.Path, "file")
			if err := os.WriteFile(file, []byte("content"), 0o644); err != nil {
				t.Error(err)
			}
			for _, path := range []string{d.Path, file} {
				if err := d.Plugging.Check(path); err != nil {
					t.Error(err)
				}
			}
			if err := d.Plugging.Check(filepath.Dir(d.Path)); !errors.Is(err, ErrNotOnDrive) {
				t.Errorf("Check of the folder above: %v", err)
			}
			if err := d.Plugging.Check(filepath.Join(d.Path, "nosuch")); !errors.Is(err, ErrNotOnDrive) {
				t.Errorf("Check of nothing: %v", err)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "a/b =\n.x"))
	f := newFleet(t, DriveConfig{Also: []string{s.name}, Options: DriveOptions{Exec: true, ReadOnly: true}})
	d := f.wait(s.name, DriveMounted)
	if d.Path != filepath.Join(f.root, "a_b =_.x") || d.Label != "a/b =\ufffd.x" || !d.ReadOnly {
		t.Errorf("%+v", d)
	}
	if _, options := optionsAt(t, d.Path); slices.Contains(options, "noexec") || !slices.Contains(options, "ro") {
		t.Errorf("options %v", options)
	}
	if err := os.WriteFile(filepath.Join(d.Path, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing: %v", err)
	}
}

// dirty copies the image of a mounted file system, as a power cut leaves it.
func dirty(t *testing.T, mkfs ...string) string {
	t.Helper()
	file := image(t, 16, mkfs...)
	dir := t.TempDir()
	run(t, "mount", "-o", "loop", file, dir)
	var err error
	for i := range 20 {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), bytes.Repeat([]byte("x"), 5000), 0o600))
	}
	unix.Sync()
	copied := filepath.Join(t.TempDir(), "dirty.img")
	data, rerr := os.ReadFile(file)
	err = errors.Join(err, rerr, os.WriteFile(copied, data, 0o600))
	run(t, "umount", dir)
	if err != nil {
		t.Fatal(err)
	}
	return copied
}

func TestReadOnlyMedia(t *testing.T) {
	for _, tt := range []struct {
		name string
		file func(t *testing.T) string
	}{
		{"clean", func(t *testing.T) string { return image(t, 16, "mkfs.ext4", "-q") }},
		{"dirty", func(t *testing.T) string { return dirty(t, "mkfs.ext4", "-q") }},
		{"dirty xfs", func(t *testing.T) string {
			file := image(t, 300, "mkfs.xfs", "-q")
			dir := t.TempDir()
			run(t, "mount", "-o", "loop", file, dir)
			if err := os.WriteFile(filepath.Join(dir, "x"), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			unix.Sync()
			copied := filepath.Join(t.TempDir(), "dirty.img")
			run(t, "cp", "--sparse=always", file, copied)
			run(t, "umount", dir)
			return copied
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := tt.file(t)
			before, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := newSlot(t)
			s.plug(file, "--read-only")
			f := newFleet(t, DriveConfig{Also: []string{s.name}})
			d := f.wait(s.name, DriveMounted)
			if !d.ReadOnly || !strings.Contains(d.Reason, "read-only") {
				t.Errorf("%+v", d)
			}
			if e, err := f.Eject(t.Context(), s.name, EjectOptions{}); err != nil || !e.Safe {
				t.Errorf("%+v, %v", e, err)
			}
			after, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(before, after) {
				t.Errorf("the medium was written (%v)", err)
			}
		})
	}
}

func TestDirtyIsChecked(t *testing.T) {
	needTools(t, "e2fsck", "mkfs.ext4")
	file := dirty(t, "mkfs.ext4", "-q")
	s := newSlot(t)
	s.plug(file)
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	d := f.wait(s.name, DriveMounted)
	if d.ReadOnly || d.Reason != "" {
		t.Errorf("%+v", d)
	}
	if entries, err := os.ReadDir(d.Path); err != nil || len(entries) != 21 {
		t.Errorf("%d entries, %v", len(entries), err)
	}
}

// fileWith makes a file beside an image and returns the image.
func fileWith(t *testing.T, image, content string) string {
	t.Helper()
	if err := os.WriteFile(image+".txt", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return image
}

// TestFaultyIsReadOnly damages a file system so that e2fsck wants to ask.
func TestFaultyIsReadOnly(t *testing.T) {
	needTools(t, "e2fsck", "mkfs.ext2", "debugfs")
	file := image(t, 8, "mkfs.ext2", "-q")
	// Two files that claim the same block are nothing to decide by itself.
	run(t, "debugfs", "-w", "-R", "write "+file+".txt a", fileWith(t, file, "one"))
	run(t, "debugfs", "-w", "-R", "write "+file+".txt b", file)
	block := run(t, "debugfs", "-R", "bmap b 0", file)
	block = block[strings.LastIndexByte(block, '\n')+1:]
	run(t, "debugfs", "-w", "-R", "set_inode_field a block[0] "+block, file)
	run(t, "debugfs", "-w", "-R", "set_super_value state 2", file)
	s := newSlot(t)
	s.plug(file)
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	d := f.wait(s.name, DriveMounted)
	if !d.ReadOnly || !strings.Contains(d.Reason, "faults that it does not repair") || !strings.Contains(d.Remedy, "by hand") {
		t.Errorf("%+v", d)
	}
}

func TestDirtyMarks(t *testing.T) {
	needTools(t, "mkfs.vfat", "mkfs.exfat", "fsck.vfat", "fsck.exfat")
	for _, tt := range []struct {
		name string
		mib  int
		mkfs []string
		at   int64
		bit  byte
	}{
		{"exfat", 8, []string{"mkfs.exfat"}, 106, 2},
		{"vfat", 40, []string{"mkfs.vfat", "-F", "32"}, 0x41, 1},
		{"vfat", 20, []string{"mkfs.vfat", "-F", "16"}, 0x25, 1},
		{"vfat", 4, []string{"mkfs.vfat", "-F", "12"}, 0x25, 1},
		{"ext4", 8, []string{"mkfs.ext4", "-q"}, 1024 + 0x60, 4},
		{"ext2", 8, []string{"mkfs.ext2", "-q"}, 1024 + 0x3a, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := image(t, tt.mib, tt.mkfs...)
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c := checkers[tt.name]
			if is, err := c.dirty(f); is || err != nil {
				t.Fatalf("new: dirty %v, %v", is, err)
			}
			var b [1]byte
			if _, err := f.ReadAt(b[:], tt.at); err != nil {
				t.Fatal(err)
			}
			b[0] |= tt.bit
			if _, err := f.WriteAt(b[:], tt.at); err != nil {
				t.Fatal(err)
			}
			if is, err := c.dirty(f); !is || err != nil {
				t.Errorf("marked: dirty %v, %v", is, err)
			}
			if tt.name == "ext4" {
				return // a journal feature without a journal to replay is a fault of the test
			}
			if why := checkFileSystem(t.Context(), file, tt.name, time.Minute); why != "" {
				t.Error(why)
			}
			if is, err := c.dirty(f); is || err != nil {
				t.Errorf("checked: dirty %v, %v", is, err)
			}
		})
	}
	for name, c := range checkers {
		if is, err := c.dirty(bytes.NewReader(make([]byte, 100))); is || !errors.Is(err, io.EOF) {
			t.Errorf("%s: too short: %v, %v", name, is, err)
		}
	}
	if is, err := extDirty(bytes.NewReader(make([]byte, 4096))); is || err == nil {
		t.Errorf("no superblock: %v, %v", is, err)
	}
}

func TestCheckEndsInTime(t *testing.T) {
	needTools(t, "e2fsck")
	file := image(t, 8, "mkfs.ext2", "-q")
	run(t, "debugfs", "-w", "-R", "set_super_value state 2", file)
	why := checkFileSystem(t.Context(), file, "ext2", time.Nanosecond)
	if !strings.Contains(why, "longer than 1ns") {
		t.Errorf("%q", why)
	}
}

func TestSameLabel(t *testing.T) {
	a, b := newSlot(t), newSlot(t)
	fileA, fileB := image(t, 8, "mkfs.ext4", "-q", "-L", "DATA"), image(t, 8, "mkfs.ext4", "-q", "-L", "DATA")
	dir := t.TempDir()
	cfg := DriveConfig{Also: []string{a.name, b.name}, Mount: filepath.Join(dir, "mnt"), StateDir: filepath.Join(dir, "state")}
	t.Run("first", func(t *testing.T) {
		f := newFleet(t, cfg)
		a.plug(fileA)
		f.wait(a.name, DriveMounted)
		b.plug(fileB)
		if d := f.wait(b.name, DriveMounted); d.Path != filepath.Join(f.root, "DATA-2") {
			t.Errorf("second at %s", d.Path)
		}
		if _, err := f.Find("DATA"); err != nil {
			t.Errorf("a folder name must be found although two drives have it as a label: %v", err)
		}
	})
	a.pull()
	b.pull()
	t.Run("the other way round", func(t *testing.T) {
		f := newFleet(t, cfg)
		a.plug(fileB)
		if d := f.wait(a.name, DriveMounted); d.Path != filepath.Join(f.root, "DATA-2") {
			t.Errorf("second drive alone at %s", d.Path)
		}
		b.plug(fileA)
		if d := f.wait(b.name, DriveMounted); d.Path != filepath.Join(f.root, "DATA") {
			t.Errorf("first drive at %s", d.Path)
		}
	})
}

func TestSameUUID(t *testing.T) {
	a, b := newSlot(t), newSlot(t)
	file := image(t, 8, "mkfs.ext4", "-q", "-L", "CLONE")
	cloned := filepath.Join(t.TempDir(), "clone.img")
	run(t, "cp", file, cloned)
	f := newFleet(t, DriveConfig{Also: []string{a.name, b.name}})
	a.plug(file)
	f.wait(a.name, DriveMounted)
	b.plug(cloned)
	if d := f.wait(b.name, DriveFailed); !strings.Contains(d.Reason, "same UUID as "+a.name) || d.Remedy == "" {
		t.Errorf("%+v", d)
	}
	if _, err := f.Eject(t.Context(), a.name, EjectOptions{}); err != nil {
		t.Fatal(err)
	}
	a.pull()
	f.poke(a.name)
	f.wait(b.name, DriveMounted)
}

func TestPartitions(t *testing.T) {
	needTools(t, "partx")
	s := newSlot(t)
	file := image(t, 32)
	one, two := image(t, 8, "mkfs.ext4", "-q", "-L", "ONE"), image(t, 8, "mkfs.ext4", "-q")
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	table := make([]byte, 512)
	entry := func(i int, kind byte, start, count uint32) {
		e := table[446+16*i:]
		e[4] = kind
		binary.LittleEndian.PutUint32(e[8:], start)
		binary.LittleEndian.PutUint32(e[12:], count)
	}
	entry(0, 0x83, 2048, 16384)
	entry(1, 0x83, 18432, 16384)
	entry(2, 0x82, 34816, 16384)
	copy(table[440:], "disk") // its number, of which the partitions' are made
	table[510], table[511] = 0x55, 0xaa
	_, err = f.WriteAt(table, 0)
	for start, part := range map[int64]string{2048: one, 18432: two} {
		data, rerr := os.ReadFile(part)
		_, werr := f.WriteAt(data, start*512)
		err = errors.Join(err, rerr, werr)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	s.plug(file)
	fl := newFleet(t, DriveConfig{Also: []string{s.name}})
	// This kernel reads no partition tables by itself.
	if d := fl.wait(s.name, DriveLeft); !strings.Contains(d.Reason, "sees no partition") {
		t.Errorf("%+v", d)
	}
	run(t, "partx", "-a", s.node())
	p := s.name + "p"
	if d := fl.wait(p+"1", DriveMounted); d.Path != filepath.Join(fl.root, "ONE") || d.Disk != s.name || d.PartUUID == "" {
		t.Errorf("%+v", d)
	}
	if d := fl.wait(p+"2", DriveMounted); !strings.HasPrefix(d.Name, "drive-") {
		t.Errorf("%+v", d)
	}
	if d := fl.wait(p+"3", DriveLeft); !strings.Contains(d.Reason, "nothing that can be mounted") {
		t.Errorf("%+v", d)
	}
	if d, err := fl.Find(s.name); err == nil {
		t.Errorf("the disk is shown beside its partitions: %+v", d)
	}
	e, err := fl.Eject(t.Context(), "ONE", EjectOptions{})
	if err != nil || !e.Safe || len(e.Drives) != 2 || e.Disk != s.name || e.Power {
		t.Errorf("%+v, %v", e, err)
	}
	for _, n := range []string{"1", "2"} {
		if d := fl.wait(p+n, DriveEjected); d.Path != "" {
			t.Errorf("%+v", d)
		}
	}
	if entries, err := os.ReadDir(fl.root); err != nil || len(entries) != 0 {
		t.Errorf("folders are left: %v, %v", entries, err)
	}
	// A person may ask for one of them again.
	if d, err := fl.Mount(t.Context(), "/dev/"+p+"2", DriveMountOptions{ReadOnly: true}); err != nil || d.State != DriveMounted || !d.ReadOnly {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestEjectBusy(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "BUSY"))
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	d := f.wait(s.name, DriveMounted)
	sleeper := exec.Command("sleep", "60")
	sleeper.Dir = d.Path
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = sleeper.Process.Kill(), sleeper.Wait() }()

	var busy *InUseError
	if _, err := f.Eject(t.Context(), "BUSY", EjectOptions{}); !errors.As(err, &busy) || !errors.Is(err, unix.EBUSY) {
		t.Fatalf("eject of a busy drive: %v", err)
	}
	if !slices.ContainsFunc(busy.Holders, func(h Holder) bool {
		return h.PID == sleeper.Process.Pid && h.Command == "sleep" && h.What == "working folder" && h.Path == d.Path
	}) {
		t.Errorf("holders %v", busy.Holders)
	}
	if d := f.wait(s.name, DriveMounted); d.Path == "" {
		t.Errorf("%+v", d)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	if _, err := f.Eject(ctx, "BUSY", EjectOptions{Wait: true}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a busy drive: %v", err)
	}
	cancel()
	f.wait(s.name, DriveMounted)

	told := false
	e, err := f.Eject(t.Context(), "BUSY", EjectOptions{Wait: true, Progress: func(p EjectProgress) {
		if p.Step == StepWait && !told {
			told = true
			if len(p.Holders) == 0 {
				t.Error("no holders while waiting")
			}
			_ = sleeper.Process.Kill()
			_ = sleeper.Wait()
		}
	}})
	if err != nil || !e.Safe || !told {
		t.Errorf("%+v, %v, told %v", e, err, told)
	}
	if err := d.Plugging.Check(d.Path); !errors.Is(err, ErrNotOnDrive) {
		t.Errorf("Check after eject: %v", err)
	}
	if _, err := f.Eject(t.Context(), "nosuch", EjectOptions{}); !errors.Is(err, ErrNoDrive) {
		t.Errorf("eject of nothing: %v", err)
	}
}

// inNamespace starts a process that has a mount namespace of its own, cut off
// from ours.
func inNamespace(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", "mount --make-rprivate / && "+script+" && echo ready && exec sleep 60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
	if b := make([]byte, 6); true {
		if _, err := io.ReadFull(out, b); err != nil || string(b) != "ready\n" {
			t.Fatalf("namespace: %q, %v", b, err)
		}
	}
	return cmd
}

// TestEjectElsewhere has another namespace keep a copy of the mount, as a
// container without propagation that was started meanwhile does.
func TestEjectElsewhere(t *testing.T) {
	for _, busy := range []bool{false, true} {
		s := newSlot(t)
		s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "SHARED"))
		f := newFleet(t, DriveConfig{Also: []string{s.name}})
		d := f.wait(s.name, DriveMounted)
		script := "true"
		if busy {
			script = "cd " + d.Path
		}
		other := inNamespace(t, script)
		e, err := f.Eject(t.Context(), "SHARED", EjectOptions{})
		if err != nil || e.Safe == busy {
			t.Errorf("busy elsewhere %v: %+v, %v", busy, e, err)
		}
		// An idle copy goes with the folder; a busy one is told.
		if busy && !strings.Contains(e.Comment, fmt.Sprint(other.Process.Pid)) {
			t.Errorf("comment %q", e.Comment)
		}
		_, _ = other.Process.Kill(), other.Wait()
	}
}

func TestMountedElsewhere(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "SHARED"))
	dir := t.TempDir()
	inNamespace(t, "mount "+s.node()+" "+dir)
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	d := f.wait(s.name, DriveMounted)
	if !strings.Contains(d.Note, "in use elsewhere") || !strings.Contains(d.Note, dir) {
		t.Errorf("note %q", d.Note)
	}
}

func TestSystemDiskIsLeftAlone(t *testing.T) {
	s := newSlot(t)
	file := image(t, 8, "mkfs.ext4", "-q")
	s.plug(file)
	dir := t.TempDir()
	run(t, "mount", s.node(), dir)
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	d := f.wait(s.name, DriveLeft)
	if !strings.Contains(d.Reason, "is mounted at "+dir) {
		t.Errorf("%+v", d)
	}
	if _, err := f.Mount(t.Context(), s.name, DriveMountOptions{}); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("Mount: %v", err)
	}
	if _, err := f.Eject(t.Context(), s.name, EjectOptions{}); err == nil || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("Eject: %v", err)
	}
	run(t, "umount", dir)
	f.poke(s.name)
	f.wait(s.name, DriveMounted)
}

func TestFolderInTheWay(t *testing.T) {
	s := newSlot(t)
	file := image(t, 8, "mkfs.ext4", "-q", "-L", "DATA")
	dir := t.TempDir()
	mnt := filepath.Join(dir, "mnt")
	// Docker makes an empty folder when a container binds a drive that is not
	// there: it is used, and never removed.
	if err := os.MkdirAll(filepath.Join(mnt, "DATA"), 0o755); err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, DriveConfig{Also: []string{s.name}, Mount: mnt})
	s.plug(file)
	d := f.wait(s.name, DriveMounted)
	if d.Path != filepath.Join(mnt, "DATA") {
		t.Errorf("mounted at %s", d.Path)
	}
	if _, err := f.Eject(t.Context(), s.name, EjectOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(mnt, "DATA")); err != nil {
		t.Errorf("the folder that was there before: %v", err)
	}
	s.pull()
	f.wait(s.name, DriveEmpty)
	if err := os.WriteFile(filepath.Join(mnt, "DATA", "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc", filepath.Join(mnt, "DATA-2")); err != nil {
		t.Fatal(err)
	}
	s.plug(file)
	if d := f.wait(s.name, DriveMounted); d.Path != filepath.Join(mnt, "DATA-3") || d.Name != "DATA-3" {
		t.Errorf("mounted at %s", d.Path)
	}
}

// A sysTree is a sysfs of the test's own. It describes a real device that can
// be pulled out there at any moment, which loop devices can't.
type sysTree struct {
	t    *testing.T
	root string
}

func newSysTree(t *testing.T) *sysTree {
	t.Helper()
	s := &sysTree{t, t.TempDir()}
	for _, dir := range []string{"class/block", "dev/block", "devices"} {
		if err := os.MkdirAll(filepath.Join(s.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *sysTree) plug(d udev.Device, seq int) {
	s.t.Helper()
	path := "devices/pci0/usb1/1-1/block/" + d.Name
	dir := filepath.Join(s.root, path)
	files := map[string]string{
		"uevent": fmt.Sprintf("MAJOR=%d\nMINOR=%d\nDEVNAME=%s\nDEVTYPE=disk\n", d.Major, d.Minor, d.Name),
		"size":   fmt.Sprint(d.Size / 512), "ro": "0", "diskseq": fmt.Sprint(seq), "removable": "0",
	}
	err := os.MkdirAll(dir, 0o755)
	for name, content := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte(content+"\n"), 0o644))
	}
	err = errors.Join(err, os.Symlink("../../"+path, filepath.Join(s.root, "dev/block", d.Dev())),
		os.Symlink("../../"+path, filepath.Join(s.root, "class/block", d.Name)))
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *sysTree) pull(d udev.Device) {
	s.t.Helper()
	if err := errors.Join(os.Remove(filepath.Join(s.root, "class/block", d.Name)), os.Remove(filepath.Join(s.root, "dev/block", d.Dev())),
		os.RemoveAll(filepath.Join(s.root, "devices/pci0"))); err != nil {
		s.t.Fatal(err)
	}
}

func TestPulledOut(t *testing.T) {
	for _, tt := range []struct {
		name string
		busy bool
	}{{"idle", false}, {"busy", true}} {
		t.Run(tt.name, func(t *testing.T) {
			slot := newSlot(t)
			slot.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "GONE"))
			dev, err := udev.Read(udev.Sysfs, slot.name)
			if err != nil {
				t.Fatal(err)
			}
			sys := newSysTree(t)
			f := newFleetAt(t, DriveConfig{}, sys.root)
			sys.plug(dev, 5)
			f.poke(slot.name)
			d := f.wait(slot.name, DriveMounted)
			if tt.busy {
				file, err := os.Create(filepath.Join(d.Path, "open"))
				if err != nil {
					t.Fatal(err)
				}
				defer file.Close()
			}
			sys.pull(dev)
			if err := d.Plugging.Alive(); !errors.Is(err, ErrDriveGone) {
				t.Errorf("Alive: %v", err)
			}
			begin := time.Now()
			f.poke(slot.name)
			f.waitGone(slot.name, d.Path)
			if took := time.Since(begin); took > time.Second {
				t.Errorf("gone after %v", took)
			}
			if entries, err := os.ReadDir(f.root); err != nil || len(entries) != 0 {
				t.Errorf("left: %v, %v", entries, err)
			}
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
				f.mu.Lock()
				if len(f.removed) > 0 || time.Now().After(deadline) {
					break
				}
				f.mu.Unlock()
			}
			if len(f.removed) != 1 || f.removed[0].Name != "GONE" || f.removed[0].Path != d.Path {
				t.Errorf("told: %+v", f.removed)
			}
			f.mu.Unlock()
			// Plugged in again, by the same name, as another plugging.
			sys.plug(dev, 6)
			f.poke(slot.name)
			if again := f.wait(slot.name, DriveMounted); again.Path != d.Path || again.Plugging.DiskSeq != 6 {
				t.Errorf("again: %+v", again)
			}
			if err := d.Plugging.Alive(); !errors.Is(err, ErrDriveGone) {
				t.Errorf("the handle of the plugging before says %v", err)
			}
		})
	}
}

// TestReplacedAtOnce changes the medium without any moment in which none was
// there: only its number tells.
func TestReplacedAtOnce(t *testing.T) {
	a, b := newSlot(t), newSlot(t)
	a.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "ONE"))
	b.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "TWO"))
	dev, err := udev.Read(udev.Sysfs, a.name)
	if err != nil {
		t.Fatal(err)
	}
	sys := newSysTree(t)
	sys.plug(dev, 5)
	f := newFleetAt(t, DriveConfig{}, sys.root)
	d := f.wait(a.name, DriveMounted)
	if err := os.WriteFile(filepath.Join(sys.root, "devices/pci0/usb1/1-1/block", a.name, "diskseq"), []byte("6\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := d.Plugging.Check(d.Path); !errors.Is(err, ErrDriveGone) {
		t.Errorf("Check: %v", err)
	}
	f.poke(a.name)
	again := f.waitFor(a.name, "mounted anew", func(d Drive) bool { return d.State == DriveMounted && d.Plugging.DiskSeq == 6 })
	if err := again.Plugging.Check(again.Path); err != nil {
		t.Error(err)
	}
}

func TestStorm(t *testing.T) {
	s := newSlot(t)
	files := []string{image(t, 8, "mkfs.ext4", "-q", "-L", "ONE"), image(t, 8, "mkfs.ext4", "-q", "-L", "TWO")}
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	for i := range 20 {
		s.plug(files[i%2])
		// 3,000 events in all, most of them while it is probed or mounted.
		for range 150 {
			f.poke(s.name)
		}
		d := f.wait(s.name, DriveMounted)
		if want := []string{"ONE", "TWO"}[i%2]; d.Label != want || d.Path != filepath.Join(f.root, want) {
			t.Errorf("plug %d: %+v", i, d)
		}
		if err := d.Plugging.Check(d.Path); err != nil {
			t.Error(err)
		}
		if e, err := f.Eject(t.Context(), s.name, EjectOptions{}); err != nil || !e.Safe {
			t.Errorf("plug %d: %+v, %v", i, e, err)
		}
		s.pull()
	}
	f.wait(s.name, DriveEmpty)
}
