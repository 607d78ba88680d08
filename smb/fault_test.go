package smb_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

// within fails the test when fn takes longer than limit.
func within(t *testing.T, limit time.Duration, what string, fn func()) {
	t.Helper()
	start := time.Now()
	fn()
	if d := time.Since(start); d > limit {
		t.Errorf("%s took %v, want at most %v", what, d, limit)
	}
}

func TestServerKilledAndBack(t *testing.T) {
	s := smbtest.Start(t)
	c := newClient(t, options(s))
	sh := newShare(t, c, smbtest.RW)
	put(t, sh, "x", []byte("data"))
	f, err := sh.Open(t.Context(), "x", os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	s.Kill()
	within(t, 3*time.Second, "a read after the kill", func() {
		if _, err := f.ReadAt(t.Context(), make([]byte, 4), 0); !errors.Is(err, smb.ErrStale) || !smb.Away(err) || errors.Is(err, io.EOF) {
			t.Errorf("ReadAt: %v, want ErrStale", err)
		}
	})
	within(t, 3*time.Second, "stat of a dead server", func() {
		if _, err := sh.Stat(t.Context(), "x"); !errors.Is(err, smb.ErrRefused) {
			t.Errorf("Stat: %v, want ErrRefused", err)
		}
	})
	if st := c.State(); st.Up || st.Err == nil || time.Since(st.Since) > time.Minute {
		t.Errorf("State = %+v, want down", st)
	}
	s.Restart()
	within(t, 3*time.Second, "coming back", func() {
		for {
			_, err := sh.Stat(t.Context(), "x")
			if err == nil {
				break
			}
			if !smb.Temporary(err) {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	if !f.Stale() {
		t.Error("the file of the lost connection claims to be good")
	}
	if _, err := f.ReadAt(t.Context(), make([]byte, 4), 0); !errors.Is(err, smb.ErrStale) {
		t.Errorf("ReadAt of an old file: %v, want ErrStale", err)
	}
	if err := f.Close(t.Context()); err != nil {
		t.Errorf("Close of an old file: %v", err)
	}
	if st := c.State(); !st.Up || st.Err != nil {
		t.Errorf("State = %+v, want up", st)
	}
}

// TestServerFrozen is the case in which the library hangs for good: its calls
// must return when their limit is over, whatever they do.
func TestServerFrozen(t *testing.T) {
	s := smbtest.Start(t)
	o := options(s)
	o.DialTimeout, o.MetaTimeout, o.DataTimeout = time.Second, time.Second, time.Second
	c := newClient(t, o)
	sh := newShare(t, c, smbtest.RW)
	files := make([]*smb.File, 4)
	for i := range files {
		var err error
		if files[i], err = sh.Open(t.Context(), fmt.Sprint(i), os.O_RDWR|os.O_CREATE); err != nil {
			t.Fatal(err)
		}
	}
	s.Freeze()
	data := make([]byte, 8<<20) // more than the socket buffers hold: sends block too
	within(t, 5*time.Second, "everything on a frozen server", func() {
		var wg sync.WaitGroup
		for _, f := range files {
			for range 6 {
				wg.Go(func() {
					if err := f.WriteAt(t.Context(), data, 0); !errors.Is(err, smb.ErrStale) {
						t.Errorf("WriteAt: %v, want ErrStale", err)
					}
				})
				wg.Go(func() {
					if _, err := sh.Stat(t.Context(), "x"); !smb.Away(err) {
						t.Errorf("Stat: %v, want away", err)
					}
				})
				wg.Go(func() {
					if _, err := sh.ReadDir(t.Context(), "."); !smb.Away(err) {
						t.Errorf("ReadDir: %v, want away", err)
					}
				})
				wg.Go(func() {
					if _, err := f.ReadAt(t.Context(), make([]byte, 1<<20), 0); !smb.Away(err) && err != io.EOF {
						t.Errorf("ReadAt: %v, want away", err)
					}
				})
			}
		}
		wg.Wait()
		for _, f := range files {
			if err := f.Close(t.Context()); !errors.Is(err, smb.ErrStale) {
				t.Errorf("Close of a written file: %v, want ErrStale", err)
			}
		}
	})
	within(t, time.Second, "a call during the backoff", func() {
		if _, err := c.Connect(t.Context()); !errors.Is(err, smb.ErrUnreachable) {
			t.Errorf("Connect: %v, want ErrUnreachable", err)
		}
	})
	s.Thaw()
	within(t, 5*time.Second, "coming back", func() {
		for {
			if _, err := sh.Stat(t.Context(), "0"); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}

func TestCancel(t *testing.T) {
	s := smbtest.Start(t)
	c := newClient(t, options(s))
	sh := newShare(t, c, smbtest.RW)
	put(t, sh, "x", make([]byte, 1<<20))

	t.Run("healthy server", func(t *testing.T) {
		// 1,600 cancelled calls from 8 goroutines deadlock the library when
		// they are cancelled its own way.
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range 200 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%20)*100*time.Microsecond)
					f, err := sh.Open(ctx, "x", os.O_RDONLY)
					if err == nil {
						_, err = f.ReadAt(ctx, make([]byte, 1<<20), 0)
						if cerr := f.Close(t.Context()); cerr != nil {
							t.Errorf("Close: %v", cerr)
						}
					}
					if err != nil && !errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("%v, want nil or DeadlineExceeded", err)
					}
					cancel()
				}
			})
		}
		wg.Wait()
		if _, err := sh.Stat(t.Context(), "x"); err != nil {
			t.Error(err)
		}
	})
	t.Run("frozen server", func(t *testing.T) {
		f, err := sh.Open(t.Context(), "x", os.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		s.Freeze()
		defer s.Thaw()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		within(t, 2*time.Second, "a cancelled read", func() {
			if _, err := f.ReadAt(ctx, make([]byte, 1), 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("ReadAt: %v, want DeadlineExceeded", err)
			}
			if err := f.Close(ctx); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	})
}

// TestIdle checks that sessions don't stay open without use, and that one
// that died unnoticed is replaced without an error.
func TestIdle(t *testing.T) {
	s := smbtest.Start(t)
	o := options(s)
	o.IdleTimeout = 200 * time.Millisecond
	var mu sync.Mutex
	open := 0
	o.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		open++
		return &countedConn{Conn: c, closed: sync.OnceFunc(func() {
			mu.Lock()
			defer mu.Unlock()
			open--
		})}, nil
	}
	c := newClient(t, o)
	sh := newShare(t, c, smbtest.RW)
	put(t, sh, "x", []byte("x"))
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		n := open
		mu.Unlock()
		if n == 0 {
			break
		}
		if time.Since(start) > 5*time.Second {
			t.Fatalf("%d connections are still open", n)
		}
	}
	get(t, sh, "x")
	s.Restart() // the pooled session is dead now, and nobody told the client
	if got := get(t, sh, "x"); string(got) != "x" {
		t.Errorf("after a restart: %q", got)
	}
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

func TestNetworkCut(t *testing.T) {
	n := smbtest.NewNamespace(t)
	s := smbtest.Start(t, smbtest.InNamespace(n.Name, n.Address))
	o := options(s)
	o.DialTimeout, o.MetaTimeout, o.DataTimeout = time.Second, time.Second, time.Second
	sh := newShare(t, newClient(t, o), smbtest.RW)
	put(t, sh, "x", []byte("x"))
	f, err := sh.Open(t.Context(), "x", os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	n.Cut()
	within(t, 4*time.Second, "calls without a network", func() {
		if err := f.WriteAt(t.Context(), make([]byte, 8<<20), 0); !errors.Is(err, smb.ErrStale) {
			t.Errorf("WriteAt: %v, want ErrStale", err)
		}
		if _, err := sh.Stat(t.Context(), "x"); !errors.Is(err, smb.ErrUnreachable) {
			t.Errorf("Stat: %v, want ErrUnreachable", err)
		}
	})
	n.Mend()
	within(t, 5*time.Second, "coming back", func() {
		for {
			if _, err := sh.Stat(t.Context(), "x"); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	if err := f.Close(t.Context()); !errors.Is(err, smb.ErrStale) {
		t.Errorf("Close: %v, want ErrStale", err)
	}
}
