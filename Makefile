# Every command of ftpipe. Run `make` to have them explained.
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ftpipe-ready
LOCKED := .venv/.locked

# value: what the user quoted reaches the shell as typed; make expands no $ in it.
RECIPE = $(if $(recipe),recipe='$(value recipe)')
ARGS = $(value args)

.PHONY: help
help: ## explain every target
	@echo 'usage: make TARGET [recipe=NAME] [args="key=value ..."]'
	@awk -F ': *## ' '/^[a-z-]+: *## / { printf "  %-17s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Every target sets up .venv first where it is missing or out of date.'

.PHONY: setup
setup: ## build .venv: PYTHON=python3.12, CUDA=1 or CUDA=0, TORCH_INDEX=url where the defaults do not fit
setup: $(READY)

# Each stamp is touched last, so a set-up that was interrupted starts over.
$(LOCKED): requirements.lock requirements-cuda.lock
	@PYTHON='$(PYTHON)' CUDA='$(CUDA)' TORCH_INDEX='$(TORCH_INDEX)' scripts/setup.sh
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable .
	@problems=$$($(BIN)/python -m pip --disable-pip-version-check check) || \
	  { echo "$$problems"; echo 'The lock files do not fit pyproject.toml: run make lock.'; exit 1; } >&2
	@touch $@

.PHONY: quantizer
quantizer: ## build .venv-quantizer, which makes 4 bits by GPTQ and AWQ (export.quantize)
quantizer: .venv-quantizer/.ready

.venv-quantizer/.ready: $(READY) scripts/setup_quantizer.sh
	@scripts/setup_quantizer.sh
	@touch $@

.PHONY: prepare evolve sft merge reward reference dpo ppo evaluate export run plan inspect submit
prepare: ## turn a recipe's raw data into the dataset it trains on
evolve: ## make instructions harder and rarer with a model (Evol-Instruct)
sft: ## fine-tune on the demonstrations (runs prepare first if need be)
merge: ## write a policy's adapter into its base
reward: ## learn a reward model from ranked replies
reference: ## compute the reference's log-probabilities, for dpo to reuse
ppo: ## raise a reward of the policy's own answers (PPO)
dpo: ## learn from preferences without a reward model (DPO, KTO and others)
evaluate: ## measure every policy of a recipe on the same rows and questions, before and after
export: ## write the policy as a folder that others load; args="export.gguf=[q8_0]" for llama.cpp too
run: ## run every stage of a recipe
plan: ## show what a recipe would run and what it would reuse
inspect: ## show its dataset, what is learned in colour; args="--row 17", args="--html page.html"
submit: ## submit every stage of a recipe to Slurm; args="launch=slurm-1gpu", "--dry-run" to look first
prepare evolve sft merge reward reference dpo ppo evaluate export run plan inspect submit: $(READY)
	@$(BIN)/ftpipe $@ $(RECIPE) $(ARGS)

.PHONY: lock-recipe
lock-recipe: ## pin a recipe to its inputs' commits and digests and to package versions
lock-recipe: $(READY)
	@$(BIN)/ftpipe lock $(RECIPE) $(ARGS)

.PHONY: verify
verify: ## make a run again and say where the two part; args=RUN, or recipe=NAME for the trace it ships
verify: $(READY)
	@$(BIN)/ftpipe $@ $(RECIPE) $(ARGS)

.PHONY: chat serve
chat: ## talk with a run's policy in the terminal; args=RUN, "RUN --system 'Answer in French.'"
serve: ## put a run's policy behind an OpenAI-compatible endpoint of this machine; args=RUN
chat serve: $(READY)
	@$(BIN)/ftpipe $@ $(RECIPE) $(ARGS)

.PHONY: status
status: ## say what became of submitted jobs; args=RUN for another than the newest
status: $(READY)
	@$(BIN)/ftpipe $@ $(ARGS)

.PHONY: recipes doctor
recipes: ## list the recipes
doctor: ## say what this machine can run and what is missing
recipes doctor: $(READY)
	@$(BIN)/ftpipe $@

.PHONY: test test-slow bench-sft bench-prepare bench-preferences bench-ppo bench-ppo-learning bench-ppo-memory bench-scaling bench-memory bench-record bench-kills
test: ## run the fast tests; args="-k name" for some of them
test: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 4 -m 'not slow' $(ARGS)
test-slow: ## run the tests that train models or start several processes
test-slow: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m slow $(ARGS)
bench-sft: ## measure fine-tuning side by side with other ways of doing it
bench-sft: $(READY)
	$(BIN)/python benchmarks/sft.py $(ARGS)
bench-prepare: ## measure data preparation side by side with other ways of doing it
bench-prepare: $(READY)
	$(BIN)/python benchmarks/prepare.py $(ARGS)
bench-preferences: ## measure dpo and reward side by side with plain TRL
bench-preferences: $(READY)
	$(BIN)/python benchmarks/preferences.py $(ARGS)
bench-ppo: ## measure PPO side by side with the last TRL that had it
bench-ppo: $(READY)
	$(BIN)/python benchmarks/ppo.py $(ARGS)
bench-ppo-learning: ## see what PPO learns, against known truths, over several seeds
bench-ppo-learning: $(READY)
	$(BIN)/python benchmarks/ppo_learning.py $(ARGS)
bench-scaling: ## measure one process and two of each strategy
bench-scaling: $(READY)
	$(BIN)/python benchmarks/scaling.py $(ARGS)
bench-memory: ## measure what trainings need in memory, beside what plan says
bench-memory: $(READY)
	$(BIN)/python benchmarks/memory.py $(ARGS)
bench-record: ## measure what the record of a run costs
bench-record: $(READY)
	$(BIN)/python benchmarks/record.py $(ARGS)
bench-kills: ## kill every stage at random moments and compare what it ends with
bench-kills: $(READY)
	$(BIN)/python benchmarks/kills.py $(ARGS)
bench-ppo-memory: ## measure PPO's memory with four roles on one 4-bit base of 7B; needs a GPU
bench-ppo-memory: $(READY)
	$(BIN)/python benchmarks/ppo_memory.py $(ARGS)

.PHONY: check lint types format
check: ## lint and types
check: lint types
lint: ## look for mistakes and stray formatting
lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
types: ## check the types
types: $(READY)
	$(BIN)/mypy
format: ## repair what lint can repair
format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: lock clean
lock: ## resolve pyproject.toml into the lock files; args=--upgrade for newer versions
# Not $(READY): that fails while pyproject.toml asks for more than the lock files hold.
lock: $(LOCKED)
	$(BIN)/python scripts/lock.py $(ARGS)
clean: ## remove .venv, caches and builds; outputs/ stays
	rm -rf .venv .venv-quantizer .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
