package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"slices"
	"strings"
	"time"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/crypt"
)

// A keyFile is the stored form of a key: the master key sealed under a
// password. Only data is secret, and it is sealed.
type keyFile struct {
	Created  time.Time `json:"created"`
	Username string    `json:"username"`
	Hostname string    `json:"hostname"`
	KDF      string    `json:"kdf"`
	N        int       `json:"N"`
	R        int       `json:"r"`
	P        int       `json:"p"`
	Salt     []byte    `json:"salt"`
	Data     []byte    `json:"data"`
}

const kdfName = "scrypt"

// Errors of changing keys.
var (
	ErrNoKey      = errors.New("there is no such key; `ide49-backup key list` lists them")
	ErrKeyInUse   = errors.New("this key opened the repository; open it with another password to remove this one")
	ErrLastKey    = errors.New("this is the only key; without it nobody could open the repository any more")
	ErrManyKeys   = fmt.Errorf("the repository has %d keys, and no more are tried when it is opened; remove one first", maxKeys)
	ErrNoPassword = errors.New("the new password is empty")
)

// maxKeys bounds how many keys are tried: each try costs about half a second.
const maxKeys = 32

func decodeKeyFile(data []byte) (keyFile, error) {
	var f keyFile
	if err := json.Unmarshal(data, &f); err != nil {
		return f, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if f.KDF != kdfName {
		return f, fmt.Errorf("unknown key derivation %.20q: %w", f.KDF, ErrVersion)
	}
	return f, f.params().Validate()
}

func (f *keyFile) params() crypt.Params { return crypt.Params{N: f.N, R: f.R, P: f.P} }

// open returns the master key. A wrong password gives crypt.ErrAuth.
func (f *keyFile) open(password string) (*crypt.Key, error) {
	under, err := crypt.Derive(f.params(), f.Salt, password)
	if err != nil {
		return nil, err
	}
	plain, err := under.Open(nil, f.Data)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	key := &crypt.Key{}
	return key, key.UnmarshalJSON(plain)
}

// saveKey stores a key file that opens with password. An empty user or host
// means this process's.
func saveKey(ctx context.Context, be backend.Backend, master *crypt.Key, password string, kdf crypt.Params, username, hostname string) (backup.ID, error) {
	f := keyFile{Created: now(), KDF: kdfName, N: kdf.N, R: kdf.R, P: kdf.P, Salt: crypt.NewSalt()}
	u, h := whoami()
	f.Username, f.Hostname = cmp.Or(username, u), cmp.Or(hostname, h)
	under, err := crypt.Derive(kdf, f.Salt, password)
	if err != nil {
		return backup.ID{}, err
	}
	plain, err := master.MarshalJSON()
	if err != nil {
		return backup.ID{}, err
	}
	defer clear(plain)
	f.Data = under.Seal(nil, plain)
	data, err := json.Marshal(f)
	if err != nil {
		return backup.ID{}, err
	}
	id := backup.Hash(data)
	return id, be.Put(ctx, backend.Key{Kind: backend.Keys, ID: id}, data)
}

// findKey returns the first key that opens with password.
func findKey(ctx context.Context, be backend.Backend, password string) (*crypt.Key, backup.ID, error) {
	var problems error
	tried := 0
	for info, err := range be.List(ctx, backend.Keys) {
		if err != nil {
			return nil, backup.ID{}, err
		}
		if tried++; tried > maxKeys {
			problems = errors.Join(problems, fmt.Errorf("only %d keys were tried", maxKeys))
			break
		}
		if err := ctx.Err(); err != nil {
			return nil, backup.ID{}, err
		}
		key, err := loadKey(ctx, be, info.Key.ID, password)
		switch {
		case err == nil:
			return key, info.Key.ID, nil
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
		case !errors.Is(err, crypt.ErrAuth):
			problems = errors.Join(problems, fmt.Errorf("%s: %w", info.Key, err))
		}
	}
	if problems != nil {
		return nil, backup.ID{}, fmt.Errorf("%w (%s)", ErrPassword, oneLine(problems))
	}
	return nil, backup.ID{}, ErrPassword
}

// EachKey calls fn for every key file with what is wrong with it, if anything.
// Whether a password opens it is not tried.
func (r *Repo) EachKey(ctx context.Context, fn func(id backup.ID, err error) error) error {
	for info, err := range r.be.List(ctx, backend.Keys) {
		if err != nil {
			return err
		}
		data, err := r.be.Get(ctx, info.Key, 0, -1)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // removed meanwhile
		case err != nil:
		case backup.Hash(data) != info.Key.ID:
			err = ErrDamaged
		default:
			_, err = decodeKeyFile(data)
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", info.Key, err)
		}
		if err := fn(info.Key.ID, err); err != nil {
			return err
		}
	}
	return nil
}

func loadKey(ctx context.Context, be backend.Backend, id backup.ID, password string) (*crypt.Key, error) {
	f, err := readKey(ctx, be, id)
	if err != nil {
		return nil, err
	}
	return f.open(password)
}

// readKey returns a key file after verifying its name.
func readKey(ctx context.Context, be backend.Backend, id backup.ID) (keyFile, error) {
	data, err := be.Get(ctx, backend.Key{Kind: backend.Keys, ID: id}, 0, -1)
	if err != nil {
		return keyFile{}, err
	}
	if backup.Hash(data) != id {
		return keyFile{}, ErrDamaged
	}
	return decodeKeyFile(data)
}

// A KeyInfo is what a key says about itself. Nothing of it is secret.
type KeyInfo struct {
	ID       backup.ID
	Created  time.Time
	Username string
	Hostname string
	KDF      crypt.Params
	Current  bool  // the repository was opened with it
	Err      error // why the key can't be read; then only ID is set
}

// Keys returns the keys of the repository, oldest first.
func (r *Repo) Keys(ctx context.Context) ([]KeyInfo, error) {
	var all []KeyInfo
	for info, err := range r.be.List(ctx, backend.Keys) {
		if err != nil {
			return nil, fmt.Errorf("list keys: %w", err)
		}
		k := KeyInfo{ID: info.Key.ID}
		f, err := readKey(ctx, r.be, k.ID)
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
			continue
		case ctx.Err() != nil:
			return nil, fmt.Errorf("list keys: %w", ctx.Err())
		case err != nil:
			k.Err = err
		default:
			k.Created, k.Username, k.Hostname, k.KDF, k.Current = f.Created, f.Username, f.Hostname, f.params(), k.ID == r.KeyID()
		}
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b KeyInfo) int {
		return cmp.Or(a.Created.Compare(b.Created), slices.Compare(a.ID[:], b.ID[:]))
	})
	return all, nil
}

// AddKey makes another key, which opens with password, and reads it back to
// see that it does. The user and host that it is noted to be of are this
// process's where they are empty. When AddKey fails there is no new key, or
// one that opens with the new password.
func (r *Repo) AddKey(ctx context.Context, password string, kdf crypt.Params, username, hostname string) (backup.ID, error) {
	id, err := r.addKey(ctx, password, kdf, username, hostname)
	if err != nil {
		return backup.ID{}, fmt.Errorf("add key: %w", err)
	}
	return id, nil
}

func (r *Repo) addKey(ctx context.Context, password string, kdf crypt.Params, username, hostname string) (backup.ID, error) {
	if password == "" {
		return backup.ID{}, ErrNoPassword
	}
	keys, err := r.Keys(ctx)
	if err != nil {
		return backup.ID{}, err
	}
	if len(keys) >= maxKeys {
		return backup.ID{}, ErrManyKeys
	}
	id, err := saveKey(ctx, r.be, r.key, password, kdf, username, hostname)
	if err != nil {
		return backup.ID{}, err
	}
	if err := r.proveKey(ctx, id, password); err != nil {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
		defer cancel()
		if derr := r.be.Delete(late, backend.Key{Kind: backend.Keys, ID: id}); derr != nil {
			return backup.ID{}, fmt.Errorf("the new key %s can't be used: %w; nor be removed: %w", id.Short(), err, derr)
		}
		return backup.ID{}, fmt.Errorf("the new key %s can't be used, and was removed: %w", id.Short(), err)
	}
	return id, nil
}

// proveKey returns an error unless a stored key opens with password and holds
// the repository's master key.
func (r *Repo) proveKey(ctx context.Context, id backup.ID, password string) error {
	key, err := loadKey(ctx, r.be, id, password)
	if err != nil {
		return err
	}
	sealed, err := r.be.Get(ctx, backend.ConfigKey, 0, -1)
	if err != nil {
		return err
	}
	_, err = key.Open(nil, sealed)
	return err
}

// RemoveKey removes a key: its password no longer opens the repository. The
// last key, and the one that opened the repository, stay: ErrLastKey,
// ErrKeyInUse. Others are kept out by an exclusive lock, so that two who each
// remove the other's key don't leave none.
func (r *Repo) RemoveKey(ctx context.Context, id backup.ID) error {
	err := r.WithLock(ctx, true, func(ctx context.Context) error {
		keys, err := r.Keys(ctx)
		if err != nil {
			return err
		}
		current := false
		for _, k := range keys {
			current = current || k.Current
		}
		switch {
		case !slices.ContainsFunc(keys, func(k KeyInfo) bool { return k.ID == id }):
			return ErrNoKey
		case len(keys) == 1:
			return ErrLastKey
		case id == r.KeyID():
			return ErrKeyInUse
		case !current:
			// Somebody removed or damaged it since; then the other may be the
			// last that is good for anything.
			return fmt.Errorf("the key %s that opened the repository is gone: %w", r.KeyID().Short(), ErrLastKey)
		}
		return r.be.Delete(ctx, backend.Key{Kind: backend.Keys, ID: id})
	})
	if err != nil {
		return fmt.Errorf("remove key %s: %w", id.Short(), err)
	}
	return nil
}

// ChangePassword puts a new key in place of the one that opened the
// repository, and returns its ID. The new key is stored and proved before the
// old one goes, so that at every moment one of the two passwords opens the
// repository; which ones do after a failure, the error says.
func (r *Repo) ChangePassword(ctx context.Context, password string, kdf crypt.Params) (backup.ID, error) {
	var id backup.ID
	err := r.WithLock(ctx, true, func(ctx context.Context) error {
		old, err := readKey(ctx, r.be, r.KeyID())
		if err != nil {
			return fmt.Errorf("the old key: %w", err)
		}
		if id, err = r.addKey(ctx, password, kdf, old.Username, old.Hostname); err != nil {
			return fmt.Errorf("%w (the old password is still good)", err)
		}
		gone := backend.Key{Kind: backend.Keys, ID: r.KeyID()}
		r.keyID.Store(&id)
		if err := r.be.Delete(ctx, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w (the new password is good, and perhaps the old one: see `ide49-backup key list`)", err)
		}
		return nil
	})
	if err != nil {
		return id, fmt.Errorf("change password: %w", err)
	}
	return id, nil
}

// FindKey returns the key whose ID begins with prefix.
func FindKey(keys []KeyInfo, prefix string) (KeyInfo, error) {
	var found []KeyInfo
	for _, k := range keys {
		if prefix != "" && strings.HasPrefix(k.ID.String(), prefix) {
			found = append(found, k)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return KeyInfo{}, fmt.Errorf("key %.64q: %w", prefix, ErrNoKey)
	}
	return KeyInfo{}, fmt.Errorf("key %.64q: more than one begins so; give more digits: %w", prefix, ErrNoKey)
}

// whoami returns the names that restic writes into keys and locks.
func whoami() (username, hostname string) {
	if u, err := user.Current(); err == nil {
		username = u.Username
	}
	hostname, _ = os.Hostname() // an empty name is allowed
	return username, hostname
}

// oneLine joins the lines of a joined error by semicolons.
func oneLine(err error) string {
	out := []byte(err.Error())
	for i := range out {
		if out[i] == '\n' {
			out[i] = ';'
		}
	}
	return string(out)
}
