# Every command runs in .venv, which is made when pyproject.toml or constraints.txt change. `make` lists them.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.stamp
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup sandbox sample train-reward align report compare test lint check bench house schema clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  make %-28s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make .venv and install what Safelight needs
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Safelight needs Python 3.11 or newer, not $$($(PYTHON) --version); try: make PYTHON=python3.12 setup" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

sandbox: $(READY) ## make the sandbox's base model, encoder and data set again, into runs/sandbox
	$(BIN)/python -m sandbox.base
	$(BIN)/python -m sandbox.annotate base=runs/sandbox/base/pipeline
	$(BIN)/python -m sandbox.encoder base=runs/sandbox/base/pipeline

sample: $(READY) ## render videos with the base model, into runs/sandbox/sample
	$(BIN)/python scripts/sample.py out=runs/sandbox/sample

train-reward: $(READY) ## train the reward model and evaluate it, into runs/sandbox/reward
	$(BIN)/python -m reward configs/reward/sandbox.yaml
	$(BIN)/python -m reward.evaluate runs/sandbox/reward gold=sandbox/assets/data/gold.jsonl \
	    ceilings=sandbox/assets/data/annotators.json gold_tags='{other_harmful: flash, contraband: dagger}' num_probed=40

align: train-reward ## align the base model under a safety limit, certify and report, into runs/sandbox/align
	$(BIN)/python -m align configs/align/sandbox.yaml
	@$(MAKE) --no-print-directory report

# PASS, INSUFFICIENT-DATA or FAIL; 1 is a crash, 2 an error.
ANY_VERDICT := case $$? in 0|3|4) ;; *) exit 1;; esac
report: $(READY) ## evaluate what `make align` made on held-out prompts, certify it, and write the report
	$(BIN)/python scripts/evaluate.py configs/evaluate/sandbox.yaml
	$(BIN)/python -m sandbox.measure runs/sandbox/align/evaluation
	$(BIN)/python scripts/evaluate.py configs/evaluate/sandbox.yaml gold=runs/sandbox/align/evaluation/gold.jsonl
	$(BIN)/python -m align.certify table configs/certify/sandbox.yaml; $(ANY_VERDICT)
	$(BIN)/python scripts/proxy.py runs/sandbox/align
	$(BIN)/python -m sandbox.measure runs/sandbox/align/validation
	$(BIN)/python scripts/report.py runs/sandbox/align

COMPARED := unconstrained fixed-multiplier sft rwr
compare: train-reward ## align by other objectives and without a limit, certify all, and report them together
	for name in sandbox $(COMPARED:%=sandbox-%); do $(BIN)/python -m align configs/align/$$name.yaml || exit 1; done
	$(BIN)/python scripts/evaluate.py configs/evaluate/compare.yaml
	$(BIN)/python -m sandbox.measure runs/sandbox/compare
	$(BIN)/python scripts/evaluate.py configs/evaluate/compare.yaml gold=runs/sandbox/compare/gold.jsonl
	for name in base best-of-4 constrained $(COMPARED); do \
	    $(BIN)/python -m align.certify table configs/certify/compare.yaml "systems=[$$name]" \
	        out=runs/sandbox/compare/certificate-$$name.json; $(ANY_VERDICT); done
	$(BIN)/python scripts/report.py runs/sandbox/align evaluation=runs/sandbox/compare \
	    out=runs/sandbox/compare/report/index.html

test: $(READY) ## run the tests
	$(BIN)/pytest

lint: $(READY) ## check format, style, types, layers and spelling
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/ty check
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

check: lint test ## all that a change must pass: lint and test

bench: $(READY) ## time the parts that must be fast
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench.py

house: $(READY) ## look at our own sizes beside the field's best
	$(BIN)/python scripts/house.py

schema: $(READY) ## write a JSON schema for each file of settings, for editors, into configs/schema
	$(BIN)/python -m scripts.schema

clean: ## remove caches; runs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
