// Package admin serves the HTTP side of a node: metrics, liveness, readiness and version. It knows no Kafka protocol and no
// storage; what it reports comes from small functions that the composition root gives it.
package admin

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Check is one condition of readiness.
type Check struct {
	Name string
	// Err is why the condition does not hold; nil if it does.
	Err error
	// Degraded marks a condition whose failure is reported but does not make the node unready.
	Degraded bool
}

// Config says what a node shows.
type Config struct {
	Gatherer prometheus.Gatherer
	// Live reports whether the process's own loops move. It must not depend on the object store or the quorum.
	Live func() []Check
	// Ready reports whether the node can serve its clients now.
	Ready func() []Check
	// Version is encoded as JSON at /version.
	Version any
}

// ScrapeTimeout bounds one scrape of /metrics.
const ScrapeTimeout = 10 * time.Second

// Handler serves /metrics, /livez, /readyz, /healthz (an alias of /readyz) and /version. With ?verbose the health paths list
// their checks, ?exclude=NAME leaves checks out, and an Accept header of application/json gets JSON.
func Handler(cfg Config) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Gatherer, promhttp.HandlerOpts{Timeout: ScrapeTimeout, MaxRequestsInFlight: 16}))
	mux.HandleFunc("GET /livez", health(cfg.Live))
	mux.HandleFunc("GET /readyz", health(cfg.Ready))
	mux.HandleFunc("GET /healthz", health(cfg.Ready))
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, cfg.Version) })
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "estran\n\n/metrics\n/livez\n/readyz?verbose\n/version\n")
	})
	return mux
}

// result is what a health path says as JSON.
type result struct {
	Status string        `json:"status"` // ok, degraded or failed
	Checks []checkResult `json:"checks"`
}

type checkResult struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Error    string `json:"error,omitempty"`
	Degraded bool   `json:"degraded,omitempty"`
}

func evaluate(checks []Check, exclude []string) (result, int) {
	res, code := result{Status: "ok", Checks: []checkResult{}}, http.StatusOK
	for _, c := range checks {
		if slices.Contains(exclude, c.Name) {
			continue
		}
		r := checkResult{Name: c.Name, OK: c.Err == nil}
		if c.Err != nil {
			r.Error, r.Degraded = c.Err.Error(), c.Degraded
			switch {
			case !c.Degraded:
				res.Status, code = "failed", http.StatusServiceUnavailable
			case res.Status == "ok":
				res.Status = "degraded"
			}
		}
		res.Checks = append(res.Checks, r)
	}
	return res, code
}

func health(checks func() []Check) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		res, code := evaluate(checks(), q["exclude"])
		if strings.Contains(r.Header.Get("Accept"), "application/json") {
			writeJSON(w, code, res)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(code)
		if q.Has("verbose") || code != http.StatusOK {
			for _, c := range res.Checks {
				if c.OK {
					fmt.Fprintf(w, "[+]%s ok\n", c.Name)
				} else {
					fmt.Fprintf(w, "[-]%s failed: %s\n", c.Name, c.Error)
				}
			}
		}
		fmt.Fprintln(w, res.Status)
	}
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // fails only if the client has gone
}
