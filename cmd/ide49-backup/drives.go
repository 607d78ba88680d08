package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/iot49/ide49-backup/mounts"
)

func (a *app) drivesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drives",
		Short: "List the drives that are plugged in, and why one is not mounted",
		Long: `Lists the USB drives, card readers and other removable disks: where each is
mounted, how full it is, and, for one that is not mounted, why and what to do.`,
		Example: `  ide49-backup drives
  ide49-backup drives --json
  ide49-backup drives eject BACKUP`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return group(cmd, args)
			}
			return a.drivesList(cmd.Context())
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.AddCommand(a.drivesMountCommand(), a.drivesEjectCommand(), a.drivesPrepareCommand())
	return cmd
}

// driveConfig says how drives are treated.
func (a *app) driveConfig() (mounts.DriveConfig, error) {
	dir, err := a.state()
	if err != nil {
		return mounts.DriveConfig{}, err
	}
	return mounts.DriveConfig{StateDir: filepath.Join(dir, "drives")}, nil
}

// withDrives calls fn with the drives, as the daemon is not there to ask.
func (a *app) withDrives(ctx context.Context, fn func(context.Context, *mounts.Drives) error) error {
	cfg, err := a.driveConfig()
	if err != nil {
		return err
	}
	events := mounts.DriveEvents{Failed: func(err error) { a.warn("%v", err) }}
	return mounts.Once(ctx, cfg, events, fn)
}

// A driveLine is a drive as --json shows it.
type driveLine struct {
	Name     string            `json:"name"`
	Device   string            `json:"device"`
	Disk     string            `json:"disk"`
	Vendor   string            `json:"vendor,omitempty"`
	Model    string            `json:"model,omitempty"`
	Serial   string            `json:"serial,omitempty"`
	Label    string            `json:"label,omitempty"`
	Type     string            `json:"type,omitempty"`
	UUID     string            `json:"uuid,omitempty"`
	PartUUID string            `json:"partuuid,omitempty"`
	Size     int64             `json:"size"`
	Used     *int64            `json:"used,omitempty"`
	Free     *int64            `json:"free,omitempty"`
	Path     string            `json:"path,omitempty"`
	ReadOnly bool              `json:"read_only,omitempty"`
	Since    *time.Time        `json:"since,omitempty"`
	State    mounts.DriveState `json:"state"`
	Reason   string            `json:"reason,omitempty"`
	Remedy   string            `json:"remedy,omitempty"`
	Note     string            `json:"note,omitempty"`
}

func newDriveLine(d mounts.Drive) driveLine {
	l := driveLine{
		Name: d.Name, Device: d.Device, Disk: d.Disk, Vendor: d.Vendor, Model: d.Model, Serial: d.Serial, Label: d.Label, Type: d.Type,
		UUID: d.UUID, PartUUID: d.PartUUID, Size: d.Size, Path: d.Path, ReadOnly: d.ReadOnly, State: d.State,
		Reason: d.Reason, Remedy: d.Remedy, Note: d.Note,
	}
	if d.State == mounts.DriveMounted {
		l.Used, l.Free, l.Since = &d.Used, &d.Free, &d.Since
	}
	return l
}

func (a *app) drivesList(ctx context.Context) error {
	cfg, err := a.driveConfig()
	if err != nil {
		return err
	}
	list, err := mounts.Present(ctx, cfg)
	if err != nil {
		return err
	}
	if a.json {
		lines := make([]driveLine, 0, len(list))
		for _, d := range list {
			lines = append(lines, newDriveLine(d))
		}
		return a.printJSON(lines)
	}
	if len(list) == 0 {
		a.say("no drives are plugged in")
		return nil
	}
	t := newTable("Name", "Device", "Label", "Type", ">Size", ">Used", "Where", "Since", "State")
	for _, d := range list {
		used, since, state := "", "", string(d.State)
		if d.State == mounts.DriveMounted {
			used, since = bytesText(uint64(d.Used)), clock(d.Since, time.Local)
			if d.ReadOnly {
				state += ", read-only"
			}
		}
		t.add(d.Name, d.Device, d.Label, d.Type, bytesText(uint64(d.Size)), used, d.Path, since, state)
	}
	if err := t.print(a, ""); err != nil {
		return err
	}
	for _, d := range list {
		for _, text := range []string{d.Reason, d.Note} {
			if text == "" {
				continue
			}
			if d.Remedy != "" && text == d.Reason {
				text += "; " + d.Remedy
			}
			a.say("%s: %s", printable(d.Name), printable(text))
		}
	}
	return nil
}

func (a *app) drivesMountCommand() *cobra.Command {
	var opt mounts.DriveMountOptions
	cmd := &cobra.Command{
		Use:   "mount DEVICE",
		Short: "Mount a drive now",
		Long: `Mounts a drive that was ejected, that could not be mounted before, or that is
not taken for a drive by itself. It stays mounted when the command ends. Disks
that the system uses are refused.`,
		Example: `  ide49-backup drives mount sda1
  ide49-backup drives mount /dev/sda1 --at /mnt/old --read-only`,
		Args:              positional(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeDrives,
		RunE: func(cmd *cobra.Command, args []string) error {
			if opt.At != "" {
				at, err := filepath.Abs(opt.At)
				if err != nil {
					return usagef("--at %s: %w", opt.At, err)
				}
				opt.At = at
			}
			return a.withDrives(cmd.Context(), func(ctx context.Context, d *mounts.Drives) error {
				drive, err := d.Mount(ctx, args[0], opt)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(newDriveLine(drive))
				}
				how := ""
				if drive.ReadOnly {
					how = " read-only"
				}
				a.say("%s is mounted at %s%s", drive.Device, printable(drive.Path), how)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&opt.At, "at", "", "mount it at this `folder` (default: below /mnt, by its label)")
	f.BoolVar(&opt.ReadOnly, "read-only", false, "write nothing to it, not even a journal")
	complete(cmd, "at", completeFolders)
	return cmd
}

func (a *app) drivesEjectCommand() *cobra.Command {
	var opt mounts.EjectOptions
	cmd := &cobra.Command{
		Use:   "eject NAME",
		Short: "Write everything to a drive and unmount it, so that it can be pulled out",
		Long: `Writes everything to the disk that holds the drive, unmounts all drives on it,
and powers its port off where that is possible. It is safe to pull the disk out
when the command says so, and only then. A drive in use stays mounted, and who
uses it is told. NAME is the drive's name, label, UUID, folder or device.`,
		Example: `  ide49-backup drives eject BACKUP
  ide49-backup drives eject BACKUP --wait`,
		Args:              positional(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeDrives,
		RunE: func(cmd *cobra.Command, args []string) error {
			opt.Progress = a.ejectProgress()
			var done mounts.Ejected
			err := a.withDrives(cmd.Context(), func(ctx context.Context, d *mounts.Drives) (err error) {
				done, err = d.Eject(ctx, args[0], opt)
				return err
			})
			if err != nil {
				return err
			}
			if a.json {
				err = a.printLine(struct {
					Event   string   `json:"event"`
					Disk    string   `json:"disk"`
					Drives  []string `json:"drives"`
					Safe    bool     `json:"safe"`
					Power   bool     `json:"powered_off"`
					Comment string   `json:"comment,omitempty"`
				}{"ejected", done.Disk, done.Drives, done.Safe, done.Power, done.Comment})
			}
			switch {
			case err != nil:
				return err
			case !done.Safe:
				a.warn("%s is unmounted here, but it is not safe to remove: %s", args[0], done.Comment)
				return errWarned
			}
			a.say("%s is safe to remove", printable(args[0]))
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&opt.Wait, "wait", false, "wait until nobody uses the drive")
	f.BoolVar(&opt.KeepPower, "keep-power", false, "leave the port on, so that the drive can be mounted again")
	return cmd
}

// ejectProgress tells how an eject goes on: lines of JSON, or a line for
// people when something changes.
func (a *app) ejectProgress() func(mounts.EjectProgress) {
	var last string
	return func(p mounts.EjectProgress) {
		if a.json {
			line := struct {
				Event   string   `json:"event"`
				Step    string   `json:"step"`
				Written int64    `json:"bytes_written"`
				Left    int64    `json:"bytes_left_at_most"`
				Holders []string `json:"used_by,omitempty"`
			}{Event: "progress", Step: string(p.Step), Written: p.Written, Left: p.Left}
			for _, h := range p.Holders {
				line.Holders = append(line.Holders, h.String())
			}
			_ = a.printLine(line) // a reader that went away does not stop the eject
			return
		}
		var text string
		switch p.Step {
		case mounts.StepSync:
			if p.Written == 0 {
				return // perhaps there is nothing to write
			}
			text = fmt.Sprintf("writing: %s written", bytesText(uint64(p.Written)))
		case mounts.StepWait:
			who := "a process that can't be seen from here"
			if len(p.Holders) > 0 {
				who = p.Holders[0].String()
			}
			text = "waiting for " + who
		default:
			return
		}
		if text != last && !a.quiet {
			fmt.Fprintln(a.stderr, printable(text))
		}
		last = text
	}
}

func (a *app) drivesPrepareCommand() *cobra.Command {
	var opt mounts.PrepareOptions
	var confirm string
	cmd := &cobra.Command{
		Use:   "prepare DEVICE",
		Short: "Make an empty backup drive; everything on it is lost",
		Long: `Makes a new file system over all of a disk or partition. What is on it is
shown first, and the last four characters of its serial number must be typed.
Mounted drives and disks that the system uses are refused.`,
		Example: `  ide49-backup drives prepare sda
  ide49-backup drives prepare sda --type exfat --label PHOTOS`,
		Args:              positional(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeDrives,
		RunE: func(cmd *cobra.Command, args []string) error {
			opt.Confirm = func(c mounts.Contents) (string, error) { return a.confirmPrepare(c, confirm) }
			if err := a.withDrives(cmd.Context(), func(ctx context.Context, d *mounts.Drives) error {
				return d.Prepare(ctx, args[0], opt)
			}); err != nil {
				if errors.Is(err, mounts.ErrNotConfirmed) {
					return &usageError{err}
				}
				return err
			}
			if a.json {
				return a.printJSON(struct {
					Device string `json:"device"`
					Type   string `json:"type"`
					Label  string `json:"label"`
				}{args[0], opt.Type, opt.Label})
			}
			a.say("%s is prepared as %s, labelled %s", args[0], opt.Type, opt.Label)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&opt.Type, "type", "ext4", "`file system`: ext4, or exfat for use on Windows and macOS too")
	f.StringVar(&opt.Label, "label", "BACKUP", "the drive's `name`")
	f.StringVar(&confirm, "confirm", "", "the `text` that would be asked for, for scripts")
	complete(cmd, "type", words("ext4", "exfat"))
	complete(cmd, "label", cobra.NoFileCompletions)
	complete(cmd, "confirm", cobra.NoFileCompletions)
	return cmd
}

// confirmPrepare shows what is lost and reads what is typed.
func (a *app) confirmPrepare(c mounts.Contents, confirm string) (string, error) {
	// Not by say: who decides must see it, also with --quiet or --json.
	tell := func(format string, args ...any) {
		fmt.Fprintln(a.stderr, printable(fmt.Sprintf(format, args...)))
	}
	model := strings.TrimSpace(c.Vendor + " " + c.Model)
	if model == "" {
		model = "unknown model"
	}
	tell("%s: %s, serial %s, %s", c.Device, model, orNone(c.Serial), bytesText(uint64(c.Size)))
	for _, p := range c.Parts {
		what := p.Type
		if what == "" {
			what = "a partition table"
		}
		tell("  %s: %s, label %s, %s", p.Device, what, orNone(p.Label), bytesText(uint64(p.Size)))
	}
	if len(c.Parts) == 0 {
		tell("  nothing known is on it")
	}
	if confirm != "" {
		return confirm, nil
	}
	fmt.Fprintf(a.stderr, "Everything on it will be lost. Type %s: ", printable(c.Ask))
	line, err := bufio.NewReader(a.stdin).ReadString('\n')
	if err != nil && line == "" {
		return "", fmt.Errorf("%w: nothing was typed: %w", mounts.ErrNotConfirmed, err)
	}
	return line, nil
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// completeDrives offers the names of the drives that are plugged in.
func (a *app) completeDrives(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	cfg, err := a.driveConfig()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 5*time.Second)
	defer cancel()
	list, err := mounts.Present(ctx, cfg)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, d := range list {
		names = append(names, cobra.CompletionWithDesc(printable(d.Name), strings.TrimSpace(d.Device+" "+printable(d.Model))))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
