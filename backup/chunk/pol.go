package chunk

import (
	"errors"
	"fmt"
	"math/bits"
	"strconv"

	"github.com/restic/chunker"
)

// The degrees for which cut points are defined. A polynomial that Random made
// has degree 53, and only that degree takes the fast path.
const (
	minDegree = 8
	maxDegree = 53
)

// ErrPolynomial is the error of ParsePol and NewTables for what is not a
// polynomial, or not one that can define cut points.
var ErrPolynomial = errors.New("not a usable chunker polynomial")

// Pol is a polynomial over GF(2); bit i is the coefficient of x^i. A repository
// chooses one at random when it is made and never changes it: with another
// polynomial the same file is cut elsewhere and nothing deduplicates.
type Pol uint64

// Random returns an irreducible polynomial of degree 53 from the system's
// source of randomness.
func Random() (Pol, error) {
	p, err := chunker.RandomPolynomial()
	if err != nil {
		return 0, fmt.Errorf("choosing a chunker polynomial: %w", err)
	}
	return Pol(p), nil
}

// ParsePol reads the hexadecimal digits of a polynomial, without a prefix, as
// the repository's config has them. Whether it is irreducible is for NewTables
// to tell. The error is an ErrPolynomial.
func ParsePol(s string) (Pol, error) {
	u, err := strconv.ParseUint(s, 16, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: %.20q is not a 64-bit hexadecimal number", ErrPolynomial, s)
	}
	return Pol(u), nil
}

// String returns the hexadecimal digits of p; ParsePol reads them.
func (p Pol) String() string { return strconv.FormatUint(uint64(p), 16) }

func (p Pol) degree() int { return bits.Len64(uint64(p)) - 1 }

// validate refuses what cannot define cut points. Irreducibility takes some
// milliseconds to prove, so the degree, which is free, is looked at first.
func (p Pol) validate() error {
	if d := p.degree(); d < minDegree || d > maxDegree {
		return fmt.Errorf("%w: %v has degree %d, not %d to %d", ErrPolynomial, p, d, minDegree, maxDegree)
	}
	if !chunker.Pol(p).Irreducible() {
		return fmt.Errorf("%w: %v is reducible", ErrPolynomial, p)
	}
	return nil
}
