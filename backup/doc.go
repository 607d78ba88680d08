// Package backup holds the nouns that every room of ide49-backup shares: the
// ID of a blob or file, a Node and a Tree of a snapshot, a Snapshot and a
// Volume, with the exact bytes that the repository stores for them.
//
// The encodings are those of the public restic repository format, version 2;
// docs/format.md describes them. Nothing here reads a disk or a repository.
package backup
