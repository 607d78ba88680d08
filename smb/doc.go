// Package smb uses Samba and Windows shares without mounting them: a pool of
// sessions that reconnects by itself, and files, folders and free space of a
// share.
//
// It is a layer over github.com/hirochachacha/go-smb2 that adds what a
// service needs and the library lacks: no call blocks for longer than its
// limit, whatever the server and the network do; no answer of a hostile
// server crashes the process; every session is signed, guests are refused,
// and encryption that was asked for is enforced and not only requested;
// errors say what went wrong in words that a person can act on; all names
// that POSIX allows can be stored.
//
// What shares can't do shows through: names differ only by case are the same
// file, rename doesn't replace, and nothing can be renamed or removed while it
// is open.
package smb
