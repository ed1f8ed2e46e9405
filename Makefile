# Underlay. `make` alone says what there is to make.
.SILENT:
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help lab lab-down test lint bench docs shim apiserver runtimes need-lab need-test need-bench
.SHELLFLAGS := -euc
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
# The tests in parts, which run beside each other: most of a test's time is waiting. In each what is cheap comes first.
PARTS := cluster racks rest
cluster := $(addprefix tests/,runtime cluster)
racks := $(addprefix tests/,bgp e2e)
rest := $(addprefix tests/,unit contract netns kube)
CODE := agent bench cni ctl ipam lab manifests store tests
# Namespaces are root's to make; anybody is root in a user namespace of his own.
AS_ROOT = $(shell unshare --mount --net --pid --fork true 2>/dev/null || echo unshare --user --map-root-user)

help: ## this list
	awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-11s%s\n", $$1, $$2}' Makefile

lab: need-lab $(VENV)/.lab $(if $(findstring kube,$(ARGS)),$(VENV)/.kube) $(if $(findstring cluster,$(ARGS)),need-test $(VENV)/.kube) build/underlay-shim ## a virtual rack on this machine (ARGS="--racks 3 --nodes 2 --pods 3", ARGS="--store kube", ARGS="--cluster")
	$(if $(findstring kube,$(ARGS)),$(BIN)/python lab/kube/build.py >/dev/null)
	$(if $(findstring cluster,$(ARGS)),$(BIN)/python lab/kube/build.py --node >/dev/null; $(MAKE) image)
	exec $(BIN)/underlay-lab up $(ARGS)

lab-down: need-lab $(VENV)/.lab ## takes the rack away
	exec $(BIN)/underlay-lab down $(ARGS)

test: need-test lint apiserver runtimes image ## everything: lint, and all tests (TESTS=tests/kube ARGS="-k block")
	# In a user namespace everybody is called root: without this, one user's /tmp/pytest-of-root is in the others' way.
	if [ "$$(id -u)" != 0 ]; then export PYTEST_DEBUG_TEMPROOT=/tmp/ul-$$(id -u); mkdir -p -m 700 "$$PYTEST_DEBUG_TEMPROOT"; fi
	run() { $(AS_ROOT) $(BIN)/python -m pytest -q "$$@" $(ARGS); }
	if [ -n "$(TESTS)" ]; then run $(TESTS); exit; fi
	$(foreach part,$(PARTS),run $($(part)) >build/test-$(part).log 2>&1 & $(part)=$$!;)
	codes=
	$(foreach part,$(PARTS),wait $$$(part) && codes="$$codes 0" || codes="$$codes $$?"; cat build/test-$(part).log;)
	# 5: ARGS chose no test of this part; of all parts is a slip.
	case " $$codes " in *" 0 "*) ;; *) exit 1 ;; esac
	for code in $$codes; do [ $$code = 0 ] || [ $$code = 5 ] || exit 1; done

lint: need-lab $(VENV)/.test ## ruff, mypy, import-linter
	$(BIN)/ruff check --quiet $(CODE)
	$(BIN)/ruff format --quiet --check $(CODE) || { echo "ruff format $(CODE)  # makes it so" >&2; exit 1; }
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports >build/lint-imports.log || { cat build/lint-imports.log; exit 1; }

bench: need-bench $(VENV)/.lab build/underlay-shim ## a table of figures, and build/bench.json
	exec $(AS_ROOT) $(BIN)/python -m bench $(ARGS)

docs: need-lab $(VENV)/.test ## checks the documentation against the program
	exec $(BIN)/python -m pytest -q tests/unit/test_docs.py

.PHONY: image
image: $(VENV)/.test build/underlay-shim ## the container image as build/underlay-image.tar, made without an engine
	exec $(BIN)/python -m manifests.image build/underlay-image.tar

shim: build/underlay-shim ## the program that a container runtime executes: static, 13 KB

.PHONY: shim-arm64
shim-arm64: build/underlay-shim-arm64 ## the same for arm64, where aarch64-linux-gnu-gcc is

apiserver: need-test $(VENV)/.test ## etcd, API server, controller-manager, and a node's kubelet: built once, in about 6 minutes
	exec $(BIN)/python lab/kube/build.py --node >/dev/null

runtimes: need-test $(VENV)/.test
	$(BIN)/python -m tests.runtime.sid >/dev/null
	$(BIN)/python -m tests.runtime.cnitool >/dev/null
	exec $(BIN)/python -m tests.cluster.helm >/dev/null

need-lab need-test need-bench: need-%: | build
	exec sh lab/prepare.sh $* $(if $(findstring --tor frr,$(subst =, ,$(ARGS))),frr)

# A stamp says for which setup.cfg and pyproject.toml the environment was made. The others include the lab's.
$(VENV)/.lab: EXTRA :=
$(VENV)/.kube: EXTRA := [kube]
$(VENV)/.test: EXTRA := [test]
$(VENV)/.lab $(VENV)/.kube $(VENV)/.test: setup.cfg pyproject.toml | need-lab build
	echo "python: $(VENV) with what setup.cfg asks for$(if $(EXTRA), and $(EXTRA))"
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.$(EXTRA)' >build/pip.log 2>&1 || { cat build/pip.log; exit 1; }
	touch $(VENV)/.lab $@

# Without a C library, so that any gcc builds it for any machine that linux.h knows.
build/underlay-shim: cni/shim/shim.c cni/shim/linux.h cni/shim/flags | need-lab
	gcc @cni/shim/flags -o $@ $<

build/underlay-shim-arm64: cni/shim/shim.c cni/shim/linux.h cni/shim/flags | build
	aarch64-linux-gnu-gcc @cni/shim/flags -o $@ $<

build:
	mkdir -p build
