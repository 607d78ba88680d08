package jsonscan

import (
	"encoding/json"
	"strings"
	"testing"
)

// valid reports whether the scanner takes data as one value.
func valid(data []byte) bool {
	d := New(data)
	return d.Skip() == nil && d.End() == nil
}

var cases = []string{
	`{}`, `[]`, ` [1, -2.5e+7, 0.1E-3, "x", true, false, null, {"a":[{}]}] `, `"\u00e9\ud83d\ude00\ud83d\n\/"`, `0`, `-0`,
	``, `{`, `[1,]`, `{"a"}`, `{"a":1,}`, `01`, `1.`, `.5`, `1e`, `+1`, `tru`, `nulll`, `"`, `"\x"`, `"\u12"`, "\"\n\"", `[] []`, `{a:1}`, `'a'`, "\x00", `-`, `"\ud800\u"`,
}

func TestSkipAgreesWithEncodingJSON(t *testing.T) {
	for _, c := range cases {
		if got, want := valid([]byte(c)), json.Valid([]byte(c)); got != want {
			t.Errorf("%q: %v, encoding/json says %v", c, got, want)
		}
	}
	if valid([]byte(strings.Repeat("[", 1000) + strings.Repeat("]", 1000))) {
		t.Error("nesting is not bounded")
	}
}

func TestBytesAgreesWithEncodingJSON(t *testing.T) {
	for _, c := range []string{`"plain"`, `"\u00e9"`, `"é"`, `"\ud83d\ude00"`, `"\ud83d"`, `"\ud83d\u0041"`, `"\ude00"`, "\"bad \xff utf-8\"", `"\"\\\/\b\f\n\r\t"`} {
		var want string
		if err := json.Unmarshal([]byte(c), &want); err != nil {
			t.Fatal(err)
		}
		if got, err := New([]byte(c)).Bytes(); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", c, got, err, want)
		}
	}
}

func TestUint(t *testing.T) {
	for in, want := range map[string]bool{"0": true, "4294967295": true, "4294967296": false, "-1": false, "1.0": true, "": false, "00": false, "9999999999999999999999": false} {
		v, err := New([]byte(in)).Uint(32)
		if (err == nil) != want {
			t.Errorf("%q: %d, %v", in, v, err)
		}
	}
}

func FuzzSkip(f *testing.F) {
	for _, c := range cases {
		f.Add([]byte(c))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if got := valid(data); got && !json.Valid(data) || !got && json.Valid(data) && !deep(data) {
			t.Errorf("%q: %v", data, got)
		}
	})
}

// deep reports whether data may be nested more deeply than Skip allows.
func deep(data []byte) bool {
	return strings.Count(string(data), "[")+strings.Count(string(data), "{") > maxDepth
}
