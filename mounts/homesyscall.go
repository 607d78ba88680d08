package mounts

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mountRaw is the bare system call: unix.Mount takes its options as a string,
// which can't be wiped, and they hold a password.
func mountRaw(source, target, fstype *byte, flags uintptr, options []byte) error {
	_, _, e := unix.Syscall6(unix.SYS_MOUNT,
		uintptr(unsafe.Pointer(source)), uintptr(unsafe.Pointer(target)), uintptr(unsafe.Pointer(fstype)),
		flags, uintptr(unsafe.Pointer(unsafe.SliceData(options))), 0)
	if e != 0 {
		return e
	}
	return nil
}
