// rmsnorm_backward: gradients of out = x r w, r = (mean x^2 + eps)^(-1/2) kept by the forward as rstd.
// With g_c = dout_c w_c and n_c = x_c r:   dx_c += r (g_c - n_c mean_j(g_j n_j))      dw_c += sum over rows
// of dout_c n_c dx (N,C) +=, dw (C) +=, norm_out (N,C) = n_c w_c, the forward's output again (or NULL); dout,
// x (N,C), rstd (N), w (C)
// bytes   3·N·C (dout, x, dx) in + 2·N·C (dx, norm_out) out, 2 bytes each = 336 MB for N 16384, C 2048
// FLOPs   ~13·N·C = 0.44 G
// floor   336 MB / 3.35 TB/s = 100 us (memory-bound; the arithmetic alone is 7 us of fp32)
// idea    two sums run in different directions: one along each row (mean), one down each column (dw). Whoever
//         owns a row has a share of every column's sum and must put it somewhere without atomics, so that two
//         runs give the same bits
// limits  C % 4 == 0, C <= 16384 (shipped)
// result  modelled (H100; N 512, C 2048, 10.5 MB compulsory, floor 3.1 us), MB in sectors and us: kernel 0
//         243 and 73; 1 26 and 8.7; 2 25 and 7.6; 3 11.9 and 3.7. Measured: not yet
#include "bench.cuh"

// ---- kernel 0: the formula. A thread per row for dx, then a thread per column for dw: rows are C apart, so
// a warp's loads are 32 sectors
template <typename floatX>
__global__ void rmsnorm_backward_kernel0(floatX *dx, floatX *norm_out, const floatX *dout, const floatX *x,
                                         const float *rstd, const floatX *w, int N, int C) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    dx += (size_t)n * C, dout += (size_t)n * C, x += (size_t)n * C;
    const float r = rstd[n];
    float gn = 0;
    for (int c = 0; c < C; c++) gn += to_float(dout[c]) * to_float(w[c]) * to_float(x[c]) * r;
    for (int c = 0; c < C; c++) {
        const float g = to_float(dout[c]) * to_float(w[c]), norm = to_float(x[c]) * r;
        dx[c] = from_float<floatX>(to_float(dx[c]) + r * (g - norm * gn / C));
        if (norm_out) norm_out[(size_t)n * C + c] = from_float<floatX>(norm * to_float(w[c]));
    }
}

template <typename floatX>
__global__ void rmsnorm_backward_dw_kernel0(float *dw, const floatX *dout, const floatX *x, const float *rstd,
                                            int N, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    float sum = 0;
    for (int n = 0; n < N; n++)
        sum += to_float(dout[(size_t)n * C + c]) * (to_float(x[(size_t)n * C + c]) * rstd[n]);
    dw[c] += sum;
}

// ---- kernel 1: a warp per row: neighbouring lanes read neighbouring elements. Three walks over the row and
// a second kernel still read dout and x three times
template <typename floatX>
__global__ void rmsnorm_backward_kernel1(floatX *dx, floatX *norm_out, const floatX *dout, const floatX *x,
                                         const float *rstd, const floatX *w, int N, int C) {
    const int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) return;
    dx += (size_t)n * C, dout += (size_t)n * C, x += (size_t)n * C;
    const float r = rstd[n];
    float gn = 0;
    for (int c = threadIdx.x; c < C; c += 32) gn += to_float(dout[c]) * to_float(w[c]) * to_float(x[c]);
    const float mean = warp_sum(gn) * r / C;
    for (int c = threadIdx.x; c < C; c += 32) {
        const float norm = to_float(x[c]) * r;
        dx[c] = from_float<floatX>(to_float(dx[c]) + r * (to_float(dout[c]) * to_float(w[c]) - norm * mean));
        if (norm_out) norm_out[(size_t)n * C + c] = from_float<floatX>(norm * to_float(w[c]));
    }
}

// ---- kernel 2: dw on the way. A block keeps sums of dw over its rows in shared memory, writes them once,
// and column_sums adds the blocks: dout and x are read twice, the second time from the L1 or L2 cache if the
// row is still there
template <typename floatX>
__global__ void rmsnorm_backward_kernel2(floatX *dx, float *partials, floatX *norm_out, const floatX *dout,
                                         const floatX *x, const float *rstd, const floatX *w, int N, int C) {
    float *dw = shared_memory<float>();  // (C): each thread meets its own columns only: no barrier
    for (int c = threadIdx.x; c < C; c += blockDim.x) dw[c] = 0;
    for (int n = blockIdx.x; n < N; n += gridDim.x) {
        const size_t at = (size_t)n * C;
        const float r = rstd[n];
        float gn = 0;
        for (int c = threadIdx.x; c < C; c += blockDim.x)
            gn += to_float(dout[at + c]) * to_float(w[c]) * to_float(x[at + c]);
        const float mean = block_sum(gn) * r / C;
        for (int c = threadIdx.x; c < C; c += blockDim.x) {
            const float norm = to_float(x[at + c]) * r, d = to_float(dout[at + c]);
            dw[c] += d * norm;
            dx[at + c] = from_float<floatX>(to_float(dx[at + c]) + r * (d * to_float(w[c]) - norm * mean));
            if (norm_out) norm_out[at + c] = from_float<floatX>(norm * to_float(w[c]));
        }
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) partials[(size_t)blockIdx.x * C + c] = dw[c];
}

// ---- kernel 3, shipped: 16 elements of each operand stay in registers over the reduction, so each is read
// once, 4 at a time; narrow rows share a block; w is copied to shared memory once per block
template <typename floatX>
__global__ void __launch_bounds__(1024) rmsnorm_backward_kernel3(floatX *dx, float *partials,
        floatX *norm_out, const floatX *dout, const floatX *x, const float *rstd, const floatX *w, int N,
        int C) {
    constexpr bool early = sizeof(floatX) == 2;  // fp32 has no registers left to hold dx over the reduction
    constexpr int STEP = 32 * 4;  // a warp has ROW_QUADS * STEP columns next to each other
    // (blockDim.y,C): of this block's rows
    float *sums = shared_memory<float>(), *dw = sums + threadIdx.y * C;
    floatX *w_shared = (floatX *)(sums + blockDim.y * C);   // (C)
    const int c0 = threadIdx.x / 32 * ROW_QUADS * STEP + threadIdx.x % 32 * 4;
    for (int c = thread_in_block() * 4; c < C; c += threads_in_block() * 4)
        store(w_shared + c, load<4>(w + c));
    for (int j = 0; j < ROW_QUADS; j++) if (c0 + j * STEP < C) store(dw + c0 + j * STEP, Pack<float, 4>{});
    __syncthreads();
    int turn = 0;
    for (int n0 = blockIdx.x * blockDim.y; n0 < N; n0 += gridDim.x * blockDim.y, turn ^= 1) {
        const int n = n0 + threadIdx.y, end = n < N ? C : 0;
        const size_t at = (size_t)n * C + c0;
        Pack<floatX, 4> dout_row[ROW_QUADS], x_row[ROW_QUADS], dx_row[ROW_QUADS];
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            dout_row[j] = load_if<4>(c0 + j * STEP < end, dout + at + j * STEP);
            x_row[j] = load_if<4>(c0 + j * STEP < end, x + at + j * STEP);
            if (early) dx_row[j] = load_if<4>(c0 + j * STEP < end, dx + at + j * STEP);
        }
        float gn = 0;
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            if (c0 + j * STEP >= end) continue;
            float dout_c[4], x_c[4], w_c[4];
            widen(dout_c, dout_row[j]);
            widen(x_c, x_row[j]);
            widen(w_c, load<4>(w_shared + c0 + j * STEP));
            for (int k = 0; k < 4; k++) gn += dout_c[k] * w_c[k] * x_c[k];
        }
        keep_packed(dout_row);
        keep_packed(x_row);
        const float r = n < N ? rstd[n] : 0, mean = row_sum(gn, turn) * r / C;
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            if (c0 + j * STEP >= end) continue;
            if (!early) dx_row[j] = load<4>(dx + at + j * STEP);
            float dout_c[4], x_c[4], w_c[4], dx_c[4], dw_c[4], norm_c[4];
            widen(dout_c, dout_row[j]);
            widen(x_c, x_row[j]);
            widen(w_c, load<4>(w_shared + c0 + j * STEP));
            widen(dx_c, dx_row[j]);
            widen(dw_c, load<4>(dw + c0 + j * STEP));
            for (int k = 0; k < 4; k++) {
                const float n_c = x_c[k] * r, g_c = dout_c[k] * w_c[k];
                dw_c[k] += dout_c[k] * n_c;
                dx_c[k] += r * (g_c - n_c * mean);
                norm_c[k] = n_c * w_c[k];
            }
            store(dw + c0 + j * STEP, narrow<float>(dw_c));
            store(dx + at + j * STEP, narrow<floatX>(dx_c));
            if (norm_out) store(norm_out + at + j * STEP, narrow<floatX>(norm_c));
        }
    }
    __syncthreads();
    for (int c = thread_in_block() * 4; c < C; c += threads_in_block() * 4) {
        float total[4] = {};
        for (int y = 0; y < (int)blockDim.y; y++) accumulate(total, sums + y * C + c);
        store(partials + (size_t)blockIdx.x * C + c, narrow<float>(total));
    }
}

template <typename floatX> static void shape(int when, int N, int C, int rebuild) {
    const size_t n = (size_t)N * C;
    if (!bench_shape<floatX>(when, "rmsnorm_backward", (4.0 + rebuild) * n * sizeof(floatX), 13.0 * n,
                             "N %d C %d%s", N, C, rebuild ? " with norm_out" : "")) return;
    Tensor<floatX> dx("dx", n), norm("norm_out", n), dout("dout", n), x("x", n), w("w", C);
    Tensor<float> dw("dw", C), rstd("rstd", N), scratch("scratch", (size_t)MAX_PARTIALS * C);
    dx.normal(1), dout.normal(1), x.normal(1.5f, 0.3f), w.normal(0.3f, 1), dw.normal(1);
    std::vector<float> unused(n);
    twin::rmsnorm_forward(unused.data(), rstd.host, x.host, w.host, 1e-5, N, C);
    reference<floatX>([&](int b) {
        twin::rmsnorm_backward(dx.twin(b), dw.twin(b), rebuild ? norm.twin(b) : NULL, dout.host, x.host,
                               rstd.host, w.host, N, C);
    });
    gpu.scratch = scratch;
    floatX *norm_out = rebuild ? (floatX *)norm : NULL;
    const int blocks = N < 264 ? N : 264;
    auto dw_alone = [&] { launch(rmsnorm_backward_dw_kernel0<floatX>, CEIL_DIV(C, 128), 128, 0, dw, dout, x,
                                 rstd, N, C); };
    const Variant variants[] = {
        {0, "one thread per row; dw: one thread per column", [&] {
            launch(rmsnorm_backward_kernel0<floatX>, CEIL_DIV(N, 128), 128, 0, dx, norm_out, dout, x, rstd, w,
                   N, C);
            dw_alone();
        }},
        {1, "one warp per row; dw as before", [&] {
            launch(rmsnorm_backward_kernel1<floatX>, CEIL_DIV(N, 8), dim3(32, 8), 0, dx, norm_out, dout, x,
                   rstd, w, N, C);
            dw_alone();
        }},
        {2, "dw summed on the way, in shared memory; rows read twice", [&] {
            launch(rmsnorm_backward_kernel2<floatX>, blocks, 256, C * sizeof(float), dx, scratch, norm_out,
                   dout, x, rstd, w, N, C);
            column_sums(dw, scratch, blocks, C, C);
        }},
        {3, "rows in registers, 16-byte accesses, dw in shared memory", [&] {
            rmsnorm_backward<floatX>(dx, dw, norm_out, dout, x, rstd, w, N, C);
        }, SHIPPED},
    };
    bench(variants);
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 37, 288, 1);
    shape<floatX>(CHECK, 5, 1032, 0);            // columns that fill no warp
    shape<floatX>(CHECK, 1, 8, 1);
    shape<floatX>(CHECK, 67, 2056, 1);
}

int main(int argc, char **argv) {
    bench_begin("rmsnorm_backward", argc, argv);
    shapes<float>();
    shapes<bf16>();
    shape<bf16>(MODEL, 512, 2048, 1);
    shape<bf16>(TIME, 16384, 2048, 1);
    shape<bf16>(TIME, 16384, 4096, 0);
    shape<bf16>(TIME, 4095, 2056, 1);
    shape<float>(TIME, 8192, 2048, 1);
    return bench_end();
}
