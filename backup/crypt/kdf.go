package crypt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math/bits"
	"runtime/debug"
	"time"

	"golang.org/x/crypto/scrypt"
)

// Params are the cost parameters of scrypt (RFC 7914).
type Params struct {
	N int // CPU and memory cost, a power of two
	R int // block size
	P int // parallelism, run one after the other here
}

// MinParams is the least that Calibrate chooses. Its memory is 128·N·R bytes,
// 32 MiB.
var MinParams = Params{N: 1 << 15, R: 8, P: 1}

// Bounds of the parameters. Calibrate raises P alone, so that opening a
// repository takes 32 MiB everywhere and a device with 512 MiB opens what a
// larger one made, in at most maxOwnP times its own least time. Derive refuses
// what no sane program chooses, so that a hostile key file can't take all
// memory or all time.
const (
	maxOwnP     = 8
	maxMemory   = 1 << 30 // bytes that Derive accepts to use
	maxWork     = 1 << 28 // N·R·P that Derive accepts
	saltSize    = 64
	maxSaltSize = 1 << 10
	freeFrom    = 1 << 20 // bytes of garbage that are worth a collection
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
	// scrypt leaves 128·N·R bytes of garbage, more than most of what follows
	// needs. Small devices want them back at once.
	if 128*p.N*p.R >= freeFrom {
		debug.FreeOSMemory()
	}
	return keyFromBytes(raw), nil
}

// Calibrate returns parameters that take about target on this machine, never
// less than MinParams and never more than a small device can afford.
func Calibrate(target time.Duration) Params {
	start := time.Now()
	if _, err := Derive(MinParams, make([]byte, saltSize), "calibration"); err != nil {
		panic(err) // MinParams are valid
	}
	return scale(time.Since(start), target)
}

// scale raises MinParams, which took took, towards target.
func scale(took, target time.Duration) Params {
	p := MinParams
	p.P = int(min(max(1, target/max(took, 1)), maxOwnP))
	return p
}
