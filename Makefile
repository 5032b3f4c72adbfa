# Each target sets up .venv by itself; the second time that takes no time.
PYTHON ?= python3
RUN := .venv/bin/python
DEMO := demo-output

.PHONY: demo test check setup clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt ".[dev]"
	@rm -rf build shardtune.egg-info
	@touch $@

setup: .venv/ready

demo: .venv/ready
	@echo "A small SDXL with random weights and drawn pictures: the path is real, the art is not."
	@test -d $(DEMO)/base || $(RUN) -m tools.random_base $(DEMO)/base
	@test -d $(DEMO)/pictures || $(RUN) -m tools.draw_pictures $(DEMO)/pictures --count 48
	@printf 'a red circle on a blue ground\na green square on a white ground\n' > $(DEMO)/prompts.txt
	$(RUN) cli.py encode $(DEMO)/pictures --base $(DEMO)/base --out $(DEMO)/cache --resolution 96 --bucket-step 16 --val-share 0.2
	$(RUN) cli.py train $(DEMO)/cache --base $(DEMO)/base --out $(DEMO)/run --steps 60 --batch-size 4 --lr 1e-3 --eval-every 30 --overwrite
	$(RUN) cli.py generate --base $(DEMO)/base --lora $(DEMO)/run --prompts $(DEMO)/prompts.txt --out $(DEMO)/drawn --num-images 4 --num-steps 10
	@echo "The pictures are in $(DEMO)/drawn (look at contact-sheet.png), the LoRA is in $(DEMO)/run."

test: .venv/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest --numprocesses 2 --dist loadfile

check: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(DEMO) build shardtune.egg-info .mypy_cache .pytest_cache .ruff_cache
