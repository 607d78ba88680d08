package crypt

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func TestSealOpen(t *testing.T) {
	key := NewKey()
	for _, n := range []int{0, 1, 15, 16, 17, 4096, 1 << 20} {
		plain := bytes.Repeat([]byte{'x'}, n)
		sealed := key.Seal([]byte("prefix"), plain)
		if string(sealed[:6]) != "prefix" || len(sealed) != 6+n+Overhead {
			t.Fatalf("%d bytes sealed to %d", n, len(sealed))
		}
		got, err := key.Open([]byte("out"), sealed[6:])
		if err != nil || string(got[:3]) != "out" || !bytes.Equal(got[3:], plain) {
			t.Fatalf("Open of %d bytes: %v", n, err)
		}
		inPlace := bytes.Clone(sealed[6:])
		got, err = key.OpenInPlace(inPlace)
		if err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("Open in place of %d bytes: %v", n, err)
		}
		if _, err := NewKey().Open(nil, sealed[6:]); !errors.Is(err, ErrAuth) {
			t.Errorf("another key: %v", err)
		}
	}
	if a, b := key.Seal(nil, []byte("same")), key.Seal(nil, []byte("same")); bytes.Equal(a, b) {
		t.Error("the same plaintext sealed twice gives the same bytes")
	}
}

func TestOpenRefusesEveryFlippedBit(t *testing.T) {
	key := NewKey()
	sealed := key.Seal(nil, []byte("a secret"))
	for i := range 8 * len(sealed) {
		bad := bytes.Clone(sealed)
		bad[i/8] ^= 1 << (i % 8)
		if got, err := key.Open(nil, bad); !errors.Is(err, ErrAuth) || len(got) > 0 {
			t.Errorf("bit %d flipped: %q, %v", i, got, err)
		}
	}
	for n := range len(sealed) {
		if _, err := key.Open(nil, sealed[:n]); !errors.Is(err, ErrAuth) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

// The vectors of appendix B of the Poly1305-AES paper.
func TestMACVectors(t *testing.T) {
	for i, v := range []struct{ msg, k, r, nonce, tag string }{
		{"f3f6", "ec074c835580741701425b623235add6", "851fc40c3467ac0be05cc20404f3f700", "fb447350c4e868c52ac3275cf9d4327e", "f4c633c3044fc145f84f335cb81953de"},
		{"", "75deaa25c09f208e1dc4ce6b5cad3fbf", "a0f3080000f46400d0c7e9076c834403", "61ee09218d29b0aaed7e154a2c5509cc", "dd3fab2251f11ac759f0887129cc2ee7"},
		{"663cea190ffb83d89593f3f476b6bc24d7e679107ea26adb8caf6652d0656136", "6acb5f61a7176dd320c5c1eb2edcdc74", "48443d0bb0d21109c89a100b5ce2c208", "ae212a55399729595dea458bc621ff0e", "0ee1c16bb73f0f4fd19881753c01cdbe"},
	} {
		raw := make([]byte, encryptSize)
		raw = append(raw, unhex(t, v.k)...)
		raw = append(raw, unhex(t, v.r)...)
		tag := keyFromBytes(raw).mac(unhex(t, v.nonce), unhex(t, v.msg))
		if got := hex.EncodeToString(tag[:]); got != v.tag {
			t.Errorf("vector %d: %s, want %s", i, got, v.tag)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKeyJSON(t *testing.T) {
	key := NewKey()
	b, err := json.Marshal(key)
	if err != nil {
		t.Fatal(err)
	}
	var back Key
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if got, err := back.Open(nil, key.Seal(nil, []byte("x"))); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{`{}`, `{"mac":{"k":"AAAA","r":"AAAA"},"encrypt":"AAAA"}`, `[`, `{"encrypt":"c2VjcmV0!"}`} {
		err := new(Key).UnmarshalJSON([]byte(bad))
		if err == nil || strings.Contains(err.Error(), "c2Vj") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestDeriveRefusesHostileParameters(t *testing.T) {
	for _, p := range []Params{{}, {N: 3, R: 8, P: 1}, {N: 1 << 15, R: 0, P: 1}, {N: 1 << 15, R: 8, P: -1}, {N: 1 << 30, R: 8, P: 1}, {N: 1 << 15, R: 1 << 20, P: 1}, {N: 1 << 15, R: 8, P: 1 << 30}, {N: -2, R: 8, P: 1}} {
		if _, err := Derive(p, []byte("salt"), "pw"); err == nil {
			t.Errorf("%+v accepted", p)
		}
	}
	if _, err := Derive(Params{N: 2, R: 1, P: 1}, nil, "pw"); err == nil {
		t.Error("empty salt accepted")
	}
}

func TestScale(t *testing.T) {
	const target = 500 * time.Millisecond
	for took, want := range map[time.Duration]int{
		10 * time.Second:       1, // a slow device: never below
		300 * time.Millisecond: 1, // twice would be too long
		200 * time.Millisecond: 2,
		100 * time.Millisecond: 5,
		time.Millisecond:       maxOwnP, // bounded for slower devices
		0:                      maxOwnP,
	} {
		if got := scale(took, target); got.P != want || got.N != MinParams.N || got.R != MinParams.R {
			t.Errorf("%v at the minimum: %+v, want P=%d", took, got, want)
		}
	}
	if p := Calibrate(time.Nanosecond); p != MinParams {
		t.Errorf("Calibrate: %+v", p)
	}
}

func FuzzOpen(f *testing.F) {
	key := NewKey()
	f.Add(key.Seal(nil, []byte("x")))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		if plain, err := key.Open(nil, data); err != nil && len(plain) > 0 {
			t.Error("plaintext in spite of an error")
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	benchmark(b, func(key *Key, buf, plain []byte) { key.Seal(buf[:0], plain) })
}

func BenchmarkOpen(b *testing.B) {
	var sealed []byte
	benchmark(b, func(key *Key, buf, plain []byte) {
		if sealed == nil {
			sealed = key.Seal(nil, plain)
		}
		if _, err := key.Open(buf[:0], sealed); err != nil {
			b.Fatal(err)
		}
	})
}

func benchmark(b *testing.B, f func(key *Key, buf, plain []byte)) {
	plain := make([]byte, 1<<20)
	for i := range plain {
		plain[i] = byte(rand.Uint32())
	}
	key, buf := NewKey(), make([]byte, 0, 2<<20)
	b.SetBytes(int64(len(plain)))
	b.ReportAllocs()
	for b.Loop() {
		f(key, buf, plain)
	}
}
