package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	product "github.com/iot49/ide49-backup/mounts"
)

// socket is where "guest drives" answers.
const socket = "/run/guest-drives"

// An event is one line in the log of "guest drives".
type event struct {
	Microseconds int64
	Kind         string         // ready, changed, removed, failed, ended
	Drive        *product.Drive `json:",omitempty"`
	Loss         bool           `json:",omitempty"`
	Error        string         `json:",omitempty"`
}

// drives runs the drive loop of the service until ctx is done.
func drives(ctx context.Context, state, file string) error {
	l, err := openLog(file)
	if err != nil {
		return err
	}
	defer l.f.Close()
	var logErr error // by callbacks, one at a time
	put := func(e event) {
		e.Microseconds = now()
		logErr = errors.Join(logErr, l.put(e))
	}
	config := product.DriveConfig{StateDir: state, Options: product.DriveOptions{Owner: 1000, Group: 100}}
	// Rules and the like are for the tests to give.
	if b, err := os.ReadFile(filepath.Join(state, "config.json")); err == nil {
		if err := json.Unmarshal(b, &config); err != nil {
			return fmt.Errorf("config.json: %w", err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	d, err := product.NewDrives(config, product.DriveEvents{
		Changed: func(d product.Drive) { put(event{Kind: "changed", Drive: &d}) },
		Removed: func(d product.Drive, loss product.Loss) {
			put(event{Kind: "removed", Drive: &d, Loss: loss == product.PossibleLoss})
		},
		Failed: func(err error) { put(event{Kind: "failed", Error: err.Error()}) },
	})
	if err != nil {
		return err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	door, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { door.Close() })
	defer stop()
	var answering sync.WaitGroup
	answering.Go(func() {
		for {
			c, err := door.Accept()
			if err != nil {
				return
			}
			answering.Go(func() { answer(ctx, d, c) })
		}
	})
	err = d.Run(ctx)
	door.Close()
	answering.Wait()
	put(event{Kind: "ended", Error: fmt.Sprint(err)})
	return errors.Join(err, logErr)
}

// ejected is the answer to eject.
type ejected struct {
	product.Ejected
	Error string // "<nil>" for none
}

// answer reads one line of JSON, the words of a request, and writes the answer.
func answer(ctx context.Context, d *product.Drives, c net.Conn) {
	defer c.Close()
	var words []string
	if err := json.NewDecoder(c).Decode(&words); err != nil {
		return
	}
	var reply any
	switch strings.Join(words[:1], "") {
	case "list":
		reply = d.List()
	case "eject":
		e, err := d.Eject(ctx, words[len(words)-1], product.EjectOptions{})
		reply = ejected{e, fmt.Sprint(err)}
	default:
		reply = map[string]string{"Error": "unknown request " + words[0]}
	}
	json.NewEncoder(c).Encode(reply) // the asker may have gone
}

// ask prints the answer to a request.
func ask(words []string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := json.NewEncoder(c).Encode(words); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, bufio.NewReader(c))
	return err
}
