.PHONY: help install build test test-c install-c dist-c manual wheel sanitize tsan valgrind emulate clang fuzz big soak test-cuda demo lint check clean bench bench-gpu least measure tables cost warmup
PYTHON ?= python
PREFIX ?= /usr/local
RESULTS ?= benchmarks/results/epyc-zen4
BOTH = --contenders fastnorm,PyTorch

help:  ## list the tasks
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install:  ## install in place, with what tests and linting need
	$(PYTHON) -m pip install -e ".[dev]"

build:  ## compile libfastnorm and the binding in place again
	$(PYTHON) setup.py build_ext --inplace

test:  ## run the tests, on up to four cores
	$(PYTHON) -m pytest -n auto --dist loadgroup

test-c:  ## build and run the C example and the C test
	$(PYTHON) -m pytest tests/test_install.py -k "c_program or header or library"

install-c:  ## install the C library alone: make install-c PREFIX=/usr/local
	$(PYTHON) setup.py install_c --prefix=$(PREFIX)

dist-c:  ## archive the C library's sources for a machine without Python and Cython
	$(PYTHON) setup.py dist_c

manual:  ## write the manual of fastnorm.h to build/manual/html, by Doxygen
	doxygen docs/Doxyfile

bench:  ## measure a few cells against the memory floor and PyTorch
	$(PYTHON) -m fastnorm bench --quick

bench-gpu:  ## measure the CUDA backend beside PyTorch, on a machine with a GPU
	$(PYTHON) benchmarks/gpu.py

test-cuda:  ## compile and assemble every CUDA kernel; installs the toolkit, needs no GPU
	$(PYTHON) -m pip install ".[test,cuda-test]" && $(PYTHON) -m pytest tests/test_cuda.py

least:  ## measure the kernels beside the least that could be written, for docs/cost-model.md
	$(PYTHON) benchmarks/least.py

measure:  ## measure what the README and the cost model show, and write it there (45 minutes)
	$(PYTHON) -m fastnorm bench --json $(RESULTS)-2-threads.json
	$(PYTHON) benchmarks/least.py --json $(RESULTS)-2-threads-least.json
	$(PYTHON) -m fastnorm bench --threads 1 $(BOTH) --json $(RESULTS)-1-thread.json
	$(PYTHON) -m fastnorm bench --dtype float64 $(BOTH) --json $(RESULTS)-2-threads-float64.json
	$(PYTHON) -m fastnorm bench --dtype bfloat16 $(BOTH) --json $(RESULTS)-2-threads-bfloat16.json
	$(PYTHON) benchmarks/cost_model.py docs/cost-model.png
	$(PYTHON) benchmarks/tables.py

tables:  ## write the tables of README.md and docs/cost-model.md from benchmarks/results
	$(PYTHON) benchmarks/tables.py

cost:  ## measure how a call grows with its sizes, for docs/cost-model.md
	$(PYTHON) benchmarks/cost_model.py docs/cost-model.png

warmup:  ## compile the Numba kernels into their cache
	$(PYTHON) -m fastnorm warmup

wheel:  ## build a wheel, tagged manylinux and repaired to carry what it needs
	rm -rf build/wheel && $(PYTHON) -m build --wheel -o build/wheel
	auditwheel repair -w dist build/wheel/*.whl

sanitize:  ## run the C tests under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer
	tests/sanitize.sh address

tsan:  ## run the C tests under ThreadSanitizer
	tests/sanitize.sh thread

valgrind:  ## run the C tests under valgrind
	tests/sanitize.sh valgrind

emulate:  ## run the C tests on AArch64 under QEMU (tests/emulate.sh names the packages)
	tests/emulate.sh aarch64

clang:  ## run the C tests on what clang makes of the library; compile it for a Mac
	$(PYTHON) -m pip install ziglang && tests/clang.sh here && tests/clang.sh macos

fuzz:  ## 10 minutes of libFuzzer on the C library (clang brings it), then as long of random Python calls
	tests/fuzz.sh 600
	FASTNORM_FUZZ=100000 $(PYTHON) -m pytest tests/test_fuzz.py

big:  ## arrays of more than 2^31 elements, 12 GB of memory
	$(PYTHON) -m pytest tests/test_big.py -m big

soak:  ## three minutes of mixed calls from several threads: memory flat, results the same
	$(PYTHON) tests/soak.py

demo:  ## train LeNet-5 with and without batch norm
	$(PYTHON) -m fastnorm demo

lint:  ## check style
	ruff check .
	cython-lint fastnorm

check: lint test  ## everything that must be green

clean:  ## remove what builds made
	rm -rf build dist *.egg-info fastnorm/lib fastnorm/include fastnorm/backends/*.so
