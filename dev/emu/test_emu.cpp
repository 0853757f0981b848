// test_emu.cpp: tests of dev/emu. One line per test, then `N passed, N failed`; exit 1 on a failure.
//   g++ -x c++ -std=c++17 -O2 -g -fopenmp -Idev/emu dev/emu/test_emu.cpp -o test_emu && ./test_emu
// The kernels above "planted bugs" also compile with nvcc (-DVERBS='"file"' names section 7 of the trainer): `--bits` prints a
// hash of each result, to be compared with a device or ptxcpu.
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#ifdef VERBS
static void die(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    exit(1);
}
#include VERBS
#else
#include "emu_verbs.h"
#endif
typedef __nv_bfloat16 bf16;

template <typename... P, typename... A> cudaError_t start(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A... args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    cudaError_t e = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
    return e != cudaSuccess ? e : cudaDeviceSynchronize();
}

// ---- kernels --------------------------------------------------------------------------------------------------------------
__global__ void vector_add(float *out, const float *a, const float *b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a[i] + b[i];
}

enum Bug { NONE, NO_BARRIER, NO_WAIT, WRONG_FRAGMENT, EARLY_REFILL };   // planted into the kernels below
template <int bug> __global__ void reduce_rows(float *out, const float *x, int n) {   // out[row] = sum of row
    __shared__ float part[32];
    float s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[(size_t)blockIdx.x * n + i];
    for (int o = 16; o > 0; o /= 2) s += __shfl_xor_sync(0xFFFFFFFFu, s, o);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    if (bug != NO_BARRIER) __syncthreads();
    if (threadIdx.x == 0) {
        s = 0;
        for (int w = 0; w < (int)blockDim.x / 32; w++) s += part[w];
        out[blockIdx.x] = s;
    }
    if (bug == EARLY_REFILL) out[blockIdx.x] += part[31];    // unwritten shared memory when there are fewer than 32 warps
}

// c (M,N) fp32 = a (M,K) b (N,K)^T, or b (K,N) when kn. 64x64 tiles, 4 warps of 32x32, two stages of 32 in k, swizzled chunks.
__device__ inline int swizzle(int row, int chunk, int chunks) { return row * chunks + (chunk ^ (chunks == 4 ? row / 2 % 4 : row % 8)); }
template <int bug, bool kn> __global__ void gemm(float *c, const bf16 *a, const bf16 *b, int M, int N, int K) {
    enum { BM = 64, BN = 64, BK = 32, STAGE = (BM + BN) * BK };
    bf16 *smem = shared_memory<bf16>();                      // [2][(BM + BN) * BK]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, wm = warp / 2 * 32,
        wn = warp % 2 * 32;
    float acc[2][4][4] = {};
    const int tiles = (K + BK - 1) / BK;
    auto load = [&](int tile) {
        bf16 *as = smem + tile % 2 * STAGE, *bs = as + BM * BK;
        for (int i = threadIdx.x; i < BM * 4; i += blockDim.x) {
            const int row = i / 4, k = tile * BK + i % 4 * 8;
            const bool in = m0 + row < M && k < K;
            cp_async_16(as + swizzle(row, i % 4, 4) * 8, in ? a + (size_t)(m0 + row) * K + k : a, in ? 16 : 0);
        }
        for (int i = threadIdx.x; i < BN * 4; i += blockDim.x) {
            if (!kn) {
                const int row = i / 4, k = tile * BK + i % 4 * 8;
                const bool in = n0 + row < N && k < K;
                cp_async_16(bs + swizzle(row, i % 4, 4) * 8, in ? b + (size_t)(n0 + row) * K + k : b, in ? 16 : 0);
            } else {
                const int row = i / 8, k = tile * BK + row, n = n0 + i % 8 * 8;
                const bool in = k < K && n < N;
                cp_async_16(bs + swizzle(row, i % 8, 8) * 8, in ? b + (size_t)k * N + n : b, in ? 16 : 0);
            }
        }
        cp_async_commit();
    };
    load(0);
    for (int t = 0; t < tiles; t++) {
        if (bug == EARLY_REFILL && t + 1 < tiles) load(t + 1);
        if (bug != EARLY_REFILL && t + 1 < tiles) load(t + 1);
        else if (bug != EARLY_REFILL) cp_async_commit();     // an empty group keeps the count
        if (bug != NO_WAIT) cp_async_wait<1>();
        if (bug != NO_BARRIER) __syncthreads();
        const bf16 *as = smem + t % 2 * STAGE, *bs = as + BM * BK;
        for (int k = 0; k < BK; k += 16) {
            uint32_t af[2][4], bf[4][2];
            for (int i = 0; i < 2; i++) ldmatrix_x4(af[i], as + swizzle(wm + i * 16 + lane % 16, k / 8 + lane / 16, 4) * 8);
            for (int j = 0; j < 4; j += 2) {
                uint32_t r[4];
                if (!kn) ldmatrix_x4(r, bs + swizzle(wn + j * 8 + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2, 4) * 8);
                else ldmatrix_x4_trans(r, bs + swizzle(k + lane % 16, wn / 8 + j + lane / 16, 8) * 8);
                bf[j][0] = r[0], bf[j][1] = r[1], bf[j + 1][0] = r[2], bf[j + 1][1] = r[3];
                if (bug == WRONG_FRAGMENT) bf[j][0] = r[1], bf[j][1] = r[0];
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) mma_bf16(acc[i][j], af[i], bf[j]);
        }
        if (bug != EARLY_REFILL) __syncthreads();            // the stage may be refilled
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e++) {
                const int m = m0 + wm + i * 16 + lane / 4 + e / 2 * 8, n = n0 + wn + j * 8 + lane % 4 * 2 + e % 2;
                if (m < M && n < N) c[(size_t)m * N + n] = acc[i][j][e];
            }
}

__global__ void fragments(uint32_t *out, const bf16 *x) {    // every ldmatrix form of a 32x8 tile, then one mma
    bf16 *s = shared_memory<bf16>();
    for (int i = threadIdx.x; i < 256; i += 32) s[i] = x[i];
    __syncthreads();
    const int lane = threadIdx.x;
    uint32_t r[16] = {};
    ldmatrix_x1(r, s + lane % 8 * 8);
    ldmatrix_x2(r + 1, s + lane % 16 * 8);
    ldmatrix_x4(r + 3, s + lane * 8);
    ldmatrix_x1_trans(r + 7, s + lane % 8 * 8);
    ldmatrix_x2_trans(r + 8, s + lane % 16 * 8);
    ldmatrix_x4_trans(r + 10, s + lane * 8);
    float d[4] = {1, 2, 3, (float)lane};
    mma_bf16(d, r + 3, r + 8);
    for (int i = 0; i < 14; i++) out[lane * 20 + i] = r[i];
    for (int i = 0; i < 4; i++) out[lane * 20 + 14 + i] = __float_as_uint(d[i]);
    out[lane * 20 + 18] = __float_as_uint(exp2_approx((float)(lane - 16)));
    out[lane * 20 + 19] = 0;
}

__global__ void warp_functions(uint32_t *out) {
    const int lane = threadIdx.x % 32, i = threadIdx.x;
    uint32_t h = 0, v = i * 2654435761u;
    auto mix = [&](uint32_t x) { h = (h ^ x) * 16777619u; };
    for (int w = 32; w >= 4; w /= 2) {
        mix(__shfl_sync(~0u, v, lane * 7 + 3, w));
        mix(__shfl_xor_sync(~0u, v, 5, w));
        mix(__shfl_down_sync(~0u, v, 3, w));
        mix(__shfl_up_sync(~0u, v, 3, w));
    }
    mix((uint32_t)__shfl_xor_sync(~0u, (double)i, 1));
    mix(__ballot_sync(~0u, v & 4));
    mix(__any_sync(~0u, i == 3) + 2 * __all_sync(~0u, i < 64));
    mix(__match_any_sync(~0u, lane / 5));
    if (lane < 16) mix(__ballot_sync(0xFFFFu, lane & 1));     // two halves on their own
    else mix(__shfl_sync(0xFFFF0000u, v, 20));
    __syncwarp();
    mix(__reduce_add_sync(~0u, v) ^ __reduce_max_sync(~0u, v) ^ (uint32_t)__reduce_min_sync(~0u, (int)v) ^ __reduce_xor_sync(~0u, v));
    mix(__clz((int)v) + __popc(v) * 32 + __ffs((int)v) * 1024);
    mix(__brev(v) ^ __umulhi(v, v) ^ __byte_perm(v, ~v, 0x3614));
    mix(__syncthreads_count(v & 1));
    out[i] = h;
}

__global__ void pipeline(int *out, int n) {                  // warp 0 produces, warp 1 consumes: named barriers 1 (full), 2 (empty)
    __shared__ int slot[32];
    const int lane = threadIdx.x % 32;
    int sum = 0;
    for (int i = 0; i < n; i++) {
        if (threadIdx.x < 32) {
            if (i > 0) barrier_sync(2, 64);
            slot[lane] = i * lane;
            barrier_arrive(1, 64);
        } else {
            barrier_sync(1, 64);
            sum += slot[(lane + 1) % 32];
            if (i + 1 < n) barrier_arrive(2, 64);
        }
    }
    if (threadIdx.x >= 32) out[lane] = sum;
}

__global__ void last_block(float *out, float *partial, unsigned *counter) {   // the last block to finish adds the partial sums
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = (float)(blockIdx.x + 1);
        __threadfence();
        last = atomicAdd(counter, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float s = 0;
        for (int i = 0; i < (int)gridDim.x; i++) s += ((volatile float *)partial)[i];
        *out = s;
    }
}

// ---- host side of the tests -------------------------------------------------------------------------------------------------
static uint32_t random_state = 1;
static float random_float() {
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(int)(random_state >> 8 & 0xFFFF) / 32768.0f - 1.0f;
}
template <typename T> struct Buffer {                        // device memory with a host copy
    T *d, *h;
    size_t n;
    explicit Buffer(size_t n_) : n(n_) { h = (T *)calloc(n, sizeof(T)); if (cudaMalloc(&d, n * sizeof(T)) != cudaSuccess) exit(2); }
    ~Buffer() { cudaFree(d); free(h); }
    void up() { cudaMemcpy(d, h, n * sizeof(T), cudaMemcpyHostToDevice); }
    void down() { cudaMemcpy(h, d, n * sizeof(T), cudaMemcpyDeviceToHost); }
    void randomize() { for (size_t i = 0; i < n; i++) h[i] = (T)random_float(); up(); }
    uint64_t hash() { down(); uint64_t x = 14695981039346656037ull; for (size_t i = 0; i < n * sizeof(T); i++) x = (x ^ ((unsigned char *)h)[i]) * 1099511628211ull; return x; }
};
// Largest error of c against the double-precision product; infinite for NaN or a failed launch.
template <int bug, bool kn> double gemm_error(int M, int N, int K, uint64_t *hash) {
    random_state = 1;
    Buffer<bf16> a((size_t)M * K), b((size_t)N * K);
    Buffer<float> c((size_t)M * N);
    a.randomize();
    b.randomize();
    cudaError_t e = start(gemm<bug, kn>, dim3((N + 63) / 64, (M + 63) / 64), 128, 2 * 128 * 32 * 2, c.d, a.d, b.d, M, N, K);
    if (e != cudaSuccess) return INFINITY;
    if (hash) *hash = c.hash();
    c.down();
    double worst = 0;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            double s = 0;
            for (int k = 0; k < K; k++) s += (double)(float)a.h[(size_t)m * K + k] * (double)(float)b.h[kn ?
                (size_t)k * N + n : (size_t)n * K + k];
            const double d = fabs(s - c.h[(size_t)m * N + n]);
            if (!(d <= worst)) worst = d == d ? d : INFINITY;
        }
    return worst;
}
template <typename F> uint64_t run_bits(const char *name, F f) {
    uint64_t h = f();
    if (name) printf("%-16s %016llx\n", name, (unsigned long long)h);
    return h;
}
static void print_bits() {                                   // the same program under nvcc must print the same
    uint64_t h;
    gemm_error<NONE, false>(72, 80, 104, &h); printf("gemm nk          %016llx\n", (unsigned long long)h);
    gemm_error<NONE, true>(72, 80, 104, &h); printf("gemm kn          %016llx\n", (unsigned long long)h);
    run_bits("fragments", [] { random_state = 1; Buffer<bf16> x(256); Buffer<uint32_t> o(640); x.randomize(); start(fragments, 1,
        32, 512, o.d, x.d); return o.hash(); });
    run_bits("warp functions", [] { Buffer<uint32_t> o(96); start(warp_functions, 1, 96, 0, o.d); return o.hash(); });
    run_bits("pipeline", [] { Buffer<int> o(32); start(pipeline, 1, 64, 0, o.d, 9); return o.hash(); });
    run_bits("last block", [] { Buffer<float> o(1), p(40); Buffer<unsigned> n(1); n.up(); start(last_block, 40, 64, 0, o.d, p.d,
        n.d); return o.hash(); });
    run_bits("reduce", [] { random_state = 1; Buffer<float> o(6), x(6 * 1000); x.randomize(); start(reduce_rows<NONE>, 6, 128, 0,
        o.d, x.d, 1000); return o.hash(); });
}
#ifdef __CUDACC__
int main() { print_bits(); return cudaDeviceSynchronize() != cudaSuccess; }
#else
// ---- planted bugs: each must be reported, or give a wrong result ------------------------------------------------------------
#include <assert.h>
#include <sys/wait.h>
#include "cublasLt.h"
#include "nccl.h"

__global__ void divergence(int n) { if ((int)threadIdx.x < n) __syncthreads();
    else __syncthreads(); }
__global__ void early_exit(int n) { if ((int)threadIdx.x >= n) return; __syncthreads(); }
__global__ void late_barrier() { if (threadIdx.x < 32) __syncthreads(); else barrier_sync(3, 64); }
__global__ void wrong_mask(int *out) { out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1, 0); }
__global__ void mixed_masks() { if (threadIdx.x % 2) __syncwarp(0xFFFFFFFFu); else (void)__ballot_sync(0xFFFFFFFFu, 1); }
__global__ void whole_warp() { __syncwarp(); }
__global__ void dead_lane() { if (threadIdx.x == 5) return; __syncwarp(); }
__global__ void half_warp() { if (threadIdx.x < 16) __syncwarp(); else while (false) {} if (threadIdx.x >= 16) __syncthreads(); }
__global__ void outside_source(int *out) { out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(0xFFFFu, 1, 20) : 0; }
__global__ void write_at(char *p, long i) { p[i] = 1; }
__global__ void read_at(float *out, const float *p, long i) { *out = p[i]; }
__global__ void load_at(uint4 *out, const char *p) { *out = load_16B(p); }
__global__ void copy_misaligned(const char *p, int d, int s) {
    cp_async_16(shared_memory() + d, p + s);
    cp_async_commit();
    cp_async_wait<0>();
}
__global__ void ldmatrix_at(int offset) { uint32_t r[4]; ldmatrix_x4(r, shared_memory() + threadIdx.x % 32 * 16 + offset); }
__global__ void shared_write(int i) { shared_memory<volatile char>()[i] = 1; }
__global__ void shared_sum(float *out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }
__global__ void keep_static(float *out) { __shared__ float x[4]; out[blockIdx.x] = x[1]; x[1] = 7; }
__global__ void empty_kernel() {}
__global__ void spin(volatile int *p) { while (*p != 1) {} }
__global__ void failing_assert(int x) { assert(x == 1); }
__global__ void trap() { __trap(); }
__global__ void recurse(int *out, int n) { volatile char big[4096]; big[n] = 1; if (n < 1000) {
    *out = n;
    recurse(out, n + 1);
    } out[0] += big[n];
}
__global__ void set_value(float *p, float v) { *p = v; }
__global__ void add_value(float *p, const float *q) { *p += *q; }

static int passed, failed;
static char report[16384];                                   // what the emulation wrote to stderr during the current test
static FILE *capture;
static int saved_stderr;
static void capture_begin() { fflush(stderr); capture = tmpfile(); saved_stderr = dup(2); dup2(fileno(capture), 2); }
static void capture_end() {
    fflush(stderr);
    dup2(saved_stderr, 2);
    close(saved_stderr);
    rewind(capture);
    report[fread(report, 1, sizeof report - 1, capture)] = 0;
    fclose(capture);
}
static void check(const char *name, bool ok) {
    printf("%s %s\n", ok ? "ok  " : "FAIL", name);
    if (!ok) printf("%s", report);
    ok ? passed++ : failed++;
    report[0] = 0;
}
// Runs f, which must return `code` with a report that contains `text`, and the source line if it names a thread; then resets the device.
template <typename F> void expect(const char *name, cudaError_t code, const char *text, F f) {
    capture_begin();
    cudaError_t e = f();
    const bool sticky = cudaDeviceSynchronize() != cudaSuccess;
    cudaDeviceReset();
    capture_end();
    if (getenv("VERBOSE")) printf("%s", report);
    check(name, e == code && strstr(report, text) && (code < 700 || sticky) && (!strstr(report, "thread (") ||
        code == cudaErrorAssert || strstr(report, "     at test_emu.cpp:") || strstr(report, "     at emu_verbs.h:")));
}
template <typename F> bool some_seed_fails(F error, double tol) {   // is the bug visible in the natural order or under a few seeds?
    bool found = false;
    capture_begin();
    for (uint64_t seed = 0; seed < 6 && !found; seed++) { emu::settings.seed = seed; found = !(error() <= tol); cudaDeviceReset(); }
    capture_end();
    emu::settings.seed = 0;
    return found;
}

static void test_results() {
    const uint64_t seeds[] = {0, 1, 2, 3};
    uint64_t first[2] = {0, 0}, h;
    bool good[6] = {true, true, true, true, true, true};
    for (uint64_t seed : seeds) {
        emu::settings.seed = seed;
        Buffer<float> a(1000), b(1000), c(1000), rows(6), x(6000);
        a.randomize(), b.randomize(), x.randomize();
        start(vector_add, 4, 256, 0, c.d, a.d, b.d, 1000);
        c.down();
        for (int i = 0; i < 1000; i++) good[0] = good[0] && c.h[i] == a.h[i] + b.h[i];
        start(reduce_rows<NONE>, 6, 256, 0, rows.d, x.d, 1000);
        rows.down();
        for (int r = 0; r < 6; r++) { double s = 0; for (int i = 0; i < 1000; i++) s += x.h[r * 1000 + i]; good[1] = good[1] &&
            fabs(rows.h[r] - s) < 1e-4; }
        good[2] = good[2] && gemm_error<NONE, false>(72, 80, 104, &h) < 1e-4;
        if (!seed) first[0] = h;
        good[2] = good[2] && h == first[0];
        good[3] = good[3] && gemm_error<NONE, true>(72, 80, 104, &h) < 1e-4;
        if (!seed) first[1] = h;
        good[3] = good[3] && h == first[1] && h != first[0];
        Buffer<int> o(32);
        start(pipeline, 1, 64, 0, o.d, 9);
        o.down();
        for (int i = 0; i < 32; i++) good[4] = good[4] && o.h[i] == 36 * ((i + 1) % 32);
        Buffer<float> total(1), partial(40);
        Buffer<unsigned> counter(1);
        counter.up();
        start(last_block, 40, 64, 0, total.d, partial.d, counter.d);
        total.down();
        good[5] = good[5] && total.h[0] == 820;
    }
    emu::settings.seed = 0;
    check("vector add, seeds 0-3", good[0]);
    check("block reduction, seeds 0-3", good[1]);
    check("mma GEMM a b^T, ragged, the same bits under seeds 0-3", good[2]);
    check("mma GEMM a b with ldmatrix.trans, the same bits under seeds 0-3", good[3]);
    check("named barriers: producer and consumer", good[4]);
    check("atomics: the last block adds", good[5]);
}
static void test_fragments() {                               // against the definition in the PTX manual
    Buffer<bf16> x(256);
    Buffer<uint32_t> o(640);
    x.randomize();
    start(fragments, 1, 32, 512, o.d, x.d);
    o.down();
    bool loads = true, mma = true;
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t *r = o.h + lane * 20;
        const int first[6] = {0, 1, 3, 7, 8, 10}, count[6] = {1, 2, 4, 1, 2, 4};
        for (int form = 0; form < 6; form++)
            for (int i = 0; i < count[form]; i++) {
                const bf16 *m = x.h + i * 64, *p = form < 3 ? m + g * 8 + t : m + t * 8 + g, *q = form < 3 ? p + 1 : p + 8;
                loads = loads && r[first[form] + i] == (__bfloat16_as_ushort(*p) | (uint32_t)__bfloat16_as_ushort(*q) << 16);
            }
        for (int e = 0; e < 4; e++) {                        // a fragments of x4: matrices are row blocks 0 1 of k 0-7, then k 8-15
            const int m = g + e / 2 * 8, n = t + e % 2;
            float s = e < 3 ? (float)(e + 1) : (float)lane;
            for (int k = 0; k < 16; k++) s += (float)x.h[(m / 8 + k / 8 * 2) * 64 + m % 8 * 8 + k % 8] * (float)x.h[k * 8 + n];
            mma = mma && s == __uint_as_float(r[14 + e]);
        }
    }
    check("ldmatrix x1 x2 x4 and .trans follow the PTX layout", loads);
    check("mma.m16n8k16 follows the PTX layout", mma);
    bool round = true;
    for (int i = 0; i < 100000; i++) {
        const float f = random_float() * expf(random_float() * 80);
        const double lo = (double)__uint_as_float(__float_as_uint(f) & 0xFFFF0000u),
            up = (double)__uint_as_float((__float_as_uint(f) & 0xFFFF0000u) + 0x10000u);
        round = round && fabs((double)(float)bf16(f) - f) <= fmin(fabs(lo - f), fabs(up - f));
    }
    check("bf16 rounds to nearest, NaN stays NaN", round && __bfloat16_as_ushort(bf16(NAN)) == 0x7FFF &&
        __bfloat16_as_ushort(bf16(1.00390625f)) == 0x3F80);
}
static void test_bugs() {
    auto rows = [](auto kernel, int threads) { return [=] {
        Buffer<float> o(4), x(4000);
        x.randomize();
        if (start(kernel, 4, threads, 0, o.d, x.d, 1000) != cudaSuccess) return (double)INFINITY;
        o.down();
        double worst = 0;
        for (int r = 0; r < 4; r++) { double s = 0; for (int i = 0; i < 1000; i++) s += x.h[r * 1000 + i]; if (!(fabs(o.h[r] - s) <= worst)) worst = s == s && o.h[r] == o.h[r] ? fabs(o.h[r] - s) : INFINITY; }
        return worst; }; };
    check("bug found: reduction without its barrier", some_seed_fails(rows(reduce_rows<NO_BARRIER>, 256), 1e-4));
    check("bug found: unwritten static shared memory", some_seed_fails(rows(reduce_rows<EARLY_REFILL>, 256), 1e-4));
    check("bug found: GEMM without the barrier after the wait", some_seed_fails([] { return gemm_error<NO_BARRIER, false>(64, 64,
        160, nullptr); }, 1e-4));
    check("bug found: GEMM without cp_async_wait", some_seed_fails([] { return gemm_error<NO_WAIT, false>(64, 64, 160, nullptr); }, 1e-4));
    check("bug found: GEMM that refills a stage too early", some_seed_fails([] { return gemm_error<EARLY_REFILL, false>(64, 64,
        160, nullptr); }, 1e-4));
    check("bug found: GEMM with swapped b registers", some_seed_fails([] { return gemm_error<WRONG_FRAGMENT, true>(64, 64, 160,
        nullptr); }, 1e-4));
}
static void test_reports() {
    int *i32;
    float *f;
    char *c;
    auto alloc = [&] { cudaMalloc(&i32, 4096); cudaMalloc(&f, 4000); cudaMalloc(&c, 4096); };
    expect("barrier divergence", cudaErrorLaunchFailure, "barrier divergence", [] { return start(divergence, 1, 64, 0, 32); });
    expect("a thread leaves before the barrier of others", cudaErrorLaunchFailure, "left the kernel", [] { return start(early_exit,
        1, 64, 0, 50); });
    expect("deadlock lists where everybody waits", cudaErrorLaunchFailure, "threads 32-63: bar.sync",
        [] { return start(late_barrier, 1, 64, 0); });
    expect("deadlock of half a warp", cudaErrorLaunchFailure, "deadlock", [] { return start(half_warp, 1, 32, 0); });
    expect("shuffle by a lane outside its mask", cudaErrorLaunchFailure, "not in its own mask",
        [&] { alloc(); return start(wrong_mask, 1, 32, 0, i32); });
    expect("two warp operations meet", cudaErrorLaunchFailure, "but lane 0 waits at a warp vote", [] { return start(mixed_masks, 1,
        32, 0); });
    expect("mask names a lane that left", cudaErrorLaunchFailure, "left the kernel", [] { return start(dead_lane, 1, 32, 0); });
    expect("full mask in a partial warp", cudaErrorLaunchFailure, "never existed", [] { return start(whole_warp, 1, 48, 0); });
    expect("shuffle reads a lane outside the mask", cudaErrorLaunchFailure, "reads lane 20",
        [&] { alloc(); return start(outside_source, 1, 32, 0, i32); });
    expect("16-byte load misaligned", cudaErrorMisalignedAddress, "not aligned", [&] { alloc(); return start(load_at, 1, 1, 0,
        (uint4 *)i32, c + 8); });
    expect("16-byte load over the end", cudaErrorIllegalAddress, "bytes after the end", [&] { alloc(); return start(load_at, 1, 1,
        0, (uint4 *)c, (const char *)f + 4000); });
    expect("16-byte load of host memory", cudaErrorIllegalAddress, "16-byte load", [&] { alloc(); void *h = aligned_alloc(16,
        64); cudaError_t e = start(load_at, 1, 1, 0, (uint4 *)c, (const char *)h); free(h); return e; });
    expect("cp.async destination misaligned", cudaErrorMisalignedAddress, "cp.async destination",
        [&] { alloc(); return start(copy_misaligned, 1, 1, 64, c, 8, 0); });
    expect("cp.async source misaligned", cudaErrorMisalignedAddress, "cp.async source",
        [&] { alloc(); return start(copy_misaligned, 1, 1, 64, c, 0, 4); });
    expect("cp.async beyond shared memory", cudaErrorIllegalAddress, "cp.async destination",
        [&] { alloc(); return start(copy_misaligned, 1, 1, 64, c, 64, 0); });
    expect("ldmatrix misaligned", cudaErrorMisalignedAddress, "ldmatrix", [] { return start(ldmatrix_at, 1, 32, 1024, 2); });
    expect("ldmatrix beyond shared memory", cudaErrorIllegalAddress, "ldmatrix", [] { return start(ldmatrix_at, 1, 32, 512, 16); });
#ifndef EMU_ASAN                                              // with sanitizers these end the process with the sanitizer's report
    expect("null pointer", cudaErrorIllegalAddress, "illegal access", [&] { alloc(); return start(read_at, 1, 1, 0, (float *)c,
        (const float *)nullptr, 0L); });
    expect("write just past an allocation", cudaErrorIllegalAddress, "wrote outside its memory",
        [&] { alloc(); cudaError_t e = start(write_at, 1, 1, 0, (char *)f, 4000L); return e ? e : cudaDeviceSynchronize(); });
    expect("shared memory written past its end", cudaErrorIllegalAddress, "past its 100 bytes", [] { return start(shared_write, 1,
        1, 100, 100); });
    expect("stack overflow", cudaErrorIllegalAddress, "stack overflow", [&] { alloc(); return start(recurse, 1, 1, 0, i32, 0); });
#endif
    expect("write far past an allocation", cudaErrorIllegalAddress, "illegal access", [&] { alloc(); return start(write_at, 1, 1,
        0, (char *)f, 4097L); });
    expect("shared memory far past its end", cudaErrorIllegalAddress, "shared memory", [] { return start(shared_write, 1, 1, 128, 200); });
    expect("use after cudaFree", cudaErrorIllegalAddress, "FREED allocation", [&] { alloc(); cudaFree(f); return start(read_at, 1,
        1, 0, (float *)c, f, 1L); });
    expect("assert in a kernel", cudaErrorAssert, "abort or assert", [] { return start(failing_assert, 1, 32, 0, 0); });
    emu::settings.timeout = 1;
    expect("a kernel that never ends", cudaErrorLaunchFailure, "still running after 1 s", [&] { alloc(); return start(spin, 1, 1,
        0, (volatile int *)i32); });
    emu::settings.timeout = 0;
    expect("__trap", cudaErrorLaunchFailure, "__trap", [] { return start(trap, 1, 32, 0); });
    expect("an error is sticky", cudaErrorLaunchFailure, "__trap", [] { start(trap, 1, 32, 0); return start(empty_kernel, 1, 1, 0); });
    Buffer<float> o(64);
    start(shared_sum, 1, 64, 256, o.d);
    o.down();
    bool poison = true;
    for (int i = 0; i < 64; i++) poison = poison && o.h[i] != o.h[i];
    cudaMalloc(&f, 4000);
    start(read_at, 1, 1, 0, o.d, f, 999L);
    start(keep_static, 8, 1, 0, o.d + 1);
    o.down();
    for (int i = 0; i < 9; i++) poison = poison && o.h[i] != o.h[i];
    check("unwritten global, dynamic and static shared memory reads as NaN", poison);
}
static void test_api() {
    expect("shared memory above 48 KB without opting in", cudaErrorInvalidValue, "dynamic shared memory",
        [] { return start(empty_kernel, 1, 1, 49153); });
    expect("shared memory above the device", cudaErrorInvalidValue, "the device has",
        [] { return cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, emu::smem_optin() + 1); });
    cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, emu::smem_optin());
    check("shared memory up to the opted limit", start(empty_kernel, 1, 1, emu::smem_optin()) == cudaSuccess);
    expect("1025 threads", cudaErrorInvalidConfiguration, "outside the limits", [] { return start(empty_kernel, 1, 1025, 0); });
    expect("empty grid", cudaErrorInvalidConfiguration, "outside the limits", [] { return start(empty_kernel, 0, 32, 0); });
    expect("grid.y of 65536", cudaErrorInvalidConfiguration, "outside the limits", [] { return start(empty_kernel, dim3(1, 65536),
        32, 0); });
    check("1024 threads, block (2,32,16)", start(empty_kernel, 3, dim3(2, 32, 16), 0) == cudaSuccess);
    void *p = nullptr, *q = nullptr;
    size_t left, total;
    cudaMalloc(&p, 1 << 20);
    cudaMemGetInfo(&left, &total);
    const cudaError_t e = cudaMalloc(&q, left + 1);
    check("out of memory is not sticky", e == cudaErrorMemoryAllocation && cudaGetLastError() == e &&
        cudaGetLastError() == cudaSuccess && cudaMalloc(&q, 1000) == cudaSuccess);
    char host[64];
    expect("copy that leaves its allocation", cudaErrorInvalidValue, "leaves its allocation", [&] { return cudaMemcpy(host,
        (char *)q + 950, 64, cudaMemcpyDeviceToHost); });
    expect("copy in the wrong direction", cudaErrorInvalidValue, "not device memory", [&] { cudaMalloc(&q,
        64); return cudaMemcpy(host, q, 64, cudaMemcpyHostToDevice); });
    expect("double free", cudaErrorInvalidValue, "free of", [&] { cudaMalloc(&q, 64); cudaFree(q); return cudaFree(q); });
    capture_begin();
    const pid_t child = fork();
    if (!child) {                                            // EMU_HOSTCHECK: the host may not touch device memory
        emu::settings.hostcheck = 1;
        float *x;
        cudaMalloc(&x, 64);
        start(set_value, 1, 1, 0, x, 1.0f);
        if (cudaMemcpy(host, x, 4, cudaMemcpyDeviceToHost) != cudaSuccess) _exit(0);
        _exit(*(volatile float *)x == 1.0f ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    capture_end();
    check("EMU_HOSTCHECK: the host may not touch device memory", WIFSIGNALED(status) && strstr(report, "host code touched"));
    // Streams: a consumer on another stream needs the event. EMU_ASYNC shows the missing wait.
    bool right = true, wrong = false;
    for (uint64_t seed = 1; seed <= 20; seed++)
        for (int wait = 0; wait < 2; wait++) {
            emu::settings.async = emu::async_rng = seed;
            Buffer<float> x(2);
            cudaStream_t s, t;
            cudaEvent_t done;
            cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking),
                cudaEventCreate(&done);
            x.up();
            cudaLaunchConfig_t config = {};
            config.gridDim = config.blockDim = dim3(1), config.stream = s;
            cudaLaunchKernelEx(&config, set_value, x.d, 3.0f);
            cudaEventRecord(done, s);
            if (wait) cudaStreamWaitEvent(t, done, 0);
            config.stream = t;
            cudaLaunchKernelEx(&config, add_value, x.d + 1, (const float *)x.d);
            cudaStreamSynchronize(t);
            cudaDeviceSynchronize();
            x.down();
            if (wait) right = right && x.h[1] == 3;
            else wrong = wrong || x.h[1] != 3;
            cudaStreamDestroy(s), cudaStreamDestroy(t), cudaEventDestroy(done);
        }
    emu::settings.async = 0;
    check("EMU_ASYNC: work ordered by an event is right, the missing wait shows", right && wrong);
}
static cublasStatus_t matmul(void *D, const void *A, const void *B, const void *bias, int m, int n, int k, int ta, int tb,
    cudaDataType_t ab, cudaDataType_t d, int batch, float beta) {
    cublasLtHandle_t h;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, ld;
    cublasLtMatmulPreference_t pref;
    cublasLtMatmulHeuristicResult_t result;
    int found;
    const float alpha = 1;
    cublasLtEpilogue_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    cublasLtCreate(&h);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (bias) cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    cublasLtMatrixLayoutCreate(&la, ab, ta ? k : m, ta ? m : k, ta ? k : m);
    cublasLtMatrixLayoutCreate(&lb, ab, tb ? n : k, tb ? k : n, tb ? n : k);
    cublasLtMatrixLayoutCreate(&ld, d, m, n, m);
    cublasLtMatrixLayout_t all[3] = {la, lb, ld};
    const int64_t strides[3] = {(int64_t)m * k, (int64_t)n * k, (int64_t)m * n};
    for (int i = 0; i < 3; i++) {
        cublasLtMatrixLayoutSetAttribute(all[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
        cublasLtMatrixLayoutSetAttribute(all[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &strides[i], sizeof strides[i]);
    }
    cublasLtMatmulPreferenceCreate(&pref);
    cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(h, desc, la, lb, ld, ld, pref, 1, &result, &found);
    if (!s) s = cublasLtMatmul(h, desc, &alpha, A, la, B, lb, &beta, D, ld, D, ld, &result.algo, nullptr, 0, 0);
    cublasLtMatrixLayoutDestroy(la), cublasLtMatrixLayoutDestroy(lb), cublasLtMatrixLayoutDestroy(ld);
    cublasLtMatmulDescDestroy(desc), cublasLtMatmulPreferenceDestroy(pref), cublasLtDestroy(h);
    return s;
}
template <typename T, typename O> double matmul_error(int ta, int tb, bool bias) {
    const int m = 40, n = 37, k = 300, batch = 2;
    Buffer<T> a(m * k * batch), b(n * k * batch);
    Buffer<O> d(m * n * batch), before(m * n * batch), v(m);
    a.randomize(), b.randomize(), v.randomize(), before.randomize();
    cudaMemcpy(d.d, before.d, d.n * sizeof(O), cudaMemcpyDeviceToDevice);
    const cudaDataType_t ab = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F, out = sizeof(O) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    if (matmul(d.d, a.d, b.d, bias ? v.d : nullptr, m, n, k, ta, tb, ab, out, batch, 0.5f)) return INFINITY;
    d.down();
    double worst = 0;
    for (int x = 0; x < batch; x++)
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double s = 0.5 * (float)before.h[x * m * n + j * m + i] + (bias ? (float)v.h[i] : 0);
                for (int l = 0; l < k; l++) s += (double)(float)a.h[x * m * k + (ta ?
                    i * k + l : l * m + i)] * (float)b.h[x * n * k + (tb ? l * n + j : j * k + l)];
                worst = fmax(worst, fabs(s - (float)d.h[x * m * n + j * m + i]) / (1 + fabs(s)));
            }
    return worst;
}
static void test_matmul() {
    bool f32 = true, b32 = true, b16 = true;
    for (int t = 0; t < 4; t++) {
        f32 = f32 && matmul_error<float, float>(t / 2, t % 2, t == 1) < 1e-5;
        b32 = b32 && matmul_error<bf16, float>(t / 2, t % 2, t == 2) < 1e-5;
        b16 = b16 && matmul_error<bf16, bf16>(t / 2, t % 2, t == 3) < 0x1p-8;
    }
    check("cublasLt fp32, transposes, batch, beta, bias", f32);
    check("cublasLt bf16 -> fp32", b32);
    check("cublasLt bf16 -> bf16, one rounding", b16);
    Buffer<float> a(64 * 64), d(64 * 64);
    capture_begin();
    const cublasStatus_t range = matmul(d.d, a.d, a.d, nullptr, 64, 80, 64, 0, 0, CUDA_R_32F, CUDA_R_32F, 1, 0);
    const cublasStatus_t align = matmul(d.d, a.d + 1, a.d, nullptr, 32, 32, 32, 0, 0, CUDA_R_32F, CUDA_R_32F, 1, 0);
    const cublasStatus_t alias = matmul(a.d, a.d, d.d, nullptr, 32, 32, 32, 0, 0, CUDA_R_32F, CUDA_R_32F, 1, 0);
    capture_end();
    check("cublasLt refuses operands outside their allocation, misaligned, or overlapping", range && align && alias &&
        strstr(report, "leaves its allocation"));
}
static void test_nccl(int rank, int world) {                 // one rank in this process; with USE_MPI under mpirun, all of them
    ncclUniqueId id = {};
    ncclComm_t c = nullptr, pair = nullptr;
    if (rank == 0) ncclGetUniqueId(&id);
#ifdef USE_MPI
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
#endif
    bool ok = !ncclCommInitRank(&c, world, id, rank) && !ncclCommSplit(c, rank % 2, rank, &pair, nullptr);
    const int n = 1001;
    Buffer<float> x(n * world), y(n * world), z(n);
    Buffer<bf16> b(n);
    for (int i = 0; i < n * world; i++) x.h[i] = (float)(i + rank);
    for (int i = 0; i < n; i++) b.h[i] = bf16((float)(i % 7 + rank));
    x.up(), b.up();
    ok = ok && !ncclReduceScatter(x.d, z.d, n, ncclFloat32, ncclSum, c, 0) && !ncclAllGather(z.d, y.d, n, ncclFloat32, c, 0);
    ok = ok && !ncclAllReduce(x.d, x.d, n, ncclFloat32, ncclAvg, c, 0) && !ncclAllReduce(b.d, b.d, n, ncclBfloat16, ncclMax, c,
        0) && !ncclBroadcast(z.d, z.d, n, ncclFloat32, world - 1, c, 0);
    x.down(), y.down(), b.down(), z.down();
    const float sum = (float)(world * (world - 1) / 2);
    for (int i = 0; i < n * world; i++) ok = ok && y.h[i] == (float)(i * world) + sum;
    for (int i = 0; i < n; i++) ok = ok && x.h[i] == (float)i + sum / (float)world && b.h[i] == bf16((float)(i % 7 + world - 1)) &&
        z.h[i] == (float)(((world - 1) * n + i) * world) + sum;
    for (int i = 0; i < n; i++) z.h[i] = (float)rank;
    z.up();
    ok = ok && !ncclAllReduce(z.d, z.d, n, ncclFloat32, ncclSum, pair, 0);
    z.down();
    float expected = 0;
    for (int r = rank % 2; r < world; r += 2) expected += (float)r;
    check("nccl: all-reduce, reduce-scatter, all-gather, broadcast, split", ok && z.h[n - 1] == expected &&
        !ncclCommDestroy(pair) && !ncclCommDestroy(c));
}
int main(int argc, char **argv) {
    int rank = 0, world = 1;
#ifdef USE_MPI
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    test_nccl(rank, world);
    MPI_Finalize();
    return failed > 0;
#endif
    if (argc > 1 && !strcmp(argv[1], "--bits")) { print_bits(); return 0; }
    setvbuf(stdout, nullptr, _IOLBF, 0);
    test_results();
    test_fragments();
    test_bugs();
    test_reports();
    test_api();
    test_matmul();
    test_nccl(rank, world);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
#endif
