package repo_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/faulty"
	"github.com/iot49/ide49-backup/backup/backend/mem"
	"github.com/iot49/ide49-backup/backup/repo"
)

// opens returns which of the passwords open the repository.
func opens(t *testing.T, be backend.Backend, passwords ...string) (good []string) {
	t.Helper()
	for _, pw := range passwords {
		_, err := repo.Open(t.Context(), be, pw, repo.Options{})
		if err != nil && !errors.Is(err, repo.ErrPassword) {
			t.Errorf("password %q: %v", pw, err)
		}
		if err == nil {
			good = append(good, pw)
		}
	}
	return good
}

func TestKeys(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	r := newRepo(t, be, repo.Options{})
	second, err := r.AddKey(ctx, "two", cheap, "ada", "laptop")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := r.Keys(ctx)
	if err != nil || len(keys) != 2 {
		t.Fatalf("%v, %v", keys, err)
	}
	if k := keys[0]; !k.Current || k.ID != r.KeyID() || k.Hostname != repo.Hostname(t) || k.Created.IsZero() || k.KDF != cheap {
		t.Errorf("first key: %+v", k)
	}
	if k := keys[1]; k.Current || k.ID != second || k.Username != "ada" || k.Hostname != "laptop" {
		t.Errorf("second key: %+v", k)
	}
	for prefix, want := range map[string]error{second.Short(): nil, "": repo.ErrNoKey, "x": repo.ErrNoKey} {
		if _, err := repo.FindKey(keys, prefix); !errors.Is(err, want) {
			t.Errorf("FindKey %q: %v", prefix, err)
		}
	}
	if _, err := r.AddKey(ctx, "", cheap, "", ""); !errors.Is(err, repo.ErrNoPassword) {
		t.Errorf("an empty password: %v", err)
	}
	if err := r.RemoveKey(ctx, r.KeyID()); !errors.Is(err, repo.ErrKeyInUse) {
		t.Errorf("removing the key in use: %v", err)
	}
	if err := r.RemoveKey(ctx, backup.Hash(nil)); !errors.Is(err, repo.ErrNoKey) {
		t.Errorf("removing no key: %v", err)
	}
	if err := r.RemoveKey(ctx, second); err != nil {
		t.Error(err)
	}
	if err := r.RemoveKey(ctx, r.KeyID()); !errors.Is(err, repo.ErrLastKey) {
		t.Errorf("removing the last key: %v", err)
	}
	if got := opens(t, be, "pw", "two"); !slices.Equal(got, []string{"pw"}) {
		t.Errorf("%q open it", got)
	}
	id, err := r.ChangePassword(ctx, "three", cheap)
	if err != nil || id != r.KeyID() {
		t.Errorf("ChangePassword: %v", err)
	}
	if got := opens(t, be, "pw", "two", "three"); !slices.Equal(got, []string{"three"}) {
		t.Errorf("%q open it", got)
	}
	if _, err := r.ChangePassword(ctx, "four", cheap); err != nil {
		t.Errorf("a second change: %v", err)
	}
	if n := count(t, be, backend.Locks); n != 0 {
		t.Errorf("%d locks are left", n)
	}
	for err == nil {
		_, err = r.AddKey(ctx, "more", cheap, "", "")
	}
	if n := count(t, be, backend.Keys); !errors.Is(err, repo.ErrManyKeys) || n != 32 {
		t.Errorf("%d keys, then %v", n, err)
	}
}

// Two who opened with different keys each want to remove the other's.
func TestRemoveEachOther(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	a := newRepo(t, be, repo.Options{})
	second, err := a.AddKey(ctx, "two", cheap, "", "")
	if err != nil {
		t.Fatal(err)
	}
	b, err := repo.Open(ctx, be, "two", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.RemoveKey(ctx, second); err != nil {
		t.Error(err)
	}
	if err := b.RemoveKey(ctx, a.KeyID()); !errors.Is(err, repo.ErrLastKey) {
		t.Errorf("%v", err)
	}
	if got := opens(t, be, "pw"); len(got) != 1 {
		t.Error("no key is left")
	}
	// A third key does not help: it may be of any age and damaged.
	if _, err := a.AddKey(ctx, "three", cheap, "", ""); err != nil {
		t.Fatal(err)
	}
	if err := b.RemoveKey(ctx, a.KeyID()); !errors.Is(err, repo.ErrLastKey) {
		t.Errorf("%v", err)
	}
}

// A damaged key is listed as such, and can be removed; a key that others hold
// is kept by their lock.
func TestDamagedKey(t *testing.T) {
	ctx := t.Context()
	be := mem.New()
	r := newRepo(t, be, repo.Options{})
	for i, text := range []string{"rubbish", `{"kdf":"argon2"}`, ""} {
		if err := be.Put(ctx, backend.Key{Kind: backend.Keys, ID: backup.Hash([]byte(text))}, []byte(text)); err != nil {
			t.Fatal(i, err)
		}
	}
	keys, err := r.Keys(ctx)
	if err != nil || len(keys) != 4 {
		t.Fatalf("%v, %v", keys, err)
	}
	for _, k := range keys {
		if k.Current == (k.Err != nil) {
			t.Errorf("%+v", k)
		}
		if k.Err != nil {
			if err := r.RemoveKey(ctx, k.ID); err != nil {
				t.Error(err)
			}
		}
	}
	if n := count(t, be, backend.Keys); n != 1 {
		t.Errorf("%d keys are left", n)
	}
}

// A crash, or a failure, at any write or removal: at every moment the old or
// the new password opens the repository, and doing it again succeeds.
func TestKeyChangesSurviveACrash(t *testing.T) {
	ctx := t.Context()
	for name, change := range map[string]func(r *repo.Repo) error{
		"passwd": func(r *repo.Repo) error { _, err := r.ChangePassword(ctx, "new", cheap); return err },
		"add":    func(r *repo.Repo) error { _, err := r.AddKey(ctx, "new", cheap, "", ""); return err },
		"remove": func(r *repo.Repo) error {
			keys, err := r.Keys(ctx)
			if err != nil {
				return err
			}
			for _, k := range keys {
				if k.Hostname == "other" {
					return r.RemoveKey(ctx, k.ID)
				}
			}
			return repo.ErrNoKey
		},
	} {
		t.Run(name, func(t *testing.T) {
			crashes := 0
			for n := 1; ; n++ {
				for _, applied := range []bool{false, true} {
					for _, once := range []bool{false, true} {
						inner := mem.New()
						if _, err := newRepo(t, inner, repo.Options{}).AddKey(ctx, "spare", cheap, "", "other"); err != nil {
							t.Fatal(err)
						}
						hit := false
						be := faulty.CrashAt(inner, n, applied)
						if once { // the store fails once, and goes on
							changes := 0
							be = faulty.New(inner, func(c faulty.Call) faulty.Fault {
								if c.Op != faulty.Put && c.Op != faulty.Delete {
									return faulty.Fault{}
								}
								if changes++; changes != n {
									return faulty.Fault{}
								}
								hit = true
								return faulty.Fault{Err: errors.New("share away"), Applied: applied}
							})
						}
						r, err := repo.Open(ctx, be, "pw", repo.Options{})
						if err != nil {
							t.Fatal(err)
						}
						err = change(r)
						where := fmt.Sprintf("at change %d, applied %v, once %v", n, applied, once)
						if err != nil && (strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), `"new"`)) {
							t.Errorf("%s: %v", where, err)
						}
						got := opens(t, inner, "pw", "spare", "new")
						if !slices.Contains(got, "pw") && !slices.Contains(got, "new") {
							t.Errorf("%s: only %q open the repository", where, got)
						}
						if name != "remove" && !slices.Contains(got, "spare") {
							t.Errorf("%s: another key is lost", where)
						}
						if !hit && !be.Crashed() {
							if err != nil {
								t.Errorf("%s: %v", where, err)
							}
							if want := map[string]string{"passwd": "spare new", "add": "pw spare new", "remove": "pw"}[name]; strings.Join(got, " ") != want {
								t.Errorf("%s: %q open the repository", where, got)
							}
							continue
						}
						crashes++
						// Again, after the restart, with a password that opens.
						again := open2(t, inner, got)
						if _, err := again.Unlock(ctx, true); err != nil {
							t.Error(err)
						}
						if err := change(again); err != nil && !(name == "remove" && errors.Is(err, repo.ErrNoKey)) {
							t.Errorf("%s: again: %v", where, err)
						}
						if got := opens(t, inner, "pw", "new"); len(got) == 0 || name != "remove" && !slices.Contains(got, "new") {
							t.Errorf("%s: again: %q open the repository", where, got)
						}
					}
				}
				if n > 4 { // more than any of them changes
					break
				}
			}
			if want := map[string]int{"passwd": 4, "add": 1, "remove": 3}[name]; crashes != 4*want {
				t.Errorf("%d crashes, want %d", crashes, 4*want)
			}
		})
	}
}

// open2 opens with the first of the passwords that is not the spare one.
func open2(t *testing.T, be backend.Backend, passwords []string) *repo.Repo {
	t.Helper()
	i := slices.IndexFunc(passwords, func(pw string) bool { return pw != "spare" })
	if i < 0 {
		t.Fatal("no password opens the repository")
	}
	r, err := repo.Open(t.Context(), be, passwords[i], repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A new key that the store damages is noticed before the old one goes.
func TestNewKeyIsProved(t *testing.T) {
	ctx := t.Context()
	inner := mem.New()
	newRepo(t, inner, repo.Options{})
	written := false
	be := faulty.New(inner, func(c faulty.Call) faulty.Fault {
		written = written || c.Op == faulty.Put && c.Key.Kind == backend.Keys
		if c.Op == faulty.Get && c.Key.Kind == backend.Keys && written {
			return faulty.Fault{Damage: func(b []byte) []byte { b[len(b)/2] ^= 1; return b }}
		}
		return faulty.Fault{}
	})
	r, err := repo.Open(ctx, be, "pw", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.ChangePassword(ctx, "new", cheap); !errors.Is(err, repo.ErrDamaged) {
		t.Errorf("%v", err)
	}
	if got := opens(t, inner, "pw", "new"); !slices.Equal(got, []string{"pw"}) {
		t.Errorf("%q open it", got)
	}
}
