# Two commands on a fresh machine: `make figures` and `make test`. Each sets up its own environment first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PROFILE ?= quick
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
PYTHON ?= python3
READY := .venv/.ready
# Programs are called as modules: a script of .venv/bin names its interpreter in its first line, and that line fails
# where the path holds a dollar sign or is long.
PY := .venv/bin/python
SNAKEMAKE := $(PY) -m snakemake --cores $(CORES) --rerun-triggers mtime --config 'profile=$(PROFILE)'
export OMP_WAIT_POLICY := PASSIVE
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: figures test docs outputs lab parameters readme dry-run benchmarks constraints

# --nolock: Snakemake's lock stays behind after kill -9 or a power cut. The Snakefile has one that does not.
figures: $(READY)  ## every figure of a suite: make figures PROFILE=small CORES=2
	@$(SNAKEMAKE) --resources gpu=1 --nolock --rerun-incomplete --keep-going --prioritize first_figure \
	    --quiet all -- first_figure all < /dev/null
	@echo 'Open paper_figures/$(PROFILE)/index.html'

dry-run: $(READY)  ## what `make figures` would do
	$(SNAKEMAKE) --nolock -n

test: $(READY)  ## every check, in the order in which they make sense
	bash tests/gates.sh

# The allocator settings of the Snakefile, so that what is timed is what `make figures` runs.
benchmarks: export THP_MEM_ALLOC_ENABLE := 1
benchmarks: export MALLOC_MMAP_MAX_ := 0
benchmarks: export MALLOC_TRIM_THRESHOLD_ := 4000000000
benchmarks: $(READY)  ## ratios of speed on this machine, on one thread -> paper_figures/benchmarks.csv (about 18 idle minutes)
	$(PY) -m papermill --no-progress-bar nbs/benchmarks.ipynb - > /dev/null < /dev/null

lab: $(READY)  ## read and run the notebooks
	$(PY) -m jupyterlab nbs

parameters: $(READY)  ## the parameters cells of the run notebooks from the dataclasses
	$(PY) tests/render_parameters.py

# The packages of the site are not among those of `make test`.
docs: $(READY)  ## the project as a static site -> _docs/site
	$(PY) -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,docs]'
	$(PY) docs/build.py

# Also a check of `make test`; `tests/outputs.py --write NOTEBOOK` renews them.
outputs: $(READY)  ## compares the stored outputs of the lessons with those of an execution (five minutes)
	OMP_NUM_THREADS=1 $(PY) tests/outputs.py

readme: $(READY)  ## README.md from nbs/index.ipynb
	$(PY) tests/render_readme.py

constraints: $(READY)  ## constraints.txt from what is installed: after an upgrade that passes `make test`
	$(PY) tests/render_constraints.py

# The versions of constraints.txt are those that were tested together; make figures CONSTRAINTS= takes the newest.
CONSTRAINTS ?= constraints.txt
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	touch $(READY)
