// attention_forward, causal, with grouped heads and documents:
//   out_t = sum_s p_ts v_s,  p_ts = exp(q_t k_s / sqrt(D) - lse_t) for doc_start_t <= s <= t
// out (N,H*D) =, lse (N,H) = log of the softmax's denominator;  qkv (N,(H+2K)D), doc_start (N) or NULL; H/K
// query heads per k/v head
// bytes   2·N·(H+2K)·D in + 2·N·H·D out + 4·N·H;  B 8, T 2048, H 16, K 2, D 128: 152 MB = 45 us
// FLOPs   4·D per visible pair = 2·B·H·T^2·D = 137 G
// floor   139 us (FLOP-bound; mma.sync reaches 0.62 of Hopper's peak: 224 us; wgmma has all of it)
// idea    the scores, T^2 per head, must not touch memory: a tile of queries walks over tiles of keys with a
//         running softmax (Dao et al. 2022); everything else is how to feed the tensor cores
// limits  D % 8 == 0, D <= 128; 4 runs where the code for sm_90a does
// result  modelled (H100; T 512, H 2, K 1, D 128, bf16, floor 0.24 us): kernel 0 675 us (all caches missed);
//         1 40 us, bound by shared memory; 2 and 3 4.5 us: the model knows no latency, which is all that sets
//         them apart. Measured: not yet
#include "bench.cuh"

// ---- kernel 0: a thread per query and head: all scores for their maximum, all scores again for the sums ---
template <typename floatX>
__global__ void attention_forward_kernel0(floatX *out, float *lse, const floatX *qkv, const int *doc_start,
                                          int N, int T, int H, int K, int D, float scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / H, h = i % H, t = row % T;
    const int W = (H + 2 * K) * D;
    if (row >= N) return;
    const floatX *q = qkv + (size_t)row * W + h * D, *k = qkv + (size_t)(row - t) * W + (H + h / (H / K)) * D,
        *v = k + K * D;
    const int first = doc_start ? doc_start[row] : 0;
    float top = -INFINITY, sum = 0, o[128] = {};
    for (int walk = 0; walk < 2; walk++)
        for (int s = first; s <= t; s++) {
            float score = 0;
            for (int d = 0; d < D; d++) score += to_float(q[d]) * to_float(k[(size_t)s * W + d]);
            score *= scale;
            if (walk == 0) { top = fmaxf(top, score); continue; }
            const float p = expf(score - top);
            sum += p;
            for (int d = 0; d < D; d++) o[d] += p * to_float(v[(size_t)s * W + d]);
        }
    for (int d = 0; d < D; d++) out[(size_t)i * D + d] = from_float<floatX>(o[d] / sum);
    lse[i] = top + logf(sum);
}

// ---- kernel 1: tiles of 32 keys in shared memory as fp32, for 32 queries of a block; four lanes share a
// query: each has D/4 of q and of the sums in registers. One walk: sums shrink when a larger score appears.
// Everything is fp32 FMA: 1/15 of the tensor peak
enum { TILE_QUERIES = 32, TILE_KEYS = 32 };

template <typename floatX>
__global__ void attention_forward_kernel1(floatX *out, float *lse, const floatX *qkv, const int *doc_start,
                                          int T, int H, int K, int D, float scale) {
    float *k_tile = shared_memory<float>(), *v_tile = k_tile + TILE_KEYS * D;       // (TILE_KEYS,D) each
    const int h = blockIdx.x % H, t0 = blockIdx.y * TILE_QUERIES, t = t0 + threadIdx.x / 4,
        W = (H + 2 * K) * D,
        d0 = threadIdx.x % 4 * 4;
    const size_t row0 = (size_t)(blockIdx.x / H) * T;
    const floatX *q = qkv + (row0 + t) * W + h * D, *k = qkv + row0 * W + (H + h / (H / K)) * D;
    const int first = doc_start && t < T ? doc_start[row0 + t] : 0;
    float q_d[8][4] = {}, o[8][4] = {}, top = -INFINITY, sum = 0, x[4];
    #pragma unroll
    for (int j = 0; j < 8; j++) if (t < T && d0 + j * 16 < D) widen(q_d[j], load<4>(q + d0 + j * 16));
    for (int s0 = doc_start ? doc_start[row0 + t0] : 0; s0 < t0 + TILE_QUERIES && s0 < T; s0 += TILE_KEYS) {
        __syncthreads();
        for (int i = threadIdx.x * 4; i < TILE_KEYS * D; i += blockDim.x * 4) {
            const int s = min(s0 + i / D, T - 1);  // what lies behind the end no query sees
            widen(x, load<4>(k + (size_t)s * W + i % D));
            store(k_tile + i, narrow<float>(x));
            widen(x, load<4>(k + (size_t)s * W + K * D + i % D));
            store(v_tile + i, narrow<float>(x));
        }
        __syncthreads();
        for (int s = s0; s < s0 + TILE_KEYS; s++) {
            float score = 0;
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                if (d0 + j * 16 >= D) continue;
                widen(x, load<4>(k_tile + (s - s0) * D + d0 + j * 16));
                for (int c = 0; c < 4; c++) score += q_d[j][c] * x[c];
            }
            score += __shfl_xor_sync(~0u, score, 1);
            score += __shfl_xor_sync(~0u, score, 2);
            if (s < first || s > t) continue;
            const float higher = fmaxf(top, score * scale), shrink = __expf(top - higher);
            const float p = __expf(score * scale - higher);
            top = higher;
            sum = sum * shrink + p;
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                if (d0 + j * 16 >= D) continue;
                widen(x, load<4>(v_tile + (s - s0) * D + d0 + j * 16));
                for (int c = 0; c < 4; c++) o[j][c] = o[j][c] * shrink + p * x[c];
            }
        }
    }
    if (t >= T) return;
    #pragma unroll
    for (int j = 0; j < 8; j++) {
        for (int c = 0; c < 4; c++) o[j][c] /= sum;
        if (d0 + j * 16 < D) store(out + ((row0 + t) * H + h) * D + d0 + j * 16, narrow<floatX>(o[j]));
    }
    if (threadIdx.x % 4 == 0) lse[(row0 + t) * H + h] = top + logf(sum);
}

// ---- kernel 2: tensor cores. A warp owns 32 queries and sees whole rows of scores; probabilities go from
// accumulators to operands in registers. Tiles have rows of WIDTH + 8, which keeps ldmatrix free of bank
// conflicts. But everyone waits for each tile to arrive
template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS) attention_forward_kernel2(bf16 *__restrict__ out,
        float *__restrict__ lse, const bf16 *__restrict__ qkv, const int *__restrict__ doc_start, int T,
        int H,
        int K, int D, float log2_scale) {
    typedef ForwardTiles<WIDTH> Tiles;
    constexpr int MT = Tiles::MT, ROWS = Tiles::ROWS, QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *shared_memory<Tiles>();
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;
    const int row0 = blockIdx.x / H * T, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int lane = threadIdx.x % 32;
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0, end = min(t0 + QUERIES, T);

    float p[MT][KEYS / 8][4], out_t[MT][WIDTH / 8][4];
    Softmax<MT> softmax;
    softmax.init();
    fill(out_t, 0);
    load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    Tile<ROWS, WIDTH> &warp_q = rows_of<ROWS>(tile.q, warp_row);
    for (int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0; s0 < end; s0 += KEYS) {
        const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;
        __syncthreads();                                    // every warp has left the previous K and V
        load_tile<ATT_THREADS>(tile.k, k, W, T - s0, D);
        load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (s0 >= t + ROWS || t >= T) continue;  // the tile lies above this warp's part of the diagonal
        fill(p, 0);
        multiply_rows<WIDTH / 16>(p, warp_q, tile.k);
        if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(p, t, s0, doc_start, row0, T);
        softmax.update(p, out_t, log2_scale);
        multiply_probabilities(out_t, p, tile.v);
    }
    softmax.finish(out_t);
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int row = t + i * 8 + lane / 4;
        const float log2_sum = softmax.base[i / 2][i % 2] + log2f(softmax.sum[i / 2][i % 2]);
        if (lane % 4 == 0 && row < T) lse[(size_t)(row0 + row) * H + h] = log2_sum * (float)M_LN2;
    }
    store_rows(out + ((size_t)(row0 + t) * H + h) * D, (size_t)H * D, out_t, 1, warp_q, T - t, D);
}

// ---- kernel 3, shipped: K and V take turns: one lands while the other is computed with --------------------
template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS) attention_forward_kernel3(bf16 *__restrict__ out,
        float *__restrict__ lse, const bf16 *__restrict__ qkv, const int *__restrict__ doc_start,
        int T, int H, int K, int D, float log2_scale) {
    typedef ForwardTiles<WIDTH> Tiles;
    constexpr int MT = Tiles::MT, ROWS = Tiles::ROWS, QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *shared_memory<Tiles>();
    // long rows first
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;
    const int row0 = blockIdx.x / H * T, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int lane = threadIdx.x % 32;
    // where the last of this warp's rows t..t+31 begins to look
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0;
    const int end = min(t0 + QUERIES, T), doc_first = doc_start ? doc_start[row0 + min(t, T - 1)] : 0;

    float p[MT][KEYS / 8][4], out_t[MT][WIDTH / 8][4] = {};         // p: scores, then probabilities
    Softmax<MT> softmax;
    softmax.init();
    int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    // walks from tile to tile; v = k + K*D
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;
    load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<ATT_THREADS>(tile.k, k, W, T - s0, D);
    cp_async_commit();
    Tile<ROWS, WIDTH> &warp_q = rows_of<ROWS>(tile.q, warp_row);
    for (; s0 < end; s0 += KEYS) {
        // K and V take turns: one is being computed with while the other lands.
        cp_async_wait<0>();
        __syncthreads();  // K is here, and every warp has left the previous V
        load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
        cp_async_commit();
        k += (size_t)KEYS * W;
        // else above the diagonal or before its documents
        const bool visible = s0 < t + ROWS && t < T && s0 + KEYS > doc_first;
        if (visible) {
            fill(p, 0);
            multiply_rows<WIDTH / 16>(p, warp_q, tile.k);
        }
        cp_async_wait<0>();
        __syncthreads();                                            // V is here, and every warp has left K
        if (s0 + KEYS < end) load_tile<ATT_THREADS>(tile.k, k, W, T - s0 - KEYS, D);
        cp_async_commit();
        if (visible) {
            if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(p, t, s0, doc_start, row0, T);
            softmax.update(p, out_t, log2_scale);
            multiply_probabilities(out_t, p, tile.v);
        }
    }
    softmax.finish(out_t);
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int row = t + i * 8 + lane / 4;
        const float log2_sum = softmax.base[i / 2][i % 2] + log2f(softmax.sum[i / 2][i % 2]);
        if (lane % 4 == 0 && row < T) lse[(size_t)(row0 + row) * H + h] = log2_sum * (float)M_LN2;
    }
    store_rows(out + ((size_t)(row0 + t) * H + h) * D, (size_t)H * D, out_t, 1, warp_q, T - t, D);
}

// ---- kernel 4, shipped for sm_90a: wgmma and TMA ----------------------------------------------------------
template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_forward_kernel4(bf16 *__restrict__ out,
        float *__restrict__ lse, const __grid_constant__ TensorMap qkv, const int *__restrict__ doc_start,
        int T, int H, int K, int D, int together, float log2_scale) {
    typedef WgmmaTiles<WIDTH> Tiles;
    constexpr int QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    const int2 place = attention_place(together);
    const int h = place.x % H, b = place.x / H, t0 = place.y * QUERIES;
    const int row0 = b * T, group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    const int first = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const int n = CEIL_DIV(min(t0 + QUERIES, T) - first, KEYS);             // tiles of keys
    if (threadIdx.x == 0) {
        mbarrier_init(&tile.q_full, 1);
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&tile.k_full[i], 1), mbarrier_init(&tile.k_empty[i], 2 * GROUP_WARPS);
            mbarrier_init(&tile.v_full[i], 1), mbarrier_init(&tile.v_empty[i], 2 * GROUP_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {                                       // the copies; V comes one tile behind K
        registers_give<24>();
        if (threadIdx.x % 128 > 0) return;
        const int head = H + h / (H / K);
        tma_load_tile(tile.q, &tile.q_full, &qkv, h, t0, b);
        for (int i = 0; i <= n; i++) {
            const int j = i - 1;
            if (i < n) {
                mbarrier_wait(&tile.k_empty[i % 2], i / 2 % 2 ^ 1);
                tma_load_tile(tile.k[i % 2], &tile.k_full[i % 2], &qkv, head, first + i * KEYS, b);
            }
            if (j < 0) continue;
            mbarrier_wait(&tile.v_empty[j % 2], j / 2 % 2 ^ 1);
            tma_load_tile(tile.v[j % 2], &tile.v_full[j % 2], &qkv, head + K, first + j * KEYS, b);
        }
        return;
    }
    registers_take<240>();
    const int warp = threadIdx.x / 32, t = t0 + warp * 16;                  // the warp's 16 rows
    const int doc_last = doc_start ? doc_start[row0 + min(t + 16, T) - 1] : 0;
    float score[1][KEYS / 8][4] = {}, out_t[1][WIDTH / 8][4] = {}, shrink[1][1][4];
    uint32_t p[KEYS / 16][4];
    Softmax<1> softmax;
    softmax.init();
    // in place of the scores of the tile at s0; out_t is still being added to, so it shrinks later
    auto probabilities = [&](int s0) {
        if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(score, t, s0, doc_start, row0, T);
        fill(shrink, 1);
        softmax.update(score, shrink, log2_scale);
    };
    mbarrier_wait(&tile.q_full, 0);
    mbarrier_wait(&tile.k_full[0], 0);
    wgmma_fence();
    wgmma_scores(score, tile.q, group * 64, tile.k[0]);
    wgmma_wait<0>(score);
    release(&tile.k_empty[0]);
    probabilities(first);
    pack_left(p, score);
    if (group == 1 && n > 1) barrier_arrive(1, 256);        // group 0 begins
    for (int i = 1; i < n; i++) {
        const int j = i - 1;
        mbarrier_wait(&tile.k_full[i % 2], i / 2 % 2);
        mbarrier_wait(&tile.v_full[j % 2], j / 2 % 2);
        // The groups take turns: one has its products computed while the other is at its softmax.
        barrier_sync(1 + group, 256);
        wgmma_fence();
        wgmma_scores(score, tile.q, group * 64, tile.k[i % 2]);
        wgmma_values(out_t, p, tile.v[j % 2]);
        if (group == 0 || i + 1 < n) barrier_arrive(2 - group, 256);
        wgmma_wait<1>(score);
        release(&tile.k_empty[i % 2]);
        probabilities(first + i * KEYS);                // while the product with V goes on
        wgmma_wait<0>(out_t, p);
        release(&tile.v_empty[j % 2]);
        if (__any_sync(~0u, shrink[0][0][0] != 1 || shrink[0][0][2] != 1)) {
            #pragma unroll
            for (int c = 0; c < WIDTH / 2; c++) out_t[0][c / 4][c % 4] *= shrink[0][0][c % 4];
        }
        pack_left(p, score);
    }
    mbarrier_wait(&tile.v_full[(n - 1) % 2], (n - 1) / 2 % 2);
    wgmma_fence();
    wgmma_values(out_t, p, tile.v[(n - 1) % 2]);
    wgmma_wait<0>(out_t);
    softmax.finish(out_t);
    for (int i = 0; i < 2; i++) {
        const int row = t + i * 8 + lane / 4;
        const float log2_sum = softmax.base[0][i] + log2f(softmax.sum[0][i]);
        if (lane % 4 == 0 && row < T) lse[(size_t)(row0 + row) * H + h] = log2_sum * (float)M_LN2;
    }
    store_rows(out + ((size_t)(row0 + t) * H + h) * D, (size_t)H * D, out_t, 1, tile.out[warp], T - t, D);
}

// ---- fp32, shipped: for proof rather than speed -----------------------------------------------------------
__global__ void attention_forward_f32_kernel1(float *__restrict__ out, float *__restrict__ lse,
        const float *__restrict__ qkv, const int *__restrict__ doc_start, int T, int H, int K, int D,
        float scale) {
    const int h = blockIdx.x % H, t = (gridDim.y - 1 - blockIdx.y) * F32_WARPS + threadIdx.y;
    const int W = (H + 2 * K) * D;
    if (t >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / H) * T, at = (row0 + t) * H + h;
    const float *k = qkv + row0 * W + (H + h / (H / K)) * D, *v = k + K * D;
    float q_t[4], k_s[4], v_s[4], out_t[4] = {}, top = -INFINITY, sum = 0;
    load_row(q_t, qkv + (row0 + t) * W + h * D, D);
    for (int s = doc_start ? doc_start[row0 + t] : 0; s <= t; s++) {
        load_row(k_s, k + (size_t)s * W, D);
        load_row(v_s, v + (size_t)s * W, D);
        const float score = dot(q_t, k_s) * scale, higher = fmaxf(top, score);
        const float shrink = expf(top - higher), p = expf(score - higher);
        top = higher;
        sum = sum * shrink + p;
        for (int j = 0; j < 4; j++) out_t[j] = out_t[j] * shrink + p * v_s[j];
    }
    for (int j = 0; j < 4; j++) out_t[j] /= sum;
    store_row(out + at * D, out_t, D);
    if (threadIdx.x == 0) lse[at] = top + logf(sum);
}

template <typename floatX>
static void shape(int when, int B, int T, int H, int K, int D, int docs, float amplitude) {
    const int N = B * T, W = (H + 2 * K) * D;
    std::vector<int> first(N);
    const double pairs = document_starts(first.data(), docs, N, T);
    if (!bench_shape<floatX>(when, "attention_forward",
                             sizeof(floatX) * ((double)N * W + (double)N * H * D) + 4.0 * N * H,
                             4.0 * pairs * H * D,
                             "B %d T %d H %d K %d D %d%s%s", B, T, H, K, D, document_kinds[docs],
                             amplitude > 1 ? " peaked" : "")) return;
    Tensor<floatX> qkv("qkv", (size_t)N * W), out("out", (size_t)N * H * D);
    Tensor<float> lse("lse", (size_t)N * H);
    Tensor<int> doc("doc_start", N);
    qkv.normal(amplitude);
    std::copy(first.begin(), first.end(), doc.host);
    reference<floatX>([&](int b) {
        twin::attention_forward(out.twin(b), lse.twin(b), qkv.host, docs ? doc.host : NULL, B, T, H, K, D);
    });
    const int *doc_start = docs ? (int *)doc : NULL;
    const float scale = (float)(1 / sqrt((double)D));
    std::function<void()> mma_tiles, wgmma_tiles;
    if constexpr (is_bf16<floatX>()) if (has_wgmma()) wgmma_tiles = [&] {
        attention_forward_wgmma(out, lse, qkv, doc_start, B, T, H, K, D);
    };
    if constexpr (is_bf16<floatX>()) mma_tiles = [&] {
        with_width(D, [&](auto width) {
            constexpr int WIDTH = decltype(width)::value;
            launch(attention_forward_kernel2<WIDTH>, dim3(B * H, CEIL_DIV(T, 128)), ATT_THREADS,
                   sizeof(ForwardTiles<WIDTH>), out, lse, qkv, doc_start, T, H, K, D,
                   (float)(M_LOG2E / sqrt((double)D)));
        });
    };
    const Variant variants[] = {
        {0, "one thread per query, scores computed twice", [&] {
            launch(attention_forward_kernel0<floatX>, CEIL_DIV(N * H, 64), 64, 0, out, lse, qkv, doc_start, N,
                   T, H, K, D, scale);
        }},
        {1, "fp32 tiles in shared memory, running softmax", [&] {
            launch(attention_forward_kernel1<floatX>, dim3(B * H, CEIL_DIV(T, TILE_QUERIES)),
                   TILE_QUERIES * 4, 2 * TILE_KEYS * D * sizeof(float), out, lse, qkv, doc_start, T, H, K, D,
                   scale);
        }},
        {2, "tensor cores, no overlap of copies and products", mma_tiles},
        {3, is_bf16<floatX>() ? "K and V take turns: one lands, one works" : "fp32, a warp per query", [&] {
            if constexpr (is_bf16<floatX>()) attention_forward_mma(out, lse, qkv, doc_start, B, T, H, K, D);
            else attention_forward_f32(out, lse, qkv, doc_start, B, T, H, K, D);
        }, SHIPPED},
        {4, "sm_90a: wgmma and TMA, softmax under products", wgmma_tiles, SHIPPED},
    };
    bench(variants);
}

int main(int argc, char **argv) {
    bench_begin("attention_forward", argc, argv);
    shape<bf16>(CHECK, 1, 1, 1, 1, 8, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 64, 4, 2, 32, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 65, 2, 2, 48, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 191, 2, 1, 104, SOME_DOCS, 3);
    shape<bf16>(CHECK, 1, 130, 2, 1, 128, TILE_DOCS, 1);
    shape<bf16>(CHECK, 2, 40, 2, 1, 80, OWN_DOCS, 1);
    shape<bf16>(CHECK, 1, 128, 2, 2, 64, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 600, 2, 1, 64, NO_DOCS, 3);
    shape<bf16>(CHECK, 1, 777, 2, 1, 128, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 390, 3, 1, 72, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 275, 2, 1, 96, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 385, 1, 1, 128, TILE_DOCS, 3);
    shape<float>(CHECK, 1, 1, 1, 1, 8, NO_DOCS, 1);
    shape<float>(CHECK, 2, 33, 4, 2, 16, NO_DOCS, 1);
    shape<float>(CHECK, 1, 65, 4, 1, 48, SOME_DOCS, 1);
    shape<float>(CHECK, 1, 100, 2, 2, 104, SOME_DOCS, 3);
    shape<bf16>(MODEL, 1, 512, 2, 1, 128, NO_DOCS, 1);
    shape<bf16>(TIME, 8, 2048, 16, 2, 128, NO_DOCS, 1);
    shape<bf16>(TIME, 4, 4095, 8, 8, 64, SOME_DOCS, 1);
    shape<bf16>(TIME, 2, 2048, 16, 4, 104, NO_DOCS, 1);
    shape<float>(TIME, 1, 1024, 8, 2, 128, NO_DOCS, 1);
    return bench_end();
}
