package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// work is a row of the matrix: a load, how it is run and what is shown of it.
type work struct {
	name, what string
	run        func(context.Context, *run) error
	load       load
	nodes      int    // the only size of a cluster that it is for; 0 = each
	only       string // the only system that it is for; "" = each
	own        bool   // each system has a new cluster for it, alone on the machine; else all run side by side, for all such works
	ready      bool   // a cluster of its own is prepared as those are that run side by side
	setup      setup
	limit      string   // what the first of show is a share of (limitOf)
	show       []string // keys of a line
	x          float64  // its place in the curves, where its curve has one
	curve      string
}

var (
	produced = []string{"MB/s", "p50_ms", "p99_ms", "p999_ms", "max_ms", "cpu_s/GiB", "client_s/GiB", "rss_MiB", "peak_MiB", "disk_B/B", "flushes/GiB", "fdatasyncs/GiB", "wire_B/B", "lo_B/B"}
	latency  = []string{"p50_ms", "p99_ms", "p999_ms", "max_ms", "MB/s", "cpu_s/GiB", "client_s/GiB", "rss_MiB", "disk_B/B", "flushes/GiB", "fdatasyncs/GiB", "wire_B/B", "lo_B/B"}
	ends     = []string{"p50_ms", "p99_ms", "p999_ms", "max_ms", "e2e_p50_ms", "e2e_p99_ms", "e2e_p999_ms", "e2e_max_ms", "MB/s", "cpu_s/GiB", "client_s/GiB", "rss_MiB"}
	consumed = []string{"MB/s", "cpu_s/GiB", "client_s/GiB", "rss_MiB", "peak_MiB", "gets", "from_objects_MB", "wire_B/B", "lo_B/B"}
)

// cold makes voters keep nothing of what is sealed.
func cold(store string) setup {
	return setup{store: store, env: []string{"ESTRAN_TIERING_LOCAL_RETENTION_BYTES=0", "ESTRAN_TIERING_SEAL_AGE=5s"}}
}

// works is the matrix, in the order in which it is run.
func works(o options) (out []work) {
	add := func(w ...work) { out = append(out, w...) }
	const ms = time.Millisecond
	add(
		work{name: "produce-1", what: "1 KiB × 12 partitions, closed loop, 1 producer", run: produceRun, limit: "disk", show: produced, curve: "producers", x: 1},
		work{name: "produce-4", what: "1 KiB × 12 partitions, closed loop, 4 producers", run: produceRun, load: load{producers: 4}, limit: "disk", show: produced, curve: "producers", x: 4},
		work{name: "consume-1", what: "consume what has just been written, 12 partitions, 1 consumer", run: consumeRun, load: load{consumers: 1}, limit: "tcp", show: consumed, curve: "consumers", x: 1},
		work{name: "consume-12", what: "the same, 12 consumers", run: consumeRun, load: load{consumers: 12}, limit: "tcp", show: consumed, curve: "consumers", x: 12},
	)
	for _, rate := range []float64{1, 10, 30} {
		add(work{name: fmt.Sprintf("open-%g", rate), what: fmt.Sprintf("open loop, %g MB/s, linger 0, to the acknowledgement and end to end", rate), run: produceRun, load: load{rate: rate, tails: 1}, show: ends})
	}
	add(
		work{name: "one", what: "one producer, one record at a time", run: produceRun, load: load{one: true, partitions: 1}, limit: "record", show: latency},
		work{name: "small", what: "100 B × 1 partition, closed loop, 1 producer", run: produceRun, load: load{size: 100, partitions: 1}, limit: "disk", show: produced, curve: "record bytes", x: 100},
		work{name: "java", what: "Kafka's own producer at its defaults (ProducerPerformance), 1 KiB × 12 partitions", run: javaRun, limit: "disk", show: produced},
		work{name: "start", what: "a new cluster: start to first acknowledgement, idle memory and CPU, restart to first acknowledgement", run: startRun, own: true,
			show: []string{"start_ms", "idle_rss_MiB", "idle_cpu_%", "restart_ms"}},
		work{name: "failover", what: "the leader goes: how long its partitions have no acknowledgement; kill -9, and silence (SIGSTOP)", run: failoverRun, own: true, nodes: 3,
			show: []string{"kill_p50_ms", "kill_p99_ms", "kill_max_ms", "kills", "stop_p50_ms", "stop_p99_ms", "stop_max_ms", "stops"}},
	)
	for _, store := range []struct{ name, url, what string }{{"file", "", "file:// on tmpfs"}, {"s3", "s3", "an S3 double"}, {"s3-slow", "s3-slow", "an S3 double that takes as long as S3: GET 60 / 150 ms (p50 / p99), PUT 120 / 250"},
		{"minio", "minio", "MinIO on the same disk"}} {
		for _, p := range []int{12, 1} {
			add(work{name: fmt.Sprintf("cold-%s-%d", store.name, p), what: fmt.Sprintf("cold consume, %d partitions, all from %s, 1 consumer", p, store.what), run: consumeRun, only: estran, own: true, setup: cold(store.url),
				load: load{consumers: 1, partitions: p, sealed: true, cold: true}, limit: "get", show: consumed})
		}
	}
	for _, n := range o.partitions {
		add(work{name: fmt.Sprintf("partitions-%d", n), what: fmt.Sprintf("%d partitions: made, idle, produce to 12 others, then to all in turn", n), run: partitionsRun, own: true, ready: true, load: load{partitions: n, spread: true},
			show: []string{"MB/s", "p99_ms", "cpu_s/GiB", "create_s", "idle_cpu_%", "idle_rss_MiB", "active_MB/s", "active_p99_ms", "active_cpu_s/GiB", "active_rss_MiB"}, curve: "partitions", x: float64(n)})
	}
	add(
		work{name: "producers-500", what: "500 producers of 20 kB/s, 1 KiB × 12 partitions", run: produceRun, load: load{producers: 500, rate: 10}, show: latency, curve: "producers", x: 500},
		work{name: "fan-out", what: "30 MB/s, 10 consumers that follow all of it", run: produceRun, load: load{rate: 30, tails: 10}, show: ends},
		work{name: "mixed", what: "30 MB/s and a consumer that follows, while another reads all that was written before", run: mixedRun, load: load{rate: 30, tails: 1}, show: append(slices.Clone(ends), "backfill_MB/s")},
	)
	for _, rate := range []float64{1, 10, 30} {
		add(work{name: fmt.Sprintf("open-%g-linger", rate), what: fmt.Sprintf("open loop, %g MB/s, linger 5 ms", rate), run: produceRun, load: load{rate: rate, tails: 1, linger: 5 * ms}, show: ends})
	}
	add(
		work{name: "large", what: "100 KiB × 12 partitions, closed loop, 1 producer", run: produceRun, load: load{size: 100 << 10}, limit: "disk", show: produced, curve: "record bytes", x: 100 << 10},
		work{name: "lz4", what: "1 KiB × 12 partitions of values that lz4 halves", run: produceRun, load: load{codec: "lz4", letters: 6}, show: append(slices.Clone(produced), "ratio")},
		work{name: "zstd", what: "1 KiB × 12 partitions of values that zstd more than halves", run: produceRun, load: load{codec: "zstd", letters: 6}, show: append(slices.Clone(produced), "ratio")},
		work{name: "consume-200", what: "consume what has just been written, 200 partitions, 200 consumers", run: consumeRun, load: load{consumers: 200, partitions: 200}, limit: "tcp", show: consumed, curve: "consumers", x: 200},
		work{name: "consume-sealed", what: "consume what has been sealed and is within local retention, 12 partitions, 1 consumer", run: consumeRun, load: load{consumers: 1, sealed: true}, limit: "tcp", show: consumed},
		work{name: "voters-1ms", what: "voters 1 ms apart each way, closed loop, 1 producer", run: produceRun, only: estran, nodes: 3, own: true, ready: true, setup: setup{delay: ms}, show: produced},
		work{name: "voters-1ms-30", what: "voters 1 ms apart each way, 30 MB/s", run: produceRun, only: estran, nodes: 3, own: true, ready: true, setup: setup{delay: ms}, load: load{rate: 30, tails: 1}, show: ends},
		work{name: "minio-12", what: "produce with MinIO on the same disk and these cores, nothing kept locally, 12 partitions", run: produceRun, only: estran, own: true, setup: cold("minio"), show: append(slices.Clone(produced), "puts", "put_MiB")},
		work{name: "minio-1", what: "the same, 1 partition", run: produceRun, only: estran, own: true, setup: cold("minio"), load: load{partitions: 1}, show: append(slices.Clone(produced), "puts", "put_MiB")},
		work{name: "minio-30", what: "30 MB/s with MinIO on the same disk", run: produceRun, only: estran, own: true, ready: true, setup: setup{store: "minio"}, load: load{rate: 30, tails: 1}, show: ends},
		work{name: "topics", what: "topics one by one, then four times as many in 4 requests; restart and kill -9 with all of them", run: topicsRun, own: true,
			show: []string{"create_p50_ms", "create_p99_ms", "create_max_ms", "created_ms", "writable_ms", "rss_MiB", "restart_ms", "kill9_ms"}},
	)
	return out
}

// missing is what belongs to the matrix and is not in it yet.
var missing = []string{
	"backfill beside a tail with the backfill's client and the store in a cgroup of one core (`mixed` runs without)",
	"the highest rate at which un-sealed bytes do not grow with MinIO on the same machine",
	"the cold tier on local disks (there is none yet)",
	"network namespaces or machines apart: all nodes and clients share these cores and this disk",
}

// chosen are the works that were asked for.
func (o options) chosen() (out []work, err error) {
	all := works(o)
	for _, name := range o.works {
		if !slices.ContainsFunc(all, func(w work) bool { return w.name == name }) {
			var names []string
			for _, w := range all {
				names = append(names, w.name)
			}
			return nil, fmt.Errorf("there is no work %q among %v", name, names)
		}
	}
	for _, w := range all {
		if len(o.works) == 0 || slices.Contains(o.works, w.name) {
			out = append(out, w)
		}
	}
	return out, nil
}

// fits says whether the work is for a system on so many nodes.
func (w work) fits(system string, nodes int) bool {
	return (w.only == "" || w.only == system) && (w.nodes == 0 || w.nodes == nodes)
}
