// Package estran_test pins the modules that the packages are about to use; it goes when all of them do.
package estran_test
