// Package backend defines where a repository's files live: a small interface
// over a folder, a share or an object store, and the names of the files in it.
//
// The subfolders hold one store each; backendtest is the conformance suite
// that all of them run.
package backend

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/iot49/ide49-backup/backup"
)

// A Backend stores immutable objects by kind and name.
//
// Atomicity: Put is durable or absent. When it returns nil the object survives
// a power cut; when it fails or the process dies, no reader ever sees a part
// of it under its name. Put of an existing key replaces that object in the
// same way, so that it is safe to retry.
//
// Errors: a missing object is an error that matches [io/fs.ErrNotExist]; a
// store without room gives one that matches [ErrFull]; one that denies writing
// matches [io/fs.ErrPermission]. A Get beyond an object's end matches
// [io.ErrUnexpectedEOF]. Every error names the operation and the object.
//
// Concurrency: all methods may be called from any number of goroutines. They
// return soon after ctx is cancelled, with ctx's error.
type Backend interface {
	// Put stores data under k. It does not keep data.
	Put(ctx context.Context, k Key, data []byte) error

	// Get returns exactly n bytes from offset off, or all from off to the
	// end when n is negative. The caller owns the result.
	Get(ctx context.Context, k Key, off, n int64) ([]byte, error)

	// List yields each object of a kind once, in no order. Objects put or
	// deleted meanwhile may or may not appear. An error ends the sequence;
	// temporary files never appear.
	List(ctx context.Context, kind Kind) iter.Seq2[Info, error]

	// Delete removes k. Deleting what is not there is an error that matches
	// fs.ErrNotExist.
	Delete(ctx context.Context, k Key) error

	// Close releases the store. No other call may follow.
	Close() error
}

// An Evicter is a Backend over a cache that can be told to forget an object.
type Evicter interface {
	// Evict makes the next Get of k read from the device. It fails with
	// errors.ErrUnsupported where the file system keeps its only copy in
	// memory, or can't be told.
	Evict(ctx context.Context, k Key) error
}

// ErrFull says that a store has no room for an object. Nothing of the object
// stays behind.
var ErrFull = errors.New("no space left; free some space or prune the repository")

// A Kind is one of the six kinds of objects in a repository.
type Kind uint8

// The kinds of objects. There is one Config object, with no name; the others
// are named by the SHA-256 of their bytes.
const (
	Configs Kind = iota
	Keys
	Locks
	Snapshots
	Indexes
	Packs
)

// kinds holds the folder of each kind.
var kinds = [...]string{"config", "keys", "locks", "snapshots", "index", "data"}

// String returns the folder that holds objects of the kind, or "config".
func (k Kind) String() string {
	if int(k) < len(kinds) {
		return kinds[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// A Key names one object.
type Key struct {
	Kind Kind
	ID   backup.ID // zero for the config
}

// ConfigKey is the key of a repository's config.
var ConfigKey = Key{Kind: Configs}

// Path returns the object's path below the repository in the layout that all
// file-like stores share, with forward slashes: "config", "keys/ID",
// "data/XX/ID".
func (k Key) Path() string {
	switch k.Kind {
	case Configs:
		return "config"
	case Packs:
		name := k.ID.String()
		return "data/" + name[:2] + "/" + name
	}
	return k.Kind.String() + "/" + k.ID.String()
}

// String returns what to call the object in messages.
func (k Key) String() string {
	switch k.Kind {
	case Configs:
		return "config"
	case Packs:
		return "pack " + k.ID.Short()
	}
	return strings.TrimSuffix(k.Kind.String(), "s") + " " + k.ID.Short()
}

// Info describes one stored object.
type Info struct {
	Key  Key
	Size int64 // bytes
}

// Discard returns a view of be in which Put and Delete succeed and do nothing:
// for finding out what a run would do.
func Discard(be Backend) Backend { return discard{be} }

type discard struct{ Backend }

func (discard) Put(ctx context.Context, _ Key, _ []byte) error { return ctx.Err() }

func (discard) Delete(ctx context.Context, _ Key) error { return ctx.Err() }
