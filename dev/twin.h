// Ops of train_litespark.c, compiled from dev/twin.c, for the benches: all in fp32.
#pragma once
namespace twin {
extern "C" {
void precision(int bf16);  // 1: from now on what an op stores is rounded as bf16 storage does; 0 at the start
void store_matrix(float *x, size_t n);
void embedding_forward(float *x, const int *ids, const float *w, int N, int C);
void embedding_backward(float *dw, const int *ids, const float *dx, int N, int C);
void rmsnorm_forward(float *out, float *rstd, const float *x, const float *w, double eps, int N, int C);
void rmsnorm_backward(float *dx, float *dw, float *norm_out, const float *dout, const float *x,
                      const float *rstd, const float *w, int N, int C);
void bias_backward(float *dbias, const float *dout, int N, int OC);
void rope_table_sizes(float *cosine, float *sine, int D, int T);
void qk_norm_rope_forward(float *qkv, float *qk_raw, float *qk_rstd, const float *q_norm, const float *k_norm,
                          const float *cosine, const float *sine, double eps, int H, int K, int D,
                          int N, int T);
void qk_norm_rope_backward(float *dqkv, float *dq_norm, float *dk_norm, const float *qk_raw,
                           const float *qk_rstd, const float *q_norm, const float *k_norm,
                           const float *cosine, const float *sine,
                           int H, int K, int D, int N, int T);
void attention_forward(float *out, float *lse, const float *qkv, const int *doc_start, int B, int T, int H,
                       int K, int D);
void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                        const int *doc_start, int B, int T, int H, int K, int D);
void attention_decode(float *out, const float *kv, const float *qkv, int past, int T, int H, int K, int D);
void swiglu_forward(float *h, const float *gate_up, int N, int F);
void swiglu_backward(float *gate_up, float *h, const float *dh, int N, int F);
void mlp_forward(float *h, float *gate_up, const float *x, const float *w, int N, int C, int F);
void mlp_backward_gate_up(float *gate_up, float *h, const float *dx, const float *w, int N, int C, int F);
void cross_entropy(double *nll, unsigned char *is_top, float *logits, const int *targets, const double *weight,
                   int N, int V);
double sum_of_squares(const float *x, size_t n);
void adamw_update(float *w, float *master, float *m, float *v, const float *grad, size_t n, double lr,
                  double beta1, double beta2, double eps, double decay, double grad_scale, int64_t step,
                  int bf16_state, uint32_t key,
                  size_t first);
}
}
