// Package chunk cuts files into chunks whose boundaries depend on the content
// alone, so that data which moved within a file, or between files, is found
// again.
//
// A chunk ends where the Rabin fingerprint of its last 64 bytes, modulo the
// repository's polynomial, has its 20 lowest bits zero; it is never shorter
// than 512 KiB, unless the input ends, nor longer than 8 MiB. The cut points
// equal those of github.com/restic/chunker v0.4.0 for every input: that is what
// lets two programs deduplicate in one repository. The tests compare the two.
//
// It is several times as fast as that package on one core. Its time goes into
// a chain of dependent steps: each byte needs the fingerprint after the byte
// before it. But a fingerprint depends on 64 bytes only, so this package rolls
// several fingerprints side by side, each over a stretch of its own, and the
// processor overlaps their chains.
package chunk
