package archiver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// aliveEvery is how often Alive is asked while a volume is read.
const aliveEvery = 2 * time.Second

// A volume is a source that is being read.
type volume struct {
	a           *archive
	ctx         context.Context
	src         *Source
	start       time.Time
	parent      *backup.Snapshot // or nil
	parentStart time.Time        // when the reading for the parent began
	dev         uint64           // of the volume's folder
	emptied     bool

	problems atomic.Int64
	items    atomic.Uint64
	files    [3]atomic.Uint64 // by Change
	dirs     [3]atomic.Uint64
	blobs    [2]atomic.Int64 // by kind
	added    atomic.Uint64
	packed   atomic.Uint64
	bytes    atomic.Uint64

	asked atomic.Int64 // when Alive was last asked, in Unix nanoseconds
	dead  atomic.Pointer[error]

	linked sync.Map // identity -> *backup.Node: contents of files with several links
}

// problem reports that an entry can't be recorded as it is.
func (v *volume) problem(rel string, err error) {
	v.problems.Add(1)
	if v.a.obs.Problem != nil {
		v.a.obs.Problem(v.src.Volume, Problem{rel, err})
	}
}

// alive returns why the source is no longer the right one, if so.
func (v *volume) alive() error {
	if p := v.dead.Load(); p != nil {
		return *p
	}
	if v.src.Alive == nil {
		return nil
	}
	if err := v.src.Alive(); err != nil {
		err = fmt.Errorf("read %s: %w", v.src.Volume.Path, err)
		v.dead.CompareAndSwap(nil, &err)
		return err
	}
	return nil
}

// stopped reports whether to give up the volume, and asks Alive now and then.
func (v *volume) stopped() bool {
	if v.a.failure.Load() != nil || v.dead.Load() != nil {
		return true
	}
	if err := v.ctx.Err(); err != nil {
		v.a.fail(err)
		return true
	}
	if v.src.Alive == nil {
		return false
	}
	now, last := time.Now().UnixNano(), v.asked.Load()
	if now-last > int64(aliveEvery) && v.asked.CompareAndSwap(last, now) {
		return v.alive() != nil
	}
	return false
}

// saveTree stores a folder and counts it.
func (v *volume) saveTree(t *backup.Tree) (backup.ID, error) {
	s, err := v.a.w.SaveTree(v.ctx, t)
	if err != nil {
		return s.ID, err
	}
	if !s.Known {
		v.blobs[backup.TreeBlob].Add(1)
		v.added.Add(uint64(s.Plain))
		v.packed.Add(uint64(s.Stored))
	}
	return s.ID, nil
}

// folder records the volume's folder with the chain of folders above it, and
// returns the root tree.
func (v *volume) folder() (backup.ID, error) {
	path := v.src.Volume.Path
	if err := v.alive(); err != nil {
		return backup.ID{}, err
	}
	fd, err := openPath(path)
	if err != nil {
		return backup.ID{}, fmt.Errorf("read %s: %w", path, err)
	}
	top := &dir{v: v, fd: fd}
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		unix.Close(fd)
		return backup.ID{}, fmt.Errorf("read %s: %w", path, err)
	}
	v.dev = uint64(st.Dev)
	top.dev, top.coarse = v.dev, coarse(fd)
	if v.a.skip[identity{uint64(st.Dev), uint64(st.Ino)}] {
		unix.Close(fd)
		return backup.ID{}, fmt.Errorf("read %s: it is the repository itself; leave it out by volumes.exclude_volumes", path)
	}
	if v.parent != nil {
		top.parent, err = v.descend(*v.parent.Tree, path)
		if err != nil {
			// Without the parent everything is read, which mends what a
			// damaged parent lost.
			top.parent = nil
		}
	}
	var tree backup.ID
	ok := false
	top.done = func(id backup.ID, saved bool) { tree, ok = id, saved }
	hadEntries := top.parent != nil && len(top.parent.Nodes) > 0
	var readErr error
	top.failed = func(err error) { readErr = err }
	top.read()
	v.a.crew.wait()
	if err := v.a.fatal(); err != nil {
		return tree, err
	}
	if err := v.alive(); err != nil {
		return tree, err
	}
	if readErr != nil {
		return tree, fmt.Errorf("read %s: %w", path, readErr)
	}
	if !ok {
		return tree, fmt.Errorf("read %s: it could not be recorded", path)
	}
	v.emptied = hadEntries && len(top.nodes) == 0
	return v.chain(path, tree)
}

// chain wraps a folder's tree into one tree for each folder above it, so that
// the snapshot holds the whole path.
func (v *volume) chain(path string, tree backup.ID) (backup.ID, error) {
	for path != "/" {
		node := backup.Node{Name: filepath.Base(path), Subtree: tree}
		parent := filepath.Dir(path)
		fd, err := openPath(parent)
		if err != nil {
			return tree, fmt.Errorf("read %s: %w", parent, err)
		}
		st, err := lstatAt(fd, node.Name)
		if err == nil {
			v.a.names.fill(&node, &st)
			node.Xattrs, err = v.a.xattrs(fd, node.Name)
		}
		unix.Close(fd)
		if err == nil && node.Type != backup.Dir {
			err = errors.New("it is no folder")
		}
		if err != nil {
			return tree, fmt.Errorf("read %s: %w", path, err)
		}
		if tree, err = v.saveTree(&backup.Tree{Nodes: []backup.Node{node}}); err != nil {
			v.a.fail(err)
			return tree, err
		}
		path = parent
	}
	return tree, nil
}

// openPath opens a folder by its absolute path. The path itself may lead
// through links, which is the configuration's affair, but must not end in one.
func openPath(path string) (int, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return -1, errors.New("the path is not absolute and clean")
	}
	fd, err := openAt(unix.AT_FDCWD, path, unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = fmt.Errorf("it is no folder: %w", err)
	}
	return fd, err
}

// descend returns the tree at path in a snapshot, or nil if there is none.
func (v *volume) descend(root backup.ID, path string) (*backup.Tree, error) {
	t, err := v.a.repo.Tree(v.ctx, root)
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if err != nil || name == "" {
			return t, err
		}
		i, ok := slices.BinarySearchFunc(t.Nodes, name, func(n backup.Node, name string) int { return strings.Compare(n.Name, name) })
		if !ok || t.Nodes[i].Type != backup.Dir {
			return nil, nil
		}
		t, err = v.a.repo.Tree(v.ctx, t.Nodes[i].Subtree)
	}
	return t, err
}

// A dir is a folder that is being read. Its entries are worked on by the crew;
// whoever finishes the last one encodes the folder and reports it to the folder
// above. No goroutine ever waits for another.
type dir struct {
	v      *volume
	fd     int
	rel    string // path below the volume, "" for the volume itself
	dev    uint64
	parent *backup.Tree // the same folder in the parent snapshot, or nil
	coarse bool         // see coarse
	// done is told the tree, and whether there is one, when all is finished.
	done func(id backup.ID, ok bool)
	// failed, if set, is told that the folder itself can't be listed.
	failed func(error)

	nodes   []backup.Node // one for each name, Name empty if left out
	pending atomic.Int64
}

// read lists the folder and hands its entries to the crew. Whatever happens,
// done is called in the end, and fd is closed.
func (d *dir) read() {
	d.pending.Store(1)
	defer d.finishOne()
	if d.v.stopped() {
		return
	}
	names, err := d.list()
	if err != nil {
		if d.failed != nil {
			d.failed(err)
			return
		}
		d.v.problem(d.rel, fmt.Errorf("list the folder: %w", err))
	}
	keep := d.tag(names)
	d.nodes = make([]backup.Node, len(names))
	next := 0 // in the parent, which is sorted as names are
	for i, name := range names {
		if d.v.stopped() {
			return
		}
		var before *backup.Node
		if d.parent != nil {
			for next < len(d.parent.Nodes) && d.parent.Nodes[next].Name < name {
				next++
			}
			if next < len(d.parent.Nodes) && d.parent.Nodes[next].Name == name {
				before = &d.parent.Nodes[next]
			}
		}
		if keep == "" || keep == name {
			d.entry(&d.nodes[i], name, before)
		}
	}
}

// list returns the sorted names of the folder's entries. It reads d.fd itself,
// which nobody else does.
func (d *dir) list() ([]string, error) {
	buf := d.v.a.listing.Get().(*[listSize]byte)
	defer d.v.a.listing.Put(buf)
	var names []string
	for {
		var n int
		err := retry(func() (err error) {
			n, err = unix.ReadDirent(d.fd, buf[:])
			return err
		})
		if n <= 0 || err != nil {
			slices.Sort(names)
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// listSize is how much of a folder is listed by one call.
const listSize = 32 << 10

// join returns the path of an entry below the volume.
func (d *dir) join(name string) string {
	if d.rel == "" {
		return name
	}
	return d.rel + "/" + name
}

// entry records one entry in n, now or soon.
func (d *dir) entry(n *backup.Node, name string, before *backup.Node) {
	rel := d.join(name)
	st, err := lstatAt(d.fd, name)
	if err != nil {
		d.v.problem(rel, vanished(err))
		return
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if d.v.src.Exclude != nil && d.v.src.Exclude(rel, isDir) {
		return
	}
	if err := backup.CheckName(name); err != nil {
		d.v.problem(rel, err)
		return
	}
	d.v.a.names.fill(n, &st)
	switch n.Type {
	case backup.Dir:
		d.folder(n, name, rel, before, &st)
		return
	case backup.File:
		d.file(n, name, rel, before, &st)
		return
	case backup.Symlink:
		if n.LinkTarget, err = readlinkAt(d.fd, name); err != nil {
			d.v.problem(rel, vanished(err))
			return
		}
	case "":
		d.v.problem(rel, fmt.Errorf("it is of the unknown type %#o", st.Mode&unix.S_IFMT))
		return
	}
	d.attributes(n, name, rel)
	n.Name = name
	d.v.item(rel, n, change(before, n))
}

// attributes reads extended attributes; without them the entry is recorded all
// the same.
func (d *dir) attributes(n *backup.Node, name, rel string) {
	var err error
	if n.Xattrs, err = d.v.a.xattrs(d.fd, name); err != nil {
		d.v.problem(rel, fmt.Errorf("read extended attributes: %w", err))
	}
}

// change tells how an entry without contents differs from the parent's.
func change(before, n *backup.Node) Change {
	switch {
	case before == nil || before.Type != n.Type:
		return New
	case before.ModTime.Equal(n.ModTime) && before.LinkTarget == n.LinkTarget && before.Device == n.Device:
		return Unmodified
	}
	return Changed
}

// folder hands a folder to the crew.
func (d *dir) folder(n *backup.Node, name, rel string, before *backup.Node, st *unix.Stat_t) {
	if d.v.a.skip[identity{uint64(st.Dev), uint64(st.Ino)}] {
		return
	}
	sub := &dir{v: d.v, rel: rel, fd: -1, dev: uint64(st.Dev), coarse: d.coarse}
	other := d.v.src.OneFileSystem && uint64(st.Dev) != d.v.dev
	if !other {
		fd, err := openAt(d.fd, name, unix.O_DIRECTORY)
		if err != nil {
			d.v.problem(rel, vanished(err))
			if errors.Is(err, fs.ErrNotExist) {
				return
			}
			other = true // recorded with its metadata, as an empty folder
		} else {
			sub.fd = fd
			if sub.dev != d.dev {
				sub.coarse = coarse(fd)
			}
		}
	}
	d.attributes(n, name, rel)
	d.pending.Add(1)
	sub.done = func(id backup.ID, ok bool) {
		if ok {
			n.Name, n.Subtree = name, id
			c := New
			if before != nil && before.Type == backup.Dir {
				if c = Changed; before.Subtree == id {
					c = Unmodified
				}
			}
			d.v.dirs[c].Add(1)
			d.v.items.Add(1)
			if d.v.a.obs.Item != nil {
				d.v.a.obs.Item(d.v.src.Volume, rel, c, 0)
			}
		}
		d.finishOne()
	}
	if other {
		sub.pending.Store(1)
		sub.finishOne()
		return
	}
	d.v.a.crew.do(func() {
		if before != nil && before.Type == backup.Dir {
			// Without the parent's tree everything below is read again.
			sub.parent, _ = d.v.a.repo.Tree(d.v.ctx, before.Subtree)
		}
		sub.read()
	})
}

// finishOne notes that one entry, or the listing, is done. After the last it
// stores the folder.
func (d *dir) finishOne() {
	if d.pending.Add(-1) > 0 {
		return
	}
	if d.fd >= 0 {
		unix.Close(d.fd)
	}
	d.parent = nil
	if d.v.stopped() {
		d.done(backup.ID{}, false)
		return
	}
	d.nodes = slices.DeleteFunc(d.nodes, func(n backup.Node) bool { return n.Name == "" })
	id, err := d.v.saveTree(&backup.Tree{Nodes: d.nodes})
	if err != nil {
		d.v.a.fail(err)
	}
	d.done(id, err == nil)
}

// item counts and reports an entry that is not a folder.
func (v *volume) item(rel string, n *backup.Node, c Change) {
	v.items.Add(1)
	if n.Type == backup.File {
		v.files[c].Add(1)
		v.bytes.Add(n.Size)
	}
	if v.a.obs.Item != nil {
		v.a.obs.Item(v.src.Volume, rel, c, n.Size)
	}
}

// cacheTag is what a CACHEDIR.TAG begins with.
const (
	cacheFile = "CACHEDIR.TAG"
	cacheTag  = "Signature: 8a477f597d28d172789f06886806bc55"
)

// tag returns the name of the file by which the folder asks to be left out, and
// which alone is recorded then, or "".
func (d *dir) tag(names []string) string {
	for _, name := range d.v.src.ExcludeIfPresent {
		if _, ok := slices.BinarySearch(names, name); ok {
			return name
		}
	}
	if !d.v.src.ExcludeCaches {
		return ""
	}
	if _, ok := slices.BinarySearch(names, cacheFile); !ok {
		return ""
	}
	fd, err := openAt(d.fd, cacheFile, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var head [len(cacheTag)]byte
	n := 0
	err = retry(func() (err error) {
		n, err = unix.Pread(fd, head[:], 0)
		return err
	})
	if err != nil || string(head[:max(n, 0)]) != cacheTag {
		return ""
	}
	return cacheFile
}

// vanished says in words what happened to an entry that was listed but is not
// there.
func vanished(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it vanished while the folder was read: %w", err)
	}
	return err
}
