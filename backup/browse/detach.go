package browse

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// detach takes a mount out of the tree of folders, used or not.
func detach(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH)
	if err == nil || errors.Is(err, unix.EINVAL) { // EINVAL: it is gone already
		return nil
	}
	if os.Geteuid() != 0 {
		out, runErr := exec.Command("fusermount3", "-u", "-z", "--", dir).CombinedOutput()
		if runErr == nil {
			return nil
		}
		err = fmt.Errorf("%w (fusermount3: %w: %.200q)", err, runErr, bytes.TrimSpace(out))
	}
	return &fs.PathError{Op: "unmount", Path: dir, Err: err}
}
