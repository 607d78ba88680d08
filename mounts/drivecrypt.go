package mounts

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"
)

const (
	unlockLimit = 2 * time.Minute // key derivation takes seconds by design, more on a small machine
	closeLimit  = 20 * time.Second
)

// The exit code of cryptsetup for a wrong key.
const cryptsetupWrongKey = 2

// startUnlock opens an encrypted drive with the configured key file. The
// opened device appears as a drive of its own.
func (l *driveLoop) startUnlock(k *drive) {
	v := k.verdict
	node, err := l.nodes.path(v.Device)
	if err != nil {
		k.stuck = &stuck{tried: v, reason: err.Error()}
		return
	}
	name := cryptPrefix + v.Probe.UUID
	k.working = true
	l.work(func(ctx context.Context) func() {
		err := unlock(ctx, node, name, v.Spec)
		return func() {
			if err != nil {
				k.stuck = explainUnlock(err, v)
			}
			l.free(k)
		}
	})
}

func unlock(ctx context.Context, node, name string, spec MountSpec) error {
	ctx, cancel := context.WithTimeoutCause(ctx, unlockLimit, fmt.Errorf("it took longer than %v", unlockLimit))
	defer cancel()
	args := []string{"open", "--type", "luks", "--batch-mode", "--key-file", spec.KeyFile}
	if spec.Options.ReadOnly || spec.Media {
		args = append(args, "--readonly")
	}
	_, err := runTool(ctx, "cryptsetup", append(args, node, name)...)
	return err
}

func explainUnlock(err error, v DriveVerdict) *stuck {
	s := &stuck{tried: v, locked: true, reason: "opening the encrypted drive failed: " + err.Error()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == cryptsetupWrongKey:
		s.reason, s.remedy = "the key file "+v.Spec.KeyFile+" does not open it", "configure the right key_file"
	case errors.Is(err, exec.ErrNotFound):
		s.remedy = "install cryptsetup"
	default:
		s.remedy = "check the key_file and that the kernel has dm-crypt"
	}
	return s
}

// closeMapper closes an encrypted drive that we opened.
func closeMapper(ctx context.Context, name string, flags ...string) error {
	ctx, cancel := context.WithTimeout(ctx, closeLimit)
	defer cancel()
	if _, err := runTool(ctx, "cryptsetup", append(append([]string{"close"}, flags...), name)...); err != nil {
		return fmt.Errorf("closing the encrypted drive %s: %w", name, err)
	}
	return nil
}
