package smb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/hirochachacha/go-smb2"
)

// What can go wrong with a server. Every error of this package is an [*Error]
// that matches one of these, or [fs.ErrNotExist], [fs.ErrExist],
// [fs.ErrPermission], [io.EOF] or a context's error. The texts say what to do.
var (
	ErrUnreachable    = errors.New("the server does not answer; check that it is on, its name and the network")
	ErrRefused        = errors.New("the machine answers but runs no Samba at this port; check the port and that its Samba is running")
	ErrCredentials    = errors.New("wrong user name or password; check both (and the domain)")
	ErrPassword       = errors.New("the password can't be read; check where the configuration takes it from")
	ErrExpired        = errors.New("the password has expired; set a new one on the server")
	ErrAccount        = errors.New("the account is disabled or locked; enable it on the server")
	ErrGuest          = errors.New("the server logged the user in as guest, which has no security; create the user on the server, or set map to guest = never")
	ErrNoShare        = errors.New("there is no such share; check its name")
	ErrShareDenied    = errors.New("the user may not use this share; allow it on the server")
	ErrFull           = errors.New("no space left on the share; free some space")
	ErrReadOnly       = errors.New("the share is read-only; allow writing on the server")
	ErrInUse          = errors.New("the file is in use by another program; close it there")
	ErrConnectionLost = errors.New("the connection was lost; try again")
	ErrBusy           = errors.New("the server is short of resources; try again later")
	ErrNotSealed      = errors.New("the server can't encrypt; allow SMB 3 with encryption there, or set encrypt: false")
	ErrDialect        = errors.New("the server speaks only an old dialect; enable SMB 2.1 or later there")
	ErrProtocol       = errors.New("the server sent what no Samba server sends; check that it is the right server")
	ErrName           = errors.New("the name can't be stored on a share; rename the file")
	ErrNotEmpty       = errors.New("the folder is not empty; remove what is in it")
	ErrNotDir         = errors.New("not a folder")
	ErrIsDir          = errors.New("is a folder")
	ErrStale          = errors.New("the file was opened over a connection that is lost; open it again")
	ErrClosed         = errors.New("the client is closed")
)

// An Error says which operation failed on what. Its text is one line.
type Error struct {
	Op     string // "open", "write", "log in", …
	Target string // //server/share/path as far as it is known
	Kind   error  // one of this package's errors or io/fs's
	Err    error  // the cause, or nil
}

func (e *Error) Error() string {
	switch {
	case e.Err == nil:
		return fmt.Sprintf("%s %s: %v", e.Op, e.Target, e.Kind)
	case errors.Is(e.Err, e.Kind): // its text has the kind's
		return fmt.Sprintf("%s %s: %v", e.Op, e.Target, e.Err)
	}
	return fmt.Sprintf("%s %s: %v (%v)", e.Op, e.Target, e.Kind, e.Err)
}

// Unwrap makes both the kind and the cause match.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Err}
}

// Temporary reports whether the same call may succeed when it is made again
// soon: the server was away, the connection broke, a file was in use.
func Temporary(err error) bool {
	for _, kind := range []error{ErrUnreachable, ErrRefused, ErrConnectionLost, ErrBusy, ErrInUse, ErrStale} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// Away reports whether err says that the server can't be used at the moment,
// whatever is asked of it.
func Away(err error) bool {
	for _, kind := range []error{ErrUnreachable, ErrRefused, ErrConnectionLost, ErrStale} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// Codes of [MS-ERREF] that mean something to us.
const (
	statusSharingViolation       = 0xC0000043
	statusLockConflict           = 0xC0000054
	statusLockNotGranted         = 0xC0000055
	statusDeletePending          = 0xC0000056
	statusNameInvalid            = 0xC0000033
	statusPathSyntaxBad          = 0xC000003B
	statusNoSuchFile             = 0xC000000F
	statusNoMediaInDevice        = 0xC0000013
	statusLogonFailure           = 0xC000006D
	statusAccountRestriction     = 0xC000006E
	statusPasswordExpired        = 0xC0000071
	statusAccountDisabled        = 0xC0000072
	statusNoSuchUser             = 0xC0000064
	statusWrongPassword          = 0xC000006A
	statusLogonTypeNotGranted    = 0xC000015B
	statusAccountExpired         = 0xC0000193
	statusPasswordMustChange     = 0xC0000224
	statusAccountLockedOut       = 0xC0000234
	statusDiskFull               = 0xC000007F
	statusQuotaExceeded          = 0xC0000044
	statusMediaWriteProtected    = 0xC00000A2
	statusNetworkNameDeleted     = 0xC00000C9
	statusBadNetworkName         = 0xC00000CC
	statusRequestNotAccepted     = 0xC00000D0
	statusTooManySessions        = 0xC00000CE
	statusInsufficientResources  = 0xC000009A
	statusInsuffServerResources  = 0xC0000205
	statusDirectoryNotEmpty      = 0xC0000101
	statusFileIsADirectory       = 0xC00000BA
	statusNotADirectory          = 0xC0000103
	statusFileClosed             = 0xC0000128
	statusUserSessionDeleted     = 0xC0000203
	statusNetworkSessionExpired  = 0xC000035C
	statusConnectionDisconnected = 0xC000020C
	statusConnectionReset        = 0xC000020D
	statusIOTimeout              = 0xC00000B5
	statusObjectNameCollision    = 0xC0000035
	statusNotSupported           = 0xC00000BB
	statusInvalidDeviceRequest   = 0xC0000010
	statusInvalidParameter       = 0xC000000D
	statusMoreProcessing         = 0xC0000016
	statusUnexpectedIOError      = 0xC00000E9
)

// kindOfStatus returns what a status code means, or nil.
func kindOfStatus(code uint32) error {
	switch code {
	case statusSharingViolation, statusLockConflict, statusLockNotGranted, statusDeletePending:
		return ErrInUse
	case statusNameInvalid, statusPathSyntaxBad:
		return ErrName
	case statusNoSuchFile:
		return fs.ErrNotExist
	case statusObjectNameCollision:
		return fs.ErrExist
	case statusLogonFailure, statusNoSuchUser, statusWrongPassword:
		return ErrCredentials
	case statusPasswordExpired, statusPasswordMustChange:
		return ErrExpired
	case statusAccountDisabled, statusAccountExpired, statusAccountLockedOut, statusAccountRestriction, statusLogonTypeNotGranted:
		return ErrAccount
	case statusDiskFull, statusQuotaExceeded:
		return ErrFull
	case statusMediaWriteProtected:
		return ErrReadOnly
	case statusBadNetworkName:
		return ErrNoShare
	case statusRequestNotAccepted, statusTooManySessions, statusInsufficientResources, statusInsuffServerResources:
		return ErrBusy
	case statusDirectoryNotEmpty:
		return ErrNotEmpty
	case statusFileIsADirectory:
		return ErrIsDir
	case statusNotADirectory:
		return ErrNotDir
	case statusNetworkNameDeleted, statusFileClosed, statusUserSessionDeleted, statusNetworkSessionExpired,
		statusConnectionDisconnected, statusConnectionReset, statusIOTimeout:
		return ErrConnectionLost
	}
	return nil
}

// kindOf returns what an error of the library or the network means. What it
// doesn't know it calls ErrProtocol when the library rejected an answer, and
// otherwise nil.
func kindOf(err error) error {
	if e, ok := errors.AsType[*smb2.ResponseError](err); ok {
		return kindOfStatus(e.Code)
	}
	if _, ok := errors.AsType[*smb2.InvalidResponseError](err); ok {
		return ErrProtocol
	}
	// TransportError has no Unwrap, and ContextError is only seen after the
	// connection was closed by us.
	if _, ok := errors.AsType[*smb2.TransportError](err); ok {
		return ErrConnectionLost
	}
	if _, ok := errors.AsType[*smb2.ContextError](err); ok {
		return ErrConnectionLost
	}
	for _, kind := range []error{
		fs.ErrNotExist, fs.ErrExist, fs.ErrPermission, io.EOF, context.Canceled, context.DeadlineExceeded,
	} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return nil
}

// own is true for errors that name their kind already.
func own(err error) bool {
	_, ok := errors.AsType[*Error](err)
	return ok
}

// fail wraps an error of the library for the caller. A nil err gives nil.
func fail(op, target string, err error) error {
	switch {
	case err == nil:
		return nil
	case own(err), err == context.Canceled, err == context.DeadlineExceeded:
		return err
	}
	kind, cause := kindOf(err), err
	for _, k := range []error{ErrProtocol, ErrGuest, ErrNotSealed, ErrDialect, ErrStale, ErrName, ErrIsDir, ErrNotDir, ErrInUse, ErrClosed, ErrReadOnly, ErrConnectionLost} {
		if errors.Is(err, k) {
			kind = k
			break
		}
	}
	if kind == nil {
		return &Error{Op: op, Target: target, Kind: errServer, Err: innermost(cause)}
	}
	return &Error{Op: op, Target: target, Kind: kind, Err: innermost(cause)}
}

// errServer stands for a refusal that we have no better word for; the cause
// has the server's own.
var errServer = errors.New("the server refuses")

// errServerClosed stands for the io.EOF of a connection.
var errServerClosed = errors.New("the server closed it")

// innermost strips the library's PathError and LinkError, which repeat the
// operation and the path in the server's notation.
func innermost(err error) error {
	for {
		switch e := err.(type) {
		case *fs.PathError:
			err = e.Err
		case *os.LinkError:
			err = e.Err
		case *smb2.TransportError:
			if errors.Is(e.Err, io.EOF) || errors.Is(e.Err, io.ErrUnexpectedEOF) {
				return errServerClosed // not the end of a file
			}
			err = e.Err
		default:
			return err
		}
	}
}

// dialKind returns what a failed TCP connection means.
func dialKind(err error) error {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return ErrRefused
	}
	if e, ok := errors.AsType[*net.DNSError](err); ok && e.IsNotFound {
		return ErrUnreachable
	}
	return ErrUnreachable
}

// target writes //server/share/path.
func target(server, share, path string) string {
	var b strings.Builder
	b.WriteString("//")
	b.WriteString(server)
	for _, part := range []string{share, path} {
		if part != "" && part != "." {
			b.WriteByte('/')
			b.WriteString(strings.Map(func(r rune) rune {
				if r < 0x20 || r == 0x7f {
					return '?' // a name with control characters must not write to a terminal
				}
				return r
			}, part))
		}
	}
	return b.String()
}
