package admin

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func get(t *testing.T, h http.Handler, path, accept string) (int, string) {
	t.Helper()
	req := httptest.NewRequest("GET", path, nil)
	req.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	body, _ := io.ReadAll(w.Body)
	return w.Code, string(body)
}

func TestHealth(t *testing.T) {
	checks := []Check{{Name: "leader"}, {Name: "store"}}
	h := Handler(Config{Gatherer: prometheus.NewRegistry(), Live: func() []Check { return nil },
		Ready: func() []Check { return checks }, Version: map[string]string{"version": "v1"}})
	for _, c := range []struct {
		name           string
		checks         []Check
		path           string
		code           int
		want, unwanted string
	}{
		{"all hold", []Check{{Name: "leader"}}, "/readyz", 200, "ok\n", "leader"},
		{"verbose", []Check{{Name: "leader"}}, "/readyz?verbose", 200, "[+]leader ok", "[-]"},
		{"one fails", []Check{{Name: "leader", Err: errors.New("none known")}}, "/readyz", 503, "[-]leader failed: none known", "ok\n"},
		{"degraded stays ready", []Check{{Name: "store", Err: errors.New("refused"), Degraded: true}}, "/readyz", 200, "degraded\n", ""},
		{"failed beats degraded", []Check{{Name: "leader", Err: errors.New("x")}, {Name: "store", Err: errors.New("y"), Degraded: true}}, "/healthz", 503, "failed\n", ""},
		{"excluded", []Check{{Name: "leader", Err: errors.New("x")}}, "/readyz?exclude=leader", 200, "ok\n", "leader"},
		{"liveness ignores readiness", []Check{{Name: "leader", Err: errors.New("x")}}, "/livez", 200, "ok\n", ""},
	} {
		checks = c.checks
		code, body := get(t, h, c.path, "")
		if code != c.code || !strings.Contains(body, c.want) || (c.unwanted != "" && strings.Contains(body, c.unwanted)) {
			t.Errorf("%s: got %d %q, want %d with %q and without %q", c.name, code, body, c.code, c.want, c.unwanted)
		}
	}
	checks = []Check{{Name: "leader", Err: errors.New("none")}}
	code, body := get(t, h, "/readyz", "application/json")
	var res result
	if err := json.Unmarshal([]byte(body), &res); err != nil || code != 503 || res.Status != "failed" || res.Checks[0].Error != "none" {
		t.Errorf("JSON: %d %s %v", code, body, err)
	}
	if _, body := get(t, h, "/version", ""); !strings.Contains(body, `"v1"`) {
		t.Errorf("/version: %s", body)
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "estran_test_total", Help: "x"})
	reg.MustRegister(c)
	c.Add(3)
	h := Handler(Config{Gatherer: reg, Live: func() []Check { return nil }, Ready: func() []Check { return nil }})
	if code, body := get(t, h, "/metrics", ""); code != 200 || !strings.Contains(body, "estran_test_total 3") {
		t.Errorf("/metrics: %d %s", code, body)
	}
	if code, _ := get(t, h, "/nothing", ""); code != 404 {
		t.Errorf("unknown path: %d, want 404", code)
	}
}
