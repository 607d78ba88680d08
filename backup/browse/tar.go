package browse

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup"
)

// maxPAX bounds the bytes of an entry's extended header. Readers, archive/tar
// among them, take no more than 1 MiB.
const maxPAX = 1<<20 - 8<<10

// tarArchive writes tar with archive/tar, but for sparse files, which that
// package does not write.
type tarArchive struct {
	out     io.Writer
	tw      *tar.Writer
	links   hardLinks
	problem func(path string, err error)

	// Of the file that is being written:
	linked bool   // it is a hard link and has no contents
	sparse []span // the parts of a sparse file that are still to be written
	data   uint64 // sparse: bytes written, or 0
}

func newTar(w io.Writer, problem func(path string, err error)) *tarArchive {
	return &tarArchive{out: w, tw: tar.NewWriter(w), links: hardLinks{}, problem: problem}
}

func (a *tarArchive) begin(e Entry, f *File) error {
	if err := a.endFile(); err != nil {
		return err
	}
	a.linked = false
	n := e.Node
	h := &tar.Header{
		Format: tar.FormatPAX, Name: relative(e.Path), Mode: tarMode(n.Mode), Uid: int(n.UID), Gid: int(n.GID),
		Uname: accountName(n.User), Gname: accountName(n.Group), ModTime: tarTime(n.ModTime),
	}
	switch n.Type {
	case backup.File:
		h.Typeflag = tar.TypeReg
		h.Size = int64(n.Size)
	case backup.Dir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case backup.Symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.LinkTarget
	case backup.Device, backup.CharDevice:
		h.Typeflag = tar.TypeBlock
		if n.Type == backup.CharDevice {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(n.Device)), int64(unix.Minor(n.Device))
		if h.Devmajor >= 1<<21 || h.Devminor >= 1<<21 { // seven octal digits
			return &skipError{fmt.Errorf("device %d:%d: %w", h.Devmajor, h.Devminor, ErrNotInArchive)}
		}
	case backup.FIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return &skipError{fmt.Errorf("%s: %w", n.Type, ErrNotInArchive)}
	}
	if n.Size > 1<<62 {
		return &skipError{ErrSize}
	}
	if len(h.Name)+len(h.Linkname) > maxPAX/2 {
		return &skipError{errNameTooLong}
	}
	if first := a.links.first(h.Name, n); first != "" {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		a.linked = true
	}
	if a.linked {
		return a.tw.WriteHeader(h)
	}
	records, ok := xattrRecords(n.Xattrs)
	if !ok {
		a.problem(e.Path, errAttributes)
	}
	h.PAXRecords = records
	if f != nil {
		if spans, holes := dataSpans(f); holes {
			return a.beginSparse(h, f, spans)
		}
	}
	return a.tw.WriteHeader(h)
}

func (a *tarArchive) contents(p *piece) error {
	switch {
	case a.linked:
		return nil
	case a.sparse == nil:
		return p.write(a.tw)
	}
	from, to := p.file.start(p.blob), p.file.ends[p.blob]
	for len(a.sparse) > 0 && a.sparse[0].off < to {
		s := a.sparse[0]
		at, end := max(s.off, from), min(s.off+s.size, to)
		if err := a.part(p, at-from, end-from); err != nil {
			return err
		}
		if s.off+s.size > to {
			break // the rest is in the next blob
		}
		a.sparse = a.sparse[1:]
	}
	return nil
}

// part writes the bytes of a blob between two offsets.
func (a *tarArchive) part(p *piece, from, to uint64) error {
	if from >= to {
		return nil
	}
	a.data += to - from
	data := p.data
	if data == nil { // a hole, less than two blocks at its ends
		data = make([]byte, to)
	}
	_, err := a.out.Write(data[from:to])
	return err
}

func (a *tarArchive) end() error {
	if err := a.endFile(); err != nil {
		return err
	}
	return a.tw.Close()
}

// endFile writes the padding of a sparse file.
func (a *tarArchive) endFile() error {
	size := a.data
	a.sparse, a.data = nil, 0
	return a.pad(size)
}

// pad fills up the block that ends size bytes from where a block began.
func (a *tarArchive) pad(size uint64) error {
	var zeros [tarBlock]byte
	_, err := a.out.Write(zeros[:(tarBlock-size%tarBlock)%tarBlock])
	return err
}

// tarMode returns the bits of chmod(2).
func tarMode(m fs.FileMode) int64 {
	mode := int64(m.Perm())
	if m&fs.ModeSetuid != 0 {
		mode |= unix.S_ISUID
	}
	if m&fs.ModeSetgid != 0 {
		mode |= unix.S_ISGID
	}
	if m&fs.ModeSticky != 0 {
		mode |= unix.S_ISVTX
	}
	return mode
}

// tarTime keeps a time within what readers of archives bear.
func tarTime(t time.Time) time.Time {
	if y := t.Year(); y < 1 || y > 9999 {
		return time.Unix(0, 0)
	}
	return t
}

// accountName returns a user's or group's name, unless it is none.
func accountName(s string) string {
	if len(s) > 255 || strings.ContainsAny(s, "\x00\n:") {
		return ""
	}
	return s
}

// escapeXattr writes a name as GNU tar does, since = ends a record's key.
var escapeXattr = strings.NewReplacer("%", "%25", "=", "%3D")

// xattrRecords returns extended attributes as PAX records; ok is false where
// some had to be left out.
func xattrRecords(xattrs []backup.Xattr) (records map[string]string, ok bool) {
	if len(xattrs) == 0 {
		return nil, true
	}
	records, ok = map[string]string{}, true
	size := 0
	for _, x := range xattrs {
		if x.Name == "" || strings.ContainsRune(x.Name, 0) {
			ok = false // no file system has such a name
			continue
		}
		k := "SCHILY.xattr." + escapeXattr.Replace(x.Name)
		if size += len(k) + len(x.Value) + 32; size > maxPAX/2 {
			return records, false
		}
		records[k] = string(x.Value)
	}
	return records, ok
}

// dataSpans returns the parts of a file that are data, in whole blocks, and
// whether there is anything else.
func dataSpans(f *File) (spans []span, holes bool) {
	var data uint64
	for s := range f.spans() {
		from := s.off / tarBlock * tarBlock
		to := min((s.off+s.size+tarBlock-1)/tarBlock*tarBlock, f.Size())
		if n := len(spans); n > 0 && spans[n-1].off+spans[n-1].size >= from {
			data -= spans[n-1].size
			from = spans[n-1].off
			spans = spans[:n-1]
		}
		spans = append(spans, span{from, to - from})
		data += to - from
	}
	return spans, data < f.Size()
}

// The layout of GNU tar's sparse format 1.0, described in its manual: a PAX
// header with the real name and size, then as the file's contents a map in
// decimal lines (number of spans, then offset and size of each), filled up to
// a block, then the data. GNU tar lets each span begin with a block, so spans
// have to begin and end where blocks do, or with the file.
const tarBlock = 512

// beginSparse writes the headers of a sparse file.
func (a *tarArchive) beginSparse(h *tar.Header, f *File, spans []span) error {
	if err := a.tw.Flush(); err != nil {
		return err
	}
	var data uint64
	for _, s := range spans {
		data += s.size
	}
	if len(spans) == 0 || spans[len(spans)-1].off+spans[len(spans)-1].size < f.Size() {
		spans = append(spans, span{f.Size(), 0}) // the end is a hole
	}
	list := strconv.AppendInt(nil, int64(len(spans)), 10)
	list = append(list, '\n')
	for _, s := range spans {
		list = fmt.Appendf(list, "%d\n%d\n", s.off, s.size)
	}
	mapSize := uint64(len(list)+tarBlock-1) / tarBlock * tarBlock
	stored := mapSize + data

	records := maps.Clone(h.PAXRecords)
	if records == nil {
		records = map[string]string{}
	}
	maps.Copy(records, map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
		"GNU.sparse.name": h.Name, "GNU.sparse.realsize": strconv.FormatUint(f.Size(), 10),
		"path": "GNUSparseFile.0/" + h.Name, "size": strconv.FormatUint(stored, 10),
		"uid": strconv.Itoa(h.Uid), "gid": strconv.Itoa(h.Gid), "mtime": paxTime(h.ModTime),
	})
	for k, name := range map[string]string{"uname": h.Uname, "gname": h.Gname} {
		if name != "" {
			records[k] = name
		}
	}
	var pax []byte
	for _, k := range slices.Sorted(maps.Keys(records)) {
		pax = appendRecord(pax, k, records[k])
	}
	if err := a.block('x', "PaxHeaders.0", uint64(len(pax)), 0o644); err != nil {
		return err
	}
	if _, err := a.out.Write(pax); err != nil {
		return err
	}
	if err := a.pad(uint64(len(pax))); err != nil {
		return err
	}
	if err := a.block(tar.TypeReg, "GNUSparseFile.0", stored, h.Mode); err != nil {
		return err
	}
	if _, err := a.out.Write(list); err != nil {
		return err
	}
	a.sparse, a.data = spans, 0
	return a.pad(uint64(len(list)))
}

// paxTime writes a time in seconds since 1970 with a fraction.
func paxTime(t time.Time) string {
	s, ns := t.Unix(), t.Nanosecond()
	sign := ""
	if s < 0 && ns > 0 {
		s, ns = s+1, 1e9-ns
		if s == 0 {
			sign = "-"
		}
	}
	return fmt.Sprintf("%s%d.%09d", sign, s, ns)
}

// appendRecord appends a PAX record: its own length in decimal, a blank, and
// key=value with a newline.
func appendRecord(dst []byte, key, value string) []byte {
	n := len(key) + len(value) + 3
	size := n + len(strconv.Itoa(n))
	if n+len(strconv.Itoa(size)) != size {
		size = n + len(strconv.Itoa(size))
	}
	return fmt.Appendf(dst, "%d %s=%s\n", size, key, value)
}

// block writes a header block in ustar's layout. What does not fit, an extended
// header before it tells.
func (a *tarArchive) block(typeflag byte, name string, size uint64, mode int64) error {
	var b [tarBlock]byte
	copy(b[0:100], name)
	copy(b[100:], fmt.Sprintf("%07o\x00", mode))
	copy(b[108:], "0000000\x00") // uid
	copy(b[116:], "0000000\x00") // gid
	copy(b[124:], fmt.Sprintf("%011o\x00", min(size, 1<<33-1)))
	copy(b[136:], "00000000000\x00") // mtime
	copy(b[148:], "        ")        // the checksum counts as blanks
	b[156] = typeflag
	copy(b[257:], "ustar\x0000")
	copy(b[329:], "0000000\x000000000\x00") // device
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	_, err := a.out.Write(b[:])
	return err
}
