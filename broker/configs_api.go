package broker

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Sources of a setting, as DescribeConfigs names them.
const (
	sourceTopic   int8 = 1
	sourceStatic  int8 = 4
	sourceDefault int8 = 5
)

// Resource types.
const (
	resourceTopic  int8 = 2
	resourceBroker int8 = 4
)

// brokerSetting is a setting that the broker shows; it is changed in the node's configuration only.
type brokerSetting struct {
	name  string
	typ   configType
	value string
}

func (s *Server) brokerSettings() []brokerSetting {
	c := &s.cfg
	n := func(v int64) string { return strconv.FormatInt(v, 10) }
	self, _ := s.b.Cluster().Node(s.b.NodeID())
	address := fmt.Sprintf("PLAINTEXT://%s:%d", self.Host, self.Port)
	return []brokerSetting{
		{"advertised.listeners", typeString, address},
		{"auto.create.topics.enable", typeBool, strconv.FormatBool(c.AutoCreateTopics)},
		{"broker.id", typeInt, n(int64(s.b.NodeID()))},
		{"compression.type", typeString, c.CompressionType},
		{"default.replication.factor", typeInt, n(int64(min(3, s.b.Voters())))},
		{"group.initial.rebalance.delay.ms", typeInt, n(c.GroupInitialDelay.Milliseconds())},
		{"group.max.session.timeout.ms", typeInt, n(c.GroupMaxSession.Milliseconds())},
		{"group.max.size", typeInt, n(int64(c.GroupMaxSize))},
		{"group.min.session.timeout.ms", typeInt, n(c.GroupMinSession.Milliseconds())},
		{"log.message.timestamp.after.max.ms", typeLong, n(c.TimestampAfterMs)},
		{"log.message.timestamp.before.max.ms", typeLong, n(c.TimestampBeforeMs)},
		{"log.message.timestamp.type", typeString, c.TimestampType},
		{"log.retention.bytes", typeLong, n(c.RetentionBytes)},
		{"log.retention.check.interval.ms", typeLong, n(c.RetentionCheckMs)},
		{"log.retention.ms", typeLong, n(c.RetentionMs)},
		{"max.connections", typeInt, n(int64(c.MaxConnections))},
		{"message.max.bytes", typeInt, n(int64(c.MaxMessageBytes))},
		{"min.insync.replicas", typeInt, "1"},
		{"node.id", typeInt, n(int64(s.b.NodeID()))},
		{"num.partitions", typeInt, n(int64(c.NumPartitions))},
		{"offset.metadata.max.bytes", typeInt, n(int64(c.OffsetMetadataMax))},
		{"offsets.retention.minutes", typeInt, n(int64(c.OffsetsRetention.Minutes()))},
		{"socket.request.max.bytes", typeInt, n(int64(c.RequestMaxBytes))},
	}
}

// configRow is one setting of an answer.
type configRow struct {
	name, value string
	typ         configType
	source      int8
	readOnly    bool
	doc         string
	synonyms    []configRow
}

// configResource is what has settings.
type configResource struct {
	typ  int8
	name string
}

// DescribeConfigs (32), versions 0-4: sources and synonyms from 1, types and documentation from 3 (KIP-569).
func handleDescribeConfigs(r *request) error {
	type resource struct {
		configResource
		keys []string
	}
	n := max(r.array(4), 0)
	res := make([]resource, 0, r.room(n, 4))
	again := repeated(n, func(i int) configResource { return res[i].configResource })
	for range n {
		x := resource{configResource{r.i8(), r.str()}, r.strs()}
		r.tags()
		if r.err != nil {
			return r.err
		}
		if !again(x.configResource) {
			res = append(res, x)
		}
	}
	synonyms := r.version >= 1 && r.bool()
	docs := r.version >= 3 && r.bool()
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(adminTimeout)
	defer cancel()
	w := r.respond(1024 + 64*len(res))
	w.i32(0)
	w.array(len(res))
	for _, x := range res {
		rows, err := r.describeConfigs(ctx, x.typ, x.name)
		if x.keys != nil {
			rows = slices.DeleteFunc(rows, func(c configRow) bool { return !slices.Contains(x.keys, c.name) })
		}
		w.i16(codeOf(err))
		w.text(messageOf(err))
		w.i8(x.typ)
		w.str(x.name)
		w.array(len(rows))
		for i := range rows {
			r.encodeConfig(w, &rows[i], synonyms, docs)
		}
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

func (r *request) describeConfigs(ctx context.Context, typ int8, name string) (rows []configRow, err error) {
	s := r.s
	switch typ {
	case resourceTopic:
		t, err := r.topicNamed(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, x := range topicSettings() {
			row := configRow{name: x.name, value: s.defaults[x.name], typ: x.typ, source: sourceDefault}
			def := configRow{name: x.name, value: row.value, source: sourceDefault}
			if v, ok := t.Configs[x.name]; ok {
				row.value, row.source = v, sourceTopic
				row.synonyms = append(row.synonyms, configRow{name: x.name, value: v, source: sourceTopic})
			}
			row.synonyms = append(row.synonyms, def)
			if x.inert {
				row.doc = "Inert: stored and shown, without effect."
			}
			rows = append(rows, row)
		}
		return rows, nil
	case resourceBroker:
		if name != "" && name != strconv.Itoa(int(s.b.NodeID())) {
			return nil, codedError{codeInvalidRequest, fmt.Sprintf("broker %q is not this one (%d)", name, s.b.NodeID())}
		}
		for _, x := range s.brokerSettings() {
			rows = append(rows, configRow{name: x.name, value: x.value, typ: x.typ, source: sourceStatic, readOnly: true,
				synonyms: []configRow{{name: x.name, value: x.value, source: sourceStatic}}})
		}
		return rows, nil
	}
	return nil, codedError{codeInvalidRequest, fmt.Sprintf("resource type %d has no configuration here", typ)}
}

func (r *request) encodeConfig(w *writer, c *configRow, synonyms, docs bool) {
	w.str(c.name)
	w.nstr(&c.value)
	w.bool(c.readOnly)
	if r.version == 0 {
		w.bool(c.source == sourceDefault)
	} else {
		w.i8(c.source)
	}
	w.bool(false) // sensitive
	if r.version >= 1 {
		n := 0
		if synonyms {
			n = len(c.synonyms)
		}
		w.array(n)
		for _, s := range c.synonyms[:n] {
			w.str(s.name)
			w.nstr(&s.value)
			w.i8(s.source)
			w.tags()
		}
	}
	if r.version >= 3 {
		w.i8(int8(c.typ))
		if docs {
			w.text(c.doc)
		} else {
			w.nstr(nil)
		}
	}
	w.tags()
}

// Operations of IncrementalAlterConfigs.
const (
	opSet      int8 = 0
	opDelete   int8 = 1
	opAppend   int8 = 2
	opSubtract int8 = 3
)

// alteration is one change of a setting.
type alteration struct {
	name  string
	op    int8
	value *string
}

// IncrementalAlterConfigs (44), versions 0-1 (KIP-339): all or nothing per resource.
func handleIncrementalAlterConfigs(r *request) error {
	type resource struct {
		configResource
		ops []alteration
		err error
	}
	var res []*resource
	byName := map[configResource]*resource{}
	for range max(r.array(4), 0) {
		x := &resource{configResource: configResource{r.i8(), r.str()}}
		x.ops = make([]alteration, max(r.array(3), 0))
		for j := range x.ops {
			x.ops[j] = alteration{r.str(), r.i8(), r.nstr()}
			r.tags()
		}
		r.tags()
		if r.err != nil {
			return r.err
		}
		if first := byName[x.configResource]; first != nil {
			first.err = codedError{codeInvalidRequest, fmt.Sprintf("%q is changed more than once", x.name)}
			continue
		}
		byName[x.configResource] = x
		res = append(res, x)
	}
	validate := r.bool()
	r.tags()
	if r.err != nil {
		return r.err
	}
	ctx, cancel := r.timeout(adminTimeout)
	defer cancel()
	w := r.respond(64 * len(res))
	w.i32(0)
	w.array(len(res))
	for _, x := range res {
		switch {
		case x.err != nil:
		case x.typ == resourceTopic:
			x.err = r.alterTopic(ctx, x.name, x.ops, validate)
		default:
			x.err = codedError{codeInvalidRequest, fmt.Sprintf("resource type %d cannot be changed by request: use the node's configuration", x.typ)}
		}
		w.i16(codeOf(x.err))
		w.text(messageOf(x.err))
		w.i8(x.typ)
		w.str(x.name)
		w.tags()
	}
	w.tags()
	r.finish(w)
	return nil
}

func (r *request) alterTopic(ctx context.Context, name string, ops []alteration, validate bool) error {
	t, err := r.topicToChange(ctx, name)
	if err != nil {
		return err
	}
	next := maps.Clone(t.Configs)
	if next == nil {
		next = map[string]string{}
	}
	seen := map[string]bool{}
	for _, o := range ops {
		if seen[o.name] {
			return codedError{codeInvalidRequest, fmt.Sprintf("%q is changed more than once", o.name)}
		}
		seen[o.name] = true
		if err := alter(next, o, r.s.defaults); err != nil {
			return err
		}
	}
	if err := r.s.checkTopicConfig(next); err != nil {
		return codedError{codeInvalidConfig, err.Error()}
	}
	if validate {
		return nil
	}
	set, del := map[string]string{}, []string{}
	for name := range seen {
		if v, ok := next[name]; ok {
			set[name] = v
		} else {
			del = append(del, name)
		}
	}
	slices.Sort(del)
	return r.s.b.AlterConfigs(ctx, t.ID, set, del, r.s.parsed(next))
}

func alter(configs map[string]string, o alteration, defaults map[string]string) error {
	i := slices.IndexFunc(topicSettings(), func(s topicSetting) bool { return s.name == o.name })
	if i < 0 {
		return codedError{codeInvalidConfig, fmt.Sprintf("unknown topic config %q", o.name)}
	}
	if o.op == opDelete {
		delete(configs, o.name)
		return nil
	}
	if o.value == nil {
		return codedError{codeInvalidRequest, fmt.Sprintf("%q is given no value", o.name)}
	}
	switch o.op {
	case opSet:
		configs[o.name] = *o.value
		return nil
	case opAppend, opSubtract:
		if topicSettings()[i].typ != typeList {
			return codedError{codeInvalidConfig, fmt.Sprintf("%q is not a list", o.name)}
		}
		cur, ok := configs[o.name]
		if !ok {
			cur = defaults[o.name]
		}
		list := strings.Split(cur, ",")
		for v := range strings.SplitSeq(*o.value, ",") {
			list = slices.DeleteFunc(list, func(x string) bool { return x == v || x == "" })
			if o.op == opAppend {
				list = append(list, v)
			}
		}
		configs[o.name] = strings.Join(list, ",")
		return nil
	}
	return codedError{codeInvalidRequest, fmt.Sprintf("operation %d is unknown", o.op)}
}
