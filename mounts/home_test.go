package mounts

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPlanHome(t *testing.T) {
	down := errors.New("connect //nas: the server does not answer")
	someone := []HomeHolder{{PID: 7, Name: "python3", Path: "/home/iot"}}
	many := []HomeHolder{{PID: 1, Name: "a"}, {PID: 2, Name: "b"}, {PID: 3, Name: "c"}, {PID: 4, Name: "d"}, {PID: 5, Name: "e"}}
	for _, tc := range []struct {
		name   string
		facts  HomeFacts
		step   HomeStep
		mode   HomeMode
		reason string
	}{
		{"boot, server away", HomeFacts{Starting: true, Probe: down}, StepNone, HomeWaiting, "does not answer"},
		{"boot, server there", HomeFacts{Starting: true}, StepCover, HomeWaiting, ""},
		{"boot, blind", HomeFacts{Starting: true, Blind: true}, StepCover, HomeWaiting, ""},
		{"boot, but somebody was faster", HomeFacts{Starting: true, Holders: someone}, StepNone, HomeWaiting, "python3 (7)"},
		{"later, nobody uses it", HomeFacts{}, StepCover, HomeWaiting, ""},
		{"later, in use", HomeFacts{Holders: someone}, StepNone, HomeWaiting, "in use by python3 (7)"},
		{"later, in use by many", HomeFacts{Holders: many}, StepNone, HomeWaiting, "a (1), b (2), c (3), 2 more"},
		{"later, changed", HomeFacts{Changed: true}, StepNone, HomeWaiting, "changed"},
		{"later, blind", HomeFacts{Blind: true}, StepNone, HomeWaiting, "can't be seen"},
		{"later, never switch", HomeFacts{Never: true}, StepNone, HomeWaiting, "next start"},
		{"on request, in use and changed", HomeFacts{Wish: WishShare, Holders: someone, Changed: true, Never: true}, StepCover, HomeWaiting, ""},
		{"on request, server away", HomeFacts{Wish: WishShare, Probe: down}, StepNone, HomeWaiting, "does not answer"},
		{"local on request", HomeFacts{Wish: WishLocal}, StepNone, HomeLocal, "on request"},
		{"share", HomeFacts{Top: TopShare}, StepNone, HomeShared, ""},
		{"share, in use, changed: it stays", HomeFacts{Top: TopShare, Holders: someone, Changed: true}, StepNone, HomeShared, ""},
		{"share, server lost: it stays", HomeFacts{Top: TopShare, Probe: down}, StepNone, HomeAway, "does not answer"},
		{"share, unbound paths", HomeFacts{Top: TopShare, Unbound: []string{".jupyter"}}, StepBind, HomeShared, ""},
		{"share, unbound paths, server lost", HomeFacts{Top: TopShare, Probe: down, Unbound: []string{".jupyter"}}, StepNone, HomeAway, "does not answer"},
		{"unmount", HomeFacts{Top: TopShare, Wish: WishLocal}, StepReveal, HomeShared, ""},
		{"unmount, server lost", HomeFacts{Top: TopShare, Wish: WishLocal, Probe: down}, StepReveal, HomeAway, ""},
		{"unmount, in use", HomeFacts{Top: TopShare, Wish: WishLocal, Holders: someone}, StepNone, HomeShared, "in use"},
		{"forced unmount, in use", HomeFacts{Top: TopShare, Wish: WishRelease, Holders: someone}, StepDetach, HomeShared, ""},
		{"our process died", HomeFacts{Top: TopDead, Probe: down}, StepDetach, HomeWaiting, "lost its process"},
		{"somebody else's mount", HomeFacts{Top: TopForeign, Wish: WishShare}, StepNone, HomeFailed, "something else"},
	} {
		d := PlanHome(tc.facts)
		if d.Step != tc.step || d.Mode != tc.mode || !strings.Contains(d.Reason, tc.reason) {
			t.Errorf("%s: %+v, want step %d, mode %s, reason with %q", tc.name, d, tc.step, tc.mode, tc.reason)
		}
	}
}

// TestPlanHomeNeverHides goes through all facts: a local home in use or
// changed is covered only on request or, if it can't be known, at the start;
// and a share in use is only taken away by force, or when it is dead.
func TestPlanHomeNeverHides(t *testing.T) {
	bools := []bool{false, true}
	for _, top := range []HomeTop{TopLocal, TopShare, TopDead, TopForeign} {
		for _, wish := range []HomeWish{WishAuto, WishShare, WishLocal, WishRelease} {
			for bits := range 1 << 6 {
				is := func(i int) bool { return bools[bits>>i&1] }
				f := HomeFacts{Top: top, Wish: wish, Starting: is(0), Never: is(1), Blind: is(2), Changed: is(3)}
				if is(4) {
					f.Holders = []HomeHolder{{PID: 1}}
				}
				if is(5) {
					f.Probe = errors.New("away")
				}
				switch d := PlanHome(f); d.Step {
				case StepCover:
					if top != TopLocal || f.Probe != nil || wish != WishShare && (wish != WishAuto || len(f.Holders) > 0 || f.Changed && !f.Starting) {
						t.Errorf("%+v covers the local home", f)
					}
				case StepReveal:
					if top != TopShare || wish != WishLocal || len(f.Holders) > 0 {
						t.Errorf("%+v takes the share away", f)
					}
				case StepDetach:
					if top != TopDead && (top != TopShare || wish != WishRelease) {
						t.Errorf("%+v takes the share away by force", f)
					}
				case StepBind:
					t.Errorf("%+v binds what isn't unbound", f)
				}
			}
		}
	}
}

func TestHomePause(t *testing.T) {
	for _, tc := range []struct {
		mode  HomeMode
		fails int
		want  time.Duration
	}{
		{HomeShared, 0, 5 * time.Second},
		{HomeAway, 100, 5 * time.Second},
		{HomeWaiting, 1, 5 * time.Second},
		{HomeWaiting, 2, 10 * time.Second},
		{HomeWaiting, 1000, 5 * time.Minute},
		{HomeLocal, 3, 5 * time.Minute},
	} {
		if got := homePause(tc.mode, tc.fails); got != tc.want {
			t.Errorf("homePause(%s, %d) = %v, want %v", tc.mode, tc.fails, got, tc.want)
		}
	}
}

const homeTable = `21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 21 0:25 / /proc rw - proc proc rw
40 21 254:0 /var/lib/docker/volumes/iot-home/_data /home/iot rw - ext4 /dev/vda rw
41 21 254:0 /var/lib/docker/volumes/iot-home/_data /service-config/iot-home rw - ext4 /dev/vda rw
42 21 254:0 /var/lib/docker/volumes/iot-home/_data/sub /elsewhere rw - ext4 /dev/vda rw
43 40 0:50 / /home/iot rw - cifs //nas/iot-data rw,vers=3.1.1
44 43 254:0 /var/lib/docker/volumes/iot-home/_data/.jupyter /home/iot/.jupyter rw - ext4 /dev/vda rw
`

func TestHomeTree(t *testing.T) {
	table, err := parseTable(strings.NewReader(homeTable))
	if err != nil {
		t.Fatal(err)
	}
	top, ok := treeOf(table, "/home/iot")
	if want := (homeTree{0, 50, "/"}); !ok || top != want {
		t.Errorf("treeOf the covered home = %v, want %v", top, want)
	}
	local, ok := treeOf(table, "/service-config/iot-home")
	if want := (homeTree{254, 0, "/var/lib/docker/volumes/iot-home/_data"}); !ok || local != want {
		t.Fatalf("treeOf the local home = %v, want %v", local, want)
	}
	want := []string{"/var/lib/docker/volumes/iot-home/_data", "/home/iot", "/service-config/iot-home", "/elsewhere", "/home/iot/.jupyter"}
	if got := local.places(table); !slices.Equal(got, want) {
		t.Errorf("places = %q, want %q", got, want)
	}
	if got := top.places(table); !slices.Equal(got, []string{"/home/iot"}) {
		t.Errorf("places of the share = %q", got)
	}
	if inPlaces("/home/iotx/file", want) != "" || inPlaces("/home/iot/file", want) == "" {
		t.Error("/home/iotx is not below /home/iot, and /home/iot/file is")
	}
}

// TestHoldersSeesOtherNamespaces checks a program that sees the folder at
// another path, as in a container.
func TestHoldersSeesOtherNamespaces(t *testing.T) {
	dir := t.TempDir()
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "sh", "-c", `mount --bind "$0" "$1" && exec sleep 60 <"$1/file"`, dir, other)
	if err := cmd.Start(); err != nil {
		t.Fatal("unshare is missing: apt-get install util-linux")
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	table, err := readTable("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	tree, ok := treeOf(table, dir)
	if !ok {
		t.Fatal("the folder is in no file system")
	}
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		hs, _, err := tree.holders("/proc", os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if len(hs) == 1 && hs[0].PID == cmd.Process.Pid && hs[0].Path == other+"/file" {
			break
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("holders = %v, want %d with %s/file", hs, cmd.Process.Pid, other)
		}
	}
}

func TestNewHomeRefuses(t *testing.T) {
	good := HomeConfig{Path: "/home/iot", Local: "/service-config/iot-home"}
	if _, err := NewHome(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*HomeConfig){
		"relative path":       func(c *HomeConfig) { c.Path = "home" },
		"root":                func(c *HomeConfig) { c.Path = "/" },
		"local in path":       func(c *HomeConfig) { c.Local = "/home/iot/local" },
		"path in local":       func(c *HomeConfig) { c.Local = "/home" },
		"same":                func(c *HomeConfig) { c.Local = "/home/iot/" },
		"local path upwards":  func(c *HomeConfig) { c.LocalPaths = []string{"../x"} },
		"absolute local path": func(c *HomeConfig) { c.LocalPaths = []string{"/etc"} },
		"whole home":          func(c *HomeConfig) { c.LocalPaths = []string{"."} },
		"client":              func(c *HomeConfig) { c.Client = "cifs" },
	} {
		c := good
		change(&c)
		if _, err := NewHome(c); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestOpenBelowFollowsNoLinks(t *testing.T) {
	dir, victim := t.TempDir(), t.TempDir()
	if err := os.Symlink(victim, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"link", "link/sub", "a/b/c"} {
		fd, err := openBelow(dir, p)
		if strings.HasPrefix(p, "link") != (err != nil) {
			t.Errorf("openBelow(%q) = %d, %v", p, fd, err)
		}
		if err == nil {
			unix.Close(fd)
		}
	}
	if entries, err := os.ReadDir(victim); err != nil || len(entries) > 0 {
		t.Errorf("the link's target holds %v, %v", entries, err)
	}
}

// FuzzHomeTable checks that no mount table, which names from drives and
// shares are part of, crashes the search for the home.
func FuzzHomeTable(f *testing.F) {
	f.Add(homeTable)
	f.Fuzz(func(t *testing.T, text string) {
		table, err := parseTable(strings.NewReader(text))
		if err != nil {
			return
		}
		if tree, ok := treeOf(table, "/home/iot"); ok {
			tree.places(table)
		}
	})
}
