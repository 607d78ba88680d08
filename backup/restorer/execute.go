package restorer

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

const (
	// window is how much of a pack is one unit of work, in stored bytes.
	window = 4 << 20
	// entryUnit is how many entries without contents are one.
	entryUnit = 256
	// Unfinished files wait under their temporary names until there are so
	// many entries or bytes, then they are all made durable at once.
	batchEntries = 50_000
	batchBytes   = 1 << 30
	// maxStoreErrors is how many reads in a row may fail for other reasons
	// than damage before the repository counts as out of reach.
	maxStoreErrors = 3
)

// An execution is a Plan being carried out.
type execution struct {
	*Plan
	ctx    context.Context
	t      *target
	obs    Observer
	prefix string
	parts  map[uint32]*part // files with more than one chunk
	plain  []uint32         // entries without contents to fetch
	began  time.Time
	open   openParts

	files, folders, metadata, deleted, failed, warnings, verified atomic.Int64
	fetched, reused, written                                      atomic.Uint64
	storeErrors                                                   atomic.Int32

	tell     sync.Mutex // around calls of the observer
	told     map[string]bool
	problems PartialError
	lastTold time.Time

	mu      sync.Mutex
	bad     map[uint32]bool // entries that failed
	ready   []uint32        // complete under their temporary names
	bytes   uint64          // in ready
	pending sync.Mutex      // held while a batch is renamed
}

// Execute carries the plan out, once. It returns a *PartialError if some
// entries could not be restored but all others are; another error says why it
// stopped, in which case every file is either as it was or as the snapshot has
// it, and no file under a temporary name remains.
//
// When it returns, what it restored is on the disk.
func (p *Plan) Execute(ctx context.Context, obs Observer) (stats Stats, err error) {
	if p.ran {
		return Stats{}, errors.New("restore: the plan was carried out already; make a new one")
	}
	p.ran = true
	t, err := openTarget(p.dst)
	if err != nil {
		return Stats{}, fmt.Errorf("restore: %w", err)
	}
	defer t.close()
	switch err := unix.Flock(t.fd, unix.LOCK_EX|unix.LOCK_NB); err {
	case unix.EWOULDBLOCK:
		return Stats{}, fmt.Errorf("restore to %s: %w", p.dst.Name(), ErrBusy)
	default: // some network file systems know no locks
	}
	x := &execution{
		Plan: p, ctx: ctx, t: t, obs: obs, prefix: tempPrefix + randomDigits(), parts: map[uint32]*part{},
		began: time.Now(), told: map[string]bool{}, bad: map[uint32]bool{},
	}
	x.problems = PartialError{Count: p.failures.Count, Failures: slices.Clone(p.failures.Failures)}
	x.failed.Store(int64(p.failures.Count))
	for _, f := range p.failures.Failures {
		if obs.Failure != nil {
			obs.Failure(f)
		}
	}
	err = x.run()
	x.progress(true)
	if err == nil && x.problems.Count > 0 {
		return x.stats(), &x.problems
	}
	if err != nil {
		err = fmt.Errorf("restore to %s: %w", p.dst.Name(), err)
	}
	return x.stats(), err
}

func randomDigits() string {
	var b [4]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func (x *execution) run() error {
	x.sweepStale()
	if err := x.makeFolders(); err != nil {
		return err
	}
	x.sort()
	err := x.contents()
	if err == nil {
		err = x.commit()
	}
	if err == nil {
		err = x.link()
	}
	if err != nil {
		x.sweep()
		return err
	}
	if err := x.delete(); err != nil {
		return err
	}
	if err := x.finishFolders(); err != nil {
		return err
	}
	if err := x.sync(); err != nil {
		return err
	}
	if x.opt.Verify {
		return x.verify()
	}
	return nil
}

// stats returns the counts so far.
func (x *execution) stats() Stats {
	return Stats{
		Files: int(x.files.Load()), Folders: int(x.folders.Load()), Metadata: int(x.metadata.Load()), Deleted: int(x.deleted.Load()),
		Failed: int(x.failed.Load()), Warnings: int(x.warnings.Load()), Verified: int(x.verified.Load()),
		Fetched: x.fetched.Load(), Reused: x.reused.Load(), Written: x.written.Load(), Duration: time.Since(x.began),
	}
}

// progressEvery is the least time between two reports.
const progressEvery = 100 * time.Millisecond

func (x *execution) progress(last bool) {
	if x.obs.Progress == nil {
		return
	}
	x.tell.Lock()
	defer x.tell.Unlock()
	if now := time.Now(); last || now.Sub(x.lastTold) >= progressEvery {
		x.lastTold = now
		x.obs.Progress(x.stats())
	}
}

// warn tells of the first warning of a kind.
func (x *execution) warn(kind string, path func() string, err error) {
	x.warnings.Add(1)
	x.tell.Lock()
	defer x.tell.Unlock()
	if x.told[kind] {
		return
	}
	x.told[kind] = true
	if x.obs.Warning != nil {
		x.obs.Warning(path(), err)
	}
}

// fail notes that an entry could not be restored. It returns an error if the
// whole restore has to stop for that.
func (x *execution) fail(i uint32, err error) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	x.mu.Lock()
	again := x.bad[i]
	x.bad[i] = true
	x.mu.Unlock()
	if again {
		return nil
	}
	x.failPath(x.path(i), err)
	return nil
}

func (x *execution) failPath(path string, err error) {
	x.failed.Add(1)
	x.tell.Lock()
	defer x.tell.Unlock()
	f := Failure{path, err}
	x.problems.add(f)
	if x.obs.Failure != nil {
		x.obs.Failure(f)
	}
}

func (x *execution) isBad(i uint32) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.bad[i]
}

// settle deals with the result of one entry. An error of the target as such
// stops the restore.
func (x *execution) settle(i uint32, err error) error {
	if err == nil {
		return nil
	}
	if stop := stopping(err); stop != nil {
		return fmt.Errorf("%s: %w", x.path(i), stop)
	}
	var incomplete metadataError
	if errors.As(err, &incomplete) {
		x.failPath(x.path(i), err) // its contents are in place
		return x.ctx.Err()
	}
	return x.fail(i, err)
}

func (x *execution) tempName(i uint32) string {
	var b [4]byte
	b[0], b[1], b[2], b[3] = byte(i>>24), byte(i>>16), byte(i>>8), byte(i)
	return x.prefix + hex.EncodeToString(b[:])
}

// sweepStale removes what a restore that was killed has left.
func (x *execution) sweepStale() {
	f := folders{x: x}
	defer f.close()
	for _, at := range x.stale {
		dir, name := split(x.pathAt(at))
		if fd, err := f.path(dir); err == nil {
			_ = unix.Unlinkat(fd, name, 0) // it will be tried again next time
		}
	}
}

// makeFolders makes the folders that are not there, for nobody else to enter
// until they have their owner and mode.
func (x *execution) makeFolders() error {
	f := folders{x: x}
	defer f.close()
	for i := range x.entries {
		e, n := &x.entries[i], uint32(i)
		if e.kind != kDir || e.flags&fNeeded == 0 || e.action != Create && e.action != Replace {
			continue
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
		err := x.makeFolder(&f, e)
		if err == nil {
			x.folders.Add(1)
			continue
		}
		if err := x.settle(n, fmt.Errorf("make folder: %w", err)); err != nil {
			return err
		}
	}
	return nil
}

func (x *execution) makeFolder(f *folders, e *entry) error {
	fd, err := f.entry(e.parent)
	if err != nil {
		return err
	}
	name := x.arena.name(e.rec)
	if e.action == Replace {
		if err := unix.Unlinkat(fd, name, 0); err != nil && err != unix.ENOENT {
			return err
		}
	}
	err = unix.Mkdirat(fd, name, 0o700)
	if err == unix.EEXIST {
		var st unix.Stat_t
		if lstat(fd, name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return nil // somebody made it meanwhile
		}
		return ErrChanged
	}
	return err
}

// sort finds what each file needs: how many chunks come from packs, and which
// entries need none.
func (x *execution) sort() {
	count := make(map[uint32]int32)
	single := make([]uint64, (len(x.entries)+63)/64)
	for _, r := range x.refs {
		if bit := uint64(1) << (r.entry % 64); single[r.entry/64]&bit == 0 {
			single[r.entry/64] |= bit
			continue
		}
		count[r.entry]++
	}
	for i, n := range count {
		x.parts[i] = &part{entry: i, missing: n + 1}
	}
	for i := range x.entries {
		e, n := &x.entries[i], uint32(i)
		if e.kind == kDir || e.flags&fLink != 0 || e.action == Keep {
			continue
		}
		if single[n/64]&(1<<(n%64)) == 0 {
			x.plain = append(x.plain, n)
			continue
		}
		// A file of which one chunk is fetched and others are kept is no
		// simple one either.
		if x.parts[n] == nil {
			if rec := x.arena.record(e.rec); len(rec.chunks) > 1 {
				x.parts[n] = &part{entry: n, missing: 1}
			}
		}
	}
}

// contents runs the workers.
func (x *execution) contents() error {
	g, ctx := errgroup.WithContext(x.ctx)
	outer := x.ctx
	x.ctx = ctx
	var next sync.Mutex
	nextRef, plain := 0, 0
	take := func() (refs []ref, entries []uint32) {
		next.Lock()
		defer next.Unlock()
		if nextRef < len(x.refs) {
			lo := nextRef
			nextRef = x.packRange(lo, window)
			return x.refs[lo:nextRef], nil
		}
		lo := plain
		plain = min(plain+entryUnit, len(x.plain))
		return nil, x.plain[lo:plain]
	}
	for range x.opt.Workers {
		g.Go(func() error {
			w := worker{x: x, folders: folders{x: x}}
			defer w.folders.close()
			for {
				refs, entries := take()
				var err error
				switch {
				case len(refs) > 0:
					err = w.fetch(refs)
				case len(entries) > 0:
					err = w.entries(entries)
				default:
					return nil
				}
				if err == nil {
					err = ctx.Err()
				}
				if err == nil {
					err = x.commitFull()
				}
				if err != nil {
					return err
				}
				x.progress(false)
			}
		})
	}
	err := g.Wait()
	x.ctx = outer
	if err != nil && outer.Err() != nil {
		return outer.Err()
	}
	return err
}

// A worker restores contents. It is for one goroutine.
type worker struct {
	x       *execution
	folders folders
	blobs   []repo.PackedBlob
	buf     []byte // a chunk of the target
}

// fetch reads a part of a pack and writes its blobs to the files.
func (w *worker) fetch(refs []ref) error {
	x := w.x
	w.blobs = w.blobs[:0]
	for i, r := range refs {
		if i == 0 || r.offset != refs[i-1].offset {
			w.blobs = append(w.blobs, x.location(r))
		}
	}
	at := 0
	return x.r.ReadBlobs(x.ctx, x.packs[refs[0].pack], w.blobs, func(b repo.PackedBlob, plain []byte, err error) error {
		group := at
		for at++; at < len(refs) && refs[at].offset == b.Offset; at++ {
		}
		x.fetched.Add(uint64(b.Length))
		if err != nil {
			// Another copy may be intact.
			if again, againErr := x.r.Blob(x.ctx, backup.DataBlob, b.ID); againErr == nil {
				plain, err = again, nil
			}
		}
		if err == nil {
			x.storeErrors.Store(0)
		} else if x.ctx.Err() != nil {
			return x.ctx.Err()
		} else if !isDamage(err) && x.storeErrors.Add(1) >= maxStoreErrors {
			return fmt.Errorf("the repository can't be read: %w", err)
		}
		for _, r := range refs[group:at] {
			if err := w.write(r, plain, err); err != nil {
				return err
			}
		}
		return nil
	})
}

// isDamage reports whether an error of the repository concerns some of its
// bytes, so that others may well be read.
func isDamage(err error) bool {
	return errors.Is(err, repo.ErrDamaged) || errors.Is(err, repo.ErrNoBlob) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, io.ErrUnexpectedEOF)
}

// write puts a chunk, or the error that there is instead, in its file.
func (w *worker) write(r ref, plain []byte, blobErr error) error {
	x := w.x
	if p := x.parts[r.entry]; p != nil {
		return w.writePart(p, r, plain, blobErr)
	}
	if blobErr != nil {
		return x.fail(r.entry, blobErr)
	}
	return x.settle(r.entry, w.whole(r.entry, plain))
}

// entries restores entries that need nothing from packs.
func (w *worker) entries(entries []uint32) error {
	for _, i := range entries {
		if err := w.x.ctx.Err(); err != nil {
			return err
		}
		e := &w.x.entries[i]
		var err error
		switch {
		case e.action == Metadata:
			err = w.metadata(i, e)
		case e.kind == kFile:
			err = w.whole(i, nil)
		default:
			err = w.special(i, e)
		}
		if err := w.x.settle(i, err); err != nil {
			return err
		}
	}
	return nil
}

// done hands a complete temporary file over to be renamed.
func (x *execution) done(i uint32, size uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ready = append(x.ready, i)
	x.bytes += size
}

// commitFull commits if enough has come together.
func (x *execution) commitFull() error {
	x.mu.Lock()
	full := len(x.ready) >= batchEntries || x.bytes >= batchBytes
	x.mu.Unlock()
	if !full {
		return nil
	}
	return x.commit()
}

// commit makes all complete temporary files durable, then gives them their
// names. One sync of the file system is far cheaper than one for each file.
func (x *execution) commit() error {
	x.pending.Lock()
	defer x.pending.Unlock()
	x.mu.Lock()
	batch := x.ready
	x.ready, x.bytes = nil, 0
	x.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	slices.Sort(batch)
	err := x.sync()
	if err != nil {
		x.mu.Lock()
		x.ready = append(x.ready, batch...) // for sweep
		x.mu.Unlock()
		return err
	}
	f := folders{x: x}
	defer f.close()
	for k, i := range batch {
		if err := x.rename(&f, i); err != nil {
			if dir, dirErr := f.entry(x.entries[i].parent); dirErr == nil {
				_ = unix.Unlinkat(dir, x.tempName(i), 0)
			}
			if err := x.settle(i, err); err != nil {
				x.mu.Lock()
				x.ready = append(x.ready, batch[k+1:]...)
				x.mu.Unlock()
				return err
			}
			continue
		}
		x.files.Add(1)
	}
	return nil
}

// rename gives a complete temporary entry its name.
func (x *execution) rename(f *folders, i uint32) error {
	e := &x.entries[i]
	dir, err := f.entry(e.parent)
	if err != nil {
		return err
	}
	name := x.arena.name(e.rec)
	if e.flags&fExists == 0 {
		switch err := unix.Renameat2(dir, x.tempName(i), dir, name, unix.RENAME_NOREPLACE); err {
		case nil:
			return nil
		case unix.EINVAL, unix.ENOSYS: // not on this file system
			var st unix.Stat_t
			if lstat(dir, name, &st) == nil {
				return ErrChanged
			}
		case unix.EEXIST:
			return ErrChanged
		default:
			return err
		}
	}
	if e.flags&fWasDir != 0 {
		if s, ok := x.clear[i]; ok {
			for _, d := range x.gone[s.from:s.to] {
				if err := x.removeOne(f, d); err != nil {
					return err
				}
			}
		}
		if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
			return fmt.Errorf("remove the folder in its place: %w", err)
		}
	}
	return unix.Renameat(dir, x.tempName(i), dir, name)
}

// removeOne deletes what was planned to go.
func (x *execution) removeOne(f *folders, d deletion) error {
	path := x.pathAt(d.path)
	parent, name := split(path)
	dir, err := f.path(parent)
	if err == nil {
		how := 0
		if d.isDir {
			how = unix.AT_REMOVEDIR
		}
		err = unix.Unlinkat(dir, name, how)
	}
	if err != nil && err != unix.ENOENT {
		return fmt.Errorf("delete: %w", err)
	}
	x.deleted.Add(1)
	return nil
}

// link makes the further names of files that have several.
func (x *execution) link() error {
	var f, from folders
	f.x, from.x = x, x
	defer f.close()
	defer from.close()
	for i := range x.entries {
		e, n := &x.entries[i], uint32(i)
		if e.flags&fLink == 0 || e.action == Keep {
			continue
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
		err := x.linkOne(&f, &from, n)
		if err == nil {
			x.files.Add(1)
		}
		if err := x.settle(n, err); err != nil {
			return err
		}
	}
	return nil
}

func (x *execution) linkOne(f, from *folders, i uint32) error {
	first := x.primary[i]
	if x.isBad(first) {
		return fmt.Errorf("its other name %q could not be restored", x.path(first))
	}
	src, err := from.entry(x.entries[first].parent)
	if err != nil {
		return err
	}
	dst, err := f.entry(x.entries[i].parent)
	if err != nil {
		return err
	}
	if err := unix.Linkat(src, x.arena.name(x.entries[first].rec), dst, x.tempName(i), 0); err != nil {
		return fmt.Errorf("make hard link: %w", err)
	}
	if err := x.rename(f, i); err != nil {
		_ = unix.Unlinkat(dst, x.tempName(i), 0)
		return err
	}
	// Renaming a name of a file over another of the same file does nothing.
	if err := unix.Unlinkat(dst, x.tempName(i), 0); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}

// sweep removes all temporary files after a failure.
func (x *execution) sweep() {
	x.open.closeAll()
	f := folders{x: x}
	defer f.close()
	unlink := func(i uint32) {
		if dir, err := f.entry(x.entries[i].parent); err == nil {
			_ = unix.Unlinkat(dir, x.tempName(i), 0) // a later restore removes it
		}
	}
	for _, i := range x.ready {
		unlink(i)
	}
	for i, p := range x.parts {
		if p.created {
			unlink(i)
		}
	}
}

// delete removes what the snapshot does not have.
func (x *execution) delete() error {
	f := folders{x: x}
	defer f.close()
	for _, d := range x.gone {
		if d.early {
			continue
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
		if err := x.removeOne(&f, d); err != nil {
			path := x.pathAt(d.path)
			if stop := stopping(err); stop != nil {
				return fmt.Errorf("%s: %w", path, stop)
			}
			x.failPath(path, err)
		}
		x.progress(false)
	}
	return nil
}

// finishFolders gives folders their metadata, the deepest first: nothing is
// made in them any more.
func (x *execution) finishFolders() error {
	for i := len(x.entries) - 1; i >= 0; i-- {
		e, n := &x.entries[i], uint32(i)
		made := e.action == Create || e.action == Replace
		if e.kind != kDir || e.flags&fNeeded == 0 || e.flags&fKept != 0 || e.flags&fSelected == 0 && !made ||
			e.action == Keep && e.flags&fTouched == 0 {
			continue
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
		if x.isBad(n) {
			continue
		}
		err := x.finishFolder(n)
		if err == nil && e.action == Metadata {
			x.metadata.Add(1)
		}
		if err := x.settle(n, err); err != nil {
			return err
		}
	}
	return nil
}

func (x *execution) finishFolder(i uint32) error {
	path := x.path(i)
	fd, err := x.t.open(path, unix.O_RDONLY)
	h := handle{fd: fd}
	if err == unix.EACCES {
		fd, err = x.t.open(path, unix.O_PATH)
		h = handle{fd: fd, isPath: true}
	}
	if err != nil {
		return fmt.Errorf("set the folder's metadata: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	e := &x.entries[i]
	rec := x.arena.record(e.rec)
	err = x.setMetadata(h, &rec, &st, x.inherit || e.flags&fExists != 0, func() string { return path })
	if st.Dev != x.t.dev && !h.isPath {
		err = errors.Join(err, unix.Fsync(fd)) // sync does not reach it
	}
	return err
}

// sync makes the target's file system durable.
func (x *execution) sync() error {
	if err := ignoringEINTR(func() error { return unix.Syncfs(x.t.fd) }); err != nil {
		if stop := stopping(err); stop != nil {
			return stop
		}
		return fmt.Errorf("sync the target: %w", err)
	}
	return nil
}

// folders holds a few open folders, so that neighbours need not be opened
// again. It is for one goroutine.
type folders struct {
	x     *execution
	items [8]openFolder
	next  int
	name  string // of the folder that path opened last
	named int    // its descriptor plus one, or zero
}

type openFolder struct {
	entry uint32
	fd    int // plus one; zero: none
}

// entry returns a descriptor of the folder with the given number. It is good
// until the next call.
func (f *folders) entry(i uint32) (int, error) {
	for k := range f.items {
		if f.items[k].fd > 0 && f.items[k].entry == i {
			return f.items[k].fd - 1, nil
		}
	}
	fd, err := f.x.t.open(f.x.path(i), unix.O_PATH)
	if err != nil {
		return -1, fmt.Errorf("open its folder: %w", err)
	}
	it := &f.items[f.next]
	f.next = (f.next + 1) % len(f.items)
	if it.fd > 0 {
		unix.Close(it.fd - 1)
	}
	*it = openFolder{i, fd + 1}
	return fd, nil
}

// path returns a descriptor of the folder rel. It is good until the next call.
func (f *folders) path(rel string) (int, error) {
	if f.named > 0 && f.name == rel {
		return f.named - 1, nil
	}
	if f.named > 0 {
		unix.Close(f.named - 1)
		f.named = 0
	}
	fd, err := f.x.t.open(rel, unix.O_PATH)
	if err != nil {
		return -1, fmt.Errorf("open its folder: %w", err)
	}
	f.name, f.named = rel, fd+1
	return fd, nil
}

func (f *folders) close() {
	for _, it := range f.items {
		if it.fd > 0 {
			unix.Close(it.fd - 1)
		}
	}
	if f.named > 0 {
		unix.Close(f.named - 1)
	}
	f.items, f.named = [8]openFolder{}, 0
}
