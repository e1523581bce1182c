package localstack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// ErrNoDisk: disk images cannot be mounted here; the text says why.
var ErrNoDisk = errors.New("localstack: no disks here")

// runTool runs a program that must not take long: nothing may hang the tests.
func runTool(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("localstack: %s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// MakeDisk writes the image of an empty ext4 file system of this size.
func MakeDisk(image string, size int64) error {
	if runtime.GOOS != "linux" {
		return fmt.Errorf("%w: they need Linux", ErrNoDisk)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: mounting an image needs root", ErrNoDisk)
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return fmt.Errorf("%w: %w", ErrNoDisk, err)
	}
	for _, tool := range []string{"mkfs.ext4", "mount", "umount"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: %w", ErrNoDisk, err)
		}
	}
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		return fmt.Errorf("localstack: %w", err)
	}
	return runTool("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
}

// MountDisk mounts an image at the directory dir, over a loop device that goes with UnmountDisk.
func MountDisk(image, dir string) error {
	if err := runTool("mount", "-o", "loop,noatime", image, dir); err != nil {
		return fmt.Errorf("%w: %w", ErrNoDisk, err)
	}
	return nil
}

// UnmountDisk undoes MountDisk. A disk that is busy goes when its last user does, and that is an error.
func UnmountDisk(dir string) error {
	if err := runTool("umount", dir); err != nil {
		return errors.Join(err, runTool("umount", "-l", dir))
	}
	return nil
}
