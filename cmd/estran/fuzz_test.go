package main

import (
	"errors"
	"testing"
)

// FuzzConfig reads any file, variable and flag. What is refused is refused by faults with a code and a fix, whatever is wrong; what is accepted is a configuration that a node could
// start with.
func FuzzConfig(f *testing.F) {
	f.Add([]byte("version: 1\nnode: {id: 3, rack: a}\nquorum: {voters: ['1@a:1', '3@b:2'], shards: 4}\nstorage: {url: 's3://bkt?region=eu'}\nhot: {max_bytes: 2GiB}\ntiering: {seal_age: 30s}\nkafka: {num.partitions: 6}\n"),
		"ESTRAN_TIERING_SEAL_BYTES=1MiB", "127.0.0.1:1")
	f.Add([]byte("tiering:\n  seal_byte: 1\nlog: &a {level: *a}\n"), "KAFKA_NUM_PARTITIONS=many", "")
	f.Add([]byte("# nothing\n"), "ESTRAN_NODE_ID=99999999999", ":")
	f.Add([]byte("kafka:\n  - x\n  - {log.retention.ms: -5}\nnode: [\n"), "ESTRAN_NOTHING=1", "x")
	f.Add([]byte("tiering: {delete_grace: -1h}\n"), "", "h:1")
	f.Fuzz(func(t *testing.T, file []byte, variable, flag string) {
		c := defaultConfig()
		err := c.overlay("estran.yaml", file)
		if err == nil {
			err = errors.Join(c.loadEnv([]string{variable}), c.set("listeners.kafka.listen", flag, "--kafka-listen"), c.validate())
		}
		if err != nil {
			for _, e := range flatten(err) {
				if x, ok := errors.AsType[*fault](e); !ok || x.Code == "" || x.What == "" || x.Fix == "" || x.Exit != exitUsage {
					t.Errorf("no proper fault: %#v", e)
				}
			}
			return
		}
		if _, errs := c.brokerConfig(); len(errs) > 0 {
			t.Errorf("accepted, but not by the broker: %v", errs)
		}
		if _, err := c.voters(); err != nil || c.Hot.MaxBytes <= 0 || c.Tiering.SealAge <= 0 || c.Tiering.DeleteGrace < 0 {
			t.Errorf("accepted: %+v, %v", c, err)
		}
	})
}
