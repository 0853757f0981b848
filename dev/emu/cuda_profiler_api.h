// cuda_profiler_api.h of dev/emu: cudaProfilerStart and cudaProfilerStop are in cuda_runtime.h.
#pragma once
#include "cuda_runtime.h"
