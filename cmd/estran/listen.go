package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// listen opens a TCP listener for a setting. The error names the address, the setting and, where it can be seen, who holds the
// port.
func listen(cfg *config, key, flag string) (net.Listener, error) {
	addr := ""
	for _, s := range settingsOf(cfg) {
		if s.key == key {
			addr = s.value.String()
		}
	}
	l, err := net.Listen("tcp", addr)
	if err == nil {
		return l, nil
	}
	f := &fault{Code: "E_LISTEN", What: fmt.Sprintf("cannot listen on %s (%s, from %s): %v", addr, key, cfg.from(key), listenCause(err)), Err: err,
		Fix: fmt.Sprintf("%s HOST:PORT   or set %s", flag, key)}
	if errors.Is(err, syscall.EADDRINUSE) {
		f.Code = "E_LISTEN_IN_USE"
		if who := holderOf(addr); who != "" {
			f.Notes = append(f.Notes, note{"held by", who})
		}
	}
	return nil, f
}

func listenCause(err error) error {
	if e, ok := errors.AsType[*os.SyscallError](err); ok {
		return e.Err
	}
	return err
}

// holderOf finds the process of the same user that listens on addr's port, by procfs; "" if it cannot be seen.
func holderOf(addr string) string {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return ""
	}
	inodes := map[string]bool{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		data, _ := os.ReadFile(table)
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			if len(f) > 9 && f[3] == "0A" && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", n)) {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	if len(inodes) == 0 {
		return ""
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && inodes[target] {
			pid := strings.Split(fd, "/")[2]
			name, _ := os.ReadFile("/proc/" + pid + "/comm")
			return fmt.Sprintf("pid %s (%s)", pid, strings.TrimSpace(string(name)))
		}
	}
	return ""
}
