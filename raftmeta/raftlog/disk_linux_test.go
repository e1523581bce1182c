package raftlog

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/estran/estran/localstack"
)

const diskBytes = 64 << 20

// newDisk makes an ext4 image. The test is skipped where one cannot be mounted.
func newDisk(t *testing.T) (image string) {
	t.Helper()
	if testing.Short() {
		t.Skip("disks are left out with -short")
	}
	image = filepath.Join(t.TempDir(), "disk")
	must(t, localstack.MakeDisk(image, diskBytes))
	return image
}

func must(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, localstack.ErrNoDisk) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// mount mounts the image until the function that it returns is called, or the test ends.
func mount(t *testing.T, image string) (dir string, umount func()) {
	t.Helper()
	dir = t.TempDir()
	must(t, localstack.MountDisk(image, dir))
	umount = sync.OnceFunc(func() {
		if err := localstack.UnmountDisk(dir); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(umount)
	return dir, umount
}

// process is a writer process.
type process struct {
	cmd    *exec.Cmd
	events chan string // all that is no acknowledgement
	done   chan struct{}

	mu    sync.Mutex
	acked map[uint64]uint64 // index -> term
	more  chan struct{}     // one is in it when something was acknowledged
}

func startWriter(t *testing.T, dir string, term uint64, mode string) *process {
	t.Helper()
	p := &process{events: make(chan string, 1000), done: make(chan struct{}), acked: map[uint64]uint64{}, more: make(chan struct{}, 1)}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %s", writerEnv, dir, term, mode))
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		defer close(p.events)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			var what string
			var n uint64
			if _, err := fmt.Sscan(sc.Text(), &what, &n); err != nil {
				continue
			}
			if what != "acked" {
				p.events <- what
				continue
			}
			p.mu.Lock()
			p.acked[n] = term
			p.mu.Unlock()
			select {
			case p.more <- struct{}{}:
			default:
			}
		}
	}()
	t.Cleanup(func() { p.kill() })
	p.wait(t, "open")
	return p
}

func (p *process) wait(t *testing.T, event string) {
	t.Helper()
	limit := time.After(3 * time.Minute)
	for {
		select {
		case e, ok := <-p.events:
			if !ok {
				t.Fatalf("the writer ended before %q", event)
			}
			if e == event {
				return
			}
		case <-limit:
			t.Fatalf("the writer did not say %q", event)
		}
	}
}

// waitAcked waits for n more acknowledgements.
func (p *process) waitAcked(t *testing.T, n int) {
	t.Helper()
	count := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.acked)
	}
	limit := time.After(3 * time.Minute)
	for want := count() + n; count() < want; {
		select {
		case <-p.more:
		case <-p.done:
			t.Fatal("the writer ended")
		case <-limit:
			t.Fatal("nothing is acknowledged any more")
		}
	}
}

// stop holds the process: when it returns no thread of it runs.
func (p *process) stop(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(p.cmd.Process.Pid, &ws, syscall.WUNTRACED, nil); err != nil || !ws.Stopped() {
		t.Fatalf("stopping the writer: %v %x", err, ws)
	}
}

// kill ends the process and returns all that it has acknowledged.
func (p *process) kill() map[uint64]uint64 {
	_ = p.cmd.Process.Kill()
	<-p.done
	_ = p.cmd.Wait()
	return p.acked
}

// lose returns an image of the disk as a machine would find it that lost its power now: what was in the page cache only is gone. The
// process that writes is held, but the kernel may still write something back: two equal copies in a row are the disk at the instant
// between them.
func lose(t *testing.T, image string) (after string) {
	t.Helper()
	after = filepath.Join(t.TempDir(), "disk")
	var last []byte
	for range 50 {
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(b, last) {
			if err := os.WriteFile(after, b, 0o600); err != nil {
				t.Fatal(err)
			}
			return after
		}
		last = b
	}
	t.Fatal("the disk does not come to rest")
	return ""
}

func openDisk(t *testing.T, dir string) (*Log, error) {
	l, err := Open(Config{Dir: dir, Group: 7, FileBytes: 4 << 20, TailBytes: 1 << 20})
	if err == nil {
		t.Cleanup(func() { _ = l.Close() }) // before the disk goes
	}
	return l, err
}

// missing counts the acknowledged entries above the base that are not there; one that is there must be as it was.
func missing(t *testing.T, l *Log, acked map[uint64]uint64) (n int) {
	t.Helper()
	base, _ := l.Base()
	for i, term := range acked {
		if i <= base {
			continue
		}
		if !l.Holds(i, term) {
			n++
			continue
		}
		d, p := entryOf(i, term)
		same(t, l, command(i, term, d, p))
	}
	return n
}

// A file system of its own runs full: nothing acknowledged is lost, nothing is poisoned, and the log goes on by itself when somebody makes
// room. It is killed when the disk is full again; everything is there, and freeing makes room without anybody's doing.
func TestRealDiskFull(t *testing.T) {
	dir, _ := mount(t, newDisk(t))
	ballast := filepath.Join(dir, "ballast")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "other"), make([]byte, 24<<20), 0o600), os.WriteFile(ballast, make([]byte, 16<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "log")
	p := startWriter(t, data, 1, writeToFull)
	p.wait(t, "full")
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	p.wait(t, "space")
	p.waitAcked(t, 200) // more than fitted before
	p.wait(t, "full")
	acked := p.kill()

	l, err := openDisk(t, data)
	if err != nil {
		t.Fatal(err)
	}
	if n := missing(t, l, acked); n != 0 {
		t.Errorf("%d of %d acknowledged entries are not there", n, len(acked))
	}
	last, _ := l.LastIndex()
	t.Logf("%d acknowledged on a disk of %d MiB that ran full twice", len(acked), diskBytes>>20)
	l.Permit(last)
	for i := last + 1; i <= last+200; i++ { // up to 60 kB each: more than is free
		d, p := entryOf(i, 2)
		store(t, l, command(i, 2, d, p))
		l.Permit(i)
	}
	if l.Poisoned() != nil {
		t.Error(l.Poisoned())
	}
	if n := missing(t, l, map[uint64]uint64{last + 200: 2}); n != 0 {
		t.Error("the last entry is not there")
	}
}

// The power is cut while a process writes, twice in a row: after the file system's own recovery every acknowledged entry is there, as it
// was, and nothing is corrupt.
func TestPowerCut(t *testing.T) {
	image := newDisk(t)
	all := map[uint64]uint64{}
	for cut := uint64(1); cut <= 3; cut++ {
		dir, umount := mount(t, image)
		p := startWriter(t, filepath.Join(dir, "log"), cut, writeAndFree)
		p.waitAcked(t, 150/int(cut)) // fewer, so that entries of earlier lives are still above the base
		p.stop(t)
		image = lose(t, image)
		for i, term := range p.kill() {
			all[i] = term
		}
		umount()

		dir, umount = mount(t, image)
		l, err := openDisk(t, filepath.Join(dir, "log"))
		if err != nil {
			t.Fatalf("cut %d: %v", cut, err)
		}
		base, _ := l.Base()
		last, _ := l.LastIndex()
		t.Logf("cut %d: %d acknowledged, the log has %d to %d", cut, len(all), base+1, last)
		if n := missing(t, l, all); n != 0 {
			t.Errorf("cut %d: %d acknowledged entries are not there", cut, n)
		}
		if base == 0 {
			t.Errorf("cut %d: nothing was freed", cut)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		umount()
	}
}

// The test above can see: a log that does not sync loses what it has acknowledged.
func TestPowerCutSeesAMissingSync(t *testing.T) {
	image := newDisk(t)
	dir, umount := mount(t, image)
	p := startWriter(t, filepath.Join(dir, "log"), 1, writeLazily)
	p.waitAcked(t, 150)
	p.stop(t)
	image = lose(t, image)
	acked := p.kill()
	umount()
	dir, _ = mount(t, image)
	l, err := openDisk(t, filepath.Join(dir, "log"))
	if err != nil {
		return // damage that the log itself finds
	}
	if missing(t, l, acked) == 0 {
		t.Error("nothing was lost without fsync: the cut cuts nothing")
	}
}
