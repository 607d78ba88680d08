package archiver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/chunk"
)

// tries is how often a file that changes while it is read is read in all.
const tries = 3

// Granularity of modification times: what was written so shortly before the
// parent snapshot began may have been written again after it was read, with
// the same time.
const (
	fineTime   = 20 * time.Millisecond
	coarseTime = 2 * time.Second // FAT
)

// file records a regular file in n, now or soon.
func (d *dir) file(n *backup.Node, name, rel string, before *backup.Node, st *unix.Stat_t) {
	if limit := d.v.src.LargerThan; limit > 0 && st.Size > limit {
		return
	}
	if d.unchanged(before, n) {
		d.attributes(n, name, rel)
		n.Content, n.Name = before.Content, name
		d.v.item(rel, n, Unmodified)
		return
	}
	d.pending.Add(1)
	d.v.a.crew.do(func() {
		f := &file{d: d, n: n, name: name, rel: rel, before: before}
		f.read()
	})
}

// unchanged reports whether a file is as the parent snapshot has it, and its
// contents are still in the repository.
func (d *dir) unchanged(before, n *backup.Node) bool {
	if before == nil || before.Type != backup.File || before.Size != n.Size || !before.ModTime.Equal(n.ModTime) || before.Error != "" {
		return false
	}
	grain := coarseTime
	if !d.coarse {
		grain = fineTime
		if before.Inode != n.Inode || !before.ChangeTime.Equal(n.ChangeTime) {
			return false
		}
	}
	if n.ModTime.After(d.v.parentStart.Add(-grain)) {
		return false
	}
	idx, total := d.v.a.repo.Index(), uint64(0)
	for _, id := range before.Content {
		size, ok := idx.PlainLength(backup.Blob{Kind: backup.DataBlob, ID: id})
		if !ok {
			return false
		}
		total += uint64(size)
	}
	return total == n.Size
}

// A file is a regular file that is being read. Its chunks are worked on by the
// crew; whoever finishes the last one reports the file to its folder.
type file struct {
	d      *dir
	n      *backup.Node
	name   string
	rel    string
	before *backup.Node
}

// read reads the file until it has held still, and reports it.
func (f *file) read() {
	defer f.d.finishOne()
	v := f.d.v
	for try := 1; ; try++ {
		if v.stopped() {
			return
		}
		err := f.once()
		if v.stopped() {
			return
		}
		if errors.Is(err, ErrChanging) {
			if try < tries {
				continue
			}
			v.problem(f.rel, err) // recorded all the same: better than nothing
		} else if err != nil {
			v.problem(f.rel, vanished(err))
			return
		}
		break
	}
	f.n.Name = f.name
	c := New
	if f.before != nil && f.before.Type == backup.File {
		if c = Changed; sameContent(f.before, f.n) {
			c = Unmodified
		}
	}
	v.item(f.rel, f.n, c)
}

func sameContent(a, b *backup.Node) bool {
	if len(a.Content) != len(b.Content) || a.Size != b.Size {
		return false
	}
	for i := range a.Content {
		if a.Content[i] != b.Content[i] {
			return false
		}
	}
	return true
}

// once reads the file one time. ErrChanging says that it changed meanwhile.
func (f *file) once() error {
	v := f.d.v
	fd, err := openAt(f.d.fd, f.name, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("it became something else while the folder was read")
	}
	v.a.names.fill(f.n, &st)
	if f.n.Xattrs, err = v.a.fileXattrs(fd); err != nil {
		return fmt.Errorf("read extended attributes: %w", err)
	}
	id := identity{uint64(st.Dev), uint64(st.Ino)}
	if st.Nlink > 1 {
		if twin, ok := v.linked.Load(id); ok {
			t := twin.(*backup.Node)
			if t.Size == f.n.Size && t.ModTime.Equal(f.n.ModTime) && t.ChangeTime.Equal(f.n.ChangeTime) {
				f.n.Content = t.Content
				return nil
			}
		}
	}
	size, err := f.contents(fd, st.Size)
	if err != nil {
		return err
	}
	var after unix.Stat_t
	if err := retry(func() error { return unix.Fstat(fd, &after) }); err != nil {
		return err
	}
	f.n.Size = uint64(size)
	if after.Size != st.Size || after.Mtim != st.Mtim || size != st.Size {
		return ErrChanging
	}
	if st.Nlink > 1 {
		v.linked.Store(id, &backup.Node{Size: f.n.Size, ModTime: f.n.ModTime, ChangeTime: f.n.ChangeTime, Content: f.n.Content})
	}
	return nil
}

// contents stores what fd holds and returns how many bytes that is.
func (f *file) contents(fd int, size int64) (int64, error) {
	in := &input{fd: fd, v: f.d.v}
	if size >= chunk.MinSize {
		var err error
		f.n.Content, err = f.d.v.chunks(in)
		return in.n, err
	}
	// A file below the least chunk size is one blob, or none if empty.
	v := f.d.v
	buf := v.a.small.get()
	defer func() { v.a.small.put(buf) }()
	for int64(len(buf)) <= size {
		n, err := in.Read(buf[len(buf) : size+1])
		buf = buf[:len(buf)+n]
		if errors.Is(err, io.EOF) || err == nil && int64(len(buf)) == size {
			break // less than was asked for: the end of a regular file
		}
		if err != nil {
			return in.n, err
		}
	}
	f.n.Content = []backup.ID{}
	if int64(len(buf)) > size {
		return in.n, ErrChanging // it grew
	}
	if len(buf) == 0 {
		return 0, nil
	}
	id, err := v.saveData(buf)
	f.n.Content = []backup.ID{id}
	return in.n, err
}

// saveData stores a data blob and counts it. An error ends the run.
func (v *volume) saveData(plain []byte) (backup.ID, error) {
	s, err := v.a.w.Save(v.ctx, backup.DataBlob, plain)
	if err != nil {
		v.a.fail(err)
		return s.ID, err
	}
	if !s.Known {
		v.blobs[backup.DataBlob].Add(1)
		v.added.Add(uint64(len(plain)))
		v.packed.Add(uint64(s.Stored))
	}
	return s.ID, nil
}

// chunks stores an input chunk by chunk; the crew works on them side by side.
func (v *volume) chunks(in io.Reader) ([]backup.ID, error) {
	var ids []*backup.ID
	var wg sync.WaitGroup
	var readErr error
	r := chunk.New(in, v.a.tables)
	for !v.stopped() {
		data, err := r.Next(v.a.large.get())
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			readErr = err
			break
		}
		id := new(backup.ID)
		ids = append(ids, id)
		wg.Add(1)
		v.a.crew.do(func() {
			defer wg.Done()
			*id, _ = v.saveData(data) // fail has noted the error
			v.a.large.put(data)
		})
	}
	wg.Wait()
	if err := v.a.fatal(); err != nil {
		return nil, err
	}
	out := make([]backup.ID, len(ids))
	for i, id := range ids {
		out[i] = *id
	}
	return out, readErr
}

// An input reads a file that is open, without a poller or a finalizer.
type input struct {
	fd int
	v  *volume
	n  int64
}

// Read implements io.Reader.
func (in *input) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	var n int
	err := retry(func() (err error) {
		n, err = unix.Read(in.fd, p)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read at byte %d: %w", in.n, err)
	}
	if n == 0 {
		return 0, io.EOF
	}
	in.n += int64(n)
	if read := in.v.a.obs.Read; read != nil {
		read(in.v.src.Volume, n)
	}
	return n, nil
}

// stream records Stream as the file that the volume's path names, and returns
// the root tree.
func (v *volume) stream() (backup.ID, error) {
	path := v.src.Volume.Path
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return backup.ID{}, fmt.Errorf("record %s: the path is not absolute and clean", path)
	}
	in := &counter{ctx: v.ctx, r: v.src.Stream, v: v}
	content, err := v.chunks(in)
	if err != nil {
		return backup.ID{}, fmt.Errorf("record %s: %w", path, err)
	}
	now := time.Now()
	n := backup.Node{
		Name: filepath.Base(path), Type: backup.File, Mode: 0o644, ModTime: now, AccessTime: now, ChangeTime: now,
		Size: in.n, Content: content,
	}
	v.item("", &n, New)
	tree, err := v.saveTree(&backup.Tree{Nodes: []backup.Node{n}})
	for dir := filepath.Dir(path); err == nil && dir != "/"; dir = filepath.Dir(dir) {
		tree, err = v.saveTree(&backup.Tree{Nodes: []backup.Node{{
			Name: filepath.Base(dir), Type: backup.Dir, Mode: 0o755 | fs.ModeDir, ModTime: now, AccessTime: now, ChangeTime: now, Subtree: tree,
		}}})
	}
	if err != nil {
		v.a.fail(err)
	}
	return tree, err
}

// A counter reads a stream.
type counter struct {
	ctx context.Context
	r   io.Reader
	v   *volume
	n   uint64
}

// Read implements io.Reader.
func (c *counter) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n += uint64(max(n, 0))
	if read := c.v.a.obs.Read; read != nil && n > 0 {
		read(c.v.src.Volume, n)
	}
	return n, err
}
