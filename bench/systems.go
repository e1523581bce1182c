package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/estran/estran/localstack"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// The systems. Kafka is measured as shipped, when an acknowledgement means "in the page cache of the in-sync replicas", and with an fsync before each, which is what Estran promises.
const (
	estran     = "estran"
	kafka      = "kafka"
	kafkaFsync = "kafka-fsync"
)

// server is a node of a cluster.
type server interface {
	Start(context.Context) error // again on the same address with the same data
	Kill() error
	Stop() error
	pid() int
	seed() string
}

// cluster is a system that runs on this machine.
type cluster struct {
	system  string
	servers []server
	voters  *localstack.Cluster // Estran's
	dirs    []string            // to be removed
	closing []func() error
}

// paths is where a cluster's data lie: on the disk, and on tmpfs.
type paths struct{ logs, store string }

// setup is what a cluster is made of beside the defaults.
type setup struct {
	env   []string                  // of voters
	store string                    // "" = file:// on tmpfs, "s3" = the double, "s3-slow" = the double that takes as long as S3, "minio" = MinIO on the disk
	delay time.Duration             // each way between voters
	jars  string                    // Kafka's
	tmp   func() (p paths, _ error) // makes new directories

}

type voter struct{ *localstack.Node }

func (v voter) pid() int     { return v.PID }
func (v voter) seed() string { return v.Kafka }

// startCluster starts a system on so many nodes and returns when the first record has been acknowledged, and how long that took. The cluster must be closed, also after an error.
func startCluster(ctx context.Context, system string, nodes int, program string, s setup) (c *cluster, took time.Duration, err error) {
	c = &cluster{system: system}
	p, err := s.tmp()
	if err != nil {
		return c, 0, err
	}
	c.dirs = []string{p.logs, p.store}
	if system == estran {
		if err := c.describeVoters(ctx, nodes, program, p, s); err != nil {
			return c, 0, err
		}
		began := time.Now()
		if err := c.voters.Start(ctx); err != nil {
			return c, 0, err
		}
		for _, n := range c.voters.Nodes {
			c.servers = append(c.servers, voter{n})
		}
		err = c.first(ctx)
		return c, time.Since(began), err
	}
	if err := c.describeKafka(ctx, nodes, p, s); err != nil {
		return c, 0, err
	}
	took, err = c.start(ctx)
	return c, took, err
}

func (c *cluster) describeVoters(ctx context.Context, nodes int, program string, p paths, s setup) error {
	env, url := s.env, "file://"+p.store
	switch s.store {
	case "minio":
		m, err := localstack.StartMinIO(ctx, filepath.Join(p.logs, "minio"), false)
		if err != nil {
			return err
		}
		c.closing = append(c.closing, m.Kill)
		env, url = append(env, m.Env()...), m.URL("bench")
		doctor := exec.CommandContext(ctx, program, "doctor", "--create-bucket")
		doctor.Env = append(append(os.Environ(), m.Env()...), "ESTRAN_STORAGE_URL="+url)
		if out, err := doctor.CombinedOutput(); err != nil {
			return fmt.Errorf("the bucket: %w\n%s", err, out)
		}
	case "s3", "s3-slow":
		d, err := startDouble(ctx, s.store == "s3-slow")
		if err != nil {
			return err
		}
		c.closing = append(c.closing, d.close)
		env, url = append(env, d.env...), d.url
	}
	c.voters = localstack.NewCluster(program, p.logs, nodes, env...)
	c.voters.Objects = p.store
	if s.store != "" {
		c.voters.Storage = url
	}
	if s.delay > 0 {
		n := localstack.NewNetwork()
		for from := 1; from <= nodes; from++ {
			for to := 1; to <= nodes; to++ {
				n.Delay(from, to, s.delay)
			}
		}
		c.voters.Network = n
		c.closing = append(c.closing, n.Close)
	}
	return nil
}

// start starts all nodes at once and returns when a record has been acknowledged.
func (c *cluster) start(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	errs := make([]error, len(c.servers))
	var wg sync.WaitGroup
	for i, s := range c.servers {
		wg.Go(func() { errs[i] = s.Start(ctx) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	err := c.first(ctx)
	return time.Since(began), err
}

func (c *cluster) each(f func(server) error) error {
	errs := make([]error, len(c.servers))
	var wg sync.WaitGroup
	for i, s := range c.servers {
		wg.Go(func() { errs[i] = f(s) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// keepLogs copies what the nodes have written, after a run that failed.
func (c *cluster) keepLogs(to string) error {
	var logs []string
	for _, d := range c.dirs {
		for _, pattern := range []string{"*.log", "*/log"} {
			found, err := filepath.Glob(filepath.Join(d, pattern))
			if err != nil {
				return err
			}
			logs = append(logs, found...)
		}
	}
	for _, path := range logs {
		b, err := os.ReadFile(path)
		if err == nil {
			rel := strings.ReplaceAll(strings.TrimPrefix(path, filepath.Dir(c.dirs[0])+"/"), "/", "-")
			err = os.WriteFile(filepath.Join(to, strings.TrimSuffix(rel, ".log")+".log"), b, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// close ends everything and removes the data.
func (c *cluster) close() error {
	var errs []error
	if c.voters != nil {
		errs = append(errs, c.voters.Close())
	} else {
		errs = append(errs, c.each(server.Kill))
	}
	for _, f := range c.closing {
		errs = append(errs, f())
	}
	for _, d := range c.dirs {
		errs = append(errs, os.RemoveAll(d))
	}
	return errors.Join(errs...)
}

func (c *cluster) seeds() (out []string) {
	for _, s := range c.servers {
		out = append(out, s.seed())
	}
	return out
}

// first returns when a record has been acknowledged: a client comes again every few milliseconds.
func (c *cluster) first(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var last error
	for ctx.Err() == nil {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := c.one(try)
		cancel()
		if err == nil {
			return nil
		}
		last = err
		time.Sleep(2 * time.Millisecond)
	}
	return fmt.Errorf("%s acknowledged nothing: %w: %w", c.system, ctx.Err(), last)
}

func (c *cluster) one(ctx context.Context) error {
	cl, err := kgo.NewClient(kgo.SeedBrokers(c.seeds()...), kgo.DefaultProduceTopic("first"), kgo.ProducerLinger(0), kgo.MetadataMinAge(10*time.Millisecond),
		kgo.RetryBackoffFn(func(int) time.Duration { return 5 * time.Millisecond }))
	if err != nil {
		return err
	}
	defer cl.Close()
	adm := kadm.NewClient(cl)
	t, err := adm.ListTopics(ctx, "first")
	if err != nil {
		return err
	}
	if !t.Has("first") {
		if r, err := adm.CreateTopic(ctx, 1, int16(len(c.servers)), nil, "first"); err != nil || r.Err != nil {
			return errors.Join(err, r.Err)
		}
	}
	return cl.ProduceSync(ctx, &kgo.Record{Value: []byte("first")}).FirstErr()
}

// broker is a node of Kafka: broker and controller in one process, with the options of Kafka's own start script.
type broker struct {
	dir, jars string
	port      int
	cmd       *exec.Cmd
	done      chan struct{}
}

func java(jars string, args ...string) *exec.Cmd {
	cmd := exec.Command("java", append([]string{"-Xmx1g", "-Xms1g", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35",
		"-XX:+ExplicitGCInvokesConcurrent", "-Djava.awt.headless=true", "-cp", filepath.Join(jars, "*")}, args...)...)
	cmd.SysProcAttr = localstack.Leash()
	return cmd
}

// properties are the settings of node i of a cluster whose brokers and controllers have these ports.
func properties(i int, dir string, brokers, controllers []int, fsync bool) string {
	var voters []string
	for k, p := range controllers {
		voters = append(voters, fmt.Sprintf("%d@127.0.0.1:%d", k+1, p))
	}
	rf := len(brokers)
	isr := (rf + 1) / 2
	lines := []string{"process.roles=broker,controller", fmt.Sprint("node.id=", i+1), "controller.quorum.voters=" + strings.Join(voters, ","),
		fmt.Sprintf("listeners=PLAINTEXT://127.0.0.1:%d,CONTROLLER://127.0.0.1:%d", brokers[i], controllers[i]), fmt.Sprintf("advertised.listeners=PLAINTEXT://127.0.0.1:%d", brokers[i]),
		"controller.listener.names=CONTROLLER", "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT", "log.dirs=" + filepath.Join(dir, "data"),
		fmt.Sprint("offsets.topic.replication.factor=", rf), fmt.Sprint("transaction.state.log.replication.factor=", rf), fmt.Sprint("transaction.state.log.min.isr=", isr),
		fmt.Sprint("share.coordinator.state.topic.replication.factor=", rf), fmt.Sprint("share.coordinator.state.topic.min.isr=", isr), fmt.Sprint("min.insync.replicas=", isr),
		"group.initial.rebalance.delay.ms=0"}
	if fsync {
		lines = append(lines, "log.flush.interval.messages=1")
	}
	return strings.Join(lines, "\n") + "\n"
}

func (c *cluster) describeKafka(ctx context.Context, nodes int, p paths, s setup) error {
	ports, err := localstack.FreePorts(2 * nodes)
	if err != nil {
		return err
	}
	for i := range nodes {
		b := &broker{dir: filepath.Join(p.logs, fmt.Sprint("node-", i+1)), jars: s.jars, port: ports[i]}
		if err := os.MkdirAll(b.dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(b.config(), []byte(properties(i, b.dir, ports[:nodes], ports[nodes:], c.system == kafkaFsync)), 0o600); err != nil {
			return err
		}
		c.servers = append(c.servers, b)
	}
	return c.each(func(s server) error {
		b := s.(*broker)
		cmd := java(b.jars, "kafka.tools.StorageTool", "format", "-t", "AAAAAAAAAAAAAAAAAAAAAA", "-c", b.config())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("formatting a node of Kafka: %w\n%s", err, out)
		}
		return ctx.Err()
	})
}

func (b *broker) config() string { return filepath.Join(b.dir, "server.properties") }

// Start starts the process; that it serves is seen by asking it.
func (b *broker) Start(context.Context) error {
	out, err := os.OpenFile(filepath.Join(b.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	cmd := java(b.jars, "kafka.Kafka", b.config())
	cmd.Stdout, cmd.Stderr = out, out
	if err := errors.Join(cmd.Start(), out.Close()); err != nil { // the process has it open itself
		return err
	}
	done := make(chan struct{})
	b.cmd, b.done = cmd, done
	go func() { // until the process ends
		_ = cmd.Wait()
		close(done)
	}()
	return nil
}

func (b *broker) Kill() error { return b.end(syscall.SIGKILL) }
func (b *broker) Stop() error { return b.end(syscall.SIGTERM) }

func (b *broker) end(sig syscall.Signal) error {
	if b.cmd == nil {
		return nil
	}
	if err := b.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-b.done:
		return nil
	case <-time.After(time.Minute):
		_ = b.cmd.Process.Kill() // it may just have ended
		<-b.done
		return errors.New("a node of Kafka did not end within a minute")
	}
}

func (b *broker) pid() int     { return b.cmd.Process.Pid }
func (b *broker) seed() string { return fmt.Sprintf("127.0.0.1:%d", b.port) }
