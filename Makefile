# Two commands: `make book` and `make test`. Each sets up .venv first where it is not there.
#   make book PROFILE=full CHAPTERS="02 05" PARAMS="temperature=8 seed=1"
PYTHON   ?= python3
PROFILE  ?= quick
CHAPTERS ?=
PARAMS   ?=

TOOL = .venv/bin/python tools/book.py
CHOSEN = --profile "$(PROFILE)" --chapters "$(CHAPTERS)"

.PHONY: book test site publish status bench
.DEFAULT_GOAL := book

book: .venv/.installed    ## run the chapters, render them, print the results and where the page is
	@$(TOOL) book $(CHOSEN) --params "$(PARAMS)"

test: .venv/.installed    ## ruff, the tests, and the notebooks against their committed outputs
	@$(TOOL) test

site: .venv/.installed    ## render what is committed, without running it
	@$(TOOL) site

publish: .venv/.installed ## run the chapters in place, so that they carry their outputs
	@$(TOOL) publish $(CHOSEN)

status: .venv/.installed  ## how each chapter was published, and whether that still holds
	@$(TOOL) status

bench: .venv/.installed   ## how fast kdlib is beside the loop that most tutorials use
	@.venv/bin/python tools/bench.py

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer; choose one that is: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up .venv: about two minutes and 6 GB …"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[book]'
	@touch $@
