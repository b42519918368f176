# Everything from a fresh Debian 12 or 13, as root: `make demo` and `make test` set up by themselves.

VENV ?= .venv
PYTEST_ARGS ?=
CHAOS_ARGS ?=
BENCH_ARGS ?=
UV ?= uv
BIN := $(VENV)/bin
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links

.PHONY: help setup demo demo-vm test test-unit test-vm image check chaos chaos-quick bench bench-quick lock clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*  ## /\1: /p' $(MAKEFILE_LIST)

setup:  ## packages, users and the Python environment; quick when there is nothing to do
	@VENV="$(VENV)" image-build/setup.sh

demo: setup  ## an exploit between two VMs, hairpinned, dropped and recorded
	@$(BIN)/python -m appliance.lab.demo

demo-vm: setup  ## the same with the real image under QEMU as the service host (docs/demo-vm.md; IMAGE=path)
	@image-build/setup-image.sh
	@[ -n "$${IMAGE:-}" ] || ls image-build/out/hairpin_*.raw >/dev/null 2>&1 || $(MAKE) image
	@$(BIN)/python -m appliance.lab.demo_vm

check: setup  ## style, types and the arrows between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# By file, and not sorted by the number of tests: the longest begin first (tests/conftest.py).
SIDE_BY_SIDE := -n logical --dist loadfile --no-loadscope-reorder

test: check  ## all the checks and all the tests, those in the lab too, but not those of the image
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m '(not lab or side_by_side) and not vm' $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m 'lab and not side_by_side and not vm' $(PYTEST_ARGS)

test-unit: setup  ## the tests that need no lab
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not lab and not vm' tests/unit tests/golden $(PYTEST_ARGS)

# make hands all that it was given on its command line to what it starts: no shell reads it.
image: setup  ## the signed image of the service VM: image-build/out (docs/image.md; KEY= CERT= VERSION= OUT= TOOLS=new)
	@image-build/setup-image.sh
	@image-build/build.sh

test-vm: setup image  ## the tests of the image, built and booted under QEMU
	$(BIN)/python -m pytest -m vm $(PYTEST_ARGS)

chaos: setup  ## faults on real parts, each with its figures (half an hour): build/chaos.json
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

chaos-quick: setup  ## a part of it, in under five minutes: build/chaos-quick.json
	$(BIN)/python -m tests.chaos --quick --tries 3 $(CHAOS_ARGS)

bench: setup  ## the product beside its peers (about 10 minutes): build/bench.json
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

bench-quick: setup  ## one short round of it, which asserts no times: build/bench-quick.json
	@$(BIN)/python -m tests.bench --quick $(BENCH_ARGS)

lock:  ## lock the dependencies again (needs uv; UPGRADE=--upgrade takes newer ones)
	$(COMPILE) $(UPGRADE) -o requirements.lock pyproject.toml
	$(COMPILE) $(UPGRADE) --extra dev -c requirements.lock -o requirements-dev.lock \
		pyproject.toml requirements-build.in
	$(COMPILE) $(UPGRADE) -c requirements-dev.lock -o requirements-build.lock requirements-build.in

clean:  ## remove what was built and cached; the lab with it, if one is up
	-@[ ! -x $(BIN)/hairpin ] || $(BIN)/hairpin lab down
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find appliance steering tests -name __pycache__ -type d -prune -exec rm -rf {} +
