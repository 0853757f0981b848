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
#include <sched.h>
#include <time.h>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- language ---------------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local       // a block runs on one OS thread; emu.h poisons these at the start of a block

#define EMU_VECTOR(T, name)                                                                                                \
    struct __attribute__((aligned(8))) name##2 { T x, y; };                                                                \
    struct __attribute__((aligned(16))) name##4 { T x, y, z, w; };                                                         \
    inline name##2 make_##name##2(T x, T y) { return name##2{x, y}; }                                                      \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4{x, y, z, w}; }
EMU_VECTOR(int, int)
EMU_VECTOR(unsigned, uint)
EMU_VECTOR(float, float)
struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define EMU_ERRORS(X)                                                                                                      \
    X(cudaSuccess, 0) X(cudaErrorInvalidValue, 1) X(cudaErrorMemoryAllocation, 2) X(cudaErrorInvalidConfiguration, 9)      \
    X(cudaErrorInvalidDeviceFunction, 98) X(cudaErrorNoDevice, 100) X(cudaErrorInvalidDevice, 101)                         \
    X(cudaErrorInvalidResourceHandle, 400) X(cudaErrorNotReady, 600) X(cudaErrorIllegalAddress, 700)                       \
    X(cudaErrorAssert, 710) X(cudaErrorMisalignedAddress, 716) X(cudaErrorLaunchFailure, 719)                              \
    X(cudaErrorNotSupported, 801) X(cudaErrorUnknown, 999)
#define EMU_VALUE(name, code) name = code,
#define EMU_NAME(name, code) case code: return #name;
enum cudaError_t { EMU_ERRORS(EMU_VALUE) };
inline const char *cudaGetErrorString(cudaError_t e) {
    if (e == cudaErrorMemoryAllocation) return "out of memory";
    if (e == cudaErrorNoDevice) return "no CUDA-capable device is detected";
    switch (e) { EMU_ERRORS(EMU_NAME) }
    return "cudaErrorUnknown";
}
inline thread_local uint3 threadIdx, blockIdx;               // of the running thread: emu.h sets them at every switch
inline thread_local dim3 blockDim, gridDim;
#include "emu.h"

// ---- barriers, warp operations, atomics ---------------------------------------------------------------------------------
// asm after a call keeps it from being a tail call: the return address must lie in the kernel.
#define EMU_INLINE inline __attribute__((always_inline))
EMU_INLINE int __syncthreads_count(int p, int line = __builtin_LINE()) {
    const int sum = emu::barrier(0, 0, line, p != 0, true, "__syncthreads_count");
    asm volatile("");
    return sum;
}
EMU_INLINE void __syncthreads(int line = __builtin_LINE()) {
    emu::barrier(0, 0, line, 0, true, "__syncthreads");
    asm volatile("");
}

namespace emu {
EMU_INLINE void warp_sync(const Verb *verb, uint32_t mask, void *args) { warp_op(verb, mask, args); asm volatile(""); }
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
struct Ballot { bool vote; unsigned result; };
inline void ballot_complete(void **args, uint32_t lanes) {
    unsigned all = 0;
    for (uint32_t m = lanes; m; m &= m - 1) all |= (unsigned)((Ballot *)args[__builtin_ctz(m)])->vote << __builtin_ctz(m);
    for (uint32_t m = lanes; m; m &= m - 1) ((Ballot *)args[__builtin_ctz(m)])->result = all;
}
}  // namespace emu
template <typename T> EMU_INLINE T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
    return emu::shuffle(mask, v, (emu::me->lane & ~(width - 1)) | (lane & (width - 1)));
}
template <typename T> EMU_INLINE T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
    const int lane = emu::me->lane, source = lane ^ x;
    return emu::shuffle(mask, v, source <= (lane | (width - 1)) ? source : lane);
}
template <typename T> EMU_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32) {
    const int lane = emu::me->lane, source = lane + (int)d;
    return emu::shuffle(mask, v, source <= (lane | (width - 1)) ? source : lane);
}
template <typename T> EMU_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32) {
    const int lane = emu::me->lane, source = lane - (int)d;
    return emu::shuffle(mask, v, source >= (lane & ~(width - 1)) ? source : lane);
}
EMU_INLINE void __syncwarp(unsigned mask = ~0u) {
    static constexpr emu::Verb verb = {"__syncwarp", emu::nothing};
    emu::warp_sync(&verb, mask, nullptr);
}
EMU_INLINE unsigned __ballot_sync(unsigned mask, int p) {
    static constexpr emu::Verb verb = {"a warp vote", emu::ballot_complete};
    emu::Ballot a = {p != 0, 0};
    emu::warp_sync(&verb, mask, &a);
    return a.result;
}
EMU_INLINE int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
EMU_INLINE int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }

template <typename T> EMU_INLINE T atomicAdd(T *p, std::common_type_t<T> v) {   // of 4 or 8 bytes, by compare-and-swap
    typedef std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t> U;
    emu::check_address("atomic", p, sizeof(T), sizeof(T), emu::ANYWHERE);
    emu::me->worker->yield();
    U old = __atomic_load_n((U *)p, __ATOMIC_RELAXED), want;
    T value, sum;
    do {
        memcpy(&value, &old, sizeof value);
        sum = value + v;
        memcpy(&want, &sum, sizeof want);
    } while (!__atomic_compare_exchange_n((U *)p, &old, want, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return value;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- arithmetic: more accurate than the hardware's ----------------------------------------------------------------------
#define __expf(x) expf(x)                                    // a macro, as glibc declares this reserved name
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return (T)b < (T)a ? (T)b : (T)a;
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return (T)a < (T)b ? (T)b : (T)a;
}
namespace emu {
[[noreturn]] EMU_NOINLINE inline void trap() {
    me->where = __builtin_return_address(0);
    fail(cudaErrorLaunchFailure, "__trap");
}
}
[[noreturn]] EMU_INLINE void __trap() { emu::trap(); }

// ---- runtime API: device ------------------------------------------------------------------------------------------------
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaDeviceProp { char name[256]; int major, minor; };
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
    p->major = emu::settings.cc / 10;
    p->minor = emu::settings.cc % 10;
    const char *name = getenv("EMU_NAME");
    if (name && *name) snprintf(p->name, sizeof p->name, "%.200s", name);
    else snprintf(p->name, sizeof p->name, "litespark emu (sm_%d)%s", emu::settings.cc, emu::settings.mig ? " MIG 1g" : "");
    return cudaSuccess;
}
namespace emu {
inline int smem_optin() {
    return (settings.cc == 80 || settings.cc == 87 ? 163 : settings.cc >= 90 && settings.cc < 120 ? 227 : 99) << 10;
}
}
inline cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
    *v = a == cudaDevAttrMultiProcessorCount ? emu::settings.sms : a == cudaDevAttrL2CacheSize ? 64 << 10 : emu::smem_optin();
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char *id, int n, int device) {
    snprintf(id, (size_t)n, "0000:%02x:00.0", (unsigned)emu::settings.bus + (unsigned)device);
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = emu::settings.memory;
    *free = *total - emu::memory_used;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    const int e = emu::sticky ? (int)emu::sticky : emu::last_error;
    emu::last_error = 0;
    return (cudaError_t)e;
}

// ---- streams and events: in order and at once, or with EMU_ASYNC=seed queued and run at random allowed moments ----------
struct CUevent_st {
    struct CUstream_st *stream = nullptr;
    uint64_t recorded = 0, reached = 0;
    double time = 0;
    bool live = true;
};
// run says whether the work is complete: a collective is not until its peers are there, and is asked again.
struct EmuWork { std::function<bool()> run; CUevent_st *wait = nullptr; uint64_t generation = 0; };
struct CUstream_st { std::deque<EmuWork> queue; bool blocking = true, live = true; };
typedef CUstream_st *cudaStream_t;
typedef CUevent_st *cudaEvent_t;
enum { cudaStreamNonBlocking = 1 };
enum { cudaEventDisableTiming = 2 };
namespace emu {
inline std::vector<CUstream_st *> &streams = *new std::vector<CUstream_st *>;   // never freed: queued work may name handles
inline std::vector<CUevent_st *> &events = *new std::vector<CUevent_st *>;
inline uint64_t async_rng = settings.async;
// One piece of the first work of a stream that has some, or of what it waits for; false: nothing could be done now.
inline bool advance(CUstream_st *s) {
    EmuWork &w = s->queue.front();
    if (w.wait && w.wait->reached < w.generation && w.wait->stream && !w.wait->stream->queue.empty())
        return advance(w.wait->stream);
    if (w.run) {
        DeviceAccess access;
        if (!w.run()) return false;
    }
    s->queue.pop_front();
    return true;
}
inline void progress() {                                      // some queued work happens to run now
    while (settings.async && !streams.empty()) {
        async_rng = async_rng * 6364136223846793005ull + 1442695040888963407ull;
        CUstream_st *s = streams[(async_rng >> 33) % streams.size()];
        if (async_rng >> 62) return;                          // three times in four
        if (!s->queue.empty()) advance(s);
    }
}
inline void meanwhile() {                                     // the host or a stream waits for other ranks
    static unsigned spins = 0;
    progress();
    if (++spins % 8) sched_yield();
    else usleep(100);                                         // they may share its core
}
inline void run_until(CUevent_st *e, uint64_t generation) {
    while (e->reached < generation && e->stream && !e->stream->queue.empty()) if (!advance(e->stream)) meanwhile();
}
inline void drain(CUstream_st *s) { while (!s->queue.empty()) if (!advance(s)) meanwhile(); }
inline void drain_blocking() { for (CUstream_st *s : streams) if (s->blocking) drain(s); }
inline cudaError_t dead_handle(const char *call) {
    return host_error(cudaErrorInvalidResourceHandle, "%s of a destroyed stream or event", call);
}
inline cudaError_t submit_steps(cudaStream_t s, std::function<bool()> run) {   // to the default stream: it runs now
    if (sticky) return done();
    if (s && !s->live) return dead_handle("work");
    if (settings.async && s) {
        s->queue.push_back(EmuWork{std::move(run)});
        progress();
    } else {
        drain_blocking();
        DeviceAccess access;
        while (!run()) meanwhile();
    }
    return done();
}
inline cudaError_t submit(cudaStream_t s, std::function<void()> run) {
    return submit_steps(s, [run = std::move(run)] { run(); return true; });
}
}  // namespace emu
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    *s = new CUstream_st();
    (*s)->blocking = !(flags & cudaStreamNonBlocking);
    emu::streams.push_back(*s);
    return emu::done();
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (s && !s->live) return emu::dead_handle("cudaStreamSynchronize");
    if (s) emu::drain(s);
    else emu::drain_blocking();
    return emu::done();
}
inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    if (emu::hangs("stream")) return cudaErrorNotReady;
    emu::progress();
    if (!s || s->queue.empty()) return emu::done();
    if (!emu::advance(s)) emu::meanwhile();                   // polling makes progress
    return cudaErrorNotReady;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    if (!s || !s->live) return emu::dead_handle("cudaStreamDestroy");
    emu::drain(s);
    s->live = false;
    return emu::done();
}
inline cudaError_t cudaDeviceSynchronize() { for (CUstream_st *s : emu::streams) emu::drain(s); return emu::done(); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    emu::events.push_back(*e = new CUevent_st());
    return emu::done();
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    if (!e || !e->live) return emu::dead_handle("cudaEventDestroy");
    e->live = false;
    return emu::done();
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = 0) {
    if (!e || !e->live) return emu::dead_handle("cudaEventRecord");
    e->stream = s;
    const uint64_t generation = ++e->recorded;
    return emu::submit(s, [=] {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        e->reached = generation;
        e->time = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
    });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { emu::run_until(e, e->recorded); return emu::done(); }
inline cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (emu::hangs("event")) return cudaErrorNotReady;
    if (e->reached >= e->recorded) return emu::done();
    if (e->stream && !e->stream->queue.empty() && !emu::advance(e->stream)) emu::meanwhile();
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
    if (!e || !e->live || (s && !s->live)) return emu::dead_handle("cudaStreamWaitEvent");
    if (s && emu::settings.async) s->queue.push_back(EmuWork{nullptr, e, e->recorded});
    else emu::run_until(e, e->recorded);
    return emu::done();
}

// ---- memory -------------------------------------------------------------------------------------------------------------
// Not inlined: the return address is the caller's line.
template <typename T> EMU_NOINLINE inline cudaError_t cudaMalloc(T **p, size_t n) {
    return emu::allocate((void **)p, n, 'd', __builtin_return_address(0));
}
template <typename T> EMU_NOINLINE inline cudaError_t cudaMallocHost(T **p, size_t n) {
    return emu::allocate((void **)p, n, 'h', __builtin_return_address(0));
}
inline cudaError_t cudaFree(void *p) { cudaDeviceSynchronize(); return emu::release(p, 'd'); }
inline cudaError_t cudaFreeHost(void *p) { cudaDeviceSynchronize(); return emu::release(p, 'h'); }
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
namespace emu {
enum Side { HOST, DEVICE };                                  // cudaMemcpyKind = 2 * side of source + side of destination
// A device operand must lie in one live allocation (or be a __device__ variable), a host operand must not be device memory.
inline bool operand_ok(const char *call, const char *which, const void *p, size_t n, Side side) {
    const Allocation *a = find_allocation(p);
    const bool on_device = a && a->kind == 'd';
    const char *wrong = side == DEVICE && !on_device && !in_program(p, n) ? "is not device memory" :
        side == HOST && on_device ? "is device memory, the direction says host" :
        a && !in_range(p, n, a->base, a->bytes) ? "leaves its allocation" : nullptr;
    if (wrong)
        host_error(cudaErrorInvalidValue, "%s of %zu bytes: %s %s: %s", call, n, which, wrong, describe_address(p));
    return !wrong;
}
inline cudaError_t copy(const char *call, void *dst, const void *src, size_t n, cudaMemcpyKind kind, cudaStream_t s) {
    if (!n) return done();
    if (!operand_ok(call, "destination", dst, n, (Side)(kind % 2)) || !operand_ok(call, "source", src, n, (Side)(kind / 2)))
        return cudaErrorInvalidValue;
    return submit(s, [=] { memmove(dst, src, n); });
}
inline cudaError_t fill(const char *call, void *p, int v, size_t n, cudaStream_t s) {
    if (!n) return done();
    if (!operand_ok(call, "destination", p, n, DEVICE)) return cudaErrorInvalidValue;
    return submit(s, [=] { memset(p, v, n); });
}
}  // namespace emu
inline cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k) {
    return emu::copy("cudaMemcpy", d, s, n, k, 0);
}
inline cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t st = 0) {
    return emu::copy("cudaMemcpyAsync", d, s, n, k, st);
}
inline cudaError_t cudaMemset(void *p, int v, size_t n) { return emu::fill("cudaMemset", p, v, n, 0); }
inline cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s = 0) {
    return emu::fill("cudaMemsetAsync", p, v, n, s);
}

// ---- kernels ------------------------------------------------------------------------------------------------------------
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes { size_t sharedSizeBytes, localSizeBytes; int numRegs; };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
namespace emu {
inline std::map<const void *, int> smem_allowed;              // kernel -> opt-in limit of dynamic shared memory
inline uint64_t launch_count = 0;
inline cudaError_t launch(const void *kernel, const cudaLaunchConfig_t &c, std::function<void()> body) {
    const dim3 g = c.gridDim, b = c.blockDim;
    if (!kernel) return host_error(cudaErrorInvalidDeviceFunction, "launch of a null kernel");
    if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z || g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535 || b.x > 1024 ||
        b.y > 1024 || b.z > 64 || (uint64_t)b.x * b.y * b.z > MAX_THREADS)
        return host_error(cudaErrorInvalidConfiguration, "%s: grid (%u,%u,%u) block (%u,%u,%u) is outside the limits",
            function_name(kernel).c_str(), g.x, g.y, g.z, b.x, b.y, b.z);
    const size_t limit = smem_allowed.count(kernel) ? smem_allowed[kernel] : 48 << 10;
    if (c.dynamicSmemBytes > limit) return host_error(cudaErrorInvalidValue,
        "%s: %zu bytes of dynamic shared memory, allowed are %zu", function_name(kernel).c_str(), c.dynamicSmemBytes, limit);
    std::shared_ptr<Launch> l(new Launch{kernel, std::move(body), g, b, c.dynamicSmemBytes, launch_count++});
    return submit(c.stream, [l] { run_launch(*l); });
}
}  // namespace emu
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...args) {
    std::tuple<std::decay_t<P>...> values(std::forward<A>(args)...);
    return emu::launch((const void *)kernel, *c, [=] { std::apply(kernel, values); });
}
template <typename... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int v) {
    if (v < 0 || v > emu::smem_optin()) return emu::host_error(cudaErrorInvalidValue,
        "cudaFuncSetAttribute: %d bytes of shared memory, the device has %d", v, emu::smem_optin());
    emu::smem_allowed[(const void *)kernel] = v;
    return emu::done();
}
template <typename... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, void (*)(P...)) {
    *a = cudaFuncAttributes{};                               // registers and static shared memory are unknown here
    return emu::done();
}
inline cudaError_t cudaDeviceReset() {                       // frees everything and clears the sticky error
    for (CUstream_st *s : emu::streams) s->queue.clear();
    for (auto &it : emu::allocations) if (it.second.live) emu::release(it.second.base, it.second.kind);
    emu::sticky = 0;
    emu::last_error = 0;
    return cudaSuccess;
}
