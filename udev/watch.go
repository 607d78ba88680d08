package udev

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"github.com/pilebones/go-udev/netlink"
	"golang.org/x/sys/unix"
)

// receiveBuffer is the size in bytes asked for the socket's queue, room for
// about ten thousand messages; it costs memory only while they wait.
const receiveBuffer = 16 << 20

// Watch yields the block devices that are present as Listed events, and then
// every event of the kernel about a block device, until ctx is done or the
// loop is left. It subscribes before it lists, so a device that comes meanwhile
// is yielded, perhaps twice.
//
// A message that can't be read is yielded as an error, and the next follows.
// When the kernel dropped messages because the loop was too slow, a Resync
// event says so, and another when all that were left are read. Only an error that also wraps ErrEnded is
// final. Messages that the kernel did not send itself are ignored. When ctx is
// done, the iteration ends at once and without an error.
func Watch(ctx context.Context) iter.Seq2[Event, error] {
	return watch(ctx, Sysfs, receiveBuffer)
}

// ErrEnded is wrapped by the last error of Watch.
var ErrEnded = errors.New("no more device events")

func watch(ctx context.Context, sysfs string, bufsize int) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		if ctx.Err() != nil {
			return
		}
		s, err := subscribe(bufsize)
		if err != nil {
			yield(Event{}, fmt.Errorf("subscribing to the kernel's device events: %w: %w", err, ErrEnded))
			return
		}
		defer s.Close()
		// An expired deadline wakes a waiting read; unlike Close it cannot
		// meet a descriptor that was given to somebody else meanwhile.
		woken := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(woken)
			s.wake()
		})
		defer func() {
			if !stop() {
				<-woken
			}
		}()

		for e, err := range listed(sysfs) {
			if ctx.Err() != nil || !yield(e, err) {
				return
			}
		}
		for ctx.Err() == nil {
			e, err := s.receive()
			switch {
			case errors.Is(err, errNotBlock):
				continue
			case errors.Is(err, os.ErrDeadlineExceeded):
				return
			case errors.Is(err, ErrEnded):
				if ctx.Err() == nil {
					yield(Event{}, err)
				}
				return
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// A socket receives the kernel's messages. go-udev opens it and has the types;
// the reading is ours, because its reader stops for good at the first overflow,
// can't be closed while it waits, and takes messages from anybody.
type socket struct {
	file *os.File
	buf  []byte

	// overrun is set from an overflow until the queue was empty. The kernel
	// reports only the first message that it drops; it reports the next one
	// when the queue was emptied in between.
	overrun bool
}

func subscribe(bufsize int) (*socket, error) {
	var c netlink.UEventConn
	if err := c.Connect(netlink.KernelEvent); err != nil {
		return nil, err
	}
	unix.CloseOnExec(c.Fd)
	if err := unix.SetsockoptInt(c.Fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bufsize); err != nil {
		// Without CAP_NET_ADMIN the kernel caps the size; overflows come
		// earlier then, and each is answered by a Resync.
		_ = unix.SetsockoptInt(c.Fd, unix.SOL_SOCKET, unix.SO_RCVBUF, bufsize)
	}
	if err := unix.SetNonblock(c.Fd, true); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	// Non-blocking, so that the runtime's poller waits for it.
	return &socket{
		file: os.NewFile(uintptr(c.Fd), "uevents"),
		buf:  make([]byte, 64<<10),
	}, nil
}

func (s *socket) Close() error { return s.file.Close() }

// wake makes a waiting and every later receive answer os.ErrDeadlineExceeded.
func (s *socket) wake() { _ = s.file.SetReadDeadline(aLongTimeAgo) }

func (s *socket) receive() (Event, error) {
	var (
		n, flags int
		from     unix.Sockaddr
		rerr     error
	)
	conn, err := s.file.SyscallConn()
	if err != nil {
		return Event{}, fmt.Errorf("waiting for device events: %w: %w", err, ErrEnded)
	}
	err = conn.Read(func(fd uintptr) bool {
		for {
			n, _, flags, from, rerr = unix.Recvmsg(int(fd), s.buf, nil, unix.MSG_DONTWAIT)
			if rerr != unix.EINTR {
				return rerr != unix.EAGAIN || s.overrun
			}
		}
	})
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Event{}, err
	case err != nil:
		return Event{}, fmt.Errorf("waiting for device events: %w: %w", err, ErrEnded)
	case rerr == unix.ENOBUFS:
		s.overrun = true
		return Event{Action: Resync}, nil
	case rerr == unix.EAGAIN:
		s.overrun = false
		return Event{Action: Resync}, nil
	case rerr != nil:
		return Event{}, fmt.Errorf("reading device events: %w: %w", rerr, ErrEnded)
	}
	if !fromKernel(from) {
		return Event{}, errNotBlock
	}
	if flags&unix.MSG_TRUNC != 0 {
		return Event{Action: Resync}, nil
	}
	u, err := parse(s.buf[:n])
	if err != nil {
		return Event{}, err
	}
	return event(u)
}

// fromKernel reports whether the kernel itself sent a message. A process that
// may send to this group has its port as the sender.
func fromKernel(from unix.Sockaddr) bool {
	nl, ok := from.(*unix.SockaddrNetlink)
	return ok && nl.Pid == 0
}
