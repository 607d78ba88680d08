package vm

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestX(t *testing.T) {
	start := time.Now()
	dir := t.TempDir()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	uas := filepath.Join(dir, "uas")
	must(MakeDisk(ctx, uas, "gpt", Volume{Type: "ext4", Label: "one"}, Volume{Type: "ext4"}, Volume{Type: "vfat", Label: "a/b=c ."}))
	fat := filepath.Join(dir, "fat")
	must(Volume{Type: "vfat", Label: "STICK"}.Make(ctx, fat))
	ex := filepath.Join(dir, "ex")
	must(Volume{Type: "exfat", Label: "EX"}.Make(ctx, ex))
	m, err := Start(t.Context(), Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %v", time.Since(start))
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	sh := func(s string) {
		start := time.Now()
		out, code, err := m.Run(t.Context(), s)
		t.Logf("%s: %v\n%s\n%d %v", s, time.Since(start), out, code, err)
	}
	wait := func(s string) {
		t.Helper()
		start := time.Now()
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		out, err := m.Wait(ctx, s)
		t.Logf("%s: %v\n%s\n%v", s, time.Since(start), out, err)
	}
	must(m.Plug(ctx, Drive{ID: "a", Image: fat, Serial: "S123"}))
	wait("[ -e /sys/block/sda ] && mount /dev/sda /mnt")
	sh("ls -l /sys/block; echo hi >/mnt/x; sync; blkid -p -o udev /dev/sda; cat /sys/block/sda/diskseq; cat /sys/block/sda/device/*; echo; cat /sys/block/sda/device/../../../../../serial")
	must(m.Pull(ctx, "a"))
	wait("[ ! -e /sys/block/sda ]")
	sh("umount /mnt")
	d, err := Dirty(fat)
	t.Log(d, err)
	must(m.Plug(ctx, Drive{ID: "u", Image: uas, Kind: UAS}))
	wait("[ -e /sys/block/sda/sda3 ]")
	sh("dmesg | tail -30; blkid -p -o udev /dev/sda; for i in 1 2 3; do blkid -p -o udev /dev/sda$i; done; readlink /sys/block/sda/device/../../../driver")
	must(m.Pull(ctx, "u"))
	must(m.Plug(ctx, Drive{ID: "ro", Image: ex, ReadOnly: true}))
	wait("[ -e /sys/block/sda ]")
	sh("cat /sys/block/sda/ro")
	must(m.Plug(ctx, Drive{ID: "card", Kind: CardReader}))
	wait("[ -e /sys/block/sdb ]")
	sh("cat /sys/block/sdb/size /sys/block/sdb/removable; echo 1000 > /sys/module/block/parameters/events_dfl_poll_msecs")
	must(m.Insert(ctx, "card", fat))
	wait("blkid -p -o udev /dev/sdb")
	sh("dmesg | tail; cat /sys/block/sdb/size; cat /sys/block/*/events; ls -l /sys/block")
	must(m.Eject(ctx, "card"))
	wait("! blkid -p -o udev /dev/sdb")
	must(m.Insert(ctx, "card", fat))
	wait("blkid -p -o udev /dev/sdb")
	sh("cat /sys/block/sdb/ro")
	must(m.Pull(ctx, "card"))
	must(m.Pull(ctx, "ro"))
	_ = os.Stdout
}
