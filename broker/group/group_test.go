package group

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// world is a group with virtual time whose persistence succeeds at once unless held.
type world struct {
	t    *testing.T
	g    *Group
	now  time.Time
	held []func(int16)
	hold bool
	code int16
	last []byte
}

func newWorld(t *testing.T, cfg Config) *world {
	if cfg.MaxSize == 0 {
		cfg.MaxSize = 100
	}
	w := &world{t: t, g: New("g", cfg), now: time.Unix(1000, 0)}
	w.attach()
	return w
}

func (w *world) attach() {
	w.g.Persist = func(rec []byte, _ bool, done func(int16)) {
		w.last = rec
		if w.hold {
			w.held = append(w.held, done)
			return
		}
		done(w.code)
	}
}

func (w *world) pass(d time.Duration) { w.now = w.now.Add(d); w.g.Tick(w.now) }

func request(member, instance string, protocols ...string) JoinRequest {
	r := JoinRequest{MemberID: member, InstanceID: instance, ProtocolType: "consumer", Session: 10 * time.Second, Rebalance: 30 * time.Second, NewID: "new"}
	if len(protocols) == 0 {
		protocols = []string{"range"}
	}
	for _, p := range protocols {
		r.Protocols = append(r.Protocols, Protocol{p, []byte("meta")})
	}
	return r
}

// join sends a join and returns where its answer will be.
func (w *world) join(r JoinRequest) *[]JoinResult {
	out := &[]JoinResult{}
	w.g.Join(w.now, r, func(j JoinResult) { *out = append(*out, j) })
	return out
}

func (w *world) sync(member string, generation int32, assign map[string][]byte) *[]SyncResult {
	out := &[]SyncResult{}
	w.g.Sync(w.now, SyncRequest{MemberID: member, Generation: generation, Assignments: assign}, func(s SyncResult) { *out = append(*out, s) })
	return out
}

// syncStatic is sync of a static member.
func (w *world) syncStatic(member, instance string, generation int32, assign map[string][]byte) *[]SyncResult {
	out := &[]SyncResult{}
	w.g.Sync(w.now, SyncRequest{MemberID: member, InstanceID: instance, Generation: generation, Assignments: assign}, func(s SyncResult) { *out = append(*out, s) })
	return out
}

// member joins a new member to completion of its own join and returns its ID.
func (w *world) member(id string) (string, *[]JoinResult) {
	r := request("", "")
	r.NewID = id
	return id, w.join(r)
}

func one[T any](t *testing.T, got *[]T) T {
	t.Helper()
	if len(*got) != 1 {
		t.Fatalf("%d answers, want 1", len(*got))
	}
	return (*got)[0]
}

// stable makes a stable group of two.
func stable(t *testing.T) *world {
	w := newWorld(t, Config{})
	_, ja := w.member("a")
	one(t, ja)
	_, jb := w.member("b") // the group rebalances: a must come again
	ja = w.join(request("a", ""))
	b, a := one(t, jb), one(t, ja)
	if a.Generation != 2 || b.Generation != 2 || a.Leader != "a" || len(a.Members) != 2 || len(b.Members) != 0 {
		t.Fatalf("a %+v, b %+v", a, b)
	}
	sb := w.sync("b", 2, nil)
	if len(*sb) != 0 {
		t.Fatal("a follower was answered before the leader's assignment")
	}
	sa := w.sync("a", 2, map[string][]byte{"a": []byte("0"), "b": []byte("1")})
	if string(one(t, sa).Assignment) != "0" || string(one(t, sb).Assignment) != "1" || w.g.State != Stable {
		t.Fatalf("assignments: %+v %+v", *sa, *sb)
	}
	return w
}

// Item 54: a new member is given its ID first; unknown members, inconsistent protocols, full groups.
func TestItem54Join(t *testing.T) {
	w := newWorld(t, Config{MaxSize: 2})
	r := request("", "")
	r.NeedID, r.NewID = true, "m1"
	if j := one(t, w.join(r)); j.Code != CodeMemberIDRequired || j.MemberID != "m1" || w.g.State != Empty {
		t.Fatalf("%+v", j)
	}
	if j := one(t, w.join(request("m1", ""))); j.Code != CodeNone || j.Leader != "m1" || j.Generation != 1 {
		t.Fatalf("%+v", j)
	}
	if j := one(t, w.join(request("stranger", ""))); j.Code != CodeUnknownMember {
		t.Errorf("unknown member: %+v", j)
	}
	if j := one(t, w.join(request("m1", "", "other", "range"))); j.Code != CodeNone { // alone it may change
		t.Errorf("changed protocol alone: %+v", j)
	}
	_, _ = w.member("m2")
	if j := one(t, w.join(func() JoinRequest { r := request("", ""); r.NewID = "m3"; return r }())); j.Code != CodeGroupMaxSize {
		t.Errorf("full group: %+v", j)
	}
	w = stable(t)
	r = request("", "", "unheard")
	if j := one(t, w.join(r)); j.Code != CodeInconsistentProtocol {
		t.Errorf("no common protocol: %+v", j)
	}
	r = request("", "")
	r.ProtocolType = "connect"
	if j := one(t, w.join(r)); j.Code != CodeInconsistentProtocol {
		t.Errorf("other protocol type: %+v", j)
	}
}

// Item 55: a rebalance waits for all members up to the longest rebalance timeout; an unchanged follower that joins again causes none, the leader does.
func TestItem55Rebalance(t *testing.T) {
	w := stable(t)
	if j := one(t, w.join(request("b", ""))); j.Generation != 2 || w.g.State != Stable {
		t.Errorf("unchanged follower: %+v", j)
	}
	_, jc := w.member("c")
	if len(*jc) != 0 || w.g.State != PreparingRebalance {
		t.Fatal("did not wait for the others")
	}
	if c := w.g.Heartbeat(w.now, "a", "", 2); c != CodeRebalanceInProgress {
		t.Errorf("heartbeat during a rebalance: %d", c)
	}
	ja := w.join(request("a", ""))
	for range 3 { // b keeps its session and does not join
		w.pass(9 * time.Second)
		w.g.Heartbeat(w.now, "b", "", 2)
	}
	w.pass(4 * time.Second)
	if j := one(t, ja); j.Generation != 3 || len(j.Members) != 2 {
		t.Errorf("after the time was over: %+v", j)
	}
	if c := w.g.Heartbeat(w.now, "b", "", 3); c != CodeUnknownMember {
		t.Errorf("the member that did not come: %d", c)
	}
	w = stable(t)
	w.join(request("a", ""))
	if w.g.State != PreparingRebalance {
		t.Error("the leader joined again and nothing happened")
	}
}

func TestItem55InitialDelay(t *testing.T) {
	w := newWorld(t, Config{InitialDelay: 3 * time.Second})
	_, ja := w.member("a")
	w.pass(2 * time.Second)
	_, jb := w.member("b")
	w.pass(time.Second) // the first delay is over, but b came in it
	if len(*ja) != 0 {
		t.Fatal("did not wait again")
	}
	w.pass(3 * time.Second)
	if a, b := one(t, ja), one(t, jb); a.Generation != 1 || b.Generation != 1 || len(a.Members) != 2 {
		t.Errorf("%+v %+v", a, b)
	}
}

// Item 57: a static member that comes back has a new ID and the old one is fenced; nothing is rebalanced.
func TestItem57Static(t *testing.T) {
	w := newWorld(t, Config{})
	r := request("", "i1")
	r.NewID = "s1"
	one(t, w.join(r))
	one(t, w.sync("s1", 1, map[string][]byte{"s1": []byte("x")}))
	r.NewID = "s2"
	j := one(t, w.join(r))
	if j.Code != CodeNone || j.Generation != 1 || j.MemberID != "s2" || !j.SkipAssignment || w.g.State != Stable {
		t.Fatalf("came back: %+v in %s", j, w.g.State)
	}
	if s := one(t, w.sync("s2", 1, nil)); string(s.Assignment) != "x" {
		t.Errorf("assignment: %+v", s)
	}
	if c := w.g.Heartbeat(w.now, "s1", "i1", 1); c != CodeFencedInstance {
		t.Errorf("the old ID: %d", c)
	}
	if c := w.g.CheckCommit(w.now, "s1", "i1", 1); c != CodeFencedInstance {
		t.Errorf("commit by the old ID: %d", c)
	}
	if c := w.g.Leave(w.now, "", "i1"); c != CodeNone || w.g.State != Empty {
		t.Errorf("leaving by instance: %d, %s", c, w.g.State)
	}
}

// Item 58: codes of heartbeats and commits by state.
func TestItem58Codes(t *testing.T) {
	w := stable(t)
	for _, c := range []struct {
		id   string
		gen  int32
		want int16
	}{{"a", 2, CodeNone}, {"a", 1, CodeIllegalGeneration}, {"x", 2, CodeUnknownMember}} {
		if got := w.g.Heartbeat(w.now, c.id, "", c.gen); got != c.want {
			t.Errorf("heartbeat of %s in %d: %d, want %d", c.id, c.gen, got, c.want)
		}
		if got := w.g.CheckCommit(w.now, c.id, "", c.gen); got != c.want {
			t.Errorf("commit of %s in %d: %d, want %d", c.id, c.gen, got, c.want)
		}
	}
	if got := w.g.CheckCommit(w.now, "", "", -1); got != CodeUnknownMember {
		t.Errorf("commit from outside a group with members: %d", got)
	}
	_, _ = w.member("c")
	if got := w.g.CheckCommit(w.now, "a", "", 2); got != CodeNone {
		t.Errorf("commit while the group prepares: %d", got)
	}
	w.join(request("a", ""))
	w.join(request("b", ""))
	if got := w.g.CheckCommit(w.now, "a", "", 3); w.g.State != CompletingRebalance || got != CodeRebalanceInProgress {
		t.Errorf("commit before the assignment: %d in %s", got, w.g.State)
	}
	if got := newWorld(t, Config{}).g.CheckCommit(w.now, "", "", -1); got != CodeNone {
		t.Errorf("commit to an empty group: %d", got)
	}
}

// An assignment is given out only when it is durable; if it cannot be made durable the members are told and none is stable.
func TestAssignmentsWaitForDurability(t *testing.T) {
	w := newWorld(t, Config{})
	_, j := w.member("a")
	one(t, j)
	w.hold = true
	s := w.sync("a", 1, map[string][]byte{"a": []byte("x")})
	if len(*s) != 0 || w.g.State == Stable {
		t.Fatal("answered before it was durable")
	}
	w.held[0](CodeCoordinatorNotAvail)
	if r := one(t, s); r.Code != CodeCoordinatorNotAvail || w.g.State == Stable {
		t.Errorf("%+v in %s", r, w.g.State)
	}
	s = w.sync("a", 1, map[string][]byte{"a": []byte("x")}) // it asks again
	w.held[1](CodeNone)
	if r := one(t, s); r.Code != CodeNone || w.g.State != Stable {
		t.Errorf("%+v in %s", r, w.g.State)
	}
}

// Sessions end; a member that lost the answer to its join does not hold the others for ever.
func TestSessionsAndLostAnswers(t *testing.T) {
	w := stable(t)
	w.pass(9 * time.Second)
	w.g.Heartbeat(w.now, "a", "", 2)
	w.pass(2 * time.Second) // b's session is over
	if w.g.State != PreparingRebalance || w.g.Size() != 1 {
		t.Fatalf("%s with %d members", w.g.State, w.g.Size())
	}
	ja := w.join(request("a", ""))
	one(t, ja)
	_, jc := w.member("c")
	ja = w.join(request("a", ""))
	one(t, jc)
	g := one(t, ja).Generation
	sc := w.sync("c", g, nil) // the leader never syncs
	for range 4 {
		w.pass(9 * time.Second)
		w.g.Heartbeat(w.now, "a", "", g)
		w.g.Heartbeat(w.now, "c", "", g)
	}
	if r := one(t, sc); r.Code != CodeRebalanceInProgress {
		t.Errorf("%+v", r)
	}
	if c := w.g.Heartbeat(w.now, "a", "", g); c != CodeUnknownMember {
		t.Errorf("the leader that did not sync: %d", c)
	}
}

// Item 59: members and generation survive; sessions begin anew.
func TestItem59Restore(t *testing.T) {
	w := stable(t)
	g, err := Restore("g", Config{MaxSize: 9}, w.last, w.now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	w.g, w.now = g, w.now.Add(time.Hour)
	w.attach()
	if g.State != Stable || g.Generation != 2 || g.Leader != "a" {
		t.Fatalf("%+v", g)
	}
	if c := g.Heartbeat(w.now, "b", "", 2); c != CodeNone {
		t.Errorf("heartbeat: %d", c)
	}
	if s := one(t, w.sync("b", 2, nil)); string(s.Assignment) != "1" {
		t.Errorf("assignment: %+v", s)
	}
	if _, err := Restore("g", Config{}, []byte("{"), w.now); err == nil {
		t.Error("a broken record was restored")
	}
}

// A static member that comes back waits until its new ID is durable. It is answered, whatever happens before: another comes in its place, it leaves, the group is another node's now.
func TestStaticMemberWaits(t *testing.T) {
	for _, c := range []struct {
		name   string
		before func(w *world)
		code   int16
	}{
		{"nothing", func(*world) {}, CodeNone},
		{"another comes", func(w *world) { r := request("", "i"); r.NewID = "third"; w.join(r) }, CodeFencedInstance},
		{"it leaves", func(w *world) { w.g.Leave(w.now, "", "i") }, CodeUnknownMember},
		{"the group goes", func(w *world) { w.g.Fail(CodeNotCoordinator) }, CodeNotCoordinator},
	} {
		w := newWorld(t, Config{})
		first := request("", "i")
		first.NewID = "first"
		one(t, w.join(first))
		one(t, w.syncStatic("first", "i", 1, map[string][]byte{"first": []byte("0")}))
		w.hold = true
		second := request("", "i")
		second.NewID = "second"
		j := w.join(second)
		if len(*j) > 0 {
			t.Fatalf("%s: answered before it was durable: %+v", c.name, *j)
		}
		c.before(w)
		for _, done := range w.held {
			done(CodeNone)
		}
		if got := one(t, j); got.Code != c.code || got.MemberID != "second" {
			t.Errorf("%s: %+v, want code %d", c.name, got, c.code)
		}
	}
}

// Random members in random order with random losses: every request is answered exactly once, and a group left alone becomes stable or empty.
func TestRandomMembers(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 2))
		w := newWorld(t, Config{InitialDelay: time.Duration(rng.IntN(2)) * time.Second})
		answers := map[string]int{}
		n := 0
		once := func() func() {
			n++
			key := fmt.Sprint(n)
			answers[key] = 0
			return func() { answers[key]++ }
		}
		gens := map[string]int32{}
		for range 120 {
			id := fmt.Sprint("m", rng.IntN(4))
			switch rng.IntN(6) {
			case 0, 1:
				r := request(id, "")
				if gens[id] == 0 {
					r.MemberID, r.NewID = "", id
				}
				if w.g.members[id] != nil {
					r.MemberID = id
				}
				f := once()
				w.g.Join(w.now, r, func(j JoinResult) {
					f()
					if j.Code == CodeNone {
						gens[j.MemberID] = j.Generation
					}
				})
			case 2, 3:
				f := once()
				assign := map[string][]byte{}
				for m := range w.g.members {
					assign[m] = []byte(m)
				}
				w.g.Sync(w.now, SyncRequest{MemberID: id, Generation: gens[id], Assignments: assign}, func(s SyncResult) {
					f()
					if s.Code == CodeNone && string(s.Assignment) != id {
						t.Errorf("seed %d: %s was given %q", seed, id, s.Assignment)
					}
				})
			case 4:
				w.g.Heartbeat(w.now, id, "", gens[id])
			default:
				w.pass(time.Duration(rng.IntN(4000)) * time.Millisecond)
			}
		}
		for range 40 { // nobody does anything any more
			w.pass(5 * time.Second)
		}
		if w.g.State != Empty || w.g.Size() != 0 {
			t.Fatalf("seed %d: %s with %d members long after everybody fell silent", seed, w.g.State, w.g.Size())
		}
		for k, c := range answers {
			if c != 1 {
				t.Fatalf("seed %d: request %s was answered %d times", seed, k, c)
			}
		}
	}
}

// FuzzRestore reads any record of a group: what can be read is written and read again to the same, and once nobody is heard of any more nobody is left.
func FuzzRestore(f *testing.F) {
	f.Add([]byte(`{"Members":[{"ID":"a"}]}`))
	f.Add([]byte(`{"ProtocolType":"consumer","Protocol":"range","Leader":"a","Generation":3,"Members":[{"ID":"a","InstanceID":"i","ClientID":"c","Session":10000000000,"Protocols":[{"Name":"range","Metadata":"AQ=="}],"Assignment":"AQ=="},{"ID":"b","Session":1}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := Restore("g", Config{MaxSize: 5}, b, time.Unix(0, 0))
		if err != nil {
			return
		}
		want := g.Encode()
		again, err := Restore("g", Config{MaxSize: 5}, want, time.Unix(0, 0))
		if err != nil || !bytes.Equal(again.Encode(), want) {
			t.Fatalf("read again: %v\n%s\n%s", err, again.Encode(), want)
		}
		g.Persist = func(_ []byte, _ bool, done func(int16)) { done(0) }
		for range 3 {
			g.Tick(time.Unix(1<<40, 0))
		}
		if g.Size() > 0 {
			t.Errorf("%d members long after everybody fell silent: %s", g.Size(), want)
		}
	})
}
