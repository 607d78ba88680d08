package mounts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A toolResult is what a program printed, each stream up to a limit.
type toolResult struct {
	Stdout, Stderr []byte
}

// runTool runs a program with a minimal environment in its own process group,
// so that all of it ends with ctx. A failure wraps exec's error, with the last
// line that the program wrote to standard error.
func runTool(ctx context.Context, name string, args ...string) (toolResult, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return toolResult{}, fmt.Errorf("%s is not installed: %w", name, err)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8",
		// Without udevd nobody answers device-mapper's wait for it.
		"DM_DISABLE_UDEV=1",
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = limited(&stdout), limited(&stderr)
	err = cmd.Run()
	out := toolResult{stdout.Bytes(), stderr.Bytes()}
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		return out, fmt.Errorf("%s: %w", name, context.Cause(ctx))
	}
	return out, &toolError{name: name, said: lastLine(stderr.Bytes()), err: err}
}

// A toolError is a program that ended with an error.
type toolError struct {
	name, said string
	err        error
}

func (e *toolError) Error() string {
	if e.said == "" {
		return fmt.Sprintf("%s: %v", e.name, e.err)
	}
	return fmt.Sprintf("%s: %s (%v)", e.name, e.said, e.err)
}

func (e *toolError) Unwrap() error { return e.err }

// lastLine returns the last non-empty line, printable and not too long.
func lastLine(b []byte) string {
	var last string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" {
			last = line
		}
	}
	last = printable(last)
	if len(last) > 300 {
		last = strings.ToValidUTF8(last[:300], "") + "…"
	}
	return last
}

// limited returns a writer that keeps the first bytes and drops the others.
func limited(w io.Writer) io.Writer { return &limitedWriter{w, probeOutput} }

type limitedWriter struct {
	w    io.Writer
	left int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	if _, err := l.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// readable tries to read the first sector of a device.
func readable(node string) error {
	f, err := os.Open(node)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 512), 0); err != nil && err != io.EOF {
		return errors.Unwrap(err)
	}
	return nil
}

// reapDaemons takes the exit status of ntfs-3g processes that ended. They
// detach from who started them and fall to process 1, which may be this one
// in a container; without this they would stay as zombies. A child that
// runTool waits for is none of them: that one leads no session.
func reapDaemons(proc string) {
	self := os.Getpid()
	for _, pid := range processes(proc) {
		b, err := os.ReadFile(filepath.Join(proc, pid, "stat"))
		if err != nil {
			continue
		}
		n, parent, session, command, state := parseStat(string(b))
		if n > 0 && parent == self && session == n && command == "ntfs-3g" && state == "Z" {
			_, _ = unix.Wait4(n, nil, unix.WNOHANG, nil) // if it fails, somebody else was quicker
		}
	}
}

// parseStat reads the beginning of a process's stat file. The command may hold
// spaces and parentheses. What can't be read is zero.
func parseStat(text string) (pid, parent, session int, command, state string) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return 0, 0, 0, "", ""
	}
	fields := strings.Fields(text[end+1:])
	if len(fields) < 4 {
		return 0, 0, 0, "", ""
	}
	pid, err1 := strconv.Atoi(strings.TrimSpace(text[:open]))
	parent, err2 := strconv.Atoi(fields[1])
	session, err3 := strconv.Atoi(fields[3])
	if errors.Join(err1, err2, err3) != nil {
		return 0, 0, 0, "", ""
	}
	return pid, parent, session, text[open+1 : end], fields[0]
}
