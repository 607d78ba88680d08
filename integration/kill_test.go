package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A device is a set of volumes with a configuration, used through our program.
type device struct {
	*place
	volumes string // the folder that holds the volumes
	ours    []string
}

func newDevice(t testing.TB) *device {
	t.Helper()
	p := newPlace(t)
	root := filepath.Dir(p.dir)
	d := &device{place: p, volumes: filepath.Join(root, "service-config")}
	must(t, os.Mkdir(d.volumes, 0o755))
	must(t, os.Mkdir(filepath.Join(root, "state"), 0o700))
	config := filepath.Join(root, "backup.yaml")
	must(t, os.WriteFile(config, fmt.Appendf(nil, "device: pi\nrepositories:\n  local:\n    url: %s\n    password: %s\nvolumes:\n  discover: %s\n", p.dir, password, d.volumes), 0o600))
	d.ours = []string{"IDE49_BACKUP_CONFIG=" + config, "IDE49_BACKUP_STATE=" + filepath.Join(root, "state")}
	return d
}

// run runs our program.
func (d *device) run(t testing.TB, args ...string) string {
	t.Helper()
	return run(t, d.ours, program, args...)
}

// snapshotIDs returns the IDs of all snapshots.
func (d *device) snapshotIDs(t testing.TB) map[string]bool {
	t.Helper()
	var list []struct {
		ID string `json:"id"`
	}
	must(t, json.Unmarshal([]byte(d.restic(t, "snapshots", "--json", "--no-lock")), &list))
	ids := map[string]bool{}
	for _, s := range list {
		ids[s.ID] = true
	}
	return ids
}

// Our program is killed at random moments of 50 runs over one repository. Then
// everything in it is intact, and every finished snapshot restores exactly.
func TestKillAtRandomMoments(t *testing.T) {
	const runs = 50
	d := newDevice(t)
	rng := rand.New(rand.NewPCG(50, 50))
	for v := range 3 {
		for i := range 60 {
			dir := filepath.Join(d.volumes, fmt.Sprintf("volume%d/%d", v, i%6))
			must(t, os.MkdirAll(dir, 0o755))
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("file", i)), random(uint64(v*100+i), 1000*(i+1)), 0o644))
		}
	}
	d.init(t)
	start := time.Now()
	d.run(t, "backup", "--quiet")
	longest := time.Since(start)
	copies := t.TempDir() // what the volumes were like at each finished snapshot
	finished := map[string]string{}
	killed := 0
	for n := range runs {
		for range 1 + rng.IntN(4) {
			name := filepath.Join(d.volumes, fmt.Sprintf("volume%d/%d/changing%d", rng.IntN(3), rng.IntN(6), rng.IntN(20)))
			must(t, os.WriteFile(name, random(rng.Uint64(), rng.IntN(3<<20)), 0o644))
		}
		before := d.snapshotIDs(t)
		cmd := exec.Command(program, "backup", "--quiet")
		cmd.Env = append(os.Environ(), d.ours...)
		start := time.Now()
		must(t, cmd.Start())
		// The first part goes into deriving the key: few kills there.
		moment := longest/4 + time.Duration(rng.Int64N(int64(longest)))
		timer := time.AfterFunc(moment, func() { _ = cmd.Process.Kill() }) // it may have ended
		err := cmd.Wait()
		timer.Stop()
		switch e, isExit := errors.AsType[*exec.ExitError](err); {
		case err == nil:
			longest = time.Since(start)
		case isExit && e.Sys().(syscall.WaitStatus).Signaled():
			killed++
			longest += longest / 20
		default:
			t.Fatal(err)
		}
		snapshot := ""
		for id := range d.snapshotIDs(t) {
			if !before[id] {
				if snapshot == "" {
					snapshot = filepath.Join(copies, fmt.Sprint(n))
					run(t, nil, "cp", "-a", d.volumes, snapshot)
				}
				finished[id] = snapshot
			}
		}
	}
	t.Logf("%d of %d runs were killed; %d snapshots were finished", killed, runs, len(finished))
	if killed < runs/4 || len(finished) < 3 {
		t.Fatalf("%d of %d runs were killed and %d snapshots finished: the moments are badly chosen", killed, runs, len(finished))
	}
	d.run(t, "check", "--read", "all")
	d.restic(t, "unlock", "--remove-all")
	d.check(t)
	i := 0
	for id, want := range finished {
		if i++; i > 12 {
			break // map order is random: each run of the test looks at others
		}
		dst := t.TempDir()
		d.run(t, "restore", "--yes", "--snapshot", id, "--to", dst)
		entries, err := os.ReadDir(dst)
		must(t, err)
		if len(entries) != 1 || !strings.HasPrefix(entries[0].Name(), "volume") {
			t.Fatalf("restored %v", entries)
		}
		sameTree(t, filepath.Join(want, entries[0].Name()), filepath.Join(dst, entries[0].Name()))
	}
}
