# Two commands matter: `make demo` and `make test`. Each makes .venv by itself.
VENV := .venv
DOCS := .venv-docs
READY := $(VENV)/.ready
DATA ?= scenes
OUTPUT ?= runs/demo
MINUTES ?= 5
KERNELS := $(wildcard src/routeseg/engine/kernels/*)
NATIVE_TESTS ?= $(addprefix tests/test_,compiled.py places_kernels.py fused.py kernels_benchmark.py)
PYTEST := $(VENV)/bin/pytest -q -n 2 --dist loadfile
DEMO := $(VENV)/bin/routeseg demo --config $(DATA)/small --output $(OUTPUT)

.PHONY: demo test test-all browser check check-native bench docs clean

demo: $(READY)  ## train, evaluate, report: make demo [DATA=camvid ROOT=folder] [MINUTES=5]
	$(DEMO) $(if $(ROOT),--data.root "$(ROOT)") --minutes $(MINUTES)

test: $(READY)  ## the tests, five minutes on 2 cores
	$(PYTEST)

test-all: $(READY)  ## also the slow ones
	$(PYTEST) -m ""

browser:  ## Debian's Chromium, in which the explorer is tested; needs root
	command -v chromium || { apt-get -q update && apt-get -q install -y --no-install-recommends chromium fonts-dejavu-core; }

check: $(READY)  ## lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(KERNELS)

# Leaks are not looked for: Python and PyTorch leave memory to the end of the process. libstdc++ stands beside libasan,
# so that exceptions find it before Python has loaded anything that needs it.
SANITIZED := build/sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
PRELOADED = $(shell c++ -print-file-name=libasan.so) $(shell c++ -print-file-name=libstdc++.so)
check-native: $(READY)  ## the engine's tests on kernels that stop at a wrong address or undefined behaviour
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check "setuptools>=77"
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(VENV)/bin/python setup.py -q build_ext \
		--parallel 2 --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	ROUTESEG_KERNELS=$(CURDIR)/$(SANITIZED)/routeseg/engine LD_PRELOAD="$(PRELOADED)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(VENV)/bin/pytest -q -s $(NATIVE_TESTS)

bench: $(READY)  ## training step: images per second and memory, to results/
	$(VENV)/bin/python benchmarks/training.py

docs: $(DOCS)/.ready  ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q --strict

# What the extra `docs` names and nothing else: the package is read, not imported.
$(DOCS)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], \
		sep="\n")' > $(DOCS)/docs.txt
	$(DOCS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -r $(DOCS)/docs.txt
	touch $@

# torch first and pinned: any other way to ask for it may bring gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt setup.py $(KERNELS)
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) runs build *.egg-info src/*.egg-info src/routeseg/engine/*.so
