package repo

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// A journal remembers, in a folder of this machine alone, which locks of a
// repository are ours and since when we see those of others. Each has a file
// of its own, so that processes need not agree on who writes.
//
//   - own-ID: a lock that a process here made. The process holds an flock on
//     the file as long as it lives: that tells better than its number, which
//     is 1 in every container and is used again, whether it is still there.
//   - seen-ID: a lock of somebody else and when it was seen first. Holders
//     renew a lock under a new ID every few minutes, so one ID that stays for
//     long has no holder. That needs no clock to be right, neither ours nor
//     theirs.
//
// What the journal can't note or read is as if it were not there: a lock of
// ours then counts as somebody else's, which is only slower.
//
// A nil journal knows nothing.
type journal struct {
	dir      string
	proc     string               // "/proc"
	boottime func() time.Duration // since boot, with the time asleep
	local    bool                 // the folder can't be another machine's too
}

// An owner is who made a lock, in an own file.
type owner struct {
	Boot      string `json:"boot"`      // of the kernel
	PID       int    `json:"pid"`       // in its own container
	Start     uint64 `json:"start"`     // of the process, in ticks since boot
	Space     string `json:"space"`     // of process numbers
	Container string `json:"container"` // "" outside of any
	Flock     bool   `json:"flock"`     // the process holds one on the file
}

// A sight is when a lock was first seen, in a seen file.
type sight struct {
	Boot string        `json:"boot"`
	At   time.Duration `json:"at"` // since boot
}

const (
	ownPrefix  = "own-"
	seenPrefix = "seen-"
	// maxNote is more than any file of a journal has.
	maxNote = 4096
)

// newJournal returns the journal of a repository below dir.
func newJournal(dir, repoID string, boottime func() time.Duration) *journal {
	if dir == "" {
		return nil
	}
	dir = filepath.Join(dir, repoID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil
	}
	return &journal{dir: dir, proc: "/proc", boottime: boottime, local: isLocal(dir)}
}

// isLocal reports whether a folder is on a file system that no other machine
// can have mounted at the same time.
func isLocal(dir string) bool {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.V9FS_MAGIC,
		unix.FUSE_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.CODA_SUPER_MAGIC, unix.OCFS2_SUPER_MAGIC:
		return false
	}
	return true
}

// sinceBoot is CLOCK_BOOTTIME, which goes on while the machine sleeps.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0 // as old as kernels without it: the monotonic clock decides
	}
	return time.Duration(ts.Nano())
}

// self describes this process.
func (j *journal) self() owner {
	o := owner{Boot: j.boot(), PID: os.Getpid(), Container: j.container()}
	o.Space, _ = os.Readlink(j.proc + "/self/ns/pid") // unknown is ""
	o.Start, _ = j.start("self")                      // unknown is 0
	return o
}

// boot returns the kernel's random name of this boot, or "".
func (j *journal) boot() string {
	b, _ := os.ReadFile(j.proc + "/sys/kernel/random/boot_id")
	return string(bytes.TrimSpace(b))
}

// start returns when a process started, in ticks since boot (proc(5), field 22
// of stat). The second field may hold spaces and brackets.
func (j *journal) start(pid string) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(j.proc, pid, "stat"))
	if err != nil {
		return 0, err
	}
	const field = 22 - 3 // counted from the third, which follows the last bracket
	rest := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(rest) <= field {
		return 0, fmt.Errorf("stat of process %s: only %d fields", pid, len(rest))
	}
	return strconv.ParseUint(rest[field], 10, 64)
}

var containerID = regexp.MustCompile(`[/-]([0-9a-f]{64})\b`)

// container returns the ID of the container that the process is in, as Docker
// and balena write it into paths, or "". It only explains.
func (j *journal) container() string {
	for _, name := range []string{"/self/cgroup", "/self/mountinfo"} {
		b, _ := os.ReadFile(j.proc + name)
		for line := range strings.Lines(string(b)) {
			if name == "/self/mountinfo" && !strings.Contains(line, "/containers/") {
				continue
			}
			if m := containerID.FindStringSubmatch(line); m != nil {
				return m[1][:12]
			}
		}
	}
	return ""
}

// own notes that this process is about to make a lock. The note lasts until
// the returned file is given to disown, or the process ends.
func (j *journal) own(id backup.ID) *os.File {
	if j == nil {
		return nil
	}
	f, err := os.OpenFile(j.path(ownPrefix, id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil
	}
	// First the flock, then the note: who reads a note can rely on it.
	o := j.self()
	o.Flock = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	text, err := json.Marshal(o)
	if err == nil {
		_, err = f.Write(text)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		j.disown(id, f)
		return nil
	}
	if dir, err := os.Open(j.dir); err == nil {
		_ = dir.Sync() // a lost note is only slower
		_ = dir.Close()
	}
	return f
}

// disown ends a note of own. Both may be nil.
func (j *journal) disown(id backup.ID, f *os.File) {
	if f == nil {
		return
	}
	_ = os.Remove(j.path(ownPrefix, id)) // if it stays, sweep takes it
	_ = f.Close()
}

func (j *journal) path(prefix string, id backup.ID) string {
	return filepath.Join(j.dir, prefix+id.String())
}

// read parses a file of the journal.
func read[T any](f *os.File) (v T, err error) {
	text, err := io.ReadAll(io.LimitReader(f, maxNote))
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(text, &v)
}

// A fate is what is known of the holder of one of our locks.
type fate uint8

const (
	unknown fate = iota // the lock is not ours, as far as we know
	alive
	gone
)

// ours tells whether a lock is one of this machine's, what became of its
// holder, and how we know.
func (j *journal) ours(id backup.ID) (fate, string) {
	if j == nil {
		return unknown, ""
	}
	f, err := os.OpenFile(j.path(ownPrefix, id), os.O_RDWR, 0)
	if err != nil {
		return unknown, ""
	}
	defer f.Close()
	o, err := read[owner](f)
	if err != nil || o.Boot == "" {
		return unknown, ""
	}
	who := fmt.Sprintf("process %d", o.PID)
	if o.Container != "" {
		who += " of container " + strconv.Quote(o.Container)
	}
	if boot := j.boot(); o.Boot != boot {
		if boot == "" || !j.local {
			return unknown, "" // the folder may be shared with the lock's machine
		}
		return gone, "left by " + who + " of this machine, which was restarted since"
	}
	if o.Flock {
		// A shared one, so that two who ask at once don't see each other.
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
		case err == nil:
			return gone, "left by " + who + " of this machine, which has ended"
		case errors.Is(err, unix.EWOULDBLOCK):
			return alive, "held by " + who + " of this machine, which is running"
		}
	}
	// No flock here. A process number means something in its own space only.
	if space, err := os.Readlink(j.proc + "/self/ns/pid"); err != nil || space != o.Space {
		return alive, "held by " + who + " of this machine, which may be running"
	}
	start, err := j.start(strconv.Itoa(o.PID))
	if errors.Is(err, fs.ErrNotExist) || err == nil && start != o.Start {
		return gone, "left by " + who + " of this machine, which has ended"
	}
	return alive, "held by " + who + " of this machine, which is running"
}

// seen returns how long a lock of somebody else has surely been there
// unchanged, and from now on remembers it.
func (j *journal) seen(id backup.ID) time.Duration {
	now, boot := j.boottime(), j.boot()
	name := j.path(seenPrefix, id)
	if f, err := os.Open(name); err == nil {
		s, err := read[sight](f)
		_ = f.Close() // only read
		switch {
		case err != nil || s.Boot == "" || s.At < 0 || s.Boot != boot && !j.local:
			_ = os.Remove(name) // half a note, or another machine's: begin again
		case s.Boot != boot:
			return max(0, now) // at least since this boot
		default:
			return max(0, now-s.At)
		}
	}
	text, err := json.Marshal(sight{boot, now})
	if err == nil {
		_ = os.WriteFile(name, text, 0o600) // a lost note is only slower
	}
	return 0
}

// sweep drops notes on locks that are not there any more.
func (j *journal) sweep(there map[backup.ID]bool) {
	if j == nil {
		return
	}
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		prefix, name, _ := strings.Cut(e.Name(), "-")
		id, err := backup.ParseID(name)
		if err != nil || there[id] {
			continue
		}
		switch prefix + "-" {
		case ownPrefix:
			// One that a living process notes just now has no lock yet.
			if f, _ := j.ours(id); f == alive {
				continue
			}
		case seenPrefix:
		default:
			continue
		}
		_ = os.Remove(filepath.Join(j.dir, e.Name())) // next time, then
	}
}
