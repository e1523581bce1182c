package record

import (
	"math/bits"
	"sync"
)

const (
	smallestBuffer = 12 // 2^12 bytes
	largestBuffer  = 23
)

// keptMost bounds the bytes of buffers of one size that wait to be used again: load of one kind uses two or three sizes.
const keptMost = 16 << 20

// kept are the buffers that wait, by size class, each twice the one before it. It is no sync.Pool: what that holds is gone after two collections, and under load these come several
// times a second.
var kept struct {
	mu sync.Mutex
	by [largestBuffer - smallestBuffer + 1][][]byte
}

func bufferClass(n int) int { return max(bits.Len(uint(max(n, 1)-1)), smallestBuffer) - smallestBuffer }

// GetBuffer returns n bytes of any content, with a capacity of up to twice that. More than 8 MiB are not pooled.
func GetBuffer(n int) []byte {
	k := bufferClass(n)
	if k >= len(kept.by) {
		return make([]byte, n)
	}
	kept.mu.Lock()
	if last := len(kept.by[k]) - 1; last >= 0 {
		b := kept.by[k][last]
		kept.by[k][last] = nil
		kept.by[k] = kept.by[k][:last]
		kept.mu.Unlock()
		return b[:n]
	}
	kept.mu.Unlock()
	return make([]byte, n, 1<<(smallestBuffer+k))
}

// PutBuffer gives a buffer of GetBuffer back: nothing may refer to its bytes any more.
func PutBuffer(b []byte) {
	k := bufferClass(cap(b))
	if k >= len(kept.by) || cap(b) != 1<<(smallestBuffer+k) {
		return
	}
	poison(b[:cap(b)])
	kept.mu.Lock()
	defer kept.mu.Unlock()
	if (len(kept.by[k])+1)*cap(b) <= keptMost { // else it is the collector's
		kept.by[k] = append(kept.by[k], b[:0])
	}
}
