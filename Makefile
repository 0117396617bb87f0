# moe_infer.h is one file: nothing needs to be built to use it. This builds the command-line tools,
# the examples and the tests, all into build/.

CC = cc
CXX = c++
CFLAGS = -O2
CXXFLAGS = -O2
WARNINGS = -Wall -Wextra -Wpedantic
WERROR = -Werror
LDLIBS = -lm -lpthread
JOBS = $(shell nproc 2>/dev/null || echo 2)
# what `make run` runs
MODEL = examples/storyteller/storyteller.gguf
PROMPT = Once upon a time there was
N = 400
SEED = 14
TEMP = 0.5
FUZZ_SECONDS = 60

B = build
C = $(CC) $(CFLAGS) $(WARNINGS) $(WERROR)
CXX17 = $(CXX) -std=c++17 $(CXXFLAGS) $(WARNINGS) $(WERROR)
# Without a C++ compiler the C++ example is left out.
EXAMPLES = $(B)/minimal $(B)/branch $(B)/resume $(B)/tokens $(B)/chat
TOOLS = $(B)/moe-cli $(B)/moe-bench $(B)/moe-quantize $(B)/moe-synth $(EXAMPLES) \
    $(if $(shell command -v $(CXX) 2>/dev/null),$(B)/embed)
TESTS = $(patsubst tests/%.c,$(B)/tests/%,$(wildcard tests/test_*.c))
SCRIPTS = $(wildcard tests/test_*.sh)
# tests that start threads, for the thread sanitizer; not test_model, whose single-threaded
# reference pass would take an hour there (test_session evaluates with many threads), nor test_chat,
# whose only thread is there to have a small stack
THREADED = $(patsubst tests/%.c,$(B)/tests/%,$(filter-out tests/test_model.c tests/test_chat.c,\
    $(shell grep -lE 'moe_(pool|session)_open|moe__pool|pthread_create' tests/test_*.c 2>/dev/null)))
# builds in parallel unless make was told how (-j)
PARALLEL = $(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(JOBS))

.PHONY: all run chat test test-programs check check-compile readme-tables asan ubsan tsan numa asm bench compare rivals fuzz help clean

all: $(TOOLS)  ## build the command line, the benchmark, the model writer and the examples (default)

SHARED = examples/tool.h examples/output.h
$(B)/moe-cli: examples/moe_cli.c $(wildcard examples/*.h) moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

BENCH = bench/moe_bench.c bench/synth.c $(wildcard bench/*.h) $(SHARED)
$(B)/moe-bench: $(BENCH) moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

$(B)/moe-synth: bench/synth.c examples/output.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

$(B)/moe-quantize: examples/quantize.c $(SHARED) moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

$(EXAMPLES): $(B)/%: examples/%.c examples/text.h moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

$(B)/embed: examples/embed.cpp moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(CXX17) $< -o $@ $(LDLIBS)

$(B)/kernels: bench/kernels.c bench/roofs.h $(SHARED) moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

# The benchmark as a user compiles it to compare: with a macro, and without.
$(B)/compare/sequential: MACRO =
$(B)/compare/parallel: MACRO = -DMOE_PARALLEL_EXPERTS
$(B)/compare/balanced: MACRO = -DMOE_BALANCED_EXPERTS
SCHEDULES = sequential parallel balanced
$(SCHEDULES:%=$(B)/compare/%): $(BENCH) moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $(MACRO) $< -o $@ $(LDLIBS)

$(B)/compare/compare: bench/compare.c bench/svg.h bench/turns.h $(SHARED) moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

$(B)/engines: bench/engines.c bench/turns.h bench/machine.h bench/page_state.h $(SHARED) \
    moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $< -o $@ $(LDLIBS)

# The AVX-VNNI kernels, tried with AVX-512's encoding where the processor has only that.
$(B)/tests/test_pool_condvar: tests/test_pool.c
$(B)/tests/test_tile: C += $(if $(shell grep -m1 -w avx_vnni /proc/cpuinfo),,-DMOE__VNNI_EVEX=1)

# Tests that limit what something costs count its steps, see tests/steps.h (gcc, clang).
COUNTED = $(B)/tests/test_text $(B)/tests/test_gguf $(B)/tests/test_sample $(B)/tests/test_chat
$(COUNTED): STEPS = -fsanitize-coverage=trace-pc $(B)/tests/steps.o
$(COUNTED): $(B)/tests/steps.o

$(B)/tests/steps.o: tests/steps.c
	@mkdir -p $(@D) && rm -f $@
	$(C) -c $< -o $@

# These run programs, and look inside of moe-cli's.
$(B)/tests/test_talk $(B)/tests/test_dialogue: | $(B)/tests/actor $(B)/moe-cli
$(B)/tests/test_dialogue $(B)/tests/test_line: $(wildcard examples/*.h)

# Chat templates are left out where nothing tests them: that compiles faster.
NO_CHAT = -DMOE_NO_CHAT
$(B)/tests/test_answers $(B)/tests/test_chat $(B)/tests/test_dialogue: NO_CHAT =

$(B)/tests/%: tests/%.c moe_infer.h $(wildcard tests/*.h) bench/synth.c examples/output.h
	@mkdir -p $(@D) && rm -f $@
	$(C) $(NO_CHAT) -include assert.h -DMOE_ASSERT=assert $(STEPS) $< -o $@ $(LDLIBS)

run: $(B)/moe-cli  ## a story from the model in the box (PROMPT= SEED= TEMP= N= MODEL=)
	@printf '\n%s' "$(PROMPT)"; $(B)/moe-cli -m "$(MODEL)" -p "$(PROMPT)" -n $(N) -s $(SEED) \
	    --temp $(TEMP) 2>$(B)/run.log; code=$$?; echo; echo; tail -n 3 $(B)/run.log >&2; exit $$code

chat: $(B)/moe-cli  ## talk with a model that can (MODEL=, a GGUF file with a chat template)
	@$(B)/moe-cli -m "$(MODEL)"

test:  ## build and run all tests; ends with the line "N passed, N failed"
	@+$(PARALLEL) -k test-programs || true # what is not built counts as failed
	@tests/run.sh $(B) $(TESTS) $(SCRIPTS)

test-programs: $(TOOLS) $(TESTS) $(B)/tests/actor $(B)/tests/families_table $(B)/compare/compare $(B)/engines

check:  ## the tests and the compile checks
	@+$(PARALLEL) -k test-programs || true # what is not built counts as failed
	@tests/run.sh $(B) $(TESTS) $(SCRIPTS) tests/readme.sh tests/compile.sh

readme-tables: $(B)/tests/families_table  ## write README's table of architectures
	@tests/readme.sh $(B) --write

check-compile:  ## compilers, standards, macros, exported symbols, style of the header
	@tests/run.sh $(B) tests/compile.sh

# A sanitizer's programs stand in a folder of their own.
SANITIZE = $(MAKE) --no-print-directory B=build/$@ CXXFLAGS="$(SANITIZER)" CFLAGS="$(SANITIZER)"
SANITIZER = -O1 -g1 -fno-omit-frame-pointer

asan: SANITIZER += -fsanitize=address
asan:  ## the tests with the address sanitizer and its leak detection
	@+ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1 $(SANITIZE) test

ubsan: SANITIZER += -fsanitize=undefined -fno-sanitize-recover=all
ubsan:  ## the tests with the undefined-behaviour sanitizer
	@+UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZE) test

tsan: SANITIZER += -fsanitize=thread
tsan:  ## the tests that use threads with the thread sanitizer
	@+TSAN_OPTIONS=halt_on_error=1 $(SANITIZE) TESTS="$(subst $(B)/,build/tsan/,$(THREADED))" \
	    SCRIPTS= TOOLS= test

numa:  ## placement of weights on a virtual machine with two memory nodes (qemu-system-x86)
	@tests/numa.sh $(B)

asm:  ## calls and spills in the loops of the kernels, gcc and clang (KERNELS=pattern)
	@tests/asm_check.sh . '$(KERNELS)'

# 1, 2, 4, ... up to twice the processors
THREADS = $(shell n=1; while [ $$n -le $$((2 * $(JOBS))) ]; do printf '%s%d' "$$s" $$n; s=,; \
    n=$$((2 * n)); done)
compare: $(SCHEDULES:%=$(B)/compare/%) $(B)/compare/compare $(MODEL)  ## the schedules' builds in turns: table, build/compare.svg (MODEL= THREADS=)
	$(B)/compare/compare -m "$(MODEL)" -t $(THREADS) --svg $(B)/compare.svg \
	    $(foreach s,$(SCHEDULES),$(s)=$(B)/compare/$(s))

# Other engines: LLAMA_BENCH is the path of llama.cpp's benchmark, RIVALS a list of more such
# programs with arguments of their own: "NAME=PROGRAM ARGUMENT...; NAME=PROGRAM ...".
ROUNDS = 5
LLAMA_BENCH =
RIVALS =
PAGE_STATE =
rivals: THREADS = -1
rivals: $(B)/moe-bench $(B)/engines $(MODEL)  ## llama-bench and ours in turns: table (MODEL= LLAMA_BENCH= RIVALS= PAGE_STATE= THREADS= ROUNDS=)
	@$(B)/engines -m "$(MODEL)" -t $(THREADS) -r $(ROUNDS) \
	    $(if $(PAGE_STATE),--page-state $(PAGE_STATE)) \
	    --engines "moe_infer.h=$(B)/moe-bench --no-roofs; \
	        $(if $(LLAMA_BENCH),llama.cpp=$(LLAMA_BENCH);) $(RIVALS)"

bench: $(B)/kernels  ## build the benchmark of single kernels, build/kernels

fuzz: $(B)/fuzz_gguf  ## feed odd files to the GGUF reader (clang; FUZZ_SECONDS=60)
	@mkdir -p $(B)/corpus
	$(B)/fuzz_gguf -max_total_time=$(FUZZ_SECONDS) $(B)/corpus

$(B)/fuzz_gguf: tests/fuzz_gguf.c moe_infer.h
	@mkdir -p $(@D) && rm -f $@
	clang -g -O1 -fsanitize=fuzzer,address,undefined -DMOE_FUZZ $< -o $@ $(LDLIBS)

help:  ## show this
	@echo "make TARGET [CC=... CFLAGS=... JOBS=...], everything goes to build/"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

clean:  ## delete build/
	rm -rf build
