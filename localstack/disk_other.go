//go:build !linux

package localstack

func shutDisk(string) error { return ErrNoDisk }

// FreezeDisk is impossible here.
func FreezeDisk(string) error { return ErrNoDisk }

// ThawDisk is impossible here.
func ThawDisk(string) error { return ErrNoDisk }
