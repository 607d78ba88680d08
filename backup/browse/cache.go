package browse

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"github.com/iot49/ide49-backup/backup"
)

// A cache keeps values by the ID of the blob they come from, the least recently
// used ones going first. What it holds never costs more than limit bytes;
// values that cost more than half of that are handed out and not kept.
type cache[V any] struct {
	limit int64
	cost  func(V) int64

	mu      sync.Mutex
	used    int64
	order   list.List // of *kept[V], the last used first
	entries map[backup.ID]*list.Element
	loading map[backup.ID]*loading[V]
}

type kept[V any] struct {
	id    backup.ID
	value V
	cost  int64
}

// A loading is a value that somebody is about to get.
type loading[V any] struct {
	done  chan struct{}
	value V
	err   error
}

func newCache[V any](limit int64, cost func(V) int64) *cache[V] {
	return &cache[V]{limit: limit, cost: cost, entries: map[backup.ID]*list.Element{}, loading: map[backup.ID]*loading[V]{}}
}

// get returns the value of id, by load if it is not there. Of several callers
// who miss the same value at once, one loads it and the others wait for it.
func (c *cache[V]) get(ctx context.Context, id backup.ID, load func(context.Context) (V, error)) (V, error) {
	for {
		c.mu.Lock()
		if e, ok := c.entries[id]; ok {
			c.order.MoveToFront(e)
			c.mu.Unlock()
			return e.Value.(*kept[V]).value, nil
		}
		l, ok := c.loading[id]
		if !ok {
			l = &loading[V]{done: make(chan struct{})}
			c.loading[id] = l
			c.mu.Unlock()
			c.load(ctx, id, l, load)
			return l.value, l.err
		}
		c.mu.Unlock()
		select {
		case <-l.done:
		case <-ctx.Done():
			var none V
			return none, ctx.Err()
		}
		// The other one may have given up where we have not.
		if !errors.Is(l.err, context.Canceled) && !errors.Is(l.err, context.DeadlineExceeded) {
			return l.value, l.err
		}
	}
}

func (c *cache[V]) load(ctx context.Context, id backup.ID, l *loading[V], load func(context.Context) (V, error)) {
	l.value, l.err = load(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(l.done)
	delete(c.loading, id)
	if l.err != nil {
		return
	}
	k := &kept[V]{id, l.value, c.cost(l.value)}
	if k.cost > c.limit/2 {
		return
	}
	c.entries[id] = c.order.PushFront(k)
	c.used += k.cost
	for c.used > c.limit {
		last := c.order.Back()
		old := c.order.Remove(last).(*kept[V])
		delete(c.entries, old.id)
		c.used -= old.cost
	}
}
