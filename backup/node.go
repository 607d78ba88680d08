package backup

import (
	"fmt"
	"io/fs"
	"strings"
	"time"
)

// A NodeType says what a Node is. The values are those of the format.
type NodeType string

// The types of nodes.
const (
	File       NodeType = "file"
	Dir        NodeType = "dir"
	Symlink    NodeType = "symlink"
	Device     NodeType = "dev"
	CharDevice NodeType = "chardev"
	FIFO       NodeType = "fifo"
	Socket     NodeType = "socket"
)

// ModeMask selects the bits of an fs.FileMode that a Node records.
const ModeMask = fs.ModePerm | fs.ModeType | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky

// A Node is one entry of a folder, as a snapshot records it. Which fields hold
// something depends on Type.
type Node struct {
	Name       string // raw bytes, as the file system gives them; see CheckName
	Type       NodeType
	Mode       fs.FileMode // within ModeMask
	ModTime    time.Time
	AccessTime time.Time
	ChangeTime time.Time
	UID        uint32
	GID        uint32
	User       string // name of UID on the device that made the snapshot, or ""
	Group      string
	Inode      uint64
	DeviceID   uint64 // st_dev, only for files with more than one hard link
	Size       uint64 // of a file, in bytes
	Links      uint64
	LinkTarget string // of a symlink, raw bytes
	Xattrs     []Xattr
	Device     uint64 // st_rdev of a Device or CharDevice
	Content    []ID   // data blobs of a file, in order
	Subtree    ID     // tree of a Dir, else zero
	Error      string // why the file could not be read in full, or ""

	// Generic holds the raw JSON object generic_attributes that restic
	// writes on other systems, so that rewriting a tree keeps it.
	Generic []byte
}

// An Xattr is one extended attribute.
type Xattr struct {
	Name  string
	Value []byte
}

// A Tree lists one folder, sorted by the bytes of the names.
type Tree struct {
	Nodes []Node
}

// MaxNameLen is the length in bytes that a name may have: what Linux allows.
const MaxNameLen = 255

// CheckName returns an error unless name can be one entry of a folder. Names
// that it accepts never leave the folder that they are joined to.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("the name is empty")
	case name == "." || name == "..":
		return fmt.Errorf("the name is %q", name)
	case len(name) > MaxNameLen:
		return fmt.Errorf("the name %.20q… has %d bytes, more than %d", name, len(name), MaxNameLen)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("the name %q contains a slash or a NUL byte", name)
	}
	return nil
}
