package mem_test

import (
	"testing"

	"github.com/iot49/ide49-backup/backup/backend"
	"github.com/iot49/ide49-backup/backup/backend/backendtest"
	"github.com/iot49/ide49-backup/backup/backend/mem"
)

func TestConformance(t *testing.T) {
	s := mem.New()
	backendtest.Run(t, func(*testing.T) backend.Backend { return s })
}
