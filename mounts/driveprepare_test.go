package mounts

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/udev"
	"golang.org/x/sys/unix"
)

func TestPrepare(t *testing.T) {
	needTools(t, "mkfs.ext4", "mkfs.xfs", "partx")
	s := newSlot(t)
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	confirm := func(c Contents) (string, error) { return c.Device, nil }
	prepare := func(opt PrepareOptions) error {
		if opt.Confirm == nil {
			opt.Confirm = confirm
		}
		return f.Prepare(t.Context(), "/dev/"+s.name, opt)
	}
	refused := func(opt PrepareOptions, because string) {
		t.Helper()
		if err := prepare(opt); err == nil || !strings.Contains(err.Error(), because) {
			t.Errorf("refused with %v, want %q", err, because)
		}
	}
	refused(PrepareOptions{}, "no medium")
	s.plug(image(t, 300, "mkfs.xfs", "-q", "-L", "OLD"))
	f.wait(s.name, DriveMounted)
	refused(PrepareOptions{}, "mounted at")
	if _, err := f.Eject(t.Context(), s.name, EjectOptions{KeepPower: true}); err != nil {
		t.Fatal(err)
	}
	refused(PrepareOptions{Type: "vfat"}, "say ext4 or exfat")
	refused(PrepareOptions{Label: "a/b"}, "plain name")
	refused(PrepareOptions{Label: strings.Repeat("x", 17)}, "plain name")
	refused(PrepareOptions{Type: "exfat", Label: strings.Repeat("é", 12)}, "plain name")
	refused(PrepareOptions{Confirm: func(Contents) (string, error) { return "yes", nil }}, "type its device name")
	refused(PrepareOptions{Confirm: func(Contents) (string, error) { return "", errors.New("no, thanks") }}, "no, thanks")
	if err := prepare(PrepareOptions{Confirm: func(Contents) (string, error) { return "", nil }}); !errors.Is(err, ErrNotConfirmed) {
		t.Errorf("nothing typed: %v", err)
	}
	if err := f.Prepare(t.Context(), "nosuch", PrepareOptions{Confirm: confirm}); !errors.Is(err, ErrNoDrive) {
		t.Errorf("nothing prepared: %v", err)
	}
	if d := f.wait(s.name, DriveEjected); d.Type != "xfs" {
		t.Errorf("%+v", d)
	}
	shown := Contents{}
	err := prepare(PrepareOptions{Label: "NEW", Confirm: func(c Contents) (string, error) {
		shown = c
		return " " + strings.ToUpper(c.Device) + "\n", nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if shown.Size != 300<<20 || len(shown.Parts) != 1 || shown.Parts[0].Type != "xfs" || shown.Parts[0].Label != "OLD" || shown.Ask == "" {
		t.Errorf("shown: %+v", shown)
	}
	d := f.wait(s.name, DriveMounted)
	if d.Label != "NEW" || d.Type != "ext4" || d.Path != filepath.Join(f.root, "NEW") {
		t.Errorf("%+v", d)
	}
	// Used by somebody whom only the kernel knows.
	if _, err := f.Eject(t.Context(), s.name, EjectOptions{}); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(s.node(), unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	refused(PrepareOptions{}, "in use elsewhere")
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	// Pulled out while the person is typing, and another drive plugged in.
	refused(PrepareOptions{Confirm: func(c Contents) (string, error) {
		s.pull()
		s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "OTHER"))
		f.poke(s.name)
		f.waitFor(s.name, "replaced", func(d Drive) bool { return d.Label == "OTHER" && d.State == DriveMounted })
		return c.Device, nil
	}}, s.name)
	if d := f.wait(s.name, DriveMounted); d.Label != "OTHER" {
		t.Errorf("%+v", d)
	}
}

func TestPreparePartitioned(t *testing.T) {
	needTools(t, "mkfs.exfat", "partx")
	s := newSlot(t)
	file := image(t, 32)
	img, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var table [512]byte
	copy(table[440:], "disk\x00\x00\x00\x00\x00\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x40\x00\x00")
	table[510], table[511] = 0x55, 0xaa
	part, rerr := os.ReadFile(image(t, 8, "mkfs.ext4", "-q", "-L", "INNER"))
	_, werr := img.WriteAt(table[:], 0)
	_, werr2 := img.WriteAt(part, 2048*512)
	if err := errors.Join(rerr, werr, werr2, img.Close()); err != nil {
		t.Fatal(err)
	}
	s.plug(file)
	run(t, "partx", "-a", s.node())
	f := newFleet(t, DriveConfig{Also: []string{s.name}})
	f.wait(s.name+"p1", DriveMounted)
	if err := f.Prepare(t.Context(), s.name, PrepareOptions{}); err == nil || !strings.Contains(err.Error(), s.name+"p1 is mounted at") {
		t.Errorf("a partition is mounted: %v", err)
	}
	if _, err := f.Eject(t.Context(), "INNER", EjectOptions{}); err != nil {
		t.Fatal(err)
	}
	err = f.Prepare(t.Context(), s.name, PrepareOptions{Type: "exfat", Label: "CAM", Confirm: func(c Contents) (string, error) {
		if len(c.Parts) != 1 || c.Parts[0].Label != "INNER" || c.Parts[0].Device != s.name+"p1" {
			t.Errorf("shown: %+v", c)
		}
		return c.Device, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	// This kernel has no exFAT, so the drive is listed with that reason.
	d := f.wait(s.name, DriveFailed)
	if d.Type != "exfat" || d.Label != "CAM" || !strings.Contains(d.Reason, "no support") || d.Remedy == "" {
		t.Errorf("%+v", d)
	}
	if devices, err := udev.List(udev.Sysfs); err != nil || strings.Contains(strings.Join(deviceNames(devices), " "), s.name+"p1") {
		t.Errorf("the partition is still there: %v", err)
	}
}

func deviceNames(devices []udev.Device) []string {
	var names []string
	for _, d := range devices {
		names = append(names, d.Name)
	}
	return names
}

func TestPrepareRefusesForeign(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q"))
	dir := t.TempDir()
	run(t, "mount", s.node(), dir)
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	confirm := func(c Contents) (string, error) {
		t.Error("asked about a disk that must not be touched")
		return c.Device, nil
	}
	state := t.TempDir()
	err := Once(t.Context(), DriveConfig{Also: []string{s.name}, StateDir: state, Mount: filepath.Join(state, "mnt"), RunDir: filepath.Join(state, "run")}, DriveEvents{},
		func(ctx context.Context, d *Drives) error {
			if err := d.Prepare(ctx, s.name, PrepareOptions{Confirm: confirm}); err == nil || !strings.Contains(err.Error(), "mounted at "+dir) {
				t.Errorf("a mounted disk: %v", err)
			}
			if err := d.Prepare(ctx, "vda", PrepareOptions{Confirm: confirm}); err == nil {
				t.Error("the system's disk was not refused")
			}
			if err := d.Prepare(ctx, "loop0", PrepareOptions{Confirm: confirm}); err == nil || !strings.Contains(err.Error(), "neither on USB") {
				t.Errorf("no drive: %v", err)
			}
			return nil
		})
	if err != nil {
		t.Error(err)
	}
}

func TestAsk(t *testing.T) {
	for _, tt := range []struct{ serial, ask, answer string }{
		{"4C530001", "the last four characters", "0001"},
		{"AB", "its serial number", "AB"},
		{"", "its device name, sda", "sda"},
		{"é\x00ü123", "the last four characters", "ü123"},
	} {
		var c Contents
		c.describe(udev.Device{Name: "sda", Serial: tt.serial})
		if !strings.Contains(c.Ask, tt.ask) || c.answer != tt.answer {
			t.Errorf("serial %q: asks for %s, %q", tt.serial, c.Ask, c.answer)
		}
	}
}

// TestBlind takes the mount tables away: then any disk may be the system's, so
// nothing is mounted and nothing prepared.
func TestBlind(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "BLIND"))
	dir := t.TempDir()
	proc := filepath.Join(dir, "proc")
	random := filepath.Join(proc, "sys/kernel/random")
	self := filepath.Join(proc, "self")
	err := errors.Join(os.MkdirAll(random, 0o755), os.MkdirAll(self, 0o755),
		os.WriteFile(filepath.Join(random, "boot_id"), []byte("boot\n"), 0o600),
		os.WriteFile(filepath.Join(self, "mountinfo"), nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 1000)
	d, err := NewDrives(DriveConfig{Also: []string{s.name}, StateDir: filepath.Join(dir, "state"), Mount: filepath.Join(dir, "mnt"), RunDir: filepath.Join(dir, "run")},
		DriveEvents{Failed: func(err error) { told <- err }})
	if err != nil {
		t.Fatal(err)
	}
	d.proc = proc
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error)
	go func() { ran <- d.Run(ctx) }()
	// The table goes away after the start: a folder can be opened and not read.
	if err := d.call(ctx, func(l *driveLoop) {}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(self, "mountinfo")), os.Mkdir(filepath.Join(self, "mountinfo"), 0o755)); err != nil {
		t.Fatal(err)
	}
	err = d.Prepare(ctx, s.name, PrepareOptions{Confirm: func(c Contents) (string, error) {
		t.Error("asked about a disk that may be the system's")
		return c.Device, nil
	}})
	if err == nil {
		t.Error("prepared")
	}
	if err := <-told; !strings.Contains(err.Error(), "mount table") {
		t.Errorf("told %v", err)
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}
