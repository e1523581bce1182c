package raftmeta

import (
	"strconv"

	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/tiering/record"
	"github.com/estran/estran/tiering/segment"
	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the node's raft and log series. Counters and histograms are observed where things happen; gauges are read at a scrape, from
// accessors that take no lock of the write path.
type metrics struct {
	fsync, store, commit, propose                          *prometheus.HistogramVec
	applied, failed, voids, snapshots, snapFailed, backups *prometheus.CounterVec
	appends, entries, bytes, rotations, headTrim, tailCut  *prometheus.CounterVec
	throttled, refused                                     prometheus.Counter
	gauges                                                 map[string]*prometheus.Desc
	host                                                   *Host
}

// groupMetrics are a group's children.
type groupMetrics struct {
	commit, propose                                        prometheus.Observer
	applied, failed, voids, snapshots, snapFailed, backups prometheus.Counter
	log                                                    raftlog.Metrics
}

var buckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

func newMetrics(h *Host) *metrics {
	hist := func(name, help, label string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets, NativeHistogramBucketFactor: 1.1}, []string{label})
	}
	count := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"group"})
	}
	m := &metrics{host: h,
		fsync:      hist("estran_wal_fsync_duration_seconds", "Duration of the log's fdatasync.", "kind"),
		store:      hist("estran_raft_store_logs_seconds", "Duration of storing a batch of entries: write and sync.", "kind"),
		commit:     hist("estran_raft_commit_seconds", "Time from an entry's append at the leader to its application.", "kind"),
		propose:    hist("estran_raft_propose_seconds", "Time from a proposal to its answer.", "kind"),
		applied:    count("estran_raft_committed_entries_total", "Committed entries applied."),
		failed:     count("estran_raft_proposals_failed_total", "Proposals that were not committed."),
		voids:      count("estran_raft_term_mismatch_total", "Entries applied as void because they were proposed in another term."),
		snapshots:  count("estran_raft_snapshots_total", "Snapshots taken."),
		snapFailed: count("estran_raft_snapshot_failures_total", "Snapshots that failed."),
		backups:    count("estran_raft_snapshots_uploaded_total", "Snapshots of led groups that were put into the bucket."),
		appends:    count("estran_raft_log_appends_total", "Batches stored in the log."),
		entries:    count("estran_raft_log_appended_entries_total", "Entries stored in the log."),
		bytes:      count("estran_raft_log_appended_bytes_total", "Bytes stored in the log, as written."),
		rotations:  count("estran_raft_log_file_rotations_total", "Log files taken into use."),
		headTrim:   count("estran_raft_log_head_truncated_entries_total", "Entries freed."),
		tailCut:    count("estran_raft_log_tail_truncated_entries_total", "Entries replaced by a later leader's."),
		throttled:  prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_hot_budget_throttled_total", Help: "Batches that were slowed down by the hot budget."}),
		refused:    prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_hot_budget_refused_total", Help: "Batches that were refused by the hot budget."}),
	}
	m.gauges = map[string]*prometheus.Desc{}
	for name, help := range map[string]string{
		"estran_raft_term":                 "Current term.",
		"estran_raft_commit_index":         "Index of the last committed entry.",
		"estran_raft_applied_index":        "Index of the last applied entry.",
		"estran_raft_last_log_index":       "Index of the last entry of the log.",
		"estran_raft_first_log_index":      "Index of the first entry of the log.",
		"estran_raft_log_bytes":            "Bytes of log on disk above the base.",
		"estran_raft_log_hot_pinned_bytes": "Bytes of log that may not be freed yet.",
		"estran_raft_has_leader":           "Whether this node knows a leader.",
		"estran_raft_log_poisoned":         "1 after a failed write.",
		"estran_raft_log_stalled_seconds":  "Duration of the write in flight.",
		"estran_raft_voters":               "Voters of the group.",
		"estran_clock_trusted":             "1 while the time that the group's leader puts into entries is trusted.",
		"estran_unuploaded_bytes":          "Bytes of record batches that are not sealed.",
	} {
		m.gauges[name] = prometheus.NewDesc(name, help, []string{"group"}, nil)
	}
	m.gauges["estran_raft_state"] = prometheus.NewDesc("estran_raft_state", "1 for the group's current state.", []string{"group", "state"}, nil)
	m.gauges["estran_segments"] = prometheus.NewDesc("estran_segments", "Sealed segments by state.", []string{"state"}, nil)
	m.gauges["estran_raft_groups_led"] = prometheus.NewDesc("estran_raft_groups_led", "Groups that this node leads.", nil, nil)
	m.gauges["estran_hot_free_bytes"] = prometheus.NewDesc("estran_hot_free_bytes", "What is left of the hot budget.", nil, nil)
	return m
}

func (m *metrics) group(id record.ShardID) *groupMetrics {
	kind, g := "shard", strconv.Itoa(int(id))
	if id == 0 {
		kind, g = "meta", "meta"
	}
	return &groupMetrics{commit: m.commit.WithLabelValues(kind), propose: m.propose.WithLabelValues(kind), applied: m.applied.WithLabelValues(g),
		failed: m.failed.WithLabelValues(g), voids: m.voids.WithLabelValues(g), snapshots: m.snapshots.WithLabelValues(g), snapFailed: m.snapFailed.WithLabelValues(g), backups: m.backups.WithLabelValues(g),
		log: raftlog.Metrics{Fsync: m.fsync.WithLabelValues(kind), Store: m.store.WithLabelValues(kind), Appends: m.appends.WithLabelValues(g),
			Entries: m.entries.WithLabelValues(g), Bytes: m.bytes.WithLabelValues(g), Rotations: m.rotations.WithLabelValues(g),
			HeadTrim: m.headTrim.WithLabelValues(g), TailCut: m.tailCut.WithLabelValues(g)}}
}

func (m *metrics) register(r prometheus.Registerer, h *Host) {
	r.MustRegister(m.fsync, m.store, m.commit, m.propose, m.applied, m.failed, m.voids, m.snapshots, m.snapFailed, m.backups, m.appends, m.entries, m.bytes,
		m.rotations, m.headTrim, m.tailCut, m.throttled, m.refused, m)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range m.gauges {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	h := m.host
	led := 0
	segments := map[segment.ObjectState]int{segment.Prepared: 0, segment.Committed: 0, segment.Tombstoned: 0}
	for _, g := range h.groups() {
		label := "meta"
		if g.id != 0 {
			label = strconv.Itoa(int(g.id))
		}
		put := func(name string, v float64) {
			ch <- prometheus.MustNewConstMetric(m.gauges[name], prometheus.GaugeValue, v, label)
		}
		all, unfree := g.log.Bytes()
		first, _ := g.log.FirstIndex()
		put("estran_raft_term", float64(g.raft.CurrentTerm()))
		put("estran_raft_commit_index", float64(g.raft.CommitIndex()))
		put("estran_raft_applied_index", float64(g.raft.AppliedIndex()))
		put("estran_raft_last_log_index", float64(g.raft.LastIndex()))
		put("estran_raft_first_log_index", float64(first))
		put("estran_raft_log_bytes", float64(all))
		put("estran_raft_log_hot_pinned_bytes", float64(unfree))
		put("estran_raft_has_leader", b2f(g.leaderServer() != ""))
		put("estran_raft_log_poisoned", b2f(g.log.Poisoned() != nil))
		put("estran_raft_log_stalled_seconds", g.log.Stalled().Seconds())
		put("estran_raft_voters", float64(len(g.voters())))
		put("estran_clock_trusted", b2f(g.clock.trusted()))
		if g.id != 0 {
			put("estran_unuploaded_bytes", float64(h.HotBytes(g.id)))
			g.mu.RLock()
			for s, n := range g.shard.Objects() {
				segments[s] += n
			}
			g.mu.RUnlock()
		}
		now := g.raft.State()
		for _, s := range []raft.RaftState{raft.Leader, raft.Candidate, raft.Follower, raft.Shutdown} {
			ch <- prometheus.MustNewConstMetric(m.gauges["estran_raft_state"], prometheus.GaugeValue, b2f(s == now), label, s.String())
		}
		if g.leads.Load() > 0 {
			led++
		}
	}
	for s, name := range map[segment.ObjectState]string{segment.Prepared: "prepared", segment.Committed: "committed", segment.Tombstoned: "tombstoned"} {
		ch <- prometheus.MustNewConstMetric(m.gauges["estran_segments"], prometheus.GaugeValue, float64(segments[s]), name)
	}
	ch <- prometheus.MustNewConstMetric(m.gauges["estran_raft_groups_led"], prometheus.GaugeValue, float64(led))
	ch <- prometheus.MustNewConstMetric(m.gauges["estran_hot_free_bytes"], prometheus.GaugeValue, float64(h.FreeBudget()))
}

func b2f(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
