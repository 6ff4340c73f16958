.PHONY: lock
LOCK = .venv/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url

lock:  ## lock every dependency group of pyproject.toml with hashes
	$(LOCK) --group dev -o requirements/dev.txt
	for group in serve train wandb load; do $(LOCK) --group $$group -c requirements/dev.txt -o requirements/$$group.txt; done
