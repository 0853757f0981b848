// bias_backward: dbias (OC) += column sums of dqkv (N,OC)
// column_sums: out (cols) += column sums of x (rows, stride), fp32, few rows
// bytes   2·N·OC in + 8·OC: 84 MB for N 16384, OC 2560        FLOPs N·OC        floor 25 us (memory)
//         column_sums: 4·rows·cols + 8·cols: 2.2 MB for 264 x 2048, 0.6 us: a launch, not a throughput, is
//         its cost
// idea    a column's summands are OC apart. Neighbouring threads must take neighbouring columns, but a
//         thousand columns are too few threads to fill a GPU: rows are cut into chunks too, and a second
//         kernel adds the chunks in a fixed order
// limits  OC % 4 == 0
// result  modelled (H100; N 1024, OC 2560, 5.3 MB compulsory, floor 1.6 us): kernel 0 2.4 us, bound by issue
//         in 20 blocks; 1 and 2 5.6 MB, 1.8 us. column_sums 264 x 2048: both 0.65 us. Measured: not yet
#include "bench.cuh"

// ---- kernel 0: a thread per column ------------------------------------------------------------------------
template <typename floatX>
__global__ void bias_backward_kernel0(float *dbias, const floatX *dqkv, int N, int OC) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) return;
    float sum = 0;
    for (int n = 0; n < N; n++) sum += to_float(dqkv[(size_t)n * OC + c]);
    dbias[c] += sum;
}

// ---- kernel 1: chunks of rows, a thread per column and chunk; column_sums adds the chunks. 2 bytes per
// load: too little in flight
template <typename floatX>
__global__ void bias_backward_kernel1(float *partials, const floatX *dqkv, int N, int OC) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, rows = CEIL_DIV(N, gridDim.y);
    const int first = blockIdx.y * rows;
    if (c >= OC) return;
    float sum = 0;
    for (int n = first; n < first + rows && n < N; n++) sum += to_float(dqkv[(size_t)n * OC + c]);
    partials[(size_t)blockIdx.y * OC + c] = sum;
}

// ---- kernel 2, shipped: four columns per lane, eight rows in flight, the eight warps of a block interleaved
// over the rows of a chunk
template <typename floatX>
__global__ void bias_backward_kernel2(float *partials, const floatX *dqkv, int N, int OC) {
    __shared__ __align__(16) float part[BIAS_WARPS][32][4];
    const int column = (blockIdx.x * 32 + threadIdx.x) * 4;
    float sum[4] = {};
    #pragma unroll 8
    for (int n = blockIdx.y * BIAS_WARPS + threadIdx.y; column < OC && n < N; n += gridDim.y * BIAS_WARPS)
        accumulate(sum, dqkv + (size_t)n * OC + column);
    store(part[threadIdx.y][threadIdx.x], narrow<float>(sum));
    __syncthreads();
    if (threadIdx.y > 0 || column >= OC) return;
    for (int warp = 1; warp < BIAS_WARPS; warp++) accumulate(sum, part[warp][threadIdx.x]);
    store(partials + (size_t)blockIdx.y * OC + column, narrow<float>(sum));
}

// ---- column_sums, kernel 0: a thread per column -----------------------------------------------------------
__global__ void column_sums_kernel0(float *out, const float *x, int rows, int cols, int stride) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += x[(size_t)r * stride + c];
    out[c] += sum;
}

// ---- kernel 1, shipped: 32 columns per block, its 32 warps share out the rows -----------------------------
__global__ void column_sums_kernel1(float *out, const float *x, int rows, int cols, int stride) {
    __shared__ float part[32][32];
    const int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (column < cols)
        for (int row = threadIdx.y; row < rows; row += 32) sum += x[(size_t)row * stride + column];
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= cols) return;
    float total = 0;
    for (int warp = 0; warp < 32; warp++) total += part[warp][threadIdx.x];
    out[column] += total;
}

template <typename floatX> static void shape(int when, int N, int OC) {
    if (!bench_shape<floatX>(when, "bias_backward", (double)N * OC * sizeof(floatX) + 8.0 * OC,
                             (double)N * OC, "N %d OC %d", N, OC)) return;
    Tensor<floatX> dqkv("dqkv", (size_t)N * OC);
    Tensor<float> dbias("dbias", OC), scratch("scratch", (size_t)MAX_PARTIALS * OC);
    dqkv.normal(1), dbias.normal(1);
    twin::bias_backward(dbias.twin(0), dqkv.host, N, OC);
    gpu.scratch = scratch;
    const int chunks = N < 64 * 64 ? CEIL_DIV(N, 64) : 64;
    const Variant variants[] = {
        {0, "one thread per column", [&] {
            launch(bias_backward_kernel0<floatX>, CEIL_DIV(OC, 128), 128, 0, dbias, dqkv, N, OC);
        }},
        {1, "chunks of rows, then column_sums", [&] {
            launch(bias_backward_kernel1<floatX>, dim3(CEIL_DIV(OC, 128), chunks), 128, 0, scratch, dqkv, N,
                   OC);
            column_sums(dbias, scratch, chunks, OC, OC);
        }},
        {2, "four columns per lane, eight rows in flight", [&] { bias_backward<floatX>(dbias, dqkv, N, OC); },
         SHIPPED},
    };
    bench(variants);
}

static void column_shape(int when, int rows, int cols, int stride) {
    if (!bench_shape<float>(when, "column_sums", 4.0 * rows * cols + 8.0 * cols, (double)rows * cols,
                            "rows %d cols %d stride %d", rows, cols, stride)) return;
    Tensor<float> x("x", (size_t)rows * stride), out("out", cols);
    x.normal(1), out.normal(1);
    std::vector<float> packed((size_t)rows * cols);
    for (int r = 0; r < rows; r++) std::copy(x.host + (size_t)r * stride, x.host + (size_t)r * stride + cols,
                                             packed.data() + (size_t)r * cols);
    twin::bias_backward(out.twin(0), packed.data(), rows, cols);
    const Variant variants[] = {
        {0, "one thread per column", [&] {
            launch(column_sums_kernel0, CEIL_DIV(cols, 128), 128, 0, out, x, rows, cols, stride);
        }},
        {1, "32 warps share out the rows of 32 columns", [&] { column_sums(out, x, rows, cols, stride); },
         SHIPPED},
    };
    bench(variants);
}

int main(int argc, char **argv) {
    bench_begin("bias_backward", argc, argv);
    const int shapes[][2] = {{37, 288}, {1, 8}, {300, 132}, {1025, 260}};
    for (auto s : shapes) shape<float>(CHECK, s[0], s[1]), shape<bf16>(CHECK, s[0], s[1]);
    column_shape(CHECK, 5, 288, 288);
    column_shape(CHECK, 264, 33, 66);
    column_shape(CHECK, 1, 128, 256);
    shape<bf16>(MODEL, 1024, 2560);
    column_shape(MODEL, 264, 2048, 2048);
    shape<bf16>(TIME, 16384, 2560);
    shape<bf16>(TIME, 16383, 4612);
    column_shape(TIME, 264, 2048, 2048);
    return bench_end();
}
