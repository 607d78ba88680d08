package smb_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

// options returns what a test needs to use a server. The limits are the usual
// ones, as the machine may be busy; tests of failures set their own.
func options(s *smbtest.Server) smb.Options {
	return smb.Options{
		Server:      s.Addr(),
		Credentials: smb.Credentials{Username: smbtest.User, Password: smbtest.Password},
	}
}

func newClient(t testing.TB, o smb.Options) *smb.Client {
	t.Helper()
	c, err := smb.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newShare(t testing.TB, c *smb.Client, name string) *smb.Share {
	t.Helper()
	sh, err := c.Share(name)
	if err != nil {
		t.Fatal(err)
	}
	return sh
}

func put(t testing.TB, sh *smb.Share, name string, data []byte) {
	t.Helper()
	f, err := sh.Open(t.Context(), name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(f.WriteAt(t.Context(), data, 0), f.Sync(t.Context()), f.Close(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
}

func get(t testing.TB, sh *smb.Share, name string) []byte {
	t.Helper()
	f, err := sh.Open(t.Context(), name, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, f.Info().Size)
	if _, err := f.ReadAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(b)
	return b
}

func TestDialectsAndEncryption(t *testing.T) {
	for _, tc := range []struct {
		max     string
		dialect smb.Dialect
		encrypt error // what Encrypt leads to
	}{
		{"SMB2_02", smb.SMB202, smb.ErrDialect},
		{"SMB2_10", smb.SMB210, smb.ErrDialect},
		{"SMB3_00", smb.SMB300, nil},
		{"SMB3_02", smb.SMB302, nil},
		{"SMB3_11", smb.SMB311, nil},
	} {
		t.Run(tc.max, func(t *testing.T) {
			t.Parallel()
			s := smbtest.Start(t, smbtest.WithGlobal("server max protocol = "+tc.max, "server signing = mandatory"))
			for _, encrypt := range []bool{false, true} {
				o := options(s)
				o.Encrypt, o.MinDialect = encrypt, smb.SMB202
				c := newClient(t, o)
				info, err := c.Connect(t.Context())
				if encrypt && tc.encrypt != nil {
					if !errors.Is(err, tc.encrypt) {
						t.Errorf("with Encrypt: %v, want %v", err, tc.encrypt)
					}
					continue
				}
				if err != nil || info.Dialect != tc.dialect || info.Sealed != encrypt {
					t.Fatalf("Connect with encrypt %v = %+v, %v; want %v", encrypt, info, err, tc.dialect)
				}
				data := randomBytes(1<<20 + 17)
				sh := newShare(t, c, smbtest.RW)
				put(t, sh, "x", data)
				if !bytes.Equal(get(t, sh, "x"), data) {
					t.Errorf("encrypt %v: what was written is not what is read", encrypt)
				}
			}
		})
	}

	t.Run("2.0.2 must be asked for", func(t *testing.T) {
		t.Parallel()
		s := smbtest.Start(t, smbtest.WithGlobal("server max protocol = SMB2_02"))
		if _, err := newClient(t, options(s)).Connect(t.Context()); !errors.Is(err, smb.ErrDialect) {
			t.Errorf("Connect: %v, want ErrDialect", err)
		}
	})
	t.Run("server without encryption", func(t *testing.T) {
		t.Parallel()
		s := smbtest.Start(t, smbtest.WithGlobal("server smb encrypt = off"))
		o := options(s)
		o.Encrypt = true
		if _, err := newClient(t, o).Connect(t.Context()); !errors.Is(err, smb.ErrNotSealed) {
			t.Errorf("Connect: %v, want ErrNotSealed", err)
		}
	})
	t.Run("server that demands encryption", func(t *testing.T) {
		t.Parallel()
		s := smbtest.Start(t, smbtest.WithGlobal("server smb encrypt = required"))
		info, err := newClient(t, options(s)).Connect(t.Context())
		if err != nil || !info.Sealed {
			t.Errorf("Connect = %+v, %v; want it sealed", info, err)
		}
	})
}

// sniffer passes a connection through and looks for a text in what is sent
// and received.
type sniffer struct {
	net.Conn
	mu   *sync.Mutex
	seen *bytes.Buffer
}

func (s sniffer) note(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen.Write(p)
}
func (s sniffer) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	s.note(p[:n])
	return n, err
}
func (s sniffer) Write(p []byte) (int, error) {
	s.note(p)
	return s.Conn.Write(p)
}

// TestEncryptionOnTheWire reads along: with Encrypt neither names nor data may
// be seen, without it both are.
func TestEncryptionOnTheWire(t *testing.T) {
	s := smbtest.Start(t)
	const text = "a sentence that nobody else may read"
	for _, encrypt := range []bool{false, true} {
		var mu sync.Mutex
		var seen bytes.Buffer
		o := options(s)
		o.Encrypt = encrypt
		o.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			return sniffer{c, &mu, &seen}, err
		}
		sh := newShare(t, newClient(t, o), smbtest.RW)
		put(t, sh, "diary.txt", []byte(text))
		if got := get(t, sh, "diary.txt"); string(got) != text {
			t.Fatalf("read %q", got)
		}
		mu.Lock()
		wire := seen.Bytes()
		utf16 := []byte("d\x00i\x00a\x00r\x00y\x00")
		if open := bytes.Contains(wire, []byte(text)) || bytes.Contains(wire, utf16); open == encrypt {
			t.Errorf("encrypt %v: names or data in plain sight: %v", encrypt, open)
		}
		mu.Unlock()
	}
}

func TestErrors(t *testing.T) {
	s := smbtest.Start(t, smbtest.WithFull())
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	closed.Close()

	for _, tc := range []struct {
		name   string
		change func(*smb.Options)
		share  string
		op     func(context.Context, *smb.Share) error
		want   error
	}{
		{name: "wrong password", change: func(o *smb.Options) { o.Credentials.Password = "guess" }, want: smb.ErrCredentials},
		{name: "unknown user", change: func(o *smb.Options) { o.Credentials.Username = "stranger" }, want: smb.ErrCredentials},
		{name: "expired password", change: func(o *smb.Options) { o.Credentials.Username = smbtest.Expired }, want: smb.ErrExpired},
		{name: "disabled account", change: func(o *smb.Options) { o.Credentials.Username = smbtest.Disabled }, want: smb.ErrAccount},
		{name: "closed port", change: func(o *smb.Options) { o.Server = nobody }, want: smb.ErrRefused},
		{name: "unknown host", change: func(o *smb.Options) { o.Server = "nas.invalid" }, want: smb.ErrUnreachable},
		{name: "missing password file", change: func(o *smb.Options) {
			o.Credentials.Password, o.Credentials.PasswordFile = "", filepath.Join(t.TempDir(), "none")
		}, want: fs.ErrNotExist},
		{name: "missing share", share: "iot-dat", want: smb.ErrNoShare},
		{name: "another's share", change: func(o *smb.Options) { o.Credentials.Username = smbtest.Other }, share: smbtest.Private, want: smb.ErrShareDenied},
		{name: "missing file", op: func(ctx context.Context, sh *smb.Share) error { _, err := sh.Stat(ctx, "none/here"); return err }, want: fs.ErrNotExist},
		{name: "read-only share", share: smbtest.RO, op: func(ctx context.Context, sh *smb.Share) error { return sh.Mkdir(ctx, "d") }, want: smb.ErrReadOnly},
		{name: "read-only share is a permission", share: smbtest.RO, op: func(ctx context.Context, sh *smb.Share) error { return sh.Mkdir(ctx, "d") }, want: fs.ErrPermission},
		{name: "folder twice", op: func(ctx context.Context, sh *smb.Share) error {
			return errors.Join(sh.Mkdir(ctx, "twice"), sh.Mkdir(ctx, "twice"))
		}, want: fs.ErrExist},
		{name: "folder that isn't empty", op: func(ctx context.Context, sh *smb.Share) error {
			return errors.Join(sh.MkdirAll(ctx, "a/b/c"), sh.Remove(ctx, "a"))
		}, want: smb.ErrNotEmpty},
		{name: "list of a file", op: func(ctx context.Context, sh *smb.Share) error {
			put(t, sh, "plain", nil)
			_, err := sh.ReadDir(ctx, "plain")
			return err
		}, want: smb.ErrNotDir},
		{name: "rename onto a file", op: func(ctx context.Context, sh *smb.Share) error {
			put(t, sh, "r1", nil)
			put(t, sh, "r2", nil)
			return sh.Rename(ctx, "r1", "r2")
		}, want: fs.ErrExist},
		{name: "removing an open file", op: func(ctx context.Context, sh *smb.Share) error {
			f, err := sh.Open(ctx, "opened", os.O_RDWR|os.O_CREATE)
			if err != nil {
				return err
			}
			return errors.Join(sh.Remove(ctx, "opened"), f.Close(ctx))
		}, want: smb.ErrInUse},
		{name: "full share", share: smbtest.Full, op: func(ctx context.Context, sh *smb.Share) error {
			f, err := sh.Open(ctx, "big", os.O_RDWR|os.O_CREATE)
			if err != nil {
				return err
			}
			return errors.Join(f.WriteAt(ctx, make([]byte, 12<<20), 0), f.Close(ctx))
		}, want: smb.ErrFull},
		{name: "path upwards", op: func(ctx context.Context, sh *smb.Share) error { return sh.Mkdir(ctx, "../x") }, want: smb.ErrName},
		{name: "NUL", op: func(ctx context.Context, sh *smb.Share) error { return sh.Mkdir(ctx, "a\x00b") }, want: smb.ErrName},
		{name: "too long", op: func(ctx context.Context, sh *smb.Share) error { return sh.Mkdir(ctx, strings.Repeat("a", 256)) }, want: smb.ErrName},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := options(s)
			if tc.change != nil {
				tc.change(&o)
			}
			c := newClient(t, o)
			if tc.share == "" {
				tc.share = smbtest.RW
			}
			sh := newShare(t, c, tc.share)
			if tc.op == nil {
				tc.op = func(ctx context.Context, sh *smb.Share) error { _, err := sh.Stat(ctx, "."); return err }
			}
			err := tc.op(t.Context(), sh)
			if !errors.Is(err, tc.want) {
				t.Fatalf("%v, want %v", err, tc.want)
			}
			if e, ok := errors.AsType[*smb.Error](err); !ok {
				t.Errorf("%T is no *smb.Error", err)
			} else if strings.Contains(e.Error(), "\n") || strings.Contains(err.Error(), smbtest.Password) {
				t.Errorf("the text has several lines or the password: %q", err)
			}
		})
	}

	t.Run("guest", func(t *testing.T) {
		s := smbtest.Start(t, smbtest.WithGlobal("map to guest = bad user", "guest account = nobody"))
		o := options(s)
		o.Credentials.Username = "stranger"
		if _, err := newClient(t, o).Connect(t.Context()); !errors.Is(err, smb.ErrGuest) {
			t.Errorf("Connect: %v, want ErrGuest", err)
		}
	})
	t.Run("a wrong password is not tried again and again", func(t *testing.T) {
		dials := 0
		o := options(s)
		o.Credentials.Password, o.Credentials.PasswordFile = "", filepath.Join(t.TempDir(), "pw")
		o.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials++
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
		write := func(text string) {
			if err := os.WriteFile(o.Credentials.PasswordFile, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("wrong\n")
		c := newClient(t, o)
		for range 20 {
			if _, err := c.Connect(t.Context()); !errors.Is(err, smb.ErrCredentials) {
				t.Fatalf("Connect: %v", err)
			}
		}
		if dials != 1 {
			t.Errorf("%d logins with a wrong password, want 1", dials)
		}
		write(smbtest.Password + "\n")
		if _, err := c.Connect(t.Context()); err != nil {
			t.Errorf("with the right password: %v", err)
		}
	})
	t.Run("shares", func(t *testing.T) {
		names, err := newClient(t, options(s)).Shares(t.Context())
		want := []string{smbtest.Full, smbtest.RW, smbtest.RO, smbtest.Private, smbtest.Sealed}
		slices.Sort(want)
		if err != nil || !slices.Equal(names, want) {
			t.Errorf("Shares = %q, %v; want %q", names, err, want)
		}
	})
	t.Run("space", func(t *testing.T) {
		sp, err := newShare(t, newClient(t, options(s)), smbtest.Full).Space(t.Context(), ".")
		if err != nil || sp.Total != 8<<20 || sp.Available > sp.Total || sp.Block == 0 {
			t.Errorf("Space = %+v, %v; want 8 MiB", sp, err)
		}
	})
	t.Run("share that demands encryption", func(t *testing.T) {
		sh := newShare(t, newClient(t, options(s)), smbtest.Sealed)
		put(t, sh, "secret", []byte("x"))
		if got := get(t, sh, "secret"); string(got) != "x" {
			t.Errorf("read %q", got)
		}
	})
}

func TestNames(t *testing.T) {
	s := smbtest.Start(t)
	sh := newShare(t, newClient(t, options(s)), smbtest.RW)
	ctx := t.Context()
	names := []string{
		`a:b`, `a*b`, `a?b`, `a"b`, `a<b>c`, `a|b`, `a\b`, "tab\there", "line\nbreak", "bell\a", "\x01", "\x1f",
		"dot.", "dots...", "space ", " space", ".hidden", "..two", "...", "ü", "e\u0301", "日本語", "🙂",
		"a%b", "a'b", "$x", "~", "~1", "LONGNA~1.TXT", strings.Repeat("x", 255), strings.Repeat("ü", 127),
		"\uf0ff", ".tmp-x",
	}
	if err := sh.Mkdir(ctx, "names"); err != nil {
		t.Fatal(err)
	}
	for i, n := range names {
		put(t, sh, "names/"+n, fmt.Append(nil, i))
	}
	infos, err := sh.ReadDir(ctx, "names")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range infos {
		got = append(got, i.Name)
	}
	slices.Sort(got)
	want := slices.Sorted(slices.Values(names))
	if !slices.Equal(got, want) {
		t.Errorf("listed %q\nwant   %q", got, want)
	}
	for i, n := range names {
		if b := get(t, sh, "names/"+n); string(b) != fmt.Sprint(i) {
			t.Errorf("%q holds %q", n, b)
		}
		info, err := sh.Stat(ctx, "names/"+n)
		if err != nil || info.Name != n || info.Size != int64(len(fmt.Sprint(i))) {
			t.Errorf("Stat(%q) = %+v, %v", n, info, err)
		}
		if err := sh.Rename(ctx, "names/"+n, "moved"); err != nil {
			t.Errorf("renaming %q: %v", n, err)
		}
		if err := sh.Remove(ctx, "moved"); err != nil {
			t.Errorf("removing %q: %v", n, err)
		}
	}
	// Samba, like Windows, takes names that differ by case for one file.
	put(t, sh, "Case", []byte("1"))
	if b := get(t, sh, "case"); string(b) != "1" {
		t.Errorf("case holds %q", b)
	}
	// Paths beyond Windows' 260 characters.
	deep := strings.Repeat(strings.Repeat("d", 100)+"/", 8) + "file"
	if err := sh.MkdirAll(ctx, filepath.Dir(deep)); err != nil {
		t.Fatal(err)
	}
	put(t, sh, deep, []byte("deep"))
	if b := get(t, sh, deep); string(b) != "deep" {
		t.Errorf("a path of %d characters holds %q", len(deep), b)
	}
}

func TestFiles(t *testing.T) {
	s := smbtest.Start(t)
	sh := newShare(t, newClient(t, options(s)), smbtest.RW)
	ctx := t.Context()

	t.Run("sparse of 5 GiB", func(t *testing.T) {
		f, err := sh.Open(ctx, "sparse", os.O_RDWR|os.O_CREATE|os.O_EXCL)
		if err != nil {
			t.Fatal(err)
		}
		const end = 5 << 30
		if err := errors.Join(f.WriteAt(ctx, []byte("end"), end-3), f.WriteAt(ctx, []byte("start"), 0)); err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat(ctx)
		if err != nil || info.Size != end {
			t.Errorf("Stat = %+v, %v", info, err)
		}
		b := make([]byte, 8)
		if n, err := f.ReadAt(ctx, b, end-4); n != 4 || err != io.EOF || string(b[:4]) != "\x00end" {
			t.Errorf("ReadAt = %d %q, %v", n, b, err)
		}
		if n, err := f.ReadAt(ctx, b, end); n != 0 || err != io.EOF {
			t.Errorf("ReadAt at the end = %d, %v", n, err)
		}
		big := make([]byte, 3<<20)
		if n, err := f.ReadAt(ctx, big, end-1<<20-5); n != 1<<20+5 || err != io.EOF || string(big[n-3:n]) != "end" {
			t.Errorf("ReadAt of pieces over the end = %d, %v", n, err)
		}
		if err := errors.Join(f.Truncate(ctx, 7), f.Sync(ctx), f.Close(ctx)); err != nil {
			t.Error(err)
		}
		if st, err := os.Stat(filepath.Join(s.Path(smbtest.RW), "sparse")); err != nil || st.Size() != 7 {
			t.Errorf("after Truncate: %v, %v", st, err)
		}
	})
	t.Run("times and attributes", func(t *testing.T) {
		put(t, sh, "old", []byte("x"))
		mtime := time.Date(2001, 2, 3, 4, 5, 6, 789_012_300, time.UTC)
		if err := errors.Join(sh.SetTimes(ctx, "old", mtime, mtime), sh.SetReadOnly(ctx, "old", true)); err != nil {
			t.Fatal(err)
		}
		info, err := sh.Stat(ctx, "old")
		if err != nil || !info.Modified.Equal(mtime) || !info.ReadOnly || info.Dir {
			t.Errorf("Stat = %+v, %v", info, err)
		}
		if err := sh.Remove(ctx, "old"); err != nil {
			t.Errorf("removing a read-only file: %v", err)
		}
	})
	t.Run("10,000 files in a folder", func(t *testing.T) {
		dir := filepath.Join(s.Path(smbtest.RW), "many")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range 10_000 {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%05d.txt", i)), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		infos, err := sh.ReadDir(ctx, "many")
		if err != nil || len(infos) != 10_000 {
			t.Fatalf("ReadDir = %d entries, %v", len(infos), err)
		}
		slices.SortFunc(infos, func(a, b smb.Info) int { return strings.Compare(a.Name, b.Name) })
		for i, info := range infos {
			if info.Name != fmt.Sprintf("file-%05d.txt", i) {
				t.Fatalf("entry %d is %q", i, info.Name)
			}
		}
	})
	t.Run("parallel errors leave the window alone", func(t *testing.T) {
		// The library counts credits twice when a request fails. Without our
		// own limit the server ends the connection.
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for range 50 {
					if _, err := sh.Stat(ctx, "not/there"); !errors.Is(err, fs.ErrNotExist) {
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
	t.Run("parallel files", func(t *testing.T) {
		var wg sync.WaitGroup
		for g := range 16 {
			wg.Go(func() {
				data := bytes.Repeat([]byte{byte(g + 1)}, 1<<20+g)
				name := fmt.Sprintf("p%d", g)
				for range 2 {
					put(t, sh, name, data)
					if !bytes.Equal(get(t, sh, name), data) {
						t.Errorf("%s differs", name)
					}
				}
			})
		}
		wg.Wait()
	})
	t.Run("sync of a folder", func(t *testing.T) {
		if err := sh.SyncDir(ctx, "."); err != nil {
			t.Error(err)
		}
	})
}

func TestCredentialsSources(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pw")
	if err := os.WriteFile(file, []byte("from a file\r\nsecond line\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SMB_TEST_PASSWORD", "from the environment")
	for _, tc := range []struct {
		c    smb.Credentials
		want string
		fail bool
	}{
		{c: smb.Credentials{Password: "plain"}, want: "plain"},
		{c: smb.Credentials{PasswordFile: file}, want: "from a file"},
		{c: smb.Credentials{PasswordEnv: "SMB_TEST_PASSWORD"}, want: "from the environment"},
		{c: smb.Credentials{PasswordCommand: []string{"printf", `%s\n%s`, "from a command", "more"}}, want: "from a command"},
		{c: smb.Credentials{PasswordCommand: []string{"false"}}, fail: true},
		{c: smb.Credentials{PasswordEnv: "SMB_TEST_NOT_SET"}, fail: true},
		{c: smb.Credentials{PasswordFile: "/proc/self/mem"}, fail: true},
		{c: smb.Credentials{Password: "a", PasswordFile: file}, fail: true},
		{c: smb.Credentials{PasswordCommand: []string{"head", "-c", "100000", "/dev/zero"}}, fail: true},
	} {
		got, err := tc.c.Secret(t.Context())
		if (err != nil) != tc.fail || string(got) != tc.want {
			t.Errorf("%v: %q, %v; want %q, failure %v", tc.c, got, err, tc.want, tc.fail)
		}
	}
	c := smb.Credentials{Username: "iot", Password: "hidden"}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if s := fmt.Sprintf(format, c); strings.Contains(s, "hidden") {
			t.Errorf("%s shows the password: %s", format, s)
		}
	}
}
