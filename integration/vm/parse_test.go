package vm

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParseLDD(t *testing.T) {
	got, err := parseLDD("\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n")
	if want := []string{"/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	if _, err := parseLDD("\tlibx.so => not found\n"); err == nil {
		t.Error("a missing library is no error")
	}
}

func TestParseDepends(t *testing.T) {
	got, err := parseDepends("linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n")
	if err != nil || got != "linux-image-6.1.0-56-amd64" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := parseDepends("linux-image-amd64\n"); err == nil {
		t.Error("no dependency is no error")
	}
}

func TestModules(t *testing.T) {
	k := kernel{dir: t.TempDir(), release: "6"}
	dir := filepath.Join(k.dir, "lib/modules/6")
	dep := "kernel/a-b.ko: kernel/c.ko kernel/d.ko\nkernel/c.ko: kernel/d.ko\nkernel/d.ko:\nkernel/e.ko: kernel/d.ko\n"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.dep"), []byte(dep), 0o644); err != nil {
		t.Fatal(err)
	}
	files, err := k.modules("a_b", "built-in", "e")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, moduleName(f))
	}
	if got := strings.Join(names, " "); got != "d c a_b e" {
		t.Errorf("order %q", got)
	}
	if _, err := parseModulesDep(strings.NewReader("no colon\n")); err == nil {
		t.Error("a line without a colon is no error")
	}
}

func TestQuote(t *testing.T) {
	got := quote("a'b\\c\nd\xffé$x")
	if want := `$'a\'b\\c\012d\377\303\251$x'`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCutVmlinuxRefuses(t *testing.T) {
	long := make([]byte, 0x300)
	copy(long[0x202:], "HdrS")
	for _, image := range [][]byte{nil, make([]byte, 0x300), long} {
		if _, err := cutVmlinux(t.Context(), image); err == nil {
			t.Errorf("an image of %d bytes that is none was taken", len(image))
		}
	}
}
