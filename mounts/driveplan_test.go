package mounts

import (
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/udev"
)

// part and disk are devices on USB.
func part(name string, n int) udev.Device {
	disk := strings.TrimRight(name, "0123456789")
	return udev.Device{Name: name, Disk: disk, Partition: n, Size: 1 << 30, USB: true, DiskSeq: 7, Model: "Ultra Fit", Serial: "4C53", Major: 8, Minor: uint32(n)}
}

func disk(name string, parts ...string) udev.Device {
	return udev.Device{Name: name, Disk: name, Size: 1 << 31, USB: true, DiskSeq: 7, Partitions: parts, Model: "Ultra Fit", Serial: "4C53", Major: 8}
}

func found(fstype, label, uuid string) Probe {
	return Probe{Outcome: ProbeFound, Usage: "filesystem", Type: fstype, Label: label, UUID: uuid}
}

func yes() *bool     { b := true; return &b }
func num(n int) *int { return &n }

func TestPlan(t *testing.T) {
	type want struct {
		action DriveAction
		state  DriveState
		path   string
		reason string // a part of it
		hidden bool
		ro     bool
	}
	tests := []struct {
		name string
		view DriveView
		want map[string]want
	}{
		{
			name: "not probed yet",
			view: DriveView{Devices: []udev.Device{disk("sda", "sda1"), part("sda1", 1)}},
			want: map[string]want{"sda": {hidden: true, state: DriveLeft}, "sda1": {action: ProbeDrive, state: DriveBusy}},
		},
		{
			name: "labelled partition",
			view: DriveView{
				Devices: []udev.Device{disk("sda", "sda1"), part("sda1", 1)},
				Probes:  map[string]Probe{"sda1": found("vfat", "BACKUP", "1A2B-3C4D")},
			},
			want: map[string]want{"sda1": {action: MountDrive, state: DriveReady, path: "/mnt/BACKUP"}},
		},
		{
			name: "whole disk without partitions, though blkid sees a table too",
			view: DriveView{
				Devices: []udev.Device{disk("sda")},
				Probes:  map[string]Probe{"sda": {Outcome: ProbeFound, Usage: "filesystem", Type: "exfat", Label: "CAM", UUID: "AA-BB", Table: "dos"}},
			},
			want: map[string]want{"sda": {action: MountDrive, state: DriveReady, path: "/mnt/CAM"}},
		},
		{
			name: "no label",
			view: DriveView{
				Devices: []udev.Device{part("sda1", 1), part("sda2", 2)},
				Probes: map[string]Probe{
					"sda1": found("ext4", "", "6fa459ea-ee8a-3ca4-894e-db77e160355e"),
					"sda2": found("vfat", " / ", "1A2B-3C4D"),
				},
			},
			want: map[string]want{
				"sda1": {action: MountDrive, state: DriveReady, path: "/mnt/Ultra-Fit-6fa459ea"},
				"sda2": {action: MountDrive, state: DriveReady, path: "/mnt/Ultra-Fit-1A2B3C4D"},
			},
		},
		{
			name: "two drives with one label, older plugging first",
			view: DriveView{
				Devices: []udev.Device{
					{Name: "sda", Disk: "sda", USB: true, Size: 1, DiskSeq: 9},
					{Name: "sdb", Disk: "sdb", USB: true, Size: 1, DiskSeq: 8},
				},
				Probes: map[string]Probe{"sda": found("ext4", "DATA", "u-a"), "sdb": found("ext4", "DATA", "u-b")},
			},
			want: map[string]want{
				"sda": {action: MountDrive, state: DriveReady, path: "/mnt/DATA-2"},
				"sdb": {action: MountDrive, state: DriveReady, path: "/mnt/DATA"},
			},
		},
		{
			name: "remembered names don't depend on the order",
			view: DriveView{
				Devices: []udev.Device{part("sda1", 1)},
				Probes:  map[string]Probe{"sda1": found("ext4", "DATA", "U-B")},
				Names:   Names{"ext4:u-a": "DATA", "ext4:u-b": "DATA-2"},
			},
			want: map[string]want{"sda1": {action: MountDrive, state: DriveReady, path: "/mnt/DATA-2"}},
		},
		{
			name: "the same UUID twice",
			view: DriveView{
				Devices: []udev.Device{disk("sda"), {Name: "sdb", Disk: "sdb", USB: true, Size: 1, DiskSeq: 8}},
				Probes:  map[string]Probe{"sda": found("ext4", "A", "u"), "sdb": found("ext4", "A", "u")},
				Ours:    map[string]bool{"sdb": true},
			},
			want: map[string]want{
				"sdb": {action: MountDrive, state: DriveReady, path: "/mnt/A"},
				"sda": {state: DriveFailed, reason: "same UUID as sdb"},
			},
		},
		{
			name: "folder in the way",
			view: DriveView{
				Devices:  []udev.Device{disk("sda")},
				Probes:   map[string]Probe{"sda": found("ext4", "DATA", "u-a")},
				Occupied: func(p string) bool { return p == "/mnt/DATA" || p == "/mnt/DATA-2" },
			},
			want: map[string]want{"sda": {action: MountDrive, state: DriveReady, path: "/mnt/DATA-3"}},
		},
		{
			name: "the system's disk, swap",
			view: DriveView{
				Devices: []udev.Device{disk("sda", "sda1", "sda2"), part("sda1", 1), part("sda2", 2)},
				Probes:  map[string]Probe{"sda2": found("ext4", "DATA", "u")},
				Kept:    map[string]string{"sda": "sda1 is mounted at / already"},
			},
			want: map[string]want{
				"sda":  {state: DriveLeft, reason: "mounted at /"},
				"sda1": {state: DriveLeft, reason: "mounted at /"},
				"sda2": {state: DriveLeft, reason: "mounted at /"},
			},
		},
		{
			name: "what is no drive of the user is not shown",
			view: DriveView{Devices: []udev.Device{
				{Name: "vda", Disk: "vda", Size: 1}, {Name: "loop0", Disk: "loop0"}, {Name: "dm-0", Disk: "dm-0", Size: 1, DMName: "vg-root", DMUUID: "LVM-x"},
				{Name: "nvme0c0n1", Disk: "nvme0c0n1", Size: 1, USB: true, Hidden: true},
			}},
			want: map[string]want{
				"vda": {state: DriveLeft, hidden: true}, "loop0": {state: DriveLeft, hidden: true}, "dm-0": {state: DriveLeft, hidden: true},
				"nvme0c0n1": {state: DriveLeft, hidden: true},
			},
		},
		{
			name: "named by the configuration or removable",
			view: DriveView{
				Config:  DriveConfig{Also: []string{"loop[0-4]"}},
				Devices: []udev.Device{{Name: "loop3", Disk: "loop3", Size: 1}, {Name: "loop5", Disk: "loop5", Size: 1}, {Name: "sr0", Disk: "sr0", Size: 1, Removable: true, ReadOnly: true}},
				Probes:  map[string]Probe{"loop3": found("xfs", "X", "x"), "sr0": found("iso9660", "DISC", "2026-11-23-00-00-00-00")},
			},
			want: map[string]want{
				"loop3": {action: MountDrive, state: DriveReady, path: "/mnt/X"}, "loop5": {state: DriveLeft, hidden: true},
				"sr0": {action: MountDrive, state: DriveReady, path: "/mnt/DISC"},
			},
		},
		{
			name: "empty card reader",
			view: DriveView{Devices: []udev.Device{{Name: "sdc", Disk: "sdc", USB: true, Removable: true}}},
			want: map[string]want{"sdc": {state: DriveEmpty, reason: "no medium"}},
		},
		{
			name: "things that are left alone",
			view: DriveView{
				Devices: []udev.Device{
					part("sda1", 1), part("sda2", 2), part("sda3", 3), part("sda4", 4), part("sda5", 5), part("sda6", 6), part("sda7", 7), part("sda8", 8),
					part("sdb1", 1), part("sdb2", 2), part("sdb3", 3), part("sdb4", 4), part("sdb5", 5), part("sdb6", 6),
				},
				Probes: map[string]Probe{
					"sda1": {Outcome: ProbeAmbivalent},
					"sda2": {Outcome: ProbeNothing},
					"sda3": {Outcome: ProbeUnreadable, Detail: "input/output error"},
					"sda4": {Outcome: ProbeFound, Usage: "other", Type: "swap"},
					"sda5": {Outcome: ProbeFound, Usage: "raid", Type: "LVM2_member"},
					"sda6": {Outcome: ProbeFound, Usage: "raid", Type: "linux_raid_member"},
					"sda7": {Outcome: ProbeFound, Usage: "crypto", Type: "BitLocker"},
					"sda8": {Outcome: ProbeFound, Usage: "filesystem", Type: "reiserfs"},
					"sdb1": found("vfat", "resin-boot", "1"),
					"sdb2": {Outcome: ProbeFound, PartType: "0x5", Table: "dos"},
					"sdb3": {Outcome: ProbeFound, Usage: "filesystem", Type: "vfat", UUID: "2", PartType: "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"},
					"sdb4": {Outcome: ProbeFound, Table: "gpt"},
					"sdb5": {Outcome: ProbeFound, Usage: "filesystem", Type: "zfs_member"},
					"sdb6": {Outcome: ProbeFound, Usage: "crypto", Type: "crypto_LUKS", UUID: "9"},
				},
			},
			want: map[string]want{
				"sda1": {state: DriveLeft, reason: "several file systems"},
				"sda2": {state: DriveLeft, reason: "nothing that can be mounted"},
				"sda3": {state: DriveFailed, reason: "input/output error"},
				"sda4": {state: DriveLeft, reason: "swap"},
				"sda5": {state: DriveLeft, reason: "LVM"},
				"sda6": {state: DriveLeft, reason: "RAID"},
				"sda7": {state: DriveLeft, reason: "BitLocker"},
				"sda8": {state: DriveLeft, reason: "reiserfs is not supported"},
				"sdb1": {state: DriveLeft, reason: "balenaOS"},
				"sdb2": {state: DriveLeft, reason: "extended", hidden: true},
				"sdb3": {state: DriveLeft, reason: "EFI"},
				"sdb4": {state: DriveLeft, reason: "sees no partition"},
				"sdb5": {state: DriveLeft, reason: "zfs pool"},
				"sdb6": {state: DriveLocked, reason: "no key file"},
			},
		},
		{
			name: "in use by device-mapper",
			view: DriveView{
				Devices: []udev.Device{
					{Name: "sda1", Disk: "sda", Partition: 1, USB: true, Size: 1, Holders: []string{"dm-0"}},
					{Name: "dm-0", Disk: "dm-0", Size: 1, DMName: "vg-home", DMUUID: "LVM-x"},
				},
				Probes: map[string]Probe{"sda1": found("ext4", "X", "x")},
			},
			want: map[string]want{"sda1": {state: DriveLeft, reason: "part of vg-home"}},
		},
		{
			name: "encrypted with a key file",
			view: DriveView{
				Config:  DriveConfig{Rules: []DriveRule{{Match: DriveMatch{UUID: "9-9"}, KeyFile: "/key"}}},
				Devices: []udev.Device{part("sda1", 1)},
				Probes:  map[string]Probe{"sda1": {Outcome: ProbeFound, Usage: "crypto", Type: "crypto_LUKS", UUID: "9-9"}},
			},
			want: map[string]want{"sda1": {action: UnlockDrive, state: DriveReady}},
		},
		{
			name: "encrypted and opened",
			view: DriveView{
				Devices: []udev.Device{
					{Name: "sda1", Disk: "sda", Partition: 1, USB: true, Size: 1, Holders: []string{"dm-0"}},
					{Name: "dm-0", Disk: "dm-0", Size: 1, DMName: "ide49-9-9", DMUUID: "CRYPT-LUKS2-99-ide49-9-9", Slaves: []string{"sda1"}},
				},
				Probes: map[string]Probe{"sda1": {Outcome: ProbeFound, Usage: "crypto", Type: "crypto_LUKS", UUID: "9-9"}, "dm-0": found("ext4", "SECRET", "s")},
				Ours:   map[string]bool{"sda1": true},
			},
			want: map[string]want{"sda1": {state: DriveLeft, hidden: true}, "dm-0": {action: MountDrive, state: DriveReady, path: "/mnt/SECRET"}},
		},
		{
			name: "rules",
			view: DriveView{
				Config: DriveConfig{Rules: []DriveRule{
					{Match: DriveMatch{Label: "MEDIA*"}, ReadOnly: yes()},
					{Match: DriveMatch{UUID: "1a2b-3c4d"}, Path: "/srv/camera"},
					{Match: DriveMatch{Serial: "0781*"}, Ignore: true},
					{Match: DriveMatch{Label: "MEDIA/1"}, Path: "/never"},
				}},
				Devices: []udev.Device{
					part("sda1", 1), part("sda2", 2), {Name: "sdb", Disk: "sdb", USB: true, Size: 1, Serial: "0781x"},
				},
				Probes: map[string]Probe{"sda1": found("ext4", "MEDIA/1", "m"), "sda2": found("vfat", "CAM", "1A2B-3C4D")},
			},
			want: map[string]want{
				"sda1": {action: MountDrive, state: DriveReady, path: "/mnt/MEDIA_1", ro: true},
				"sda2": {action: MountDrive, state: DriveReady, path: "/srv/camera"},
				"sdb":  {state: DriveLeft, reason: "rule"},
			},
		},
		{
			name: "configured path in the way",
			view: DriveView{
				Config:   DriveConfig{Rules: []DriveRule{{Match: DriveMatch{Label: "CAM"}, Path: "/srv/camera"}}},
				Devices:  []udev.Device{part("sda1", 1)},
				Probes:   map[string]Probe{"sda1": found("vfat", "CAM", "1")},
				Occupied: func(p string) bool { return p == "/srv/camera" },
			},
			want: map[string]want{"sda1": {state: DriveFailed, reason: "not an empty folder"}},
		},
		{
			name: "one configured path for two drives",
			view: DriveView{
				Config:  DriveConfig{Rules: []DriveRule{{Match: DriveMatch{Label: "CAM*"}, Path: "/srv/camera"}}},
				Devices: []udev.Device{part("sda1", 1), part("sda2", 2)},
				Probes:  map[string]Probe{"sda1": found("vfat", "CAM1", "1"), "sda2": found("vfat", "CAM2", "2")},
			},
			want: map[string]want{
				"sda1": {action: MountDrive, state: DriveReady, path: "/srv/camera"},
				"sda2": {state: DriveFailed, reason: "belongs to sda1"},
			},
		},
		{
			name: "asked for",
			view: DriveView{
				Devices: []udev.Device{{Name: "vdb", Disk: "vdb", Size: 1}},
				Probes:  map[string]Probe{"vdb": found("ext4", "X", "1")},
				Asked:   map[string]DriveMountOptions{"vdb": {At: "/srv/x", ReadOnly: true}},
			},
			want: map[string]want{"vdb": {action: MountDrive, state: DriveReady, path: "/srv/x", ro: true}},
		},
		{
			name: "asked for, but the system's",
			view: DriveView{
				Devices: []udev.Device{{Name: "vda", Disk: "vda", Size: 1}},
				Asked:   map[string]DriveMountOptions{"vda": {}},
				Kept:    map[string]string{"vda": "vda is mounted at / already"},
			},
			want: map[string]want{"vda": {state: DriveLeft, reason: "mounted at /"}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := tt.view.Config
			cfg.StateDir = "/state"
			cfg, err := cfg.withDefaults()
			if err != nil {
				t.Fatal(err)
			}
			tt.view.Config = cfg
			before := maps.Clone(tt.view.Names)
			verdicts, names := Plan(tt.view)
			if !maps.Equal(before, tt.view.Names) {
				t.Error("Plan changed its input")
			}
			if len(verdicts) != len(tt.view.Devices) {
				t.Errorf("%d verdicts for %d devices", len(verdicts), len(tt.view.Devices))
			}
			got := map[string]DriveVerdict{}
			for _, v := range verdicts {
				got[v.Device.Name] = v
			}
			for name, w := range tt.want {
				v, ok := got[name]
				if !ok {
					t.Errorf("%s: no verdict", name)
					continue
				}
				if v.Action != w.action || v.State != w.state || v.Hidden != w.hidden {
					t.Errorf("%s: action %d state %q hidden %v (%s), want %d %q %v", name, v.Action, v.State, v.Hidden, v.Reason, w.action, w.state, w.hidden)
				}
				if w.path != "" && v.Spec.Path != w.path || v.Spec.Options.ReadOnly != w.ro {
					t.Errorf("%s: at %q read-only %v, want %q %v", name, v.Spec.Path, v.Spec.Options.ReadOnly, w.path, w.ro)
				}
				if !strings.Contains(v.Reason, w.reason) || w.reason == "" && v.Action == LeaveDrive && !v.Hidden && v.Reason == "" {
					t.Errorf("%s: reason %q, want one with %q", name, v.Reason, w.reason)
				}
				if v.Action != LeaveDrive && v.Reason != "" {
					t.Errorf("%s: an action with the reason %q", name, v.Reason)
				}
			}
			// Planning again with the new names must give the same answer.
			tt.view.Names = names
			again, names2 := Plan(tt.view)
			for i := range again {
				if again[i].Spec != verdicts[i].Spec || again[i].Reason != verdicts[i].Reason {
					t.Errorf("planned again: %+v, before %+v", again[i], verdicts[i])
				}
			}
			if !maps.Equal(names, names2) {
				t.Errorf("names %v became %v", names, names2)
			}
		})
	}
}

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cfg   DriveConfig
		fails string
	}{
		{"defaults", DriveConfig{StateDir: "/s"}, ""},
		{"no state folder", DriveConfig{}, "state folder"},
		{"relative mount folder", DriveConfig{StateDir: "/s", Mount: "mnt"}, "mount folder"},
		{"root as mount folder", DriveConfig{StateDir: "/s", Mount: "/mnt/.."}, "mount folder"},
		{"unknown policy", DriveConfig{StateDir: "/s", Fsck: "always"}, "say auto or never"},
		{"empty rule", DriveConfig{StateDir: "/s", Rules: []DriveRule{{Ignore: true}}}, "matches nothing"},
		{"bad pattern", DriveConfig{StateDir: "/s", Rules: []DriveRule{{Match: DriveMatch{Label: "[a"}}}}, "pattern"},
		{"bad pattern of devices", DriveConfig{StateDir: "/s", Also: []string{"[a"}}, "pattern"},
		{"relative path", DriveConfig{StateDir: "/s", Rules: []DriveRule{{Match: DriveMatch{Label: "a"}, Path: "camera"}}}, "absolute path"},
		{"path twice", DriveConfig{StateDir: "/s", Rules: []DriveRule{{Match: DriveMatch{Label: "a"}, Path: "/c"}, {Match: DriveMatch{Label: "b"}, Path: "/c/"}}}, "both mount at /c"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := tt.cfg.withDefaults()
			if tt.fails == "" {
				if err != nil || cfg.Mount != "/mnt" || cfg.Fsck != FsckAuto || cfg.FsckLimit <= 0 || !filepath.IsAbs(cfg.RunDir) {
					t.Errorf("%+v, %v", cfg, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.fails) {
				t.Errorf("error %v, want one with %q", err, tt.fails)
			}
		})
	}
}

func TestRuleOptions(t *testing.T) {
	base := DriveOptions{ReadOnly: true, Owner: 1000, Group: 100}
	no := false
	got := DriveRule{ReadOnly: &no, Exec: yes(), Owner: num(0)}.options(base)
	if want := (DriveOptions{Exec: true, Owner: 0, Group: 100}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
