package main

import (
	"fmt"
	"os/exec"
	"time"

	"github.com/iot49/ide49-backup/udev"
)

func bench() error {
	for range 5 {
		s := time.Now()
		l, err := udev.List("/sys")
		fmt.Println("list", len(l), time.Since(s), err)
	}
	for range 5 {
		s := time.Now()
		err := exec.Command("blkid", "-p", "-o", "udev", "/dev/sda1").Run()
		fmt.Println("blkid", time.Since(s), err)
	}
	for range 3 {
		s := time.Now()
		err := exec.Command("busybox", "true").Run()
		fmt.Println("true", time.Since(s), err)
	}
	return nil
}
