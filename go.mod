module github.com/iot49/ide49-backup

go 1.26.0

require golang.org/x/crypto v0.58.0

require (
	github.com/klauspost/compress v1.20.3
	golang.org/x/sync v0.24.0
	golang.org/x/sys v0.49.0
)

require github.com/restic/chunker v0.4.0

require github.com/bmatcuk/doublestar/v4 v4.10.0
