package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// write writes files below dir by path, as fast as it can, as a careless
// program would that does not check whether the drive is still there. It makes
// no folders. Successes and failures are counted in the log, a line each time
// that the outcome changes.
func write(ctx context.Context, dir, file string) error {
	l, err := openLog(file)
	if err != nil {
		return err
	}
	defer l.f.Close()
	data := make([]byte, 64<<10)
	last := ""
	for i := 0; ctx.Err() == nil; i++ {
		outcome := "written"
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%d", i%50)), data, 0o644); err != nil {
			outcome = err.Error()
		}
		if outcome != last {
			last = outcome
			if err := l.put(map[string]any{"Microseconds": now(), "Outcome": outcome, "Count": i}); err != nil {
				return err
			}
		}
	}
	return nil
}
