package mounts

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	for text, want := range map[string]int{
		"42 (ntfs-3g) Z 1 42 42 0 -1": 42, "42 (a) b (c) S 1 42 42 0": 42, "": 0, "x (y) Z 1 2 3": 0, "42 (y": 0, "42 (y) Z": 0, "42 )y( Z 1 2 3": 0,
	} {
		if pid, _, _, _, _ := parseStat(text); pid != want {
			t.Errorf("%q: %d", text, pid)
		}
	}
	if pid, parent, session, command, state := parseStat("7 (a) (b) Z 1 5 6 0\n"); pid != 7 || parent != 1 || session != 6 || command != "a) (b" || state != "Z" {
		t.Errorf("%d %d %d %q %q", pid, parent, session, command, state)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("42 (ntfs-3g) Z 1 42 42 0")
	f.Add(")(")
	f.Fuzz(func(t *testing.T, text string) {
		if pid, _, _, command, state := parseStat(text); pid != 0 && (!strings.Contains(text, command) || strings.ContainsAny(state, " \n")) {
			t.Errorf("%q: %q %q", text, command, state)
		}
	})
}

// TestReapDaemons leaves this process the child of another, as process 1 in a
// container gets it.
func TestReapDaemons(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0); err != nil {
			t.Error(err)
		}
	}()
	dir := t.TempDir()
	daemon := filepath.Join(dir, "ntfs-3g")
	if err := os.WriteFile(daemon, []byte("#!/bin/sh\necho $$ > "+dir+"/pid\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("setsid", "--fork", daemon).CombinedOutput(); err != nil {
		t.Fatalf("setsid: %v: %s (apt-get install util-linux)", err, out)
	}
	var stat string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		pid, _ := os.ReadFile(filepath.Join(dir, "pid"))
		if n := strings.TrimSpace(string(pid)); n != "" {
			stat = "/proc/" + n + "/stat"
			if b, err := os.ReadFile(stat); err == nil {
				if _, parent, _, _, state := parseStat(string(b)); state == "Z" && parent == os.Getpid() {
					break
				}
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("the daemon is no zombie of ours")
		}
	}
	reapDaemons("/proc")
	if b, err := os.ReadFile(stat); err == nil {
		t.Errorf("still there: %s", b)
	}
}

func TestRunTool(t *testing.T) {
	if _, err := runTool(t.Context(), "no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("%v", err)
	}
	_, err := runTool(t.Context(), "sh", "-c", "echo first >&2; printf 'last\\033[2J\\n\\n' >&2; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || err.Error() != "sh: last\ufffd[2J (exit status 7)" {
		t.Errorf("%q", err)
	}
	out, err := runTool(t.Context(), "sh", "-c", "head -c 1000000 /dev/zero")
	if err != nil || len(out.Stdout) != probeOutput {
		t.Errorf("%d bytes, %v", len(out.Stdout), err)
	}
	// All of it ends in time, also what it started.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	begin := time.Now()
	marker := strconv.Itoa(os.Getpid()*1000 + 7)
	if _, err := runTool(ctx, "sh", "-c", "sleep "+marker+" & wait"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("ended after %v", took)
	}
	for _, pid := range processes("/proc") {
		if b, err := os.ReadFile("/proc/" + pid + "/cmdline"); err == nil && strings.Contains(string(b), marker) {
			t.Errorf("process %s is left", pid)
		}
	}
}
