# Every target sets up what it needs: a virtual environment in .venv with the pinned packages.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export RAY_USAGE_STATS_ENABLED := 0
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

.PHONY: demo deploy-demo test lint bench faults slow install wheelhouse clean

demo: $(STAMP)
	$(BIN)/agssd-sim run configs/simulation.yaml

# A coordinator, nginx and three hospitals as separate processes on this machine. Needs nginx.
deploy-demo: $(STAMP)
	deploy/demo.sh

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not deploy" tests
	$(BIN)/python -m pytest -m "deploy and not slow" tests

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/agssd-sim check configs/*.yaml

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Every fault of docs/reliability.md, as often as its row says; hours on a busy machine.
faults: $(STAMP)
	$(BIN)/python -m faults

install: $(STAMP)

# For machines without a network; see docs/deploy.md.
wheelhouse: $(STAMP)
	PYTHON=$(BIN)/python deploy/wheelhouse.sh wheelhouse tracking

# torch first and by its exact version: a range would let pip bring another build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv runs build *.egg-info
