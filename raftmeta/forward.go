package raftmeta

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// forwardRetry is the pause while a group has no leader.
const forwardRetry = 20 * time.Millisecond

// forwarded is a command on its way to the leader of its group, and what came of it.
type forwarded struct {
	Kind state.Kind      `json:"kind"`
	Body json.RawMessage `json:"body"`
	// Ask asks whoever it is for the members instead.
	Ask bool `json:"ask,omitempty"`
}

type forwardedResult struct {
	// NotLeader: it was definitely not proposed. Unknown: it may have been.
	NotLeader bool       `json:"notLeader,omitempty"`
	Unknown   string     `json:"unknown,omitempty"`
	Code      state.Code `json:"code"`
	// Index is at or above the index of the command's entry.
	Index uint64 `json:"index"`
	First int64  `json:"first,omitempty"` // of producer IDs
	// Members are the server IDs of the members, as of meta's entry Index.
	Members []string `json:"members,omitempty"`
	Why     string   `json:"why,omitempty"` // of a Code
}

// propose commits a command of meta wherever meta is led, and returns when it has been applied here too.
func (h *Host) propose(ctx context.Context, g *group, c state.Command) (state.Result, error) {
	for {
		r, err := h.proposeOnce(ctx, g, c)
		if !errors.Is(err, ErrNotLeader) {
			return r, err
		}
		t := time.NewTimer(forwardRetry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return r, fmt.Errorf("%w: %w", ErrTimeout, err)
		case <-h.stop:
			t.Stop()
			return r, ErrStopped
		}
	}
}

func (h *Host) proposeOnce(ctx context.Context, g *group, c state.Command) (state.Result, error) {
	if g.leads.Load() > 0 {
		return g.propose(ctx, c)
	}
	to := g.leaderServer()
	if to == "" || to == h.identity.serverID() {
		return state.Result{}, ErrNotLeader
	}
	body, err := json.Marshal(c)
	if err != nil {
		return state.Result{}, err
	}
	msg, err := json.Marshal(forwarded{Kind: state.KindOf(c), Body: body})
	if err != nil {
		return state.Result{}, err
	}
	b, err := h.peers.Forward(ctx, to, uint32(g.id), msg)
	if errors.Is(err, peer.ErrRefused) {
		return state.Result{}, fmt.Errorf("%w: %w", ErrNotLeader, err)
	}
	if err != nil {
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	var r forwardedResult
	if err := json.Unmarshal(b, &r); err != nil {
		return state.Result{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	switch {
	case r.NotLeader:
		return state.Result{}, ErrNotLeader
	case r.Unknown != "":
		return state.Result{}, fmt.Errorf("%w: %s", ErrUnknownOutcome, r.Unknown)
	}
	if err := h.await(ctx, "the change to be applied here", func() bool { return g.applied.Load() >= r.Index }); err != nil {
		return state.Result{}, err
	}
	return state.Result{Code: r.Code, Value: h.valueOf(c, &r)}, nil
}

// valueOf is a forwarded command's own result, as it is seen here.
func (h *Host) valueOf(c state.Command, r *forwardedResult) any {
	var t *state.Topic
	switch c := c.(type) {
	case state.AllocateProducerIDs:
		return record.ProducerID(r.First)
	case state.CreateTopic:
		t, _ = h.Cluster().TopicByID(c.ID)
	case state.CreatePartitions:
		t, _ = h.Cluster().TopicByID(c.ID)
	case state.AlterConfigs:
		t, _ = h.Cluster().TopicByID(c.Topic)
	}
	return t
}

// onForward proposes what a peer has been asked for.
func (h *Host) onForward(ctx context.Context, group uint32, body []byte) ([]byte, error) {
	var f forwarded
	if err := json.Unmarshal(body, &f); err != nil {
		return nil, err
	}
	if f.Ask {
		return json.Marshal(h.memberServers())
	}
	c, err := decodeForwarded(f)
	if err != nil {
		return nil, err
	}
	g := h.meta
	if group != 0 || g == nil {
		return json.Marshal(forwardedResult{NotLeader: true})
	}
	if n, ok := c.(state.RegisterNode); ok { // any node can tell, and the one that leads may be the one of that number
		if why := h.refuseNode(ctx, n.Node); why != "" {
			return json.Marshal(forwardedResult{Code: state.Invalid, Why: why})
		}
	}
	r, err := g.propose(ctx, c)
	switch {
	case errors.Is(err, ErrNotLeader), errors.Is(err, ErrStopped):
		return json.Marshal(forwardedResult{NotLeader: true})
	case err != nil:
		return json.Marshal(forwardedResult{Unknown: err.Error()})
	}
	out := forwardedResult{Code: r.Code, Index: g.applied.Load()}
	if id, ok := r.Value.(record.ProducerID); ok {
		out.First = int64(id)
	}
	return json.Marshal(out)
}

func (h *Host) memberServers() forwardedResult {
	c := h.Cluster()
	out := forwardedResult{Index: c.Version}
	for _, n := range c.Nodes() {
		out.Members = append(out.Members, string(serverOf(n)))
	}
	return out
}

// refuseNode says why a node may not register: another process of its number is there.
func (h *Host) refuseNode(ctx context.Context, n state.Node) string {
	old, ok := h.Cluster().Node(n.ID)
	if !ok || old.Incarnation == n.Incarnation {
		return ""
	}
	there := n.ID == h.cfg.NodeID
	if !there {
		there = len(h.peers.Standings(ctx, 0, []string{string(serverOf(old))}, func(s []peer.Standing) bool { return len(s) > 0 })) > 0
	}
	if !there {
		return ""
	}
	return fmt.Sprintf("node %d is running at %s; give this one another node.id", old.ID, old.Peer)
}

// decodeForwarded reads the commands that are forwarded, and no others.
func decodeForwarded(f forwarded) (state.Command, error) {
	switch f.Kind {
	case state.KindRegisterNode:
		return as[state.RegisterNode](f.Body)
	case state.KindCreateTopic:
		return as[state.CreateTopic](f.Body)
	case state.KindDeleteTopic:
		return as[state.DeleteTopic](f.Body)
	case state.KindCreateParts:
		return as[state.CreatePartitions](f.Body)
	case state.KindAlterConfigs:
		return as[state.AlterConfigs](f.Body)
	case state.KindAllocProducers:
		return as[state.AllocateProducerIDs](f.Body)
	case state.KindAlterMembers:
		return as[state.AlterMembers](f.Body)
	case state.KindDrain:
		return as[state.Drain](f.Body)
	case state.KindPreferLeader:
		return as[state.PreferLeader](f.Body)
	case state.KindSettleSlots:
		return as[state.SettleSlots](f.Body)
	case state.KindTrimOutbox:
		return as[state.TrimOutbox](f.Body)
	}
	return nil, fmt.Errorf("commands of kind %d are not forwarded", f.Kind)
}

func as[C state.Command](body []byte) (state.Command, error) {
	var c C
	err := json.Unmarshal(body, &c)
	return c, err
}
