package archiver

import "sync"

// A crew runs tasks, as many at once as it has hands. A task that finds no hand
// free is run by the goroutine that asks for it: nothing ever waits in a queue,
// so memory stays bounded, and nothing can deadlock.
type crew struct {
	hands chan struct{}
	wg    sync.WaitGroup
}

func newCrew(n int) *crew { return &crew{hands: make(chan struct{}, n)} }

// do runs task, now or soon. Tasks may call do.
func (c *crew) do(task func()) {
	select {
	case c.hands <- struct{}{}:
		c.wg.Go(func() {
			defer func() { <-c.hands }()
			task()
		})
	default:
		task()
	}
}

// wait returns when all tasks are done, those included that tasks asked for.
func (c *crew) wait() { c.wg.Wait() }

// buffers is a store of byte slices of one capacity.
type buffers struct {
	free chan []byte
	size int
}

func newBuffers(keep, size int) *buffers { return &buffers{make(chan []byte, keep), size} }

func (b *buffers) get() []byte {
	select {
	case buf := <-b.free:
		return buf
	default:
		return make([]byte, 0, b.size)
	}
}

func (b *buffers) put(buf []byte) {
	if cap(buf) != b.size {
		return
	}
	select {
	case b.free <- buf[:0]:
	default:
	}
}
