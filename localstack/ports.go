package localstack

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
)

func freePort() (int, error) {
	ports, err := FreePorts(1)
	if err != nil {
		return 0, err
	}
	return ports[0], nil
}

// ports are those that this process gives out: others that use this package have others, so that none takes what a node will listen on that is down for a moment.
var ports struct {
	mu          sync.Mutex
	mark        net.Listener // on the first of them, as long as the process lives
	first, next int
}

// portBlock is how many a process has; it goes round, so that one is given out again as late as possible.
const portBlock = 250

// FreePorts finds n ports of loopback on which nobody listens. They lie below those that the kernel gives to connections: one of these would take a port while the process that
// listened on it is down, or even connect to itself.
func FreePorts(n int) (out []int, err error) {
	ports.mu.Lock()
	defer ports.mu.Unlock()
	if err := claim(); err != nil {
		return nil, err
	}
	for tries := 0; len(out) < n; tries++ {
		port := 0 // any
		if ports.mark != nil {
			if tries > 2*portBlock {
				return nil, fmt.Errorf("localstack: %d free ports: %d to %d are taken", n, ports.first, ports.first+portBlock-1)
			}
			port = ports.first + 1 + ports.next
			ports.next = (ports.next + 1) % (portBlock - 1)
		}
		l, err := listenLocal(port)
		if err != nil && port == 0 {
			return nil, fmt.Errorf("localstack: a free port: %w", err)
		}
		if err == nil {
			defer l.Close() // not before all are chosen: each is another
			out = append(out, l.Addr().(*net.TCPAddr).Port)
		}
	}
	return out, nil
}

// claim takes a block that no other process has. Where there is no room for blocks there is none.
func claim() error {
	first, last := listenRange()
	blocks := (last - first) / portBlock
	if ports.mark != nil || blocks < 4 {
		return nil
	}
	for tries := 0; ; tries++ {
		at := first + rand.IntN(blocks)*portBlock
		l, err := listenLocal(at)
		if err == nil {
			ports.mark, ports.first = l, at
			return nil
		}
		if tries == 10*blocks {
			return fmt.Errorf("localstack: no block of %d ports is free: %w", portBlock, err)
		}
	}
}

func listenLocal(port int) (net.Listener, error) {
	return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

// listenRange is where ports are chosen: those below last are not given to connections.
func listenRange() (first, last int) {
	first, last = 10000, 49152 // IANA's, which macOS follows
	var low, high int
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if _, err := fmt.Sscan(string(b), &low, &high); err == nil {
			last = low
		}
	}
	return first, last
}
