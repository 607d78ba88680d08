package local_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/backendtest"
	"github.com/iot49/ide49-backup/backup/backend/local"
)

func TestConformance(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		s, err := local.Open(dir, local.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
	if left := entries(t, dir+"/tmp"); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names
}

func put(t *testing.T, s backend.Backend, data []byte) backend.Key {
	t.Helper()
	k := backend.Key{Kind: backend.Packs, ID: backup.Hash(data)}
	if err := s.Put(t.Context(), k, data); err != nil {
		t.Fatal(err)
	}
	return k
}

func TestCreate(t *testing.T) {
	parent := t.TempDir()
	if _, err := local.Open(parent+"/none", local.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open of a missing folder: %v", err)
	}
	if _, err := local.Create(parent+"/none/repo", local.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Create below a missing folder: %v", err)
	}
	if got := entries(t, parent); len(got) > 0 {
		t.Errorf("something was made: %v", got)
	}
	for _, group := range []bool{false, true} {
		dir := filepath.Join(parent, "repo")
		s, err := local.Create(dir, local.Options{GroupAccess: group})
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		if s, err = local.Open(dir, local.Options{}); err != nil { // finds out by itself
			t.Fatal(err)
		}
		k := put(t, s, []byte("x"))
		s.Close()
		wantDir, wantFile := fs.FileMode(0o700), fs.FileMode(0o400)
		if group {
			wantDir, wantFile = 0o770, 0o440
		}
		for name, want := range map[string]fs.FileMode{"": wantDir, "data": wantDir, "data/3f": wantDir, "keys": wantDir, k.Path(): wantFile} {
			info, err := os.Stat(filepath.Join(dir, name))
			if err != nil || info.Mode().Perm() != want {
				t.Errorf("group %v: %q has mode %v (%v), want %v", group, name, info.Mode(), err, want)
			}
		}
		if n := len(entries(t, dir+"/data")); n != 256 {
			t.Errorf("%d folders below data", n)
		}
		if s, err := local.Create(dir, local.Options{}); err != nil {
			t.Errorf("Create of what an interrupted Create left: %v", err)
		} else {
			s.Close()
		}
		if err := os.WriteFile(dir+"/config", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := local.Create(dir, local.Options{}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("Create over a repository: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFoldersThatACopyLost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, d := range []string{"tmp", "data", "snapshots"} {
		if err := os.RemoveAll(filepath.Join(dir, d)); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range s.List(t.Context(), backend.Packs) {
		t.Errorf("List: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, s, []byte("x"))
}

// A folder that is replaced while it is open stands for a drive that was
// pulled out: nothing may be written into what now has its path.
func TestNeverWritesElsewhere(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	k := put(t, s, []byte("x"))
	if got := entries(t, dir); len(got) > 0 {
		t.Errorf("written to the wrong folder: %v", got)
	}
	if _, err := os.Stat(filepath.Join(dir+".away", k.Path())); err != nil {
		t.Error(err)
	}
}

func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test mounts a tmpfs and must run as root")
	}
	mnt := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=3m", "none", mnt).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	defer func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	dir := filepath.Join(mnt, "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	small := put(t, s, []byte("fits"))
	big := bytes.Repeat([]byte("too big"), 1<<19)
	k := backend.Key{Kind: backend.Packs, ID: backup.Hash(big)}
	err = s.Put(t.Context(), k, big)
	if !errors.Is(err, backend.ErrFull) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), k.String()) {
		t.Errorf("Put on a full disk: %v", err)
	}
	if _, err := s.Get(t.Context(), k, 0, -1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half an object is there: %v", err)
	}
	if left := entries(t, dir+"/tmp"); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
	if _, err := s.Get(t.Context(), small, 0, -1); err != nil {
		t.Error(err)
	}
}

func TestForeignFilesAreIgnored(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	id := backup.Hash(nil).String()
	for _, name := range []string{"data/aa/" + id, "data/e3/" + id + "-tmp-1", "data/e3/notes.txt", "data/" + id, "index/" + strings.ToUpper(id)} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "data/e3", id)); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []backend.Kind{backend.Packs, backend.Indexes} {
		for info, err := range s.List(t.Context(), kind) {
			t.Errorf("List %s yields %v, %v", kind, info, err)
		}
	}
	if got, err := s.Get(t.Context(), backend.Key{Kind: backend.Packs, ID: backup.Hash(nil)}, 0, -1); err == nil {
		t.Errorf("Get followed a link out of the repository: %d bytes", len(got))
	}
}

func TestSweep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	old := time.Now().Add(-2 * time.Hour)
	for name, when := range map[string]time.Time{"ide49-OLD": old, "ide49-NEW": time.Now(), "ide49-FUTURE": time.Now().Add(time.Hour), "other": old} {
		p := filepath.Join(dir, "tmp", name)
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(p, when, when); err != nil {
			t.Fatal(err)
		}
	}
	s, err = local.Open(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if got := strings.Join(entries(t, dir+"/tmp"), " "); got != "ide49-FUTURE ide49-NEW other" {
		t.Errorf("left: %s", got)
	}
}

func TestReadOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	s, err := local.Create(dir, local.Options{})
	if err != nil {
		t.Fatal(err)
	}
	k := put(t, s, []byte("x"))
	s.Close()
	s, err = local.Open(dir, local.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Put(t.Context(), k, nil); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Put: %v", err)
	}
	if err := s.Delete(t.Context(), k); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("Delete: %v", err)
	}
	if got, err := s.Get(t.Context(), k, 0, -1); err != nil || string(got) != "x" {
		t.Errorf("Get: %q, %v", got, err)
	}
}
