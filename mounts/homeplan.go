package mounts

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// A HomeMode says what the home shows.
type HomeMode string

// The modes of the home.
const (
	HomeLocal   HomeMode = "local"   // the local home, as it is wanted
	HomeWaiting HomeMode = "waiting" // the local home, until the share can take its place
	HomeShared  HomeMode = "share"   // the share
	HomeAway    HomeMode = "away"    // the share, whose server doesn't answer
	HomeFailed  HomeMode = "failed"  // something that a person must look at
)

// A HomeTop is what the mount table has on top at the home's path.
type HomeTop uint8

// What can be on top.
const (
	TopLocal   HomeTop = iota // nothing of ours: the local home shows
	TopShare                  // our share, alive or not
	TopDead                   // our share in user space, whose process is gone
	TopForeign                // a share or user-space file system that isn't ours
)

// A HomeWish is what somebody asked for.
type HomeWish uint8

// What can be asked for.
const (
	WishAuto    HomeWish = iota // the share, as soon as that hides nobody's files
	WishShare                   // the share now, whoever uses the local home
	WishLocal                   // the local home
	WishRelease                 // the local home, also if the share is in use
)

// HomeFacts are what a decision about the home needs to know.
type HomeFacts struct {
	Top      HomeTop
	Probe    error // why the share can't be used; nil if it can
	Wish     HomeWish
	Starting bool // the time after the start in which no program uses the home yet
	Never    bool // configured to switch over only at a start or on request

	// Holders are the programs that have files or their working folder in
	// what shows now. Blind means that they can't be seen.
	Holders []HomeHolder
	Blind   bool
	// Changed tells that the local home was written to since the start.
	Changed bool
	// Unbound are local paths that should be bound over the share and aren't.
	Unbound []string
}

// A HomeHolder is a program that uses the home.
type HomeHolder struct {
	PID  int
	Name string
	Path string // one that it uses, as it sees it
}

func (h HomeHolder) String() string { return fmt.Sprintf("%s (%d)", h.Name, h.PID) }

// A HomeStep is what to do next.
type HomeStep uint8

// The steps.
const (
	StepNone   HomeStep = iota
	StepCover           // mount the share over the local home
	StepBind            // bind the local paths over the share
	StepReveal          // unmount the share, if nobody uses it
	StepDetach          // unmount the share, whoever uses it
)

// A HomeDecision is what to do and what to show.
type HomeDecision struct {
	Step   HomeStep
	Mode   HomeMode
	Reason string // why it isn't the share, or what is wrong
	Remedy string // what a person can do about it
}

// PlanHome decides what happens to the home. It never covers a local home that
// is in use or was changed, unless that was asked for, and never takes a share
// away from under programs because its server is away.
func PlanHome(f HomeFacts) HomeDecision {
	switch f.Top {
	case TopForeign:
		return HomeDecision{Mode: HomeFailed, Reason: "something else is mounted there", Remedy: "unmount it, or change path: in home:"}
	case TopDead:
		// Nothing can be read there any more: what is open fails anyway.
		return HomeDecision{Step: StepDetach, Mode: HomeWaiting, Reason: "the share lost its process"}
	case TopShare:
		return planShared(f)
	}
	switch {
	case f.Wish == WishLocal || f.Wish == WishRelease:
		return HomeDecision{Mode: HomeLocal, Reason: "the share was unmounted on request", Remedy: "ide49-backup home mount brings it back"}
	case f.Probe != nil:
		return HomeDecision{Mode: HomeWaiting, Reason: f.Probe.Error(), Remedy: "the local home shows until then"}
	case f.Wish == WishShare:
		return HomeDecision{Step: StepCover, Mode: HomeWaiting}
	case len(f.Holders) > 0:
		return HomeDecision{Mode: HomeWaiting, Reason: "the share is there, but the local home is in use by " + holderList(f.Holders), Remedy: mountRemedy}
	case f.Starting:
		return HomeDecision{Step: StepCover, Mode: HomeWaiting}
	case f.Never:
		return HomeDecision{Mode: HomeWaiting, Reason: "the share is there; it takes its place at the next start", Remedy: mountRemedy}
	case f.Blind:
		return HomeDecision{Mode: HomeWaiting, Reason: "the share is there, but who uses the local home can't be seen", Remedy: mountRemedy + ", or give the container pid: host"}
	case f.Changed:
		return HomeDecision{Mode: HomeWaiting, Reason: "the share is there, but the local home was changed since the start, and the changes would be hidden", Remedy: mountRemedy}
	}
	return HomeDecision{Step: StepCover, Mode: HomeWaiting}
}

const mountRemedy = "restart, or run ide49-backup home mount"

func planShared(f HomeFacts) HomeDecision {
	d := HomeDecision{Mode: HomeShared}
	if f.Probe != nil {
		d = HomeDecision{Mode: HomeAway, Reason: f.Probe.Error()}
	}
	switch {
	case f.Wish == WishRelease:
		d.Step = StepDetach
	case f.Wish == WishLocal && len(f.Holders) > 0:
		d.Reason, d.Remedy = "the share is in use by "+holderList(f.Holders), "close them, or unmount with --force"
	case f.Wish == WishLocal:
		d.Step = StepReveal
	case f.Probe == nil && len(f.Unbound) > 0:
		d.Step = StepBind
	}
	return d
}

// holderList names a few programs.
func holderList(hs []HomeHolder) string {
	const few = 3
	var names []string
	for i, h := range hs {
		if i == few {
			names = append(names, fmt.Sprintf("%d more", len(hs)-few))
			break
		}
		names = append(names, h.String())
	}
	return strings.Join(names, ", ")
}

// homePause returns how long until the next look at the home. A share that
// shows is looked at often enough to tell within 15 seconds that its server
// went away; one that is waited for, less and less often.
func homePause(mode HomeMode, fails int) time.Duration {
	const often, seldom = 5 * time.Second, 5 * time.Minute
	switch mode {
	case HomeShared, HomeAway:
		return often
	case HomeLocal:
		return seldom
	}
	return min(often<<min(max(fails-1, 0), 8), seldom)
}

// ErrHomeInUse says that the home could not change because programs use it.
var ErrHomeInUse = errors.New("the home is in use")
