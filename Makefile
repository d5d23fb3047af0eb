# Two commands: `make book` and `make test`. Each sets up .venv first if it is not there.
#   make book PROFILE=full CHAPTERS="02 05" PARAMS="temperature=8 seed=1"
PYTHON   ?= python3
PROFILE  ?= quick
CHAPTERS ?=
PARAMS   ?=
GRID     ?=
RUNS     ?=
OPTIONS  ?= --role distilled --profile quick
PROCESSES ?= 1

TOOLS  = .venv/bin/python tools
CHOSEN = --profile "$(PROFILE)" --chapters "$(CHAPTERS)"

.PHONY: book train sweep runs compare test site audit publish status bench
.DEFAULT_GOAL := book

book: .venv/.installed    ## run the chapters, render them, print the results and where the page is
	@$(TOOLS)/book.py book $(CHOSEN) --params "$(PARAMS)"

train: .venv/.installed   ## a teacher or students, on PROCESSES processes or GPUs; OPTIONS are those of python -m kdlib train
	@.venv/bin/torchrun --nproc-per-node $(PROCESSES) -m kdlib train $(OPTIONS)

sweep: .venv/.installed   ## the chapters with every combination of GRID="temperature=1,2,4 seed=0,1,2"
	@$(TOOLS)/book.py sweep $(CHOSEN) --grid "$(GRID)"

runs: .venv/.installed    ## what was run, with which parameters, and what came out
	@$(TOOLS)/book.py runs

compare: .venv/.installed ## two runs side by side: make compare RUNS="quick quick-1a2b3c4d"
	@$(TOOLS)/book.py compare --runs "$(RUNS)"

test: .venv/.installed    ## ruff, the tests, and the notebooks against their committed outputs
	@$(TOOLS)/book.py test

site: .venv/.installed    ## render what is committed, without running it
	@$(TOOLS)/book.py site

audit: site               ## look at every page in a browser: light and dark, wide and narrow
	@$(TOOLS)/audit.py

publish: .venv/.installed ## run the chapters in place, so that they carry their outputs
	@$(TOOLS)/publish.py $(CHOSEN)

status: .venv/.installed  ## how each chapter was published, and whether it still holds
	@$(TOOLS)/book.py status

bench: .venv/.installed   ## how fast kdlib is, beside the loop of most tutorials
	@$(TOOLS)/bench.py

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer; choose one that is: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up .venv: about two minutes and 6 GB …"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[book]'
	@touch $@
