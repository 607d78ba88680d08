package smbfs

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/iot49/ide49-backup/mounts"
	"github.com/iot49/ide49-backup/smb"
)

// fullProbe is how long a share that could be written to is trusted to be so.
const fullProbe = 10 * time.Minute

// A HomeShare is the folder of a share that a home is mounted from. It
// implements [mounts.HomeShare].
type HomeShare struct {
	sh     *smb.Share
	dir    string
	creds  smb.Credentials
	seal   bool
	opt    Options
	source string

	mu      sync.Mutex
	written time.Time // when the last full probe succeeded
	dialect smb.Dialect
}

// NewHomeShare returns the folder at a location, with the options of the
// client and of the mount. The server is not asked. Closing the client is
// left to the caller, who gets it by Client.
func NewHomeShare(at smb.Location, o smb.Options, opt Options) (*HomeShare, error) {
	o.Server = at.Server
	if o.Credentials.Username == "" {
		o.Credentials.Username = at.User
	}
	c, err := smb.New(o)
	if err != nil {
		return nil, err
	}
	sh, err := c.Share(at.Share)
	if err != nil {
		return nil, err
	}
	h := &HomeShare{sh: sh, dir: path.Clean(at.Path), creds: o.Credentials, seal: o.Encrypt, opt: opt, source: at.String()}
	h.opt.Source = h.source
	return h, nil
}

// Client returns the pool of sessions that probes and the user-space client
// use.
func (h *HomeShare) Client() *smb.Client { return h.sh.Client() }

// Source implements mounts.HomeShare.
func (h *HomeShare) Source() string { return h.source }

// Probe implements mounts.HomeShare.
func (h *HomeShare) Probe(ctx context.Context) error {
	info, err := h.sh.Client().Connect(ctx)
	if err != nil {
		return err
	}
	root, err := h.sh.Stat(ctx, h.dir)
	if errors.Is(err, smb.ErrNoShare) {
		names, lerr := h.sh.Client().Shares(ctx)
		if lerr != nil || len(names) == 0 {
			return err
		}
		return fmt.Errorf("%s answers, but the share %s does not exist; it has: %s: %w",
			h.sh.Client().Server(), h.sh.Name(), strings.Join(names, ", "), smb.ErrNoShare)
	}
	if err == nil && !root.Dir {
		err = fmt.Errorf("%s: %w", h.source, smb.ErrNotDir)
	}
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.dialect = info.Dialect
	due := !h.opt.ReadOnly && time.Since(h.written) > fullProbe
	h.mu.Unlock()
	if !due {
		return nil
	}
	if err := h.probeByFile(ctx); err != nil {
		return fmt.Errorf("the share can be read, but not written to: %w", err)
	}
	h.mu.Lock()
	h.written = time.Now()
	h.mu.Unlock()
	return nil
}

func (h *HomeShare) probeByFile(ctx context.Context) (err error) {
	name := path.Join(h.dir, ".ide49-probe-"+rand.Text())
	text := []byte(name)
	f, err := h.sh.Open(ctx, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(ctx); err == nil {
			err = cerr
		}
		if rerr := h.sh.Remove(context.WithoutCancel(ctx), name); err == nil {
			err = rerr
		}
	}()
	if err := f.WriteAt(ctx, text, 0); err != nil {
		return err
	}
	if err := f.Sync(ctx); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := f.ReadAt(ctx, got, 0); err != nil && err != io.EOF {
		return err
	}
	if !bytes.Equal(got, text) {
		return errors.New("what is read is not what was written")
	}
	return nil
}

// User implements mounts.HomeShare.
func (h *HomeShare) User(_ context.Context, at string) (mounts.UserMount, error) {
	return New(h.sh, h.dir, at, h.opt)
}

// Kernel implements mounts.HomeShare. The address is resolved here, since the
// kernel can't do it without a helper program.
func (h *HomeShare) Kernel(ctx context.Context) ([]byte, error) {
	server := h.sh.Client().Server()
	host, port, err := net.SplitHostPort(server)
	if err != nil {
		host, port = strings.Trim(server, "[]"), "445"
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("address of %s: %w", host, err)
	}
	// The first one that answers, so that a name with a dead IPv6 address
	// still works.
	ip := ""
	for _, a := range addrs {
		c, err := (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, "tcp", net.JoinHostPort(a.Unmap().String(), port))
		if err == nil {
			c.Close()
			ip = a.Unmap().String()
			break
		}
	}
	if ip == "" {
		return nil, fmt.Errorf("%s: %w", host, smb.ErrUnreachable)
	}
	h.mu.Lock()
	dialect := h.dialect
	h.mu.Unlock()
	vers := map[smb.Dialect]string{smb.SMB210: "2.1", smb.SMB300: "3.0", smb.SMB302: "3.02"}[dialect]
	if vers == "" {
		vers = "3.1.1"
	}
	for _, s := range []string{h.creds.Username, h.creds.Domain, h.dir} {
		if strings.ContainsAny(s, ",\x00\n") {
			return nil, fmt.Errorf("the kernel's client can't use %q, which has a comma; set client: user", s)
		}
	}
	opt := h.opt
	opt.complete("")
	o := fmt.Appendf(make([]byte, 0, 1024),
		"ip=%s,port=%s,vers=%s,uid=%d,gid=%d,forceuid,forcegid,file_mode=%#o,dir_mode=%#o,"+
			"iocharset=utf8,mfsymlinks,nobrl,cache=strict,actimeo=1,soft,echo_interval=10,username=%s",
		ip, port, vers, opt.Owner, opt.Group, opt.FileMode.Perm(), opt.DirMode.Perm(), h.creds.Username)
	if h.seal {
		o = append(o, ",seal"...)
	} else {
		o = append(o, ",sec=ntlmsspi"...)
	}
	if h.creds.Domain != "" {
		o = append(o, ",domain="+h.creds.Domain...)
	}
	if h.dir != "." {
		o = append(o, ",prefixpath="+h.dir...)
	}
	secret, err := h.creds.Secret(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	// The buffer has room for all of it: growing would leave a copy behind.
	o = append(o, ",password="...)
	if cap(o)-len(o) < 2*len(secret) {
		o = append(make([]byte, 0, len(o)+2*len(secret)), o...)
	}
	for _, b := range secret {
		if b == ',' {
			o = append(o, ',') // a comma is written twice
		}
		o = append(o, b)
	}
	return o, nil
}
