package crypt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"golang.org/x/crypto/scrypt"
)

// Params are the cost parameters of scrypt (RFC 7914).
type Params struct {
	N int // CPU and memory cost, a power of two
	R int // block size
	P int // parallelism, run one after the other here
}

// Bounds of the parameters. MinParams is the least that Calibrate chooses;
// its memory, 128·N·R bytes, is 32 MiB. Calibrate never exceeds maxOwnN, 128
// MiB, so that a device with 512 MiB opens what a larger one made. Open
// refuses what no sane program chooses, so that a hostile key file can't take
// all memory or all time.
var MinParams = Params{N: 1 << 15, R: 8, P: 1}

const (
	maxOwnN     = 1 << 17
	maxOwnP     = 4
	maxMemory   = 1 << 30 // bytes that Derive accepts to use
	maxWork     = 1 << 28 // N·R·P that Derive accepts
	saltSize    = 64
	maxSaltSize = 1 << 10
)

// NewSalt returns a random salt.
func NewSalt() []byte {
	salt := make([]byte, saltSize)
	rand.Read(salt)
	return salt
}

// Validate returns an error unless Derive would accept the parameters.
func (p Params) Validate() error {
	switch {
	case p.N < 2 || p.R < 1 || p.P < 1 || bits.OnesCount(uint(p.N)) != 1:
		return fmt.Errorf("scrypt: bad parameters N=%d r=%d p=%d", p.N, p.R, p.P)
	case p.N > maxMemory/128/p.R || p.P > maxWork/p.N/p.R:
		return fmt.Errorf("scrypt: parameters N=%d r=%d p=%d need more memory or time than is reasonable", p.N, p.R, p.P)
	}
	return nil
}

// Derive returns the key that seals a master key under a password. Both the
// parameters and the salt may come from an untrusted file.
func Derive(p Params, salt []byte, password string) (*Key, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if len(salt) == 0 || len(salt) > maxSaltSize {
		return nil, fmt.Errorf("scrypt: salt of %d bytes", len(salt))
	}
	raw, err := scrypt.Key([]byte(password), salt, p.N, p.R, p.P, encryptSize+2*halfSize)
	if err != nil {
		return nil, errors.New("scrypt: the parameters are not usable")
	}
	defer clear(raw)
	return keyFromBytes(raw), nil
}

// Calibrate returns parameters that take about target on this machine, never
// less than MinParams and never more than a device with 512 MiB can afford.
func Calibrate(target time.Duration) Params {
	p := MinParams
	start := time.Now()
	if _, err := Derive(p, make([]byte, saltSize), "calibration"); err != nil {
		panic(err) // MinParams are valid
	}
	return scale(p, time.Since(start), target)
}

// scale raises p, which took took, towards target: memory first, since that
// is what costs an attacker, then repetitions.
func scale(p Params, took, target time.Duration) Params {
	for p.N < maxOwnN && 2*took <= target {
		p.N *= 2
		took *= 2
	}
	if p.N == maxOwnN && took > 0 {
		p.P = int(min(max(1, target/took), maxOwnP))
	}
	return p
}
