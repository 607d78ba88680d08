package backup

import (
	"slices"
	"strings"
	"time"
)

// Tags that this program gives to snapshots.
const (
	// VolumeTag, followed by a name, says which volume a snapshot holds.
	VolumeTag = "volume:"
	// IncompleteTag marks a snapshot that lacks files which could not be read.
	IncompleteTag = "incomplete"
	// BeforeRestoreTag marks what a restore in place was about to overwrite.
	BeforeRestoreTag = "before-restore"
	// SuspectTag marks a snapshot of a volume that may have lost files
	// before it was taken, for example one that had shrunk a lot.
	SuspectTag = "suspect"
	// PinTag marks a snapshot that retention never removes.
	PinTag = "pin"
)

// A Snapshot is the record of one volume at one moment. Field order and
// encoding are restic's.
type Snapshot struct {
	Time           time.Time `json:"time"`
	Parent         *ID       `json:"parent,omitempty"`
	Tree           *ID       `json:"tree"`
	Paths          []string  `json:"paths"`
	Hostname       string    `json:"hostname,omitempty"`
	Username       string    `json:"username,omitempty"`
	UID            uint32    `json:"uid,omitempty"`
	GID            uint32    `json:"gid,omitempty"`
	Excludes       []string  `json:"excludes,omitempty"`
	Tags           []string  `json:"tags,omitempty"`
	Original       *ID       `json:"original,omitempty"`
	ProgramVersion string    `json:"program_version,omitempty"`
	Summary        *Summary  `json:"summary,omitempty"`

	// ID is the name of the file that the snapshot was read from or saved
	// to. It is not part of the file.
	ID ID `json:"-"`
}

// A Summary counts what a snapshot holds and what it added. Sizes are bytes.
type Summary struct {
	BackupStart         time.Time `json:"backup_start"`
	BackupEnd           time.Time `json:"backup_end"`
	FilesNew            uint64    `json:"files_new"`
	FilesChanged        uint64    `json:"files_changed"`
	FilesUnmodified     uint64    `json:"files_unmodified"`
	DirsNew             uint64    `json:"dirs_new"`
	DirsChanged         uint64    `json:"dirs_changed"`
	DirsUnmodified      uint64    `json:"dirs_unmodified"`
	DataBlobs           int64     `json:"data_blobs"`
	TreeBlobs           int64     `json:"tree_blobs"`
	DataAdded           uint64    `json:"data_added"`        // plaintext
	DataAddedPacked     uint64    `json:"data_added_packed"` // as stored
	TotalFilesProcessed uint64    `json:"total_files_processed"`
	TotalBytesProcessed uint64    `json:"total_bytes_processed"`
}

// HasTag reports whether the snapshot carries tag.
func (s *Snapshot) HasTag(tag string) bool { return slices.Contains(s.Tags, tag) }

// Complete reports whether every file of the volume could be read.
func (s *Snapshot) Complete() bool { return !s.HasTag(IncompleteTag) }

// Volume returns the name of the volume that the snapshot holds: its volume
// tag, or for a snapshot of another program its paths joined by commas.
func (s *Snapshot) Volume() string {
	for _, t := range s.Tags {
		if name, ok := strings.CutPrefix(t, VolumeTag); ok {
			return name
		}
	}
	return strings.Join(s.Paths, ",")
}
