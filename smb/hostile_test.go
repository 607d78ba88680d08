package smb

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/hirochachacha/go-smb2"
	"golang.org/x/sync/semaphore"

	"github.com/iot49/ide49-backup/smb/smbtest"
)

var (
	hostileRounds = flag.Int("hostile", 12, "rounds with a hostile server")
	hostileSeed   = flag.Uint64("hostile-seed", 1, "seed of the hostile server")
)

func hostileOptions(s *smbtest.Server) Options {
	o := Options{
		Server:      s.Addr(),
		Credentials: Credentials{Username: smbtest.User, Password: smbtest.Password},
		DialTimeout: 200 * time.Millisecond,
		MetaTimeout: 200 * time.Millisecond,
		DataTimeout: 200 * time.Millisecond,
	}
	if err := o.complete(); err != nil {
		panic(err)
	}
	return o
}

// exercise calls everything that asks the server something. Errors are
// welcome; panics and hangs aren't.
func exercise(ctx context.Context, c *Client) (errs int) {
	count := func(err error) {
		if err != nil {
			errs++
		}
	}
	_, err := c.Connect(ctx)
	count(err)
	_, err = c.Shares(ctx)
	count(err)
	sh, err := c.Share(smbtest.RW)
	count(err)
	_, err = sh.Stat(ctx, "file")
	count(err)
	infos, err := sh.ReadDir(ctx, ".")
	count(err)
	for _, i := range infos {
		if !validLocal(i.Name) {
			panic(fmt.Sprintf("the name %q came through", i.Name))
		}
	}
	_, err = sh.Space(ctx, ".")
	count(err)
	count(sh.MkdirAll(ctx, "d/e"))
	if f, err := sh.Open(ctx, "file", os.O_RDWR|os.O_CREATE); err != nil {
		count(err)
	} else {
		count(f.WriteAt(ctx, make([]byte, 100_000), 0))
		b := make([]byte, 200_000)
		n, err := f.ReadAt(ctx, b, 0)
		if n < 0 || n > len(b) {
			panic(fmt.Sprintf("ReadAt = %d of %d", n, len(b)))
		}
		if err != io.EOF {
			count(err)
		}
		_, err = f.Stat(ctx)
		count(err)
		count(f.Truncate(ctx, 10))
		count(f.Sync(ctx))
		count(f.Close(ctx))
	}
	count(sh.SetTimes(ctx, "file", time.Now(), time.Now()))
	count(sh.SetReadOnly(ctx, "file", false))
	count(sh.Rename(ctx, "file", "file2"))
	count(sh.Remove(ctx, "file2"))
	count(sh.SyncDir(ctx, "."))
	return errs
}

func validLocal(name string) bool {
	_, err := encodePath(name)
	return err == nil && name != "."
}

// mutate damages a packet, keeping its size.
func mutate(rng *rand.Rand, p []byte) {
	if len(p) == 0 {
		return
	}
	for range 1 + rng.IntN(4) {
		// Lengths and offsets are near the beginnings.
		at := rng.IntN(len(p))
		if rng.IntN(2) == 0 {
			at = rng.IntN(min(len(p), 96))
		}
		switch rng.IntN(4) {
		case 0:
			p[at] ^= 1 << rng.IntN(8)
		case 1:
			p[at] = byte(rng.Uint32())
		case 2:
			if at+4 <= len(p) {
				edge := []uint32{0, 1, 0x7fffffff, 0x80000000, 0xffffffff, uint32(len(p)), 0xfffffff0}
				binary.LittleEndian.PutUint32(p[at:], edge[rng.IntN(len(edge))])
			}
		case 3:
			for i := at; i < min(at+16, len(p)); i++ {
				p[i] = 0xff
			}
		}
	}
}

// A line damages what a server sends on the way: it truncates, repeats,
// reorders and lengthens packets, and changes their bytes. It speaks the
// framing, so that the damage reaches more than the first length.
type line struct {
	net.Conn
	rng  *rand.Rand
	rate int // one packet of so many is damaged
	out  []byte
	held []byte
}

func (l *line) Read(p []byte) (int, error) {
	for len(l.out) == 0 {
		var head [4]byte
		if _, err := io.ReadFull(l.Conn, head[:]); err != nil {
			return 0, err
		}
		pkt := make([]byte, binary.BigEndian.Uint32(head[:])&0xffffff)
		if _, err := io.ReadFull(l.Conn, pkt); err != nil {
			return 0, err
		}
		frame := func(b []byte) { l.out = append(binary.BigEndian.AppendUint32(l.out, uint32(len(b))), b...) }
		if l.rng.IntN(l.rate) != 0 {
			frame(pkt)
			if l.held != nil {
				frame(l.held)
				l.held = nil
			}
			continue
		}
		switch l.rng.IntN(7) {
		case 0: // shorter
			frame(pkt[:l.rng.IntN(len(pkt)+1)])
		case 1: // longer
			frame(append(pkt, make([]byte, l.rng.IntN(3<<20))...))
		case 2: // twice
			frame(pkt)
			frame(pkt)
		case 3: // later
			l.held = pkt
		case 4: // a length that is a lie
			l.out = append(binary.BigEndian.AppendUint32(l.out, l.rng.Uint32()), pkt...)
		case 5: // noise
			noise := make([]byte, l.rng.IntN(500))
			for i := range noise {
				noise[i] = byte(l.rng.Uint32())
			}
			frame(append([]byte("\xfeSMB@\x00"), noise...))
		default:
			mutate(l.rng, pkt)
			frame(pkt)
		}
	}
	n := copy(p, l.out)
	l.out = l.out[n:]
	return n, nil
}

// TestHostileLine puts a damaging line between the client and a real server.
func TestHostileLine(t *testing.T) {
	s := smbtest.Start(t)
	rng := rand.New(rand.NewPCG(*hostileSeed, 1))
	before := runtime.NumGoroutine()
	failed := 0
	for round := range *hostileRounds {
		o := hostileOptions(s)
		o.Encrypt = round%2 == 0
		rate := 1 + rng.IntN(20)
		seed := rng.Uint64()
		conns := uint64(0)
		o.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			conns++
			return &line{Conn: c, rng: rand.New(rand.NewPCG(seed, conns)), rate: rate}, err
		}
		c, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		failed += exercise(t.Context(), c)
		if d := time.Since(start); d > 30*time.Second {
			t.Errorf("round %d: %v", round, d)
		}
		c.Close()
	}
	if failed == 0 {
		t.Error("no call failed: the line is no good")
	}
	// The library's goroutines must end with their connections.
	for start := time.Now(); runtime.NumGoroutine() > before+2; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("%d goroutines are left, there were %d", runtime.NumGoroutine(), before)
		}
	}
}

// A traitor is the connection of a server that is hostile and knows the
// session's keys: its packets are damaged and then signed well.
type traitor struct {
	*wire
	rng  *rand.Rand
	rate int
}

func (h *traitor) Read(p []byte) (int, error) {
	n, err := h.wire.Read(p)
	if err == nil && n > 4 && p[0] == 0xfe && h.established.Load() && h.rng.IntN(h.rate) == 0 {
		if body := p[headerSize:n]; h.rng.IntN(4) > 0 {
			mutate(h.rng, body)
		} else {
			mutate(h.rng, p[8:n]) // the header too, but for what it is known by
			binary.LittleEndian.PutUint32(p[20:], 0)
		}
		h.keys.sign(p[:n])
	}
	return n, err
}

// TestHostileServer damages answers below their signatures: the library
// believes them and decodes them.
func TestHostileServer(t *testing.T) {
	s := smbtest.Start(t)
	rng := rand.New(rand.NewPCG(*hostileSeed, 2))
	failed := 0
	for round := range *hostileRounds {
		o := hostileOptions(s)
		c, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		// Without a hook in dial, a session is made here as dial makes it.
		hash, err := o.Credentials.hash(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			conn, err := net.Dial("tcp", o.address())
			if err != nil {
				t.Fatal(err)
			}
			se := &session{
				wire:    newWire(conn, wirePolicy{minDialect: SMB210, user: smbtest.User, ntHash: append([]byte(nil), hash...)}),
				server:  o.Server,
				credits: semaphore.NewWeighted(credits),
				trees:   make(map[string]tree),
			}
			se.closed, se.cancel = context.WithCancel(context.Background())
			h := &traitor{wire: se.wire, rng: rand.New(rand.NewPCG(rng.Uint64(), 3)), rate: 1 + rng.IntN(12)}
			d := &smb2.Dialer{
				Negotiator: smb2.Negotiator{RequireMessageSigning: true},
				Initiator:  &smb2.NTLMInitiator{User: smbtest.User, Hash: hash},
			}
			if err := se.run(t.Context(), 1, o.DialTimeout, func() error {
				login, err := d.DialContext(se.closed, h)
				if err == nil {
					se.smb = login.WithContext(se.closed)
				}
				return err
			}); err != nil {
				se.kill(err) // the login's last answer was damaged
				continue
			}
			c.sessions = append(c.sessions, se)
		}
		start := time.Now()
		failed += exercise(t.Context(), c)
		if d := time.Since(start); d > 30*time.Second {
			t.Errorf("round %d: %v", round, d)
		}
		c.Close()
	}
	if failed == 0 {
		t.Error("no call failed: the damage doesn't reach the library")
	}
}

// TestForgedLogin checks that a server that doesn't know the password is
// found out, also if it declares the user a guest.
func TestForgedLogin(t *testing.T) {
	s := smbtest.Start(t)
	for name, forge := range map[string]struct {
		change func(p []byte)
		want   error
	}{
		"guest":     {func(p []byte) { p[headerSize+2] |= sessionGuest }, ErrGuest},
		"anonymous": {func(p []byte) { p[headerSize+2] |= sessionNull }, ErrGuest},
		"signature": {func(p []byte) { p[signatureAt] ^= 1 }, ErrProtocol},
		"unsigned":  {func(p []byte) { p[16] &^= flagSigned }, ErrProtocol},
	} {
		o := hostileOptions(s)
		o.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			return &forger{Conn: c, change: forge.change}, err
		}
		c, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Connect(t.Context()); !errors.Is(err, forge.want) {
			t.Errorf("%s: %v, want %v", name, err, forge.want)
		}
		c.Close()
	}
}

// A forger changes the last answer of a login.
type forger struct {
	net.Conn
	change func([]byte)
	out    []byte
}

func (f *forger) Read(p []byte) (int, error) {
	if len(f.out) == 0 {
		var head [4]byte
		if _, err := io.ReadFull(f.Conn, head[:]); err != nil {
			return 0, err
		}
		pkt := make([]byte, binary.BigEndian.Uint32(head[:]))
		if _, err := io.ReadFull(f.Conn, pkt); err != nil {
			return 0, err
		}
		if binary.LittleEndian.Uint16(pkt[12:]) == cmdSessionSetup && binary.LittleEndian.Uint32(pkt[8:]) == 0 {
			f.change(pkt)
		}
		f.out = append(head[:], pkt...)
	}
	n := copy(p, f.out)
	f.out = f.out[n:]
	return n, nil
}

// FuzzWire feeds the judge of packets directly, in each state of a connection.
func FuzzWire(f *testing.F) {
	header := func(cmd uint16, status uint32, body ...byte) []byte {
		p := append(make([]byte, headerSize), body...)
		copy(p, "\xfeSMB\x40\x00")
		binary.LittleEndian.PutUint32(p[8:], status)
		binary.LittleEndian.PutUint16(p[12:], cmd)
		p[16] = flagServer
		return p
	}
	negotiation := make([]byte, 64)
	binary.LittleEndian.PutUint16(negotiation[4:], uint16(SMB311))
	for _, at := range []int{28, 32, 36} {
		binary.LittleEndian.PutUint32(negotiation[at:], 1<<20)
	}
	negotiation[6], negotiation[60] = 1, 128
	encryption := []byte{2, 0, 4, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0}
	f.Add(header(cmdNegotiate, 0, append(negotiation, encryption...)...), byte(0))
	f.Add(header(cmdSessionSetup, statusMoreProcessing, 9, 0, 0, 0, 72, 0, 0, 0), byte(1))
	f.Add(header(cmdSessionSetup, 0, 9, 0, 0, 0, 72, 0, 0, 0), byte(1))
	f.Add(header(cmdTreeConnect, 0, make([]byte, 16)...), byte(2))
	f.Add(header(8, statusPending, make([]byte, 9)...), byte(2))
	f.Add(append([]byte("\xfdSMB"), make([]byte, 200)...), byte(3))
	f.Fuzz(func(t *testing.T, p []byte, state byte) {
		if len(p) < headerSize || len(p) > maxPacket {
			return // Read lets no others come so far
		}
		w := newWire(nil, wirePolicy{minDialect: SMB202, seal: state >= 128, user: "u", ntHash: make([]byte, 16)})
		if state%4 >= 1 {
			w.info.dialect, w.info.encryption = SMB311, true
			w.login.auth = append([]byte("NTLMSSP\x00\x03\x00\x00\x00"), p...)
		}
		if state%4 >= 2 {
			w.login.auth = make([]byte, 64)
			w.login.auth[20], w.login.auth[24] = 16, 0
			k, err := w.login.finish(SMB311, state%8 >= 4)
			if err != nil {
				t.Fatal(err)
			}
			w.keys = k
			w.established.Store(true)
			w.sealed.Store(state%4 == 3)
		}
		if err := w.incoming(p); err != nil {
			for _, kind := range []error{ErrProtocol, ErrGuest, ErrNotSealed, ErrDialect} {
				if errors.Is(err, kind) {
					return
				}
			}
			t.Errorf("%v is no error of ours", err)
		}
	})
}

// FuzzNames checks that every name that a server may send and we accept is
// one that we can send back, and that leads nowhere else.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"a", "..", "a/b", `a\b`, "a:b", "dot.", "\uf029", "\uf026", "\uf029\uf029", "x\uf028", "\x00", "\uf001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, remote string) {
		local, ok := decodeName(remote)
		if !ok {
			return
		}
		if local == "" || local == "." || local == ".." || containsAny(local, "/\x00") {
			t.Fatalf("%q became %q", remote, local)
		}
		if len(local) > maxName {
			return // it can't be asked for, which is an error then
		}
		back, err := encodePath(local)
		if err != nil {
			t.Fatalf("%q became %q, which can't be sent: %v", remote, local, err)
		}
		if again, ok := decodeName(back); !ok || again != local {
			t.Errorf("%q became %q, was sent as %q and came back as %q", remote, local, back, again)
		}
	})
}

func containsAny(s, chars string) bool {
	for _, c := range chars {
		for _, r := range s {
			if r == c {
				return true
			}
		}
	}
	return false
}

// FuzzLocation checks that no address leads out of a share or keeps a
// password.
func FuzzLocation(f *testing.F) {
	for _, s := range []string{"smb://nas/share/a/b", "//nas/share", "smb://u@nas:445/s", "smb://u:p@nas/s", "//nas/s/../..", "smb://nas", "//[::1]:445/s/x", "//0/..#"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLocation(s)
		if err != nil {
			return
		}
		if _, err := encodePath(l.Path); err != nil && !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", s, err)
		}
		if l.Server == "" || l.Share == "" || l.Share == ".." {
			t.Errorf("%q = %+v", s, l)
		}
	})
}
