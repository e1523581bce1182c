package segment

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/estran/estran/tiering/record"
)

// Dump writes what an object contains, without its records: as text, or as one JSON object per run.
func Dump(w io.Writer, r io.ReaderAt, size int64, asJSON bool) error {
	f, err := OpenFooter(r, size)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(w)
	if !asJSON {
		fmt.Fprintf(w, "object %d  shard %d  term %d  class %s  uuid %s  size %d  runs %d\n", f.Number, f.Shard, f.Term, f.Class, f.UUID, size, len(f.Runs))
	}
	for i := range f.Runs {
		run := &f.Runs[i]
		blocks, err := ReadIndex(r, run)
		if err != nil {
			return err
		}
		d, err := ReadDetails(r, run)
		if err != nil {
			return err
		}
		if asJSON {
			err = enc.Encode(map[string]any{"object": f.Number, "shard": f.Shard, "term": f.Term, "class": f.Class.String(), "topic": run.TP.Topic.String(),
				"partition": run.TP.Partition, "start": run.StartOffset, "end": run.EndOffset, "position": run.Position, "bytes": run.SizeBytes,
				"records": run.Records, "blocks": len(blocks), "max_timestamp": run.MaxTimestamp, "epochs": len(d.Epochs), "producers": len(d.Producers)})
		} else {
			_, err = fmt.Fprintf(w, "run %d  %s  offsets %d-%d  records %d  at %d  bytes %d  blocks %d  max ts %d  epochs %d  producers %d  aborted %d\n", i, run.TP,
				run.StartOffset, run.EndOffset, run.Records, run.Position, run.SizeBytes, len(blocks), run.MaxTimestamp, len(d.Epochs), len(d.Producers), len(d.Aborted))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// catRecord is a record as Cat writes it in JSON.
type catRecord struct {
	Topic     string  `json:"topic"`
	Partition int32   `json:"partition"`
	Offset    int64   `json:"offset"`
	Timestamp int64   `json:"timestamp"`
	Key       *string `json:"key"`
	Value     *string `json:"value"`
}

// Cat writes the records of an object, after checking every byte that it reads: a value per line, or one JSON object per record.
func Cat(w io.Writer, r io.ReaderAt, size int64, asJSON bool) error {
	head := make([]byte, headerBytes)
	if _, err := r.ReadAt(head, 0); err != nil && err != io.EOF {
		return fmt.Errorf("segment: reading the header: %w", err)
	}
	if err := CheckHeader(head); err != nil {
		return err
	}
	f, err := OpenFooter(r, size)
	if err != nil {
		return err
	}
	for i := range f.Runs {
		run := &f.Runs[i]
		err := EachBatch(r, run, func(b record.Batch) error { return catBatch(w, run.TP, b, asJSON) })
		if err != nil {
			return err
		}
	}
	return nil
}

func catBatch(w io.Writer, tp record.TopicPartition, b record.Batch, asJSON bool) error {
	if b.IsControl() {
		return nil
	}
	enc := json.NewEncoder(w)
	var werr error
	err := record.Each(b, 0, func(o record.Offset, r *record.Record) bool {
		if !asJSON {
			_, werr = fmt.Fprintf(w, "%s\n", r.Value)
			return werr == nil
		}
		j := catRecord{Topic: tp.Topic.String(), Partition: tp.Partition, Offset: int64(o), Timestamp: int64(r.Timestamp)}
		if r.Key != nil {
			k := string(r.Key)
			j.Key = &k
		}
		if r.Value != nil {
			v := string(r.Value)
			j.Value = &v
		}
		werr = enc.Encode(j)
		return werr == nil
	})
	if err != nil {
		return fmt.Errorf("%w: batch at offset %d: %w", ErrCorrupt, b.BaseOffset(), err)
	}
	return werr
}
