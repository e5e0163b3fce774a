# Two commands on a fresh machine: `make figures` and `make test`. Each sets up its own environment first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PROFILE ?= quick
CORES ?= $(shell nproc)
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
export OMP_WAIT_POLICY := PASSIVE
export PATH := $(BIN):$(PATH)

.PHONY: figures test lab readme dry-run benchmarks

figures: $(READY)  ## every figure of a profile: make figures PROFILE=small CORES=2
	for goal in first_figure all; do \
	    snakemake --cores $(CORES) --resources gpu=1 --rerun-triggers mtime --rerun-incomplete --keep-going \
	        --config profile=$(PROFILE) --quiet rules -- $$goal < /dev/null; \
	done
	@echo "Open paper_figures/$(PROFILE)/index.html"

dry-run: $(READY)  ## what `make figures` would do
	snakemake --cores $(CORES) -n --rerun-triggers mtime --config profile=$(PROFILE)

test: $(READY)  ## every check, in the order in which they make sense
	bash tests/gates.sh

# The allocator settings of the Snakefile, so that what is timed is what `make figures` runs.
benchmarks: export THP_MEM_ALLOC_ENABLE := 1
benchmarks: export MALLOC_MMAP_MAX_ := 0
benchmarks: export MALLOC_TRIM_THRESHOLD_ := 4000000000
benchmarks: $(READY)  ## ratios of speed on this machine, on one thread -> paper_figures/benchmarks.csv (five idle minutes)
	papermill --no-progress-bar nbs/benchmarks.ipynb - > /dev/null < /dev/null

lab: $(READY)  ## read and run the notebooks
	jupyter lab nbs

readme: $(READY)  ## README.md from nbs/index.ipynb
	python tests/render_readme.py

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet -e '.[dev]'
	touch $(READY)
