package group

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Two groups are given the same requests, at the same times, with records that become durable late or not at all: they answer the same, each request once, and nobody is given an
// assignment of a generation that is not durable. Left alone a group answers everybody and becomes empty.

// asked is a request and its answers, one of each group.
type asked struct {
	what   string
	member string
	joins  [2][]JoinResult
	syncs  [2][]SyncResult
}

func (a *asked) answers(i int) int { return len(a.joins[i]) + len(a.syncs[i]) }

// waiting is a record on its way to the log.
type waiting struct {
	bytes []byte
	done  func(int16)
}

type groupRun struct {
	t             *rapid.T
	now           time.Time
	g             [2]*Group
	queue         [2][]waiting
	instances     []string // that clients have
	durable       [2]record
	all           []*asked
	made          int
	known         []string             // member IDs that were given out
	heard, surely map[string]time.Time // when a member was heard of last: at most, at least
	leaders       map[int32]string     // by generation
	newest        int32
}

func newGroupRun(t *rapid.T) *groupRun {
	cfg := Config{InitialDelay: time.Duration(rapid.IntRange(0, 3).Draw(t, "initial delay")) * time.Second, MaxSize: rapid.IntRange(2, 6).Draw(t, "most members")}
	instances := rapid.SampledFrom([][]string{{""}, {"", "", "i1", "i2"}, {"i1"}}).Draw(t, "instances")
	r := &groupRun{t: t, instances: instances, now: time.Unix(1000, 0), heard: map[string]time.Time{}, surely: map[string]time.Time{}, leaders: map[int32]string{}}
	for i := range r.g {
		r.g[i] = New("g", cfg)
		r.attach(i)
	}
	return r
}

func (r *groupRun) attach(i int) {
	r.g[i].Persist = func(rec []byte, _ bool, done func(int16)) { r.queue[i] = append(r.queue[i], waiting{rec, done}) }
}

// drawMember is a member, most of the time; or nobody yet, one that has been, or a stranger.
func (r *groupRun) drawMember(t *rapid.T) string {
	all := append([]string{"", "", "stranger"}, r.known[max(0, len(r.known)-3):]...)
	for _, m := range r.g[0].Members() {
		all = append(all, m.ID, m.ID, m.ID)
	}
	return rapid.SampledFrom(all).Draw(t, "member")
}

func (r *groupRun) join(t *rapid.T) {
	r.made++
	req := JoinRequest{MemberID: r.drawMember(t), InstanceID: rapid.SampledFrom(r.instances).Draw(t, "instance"), ProtocolType: "consumer",
		Session: time.Duration(rapid.IntRange(6, 20).Draw(t, "session")) * time.Second, Rebalance: time.Duration(rapid.IntRange(5, 40).Draw(t, "rebalance")) * time.Second,
		NeedID: rapid.Bool().Draw(t, "need ID"), NewID: fmt.Sprint("m", r.made)}
	for _, p := range rapid.SampledFrom([][]string{{"range"}, {"range", "sticky"}, {"sticky", "range"}, {"sticky"}}).Draw(t, "protocols") {
		req.Protocols = append(req.Protocols, Protocol{p, []byte(p)})
	}
	a := &asked{what: "join", member: req.MemberID}
	r.all = append(r.all, a)
	for i, g := range r.g {
		g.Join(r.now, req, func(j JoinResult) {
			a.joins[i] = append(a.joins[i], j)
			r.joined(i, &req, &j)
		})
	}
	if r.g[0].members[req.NewID] != nil { // in the place of a static one; its answer waits until that is durable
		r.heard[req.NewID], r.surely[req.NewID] = r.now, r.now
	}
}

// joined judges a join's answer.
func (r *groupRun) joined(i int, req *JoinRequest, j *JoinResult) {
	if j.Code == CodeMemberIDRequired && !slices.Contains(r.known, j.MemberID) {
		r.known = append(r.known, j.MemberID)
	}
	if j.Code != CodeNone {
		return
	}
	if want := req.MemberID; want == "" && j.MemberID != req.NewID || want != "" && j.MemberID != want {
		r.t.Fatalf("a join of %q, or new %s, is answered to %s", want, req.NewID, j.MemberID)
	}
	if !slices.Contains(r.known, j.MemberID) {
		r.known = append(r.known, j.MemberID)
	}
	if r.heard[j.MemberID] = r.now; req.MemberID != "" || req.InstanceID == "" { // the session of one that takes a static member's place may have begun when it asked
		r.surely[j.MemberID] = r.now
	}
	if j.Generation < r.newest {
		r.t.Fatalf("generation %d after %d", j.Generation, r.newest)
	}
	r.newest = j.Generation
	if j.MemberID == j.Leader && !j.SkipAssignment && len(j.Members) != r.g[i].Size() {
		r.t.Fatalf("the leader is told of %d members of %d", len(j.Members), r.g[i].Size())
	}
	if j.MemberID != j.Leader && len(j.Members) > 0 {
		r.t.Fatalf("%s is told of the members, %s leads", j.MemberID, j.Leader)
	}
}

func (r *groupRun) sync(t *rapid.T) {
	id := r.drawMember(t)
	req := SyncRequest{MemberID: id, Generation: r.g[0].Generation - int32(rapid.IntRange(0, 4).Draw(t, "older")/4), Assignments: map[string][]byte{}}
	for _, m := range r.g[0].Members() {
		req.Assignments[m.ID] = fmt.Appendf(nil, "%s in %d", m.ID, req.Generation)
		if m.ID == id {
			req.InstanceID = m.InstanceID
		}
	}
	if m := r.g[0].members[id]; m != nil && req.Generation == r.g[0].Generation && r.g[0].State != PreparingRebalance {
		r.heard[id], r.surely[id] = r.now, r.now
	}
	a := &asked{what: "sync", member: id}
	r.all = append(r.all, a)
	for i, g := range r.g {
		g.Sync(r.now, req, func(s SyncResult) {
			a.syncs[i] = append(a.syncs[i], s)
			if s.Code == CodeNone {
				if req.Generation != g.Generation {
					r.t.Fatalf("%s is given an assignment of generation %d, it is in %d", id, g.Generation, req.Generation)
				}
				r.assigned(i, id, req.InstanceID, s)
			}
		})
	}
}

// assigned judges an assignment: it is of a record that is durable.
func (r *groupRun) assigned(i int, id, instance string, s SyncResult) {
	d := r.durable[i]
	if d.Generation != r.g[i].Generation {
		r.t.Fatalf("%s is given an assignment of generation %d, durable is %d", id, r.g[i].Generation, d.Generation)
	}
	for _, m := range d.Members {
		if m.ID == id || instance != "" && m.InstanceID == instance {
			if string(m.Assignment) != string(s.Assignment) {
				r.t.Fatalf("%s is given %q, durable is %q", id, s.Assignment, m.Assignment)
			}
			return
		}
	}
	r.t.Fatalf("%s is given %q, and is no member in the durable record", id, s.Assignment)
}

func (r *groupRun) heartbeat(t *rapid.T) {
	id := r.drawMember(t)
	instance, generation := "", r.g[0].Generation-int32(rapid.IntRange(0, 4).Draw(t, "older")/4)
	if m := r.g[0].members[id]; m != nil {
		instance = m.InstanceID
	}
	a, b := r.g[0].Heartbeat(r.now, id, instance, generation), r.g[1].Heartbeat(r.now, id, instance, generation)
	if ok := a == CodeNone || a == CodeRebalanceInProgress; a != b || ok && (r.g[0].members[id] == nil || generation != r.g[0].Generation) {
		t.Fatalf("heartbeat of %q in generation %d: %d, %d", id, generation, a, b)
	} else if ok {
		r.heard[id], r.surely[id] = r.now, r.now
	}
}

func (r *groupRun) leave(t *rapid.T) {
	id := r.drawMember(t)
	instance := ""
	if m := r.g[0].members[id]; m != nil {
		instance = m.InstanceID
	}
	if a, b := r.g[0].Leave(r.now, id, instance), r.g[1].Leave(r.now, id, instance); a != b {
		t.Fatalf("leaving: %d, %d", a, b)
	}
	if r.g[0].members[id] != nil {
		t.Fatalf("%s has left and is there", id)
	}
}

// persisted makes the oldest record durable, or fails it.
func (r *groupRun) persisted(t *rapid.T) {
	if len(r.queue[0]) == 0 {
		t.Skip("nothing is on its way")
	}
	r.settle(rapid.SampledFrom([]int16{CodeNone, CodeNone, CodeNone, CodeNotCoordinator}).Draw(t, "code"))
}

func (r *groupRun) settle(code int16) {
	for i := range r.g {
		w := r.queue[i][0]
		if r.queue[i] = r.queue[i][1:]; code == CodeNone {
			r.durable[i] = record{}
			if err := json.Unmarshal(w.bytes, &r.durable[i]); err != nil {
				r.t.Fatal(err)
			}
		}
		w.done(code)
	}
}

func (r *groupRun) pass(t *rapid.T) {
	r.tick(time.Duration(rapid.IntRange(1, 12_000).Draw(t, "ms")) * time.Millisecond)
}

func (r *groupRun) tick(d time.Duration) {
	r.now = r.now.Add(d)
	stable := r.g[0].State == Stable
	lapse := map[string]time.Time{}
	for id, m := range r.g[0].members {
		lapse[id] = r.surely[id].Add(m.Session)
	}
	for _, g := range r.g {
		g.Tick(r.now)
	}
	for id, lapses := range lapse { // in a stable group whoever was heard of lately stays
		if stable && r.now.Before(lapses) && r.g[0].members[id] == nil {
			r.t.Fatalf("%s is gone at %s, its session ends at %s", id, r.now, lapses)
		}
	}
	for id, m := range r.g[0].members { // and whoever was not goes, unless it waits
		if lapses := r.heard[id].Add(m.Session); m.join == nil && !r.now.Before(lapses) {
			r.t.Fatalf("%s is there at %s, its session has ended at %s", id, r.now, lapses)
		}
	}
}

// restore replaces both groups by what the next leader would have: what is durable.
func (r *groupRun) restore(t *rapid.T) {
	for i, g := range r.g {
		g.Fail(CodeNotCoordinator)
		r.queue[i] = nil
		b, err := json.Marshal(r.durable[i])
		if err != nil {
			t.Fatal(err)
		}
		if r.durable[i].Generation == 0 {
			b = nil
		}
		if r.g[i], err = Restore("g", g.cfg, b, r.now); err != nil {
			t.Fatal(err)
		}
		if again := r.g[i].Encode(); b != nil && string(again) != string(b) {
			t.Fatalf("restored %s, durable is %s", again, b)
		}
		r.attach(i)
	}
	for _, m := range r.g[0].Members() {
		r.heard[m.ID], r.surely[m.ID] = r.now, r.now
	}
	r.newest = r.g[0].Generation
	clear(r.leaders)
}

func (r *groupRun) check(t *rapid.T) {
	r.t = t
	a, b := r.g[0], r.g[1]
	if string(a.Encode()) != string(b.Encode()) || a.State != b.State || !a.Next().Equal(b.Next()) || len(r.queue[0]) != len(r.queue[1]) {
		t.Fatalf("two groups that were told the same differ: %s %s until %s, %s %s until %s", a.State, a.Encode(), a.Next(), b.State, b.Encode(), b.Next())
	}
	for _, x := range r.all {
		if x.answers(0) > 1 || x.answers(1) > 1 || fmt.Sprint(x.joins[0], x.syncs[0]) != fmt.Sprint(x.joins[1], x.syncs[1]) {
			t.Fatalf("%s of %q is answered %+v %+v", x.what, x.member, x.joins, x.syncs)
		}
		for _, j := range x.joins[0] { // in a generation one leads
			if was, ok := r.leaders[j.Generation]; j.Code == CodeNone && !j.SkipAssignment && ok && was != j.Leader && x.what == "join" && r.static(was) == "" && r.static(j.Leader) == "" {
				t.Fatalf("generation %d is led by %s and %s", j.Generation, was, j.Leader)
			} else if j.Code == CodeNone {
				r.leaders[j.Generation] = j.Leader
			}
		}
	}
	r.all = slices.DeleteFunc(r.all, func(x *asked) bool { return x.answers(0) == 1 })
}

// static is a member's instance ID, also when another has taken its place.
func (r *groupRun) static(id string) string {
	for instance, m := range r.g[0].static {
		if m == id || r.g[0].members[id] == nil {
			return instance
		}
	}
	return ""
}

// end leaves the group alone: what is asked is answered, and all sessions end.
func (r *groupRun) end(t *rapid.T) {
	for range 1000 {
		for len(r.queue[0]) > 0 {
			r.settle(CodeNone)
		}
		next := r.g[0].Next()
		if next.IsZero() {
			break
		}
		r.tick(max(next.Sub(r.now), 0))
		r.check(t)
	}
	if len(r.all) > 0 || r.g[0].State != Empty || r.g[0].Size() > 0 {
		t.Fatalf("left alone: %s with %d members, %d requests are not answered, next at %s", r.g[0].State, r.g[0].Size(), len(r.all), r.g[0].Next())
	}
}

func TestGroupsAlike(t *testing.T) {
	play := func(t *rapid.T) {
		r := newGroupRun(t)
		t.Repeat(map[string]func(*rapid.T){"join": r.join, "join more": r.join, "sync": r.sync, "sync more": r.sync, "heartbeat": r.heartbeat, "leave": r.leave, "persisted": r.persisted, "persisted more": r.persisted,
			"pass": r.pass, "restore": r.restore, "": r.check})
		r.t = t
		r.end(t)
	}
	for range 20 { // a hundred runs each, of microseconds: few of them get far
		rapid.Check(t, play)
	}
}
