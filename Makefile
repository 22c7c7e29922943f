# `make quickstart` runs the whole loop; `make test` runs the tests; `make check` the linters.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-slow check browser clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into .venv and run the whole loop on the bundled example (minutes)"
	@echo "make test         install what the tests need and run them"
	@echo "make test-slow    those that take long: machines that go down, memory that runs out (about twenty minutes)"
	@echo "make check        format, lint, types and import rules"
	@echo "make clean        remove .venv and caches; .regraft/ (your runs) stays"

$(VENV)/bin/python:
	@echo "── creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras, so that nothing is installed twice. A file becomes bytecode when it is first
# imported, not before: few of these packages' files ever are, and all of them take more than a minute.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar on --no-compile \
  -c constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "── installing Regraft (about 2 GB of packages; a few minutes on a slow line)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "── installing Regraft, and what the tests and checks need (about 2 GB of packages)"
	$(INSTALL) -e '.[test,dev]'
	@touch $(VENV)/.installed $@

quickstart: $(VENV)/.installed
	@echo "── running the loop: regraft quickstart"
	$(BIN)/regraft quickstart

# The browser tests drive Debian's Chromium; elsewhere install one, or they are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    echo "── installing Chromium for the browser tests"; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	  else echo "── no Chromium: the browser tests will be skipped"; fi

# A file at a time to each of two processes, those first that wait longest for others.
test: $(VENV)/.installed-test browser
	@echo "── running the tests"
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder \
	  tests/e2e tests/jobs tests/serving tests/core tests/monitoring

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
