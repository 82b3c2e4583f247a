# `make demo` and `make test` need a Python 3.11 to 3.14 and nothing installed before.
# Without make:  python3 vllm_medusa/demo/bootstrap.py demo   (or: test, lint, env)

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && { echo $$p; break; }; done)
BOOTSTRAP = $(or $(PYTHON),python3) vllm_medusa/demo/bootstrap.py

.PHONY: demo test env lint clean help

help:
	@echo "make demo    build .venv, then compare vLLM with and without Medusa on a small model"
	@echo "make test    build .venv, then run the tests that need neither GPU nor much time"
	@echo "make env     build .venv only and print the path of its Python"
	@echo "make lint    ruff over the repository"
	@echo "make clean   remove .venv and .cache"
	@echo "Options: PYTHON=python3.12  ARGS='...' (passed to the demo or to pytest)"

demo:
	@$(BOOTSTRAP) demo $(ARGS)

test:
	@$(BOOTSTRAP) test $(ARGS)

env:
	@$(BOOTSTRAP) env

lint:
	@$(BOOTSTRAP) lint $(ARGS)

clean:
	rm -rf .venv .cache
