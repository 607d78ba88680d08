package smb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// A Dialect is a version of the SMB protocol as it goes over the wire.
type Dialect uint16

// The dialects that the client speaks. It asks for the newest that the server
// has.
const (
	SMB202 Dialect = 0x0202
	SMB210 Dialect = 0x0210
	SMB300 Dialect = 0x0300
	SMB302 Dialect = 0x0302
	SMB311 Dialect = 0x0311
)

// String returns the dialect's usual name, such as "SMB 3.1.1".
func (d Dialect) String() string {
	s := fmt.Sprintf("SMB %d.%d", d>>8, d>>4&15)
	if d&15 != 0 {
		s += fmt.Sprintf(".%d", d&15)
	}
	return s
}

// Options say which server to use and how. The zero value of each but Server
// and Credentials is a good choice.
type Options struct {
	Server      string // host or address, with :port when that isn't 445
	Credentials Credentials

	// Encrypt makes every packet after the login encrypted, whatever the
	// server asks for, or the connection fails with [ErrNotSealed]. Without
	// it packets are signed, and encrypted where the server demands it.
	Encrypt bool

	MinDialect  Dialect // oldest to accept; 0: SMB210, or SMB300 with Encrypt
	MaxSessions int     // TCP connections at a time; 0: 4

	DialTimeout time.Duration // for connecting and logging in; 0: 5 s
	MetaTimeout time.Duration // for one request without file data; 0: 15 s
	DataTimeout time.Duration // for up to 1 MiB of file data; 0: 30 s
	IdleTimeout time.Duration // a session without users is closed after it; 0: 60 s

	// Dial opens the TCP connection; nil uses a [net.Dialer].
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

func (o *Options) complete() error {
	host, port, err := net.SplitHostPort(o.address())
	if err != nil || host == "" || port == "" || strings.ContainsAny(host, "/\\ @\x00") {
		return fmt.Errorf("server %q: want a host, an address, or either with :port", o.Server)
	}
	if err := o.Credentials.check(); err != nil {
		return fmt.Errorf("server %s: %w", o.Server, err)
	}
	set := func(d *time.Duration, to time.Duration) {
		if *d <= 0 {
			*d = to
		}
	}
	set(&o.DialTimeout, 5*time.Second)
	set(&o.MetaTimeout, 15*time.Second)
	set(&o.DataTimeout, 30*time.Second)
	set(&o.IdleTimeout, 60*time.Second)
	if o.MaxSessions <= 0 {
		o.MaxSessions = 4
	}
	if o.MinDialect == 0 {
		o.MinDialect = SMB210
	}
	if o.Encrypt {
		o.MinDialect = max(o.MinDialect, SMB300)
	}
	if o.Dial == nil {
		o.Dial = new(net.Dialer).DialContext
	}
	return nil
}

// address returns host:port for TCP.
func (o *Options) address() string {
	if _, _, err := net.SplitHostPort(o.Server); err == nil {
		return o.Server
	}
	return net.JoinHostPort(strings.Trim(o.Server, "[]"), "445")
}

// hostOf returns the host of a server given as host or host:port.
func hostOf(server string) string {
	if host, _, err := net.SplitHostPort(server); err == nil {
		return host
	}
	return strings.Trim(server, "[]")
}

// A Client is a pool of sessions on one server for one user. It connects when
// it is first used, again when a connection broke, and not more often than
// its backoff allows: until then calls fail at once with the last reason.
// All methods may be called from any number of goroutines; none of them
// blocks for longer than the time-outs of its [Options] allow.
type Client struct {
	opt     Options
	dialing chan struct{} // holds a token while somebody dials

	mu        sync.Mutex
	sessions  []*session
	closed    bool
	idle      *time.Timer // closes idle sessions
	failures  int
	lastErr   error // of the last attempt to connect; nil after a success
	notBefore time.Time
	growAfter time.Time // an additional session could not be made
	refused   []byte    // hash of the password that the server refused
	state     State
}

// State tells whether a client's server can be used.
type State struct {
	Up    bool      // the last attempt to use it succeeded
	Since time.Time // when that became so; zero before the first attempt
	Err   error     // why it can't be used
}

// New returns a client. It makes no connection yet.
func New(o Options) (*Client, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	return &Client{opt: o, dialing: make(chan struct{}, 1)}, nil
}

// Server returns the server's name as it was configured.
func (c *Client) Server() string { return c.opt.Server }

// State returns what the client knows about the server, without asking it.
func (c *Client) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// Close ends all sessions; calls in flight fail.
func (c *Client) Close() error {
	c.mu.Lock()
	sessions := c.sessions
	c.sessions, c.closed = nil, true
	if c.idle != nil {
		c.idle.Stop()
	}
	clear(c.refused)
	c.mu.Unlock()
	for _, s := range sessions {
		s.kill(ErrClosed)
	}
	return nil
}

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 10 * time.Second
	// Servers lock an account after a few wrong passwords.
	loginBackoff    = time.Minute
	maxLoginBackoff = 30 * time.Minute

	probeAfter = 10 * time.Second // idle for longer: ask before trusting it
	probeLimit = 3 * time.Second
)

// backoff returns how long to wait after so many failures in a row.
func backoff(failures int, err error) time.Duration {
	first, limit := firstBackoff, maxBackoff
	if errors.Is(err, ErrCredentials) || errors.Is(err, ErrAccount) || errors.Is(err, ErrExpired) {
		first, limit = loginBackoff, maxLoginBackoff
	}
	d := limit
	if failures <= 16 {
		d = min(first<<(failures-1), limit)
	}
	return d - rand.N(d/4) // jitter, so that devices don't come back all at once
}

// lease returns a session for use by the caller until it calls release.
func (c *Client) lease(ctx context.Context) (s *session, release func(), err error) {
	for {
		s, err := c.pick()
		if err != nil {
			return nil, nil, err
		}
		if s == nil {
			if s, err = c.connect(ctx); err != nil {
				if err == errNoMore {
					continue
				}
				return nil, nil, err
			}
			if s == nil {
				continue // somebody else connected meanwhile
			}
		}
		if s.watch.CompareAndSwap(true, false) {
			if err := s.run(ctx, 1, min(probeLimit, c.opt.MetaTimeout), s.probe); err != nil {
				c.release(s)
				if ctx.Err() != nil {
					return nil, nil, ctx.Err()
				}
				s.kill(err)
				continue
			}
		}
		var once sync.Once
		return s, func() { once.Do(func() { c.release(s) }) }, nil
	}
}

// probe asks for something that every server answers.
func (s *session) probe() error {
	t, err := s.smb.Mount(`\\` + hostOf(s.server) + `\IPC$`)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) || kindOf(err) == ErrNoShare {
			return nil // an answer
		}
		return err
	}
	return t.WithContext(s.closed).Umount()
}

// pick returns the session with the fewest users, or nil if a new one should
// be made.
func (c *Client) pick() (*session, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, &Error{Op: "connect", Target: target(c.opt.Server, "", ""), Kind: ErrClosed}
	}
	c.sessions = slices.DeleteFunc(c.sessions, (*session).dead)
	if len(c.sessions) == 0 {
		return nil, nil
	}
	s := slices.MinFunc(c.sessions, func(a, b *session) int { return a.load - b.load })
	if s.load > 0 && len(c.sessions) < c.opt.MaxSessions && len(c.dialing) == 0 && time.Now().After(c.growAfter) {
		return nil, nil
	}
	if s.load == 0 && time.Since(s.lastUsed) > probeAfter {
		s.watch.Store(true)
	}
	s.load++
	return s, nil
}

func (c *Client) release(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.load--
	if s.load > 0 {
		return
	}
	s.lastUsed = time.Now()
	if c.closed || s.dead() {
		return
	}
	if c.idle == nil {
		c.idle = time.AfterFunc(c.opt.IdleTimeout, c.sweep)
	} else {
		c.idle.Reset(c.opt.IdleTimeout)
	}
}

// sweep closes sessions that nobody uses.
func (c *Client) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	busy := false
	c.sessions = slices.DeleteFunc(c.sessions, func(s *session) bool {
		if s.load == 0 && time.Since(s.lastUsed) >= c.opt.IdleTimeout {
			s.kill(ErrClosed)
			return true
		}
		busy = busy || s.load == 0
		return false
	})
	if busy && !c.closed {
		c.idle.Reset(c.opt.IdleTimeout)
	}
}

// connect makes one more session, with a load of one. It returns nil if it
// had to wait for another caller who did.
func (c *Client) connect(ctx context.Context) (*session, error) {
	select {
	case c.dialing <- struct{}{}:
	default:
		select {
		case c.dialing <- struct{}{}:
			<-c.dialing
			c.mu.Lock()
			err := c.lastErr
			c.mu.Unlock()
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer func() { <-c.dialing }()

	if err := c.wait(nil); err != nil {
		return nil, err
	}
	hash, err := c.opt.Credentials.hash(ctx)
	if err != nil {
		return nil, &Error{Op: "log in to", Target: target(c.opt.Server, "", ""), Kind: ErrPassword, Err: err}
	}
	defer clear(hash)
	if err := c.wait(hash); err != nil {
		return nil, err
	}

	s, err := dial(ctx, &c.opt, hash)

	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err() // says nothing about the server
		}
		if slices.ContainsFunc(c.sessions, func(s *session) bool { return !s.dead() }) {
			c.growAfter = time.Now().Add(maxBackoff)
			return nil, errNoMore
		}
		c.failures++
		c.lastErr = err
		c.notBefore = time.Now().Add(backoff(c.failures, err))
		clear(c.refused)
		c.refused = nil
		if errors.Is(err, ErrCredentials) {
			c.refused = bytes.Clone(hash)
		}
		c.setState(false, err)
		return nil, err
	}
	c.failures, c.lastErr, c.refused = 0, nil, nil
	c.setState(true, nil)
	if c.closed {
		s.kill(ErrClosed)
		return nil, &Error{Op: "connect", Target: target(c.opt.Server, "", ""), Kind: ErrClosed}
	}
	s.load = 1
	c.sessions = append(c.sessions, s)
	return s, nil
}

// errNoMore says that no session could be added to those that there are.
var errNoMore = errors.New("no additional session")

// wait returns the last error while it is too soon to connect again. A password
// that the server refused is waited for long, but another one only if it is
// not known yet: hash is nil before it is read.
func (c *Client) wait(hash []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lastErr == nil || !time.Now().Before(c.notBefore) {
		return nil
	}
	if c.refused != nil && !bytes.Equal(c.refused, hash) {
		return nil
	}
	return c.lastErr
}

// setState notes whether the server can be used. c.mu is held.
func (c *Client) setState(up bool, err error) {
	if up != c.state.Up || c.state.Since.IsZero() {
		c.state.Since = time.Now()
	}
	c.state.Up, c.state.Err = up, err
}

// A ServerInfo describes a connection to a server.
type ServerInfo struct {
	Dialect Dialect
	Sealed  bool     // every packet is encrypted
	GUID    [16]byte // the server's own identity; not authenticated
}

// Connect makes sure that the server can be reached, accepts the user and
// agrees to encryption if that is wanted.
func (c *Client) Connect(ctx context.Context) (ServerInfo, error) {
	s, release, err := c.lease(ctx)
	if err != nil {
		return ServerInfo{}, err
	}
	defer release()
	// An existing session may have died without anybody noticing.
	if err := s.run(ctx, 1, c.opt.MetaTimeout, s.probe); err != nil {
		err = fail("ask", target(c.opt.Server, "", ""), err)
		c.note(err)
		return ServerInfo{}, err
	}
	n := s.wire.state()
	return ServerInfo{Dialect: n.dialect, Sealed: s.wire.sealed.Load(), GUID: n.serverGUID}, nil
}

// note records that a request failed because the server is away. A file of a
// lost connection says nothing while there is a good one.
func (c *Client) note(err error) {
	if !Away(err) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.ContainsFunc(c.sessions, func(s *session) bool { return !s.dead() }) {
		c.setState(false, err)
	}
}

// Shares returns the names of the server's shares, without hidden ones (those
// that end in $).
func (c *Client) Shares(ctx context.Context) ([]string, error) {
	s, release, err := c.lease(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	var names []string
	err = s.run(ctx, 16, c.opt.MetaTimeout, func() (err error) {
		names, err = s.smb.ListSharenames()
		return err
	})
	if err != nil {
		return nil, fail("list the shares of", target(c.opt.Server, "", ""), err)
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		_, ok := decodeName(name)
		return !ok || strings.HasSuffix(name, "$")
	})
	slices.Sort(names)
	return names, nil
}
