// Package group is the coordinator's state machine of one consumer group, classic protocol: joins, generations, assignments, sessions. It is pure: time arrives as
// a parameter, answers leave through callbacks, what must survive leaves through Persist. It knows no connection, no clock and no log.
//
// The invariant: a member is given an assignment of a generation only after that generation is durable.
package group

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// State is Kafka's.
type State string

// The states.
const (
	Empty               State = "Empty"
	PreparingRebalance  State = "PreparingRebalance"
	CompletingRebalance State = "CompletingRebalance"
	Stable              State = "Stable"
	Dead                State = "Dead"
)

// Kafka's codes, as far as a group answers them.
const (
	CodeNone                 int16 = 0
	CodeCoordinatorNotAvail  int16 = 15
	CodeNotCoordinator       int16 = 16
	CodeIllegalGeneration    int16 = 22
	CodeInconsistentProtocol int16 = 23
	CodeUnknownMember        int16 = 25
	CodeRebalanceInProgress  int16 = 27
	CodeMemberIDRequired     int16 = 79
	CodeGroupMaxSize         int16 = 81
	CodeFencedInstance       int16 = 82
)

// Protocol is one that a member offers, with its opaque metadata.
type Protocol struct {
	Name     string
	Metadata []byte
}

// Member is a member of a group.
type Member struct {
	ID, InstanceID string
	ClientID, Host string
	Session        time.Duration
	Rebalance      time.Duration
	Protocols      []Protocol
	Assignment     []byte
	join           func(JoinResult)
	sync           func(SyncResult)
	replaced       func(JoinResult) // a static member that came back waits until that is durable
	expires        time.Time
}

// JoinRequest asks to become or stay a member.
type JoinRequest struct {
	MemberID, InstanceID, ClientID, Host string
	Session, Rebalance                   time.Duration
	ProtocolType                         string
	Protocols                            []Protocol
	// NeedID: the client understands that a new member is given its ID first (KIP-394).
	NeedID bool
	// NewID is the ID for a member without one.
	NewID string
}

// JoinResult answers a join. Members is for the leader only.
type JoinResult struct {
	Code           int16
	Generation     int32
	ProtocolType   string
	Protocol       string
	Leader         string
	MemberID       string
	Members        []Member
	SkipAssignment bool
}

// SyncRequest fetches a member's assignment, or brings all if it comes from the leader.
type SyncRequest struct {
	MemberID, InstanceID   string
	Generation             int32
	ProtocolType, Protocol string // "" = not told
	Assignments            map[string][]byte
}

// SyncResult answers a sync.
type SyncResult struct {
	Code                   int16
	ProtocolType, Protocol string
	Assignment             []byte
}

// Config bounds a group.
type Config struct {
	InitialDelay time.Duration
	MaxSize      int
}

// Group is one group. One goroutine at a time uses it.
type Group struct {
	ID           string
	State        State
	ProtocolType string
	Protocol     string
	Generation   int32
	Leader       string

	cfg     Config
	members map[string]*Member
	static  map[string]string    // instance ID -> member ID
	pending map[string]time.Time // IDs given out and not used yet -> when they lapse
	until   time.Time            // end of the current phase of a rebalance
	initial bool                 // the first rebalance of an empty group, which waits for more members
	limit   time.Time            // of the initial wait
	added   bool                 // a member came during it

	// Persist makes the record durable and then calls done, once, from the goroutine that owns the group.
	Persist func(record []byte, empty bool, done func(code int16))
}

// New returns an empty group.
func New(id string, cfg Config) *Group {
	return &Group{ID: id, State: Empty, cfg: cfg, members: map[string]*Member{}, static: map[string]string{}, pending: map[string]time.Time{}}
}

// record is what survives of a group.
type record struct {
	ProtocolType, Protocol, Leader string
	Generation                     int32
	Members                        []Member
}

// Encode returns the group's record.
func (g *Group) Encode() []byte {
	r := record{g.ProtocolType, g.Protocol, g.Leader, g.Generation, g.Members()}
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("group: encoding %q: %v", g.ID, err)) // strings, numbers and bytes always can be
	}
	return b
}

// Restore rebuilds a group from its record. Sessions begin anew.
func Restore(id string, cfg Config, b []byte, now time.Time) (*Group, error) {
	g := New(id, cfg)
	if len(b) == 0 {
		return g, nil
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("group: record of %q: %w", id, err)
	}
	g.ProtocolType, g.Protocol, g.Leader, g.Generation = r.ProtocolType, r.Protocol, r.Leader, r.Generation
	for _, m := range r.Members {
		m.expires = now.Add(m.Session)
		g.members[m.ID] = &m
		if m.InstanceID != "" {
			g.static[m.InstanceID] = m.ID
		}
	}
	if len(g.members) > 0 {
		g.State = Stable
	}
	return g, nil
}

// Members returns copies of the members, by ID.
func (g *Group) Members() []Member {
	out := make([]Member, 0, len(g.members))
	for _, id := range slices.Sorted(maps.Keys(g.members)) {
		out = append(out, *g.members[id])
	}
	return out
}

// Size is the number of members.
func (g *Group) Size() int { return len(g.members) }

// check finds a member and checks its instance ID.
func (g *Group) check(id, instance string) (*Member, int16) {
	if instance != "" {
		cur, ok := g.static[instance]
		if !ok {
			return nil, CodeUnknownMember
		}
		if cur != id {
			return nil, CodeFencedInstance
		}
	}
	m := g.members[id]
	if m == nil {
		return nil, CodeUnknownMember
	}
	return m, CodeNone
}

func (m *Member) touch(now time.Time) { m.expires = now.Add(m.Session) }

// Join handles a join; reply is called once, now or when the rebalance is over.
func (g *Group) Join(now time.Time, r JoinRequest, reply func(JoinResult)) {
	fail := func(code int16) {
		reply(JoinResult{Code: code, Generation: -1, MemberID: r.MemberID})
	}
	_, waiting := g.pending[r.MemberID]
	known := g.members[r.MemberID] != nil || g.static[r.InstanceID] != "" && r.InstanceID != ""
	switch {
	case g.State == Dead:
		fail(CodeCoordinatorNotAvail)
	case !known && len(g.members)+len(g.pending) >= g.cfg.MaxSize && !waiting:
		fail(CodeGroupMaxSize)
	case !g.fits(r):
		fail(CodeInconsistentProtocol)
	case r.MemberID == "":
		g.joinNew(now, r, reply)
	case waiting && r.InstanceID == "":
		delete(g.pending, r.MemberID)
		g.add(now, r, r.MemberID, reply)
	default:
		m, code := g.check(r.MemberID, r.InstanceID)
		if code != CodeNone {
			fail(code)
			return
		}
		g.rejoin(now, m, r, reply)
	}
}

// fits reports whether a member's protocols go with those of the others.
func (g *Group) fits(r JoinRequest) bool {
	if len(r.Protocols) == 0 || r.ProtocolType == "" {
		return false
	}
	if len(g.members) == 0 {
		return true
	}
	if g.ProtocolType != "" && g.ProtocolType != r.ProtocolType {
		return false
	}
	for _, p := range r.Protocols {
		common := true
		for _, m := range g.members {
			if m.ID != r.MemberID && !m.offers(p.Name) {
				common = false
			}
		}
		if common {
			return true
		}
	}
	return false
}

func (m *Member) offers(name string) bool {
	return slices.ContainsFunc(m.Protocols, func(p Protocol) bool { return p.Name == name })
}

func (g *Group) joinNew(now time.Time, r JoinRequest, reply func(JoinResult)) {
	if r.InstanceID != "" {
		if old := g.static[r.InstanceID]; old != "" {
			g.replaceStatic(now, g.members[old], r, reply)
			return
		}
		g.add(now, r, r.NewID, reply)
		return
	}
	if r.NeedID {
		g.pending[r.NewID] = now.Add(r.Session)
		reply(JoinResult{Code: CodeMemberIDRequired, Generation: -1, MemberID: r.NewID})
		return
	}
	g.add(now, r, r.NewID, reply)
}

// replaceStatic gives a static member that came back a new ID; the old one is fenced. In a stable group nothing is rebalanced if it offers what it did before.
func (g *Group) replaceStatic(now time.Time, m *Member, r JoinRequest, reply func(JoinResult)) {
	same := g.sameProtocols(m, r)
	m.answer(CodeFencedInstance)
	delete(g.members, m.ID)
	if g.Leader == m.ID {
		g.Leader = r.NewID
	}
	m.ID = r.NewID
	g.members[m.ID] = m
	g.static[r.InstanceID] = m.ID
	m.update(now, r)
	if g.State == Stable && same {
		m.replaced = reply
		g.Persist(g.Encode(), false, func(code int16) {
			if m.ID != r.NewID || m.replaced == nil {
				return // it was answered: another came in its place, it has gone, or the group has
			}
			m.replaced = nil
			if code != CodeNone {
				reply(JoinResult{Code: code, Generation: -1, MemberID: m.ID})
				return
			}
			res := g.current(m)
			if m.ID == g.Leader { // it is the leader, and has nothing to assign
				res.SkipAssignment = true
				res.Members = g.metadata()
			}
			reply(res)
		})
		return
	}
	m.join = reply
	g.rebalance(now)
}

func (g *Group) sameProtocols(m *Member, r JoinRequest) bool {
	return slices.EqualFunc(m.Protocols, r.Protocols, func(a, b Protocol) bool { return a.Name == b.Name && string(a.Metadata) == string(b.Metadata) })
}

func (m *Member) update(now time.Time, r JoinRequest) {
	m.ClientID, m.Host, m.Session, m.Rebalance, m.Protocols = r.ClientID, r.Host, r.Session, r.Rebalance, r.Protocols
	m.touch(now)
}

func (g *Group) add(now time.Time, r JoinRequest, id string, reply func(JoinResult)) {
	m := &Member{ID: id, InstanceID: r.InstanceID, join: reply}
	m.update(now, r)
	if len(g.members) == 0 {
		g.ProtocolType = r.ProtocolType
	}
	g.members[id] = m
	if r.InstanceID != "" {
		g.static[r.InstanceID] = id
	}
	g.added = true
	g.rebalance(now)
}

func (g *Group) rejoin(now time.Time, m *Member, r JoinRequest, reply func(JoinResult)) {
	same := g.sameProtocols(m, r)
	switch {
	case g.State == CompletingRebalance && same, g.State == Stable && same && m.ID != g.Leader:
		m.touch(now)
		res := g.current(m)
		if m.ID == g.Leader {
			res.Members = g.metadata()
		}
		reply(res)
		return
	case g.State == Empty:
		reply(JoinResult{Code: CodeUnknownMember, Generation: -1, MemberID: r.MemberID})
		return
	}
	if m.join != nil { // the client asks again: the older request is answered too
		m.join(JoinResult{Code: CodeRebalanceInProgress, Generation: -1, MemberID: m.ID})
	}
	m.update(now, r)
	m.join = reply
	g.rebalance(now)
}

func (g *Group) current(m *Member) JoinResult {
	return JoinResult{Generation: g.Generation, ProtocolType: g.ProtocolType, Protocol: g.Protocol, Leader: g.Leader, MemberID: m.ID}
}

// metadata returns the members with what they offer for the chosen protocol.
func (g *Group) metadata() []Member {
	out := g.Members()
	for i := range out {
		for _, p := range out[i].Protocols {
			if p.Name == g.Protocol {
				out[i].Protocols = []Protocol{p}
				break
			}
		}
	}
	return out
}

// rebalance begins one if none is under way, and ends it if everybody is there.
func (g *Group) rebalance(now time.Time) {
	if g.State != PreparingRebalance {
		for _, m := range g.members {
			if m.sync != nil {
				m.sync(SyncResult{Code: CodeRebalanceInProgress})
				m.sync = nil
			}
		}
		g.initial = g.State == Empty && g.cfg.InitialDelay > 0
		g.State = PreparingRebalance
		g.until = now.Add(g.longest())
		if g.initial {
			g.limit = g.until
			g.until = now.Add(min(g.cfg.InitialDelay, g.longest()))
			g.added = false
		}
	}
	if !g.initial && g.allJoined() {
		g.completeJoin(now)
	}
}

func (g *Group) longest() (d time.Duration) {
	for _, m := range g.members {
		d = max(d, m.Rebalance)
	}
	return d
}

func (g *Group) allJoined() bool {
	for _, m := range g.members {
		if m.join == nil {
			return false
		}
	}
	return len(g.pending) == 0
}

// completeJoin begins a generation with the members that came. Static members that did not come stay until their session ends.
func (g *Group) completeJoin(now time.Time) {
	g.initial = false
	for id, m := range g.members {
		if m.join == nil && m.InstanceID == "" {
			g.drop(m)
			delete(g.members, id)
		}
	}
	g.Generation++
	if g.Generation < 0 {
		g.Generation = 1
	}
	if len(g.members) == 0 {
		g.becomeEmpty()
		return
	}
	if m := g.members[g.Leader]; m == nil || m.join == nil {
		g.Leader = ""
		for _, id := range slices.Sorted(maps.Keys(g.members)) {
			if g.members[id].join != nil {
				g.Leader = id
				break
			}
		}
		if g.Leader == "" { // only static members that are away: nobody can lead
			g.until = now.Add(g.longest())
			return
		}
	}
	g.Protocol = g.vote()
	g.State = CompletingRebalance
	g.until = now.Add(g.longest())
	for _, id := range slices.Sorted(maps.Keys(g.members)) {
		m := g.members[id]
		if m.join == nil {
			continue
		}
		res := g.current(m)
		if id == g.Leader {
			res.Members = g.metadata()
		}
		m.touch(now)
		reply := m.join
		m.join = nil
		reply(res)
	}
}

func (g *Group) becomeEmpty() {
	g.State, g.Leader, g.Protocol = Empty, "", ""
	g.Persist(g.Encode(), true, func(int16) {})
}

// vote chooses the protocol that most members prefer among those that all offer.
func (g *Group) vote() string {
	votes := map[string]int{}
	for _, m := range g.members {
		for _, p := range m.Protocols {
			all := true
			for _, o := range g.members {
				all = all && o.offers(p.Name)
			}
			if all {
				votes[p.Name]++
				break
			}
		}
	}
	best := ""
	for _, name := range slices.Sorted(maps.Keys(votes)) {
		if best == "" || votes[name] > votes[best] {
			best = name
		}
	}
	return best
}

// drop forgets a member's instance and answers what it waits for.
func (g *Group) drop(m *Member) {
	if m.InstanceID != "" && g.static[m.InstanceID] == m.ID {
		delete(g.static, m.InstanceID)
	}
	m.answer(CodeUnknownMember)
}

// answer tells whoever waits for something of a member that it will not come.
func (m *Member) answer(code int16) {
	for _, join := range []func(JoinResult){m.join, m.replaced} {
		if join != nil {
			join(JoinResult{Code: code, Generation: -1, MemberID: m.ID})
		}
	}
	if m.sync != nil {
		m.sync(SyncResult{Code: code})
	}
	m.join, m.replaced, m.sync = nil, nil, nil
}

// remove takes a member out, which makes the others rebalance.
func (g *Group) remove(now time.Time, m *Member) {
	g.drop(m)
	delete(g.members, m.ID)
	switch {
	case g.State == PreparingRebalance:
		if !g.initial && g.allJoined() {
			g.completeJoin(now)
		}
	case len(g.members) == 0:
		g.Generation++
		g.becomeEmpty()
	default:
		g.rebalance(now)
	}
}

// Sync handles a sync; reply is called once. The leader's assignments become those of the generation when they are durable.
func (g *Group) Sync(now time.Time, r SyncRequest, reply func(SyncResult)) {
	m, code := g.check(r.MemberID, r.InstanceID)
	switch {
	case code != CodeNone:
	case r.Generation != g.Generation:
		code = CodeIllegalGeneration
	case r.ProtocolType != "" && r.ProtocolType != g.ProtocolType, r.Protocol != "" && r.Protocol != g.Protocol:
		code = CodeInconsistentProtocol
	case g.State == PreparingRebalance:
		code = CodeRebalanceInProgress
	}
	if code != CodeNone {
		reply(SyncResult{Code: code})
		return
	}
	m.touch(now)
	if g.State == Stable {
		reply(g.assigned(m))
		return
	}
	if m.sync != nil {
		m.sync(SyncResult{Code: CodeRebalanceInProgress})
	}
	m.sync = reply
	if m.ID != g.Leader {
		return
	}
	for id, x := range g.members {
		x.Assignment = r.Assignments[id]
	}
	generation := g.Generation
	g.Persist(g.Encode(), false, func(code int16) { g.synced(generation, code) })
}

// synced gives out the assignments of a generation that is durable now.
func (g *Group) synced(generation int32, code int16) {
	if g.Generation != generation || g.State != CompletingRebalance {
		return
	}
	if code == CodeNone {
		g.State = Stable
	}
	for _, id := range slices.Sorted(maps.Keys(g.members)) {
		m := g.members[id]
		if m.sync == nil {
			continue
		}
		res := g.assigned(m)
		if code != CodeNone {
			res = SyncResult{Code: code}
		}
		reply := m.sync
		m.sync = nil
		reply(res)
	}
}

func (g *Group) assigned(m *Member) SyncResult {
	return SyncResult{ProtocolType: g.ProtocolType, Protocol: g.Protocol, Assignment: m.Assignment}
}

// Heartbeat keeps a member's session.
func (g *Group) Heartbeat(now time.Time, id, instance string, generation int32) int16 {
	m, code := g.check(id, instance)
	switch {
	case code != CodeNone:
		return code
	case generation != g.Generation:
		return CodeIllegalGeneration
	}
	m.touch(now)
	if g.State == PreparingRebalance {
		return CodeRebalanceInProgress
	}
	return CodeNone
}

// Leave takes a member out by its ID, or a static one by its instance ID (KIP-345).
func (g *Group) Leave(now time.Time, id, instance string) int16 {
	if instance != "" && id == "" {
		id = g.static[instance]
		if id == "" {
			return CodeUnknownMember
		}
	}
	if _, ok := g.pending[id]; ok {
		delete(g.pending, id)
		if g.State == PreparingRebalance && !g.initial && g.allJoined() {
			g.completeJoin(now)
		}
		return CodeNone
	}
	m, code := g.check(id, instance)
	if code != CodeNone {
		return code
	}
	g.remove(now, m)
	return CodeNone
}

// CheckCommit says whether offsets may be committed by this member of this generation. A commit from outside any membership is allowed while the group is empty.
func (g *Group) CheckCommit(now time.Time, id, instance string, generation int32) int16 {
	if generation < 0 && id == "" && instance == "" {
		if g.State == Empty {
			return CodeNone
		}
		return CodeUnknownMember
	}
	m, code := g.check(id, instance)
	switch {
	case code != CodeNone:
		return code
	case generation != g.Generation:
		return CodeIllegalGeneration
	case g.State == CompletingRebalance:
		m.touch(now)
		return CodeRebalanceInProgress
	}
	m.touch(now)
	return CodeNone
}

// Tick ends what is over at now: sessions, IDs that were not used, phases of a rebalance.
func (g *Group) Tick(now time.Time) {
	for id, t := range g.pending {
		if !now.Before(t) {
			delete(g.pending, id)
			if g.State == PreparingRebalance && !g.initial && g.allJoined() {
				g.completeJoin(now)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(g.members)) {
		if m := g.members[id]; m != nil && m.join == nil && !now.Before(m.expires) {
			g.remove(now, m)
		}
	}
	if g.until.IsZero() || now.Before(g.until) {
		return
	}
	switch g.State {
	case PreparingRebalance:
		if g.initial && g.added && now.Before(g.limit) {
			g.added = false
			g.until = now.Add(g.cfg.InitialDelay)
			if g.until.After(g.limit) {
				g.until = g.limit
			}
			return
		}
		g.completeJoin(now)
	case CompletingRebalance: // whoever has not synced by now does not: a client that lost its answer must not hold the others
		g.until = time.Time{}
		late := false
		for _, id := range slices.Sorted(maps.Keys(g.members)) {
			if m := g.members[id]; m != nil && m.sync == nil {
				late = true
				g.drop(m)
				delete(g.members, id)
			}
		}
		if late && len(g.members) == 0 {
			g.Generation++
			g.becomeEmpty()
		} else if late {
			g.rebalance(now)
		}
	default:
		g.until = time.Time{}
	}
}

// Next is when Tick has something to do; zero if nothing is due.
func (g *Group) Next() (t time.Time) {
	soon := func(x time.Time) {
		if !x.IsZero() && (t.IsZero() || x.Before(t)) {
			t = x
		}
	}
	for _, x := range g.pending {
		soon(x)
	}
	for _, m := range g.members {
		if m.join == nil {
			soon(m.expires)
		}
	}
	if g.State == PreparingRebalance || g.State == CompletingRebalance {
		soon(g.until)
	}
	return t
}

// Fail ends the group here: whoever waits is told code. The group is not used any more.
func (g *Group) Fail(code int16) {
	g.State = Dead
	for _, m := range g.members {
		m.answer(code)
	}
}
