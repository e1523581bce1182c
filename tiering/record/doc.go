// Package record views Kafka record batches (magic 2) in place: it validates, walks, compresses, decompresses and
// patches them, and names the integers that identify them. It knows no network, file, clock or cluster.
package record
