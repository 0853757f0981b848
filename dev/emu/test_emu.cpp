// test_emu.cpp: tests of dev/emu. One line per test, then `N passed, N failed`; exit 1 on a failure.
//   g++ -x c++ -std=c++17 -O2 -g -fopenmp -Idev/emu dev/emu/test_emu.cpp -o test_emu && ./test_emu
// The kernels above "planted bugs" also compile with nvcc (-DVERBS='"file"' names the verbs of the trainer): `--bits` prints
// a hash of each result, to be compared with a device or ptxcpu.
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

template <typename... P, typename... A>
cudaError_t start(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A... args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    cudaError_t e = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
    return e != cudaSuccess ? e : cudaDeviceSynchronize();
}

// ---- kernels ------------------------------------------------------------------------------------------------------------
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

// c (M,N) fp32 = a (M,K) b (N,K)^T, or b (K,N) when kn. 64x64 tiles, 4 warps of 32x32, two stages of 32 in k, swizzled.
__device__ inline int swizzle(int row, int chunk, int chunks) {
    return row * chunks + (chunk ^ (chunks == 4 ? row / 2 % 4 : row % 8));
}
template <int bug, bool kn> __global__ void gemm(float *c, const bf16 *a, const bf16 *b, int M, int N, int K) {
    enum { BM = 64, BN = 64, BK = 32, STAGE = (BM + BN) * BK };
    bf16 *smem = shared_memory<bf16>();                      // [2][(BM + BN) * BK]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
    const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
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
        if (t + 1 < tiles) load(t + 1);
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

__global__ void fragments(uint32_t *out, const bf16 *x) {    // both ldmatrix forms of a 32x8 tile, then one mma
    bf16 *s = shared_memory<bf16>();
    for (int i = threadIdx.x; i < 256; i += 32) s[i] = x[i];
    __syncthreads();
    const int lane = threadIdx.x;
    uint32_t r[8];
    ldmatrix_x4(r, s + lane * 8);
    ldmatrix_x4_trans(r + 4, s + lane * 8);
    float d[4] = {1, 2, 3, (float)lane};
    mma_bf16(d, r, r + 4);
    for (int i = 0; i < 8; i++) out[lane * 13 + i] = r[i];
    for (int i = 0; i < 4; i++) out[lane * 13 + 8 + i] = __float_as_uint(d[i]);
    out[lane * 13 + 12] = __float_as_uint(exp2_approx((float)(lane - 16)));
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
    if (lane < 16) mix(__ballot_sync(0xFFFFu, lane & 1));     // two halves on their own
    else mix(__shfl_sync(0xFFFF0000u, v, 20));
    __syncwarp();
    mix(__syncthreads_count(v & 1));
    out[i] = h;
}

// Warp 0 produces, warp 1 consumes: named barriers 1 (full), 2 (empty).
__global__ void pipeline(int *out, int n) {
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

// The last block to finish adds the partial sums.
__global__ void last_block(float *out, float *partial, unsigned *counter) {
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

// ---- host side of the tests ---------------------------------------------------------------------------------------------
static uint32_t random_state = 1;
static float random_float() {
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(int)(random_state >> 8 & 0xFFFF) / 32768.0f - 1.0f;
}
template <typename T> struct Buffer {                        // device memory with a host copy
    T *d, *h;
    size_t n;
    explicit Buffer(size_t n_) : h((T *)calloc(n_, sizeof(T))), n(n_) {
        if (cudaMalloc(&d, n * sizeof(T)) != cudaSuccess) exit(2);
    }
    ~Buffer() { cudaFree(d); free(h); }
    void up() { cudaMemcpy(d, h, n * sizeof(T), cudaMemcpyHostToDevice); }
    void down() { cudaMemcpy(h, d, n * sizeof(T), cudaMemcpyDeviceToHost); }
    void randomize() { for (size_t i = 0; i < n; i++) h[i] = (T)random_float(); up(); }
    uint64_t hash() {                                        // FNV-1a
        down();
        uint64_t x = 14695981039346656037ull;
        for (size_t i = 0; i < n * sizeof(T); i++) x = (x ^ ((unsigned char *)h)[i]) * 1099511628211ull;
        return x;
    }
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
            for (int k = 0; k < K; k++)
                s += (double)(float)a.h[(size_t)m * K + k] * (float)b.h[kn ? (size_t)k * N + n : (size_t)n * K + k];
            const double d = fabs(s - c.h[(size_t)m * N + n]);
            if (!(d <= worst)) worst = d == d ? d : INFINITY;
        }
    return worst;
}
static void print_bits() {                                   // the same program under nvcc must print the same
    auto print = [](const char *name, uint64_t hash) { printf("%-16s %016llx\n", name, (unsigned long long)hash); };
    uint64_t h;
    gemm_error<NONE, false>(72, 80, 104, &h), print("gemm nk", h);
    gemm_error<NONE, true>(72, 80, 104, &h), print("gemm kn", h);
    random_state = 1;
    Buffer<bf16> tile(256);
    Buffer<uint32_t> frags(32 * 13), warp(96);
    tile.randomize();
    start(fragments, 1, 32, 512, frags.d, tile.d), print("fragments", frags.hash());
    start(warp_functions, 1, 96, 0, warp.d), print("warp functions", warp.hash());
    Buffer<int> piped(32);
    start(pipeline, 1, 64, 0, piped.d, 9), print("pipeline", piped.hash());
    Buffer<float> total(1), partial(40), sums(6), x(6 * 1000);
    Buffer<unsigned> counter(1);
    counter.up();
    start(last_block, 40, 64, 0, total.d, partial.d, counter.d), print("last block", total.hash());
    random_state = 1;
    x.randomize();
    start(reduce_rows<NONE>, 6, 128, 0, sums.d, x.d, 1000), print("reduce", sums.hash());
}
#ifdef __CUDACC__
int main() { print_bits(); return cudaDeviceSynchronize() != cudaSuccess; }
#else
// ---- planted bugs: each must be reported, or give a wrong result --------------------------------------------------------
#include <assert.h>
#include <sys/wait.h>
#include "cublasLt.h"
#include "nccl.h"

__global__ void divergence(int n) {
    if ((int)threadIdx.x < n) __syncthreads();
    else __syncthreads();
}
__global__ void early_exit(int n) { if ((int)threadIdx.x >= n) return; __syncthreads(); }
__global__ void late_barrier() { if (threadIdx.x < 32) __syncthreads(); else barrier_sync(3, 64); }
__global__ void lone_arrival() { if (threadIdx.x < 32) barrier_arrive(3, 64); }
__global__ void wrong_mask(int *out) { out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1, 0); }
__global__ void mixed_masks() { if (threadIdx.x % 2) __syncwarp(0xFFFFFFFFu); else (void)__ballot_sync(0xFFFFFFFFu, 1); }
__global__ void whole_warp() { __syncwarp(); }
__global__ void dead_lane() { if (threadIdx.x == 5) return; __syncwarp(); }
__global__ void half_warp() { if (threadIdx.x < 16) __syncwarp(); else __syncthreads(); }
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
__global__ void recurse(int *out, int n) {
    volatile char big[4096];
    big[n] = 1;
    *out = n;
    if (n < 1000) recurse(out, n + 1);
    *out += big[n];
}
__global__ void set_value(float *p, float v) { *p = v; }
__global__ void add_value(float *p, const float *q) { *p += *q; }

// s (64,N) = a (64,64 tiles) b (N,64 tiles)^T, o (64,O) = bf16(s) v (N,O): a thread of warpgroup 1 copies by TMA into two
// stages, warpgroup 0 computes.
enum WgmmaBug { FINE, NO_TMA_WAIT, TMA_PARITY, EARLY_RELEASE, NO_WGMMA_WAIT, NO_COMMIT, NO_PANEL, SWIZZLED_TWICE, NO_FENCE,
                NO_INIT_FENCE, FEWER_BYTES, MORE_BYTES, NEVER_INIT, LOST_LOAD, DIVERGENT, OPERAND_OVERWRITTEN, MORE_ARRIVALS,
                REGISTERS_KEPT, EARLY_FENCE, ONE_RELEASES };
template <int N> struct WgmmaShared { bf16 a[2][64][64], b[2][N][64], v[2][N][64]; uint64_t full[2], empty[2], v_full; };
template <int bug, int N, int O> __global__ void wgmma_gemm(float *s_out, float *o_out, const __grid_constant__ TensorMap a,
                                                     const __grid_constant__ TensorMap b,
                                                     const __grid_constant__ TensorMap v, int tiles) {
    WgmmaShared<N> &m = *swizzled_shared_memory<WgmmaShared<N>>();
    const int bytes = sizeof m.a[0] + sizeof m.b[0], thread = threadIdx.x % 128, lane = thread % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) mbarrier_init(&m.full[i], 1), mbarrier_init(&m.empty[i], bug == ONE_RELEASES ? 1 : 4);
        if (bug != NEVER_INIT) mbarrier_init(&m.v_full, 1);
        if (bug != NO_INIT_FENCE) mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (bug != REGISTERS_KEPT) registers_give<24>();
        for (int i = 0; thread == 0 && i < tiles; i++) {
            mbarrier_wait(&m.empty[i % 2], i / 2 % 2 ^ 1);
            mbarrier_expect(&m.full[i % 2], bug == FEWER_BYTES ? bytes - 128 : bug == MORE_BYTES ? bytes + 128 : bytes);
            tma_load(m.a[i % 2], &a, &m.full[i % 2], i * 64, 0, 0, 0);
            tma_load(m.b[i % 2], &b, &m.full[i % 2], i * 64, 0, 0, 0);
        }
        if (thread == 0) mbarrier_expect(&m.v_full, sizeof m.v);
        if (bug == MORE_ARRIVALS && thread == 0) mbarrier_arrive(&m.v_full);
        for (int panel = 0; thread == 0 && panel < 2; panel++) tma_load(m.v[panel], &v, &m.v_full, panel * 64, 0, 0, 0);
        if (bug == LOST_LOAD && thread == 0) tma_load(m.a[0], &a, &m.empty[0], 0, 0, 0, 0);
        return;
    }
    registers_take<256>();
    float s[1][N / 8][4] = {}, o[1][O / 8][4] = {};
    uint32_t p[N / 16][4];
    for (int i = 0; i < tiles; i++) {
        if (bug != NO_TMA_WAIT) mbarrier_wait(&m.full[i % 2], (bug == TMA_PARITY) ^ (i / 2 % 2));
        if (bug != NO_FENCE) wgmma_fence();
        for (int k = 0; k < 4 && !(bug == DIVERGENT && thread == 77); k++) {
            const bf16 *corner = &m.a[i % 2][0][bug == SWIZZLED_TWICE ? (k ^ 1) * 16 : k * 16];
            wgmma_rows(s, wgmma_operand(corner, 16), wgmma_operand(&m.b[i % 2][0][k * 16], 16), i + k > 0);
        }
        if (bug != NO_COMMIT) wgmma_commit();
        const bool releases = bug == ONE_RELEASES ? thread == 0 : lane == 0;
        if (bug == EARLY_RELEASE && releases) mbarrier_arrive(&m.empty[i % 2]);
        if (bug != NO_WGMMA_WAIT) wgmma_wait<0>(s);
        if (bug != EARLY_RELEASE && releases) mbarrier_arrive(&m.empty[i % 2]);
    }
    auto pack = [](float low, float high) {
        return (uint32_t)__bfloat16_as_ushort(bf16(low)) | (uint32_t)__bfloat16_as_ushort(bf16(high)) << 16;
    };
    for (int i = 0; i < N / 4; i++) p[i / 4][i % 4] = pack(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);
    mbarrier_wait(&m.v_full, 0);
    wgmma_fence();
    if (bug == EARLY_FENCE) p[N / 32][1] ^= 0x10001;
    for (int k = 0; k < N / 16; k++) wgmma_columns(o, p[k], wgmma_operand(m.v[0][k * 16], bug == NO_PANEL ? 16 : sizeof m.v[0]));
    wgmma_commit();
    if (bug == OPERAND_OVERWRITTEN) p[N / 32][1] = 0;
    wgmma_wait<0>(o, p);
    for (int e = 0; e < 64; e++) {
        const int row = thread / 32 * 16 + lane / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (e < O / 2) o_out[row * O + column] = o[0][e / 4][e % 4];
        if (e < N / 2) s_out[row * N + column] = s[0][e / 4][e % 4];
    }
}
template <int bug, int N = 128, int O = 128> cudaError_t start_wgmma(float *s, float *o, const bf16 *a, const bf16 *b,
                                                                         const bf16 *v) {
    const size_t smem = (sizeof(WgmmaShared<N>) + 1023) / 1024 * 1024;
    auto map = [](const bf16 *p, uint64_t rows, uint64_t columns, uint32_t box) {
        return tensor_map(p, {columns, 1, rows, 1}, {2 * columns, 2 * columns, 2 * columns * rows}, {64, 1, box, 1});
    };
    cudaFuncSetAttribute(wgmma_gemm<bug, N, O>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    return start(wgmma_gemm<bug, N, O>, 2, 256, smem, s, o, map(a, 64, 200, 64), map(b, N - 8, 200, N),
                 map(v, N, O < 104 ? O : 104, N), 4);
}
// sum (64,192) = a (64,64 tiles) b (192,64 tiles)^T + a c (64 tiles,192), where the products of a tile run on while the next
// one's start.
enum LateBug { ON_TIME, RELEASED_TOO_EARLY, READ_TOO_EARLY, K16_DROPPED };
struct LateShared { bf16 a[2][64][64], b[2][192][64], c[2][3][64][64]; uint64_t full[2], empty[2]; };
template <int bug> __global__ void wgmma_late(float *out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                                              const __grid_constant__ TensorMap c, int tiles) {
    LateShared &m = *swizzled_shared_memory<LateShared>();
    const int thread = threadIdx.x % 128, lane = thread % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) mbarrier_init(&m.full[i], 1), mbarrier_init(&m.empty[i], 4);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        for (int i = 0; thread == 0 && i < tiles; i++) {
            mbarrier_wait(&m.empty[i % 2], i / 2 % 2 ^ 1);
            mbarrier_expect(&m.full[i % 2], sizeof m.a[0] + sizeof m.b[0] + sizeof m.c[0]);
            tma_load(m.a[i % 2], &a, &m.full[i % 2], i * 64, 0, 0, 0);
            tma_load(m.b[i % 2], &b, &m.full[i % 2], i * 64, 0, 0, 0);
            for (int panel = 0; panel < 3; panel++) tma_load(m.c[i % 2][panel], &c, &m.full[i % 2], panel * 64, 0, i * 64, 0);
        }
        return;
    }
    float sum[1][24][4] = {};
    for (int i = 0; i < tiles; i++) {
        mbarrier_wait(&m.full[i % 2], i / 2 % 2);
        wgmma_fence();
        for (int k = 0; k < (bug == K16_DROPPED && i == 1 ? 3 : 4); k++) {
            const uint64_t left = wgmma_operand(&m.a[i % 2][0][k * 16], 16);
            wgmma_rows(sum, left, wgmma_operand(&m.b[i % 2][0][k * 16], 16));
            wgmma_columns(sum, left, wgmma_operand(m.c[i % 2][0][k * 16], sizeof m.c[0][0]));
        }
        wgmma_commit();
        wgmma_wait<1>();
        const int over = bug == RELEASED_TOO_EARLY ? i : i - 1;
        if (lane == 0 && over >= 0) mbarrier_arrive(&m.empty[over % 2]);
    }
    if (bug != READ_TOO_EARLY) wgmma_wait<0>(sum);
    for (int e = 0; e < 96; e++)
        out[(thread / 32 * 16 + lane / 4 + e / 2 % 2 * 8) * 192 + e / 4 * 8 + lane % 4 * 2 + e % 2] = sum[0][e / 4][e % 4];
    wgmma_wait<0>(sum);
}
template <int bug> double late_error() {
    const int K = 5 * 64;
    Buffer<bf16> a(64 * K), b(192 * K), c(K * 192);
    Buffer<float> out(64 * 192);
    random_state = 9;
    for (Buffer<bf16> *x : {&a, &b, &c}) {
        for (size_t i = 0; i < (size_t)x->n; i++) x->h[i] = bf16(floorf(random_float() * 1.5f + 0.5f));
        x->up();
    }
    auto map = [](const bf16 *p, uint64_t rows, uint64_t columns, uint32_t box) {
        return tensor_map(p, {columns, 1, rows, 1}, {2 * columns, 2 * columns, 2 * columns * rows}, {64, 1, box, 1});
    };
    const size_t smem = (sizeof(LateShared) + 1023) / 1024 * 1024;
    cudaFuncSetAttribute(wgmma_late<bug>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    if (start(wgmma_late<bug>, 1, 256, smem, out.d, map(a.d, 64, K, 64), map(b.d, 192, K, 192), map(c.d, K, 192, 64), 5) !=
        cudaSuccess) return INFINITY;
    out.down();
    double worst = 0;
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 192; j++) {
            float right = 0;
            for (int k = 0; k < K; k++)
                right += __bfloat162float(a.h[i * K + k]) * (__bfloat162float(b.h[j * K + k]) + __bfloat162float(c.h[k * 192 + j]));
            const double e = fabs(out.h[i * 192 + j] - right);
            worst = e <= worst ? worst : e == e ? e : INFINITY;
        }
    return worst;
}
// out (64,64) = sum over blocks of a^T b, a and b (64,64): a comes by stmatrix, b by a bulk copy, out is added up in turns.
enum TurnBug { IN_TURN, NO_FENCE_FOR_WGMMA, NO_FENCE_FOR_BULK, SOURCE_OVERWRITTEN, NOT_WAITED_FOR, PASSED_TOO_EARLY,
               WRONG_ORDER, OUT_OF_TURN };
struct TurnShared { bf16 a[64][64], b[64][64]; float4 sum[8][128]; uint64_t full; int ticket; };
template <int bug> __global__ void wgmma_turns(float *out, const bf16 *a, const bf16 *b, int *counters) {
    TurnShared &m = *swizzled_shared_memory<TurnShared>();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (thread == 0) {
        m.ticket = atomicAdd(counters, 1);
        mbarrier_init(&m.full, 1);
        mbarrier_init_fence();
        mbarrier_expect(&m.full, sizeof m.b);
        bulk_load(m.b, b, sizeof m.b, &m.full);
    }
    for (int c = 0; c < 4; c++) {                            // rows 16 warp.., columns 16 c..
        uint32_t r[4];
        for (int i = 0; i < 4; i++)
            memcpy(&r[i], a + (warp * 16 + i % 2 * 8 + lane / 4) * 64 + c * 16 + i / 2 * 8 + lane % 4 * 2, 4);
        const int row = warp * 16 + lane % 16;
        stmatrix_x4(&m.a[row][((c * 2 + lane / 16) ^ row % 8) * 8], r);
    }
    if (bug != NO_FENCE_FOR_WGMMA) async_proxy_fence();
    __syncthreads();
    mbarrier_wait(&m.full, 0);
    float sum[1][8][4];
    wgmma_fence();
    for (int k = 0; k < 64; k += 16) wgmma_transposed(sum, wgmma_operand(m.a[k], 0), wgmma_operand(m.b[k], 0), k > 0);
    wgmma_commit();
    wgmma_wait<0>(sum);
    for (int j = 0; j < 8; j++) {
        uint4 bits;
        memcpy(&bits, sum[0][j], 16);
        store_16B(&m.sum[j][thread], bits);
    }
    if (bug != NO_FENCE_FOR_BULK) async_proxy_fence();
    __syncthreads();
    if (thread > 0) return;
    const int turn = bug == WRONG_ORDER ? (int)gridDim.x - 1 - m.ticket : m.ticket;
    if (bug != OUT_OF_TURN) turn_wait(counters + 1, turn);
    async_proxy_fence();
    if (turn == 0) bulk_store(out, m.sum, sizeof m.sum);
    else bulk_add(out, m.sum, sizeof m.sum);
    bulk_commit();
    if (bug != SOURCE_OVERWRITTEN) bulk_wait_read<0>();
    m.sum[3][7] = float4{1, 2, 3, 4};
    if (bug == PASSED_TOO_EARLY) turn_pass(counters + 1, turn + 1);
    if (bug != NOT_WAITED_FOR) bulk_wait<0>();
    if (bug != PASSED_TOO_EARLY && bug != NOT_WAITED_FOR) turn_pass(counters + 1, turn + (bug == OUT_OF_TURN ? 2 : 1));
}
template <int bug> cudaError_t start_turns(float *out, const bf16 *a, const bf16 *b, int *counters) {
    cudaFuncSetAttribute(wgmma_turns<bug>, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
    return start(wgmma_turns<bug>, bug == NOT_WAITED_FOR ? 1 : 9, 128, (sizeof(TurnShared) + 1023) / 1024 * 1024, out, a, b,
                 counters);
}
template <int bug> double turns_error() {                    // small integers: sums are exact in any order
    Buffer<bf16> a(64 * 64), b(64 * 64), swizzled(64 * 64);
    Buffer<float> out(64 * 64);
    Buffer<int> counters(2);
    random_state = 11;
    for (Buffer<bf16> *x : {&a, &b})
        for (int i = 0; i < 64 * 64; i++) x->h[i] = bf16(floorf(random_float() * 1.5f + 0.5f));
    for (int i = 0; i < 64 * 64; i++) swizzled.h[i / 64 * 64 + ((i % 64 / 8) ^ i / 64 % 8) * 8 + i % 8] = b.h[i];
    counters.h[0] = counters.h[1] = 0;
    a.up(), swizzled.up(), counters.up();
    if (start_turns<bug>(out.d, a.d, swizzled.d, counters.d) != cudaSuccess) return INFINITY;
    out.down();
    double worst = 0;
    for (int i = 0; i < 64 * 64; i++) {                      // out is in the order of fragments
        const int j = i / 4 / 128, thread = i / 4 % 128, row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
        const int column = j * 8 + thread % 4 * 2 + i % 2;
        float right = 0;
        for (int k = 0; k < 64; k++) right += 9 * __bfloat162float(a.h[k * 64 + row]) * __bfloat162float(b.h[k * 64 + column]);
        const double e = fabs(out.h[i] - right);
        worst = e <= worst ? worst : e == e ? e : INFINITY;
    }
    return worst;
}
// The largest error, infinite after a report: a (64,200), b (N-8,200) and v (N,104; O if less) are small integers, so sums
// are exact, and what lies outside of them is zero.
template <int bug, int N = 128, int O = 128> double wgmma_error() {
    const int V = O < 104 ? O : 104;                         // columns of v
    Buffer<bf16> a(64 * 200), b((N - 8) * 200), v(N * V);
    Buffer<float> s(64 * N), o(64 * O);
    random_state = 7;
    for (Buffer<bf16> *x : {&a, &b, &v}) {
        for (size_t i = 0; i < (size_t)x->n; i++) x->h[i] = bf16(floorf(random_float() * 1.5f + 0.5f));
        x->up();
    }
    if (start_wgmma<bug, N, O>(s.d, o.d, a.d, b.d, v.d) != cudaSuccess) return INFINITY;
    s.down(), o.down();
    double worst = 0;
    auto differ = [&](double x, double y) { if (!(fabs(x - y) <= worst)) worst = x == x && y == y ? fabs(x - y) : INFINITY; };
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 128; j++) {
            double sum = 0, out = 0;
            for (int k = 0; k < 200 && j < N - 8; k++) sum += (double)(float)a.h[i * 200 + k] * (float)b.h[j * 200 + k];
            if (j < N) differ(s.h[i * N + j], sum);
            for (int k = 0; k < N && j < V; k++) out += (double)s.h[i * N + k] * (float)v.h[k * V + j];
            if (j < O) differ(o.h[i * O + j], out);
        }
    return worst;
}

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
// Runs f, which must return `code` with a report that contains `text`, and the source line if it names a thread; then resets
// the device and allocates anew: 4096, 4000 and 4096 bytes.
static int *ints;
static float *floats;
static char *bytes;
static void reset() { cudaDeviceReset(); cudaMalloc(&ints, 4096); cudaMalloc(&floats, 4000); cudaMalloc(&bytes, 4096); }
template <typename F> void expect(const char *name, cudaError_t code, const char *text, F f) {
    capture_begin();
    cudaError_t e = f();
    const bool sticky = cudaDeviceSynchronize() != cudaSuccess;
    reset();
    capture_end();
    if (getenv("VERBOSE")) printf("%s", report);
    check(name, e == code && strstr(report, text) && (code < 700 || sticky) && (!strstr(report, "thread (") ||
        code == cudaErrorAssert || strstr(report, "     at test_emu.cpp:") || strstr(report, "     at emu_verbs.h:")));
}
template <typename... P, typename... A>
void expect(const char *name, cudaError_t code, const char *text, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
            A... args) {
    expect(name, code, text, [=] { return start(kernel, grid, block, smem, args...); });
}
// Is the bug visible in the natural order or under a few seeds?
template <typename F> bool some_seed_fails(F error, double tol) {
    bool found = false;
    capture_begin();
    for (uint64_t seed = 0; seed < 6 && !found; seed++) {
        emu::settings.seed = seed;
        found = !(error() <= tol);
        cudaDeviceReset();
    }
    capture_end();
    emu::settings.seed = 0;
    return found;
}

static double row_sum(const float *x, int row) {             // of rows of 1000
    double s = 0;
    for (int i = 0; i < 1000; i++) s += x[row * 1000 + i];
    return s;
}
static void test_results() {
    uint64_t first[2] = {0, 0}, h;
    bool good[6] = {true, true, true, true, true, true};
    for (uint64_t seed = 0; seed < 4; seed++) {
        emu::settings.seed = seed;
        Buffer<float> a(1000), b(1000), c(1000), rows(6), x(6000);
        a.randomize(), b.randomize(), x.randomize();
        start(vector_add, 4, 256, 0, c.d, a.d, b.d, 1000);
        c.down();
        for (int i = 0; i < 1000; i++) good[0] &= c.h[i] == a.h[i] + b.h[i];
        start(reduce_rows<NONE>, 6, 256, 0, rows.d, x.d, 1000);
        rows.down();
        for (int r = 0; r < 6; r++) good[1] &= fabs(rows.h[r] - row_sum(x.h, r)) < 1e-4;
        for (int kn = 0; kn < 2; kn++) {
            good[2 + kn] &= (kn ? gemm_error<NONE, true>(72, 80, 104, &h) : gemm_error<NONE, false>(72, 80, 104, &h)) < 1e-4;
            if (!seed) first[kn] = h;
            good[2 + kn] &= h == first[kn] && first[0] != first[1];
        }
        Buffer<int> o(32);
        start(pipeline, 1, 64, 0, o.d, 9);
        o.down();
        for (int i = 0; i < 32; i++) good[4] &= o.h[i] == 36 * ((i + 1) % 32);
        Buffer<float> total(1), partial(40);
        Buffer<unsigned> counter(1);
        counter.up();
        start(last_block, 40, 64, 0, total.d, partial.d, counter.d);
        total.down();
        good[5] &= total.h[0] == 820;
    }
    emu::settings.seed = 0;
    const char *const names[6] = {"vector add, seeds 0-3", "block reduction, seeds 0-3",
        "mma GEMM a b^T, ragged, the same bits under seeds 0-3",
        "mma GEMM a b with ldmatrix.trans, the same bits under seeds 0-3", "named barriers: producer and consumer",
        "atomics: the last block adds"};
    for (int i = 0; i < 6; i++) check(names[i], good[i]);
}
static void test_fragments() {                               // against the definition in the PTX manual
    Buffer<bf16> x(256);
    Buffer<uint32_t> o(32 * 13);
    x.randomize();
    start(fragments, 1, 32, 512, o.d, x.d);
    o.down();
    bool loads = true, mma = true;
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t *r = o.h + lane * 13;
        for (int i = 0; i < 8; i++) {                        // 0-3 as they are, 4-7 transposed
            const bf16 *m = x.h + i % 4 * 64, *p = i < 4 ? m + g * 8 + t : m + t * 8 + g, *q = i < 4 ? p + 1 : p + 8;
            loads &= r[i] == (__bfloat16_as_ushort(*p) | (uint32_t)__bfloat16_as_ushort(*q) << 16);
        }
        for (int e = 0; e < 4; e++) {                        // a of mma: row blocks 0 1 of k 0-7, then of k 8-15
            const int m = g + e / 2 * 8, n = t + e % 2;
            float s = e < 3 ? (float)(e + 1) : (float)lane;
            for (int k = 0; k < 16; k++)
                s += (float)x.h[(m / 8 + k / 8 * 2) * 64 + m % 8 * 8 + k % 8] * (float)x.h[k * 8 + n];
            mma &= s == __uint_as_float(r[8 + e]);
        }
    }
    check("ldmatrix_x4 and .trans follow the PTX layout", loads);
    check("mma.m16n8k16 follows the PTX layout", mma);
    bool round = true;
    for (int i = 0; i < 100000; i++) {
        const float f = random_float() * expf(random_float() * 80);
        const unsigned cut = __float_as_uint(f) & 0xFFFF0000u;
        const double lo = __uint_as_float(cut), up = __uint_as_float(cut + 0x10000u);
        round &= fabs((double)(float)bf16(f) - f) <= fmin(fabs(lo - f), fabs(up - f));
    }
    check("bf16 rounds to nearest, NaN stays NaN", round && __bfloat16_as_ushort(bf16(NAN)) == 0x7FFF &&
        __bfloat16_as_ushort(bf16(1.00390625f)) == 0x3F80);
}
static void test_bugs() {
    auto rows = [](auto kernel) { return [=] {
        Buffer<float> o(4), x(4000);
        x.randomize();
        double worst = start(kernel, 4, 256, 0, o.d, x.d, 1000) == cudaSuccess ? 0 : INFINITY;
        o.down();
        for (int r = 0; r < 4; r++) if (!(fabs(o.h[r] - row_sum(x.h, r)) <= 1e-4)) worst = INFINITY;
        return worst;
    }; };
    auto gemm64 = [](auto error) { return [=] { return error(64, 64, 160, nullptr); }; };
    auto found = [](const char *name, auto error) { check(name, some_seed_fails(error, 1e-4)); };
    found("bug found: reduction without its barrier", rows(reduce_rows<NO_BARRIER>));
    found("bug found: unwritten static shared memory", rows(reduce_rows<EARLY_REFILL>));
    found("bug found: GEMM without the barrier after the wait", gemm64(gemm_error<NO_BARRIER, false>));
    found("bug found: GEMM without cp_async_wait", gemm64(gemm_error<NO_WAIT, false>));
    found("bug found: GEMM that refills a stage too early", gemm64(gemm_error<EARLY_REFILL, false>));
    found("bug found: GEMM with swapped b registers", gemm64(gemm_error<WRONG_FRAGMENT, true>));
}
static void test_reports() {
    const cudaError_t launch = cudaErrorLaunchFailure, address = cudaErrorIllegalAddress;
    const cudaError_t misaligned = cudaErrorMisalignedAddress;
    reset();
    expect("barrier divergence", launch, "barrier divergence", divergence, 1, 64, 0, 32);
    expect("a thread leaves before the barrier of others", launch, "left the kernel", early_exit, 1, 64, 0, 50);
    expect("deadlock lists where everybody waits", launch, "threads 32-63: bar.sync", late_barrier, 1, 64, 0);
    expect("a named barrier left half full", launch, "at its end named barrier 3 has 32 of 64 threads", lone_arrival, 1, 64, 0);
    expect("deadlock of half a warp", launch, "deadlock", half_warp, 1, 32, 0);
    expect("shuffle by a lane outside its mask", launch, "not in its own mask", wrong_mask, 1, 32, 0, ints);
    expect("two warp operations meet", launch, "but lane 0 waits at a warp vote", mixed_masks, 1, 32, 0);
    expect("mask names a lane that left", launch, "left the kernel", dead_lane, 1, 32, 0);
    expect("full mask in a partial warp", launch, "never existed", whole_warp, 1, 48, 0);
    expect("shuffle reads a lane outside the mask", launch, "reads lane 20", outside_source, 1, 32, 0, ints);
    expect("16-byte load misaligned", misaligned, "not aligned", load_at, 1, 1, 0, (uint4 *)ints, bytes + 8);
    expect("16-byte load over the end", address, "bytes after the end", load_at, 1, 1, 0, (uint4 *)ints, bytes + 4096);
    expect("16-byte load of host memory", address, "16-byte load", [] {
        void *heap = aligned_alloc(16, 64);
        const cudaError_t e = start(load_at, 1, 1, 0, (uint4 *)bytes, (const char *)heap);
        free(heap);
        return e;
    });
    expect("cp.async destination misaligned", misaligned, "cp.async destination", copy_misaligned, 1, 1, 64, bytes, 8, 0);
    expect("cp.async source misaligned", misaligned, "cp.async source", copy_misaligned, 1, 1, 64, bytes, 0, 4);
    expect("cp.async beyond shared memory", address, "cp.async destination", copy_misaligned, 1, 1, 64, bytes, 64, 0);
    expect("ldmatrix misaligned", misaligned, "ldmatrix", ldmatrix_at, 1, 32, 1024, 2);
    expect("ldmatrix beyond shared memory", address, "ldmatrix", ldmatrix_at, 1, 32, 512, 16);
#if !EMU_ASAN                                                 // with ASan these end the process with its report
    expect("null pointer", address, "illegal access", read_at, 1, 1, 0, floats, nullptr, 0);
    expect("write just past an allocation", address, "wrote outside its memory", write_at, 1, 1, 0, (char *)floats, 4000);
    expect("shared memory written past its end", address, "past its 100 bytes", shared_write, 1, 1, 100, 100);
    expect("stack overflow", address, "stack overflow", recurse, 1, 1, 0, ints, 0);
#endif
    expect("write far past an allocation", address, "illegal access", write_at, 1, 1, 0, (char *)floats, 4097);
    expect("shared memory far past its end", address, "shared memory", shared_write, 1, 1, 128, 200);
    expect("use after cudaFree", address, "FREED allocation", [] {
        cudaFree(floats);
        return start(read_at, 1, 1, 0, (float *)bytes, floats, 1);
    });
    expect("assert in a kernel", cudaErrorAssert, "abort or assert", failing_assert, 1, 32, 0, 0);
    emu::settings.timeout = 1;
    expect("a kernel that never ends", launch, "still running after 1 s", spin, 1, 1, 0, ints);
    emu::settings.timeout = 0;
    expect("__trap", launch, "__trap", trap, 1, 32, 0);
    expect("an error is sticky", launch, "__trap", [] { start(trap, 1, 32, 0); return start(empty_kernel, 1, 1, 0); });
    Buffer<float> o(64);
    start(shared_sum, 1, 64, 256, o.d);
    o.down();
    bool poison = true;
    for (int i = 0; i < 64; i++) poison &= o.h[i] != o.h[i];
    start(read_at, 1, 1, 0, o.d, floats, 999);
    start(keep_static, 8, 1, 0, o.d + 1);
    o.down();
    for (int i = 0; i < 9; i++) poison &= o.h[i] != o.h[i];
    check("unwritten global, dynamic and static shared memory reads as NaN", poison);
}
static void test_hopper() {
    const int cc = emu::settings.cc;
    emu::settings.cc = 90;
    bool right = true;
    for (uint64_t seed = 0; seed < 8; seed++) {
        emu::settings.seed = seed;
        right &= wgmma_error<FINE>() == 0 && wgmma_error<FINE, 64>() == 0;
        right &= wgmma_error<FINE, 64, 64>() == 0 && wgmma_error<FINE, 64, 96>() == 0 && wgmma_error<FINE, 128, 104>() == 0;
    }
    emu::settings.seed = 0;
    check("TMA and wgmma: both forms of operands, 64, 96, 104, 128 columns, zeros outside the tensor, two stages, seeds 0-7",
          right);
    right = true;
    for (uint64_t seed = 0; seed < 8; seed++) {
        emu::settings.seed = seed;
        right &= late_error<ON_TIME>() == 0;
    }
    emu::settings.seed = 0;
    check("wgmma of 192 columns, one group in flight while the next starts, seeds 0-7", right);
    right = true;
    for (uint64_t seed = 0; seed < 8; seed++) {
        emu::settings.seed = seed;
        right &= turns_error<IN_TURN>() == 0;
    }
    emu::settings.seed = 0;
    check("stmatrix, wgmma by columns, bulk copies, sums of blocks in turns, seeds 0-7", right);
    auto found = [](const char *name, auto error) { check(name, some_seed_fails(error, 0)); };
    found("bug found: the source of a bulk copy overwritten", turns_error<SOURCE_OVERWRITTEN>);
    found("bug found: a stage released under a group in flight", late_error<RELEASED_TOO_EARLY>);
    found("bug found: sums read under a group in flight", late_error<READ_TOO_EARLY>);
    found("bug found: a step of 16 dropped", late_error<K16_DROPPED>);
    found("bug found: no wait for a TMA load", wgmma_error<NO_TMA_WAIT>);
    found("bug found: an mbarrier's wrong parity", wgmma_error<TMA_PARITY>);
    found("bug found: a stage released before its wgmma is complete", wgmma_error<EARLY_RELEASE>);
    found("bug found: a stage released by one thread for its warpgroup", wgmma_error<ONE_RELEASES>);
    found("bug found: no wgmma_wait", wgmma_error<NO_WGMMA_WAIT>);
    found("bug found: no wgmma_commit", wgmma_error<NO_COMMIT>);
    found("bug found: wrong distance of panels", wgmma_error<NO_PANEL>);
    found("bug found: wrong swizzle", wgmma_error<SWIZZLED_TWICE>);
    const cudaError_t launch = cudaErrorLaunchFailure;
    auto reported = [=](const char *name, const char *text, auto start_bug) {
        expect(name, launch, text, [=] {
            Buffer<bf16> a(64 * 200), b(120 * 200), v(128 * 104);
            Buffer<float> s(64 * 128), o(64 * 128);
            a.randomize(), b.randomize(), v.randomize();
            return start_bug(s.d, o.d, a.d, b.d, v.d);
        });
    };
    reported("wgmma without wgmma.fence", "without a wgmma.fence", start_wgmma<NO_FENCE>);
    reported("mbarrier.init without a fence", "no fence after", start_wgmma<NO_INIT_FENCE>);
    reported("an mbarrier that expects too few bytes", "mbarrier.try_wait", start_wgmma<FEWER_BYTES>);
    reported("an mbarrier that expects too many bytes", "mbarrier.try_wait", start_wgmma<MORE_BYTES>);
    reported("an mbarrier without its init", "never initialised", start_wgmma<NEVER_INIT>);
    reported("a TMA load that nobody waits for", "still in flight", start_wgmma<LOST_LOAD>);
    reported("operand registers overwritten before wgmma_wait", "registers of an operand", start_wgmma<OPERAND_OVERWRITTEN>);
    reported("operand registers written after wgmma.fence", "written after the wgmma.fence", start_wgmma<EARLY_FENCE>);
    reported("more arrivals than a phase of an mbarrier has", "arrivals of this phase are there", start_wgmma<MORE_ARRIVALS>);
    reported("registers taken that nobody gave", "setmaxnreg.inc", start_wgmma<REGISTERS_KEPT>);
    reported("a thread without the wgmma of its warpgroup", "different numbers of wgmma", start_wgmma<DIVERGENT>);
    auto turn_reported = [=](const char *name, const char *text, auto start_bug) {
        expect(name, launch, text, [=] {
            Buffer<bf16> a(64 * 64), b(64 * 64);
            Buffer<float> out(64 * 64);
            Buffer<int> counters(2);
            a.randomize(), b.randomize();
            counters.h[0] = counters.h[1] = 0;
            counters.up();
            return start_bug(out.d, a.d, b.d, counters.d);
        });
    };
    const char *no_fence = "without async_proxy_fence";
    turn_reported("wgmma of what stmatrix wrote, without a proxy fence", no_fence, start_turns<NO_FENCE_FOR_WGMMA>);
    turn_reported("a bulk copy of ordinary stores, without a proxy fence", no_fence, start_turns<NO_FENCE_FOR_BULK>);
    turn_reported("a bulk copy that nobody waits for", "with a bulk copy in flight", start_turns<NOT_WAITED_FOR>);
    turn_reported("a turn passed on before its data", "still in flight", start_turns<PASSED_TOO_EARLY>);
    turn_reported("a turn passed on out of turn", "turn_pass to", start_turns<OUT_OF_TURN>);
    const int threads = emu::settings.threads;
    for (int n : {1, 2}) {
        emu::settings.threads = n;
        turn_reported("turns that begin with the last block", "no running block can pass", start_turns<WRONG_ORDER>);
    }
    emu::settings.threads = threads;
    emu::settings.cc = cc;
}
static void test_api() {
    const cudaError_t invalid = cudaErrorInvalidValue;
    const int limit = emu::smem_optin();
    auto opt_in = [](int n) { return cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n); };
    expect("shared memory above 48 KB without opting in", invalid, "dynamic shared memory", empty_kernel, 1, 1, 49153);
    expect("shared memory above the device", invalid, "the device has", [=] { return opt_in(limit + 1); });
    opt_in(limit);
    check("shared memory up to the opted limit", start(empty_kernel, 1, 1, limit) == cudaSuccess);
    expect("1025 threads", cudaErrorInvalidConfiguration, "outside the limits", empty_kernel, 1, 1025, 0);
    expect("empty grid", cudaErrorInvalidConfiguration, "outside the limits", empty_kernel, 0, 32, 0);
    expect("grid.y of 65536", cudaErrorInvalidConfiguration, "outside the limits", empty_kernel, dim3(1, 65536), 32, 0);
    check("1024 threads, block (2,32,16)", start(empty_kernel, 3, dim3(2, 32, 16), 0) == cudaSuccess);
    void *q = nullptr;
    size_t left, total;
    cudaMemGetInfo(&left, &total);
    const cudaError_t e = cudaMalloc(&q, left + 1);
    check("out of memory is not sticky", e == cudaErrorMemoryAllocation && cudaGetLastError() == e &&
        cudaGetLastError() == cudaSuccess && cudaMalloc(&q, 1000) == cudaSuccess);
    char host[64];
    expect("copy that leaves its allocation", invalid, "leaves its allocation",
        [&] { return cudaMemcpy(host, (char *)q + 950, 64, cudaMemcpyDeviceToHost); });
    expect("copy in the wrong direction", invalid, "not device memory",
        [&] { return cudaMemcpy(host, bytes, 64, cudaMemcpyHostToDevice); });
    expect("double free", invalid, "free of", [] { cudaFree(bytes); return cudaFree(bytes); });
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
            cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking);
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
            if (wait) right &= x.h[1] == 3;
            else wrong |= x.h[1] != 3;
            cudaStreamDestroy(s), cudaStreamDestroy(t), cudaEventDestroy(done);
        }
    emu::settings.async = 0;
    check("EMU_ASYNC: work ordered by an event is right, the missing wait shows", right && wrong);
}
static cublasStatus_t matmul(void *D, const void *A, const void *B, const void *bias, int m, int n, int k, int ta, int tb,
    cudaDataType_t ab, cudaDataType_t d, float beta) {
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
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    cublasLtMatrixLayoutCreate(&la, ab, ta ? k : m, ta ? m : k, ta ? k : m);
    cublasLtMatrixLayoutCreate(&lb, ab, tb ? n : k, tb ? k : n, tb ? n : k);
    cublasLtMatrixLayoutCreate(&ld, d, m, n, m);
    cublasLtMatmulPreferenceCreate(&pref);
    cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(h, desc, la, lb, ld, ld, pref, 1, &result, &found);
    if (!s) s = cublasLtMatmul(h, desc, &alpha, A, la, B, lb, &beta, D, ld, D, ld, &result.algo, nullptr, 0, 0);
    cublasLtMatrixLayoutDestroy(la), cublasLtMatrixLayoutDestroy(lb), cublasLtMatrixLayoutDestroy(ld);
    cublasLtMatmulDescDestroy(desc), cublasLtMatmulPreferenceDestroy(pref), cublasLtDestroy(h);
    return s;
}
template <typename T, typename O> double matmul_error(int ta, int tb, bool bias) {
    const int m = 40, n = 37, k = 300;
    Buffer<T> a(m * k), b(n * k);
    Buffer<O> d(m * n), before(m * n), v(m);
    a.randomize(), b.randomize(), v.randomize(), before.randomize();
    cudaMemcpy(d.d, before.d, d.n * sizeof(O), cudaMemcpyDeviceToDevice);
    const cudaDataType_t ab = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F, out = sizeof(O) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    if (matmul(d.d, a.d, b.d, bias ? v.d : nullptr, m, n, k, ta, tb, ab, out, 0.5f)) return INFINITY;
    d.down();
    double worst = 0;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double s = 0.5 * (float)before.h[j * m + i] + (bias ? (float)v.h[i] : 0);
            for (int l = 0; l < k; l++)
                s += (double)(float)a.h[ta ? i * k + l : l * m + i] * (float)b.h[tb ? l * n + j : j * k + l];
            worst = fmax(worst, fabs(s - (float)d.h[j * m + i]) / (1 + fabs(s)));
        }
    return worst;
}
static void test_matmul() {
    bool f32 = true, b32 = true, b16 = true;
    for (int t = 0; t < 4; t++) {
        f32 &= matmul_error<float, float>(t / 2, t % 2, t == 1) < 1e-5;
        b32 &= matmul_error<bf16, float>(t / 2, t % 2, t == 2) < 1e-5;
        b16 &= matmul_error<bf16, bf16>(t / 2, t % 2, t == 3) < 0x1p-8;
    }
    check("cublasLt fp32, transposes, beta, bias", f32);
    check("cublasLt bf16 -> fp32", b32);
    check("cublasLt bf16 -> bf16, one rounding", b16);
    Buffer<float> a(64 * 64), d(64 * 64);
    capture_begin();
    const cublasStatus_t range = matmul(d.d, a.d, a.d, nullptr, 64, 80, 64, 0, 0, CUDA_R_32F, CUDA_R_32F, 0);
    const cublasStatus_t align = matmul(d.d, a.d + 1, a.d, nullptr, 32, 32, 32, 0, 0, CUDA_R_32F, CUDA_R_32F, 0);
    const cublasStatus_t alias = matmul(a.d, a.d, d.d, nullptr, 32, 32, 32, 0, 0, CUDA_R_32F, CUDA_R_32F, 0);
    capture_end();
    check("cublasLt refuses operands outside their allocation, misaligned, or overlapping", range && align && alias &&
        strstr(report, "leaves its allocation"));
}
// One rank in this process; with USE_MPI under mpirun, all of them.
static ncclComm_t ready(ncclComm_t c) {                      // polls a communicator that does not block
    for (ncclResult_t state = ncclInProgress; state == ncclInProgress;) ncclCommGetAsyncError(c, &state);
    return c;
}
template <typename T> bool collectives(ncclComm_t c, cudaStream_t s, ncclDataType_t type, int n) {
    const int R = c->size, r = c->rank;
    bool ok = true;
    for (int in_place = 0; in_place < 2; in_place++) {
        Buffer<T> all(n * R), part(n), out(n * R);
        for (int i = 0; i < n * R; i++) all.h[i] = (T)(float)((i + 3 * r) % 120);
        for (int i = 0; i < n; i++) part.h[i] = (T)(float)((i + 5 * r) % 120);
        all.up(), part.up(), out.up();
        T *to = in_place ? all.d : out.d;
        ok &= ncclAllReduce(all.d, to, n * R, type, ncclSum, ready(c), s) <= (c->blocking ? 0 : ncclInProgress);
        ready(c), cudaStreamSynchronize(s);
        cudaMemcpy(out.h, to, n * R * sizeof(T), cudaMemcpyDeviceToHost);
        auto sum = [&](int i) { T x = (T)0.0f; for (int q = 0; q < R; q++) x = (T)((float)x + (i + 3 * q) % 120); return (float)x; };
        for (int i = 0; i < n * R; i++) ok &= (float)out.h[i] == sum(i);
        all.up();
        to = in_place ? all.d + r * n : part.d;
        ncclReduceScatter(all.d, to, n, type, ncclSum, ready(c), s);
        ready(c), cudaStreamSynchronize(s);
        cudaMemcpy(out.h, to, n * sizeof(T), cudaMemcpyDeviceToHost);
        for (int i = 0; i < n; i++) ok &= (float)out.h[i] == sum(r * n + i);
        part.up(), out.up();
        cudaMemcpy(all.d + r * n, part.d, n * sizeof(T), cudaMemcpyDeviceToDevice);
        to = in_place ? all.d : out.d;
        ncclAllGather(in_place ? all.d + r * n : part.d, to, n, type, ready(c), s);
        ready(c), cudaStreamSynchronize(s);
        cudaMemcpy(out.h, to, n * R * sizeof(T), cudaMemcpyDeviceToHost);
        for (int i = 0; i < n * R; i++) ok &= (float)out.h[i] == (float)((i % n + 5 * (i / n)) % 120);
    }
    return ok;
}
static void test_nccl(int rank, int world) {
    ncclUniqueId id = {};
    ncclComm_t c = nullptr, polled = nullptr, half = nullptr;
    if (rank == 0) ncclGetUniqueId(&id);
#ifdef USE_MPI
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
#endif
    check("nccl: a communicator", !ncclCommInitRank(&c, world, id, rank));
    const int n = (1 << 20) + 1001;                          // more than one message of MPI
    check("nccl: collectives of fp32, in place and not", collectives<float>(c, 0, ncclFloat32, n));
    check("nccl: collectives of bf16", collectives<bf16>(c, 0, ncclBfloat16, 999));
    cudaStream_t s, t;
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking);
    bool right = true;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        emu::settings.async = emu::async_rng = seed + rank;
        right &= collectives<float>(c, s, ncclFloat32, 1000);
    }
    check("nccl: collectives in steps (EMU_ASYNC)", right);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    check("nccl: one that does not block", ncclCommInitRankConfig(&polled, world, id, rank, &config) == ncclInProgress);
    Buffer<float> x(64);
    capture_begin();
    const bool early = ncclAllReduce(x.d, x.d, 64, ncclFloat32, ncclSum, polled, s) == ncclInvalidUsage;
    capture_end();
    check("nccl: a call before the last one is ready is refused", early && strstr(report, "in progress"));
    check("nccl: calls that are polled", collectives<float>(ready(polled), s, ncclFloat32, 1000));
    check("nccl: a split", ncclCommSplit(polled, rank % 2, rank, &half, nullptr) == ncclInProgress && ready(polled) &&
        collectives<float>(ready(half), s, ncclFloat32, 100) && half->size == (world + 1 - rank % 2) / 2 && half->rank == rank / 2);
    // Two communicators on two streams, begun in another order by every other rank; a group reaches its streams at its end.
    Buffer<float> y(64), z(64);
    for (int i = 0; i < 64; i++) y.h[i] = z.h[i] = 1;
    y.up(), z.up();
    ncclGroupStart();
    ncclAllReduce(y.d, y.d, 64, ncclFloat32, ncclSum, c, s);
    ncclAllReduce(z.d, z.d, 64, ncclFloat32, ncclSum, half, t);
    cudaStreamSynchronize(rank % 2 ? s : t);
    y.down();
    const bool held = y.h[0] == 1;
    ncclGroupEnd();
    ready(half);
    cudaStreamSynchronize(rank % 2 ? s : t), cudaStreamSynchronize(rank % 2 ? t : s);
    y.down(), z.down();
    check("nccl: groups, two streams", held && y.h[5] == (float)world && z.h[5] == (float)half->size);
    // Work that writes to a buffer of a collective, or reads its result, without waiting for it.
    bool unseen = true;
    int reports = 0, nans = 0;
    for (uint64_t seed = 1; seed <= 40; seed++) {
        emu::settings.async = emu::async_rng = seed * 77 + rank;
        x.up(), y.up();
        capture_begin();
        ncclAllReduce(x.d, z.d, 64, ncclFloat32, ncclSum, c, s);
        cudaMemsetAsync(seed % 2 ? x.d : z.d, 0, 64, t);
        cudaMemcpyAsync(y.d, z.d, 256, cudaMemcpyDeviceToDevice, t);
        cudaStreamSynchronize(t), cudaStreamSynchronize(s);
        capture_end();
        reports += strstr(report, "other work wrote to its ") != nullptr;
        emu::sticky = 0;
        y.down();
        nans += y.h[40] != y.h[40];
    }
    unseen = world > 1 && (!reports || !nans);
    check("nccl: missing waits show", !unseen);
    emu::settings.async = 0;
#ifdef USE_MPI
    MPI_Barrier(MPI_COMM_WORLD);
#endif
    check("nccl: abort", !ncclCommDestroy(c) && !ncclCommAbort(ready(half)) && !ncclCommAbort(ready(polled)));
}
int main(int argc, char **argv) {
    int rank = 0, world = 1;
#ifdef USE_MPI
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    test_nccl(rank, world);
    if (rank == 0) printf("%d passed, %d failed\n", passed, failed);
    MPI_Finalize();
    return failed > 0;
#endif
    if (argc > 1 && !strcmp(argv[1], "--bits")) { print_bits(); return 0; }
    setvbuf(stdout, nullptr, _IOLBF, 0);
    test_results();
    test_fragments();
    test_bugs();
    test_reports();
    test_hopper();
    test_api();
    test_matmul();
    test_nccl(rank, world);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
#endif
