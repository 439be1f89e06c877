# make check   linters and types
# make test    all tests
# make demo    the whole pipeline on a tiny model, on CPU
.PHONY: check test demo

check:
	bash tests/run.sh check

test:
	bash tests/run.sh all

demo:
	bash scripts/quickstart.sh
