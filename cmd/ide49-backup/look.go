package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/browse"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/policy"
)

// errNoSuchPath says that a snapshot lacks a path.
var errNoSuchPath = errors.New("the snapshot has no such file or folder; `ide49-backup ls` shows what it holds")

// maxDepth bounds how deep folders are followed: Linux paths have at most 4096
// bytes, and a hostile repository could go on for long.
const maxDepth = 4096

// inSnapshot returns the path in a snapshot that a person means by name: below its
// only path, or absolute.
func inSnapshot(sn *backup.Snapshot, name string) string {
	if !path.IsAbs(name) && len(sn.Paths) == 1 {
		return path.Join(sn.Paths[0], name)
	}
	return name
}

// entry finds what a person names in a snapshot.
func entry(ctx context.Context, v *browse.View, sn *backup.Snapshot, name string) (browse.Entry, error) {
	e, err := v.Lookup(ctx, sn, inSnapshot(sn, name))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, browse.ErrNotFolder) {
		return e, fmt.Errorf("snapshot %s: %s: %w", sn.ID.Short(), inSnapshot(sn, name), errNoSuchPath)
	}
	return e, err
}

// lookup finds an entry of a snapshot by its path below the snapshot's only
// path, or by its absolute path.
func lookup(ctx context.Context, r *repo.Repo, sn *backup.Snapshot, name string) (*backup.Node, error) {
	e, err := entry(ctx, browse.New(r, browse.Options{}), sn, name)
	return e.Node, err
}

// A looker is an open repository for a verb that looks inside.
type looker struct {
	*session
	cfg  *policy.Config
	view *browse.View
	host string
}

// look opens the repository to look inside. That takes no lock: what is read is
// verified, and what a prune moves meanwhile is found again.
func (a *app) look(ctx context.Context, host string, fn func(ctx context.Context, l *looker) error) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	p, err := a.place(cfg, a.repoName)
	if err != nil {
		return err
	}
	if host == "" {
		if host, err = a.device(cfg); err != nil {
			return err
		}
	}
	return a.withRepository(ctx, p, access{readOnly: true, brief: true, index: true}, func(ctx context.Context, s *session) error {
		return fn(ctx, &looker{s, cfg, browse.New(s.repo, browse.Options{}), host})
	})
}

// chosen returns the snapshots of a device, those of some volumes if any are
// named.
func (l *looker) chosen(volumes []string) ([]*backup.Snapshot, error) {
	var list []*backup.Snapshot
	for _, s := range l.snapshots {
		if s.Hostname == l.host && (len(volumes) == 0 || slices.Contains(volumes, s.Volume())) {
			list = append(list, s)
		}
	}
	if len(list) == 0 {
		return nil, noSnapshots(l.session, l.host)
	}
	return list, nil
}

func (a *app) hostFlag(cmd *cobra.Command) *string {
	host := cmd.Flags().String("host", "", "of this `device` (default this one)")
	complete(cmd, "host", a.completeHosts)
	return host
}

func (a *app) volumeFlag(cmd *cobra.Command) *[]string {
	volumes := cmd.Flags().StringArray("volume", nil, "of this `volume` only; may be given more than once")
	complete(cmd, "volume", a.completeVolumes)
	return volumes
}

// completeSnapshot offers volumes and snapshots for the first n arguments.
func (a *app) completeSnapshot(n int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= n {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		volumes, _ := a.completeVolumes(cmd, nil, word)
		ids, d := a.completeSnapshots(cmd, nil, word)
		return append(volumes, ids...), d
	}
}

// snapshotHelp is in the help of verbs that take a snapshot.
const snapshotHelp = `The snapshot is named by the first digits of its ID, or by its volume and a time
as for --at. PATH is below the volume, or absolute.`

// An entryLine is an entry in JSON.
type entryLine struct {
	Event string `json:"event"` // "entry"
	Path  string `json:"path"`
	// Raw holds the path's bytes, in base64, where they are not UTF-8.
	Raw string `json:"path_raw,omitempty"`
	nodeFields
}

type nodeFields struct {
	Type   backup.NodeType `json:"type"`
	Mode   string          `json:"mode"`
	UID    uint32          `json:"uid"`
	GID    uint32          `json:"gid"`
	User   string          `json:"user,omitempty"`
	Group  string          `json:"group,omitempty"`
	Size   uint64          `json:"size"`
	MTime  time.Time       `json:"mtime"`
	Target string          `json:"target,omitempty"`
}

func newNodeFields(n *backup.Node, loc *time.Location) nodeFields {
	return nodeFields{n.Type, n.Mode.String(), n.UID, n.GID, n.User, n.Group, n.Size, n.ModTime.In(loc), n.LinkTarget}
}

// rawPath returns a path in base64 where JSON can't have it as it is.
func rawPath(p string) string {
	if utf8.ValidString(p) {
		return ""
	}
	return base64.StdEncoding.EncodeToString([]byte(p))
}

// shown returns a path as it is printed for people.
func shown(p string, n *backup.Node) string {
	p = printable(p)
	switch n.Type {
	case backup.Dir:
		p += "/"
	case backup.Symlink:
		p += " -> " + printable(n.LinkTarget)
	}
	return p
}

// A versionLine is a version of a file in JSON.
type versionLine struct {
	Event string `json:"event,omitempty"` // "version", where it stands alone
	nodeFields
	Snapshots []string `json:"snapshots"`
}

// span says in which snapshots a version is.
func span(list []*backup.Snapshot, loc *time.Location) string {
	first, last := list[0], list[len(list)-1]
	if len(list) == 1 {
		return fmt.Sprintf("%s  %s", first.ID.Short(), clock(first.Time, loc))
	}
	return fmt.Sprintf("%s  %s  to %s  %s  (%d snapshots)", first.ID.Short(), clock(first.Time, loc), last.ID.Short(), clock(last.Time, loc), len(list))
}

func snapshotIDs(list []*backup.Snapshot) []string {
	ids := make([]string, len(list))
	for i, s := range list {
		ids[i] = s.ID.String()
	}
	return ids
}

// troubles tells what can't be read and remembers that it was told.
type troubles struct {
	a    *app
	some bool
}

func (t *troubles) tell(err error) {
	t.some = true
	t.a.warn("%v", err)
}

// err is the result of a verb that told its troubles.
func (t *troubles) err(unread error) error {
	if t.some || unread != nil {
		return errWarned
	}
	return nil
}
