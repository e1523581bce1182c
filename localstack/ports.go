package localstack

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
)

func freePort() (int, error) {
	ports, err := FreePorts(1)
	if err != nil {
		return 0, err
	}
	return ports[0], nil
}

// FreePorts finds n ports of loopback on which nobody listens. They lie below those that the kernel gives to connections: one of these would take a port while the process that
// listened on it is down, or even connect to itself.
func FreePorts(n int) (out []int, err error) {
	first, last := listenRange()
	for tries := 0; len(out) < n; tries++ {
		port := 0 // any
		if last-first > 1000 && tries < 1000 {
			port = first + rand.IntN(last-first)
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
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
