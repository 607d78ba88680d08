package smbshare

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hirochachacha/go-smb2"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	store "github.com/iot49/ide49-backup/backup/backend/smb"
	"github.com/iot49/ide49-backup/smb"
	"github.com/iot49/ide49-backup/smb/smbfs"
	"github.com/iot49/ide49-backup/smb/smbtest"
)

// The benchmarks write and read 128 MiB per round on the loopback interface.
// BenchmarkLibrary is one stream of the bare library, the yardstick;
// BenchmarkSmbclient is Samba's own client.
const (
	benchSize = 128 << 20
	packSize  = 16 << 20
)

func benchData() []byte {
	b := make([]byte, benchSize)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(b) // never fails
	return b
}

// benchServer has its shares in memory, where that is possible, so that the
// disk isn't measured.
func benchServer(b *testing.B) *smbtest.Server {
	b.Helper()
	b.Setenv("TMPDIR", "/dev/shm")
	return smbtest.Start(b)
}

func modes(b *testing.B, fn func(b *testing.B, sealed bool)) {
	b.Run("signed", func(b *testing.B) { fn(b, false) })
	b.Run("sealed", func(b *testing.B) { fn(b, true) })
}

func BenchmarkLibrary(b *testing.B) {
	modes(b, func(b *testing.B, sealed bool) {
		srv := benchServer(b)
		share := smbtest.RW
		if sealed {
			share = smbtest.Sealed
		}
		conn, err := net.Dial("tcp", srv.Addr())
		must(b, err)
		defer conn.Close()
		d := &smb2.Dialer{Initiator: &smb2.NTLMInitiator{User: smbtest.User, Password: smbtest.Password}}
		s, err := d.Dial(conn)
		must(b, err)
		sh, err := s.Mount(share)
		must(b, err)
		f, err := sh.Create("x")
		must(b, err)
		defer f.Close()
		data := benchData()
		b.Run("write", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				_, err := f.WriteAt(data, 0)
				must(b, err)
			}
		})
		b.Run("read", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				_, err := f.ReadAt(data, 0)
				must(b, err)
			}
		})
	})
}

func BenchmarkSmbclient(b *testing.B) {
	if _, err := exec.LookPath("smbclient"); err != nil {
		b.Fatal("smbclient is missing: apt-get install smbclient")
	}
	modes(b, func(b *testing.B, sealed bool) {
		srv := benchServer(b)
		host, port, _ := net.SplitHostPort(srv.Addr())
		local := filepath.Join(b.TempDir(), "x")
		must(b, os.WriteFile(local, benchData(), 0o600))
		auth := filepath.Join(b.TempDir(), "auth")
		must(b, os.WriteFile(auth, []byte("username="+smbtest.User+"\npassword="+smbtest.Password+"\n"), 0o600))
		protection := "sign"
		if sealed {
			protection = "encrypt"
		}
		run := func(command string) {
			out, err := exec.Command("smbclient", "-p", port, "-A", auth, "--client-protection="+protection, "//"+host+"/"+smbtest.RW, "-c", command).CombinedOutput()
			if err != nil || bytes.Contains(out, []byte("NT_STATUS")) {
				b.Fatalf("smbclient: %v: %s", err, out)
			}
		}
		b.Run("write", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				run("put " + local + " x")
			}
		})
		b.Run("read", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				run("get x /dev/null")
			}
		})
	})
}

func benchStore(b *testing.B, srv *smbtest.Server, sealed bool) *store.Store {
	b.Helper()
	sh := newShare(b, srv, func(o *smb.Options) { o.Encrypt = sealed })
	s, err := store.Create(b.Context(), sh, "repo", store.Options{})
	must(b, err)
	b.Cleanup(func() { must(b, s.Close()) })
	return s
}

// each calls fn for 0 to n-1 from several goroutines.
func each(b *testing.B, n, workers int, fn func(int) error) {
	b.Helper()
	var wg sync.WaitGroup
	work := make(chan int)
	for range workers {
		wg.Go(func() {
			for i := range work {
				if err := fn(i); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
}

func BenchmarkStore(b *testing.B) {
	modes(b, func(b *testing.B, sealed bool) {
		s := benchStore(b, benchServer(b), sealed)
		data := benchData()
		keys := make([]backend.Key, benchSize/packSize)
		for i := range keys {
			keys[i] = backend.Key{Kind: backend.Packs, ID: backup.Hash(data[i*packSize:][:packSize])}
		}
		ctx := context.Background()
		b.Run("write", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				each(b, len(keys), 4, func(i int) error { return s.Put(ctx, keys[i], data[i*packSize:][:packSize]) })
				b.StopTimer()
				each(b, len(keys), 4, func(i int) error { return s.Delete(ctx, keys[i]) })
				b.StartTimer()
			}
		})
		each(b, len(keys), 4, func(i int) error { return s.Put(ctx, keys[i], data[i*packSize:][:packSize]) })
		b.Run("read", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				each(b, len(keys), 4, func(i int) error {
					_, err := s.Get(ctx, keys[i], 0, -1)
					return err
				})
			}
		})
	})
}

// BenchmarkStoreSmall stores 1,000 objects of 1 KiB from 8 goroutines, each
// flushed, on the disk.
func BenchmarkStoreSmall(b *testing.B) {
	s := benchStore(b, smbtest.Start(b), false)
	ctx, n := context.Background(), 0
	for b.Loop() {
		each(b, 1000, 8, func(i int) error {
			data := fmt.Appendf(bytes.Repeat([]byte{'x'}, 1024), "%d-%d", n, i)
			return s.Put(ctx, backend.Key{Kind: backend.Packs, ID: backup.Hash(data)}, data)
		})
		n++
	}
}

func BenchmarkMount(b *testing.B) {
	modes(b, func(b *testing.B, sealed bool) {
		srv := benchServer(b)
		at := b.TempDir()
		m, err := smbfs.New(newShare(b, srv, func(o *smb.Options) { o.Encrypt = sealed }), ".", at, smbfs.Options{})
		must(b, err)
		defer func() { must(b, m.Unmount(true)) }()
		data := benchData()
		name := filepath.Join(at, "x")
		b.Run("write", func(b *testing.B) {
			b.SetBytes(benchSize)
			for b.Loop() {
				f, err := os.Create(name)
				must(b, err)
				_, err = io.Copy(onlyWriter{f}, bytes.NewReader(data))
				must(b, err)
				must(b, f.Close())
			}
		})
		b.Run("read", func(b *testing.B) {
			b.SetBytes(benchSize)
			buf := make([]byte, 1<<20)
			for b.Loop() {
				b.StopTimer()
				must(b, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0))
				b.StartTimer()
				f, err := os.Open(name)
				must(b, err)
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
				if err != nil || n != benchSize {
					b.Fatalf("%d bytes, %v", n, err)
				}
				must(b, f.Close())
			}
		})
	})
}

// onlyWriter makes io.Copy write in pieces of 1 MiB, as cp does about.
type onlyWriter struct{ f *os.File }

func (w onlyWriter) Write(p []byte) (int, error) {
	done := 0
	for len(p) > 0 {
		n, err := w.f.Write(p[:min(len(p), 1<<20)])
		done, p = done+n, p[n:]
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func BenchmarkMountList(b *testing.B) {
	srv := benchServer(b)
	for i := range 10_000 {
		must(b, os.WriteFile(filepath.Join(srv.Path(smbtest.RW), fmt.Sprintf("f%05d", i)), nil, 0o600))
	}
	at := b.TempDir()
	m, err := smbfs.New(newShare(b, srv, nil), ".", at, smbfs.Options{})
	must(b, err)
	defer func() { must(b, m.Unmount(true)) }()
	for b.Loop() {
		out, err := exec.Command("ls", "-l", at).Output()
		if err != nil || strings.Count(string(out), "\n") != 10_001 {
			b.Fatalf("ls: %v", err)
		}
	}
}
