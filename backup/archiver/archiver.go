// Package archiver reads folders and records them as snapshots.
//
// One Run takes all volumes of a job through one Writer, so that they share
// the index and the packs, and saves one snapshot per volume at the end.
//
// Memory is bounded by the number of workers, the depth of the tree and the
// largest single folder, not by the number of files: a folder is encoded as
// soon as the last of its entries is done.
package archiver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/chunk"
	"github.com/iot49/ide49-backup/backup/repo"
)

// A Source is one volume and how it is read.
type Source struct {
	Volume backup.Volume

	// Exclude reports whether to leave out an entry and all below it. rel
	// is its path below the volume, with slashes. It is called from several
	// goroutines. nil leaves out nothing.
	Exclude func(rel string, isDir bool) bool
	// Patterns says in words what Exclude leaves out; it is recorded.
	Patterns []string
	// OneFileSystem leaves out what is mounted below the volume; the mount
	// points themselves are recorded as empty folders.
	OneFileSystem bool
	// ExcludeCaches leaves out the contents of folders that hold a valid
	// CACHEDIR.TAG (bford.info/cachedir), but for that file.
	ExcludeCaches bool
	// ExcludeIfPresent does the same for folders that hold a file of one of
	// these names.
	ExcludeIfPresent []string
	// LargerThan leaves out files of more bytes; 0 leaves out none.
	LargerThan int64

	// Stream, if set, is recorded as a single file instead of the folder:
	// its whole path is the volume's. An error of the stream fails the
	// volume, so that never half of it is stored.
	Stream io.Reader

	// Alive, if set, returns an error when what is read is no longer what
	// should be read, such as a drive that was pulled out. It is asked
	// before the first and after the last file, and now and then between.
	Alive func() error
}

// A Job is what all volumes of a run have in common.
type Job struct {
	Time     time.Time // of the snapshots
	Hostname string    // the device's name
	Tags     []string  // beside the volume's
	Program  string    // name and version, recorded
	// History holds the repository's snapshots, from which the parents are
	// chosen.
	History []*backup.Snapshot
	// Skip names folders that are never entered, however they are reached:
	// the repository's own.
	Skip []string
	// Workers is how many files or chunks are worked on at once, beside the
	// goroutine that walks; 0 means one for each processor.
	Workers int
}

// An Observer is told what happens. Its functions may be nil, and are called
// from several goroutines.
type Observer struct {
	// Start is called when a volume is begun, and Done when it has been read;
	// its snapshot may not be saved yet.
	Start func(v backup.Volume, parent *backup.Snapshot)
	Done  func(r *Result)
	// Read is called with every number of bytes read from files.
	Read func(v backup.Volume, n int)
	// Item is called for every file and folder that is done.
	Item func(v backup.Volume, rel string, c Change, size uint64)
	// Problem is called for everything that could not be read.
	Problem func(v backup.Volume, p Problem)
}

// A Change says how an entry differs from the parent snapshot.
type Change uint8

// The changes.
const (
	New Change = iota
	Changed
	Unmodified
)

// A Problem is one entry that is missing from a snapshot, or of which it is not
// sure that it is whole.
type Problem struct {
	Path string // below the volume; "" is the volume itself
	Err  error
}

// ErrChanging says that a file changed while it was read, each time. What the
// snapshot holds of it may be of two minds.
var ErrChanging = errors.New("it changed while it was read; stop the program that writes it, or leave the file out")

// A Result is what became of one volume.
type Result struct {
	Volume   backup.Volume
	Snapshot *backup.Snapshot // nil if there is none
	Problems int              // files and folders that could not be read
	Items    uint64           // entries recorded, of all types
	// Emptied says that the parent snapshot held something and this one
	// holds nothing.
	Emptied bool
	// Err says why there is no snapshot.
	Err error
}

// Run records all sources, which need different paths. It fails as a whole
// when the repository can't be written or ctx is cancelled; what concerns one
// volume is in its Result. The snapshots exist when Run returns, and only
// those whose Result has one.
//
// The caller holds a shared lock and has loaded the index.
func Run(ctx context.Context, r *repo.Repo, sources []Source, job Job, obs Observer) ([]*Result, error) {
	tables, err := chunk.NewTables(chunk.Pol(r.Config().Polynomial))
	if err != nil {
		return nil, fmt.Errorf("back up: %w", err)
	}
	if job.Workers == 0 {
		job.Workers = runtime.GOMAXPROCS(0)
	}
	skip, err := identities(job.Skip)
	if err != nil {
		return nil, fmt.Errorf("back up: %w", err)
	}
	a := &archive{
		repo: r, job: job, obs: obs, tables: tables, skip: skip,
		crew:  newCrew(job.Workers),
		large: newBuffers(job.Workers+1, chunk.MaxSize),
		small: newBuffers(job.Workers+1, chunk.MinSize+1),
		names: newNames(),

		listing: sync.Pool{New: func() any { return new([listSize]byte) }},
	}
	results := make([]*Result, len(sources))
	err = r.Update(ctx, func(ctx context.Context, w *repo.Writer) error {
		a.w = w
		for i := range sources {
			results[i] = a.volume(ctx, &sources[i])
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := a.fatal(); err != nil {
				return err
			}
			if obs.Done != nil {
				obs.Done(results[i])
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("back up: %w", err)
	}
	for _, res := range results {
		if res.Err != nil {
			continue
		}
		id, err := r.SaveSnapshot(ctx, res.Snapshot)
		if err != nil {
			res.Snapshot = nil
			return results, fmt.Errorf("back up %s: %w", res.Volume.Name, err)
		}
		res.Snapshot.ID = id
	}
	return results, nil
}

// An archive is one Run.
type archive struct {
	repo   *repo.Repo
	w      *repo.Writer
	job    Job
	obs    Observer
	tables *chunk.Tables
	skip   map[identity]bool
	crew   *crew
	large  *buffers // for chunks
	small  *buffers // for files below chunk.MinSize
	names  *names
	// listing holds buffers of *[listSize]byte.
	listing sync.Pool

	failure atomic.Pointer[error] // the first error that ends the run
}

// fail ends the run with err, which comes from the repository or the context.
func (a *archive) fail(err error) { a.failure.CompareAndSwap(nil, &err) }

func (a *archive) fatal() error {
	if p := a.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// volume reads one source and makes its snapshot, which it does not save.
func (a *archive) volume(ctx context.Context, src *Source) *Result {
	v := &volume{a: a, ctx: ctx, src: src, start: time.Now()}
	parent := Parent(a.job.History, a.job.Hostname, src.Volume.Path)
	if a.obs.Start != nil {
		a.obs.Start(src.Volume, parent)
	}
	res := &Result{Volume: src.Volume}
	if parent != nil {
		v.parent = parent
		v.parentStart = parent.Time
		if parent.Summary != nil {
			v.parentStart = parent.Summary.BackupStart
		}
	}
	var tree backup.ID
	if src.Stream != nil {
		tree, res.Err = v.stream()
	} else {
		tree, res.Err = v.folder()
	}
	if err := a.fatal(); res.Err == nil && err != nil {
		res.Err = err
	}
	if res.Err == nil {
		res.Err = v.alive()
	}
	if res.Err != nil {
		return res
	}
	res.Problems = int(v.problems.Load())
	res.Items = v.items.Load()
	res.Emptied = v.emptied
	res.Snapshot = v.snapshot(tree, parent)
	return res
}

// Parent returns the newest complete snapshot of a device's folder, the one to
// compare with, or nil.
func Parent(all []*backup.Snapshot, hostname, path string) *backup.Snapshot {
	var best *backup.Snapshot
	for _, s := range all {
		if s.Hostname == hostname && len(s.Paths) == 1 && s.Paths[0] == path && s.Complete() &&
			!s.HasTag(backup.BeforeRestoreTag) && (best == nil || s.Time.After(best.Time)) {
			best = s
		}
	}
	return best
}

func (v *volume) snapshot(tree backup.ID, parent *backup.Snapshot) *backup.Snapshot {
	job := &v.a.job
	s := &backup.Snapshot{
		Time: job.Time, Tree: &tree, Paths: []string{v.src.Volume.Path}, Hostname: job.Hostname,
		Excludes: v.src.Patterns, ProgramVersion: job.Program, Summary: v.summary(),
	}
	if parent != nil {
		s.Parent = &parent.ID
	}
	s.Tags = append(s.Tags, backup.VolumeTag+v.src.Volume.Name)
	s.Tags = append(s.Tags, job.Tags...)
	if v.problems.Load() > 0 {
		s.Tags = append(s.Tags, backup.IncompleteTag)
	}
	if u, err := user.Current(); err == nil {
		s.Username = u.Username
		uid, _ := strconv.ParseUint(u.Uid, 10, 32) // numeric on Linux
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		s.UID, s.GID = uint32(uid), uint32(gid)
	}
	return s
}

func (v *volume) summary() *backup.Summary {
	return &backup.Summary{
		BackupStart: v.start.Round(0), BackupEnd: time.Now().Round(0),
		FilesNew: v.files[New].Load(), FilesChanged: v.files[Changed].Load(), FilesUnmodified: v.files[Unmodified].Load(),
		DirsNew: v.dirs[New].Load(), DirsChanged: v.dirs[Changed].Load(), DirsUnmodified: v.dirs[Unmodified].Load(),
		DataBlobs: v.blobs[backup.DataBlob].Load(), TreeBlobs: v.blobs[backup.TreeBlob].Load(),
		DataAdded: v.added.Load(), DataAddedPacked: v.packed.Load(),
		TotalFilesProcessed: v.files[New].Load() + v.files[Changed].Load() + v.files[Unmodified].Load(),
		TotalBytesProcessed: v.bytes.Load(),
	}
}

// An identity tells a folder from all others, whatever its path.
type identity struct{ dev, ino uint64 }

func identities(paths []string) (map[identity]bool, error) {
	ids := map[identity]bool{}
	for _, p := range paths {
		st, err := stat(p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look at %s: %w", p, err)
		}
		ids[identity{uint64(st.Dev), uint64(st.Ino)}] = true
	}
	return ids, nil
}
