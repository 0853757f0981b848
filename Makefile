# litespark. `make` alone lists the targets and says what was found on this machine.
#   make run                    build, make the default data, train on all cores
#   make sft, make dpo          then answers and preferences
#   make train [DEVICE=auto|cpu|cuda|emu]     build ./train_litespark: auto takes CUDA where a GPU answers, else the CPU
#   make test [SAN=1]           prove it right
ifeq ($(origin CC),default)
CC       := gcc
endif
OUT      ?= out
DEVICE   ?= auto
SAN      ?= 0
comma    := ,
# Probes: each compiles, links or runs the thing itself. Say MPI=0 to do without.
compiles  = $(shell echo '$(1)' | $(CC) -x c - -o /dev/null $(2) >/dev/null 2>&1 && echo 1 || echo 0)
NATIVE   := $(if $(filter 1,$(call compiles,int main(void){return 0;},-march=native)),-march=native)
OPENMP   := $(if $(filter 1,$(call compiles,int main(void){return 0;},-fopenmp)),-fopenmp,-Wno-unknown-pragmas)
MPI_C    := $(shell mpicc --showme:compile 2>/dev/null)
MPI_L    := $(shell mpicc --showme:link 2>/dev/null)
ifndef MPI
MPI      := $(call compiles,int main(void){return MPI_Init(0,0);},-include mpi.h $(MPI_C) $(MPI_L))
endif
NVCC     := $(shell command -v nvcc 2>/dev/null)
# of this machine's GPUs, those of compute capability 8.0 and newer: 80, 90
GPU_CC   := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([89]\|1[0-9]\)\.\([0-9]\).*/\1\2/p' | sort -u)
# only the CUDA trainer needs it, and only with MPI: several GPUs
ifndef NCCL
NCCL     := $(if $(and $(NVCC),$(filter 1,$(MPI))),$(call compiles,int main(void){return ncclGetVersion(0);},-include nccl.h -I$(dir $(realpath $(NVCC)))../include -lnccl),0)
endif
# clang fails where a loop marked simd stays scalar; gcc does not know the word
WARN     := -Wall -Wextra -Wshadow -Werror $(if $(filter 1,$(call compiles,int main(void){return 0;},-Wpass-failed)),-Wno-pass-failed)
COMMIT   := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)

# no-math-errno, no-trapping-math: let sqrt and selects become vector code; results are the same
CFLAGS   ?= -O3 $(NATIVE) -g -fno-math-errno -fno-trapping-math
ALL      := -std=gnu11 $(WARN) $(CFLAGS) $(OPENMP) -DLITESPARK_COMMIT='"$(COMMIT)"'
ifeq ($(SAN),1)
ALL      += -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
ifeq ($(MPI),1)
WITH_MPI := -DUSE_MPI $(MPI_C)
LINK_MPI := $(MPI_L)
endif

help:
	@echo 'make run      build, make the default data, train on all cores (OUT=$(OUT))'
	@echo 'make sft      then answers to questions: $(OUT)-sft     make dpo   then preferences: $(OUT)-dpo'
	@echo 'make train    build ./train_litespark     make data   the default data, data/stories'
	@echo 'make test     all tests that need no GPU; SAN=1 with sanitizers; T=word some      make test-hf   against Hugging Face (pip)'
	@echo 'make test-cuda   the CUDA trainer against the twin, emulated (g++); test-long: all of it; test-ptx: the nvcc binary under ptxcpu'
	@echo 'make test-zero   ZeRO and HSDP are runs of one rank; test-zero-long: all of them; test-zero-ptx: the nvcc binary under ptxcpu'
	@echo 'make test-data   the preparation of data (python3)      make test-plots, test-terminal, test-energy, test-split   what runs show      make fuzz   the file parsers (clang; SECONDS_EACH=60)'
	@echo 'make faults   kills, full disks, damage, signals: nothing is lost (COUNT=1000; faults-quick: 40 s)     make test-hosts   several hosts (root)'
	@echo 'make check    facts that must hold of the sources     make sync   shared region and kernels to their copies'
	@echo 'make benchmark   against PyTorch (pip): the same losses, then speed, memory, energy (ARGS; dev/results/); test-benchmark tests it'
	@echo 'make bench    matrix products against OpenBLAS; K=rmsnorm_backward: variants of a kernel, K=all: their checks (dev/README.md)'
	@echo 'make gpu-report   on a machine with a GPU: proof, kernels, training, measured; writes dev/results/'
	@echo 'make gpu-quick   the same in minutes on a lent machine (OUT=folder); gpu-quick-build: builds it here; test-gpu-quick: tests it here'
	@echo 'make ptxas   registers and spills of the CUDA kernels     make clean'
	@echo
	@echo 'found: $(CC) $(if $(NATIVE),with,without) -march=native | OpenMP $(if $(filter -fopenmp,$(OPENMP)),yes,no: one thread) |' \
	      'MPI $(if $(filter 1,$(MPI)),yes,no: one process (apt-get install openmpi-bin libopenmpi-dev)) |' \
	      '$(if $(NVCC),nvcc yes$(if $(filter 1,$(MPI)),$(comma) NCCL $(if $(filter 1,$(NCCL)),yes,no: one GPU (apt-get install libnccl2 libnccl-dev))),nvcc no) | git commit $(COMMIT)'

# One name for the trainer of this machine: ./train_litespark is a link to build/.
ifeq ($(DEVICE),auto)
BUILT    := $(if $(and $(NVCC),$(GPU_CC)),cuda,cpu)
WHY      := $(if $(GPU_CC),$(if $(NVCC),a GPU answers,a GPU answers but there is no nvcc),no GPU of compute capability 8.0 or newer answers)
else
BUILT    := $(DEVICE)
WHY      := DEVICE=$(DEVICE)
endif
TRAINER_cpu  := build/train_litespark
TRAINER_cuda := build/train_litespark_cuda
TRAINER_emu  := build/train_litespark_emu
MPI_cpu = $(MPI)
MPI_emu = $(MPI)
MPI_cuda = $(and $(filter 1,$(MPI)),$(filter 1,$(NCCL)))
train: $(or $(TRAINER_$(BUILT)),$(error DEVICE=$(DEVICE): choose auto, cpu, cuda or emu)) data/stories/stories.json
	@ln -sf $< train_litespark
	@echo 'train: ./train_litespark is the $(subst emu,emulated CUDA,$(BUILT)) trainer, $(if $(filter 1,$(MPI_$(BUILT))),with,without) MPI ($(WHY))'

# Empty files named after a set of flags: they change when the flags do, and what depends on them is built again.
flags     = build/$(1)-$(shell echo '$(2)' | cksum | cut -d' ' -f1)
FLAGS    := $(call flags,flags,$(CC) $(ALL) $(WITH_MPI))
build/flags-% build/nv-flags-% build/emu-flags-% build/quick-flags-%:
	@mkdir -p build && rm -f $(@:%-$*=%)-* && touch $@

build/train_litespark: train_litespark.c $(FLAGS)
	$(CC) $(ALL) $(WITH_MPI) $< -o $@ $(LINK_MPI) -lm

# GPU_ARCH: bare numbers, each with machine code and PTX, or native; default: this machine's GPUs, else a fat binary. ptxcpu needs CUDART=shared.
GPU_ARCH ?= $(or $(GPU_CC),80 90)
arch      = $(or $(shell echo '$(1)' | grep -Ex '([89]|1[0-9])[0-9][af]?'),$(error GPU_ARCH=$(1): $(if $(filter sm_% compute_%,$(1)),say $(subst sm_,,$(1:compute_%=%)),litespark needs compute capability 8.0 or newer: numbers from 80 on, such as GPU_ARCH='80 90')))
override GPU_ARCH := $(foreach a,$(patsubst native,$(if $(filter native,$(GPU_ARCH)),$(or $(GPU_CC),$(error GPU_ARCH=native: no GPU of compute capability 8.0 or newer answers (nvidia-smi); say numbers, such as GPU_ARCH=90))),$(GPU_ARCH)),$(call arch,$a))
# What nvcc makes for a GPU_ARCH. For 90 the machine code is sm_90a's: wgmma and TMA exist only there; its PTX runs on what comes later.
gencode   = $(foreach a,$(1),$(if $(filter 90,$a),-gencode arch=compute_90a$(comma)code=sm_90a -gencode arch=compute_90$(comma)code=compute_90,-gencode arch=compute_$a$(comma)code=[sm_$a$(comma)compute_$a]))
CUDART   ?= static
NVFLAGS  := -O3 -std=c++17 -lineinfo -Werror all-warnings -Xcompiler -Wall -Xcompiler -fno-math-errno $(OPENMP:%=-Xcompiler %) -cudart $(CUDART) $(call gencode,$(GPU_ARCH)) \
            -DLITESPARK_COMMIT='"$(COMMIT)"'
ifneq ($(MPI_cuda),)
NV_MPI   := -DUSE_MPI $(MPI_C) $(subst -pthread,-Xcompiler -pthread,$(subst -Wl$(comma),-Xlinker=,$(MPI_L))) -lnccl
endif
NV_FLAGS := $(call flags,nv-flags,$(NVCC) $(NVFLAGS) $(NV_MPI))
build/train_litespark_cuda: train_litespark.cu $(NV_FLAGS)
	$(if $(filter-out 1,$(NCCL)),$(if $(filter-out file,$(firstword $(origin MPI))),$(if $(filter 1,$(MPI)),$(error MPI=1: the CUDA trainer needs NCCL too (apt-get install libnccl2 libnccl-dev); MPI=0 builds it for one GPU))))
	$(if $(NVCC),,$(error DEVICE=cuda needs nvcc (CUDA Toolkit 12 or newer) on PATH; DEVICE=cpu builds the CPU trainer))
	$(NVCC) $(NVFLAGS) $< -o $@ $(NV_MPI) -lcublasLt -ldl

# Registers, shared memory and spills of every kernel, as the compiler reports them; exit status 1 if one spills or its wgmma wait for each other.
PTXAS_ARCH ?= 80 90a
PTXAS_OUT  := $(PTXAS_ARCH:%=build/ptxas_sm_%.txt)
build/ptxas_sm_%.txt: train_litespark.cu
	@mkdir -p build
	$(NVCC) -O3 -std=c++17 -lineinfo -gencode arch=compute_$*,code=sm_$* -Xptxas -v -cubin $< -o build/ptxas_sm_$*.cubin >$@.log 2>&1 || { cat $@.log; exit 1; }
	@mv $@.log $@
ptxas: $(if $(NVCC),$(PTXAS_OUT))
	@$(if $(NVCC),python3 dev/ptxas.py $(foreach a,$(PTXAS_ARCH),sm_$a=build/ptxas_sm_$a.txt),echo 'skipped: ptxas: no nvcc on PATH (CUDA Toolkit 12 or newer)')

# The CUDA source as plain C++ over dev/emu: no CUDA toolkit, no GPU.
CXX      := $(if $(filter default,$(origin CXX)),g++,$(CXX))
EMU      := $(CXX) -x c++ -std=c++17 -g -fno-math-errno $(OPENMP) $(if $(filter 1,$(SAN)),-fsanitize=address$(comma)undefined) -Idev/emu
EMU_FLAGS := $(call flags,emu-flags,$(EMU) $(WITH_MPI))
build/train_litespark_emu: train_litespark.cu $(wildcard dev/emu/*.h dev/emu/*/*.h) $(EMU_FLAGS)
	$(EMU) -O2 $< -o $@ $(WITH_MPI) $(LINK_MPI) -ldl

PTXCPU   ?= $(wildcard ../shared/ptxcpu)
BENCH_BINARIES := $(if $(and $(NVCC),$(GPU_CC)),gpu,emu $(if $(NVCC),ptx))
BENCH_PTXCPU   := $(if $(filter ptx,$(BENCH_BINARIES)),$(if $(PTXCPU),build/ptxcpu/made))
BENCH_LACKS    := $(strip $(if $(shell command -v $(CXX) 2>/dev/null),,g++) $(if $(shell command -v python3 2>/dev/null),,python3))
BENCHES        := $(sort $(basename $(notdir $(wildcard dev/*.cu))))
# Against OpenBLAS, where it is installed (apt-get install libopenblas0-openmp).
OPENBLAS ?= $(wildcard /usr/lib/*/openblas-openmp/libopenblas.so.0)
build/bench_matmul: dev/bench_matmul.c train_litespark.c
	@mkdir -p build
	$(CC) -std=gnu11 $(CFLAGS) $(OPENMP) -w $< -o $@ -ldl -lm
ifeq ($(K),)
bench: build/bench_matmul
	build/bench_matmul 2 $(OPENBLAS)
else ifneq ($(BENCH_LACKS),)
bench:
	@echo 'skipped: bench K=$(K): apt-get install $(BENCH_LACKS)'
else
$(if $(filter $(K),all $(BENCHES)),,$(error bench K=$(K): choose all or one of $(BENCHES)))
bench: $(if $(filter all,$(K)),$(BENCHES:%=build/dev/%/emu),$(foreach b,$(BENCH_BINARIES),build/dev/$(K)/$b) $(BENCH_PTXCPU))
	@K='$(K)' BENCHES='$(BENCHES)' BINARIES='$(BENCH_BINARIES)' PTXCPU='$(BENCH_PTXCPU)' dev/bench.sh $(V)
endif

# Kernels, one bench per op: make bench K=rmsnorm_backward [V='0 1'], K=all checks all. A GPU measures; else dev/emu checks and nvcc and ptxcpu count.
build/dev/twin.o: dev/twin.c train_litespark.c $(FLAGS)
	@mkdir -p build/dev
	$(CC) -std=gnu11 -O2 $(NATIVE) -fno-math-errno -fno-trapping-math $(OPENMP) -w -c $< -o $@
build/dev/%/trainer.cuh: dev/%.cu dev/bench.cuh dev/kernels.py train_litespark.cu
	@mkdir -p $(@D)
	@python3 dev/kernels.py extract $< >$@.part && mv $@.part $@
# SAN=1: addresses only; with undefined behaviour, too, g++ takes five minutes for attention's backward
build/dev/%/emu: dev/%.cu dev/bench.cuh dev/twin.h build/dev/%/trainer.cuh build/dev/twin.o $(wildcard dev/emu/*.h dev/emu/*/*.h) $(EMU_FLAGS)
	@echo '$(CXX) ... $< -o $@'
	@$(subst address$(comma)undefined,address,$(EMU)) -O1 -Wall -Wno-unused-function -Wno-unknown-pragmas -I$(@D) $< -x none build/dev/twin.o -o $@ -ldl -lm
BENCH_NV := -O3 -std=c++17 -lineinfo -diag-suppress 177 -Xptxas -v $(OPENMP:%=-Xcompiler %)
build/dev/%/gpu: dev/%.cu dev/bench.cuh dev/twin.h build/dev/%/trainer.cuh build/dev/twin.o $(NV_FLAGS)
	@echo '$(NVCC) ... $< -o $@'
	@$(NVCC) $(BENCH_NV) $(call gencode,$(GPU_ARCH)) -I$(@D) $< build/dev/twin.o -o $@ >$@.log 2>&1 || { cat $@.log; exit 1; }
build/dev/%/ptx: dev/%.cu dev/bench.cuh dev/twin.h build/dev/%/trainer.cuh build/dev/twin.o
	@echo '$(NVCC) ... $< -o $@'
	@$(NVCC) $(BENCH_NV) -cudart shared $(call gencode,80 $(if $(shell grep -l wgmma $<),90a)) -I$(@D) $< build/dev/twin.o -o $@ >$@.log 2>&1 || { cat $@.log; exit 1; }
.PRECIOUS: build/dev/%/trainer.cuh

build/stories: data/stories.c
	@mkdir -p build
	$(CC) -O2 $(WARN) $< -o $@ -lm

data: data/stories/stories.json
# again, too, where one of its shards is gone
SHARDS   := $(addprefix data/stories/,train/train_000.ds val/val_000.ds sft/train/train_000.ds sft/validation/val_000.ds dpo/train/train_000.ds dpo/validation/val_000.ds)
data/stories/stories.json: build/stories $(if $(filter-out $(wildcard $(SHARDS)),$(SHARDS)),again)
again:
	build/stories --out data/stories

RANKS    ?= 1
ifneq ($(RANKS),1)
$(if $(shell echo '$(RANKS)' | grep -Ex '[1-9][0-9]{0,5}'),,$(error RANKS='$(RANKS)': say how many ranks, a whole number from 1 on, such as RANKS=2))
endif
run: train      # dev/run.sh: mpirun with signals that save
	exec $(TRAINER) --resume auto --out $(OUT) $(ARGS)

# The stages after pre-training: answers to questions about stories (sft), endings to prefer (dpo). Each begins with the last
# checkpoint in OUT, which `make run` makes if there is none, and goes to OUT-sft or OUT-dpo. Before and after: held-out data.
# An update of sft is 4 rows (RANKS up to 4): twice as many updates of the same tokens.
TRAINER     = $(if $(filter-out 1,$(RANKS)),dev/run.sh -np $(RANKS) --oversubscribe )./train_litespark
LR_sft      = 3e-3
LR_dpo      = 1e-3
MORE_sft    = --epochs 1.2 --total-batch-tokens 1024 --val-every 800 --sample-every 0
VAL_sft     = --stage sft --val-data 'data/stories/sft/validation/*.ds'
VAL_dpo     = --eval-tasks 'data/stories/dpo/choices/*.ds' --seq-len 256
sft dpo: train
	@ls -d $(OUT)/step_???????? >/dev/null 2>&1 || $(MAKE) --no-print-directory run ARGS=
	@base=$$(ls -d $(OUT)/step_???????? | tail -n 1) && echo "$@: from $$base to $(OUT)-$@" && \
	./train_litespark --eval-only --init-from $$base $(VAL_$@) | sed -n 's/^step 0/before training/p' && \
	exec $(TRAINER) --stage $@ --resume auto --init-from $$base --out $(OUT)-$@ --train-data 'data/stories/$@/train/*.ds' \
	    --val-data 'data/stories/$@/validation/*.ds' --lr $(or $(LR),$(LR_$@)) $(if $(filter --steps --epochs,$(ARGS)),,$(MORE_$@)) $(ARGS)

# ---- tests: in-process in floats and in doubles, and the program as a user runs it
TEST_ALL := $(ALL) -O2 -Wno-unused-function -Wno-clobbered -DPOISON
build/test_litespark:        FORM := float
build/test_litespark_double: FORM := double
build/test_litespark build/test_litespark_double: test_litespark.c train_litespark.c $(FLAGS)
	$(CC) $(TEST_ALL) -DfloatX=$(FORM) $< -o $@ -lm

# T='word word': only tests with such names. With SAN=1 the planted errors, a property of the tests, are left to the plain run.
# Without T and SAN the CUDA trainer follows, emulated.
TEST_CPU  = CC='$(CC)' build/test_litespark --also build/test_litespark_double $(if $(filter 1,$(SAN)),--without planted) $(T)
test: build/test_litespark build/test_litespark_double build/train_litespark
	@dev/test.sh "$(TEST_CPU)" $(if $(T)$(filter 1,$(SAN)),,"$(MAKE) --no-print-directory test-cuda")

# The CUDA trainer against the twin: over dev/emu (g++ alone; minutes), the nvcc binary under ptxcpu, every shape and
# several schedules (test-long: five minutes).
build/test_cuda: dev/test_cuda.c train_litespark.c $(FLAGS)
	$(CC) $(TEST_ALL) $< -o $@ -lm
build/train_litespark_double: train_litespark.c $(FLAGS)
	$(CC) $(TEST_ALL) -DfloatX=double $< -o $@ -lm
build/train_litespark_ptx: train_litespark.cu
	@mkdir -p build
	$(NVCC) -O3 -std=c++17 -lineinfo -cudart shared -gencode arch=compute_80,code=[sm_80,compute_80] $< -o $@ -lcublasLt -ldl
PROVE    := build/train_litespark build/train_litespark_double build/test_cuda
HAVE_CXX := $(shell command -v $(CXX) 2>/dev/null)
test-cuda test-long: $(if $(HAVE_CXX),build/train_litespark_emu $(PROVE))
	@$(if $(HAVE_CXX),CXX='$(CXX)' build/test_cuda --cuda build/train_litespark_emu --level $(if $(filter test-long,$@),long,quick) $(T),echo 'skipped: $@: no C++ compiler (apt-get install g++)')

# Stages sft and dpo of both trainers, as a user runs them; with TRL's numbers where they are.
ORACLE   ?= $(wildcard ../shared/data/oracle/trl)
test-stages: build/train_litespark $(if $(HAVE_CXX),build/train_litespark_emu)
	@python3 dev/test_stages.py $(ORACLE:%=--oracle %) $^ $(T)

# ZeRO 0 to 3 and HSDP: as of one rank. Over dev/emu, with NCCL over MPI (test-zero: two minutes; -long: all), or the nvcc binary.
build/train_litespark_ptx_ranks: train_litespark.cu
	@mkdir -p build
	$(NVCC) -O3 -std=c++17 -lineinfo -cudart shared -gencode arch=compute_80,code=[sm_80,compute_80] $< -o $@ -lcublasLt -ldl $(NV_MPI)
ZERO_PTX := $(if $(NV_MPI),$(if $(and $(NVCC),$(PTXCPU)),1))
test-zero test-zero-long: $(if $(filter 1,$(MPI)),build/train_litespark $(if $(HAVE_CXX),build/train_litespark_emu))
	@$(if $(filter 1,$(MPI)),python3 dev/test_zero.py --level $(if $(filter test-zero-long,$@),long,quick) $^ $(T),echo 'skipped: $@: no MPI (apt-get install openmpi-bin libopenmpi-dev)')
test-zero-ptx: $(if $(ZERO_PTX),build/ptxcpu/made build/train_litespark_ptx_ranks build/train_litespark)
	@if [ -z '$(ZERO_PTX)' ]; then echo 'skipped: test-zero-ptx: needs nvcc, NCCL, MPI and ptxcpu (PTXCPU=path)'; \
	elif [ ! -f build/ptxcpu/made ]; then echo 'skipped: test-zero-ptx: ptxcpu does not build, see build/ptxcpu.log'; \
	else python3 dev/test_zero.py --level ptx 'build/ptxcpu/ptxcpu --race --initcheck --cache build/ptxcache -- build/train_litespark_ptx_ranks' $(T); fi

build/ptxcpu/made:
	@mkdir -p build && rm -rf build/ptxcpu && cp -r '$(PTXCPU)' build/ptxcpu && chmod -R u+w build/ptxcpu && if $(MAKE) -C build/ptxcpu >build/ptxcpu.log 2>&1; then touch $@; fi
test-ptx: $(if $(and $(NVCC),$(PTXCPU)),build/ptxcpu/made build/train_litespark_ptx $(PROVE))
	@if [ -z '$(NVCC)' ]; then echo 'skipped: test-ptx: no nvcc on PATH (CUDA Toolkit 12 or newer)'; \
	elif [ -z '$(PTXCPU)' ]; then echo 'skipped: test-ptx: no ptxcpu (PTXCPU=path)'; \
	elif [ ! -f build/ptxcpu/made ]; then echo 'skipped: test-ptx: ptxcpu does not build, see build/ptxcpu.log (apt-get install libzstd-dev liblz4-dev)'; \
	else build/test_cuda --timeout 900 --cuda 'build/ptxcpu/ptxcpu --race --initcheck --cache build/ptxcache -- build/train_litespark_ptx' --level ptx $(T); fi
test-stages-ptx: $(if $(and $(NVCC),$(PTXCPU)),build/ptxcpu/made build/train_litespark_ptx)
	@if [ ! -f build/ptxcpu/made ]; then echo 'skipped: test-stages-ptx: see test-ptx'; \
	else python3 dev/test_stages.py $(ORACLE:%=--oracle %) 'build/ptxcpu/ptxcpu --race --initcheck --cache build/ptxcache -- build/train_litespark_ptx' $(or $(T),ln_2 packed counted); fi

# A thousand faults, half an hour on two idle cores, whose table is dev/FAULTS.md; some of them in less than a minute; several hosts
# as network namespaces (root).
COUNT    ?= 1000
SEED     ?= 1
faults faults-quick: build/train_litespark
	@if ! mpirun --version >/dev/null 2>&1; then echo 'skipped: $@: no mpirun (apt-get install openmpi-bin libopenmpi-dev)'; \
	else CC='$(CC)' python3 dev/faults.py --seed $(SEED) $(if $(filter faults,$@),--count $(COUNT) --report dev/FAULTS.md,--ranks 1 2 --stages 0 --seconds 40); fi
test-hosts: build/train_litespark
	@dev/test_hosts.sh

# dev/gpu_quick.sh over the emulation, with stand-ins for nvidia-smi, ncu and such
test-gpu-quick: $(if $(HAVE_CXX),build/train_litespark_emu $(PROVE))
	@$(if $(HAVE_CXX),python3 dev/test_gpu_quick.py,echo 'skipped: $@: no C++ compiler (apt-get install g++)')

# The floor of the default data, recomputed from the text by an independent scorer.
build/test_stories: dev/test_stories.c data/stories.c
	@mkdir -p build
	$(CC) -std=gnu11 -O2 $(WARN) -Wno-unused-function $< -o $@ -lm
test-stories: build/test_stories build/stories
	build/test_stories build/stories 1000

# Newest transformers and safetensors from PyPI, in build/venv; HF_PYTHON=/path/python takes another one.
HF_PYTHON ?= build/venv/bin/python
HF_SECONDS ?= 900
WITH_HF    = if [ ! -x $(HF_PYTHON) ]; then python3 -m venv build/venv && build/venv/bin/pip install -q torch transformers safetensors numpy >build/pip.log 2>&1 || rm -rf build/venv; fi; \
	if [ ! -x $(HF_PYTHON) ]; then echo 'skipped: $@: pip cannot install torch and transformers (pip install torch transformers safetensors numpy; build/pip.log)'; else $(1); fi
test-hf: build/train_litespark
	@$(call WITH_HF,timeout $(HF_SECONDS) $(HF_PYTHON) dev/test_hf.py --binary build/train_litespark)

# litespark and PyTorch in turns: the same losses first, then speed, memory and energy. ARGS: options of dev/benchmark.py.
benchmark: train
	@$(call WITH_HF,$(HF_PYTHON) dev/benchmark.py --binary $(TRAINER_$(BUILT)) $(if $(filter cuda,$(BUILT)),,--device cpu) $(ARGS))
test-benchmark: build/train_litespark
	@$(call WITH_HF,$(HF_PYTHON) dev/test_benchmark.py)

test-data:
	@if python3 -c 'import numpy' 2>/dev/null; then python3 data/test_tokens.py && python3 data/test_choices.py && python3 data/test_chat.py; else echo 'skipped: test-data: no python3 with numpy (pip install numpy sentencepiece tiktoken tokenizers jinja2 transformers)'; fi

# The page, pictures and exports of logs; pages need chromium, pictures matplotlib.
test-plots: build/train_litespark
	@if python3 -c '' 2>/dev/null; then python3 dev/test_plots.py $< $(T); else echo 'skipped: test-plots: no python3'; fi

# What a run prints on a terminal and into a pipe.
test-terminal: build/train_litespark $(if $(HAVE_CXX),build/train_litespark_emu)
	@if python3 -c '' 2>/dev/null; then python3 dev/test_terminal.py $^ $(T); else echo 'skipped: test-terminal: no python3'; fi

# The energy of runs, with counters that the test makes.
test-energy: build/train_litespark $(if $(HAVE_CXX),build/train_litespark_emu)
	@if python3 -c '' 2>/dev/null; then python3 dev/test_energy.py $^ $(T); else echo 'skipped: test-energy: no python3'; fi

# Where the time of an update goes, with reads that the test makes slow; ranges for profilers.
test-split: build/train_litespark $(if $(HAVE_CXX),build/train_litespark_emu)
	@if python3 -c '' 2>/dev/null; then CC='$(CC)' python3 dev/test_split.py $^ $(T); else echo 'skipped: test-split: no python3'; fi

# ---- fuzzing: libFuzzer, one program for all parsers
SECONDS_EACH ?= 60
FUZZ     := json config safetensors index shard tokenizer options state
CLANG    ?= clang
build/fuzz: dev/fuzz.c train_litespark.c
	@mkdir -p build
	$(CLANG) -std=gnu11 -g -O1 -w -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined $< -o $@ -lm
fuzz:
	@CLANG='$(CLANG)' SECONDS_EACH=$(SECONDS_EACH) dev/fuzz.sh $(FUZZ)

# Everything on a machine with a GPU: proof, kernels, training; writes dev/results/. Hours for the largest presets: PARTS, PRESETS choose.
PARTS    ?= proof kernels training
PRESETS  ?= 15M smollm2-135M 100M llama3.2-1B 3B
gpu-report: $(if $(and $(NVCC),$(GPU_CC)),build/train_litespark_cuda $(PROVE))
	@python3 dev/gpu_report.py --parts '$(PARTS)' --presets '$(PRESETS)'

# Minutes on a lent GPU: dev/gpu_quick.sh, which needs no make there. All it runs is built here, to run on another Debian or Ubuntu
# (glibc 2.34): no MPI; the CPU programs static; of the CUDA programs libgomp and cudart static, libcublasLt is found there.
QUICK    := build/gpu-quick
QUICK_ARCH ?= 90
QUICK_CC := $(CC) -std=gnu11 -O3 -march=x86-64-v3 -fno-math-errno -fno-trapping-math -fopenmp -w -DPOISON
QUICK_NV := $(NVCC) -O3 -std=c++17 -lineinfo $(call gencode,$(foreach a,$(QUICK_ARCH),$(call arch,$a))) -DLITESPARK_COMMIT='"$(COMMIT)"'
QUICK_FLAGS := $(call flags,quick-flags,$(QUICK_CC) $(QUICK_NV))
QUICK_ALL := $(addprefix $(QUICK)/,train_litespark train_litespark_double test_cuda train_litespark_cuda attention_forward attention_backward)
$(QUICK)/train_litespark $(QUICK)/train_litespark_double: train_litespark.c $(QUICK_FLAGS)
	@mkdir -p $(@D)
	$(QUICK_CC) -DfloatX=$(if $(filter %double,$@),double,float) -static $< -o $@ -lm
$(QUICK)/test_cuda: dev/test_cuda.c train_litespark.c $(QUICK_FLAGS)
	@mkdir -p $(@D)
	$(QUICK_CC) -static $< -o $@ -lm
$(QUICK)/train_litespark_cuda: train_litespark.cu $(QUICK_FLAGS)
	@mkdir -p $(@D)
	$(QUICK_NV) $< -o $@ -lcublasLt -ldl
build/dev/twin_quick.o: dev/twin.c train_litespark.c $(QUICK_FLAGS)
	@mkdir -p $(@D)
	$(QUICK_CC) -fPIC -c $< -o $@
$(QUICK)/attention_%: dev/attention_%.cu dev/bench.cuh dev/twin.h build/dev/attention_%/trainer.cuh build/dev/twin_quick.o $(QUICK_FLAGS)
	@mkdir -p $(@D)
	@echo '$(NVCC) ... $< -o $@'
	@$(QUICK_NV) -w -Ibuild/dev/attention_$* $< build/dev/twin_quick.o $(shell $(CC) -print-file-name=libgomp.a) -o $@ -ldl
gpu-quick-build: $(if $(NVCC),$(QUICK_ALL))
	@$(if $(NVCC),echo '$(COMMIT)' >$(QUICK)/commit && du -shL --apparent-size $(QUICK) | sed 's/^/gpu-quick-build: /',echo 'skipped: gpu-quick-build: no nvcc on PATH (CUDA Toolkit 12 or newer)')
gpu-quick: $(if $(NVCC),gpu-quick-build)
	@dev/gpu_quick.sh

check:
	@CC='$(CC)' CXX='$(CXX)' dev/check.sh
sync:   # the counts of kernels own the planner's; the .c the shared regions; the .cu its kernels (copies in dev/)
	@python3 dev/speed_model.py --planner sync && python3 dev/story.py sync && python3 dev/kernels.py sync
clean:
	rm -rf build train_litespark
.PHONY: help train ptxas data run sft dpo test test-cuda test-stages test-stages-ptx test-zero test-zero-long test-zero-ptx test-ptx test-long test-hf test-data test-plots test-terminal test-energy test-split fuzz benchmark test-benchmark gpu-report gpu-quick gpu-quick-build test-gpu-quick faults faults-quick test-hosts check sync clean
