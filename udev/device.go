package udev

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Sysfs is where the kernel's view of the devices is mounted.
const Sysfs = "/sys"

var aLongTimeAgo = time.Unix(1, 0)

// A Device is a disk or a partition as sysfs describes it at one moment.
// Vendor, Model, Serial and PartName come from the device and may hold
// anything but control characters at their ends.
type Device struct {
	Name string // kernel name, "sda1"; "/" in it is written "!"
	Path string // folder below the sysfs root, as "devices/…/block/sda/sda1"

	Major, Minor uint32
	DiskSeq      uint64 // of the disk: a new number for each plugging and medium; 0 before Linux 5.15

	Disk      string // name of the whole disk; Name itself for a disk
	Partition int    // number on the disk; 0 for a disk
	PartUUID  string // where the kernel tells it (since Linux 6.9)
	PartName  string

	Size      int64 // bytes; 0 without a medium
	ReadOnly  bool  // by a switch or by the kernel's decision
	Removable bool  // the medium can be taken out; false for most USB sticks
	Hidden    bool  // not for use, as the paths of a multipath NVMe disk
	USB       bool  // connected through a USB port

	Vendor, Model, Serial string
	USBPort               string // folder of the USB device below the sysfs root; empty without USB

	Partitions []string // names of the partitions of a disk
	Holders    []string // devices made of this one: dm-0, md127
	Slaves     []string // devices that this one is made of
	DMName     string   // name of a device-mapper device
	DMUUID     string   // begins with CRYPT-, LVM-, …
	Backing    string   // file behind a loop device

	// PollsMedia says that the kernel must ask the device for media changes,
	// and MediaPoll how often it does: in milliseconds, 0 never, -1 as often
	// as the kernel does by default.
	PollsMedia bool
	MediaPoll  int
}

// IsPartition tells a partition from a disk.
func (d Device) IsPartition() bool { return d.Partition > 0 }

// MediaPresent reports whether there is anything to read.
func (d Device) MediaPresent() bool { return d.Size > 0 }

// Dev returns the device number as "8:1", the form that mountinfo and
// /sys/dev/block use.
func (d Device) Dev() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// SamePlugging reports whether d and o are the same device in the same
// plugging with the same medium.
func (d Device) SamePlugging(o Device) bool {
	return d.Name == o.Name && d.Major == o.Major && d.Minor == o.Minor && d.DiskSeq == o.DiskSeq && d.Partition == o.Partition
}

// List returns all block devices below a sysfs root, by name. A device that
// vanishes meanwhile is left out.
func List(sysfs string) ([]Device, error) {
	root := sysTree(sysfs)
	names, err := folder(root, "class/block")
	if err != nil {
		return nil, fmt.Errorf("listing block devices: %w", err)
	}
	devices := make([]Device, 0, len(names))
	disks := make(map[string]Device)
	for _, name := range names {
		d, err := read(root, name, disks)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return devices, nil
}

// Read returns the block device with a kernel name. A device that is not there
// is errors.Is(err, fs.ErrNotExist).
func Read(sysfs, name string) (Device, error) {
	if !validName(name) {
		return Device{}, fmt.Errorf("block device %.40q: %w", name, fs.ErrNotExist)
	}
	d, err := read(sysTree(sysfs), name, map[string]Device{})
	if errors.Is(err, errGone) {
		err = fmt.Errorf("block device %s: %w", name, fs.ErrNotExist)
	}
	return d, err
}

// errGone says that a device was removed while it was read: its folder is
// there, and what is in it is not any more.
var errGone = errors.New("device is going")

// read describes one device. What all devices of a disk share is taken from
// disks, by the disk's path, and put there.
func read(root sysTree, name string, disks map[string]Device) (Device, error) {
	target, err := root.readlink("class/block/" + name)
	if err != nil {
		return Device{}, fmt.Errorf("block device %s: %w", name, err)
	}
	// The link leads from class/block to devices/…; it is resolved by its
	// text, so that the path shows which buses the device hangs on.
	path := filepath.Join("class/block", target)
	if !filepath.IsLocal(path) {
		return Device{}, fmt.Errorf("block device %s: its link leads to %.80q: %w", name, target, fs.ErrInvalid)
	}
	env := readEnv(root, path+"/uevent")
	if env == nil {
		return Device{}, errGone
	}
	e, err := eventFromEnv(Listed, "/"+path, env)
	if err != nil {
		return Device{}, fmt.Errorf("block device %s: %w", name, err)
	}
	disk, partition := path, int(number(root, path+"/partition"))
	if partition > 0 {
		disk = filepath.Dir(path)
	}
	d, ok := disks[disk]
	if !ok {
		d = readDisk(root, disk)
		disks[disk] = d
	}
	d.Name, d.Path = name, path
	d.Major, d.Minor = e.Major, e.Minor
	d.Partition = max(partition, e.Partition)
	d.PartName, d.PartUUID = env["PARTNAME"], env["PARTUUID"]
	if d.DiskSeq == 0 {
		d.DiskSeq = e.DiskSeq
	}
	if partition == 0 {
		d.Disk = name
	}
	d.Size = number(root, path+"/size") * 512
	d.ReadOnly = number(root, path+"/ro") != 0
	d.Holders, _ = folder(root, path+"/holders")
	d.Slaves, _ = folder(root, path+"/slaves")
	if d.IsPartition() {
		return d, nil
	}
	d.PollsMedia = slices.Contains(strings.Fields(text(root, disk+"/events")), "media_change")
	d.MediaPoll = int(number(root, disk+"/events_poll_msecs"))
	for _, sub := range mustFolder(root, path) {
		if strings.HasPrefix(sub, name) && number(root, path+"/"+sub+"/partition") > 0 {
			d.Partitions = append(d.Partitions, sub)
		}
	}
	return d, nil
}

// readDisk describes what a disk and its partitions have in common.
func readDisk(root sysTree, disk string) Device {
	d := Device{
		Disk:      filepath.Base(disk),
		DiskSeq:   uint64(number(root, disk+"/diskseq")),
		Removable: number(root, disk+"/removable") != 0,
		Hidden:    number(root, disk+"/hidden") != 0,
	}
	// Virtual disks, of which there are many, have no hardware.
	if strings.HasPrefix(disk, "devices/virtual/") {
		d.DMName = text(root, disk+"/dm/name")
		d.DMUUID = text(root, disk+"/dm/uuid")
		d.Backing = text(root, disk+"/loop/backing_file")
		if !strings.HasPrefix(d.Disk, "nvme") {
			return d
		}
	}
	d.Vendor = text(root, disk+"/device/vendor")
	d.Model = text(root, disk+"/device/model")
	d.Serial = text(root, disk+"/device/serial")
	if d.Serial == "" {
		d.Serial = text(root, disk+"/serial")
	}
	if port := usbDevice(root, disk); port != "" {
		d.USB, d.USBPort = true, port
		if s := text(root, port+"/serial"); s != "" {
			d.Serial = s
		}
		if d.Model == "" {
			d.Model = text(root, port+"/product")
		}
		if d.Vendor == "" {
			d.Vendor = text(root, port+"/manufacturer")
		}
	} else if onUSB(disk) {
		d.USB = true
	}
	// A device's PCI number is no name to show.
	if strings.HasPrefix(d.Vendor, "0x") {
		d.Vendor = ""
	}
	return d
}

// usbDevice returns the folder of the USB device that a disk hangs on: the
// nearest one above it with a vendor number. Empty without one.
func usbDevice(root sysTree, disk string) string {
	if !onUSB(disk) {
		return ""
	}
	for dir := filepath.Dir(disk); dir != "." && dir != "/"; dir = filepath.Dir(dir) {
		if root.has(dir + "/idVendor") {
			return dir
		}
	}
	return ""
}

// onUSB reports whether a path has a component usbN, the root hub of a bus.
func onUSB(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if n, ok := strings.CutPrefix(part, "usb"); ok && n != "" && strings.Trim(n, "0123456789") == "" {
			return true
		}
	}
	return false
}

// listed yields an event for every device in sysfs.
func listed(sysfs string) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		devices, err := List(sysfs)
		if err != nil {
			yield(Event{}, err)
			return
		}
		for _, d := range devices {
			kind := "disk"
			if d.IsPartition() {
				kind = "partition"
			}
			if !yield(Event{
				Action: Listed, Name: d.Name, DevPath: "/" + d.Path, Type: kind,
				Major: d.Major, Minor: d.Minor, DiskSeq: d.DiskSeq, Partition: d.Partition,
			}, nil) {
				return
			}
		}
	}
}

// maxAttribute bounds what is read of one sysfs file; the kernel gives at most
// a page of 4 KiB, some architectures 64 KiB.
const maxAttribute = 64 << 10

// A sysTree is the root of sysfs, or of a copy. A listing reads hundreds of files
// in it and is made at every event, so each is read by as few system calls as
// can be: without the runtime's poller, and without walking the path in parts.
type sysTree string

func (t sysTree) path(name string) string { return string(t) + "/" + name }

func (t sysTree) readlink(name string) (string, error) { return os.Readlink(t.path(name)) }

func (t sysTree) has(name string) bool { return unix.Access(t.path(name), unix.F_OK) == nil }

func attribute(root sysTree, name string) ([]byte, error) {
	fd, err := unix.Open(root.path(name), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: root.path(name), Err: err}
	}
	defer unix.Close(fd)
	data := make([]byte, 0, 512)
	for len(data) < maxAttribute {
		n, err := unix.Read(fd, data[len(data):cap(data)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: root.path(name), Err: err}
		}
		if n == 0 {
			break
		}
		data = slices.Grow(data[:len(data)+n], 512)
	}
	return data[:min(len(data), maxAttribute)], nil
}

// text returns an attribute without the padding around it, "" when there is
// none.
func text(root sysTree, path string) string {
	b, err := attribute(root, path)
	if err != nil {
		return ""
	}
	return strings.Trim(strings.ToValidUTF8(string(b), "\ufffd"), " \t\r\n\x00")
}

// number returns a decimal attribute, 0 when there is none.
func number(root sysTree, path string) int64 {
	n, err := strconv.ParseInt(text(root, path), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// readEnv reads a uevent attribute: lines KEY=VALUE. It returns nil when there
// is none.
func readEnv(root sysTree, path string) map[string]string {
	b, err := attribute(root, path)
	if err != nil || len(b) == 0 {
		return nil
	}
	env := make(map[string]string)
	lines := bufio.NewScanner(strings.NewReader(string(b)))
	for lines.Scan() {
		if key, value, ok := strings.Cut(lines.Text(), "="); ok && key != "" {
			env[key] = value
		}
	}
	return env
}

func folder(root sysTree, path string) ([]string, error) {
	f, err := os.Open(root.path(path))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func mustFolder(root sysTree, path string) []string {
	names, _ := folder(root, path)
	return names
}
