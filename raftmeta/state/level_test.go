package state

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/estran/estran/tiering/record"
)

// quorumOf is a cluster of one shard that is at its first level, and what takes commands to meta and effects to the shard.
func quorumOf(t *testing.T) (m *Meta, s *Shard, do func(Command) Result, deliver func()) {
	m, s = NewMeta(), NewShard(1)
	index := RaftIndex(0)
	entry := func(c Command) []byte {
		var e Entry
		if _, err := e.Add(c); err != nil {
			t.Fatal(err)
		}
		data, _ := e.Cut(1, nil, record.Timestamp(1000+index), nil)
		index++
		return data
	}
	do = func(c Command) Result { d := entry(c); return m.Apply(index, 1, d)[0] }
	deliver = func() {
		if first, effects := m.Outbox(1, s.Cursor()); len(effects) > 0 {
			d := entry(MetaEffects{From: first, To: first + uint64(len(effects)) - 1, Effects: effects})
			s.Apply(index, 1, d)
		}
	}
	do(InitCluster{ClusterID: "c", Shards: 1, Members: []int32{1, 2}, Level: LevelFirst})
	return m, s, do, deliver
}

// A level is raised once every node that may vote knows it, and never lowered; who does not know it cannot come in any more; shards follow, new ones from their first effect on.
func TestFeatureLevelIsRaised(t *testing.T) {
	m, s, do, deliver := quorumOf(t)
	node := func(id int32, level uint32) Command { return RegisterNode{Node{ID: id, Peer: "p", Level: level}} }
	do(node(1, 2))
	check := func(what string, got Result, code Code, level uint32) {
		t.Helper()
		deliver()
		if got.Code != code || m.View().FeatureLevel() != level || s.FeatureLevel() != level {
			t.Errorf("%s: %+v, meta is at level %d, the shard at %d; want code %d and level %d", what, got, m.View().FeatureLevel(), s.FeatureLevel(), code, level)
		}
	}
	check("node 2 has not registered", do(RaiseFeatureLevel{2}), Invalid, 1)
	do(node(2, 0)) // a program that has never heard of levels
	do(node(3, 1)) // no member
	r := do(RaiseFeatureLevel{2})
	check("node 2 is behind", r, Invalid, 1)
	if behind, _ := r.Value.([]Node); len(behind) != 1 || behind[0].ID != 2 {
		t.Errorf("behind: %+v", r.Value)
	}
	do(AlterMembers{Remove: []int32{2}})
	check("node 2 was removed and may still vote", do(RaiseFeatureLevel{2}), Invalid, 1)
	do(ForgetNode{2})
	check("all know it", do(RaiseFeatureLevel{2}), OK, 2)
	check("again", do(RaiseFeatureLevel{2}), OK, 2)
	check("lower", do(RaiseFeatureLevel{1}), OK, 2)
	check("an older program registers", do(node(2, 1)), Invalid, 2)
	check("one that registered before is added", do(AlterMembers{Add: []int32{3}}), Invalid, 2)
	do(node(3, 2))
	check("with the newer program it is", do(AlterMembers{Add: []int32{3}}), OK, 2)
	do(AddShards{Total: 2, Founders: []string{"1.a"}})
	if _, effects := m.Outbox(2, 0); len(effects) == 0 || effects[0].RaiseFeatureLevel == nil || effects[0].RaiseFeatureLevel.To != 2 {
		t.Errorf("a new shard's outbox: %+v", effects)
	}
}

// Below its level the clock's standing changes nothing and is in no snapshot; from the entry that raises the level on it is.
func TestStoodHasALevel(t *testing.T) {
	for _, level := range []uint32{LevelFirst, LevelStood} {
		m := newMachine(t, 1)
		m.s.level = LevelFirst
		if level > LevelFirst {
			m.do(MetaEffects{From: m.s.cursor + 1, To: m.s.cursor + 1, Effects: []Effect{{RaiseFeatureLevel: &RaiseFeatureLevel{level}}}})
		}
		m.do(Sweep{})
		stopped := m.clock
		m.clock = 0
		m.do(PutGroup{ID: "g", Empty: true})
		snap := snapshotOf(t, m.s.Freeze())
		m.clock = stopped + 1000
		m.do(Sweep{})
		stands := level >= LevelStood
		if got := bytes.Contains(snap, []byte(`"Stood"`)); got != stands {
			t.Errorf("level %d: the snapshot has Stood: %v", level, got)
		}
		if got := m.s.Group("g").EmptySince == m.clock; got != stands {
			t.Errorf("level %d: the group counts from when the clock went on: %v", level, got)
		}
	}
}

// Each level's snapshots stay what they are.
func TestSnapshotsOfLevels(t *testing.T) {
	for _, level := range []uint32{LevelFirst, LevelStood} {
		meta, s, do, deliver := quorumOf(t)
		for id := int32(1); id <= 2; id++ {
			do(RegisterNode{Node{ID: id, Incarnation: "ab", Host: "h", Port: 9092, Peer: "p", Level: level}})
		}
		do(RaiseFeatureLevel{level})
		do(CreateTopic{ID: record.TopicID{7}, Name: "t", Partitions: 2, ReplicationFactor: 2, Config: PartitionConfig{RetentionMs: 5, RetentionBytes: -1}})
		deliver()
		var e Entry
		if _, err := e.Add(PutGroup{ID: "g", ProtocolType: "consumer", Empty: true}); err != nil {
			t.Fatal(err)
		}
		data, _ := e.Cut(1, nil, 0, nil)
		s.Apply(s.Applied()+1, 1, data)
		var b bytes.Buffer
		f := meta.Freeze()
		if _, err := f.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		golden(t, "meta-level-"+string('0'+rune(level)), b.Bytes())
		golden(t, "shard-level-"+string('0'+rune(level)), snapshotOf(t, s.Freeze()))
		m, err := RestoreMeta(&b)
		if err != nil || m.View().FeatureLevel() != level {
			t.Errorf("meta of level %d: %v", level, err)
		}
	}
}

func TestUnknownLevelIsRefused(t *testing.T) {
	snap := snapshotOf(t, NewShard(1).Freeze())
	for _, level := range []uint32{0, LevelNewest + 1} {
		binary.BigEndian.PutUint32(snap[len(shardMagic):], level)
		if _, err := RestoreShard(bytes.NewReader(snap)); !errors.Is(err, ErrLevel) {
			t.Errorf("a snapshot of level %d: %v", level, err)
		}
	}
	if err := CheckLevel(3, 2); err == nil || !strings.Contains(err.Error(), "level 3") || !strings.Contains(err.Error(), "1 to 2") {
		t.Errorf("the error names both: %v", err)
	}
}

// golden compares with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is written as\n%q, was\n%q", name, got, want)
	}
}
