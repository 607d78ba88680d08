package vm

import (
	"testing"
	"time"
)

func TestBoot(t *testing.T) {
	start := time.Now()
	m, err := Start(t.Context(), Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %v", time.Since(start))
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, s := range []string{"dmesg | tail -30; blkid --version; busybox | head -3"} {
		start := time.Now()
		out, code, err := m.Run(t.Context(), s)
		t.Logf("%s: %v\n%s\n%d %v", s, time.Since(start), out, code, err)
	}
}
