package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// applianceVolumes is where the built-in configuration looks for volumes.
const applianceVolumes = "/service-config"

// demoFiles are the volumes of the example, one folder each.
//
//go:embed all:demo
var demoFiles embed.FS

// demoBinary are files of the example that are made, with their sizes.
func demoBinary() map[string]int {
	return map[string]int{
		"mosquitto/data/mosquitto.db":         96 << 10,
		"homeassistant/home-assistant_v2.db":  3 << 20,
		"iot-home/notebooks/images/plant.jpg": 700 << 10,
	}
}

func (a *app) demoCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Make an example with volumes and a repository, and back it up",
		Long: `Makes a folder with a few volumes, a configuration and a repository in it, where
they are not there yet, and takes a snapshot of each volume. make run uses it on
a machine that is no appliance. On one, where /service-config is there, it just
backs up with the built-in configuration unless --dir is given.`,
		Example: "  ide49-backup demo --dir ./example",
		Hidden:  true,
		Args:    positional(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.configFile != "" || a.repoName != "" || a.passwordFile != "" || a.stateDir != "" {
				return usagef("demo has a configuration of its own; leave out --config, --repo, --password-file and --state")
			}
			// An appliance shows it with its own volumes.
			if st, err := os.Stat(applianceVolumes); err == nil && st.IsDir() && !cmd.Flags().Changed("dir") {
				if err := a.sub(cmd.Context(), "backup"); err != nil {
					return err
				}
				a.sayHow("", "/tmp/restored", "/backup", "/service-config/config/backup.key")
				return nil
			}
			return a.demo(cmd.Context(), dir)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "./example", "`folder` of the example")
	complete(cmd, "dir", completeFolders)
	return cmd
}

func (a *app) demo(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("example folder: %w", err)
	}
	config := filepath.Join(dir, "backup.yaml")
	if err := makeDemo(dir, config); err != nil {
		return fmt.Errorf("make the example in %s: %w", dir, err)
	}
	a.say("the example is in %s", near(dir))
	a.say("")
	verb := func(name string) error {
		return a.sub(ctx, name, "--config", config, "--state", filepath.Join(dir, "state"))
	}
	if _, err := os.Lstat(filepath.Join(dir, "backup", "config")); errors.Is(err, fs.ErrNotExist) {
		if err := verb("init"); err != nil {
			return err
		}
		a.say("")
	}
	if err := verb("backup"); err != nil {
		return err
	}
	a.sayHow(" --config "+near(config), near(filepath.Join(dir, "restored")), near(filepath.Join(dir, "backup")), near(filepath.Join(dir, "backup.key")))
	return nil
}

// sub carries out another verb, with this run's ways to print.
func (a *app) sub(ctx context.Context, args ...string) error {
	sub := &app{stdin: a.stdin, stdout: a.stdout, stderr: a.stderr, env: a.env, now: a.now}
	for _, flag := range []struct {
		name string
		set  bool
	}{{"--json", a.json}, {"--quiet", a.quiet}, {"--verbose", a.verbose}, {"--no-color", a.noColor}} {
		if flag.set {
			args = append(args, flag.name)
		}
	}
	root := sub.root()
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// sayHow tells how to restore.
func (a *app) sayHow(flags, target, repository, passwordFile string) {
	self := "ide49-backup"
	if exe, err := os.Executable(); err == nil {
		self = near(exe)
	}
	a.say(`
Bring them back:
  %[1]s%[2]s restore --at now --to %[3]s
or with restic, which reads the same repository:
  restic -r %[4]s --password-file %[5]s restore latest --tag volume:mosquitto --target %[3]s
See also:
  %[1]s%[2]s snapshots
  %[1]s --help`, self, flags, target, repository, passwordFile)
}

// near returns a path relative to the working folder if that is shorter.
func near(name string) string {
	wd, err := os.Getwd()
	if err != nil {
		return name
	}
	rel, err := filepath.Rel(wd, name)
	if err != nil || len(rel)+2 >= len(name) || strings.HasPrefix(rel, "..") {
		return name
	}
	return "./" + rel
}

// makeDemo makes what is missing of the example, and changes nothing that is
// there.
func makeDemo(dir, config string) error {
	volumes := filepath.Join(dir, "volumes")
	err := fs.WalkDir(demoFiles, "demo", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel("demo", name)
		if err != nil {
			return err
		}
		target := filepath.Join(volumes, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o755)
		}
		data, err := demoFiles.ReadFile(name)
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if filepath.Ext(name) == ".py" {
			mode = 0o755
		}
		return writeOnce(target, data, mode)
	})
	if err != nil {
		return err
	}
	for name, size := range demoBinary() {
		var seed [32]byte
		copy(seed[:], name)
		data := make([]byte, size)
		// It never fails; half of it can be compressed.
		_, _ = rand.NewChaCha8(seed).Read(data[:size/2])
		if err := writeOnce(filepath.Join(volumes, name), data, 0o644); err != nil {
			return err
		}
	}
	if err := os.Symlink("temperature.ipynb", filepath.Join(volumes, "iot-home/notebooks/latest.ipynb")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	text := fmt.Sprintf(`# A configuration of ide49-backup: see docs/ or ide49-backup config schema.
device: example

repositories:
  local:
    url: %q
    password_file: %q

volumes:
  discover: %q
  exclude: ["*.tmp", "**/.cache"]
`, filepath.Join(dir, "backup"), filepath.Join(dir, "backup.key"), volumes)
	return writeOnce(config, []byte(text), 0o600)
}

// writeOnce makes a file unless it is there.
func writeOnce(name string, data []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	err := writeNew(name, data, mode)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}
