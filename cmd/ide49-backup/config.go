package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/policy"
)

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check or show the configuration, or print its schema",
		Example: `  ide49-backup config check
  ide49-backup config show
  ide49-backup config schema > backup.schema.json`,
		Args: cobra.ArbitraryArgs,
		RunE: group,
	}
	cmd.AddCommand(
		&cobra.Command{
			Use:     "check [FILE]",
			Short:   "Print everything that is wrong with the configuration",
			Example: "  ide49-backup config check\n  ide49-backup config check ./backup.yaml --json",
			Args:    positional(cobra.MaximumNArgs(1)),
			RunE: func(cmd *cobra.Command, args []string) error {
				if len(args) == 1 {
					a.configFile = args[0]
				}
				return a.configCheck()
			},
		},
		&cobra.Command{
			Use:               "show",
			Short:             "Print the configuration with all defaults, without passwords",
			Example:           "  ide49-backup config show",
			Args:              positional(cobra.NoArgs),
			ValidArgsFunction: cobra.NoFileCompletions,
			RunE:              func(*cobra.Command, []string) error { return a.configShow() },
		},
		&cobra.Command{
			Use:               "schema",
			Short:             "Print a JSON schema of the configuration for editors",
			Example:           "  ide49-backup config schema > backup.schema.json",
			Args:              positional(cobra.NoArgs),
			ValidArgsFunction: cobra.NoFileCompletions,
			RunE: func(*cobra.Command, []string) error {
				schema, err := policy.Schema()
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(a.stdout, "%s\n", bytes.TrimSpace(schema))
				return err
			},
		},
	)
	return cmd
}

func (a *app) configCheck() error {
	cfg, problems, err := policy.Check(a.configFile, a.env)
	bad, isBad := errors.AsType[*policy.Errors](err)
	if isBad {
		problems = bad.Problems
	} else if err != nil {
		return &usageError{err}
	}
	file := "the built-in configuration"
	switch {
	case cfg != nil && cfg.File != "":
		file = cfg.File
	case isBad && len(problems) > 0 && problems[0].File != "":
		file = problems[0].File
	}
	if a.json {
		doc := struct {
			File     string           `json:"file"`
			Usable   bool             `json:"usable"`
			Problems []policy.Problem `json:"problems"`
		}{file, err == nil, problems}
		if doc.Problems == nil {
			doc.Problems = []policy.Problem{}
		}
		if err := a.printJSON(doc); err != nil {
			return err
		}
	} else if err := policy.Print(a.stdout, problems, a.colors(a.stdout)); err != nil {
		return err
	}
	switch {
	case isBad:
		return usagef("%s can't be used; correct what `ide49-backup config check` shows", file)
	case len(problems) > 0:
		return errWarned
	case a.json || a.quiet:
		return nil
	}
	_, err = fmt.Fprintf(a.stdout, "%s: nothing is wrong\n", file)
	return err
}

func (a *app) configShow() error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	if !a.json {
		return cfg.Show(a.stdout)
	}
	var text bytes.Buffer
	if err := cfg.Show(&text); err != nil {
		return err
	}
	doc, err := yaml.YAMLToJSON(text.Bytes())
	if err != nil {
		return fmt.Errorf("show configuration: %w", err)
	}
	return a.printJSON(json.RawMessage(doc))
}
