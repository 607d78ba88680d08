// Package smbtest runs Debian's smbd for tests, with a configuration, users
// and state of its own in a temporary folder and a port of its own on the
// loopback interface; the machine's Samba is never read or changed.
//
// The server can be frozen, killed and started again at the same address, so
// that tests see what a real server does to its clients when it fails.
package smbtest

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"

	//lint:ignore SA1019 the NT hash is defined with MD4
	"golang.org/x/crypto/md4"
	"golang.org/x/sys/unix"
)

// The users that every server knows. All of them have the same password.
const (
	User     = "iot"     // may use every share that has no list of its own
	Other    = "other"   // is kept out of the share "private"
	Expired  = "expired" // must change the password before anything else
	Disabled = "disabled"
	Password = "correct horse, Batterie-Stäpel %20$x"
)

// The shares that every server has.
const (
	RW      = "iot-data" // reading and writing
	RO      = "media"    // reading only
	Sealed  = "sealed"   // smb encrypt = required
	Private = "private"  // only for User
	Full    = "full"     // a file system of 8 MiB, present with the option WithFull
)

// A Server is one running smbd. Its methods may be called from one goroutine
// at a time.
type Server struct {
	t       testing.TB
	dir     string
	addr    string
	netns   string
	conf    string
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	fullDir string
}

// An Option changes the configuration of a server.
type Option func(*config)

type config struct {
	global  []string
	full    bool
	netns   string
	address string
}

// WithGlobal adds lines to the [global] section, such as
// "server max protocol = SMB2_10".
func WithGlobal(lines ...string) Option {
	return func(c *config) { c.global = append(c.global, lines...) }
}

// WithFull adds the share [Full] on a tmpfs of 8 MiB. It needs root.
func WithFull() Option { return func(c *config) { c.full = true } }

// InNamespace runs the server in a network namespace, where
// it listens on the given IP address.
func InNamespace(name, address string) Option {
	return func(c *config) { c.netns, c.address = name, address }
}

// Start runs a server until the test ends. It fails the test when smbd is
// missing or doesn't start.
func Start(t testing.TB, opts ...Option) *Server {
	t.Helper()
	if _, err := exec.LookPath("smbd"); err != nil {
		t.Fatal("smbd is missing: apt-get install samba")
	}
	c := config{address: "127.0.0.1"}
	for _, o := range opts {
		o(&c)
	}
	// Not t.TempDir: its path holds the test's name, and smbd puts sockets
	// below it, whose paths may be 107 bytes long.
	dir, err := os.MkdirTemp("", "smbd-")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, dir: dir, netns: c.netns}
	t.Cleanup(func() {
		s.stop()
		if s.fullDir != "" {
			if err := unix.Unmount(s.fullDir, unix.MNT_DETACH); err != nil {
				t.Errorf("unmounting %s: %v", s.fullDir, err)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil { // the users' own ids walk through it
		t.Fatal(err)
	}
	for _, share := range []string{RW, RO, Sealed, Private, Full} {
		if err := os.Mkdir(s.Path(share), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if c.full {
		if err := unix.Mount("tmpfs", s.Path(Full), "tmpfs", 0, "size=8m"); err != nil {
			t.Fatalf("mounting a tmpfs of 8 MiB (needs root): %v", err)
		}
		s.fullDir = s.Path(Full)
	}

	// The port is free when we look; another process may take it before
	// smbd does, so that a failed start is tried again with another one.
	for attempt := 1; ; attempt++ {
		s.addr = net.JoinHostPort(c.address, freePort(t, c))
		s.writeConfig(c)
		if err = s.start(); err == nil {
			return s
		}
		if attempt == 3 {
			log, _ := os.ReadFile(filepath.Join(s.private(), "out"))
			t.Fatalf("smbd doesn't start: %v\n%s", err, log)
		}
	}
}

// Addr returns the server's host and port.
func (s *Server) Addr() string { return s.addr }

// Path returns the folder on this machine that a share exports.
func (s *Server) Path(share string) string { return filepath.Join(s.dir, "share-"+share) }

// Pid returns the process id of smbd, which leads a session and a process
// group that hold all its children.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Freeze stops smbd and all its children, as a machine that hangs: the kernel
// still answers for their connections.
func (s *Server) Freeze() {
	s.t.Helper()
	s.signal(syscall.SIGSTOP)
}

// Thaw lets a frozen server go on.
func (s *Server) Thaw() {
	s.t.Helper()
	s.signal(syscall.SIGCONT)
}

// Kill ends smbd and all its children at once. Their connections are reset.
func (s *Server) Kill() { s.stop() }

// Restart starts the server again, with the same port, users and shares, after
// killing it if it runs.
func (s *Server) Restart() {
	s.t.Helper()
	s.stop()
	if err := s.start(); err != nil {
		log, _ := os.ReadFile(filepath.Join(s.private(), "out"))
		s.t.Fatalf("restarting smbd: %v\n%s", err, log)
	}
}

func (s *Server) private() string { return filepath.Join(s.dir, "p") }

func (s *Server) signal(sig syscall.Signal) {
	s.t.Helper()
	for _, pid := range s.processes() {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			s.t.Fatalf("signalling smbd: %v", err)
		}
	}
}

// processes returns all processes of the server, smbd's own first: those of its
// session, since children such as cleanupd make process groups of their own,
// and the RPC daemons, which make sessions of their own too but carry the path
// of this server's configuration.
func (s *Server) processes() []int {
	pids := sessionOf(s.Pid())
	return append(pids, s.daemons()...)
}

// daemons returns the server's processes outside its session.
func (s *Server) daemons() []int {
	var pids []int
	mark := []byte("--configfile=" + s.conf + "\x00")
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range lines {
		if text, err := os.ReadFile(name); err == nil && bytes.Contains(text, mark) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name))) // the pattern says digits
			pids = append(pids, pid)
		}
	}
	return pids
}

// sessionOf returns the processes of a session, the leader included.
func sessionOf(leader int) []int {
	pids := []int{leader}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (comm) state ppid pgrp session: comm may hold anything.
		_, rest, ok := strings.Cut(string(text[max(0, strings.LastIndexByte(string(text), ')')):]), ") ")
		if f := strings.Fields(rest); ok && len(f) > 3 && f[3] == strconv.Itoa(leader) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if pid != leader && pid > 1 {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func (s *Server) stop() {
	if s.cmd == nil {
		return
	}
	for range 10 { // a child may fork while we look
		for _, pid := range s.processes() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if len(sessionOf(s.Pid())) == 1 && len(s.daemons()) == 0 {
			break
		}
		time.Sleep(time.Millisecond) // the kernel takes a moment to end them
	}
	_ = s.cmd.Wait() // "killed" is what we asked for
	s.cmd = nil
}

func (s *Server) start() error {
	out, err := os.Create(filepath.Join(s.private(), "out"))
	if err != nil {
		return err
	}
	defer out.Close()
	args := []string{"smbd", "-F", "--no-process-group", "-s", s.conf, "--debug-stdout", "-d1"}
	if s.netns != "" {
		// Not "ip netns exec": that makes a copy of all mounts, which then
		// can't be ended from here.
		args = append([]string{"nsenter", "--net=/run/netns/" + s.netns, "--"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// smbd in the foreground ends when the pipe that is its standard input
	// does: no server outlives a test that crashes.
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd = cmd
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if c, err := net.DialTimeout("tcp", s.addr, time.Second); err == nil {
			c.Close()
			return nil
		}
		var ws syscall.WaitStatus
		if pid, _ := syscall.Wait4(cmd.Process.Pid, &ws, syscall.WNOHANG, nil); pid == cmd.Process.Pid {
			s.cmd = nil
			return fmt.Errorf("smbd ended with status %d", ws.ExitStatus())
		}
	}
	s.stop()
	return errors.New("smbd doesn't listen after 20 s")
}

func (s *Server) writeConfig(c config) {
	s.t.Helper()
	p := s.private()
	if err := os.MkdirAll(filepath.Join(p, "ncalrpc"), 0o700); err != nil {
		s.t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(s.addr)
	var b strings.Builder
	b.WriteString("[global]\n")
	for _, line := range append([]string{
		"workgroup = WORKGROUP",
		"server role = standalone server",
		"passdb backend = smbpasswd:" + p + "/smbpasswd",
		"username map = " + p + "/users",
		"private dir = " + p,
		"lock directory = " + p,
		"state directory = " + p,
		"cache directory = " + p,
		"pid directory = " + p,
		"ncalrpc dir = " + p + "/ncalrpc",
		"log file = " + p + "/log",
		"smb ports = " + port,
		"interfaces = " + host,
		"bind interfaces only = yes",
		"load printers = no",
		"printcap name = /dev/null",
		"printing = bsd",
		"disable spoolss = yes",
		"server min protocol = SMB2_02",
		"map to guest = never",
		"restrict anonymous = 2",
		// What Samba calls strict sync is the default: a flush is an fsync.
		"strict sync = yes",
	}, c.global...) {
		fmt.Fprintf(&b, "\t%s\n", line)
	}
	share := func(name string, lines ...string) {
		fmt.Fprintf(&b, "[%s]\n\tpath = %s\n\tforce user = root\n\tacl allow execute always = yes\n", name, s.Path(name))
		for _, l := range lines {
			fmt.Fprintf(&b, "\t%s\n", l)
		}
	}
	share(RW, "read only = no")
	share(RO, "read only = yes")
	share(Sealed, "read only = no", "smb encrypt = required")
	share(Private, "read only = no", "valid users = games")
	if c.full {
		share(Full, "read only = no")
	}
	s.conf = filepath.Join(p, "smb.conf")

	// Samba wants a Unix account behind each of its users; these exist on
	// every Debian, and the map gives them our names.
	accounts := []struct {
		unix  string
		uid   int
		name  string
		flags string
		lct   string // last change of the password; zero means "must change"
	}{
		{"games", 5, User, "[UX         ]", "60000000"},
		{"man", 6, Other, "[UX         ]", "60000000"},
		{"news", 9, Expired, "[U          ]", "00000000"},
		{"lp", 7, Disabled, "[UXD        ]", "60000000"},
	}
	var users, passwords strings.Builder
	for _, a := range accounts {
		fmt.Fprintf(&users, "%s = %s\n", a.unix, a.name)
		fmt.Fprintf(&passwords, "%s:%d:%s:%s:%s:LCT-%s:\n", a.unix, a.uid, strings.Repeat("X", 32), ntHash(Password), a.flags, a.lct)
	}
	for name, text := range map[string]string{
		s.conf:                        b.String(),
		filepath.Join(p, "users"):     users.String(),
		filepath.Join(p, "smbpasswd"): passwords.String(),
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

func ntHash(password string) string {
	h := md4.New()
	for _, u := range utf16.Encode([]rune(password)) {
		h.Write([]byte{byte(u), byte(u >> 8)})
	}
	return strings.ToUpper(hex.EncodeToString(h.Sum(nil)))
}

func freePort(t testing.TB, c config) string {
	t.Helper()
	if c.netns != "" {
		return "445" // nobody else is in a namespace that the test made
	}
	l, err := net.Listen("tcp", net.JoinHostPort(c.address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}
