// qk_norm_rope_forward, the q and k heads y of qkv (N,(H+2K)D) in place:
//   with norm (Qwen3): qk_raw (N,(H+K)D) = y, qk_rstd (N,H+K) = r = (mean y^2 + eps)^(-1/2), y *= r w (w =
//   q_norm or k_norm (D)); then the pair (y_i, y_{i+D/2}) turns by the angle of position n % T: cosine, sine
//   (T,D/2). v is not touched
// qk_norm_rope_backward: the way back for dqkv, in place; dq_norm, dk_norm (D) +=
// bytes   2·N·(H+K)·D in + out + 4·N·D of angles (norm: + 2·N·(H+K)·D of qk_raw) = 160 MB for N 16384, H 16,
//         K 2, D 128
// FLOPs   ~3·N·(H+K)·D, with norm ~8                    floor 48 us (memory)
// idea    the two halves of a pair are D/2 apart and must meet in one thread; the angles of a row serve all
//         its heads
// limits  D % 8 == 0, D <= 256 (shipped)
// result  modelled (H100; N 256, H 16, K 2, D 128 with norm, 3.7 MB compulsory, floor 1.1 us), MB in sectors
//         and us:
//         forward kernel 0 78 and 23; 1 8.4 and 2.5; 2 3.8 and 1.8.  backward 0 103 and 38; 1 16 and 12; 2
//         3.9 and 4.8 (few blocks). Measured: not yet
#include "bench.cuh"

// ---- forward, kernel 0: a thread per head -----------------------------------------------------------------
template <typename floatX>
__global__ void qk_norm_rope_forward_kernel0(floatX *qkv, floatX *qk_raw, float *qk_rstd,
                                             const floatX *q_norm, const floatX *k_norm, const float *cosine,
                                             const float *sine, float eps, int H, int K, int D, int N,
                                             int T) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i / (H + K), h = i % (H + K);
    if (n >= N) return;
    floatX *x = qkv + ((size_t)n * (H + 2 * K) + h) * D;
    const floatX *w = h < H ? q_norm : k_norm;
    float squares = 0, r = 1;
    if (q_norm) {
        for (int d = 0; d < D; d++)
            squares += to_float(x[d]) * to_float(x[d]), qk_raw[(size_t)i * D + d] = x[d];
        qk_rstd[i] = r = rsqrtf(squares / D + eps);
    }
    for (int d = 0; d < D / 2; d++) {
        const float c = cosine[(size_t)(n % T) * (D / 2) + d], s = sine[(size_t)(n % T) * (D / 2) + d];
        float a = to_float(x[d]), b = to_float(x[d + D / 2]);
        if (q_norm) a *= r * to_float(w[d]), b *= r * to_float(w[d + D / 2]);
        x[d] = from_float<floatX>(a * c - b * s);
        x[d + D / 2] = from_float<floatX>(b * c + a * s);
    }
}

// ---- kernel 1: a warp per head: neighbouring lanes, neighbouring pairs. 2-byte accesses, and each head
// reads the angles of its row again
template <typename floatX>
__global__ void qk_norm_rope_forward_kernel1(floatX *qkv, floatX *qk_raw, float *qk_rstd,
                                             const floatX *q_norm, const floatX *k_norm, const float *cosine,
                                             const float *sine, float eps, int H, int K, int D, int N,
                                             int T) {
    const int i = blockIdx.x * blockDim.y + threadIdx.y, n = i / (H + K), h = i % (H + K);
    if (n >= N) return;
    floatX *x = qkv + ((size_t)n * (H + 2 * K) + h) * D;
    const floatX *w = h < H ? q_norm : k_norm;
    float squares = 0, r = 1;
    if (q_norm) {
        for (int d = threadIdx.x; d < D; d += 32)
            squares += to_float(x[d]) * to_float(x[d]), qk_raw[(size_t)i * D + d] = x[d];
        r = rsqrtf(warp_sum(squares) / D + eps);
        if (threadIdx.x == 0) qk_rstd[i] = r;
    }
    for (int d = threadIdx.x; d < D / 2; d += 32) {
        const float c = cosine[(size_t)(n % T) * (D / 2) + d], s = sine[(size_t)(n % T) * (D / 2) + d];
        float a = to_float(x[d]), b = to_float(x[d + D / 2]);
        if (q_norm) a *= r * to_float(w[d]), b *= r * to_float(w[d + D / 2]);
        x[d] = from_float<floatX>(a * c - b * s);
        x[d + D / 2] = from_float<floatX>(b * c + a * s);
    }
}

// ---- kernel 2, shipped: a warp per row; four neighbouring elements of both halves per lane, several heads
// at a time, angles read once
template <typename floatX, bool NORM>
__global__ void qk_norm_rope_forward_kernel2(floatX *qkv, floatX *qk_raw, float *qk_rstd,
        const floatX *q_norm, const floatX *k_norm, const float *cosine, const float *sine, float eps, int H,
        int K, int D, int lanes,
        int N, int T) {
    constexpr int AHEAD = NORM || sizeof(floatX) == 4 ? 2 : 4;  // heads that a lane reads at a time
    floatX *w_shared = shared_memory<floatX>();                 // (2,D) if NORM
    const int lane = threadIdx.x % 32, head = lane / lanes, heads = 32 / lanes, i = lane % lanes * 4;
    const int half = D / 2;
    const bool active = i < half;
    if (NORM) {
        for (int d = threadIdx.x * 4; d < 2 * D; d += blockDim.x * 4)
            store(w_shared + d, load<4>(d < D ? q_norm + d : k_norm + d - D));
        __syncthreads();
    }
    for (int n = blockIdx.x * ROPE_WARPS + threadIdx.x / 32; n < N; n += gridDim.x * ROPE_WARPS) {
        floatX *y = qkv + (size_t)n * (H + 2 * K) * D + i;
        const size_t angle = (size_t)(n % T) * half + i;
        float cosine_i[4], sine_i[4];
        widen(cosine_i, load_if<4>(active, cosine + angle));
        widen(sine_i, load_if<4>(active, sine + angle));
        for (int h0 = 0; h0 < H + K; h0 += AHEAD * heads) {
            Pack<floatX, 4> lo[AHEAD], hi[AHEAD];
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int h = h0 + u * heads + head;
                lo[u] = load_if<4>(active && h < H + K, y + h * D);
                hi[u] = load_if<4>(active && h < H + K, y + h * D + half);
            }
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int h = h0 + u * heads + head;
                const bool here = active && h < H + K;
                float y_lo[4], y_hi[4], w_lo[4], w_hi[4];
                widen(y_lo, lo[u]);
                widen(y_hi, hi[u]);
                if (NORM) {
                    float squares = 0;
                    for (int k = 0; k < 4; k++) squares += y_lo[k] * y_lo[k] + y_hi[k] * y_hi[k];
                    const float r = rsqrtf(warp_sum(squares, lanes) / D + eps);
                    if (here) {
                        const size_t at = (size_t)n * (H + K) + h;
                        const floatX *w = w_shared + (h < H ? 0 : D) + i;
                        store(qk_raw + at * D + i, lo[u]);
                        store(qk_raw + at * D + i + half, hi[u]);
                        if (i == 0) qk_rstd[at] = r;
                        widen(w_lo, load<4>(w));
                        widen(w_hi, load<4>(w + half));
                        for (int k = 0; k < 4; k++) y_lo[k] *= r * w_lo[k], y_hi[k] *= r * w_hi[k];
                    }
                }
                if (!here) continue;
                for (int k = 0; k < 4; k++) {
                    const float turned = y_lo[k] * cosine_i[k] - y_hi[k] * sine_i[k];
                    y_hi[k] = y_hi[k] * cosine_i[k] + y_lo[k] * sine_i[k];
                    y_lo[k] = turned;
                }
                store(y + h * D, narrow<floatX>(y_lo));
                store(y + h * D + half, narrow<floatX>(y_hi));
            }
        }
    }
}

// ---- backward, kernel 0: first dq_norm and dk_norm, a thread per column over all rows and heads; then a
// thread per head
template <typename floatX>
__device__ void turn_back(float *a, float *b, const floatX *dx, const float *cosine, const float *sine, int d,
                          int D) {
    const float x = to_float(dx[d]), y = to_float(dx[d + D / 2]);
    *a = x * cosine[d] + y * sine[d];
    *b = y * cosine[d] - x * sine[d];
}

template <typename floatX>
__global__ void qk_norm_rope_backward_dw_kernel0(float *dq_norm, float *dk_norm, const floatX *dqkv,
                                                 const floatX *qk_raw, const float *qk_rstd,
                                                 const float *cosine, const float *sine, int H, int K, int D,
                                                 int N, int T) {
    const int d = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y == 0 ? 0 : H;
    const int end = blockIdx.y == 0 ? H : H + K;
    if (d >= D / 2) return;
    float lo = 0, hi = 0, a, b;
    for (int n = 0; n < N; n++) for (int h = first; h < end; h++) {
        const size_t i = (size_t)n * (H + K) + h, angle = (size_t)(n % T) * (D / 2);
        turn_back(&a, &b, dqkv + ((size_t)n * (H + 2 * K) + h) * D, cosine + angle, sine + angle, d, D);
        lo += a * (to_float(qk_raw[i * D + d]) * qk_rstd[i]);
        hi += b * (to_float(qk_raw[i * D + d + D / 2]) * qk_rstd[i]);
    }
    float *dw = blockIdx.y == 0 ? dq_norm : dk_norm;
    dw[d] += lo, dw[d + D / 2] += hi;
}

template <typename floatX>
__global__ void qk_norm_rope_backward_kernel0(floatX *dqkv, const floatX *qk_raw, const float *qk_rstd,
                                              const floatX *q_norm, const floatX *k_norm,
                                              const float *cosine, const float *sine, int H, int K, int D,
                                              int N, int T) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = i / (H + K), h = i % (H + K), half = D / 2;
    if (n >= N) return;
    floatX *dx = dqkv + ((size_t)n * (H + 2 * K) + h) * D;
    const floatX *w = h < H ? q_norm : k_norm, *raw = qk_raw + (size_t)i * D;
    cosine += (size_t)(n % T) * half, sine += (size_t)(n % T) * half;
    float mean = 0, r = q_norm ? qk_rstd[i] : 1, a, b;
    if (q_norm) for (int d = 0; d < half; d++) {
        turn_back(&a, &b, dx, cosine, sine, d, D);
        mean += a * to_float(w[d]) * to_float(raw[d]) * r / D;
        mean += b * to_float(w[d + half]) * to_float(raw[d + half]) * r / D;
    }
    for (int d = 0; d < half; d++) {
        turn_back(&a, &b, dx, cosine, sine, d, D);
        if (q_norm) {
            a = r * (a * to_float(w[d]) - to_float(raw[d]) * r * mean);
            b = r * (b * to_float(w[d + half]) - to_float(raw[d + half]) * r * mean);
        }
        dx[d] = from_float<floatX>(a), dx[d + half] = from_float<floatX>(b);
    }
}

// ---- kernel 1: a warp per head for dqkv; dq_norm and dk_norm as before ------------------------------------
template <typename floatX>
__global__ void qk_norm_rope_backward_kernel1(floatX *dqkv, const floatX *qk_raw, const float *qk_rstd,
                                              const floatX *q_norm, const floatX *k_norm,
                                              const float *cosine, const float *sine, int H, int K, int D,
                                              int N, int T) {
    const int i = blockIdx.x * blockDim.y + threadIdx.y, n = i / (H + K), h = i % (H + K), half = D / 2;
    if (n >= N) return;
    floatX *dx = dqkv + ((size_t)n * (H + 2 * K) + h) * D;
    const floatX *w = h < H ? q_norm : k_norm, *raw = qk_raw + (size_t)i * D;
    cosine += (size_t)(n % T) * half, sine += (size_t)(n % T) * half;
    float mean = 0, r = q_norm ? qk_rstd[i] : 1, a, b;
    if (q_norm) for (int d = threadIdx.x; d < half; d += 32) {
        turn_back(&a, &b, dx, cosine, sine, d, D);
        mean += a * to_float(w[d]) * to_float(raw[d]) * r / D;
        mean += b * to_float(w[d + half]) * to_float(raw[d + half]) * r / D;
    }
    mean = warp_sum(mean);
    for (int d = threadIdx.x; d < half; d += 32) {
        turn_back(&a, &b, dx, cosine, sine, d, D);
        if (q_norm) {
            a = r * (a * to_float(w[d]) - to_float(raw[d]) * r * mean);
            b = r * (b * to_float(w[d + half]) - to_float(raw[d + half]) * r * mean);
        }
        dx[d] = from_float<floatX>(a), dx[d + half] = from_float<floatX>(b);
    }
}

// ---- kernel 2, shipped: the forward's layout; a lane sees the same 8 elements of every head and sums their
// weight gradients in registers
template <typename floatX, bool NORM>
__global__ void qk_norm_rope_backward_kernel2(floatX *dqkv, float *partials, const floatX *qk_raw,
        const float *qk_rstd, const floatX *q_norm, const floatX *k_norm, const float *cosine,
        const float *sine,
        int H, int K, int D, int lanes, int N, int T) {
    constexpr int AHEAD = NORM || sizeof(floatX) == 4 ? 2 : 4;  // heads that a lane reads at a time
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = lane / lanes, heads = 32 / lanes, i = lane % lanes * 4, half = D / 2;
    const bool active = i < half;
    float dw[4][4] = {};                                        // q: lower half, upper half; k: the same
    for (int n = blockIdx.x * ROPE_WARPS + warp; n < N; n += gridDim.x * ROPE_WARPS) {
        const size_t angle = (size_t)(n % T) * half + i;
        float cosine_i[4], sine_i[4];
        widen(cosine_i, load_if<4>(active, cosine + angle));
        widen(sine_i, load_if<4>(active, sine + angle));
        #pragma unroll
        for (int part = 0; part < 2; part++) {                  // q, k
            const int count = part == 0 ? H : K, first = part == 0 ? 0 : H;
            const size_t at = (size_t)n * (H + K) + first;
            const floatX *w = part == 0 ? q_norm : k_norm;
            floatX *dy = dqkv + ((size_t)n * (H + 2 * K) + first) * D + i;
            float w_lo[4], w_hi[4];
            if (NORM) widen(w_lo, load_if<4>(active, w + i));
            if (NORM) widen(w_hi, load_if<4>(active, w + half + i));
            for (int h0 = 0; h0 < count; h0 += AHEAD * heads) {
                Pack<floatX, 4> lo[AHEAD], hi[AHEAD], raw_lo[AHEAD], raw_hi[AHEAD];
                float rstd[AHEAD];
                #pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const int h = h0 + u * heads + head;
                    const bool here = active && h < count;
                    lo[u] = load_if<4>(here, dy + h * D);
                    hi[u] = load_if<4>(here, dy + h * D + half);
                    if (!NORM) continue;
                    raw_lo[u] = load_if<4>(here, qk_raw + (at + h) * D + i);
                    raw_hi[u] = load_if<4>(here, qk_raw + (at + h) * D + i + half);
                    rstd[u] = here ? qk_rstd[at + h] : 0;
                }
                #pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const int h = h0 + u * heads + head;
                    float e_lo[4], e_hi[4];
                    widen(e_lo, lo[u]);
                    widen(e_hi, hi[u]);
                    for (int k = 0; k < 4; k++) {
                        const float turned = e_lo[k] * cosine_i[k] + e_hi[k] * sine_i[k];
                        e_hi[k] = e_hi[k] * cosine_i[k] - e_lo[k] * sine_i[k];
                        e_lo[k] = turned;
                    }
                    if (NORM) {
                        float n_lo[4], n_hi[4], g_lo[4], g_hi[4], gn = 0, r = rstd[u];
                        widen(n_lo, raw_lo[u]);
                        widen(n_hi, raw_hi[u]);
                        for (int k = 0; k < 4; k++) {
                            n_lo[k] *= r, n_hi[k] *= r;
                            dw[2 * part][k] += e_lo[k] * n_lo[k], dw[2 * part + 1][k] += e_hi[k] * n_hi[k];
                            g_lo[k] = e_lo[k] * w_lo[k], g_hi[k] = e_hi[k] * w_hi[k];
                            gn += g_lo[k] * n_lo[k] + g_hi[k] * n_hi[k];
                        }
                        const float mean = warp_sum(gn, lanes) / D;
                        for (int k = 0; k < 4; k++) {
                            e_lo[k] = r * (g_lo[k] - n_lo[k] * mean);
                            e_hi[k] = r * (g_hi[k] - n_hi[k] * mean);
                        }
                    }
                    if (!active || h >= count) continue;
                    store(dy + h * D, narrow<floatX>(e_lo));
                    store(dy + h * D + half, narrow<floatX>(e_hi));
                }
            }
        }
    }
    if constexpr (NORM) {
        for (int q = 0; q < 4; q++) for (int k = 0; k < 4; k++)  // over the heads that the warp has at a time
            for (int offset = lanes; offset < 32; offset *= 2)
                dw[q][k] += __shfl_xor_sync(0xFFFFFFFFu, dw[q][k], offset);
        __shared__ __align__(16) float sums[ROPE_WARPS][4][128];
        if (active && head == 0) for (int q = 0; q < 4; q++) store(sums[warp][q] + i, narrow<float>(dw[q]));
        __syncthreads();
        for (int d = threadIdx.x; d < 4 * 128; d += blockDim.x) {
            if (d % 128 >= half) continue;
            float total = 0;
            for (int j = 0; j < ROPE_WARPS; j++) total += sums[j][d / 128][d % 128];
            partials[(size_t)blockIdx.x * 2 * D + d / 128 * half + d % 128] = total;
        }
    }
}

template <typename floatX> static void shape(int when, int B, int T, int H, int K, int D, int norm) {
    const int N = B * T, W = (H + 2 * K) * D, heads = N * (H + K);
    const float eps = 1e-5f;
    const size_t n = (size_t)N * W, n_qk = (size_t)heads * D;
    const double bytes = (2.0 + (norm != 0)) * n_qk * sizeof(floatX) + 4.0 * T * D + (norm ? 4.0 * heads : 0),
        flops = (norm ? 8.0 : 3.0) * n_qk;
    std::vector<float> angles[2] = {std::vector<float>((size_t)T * D / 2),
                                    std::vector<float>((size_t)T * D / 2)};
    twin::rope_table_sizes(angles[0].data(), angles[1].data(), D, T);

    if (bench_shape<floatX>(when, "qk_norm_rope_forward", bytes, flops, "B %d T %d H %d K %d D %d%s", B, T, H,
                            K, D, norm ? " norm" : "")) {
        Tensor<floatX> qkv("qkv", n), raw("qk_raw", n_qk), q_norm("q_norm", D), k_norm("k_norm", D);
        Tensor<float> rstd("qk_rstd", heads), cosine("cosine", angles[0].size()),
            sine("sine", angles[1].size());
        qkv.judge_apart(W, {{"q", 0, (size_t)H * D}, {"k", (size_t)H * D, (size_t)(H + K) * D},
                            {"v", (size_t)(H + K) * D, (size_t)W}});
        qkv.normal(1), q_norm.normal(0.3f, 1), k_norm.normal(0.3f, 1);
        std::copy(angles[0].begin(), angles[0].end(), cosine.host);
        std::copy(angles[1].begin(), angles[1].end(), sine.host);
        reference<floatX>([&](int b) {
            twin::qk_norm_rope_forward(qkv.twin(b), norm ? raw.twin(b) : NULL, norm ? rstd.twin(b) : NULL,
                                       norm ? q_norm.host : NULL, norm ? k_norm.host : NULL, cosine.host,
                                       sine.host, eps,
                                       H, K, D, N, T);
        });
        floatX *qn = norm ? (floatX *)q_norm : NULL, *kn = norm ? (floatX *)k_norm : NULL;
        const Variant variants[] = {
            {0, "one thread per head", [&] {
                launch(qk_norm_rope_forward_kernel0<floatX>, CEIL_DIV(heads, 128), 128, 0, qkv, raw, rstd, qn,
                       kn, cosine, sine, eps, H, K, D, N, T);
            }},
            {1, "one warp per head", [&] {
                launch(qk_norm_rope_forward_kernel1<floatX>, CEIL_DIV(heads, 8), dim3(32, 8), 0, qkv, raw,
                       rstd, qn, kn, cosine, sine, eps, H, K, D, N, T);
            }},
            {2, "one warp per row, angles in registers", [&] {
                qk_norm_rope_forward<floatX>(qkv, raw, rstd, qn, kn, cosine, sine, eps, H, K, D, N, T);
            }, SHIPPED},
        };
        bench(variants);
    }
    if (bench_shape<floatX>(when, "qk_norm_rope_backward", bytes, flops, "B %d T %d H %d K %d D %d%s", B, T,
                            H, K, D, norm ? " norm" : "")) {
        Tensor<floatX> dqkv("dqkv", n), raw("qk_raw", n_qk), q_norm("q_norm", D), k_norm("k_norm", D);
        Tensor<float> rstd("qk_rstd", heads), cosine("cosine", angles[0].size()),
            sine("sine", angles[1].size()),
            dq_norm("dq_norm", D), dk_norm("dk_norm", D), scratch("scratch", (size_t)MAX_PARTIALS * 2 * D);
        dqkv.judge_apart(W, {{"dq", 0, (size_t)H * D}, {"dk", (size_t)H * D, (size_t)(H + K) * D},
                             {"dv", (size_t)(H + K) * D, (size_t)W}});
        dqkv.normal(1), raw.normal(1), q_norm.normal(0.3f, 1), k_norm.normal(0.3f, 1), dq_norm.normal(1),
            dk_norm.normal(1);
        std::copy(angles[0].begin(), angles[0].end(), cosine.host);
        std::copy(angles[1].begin(), angles[1].end(), sine.host);
        for (int i = 0; i < heads; i++) {
            double squares = 0;
            for (int d = 0; d < D; d++)
                squares += (double)raw.host[(size_t)i * D + d] * raw.host[(size_t)i * D + d];
            rstd.host[i] = (float)(1 / sqrt(squares / D + eps));
        }
        reference<floatX>([&](int b) {
            twin::qk_norm_rope_backward(dqkv.twin(b), dq_norm.twin(b), dk_norm.twin(b), raw.host, rstd.host,
                                        norm ? q_norm.host : NULL, norm ? k_norm.host : NULL, cosine.host,
                                        sine.host,
                                        H, K, D, N, T);
        });
        gpu.scratch = scratch;
        floatX *qn = norm ? (floatX *)q_norm : NULL, *kn = norm ? (floatX *)k_norm : NULL;
        auto dw = [&] {
            if (norm)
                launch(qk_norm_rope_backward_dw_kernel0<floatX>, dim3(CEIL_DIV(D, 64), 2), 32, 0, dq_norm,
                       dk_norm, dqkv, raw, rstd, cosine, sine, H, K, D, N, T);
        };
        const Variant variants[] = {
            {0, "one thread per head; dw: one thread per column", [&] {
                dw();
                launch(qk_norm_rope_backward_kernel0<floatX>, CEIL_DIV(heads, 128), 128, 0, dqkv, raw, rstd,
                       qn, kn, cosine, sine, H, K, D, N, T);
            }},
            {1, "one warp per head; dw as before", [&] {
                dw();
                launch(qk_norm_rope_backward_kernel1<floatX>, CEIL_DIV(heads, 8), dim3(32, 8), 0, dqkv, raw,
                       rstd, qn, kn, cosine, sine, H, K, D, N, T);
            }},
            {2, "one warp per row, dw in registers", [&] {
                qk_norm_rope_backward<floatX>(dqkv, dq_norm, dk_norm, raw, rstd, qn, kn, cosine, sine, H, K,
                                              D, N, T);
            }, SHIPPED},
        };
        bench(variants);
    }
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 1, 9, 2, 1, 8, 1);
    shape<floatX>(CHECK, 3, 7, 4, 2, 48, 1);
    shape<floatX>(CHECK, 2, 5, 6, 6, 104, 0);            // 13 of 16 lanes
    shape<floatX>(CHECK, 1, 33, 16, 2, 128, 1);
    shape<floatX>(CHECK, 2, 3, 1, 1, 256, 0);
}

int main(int argc, char **argv) {
    bench_begin("rope", argc, argv);
    shapes<float>();
    shapes<bf16>();
    shape<bf16>(MODEL, 1, 256, 16, 2, 128, 1);
    shape<bf16>(TIME, 8, 2048, 16, 2, 128, 0);
    shape<bf16>(TIME, 8, 2048, 16, 2, 128, 1);
    shape<bf16>(TIME, 3, 1365, 6, 6, 104, 1);
    return bench_end();
}
