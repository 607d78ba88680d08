package vm

import "testing"

func TestBench(t *testing.T) {
	r := newRig(t)
	r.plug(t, Drive{ID: "stick", Image: disk(t, "dos", Volume{Type: "vfat", Label: "WARM"})})
	r.sh(t, "guest await /mnt/WARM; sleep 2")
	t.Log(r.sh(t, "guest bench; echo; cat /run/drives /run/witness"))
}
