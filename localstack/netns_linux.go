package localstack

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Namespaces are network namespaces, one for each voter, joined by a bridge in this process's own, in which clients and the object store are: between voters there is the kernel's TCP and no proxy.
// Nothing leaves the machine, and nothing stays: no namespace has a name, each goes with the last process that has it, however that ends.
type Namespaces struct {
	ns    []*os.File // keep them, while no voter runs
	store *Network   // to what listens on this process's loopback
}

// Isolate gives this process a network of its own, in which there is loopback and nothing else. It replaces the process with itself, so it must be called before anything has begun, and
// returns only in one that is isolated, or with an error.
func Isolate() error {
	if slices.Contains(os.Environ(), isolated) {
		return commands("ip link set lo up")
	}
	if err := namespacesHere(); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // exec makes this thread the process, with what it has unshared
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("%w: unshare: %w", ErrNoNamespaces, err)
	}
	return unix.Exec(self, os.Args, append(os.Environ(), isolated))
}

func namespacesHere() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: that needs root", ErrNoNamespaces)
	}
	for _, tool := range []string{"ip", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: %w", ErrNoNamespaces, err)
		}
	}
	return nil
}

// The network of the bridge is one that is for tests of networks (RFC 2544). Every voter knows the others' hardware addresses and asks nobody. What is sent to lostMAC arrives at lostDevice, which counts
// it, and nowhere else.
const (
	bridgeHost = "198.18.0.1"
	lostMAC    = "02:00:00:00:00:fe"
	lostDevice = "estran-lost"
)

func (n *Namespaces) host(voter int) string { return fmt.Sprintf("198.18.0.%d", 10+voter) }
func macOf(voter int) string                { return fmt.Sprintf("02:00:00:00:00:%02x", 10+voter) }
func portOf(voter int) string               { return fmt.Sprintf("estran%d", voter) }

// enter is what a program's arguments are put behind to run in a voter's namespace.
func (n *Namespaces) enter(voter int) []string {
	return []string{"nsenter", fmt.Sprintf("--net=%s", n.path(voter))}
}

func (n *Namespaces) path(voter int) string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns[voter-1].Fd())
}

// NewNamespaces makes the namespaces of so many voters. The process must have been isolated.
func NewNamespaces(voters int) (_ *Namespaces, err error) {
	if err := namespacesHere(); err != nil {
		return nil, err
	}
	if !slices.Contains(os.Environ(), isolated) {
		return nil, fmt.Errorf("%w: this process has the machine's network", ErrNoNamespaces)
	}
	n := &Namespaces{store: NewNetwork()}
	n.store.host = bridgeHost
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrNoNamespaces, errors.Join(err, n.Close()))
		}
	}()
	if err := commands("ip link add br0 type bridge", "ip addr add "+bridgeHost+"/24 dev br0", "ip link set br0 up",
		"ip link add estran-sink type veth peer name "+lostDevice, "ip link set "+lostDevice+" address "+lostMAC, "ip link set estran-sink master br0 up", "ip link set "+lostDevice+" up"); err != nil {
		return nil, err
	}
	for i := 1; i <= voters; i++ {
		f, err := newNamespace()
		if err != nil {
			return nil, err
		}
		n.ns = append(n.ns, f)
		port := portOf(i)
		if err := commands("ip link add "+port+" type veth peer name eth0 address "+macOf(i)+" netns "+n.path(i), "ip link set "+port+" master br0 up"); err != nil {
			return nil, err
		}
		if err := n.in(i, "ip link set lo up", "ip addr add "+n.host(i)+"/24 dev eth0", "ip link set eth0 up"); err != nil {
			return nil, err
		}
	}
	return n, n.Heal()
}

// newNamespace makes a network namespace that lives as long as the file is open or a process has it.
func newNamespace() (*os.File, error) {
	type made struct {
		f   *os.File
		err error
	}
	ch := make(chan made)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- made{nil, fmt.Errorf("unshare: %w", err)}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ch <- made{f, err}
	}()
	m := <-ch
	return m.f, m.err
}

// commands runs commands, each in one line.
func commands(lines ...string) error {
	for _, line := range lines {
		args := strings.Fields(line)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("localstack: %s: %w: %s", line, err, out)
		}
	}
	return nil
}

// in runs commands in a voter's namespace.
func (n *Namespaces) in(voter int, lines ...string) error {
	enter := strings.Join(n.enter(voter), " ")
	for i := range lines {
		lines[i] = enter + " " + lines[i]
	}
	return commands(lines...)
}

// neighbour says where a voter sends what is for another.
func (n *Namespaces) neighbour(from, to int, mac string) error {
	return n.in(from, "ip neigh replace "+n.host(to)+" lladdr "+mac+" dev eth0 nud permanent")
}

// Forward returns an address at which voters reach what listens at target on this process's loopback.
func (n *Namespaces) Forward(target string) (addr string, err error) {
	return n.store.Proxy(0, 0, target)
}

// Cut loses what one voter sends to another from now on. Neither learns of it; clients and the object store are reached as before.
func (n *Namespaces) Cut(from, to int) error { return n.neighbour(from, to, lostMAC) }

// Unplug takes a voter's cable: it reaches nobody and nobody reaches it, clients and the object store neither.
func (n *Namespaces) Unplug(voter int) error {
	return commands("ip link set " + portOf(voter) + " down")
}

// Heal undoes every Cut and Unplug.
func (n *Namespaces) Heal() error {
	var errs []error
	for i := range n.ns {
		errs = append(errs, commands("ip link set "+portOf(i+1)+" up"))
		for j := range n.ns {
			if i != j {
				errs = append(errs, n.neighbour(i+1, j+1, macOf(j+1)))
			}
		}
	}
	return errors.Join(errs...)
}

// Lost counts the packets that were lost because of Cut.
func (n *Namespaces) Lost() (int, error) {
	out, err := exec.Command("ip", "-s", "-j", "link", "show", lostDevice).Output()
	if err != nil {
		return 0, fmt.Errorf("localstack: counting lost packets: %w", err)
	}
	var links []struct {
		Stats64 struct {
			RX struct{ Packets int }
		}
	}
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 {
		return 0, fmt.Errorf("localstack: counting lost packets: %q (%v)", out, err)
	}
	return links[0].Stats64.RX.Packets, nil
}

// Close takes everything away again. The voters must have ended.
func (n *Namespaces) Close() error {
	errs := []error{n.store.Close()}
	out, err := exec.Command("ip", "-o", "link", "show").Output()
	errs = append(errs, err)
	for _, dev := range append([]string{"br0", "estran-sink"}, portsOf(len(n.ns))...) {
		if strings.Contains(string(out), " "+dev+":") || strings.Contains(string(out), " "+dev+"@") {
			errs = append(errs, commands("ip link del "+dev))
		}
	}
	for _, f := range n.ns {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

func portsOf(voters int) (out []string) {
	for i := range voters + 1 { // the last may be half made
		out = append(out, portOf(i+1))
	}
	return out
}
