//go:build race

package record

// poison makes use after release visible in tests: the bytes of a buffer that is still referred to change.
func poison(b []byte) {
	for i := range b {
		b[i] = 0xdb
	}
}
