package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/estran/estran/broker"
	"github.com/estran/estran/broker/admin"
	"github.com/estran/estran/localstack/planted"
	"github.com/estran/estran/objstore"
	"github.com/estran/estran/objstore/open"
	"github.com/estran/estran/raftmeta"
	"github.com/estran/estran/raftmeta/raftlog"
	"github.com/estran/estran/tiering"
	"github.com/estran/estran/tiering/record"
)

// node is a running voter: every part, in the order in which they were started.
type node struct {
	cfg      *config
	log      *slog.Logger
	bucket   objstore.Bucket
	host     *raftmeta.Host
	tier     *tiering.Tiering
	reader   *tiering.Reader
	server   *broker.Server
	kafka    net.Listener
	web      *http.Server
	webL     net.Listener
	fatal    chan error
	draining atomic.Bool
	wired    chan struct{}   // closed when tier and server are there: leading begins
	life     context.Context // ends when the node does
	end      context.CancelFunc
	wg       sync.WaitGroup
	started  time.Time
	// faultLimit is how long a node may take to stop after a fault. It serves nobody, and others lead what it led only when it is gone; a crash loses nothing.
	faultLimit time.Duration
	endProcess func(code int)
}

const faultLimit = 10 * time.Second

// startNode builds and starts a voter. On an error everything that was started is stopped again.
func startNode(ctx context.Context, cfg *config, log *slog.Logger) (_ *node, err error) {
	n := &node{cfg: cfg, log: log, fatal: make(chan error, 8), wired: make(chan struct{}), started: time.Now(), faultLimit: faultLimit, endProcess: os.Exit}
	n.life, n.end = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			n.stop(context.Background())
		}
	}()
	tuneRuntime(cfg)
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	info := buildVersion()
	reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "estran_build_info", Help: "1, with what this is in the labels.",
		ConstLabels: prometheus.Labels{"version": info.Version, "commit": info.Commit, "go": info.Go}}, func() float64 { return 1 }))
	if n.kafka, err = listen(cfg, "listeners.kafka.listen", "--kafka-listen"); err != nil {
		return nil, err
	}
	if n.webL, err = listen(cfg, "listeners.http.listen", "--http-listen"); err != nil {
		return nil, err
	}
	if err := n.openBucket(ctx, reg); err != nil {
		return nil, err
	}
	if cluster, epoch := raftmeta.ClusterOf(cfg.Node.DataDir); cluster != "" { // before it waits for voters that may be fenced too
		if err := checkFence(ctx, objstore.Prefixed(n.bucket, clusterPrefix(cluster)), epoch); errors.Is(err, errFenced) {
			return nil, fencedFault(cfg, err)
		}
	}
	if err := n.openHost(ctx, reg); err != nil {
		return nil, err
	}
	n.bucket = objstore.Prefixed(n.bucket, clusterPrefix(n.host.ClusterID()))
	if err := checkBucket(ctx, n.bucket, n.host.ClusterID(), n.host.Founder()); err != nil {
		return nil, storeFault(cfg, err)
	}
	n.wire(reg)
	n.serve(reg, info)
	return n, nil
}

// tuneRuntime sets what the Go runtime should know: an fsync blocks a P, so there are more of them than cores; the memory limit is a safety net.
func tuneRuntime(cfg *config) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.NumCPU() + min(cfg.Quorum.Shards, 4))
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(40) // most of the heap is bytes, which cost the collector nothing; measured: a fifth less memory, no less throughput
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(512<<20 + 2*int64(cfg.Tiering.CacheBytes))
	}
}

func (n *node) openBucket(ctx context.Context, reg prometheus.Registerer) error {
	b, err := open.Bucket(ctx, n.cfg.storageURL(), objstore.Policy{}, objstore.NewMetrics(reg))
	if err != nil {
		return storeFault(n.cfg, err)
	}
	n.bucket = b
	if _, err := objstore.Probe(ctx, b); err != nil {
		if retriable(err) && n.hasData() { // a node that has been here before serves from its log until the store is back
			n.log.Warn("object store is not reachable, going on without it", "component", "node", "err", err)
			return nil
		}
		return storeFault(n.cfg, err)
	}
	return nil
}

func (n *node) hasData() bool {
	_, err := os.Stat(n.cfg.Node.DataDir + "/node.json")
	return err == nil
}

func (n *node) openHost(ctx context.Context, reg prometheus.Registerer) error {
	host, port := n.advertised()
	voters, err := n.cfg.voters()
	if err != nil {
		return err
	}
	secret, err := n.cfg.secret()
	if err != nil {
		return err
	}
	peer, err := listen(n.cfg, "listeners.peer.listen", "--peer-listen")
	if err != nil {
		return err
	}
	if len(voters) > 1 && secret == nil && n.cfg.peerTLS() == nil {
		n.log.Warn("nothing shows that a peer is a voter: whoever reaches the peer listener on this machine can speak for one", "component", "node", "listen", n.cfg.Listeners.Peer.Listen,
			"fix", "set quorum.secret_file or quorum.tls")
	}
	var storeTime func() (time.Time, bool)
	if d, ok := n.bucket.(objstore.Dater); ok {
		storeTime = freshTime(d)
	}
	bc, _ := n.cfg.brokerConfig()
	backups := &backups{cfg: n.cfg, bucket: n.bucket}
	h, err := raftmeta.Open(ctx, raftmeta.Config{Now: planted.Now, NodeID: n.cfg.Node.ID, DataDir: n.cfg.Node.DataDir, Host: host, Port: port, Rack: n.cfg.Node.Rack,
		Shards: uint32(n.cfg.Quorum.Shards), HotMaxBytes: int64(n.cfg.Hot.MaxBytes), LocalRetentionBytes: int64(n.cfg.Tiering.LocalRetentionBytes),
		OffsetsRetention: bc.OffsetsRetention, Voters: voters, PeerAdvertise: reachable(n.cfg.Listeners.Peer.Advertise, peer), Secret: secret, TLS: n.cfg.peerTLS(), PeerListener: peer, Logger: n.log, Registerer: reg, OnLead: n.lead, OnFatal: n.stopNow, OnBackup: backups.save, StoreTime: storeTime})
	if err != nil {
		return quorumFault(n.cfg, err)
	}
	n.host = h
	backups.host.Store(h)
	return nil
}

// backups keeps the states of groups in the bucket.
type backups struct {
	cfg    *config
	bucket objstore.Bucket
	host   atomic.Pointer[raftmeta.Host] // nil until the node knows its cluster
}

func (b *backups) save(ctx context.Context, s raftmeta.Backup) error {
	h := b.host.Load()
	if h == nil {
		return errors.New("the node is starting")
	}
	bucket := objstore.Prefixed(b.bucket, clusterPrefix(h.ClusterID()))
	to := tiering.Snapshots{Bucket: bucket, Dir: filepath.Join(b.cfg.Node.DataDir, "stage"), MayDelete: func(ctx context.Context) error { return checkFence(ctx, bucket, h.RecoveryEpoch()) }}
	return to.Save(ctx, tiering.Snapshot{Group: s.Group, Epoch: s.Epoch, Index: s.Index, Term: s.Term}, s.Write)
}

// freshTime uses the store's word on the time only where it differs from what it said before: an answer that is old says nothing about now.
func freshTime(d objstore.Dater) func() (time.Time, bool) {
	var mu sync.Mutex
	var last, seen time.Time
	return func() (time.Time, bool) {
		t, ok := d.StoreTime()
		mu.Lock()
		defer mu.Unlock()
		if !ok {
			return t, false
		}
		if !t.Equal(last) {
			last, seen = t, time.Now()
		}
		return t.Add(time.Since(seen)), true // carried on by the monotonic clock
	}
}

// advertised is the address that clients are told: what the configuration says, or the listener's own.
func (n *node) advertised() (string, int32) {
	addr := reachable(n.cfg.Listeners.Kafka.Advertise, n.kafka)
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr, 0
	}
	p, _ := strconv.ParseInt(port, 10, 32) // the configuration was checked
	return host, int32(p)
}

// reachable is what others are told of a listener: what the configuration says, or its own address, by the machine's name if it listens on all of them.
func reachable(advertise string, l net.Listener) string {
	if advertise != "" {
		return advertise
	}
	addr := l.Addr().String()
	host, port, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsUnspecified() {
		return addr
	}
	name, err := os.Hostname()
	if err != nil {
		name = "localhost"
	}
	return net.JoinHostPort(name, port)
}

// clusterPrefix is where a cluster's objects live; keys are lower case, the ID is not.
func clusterPrefix(id string) string {
	return fmt.Sprintf("%x", id)
}

// lead does what the leader of a shard does: groups, sealing, retention.
func (n *node) lead(ctx context.Context, s record.ShardID) {
	select {
	case <-n.wired:
	case <-ctx.Done():
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { n.tier.Lead(ctx, s) })
	wg.Go(func() { n.server.Lead(ctx, uint32(s)) })
	wg.Wait()
}

func (n *node) wire(reg prometheus.Registerer) {
	t := &n.cfg.Tiering
	bc, _ := n.cfg.brokerConfig()
	n.tier = tiering.New(tiering.Config{HousekeepEvery: time.Duration(bc.RetentionCheckMs) * time.Millisecond, SealBytes: int64(t.SealBytes), SealAge: time.Duration(t.SealAge), UploadConcurrency: t.UploadConcurrency,
		PrepareTTL: time.Duration(t.PrepareTTL), Grace: time.Duration(t.DeleteGrace), CacheBytes: int64(t.CacheBytes),
		MayDelete: func(ctx context.Context) error { return checkFence(ctx, n.bucket, n.host.RecoveryEpoch()) }, RehomeBytes: min(1<<30, int64(n.cfg.Hot.MaxBytes)/4), Logger: n.log, Registerer: reg}, n.host, n.bucket)
	n.reader = tiering.NewReader(n.tier, n.host)
	bc.Logger, bc.Registerer, bc.Now = n.log, reg, planted.Now
	if most := affordable(); bc.MaxConnections > most {
		n.log.Info("fewer connections than configured: descriptors are left for the log, the store and other voters", "component", "node", "max.connections", bc.MaxConnections, "most", most,
			"fix", "raise the limit of open files (ulimit -n)")
		bc.MaxConnections = most
	}
	n.server = broker.NewServer(bc, n.host, n.reader)
	close(n.wired)
}

// affordable is how many clients may be connected: three quarters of the descriptors that the process may have.
func affordable() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > 1<<31 {
		return 1<<31 - 1
	}
	return int(l.Cur - l.Cur/4)
}

func (n *node) serve(reg *prometheus.Registry, info versionInfo) {
	n.web = &http.Server{Handler: admin.Handler(admin.Config{Gatherer: reg, Live: n.live, Ready: n.ready, Version: info,
		Cluster: func(ctx context.Context) any { return n.host.Status(ctx) }, Commands: clusterCommands(n.host)}), ReadHeaderTimeout: 5 * time.Second}
	n.wg.Go(n.watchFence)
	n.wg.Go(func() {
		if err := n.web.Serve(n.webL); !errors.Is(err, http.ErrServerClosed) {
			n.stopNow(fmt.Errorf("http listener: %w", err))
		}
	})
	n.wg.Go(func() {
		if err := n.server.Serve(n.kafka); !errors.Is(err, broker.ErrServerClosed) {
			n.stopNow(fmt.Errorf("kafka listener: %w", err))
		}
	})
}

// stopNow is told when the node cannot go on: a failed write, a disk that hangs, a listener that fails.
func (n *node) stopNow(err error) {
	select {
	case n.fatal <- err:
	default:
	}
}

func (n *node) live() []admin.Check {
	return []admin.Check{{Name: "process"}}
}

func (n *node) ready() []admin.Check {
	var drain, budget, store error
	if n.draining.Load() {
		drain = errors.New("draining")
	}
	if n.host.FreeBudget() == 0 {
		budget = errors.New("the hot budget is used up: records are refused until sealing catches up")
	}
	if n.tier.Degraded() {
		store = errors.New("uploads fail: what is hot stays in the log")
	}
	checks := []admin.Check{{Name: "drain", Err: drain}, {Name: "hot-budget", Err: budget}, {Name: "object-store", Err: store, Degraded: true}}
	for s := range n.host.Cluster().Shards {
		var err error
		if _, ok := n.host.Leader(record.ShardID(s + 1)); !ok {
			err = errors.New("no leader is known")
		}
		checks = append(checks, admin.Check{Name: fmt.Sprintf("shard-%d", s+1), Err: err})
	}
	return checks
}

// drain lets clients finish: not ready any more, others lead, then no new connections; what is in flight is answered.
func (n *node) drain(ctx context.Context) {
	n.draining.Store(true)
	n.log.Info("draining", "event", "drain.started", "component", "node")
	n.host.HandOver() // while clients can still be told where to go
	n.server.Drain(ctx)
}

// stop ends what was started, last first: clients before the log, the log before the store.
func (n *node) stop(ctx context.Context) {
	n.end()
	if n.server != nil {
		_ = n.server.Close()
	} else if n.kafka != nil {
		_ = n.kafka.Close()
	}
	if n.host != nil {
		if err := n.host.Close(ctx); err != nil {
			n.log.Warn("closing the log", "component", "node", "err", err)
		}
	}
	if n.reader != nil {
		n.reader.Close()
	}
	if n.bucket != nil {
		_ = n.bucket.Close()
	}
	if n.web != nil {
		_ = n.web.Close()
	} else if n.webL != nil {
		_ = n.webL.Close()
	}
	n.wg.Wait()
}

// run waits for the end: a signal drains, a second one or a fault stops at once.
func (n *node) run(ctx context.Context, s streams) error {
	var err error
	var over <-chan time.Time
	select {
	case <-ctx.Done():
		dctx, cancel := context.WithTimeout(context.Background(), time.Duration(n.cfg.Shutdown.DrainTimeout))
		n.drain(dctx)
		cancel()
	case err = <-n.fatal:
		n.log.Error("stopping", "component", "node", "err", err)
		err = diskFault(n.cfg, err)
		if cannotStop(err) {
			n.exit(s, err)
		}
		_ = n.kafka.Close()
		over = time.After(n.faultLimit)
	}
	stopped := make(chan struct{})
	go func() {
		n.stop(context.Background())
		close(stopped)
	}()
	for {
		select {
		case <-stopped:
			return err
		case later := <-n.fatal: // a disk that has failed fails again while the node stops
			if cannotStop(later) {
				if err == nil {
					err = diskFault(n.cfg, later)
				}
				n.exit(s, err)
			}
		case <-over:
			n.log.Error("the node has not stopped in time and is ended", "component", "node", "after", n.faultLimit)
			n.exit(s, err)
			return err
		}
	}
}

// cannotStop: a thread in the disk cannot be waited for, and until it comes back the kernel keeps what the process has open; nor can raft be, when it could not save a vote or read its log.
func cannotStop(err error) bool {
	return errors.Is(err, raftlog.ErrHung) || errors.Is(err, raftlog.ErrStable) || errors.Is(err, raftlog.ErrRead)
}

// exit ends the process without waiting for what cannot be stopped.
func (n *node) exit(s streams, err error) {
	if n.server != nil {
		n.server.Abort()
	}
	n.endProcess(printError(s.err, err))
}

// newLogger writes text on a terminal and JSON elsewhere, unless the configuration says which.
func newLogger(cfg *config, w io.Writer) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.Log.Level)) // the configuration was checked
	o := &slog.HandlerOptions{Level: level}
	format := cfg.Log.Format
	if format == "auto" {
		format = "json"
		if isTerminal(w) {
			format = "text"
		}
	}
	if format == "json" {
		o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				a.Key = "ts"
			}
			return a
		}
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	fi, err := f.Stat()
	return err == nil && fi.Mode()&os.ModeCharDevice != 0
}

// warnOpen says what it means that a listener is not on loopback while nothing is authenticated.
func warnOpen(cfg *config, w io.Writer) {
	host, _, err := net.SplitHostPort(cfg.Listeners.Kafka.Listen)
	ip := net.ParseIP(host)
	if err != nil || ip != nil && ip.IsLoopback() || strings.EqualFold(host, "localhost") {
		return
	}
	fmt.Fprintf(w, "WARNING: no authentication, and the Kafka listener %s is reachable from other machines:\n", cfg.Listeners.Kafka.Listen)
	fmt.Fprintf(w, "         whoever reaches it can read, write and delete every topic.\n")
}
