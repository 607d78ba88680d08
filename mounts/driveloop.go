package mounts

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/iot49/ide49-backup/udev"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// rescanEvery is how often the devices are listed without any event, in case
// one was missed.
const rescanEvery = time.Minute

// settleTime is how long after a new device the devices are listed once more.
const settleTime = time.Second

// mediaPoll is how often a card reader is asked for its card.
const mediaPoll = 2 * time.Second

// A driveLoop owns all state of Drives. Only the goroutine of Run touches it;
// workers hand it closures.
type driveLoop struct {
	*Drives
	ctx     context.Context // ends workers
	nodes   *deviceNodes
	names   Names
	record  *record
	drives  map[string]*drive // by kernel name
	leaving map[string]bool   // mount folders that are being taken down
	dirty   map[string]bool   // devices that changed since the last look
	added   map[string]bool   // devices that the kernel added since the last look
	results chan func()
	wg      sync.WaitGroup
	waiting []func() bool // operations that wait until a worker is done
	answers []func()      // told to callers when the list shows what they did
	again   bool          // look at the devices once more
	relist  bool          // what devices holds may be of before
	devices []udev.Device
	ending  bool

	kept       map[string]string // disks that are left alone, as of the last look
	blind      error             // why kept could not be found out
	polled     map[string]bool   // card readers that we must ask for their card
	refreshing map[string]bool   // disks that a worker opens because of a new card
	changed    map[string]bool   // disks whose card changed since the last look
	cut        map[string]bool   // disks that are cut off; see cutOff
	departing  map[string]int    // mounts of a disk that are being taken down
}

// A drive is one device in one plugging.
type drive struct {
	dev     udev.Device
	probe   *Probe
	verdict DriveVerdict
	working bool   // a worker is at it
	folder  string // that the worker may be mounting at
	gone    bool   // pulled out; a worker may still be at it
	stale   bool   // changed while a worker was at it: probe again
	early   bool   // first probed before the kernel told of it, perhaps in vain

	under *Plugging // what an encrypted drive was opened from

	// stuck holds why the last action failed; it is not tried again before
	// verdict differs from tried.
	stuck *stuck

	ejected   bool
	ejectedID string
	asked     *DriveMountOptions // "drives mount" asked for it

	mount *mounted

	shown Drive // as last published
	since time.Time
}

// stuck is an action that failed.
type stuck struct {
	tried          DriveVerdict
	reason, remedy string
	locked         bool
	passing        bool // may be better in a minute without any event
}

// mounted is what is known of a mount of ours.
type mounted struct {
	claim    claim
	spec     MountSpec
	plugging *Plugging
	readOnly bool
	reason   string // why it is read-only
	remedy   string // against that
	note     string
}

func newDriveLoop(d *Drives) (*driveLoop, error) {
	names, err := loadNames(d.cfg.StateDir)
	if err != nil {
		// Losing the names costs a suffix; refusing to start costs backups.
		d.failed(err)
		names = Names{}
	}
	rec, err := loadRecord(d.cfg.StateDir)
	if err != nil {
		d.failed(err)
		rec = &record{file: filepath.Join(d.cfg.StateDir, recordFile)}
	}
	return &driveLoop{
		Drives: d, names: names, record: rec,
		nodes:   &deviceNodes{dir: filepath.Join(d.cfg.RunDir, "dev")},
		drives:  map[string]*drive{},
		leaving: map[string]bool{},
		dirty:   map[string]bool{},
		added:   map[string]bool{},
		results: make(chan func()),
		relist:  true,

		polled:     map[string]bool{},
		refreshing: map[string]bool{},
		changed:    map[string]bool{},
		cut:        map[string]bool{},
		departing:  map[string]int{},
	}, nil
}

func (d *Drives) failed(err error) {
	if d.events.Failed != nil {
		d.events.Failed(err)
	}
}

func (l *driveLoop) run(ctx context.Context) (err error) {
	workers, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	l.ctx = workers
	defer func() {
		err = errors.Join(err, l.nodes.Close())
	}()
	if err := l.adopt(); err != nil {
		return err
	}

	// The watcher keeps reading while the loop works: it only notes names.
	hints := newHints()
	watching, unwatch := context.WithCancel(ctx)
	l.wg.Go(func() { hints.gather(watching, l.watch) })
	defer func() {
		unwatch()
		stop()
		l.drain()
	}()

	rescan := time.NewTicker(rescanEvery)
	defer rescan.Stop()
	poll := time.NewTicker(mediaPoll)
	defer poll.Stop()
	poll.Stop()
	polling := false
	// The kernel tells of a new disk before all of its attributes are there, as
	// whether it must be asked for its card.
	settled := time.NewTimer(settleTime)
	defer settled.Stop()

	l.look()
	for {
		if want := len(l.polled) > 0; want != polling {
			polling = want
			if want {
				poll.Reset(mediaPoll)
			} else {
				poll.Stop()
			}
		}
		select {
		case <-hints.wake:
			h := hints.take()
			for name, changed := range h.names {
				if changed {
					l.dirty[name] = true
				} else {
					l.added[name] = true
					settled.Reset(settleTime)
				}
			}
			for name := range h.media {
				l.changed[name] = true
			}
			for _, err := range h.errs {
				l.failed(err)
			}
		case f := <-l.results:
			f()
		case f := <-l.calls:
			f(l)
		case <-rescan.C:
			reapDaemons(l.proc)
			for _, k := range l.drives {
				if k.stuck != nil && k.stuck.passing {
					k.stuck = nil
				}
			}
		case <-settled.C:
		case <-poll.C:
			l.pollMedia()
		case <-ctx.Done():
			return l.end()
		}
		l.look()
	}
}

// drain waits for the workers and takes their results.
func (l *driveLoop) drain() {
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }()
	for {
		select {
		case f := <-l.results:
			f()
		case <-done:
			return
		}
	}
}

// hints gathers what the kernel's events say has changed.
type hints struct {
	wake chan struct{} // holds one token while there is something to take

	mu  sync.Mutex
	new hinted
}

type hinted struct {
	names, media map[string]bool // devices, false if they were only added; disks whose card changed
	errs         []error
}

func newHints() *hints { return &hints{wake: make(chan struct{}, 1)} }

// gather notes the events of watch until ctx is done. When they end before, as
// for lack of memory, it begins anew a while later; the loop looks at the
// devices every minute anyway.
func (h *hints) gather(ctx context.Context, watch func(context.Context) iter.Seq2[udev.Event, error]) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		select {
		case <-pause.C:
		case <-ctx.Done():
			return
		}
		for e, err := range watch(ctx) {
			h.add(e, err)
		}
		pause.Reset(rescanEvery)
	}
}

func (h *hints) add(e udev.Event, err error) {
	h.mu.Lock()
	if h.new.names == nil {
		h.new.names, h.new.media = map[string]bool{}, map[string]bool{}
	}
	switch {
	case err != nil && len(h.new.errs) < 16:
		h.new.errs = append(h.new.errs, err)
	case err == nil && e.Action != udev.Resync && e.Action != udev.Listed:
		h.new.names[e.Name] = h.new.names[e.Name] || e.Action != udev.Add
		if e.MediaChange {
			h.new.media[e.Name] = true
		}
	}
	h.mu.Unlock()
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

func (h *hints) take() hinted {
	h.mu.Lock()
	defer h.mu.Unlock()
	taken := h.new
	h.new = hinted{}
	return taken
}

// work runs f beside the loop; what f returns is run in the loop afterwards.
func (l *driveLoop) work(f func(ctx context.Context) func()) {
	l.wg.Go(func() {
		done := f(l.ctx)
		l.results <- done
	})
}

// look compares the devices with what is known, decides, and starts what is to
// be done. It is cheap, and it is right to call it at any time.
func (l *driveLoop) look() {
	for l.again = true; l.again; {
		l.again = false
		l.lookOnce()
	}
	for _, tell := range l.answers {
		tell()
	}
	l.answers = nil
}

func (l *driveLoop) lookOnce() {
	if l.relist {
		devices, err := udev.List(l.sysfs)
		if err != nil {
			l.failed(err)
			return
		}
		l.devices = devices
	}
	l.relist = true
	devices := l.devices
	table, err := mountsOf(l.proc, "self")
	if err != nil {
		l.blind = err
		l.failed(err)
		return
	}
	if !l.peek {
		l.cutOff(devices)
	}
	devices = l.usable(devices)
	l.track(devices)
	l.noticeUnmounts(table)
	if !l.ending {
		l.decide(devices)
	}
	l.waiting = slices.DeleteFunc(l.waiting, func(ready func() bool) bool { return ready() })
	l.publish()
}

// usable leaves out what only seems to be there: partitions of a card that was
// changed, until the kernel looked at the new one, and encrypted drives whose
// disk is gone. It gives the others what is known of the disk below them.
func (l *driveLoop) usable(devices []udev.Device) []udev.Device {
	for _, d := range devices {
		if l.changed[d.Name] && d.Removable && !d.IsPartition() && !l.cut[d.Name] {
			l.refresh(d.Name)
		}
	}
	clear(l.changed)
	x := indexDevices(devices)
	devices = slices.DeleteFunc(slices.Clone(devices), func(d udev.Device) bool {
		if d.IsPartition() && l.refreshing[d.Disk] || l.cut[d.Disk] {
			return true
		}
		if k := l.drives[d.Name]; k != nil && k.under != nil && k.dev.SamePlugging(d) {
			return k.under.Alive() != nil
		}
		return false
	})
	for i, d := range devices {
		if !openedByUs(d) || len(d.Slaves) == 0 {
			continue
		}
		if below, ok := x.byName[d.Slaves[0]]; ok {
			devices[i].Vendor, devices[i].Model, devices[i].Serial, devices[i].USB = below.Vendor, below.Model, below.Serial, below.USB
		}
	}
	return devices
}

// noticeUnmounts takes note of mounts of ours that somebody else unmounted.
func (l *driveLoop) noticeUnmounts(table []*mountinfo.Info) {
	for _, k := range l.drives {
		if k.mount == nil || k.working {
			continue
		}
		m := k.mount
		if slices.ContainsFunc(table, func(i *mountinfo.Info) bool {
			return uint64(i.ID) == m.plugging.MountID && i.Mountpoint == m.claim.Path
		}) {
			continue
		}
		k.mount, k.ejected = nil, true
		if l.peek {
			continue
		}
		if err := errors.Join(m.claim.removeDir(), l.record.drop(m.claim.Path)); err != nil {
			l.failed(err)
		}
	}
}

// track takes note of the devices that came, changed and went.
func (l *driveLoop) track(devices []udev.Device) {
	present := make(map[string]udev.Device, len(devices))
	for _, d := range devices {
		present[d.Name] = d
	}
	for name, known := range l.drives {
		if now, ok := present[name]; !ok || !now.SamePlugging(known.dev) {
			l.forget(known)
			delete(l.drives, name)
		}
	}
	for _, now := range devices {
		known, ok := l.drives[now.Name]
		if !ok {
			l.drives[now.Name] = &drive{dev: now, under: l.below(now)}
			l.watchMedia(now)
			continue
		}
		was := known.dev
		known.dev = now
		if now.PollsMedia && !was.PollsMedia || now.Removable && !was.Removable {
			l.watchMedia(now) // it was seen while the kernel was still adding it
		}
		changed := was.Size != now.Size || was.ReadOnly != now.ReadOnly || !slices.Equal(was.Holders, now.Holders)
		if (changed || l.dirty[now.Name]) && known.mount == nil {
			if known.working {
				known.stale = true // what the worker finds may be of before
			} else {
				known.probe = nil
			}
		} else if l.added[now.Name] && known.mount == nil {
			// It was listed before the kernel told of it. What was found on it
			// holds; that nothing was found may have been too early.
			known.early = true
			known.probeAgain()
		}
	}
	clear(l.dirty)
	clear(l.added)
}

// below returns the plugging of the device that an encrypted drive was opened
// from.
func (l *driveLoop) below(d udev.Device) *Plugging {
	if !openedByUs(d) || len(d.Slaves) == 0 {
		return nil
	}
	s, err := udev.Read(l.sysfs, d.Slaves[0])
	if err != nil {
		return nil
	}
	c := claim{Device: s.Name, Major: s.Major, Minor: s.Minor, DiskSeq: s.DiskSeq, Partition: s.Partition}
	return c.plugging(l.sysfs, 0)
}

// probeAgain drops what an early probe found, if that was nothing.
func (k *drive) probeAgain() {
	if k.early && k.probe != nil {
		k.early = false
		if k.probe.Outcome == ProbeNothing || k.probe.Outcome == ProbeUnreadable {
			k.probe = nil
		}
	}
}

// forget takes down what belongs to a device that is not there any more.
func (l *driveLoop) forget(gone *drive) {
	shown := gone.shown
	if gone.working && gone.folder != "" {
		// The worker is not finished. Its result comes here again.
		gone.gone = true
		l.leaving[gone.folder] = true
		l.departing[gone.dev.Disk]++
		return
	}
	m := gone.mount
	gone.mount = nil
	if m == nil && gone.under == nil || l.peek {
		if shown.Device != "" && l.events.Removed != nil {
			l.events.Removed(shown, NoLoss)
		}
		return
	}
	if m != nil {
		l.leaving[m.claim.Path] = true
	}
	l.departing[gone.dev.Disk]++
	l.work(func(ctx context.Context) func() {
		loss := NoLoss
		var err error
		if m != nil {
			loss, err = takeDown(m)
		}
		if gone.under != nil {
			err = errors.Join(err, closeMapper(ctx, gone.dev.DMName, "--deferred"))
		}
		return func() {
			l.departing[gone.dev.Disk]--
			if m != nil {
				delete(l.leaving, m.claim.Path)
				err = errors.Join(err, m.claim.removeDir(), l.record.drop(m.claim.Path))
			}
			if err != nil {
				l.failed(fmt.Errorf("drive %s was pulled out: %w", shown.Name, err))
			}
			if gone.dev.Removable {
				// The mount may have kept the kernel from seeing the new card.
				l.changed[gone.dev.Disk] = true
				l.again = true
			}
			if l.events.Removed != nil {
				l.events.Removed(shown, loss)
			}
		}
	})
}

// free ends the work on a drive, which may be gone by now.
func (l *driveLoop) free(k *drive) {
	folder := k.folder
	if k.stale && k.mount == nil {
		k.probe = nil
	}
	k.probeAgain()
	k.working, k.folder, k.stale = false, "", false
	if k.gone {
		k.gone = false
		l.departing[k.dev.Disk]--
		delete(l.leaving, folder)
		l.forget(k)
	}
}

// decide plans and starts the actions that follow.
func (l *driveLoop) decide(devices []udev.Device) {
	ours := map[string]bool{}
	probes := map[string]Probe{}
	asked := map[string]DriveMountOptions{}
	var visible []udev.Device
	for _, d := range devices {
		k := l.drives[d.Name]
		if k == nil {
			continue
		}
		visible = append(visible, d)
		if k.mount != nil || k.folder != "" { // or is just being mounted
			ours[d.Name] = true
			for _, s := range d.Slaves {
				ours[s] = true
			}
		}
		if openedByUs(d) {
			for _, s := range d.Slaves {
				ours[s] = true
			}
		}
		if k.probe != nil {
			probes[d.Name] = *k.probe
		}
		if k.asked != nil {
			asked[d.Name] = *k.asked
		}
	}
	kept, err := readKept(l.proc, devices, ours)
	l.kept, l.blind = kept, err
	if err != nil {
		// Without the tables any disk may be the system's.
		l.failed(err)
		return
	}
	verdicts, names := Plan(DriveView{
		Config: l.cfg, Devices: visible, Probes: probes, Names: l.names, Kept: kept, Ours: ours, Asked: asked,
		Occupied: func(path string) bool { return !l.leaving[path] && occupied(path) },
	})
	if !maps.Equal(names, l.names) {
		if !l.peek {
			if err := names.save(l.cfg.StateDir); err != nil {
				l.failed(err)
			}
		}
		l.names = names
	}
	for _, v := range verdicts {
		k := l.drives[v.Device.Name]
		k.verdict = v
		l.act(k)
	}
}

// act starts what the verdict on a drive asks for.
func (l *driveLoop) act(k *drive) {
	v := k.verdict
	if k.working || k.mount != nil || l.once && k.asked == nil && v.Action != ProbeDrive {
		return
	}
	if k.ejected && k.ejectedID != "" && v.ID != "" && v.ID != k.ejectedID {
		k.ejected = false // another file system was made on it
	}
	if k.stuck != nil && !k.stuck.same(v) {
		k.stuck = nil
	}
	switch v.Action {
	case ProbeDrive:
		l.startProbe(k)
	case MountDrive:
		if k.ejected || k.stuck != nil || l.leaving[v.Spec.Path] {
			return
		}
		l.startMount(k)
	case UnlockDrive:
		if k.ejected || k.stuck != nil || len(k.dev.Holders) > 0 {
			return
		}
		l.startUnlock(k)
	}
}

// same reports whether v asks for the action that failed.
func (s *stuck) same(v DriveVerdict) bool {
	if v.Action == ProbeDrive {
		return true // the probe will tell
	}
	t := s.tried
	return v.Action == t.Action && v.Spec == t.Spec && v.Probe == t.Probe && v.Device.SamePlugging(t.Device) &&
		v.Device.Size == t.Device.Size && v.Device.ReadOnly == t.Device.ReadOnly
}

func (l *driveLoop) startProbe(k *drive) {
	k.working = true
	dev := k.dev
	node, err := l.nodes.path(dev)
	if err != nil {
		k.working = false
		k.probe = &Probe{Outcome: ProbeUnreadable, Detail: err.Error()}
		l.again = true
		return
	}
	l.work(func(ctx context.Context) func() {
		p, err := probe(ctx, node)
		return func() {
			if err != nil && p.Outcome == ProbePending {
				p = Probe{Outcome: ProbeUnreadable, Detail: err.Error()}
			}
			k.probe = &p
			l.free(k)
			l.relist = false // events tell what else happened
		}
	})
}

func (l *driveLoop) startMount(k *drive) {
	v := k.verdict
	c := claim{
		Path: v.Spec.Path, Device: v.Device.Name, Major: v.Device.Major, Minor: v.Device.Minor,
		DiskSeq: v.Device.DiskSeq, Partition: v.Device.Partition, ID: v.ID, UUID: v.Probe.UUID, Type: v.Probe.Type, Probe: v.Probe,
	}
	if _, err := os.Lstat(c.Path); err == nil {
		c.Existed = true
	}
	node, err := l.nodes.path(v.Device)
	if err == nil {
		// Written down first: after a power cut the folder is known as ours.
		err = l.record.put(c)
	}
	if err != nil {
		k.stuck = &stuck{tried: v, reason: err.Error(), passing: true}
		return
	}
	job := mountJob{sysfs: l.sysfs, proc: l.proc, node: node, device: v.Device, claim: c, spec: v.Spec, fsck: l.cfg.Fsck, fsckLimit: l.cfg.FsckLimit}
	k.working, k.folder = true, c.Path
	l.work(func(ctx context.Context) func() {
		m, err := job.run(ctx)
		return func() {
			if err != nil {
				if derr := errors.Join(job.claim.removeDir(), l.record.drop(c.Path)); derr != nil {
					l.failed(derr)
				}
				k.stuck = explain(err, v)
			} else {
				if err := l.record.put(m.claim); err != nil {
					l.failed(err)
				}
				m.plugging.Under = k.under
				k.mount, k.ejected = m, false
			}
			l.free(k)
			l.relist = false
		}
	})
}

// explain says for people why a mount failed and what to do.
func explain(err error, v DriveVerdict) *stuck {
	s := &stuck{tried: v, reason: "mounting failed: " + err.Error()}
	switch {
	case errors.Is(err, ErrDriveGone):
		s.remedy = "plug it in again"
	case errors.Is(err, unix.ENODEV):
		s.remedy = "this system can't read " + v.Probe.Type + "; format the drive as ext4, or use another system"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		s.remedy = "run the container with privileged: true"
	case errors.Is(err, errOccupied):
		s.remedy, s.passing = "empty or remove the folder", true
	case errors.Is(err, unix.EIO), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOMEDIUM):
		s.remedy = "plug it in again, at another port or with another cable; copy what can be read if it stays"
	case errors.Is(err, unix.EBUSY):
		s.remedy, s.passing = "it is in use elsewhere; stop that first", true
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE):
		s.remedy, s.passing = "make room; it is tried again by itself", true
	default:
		s.remedy = "check the drive's file system on a computer"
	}
	return s
}

// publish makes the list anew and reports what changed in it.
func (l *driveLoop) publish() {
	now := time.Now()
	var list, changed []Drive
	for _, k := range l.drives {
		if k.verdict.Hidden || k.verdict.Device.Name == "" {
			k.shown = Drive{}
			continue
		}
		s := k.show()
		if s.State != k.shown.State {
			k.since = now
		}
		s.Since = k.since
		if s.State == DriveMounted {
			s.Since = k.mount.claim.Since
		}
		if s != k.shown {
			changed = append(changed, s)
		}
		k.shown = s
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b Drive) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(changed, func(a, b Drive) int { return strings.Compare(a.Device, b.Device) })
	l.mu.Lock()
	l.list = list
	l.mu.Unlock()
	if l.events.Changed != nil {
		for _, d := range changed {
			l.events.Changed(d)
		}
	}
}

// show describes a drive for people.
func (k *drive) show() Drive {
	v := k.verdict
	d := Drive{
		Name: v.Name, Device: k.dev.Name, Disk: k.dev.Disk,
		Vendor: printable(k.dev.Vendor), Model: printable(k.dev.Model), Serial: printable(k.dev.Serial),
		Size: k.dev.Size, State: v.State, Reason: v.Reason, Remedy: v.Remedy,
	}
	if d.Name == "" {
		d.Name = k.dev.Name
	}
	if k.probe != nil {
		d.Label, d.Type, d.UUID, d.PartUUID = printable(k.probe.Label), k.probe.Type, k.probe.UUID, k.probe.PartUUID
	}
	switch {
	case k.mount != nil:
		d.Name = filepath.Base(k.mount.claim.Path)
		d.State, d.Path, d.ReadOnly = DriveMounted, k.mount.claim.Path, k.mount.readOnly
		d.Reason, d.Remedy, d.Note, d.Plugging = k.mount.reason, k.mount.remedy, k.mount.note, k.mount.plugging
	case k.working:
		d.State = DriveBusy
	case k.ejected:
		d.State, d.Reason, d.Remedy = DriveEjected, "it was ejected", "plug it in again, or mount it with ide49-backup drives mount "+d.Name
	case k.stuck != nil && k.stuck.locked:
		d.State, d.Reason, d.Remedy = DriveLocked, k.stuck.reason, k.stuck.remedy
	case k.stuck != nil:
		d.State, d.Reason, d.Remedy = DriveFailed, k.stuck.reason, k.stuck.remedy
	}
	return d
}
