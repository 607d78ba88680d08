package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// interruptible returns a reader of in whose reads end with ctx's error when
// ctx is cancelled. Reads of a pipe or terminal could not be interrupted
// otherwise.
func interruptible(ctx context.Context, in io.Reader) io.Reader {
	if f, ok := in.(*os.File); ok {
		return &patientReader{ctx, f}
	}
	return in
}

type patientReader struct {
	ctx context.Context
	f   *os.File
}

func (r *patientReader) Read(b []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(r.f.Fd()), Events: unix.POLLIN}}
	for {
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := unix.Poll(fds, 100)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait for input: %w", err)
		case n > 0:
			return r.f.Read(b)
		}
	}
}
