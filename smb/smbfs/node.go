package smbfs

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/iot49/ide49-backup/smb"
)

// deletedPrefix begins the names of files that were removed or replaced while
// a program here had them open. They are not shown, and go when the last
// program closes them.
const deletedPrefix = ".ide49-deleted-"

// A node is a file or folder. Its methods are called by go-fuse, whose
// contexts end when a signal interrupts the program that waits. We don't obey:
// programs don't expect that a signal fails their file operations, and no
// operation takes longer than the client's time-outs.
type node struct {
	gofs.Inode
	m *Mount

	// Where it is; guarded by m.tree. The root has no parent.
	parent  *node
	name    string
	deleted bool // has no name any more, but a hidden one

	// link is the target of a symbolic link; it never changes.
	link string

	mu      sync.RWMutex
	listing map[string]smb.Info // of a folder, by name
	listed  time.Time
	file    openFile
}

var (
	_ gofs.NodeLookuper   = (*node)(nil)
	_ gofs.NodeGetattrer  = (*node)(nil)
	_ gofs.NodeSetattrer  = (*node)(nil)
	_ gofs.NodeReaddirer  = (*node)(nil)
	_ gofs.NodeMkdirer    = (*node)(nil)
	_ gofs.NodeRmdirer    = (*node)(nil)
	_ gofs.NodeUnlinker   = (*node)(nil)
	_ gofs.NodeRenamer    = (*node)(nil)
	_ gofs.NodeCreater    = (*node)(nil)
	_ gofs.NodeOpener     = (*node)(nil)
	_ gofs.NodeReader     = (*node)(nil)
	_ gofs.NodeWriter     = (*node)(nil)
	_ gofs.NodeFlusher    = (*node)(nil)
	_ gofs.NodeFsyncer    = (*node)(nil)
	_ gofs.NodeReleaser   = (*node)(nil)
	_ gofs.NodeAllocater  = (*node)(nil)
	_ gofs.NodeSymlinker  = (*node)(nil)
	_ gofs.NodeReadlinker = (*node)(nil)
	_ gofs.NodeLinker     = (*node)(nil)
	_ gofs.NodeMknoder    = (*node)(nil)
	_ gofs.NodeStatfser   = (*node)(nil)
)

// path returns where the node is on the share. m.tree is held.
func (n *node) path() string {
	if n.parent == nil {
		return n.m.dir
	}
	return path.Join(n.parent.path(), n.name)
}

// below reports whether the node is at or below another. m.tree is held.
func (n *node) below(top *node) bool {
	for ; n != nil; n = n.parent {
		if n == top {
			return true
		}
	}
	return false
}

// child returns the known node of a name, or nil.
func (n *node) child(name string) *node {
	if ch := n.GetChild(name); ch != nil {
		c, _ := ch.Operations().(*node)
		return c
	}
	return nil
}

func checkName(name string) syscall.Errno {
	if len(name) > 255 {
		return syscall.ENAMETOOLONG
	}
	if strings.HasPrefix(name, deletedPrefix) {
		return syscall.EINVAL
	}
	return 0
}

// forgetName drops what the listing says about a name.
func (n *node) forgetName(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.listing, name)
}

// fill writes attributes for the kernel. The node may be nil when it isn't
// made yet.
func (m *Mount) fill(out *fuse.Attr, info smb.Info, link string) {
	mode := uint32(m.opt.FileMode.Perm()) | syscall.S_IFREG
	out.Nlink = 1
	out.Size = uint64(info.Size)
	switch {
	case info.Dir:
		mode = uint32(m.opt.DirMode.Perm()) | syscall.S_IFDIR
		out.Nlink = 2
	case link != "":
		mode = 0o777 | syscall.S_IFLNK
		out.Size = uint64(len(link))
	case info.ReadOnly:
		mode &^= 0o222
	}
	out.Mode = mode
	out.Blocks = (uint64(info.Allocated) + 511) / 512
	out.Blksize = 128 << 10
	out.Uid, out.Gid = m.opt.Owner, m.opt.Group
	out.SetTimes(&info.Accessed, &info.Modified, &info.Changed)
}

// enter returns the inode for a name, which is the one that the kernel knows
// already if it is still the same kind of thing.
func (n *node) enter(ctx context.Context, name string, info smb.Info, link string, out *fuse.EntryOut) *gofs.Inode {
	n.m.fill(&out.Attr, info, link)
	kind := out.Attr.Mode & syscall.S_IFMT
	if c := n.child(name); c != nil && c.parent == n && c.name == name && c.StableAttr().Mode == kind && c.link == link {
		if kind == syscall.S_IFREG {
			c.mu.RLock()
			out.Attr.Size = max(out.Attr.Size, uint64(c.file.end()))
			c.mu.RUnlock()
		}
		return c.EmbeddedInode()
	}
	return n.NewInode(ctx, &node{m: n.m, parent: n, name: name, link: link}, gofs.StableAttr{Mode: kind})
}

// stat describes a name of a folder, from a fresh listing or from the server.
func (n *node) stat(name string) (smb.Info, string, error) {
	n.mu.RLock()
	info, ok := n.listing[name]
	fresh := time.Since(n.listed) < n.m.opt.Cache
	n.mu.RUnlock()
	p := path.Join(n.path(), name)
	var err error
	if !ok || !fresh {
		if info, err = n.m.sh.Stat(n.m.ctx, p); err != nil {
			return info, "", err
		}
	}
	to, _, err := n.m.readLink(p, info)
	return info, to, err
}

// Lookup implements fs.NodeLookuper.
func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*gofs.Inode, syscall.Errno) {
	if no := checkName(name); no != 0 {
		if no == syscall.EINVAL {
			no = syscall.ENOENT
		}
		return nil, no
	}
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	info, link, err := n.stat(name)
	if err != nil {
		return nil, errno(err)
	}
	return n.enter(ctx, name, info, link, out), 0
}

// Readdir implements fs.NodeReaddirer. The listing also answers the lookups
// that follow.
func (n *node) Readdir(ctx context.Context) (gofs.DirStream, syscall.Errno) {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	p := n.path()
	infos, err := n.m.sh.ReadDir(n.m.ctx, p)
	if err != nil {
		return nil, errno(err)
	}
	listing := make(map[string]smb.Info, len(infos))
	entries := make([]fuse.DirEntry, 0, len(infos))
	for _, i := range infos {
		if strings.HasPrefix(i.Name, deletedPrefix) {
			continue
		}
		e := fuse.DirEntry{Name: i.Name, Mode: syscall.S_IFREG}
		if i.Dir {
			e.Mode = syscall.S_IFDIR
		} else if _, ok, err := n.m.readLink(path.Join(p, i.Name), i); ok && err == nil {
			e.Mode = syscall.S_IFLNK
		}
		listing[i.Name] = i
		entries = append(entries, e)
	}
	n.mu.Lock()
	n.listing, n.listed = listing, time.Now()
	n.mu.Unlock()
	return gofs.NewListDirStream(entries), 0
}

// Getattr implements fs.NodeGetattrer.
func (n *node) Getattr(ctx context.Context, _ gofs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	return errno(n.getattr(&out.Attr))
}

func (n *node) getattr(out *fuse.Attr) error {
	var info smb.Info
	var err error
	if n.deleted {
		n.mu.Lock()
		if n.file.handles == 0 {
			n.mu.Unlock()
			return fs.ErrNotExist
		}
		err = n.use(false, func(f *smb.File) (err error) {
			info, err = f.Stat(n.m.ctx)
			return err
		})
		n.mu.Unlock()
	} else if n.parent != nil && n.parent.fresh(n.name, &info) {
		// from the listing
	} else {
		info, err = n.m.sh.Stat(n.m.ctx, n.path())
	}
	if err != nil {
		return err
	}
	if info.Dir != (n.StableAttr().Mode == syscall.S_IFDIR) {
		return fs.ErrNotExist // another client put something else there
	}
	n.m.fill(out, info, n.link)
	if n.deleted {
		out.Nlink = 0
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	out.Size = max(out.Size, uint64(n.file.end()))
	return nil
}

// fresh answers from a listing that is new enough.
func (n *node) fresh(name string, info *smb.Info) bool {
	n.mu.RLock()
	defer n.mu.RUnlock()
	i, ok := n.listing[name]
	if ok = ok && time.Since(n.listed) < n.m.opt.Cache; ok {
		*info = i
	}
	return ok
}

// Setattr implements fs.NodeSetattrer.
func (n *node) Setattr(ctx context.Context, _ gofs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	if uid, ok := in.GetUID(); ok && uid != n.m.opt.Owner {
		return syscall.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != n.m.opt.Group {
		return syscall.EPERM
	}
	if n.parent != nil {
		n.parent.forgetName(n.name)
	}
	if size, ok := in.GetSize(); ok {
		n.mu.Lock()
		err := n.truncate(int64(size))
		n.mu.Unlock()
		if err != nil {
			return errno(err)
		}
	}
	mtime, setM := in.GetMTime()
	atime, setA := in.GetATime()
	mode, setMode := in.GetMode()
	if setM || setA || setMode {
		// Closing a file that was written to sets its time: it is closed
		// before, and opened again when it is used.
		n.mu.Lock()
		err := n.suspend()
		n.mu.Unlock()
		if err != nil {
			return errno(err)
		}
	}
	if setM || setA {
		info, err := n.m.sh.Stat(n.m.ctx, n.path())
		if err != nil {
			return errno(err)
		}
		if !setM {
			mtime = info.Modified
		}
		if !setA {
			atime = info.Accessed
		}
		if err := n.m.sh.SetTimes(n.m.ctx, n.path(), atime, mtime); err != nil {
			return errno(err)
		}
	}
	if setMode && n.StableAttr().Mode == syscall.S_IFREG {
		info, err := n.m.sh.Stat(n.m.ctx, n.path())
		if err == nil && info.ReadOnly != (mode&0o200 == 0) {
			err = n.m.sh.SetReadOnly(n.m.ctx, n.path(), mode&0o200 == 0)
		}
		if err != nil {
			return errno(err)
		}
	}
	return errno(n.getattr(&out.Attr))
}

// Mkdir implements fs.NodeMkdirer.
func (n *node) Mkdir(ctx context.Context, name string, _ uint32, out *fuse.EntryOut) (*gofs.Inode, syscall.Errno) {
	if no := checkName(name); no != 0 {
		return nil, no
	}
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	p := path.Join(n.path(), name)
	if err := n.m.sh.Mkdir(n.m.ctx, p); err != nil {
		return nil, errno(err)
	}
	n.forgetName(name)
	info, err := n.m.sh.Stat(n.m.ctx, p)
	if err != nil {
		return nil, errno(err)
	}
	return n.enter(ctx, name, info, "", out), 0
}

// Rmdir implements fs.NodeRmdirer.
func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	p := path.Join(n.path(), name)
	info, err := n.m.sh.Stat(n.m.ctx, p)
	if err == nil && !info.Dir {
		err = smb.ErrNotDir
	}
	if err == nil {
		err = n.m.sh.Remove(n.m.ctx, p)
	}
	n.forgetName(name)
	return errno(err)
}

// Unlink implements fs.NodeUnlinker.
func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	n.m.tree.RLock()
	if len(n.m.openAt(n, name)) == 0 {
		err := n.unlinkClosed(name)
		// A program may have opened it meanwhile.
		if !errors.Is(err, smb.ErrInUse) || len(n.m.openAt(n, name)) == 0 {
			n.m.tree.RUnlock()
			return errno(err)
		}
	}
	n.m.tree.RUnlock()
	n.m.tree.Lock()
	defer n.m.tree.Unlock()
	open := n.m.openAt(n, name)
	if len(open) == 0 {
		return errno(n.unlinkClosed(name))
	}
	n.forgetName(name)
	return errno(n.m.hide(open))
}

// openAt returns the nodes with handles of a name. As a rule it is one; the
// kernel makes a second one when it looks a name up in the middle of a rename. m.tree is held.
func (m *Mount) openAt(parent *node, name string) (nodes []*node) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n := range m.open {
		if n.parent == parent && n.name == name {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// unlinkClosed removes a file that nobody here has open. m.tree is held.
func (n *node) unlinkClosed(name string) error {
	p := path.Join(n.path(), name)
	info, err := n.m.sh.Stat(n.m.ctx, p)
	if err == nil && info.Dir {
		err = smb.ErrIsDir
	}
	if err == nil {
		err = n.m.sh.Remove(n.m.ctx, p)
	}
	n.forgetName(name)
	return err
}

// hide gives an open file a name that isn't shown. m.tree is held for writing.
func (m *Mount) hide(nodes []*node) error {
	for _, n := range nodes {
		n.mu.Lock()
		err := n.suspend()
		n.mu.Unlock()
		if err != nil {
			return err
		}
	}
	hidden := deletedPrefix + rand.Text()
	if err := m.sh.Rename(m.ctx, nodes[0].path(), path.Join(nodes[0].parent.path(), hidden)); err != nil {
		return err
	}
	for _, n := range nodes {
		n.name, n.deleted = hidden, true
	}
	return nil
}

// Rename implements fs.NodeRenamer.
func (n *node) Rename(ctx context.Context, name string, newParent gofs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	const noReplace = 1
	to, ok := newParent.(*node)
	if !ok || flags&^noReplace != 0 {
		return syscall.EINVAL
	}
	if no := checkName(newName); no != 0 {
		return no
	}
	m := n.m
	m.tree.Lock()
	defer m.tree.Unlock()
	n.forgetName(name)
	to.forgetName(newName)
	moved := m.openAt(n, name)
	if c := n.child(name); c != nil && c.parent == n && c.name == name && !slices.Contains(moved, c) {
		moved = append(moved, c)
	}
	for _, c := range moved {
		if err := m.suspendBelow(c); err != nil {
			return errno(err)
		}
	}
	from, dest := path.Join(n.path(), name), path.Join(to.path(), newName)
	err := m.sh.Rename(m.ctx, from, dest)
	if errors.Is(err, fs.ErrExist) && flags&noReplace == 0 {
		err = m.replace(from, dest, m.openAt(to, newName))
	}
	if err != nil {
		return errno(err)
	}
	for _, c := range moved {
		c.parent, c.name = to, newName
	}
	return 0
}

// replace renames onto something that exists, as POSIX wants it. over are its
// nodes with handles. m.tree is held for writing.
func (m *Mount) replace(from, dest string, over []*node) error {
	src, err := m.sh.Stat(m.ctx, from)
	if err != nil {
		return err
	}
	dst, err := m.sh.Stat(m.ctx, dest)
	if err != nil {
		return err
	}
	switch {
	case dst.Dir && !src.Dir:
		return smb.ErrIsDir
	case !dst.Dir && src.Dir:
		return smb.ErrNotDir
	case dst.Dir:
		if err := m.sh.Remove(m.ctx, dest); err != nil { // only an empty one
			return err
		}
		return m.sh.Rename(m.ctx, from, dest)
	}
	aside := path.Join(path.Dir(dest), deletedPrefix+rand.Text())
	if len(over) > 0 {
		if err := m.hide(over); err != nil {
			return err
		}
		aside = over[0].path()
	} else if err := m.sh.Rename(m.ctx, dest, aside); err != nil {
		return err
	}
	if err := m.sh.Rename(m.ctx, from, dest); err != nil {
		back := m.sh.Rename(m.ctx, aside, dest)
		for _, c := range over {
			if back == nil {
				c.name, c.deleted = path.Base(dest), false
			}
		}
		return errors.Join(err, back)
	}
	if len(over) == 0 {
		// It is replaced already; a hidden file that stays is no failure.
		_ = m.sh.Remove(m.ctx, aside)
	}
	return nil
}

// suspendBelow closes all files at or below a node on the server, since the
// server moves nothing that is open. m.tree is held for writing.
func (m *Mount) suspendBelow(top *node) error {
	m.mu.Lock()
	var nodes []*node
	for n := range m.open {
		if n.below(top) {
			nodes = append(nodes, n)
		}
	}
	m.mu.Unlock()
	for _, n := range nodes {
		n.mu.Lock()
		err := n.suspend()
		n.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// Symlink implements fs.NodeSymlinker.
func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*gofs.Inode, syscall.Errno) {
	if no := checkName(name); no != 0 {
		return nil, no
	}
	text, ok := encodeLink(target)
	if !ok {
		return nil, syscall.ENAMETOOLONG
	}
	n.m.tree.RLock()
	defer n.m.tree.RUnlock()
	p := path.Join(n.path(), name)
	f, err := n.m.sh.Open(n.m.ctx, p, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, errno(err)
	}
	var info smb.Info
	if err = f.WriteAt(n.m.ctx, text, 0); err == nil {
		info, err = f.Stat(n.m.ctx)
	}
	if cerr := f.Close(n.m.ctx); err == nil {
		err = cerr
	}
	if err != nil {
		_ = n.m.sh.Remove(n.m.ctx, p) // the first error counts
		return nil, errno(err)
	}
	n.forgetName(name)
	return n.enter(ctx, name, info, target, out), 0
}

// Readlink implements fs.NodeReadlinker.
func (n *node) Readlink(context.Context) ([]byte, syscall.Errno) { return []byte(n.link), 0 }

// Link implements fs.NodeLinker: shares have no hard links.
func (n *node) Link(context.Context, gofs.InodeEmbedder, string, *fuse.EntryOut) (*gofs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

// Mknod implements fs.NodeMknoder. Of all special files shares have none.
func (n *node) Mknod(ctx context.Context, name string, mode, _ uint32, out *fuse.EntryOut) (*gofs.Inode, syscall.Errno) {
	if mode&syscall.S_IFMT != syscall.S_IFREG {
		return nil, syscall.EPERM
	}
	inode, fh, _, no := n.Create(ctx, name, syscall.O_RDWR|syscall.O_EXCL, mode, out)
	if no == 0 {
		no = inode.Operations().(*node).Release(ctx, fh)
	}
	return inode, no
}

// Statfs implements fs.NodeStatfser.
func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	m := n.m
	m.mu.Lock()
	space, fresh := m.space, time.Since(m.asked) < 5*time.Second
	m.mu.Unlock()
	if !fresh {
		var err error
		if space, err = m.sh.Space(m.ctx, m.dir); err != nil {
			return errno(err)
		}
		m.mu.Lock()
		m.space, m.asked = space, time.Now()
		m.mu.Unlock()
	}
	out.Bsize = uint32(min(max(space.Block, 512), 1<<20))
	out.Frsize = out.Bsize
	out.Blocks = space.Total / uint64(out.Bsize)
	out.Bfree = space.Free / uint64(out.Bsize)
	out.Bavail = space.Available / uint64(out.Bsize)
	out.NameLen = 255
	return 0
}
