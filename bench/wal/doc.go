// Package wal compares the log store with hashicorp/raft-wal. It is a module of its own, so that raft-wal is no dependency of the product.
package wal
