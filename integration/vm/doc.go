// Package vm boots a virtual machine with a USB port, so that tests can plug
// drives in and pull them out.
package vm
