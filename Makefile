# Each target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := --dataset digits --arch alexnet --width 0.125 --v_threshold 0.5 --timestep 4 --batch_size 16 \
	--learning_rate 0.1 --end_iter 6 --valid_freq 3 --prune_percent 75 --prune_iterations 4 --output_dir runs/demo
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

.PHONY: help install demo report test test-all bench gpu lint clean

help:
	@echo "make install   $(VENV), which the other targets set up, too"
	@echo "make demo      IMP and a random ticket on handwritten digits, and their report"
	@echo "make report    tables, figures and one page from runs/"
	@echo "make test      the fast tests        make test-all   all tests        make lint   ruff"
	@echo "make bench     speed on the CPU against the authors' style; make bench ARGS=--quick"
	@echo "make gpu       is all right on this GPU, and how fast? one report, at most 12 minutes"
	@echo "make clean     removes $(VENV) and caches"

install: $(VENV)/ready

demo: $(VENV)/ready
	$(BIN)/python train_snn_laterewindlth.py $(DEMO) --rewinding_epoch 1
	$(BIN)/python train_snn_oneshot.py $(DEMO) --ticket random --sparsity_round 3
	$(BIN)/python report.py runs/demo --out runs/demo-report

report: $(VENV)/ready
	$(BIN)/python report.py runs/ --out report/

test: $(VENV)/ready-dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/ready-dev
	$(PYTEST)

bench: $(VENV)/ready
	$(BIN)/python benchmarks/speed.py $(ARGS)

gpu: $(VENV)/ready
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=... (found $$($(PYTHON) --version))"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/ready-dev: requirements-dev.txt requirements-cluster.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
