// gate_up_swiglu: gate_up (N,2F) = x (N,C) w (2F,C)^T,  h (N,F) = silu(gate) up
// swiglu_down_backward: dh = dx (N,C) w (C,F) stays on the chip; gate_up (N,2F) becomes its gradient, h (N,F)
// = once more
// bytes   forward 2·N·C + 4·C·F in, 2·3·N·F out; backward 2·N·C + 2·C·F + 4·N·F in, 2·3·N·F out: 1.2 and 1.9
//         GB for N 16384, C 2048, F 11008. A product and then a pass would move 2·2·N·F more: gate_up read
//         again; dh written and read
// FLOPs   4·N·C·F = 1.48 T; 2·N·C·F = 0.74 T
// floor   1.49 ms; 0.75 ms (FLOP-bound; mma.sync reaches 0.62 of Hopper's peak, wgmma all of it)
// idea    a product does C multiplications per output: its epilogue is the cheap place for what comes next.
//         Each byte from memory and from shared memory must meet as many multiplications as possible: large
//         tiles, sums in registers
// limits  bf16, C % 8 == 0, F % 8 == 0
// result  modelled (H100; N 256, C 256, F 512), MB in sectors and us:  forward (1.4 MB compulsory) kernel 0
//         2182 and 651 (all caches missed); 1 13.4 and 15; 2 7.3 and 2.2; 3 2.9 and 2.0 (16 blocks); 4 2.6.
//         backward (1.7 MB) 0 102 and 30; 1 9.7 and 10; 2 2.4 and 2.5; 3 2.2. The last of both (sm_90a) where
//         there is a tile for every SM: 714 and 694 TFLOP/s of 989 (3B, N 16384), dev/SPEED.md 6. Measured: not
//         yet
#include "bench.cuh"

// ---- forward, kernel 0: a thread per element of h: two rows of w against one row of x ---------------------
__global__ void gate_up_swiglu_kernel0(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int C, int F) {
    const int f = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (f >= F) return;
    float g[1] = {}, u[1] = {};
    for (int c = 0; c < C; c++) {
        g[0] += to_float(x[(size_t)n * C + c]) * to_float(w[(size_t)f * C + c]);
        u[0] += to_float(x[(size_t)n * C + c]) * to_float(w[(size_t)(F + f) * C + c]);
    }
    gate_up[(size_t)n * 2 * F + f] = from_float<bf16>(g[0]);
    gate_up[(size_t)n * 2 * F + F + f] = from_float<bf16>(u[0]);
    // what a pass of its own would read
    g[0] = to_float(from_float<bf16>(g[0])), u[0] = to_float(from_float<bf16>(u[0]));
    swiglu(u, g, u);
    h[(size_t)n * F + f] = from_float<bf16>(u[0]);
}

// ---- kernel 1: 16 x 16 tiles in shared memory: each element read from memory serves 16 threads. But 3 loads
// from shared memory for 2 multiplications: that is the limit now
enum { SIDE = 16 };
__global__ void gate_up_swiglu_kernel1(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int N, int C,
                                       int F) {
    // + 1: a column lies on 16 banks
    __shared__ float x_tile[SIDE][SIDE + 1], g_tile[SIDE][SIDE + 1], u_tile[SIDE][SIDE + 1];
    const int i = threadIdx.y, j = threadIdx.x, n = blockIdx.y * SIDE + i, f0 = blockIdx.x * SIDE, f = f0 + j;
    float g[1] = {}, u[1] = {};
    for (int c0 = 0; c0 < C; c0 += SIDE) {
        const int c = c0 + j, row = f0 + i;
        x_tile[i][j] = n < N && c < C ? to_float(x[(size_t)n * C + c]) : 0;
        g_tile[i][j] = row < F && c < C ? to_float(w[(size_t)row * C + c]) : 0;
        u_tile[i][j] = row < F && c < C ? to_float(w[(size_t)(F + row) * C + c]) : 0;
        __syncthreads();
        for (int k = 0; k < SIDE; k++)
            g[0] += x_tile[i][k] * g_tile[j][k], u[0] += x_tile[i][k] * u_tile[j][k];
        __syncthreads();
    }
    if (n >= N || f >= F) return;
    gate_up[(size_t)n * 2 * F + f] = from_float<bf16>(g[0]);
    gate_up[(size_t)n * 2 * F + F + f] = from_float<bf16>(u[0]);
    g[0] = to_float(from_float<bf16>(g[0])), u[0] = to_float(from_float<bf16>(u[0]));
    swiglu(u, g, u);
    h[(size_t)n * F + f] = from_float<bf16>(u[0]);
}

// ---- kernel 2: tensor cores: a block of 4 warps owns 64 rows and 32 columns of h, a warp 16 rows of gate
// and up. One buffer: copies and products take turns; 320 bytes of shared memory per mma, where kernel 3
// needs 128
struct SmallTiles {
    Tile<64, 32> x, w;  // w: 32 rows of gate, 32 of up
};

__global__ void __launch_bounds__(MLP_THREADS) gate_up_swiglu_kernel2(bf16 *__restrict__ h,
        bf16 *__restrict__ gate_up, const bf16 *__restrict__ x, const bf16 *__restrict__ w, int N, int C,
        int F) {
    constexpr int DEPTH = 32, ROWS = 64, COLUMNS = 32;
    SmallTiles &tile = *shared_memory<SmallTiles>();
    const int n0 = blockIdx.y * ROWS, f0 = blockIdx.x * COLUMNS, warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    float sum[1][2 * COLUMNS / 8][4];
    fill(sum, 0);
    for (int c = 0; c < C; c += DEPTH) {
        load_tile<MLP_THREADS>(tile.x, x + (size_t)n0 * C + c, C, N - n0, C - c);
        load_tile<MLP_THREADS>(rows_of<COLUMNS>(tile.w, 0), w + (size_t)f0 * C + c, C, F - f0, C - c);
        load_tile<MLP_THREADS>(rows_of<COLUMNS>(tile.w, COLUMNS), w + (size_t)(F + f0) * C + c, C, F - f0,
                               C - c);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        multiply_rows<2>(sum, rows_of<16>(tile.x, warp * 16), tile.w);
        __syncthreads();
    }
    for (int i = 0; i < COLUMNS / 8 * 4; i++) {                     // gate in sum[0][j], up in sum[0][j + 4]
        const int j = i / 4, n = n0 + warp * 16 + lane / 4 + i % 4 / 2 * 8;
        const int f = f0 + j * 8 + lane % 4 * 2 + i % 2;
        if (n >= N || f >= F) continue;
        const bf16 gate = from_float<bf16>(sum[0][j][i % 4]);
        const bf16 up = from_float<bf16>(sum[0][j + COLUMNS / 8][i % 4]);
        float g[1] = {to_float(gate)}, u[1] = {to_float(up)};
        swiglu(u, g, u);
        gate_up[(size_t)n * 2 * F + f] = gate;
        gate_up[(size_t)n * 2 * F + F + f] = up;
        h[(size_t)n * F + f] = from_float<bf16>(u[0]);
    }
}

// ---- kernel 3, shipped for mma.sync: 128 x 128 sums per block, 64 x 64 per warp; three stages of 32 columns
// in flight; rows leave through shared memory in 16-byte stores
__global__ void __launch_bounds__(MLP_THREADS, 2) gate_up_swiglu_kernel3(bf16 *__restrict__ h,
        bf16 *__restrict__ gate_up, const bf16 *__restrict__ x, const bf16 *__restrict__ w, int N, int C,
        int F) {
    constexpr int HALF = MLP_WARP / 2;
    GateUpStage *stages = shared_memory<GateUpStage>();
    const int2 place = mlp_place(blockIdx.x, CEIL_DIV(N, MLP_ROWS), CEIL_DIV(F, MLP_COLUMNS / 2));
    const int n0 = place.x * MLP_ROWS, f0 = place.y * (MLP_COLUMNS / 2), lane = threadIdx.x % 32;
    // warps 0 1 above 2 3
    const int warp_row = threadIdx.x / 64 * MLP_WARP, warp_half = threadIdx.x / 32 % 2;
    float sum[MLP_WARP / 16][MLP_WARP / 8][4] = {};
    // A thread copies 16 bytes of 4 rows each of x and of w. Rows past the end repeat the last: their sums
    // are never stored.
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const bf16 *x_src[4], *w_src[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        x_src[i] = x + (size_t)min(n0 + 32 * i + row, N - 1) * C + column;
        w_src[i] = w + ((size_t)(i % 2) * F + min(f0 + i / 2 * HALF + row, F - 1)) * C + column;
    }
    auto load_stage = [&](int i, GateUpStage &stage) {
        const int valid = i * MLP_DEPTH + column < C ? 16 : 0;
        #pragma unroll
        for (int j = 0; j < 4; j++)
            cp_async_16(stage.x.at(32 * j + row, column), x_src[j] + i * MLP_DEPTH, valid);
        #pragma unroll
        for (int j = 0; j < 4; j++)
            cp_async_16(stage.w.at(32 * j + row, column), w_src[j] + i * MLP_DEPTH, valid);
    };
    mlp_pipeline(CEIL_DIV(C, MLP_DEPTH), stages, load_stage, [&](GateUpStage &stage) {
        multiply_rows<2>(sum, rows_of<MLP_WARP>(stage.x, warp_row),
                         rows_of<MLP_WARP>(stage.w, warp_half * MLP_WARP));
    });
    MlpWarpTile &rows = reinterpret_cast<MlpWarpTile *>(stages)[threadIdx.x / 32];
    fragments_to_rows(rows, sum, 1);
    const int f = lane % 4 * 8, out_f = f0 + warp_half * HALF + f;
    if (out_f >= F) return;
    // rows 4 apart: other banks
    for (int r = lane / 8 + lane / 4 % 2 * 4; r < MLP_WARP && n0 + warp_row + r < N; r += 8)
        store_gate_up(gate_up, h, n0 + warp_row + r, out_f, F, load<8>(rows.at(r, f)),
                      load<8>(rows.at(r, f + HALF)));
}

// ---- kernel 4, shipped for sm_90a: wgmma and TMA, 128 x 192 sums, two warpgroups take tiles in turns ------
__global__ void __launch_bounds__(WGMMA_THREADS, 1) gate_up_swiglu_kernel4(bf16 *__restrict__ h,
        bf16 *__restrict__ gate_up, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        int N, int C, int F) {
    typedef GateUpTiles Tiles;
    constexpr int ROWS = Tiles::ROWS, COLUMNS = Tiles::COLUMNS, DEPTH = Tiles::DEPTH;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    auto load_stage = [&](int2 place, int k, auto &stage, uint64_t *landed) {
        tma_load(&stage.left, &x, landed, k * DEPTH, 0, place.x * ROWS, 0);
        tma_load(&stage.right, &w, landed, k * DEPTH, 0, 0, place.y * (COLUMNS / 16));
    };
    auto multiply = [&](ProductSums &sum, const auto &stage) {
        #pragma unroll
        for (int c = 0; c < DEPTH; c += 16)
            for (int m = 0; m < 2; m++)
                wgmma_rows(sum.half[m], stage.left.operand(m * 64, c), stage.right.operand(0, c));
    };
    auto finish = [&](int2 place, const ProductSums &sum) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Tile<16, COLUMNS> &rows = tile.rows[warp];
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            fragments_to_rows(rows, sum.half[m], 1);
            for (int j = 0; j < COLUMNS / 16; j += 4)
                for (int r = lane / 4; r < 16; r += 8) {    // 4 lanes to a row: 8 of them have all banks
                    const int n = place.x * ROWS + m * 64 + warp % 4 * 16 + r, f8 = j + lane % 4;
                    const int f = place.y * (COLUMNS / 2) + f8 * 8;
                    if (n < N && f < F)
                        store_gate_up(gate_up, h, n, f, F, load<8>(rows.at(r, f8 * 16)),
                                      load<8>(rows.at(r, f8 * 16 + 8)));
                }
        }
    };
    product_pipeline(tile, CEIL_DIV(N, ROWS), CEIL_DIV(F, COLUMNS / 2), CEIL_DIV(C, DEPTH), load_stage,
                     multiply, finish);
}

// ---- backward, kernel 0: a thread per element of h --------------------------------------------------------
// g, u, dh become dg, h, du
template <int E>
__device__ __forceinline__ void swiglu_gradient(float (&g)[E], float (&u)[E], float (&d)[E]) {
    for (int k = 0; k < E; k++) {
        const float s = __fdividef(1, 1 + exp_approx(-g[k])), silu = g[k] * s, dsilu = d[k] * u[k];
        u[k] *= silu;
        d[k] *= silu;
        g[k] = dsilu * s * (1 + g[k] * (1 - s));
    }
}

__global__ void swiglu_down_backward_kernel0(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int C,
                                             int F) {
    const int f = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (f >= F) return;
    float g[1] = {to_float(gate_up[(size_t)n * 2 * F + f])},
        u[1] = {to_float(gate_up[(size_t)n * 2 * F + F + f])}, d[1] = {};
    for (int c = 0; c < C; c++) d[0] += to_float(dx[(size_t)n * C + c]) * to_float(w[(size_t)c * F + f]);
    d[0] = to_float(from_float<bf16>(d[0]));
    swiglu_gradient(g, u, d);
    h[(size_t)n * F + f] = from_float<bf16>(u[0]);
    gate_up[(size_t)n * 2 * F + f] = from_float<bf16>(g[0]);
    gate_up[(size_t)n * 2 * F + F + f] = from_float<bf16>(d[0]);
}

// ---- kernel 1: 16 x 16 tiles in shared memory -------------------------------------------------------------
__global__ void swiglu_down_backward_kernel1(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int N,
                                             int C, int F) {
    __shared__ float x_tile[SIDE][SIDE + 1], w_tile[SIDE][SIDE + 1];
    const int i = threadIdx.y, j = threadIdx.x, n = blockIdx.y * SIDE + i, f = blockIdx.x * SIDE + j;
    float d[1] = {};
    for (int c0 = 0; c0 < C; c0 += SIDE) {
        x_tile[i][j] = n < N && c0 + j < C ? to_float(dx[(size_t)n * C + c0 + j]) : 0;
        w_tile[i][j] = f < F && c0 + i < C ? to_float(w[(size_t)(c0 + i) * F + f]) : 0;
        __syncthreads();
        for (int k = 0; k < SIDE; k++) d[0] += x_tile[i][k] * w_tile[k][j];
        __syncthreads();
    }
    if (n >= N || f >= F) return;
    float g[1] = {to_float(gate_up[(size_t)n * 2 * F + f])},
        u[1] = {to_float(gate_up[(size_t)n * 2 * F + F + f])};
    d[0] = to_float(from_float<bf16>(d[0]));
    swiglu_gradient(g, u, d);
    h[(size_t)n * F + f] = from_float<bf16>(u[0]);
    gate_up[(size_t)n * 2 * F + f] = from_float<bf16>(g[0]);
    gate_up[(size_t)n * 2 * F + F + f] = from_float<bf16>(d[0]);
}

// ---- kernel 2, shipped for mma.sync: the forward's tiles and stages; w is read as it lies, transposed on the
// way to the tensor cores
__global__ void __launch_bounds__(MLP_THREADS, 2) swiglu_down_backward_kernel2(bf16 *__restrict__ gate_up,
        bf16 *__restrict__ h, const bf16 *__restrict__ dx, const bf16 *__restrict__ w, int N, int C, int F) {
    DownStage *stages = shared_memory<DownStage>();
    const int2 place = mlp_place(blockIdx.x, CEIL_DIV(N, MLP_ROWS), CEIL_DIV(F, MLP_COLUMNS));
    const int n0 = place.x * MLP_ROWS, f0 = place.y * MLP_COLUMNS, lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 64 * MLP_WARP, warp_column = threadIdx.x / 32 % 2 * MLP_WARP;
    float sum[MLP_WARP / 16][MLP_WARP / 8][4] = {};
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const int w_row = threadIdx.x / 16, w_column = threadIdx.x % 16 * 8;
    const bf16 *dx_src[4], *w_src = w + (size_t)w_row * F + min(f0 + w_column, F - 8);
    for (int i = 0; i < 4; i++) dx_src[i] = dx + (size_t)min(n0 + 32 * i + row, N - 1) * C + column;
    auto load_stage = [&](int i, DownStage &stage) {
        const int c = i * MLP_DEPTH;
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            cp_async_16(stage.dx.at(32 * j + row, column), dx_src[j] + c, c + column < C ? 16 : 0);
            cp_async_16(stage.w.at(8 * j + w_row, w_column), w_src + (size_t)(c + 8 * j) * F,
                        c + 8 * j + w_row < C ? 16 : 0);
        }
    };
    mlp_pipeline(CEIL_DIV(C, MLP_DEPTH), stages, load_stage, [&](DownStage &stage) {
        multiply_columns(sum, rows_of<MLP_WARP>(stage.dx, warp_row), stage.w, warp_column);
    });
    MlpWarpTile &rows = reinterpret_cast<MlpWarpTile *>(stages)[threadIdx.x / 32];
    fragments_to_rows(rows, sum, 1);
    const int f = lane % 8 * 8, out_f = f0 + warp_column + f;
    if (out_f >= F) return;
    for (int r = lane / 8; r < MLP_WARP && n0 + warp_row + r < N; r += 4) {
        const size_t n = n0 + warp_row + r;
        bf16 *gate = gate_up + n * 2 * F + out_f;
        swiglu_backward_pack<8>(gate, gate + F, h + n * F + out_f, rows.at(r, f));
    }
}

// ---- kernel 3, shipped for sm_90a: wgmma and TMA ----------------------------------------------------------
__global__ void __launch_bounds__(WGMMA_THREADS, 1) swiglu_down_backward_kernel3(bf16 *__restrict__ gate_up,
        bf16 *__restrict__ h, const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap w,
        int N, int C, int F) {
    typedef DownTiles Tiles;
    constexpr int ROWS = Tiles::ROWS, COLUMNS = Tiles::COLUMNS, DEPTH = Tiles::DEPTH;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    auto load_stage = [&](int2 place, int k, auto &stage, uint64_t *landed) {
        tma_load(&stage.left, &dx, landed, k * DEPTH, 0, place.x * ROWS, 0);
        for (int panel = 0; panel < stage.right.PANELS; panel++)
            tma_load(stage.right.element[panel], &w, landed, place.y * COLUMNS + panel * 64, 0, k * DEPTH, 0);
    };
    auto multiply = [&](ProductSums &sum, const auto &stage) {
        #pragma unroll
        for (int c = 0; c < DEPTH; c += 16)
            for (int m = 0; m < 2; m++)
                wgmma_columns(sum.half[m], stage.left.operand(m * 64, c), stage.right.operand(c, 0));
    };
    auto finish = [&](int2 place, const ProductSums &sum) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Tile<16, COLUMNS> &rows = tile.rows[warp];
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            fragments_to_rows(rows, sum.half[m], 1);
            const int n0 = place.x * ROWS + m * 64 + warp % 4 * 16 + lane / 8;
            #pragma unroll 1
            for (int c = lane % 8 * 8; c < COLUMNS; c += 64) {
                const int f = place.y * COLUMNS + c;
                if (f >= F) continue;
                Pack<bf16, 8> gate[4], up[4];               // of rows 4 apart, all on their way together
                for (int j = 0; j < 4; j++) {
                    const bf16 *gate_n = gate_up + (size_t)(n0 + 4 * j) * 2 * F + f;
                    gate[j] = load_if<8>(n0 + 4 * j < N, gate_n);
                    up[j] = load_if<8>(n0 + 4 * j < N, gate_n + F);
                }
                for (int j = 0, n = n0; j < 4 && n < N; j++, n += 4) {
                    bf16 *gate_n = gate_up + (size_t)n * 2 * F + f;
                    const Pack<bf16, 8> dh = load<8>(rows.at(lane / 8 + 4 * j, c));
                    store(h + (size_t)n * F + f, swiglu_backward_pack(gate[j], up[j], dh));
                    store(gate_n, gate[j]);
                    store(gate_n + F, up[j]);
                }
            }
        }
    };
    product_pipeline(tile, CEIL_DIV(N, ROWS), CEIL_DIV(F, COLUMNS), CEIL_DIV(C, DEPTH), load_stage, multiply,
                     finish);
}

static void shape(int when, int N, int C, int F) {
    const size_t n = (size_t)N * F;
    if (bench_shape<bf16>(when, "gate_up_swiglu", 2.0 * N * C + 4.0 * C * F + 6.0 * n, 4.0 * n * C,
                          "N %d C %d F %d", N, C, F)) {
        Tensor<bf16> gate_up("gate_up", 2 * n), h("h", n), x("x", (size_t)N * C), w("w", (size_t)2 * F * C);
        gate_up.judge_apart(2 * F, {{"gate", 0, (size_t)F}, {"up", (size_t)F, (size_t)2 * F}});
        x.normal(1), w.normal(2 / sqrtf((float)C));
        reference<bf16>([&](int b) { twin::mlp_forward(h.twin(b), gate_up.twin(b), x.host, w.host, N, C,
                                                       F); });
        std::function<void()> forward_wgmma;
        if (has_wgmma()) forward_wgmma = [&] { mlp_forward_wgmma(h, gate_up, x, w, N, C, F); };
        const dim3 tiles(CEIL_DIV(F, SIDE), CEIL_DIV(N, SIDE)), tile(SIDE, SIDE);
        const Variant variants[] = {
            {0, "one thread per element", [&] {
                launch(gate_up_swiglu_kernel0, dim3(CEIL_DIV(F, 128), N), 128, 0, h, gate_up, x, w, C, F);
            }},
            {1, "16 x 16 tiles in shared memory, fp32", [&] {
                launch(gate_up_swiglu_kernel1, tiles, tile, 0, h, gate_up, x, w, N, C, F);
            }},
            {2, "tensor cores, 64 x 64 sums per block, one buffer", [&] {
                launch(gate_up_swiglu_kernel2, dim3(CEIL_DIV(F, 32), CEIL_DIV(N, 64)), MLP_THREADS,
                       sizeof(SmallTiles), h, gate_up, x, w, N, C, F);
            }},
            {3, "128 x 128 sums per block, three stages in flight", [&] {
                mlp_forward_products(h, gate_up, x, w, N, C, F);
            }, SHIPPED},
            {4, "sm_90a: wgmma and TMA, two warpgroups in turns", forward_wgmma, SHIPPED},
        };
        bench(variants);
    }
    if (bench_shape<bf16>(when, "swiglu_down_backward", 2.0 * N * C + 2.0 * C * F + 10.0 * n, 2.0 * n * C,
                          "N %d C %d F %d", N, C, F)) {
        Tensor<bf16> gate_up("gate_up", 2 * n), h("h", n), dx("dx", (size_t)N * C), w("w", (size_t)C * F);
        gate_up.judge_apart(2 * F, {{"dgate", 0, (size_t)F}, {"dup", (size_t)F, (size_t)2 * F}});
        gate_up.normal(2), dx.normal(1), w.normal(1 / sqrtf((float)C));
        reference<bf16>([&](int b) {
            twin::mlp_backward_gate_up(gate_up.twin(b), h.twin(b), dx.host, w.host, N, C, F);
        });
        std::function<void()> backward_wgmma;
        if (has_wgmma()) backward_wgmma = [&] { mlp_backward_wgmma(gate_up, h, dx, w, N, C, F); };
        const dim3 tiles(CEIL_DIV(F, SIDE), CEIL_DIV(N, SIDE)), tile(SIDE, SIDE);
        const Variant variants[] = {
            {0, "one thread per element", [&] {
                launch(swiglu_down_backward_kernel0, dim3(CEIL_DIV(F, 128), N), 128, 0, gate_up, h, dx, w, C,
                       F);
            }},
            {1, "16 x 16 tiles in shared memory, fp32", [&] {
                launch(swiglu_down_backward_kernel1, tiles, tile, 0, gate_up, h, dx, w, N, C, F);
            }},
            {2, "128 x 128 sums per block, three stages in flight", [&] {
                mlp_backward_products(gate_up, h, dx, w, N, C, F);
            }, SHIPPED},
            {3, "sm_90a: wgmma and TMA, two warpgroups in turns", backward_wgmma, SHIPPED},
        };
        bench(variants);
    }
}

int main(int argc, char **argv) {
    bench_begin("mlp", argc, argv);
    shape(CHECK, 5, 8, 8);
    shape(CHECK, 130, 72, 104);             // beyond one tile in rows and columns, C no multiple of a stage
    shape(CHECK, 64, 256, 64);
    shape(CHECK, 33, 40, 200);
    shape(CHECK, 385, 328, 392);            // several tiles to a block of the emulator's 4 SMs
    shape(CHECK, 513, 16, 584);             // the same, a single step each
    shape(MODEL, 256, 256, 512);
    shape(TIME, 4096, 2048, 5504);
    shape(TIME, 2047, 1032, 2760);
    return bench_end();
}
