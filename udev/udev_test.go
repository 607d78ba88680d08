package udev

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func msg(lines ...string) []byte { return []byte(strings.Join(lines, "\x00") + "\x00") }

func TestParse(t *testing.T) {
	tests := []struct {
		name  string
		msg   []byte
		want  Event
		fails string
	}{
		{
			name: "partition",
			msg: msg("add@/devices/pci0/usb1/1-1/block/sda/sda1", "ACTION=add", "DEVPATH=/devices/pci0/usb1/1-1/block/sda/sda1",
				"SUBSYSTEM=block", "MAJOR=8", "MINOR=1", "DEVNAME=sda1", "DEVTYPE=partition", "DISKSEQ=12", "PARTN=1", "SEQNUM=4711"),
			want: Event{Action: Add, Name: "sda1", DevPath: "/devices/pci0/usb1/1-1/block/sda/sda1", Type: "partition",
				Major: 8, Minor: 1, DiskSeq: 12, Partition: 1, SeqNum: 4711},
		},
		{
			name: "equals sign in a value and at sign in the path",
			msg:  msg("change@/devices/a@b/block/sdb", "SUBSYSTEM=block", "DEVNAME=sdb", "LABEL=lab=el", "DISK_MEDIA_CHANGE=1"),
			want: Event{Action: Change, Name: "sdb", DevPath: "/devices/a@b/block/sdb", MediaChange: true},
		},
		{
			name: "folder in the name",
			msg:  msg("remove@/x", "SUBSYSTEM=block", "DEVNAME=cciss/c0d0"),
			want: Event{Action: Remove, Name: "cciss!c0d0", DevPath: "/x"},
		},
		{name: "empty value", msg: msg("add@/x", "SUBSYSTEM=block", "DEVNAME=sda", "X="), want: Event{Action: Add, Name: "sda", DevPath: "/x"}},
		{name: "other subsystem", msg: msg("add@/x", "SUBSYSTEM=usb"), fails: errNotBlock.Error()},
		{name: "no end", msg: []byte("add@/x"), fails: "no end of line"},
		{name: "nothing", msg: nil, fails: "no end of line"},
		{name: "no at sign", msg: msg("libudev"), fails: "instead of ACTION@PATH"},
		{name: "unknown action", msg: msg("explode@/x"), fails: "unknown action"},
		{name: "cut off", msg: []byte("add@/x\x00SUBSYSTEM=bl"), fails: "cut off"},
		{name: "no key", msg: msg("add@/x", "=value"), fails: "without a key"},
		{name: "no equals sign", msg: msg("add@/x", "value"), fails: "without a key"},
		{name: "no name", msg: msg("add@/x", "SUBSYSTEM=block"), fails: "no usable name"},
		{name: "name that leads out", msg: msg("add@/x", "SUBSYSTEM=block", "DEVNAME=.."), fails: "no usable name"},
		{name: "number", msg: msg("add@/x", "SUBSYSTEM=block", "DEVNAME=sda", "MAJOR=eight"), fails: "no number"},
		{name: "number too large", msg: msg("add@/x", "SUBSYSTEM=block", "DEVNAME=sda", "MINOR=4294967296"), fails: "no number"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u, err := parse(tt.msg)
			var e Event
			if err == nil {
				e, err = event(u)
			}
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Fatalf("error %v, want one with %q", err, tt.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			e.Env = nil
			if !equal(e, tt.want) {
				t.Errorf("got  %+v\nwant %+v", e, tt.want)
			}
		})
	}
}

func equal(a, b Event) bool {
	return a.Action == b.Action && a.Name == b.Name && a.DevPath == b.DevPath && a.Type == b.Type && a.Major == b.Major &&
		a.Minor == b.Minor && a.DiskSeq == b.DiskSeq && a.Partition == b.Partition && a.SeqNum == b.SeqNum && a.MediaChange == b.MediaChange
}

func FuzzParse(f *testing.F) {
	f.Add(msg("add@/devices/x/block/sda", "SUBSYSTEM=block", "DEVNAME=sda", "MAJOR=8", "A=b=c"))
	f.Add(msg("add@/x"))
	f.Add([]byte("add@/x"))
	f.Add([]byte("libudev\x00\xfe\xed\xca\xfe"))
	f.Add([]byte("change@a@b\x00SUBSYSTEM=block\x00DEVNAME=../../etc\x00PARTN=-1\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := parse(b)
		if err != nil {
			return
		}
		// What parsed must be made of the message and nothing else.
		total := len(u.Action) + 1 + len(u.KObj) + 1
		for k, v := range u.Env {
			if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") {
				t.Errorf("variable %q=%q", k, v)
			}
			total += len(k) + 1 + len(v) + 1
		}
		if total > len(b) {
			t.Errorf("%d bytes out of a message of %d", total, len(b))
		}
		if e, err := event(u); err == nil && (strings.Contains(e.Name, "/") || e.Name == "" || e.Name == ".." || e.Partition < 0) {
			t.Errorf("event %+v", e)
		}
	})
}

func TestFromKernel(t *testing.T) {
	for _, tt := range []struct {
		from unix.Sockaddr
		want bool
	}{
		{&unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: 0, Groups: 1}, true},
		{&unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: 4711, Groups: 1}, false},
		{&unix.SockaddrUnix{}, false},
		{nil, false},
	} {
		if got := fromKernel(tt.from); got != tt.want {
			t.Errorf("fromKernel(%+v) = %v", tt.from, got)
		}
	}
}

// tree makes files below a folder; a name with " -> " is a link.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		link, target, isLink := strings.Cut(name, " -> ")
		path := filepath.Join(root, link)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if isLink {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const stick = "devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0/host6/target6:0:0/6:0:0:0/block/sda"

func fixture(t *testing.T) string {
	port := "devices/pci0000:00/0000:00:14.0/usb1/1-2/"
	scsi := filepath.Dir(filepath.Dir(stick)) + "/"
	return tree(t, map[string]string{
		"class/block/sda -> ../../" + stick:            "",
		"class/block/sda1 -> ../../" + stick + "/sda1": "",
		stick + "/device -> ../../../6:0:0:0":          "",
		stick + "/uevent":                              "MAJOR=8\nMINOR=0\nDEVNAME=sda\nDEVTYPE=disk\nDISKSEQ=21\n",
		stick + "/size":                                "15728640\n",
		stick + "/ro":                                  "0\n",
		stick + "/removable":                           "1\n",
		stick + "/hidden":                              "0\n",
		stick + "/diskseq":                             "21\n",
		stick + "/events":                              "media_change\n",
		stick + "/events_poll_msecs":                   "-1\n",
		stick + "/sda1/uevent":                         "MAJOR=8\nMINOR=1\nDEVNAME=sda1\nDEVTYPE=partition\nDISKSEQ=21\nPARTN=1\nPARTNAME=my data\nPARTUUID=abcd-01\n",
		stick + "/sda1/partition":                      "1\n",
		stick + "/sda1/size":                           "2048\n",
		stick + "/sda1/ro":                             "1\n",
		stick + "/sda1/holders/dm-0":                   "",
		stick + "/trace/enable":                        "0\n",
		scsi + "vendor":                                "SanDisk \n",
		scsi + "model":                                 "Ultra Fit       \n",
		port + "idVendor":                              "0781\n",
		port + "serial":                                "4C530001\n",
		port + "product":                               "Ultra USB\n",
		"class/block/nvme0n1 -> ../../devices/pci/nvme/nvme0/nvme0n1": "",
		"devices/pci/nvme/nvme0/nvme0n1/uevent":                       "MAJOR=259\nMINOR=0\nDEVNAME=nvme0n1\nDEVTYPE=disk\n",
		"devices/pci/nvme/nvme0/nvme0n1/size":                         "1000\n",
		"devices/pci/nvme/nvme0/nvme0n1/device -> ../../nvme0":        "",
		"devices/pci/nvme/nvme0/serial":                               "S4EV\n",
		"devices/pci/nvme/nvme0/model":                                "Samsung SSD\n",
		"class/block/vda -> ../../devices/pci/virtio1/block/vda":      "",
		"devices/pci/virtio1/block/vda/uevent":                        "MAJOR=254\nMINOR=0\nDEVNAME=vda\nDEVTYPE=disk\nDISKSEQ=9\n",
		"devices/pci/virtio1/vendor":                                  "0x1af4\n",
		"devices/pci/virtio1/block/vda/device -> ../../../virtio1":    "",
		"class/block/dm-0 -> ../../devices/virtual/block/dm-0":        "",
		"devices/virtual/block/dm-0/uevent":                           "MAJOR=253\nMINOR=0\nDEVNAME=dm-0\nDEVTYPE=disk\nDISKSEQ=30\n",
		"devices/virtual/block/dm-0/dm/name":                          "ide49-x\n",
		"devices/virtual/block/dm-0/dm/uuid":                          "CRYPT-LUKS2-x\n",
		"devices/virtual/block/dm-0/slaves/sda1":                      "",
		// Going away: the folder is there, its attributes are not.
		"class/block/sdz -> ../../devices/gone/block/sdz":  "",
		"class/block/sdy -> ../../devices/empty/block/sdy": "",
		"devices/empty/block/sdy/queue/x":                  "",
	})
}

func TestList(t *testing.T) {
	root := fixture(t)
	devices, err := List(root)
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]Device{}
	var names []string
	for _, d := range devices {
		byName[d.Name] = d
		names = append(names, d.Name)
	}
	if want := []string{"dm-0", "nvme0n1", "sda", "sda1", "vda"}; !slices.Equal(names, want) {
		t.Fatalf("devices %v, want %v", names, want)
	}
	sda := byName["sda"]
	want := Device{
		Name: "sda", Path: stick, Major: 8, DiskSeq: 21, Disk: "sda", Size: 15728640 * 512, Removable: true, USB: true,
		Vendor: "SanDisk", Model: "Ultra Fit", Serial: "4C530001", USBPort: "devices/pci0000:00/0000:00:14.0/usb1/1-2",
		PollsMedia: true, MediaPoll: -1,
	}
	if !slices.Equal(sda.Partitions, []string{"sda1"}) || !sda.MediaPresent() || sda.IsPartition() || sda.Dev() != "8:0" {
		t.Errorf("sda is %+v", sda)
	}
	sda.Partitions = nil
	if !same(sda, want) {
		t.Errorf("sda is %+v\nwant   %+v", sda, want)
	}
	p := byName["sda1"]
	if p.Disk != "sda" || p.Partition != 1 || p.DiskSeq != 21 || p.Size != 1<<20 || !p.ReadOnly || !p.Removable || !p.USB ||
		p.PartUUID != "abcd-01" || p.PartName != "my data" || p.Serial != "4C530001" || !slices.Equal(p.Holders, []string{"dm-0"}) {
		t.Errorf("sda1 is %+v", p)
	}
	if d := byName["nvme0n1"]; d.USB || d.Serial != "S4EV" || d.Model != "Samsung SSD" {
		t.Errorf("nvme0n1 is %+v", d)
	}
	if d := byName["vda"]; d.USB || d.Vendor != "" || d.DiskSeq != 9 {
		t.Errorf("vda is %+v", d)
	}
	if d := byName["dm-0"]; d.DMName != "ide49-x" || d.DMUUID != "CRYPT-LUKS2-x" || !slices.Equal(d.Slaves, []string{"sda1"}) {
		t.Errorf("dm-0 is %+v", d)
	}
	for _, name := range []string{"sdz", "sdy", "nosuch", "", "..", "a/b"} {
		if _, err := Read(root, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Read(%q): %v", name, err)
		}
	}
	if _, err := List(filepath.Join(root, "class")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("List of a folder that is no sysfs: %v", err)
	}
}

func same(a, b Device) bool {
	return a.SamePlugging(b) && a.Path == b.Path && a.Disk == b.Disk && a.Size == b.Size && a.Removable == b.Removable && a.USB == b.USB &&
		a.Vendor == b.Vendor && a.Model == b.Model && a.Serial == b.Serial && a.USBPort == b.USBPort && a.PollsMedia == b.PollsMedia && a.MediaPoll == b.MediaPoll
}

func TestListReal(t *testing.T) {
	devices, err := List(Sysfs)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/sys/class/block")
	if err != nil {
		t.Fatal(err)
	}
	if len(devices) == 0 || len(devices) > len(entries) {
		t.Errorf("%d devices of %d", len(devices), len(entries))
	}
	for _, d := range devices {
		if d.Major == 0 && d.Minor == 0 || d.Disk == "" {
			t.Errorf("%+v", d)
		}
	}
}

// attach makes a loop device over a new file and returns its name.
func attach(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Fatal("losetup is missing: apt-get install mount")
	}
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	node := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", node).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach: %v: %s", err, out)
		}
	})
	return filepath.Base(node)
}

func TestWatch(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var listed []string
	name := ""
	changed := false
	for e, err := range Watch(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Action == Listed {
			listed = append(listed, e.Name)
			if name == "" {
				// Subscribed already, so this event must not be missed.
				name = attach(t)
			}
			continue
		}
		if e.Name == name && e.Action == Change {
			changed = true
			break
		}
	}
	if !changed {
		t.Fatalf("no event for %s", name)
	}
	devices, err := List(Sysfs)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if !slices.Contains(listed, d.Name) {
			t.Errorf("%s was not listed", d.Name)
		}
	}
}

func TestWatchPartitions(t *testing.T) {
	if _, err := exec.LookPath("partx"); err != nil {
		t.Fatal("partx is missing: apt-get install util-linux")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	name := attach(t)
	f, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	// A DOS table with one partition from sector 2048 to the end.
	var table [512]byte
	copy(table[446:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x10, 0, 0})
	table[510], table[511] = 0x55, 0xaa
	_, err = f.WriteAt(table[:], 0)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	part := name + "p1"
	started := false
	for e, err := range Watch(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if !started {
			started = true
			if out, err := exec.Command("partx", "-a", "/dev/"+name).CombinedOutput(); err != nil {
				t.Fatalf("partx: %v: %s", err, out)
			}
		}
		if e.Name != part {
			continue
		}
		if e.Action == Add {
			d, err := Read(Sysfs, part)
			if err != nil {
				t.Fatal(err)
			}
			if e.Type != "partition" || e.Partition != 1 || d.Partition != 1 || d.Disk != name || d.Size != 4096*512 || d.DiskSeq != e.DiskSeq {
				t.Errorf("event %+v, device %+v", e, d)
			}
			if out, err := exec.Command("partx", "-d", "/dev/"+name).CombinedOutput(); err != nil {
				t.Fatalf("partx: %v: %s", err, out)
			}
		}
		if e.Action == Remove {
			return
		}
	}
	t.Error("no event for the removed partition")
}

// flood makes the kernel send n events about a device.
func flood(t *testing.T, name string, n int) {
	t.Helper()
	f, err := os.OpenFile("/sys/class/block/"+name+"/uevent", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range n {
		if _, err := f.WriteString("change"); err != nil {
			t.Fatal(err)
		}
	}
}

// mark makes the kernel send an event that tells itself from others.
func mark(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile("/sys/class/block/"+name+"/uevent", []byte("change 12345678-1234-1234-1234-123456789abc MARK=end"), 0); err != nil {
		t.Fatal(err)
	}
}

func TestFlood(t *testing.T) {
	const events = 3000
	name := attach(t)
	for _, tt := range []struct {
		name   string
		buffer int
		resync bool
	}{
		{"room for all", receiveBuffer, false},
		{"overflow", 16 << 10, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			flooded, ended := false, false
			seen, resyncs := 0, 0
			for e, err := range watch(ctx, Sysfs, tt.buffer) {
				if err != nil {
					t.Fatal(err)
				}
				if !flooded {
					flooded = true
					flood(t, name, events)
					mark(t, name)
				}
				switch {
				case e.Action == Resync:
					// The stream must go on: a mark that is sent now arrives,
					// or is answered by another Resync.
					resyncs++
					mark(t, name)
				case e.Env["SYNTH_ARG_MARK"] == "end":
					ended = true
				case e.Action == Change && e.Name == name:
					seen++
				}
				if ended {
					break
				}
			}
			if !ended || seen == 0 || (resyncs > 0) != tt.resync || !tt.resync && seen != events {
				t.Errorf("%d of %d events and %d resyncs, ended %v", seen, events, resyncs, ended)
			}
		})
	}
}

func TestClosesAtOnce(t *testing.T) {
	before := runtime.NumGoroutine()
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		begun := make(chan struct{})
		ended := make(chan time.Time)
		go func() {
			first := true
			for range Watch(ctx) {
				if first {
					close(begun)
					first = false
				}
			}
			ended <- time.Now()
		}()
		<-begun
		asked := time.Now()
		cancel()
		select {
		case end := <-ended:
			if d := end.Sub(asked); d > 500*time.Millisecond {
				t.Errorf("ended after %v", d)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("does not end")
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for e, err := range Watch(ctx) {
		t.Errorf("a watch that was over before it began yields %+v, %v", e, err)
	}
	for deadline := time.Now().Add(2 * time.Second); runtime.NumGoroutine() > before; {
		if time.Now().After(deadline) {
			t.Errorf("%d goroutines are left", runtime.NumGoroutine()-before)
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// TestOtherNetworkNamespace proves that events arrive as in a bridge
// container.
func TestOtherNetworkNamespace(t *testing.T) {
	name := attach(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan bool)
	go func() {
		// The thread stays in its namespace and ends with this goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
			done <- false
			return
		}
		first := true
		for e, err := range Watch(ctx) {
			if err != nil {
				t.Error(err)
				break
			}
			if first {
				first = false
				flood(t, name, 1)
			}
			if e.Name == name && e.Action == Change {
				done <- true
				return
			}
		}
		done <- false
	}()
	if !<-done {
		t.Error("no event arrived in another network namespace")
	}
}

// TestForged sends a message as a process may, and expects that it is ignored.
func TestForged(t *testing.T) {
	name := attach(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	first := true
	for e, err := range Watch(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if first {
			first = false
			forged := msg("add@/devices/forged", "SUBSYSTEM=block", "DEVNAME=forged", "SEQNUM=1")
			if err := unix.Sendto(fd, forged, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
				t.Fatalf("sending: %v", err)
			}
			flood(t, name, 1)
		}
		if e.Name == "forged" {
			t.Fatal("a forged event was taken for the kernel's")
		}
		if e.Name == name && e.Action == Change {
			return
		}
	}
	t.Error("the real event did not come")
}
