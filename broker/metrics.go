package broker

import (
	"sync"
	"time"

	"github.com/estran/estran/raftmeta/state"
	"github.com/estran/estran/tiering"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the series of this package. Children of the hot path are looked up once.
type metrics struct {
	duration                                      *prometheus.HistogramVec
	requests, errors, rejected, slow, fetched     *prometheus.CounterVec
	connections                                   prometheus.Gauge
	badFrames, unsupported, acceptFailed          prometheus.Counter
	bytesIn, bytesOut, messagesIn, bytesRejected  *prometheus.CounterVec
	produces, fetches, failedProduce, failedFetch *prometheus.CounterVec
	batch                                         prometheus.Histogram
	byAPI                                         map[string]apiMetrics
	byTier                                        [3]prometheus.Counter

	mu      sync.RWMutex
	byTopic map[string]*topicMetrics
	sweepAt int // so many topics have series when it is looked which of them are gone
}

// topicMetrics are a topic's children.
type topicMetrics struct {
	bytesIn, messagesIn, bytesRejected, produces, failedProduce prometheus.Counter
}

// unknownTopic stands for all that do not exist.
const unknownTopic = "unknown"

// topic returns the series of a topic, those of unknownTopic if it does not exist. Series of topics that are gone are dropped when as many have been added as there were topics.
func (m *metrics) topic(c *state.Cluster, name string) *topicMetrics {
	if _, ok := c.Topic(name); !ok {
		name = unknownTopic
	}
	m.mu.RLock()
	x := m.byTopic[name]
	m.mu.RUnlock()
	if x != nil {
		return x
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if x := m.byTopic[name]; x != nil {
		return x
	}
	vecs := []*prometheus.CounterVec{m.bytesIn, m.messagesIn, m.bytesRejected, m.produces, m.failedProduce}
	if len(m.byTopic) >= m.sweepAt {
		for old := range m.byTopic {
			if _, ok := c.Topic(old); !ok {
				delete(m.byTopic, old)
				for _, v := range vecs {
					v.DeleteLabelValues(old)
				}
			}
		}
		m.sweepAt = 2*len(m.byTopic) + sweepLeast
	}
	x = &topicMetrics{m.bytesIn.WithLabelValues(name), m.messagesIn.WithLabelValues(name), m.bytesRejected.WithLabelValues(name), m.produces.WithLabelValues(name), m.failedProduce.WithLabelValues(name)}
	m.byTopic[name] = x
	return x
}

const sweepLeast = 16

type apiMetrics struct {
	requests prometheus.Counter
	duration prometheus.Observer
}

func newMetrics(r prometheus.Registerer) *metrics {
	count := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	const topics = "kafka_server_brokertopicmetrics_"
	m := &metrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "estran_kafka_request_duration_seconds", Help: "Time from a request's arrival until its answer was written.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}, NativeHistogramBucketFactor: 1.1}, []string{"api"}),
		requests:     count("kafka_network_requestmetrics_requests_total", "Requests by API.", "request"),
		errors:       count("estran_kafka_errors_total", "Errors answered.", "api", "error"),
		rejected:     count("estran_kafka_connections_rejected_total", "Connections refused.", "reason"),
		slow:         count("estran_kafka_slow_connections_total", "Connections ended because a frame did not come or an answer was not taken: in time, or while others waited for its memory.", "what"),
		fetched:      count("estran_fetch_bytes_total", "Bytes of Fetch answers to consumers, by the tier that they came from.", "tier"),
		connections:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "estran_kafka_connections", Help: "Open connections."}),
		badFrames:    prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_kafka_bad_frames_total", Help: "Frames that could not be decoded."}),
		unsupported:  prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_kafka_unsupported_requests_total", Help: "Requests with a key or version that is not served."}),
		acceptFailed: prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_kafka_accept_failures_total", Help: "Times that a connection could not be accepted, for want of descriptors or memory."}),
		bytesIn:      count(topics+"bytesin_total", "Bytes produced.", "topic"), bytesOut: count(topics+"bytesout_total", "Bytes fetched.", "topic"),
		messagesIn: count(topics+"messagesin_total", "Records produced.", "topic"), bytesRejected: count(topics+"bytesrejected_total", "Bytes refused.", "topic"),
		produces: count(topics+"totalproducerequests_total", "Produce requests.", "topic"), fetches: count(topics+"totalfetchrequests_total", "Fetch requests.", "topic"),
		failedProduce: count(topics+"failedproducerequests_total", "Produce requests that failed.", "topic"),
		failedFetch:   count(topics+"failedfetchrequests_total", "Fetch requests that failed.", "topic"),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "estran_produce_batch_bytes", Help: "Sizes of produced batches.",
			Buckets: prometheus.ExponentialBuckets(128, 4, 9)}),
		byAPI: map[string]apiMetrics{}, byTopic: map[string]*topicMetrics{}, sweepAt: sweepLeast,
	}
	r.MustRegister(m.duration, m.requests, m.errors, m.rejected, m.slow, m.fetched, m.connections, m.badFrames, m.unsupported, m.acceptFailed, m.bytesIn, m.bytesOut, m.messagesIn,
		m.bytesRejected, m.produces, m.fetches, m.failedProduce, m.failedFetch, m.batch)
	for _, a := range apiList() {
		m.byAPI[a.name] = apiMetrics{m.requests.WithLabelValues(a.name), m.duration.WithLabelValues(a.name)}
	}
	for t := range m.byTier {
		m.byTier[t] = m.fetched.WithLabelValues(tiering.Tier(t).String())
	}
	return m
}

func (m *metrics) observe(a *answer) {
	x := m.byAPI[a.api.name]
	x.requests.Inc()
	x.duration.Observe(time.Since(a.began).Seconds())
}
