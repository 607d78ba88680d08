package mounts

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// checkFileSystem repairs a file system that was not unmounted cleanly, as far
// as its own checker does that without questions. It returns why the drive
// must not be written, or nothing. The device must not be mounted.
func checkFileSystem(ctx context.Context, node, fstype string, limit time.Duration) string {
	check, ok := checkers[fstype]
	if !ok {
		return ""
	}
	f, err := os.Open(node)
	if err != nil {
		return "it could not be looked at: " + err.Error()
	}
	dirty, err := check.dirty(f)
	err = errors.Join(err, f.Close())
	if err != nil {
		return "it could not be looked at: " + err.Error()
	}
	if !dirty {
		return ""
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took longer than %v", limit))
	defer cancel()
	_, err = runTool(ctx, check.tool[0], append(check.tool[1:len(check.tool):len(check.tool)], node)...)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		if exit.ExitCode() < check.faulty {
			return "" // repaired
		}
		return fmt.Sprintf("it was not unmounted cleanly, and %s found faults that it does not repair unasked", check.tool[0])
	}
	if err == nil || errors.Is(err, exec.ErrNotFound) {
		return "" // without the program the kernel copes, as it does by the policy never
	}
	return "it was not unmounted cleanly, and checking it failed: " + err.Error()
}

// A checker is a program that repairs a file system.
type checker struct {
	dirty  func(io.ReaderAt) (bool, error)
	tool   []string
	faulty int // exit codes from here on mean that faults remain
}

// checkers holds the file systems that are checked. xfs, btrfs and f2fs repair
// themselves when they are mounted, and ntfs has no checker on Linux that does
// more than clear a mark.
var checkers = map[string]checker{
	"ext2":  {extDirty, []string{"e2fsck", "-p"}, 4},
	"ext3":  {extDirty, []string{"e2fsck", "-p"}, 4},
	"ext4":  {extDirty, []string{"e2fsck", "-p"}, 4},
	"vfat":  {vfatDirty, []string{"fsck.vfat", "-a"}, 2},
	"exfat": {exfatDirty, []string{"fsck.exfat", "-p"}, 2},
}

// extDirty reads the superblock of ext2, ext3 or ext4: its state says whether
// it was unmounted and whether faults were found, and a feature whether the
// journal must be replayed.
func extDirty(r io.ReaderAt) (bool, error) {
	var sb [264]byte
	if _, err := r.ReadAt(sb[:], 1024); err != nil {
		return false, err
	}
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return false, errors.New("it has no superblock")
	}
	const clean, faults, recover = 1, 2, 4
	state := binary.LittleEndian.Uint16(sb[0x3a:])
	incompat := binary.LittleEndian.Uint32(sb[0x60:])
	return state&clean == 0 || state&faults != 0 || incompat&recover != 0, nil
}

// vfatDirty reads the boot sector: bit 0 of the reserved byte is set while the
// file system is mounted for writing, bit 1 after a read error. FAT32 keeps it
// elsewhere than FAT12 and FAT16.
func vfatDirty(r io.ReaderAt) (bool, error) {
	var boot [512]byte
	if _, err := r.ReadAt(boot[:], 0); err != nil {
		return false, err
	}
	state := boot[0x25]
	if binary.LittleEndian.Uint16(boot[0x16:]) == 0 { // sectors per FAT: FAT32 has 32 bits for them
		state = boot[0x41]
	}
	return state&3 != 0, nil
}

// exfatDirty reads the volume flags: bit 1 is set while the file system is
// mounted for writing, bit 2 after a media failure.
func exfatDirty(r io.ReaderAt) (bool, error) {
	var flags [2]byte
	if _, err := r.ReadAt(flags[:], 106); err != nil {
		return false, err
	}
	return binary.LittleEndian.Uint16(flags[:])&6 != 0, nil
}
