// cuda_bf16.h of dev/emu: bfloat16 as CUDA defines it. Arithmetic goes through fp32 with one rounding to nearest even.
#pragma once
#include "cuda_runtime.h"

struct __attribute__((aligned(2))) __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {                                  // rounds to nearest even; NaN becomes 0x7FFF as on the device
        const unsigned u = __float_as_uint(f);
        bits = (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (unsigned short)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
struct __attribute__((aligned(4))) __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return __nv_bfloat162{x, y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
