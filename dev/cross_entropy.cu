// cross_entropy: nll (N) = log(sum_v e^x_v) - x_target, 0 where the target is IGNORED.  weight (N), unless
// NULL = losses only:
//   the logits (N,Vp) become the gradient weight_n (softmax - onehot), 0 where ignored. Columns V..Vp-1 are
//   padding: no part of the softmax, gradient 0
// is_top (N), unless NULL: 1 where no logit of the row is above the target's, 0 where ignored
// add_sum: sum (1) += nll (N), each times its weight if there are weights, or the partials of sum_of_squares,
// in double, in a
//   fixed order
// bytes   2·N·Vp in + 2·N·Vp out = 2.10 GB for N 16384, V 32000
// FLOPs   ~8·N·V, and two SFU operations per element (283 us)
// floor   626 us (memory)
// idea    softmax needs the maximum, the sum and the values: three walks over a row. A running maximum with a
//         running sum makes them two (Milakov & Gimelshein 2018), and a row that stays in shared memory is
//         read from DRAM once
// limits  Vp % 8 == 0 (fp32: 4)
// result  modelled (H100; N 64, V 32000, 8.2 MB compulsory, floor 2.4 us), MB in sectors and us: kernel 0 262
//         and 177; 1 16.4 and 8.2; 2 12.3 and 3.8; 3 8.2 and 2.8. Measured: not yet
#include "bench.cuh"

// ---- kernel 0: a thread per row, three walks --------------------------------------------------------------
template <typename floatX>
__global__ void cross_entropy_kernel0(float *nll, uint8_t *is_top, floatX *logits, const int *targets,
                                      const double *weight, int N, int V, int Vp) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    floatX *row = logits + (size_t)n * Vp;
    const int target = targets[n];
    const float weight_n = weight ? (float)weight[n] : 0;
    float top = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++) top = fmaxf(top, to_float(row[v]));
    for (int v = 0; v < V; v++) sum += expf(to_float(row[v]) - top);
    nll[n] = target == IGNORED ? 0 : logf(sum) + top - to_float(row[target]);
    if (is_top) is_top[n] = target != IGNORED && to_float(row[target]) >= top;
    if (!weight) return;
    for (int v = 0; v < Vp; v++) {
        const float p = v < V ? expf(to_float(row[v]) - top) / sum : 0;
        row[v] = from_float<floatX>(target == IGNORED ? 0 : weight_n * (p - (v == target)));
    }
}

__device__ float block_max(float x) {
    __shared__ float part[32];
    const int lane = thread_in_block() % 32;
    x = warp_max(x);
    if (lane == 0) part[thread_in_block() / 32] = x;
    __syncthreads();
    x = warp_max(part[lane < threads_in_block() / 32 ? lane : 0]);
    __syncthreads();
    return x;
}

// ---- kernel 1: a block per row, three walks with block-wide reductions between them -----------------------
template <typename floatX>
__global__ void cross_entropy_kernel1(float *nll, uint8_t *is_top, floatX *logits, const int *targets,
                                      const double *weight, int V, int Vp) {
    floatX *row = logits + (size_t)blockIdx.x * Vp;
    const int target = targets[blockIdx.x];
    const float weight_n = weight ? (float)weight[blockIdx.x] : 0;
    float top = -INFINITY, sum = 0;
    for (int v = threadIdx.x; v < V; v += blockDim.x) top = fmaxf(top, to_float(row[v]));
    top = block_max(top);
    for (int v = threadIdx.x; v < V; v += blockDim.x) sum += expf(to_float(row[v]) - top);
    sum = block_sum(sum);
    if (threadIdx.x == 0) nll[blockIdx.x] = target == IGNORED ? 0 : logf(sum) + top - to_float(row[target]);
    if (threadIdx.x == 0 && is_top) is_top[blockIdx.x] = target != IGNORED && to_float(row[target]) >= top;
    __syncthreads();                                            // x_target is read before it is overwritten
    if (!weight) return;
    for (int v = threadIdx.x; v < Vp; v += blockDim.x) {
        const float p = v < V ? expf(to_float(row[v]) - top) / sum : 0;
        row[v] = from_float<floatX>(target == IGNORED ? 0 : weight_n * (p - (v == target)));
    }
}

// ---- kernel 2: two walks: each thread has its own maximum, and its sum shrinks when that grows; 16 bytes
// per access. The second walk finds a row of 64 KB in the L2 cache, if not too many other rows came between
template <typename floatX>
__global__ void cross_entropy_kernel2(float *nll, uint8_t *is_top, floatX *logits, const int *targets,
                                      const double *weight, int V, int Vp) {
    constexpr int E = 16 / sizeof(floatX);
    floatX *row = logits + (size_t)blockIdx.x * Vp;
    const int target = targets[blockIdx.x];
    const float weight_n = weight ? (float)weight[blockIdx.x] : 0;
    float top = -FLT_MAX, sum = 0, x[E];
    for (int v = threadIdx.x * E; v < Vp; v += blockDim.x * E) {
        widen(x, load<E>(row + v));
        float higher = top;
        for (int k = 0; k < E; k++) if (v + k < V) higher = fmaxf(higher, x[k]);
        sum *= __expf(top - higher);
        for (int k = 0; k < E; k++) if (v + k < V) sum += __expf(x[k] - higher);
        top = higher;
    }
    const float row_top = block_max(top), total = block_sum(sum * __expf(top - row_top));
    if (threadIdx.x == 0)
        nll[blockIdx.x] = target == IGNORED ? 0 : logf(total) + row_top - to_float(row[target]);
    if (threadIdx.x == 0 && is_top) is_top[blockIdx.x] = target != IGNORED && to_float(row[target]) >= row_top;
    __syncthreads();
    if (!weight) return;
    for (int v = threadIdx.x * E; v < Vp; v += blockDim.x * E) {
        widen(x, load<E>(row + v));
        for (int k = 0; k < E; k++) x[k] = target == IGNORED || v + k >= V ? 0
            : weight_n * (__expf(x[k] - row_top) / total - (v + k == target));
        store(row + v, narrow<floatX>(x));
    }
}

// ---- kernel 3, shipped: the row is copied to shared memory asynchronously, all of it in flight at once, and
// read from DRAM once
template <typename floatX>
__global__ void __launch_bounds__(2 * CLASSIFIER_THREADS) cross_entropy_kernel3(float *nll, uint8_t *is_top,
        floatX *logits, const int *targets, const double *weight, int V, int Vp, int cached) {
    constexpr int E = 16 / sizeof(floatX);
    __shared__ float tops[32], sums[32];
    // the first `cached` columns; the others in place
    floatX *cache = shared_memory<floatX>(), *row = logits + (size_t)blockIdx.x * Vp;
    const int target = targets[blockIdx.x], lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int first = threadIdx.x * E, step = blockDim.x * E;
    if (target == IGNORED) {
        if (threadIdx.x == 0) nll[blockIdx.x] = 0;
        if (threadIdx.x == 0 && is_top) is_top[blockIdx.x] = 0;
        if (weight) for (int v = first; v < Vp; v += step) store(row + v, Pack<floatX, E>{});
        return;
    }
    for (int v = first; v < cached; v += step) cp_async_16(cache + v, row + v);
    cp_async_commit();
    const float x_target = threadIdx.x == 0 ? to_float(row[target]) : 0;
    cp_async_wait<0>();
    float top = -FLT_MAX, sum = 0;                          // of this thread's columns: sum of e^(x - top)
    auto add = [&](const floatX *from, int v) {
        float x[E], higher = top;
        load_logits(x, from, v, V);
        for (int k = 0; k < E; k++) higher = fmaxf(higher, x[k]);
        sum *= exp_approx(top - higher);
        for (int k = 0; k < E; k++) sum += exp_approx(x[k] - higher);
        top = higher;
    };
    int v = first;
    for (; v < cached; v += step) add(cache, v);
    #pragma unroll 4
    for (; v < Vp; v += step) add(row, v);
    const float warp_top = warp_max(top), warp_total = warp_sum(sum * exp_approx(top - warp_top));
    if (lane == 0) tops[threadIdx.x / 32] = warp_top, sums[threadIdx.x / 32] = warp_total;
    __syncthreads();
    const float some_top = lane < warps ? tops[lane] : -FLT_MAX, row_top = warp_max(some_top);
    const float total = warp_sum(lane < warps ? sums[lane] * exp_approx(some_top - row_top) : 0);
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(total) + row_top - x_target;
    if (threadIdx.x == 0 && is_top) is_top[blockIdx.x] = x_target >= row_top;
    if (!weight) return;
    const float weight_n = (float)weight[blockIdx.x], factor = weight_n / total;
    auto differentiate = [&](const floatX *from, int v) {
        float x[E];
        load_logits(x, from, v, V);
        for (int k = 0; k < E; k++) x[k] = exp_approx(x[k] - row_top) * factor;
        if (v <= target && target < v + E) for (int k = 0; k < E; k++) if (v + k == target) x[k] -= weight_n;
        store(row + v, narrow<floatX>(x));
    };
    v = first;
    for (; v < cached; v += step) differentiate(cache, v);
    for (; v < Vp; v += step) differentiate(row, v);
}

// ---- add_sum, kernel 0: one thread ------------------------------------------------------------------------
__global__ void add_sum_kernel0(double *sum, const float *nll, const double *weight, int N) {
    for (int n = 0; n < N; n++) *sum += weight ? weight[n] * nll[n] : nll[n];
}

// ---- kernel 1, shipped: one block -------------------------------------------------------------------------
template <typename Real>
__global__ void add_sum_kernel1(double *sum, const Real *x, const double *weight, int n) {
    double mine = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine += weight ? weight[i] * x[i] : (double)x[i];
    mine = block_sum(mine);
    if (threadIdx.x == 0) *sum += mine;
}

enum { NONE, SOME, ALL };               // targets that are ignored
// weights of rows: there are none; one for all; another for each, negative and zero too
enum { LOSSES, EQUAL, VARIED };

template <typename floatX>
static void shape(int when, int N, int V, float amplitude, int weights, double scale, int ignored) {
    const char *const ignored_text[] = {"", " some ignored", " all ignored"},
        *const weights_text[] = {" loss only", "", " weighted"};
    const int Vp = CEIL_DIV(V, 128) * 128;
    const size_t n = (size_t)N * Vp;
    if (!bench_shape<floatX>(when, "cross_entropy",
                             (weights == LOSSES ? 1.0 : 2.0) * n * sizeof(floatX) + 8.0 * N, 8.0 * n,
                             "N %d V %d%s%s", N, V, weights_text[weights], ignored_text[ignored])) return;
    Tensor<floatX> logits("logits", n);
    Tensor<float> nll("nll", N);
    Tensor<uint8_t> is_top("is_top", N);
    Tensor<int> targets("targets", N);
    Tensor<double> weight("weight", N);
    logits.normal(amplitude);
    for (int i = 0; i < N; i++) {
        const bool ignore = ignored == ALL || (ignored == SOME && i % 3 == 1);
        targets.host[i] = ignore ? IGNORED : i == 0 ? V - 1 : i == 2 ? 0 : (int)(i * 2654435761u % V);
        weight.host[i] = scale * (weights == VARIED ? i % 4 - 1 : 1);
        if (i % 4 == 3 && !ignore) logits.host[(size_t)i * Vp + targets.host[i]] = 5 * amplitude;   // likeliest
        for (int v = V; v < Vp; v++) logits.host[(size_t)i * Vp + v] = 50;      // padding must not count
    }
    reference<floatX>([&](int b) {
        std::vector<float> packed((size_t)N * V);                               // the twin has no padding
        std::vector<double> loss(N);
        std::vector<unsigned char> first(N);
        for (int i = 0; i < N; i++) std::copy(logits.host + (size_t)i * Vp, logits.host + (size_t)i * Vp + V,
                                              packed.data() + (size_t)i * V);
        twin::cross_entropy(loss.data(), first.data(), packed.data(), targets.host,
                            weights == LOSSES ? NULL : weight.host, N, V);
        std::copy(loss.begin(), loss.end(), nll.twin(b));
        std::copy(first.begin(), first.end(), is_top.twin(b));
        float *gradient = logits.twin(b);
        if (weights == LOSSES) return;
        for (size_t i = 0; i < n; i++) gradient[i] = (int)(i % Vp) < V ? packed[i / Vp * V + i % Vp] : 0;
    });
    if (weights == LOSSES) logits.allow(0);                                     // not touched
    is_top.set(7), is_top.allow(0);
    const double *w = weights == LOSSES ? NULL : (double *)weight;
    const Variant variants[] = {
        {0, "one thread per row, three walks", [&] {
            launch(cross_entropy_kernel0<floatX>, CEIL_DIV(N, 32), 32, 0, nll, is_top, logits, targets, w, N, V,
                   Vp);
        }},
        {1, "one block per row, three walks", [&] {
            launch(cross_entropy_kernel1<floatX>, N, 512, 0, nll, is_top, logits, targets, w, V, Vp);
        }},
        {2, "two walks: maximum and sum together; 16-byte accesses", [&] {
            launch(cross_entropy_kernel2<floatX>, N, 512, 0, nll, is_top, logits, targets, w, V, Vp);
        }},
        {3, "the row stays in shared memory, copied asynchronously", [&] {
            cross_entropy<floatX>(nll, is_top, logits, targets, w, N, V, Vp);
        }, SHIPPED},
    };
    bench(variants);
}

static void losses_shape(int when, int N, int weights) {
    if (!bench_shape<float>(when, "add_sum", (weights == LOSSES ? 4.0 : 12.0) * N + 16, N, "N %d%s", N,
                            weights == LOSSES ? "" : " weighted")) return;
    Tensor<float> nll("nll", N);
    Tensor<double> sum("sum", 1), weight("weight", N);
    nll.normal(1, 5), sum.set(3);
    for (int i = 0; i < N; i++) {
        weight.host[i] = i % 4 - 1;
        *sum.twin(0) += weights == LOSSES ? (double)nll.host[i] : weight.host[i] * nll.host[i];
    }
    sum.allow(1e-12);
    const double *w = weights == LOSSES ? NULL : (double *)weight;
    const Variant variants[] = {
        {0, "one thread", [&] { launch(add_sum_kernel0, 1, 1, 0, sum, nll, w, N); }},
        {1, "one block", [&] { add_sum(sum, (const float *)nll, w, N); }, SHIPPED},
    };
    bench(variants);
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 5, 3, 2, VARIED, 0.01, SOME);
    shape<floatX>(CHECK, 4, 257, 2, EQUAL, 0.01, NONE);
    shape<floatX>(CHECK, 4, 509, 2, EQUAL, 0.01, ALL);
    shape<floatX>(CHECK, 3, 5000, 5, LOSSES, 0, NONE);
    shape<floatX>(CHECK, 7, 700, 3, VARIED, 0.25, NONE);
    shape<floatX>(CHECK, 2, 32000, 2, EQUAL, 1, NONE);
    shape<floatX>(CHECK, 2, 151936, 2, EQUAL, 1, NONE);  // more than shared memory holds
}

int main(int argc, char **argv) {
    bench_begin("cross_entropy", argc, argv);
    shapes<float>();
    shapes<bf16>();
    losses_shape(CHECK, 1, LOSSES);
    losses_shape(CHECK, 3001, LOSSES);
    losses_shape(CHECK, 3001, VARIED);
    shape<bf16>(MODEL, 64, 32000, 2, EQUAL, 1, NONE);
    losses_shape(MODEL, 2048, VARIED);
    shape<bf16>(TIME, 16384, 32000, 2, EQUAL, 1, NONE);
    shape<bf16>(TIME, 2048, 151936, 2, EQUAL, 1, NONE);
    shape<bf16>(TIME, 4095, 50257, 2, VARIED, 1, SOME);
    losses_shape(TIME, 16384, VARIED);
    return bench_end();
}
