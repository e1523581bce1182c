package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

func clusterCommand(s streams) *cobra.Command {
	return group("cluster", "Look at a running cluster and change its members", clusterHealth(s), clusterStatus(s),
		group("members", "List, add and remove voters", membersList(s), membersAdd(s), membersRemove(s)),
		group("leader", "Choose who leads a group", leaderTransfer(s)), clusterDrain(s, true), clusterDrain(s, false), clusterUpgrade(s))
}

// clusterHealth asks a node whether it is ready. It is also the health check of a container: exit 0 ready, 3 not reachable,
// 10 not ready.
func clusterHealth(s streams) *cobra.Command {
	var local bool
	var file, address string
	var wait time.Duration
	c := &cobra.Command{Use: "health", Short: "Is the node ready? Exit 0 ready, 10 not ready, 3 no answer", Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if local {
				cfg, err := loadConfig(file, nil)
				if err != nil {
					return err
				}
				address = localAddress(cfg.Listeners.HTTP.Listen)
			}
			return health(cmd.Context(), s, address, wait)
		}}
	c.Flags().BoolVar(&local, "local", false, "the node of this machine, by its configuration and environment")
	c.Flags().StringVarP(&file, "config", "c", "", "configuration file that --local reads")
	c.Flags().StringVar(&address, "http", "127.0.0.1:9096", "HTTP address of the node")
	c.Flags().DurationVar(&wait, "wait", 0, "wait this long for the node to become ready")
	return c
}

// localAddress is how a listener is reached from its own machine.
func localAddress(listen string) string {
	host, port, err := net.SplitHostPort(listen)
	if ip := net.ParseIP(host); err == nil && (host == "" || ip != nil && ip.IsUnspecified()) {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return listen
}

type healthAnswer struct {
	Status string `json:"status"`
	Checks []struct {
		Name  string `json:"name"`
		OK    bool   `json:"ok"`
		Error string `json:"error"`
	} `json:"checks"`
}

func health(ctx context.Context, s streams, address string, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		ans, err := askHealth(ctx, address)
		if err == nil && ans.Status != "failed" {
			fmt.Fprintln(s.out, ans.Status)
			return nil
		}
		if time.Now().Add(100*time.Millisecond).After(deadline) || ctx.Err() != nil {
			if err != nil {
				return &fault{Code: "E_NODE_UNREACHABLE", Exit: exitNotReady, Err: err, What: fmt.Sprintf("no answer from http://%s/readyz: %v", address, err),
					Fix: "start the node, or give its HTTP address with --http"}
			}
			for _, c := range ans.Checks {
				if !c.OK {
					fmt.Fprintf(s.err, "[-]%s failed: %s\n", c.Name, c.Error)
				}
			}
			return errSilent{exitUnhealthy}
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func askHealth(ctx context.Context, address string) (healthAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return healthAnswer{}, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return healthAnswer{}, errors.Unwrap(err)
	}
	defer resp.Body.Close()
	var ans healthAnswer
	return ans, json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&ans)
}
