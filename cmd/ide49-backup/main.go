// Command ide49-backup takes snapshots of the volumes of a small appliance and
// brings them back. Each verb has a file of its own and one line in root.go;
// what verbs share is in open.go (configuration and repository), choose.go
// (times to snapshots), progress.go and output.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
	_ "time/tzdata" // a container or an appliance may have none

	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/mounts"
	"github.com/iot49/ide49-backup/policy"
)

// Exit codes. They are part of what users rely on.
const (
	exitDone         = 0
	exitFailed       = 1
	exitUsage        = 2
	exitWarnings     = 3
	exitNoRepository = 10
	exitLocked       = 11
	exitPassword     = 12
	exitAbsent       = 13
	exitInterrupted  = 130
)

// garbage is how much the heap may grow by garbage, in per cent. Most of the
// heap are a few large buffers that live as long as the run: the usual 100
// would double the peak for nothing.
const garbage = 10

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the program: it carries out args, says on stderr what failed, and
// returns the exit code. A cancelled ctx is an interruption by the user.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, env: os.LookupEnv, now: time.Now}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	code := exitCode(ctx, err)
	switch {
	case err == nil || errors.Is(err, errWarned):
	case code == exitInterrupted:
		a.complain("interrupted; what was not finished was left as it was")
	default:
		a.complain(err.Error())
	}
	return code
}

// complain writes one line to stderr.
func (a *app) complain(message string) {
	message = strings.Join(strings.FieldsFunc(message, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	fmt.Fprintf(a.stderr, "ide49-backup: %s\n", printable(message))
}

// exitCode maps what a verb returned to an exit code.
func exitCode(ctx context.Context, err error) int {
	_, usage := errors.AsType[*usageError](err)
	_, config := errors.AsType[*policy.Errors](err)
	switch {
	case err == nil:
		return exitDone
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		return exitInterrupted
	case usage, config, errors.Is(err, policy.ErrNoRepository), errors.Is(err, policy.ErrNoSecret),
		errors.Is(err, policy.ErrNoMoment), errors.Is(err, policy.ErrFuture):
		return exitUsage
	case errors.Is(err, errWarned):
		return exitWarnings
	case errors.Is(err, errAbsent), errors.Is(err, mounts.ErrNoDrive), errors.Is(err, mounts.ErrDriveGone):
		return exitAbsent
	case errors.Is(err, repo.ErrNoRepository):
		return exitNoRepository
	case errors.Is(err, repo.ErrLocked):
		return exitLocked
	case errors.Is(err, repo.ErrPassword):
		return exitPassword
	}
	return exitFailed
}

// errWarned says that the work is done, but with warnings, which the user has
// been told.
var errWarned = errors.New("done with warnings")

// A usageError says that the command line or the configuration is wrong.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}
