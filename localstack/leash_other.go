//go:build !linux

package localstack

import "syscall"

// Leash are attributes of a process that this one starts: a terminal's signals do not reach it. That it ends with this one is Close's work alone here: the kernel does not see to it.
func Leash() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
