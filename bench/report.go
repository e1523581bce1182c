package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const intro = `# Benchmarks

Written by ` + "`make bench-compare`" + `, which anybody can repeat (Java 17 and Maven for Kafka); not edited by hand. All that is said here comes from the raw lines at the end.

**What is compared.** Estran, and Apache Kafka with the settings it is shipped with, under which an acknowledgement means that a record is in the page cache of the in-sync replicas, and
Kafka with ` + "`log.flush.interval.messages=1`" + `, under which it means that it is on their disks, as it always does in Estran. All with acks=all and idempotent producers; replication factor and
voters are the number of nodes, all of which, and the clients, share this machine's cores and its disk. Settings are the defaults but for addresses, directories and, with
Kafka, min.insync.replicas, which is a majority, and a heap of 1 GiB as in its own start script; Estran deletes objects of deleted topics after 10 s.

**How.** The systems run side by side. Each work is done on one after the other, round after round (A B C A B C), by the same franz-go client with the same random records; the row
` + "`java`" + ` by Kafka's own. A cell is the median of the rounds and, in brackets, the least and the most. Rows whose clusters are their own (start, failover, cold, partitions, voters, minio,
topics) run alone. Open-loop latency counts from when a record was due; a producer's first record, with which come connections and metadata, is not measured. Before a cold read the
nodes have started again, and it counts only if nine tenths came from the store. What was acknowledged is read back after each run, or by who follows during it: every record once, in order,
its bytes unharmed; a run in which that is not so is an error. A topic is deleted once its run is checked. Leaders of Kafka go a tenth as often as Estran's.

**What counts.** Logs lie on the disk; sealed segments go to a ` + "`file://`" + ` store on tmpfs, which stands for a store that is not on these cores and this disk, unless a row says otherwise. A run
in which more than 4 segments of a shard were waiting to be sealed is *borrowed*: what it owes to the store it has not paid, so it does not count. Before the first run Estran has
written its local retention through twice, so that log files are recycled ones, and Kafka's JVMs have been warmed; not in the rows start, failover, cold, minio and topics.

**Columns.** cpu_s/GiB: CPU seconds of all nodes for each GiB of records; client_s/GiB: of the client. rss, peak: resident memory of all nodes after the run, and the most since their
start. disk_B/B: bytes that all nodes had written to the disk for each byte of records; flushes/GiB: flushes of the disk, by whomever; fdatasyncs/GiB: Estran's own count. wire_B/B:
what the measured client sent and got; lo_B/B: all bytes over loopback. ratio: bytes of batches before compression to those after. "of the limit": the first column as a share of what
the machine can do: of a synced sequential write of 1 MiB, divided by the nodes that share the disk (produce); of loopback TCP (consume); of ranged reads of the store's tmpfs (cold);
of two synced writes of 4 KiB and two round trips, with one node of one each (one record at a time).
`

// facts describe the machine and the programs.
func (b *comparison) facts(ctx context.Context) (l line, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return l, err
	}
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	mem, _ := os.ReadFile("/proc/meminfo")
	model := ""
	for s := range strings.Lines(string(cpu)) {
		if k, v, ok := strings.Cut(s, ":"); ok && strings.TrimSpace(k) == "model name" {
			model = v
		}
	}
	version, err := exec.CommandContext(ctx, b.o.program, "version").Output()
	if err != nil {
		return l, fmt.Errorf("%s version: %w", b.o.program, err)
	}
	first, _, _ := strings.Cut(string(version), "\n")
	l.put("facts", time.Now().UTC().Format(time.DateOnly))
	l.put("cpu", model)
	l.set("cores", runtime.NumCPU())
	l.set("memory_GiB", keyed(string(mem), "MemTotal:")/(1<<20))
	l.put("kernel", string(bytes.TrimRight(u.Release[:], "\x00")))
	l.put("go", runtime.Version())
	l.put("estran", first)
	if b.jars != "" {
		out, err := exec.CommandContext(ctx, "java", "-version").CombinedOutput()
		if err != nil {
			return l, fmt.Errorf("java -version: %w", err)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		l.put("java", first)
		servers, err := filepath.Glob(filepath.Join(b.jars, "kafka-server-[0-9]*.jar"))
		if err != nil || len(servers) == 0 {
			return l, errors.Join(errors.New("there is no kafka-server among Kafka's jars"), err)
		}
		l.put("kafka", strings.TrimSuffix(strings.TrimPrefix(filepath.Base(servers[0]), "kafka-server-"), ".jar"))
	}
	l.set("rounds", b.o.rounds)
	l.set("mb", b.o.mb)
	l.set("warm", b.o.warm)
	l.set("during", b.o.during)
	l.set("retention", b.o.retention)
	return l, nil
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// values are the numbers that lines have under a key.
func values(lines []line, key string) (out []float64) {
	for _, l := range lines {
		if v, ok := l.num(key); ok {
			out = append(out, v)
		}
	}
	return out
}

// cell is the median, the least and the most.
func cell(v []float64) string {
	switch {
	case len(v) == 0:
		return ""
	case len(v) == 1 || slices.Min(v) == slices.Max(v):
		return short(v[0])
	}
	m := short(median(v)) // which sorts them
	return fmt.Sprintf("%s [%s-%s]", m, short(v[0]), short(v[len(v)-1]))
}

// short has three digits that count.
func short(f float64) string {
	switch {
	case f >= 100:
		return fmt.Sprintf("%.0f", f)
	case f >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.3f", f), "0"), ".")
}

// counted are the lines of a row that count, and why others do not.
func counted(lines []line, name, system string, nodes int) (count []line, not []string) {
	for _, l := range lines {
		if l.text("work") != name || system != "" && l.text("system") != system || l.text("nodes") != fmt.Sprint(nodes) {
			continue
		}
		switch {
		case l.text("error") != "":
			not = append(not, fmt.Sprintf("%s failed: %.200s", l.text("system"), strings.ReplaceAll(l.text("error"), "_", " ")))
		case l.text("counts") != "":
			not = append(not, fmt.Sprintf("%s: %s", l.text("system"), l.text("counts")))
		default:
			count = append(count, l)
		}
	}
	return count, not
}

// limitOf is what a machine with these limits can do at most in a work, in the unit of the first column.
func limitOf(limit string, nodes int, lines []line) float64 {
	of := func(name string) float64 {
		var v []float64
		for _, l := range lines {
			if x, ok := l.num("value"); ok && l.text("limit") == name {
				v = append(v, x)
			}
		}
		return median(v)
	}
	switch limit {
	case "disk":
		return of("fdatasync_1024KiB_MB/s") / float64(nodes)
	case "tcp":
		return of("tcp_MB/s")
	case "get":
		return of("ranged_get_4MiB_MB/s")
	case "record":
		return float64(min(nodes, 2)) * (of("fdatasync_4KiB_p50_ms") + of("tcp_round_trip_p50_ms"))
	}
	return 0
}

// share is how near a result comes to its limit. What is measured in ms is better when it is less.
func share(value, limit float64, unit string) string {
	if value == 0 || limit == 0 {
		return ""
	}
	if strings.HasSuffix(unit, "_ms") {
		value, limit = limit, value
	}
	return fmt.Sprintf("%.0f %%", 100*value/limit)
}

// table is a work's part of the report; "" if nothing of it counts.
func (w work) table(lines []line, nodes int) string {
	var b strings.Builder
	medians := map[string]map[string]float64{}
	var notes []string
	columns := slices.DeleteFunc(slices.Clone(w.show), func(key string) bool {
		all, _ := counted(lines, w.name, "", nodes)
		return len(values(all, key)) == 0
	})
	limit := limitOf(w.limit, nodes, lines)
	for _, s := range []string{estran, kafka, kafkaFsync} {
		count, not := counted(lines, w.name, s, nodes)
		notes = append(notes, not...)
		if len(count) == 0 {
			continue
		}
		medians[s] = map[string]float64{}
		fmt.Fprintf(&b, "| %s | %d |", s, len(count))
		for i, key := range columns {
			v := values(count, key)
			if fmt.Fprintf(&b, " %s |", cell(v)); len(v) > 0 {
				medians[s][key] = median(v)
			}
			if i == 0 && limit > 0 {
				fmt.Fprintf(&b, " %s |", share(medians[s][key], limit, key))
			}
		}
		b.WriteByte('\n')
	}
	if len(medians) == 0 {
		return ""
	}
	for _, s := range []string{kafka, kafkaFsync} {
		if medians[estran] == nil || medians[s] == nil {
			continue
		}
		fmt.Fprintf(&b, "| estran / %s | |", s)
		for i, key := range columns {
			x, ok1 := medians[estran][key]
			y, ok2 := medians[s][key]
			if ok1 && ok2 && y > 0 {
				fmt.Fprintf(&b, " **%.2f** |", x/y)
			} else {
				b.WriteString(" |")
			}
			if i == 0 && limit > 0 {
				b.WriteString(" |")
			}
		}
		b.WriteByte('\n')
	}
	for _, n := range notes {
		fmt.Fprintf(&b, "\nDoes not count: %s.\n", n)
	}
	head, rule := "| | runs |", "|---|---|"
	for i, key := range columns {
		head, rule = head+" "+key+" |", rule+"---|"
		if i == 0 && limit > 0 {
			head, rule = head+" of the limit |", rule+"---|"
		}
	}
	return fmt.Sprintf("\n### `%s`: %s\n\n%s\n%s\n%s", w.name, w.what, head, rule, b.String())
}

// matrix are the works that the page is about.
func matrix(o options, lines []line) []work {
	o.partitions = slices.Clone(o.partitions)
	for _, l := range lines { // of earlier runs, with other options
		if n, err := strconv.Atoi(strings.TrimPrefix(l.text("work"), "partitions-")); err == nil {
			o.partitions = append(o.partitions, n)
		}
	}
	slices.Sort(o.partitions)
	o.partitions = slices.Compact(o.partitions)
	return works(o)
}

// report is the whole page.
func report(o options, lines []line) string {
	all := matrix(o, lines)
	var b strings.Builder
	b.WriteString(intro)
	b.WriteString("\n## The machine\n")
	limits := map[string][]float64{}
	var names []string
	for _, l := range lines {
		if l.text("facts") != "" {
			b.WriteString("\n")
			for i, k := range l.keys {
				fmt.Fprintf(&b, "- %s: %s\n", strings.ReplaceAll(k, "facts", "measured"), strings.ReplaceAll(l.values[i], "_", " "))
			}
		}
		if name := l.text("limit"); name != "" {
			if v, ok := l.num("value"); ok {
				if limits[name] == nil {
					names = append(names, name)
				}
				limits[name] = append(limits[name], v)
			}
		}
	}
	if len(names) > 0 {
		b.WriteString("\n| limit | |\n|---|---|\n")
	}
	for _, n := range names {
		fmt.Fprintf(&b, "| %s | %s |\n", strings.ReplaceAll(n, "_", " "), cell(limits[n]))
	}
	lacks := map[string][]string{} // sizes, and why
	for _, nodes := range []int{3, 1} {
		fmt.Fprintf(&b, "\n## %s\n", map[int]string{3: "Three nodes", 1: "One node"}[nodes])
		for _, name := range curves(all) {
			if drawCurve(all, lines, name, nodes) != "" {
				fmt.Fprintf(&b, "\n![against %s](%s)\n", name, curveFile(name, nodes))
			}
		}
		for _, w := range all {
			if w.nodes != 0 && w.nodes != nodes {
				continue
			}
			if t := w.table(lines, nodes); t != "" {
				b.WriteString(t)
				continue
			}
			_, not := counted(lines, w.name, "", nodes)
			lacks[w.name] = append(lacks[w.name], strings.Join(append([]string{map[int]string{3: "three nodes", 1: "one node"}[nodes]}, not...), "; "))
		}
	}
	b.WriteString("\n## Not measured yet\n\n")
	for _, w := range all {
		if l := lacks[w.name]; len(l) > 0 {
			fmt.Fprintf(&b, "- `%s` (%s): %s\n", w.name, strings.Join(l, ", "), w.what)
		}
	}
	for _, s := range missing {
		fmt.Fprintf(&b, "- %s\n", s)
	}
	b.WriteString("\n## Raw lines\n\n```\n")
	for _, l := range lines {
		fmt.Fprintln(&b, l)
	}
	b.WriteString("```\n")
	return b.String()
}

// writeReport replaces the page and its curves.
func writeReport(path string, o options, lines []line) error {
	all := matrix(o, lines)
	for _, nodes := range []int{1, 3} {
		for _, name := range curves(all) {
			if svg := drawCurve(all, lines, name, nodes); svg != "" {
				to := filepath.Join(filepath.Dir(path), curveFile(name, nodes))
				if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, []byte(svg), 0o644)); err != nil {
					return err
				}
			}
		}
	}
	if err := os.WriteFile(path+".tmp", []byte(report(o, lines)), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}
