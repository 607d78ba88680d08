module github.com/iot49/ide49-backup

go 1.26.0

require (
	github.com/moby/sys/mountinfo v0.7.3
	github.com/pilebones/go-udev v0.9.1
	golang.org/x/sys v0.49.0
)
