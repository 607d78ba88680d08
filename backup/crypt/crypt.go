// Package crypt seals and opens the bytes of a repository and derives keys
// from passwords.
//
// A sealed message is IV || AES-256-CTR(plaintext) || Poly1305-AES MAC, where
// the MAC is over the ciphertext and its nonce is the IV enciphered with
// AES-128. This is the construction of the restic repository format; Poly1305
// is D. J. Bernstein's "The Poly1305-AES message-authentication code" (2005).
package crypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"

	//lint:ignore SA1019 the format is made of this very function
	"golang.org/x/crypto/poly1305"
)

const (
	ivSize  = aes.BlockSize
	macSize = poly1305.TagSize

	// Overhead is how many bytes longer a sealed message is than its
	// plaintext.
	Overhead = ivSize + macSize

	encryptSize = 32
	halfSize    = 16 // of k and of r
)

// ErrAuth says that a message was not sealed with this key: the key is wrong
// or the bytes are damaged. Nothing of the plaintext is given out.
var ErrAuth = errors.New("authentication failed: the data is damaged or the key is another one")

// A Key seals and opens messages. It is immutable and safe for concurrent use.
type Key struct {
	encrypt [encryptSize]byte
	k, r    [halfSize]byte

	block cipher.Block // AES-256 under encrypt
	nonce cipher.Block // AES-128 under k
}

// NewKey returns a random key.
func NewKey() *Key {
	var raw [encryptSize + 2*halfSize]byte
	rand.Read(raw[:]) // never fails: crypto/rand ends the process instead
	return keyFromBytes(raw[:])
}

// keyFromBytes splits raw into the encryption key, k and r.
func keyFromBytes(raw []byte) *Key {
	key := &Key{}
	copy(key.encrypt[:], raw)
	copy(key.k[:], raw[encryptSize:])
	copy(key.r[:], raw[encryptSize+halfSize:])
	key.schedule()
	return key
}

func (key *Key) schedule() {
	var err error
	if key.block, err = aes.NewCipher(key.encrypt[:]); err == nil {
		key.nonce, err = aes.NewCipher(key.k[:])
	}
	if err != nil {
		panic(err) // the sizes are constants that AES accepts
	}
}

// keyJSON is the stored form of a master key.
type keyJSON struct {
	MAC struct {
		K []byte `json:"k"`
		R []byte `json:"r"`
	} `json:"mac"`
	Encrypt []byte `json:"encrypt"`
}

// MarshalJSON returns the stored form of the key, which is secret.
func (key *Key) MarshalJSON() ([]byte, error) {
	var j keyJSON
	j.MAC.K, j.MAC.R, j.Encrypt = key.k[:], key.r[:], key.encrypt[:]
	return json.Marshal(j)
}

// UnmarshalJSON reads the stored form of a key.
func (key *Key) UnmarshalJSON(data []byte) error {
	var j keyJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return errors.New("master key: not valid JSON") // err could quote secret bytes
	}
	if len(j.Encrypt) != encryptSize || len(j.MAC.K) != halfSize || len(j.MAC.R) != halfSize {
		return fmt.Errorf("master key: parts of %d, %d and %d bytes instead of %d, %d and %d",
			len(j.Encrypt), len(j.MAC.K), len(j.MAC.R), encryptSize, halfSize, halfSize)
	}
	*key = *keyFromBytes(append(append(j.Encrypt, j.MAC.K...), j.MAC.R...))
	return nil
}

// Seal appends the sealed form of plaintext to dst. The two may not overlap.
func (key *Key) Seal(dst, plaintext []byte) []byte {
	start := len(dst)
	dst = append(dst, make([]byte, ivSize)...)
	rand.Read(dst[start:])
	dst = append(dst, plaintext...)
	body := dst[start+ivSize:]
	iv := dst[start : start+ivSize]
	cipher.NewCTR(key.block, iv).XORKeyStream(body, body)
	mac := key.mac(iv, body)
	return append(dst, mac[:]...)
}

// OpenInPlace returns the plaintext of a sealed message in the memory of
// sealed, or ErrAuth, which leaves sealed as it was.
func (key *Key) OpenInPlace(sealed []byte) ([]byte, error) {
	if len(sealed) < Overhead {
		return nil, ErrAuth
	}
	return key.Open(sealed[ivSize:ivSize], sealed)
}

// Open appends the plaintext of a sealed message to dst, or returns ErrAuth.
// The two may not overlap, but as OpenInPlace lets them.
func (key *Key) Open(dst, sealed []byte) ([]byte, error) {
	if len(sealed) < Overhead {
		return dst, ErrAuth
	}
	iv, body, tag := sealed[:ivSize], sealed[ivSize:len(sealed)-macSize], sealed[len(sealed)-macSize:]
	mac := key.mac(iv, body)
	if subtle.ConstantTimeCompare(mac[:], tag) != 1 {
		return dst, ErrAuth
	}
	start := len(dst)
	dst = append(dst, body...)
	cipher.NewCTR(key.block, iv).XORKeyStream(dst[start:], dst[start:])
	return dst, nil
}

// mac computes Poly1305-AES of ciphertext with the nonce iv.
func (key *Key) mac(iv, ciphertext []byte) (tag [macSize]byte) {
	var one [2 * halfSize]byte
	copy(one[:], key.r[:])
	key.nonce.Encrypt(one[halfSize:], iv)
	poly1305.Sum(&tag, ciphertext, &one) // clamps r itself
	return tag
}
