package restorer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// A Plan says what a restore will do. It is for one goroutine at a time.
type Plan struct {
	r        *repo.Repo
	dst      *os.Root
	opt      Options
	entries  []entry // folders before what is in them; the first is the target
	arena    arena
	gone     []deletion // what is in a folder before the folder
	clear    map[uint32]span
	primary  map[uint32]uint32 // of entries with fLink
	packs    []backup.ID
	refs     []ref    // by pack, offset, entry and chunk
	stale    []uint64 // paths of unfinished files of an earlier restore
	counts   Counts
	failures PartialError
	inherit  bool // a folder of the target has a default ACL
	ran      bool
}

// A ref is one chunk to fetch.
type ref struct {
	pack   uint32 // number in Plan.packs
	offset uint32 // in the pack
	entry  uint32
	chunk  uint32
	pos    uint64 // in the file
}

type deletion struct {
	path  uint64 // in the arena
	isDir bool
	early bool // part of a span: removed when a file takes the folder's place
}

// A span is a range of Plan.gone.
type span struct{ from, to int }

// A linkKey tells the files of a snapshot apart that had several names.
type linkKey struct{ device, inode uint64 }

// A linked is the entry that holds a file with several names.
type linked struct {
	entry uint32
	at    linkKey // where the target has it now
	size  uint64
	first backup.ID // of its chunks
	n     int
}

// maxPath is the length that a folder's path may have.
const maxPath = unix.PathMax - 1

// A planner makes a Plan.
type planner struct {
	*Plan
	ctx    context.Context
	t      *target
	root   bool
	links  map[linkKey]linked
	todo   []todo // folders, the next one last
	hashes chan hashJob
	err    error // of adding
	buf    []byte
	extra  int64 // bytes of memory besides the arena
}

// A todo is a folder whose contents are still to be planned.
type todo struct {
	entry    uint32
	tree     backup.ID
	exists   bool
	included bool // it was selected, so all below is unless excluded
}

// Prepare compares a snapshot with the folder dst, which it does not change,
// and returns what is to be done. The index of r must be loaded.
//
// What is damaged in the snapshot does not fail the plan: see Plan.Failures.
// Nothing is deleted from a folder whose listing can't be read. Memory is
// bounded by opt.MaxMemory, and ErrTooLarge says that it is not enough.
func Prepare(ctx context.Context, r *repo.Repo, sn *backup.Snapshot, dst *os.Root, opt Options) (*Plan, error) {
	if opt.MaxMemory <= 0 {
		opt.MaxMemory = DefaultMaxMemory
	}
	if opt.Workers <= 0 {
		opt.Workers = max(2, runtime.GOMAXPROCS(0))
	}
	t, err := openTarget(dst)
	if err != nil {
		return nil, fmt.Errorf("plan restore: %w", err)
	}
	defer t.close()
	p := &planner{
		Plan:   &Plan{r: r, dst: dst, opt: opt, clear: map[uint32]span{}, primary: map[uint32]uint32{}},
		t:      t,
		root:   os.Geteuid() == 0,
		links:  map[linkKey]linked{},
		hashes: make(chan hashJob),
	}
	root, err := findRoot(ctx, r, sn, opt.Root)
	if err != nil {
		return nil, fmt.Errorf("plan restore of snapshot %s: %w", sn.ID.Short(), err)
	}
	var g *errgroup.Group
	g, p.ctx = errgroup.WithContext(ctx)
	for range opt.Workers {
		g.Go(func() error { return p.hash() })
	}
	g.Go(func() error {
		defer close(p.hashes)
		return p.walk(root)
	})
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("plan restore of snapshot %s: %w", sn.ID.Short(), err)
	}
	if err := p.finish(); err != nil {
		return nil, fmt.Errorf("plan restore of snapshot %s: %w", sn.ID.Short(), err)
	}
	return p.Plan, nil
}

// findRoot returns the node of the snapshot's folder at path. That of the
// whole snapshot has a Subtree only.
func findRoot(ctx context.Context, r *repo.Repo, sn *backup.Snapshot, path string) (*backup.Node, error) {
	if path == "" {
		path = "/"
		if len(sn.Paths) == 1 {
			path = sn.Paths[0]
		}
	}
	node := &backup.Node{Type: backup.Dir, Subtree: *sn.Tree}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." {
			continue
		}
		data, err := r.Blob(ctx, backup.TreeBlob, node.Subtree)
		if err != nil {
			return nil, err
		}
		var found *backup.Node
		err = backup.EachNode(data, func(n *backup.Node) error {
			if n.Name == name && n.Type == backup.Dir {
				copied := *n
				found = &copied
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("tree %s: %w", node.Subtree.Short(), err)
		}
		if found == nil {
			return nil, fmt.Errorf("folder %q: %w", path, ErrNoPath)
		}
		node = found
	}
	return node, nil
}

// walk plans the target itself and all that is below.
func (p *planner) walk(root *backup.Node) error {
	e := entry{parent: none, kind: kDir, flags: fExists | fWasDir | fSameType}
	included := p.selected(".", true, false)
	var st unix.Stat_t
	if err := unix.Fstat(p.t.fd, &st); err != nil {
		return fmt.Errorf("look at the target: %w", err)
	}
	if root.Name != "" && included {
		e.flags |= fSelected | fNeeded
		p.judge(&e, root, &st, p.t.fd, ".")
	}
	p.add(e, root)
	p.todo = append(p.todo, todo{0, root.Subtree, true, included})
	for len(p.todo) > 0 {
		next := p.todo[len(p.todo)-1]
		p.todo = p.todo[:len(p.todo)-1]
		if err := p.folder(next); err != nil {
			return err
		}
	}
	return nil
}

// selected reports whether a path is restored, given whether its folder is.
func (p *planner) selected(rel string, isDir, included bool) bool {
	return included || p.opt.Include == nil || p.opt.Include(rel, isDir)
}

func (p *planner) excluded(rel string, isDir bool) bool {
	return p.opt.Exclude != nil && p.opt.Exclude(rel, isDir)
}

// add appends an entry and returns its number.
func (p *planner) add(e entry, n *backup.Node) uint32 {
	p.buf = appendRecord(p.buf[:0], n)
	e.rec = p.arena.add(p.buf)
	p.entries = append(p.entries, e)
	p.extra += 24 + int64(len(n.Content))*24 // the entry and its refs
	if p.arena.size+p.extra > p.opt.MaxMemory || uint64(len(p.entries)) >= none {
		p.err = ErrTooLarge
	}
	return uint32(len(p.entries) - 1)
}

func (p *Plan) fail(path string, err error) { p.failures.add(Failure{path, err}) }

// path returns the path of an entry relative to the target.
func (p *Plan) path(i uint32) string {
	if i == 0 {
		return "."
	}
	var names []string
	n := -1
	for ; i != 0; i = p.entries[i].parent {
		names = append(names, p.arena.name(p.entries[i].rec))
		n += len(names[len(names)-1]) + 1
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// folder plans what is in a folder.
func (p *planner) folder(f todo) error {
	dir := p.path(f.entry)
	nodes, err := p.listing(f.tree)
	if p.ctx.Err() != nil {
		return p.ctx.Err()
	}
	if errors.Is(err, ErrTooLarge) {
		return err
	}
	if err != nil {
		p.fail(dir, fmt.Errorf("read the folder's listing: %w", err))
		return nil
	}
	fd, names := -1, []string(nil)
	if f.exists {
		var err error
		if fd, names, err = p.t.names(dir); err != nil {
			p.fail(dir, fmt.Errorf("read the target's folder: %w", err))
			return nil
		}
		defer unix.Close(fd)
		if value, err := attr(procPath(fd), aclDefault, true); err == nil && len(value) > 0 {
			p.inherit = true
		}
	}
	first := len(p.todo)
	err = nodes(func(n *backup.Node) error {
		for len(names) > 0 && names[0] < n.Name {
			p.extraneous(f, dir, fd, names[0])
			names = names[1:]
		}
		exists := len(names) > 0 && names[0] == n.Name
		if exists {
			names = names[1:]
		}
		if err := p.node(f, dir, fd, n, exists); err != nil {
			return err
		}
		return p.err
	})
	if err != nil {
		return err
	}
	for _, name := range names {
		p.extraneous(f, dir, fd, name)
	}
	slices.Reverse(p.todo[first:])
	return p.err
}

// largeTree is the size in bytes from which a listing is walked rather than
// unpacked: a node takes up to fifteen times the memory of its shortest form.
const largeTree = 4 << 20

// listing reads and checks a tree and returns a walk over its nodes.
func (p *planner) listing(id backup.ID) (walk func(fn func(n *backup.Node) error) error, err error) {
	if n, ok := p.r.Index().PlainLength(backup.Blob{Kind: backup.TreeBlob, ID: id}); ok && int64(n) > p.opt.MaxMemory/2 {
		return nil, ErrTooLarge
	}
	data, err := p.r.Blob(p.ctx, backup.TreeBlob, id)
	if err != nil {
		return nil, err
	}
	if len(data) > largeTree {
		// Nothing may be planned from the beginning of a damaged listing.
		err := backup.EachNode(data, func(*backup.Node) error { return nil })
		return func(fn func(*backup.Node) error) error { return backup.EachNode(data, fn) }, err
	}
	tree, err := backup.DecodeTree(data)
	if err != nil {
		return nil, fmt.Errorf("tree %s: %w", id.Short(), err)
	}
	return func(fn func(*backup.Node) error) error {
		for i := range tree.Nodes {
			if err := fn(&tree.Nodes[i]); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// node plans one entry of the snapshot.
func (p *planner) node(f todo, dir string, fd int, n *backup.Node, exists bool) error {
	rel, isDir := join(dir, n.Name), n.Type == backup.Dir
	if p.excluded(rel, isDir) {
		return nil
	}
	selected := p.selected(rel, isDir, f.included)
	if !selected && !isDir {
		return nil
	}
	if isDir && len(rel) > maxPath {
		p.fail(rel, fmt.Errorf("the path has %d bytes, more than Linux allows: %w", len(rel), unix.ENAMETOOLONG))
		return nil
	}
	e := entry{parent: f.entry, action: Create, kind: kindOf(n.Type)}
	if selected {
		e.flags |= fSelected
	}
	var st unix.Stat_t
	before := len(p.gone)
	if exists {
		switch err := lstat(fd, n.Name, &st); {
		case err == unix.ENOENT:
			exists = false
		case err != nil:
			p.fail(rel, fmt.Errorf("look at what the target has: %w", err))
			return nil
		}
	}
	if exists {
		if !p.existing(&e, n, &st, fd, rel) {
			return nil
		}
	}
	if e.kind == kFile && (e.action == Create || e.action == Replace) {
		if err := p.checkSize(n); err != nil {
			p.gone = p.gone[:before]
			delete(p.clear, uint32(len(p.entries)))
			p.fail(rel, err)
			return nil
		}
	}
	if isDir {
		i := p.add(e, n)
		if selected && e.action != Keep {
			p.need(i)
		}
		p.todo = append(p.todo, todo{i, n.Subtree, e.flags&fWasDir != 0, selected})
		return nil
	}
	return p.leaf(e, n, &st, fd)
}

// leaf adds an entry that is no folder.
func (p *planner) leaf(e entry, n *backup.Node, st *unix.Stat_t, fd int) error {
	switch {
	case e.flags&fKept != 0:
		p.counts.Kept++
		return nil
	case e.kind == kFile && n.Links > 1 && n.Inode != 0:
		key := linkKey{n.DeviceID, n.Inode}
		l, ok := p.links[key]
		if ok && l.size == n.Size && l.n == len(n.Content) && (l.n == 0 || l.first == n.Content[0]) {
			e.flags |= fLink
			if e.flags&fSameType != 0 && l.at == (linkKey{st.Dev, st.Ino}) {
				e.flags |= fTrusted // the same file as long as the other stays
			}
			n = &backup.Node{Name: n.Name, Type: n.Type, Size: n.Size}
			i := p.add(e, n)
			p.primary[i] = l.entry
			p.extra += 64
			return p.err
		}
		l = linked{entry: uint32(len(p.entries)), size: n.Size, n: len(n.Content)}
		if l.n > 0 {
			l.first = n.Content[0]
		}
		if e.flags&fSameType != 0 {
			l.at = linkKey{st.Dev, st.Ino}
		}
		p.links[key] = l
		p.extra += 128
		i := p.add(e, n)
		return p.compare(i, n, st, fd)
	case e.action == Keep && !(p.opt.Verify && e.flags&fTrusted != 0):
		p.counts.Unchanged++
		return nil
	}
	i := p.add(e, n)
	return p.compare(i, n, st, fd)
}

// need marks an entry and the folders on the way to it.
func (p *planner) need(i uint32) {
	for i != none && p.entries[i].flags&fNeeded == 0 {
		p.entries[i].flags |= fNeeded
		i = p.entries[i].parent
	}
}

// existing judges what has the node's name in the target. It reports whether
// there is anything left to plan.
func (p *planner) existing(e *entry, n *backup.Node, st *unix.Stat_t, fd int, rel string) bool {
	e.flags |= fExists
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		e.flags |= fWasDir
	}
	if st.Mode&unix.S_IFMT == e.kind.typeBits() {
		e.flags |= fSameType
	}
	if !p.mayOverwrite(st, n) || e.flags&fSelected == 0 {
		if e.kind == kDir && e.flags&fWasDir == 0 {
			p.fail(rel, fmt.Errorf("the target has no folder of that name: %w", ErrInTheWay))
			return false
		}
		e.flags |= fKept
		e.action = Keep
		return true
	}
	if e.flags&fSameType != 0 {
		p.judge(e, n, st, fd, n.Name)
		return true
	}
	e.action = Replace
	if e.flags&fWasDir == 0 {
		return true
	}
	// A folder has to go before a file can take its place.
	from := len(p.gone)
	free, err := p.remove(rel, st.Dev, true)
	if err == nil && !free || err == nil && len(p.gone) > from && !p.opt.Delete {
		err = ErrInTheWay
	}
	if err != nil {
		p.gone = p.gone[:from]
		p.fail(rel, fmt.Errorf("a folder stands where the snapshot has a %s: %w", n.Type, err))
		return false
	}
	for i := range p.gone[from:] {
		p.gone[from+i].early = true
	}
	p.clear[uint32(len(p.entries))] = span{from, len(p.gone)}
	return true
}

// mayOverwrite applies the overwrite policy to something that exists.
func (p *planner) mayOverwrite(st *unix.Stat_t, n *backup.Node) bool {
	switch p.opt.Overwrite {
	case Never:
		return false
	case Newer:
		sec := int64(st.Mtim.Sec)
		return cmp.Or(cmp.Compare(sec, n.ModTime.Unix()), cmp.Compare(int64(st.Mtim.Nsec), int64(n.ModTime.Nanosecond()))) < 0
	}
	return true
}

// judge compares an entry with something of the same type; name is that in
// the folder fd, or ".".
func (p *planner) judge(e *entry, n *backup.Node, st *unix.Stat_t, fd int, name string) {
	if e.kind != kDir && st.Nlink > 1 {
		e.flags |= fManyLinks
	}
	if sameMetadata(st, n, fd, name, p.root) {
		e.flags |= fSameMeta
	}
	same := true
	switch e.kind {
	case kFile:
		if uint64(st.Size) == n.Size {
			e.flags |= fSameSize
		}
		if p.opt.Overwrite == Always || e.flags&fSameSize == 0 || !sameTime(st.Mtim, n.ModTime) {
			e.flags |= fHashed
			e.action = Replace // until the comparison says otherwise
			return
		}
		e.flags |= fTrusted
	case kSymlink:
		target, err := readlink(fd, name)
		same = err == nil && target == n.LinkTarget
	case kDevice, kCharDevice:
		same = st.Rdev == n.Device
	}
	e.action = e.verdict(same)
}

// verdict returns what happens to an entry of the right type whose contents
// are the same or not.
func (e *entry) verdict(same bool) Action {
	switch {
	case same && e.flags&fSameMeta != 0:
		return Keep
	case same && e.flags&fManyLinks == 0:
		return Metadata
	}
	// A file with other names is replaced even for its metadata's sake: the
	// other names may be outside of the target.
	return Replace
}

// checkSize returns an error unless the blobs of a file are there and make up
// its size.
func (p *planner) checkSize(n *backup.Node) error {
	var sum uint64
	for _, id := range n.Content {
		b := backup.Blob{Kind: backup.DataBlob, ID: id}
		length, ok := p.r.Index().PlainLength(b)
		if !ok {
			return fmt.Errorf("%s: %w", b, repo.ErrNoBlob)
		}
		sum += uint64(length)
	}
	if sum != n.Size {
		return fmt.Errorf("the file claims %d bytes and has %d: %w", n.Size, sum, ErrDamaged)
	}
	return nil
}

// extraneous plans what to do with a name that the snapshot does not have.
func (p *planner) extraneous(f todo, dir string, fd int, name string) {
	rel := join(dir, name)
	var st unix.Stat_t
	if isTemp(name) {
		if lstat(fd, name, &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			p.stale = append(p.stale, p.addPath(rel))
		}
		return
	}
	if !p.opt.Delete {
		return
	}
	if err := lstat(fd, name, &st); err != nil {
		if err != unix.ENOENT {
			p.fail(rel, fmt.Errorf("look at what the target has: %w", err))
		}
		return
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if p.excluded(rel, isDir) {
		return
	}
	from := len(p.gone)
	included := p.selected(rel, isDir, f.included)
	free := included
	if isDir {
		below, err := p.remove(rel, st.Dev, included)
		if err != nil {
			p.gone = p.gone[:from]
			p.fail(rel, fmt.Errorf("delete: %w", err))
		}
		free = included && below && err == nil
	}
	if free {
		p.gone = append(p.gone, deletion{p.addPath(rel), isDir, false})
	}
	if len(p.gone) > from {
		p.entries[f.entry].flags |= fTouched
		p.need(f.entry)
	}
}

func (p *planner) addPath(rel string) uint64 {
	p.buf = appendBytes(p.buf[:0], rel)
	p.extra += 16
	at := p.arena.add(p.buf)
	if p.arena.size+p.extra > p.opt.MaxMemory {
		p.err = ErrTooLarge
	}
	return at
}

// pathAt returns what addPath kept.
func (p *Plan) pathAt(at uint64) string { return p.arena.name(at) }

// remove plans to delete what is in the folder rel and reports whether the
// folder is empty then.
func (p *planner) remove(rel string, dev uint64, included bool) (free bool, err error) {
	if dev != p.t.dev {
		return false, errors.New("it is on another file system; delete it yourself if it is to go")
	}
	if err := p.ctx.Err(); err != nil {
		return false, err
	}
	fd, names, err := p.t.names(rel)
	if err != nil {
		return false, err
	}
	type item struct {
		name  string
		dev   uint64
		isDir bool
	}
	items := make([]item, 0, len(names))
	var st unix.Stat_t
	for _, name := range names {
		if err := lstat(fd, name, &st); err != nil {
			unix.Close(fd)
			return false, err
		}
		items = append(items, item{name, st.Dev, st.Mode&unix.S_IFMT == unix.S_IFDIR})
	}
	unix.Close(fd) // before going deeper, so that depth does not cost descriptors
	free = true
	for _, it := range items {
		path := join(rel, it.name)
		if p.excluded(path, it.isDir) {
			free = false
			continue
		}
		selected := p.selected(path, it.isDir, included)
		gone := selected
		if it.isDir {
			below, err := p.remove(path, it.dev, selected)
			if err != nil {
				return false, err
			}
			gone = selected && below
		}
		if !gone {
			free = false
			continue
		}
		p.gone = append(p.gone, deletion{p.addPath(path), it.isDir, false})
		if p.err != nil {
			return false, p.err
		}
	}
	return free, nil
}

// A hashJob is a file of the target whose contents are compared.
type hashJob struct {
	fd     int
	size   int64 // of the target's file
	chunks []byte
	ids    []byte
}

// compare has the contents of an existing file compared where that is needed.
func (p *planner) compare(i uint32, n *backup.Node, st *unix.Stat_t, fd int) error {
	e := &p.entries[i]
	if p.err != nil || e.kind != kFile || e.flags&fHashed == 0 || len(n.Content) == 0 || st.Size == 0 {
		return p.err
	}
	file, err := openat(fd, n.Name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err == unix.EPERM {
		file, err = openat(fd, n.Name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil // not readable: nothing can be kept, all is fetched
	}
	rec := p.arena.record(e.rec)
	select {
	case p.hashes <- hashJob{file, st.Size, rec.chunks, rec.ids}:
		return nil
	case <-p.ctx.Done():
		unix.Close(file)
		return p.ctx.Err()
	}
}

// hash compares files until there are no more.
func (p *planner) hash() error {
	var buf []byte
	for job := range p.hashes {
		pos := int64(0)
		for c := range job.chunks {
			if p.ctx.Err() != nil {
				break
			}
			id := backup.ID(job.ids[c*backup.IDSize:])
			length, ok := p.r.Index().PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
			if !ok || pos+int64(length) > job.size {
				break
			}
			if cap(buf) < int(length) {
				buf = make([]byte, length)
			}
			if preadFull(job.fd, buf[:length], pos) == nil && backup.Hash(buf[:length]) == id {
				job.chunks[c] = chunkKept
			}
			pos += int64(length)
		}
		unix.Close(job.fd)
	}
	return p.ctx.Err()
}

// finish turns comparisons into actions and finds the packs of what is needed.
func (p *planner) finish() error {
	p.todo, p.links = nil, nil
	packs := map[backup.ID]uint32{}
	for i := range p.entries {
		e, n := &p.entries[i], uint32(i)
		if e.kind == kDir {
			continue
		}
		var rec record
		if e.kind == kFile && e.flags&fLink == 0 {
			rec = p.arena.record(e.rec)
		}
		if e.flags&fHashed != 0 && e.flags&fLink == 0 {
			same := e.flags&fSameSize != 0
			for _, c := range rec.chunks {
				same = same && c == chunkKept
			}
			e.action = e.verdict(same)
		}
		if e.flags&fLink != 0 {
			e.action = Create
			if e.flags&fExists != 0 {
				e.action = Replace
			}
			if first := p.entries[p.primary[n]]; e.flags&fTrusted != 0 && (first.action == Keep || first.action == Metadata) {
				e.action = Keep
			}
		}
		if e.action != Keep {
			p.need(n)
		}
		if e.action == Create || e.action == Replace {
			p.entries[e.parent].flags |= fTouched
		}
		if e.kind != kFile || e.flags&fLink != 0 || e.action != Create && e.action != Replace {
			continue
		}
		p.counts.WriteBytes += rec.Size
		pos := uint64(0)
		for c, state := range rec.chunks {
			b := backup.Blob{Kind: backup.DataBlob, ID: rec.id(c)}
			length, ok := p.r.Index().PlainLength(b)
			if !ok {
				return fmt.Errorf("%s: %w", b, repo.ErrNoBlob) // it was there a moment ago
			}
			if state == chunkKept {
				p.counts.ReuseBytes += uint64(length)
				pos += uint64(length)
				continue
			}
			for loc := range p.r.Index().Lookup(b) {
				pack, ok := packs[loc.Pack]
				if !ok {
					pack = uint32(len(p.packs))
					packs[loc.Pack] = pack
					p.packs = append(p.packs, loc.Pack)
				}
				p.refs = append(p.refs, ref{pack, loc.Offset, n, uint32(c), pos})
				break
			}
			pos += uint64(length)
		}
	}
	slices.SortFunc(p.refs, func(a, b ref) int {
		return cmp.Or(cmp.Compare(a.pack, b.pack), cmp.Compare(a.offset, b.offset), cmp.Compare(a.entry, b.entry), cmp.Compare(a.chunk, b.chunk))
	})
	for i, f := range p.refs {
		if i > 0 && f.pack == p.refs[i-1].pack && f.offset == p.refs[i-1].offset {
			continue
		}
		p.counts.FetchBlobs++
		p.counts.FetchBytes += uint64(p.location(f).Length)
	}
	p.count()
	return nil
}

// location returns where the blob of a ref is.
func (p *Plan) location(f ref) repo.PackedBlob {
	rec := p.arena.record(p.entries[f.entry].rec)
	for loc := range p.r.Index().Lookup(backup.Blob{Kind: backup.DataBlob, ID: rec.id(int(f.chunk))}) {
		if loc.Pack == p.packs[f.pack] && loc.Offset == f.offset {
			return loc.PackedBlob
		}
	}
	panic("the index has lost a blob")
}

// count sums up the entries.
func (p *planner) count() {
	for i := range p.entries {
		e := &p.entries[i]
		switch {
		case e.kind == kDir && e.flags&fNeeded == 0 && e.action != Keep:
			continue // on the way to nothing
		case e.action == Create:
			p.counts.Created++
		case e.action == Replace:
			p.counts.Changed++
		case e.action == Metadata:
			p.counts.Metadata++
		case e.flags&fSelected == 0:
		case e.flags&fKept != 0:
			p.counts.Kept++
		default:
			p.counts.Unchanged++
		}
	}
	p.counts.Deleted = len(p.gone)
}

// Counts sums the plan up.
func (p *Plan) Counts() Counts { return p.counts }

// Failures returns what can't be restored as is known already, or nil.
func (p *Plan) Failures() *PartialError {
	if p.failures.Count == 0 {
		return nil
	}
	return &PartialError{p.failures.Count, slices.Clone(p.failures.Failures)}
}

// Changes yields what will happen to each entry that does not stay as it is:
// folders before what is in them, deletions last.
func (p *Plan) Changes() iter.Seq[Change] {
	return func(yield func(Change) bool) {
		dir, parent := ".", uint32(none)
		for i := range p.entries {
			e, n := &p.entries[i], uint32(i)
			if e.action == Keep || e.kind == kDir && e.flags&fNeeded == 0 {
				continue
			}
			path := "."
			if n > 0 {
				if e.parent != parent {
					dir, parent = p.path(e.parent), e.parent
				}
				path = join(dir, p.arena.name(e.rec))
			}
			c := Change{Path: path, Type: kinds[e.kind], Action: e.action}
			if e.kind == kFile {
				rec := p.arena.record(e.rec)
				c.Size = rec.Size
			}
			if !yield(c) {
				return
			}
		}
		for _, d := range p.gone {
			c := Change{Path: p.pathAt(d.path), Type: backup.File, Action: Delete}
			if d.isDir {
				c.Type = backup.Dir
			}
			if !yield(c) {
				return
			}
		}
	}
}

// Overwritten yields the path of everything in the target that will be
// replaced, deleted or given other metadata, each once: what a snapshot must
// hold from which the restore can be undone.
func (p *Plan) Overwritten() iter.Seq[string] {
	return func(yield func(string) bool) {
		for c := range p.Changes() {
			if c.Action != Create && !yield(c.Path) {
				return
			}
		}
	}
}

// packRange returns the end of the refs from lo on that are read in one go:
// those of one pack within window bytes, at least those of one blob.
func (p *Plan) packRange(lo int, window uint32) int {
	first := p.refs[lo]
	n := sort.Search(len(p.refs)-lo, func(i int) bool {
		f := p.refs[lo+i]
		return f.pack != first.pack || f.offset != first.offset && f.offset-first.offset >= window
	})
	return lo + n
}
