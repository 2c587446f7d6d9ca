# Two commands matter: `make demo` and `make test`. Each makes .venv by itself.
VENV := .venv
READY := $(VENV)/.ready
DATA ?= scenes
OUTPUT ?= runs/demo
MINUTES ?= 5
# Two processes of one thread each; one that dies ends the run, for which xdist would otherwise wait for ever.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n 2 --dist loadfile --max-worker-restart 0
DEMO := $(VENV)/bin/routeseg demo --config configs/$(DATA)/small_cpu.yaml --output $(OUTPUT)

.PHONY: demo test test-all check bench clean

demo: $(READY)  ## train, evaluate, report: make demo [DATA=camvid ROOT=folder] [MINUTES=5]
	$(DEMO) $(if $(ROOT),--data.root "$(ROOT)") --minutes $(MINUTES)

test: $(READY)  ## the tests, about 4 minutes on 2 cores
	$(PYTEST)

test-all: $(READY)  ## also the slow ones
	$(PYTEST) -m ""

check: $(READY)  ## lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)  ## training step: images per second and memory, to results/
	$(VENV)/bin/python benchmarks/training.py

# torch first and pinned: any other way to ask for it may bring gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard src/routeseg/engine/kernels/*)
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info src/*.egg-info src/routeseg/engine/*.so
