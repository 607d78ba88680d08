package integration

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/restorer"
)

// restore brings a snapshot's folder back into dst.
func restore(t testing.TB, r *repo.Repo, s *backup.Snapshot, dst string, opt restorer.Options) restorer.Stats {
	t.Helper()
	root, err := os.OpenRoot(dst)
	must(t, err)
	defer root.Close()
	plan, err := restorer.Prepare(t.Context(), r, s, root, opt)
	must(t, err)
	stats, err := plan.Execute(t.Context(), restorer.Observer{
		Warning: func(path string, err error) { t.Errorf("restore %s: %v", path, err) },
		Failure: func(f restorer.Failure) { t.Errorf("restore %s: %v", f.Path, f.Err) },
	})
	must(t, err)
	return stats
}

// What we record and what we restore is the same in all that rsync can see,
// into an empty folder and over a folder that differs in everything.
func TestRestoreIsExact(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wilderTree(t, src)
	p := newPlace(t)
	p.init(t)
	res := p.backup(t, src)
	p.check(t)
	r := p.open(t)

	dst := t.TempDir()
	restore(t, r, res.Snapshot, dst, restorer.Options{Verify: true})
	sameTree(t, src, dst)
	if stats := restore(t, r, res.Snapshot, dst, restorer.Options{Overwrite: restorer.Always}); stats.Fetched != 0 || stats.Files != 0 {
		t.Errorf("restored again: %+v", stats)
	}

	must(t, os.RemoveAll(filepath.Join(dst, "many")))
	must(t, os.WriteFile(filepath.Join(dst, "many"), []byte("a file where a folder was"), 0o600))
	must(t, os.RemoveAll(filepath.Join(dst, "fifo")))
	must(t, os.MkdirAll(filepath.Join(dst, "fifo/with/contents"), 0o755))
	must(t, os.WriteFile(filepath.Join(dst, "extra"), []byte("not in the snapshot"), 0o600))
	f, err := os.OpenFile(filepath.Join(dst, "text/large again"), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("damaged in the middle"), 9<<20)
	must(t, err)
	must(t, f.Close())
	stats := restore(t, r, res.Snapshot, dst, restorer.Options{Delete: true})
	sameTree(t, src, dst)
	if stats.Fetched > 15<<20 {
		t.Errorf("%d bytes fetched for one changed chunk and some small files", stats.Fetched)
	}
}

// A repository that stock restic made is restored by us, continued by us, and
// restored by restic again.
func TestOursReadsRestics(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	wildTree(t, src)
	p := newPlace(t)
	p.restic(t, "init")
	p.restic(t, "backup", "--host", "pi", src)
	r := p.open(t)
	all, err := r.Snapshots(t.Context())
	must(t, err)
	dst := t.TempDir()
	restore(t, r, all[0], dst, restorer.Options{})
	sameTree(t, src, dst)

	must(t, os.WriteFile(filepath.Join(src, "later"), random(77, 100_000), 0o640))
	res := p.backup(t, src)
	if res.Snapshot.Parent == nil || *res.Snapshot.Parent != all[0].ID || res.Snapshot.Summary.FilesNew != 1 {
		t.Errorf("continued: %+v", res.Snapshot)
	}
	p.check(t)
	theirs := t.TempDir()
	p.restic(t, "restore", "latest", "--target", theirs)
	sameTree(t, src, filepath.Join(theirs, src))
}

// restic's format version 1 can be read, but not written.
func TestVersion1(t *testing.T) {
	src := filepath.Join(t.TempDir(), "volume")
	must(t, os.Mkdir(src, 0o755))
	must(t, os.WriteFile(filepath.Join(src, "file"), random(3, 2<<20), 0o644))
	p := newPlace(t)
	p.restic(t, "init", "--repository-version", "1")
	p.restic(t, "backup", src)
	r := p.open(t)
	all, err := r.Snapshots(t.Context())
	must(t, err)
	dst := t.TempDir()
	restore(t, r, all[0], dst, restorer.Options{})
	sameTree(t, src, dst)
}
