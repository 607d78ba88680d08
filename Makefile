# ide49-backup: `make run` shows it working, `make test` proves it.

SHELL := /bin/bash
GO    ?= go
BIN   := bin/ide49-backup
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)

# Debian packages that the tests use, a C compiler for the race detector among
# them. A test that lacks one fails with its name.
PACKAGES := acl attr borgbackup btrfs-progs busybox-static cryptsetup-bin dosfstools e2fsprogs exfatprogs fdisk fuse3 \
	gcc git iproute2 kmod libc6-dev mount ntfs-3g qemu-system-x86 restic rsync samba smbclient util-linux xfsprogs xz-utils
# More for the longer runs of the virtual machine.
SOAK_PACKAGES := f2fs-tools genisoimage udftools

.PHONY: run build test lint bench fuzz vuln vm-soak soak packages clean

# Take a snapshot with the built-in defaults: of the volumes below
# /service-config into /backup, or of an example tree where there are none.
run: build
	@$(BIN) demo

build:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/ide49-backup

test: packages lint
	$(GO) test -race -timeout 25m ./...

lint:
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt -w these files:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	@out=$$($(GO) tool deadcode -test ./...); if [ -n "$$out" ]; then echo "nothing reaches this code:"; echo "$$out"; exit 1; fi

# Compare with Debian's restic and borgbackup; a report, not a test.
bench: packages build
	$(GO) run ./integration/bench -ours $(BIN)

# Every fuzz target for FUZZTIME each.
FUZZTIME ?= 10s
fuzz:
	@set -e; for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
	    echo "== $$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$pkg; \
	  done; \
	done

# Longer runs: drives in the virtual machine, bit rot.
vm-soak: PACKAGES += $(SOAK_PACKAGES)
vm-soak: packages
	$(GO) test -count=1 -v -timeout 3h ./integration/vm -soak 20

soak: packages
	$(GO) test -count=1 -v -timeout 1h ./backup/check -run BitRot -rot 1000

# Known faults in what we depend on; needs a network.
vuln:
	$(GO) tool govulncheck ./...

# Install what the tests need, when that is possible and something is missing.
packages:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'install ok installed' || echo $$p; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ $$(id -u) != 0 ]; then echo "install these Debian packages as root: "$$missing; exit 1; fi; \
	echo "installing "$$missing; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 $$missing >/dev/null

clean:
	rm -rf bin dist example
