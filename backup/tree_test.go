package backup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// jsonNode is a Node as encoding/json would be told to write it: the oracle
// of the encoder.
type jsonNode struct {
	Name          string          `json:"name"`
	Type          NodeType        `json:"type"`
	Mode          fs.FileMode     `json:"mode,omitempty"`
	ModTime       time.Time       `json:"mtime"`
	AccessTime    time.Time       `json:"atime"`
	ChangeTime    time.Time       `json:"ctime"`
	UID           uint32          `json:"uid"`
	GID           uint32          `json:"gid"`
	User          string          `json:"user,omitempty"`
	Group         string          `json:"group,omitempty"`
	Inode         uint64          `json:"inode,omitempty"`
	DeviceID      uint64          `json:"device_id,omitempty"`
	Size          uint64          `json:"size,omitempty"`
	Links         uint64          `json:"links,omitempty"`
	LinkTarget    string          `json:"linktarget,omitempty"`
	LinkTargetRaw []byte          `json:"linktarget_raw,omitempty"`
	Xattrs        []jsonXattr     `json:"extended_attributes,omitempty"`
	Generic       json.RawMessage `json:"generic_attributes,omitempty"`
	Device        uint64          `json:"device,omitempty"`
	Content       []ID            `json:"content"`
	Subtree       *ID             `json:"subtree,omitempty"`
	Error         string          `json:"error,omitempty"`
}

type jsonXattr struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

func viaReflection(t *testing.T, tree *Tree) []byte {
	nodes := []jsonNode{}
	for _, n := range tree.Nodes {
		q := strconv.Quote(n.Name)
		j := jsonNode{
			q[1 : len(q)-1], n.Type, n.Mode, n.ModTime, n.AccessTime, n.ChangeTime, n.UID, n.GID, n.User, n.Group,
			n.Inode, n.DeviceID, n.Size, n.Links, n.LinkTarget, nil, nil, n.Generic, n.Device, n.Content, nil, n.Error,
		}
		if !utf8.ValidString(n.LinkTarget) {
			j.LinkTargetRaw = []byte(n.LinkTarget)
		}
		for _, x := range n.Xattrs {
			j.Xattrs = append(j.Xattrs, jsonXattr(x))
		}
		if n.Type == File && n.Content == nil {
			j.Content = []ID{}
		}
		if !n.Subtree.IsZero() {
			j.Subtree = &n.Subtree
		}
		nodes = append(nodes, j)
	}
	out, err := json.Marshal(map[string]any{"nodes": nodes})
	if err != nil {
		t.Fatal(err)
	}
	return append(out, '\n')
}

var (
	testZone  = time.FixedZone("", -7*3600)
	testTime  = time.Date(2026, 11, 22, 3, 4, 5, 678_900_000, testZone)
	wildNames = []string{
		"plain", "with space", "quote\"", "back\\slash", "new\nline", "tab\t", "bell\a", "del\x7f", "\xff\xfe not utf-8",
		"ü", "<html>&", "\u2028", "日本語", "\U0001f600", "\u00a0", "\x00ctl"[1:], "'", "`", "$(rm)", "-rf", " ", "\ufffd", "e\u0301",
	}
)

// randomTree makes a valid tree with fields of every kind.
func randomTree(rng *rand.Rand) *Tree {
	names := map[string]bool{}
	for range rng.IntN(8) {
		names[wildNames[rng.IntN(len(wildNames))]] = true
		names[fmt.Sprintf("f%d", rng.IntN(1000))] = true
	}
	t := &Tree{}
	for _, name := range sortedKeys(names) {
		n := Node{
			Name: name, Mode: fs.FileMode(rng.Uint32()) & ModeMask, UID: rng.Uint32(), GID: uint32(rng.IntN(3)),
			ModTime: testTime.Add(time.Duration(rng.Int64N(1e18))), AccessTime: testTime, ChangeTime: testTime.UTC(),
			Inode: rng.Uint64N(5) * rng.Uint64(), Links: rng.Uint64N(3),
		}
		if rng.IntN(2) == 0 {
			n.User, n.Group = "us<er", "grüp"
		}
		for range rng.IntN(3) {
			n.Xattrs = append(n.Xattrs, Xattr{Name: "user.a\"b", Value: []byte{0, 1, 255}[:rng.IntN(4)]})
		}
		switch n.Type = []NodeType{File, Dir, Symlink, Device, CharDevice, FIFO, Socket}[rng.IntN(7)]; n.Type {
		case File:
			n.Content = []ID{}
			n.Size = rng.Uint64N(1 << 40)
			n.DeviceID = rng.Uint64N(3)
			for i := range rng.IntN(3) {
				n.Content = append(n.Content, Hash([]byte{byte(i)}))
			}
		case Dir:
			n.Subtree = Hash([]byte(name))
		case Symlink:
			n.LinkTarget = "/to/\b\f" + wildNames[rng.IntN(len(wildNames))]
		case Device, CharDevice:
			n.Device = rng.Uint64()
		}
		if rng.IntN(5) == 0 {
			n.Error = "read error <5>"
			n.Generic = []byte(`{"windows.file_attributes":[1,2.5e3,null,true]}`)
		}
		t.Nodes = append(t.Nodes, n)
	}
	return t
}

func sortedKeys(m map[string]bool) []string {
	var keys []string
	for k := range m {
		i := 0
		for i < len(keys) && keys[i] < k {
			i++
		}
		keys = append(keys[:i], append([]string{k}, keys[i:]...)...)
	}
	return keys
}

func TestTreeEncodingEqualsEncodingJSON(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	for range 2000 {
		tree := randomTree(rng)
		got, err := tree.AppendJSON(nil)
		if err != nil {
			t.Fatal(err)
		}
		if want := viaReflection(t, tree); !bytes.Equal(got, want) {
			t.Fatalf("got  %s\nwant %s", got, want)
		}
		back, err := DecodeTree(got)
		if err != nil {
			t.Fatalf("%v in %s", err, got)
		}
		again, err := back.AppendJSON(nil)
		if err != nil || !bytes.Equal(again, got) {
			t.Fatalf("decoded and encoded again (%v):\n%s\nwant\n%s", err, again, got)
		}
	}
}

func TestTreeTimes(t *testing.T) {
	for year, want := range map[int]string{
		1969: "1969-01-02T03:04:05.000000006Z", 2026: "2026-01-02T03:04:05.000000006Z",
		-5: "0000-01-02T03:04:05.000000006Z", 12026: "9999-01-02T03:04:05.000000006Z",
	} {
		n := Node{Name: "a", Type: FIFO, ModTime: time.Date(year, 1, 2, 3, 4, 5, 6, time.UTC)}
		got, err := (&Tree{Nodes: []Node{n}}).AppendJSON(nil)
		if err != nil || !strings.Contains(string(got), `"mtime":"`+want+`"`) {
			t.Errorf("year %d: %s, %v; want %s", year, got, err, want)
		}
	}
}

func TestTreeEncodingRefuses(t *testing.T) {
	for name, names := range map[string][]string{
		"unsorted": {"b", "a"}, "double": {"a", "a"}, "empty": {""}, "dot": {"."}, "dots": {".."}, "slash": {"a/b"}, "NUL": {"a\x00"},
		"long": {strings.Repeat("x", 256)},
	} {
		tree := &Tree{}
		for _, n := range names {
			tree.Nodes = append(tree.Nodes, Node{Name: n, Type: FIFO})
		}
		if _, err := tree.AppendJSON(nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestDecodeTreeRefuses(t *testing.T) {
	id := Hash(nil).String()
	node := func(members string) string { return `{"nodes":[{` + members + `}]}` }
	for name, in := range map[string]string{
		"nothing":              ``,
		"no nodes":             `{}`,
		"array":                `[]`,
		"trailing bytes":       `{"nodes":[]} x`,
		"two lists":            `{"nodes":[],"nodes":[]}`,
		"cut":                  `{"nodes":[{"name":"a"`,
		"no name":              node(`"type":"fifo"`),
		"no type":              node(`"name":"a"`),
		"unknown type":         node(`"name":"a","type":"door"`),
		"slash":                node(`"name":"a/b","type":"fifo"`),
		"parent":               node(`"name":"..","type":"fifo"`),
		"escaped parent":       node(`"name":"\\x2e\\x2e","type":"fifo"`),
		"escaped slash":        node(`"name":"\\x2f","type":"fifo"`),
		"NUL":                  node(`"name":"\\x00","type":"fifo"`),
		"bad escape":           node(`"name":"\\q","type":"fifo"`),
		"long name":            node(`"name":"` + strings.Repeat("x", 256) + `","type":"fifo"`),
		"unsorted":             `{"nodes":[{"name":"b","type":"fifo"},{"name":"a","type":"fifo"}]}`,
		"double":               `{"nodes":[{"name":"a","type":"fifo"},{"name":"a","type":"fifo"}]}`,
		"mode bits":            node(`"name":"a","type":"fifo","mode":4294967295`),
		"mode too big":         node(`"name":"a","type":"fifo","mode":4294967296`),
		"negative size":        node(`"name":"a","type":"file","size":-1`),
		"leading zero":         node(`"name":"a","type":"file","size":01`),
		"dir without subtree":  node(`"name":"a","type":"dir"`),
		"file with subtree":    node(`"name":"a","type":"file","subtree":"` + id + `"`),
		"zero subtree":         node(`"name":"a","type":"dir","subtree":"` + strings.Repeat("0", 64) + `"`),
		"fifo with content":    node(`"name":"a","type":"fifo","content":[]`),
		"short id":             node(`"name":"a","type":"file","content":["abcd"]`),
		"upper-case id":        node(`"name":"a","type":"file","content":["` + strings.ToUpper(id) + `"]`),
		"NUL in link":          node(`"name":"a","type":"symlink","linktarget":"\u0000"`),
		"bad time":             node(`"name":"a","type":"fifo","mtime":"yesterday"`),
		"bad base64":           node(`"name":"a","type":"symlink","linktarget_raw":"!"`),
		"deep":                 node(`"x":` + strings.Repeat("[", 100_000)),
		"control character":    node("\"name\":\"a\n\",\"type\":\"fifo\""),
		"unterminated":         node(`"name":"a`),
		"number in wrong form": node(`"x":1.,"name":"a","type":"fifo"`),
	} {
		if tree, err := DecodeTree([]byte(in)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, %v; want ErrMalformed", name, tree, err)
		}
	}
}

func TestDecodeTreeSkipsUnknownMembers(t *testing.T) {
	in := `{"future":{"a":[1,-2.5e+7,"x",true,false,null,{}]},"nodes":[ {"name":"a", "new":[[]], "type":"fifo"} ], "z":0}`
	tree, err := DecodeTree([]byte(in))
	if err != nil || len(tree.Nodes) != 1 || tree.Nodes[0].Name != "a" {
		t.Errorf("%+v, %v", tree, err)
	}
}

func TestEachNodeStops(t *testing.T) {
	stop := errors.New("enough")
	n := 0
	in := `{"nodes":[{"name":"a","type":"fifo"},{"name":"b","type":"fifo"},{"name":"c","type":"door"}]}`
	err := EachNode([]byte(in), func(node *Node) error {
		if n++; node.Name == "b" {
			return stop
		}
		return nil
	})
	if err != stop || n != 2 {
		t.Errorf("%d nodes, %v", n, err)
	}
	if err := EachNode([]byte(in), func(*Node) error { return nil }); !errors.Is(err, ErrMalformed) {
		t.Errorf("%v", err)
	}
}

func FuzzDecodeTree(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 8 {
		b, err := randomTree(rng).AppendJSON(nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"nodes":null}`))
	f.Add([]byte(`{"nodes":[{"name":"\ud83d\ude00\ud83d","type":"symlink","linktarget":"\/\u00e9\b"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		tree, err := DecodeTree(data)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%v does not match ErrMalformed", err)
			}
			return
		}
		if !json.Valid(data) {
			t.Errorf("accepted what is not JSON: %q", data)
		}
		for i := range tree.Nodes {
			if err := CheckName(tree.Nodes[i].Name); err != nil {
				t.Error(err)
			}
		}
		once, err := tree.AppendJSON(nil)
		if err != nil {
			t.Fatalf("decoded but can't be encoded: %v", err)
		}
		back, err := DecodeTree(once)
		if err != nil {
			t.Fatalf("%v in our own encoding %s", err, once)
		}
		if twice, err := back.AppendJSON(nil); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("not stable (%v):\n%s\n%s", err, once, twice)
		}
	})
}

func TestIDText(t *testing.T) {
	id := Hash([]byte("x"))
	var back ID
	b, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &back); err != nil || back != id {
		t.Errorf("%v, %v", back, err)
	}
	for _, bad := range []string{"", "00", strings.Repeat("g", 64), strings.Repeat("A", 64), strings.Repeat("0", 65)} {
		if _, err := ParseID(bad); err == nil {
			t.Errorf("ParseID(%q) succeeds", bad)
		}
	}
}

func TestSnapshotEncoding(t *testing.T) {
	id := Hash(nil)
	sn := Snapshot{
		Time: testTime, Parent: &id, Tree: &id, Paths: []string{"/service-config/a<b"}, Hostname: "pi", Username: "root",
		Tags: []string{"volume:a", "x"}, ProgramVersion: "ide49-backup 0.1", Summary: &Summary{BackupStart: testTime, BackupEnd: testTime, FilesNew: 3},
	}
	b, err := json.Marshal(sn)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"time":"2026-11-22T03:04:05.6789-07:00","parent":"` + id.String() + `","tree":"` + id.String() +
		`","paths":["/service-config/a\u003cb"],"hostname":"pi","username":"root","tags":["volume:a","x"],` +
		`"program_version":"ide49-backup 0.1","summary":{"backup_start":"2026-11-22T03:04:05.6789-07:00",`
	if !strings.HasPrefix(string(b), want) {
		t.Errorf("%s\nwant prefix\n%s", b, want)
	}
	var back Snapshot
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	again, err := json.Marshal(back)
	if err != nil || !bytes.Equal(again, b) || !reflect.DeepEqual(back.Tags, sn.Tags) {
		t.Errorf("%s, %v", again, err)
	}
	if back.Volume() != "a" || !back.Complete() || (&Snapshot{Paths: []string{"/a", "/b"}}).Volume() != "/a,/b" {
		t.Errorf("volume %q, complete %v", back.Volume(), back.Complete())
	}
}

func BenchmarkTreeEncode(b *testing.B) {
	tree := benchTree()
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		buf, _ = tree.AppendJSON(buf[:0])
	}
	b.SetBytes(int64(len(buf)))
}

func BenchmarkTreeDecode(b *testing.B) {
	data, err := benchTree().AppendJSON(nil)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeTree(data); err != nil {
			b.Fatal(err)
		}
	}
}

func benchTree() *Tree {
	t := &Tree{}
	for i := range 100 {
		t.Nodes = append(t.Nodes, Node{
			Name: fmt.Sprintf("file%04d.go", i), Type: File, Mode: 0o644, ModTime: testTime, AccessTime: testTime, ChangeTime: testTime,
			UID: 1000, GID: 100, User: "iot", Group: "users", Inode: uint64(1_000_000 + i), Size: 4321, Links: 1, Content: []ID{Hash([]byte{byte(i)})},
		})
	}
	return t
}
