package localstack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// Cluster is voters that run as processes of this machine; all that they write is below one directory, the objects too. The processes end with this one (on Linux even if it is
// killed), and keep their addresses when they are started again.
type Cluster struct {
	Nodes   []*Node  // the voters 1, 2, …; known after Start
	Objects string   // directory of the store that they share
	Storage string   // URL of another store; "" = Objects
	Network *Network // that they reach one another through; nil = directly
	// Namespaces give each a network of its own; nil = they share this process's.
	Namespaces *Namespaces
	Disks      int64 // size of a disk of its own for each voter (MakeDisk); 0 = they share the machine's

	program, dir string
	size         int
	env          []string
	ports        func(int) ([]int, error)
	logs         []*os.File
}

// NewCluster describes voters with everything below dir; none is started. env is added to the environment of each.
func NewCluster(program, dir string, size int, env ...string) *Cluster {
	return &Cluster{Objects: filepath.Join(dir, "objects"), program: program, dir: dir, size: size, env: env, ports: FreePorts}
}

// portAttempts is how often a cluster begins anew because another program took a port that was free.
const portAttempts = 5

// Start starts all voters at once and returns when all serve; on an error none is left.
func (c *Cluster) Start(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		err := c.begin(ctx)
		if err == nil {
			return nil
		}
		if err = errors.Join(err, c.Close()); attempt == portAttempts || !strings.Contains(err.Error(), "E_LISTEN_IN_USE") {
			return err
		}
	}
}

func (c *Cluster) begin(ctx context.Context) error {
	ports, err := c.ports(3 * c.size)
	if err != nil {
		return err
	}
	if err := c.describe(ports); err != nil {
		return err
	}
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var wg sync.WaitGroup
	for i, n := range c.Nodes {
		wg.Go(func() {
			if err := n.Start(ctx); err != nil {
				fail(fmt.Errorf("voter %d: %w", i+1, err)) // the others wait for it in vain
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// describe makes nodes that are not started, with directories that are empty: what an attempt before has left knows other addresses.
func (c *Cluster) describe(ports []int) error {
	c.Nodes = nil
	address := func(i int) string {
		host := "127.0.0.1"
		if c.Namespaces != nil {
			host = c.Namespaces.host(i/3 + 1)
		}
		return fmt.Sprintf("%s:%d", host, ports[i])
	}
	env := slices.Clone(c.env)
	if c.Namespaces != nil { // their peers' listeners are not on loopback
		secret := filepath.Join(c.dir, "secret")
		if err := os.WriteFile(secret, []byte("the secret of these voters"), 0o600); err != nil {
			return fmt.Errorf("localstack: %w", err)
		}
		env = append(env, "ESTRAN_QUORUM_SECRET_FILE="+secret)
	}
	storage := cmp.Or(c.Storage, "file://"+filepath.ToSlash(c.Objects))
	if err := errors.Join(os.RemoveAll(c.Objects), os.MkdirAll(c.Objects, 0o755)); err != nil {
		return fmt.Errorf("localstack: %w", err)
	}
	for i := range c.size {
		dir := filepath.Join(c.dir, fmt.Sprintf("voter-%d", i+1))
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("localstack: %w", err)
		}
		log, err := os.OpenFile(dir+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("localstack: %w", err)
		}
		c.logs = append(c.logs, log)
		voters, err := c.voters(i, address)
		if err != nil {
			return err
		}
		data, disk := dir, ""
		if c.Disks > 0 {
			if err := c.addDisk(dir); err != nil {
				return err
			}
			data, disk = filepath.Join(dir, "data"), dir
		}
		n := NewNode(c.program, data, append([]string{"ESTRAN_STORAGE_URL=" + storage, "ESTRAN_QUORUM_VOTERS=" + strings.Join(voters, ","),
			fmt.Sprint("ESTRAN_NODE_ID=", i+1)}, env...))
		n.Peer, n.Kafka, n.http, n.attr = address(3*i), address(3*i+1), address(3*i+2), Leash()
		n.Disk = disk
		if c.Namespaces != nil {
			n.enter = c.Namespaces.enter(i + 1)
		}
		n.Log = func(line string) { fmt.Fprintln(log, line) } // a log that cannot be written is no reason to end
		c.Nodes = append(c.Nodes, n)
	}
	return nil
}

func (c *Cluster) addDisk(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("localstack: %w", err)
	}
	if err := MakeDisk(image(dir), c.Disks); err != nil {
		return err
	}
	return MountDisk(image(dir), dir)
}

// image is the file behind the disk at dir.
func image(dir string) string { return dir + ".disk" }

// CutPower takes the power from voters that have disks: what they have not synced is lost. It returns when all have ended and their disks are mounted again.
func (c *Cluster) CutPower(nodes ...*Node) error {
	var errs []error
	for _, n := range nodes {
		if n.Disk == "" {
			return fmt.Errorf("%w: this voter has none of its own", ErrNoDisk)
		}
		if n.Alive() { // nobody sees the power go: a process that went on would only meet a disk that fails
			_ = syscall.Kill(n.PID, syscall.SIGSTOP) // one that ends just now meets nothing either
		}
	}
	for _, n := range nodes {
		errs = append(errs, shutDisk(n.Disk)) // all before any process ends: those that live on may not learn of it first
	}
	for _, n := range nodes {
		errs = append(errs, n.Kill())
	}
	for _, n := range nodes {
		if err := UnmountDisk(n.Disk); err != nil {
			errs = append(errs, err) // mounted twice it would be destroyed
			continue
		}
		errs = append(errs, MountDisk(image(n.Disk), n.Disk))
	}
	return errors.Join(errs...)
}

// voters are all as one of them reaches them.
func (c *Cluster) voters(from int, address func(int) string) (out []string, err error) {
	for i := range c.size {
		addr := address(3 * i)
		if c.Network != nil && i != from {
			if addr, err = c.Network.Proxy(from+1, i+1, addr); err != nil {
				return nil, err
			}
		}
		out = append(out, fmt.Sprintf("%d@%s", i+1, addr))
	}
	return out, nil
}

// Said counts a text in what all voters have written since they were described.
func (c *Cluster) Said(text string) (n int) {
	for _, f := range c.logs {
		b, err := os.ReadFile(f.Name())
		if err == nil {
			n += strings.Count(string(b), text)
		}
	}
	return n
}

// After returns up to n bytes that voters have written from each place of a text on.
func (c *Cluster) After(text string, n int) (out []string) {
	for _, f := range c.logs {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			continue
		}
		for s := string(b); ; {
			at := strings.Index(s, text)
			if at < 0 {
				break
			}
			out = append(out, s[at:min(len(s), at+n)])
			s = s[at+len(text):]
		}
	}
	return out
}

// Keep ends all voters, who write what each of their goroutines does, and copies all that each has written to a file in dir.
func (c *Cluster) Keep(dir string) error {
	var errs []error
	for i, n := range c.Nodes {
		errs = append(errs, n.end(syscall.SIGQUIT))
		b, err := os.ReadFile(c.logs[i].Name())
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("voter-%d.log", i+1)), b, 0o600)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Close kills what runs and waits for it.
func (c *Cluster) Close() error {
	var errs []error
	for _, n := range c.Nodes {
		errs = append(errs, n.Kill())
		if n.Disk != "" {
			errs = append(errs, UnmountDisk(n.Disk), os.Remove(image(n.Disk)))
			n.Disk = ""
		}
	}
	for _, f := range c.logs {
		errs = append(errs, f.Close())
	}
	c.logs = nil
	return errors.Join(errs...)
}
