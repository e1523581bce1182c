package record

import "testing"

// What is given back is used again, and no more than keptMost waits for that.
func TestBuffers(t *testing.T) {
	b := GetBuffer(1 << 20)
	PutBuffer(b)
	if again := GetBuffer(1<<20 - 5); &again[0] != &b[0] || len(again) != 1<<20-5 {
		t.Error("a buffer that was given back is not used again")
	}
	for range 2 * keptMost >> 20 {
		PutBuffer(make([]byte, 1<<20))
	}
	kept.mu.Lock()
	defer kept.mu.Unlock()
	if n := len(kept.by[bufferClass(1<<20)]) << 20; n != keptMost {
		t.Errorf("%d bytes wait, at most %d should", n, keptMost)
	}
}
