# make check   linters and types          make test   everything that tests/run.sh runs
# make demo    the whole pipeline on an embedded model, on the CPU
.PHONY: check test demo

check:
	bash tests/run.sh check

test:
	bash tests/run.sh all

demo:
	bash scripts/quickstart.sh
