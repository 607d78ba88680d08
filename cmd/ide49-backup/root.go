package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/policy"
)

// verbs lists the commands in the order of --help. A new verb is a file with
// its function and one line here.
func verbs() []func(*app) *cobra.Command {
	return []func(*app) *cobra.Command{
		(*app).initCommand,
		(*app).backupCommand,
		(*app).restoreCommand,
		(*app).snapshotsCommand,
		(*app).lsCommand,
		(*app).findCommand,
		(*app).historyCommand,
		(*app).diffCommand,
		(*app).catCommand,
		(*app).dumpCommand,
		(*app).browseCommand,
		(*app).copyCommand,
		(*app).statsCommand,
		(*app).checkCommand,
		(*app).forgetCommand,
		(*app).pinCommand,
		(*app).unpinCommand,
		(*app).tagCommand,
		(*app).keyCommand,
		(*app).unlockCommand,
		(*app).recoveryKitCommand,
		(*app).drivesCommand,
		(*app).configCommand,
		(*app).completionCommand,
		(*app).versionCommand,
		(*app).demoCommand,
	}
}

// An app is one run of the program: what it is connected to and the flags that
// all verbs have.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            policy.Env
	now            func() time.Time

	configFile   string
	repoName     string // a name from the configuration, or an address
	passwordFile string
	stateDir     string
	wait         time.Duration
	json         bool
	noColor      bool
	quiet        bool
	verbose      bool
}

// defaultState is where the device's name and the like are kept.
const defaultState = "/var/lib/ide49-backup"

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ide49-backup",
		Short: "Snapshots of every volume, and yesterday back",
		Long: `ide49-backup takes encrypted, compressed and deduplicated snapshots of every
volume of a device, and brings them back. Repositories are in restic's format:
restic reads them too.

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 done with
warnings, such as unreadable files; 10 no such repository; 11 locked; 12 wrong
password; 13 destination not present; 130 interrupted.`,
		Example: `  ide49-backup backup
  ide49-backup snapshots
  ide49-backup restore --at yesterday`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return group(cmd, args)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w; see `%s --help`", err, cmd.CommandPath())
	})
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(&cobra.Command{Hidden: true})

	f := root.PersistentFlags()
	f.StringVar(&a.configFile, "config", "", "configuration `file` (default $IDE49_BACKUP_CONFIG, else /service-config/config/backup.yaml, else /etc/ide49-backup/backup.yaml, else built in)")
	f.StringVar(&a.repoName, "repo", "", "repository: its `name` in the configuration, or a folder")
	f.StringVar(&a.passwordFile, "password-file", "", "`file` with the repository's password")
	f.StringVar(&a.stateDir, "state", "", "`folder` for the device's name and its locks (default $IDE49_BACKUP_STATE, else "+defaultState+")")
	f.DurationVar(&a.wait, "wait", 0, "how `long` to wait for others who use the repository, as 10m")
	f.BoolVar(&a.json, "json", false, "print JSON: one document, or lines while something goes on")
	f.BoolVar(&a.noColor, "no-color", false, "no colours (also by $NO_COLOR)")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "print warnings and errors only")
	f.BoolVarP(&a.verbose, "verbose", "v", false, "print more")
	complete(root, "repo", a.completeRepositories)
	for _, flag := range []string{"config", "password-file"} {
		complete(root, flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		})
	}
	complete(root, "state", completeFolders)
	complete(root, "wait", words("1m", "10m", "1h"))

	for _, verb := range verbs() {
		root.AddCommand(verb(a))
	}
	return root
}

// group is what a command with subcommands does by itself: help, or an error
// that names the nearest subcommand.
func group(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	cmd.SuggestionsMinimumDistance = 2
	hint := fmt.Sprintf("see `%s --help`", cmd.CommandPath())
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		hint = fmt.Sprintf("did you mean `%s`?", near[0])
	}
	return usagef("there is no command %q for `%s`; %s", args[0], cmd.CommandPath(), hint)
}

// positional makes what check finds a usage error.
func positional(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usagef("%w; see `%s --help`", err, cmd.CommandPath())
		}
		return nil
	}
}
