// sum_of_squares: out (1) += sum of x (n)^2 in double; the global norm of all gradients is its root.
// bytes   4·n in;  1 G gradients: 4 GB        FLOPs 2·n        floor 1.2 ms (memory)
// idea    a sum of a billion terms needs double, but Hopper has half as many fp64 units as fp32 units and
//         consumer cards 1/64: a few products are added in fp32 first. Two kernels and partial sums of
//         blocks, so that the order is fixed
// result  modelled (H100; n 2 M, floor 2.5 us): kernel 0 75 us; 1 and 2 2.9 us. Measured: not yet
#include "bench.cuh"

// ---- kernel 0: one block, each square in double -----------------------------------------------------------
__global__ void sum_of_squares_kernel0(double *out, const float *x, size_t n) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) sum += (double)x[i] * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out += sum;
}

// ---- kernel 1: many blocks with partial sums, add_sum adds them; four bytes per access, one fp64 operation
// per element
__global__ void sum_of_squares_kernel1(double *partials, const float *x, size_t n) {
    double sum = 0;
    const size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x, step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = first; i < n; i += step) sum += (double)x[i] * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// ---- kernel 2, shipped: four 16-byte loads in flight per thread, 16 squares added in fp32, then one fp64
// addition
__global__ void sum_of_squares_kernel2(double *partials, const float *x, size_t n) {
    const size_t quads = n / 4, step = (size_t)gridDim.x * SQUARES_THREADS * 4;
    double sum = 0;
    for (size_t i0 = (size_t)blockIdx.x * SQUARES_THREADS * 4 + threadIdx.x; i0 < quads; i0 += step) {
        float squares = 0, q[4][4];
        for (int j = 0; j < 4; j++) {
            const size_t i = i0 + j * SQUARES_THREADS;
            widen(q[j], load_if<4>(i < quads, x + 4 * i));
        }
        for (int j = 0; j < 4; j++)
            squares += (q[j][0] * q[j][0] + q[j][1] * q[j][1]) + (q[j][2] * q[j][2] + q[j][3] * q[j][3]);
        sum += squares;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

static void shape(int when, size_t n) {
    if (!bench_shape<float>(when, "sum_of_squares", 4.0 * n, 2.0 * n, "n %zu", n)) return;
    Tensor<float> x("x", n), scratch("scratch", 2 * SQUARES_BLOCKS);
    Tensor<double> out("out", 1);
    x.normal(1), out.set(1.5f);
    *out.twin(0) += twin::sum_of_squares(x.host, n);
    out.allow(1e-7);
    double *partials = (double *)(float *)scratch;
    gpu.scratch = scratch;
    const int blocks = n < 256 * 1024 ? (int)CEIL_DIV(n, 256) : 1024;
    const Variant variants[] = {
        {0, "one block, sums in double", [&] { launch(sum_of_squares_kernel0, 1, 1024, 0, out, x, n); }},
        {1, "a thousand blocks, then their sums", [&] {
            launch(sum_of_squares_kernel1, blocks, 256, 0, partials, x, n);
            add_sum(out, (const double *)partials, NULL, blocks);
        }},
        {2, "64 bytes in flight per thread, 16 squares in fp32 first", [&] { sum_of_squares(out, x, n); },
         SHIPPED},
    };
    bench(variants);
}

int main(int argc, char **argv) {
    bench_begin("global_norm", argc, argv);
    const size_t sizes[] = {4, 8, 1000, 5000, 70004};
    for (size_t n : sizes) shape(CHECK, n);
    shape(MODEL, 2 << 20);
    shape(TIME, 256 << 20);
    shape(TIME, (64 << 20) - 4);
    return bench_end();
}
