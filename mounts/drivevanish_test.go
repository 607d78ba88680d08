package mounts

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestVanish removes mounts while a careless program writes below them by
// path: nothing may land in the bare folder.
func TestVanish(t *testing.T) {
	base := t.TempDir()
	for _, propagation := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := unix.Mount("base", base, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("", base, "", propagation, ""); err != nil {
			t.Fatal(err)
		}
		for range 50 {
			dir, err := claimDir(filepath.Join(base, "drive"))
			if err != nil {
				t.Fatal(err)
			}
			c := claim{Path: dir.path, Ino: dir.ino}
			if err := errors.Join(dir.Close(), unix.Mount("drive", c.Path, "tmpfs", 0, "size=1m")); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			var writer sync.WaitGroup
			started := make(chan struct{})
			writer.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					os.WriteFile(filepath.Join(c.Path, "file"), nil, 0o600) // it fails in the end
					if i == 0 {
						close(started)
					}
				}
			})
			<-started
			err = vanish(c)
			stop()
			writer.Wait()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(c.Path); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("the folder is still there: %v", err)
			}
			table, err := mountsOf("/proc", "self")
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range table {
				if m.Mountpoint == c.Path {
					t.Fatal("something is still mounted there")
				}
			}
		}
		if err := unix.Unmount(base, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestVanishOther leaves alone what is not the folder that was claimed, or not
// empty below the mount.
func TestVanishOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "drive")
	dir, err := claimDir(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	c := claim{Path: path, Ino: dir.ino}
	if err := os.WriteFile(filepath.Join(path, "before"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("drive", path, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	if err := vanish(c); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("a folder with something in it: %v", err)
	}
	other := c
	other.Ino++
	if err := vanish(other); !errors.Is(err, errOccupied) {
		t.Errorf("another folder: %v", err)
	}
	// The mount is untouched after both.
	if err := unix.Unmount(path, 0); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(path, "before")); err != nil {
		t.Error(err)
	}
}

// TestOnSpareThread checks that the process stays in its mount namespace, also
// when the first thread is the one that is free.
func TestOnSpareThread(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 50 {
		group.Go(func() {
			err := onSpareThread(func() error {
				if unix.Gettid() == unix.Getpid() {
					return errors.New("it runs on the first thread")
				}
				return unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if after, err := os.Readlink("/proc/self/ns/mnt"); err != nil || after != before {
		t.Errorf("the process was in %s, is in %s: %v", before, after, err)
	}
}
