package vm

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// kernel is an unpacked Debian kernel package.
type kernel struct {
	dir     string // holds vmlinux and lib/modules/release
	release string // "6.1.0-56-amd64"
}

// modulesKept are the parts of lib/modules/RELEASE/kernel that are unpacked:
// a tenth of the package. The rest (graphics, sound, network cards) can't
// exist in the machine.
var modulesKept = regexp.MustCompile(`^kernel/(` +
	`arch/|block/|crypto/|fs/|lib/|mm/|net/(core|dns_resolver|802)/|` +
	`drivers/(block|cdrom|char|crypto|md|nvme|scsi|usb/(common|core|host|storage)|virtio)/|` +
	`drivers/net/([a-z_]+\.ko|phy/)|drivers/ata/)`)

// findKernel returns Debian's current kernel. The package is downloaded once
// by apt-get into the user's cache folder, so that neither the host's /boot
// nor its /lib/modules are touched and no bootloader hook runs.
func findKernel(ctx context.Context) (kernel, error) {
	cache := os.Getenv("IDE49_VM_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return kernel{}, fmt.Errorf("folder for the VM's kernel: %w: set IDE49_VM_CACHE", err)
		}
		cache = filepath.Join(dir, "ide49-backup-vm")
	}
	out, err := command(ctx, "", "", "apt-cache", "depends", "--important", "linux-image-amd64")
	if err != nil {
		return kernel{}, fmt.Errorf("%w: run apt-get update", err)
	}
	name, err := parseDepends(string(out))
	if err != nil {
		return kernel{}, err
	}
	release := strings.TrimPrefix(name, "linux-image-")
	k := kernel{dir: filepath.Join(cache, name), release: release}
	if _, err := os.Stat(k.dir); err == nil {
		return k, nil // complete, since it is renamed into place last
	} else if !errors.Is(err, fs.ErrNotExist) {
		return kernel{}, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return kernel{}, err
	}
	tmp, err := os.MkdirTemp(cache, ".unpack-")
	if err != nil {
		return kernel{}, err
	}
	defer os.RemoveAll(tmp)
	// apt's own sandbox user can't write to a private folder; it warns and
	// goes on as root.
	if _, err := command(ctx, tmp, "", "apt-get", "download", "--quiet", name); err != nil {
		return kernel{}, fmt.Errorf("%w: run apt-get update", err)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return kernel{}, fmt.Errorf("apt-get download %s left %d files in %s", name, len(debs), tmp)
	}
	tree := filepath.Join(tmp, "tree")
	if err := unpack(ctx, debs[0], tree, release); err != nil {
		return kernel{}, fmt.Errorf("unpack %s: %w", filepath.Base(debs[0]), err)
	}
	if err := os.Rename(tree, k.dir); err != nil && !errors.Is(err, fs.ErrExist) {
		// Another test binary may have been quicker: its tree is as good.
		if _, statErr := os.Stat(k.dir); statErr != nil {
			return kernel{}, err
		}
	}
	return k, nil
}

// parseDepends finds the versioned package that linux-image-amd64 stands for.
func parseDepends(out string) (string, error) {
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			return "linux-image-" + name, nil
		}
	}
	return "", errors.New("apt-cache knows no kernel behind linux-image-amd64: run apt-get update")
}

// unpack makes tree from a kernel package: vmlinux, and the kept modules with
// their dependency file.
func unpack(ctx context.Context, deb, tree, release string) error {
	modules := "lib/modules/" + release
	if err := os.MkdirAll(filepath.Join(tree, modules), 0o755); err != nil {
		return err
	}
	dpkg, err := find("dpkg-deb")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, dpkg, "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = unpackTar(ctx, pipe, tree, modules, "boot/vmlinuz-"+release)
	if waitErr := cmd.Wait(); err == nil && waitErr != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", waitErr, bytes.TrimSpace(stderr.Bytes()))
	}
	if err != nil {
		return err
	}
	if _, err := command(ctx, "", "", "depmod", "-b", tree, release); err != nil {
		return err
	}
	return nil
}

func unpackTar(ctx context.Context, r io.Reader, tree, modules, vmlinuz string) error {
	root, err := os.OpenRoot(tree)
	if err != nil {
		return err
	}
	defer root.Close()
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		if err == io.EOF {
			// dpkg-deb writes padding that must be read, else it fails.
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return err
		}
		name := path.Clean(strings.TrimPrefix(h.Name, "./"))
		module, isModule := strings.CutPrefix(name, modules+"/")
		switch {
		case h.Typeflag != tar.TypeReg:
		case name == vmlinuz:
			image, err := io.ReadAll(archive)
			if err != nil {
				return err
			}
			vmlinux, err := cutVmlinux(ctx, image)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if err := root.WriteFile("vmlinux", vmlinux, 0o644); err != nil {
				return err
			}
		case isModule && (modulesKept.MatchString(module) || strings.HasPrefix(module, "modules.")):
			data, err := io.ReadAll(archive)
			if err != nil {
				return err
			}
			// Debian 13 and later ship compressed modules; insmod of
			// busybox wants them plain.
			if plain, ok := strings.CutSuffix(name, ".xz"); ok {
				if data, err = command(ctx, "", string(data), "xz", "-dc"); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				name = plain
			}
			if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
				return err
			}
			if err := root.WriteFile(name, data, 0o644); err != nil {
				return err
			}
		}
	}
}

// cutVmlinux takes the ELF kernel out of a bzImage. Booting it directly spares
// the guest the decompression, which under emulation is half of the boot.
// The fields are those of the x86 boot protocol, version 2.08
// (Documentation/arch/x86/boot.rst).
func cutVmlinux(ctx context.Context, bzImage []byte) ([]byte, error) {
	if len(bzImage) < 0x250 || string(bzImage[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	le := binary.LittleEndian
	setupSectors := int(bzImage[0x1f1])
	if setupSectors == 0 {
		setupSectors = 4
	}
	start := (setupSectors+1)*512 + int(le.Uint32(bzImage[0x248:]))
	length := int(le.Uint32(bzImage[0x24c:]))
	if length < 4 || start < 0 || start+length > len(bzImage) {
		return nil, errors.New("bzImage with a payload outside of the file")
	}
	payload := bzImage[start : start+length-4] // the last four bytes: the plain size
	var program string
	switch {
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		program = "xz"
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		program = "zstd"
	default:
		return nil, fmt.Errorf("bzImage with an unknown compression %x", payload[:4])
	}
	return command(ctx, "", string(payload), program, "-dc")
}

// modules returns the files of the named modules and all that they need, in
// an order in which insmod can load them. Names may use - or _. A module that
// is built in or that this kernel doesn't have any more is left out, since
// Debian's kernels differ in that; the tests notice what they lack.
func (k kernel) modules(names ...string) ([]string, error) {
	dir := filepath.Join(k.dir, "lib/modules", k.release)
	f, err := os.Open(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	needs, err := parseModulesDep(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	byName := map[string]string{}
	for file := range needs {
		byName[moduleName(file)] = file
	}
	var order []string
	for _, name := range names {
		file, ok := byName[moduleName(name)]
		if !ok {
			continue
		}
		// modules.dep lists the whole closure, what must be loaded first last.
		for _, need := range slices.Backward(append([]string{file}, needs[file]...)) {
			if !slices.Contains(order, need) {
				order = append(order, need)
			}
		}
	}
	for i, file := range order {
		order[i] = filepath.Join(dir, file)
	}
	return order, nil
}

// moduleName is the name under which the kernel knows a module's file.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

// parseModulesDep reads "kernel/a.ko: kernel/b.ko kernel/c.ko".
func parseModulesDep(r io.Reader) (map[string][]string, error) {
	needs := map[string][]string{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		file, list, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("line without a colon: %q", lines.Text())
		}
		needs[file] = strings.Fields(list)
	}
	return needs, lines.Err()
}
