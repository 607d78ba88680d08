package backup

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// IDSize is the length of an ID in bytes.
const IDSize = sha256.Size

// An ID names a blob or a repository file by the SHA-256 of its contents. The
// zero ID is no valid hash and stands for "none".
type ID [IDSize]byte

// Hash returns the ID of data.
func Hash(data []byte) ID { return sha256.Sum256(data) }

// ParseID reads the 64 hexadecimal digits of an ID, lower case only, as they
// stand in repository file names.
func ParseID(s string) (ID, error) {
	var id ID
	if err := id.UnmarshalText([]byte(s)); err != nil {
		return ID{}, err
	}
	return id, nil
}

// IsZero reports whether id is the zero ID, "none".
func (id ID) IsZero() bool { return id == ID{} }

// String returns the 64 hexadecimal digits of id.
func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Short returns the first eight digits, enough to show to a person.
func (id ID) Short() string { return hex.EncodeToString(id[:4]) }

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) {
	return hex.AppendEncode(make([]byte, 0, 2*IDSize), id[:]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler. It accepts lower-case
// digits only, so that every ID has one spelling.
func (id *ID) UnmarshalText(text []byte) error {
	if len(text) != 2*IDSize {
		return fmt.Errorf("id has %d digits instead of %d", len(text), 2*IDSize)
	}
	for _, c := range text {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("id has the character %q, which is no lower-case hexadecimal digit", c)
		}
	}
	_, err := hex.Decode(id[:], text)
	return err
}

// A BlobKind tells file contents from directory listings.
type BlobKind uint8

// The kinds of blobs. Blobs of different kinds never share a pack, and the
// same bytes stored as both kinds are two blobs.
const (
	DataBlob BlobKind = iota
	TreeBlob
)

// String returns the kind's name in index files.
func (k BlobKind) String() string {
	switch k {
	case DataBlob:
		return "data"
	case TreeBlob:
		return "tree"
	}
	return fmt.Sprintf("BlobKind(%d)", uint8(k))
}

// A Blob names one stored blob.
type Blob struct {
	Kind BlobKind
	ID   ID
}

func (b Blob) String() string { return b.Kind.String() + " " + b.ID.Short() }

// A Volume is a source of snapshots: a folder with a name of its own.
type Volume struct {
	Name string // unique within a device, for example "mosquitto"
	Path string // absolute, clean path of the folder that is read and recorded
}
