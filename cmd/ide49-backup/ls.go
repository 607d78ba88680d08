package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/policy"
)

// errNoSuchPath says that a snapshot lacks a path.
var errNoSuchPath = errors.New("the snapshot has no such file or folder; `ide49-backup ls` shows what it holds")

func (a *app) lsCommand() *cobra.Command {
	var recursive bool
	var host string
	cmd := &cobra.Command{
		Use:   "ls SNAPSHOT|VOLUME[@TIME] [PATH]",
		Short: "List a folder of a snapshot",
		Long: `Lists a folder of a snapshot: its root if there is no PATH. The snapshot is named
by the first digits of its ID, or by its volume and a time as for --at. PATH is
below the volume, or absolute.`,
		Example: `  ide49-backup ls mosquitto
  ide49-backup ls mosquitto@yesterday data
  ide49-backup ls 3f2a81c0 /service-config/mosquitto/data --recursive`,
		Args: positional(cobra.RangeArgs(1, 2)),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			volumes, _ := a.completeVolumes(cmd, nil, word)
			ids, d := a.completeSnapshots(cmd, nil, word)
			return append(volumes, ids...), d
		},
		RunE: func(cmd *cobra.Command, args []string) error {
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
			return a.withRepository(cmd.Context(), p, access{index: true}, func(ctx context.Context, s *session) error {
				return a.ls(ctx, cfg, s, host, args, recursive)
			})
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "list all that is below, too")
	cmd.Flags().StringVar(&host, "host", "", "of this `device` (default this one)")
	complete(cmd, "host", a.completeHosts)
	return cmd
}

func (a *app) ls(ctx context.Context, cfg *policy.Config, s *session, host string, args []string, recursive bool) error {
	sn, err := a.pick(cfg, s, host, args[0])
	if err != nil {
		return err
	}
	rel := ""
	if len(args) > 1 {
		rel = args[1]
	}
	node, err := lookup(ctx, s.repo, sn, rel)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", sn.ID.Short(), err)
	}
	lister := &lister{a: a, repo: s.repo, loc: cfg.Location(), recursive: recursive}
	if a.json {
		if err := lister.event(sn); err != nil {
			return err
		}
	} else {
		a.say("snapshot %s of %s, %s", sn.ID.Short(), printable(sn.Volume()), clock(sn.Time, cfg.Location()))
	}
	if node.Type != backup.Dir {
		return lister.print("", *node)
	}
	return lister.folder(ctx, "", node.Subtree, 0)
}

// maxDepth bounds how deep folders are followed: Linux paths have at most 4096
// bytes, and a hostile repository could go on for long.
const maxDepth = 4096

// lookup finds an entry of a snapshot by its path below the snapshot's only
// path, or by its absolute path.
func lookup(ctx context.Context, r *repo.Repo, sn *backup.Snapshot, name string) (*backup.Node, error) {
	full := name
	if !path.IsAbs(name) && len(sn.Paths) == 1 {
		full = path.Join(sn.Paths[0], name)
	}
	if sn.Tree == nil {
		return nil, fmt.Errorf("it has no tree: %w", repo.ErrDamaged)
	}
	node := &backup.Node{Type: backup.Dir, Subtree: *sn.Tree}
	for part := range strings.SplitSeq(path.Clean("/"+full), "/") {
		if part == "" {
			continue
		}
		next, err := child(ctx, r, node, part)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", full, err)
		}
		node = next
	}
	return node, nil
}

func child(ctx context.Context, r *repo.Repo, dir *backup.Node, name string) (*backup.Node, error) {
	if dir.Type != backup.Dir {
		return nil, errNoSuchPath
	}
	tree, err := r.Tree(ctx, dir.Subtree)
	if err != nil {
		return nil, err
	}
	for i := range tree.Nodes {
		if tree.Nodes[i].Name == name {
			return &tree.Nodes[i], nil
		}
	}
	return nil, errNoSuchPath
}

// A lister prints entries of a snapshot as it meets them.
type lister struct {
	a         *app
	repo      *repo.Repo
	loc       *time.Location
	recursive bool
}

func (l *lister) folder(ctx context.Context, rel string, id backup.ID, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: folders are nested too deep: %w", rel, repo.ErrDamaged)
	}
	tree, err := l.repo.Tree(ctx, id)
	if err != nil {
		return fmt.Errorf("list /%s: %w", rel, err)
	}
	for _, node := range tree.Nodes {
		name := path.Join(rel, node.Name)
		if err := l.print(name, node); err != nil {
			return err
		}
		if l.recursive && node.Type == backup.Dir {
			if err := l.folder(ctx, name, node.Subtree, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *lister) event(sn *backup.Snapshot) error {
	return l.a.printLine(struct {
		Event string `json:"event"`
		snapshotLine
	}{"snapshot", newSnapshotLine(sn, l.loc)})
}

type entryLine struct {
	Event string `json:"event"` // "entry"
	Path  string `json:"path"`
	// Raw holds the path's bytes, in base64, where they are not UTF-8.
	Raw    []byte          `json:"path_raw,omitempty"`
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

func (l *lister) print(rel string, n backup.Node) error {
	if rel == "" {
		rel = n.Name
	}
	if l.a.json {
		e := entryLine{"entry", rel, nil, n.Type, n.Mode.String(), n.UID, n.GID, n.User, n.Group, n.Size, n.ModTime.In(l.loc), n.LinkTarget}
		if !utf8.ValidString(rel) {
			e.Raw = []byte(rel)
		}
		return l.a.printLine(e)
	}
	name := printable(rel)
	switch n.Type {
	case backup.Dir:
		name += "/"
	case backup.Symlink:
		name += " -> " + printable(n.LinkTarget)
	}
	_, err := fmt.Fprintf(l.a.stdout, "%s %10s %10s %11s  %s  %s\n", n.Mode, owner(n.User, n.UID), owner(n.Group, n.GID),
		bytesText(n.Size), clock(n.ModTime, l.loc), name)
	return err
}

func owner(name string, id uint32) string {
	if name == "" {
		return fmt.Sprint(id)
	}
	return printable(name)
}
