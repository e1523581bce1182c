package main

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/estran/estran/broker"
)

// kafkaKey is one of Kafka's broker settings under `kafka:`. All that are listed are implemented.
type kafkaKey struct {
	name string
	set  func(*broker.Config, string) error
}

func setInt[T int | int32 | int64](field func(*broker.Config) *T, least, most int64) func(*broker.Config, string) error {
	return func(c *broker.Config, v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < least || n > most {
			return fmt.Errorf("%q is not a whole number between %d and %d", v, least, most)
		}
		*field(c) = T(n)
		return nil
	}
}

func setTime(field func(*broker.Config) *time.Duration, unit time.Duration) func(*broker.Config, string) error {
	return func(c *broker.Config, v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 || n > 1<<40 {
			return fmt.Errorf("%q is not a whole number of at least 0", v)
		}
		*field(c) = time.Duration(n) * unit
		return nil
	}
}

func setBool(field func(*broker.Config) *bool) func(*broker.Config, string) error {
	return func(c *broker.Config, v string) error {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("%q is not true or false", v)
		}
		*field(c) = b
		return nil
	}
}

func setOneOf(field func(*broker.Config) *string, values ...string) func(*broker.Config, string) error {
	return func(c *broker.Config, v string) error {
		if !slices.Contains(values, v) {
			return fmt.Errorf("%q is not one of %v", v, values)
		}
		*field(c) = v
		return nil
	}
}

const maxInt = 1<<31 - 1

var kafkaKeys = []kafkaKey{
	{"auto.create.topics.enable", setBool(func(c *broker.Config) *bool { return &c.AutoCreateTopics })},
	{"compression.type", setOneOf(func(c *broker.Config) *string { return &c.CompressionType }, "producer", "uncompressed", "gzip", "snappy", "lz4", "zstd")},
	{"group.initial.rebalance.delay.ms", setTime(func(c *broker.Config) *time.Duration { return &c.GroupInitialDelay }, time.Millisecond)},
	{"group.max.session.timeout.ms", setTime(func(c *broker.Config) *time.Duration { return &c.GroupMaxSession }, time.Millisecond)},
	{"group.max.size", setInt(func(c *broker.Config) *int { return &c.GroupMaxSize }, 1, maxInt)},
	{"group.min.session.timeout.ms", setTime(func(c *broker.Config) *time.Duration { return &c.GroupMinSession }, time.Millisecond)},
	{"log.message.timestamp.after.max.ms", setInt(func(c *broker.Config) *int64 { return &c.TimestampAfterMs }, 0, 1<<63-1)},
	{"log.message.timestamp.before.max.ms", setInt(func(c *broker.Config) *int64 { return &c.TimestampBeforeMs }, 0, 1<<63-1)},
	{"log.message.timestamp.type", setOneOf(func(c *broker.Config) *string { return &c.TimestampType }, "CreateTime", "LogAppendTime")},
	{"log.retention.bytes", setInt(func(c *broker.Config) *int64 { return &c.RetentionBytes }, -1, 1<<62)},
	{"log.retention.check.interval.ms", setInt(func(c *broker.Config) *int64 { return &c.RetentionCheckMs }, 1, 1<<40)},
	{"log.retention.ms", setInt(func(c *broker.Config) *int64 { return &c.RetentionMs }, -1, 1<<62)},
	{"max.connections", setInt(func(c *broker.Config) *int { return &c.MaxConnections }, 1, maxInt)},
	{"max.connections.per.ip", setInt(func(c *broker.Config) *int { return &c.MaxConnectionsPerIP }, 1, maxInt)},
	{"connections.max.idle.ms", setTime(func(c *broker.Config) *time.Duration { return &c.IdleTimeout }, time.Millisecond)},
	{"message.max.bytes", setInt(func(c *broker.Config) *int32 { return &c.MaxMessageBytes }, 0, 8<<20)},
	{"num.partitions", setInt(func(c *broker.Config) *int32 { return &c.NumPartitions }, 1, 10_000)},
	{"offset.metadata.max.bytes", setInt(func(c *broker.Config) *int { return &c.OffsetMetadataMax }, 0, 1<<20)},
	{"offsets.retention.minutes", setTime(func(c *broker.Config) *time.Duration { return &c.OffsetsRetention }, time.Minute)},
	{"socket.request.max.bytes", setInt(func(c *broker.Config) *int32 { return &c.RequestMaxBytes }, 1<<16, 1<<30)},
}

// brokerConfig turns the kafka: map into the broker's settings.
func (c *config) brokerConfig() (broker.Config, []error) {
	b := broker.DefaultConfig()
	var errs []error
	for name, v := range c.Kafka {
		i := slices.IndexFunc(kafkaKeys, func(k kafkaKey) bool { return k.name == name })
		if i < 0 {
			f := &fault{Code: "E_CONFIG_UNKNOWN_KEY", Exit: exitUsage, What: fmt.Sprintf("unknown key %q (from %s)", "kafka."+name, c.from("kafka."+name)),
				Fix: "remove it, or see the keys in docs/CONFIGURATION.md"}
			var names []string
			for _, k := range kafkaKeys {
				names = append(names, k.name)
			}
			if near := nearest(name, names); near != "" {
				f.Fix = fmt.Sprintf("did you mean %q?", "kafka."+near)
			}
			errs = append(errs, f)
			continue
		}
		if err := kafkaKeys[i].set(&b, fmt.Sprint(v)); err != nil {
			errs = append(errs, &fault{Code: "E_CONFIG_VALUE", Exit: exitUsage, What: fmt.Sprintf("kafka.%s: %v (from %s)", name, err, c.from("kafka."+name)), Fix: "correct the value"})
		}
	}
	return b, errs
}

func (c *config) validateKafka() []error {
	_, errs := c.brokerConfig()
	return errs
}
