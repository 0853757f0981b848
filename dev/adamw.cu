// adamw_update, AdamW with decoupled decay (Loshchilov & Hutter 2019):
//   g = grad gscale,  m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,  master = master shrink - rate m / (sqrt(v
//   vscale) + eps);
//   w (n) = master rounded to floatX (fp32: is master itself).  m, v are stored as floatM: fp32, or bf16
//   rounded at random
// bytes   per parameter 4 (grad) + 8 (master) + 16 (m, v; bf16: 8) + 2 (w) = 30 (22)        FLOPs 15
// floor   1 G parameters: 9.0 ms (6.6 ms) (memory)
// idea    elementwise: wide accesses, enough of them in flight
// result  modelled (H100; n 1 M, 31 MB, floor 9.4 us): kernels 0 and 2 9.4 us; 1 touches each sector of the
//         fp32 arrays twice (63 MB; the second time in the L1 cache, which the model leaves out). Measured:
//         not yet
#include "bench.cuh"

// ---- kernel 0: a thread per parameter ---------------------------------------------------------------------
template <typename floatX, typename floatM>
__global__ void adamw_update_kernel0(floatX *w, float *master, floatM *m, floatM *v, const float *grad,
                                     size_t n, AdamW a) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float g = grad[i] * a.gscale, m_i = a.b1 * to_float(m[i]) + (1 - a.b1) * g,
        v_i = a.b2 * to_float(v[i]) + (1 - a.b2) * g * g;
    const float p = master[i] * a.shrink - a.rate * m_i / (sqrtf(v_i * a.vscale) + a.eps);
    const uint32_t random = update_bits(a.key, a.first + i);
    m[i] = from_float<floatM>(sizeof(floatM) == 2 ? round_bf16_randomly(m_i, random) : m_i);
    v[i] = from_float<floatM>(sizeof(floatM) == 2 ? round_bf16_randomly(v_i, random >> 16) : v_i);
    master[i] = p, w[i] = from_float<floatX>(p);
}

// ---- kernel 1: eight, so that bf16 arrays are moved by 16 bytes too; twice the registers, and a warp's fp32
// accesses lie in two pieces
template <typename floatX, typename floatM>
__global__ void adamw_update_kernel1(floatX *w, float *master, floatM *m, floatM *v, const float *grad,
                                     size_t n, AdamW a) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i + 8 <= n) {
        float g[2][4], p[2][4], m_i[2][4], v_i[2][4];
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            widen(g[j], load<4>(grad + i + 4 * j));
            widen(p[j], load<4>(master + i + 4 * j));
            // the compiler may join two neighbouring 8-byte loads, but need not
            widen(m_i[j], load<4>(m + i + 4 * j));
            widen(v_i[j], load<4>(v + i + 4 * j));
        }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            for (int k = 0; k < 4; k++)
                adamw_step<floatM>(p[j][k], m_i[j][k], v_i[j][k], g[j][k], a, i + 4 * j + k);
            store(master + i + 4 * j, narrow<float>(p[j]));
            store(m + i + 4 * j, narrow<floatM>(m_i[j]));
            store(v + i + 4 * j, narrow<floatM>(v_i[j]));
            if ((const void *)w != (const void *)master) store(w + i + 4 * j, narrow<floatX>(p[j]));
        }
    } else {
        for (size_t j = i; j < n; j++) {
            float m_j = to_float(m[j]), v_j = to_float(v[j]);
            adamw_step<floatM>(master[j], m_j, v_j, grad[j], a, j);
            m[j] = from_float<floatM>(m_j), v[j] = from_float<floatM>(v_j),
            w[j] = from_float<floatX>(master[j]);
        }
    }
}

// ---- kernel 2, shipped: four parameters per thread: 16 bytes of fp32, 8 of bf16 per access ----------------
template <typename floatX, typename floatM>
__global__ void adamw_update_kernel2(floatX *w, float *master, floatM *m, floatM *v, const float *grad,
                                     size_t n, AdamW a) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float grad_i[4], master_i[4], m_i[4], v_i[4];
    widen(grad_i, load<4>(grad + i));
    widen(master_i, load<4>(master + i));
    widen(m_i, load<4>(m + i));
    widen(v_i, load<4>(v + i));
    for (int k = 0; k < 4; k++) adamw_step<floatM>(master_i[k], m_i[k], v_i[k], grad_i[k], a, i + k);
    store(master + i, narrow<float>(master_i));
    store(m + i, narrow<floatM>(m_i));
    store(v + i, narrow<floatM>(v_i));
    if ((const void *)w != (const void *)master) store(w + i, narrow<floatX>(master_i));
}

template <typename floatX, typename floatM> static void shape(int when, size_t n) {
    const double bytes = (12.0 + 4 * sizeof(floatM) + (is_bf16<floatX>() ? 2 : 0)) * n;
    if (!bench_shape<floatX>(when, "adamw_update", bytes, 15.0 * n, "n %zu, m and v in %s, weights in", n,
                             is_bf16<floatM>() ? "bf16" : "fp32")) return;
    const double lr = 1e-2, b1 = 0.9, b2 = 0.95, eps = 1e-8, decay = 0.1, scale = 0.5;
    const int step = 2;
    const uint32_t key = 12345;
    const size_t first = (size_t)7 << 30;          // beyond 32 bits, as in large models
    Tensor<float> master("master", n), grad("grad", n);
    Tensor<floatX> w("w", is_bf16<floatX>() ? n : 1);
    Tensor<floatM> m("m", n), v("v", n);
    master.normal(1), grad.normal(1), m.normal(0.1f), v.normal(0.1f), w.set(0);
    for (size_t i = 0; i < n; i++) v.host[i] = fabsf(v.host[i]);
    twin::precision(is_bf16<floatX>());
    twin::adamw_update(is_bf16<floatX>() ? (float *)w.twin(0) : master.twin(0), master.twin(0), m.twin(0),
                       v.twin(0), grad.host, n, lr, b1, b2, eps, decay, scale, step, is_bf16<floatM>(), key,
                       first);
    twin::precision(0);
    w.allow(2e-4);  // a value beside a rounding boundary may round the other way: one ulp on few elements
    if (is_bf16<floatM>()) m.allow(2e-4), v.allow(2e-4);
    floatX *w_out = is_bf16<floatX>() ? (floatX *)w : (floatX *)(void *)(float *)master;
    const AdamW a = {(float)b1, (float)b2, (float)eps, (float)(lr / (1 - pow(b1, step))),
                     (float)(1 / (1 - pow(b2, step))), (float)(1 - lr * decay), (float)scale, key, first};
    const Variant variants[] = {
        {0, "one thread per parameter", [&] {
            launch(adamw_update_kernel0<floatX, floatM>, CEIL_DIV(n, 256), 256, 0, w_out, master, m, v, grad,
                   n, a);
        }},
        {2, "four parameters per thread", [&] {
            adamw_update<floatX, floatM>(w_out, master, m, v, grad, n, lr, b1, b2, eps, decay, scale, step,
                                         key, first);
        }, SHIPPED},
        {1, "eight parameters per thread", [&] {
            launch(adamw_update_kernel1<floatX, floatM>, CEIL_DIV(n, 8 * 256), 256, 0, w_out, master, m, v,
                   grad, n, a);
        }},
    };
    bench(variants);
}

int main(int argc, char **argv) {
    bench_begin("adamw", argc, argv);
    const size_t sizes[] = {4, 12, 1024, 4100};
    for (size_t n : sizes) {
        shape<float, float>(CHECK, n);
        shape<float, bf16>(CHECK, n);
        shape<bf16, float>(CHECK, n);
        shape<bf16, bf16>(CHECK, n);
    }
    shape<bf16, float>(MODEL, 1 << 20);
    shape<bf16, float>(TIME, 64 << 20);
    shape<bf16, bf16>(TIME, (64 << 20) - 4);
    return bench_end();
}
