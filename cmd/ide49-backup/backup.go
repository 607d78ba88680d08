package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/archiver"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/policy"
)

type backupFlags struct {
	to, time       string
	tags           []string
	dryRun         bool
	stdin, command string
	compression    string
}

func (a *app) backupCommand() *cobra.Command {
	var f backupFlags
	cmd := &cobra.Command{
		Use:   "backup [VOLUME…]",
		Short: "Take a snapshot of every volume, or of those named",
		Long: `Takes one snapshot of each volume: all, or those named. What the repository has
already is not stored again. Files that can't be read are reported, the snapshot
is marked incomplete, and the exit code is 3.

Without any configuration the repository /backup and its password file
/service-config/config/backup.key are made the first time.`,
		Example: `  ide49-backup backup
  ide49-backup backup mosquitto nodered --tag before-upgrade
  ide49-backup backup --to drive --dry-run
  mysqldump --all-databases | ide49-backup backup --stdin databases.sql
  ide49-backup backup --command databases.sql -- mysqldump --all-databases`,
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			job, err := a.plannedBackup(cmd, f, args)
			if err != nil {
				return err
			}
			return a.backup(cmd.Context(), job)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.to, "to", "", "repository: its `name` in the configuration, or a folder")
	fl.StringVar(&f.time, "time", "", "`time` of the snapshots, for imports: RFC 3339 or \"2026-11-20 14:30\"")
	fl.StringArrayVar(&f.tags, "tag", nil, "`tag` for the snapshots; may be given more than once")
	fl.BoolVarP(&f.dryRun, "dry-run", "n", false, "read everything, store nothing")
	fl.StringVar(&f.stdin, "stdin", "", "store standard input as a file of this `name`")
	fl.StringVar(&f.command, "command", "", "store what the program after -- prints as a file of this `name`")
	fl.StringVar(&f.compression, "compression", repo.Auto.String(), "`how` new data is compressed: auto, fastest, better, max or off")
	complete(cmd, "to", a.completeRepositories)
	complete(cmd, "compression", cobra.FixedCompletions([]string{"auto", "fastest", "better", "max", "off"}, cobra.ShellCompDirectiveNoFileComp))
	for _, flag := range []string{"time", "tag", "stdin", "command"} {
		complete(cmd, flag, cobra.NoFileCompletions)
	}
	return cmd
}

// A backupJob is a backup before it begins.
type backupJob struct {
	place   place
	device  string
	time    time.Time
	loc     *time.Location
	tags    []string
	dryRun  bool
	sources []archiver.Source

	compression repo.Compression
	// program is run for its output; nil for most jobs.
	program *programOutput
	// initialize says that a repository that is missing is made: nothing
	// is configured and nothing was there before.
	initialize bool
}

func (a *app) plannedBackup(cmd *cobra.Command, f backupFlags, args []string) (*backupJob, error) {
	if f.to != "" && a.repoName != "" && f.to != a.repoName {
		return nil, usagef("--to and --repo name different repositories; give one of them")
	}
	for _, tag := range f.tags {
		if tag == backup.IncompleteTag || tag == backup.BeforeRestoreTag || strings.HasPrefix(tag, restoreTag) || strings.HasPrefix(tag, backup.VolumeTag) ||
			tag == "" || strings.Contains(tag, ",") {
			return nil, usagef("--tag %q: this tag has a meaning of its own, is empty, or holds a comma; choose another", tag)
		}
	}
	compression, err := repo.ParseCompression(f.compression)
	if err != nil {
		return nil, usagef("--compression: %w", err)
	}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	job := &backupJob{compression: compression, time: a.now(), loc: cfg.Location(), tags: f.tags, dryRun: f.dryRun}
	if f.time != "" {
		if job.time, err = exactTime(f.time, job.loc); err != nil {
			return nil, err
		}
	}
	name := f.to
	if name == "" {
		name = a.repoName
	}
	if job.place, err = a.place(cfg, name); err != nil {
		return nil, err
	}
	if err := a.addSources(cmd, cfg, job, f, args); err != nil {
		return nil, err
	}
	if job.device, err = a.device(cfg); err != nil {
		return nil, err
	}
	job.initialize = cfg.File == "" && name == "" && a.passwordFile == "" && !f.dryRun
	return job, nil
}

// addSources says what is backed up: volumes, or the output of something.
func (a *app) addSources(cmd *cobra.Command, cfg *policy.Config, job *backupJob, f backupFlags, args []string) error {
	dash := cmd.ArgsLenAtDash()
	name := f.stdin
	if f.command != "" {
		name = f.command
	}
	switch {
	case f.stdin != "" && f.command != "":
		return usagef("--stdin and --command can't be given both")
	case f.command != "" && (dash != 0 || len(args) == 0):
		return usagef("--command needs a program after --, and no volumes: `ide49-backup backup --command NAME -- PROGRAM ARGS`")
	case f.command == "" && dash >= 0:
		return usagef("what comes after -- belongs to --command NAME")
	case f.stdin != "" && len(args) > 0:
		return usagef("--stdin stores one file; it goes without volumes")
	}
	if name == "" {
		return a.addVolumes(cfg, job, args)
	}
	if err := backup.CheckName(name); err != nil {
		return usagef("%q can't be the name of a file: %w", name, err)
	}
	src := archiver.Source{Volume: backup.Volume{Name: name, Path: "/" + name}, Stream: interruptible(cmd.Context(), a.stdin)}
	if f.command != "" {
		job.program = &programOutput{args: args, stderr: a.stderr}
		src.Stream = job.program
	}
	job.sources = []archiver.Source{src}
	return nil
}

func (a *app) addVolumes(cfg *policy.Config, job *backupJob, names []string) error {
	all, problems, err := policy.Volumes(cfg)
	a.problems(problems)
	if err != nil {
		return &usageError{err}
	}
	if len(names) > 0 {
		if all, err = policy.Select(all, names...); err != nil {
			return &usageError{err}
		}
	}
	for _, v := range all {
		job.sources = append(job.sources, archiver.Source{
			Volume: v.Volume, Exclude: v.Excludes.Match, Patterns: v.Excludes.Patterns(),
			OneFileSystem: v.OneFileSystem, ExcludeCaches: v.ExcludeCaches,
			ExcludeIfPresent: v.ExcludeIfPresent, LargerThan: v.LargerThan,
		})
	}
	return nil
}

// exactTime reads the time of a snapshot.
func exactTime(text string, loc *time.Location) (time.Time, error) {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02T15:04:05", "2006-01-02T15:04"} {
		if t, err := time.ParseInLocation(layout, text, loc); err == nil && t.Year() > 0 && t.Year() < 10000 {
			return t, nil
		}
	}
	return time.Time{}, usagef("--time %q is no time; write it as 2026-11-20T14:30:05Z or \"2026-11-20 14:30\"", text)
}

// backup carries a job out and tells of it.
func (a *app) backup(ctx context.Context, job *backupJob) error {
	if job.initialize {
		if err := a.firstRepository(ctx, job.place); err != nil {
			return err
		}
	}
	for _, src := range job.sources {
		if src.Stream == nil {
			if rel, ok := below(job.place.location.Path(), src.Volume.Path); ok {
				a.say("%s: leaves out %s, the repository itself", printable(src.Volume.Name), printable(rel))
			}
		}
	}
	return a.withRepository(ctx, job.place, access{dryRun: job.dryRun, index: true, options: repo.Options{Compression: job.compression}}, func(ctx context.Context, s *session) error {
		start := time.Now()
		results, err := a.archive(ctx, s, job)
		rep := newBackupReport(job, results, time.Since(start))
		if err == nil || len(results) > 0 {
			if perr := rep.print(a, job.loc); perr != nil {
				return errors.Join(err, perr)
			}
		}
		if err != nil {
			return err
		}
		return rep.err()
	})
}

// firstRepository makes the built-in repository if neither it nor its password
// was ever there. Where one of them is, something was lost or not mounted, and
// making another would hide that.
func (a *app) firstRepository(ctx context.Context, p place) error {
	if _, err := os.Lstat(p.secret.File()); p.secret.File() == "" || !errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if entries, err := os.ReadDir(p.location.Path()); len(entries) > 0 || err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil
	}
	made, err := initRepository(ctx, p, local.Options{})
	if err != nil {
		return err
	}
	made.print(a)
	return nil
}

// archive runs the archiver under a meter.
func (a *app) archive(ctx context.Context, s *session, job *backupJob) ([]*archiver.Result, error) {
	var names []string
	for _, src := range job.sources {
		names = append(names, src.Volume.Name)
	}
	m := a.newMeter(names)
	defer m.stop()
	var current *row // volumes come one after the other
	obs := archiver.Observer{
		Start: func(v backup.Volume, parent *backup.Snapshot) {
			var expect uint64
			if parent != nil && parent.Summary != nil {
				expect = parent.Summary.TotalBytesProcessed
			}
			current = m.begin(v.Name, expect)
		},
		Done: func(*archiver.Result) { current.end() },
		Read: func(_ backup.Volume, n int) {
			current.read.Add(int64(n))
			current.bytes.Add(int64(n))
		},
		Item: func(v backup.Volume, rel string, c archiver.Change, size uint64) {
			current.files.Add(1)
			if c == archiver.Unmodified {
				current.bytes.Add(int64(size))
			}
		},
		Problem: func(v backup.Volume, p archiver.Problem) {
			path := filepath.Join(v.Path, p.Path)
			m.warn("%s: not in the snapshot, or not whole: %v", path, p.Err)
			m.event(struct {
				Event  string `json:"event"`
				Volume string `json:"volume"`
				Path   string `json:"path"`
				Error  string `json:"error"`
			}{"problem", v.Name, path, p.Err.Error()})
		},
	}
	if job.program != nil {
		if err := job.program.start(ctx); err != nil {
			return nil, err
		}
		defer job.program.stop()
	}
	return archiver.Run(ctx, s.repo, job.sources, archiver.Job{
		Time: job.time, Hostname: job.device, Tags: job.tags, Program: program(), History: s.snapshots,
		Skip: []string{s.place.location.Path()},
	}, obs)
}

// A backupReport is what is told at the end of a backup.
type backupReport struct {
	Event      string         `json:"event"` // "summary"
	Repository string         `json:"repository"`
	Device     string         `json:"device"`
	Time       time.Time      `json:"time"`
	DryRun     bool           `json:"dry_run"`
	Seconds    float64        `json:"seconds"`
	Volumes    []volumeReport `json:"volumes"`
}

type volumeReport struct {
	Volume     string `json:"volume"`
	Path       string `json:"path"`
	Snapshot   string `json:"snapshot,omitempty"`
	Parent     string `json:"parent,omitempty"`
	Files      uint64 `json:"files"`
	Bytes      uint64 `json:"bytes"`
	New        uint64 `json:"files_new"`
	Changed    uint64 `json:"files_changed"`
	Unmodified uint64 `json:"files_unmodified"`
	Added      uint64 `json:"bytes_added"`
	Stored     uint64 `json:"bytes_stored"`
	Problems   int    `json:"problems"`
	Emptied    bool   `json:"emptied,omitempty"`
	Error      string `json:"error,omitempty"`

	err error
}

func newBackupReport(job *backupJob, results []*archiver.Result, took time.Duration) *backupReport {
	rep := &backupReport{
		Event: "summary", Repository: job.place.String(), Device: job.device, Time: job.time.In(job.loc),
		DryRun: job.dryRun, Seconds: took.Seconds(), Volumes: []volumeReport{},
	}
	for _, res := range results {
		if res == nil {
			continue
		}
		v := volumeReport{Volume: res.Volume.Name, Path: res.Volume.Path, Problems: res.Problems, Emptied: res.Emptied, err: res.Err}
		if res.Err != nil {
			v.Error = res.Err.Error()
		}
		if sn := res.Snapshot; sn != nil {
			if !job.dryRun {
				v.Snapshot = sn.ID.String()
			}
			if sn.Parent != nil {
				v.Parent = sn.Parent.String()
			}
			sum := sn.Summary
			v.Files, v.Bytes = sum.TotalFilesProcessed, sum.TotalBytesProcessed
			v.New, v.Changed, v.Unmodified = sum.FilesNew, sum.FilesChanged, sum.FilesUnmodified
			v.Added, v.Stored = sum.DataAdded, sum.DataAddedPacked
		}
		rep.Volumes = append(rep.Volumes, v)
	}
	return rep
}

func (rep *backupReport) print(a *app, loc *time.Location) error {
	for _, v := range rep.Volumes {
		if v.Emptied {
			a.warn("%s: %s holds nothing, but did the last time; a drive or share may be missing. The snapshots before keep what was there", v.Volume, v.Path)
		}
		if v.Problems > 0 {
			a.warn("%s: %s could not be read; the snapshot is marked incomplete", v.Volume, count(v.Problems, "file or folder", "files and folders"))
		}
	}
	if a.json {
		return a.printLine(rep)
	}
	if a.quiet {
		return nil
	}
	t := newTable("Volume", "Snapshot", ">Files", ">Size", ">New", ">Changed", ">Added", ">Stored", "")
	var total volumeReport
	for _, v := range rep.Volumes {
		if v.err != nil {
			t.add(v.Volume, "none", "", "", "", "", "", "", "failed: "+v.Error)
			continue
		}
		id, note := "–", ""
		if v.Snapshot != "" {
			id = v.Snapshot[:8]
		}
		if v.Problems > 0 {
			note = "incomplete"
		}
		t.add(v.Volume, id, fmt.Sprint(v.Files), bytesText(v.Bytes), fmt.Sprint(v.New), fmt.Sprint(v.Changed),
			bytesText(v.Added), bytesText(v.Stored), note)
		total.Files += v.Files
		total.Bytes += v.Bytes
		total.Stored += v.Stored
	}
	if err := t.print(a, ""); err != nil {
		return err
	}
	verb, note := "took", ""
	if rep.DryRun {
		verb, note = "would take", "; nothing was stored"
	}
	n := 0
	for _, v := range rep.Volumes {
		if v.err == nil {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	a.say("%s %s of %s at %s in %s: %s, %s, %s stored in %s%s", verb, count(n, "snapshot", "snapshots"), printable(rep.Device),
		clock(rep.Time, loc), spanText(time.Duration(rep.Seconds*float64(time.Second))), count(total.Files, "file", "files"),
		bytesText(total.Bytes), bytesText(total.Stored), printable(rep.Repository), note)
	return nil
}

// err returns what the run ends with.
func (rep *backupReport) err() error {
	var failed []error
	warned := false
	for _, v := range rep.Volumes {
		if v.err != nil {
			failed = append(failed, fmt.Errorf("back up %s: %w", v.Volume, v.err))
		}
		warned = warned || v.Problems > 0 || v.Emptied
	}
	switch {
	case len(failed) > 0:
		return errors.Join(failed...)
	case warned:
		return errWarned
	}
	return nil
}

// below returns the path of a folder relative to another one that it is in or
// that it is, after all symbolic links.
func below(dir, in string) (rel string, ok bool) {
	d, err1 := filepath.EvalSymlinks(dir)
	i, err2 := filepath.EvalSymlinks(in)
	if err1 != nil || err2 != nil {
		return "", false
	}
	rel, err := filepath.Rel(i, d)
	return rel, err == nil && filepath.IsLocal(rel)
}

// A programOutput reads what a program prints. Its end is the end of the
// output only if the program succeeded; else it is an error, so that never half
// of it becomes a snapshot.
type programOutput struct {
	args   []string
	stderr io.Writer
	cmd    *exec.Cmd
	out    io.ReadCloser
	ended  bool
}

func (p *programOutput) start(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, p.args[0], p.args[1:]...)
	cmd.Stderr = p.stderr
	// What the program started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", p.args[0], err)
	}
	p.cmd, p.out = cmd, out
	return nil
}

func (p *programOutput) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if err == nil || n > 0 {
		return n, nil
	}
	if p.ended {
		return 0, err
	}
	p.ended = true
	werr := p.cmd.Wait()
	switch {
	case werr != nil:
		return 0, fmt.Errorf("run %s: %w; nothing of its output was kept", p.args[0], werr)
	case !errors.Is(err, io.EOF):
		return 0, fmt.Errorf("read what %s prints: %w", p.args[0], err)
	}
	return 0, io.EOF
}

// stop ends the program if it still runs.
func (p *programOutput) stop() {
	if p.ended {
		return
	}
	p.ended = true
	// Both fail if it has ended by itself.
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGTERM)
	_ = p.cmd.Wait()
}
