package vm

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/mounts"
)

// options are expected of each kind of file system, beside those of every one.
var options = map[string][]string{
	"vfat":    {"uid=1000", "gid=100", "utf8", "shortname=mixed", "flush"},
	"exfat":   {"uid=1000", "gid=100", "iocharset=utf8", "errors=remount-ro"},
	"ext4":    {"errors=remount-ro"},
	"fuseblk": {"allow_other"},
}

// checkMount checks kind and options of a mount.
func checkMount(t *testing.T, r *rig, dir, kind string, readOnly bool) {
	t.Helper()
	m := r.mounted(t, dir)
	if m.FSType != kind {
		t.Errorf("%s is mounted as %s, want %s", dir, m.FSType, kind)
	}
	have := strings.Split(m.Options, ",")
	have = append(have, strings.Split(m.VFSOptions, ",")...)
	want := []string{"nosuid", "nodev", "noexec", "noatime", "rw"}
	if readOnly {
		want[len(want)-1] = "ro"
	}
	for _, o := range append(want, options[kind]...) {
		if readOnly && (o == "flush" || o == "errors=remount-ro") {
			continue // they are about writing
		}
		if !slices.Contains(have, o) {
			t.Errorf("%s (%s) lacks the option %s, has %q", dir, kind, o, have)
		}
	}
	_, code, err := r.Run(t.Context(), fmt.Sprintf("echo content >'%s/file' && sync && [ \"$(cat '%[1]s/file')\" = content ]", dir))
	if err != nil {
		t.Fatal(err)
	}
	if readOnly == (code == 0) {
		t.Errorf("writing to %s: exit code %d, read-only: %v", dir, code, readOnly)
	}
}

// TestDrives plugs drives into a virtual machine and pulls them out. All cases
// share one boot; each leaves the machine clean.
func TestDrives(t *testing.T) {
	r := newRig(t)
	cases := []struct {
		name string
		run  func(*testing.T, *rig)
	}{
		{"FAT stick", testFAT},
		{"exFAT without partition table", testExFAT},
		{"ext4 partitions, one without label", testExt4},
		{"NTFS", testNTFS},
		{"two sticks with one label", testSameLabel},
		{"read-only stick", testReadOnly},
		{"dirty stick", testDirty},
		{"hostile labels", testLabels},
		{"not for mounting", testLeftAlone},
		{"card reader", testCardReader},
		{"uas", testUAS},
		{"pulled out busy", testBusy},
		{"pulled out while written to", testWritten},
		{"replugged under another name", testOtherName},
		{"storm of plugs", testStorm},
		{"flood of events", testFlood},
		{"service killed and started again", testKilled},
		{"in a container", testContainer},
	}
	if *soak > 1 {
		t.Run("more file systems", func(t *testing.T) {
			t.Cleanup(func() { r.clean(t) })
			testMore(t, r)
		})
	}
	for i := range *soak {
		if i > 0 {
			// Names are remembered; each round makes its own drives.
			r.stop(t, "TERM")
			r.sh(t, "rm -r /var/lib/ide49")
			r.serve(t, "guest drives")
		}
		for _, c := range cases {
			name := c.name
			if *soak > 1 {
				name = fmt.Sprintf("%s %d", name, i+1)
			}
			t.Run(name, func(t *testing.T) {
				t.Cleanup(func() { r.clean(t) })
				c.run(t, r)
			})
		}
	}
	t.Run("reaction times", func(t *testing.T) { testReactions(t, r) })
}

func testFAT(t *testing.T, r *rig) {
	for _, table := range []string{"", "dos"} {
		v := Volume{Type: "vfat", Label: "STICK"}
		d := Drive{ID: "stick" + table, Serial: "4C530001"}
		if d.Image = ""; table == "" {
			d.Image = image(t, v)
		} else {
			d.Image = disk(t, table, v)
		}
		r.plug(t, d)
		checkMount(t, r, "/mnt/STICK"+map[string]string{"": "", "dos": "-2"}[table], "vfat", false)
		list := r.list(t)
		if len(list) != 1 || list[0].Label != "STICK" || list[0].Serial != "4C530001" || list[0].Type != "vfat" || list[0].Size == 0 || list[0].Used == 0 {
			t.Errorf("listed: %+v", list)
		}
		// Out without a file open, and in again: the file is there.
		r.pull(t, d.ID)
		r.clean(t)
		r.plug(t, d)
		r.mounted(t, "/mnt/STICK"+map[string]string{"": "", "dos": "-2"}[table])
		r.sh(t, "[ \"$(cat /mnt/STICK*/file)\" = content ]")
		r.pull(t, d.ID)
		r.clean(t)
	}
}

func testExFAT(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "stick", Image: image(t, Volume{Type: "exfat", Label: "Camera"})})
	checkMount(t, r, "/mnt/Camera", "exfat", false)
}

func testExt4(t *testing.T, r *rig) {
	uuid := "c0ffee00-0000-4000-8000-000000000001"
	r.plug(t, Drive{ID: "stick", Image: disk(t, "dos",
		Volume{Type: "ext4", Label: "first"}, Volume{Type: "ext4", Options: []string{"-U", uuid}})})
	checkMount(t, r, "/mnt/first", "ext4", false)
	checkMount(t, r, "/mnt/QEMU-HARDDISK-c0ffee00", "ext4", false)
}

func testNTFS(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "stick", Image: disk(t, "gpt", Volume{Type: "ntfs", Label: "Windows"})})
	checkMount(t, r, "/mnt/Windows", "fuseblk", false)
}

// testSameLabel checks that names belong to file systems, not to the order in
// which they are plugged in.
func testSameLabel(t *testing.T, r *rig) {
	one := Drive{ID: "one", Image: image(t, Volume{Type: "ext4", Label: "SAME"})}
	two := Drive{ID: "two", Image: image(t, Volume{Type: "vfat", Label: "SAME"})}
	base := "/mnt/SAME"
	r.plug(t, one)
	first := r.only(t)
	if !strings.HasPrefix(first.Path, base) {
		t.Fatalf("mounted at %s", first.Path)
	}
	r.plug(t, two)
	r.until(t, "both are mounted", func() bool { return r.count(t, mounts.DriveMounted) == 2 })
	second := r.list(t)[0]
	if second.Path == first.Path {
		second = r.list(t)[1]
	}
	checkMount(t, r, first.Path, "ext4", false)
	checkMount(t, r, second.Path, "vfat", false)
	r.pull(t, one.ID)
	r.pull(t, two.ID)
	r.clean(t)
	r.plug(t, two)
	checkMount(t, r, second.Path, "vfat", false)
	r.plug(t, one)
	checkMount(t, r, first.Path, "ext4", false)
}

// only waits until just one drive is mounted and returns it.
func (r *rig) only(t *testing.T) mounts.Drive {
	t.Helper()
	r.until(t, "one drive is mounted", func() bool { return r.count(t, mounts.DriveMounted) == 1 && len(r.list(t)) == 1 })
	return r.list(t)[0]
}

func (r *rig) count(t *testing.T, state mounts.DriveState) int {
	t.Helper()
	n := 0
	for _, d := range r.list(t) {
		if d.State == state {
			n++
		}
	}
	return n
}

func testReadOnly(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "fat", ReadOnly: true, Image: image(t, Volume{Type: "vfat", Label: "LOCKEDFAT"})})
	r.plug(t, Drive{ID: "ext", ReadOnly: true, Image: image(t, Volume{Type: "ext4", Label: "lockedext"})})
	r.plug(t, Drive{ID: "ntfs", ReadOnly: true, Image: image(t, Volume{Type: "ntfs", Label: "lockedntfs"})})
	checkMount(t, r, "/mnt/LOCKEDFAT", "vfat", true)
	checkMount(t, r, "/mnt/lockedext", "ext4", true)
	checkMount(t, r, "/mnt/lockedntfs", "fuseblk", true)
	for _, d := range r.list(t) {
		if !d.ReadOnly || d.Reason == "" {
			t.Errorf("%s: read-only %v, reason %q", d.Name, d.ReadOnly, d.Reason)
		}
	}
}

// testDirty plugs in drives that were not unmounted; one of them can't be
// written to, so its journal must be left alone.
func testDirty(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "fat", Image: image(t, Volume{Type: "vfat", Label: "DIRTYFAT", Dirty: true})})
	r.plug(t, Drive{ID: "ex", Image: image(t, Volume{Type: "exfat", Label: "dirtyexfat", Dirty: true})})
	ext := Drive{ID: "ext", Image: image(t, Volume{Type: "ext4", Label: "dirtyext"})}
	r.plug(t, ext)
	checkMount(t, r, "/mnt/DIRTYFAT", "vfat", false)
	checkMount(t, r, "/mnt/dirtyexfat", "exfat", false)
	checkMount(t, r, "/mnt/dirtyext", "ext4", false)
	// The check has mended them before the kernel saw them.
	if out := r.sh(t, "dmesg"); strings.Contains(out, "not properly unmounted") {
		t.Errorf("a dirty volume was mounted unchecked:\n%s", out[max(0, len(out)-1000):])
	}
	r.pull(t, ext.ID)
	ext.ReadOnly = true
	r.wait(t, "[ ! -e /mnt/dirtyext ]")
	r.plug(t, ext)
	checkMount(t, r, "/mnt/dirtyext", "ext4", true)
}

func testLabels(t *testing.T, r *rig) {
	cases := []struct{ fs, label, folder string }{
		{"ext4", "a/b", "a_b"},
		{"ext4", "../../etc", "_._.._etc"},
		{"ext4", "x=y", "x=y"},
		{"exfat", "two words", "two words"},
		{"ext4", "new\nline", "new_line"},
		{"ext4", ".hidden", "_hidden"},
		{"ext4", "tab\tesc\x1b[2J", "tab_esc_[2J"},
		{"exfat", "Gärten 中文", "Gärten 中文"},
		{"ext4", "bad\xff\xfeutf", "bad_utf"},
		{"ext4", `back\slash\040`, `back\slash\040`},
		{"ntfs", strings.Repeat("中", 100), strings.Repeat("中", 42)}, // cut at 128 bytes
		{"vfat", `FAT/=:*"'`, `FAT_=:*"'`},
	}
	var volumes []Volume
	for _, c := range cases {
		volumes = append(volumes, Volume{Type: c.fs, Label: c.label, Size: 40 * mebi})
	}
	r.plug(t, Drive{ID: "stick", Image: disk(t, "gpt", volumes...)})
	r.until(t, "all are mounted", func() bool { return r.count(t, mounts.DriveMounted) == len(cases) })
	for _, c := range cases {
		m := r.mounted(t, "/mnt/"+c.folder)
		if want := map[string]string{"ntfs": "fuseblk"}[c.fs]; m.FSType != c.fs && m.FSType != want {
			t.Errorf("label %q: %s at %s, want %s", c.label, m.FSType, m.Mountpoint, c.fs)
		}
	}
	// Two dots name no folder: such a drive is named after its model.
	r.plug(t, Drive{ID: "dots", Image: image(t, Volume{Type: "ext4", Label: "..", Options: []string{"-U", "d0d0d0d0-0000-4000-8000-000000000002"}})})
	r.mounted(t, "/mnt/QEMU-HARDDISK-d0d0d0d0")
}

// testLeftAlone checks that what is no drive of a user is told, not mounted.
func testLeftAlone(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "none", Image: image(t, Volume{})})
	d := r.listed(t, "sda", mounts.DriveLeft)
	if d.Reason == "" || d.Remedy == "" {
		t.Errorf("an empty disk has no reason or remedy: %+v", d)
	}
	r.plug(t, Drive{ID: "swap", Image: image(t, Volume{Type: "swap"})})
	if d := r.listed(t, "sdb", mounts.DriveLeft); d.Reason == "" {
		t.Errorf("swap has no reason: %+v", d)
	}
	r.plug(t, Drive{ID: "luks", Image: image(t, Volume{Type: "luks2", Label: "secret"})})
	if d := r.listed(t, "sdc", mounts.DriveLocked); d.Reason == "" || d.Remedy == "" {
		t.Errorf("an encrypted disk has no reason or remedy: %+v", d)
	}
	r.plug(t, Drive{ID: "balena", Image: disk(t, "dos", Volume{Type: "ext4", Label: "resin-data"})})
	if d := r.listed(t, "sdd1", mounts.DriveLeft); d.Reason == "" {
		t.Errorf("a disk of balena has no reason: %+v", d)
	}
	for _, m := range r.table(t) {
		if strings.HasPrefix(m.Mountpoint, "/mnt/") {
			t.Errorf("%s is mounted at %s", m.Source, m.Mountpoint)
		}
	}
}

func testCardReader(t *testing.T, r *rig) {
	reader := Drive{ID: "reader", Kind: CardReader}
	r.plug(t, reader)
	r.listed(t, "sda", mounts.DriveEmpty)
	first := disk(t, "dos", Volume{Type: "vfat", Label: "CARD1"})
	second := image(t, Volume{Type: "exfat", Label: "CARD2"})
	third := disk(t, "dos", Volume{Type: "vfat", Label: "CARD1"}, Volume{Type: "ext4", Label: "more"})
	insert := func(image string) {
		t.Helper()
		if err := r.Insert(t.Context(), "reader", image); err != nil {
			t.Fatal(err)
		}
	}
	eject := func(dirs ...string) {
		t.Helper()
		if err := r.Eject(t.Context(), "reader"); err != nil {
			t.Fatal(err)
		}
		for _, dir := range dirs {
			r.wait(t, "[ ! -e "+dir+" ]")
		}
		r.listed(t, "sda", mounts.DriveEmpty)
	}
	insert(first)
	checkMount(t, r, "/mnt/CARD1", "vfat", false)
	eject("/mnt/CARD1")
	insert(second)
	checkMount(t, r, "/mnt/CARD2", "exfat", false)
	eject("/mnt/CARD2")
	insert(third)
	checkMount(t, r, "/mnt/more", "ext4", false)
	r.until(t, "both are mounted", func() bool { return r.count(t, mounts.DriveMounted) == 2 })
	// Swapped at once, within one polling period.
	if err := r.Eject(t.Context(), "reader"); err != nil {
		t.Fatal(err)
	}
	fresh := image(t, Volume{Type: "exfat", Label: "FRESH"})
	insert(fresh)
	checkMount(t, r, "/mnt/FRESH", "exfat", false)
	r.wait(t, "[ ! -e /mnt/more ]")
	r.pull(t, "reader")
	// Nothing of the old card's file systems went to the new one.
	if _, err := command(t.Context(), "", "", "fsck.exfat", "-n", fresh); err != nil {
		t.Error(err)
	}
}

func testUAS(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "case", Kind: UAS, Serial: "UAS1", Image: disk(t, "gpt",
		Volume{Type: "ext4", Label: "uas-ext"}, Volume{Type: "exfat", Label: "uas-exfat"})})
	checkMount(t, r, "/mnt/uas-ext", "ext4", false)
	checkMount(t, r, "/mnt/uas-exfat", "exfat", false)
	if out := r.sh(t, "readlink -f /sys/block/sda/device/../../../driver"); !strings.HasSuffix(strings.TrimSpace(out), "/uas") {
		t.Errorf("the driver is %s", out)
	}
}

// testBusy pulls out drives on which a process has a file open and its working
// folder.
func testBusy(t *testing.T, r *rig) {
	for _, v := range []Volume{
		{Type: "vfat", Label: "BUSYFAT"}, {Type: "ext4", Label: "busyext"},
		{Type: "exfat", Label: "busyexfat"}, {Type: "ntfs", Label: "busyntfs"},
	} {
		d := Drive{ID: "stick", Image: image(t, v)}
		r.plug(t, d)
		dir := "/mnt/" + v.Label
		r.mounted(t, dir)
		// It goes on until it is told to stop, whatever writing answers.
		r.sh(t, "rm -f /run/stop; echo x >'"+dir+"/open'; (cd '"+dir+"'; exec 5>>open; while [ ! -e /run/stop ]; do echo line >&5; ls; sleep 0.1; done) </dev/null >/dev/null 2>&1 &")
		r.pull(t, d.ID)
		r.wait(t, "[ ! -e '"+dir+"' ] && ! grep -q '"+dir+"' /proc/self/mountinfo")
		// In again, while the old mount still has its user.
		r.plug(t, d)
		r.mounted(t, dir)
		r.sh(t, "touch /run/stop; echo more >'"+dir+"/more' && sync")
		r.pull(t, d.ID)
		r.clean(t)
	}
}

// testWritten pulls out drives while a careless program writes to them by
// path. Whatever it does, nothing may land below the mount folder.
func testWritten(t *testing.T, r *rig) {
	for _, v := range []Volume{
		{Type: "vfat", Label: "WRITTENFAT"}, {Type: "ext4", Label: "written"}, {Type: "exfat", Label: "writtenex"},
	} {
		d := Drive{ID: "stick", Image: image(t, v)}
		r.plug(t, d)
		dir := "/mnt/" + v.Label
		r.mounted(t, dir)
		r.sh(t, "rm -f /run/writer; guest write '"+dir+"' /run/writer </dev/null >/run/writer.out 2>&1 & echo $! >/run/writer.pid")
		r.wait(t, "[ -e '"+dir+"/file-20' ]")
		r.pull(t, d.ID)
		r.wait(t, "! grep -q '"+dir+"' /proc/self/mountinfo")
		r.wait(t, "[ ! -e '"+dir+"' ] || [ -n \"$(ls -A '"+dir+"')\" ]")
		r.sh(t, "kill $(cat /run/writer.pid)")
		if out := r.sh(t, "ls -lA /mnt"); !strings.HasPrefix(strings.TrimSpace(out), "total 0") || strings.Contains(out, v.Label) {
			t.Errorf("%s was pulled out and something was written below the folder: %s\n%s", v.Type, out, r.sh(t, "ls -la '"+dir+"'; cat /run/writer"))
			r.sh(t, "rm -rf '"+dir+"'")
		}
		r.clean(t)
	}
}

// testOtherName plugs a drive in again while its old name is still pinned, so
// that it gets another.
func testOtherName(t *testing.T, r *rig) {
	d := Drive{ID: "stick", Image: disk(t, "dos", Volume{Type: "ext4", Label: "renamed"})}
	r.plug(t, d)
	checkMount(t, r, "/mnt/renamed", "ext4", false)
	first := r.only(t).Device
	r.sh(t, "rm -f /run/stop; (cd /mnt/renamed; while [ ! -e /run/stop ]; do sleep 0.1; done) </dev/null >/dev/null 2>&1 &")
	r.pull(t, d.ID)
	r.wait(t, "[ ! -e /mnt/renamed ]")
	r.plug(t, d)
	m := r.mounted(t, "/mnt/renamed")
	if second := r.only(t).Device; second == first || m.Source != "/dev/"+second {
		t.Errorf("was %s, is %s, mounted %s", first, second, m.Source)
	}
	r.sh(t, "[ \"$(cat /mnt/renamed/file)\" = content ]; touch /run/stop")
	r.pull(t, d.ID)
	r.clean(t)
}

// testStorm plugs and pulls faster than anything can be mounted.
func testStorm(t *testing.T, r *rig) {
	drives := []Drive{
		{ID: "a", Image: image(t, Volume{Type: "vfat", Label: "STORMA"})},
		{ID: "b", Image: image(t, Volume{Type: "exfat", Label: "stormb"})},
		{ID: "c", Image: disk(t, "gpt", Volume{Type: "ext4", Label: "stormc"}, Volume{Type: "ext4", Label: "stormd"})},
	}
	// The pauses spread the pulls over all stages of finding and mounting.
	for i := range 20 {
		d := drives[i%len(drives)]
		r.plug(t, d)
		time.Sleep(time.Duration(i) * 120 * time.Millisecond)
		r.pull(t, d.ID)
	}
	r.clean(t)
	for _, d := range drives {
		r.plug(t, d)
	}
	for dir, kind := range map[string]string{"STORMA": "vfat", "stormb": "exfat", "stormc": "ext4", "stormd": "ext4"} {
		checkMount(t, r, "/mnt/"+dir, kind, false)
	}
}

// moreModules are what testMore needs. f2fs asks for crc32 by its name only.
var moreModules = []string{"xfs", "btrfs", "crc32_generic", "f2fs", "isofs", "udf"}

// testMore mounts what else is found on drives.
func testMore(t *testing.T, r *rig) {
	if err := r.Load(t.Context(), moreModules...); err != nil {
		t.Fatal(err)
	}
	for _, v := range []Volume{
		{Type: "xfs", Label: "an-xfs", Size: 320 * mebi}, {Type: "btrfs", Label: "a btrfs", Size: 128 * mebi},
		{Type: "f2fs", Label: "an f2fs"}, {Type: "udf", Label: "a udf"},
		{Type: "iso9660", Label: "A_DISC"}, {Type: "ext2", Label: "an ext2"}, {Type: "ext3", Label: "an ext3"},
	} {
		d := Drive{ID: "stick", Image: image(t, v)}
		r.plug(t, d)
		checkMount(t, r, "/mnt/"+v.Label, v.Type, v.Type == "iso9660")
		r.pull(t, d.ID)
		r.clean(t)
	}
}

// testFlood makes more events than anybody wants to read, while drives come.
func testFlood(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "a", Image: image(t, Volume{Type: "vfat", Label: "FLOODA"})})
	checkMount(t, r, "/mnt/FLOODA", "vfat", false)
	device := r.only(t).Device
	r.sh(t, "rm -f /run/flooded; (i=0; while [ $i -lt 3000 ]; do echo change >/sys/block/"+device+"/uevent; i=$((i+1)); done; touch /run/flooded) </dev/null >/dev/null 2>&1 &")
	r.plug(t, Drive{ID: "b", Image: disk(t, "dos", Volume{Type: "ext4", Label: "floodb"})})
	checkMount(t, r, "/mnt/floodb", "ext4", false)
	r.pull(t, "a")
	r.wait(t, "[ ! -e /mnt/FLOODA -a -e /run/flooded ]")
	checkMount(t, r, "/mnt/floodb", "ext4", false)
}

// testKilled kills the service while drives are mounted.
func testKilled(t *testing.T, r *rig) {
	stays := Drive{ID: "stays", Image: disk(t, "dos", Volume{Type: "ext4", Label: "stays"})}
	goes := Drive{ID: "goes", Image: image(t, Volume{Type: "vfat", Label: "GOES"})}
	r.plug(t, stays)
	before := r.mounted(t, "/mnt/stays").ID
	r.plug(t, goes)
	r.mounted(t, "/mnt/GOES")
	r.stop(t, "KILL")
	r.pull(t, goes.ID)
	r.plug(t, Drive{ID: "comes", Image: image(t, Volume{Type: "exfat", Label: "comes"})})
	r.wait(t, "grep -q 'sd[a-z]$' /proc/partitions")
	r.serve(t, "guest drives")
	checkMount(t, r, "/mnt/comes", "exfat", false)
	r.wait(t, "[ ! -e /mnt/GOES ]")
	if after := r.mounted(t, "/mnt/stays").ID; after != before {
		t.Errorf("the drive that stayed was mounted anew: mount %d, was %d", after, before)
	}
	// Asked to end, it unmounts what nobody uses, and what is used stays.
	r.sh(t, "rm -f /run/stop; (cd /mnt/stays; while [ ! -e /run/stop ]; do sleep 0.1; done) </dev/null >/dev/null 2>&1 &")
	r.stop(t, "TERM")
	if out := r.sh(t, "ls /mnt; touch /run/stop"); out != "stays\n" {
		t.Errorf("after the service ended there are %q", out)
	}
	r.serve(t, "guest drives")
	checkMount(t, r, "/mnt/stays", "ext4", false)
	checkMount(t, r, "/mnt/comes", "exfat", false)
}

// testContainer runs the service as process 1 of a container: namespaces of
// its own, a /dev that gains no nodes, and /mnt shared with the host.
func testContainer(t *testing.T, r *rig) {
	r.stop(t, "TERM")
	r.serve(t, `unshare -m -n -p -f --propagation shared sh -c '
		mount --make-private /dev && mount -t tmpfs tmpfs /dev &&
		mknod /dev/null c 1 3 && mknod /dev/fuse c 10 229 &&
		mount --make-private /proc && mount -t proc proc /proc &&
		exec guest drives "$@"' guest`)
	t.Cleanup(func() {
		r.stop(t, "TERM")
		r.serve(t, "guest drives")
	})
	for _, v := range []Volume{{Type: "vfat", Label: "BOXFAT"}, {Type: "ext4", Label: "boxext"}, {Type: "ntfs", Label: "boxntfs"}} {
		d := Drive{ID: "stick", Image: disk(t, "gpt", v)}
		r.plug(t, d)
		kind := v.Type
		if kind == "ntfs" {
			kind = "fuseblk"
		}
		// Seen on the host, where this script runs.
		checkMount(t, r, "/mnt/"+v.Label, kind, false)
		r.pull(t, d.ID)
		r.clean(t)
	}
}

// testReactions measures how long the service takes, by the witness and the
// clock of the guest: for warm, single plugs of a clean stick with one
// partition, and for the pulls. What the host did besides is taken off; since
// that is an estimate, a busy host gets three tries.
func testReactions(t *testing.T, r *rig) {
	master := disk(t, "dos", Volume{Type: "vfat", Label: "WARM"})
	for try := 1; ; try++ {
		up, down, slow := measure(t, r, master, try)
		t.Logf("mounts after the partition's event: median %v, of %v", median(up), up)
		t.Logf("unmounts after the event: median %v, of %v", median(down), down)
		t.Logf("other programs on this host made the machine %.1f times slower", slow)
		mount := time.Duration(float64(median(up)) / slow)
		unmount := time.Duration(float64(median(down)) / slow)
		if mount <= 300*time.Millisecond && unmount <= time.Second {
			return
		}
		if try == 3 {
			t.Fatalf("drives are mounted %v and unmounted %v after the kernel's event (median, without the host's other work), want at most 300 ms and 1 s", mount, unmount)
		}
	}
}

// measure plugs and pulls copies of a stick, and returns the sorted times of
// the mounts and unmounts, without the first, and how busy the host was.
func measure(t *testing.T, r *rig, master string, try int) (up, down []reaction, slow float64) {
	t.Helper()
	const rounds = 9
	seen, before := len(r.notes(t)), r.hostTime(t)
	for i := range rounds {
		// A new copy each time: a stick that was pulled out is dirty, and is
		// checked before it is mounted.
		d := Drive{ID: "stick", Image: fmt.Sprintf("%s.%d.%d", master, try, i)}
		if err := duplicate(master, d.Image); err != nil {
			t.Fatal(err)
		}
		r.plug(t, d)
		r.sh(t, "guest await /mnt/WARM")
		r.mounted(t, "/mnt/WARM")
		r.pull(t, d.ID)
		r.clean(t)
	}
	slow = slowdown(before, r.hostTime(t))
	notes := r.notes(t)[seen:]
	up, down = reactions(t, notes)
	if len(up) != rounds || len(down) != rounds {
		t.Fatalf("%d mounts and %d unmounts were seen: %+v", len(up), len(down), notes)
	}
	up, down = up[1:], down[1:]
	byTime := func(a, b reaction) int { return int(a.Duration - b.Duration) }
	slices.SortFunc(up, byTime)
	slices.SortFunc(down, byTime)
	return up, down, slow
}
