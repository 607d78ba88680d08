// Command bench measures ide49-backup beside Debian's restic and borgbackup on
// the same data, in turns, and prints ratios of medians. It is a report: it
// judges nothing. `make bench` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	ours := flag.String("ours", "bin/ide49-backup", "our program")
	runs := flag.Int("runs", 3, "runs of each program, of which the median counts")
	only := flag.String("corpus", "", "only corpora whose name contains this")
	build := flag.Int("build", -1, "only make this corpus in -work; for the program's own use")
	work := flag.String("work", "/dev/shm", "folder for corpora and repositories; a memory file system leaves the disk out of the figures")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if *build >= 0 {
		err = corpora[*build].build(*work, rand.New(rand.NewPCG(49, 49)))
	} else {
		err = report(ctx, *ours, *work, *runs, *only)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// A corpus is one set of files to back up.
type corpus struct {
	name  string
	build func(dir string, rng *rand.Rand) error
}

var corpora = []corpus{
	{"source tree, 30,000 small files", smallFiles(30_000)},
	{"source tree, 100,000 small files", smallFiles(100_000)},
	{"source tree, 300,000 small files", smallFiles(300_000)},
	{"one incompressible file, 1 GiB", incompressible(1 << 30)},
	{"compressible logs, 512 MiB", logs(512 << 20)},
}

// A program is one of those that are compared.
type program struct {
	name    string
	env     []string
	init    func(repo string) []string
	backup  func(repo, src string) []string
	restore func(repo, dst string) []string
}

func programs(ours string) []program {
	return []program{
		{
			name:   "ide49-backup",
			env:    []string{"IDE49_BENCH_PASSWORD=bench"},
			init:   func(repo string) []string { return []string{ours, "init"} },
			backup: func(repo, src string) []string { return []string{ours, "backup", "--quiet"} },
			restore: func(repo, dst string) []string {
				return []string{ours, "restore", "--quiet", "--yes", "--at", "today", "--to", dst}
			},
		},
		{
			name: "restic",
			env:  []string{"RESTIC_PASSWORD=bench"},
			init: func(repo string) []string { return []string{"restic", "init", "-q", "-r", repo} },
			backup: func(repo, src string) []string {
				return []string{"restic", "backup", "-q", "--no-cache", "-r", repo, src}
			},
			restore: func(repo, dst string) []string {
				return []string{"restic", "restore", "-q", "--no-cache", "-r", repo, "latest", "--target", dst}
			},
		},
		{
			name: "borg",
			env:  []string{"BORG_PASSPHRASE=bench", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes"},
			init: func(repo string) []string { return []string{"borg", "init", "-e", "repokey", repo} },
			backup: func(repo, src string) []string {
				return []string{"borg", "create", repo + "::{now:%s.%f}", src}
			},
			restore: func(repo, dst string) []string {
				return []string{"sh", "-c", `cd "$1" && exec borg extract "$2::$(borg list --short --last 1 "$2")"`, "sh", dst, repo}
			},
		},
	}
}

// A figure is what one run of a program took.
type figure struct {
	wall, cpu time.Duration
	peak      int64 // KiB
}

var steps = []string{"first snapshot", "unchanged", "one file changed", "restore"}

func report(ctx context.Context, ours, work string, runs int, only string) error {
	ours, err := filepath.Abs(ours)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(work, "ide49-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for i, c := range corpora {
		if !strings.Contains(c.name, only) {
			continue
		}
		if err := compare(ctx, i, programs(ours), dir, runs); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// compare runs all programs on one corpus, in turns, and prints the result.
//
// The corpus is made by a process of its own: the kernel counts this process's
// memory to each program that it starts, so it must stay small.
func compare(ctx context.Context, index int, list []program, dir string, runs int) error {
	c := corpora[index]
	src := filepath.Join(dir, "volumes", "corpus")
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := measure(ctx, nil, []string{self, "-build", strconv.Itoa(index), "-work", src}); err != nil {
		return err
	}
	defer os.RemoveAll(filepath.Dir(src))
	figures := map[string][][]figure{} // by program, step, run
	sizes := map[string]int64{}
	for _, p := range list {
		figures[p.name] = make([][]figure, len(steps))
	}
	changed, err := anyFile(src)
	if err != nil {
		return err
	}
	for run := range runs {
		for _, p := range list {
			state := filepath.Join(dir, "state")
			repo := filepath.Join(state, "repository")
			if err := prepare(state, repo, src); err != nil {
				return err
			}
			env := append(p.env, "IDE49_BACKUP_CONFIG="+filepath.Join(state, "config.yaml"), "IDE49_BACKUP_STATE="+filepath.Join(state, "state"),
				"BORG_BASE_DIR="+state, "XDG_CACHE_HOME="+state)
			if _, err := measure(ctx, env, p.init(repo)); err != nil {
				return err
			}
			dst := filepath.Join(state, "restored")
			if err := os.Mkdir(dst, 0o700); err != nil {
				return err
			}
			for i, step := range steps {
				args := p.backup(repo, src)
				switch step {
				case "one file changed":
					if err := os.WriteFile(changed, fmt.Appendf(nil, "changed in run %d for %s", run, p.name), 0o644); err != nil {
						return err
					}
				case "restore":
					args = p.restore(repo, dst)
				}
				f, err := measure(ctx, env, args)
				if err != nil {
					return err
				}
				figures[p.name][i] = append(figures[p.name][i], f)
			}
			if sizes[p.name], err = diskUsage(repo); err != nil {
				return err
			}
			if err := errors.Join(os.RemoveAll(state)); err != nil {
				return err
			}
		}
	}
	return show(c, list, figures, sizes, runs)
}

// prepare makes the folder of one run, with a configuration for us.
func prepare(state, repo, src string) error {
	if err := os.MkdirAll(filepath.Join(state, "state"), 0o700); err != nil {
		return err
	}
	config := fmt.Sprintf("device: bench\nrepositories:\n  local:\n    url: %s\n    password: bench\nvolumes:\n  discover: %s\n", repo, filepath.Dir(src))
	return os.WriteFile(filepath.Join(state, "config.yaml"), []byte(config), 0o600)
}

// measure runs a program and returns what it took by the kernel's account.
func measure(ctx context.Context, env, args []string) (figure, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	err := cmd.Run()
	f := figure{wall: time.Since(start)}
	if err != nil {
		return f, fmt.Errorf("%s: %w: %.500s", strings.Join(args, " "), err, out.String())
	}
	f.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if u, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		f.peak = u.Maxrss
	}
	return f, nil
}

func median(fs []figure, of func(figure) float64) float64 {
	var vs []float64
	for _, f := range fs {
		vs = append(vs, of(f))
	}
	slices.Sort(vs)
	return vs[len(vs)/2]
}

func show(c corpus, list []program, figures map[string][][]figure, sizes map[string]int64, runs int) error {
	fmt.Printf("\n%s (medians of %d runs; in brackets: times ours)\n", c.name, runs)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tprogram\twall s\tCPU s\tpeak MiB\trepository MiB")
	us := list[0].name
	for i, step := range steps {
		for _, p := range list {
			cell := func(of func(figure) float64) string {
				v, base := median(figures[p.name][i], of), median(figures[us][i], of)
				if p.name == us {
					return fmt.Sprintf("%.2f", v)
				}
				return fmt.Sprintf("%.2f (%.2f)", v, v/base)
			}
			size := ""
			if step == "first snapshot" {
				size = fmt.Sprintf("%.1f (%.2f)", float64(sizes[p.name])/(1<<20), float64(sizes[p.name])/float64(sizes[us]))
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", step, p.name,
				cell(func(f figure) float64 { return f.wall.Seconds() }),
				cell(func(f figure) float64 { return f.cpu.Seconds() }),
				cell(func(f figure) float64 { return float64(f.peak) / 1024 }), size)
			step = ""
		}
	}
	return w.Flush()
}

// diskUsage returns the bytes of all files below dir.
func diskUsage(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	return total, err
}

// anyFile returns the last file of a corpus, to be changed.
func anyFile(dir string) (name string, err error) {
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.HasSuffix(p, ".bin") {
			name = p
		}
		return err
	})
	if err == nil && name == "" {
		name = filepath.Join(dir, "small")
		err = os.WriteFile(name, []byte("small"), 0o644)
	}
	return name, err
}

// words returns a vocabulary like that of source code.
func words(rng *rand.Rand) []string {
	list := make([]string, 4000)
	for i := range list {
		b := make([]byte, 2+rng.IntN(10))
		for k := range b {
			b[k] = byte('a' + rng.IntN(26))
		}
		list[i] = string(b)
	}
	return list
}

// smallFiles makes n files of 100 bytes to 8 KiB in folders of about 30.
func smallFiles(n int) func(string, *rand.Rand) error {
	return func(dir string, rng *rand.Rand) error {
		vocabulary := words(rng)
		var text []byte
		for i := range n {
			folder := filepath.Join(dir, fmt.Sprintf("%02d/%02d", i/30/100, i/30%100))
			if i%30 == 0 {
				if err := os.MkdirAll(folder, 0o755); err != nil {
					return err
				}
			}
			text = text[:0]
			for size := 100 + rng.IntN(8000); len(text) < size; {
				text = append(text, vocabulary[int(float64(len(vocabulary))*rng.Float64()*rng.Float64())]...)
				text = append(text, " \n(.{=\t"[rng.IntN(7)])
			}
			if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("file%d.go", i)), text, 0o644); err != nil {
				return err
			}
		}
		return nil
	}
}

func incompressible(n int) func(string, *rand.Rand) error {
	return func(dir string, rng *rand.Rand) error {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(dir, "camera.bin"))
		if err != nil {
			return err
		}
		source := rand.NewChaCha8([32]byte{49})
		buf := make([]byte, 1<<20)
		for written := 0; err == nil && written < n; written += len(buf) {
			_, _ = source.Read(buf) // never fails
			_, err = f.Write(buf)
		}
		return errors.Join(err, f.Close())
	}
}

func logs(n int) func(string, *rand.Rand) error {
	return func(dir string, rng *rand.Rand) error {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		vocabulary := words(rng)
		at := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
		var buf []byte
		for i := range 8 {
			buf = buf[:0]
			for len(buf) < n/8 {
				at = at.Add(time.Duration(rng.IntN(2000)) * time.Millisecond)
				buf = fmt.Appendf(buf, "%s node%d request %d took %d ms path=/api/v1/%s\n", at.Format(time.RFC3339), i, rng.IntN(1e6), rng.IntN(500), vocabulary[rng.IntN(len(vocabulary))])
			}
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("service%d.log", i)), buf, 0o644); err != nil {
				return err
			}
		}
		return nil
	}
}
