// Package sim has no program in it, only a test: three voters with real Raft, the real log and real tiering live through hours of faults in the virtual time of a synctest bubble,
// over a network and a bucket in memory.
package sim
