package record

import (
	"math/bits"
	"sync"
)

const (
	smallestBuffer = 12 // 2^12 bytes
	largestBuffer  = 23
)

// Buffers are pooled by size class, each twice the one before it.
var buffers [largestBuffer - smallestBuffer + 1]sync.Pool

func bufferClass(n int) int { return max(bits.Len(uint(max(n, 1)-1)), smallestBuffer) - smallestBuffer }

// GetBuffer returns n bytes of any content, with a capacity of up to twice that. More than 8 MiB are not pooled.
func GetBuffer(n int) []byte {
	k := bufferClass(n)
	if k >= len(buffers) {
		return make([]byte, n)
	}
	if b, ok := buffers[k].Get().(*[]byte); ok {
		return (*b)[:n]
	}
	return make([]byte, n, 1<<(smallestBuffer+k))
}

// PutBuffer gives a buffer of GetBuffer back: nothing may refer to its bytes any more.
func PutBuffer(b []byte) {
	k := bufferClass(cap(b))
	if k >= len(buffers) || cap(b) != 1<<(smallestBuffer+k) {
		return
	}
	poison(b[:cap(b)])
	b = b[:0]
	buffers[k].Put(&b)
}
