package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A note is one line of the witness.
type note struct {
	Microseconds int64  // since boot
	Kind         string // uevent, mount, unmount, lost
	Action       string `json:",omitempty"` // of a uevent
	Name         string `json:",omitempty"` // kernel name of the device of a uevent
	Mount        string `json:",omitempty"` // line of /proc/self/mountinfo
}

// A log is a file of JSON lines that several goroutines write to.
type log struct {
	mu sync.Mutex
	f  *os.File
}

func openLog(name string) (*log, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	return &log{f: f}, err
}

func (l *log) put(line any) error {
	b, err := json.Marshal(line)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err = l.f.Write(append(b, '\n'))
	return err
}

// witness notes what happens until ctx is done.
func witness(ctx context.Context, file string) error {
	l, err := openLog(file)
	if err != nil {
		return err
	}
	defer l.f.Close()
	// One poll for both sources, and a pipe that wakes it.
	events, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer unix.Close(events)
	if err := unix.SetsockoptInt(events, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	if err := unix.Bind(events, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	table, err := openTable()
	if err != nil {
		return err
	}
	defer unix.Close(table)
	before, err := mounts()
	if err != nil {
		return err
	}
	wakeR, wakeW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer wakeR.Close()
	defer wakeW.Close()
	stop := context.AfterFunc(ctx, func() { wakeW.Write([]byte{0}) })
	defer stop()

	if err := l.put(note{Microseconds: now(), Kind: "ready"}); err != nil {
		return err
	}
	fds := []unix.PollFd{
		{Fd: int32(events), Events: unix.POLLIN},
		{Fd: int32(table), Events: unix.POLLPRI},
		{Fd: int32(wakeR.Fd()), Events: unix.POLLIN},
	}
	buf := make([]byte, 64<<10)
	for {
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
		at := now()
		if fds[2].Revents != 0 {
			return nil
		}
		for fds[0].Revents != 0 {
			n, _, err := unix.Recvfrom(events, buf, 0)
			if err == unix.EAGAIN {
				break
			}
			line := note{Microseconds: at, Kind: "lost"}
			if err == nil {
				var block bool
				if line, block = uevent(buf[:n]); !block {
					continue
				}
				line.Microseconds = at
			}
			if err := l.put(line); err != nil {
				return err
			}
		}
		if fds[1].Revents == 0 {
			continue
		}
		after, err := mounts()
		if err != nil {
			return err
		}
		for _, line := range before {
			if !slices.Contains(after, line) {
				if err := l.put(note{Microseconds: at, Kind: "unmount", Mount: line}); err != nil {
					return err
				}
			}
		}
		for _, line := range after {
			if !slices.Contains(before, line) {
				if err := l.put(note{Microseconds: at, Kind: "mount", Mount: line}); err != nil {
					return err
				}
			}
		}
		before = after
	}
}

// uevent reads a kernel message about a block device.
func uevent(msg []byte) (n note, block bool) {
	n.Kind = "uevent"
	for line := range bytes.SplitSeq(msg, []byte{0}) {
		key, value, _ := strings.Cut(string(line), "=")
		switch key {
		case "ACTION":
			n.Action = value
		case "DEVNAME":
			n.Name = value
		case "SUBSYSTEM":
			block = value == "block"
		}
	}
	return n, block
}

// openTable opens the mount table for poll. An os.File won't do: the runtime's
// poller would take the news, which each open file is told once.
func openTable() (int, error) {
	fd, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("mount table: %w", err)
	}
	return fd, nil
}

// mounts returns the lines of the mount table.
func mounts() ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	return strings.Split(strings.TrimSpace(string(b)), "\n"), err
}

// await waits until something is mounted at dir. It takes no time from what is
// measured meanwhile.
func await(dir string) error {
	table, err := openTable()
	if err != nil {
		return err
	}
	defer unix.Close(table)
	for {
		lines, err := mounts()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, " "+dir+" ") }) {
			return nil
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(table), Events: unix.POLLPRI}}, -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
	}
}
