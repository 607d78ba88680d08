package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
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

// saveKey stores a key file that opens with password.
func saveKey(ctx context.Context, be backend.Backend, master *crypt.Key, password string, kdf crypt.Params) (backup.ID, error) {
	f := keyFile{Created: now(), KDF: kdfName, N: kdf.N, R: kdf.R, P: kdf.P, Salt: crypt.NewSalt()}
	f.Username, f.Hostname = whoami()
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
		key, err := loadKey(ctx, be, info.Key, password)
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

func loadKey(ctx context.Context, be backend.Backend, k backend.Key, password string) (*crypt.Key, error) {
	data, err := be.Get(ctx, k, 0, -1)
	if err != nil {
		return nil, err
	}
	if backup.Hash(data) != k.ID {
		return nil, ErrDamaged
	}
	f, err := decodeKeyFile(data)
	if err != nil {
		return nil, err
	}
	return f.open(password)
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
