// Package admin serves the HTTP side of a node: metrics, liveness, readiness and version. It knows no Kafka protocol and no
// storage; what it reports comes from small functions that the composition root gives it.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
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
	// Cluster is encoded as JSON at /v1/cluster; nil = there is none.
	Cluster func(ctx context.Context) any
	// Commands are done by POST of JSON to /v1/cluster/NAME. An error that is ErrRefused gets 409, any other 503.
	Commands map[string]func(ctx context.Context, body []byte) error
}

// ErrRefused: the command cannot be done, and trying again will not help.
var ErrRefused = errors.New("refused")

const (
	commandMax  = 64 << 10
	commandTime = 30 * time.Second
)

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
	if cfg.Cluster != nil {
		mux.HandleFunc("GET /v1/cluster", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, http.StatusOK, cfg.Cluster(r.Context())) })
	}
	for name, do := range cfg.Commands {
		mux.HandleFunc("POST /v1/cluster/"+name, command(do))
	}
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "estran\n\n/metrics\n/livez\n/readyz?verbose\n/version\n/v1/cluster\n")
	})
	return mux
}

type commandResult struct {
	Error string `json:"error,omitempty"`
}

// command does what is posted. It wants JSON, which a page of another site cannot post without being asked for leave.
func command(do func(context.Context, []byte) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
			writeJSON(w, http.StatusUnsupportedMediaType, commandResult{"the body must be application/json"})
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, commandMax))
		if err != nil {
			writeJSON(w, http.StatusRequestEntityTooLarge, commandResult{err.Error()})
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), commandTime)
		defer cancel()
		switch err := do(ctx, body); {
		case errors.Is(err, ErrRefused):
			writeJSON(w, http.StatusConflict, commandResult{err.Error()})
		case err != nil:
			writeJSON(w, http.StatusServiceUnavailable, commandResult{err.Error()})
		default:
			writeJSON(w, http.StatusOK, commandResult{})
		}
	}
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
