package tiering

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Config are the settings of sealing, reading and deleting. Zero values take the defaults named.
type Config struct {
	// SealBytes: a shard is sealed when it has so much (64 MiB); a partition that alone has it gets an object of its own.
	SealBytes int64
	// SealAge: whatever is hot for longer is sealed (60 s).
	SealAge time.Duration
	// UploadConcurrency bounds uploads of the node (3).
	UploadConcurrency int
	// PrepareTTL after which an upload that was not committed is swept (1 h). LateDelete after that it is deleted again and forgotten (24 h): a PUT whose
	// request went out in time may end late.
	PrepareTTL, LateDelete time.Duration
	// Grace between an object's last reference and its deletion (1 h).
	Grace time.Duration
	// RehomeBytes: when hot batches keep more log than this from being freed, small ones are written again (1 GiB).
	RehomeBytes int64
	// CacheBytes bounds the cache of sealed bytes (48 MiB).
	CacheBytes int64
	// ColdReads bounds GETs in flight for consumers (16).
	ColdReads int
	// MayDelete is asked before objects are deleted: an error says that another history of the cluster may need them. nil = always.
	MayDelete func(ctx context.Context) error
	// HousekeepEvery is the period of retention and deletion (30 s).
	HousekeepEvery time.Duration
	// RetryFirst and RetryLast bound the pause between tries of an upload, with jitter (200 ms, 30 s).
	RetryFirst, RetryLast time.Duration

	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

func (c *Config) defaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	num := func(n *int64, v int64) {
		if *n == 0 {
			*n = v
		}
	}
	num(&c.SealBytes, 64<<20)
	num(&c.RehomeBytes, 1<<30)
	num(&c.CacheBytes, 48<<20)
	set(&c.SealAge, time.Minute)
	set(&c.PrepareTTL, time.Hour)
	set(&c.LateDelete, 24*time.Hour)
	set(&c.Grace, time.Hour)
	set(&c.HousekeepEvery, 30*time.Second)
	set(&c.RetryFirst, 200*time.Millisecond)
	set(&c.RetryLast, 30*time.Second)
	if c.UploadConcurrency == 0 {
		c.UploadConcurrency = 3
	}
	if c.ColdReads == 0 {
		c.ColdReads = 16
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
}

// metrics are the series of this package.
type metrics struct {
	uploads              *prometheus.CounterVec
	upload, segmentBytes prometheus.Histogram
	deleted              *prometheus.CounterVec
	cache                *prometheus.CounterVec
	coalesced, evicted   prometheus.Counter
	cacheBytes           prometheus.Gauge
	corruption           *prometheus.CounterVec
	rehomed              prometheus.Counter
	storeDown            prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	one := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		uploads: vec("estran_tier_uploads_total", "Uploads of sealed segments.", "outcome"),
		upload: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "estran_tier_upload_duration_seconds", Help: "Duration of uploads that succeeded.",
			Buckets: []float64{.01, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}}),
		segmentBytes: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "estran_tier_segment_bytes", Help: "Sizes of sealed segments.", Buckets: prometheus.ExponentialBuckets(1<<16, 4, 8)}),
		deleted:      vec("estran_tier_gc_objects_total", "Objects deleted.", "outcome"),
		cache:        vec("estran_cache_requests_total", "Look-ups in the cache of sealed bytes.", "tier", "result"),
		coalesced:    one("estran_cache_coalesced_total", "Look-ups that waited for a fetch that was under way."),
		evicted:      one("estran_cache_evicted_bytes_total", "Bytes dropped from the cache."),
		cacheBytes:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "estran_cache_bytes", Help: "Bytes in the cache of sealed bytes."}),
		corruption:   vec("estran_corruption_detected_total", "Damage that was found before it was served or sealed.", "where"),
		rehomed:      one("estran_tier_rehomed_batches_total", "Batches written again so that their log can be freed."),
		storeDown:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "estran_tier_uploads_failing", Help: "Uploads that are being repeated now."}),
	}
	r.MustRegister(m.uploads, m.upload, m.segmentBytes, m.deleted, m.cache, m.coalesced, m.evicted, m.cacheBytes, m.corruption, m.rehomed, m.storeDown)
	return m
}
