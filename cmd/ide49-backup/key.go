package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
	"github.com/iot49/ide49-backup/policy"
)

func (a *app) keyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key list|add|remove|passwd|test",
		Short: "Passwords of the repository",
		Long: `A repository has one or more keys, each opened by a password of its own; every
one of them opens everything. Stock restic uses the same keys.`,
		Example: `  ide49-backup key list
  ide49-backup key add --new-password-file ./second.key
  ide49-backup key remove 2c70e12b
  ide49-backup key passwd --new-password-file ./new.key
  ide49-backup key test ./second.key`,
		Args: cobra.ArbitraryArgs,
		RunE: group,

		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.AddCommand(a.keyListCommand(), a.keyAddCommand(), a.keyRemoveCommand(), a.keyPasswdCommand(), a.keyTestCommand())
	return cmd
}

type keyLine struct {
	ID      string    `json:"id"`
	Current bool      `json:"current"`
	Created time.Time `json:"created"`
	User    string    `json:"user"`
	Host    string    `json:"host"`
	Error   string    `json:"error,omitempty"`
}

func newKeyLine(k repo.KeyInfo) keyLine {
	l := keyLine{k.ID.String(), k.Current, k.Created, k.Username, k.Hostname, ""}
	if k.Err != nil {
		l.Error = k.Err.Error()
	}
	return l
}

func (a *app) keyListCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "list",
		Short:             "List the keys; * is the one in use",
		Example:           "  ide49-backup key list\n  ide49-backup key list --json",
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			return a.onRepository(cmd.Context(), access{readOnly: true, brief: true}, func(ctx context.Context, s *session) error {
				keys, err := s.repo.Keys(ctx)
				if err != nil {
					return err
				}
				lines := []keyLine{}
				t := newTable("", "Key", "Made", "User", "Host", "")
				for _, k := range keys {
					l := newKeyLine(k)
					lines = append(lines, l)
					mark, made := "", ""
					if k.Current {
						mark = "*"
					}
					if k.Err == nil {
						made = clock(k.Created, cfg.Location())
					}
					t.add(mark, k.ID.Short(), made, k.Username, k.Hostname, l.Error)
				}
				if a.json {
					return a.printJSON(lines)
				}
				return t.print(a, "")
			})
		},
	}
}

// newSecret reads the password for a new key.
func (a *app) newSecret(ctx context.Context, file string) (string, error) {
	if file == "" {
		return "", usagef("give the new password in a file: --new-password-file FILE")
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return "", fmt.Errorf("password file %s: %w", file, err)
	}
	text, err := policy.SecretFile(path).Read(ctx)
	if err != nil {
		return "", &usageError{fmt.Errorf("new password: %w", err)}
	}
	defer clear(text)
	return string(text), nil
}

func newPasswordFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "new-password-file", "", "`file` with the new password")
	complete(cmd, "new-password-file", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveDefault
	})
}

func (a *app) keyAddCommand() *cobra.Command {
	var file, user, host string
	cmd := &cobra.Command{
		Use:               "add --new-password-file FILE",
		Short:             "Add a key with another password",
		Example:           "  ide49-backup key add --new-password-file ./second.key --host laptop",
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			password, err := a.newSecret(cmd.Context(), file)
			if err != nil {
				return err
			}
			return a.onRepository(cmd.Context(), access{locksToo: true}, func(ctx context.Context, s *session) error {
				id, err := s.repo.AddKey(ctx, password, crypt.Calibrate(unlockTime), user, host)
				if err != nil {
					return err
				}
				return a.printKey("added", keyLine{ID: id.String()})
			})
		},
	}
	newPasswordFlag(cmd, &file)
	cmd.Flags().StringVar(&user, "user", "", "note this `name` in the key (default yours)")
	cmd.Flags().StringVar(&host, "host", "", "note this `machine` in the key (default this one)")
	complete(cmd, "user", cobra.NoFileCompletions)
	complete(cmd, "host", cobra.NoFileCompletions)
	return cmd
}

// printKey says what happened to a key.
func (a *app) printKey(verb string, l keyLine) error {
	if a.json {
		return a.printJSON(struct {
			Done string `json:"done"`
			ID   string `json:"id"`
		}{verb, l.ID})
	}
	a.say("%s key %s", verb, l.ID[:8])
	return nil
}

func (a *app) keyRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "remove KEY",
		Short: "Remove a key: its password opens nothing any more",
		Long: `Removes a key, named by the beginning of its ID. The key in use and the last one
can't be removed. Who had its password may have copied the master key before:
only another repository is safe from them.`,
		Example:           "  ide49-backup key remove 2c70e12b",
		Args:              positional(cobra.ExactArgs(1)),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onRepository(cmd.Context(), access{locksToo: true}, func(ctx context.Context, s *session) error {
				keys, err := s.repo.Keys(ctx)
				if err != nil {
					return err
				}
				k, err := repo.FindKey(keys, args[0])
				if err != nil {
					return err
				}
				if err := s.repo.RemoveKey(ctx, k.ID); err != nil {
					return err
				}
				return a.printKey("removed", newKeyLine(k))
			})
		},
	}
}

func (a *app) keyPasswdCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "passwd --new-password-file FILE",
		Short: "Change the password of the key in use",
		Long: `Makes a key with the new password, sees that it opens the repository, then
removes the old one. Where the configuration names a file with the password, put
the new one there afterwards.`,
		Example:           "  ide49-backup key passwd --new-password-file ./new.key",
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			password, err := a.newSecret(cmd.Context(), file)
			if err != nil {
				return err
			}
			return a.onRepository(cmd.Context(), access{locksToo: true}, func(ctx context.Context, s *session) error {
				id, err := s.repo.ChangePassword(ctx, password, crypt.Calibrate(unlockTime))
				if err != nil {
					return err
				}
				if err := a.printKey("made", keyLine{ID: id.String()}); err != nil {
					return err
				}
				if old := s.place.secret.File(); old != "" {
					a.say("The old password is no longer good: replace %s by %s.", printable(old), printable(file))
				}
				return nil
			})
		},
	}
	newPasswordFlag(cmd, &file)
	return cmd
}

func (a *app) keyTestCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "test [FILE]",
		Short:   "See whether the password in a file opens the repository",
		Long:    "Sees whether the password in FILE, or the configured one, opens the repository, and with which key. Exit code 12 says that it does not.",
		Example: "  ide49-backup key test\n  ide49-backup key test ./second.key",
		Args:    positional(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				a.passwordFile = args[0]
			}
			return a.onRepository(cmd.Context(), access{readOnly: true, brief: true}, func(ctx context.Context, s *session) error {
				keys, err := s.repo.Keys(ctx)
				if err != nil {
					return err
				}
				for _, k := range keys {
					if k.Current {
						return a.printKey("the password opens", newKeyLine(k))
					}
				}
				return errors.New("the key that opened the repository was removed meanwhile")
			})
		},
	}
}
