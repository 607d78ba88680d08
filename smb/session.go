package smb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hirochachacha/go-smb2"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// credits is how much of the server's window we use per session, in units of
// 64 KiB. The library asks for 128 and miscounts them: it sends a request
// with too few when they run short, which servers answer with an error.
const credits = 96

// grace is how long an operation whose context was cancelled may still take
// before its connection is closed. A healthy server answers sooner, and the
// session's other users keep their connection.
const grace = 500 * time.Millisecond

// A session is one TCP connection with a logged-in user.
//
// The library's own cancelling (WithContext) can deadlock it, and its
// deadlines are ignored while a send is blocked. So each operation has a timer
// that closes the TCP connection: that ends every call of the library at
// once, on every path, and the session is dead from then on.
type session struct {
	wire    *wire
	smb     *smb2.Session
	server  string
	credits *semaphore.Weighted

	// closed ends after the TCP connection did, never before: the library
	// then has nothing left to do for which its cancelling is unsafe, and
	// calls that wait for credits which never come return too.
	closed context.Context
	cancel context.CancelFunc

	load     int       // users; guarded by Client.mu
	lastUsed time.Time // when load became 0; guarded by Client.mu
	watch    atomic.Bool

	mounting sync.Mutex
	trees    map[string]tree // guarded by mounting
}

// A tree is one share of a session.
type tree struct {
	*smb2.Share
	readOnly bool // the user may not write to it
}

// dial opens a connection and logs in. hash is the password's NT hash, which
// dial does not keep.
func dial(ctx context.Context, o *Options, hash []byte) (*session, error) {
	ctx, stop := context.WithTimeout(ctx, o.DialTimeout)
	defer stop()
	host := target(o.Server, "", "")

	conn, err := o.Dial(ctx, "tcp", o.address())
	if err != nil {
		if ctx.Err() == context.Canceled {
			return nil, context.Canceled
		}
		return nil, &Error{Op: "connect", Target: host, Kind: dialKind(err), Err: err}
	}
	harden(conn, o.DataTimeout)

	s := &session{
		wire: newWire(conn, wirePolicy{
			minDialect: o.MinDialect, seal: o.Encrypt,
			user: o.Credentials.Username, ntHash: bytes.Clone(hash),
		}),
		server:  o.Server,
		credits: semaphore.NewWeighted(credits),
		trees:   make(map[string]tree),
	}
	s.closed, s.cancel = context.WithCancel(context.Background())
	d := &smb2.Dialer{
		Negotiator: smb2.Negotiator{RequireMessageSigning: true},
		Initiator: &smb2.NTLMInitiator{
			User: o.Credentials.Username, Domain: o.Credentials.Domain, Hash: hash,
		},
	}
	err = s.run(ctx, 1, o.DialTimeout, func() error {
		login, err := d.DialContext(s.closed, s.wire)
		if err == nil {
			s.smb = login.WithContext(s.closed)
		}
		return err
	})
	if err == nil {
		return s, nil
	}
	status := s.wire.state().loginStatus
	s.kill(err)
	if errors.Is(err, context.Canceled) {
		return nil, err
	}
	kind := kindOfStatus(status)
	switch {
	case kind != nil: // the library hides the status of the first answer
		err = fmt.Errorf("status %#x", status)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, ErrConnectionLost):
		kind = ErrUnreachable
	default:
		return nil, fail("log in to", host, err)
	}
	return nil, &Error{Op: "log in to", Target: host, Kind: kind, Err: err}
}

// harden makes the kernel notice a dead peer: by probes while the connection
// is idle, and while data waits to be acknowledged.
func harden(conn net.Conn, limit time.Duration) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	// Failing here loses nothing but an early notice: the timers remain.
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3})
	_ = tcp.SetNoDelay(true)
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(limit.Milliseconds()))
	})
}

// kill ends the session and every call that uses it.
func (s *session) kill(why error) {
	s.wire.give(why)
	s.cancel()
}

// dead reports whether the session ended.
func (s *session) dead() bool { return s.wire.reason() != nil }

// run calls fn, which makes one request to the server or a few in a row and
// needs at most the given number of credits at a time. If fn takes longer than
// limit, or ctx ends and fn takes longer than the grace, the connection is
// closed and fn returns. A request that panics on a hostile answer ends the
// session.
func (s *session) run(ctx context.Context, need int64, limit time.Duration, fn func() error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.credits.Acquire(ctx, need); err != nil {
		return err
	}
	defer s.credits.Release(need)
	if why := s.wire.reason(); why != nil {
		return lost(why)
	}

	var done atomic.Bool
	timer := time.AfterFunc(limit, func() {
		if !done.Load() {
			s.kill(fmt.Errorf("%w: no answer within %v", ErrConnectionLost, limit))
		}
	})
	stop := context.AfterFunc(ctx, func() {
		if !done.Load() {
			timer.Reset(min(grace, limit))
		}
	})
	defer func() {
		done.Store(true)
		stop()
		timer.Stop()
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrProtocol, r)
		}
		if err == nil {
			return
		}
		switch kind := kindOf(err); {
		case s.dead():
			if cerr := ctx.Err(); cerr != nil {
				err = cerr
			} else {
				err = lost(s.wire.reason())
			}
		case kind == ErrConnectionLost, kind == ErrProtocol, errors.Is(err, ErrProtocol):
			s.kill(err)
		}
	}()
	return fn()
}

// lost turns the reason why a connection ended into the error of a call that
// used it.
func lost(why error) error {
	for _, k := range []error{ErrConnectionLost, ErrProtocol, ErrGuest, ErrNotSealed, ErrDialect} {
		if errors.Is(why, k) {
			return why
		}
	}
	return fmt.Errorf("%w: %w", ErrConnectionLost, why)
}

// tree returns the session's connection to a share, and makes it when it is
// the first.
func (s *session) tree(ctx context.Context, name string, limit time.Duration) (tree, error) {
	s.mounting.Lock()
	defer s.mounting.Unlock()
	if t, ok := s.trees[name]; ok {
		return t, nil
	}
	var t tree
	err := s.run(ctx, 1, limit, func() (err error) {
		t.Share, err = s.smb.Mount(`\\` + hostOf(s.server) + `\` + name)
		return err
	})
	where := target(s.server, name, "")
	if errors.Is(err, fs.ErrPermission) {
		return tree{}, &Error{Op: "use", Target: where, Kind: ErrShareDenied}
	}
	if err != nil {
		return tree{}, fail("use", where, err)
	}
	t.Share = t.WithContext(s.closed)
	t.readOnly = s.wire.state().readOnly // nobody else connects a share meanwhile
	s.trees[name] = t
	return t, nil
}

// explain tells a refused write to a read-only share from a refused file.
func (t tree) explain(err error) error {
	if t.readOnly && errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return err
}

// forget keeps the library from closing a file when the garbage collector
// finds it: that would be a call without a timer.
func forget(f *smb2.File) { runtime.SetFinalizer(f, nil) }
