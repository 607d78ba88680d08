// Package udev tells which block devices there are and when they come, change
// and go, straight from the kernel: its uevent messages and /sys/class/block.
// It needs no udevd, no /dev and no rights beyond a network namespace that the
// initial user namespace owns, so it works in a bridge container too.
//
// Watch subscribes first and lists the present devices then, so none is
// missed. An event is a hint: by the time it is read the device may have
// changed again, so a consumer looks at the device with Read or List.
package udev
