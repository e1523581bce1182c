package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/estran/estran/localstack/check"
	"github.com/estran/estran/tiering/segment"
	"github.com/twmb/franz-go/pkg/kadm"
)

// clockSlack is how far the time of an entry may be behind: it is made before the entry is committed, of clocks that were told a moment before.
const clockSlack = 500 * time.Millisecond

// scrub looks at the store after the clients have ended: no object was deleted before its time, and none is left that holds expired records alone.
func (w *workload) scrub(ctx context.Context, store *localstack.Double) (found []check.Anomaly, err error) {
	for _, g := range store.Gone() {
		if strings.Contains(g.Key, "/v1/data/") && g.Age < deleteGrace-clockSlack {
			found = append(found, check.Anomaly{Rule: "deleted-early", Text: fmt.Sprintf("%s was deleted when it was %v old", g.Key, g.Age), Key: -1})
		}
	}
	cl, err := w.client()
	if err != nil {
		return nil, err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	var starts kadm.ListedOffsets
	var topics kadm.TopicDetails
	if !until(ctx, func() bool { // there may be an election
		var err2 error
		starts, err = adm.ListStartOffsets(ctx, kept, expiring)
		topics, err2 = adm.ListTopics(ctx, kept, expiring)
		err = errors.Join(err, err2, starts.Error(), topics.Error())
		return err == nil
	}) {
		return found, fmt.Errorf("%w: the log starts after all faults: %w", errStuck, err)
	}
	from := map[string]int64{} // topic ID and partition -> log start
	starts.Each(func(o kadm.ListedOffset) {
		id := topics[o.Topic].ID
		from[fmt.Sprintf("%x-%d", id[:], o.Partition)] = o.Offset
	})
	var dead []string
	if until(ctx, func() bool { dead, err = expired(store, from); return err != nil || len(dead) == 0 }) {
		return found, err
	}
	if ctx.Err() != nil { // nobody has waited for them to go
		return found, ctx.Err()
	}
	for _, k := range dead {
		found = append(found, check.Anomaly{Rule: "zombie-object", Text: fmt.Sprintf("%s holds nothing that can be read and is there after %v", k, patience), Key: -1})
	}
	return found, nil
}

// expired are the objects that hold nothing at or above the log starts.
func expired(store *localstack.Double, from map[string]int64) (out []string, err error) {
	for _, k := range store.Keys() {
		b, ok := store.Object(k)
		if !ok || !strings.Contains(k, "/v1/data/") {
			continue
		}
		f, err := segment.OpenFooter(bytes.NewReader(b), int64(len(b)))
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("%s: %w", k, err)
		}
		live := len(f.Runs) == 0
		for _, r := range f.Runs {
			start, known := from[fmt.Sprintf("%x-%d", r.TP.Topic[:], r.TP.Partition)]
			live = live || !known || int64(r.EndOffset) >= start
		}
		if !live {
			out = append(out, k)
		}
	}
	return out, nil
}
