package repo

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fakeProc is a machine of which this process sees what it wants to.
func fakeProc(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir+"/sys/kernel/random/boot_id", "boot-1\n")
	const stat = "1 (a name) with ) brackets) S 1 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 7700 1 1 1\n"
	write(t, dir+"/self/stat", stat)
	write(t, dir+"/1/stat", stat)
	if err := os.Mkdir(dir+"/self/ns", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pid:[42]", dir+"/self/ns/pid"); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestFateOfOurLocks(t *testing.T) {
	me := owner{Boot: "boot-1", PID: 1, Start: 7700, Space: "pid:[42]"}
	with := func(change func(*owner)) owner {
		o := me
		change(&o)
		return o
	}
	for name, c := range map[string]struct {
		note   owner
		held   bool // by an flock
		shared bool // the folder is a share
		want   fate
	}{
		"running, by flock":                   {with(func(o *owner) { o.Flock = true }), true, false, alive},
		"ended, by flock":                     {with(func(o *owner) { o.Flock = true }), false, false, gone},
		"ended, and another is number 1 now":  {with(func(o *owner) { o.Flock, o.Start = true, 1 }), false, false, gone},
		"restarted":                           {with(func(o *owner) { o.Boot = "boot-0" }), false, false, gone},
		"another boot, perhaps of another":    {with(func(o *owner) { o.Boot = "boot-0" }), false, true, unknown},
		"no flock, same process":              {me, false, false, alive},
		"no flock, number used again":         {with(func(o *owner) { o.Start = 7600 }), false, false, gone},
		"no flock, no such number":            {with(func(o *owner) { o.PID = 77 }), false, false, gone},
		"no flock, number of other container": {with(func(o *owner) { o.PID, o.Space = 77, "pid:[43]" }), false, false, alive},
		"half a note":                         {owner{}, false, false, unknown},
	} {
		t.Run(name, func(t *testing.T) {
			j := &journal{dir: t.TempDir(), proc: fakeProc(t), local: !c.shared, boottime: sinceBoot}
			id := backup.Hash([]byte(name))
			text, err := json.Marshal(c.note)
			if err != nil {
				t.Fatal(err)
			}
			write(t, j.path(ownPrefix, id), string(text))
			if c.held {
				f, err := os.Open(j.path(ownPrefix, id))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
					t.Fatal(err)
				}
			}
			if got, why := j.ours(id); got != c.want || (got == unknown) != (why == "") {
				t.Errorf("%d (%s), want %d", got, why, c.want)
			}
		})
	}
}

func TestOwnNote(t *testing.T) {
	j := newJournal(t.TempDir(), "repository", sinceBoot)
	id := backup.Hash(nil)
	f := j.own(id)
	text, err := os.ReadFile(j.path(ownPrefix, id))
	if err != nil {
		t.Fatal(err)
	}
	var o owner
	if err := json.Unmarshal(text, &o); err != nil || !o.Flock || o.PID != os.Getpid() || len(o.Boot) != 36 || o.Start == 0 || !strings.HasPrefix(o.Space, "pid:[") {
		t.Errorf("%s, %v", text, err)
	}
	if fate, _ := j.ours(id); fate != alive {
		t.Errorf("fate %d", fate)
	}
	j.sweep(nil)
	if fate, _ := j.ours(id); fate != alive {
		t.Errorf("after a sweep: fate %d", fate)
	}
	j.disown(id, f)
	if left, _ := os.ReadDir(j.dir); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}

func TestSeen(t *testing.T) {
	var now time.Duration
	j := &journal{dir: t.TempDir(), proc: fakeProc(t), local: true, boottime: func() time.Duration { return now }}
	id := backup.Hash(nil)
	expect := func(want time.Duration) {
		t.Helper()
		if got := j.seen(id); got != want {
			t.Errorf("seen for %v, want %v", got, want)
		}
	}
	now = time.Hour
	expect(0)
	now += time.Minute
	expect(time.Minute)
	// After a restart only the time since then is certain.
	write(t, j.proc+"/sys/kernel/random/boot_id", "boot-2\n")
	now = 10 * time.Second
	expect(10 * time.Second)
	// On a share the note may be that of another machine.
	j.local = false
	expect(0)
	now += time.Minute
	expect(time.Minute)
	write(t, j.path(seenPrefix, id), `{"boot":`)
	expect(0)
	j.sweep(map[backup.ID]bool{id: true})
	now += time.Minute
	expect(time.Minute)
	j.sweep(nil)
	expect(0)
}

func TestContainer(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for name, c := range map[string]struct{ file, text, want string }{
		"docker, cgroup 1": {"cgroup", "1:name=systemd:/docker/" + id + "\n", id[:12]},
		"systemd's":        {"cgroup", "0::/system.slice/docker-" + id + ".scope\n", id[:12]},
		"cgroup 2":         {"mountinfo", "1 2 8:1 /var/lib/docker/containers/" + id + "/hostname /etc/hostname rw - ext4 /dev/sda1 rw\n", id[:12]},
		"none":             {"cgroup", "0::/\n", ""},
		"another path":     {"mountinfo", "1 2 8:1 /objects/" + id + " /x rw - ext4 /dev/sda1 rw\n", ""},
	} {
		j := &journal{proc: t.TempDir()}
		write(t, j.proc+"/self/"+c.file, c.text)
		if got := j.container(); got != c.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func FuzzJournalFiles(f *testing.F) {
	f.Add([]byte(`{"boot":"b","pid":1,"start":2,"space":"pid:[1]","flock":true}`), []byte("1 (x) S 1"))
	f.Add([]byte(`{"boot":"b","at":-1}`), []byte(")"))
	f.Fuzz(func(t *testing.T, note, stat []byte) {
		j := &journal{dir: t.TempDir(), proc: t.TempDir(), local: true, boottime: sinceBoot}
		id := backup.Hash(nil)
		write(t, j.proc+"/sys/kernel/random/boot_id", "b")
		write(t, j.proc+"/1/stat", string(stat))
		write(t, j.path(ownPrefix, id), string(note))
		write(t, j.path(seenPrefix, id), string(note))
		j.ours(id)
		if j.seen(id) < 0 {
			t.Error("seen in the future")
		}
	})
}
