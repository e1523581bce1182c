//go:build planted

package peer

import (
	"sync"

	"github.com/estran/estran/localstack/planted"
	"github.com/hashicorp/raft"
)

// handlers are raft's own for heartbeats, by transport.
var handlers sync.Map

func (t *Transport) keepHandler(f func(raft.RPC)) {
	if planted.On(planted.StockHeartbeat) {
		handlers.Store(t, f)
	}
}

// handBeat lets raft handle a heartbeat on the connection's goroutine, beside its main loop.
func (t *Transport) handBeat(a *raft.AppendEntriesRequest) (resp any, done bool, err error) {
	f, ok := handlers.Load(t)
	if !ok || !isBeat(a) {
		return nil, false, nil
	}
	ch := make(chan raft.RPCResponse, 1)
	f.(func(raft.RPC))(raft.RPC{Command: a, RespChan: ch})
	select {
	case r := <-ch:
		return r.Response, true, r.Error
	default: // it is shut down
		return nil, false, nil
	}
}
