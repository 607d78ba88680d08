package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// loopDrive makes an ext4 file system on a loop device that no other test
// takes, and returns its kernel name.
func loopDrive(t *testing.T, label string) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	n := 9000 + os.Getpid()%1000*8
	for {
		if err = unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_ADD, n); err != unix.EEXIST {
			break
		}
		n++
	}
	if err != nil {
		t.Fatalf("making a loop device: %v", err)
	}
	name := fmt.Sprintf("loop%d", n)
	file := filepath.Join(t.TempDir(), "image")
	tool := func(name string, args ...string) {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s (apt-get install e2fsprogs mount)", name, err, out)
		}
	}
	t.Cleanup(func() {
		tool("losetup", "--detach", "/dev/"+name)
		control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer control.Close()
		// Another test's mount namespace may keep it for a moment.
		err = unix.EBUSY
		for deadline := time.Now().Add(10 * time.Second); err == unix.EBUSY && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			err = unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, n)
		}
		if err != nil {
			t.Errorf("removing %s: %v", name, err)
		}
	})
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	tool("mkfs.ext4", "-q", "-L", label, file)
	tool("losetup", "/dev/"+name, file)
	return name
}

func TestDrives(t *testing.T) {
	name := loopDrive(t, "lab el")
	dir := t.TempDir()
	at := filepath.Join(dir, "at")
	drives := func(want int, stdin string, args ...string) (string, string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		args = append([]string{"--state", dir, "drives"}, args...)
		if code := run(t.Context(), args, strings.NewReader(stdin), &stdout, &stderr); code != want {
			t.Fatalf("%q: exit code %d, want %d\n%s%s", args, code, want, &stdout, &stderr)
		}
		return stdout.String(), stderr.String()
	}
	drives(exitUsage, "", "moutn")
	drives(exitUsage, "", "mount")
	drives(exitAbsent, "", "mount", "nosuch")
	drives(exitAbsent, "", "eject", "nosuch")
	if _, stderr := drives(exitFailed, "", "prepare", name); !strings.Contains(stderr, "neither on USB nor removable") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("prepare: %s", stderr)
	}

	if out, _ := drives(exitDone, "", "mount", "/dev/"+name, "--at", at, "--read-only"); out != fmt.Sprintf("%s is mounted at %s read-only\n", name, at) {
		t.Errorf("mount: %q", out)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	if _, stderr := drives(exitFailed, "", "mount", name); !strings.Contains(stderr, "already") {
		t.Errorf("mounted twice: %s", stderr)
	}

	var lines []driveLine
	out, _ := drives(exitDone, "", "--json")
	if err := json.Unmarshal([]byte(out), &lines); err != nil {
		t.Fatal(err)
	}
	var line driveLine
	for _, l := range lines {
		if l.Device == name {
			line = l
		}
	}
	if line.Path != at || line.State != "mounted" || !line.ReadOnly || line.Label != "lab el" || line.Type != "ext4" || line.Size != 8<<20 || line.Used == nil || line.Since == nil || line.UUID == "" {
		t.Errorf("listed: %+v", line)
	}
	out, _ = drives(exitDone, "")
	if !strings.HasPrefix(out, "Name") || !strings.Contains(out, "lab el") || !strings.Contains(out, "mounted, read-only") || !strings.Contains(out, "8.0 MiB") || !strings.Contains(out, at) {
		t.Errorf("table:\n%s", out)
	}

	sleeper := exec.Command("sleep", "60")
	sleeper.Dir = at
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() { _, _ = sleeper.Process.Kill(), sleeper.Wait() }
	defer stop()
	if _, stderr := drives(exitFailed, "", "eject", "at"); !strings.Contains(stderr, fmt.Sprintf("sleep (process %d): working folder %s", sleeper.Process.Pid, at)) {
		t.Errorf("eject of a busy drive: %s", stderr)
	}
	stop()
	out, _ = drives(exitDone, "", "eject", "at", "--json")
	events := strings.Split(strings.TrimSpace(out), "\n")
	var done struct {
		Event, Disk string
		Drives      []string
		Safe        bool
	}
	if err := json.Unmarshal([]byte(events[len(events)-1]), &done); err != nil || done.Event != "ejected" || !done.Safe || done.Disk != name || len(done.Drives) != 1 {
		t.Errorf("eject: %s, %v", out, err)
	}
	if _, err := os.Lstat(at); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}
