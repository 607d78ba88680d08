package mounts

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A Probe is what was found on a device.
type Probe struct {
	Outcome ProbeOutcome
	Detail  string // for people: why the device was unreadable

	Type    string // file system or container: vfat, ext4, LVM2_member, crypto_LUKS
	Usage   string // filesystem, raid, crypto or other
	Version string
	Label   string // as it is on the drive: hostile
	UUID    string

	Table    string // partition table on this device: dos, gpt
	PartUUID string
	PartType string // type of this partition in its table: 0x5, a GUID
}

// A ProbeOutcome says how far probing came.
type ProbeOutcome int

// The outcomes.
const (
	ProbePending    ProbeOutcome = iota // not probed yet
	ProbeFound                          // something was recognised
	ProbeNothing                        // nothing known is on the device
	ProbeAmbivalent                     // traces of several file systems, so mounting any is a guess
	ProbeUnreadable                     // the device could not be read
)

const (
	probeLimit  = 20 * time.Second // a healthy drive answers in milliseconds; a spinning-up one in ten seconds
	probeOutput = 64 << 10         // bytes of blkid's answer that are read
)

// The exit codes of blkid.
const (
	blkidNothing    = 2
	blkidAmbivalent = 8
)

// probe asks blkid what is on the device with the given node. It does not use
// blkid's cache.
func probe(ctx context.Context, node string) (Probe, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	out, err := runTool(ctx, "blkid", "-p", "-o", "udev", node)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return parseBlkid(out.Stdout), nil
	case ctx.Err() != nil:
		return Probe{Outcome: ProbeUnreadable, Detail: "it did not answer within " + probeLimit.String()}, context.Cause(ctx)
	case errors.As(err, &exit) && exit.ExitCode() == blkidNothing:
		// blkid says the same when it can't open or read the device.
		if err := readable(node); err != nil {
			return Probe{Outcome: ProbeUnreadable, Detail: err.Error()}, nil
		}
		return Probe{Outcome: ProbeNothing}, nil
	case errors.As(err, &exit) && exit.ExitCode() == blkidAmbivalent:
		return Probe{Outcome: ProbeAmbivalent}, nil
	}
	return Probe{}, fmt.Errorf("probing %s: %w", node, err)
}

// parseBlkid reads the lines KEY=VALUE that blkid prints for udev. Of equal
// keys the first counts. Values are limited in length; the label is decoded.
func parseBlkid(out []byte) Probe {
	const longest = 1024 // bytes; btrfs has the longest label, 255
	env := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, probeOutput)
	for lines.Scan() {
		key, value, ok := strings.Cut(lines.Text(), "=")
		if _, dup := env[key]; !ok || dup || len(value) > longest {
			continue
		}
		env[key] = value
	}
	p := Probe{
		Outcome:  ProbeNothing,
		Type:     plainWord(env["ID_FS_TYPE"]),
		Usage:    plainWord(env["ID_FS_USAGE"]),
		Version:  plainWord(env["ID_FS_VERSION"]),
		UUID:     plainWord(env["ID_FS_UUID"]),
		Label:    decodeBlkid(env["ID_FS_LABEL_ENC"]),
		Table:    plainWord(env["ID_PART_TABLE_TYPE"]),
		PartUUID: plainWord(env["ID_PART_ENTRY_UUID"]),
		PartType: plainWord(env["ID_PART_ENTRY_TYPE"]),
	}
	if env["ID_FS_AMBIVALENT"] != "" {
		p.Outcome = ProbeAmbivalent
	} else if p.Type != "" || p.Table != "" {
		p.Outcome = ProbeFound
	}
	return p
}

// plainWord returns s if it is made of the characters that types and UUIDs
// have, and nothing otherwise.
func plainWord(s string) string {
	for _, c := range s {
		if c > unicode.MaxASCII || !unicode.IsLetter(c) && !unicode.IsDigit(c) && !strings.ContainsRune("-_.+:", c) {
			return ""
		}
	}
	return s
}

// decodeBlkid replaces each \xNN by the byte it stands for. Anything else
// stays as it is.
func decodeBlkid(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && s[i+1] == 'x' {
			hi, ok1 := hexDigit(s[i+2])
			lo, ok2 := hexDigit(s[i+3])
			if ok1 && ok2 {
				b.WriteByte(hi<<4 | lo)
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// printable returns text from a device with everything replaced that could
// forge or break a line: control and format characters, invalid UTF-8.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == '\u2028' || r == '\u2029' {
			return '\ufffd'
		}
		return r
	}, strings.ToValidUTF8(s, "\ufffd"))
}
