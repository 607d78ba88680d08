// Package repo reads and writes repositories in restic's public format,
// version 2, over a [backend.Backend].
//
// What it guarantees: every byte read is verified, blobs against their ID and
// files against their name and seal. Writing goes packs, index, snapshot, each
// durable before the next begins, so that whatever a snapshot or an index
// names is there. Version 1 can be read.
package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/restic/chunker"
	"golang.org/x/sync/errgroup"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/crypt"
)

// Errors of a repository. They are wrapped with what they concern.
var (
	// ErrNoRepository says that there is no repository at this place.
	ErrNoRepository = errors.New("there is no repository here; check the address, or make one with `ide49-backup init`")
	// ErrExists says that Init found a repository.
	ErrExists = errors.New("there is a repository here already; use it, or choose another place")
	// ErrPassword says that no key of the repository opens with the password.
	ErrPassword = errors.New("wrong password, or no key of the repository can be read")
	// ErrVersion1 says that a repository can be read but not written.
	ErrVersion1 = errors.New("the repository has format version 1, which is only read here; upgrade it with `restic migrate upgrade_repo_v2`")
	// ErrVersion says that a repository's version is unknown.
	ErrVersion = errors.New("the repository has a format that this program does not know; use a newer version of the program that made it")
	// ErrDamaged says that stored bytes are not what they should be.
	ErrDamaged = errors.New("damaged; run `ide49-backup check`")
	// ErrNoBlob says that no index names a blob.
	ErrNoBlob = errors.New("not in the index; run `ide49-backup check`")
)

// Sizes. A pack is closed when it reaches the target size.
const (
	DefaultPackSize = 16 << 20
	MinPackSize     = 4 << 20
	MaxPackSize     = 128 << 20

	minDataPacks = 2
	maxDataPacks = 16

	// maxDataBlob and maxTreeBlob bound the plaintext of one blob, so that
	// a hostile index can't claim all memory. Chunks have at most 8 MiB; a
	// tree of 512 MiB is a folder of more than a million entries.
	maxDataBlob = 64 << 20
	maxTreeBlob = 512 << 20
	// maxFile bounds files that are read whole: indexes and snapshots.
	maxFile = 512 << 20
)

// Options say how a repository is used. The zero value is a good choice.
type Options struct {
	Compression Compression
	PackSize    int // bytes; 0 means DefaultPackSize
	// DataPacks is how many packs of file data are filled or written side by
	// side; 0 means 2. Stores with a long way to them want more.
	DataPacks int

	// Journal is a folder, on a disk of this machine, that remembers its
	// locks (see [Repo.Locks]); "" means none. It is made if it is missing;
	// several processes and repositories may share it.
	Journal string
	// LockWait is how long WithLock waits for others.
	LockWait time.Duration
	// LockWaiting, if set, is called before each pause of that wait with the
	// error that would otherwise end it.
	LockWaiting func(held error)
}

// A Repo is an open repository. Its methods may be called concurrently.
type Repo struct {
	be    backend.Backend
	key   *crypt.Key
	keyID atomic.Pointer[backup.ID] // never nil; ChangePassword changes it
	cfg   Config
	opt   Options
	zip   *compressor
	index atomic.Pointer[Index]

	journal  *journal
	boottime func() time.Duration // since boot, with the time asleep
}

// A Config is what a repository says about itself.
type Config struct {
	Version    uint        `json:"version"`
	ID         string      `json:"id"` // 64 hexadecimal digits
	Polynomial chunker.Pol `json:"chunker_polynomial"`
}

// decodeConfig parses and checks a config's plaintext.
func decodeConfig(data []byte) (Config, error) {
	var c Config
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if c.Version < 1 || c.Version > 2 {
		return c, fmt.Errorf("version %d: %w", c.Version, ErrVersion)
	}
	if _, err := backup.ParseID(c.ID); err != nil {
		return c, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if c.Polynomial.Deg() != polynomialDegree || !c.Polynomial.Irreducible() {
		return c, fmt.Errorf("%w: the chunker polynomial %v is not irreducible of degree %d", ErrDamaged, c.Polynomial, polynomialDegree)
	}
	return c, nil
}

// polynomialDegree is the degree of the polynomials that the chunker uses.
const polynomialDegree = 53

// Init makes a repository in an empty store, with one key for password, and
// opens it. The config is written last: until then there is no repository.
func Init(ctx context.Context, be backend.Backend, password string, kdf crypt.Params, opt Options) (*Repo, error) {
	pol, err := chunker.RandomPolynomial()
	if err != nil {
		return nil, fmt.Errorf("make repository: choose a polynomial: %w", err)
	}
	id := backup.ID(crypt.NewSalt()[:backup.IDSize]) // any random bytes
	return initWith(ctx, be, password, kdf, opt, Config{Version: 2, ID: id.String(), Polynomial: pol})
}

// InitLike is Init with the chunker polynomial of another repository, so that
// files are cut alike in both: what is copied between them and what is backed
// up to both is stored once in each.
func InitLike(ctx context.Context, be backend.Backend, password string, kdf crypt.Params, opt Options, other *Repo) (*Repo, error) {
	id := backup.ID(crypt.NewSalt()[:backup.IDSize]) // any random bytes
	return initWith(ctx, be, password, kdf, opt, Config{Version: 2, ID: id.String(), Polynomial: other.cfg.Polynomial})
}

func initWith(ctx context.Context, be backend.Backend, password string, kdf crypt.Params, opt Options, cfg Config) (*Repo, error) {
	switch _, err := be.Get(ctx, backend.ConfigKey, 0, -1); {
	case err == nil:
		return nil, fmt.Errorf("make repository: %w", ErrExists)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("make repository: %w", err)
	}
	for _, err := range be.List(ctx, backend.Keys) {
		if err == nil {
			err = fmt.Errorf("it has keys but no config: %w", ErrDamaged)
		}
		return nil, fmt.Errorf("make repository: %w", err)
	}
	r := newRepo(be, opt)
	r.key, r.cfg = crypt.NewKey(), cfg
	r.journal = newJournal(opt.Journal, cfg.ID, r.boottime)
	keyID, err := saveKey(ctx, be, r.key, password, kdf, "", "")
	if err != nil {
		return nil, fmt.Errorf("make repository: %w", err)
	}
	r.keyID.Store(&keyID)
	plain, err := json.Marshal(cfg)
	if err == nil {
		err = be.Put(ctx, backend.ConfigKey, r.key.Seal(nil, plain))
	}
	if err != nil {
		// Without the key a next try finds an empty store again.
		err = errors.Join(err, be.Delete(context.WithoutCancel(ctx), backend.Key{Kind: backend.Keys, ID: keyID}))
		return nil, fmt.Errorf("make repository: %w", err)
	}
	return r, nil
}

func newRepo(be backend.Backend, opt Options) *Repo {
	if opt.PackSize == 0 {
		opt.PackSize = DefaultPackSize
	}
	opt.PackSize = min(max(opt.PackSize, MinPackSize), MaxPackSize)
	if opt.DataPacks == 0 {
		opt.DataPacks = minDataPacks
	}
	opt.DataPacks = min(max(opt.DataPacks, minDataPacks), maxDataPacks)
	r := &Repo{be: be, opt: opt, zip: newCompressor(opt.Compression), boottime: sinceBoot}
	r.index.Store(NewIndex())
	return r
}

// Open opens the repository in a store. The index is not loaded yet.
func Open(ctx context.Context, be backend.Backend, password string, opt Options) (*Repo, error) {
	sealed, err := be.Get(ctx, backend.ConfigKey, 0, -1)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open repository: %w", ErrNoRepository)
	}
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", err)
	}
	r := newRepo(be, opt)
	key, keyID, err := findKey(ctx, be, password)
	if err != nil {
		return nil, fmt.Errorf("open repository: %w", err)
	}
	r.key = key
	r.keyID.Store(&keyID)
	plain, err := r.key.Open(nil, sealed)
	if err != nil {
		return nil, fmt.Errorf("open repository: config: %w: %w", ErrDamaged, err)
	}
	if r.cfg, err = decodeConfig(plain); err != nil {
		return nil, fmt.Errorf("open repository: config: %w", err)
	}
	r.journal = newJournal(opt.Journal, r.cfg.ID, r.boottime)
	return r, nil
}

// Close closes the store.
func (r *Repo) Close() error { return r.be.Close() }

// Config returns the repository's config.
func (r *Repo) Config() Config { return r.cfg }

// KeyID returns the key that the repository was opened with.
func (r *Repo) KeyID() backup.ID { return *r.keyID.Load() }

// Backend returns the store, for those who look at files rather than blobs.
func (r *Repo) Backend() backend.Backend { return r.be }

// Alive returns an error if the store does not answer at all, or holds another
// repository by now, as when a drive was pulled out.
func (r *Repo) Alive(ctx context.Context) error {
	_, err := r.be.Get(ctx, backend.ConfigKey, 0, -1)
	return err
}

// Evict makes the next read of a pack come from the device rather than from a
// cache. Where the store can't promise that, the error matches
// errors.ErrUnsupported.
func (r *Repo) Evict(ctx context.Context, pack backup.ID) error {
	e, ok := r.be.(backend.Evicter)
	if !ok {
		return fmt.Errorf("this kind of store can't read past its caches: %w", errors.ErrUnsupported)
	}
	return e.Evict(ctx, backend.Key{Kind: backend.Packs, ID: pack})
}

// Index returns what is known of packs and blobs: what LoadIndex read and what
// was written since.
func (r *Repo) Index() *Index { return r.index.Load() }

// writable returns an error unless the repository may be written.
func (r *Repo) writable() error {
	if r.cfg.Version < 2 {
		return ErrVersion1
	}
	return nil
}

// LoadIndex reads all index files. List snapshots first: what they name is
// then in the index.
func (r *Repo) LoadIndex(ctx context.Context) error {
	return r.LoadIntactIndex(ctx, func(_ backup.ID, err error) error { return fmt.Errorf("load index: %w", err) })
}

// LoadIntactIndex reads all index files and calls damaged, one call at a time,
// for each that can't be used. The first error that damaged returns ends it
// and leaves the index as it was.
func (r *Repo) LoadIntactIndex(ctx context.Context, damaged func(id backup.ID, err error) error) error {
	idx := NewIndex()
	refused := false
	err := r.eachIndex(ctx, func(id backup.ID, f *IndexFile, err error) error {
		if err != nil {
			err = damaged(id, err)
			refused = err != nil
			return err
		}
		idx.addFile(id, f)
		return nil
	})
	if err != nil && !refused {
		err = fmt.Errorf("load index: %w", err)
	}
	if err != nil {
		return err
	}
	r.index.Store(idx)
	return nil
}

// eachIndex calls fn for every index file, or with what is wrong with one.
func (r *Repo) eachIndex(ctx context.Context, fn func(id backup.ID, f *IndexFile, err error) error) error {
	return r.EachFile(ctx, backend.Indexes, func(id backup.ID, plain []byte, err error) error {
		var f *IndexFile
		if err == nil {
			f, err = DecodeIndex(plain)
		}
		if err != nil {
			return fn(id, nil, fmt.Errorf("index %s: %w", id.Short(), err))
		}
		return fn(id, f, nil)
	})
}

// A PackFile is a pack that is in the store.
type PackFile struct {
	ID   backup.ID
	Size int64 // bytes
}

// PackFiles lists the packs in the store, whether an index names them or not.
func (r *Repo) PackFiles(ctx context.Context) iter.Seq2[PackFile, error] {
	return func(yield func(PackFile, error) bool) {
		for info, err := range r.be.List(ctx, backend.Packs) {
			if !yield(PackFile{info.Key.ID, info.Size}, err) {
				return
			}
		}
	}
}

// EachFile loads every lock, snapshot or index file and calls fn, one call at
// a time, with its plaintext or with what is wrong with it. The first error
// that fn returns ends the walk. Files that vanish meanwhile are passed over.
func (r *Repo) EachFile(ctx context.Context, kind backend.Kind, fn func(id backup.ID, plain []byte, err error) error) error {
	type loaded struct {
		id    backup.ID
		plain []byte
		err   error
	}
	g, ctx := errgroup.WithContext(ctx)
	ids := make(chan backup.ID)
	out := make(chan loaded)
	g.Go(func() error {
		defer close(ids)
		for info, err := range r.be.List(ctx, kind) {
			if err != nil {
				return err
			}
			select {
			case ids <- info.Key.ID:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	const readers = 4 // hides the latency of a share; a folder needs none
	var open atomic.Int32
	open.Store(readers)
	for range readers {
		g.Go(func() error {
			defer func() {
				if open.Add(-1) == 0 {
					close(out)
				}
			}()
			for id := range ids {
				plain, err := r.LoadFile(ctx, kind, id)
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if errors.Is(err, fs.ErrNotExist) {
					continue
				}
				select {
				case out <- loaded{id, plain, err}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		for l := range out {
			if err := fn(l.id, l.plain, l.err); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}

// LoadFile returns the plaintext of a lock, snapshot or index file, after
// verifying its name and seal.
func (r *Repo) LoadFile(ctx context.Context, kind backend.Kind, id backup.ID) ([]byte, error) {
	k := backend.Key{Kind: kind, ID: id}
	sealed, err := r.be.Get(ctx, k, 0, -1)
	if err != nil {
		return nil, err
	}
	if got := backup.Hash(sealed); got != id {
		return nil, fmt.Errorf("%s: %w: its contents have the hash %s", k, ErrDamaged, got.Short())
	}
	plain, err := r.key.Open(nil, sealed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", k, ErrDamaged, err)
	}
	if plain, err = r.unversion(plain); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", k, ErrDamaged, err)
	}
	return plain, nil
}

// The first byte of a versioned file's plaintext.
const (
	versionZstd = 2
	plainObject = '{'
	plainArray  = '['
)

// unversion returns the JSON in a versioned file's plaintext.
func (r *Repo) unversion(plain []byte) ([]byte, error) {
	if len(plain) == 0 {
		return nil, errors.New("the file is empty")
	}
	switch plain[0] {
	case plainObject, plainArray:
		return plain, nil
	case versionZstd:
		return r.zip.decompressFile(plain[1:])
	}
	return nil, fmt.Errorf("the file has the unknown encoding %d", plain[0])
}

// SaveFile seals JSON and stores it as a snapshot or index file. It fails with
// ErrLockLost if ctx stands for a lock that has grown too old.
func (r *Repo) SaveFile(ctx context.Context, kind backend.Kind, plain []byte) (backup.ID, error) {
	if err := r.lockHeld(ctx); err != nil {
		return backup.ID{}, err
	}
	id, sealed := r.sealFile(plain)
	return id, r.be.Put(ctx, backend.Key{Kind: kind, ID: id}, sealed)
}

// sealFile returns what to store of a lock, snapshot or index file, and its name.
func (r *Repo) sealFile(plain []byte) (backup.ID, []byte) {
	if r.cfg.Version >= 2 {
		plain = r.zip.compressFile([]byte{versionZstd}, plain)
	}
	sealed := r.key.Seal(nil, plain)
	return backup.Hash(sealed), sealed
}

// workers is how many goroutines compute at once.
func workers() int { return runtime.GOMAXPROCS(0) }

// now is the time that is written into files, without the monotonic clock.
func now() time.Time { return time.Now().Round(0) }
