// Ops of train_litespark.c, compiled from dev/twin.c, for the benches. The last argument, bf16: round where bf16 storage does.
#pragma once
namespace twin {
extern "C" {
void embedding_forward(float *x, const int *ids, const float *w, int N, int C);
void embedding_backward(float *dw, const int *ids, const float *dx, int N, int C);
void residual_rmsnorm_forward(float *x_out, float *out, float *rstd, const float *x, const float *delta, const float *w,
                              double eps, int N, int C, int bf16);
void rmsnorm_rebuild(float *out, const float *x, const float *rstd, const float *w, int N, int C, int bf16);
void rmsnorm_backward(float *dx, float *dw, const float *dout, const float *x, const float *rstd, const float *w, int N, int C, int bf16);
void bias_backward(float *dbias, const float *dout, int N, int OC);
void store_bf16(float *x, size_t n);
void matmul_forward(float *out, const float *x, const float *w, int N, int C, int OC);                      // fp32; no bf16 form
void matmul_backward_x(float *dx, const float *dout, const float *w, int N, int C, int OC, int accumulate);  // the same
void rope_table_sizes(float *cosine, float *sine, int D, int T);
void qk_norm_rope_forward_sizes(float *qkv, float *qk_raw, float *qk_rstd, const float *q_norm, const float *k_norm,
                                const float *cosine, const float *sine, double eps, int H, int K, int D, int N, int T, int bf16);
void qk_norm_rope_backward_sizes(float *dqkv, float *dq_norm, float *dk_norm, const float *qk_raw, const float *qk_rstd,
                                 const float *q_norm, const float *k_norm, const float *cosine, const float *sine, int H, int K,
                                 int D, int N, int T, int bf16);
void attention_forward(float *out, float *lse, const float *qkv, const int *doc_start, int B, int T, int H, int K, int D, int bf16);
void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse, const int *doc_start,
                        int B, int T, int H, int K, int D, int bf16);
void swiglu_forward(float *h, const float *gate_up, int N, int F, int bf16);
void swiglu_backward(float *dgate_up, const float *dh, const float *gate_up, int N, int F, int bf16);
void cross_entropy(double *nll, float *logits, const int *targets, double dscale, int N, int V, int bf16);
double sum_of_squares(const float *x, size_t n);
void adamw_update(float *w, float *master, float *m, float *v, const float *grad, size_t n, double lr, double beta1, double beta2,
                  double eps, double decay, double grad_scale, int64_t step, int bf16, int bf16_state, uint32_t key,
                  size_t first);
}
}
