package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// line is what one run has measured: keys and values in the order in which they came. Its text is what the report is made of, and nothing else is.
type line struct{ keys, values []string }

// put sets a text; blanks in it become underscores.
func (l *line) put(key, value string) {
	value = strings.Join(strings.Fields(value), "_")
	if i := slices.Index(l.keys, key); i >= 0 {
		l.values[i] = value
		return
	}
	l.keys, l.values = append(l.keys, key), append(l.values, value)
}

// set sets a text or a number.
func (l *line) set(key string, v any) {
	if f, ok := v.(float64); ok {
		v = number(f)
	}
	l.put(key, fmt.Sprint(v))
}

// number has four digits that count.
func number(f float64) string {
	switch a := math.Abs(f); {
	case math.IsNaN(f) || math.IsInf(f, 0):
		return "0"
	case a >= 1000:
		return strconv.FormatFloat(f, 'f', 0, 64)
	}
	s := strconv.FormatFloat(f, 'g', 4, 64)
	if strings.ContainsRune(s, 'e') {
		s = strconv.FormatFloat(f, 'f', 6, 64)
	}
	return s
}

// quantiles sets how long things took.
func (l *line) quantiles(prefix string, lat []time.Duration) {
	slices.Sort(lat)
	for _, q := range []struct {
		key string
		p   float64
	}{{"p50_ms", .5}, {"p99_ms", .99}, {"p999_ms", .999}, {"max_ms", 1}} {
		l.set(prefix+q.key, quantile(lat, q.p))
	}
}

// text is a value, "" if there is none.
func (l line) text(key string) string {
	if i := slices.Index(l.keys, key); i >= 0 {
		return l.values[i]
	}
	return ""
}

// num is a number.
func (l line) num(key string) (float64, bool) {
	v, err := strconv.ParseFloat(l.text(key), 64)
	return v, err == nil
}

func (l line) String() string {
	var b strings.Builder
	for i, k := range l.keys {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(k + "=" + l.values[i])
	}
	return b.String()
}

// parseLine reads what String has written.
func parseLine(s string) (l line, err error) {
	for _, f := range strings.Fields(s) {
		k, v, ok := strings.Cut(f, "=")
		if !ok || k == "" {
			return l, fmt.Errorf("%q in a line of results is no key=value", f)
		}
		l.put(k, v)
	}
	return l, nil
}

// parseLines reads a file of results.
func parseLines(s string) (out []line, err error) {
	for text := range strings.Lines(s) {
		l, err := parseLine(text)
		if err != nil {
			return nil, err
		}
		if len(l.keys) > 0 {
			out = append(out, l)
		}
	}
	return out, nil
}
