# make demo   set up and run the main job on this machine
# make test   set up, check and run every test
# make bench-pipeline   fedpipe beside published baselines on a virtual fleet (an hour; quick: make bench-pipeline ARGS=--quick)
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench-pipeline clean

setup: $(STAMP)

# torch first and at its pinned version, so that no other requirement draws in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedpipe needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || scripts/apt-install python3-venv
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(VENV)/bin/fedpipe demo

check: setup
	scripts/check

test: setup mosquitto check
	scripts/test

.PHONY: mosquitto
mosquitto:
	@PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || scripts/apt-install mosquitto

bench-pipeline: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.pipeline $(ARGS)

clean:
	rm -rf $(VENV) dist build
