package raftmeta

import "sync"

// bell wakes everyone who waits for something that may have changed. Nothing is made for a ring that nobody waits for: one comes with every entry. The zero value is ready.
type bell struct {
	mu sync.Mutex
	ch chan struct{} // nil while nobody has listened since the last ring
}

// listen returns a channel that the next ring closes. Whoever looks whether to wait listens first.
func (b *bell) listen() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
