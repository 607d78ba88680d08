package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/check"
	"github.com/iot49/ide49-backup/policy"
)

// A verification is what is remembered of a repository between runs: which
// packs the last backup wrote, and how far rolling reads have come. It is
// disposable.
type verification struct {
	Written []backup.ID `json:"written"`
	Round   check.Round `json:"round"`
}

func (a *app) verificationFile(s *session) (string, error) {
	dir, err := a.state()
	return filepath.Join(dir, "verified-"+s.repo.Config().ID[:16]+".json"), err
}

// verification reads what is remembered; what can't be read is forgotten.
func (a *app) verification(s *session) (verification, error) {
	var v verification
	file, err := a.verificationFile(s)
	if err != nil {
		return v, err
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return v, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	if err != nil {
		a.warn("what was verified before is forgotten: %v", err)
		return verification{}, nil
	}
	return v, nil
}

func (a *app) saveVerification(s *session, v verification) error {
	file, err := a.verificationFile(s)
	if err != nil {
		return err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return policy.WriteDurably(file, data)
}

// rememberWritten notes what a backup has written, for check --written.
func (a *app) rememberWritten(s *session, packs []backup.ID) {
	v, err := a.verification(s)
	if err == nil {
		v.Written = packs
		err = a.saveVerification(s, v)
	}
	if err != nil {
		a.warn("remember what was written, for `check --written`: %v", err)
	}
}

// selection returns which packs a check reads, and a function that remembers
// how far it has come.
func (a *app) selection(s *session, f checkFlags) (check.Selection, func() error, error) {
	nothing := func() error { return nil }
	share, rolling := strings.CutSuffix(f.read, "%")
	if !f.written && !rolling {
		sel, err := check.ParseSelection(f.read)
		return sel, nothing, err
	}
	v, err := a.verification(s)
	if err != nil {
		return check.Selection{}, nothing, err
	}
	if f.written {
		if len(v.Written) == 0 {
			a.say("nothing is known of what the last backup wrote, or it wrote nothing")
		}
		return check.Written(v.Written), nothing, nil
	}
	percent, err := strconv.ParseFloat(share, 64)
	if err != nil {
		return check.Selection{}, nothing, usagef("--read: %w", err)
	}
	return check.Rolling(percent, &v.Round), func() error {
		if !v.Round.Since.IsZero() {
			a.say("everything that was there on %s has been read since", v.Round.Since.Format("2006-01-02 15:04"))
		}
		return a.saveVerification(s, v)
	}, nil
}

// largestDrill bounds the size of the files that a drill restores.
const largestDrill = 256 << 20

// drill restores files at random to a scratch folder and compares them.
func (a *app) drill(ctx context.Context, s *session, n int) (err error) {
	if err := s.repo.LoadIndex(ctx); err != nil {
		return fmt.Errorf("restore drill: %w", err)
	}
	files, err := check.Sample(ctx, s.repo, s.snapshots, n, largestDrill, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())))
	if err != nil {
		return fmt.Errorf("restore drill: %w", err)
	}
	dir, err := os.MkdirTemp("", "ide49-drill-")
	if err != nil {
		return fmt.Errorf("restore drill: make a scratch folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	scratch, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("restore drill: %w", err)
	}
	defer scratch.Close()
	bad := 0
	err = check.Drill(ctx, s.repo, files, scratch, func(f check.Sampled, err error) {
		if err != nil {
			bad++
			a.warn("restore drill: snapshot %s: %v", f.Snapshot.Short(), err)
		}
	})
	if err != nil {
		return err
	}
	if bad > 0 {
		return fmt.Errorf("restore drill of %s: %d of %s could not be restored as they were: %w", s.place, bad, count(len(files), "file", "files"), errDamageFound)
	}
	a.say("restored %s at random and found them as they were", count(len(files), "file", "files"))
	return nil
}
