package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/policy"
)

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a script that completes verbs, flags, volumes and snapshots",
		Example: `  ide49-backup completion bash > /etc/bash_completion.d/ide49-backup
  ide49-backup completion zsh > "${fpath[1]}/_ide49-backup"
  ide49-backup completion fish > ~/.config/fish/completions/ide49-backup.fish`,
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args:      positional(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch root := cmd.Root(); args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			case "fish":
				return root.GenFishCompletion(a.stdout, true)
			}
			return usagef("no completion for the shell %q; there are bash, zsh and fish", args[0])
		},
	}
}

// complete gives a flag its completions.
func complete(cmd *cobra.Command, flag string, fn cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, fn); err != nil {
		panic(fmt.Sprintf("completion of --%s: %v", flag, err)) // no such flag: a mistake in this package
	}
}

// words makes a completion that offers fixed words.
func words(list ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(list, cobra.ShellCompDirectiveNoFileComp)
}

func completeFolders(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

func (a *app) completeRepositories(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	cfg, _, err := policy.Load(a.configFile, a.env)
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var names []string
	for name, r := range cfg.Repositories {
		names = append(names, cobra.CompletionWithDesc(string(name), r.URL.String()))
	}
	return names, cobra.ShellCompDirectiveDefault // it may be a folder too
}

func completeTimes(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return []string{"now", "today", "yesterday", "monday", "1h", "1d", "1w"}, cobra.ShellCompDirectiveNoFileComp
}

// completeVolumes offers the volumes that are there now.
func (a *app) completeVolumes(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	cfg, _, err := policy.Load(a.configFile, a.env)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	volumes, _, err := policy.Volumes(cfg)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, v := range volumes {
		if !slices.Contains(args, v.Name) {
			names = append(names, cobra.CompletionWithDesc(v.Name, v.Path))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// listed returns the snapshots of the repository that the flags name, for
// completions: it tells of no fault and gives up soon.
func (a *app) listed(ctx context.Context) (list []*backup.Snapshot, loc *time.Location) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	silent := *a
	silent.stderr = io.Discard
	cfg, _, err := policy.Load(a.configFile, a.env)
	if err != nil {
		return nil, time.Local
	}
	p, err := silent.place(cfg, a.repoName)
	if err != nil {
		return nil, cfg.Location()
	}
	// A fault leaves the list empty, and there is nobody to tell.
	_ = silent.withRepository(ctx, p, access{readOnly: true, brief: true}, func(_ context.Context, s *session) error {
		list = s.snapshots
		return nil
	})
	return list, cfg.Location()
}

func (a *app) completeSnapshots(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	list, loc := a.listed(cmd.Context())
	var ids []string
	for _, s := range slices.Backward(list) {
		ids = append(ids, cobra.CompletionWithDesc(s.ID.Short(), printable(s.Volume())+" "+clock(s.Time, loc)))
	}
	return ids, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

func (a *app) completeHosts(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	list, _ := a.listed(cmd.Context())
	return hosts(list), cobra.ShellCompDirectiveNoFileComp
}
