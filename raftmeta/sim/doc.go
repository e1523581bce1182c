// Package sim has no program in it, only a test: three voters with real Raft, the real log and real tiering live through hours of faults in the virtual time of a synctest bubble,
// over a network and a bucket in memory.
//
// ESTRAN_SIM_SEED and ESTRAN_SIM_HOURS say which run and how long (make sim), ESTRAN_SIM_LOG names a file for all that the nodes log.
package sim
