package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/local"
	"github.com/iot49/ide49-backup/backup/crypt"
	"github.com/iot49/ide49-backup/backup/repo"
)

// unlockTime is how long opening a repository may take: long enough to slow
// down who guesses passwords.
const unlockTime = 500 * time.Millisecond

func (a *app) initCommand() *cobra.Command {
	group := false
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make the configured repository",
		Long: `Makes the configured repository. If its password file is not there, a random
password is written to it, readable by its owner only. Keep a copy of that file
elsewhere: without the password nothing can be restored.`,
		Example: `  ide49-backup init
  ide49-backup init --repo drive
  ide49-backup init --repo /mnt/BACKUP/ide49 --password-file ./backup.key`,
		Args:              positional(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			p, err := a.place(cfg, a.repoName)
			if err != nil {
				return err
			}
			made, err := initRepository(cmd.Context(), p, local.Options{GroupAccess: group})
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(made)
			}
			made.print(a)
			return nil
		},
	}
	cmd.Flags().BoolVar(&group, "group-access", false, "let the group of the repository's folder use it too")
	return cmd
}

// A newRepository is what initRepository has made.
type newRepository struct {
	Repository   string `json:"repository"`
	ID           string `json:"id"`
	PasswordFile string `json:"password_file,omitempty"`
	// NewPassword says that the password was made, too.
	NewPassword bool `json:"new_password"`
}

func (n newRepository) print(a *app) {
	a.say("made repository %s", n.Repository)
	if n.NewPassword {
		a.say("made its password: %s", n.PasswordFile)
		a.say("Keep a copy of that file elsewhere: without it nothing can be restored.")
	}
}

// initRepository makes a repository, and before that its password if that is
// to be in a file that is not there. Both are durable or absent; doing it again
// after an interruption goes on where it stopped.
func initRepository(ctx context.Context, p place, opt local.Options) (newRepository, error) {
	n := newRepository{Repository: p.location.String(), PasswordFile: p.secret.File()}
	fail := func(err error) (newRepository, error) {
		return n, fmt.Errorf("make repository %s: %w", p, err)
	}
	dir := p.location.Path()
	if _, err := os.Lstat(filepath.Join(dir, backend.ConfigKey.Path())); err == nil {
		return fail(repo.ErrExists)
	}
	if _, err := os.Stat(filepath.Dir(dir)); errors.Is(err, fs.ErrNotExist) {
		return fail(fmt.Errorf("there is no folder %s: %w", filepath.Dir(dir), errAbsent))
	}
	// Where the folder can't be made, no password is left behind.
	be, err := local.Create(dir, opt)
	if err != nil {
		return fail(err)
	}
	if n.PasswordFile != "" {
		if n.NewPassword, err = makePassword(n.PasswordFile); err != nil {
			return fail(errors.Join(err, be.Close()))
		}
	}
	password, err := p.password(ctx)
	if err != nil {
		return n, errors.Join(err, be.Close())
	}
	if err := ctx.Err(); err != nil {
		return fail(errors.Join(err, be.Close()))
	}
	r, err := repo.Init(ctx, be, password, crypt.Calibrate(unlockTime), repo.Options{})
	if err != nil {
		return fail(errors.Join(err, be.Close()))
	}
	n.ID = r.Config().ID
	return n, r.Close()
}

// newPassword returns 40 random letters and digits in groups, 200 bits, that
// can be written down and typed.
func newPassword() string {
	text := strings.ToLower(rand.Text() + rand.Text())
	var groups []string
	for i := 0; i < 40; i += 5 {
		groups = append(groups, text[i:i+5])
	}
	return strings.Join(groups, "-")
}

// makePassword writes a new password to a file that does not exist, and
// reports whether it did.
func makePassword(file string) (made bool, err error) {
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return false, fmt.Errorf("make the folder of the password file: %w", err)
	}
	if err := writeNew(file, []byte(newPassword()+"\n"), 0o600); err != nil {
		return false, fmt.Errorf("write the password file: %w", err)
	}
	return true, nil
}

// writeNew makes a file durably: it is there as a whole or not at all. A file
// of that name is never replaced.
func writeNew(file string, data []byte, mode fs.FileMode) (err error) {
	dir, name := filepath.Split(file)
	root, err := os.OpenRoot(filepath.Clean(dir))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	tmp := "." + name + "." + rand.Text()[:8]
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = renameNew(filepath.Join(dir, tmp), file)
	}
	if err != nil {
		return errors.Join(err, root.Remove(tmp))
	}
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// renameNew renames a file unless the new name is taken.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// A file system that can't: look first.
		if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
			return &fs.PathError{Op: "rename", Path: to, Err: fs.ErrExist}
		}
		return os.Rename(from, to)
	}
	if err != nil {
		return &fs.PathError{Op: "rename", Path: to, Err: err}
	}
	return nil
}
