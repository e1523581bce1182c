package raftmeta

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/estran/estran/raftmeta/peer"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// forwardRetry is the pause while a group has no leader.
const forwardRetry = 20 * time.Millisecond

// forwardBytes bounds what is forwarded at once; one command may be larger.
const forwardBytes = 256 << 10

// forwarded is a command on its way to the leader of its group, or several; and what came of it.
type forwarded struct {
	Kind     state.Kind      `json:"kind,omitempty"`
	Body     json.RawMessage `json:"body,omitempty"`
	Commands []forwarded     `json:"commands,omitempty"`
	// Ask asks whoever it is for the members instead.
	Ask bool `json:"ask,omitempty"`
	// Read asks the leader how far one must have applied to see all that was acknowledged.
	Read bool `json:"read,omitempty"`
	// Payload asks whoever it is, leader or not, for bytes of an entry of the group.
	Payload *payloadAsked `json:"payload,omitempty"`
}

type forwardedResult struct {
	// NotLeader: it was definitely not proposed. Unknown: it may have been.
	NotLeader bool       `json:"notLeader,omitempty"`
	Unknown   string     `json:"unknown,omitempty"`
	Code      state.Code `json:"code,omitempty"`
	// Index is at or above the index of the command's entry.
	Index uint64 `json:"index,omitempty"`
	First int64  `json:"first,omitempty"` // of producer IDs
	// Members are the server IDs of the members, as of meta's entry Index. One that has not registered has an ID without an incarnation.
	Members []string `json:"members,omitempty"`
	Why     string   `json:"why,omitempty"` // of a Code
	Payload []byte   `json:"payload,omitempty"`
	// Results are those of Commands.
	Results []forwardedResult `json:"results,omitempty"`
}

// decision is what became of a proposed command.
type decision struct {
	r   state.Result
	err error
}

// propose commits a command of meta wherever meta is led, and returns when it has been applied here too.
func (h *Host) propose(ctx context.Context, g *group, c state.Command) (state.Result, error) {
	d := h.proposeAll(ctx, g, []state.Command{c})[0]
	return d.r, d.err
}

// insist is propose for a command that may be applied twice: it is proposed again as long as nobody knows whether it was. A leader that goes while it is asked ends no start, and no command of an operator.
func (h *Host) insist(ctx context.Context, c state.Command) (state.Result, error) {
	for {
		r, err := h.propose(ctx, h.meta, c)
		if !errors.Is(err, ErrUnknownOutcome) {
			return r, err
		}
		if why := h.pause(ctx); why != nil {
			return state.Result{}, fmt.Errorf("%w: %w", why, err)
		}
	}
}

// proposeAll is propose for many: they share entries and forwards.
func (h *Host) proposeAll(ctx context.Context, g *group, cs []state.Command) []decision {
	out := make([]decision, len(cs))
	left := make([]int, len(cs))
	for i := range left {
		left[i] = i
	}
	for {
		h.proposeOnce(ctx, g, cs, left, out)
		left = slices.DeleteFunc(left, func(i int) bool { return !errors.Is(out[i].err, ErrNotLeader) })
		if len(left) == 0 {
			return out
		}
		if why := h.pause(ctx); why != nil {
			for _, i := range left {
				out[i].err = fmt.Errorf("%w: %w", why, out[i].err)
			}
			return out
		}
	}
}

// pause waits before the leader of a group is looked for again; an error says why it must not be.
func (h *Host) pause(ctx context.Context) error {
	t := time.NewTimer(forwardRetry)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ErrTimeout
	case <-h.stop:
		return ErrStopped
	}
}

// proposeOnce proposes cs[i] for all i in `which`, here or where the group is led.
func (h *Host) proposeOnce(ctx context.Context, g *group, cs []state.Command, which []int, out []decision) {
	if g.leads.Load() > 0 {
		g.proposeAll(ctx, cs, which, out)
		return
	}
	to := g.leaderServer()
	if to == "" || to == h.identity.serverID() {
		for _, i := range which {
			out[i].err = ErrNotLeader
		}
		return
	}
	var part []int
	var msg forwarded
	size := 0
	flush := func() {
		if len(part) > 0 {
			h.forwardAll(ctx, g, to, cs, part, &msg, out)
		}
		part, msg.Commands, size = part[:0], nil, 0
	}
	for _, i := range which {
		body, err := json.Marshal(cs[i])
		if err != nil {
			out[i].err = err
			continue
		}
		if size += len(body); size > forwardBytes {
			flush()
			size = len(body)
		}
		part, msg.Commands = append(part, i), append(msg.Commands, forwarded{Kind: state.KindOf(cs[i]), Body: body})
	}
	flush()
}

// forwardAll asks the leader to propose msg.Commands, which are cs[i] for all i in `which`.
func (h *Host) forwardAll(ctx context.Context, g *group, to string, cs []state.Command, which []int, msg *forwarded, out []decision) {
	results, err := h.forward(ctx, g, to, msg)
	index := uint64(0)
	for k, i := range which {
		out[i] = decision{err: err}
		if err != nil {
			continue
		}
		switch r := &results[k]; {
		case r.NotLeader:
			out[i].err = ErrNotLeader
		case r.Unknown != "":
			out[i].err = fmt.Errorf("%w: %s", ErrUnknownOutcome, r.Unknown)
		default:
			index = max(index, r.Index)
		}
	}
	if err != nil {
		return
	}
	err = h.await(ctx, "the change to be applied here", func() bool { return g.applied.Load() >= index })
	for k, i := range which {
		if out[i].err == nil {
			if out[i].err = err; err == nil {
				out[i].r = state.Result{Code: results[k].Code, Value: h.valueOf(cs[i], &results[k])}
			}
		}
	}
}

// Current returns when all of meta that was acknowledged before the call, by whatever node, is applied here. Before that a node must not say that something does not exist, or does.
func (h *Host) Current(ctx context.Context) error {
	for {
		err := h.catchUp(ctx)
		if !errors.Is(err, ErrNotLeader) {
			return err
		}
		if why := h.pause(ctx); why != nil {
			return fmt.Errorf("%w: %w", why, err)
		}
	}
}

func (h *Host) catchUp(ctx context.Context) error {
	if h.meta.leads.Load() > 0 {
		return h.prove(ctx, h.meta)
	}
	to := h.meta.leaderServer()
	if to == "" || to == h.identity.serverID() {
		return ErrNotLeader
	}
	body, err := json.Marshal(forwarded{Read: true})
	if err != nil {
		return err
	}
	b, err := h.peers.Forward(ctx, to, uint32(h.meta.id), body)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotLeader, err) // a question may be asked again
	}
	var r forwardedResult
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	if r.NotLeader {
		return ErrNotLeader
	}
	return h.await(ctx, "meta to be applied as far as it is acknowledged", func() bool { return h.meta.applied.Load() >= r.Index })
}

// forward sends commands to the leader; it returns a result for each.
func (h *Host) forward(ctx context.Context, g *group, to string, msg *forwarded) ([]forwardedResult, error) {
	body, err := json.Marshal(msg)
	if err != nil {
		return nil, err
	}
	b, err := h.peers.Forward(ctx, to, uint32(g.id), body)
	if errors.Is(err, peer.ErrRefused) {
		return nil, fmt.Errorf("%w: %w", ErrNotLeader, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	var r forwardedResult
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	if r.NotLeader {
		return nil, ErrNotLeader
	}
	if len(r.Results) != len(msg.Commands) {
		return nil, fmt.Errorf("%w: %d results for %d commands", ErrUnknownOutcome, len(r.Results), len(msg.Commands))
	}
	return r.Results, nil
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
	if f.Payload != nil {
		return json.Marshal(h.payloadFor(group, *f.Payload))
	}
	if group != 0 || !h.serving.Load() {
		return json.Marshal(forwardedResult{NotLeader: true})
	}
	if f.Read {
		if err := h.prove(ctx, h.meta); err != nil {
			return json.Marshal(forwardedResult{NotLeader: true})
		}
		return json.Marshal(forwardedResult{Index: h.meta.applied.Load()})
	}
	single := f.Kind != 0
	if single {
		f.Commands = []forwarded{f}
	}
	cs, which := make([]state.Command, len(f.Commands)), make([]int, len(f.Commands))
	for i, c := range f.Commands {
		var err error
		if cs[i], err = decodeForwarded(c); err != nil {
			return nil, err
		}
		which[i] = i
		if n, ok := cs[i].(state.RegisterNode); ok { // any node can tell, and the one that leads may be the one of that number
			if why := h.refuseNode(ctx, n.Node); why != "" {
				return json.Marshal(forwardedResult{Code: state.Invalid, Why: why})
			}
		}
	}
	decided := make([]decision, len(cs))
	h.meta.proposeAll(ctx, cs, which, decided)
	var out forwardedResult
	for _, d := range decided {
		out.Results = append(out.Results, h.meta.resultOf(d))
	}
	if single {
		out = out.Results[0]
	}
	return json.Marshal(out)
}

func (g *group) resultOf(d decision) forwardedResult {
	switch {
	case errors.Is(d.err, ErrNotLeader), errors.Is(d.err, ErrStopped):
		return forwardedResult{NotLeader: true}
	case d.err != nil:
		return forwardedResult{Unknown: d.err.Error()}
	}
	out := forwardedResult{Code: d.r.Code, Index: g.applied.Load()}
	if id, ok := d.r.Value.(record.ProducerID); ok {
		out.First = int64(id)
	}
	return out
}

func (h *Host) memberServers() forwardedResult {
	c := h.Cluster()
	out := forwardedResult{Index: c.Version}
	for _, id := range c.Members() {
		n, ok := c.Node(id)
		if !ok {
			n.ID = id
		}
		out.Members = append(out.Members, string(serverOf(n)))
	}
	return out
}

// removes reports whether a server does not belong to the members any more, by an answer of memberServers: another has its place, or none.
func (r *forwardedResult) removes(server string) bool {
	founder := string(serverOf(state.Node{ID: nodeOf(server)})) // it may be waiting for a leader to register
	return len(r.Members) > 0 && !slices.Contains(r.Members, server) && !slices.Contains(r.Members, founder)
}

// refuseTime bounds how long a node that may be there is waited for.
const refuseTime = time.Second

// refuseNode says why a node may not register: another process of its number is there.
func (h *Host) refuseNode(ctx context.Context, n state.Node) string {
	old, ok := h.Cluster().Node(n.ID)
	if !ok || old.Incarnation == n.Incarnation {
		return ""
	}
	there := n.ID == h.cfg.NodeID
	if !there {
		ctx, cancel := context.WithTimeout(ctx, refuseTime) // one that is gone is never reached, and who asks does not wait for ever
		defer cancel()
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
	case state.KindRaiseLevel:
		return as[state.RaiseFeatureLevel](f.Body)
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
