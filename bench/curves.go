package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// curves are the names of the curves that works are points of, in the order of the matrix.
func curves(all []work) (out []string) {
	for _, w := range all {
		if w.curve != "" && !slices.Contains(out, w.curve) {
			out = append(out, w.curve)
		}
	}
	return out
}

// point is a median.
type point struct{ x, y float64 }

// points are a system's medians along a curve.
func points(all []work, lines []line, name, system, key string, nodes int) (out []point) {
	for _, w := range all {
		if w.curve != name {
			continue
		}
		count, _ := counted(lines, w.name, system, nodes)
		if v := values(count, key); len(v) > 0 {
			out = append(out, point{w.x, median(v)})
		}
	}
	slices.SortFunc(out, func(a, b point) int { return int(math.Copysign(1, a.x-b.x)) })
	return out
}

const panelWidth, panelHeight, margin = 250.0, 200.0, 45.0

// drawCurve draws throughput, latency, CPU and memory against what a curve is of, on a scale by powers of ten, as an SVG; "" if there are not two points.
func drawCurve(all []work, lines []line, name string, nodes int) string {
	var b strings.Builder
	drawn := 0
	for _, key := range []string{"MB/s", "p99_ms", "cpu_s/GiB", "rss_MiB"} {
		var xs, top = []float64{}, 0.0
		sets := map[string][]point{}
		for _, s := range []string{estran, kafka, kafkaFsync} {
			sets[s] = points(all, lines, name, s, key, nodes)
			for _, p := range sets[s] {
				xs, top = append(xs, p.x), max(top, p.y)
			}
		}
		slices.Sort(xs)
		if xs = slices.Compact(xs); len(xs) < 2 || top == 0 {
			continue
		}
		left := margin + float64(drawn)*(panelWidth+margin)
		at := func(p point) (x, y float64) {
			return left + panelWidth*math.Log(p.x/xs[0])/math.Log(xs[len(xs)-1]/xs[0]), margin + panelHeight*(1-p.y/top)
		}
		fmt.Fprintf(&b, "<text x=\"%.0f\" y=\"%.0f\" font-weight=\"bold\">%s</text>\n<path d=\"M%.0f %.0fv%.0fh%.0f\" fill=\"none\" stroke=\"#888\"/>\n", left, margin-12, key, left, margin, panelHeight, panelWidth)
		fmt.Fprintf(&b, "<text x=\"%.0f\" y=\"%.0f\" text-anchor=\"end\">%s</text>\n<text x=\"%.0f\" y=\"%.0f\" text-anchor=\"end\">0</text>\n", left-4, margin+4, short(top), left-4, margin+panelHeight)
		for _, x := range xs {
			px, _ := at(point{x, 0})
			fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%.0f\" text-anchor=\"middle\">%g</text>\n", px, margin+panelHeight+15, x)
		}
		for i, s := range []string{estran, kafka, kafkaFsync} {
			color := []string{"#0072b2", "#d55e00", "#cc79a7"}[i]
			var path strings.Builder
			for _, p := range sets[s] {
				x, y := at(p)
				fmt.Fprintf(&path, "%.1f,%.1f ", x, y)
				fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x, y, color)
			}
			if len(sets[s]) > 0 {
				fmt.Fprintf(&b, "<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", strings.TrimSpace(path.String()), color)
				fmt.Fprintf(&b, "<text x=\"%.0f\" y=\"%.0f\" fill=\"%s\">%s</text>\n", left+80*float64(i), margin+panelHeight+32, color, s)
			}
		}
		drawn++
	}
	if drawn == 0 {
		return ""
	}
	return fmt.Sprintf("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n%s</svg>\n",
		margin+float64(drawn)*(panelWidth+margin), panelHeight+2*margin, b.String())
}

// curveFile is where a curve lies beside the report.
func curveFile(name string, nodes int) string {
	return fmt.Sprintf("benchmarks/%s-%d.svg", strings.ReplaceAll(name, " ", "-"), nodes)
}
