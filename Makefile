# Everything starts here, on a machine with nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps

.DEFAULT_GOAL := help
.PHONY: help demo demo-healing test check format bench lock proto clean

help:  ## Show this.
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

demo: $(STAMPS)/demo  ## Train, serve, replay real applicants, report; serves on (EXIT=1 ends, PORT=8000).
	@$(BIN)/phoenix-ml demo $(if $(EXIT),--exit) $(if $(PORT),--port $(PORT))

demo-healing: $(STAMPS)/demo  ## Applicants change, the model suffers and is healed; a unit bug heals nothing (EXIT=1, PORT=…).
	@$(BIN)/phoenix-ml demo --healing $(if $(EXIT),--exit) $(if $(PORT),--port $(PORT))

test: $(STAMPS)/test  ## Everything, against real servers that it installs and starts itself.
	@bash tests/support/install_servers.sh
	@bash tests/support/kafka/install.sh
	@$(BIN)/python tests/support/environments.py
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMPS)/test  ## Format, lint, strict types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMPS)/test  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMPS)/test  ## CPU a request, beside an empty ASGI echo and the usual service (12 minutes).
	$(BIN)/python benchmarks/predict.py

lock: $(STAMPS)/test  ## Resolve the dependencies anew, for every supported Python and platform.
	$(BIN)/python -m pip install -q uv
	$(LOCK) --extra convert requirements/demo.in -o requirements/demo.txt
	$(LOCK) --all-extras requirements/test.in -o requirements/test.txt
	$(LOCK) --extra redis --extra postgres --extra kafka --extra alerts --extra grpc requirements/serve.in -o requirements/serve.txt
	for name in $(basename $(wildcard tests/support/clients/*.in)); do $(RESOLVE) $$name.in -o $$name.txt || exit; done
	for name in $(basename $(wildcard tests/support/wheels/*.in)); do $(RESOLVE) --no-deps $$name.in -o $$name.txt || exit; done

proto: $(STAMPS)/test  ## Generate the messages of gRPC from inference.proto.
	$(BIN)/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src src/phoenix_ml/infrastructure/grpc/inference.proto

RESOLVE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
          --no-annotate --no-header --upgrade
LOCK    = $(RESOLVE) pyproject.toml

clean:  ## Remove what the other targets made.
	rm -rf $(VENV) benchmarks/.venvs phoenix-demo phoenix-data .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Phoenix ML needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11") if v < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV) || { echo "this Python has no venv module; on Debian: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

# The package itself is installed in place, so that a change of the code needs no new installation.
$(STAMPS)/demo $(STAMPS)/test: $(STAMPS)/%: requirements/%.txt pyproject.toml | $(BIN)/python
	@echo "installing what '$*' needs (hash-checked) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/$*.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@mkdir -p $(STAMPS) && touch $@
