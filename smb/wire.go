package smb

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// wire is the connection that the library reads and writes. It sits between
// the library and TCP because some things can only be seen, decided or
// prevented there:
//
//   - A malformed packet can crash the library in a goroutine that we can't
//     guard with recover. wire lets none through.
//   - The library can't be told to encrypt. A client may encrypt a session
//     even if the server doesn't insist ([MS-SMB2] 3.2.4.1.8), and the library
//     does so when the server's answer to the login says it must; wire adds
//     that flag to the answer. From then on it refuses to send or to take any
//     packet that isn't encrypted, so that encryption is a fact and not a hope.
//   - The library accepts a login as guest in the last answer, and then
//     neither signs nor checks signatures. wire refuses it.
//   - The library rejects interim answers ("still working on it"), which servers
//     leave unsigned; wire signs them. It doesn't check the signature of the
//     login's last answer, the proof that the server knows the password; wire
//     does.
//   - What was negotiated is nowhere in the library's interface.
//
// It also joins the two writes that the library makes per packet.
type wire struct {
	net.Conn
	in     *bufio.Reader
	policy wirePolicy

	header  [4]byte // of the packet that the library writes now
	partial int     // bytes of header that it wrote already
	expect  int     // size of the packet whose length the library has read; 0: none

	established atomic.Bool // the login succeeded
	sealed      atomic.Bool // all packets of the session are encrypted
	closing     sync.Once

	mu    sync.Mutex
	info  negotiated
	login transcript
	keys  *keys // nil before the login succeeded
	err   error // why the connection was given up; nil while it is good
}

// wirePolicy is what a connection must be like.
type wirePolicy struct {
	minDialect Dialect
	seal       bool
	user       string
	ntHash     []byte // owned by the wire
}

// negotiated is what the server agreed to.
type negotiated struct {
	dialect     Dialect
	serverGUID  [16]byte
	encryption  bool   // the server can encrypt
	loginStatus uint32 // of its last answer to the login
	ccm         bool   // with AES-CCM, else AES-GCM
	readOnly    bool   // the user may not write to the share connected last
}

// Sizes of packets. We never ask for more than 1 MiB, so that no honest
// answer is much longer.
const (
	headerSize    = 64
	transformSize = 52
	maxPacket     = 1<<20 + 64<<10
)

// Commands and flags of [MS-SMB2].
const (
	cmdNegotiate    = 0
	cmdSessionSetup = 1
	cmdTreeConnect  = 3

	flagServer = 1 // an answer, not a request

	sessionGuest   = 1
	sessionNull    = 2
	sessionEncrypt = 4

	capEncryption     = 0x40
	contextEncryption = 2
	minTransfer       = 64 << 10
	accessWriteData   = 2
	cipherCCM         = 1
	cipherGCM         = 2
	statusPending     = 0x103
)

func newWire(c net.Conn, p wirePolicy) *wire {
	return &wire{Conn: c, in: bufio.NewReaderSize(c, 32<<10), policy: p, login: transcript{user: p.user, ntHash: p.ntHash}}
}

// give records why the connection ends, and ends it. Only the first reason
// counts.
func (w *wire) give(err error) {
	w.mu.Lock()
	if w.err == nil {
		w.err = err
	}
	w.mu.Unlock()
	w.closing.Do(func() {
		w.Conn.Close()
		w.mu.Lock()
		w.login.forget()
		w.mu.Unlock()
	})
}

// Close ends the connection.
func (w *wire) Close() error {
	w.give(net.ErrClosed)
	return nil
}

// reason returns why the connection ended, or nil.
func (w *wire) reason() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *wire) state() negotiated {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.info
}

// broken says that the connection is lost. Its cause is io.EOF when the server
// closed it, which must not be taken for the end of a file.
func broken(cause error) error {
	if errors.Is(cause, io.EOF) || errors.Is(cause, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", ErrConnectionLost, errServerClosed)
	}
	return fmt.Errorf("%w: %w", ErrConnectionLost, cause)
}

// Read serves the library, which reads a length of four bytes, and then the
// packet with one call of that size.
func (w *wire) Read(p []byte) (int, error) {
	if w.expect == 0 {
		if len(p) != 4 {
			err := fmt.Errorf("wire: the library reads %d bytes where a length is", len(p))
			w.give(err)
			return 0, err
		}
		if _, err := io.ReadFull(w.in, p); err != nil {
			w.give(broken(err))
			return 0, err
		}
		n := int(binary.BigEndian.Uint32(p))
		if n < headerSize || n > maxPacket {
			err := fmt.Errorf("%w: a packet of %d bytes", ErrProtocol, n)
			w.give(err)
			return 0, err
		}
		w.expect = n
		return 4, nil
	}
	if len(p) != w.expect {
		err := fmt.Errorf("wire: the library reads %d bytes of a packet of %d", len(p), w.expect)
		w.give(err)
		return 0, err
	}
	w.expect = 0
	if _, err := io.ReadFull(w.in, p); err != nil {
		w.give(broken(err))
		return 0, err
	}
	if err := w.incoming(p); err != nil {
		w.give(err)
		return 0, err
	}
	return len(p), nil
}

// incoming judges one packet from the server.
func (w *wire) incoming(p []byte) error {
	le := binary.LittleEndian
	head := p
	if p[0] == 0xfd {
		if !w.established.Load() || w.keys.open == nil {
			return fmt.Errorf("%w: an encrypted packet before the login", ErrProtocol)
		}
		if string(p[:4]) != "\xfdSMB" || len(p) < transformSize+headerSize || int(le.Uint32(p[36:])) != len(p)-transformSize {
			return fmt.Errorf("%w: an encrypted packet of a wrong size", ErrProtocol)
		}
		head = w.keys.peek(p, headerSize+16)
	} else if w.sealed.Load() {
		return fmt.Errorf("%w: an answer that is not encrypted in an encrypted session", ErrProtocol)
	}
	if string(head[:4]) != "\xfeSMB" || le.Uint16(head[4:]) != headerSize || le.Uint32(head[16:])&flagServer == 0 {
		return fmt.Errorf("%w: a broken packet header", ErrProtocol)
	}
	// The library sends no compound requests, so that no answer is compound.
	if le.Uint32(head[20:]) != 0 {
		return fmt.Errorf("%w: a compound answer that was not asked for", ErrProtocol)
	}
	status, body := le.Uint32(head[8:]), head[headerSize:]
	switch command := le.Uint16(head[12:]); {
	case command == cmdNegotiate:
		return w.negotiateAnswer(p)
	case command == cmdSessionSetup:
		return w.sessionAnswer(p)
	case !w.established.Load():
		return fmt.Errorf("%w: command %d before the login", ErrProtocol, command)
	case status == statusPending && p[0] == 0xfe:
		w.keys.sign(p)
	case command == cmdTreeConnect && status == 0 && len(body) >= 16:
		w.mu.Lock()
		w.info.readOnly = le.Uint32(body[12:])&accessWriteData == 0
		w.mu.Unlock()
	}
	return nil
}

func (w *wire) negotiateAnswer(p []byte) error {
	le := binary.LittleEndian
	status, body := le.Uint32(p[8:]), p[headerSize:]
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.established.Load() || w.info.dialect != 0 {
		return fmt.Errorf("%w: a second negotiation", ErrProtocol)
	}
	w.login.add(p)
	if status != 0 {
		return nil // the library turns it into an error
	}
	if len(body) < 64 {
		return fmt.Errorf("%w: a broken negotiation", ErrProtocol)
	}
	n := negotiated{dialect: Dialect(le.Uint16(body[4:]))}
	copy(n.serverGUID[:], body[8:24])
	switch n.dialect {
	case SMB202, SMB210, SMB300, SMB302, SMB311:
	default:
		return fmt.Errorf("%w: dialect %#x", ErrProtocol, uint16(n.dialect))
	}
	if n.dialect < w.policy.minDialect {
		return fmt.Errorf("%w: it offers %v, wanted is %v", ErrDialect, n.dialect, w.policy.minDialect)
	}
	for _, size := range []uint32{le.Uint32(body[28:]), le.Uint32(body[32:]), le.Uint32(body[36:])} {
		if size < minTransfer {
			return fmt.Errorf("%w: a transfer size of %d bytes", ErrProtocol, size)
		}
	}
	switch {
	case n.dialect == SMB311:
		list, count := p[min(uint64(le.Uint32(body[60:])), uint64(len(p))):], le.Uint16(body[6:])
		for range count {
			if len(list) < 8 || len(list) < 8+int(le.Uint16(list[2:])) {
				return fmt.Errorf("%w: a broken negotiation context", ErrProtocol)
			}
			size := int(le.Uint16(list[2:]))
			// One cipher: the count, then AES-128-CCM or AES-128-GCM.
			if le.Uint16(list) == contextEncryption && size >= 4 && le.Uint16(list[8:]) == 1 {
				cipher := le.Uint16(list[10:])
				n.encryption, n.ccm = cipher == cipherCCM || cipher == cipherGCM, cipher == cipherCCM
			}
			list = list[min(8+(size+7)&^7, len(list)):]
		}
	case n.dialect >= SMB300:
		n.encryption, n.ccm = le.Uint32(body[24:])&capEncryption != 0, true
	}
	if w.policy.seal && !n.encryption {
		return fmt.Errorf("%w: it speaks %v", ErrNotSealed, n.dialect)
	}
	w.info = n
	return nil
}

func (w *wire) sessionAnswer(p []byte) error {
	le := binary.LittleEndian
	status, body := le.Uint32(p[8:]), p[headerSize:]
	if w.established.Load() {
		return fmt.Errorf("%w: a second login", ErrProtocol)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.info.dialect == 0 {
		return fmt.Errorf("%w: a login before the negotiation", ErrProtocol)
	}
	w.info.loginStatus = status
	switch {
	case status != 0 && status != statusMoreProcessing:
		return nil // the library turns it into an error
	case len(body) < 8:
		return fmt.Errorf("%w: a broken answer to the login", ErrProtocol)
	}
	flags := le.Uint16(body[2:])
	switch {
	case flags&(sessionGuest|sessionNull) != 0:
		return ErrGuest
	case flags&sessionEncrypt != 0 && !w.info.encryption:
		return fmt.Errorf("%w: encryption that was not negotiated", ErrProtocol)
	case status != 0:
		w.login.add(p)
		return nil
	}
	keys, err := w.login.finish(w.info.dialect, w.info.ccm)
	if err != nil {
		return err
	}
	if !keys.verify(p) {
		return fmt.Errorf("%w: it can't prove that it knows the password", ErrProtocol)
	}
	w.keys = keys
	if w.policy.seal {
		flags |= sessionEncrypt
		le.PutUint16(body[2:], flags)
	}
	w.sealed.Store(flags&sessionEncrypt != 0)
	w.established.Store(true)
	return nil
}

// Write takes packets from the library, which writes the length of four
// bytes and the packet with one call each.
func (w *wire) Write(p []byte) (int, error) {
	if w.partial == 0 && len(p) == 4 {
		w.partial = copy(w.header[:], p)
		return 4, nil
	}
	if w.partial != 4 || int(binary.BigEndian.Uint32(w.header[:])) != len(p) || len(p) < headerSize {
		err := errors.New("wire: the library writes half a packet")
		w.give(err)
		return 0, err
	}
	w.partial = 0
	if !w.established.Load() {
		w.mu.Lock()
		w.login.sent(p)
		w.mu.Unlock()
	}
	if p[0] != 0xfd && w.sealed.Load() {
		err := fmt.Errorf("%w: a packet was about to be sent without encryption", ErrNotSealed)
		w.give(err)
		return 0, err
	}
	buffers := net.Buffers{w.header[:], p}
	if _, err := buffers.WriteTo(w.Conn); err != nil {
		w.give(broken(err))
		return 0, err
	}
	return len(p), nil
}
