// Package restorer brings a snapshot back into a folder: first a plan that
// can be shown, then its execution.
//
// What it guarantees: nothing outside the target folder is ever written, not
// through symbolic links that stand there or appear meanwhile, nor through
// hard links to other files. A file is replaced as a whole, after all its
// bytes were verified and are on the disk, or it stays as it was; whatever
// interrupts a restore leaves no half-written file under its name.
package restorer

import (
	"errors"
	"fmt"
	"time"

	"github.com/iot49/ide49-backup/backup"
)

// Errors of a restore. They are wrapped with what they concern.
var (
	// ErrNoPath says that a snapshot holds no folder of the wanted path.
	ErrNoPath = errors.New("the snapshot has no such folder; `ide49-backup ls` shows what it holds")
	// ErrTooLarge says that a plan would take more memory than allowed.
	ErrTooLarge = errors.New("the snapshot has too many files for one plan; restore it in parts with --include")
	// ErrFull says that the target has no room. Nothing was written over.
	ErrFull = errors.New("no space left on the target; free some space and start the restore again")
	// ErrTarget says that the target can't be written any more.
	ErrTarget = errors.New("the target fails; see whether its drive is present and sound, then start the restore again")
	// ErrBusy says that another restore works in the target.
	ErrBusy = errors.New("another restore works in this folder; wait until it is done")
	// ErrDamaged says that a node of the snapshot contradicts its blobs.
	ErrDamaged = errors.New("damaged in the snapshot; run `ide49-backup check`")
	// ErrInTheWay says that the target holds something that is not to be
	// removed where the snapshot has something of another type.
	ErrInTheWay = errors.New("something of another type is in the way; remove it, or restore with --overwrite changed --delete")
	// ErrContents says that a file in the target is not what was written, or
	// not what its size and time promised.
	ErrContents = errors.New("its contents differ from the snapshot; restore it with --overwrite always, and check the drive")
	// ErrChanged says that the target changed after the plan was made.
	ErrChanged = errors.New("changed since the plan was made; start the restore again")
)

// An Overwrite says what happens to what is in the target already. It concerns
// entries that the snapshot has; see Options.Delete for the others.
type Overwrite uint8

// The policies. Under all of them a file's owner, mode, times and extended
// attributes become those of the snapshot unless the file is left alone.
const (
	// Changed takes the contents of a file for unchanged if type, size and
	// modification time are those of the snapshot, and compares the others.
	Changed Overwrite = iota
	// Always compares the contents of every file, chunk by chunk.
	Always
	// Newer leaves alone what is not older than in the snapshot, by
	// modification time, and does with the others as Changed.
	Newer
	// Never leaves alone all that exists.
	Never
)

var overwrites = [...]string{"changed", "always", "newer", "never"}

// String returns the name that ParseOverwrite reads.
func (o Overwrite) String() string {
	if int(o) < len(overwrites) {
		return overwrites[o]
	}
	return fmt.Sprintf("Overwrite(%d)", uint8(o))
}

// ParseOverwrite reads always, changed, newer or never.
func ParseOverwrite(s string) (Overwrite, error) {
	for i, name := range overwrites {
		if s == name {
			return Overwrite(i), nil
		}
	}
	return 0, fmt.Errorf("unknown policy %q: use always, changed, newer or never", s)
}

// DefaultMaxMemory bounds a plan to about five million files.
const DefaultMaxMemory = 512 << 20

// Options say what is restored and how. The zero value restores all of a
// snapshot's folder and overwrites what has changed.
type Options struct {
	// Root is the folder of the snapshot that becomes the target itself,
	// for example /service-config/mosquitto. Empty means the snapshot's
	// path if it has one, else "/", which restores the whole chain of
	// folders below the target.
	Root string

	// Include and Exclude select by path relative to the target, with
	// slashes and without a leading one. Include nil means all; what is
	// included includes all that is below. What Exclude matches is left
	// out with all that is below, and wins. Folders that lead to something
	// selected are made, and not touched where they exist. Both are called
	// by one goroutine at a time.
	Include, Exclude func(rel string, isDir bool) bool

	Overwrite Overwrite

	// Delete removes from the folders that are restored what the snapshot
	// does not have. What is not selected is never removed, nor is a
	// folder that holds such a thing, nor anything on another file system.
	Delete bool

	// Verify reads again what was written, from the disk where the system
	// allows it, and compares the contents of those files too that Changed
	// or Newer took for unchanged.
	Verify bool

	// Workers is how many parts of packs are read and written at once; 0
	// means one per processor and at least 2. Each takes about 16 MiB.
	Workers int

	// MaxMemory bounds the memory of the plan in bytes; 0 means
	// DefaultMaxMemory. A file takes about 100 bytes and its name.
	MaxMemory int64
}

// An Action says what happens to one entry of the target.
type Action uint8

// The actions.
const (
	Keep     Action = iota // left as it is
	Create                 // was not there
	Replace                // other contents, type, link target or hard link
	Metadata               // same contents; owner, mode, times or attributes change
	Delete                 // only in the target
)

var actions = [...]string{"keep", "create", "replace", "metadata", "delete"}

// String returns the action's name.
func (a Action) String() string {
	if int(a) < len(actions) {
		return actions[a]
	}
	return fmt.Sprintf("Action(%d)", uint8(a))
}

// A Change is one line of a plan.
type Change struct {
	Path   string // relative to the target; "." is the target itself
	Type   backup.NodeType
	Action Action
	Size   uint64 // bytes of a file after the restore; 0 if deleted
}

// Counts sum up a plan: entries by what happens to them, folders included.
type Counts struct {
	Created   int
	Changed   int // Replace
	Metadata  int
	Deleted   int
	Unchanged int // equal to the snapshot
	Kept      int // left alone by the overwrite policy

	FetchBytes uint64 // stored bytes to read from the repository
	FetchBlobs int
	ReuseBytes uint64 // bytes of files to write that the target has already
	WriteBytes uint64 // sizes of all files to create or replace
}

// A Failure is one entry that could not be restored, or not in full. The
// entry in the target is as it was, except where Err is about its metadata.
type Failure struct {
	Path string // relative to the target
	Err  error
}

// MaxFailures is how many failures a PartialError and a Plan list.
const MaxFailures = 100

// A PartialError says that some entries could not be restored; all others
// were.
type PartialError struct {
	Count    int       // of all failures
	Failures []Failure // the first of them, at most MaxFailures
}

// Error names the first failure and counts the others.
func (e *PartialError) Error() string {
	f := e.Failures[0]
	s := fmt.Sprintf("restore %q: %v", f.Path, f.Err)
	if e.Count > 1 {
		s += fmt.Sprintf(" (and %d more could not be restored)", e.Count-1)
	}
	return s
}

// Unwrap lets errors.Is look at the failures.
func (e *PartialError) Unwrap() []error {
	errs := make([]error, len(e.Failures))
	for i, f := range e.Failures {
		errs[i] = f.Err
	}
	return errs
}

func (e *PartialError) add(f Failure) {
	e.Count++
	if len(e.Failures) < MaxFailures {
		e.Failures = append(e.Failures, f)
	}
}

// An Observer is told how an execution goes on. Every field may be nil. Calls
// come one at a time, from any goroutine; a call that takes long holds the
// restore up.
type Observer struct {
	// Progress gets the counts so far, some times a second at most speed.
	Progress func(Stats)
	// Warning is called for what could not be kept but harms no contents:
	// ownership without the right to set it, attributes that the target's
	// file system lacks, device nodes without permission. Warnings of the
	// same kind come once, for the first path.
	Warning func(path string, err error)
	// Failure is called for every failure, and first for those that the
	// plan lists.
	Failure func(Failure)
}

// Stats count what an execution has done.
type Stats struct {
	Files    int    // created or replaced, all types but folders
	Folders  int    // created
	Metadata int    // entries of which only metadata changed, folders included
	Deleted  int    // entries
	Failed   int    // failures
	Warnings int    // all, also those that were not told
	Verified int    // files read again and found right
	Fetched  uint64 // stored bytes of the blobs read from the repository
	Reused   uint64 // bytes taken from files in the target
	Written  uint64 // bytes of contents, holes included
	Duration time.Duration
}
