// attention_backward: dqkv (N,(H+2K)D) =, from dout, out (N,H*D), qkv, lse (N,H); delta (N,H) is scratch.
//   With P_ts = exp(scale q_t k_s - lse_t),  delta_t = dout_t . out_t,  dS_ts = P_ts (dout_t v_s - delta_t):
//   dv_s = sum_t P_ts dout_t,  dq_t = scale sum_s dS_ts k_s,  dk_s = scale sum_t dS_ts q_t.  H/K query heads
//   add up in dk and dv
// bytes   2·N·(H+2K)·D in and out + 2·2·N·H·D + 4·N·H;  B 8, T 2048, H 16, K 2, D 128: 304 MB = 91 us
// FLOPs   5 products of 2·D per visible pair (7 where dq and dk dv each rebuild P and dS) = 5·B·H·T^2·D = 344
//         G
// floor   347 us (FLOP-bound). Two kernels do 7/5 of the products: 486 us; mma.sync reaches 0.62 of Hopper's
//         peak: 784 us
// idea    dq sums over keys, dk and dv over queries. In one pass several blocks add to one of them: by
//         atomics in any order, or in turns (4); two passes rebuild P twice. A block for all heads of a group
//         keeps its sums in registers; where that makes too few blocks, 2 and 3 split groups
// limits  D % 8 == 0, D <= 128; 3 and 4 run where the code for sm_90a does
// result  modelled (H100; T 512, H 2, K 1, D 128, bf16, floor 0.47 us): MB in sectors and us: kernel 0 8733
//         and 2607 (all caches missed); 1 6.4 and 22; 2 4.3 and 29. Shared memory limits the last two, in few
//         blocks: 2 has the larger tiles, and the model knows no latency, which they are for. 4 is expected
//         to be 2% slower than 3 at T 4096, 8% faster at 8192 (SPEED.md, dev/speed_model.py --wgmma).
//         Measured: not yet
#include "bench.cuh"

// ---- kernel 0: a thread per query and head for dq and delta, a thread per key and k/v head for dk and dv --
template <typename floatX>
__global__ void attention_backward_dq_kernel0(floatX *dqkv, float *delta, const floatX *dout,
                                              const floatX *qkv, const floatX *out, const float *lse,
                                              const int *doc_start, int N, int T, int H, int K, int D,
                                              float scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / H, h = i % H, t = row % T;
    const int W = (H + 2 * K) * D;
    if (row >= N) return;
    const floatX *q = qkv + (size_t)row * W + h * D, *k = qkv + (size_t)(row - t) * W + (H + h / (H / K)) * D,
        *v = k + K * D;
    const floatX *dout_t = dout + (size_t)i * D;
    float dq[128] = {}, sum = 0;
    for (int d = 0; d < D; d++) sum += to_float(dout_t[d]) * to_float(out[(size_t)i * D + d]);
    delta[i] = sum;
    for (int s = doc_start ? doc_start[row] : 0; s <= t; s++) {
        float score = 0, dp = 0;
        for (int d = 0; d < D; d++) {
            score += to_float(q[d]) * to_float(k[(size_t)s * W + d]);
            dp += to_float(dout_t[d]) * to_float(v[(size_t)s * W + d]);
        }
        const float ds = expf(score * scale - lse[i]) * (dp - sum);
        for (int d = 0; d < D; d++) dq[d] += ds * to_float(k[(size_t)s * W + d]);
    }
    for (int d = 0; d < D; d++) dqkv[(size_t)row * W + h * D + d] = from_float<floatX>(dq[d] * scale);
}

template <typename floatX>
__global__ void attention_backward_dkdv_kernel0(floatX *dqkv, const floatX *dout, const floatX *qkv,
                                                const float *lse, const float *delta, const int *doc_start,
                                                int N, int T, int H, int K, int D, float scale) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / K, kv = i % K, s = row % T;
    const int W = (H + 2 * K) * D;
    if (row >= N) return;
    const size_t at = (size_t)row * W + (H + kv) * D;
    const floatX *k = qkv + at, *v = k + K * D;
    float dk[128] = {}, dv[128] = {};
    for (int h = kv * (H / K); h < (kv + 1) * (H / K); h++)
        for (int t = s; t < T; t++) {
            const size_t row_t = (size_t)(row - s + t);
            const floatX *q = qkv + row_t * W + h * D, *dout_t = dout + (row_t * H + h) * D;
            if (doc_start && doc_start[row_t] > s) break;  // later queries look no further back
            float score = 0, dp = 0;
            for (int d = 0; d < D; d++)
                score += to_float(q[d]) * to_float(k[d]), dp += to_float(dout_t[d]) * to_float(v[d]);
            const float p = expf(score * scale - lse[row_t * H + h]), ds = p * (dp - delta[row_t * H + h]);
            for (int d = 0; d < D; d++) dk[d] += ds * to_float(q[d]), dv[d] += p * to_float(dout_t[d]);
        }
    for (int d = 0; d < D; d++)
        dqkv[at + d] = from_float<floatX>(dk[d] * scale), dqkv[at + K * D + d] = from_float<floatX>(dv[d]);
}

// ---- kernel 1: tensor cores, the tiles and products of the shipped kernels, but every copy is waited for,
// and delta has its own kernel that reads dout and out once more
template <typename floatX>
// a warp per row
__global__ void attention_delta_kernel1(float *delta, const floatX *dout, const floatX *out, int rows,
                                        int D) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    float sum = 0;
    for (int d = threadIdx.x; d < D; d += 32)
        sum += to_float(dout[(size_t)row * D + d]) * to_float(out[(size_t)row * D + d]);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) delta[row] = sum;
}

template <int WIDTH> struct OneBufferTiles {
    Tile<128, WIDTH> q, dout;
    Tile<32, WIDTH> k, v;
};

template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS, 2) attention_backward_dq_kernel1(bf16 *__restrict__ dqkv,
        const float *__restrict__ delta, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv,
        const float *__restrict__ lse, const int *__restrict__ doc_start, int T, int H, int K, int D,
        float scale) {
    constexpr int MT = 2, NT = 4, ROWS = 16 * MT, QUERIES = ROWS * ATT_WARPS, KEYS = 8 * NT;
    OneBufferTiles<WIDTH> &tile = *shared_memory<OneBufferTiles<WIDTH>>();
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int row0 = blockIdx.x / H * T, end = min(t0 + QUERIES, T);
    const float log2_scale = scale * (float)M_LOG2E;
    load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<ATT_THREADS>(tile.dout, dout + ((size_t)(row0 + t0) * H + h) * D, (size_t)H * D, T - t0, D);
    Tile<ROWS, WIDTH> &warp_q = rows_of<ROWS>(tile.q, warp_row);
    Tile<ROWS, WIDTH> &warp_dout = rows_of<ROWS>(tile.dout, warp_row);
    float row_lse[MT][2], row_delta[MT][2], score[MT][NT][4], ds[MT][NT][4], dq[MT][WIDTH / 8][4];
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int row = t + i * 8 + lane / 4;
        // past the end p = 0
        row_lse[i / 2][i % 2] = row < T ? lse[(size_t)(row0 + row) * H + h] * (float)M_LOG2E : INFINITY;
        row_delta[i / 2][i % 2] = row < T ? delta[(size_t)(row0 + row) * H + h] : 0;
    }
    fill(dq, 0);
    for (int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0; s0 < end; s0 += KEYS) {
        const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;
        __syncthreads();                                    // every warp has left the previous K and V
        load_tile<ATT_THREADS>(tile.k, k, W, T - s0, D);
        load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (s0 >= t + ROWS || t >= T) continue;
        fill(score, 0);
        multiply_rows<2>(score, warp_q, tile.k);
        mask_scores<false>(score, t, s0, doc_start, row0, T);
        #pragma unroll
        for (int i = 0; i < MT * NT * 4; i++)
            ds[i / 4 / NT][i / 4 % NT][i % 4] = -row_delta[i / 4 / NT][i % 4 / 2];
        multiply_rows<2>(ds, warp_dout, tile.v);
        #pragma unroll
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < 4; i++)
                    ds[m][n][i] *= exp2_approx(score[m][n][i] * log2_scale - row_lse[m][i / 2]);
        multiply_probabilities(dq, ds, tile.k);
    }
    store_rows(dqkv + (size_t)(row0 + t) * W + h * D, W, dq, scale, warp_q, T - t, D);
}

template <int WIDTH> struct OneWarpTiles {
    Tile<64, WIDTH> k, v;
    Tile<32, WIDTH> q, dout;
};

template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS, 2) attention_backward_dkdv_kernel1(bf16 *__restrict__ dqkv,
        const float *__restrict__ delta, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv,
        const float *__restrict__ lse, const int *__restrict__ doc_start, int T, int H, int K, int D,
        float scale) {
    constexpr int MT = 1, NT = 4, ROWS = 16 * MT, KEYS = ROWS * ATT_WARPS, QUERIES = 8 * NT;
    OneWarpTiles<WIDTH> &tile = *shared_memory<OneWarpTiles<WIDTH>>();
    const int kv = blockIdx.x % K, s0 = blockIdx.y * KEYS, W = (H + 2 * K) * D, lane = threadIdx.x % 32;
    const int row0 = blockIdx.x / K * T, warp_row = threadIdx.x / 32 * ROWS, key = s0 + warp_row;
    const float log2_scale = scale * (float)M_LOG2E;
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + kv) * D;
    load_tile<ATT_THREADS>(tile.k, k, W, T - s0, D);
    load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
    Tile<ROWS, WIDTH> &warp_k = rows_of<ROWS>(tile.k, warp_row), &warp_v = rows_of<ROWS>(tile.v, warp_row);
    float dk[MT][WIDTH / 8][4], dv[MT][WIDTH / 8][4], p[MT][NT][4], ds[MT][NT][4];
    fill(dk, 0);
    fill(dv, 0);
    for (int h = kv * (H / K); h < (kv + 1) * (H / K); h++)
        for (int t0 = s0 / QUERIES * QUERIES; t0 < T; t0 += QUERIES) {
            if (doc_start && doc_start[row0 + t0] >= s0 + KEYS) break;      // the same for the whole block
            __syncthreads();
            load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
            load_tile<ATT_THREADS>(tile.dout, dout + ((size_t)(row0 + t0) * H + h) * D, (size_t)H * D, T - t0,
                                   D);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            if (t0 + QUERIES <= key || key >= T) continue;
            fill(p, 0);
            multiply_rows<2>(p, warp_k, tile.q);
            mask_scores<true>(p, t0, key, doc_start, row0, T);
            #pragma unroll
            for (int j = 0; j < NT * 4; j++) {
                const int t = t0 + j / 4 * 8 + lane % 4 * 2 + j % 2;
                const size_t at = (size_t)(row0 + min(t, T - 1)) * H + h;
                const float score = p[0][j / 4][j % 4];
                p[0][j / 4][j % 4] = t < T ? exp2_approx(score * log2_scale - lse[at] * (float)M_LOG2E) : 0;
                ds[0][j / 4][j % 4] = -delta[at];
            }
            multiply_rows<2>(ds, warp_v, tile.dout);
            multiply_probabilities(dv, p, tile.dout);
            #pragma unroll
            for (int j = 0; j < NT * 4; j++) ds[0][j / 4][j % 4] *= p[0][j / 4][j % 4];
            multiply_probabilities(dk, ds, tile.q);
        }
    bf16 *dk_out = dqkv + (size_t)(row0 + key) * W + (H + kv) * D;
    __syncthreads();
    store_rows(dk_out, W, dk, scale, warp_k, T - key, D);
    store_rows(dk_out + K * D, W, dv, 1, warp_v, T - key, D);
}

// ---- kernel 2, shipped: copies land while products run, two buffers for what is needed longest; dq runs
// first, sums delta from the dout it holds anyway and leaves it for dk dv. There a pair of warps shares its
// keys: one owns dv, one dk ----
template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS, 2) attention_backward_dq_kernel2(bf16 *__restrict__ dqkv,
        float *__restrict__ delta, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv,
        const bf16 *__restrict__ out, const float *__restrict__ lse, const int *__restrict__ doc_start,
        int T, int H, int K, int D, float scale) {
    typedef DqTiles<WIDTH> Tiles;
    constexpr int MT = Tiles::MT, NT = Tiles::NT, ROWS = Tiles::ROWS, QUERIES = Tiles::QUERIES;
    constexpr int KEYS = Tiles::KEYS;
    Tiles &tile = *shared_memory<Tiles>();
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int row0 = blockIdx.x / H * T, end = min(t0 + QUERIES, T);
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0;
    const float log2_scale = scale * (float)M_LOG2E;

    int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;      // walks; v = k + K*D
    load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<ATT_THREADS>(tile.dout, dout + ((size_t)(row0 + t0) * H + h) * D, (size_t)H * D, T - t0, D);
    load_tile<ATT_THREADS>(tile.k[0], k, W, T - s0, D);
    load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
    cp_async_commit();
    Tile<ROWS, WIDTH> &warp_q = rows_of<ROWS>(tile.q, warp_row);
    Tile<ROWS, WIDTH> &warp_dout = rows_of<ROWS>(tile.dout, warp_row);
    float row_lse[MT][2], row_delta[MT][2], score[MT][NT][4], ds[MT][NT][4], dq[MT][WIDTH / 8][4] = {};
    cp_async_wait<0>();
    __syncthreads();                                                // dO is here
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {                              // the four lanes of a row share out its D
        const int row = t + i * 8 + lane / 4;
        const size_t at = (size_t)(row0 + row) * H + h;
        float sum = 0;
        for (int d = lane % 4 * 8; row < T && d < D; d += 32) {
            float dout_d[8], out_d[8];
            widen(dout_d, load<8>(warp_dout.at(i * 8 + lane / 4, d)));
            widen(out_d, load<8>(out + at * D + d));
            for (int j = 0; j < 8; j++) sum += dout_d[j] * out_d[j];
        }
        sum = warp_sum(sum, 4);
        row_delta[i / 2][i % 2] = sum;
        row_lse[i / 2][i % 2] = row < T ? lse[at] * (float)M_LOG2E : INFINITY;  // past the end p = 0
        if (lane % 4 == 0 && row < T) delta[at] = sum;
    }
    for (int buffer = 0; s0 < end; s0 += KEYS, buffer ^= 1) {
        const int next = s0 + KEYS;
        k += (size_t)KEYS * W;
        cp_async_wait<0>();
        __syncthreads();  // K, V are here; every warp has left the other K
        if (next < end) load_tile<ATT_THREADS>(tile.k[buffer ^ 1], k, W, T - next, D);
        cp_async_commit();
        const bool visible = s0 < t + ROWS && t < T && (!doc_start || s0 + KEYS > doc_start[row0 + t]);
        if (visible) {
            fill(score, 0);
            multiply_rows<2>(score, warp_q, tile.k[buffer]);
            #pragma unroll
            for (int i = 0; i < MT * NT * 4; i++)
                ds[i / 4 / NT][i / 4 % NT][i % 4] = -row_delta[i / 4 / NT][i % 4 / 2];
            multiply_rows<2>(ds, warp_dout, tile.v);
        }
        __syncthreads();                                            // every warp has left V
        if (next < end) load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - next, D);
        cp_async_commit();
        if (visible) {
            if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(score, t, s0, doc_start, row0, T);
            #pragma unroll
            for (int m = 0; m < MT; m++)
                for (int n = 0; n < NT; n++)
                    for (int i = 0; i < 4; i++)
                        ds[m][n][i] *= exp2_approx(score[m][n][i] * log2_scale - row_lse[m][i / 2]);
            multiply_probabilities(dq, ds, tile.k[buffer]);
        }
    }
    store_rows(dqkv + (size_t)(row0 + t) * W + h * D, W, dq, scale, warp_q, T - t, D);
}

template <int WIDTH, int PAIRS>
__global__ void __launch_bounds__(64 * PAIRS, 4 / PAIRS) attention_backward_dkdv_kernel2(
        bf16 *__restrict__ dqkv, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv,
        const float *__restrict__ lse, const float *__restrict__ delta, const int *__restrict__ doc_start,
        float *__restrict__ sums, int parts, int T, int H, int K, int D, float scale) {
    typedef DkdvTiles<WIDTH, PAIRS> Tiles;
    constexpr int MT = Tiles::MT, NT = Tiles::NT, ROWS = Tiles::ROWS, KEYS = Tiles::KEYS;
    constexpr int QUERIES = Tiles::QUERIES, THREADS = Tiles::THREADS;
    Tiles &tile = *shared_memory<Tiles>();
    const int part = blockIdx.x % parts, kv = blockIdx.x / parts % K, b = blockIdx.x / parts / K;
    const int s0 = blockIdx.y * KEYS;                               // early keys have most queries
    const int W = (H + 2 * K) * D, lane = threadIdx.x % 32;
    // tells the compiler it is uniform: fewer registers
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int pair = warp % PAIRS, owns_dk = warp / PAIRS;          // with 4 pairs a pair is on one scheduler
    const int pair_row = pair * ROWS, key = s0 + pair_row, row0 = b * T;
    const float log2_scale = scale * (float)M_LOG2E;
    float4 *exchange = &tile.exchange[pair][0][lane];
    Tile<ROWS, WIDTH> &left = rows_of<ROWS>(owns_dk ? tile.v : tile.k, pair_row);   // only this warp's

    // Queries that see this tile: from the diagonal on. Then the next head.
    const int t_first = s0 / QUERIES * QUERIES;
    const int t_end = queries_end<THREADS, QUERIES>(t_first, s0 + KEYS, doc_start, row0, T);
    auto load_queries = [&](int h, int t, int buffer) {
        load_tile<THREADS>(tile.q[buffer], qkv + (size_t)(row0 + t) * W + h * D, W, T - t, D);
        const bf16 *dout_t = dout + ((size_t)(row0 + t) * H + h) * D;
        load_tile<THREADS>(tile.dout[buffer], dout_t, (size_t)H * D, T - t, D);
        if (threadIdx.x >= 2 * QUERIES) return;
        // past the end all is 0, and then dv += 1 * 0, dS = 1 * (0 - 0)
        const int row = t + (int)threadIdx.x % QUERIES;
        const float *stat = threadIdx.x < QUERIES ? lse : delta;
        cp_async_4(&tile.stats[buffer][threadIdx.x], row < T ? stat + (size_t)(row0 + row) * H + h : stat,
                   row < T ? 4 : 0);
    };

    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + kv) * D;
    load_tile<THREADS>(tile.k, k, W, T - s0, D);
    load_tile<THREADS>(tile.v, k + K * D, W, T - s0, D);
    int h = (kv * parts + part) * (H / K / parts), t = t_first;
    const int h_end = h + H / K / parts;
    load_queries(h, t, 0);
    cp_async_commit();

    float sum[MT][WIDTH / 8][4] = {}, p[MT][NT][4];  // sum: dV or dK. p: scores, then P; or dP, then dS
    for (int buffer = 0; h < h_end; buffer ^= 1) {
        const float *lse_tile = tile.stats[buffer], *delta_tile = lse_tile + QUERIES;
        cp_async_wait<0>();
        __syncthreads();  // this tile is here, every warp has left the last one
        Tile<QUERIES, WIDTH> &q_tile = tile.q[buffer], &dout_tile = tile.dout[buffer];
        const int t0 = t;
        t += QUERIES;
        if (t >= t_end) t = t_first, h++;
        if (h < h_end) load_queries(h, t, buffer ^ 1);
        cp_async_commit();
        if (t0 + QUERIES <= key || key >= T || (doc_start && doc_start[row0 + t0] >= key + ROWS))
            continue;                                               // nothing to see
        #pragma unroll
        for (int n = 0; n < NT; n++) {                              // dP starts from -delta
            const float2 two = *(const float2 *)(delta_tile + n * 8 + lane % 4 * 2);
            for (int m = 0; m < MT; m++)
                for (int j = 0; j < 4; j++) p[m][n][j] = !owns_dk ? 0 : j % 2 ? -two.y : -two.x;
        }
        multiply_rows<1>(p, left, owns_dk ? dout_tile : q_tile);
        if (!owns_dk) {
            if (t0 < key + ROWS - 1 || (doc_start && doc_start[row0 + min(t0 + QUERIES, T) - 1] > key))
                mask_scores<true>(p, t0, key, doc_start, row0, T);
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                const float2 two = *(const float2 *)(lse_tile + n * 8 + lane % 4 * 2);
                const float even = two.x * (float)M_LOG2E, odd = two.y * (float)M_LOG2E;
                for (int m = 0; m < MT; m++)
                    for (int j = 0; j < 4; j++)
                        p[m][n][j] = exp2_approx(p[m][n][j] * log2_scale - (j % 2 ? odd : even));
            }
            #pragma unroll
            for (int i = 0; i < MT * NT; i++)
                store((float *)(exchange + i * 32), narrow<float>(p[i / NT][i % NT]));
            barrier_arrive(1 + pair, 64);
        } else {
            barrier_sync(1 + pair, 64);                             // P is here
            #pragma unroll
            for (int i = 0; i < MT * NT; i++) {
                float other[4];
                widen(other, load<4>((const float *)(exchange + i * 32)));
                for (int j = 0; j < 4; j++) p[i / NT][i % NT][j] *= other[j];
            }
        }
        multiply_probabilities(sum, p, owns_dk ? q_tile : dout_tile);
    }
    const int out_head = kv + (owns_dk ? 0 : K);
    const size_t row = row0 + key;
    if (parts > 1)
        store_sums(sums + ((row * parts + part) * 2 * K + out_head) * D, (size_t)parts * 2 * K * D, sum,
                   owns_dk ? scale : 1, T - key, D);
    else store_rows(dqkv + row * W + (H + out_head) * D, W, sum, owns_dk ? scale : 1, left, T - key, D);
}

// ---- kernel 3, shipped for sm_90a: wgmma and TMA ----------------------------------------------------------
template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_backward_dq_kernel3(bf16 *__restrict__ dqkv,
        float *__restrict__ delta, const __grid_constant__ TensorMap qkv_map,
        const __grid_constant__ TensorMap dout_map, const bf16 *__restrict__ dout,
        const bf16 *__restrict__ out, const float *__restrict__ lse, const int *__restrict__ doc_start,
        int T, int H, int K, int D, int together, float scale) {
    typedef WgmmaDqTiles<WIDTH> Tiles;
    constexpr int QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    const int2 place = attention_place(together);
    const int h = place.x % H, b = place.x / H, t0 = place.y * QUERIES;
    const int row0 = b * T, group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    const int first = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const int n = CEIL_DIV(min(t0 + QUERIES, T) - first, KEYS);             // tiles of keys
    if (threadIdx.x == 0) {
        mbarrier_init(&tile.rows_full, 2);
        for (int i = 0; i < 2; i++)
            mbarrier_init(&tile.full[i], 2), mbarrier_init(&tile.empty[i], 2 * GROUP_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {                                                       // the copies
        registers_give<24>();
        if (threadIdx.x % 128 > 0) return;
        const int head = H + h / (H / K);
        tma_load_tile(tile.q, &tile.rows_full, &qkv_map, h, t0, b);
        tma_load_tile(tile.dout, &tile.rows_full, &dout_map, h, t0, b);
        for (int i = 0; i < n; i++) {
            mbarrier_wait(&tile.empty[i % 2], i / 2 % 2 ^ 1);
            tma_load_tile(tile.k[i % 2], &tile.full[i % 2], &qkv_map, head, first + i * KEYS, b);
            tma_load_tile(tile.v[i % 2], &tile.full[i % 2], &qkv_map, head + K, first + i * KEYS, b);
        }
        return;
    }
    registers_take<240>();
    const int warp = threadIdx.x / 32, t = t0 + warp * 16;                  // the warp's 16 rows
    const int doc_last = doc_start ? doc_start[row0 + min(t + 16, T) - 1] : 0;
    const float log2_scale = scale * (float)M_LOG2E;
    float row_lse[2], row_delta[2], p[1][KEYS / 8][4] = {}, ds[1][KEYS / 8][4] = {};
    float dq[1][WIDTH / 8][4] = {};
    uint32_t left[KEYS / 16][4];
    for (int i = 0; i < 2; i++) {                           // the four lanes of a row share out its D
        const int row = t + i * 8 + lane / 4;
        const size_t at = (size_t)(row0 + row) * H + h;
        float sum = 0;
        for (int d = lane % 4 * 8; row < T && d < D; d += 32) {
            float dout_d[8], out_d[8];
            widen(dout_d, load<8>(dout + at * D + d));
            widen(out_d, load<8>(out + at * D + d));
            for (int j = 0; j < 8; j++) sum += dout_d[j] * out_d[j];
        }
        row_delta[i] = warp_sum(sum, 4);
        row_lse[i] = row < T ? lse[at] * (float)M_LOG2E : INFINITY;         // past the end p = 0
        if (lane % 4 == 0 && row < T) delta[at] = row_delta[i];
    }
    mbarrier_wait(&tile.rows_full, 0);
    for (int i = 0; i < n; i++) {
        const int s0 = first + i * KEYS;
        mbarrier_wait(&tile.full[i % 2], i / 2 % 2);
        wgmma_fence();
        wgmma_scores(p, tile.q, group * 64, tile.k[i % 2]);
        wgmma_scores(ds, tile.dout, group * 64, tile.v[i % 2]);
        wgmma_wait<1>(p);
        uint32_t t_here = t;
        forget_origin(t_here);                      // or what masking makes of t would stay in registers
        if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(p, t_here, s0, doc_start, row0, T);
        #pragma unroll
        for (int j = 0; j < KEYS / 2; j++)
            p[0][j / 4][j % 4] = exp2_approx(p[0][j / 4][j % 4] * log2_scale - row_lse[j % 4 / 2]);
        wgmma_wait<0>(ds);
        #pragma unroll
        for (int j = 0; j < KEYS / 2; j++)
            ds[0][j / 4][j % 4] = p[0][j / 4][j % 4] * (ds[0][j / 4][j % 4] - row_delta[j % 4 / 2]);
        pack_left(left, ds);
        wgmma_fence();
        wgmma_values(dq, left, tile.k[i % 2]);
        wgmma_wait<0>(dq, left);
        release(&tile.empty[i % 2]);
    }
    const int W = (H + 2 * K) * D;
    store_rows(dqkv + (size_t)(row0 + t) * W + h * D, W, dq, scale, tile.dq[warp], T - t, D);
}

template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_backward_dkdv_kernel3(bf16 *__restrict__ dqkv,
        const __grid_constant__ TensorMap qkv_map, const __grid_constant__ TensorMap dout_map,
        const float *__restrict__ lse, const float *__restrict__ delta, const int *__restrict__ doc_start,
        float *__restrict__ sums, int parts, int T, int H, int K, int D, float scale) {
    typedef WgmmaDkdvTiles<WIDTH> Tiles;
    constexpr int KEYS = Tiles::KEYS, QUERIES = Tiles::QUERIES, STAGES = Tiles::STAGES;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    const int part = blockIdx.x % parts, kv = blockIdx.x / parts % K, b = blockIdx.x / parts / K;
    const int group = uniform(threadIdx.x / 128), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = b * T, s0 = blockIdx.y * 2 * KEYS;                             // most queries first
    const int h_first = (kv * parts + part) * (H / K / parts), h_end = h_first + H / K / parts;
    if (threadIdx.x == 0) {
        mbarrier_init(&tile.keys_full, 4);
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(&tile.full[i], 2 + QUERIES), mbarrier_init(&tile.empty[i], 2 * GROUP_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    const int t_end = queries_end<WGMMA_THREADS, QUERIES>(s0, s0 + 2 * KEYS, doc_start, row0, T);
    if (group == 2) {
        registers_give<24>();
        // its first thread copies; its last ones, each for a query, bring lse and delta
        const int j = (int)threadIdx.x - (WGMMA_THREADS - QUERIES);
        if (j < 0 && threadIdx.x % 128 > 0) return;
        for (int i = 0; j < 0 && i < 2; i++) {
            tma_load_tile(tile.k[i], &tile.keys_full, &qkv_map, H + kv, s0 + i * KEYS, b);
            tma_load_tile(tile.v[i], &tile.keys_full, &qkv_map, H + K + kv, s0 + i * KEYS, b);
        }
        for (int h = h_first, i = 0; h < h_end; h++)
            for (int t = s0; t < t_end; t += QUERIES, i++) {
                const int stage = i % STAGES;
                mbarrier_wait(&tile.empty[stage], i / STAGES % 2 ^ 1);
                if (j < 0) {
                    tma_load_tile(tile.q[stage], &tile.full[stage], &qkv_map, h, t, b);
                    tma_load_tile(tile.dout[stage], &tile.full[stage], &dout_map, h, t, b);
                } else {                                    // past the end all is 0: dv += 1 * 0, dS = 1 * 0
                    const unsigned at = (unsigned)(row0 + t + j) * H + h;   // 24 registers must do
                    tile.lse[stage][j] = t + j < T ? lse[at] * (float)M_LOG2E : 0;
                    tile.delta[stage][j] = t + j < T ? delta[at] : 0;
                    mbarrier_arrive(&tile.full[stage]);
                }
            }
        return;
    }
    registers_take<240>();
    const int group_key = s0 + group * KEYS, key = s0 + warp * 16;          // 64 rows; of them the warp's 16
    const float log2_scale = scale * (float)M_LOG2E;
    float dk[1][WIDTH / 8][4] = {}, dv[1][WIDTH / 8][4] = {};
    float p[1][QUERIES / 8][4] = {}, ds[1][QUERIES / 8][4] = {};
    uint32_t p_left[QUERIES / 16][4], ds_left[QUERIES / 16][4];
    mbarrier_wait(&tile.keys_full, 0);
    for (int h = h_first, i = 0; h < h_end; h++)
        for (int t = s0; t < t_end; t += QUERIES, i++) {
            const int stage = uniform(i % STAGES), t_last = min(t + QUERIES, T) - 1;
            mbarrier_wait(&tile.full[stage], i / STAGES % 2);
            // else hidden
            if (t_last >= group_key && (!doc_start || doc_start[row0 + t] < group_key + KEYS)) {
                wgmma_fence();
                wgmma_scores(p, tile.k[group], 0, tile.q[stage]);
                wgmma_scores(ds, tile.v[group], 0, tile.dout[stage]);
                wgmma_wait<1>(p);
                if (t < key + 15 || (doc_start && doc_start[row0 + t_last] > key))
                    mask_scores<true>(p, t, key, doc_start, row0, T);
                #pragma unroll
                for (int j = 0; j < QUERIES / 2; j++)
                    p[0][j / 4][j % 4] = exp2_approx(p[0][j / 4][j % 4] * log2_scale -
                                                     tile.lse[stage][j / 4 * 8 + lane % 4 * 2 + j % 2]);
                pack_left(p_left, p);
                wgmma_fence();
                wgmma_values(dv, p_left, tile.dout[stage]);
                wgmma_wait<1>(ds);
                #pragma unroll
                for (int j = 0; j < QUERIES / 2; j++)
                    ds[0][j / 4][j % 4] = p[0][j / 4][j % 4] * (ds[0][j / 4][j % 4] -
                                          tile.delta[stage][j / 4 * 8 + lane % 4 * 2 + j % 2]);
                pack_left(ds_left, ds);
                wgmma_fence();
                wgmma_values(dk, ds_left, tile.q[stage]);
                wgmma_wait<0>(dv, p_left);
                wgmma_wait<0>(dk, ds_left);
            }
            release(&tile.empty[stage]);
        }
    const size_t row = row0 + key;
    if (parts > 1) {
        float *out = sums + ((row * parts + part) * 2 * K + kv) * D;
        store_sums(out, (size_t)parts * 2 * K * D, dk, scale, T - key, D);
        store_sums(out + K * D, (size_t)parts * 2 * K * D, dv, 1, T - key, D);
        return;
    }
    const int W = (H + 2 * K) * D;
    bf16 *out = dqkv + row * W + (H + kv) * D;
    store_rows(out, W, dk, scale, tile.out[warp], T - key, D);
    store_rows(out + K * D, W, dv, 1, tile.out[warp], T - key, D);
}

// ---- of 2 and 3, shipped: the sums of the parts of a group are added up -----------------------------------
__global__ void attention_backward_add_kernel1(bf16 *__restrict__ dqkv, const float *__restrict__ sums,
                                               int parts, int N, int H, int K, int D) {
    const int columns = 2 * K * D, i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    const int row = i / columns, column = i % columns;
    if (row >= N) return;
    float sum[4] = {};
    for (int part = 0; part < parts; part++)
        accumulate(sum, sums + ((size_t)row * parts + part) * columns + column);
    store(dqkv + (size_t)row * (H + 2 * K) * D + H * D + column, narrow<bf16>(sum));
}

// ---- kernel 4: sm_90a; one pass: P and dS are computed once, dq is added up over blocks, in turns ---------
// Verbs that the trainer has no use for, with the text of its own (section 3); dev/emu has them too.
#ifdef __CUDACC__
// What ordinary accesses did, of this thread or seen by it, comes before what the asynchronous proxy does
// from here on: wgmma's operands, bulk copies (PTX ISA, "Async proxy" and membar/fence, fence.proxy.async).
__device__ __forceinline__ void async_proxy_fence() { SM90A("fence.proxy.async;" ::: "memory"); }
// Stores 4 matrices of 8x8 bf16 to shared memory: ldmatrix_x4 backwards.
__device__ __forceinline__ void stmatrix_x4(void *row, const uint32_t (&r)[4]) {
    SM90A("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
          :: "r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// Bulk copies: multiples of 16 bytes that lie in one piece. To shared memory they count on an mbarrier as TMA
// does; to global memory they belong to groups of the thread. bulk_wait_read<n>: of all but the last n groups
// the source has been read; bulk_wait<n>: and the results are visible, to ordinary accesses too.
__device__ __forceinline__ void bulk_load(void *dst, const void *src, int bytes, uint64_t *barrier) {
    SM90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
          :: "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(bytes),
          "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_store(void *dst, const void *src, int bytes) {
    SM90A("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
          :: "l"(__cvta_generic_to_global(dst)), "r"(shared_address(src)), "r"(bytes) : "memory");
}
// of fp32
__device__ __forceinline__ void bulk_add(float *dst, const void *src, int bytes) {
    SM90A("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
          :: "l"(__cvta_generic_to_global(dst)), "r"(shared_address(src)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { SM90A("cp.async.bulk.commit_group;" ::: "memory"); }
template <int n> __device__ __forceinline__ void bulk_wait_read() {
    SM90A("cp.async.bulk.wait_group.read %0;" :: "n"(n) : "memory");
}
template <int n> __device__ __forceinline__ void bulk_wait() {
    SM90A("cp.async.bulk.wait_group %0;" :: "n"(n) : "memory");
}
// Turns of blocks, counted in global memory. Who waits sees what was visible to who passed the turn on.
__device__ __forceinline__ void turn_wait(const int *counter, int turn) {
    int now;
    do SM90A("ld.acquire.gpu.global.b32 %0, [%1];"
             : "=r"(now) : "l"(__cvta_generic_to_global(counter)) : "memory"); while (now != turn);
}
__device__ __forceinline__ void turn_pass(int *counter, int turn) {
    SM90A("st.release.gpu.global.b32 [%0], %1;"
          :: "l"(__cvta_generic_to_global(counter)), "r"(turn) : "memory");
}
// sum (64,64) = a^T (64,16) b (16,64), or +=; a and b in shared memory, a row for each k
__device__ __forceinline__ void wgmma_transposed(float (&sum)[1][8][4], uint64_t a, uint64_t b, int add) {
    SM90A("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32
          "}, %32, %33, add, 1, 1, 1, 1;\n}"
          : SUMS_32(sum[0], 0) : "l"(a), "l"(b), "r"(add));
}
#endif

// In memory, for B sequences. `blocks` of 128 keys cover T, so do `tiles` of queries; zeros stand for queries
// past T: their P is then 1, their dout 0. What is summed by several blocks has the fragments of wgmma: a
// chunk (64,WIDTH) is float4 (WIDTH/8,128).
struct OnePassScratch {
    float4 *dq;                                             // (B,H,2 blocks), chunks
    float4 *dkdv;                                           // (B,K,blocks,2,2), chunks; if H > K
    float *stats;                                           // (B,H,tiles,2,QUERIES): lse * log2(e), delta
    int *ticket, *dq_turns, *kv_turns;                      // (1), (B,H,tiles), (B,K,blocks): 0
};

// ---- attention_backward_prepare_kernel1: delta once, lse in powers of two, in the order of the tiles ------
// bytes   4·N·H·D in: 134 MB = 40 us for N 16384, H 16, D 128
// idea    16 lanes for a query of a head, 16 bytes each. Not in the pass, where each block of keys would sum
//         anew
template <int QUERIES>
__global__ void attention_backward_prepare_kernel1(OnePassScratch scratch, const bf16 *dout, const bf16 *out,
                                                   const float *lse, int T, int H, int D, int tiles,
                                                   int n_turns) {
    const int i = blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;        // (b, t, h), t in whole tiles
    const int h = i % H, t = i / H % (tiles * QUERIES), b = i / H / (tiles * QUERIES);
    const int d = threadIdx.x % 16 * 8, tile = (b * H + h) * tiles + t / QUERIES;
    const size_t at = ((size_t)b * T + t) * H + h;
    float dout_d[8], out_d[8], sum = 0;
    widen(dout_d, load_if<8>(t < T && d < D, dout + at * D + d));
    widen(out_d, load_if<8>(t < T && d < D, out + at * D + d));
    for (int j = 0; j < 8; j++) sum += dout_d[j] * out_d[j];
    sum = warp_sum(sum, 16);
    if (d > 0) return;
    float *stats = scratch.stats + (size_t)tile * 2 * QUERIES + t % QUERIES;
    stats[0] = t < T ? lse[at] * (float)M_LOG2E : 0;
    stats[QUERIES] = sum;
    if (i < n_turns) scratch.ticket[i] = 0;                                 // and the turns behind it
}

// ---- attention_backward_onepass_kernel1: a block has 128 keys of a query head, walks over their queries ---
// dq =, and dk, dv = over the heads of a group (fp32, in scratch); dk, dv (in dqkv) = if H == K
// bytes   as kernel 3's dk dv, and 4·N·H·D for each turn of dq, through L2
// FLOPs   5·N·(T+1)·H·D (five products) = 344 G for N 16384, T 2048, H 16, D 128         floor 347 us
// idea    dS^T goes to shared memory besides, the left operand of dq = dS K, of which each warpgroup has half
//         the columns (D 64: half the queries) over all 128 keys. That product starts a stage later, beside
//         the next scores: the warpgroups wait for each other's dS only then, and one computes while the
//         other is at its exponentials. Sums leave by a bulk copy that adds; a thread of the third warpgroup
//         sees to it and waits for its turn, nobody else. The turns are in a fixed order: all runs have the
//         same bits
// order   Who waits, waits for a block that runs: blocks take their numbers when they start, for nothing says
//         in which order a grid starts, and turns follow the numbers. Right-most keys first, their walk is
//         the shortest: a block comes to a tile two tiles after the one on its right. As many heads at once
//         as fill the SMs, so that sums stay in L2 from turn to turn. A block for all heads of a group, like
//         kernel 3's, needs no sums of dk dv, but its turns are so far apart that dq goes to memory and back
// limits  as kernel 3; 231,424 bytes of shared memory at D 128. Scratch: 4·WIDTH + 9 bytes per query and
//         head; if H > K 8·WIDTH more per key and head of keys
template <int WIDTH> struct __align__(1024) WgmmaOnePassTiles {     // of a block, in shared memory
    // keys of a warpgroup; tiles of 64 queries in a stage, all of its queries; stages
    static constexpr int KEYS = 64, SUBS = WIDTH == 64 ? 2 : 1, QUERIES = 64 * SUBS;
    static constexpr int STAGES = WIDTH == 64 ? 2 : 3;
    SwizzledTile<KEYS, WIDTH> k[2], v[2];
    union {
        struct {
            SwizzledTile<64, WIDTH> q[STAGES][SUBS], dout[STAGES][SUBS];
            SwizzledTile<2 * KEYS, 64> ds[2][SUBS];                 // dS^T of this stage and of the last one
        };
        float4 dkdv[2][2][WIDTH / 8][128];                          // at the end: dk, dv of each warpgroup
        Tile<16, WIDTH> rows[8];                                    // or these
    };
    float4 dq[2][8][128];                                           // of each warpgroup (64,64)
    float stats[STAGES][2][QUERIES];                                // lse, delta
    uint64_t keys_full, full[STAGES], empty[STAGES], ds_full[2], dq_full, dq_empty, dkdv_full;  // mbarriers
    int ticket;
};

// One thread adds what is in shared memory to a sum in memory, in its turn; `read`: shared memory is free.
__device__ __forceinline__ void add_in_turn(float4 *sum, const float4 *mine, int bytes, int *counter,
                                            int turn, uint64_t *read) {
    turn_wait(counter, turn);
    async_proxy_fence();                    // what is visible here, the sum of those before, is to the copy
    if (turn == 0) bulk_store(sum, mine, bytes);
    else bulk_add((float *)sum, mine, bytes);
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(read);
    bulk_wait<0>();                                         // visible here, so to who sees the turn pass
    turn_pass(counter, turn + 1);
}

// A warp leaves its fragments in shared memory for a bulk copy and says so.
template <int NT>
__device__ __forceinline__ void leave_sums(float4 (&out)[NT][128], const float (&sum)[1][NT][4],
                                           uint64_t *full) {
    #pragma unroll
    for (int j = 0; j < NT; j++) store((float *)&out[j][threadIdx.x % 128], narrow<float>(sum[0][j]));
    async_proxy_fence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(full);
}

// The third warpgroup: one thread brings tiles of queries, one adds the sums. n: stages of the block's walk
template <int WIDTH>
__device__ __forceinline__ void onepass_memory(WgmmaOnePassTiles<WIDTH> &tile, const OnePassScratch &scratch,
                                               const TensorMap *qkv, const TensorMap *dout, int b, int h,
                                               int block, int blocks, int n, int H, int K) {
    typedef WgmmaOnePassTiles<WIDTH> Tiles;
    constexpr int KEYS = Tiles::KEYS, SUBS = Tiles::SUBS, QUERIES = Tiles::QUERIES, STAGES = Tiles::STAGES;
    const int s0 = block * 2 * KEYS, kv = h / (H / K), sums = (b * K + kv) * blocks + block;
    const int first = ((b * H + h) * blocks + block) * (2 * KEYS / QUERIES);            // tile of queries
    if (threadIdx.x == 256) {
        for (int i = 0; i < 2; i++) {
            tma_load_tile(tile.k[i], &tile.keys_full, qkv, H + kv, s0 + i * KEYS, b);
            tma_load_tile(tile.v[i], &tile.keys_full, qkv, H + K + kv, s0 + i * KEYS, b);
        }
        #pragma unroll 1                                    // 24 registers must do
        for (int i = 0; i < n; i++) {
            const int stage = i % STAGES, t = s0 + i * QUERIES;
            uint64_t *full = &tile.full[stage];
            mbarrier_wait(&tile.empty[stage], i / STAGES % 2 ^ 1);
            for (int sub = 0; sub < SUBS; sub++) {
                tma_load_tile(tile.q[stage][sub], full, qkv, h, t + sub * 64, b);
                tma_load_tile(tile.dout[stage][sub], full, dout, h, t + sub * 64, b);
            }
            mbarrier_expect(full, sizeof tile.stats[0]);
            bulk_load(tile.stats[stage], scratch.stats + (size_t)(first + i) * 2 * QUERIES,
                      sizeof tile.stats[0], full);
        }
    } else if (threadIdx.x == 288) {
        for (int i = 0; i < n; i++) {
            mbarrier_wait(&tile.dq_full, i % 2);
            add_in_turn(scratch.dq + (size_t)(first + i) * (sizeof tile.dq / 16), tile.dq[0][0],
                        sizeof tile.dq, scratch.dq_turns + first + i, i * QUERIES / (2 * KEYS),
                        &tile.dq_empty);
        }
        if (H == K) return;
        mbarrier_wait(&tile.dkdv_full, 0);
        add_in_turn(scratch.dkdv + (size_t)sums * (sizeof tile.dkdv / 16), tile.dkdv[0][0][0],
                    sizeof tile.dkdv, scratch.kv_turns + sums, h % (H / K), &tile.dq_empty);
    }
}

// dq, of a warpgroup (64,64) = dS K: half the queries (two tiles in a stage) or half the columns of all keys
template <int WIDTH>
__device__ __forceinline__ void onepass_dq(float (&dq)[1][8][4], const WgmmaOnePassTiles<WIDTH> &tile,
                                           const bf16 (*ds)[64], int column) {
    constexpr int KEYS = WgmmaOnePassTiles<WIDTH>::KEYS;
    wgmma_fence();
    #pragma unroll
    for (int k = 0; k < 2 * KEYS; k += 16)
        wgmma_transposed(dq, wgmma_operand(ds[k], 0),
                         wgmma_operand(tile.k[k / KEYS].element[column / 64][k % KEYS], 0), k > 0);
    wgmma_commit();
}

template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_backward_onepass_kernel1(
        bf16 *__restrict__ dqkv, OnePassScratch scratch, const __grid_constant__ TensorMap qkv_map,
        const __grid_constant__ TensorMap dout_map, const int *__restrict__ doc_start, int B, int T, int H,
        int K, int D, int at_once, float scale) {
    typedef WgmmaOnePassTiles<WIDTH> Tiles;
    constexpr int KEYS = Tiles::KEYS, SUBS = Tiles::SUBS, QUERIES = Tiles::QUERIES, STAGES = Tiles::STAGES;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    if (threadIdx.x == 0) {
        tile.ticket = atomicAdd(scratch.ticket, 1);
        mbarrier_init(&tile.keys_full, 4), mbarrier_init(&tile.dkdv_full, 16);
        mbarrier_init(&tile.dq_full, 8), mbarrier_init(&tile.dq_empty, 1);
        for (int i = 0; i < 2; i++) mbarrier_init(&tile.ds_full[i], 8 * SUBS);
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(&tile.full[i], 2 * SUBS + 1), mbarrier_init(&tile.empty[i], 8);
        mbarrier_init_fence();
    }
    __syncthreads();
    // Heads that stand beside each other here share no keys, or they would wait for each other's dk and dv.
    const int blocks = CEIL_DIV(T, 2 * KEYS);
    const int head0 = tile.ticket / (at_once * blocks) * at_once, heads = min(at_once, B * H - head0);
    const int number = tile.ticket - head0 * blocks, head = head0 + number % heads;     // of B·H
    const int block = blocks - 1 - number / heads, s0 = block * 2 * KEYS;
    const int b = head / K % B, row0 = b * T, kv = head % K, h = kv * (H / K) + head / (B * K);
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int t_end = queries_end<WGMMA_THREADS, QUERIES>(s0, s0 + 2 * KEYS, doc_start, row0, T);
    const int n = CEIL_DIV(t_end - s0, QUERIES);            // stages of the walk
    if (group == 2) {
        registers_give<24>();
        onepass_memory(tile, scratch, &qkv_map, &dout_map, b, h, block, blocks, n, H, K);
        return;
    }
    registers_take<240>();
    const int key = s0 + warp * 16, row = warp * 16 + lane % 16;            // the warp's 16 keys; stmatrix
    const float log2_scale = scale * (float)M_LOG2E;
    float dk[1][WIDTH / 8][4] = {}, dv[1][WIDTH / 8][4] = {}, dq[1][8][4] = {};
    float p[1][8][4] = {}, ds[1][8][4] = {};
    uint32_t left[4][4];
    // Of stage i - 1, once both warpgroups have left its dS. Of stage -1 there is none, but a branch about
    // wgmma would make each wait for the one before: its product is that of other tiles, and nobody reads it.
    auto start_dq = [&](int i) {
        const int last = (i + 1) % 2;
        const bf16 (*left)[64] = tile.ds[last][SUBS == 2 ? group : 0].element[0];
        if (i == 0) left = tile.k[0].element[0];
        mbarrier_wait(&tile.ds_full[last], (i + 1) / 2 % 2 ^ 1);
        onepass_dq(dq, tile, left, SUBS == 2 ? 0 : group * 64);
    };
    auto leave_dq = [&](int i) {
        mbarrier_wait(&tile.dq_empty, i % 2);
        leave_sums(tile.dq[group], dq, &tile.dq_full);
    };
    mbarrier_wait(&tile.keys_full, 0);
    for (int i = 0; i < n; i++) {
        const int stage = i % STAGES;
        mbarrier_wait(&tile.full[stage], i / STAGES % 2);
        #pragma unroll
        for (int sub = 0; sub < SUBS; sub++) {
            const int t = s0 + i * QUERIES + sub * 64, t_last = min(t + 64, T) - 1;
            const float *lse = &tile.stats[stage][0][sub * 64 + lane % 4 * 2], *delta = lse + QUERIES;
            bf16 (*ds_out)[64] = tile.ds[i % 2][sub].element[0];
            wgmma_fence();
            wgmma_scores(p, tile.k[group], 0, tile.q[stage][sub]);
            if (sub == 0) start_dq(i), wgmma_wait<1>(p);
            else wgmma_wait<0>(p);
            if (t < key + 15 || (doc_start && doc_start[row0 + t_last] > key))
                mask_scores<true>(p, t, key, doc_start, row0, T);
            #pragma unroll
            for (int c = 0; c < 32; c++)
                p[0][c / 4][c % 4] = exp2_approx(p[0][c / 4][c % 4] * log2_scale - lse[c / 4 * 8 + c % 2]);
            if (sub == 0) wgmma_wait<0>(dq);
            if (sub == 0 && i > 0) leave_dq(i);
            pack_left(left, p);
            wgmma_fence();
            wgmma_scores(ds, tile.v[group], 0, tile.dout[stage][sub]);
            wgmma_values(dv, left, tile.dout[stage][sub]);
            wgmma_wait<1>(ds);
            #pragma unroll
            for (int c = 0; c < 32; c++)
                ds[0][c / 4][c % 4] = p[0][c / 4][c % 4] * (ds[0][c / 4][c % 4] - delta[c / 4 * 8 + c % 2]);
            wgmma_wait<0>(dv);                              // has read `left`
            pack_left(left, ds);
            #pragma unroll
            for (int c = 0; c < 4; c++)                     // two units of 16 bytes of 16 rows, swizzled
                stmatrix_x4(&ds_out[row][((c * 2 + lane / 16) ^ row % 8) * 8], left[c]);
            async_proxy_fence();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&tile.ds_full[i % 2]);
            wgmma_fence();
            wgmma_values(dk, left, tile.q[stage][sub]);
            wgmma_wait<0>(dk);
        }
        if (lane == 0) mbarrier_arrive(&tile.empty[stage]);
    }
    start_dq(n);
    wgmma_wait<0>(dq);
    leave_dq(n);
    barrier_sync(1, 256);                                   // nobody reads q, dout and dS any more
    if (H > K) {
        leave_sums(tile.dkdv[0][group], dk, &tile.dkdv_full);
        leave_sums(tile.dkdv[1][group], dv, &tile.dkdv_full);
        return;
    }
    const int W = (H + 2 * K) * D;
    bf16 *out = dqkv + (size_t)(row0 + key) * W + (H + kv) * D;
    store_rows(out, W, dk, scale, tile.rows[warp], T - key, D);
    store_rows(out + K * D, W, dv, 1, tile.rows[warp], T - key, D);
}

// ---- attention_backward_finish_kernel1: the sums to bf16, times scale, from fragments to rows -------------
// bytes   4·N·H·D in + 2·N·H·D out; if H > K of dk and dv, too: 252 MB = 75 us for N 16384, H 16, K 2, D 128
// idea    a thread has the fragments of 4 neighbouring lanes: 64 bytes, two rows of 8 columns
template <int WIDTH>
__global__ void attention_backward_finish_kernel1(bf16 *dqkv, OnePassScratch scratch, int T, int H, int K,
                                                  int D, int blocks, float scale) {
    const int chunk = blockIdx.x % (2 * blocks), b = blockIdx.x / (2 * blocks), head = blockIdx.y;
    const int j = threadIdx.x % (WIDTH / 8), lane = threadIdx.x / (WIDTH / 8) * 4;      // of 128
    const int t = chunk * 64 + lane / 32 * 16 + lane % 32 / 4, kv = (head - H) % K, is_dv = head >= H + K;
    if (chunk * 64 >= T || j * 8 >= D) return;
    const float4 *sums = head < H ? scratch.dq : scratch.dkdv;
    const int at = head < H ? (b * H + head) * 2 * blocks + chunk
                            : (((b * K + kv) * blocks + chunk / 2) * 2 + is_dv) * 2 + chunk % 2;
    sums += (size_t)at * (WIDTH * 16);
    float sum[4][4];
    for (int q = 0; q < 4; q++) widen(sum[q], load<4>((const float *)(sums + j * 128 + lane + q)));
    for (int i = 0; i < 2 && t + i * 8 < T; i++) {
        float row[8];
        for (int c = 0; c < 8; c++) row[c] = sum[c / 2][i * 2 + c % 2] * (is_dv ? 1 : scale);
        store(dqkv + (((size_t)b * T + t + i * 8) * (H + 2 * K) + head) * D + j * 8, narrow<bf16>(row));
    }
}

// memory: floats, per query and head, in whole blocks: WIDTH of dq, 2·WIDTH·K/H of dk dv, 3 of the rest
// SMs: to be filled; that decides how many heads are at work at a time
static void attention_backward_onepass(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const bf16 *out,
                                       const float *lse, const int *doc_start, float *memory, int SMs, int B,
                                       int T, int H, int K, int D) {
    const float scale = (float)(1 / sqrt((double)D));
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    auto start = [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        typedef WgmmaOnePassTiles<WIDTH> Tiles;
        constexpr int QUERIES = Tiles::QUERIES, BLOCK = 2 * Tiles::KEYS;
        const int blocks = CEIL_DIV(T, BLOCK), tiles = blocks * BLOCK / QUERIES;
        const size_t rows = (size_t)B * H * blocks * BLOCK, grouped = H > K ? rows / H * K : 0;
        float *dkdv = memory + rows * WIDTH, *stats = dkdv + grouped * 2 * WIDTH;
        int *ticket = (int *)(stats + 2 * rows), *dq_turns = ticket + 1, *kv_turns = dq_turns + B * H * tiles;
        const OnePassScratch scratch = {(float4 *)memory, (float4 *)dkdv, stats, ticket, dq_turns, kv_turns};
        launch(attention_backward_prepare_kernel1<QUERIES>, rows / 16, 256, 0, scratch, dout, out, lse, T, H,
               D, tiles, 1 + B * H * tiles + B * K * blocks);
        launch(attention_backward_onepass_kernel1<WIDTH>, B * H * blocks, WGMMA_THREADS, sizeof(Tiles), dqkv,
               scratch, head_map(qkv, B, T, H + 2 * K, D, 64), head_map(dout, B, T, H, D, 64), doc_start, B,
               T, H, K, D, std::max(1, SMs / blocks), scale);
        launch(attention_backward_finish_kernel1<WIDTH>, dim3(B * blocks * 2, H > K ? H + 2 * K : H),
               WIDTH * 4, 0, dqkv, scratch, T, H, K, D, blocks, scale);
    };
    if (D <= 64) start(std::integral_constant<int, 64>());
    else start(std::integral_constant<int, 128>());
}

// ---- fp32, shipped: for proof rather than speed -----------------------------------------------------------
__global__ void attention_backward_dq_f32_kernel1(float *__restrict__ dqkv, float *__restrict__ delta,
        const float *__restrict__ dout, const float *__restrict__ qkv, const float *__restrict__ out,
        const float *__restrict__ lse, const int *__restrict__ doc_start, int T, int H, int K, int D,
        float scale) {
    const int h = blockIdx.x % H, t = (gridDim.y - 1 - blockIdx.y) * F32_WARPS + threadIdx.y;
    const int W = (H + 2 * K) * D;
    if (t >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / H) * T, at = (row0 + t) * H + h;
    const float *k = qkv + row0 * W + (H + h / (H / K)) * D, *v = k + K * D;
    float q_t[4], dout_t[4], out_t[4], k_s[4], v_s[4], dq_t[4] = {};
    load_row(q_t, qkv + (row0 + t) * W + h * D, D);
    load_row(dout_t, dout + at * D, D);
    load_row(out_t, out + at * D, D);
    const float delta_t = dot(dout_t, out_t), lse_t = lse[at];
    for (int s = doc_start ? doc_start[row0 + t] : 0; s <= t; s++) {
        load_row(k_s, k + (size_t)s * W, D);
        load_row(v_s, v + (size_t)s * W, D);
        const float p = expf(dot(q_t, k_s) * scale - lse_t), ds = p * (dot(dout_t, v_s) - delta_t);
        for (int j = 0; j < 4; j++) dq_t[j] += ds * scale * k_s[j];
    }
    store_row(dqkv + (row0 + t) * W + h * D, dq_t, D);
    if (threadIdx.x == 0) delta[at] = delta_t;
}

__global__ void attention_backward_dkdv_f32_kernel1(float *__restrict__ dqkv, const float *__restrict__ dout,
        const float *__restrict__ qkv, const float *__restrict__ lse, const float *__restrict__ delta,
        const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    const int kv = blockIdx.x % K, s = blockIdx.y * F32_WARPS + threadIdx.y, W = (H + 2 * K) * D;
    if (s >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / K) * T, at_k = (row0 + s) * W + (H + kv) * D;
    float k_s[4], v_s[4], q_t[4], dout_t[4], dk_s[4] = {}, dv_s[4] = {};
    load_row(k_s, qkv + at_k, D);
    load_row(v_s, qkv + at_k + K * D, D);
    for (int h = kv * (H / K); h < (kv + 1) * (H / K); h++)
        for (int t = s; t < T && (!doc_start || doc_start[row0 + t] <= s); t++) {
            const size_t at = (row0 + t) * H + h;
            load_row(q_t, qkv + (row0 + t) * W + h * D, D);
            load_row(dout_t, dout + at * D, D);
            const float p = expf(dot(q_t, k_s) * scale - lse[at]), ds = p * (dot(dout_t, v_s) - delta[at]);
            for (int j = 0; j < 4; j++) dk_s[j] += ds * scale * q_t[j], dv_s[j] += p * dout_t[j];
        }
    store_row(dqkv + at_k, dk_s, D);
    store_row(dqkv + at_k + K * D, dv_s, D);
}

template <typename floatX>
static void shape(int when, int B, int T, int H, int K, int D, int docs, float amplitude) {
    const int N = B * T, W = (H + 2 * K) * D;
    std::vector<int> first(N);
    const double pairs = document_starts(first.data(), docs, N, T);
    if (!bench_shape<floatX>(when, "attention_backward",
                        sizeof(floatX) * (2.0 * N * W + 2.0 * N * H * D) + 4.0 * N * H, 10.0 * pairs * H * D,
                             "B %d T %d H %d K %d D %d%s%s", B, T, H, K, D, document_kinds[docs],
                             amplitude > 1 ? " peaked" : "")) return;
    Tensor<floatX> dqkv("dqkv", (size_t)N * W), qkv("qkv", (size_t)N * W), dout("dout", (size_t)N * H * D),
        out("out", (size_t)N * H * D);
    Tensor<float> lse("lse", (size_t)N * H), delta("delta", (size_t)N * H);
    Tensor<float> scratch("delta and sums of parts", (size_t)N * H * (1 + 2 * D));  // of at most H/K parts
    Tensor<int> doc("doc_start", N);
    dqkv.judge_apart(W, {{"dq", 0, (size_t)H * D}, {"dk", (size_t)H * D, (size_t)(H + K) * D},
                         {"dv", (size_t)(H + K) * D, (size_t)W}});
    qkv.normal(amplitude), dout.normal(1);
    std::copy(first.begin(), first.end(), doc.host);
    // what the forward has stored
    twin::precision(is_bf16<floatX>());
    twin::attention_forward(out.host, lse.host, qkv.host, docs ? doc.host : NULL, B, T, H, K, D);
    reference<floatX>([&](int b) {
        twin::attention_backward(dqkv.twin(b), dout.host, qkv.host, out.host, lse.host,
                                 docs ? doc.host : NULL, B, T, H, K, D);
    });
    gpu.scratch = scratch;
    const int *doc_start = docs ? (int *)doc : NULL;
    const float scale = (float)(1 / sqrt((double)D));
    std::function<void()> mma_tiles, wgmma_tiles, one_pass;
    if constexpr (is_bf16<floatX>()) if (has_wgmma()) {
        const size_t width = D <= 64 ? 64 : 128, rows = (size_t)B * CEIL_DIV(T, 128) * 128;
        Tensor<float> turns("sums in turns", rows * (H * (width + 3) + 2 * K * width));
        wgmma_tiles = [&] { attention_backward_wgmma(dqkv, dout, qkv, out, lse, doc_start, B, T, H, K, D); };
        one_pass = [=] {                        // few SMs in checks, for several rounds of heads
            const int SMs = current.when & CHECK ? 2 : device_attribute(cudaDevAttrMultiProcessorCount);
            attention_backward_onepass(dqkv, dout, qkv, out, lse, doc_start, turns, SMs, B, T, H, K, D);
        };
    }
    if constexpr (is_bf16<floatX>()) mma_tiles = [&] {
        launch(attention_delta_kernel1<floatX>, CEIL_DIV(N * H, 8), dim3(32, 8), 0, delta, dout, out, N * H,
               D);
        with_width(D, [&](auto width) {
            constexpr int WIDTH = decltype(width)::value;
            launch(attention_backward_dq_kernel1<WIDTH>, dim3(B * H, CEIL_DIV(T, 128)), ATT_THREADS,
                   sizeof(OneBufferTiles<WIDTH>), dqkv, delta, dout, qkv, lse, doc_start, T, H, K, D, scale);
            launch(attention_backward_dkdv_kernel1<WIDTH>, dim3(B * K, CEIL_DIV(T, 64)), ATT_THREADS,
                   sizeof(OneWarpTiles<WIDTH>), dqkv, delta, dout, qkv, lse, doc_start, T, H, K, D, scale);
        });
    };
    const Variant variants[] = {
        {0, "one thread per query, one per key", [&] {
            launch(attention_backward_dq_kernel0<floatX>, CEIL_DIV(N * H, 64), 64, 0, dqkv, delta, dout, qkv,
                   out, lse, doc_start, N, T, H, K, D, scale);
            launch(attention_backward_dkdv_kernel0<floatX>, CEIL_DIV(N * K, 64), 64, 0, dqkv, dout, qkv, lse,
                   delta, doc_start, N, T, H, K, D, scale);
        }},
        {1, "tensor cores, no overlap; delta by its own kernel", mma_tiles},
        {2, is_bf16<floatX>() ? "copies under products; delta inside dq" : "fp32, a warp per row", [&] {
            if constexpr (is_bf16<floatX>())
                attention_backward_mma(dqkv, dout, qkv, out, lse, doc_start, B, T, H, K, D);
            else attention_backward_f32(dqkv, dout, qkv, out, lse, doc_start, B, T, H, K, D);
        }, SHIPPED},
        {3, "sm_90a: wgmma and TMA", wgmma_tiles, SHIPPED},
        {4, "sm_90a: one pass, dq added in turns", one_pass, 0, SAME_BITS},
    };
    bench(variants);
}

int main(int argc, char **argv) {
    bench_begin("attention_backward", argc, argv);
    shape<bf16>(CHECK, 1, 5, 2, 1, 16, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 64, 4, 2, 32, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 65, 2, 2, 48, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 191, 2, 1, 104, SOME_DOCS, 2);
    shape<bf16>(CHECK, 1, 130, 2, 1, 128, TILE_DOCS, 1);
    shape<bf16>(CHECK, 1, 97, 2, 1, 80, NO_DOCS, 1);
    shape<bf16>(CHECK, 1, 1, 1, 1, 8, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 40, 2, 1, 80, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 128, 2, 2, 64, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 600, 2, 1, 64, NO_DOCS, 3);
    shape<bf16>(CHECK, 1, 777, 4, 1, 128, NO_DOCS, 1);
    shape<bf16>(CHECK, 2, 390, 3, 1, 72, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 275, 2, 1, 96, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 385, 1, 1, 128, TILE_DOCS, 3);
    shape<bf16>(CHECK, 1, 450, 2, 1, 120, SOME_DOCS, 1);
    shape<bf16>(CHECK, 2, 260, 4, 2, 112, SOME_DOCS, 1);
    shape<bf16>(CHECK, 1, 201, 8, 1, 64, SOME_DOCS, 1);             // 4 SMs: 4 parts of 2 heads
    shape<bf16>(CHECK, 1, 129, 4, 1, 96, NO_DOCS, 1);               // 4 parts of 1
    shape<bf16>(CHECK, 1, 333, 8, 1, 128, TILE_DOCS, 1);            // 2 parts of 4
    shape<float>(CHECK, 1, 5, 1, 1, 8, NO_DOCS, 1);
    shape<float>(CHECK, 2, 33, 4, 2, 16, NO_DOCS, 1);
    shape<float>(CHECK, 1, 65, 4, 1, 48, SOME_DOCS, 1);
    shape<float>(CHECK, 1, 100, 2, 2, 104, TILE_DOCS, 1);
    shape<bf16>(MODEL, 1, 512, 2, 1, 128, NO_DOCS, 1);
    shape<bf16>(TIME, 8, 2048, 16, 2, 128, NO_DOCS, 1);
    shape<bf16>(TIME, 1, 4096, 16, 2, 128, NO_DOCS, 1);             // 132 SMs: 4 parts of 2
    shape<bf16>(TIME, 4, 4095, 8, 8, 64, SOME_DOCS, 1);
    shape<bf16>(TIME, 2, 2048, 16, 4, 104, NO_DOCS, 1);
    shape<float>(TIME, 1, 1024, 8, 2, 128, NO_DOCS, 1);
    return bench_end();
}
