package raftmeta

import (
	"sync"

	"github.com/estran/estran/tiering/record"
)

// watchers wakes who waits for partitions to change. A watcher is woken at most once per entry.
type watchers struct {
	mu sync.Mutex
	m  map[record.TopicPartition]map[*watcher]struct{}
}

type watcher struct {
	wake func()
}

func (w *watchers) init() { w.m = map[record.TopicPartition]map[*watcher]struct{}{} }

func (w *watchers) add(tp record.TopicPartition, x *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	set := w.m[tp]
	if set == nil {
		set = map[*watcher]struct{}{}
		w.m[tp] = set
	}
	set[x] = struct{}{}
}

func (w *watchers) remove(tp record.TopicPartition, x *watcher) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if set := w.m[tp]; set != nil {
		delete(set, x)
		if len(set) == 0 {
			delete(w.m, tp)
		}
	}
}

func (w *watchers) wake(tps []record.TopicPartition) {
	if len(tps) == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.m) == 0 {
		return
	}
	var woken map[*watcher]struct{}
	for _, tp := range tps {
		for x := range w.m[tp] {
			if _, ok := woken[x]; ok {
				continue
			}
			if woken == nil {
				woken = map[*watcher]struct{}{}
			}
			woken[x] = struct{}{}
			x.wake()
		}
	}
}

// Watch calls wake whenever the high watermark or log start of one of the partitions moves, at most once per entry, until stop is called. wake
// must not block; it may be called once more while stop runs. Partitions that do not exist are ignored.
func (h *Host) Watch(tps []record.TopicPartition, wake func()) (stop func()) {
	return watch(tps, wake, func(tp record.TopicPartition) *view {
		if g := h.groupOf(tp); g != nil {
			return &g.view
		}
		return nil
	})
}

func watch(tps []record.TopicPartition, wake func(), at func(record.TopicPartition) *view) (stop func()) {
	x := &watcher{wake: wake}
	type place struct {
		v  *view
		tp record.TopicPartition
	}
	places := make([]place, 0, len(tps))
	for _, tp := range tps {
		if v := at(tp); v != nil {
			v.watch.add(tp, x)
			places = append(places, place{v, tp})
		}
	}
	return func() {
		for _, p := range places {
			p.v.watch.remove(p.tp, x)
		}
	}
}
