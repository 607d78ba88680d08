package mounts

import (
	"context"
	"time"
)

// checkFileSystem repairs a file system that was not unmounted cleanly. It
// returns why the drive must not be written, or nothing.
func checkFileSystem(ctx context.Context, node, fstype string, limit time.Duration) string {
	return ""
}
