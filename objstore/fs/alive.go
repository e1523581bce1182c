package fs

import (
	"errors"
	"os"
	"strconv"
	"syscall"
)

// alive reports whether a process of this machine has the ID; its unfinished files are then left alone.
func alive(pid string) bool {
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 0 {
		return false
	}
	if n == os.Getpid() {
		return false // ours from an earlier life with the same ID: nothing of this one is open yet
	}
	p, err := os.FindProcess(n)
	if err != nil {
		return false
	}
	err = p.Signal(syscall.Signal(0))
	return err == nil || errors.Is(err, syscall.EPERM)
}
