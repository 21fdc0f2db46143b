# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs. PYTHON is the interpreter that a missing .venv is made with.
# ARGS goes to pytest: make test ARGS="tests/ops -x".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions that are installed. Empty: the newest that pyproject.toml allows.
LOCK := requirements.lock
# The release of transformers for test-release: make test-release TRANSFORMERS=5.18.0
TRANSFORMERS ?= 5.24.0
RELEASE := .venv-$(TRANSFORMERS)

# The environment with vLLM, whose versions exclude those of the other ones.
VLLM := .venv-vllm

# The environment with Gradio, which takes no pillow as new as the locked one.
DEMO := .venv-demo

.PHONY: quickstart test test-newest test-release test-vllm test-demo lint docs lock
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-eval
	$(BIN)/vtprune eval quickstart

# A process a core, a thread a process.
test test-release test-demo: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Without the lock, in an environment of its own: what a stranger gets who installs today.
test-newest:
	rm -f .venv-newest/.installed-dev
	$(MAKE) test VENV=.venv-newest LOCK=

# What fails first where a release of transformers is not understood, on that release.
test-release: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m pytest -n auto --dist worksteal -m release $(ARGS)

# The page of `vtprune demo`, and what it shows.
test-demo: $(DEMO)/.installed
	$(DEMO)/bin/python -m pytest tests/demo $(ARGS)

# The plug-in of vLLM, in vLLM on a CPU; slow tests, too.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/serving -m "" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages for readers, in build/site. What a link or a name in them does not lead to is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html; to search it: $(BIN)/python -m http.server --directory build/site"

# The newest release of everything that pyproject.toml allows, for every supported Python and system.
lock: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-emit-index-url \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	sed '/^pillow==/d' requirements.lock > $(VENV)/constraints.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra demo --no-emit-index-url --no-annotate \
		--no-header --constraint $(VENV)/constraints.txt --output-file $(VENV)/demo.txt pyproject.toml
	echo "# What $(DEMO) has beside requirements.lock, or instead of it; \`make lock\` writes it." > requirements-demo.lock
	grep -vxFf requirements.lock $(VENV)/demo.txt >> requirements-demo.lock

# One stamp for each set of extras, so that a changed dependency list is installed and an unchanged one is not.
# The lock holds for what packages are built with, too; that needs a pip that knows --build-constraint.
$(VENV)/.installed-%: setup.py pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade $(LOCK:%=--constraint %) pip
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		$(LOCK:%=--constraint %) $(LOCK:%=--build-constraint %) --editable ".[$*]"
	touch $@

# An empty environment; a .pth file shows it the packages of the other one.
define layer
	$(BIN)/python -m venv --without-pip --clear $(1)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/locked.pth"
endef

# Only transformers lies in this environment.
$(RELEASE)/.installed: $(VENV)/.installed-dev
	$(call layer,$(RELEASE))
	$(BIN)/python -m pip --quiet --python $(RELEASE)/bin/python install --no-deps transformers==$(TRANSFORMERS)
	touch $@

$(DEMO)/.installed: $(VENV)/.installed-dev requirements-demo.lock
	$(call layer,$(DEMO))
	$(BIN)/python -m pip --quiet --python $(DEMO)/bin/python install --no-deps --requirement requirements-demo.lock
	touch $@

$(VLLM)/.installed: setup.py pyproject.toml requirements-vllm.lock tests/serving/vllm/_torchvision_ops.py
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.lock
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	site=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		cp tests/serving/vllm/_torchvision_ops.py "$$site" && echo "import _torchvision_ops" > "$$site/torchvision_ops.pth"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
