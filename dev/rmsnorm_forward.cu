// rmsnorm_forward: out (N,C) = x_c r w_c,  rstd (N) = r = (mean_c x_c^2 + eps)^(-1/2)  (Zhang & Sennrich
// 2019);  x (N,C), w (C)
// bytes   2·N·C in + 2·N·C out + 4·N = 134 MB for N 16384, C 2048        FLOPs ~4·N·C = 0.13 G
// floor   40 us (memory-bound; the arithmetic alone is 2 us of fp32)
// idea    r needs the whole row before the first output: read the row twice, or keep it
// limits  C % 8 == 0 (fp32: 4), C <= 16384 (shipped)
// result  modelled (H100; N 1024, C 2048, 8.4 MB compulsory, floor 2.5 us), MB in sectors and us: kernel 0
//         203 and 61; 1 and 2 16.8 and 5.0 (2 with an eighth of the instructions); 3 8.9 and 2.7. Measured:
//         not yet
#include "bench.cuh"

// ---- kernel 0: a thread per row: neighbouring threads are C elements apart, every load is its own sector --
template <typename floatX>
__global__ void rmsnorm_forward_kernel0(floatX *out, float *rstd, const floatX *x, const floatX *w, float eps,
                                        int N, int C) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    x += (size_t)n * C, out += (size_t)n * C;
    float squares = 0;
    for (int c = 0; c < C; c++) squares += to_float(x[c]) * to_float(x[c]);
    const float r = rsqrtf(squares / C + eps);
    for (int c = 0; c < C; c++) out[c] = from_float<floatX>(to_float(x[c]) * r * to_float(w[c]));
    rstd[n] = r;
}

// ---- kernel 1: a warp per row: neighbouring lanes read neighbouring elements, 2 bytes each ----------------
template <typename floatX>
__global__ void rmsnorm_forward_kernel1(floatX *out, float *rstd, const floatX *x, const floatX *w, float eps,
                                        int N, int C) {
    const int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) return;
    x += (size_t)n * C, out += (size_t)n * C;
    float squares = 0;
    for (int c = threadIdx.x; c < C; c += 32) squares += to_float(x[c]) * to_float(x[c]);
    const float r = rsqrtf(warp_sum(squares) / C + eps);
    for (int c = threadIdx.x; c < C; c += 32)
        out[c] = from_float<floatX>(to_float(x[c]) * r * to_float(w[c]));
    if (threadIdx.x == 0) rstd[n] = r;
}

// ---- kernel 2: 16 bytes per access: an eighth of the instructions. x is still read twice; the second time
// it is in a cache, usually
template <typename floatX>
__global__ void rmsnorm_forward_kernel2(floatX *out, float *rstd, const floatX *x, const floatX *w, float eps,
                                        int N, int C) {
    constexpr int E = 16 / sizeof(floatX);
    const int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) return;
    x += (size_t)n * C, out += (size_t)n * C;
    float squares = 0, a[E], w_c[E];
    for (int c = threadIdx.x * E; c < C; c += 32 * E) {
        widen(a, load<E>(x + c));
        for (int k = 0; k < E; k++) squares += a[k] * a[k];
    }
    const float r = rsqrtf(warp_sum(squares) / C + eps);
    for (int c = threadIdx.x * E; c < C; c += 32 * E) {
        widen(a, load<E>(x + c));
        widen(w_c, load<E>(w + c));
        for (int k = 0; k < E; k++) a[k] = a[k] * r * w_c[k];
        store(out + c, narrow<floatX>(a));
    }
    if (threadIdx.x == 0) rstd[n] = r;
}

// ---- kernel 3, shipped: the row stays in registers, w in shared memory, enough warps per row for any
// width
template <typename floatX>
__global__ void __launch_bounds__(1024) rmsnorm_forward_kernel3(floatX *out, float *rstd, const floatX *x,
                                                                const floatX *w, float eps, int N, int C) {
    // a warp has ROW_PACKS * STEP columns next to each other
    constexpr int E = 16 / sizeof(floatX), STEP = 32 * E;
    floatX *w_shared = shared_memory<floatX>();             // (C)
    const int c0 = threadIdx.x / 32 * ROW_PACKS * STEP + threadIdx.x % 32 * E;
    for (int c = thread_in_block() * E; c < C; c += threads_in_block() * E) cp_async_16(w_shared + c, w + c);
    cp_async_commit();
    int turn = 0;
    for (int n0 = blockIdx.x * blockDim.y; n0 < N; n0 += gridDim.x * blockDim.y, turn ^= 1) {
        const int n = n0 + threadIdx.y, end = n < N ? C : 0;
        const size_t at = (size_t)n * C + c0;
        Pack<floatX, E> row[ROW_PACKS];
        for (int j = 0; j < ROW_PACKS; j++) row[j] = load_if<E>(c0 + j * STEP < end, x + at + j * STEP);
        float squares = 0;
        #pragma unroll
        for (int j = 0; j < ROW_PACKS; j++) {
            float x_c[E];
            widen(x_c, row[j]);
            for (int k = 0; k < E; k++) squares += x_c[k] * x_c[k];
        }
        keep_packed(row);
        cp_async_wait<0>();                                 // w is visible after the barrier in row_sum
        const float r = rsqrtf(row_sum(squares, turn) / C + eps);
        if (threadIdx.x == 0 && n < N) rstd[n] = r;
        #pragma unroll
        for (int j = 0; j < ROW_PACKS; j++) {
            if (c0 + j * STEP >= end) continue;
            float x_c[E], w_c[E], out_c[E];
            widen(x_c, row[j]);
            widen(w_c, load<E>(w_shared + c0 + j * STEP));
            // backward in this order: the same bits
            for (int k = 0; k < E; k++) out_c[k] = x_c[k] * r * w_c[k];
            store(out + at + j * STEP, narrow<floatX>(out_c));
        }
    }
}

template <typename floatX> static void shape(int when, int N, int C, float eps) {
    const size_t n = (size_t)N * C;
    if (!bench_shape<floatX>(when, "rmsnorm_forward", 2.0 * n * sizeof(floatX) + 4.0 * N + sizeof(floatX) * C,
                             4.0 * n, "N %d C %d", N, C)) return;
    Tensor<floatX> out("out", n), x("x", n), w("w", C);
    Tensor<float> rstd("rstd", N);
    x.normal(1.5f, 0.3f), w.normal(0.3f, 1);
    reference<floatX>([&](int b) { twin::rmsnorm_forward(out.twin(b), rstd.twin(b), x.host, w.host, eps, N,
                                                         C); });
    const Variant variants[] = {
        {0, "one thread per row", [&] {
            launch(rmsnorm_forward_kernel0<floatX>, CEIL_DIV(N, 128), 128, 0, out, rstd, x, w, eps, N, C);
        }},
        {1, "one warp per row", [&] {
            launch(rmsnorm_forward_kernel1<floatX>, CEIL_DIV(N, 8), dim3(32, 8), 0, out, rstd, x, w, eps, N,
                   C);
        }},
        {2, "16-byte accesses", [&] {
            launch(rmsnorm_forward_kernel2<floatX>, CEIL_DIV(N, 8), dim3(32, 8), 0, out, rstd, x, w, eps, N,
                   C);
        }},
        {3, "the row in registers: read once", [&] { rmsnorm_forward<floatX>(out, rstd, x, w, eps, N, C); },
         SHIPPED},
    };
    bench(variants);
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 37, 288, 1e-5f);
    shape<floatX>(CHECK, 5, 1032, 0.1f);         // columns that fill no warp; an eps that matters
    shape<floatX>(CHECK, 1, 8, 1e-5f);
    shape<floatX>(CHECK, 3, 16384, 1e-5f);       // the widest
}

int main(int argc, char **argv) {
    bench_begin("rmsnorm_forward", argc, argv);
    shapes<float>();
    shapes<bf16>();
    shape<bf16>(MODEL, 1024, 2048, 1e-5f);
    shape<bf16>(TIME, 16384, 2048, 1e-5f);
    shape<bf16>(TIME, 4095, 4104, 1e-5f);
    shape<float>(TIME, 8192, 2048, 1e-5f);
    return bench_end();
}
