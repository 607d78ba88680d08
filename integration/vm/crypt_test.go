package vm

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/mounts"
)

// TestCryptAndLoss boots a machine with device-mapper and a configured key.
func TestCryptAndLoss(t *testing.T) {
	dir := t.TempDir()
	key, conf, guest := filepath.Join(dir, "key"), filepath.Join(dir, "config.json"), filepath.Join(dir, "guest")
	config, err := json.Marshal(mounts.DriveConfig{
		StateDir: "/var/lib/ide49",
		Rules:    []mounts.DriveRule{{Match: mounts.DriveMatch{Label: "SECRET"}, KeyFile: "/etc/key"}, {Match: mounts.DriveMatch{Label: "OTHERKEY"}, KeyFile: "/etc/hosts"}},
	})
	if err := errors.Join(err, os.WriteFile(conf, config, 0o600), os.WriteFile(key, []byte("passphrase"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := command(t.Context(), "", "", "env", "CGO_ENABLED=0", "go", "build", "-o", guest, "./guest"); err != nil {
		t.Fatal(err)
	}
	m, err := Start(t.Context(), Config{
		Modules:  []string{"dm-mod", "dm-crypt", "xts", "aes_generic", "sha256_generic", "algif_skcipher", "algif_hash", "cbc", "ecb"},
		Programs: []string{"cryptsetup", "mkfs.ext4"},
		Files:    map[string]string{"/usr/bin/guest": guest, "/etc/key": key, "/etc/hosts": conf, "/var/lib/ide49/config.json": conf},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	r := &rig{Machine: m}
	r.sh(t, "guest drives /var/lib/ide49 /run/drives </dev/null >/run/drives.out 2>&1 &")
	r.wait(t, "guest ask list")
	t.Run("encrypted", func(t *testing.T) { testEncrypted(t, r) })
	t.Run("loss", func(t *testing.T) { testLoss(t, r) })
}

// testEncrypted opens an encrypted drive by its key file, makes a file system
// in it, and pulls it out while it is mounted.
func testEncrypted(t *testing.T, r *rig) {
	r.plug(t, Drive{ID: "other", Image: image(t, Volume{Type: "luks2", Label: "OTHERKEY"})})
	r.until(t, "the wrong key is told", func() bool {
		list := r.list(t)
		return len(list) == 1 && list[0].State == mounts.DriveLocked && strings.Contains(list[0].Reason, "/etc/hosts does not open it")
	})
	r.pull(t, "other")
	r.clean(t)

	d := Drive{ID: "secret", Serial: "4C530001", Image: image(t, Volume{Type: "luks2", Label: "SECRET"})}
	r.plug(t, d)
	r.listed(t, "dm-0", mounts.DriveLeft) // opened, and nothing in it
	r.sh(t, "mkfs.ext4 -q -L INNER /dev/dm-0 && echo change >/sys/block/dm-0/uevent")
	inner := r.listed(t, "dm-0", mounts.DriveMounted)
	if inner.Path != "/mnt/INNER" || inner.Serial != d.Serial || inner.Plugging.Under == nil || len(r.list(t)) != 1 {
		t.Errorf("listed: %+v", r.list(t))
	}
	r.sh(t, "echo content >/mnt/INNER/file; sync")
	r.pull(t, d.ID)
	r.clean(t)
	r.wait(t, "[ ! -e /sys/block/dm-0 ]")
	// In again: it is opened and mounted by itself, and ejected whole.
	r.plug(t, d)
	r.listed(t, "dm-0", mounts.DriveMounted)
	if out := r.sh(t, "cat /mnt/INNER/file"); strings.TrimSpace(out) != "content" {
		t.Errorf("file has %q", out)
	}
	out := r.sh(t, "guest ask eject INNER")
	if !strings.Contains(out, `"Safe":true`) || !strings.Contains(out, `"Power":true`) {
		t.Errorf("ejected: %s", out)
	}
	r.wait(t, "[ ! -e /sys/block/dm-0 ] && [ ! -e /mnt/INNER ]")
}

// testLoss pulls drives out and expects to be told of losses, and of those
// only.
func testLoss(t *testing.T, r *rig) {
	for _, tt := range []struct {
		name, kind, before string
		loss               bool
	}{
		{"idle", "ext4", "sleep 6", false},
		{"synced", "ext4", "echo x >/mnt/DRIVE/f; sync; sleep 1", false},
		{"written", "ext4", "dd if=/dev/zero of=/mnt/DRIVE/f bs=1k count=300", true},
		{"written again", "ext4", "dd if=/dev/zero of=/mnt/DRIVE/f bs=1k count=300; sync; dd if=/dev/urandom of=/mnt/DRIVE/f bs=1k count=300 conv=notrunc; sleep 6", true},
		{"synced", "vfat", "echo x >/mnt/DRIVE/f; sync; sleep 1", false},
		{"written", "vfat", "dd if=/dev/zero of=/mnt/DRIVE/f bs=1k count=300", true},
		{"written", "exfat", "dd if=/dev/zero of=/mnt/DRIVE/f bs=1k count=300", true},
	} {
		t.Run(tt.kind+" "+tt.name, func(t *testing.T) {
			v := Volume{Type: tt.kind, Label: "DRIVE-" + strings.ToUpper(tt.kind)}
			d := Drive{ID: "drive", Image: image(t, v)}
			r.plug(t, d)
			var dir string
			r.until(t, "it is mounted", func() bool {
				list := r.list(t)
				if len(list) == 1 && list[0].State == mounts.DriveMounted {
					dir = list[0].Path
				}
				return dir != ""
			})
			r.sh(t, "sleep 1; "+strings.ReplaceAll(tt.before, "/mnt/DRIVE", dir)+" 2>/dev/null")
			r.pull(t, d.ID)
			r.clean(t)
			var last event
			r.until(t, "it is told", func() bool {
				out := strings.TrimSpace(r.sh(t, "tail -n 1 /run/drives"))
				return json.Unmarshal([]byte(out), &last) == nil && last.Kind == "removed"
			})
			if last.Loss != tt.loss {
				t.Errorf("loss %v, want %v\n%s", last.Loss, tt.loss, r.sh(t, "dmesg | tail -n 8"))
			}
		})
	}
}

// event is what the guest's log of drives tells; see guest/drives.go.
type event struct {
	Kind string
	Loss bool
}
