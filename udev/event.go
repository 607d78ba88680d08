package udev

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/pilebones/go-udev/netlink"
)

// An Action says what happened to a device. Besides the kernel's own actions
// there are Listed and Resync, which Watch makes.
type Action = netlink.KObjAction

// The actions that Watch yields.
const (
	Add    = netlink.ADD
	Remove = netlink.REMOVE
	Change = netlink.CHANGE
	Move   = netlink.MOVE

	// Listed is a device that was there already when Watch began.
	Listed Action = "listed"

	// Resync says that the kernel dropped messages, because they came faster
	// than they were read. It names no device: look at all of them.
	Resync Action = "resync"
)

// An Event is one message about one block device.
type Event struct {
	Action  Action
	Name    string // kernel name, "sda1"; empty in a Resync
	DevPath string // below /sys, as "/devices/…/block/sda/sda1"
	Type    string // "disk" or "partition"

	Major, Minor uint32
	DiskSeq      uint64 // counts disks since boot; 0 before Linux 5.15
	Partition    int    // number within the disk; 0 for a disk
	SeqNum       uint64 // the kernel's count of its messages; 0 in Listed

	// MediaChange is set when a card was put into or taken out of a reader.
	// Size and partitions are stale until somebody opens the disk.
	MediaChange bool

	// Env holds all variables of the message as they came.
	Env map[string]string
}

// errNotBlock is what event answers to a well-formed message about something
// else than a block device.
var errNotBlock = errors.New("not a block device")

// parse reads one message of the kernel: "ACTION@DEVPATH" and KEY=VALUE lines,
// each ended by a NUL. Keys end at the first "="; values and the path may hold
// "=" and "@". Whatever has no key is an error; the last of equal keys counts.
func parse(msg []byte) (netlink.UEvent, error) {
	head, rest, ok := bytes.Cut(msg, []byte{0})
	if !ok {
		return netlink.UEvent{}, fmt.Errorf("uevent of %d bytes has no end of line", len(msg))
	}
	name, path, ok := bytes.Cut(head, []byte{'@'})
	if !ok {
		return netlink.UEvent{}, fmt.Errorf("uevent begins with %.40q instead of ACTION@PATH", head)
	}
	action, err := netlink.ParseKObjAction(string(name))
	if err != nil {
		return netlink.UEvent{}, fmt.Errorf("uevent has the unknown action %.40q", name)
	}
	e := netlink.UEvent{Action: action, KObj: string(path), Env: make(map[string]string)}
	for len(rest) > 0 {
		line, tail, ok := bytes.Cut(rest, []byte{0})
		if !ok {
			return netlink.UEvent{}, fmt.Errorf("uevent for %.80q is cut off", path)
		}
		key, value, ok := bytes.Cut(line, []byte{'='})
		if !ok || len(key) == 0 {
			return netlink.UEvent{}, fmt.Errorf("uevent for %.80q has the line %.40q without a key", path, line)
		}
		e.Env[string(key)] = string(value)
		rest = tail
	}
	return e, nil
}

// event turns a message into an Event, or answers errNotBlock.
func event(u netlink.UEvent) (Event, error) {
	if u.Env["SUBSYSTEM"] != "block" {
		return Event{}, errNotBlock
	}
	return eventFromEnv(u.Action, u.KObj, u.Env)
}

func eventFromEnv(action Action, devpath string, env map[string]string) (Event, error) {
	e := Event{
		Action:      action,
		Name:        env["DEVNAME"],
		DevPath:     devpath,
		Type:        env["DEVTYPE"],
		MediaChange: env["DISK_MEDIA_CHANGE"] == "1",
		Env:         env,
	}
	// A disk below a folder, as cciss/c0d0, is named cciss!c0d0 in sysfs.
	e.Name = strings.ReplaceAll(e.Name, "/", "!")
	if !validName(e.Name) {
		return Event{}, fmt.Errorf("uevent for %.80q has no usable name: %.40q", devpath, e.Name)
	}
	var errs []error
	number := func(key string, bits int) uint64 {
		s, ok := env[key]
		if !ok {
			return 0
		}
		n, err := strconv.ParseUint(s, 10, bits)
		if err != nil {
			errs = append(errs, fmt.Errorf("uevent for %.80q: %s=%.40q is no number", devpath, key, s))
		}
		return n
	}
	e.Major = uint32(number("MAJOR", 32))
	e.Minor = uint32(number("MINOR", 32))
	e.DiskSeq = number("DISKSEQ", 64)
	e.Partition = int(number("PARTN", 31))
	e.SeqNum = number("SEQNUM", 64)
	return e, errors.Join(errs...)
}

// validName reports whether name can be one folder in /sys/class/block.
func validName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= 255 && !strings.ContainsAny(name, "/\x00")
}
