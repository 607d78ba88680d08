package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// aptPackage tells which Debian package brings a program, for the error that
// names what is missing.
func aptPackage(program string) string {
	switch program {
	case "qemu-system-x86_64":
		return "qemu-system-x86"
	case "busybox":
		return "busybox-static"
	case "xz":
		return "xz-utils"
	case "depmod":
		return "kmod"
	case "apt-get":
		return "apt"
	case "dpkg-deb":
		return "dpkg"
	case "ldd":
		return "libc-bin"
	case "blkid", "mkswap":
		return "util-linux"
	case "sfdisk":
		return "fdisk"
	case "mkfs.vfat", "fsck.vfat":
		return "dosfstools"
	case "mkfs.exfat", "fsck.exfat":
		return "exfatprogs"
	case "mkfs.ntfs", "ntfs-3g":
		return "ntfs-3g"
	case "mkfs.ext2", "mkfs.ext3", "mkfs.ext4", "e2fsck":
		return "e2fsprogs"
	case "mkfs.xfs":
		return "xfsprogs"
	case "mkfs.btrfs":
		return "btrfs-progs"
	case "mkfs.f2fs":
		return "f2fs-tools"
	case "mkfs.udf":
		return "udftools"
	case "genisoimage":
		return "genisoimage"
	case "cryptsetup":
		return "cryptsetup-bin"
	}
	return program
}

// MissingError says that a program is not installed here.
type MissingError struct {
	Program string
	Package string // of Debian
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is not installed: run apt-get install --no-install-recommends %s", e.Program, e.Package)
}

// find returns the path of a program, also when PATH lacks the sbin folders as
// it does for ordinary users.
func find(program string) (string, error) {
	if path, err := exec.LookPath(program); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", &MissingError{Program: program, Package: aptPackage(program)}
}

// command runs a program to its end and returns its standard output. What it
// said on standard error becomes part of the error.
func command(ctx context.Context, dir, stdin, program string, args ...string) ([]byte, error) {
	path, err := find(program)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stderr.String())
		if said == "" {
			said = strings.TrimSpace(stdout.String())
		}
		return nil, fmt.Errorf("%s %q: %w: %s", program, args, err, said)
	}
	return stdout.Bytes(), nil
}

// libraries lists the shared libraries that a program needs, by the paths at
// which its loader looks for them. A static program has none.
func libraries(ctx context.Context, program string) ([]string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	defer f.Close()
	if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return nil, nil
	}
	out, err := command(ctx, "", "", "ldd", program)
	if err != nil {
		return nil, err
	}
	return parseLDD(string(out))
}

// parseLDD reads lines such as "libc.so.6 => /lib/libc.so.6 (0x7f…)".
func parseLDD(out string) ([]string, error) {
	var libs []string
	for line := range strings.Lines(out) {
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("shared library %q: not found", strings.TrimSpace(line))
		}
		for field := range strings.FieldsSeq(line) {
			if filepath.IsAbs(field) {
				libs = append(libs, field)
			}
		}
	}
	slices.Sort(libs)
	return slices.Compact(libs), nil
}
