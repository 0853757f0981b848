// The reference of the benches: the twin's ops as an object. Most are called as they are (twin.h); what takes a Config gets sizes here.
#define LITESPARK_NO_MAIN
#include "../train_litespark.c"

static Config sizes(int H, int K, int D, double eps) {
    Config c;
    memset(&c, 0, sizeof c);
    c.H = H, c.K = K, c.D = D, c.eps = eps, c.rope_theta = 10000;
    return c;
}

void rope_table_sizes(float *cosine, float *sine, int D, int T) {
    Config c = sizes(0, 0, D, 0);
    rope_table(cosine, sine, &c, T);
}

void qk_norm_rope_forward_sizes(float *qkv, float *qk_raw, float *qk_rstd, const float *q_norm, const float *k_norm,
                                const float *cosine, const float *sine, double eps, int H, int K, int D, int N, int T, int bf16) {
    Config c = sizes(H, K, D, eps);
    qk_norm_rope_forward(qkv, qk_raw, qk_rstd, q_norm, k_norm, cosine, sine, &c, N, T, bf16);
}

void qk_norm_rope_backward_sizes(float *dqkv, float *dq_norm, float *dk_norm, const float *qk_raw, const float *qk_rstd,
                                 const float *q_norm, const float *k_norm, const float *cosine, const float *sine, int H, int K,
                                 int D, int N, int T, int bf16) {
    Config c = sizes(H, K, D, 0);
    qk_norm_rope_backward(dqkv, dq_norm, dk_norm, qk_raw, qk_rstd, q_norm, k_norm, cosine, sine, &c, N, T, bf16);
}
