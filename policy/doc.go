// Package policy holds what the user decides: it reads the YAML
// configuration, finds the volumes to back up and what to leave out of them,
// and reads times as people write them.
//
// Everything that comes in is hostile until checked: the file, the names on
// the disk, the text of a time. A configuration is decoded strictly, and all
// its problems are reported together, each with its place in the file.
//
// Nothing here backs up, restores or deletes; the other rooms do, by what
// this one answers.
package policy
