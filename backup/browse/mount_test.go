package browse_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/browse"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

// deadMount makes this test program mount a repository and wait to be killed.
const deadMount = "IDE49_TEST_MOUNT"

func TestMain(m *testing.M) {
	if where, ok := os.LookupEnv(deadMount); ok {
		repository, dir, _ := strings.Cut(where, ":")
		if err := mountAndWait(repository, dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func mountAndWait(repository, dir string) error {
	ctx := context.Background()
	be, err := local.Open(repository, local.Options{})
	if err != nil {
		return err
	}
	r, err := repo.Open(ctx, be, "pw", repo.Options{})
	if err != nil {
		return err
	}
	if err := r.LoadIndex(ctx); err != nil {
		return err
	}
	return browse.New(r, browse.Options{}).Mount(ctx, dir, browse.MountOptions{Ready: func() { fmt.Println("ready") }})
}

func needFUSE(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts and must run as root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("this test needs /dev/fuse: %v", err)
	}
}

// mount mounts v on a new folder and returns it with a function that unmounts
// it, which also is called when the test ends.
func mount(t testing.TB, v *browse.View, opt browse.MountOptions) (string, func() error) {
	t.Helper()
	needFUSE(t)
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan struct{})
	opt.Ready = func() { close(ready) }
	opt.Zone = time.UTC
	ended := make(chan error, 1)
	go func() { ended <- v.Mount(ctx, dir, opt) }()
	end := sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() { must(t, end()) })
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal(err)
	}
	return dir, end
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	must(t, err)
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}

func mounted(dir string) bool {
	var a, b unix.Stat_t
	return unix.Lstat(dir, &a) == nil && unix.Lstat(filepath.Dir(dir), &b) == nil && a.Dev != b.Dev
}

func TestMountLayout(t *testing.T) {
	r := newRepo(t, mem.New())
	save := func(at time.Time, host string, paths, tags []string, d dir) {
		s := take(t, r, at, d)
		must(t, r.Backend().Delete(t.Context(), key(s.ID)))
		s.Hostname, s.Paths, s.Tags = host, paths, tags
		_, err := r.SaveSnapshot(t.Context(), s)
		must(t, err)
	}
	deep := dir{"srv": dir{"mosquitto": dir{"conf": "1"}}}
	save(noon, "pi", []string{"/srv/mosquitto"}, []string{"volume:mosquitto"}, deep)
	save(noon.Add(time.Second), "pi", []string{"/srv/mosquitto"}, []string{"volume:mosquitto"}, deep)
	save(noon.Add(24*time.Hour), "pi", []string{"/srv/mosquitto"}, []string{"volume:mosquitto"}, deep)
	save(noon, "other", []string{"/srv/mosquitto"}, []string{"volume:mosquitto"}, deep)
	save(noon, "pi", []string{"/srv", "/etc"}, nil, deep)
	save(noon, "pi", []string{"/srv"}, []string{"volume:../../../etc"}, deep)
	save(noon, "pi", []string{"/srv"}, []string{"volume:" + strings.Repeat("long", 100)}, deep)
	save(noon, "pi", []string{"/gone"}, []string{"volume:."}, deep)
	v := browse.New(r, browse.Options{})
	root, end := mount(t, v, browse.MountOptions{Host: "pi"})

	if got := names(t, root); !slices.Equal(got, []string{"by-day", "volumes"}) {
		t.Errorf("%q", got)
	}
	volumes := names(t, root+"/volumes")
	if !slices.Contains(volumes, "mosquitto") || !slices.Contains(volumes, "mosquitto@other") || !slices.Contains(volumes, "%2Fsrv,%2Fetc") ||
		!slices.Contains(volumes, "%2E.%2F..%2F..%2Fetc") || !slices.Contains(volumes, "%2E") || len(volumes) != 6 {
		t.Errorf("%q", volumes)
	}
	all := names(t, root+"/volumes/mosquitto")
	if len(all) != 4 || all[0] != "2026-11-20T12-00" || !strings.HasPrefix(all[1], "2026-11-20T12-00-") || all[2] != "2026-11-21T12-00" || all[3] != "latest" {
		t.Errorf("%q", all)
	}
	if got := names(t, root+"/by-day"); !slices.Equal(got, []string{"2026-11-20", "2026-11-21"}) {
		t.Errorf("%q", got)
	}
	for _, p := range []string{"volumes/mosquitto/latest/conf", "by-day/2026-11-21/mosquitto/conf", "by-day/2026-11-20/mosquitto@other/conf", "volumes/%2Fsrv,%2Fetc/latest/srv/mosquitto/conf", "volumes/%2E/latest/srv/mosquitto/conf"} {
		if data, err := os.ReadFile(filepath.Join(root, p)); err != nil || string(data) != "1" {
			t.Errorf("%s: %q, %v", p, data, err)
		}
	}
	if _, err := os.Stat(root + "/volumes/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a volume that is not there: %v", err)
	}
	if err := os.WriteFile(root+"/x", nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write: %v", err)
	}
	must(t, end())
	if mounted(root) {
		t.Error("it is still mounted")
	}
	must(t, os.Remove(root))
}

func TestMountContents(t *testing.T) {
	r := newRepo(t, mem.New())
	d := special(t, r)
	same := blobs(t, r, "linked")
	same.Links, same.Inode, same.DeviceID = 2, 7, 1
	d["root"].(dir)["dir"].(dir)["a4"] = same
	d["root"].(dir)["big hole"] = sparse{random(1, 1000), holes(8 << 20), holes(8 << 20), random(2, 700_000)}
	s := take(t, r, noon, d)
	v := browse.New(r, browse.Options{})
	root, end := mount(t, v, browse.MountOptions{Problem: func(err error) { t.Error(err) }})
	top := root + "/volumes/v/latest"
	for e, err := range v.Ls(t.Context(), s, "/", true) {
		must(t, err)
		p := top + e.Path
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			t.Errorf("%q: %v", e.Path, err)
			continue
		}
		if st.Uid != e.Node.UID || st.Mtim.Sec != noon.Unix() || fs.FileMode(st.Mode).Perm() != e.Node.Mode.Perm() {
			t.Errorf("%q: %+v", e.Path, st)
		}
		switch e.Node.Type {
		case backup.File:
			var want bytes.Buffer
			must(t, v.Cat(t.Context(), &want, e))
			if data, err := os.ReadFile(p); err != nil || !bytes.Equal(data, want.Bytes()) {
				t.Errorf("%q: %d bytes, want %d; %v", e.Path, len(data), want.Len(), err)
			}
		case backup.Symlink:
			if target, err := os.Readlink(p); err != nil || target != e.Node.LinkTarget {
				t.Errorf("%q: %q, %v", e.Path, target, err)
			}
		case backup.CharDevice:
			if st.Rdev != e.Node.Device || st.Mode&unix.S_IFMT != unix.S_IFCHR {
				t.Errorf("%q: %+v", e.Path, st)
			}
		case backup.FIFO, backup.Socket:
			if want := map[backup.NodeType]uint32{backup.FIFO: unix.S_IFIFO, backup.Socket: unix.S_IFSOCK}[e.Node.Type]; st.Mode&unix.S_IFMT != want {
				t.Errorf("%q: %+v", e.Path, st)
			}
		}
	}
	inode := func(p string) uint64 {
		var st unix.Stat_t
		must(t, unix.Lstat(top+"/root/"+p, &st))
		return st.Ino
	}
	if a, b, c, liar := inode("a1"), inode("a2"), inode("dir/a4"), inode("a3"); a != b || a != c || a == liar {
		t.Errorf("hard links: %d %d %d, and another %d", a, b, c, liar)
	}
	buf := make([]byte, 100)
	if n, err := unix.Getxattr(top+"/root/attrs", "user.a=b%", buf); err != nil || string(buf[:n]) != "\x00\xff\n" {
		t.Errorf("attribute: %q, %v", buf[:max(n, 0)], err)
	}
	if n, err := unix.Listxattr(top+"/root/attrs", buf); err != nil || string(buf[:n]) != "user.a=b%\x00user.plain\x00" {
		t.Errorf("attributes: %q, %v", buf[:max(n, 0)], err)
	}
	if _, err := unix.Getxattr(top+"/root/attrs", "user.none", buf); !errors.Is(err, unix.ENODATA) {
		t.Errorf("missing attribute: %v", err)
	}
	f, err := os.Open(top + "/root/big hole")
	must(t, err)
	if at, err := f.Seek(0, unix.SEEK_HOLE); err != nil || at != 1000 {
		t.Errorf("hole at %d, %v", at, err)
	}
	if at, err := f.Seek(2000, unix.SEEK_DATA); err != nil || at != 1000+16<<20 {
		t.Errorf("data at %d, %v", at, err)
	}
	must(t, f.Close())
	var st unix.Stat_t
	must(t, unix.Stat(top+"/root/big hole", &st))
	if st.Blocks*512 > 800_000 {
		t.Errorf("%d blocks", st.Blocks)
	}
	var fsinfo unix.Statfs_t
	must(t, unix.Statfs(root, &fsinfo))
	if fsinfo.Blocks == 0 || fsinfo.Bavail != 0 || fsinfo.Flags&unix.ST_RDONLY == 0 || fsinfo.Flags&unix.ST_NOSUID == 0 || fsinfo.Flags&unix.ST_NODEV == 0 {
		t.Errorf("%+v", fsinfo)
	}
	// Inode numbers are the same the next time.
	before := []uint64{inode("a1"), inode("dir"), inode("file")}
	must(t, end())
	root, _ = mount(t, browse.New(r, browse.Options{}), browse.MountOptions{})
	top = root + "/volumes/v/latest"
	if after := []uint64{inode("a1"), inode("dir"), inode("file")}; !slices.Equal(before, after) {
		t.Errorf("inode numbers %v, then %v", before, after)
	}
}

// Many read at once, at random places.
func TestMountConcurrent(t *testing.T) {
	r := newRepo(t, mem.New())
	content := random(1, 1<<20) + random(2, 1<<20) + random(3, 1<<20)
	d := generated(4)
	d["f"] = sparse{content[:1<<20], content[1<<20 : 2<<20], content[2<<20:]}
	take(t, r, noon, d)
	root, _ := mount(t, browse.New(r, browse.Options{DataBytes: 2 << 20, TreeBytes: 10_000}), browse.MountOptions{Problem: func(err error) { t.Error(err) }})
	top := root + "/volumes/v/latest"
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			f, err := os.Open(top + "/f")
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			rng := rand.New(rand.NewPCG(uint64(i), 0))
			buf := make([]byte, 50_000)
			for range 40 {
				off := rng.IntN(len(content) - len(buf))
				if _, err := f.ReadAt(buf, int64(off)); err != nil || string(buf) != content[off:off+len(buf)] {
					t.Errorf("at %d: %v", off, err)
				}
			}
			n := 0
			if err := filepath.WalkDir(top+"/", func(string, fs.DirEntry, error) error { n++; return nil }); err != nil || n != len(flatten("/", d))+1 {
				t.Errorf("%d entries, %v", n, err)
			}
		})
	}
	wg.Wait()
}

// A mount that is in use ends all the same, at once for others and soon for
// those who use it.
func TestMountBusy(t *testing.T) {
	r := newRepo(t, mem.New())
	take(t, r, noon, dir{"f": random(1, 1<<20)})
	root, end := mount(t, browse.New(r, browse.Options{}), browse.MountOptions{})
	f, err := os.Open(root + "/volumes/v/latest/f")
	must(t, err)
	defer f.Close()
	began := time.Now()
	must(t, end())
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	if mounted(root) {
		t.Error("it is still mounted")
	}
	if _, err := f.ReadAt(make([]byte, 10), 0); err == nil {
		t.Error("the file can still be read")
	}
}

// Somebody else unmounts it.
func TestMountEndedByOthers(t *testing.T) {
	r := newRepo(t, mem.New())
	take(t, r, noon, dir{"f": "x"})
	root, end := mount(t, browse.New(r, browse.Options{}), browse.MountOptions{})
	must(t, unix.Unmount(root, 0))
	must(t, end())
}

func TestMountRefuses(t *testing.T) {
	needFUSE(t)
	r := newRepo(t, mem.New())
	v := browse.New(r, browse.Options{})
	full := t.TempDir()
	must(t, os.WriteFile(full+"/x", nil, 0o600))
	if err := v.Mount(t.Context(), full, browse.MountOptions{}); !errors.Is(err, browse.ErrNotEmpty) {
		t.Errorf("a folder with files: %v", err)
	}
	if err := v.Mount(t.Context(), full+"/none", browse.MountOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	if err := v.Mount(t.Context(), full+"/x", browse.MountOptions{}); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
}

// Trees that lie give errors, not wrong contents, and the mount goes on.
func TestMountHostile(t *testing.T) {
	r := newRepo(t, mem.New())
	short := blobs(t, r, "abc")
	short.Size = 1 << 62
	huge := blobs(t, r, "abc")
	huge.Size = 1<<64 - 1
	gone := backup.Node{Type: backup.Dir, Mode: fs.ModeDir | 0o755, Subtree: backup.Hash([]byte("gone"))}
	odd := backup.Node{Type: backup.FIFO, Mode: fs.ModeDir | fs.ModeSymlink | 0o777, Links: 1 << 60, Device: 1 << 63, UID: 1<<32 - 1, ModTime: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)}
	xattrs := blobs(t, r, "x")
	xattrs.Xattrs = []backup.Xattr{{Name: "", Value: nil}, {Name: "user.x\x00y", Value: nil}, {Name: "user.big", Value: make([]byte, 1<<20)}}
	take(t, r, noon, dir{"short": short, "huge": huge, "gone": gone, "odd": odd, "xattrs": xattrs, "ok": "fine"})
	root, _ := mount(t, browse.New(r, browse.Options{}), browse.MountOptions{})
	top := root + "/volumes/v/latest/"
	for _, name := range []string{"short", "huge"} {
		if _, err := os.ReadFile(top + name); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.ReadDir(top + "gone"); !errors.Is(err, syscall.EIO) {
		t.Errorf("a folder that is gone: %v", err)
	}
	if info, err := os.Lstat(top + "odd"); err != nil || info.Mode().Type() != fs.ModeNamedPipe {
		t.Errorf("a node whose mode does not fit: %v, %v", info, err)
	}
	buf := make([]byte, 1<<10)
	if n, err := unix.Listxattr(top+"xattrs", buf); err != nil || string(buf[:n]) != "user.big\x00" {
		t.Errorf("%q, %v", buf[:max(n, 0)], err)
	}
	if data, err := os.ReadFile(top + "ok"); err != nil || string(data) != "fine" {
		t.Errorf("%q, %v", data, err)
	}
}

// A mount whose program was killed is taken away by the next.
func TestMountAfterCrash(t *testing.T) {
	needFUSE(t)
	repository := filepath.Join(t.TempDir(), "r")
	be, err := local.Create(repository, local.Options{})
	must(t, err)
	r, err := repo.Init(t.Context(), be, "pw", crypt.Params{N: 2, R: 1, P: 1}, repo.Options{})
	must(t, err)
	take(t, r, noon, dir{"f": "x"})
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), deadMount+"="+repository+":"+dir)
	out, err := cmd.StdoutPipe()
	must(t, err)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	line := make([]byte, 5)
	_, err = out.Read(line)
	must(t, errors.Join(err, cmd.Process.Kill()))
	_ = cmd.Wait() // killed
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // if it still is
	if _, err := os.Lstat(dir + "/volumes"); !errors.Is(err, syscall.ENOTCONN) {
		t.Fatalf("the mount is not dead: %v %s", err, stderr.String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	var data []byte
	err = browse.New(r, browse.Options{}).Mount(ctx, dir, browse.MountOptions{Ready: func() {
		go func() {
			data, _ = os.ReadFile(dir + "/volumes/v/latest/f")
			cancel()
		}()
	}})
	if err != nil || string(data) != "x" || mounted(dir) {
		t.Errorf("%q, %v", data, err)
	}
}
