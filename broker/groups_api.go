package broker

import (
	"time"

	"github.com/estran/estran/broker/group"
)

// The classic group protocol. Type, metadata and assignments are opaque: consumers, Connect and Schema Registry use it alike.

// JoinGroup (11), versions 0-9: rebalance timeout from 1, static members from 5 (KIP-345), protocol type in the answer from 7, a reason from 8, skip_assignment from
// 9 (KIP-814). From 4 a new member is given its ID first (KIP-394).
func handleJoinGroup(r *request) error {
	id := r.str()
	q := group.JoinRequest{Session: ms(r.i32()), NeedID: r.version >= 4}
	q.Rebalance = q.Session
	if r.version >= 1 {
		q.Rebalance = ms(r.i32())
	}
	q.MemberID = r.str()
	if r.version >= 5 {
		if s := r.nstr(); s != nil {
			q.InstanceID = *s
		}
	}
	q.ProtocolType = r.str()
	for range max(r.array(3), 0) {
		p := group.Protocol{Name: r.str(), Metadata: append([]byte(nil), r.bytes()...)}
		r.tags()
		if len(q.Protocols) <= protocolsMax {
			q.Protocols = append(q.Protocols, p)
		}
	}
	if r.version >= 8 {
		r.nstr() // reason
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	q.ClientID, q.Host, q.NewID = r.client, "/"+r.c.ip, memberID(r.client)
	if q.InstanceID != "" {
		q.NewID = memberID(q.InstanceID)
	}
	code := checkGroupID(id)
	if code == codeNone && (q.Session < r.s.cfg.GroupMinSession || q.Session > r.s.cfg.GroupMaxSession) {
		code = codeInvalidSessionTimeout
	}
	if code == codeNone && len(q.Protocols) > protocolsMax {
		code = codeInconsistentProtocol
	}
	if code == codeNone {
		code = r.s.groups.use(id, func(g *liveGroup) { g.Join(time.Now(), q, r.joined) })
	}
	if code != codeNone {
		r.joined(group.JoinResult{Code: code, Generation: -1, MemberID: q.MemberID})
	}
	return nil
}

// protocolsMax bounds the protocols of a member: every member's are compared with every other's. Clients have a handful.
const protocolsMax = 100

func ms(v int32) time.Duration { return time.Duration(v) * time.Millisecond }

func (r *request) joined(j group.JoinResult) {
	w := r.respond(256)
	if r.version >= 2 {
		w.i32(0)
	}
	w.i16(j.Code)
	w.i32(j.Generation)
	if r.version >= 7 {
		w.text(j.ProtocolType)
		w.text(j.Protocol)
	} else {
		w.str(j.Protocol)
	}
	w.str(j.Leader)
	if r.version >= 9 {
		w.bool(j.SkipAssignment)
	}
	w.str(j.MemberID)
	w.array(len(j.Members))
	for _, m := range j.Members {
		w.str(m.ID)
		if r.version >= 5 {
			w.text(m.InstanceID)
		}
		var meta []byte
		if len(m.Protocols) > 0 {
			meta = m.Protocols[0].Metadata
		}
		w.bytes(meta)
		w.tags()
	}
	w.tags()
	r.finish(w)
}

// SyncGroup (14), versions 0-5: static members from 3, protocol from 5.
func handleSyncGroup(r *request) error {
	id := r.str()
	q := group.SyncRequest{Generation: r.i32(), MemberID: r.str()}
	if r.version >= 3 {
		if s := r.nstr(); s != nil {
			q.InstanceID = *s
		}
	}
	if r.version >= 5 {
		if s := r.nstr(); s != nil {
			q.ProtocolType = *s
		}
		if s := r.nstr(); s != nil {
			q.Protocol = *s
		}
	}
	n := max(r.array(3), 0)
	q.Assignments = make(map[string][]byte, r.room(n, 3))
	for range n {
		m := r.str()
		q.Assignments[m] = append([]byte(nil), r.bytes()...)
		r.tags()
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	code := checkGroupID(id)
	if code == codeNone {
		code = r.s.groups.use(id, func(g *liveGroup) { g.Sync(time.Now(), q, r.synced) })
	}
	if code != codeNone {
		r.synced(group.SyncResult{Code: code})
	}
	return nil
}

func (r *request) synced(s group.SyncResult) {
	w := r.respond(64 + len(s.Assignment))
	if r.version >= 1 {
		w.i32(0)
	}
	w.i16(s.Code)
	if r.version >= 5 {
		w.text(s.ProtocolType)
		w.text(s.Protocol)
	}
	w.bytes(s.Assignment)
	w.tags()
	r.finish(w)
}

// Heartbeat (12), versions 0-4: static members from 3.
func handleHeartbeat(r *request) error {
	id, generation, member, instance := r.str(), r.i32(), r.str(), ""
	if r.version >= 3 {
		if s := r.nstr(); s != nil {
			instance = *s
		}
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	code := checkGroupID(id)
	if code == codeNone {
		var beat int16
		if code = r.s.groups.use(id, func(g *liveGroup) { beat = g.Heartbeat(time.Now(), member, instance, generation) }); code == codeNone {
			code = beat
		}
	}
	w := r.respond(16)
	if r.version >= 1 {
		w.i32(0)
	}
	w.i16(code)
	w.tags()
	r.finish(w)
	return nil
}

// LeaveGroup (13), versions 0-5: several members from 3 (KIP-345), a reason from 5.
func handleLeaveGroup(r *request) error {
	type leaver struct {
		member, instance string
		code             int16
	}
	id := r.str()
	var who []leaver
	if r.version <= 2 {
		who = []leaver{{member: r.str()}}
	} else {
		who = make([]leaver, max(r.array(3), 0))
		for i := range who {
			l := &who[i]
			l.member = r.str()
			if s := r.nstr(); s != nil {
				l.instance = *s
			}
			if r.version >= 5 {
				r.nstr()
			}
			r.tags()
		}
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	code := checkGroupID(id)
	if code == codeNone {
		code = r.s.groups.use(id, func(g *liveGroup) {
			for i := range who {
				who[i].code = g.Leave(time.Now(), who[i].member, who[i].instance)
			}
		})
	}
	if r.version <= 2 && code == codeNone {
		code = who[0].code
	}
	w := r.respond(64 + 8*len(who))
	if r.version >= 1 {
		w.i32(0)
	}
	w.i16(code)
	if r.version >= 3 {
		if code != codeNone {
			who = nil
		}
		w.array(len(who))
		for _, l := range who {
			w.str(l.member)
			w.text(l.instance)
			w.i16(l.code)
			w.tags()
		}
	}
	w.tags()
	r.finish(w)
	return nil
}

// DescribeGroups (15), versions 0-6: authorized operations from 3, static members from 4; from 6 an unknown group is an error.
func handleDescribeGroups(r *request) error {
	ids := r.names()
	if r.version >= 3 {
		r.bool()
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	w := r.respond(256 + 40*len(ids))
	if r.version >= 1 {
		w.i32(0)
	}
	w.array(len(ids))
	for _, id := range ids {
		r.describeGroup(w, id)
	}
	w.tags()
	r.finish(w)
	return nil
}

func (r *request) describeGroup(w *writer, id string) {
	view := group.Group{State: group.Dead}
	code, msg := checkGroupID(id), ""
	if code == codeNone {
		switch {
		case r.s.groups.exists(id):
			code = r.s.groups.use(id, func(g *liveGroup) {
				view.State, view.ProtocolType, view.Protocol = g.State, g.ProtocolType, g.Protocol
			})
		case r.version >= 6:
			code, msg = codeGroupIDNotFound, "unknown group"
		}
	}
	var members []group.Member
	if code == codeNone && view.State != group.Dead {
		r.s.groups.use(id, func(g *liveGroup) { members = g.Members() })
		if st := r.s.b.Group(id); view.ProtocolType == "" && st != nil {
			view.ProtocolType = st.ProtocolType
		}
	}
	w.i16(code)
	if r.version >= 6 {
		w.text(msg)
	}
	w.str(id)
	w.str(string(view.State))
	w.str(view.ProtocolType)
	w.str(view.Protocol)
	w.array(len(members))
	for _, m := range members {
		w.str(m.ID)
		if r.version >= 4 {
			w.text(m.InstanceID)
		}
		w.str(m.ClientID)
		w.str(m.Host)
		var meta []byte
		for _, p := range m.Protocols {
			if p.Name == view.Protocol {
				meta = p.Metadata
			}
		}
		w.bytes(meta)
		w.bytes(m.Assignment)
		w.tags()
	}
	if r.version >= 3 {
		w.i32(noOperations)
	}
	w.tags()
}

// ListGroups (16), versions 0-5: state filter from 4, type filter from 5.
func handleListGroups(r *request) error {
	var states, types []string
	if r.version >= 4 {
		states = r.strs()
	}
	if r.version >= 5 {
		types = r.strs()
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	rows := r.s.groups.list(states, types)
	w := r.respond(64 * (1 + len(rows)))
	if r.version >= 1 {
		w.i32(0)
	}
	w.i16(codeNone)
	w.array(len(rows))
	for _, g := range rows {
		w.str(g.id)
		w.str(g.protocol)
		if r.version >= 4 {
			w.str(g.state)
		}
		if r.version >= 5 {
			w.str("classic")
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

// DeleteGroups (42), versions 0-2.
func handleDeleteGroups(r *request) error {
	ids := r.names()
	r.tags()
	if r.err != nil {
		return r.err
	}
	w := r.respond(16 * (1 + len(ids)))
	w.i32(0)
	w.array(len(ids))
	for _, id := range ids {
		w.str(id)
		w.i16(r.s.groups.remove(id))
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}
