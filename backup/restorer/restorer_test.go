package restorer_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/restorer"
)

func newRepo(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests set owners and make device nodes: run them as root")
	}
	r, err := repo.Init(t.Context(), be, "pw", cheapKDF, repo.Options{PackSize: repo.MinPackSize})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func reopen(t testing.TB, be backend.Backend) *repo.Repo {
	t.Helper()
	r, err := repo.Open(t.Context(), be, "pw", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.LoadIndex(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// cheapKDF makes keys that cost nothing to open.
var cheapKDF = crypt.Params{N: 2, R: 1, P: 1}

// payload returns n bytes; even seeds compress well, odd ones do not.
func payload(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	if seed%2 == 0 {
		for i := range b {
			b[i] &= 3
		}
	}
	return b
}

// chunkSize is what the test writer cuts files into.
const chunkSize = 20_000

// A writer makes snapshots: of folders on the disk, or of made-up nodes.
type writer struct {
	t testing.TB
	w *repo.Writer
}

// snapshot saves the tree that fn returns, as /vol.
func snapshot(t testing.TB, r *repo.Repo, fn func(w writer) backup.ID) *backup.Snapshot {
	t.Helper()
	var root backup.ID
	err := r.Update(context.Background(), func(_ context.Context, rw *repo.Writer) error {
		w := writer{t, rw}
		n := backup.Node{Name: "vol", Type: backup.Dir, Mode: fs.ModeDir | 0o755, ModTime: stamp, Subtree: fn(w)}
		root = w.tree(n)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return &backup.Snapshot{Time: stamp, Tree: &root, Paths: []string{"/vol"}, ID: root}
}

var stamp = time.Date(2026, 11, 20, 1, 2, 3, 456_789_123, time.UTC)

func (w writer) blob(kind backup.BlobKind, b []byte) backup.ID {
	s, err := w.w.Save(context.Background(), kind, b)
	if err != nil {
		w.t.Fatal(err)
	}
	return s.ID
}

func (w writer) tree(nodes ...backup.Node) backup.ID {
	slices.SortFunc(nodes, func(a, b backup.Node) int { return strings.Compare(a.Name, b.Name) })
	s, err := w.w.SaveTree(context.Background(), &backup.Tree{Nodes: nodes})
	if err != nil {
		w.t.Fatal(err)
	}
	return s.ID
}

func (w writer) file(name string, data []byte) backup.Node {
	n := backup.Node{Name: name, Type: backup.File, Mode: 0o644, ModTime: stamp, AccessTime: stamp, Size: uint64(len(data)), Links: 1, Content: []backup.ID{}}
	for chunk := range slices.Chunk(data, chunkSize) {
		n.Content = append(n.Content, w.blob(backup.DataBlob, chunk))
	}
	return n
}

func (w writer) dir(name string, nodes ...backup.Node) backup.Node {
	return backup.Node{Name: name, Type: backup.Dir, Mode: fs.ModeDir | 0o755, ModTime: stamp, AccessTime: stamp, Subtree: w.tree(nodes...)}
}

// disk saves a folder on the disk as it is.
func (w writer) disk(dir string) backup.ID {
	entries, err := os.ReadDir(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	var nodes []backup.Node
	for _, e := range entries {
		nodes = append(nodes, w.diskNode(filepath.Join(dir, e.Name()), e.Name()))
	}
	return w.tree(nodes...)
}

func (w writer) diskNode(p, name string) backup.Node {
	fi, err := os.Lstat(p)
	if err != nil {
		w.t.Fatal(err)
	}
	st := stat(w.t, p)
	n := backup.Node{
		Name: name, Mode: fi.Mode() & backup.ModeMask, ModTime: fi.ModTime(), AccessTime: fi.ModTime(), UID: st.Uid, GID: st.Gid,
		Inode: st.Ino, Links: uint64(st.Nlink), Xattrs: xattrs(w.t, p),
	}
	switch m := fi.Mode(); {
	case m.IsRegular():
		n.Type, n.Size, n.DeviceID = backup.File, uint64(fi.Size()), st.Dev
		data, err := os.ReadFile(p)
		if err != nil {
			w.t.Fatal(err)
		}
		n.Content = w.file(name, data).Content
	case m.IsDir():
		n.Type, n.Subtree = backup.Dir, w.disk(p)
	case m&fs.ModeSymlink != 0:
		n.Type = backup.Symlink
		n.LinkTarget, _ = os.Readlink(p)
	case m&fs.ModeCharDevice != 0:
		n.Type, n.Device = backup.CharDevice, st.Rdev
	case m&fs.ModeDevice != 0:
		n.Type, n.Device = backup.Device, st.Rdev
	case m&fs.ModeNamedPipe != 0:
		n.Type = backup.FIFO
	case m&fs.ModeSocket != 0:
		n.Type = backup.Socket
	}
	return n
}

func stat(t testing.TB, p string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		t.Fatalf("lstat %s: %v", p, err)
	}
	return st
}

func xattrs(t testing.TB, p string) []backup.Xattr {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		t.Fatalf("list attributes of %s: %v", p, err)
	}
	var xs []backup.Xattr
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1<<16)
		k, err := unix.Lgetxattr(p, name, value)
		if err != nil {
			t.Fatal(err)
		}
		xs = append(xs, backup.Xattr{Name: name, Value: value[:k]})
	}
	slices.SortFunc(xs, func(a, b backup.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return xs
}

// scan describes all that is in a folder, itself included: a line for each.
func scan(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	groups := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		st := stat(t, p)
		s := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d rdev %x xattrs %q", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev, xattrs(t, p))
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" size %d sum %x", st.Size, sha256.Sum256(data))
			if st.Nlink > 1 {
				if groups[st.Ino] == "" {
					groups[st.Ino] = rel
				}
				s += " linked to " + groups[st.Ino]
			}
		case unix.S_IFLNK:
			target, _ := os.Readlink(p)
			s += fmt.Sprintf(" -> %q", target)
		}
		out[rel] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func diff(t testing.TB, got, want map[string]string) {
	t.Helper()
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%q:\ngot  %s\nwant %s", k, got[k], want[k])
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%q should not be there: %s", k, got[k])
		}
	}
}

// noTemps fails if a temporary name is left below dir.
func noTemps(t testing.TB, dir string) {
	t.Helper()
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(p), ".ide49-restore-") {
			t.Errorf("left behind: %s", p)
		}
		return nil
	})
}

func prepare(t testing.TB, r *repo.Repo, sn *backup.Snapshot, dir string, opt restorer.Options) *restorer.Plan {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	p, err := restorer.Prepare(t.Context(), r, sn, root, opt)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// restore prepares and executes, and fails the test on anything but success.
func restore(t testing.TB, r *repo.Repo, sn *backup.Snapshot, dir string, opt restorer.Options) (restorer.Counts, restorer.Stats) {
	t.Helper()
	p := prepare(t, r, sn, dir, opt)
	stats, err := p.Execute(t.Context(), restorer.Observer{Warning: func(path string, err error) { t.Errorf("warning: %q: %v", path, err) }})
	if err != nil {
		t.Fatal(err)
	}
	noTemps(t, dir)
	return p.Counts(), stats
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// posixACL encodes an ACL: owner, user 1234, group, mask, others.
func posixACL() []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, 6, ^uint32(0)}, {2, 4, 1234}, {4, 4, ^uint32(0)}, {16, 6, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		b = append(b, byte(e[0]), 0, byte(e[1]), 0, byte(e[2]), byte(e[2]>>8), byte(e[2]>>16), byte(e[2]>>24))
	}
	return b
}

// everything fills a folder with every special case.
func everything(t testing.TB, dir string) {
	t.Helper()
	write := func(name string, data []byte, mode fs.FileMode) string {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, data, 0o600))
		must(t, os.Chmod(p, mode))
		return p
	}
	write("empty", nil, 0o644)
	write("small", []byte("hello"), 0o640)
	write("big", payload(1, 1_234_567), 0o600)
	write("compressible", payload(2, 700_001), 0o604)
	write("sub/deep/er/file", payload(3, 5000), 0o644)
	write("not\xffutf8\xfe", []byte("x"), 0o644)
	write("new\nline", []byte("y"), 0o644)
	write(strings.Repeat("n", 255), []byte("z"), 0o644)
	owned := write("owned-setuid", payload(4, 100), 0o755)
	must(t, os.Chown(owned, 1234, 5678))
	must(t, os.Chmod(owned, 0o755|fs.ModeSetuid|fs.ModeSetgid))
	sparse := filepath.Join(dir, "sparse")
	must(t, os.WriteFile(sparse, payload(5, 10_000), 0o644))
	must(t, os.Truncate(sparse, 3<<20))
	f, err := os.OpenFile(sparse, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("middle"), 1<<20+5)
	must(t, err)
	must(t, f.Close())
	write("linked/a", payload(6, 300_000), 0o644)
	must(t, os.Link(filepath.Join(dir, "linked/a"), filepath.Join(dir, "linked/b")))
	must(t, os.Link(filepath.Join(dir, "linked/a"), filepath.Join(dir, "zlink")))
	must(t, os.Symlink("small", filepath.Join(dir, "sym")))
	must(t, os.Symlink("/nowhere/\xff\x01", filepath.Join(dir, "sym-raw")))
	must(t, unix.Lchown(filepath.Join(dir, "sym"), 77, 78))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o620))
	must(t, unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK|0o755, 0))
	must(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(filepath.Join(dir, "loop"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 300))))
	must(t, unix.Setxattr(filepath.Join(dir, "small"), "user.note", []byte("a\x00b"), 0))
	must(t, unix.Setxattr(filepath.Join(dir, "small"), "system.posix_acl_access", posixACL(), 0))
	must(t, unix.Lsetxattr(filepath.Join(dir, "sym"), "trusted.of-link", []byte("t"), 0))
	cap := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0} // cap_net_bind_service+ep
	must(t, unix.Setxattr(write("capable", []byte("#!"), 0o755), "security.capability", cap, 0))
	must(t, os.Chown(filepath.Join(dir, "sub"), 9, 10))
	must(t, unix.Setxattr(filepath.Join(dir, "sub"), "system.posix_acl_default", posixACL(), 0))
	must(t, os.Chmod(filepath.Join(dir, "sub/deep"), 0o555|fs.ModeSticky|fs.ModeSetgid))
	must(t, os.Mkdir(filepath.Join(dir, "void"), 0))
	must(t, os.Chmod(dir, 0o751))
	// Times last, in nanoseconds, before 1970 as well.
	i := int64(0)
	var paths []string
	must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error { paths = append(paths, p); return err }))
	slices.Reverse(paths)
	for _, p := range paths {
		i++
		ts := unix.Timespec{Sec: 1_700_000_000*(i%2) - i*1000, Nsec: 123_456_789 - i}
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// volume saves dir as /vol with its own metadata.
func volume(t testing.TB, r *repo.Repo, dir string) *backup.Snapshot {
	t.Helper()
	var root backup.ID
	err := r.Update(context.Background(), func(_ context.Context, rw *repo.Writer) error {
		w := writer{t, rw}
		root = w.tree(w.diskNode(dir, "vol"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return &backup.Snapshot{Time: stamp, Tree: &root, Paths: []string{"/vol"}, ID: root}
}

// folders are where tests restore to: ext4 or what the disk has, and tmpfs.
func folders(t *testing.T) map[string]string {
	shm, err := os.MkdirTemp("/dev/shm", "restorer-test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(shm) })
	return map[string]string{"disk": t.TempDir(), "tmpfs": shm}
}

func TestEverythingExactly(t *testing.T) {
	for name, base := range folders(t) {
		t.Run(name, func(t *testing.T) {
			src, dst := filepath.Join(base, "src"), filepath.Join(base, "dst")
			must(t, os.Mkdir(src, 0o755))
			must(t, os.Mkdir(dst, 0o700))
			everything(t, src)
			be := mem.New()
			sn := volume(t, newRepo(t, be), src)
			r := reopen(t, be)
			want := scan(t, src)
			counts, stats := restore(t, r, sn, dst, restorer.Options{Verify: true})
			diff(t, scan(t, dst), want)
			if counts.Created != len(want)-1 || counts.Metadata != 1 || counts.Changed+counts.Deleted+counts.Unchanged+counts.Kept != 0 {
				t.Errorf("counts %+v for %d entries", counts, len(want))
			}
			if stats.Files+stats.Folders != len(want)-1 || stats.Verified == 0 || stats.Fetched != counts.FetchBytes || stats.Written != counts.WriteBytes {
				t.Errorf("stats %+v, counts %+v", stats, counts)
			}
			if st := stat(t, filepath.Join(dst, "sparse")); st.Blocks*512 > 64<<10 {
				t.Errorf("the sparse file takes %d bytes", st.Blocks*512)
			}
			for _, policy := range []restorer.Overwrite{restorer.Changed, restorer.Always} {
				counts, _ = restore(t, r, sn, dst, restorer.Options{Overwrite: policy, Verify: true, Delete: true})
				if counts.Unchanged != len(want) || counts.Created+counts.Changed+counts.Metadata+counts.Deleted != 0 {
					t.Errorf("again, %v: %+v", policy, counts)
				}
			}
			diff(t, scan(t, dst), want)
		})
	}
}
