// embedding_forward: x (N,C) = w[ids];  embedding_backward: dw (Vp,C) += for each token the sum of its rows
// of dx (N,C)
// bytes   forward 2·N·C out + 2·C per distinct token in + 4·N: 84 MB for N 16384, C 2048, 4000 distinct;
//         backward 2·N·C in +
//         8·C per distinct token (dw, fp32, read and written): 133 MB            FLOPs 0; N·C
// floor   25 us; 40 us (memory)
// idea    forward: a copy; wide accesses, no division, and a frequent token is not read again for each of its
//         rows. backward: text is skewed (a comma can be 5% of a batch), so rows of dw have very different
//         numbers of summands, and with one writer per row the commonest token is the slowest. Rows are
//         sorted by token on the host
// limits  C % 8 == 0 (fp32: 4)
// result  modelled (H100; N 1024, C 512, V 2000, skewed), MB in sectors and us:  forward (1.6 MB compulsory)
//         kernel 0 2.6 and 0.78;
//         1 and 2 2.2 and 0.65; 3 1.6 and 1.0 (4 blocks).  backward (3.1 MB) 0 5.8 and 3.5; 1 3.7 and 1.1; 2
//         3.4 and 1.0; 3 3.1 and 0.93. Queues at one address and warps left alone are not in the model.
//         Measured: not yet
#include "bench.cuh"

// ---- forward, kernel 0: a thread per element --------------------------------------------------------------
template <typename floatX>
__global__ void embedding_forward_kernel0(floatX *x, const int *ids, const floatX *w, int N, int C) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)N * C) x[i] = w[(size_t)ids[i / C] * C + i % C];
}

// ---- kernel 1: 16 bytes per thread; the row is still found by a division, and its token is read once per
// thread
template <typename floatX>
__global__ void embedding_forward_kernel1(floatX *x, const int *ids, const floatX *w, int N, int C) {
    constexpr int E = 16 / sizeof(floatX);
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * E;
    if (i < (size_t)N * C) store(x + i, load<E>(w + (size_t)ids[i / C] * C + i % C));
}

// ---- kernel 2: a warp per row, and no division. The rows of frequent tokens are read again and again, from
// L2 at best
template <typename floatX>
__global__ void embedding_forward_kernel2(floatX *x, const int *ids, const floatX *w, int N, int C) {
    constexpr int E = 16 / sizeof(floatX);
    const int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) return;
    for (int c = threadIdx.x * E; c < C; c += 32 * E)
        store(x + (size_t)n * C + c, load<E>(w + (size_t)ids[n] * C + c));
}

// ---- kernel 3, shipped: rows in the order of their tokens, which are read once per run of up to 32 --------
template <typename floatX>
__global__ void embedding_forward_kernel3(floatX *__restrict__ x, const int *ids, const int *order,
                                          const floatX *__restrict__ w, int N, int C) {
    constexpr int E = 16 / sizeof(floatX), STEP = 32 * E, PACKS = EMBED_COLUMNS / STEP;
    const int c0 = blockIdx.y * EMBED_COLUMNS + threadIdx.x * E;
    const int first = (blockIdx.x * EMBED_WARPS + threadIdx.y) * EMBED_RUN, last = min(first + EMBED_RUN, N);
    Pack<floatX, E> row[PACKS] = {};
    for (int j = first, held = -1; j < last; j++) {
        const int n = order[j], token = ids[n];
        if (token != held) {
            held = token;
            for (int i = 0; i < PACKS; i++)
                row[i] = load_if<E>(c0 + i * STEP < C, w + (size_t)token * C + c0 + i * STEP);
        }
        for (int i = 0; i < PACKS; i++)
            if (c0 + i * STEP < C) store(x + (size_t)n * C + c0 + i * STEP, row[i]);
    }
}

// ---- backward, kernel 0: a thread per column walks all rows in order. One writer per element of dw, but
// only C threads
template <typename floatX>
__global__ void embedding_backward_kernel0(float *dw, const int *ids, const floatX *dx, int N, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    for (int n = 0; n < N; n++) dw[(size_t)ids[n] * C + c] += to_float(dx[(size_t)n * C + c]);
}

// ---- kernel 1: atomics. All the threads one could want, no sorting; sums in any order, so two runs differ
// (the rules forbid it), and the rows of a frequent token queue up at the same addresses
template <typename floatX>
__global__ void embedding_backward_kernel1(float *dw, const int *ids, const floatX *dx, int C) {
    const int n = blockIdx.x;
    for (int c = threadIdx.x; c < C; c += blockDim.x)
        atomicAdd(dw + (size_t)ids[n] * C + c, to_float(dx[(size_t)n * C + c]));
}

// ---- kernel 2: rows sorted by token: a warp owns a token, sums its rows in registers and adds once. The
// commonest token keeps one warp busy long after the others have finished
template <typename floatX>
__global__ void embedding_backward_kernel2(float *dw, const int *order, const int *starts, const int *tokens,
                                           const floatX *dx, int C) {
    const int i = blockIdx.x, c = blockIdx.y * 128 + threadIdx.x * 4;
    if (c >= C) return;
    float sum[4] = {}, d[4];
    for (int j = starts[i]; j < starts[i + 1]; j++) {
        widen(d, load<4>(dx + (size_t)order[j] * C + c));
        for (int k = 0; k < 4; k++) sum[k] += d[k];
    }
    float *dw_i = dw + (size_t)tokens[i] * C + c;
    widen(d, load<4>(dw_i));
    for (int k = 0; k < 4; k++) d[k] += sum[k];
    store(dw_i, narrow<float>(d));
}

// ---- kernel 3, shipped: as 2 with 512 columns per warp; a token of more than EMBED_LONG rows is summed by
// all warps of its block
template <typename floatX>
__global__ void embedding_backward_kernel3(float *dw, const int *order, const int *starts, const int *tokens,
                                           int n_distinct, const floatX *dx, int C) {
    __shared__ int first[EMBED_WARPS + 1];  // rows first[i] .. first[i+1]-1 are those of the block's token i
    __shared__ __align__(16) float part[EMBED_WARPS][EMBED_QUADS][32][4];
    const int lane = threadIdx.x, warp = threadIdx.y, token0 = blockIdx.x * EMBED_WARPS;
    const int c0 = blockIdx.y * EMBED_COLUMNS + lane * 4;
    if (warp == 0 && lane <= EMBED_WARPS)
        first[lane] = starts[token0 + lane < n_distinct ? token0 + lane : n_distinct];
    __syncthreads();
    float sum[EMBED_QUADS][4];
    int rows = first[warp + 1] - first[warp];
    if (rows > 0 && rows <= EMBED_LONG) {
        float *dw_i = dw + (size_t)tokens[token0 + warp] * C;
        add_rows(sum, dx, order, first[warp], first[warp + 1], 1, c0, C);
        for (int q = 0; q < EMBED_QUADS; q++) {
            if (c0 + q * 128 >= C) continue;
            accumulate(sum[q], dw_i + c0 + q * 128);
            store(dw_i + c0 + q * 128, narrow<float>(sum[q]));
        }
    }
    for (int i = 0; i < EMBED_WARPS; i++) {
        if (first[i + 1] - first[i] <= EMBED_LONG) continue;    // the same for the whole block
        add_rows(sum, dx, order, first[i] + warp, first[i + 1], EMBED_WARPS, c0, C);
        for (int q = 0; q < EMBED_QUADS; q++) store(part[warp][q][lane], narrow<float>(sum[q]));
        __syncthreads();
        int c = c0 + warp * 128;
        if (warp < EMBED_QUADS && c < C) {
            float *dw_i = dw + (size_t)tokens[token0 + i] * C + c, total[4] = {};
            for (int j = 0; j < EMBED_WARPS; j++) accumulate(total, part[j][warp][lane]);
            accumulate(total, dw_i);
            store(dw_i, narrow<float>(total));
        }
        __syncthreads();
    }
}

enum { UNIFORM, ONE_TOKEN, SKEWED };

template <typename floatX> static void shape(int when, int N, int C, int V, int kind) {
    const size_t n = (size_t)N * C;
    std::vector<int> ids(N), order(N), starts(N + 1), tokens(N);
    for (int i = 0; i < N; i++) {
        // UNIFORM on 0..V-1; SKEWED: probability 1/v, as words are
        const uint32_t bits = (uint32_t)(i + 1) * 2654435761u;
        const double u = (bits ^ bits >> 15) * 0x1p-32;
        if (kind == UNIFORM) ids[i] = (int)(u * V);
        else ids[i] = kind == ONE_TOKEN ? 3 % V : (int)exp(u * log((double)V)) - 1;
    }
    int distinct;
    sort_rows(order.data(), starts.data(), tokens.data(), &distinct, ids.data(), N, V);
    const char *kinds[] = {"uniform", "one token", "skewed"};

    if (bench_shape<floatX>(when, "embedding_forward", sizeof(floatX) * (n + (double)distinct * C) + 4.0 * N,
                            0, "N %d C %d V %d %s", N, C, V, kinds[kind])) {
        Tensor<floatX> x("x", n), w("w", (size_t)V * C);
        Tensor<int> id("ids", N), rows("order", N);
        w.normal(1);
        std::copy(ids.begin(), ids.end(), id.host);
        std::copy(order.begin(), order.end(), rows.host);
        x.allow(0);                                             // a copy: the same bits
        twin::embedding_forward(x.twin(0), id.host, w.host, N, C);
        const Variant variants[] = {
            {0, "one thread per element", [&] {
                launch(embedding_forward_kernel0<floatX>, CEIL_DIV(n, 256), 256, 0, x, id, w, N, C);
            }},
            {1, "one thread per 16 bytes", [&] {
                launch(embedding_forward_kernel1<floatX>, CEIL_DIV(n * sizeof(floatX) / 16, 256), 256, 0, x,
                       id, w, N, C);
            }},
            {2, "one warp per row", [&] {
                launch(embedding_forward_kernel2<floatX>, CEIL_DIV(N, 8), dim3(32, 8), 0, x, id, w, N, C);
            }},
            {3, "rows in the order of their tokens", [&] { embedding_forward<floatX>(x, id, rows, w, N, C); },
             SHIPPED},
        };
        bench(variants);
    }
    if (bench_shape<floatX>(when, "embedding_backward",
                            sizeof(floatX) * (double)n + 8.0 * distinct * C + 4.0 * (N + 2 * distinct), n,
                            "N %d C %d V %d %s", N, C, V, kinds[kind])) {
        Tensor<floatX> dx("dx", n);
        Tensor<float> dw("dw", (size_t)V * C);
        Tensor<int> id("ids", N), rows("order", N), first("starts", distinct + 1), token("tokens", distinct);
        dx.normal(1), dw.normal(1);
        std::copy(ids.begin(), ids.end(), id.host);
        std::copy(order.begin(), order.end(), rows.host);
        std::copy(starts.begin(), starts.begin() + distinct + 1, first.host);
        std::copy(tokens.begin(), tokens.begin() + distinct, token.host);
        twin::embedding_backward(dw.twin(0), id.host, dx.host, N, C);
        const Variant variants[] = {
            {0, "one thread per column, rows in order", [&] {
                launch(embedding_backward_kernel0<floatX>, CEIL_DIV(C, 64), 64, 0, dw, id, dx, N, C);
            }},
            {1, "atomics (two runs differ)", [&] {
                launch(embedding_backward_kernel1<floatX>, N, 256, 0, dw, id, dx, C);
            }},
            {2, "rows sorted: a warp per token", [&] {
                launch(embedding_backward_kernel2<floatX>, dim3(distinct, CEIL_DIV(C, 128)), 32, 0, dw, rows,
                       first, token, dx, C);
            }},
            {3, "and frequent tokens shared by a block", [&] {
                embedding_backward<floatX>(dw, rows, first, token, distinct, dx, N, C);
            }, SHIPPED},
        };
        bench(variants);
    }
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 37, 24, 11, UNIFORM);
    shape<floatX>(CHECK, 150, 640, 40, SKEWED);
    shape<floatX>(CHECK, 61, 1032, 1000, UNIFORM);
    shape<floatX>(CHECK, 1, 8, 5, ONE_TOKEN);
    shape<floatX>(CHECK, 45, 648, 40, ONE_TOKEN);
}

int main(int argc, char **argv) {
    bench_begin("embedding", argc, argv);
    shapes<float>();
    shapes<bf16>();
    shape<bf16>(MODEL, 1024, 512, 2000, SKEWED);
    shape<bf16>(TIME, 16384, 2048, 32000, SKEWED);
    shape<bf16>(TIME, 16383, 1032, 32000, UNIFORM);
    shape<float>(TIME, 8192, 2048, 32000, SKEWED);
    return bench_end();
}
