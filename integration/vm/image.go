package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Volume is a file system to be made.
type Volume struct {
	Type    string   // vfat, exfat, ntfs, ext2 to ext4, xfs, btrfs, f2fs, iso9660, udf, luks2; swap; empty: nothing
	Label   string   // any bytes but NUL that fit; vfat: at most 11
	Size    int64    // bytes; 0 means 64 MiB, the least of most types
	Dirty   bool     // as if it was pulled out while it was written to: vfat, exfat
	Options []string // more for its mkfs
}

const mebi = 1 << 20

// vfatLabel takes the place of labels that mkfs.vfat refuses.
const vfatLabel = "PLACEHOLDER"

// Make makes the file system in a new, sparse file.
func (v Volume) Make(ctx context.Context, file string) error {
	if err := v.make(ctx, file); err != nil {
		return fmt.Errorf("make a %s file system in %s: %w", v.Type, file, err)
	}
	return nil
}

func (v Volume) make(ctx context.Context, file string) error {
	size := v.Size
	if size == 0 {
		size = 64 * mebi
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	mkfs := func(args ...string) error {
		args = append(args, v.Options...)
		stdin := ""
		if v.Type == "luks2" {
			stdin = "passphrase"
		}
		_, err := command(ctx, "", stdin, args[0], append(args[1:], file)...)
		return err
	}
	switch v.Type {
	case "":
		return nil
	case "vfat":
		label := vfatLabel
		if v.Label == "" {
			label = "NO NAME" // mkfs.vfat's word for none
		}
		if err := mkfs("mkfs.vfat", "-F", "32", "-s", "1", "-n", label); err != nil {
			return err
		}
		if v.Label != "" {
			if err := relabel(file, v.Label); err != nil {
				return err
			}
		}
		// Bit 0 of the state byte of the boot sector of FAT32 says dirty.
		if v.Dirty {
			return setBits(file, 0x41, 1)
		}
		return nil
	case "exfat":
		err := mkfs("mkfs.exfat", "-L", v.Label)
		// Bit 1 of VolumeFlags, which the checksum leaves out, says dirty.
		if err == nil && v.Dirty {
			err = setBits(file, 106, 2)
		}
		return err
	case "ntfs":
		return mkfs("mkfs.ntfs", "-Q", "-F", "-L", v.Label)
	case "ext2", "ext3", "ext4":
		return mkfs("mkfs."+v.Type, "-q", "-F", "-L", v.Label)
	case "xfs":
		return mkfs("mkfs.xfs", "-q", "-f", "-L", v.Label)
	case "btrfs":
		return mkfs("mkfs.btrfs", "-q", "-f", "-L", v.Label)
	case "f2fs":
		return mkfs("mkfs.f2fs", "-q", "-f", "-l", v.Label)
	case "udf":
		return mkfs("mkfs.udf", "--blocksize=512", "--media-type=hd", "-l", v.Label)
	case "swap":
		return mkfs("mkswap", "-L", v.Label)
	case "luks2":
		return mkfs("cryptsetup", "luksFormat", "--batch-mode", "--type=luks2", "--pbkdf=pbkdf2",
			"--pbkdf-force-iterations=1000", "--key-file=-", "--label="+v.Label)
	case "iso9660":
		dir, err := os.MkdirTemp("", "ide49-iso-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		if err := os.WriteFile(filepath.Join(dir, "README.TXT"), []byte("a disc\n"), 0o644); err != nil {
			return err
		}
		_, err = command(ctx, "", "", "genisoimage", "-quiet", "-rock", "-V", v.Label, "-o", file, dir)
		return err
	}
	return errors.New("no such type")
}

// relabel writes a label that mkfs.vfat would refuse into the boot sectors and
// into the root folder.
func relabel(file, label string) error {
	if len(label) > len(vfatLabel) {
		return fmt.Errorf("label %q is longer than %d bytes", label, len(vfatLabel))
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	padded := label + strings.Repeat(" ", len(vfatLabel)-len(label))
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for from := 0; ; {
		i := bytes.Index(data[from:], []byte(vfatLabel))
		if i < 0 {
			break
		}
		if _, err := f.WriteAt([]byte(padded), int64(from+i)); err != nil {
			return err
		}
		from += i + len(padded)
	}
	return f.Close()
}

func setBits(file string, at int64, bits byte) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0] |= bits
	if _, err := f.WriteAt(b, at); err != nil {
		return err
	}
	return f.Close()
}

// MakeDisk makes a disk with a partition table, "dos" or "gpt", and the
// volumes in its partitions, in that order.
func MakeDisk(ctx context.Context, file, table string, volumes ...Volume) error {
	if err := makeDisk(ctx, file, table, volumes); err != nil {
		return fmt.Errorf("make the disk %s: %w", file, err)
	}
	return nil
}

func makeDisk(ctx context.Context, file, table string, volumes []Volume) error {
	disk, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer disk.Close()
	script := fmt.Sprintf("label: %s\nunit: sectors\n", table)
	offset := int64(mebi)
	for i, v := range volumes {
		part := fmt.Sprintf("%s.%d", file, i+1)
		if err := v.Make(ctx, part); err != nil {
			return err
		}
		size, err := copySparse(disk, offset, part)
		if err := errors.Join(err, os.Remove(part)); err != nil {
			return err
		}
		size = (size + mebi - 1) / mebi * mebi
		script += fmt.Sprintf("start=%d, size=%d, type=%s\n", offset/512, size/512, partitionType(table, v.Type))
		offset += size
	}
	// The last mebibyte is for the second copy of a GPT.
	if err := errors.Join(disk.Truncate(offset+mebi), disk.Close()); err != nil {
		return err
	}
	_, err = command(ctx, "", script, "sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe=never", file)
	return err
}

// partitionType names the type as Windows and Linux tools set it.
func partitionType(table, fs string) string {
	const basicData = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
	windows := fs == "vfat" || fs == "exfat" || fs == "ntfs"
	switch {
	case table == "gpt" && windows:
		return basicData
	case table == "gpt":
		return "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
	case fs == "vfat":
		return "c"
	case windows:
		return "7"
	}
	return "83"
}

// copySparse writes the data of a file, but not its holes, to disk at an
// offset, and returns the file's size.
func copySparse(disk *os.File, offset int64, file string) (int64, error) {
	const seekData, seekHole = 3, 4
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	for at := int64(0); at < info.Size(); {
		start, err := f.Seek(at, seekData)
		if errors.Is(err, syscall.ENXIO) {
			break // only a hole follows
		}
		if err != nil {
			return 0, err
		}
		if at, err = f.Seek(start, seekHole); err != nil {
			return 0, err
		}
		if _, err := io.Copy(io.NewOffsetWriter(disk, offset+start), io.NewSectionReader(f, start, at-start)); err != nil {
			return 0, err
		}
	}
	return info.Size(), nil
}
