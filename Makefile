# The two commands: `make train` and `make test`. Both make .venv first; nothing else is to be set up.

RUN := .venv/bin/python

.PHONY: train test bench check env clean
train: env
	@echo '+ $(RUN) launch.py $(ARGS)'
	@$(RUN) launch.py $(ARGS)

# What CI runs.
test: env check
	$(RUN) -m pytest

# Style, types and the order of the packages.
check: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright
	.venv/bin/lint-imports

bench: env
	$(RUN) -m benchmarks.adapter_update

env:
	@tools/install.sh

clean:
	rm -rf .venv build dist *.egg-info
