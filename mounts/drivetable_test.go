package mounts

import (
	"maps"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/udev"
	"github.com/moby/sys/mountinfo"
)

func table(t testing.TB, lines ...string) []*mountinfo.Info {
	t.Helper()
	m, err := mountinfo.GetMountsFromReader(strings.NewReader(strings.Join(lines, "\n")), nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// machine has a root on LVM over RAID over two USB disks, a btrfs, a stick,
// swap on an encrypted partition, and an SD card.
var machine = []udev.Device{
	{Name: "sda", Disk: "sda", Major: 8, Minor: 0}, {Name: "sda1", Disk: "sda", Partition: 1, Major: 8, Minor: 1},
	{Name: "sdb", Disk: "sdb", Major: 8, Minor: 16}, {Name: "sdb1", Disk: "sdb", Partition: 1, Major: 8, Minor: 17},
	{Name: "md127", Disk: "md127", Major: 9, Minor: 127, Slaves: []string{"sda1", "sdb1"}},
	{Name: "dm-0", Disk: "dm-0", Major: 253, Minor: 0, DMName: "vg-root", Slaves: []string{"md127"}},
	{Name: "sdc", Disk: "sdc", Major: 8, Minor: 32}, {Name: "sdc1", Disk: "sdc", Partition: 1, Major: 8, Minor: 33},
	{Name: "sdd", Disk: "sdd", Major: 8, Minor: 48}, {Name: "sdd1", Disk: "sdd", Partition: 1, Major: 8, Minor: 49}, {Name: "sdd2", Disk: "sdd", Partition: 2, Major: 8, Minor: 50},
	{Name: "sde", Disk: "sde", Major: 8, Minor: 64}, {Name: "sde1", Disk: "sde", Partition: 1, Major: 8, Minor: 65},
	{Name: "dm-1", Disk: "dm-1", Major: 253, Minor: 1, DMName: "cryptswap", Slaves: []string{"sde1"}},
	{Name: "mmcblk0", Disk: "mmcblk0", Major: 179, Minor: 0}, {Name: "mmcblk0p2", Disk: "mmcblk0", Partition: 2, Major: 179, Minor: 2},
}

func TestKeptDisks(t *testing.T) {
	for _, tt := range []struct {
		name  string
		ours  []string
		own   []string
		init  []string
		swaps []string
		want  map[string]string
	}{
		{
			name: "root on LVM on RAID",
			own:  []string{`27 1 253:0 / / rw - ext4 /dev/mapper/vg-root rw`},
			want: map[string]string{"dm-0": "mounted at /", "md127": "mounted at /", "sda": "mounted at /", "sdb": "mounted at /"},
		},
		{
			name: "btrfs has numbers of its own",
			own:  []string{`27 1 0:45 /@ /data rw - btrfs /dev/sdc1 rw`},
			want: map[string]string{"sdc": "mounted at /data"},
		},
		{
			name: "a container sees the host's disk in its binds",
			own:  []string{`27 1 0:50 / / rw - overlay overlay rw`, `28 27 179:2 /var/lib/docker/containers/x/hosts /etc/hosts rw - ext4 /dev/root rw`},
			want: map[string]string{"mmcblk0": "mounted at /etc/hosts"},
		},
		{
			name: "only process 1 sees it",
			own:  []string{`27 1 0:50 / / rw - overlay overlay rw`},
			init: []string{`30 1 8:49 / /media/my\040disk rw - vfat /dev/sdd1 rw`},
			want: map[string]string{"sdd": "mounted at /media/my disk"},
		},
		{
			name: "our own mount, which process 1 sees too, keeps nothing",
			ours: []string{"sdd1"},
			own:  []string{`40 1 8:49 / /mnt/A rw shared:7 - vfat /dev/sdd1 rw`},
			init: []string{`90 1 8:49 / /host/mnt/A rw shared:7 - vfat /dev/sdd1 rw`},
			want: map[string]string{},
		},
		{
			name: "our own mount beside another's on the same disk",
			ours: []string{"sdd1"},
			own:  []string{`40 1 8:49 / /mnt/A rw - vfat /dev/sdd1 rw`},
			init: []string{`91 1 8:50 / /media/B rw - ext4 /dev/sdd2 rw`},
			want: map[string]string{"sdd": "sdd2 is mounted at /media/B"},
		},
		{
			name:  "swap on an encrypted partition and on a disk",
			swaps: []string{"/dev/dm-1", "/dev/sdc", "/swapfile"},
			want:  map[string]string{"sde": "swap", "dm-1": "swap", "sdc": "swap"},
		},
		{
			name: "what is no device keeps nothing",
			own:  []string{`1 0 0:5 / /proc rw - proc sda1 rw`, `2 0 0:6 / /x rw - tmpfs sdc1 rw`, `3 0 0:7 / /n rw - nfs server:/dev/sda1 rw`, `4 0 8:200 / /y rw - ext4 /dev/sdzz rw`},
			want: map[string]string{"sda": "mounted at /n"}, // rather one too many
		},
		{
			name: "a forged line can't break the reason",
			own:  []string{`27 1 8:33 / /a\012b rw - ext4 /dev/sdc1 rw`},
			want: map[string]string{"sdc": "mounted at /a\ufffdb"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours := map[string]bool{}
			for _, name := range tt.ours {
				ours[name] = true
			}
			got := keptDisks(machine, ours, [][]*mountinfo.Info{table(t, tt.own...), table(t, tt.init...)}, tt.swaps)
			if len(got) != len(tt.want) {
				t.Errorf("kept %v, want %v", got, tt.want)
			}
			for disk, reason := range tt.want {
				if !strings.Contains(got[disk], reason) {
					t.Errorf("%s: %q, want %q", disk, got[disk], reason)
				}
			}
		})
	}
}

func TestRingOfDevices(t *testing.T) {
	ring := []udev.Device{{Name: "dm-0", Disk: "dm-0", Major: 253, Slaves: []string{"dm-1"}}, {Name: "dm-1", Disk: "dm-1", Major: 253, Minor: 1, Slaves: []string{"dm-0"}}}
	got := keptDisks(ring, nil, [][]*mountinfo.Info{table(t, `27 1 253:0 / / rw - ext4 /dev/dm-0 rw`)}, nil)
	if len(got) != 2 {
		t.Errorf("kept %v", got)
	}
}

func TestSwapDevices(t *testing.T) {
	got, err := swapDevices(strings.NewReader("Filename\t\t\tType\t\tSize\tUsed\tPriority\n/dev/sda3                               partition\t1\t0\t-2\n/swap\\040file file 1 0 -3\n\n"))
	if err != nil || len(got) != 2 || got[0] != "/dev/sda3" || got[1] != `/swap\040file` {
		t.Errorf("%q", got)
	}
}

func FuzzMountTable(f *testing.F) {
	f.Add("27 1 253:0 / / rw - ext4 /dev/mapper/vg-root rw", "header\n/dev/sda3 partition")
	f.Add("27 1 0:45 /@ /da\\012ta rw shared:1 master:2 - btrfs /dev/sdc1 rw", "")
	f.Add("27 1 0:45 /@ /data rw", "x")
	f.Fuzz(func(t *testing.T, text, swaps string) {
		m, err := mountinfo.GetMountsFromReader(strings.NewReader(text), nil)
		if err != nil {
			return
		}
		swap, err := swapDevices(strings.NewReader(swaps))
		if err != nil {
			return
		}
		kept := keptDisks(machine, nil, [][]*mountinfo.Info{m}, swap)
		known := map[string]bool{}
		for _, d := range machine {
			known[d.Disk] = true
		}
		for disk, reason := range kept {
			if !known[disk] || reason == "" || strings.ContainsAny(reason, "\n\x00") {
				t.Errorf("%q: %q", disk, reason)
			}
		}
		for _, i := range m {
			if top := topMount(m, i.Mountpoint); top == nil || top.Mountpoint != i.Mountpoint {
				t.Errorf("top of %q is %v", i.Mountpoint, top)
			}
			peerGroups(i)
		}
		if again := keptDisks(machine, nil, [][]*mountinfo.Info{m}, swap); !maps.Equal(kept, again) {
			t.Errorf("%v and then %v", kept, again)
		}
	})
}
