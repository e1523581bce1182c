//go:build planted

package planted

import (
	"testing"
	"time"
)

// A wrong clock differs in its wall time alone: what passes between two readings is right.
func TestWrongClock(t *testing.T) {
	defer wrong.Store(0)
	for _, by := range []time.Duration{0, time.Hour, -time.Hour, 3650 * 24 * time.Hour, -3650 * 24 * time.Hour} {
		before, truth := Now(), time.Now()
		wrong.Store(int64(by / time.Second))
		after := Now()
		if d := after.Sub(before); d < 0 || d > time.Minute {
			t.Errorf("%v: %v have passed", by, d)
		}
		if d := after.Round(0).Sub(truth.Round(0)) - by; d < 0 || d > time.Minute {
			t.Errorf("%v: wrong by %v more", by, d)
		}
		wrong.Store(0)
	}
}
