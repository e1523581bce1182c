package localstack

import "syscall"

// Leash are attributes of a process that this one starts: it is killed when this one ends, however that happens, and a terminal's signals do not reach it.
func Leash() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
