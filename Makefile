# Two commands do everything, the installation included: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help install quickstart test test-slow nbs docs clean-venv
help:
	@echo "make quickstart   install, then take three tokenizers from procedural pairs to generated samples (about 7 minutes on 2 cores)"
	@echo "make test         install, then run every test"
	@echo "make test-slow    the campaigns: hundreds of kills, bad inputs, full disks, evil files; writes data/reliability.jsonl, which nbs/85_reliability.ipynb shows"
	@echo "make install      only create .venv and install into it"
	@echo "make docs         the site: README, every notebook as committed, claims, figures, an index of the package; _docs/index.html"
	@echo "make nbs          run every notebook in nbs/ in place (outputs kept), clean and export"

# Installed once: the stamp is newer than the files that name the dependencies.
$(STAMP): settings.ini setup.py
	@$(PYTHON) -c 'import sys; v=sys.version_info; sys.exit(v < (3, 11) and f"vtp needs Python >= 3.11, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -e ".[dev]"
	@touch $(STAMP)

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/papermill experiments/quickstart.ipynb data/quickstart.ipynb --cwd . --no-progress-bar --log-output -p scale cpu
	@echo "The executed notebook, with its pictures: data/quickstart.ipynb"
	@echo "Open it with: $(BIN)/jupyter lab data/quickstart.ipynb"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests

# What the campaigns (and the quick tests of faults, which carry the marker "records") tried becomes data/reliability.jsonl, whatever they found.
test-slow: $(STAMP)
	@rm -f data/reliability.raw
	@start=$$(date +%s); OMP_NUM_THREADS=1 VTP_RELIABILITY=$(CURDIR)/data/reliability.raw $(BIN)/pytest -n 2 --dist worksteal --slow -m "slow or records" tests; status=$$?; \
	$(BIN)/python -m vtp.reliability data/reliability.raw $$(( $$(date +%s) - start )); rm -f data/reliability.raw; exit $$status

nbs: $(STAMP)
	$(BIN)/python tools/run_nbs.py nbs/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname experiments
	$(BIN)/nbdev_export

# Nothing is run: outputs are those that were committed. A link to nowhere is an error.
docs: $(STAMP)
	$(BIN)/uv pip install -q --python $(BIN)/python "sphinx>=9,<10" "myst-nb>=1.4,<2" furo latex2mathml
	$(BIN)/python docs/build.py
