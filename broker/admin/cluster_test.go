package admin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// A command is done for JSON only, its errors say whether trying again may help, and its body is bounded.
func TestClusterCommands(t *testing.T) {
	var got string
	var fail error
	h := Handler(Config{Gatherer: prometheus.NewRegistry(), Live: func() []Check { return nil }, Ready: func() []Check { return nil },
		Cluster:  func(context.Context) any { return map[string]int{"members": 3} },
		Commands: map[string]func(context.Context, []byte) error{"drain": func(_ context.Context, b []byte) error { got = string(b); return fail }}})
	do := func(method, path, contentType, body string) (int, string) {
		r := httptest.NewRequest(method, path, strings.NewReader(body))
		r.Header.Set("Content-Type", contentType)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code, strings.TrimSpace(w.Body.String())
	}
	if code, body := do(http.MethodGet, "/v1/cluster", "", ""); code != 200 || body != `{"members":3}` {
		t.Errorf("status: %d %s", code, body)
	}
	if code, _ := do(http.MethodPost, "/v1/cluster/drain", "text/plain", "x"); code != http.StatusUnsupportedMediaType || got != "" {
		t.Errorf("a form of another site: %d, did %q", code, got)
	}
	if code, _ := do(http.MethodPost, "/v1/cluster/drain", "application/json", strings.Repeat("x", commandMax+1)); code != http.StatusRequestEntityTooLarge || got != "" {
		t.Errorf("too much: %d", code)
	}
	if code, body := do(http.MethodPost, "/v1/cluster/drain", "application/json; charset=utf-8", "{}"); code != 200 || body != "{}" || got != "{}" {
		t.Errorf("done: %d %s, did %q", code, body, got)
	}
	fail = fmt.Errorf("%w: no", ErrRefused)
	if code, body := do(http.MethodPost, "/v1/cluster/drain", "application/json", "{}"); code != http.StatusConflict || body != `{"error":"refused: no"}` {
		t.Errorf("refused: %d %s", code, body)
	}
	fail = errors.New("later")
	if code, _ := do(http.MethodPost, "/v1/cluster/drain", "application/json", "{}"); code != http.StatusServiceUnavailable {
		t.Errorf("failed: %d", code)
	}
	if code, _ := do(http.MethodPost, "/v1/cluster/other", "application/json", "{}"); code != http.StatusNotFound && code != http.StatusMethodNotAllowed {
		t.Errorf("no such command: %d", code)
	}
}
