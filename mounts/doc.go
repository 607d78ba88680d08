// Package mounts brings file systems to folders and takes them away again.
//
// Drives mounts every USB drive that is plugged in below one folder and looks
// after it until it is ejected or pulled out. It watches the kernel's device
// events, probes what is on a device, decides by the pure function Plan what is
// mounted where and what is left alone and why, and keeps a record of its own
// mounts, so that after a crash it removes its leftovers and nothing else.
//
// A Plugging proves that a drive is still the one that was mounted. Users of a
// drive ask it before, during and after their work, since a FAT drive that was
// pulled out looks like an empty folder.
package mounts
