package restorer

import (
	"encoding/binary"
	"io/fs"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// none is no entry.
const none = math.MaxUint32

// An entry is one file or folder of a plan, in as little memory as a plain
// array allows; a record in the arena holds the rest.
type entry struct {
	rec    uint64
	parent uint32 // number of its folder; none for the target itself
	action Action
	kind   kind
	flags  flags
}

type kind uint8

const (
	kFile kind = iota
	kDir
	kSymlink
	kDevice
	kCharDevice
	kFIFO
	kSocket
)

var kinds = [...]backup.NodeType{backup.File, backup.Dir, backup.Symlink, backup.Device, backup.CharDevice, backup.FIFO, backup.Socket}

func kindOf(t backup.NodeType) kind {
	for i, k := range kinds {
		if k == t {
			return kind(i)
		}
	}
	panic("the decoder lets no other types pass: " + string(t))
}

// typeBits returns the S_IF bits of a node of that kind.
func (k kind) typeBits() uint32 {
	return [...]uint32{unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFBLK, unix.S_IFCHR, unix.S_IFIFO, unix.S_IFSOCK}[k]
}

type flags uint16

const (
	fExists    flags = 1 << iota // something has that name in the target
	fWasDir                      // and it is a folder
	fSameType                    // and it is of the node's type
	fSameSize                    // and the file has the node's size
	fSameMeta                    // and the node's metadata
	fManyLinks                   // and it has other names
	fHashed                      // its contents were or will be compared
	fTrusted                     // size and time vouch for the contents
	fLink                        // a further name of another entry
	fNeeded                      // something below or itself is restored
	fSelected                    // not only on the way to something
	fTouched                     // a folder whose own time the restore changes
	fKept                        // left alone by policy
	fFailed                      // not to be restored
)

// An arena holds byte strings that are never freed, without pointers that the
// garbage collector would follow.
type arena struct {
	segs [][]byte
	size int64 // bytes taken
}

const segSize = 1 << 20

// room returns n bytes and where they are.
func (a *arena) room(n int) ([]byte, uint64) {
	last := len(a.segs) - 1
	if last < 0 || cap(a.segs[last])-len(a.segs[last]) < n {
		a.segs = append(a.segs, make([]byte, 0, max(n, segSize)))
		a.size += int64(max(n, segSize))
		last++
	}
	s := a.segs[last]
	a.segs[last] = s[:len(s)+n]
	return a.segs[last][len(s) : len(s)+n : len(s)+n], uint64(last)<<32 | uint64(len(s))
}

func (a *arena) add(b []byte) uint64 {
	dst, at := a.room(len(b))
	copy(dst, b)
	return at
}

// at returns the bytes from a place on, to the end of its segment.
func (a *arena) at(p uint64) []byte { return a.segs[p>>32][uint32(p):] }

// State of a chunk of a file, in its record.
const (
	chunkWanted = 0
	chunkKept   = 1 // the target has it at the right offset
)

// A record is what the execution needs of a node.
type record struct {
	Name       string
	Mode       fs.FileMode
	ModTime    time.Time
	AccessTime time.Time
	UID, GID   uint32
	Size       uint64
	Device     uint64
	LinkTarget string
	Xattrs     []backup.Xattr

	chunks []byte // a state for each chunk
	ids    []byte // and its ID
}

func (r *record) id(i int) backup.ID { return backup.ID(r.ids[i*backup.IDSize:]) }

// appendRecord appends the form in which the arena holds a node.
func appendRecord(dst []byte, n *backup.Node) []byte {
	dst = appendBytes(dst, n.Name)
	dst = binary.AppendUvarint(dst, uint64(n.Mode))
	dst = appendTime(dst, n.ModTime)
	dst = appendTime(dst, n.AccessTime)
	dst = binary.AppendUvarint(dst, uint64(n.UID))
	dst = binary.AppendUvarint(dst, uint64(n.GID))
	dst = binary.AppendUvarint(dst, n.Size)
	dst = binary.AppendUvarint(dst, n.Device)
	dst = appendBytes(dst, n.LinkTarget)
	dst = binary.AppendUvarint(dst, uint64(len(n.Xattrs)))
	for _, x := range n.Xattrs {
		dst = appendBytes(dst, x.Name)
		dst = appendBytes(dst, string(x.Value))
	}
	dst = binary.AppendUvarint(dst, uint64(len(n.Content)))
	dst = append(dst, make([]byte, len(n.Content))...)
	for i := range n.Content {
		dst = append(dst, n.Content[i][:]...)
	}
	return dst
}

func appendBytes(dst []byte, s string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

func appendTime(dst []byte, t time.Time) []byte {
	dst = binary.AppendVarint(dst, t.Unix())
	return binary.AppendUvarint(dst, uint64(t.Nanosecond()))
}

// A reader takes apart what appendRecord made.
type reader []byte

func (r *reader) uint() uint64 {
	v, n := binary.Uvarint(*r)
	*r = (*r)[n:]
	return v
}

func (r *reader) bytes(n uint64) []byte {
	b := (*r)[:n:n]
	*r = (*r)[n:]
	return b
}

func (r *reader) time() time.Time {
	sec, n := binary.Varint(*r)
	*r = (*r)[n:]
	return time.Unix(sec, int64(r.uint()))
}

// record returns the record at p. Its chunks and ids are those in the arena.
func (a *arena) record(p uint64) record {
	r := reader(a.at(p))
	n := record{Name: string(r.bytes(r.uint())), Mode: fs.FileMode(r.uint())}
	n.ModTime, n.AccessTime = r.time(), r.time()
	n.UID, n.GID, n.Size, n.Device = uint32(r.uint()), uint32(r.uint()), r.uint(), r.uint()
	n.LinkTarget = string(r.bytes(r.uint()))
	if count := r.uint(); count > 0 {
		n.Xattrs = make([]backup.Xattr, count)
		for i := range n.Xattrs {
			n.Xattrs[i] = backup.Xattr{Name: string(r.bytes(r.uint())), Value: r.bytes(r.uint())}
		}
	}
	count := r.uint()
	n.chunks = r.bytes(count)
	n.ids = r.bytes(count * backup.IDSize)
	return n
}

// name returns the name in the record at p.
func (a *arena) name(p uint64) string {
	r := reader(a.at(p))
	return string(r.bytes(r.uint()))
}

// unixMode returns the permission bits of a mode as the kernel has them.
func unixMode(m fs.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&fs.ModeSetuid != 0 {
		bits |= unix.S_ISUID
	}
	if m&fs.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	if m&fs.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	return bits
}
