package smbtest

import (
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
)

// A Namespace is a network namespace whose only link to this one can be cut.
type Namespace struct {
	Name    string
	Address string // IPv4 address in the namespace
	t       testing.TB
}

// namespaces counts those of this process, whose names must differ.
var namespaces atomic.Uint32

// NewNamespace makes a namespace that lasts until the test ends. It needs root
// and iproute2.
func NewNamespace(t testing.TB) *Namespace {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Fatal("ip is missing: apt-get install iproute2")
	}
	// 198.18.0.0/15 is set aside for tests of networks; each namespace of
	// each process takes four addresses of it.
	id := (os.Getpid() + int(namespaces.Add(1))*9973) % (1 << 15)
	n := &Namespace{Name: fmt.Sprintf("smbt%d", id), t: t}
	link := n.Name + "a"
	address := func(host int) string {
		v := id*4 + host
		return fmt.Sprintf("198.%d.%d.%d", 18+v>>16&1, v>>8&255, v&255)
	}
	n.Address = address(2)
	n.ip("netns", "add", n.Name)
	t.Cleanup(func() { n.ip("netns", "del", n.Name) }) // its end of the link takes the other along
	n.ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", n.Name)
	n.ip("addr", "add", address(1)+"/30", "dev", link)
	n.ip("link", "set", link, "up")
	n.ip("-n", n.Name, "addr", "add", n.Address+"/30", "dev", "eth0")
	n.ip("-n", n.Name, "link", "set", "eth0", "up")
	n.ip("-n", n.Name, "link", "set", "lo", "up")
	return n
}

func (n *Namespace) ip(args ...string) {
	n.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		n.t.Fatalf("ip %q (needs root): %v: %s", args, err, out)
	}
}

// Cut makes all packets vanish without a word, as a pulled cable behind a
// switch does.
func (n *Namespace) Cut() { n.ip("-n", n.Name, "link", "set", "eth0", "down") }

// Mend undoes Cut.
func (n *Namespace) Mend() { n.ip("-n", n.Name, "link", "set", "eth0", "up") }
