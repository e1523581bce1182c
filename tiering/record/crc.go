package record

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC returns the CRC32C (Castagnoli) of b, the checksum of Kafka's batches and of everything Estran writes.
func CRC(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// UpdateCRC returns the CRC32C of the bytes behind crc followed by b.
func UpdateCRC(crc uint32, b []byte) uint32 { return crc32.Update(crc, castagnoli, b) }

// CombineCRC returns the CRC32C of A followed by B, given the CRC32C of each and the length of B in bytes, without seeing either
// (the method of zlib's crc32_combine, with tables for the powers of x).
func CombineCRC(crcA, crcB uint32, lenB int64) uint32 {
	if lenB <= 0 {
		return crcA
	}
	return multModP(xPowModP(lenB), crcA) ^ crcB
}

// crcPoly is the Castagnoli polynomial, reflected.
const crcPoly = 0x82f63b78

// x2n[k] is x^(2^k) modulo the polynomial, reflected.
var x2n = func() (t [64]uint32) {
	p := uint32(1) << 30 // x^1
	for k := range t {
		t[k] = p
		p = multModP(p, p)
	}
	return t
}()

// xPowModP returns x^(8n) modulo the polynomial.
func xPowModP(n int64) uint32 {
	p := uint32(1) << 31 // x^0
	for k := 3; n > 0; k++ {
		if n&1 != 0 {
			p = multModP(x2n[k%64], p)
		}
		n >>= 1
	}
	return p
}

// multModP multiplies two polynomials over GF(2) modulo the CRC's.
func multModP(a, b uint32) uint32 {
	var p uint32
	for m := uint32(1) << 31; ; m >>= 1 {
		if a&m != 0 {
			p ^= b
			if a&(m-1) == 0 {
				return p
			}
		}
		if b&1 != 0 {
			b = b>>1 ^ crcPoly
		} else {
			b >>= 1
		}
		if m == 1 {
			return p
		}
	}
}
