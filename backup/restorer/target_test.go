package restorer

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpenFollowsNoLink runs with openat2 and as on kernels that lack it.
func TestOpenFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"inside": "a", "a/up": "..", "out": "/", "a/b/self": "."} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, byParts := range []bool{false, true} {
		tgt, err := openTarget(root)
		if err != nil {
			t.Fatal(err)
		}
		tgt.byParts.Store(byParts)
		for rel, ok := range map[string]bool{
			".": true, "a": true, "a/b": true, "inside": false, "inside/b": false, "a/up": false, "a/up/a": false, "out": false, "out/tmp": false, "a/b/self": false, "none": false,
		} {
			fd, err := tgt.open(rel, unix.O_PATH)
			if err == nil {
				unix.Close(fd)
			}
			if (err == nil) != ok {
				t.Errorf("by parts %v: open %q: %v", byParts, rel, err)
			}
		}
		if tgt.byParts.Load() != byParts {
			t.Error("this kernel has no openat2; the tests need Linux 5.6")
		}
		tgt.close()
	}
}

func TestTemporaryNames(t *testing.T) {
	for name, want := range map[string]bool{
		tempPrefix + "0123456789abcdef": true, tempPrefix + "0123456789ABCDEF": false, tempPrefix + "0123": false, tempPrefix: false, "x" + tempPrefix + "0123456789abcdef": false,
	} {
		if isTemp(name) != want {
			t.Errorf("isTemp(%q) = %v", name, !want)
		}
	}
}
