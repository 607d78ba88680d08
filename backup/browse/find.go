package browse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/bmatcuk/doublestar/v4"

	"github.com/iot49/ide49-backup/backup"
)

// ErrPattern says that a pattern is malformed.
var ErrPattern = errors.New("it is not a valid pattern; [, ] and { come in pairs, and a backslash escapes what follows")

// A Query says what Find looks for. Conditions that are set must all hold.
type Query struct {
	// Patterns are globs, of which one must match: * and ? within a name, **
	// over folders, [a-z], {a,b}. One without a slash is compared with the
	// name, another with the whole path.
	Patterns   []string
	IgnoreCase bool
	Types      []backup.NodeType // one of them

	// Modified not before After and not after Before, where these are set.
	After, Before time.Time

	// MinSize and MaxSize bound the bytes of files, and leave out all
	// else where one is set. MaxSize 0 is no bound.
	MinSize, MaxSize uint64

	// Below restricts the search to a folder.
	Below string
}

// matcher is a checked Query.
type matcher struct {
	Query
	names, paths []string
}

func newMatcher(q Query) (*matcher, error) {
	m := &matcher{Query: q}
	for _, p := range q.Patterns {
		if q.IgnoreCase {
			p = strings.ToLower(p)
		}
		if !doublestar.ValidatePattern(p) {
			return nil, fmt.Errorf("pattern %q: %w", p, ErrPattern)
		}
		if !strings.Contains(p, "/") {
			m.names = append(m.names, p)
			continue
		}
		if !strings.HasPrefix(p, "/") {
			p = "/**/" + p
		}
		m.paths = append(m.paths, p)
	}
	return m, nil
}

// match reports whether a node in dir, which ends in a slash, is wanted.
func (m *matcher) match(dir string, n *backup.Node) bool {
	if len(m.Types) > 0 && !slices.Contains(m.Types, n.Type) {
		return false
	}
	if (m.MinSize > 0 || m.MaxSize > 0) && (n.Type != backup.File || n.Size < m.MinSize || m.MaxSize > 0 && n.Size > m.MaxSize) {
		return false
	}
	if !m.After.IsZero() && n.ModTime.Before(m.After) || !m.Before.IsZero() && n.ModTime.After(m.Before) {
		return false
	}
	if len(m.Patterns) == 0 {
		return true
	}
	fold := func(s string) string {
		if m.IgnoreCase {
			return strings.ToLower(s)
		}
		return s
	}
	name := fold(n.Name)
	if slices.ContainsFunc(m.names, func(p string) bool { return doublestar.MatchUnvalidated(p, name) }) {
		return true
	}
	if len(m.paths) == 0 {
		return false
	}
	path := fold(dir) + name
	return slices.ContainsFunc(m.paths, func(p string) bool { return doublestar.MatchUnvalidated(p, path) })
}

// A Found is what a path held, in all versions that a Query matches.
type Found struct {
	Path     string
	Versions []Version
}

// Find looks for files in all the given snapshots at once and yields them by
// path, each with its versions and the snapshots that hold these. Folders come
// before what is in them. A folder that snapshots share is read once.
//
// An error comes with the path of the folder that it concerns; the search goes
// on if the caller does.
//
// Memory is bounded by the number of folders and finds in the folders on the
// way to where the search is, in all their versions.
func (v *View) Find(ctx context.Context, snapshots []*backup.Snapshot, q Query) iter.Seq2[Found, error] {
	return func(yield func(Found, error) bool) {
		m, err := newMatcher(q)
		if err != nil {
			yield(Found{}, err)
			return
		}
		below := clean(q.Below)
		var top merged
		for i, s := range snapshots {
			n, err := v.lookup(ctx, *s.Tree, below)
			switch {
			case errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNotFolder):
				continue
			case err != nil:
				err = fmt.Errorf("snapshot %s: %w", s.ID.Short(), listError(below, err))
				if !yield(Found{Path: below}, err) || ctx.Err() != nil {
					return
				}
				continue
			}
			if n.Type == backup.Dir {
				top.addFolder(n.Subtree, []int32{int32(i)})
			}
		}
		if len(top.folders) == 0 {
			return
		}
		w := &walker[*merged]{
			load: func(ctx context.Context, path string, folder *merged) ([]*merged, error) {
				return v.merge(ctx, path, folder, m)
			},
			name:     func(f *merged) string { return f.name },
			isFolder: func(f *merged) bool { return len(f.folders) > 0 },
		}
		w.walk(ctx, below, &top, func(path string, f *merged, err error) verdict {
			if ctx.Err() != nil {
				yield(Found{Path: path}, ctx.Err())
				return stop
			}
			if f.unread != nil {
				path, err = strings.TrimSuffix(path, "/"), f.unread
			}
			if err != nil {
				if !yield(Found{Path: path}, listError(path, err)) {
					return stop
				}
				return enter
			}
			if len(f.versions) == 0 {
				return enter
			}
			found := Found{Path: path, Versions: make([]Version, len(f.versions))}
			for i, mv := range f.versions {
				found.Versions[i] = Version{mv.node, make([]*backup.Snapshot, len(mv.in))}
				for k, at := range mv.in {
					found.Versions[i].Snapshots[k] = snapshots[at]
				}
			}
			if !yield(found, nil) {
				return stop
			}
			return enter
		})
	}
}

// A merged is what all snapshots have at one path: the versions that match and
// the folders to look into. Snapshots are given by their places in the list,
// in ascending order; slices of them are shared and never changed in place.
type merged struct {
	name     string
	versions []mergedVersion
	folders  []mergedFolder
	// unread stands alone: that the folder which this is in can't be read in
	// some versions.
	unread error
}

type mergedVersion struct {
	node *backup.Node
	in   []int32
}

type mergedFolder struct {
	tree backup.ID
	in   []int32
}

func (f *merged) addFolder(tree backup.ID, in []int32) {
	for i := range slices.Backward(f.folders) {
		if f.folders[i].tree == tree {
			f.folders[i].in = union(f.folders[i].in, in)
			return
		}
	}
	f.folders = append(f.folders, mergedFolder{tree, in})
}

func (f *merged) addVersion(n *backup.Node, in []int32) {
	for i := range slices.Backward(f.versions) {
		if Compare(f.versions[i].node, n) == 0 {
			f.versions[i].in = union(f.versions[i].in, in)
			return
		}
	}
	f.versions = append(f.versions, mergedVersion{n, in})
}

// union returns the places that are in a or b, which have none in common.
func union(a, b []int32) []int32 {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return all
}

// merge lists a folder in all its versions and keeps what matches and the
// folders in it. Of versions that can't be read, what the others hold is still
// there; it fails only when none can be read.
func (v *View) merge(ctx context.Context, path string, folder *merged, m *matcher) ([]*merged, error) {
	if !strings.HasSuffix(path, "/") {
		path += "/"
	}
	byName := map[string]*merged{}
	var all []*merged
	var unread []error
	for _, f := range folder.folders {
		t, err := v.tree(ctx, f.tree)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			unread = append(unread, err)
			continue
		}
		for i := range t.Nodes {
			n := &t.Nodes[i]
			wanted := m.match(path, n)
			if !wanted && n.Type != backup.Dir {
				continue
			}
			at := byName[n.Name]
			if at == nil {
				at = &merged{name: n.Name}
				all = append(all, at)
				if len(folder.folders) > 1 {
					byName[n.Name] = at
				}
			}
			if wanted {
				kept := *n // not the whole tree with it
				at.addVersion(&kept, f.in)
			}
			if n.Type == backup.Dir {
				at.addFolder(n.Subtree, f.in)
			}
		}
	}
	if len(unread) == len(folder.folders) {
		return nil, errors.Join(unread...)
	}
	if len(folder.folders) > 1 {
		slices.SortFunc(all, func(a, b *merged) int { return cmp.Compare(a.name, b.name) })
	}
	if len(unread) > 0 {
		all = append([]*merged{{unread: errors.Join(unread...)}}, all...)
	}
	return all, nil
}
