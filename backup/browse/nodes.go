package browse

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	iofs "io/fs"
	"math"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// An inodeNumber is derived from what it stands for, so that it is the same in
// every mount. It is never one that go-fuse gives out itself.
func inodeNumber(kind string, parts ...[]byte) uint64 {
	h := sha256.New()
	io.WriteString(h, kind) // never fails
	for _, p := range parts {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	return binary.LittleEndian.Uint64(h.Sum(nil))&(1<<62-1) | 1<<62
}

func shelfInode(path []string) uint64 {
	return inodeNumber("shelf", []byte(strings.Join(path, "/")))
}

// A shelfNode is a folder above the snapshots. What is in it is looked up in the
// current list.
type shelfNode struct {
	fs.Inode
	m    *mounted
	path []string
}

var (
	_ fs.NodeLookuper  = (*shelfNode)(nil)
	_ fs.NodeReaddirer = (*shelfNode)(nil)
	_ fs.NodeGetattrer = (*shelfNode)(nil)
	_ fs.NodeStatfser  = (*shelfNode)(nil)

	_ fs.NodeReadlinker = (*linkNode)(nil)
	_ fs.NodeGetattrer  = (*linkNode)(nil)

	_ fs.NodeLookuper    = (*treeNode)(nil)
	_ fs.NodeReaddirer   = (*treeNode)(nil)
	_ fs.NodeGetattrer   = (*treeNode)(nil)
	_ fs.NodeReadlinker  = (*treeNode)(nil)
	_ fs.NodeOpener      = (*treeNode)(nil)
	_ fs.NodeReader      = (*treeNode)(nil)
	_ fs.NodeLseeker     = (*treeNode)(nil)
	_ fs.NodeGetxattrer  = (*treeNode)(nil)
	_ fs.NodeListxattrer = (*treeNode)(nil)
	_ fs.NodeStatfser    = (*treeNode)(nil)
)

func (n *shelfNode) shelf(ctx context.Context) (*shelf, syscall.Errno) {
	ctx, done := n.m.with(ctx)
	defer done()
	root, err := n.m.shelves(ctx)
	if err != nil {
		return nil, n.m.errno("list snapshots", err)
	}
	s := root.find(n.path)
	if s == nil || s.entries == nil {
		return nil, syscall.ENOENT
	}
	return s, 0
}

func (n *shelfNode) child(name string) []string {
	return append(n.path[:len(n.path):len(n.path)], name)
}

func (n *shelfNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	here, errno := n.shelf(ctx)
	if errno != 0 {
		return nil, errno
	}
	s := here.entries[name]
	if s == nil {
		return nil, syscall.ENOENT
	}
	out.SetEntryTimeout(shelfTimeout)
	out.SetAttrTimeout(shelfTimeout)
	path := n.child(name)
	switch {
	case s.snapshot != nil:
		node, err := n.m.top(ctx, s.snapshot)
		if err != nil {
			return nil, n.m.errno("open snapshot "+s.snapshot.ID.Short(), err)
		}
		t := &treeNode{m: n.m, snapshot: s.snapshot.ID, path: s.snapshot.ID[:], node: node}
		t.attr(&out.Attr)
		return n.NewInode(ctx, t, fs.StableAttr{Mode: syscall.S_IFDIR, Ino: inodeNumber("snapshot", s.snapshot.ID[:])}), 0
	case s.target != "":
		l := &linkNode{shelf: s}
		l.attr(&out.Attr)
		return n.NewInode(ctx, l, fs.StableAttr{Mode: syscall.S_IFLNK, Ino: inodeNumber("link", []byte(strings.Join(path, "/")), []byte(s.target))}), 0
	}
	shelfAttr(s, &out.Attr)
	return n.NewInode(ctx, &shelfNode{m: n.m, path: path}, fs.StableAttr{Mode: syscall.S_IFDIR, Ino: shelfInode(path)}), 0
}

func (n *shelfNode) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	here, errno := n.shelf(ctx)
	if errno != 0 {
		return nil, errno
	}
	var list []fuse.DirEntry
	for _, name := range here.names() {
		s, path := here.entries[name], n.child(name)
		e := fuse.DirEntry{Name: name, Mode: syscall.S_IFDIR, Ino: shelfInode(path)}
		switch {
		case s.snapshot != nil:
			e.Ino = inodeNumber("snapshot", s.snapshot.ID[:])
		case s.target != "":
			e.Mode, e.Ino = syscall.S_IFLNK, inodeNumber("link", []byte(strings.Join(path, "/")), []byte(s.target))
		}
		list = append(list, e)
	}
	return fs.NewListDirStream(list), 0
}

func (n *shelfNode) Getattr(ctx context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	s, errno := n.shelf(ctx)
	if errno == 0 {
		shelfAttr(s, &out.Attr)
	}
	return errno
}

func shelfAttr(s *shelf, out *fuse.Attr) {
	out.Mode = syscall.S_IFDIR | 0o555
	out.Nlink = 1
	out.SetTimes(&s.time, &s.time, &s.time)
}

func (n *shelfNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	return n.m.statfs(out)
}

func (m *mounted) statfs(out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, backup.MaxNameLen
	out.Blocks = m.v.storedBytes() / 4096
	return 0
}

// A linkNode is one of our own links.
type linkNode struct {
	fs.Inode
	shelf *shelf
}

func (n *linkNode) Readlink(context.Context) ([]byte, syscall.Errno) {
	return []byte(n.shelf.target), 0
}

func (n *linkNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.attr(&out.Attr)
	return 0
}

func (n *linkNode) attr(out *fuse.Attr) {
	out.Mode, out.Nlink, out.Size = syscall.S_IFLNK|0o777, 1, uint64(len(n.shelf.target))
	out.SetTimes(&n.shelf.time, &n.shelf.time, &n.shelf.time)
}

// top returns the folder of a snapshot's volume, or its root where it has
// several folders or none.
func (m *mounted) top(ctx context.Context, s *backup.Snapshot) (*backup.Node, error) {
	ctx, done := m.with(ctx)
	defer done()
	if len(s.Paths) == 1 {
		n, err := m.v.lookup(ctx, *s.Tree, clean(s.Paths[0]))
		switch {
		case err == nil && n.Type == backup.Dir:
			kept := *n
			return &kept, nil
		case err != nil && !errors.Is(err, iofs.ErrNotExist) && !errors.Is(err, ErrNotFolder):
			return nil, err
		}
	}
	return rootNode(*s.Tree), nil
}

// A treeNode is something in a snapshot.
type treeNode struct {
	fs.Inode
	m        *mounted
	snapshot backup.ID
	// path stands for the place in the snapshot: a hash of the folder's and
	// the name. Of the topmost folder it is the snapshot's ID.
	path []byte
	// depth is how many folders deep it is.
	depth int
	node  *backup.Node // a copy, so that it does not keep its whole folder
}

// place returns what path is for an entry, and its inode number: names of one
// file have the same.
func (n *treeNode) place(e *backup.Node) ([]byte, uint64) {
	h := sha256.New()
	h.Write(n.path)
	io.WriteString(h, e.Name) // never fails
	path := h.Sum(nil)
	if e.Type == backup.File && e.Links > 1 && e.Inode != 0 {
		// With the contents, so that a tree that lies about links does
		// not show one file's for another's.
		var k [16]byte
		binary.LittleEndian.PutUint64(k[:], e.DeviceID)
		binary.LittleEndian.PutUint64(k[8:], e.Inode)
		c := sha256.New()
		for i := range e.Content {
			c.Write(e.Content[i][:])
		}
		return path, inodeNumber("links", n.snapshot[:], k[:], c.Sum(nil))
	}
	return path, inodeNumber("node", path)
}

func (n *treeNode) tree(ctx context.Context) (*backup.Tree, syscall.Errno) {
	if n.node.Type != backup.Dir {
		return nil, syscall.ENOTDIR
	}
	if n.depth > maxDepth {
		return nil, syscall.ENAMETOOLONG
	}
	ctx, done := n.m.with(ctx)
	defer done()
	t, err := n.m.v.tree(ctx, n.node.Subtree)
	return t, n.m.errno("list a folder of snapshot "+n.snapshot.Short(), err)
}

func (n *treeNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	t, errno := n.tree(ctx)
	if errno != 0 {
		return nil, errno
	}
	e := child(t, name)
	if e == nil {
		return nil, syscall.ENOENT
	}
	path, ino := n.place(e)
	kept := *e
	c := &treeNode{m: n.m, snapshot: n.snapshot, path: path, depth: n.depth + 1, node: &kept}
	c.attr(&out.Attr)
	out.SetEntryTimeout(fixedTimeout)
	out.SetAttrTimeout(fixedTimeout)
	return n.NewInode(ctx, c, fs.StableAttr{Mode: fileType(e.Type), Ino: ino}), 0
}

func (n *treeNode) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	t, errno := n.tree(ctx)
	if errno != 0 {
		return nil, errno
	}
	list := make([]fuse.DirEntry, len(t.Nodes))
	for i := range t.Nodes {
		e := &t.Nodes[i]
		_, ino := n.place(e)
		list[i] = fuse.DirEntry{Name: e.Name, Mode: fileType(e.Type), Ino: ino}
	}
	return fs.NewListDirStream(list), 0
}

func (n *treeNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.attr(&out.Attr)
	out.SetTimeout(fixedTimeout)
	return 0
}

// fileType returns the type bits of a mode.
func fileType(t backup.NodeType) uint32 {
	switch t {
	case backup.Dir:
		return syscall.S_IFDIR
	case backup.Symlink:
		return syscall.S_IFLNK
	case backup.Device:
		return syscall.S_IFBLK
	case backup.CharDevice:
		return syscall.S_IFCHR
	case backup.FIFO:
		return syscall.S_IFIFO
	case backup.Socket:
		return syscall.S_IFSOCK
	}
	return syscall.S_IFREG
}

func (n *treeNode) attr(out *fuse.Attr) {
	e := n.node
	out.Mode = fileType(e.Type) | uint32(tarMode(e.Mode))
	out.Owner = fuse.Owner{Uid: e.UID, Gid: e.GID}
	out.SetTimes(&e.AccessTime, &e.ModTime, &e.ChangeTime)
	out.Nlink = 1
	out.Blksize = 4096
	switch e.Type {
	case backup.File:
		out.Size = min(e.Size, math.MaxInt64)
		out.Nlink = uint32(min(max(e.Links, 1), math.MaxUint32))
		out.Blocks = (n.m.v.dataBytes(e) + 511) / 512
	case backup.Symlink:
		out.Size = uint64(len(e.LinkTarget))
	case backup.Device, backup.CharDevice:
		out.Rdev = uint32(e.Device)
	}
}

func (n *treeNode) Readlink(context.Context) ([]byte, syscall.Errno) {
	if n.node.Type != backup.Symlink {
		return nil, syscall.EINVAL
	}
	return []byte(n.node.LinkTarget), 0
}

func (n *treeNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&(syscall.O_WRONLY|syscall.O_RDWR|syscall.O_APPEND|syscall.O_TRUNC) != 0 {
		return nil, 0, syscall.EROFS
	}
	f, err := n.m.v.Open(n.node)
	if err != nil {
		return nil, 0, n.m.errno("open a file of snapshot "+n.snapshot.Short(), err)
	}
	return f, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *treeNode) Read(ctx context.Context, handle fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f, ok := handle.(*File)
	if !ok || off < 0 {
		return nil, syscall.EBADF
	}
	ctx, done := n.m.with(ctx)
	defer done()
	got, err := f.ReadAt(ctx, dest, uint64(off))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, n.m.errno("read a file of snapshot "+n.snapshot.Short(), err)
	}
	return fuse.ReadResultData(dest[:got]), 0
}

func (n *treeNode) Lseek(_ context.Context, handle fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	f, ok := handle.(*File)
	if !ok {
		return 0, syscall.EBADF
	}
	var at uint64
	switch whence {
	case unix.SEEK_DATA:
		at, ok = f.Data(off)
	case unix.SEEK_HOLE:
		at, ok = f.Hole(off)
	default:
		return 0, syscall.EINVAL
	}
	if !ok {
		return 0, syscall.ENXIO
	}
	return at, 0
}

func (n *treeNode) Getxattr(_ context.Context, name string, dest []byte) (uint32, syscall.Errno) {
	for _, x := range n.node.Xattrs {
		if x.Name != name {
			continue
		}
		if len(dest) == 0 {
			return uint32(len(x.Value)), 0
		}
		if len(dest) < len(x.Value) {
			return uint32(len(x.Value)), syscall.ERANGE
		}
		return uint32(copy(dest, x.Value)), 0
	}
	return 0, syscall.ENODATA
}

func (n *treeNode) Listxattr(_ context.Context, dest []byte) (uint32, syscall.Errno) {
	var list []byte
	for _, x := range n.node.Xattrs {
		if x.Name != "" && !strings.ContainsRune(x.Name, 0) {
			list = append(append(list, x.Name...), 0)
		}
	}
	if len(dest) > 0 && len(dest) < len(list) {
		return uint32(len(list)), syscall.ERANGE
	}
	copy(dest, list)
	return uint32(len(list)), 0
}

func (n *treeNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	return n.m.statfs(out)
}
