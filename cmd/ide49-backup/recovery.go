package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/recovery"
)

func (a *app) recoveryKitCommand() *cobra.Command {
	var html, with bool
	var out string
	cmd := &cobra.Command{
		Use:   "recovery-kit",
		Short: "Print the page that brings everything back",
		Long: `Prints a page to keep away from the device: where the repositories are, their ids
and keys, the exact commands that bring everything back on another machine, with
this program or with stock restic, and a line for the password. Repositories that
can't be looked at now are on it too, with what is wrong.`,
		Example: `  ide49-backup recovery-kit
  ide49-backup recovery-kit --html --output kit.html
  ide49-backup recovery-kit --with-password | lp`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.recoveryKit(cmd.Context(), html, with, out)
		},
	}
	cmd.Flags().BoolVar(&html, "html", false, "make an HTML page")
	cmd.Flags().BoolVar(&with, "with-password", false, "print the passwords too: anybody who sees the page can read everything")
	cmd.Flags().StringVarP(&out, "output", "o", "", "write a new `file`, readable by its owner only")
	complete(cmd, "output", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault
	})
	return cmd
}

func (a *app) recoveryKit(ctx context.Context, html, with bool, out string) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	device, err := a.device(cfg)
	if err != nil {
		return err
	}
	var places []place
	if a.repoName != "" || a.passwordFile != "" {
		p, err := a.place(cfg, a.repoName)
		if err != nil {
			return err
		}
		places = append(places, p)
	} else {
		for _, name := range slices.Sorted(maps.Keys(cfg.Repositories)) {
			r := cfg.Repositories[name]
			places = append(places, place{string(name), r.URL, r.Secret()})
		}
	}
	kit := &recovery.Kit{Device: device, Made: a.now().In(cfg.Location()), Program: program()}
	warned := false
	for _, p := range places {
		r, err := a.recoverable(ctx, p, device, with)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			a.warn("%v", err)
			warned = true
			r.Problem = strings.ReplaceAll(err.Error(), "\n", "; ")
		}
		kit.Repositories = append(kit.Repositories, r)
	}
	var page bytes.Buffer
	switch {
	case a.json:
		enc := json.NewEncoder(&page)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		err = enc.Encode(kit)
	case html:
		err = kit.HTML(&page)
	default:
		err = kit.Text(&page)
	}
	if err != nil {
		return err
	}
	if err := a.writeKit(out, page.Bytes()); err != nil {
		return fmt.Errorf("write the recovery kit: %w", err)
	}
	if warned {
		return errWarned
	}
	return nil
}

// writeKit puts the page into a new file, or on stdout.
func (a *app) writeKit(out string, page []byte) error {
	if out == "" {
		_, err := a.stdout.Write(page)
		return err
	}
	path, err := filepath.Abs(out)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); err == nil {
		return &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	}
	return writeNew(path, page, 0o600)
}

// recoverable returns what the page says about one repository. With an error,
// that is what is known without looking at it.
func (a *app) recoverable(ctx context.Context, p place, device string, with bool) (recovery.Repository, error) {
	r := recovery.Repository{Name: p.name, Address: p.location.String(), PasswordFile: p.secret.File()}
	if with {
		var err error
		if r.Password, err = p.password(ctx); err != nil {
			return r, err
		}
	}
	err := a.withRepository(ctx, p, access{readOnly: true, brief: true}, func(ctx context.Context, s *session) error {
		keys, err := s.repo.Keys(ctx)
		if err != nil {
			return err
		}
		r.ID = s.repo.Config().ID
		for _, k := range keys {
			if k.Err == nil {
				r.Keys = append(r.Keys, recovery.Key{ID: k.ID, Created: k.Created, Owner: k.Username + "@" + k.Hostname, Current: k.Current})
			}
		}
		r.Volumes = recovery.Volumes(s.snapshots, device)
		return nil
	})
	return r, err
}
