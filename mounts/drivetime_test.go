package mounts

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/iot49/ide49-backup/udev"
)

// silent is a kernel that never tells anything.
func silent(ctx context.Context) iter.Seq2[udev.Event, error] {
	return func(func(udev.Event, error) bool) { <-ctx.Done() }
}

// TestWithoutEvents lets the clock run: what no event tells is found by the
// next look, and a card reader is asked for its card every two seconds where
// the kernel does not do it.
func TestWithoutEvents(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q", "-L", "CARD"))
	dev, err := udev.Read(udev.Sysfs, s.name)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		reader func(t *testing.T, disk string) // makes the disk a card reader
		within time.Duration
	}{
		{"a disk", func(t *testing.T, disk string) {}, rescanEvery},
		{"a card reader that the kernel asks", func(t *testing.T, disk string) {
			put(t, disk, "removable", "1")
			put(t, disk, "events", "media_change eject_request")
			put(t, disk, "events_poll_msecs", "-1")
		}, rescanEvery},
		{"a card reader that we ask", func(t *testing.T, disk string) {
			put(t, disk, "removable", "1")
			put(t, disk, "events", "media_change")
			// A folder can't be written, as in a container with a read-only /sys.
			if err := os.Mkdir(filepath.Join(disk, "events_poll_msecs"), 0o755); err != nil {
				t.Fatal(err)
			}
		}, mediaPoll},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sys := newSysTree(t)
			sys.plug(dev, 5)
			disk := filepath.Join(sys.root, "devices/pci0/usb1/1-1/block", dev.Name)
			tt.reader(t, disk)
			put(t, disk, "size", "0")
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				d, err := NewDrives(DriveConfig{Mount: filepath.Join(dir, "mnt"), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")},
					DriveEvents{Failed: func(err error) { t.Error(err) }})
				if err != nil {
					t.Fatal(err)
				}
				d.sysfs, d.watch = sys.root, silent
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error)
				go func() { ended <- d.Run(ctx) }()
				// Past the look that follows the first one.
				time.Sleep(settleTime + time.Millisecond)
				synctest.Wait()
				if list := d.List(); len(list) != 1 || list[0].State != DriveEmpty {
					t.Errorf("at first: %+v", list)
				}
				put(t, disk, "size", fmt.Sprint(dev.Size/512))
				// The ticks began with Run.
				time.Sleep(tt.within - settleTime - 2*time.Millisecond)
				synctest.Wait()
				if list := d.List(); list[0].State != DriveEmpty {
					t.Errorf("too early: %+v", list)
				}
				time.Sleep(2 * time.Millisecond)
				synctest.Wait()
				if list := d.List(); list[0].State != DriveMounted || !strings.HasSuffix(list[0].Path, "/CARD") {
					t.Errorf("after %v: %+v", tt.within, list)
				}
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
			if tt.within == rescanEvery && tt.name != "a disk" {
				if b, err := os.ReadFile(filepath.Join(disk, "events_poll_msecs")); err != nil || string(b) != "2000" {
					t.Errorf("the kernel asks every %q ms, %v", b, err)
				}
			}
		})
	}
}

func put(t *testing.T, disk, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(disk, name), []byte(value), 0o644); err != nil {
		t.Error(err)
	}
}

// TestFailingEvents goes on by itself when the kernel's events end.
func TestFailingEvents(t *testing.T) {
	dir := t.TempDir()
	var failed []error
	gone := errors.New("no more events")
	sys := newSysTree(t)
	begun := 0
	watch := func(ctx context.Context) iter.Seq2[udev.Event, error] {
		return func(yield func(udev.Event, error) bool) {
			begun++
			yield(udev.Event{}, fmt.Errorf("%w: %w", gone, udev.ErrEnded))
		}
	}
	synctest.Test(t, func(t *testing.T) {
		d, err := NewDrives(DriveConfig{Mount: filepath.Join(dir, "mnt"), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")},
			DriveEvents{Failed: func(err error) { failed = append(failed, err) }})
		if err != nil {
			t.Fatal(err)
		}
		d.sysfs, d.watch = sys.root, watch
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if err := d.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	if begun < 2 || begun > 12 || len(failed) < begun-1 || !errors.Is(failed[0], gone) {
		t.Errorf("watched %d times, told %v", begun, failed)
	}
}
