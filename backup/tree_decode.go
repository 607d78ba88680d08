package backup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/backup/internal/jsonscan"
)

// ErrMalformed says that stored bytes are not what their kind demands.
var ErrMalformed = errors.New("malformed")

// DecodeTree parses the stored form of a tree. Whatever it accepts is safe to
// use: names pass CheckName and are sorted, types are known, modes are within
// ModeMask, files alone have content and folders alone a subtree. Errors match
// ErrMalformed. The memory it takes is proportional to len(data).
func DecodeTree(data []byte) (*Tree, error) {
	t := &Tree{}
	err := EachNode(data, func(n *Node) error {
		t.Nodes = append(t.Nodes, *n)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// EachNode calls fn for each node of the stored form of a tree, in order, and
// takes the memory of one node only, however many there are. The node is valid
// until fn returns; what it refers to stays. An error of fn ends the walk and
// is returned as it is. All else is as with DecodeTree, but what is malformed
// comes to light only after fn was called for the nodes before.
func EachNode(data []byte, fn func(n *Node) error) error {
	d := decoder{Scanner: jsonscan.New(data)}
	seen, stopped := false, false
	err := d.Object(func(key []byte) error {
		if string(key) != "nodes" {
			return d.Skip()
		}
		if seen {
			return errors.New("two lists of nodes")
		}
		seen = true
		if d.Null() {
			return nil
		}
		var n Node
		last, first := "", true
		return d.Array(func() error {
			n = Node{}
			if err := d.node(&n); err != nil {
				return err
			}
			if !first && last >= n.Name {
				return fmt.Errorf("the name %q comes after %q", n.Name, last)
			}
			last, first = n.Name, false
			err := fn(&n)
			stopped = err != nil
			return err
		})
	})
	if stopped {
		return err
	}
	if err == nil {
		err = d.End()
	}
	if err == nil && !seen {
		err = errors.New("no list of nodes")
	}
	if err != nil {
		return fmt.Errorf("tree at byte %d: %w: %w", d.Pos(), ErrMalformed, err)
	}
	return nil
}

// A decoder reads the JSON of a tree. Member names are taken in exact case
// only.
type decoder struct {
	*jsonscan.Scanner
	user, group string // the last ones; neighbours mostly share them
}

func (d *decoder) node(n *Node) error {
	var rawTarget []byte
	hasContent, hasSubtree, hasRaw := false, false, false
	err := d.Object(func(key []byte) (err error) {
		switch string(key) {
		case "name":
			var s string
			if s, err = d.str(); err == nil {
				n.Name, err = unquoteName(s)
			}
		case "type":
			n.Type, err = d.nodeType()
		case "mode":
			var v uint64
			v, err = d.Uint(32)
			n.Mode = fs.FileMode(v)
		case "mtime":
			n.ModTime, err = d.time(time.Time{})
		case "atime":
			n.AccessTime, err = d.time(n.ModTime)
		case "ctime":
			n.ChangeTime, err = d.time(n.ModTime)
		case "uid":
			var v uint64
			v, err = d.Uint(32)
			n.UID = uint32(v)
		case "gid":
			var v uint64
			v, err = d.Uint(32)
			n.GID = uint32(v)
		case "user":
			err = d.sameStr(&d.user)
			n.User = d.user
		case "group":
			err = d.sameStr(&d.group)
			n.Group = d.group
		case "inode":
			n.Inode, err = d.Uint(64)
		case "device_id":
			n.DeviceID, err = d.Uint(64)
		case "size":
			n.Size, err = d.Uint(64)
		case "links":
			n.Links, err = d.Uint(64)
		case "linktarget":
			n.LinkTarget, err = d.str()
		case "linktarget_raw":
			hasRaw = true
			rawTarget, err = d.Base64()
		case "extended_attributes":
			n.Xattrs, err = d.xattrs()
		case "generic_attributes":
			var raw []byte
			raw, err = d.Raw()
			n.Generic = bytes.Clone(raw)
		case "device":
			n.Device, err = d.Uint(64)
		case "content":
			n.Content, hasContent, err = d.ids()
		case "subtree":
			if d.Null() {
				return nil
			}
			hasSubtree = true
			n.Subtree, err = d.id()
		case "error":
			n.Error, err = d.str()
		default:
			err = d.Skip()
		}
		return err
	})
	if err != nil {
		return err
	}
	if hasRaw {
		n.LinkTarget = string(rawTarget)
	}
	if err := CheckName(n.Name); err != nil {
		return err
	}
	switch {
	case n.Type == "":
		return fmt.Errorf("%q has no type", n.Name)
	case n.Mode&^ModeMask != 0:
		return fmt.Errorf("%q has the mode bits %#x", n.Name, uint32(n.Mode&^ModeMask))
	case hasContent && n.Type != File:
		return fmt.Errorf("%q is a %s with contents", n.Name, n.Type)
	case hasSubtree != (n.Type == Dir) || hasSubtree && n.Subtree.IsZero():
		return fmt.Errorf("%q is a %s and a subtree does not match that", n.Name, n.Type)
	case strings.IndexByte(n.LinkTarget, 0) >= 0:
		return fmt.Errorf("%q points to a name with a NUL byte", n.Name)
	}
	return nil
}

// unquoteName undoes appendQuotedName.
func unquoteName(s string) (string, error) {
	if strings.IndexByte(s, '\\') < 0 && strings.IndexByte(s, '"') < 0 && strings.IndexByte(s, '\n') < 0 {
		return s, nil
	}
	name, err := strconv.Unquote(`"` + s + `"`)
	if err != nil {
		return "", errors.New("a name with a bad escape")
	}
	return name, nil
}

func (d *decoder) nodeType() (NodeType, error) {
	s, err := d.str()
	switch t := NodeType(s); {
	case err != nil:
		return "", err
	case t == File || t == Dir || t == Symlink || t == Device || t == CharDevice || t == FIFO || t == Socket:
		return t, nil
	}
	return "", fmt.Errorf("unknown type %.40q", s)
}

func (d *decoder) str() (string, error) {
	b, err := d.Bytes()
	return string(b), err
}

// sameStr reads a string into *last, without a copy if it is there already.
func (d *decoder) sameStr(last *string) error {
	b, err := d.Bytes()
	if err == nil && string(b) != *last {
		*last = string(b)
	}
	return err
}

// time reads a time; near is one that has likely the same zone.
func (d *decoder) time(near time.Time) (time.Time, error) {
	b, err := d.Bytes()
	if err != nil {
		return time.Time{}, err
	}
	var t time.Time
	if err := t.UnmarshalText(b); err != nil {
		return time.Time{}, errors.New("not a time")
	}
	// Each parse of a numeric zone makes a new Location; share one.
	if _, a := t.Zone(); !near.IsZero() {
		if _, b := near.Zone(); a == b {
			t = t.In(near.Location())
		}
	}
	return t, nil
}

func (d *decoder) id() (ID, error) {
	b, err := d.Bytes()
	if err != nil {
		return ID{}, err
	}
	var id ID
	err = id.UnmarshalText(b)
	return id, err
}

// ids reads a list of IDs; null gives nil and false.
func (d *decoder) ids() ([]ID, bool, error) {
	if d.Null() {
		return nil, false, nil
	}
	ids := []ID{}
	err := d.Array(func() error {
		id, err := d.id()
		ids = append(ids, id)
		return err
	})
	return ids, true, err
}

func (d *decoder) xattrs() ([]Xattr, error) {
	if d.Null() {
		return nil, nil
	}
	var xs []Xattr
	err := d.Array(func() error {
		var x Xattr
		err := d.Object(func(key []byte) (err error) {
			switch string(key) {
			case "name":
				x.Name, err = d.str()
			case "value":
				x.Value, err = d.Base64()
			default:
				err = d.Skip()
			}
			return err
		})
		xs = append(xs, x)
		return err
	})
	return xs, err
}
