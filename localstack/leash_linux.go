package localstack

import "syscall"

// leash: the process is killed when this one ends, however that happens, and a terminal's signals do not reach it.
func leash() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
