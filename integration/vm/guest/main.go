// Command guest runs inside the virtual machine of the tests.
//
//	guest witness FILE     notes block-device events and changes of the mount table
//	guest drives STATE LOG looks after the drives as the service does
//	guest ask WORD...      asks "guest drives": list, eject NAME
//	guest write DIR LOG    writes files below DIR without pause, by path
//	guest await DIR        waits until something is mounted at DIR, without polling
//
// The witness uses nothing of the service: its own netlink socket and its own
// view of the mount table, stamped with the machine's clock. It is what the
// service is measured by.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "witness":
		return witness(ctx, args[1])
	case len(args) == 3 && args[0] == "drives":
		return drives(ctx, args[1], args[2])
	case len(args) >= 2 && args[0] == "ask":
		return ask(args[1:])
	case len(args) == 3 && args[0] == "write":
		return write(ctx, args[1], args[2])
	case len(args) == 2 && args[0] == "await":
		return await(args[1])
	}
	return errors.New("usage: guest witness FILE | drives STATE LOG | ask WORD... | write DIR LOG | await DIR")
}

// now is the time since boot in microseconds.
func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // the clock always exists
	}
	return ts.Nano() / 1000
}
