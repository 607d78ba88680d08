// Package integration tests the whole against real things: stock restic,
// rsync, file systems, servers. Each test needs root and the Debian packages
// that `make test` installs; a missing tool fails the test with its name.
package integration
