//go:build !linux

package localstack

import "syscall"

// leash: a terminal's signals do not reach the process. That it ends with this one is Close's work alone here: the kernel does not see to it.
func leash() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
