package browse

import (
	"context"
	"runtime"
	"sync"
)

// maxDepth is how many folders deep a walk goes. The kernel's own limit on
// paths makes it hard to get that far.
const maxDepth = 4096

// A walker goes through folders depth first, each folder's entries in order,
// and loads the folders that come next meanwhile.
type walker[I any] struct {
	// load returns the entries of a folder. It is called from several
	// goroutines.
	load func(ctx context.Context, path string, folder I) ([]I, error)
	name func(I) string
	// isFolder reports whether an entry has entries that the walk may want.
	// It is asked once, when the entry's folder is entered.
	isFolder func(I) bool
}

// A verdict says how a walk goes on after an entry.
type verdict uint8

const (
	enter verdict = iota // into the folder, if it is one
	pass                 // to the next entry
	stop
)

// A listing is a folder's entries, which are there when done is closed.
type listing[I any] struct {
	at     int // its place among the entries of the folder that it is in
	folder I
	done   chan struct{} // nil before the loading has begun
	items  []I
	err    error
}

// A level is a folder that the walk is in.
type level[I any] struct {
	pathLen int // of the folder's path, with the slash that ends it
	items   []I
	next    int           // the first of items that is still to come
	ahead   []*listing[I] // of the folders among those
	started int           // how many of ahead are loading or loaded
}

// walk calls visit for all entries below root, whose path is clean. A folder
// that can't be listed is visited a second time, with the error. Memory is
// bounded by the depth and by a fixed number of folders that are loaded ahead.
func (w *walker[I]) walk(ctx context.Context, path string, root I, visit func(path string, item I, err error) verdict) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	ahead := 4 * runtime.GOMAXPROCS(0)
	running := 0
	start := func(path string, l *listing[I]) {
		l.done = make(chan struct{})
		running++
		wg.Go(func() {
			defer close(l.done)
			l.items, l.err = w.load(ctx, path, l.folder)
		})
	}

	buf := []byte(path) // the path of the innermost folder, with a slash
	var stack []level[I]
	push := func(l *listing[I]) error {
		<-l.done
		running--
		if l.err != nil {
			return l.err
		}
		if len(stack) >= maxDepth {
			return ErrTooDeep
		}
		if buf[len(buf)-1] != '/' {
			buf = append(buf, '/')
		}
		v := level[I]{pathLen: len(buf), items: l.items}
		for i, it := range l.items {
			if w.isFolder(it) {
				v.ahead = append(v.ahead, &listing[I]{at: i, folder: it})
			}
		}
		stack = append(stack, v)
		return nil
	}
	first := &listing[I]{folder: root}
	start(path, first)
	if err := push(first); err != nil {
		visit(path, root, err)
		return
	}
	for len(stack) > 0 {
		for i := len(stack) - 1; i >= 0 && running < ahead; i-- {
			for v := &stack[i]; v.started < len(v.ahead) && running < ahead; v.started++ {
				l := v.ahead[v.started]
				start(string(buf[:v.pathLen])+w.name(l.folder), l)
			}
		}
		v := &stack[len(stack)-1]
		buf = buf[:v.pathLen]
		if v.next == len(v.items) {
			stack = stack[:len(stack)-1]
			continue
		}
		at := v.next
		item := v.items[at]
		v.next++
		path := string(buf) + w.name(item)
		next := visit(path, item, nil)
		if next == stop {
			return
		}
		if len(v.ahead) == 0 || v.ahead[0].at != at {
			continue
		}
		l := v.ahead[0]
		if l.done != nil {
			v.started--
		}
		v.ahead = v.ahead[1:]
		if next == pass {
			if l.done != nil {
				running--
			}
			continue
		}
		if l.done == nil {
			start(path, l)
		}
		buf = append(buf[:0], path...)
		if err := push(l); err != nil && visit(path, item, err) == stop {
			return
		}
	}
}
