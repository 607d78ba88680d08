package smbfs_test

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

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/mounts"
	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbfs"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

// A house is a home on a real server: a volume with the local home, which
// shows at path and, when Home works, at local.
type house struct {
	server      *smbtest.Server
	share       *smbfs.HomeShare
	path, local string
	onShare     string // the share's folder on the server's disk
	changes     func() []mounts.HomeMode
	cfg         mounts.HomeConfig
}

func newHouse(t *testing.T) *house {
	t.Helper()
	s := smbtest.Start(t)
	base := t.TempDir()
	h := &house{server: s, path: base + "/home", local: base + "/local", onShare: s.Path(smbtest.RW)}
	for _, d := range []string{h.path, h.local} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(t, h.path+"/notes", []byte("local"))
	write(t, h.onShare+"/notes", []byte("share"))
	h.share = homeShare(t, "smb://"+s.Addr()+"/"+smbtest.RW, func(o *smb.Options) {
		o.DialTimeout, o.MetaTimeout, o.DataTimeout = 2*time.Second, 3*time.Second, 3*time.Second
	})
	var mu sync.Mutex
	var modes []mounts.HomeMode
	h.changes = func() []mounts.HomeMode {
		mu.Lock()
		defer mu.Unlock()
		return modes
	}
	h.cfg = mounts.HomeConfig{
		Share: h.share, Path: h.path, Local: h.local, Client: mounts.ClientUser,
		Changed: func(s mounts.HomeState) {
			mu.Lock()
			defer mu.Unlock()
			modes = append(modes, s.Mode)
		},
	}
	t.Cleanup(func() {
		// Whatever a failed test left: on top first.
		for range 8 {
			for _, at := range []string{h.path + "/.jupyter", h.path, h.local} {
				_ = unix.Unmount(at, unix.MNT_DETACH)
			}
		}
	})
	return h
}

func homeShare(t *testing.T, address string, change func(*smb.Options)) *smbfs.HomeShare {
	t.Helper()
	at, err := smb.ParseLocation(address)
	if err != nil {
		t.Fatal(err)
	}
	o := smb.Options{Credentials: smb.Credentials{Username: smbtest.User, Password: smbtest.Password}}
	if change != nil {
		change(&o)
	}
	hs, err := smbfs.NewHomeShare(at, o, smbfs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hs.Client().Close() })
	return hs
}

func (h *house) home(t *testing.T) *mounts.Home {
	t.Helper()
	home, err := mounts.NewHome(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	return home
}

// shows fails the test unless the home shows one of "local" and "share", and
// the second place the local home.
func (h *house) shows(t *testing.T, want string) {
	t.Helper()
	if got := string(read(t, h.path+"/notes")); got != want {
		t.Errorf("the home shows %q, want %q", got, want)
	}
	if got := string(read(t, h.local+"/notes")); got != "local" {
		t.Errorf("the second place shows %q, want the local home", got)
	}
}

func wantMode(t *testing.T, s mounts.HomeState, want mounts.HomeMode) {
	t.Helper()
	if s.Mode != want {
		t.Fatalf("the home is %+v, want %s", s, want)
	}
}

func TestHomeSwitchesOver(t *testing.T) {
	h := newHouse(t)
	h.cfg.LocalPaths = []string{".jupyter"}
	h.server.Kill()
	home := h.home(t)
	// Server away at boot: the local home shows.
	s := home.Look(t.Context())
	wantMode(t, s, mounts.HomeWaiting)
	if !strings.Contains(s.Reason, "Samba") {
		t.Errorf("the reason is %q", s.Reason)
	}
	if got := string(read(t, h.path+"/notes")); got != "local" {
		t.Errorf("the home shows %q", got)
	}
	h.server.Restart()
	time.Sleep(200 * time.Millisecond)
	wantMode(t, home.Look(t.Context()), mounts.HomeShared)
	h.shows(t, "share")

	// A local path shows the local home's folder in the share.
	write(t, h.path+"/.jupyter/status", []byte("pid 1"))
	if got := string(read(t, h.local+"/.jupyter/status")); got != "pid 1" {
		t.Errorf("the local path holds %q", got)
	}
	if entries, err := os.ReadDir(h.onShare + "/.jupyter"); err != nil || len(entries) > 0 {
		t.Errorf("the share's folder holds %v, %v", entries, err)
	}

	// Server lost: the share stays, with errors, and the local home too.
	h.server.Freeze()
	start := time.Now()
	wantMode(t, home.Look(t.Context()), mounts.HomeAway)
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("noticing took %v", d)
	}
	if _, err := os.ReadFile(h.path + "/other"); !errors.Is(err, unix.EHOSTDOWN) {
		t.Errorf("reading from the lost share: %v, want EHOSTDOWN", err)
	}
	if got := string(read(t, h.local+"/notes")); got != "local" {
		t.Errorf("the second place shows %q", got)
	}
	h.server.Thaw()
	for start := time.Now(); home.Look(t.Context()).Mode != mounts.HomeShared; time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatalf("after the server is back the home is %+v", home.State())
		}
	}
	h.shows(t, "share")

	// Unmount on request: refused while in use, then the local home.
	sleep := exec.Command("sleep", "60")
	sleep.Dir = h.path
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	if err := home.Unmount(t.Context(), false); !errors.Is(err, mounts.ErrHomeInUse) || !strings.Contains(err.Error(), fmt.Sprint(sleep.Process.Pid)) {
		t.Errorf("Unmount while in use: %v, want ErrHomeInUse by %d", err, sleep.Process.Pid)
	}
	h.shows(t, "share")
	if err := sleep.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = sleep.Wait()
	if err := home.Unmount(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	h.shows(t, "local")
	wantMode(t, home.Look(t.Context()), mounts.HomeLocal) // and it stays so
	if err := home.Mount(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.shows(t, "share")
	if err := home.Unmount(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	h.shows(t, "local")
}

func TestHomeIsNotCovered(t *testing.T) {
	h := newHouse(t)
	h.cfg.Wait = time.Nanosecond // the start is over
	home := h.home(t)

	t.Run("while programs use it", func(t *testing.T) {
		f, err := os.Open(h.path + "/notes")
		if err != nil {
			t.Fatal(err)
		}
		// A program of another process has it open.
		sleep := exec.Command("sleep", "60")
		sleep.Stdin = f
		if err := sleep.Start(); err != nil {
			t.Fatal(err)
		}
		f.Close()
		s := home.Look(t.Context())
		wantMode(t, s, mounts.HomeWaiting)
		if len(s.Holders) != 1 || s.Holders[0].PID != sleep.Process.Pid || s.Holders[0].Name != "sleep" {
			t.Errorf("Holders = %v, want sleep (%d)", s.Holders, sleep.Process.Pid)
		}
		if err := sleep.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = sleep.Wait()
	})
	t.Run("after it was changed", func(t *testing.T) {
		time.Sleep(20 * time.Millisecond) // the kernel's clock for files is coarse
		write(t, h.path+"/draft", []byte("x"))
		s := home.Look(t.Context())
		wantMode(t, s, mounts.HomeWaiting)
		if got := string(read(t, h.path+"/notes")); got != "local" {
			t.Errorf("the home shows %q: %+v", got, s)
		}
	})
	t.Run("but on request", func(t *testing.T) {
		if err := home.Mount(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.shows(t, "share")
		if err := home.Unmount(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if got := string(read(t, h.path+"/draft")); got != "x" {
			t.Errorf("the draft is %q", got)
		}
	})
}

func TestHomeRefusesWrongPlaces(t *testing.T) {
	h := newHouse(t)
	write(t, h.local+"/other", []byte("somebody's"))
	s := h.home(t).Look(t.Context())
	wantMode(t, s, mounts.HomeFailed)
	if got := string(read(t, h.path+"/notes")); got != "local" {
		t.Errorf("the home shows %q", got)
	}
	if err := os.Remove(h.local + "/other"); err != nil {
		t.Fatal(err)
	}
	// A planted link must not lead a bind anywhere.
	victim := t.TempDir()
	if err := os.Symlink(victim, h.path+"/.jupyter"); err != nil {
		t.Fatal(err)
	}
	h.cfg.LocalPaths = []string{".jupyter"}
	home := h.home(t)
	wantMode(t, home.Look(t.Context()), mounts.HomeFailed)
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(table), victim) {
		t.Errorf("something is mounted at the planted link's target: %v", err)
	}
	if err := home.Unmount(t.Context(), true); err != nil {
		t.Error(err)
	}
}

func TestHomeProbeTells(t *testing.T) {
	s := smbtest.Start(t)
	for address, want := range map[string]string{
		"//" + s.Addr() + "/iot-dat":                 "it has: iot-data, media, private, sealed",
		"//" + s.Addr() + "/" + smbtest.RW + "/none": "file does not exist",
		"//" + s.Addr() + "/" + smbtest.RO:           "read-only",
	} {
		err := homeShare(t, address, nil).Probe(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want it to say %q", address, err, want)
		}
	}
}

func TestHomeKernelOptions(t *testing.T) {
	s := smbtest.Start(t)
	hs := homeShare(t, "//"+s.Addr()+"/"+smbtest.RW+"/some/folder", nil)
	o, err := hs.Kernel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := strings.Cut(s.Addr(), ":")
	for _, want := range []string{
		"ip=127.0.0.1,", "port=" + port + ",", "vers=3.1.1,", "soft,echo_interval=10,", "mfsymlinks,", "prefixpath=some/folder,",
		"file_mode=0700,", ",password=" + strings.ReplaceAll(smbtest.Password, ",", ",,"),
	} {
		if !strings.Contains(string(o), want) {
			t.Errorf("the options lack %q: %s", want, o)
		}
	}
}

// TestHomeRun runs the loop as the service does, ends it, and starts another
// one; then a process dies with the share mounted.
func TestHomeRun(t *testing.T) {
	h := newHouse(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	home := h.home(t)
	go func() { done <- home.Run(ctx) }()
	for start := time.Now(); home.State().Mode != mounts.HomeShared; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("the home is %+v", home.State())
		}
	}
	h.shows(t, "share")
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	h.shows(t, "local")

	// Another process mounts the share and is killed.
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelperMount$")
	cmd.Env = append(os.Environ(), "SMBFS_HELPER="+h.share.Source()+" "+h.path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if got := string(read(t, h.path+"/notes")); got == "share" {
			break
		}
		if time.Since(start) > 10*time.Second {
			t.Fatal("the other process doesn't mount")
		}
	}
	again := h.home(t)
	wantMode(t, again.Look(t.Context()), mounts.HomeFailed) // it isn't ours to touch
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if _, err := os.ReadDir(h.path); !errors.Is(err, unix.ENOTCONN) {
		t.Fatalf("after the kill: %v, want ENOTCONN", err)
	}
	wantMode(t, again.Look(t.Context()), mounts.HomeShared)
	h.shows(t, "share")
	if err := again.Unmount(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	h.shows(t, "local")
}

// TestHelperMount is the process that TestHomeRun kills.
func TestHelperMount(t *testing.T) {
	source, at, ok := strings.Cut(os.Getenv("SMBFS_HELPER"), " ")
	if !ok {
		return
	}
	m, err := homeShare(t, source, nil).User(t.Context(), filepath.Clean(at))
	if err != nil {
		t.Fatal(err)
	}
	m.(*smbfs.Mount).Wait()
}
