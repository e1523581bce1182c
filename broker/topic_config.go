package broker

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/estran/estran/raftmeta/state"
)

// configType is a setting's type, as DescribeConfigs names it.
type configType int8

const (
	typeBool   configType = 1
	typeString configType = 2
	typeInt    configType = 3
	typeLong   configType = 5
	typeList   configType = 7
	typeDouble configType = 6
)

// topicSetting is a setting of a topic. A setting is implemented, or its other values are refused with the reason; inert ones cannot change what a client sees:
// frameworks set them, they are stored and returned, and marked.
type topicSetting struct {
	name  string
	typ   configType
	value func(*Config) string // default
	check func(string) error
	inert bool
}

func fixed(v string) func(*Config) string { return func(*Config) string { return v } }

func wholeNumber(least int64) func(string) error {
	return func(s string) error {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < least {
			return fmt.Errorf("%q is not a whole number of at least %d", s, least)
		}
		return nil
	}
}

// only accepts the one value that is implemented.
func only(want, why string) func(string) error {
	return func(s string) error {
		if s != want {
			return fmt.Errorf("%q is not implemented, only %s: %s", s, want, why)
		}
		return nil
	}
}

func oneOf(values ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(values, s) {
			return fmt.Errorf("%q is not one of %s", s, strings.Join(values, ", "))
		}
		return nil
	}
}

func messageBytes(s string) error {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < 0 || n > 8<<20 {
		return fmt.Errorf("%q is not a number of bytes between 0 and 8388608, the largest batch that can be replicated", s)
	}
	return nil
}

func anything(string) error { return nil }

func number(f func(*Config) int64) func(*Config) string {
	return func(c *Config) string { return strconv.FormatInt(f(c), 10) }
}

// topicSettings lists every setting that a topic can have, by name.
func topicSettings() []topicSetting {
	inert := func(name string, t configType, def string) topicSetting {
		check := anything
		if t == typeInt || t == typeLong {
			check = wholeNumber(-1)
		}
		return topicSetting{name, t, fixed(def), check, true}
	}
	return []topicSetting{
		{"cleanup.policy", typeList, fixed("delete"), only("delete", "log compaction is not there yet"), false},
		{"compression.type", typeString, func(c *Config) string { return c.CompressionType }, oneOf("producer", "uncompressed", "gzip", "snappy", "lz4", "zstd"), false},
		inert("delete.retention.ms", typeLong, "86400000"),
		inert("file.delete.delay.ms", typeLong, "60000"),
		inert("flush.messages", typeLong, "9223372036854775807"),
		inert("flush.ms", typeLong, "9223372036854775807"),
		inert("index.interval.bytes", typeInt, "4096"),
		{"local.retention.bytes", typeLong, fixed("-2"), only("-2", "one shared log has no local retention per topic"), false},
		{"local.retention.ms", typeLong, fixed("-2"), only("-2", "one shared log has no local retention per topic"), false},
		inert("max.compaction.lag.ms", typeLong, "9223372036854775807"),
		{"max.message.bytes", typeInt, number(func(c *Config) int64 { return int64(c.MaxMessageBytes) }), messageBytes, false},
		{"message.timestamp.after.max.ms", typeLong, number(func(c *Config) int64 { return c.TimestampAfterMs }), wholeNumber(0), false},
		{"message.timestamp.before.max.ms", typeLong, number(func(c *Config) int64 { return c.TimestampBeforeMs }), wholeNumber(0), false},
		{"message.timestamp.type", typeString, func(c *Config) string { return c.TimestampType }, oneOf("CreateTime", "LogAppendTime"), false},
		inert("min.cleanable.dirty.ratio", typeDouble, "0.5"),
		inert("min.compaction.lag.ms", typeLong, "0"),
		{minInsyncReplicas, typeInt, fixed("1"), wholeNumber(1), false},
		inert("preallocate", typeBool, "false"),
		{"remote.storage.enable", typeBool, fixed("true"), only("true", "every topic is tiered"), false},
		{"retention.bytes", typeLong, number(func(c *Config) int64 { return c.RetentionBytes }), wholeNumber(-1), false},
		{"retention.ms", typeLong, number(func(c *Config) int64 { return c.RetentionMs }), wholeNumber(-1), false},
		inert("segment.bytes", typeInt, "1073741824"),
		inert("segment.index.bytes", typeInt, "10485760"),
		inert("segment.jitter.ms", typeLong, "0"),
		inert("segment.ms", typeLong, "604800000"),
		{"unclean.leader.election.enable", typeBool, fixed("false"), only("false", "an acknowledged record is never given up"), false},
	}
}

// checkTopicConfig reports the first fault of a topic's settings.
func (s *Server) checkTopicConfig(configs map[string]string) error {
	for name, v := range configs {
		i := slices.IndexFunc(topicSettings(), func(s topicSetting) bool { return s.name == name })
		if i < 0 {
			return fmt.Errorf("unknown topic config %q", name)
		}
		if err := topicSettings()[i].check(v); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if n, majority := minInsync(configs), s.b.Voters()/2+1; n > majority {
		return fmt.Errorf("%s: %d is above the majority of %d voters: it is %d that an acknowledgement waits for", minInsyncReplicas, n, s.b.Voters(), majority)
	}
	return nil
}

const minInsyncReplicas = "min.insync.replicas"

// minInsync is how many voters must have a record before it is acknowledged, as far as a topic says so.
func minInsync(configs map[string]string) int {
	n, _ := strconv.Atoi(configs[minInsyncReplicas]) // checked when it was set
	return max(n, 1)
}

// topicConfig reads a topic's effective settings.
type topicConfig struct {
	s *Server
	t *state.Topic
}

func (c topicConfig) string(name string) string {
	if v, ok := c.t.Configs[name]; ok {
		return v
	}
	return c.s.defaults[name]
}

func (c topicConfig) int64(name string) int64 {
	n, _ := strconv.ParseInt(c.string(name), 10, 64) // checked when it was set
	return n
}

func (c topicConfig) int(name string) int { return int(c.int64(name)) }

// parsed is what shards must know of a topic with these settings.
func (s *Server) parsed(configs map[string]string) state.PartitionConfig {
	c := topicConfig{s, &state.Topic{Configs: configs}}
	return state.PartitionConfig{RetentionMs: c.int64("retention.ms"), RetentionBytes: c.int64("retention.bytes"), Compact: strings.Contains(c.string("cleanup.policy"), "compact")}
}

// checkTopicName says why a name is not one.
func checkTopicName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 249 {
		return fmt.Errorf("topic name %.80q is empty, a dot, or longer than 249 characters", name)
	}
	for _, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return fmt.Errorf("topic name %.80q has characters other than letters, digits, '.', '_' and '-'", name)
		}
	}
	return nil
}
