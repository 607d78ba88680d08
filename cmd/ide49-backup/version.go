package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// program is how snapshots name what made them.
func program() string { return "ide49-backup " + programVersion() }

// version is set by the linker (make build) and nobody else.
var version string

// programVersion returns the version that the linker was given, else the
// module's that the build recorded: a tag, or one that the Go tool derives from
// the commit.
func programVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return "devel"
	}
	return info.Main.Version
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  ide49-backup version\n  ide49-backup version --json",
		Args:    positional(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				System  string `json:"system"`
				Format  int    `json:"repository_format"`
			}{programVersion(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH, 2}
			if a.json {
				return a.printJSON(v)
			}
			_, err := fmt.Fprintf(a.stdout, "ide49-backup %s, %s, %s, repository format %d\n", v.Version, v.Go, v.System, v.Format)
			return err
		},
	}
}
