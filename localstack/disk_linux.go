package localstack

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Requests to a mounted file system. The kernel's headers have them; x/sys/unix does not.
const (
	ioctlShutdown = 0x8004587d // FS_IOC_SHUTDOWN
	ioctlFreeze   = 0xc0045877 // FIFREEZE
	ioctlThaw     = 0xc0045878 // FITHAW
	noLogFlush    = 2          // of FS_IOC_SHUTDOWN: what is only in memory is lost, the journal's too
)

func diskIoctl(dir string, request uint, arg int) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("localstack: %w", err)
	}
	defer d.Close()
	if err := unix.IoctlSetPointerInt(int(d.Fd()), request, arg); err != nil {
		return fmt.Errorf("localstack: ioctl %#x of the disk at %s: %w", request, dir, err)
	}
	return nil
}

// shutDisk cuts a mounted disk's power: from now on every call fails, and what was not synced is gone when it is mounted again.
func shutDisk(dir string) error { return diskIoctl(dir, ioctlShutdown, noLogFlush) }

// FreezeDisk stops everything that is written to the disk at dir until ThawDisk. Who writes cannot be killed meanwhile.
func FreezeDisk(dir string) error { return diskIoctl(dir, ioctlFreeze, 0) }

// ThawDisk undoes FreezeDisk.
func ThawDisk(dir string) error { return diskIoctl(dir, ioctlThaw, 0) }
