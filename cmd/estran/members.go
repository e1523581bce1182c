package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/estran/estran/broker/admin"
	"github.com/estran/estran/raftmeta"
)

// clusterCommands are what a node does for the commands below.
func clusterCommands(h *raftmeta.Host) map[string]func(context.Context, []byte) error {
	return map[string]func(context.Context, []byte) error{
		"members/add":    command(func(ctx context.Context, r memberRequest) error { return h.AddMember(ctx, r.ID, r.Peer) }),
		"members/remove": command(func(ctx context.Context, r memberRequest) error { return h.RemoveMember(ctx, r.ID) }),
		"feature-level":  command(func(ctx context.Context, r levelRequest) error { return h.RaiseFeatureLevel(ctx, r.To) }),
		"drain":          command(func(ctx context.Context, r drainRequest) error { return h.DrainNode(ctx, r.ID, r.On) }),
		"leader": command(func(ctx context.Context, r leaderRequest) error {
			g, ok := h.GroupNamed(r.Group)
			if !ok {
				return fmt.Errorf("%w: no group %q", raftmeta.ErrNotFound, r.Group)
			}
			return h.PreferLeader(ctx, g, r.Node)
		}),
	}
}

type memberRequest struct {
	ID   int32  `json:"id"`
	Peer string `json:"peer,omitempty"`
}

type drainRequest struct {
	ID int32 `json:"id"`
	On bool  `json:"on"`
}

type levelRequest struct {
	To uint32 `json:"to,omitempty"` // 0 = the newest that the node knows
}

type leaderRequest struct {
	Group string `json:"group"`
	Node  int32  `json:"node"`
}

func command[R any](do func(context.Context, R) error) func(context.Context, []byte) error {
	return func(ctx context.Context, body []byte) error {
		var r R
		d := json.NewDecoder(bytes.NewReader(body))
		d.DisallowUnknownFields()
		if err := d.Decode(&r); err != nil {
			return fmt.Errorf("%w: %w", admin.ErrRefused, err)
		}
		err := do(ctx, r)
		if errors.Is(err, raftmeta.ErrNotFound) || errors.Is(err, raftmeta.ErrInvalid) {
			return fmt.Errorf("%w: %w", admin.ErrRefused, err)
		}
		return err
	}
}

// nodeClient asks a node over HTTP.
type nodeClient struct {
	address string
	timeout time.Duration
	format  string
}

func (n *nodeClient) add(c *cobra.Command) {
	c.Flags().StringVar(&n.address, "http", "127.0.0.1:9096", "HTTP address of any node")
	c.Flags().DurationVar(&n.timeout, "timeout", time.Minute, "how long to wait for the change")
}

func (n *nodeClient) addFormat(c *cobra.Command) {
	c.Flags().StringVar(&n.address, "http", "127.0.0.1:9096", "HTTP address of any node")
	c.Flags().StringVarP(&n.format, "output", "o", "table", "table or json")
	n.timeout = 15 * time.Second
}

func (n *nodeClient) do(ctx context.Context, method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+n.address+path, bytes.NewReader(body))
	if err != nil {
		return &fault{Code: "E_USAGE", What: fmt.Sprintf("--http %q: %v", n.address, err), Exit: exitUsage, Err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return &fault{Code: "E_NODE_UNREACHABLE", Exit: exitNotReady, Err: err, What: fmt.Sprintf("no answer from http://%s%s: %v", n.address, path, errors.Unwrap(err)),
			Fix: "start the node, or give another's HTTP address with --http"}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode == http.StatusOK {
		return json.Unmarshal(b, out)
	}
	var e struct{ Error string }
	if json.Unmarshal(b, &e) != nil || e.Error == "" {
		e.Error = resp.Status
	}
	f := &fault{Code: "E_CLUSTER_UNSETTLED", What: e.Error, Fix: "look at estran cluster status; the change may have happened or may still happen"}
	if resp.StatusCode == http.StatusConflict {
		f.Code, f.Fix = "E_CLUSTER_REFUSED", "nothing was changed; look at estran cluster status"
	}
	return f
}

func (n *nodeClient) status(ctx context.Context) (s raftmeta.Status, err error) {
	return s, n.do(ctx, http.MethodGet, "/v1/cluster", nil, &s)
}

// change posts a command and waits until done says that it has happened; what is still missing is told as it changes.
func (n *nodeClient) change(ctx context.Context, s streams, path string, in any, done func(raftmeta.Status) (missing string)) error {
	ctx, cancel := context.WithTimeout(ctx, n.timeout)
	defer cancel()
	if err := n.do(ctx, http.MethodPost, path, in, &struct{}{}); err != nil {
		return err
	}
	told := ""
	for {
		st, err := n.status(ctx)
		missing := "no answer"
		if err == nil {
			missing = done(st)
		}
		if missing == "" {
			return nil
		}
		if missing != told {
			told = missing
			fmt.Fprintf(s.err, "waiting: %s\n", missing)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return &fault{Code: "E_CLUSTER_UNSETTLED", Exit: exitNotReady, What: fmt.Sprintf("decided, but not done after %s: %s", n.timeout, missing),
				Fix: "it goes on by itself; look at estran cluster status"}
		}
	}
}

func clusterStatus(s streams) *cobra.Command {
	var n nodeClient
	c := &cobra.Command{Use: "status", Aliases: []string{"info"}, Short: "Show the members and who leads what", Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := n.status(cmd.Context())
			if err != nil {
				return err
			}
			if n.format == "json" {
				return json.NewEncoder(s.out).Encode(st)
			}
			fmt.Fprintf(s.out, "cluster %s, %d members, %d shards, %d topics, feature level %d, seen by node %d\n\n", st.ClusterID, members(st), st.Shards, st.Topics, st.FeatureLevel, st.Node)
			printMembers(s.out, st)
			fmt.Fprintln(s.out)
			w := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "GROUP\tLEADER\tTERM\tCOMMIT\tSERVERS")
			for _, g := range st.Groups {
				leader := "none"
				if g.Leader != 0 {
					leader = strconv.Itoa(int(g.Leader))
				}
				fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\n", g.Name, leader, g.Term, g.Commit, strings.Join(servers(g), " "))
			}
			return w.Flush()
		}}
	n.addFormat(c)
	return c
}

// servers describes a group's servers: what is not a voter that has everything is marked.
func servers(g raftmeta.GroupStatus) (out []string) {
	for _, x := range g.Servers {
		d := strconv.Itoa(int(x.Node))
		switch {
		case !x.Answers:
			d += "(no answer)"
		case !x.Voter:
			d += "(joining)"
		case x.Last < g.Commit:
			d += fmt.Sprintf("(-%d)", g.Commit-x.Last)
		}
		out = append(out, d)
	}
	return out
}

func members(st raftmeta.Status) (n int) {
	for _, m := range st.Members {
		if m.State == raftmeta.StateVoter || m.State == raftmeta.StateJoining {
			n++
		}
	}
	return n
}

func printMembers(out io.Writer, st raftmeta.Status) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tSTATE\tANSWERS\tLEADS\tKAFKA\tPEER\tRACK")
	for _, m := range st.Members {
		state, answers := m.State, "yes"
		if m.Draining {
			state += ",draining"
		}
		if !m.Answers {
			answers = "no"
			if m.State == raftmeta.StateWaiting || m.State == raftmeta.StateLeft {
				answers = "-" // nobody asks it
			}
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", m.ID, state, answers, strings.Join(m.Leads, ","), m.Kafka, m.Peer, m.Rack)
	}
	_ = w.Flush() // a terminal that has gone
}

func membersList(s streams) *cobra.Command {
	var n nodeClient
	c := &cobra.Command{Use: "list", Short: "List the nodes: voters, those that wait to be added, those that leave", Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := n.status(cmd.Context())
			if err != nil {
				return err
			}
			if n.format == "json" {
				return json.NewEncoder(s.out).Encode(st.Members)
			}
			printMembers(s.out, st)
			return nil
		}}
	n.addFormat(c)
	return c
}

func nodeArg(arg string) (int32, error) {
	id, err := strconv.ParseInt(arg, 10, 32)
	if err != nil || id < 1 {
		return 0, &fault{Code: "E_USAGE", What: fmt.Sprintf("%q is not a node ID", arg), Exit: exitUsage}
	}
	return int32(id), nil
}

func memberOf(st raftmeta.Status, id int32) (raftmeta.MemberStatus, bool) {
	i := slices.IndexFunc(st.Members, func(m raftmeta.MemberStatus) bool { return m.ID == id })
	if i < 0 {
		return raftmeta.MemberStatus{}, false
	}
	return st.Members[i], true
}

// there counts the groups whose configuration has a server of the node, and of these the ones in which it votes.
func there(st raftmeta.Status, id int32) (has, votes int) {
	for _, g := range st.Groups {
		for _, x := range g.Servers {
			if x.Node == id {
				has++
				if x.Voter {
					votes++
				}
			}
		}
	}
	return has, votes
}

func membersAdd(s streams) *cobra.Command {
	var n nodeClient
	c := &cobra.Command{Use: "add ID[@HOST:PORT]", Short: "Make a node that has announced itself a voter", Args: usage(cobra.ExactArgs(1)),
		Long: "Make a node a voter of every group. Start it first, with quorum.voters naming the present voters and itself: it announces itself and\nwaits. The command returns when the node has everything and votes; it can be repeated. An address, if given, is compared with what the\nnode says of itself. Name the node in quorum.voters of the others too, before their next start.",
		RunE: func(cmd *cobra.Command, args []string) error {
			arg, peer, _ := strings.Cut(args[0], "@")
			id, err := nodeArg(arg)
			if err != nil {
				return err
			}
			if err := n.change(cmd.Context(), s, "/v1/cluster/members/add", memberRequest{id, peer}, func(st raftmeta.Status) string {
				if m, ok := memberOf(st, id); ok && m.State == raftmeta.StateVoter && len(st.Groups) == int(st.Shards)+1 {
					return ""
				}
				_, votes := there(st, id)
				return fmt.Sprintf("node %d votes in %d of %d groups", id, votes, len(st.Groups))
			}); err != nil {
				return err
			}
			fmt.Fprintf(s.out, "node %d is a voter\n", id)
			return nil
		}}
	n.add(c)
	return c
}

func membersRemove(s streams) *cobra.Command {
	var n nodeClient
	c := &cobra.Command{Use: "remove ID", Short: "Take a voter out of every group", Args: usage(cobra.ExactArgs(1)),
		Long: "Take a voter out of every group; it may be dead. It hands over first what it leads, and its process ends when it learns of it. Refused if\nfewer than a majority of those that are left answer.",
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeArg(args[0])
			if err != nil {
				return err
			}
			if err := n.change(cmd.Context(), s, "/v1/cluster/members/remove", memberRequest{ID: id}, func(st raftmeta.Status) string {
				if has, _ := there(st, id); has > 0 {
					return fmt.Sprintf("node %d is still in %d of %d groups", id, has, len(st.Groups))
				}
				return ""
			}); err != nil {
				return err
			}
			fmt.Fprintf(s.out, "node %d is removed\n", id)
			return nil
		}}
	n.add(c)
	return c
}

func clusterDrain(s streams, on bool) *cobra.Command {
	var n nodeClient
	var self bool
	use, short, did := "drain", "Move every leadership away from a node, and keep it away", "leads nothing and will not until it starts anew or is undrained"
	if !on {
		use, short, did = "undrain", "Let a node lead again", "may lead again"
	}
	c := &cobra.Command{Use: use + " {NODE | --self}", Short: short, Args: usage(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if self == (len(args) == 1) {
				return &fault{Code: "E_USAGE", What: "give a node ID or --self", Exit: exitUsage}
			}
			var id int32
			var err error
			if self {
				var st raftmeta.Status
				if st, err = n.status(cmd.Context()); err == nil {
					id = st.Node
				}
			} else {
				id, err = nodeArg(args[0])
			}
			if err != nil {
				return err
			}
			if err := n.change(cmd.Context(), s, "/v1/cluster/drain", drainRequest{id, on}, func(st raftmeta.Status) string {
				m, ok := memberOf(st, id)
				switch {
				case ok && m.Draining != on:
					return "the decision has not arrived"
				case on && ok && len(m.Leads) > 0 && members(st) > 1:
					return fmt.Sprintf("node %d leads %s", id, strings.Join(m.Leads, ", "))
				}
				return ""
			}); err != nil {
				return err
			}
			fmt.Fprintf(s.out, "node %d %s\n", id, did)
			return nil
		}}
	c.Flags().BoolVar(&self, "self", false, "the node that --http names")
	n.add(c)
	return c
}

func clusterUpgrade(s streams) *cobra.Command {
	var n nodeClient
	var to uint32
	c := &cobra.Command{Use: "upgrade [--to LEVEL]", Short: "Raise the feature level, once every node runs the new program", Args: usage(cobra.NoArgs),
		Long: "Raise the cluster's feature level: from then on it uses, and writes, what only newer programs know. Start every node with the new program\nfirst: it is refused while one that votes does not know the level. A level never falls: an older program does not start any more.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := uint32(0)
			if err := n.change(cmd.Context(), s, "/v1/cluster/feature-level", levelRequest{to}, func(st raftmeta.Status) string {
				if level = st.FeatureLevel; level < to {
					return "the decision has not arrived"
				}
				return ""
			}); err != nil {
				return err
			}
			fmt.Fprintf(s.out, "feature level %d\n", level)
			return nil
		}}
	c.Flags().Uint32Var(&to, "to", 0, "feature level; 0 = the newest that the node of --http knows")
	n.add(c)
	return c
}

func leaderTransfer(s streams) *cobra.Command {
	var n nodeClient
	var name, to string
	c := &cobra.Command{Use: "transfer --group GROUP --to NODE", Short: "Make a node lead a group, as long as it can", Args: usage(cobra.NoArgs),
		Long: "Make a node lead a group (meta, shard-1, …). It stays so: when the node has been away, it leads again once it is back. --to any ends that,\nand leadership is spread over the members again.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var id int32
			if to != "any" {
				var err error
				if id, err = nodeArg(to); err != nil {
					return err
				}
			}
			if err := n.change(cmd.Context(), s, "/v1/cluster/leader", leaderRequest{name, id}, func(st raftmeta.Status) string {
				for _, g := range st.Groups {
					if g.Name == name && (g.Prefer != id || id != 0 && g.Leader != id) {
						return fmt.Sprintf("%s is led by node %d", name, g.Leader)
					}
				}
				return ""
			}); err != nil {
				return err
			}
			if id == 0 {
				fmt.Fprintf(s.out, "%s is led by any node\n", name)
			} else {
				fmt.Fprintf(s.out, "%s is led by node %d\n", name, id)
			}
			return nil
		}}
	c.Flags().StringVar(&name, "group", "", "meta or shard-N")
	c.Flags().StringVar(&to, "to", "", "node ID, or any")
	_ = c.MarkFlagRequired("group")
	_ = c.MarkFlagRequired("to")
	n.add(c)
	return c
}
