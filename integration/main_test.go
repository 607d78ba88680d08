package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// program is the path of our program, built for this run of the tests.
var program string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ide49-backup-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "ide49-backup")
	if out, err := exec.Command("go", "build", "-o", program, "../cmd/ide49-backup").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build our program: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}
