package raftmeta

import (
	"context"
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/peer"
)

const (
	aliveEvery = time.Second
	// aliveWait is how long a node may owe an answer before clients are not sent to it any more.
	aliveWait = 3 * time.Second
)

// nodesDown are the nodes that do not answer.
type nodesDown struct {
	mu   sync.Mutex
	down map[int32]bool
}

func (d *nodesDown) set(node int32, down bool) (changed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down[node] == down {
		return false
	}
	if d.down == nil {
		d.down = map[int32]bool{}
	}
	d.down[node] = down
	return true
}

// Down reports whether a node does not answer this one. A client that is told of such a node may go on asking it: sarama keeps a group's coordinator for as long as it is
// listed. A node that reaches no majority does not know who is down, and says nobody is.
func (h *Host) Down(node int32) bool {
	d := &h.down
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, down := range d.down {
		if down {
			n++
		}
	}
	return d.down[node] && n <= (len(h.Cluster().Members())-1)/2
}

// watchNodes asks the other members whether they are there, each by itself, until the node stops.
func (h *Host) watchNodes() {
	var wg sync.WaitGroup
	defer wg.Wait()
	watched := map[int32]bool{}
	for {
		for _, id := range h.Cluster().Members() {
			if id != h.cfg.NodeID && !watched[id] {
				watched[id] = true
				wg.Go(func() { h.watchNode(h.ctx, id) })
			}
		}
		if sleep(h.ctx, h.stop, h.cfg.slow(aliveEvery)) != nil {
			return
		}
	}
}

// watchNode asks one node; of one that is no member any more nothing is known.
func (h *Host) watchNode(ctx context.Context, node int32) {
	for sleep(ctx, h.stop, h.cfg.slow(aliveEvery)) == nil {
		n, ok := h.Cluster().Node(node)
		if !ok || !h.Cluster().Member(node) {
			h.down.set(node, false)
			continue
		}
		try, cancel := context.WithTimeout(ctx, h.cfg.slow(aliveWait))
		got := h.peers.Standings(try, 0, []string{string(serverOf(n))}, func(s []peer.Standing) bool { return len(s) > 0 })
		cancel()
		if ctx.Err() == nil && h.down.set(node, len(got) == 0) {
			h.cfg.Logger.Info("a node", "event", "node.contact", "node", node, "answers", len(got) > 0)
		}
	}
}
