package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/restorer"
	"github.com/iot49/ide49-backup/policy"
)

type restoreFlags struct {
	at, snapshot, to, host, overwrite string
	volumes, include, exclude         []string
	del, dryRun, verify               bool
	undo, noUndo, yes                 bool
}

func (a *app) restoreCommand() *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:   "restore [PATH…] --at TIME",
		Short: "Bring volumes, folders or files back",
		Long: `Brings back what volumes held at a time: all volumes, or PATHs, which are
absolute or begin with a volume's name. For each volume the newest complete
snapshot not later than that time is taken; a day means its end.

Without --to, volumes are restored in place: a snapshot of what will be
overwritten or deleted is taken first, and restore --undo brings that back.
With --to DIR, each volume goes into a folder of its name below DIR. On a
terminal the plan is shown and confirmed; elsewhere the restore just goes on.`,
		Example: `  ide49-backup restore --at yesterday
  ide49-backup restore mosquitto/data/mosquitto.db --at "2026-11-20 14:30"
  ide49-backup restore /service-config/nodered --at 3d --delete
  ide49-backup restore --at today --to /tmp/look --volume homeassistant
  ide49-backup restore --undo`,
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.restore(cmd.Context(), f, args)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.at, "at", "", "`time`: a moment, a day or an age, as \"2026-11-20 14:30\", yesterday, 36h")
	fl.StringVar(&f.snapshot, "snapshot", "", "take the snapshot of this `ID`")
	fl.StringArrayVar(&f.volumes, "volume", nil, "restore this `volume`; may be given more than once")
	fl.StringVar(&f.to, "to", "", "restore into this `folder`, not in place")
	fl.StringVar(&f.host, "host", "", "take snapshots of this `device` (default this one)")
	fl.StringArrayVar(&f.include, "include", nil, "restore only what matches `pattern`, as in .gitignore; may be given more than once")
	fl.StringArrayVar(&f.exclude, "exclude", nil, "leave out what matches `pattern`; may be given more than once")
	fl.StringVar(&f.overwrite, "overwrite", "changed", "what happens to existing files: always, changed, newer or never")
	fl.BoolVar(&f.del, "delete", false, "remove what the snapshot does not have")
	fl.BoolVarP(&f.dryRun, "dry-run", "n", false, "show the plan and change nothing")
	fl.BoolVar(&f.verify, "verify", false, "read again what was written, and compare")
	fl.BoolVar(&f.undo, "undo", false, "undo the last restore in place")
	fl.BoolVar(&f.noUndo, "no-undo", false, "keep no copy of what is overwritten, as for a repository that can't be written")
	fl.BoolVarP(&f.yes, "yes", "y", false, "do not ask")
	complete(cmd, "at", completeTimes)
	complete(cmd, "snapshot", a.completeSnapshots)
	complete(cmd, "volume", a.completeVolumes)
	complete(cmd, "host", a.completeHosts)
	complete(cmd, "to", completeFolders)
	complete(cmd, "overwrite", words("always", "changed", "newer", "never"))
	complete(cmd, "include", cobra.NoFileCompletions)
	complete(cmd, "exclude", cobra.NoFileCompletions)
	return cmd
}

// A restoreJob is a restore before its plan is made.
type restoreJob struct {
	cfg    *policy.Config
	place  place
	device string // this one
	host   string // of the snapshots
	moment policy.Moment
	flags  restoreFlags
	opt    restorer.Options
	paths  []string
}

func (a *app) restore(ctx context.Context, f restoreFlags, args []string) error {
	job, err := a.plannedRestore(f, args)
	if err != nil {
		return err
	}
	return a.withRepository(ctx, job.place, access{dryRun: f.dryRun, index: true}, func(ctx context.Context, s *session) error {
		var parts []*part
		var err error
		if f.undo {
			parts, err = a.undoParts(ctx, s, job)
		} else {
			parts, err = a.restoreParts(ctx, s, job)
		}
		if err != nil {
			return err
		}
		return a.restoreAll(ctx, s, job, parts)
	})
}

func (a *app) plannedRestore(f restoreFlags, args []string) (*restoreJob, error) {
	chosen := 0
	for _, given := range []bool{f.at != "", f.snapshot != "", f.undo} {
		if given {
			chosen++
		}
	}
	switch {
	case chosen == 0:
		return nil, usagef("say which state to restore: --at TIME, as --at yesterday, or --snapshot ID; or --undo the last restore")
	case chosen > 1:
		return nil, usagef("--at, --snapshot and --undo exclude each other; give one of them")
	case f.undo && (f.to != "" || len(args) > 0 || len(f.include) > 0 || len(f.exclude) > 0 || f.del || f.host != ""):
		return nil, usagef("--undo takes back a whole restore: it goes with --volume, --dry-run, --verify and --yes only")
	case f.snapshot != "" && len(f.volumes) > 0:
		return nil, usagef("--snapshot names one volume already; leave out --volume")
	}
	job := &restoreJob{flags: f, paths: args}
	var err error
	if job.opt.Overwrite, err = restorer.ParseOverwrite(f.overwrite); err != nil {
		return nil, &usageError{fmt.Errorf("--overwrite: %w", err)}
	}
	job.opt.Delete, job.opt.Verify = f.del, f.verify
	if job.cfg, err = a.config(); err != nil {
		return nil, err
	}
	if f.at != "" {
		if job.moment, err = policy.ParseMoment(f.at, a.now(), job.cfg.Location()); err != nil {
			return nil, &usageError{fmt.Errorf("--at: %w", err)}
		}
	}
	if job.place, err = a.place(job.cfg, a.repoName); err != nil {
		return nil, err
	}
	if job.device, err = a.device(job.cfg); err != nil {
		return nil, err
	}
	if job.host = f.host; job.host == "" {
		job.host = job.device
	}
	return job, nil
}

// A part is the restore of one volume.
type part struct {
	volume   string
	snapshot *backup.Snapshot
	target   string // absolute path of the folder
	inPlace  bool
	paths    []string // below the target; none means all
	opt      restorer.Options

	root  *os.Root
	plan  *restorer.Plan
	stats restorer.Stats
	err   error // some entries failed
}

// restoreParts chooses snapshots and targets.
func (a *app) restoreParts(ctx context.Context, s *session, job *restoreJob) ([]*part, error) {
	chosen, err := a.restoreChoices(s, job)
	if err != nil {
		return nil, err
	}
	var parts []*part
	for _, c := range chosen {
		if !c.snapshot.Complete() {
			a.warn("%s: the snapshot %s is incomplete: some files could not be read when it was taken; there is no complete one that early", c.volume, c.snapshot.ID.Short())
		}
		p := &part{volume: c.volume, snapshot: c.snapshot, paths: c.paths, opt: job.opt, inPlace: job.flags.to == ""}
		if err := p.aim(ctx, s, job); err != nil {
			if errors.Is(err, errNoFolder) && len(chosen) > 1 && len(job.flags.volumes)+len(job.paths) == 0 {
				a.warn("%s: not restored: %v", c.volume, err)
				continue
			}
			return nil, fmt.Errorf("restore %s: %w", c.volume, err)
		}
		parts = append(parts, p)
	}
	return parts, nil
}

type pathChoice struct {
	choice
	paths []string
}

// restoreChoices finds the snapshots that the time, the volumes and the paths
// of a job name.
func (a *app) restoreChoices(s *session, job *restoreJob) ([]pathChoice, error) {
	f := job.flags
	var all []choice
	if f.snapshot != "" {
		sn, err := a.pick(job.cfg, s, job.host, f.snapshot)
		if err != nil {
			return nil, err
		}
		all = []choice{{sn.Volume(), sn, sn}}
	} else if all = choose(s.snapshots, job.host, job.moment.Time); len(all) == 0 {
		return nil, noSnapshots(s, job.host)
	}
	var chosen []pathChoice
	want := func(c choice, rel string) {
		i := slices.IndexFunc(chosen, func(o pathChoice) bool { return o.volume == c.volume })
		if i < 0 {
			i = len(chosen)
			chosen = append(chosen, pathChoice{choice: c})
		} else if len(chosen[i].paths) == 0 {
			return // all of it is wanted already
		}
		if rel == "" {
			chosen[i].paths = nil
			return
		}
		chosen[i].paths = append(chosen[i].paths, rel)
	}
	for _, name := range f.volumes {
		i := slices.IndexFunc(all, func(c choice) bool { return c.volume == name })
		if i < 0 {
			return nil, fmt.Errorf("there are no snapshots of a volume %q; there are those of %s", name, volumeNames(all))
		}
		want(all[i], "")
	}
	for _, text := range job.paths {
		c, rel, err := locate(job.cfg, all, text, f.snapshot != "")
		if err != nil {
			return nil, err
		}
		want(c, rel)
	}
	named := len(chosen) > 0
	if !named {
		for _, c := range all {
			want(c, "")
		}
	}
	var missing []choice
	for _, c := range chosen {
		if c.snapshot == nil {
			missing = append(missing, c.choice)
		}
	}
	if len(missing) > 0 && (named || len(missing) == len(chosen)) {
		return nil, tooEarly(job.moment, missing, job.cfg.Location())
	}
	for _, c := range missing {
		a.warn("%s: not restored: its oldest snapshot is of %s", c.volume, clock(c.oldest.Time, job.cfg.Location()))
	}
	return slices.DeleteFunc(chosen, func(c pathChoice) bool { return c.snapshot == nil }), nil
}

func volumeNames(all []choice) string {
	var names []string
	for _, c := range all {
		names = append(names, c.volume)
	}
	return strings.Join(names, ", ")
}

// locate finds the volume that a path on the command line is in, and the path
// below it.
func locate(cfg *policy.Config, all []choice, text string, single bool) (choice, string, error) {
	name := path.Clean(text)
	if path.IsAbs(name) {
		best, bestRoot := choice{}, ""
		for _, c := range all {
			for _, root := range roots(cfg, c) {
				if (name == root || strings.HasPrefix(name, strings.TrimSuffix(root, "/")+"/")) && len(root) > len(bestRoot) {
					best, bestRoot = c, root
				}
			}
		}
		if bestRoot == "" {
			return choice{}, "", fmt.Errorf("%s is in no volume that has snapshots; those are %s", text, volumeNames(all))
		}
		return best, strings.Trim(strings.TrimPrefix(name, strings.TrimSuffix(bestRoot, "/")), "/"), nil
	}
	if !filepath.IsLocal(name) {
		return choice{}, "", usagef("%q is no path in a volume; write VOLUME/PATH or an absolute path", text)
	}
	first, rest, _ := strings.Cut(name, "/")
	for _, c := range all {
		if c.volume == first {
			return c, rest, nil
		}
	}
	if single {
		return all[0], name, nil
	}
	return choice{}, "", fmt.Errorf("%q: there are no snapshots of a volume %q; there are those of %s", text, first, volumeNames(all))
}

// roots returns where a volume was and is.
func roots(cfg *policy.Config, c choice) []string {
	var list []string
	for _, sn := range []*backup.Snapshot{c.snapshot, c.oldest} {
		if sn != nil && len(sn.Paths) == 1 {
			list = append(list, path.Clean(sn.Paths[0]))
		}
	}
	if dir := configuredPath(cfg, c.volume); dir != "" {
		list = append(list, dir)
	}
	return list
}

// configuredPath returns the folder of a volume in the configuration, or "".
func configuredPath(cfg *policy.Config, volume string) string {
	volumes, _, err := policy.Volumes(cfg)
	if err != nil {
		return "" // nothing is there any more: what a restore is for
	}
	for _, v := range volumes {
		if v.Name == volume {
			return v.Path
		}
	}
	return ""
}

var (
	errNoFolder = errors.New("the snapshot holds a single file or several folders; restore it with --to")
	errInside   = errors.New("the target is in the repository; choose a folder outside it with --to")
)

// aim sets the target of a part and what is selected.
func (p *part) aim(ctx context.Context, s *session, job *restoreJob) error {
	sn, f := p.snapshot, &job.flags
	folder := false
	if len(sn.Paths) == 1 {
		node, err := lookup(ctx, s.repo, sn, "")
		if err != nil {
			return err
		}
		folder = node.Type == backup.Dir
	}
	switch {
	case f.to == "" && !folder:
		return errNoFolder
	case f.to == "":
		if p.target = configuredPath(job.cfg, p.volume); p.target == "" {
			p.target = filepath.Clean(sn.Paths[0])
		}
		if !filepath.IsAbs(p.target) {
			return fmt.Errorf("the snapshot is of the path %q, which is not absolute; restore it with --to", p.target)
		}
	default:
		to, err := filepath.Abs(f.to)
		if err != nil {
			return fmt.Errorf("target %s: %w", f.to, err)
		}
		// The name comes from the repository: it may be anything.
		p.target = to
		if folder && backup.CheckName(p.volume) == nil {
			p.target = filepath.Join(to, p.volume)
		} else {
			p.opt.Root = "/"
		}
	}
	for _, rel := range p.paths {
		if _, err := lookup(ctx, s.repo, sn, rel); err != nil {
			return err
		}
	}
	if err := p.selectBy(f.include, f.exclude); err != nil {
		return err
	}
	return p.spareRepository(s.place.location.Path())
}

// selectBy makes the filters from paths and patterns.
func (p *part) selectBy(include, exclude []string) error {
	in, err := policy.NewExcludes(include...)
	if err != nil {
		return &usageError{fmt.Errorf("--include: %w", err)}
	}
	ex, err := policy.NewExcludes(exclude...)
	if err != nil {
		return &usageError{fmt.Errorf("--exclude: %w", err)}
	}
	p.opt.Exclude = ex.Match
	if own, ok := p.leftOut(); ok {
		p.opt.Exclude = func(rel string, isDir bool) bool { return ex.Match(rel, isDir) || own.Match(rel, isDir) }
	}
	if len(p.paths) == 0 && len(include) == 0 {
		return nil
	}
	p.opt.Include = func(rel string, isDir bool) bool {
		if len(p.paths) > 0 && !slices.ContainsFunc(p.paths, func(w string) bool { return rel == w || strings.HasPrefix(rel, w+"/") }) {
			return false
		}
		if len(include) == 0 || in.Match(rel, isDir) {
			return true
		}
		// What lies below something that is included is included.
		for dir := path.Dir(rel); dir != "."; dir = path.Dir(dir) {
			if in.Match(dir, true) {
				return true
			}
		}
		return false
	}
	return nil
}

// leftOut returns what was left out when the snapshot was taken. That it lacks
// those files does not mean that they were not there: --delete leaves them
// alone. The patterns of other programs mean other things.
func (p *part) leftOut() (*policy.Excludes, bool) {
	if !p.opt.Delete || p.opt.Root != "" || !strings.HasPrefix(p.snapshot.ProgramVersion, "ide49-backup ") {
		return nil, false
	}
	left, err := policy.NewExcludes(p.snapshot.Excludes...)
	return left, err == nil
}

// spareRepository refuses a target in the repository, and leaves a repository
// in the target alone.
func (p *part) spareRepository(dir string) error {
	own, err := os.Stat(dir)
	if err != nil {
		return err
	}
	for d := resolved(p.target); ; d = filepath.Dir(d) {
		if st, err := os.Stat(d); err == nil && os.SameFile(st, own) {
			return fmt.Errorf("%s: %w", p.target, errInside)
		}
		if d == filepath.Dir(d) {
			break
		}
	}
	if rel, ok := below(dir, p.target); ok {
		exclude := p.opt.Exclude
		p.opt.Exclude = func(r string, isDir bool) bool { return r == rel || exclude != nil && exclude(r, isDir) }
	}
	return nil
}

// resolved returns a path without symbolic links, as far as it exists.
func resolved(name string) string {
	rest := ""
	for d := filepath.Clean(name); ; d = filepath.Dir(d) {
		if real, err := filepath.EvalSymlinks(d); err == nil {
			return filepath.Join(real, rest)
		}
		if d == filepath.Dir(d) {
			return filepath.Clean(name)
		}
		rest = filepath.Join(filepath.Base(d), rest)
	}
}

// prepare makes the plan of a part. Where the target is missing, it is made if
// mayMake; else the plan is that for an empty folder.
func (p *part) prepare(ctx context.Context, s *session, mayMake bool) (err error) {
	p.close()
	root, err := os.OpenRoot(p.target)
	if errors.Is(err, fs.ErrNotExist) {
		if p.inPlace {
			// A volume's folder may be lost, but not what it is in.
			if _, err := os.Stat(filepath.Dir(p.target)); err != nil {
				return fmt.Errorf("%w; mount it, or restore with --to", err)
			}
		}
		if mayMake {
			if err = os.MkdirAll(p.target, 0o700); err == nil {
				root, err = os.OpenRoot(p.target)
			}
		} else {
			var tmp string
			if tmp, err = os.MkdirTemp("", "ide49-backup-plan-"); err != nil {
				return err
			}
			defer func() { err = errors.Join(err, os.Remove(tmp)) }()
			root, err = os.OpenRoot(tmp)
		}
	}
	if err != nil {
		return fmt.Errorf("open target: %w", err)
	}
	p.root = root
	p.plan, err = restorer.Prepare(ctx, s.repo, p.snapshot, root, p.opt)
	return err
}

func (p *part) close() {
	if p.root != nil {
		p.root.Close() // opened for its path only: nothing is lost
		p.root = nil
	}
}

// idle reports whether there is nothing to do.
func (p *part) idle() bool {
	c := p.plan.Counts()
	return c.Created+c.Changed+c.Metadata+c.Deleted == 0 && !p.opt.Verify && p.plan.Failures() == nil
}

// restoreAll plans, asks, keeps what will be overwritten, and restores.
func (a *app) restoreAll(ctx context.Context, s *session, job *restoreJob, parts []*part) error {
	defer func() {
		for _, p := range parts {
			p.close()
		}
	}()
	for _, p := range parts {
		if err := p.prepare(ctx, s, false); err != nil {
			return fmt.Errorf("restore %s: %w", p.volume, err)
		}
	}
	if err := a.showPlan(job, parts); err != nil {
		return err
	}
	busy := slices.DeleteFunc(slices.Clone(parts), (*part).idle)
	if job.flags.dryRun || len(busy) == 0 {
		return a.restoreEnd(job, parts, time.Now())
	}
	if err := a.confirm(ctx, job); err != nil {
		return err
	}
	start := time.Now()
	for _, p := range busy {
		// Folders that were missing are made now. All plans are made
		// again, since asking may have taken long.
		if err := p.prepare(ctx, s, true); err != nil {
			return fmt.Errorf("restore %s: %w", p.volume, err)
		}
	}
	if job.flags.to == "" && !job.flags.noUndo {
		if err := a.keepBefore(ctx, s, job, busy); err != nil {
			return fmt.Errorf("keep what the restore overwrites: %w; nothing was restored", err)
		}
	}
	if err := a.execute(ctx, busy); err != nil {
		return err
	}
	return a.restoreEnd(job, parts, start)
}

func (a *app) execute(ctx context.Context, parts []*part) error {
	var names []string
	for _, p := range parts {
		names = append(names, p.volume)
	}
	m := a.newMeter(names)
	defer m.stop()
	for _, p := range parts {
		row := m.begin(p.volume, p.plan.Counts().WriteBytes)
		stats, err := p.plan.Execute(ctx, restorer.Observer{
			Progress: func(st restorer.Stats) {
				row.files.Store(int64(st.Files))
				// A file counts as written when it is complete; a long
				// one shows by what was fetched for it.
				row.bytes.Store(int64(max(st.Written, st.Fetched)))
				row.read.Store(int64(st.Fetched + st.Reused))
			},
			Warning: func(name string, err error) {
				m.warn("%s: %v", filepath.Join(p.target, name), err)
			},
			Failure: func(f restorer.Failure) {
				name := filepath.Join(p.target, f.Path)
				m.warn("%s: not restored: %v", name, f.Err)
				m.event(struct {
					Event  string `json:"event"`
					Volume string `json:"volume"`
					Path   string `json:"path"`
					Error  string `json:"error"`
				}{"problem", p.volume, name, f.Err.Error()})
			},
		})
		row.files.Store(int64(stats.Files))
		row.bytes.Store(int64(stats.Written))
		row.end()
		p.stats = stats
		if _, partial := errors.AsType[*restorer.PartialError](err); partial {
			p.err = err
		} else if err != nil {
			return fmt.Errorf("restore %s: %w", p.volume, err)
		}
	}
	return nil
}

type planLine struct {
	Volume    string       `json:"volume"`
	Snapshot  string       `json:"snapshot"`
	Time      time.Time    `json:"time"`
	Complete  bool         `json:"complete"`
	Target    string       `json:"target"`
	Created   int          `json:"created"`
	Replaced  int          `json:"replaced"`
	Metadata  int          `json:"metadata"`
	Deleted   int          `json:"deleted"`
	Unchanged int          `json:"unchanged"`
	Kept      int          `json:"kept"`
	Fetch     uint64       `json:"bytes_to_fetch"`
	Write     uint64       `json:"bytes_to_write"`
	Damaged   int          `json:"damaged"`
	Changes   []changeLine `json:"changes,omitempty"`
}

type changeLine struct {
	Action string          `json:"action"`
	Path   string          `json:"path"`
	Type   backup.NodeType `json:"type"`
	Size   uint64          `json:"size"`
}

// showPlan prints which snapshots were chosen and what will happen.
func (a *app) showPlan(job *restoreJob, parts []*part) error {
	loc := job.cfg.Location()
	var lines []planLine
	for _, p := range parts {
		c := p.plan.Counts()
		l := planLine{
			Volume: p.volume, Snapshot: p.snapshot.ID.String(), Time: p.snapshot.Time.In(loc), Complete: p.snapshot.Complete(), Target: p.target,
			Created: c.Created, Replaced: c.Changed, Metadata: c.Metadata, Deleted: c.Deleted, Unchanged: c.Unchanged, Kept: c.Kept,
			Fetch: c.FetchBytes, Write: c.WriteBytes,
		}
		if f := p.plan.Failures(); f != nil {
			l.Damaged = f.Count
		}
		if a.verbose {
			for ch := range p.plan.Changes() {
				l.Changes = append(l.Changes, changeLine{ch.Action.String(), ch.Path, ch.Type, ch.Size})
			}
		}
		lines = append(lines, l)
	}
	if a.json {
		return a.printLine(struct {
			Event   string     `json:"event"`
			DryRun  bool       `json:"dry_run"`
			Volumes []planLine `json:"volumes"`
		}{"plan", job.flags.dryRun, lines})
	}
	if a.quiet {
		return nil
	}
	if job.flags.at != "" {
		a.say("%s means %s", printable(job.flags.at), job.moment)
	}
	t := newTable("Volume", "Snapshot", "Taken", ">New", ">Replace", ">Meta", ">Delete", ">Same", ">Fetch")
	for _, l := range lines {
		t.add(l.Volume, l.Snapshot[:8], l.Time.Format("2006-01-02 15:04"), fmt.Sprint(l.Created), fmt.Sprint(l.Replaced), fmt.Sprint(l.Metadata),
			fmt.Sprint(l.Deleted), fmt.Sprint(l.Unchanged+l.Kept), bytesText(l.Fetch))
	}
	if err := t.print(a, ""); err != nil {
		return err
	}
	if job.flags.to == "" {
		a.say("in place")
	} else {
		a.say("into %s", printable(job.flags.to))
	}
	for _, l := range lines {
		for _, ch := range l.Changes {
			a.say("%-8s %s", ch.Action, printable(filepath.Join(l.Target, ch.Path)))
		}
	}
	return nil
}

// errDeclined says that the user did not want the plan.
var errDeclined = errors.New("not confirmed; nothing was changed")

// confirm asks whether to go on, if there is somebody to ask.
func (a *app) confirm(ctx context.Context, job *restoreJob) error {
	if job.flags.yes || a.json || !terminal(a.stdin) || !terminal(a.stderr) {
		return nil
	}
	fmt.Fprint(a.stderr, "Restore this? [y/N] ")
	line, err := bufio.NewReader(interruptible(ctx, a.stdin)).ReadString('\n')
	if ctx.Err() != nil {
		fmt.Fprintln(a.stderr)
		return ctx.Err()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// restoreEnd tells what was done.
func (a *app) restoreEnd(job *restoreJob, parts []*part, start time.Time) error {
	type line struct {
		Volume   string `json:"volume"`
		Target   string `json:"target"`
		Files    int    `json:"files"`
		Folders  int    `json:"folders"`
		Metadata int    `json:"metadata"`
		Deleted  int    `json:"deleted"`
		Failed   int    `json:"failed"`
		Warnings int    `json:"warnings"`
		Verified int    `json:"verified"`
		Written  uint64 `json:"bytes_written"`
		Fetched  uint64 `json:"bytes_fetched"`
		Reused   uint64 `json:"bytes_reused"`
	}
	sum := restorer.Stats{}
	lines := []line{}
	warned := false
	for _, p := range parts {
		st := p.stats
		lines = append(lines, line{p.volume, p.target, st.Files, st.Folders, st.Metadata, st.Deleted, st.Failed, st.Warnings, st.Verified, st.Written, st.Fetched, st.Reused})
		sum.Files += st.Files
		sum.Folders += st.Folders
		sum.Metadata += st.Metadata
		sum.Deleted += st.Deleted
		sum.Failed += st.Failed
		sum.Verified += st.Verified
		sum.Written += st.Written
		warned = warned || p.err != nil || job.flags.dryRun && p.plan.Failures() != nil
	}
	switch {
	case a.json:
		if err := a.printLine(struct {
			Event   string  `json:"event"`
			DryRun  bool    `json:"dry_run"`
			Seconds float64 `json:"seconds"`
			Volumes []line  `json:"volumes"`
		}{"summary", job.flags.dryRun, time.Since(start).Seconds(), lines}); err != nil {
			return err
		}
	case job.flags.dryRun:
		a.say("nothing was changed")
	default:
		text := fmt.Sprintf("restored %s (%s) in %s", count(sum.Files, "file", "files"), bytesText(sum.Written), spanText(time.Since(start)))
		if sum.Folders > 0 {
			text += ", made " + count(sum.Folders, "folder", "folders")
		}
		for _, n := range []struct {
			n    int
			text string
		}{{sum.Metadata, "with other metadata only"}, {sum.Deleted, "deleted"}, {sum.Verified, "verified"}, {sum.Failed, "failed"}} {
			if n.n > 0 {
				text += fmt.Sprintf(", %d %s", n.n, n.text)
			}
		}
		a.say("%s", text)
		if job.flags.to == "" && !job.flags.noUndo && sum.Files+sum.Folders+sum.Metadata+sum.Deleted > 0 {
			a.say("`ide49-backup restore --undo` takes it back")
		}
	}
	if warned {
		return errWarned
	}
	return nil
}
