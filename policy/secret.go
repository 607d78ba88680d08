package policy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// masked is what every way of printing a Secret gives.
const masked = "********"

const (
	maxSecret      = 64 << 10         // bytes that a password may have
	secretDeadline = 30 * time.Second // for a password command
)

// ErrNoSecret means that a password is not there or empty.
var ErrNoSecret = errors.New("no password")

// A Secret is a password, or where to get it. No form of printing, logging or
// encoding shows it; only Read does. The zero Secret is not set.
type Secret struct {
	// literal returns where the text is; copies share it, so that Wipe
	// reaches all of them. It is a function because printers that come upon
	// a Secret in an unexported field ignore its methods and follow every
	// pointer, but stop here.
	literal func() *[]byte
	file    string
	command Command
}

// NewSecret returns a Secret that holds a copy of text.
func NewSecret(text []byte) Secret {
	own := bytes.Clone(text)
	return Secret{literal: func() *[]byte { return &own }}
}

// SecretFile returns a Secret whose text is in the file at path.
func SecretFile(path string) Secret { return Secret{file: path} }

// IsZero reports whether the secret is not set.
func (s Secret) IsZero() bool {
	return s.literal == nil && s.file == "" && len(s.command) == 0
}

// File returns the file that holds the secret, "" if it is no such secret.
func (s Secret) File() string { return s.file }

// Read returns the secret's bytes without the line end that editors and
// commands add. The caller owns them and should clear them after use. A
// secret in a file or from a command is read anew each time. The error wraps
// ErrNoSecret where there is none, and fs.ErrNotExist where the file is
// missing; it never holds a part of the secret or of a command's output.
func (s Secret) Read(ctx context.Context) ([]byte, error) {
	switch {
	case s.file != "":
		return readSecretFile(s.file)
	case len(s.command) > 0:
		return s.command.secret(ctx)
	case s.literal == nil:
		return nil, fmt.Errorf("%w is configured", ErrNoSecret)
	case len(*s.literal()) == 0:
		return nil, fmt.Errorf("%w: it is empty", ErrNoSecret)
	}
	return bytes.Clone(*s.literal()), nil
}

// Wipe overwrites a secret that was written in the configuration itself, in
// all copies of s. The strings that the YAML parser made of the file are
// beyond reach and stay until the garbage collector reuses them: a reason to
// prefer a file.
func (s Secret) Wipe() {
	if s.literal != nil {
		text := s.literal()
		clear(*text)
		*text = nil
	}
}

func readSecretFile(path string) ([]byte, error) {
	f, err := openRegular(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("password file: %w; make it, readable by its owner only, or correct password_file", err)
		}
		return nil, fmt.Errorf("password file: %w", err)
	}
	defer f.Close()
	text, err := readSecret(f)
	if err != nil {
		return nil, fmt.Errorf("password file %s: %w", path, err)
	}
	return text, nil
}

// readSecret reads a bounded secret and drops one line end.
func readSecret(r io.Reader) ([]byte, error) {
	buf := make([]byte, maxSecret+1)
	defer clear(buf)
	n, err := io.ReadFull(r, buf)
	if err != nil && err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	if n > maxSecret {
		return nil, fmt.Errorf("more than %d bytes are no password", maxSecret)
	}
	text := bytes.TrimSuffix(buf[:n], []byte("\n"))
	text = bytes.TrimSuffix(text, []byte("\r"))
	if len(text) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrNoSecret)
	}
	return bytes.Clone(text), nil
}

// openRegular opens a file for reading and refuses anything else, so that a
// FIFO or device in its place cannot hang or flood the reader.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// A Command is a program and its arguments.
type Command []string

// secret runs the command and returns what it prints. What it prints to
// standard error is dropped, since it may name the secret.
func (c Command) secret(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, secretDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, c[0], c[1:]...)
	// A group of its own, so that ending it ends what it started too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("password command %s: %w", c[0], err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("password command: %w", err)
	}
	text, readErr := readSecret(out)
	if readErr != nil && !errors.Is(readErr, ErrNoSecret) {
		// It may still be writing; nothing of it is wanted any more.
		cancel()
	}
	err = cmd.Wait()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		err = errors.New("no answer in time")
	case readErr != nil && (err == nil || !errors.Is(readErr, ErrNoSecret)):
		err = readErr
	case err != nil:
		err = fmt.Errorf("%w; run it by hand to see why", err)
	}
	if err != nil {
		clear(text)
		return nil, fmt.Errorf("password command %s: %w", c[0], err)
	}
	return text, nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Secret) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		return errors.New("an empty password")
	}
	if len(text) > maxSecret {
		return fmt.Errorf("more than %d bytes are no password", maxSecret)
	}
	*s = NewSecret(text)
	return nil
}

// String returns asterisks.
func (s Secret) String() string { return masked }

// GoString returns asterisks, for %#v.
func (s Secret) GoString() string { return masked }

// Format writes asterisks for every verb of package fmt.
func (s Secret) Format(f fmt.State, _ rune) { io.WriteString(f, masked) }

// LogValue returns asterisks, for log/slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(masked) }

// MarshalText returns asterisks.
func (s Secret) MarshalText() ([]byte, error) { return []byte(masked), nil }

// MarshalJSON returns asterisks.
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + masked + `"`), nil }

// MarshalYAML returns asterisks.
func (s Secret) MarshalYAML() (any, error) { return masked, nil }
