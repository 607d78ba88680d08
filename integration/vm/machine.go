package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// BootLimit is how long Start waits for the guest. It needs 2 s with KVM, 4 to
// 7 s under emulation, and twice that on a busy machine.
const BootLimit = 120 * time.Second

// Config says what is in the machine. The zero value is a machine that mounts
// FAT, exFAT, NTFS and ext4 from USB drives.
type Config struct {
	Memory   int               // MiB; 0 means 512
	Samba    bool              // load what the kernel's cifs client needs
	Modules  []string          // more kernel modules, loaded at boot
	OnDemand []string          // more kernel modules, for Machine.Load
	Files    map[string]string // path in the guest to path on the host; mode and content are copied
	Programs []string          // more programs of the host, with their libraries, into /usr/sbin
	Drives   []Drive           // that are plugged in before the guest boots
}

// guestPrograms are what our service calls. Busybox has weaker programs with
// some of these names; those are left out.
var guestPrograms = []string{"blkid", "e2fsck", "fsck.vfat", "fsck.exfat", "ntfs-3g"}

var baseModules = []string{
	"usb-common", "usbcore", "xhci-hcd", "xhci-pci",
	"scsi_common", "scsi_mod", "usb-storage", "uas",
	"crct10dif_common", "crc64", "crc-t10dif", "crc64-rocksoft", "t10-pi", "sd_mod",
	"fat", "vfat", "nls_cp437", "nls_ascii", "nls_utf8", "exfat",
	"jbd2", "mbcache", "crc16", "crc32c_generic", "ext4", "fuse",
	"virtio_pci", "virtio_net", "loop",
}

var sambaModules = []string{
	"netfs", "fscache", "dns_resolver", "cifs_md4", "cifs_arc4", "cifs",
	"sha512_generic", "cmac", "ctr", "gf128mul", "ghash-generic", "ccm", "gcm", "ecb",
}

// Machine is a running virtual machine. Its methods may be called at the same
// time; they run one after another.
type Machine struct {
	mu      sync.Mutex
	logs    []*os.File // what qemu and the guest's kernel said; without a name
	qemu    *exec.Cmd
	qmp     *monitor
	shell   net.Conn
	unread  []byte // what the guest's shell said so far
	asked   int    // commands sent to the guest's shell
	kernel  kernel
	plugged map[string]Drive
}

// Start boots a machine and returns when its shell answers. Close must be
// called; nothing of the machine outlives this process in any case.
func Start(ctx context.Context, cfg Config) (_ *Machine, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, BootLimit, fmt.Errorf("the guest did not boot within %v", BootLimit))
	defer cancel()
	kernel, err := findKernel(ctx)
	if err != nil {
		return nil, fmt.Errorf("kernel of the VM: %w", err)
	}
	qemu, err := find("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "ide49-vm-")
	if err != nil {
		return nil, err
	}
	// Nothing needs the folder once the guest runs: so nothing is left of it
	// even when this process is killed then.
	defer os.RemoveAll(dir)
	m := &Machine{kernel: kernel, plugged: map[string]Drive{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("start the VM: %w%s", err, m.console())
			m.kill()
		}
	}()
	initrd := filepath.Join(dir, "initrd")
	if err := m.writeInitramfs(ctx, initrd, cfg); err != nil {
		return nil, err
	}
	monitorConn, monitorEnd, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer monitorEnd.Close()
	shellConn, shellEnd, err := socketPair()
	if err != nil {
		return nil, errors.Join(err, monitorConn.Close())
	}
	defer shellEnd.Close()
	m.shell = shellConn

	for _, name := range []string{"qemu", "console"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return nil, errors.Join(err, monitorConn.Close())
		}
		m.logs = append(m.logs, f)
	}
	memory := cfg.Memory
	if memory == 0 {
		memory = 512
	}
	accel := "tcg,thread=multi"
	if v := os.Getenv("IDE49_VM_ACCEL"); v != "" {
		accel = v
	}
	m.qemu = exec.Command(qemu,
		"-accel", accel, "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S",
		"-kernel", filepath.Join(kernel.dir, "vmlinux"),
		"-initrd", initrd,
		// A panic ends qemu (with -no-reboot), so that nobody waits for it.
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init mitigations=off",
		"-chardev", "socket,id=monitor,fd=3", "-mon", "chardev=monitor,mode=control",
		"-serial", "file:"+filepath.Join(dir, "console"),
		"-chardev", "socket,id=shell,fd=4", "-serial", "chardev:shell",
		"-device", "qemu-xhci,id=xhci,p2=15,p3=15",
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	m.qemu.ExtraFiles = []*os.File{monitorEnd, shellEnd}
	m.qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	m.qemu.Stderr = m.logs[0]
	if err := m.qemu.Start(); err != nil {
		m.qemu = nil
		return nil, errors.Join(err, monitorConn.Close())
	}
	monitorEnd.Close() // else we would never see that qemu has ended
	shellEnd.Close()
	m.qmp = &monitor{conn: monitorConn}
	if m.qmp, err = newMonitor(ctx, monitorConn); err != nil {
		return nil, errors.Join(err, monitorConn.Close())
	}
	for _, d := range cfg.Drives {
		if err := m.plug(ctx, d); err != nil {
			return nil, err
		}
	}
	if err := m.qmp.execute(ctx, "cont", nil); err != nil {
		return nil, err
	}
	defer guard(ctx, m.shell)()
	said, err := m.readUntil(ctx, []byte(ready))
	if err != nil {
		return nil, err
	}
	if len(said) > 0 {
		return nil, fmt.Errorf("the guest complains: %s", bytes.TrimSpace(said))
	}
	return m, nil
}

// socketPair returns our end as a connection and the other as a file for a
// child.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "our end"), os.NewFile(uintptr(fds[1]), "qemu's end")
	defer ours.Close() // FileConn has made its own copy
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// Close powers the guest off and removes all that belongs to the machine. It
// returns an error when the guest did not end by itself.
func (m *Machine) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemu == nil {
		return nil
	}
	defer m.kill()
	// The answer to this never comes: the connection ends.
	if _, err := m.shell.Write([]byte("0\nsync; poweroff -f\n")); err != nil {
		return fmt.Errorf("power off the VM: %w%s", err, m.console())
	}
	defer guard(ctx, m.shell)()
	if _, err := io.Copy(io.Discard, m.shell); err != nil {
		return fmt.Errorf("power off the VM: %w%s", cause(ctx, err), m.console())
	}
	return nil
}

// kill ends qemu.
func (m *Machine) kill() {
	if m.qmp != nil {
		m.qmp.conn.Close()
	}
	if m.shell != nil {
		m.shell.Close()
	}
	if m.qemu != nil {
		m.qemu.Process.Kill()
		m.qemu.Wait() // its status says only that it was killed
		m.qemu = nil
	}
	for _, f := range m.logs {
		f.Close()
	}
	m.logs = nil
}

// console returns the end of what the kernel and qemu said, for errors.
func (m *Machine) console() string {
	var b strings.Builder
	for _, f := range m.logs {
		data, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<24))
		data = bytes.TrimSpace(data)
		if err != nil || len(data) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n--- %s:\n%s", filepath.Base(f.Name()), data[max(0, len(data)-2000):])
	}
	return b.String()
}

// Run runs a shell script in the guest and returns what it printed, standard
// output and error together, and its exit code. A code other than 0 is no
// error. When ctx ends first, the script goes on in the guest, and later calls
// wait for it.
func (m *Machine) Run(ctx context.Context, script string) (out string, code int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemu == nil {
		return "", 0, fmt.Errorf("run %q in the VM: %w", script, os.ErrClosed)
	}
	m.asked++
	defer guard(ctx, m.shell)()
	if _, err := fmt.Fprintf(m.shell, "%d\neval %s\n", m.asked, quote(script)); err != nil {
		return "", 0, fmt.Errorf("run %q in the VM: %w%s", script, cause(ctx, err), m.console())
	}
	for {
		data, err := m.readUntil(ctx, []byte(answer))
		if err != nil {
			return "", 0, fmt.Errorf("run %q in the VM: %w%s", script, err, m.console())
		}
		tail, err := m.readUntil(ctx, []byte("@@\n"))
		if err != nil {
			return "", 0, fmt.Errorf("run %q in the VM: %w%s", script, err, m.console())
		}
		var number int
		if _, err := fmt.Sscanf(string(tail), "%d=%d", &number, &code); err != nil {
			return "", 0, fmt.Errorf("run %q in the VM: answer %q: %w", script, tail, err)
		}
		if number == m.asked { // else the late answer to a call that gave up
			return string(data), code, nil
		}
	}
}

// ExitError is the failure of a script in the guest.
type ExitError struct {
	Script string
	Code   int
	Output string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("%q in the VM: exit code %d: %s", e.Script, e.Code, strings.TrimSpace(e.Output))
}

// Output is Run for scripts that must succeed: an exit code other than 0 is an
// *ExitError.
func (m *Machine) Output(ctx context.Context, script string) (string, error) {
	out, code, err := m.Run(ctx, script)
	if err == nil && code != 0 {
		err = &ExitError{Script: script, Code: code, Output: out}
	}
	return out, err
}

// Wait runs a script again and again until it succeeds, and returns what it
// printed then. When ctx ends first, the error tells of the last try.
func (m *Machine) Wait(ctx context.Context, script string) (string, error) {
	var last error
	for {
		out, err := m.Output(ctx, script)
		var exit *ExitError
		switch {
		case err == nil:
			return out, nil
		case errors.As(err, &exit):
			last = err
		case last != nil && ctx.Err() != nil:
			return "", fmt.Errorf("%w: last: %w", context.Cause(ctx), last)
		default:
			return "", err
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%w: last: %w", context.Cause(ctx), last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Load loads kernel modules that Config.OnDemand named, with all that they
// need.
func (m *Machine) Load(ctx context.Context, names ...string) error {
	files, err := m.kernel.modules(names...)
	if err != nil {
		return err
	}
	for _, file := range files {
		name := moduleName(file)
		script := fmt.Sprintf("[ -e /sys/module/%s ] || insmod /lib/modules/%s", name, filepath.Base(file))
		if _, err := m.Output(ctx, script); err != nil {
			return err
		}
	}
	return nil
}

// readUntil returns what the guest's shell said before mark. The caller guards
// the connection.
func (m *Machine) readUntil(ctx context.Context, mark []byte) ([]byte, error) {
	chunk := make([]byte, 64<<10)
	for from := 0; ; {
		if i := bytes.Index(m.unread[from:], mark); i >= 0 {
			data := bytes.Clone(m.unread[:from+i])
			m.unread = m.unread[from+i+len(mark):]
			return data, nil
		}
		from = max(0, len(m.unread)-len(mark)+1)
		n, err := m.shell.Read(chunk)
		m.unread = append(m.unread, chunk[:n]...)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the VM has ended")
			}
			return nil, cause(ctx, err)
		}
	}
}

// quote makes one word of the shell's $'…' kind, free of control characters,
// so that it arrives whole through any terminal.
func quote(script string) string {
	var b strings.Builder
	b.WriteString("$'")
	for _, c := range []byte(script) {
		switch {
		case c == '\'' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c < 0x20 || c >= 0x7f:
			fmt.Fprintf(&b, `\%03o`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteString("'")
	return b.String()
}
