package broker

import (
	"fmt"
	"testing"

	"github.com/estran/estran/raftmeta"
)

// A request whose time is over while there is no leader says that its time is over: what it was sent to leads nothing that the client could look for.
func TestTimeoutIsSaid(t *testing.T) {
	if c := codeOf(fmt.Errorf("%w: %w", raftmeta.ErrTimeout, raftmeta.ErrNotLeader)); c != codeRequestTimedOut {
		t.Errorf("code %d", c)
	}
	if c := codeOf(raftmeta.ErrNotLeader); c != codeNotLeaderOrFollower {
		t.Errorf("code %d", c)
	}
}
