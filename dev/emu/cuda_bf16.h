// cuda_bf16.h of dev/emu: bfloat16 as CUDA defines it. Arithmetic goes through fp32 with one rounding to nearest even.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16;
inline float __bfloat162float(__nv_bfloat16 x);
inline __nv_bfloat16 __float2bfloat16_rn(float x);
struct __attribute__((aligned(2))) __nv_bfloat16_raw { unsigned short x; };
struct __attribute__((aligned(2))) __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) { *this = __float2bfloat16_rn(x); }
    __nv_bfloat16(double x) { *this = __float2bfloat16_rn((float)x); }
    __nv_bfloat16(int x) { *this = __float2bfloat16_rn((float)x); }
    __nv_bfloat16(__nv_bfloat16_raw r) : bits(r.x) {}
    operator float() const { return __bfloat162float(*this); }
};
struct __attribute__((aligned(4))) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) : x(a), y(b) {}
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 x) {
    unsigned u = (unsigned)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {          // round to nearest even; NaN becomes 0x7FFF as on the device
    unsigned u;
    memcpy(&u, &f, 4);
    __nv_bfloat16 r;
    r.bits = (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (unsigned short)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
    return r;
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat16 __float2bfloat16_rz(float f) {
    __nv_bfloat16 r;
    r.bits = f != f ? 0x7FFF : (unsigned short)(__float_as_uint(f) >> 16);
    return r;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { __nv_bfloat16 r; r.bits = u; return r; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return __nv_bfloat162(x, y); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return __nv_bfloat162(__float2bfloat16_rn(x), __float2bfloat16_rn(y));
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __nv_bfloat162 __float2bfloat162_rn(float v) { return __floats2bfloat162_rn(v, v); }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 v) { return __nv_bfloat162(v, v); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return make_float2(__bfloat162float(v.x), __bfloat162float(v.y)); }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __float2bfloat16_rn(fmaf((float)a, (float)b, (float)c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return __nv_bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
#define EMU_BF16(name, expr)                                                                                               \
    inline __nv_bfloat16 name(__nv_bfloat16 p, __nv_bfloat16 q) { float a = p, b = q; return __float2bfloat16_rn(expr); }  \
    inline __nv_bfloat162 name##2(__nv_bfloat162 p, __nv_bfloat162 q) { return __nv_bfloat162(name(p.x, q.x), name(p.y, q.y)); }
EMU_BF16(__hadd, a + b)
EMU_BF16(__hsub, a - b)
EMU_BF16(__hmul, a * b)
EMU_BF16(__hmax, fmaxf(a, b))
EMU_BF16(__hmin, fminf(a, b))
inline __nv_bfloat16 __hneg(__nv_bfloat16 a) { a.bits ^= 0x8000; return a; }
inline bool __hisnan(__nv_bfloat16 a) { return (a.bits & 0x7FFF) > 0x7F80; }
