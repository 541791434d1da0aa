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

# torch first: with it in place, nothing else decides which build of it is taken.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
