// cuda_runtime.h of dev/emu: the part of CUDA's language and runtime API that a trainer uses, for a plain C++ compiler.
// The engine is emu.h; what is replaced in device code is emu_verbs.h. See README.md for the limits.
#pragma once
#ifdef __CUDACC__
#error "dev/emu is on nvcc's include path: it is only for builds without CUDA"
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- language ---------------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local       // a block runs on one OS thread; emu.h poisons these at the start of a block
#define CUDART_VERSION 13000
#define CUDART_INF_F __builtin_inff()

#define EMU_VECTOR(T, name, align2, align4)                                                                                \
    struct __attribute__((aligned(align2))) name##2 { T x, y; };                                                           \
    struct name##3 { T x, y, z; };                                                                                         \
    struct __attribute__((aligned(align4))) name##4 { T x, y, z, w; };                                                     \
    inline name##2 make_##name##2(T x, T y) { return name##2{x, y}; }                                                      \
    inline name##3 make_##name##3(T x, T y, T z) { return name##3{x, y, z}; }                                              \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4{x, y, z, w}; }
EMU_VECTOR(signed char, char, 2, 4)
EMU_VECTOR(unsigned char, uchar, 2, 4)
EMU_VECTOR(short, short, 4, 8)
EMU_VECTOR(unsigned short, ushort, 4, 8)
EMU_VECTOR(int, int, 8, 16)
EMU_VECTOR(unsigned, uint, 8, 16)
EMU_VECTOR(float, float, 8, 16)
EMU_VECTOR(long long, longlong, 16, 16)
EMU_VECTOR(unsigned long long, ulonglong, 16, 16)
EMU_VECTOR(double, double, 16, 16)
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInitializationError = 3,
    cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevicePointer = 17, cudaErrorInvalidMemcpyDirection = 21,
    cudaErrorInsufficientDriver = 35, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600, cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701, cudaErrorAssert = 710, cudaErrorHostMemoryAlreadyRegistered = 712,
    cudaErrorHostMemoryNotRegistered = 713, cudaErrorMisalignedAddress = 716, cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801, cudaErrorUnknown = 999
};
inline thread_local uint3 threadIdx, blockIdx;               // of the running thread: emu.h sets them at every switch
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;
#include "emu.h"

// ---- barriers, warp operations, atomics ---------------------------------------------------------------------------------
#define EMU_INLINE inline __attribute__((always_inline))
namespace emu {                                              // not tail calls: the return address must lie in the kernel
EMU_INLINE int sync_threads(int value, int line, const char *name) {
    int r = barrier(0, 0, line, value, true, name);
    asm volatile("");
    return r;
}
EMU_INLINE void warp_sync(const Verb *verb, uint32_t mask, void *args) { warp_op(verb, mask, args); asm volatile(""); }
}
EMU_INLINE void __syncthreads(int line = __builtin_LINE()) { emu::sync_threads(0, line, "__syncthreads"); }
EMU_INLINE int __syncthreads_count(int p, int line = __builtin_LINE()) {
    return emu::sync_threads(p != 0, line, "__syncthreads_count");
}
EMU_INLINE int __syncthreads_or(int p, int line = __builtin_LINE()) {
    return emu::sync_threads(p != 0, line, "__syncthreads_or") != 0;
}
EMU_INLINE int __syncthreads_and(int p, int line = __builtin_LINE()) {
    return emu::sync_threads(p == 0, line, "__syncthreads_and") == 0;
}

namespace emu {
template <typename T> struct Shuffle { T value; int source; T result; };
template <typename T> void shuffle_complete(void **args, uint32_t lanes) {
    for (uint32_t m = lanes; m; m &= m - 1) {
        Shuffle<T> *a = (Shuffle<T> *)args[__builtin_ctz(m)];
        if (!(lanes >> a->source & 1)) fail(cudaErrorLaunchFailure,
            "shuffle: lane %d reads lane %d, which is not in the mask %08x", __builtin_ctz(m), a->source, lanes);
        a->result = ((Shuffle<T> *)args[a->source])->value;
    }
}
template <typename T> EMU_INLINE T shuffle(uint32_t mask, T value, int source) {
    static constexpr Verb verb = {"__shfl_sync", shuffle_complete<T>};
    Shuffle<T> a = {value, source, value};
    warp_sync(&verb, mask, &a);
    return a.result;
}
inline void nothing(void **, uint32_t) {}
struct Vote { uint64_t value; uint64_t result; };
enum VoteKind { BALLOT, MATCH, ADD, MIN, MAX, UMIN, UMAX, AND, OR, XOR };
template <int kind> void vote_complete(void **args, uint32_t lanes) {
    const int first = __builtin_ctz(lanes);
    uint64_t all = kind == BALLOT ? 0 : ((Vote *)args[first])->value;
    for (uint32_t m = kind == BALLOT ? lanes : lanes & (lanes - 1); m && kind != MATCH; m &= m - 1) {
        const uint64_t v = ((Vote *)args[__builtin_ctz(m)])->value;
        if (kind == BALLOT) all |= (uint64_t)(v != 0) << __builtin_ctz(m);
        if (kind == ADD) all += v;
        if (kind == MIN) all = (int)v < (int)all ? v : all;
        if (kind == MAX) all = (int)v > (int)all ? v : all;
        if (kind == UMIN) all = v < all ? v : all;
        if (kind == UMAX) all = v > all ? v : all;
        if (kind == AND) all &= v;
        if (kind == OR) all |= v;
        if (kind == XOR) all ^= v;
    }
    for (uint32_t m = lanes; m; m &= m - 1) {
        Vote *a = (Vote *)args[__builtin_ctz(m)];
        if (kind == MATCH) {
            all = 0;
            for (uint32_t o = lanes; o; o &= o - 1) all |= (uint64_t)(((Vote *)args[__builtin_ctz(o)])->value == a->value) <<
                __builtin_ctz(o);
        }
        a->result = all;
    }
}
template <int kind> EMU_INLINE uint64_t vote(uint32_t mask, uint64_t value) {
    static constexpr Verb verb = {kind == BALLOT ? "a warp vote" : kind == MATCH ? "__match_any_sync" : "__reduce_sync",
        vote_complete<kind>};
    Vote a = {value, 0};
    warp_sync(&verb, mask, &a);
    return a.result;
}
}  // namespace emu
#define EMU_WARP template <typename T> EMU_INLINE T
EMU_WARP __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
    return emu::shuffle(mask, v, (emu::me->lane & ~(width - 1)) | (lane & (width - 1)));
}
EMU_WARP __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
    int lane = emu::me->lane, s = lane ^ x;
    return emu::shuffle(mask, v, s <= (lane | (width - 1)) ? s : lane);
}
EMU_WARP __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32) {
    int lane = emu::me->lane, s = lane + (int)d;
    return emu::shuffle(mask, v, s <= (lane | (width - 1)) ? s : lane);
}
EMU_WARP __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32) {
    int lane = emu::me->lane, s = lane - (int)d;
    return emu::shuffle(mask, v, s >= (lane & ~(width - 1)) ? s : lane);
}
EMU_INLINE void __syncwarp(unsigned mask = ~0u) {
    static constexpr emu::Verb verb = {"__syncwarp", emu::nothing};
    emu::warp_sync(&verb, mask, nullptr);
}
EMU_INLINE unsigned __ballot_sync(unsigned mask, int p) { return (unsigned)emu::vote<emu::BALLOT>(mask, p != 0); }
EMU_INLINE int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
EMU_INLINE int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
template <typename T> EMU_INLINE unsigned __match_any_sync(unsigned mask, T v) {
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    return (unsigned)emu::vote<emu::MATCH>(mask, bits);
}
EMU_INLINE int __reduce_add_sync(unsigned mask, int v) { return (int)emu::vote<emu::ADD>(mask, (unsigned)v); }
EMU_INLINE unsigned __reduce_add_sync(unsigned mask, unsigned v) { return (unsigned)emu::vote<emu::ADD>(mask, v); }
EMU_INLINE int __reduce_min_sync(unsigned mask, int v) { return (int)emu::vote<emu::MIN>(mask, (unsigned)v); }
EMU_INLINE int __reduce_max_sync(unsigned mask, int v) { return (int)emu::vote<emu::MAX>(mask, (unsigned)v); }
EMU_INLINE unsigned __reduce_min_sync(unsigned mask, unsigned v) { return (unsigned)emu::vote<emu::UMIN>(mask, v); }
EMU_INLINE unsigned __reduce_max_sync(unsigned mask, unsigned v) { return (unsigned)emu::vote<emu::UMAX>(mask, v); }
EMU_INLINE unsigned __reduce_and_sync(unsigned mask, unsigned v) { return (unsigned)emu::vote<emu::AND>(mask, v); }
EMU_INLINE unsigned __reduce_or_sync(unsigned mask, unsigned v) { return (unsigned)emu::vote<emu::OR>(mask, v); }
EMU_INLINE unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return (unsigned)emu::vote<emu::XOR>(mask, v); }

// Atomics: on values of 4 or 8 bytes by compare-and-swap; they return the old value.
template <typename T, typename F> EMU_INLINE T emu_atomic(T *p, F next) {
    typedef std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t> U;
    emu::check_access("atomic", p, sizeof(T), sizeof(T));
    emu::me->worker->yield();
    U old = __atomic_load_n((U *)p, __ATOMIC_RELAXED), want;
    T value, result;
    do {
        memcpy(&value, &old, sizeof value);
        result = next(value);
        memcpy(&want, &result, sizeof want);
    } while (!__atomic_compare_exchange_n((U *)p, &old, want, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return value;
}
#define EMU_ATOMIC(name, expr) \
    template <typename T> EMU_INLINE T name(T *p, std::common_type_t<T> v) { \
        return emu_atomic(p, [=](T old) -> T { return expr; }); \
    }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicExch, ((void)old, v))
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <typename T> EMU_INLINE T atomicCAS(T *p, std::common_type_t<T> compare, std::common_type_t<T> v) {
    return emu_atomic(p, [=](T old) -> T { return old == compare ? v : old; });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- arithmetic and memory intrinsics -----------------------------------------------------------------------------------
// Macros where glibc declares the same reserved name; all are more accurate than the hardware's.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)
#define __powf(x, y) powf(x, y)
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
EMU_NOINLINE inline float __fadd_rn(float x, float y) { return x + y; }   // not inlined: never contracted into an fma
EMU_NOINLINE inline float __fsub_rn(float x, float y) { return x - y; }
EMU_NOINLINE inline float __fmul_rn(float x, float y) { return x * y; }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1.0f : 0.0f; }
inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline float __int_as_float(int u) { float x; memcpy(&x, &u, 4); return x; }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    unsigned long long v = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(v >> 8 * (s >> 4 * i & 7) & 0xFF) << 8 * i;
    return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) {
    return (unsigned)(((unsigned long long)hi << 32 | lo) << (s & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
    return (unsigned)(((unsigned long long)hi << 32 | lo) >> (s & 31));
}
template <typename A, typename B> constexpr std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value,
    std::common_type_t<A, B>>
min(A a, B b) { typedef std::common_type_t<A, B> T; return (T)b < (T)a ? (T)b : (T)a; }
template <typename A, typename B> constexpr std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value,
    std::common_type_t<A, B>>
max(A a, B b) { typedef std::common_type_t<A, B> T; return (T)a < (T)b ? (T)b : (T)a; }

template <typename T> EMU_INLINE T emu_load(const char *name, const T *p) {
    emu::check_access(name, p, sizeof(T), sizeof(T));
    emu::me->worker->yield();
    return *p;
}
template <typename T> EMU_INLINE void emu_store(const char *name, T *p, T v) {
    emu::check_access(name, p, sizeof(T), sizeof(T));
    emu::me->worker->yield();
    *p = v;
}
template <typename T> EMU_INLINE T __ldg(const T *p) { return emu_load("__ldg", p); }
template <typename T> EMU_INLINE T __ldcs(const T *p) { return emu_load("__ldcs", p); }
template <typename T> EMU_INLINE T __ldcg(const T *p) { return emu_load("__ldcg", p); }
template <typename T> EMU_INLINE T __ldca(const T *p) { return emu_load("__ldca", p); }
template <typename T> EMU_INLINE T __ldlu(const T *p) { return emu_load("__ldlu", p); }
template <typename T> EMU_INLINE void __stcs(T *p, std::common_type_t<T> v) { emu_store("__stcs", p, v); }
template <typename T> EMU_INLINE void __stcg(T *p, std::common_type_t<T> v) { emu_store("__stcg", p, v); }
template <typename T> EMU_INLINE void __stwt(T *p, std::common_type_t<T> v) { emu_store("__stwt", p, v); }
inline size_t __cvta_generic_to_shared(const void *p) { return (size_t)((const char *)p - emu::me->worker->smem); }
namespace emu {
[[noreturn]] EMU_NOINLINE inline void trap() {
    me->where = __builtin_return_address(0);
    fail(cudaErrorLaunchFailure, "__trap");
}
}
[[noreturn]] EMU_INLINE void __trap() { emu::trap(); }
inline void __nanosleep(unsigned) { emu::me->worker->yield(); }
inline long long clock64() { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000ll + t.tv_nsec; }

// ---- runtime API: device ------------------------------------------------------------------------------------------------
enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10,
    cudaDevAttrClockRate = 13, cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMemoryClockRate = 36,
    cudaDevAttrGlobalMemoryBusWidth = 37, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81, cudaDevAttrCooperativeLaunch = 95,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaDeviceProp {
    char name[256]; unsigned char uuid[16]; size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin,
        sharedMemPerMultiprocessor, totalConstMem;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor,
        regsPerBlock, regsPerMultiprocessor, memoryBusWidth, l2CacheSize, persistingL2CacheMaxSize, pciBusID, pciDeviceID,
        pciDomainID, integrated, concurrentKernels, asyncEngineCount, ECCEnabled;
    int maxThreadsDim[3], maxGridSize[3];
};
namespace emu {
inline int smem_optin() {
    return (settings.cc == 80 || settings.cc == 87 ? 163 : settings.cc >= 90 && settings.cc < 120 ? 227 : 99) << 10;
}
inline cudaError_t done() { return (cudaError_t)(sticky ? (int)(last_error = sticky) : 0); }   // what a successful call returns
}
inline cudaError_t cudaGetDeviceCount(int *n) {
    *n = (int)emu::setting("EMU_DEVICES", 8);
    return *n ? cudaSuccess : cudaErrorNoDevice;
}
inline cudaError_t cudaSetDevice(int d) {
    int n;
    cudaGetDeviceCount(&n);
    return d >= 0 && d < n ? emu::done() : emu::host_error(cudaErrorInvalidDevice, "cudaSetDevice(%d): there are %d", d, n);
}
inline cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = cudaDeviceProp{};
    p->major = emu::settings.cc / 10;
    p->minor = emu::settings.cc % 10;
    snprintf(p->name, sizeof p->name, "litespark emu (sm_%d)", emu::settings.cc);
    p->totalGlobalMem = emu::settings.memory;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = emu::smem_optin();
    p->sharedMemPerMultiprocessor = emu::smem_optin() + 1024;
    p->totalConstMem = 64 << 10;
    p->multiProcessorCount = 4;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7FFFFFFF;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->memoryBusWidth = 64;
    p->l2CacheSize = 4 << 20;
    p->concurrentKernels = p->asyncEngineCount = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int d) {
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, d);
    switch (a) {
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 48 << 10; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: *v = 1000000; break;
    case cudaDevAttrMultiProcessorCount: *v = p.multiProcessorCount; break;
    case cudaDevAttrGlobalMemoryBusWidth: *v = p.memoryBusWidth; break;
    case cudaDevAttrL2CacheSize: *v = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *v = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrCooperativeLaunch: *v = 0; break;
    default: return emu::host_error(cudaErrorNotSupported, "cudaDeviceGetAttribute(%d)", (int)a);
    }
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char *id, int n, int) { snprintf(id, (size_t)n, "0000:00:00.0"); return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = emu::settings.memory;
    *free = *total - emu::memory_used;
    return cudaSuccess;
}
inline cudaError_t cudaPeekAtLastError() { return (cudaError_t)(emu::sticky ? (int)emu::sticky : emu::last_error); }
inline cudaError_t cudaGetLastError() { cudaError_t e = cudaPeekAtLastError(); emu::last_error = 0; return e; }
inline const char *cudaGetErrorName(cudaError_t e) {
    switch (e) {
#define EMU_NAME(x) case x: return #x;
    EMU_NAME(cudaSuccess) EMU_NAME(cudaErrorInvalidValue) EMU_NAME(cudaErrorMemoryAllocation)
    EMU_NAME(cudaErrorInitializationError) EMU_NAME(cudaErrorInvalidConfiguration) EMU_NAME(cudaErrorInvalidDevicePointer)
    EMU_NAME(cudaErrorInvalidMemcpyDirection) EMU_NAME(cudaErrorNoDevice) EMU_NAME(cudaErrorInvalidDevice)
    EMU_NAME(cudaErrorInvalidResourceHandle) EMU_NAME(cudaErrorNotReady) EMU_NAME(cudaErrorIllegalAddress)
    EMU_NAME(cudaErrorLaunchOutOfResources) EMU_NAME(cudaErrorAssert) EMU_NAME(cudaErrorMisalignedAddress)
    EMU_NAME(cudaErrorLaunchFailure) EMU_NAME(cudaErrorNotSupported)
#undef EMU_NAME
    default: return "cudaErrorUnknown";
    }
}
inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" : e == cudaErrorNoDevice ?
        "no CUDA-capable device is detected" : cudaGetErrorName(e);
}

// ---- streams and events: in order and at once, or with EMU_ASYNC=seed queued and run at random allowed moments ------------
struct CUevent_st {
    struct CUstream_st *stream = nullptr;
    uint64_t recorded = 0, reached = 0;
    double time = 0;
    bool live = true;
};
struct EmuWork { std::function<void()> run; CUevent_st *wait = nullptr; uint64_t generation = 0; };
struct CUstream_st { std::deque<EmuWork> queue; bool blocking = true, live = true; };
typedef CUstream_st *cudaStream_t;
typedef CUevent_st *cudaEvent_t;
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
#define cudaStreamLegacy ((cudaStream_t)1)
#define cudaStreamPerThread ((cudaStream_t)2)
namespace emu {
inline std::vector<CUstream_st *> &streams = *new std::vector<CUstream_st *>;   // never freed: queued work may name handles
inline std::vector<CUevent_st *> &events = *new std::vector<CUevent_st *>;
inline uint64_t async_rng = settings.async;
inline void run_one(CUstream_st *s);
inline void run_until(CUevent_st *e, uint64_t generation) {
    while (e->reached < generation && e->stream && !e->stream->queue.empty()) run_one(e->stream);
}
inline void run_one(CUstream_st *s) {
    EmuWork w = std::move(s->queue.front());
    if (w.wait) run_until(w.wait, w.generation);
    s->queue.pop_front();
    DeviceAccess access;
    if (w.run) w.run();
}
inline void drain(CUstream_st *s) { while (!s->queue.empty()) run_one(s); }
inline void drain_blocking() { for (CUstream_st *s : streams) if (s->blocking) drain(s); }
inline bool is_default(cudaStream_t s) { return (uintptr_t)s <= 2; }
inline bool valid(cudaStream_t s) { return is_default(s) || s->live; }
inline void progress() {                                      // some queued work happens to run now
    while (settings.async && !streams.empty()) {
        async_rng = async_rng * 6364136223846793005ull + 1442695040888963407ull;
        CUstream_st *s = streams[(async_rng >> 33) % streams.size()];
        if (async_rng >> 62) return;                          // three times in four
        if (!s->queue.empty()) run_one(s);
    }
}
inline cudaError_t submit(cudaStream_t s, std::function<void()> run) {
    if (sticky) return done();
    if (!valid(s)) return host_error(cudaErrorInvalidResourceHandle, "work for a destroyed stream");
    if (settings.async && !is_default(s)) {
        EmuWork w;
        w.run = std::move(run);
        s->queue.push_back(std::move(w));
        progress();
    } else {
        drain_blocking();
        DeviceAccess access;
        run();
    }
    return done();
}
inline double now_ms() { return (double)clock64() * 1e-6; }
}  // namespace emu
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    *s = new CUstream_st();
    (*s)->blocking = !(flags & cudaStreamNonBlocking);
    emu::streams.push_back(*s);
    return emu::done();
}
inline cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 0); }
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (!emu::valid(s)) return emu::host_error(cudaErrorInvalidResourceHandle, "cudaStreamSynchronize of a destroyed stream");
    if (emu::is_default(s)) emu::drain_blocking();
    else emu::drain(s);
    return emu::done();
}
inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    emu::progress();
    return !emu::is_default(s) && !s->queue.empty() ? (emu::run_one(s), cudaErrorNotReady) : emu::done();
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    if (emu::is_default(s) || !s->live)
        return emu::host_error(cudaErrorInvalidResourceHandle, "cudaStreamDestroy of no live stream");
    emu::drain(s);
    s->live = false;
    return emu::done();
}
inline cudaError_t cudaDeviceSynchronize() { for (CUstream_st *s : emu::streams) emu::drain(s); return emu::done(); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    emu::events.push_back(*e = new CUevent_st());
    return emu::done();
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e, unsigned = 0) { return cudaEventCreateWithFlags(e, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    if (!e || !e->live) return emu::host_error(cudaErrorInvalidResourceHandle, "cudaEventDestroy of no live event");
    e->live = false;
    return emu::done();
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = 0) {
    if (!e || !e->live) return emu::host_error(cudaErrorInvalidResourceHandle, "cudaEventRecord of no live event");
    e->stream = emu::is_default(s) ? nullptr : s;
    const uint64_t generation = ++e->recorded;
    return emu::submit(s, [=] { e->reached = generation; e->time = emu::now_ms(); });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { emu::run_until(e, e->recorded); return emu::done(); }
inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    emu::progress();
    if (e->reached >= e->recorded) return emu::done();
    if (e->stream && !e->stream->queue.empty()) emu::run_one(e->stream);     // polling makes progress
    return cudaErrorNotReady;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    if (!a->recorded || !b->recorded)
        return emu::host_error(cudaErrorInvalidResourceHandle, "cudaEventElapsedTime: event never recorded");
    if (a->reached < a->recorded || b->reached < b->recorded) return cudaErrorNotReady;
    *ms = (float)(b->time - a->time);
    return emu::done();
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    if (!e || !e->live || !emu::valid(s)) return emu::host_error(cudaErrorInvalidResourceHandle,
        "cudaStreamWaitEvent: destroyed stream or event");
    if (emu::is_default(s) || !emu::settings.async) emu::run_until(e, e->recorded);
    else { EmuWork w; w.wait = e; w.generation = e->recorded; s->queue.push_back(std::move(w)); }
    return emu::done();
}
typedef void (*cudaHostFn_t)(void *);
inline cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) { return emu::submit(s, [=] { f(data); }); }

// ---- memory -------------------------------------------------------------------------------------------------------------
#define EMU_API EMU_NOINLINE inline cudaError_t              // not inlined: the return address is the caller's line
template <typename T> EMU_API cudaMalloc(T **p, size_t n) {
    cudaError_t e = emu::allocate((void **)p, n, 'd', __builtin_return_address(0));
    return e ? e : emu::done();
}
template <typename T> EMU_API cudaMallocHost(T **p, size_t n, unsigned = 0) {
    cudaError_t e = emu::allocate((void **)p, n, 'h', __builtin_return_address(0));
    return e ? e : emu::done();
}
template <typename T> EMU_API cudaHostAlloc(T **p, size_t n, unsigned) {
    cudaError_t e = emu::allocate((void **)p, n, 'h', __builtin_return_address(0));
    return e ? e : emu::done();
}
inline cudaError_t cudaFree(void *p) {
    cudaDeviceSynchronize();
    cudaError_t e = emu::release(p, 'd');
    return e ? e : emu::done();
}
inline cudaError_t cudaFreeHost(void *p) {
    cudaDeviceSynchronize();
    cudaError_t e = emu::release(p, 'h');
    return e ? e : emu::done();
}
template <typename T> EMU_API cudaMallocAsync(T **p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return emu::submit(s, [=] { emu::release(p, 'd'); }); }
enum { cudaHostRegisterDefault = 0, cudaHostAllocDefault = 0 };
EMU_API cudaHostRegister(void *p, size_t n, unsigned) {
    if (emu::find_allocation(p)) return emu::host_error(cudaErrorHostMemoryAlreadyRegistered,
        "cudaHostRegister: already registered or device memory");
    emu::allocations[(uintptr_t)p] = emu::Allocation{(char *)p, n, (char *)p, n, __builtin_return_address(0), 0, 'r', true};
    return emu::done();
}
inline cudaError_t cudaHostUnregister(void *p) {
    emu::Allocation *a = emu::find_allocation(p);
    if (!a || a->kind != 'r' || a->base != p) return emu::host_error(cudaErrorHostMemoryNotRegistered,
        "cudaHostUnregister: not registered");
    emu::allocations.erase((uintptr_t)p);
    return emu::done();
}
namespace emu {
// A device operand must lie in one live allocation (or be a __device__ variable), a host operand must not be device memory.
inline bool operand_ok(const char *call, const char *which, const void *p, size_t n, int device) {
    const Allocation *a = find_allocation(p);
    bool is_device = a && a->kind == 'd', is_global = in_range(p, n, &__executable_start, &_end - &__executable_start);
    if (device == 1 && !is_device && !is_global) {
        host_error(cudaErrorInvalidValue, "%s: %s is not device memory: %s", call, which, describe_address(p));
        return false;
    }
    if (device == 0 && is_device) {
        host_error(cudaErrorInvalidValue, "%s: %s is device memory, the direction says host: %s", call, which,
                   describe_address(p));
        return false;
    }
    if (a && !in_range(p, n, a->base, a->bytes)) {
        host_error(cudaErrorInvalidValue, "%s of %zu bytes: %s leaves its allocation: %s", call, n, which, describe_address(p));
        return false;
    }
    return true;
}
inline cudaError_t copy(const char *call, void *dst, size_t dpitch, const void *src, size_t spitch, size_t width, size_t rows,
    cudaMemcpyKind kind, cudaStream_t s, bool wait) {
    if (!width || !rows) return done();
    if (kind < 0 || kind > 4) return host_error(cudaErrorInvalidMemcpyDirection, "%s: direction %d", call, (int)kind);
    if (rows > 1 && (dpitch < width || spitch < width))
        return host_error(cudaErrorInvalidValue, "%s: pitch smaller than width", call);
    int dd = kind == cudaMemcpyDefault ? -1 : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    int sd = kind == cudaMemcpyDefault ? -1 : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!operand_ok(call, "destination", dst, dpitch * (rows - 1) + width, dd) || !operand_ok(call, "source", src,
        spitch * (rows - 1) + width, sd)) return cudaErrorInvalidValue;
    cudaError_t e = submit(s, [=] {
        for (size_t r = 0; r < rows; r++) memmove((char *)dst + r * dpitch, (const char *)src + r * spitch, width);
    });
    return e ? e : wait ? cudaStreamSynchronize(s) : done();
}
inline cudaError_t fill(const char *call, void *p, int v, size_t n, cudaStream_t s, bool wait) {
    if (!n) return done();
    if (!operand_ok(call, "destination", p, n, 1)) return cudaErrorInvalidValue;
    cudaError_t e = submit(s, [=] { memset(p, v, n); });
    return e ? e : wait ? cudaStreamSynchronize(s) : done();
}
}  // namespace emu
inline cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k) {
    return emu::copy("cudaMemcpy", d, n, s, n, n, 1, k, 0, true);
}
inline cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t st = 0) {
    return emu::copy("cudaMemcpyAsync", d, n, s, n, n, 1, k, st, false);
}
inline cudaError_t cudaMemcpy2D(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, cudaMemcpyKind k) {
    return emu::copy("cudaMemcpy2D", d, dp, s, sp, w, h, k, 0, true);
}
inline cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h, cudaMemcpyKind k,
    cudaStream_t st = 0) {
    return emu::copy("cudaMemcpy2DAsync", d, dp, s, sp, w, h, k, st, false);
}
inline cudaError_t cudaMemset(void *p, int v, size_t n) { return emu::fill("cudaMemset", p, v, n, 0, true); }
inline cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s = 0) {
    return emu::fill("cudaMemsetAsync", p, v, n, s, false);
}
template <typename T> inline cudaError_t cudaMemcpyToSymbol(T &symbol, const void *s, size_t n, size_t offset = 0,
    cudaMemcpyKind k = cudaMemcpyHostToDevice) {
    return cudaMemcpy((char *)&symbol + offset, s, n, k);
}
template <typename T> inline cudaError_t cudaMemcpyFromSymbol(void *d, T &symbol, size_t n, size_t offset = 0,
    cudaMemcpyKind k = cudaMemcpyDeviceToHost) {
    return cudaMemcpy(d, (char *)&symbol + offset, n, k);
}

// ---- kernels ------------------------------------------------------------------------------------------------------------
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9,
    cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
struct cudaFuncAttributes {
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
enum cudaLaunchAttributeID {
    cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
union cudaLaunchAttributeValue {
    struct { unsigned x, y, z; } clusterDim;
    int cooperative, programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
namespace emu {
inline std::map<const void *, int> smem_allowed;              // kernel -> opt-in limit of dynamic shared memory
inline std::atomic<uint64_t> launch_count{0};
inline cudaError_t launch(const void *kernel, const cudaLaunchConfig_t &c, std::function<void()> body) {
    const dim3 g = c.gridDim, b = c.blockDim;
    if (!kernel) return host_error(cudaErrorInvalidDeviceFunction, "launch of a null kernel");
    const char *name = function_name(kernel);
    if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z || g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535 || b.x > 1024 ||
        b.y > 1024 || b.z > 64 || (uint64_t)b.x * b.y * b.z > MAX_THREADS)
        return host_error(cudaErrorInvalidConfiguration, "%s: grid (%u,%u,%u) block (%u,%u,%u) is outside the limits", name, g.x,
            g.y, g.z, b.x, b.y, b.z);
    size_t limit = smem_allowed.count(kernel) ? smem_allowed[kernel] : 48 << 10;
    if (c.dynamicSmemBytes > limit) return host_error(cudaErrorInvalidValue,
        "%s: %zu bytes of dynamic shared memory, allowed are %zu", name, c.dynamicSmemBytes, limit);
    for (unsigned i = 0; i < c.numAttrs; i++) {
        const cudaLaunchAttribute &a = c.attrs[i];
        if ((a.id == cudaLaunchAttributeCooperative && a.val.cooperative) || (a.id == cudaLaunchAttributeClusterDimension &&
            a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z > 1))
            return host_error(cudaErrorNotSupported, "%s: clusters and cooperative launches are not emulated", name);
    }
    Launch *l = new Launch();
    l->kernel = kernel; l->grid = g; l->block = b; l->smem = c.dynamicSmemBytes; l->number = launch_count++;
    l->body = std::move(body);
    std::shared_ptr<Launch> owner(l);
    return submit(c.stream, [owner] { run_launch(*owner); });
}
}  // namespace emu
template <typename... P, typename... A> inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...),
    A &&...args) {
    std::tuple<std::decay_t<P>...> values(std::forward<A>(args)...);
    return emu::launch((const void *)kernel, *c, [=] { std::apply(kernel, values); });
}
template <typename... P> inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute a, int v) {
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return emu::done();
    if (v < 0 || v > emu::smem_optin()) return emu::host_error(cudaErrorInvalidValue,
        "cudaFuncSetAttribute: %d bytes of shared memory, the device has %d", v, emu::smem_optin());
    emu::smem_allowed[(const void *)kernel] = v;
    return emu::done();
}
template <typename... P> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, void (*kernel)(P...)) {
    *a = cudaFuncAttributes{};                               // registers and static shared memory are unknown here
    a->maxThreadsPerBlock = 1024;
    a->binaryVersion = a->ptxVersion = emu::settings.cc;
    auto allowed = emu::smem_allowed.find((const void *)kernel);
    a->maxDynamicSharedSizeBytes = allowed != emu::smem_allowed.end() ? allowed->second : 48 << 10;
    return emu::done();
}
template <typename... P> inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void (*)(P...), int threads,
    size_t smem) {
    int by_smem = (emu::smem_optin() + 1024) / (int)(smem + 1024);
    *n = threads < 1 || threads > 1024 ? 0 : min(min(2048 / ((threads + 31) / 32 * 32), 32), by_smem);
    return emu::done();
}
inline cudaError_t cudaProfilerStart() { return emu::done(); }
inline cudaError_t cudaProfilerStop() { return emu::done(); }
inline cudaError_t cudaDeviceReset() {                       // frees everything and clears the sticky error
    for (CUstream_st *s : emu::streams) s->queue.clear();
    for (auto &it : emu::allocations) if (it.second.live && it.second.kind != 'r') emu::release(it.second.base, it.second.kind);
    emu::sticky = 0;
    emu::last_error = 0;
    return cudaSuccess;
}
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_8I = 3, CUDA_R_32I = 10, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
