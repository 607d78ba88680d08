package smb

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rc4"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"
	"strings"
	"unicode/utf16"
)

// keys are the session's own secrets, derived here a second time beside the
// library, which keeps them to itself. With them a [wire] proves the server
// in the login's last answer, which the library doesn't check; signs the
// "still working on it" answers that servers leave unsigned by design and
// that the library rejects; and looks at the headers of encrypted packets
// before the library trips over them.
type keys struct {
	hmac []byte       // key of SMB 2's signatures, HMAC-SHA256
	cmac cipher.Block // cipher of SMB 3's, AES-CMAC
	open cipher.Block // cipher of encrypted packets from the server
	ccm  bool         // else GCM
}

// transcript collects what the keys of a login are made of.
type transcript struct {
	user   string
	ntHash []byte // owned; cleared by finish
	sum    [sha512.Size]byte
	auth   []byte // the NTLM message AUTHENTICATE that we sent
}

// add takes one packet of the login in the order of the wire.
func (t *transcript) add(p []byte) {
	h := sha512.New()
	h.Write(t.sum[:])
	h.Write(p)
	h.Sum(t.sum[:0])
}

// sent looks for the AUTHENTICATE message in a packet of ours.
func (t *transcript) sent(p []byte) {
	t.add(p)
	if i := bytes.Index(p, []byte("NTLMSSP\x00\x03\x00\x00\x00")); i >= 0 {
		t.auth = bytes.Clone(p[i:])
	}
}

// forget clears the password's hash.
func (t *transcript) forget() { clear(t.ntHash) }

// finish derives the keys, by [MS-NLMP] 3.3.2 and 3.1.5.1.2, and [MS-SMB2]
// 3.2.5.3.1.
func (t *transcript) finish(d Dialect, ccm bool) (*keys, error) {
	defer t.forget()
	field := func(at int) []byte {
		if len(t.auth) < at+8 {
			return nil
		}
		n, off := uint64(binary.LittleEndian.Uint16(t.auth[at:])), uint64(binary.LittleEndian.Uint32(t.auth[at+4:]))
		if off+n > uint64(len(t.auth)) {
			return nil
		}
		return t.auth[off : off+n]
	}
	response, domain, sealedKey := field(20), field(28), field(52)
	if len(response) < 16 {
		return nil, fmt.Errorf("%w: a login without our answer", ErrProtocol)
	}
	var name []byte
	for _, u := range utf16.Encode([]rune(strings.ToUpper(t.user))) {
		name = binary.LittleEndian.AppendUint16(name, u)
	}
	session := mac(md5.New, mac(md5.New, t.ntHash, name, domain), response[:16])
	if len(sealedKey) == 16 {
		c, err := rc4.NewCipher(session)
		if err != nil {
			return nil, err
		}
		c.XORKeyStream(session, sealedKey)
	}
	if d < SMB300 {
		return &keys{hmac: session}, nil
	}
	derive := func(label, context string) (cipher.Block, error) {
		key := mac(sha256.New, session, []byte{0, 0, 0, 1}, []byte(label), []byte{0}, []byte(context), []byte{0, 0, 0, 128})
		defer clear(key)
		return aes.NewCipher(key[:16])
	}
	defer clear(session)
	k := &keys{ccm: ccm}
	var err, err2 error
	if d == SMB311 {
		k.cmac, err = derive("SMBSigningKey\x00", string(t.sum[:]))
		k.open, err2 = derive("SMBS2CCipherKey\x00", string(t.sum[:]))
	} else {
		k.cmac, err = derive("SMB2AESCMAC\x00", "SmbSign\x00")
		k.open, err2 = derive("SMB2AESCCM\x00", "ServerOut\x00")
		k.ccm = true
	}
	if err != nil {
		return nil, err
	}
	return k, err2
}

func mac(h func() hash.Hash, key []byte, parts ...[]byte) []byte {
	m := hmac.New(h, key)
	for _, p := range parts {
		m.Write(p)
	}
	return m.Sum(nil)
}

const (
	signatureAt = 48
	flagSigned  = 8
)

// signature computes what belongs into a packet's signature field.
func (k *keys) signature(p []byte) []byte {
	var zero [16]byte
	if k.cmac == nil {
		return mac(sha256.New, k.hmac, p[:signatureAt], zero[:], p[headerSize:])[:16]
	}
	return cmac(k.cmac, p[:signatureAt], zero[:], p[headerSize:])
}

// sign signs a packet in place.
func (k *keys) sign(p []byte) {
	binary.LittleEndian.PutUint32(p[16:], binary.LittleEndian.Uint32(p[16:])|flagSigned)
	copy(p[signatureAt:headerSize], k.signature(p))
}

// verify reports whether a packet has a good signature.
func (k *keys) verify(p []byte) bool {
	return binary.LittleEndian.Uint32(p[16:])&flagSigned != 0 &&
		subtle.ConstantTimeCompare(k.signature(p), p[signatureAt:headerSize]) == 1
}

// cmac is AES-CMAC of RFC 4493.
func cmac(b cipher.Block, parts ...[]byte) []byte {
	const size = aes.BlockSize
	double := func(x []byte) []byte {
		out, carry := make([]byte, size), byte(0)
		for i := size - 1; i >= 0; i-- {
			out[i] = x[i]<<1 | carry
			carry = x[i] >> 7
		}
		out[size-1] ^= carry * 0x87
		return out
	}
	zero := make([]byte, size)
	b.Encrypt(zero, zero)
	key := double(zero)

	msg := bytes.Join(parts, nil) // only short packets are signed here
	tail := (len(msg) - 1) / size * size
	if len(msg) == 0 {
		tail = 0
	}
	last := make([]byte, size)
	if copy(last, msg[tail:]) < size {
		last[len(msg)-tail] = 0x80
		key = double(key)
	}
	x := make([]byte, size)
	for i := 0; i < tail; i += size {
		subtle.XORBytes(x, x, msg[i:i+size])
		b.Encrypt(x, x)
	}
	subtle.XORBytes(last, last, key)
	subtle.XORBytes(x, x, last)
	b.Encrypt(x, x)
	return x
}

// peek decrypts the first bytes of an encrypted packet. Both of SMB's ciphers
// encrypt in counter mode, so that the beginning can be had alone. Nothing
// is authenticated here: the library does that, with the whole packet.
func (k *keys) peek(p []byte, n int) []byte {
	iv := make([]byte, aes.BlockSize)
	if k.ccm {
		iv[0] = 3 // a counter of 4 bytes
		copy(iv[1:12], p[20:])
		iv[15] = 1
	} else {
		copy(iv, p[20:32])
		iv[15] = 2
	}
	out := make([]byte, min(n, len(p)-transformSize))
	cipher.NewCTR(k.open, iv).XORKeyStream(out, p[transformSize:transformSize+len(out)])
	return out
}
