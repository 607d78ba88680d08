module github.com/iot49/ide49-backup

go 1.26.0
