package mounts

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestContainerOf(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for _, tt := range []struct{ text, want string }{
		{"0::/system.slice/docker-" + id + ".scope\n", id[:12]},
		{"12:cpu:/docker/" + id + "\n1:name=systemd:/docker/" + id + "\n", id[:12]},
		{"0::/../" + id + "/init\n", id[:12]},
		{"0::/balena/" + id + "\n", id[:12]},
		{"0::/user.slice/session-1.scope\n", ""},
		{"0::/docker/" + id[:40] + "\n", ""},
		{"", ""},
	} {
		if got := containerOf(strings.NewReader(tt.text)); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.text, got, tt.want)
		}
	}
}

func TestMappedFrom(t *testing.T) {
	maps := "55d0-55d1 r--p 00000000 fe:00 123 /usr/bin/x\n" +
		"7f00-7f01 r--p 00000000 08:11 7   /mnt/A/lib with space.so (deleted)\n" +
		"7f02-7f03 rw-p 00000000 00:00 0 \n"
	for sdev, want := range map[string]string{"8:17": "/mnt/A/lib with space.so (deleted)", "254:0": "/usr/bin/x", "8:1": "", "x": "", "": ""} {
		if got := mappedFrom(strings.NewReader(maps), sdev); got != want {
			t.Errorf("%s: %q, want %q", sdev, got, want)
		}
	}
}

func TestHolderText(t *testing.T) {
	e := &InUseError{Path: "/mnt/A", Holders: []Holder{
		{PID: 7, Command: "sh", Container: "0123456789ab", What: "working folder", Path: "/mnt/A"}, {What: "swap file", Path: "/mnt/A/s"}, {PID: 8, Command: "x", What: "open file"}, {}, {},
	}}
	want := "/mnt/A is in use by sh (process 7 in container 0123456789ab): working folder /mnt/A, swap file /mnt/A/s, x (process 8): open file, and 2 more; stop that first"
	if got := e.Error(); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if got := (&InUseError{Path: "/mnt/A"}).Error(); !strings.Contains(got, "pid: host") {
		t.Error(got)
	}
}

// TestHolders keeps a drive busy in every way there is.
func TestHolders(t *testing.T) {
	s, inner := newSlot(t), newSlot(t)
	s.plug(image(t, 16, "mkfs.ext4", "-q", "-L", "BUSY"))
	f := newFleet(t, DriveConfig{Also: []string{s.name}, Options: DriveOptions{Exec: true}})
	d := f.wait(s.name, DriveMounted)

	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(d.Path, "program")
	run(t, "cp", "-L", sleep, program)
	run(t, "cp", "-L", sleep, filepath.Join(d.Path, "file"))
	image := filepath.Join(d.Path, "image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(d.Path, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	start := func(cmd *exec.Cmd) int {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() })
		return cmd.Process.Pid
	}
	running := start(exec.Command(program, "60"))
	reader := exec.Command(sleep, "60")
	file, err := os.Open(filepath.Join(d.Path, "file"))
	if err != nil {
		t.Fatal(err)
	}
	reader.ExtraFiles = []*os.File{file}
	reading := start(reader)
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	inner.plug(image)
	if err := unix.Mount("below", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(below, 0) })

	got := holders("/proc", "/sys", d.Plugging, d.Plugging.sdev(t))
	for _, want := range []Holder{
		{PID: running, Command: "program", What: "running program", Path: program},
		{PID: reading, Command: "sleep", What: "open file", Path: filepath.Join(d.Path, "file")},
		{What: "loop device " + inner.name + " on", Path: image},
		{What: "another mount at", Path: below},
	} {
		if !slices.ContainsFunc(got, func(h Holder) bool { h.Container = ""; return h == want }) {
			t.Errorf("%v is not among %v", want, got)
		}
	}
	inner.pull()
}

// sdev returns the number of a mounted file system.
func (p *Plugging) sdev(t *testing.T) string {
	t.Helper()
	table, err := mountsOf("/proc", "self")
	if err != nil {
		t.Fatal(err)
	}
	m := topMount(table, p.Path)
	return fmt.Sprintf("%d:%d", m.Major, m.Minor)
}
