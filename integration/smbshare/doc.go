// Package smbshare tests repositories and homes on a Samba share together, with
// a real smbd that fails again and again, and measures them beside smbclient.
package smbshare
