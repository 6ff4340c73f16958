# Everything here sets itself up: only Python 3.11, 3.12 or 3.13 and make need to be there.
.DEFAULT_GOAL := help
.PHONY: help serve test check format lock image image-check load kafka bench bench-compare
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 3000
WORK ?= .

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/wandb.done  ## serve the model in production on PORT, after training a first one if there is none
	@exec env BIN=$(BIN) PORT=$(PORT) WORK=$(WORK) sh scripts/serve.sh

test: $(VENV)/dev.done $(VENV)/clients.done $(if $(shell command -v mvn),$(VENV)/kafka.done)  ## run every test, against real servers of Redis and PostgreSQL
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev.done  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

image: $(VENV)/wandb.done  ## pack the model in production into an image, with docker or podman (ENGINE); WANDB=1: wandb too
	@BIN=$(BIN) WANDB=$(WANDB) sh scripts/image.sh

image-check: $(if $(WANDB),$(VENV)/dev.done)  ## prove the image (WANDB=1: the one with wandb): it scores as trained, loses nothing
	@$(PYTHON) scripts/check_image.py fraud_bento:production$(if $(WANDB),-wandb)
	@$(if $(WANDB),$(BIN)/python -m scripts.check_image_wandb fraud_bento:production-wandb)

SCENARIO ?= smoke
URL ?= http://127.0.0.1:$(PORT)
load: $(VENV)/load.done  ## offer SCENARIO to URL and judge it: smoke, steady, ramp, spike, soak, swap (OPTIONS; docs/load.md)
	$(BIN)/python -m load_tests --scenario $(SCENARIO) --host $(URL) $(OPTIONS)

KAFKA_PORT ?= 9092
kafka: $(VENV)/kafka.done  ## run one real Apache Kafka for development on KAFKA_PORT; it needs Java 17 and Maven
	@exec sh scripts/kafka/start.sh $(VENV)/kafka $(WORK)/.kafka $(KAFKA_PORT) $$(($(KAFKA_PORT) + 1))

bench: $(VENV)/dev.done  ## run every benchmark, or those NAMES; results go to bench/results
	$(BIN)/python -m bench.run $(NAMES)

bench-compare: $(VENV)/dev.done  ## measure the commits OLD and NEW in turns: NAMES, TURNS, OPTIONS of the benchmark
	$(BIN)/python -m bench.run --compare $(OLD) $(NEW) $(NAMES) $(if $(TURNS),--turns $(TURNS)) $(if $(OPTIONS),-- $(OPTIONS))

format: $(VENV)/dev.done  ## mend what a tool can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

LOCK = $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url
lock: $(VENV)/uv.done  ## lock every dependency group of pyproject.toml with hashes
	$(LOCK) --group dev -o requirements/dev.txt
	$(LOCK) --group clients -o requirements/clients.txt
	for group in uv serve train wandb follow load; do $(LOCK) --group $$group -c requirements/dev.txt -o requirements/$$group.txt; done

$(VENV)/uv.done:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

$(VENV)/clients.done: requirements/clients.txt $(VENV)/uv.done  # what tests run as clients, in an environment of its own
	$(PYTHON) -m venv $(VENV)/clients
	$(BIN)/uv pip install -q --python $(VENV)/clients/bin/python --require-hashes -r $<
	@touch $@

$(VENV)/kafka.done: scripts/kafka/pom.xml  # its published jars
	mvn -q -B -f scripts/kafka/pom.xml dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory=$(abspath $(VENV))/kafka
	@touch $@

$(VENV)/%.done: requirements/%.txt pyproject.toml $(VENV)/uv.done
	@echo "installing the locked packages of requirements/$*.txt"
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/$*.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@$(BIN)/python scripts/openmp.py
	@touch $@
