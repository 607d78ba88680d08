// Package backendtest is the conformance suite of [backend.Backend]. Every
// store runs it against the real thing that it stores to.
package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
)

// Run tests the store that open returns. Each call of open must give a handle
// on the same, initially empty store: what one handle put, the next must see.
// Run closes every handle that it opens.
func Run(t *testing.T, open func(t *testing.T) backend.Backend) {
	handle := func(t *testing.T) backend.Backend {
		t.Helper()
		be := open(t)
		t.Cleanup(func() {
			if err := be.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		return be
	}
	rng := rand.New(rand.NewPCG(1, 2))
	blob := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	ctx := t.Context()

	for kind := backend.Configs; kind <= backend.Packs; kind++ {
		t.Run(kind.String(), func(t *testing.T) {
			be := handle(t)
			sizes := []int{0, 1, 4096, 1<<20 + 7}
			if kind == backend.Configs {
				sizes = sizes[2:3]
			}
			want := map[backend.Key][]byte{}
			for _, n := range sizes {
				data := blob(n)
				k := keyOf(kind, data)
				if _, err := be.Get(ctx, k, 0, -1); !errors.Is(err, fs.ErrNotExist) {
					t.Fatalf("Get of a missing %s: %v, want fs.ErrNotExist", k, err)
				}
				if err := be.Delete(ctx, k); !errors.Is(err, fs.ErrNotExist) {
					t.Fatalf("Delete of a missing %s: %v, want fs.ErrNotExist", k, err)
				}
				scratch := bytes.Clone(data)
				if err := be.Put(ctx, k, scratch); err != nil {
					t.Fatalf("Put %s: %v", k, err)
				}
				clear(scratch) // Put must not keep its argument
				want[k] = data
			}
			again := handle(t)
			for k, data := range want {
				checkRanges(t, again, k, data)
			}
			checkList(t, again, kind, want)
			for k, data := range want {
				if err := again.Put(ctx, k, data); err != nil {
					t.Errorf("second Put of %s: %v", k, err)
				}
				replaced := append(bytes.Clone(data), 'x')
				if err := again.Put(ctx, k, replaced); err != nil {
					t.Errorf("replacing Put of %s: %v", k, err)
				}
				checkRanges(t, be, k, replaced)
			}
			for k := range want {
				if err := be.Delete(ctx, k); err != nil {
					t.Errorf("Delete %s: %v", k, err)
				}
				if _, err := again.Get(ctx, k, 0, -1); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("Get of a deleted %s: %v, want fs.ErrNotExist", k, err)
				}
			}
			checkList(t, be, kind, nil)
		})
	}

	t.Run("concurrent", func(t *testing.T) {
		be := handle(t)
		same := blob(100_000)
		sameKey := keyOf(backend.Packs, same)
		own := make([][]byte, 8)
		for g := range own {
			own[g] = blob(10_000 + g)
		}
		var wg sync.WaitGroup
		for _, data := range own {
			wg.Go(func() {
				k := keyOf(backend.Packs, data)
				for range 5 {
					if err := errors.Join(be.Put(ctx, k, data), be.Put(ctx, sameKey, same)); err != nil {
						t.Error(err)
						return
					}
					for _, c := range []struct {
						k backend.Key
						b []byte
					}{{k, data}, {sameKey, same}} {
						got, err := be.Get(ctx, c.k, 0, -1)
						if err != nil || !bytes.Equal(got, c.b) {
							t.Errorf("Get %s while others write: %d bytes, %v", c.k, len(got), err)
						}
					}
				}
				if err := be.Delete(ctx, k); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		checkList(t, be, backend.Packs, map[backend.Key][]byte{sameKey: same})
		if err := be.Delete(ctx, sameKey); err != nil {
			t.Error(err)
		}
	})

	t.Run("many", func(t *testing.T) {
		be := handle(t)
		want := map[backend.Key][]byte{}
		for i := range 300 {
			data := fmt.Appendf(nil, "object %d", i)
			k := keyOf(backend.Packs, data)
			if err := be.Put(ctx, k, data); err != nil {
				t.Fatal(err)
			}
			want[k] = data
		}
		checkList(t, be, backend.Packs, want)
		for range be.List(ctx, backend.Packs) {
			break // an abandoned listing must not leak or panic
		}
		for k := range want {
			if err := be.Delete(ctx, k); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("cancelled", func(t *testing.T) {
		be := handle(t)
		data := blob(1000)
		k := keyOf(backend.Packs, data)
		gone, cancel := context.WithCancel(ctx)
		cancel()
		if err := be.Put(gone, k, data); !errors.Is(err, context.Canceled) {
			t.Errorf("Put with a cancelled context: %v", err)
		}
		if _, err := be.Get(ctx, k, 0, -1); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after a cancelled Put: %v, want fs.ErrNotExist", err)
		}
		if _, err := be.Get(gone, k, 0, -1); !errors.Is(err, context.Canceled) {
			t.Errorf("Get with a cancelled context: %v", err)
		}
		for _, err := range be.List(gone, backend.Packs) {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("List with a cancelled context: %v", err)
			}
		}
		if err := be.Delete(gone, k); !errors.Is(err, context.Canceled) {
			t.Errorf("Delete with a cancelled context: %v", err)
		}
	})
}

func keyOf(kind backend.Kind, data []byte) backend.Key {
	if kind == backend.Configs {
		return backend.ConfigKey
	}
	return backend.Key{Kind: kind, ID: backup.Hash(data)}
}

func checkRanges(t *testing.T, be backend.Backend, k backend.Key, data []byte) {
	t.Helper()
	size := int64(len(data))
	for _, r := range [][2]int64{{0, -1}, {0, size}, {size / 2, -1}, {size / 3, size / 3}, {size, 0}, {size, -1}} {
		want := data[r[0]:]
		if r[1] >= 0 {
			want = want[:r[1]]
		}
		got, err := be.Get(t.Context(), k, r[0], r[1])
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("Get(%s, %d, %d) = %d bytes, %v; want %d bytes", k, r[0], r[1], len(got), err, len(want))
		}
	}
	for _, r := range [][2]int64{{0, size + 1}, {size, 1}, {size + 1, 0}, {size + 1, -1}} {
		if got, err := be.Get(t.Context(), k, r[0], r[1]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("Get(%s, %d, %d) of %d bytes = %d bytes, %v; want io.ErrUnexpectedEOF", k, r[0], r[1], size, len(got), err)
		}
	}
}

func checkList(t *testing.T, be backend.Backend, kind backend.Kind, want map[backend.Key][]byte) {
	t.Helper()
	seen := map[backend.Key]bool{}
	for info, err := range be.List(t.Context(), kind) {
		if err != nil {
			t.Errorf("List %s: %v", kind, err)
			return
		}
		data, ok := want[info.Key]
		switch {
		case !ok:
			t.Errorf("List %s yields %s, which was never put or is deleted", kind, info.Key)
		case seen[info.Key]:
			t.Errorf("List %s yields %s twice", kind, info.Key)
		case info.Size != int64(len(data)):
			t.Errorf("List %s: %s has %d bytes, want %d", kind, info.Key, info.Size, len(data))
		}
		seen[info.Key] = true
	}
	if len(seen) != len(want) {
		t.Errorf("List %s yields %d objects, want %d", kind, len(seen), len(want))
	}
}
