package broker

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"

	"github.com/estran/estran/broker/group"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
)

// coordinator holds the groups of the shards that this node leads. Their durable part is in the shards' state; what is here is volatile and is loaded again by the
// next leader.
type coordinator struct {
	s      *Server
	mu     sync.Mutex
	shards map[record.ShardID]*shardGroups
	closed bool
}

// shardGroups are the live groups of one shard. Its lock guards them all; answers are given under it, which never blocks.
type shardGroups struct {
	c      *coordinator
	id     record.ShardID
	mu     sync.Mutex
	groups map[string]*liveGroup
	gone   bool // leadership is lost
}

type liveGroup struct {
	*group.Group
	timer *time.Timer
	saves []save // records that are not committed yet, the first of them on its way
}

// save is a group's record, and who waits for it.
type save struct {
	record state.PutGroup
	done   func(int16)
}

func newCoordinator(s *Server) *coordinator {
	return &coordinator{s: s, shards: map[record.ShardID]*shardGroups{}}
}

func (c *coordinator) config() group.Config {
	return group.Config{InitialDelay: c.s.cfg.GroupInitialDelay, MaxSize: c.s.cfg.GroupMaxSize}
}

// lead coordinates a shard's groups until ctx ends.
func (c *coordinator) lead(ctx context.Context, shard uint32) {
	sg := &shardGroups{c: c, id: record.ShardID(shard), groups: map[string]*liveGroup{}}
	now := time.Now()
	sg.mu.Lock()
	for _, st := range c.s.b.Groups(sg.id) {
		g, err := group.Restore(st.ID, c.config(), st.Record, now)
		if err != nil {
			c.s.cfg.Logger.Error("a group's record cannot be read; its members must join again", "component", "broker", "group", st.ID, "err", err)
			g = group.New(st.ID, c.config())
		}
		if g.Size() > 0 {
			sg.rearm(sg.adopt(g))
		}
	}
	sg.mu.Unlock()
	c.mu.Lock()
	c.shards[sg.id] = sg
	c.mu.Unlock()
	<-ctx.Done()
	c.mu.Lock()
	delete(c.shards, sg.id)
	c.mu.Unlock()
	sg.unload()
}

func (sg *shardGroups) unload() {
	sg.mu.Lock()
	defer sg.mu.Unlock()
	sg.gone = true
	for _, g := range sg.groups {
		g.timer.Stop()
		g.Fail(codeNotCoordinator)
	}
	sg.groups = nil
}

func (c *coordinator) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
}

// adopt makes a group live; rearm must follow. sg.mu is held.
func (sg *shardGroups) adopt(g *group.Group) *liveGroup {
	l := &liveGroup{Group: g}
	l.timer = time.AfterFunc(time.Hour, func() { sg.tick(l) })
	g.Persist = func(rec []byte, empty bool, done func(int16)) { sg.persist(l, rec, empty, done) }
	l.timer.Stop()
	sg.groups[g.ID] = l
	return l
}

// persist commits a group's record behind those before it; done runs under the lock.
func (sg *shardGroups) persist(l *liveGroup, rec []byte, empty bool, done func(int16)) {
	if empty && l.ProtocolType == "" {
		done(codeNone)
		return
	}
	l.saves = append(l.saves, save{state.PutGroup{ID: l.ID, ProtocolType: l.ProtocolType, Record: rec, Empty: empty}, done})
	if len(l.saves) == 1 {
		sg.save(l)
	}
}

// save commits the first record that waits, and then the others.
func (sg *shardGroups) save(l *liveGroup) {
	first := l.saves[0]
	go sg.c.s.b.ProposeGroup(sg.id, []state.Command{first.record}, func(err error) { // not under the lock
		sg.mu.Lock()
		defer sg.mu.Unlock()
		if sg.gone {
			return // whoever waits was told when the group was unloaded
		}
		if l.saves = l.saves[1:]; len(l.saves) > 0 {
			sg.save(l)
		}
		first.done(groupCodeOf(err))
		sg.rearm(l)
	})
}

func (sg *shardGroups) tick(l *liveGroup) {
	sg.mu.Lock()
	defer sg.mu.Unlock()
	if sg.gone || sg.groups[l.ID] != l {
		return
	}
	l.Tick(time.Now())
	sg.rearm(l)
}

// rearm sets the timer to the group's next deadline, and drops a group that holds nothing that its durable state does not.
func (sg *shardGroups) rearm(l *liveGroup) {
	next := l.Next()
	switch {
	case !next.IsZero():
		l.timer.Reset(max(time.Until(next), time.Millisecond))
	case l.State == group.Empty && l.Size() == 0 && len(l.saves) == 0:
		l.timer.Stop()
		delete(sg.groups, l.ID)
	default:
		l.timer.Stop()
	}
}

// use runs f on a group under its shard's lock; it is made if it is not live. code is why it cannot be used here.
func (c *coordinator) use(id string, f func(*liveGroup)) (code int16) {
	sg, code := c.shardOf(id)
	if code != codeNone {
		return code
	}
	sg.mu.Lock()
	defer sg.mu.Unlock()
	if sg.gone {
		return codeNotCoordinator
	}
	l := sg.groups[id]
	if l == nil {
		g := group.New(id, c.config())
		if st := c.s.b.Group(id); st != nil {
			if old, err := group.Restore(id, c.config(), st.Record, time.Now()); err == nil && old.Size() == 0 {
				g = old // generation and protocol type go on
			}
		}
		l = sg.adopt(g)
	}
	f(l)
	if sg.groups[id] == l {
		sg.rearm(l)
	}
	return codeNone
}

// shardOf finds the live groups that id belongs to.
func (c *coordinator) shardOf(id string) (*shardGroups, int16) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.s.b.GroupShard(id)
	if sg := c.shards[s]; sg != nil {
		return sg, codeNone
	}
	if node, ok := c.s.b.Leader(s); ok && node == c.s.b.NodeID() {
		return nil, codeCoordinatorLoading
	}
	return nil, codeNotCoordinator
}

// exists reports whether a group is known, live or durable.
func (c *coordinator) exists(id string) bool {
	if c.s.b.Group(id) != nil {
		return true
	}
	sg, code := c.shardOf(id)
	if code != codeNone {
		return false
	}
	sg.mu.Lock()
	defer sg.mu.Unlock()
	return sg.groups[id] != nil
}

// memberID makes the ID of a new member, as Kafka's: the client's name, as far as every version can carry it, and a UUID.
func memberID(client string) string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return client[:min(len(client), 255)] + "-" + hex.EncodeToString(b[:])
}

// groupIDMax bounds a group's name: every version can carry it.
const groupIDMax = 1<<15 - 1

func checkGroupID(id string) int16 {
	if id == "" || len(id) > groupIDMax {
		return codeInvalidGroupID
	}
	return codeNone
}

// FindCoordinator (10), versions 0-4: several keys from 4 (KIP-699).
func handleFindCoordinator(r *request) error {
	var keys []string
	kind := int8(0)
	if r.version <= 3 {
		keys = []string{r.str()}
	}
	if r.version >= 1 {
		kind = r.i8()
	}
	if r.version >= 4 {
		keys = r.names()
	}
	r.tags()
	if r.err != nil {
		return r.err
	}
	w := r.respond(64 + 24*len(keys))
	if r.version >= 1 {
		w.i32(0)
	}
	if r.version >= 4 {
		w.array(len(keys))
	}
	for _, k := range keys {
		code, msg := codeNone, ""
		id, host, port := int32(-1), "", int32(-1)
		switch {
		case kind == 1:
			code, msg = codeTransactionalIDAuth, "transactions are not served by this version"
		case kind != 0:
			code, msg = codeInvalidRequest, "unknown kind of coordinator"
		default:
			code = codeCoordinatorNotAvailable
			if node, ok := r.s.b.Leader(r.s.b.GroupShard(k)); ok {
				if n, ok := r.s.b.Cluster().Node(node); ok {
					code, id, host, port = codeNone, n.ID, n.Host, n.Port
				}
			}
		}
		if r.version >= 4 {
			w.str(k)
			w.i32(id)
			w.str(host)
			w.i32(port)
			w.i16(code)
			w.text(msg)
			w.tags()
			continue
		}
		w.i16(code)
		if r.version >= 1 {
			w.text(msg)
		}
		w.i32(id)
		w.str(host)
		w.i32(port)
	}
	w.tags()
	r.finish(w)
	return nil
}
