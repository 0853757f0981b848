// swiglu_forward: h (N,F) = silu(g) u,  silu(g) = g / (1 + e^-g),   gate_up (N,2F) = g | u
// swiglu_backward, in place, with s = sigmoid(g):  gate_up (N,2F) becomes dg | du,  dg = dh u s (1 + g (1 -
// s)),  du = dh g s;
//   h (N,F) = g s u, the forward's output again
// In bf16 on C % 8 == 0 both are epilogues of products: see mlp.cu
// bytes   forward 3·2·N·F = 1.08 GB, backward 6·2·N·F = 2.16 GB for N 16384, F 11008
// FLOPs   ~5·N·F; ~10·N·F, and two SFU operations per element (98 us)
// floor   323 us; 646 us: memory-bound
// idea    elementwise: every byte once, in 16-byte accesses, and little arithmetic beside them
// limits  F % 8 == 0 (fp32: 4)
// result  modelled (H100; N 256, F 11008): all kernels move the compulsory 16.9 MB (backward 33.8) in 5.0 us
//         (10.1); what tells them apart, instructions and bytes in flight, needs a GPU. Measured: not yet
#include "bench.cuh"

// ---- forward, kernel 0: a thread per element --------------------------------------------------------------
template <typename floatX>
__global__ void swiglu_forward_kernel0(floatX *h, const floatX *gate_up, int N, int F) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * F) return;
    const size_t n = i / F, f = i % F;
    const float g = to_float(gate_up[n * 2 * F + f]), u = to_float(gate_up[n * 2 * F + F + f]);
    h[i] = from_float<floatX>(g / (1 + expf(-g)) * u);
}

// ---- kernel 1: 16 bytes per thread, approximate e^x and division (2 ulp, far below a rounding to bf16); one
// 64-bit division per thread still looks for the row
template <typename floatX>
__global__ void swiglu_forward_kernel1(floatX *h, const floatX *gate_up, int N, int F) {
    constexpr int E = 16 / sizeof(floatX);
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * E;
    if (i >= (size_t)N * F) return;
    const floatX *g = gate_up + i / F * 2 * F + i % F;
    float g_f[E], u_f[E];
    widen(g_f, load<E>(g));
    widen(u_f, load<E>(g + F));
    for (int k = 0; k < E; k++) u_f[k] *= __fdividef(g_f[k], 1 + __expf(-g_f[k]));
    store(h + i, narrow<floatX>(u_f));
}

// ---- kernel 2, shipped: a block per row -------------------------------------------------------------------
template <typename floatX> __global__ void swiglu_forward_kernel2(floatX *h, const floatX *gate_up, int F) {
    constexpr int E = 16 / sizeof(floatX);
    const floatX *gate = gate_up + (size_t)blockIdx.x * 2 * F, *up = gate + F;
    floatX *h_n = h + (size_t)blockIdx.x * F;
    for (int f = threadIdx.x * E; f < F; f += blockDim.x * E) {
        float g[E], u[E], h_f[E];
        widen(g, load<E>(gate + f));
        widen(u, load<E>(up + f));
        swiglu(h_f, g, u);
        store(h_n + f, narrow<floatX>(h_f));
    }
}

// ---- backward, kernel 0: a thread per element -------------------------------------------------------------
template <typename floatX>
__global__ void swiglu_backward_kernel0(floatX *gate_up, floatX *h, const floatX *dh, int N, int F) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)N * F) return;
    const size_t at = i / F * 2 * F + i % F;
    const float g = to_float(gate_up[at]), u = to_float(gate_up[at + F]), d = to_float(dh[i]);
    const float s = 1 / (1 + expf(-g));
    h[i] = from_float<floatX>(g * s * u);
    gate_up[at] = from_float<floatX>(d * u * s * (1 + g * (1 - s)));
    gate_up[at + F] = from_float<floatX>(d * g * s);
}

// ---- kernel 1, shipped: a block per row, 16 bytes per thread ----------------------------------------------
template <typename floatX>
__global__ void swiglu_backward_kernel1(floatX *gate_up, floatX *h, const floatX *dh, int F) {
    constexpr int E = 16 / sizeof(floatX);
    const size_t row = (size_t)blockIdx.x * F;
    floatX *gate = gate_up + 2 * row, *up = gate + F;
    for (int f = threadIdx.x * E; f < F; f += blockDim.x * E)
        swiglu_backward_pack<E>(gate + f, up + f, h + row + f, dh + row + f);
}

template <typename floatX> static void shape(int when, int N, int F, float amplitude) {
    const size_t n = (size_t)N * F;
    if (bench_shape<floatX>(when, "swiglu_forward", 3.0 * n * sizeof(floatX), 5.0 * n, "N %d F %d, g ~ %g", N,
                            F, amplitude)) {
        Tensor<floatX> h("h", n), gate_up("gate_up", 2 * n);
        gate_up.normal(amplitude);
        reference<floatX>([&](int b) { twin::swiglu_forward(h.twin(b), gate_up.host, N, F); });
        const Variant variants[] = {
            {0, "one thread per element", [&] {
                launch(swiglu_forward_kernel0<floatX>, CEIL_DIV(n, 256), 256, 0, h, gate_up, N, F);
            }},
            {1, "16 bytes per thread, fast e^x and division", [&] {
                launch(swiglu_forward_kernel1<floatX>, CEIL_DIV(n * sizeof(floatX) / 16, 256), 256, 0, h,
                       gate_up, N, F);
            }},
            {2, "a block per row: no division by F", [&] { swiglu_forward<floatX>(h, gate_up, N, F); },
             SHIPPED},
        };
        bench(variants);
    }
    if (bench_shape<floatX>(when, "swiglu_backward", 6.0 * n * sizeof(floatX), 10.0 * n, "N %d F %d, g ~ %g",
                            N, F, amplitude)) {
        Tensor<floatX> gate_up("gate_up", 2 * n), h("h", n), dh("dh", n);
        gate_up.judge_apart(2 * F, {{"dgate", 0, (size_t)F}, {"dup", (size_t)F, (size_t)2 * F}});
        gate_up.normal(amplitude), dh.normal(1);
        reference<floatX>([&](int b) { twin::swiglu_backward(gate_up.twin(b), h.twin(b), dh.host, N, F); });
        const Variant variants[] = {
            {0, "one thread per element", [&] {
                launch(swiglu_backward_kernel0<floatX>, CEIL_DIV(n, 256), 256, 0, gate_up, h, dh, N, F);
            }},
            {1, "a block per row, 16 bytes per thread", [&] {
                swiglu_backward<floatX>(gate_up, h, dh, N, F);
            }, SHIPPED},
        };
        bench(variants);
    }
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 3, 8, 1);
    shape<floatX>(CHECK, 5, 264, 3);
    shape<floatX>(CHECK, 2, 2056, 60);               // e^60: the sigmoid's ends
    shape<floatX>(CHECK, 2, 5000, 1);
}

int main(int argc, char **argv) {
    bench_begin("swiglu", argc, argv);
    shapes<float>();
    shapes<bf16>();
    shape<bf16>(MODEL, 256, 11008, 1);
    shape<bf16>(TIME, 16384, 11008, 1);
    shape<bf16>(TIME, 4095, 2056, 1);
    shape<float>(TIME, 4096, 11008, 1);
    return bench_end();
}
