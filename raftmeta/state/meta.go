package state

import (
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"

	"github.com/estran/estran/tiering/record"
	"github.com/tidwall/btree"
)

// GroupSlots is the number of slots that groups and transactional IDs are spread over.
const GroupSlots = 256

// Topic is a topic. It is never changed in place: readers may keep it.
type Topic struct {
	ID                record.TopicID
	Name              string
	ReplicationFactor int16
	Configs           map[string]string // as set; must not be changed
	Config            PartitionConfig
	Partitions        []PartitionPlace
}

// PartitionPlace says where a partition lives.
type PartitionPlace struct {
	Shard     record.ShardID
	EpochBase record.LeaderEpoch
}

// Cluster is an immutable view of meta's state.
type Cluster struct {
	ID      string
	Shards  uint32
	Version uint64 // rises with every change

	level   uint32
	byName  *btree.Map[string, *Topic]
	byID    *btree.Map[string, *Topic]
	nodes   map[int32]Node
	place   placement
	configs map[string]string
	slots   [GroupSlots]record.ShardID
}

// Topic returns a topic by name.
func (c *Cluster) Topic(name string) (*Topic, bool) { return c.byName.Get(name) }

// TopicByID returns a topic by ID.
func (c *Cluster) TopicByID(id record.TopicID) (*Topic, bool) { return c.byID.Get(string(id[:])) }

// Topics yields all topics, by name.
func (c *Cluster) Topics() iter.Seq[*Topic] {
	return func(yield func(*Topic) bool) {
		c.byName.Scan(func(_ string, t *Topic) bool { return yield(t) })
	}
}

// TopicCount is the number of topics.
func (c *Cluster) TopicCount() int { return c.byName.Len() }

// BrokerConfigs are the cluster-wide dynamic settings; they must not be changed.
func (c *Cluster) BrokerConfigs() map[string]string { return c.configs }

// SlotShard is the shard that coordinates the groups of a slot; 0 before the cluster is initialised.
func (c *Cluster) SlotShard(slot uint8) record.ShardID { return c.slots[slot] }

// outbox is what meta has for one shard: effects first.. in order.
type outbox struct {
	First   uint64 // number of Effects[0]
	Effects []Effect
}

// Meta is the state machine of the meta group.
type Meta struct {
	applied  RaftIndex
	clock    record.Timestamp
	leader   LeaderStart
	chain    [16]byte
	voids    uint64
	c        Cluster
	outboxes map[record.ShardID]*outbox
	producer int64 // next producer ID
	perShard map[record.ShardID]int64
}

// NewMeta returns the empty state.
func NewMeta() *Meta {
	return &Meta{c: Cluster{level: LevelFirst, byName: &btree.Map[string, *Topic]{}, byID: &btree.Map[string, *Topic]{}, nodes: map[int32]Node{}, configs: map[string]string{}},
		outboxes: map[record.ShardID]*outbox{}, perShard: map[record.ShardID]int64{}}
}

// View returns the state as it is now, for readers; later commands do not change it.
func (m *Meta) View() *Cluster {
	v := m.c
	v.byName, v.byID = m.c.byName.Copy(), m.c.byID.Copy()
	return &v
}

// Apply applies the Data of a committed command; it returns a result per command.
func (m *Meta) Apply(index RaftIndex, term Term, data []byte) []Result {
	if index <= m.applied {
		panic(fmt.Sprintf("state: entry %d after %d", index, m.applied))
	}
	m.applied = index
	m.chain = ChainHash(m.chain, index, term, data)
	h, rest, err := decodeHeader(data)
	if err != nil {
		panic(fmt.Sprintf("state: entry %d: %v", index, err))
	}
	if h.Term != term {
		m.voids++
		return nil
	}
	m.clock = max(m.clock, h.TimeMs)
	var out []Result
	for len(rest) > 0 {
		kind, flags, body, next, err := nextSection(rest)
		if err != nil {
			panic(fmt.Sprintf("state: entry %d: %v", index, err))
		}
		out = append(out, m.section(index, kind, flags, body))
		rest = next
	}
	m.c.Version = uint64(index)
	return out
}

func (m *Meta) section(index RaftIndex, kind Kind, flags uint8, body []byte) Result {
	switch kind {
	case KindLeaderStart:
		m.leader = decode[LeaderStart](body)
	case KindInitCluster:
		m.initCluster(decode[InitCluster](body))
	case KindRegisterNode:
		return m.registerNode(decode[RegisterNode](body).Node)
	case KindAlterMembers:
		return m.alterMembers(decode[AlterMembers](body))
	case KindDrain:
		return m.drain(decode[Drain](body))
	case KindPreferLeader:
		return m.preferLeader(decode[PreferLeader](body))
	case KindForgetNode:
		return m.forgetNode(decode[ForgetNode](body))
	case KindRecover:
		m.recover(decode[Recover](body))
	case KindSettleSlots:
		m.settleSlots(decode[SettleSlots](body))
	case KindRaiseLevel:
		return m.raiseLevel(decode[RaiseFeatureLevel](body))
	case KindAddShards:
		return m.addShards(decode[AddShards](body))
	case KindCreateTopic:
		return m.createTopic(decode[CreateTopic](body))
	case KindDeleteTopic:
		return m.deleteTopic(decode[DeleteTopic](body))
	case KindCreateParts:
		return m.createPartitions(decode[CreatePartitions](body))
	case KindAlterConfigs:
		return m.alterConfigs(decode[AlterConfigs](body))
	case KindAllocProducers:
		first := m.producer
		m.producer += max(1, decode[AllocateProducerIDs](body).Count)
		return Result{Value: record.ProducerID(first)}
	case KindTrimOutbox:
		c := decode[TrimOutbox](body)
		if o := m.outboxes[c.Shard]; o != nil && c.To >= o.First {
			n := min(c.To-o.First+1, uint64(len(o.Effects)))
			o.Effects = slices.Clone(o.Effects[n:])
			o.First += n
		}
	default:
		if flags&flagIgnorable == 0 {
			panic(fmt.Sprintf("state: entry %d holds a command of kind %d, which this program does not know", index, kind))
		}
	}
	return Result{}
}

func (m *Meta) initCluster(c InitCluster) {
	if m.c.ID != "" {
		return
	}
	m.c.ID, m.c.Shards, m.c.level = c.ClusterID, c.Shards, max(c.Level, LevelFirst)
	m.c.place.Members = sorted(c.Members)
	for i := range m.c.slots {
		m.c.slots[i] = record.ShardID(uint32(i)%c.Shards + 1)
	}
	for s := range c.Shards {
		m.outboxes[record.ShardID(s+1)] = &outbox{First: 1}
		m.tellLevel(record.ShardID(s + 1))
	}
}

func (m *Meta) push(s record.ShardID, e Effect) {
	o := m.outboxes[s]
	o.Effects = append(o.Effects, e)
}

func (m *Meta) put(t *Topic) {
	m.c.byName.Set(t.Name, t)
	m.c.byID.Set(string(t.ID[:]), t)
}

// place chooses the shard with the fewest partitions, the lowest number among equals.
func (m *Meta) place() record.ShardID {
	best := record.ShardID(1)
	for s := record.ShardID(2); uint32(s) <= m.c.Shards; s++ {
		if m.perShard[s] < m.perShard[best] {
			best = s
		}
	}
	m.perShard[best]++
	return best
}

func (m *Meta) addPartitions(t *Topic, n int32) {
	for range n {
		p := PartitionPlace{Shard: m.place()}
		tp := record.TopicPartition{Topic: t.ID, Partition: int32(len(t.Partitions))}
		t.Partitions = append(t.Partitions, p)
		m.push(p.Shard, Effect{EnsurePartition: &EnsurePartition{TP: tp, EpochBase: p.EpochBase, Config: t.Config}})
	}
}

func (m *Meta) createTopic(c CreateTopic) Result {
	if _, ok := m.c.byName.Get(c.Name); ok {
		return Result{Code: Exists}
	}
	if _, ok := m.c.TopicByID(c.ID); ok { // two topics of one ID would be told apart by the order in which they are restored
		return Result{Code: Exists}
	}
	if m.c.Shards == 0 || c.Partitions < 1 {
		return Result{Code: Invalid}
	}
	t := &Topic{ID: c.ID, Name: c.Name, ReplicationFactor: c.ReplicationFactor, Configs: c.Configs, Config: c.Config}
	m.addPartitions(t, c.Partitions)
	m.put(t)
	return Result{Value: t}
}

func (m *Meta) deleteTopic(c DeleteTopic) Result {
	t, ok := m.c.TopicByID(c.ID)
	if !ok {
		return Result{Code: NotFound}
	}
	m.c.byName.Delete(t.Name)
	m.c.byID.Delete(string(t.ID[:]))
	for _, p := range t.Partitions {
		m.perShard[p.Shard]--
	}
	for s := range m.c.Shards {
		m.push(record.ShardID(s+1), Effect{DropTopic: &DropTopic{t.ID}})
	}
	return Result{Value: t}
}

func (m *Meta) createPartitions(c CreatePartitions) Result {
	old, ok := m.c.TopicByID(c.ID)
	if !ok {
		return Result{Code: NotFound}
	}
	if int(c.Total) <= len(old.Partitions) {
		return Result{Code: Invalid}
	}
	t := *old
	t.Partitions = slices.Clip(old.Partitions)
	m.addPartitions(&t, c.Total-int32(len(old.Partitions)))
	m.put(&t)
	return Result{Value: &t}
}

func (m *Meta) alterConfigs(c AlterConfigs) Result {
	change := func(old map[string]string) map[string]string {
		out := maps.Clone(old)
		if out == nil {
			out = map[string]string{}
		}
		maps.Copy(out, c.Set)
		for _, k := range c.Delete {
			delete(out, k)
		}
		return out
	}
	if c.Topic.IsZero() {
		m.c.configs = change(m.c.configs)
		return Result{}
	}
	old, ok := m.c.TopicByID(c.Topic)
	if !ok {
		return Result{Code: NotFound}
	}
	t := *old
	t.Configs = change(old.Configs)
	if t.Config != c.Config {
		t.Config = c.Config
		for s := range m.c.Shards {
			m.push(record.ShardID(s+1), Effect{SetConfig: &SetConfig{t.ID, c.Config}})
		}
	}
	m.put(&t)
	return Result{Value: &t}
}

// Outbox returns the effects for a shard behind `after`, and the number of the first.
func (m *Meta) Outbox(s record.ShardID, after uint64) (first uint64, effects []Effect) {
	o := m.outboxes[s]
	if o == nil {
		return 0, nil
	}
	skip := uint64(0)
	if after+1 > o.First {
		skip = min(after+1-o.First, uint64(len(o.Effects)))
	}
	return o.First + skip, slices.Clone(o.Effects[skip:])
}

// OutboxStart is the number of the first effect for a shard that is kept, or that will be the first; 0 before the cluster is initialised.
func (m *Meta) OutboxStart(s record.ShardID) uint64 {
	if o := m.outboxes[s]; o != nil {
		return o.First
	}
	return 0
}

// OutboxEnd is the number of the last effect for a shard; 0 if there was none.
func (m *Meta) OutboxEnd(s record.ShardID) uint64 {
	if o := m.outboxes[s]; o != nil {
		return o.First + uint64(len(o.Effects)) - 1
	}
	return 0
}

// FeatureLevel is meta's.
func (m *Meta) FeatureLevel() uint32 { return m.c.level }

// Leader is the last LeaderStart applied.
func (m *Meta) Leader() LeaderStart { return m.leader }

// Applied is the index of the last command applied.
func (m *Meta) Applied() RaftIndex { return m.applied }

// ChainHash is the hash over every command entry applied.
func (m *Meta) ChainHash() [16]byte { return m.chain }

// Clock is the group's replicated clock.
func (m *Meta) Clock() record.Timestamp { return m.clock }

// Voids counts entries that were applied as void because of their term.
func (m *Meta) Voids() uint64 { return m.voids }

// metaSnapshot is the format of meta's snapshot.
type metaSnapshot struct {
	level    uint32
	Applied  RaftIndex
	Clock    record.Timestamp
	Leader   LeaderStart
	Chain    [16]byte
	Voids    uint64
	ID       string
	Shards   uint32
	Version  uint64
	Topics   []*Topic
	Nodes    []Node
	Place    placement
	Configs  map[string]string
	Slots    []record.ShardID
	Outboxes map[record.ShardID]outbox
	Producer int64
}

// FrozenMeta is meta's state at one moment.
type FrozenMeta struct {
	head metaSnapshot
	view *Cluster
}

// Freeze takes the state as it is.
func (m *Meta) Freeze() FrozenMeta {
	f := FrozenMeta{view: m.View()}
	f.head = metaSnapshot{level: m.c.level, Applied: m.applied, Clock: m.clock, Leader: m.leader, Chain: m.chain, Voids: m.voids, ID: m.c.ID, Shards: m.c.Shards, Version: m.c.Version,
		Place: m.c.place, Configs: m.c.configs, Slots: m.c.slots[:], Outboxes: map[record.ShardID]outbox{}, Producer: m.producer}
	f.head.Slots = slices.Clone(f.head.Slots)
	for s, o := range m.outboxes {
		f.head.Outboxes[s] = outbox{o.First, slices.Clip(o.Effects)}
	}
	return f
}

// Index is the index of the last command that the frozen state contains.
func (f *FrozenMeta) Index() RaftIndex { return f.head.Applied }

// WriteTo writes the snapshot.
func (f *FrozenMeta) WriteTo(w io.Writer) (int64, error) {
	h := f.head
	h.Topics = slices.Collect(f.view.Topics())
	h.Nodes = f.view.Registered()
	return writeSnapshot(w, metaMagic, h.level, h)
}

// RestoreMeta reads a snapshot that WriteTo wrote.
func RestoreMeta(r io.Reader) (*Meta, error) {
	var h metaSnapshot
	level, err := readSnapshot(r, metaMagic, &h)
	if err != nil {
		return nil, err
	}
	m := NewMeta()
	m.c.level = level
	m.applied, m.clock, m.leader, m.chain, m.voids, m.producer = h.Applied, h.Clock, h.Leader, h.Chain, h.Voids, h.Producer
	m.c.ID, m.c.Shards, m.c.Version, m.c.place = h.ID, h.Shards, h.Version, h.Place
	if h.Configs != nil {
		m.c.configs = h.Configs
	}
	if copy(m.c.slots[:], h.Slots) != GroupSlots {
		return nil, fmt.Errorf("%w: %d slots", ErrSnapshot, len(h.Slots))
	}
	for _, t := range h.Topics {
		m.put(t)
		for _, p := range t.Partitions {
			m.perShard[p.Shard]++
		}
	}
	for _, n := range h.Nodes {
		m.c.nodes[n.ID] = n
	}
	for s, o := range h.Outboxes {
		m.outboxes[s] = &o
	}
	return m, nil
}
