# One command for everything: `make demo` shows it, `make test` proves it.
# Needs a POSIX shell, make and Python 3.11 or newer with pip; the rest goes into .venv, from hash-checked locks.

.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:

# Bytecode is kept, whatever the environment says: without it each of the many worker processes takes seconds longer.
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
INTEROP := .venv-interop
CLIENTS := tests/clients

# The first Python that fits. To choose another: make demo PYTHON=/path/to/python3.12
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(FITS)' 2>/dev/null && { echo "$$p"; break; }; done)

# The locks are complete, so there is nothing to resolve; wheels only, because building a source distribution would
# fetch build requirements that no hash protects; not compiled, because most of what is installed is never imported.
PIP_INSTALL := $(PY) -m pip install -qq --no-deps --no-compile --disable-pip-version-check --no-input
LOCKED := $(PIP_INSTALL) --require-hashes --only-binary=:all:

.PHONY: help demo test test-quick test-clients check format conformance interop chaos bench fuzz lock clean

help: ## Show this list
	@echo "Keepstream: a background worker for streaming LLM completions."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/demo ## Run jobs through real workers, kill one of them and watch, with nothing else installed
	@$(BIN)/keepstream demo $(ARGS)

# Twice as many processes as cores, because these tests wait much; which of them run together, tests/conftest.py says.
PYTEST := $(PY) -m pytest --numprocesses=auto --dist=loadgroup --no-loadscope-reorder

test: $(VENV)/dev ## Run all tests that need only Python, with real servers and real worker processes [ARGS=-x]
	@echo "Running the tests; they start their own Valkey and PostgreSQL."
	@$(PYTEST) --ignore=$(CLIENTS) $(ARGS)

test-quick: $(VENV)/dev ## Run the quick tests, in less than a minute [ARGS=-x]
	@$(PYTEST) -m "not slow" tests/unit tests/adapters $(ARGS)

# Whatever is absent is an error here; where pytest is called without make, the tests that need it are skipped.
test-clients: $(VENV)/dev $(CLIENTS)/node_modules/.package-lock.json ## Test with other people's clients, in Node and a browser [ARGS=-x]
	@REQUIRE_DEBIAN_PACKAGES=1 $(PYTEST) $(CLIENTS) $(ARGS)

check: $(VENV)/dev ## Formatting, lint, types, layers, and that schemas and migrations match the code
	$(PY) -m pip check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PY) -m keepstream.schemas.generate --check
	$(PY) -m pytest -q tests/adapters/test_migrations.py

format: $(VENV)/dev ## Format the code and fix what can be fixed
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

conformance: $(VENV)/dev ## Decode recorded and hand-made provider streams [CASES=file.jsonl]
	@$(PY) -m tests.conformance $(if $(CASES),"$(CASES)")

interop: $(VENV)/dev $(INTEROP)/servers ## Stream from other people's OpenAI-compatible servers and compare
	@$(PY) -m tests.interop $(INTEROP)

chaos: $(VENV)/dev ## Kill workers, Redis and the provider at random, then count the jobs [SEED=1 JOBS=200]
	@$(PY) -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

bench: $(VENV)/bench ## Measure this worker, the usual tutorial and the bare floor [ARGS=--quick]
	@$(PY) -m benchmarks $(ARGS)

fuzz: $(VENV)/dev ## Feed both decoders broken and invented streams, longer than the tests do [SEED=0 ARGS=--inputs=100000]
	@$(PY) -m tests.fuzz.fuzz_stream $(if $(SEED),--seed $(SEED)) $(ARGS)

# One lock serves every supported Python and platform. --no-config keeps private indexes of this machine out of it.
COMPILE := $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --annotation-style line --custom-compile-command "make lock"

lock: $(VENV)/dev ## Write requirements/*.txt anew [UPGRADE=1 moves to newer versions]
	@echo "Resolving from the public registry ..."
	@$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --all-extras --group build --group dev -o requirements/dev.txt
	@$(COMPILE) --constraint requirements/dev.txt pyproject.toml --extra worker --extra gateway --extra postgres -o requirements/runtime.txt
	@$(COMPILE) --constraint requirements/dev.txt pyproject.toml --extra embedded --extra postgres -o requirements/demo.txt
	@$(COMPILE) --constraint requirements/dev.txt --group build -o requirements/build.txt
	@$(COMPILE) --constraint requirements/dev.txt --group bench -o requirements/bench.txt
	@$(COMPILE) $(if $(UPGRADE),--upgrade) --group interop -o requirements/interop.txt

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) $(INTEROP) $(CLIENTS)/node_modules build dist bench-results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find api_contracts worker gateway migrations tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Set-up. Each file is the stamp of one finished step, so that a second run starts at once.

$(VENV)/python:
	@python="$(PYTHON)"; if [ -z "$$python" ] || ! "$$python" -c '$(FITS)'; then \
	    echo "Keepstream needs Python 3.11 to 3.14; $${python:-python3} is $$("$${python:-python3}" --version 2>&1)." >&2; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  "$$python" -m venv --clear $(VENV) >/dev/null 2>&1 || { \
	    "$$python" -m venv --clear --without-pip $(VENV) && \
	    "$$python" -m pip --python $(PY) install -qq pip; }
	@touch $@

$(VENV)/demo: $(VENV)/python requirements/build.txt requirements/demo.txt pyproject.toml
	@echo "Installing what workers and demo need with $$($(PY) --version) (30 MB; about a minute, once) ..."
	@$(LOCKED) -r requirements/build.txt -r requirements/demo.txt
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@$(PY) -c 'import keepstream_worker.app, keepstream_worker.commands.demo, keepstream_gateway.app' # compiled here rather than during the demo
	@touch $@

$(VENV)/dev: $(VENV)/demo requirements/dev.txt
	@echo "Installing what the tests and checks need (100 MB more; about half a minute, once) ..."
	@$(LOCKED) -r requirements/dev.txt
	@touch $@

$(VENV)/bench: $(VENV)/dev requirements/bench.txt
	@echo "Installing what the benchmarks compare with and draw with ..."
	@$(LOCKED) -r requirements/bench.txt
	@touch $@

# A server that is written for Node is left out where there is no npm.
$(INTEROP)/servers: $(VENV)/dev requirements/interop.txt tests/interop/package.json tests/interop/package-lock.json
	@echo "Installing LiteLLM's proxy and four smaller servers into $(INTEROP) (600 MB; a minute or two, once) ..."
	@$(PY) -m venv --clear --without-pip $(INTEROP)
	@$(subst pip install,pip --python $(INTEROP)/bin/python install,$(LOCKED)) -r requirements/interop.txt
	@mkdir -p $(INTEROP)/node && cp tests/interop/package.json tests/interop/package-lock.json $(INTEROP)/node/
	@if command -v npm >/dev/null; then \
	    npm --prefix $(INTEROP)/node ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null; \
	  fi
	@touch $@

NODE_FITS := process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)

# npm writes the stamp itself. No package may run a script of its own while it is installed.
$(CLIENTS)/node_modules/.package-lock.json: $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	@absent=; for program in chromium node npm; do command -v $$program >/dev/null || absent="$$absent $$program"; done; \
	  case $$absent in *node*) ;; *) node -e '$(NODE_FITS)' || absent="$$absent node-20-or-newer";; esac; \
	  if [ -n "$$absent" ]; then \
	    echo "make test-clients needs chromium, node (20 or newer) and npm; absent:$$absent." >&2; \
	    echo "On Debian: apt-get install chromium nodejs npm" >&2; exit 1; \
	  fi
	@echo "Installing other people's clients for Node into $(CLIENTS)/node_modules (80 MB; half a minute, once) ..."
	@npm --prefix $(CLIENTS) ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@
