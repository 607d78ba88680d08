package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/archiver"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/backup/restorer"
)

// How a restore in place can be undone, see docs/decisions/0035: before it
// begins, two snapshots are taken of each volume, all with the tags
// before-restore and restore:ID. One holds what will be overwritten or deleted
// with the folders that lead there, the other a single file: the paths that the
// restore will create, each followed by a zero byte.
const (
	restoreTag  = "restore:"
	createdFile = ".ide49-backup-created"
)

// keepBefore takes the snapshots from which the restore of parts can be undone.
func (a *app) keepBefore(ctx context.Context, s *session, job *restoreJob, parts []*part) error {
	var sources []archiver.Source
	for _, p := range parts {
		keep := map[string]bool{}
		lead := func(rel string) {
			for d := path.Dir(rel); d != "." && !keep[d]; d = path.Dir(d) {
				keep[d] = true
			}
		}
		var created bytes.Buffer
		for ch := range p.plan.Changes() {
			lead(ch.Path)
			if ch.Action == restorer.Create {
				created.WriteString(ch.Path + "\x00")
			} else {
				keep[ch.Path] = true
			}
		}
		sources = append(sources,
			archiver.Source{Volume: backup.Volume{Name: p.volume, Path: p.target}, Exclude: func(rel string, _ bool) bool { return !keep[rel] }},
			archiver.Source{Volume: backup.Volume{Name: p.volume, Path: filepath.Join(p.target, createdFile)}, Stream: &created},
		)
	}
	results, err := archiver.Run(ctx, s.repo, sources, archiver.Job{
		Time: a.now(), Hostname: job.device, Tags: []string{backup.BeforeRestoreTag, restoreTag + rand.Text()[:12]},
		Program: program(), History: s.snapshots, Skip: []string{s.place.location.Path()},
	}, archiver.Observer{
		Problem: func(v backup.Volume, p archiver.Problem) {
			a.warn("%s: can't be kept for --undo: %v", filepath.Join(v.Path, p.Path), p.Err)
		},
	})
	for _, res := range results {
		if res != nil && res.Err != nil {
			err = errors.Join(err, res.Err)
		}
	}
	return err
}

// undoParts finds what the last restore in place has changed.
func (a *app) undoParts(ctx context.Context, s *session, job *restoreJob) ([]*part, error) {
	volumes := job.flags.volumes
	own := func(sn *backup.Snapshot) bool {
		return sn.Hostname == job.device && sn.HasTag(backup.BeforeRestoreTag) && len(sn.Paths) == 1 && restoreOf(sn) != "" &&
			(len(volumes) == 0 || slices.Contains(volumes, sn.Volume()))
	}
	id := ""
	for _, sn := range s.snapshots { // oldest first
		if own(sn) {
			id = restoreOf(sn)
		}
	}
	if id == "" {
		return nil, fmt.Errorf("there is no restore on %s to undo in the repository %s", job.device, s.place)
	}
	byTarget := map[string]*part{}
	created := map[string][]string{}
	var parts []*part
	for _, sn := range s.snapshots {
		if !own(sn) || restoreOf(sn) != id {
			continue
		}
		target, name := filepath.Split(sn.Paths[0])
		if name == createdFile {
			list, err := createdPaths(ctx, s.repo, sn)
			if err != nil {
				return nil, fmt.Errorf("undo the restore of %s: %w", sn.Volume(), err)
			}
			created[filepath.Clean(target)] = list
			continue
		}
		p := &part{volume: sn.Volume(), snapshot: sn, target: filepath.Clean(sn.Paths[0]), inPlace: true}
		byTarget[p.target] = p
		parts = append(parts, p)
	}
	for target, p := range byTarget {
		list, ok := created[target]
		if !ok {
			a.warn("%s: the list of what the restore created is missing; that stays", p.volume)
		}
		if err := p.undo(ctx, s, list); err != nil {
			return nil, fmt.Errorf("undo the restore of %s: %w", p.volume, err)
		}
		p.opt.Verify = job.flags.verify
	}
	if len(parts) > 0 {
		a.say("undo the restore of %s", clock(parts[0].snapshot.Time, job.cfg.Location()))
	} else {
		return nil, fmt.Errorf("the snapshots from which to undo the restore are gone from the repository %s", s.place)
	}
	return parts, nil
}

// restoreOf returns the ID of the restore that a snapshot was taken before.
func restoreOf(sn *backup.Snapshot) string {
	for _, tag := range sn.Tags {
		if id, ok := strings.CutPrefix(tag, restoreTag); ok {
			return id
		}
	}
	return ""
}

// undo selects what the snapshot has kept and what the restore created:
// the former comes back, the latter goes, all else is left alone.
func (p *part) undo(ctx context.Context, s *session, created []string) error {
	touched := map[string]bool{}
	for _, rel := range created {
		touched[rel] = true
	}
	root, err := lookup(ctx, s.repo, p.snapshot, "")
	if err != nil {
		return err
	}
	if err := walk(ctx, s.repo, "", root.Subtree, 0, func(rel string) { touched[rel] = true }); err != nil {
		return err
	}
	p.opt = restorer.Options{
		Overwrite: restorer.Always,
		Delete:    true,
		Exclude:   func(rel string, _ bool) bool { return !touched[rel] },
	}
	return p.spareRepository(s.place.location.Path())
}

// walk calls fn with the path of every entry below a tree.
func walk(ctx context.Context, r *repo.Repo, rel string, id backup.ID, depth int, fn func(rel string)) error {
	if depth > maxDepth {
		return fmt.Errorf("folders are nested too deep: %w", repo.ErrDamaged)
	}
	tree, err := r.Tree(ctx, id)
	if err != nil {
		return err
	}
	for _, n := range tree.Nodes {
		name := path.Join(rel, n.Name)
		fn(name)
		if n.Type == backup.Dir {
			if err := walk(ctx, r, name, n.Subtree, depth+1, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// maxCreated bounds the list of created paths in memory.
const maxCreated = 512 << 20

// createdPaths reads the list of what a restore created. It comes from the
// repository, so paths that lead anywhere else are refused.
func createdPaths(ctx context.Context, r *repo.Repo, sn *backup.Snapshot) ([]string, error) {
	node, err := lookup(ctx, r, sn, "")
	if err != nil {
		return nil, err
	}
	var text []byte
	for _, id := range node.Content {
		part, err := r.Blob(ctx, backup.DataBlob, id)
		if err != nil {
			return nil, err
		}
		if text = append(text, part...); len(text) > maxCreated {
			return nil, fmt.Errorf("the list of created files is too long: %w", repo.ErrDamaged)
		}
	}
	var list []string
	for rel := range strings.SplitSeq(string(text), "\x00") {
		if rel == "" || rel == "." {
			continue
		}
		if !filepath.IsLocal(rel) || path.Clean(rel) != rel {
			return nil, fmt.Errorf("the list of created files holds %q: %w", rel, repo.ErrDamaged)
		}
		list = append(list, rel)
	}
	return list, nil
}
