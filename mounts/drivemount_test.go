package mounts

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAttempts(t *testing.T) {
	for _, tt := range []struct {
		fstype   string
		readOnly bool
		want     []string
	}{
		{"vfat", false, []string{
			"vfat rw uid=1000,gid=100,utf8=1,shortname=mixed,flush", "vfat ro uid=1000,gid=100,utf8=1,shortname=mixed"}},
		{"vfat", true, []string{"vfat ro uid=1000,gid=100,utf8=1,shortname=mixed"}},
		{"exfat", false, []string{
			"exfat rw uid=1000,gid=100,iocharset=utf8,errors=remount-ro", "exfat ro uid=1000,gid=100,iocharset=utf8,errors=remount-ro"}},
		{"ntfs", false, []string{
			"ntfs3 rw uid=1000,gid=100", "ntfs-3g rw uid=1000,gid=100,windows_names", "ntfs3 ro uid=1000,gid=100", "ntfs-3g ro uid=1000,gid=100,windows_names"}},
		{"ext4", false, []string{"ext4 rw errors=remount-ro", "ext4 ro errors=remount-ro", "ext4 ro noload"}},
		{"ext4", true, []string{"ext4 ro errors=remount-ro", "ext4 ro noload"}},
		{"xfs", false, []string{"xfs rw ", "xfs ro ", "xfs ro norecovery"}},
		{"iso9660", false, []string{"iso9660 ro uid=1000,gid=100,iocharset=utf8", "iso9660 ro uid=1000,gid=100"}},
		{"hfsplus", true, []string{"hfsplus ro uid=1000,gid=100"}},
		{"swap", false, nil},
		{"", false, nil},
	} {
		var got []string
		for _, a := range attempts(tt.fstype, DriveOptions{Owner: 1000, Group: 100}, tt.readOnly) {
			mode := "rw"
			if a.readOnly {
				mode = "ro"
			}
			got = append(got, fmt.Sprintf("%s %s %s", a.kind, mode, strings.Join(a.data, ",")))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s read-only %v:\n%q\nwant\n%q", tt.fstype, tt.readOnly, got, tt.want)
		}
	}
	for _, fstype := range []string{"vfat", "exfat", "ntfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "iso9660", "udf", "hfsplus"} {
		if !supported(fstype) || len(attempts(fstype, DriveOptions{}, true)) == 0 {
			t.Errorf("%s is not supported", fstype)
		}
		for _, a := range attempts(fstype, DriveOptions{}, false) {
			if slices.Contains(a.data, "force") || slices.Contains(a.data, "sync") {
				t.Errorf("%s: %v", fstype, a.data)
			}
		}
	}
}

func TestTries(t *testing.T) {
	ro := attempts("ext4", DriveOptions{}, false)[1]
	for err, want := range map[error]bool{
		&mountError{err: unix.EROFS}: true, &mountError{err: unix.EACCES}: true, &mountError{err: unix.EINVAL}: false,
		fmt.Errorf("x: %w", unix.EROFS): true, &mountError{err: unix.EIO}: false,
	} {
		if got := ro.tries(err); got != want {
			t.Errorf("after %v: %v", err, got)
		}
	}
	if !attempts("ntfs", DriveOptions{}, false)[2].tries(unix.EINVAL) {
		t.Error("a dirty NTFS is not tried read-only")
	}
}

// TestKernelText proves that the kernel's own words reach the user.
func TestKernelText(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q"))
	dir, err := claimDir(t.TempDir() + "/x")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	_, _, err = mountDevice(t.Context(), s.node(), dir, []attempt{{kind: "ext4", data: []string{"nosuchoption"}}, {kind: "nosuchfs"}}, false)
	var m *mountError
	if !errors.As(err, &m) || !errors.Is(err, unix.EINVAL) || !errors.Is(err, unix.ENODEV) ||
		!strings.Contains(err.Error(), "nosuchoption") || !strings.Contains(err.Error(), "no support") || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
}

// TestOldMount mounts as on a kernel without fsopen.
func TestOldMount(t *testing.T) {
	s := newSlot(t)
	s.plug(image(t, 8, "mkfs.ext4", "-q"))
	dir, err := claimDir(t.TempDir() + "/x")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := mountOld(s.node(), dir, attempt{kind: "ext4", data: []string{"errors=remount-ro"}, readOnly: true}, false); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir.path, 0) }()
	_, options := optionsAt(t, dir.path)
	for _, o := range []string{"ro", "nosuid", "nodev", "noexec", "noatime", "errors=remount-ro"} {
		if !slices.Contains(options, o) {
			t.Errorf("option %s is missing in %v", o, options)
		}
	}
	if err := mountOld(s.node(), dir, attempt{kind: "nosuchfs"}, false); !errors.Is(err, unix.ENODEV) {
		t.Error(err)
	}
	if _, err := mountIDFromFdinfo(0, dir.path); err != nil {
		t.Error(err)
	}
	a, err1 := mountID(unix.AT_FDCWD, dir.path)
	b, err2 := mountIDFromFdinfo(-1, dir.path)
	if a != b || err1 != nil || err2 != nil {
		t.Errorf("mount %d by statx, %d by fdinfo: %v, %v", a, b, err1, err2)
	}
}
