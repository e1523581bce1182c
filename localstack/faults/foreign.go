package main

import (
	"bufio"
	"context"
	"embed"
	"encoding/base64"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/estran/estran/localstack/check"
)

// Other clients than franz-go take part as processes that speak in lines (foreign/client.py says how).

//go:embed foreign
var foreignFiles embed.FS

const (
	foreignWindow = 200                  // records of one producer that are not acknowledged
	foreignPace   = 2 * time.Millisecond // between two of its records
	flushTime     = time.Minute          // for what is outstanding at the end
	foreignIDs    = 500                  // processes of the first such client
)

// foreignClients are the commands, by name, of those that can run here. The first words of what they do are added.
func foreignClients(ctx context.Context, dir string) (map[string][]string, error) {
	for _, name := range []string{"client.py", "Client.java"} {
		b, err := foreignFiles.ReadFile("foreign/" + name)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			return nil, err
		}
	}
	out := map[string][]string{}
	if exec.CommandContext(ctx, "python3", "-c", "import confluent_kafka").Run() == nil {
		out["librdkafka"] = []string{"python3", filepath.Join(dir, "client.py")}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return out, nil
	}
	libs, _ := filepath.Glob(filepath.Join(cache, "estran", "kafka", "*", "libs")) // a pattern of ours is never bad
	more, _ := filepath.Glob(filepath.Join(cache, "estran", "kafka", "*", "lib"))
	for _, lib := range append(libs, more...) {
		classpath := filepath.Join(lib, "*") + string(os.PathListSeparator) + dir
		if exec.CommandContext(ctx, "javac", "-cp", classpath, "-d", dir, filepath.Join(dir, "Client.java")).Run() == nil {
			out["java"] = []string{"java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", classpath, "Client"}
			break
		}
	}
	return out, nil
}

// foreign starts a producer and a reader of one client. Both end with the load.
func (w *workload) foreign(ctx context.Context, command []string, process int32) error {
	bootstrap := strings.Join(w.brokers, ",")
	words := func(op string) []string { return append(append([]string{}, command[1:]...), op, bootstrap) }
	produce := exec.Command(command[0], words("produce")...)
	consume := words("consume")
	for key := range int32(partitions) {
		t, p := partitionOf(key)
		consume = append(consume, fmt.Sprintf("%s:%d", t, p))
	}
	if err := w.foreignProduce(ctx, produce, process); err != nil {
		return err
	}
	return w.foreignRead(exec.CommandContext(ctx, command[0], consume...), process+1)
}

// sent is a record on its way.
type sent struct {
	began int64
	key   int32
	value uint64
	hash  uint32
}

func (w *workload) foreignProduce(ctx context.Context, cmd *exec.Cmd, process int32) error {
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return err
	}
	var mu sync.Mutex
	open := map[uint64]sent{}
	room := make(chan struct{}, foreignWindow)
	over := make(chan struct{})
	w.wg.Go(func() {
		defer close(over)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			var value uint64
			var offset int64
			if _, err := fmt.Sscan(sc.Text(), &value, &offset); err != nil {
				continue // not of ours: a library's own words
			}
			mu.Lock()
			s, ok := open[value]
			delete(open, value)
			mu.Unlock()
			if ok {
				<-room
				w.acknowledged(process, s, offset)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for _, s := range open { // nobody knows
			w.acknowledged(process, s, -1)
		}
	})
	feed := func() {
		for i := process; ; i++ {
			sleep(ctx, foreignPace)
			w.lull(ctx)
			select {
			case room <- struct{}{}:
			case <-over:
				return
			case <-ctx.Done():
				return
			}
			key := i % partitions
			topic, p := partitionOf(key)
			v := w.value.Add(1)
			b := encode(v)
			w.unacked.Add(1)
			mu.Lock()
			open[v] = sent{w.now(), key, v, crc32.ChecksumIEEE(b)}
			mu.Unlock()
			if _, err := fmt.Fprintf(in, "%d %s %d %s\n", v, topic, p, base64.StdEncoding.EncodeToString(b)); err != nil {
				return // it has ended; what is open is not known
			}
		}
	}
	w.wg.Go(func() {
		feed()
		early := ctx.Err() == nil
		_ = in.Close() // it flushes and ends
		select {
		case <-over:
		case <-time.After(flushTime):
			_ = cmd.Process.Kill() // it may have ended by itself
		}
		<-over
		if err := cmd.Wait(); early { // else how it ends says nothing of the records
			w.mu.Lock()
			defer w.mu.Unlock()
			w.bad = append(w.bad, check.Anomaly{Rule: "client-ended", Text: fmt.Sprintf("producer %d: %v\n%s", process, err, said.String()), Key: -1})
		}
	})
	return nil
}

func (w *workload) acknowledged(process int32, s sent, offset int64) {
	w.unacked.Add(-1)
	o := check.Op{Process: process, Kind: check.Send, Outcome: check.OK, Start: s.began, End: w.now(), Records: []check.Record{{Key: s.key, Offset: offset, Value: s.value, Hash: s.hash}}}
	if offset < 0 {
		o.Outcome = check.Info
	} else {
		w.acknowledge(s.key, offset)
		w.others.Add(1)
	}
	w.record(o)
}

func (w *workload) foreignRead(cmd *exec.Cmd, process int32) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	w.record(check.Op{Process: process, Kind: check.Assign, Outcome: check.OK, Start: w.now(), End: w.now()})
	w.wg.Go(func() {
		began := w.now()
		for sc := bufio.NewScanner(out); sc.Scan(); {
			var topic, value string
			var p int32
			var offset int64
			if _, err := fmt.Sscan(sc.Text(), &topic, &p, &offset, &value); err != nil {
				continue // a library's own words
			}
			b, err := base64.StdEncoding.DecodeString(value)
			if err != nil {
				continue
			}
			now := w.now()
			w.record(check.Op{Process: process, Kind: check.Poll, Outcome: check.OK, Start: began, End: now,
				Records: []check.Record{{Key: keyOf(topic, p), Offset: offset, Value: decode(b), Hash: crc32.ChecksumIEEE(b)}}})
			began = now
		}
		_ = cmd.Wait() // it was killed when the load ended
	})
	return nil
}
