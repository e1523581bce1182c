package raftmeta

import (
	"context"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// hclogger passes raft's log on to slog. raft's info lines are debug here: what an operator needs is logged by this package.
type hclogger struct {
	l    *slog.Logger
	name string
	args []any
}

func newHclog(l *slog.Logger) hclog.Logger { return &hclogger{l: l} }

func (h *hclogger) Log(level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn:
		to = slog.LevelWarn
	case hclog.Error:
		to = slog.LevelError
	}
	h.l.Log(context.Background(), to, "raft: "+msg, args...)
}
func (h *hclogger) Trace(msg string, args ...any) { h.Log(hclog.Trace, msg, args...) }
func (h *hclogger) Debug(msg string, args ...any) { h.Log(hclog.Debug, msg, args...) }
func (h *hclogger) Info(msg string, args ...any)  { h.Log(hclog.Info, msg, args...) }
func (h *hclogger) Warn(msg string, args ...any)  { h.Log(hclog.Warn, msg, args...) }
func (h *hclogger) Error(msg string, args ...any) { h.Log(hclog.Error, msg, args...) }
func (h *hclogger) IsTrace() bool                 { return false }
func (h *hclogger) IsDebug() bool                 { return h.l.Enabled(context.Background(), slog.LevelDebug) }
func (h *hclogger) IsInfo() bool                  { return h.IsDebug() }
func (h *hclogger) IsWarn() bool                  { return true }
func (h *hclogger) IsError() bool                 { return true }
func (h *hclogger) ImpliedArgs() []any            { return h.args }
func (h *hclogger) With(args ...any) hclog.Logger { return &hclogger{h.l.With(args...), h.name, args} }
func (h *hclogger) Name() string                  { return h.name }
func (h *hclogger) Named(name string) hclog.Logger {
	return &hclogger{h.l, name, h.args}
}
func (h *hclogger) ResetNamed(name string) hclog.Logger { return h.Named(name) }
func (h *hclogger) SetLevel(hclog.Level)                {}
func (h *hclogger) GetLevel() hclog.Level               { return hclog.Debug }
func (h *hclogger) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(h.StandardWriter(o), "", 0)
}
func (h *hclogger) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return io.Discard }
