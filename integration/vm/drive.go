package vm

import (
	"context"
	"errors"
	"fmt"
)

// Kind is the way in which a drive hangs on the USB port.
type Kind int

const (
	Stick      Kind = iota // mass storage, bulk only: nearly every stick
	UAS                    // USB-attached SCSI: cases for disks
	CardReader             // a slot whose medium comes and goes
)

// Drive is a drive for the machine's USB port.
type Drive struct {
	ID       string // names the drive in Pull and the like; letters, digits and -
	Image    string // its content: a plain file of the host; "" only for an empty card reader
	Kind     Kind
	Serial   string // as the drive tells it; "" for none
	ReadOnly bool   // the write protection is on
}

// Plug plugs a drive in and returns at once; the guest needs about a second to
// find it.
func (m *Machine) Plug(ctx context.Context, d Drive) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.plug(ctx, d)
}

func (m *Machine) plug(ctx context.Context, d Drive) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("plug in %s: %w", d.ID, err)
		}
	}()
	if m.qmp == nil {
		return errors.New("the machine is closed")
	}
	if _, ok := m.plugged[d.ID]; ok {
		return errors.New("it is plugged in already")
	}
	if d.Image != "" {
		if err := m.openImage(ctx, d); err != nil {
			return err
		}
	}
	switch d.Kind {
	case Stick:
		args := object{"driver": "usb-storage", "id": d.ID, "bus": "xhci.0", "drive": node(d.ID)}
		if d.Serial != "" {
			args["serial"] = d.Serial
		}
		err = m.qmp.execute(ctx, "device_add", args)
	case UAS:
		err = m.plugAdapter(ctx, d, "usb-uas", false)
	case CardReader:
		err = m.plugAdapter(ctx, d, "usb-bot", true)
	}
	if err != nil {
		return err
	}
	m.plugged[d.ID] = d
	return nil
}

// plugAdapter plugs in an adapter with one disk. A guest asks for the disks
// once, when it sees the adapter, so the adapter is attached last.
func (m *Machine) plugAdapter(ctx context.Context, d Drive, driver string, removable bool) error {
	err := m.qmp.execute(ctx, "device_add", object{"driver": driver, "id": d.ID, "bus": "xhci.0", "attached": false})
	switch {
	case err != nil:
	case d.Image == "":
		err = m.addEmptySlot(ctx, d)
	default:
		err = m.addDisk(ctx, d, removable)
	}
	if err == nil {
		err = m.qmp.execute(ctx, "qom-set", object{"path": "/machine/peripheral/" + d.ID, "property": "attached", "value": true})
	}
	return err
}

// addDisk hangs the disk below the adapter d.ID.
func (m *Machine) addDisk(ctx context.Context, d Drive, removable bool) error {
	args := object{"driver": "scsi-hd", "id": d.ID + "-disk", "bus": d.ID + ".0", "removable": removable, "drive": node(d.ID)}
	if d.Serial != "" {
		args["serial"] = d.Serial
	}
	return m.qmp.execute(ctx, "device_add", args)
}

// addEmptySlot is addDisk for a slot without a card. Qemu makes no disk without
// a medium, so one is put in and taken out again, before the guest sees it.
func (m *Machine) addEmptySlot(ctx context.Context, d Drive) error {
	err := m.qmp.execute(ctx, "blockdev-add", object{"node-name": node(d.ID), "driver": "null-co", "size": 512, "read-zeroes": true})
	if err == nil {
		err = m.addDisk(ctx, d, true)
	}
	if err == nil {
		err = m.removeMedium(ctx, d.ID)
	}
	return err
}

func (m *Machine) removeMedium(ctx context.Context, id string) error {
	err := m.qmp.execute(ctx, "blockdev-open-tray", object{"id": id + "-disk", "force": true})
	if err == nil {
		err = m.qmp.execute(ctx, "blockdev-remove-medium", object{"id": id + "-disk"})
	}
	if err == nil {
		err = m.qmp.execute(ctx, "blockdev-del", object{"node-name": node(id)})
	}
	return err
}

// node is the name of a drive's content in qemu.
func node(id string) string { return id + "-node" }

func (m *Machine) openImage(ctx context.Context, d Drive) error {
	return m.qmp.execute(ctx, "blockdev-add", object{
		"node-name": node(d.ID), "driver": "raw", "read-only": d.ReadOnly,
		"file": object{"driver": "file", "filename": d.Image, "read-only": d.ReadOnly},
	})
}

// Pull pulls a drive out without a word to the guest. Afterwards its image
// holds exactly what had reached the drive, and nothing uses the image.
func (m *Machine) Pull(ctx context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.plugged[id]
	if !ok {
		return fmt.Errorf("pull out %s: it is not plugged in", id)
	}
	err := m.qmp.execute(ctx, "device_del", object{"id": id})
	if err == nil {
		err = m.qmp.wait(ctx, "DEVICE_DELETED", id)
	}
	if err == nil && d.Image != "" {
		err = m.qmp.execute(ctx, "blockdev-del", object{"node-name": node(id)})
	}
	if err != nil {
		return fmt.Errorf("pull out %s: %w", id, err)
	}
	delete(m.plugged, id)
	return nil
}

// Eject takes the card out of a card reader.
func (m *Machine) Eject(ctx context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.plugged[id]
	if !ok || d.Kind != CardReader || d.Image == "" {
		return fmt.Errorf("take the card out of %s: no card reader with a card", id)
	}
	err := m.removeMedium(ctx, id)
	if err != nil {
		return fmt.Errorf("take the card out of %s: %w", id, err)
	}
	d.Image = ""
	m.plugged[id] = d
	return nil
}

// Insert puts a card into a card reader that has none.
func (m *Machine) Insert(ctx context.Context, id, image string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d, ok := m.plugged[id]
	if !ok || d.Kind != CardReader || d.Image != "" {
		return fmt.Errorf("put a card into %s: no card reader without a card", id)
	}
	d.Image = image
	err := m.openImage(ctx, d)
	if err == nil {
		err = m.qmp.execute(ctx, "blockdev-insert-medium", object{"id": id + "-disk", "node-name": node(id)})
	}
	if err == nil {
		err = m.qmp.execute(ctx, "blockdev-close-tray", object{"id": id + "-disk"})
	}
	if err != nil {
		return fmt.Errorf("put a card into %s: %w", id, err)
	}
	m.plugged[id] = d
	return nil
}
