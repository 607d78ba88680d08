package mounts

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
)

func TestParseBlkid(t *testing.T) {
	for _, tt := range []struct {
		name, out string
		want      Probe
	}{
		{
			"vfat on a partition",
			"ID_FS_LABEL=lab_el\nID_FS_LABEL_ENC=lab\\x2fel\\x20=\\x0ax\nID_FS_UUID=1A2B-3C4D\nID_FS_UUID_ENC=1A2B-3C4D\nID_FS_VERSION=FAT32\nID_FS_TYPE=vfat\nID_FS_USAGE=filesystem\nID_PART_ENTRY_SCHEME=dos\nID_PART_ENTRY_UUID=00000000-01\nID_PART_ENTRY_TYPE=0xc\n",
			Probe{Outcome: ProbeFound, Type: "vfat", Usage: "filesystem", Version: "FAT32", Label: "lab/el =\nx", UUID: "1A2B-3C4D", PartUUID: "00000000-01", PartType: "0xc"},
		},
		{"table only", "ID_PART_TABLE_UUID=x\nID_PART_TABLE_TYPE=gpt\n", Probe{Outcome: ProbeFound, Table: "gpt"}},
		{"nothing", "", Probe{Outcome: ProbeNothing}},
		{"partition without contents", "ID_PART_ENTRY_UUID=u\nID_PART_ENTRY_TYPE=0x83\n", Probe{Outcome: ProbeNothing, PartUUID: "u", PartType: "0x83"}},
		{"first of equal keys", "ID_FS_TYPE=ext4\nID_FS_TYPE=vfat\n", Probe{Outcome: ProbeFound, Type: "ext4"}},
		{"ambivalent", "ID_FS_AMBIVALENT=filesystem:ext4:1.0 filesystem:vfat:FAT16\n", Probe{Outcome: ProbeAmbivalent}},
		{"hostile type", "ID_FS_TYPE=../../x\nID_FS_UUID=a b\n", Probe{Outcome: ProbeNothing}},
		{"no lines", "garbage\n=x\n\n", Probe{Outcome: ProbeNothing}},
		{"overlong", "ID_FS_TYPE=" + strings.Repeat("x", 2000) + "\n", Probe{Outcome: ProbeNothing}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := parseBlkid([]byte(tt.out)); got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestDecodeBlkid(t *testing.T) {
	for in, want := range map[string]string{
		`BACKUP`: "BACKUP", `a\x20b`: "a b", `\xc3\xbc`: "ü", `a\\x2f`: `a\/`, `\x`: `\x`, `\x2`: `\x2`, `\xzz`: `\xzz`, `\x2F`: "/", `x\`: `x\`,
	} {
		if got := decodeBlkid(in); got != want {
			t.Errorf("decodeBlkid(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParseBlkid(f *testing.F) {
	f.Add([]byte("ID_FS_TYPE=vfat\nID_FS_LABEL_ENC=a\\x2f\\x\n"))
	f.Add([]byte("ID_FS_AMBIVALENT=x"))
	f.Add([]byte("ID_FS_UUID=\x00\n=\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := parseBlkid(b)
		for _, s := range []string{p.Type, p.UUID, p.PartUUID, p.PartType, p.Table, p.Usage, p.Version} {
			if strings.ContainsAny(s, "/ \n\x00") || len(s) > 1024 {
				t.Errorf("%q", s)
			}
		}
		if p.Outcome == ProbeFound && p.Type == "" && p.Table == "" {
			t.Errorf("found nothing: %+v", p)
		}
		for _, r := range printable(p.Label) {
			if unicode.IsControl(r) {
				t.Errorf("label %q prints %U", p.Label, r)
			}
		}
	})
}

func TestProbe(t *testing.T) {
	needTools(t, "blkid", "mkfs.ext4", "mkfs.vfat", "mkfs.exfat", "mkfs.xfs", "mkfs.btrfs")
	const uuid = "6fa459ea-ee8a-3ca4-894e-db77e160355e"
	for _, tt := range []struct {
		name string
		mib  int
		mkfs []string
		want Probe
	}{
		{"ext4", 8, []string{"mkfs.ext4", "-q", "-U", uuid, "-L", "a/b =\n."}, Probe{Outcome: ProbeFound, Type: "ext4", Usage: "filesystem", Version: "1.0", Label: "a/b =\n.", UUID: uuid}},
		{"vfat", 8, []string{"mkfs.vfat", "-i", "1a2b3c4d", "-n", "STICK 1"}, Probe{Outcome: ProbeFound, Type: "vfat", Usage: "filesystem", Version: "FAT12", Label: "STICK 1", UUID: "1A2B-3C4D"}},
		{"exfat", 8, []string{"mkfs.exfat", "-L", "写真"}, Probe{Outcome: ProbeFound, Type: "exfat", Usage: "filesystem", Version: "1.0", Label: "写真"}},
		{"nothing", 1, nil, Probe{Outcome: ProbeNothing}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := probe(t.Context(), image(t, tt.mib, tt.mkfs...))
			if err != nil {
				t.Fatal(err)
			}
			if tt.want.UUID == "" {
				got.UUID = ""
			}
			got.Table = "" // an exFAT boot sector looks like a partition table too
			if got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
	t.Run("ambivalent", func(t *testing.T) {
		file := image(t, 300, "mkfs.xfs", "-q")
		run(t, "mkfs.ext4", "-q", "-F", file)
		// Both magic numbers are there again.
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		other, err := os.ReadFile(image(t, 300, "mkfs.xfs", "-q"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(other[:512], 0)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		if got, err := probe(t.Context(), file); err != nil || got.Outcome != ProbeAmbivalent {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("unreadable", func(t *testing.T) {
		got, err := probe(t.Context(), filepath.Join(t.TempDir(), "nosuch"))
		if err != nil || got.Outcome != ProbeUnreadable || got.Detail == "" {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := probe(ctx, "/dev/null"); !errors.Is(err, context.Canceled) || got.Outcome != ProbeUnreadable {
			t.Errorf("%+v, %v", got, err)
		}
	})
}
