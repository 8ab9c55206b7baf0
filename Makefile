# `make demo` and `make test` do all the set-up themselves; `make venv` is the set-up alone.
#   PYTHON=python3.12   interpreter to use (3.11 to 3.13; default: the first that is found)
#   TEST_WORKERS=2      test processes
#   PYTEST_ARGS=...     more for pytest, such as "-k align"

VENV := .venv
READY := $(VENV)/ready
TEST_WORKERS ?= 2
DEMO_OUT ?= runs/demo
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/ready

.PHONY: help venv demo test docs lint format constraints clean

help:
	@echo "make demo         train, label, train again on synthetic images, and show what happened (3 to 5 minutes)"
	@echo "make test         check style and run the tests (7 to 10 minutes; PYTEST_ARGS='-m slow': the slow ones)"
	@echo "make docs         build the pages of docs/ and the Python interface as a web site in build/site (1 minute)"
	@echo "make venv         set up only; .venv/bin/stl-offline then works"
	@echo "make format       bring the code into the project's style"
	@echo "make constraints  write the versions in .venv to .ci/constraints.txt"

venv: $(READY)

# Another interpreter than that of .venv makes .venv anew.
VERSION := -c 'import sys; print(*sys.version_info[:2], sep=".")'
ifneq ($(PYTHON),)
ifneq ($(shell $(PYTHON) $(VERSION) 2>/dev/null),$(shell $(VENV)/bin/python $(VERSION) 2>/dev/null))
.PHONY: $(READY)
endif
endif

$(READY): setup.cfg pyproject.toml .ci/constraints.txt .ci/setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" .ci/setup
	@touch $@

demo: $(READY)
	$(VENV)/bin/stl-offline demo --out $(DEMO_OUT)

lint: $(READY)
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --quiet --check .

# Each test process has its own share of the cores: libraries that start a thread for every core would only get in the way.
test: lint
	@.ci/browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST_ARGS)

# The package's source is read, not imported, so this needs neither .venv nor FFCV.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "build/site/index.html"

$(DOCS_READY): .ci/constraints-docs.txt
	$(or $(PYTHON),python3) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement .ci/constraints-docs.txt
	@touch $@

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

constraints: $(READY)
	$(VENV)/bin/python -m pip freeze --all --exclude-editable > .ci/constraints.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
