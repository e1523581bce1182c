package broker

import (
	"testing"
	"time"

	"github.com/estran/estran/broker/group"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering/record"
	"github.com/prometheus/client_golang/prometheus"
)

// slowly is a node whose groups' commands are decided when the test says so.
type slowly struct {
	*raftmeta.Host
	proposed chan proposal
}

type proposal struct {
	record state.PutGroup
	done   func(error)
}

func (s slowly) ProposeGroup(_ record.ShardID, cmds []state.Command, done func(error)) {
	s.proposed <- proposal{cmds[0].(state.PutGroup), done}
}

// The last member of a group leaves, and one joins before that is committed: it is answered, its generation comes behind the old one, and what is committed last is what happened last.
func TestJoinBehindTheLastToLeave(t *testing.T) {
	w := start(t, nil)
	cfg := DefaultConfig()
	cfg.Registerer, cfg.GroupInitialDelay = prometheus.NewRegistry(), 10*time.Millisecond
	back := slowly{w.Host, make(chan proposal, 8)}
	s := NewServer(cfg, back, hotReader{w.Host})
	defer s.Close()
	sg := &shardGroups{c: s.groups, id: w.GroupShard("g"), groups: map[string]*liveGroup{}}
	s.groups.shards[sg.id] = sg
	defer sg.unload()
	use := func(f func(*liveGroup)) {
		t.Helper()
		if code := s.groups.use("g", f); code != codeNone {
			t.Fatal(code)
		}
	}
	join := func(id string) chan group.JoinResult {
		joined := make(chan group.JoinResult, 1)
		use(func(l *liveGroup) {
			l.Join(time.Now(), group.JoinRequest{NewID: id, Session: time.Hour, Rebalance: time.Hour, ProtocolType: "consumer", Protocols: []group.Protocol{{Name: "range"}}},
				func(r group.JoinResult) { joined <- r })
		})
		return joined
	}
	synced := make(chan group.SyncResult, 1)
	first := <-join("a")
	use(func(l *liveGroup) {
		l.Sync(time.Now(), group.SyncRequest{MemberID: "a", Generation: first.Generation}, func(r group.SyncResult) { synced <- r })
	})
	(<-back.proposed).done(nil)
	<-synced
	use(func(l *liveGroup) { l.Leave(time.Now(), "a", "") })
	emptied := <-back.proposed
	if !emptied.record.Empty {
		t.Fatal("the group's last member has left, and its record says that it is not empty")
	}
	joined := join("b")
	emptied.done(nil)
	select {
	case second := <-joined:
		if second.Code != codeNone || second.Generation <= first.Generation {
			t.Errorf("%+v came behind %+v", second, first)
		}
	case <-time.After(time.Minute):
		t.Fatal("nobody answers who joined")
	}
	use(func(l *liveGroup) { l.Leave(time.Now(), "b", "") })
	use(func(l *liveGroup) { // its record waits for the one before it
		if len(l.saves) != 1 {
			t.Errorf("%d records wait", len(l.saves))
		}
		l.Persist([]byte("last"), true, func(int16) {})
	})
	before := <-back.proposed
	select {
	case p := <-back.proposed:
		t.Errorf("%q is proposed beside %q", p.record.Record, before.record.Record)
	default:
	}
	before.done(nil)
	if last := <-back.proposed; string(last.record.Record) != "last" {
		t.Errorf("the last record is %q", last.record.Record)
	} else {
		last.done(nil)
	}
	sg.mu.Lock()
	defer sg.mu.Unlock()
	if len(sg.groups) != 0 {
		t.Error("an empty group is kept in memory")
	}
}
