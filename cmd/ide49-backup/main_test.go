package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ide49-backup": main})
}

// cheap are parameters of scrypt for tests that do not test it.
var cheap = crypt.Params{N: 1 << 4, R: 8, P: 1}

const testPassword = "correct horse battery staple"

// TestScripts runs testdata/script. Each script starts with a configuration of
// two volumes, mosquitto and nodered below $WORK/v, and the repository
// $WORK/repo, which mkrepo makes.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("IDE49_BACKUP_CONFIG", filepath.Join(env.WorkDir, "backup.yaml"))
			env.Setenv("IDE49_BACKUP_STATE", filepath.Join(env.WorkDir, "state"))
			env.Setenv("TZ", "UTC")
			files := map[string]string{
				"backup.yaml":                fmt.Sprintf("device: kitchen-pi\ntimezone: Europe/Vienna\nrepositories:\n  local:\n    url: %[1]s/repo\n    password_file: %[1]s/key\nvolumes:\n  discover: %[1]s/v\n  exclude: [\"*.tmp\"]\n", env.WorkDir),
				"v/mosquitto/mosquitto.conf": "listener 1883\n",
				"v/mosquitto/data/retained":  "on\n",
				"v/mosquitto/junk.tmp":       "junk\n",
				"v/nodered/flows.json":       "[]\n",
			}
			for name, text := range files {
				name = filepath.Join(env.WorkDir, name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					return err
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					return err
				}
			}
			// For exitsUser: another user may go there.
			return errors.Join(os.Chmod(filepath.Dir(env.WorkDir), 0o755), os.Chmod(env.WorkDir, 0o755))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"mkrepo":      makeRepository,
			"exits":       exits,
			"exitsuser":   exitsUser,
			"isjson":      isJSON,
			"flip":        flip,
			"cut":         cut,
			"locked":      locked,
			"history":     history,
			"leavelock":   leaveLock,
			"version1":    version1,
			"hostile":     hostile,
			"smalldisk":   smallDisk,
			"interrupted": interrupted,
		},
	})
}

// makeRepository makes $WORK/repo and $WORK/key.
func makeRepository(ts *testscript.TestScript, neg bool, args []string) {
	dir := "repo"
	if len(args) > 0 {
		dir = args[0]
	}
	be, err := local.Create(ts.MkAbs(dir), local.Options{})
	ts.Check(err)
	r, err := repo.Init(context.Background(), be, testPassword, cheap, repo.Options{})
	ts.Check(err)
	ts.Check(r.Close())
	ts.Check(os.WriteFile(ts.MkAbs("key"), []byte(testPassword+"\n"), 0o600))
}

func openRepository(ts *testscript.TestScript) *repo.Repo {
	be, err := local.Open(ts.MkAbs("repo"), local.Options{})
	ts.Check(err)
	r, err := repo.Open(context.Background(), be, testPassword, repo.Options{})
	ts.Check(err)
	return r
}

// exits runs a program, which must end with the exit code args[0], and if that
// is not 0 or 3 print exactly one line to stderr that begins with its name.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, not %d", got, want)
	}
	checkComplaint(ts, want, ts.ReadFile("stderr"))
}

func checkComplaint(ts *testscript.TestScript, code int, stderr string) {
	if code == exitDone || code == exitWarnings {
		return
	}
	n := 0
	for line := range strings.Lines(stderr) {
		if strings.HasPrefix(line, "ide49-backup: ") {
			n++
		}
	}
	if n != 1 {
		ts.Fatalf("%d lines of stderr say what failed, not 1:\n%s", n, stderr)
	}
}

// exitsUser is exits as a user without rights. Its output goes to the files out
// and err.
func exitsUser(ts *testscript.TestScript, neg bool, args []string) {
	const nobody = 65534
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	exe, err := os.Executable()
	ts.Check(err)
	text, err := os.ReadFile(exe)
	ts.Check(err)
	// Where the test's own binary is, the user may not look.
	program := ts.MkAbs("ide49-backup")
	ts.Check(os.WriteFile(program, text, 0o755))
	cmd := exec.Command(program, args[2:]...)
	cmd.Args[0] = "ide49-backup"
	cmd.Dir = ts.MkAbs(".")
	for _, name := range []string{"PATH", "IDE49_BACKUP_CONFIG", "IDE49_BACKUP_STATE", "TZ"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	if os.Getuid() == 0 {
		ts.Check(filepath.WalkDir(ts.MkAbs("."), func(name string, _ os.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(name, nobody, nobody))
		}))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	ts.Logf("%s%s", &stdout, &stderr)
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		ts.Check(err)
	}
	if got := cmd.ProcessState.ExitCode(); got != want {
		ts.Fatalf("exit code %d, not %d", got, want)
	}
	checkComplaint(ts, want, stderr.String())
	ts.Check(os.WriteFile(ts.MkAbs("out"), stdout.Bytes(), 0o644))
	ts.Check(os.WriteFile(ts.MkAbs("err"), stderr.Bytes(), 0o644))
}

// isJSON checks that stdout is one JSON document, or with the argument lines
// that each line is an object with an event, the last one a summary; and that
// the top-level fields named by further arguments are in the (last) object.
func isJSON(ts *testscript.TestScript, neg bool, args []string) {
	text := ts.ReadFile("stdout")
	var last any
	if len(args) > 0 && args[0] == "lines" {
		args = args[1:]
		for line := range strings.Lines(text) {
			var obj map[string]any
			if err := json.Unmarshal([]byte(line), &obj); err != nil {
				ts.Fatalf("%v: %s", err, line)
			}
			if obj["event"] == "" || obj["event"] == nil {
				ts.Fatalf("no event: %s", line)
			}
			last = obj
		}
	} else {
		dec := json.NewDecoder(strings.NewReader(text))
		ts.Check(dec.Decode(&last))
		if _, err := dec.Token(); !errors.Is(err, io.EOF) {
			ts.Fatalf("more than one document")
		}
	}
	if list, ok := last.([]any); ok && len(list) > 0 {
		last = list[0]
	}
	obj, _ := last.(map[string]any)
	for _, name := range args {
		if _, ok := obj[name]; !ok {
			ts.Fatalf("no field %s in %v", name, last)
		}
	}
}

// first returns the first file that matches a pattern, and makes it writable.
func first(ts *testscript.TestScript, pattern string) string {
	list, err := filepath.Glob(ts.MkAbs(pattern))
	ts.Check(err)
	if len(list) == 0 {
		ts.Fatalf("no file %s", pattern)
	}
	ts.Check(os.Chmod(list[0], 0o600))
	return list[0]
}

// flip changes a byte of the first file that matches: in its middle, or at the
// offset args[1].
func flip(ts *testscript.TestScript, neg bool, args []string) {
	name := first(ts, args[0])
	data, err := os.ReadFile(name)
	ts.Check(err)
	at := len(data) / 2
	if len(args) > 1 {
		at, err = strconv.Atoi(args[1])
		ts.Check(err)
	}
	data[at] ^= 1
	ts.Check(os.WriteFile(name, data, 0o600))
}

// cut halves the first file that matches.
func cut(ts *testscript.TestScript, neg bool, args []string) {
	name := first(ts, args[0])
	st, err := os.Stat(name)
	ts.Check(err)
	ts.Check(os.Truncate(name, st.Size()/2))
}

// locked runs a program as exits does while the repository is locked exclusively.
func locked(ts *testscript.TestScript, neg bool, args []string) {
	r := openRepository(ts)
	err := r.WithLock(context.Background(), true, func(context.Context) error {
		exits(ts, neg, args)
		return nil
	})
	ts.Check(errors.Join(err, r.Close()))
}

// history saves args[0] snapshots of mosquitto, one of each of the last days,
// with the tags of args[1:].
func history(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	r := openRepository(ts)
	all, err := r.Snapshots(context.Background())
	ts.Check(err)
	i := slices.IndexFunc(all, func(s *backup.Snapshot) bool { return s.Volume() == "mosquitto" })
	if i < 0 {
		ts.Fatalf("take a snapshot first")
	}
	for day := 1; day <= n; day++ {
		s := *all[i]
		s.Time = all[i].Time.AddDate(0, 0, -day)
		s.Tags = append([]string{backup.VolumeTag + "mosquitto"}, args[1:]...)
		_, err := r.SaveSnapshot(context.Background(), &s)
		ts.Check(err)
	}
	ts.Check(r.Close())
}

// leaveLock stores an exclusive lock of another machine, refreshed just now.
func leaveLock(ts *testscript.TestScript, neg bool, args []string) {
	r := openRepository(ts)
	plain, err := json.Marshal(repo.Lock{Time: time.Now(), Exclusive: true, Hostname: "elsewhere", Username: "eve", PID: 1})
	ts.Check(err)
	_, err = r.SaveFile(context.Background(), backend.Locks, plain)
	ts.Check(errors.Join(err, r.Close()))
}

// version1 rewrites the repository's config for another format version, args[0].
func version1(ts *testscript.TestScript, neg bool, args []string) {
	ctx := context.Background()
	r := openRepository(ts)
	cfg := r.Config()
	ts.Check(r.Close())
	var key struct {
		N, R, P    int
		Salt, Data []byte
	}
	text, err := os.ReadFile(first(ts, "repo/keys/*"))
	ts.Check(err)
	ts.Check(json.Unmarshal(text, &key))
	wrap, err := crypt.Derive(crypt.Params{N: key.N, R: key.R, P: key.P}, key.Salt, testPassword)
	ts.Check(err)
	plain, err := wrap.Open(nil, key.Data)
	ts.Check(err)
	var master crypt.Key
	ts.Check(json.Unmarshal(plain, &master))
	version, err := strconv.Atoi(args[0])
	ts.Check(err)
	cfg.Version = uint(version)
	text, err = json.Marshal(cfg)
	ts.Check(err)
	ts.Check(ctx.Err())
	ts.Check(os.WriteFile(first(ts, "repo/config"), master.Seal(nil, text), 0o400))
}

// hostile adds a snapshot of the volume evil whose tree, args[0], is JSON in
// which TREE stands for the ID of a tree with one empty file "x".
func hostile(ts *testscript.TestScript, neg bool, args []string) {
	ctx := context.Background()
	r := openRepository(ts)
	defer r.Close()
	var id backup.ID
	err := r.Update(ctx, func(ctx context.Context, w *repo.Writer) error {
		inner, err := w.Save(ctx, backup.TreeBlob, []byte(`{"nodes":[{"name":"x","type":"file","uid":0,"gid":0,"content":[]}]}`+"\n"))
		if err != nil {
			return err
		}
		tree := strings.ReplaceAll(args[0], "TREE", inner.ID.String())
		mid, err := w.Save(ctx, backup.TreeBlob, []byte(tree+"\n"))
		if err != nil {
			return err
		}
		root := fmt.Sprintf(`{"nodes":[{"name":"evil","type":"dir","mode":2147484141,"uid":0,"gid":0,"content":null,"subtree":"%s"}]}`+"\n", mid.ID)
		top, err := w.Save(ctx, backup.TreeBlob, []byte(root))
		id = top.ID
		return err
	})
	ts.Check(err)
	_, err = r.SaveSnapshot(ctx, &backup.Snapshot{Time: time.Now(), Tree: &id, Paths: []string{"/evil"}, Hostname: "kitchen-pi", Tags: []string{"volume:evil"}})
	ts.Check(err)
}

// smallDisk mounts a tmpfs of args[1] bytes on the folder args[0].
func smallDisk(ts *testscript.TestScript, neg bool, args []string) {
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+args[1]); err != nil {
		ts.Fatalf("mount a small file system: %v; run the tests as root", err)
	}
	ts.Defer(func() { ts.Check(syscall.Unmount(dir, 0)) })
}

// interrupted runs a program with an input that never comes, sends it a signal,
// INT or TERM, as soon as it has locked the repository, and checks what it
// leaves: the exit code, one line, and no lock.
func interrupted(ts *testscript.TestScript, neg bool, args []string) {
	signal := map[string]os.Signal{"INT": syscall.SIGINT, "TERM": syscall.SIGTERM}[args[0]]
	in, out, err := os.Pipe()
	ts.Check(err)
	defer in.Close()
	defer out.Close()
	program := filepath.SplitList(ts.Getenv("PATH"))[0]
	cmd := exec.Command(filepath.Join(program, args[1]), args[2:]...)
	cmd.Dir, cmd.Stdin = ts.MkAbs("."), in
	for _, name := range []string{"PATH", "IDE49_BACKUP_CONFIG", "IDE49_BACKUP_STATE", "TZ"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	ts.Check(cmd.Start())
	locks := func() []string {
		list, err := filepath.Glob(ts.MkAbs("repo/locks/*"))
		ts.Check(err)
		return list
	}
	for start := time.Now(); len(locks()) == 0; time.Sleep(2 * time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			ts.Check(cmd.Process.Kill())
			ts.Fatalf("%v never locked the repository: %s", args[1:], &stderr)
		}
	}
	ts.Check(cmd.Process.Signal(signal))
	_ = cmd.Wait() // the exit code is looked at below
	if got := cmd.ProcessState.ExitCode(); got != exitInterrupted {
		ts.Fatalf("exit code %d, not %d: %s", got, exitInterrupted, &stderr)
	}
	checkComplaint(ts, exitInterrupted, stderr.String())
	if left := locks(); len(left) > 0 {
		ts.Fatalf("locks stay: %v", left)
	}
}

// TestVerbs checks what every verb must have.
func TestVerbs(t *testing.T) {
	a := &app{stdout: io.Discard, stderr: io.Discard, env: os.LookupEnv, now: time.Now}
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Short == "" || cmd.Example == "" || cmd.RunE == nil {
			t.Errorf("%s: lacks a short description, an example or RunE", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	root := a.root()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "" {
			continue // cobra's help command, switched off
		}
		visit(cmd)
	}
	var names []string
	for _, cmd := range root.Commands() {
		names = append(names, cmd.Name())
	}
	for _, want := range strings.Fields("init backup restore snapshots ls stats check version completion config") {
		if !slices.Contains(names, want) {
			t.Errorf("no verb %s", want)
		}
	}
}

func TestExitCode(t *testing.T) {
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		ctx  context.Context
		err  error
		want int
	}{
		{t.Context(), nil, exitDone},
		{t.Context(), io.ErrUnexpectedEOF, exitFailed},
		{t.Context(), usagef("x"), exitUsage},
		{t.Context(), errWarned, exitWarnings},
		{t.Context(), fmt.Errorf("x: %w", repo.ErrNoRepository), exitNoRepository},
		{t.Context(), fmt.Errorf("x: %w", repo.ErrLocked), exitLocked},
		{t.Context(), fmt.Errorf("x: %w", repo.ErrPassword), exitPassword},
		{t.Context(), errAbsent, exitAbsent},
		{t.Context(), context.Canceled, exitFailed},
		{cancelled, fmt.Errorf("x: %w", context.Canceled), exitInterrupted},
		{cancelled, nil, exitDone},
	} {
		if got := exitCode(tc.ctx, tc.err); got != tc.want {
			t.Errorf("exitCode(%v) = %d, want %d", tc.err, got, tc.want)
		}
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain Grüße 温度":    "plain Grüße 温度",
		"\x1b[2J":           `\x1b[2J`,
		"a\nb\tc":           `a\nb\tc`,
		"bad\xff":           `bad\xff`,
		"right\u202eto":     `right\u202eto`,
		"replacement\ufffd": `replacement` + "\ufffd",
	} {
		if got := printable(in); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 1 << 30: "1.0 GiB", 1<<64 - 1: "16384.0 PiB",
	} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestNewPassword(t *testing.T) {
	p := newPassword()
	if len(p) != 47 || p == newPassword() || strings.Count(p, "-") != 7 {
		t.Errorf("newPassword() = %q", p)
	}
}

func TestChoose(t *testing.T) {
	at := func(h int) time.Time { return time.Date(2026, 11, 20, h, 0, 0, 0, time.UTC) }
	snap := func(n byte, volume, host string, h int, tags ...string) *backup.Snapshot {
		return &backup.Snapshot{ID: backup.ID{n}, Time: at(h), Hostname: host, Tags: append(tags, "volume:"+volume)}
	}
	all := []*backup.Snapshot{
		snap(1, "a", "pi", 1), snap(2, "a", "pi", 2, "incomplete"), snap(3, "b", "pi", 2, "incomplete"), snap(4, "a", "pi", 3, "before-restore"),
		snap(5, "a", "other", 3), snap(6, "b", "pi", 4, "incomplete"), snap(7, "a", "pi", 5), snap(8, "c", "pi", 9),
	}
	for h, want := range map[int]string{0: "a:0 b:0 c:0", 1: "a:1 b:0 c:0", 2: "a:1 b:3 c:0", 4: "a:1 b:6 c:0", 5: "a:7 b:6 c:0", 9: "a:7 b:6 c:8"} {
		var got []string
		for _, c := range choose(all, "pi", at(h)) {
			n := byte(0)
			if c.snapshot != nil {
				n = c.snapshot.ID[0]
			}
			got = append(got, fmt.Sprintf("%s:%d", c.volume, n))
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("at %d: %s, want %s", h, g, want)
		}
	}
}
