// Package vm boots a virtual machine with a USB port and has tests plug drives
// into it: sticks, disks behind uas and card readers, with any file system,
// partition table and label, and pull them out again at the worst moment.
//
// Start boots Debian's kernel in qemu, by plain emulation, with a file system
// in memory that holds busybox, our programs and those that they call. Run runs
// a script in it; Plug, Pull, Insert and Eject do what hands do. Volume.Make and
// MakeDisk make the drives' contents in plain files of the host, so neither
// root nor loop devices are needed. Close ends it all; if the test process dies,
// the kernel ends qemu.
//
// The tests judge the service by a witness in the guest that shares no code
// with it: see guest. docs/vm.md tells how to use the package, what was
// measured, and what qemu can't do.
package vm
