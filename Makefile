# make demo   set up and run the main job on this machine
# make test   set up, check and run every test
# make chaos      a real fleet under random faults for half an hour (quick: make chaos ARGS="--minutes 3")
# make crashes   every process killed at every point where it could matter, on a real fleet (half an hour)
# make simulate   10,000 simulated fleets with all faults, on all cores (some 20 minutes on two; quick: make simulate SEEDS=1-100)
# make fuzz   a million hostile inputs for every target that reads foreign bytes (hours; quick: make fuzz ARGS='--runs 10000')
# make docs       the pages as a site that can be read offline: dist/site/index.html
# make package   a wheel and a Debian package into dist/; make test-install   that package on a clean Debian with systemd (root, minutes)
# make test-store   a job by S3 beside a narrow broker, and the same one without: deaths, fallback, the same bits (minutes)
# make bench-transfer   bulk over a real broker: rate, fairness, long links, one model to a hundred agents (minutes)
# make bench-rounds   what a round costs beside its training; Flower and NVFlare for the same (half an hour; quick: make bench-rounds ARGS=--quick)
# make bench-scale   1,000 live agents, 10,000 on the control plane, and how cost grows: figures, tables and plots (an hour; goes on where it was)
# make bench-aggregation   the sum of 100 agents at the shape of Llama-7B: time, memory, error (ten minutes)
# make bench-wire   bytes beside final loss for every type in which updates travel (a quarter of an hour)
# make bench-training   what the agent adds to training: its trainer beside the same QLoRA loop on PEFT (an hour or more)
# make bench-pipeline   fedpipe beside published baselines on a virtual fleet (an hour; quick: make bench-pipeline ARGS=--quick)
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench-transfer bench-rounds bench-scale bench-wire bench-training bench-aggregation bench-pipeline simulate fuzz chaos crashes docs clean

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

test: setup mosquitto chromium check
	scripts/test

.PHONY: test-store
test-store: setup mosquitto
	FEDPIPE_STORE_TEST=1 OMP_NUM_THREADS=1 scripts/test tests/e2e/test_by_store.py

.PHONY: mosquitto
mosquitto:
	@PATH="$$PATH:/usr/sbin" command -v mosquitto >/dev/null || scripts/apt-install mosquitto

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || scripts/apt-install chromium

bench-transfer: setup mosquitto
	$(VENV)/bin/python -m bench.transfer_live $(ARGS)

bench-rounds: setup mosquitto
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.rounds $(ARGS)

bench-scale: setup mosquitto
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.scale $(ARGS)
	$(VENV)/bin/python scripts/draw_docs.py

bench-pipeline: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.pipeline $(ARGS)

bench-aggregation: setup
	OPENBLAS_NUM_THREADS=1 $(VENV)/bin/python -m bench.aggregation --dense $(ARGS)

bench-wire: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.wire $(ARGS)

bench-training: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.training $(ARGS)

chaos: setup mosquitto
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m chaos $(ARGS)

crashes: setup mosquitto
	FEDPIPE_CRASHES=all OMP_NUM_THREADS=1 scripts/test tests/e2e/test_crashes.py $(ARGS)

simulate: setup
	$(VENV)/bin/fedpipe simulate --seeds $(or $(SEEDS),1-10000)

fuzz: setup
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz.run $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

package: setup
	scripts/package

test-install: setup
	@command -v debootstrap >/dev/null || scripts/apt-install debootstrap
	@command -v systemd-nspawn >/dev/null || scripts/apt-install systemd-container
	FEDPIPE_INSTALL_TEST=1 OMP_NUM_THREADS=1 scripts/test tests/deploy/test_install.py

clean:
	rm -rf $(VENV) dist build
