package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/iot49/ide49-backup/mounts"
	"github.com/moby/sys/mountinfo"
)

var soak = flag.Int("soak", 1, "how often to run each case in the virtual machine; above 1 also the larger set")

// patience is how long a test waits for what must happen. It happens within
// two seconds on an idle machine.
const patience = 60 * time.Second

// A rig is the machine with the service and the witness running in it.
type rig struct {
	*Machine
}

// newRig boots a machine and starts what is tested.
func newRig(t *testing.T) *rig {
	t.Helper()
	guest := filepath.Join(t.TempDir(), "guest")
	if _, err := command(t.Context(), "", "", "env", "CGO_ENABLED=0", "go", "build", "-o", guest, "./guest"); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Files: map[string]string{"/usr/bin/guest": guest}}
	if *soak > 1 {
		cfg.OnDemand = moreModules
	}
	start := time.Now()
	m, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %.1f s", time.Since(start).Seconds())
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	r := &rig{Machine: m}
	r.sh(t, "guest witness /run/witness </dev/null >/run/witness.out 2>&1 &")
	r.wait(t, "grep -q ready /run/witness")
	r.serve(t, "guest drives")
	return r
}

// serve starts the service by a command line that begins with prefix, and
// returns when it answers.
func (r *rig) serve(t *testing.T, prefix string) {
	t.Helper()
	// It must not hold the guest's serial line.
	r.sh(t, prefix+" /var/lib/ide49 /run/drives </dev/null >>/run/drives.out 2>&1 &")
	r.wait(t, "guest ask list")
}

// stop ends the service with a signal and waits for its end.
func (r *rig) stop(t *testing.T, signal string) {
	t.Helper()
	const find = "for p in $(pidof guest); do grep -q drives /proc/$p/cmdline && echo $p; done"
	r.sh(t, "kill -"+signal+" $("+find+")")
	r.wait(t, "[ -z \"$("+find+")\" ]")
}

// sh runs a script that must succeed.
func (r *rig) sh(t *testing.T, script string) string {
	t.Helper()
	// Also for Cleanup, which runs when t's own context has ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	out, err := r.Output(ctx, script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wait waits until a script succeeds.
func (r *rig) wait(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(t.Context()), patience, fmt.Errorf("waited %v in vain", patience))
	defer cancel()
	out, err := r.Wait(ctx, script)
	if err != nil {
		t.Fatalf("%v\n%s", err, r.state(t))
	}
	return out
}

// state describes the guest for a failure.
func (r *rig) state(t *testing.T) string {
	t.Helper()
	out, _, err := r.Run(context.WithoutCancel(t.Context()), `grep /mnt /proc/self/mountinfo; ls -la /mnt; cat /run/drives.out;
		tail -n 12 /run/drives | sed 's/"[A-Za-z]*":\(""\|0\|null\|false\),//g'; dmesg | tail -n 40; cat /proc/partitions; tail -n 4 /run/witness; grep . /dev/null /sys/block/sd*/events_poll_msecs /sys/block/sd*/device/state; ps | grep guest`)
	if err != nil {
		return err.Error()
	}
	return out
}

// plug plugs a drive in for the length of a test.
func (r *rig) plug(t *testing.T, d Drive) {
	t.Helper()
	if err := r.Plug(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if r.has(d.ID) {
			if err := r.Pull(context.WithoutCancel(t.Context()), d.ID); err != nil {
				t.Error(err)
			}
		}
	})
}

// has tells whether a drive is plugged in.
func (r *rig) has(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.plugged[id]
	return ok
}

func (r *rig) pull(t *testing.T, id string) {
	t.Helper()
	if err := r.Pull(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

// image makes a file system for the length of a test.
func image(t *testing.T, v Volume) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	if err := v.Make(t.Context(), file); err != nil {
		t.Fatal(err)
	}
	return file
}

// disk makes a partitioned disk for the length of a test.
func disk(t *testing.T, table string, v ...Volume) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	if err := MakeDisk(t.Context(), file, table, v...); err != nil {
		t.Fatal(err)
	}
	return file
}

// duplicate copies an image.
func duplicate(from, to string) error {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	size, err := copySparse(f, 0, from)
	return errors.Join(err, f.Truncate(size), f.Close())
}

// table reads the guest's mount table.
func (r *rig) table(t *testing.T) []*mountinfo.Info {
	t.Helper()
	infos, err := mountinfo.GetMountsFromReader(strings.NewReader(r.sh(t, "cat /proc/self/mountinfo")), nil)
	if err != nil {
		t.Fatal(err)
	}
	return infos
}

// mounted waits until something is mounted at a folder and returns the entry.
func (r *rig) mounted(t *testing.T, dir string) *mountinfo.Info {
	t.Helper()
	r.until(t, "something is mounted at "+dir, func() bool {
		return slices.ContainsFunc(r.table(t), func(m *mountinfo.Info) bool { return m.Mountpoint == dir })
	})
	// The service knows of it a moment later than the kernel.
	r.until(t, "the service lists "+dir, func() bool {
		return slices.ContainsFunc(r.list(t), func(d mounts.Drive) bool { return d.Path == dir && d.State == mounts.DriveMounted })
	})
	var found []*mountinfo.Info
	for _, m := range r.table(t) {
		if m.Mountpoint == dir {
			found = append(found, m)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d mounts at %s, want one\n%s", len(found), dir, r.state(t))
	}
	return found[0]
}

// until waits for a condition.
func (r *rig) until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for start := time.Now(); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited %v in vain until %s\n%s", patience, what, r.state(t))
		}
	}
}

// list asks the service for its drives.
func (r *rig) list(t *testing.T) []mounts.Drive {
	t.Helper()
	out := r.sh(t, "guest ask list")
	var list []mounts.Drive
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%q: %v", out, err)
	}
	return list
}

// listed waits until the service lists a device in a state, and returns it.
func (r *rig) listed(t *testing.T, device string, state mounts.DriveState) (d mounts.Drive) {
	t.Helper()
	r.until(t, fmt.Sprintf("%s is listed as %s", device, state), func() bool {
		list := r.list(t)
		i := slices.IndexFunc(list, func(d mounts.Drive) bool { return d.Device == device && d.State == state })
		if i >= 0 {
			d = list[i]
		}
		return i >= 0
	})
	return d
}

// clean waits until nothing is left of any drive: no device, no mount, no
// folder, no entry in the list or the record, no process.
func (r *rig) clean(t *testing.T) {
	t.Helper()
	r.wait(t, `! ls /sys/block | grep -q "^sd" &&
		[ -z "$(ls -A /mnt)" ] &&
		! grep -q -e " /mnt/" -e "/dev/sd" /proc/self/mountinfo &&
		! pidof ntfs-3g &&
		[ "$(guest ask list)" = "[]" -o "$(guest ask list)" = null ] &&
		! grep -q /mnt /var/lib/ide49/drive-mounts.json`)
}

// A note is a line of the witness; see guest/witness.go.
type note struct {
	Microseconds int64
	Kind         string
	Action, Name string
	Mount        string
}

// notes returns what the witness saw.
func (r *rig) notes(t *testing.T) []note {
	t.Helper()
	var notes []note
	lines := bufio.NewScanner(strings.NewReader(r.sh(t, "cat /run/witness")))
	for lines.Scan() {
		var n note
		if err := json.Unmarshal(lines.Bytes(), &n); err != nil {
			t.Fatalf("%q: %v", lines.Bytes(), err)
		}
		notes = append(notes, n)
	}
	return notes
}

// A reaction is the time in the guest from the kernel's event to the change in
// the mount table.
type reaction struct {
	device, kind string // kind of file system
	time.Duration
}

// reactions measures how long mounts took after the device's add or media
// change, and how long unmounts took after its remove.
func reactions(t *testing.T, notes []note) (up, down []reaction) {
	t.Helper()
	came, went := map[string]int64{}, map[string]int64{}
	for _, n := range notes {
		switch n.Kind {
		case "lost":
			t.Error("the witness lost events")
		case "uevent":
			switch n.Action {
			case "remove":
				went[n.Name] = n.Microseconds
			case "add":
				came[n.Name] = n.Microseconds
			}
			continue
		}
		m, err := mountinfo.GetMountsFromReader(strings.NewReader(n.Mount), nil)
		if err != nil || len(m) != 1 {
			continue
		}
		device := path.Base(m[0].Source)
		since := func(at map[string]int64) reaction {
			return reaction{device, m[0].FSType, time.Duration(n.Microseconds-at[device]) * time.Microsecond}
		}
		if _, ok := came[device]; ok && n.Kind == "mount" {
			up = append(up, since(came))
			delete(came, device)
		}
		if _, ok := went[device]; ok && n.Kind == "unmount" {
			down = append(down, since(went))
			delete(went, device)
		}
	}
	return up, down
}

// hostTime is the time that the machine's threads ran on this host, and the
// time that they were ready to run and had to wait for others.
type hostTime struct{ ran, waited time.Duration }

// slowdown tells how many times longer everything took between a and b because
// other programs kept the processors busy: 1 on an idle host.
func slowdown(a, b hostTime) float64 {
	ran, waited := float64(b.ran-a.ran), float64(b.waited-a.waited)
	return (ran + waited) / max(ran, 1)
}

// hostTime reads the accounts of the machine's threads (the kernel's
// Documentation/scheduler/sched-stats.rst).
func (r *rig) hostTime(t *testing.T) hostTime {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", r.qemu.Process.Pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("no accounts of the machine's threads: %v", err)
	}
	var sum hostTime
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the thread has ended
		}
		var h hostTime
		if err == nil {
			_, err = fmt.Sscan(string(b), &h.ran, &h.waited)
		}
		if err != nil {
			t.Fatal(err)
		}
		sum.ran += h.ran
		sum.waited += h.waited
	}
	return sum
}

func (r reaction) String() string {
	return fmt.Sprintf("%d ms (%s %s)", r.Milliseconds(), r.device, r.kind)
}

// median of a sorted list.
func median(r []reaction) time.Duration {
	if len(r) == 0 {
		return 0
	}
	return r[len(r)/2].Duration
}

func TestMain(m *testing.M) {
	flag.Parse()
	if *soak < 1 {
		fmt.Fprintln(os.Stderr, errors.New("-soak must be at least 1"))
		os.Exit(2)
	}
	os.Exit(m.Run())
}
