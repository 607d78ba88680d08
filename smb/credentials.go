package smb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	//lint:ignore SA1019 NTLM's hash of a password is defined with MD4
	"golang.org/x/crypto/md4"
)

// Credentials name a user and say where the password comes from. Exactly one
// of Password, PasswordFile, PasswordEnv and PasswordCommand may be set; with
// none the password is empty. It is read anew for each connection, so that a
// changed file counts at once, and the plain text is wiped as soon as its
// hash is made.
type Credentials struct {
	Username string
	Domain   string // empty: the server's own

	Password        string
	PasswordFile    string   // its first line
	PasswordEnv     string   // the name of an environment variable
	PasswordCommand []string // a program and its arguments; the first line that it writes
}

// maxPassword is longer than any password that Windows or Samba take (127
// characters), in bytes of UTF-8.
const maxPassword = 1024

// String shows no secret.
func (c Credentials) String() string {
	if c.Domain != "" {
		return c.Domain + `\` + c.Username
	}
	return c.Username
}

// GoString shows no secret either.
func (c Credentials) GoString() string { return "smb.Credentials(" + c.String() + ")" }

// Secret returns the password. The caller must overwrite it after use, with
// the built-in clear.
func (c Credentials) Secret(ctx context.Context) ([]byte, error) {
	sources := 0
	for _, set := range []bool{c.Password != "", c.PasswordFile != "", c.PasswordEnv != "", len(c.PasswordCommand) > 0} {
		if set {
			sources++
		}
	}
	if sources > 1 {
		return nil, errors.New("the password has more than one source; set one of password, password_file and password_command")
	}
	var text []byte
	var err error
	switch {
	case c.PasswordFile != "":
		text, err = readLimited(c.PasswordFile)
	case c.PasswordEnv != "":
		value, ok := os.LookupEnv(c.PasswordEnv)
		if !ok {
			return nil, fmt.Errorf("the environment variable %s with the password is not set", c.PasswordEnv)
		}
		return []byte(value), nil
	case len(c.PasswordCommand) > 0:
		text, err = runLimited(ctx, c.PasswordCommand)
	default:
		return []byte(c.Password), nil
	}
	if err != nil {
		return nil, err
	}
	line, rest, _ := bytes.Cut(text, []byte("\n"))
	clear(rest)
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) > maxPassword || !utf8.Valid(line) {
		clear(line)
		return nil, errors.New("the password's first line is too long or not UTF-8")
	}
	return line, nil
}

func readLimited(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading the password: %w", err)
	}
	defer f.Close()
	buf := make([]byte, maxPassword+3) // one buffer, so that no copy stays behind
	n, err := io.ReadFull(f, buf)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		clear(buf)
		return nil, fmt.Errorf("reading the password: %w", err)
	}
	return buf[:n], nil
}

func runLimited(ctx context.Context, command []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("password command: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("password command: %w", err)
	}
	buf := make([]byte, maxPassword+3)
	n, _ := io.ReadFull(out, buf)
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		clear(buf)
		return nil, fmt.Errorf("password command %s: %w", command[0], err)
	}
	return buf[:n], nil
}

// hash returns the NT hash of the password, which is all that NTLM needs. It
// is as good as the password to an attacker: never log it, and clear it.
func (c Credentials) hash(ctx context.Context) ([]byte, error) {
	secret, err := c.Secret(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	h := md4.New()
	var unit [2]byte
	for b := secret; len(b) > 0; {
		r, n := utf8.DecodeRune(b)
		b = b[n:]
		for _, u := range utf16.AppendRune(nil, r) {
			unit[0], unit[1] = byte(u), byte(u>>8)
			h.Write(unit[:])
		}
	}
	return h.Sum(nil), nil
}

// check refuses what no server would take, before any connection is made.
func (c Credentials) check() error {
	if c.Username == "" {
		return errors.New("no user name is set; guests are refused because they have no security")
	}
	if strings.ContainsAny(c.Username+c.Domain, "\x00\r\n/\\") {
		return errors.New("the user name or domain has a character that no server takes")
	}
	return nil
}
