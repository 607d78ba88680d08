package mounts

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A claim is a mount folder of ours, written down before the folder is made.
type claim struct {
	Path    string
	Existed bool   // the folder was there before, so it is not ours to remove
	Ino     uint64 // of the folder; 0 until it is made

	Device       string
	Major, Minor uint32
	DiskSeq      uint64
	Partition    int
	ID, UUID     string
	Type         string
	Probe        Probe // what was found on it
	Since        time.Time
	SDev         string // number of the file system in mountinfo; empty until it is mounted
}

// A record is what survives a crash: our mount folders, and in which run of
// the system they were made.
type record struct {
	Boot   string
	Claims []claim

	file string
}

const recordFile = "drive-mounts.json"

func loadRecord(dir string) (*record, error) {
	r := &record{file: filepath.Join(dir, recordFile)}
	b, err := os.ReadFile(r.file)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(b, r)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the record of mounted drives: %w", err)
	}
	// The file is an input: nothing but absolute, clean paths is touched.
	r.Claims = slices.DeleteFunc(r.Claims, func(c claim) bool {
		return !validPath(c.Path)
	})
	return r, nil
}

func (r *record) save() error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = writeFile(r.file, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("saving the record of mounted drives: %w", err)
	}
	return nil
}

// put writes a claim down, in place of an earlier one for the same path.
func (r *record) put(c claim) error {
	if i := r.index(c.Path); i >= 0 {
		r.Claims[i] = c
	} else {
		r.Claims = append(r.Claims, c)
	}
	return r.save()
}

func (r *record) drop(path string) error {
	i := r.index(path)
	if i < 0 {
		return nil
	}
	r.Claims = slices.Delete(r.Claims, i, i+1)
	return r.save()
}

func (r *record) index(path string) int {
	return slices.IndexFunc(r.Claims, func(c claim) bool { return c.Path == path })
}

// bootID names this run of the system.
func bootID(proc string) (string, error) {
	b, err := os.ReadFile(filepath.Join(proc, "sys/kernel/random/boot_id"))
	if err != nil {
		return "", fmt.Errorf("reading the boot number: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// removeDir removes the folder of a claim if it is ours, empty, and nothing is
// mounted on it. A folder that is not is left without a word.
func (c claim) removeDir() error {
	if c.Existed {
		return nil
	}
	parent, err := openParent(c.Path, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("removing the mount folder %s: %w", c.Path, err)
	}
	defer parent.Close()
	name := filepath.Base(c.Path)
	if c.Ino != 0 {
		var st unix.Stat_t
		err := unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && st.Ino != c.Ino {
			return nil // somebody put another folder there
		}
	}
	err = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
	switch err {
	case nil, unix.ENOENT, unix.ENOTDIR, unix.ENOTEMPTY, unix.EBUSY:
		return nil
	}
	return fmt.Errorf("removing the mount folder %s: %w", c.Path, err)
}

// validPath reports whether a path may be a mount folder.
func validPath(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/" && !strings.ContainsRune(path, 0)
}
