# Two commands for a newcomer: `make demo` and `make test`. Both build the environment first, in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test lint environment bench-peers clean

demo: $(VENV)/installed
	llmtrain prepare --config configs/demo_cosine.yaml
	deepspeed --num_gpus 2 launch/pretrain.py --config configs/demo_cosine.yaml $(DEMO_SET)
	deepspeed --num_gpus 2 launch/pretrain.py --config configs/demo_linear.yaml $(DEMO_SET)
	llmtrain compare runs/demo_cosine runs/demo_linear --png runs/demo.png

test: $(VENV)/installed-test
	python -m pytest -n 3 --dist worksteal

lint: $(VENV)/installed-test
	ruff check .
	ruff format --check .
	mypy

environment: $(VENV)/installed-test

# How fast beside others, each in an environment of its own under build/peers.
bench-peers: $(VENV)/installed-test
	python -m tests.benchmarks.peers.compare --out tests/benchmarks/results/peers.json

# torch first: with it in place, nothing else decides which build of it is taken. Compiled by all cores at once and not by
# pip, which takes one; what is written for another Python stays as it is.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[train]'
	$(COMPILE)
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(COMPILE)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
