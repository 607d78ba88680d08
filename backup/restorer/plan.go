package restorer

import (
	"context"
	"iter"
	"os"

	"github.com/iot49/ide49-backup/backup"
	"github.com/iot49/ide49-backup/backup/repo"
)

// A Plan says what a restore will do.
type Plan struct{}

// Prepare compares a snapshot with a target folder. It changes nothing.
func Prepare(ctx context.Context, r *repo.Repo, sn *backup.Snapshot, dst *os.Root, opt Options) (*Plan, error) {
	return &Plan{}, nil
}

// Counts sums the plan up.
func (p *Plan) Counts() Counts { return Counts{} }

// Failures returns what is known before.
func (p *Plan) Failures() *PartialError { return nil }

// Changes yields what will happen.
func (p *Plan) Changes() iter.Seq[Change] { return func(func(Change) bool) {} }

// Overwritten yields what will be overwritten.
func (p *Plan) Overwritten() iter.Seq[string] { return func(func(string) bool) {} }

// Execute carries the plan out.
func (p *Plan) Execute(ctx context.Context, obs Observer) (Stats, error) { return Stats{}, nil }
