// attention_decode, for samples: T tokens of one text after `past` others
//   out_t = sum_s p_ts v_s,  p_ts = exp(q_t k_s / sqrt(D)) / sum over s <= past + t
// out (T,H*D) =;  qkv (T,(H+2K)D) of the new tokens, kv (past+T,2KD) keys and values of all
// bytes   4·(past+T)·K·D + 4·T·H·D;  past 2047, T 1, H 16, K 2, D 128: 2.1 MB = 0.6 us
// FLOPs   4·D·H·(past+1): nothing
// floor   0.6 us (memory); starting the kernel takes longer
// idea    one token has few heads, so that only more warps per head bring more bytes in flight
// limits  D % 4 == 0, D <= 128
// result  not modelled (latency alone sets the variants apart). Measured: not yet
#include "bench.cuh"

// ---- kernel 1: a warp per token and head ------------------------------------------------------------------
template <typename floatX>
__global__ void attention_decode_kernel1(floatX *out, const floatX *kv, const floatX *qkv, int past, int H,
                                         int K, int D, float scale) {
    const int h = blockIdx.x, t = blockIdx.y, lane = threadIdx.x;
    const bool active = lane * 4 < D;
    const floatX *k = kv + h / (H / K) * D + lane * 4, *v = k + K * D;
    float q[4], k_s[4], v_s[4], o[4] = {}, top = -1e30f, sum = 0;
    widen(q, load_if<4>(active, qkv + ((size_t)t * (H + 2 * K) + h) * D + lane * 4));
    for (int s = 0; s <= past + t; s++) {
        widen(k_s, load_if<4>(active, k + (size_t)s * 2 * K * D));
        widen(v_s, load_if<4>(active, v + (size_t)s * 2 * K * D));
        const float score = warp_sum(q[0] * k_s[0] + q[1] * k_s[1] + q[2] * k_s[2] + q[3] * k_s[3]) * scale;
        const float higher = fmaxf(top, score), shrink = exp_approx(top - higher);
        const float p = exp_approx(score - higher);
        top = higher;
        sum = sum * shrink + p;
        for (int j = 0; j < 4; j++) o[j] = o[j] * shrink + p * v_s[j];
    }
    for (int j = 0; j < 4; j++) o[j] /= sum;
    if (active) store(out + ((size_t)t * H + h) * D + lane * 4, narrow<floatX>(o));
}

// ---- kernel 2, shipped ------------------------------------------------------------------------------------
template <typename floatX>
__global__ void attention_decode_kernel2(floatX *out, const floatX *kv, const floatX *qkv, int past, int H,
                                         int K, int D, float scale) {
    __shared__ float tops[DECODE_WARPS], sums[DECODE_WARPS], outs[DECODE_WARPS][128];
    const int h = blockIdx.x, t = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const bool active = lane * 4 < D;
    const floatX *k = kv + h / (H / K) * D + lane * 4, *v = k + K * D;
    float q[4], k_s[4], v_s[4], o[4] = {}, top = -1e30f, sum = 0;
    widen(q, load_if<4>(active, qkv + ((size_t)t * (H + 2 * K) + h) * D + lane * 4));
    for (int s = warp; s <= past + t; s += DECODE_WARPS) {
        widen(k_s, load_if<4>(active, k + (size_t)s * 2 * K * D));
        widen(v_s, load_if<4>(active, v + (size_t)s * 2 * K * D));
        const float score = warp_sum(q[0] * k_s[0] + q[1] * k_s[1] + q[2] * k_s[2] + q[3] * k_s[3]) * scale;
        const float higher = fmaxf(top, score), shrink = exp_approx(top - higher);
        const float p = exp_approx(score - higher);
        top = higher;
        sum = sum * shrink + p;
        for (int j = 0; j < 4; j++) o[j] = o[j] * shrink + p * v_s[j];
    }
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
    for (int j = 0; j < 4; j++) outs[warp][lane * 4 + j] = o[j];
    __syncthreads();
    if (warp > 0 || !active) return;
    float total = 0, mean[4] = {};
    for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, tops[w]);
    for (int w = 0; w < DECODE_WARPS; w++) {
        const float share = exp_approx(tops[w] - top);          // 0 of a warp without keys
        total += sums[w] * share;
        for (int j = 0; j < 4; j++) mean[j] += outs[w][lane * 4 + j] * share;
    }
    for (int j = 0; j < 4; j++) mean[j] /= total;
    store(out + ((size_t)t * H + h) * D + lane * 4, narrow<floatX>(mean));
}

template <typename floatX> static void shape(int when, int past, int T, int H, int K, int D) {
    const size_t W = (size_t)(H + 2 * K) * D, rows = past + T;
    const double bytes = sizeof(floatX) * (2.0 * rows * K * D + 2.0 * T * H * D);
    if (!bench_shape<floatX>(when, "attention_decode", bytes, 4.0 * T * rows * H * D,
                             "past %d T %d H %d K %d D %d", past, T, H, K, D)) return;
    Tensor<floatX> out("out", (size_t)T * H * D), kv("kv", rows * 2 * K * D), qkv("qkv", T * W);
    kv.normal(1);
    qkv.normal(1);
    reference<floatX>([&](int b) {
        twin::attention_decode(out.twin(b), kv.host, qkv.host, past, T, H, K, D);
    });
    const float scale = (float)(1 / sqrt((double)D));
    const Variant variants[] = {
        {1, "a warp per token and head", [&] {
            launch(attention_decode_kernel1<floatX>, dim3(H, T), 32, 0, out, kv, qkv, past, H, K, D, scale);
        }},
        {2, "8 warps take keys in turn", [&] { attention_decode<floatX>(out, kv, qkv, past, T, H, K, D); },
         SHIPPED},
    };
    bench(variants);
}

template <typename floatX> static void shapes(void) {
    shape<floatX>(CHECK, 1, 1, 2, 1, 8);             // warps without keys
    shape<floatX>(CHECK, 7, 1, 4, 2, 64);
    shape<floatX>(CHECK, 70, 3, 3, 3, 104);
    shape<floatX>(CHECK, 200, 1, 4, 1, 128);
}

int main(int argc, char **argv) {
    bench_begin("attention_decode", argc, argv);
    shapes<float>();
    shapes<bf16>();
    shape<bf16>(MODEL, 511, 1, 16, 2, 128);
    shape<bf16>(TIME, 2047, 1, 16, 2, 128);
    shape<bf16>(TIME, 8191, 1, 32, 8, 128);
    return bench_end();
}
