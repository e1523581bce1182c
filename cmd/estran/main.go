// Command estran is the whole product in one program: a voter (serve), a one-node cluster without configuration (dev), a
// cluster under load (demo) and the tools that work on them. This package holds flags, environment and wiring; the logic is in the packages that it joins.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// streams are where a command reads and writes.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// errSilent ends a command with an exit code and no message of its own.
type errSilent struct{ code int }

func (e errSilent) Error() string { return fmt.Sprintf("exit %d", e.code) }

func run(args []string, in io.Reader, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot(streams{in, out, errOut})
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if s, ok := errors.AsType[errSilent](err); ok {
		return s.code
	}
	return printError(errOut, err)
}

func newRoot(s streams) *cobra.Command {
	root := &cobra.Command{
		Use:           "estran",
		Short:         "A Kafka-compatible broker on object storage",
		Long:          "Estran is a Kafka-compatible broker: a Raft log acknowledges records in milliseconds, sealed segments go to\nS3-compatible storage. Start with `estran dev`.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &fault{Code: "E_USAGE", What: err.Error(), Fix: cmd.CommandPath() + " --help", Exit: exitUsage, Err: err}
	})
	root.AddCommand(devCommand(s), demoCommand(s), serveCommand(s), topicCommand(s), segmentCommand(s), configCommand(s), recoverCommand(s),
		clusterCommand(s), doctorCommand(s), versionCommand(s))
	return root
}

// group is a command that only holds others: without one of them it shows its help, with an unknown one it suggests.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		f := &fault{Code: "E_USAGE", What: fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath()), Fix: cmd.CommandPath() + " --help", Exit: exitUsage}
		var names []string
		for _, s := range cmd.Commands() {
			names = append(names, s.Name())
		}
		if near := nearest(args[0], names); near != "" {
			f.Fix = fmt.Sprintf("did you mean %q?", near)
		}
		return f
	}}
	c.AddCommand(subs...)
	return c
}

// usage wraps a cobra argument check so that its error is a usage error.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &fault{Code: "E_USAGE", What: err.Error(), Fix: cmd.CommandPath() + " --help", Exit: exitUsage, Err: err}
		}
		return nil
	}
}
