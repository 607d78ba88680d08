package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// monitor speaks QMP, the machine protocol of qemu
// (https://www.qemu.org/docs/master/interop/qmp-spec.html): one JSON object
// per line each way, with events in between. It is not safe for concurrent
// use.
type monitor struct {
	conn   net.Conn
	in     *json.Decoder
	events []qmpMessage // that nobody has waited for yet
}

type qmpMessage struct {
	Return json.RawMessage `json:"return"`
	Error  *QMPError       `json:"error"`
	Event  string          `json:"event"`
	Data   struct {
		Device string `json:"device"`
	} `json:"data"`
}

// QMPError is qemu's refusal of a command.
type QMPError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *QMPError) Error() string { return e.Class + ": " + e.Desc }

// object is a JSON object of a command's arguments.
type object = map[string]any

func newMonitor(ctx context.Context, conn net.Conn) (*monitor, error) {
	q := &monitor{conn: conn, in: json.NewDecoder(conn)}
	defer guard(ctx, conn)()
	var greeting struct {
		QMP *json.RawMessage `json:"QMP"`
	}
	if err := q.in.Decode(&greeting); err != nil {
		return nil, fmt.Errorf("greeting of qemu: %w", err)
	}
	if greeting.QMP == nil {
		return nil, errors.New("greeting of qemu: not QMP")
	}
	return q, q.execute(ctx, "qmp_capabilities", nil)
}

// execute runs a command to its end.
func (q *monitor) execute(ctx context.Context, name string, args object) error {
	defer guard(ctx, q.conn)()
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments object `json:"arguments,omitempty"`
	}{name, args})
	if err != nil {
		return fmt.Errorf("qemu %s: %w", name, err)
	}
	if _, err := q.conn.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("qemu %s: %w", name, cause(ctx, err))
	}
	for {
		msg, err := q.next(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("qemu %s: %w", name, err)
		case msg.Event != "":
			q.events = append(q.events, msg)
		case msg.Error != nil:
			return fmt.Errorf("qemu %s %v: %w", name, args, msg.Error)
		default:
			return nil
		}
	}
}

// wait returns when qemu has told of the event on that device.
func (q *monitor) wait(ctx context.Context, event, device string) error {
	defer guard(ctx, q.conn)()
	for {
		for i, e := range q.events {
			if e.Event == event && e.Data.Device == device {
				q.events = append(q.events[:i], q.events[i+1:]...)
				return nil
			}
		}
		msg, err := q.next(ctx)
		if err != nil {
			return fmt.Errorf("qemu: waiting for %s of %s: %w", event, device, err)
		}
		if msg.Event != "" {
			q.events = append(q.events, msg)
		}
	}
}

func (q *monitor) next(ctx context.Context) (qmpMessage, error) {
	var msg qmpMessage
	if err := q.in.Decode(&msg); err != nil {
		return msg, cause(ctx, err)
	}
	return msg, nil
}

// guard makes reads and writes on conn end with ctx until the returned
// function is called.
func guard(ctx context.Context, conn net.Conn) (release func()) {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		conn.SetDeadline(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-ended
			conn.SetDeadline(time.Time{})
		}
	}
}

// cause prefers the reason of ctx to the time-out that it caused.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
