package localstack

import "testing"

// Ports that were given out come again only after all others of this process, so that one whose node is down for a moment is not taken by the next.
func TestPortsGoRound(t *testing.T) {
	seen := map[int]bool{}
	for range 40 {
		ports, err := FreePorts(5)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range ports {
			if seen[p] {
				t.Fatalf("port %d again after %d others", p, len(seen))
			}
			seen[p] = true
		}
	}
	if ports.mark == nil {
		t.Skip("there is no room for blocks here")
	}
	if l, err := listenLocal(ports.first); err == nil {
		l.Close()
		t.Error("another process can have the same block")
	}
}
