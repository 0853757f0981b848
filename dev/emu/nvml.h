// nvml.h of dev/emu: nothing to emulate. The trainer declares NVML's few prototypes itself and opens libnvidia-ml.so.1 at run
// time; where that fails, as it does without an NVIDIA driver, power and energy are "unavailable".
#pragma once
