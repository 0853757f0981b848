// convert: to (n) = from (n), rounded to another type, or +=. Gradients on their way between ranks.
// bytes   fp32 -> bf16 6·n, bf16 += to fp32 10·n, fp32 += to fp32 12·n        floor of 1 G: 2.9 ms (memory, 10·n)
// idea    four elements per thread, so that both sides of an access are contiguous over the warp
// result  measured: not yet
#include "bench.cuh"

// ---- kernel 0: one element per thread ---------------------------------------------------------------------
template <int ADD, typename T, typename From> __global__ void convert_kernel0(T *to, const From *from, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = (T)((ADD ? (float)to[i] : 0.f) + (float)from[i]);
}

// ---- kernel 1, shipped: four elements per thread: 16 bytes of fp32, 8 of bf16 per access ------------------
template <int ADD, typename T, typename From>
__global__ void convert_kernel1(T *to, const From *from, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float x[4];
    widen(x, load<4>(from + i));
    if constexpr (ADD) accumulate(x, to + i);
    store(to + i, narrow<T>(x));
}

template <int ADD, typename T, typename From> static void shape(int when, size_t n) {
    const double bytes = (sizeof(From) + (1.0 + ADD) * sizeof(T)) * (double)n;
    if (!bench_shape<T>(when, ADD ? "convert, +=" : "convert", bytes, ADD * (double)n, "n %zu, from %s to", n,
                        is_bf16<From>() ? "bf16" : "fp32")) return;
    Tensor<T> to("to", n);
    Tensor<From> from("from", n);
    to.normal(1), from.normal(1);
    for (size_t i = 0; i < n; i++) {
        const float sum = (ADD ? to.host[i] : 0) + from.host[i];
        to.twin(0)[i] = is_bf16<T>() ? (float)(bf16)sum : sum;
    }
    gpu.comm_stream = gpu.stream;
    const Variant variants[] = {
        {0, "an element per thread", [&] {
            launch(convert_kernel0<ADD, T, From>, CEIL_DIV(n, 256), 256, 0, (T *)to, (const From *)from, n);
        }},
        {1, "four per thread", [&] { convert<ADD>((T *)to, (const From *)from, n); }, SHIPPED},
    };
    bench(variants);
}

int main(int argc, char **argv) {
    bench_begin("convert", argc, argv);
    const size_t sizes[] = {4, 12, 1024, 4100};
    for (size_t n : sizes) {
        shape<0, bf16, float>(CHECK, n);
        shape<0, float, bf16>(CHECK, n);
        shape<1, float, bf16>(CHECK, n);
        shape<1, float, float>(CHECK, n);
    }
    shape<0, bf16, float>(MODEL, 1 << 20);
    shape<1, float, bf16>(MODEL, 1 << 20);
    shape<0, bf16, float>(TIME, 64 << 20);
    shape<1, float, bf16>(TIME, 64 << 20);
    shape<1, float, float>(TIME, (64 << 20) - 4);
    return bench_end();
}
