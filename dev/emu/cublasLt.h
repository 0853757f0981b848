// cublasLt.h of dev/emu: the part of cuBLASLt a trainer uses. D = alpha op(A) op(B) + beta C (+ bias), column-major, strided
// batches, fp32 or bf16 matrices, fp32 sums, bias epilogue. Deterministic: sums of 256 terms in order, then in order.
// Checked: shapes, types, strides, 16-byte alignment, every operand inside one live allocation, D not overlapping A or B.
// The workspace is filled with poison, as the contents after a call are undefined.
#pragma once
#include "cuda_bf16.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8, CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasComputeType_t {      // TF32 computes in fp32 here
    CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69, CUBLAS_COMPUTE_32F_FAST_TF32 = 77
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasLtOrder_t { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 };
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST = 0, CUBLASLT_POINTER_MODE_DEVICE = 1 };
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0, CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1, CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0, CUBLASLT_MATRIX_LAYOUT_ORDER = 1, CUBLASLT_MATRIX_LAYOUT_ROWS = 2,
    CUBLASLT_MATRIX_LAYOUT_COLS = 3, CUBLASLT_MATRIX_LAYOUT_LD = 4, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t pointer_mode, transa, transb;
    uint32_t epilogue;
    const void *bias;
    int32_t bias_type;
};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t order, batch;
    int64_t stride;
};
struct cublasLtMatmulPreferenceOpaque_t { uint64_t workspace; };
struct cublasLtContext { int version; };
typedef cublasLtContext *cublasLtHandle_t;
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };            // data: shape and workspace it was made for
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};

inline const char *cublasGetStatusString(cublasStatus_t s) {
    return s == 0 ? "CUBLAS_STATUS_SUCCESS" : s == 7 ? "CUBLAS_STATUS_INVALID_VALUE" : s == 13 ?
        "CUBLAS_STATUS_EXECUTION_FAILED" : s == 15 ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INTERNAL_ERROR";
}
inline const char *cublasLtGetStatusString(cublasStatus_t s) { return cublasGetStatusString(s); }
inline size_t cublasLtGetVersion() { return 130000; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = new cublasLtContext{1}; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { delete h; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t c, cudaDataType_t s) {
    *d = new cublasLtMatmulDescOpaque_t{c, s, 0, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, nullptr, -1};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete d; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t t, uint64_t rows, uint64_t cols,
                                                 int64_t ld) {
    *l = new cublasLtMatrixLayoutOpaque_t{t, rows, cols, ld, CUBLASLT_ORDER_COL, 1, 0};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete l; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = new cublasLtMatmulPreferenceOpaque_t{0};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { delete p; return CUBLAS_STATUS_SUCCESS; }
namespace emu {
template <typename T> inline cublasStatus_t set_attribute(T *field, const void *v, size_t n) {
    if (n != sizeof *field) {
        host_error(cudaErrorInvalidValue, "cublasLt attribute of %zu bytes, expected %zu", n, sizeof *field);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    memcpy(field, v, n);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace emu
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *v,
                                                     size_t n) {
    switch (a) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE: return emu::set_attribute(&d->compute, v, n);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return emu::set_attribute(&d->scale, v, n);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return emu::set_attribute(&d->pointer_mode, v, n);
    case CUBLASLT_MATMUL_DESC_TRANSA: return emu::set_attribute(&d->transa, v, n);
    case CUBLASLT_MATMUL_DESC_TRANSB: return emu::set_attribute(&d->transb, v, n);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return emu::set_attribute(&d->epilogue, v, n);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return emu::set_attribute(&d->bias, v, n);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return emu::set_attribute(&d->bias_type, v, n);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a, const void *v,
    size_t n) {
    switch (a) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: return emu::set_attribute(&l->type, v, n);
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return emu::set_attribute(&l->order, v, n);
    case CUBLASLT_MATRIX_LAYOUT_ROWS: return emu::set_attribute(&l->rows, v, n);
    case CUBLASLT_MATRIX_LAYOUT_COLS: return emu::set_attribute(&l->cols, v, n);
    case CUBLASLT_MATRIX_LAYOUT_LD: return emu::set_attribute(&l->ld, v, n);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return emu::set_attribute(&l->batch, v, n);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return emu::set_attribute(&l->stride, v, n);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a,
    const void *v, size_t n) {
    // the others are hints
    return a == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? emu::set_attribute(&p->workspace, v, n) : CUBLAS_STATUS_SUCCESS;
}

namespace emu {
struct Gemm { int m, n, k, batch; };
typedef cublasLtMatrixLayoutOpaque_t Layout;
inline const char *gemm_shape(Gemm *g, const cublasLtMatmulDescOpaque_t &d, const Layout &a, const Layout &b, const Layout &c,
                              const Layout &o) {   // null, or what is wrong
    const cublasLtMatrixLayoutOpaque_t *all[4] = {&a, &b, &c, &o};
    for (const cublasLtMatrixLayoutOpaque_t *l : all) {
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16BF) return "a matrix type other than CUDA_R_32F or CUDA_R_16BF";
        if (l->order != CUBLASLT_ORDER_COL) return "row order (use column order and swap the operands)";
        if (!l->rows || !l->cols || l->ld < (int64_t)l->rows) return "an empty matrix, or ld smaller than the rows";
        if (l->batch != o.batch) return "different batch counts";
    }
    if (d.scale != CUDA_R_32F || d.pointer_mode != CUBLASLT_POINTER_MODE_HOST)
        return "alpha and beta other than fp32 on the host";
    if (d.epilogue != CUBLASLT_EPILOGUE_DEFAULT && d.epilogue != CUBLASLT_EPILOGUE_BIAS)
        return "an epilogue other than DEFAULT or BIAS";
    if (a.type != b.type || c.type != o.type || (a.type == CUDA_R_32F && o.type == CUDA_R_16BF))
        return "this combination of types";
    *g = Gemm{(int)o.rows, (int)o.cols, (int)(d.transa ? a.rows : a.cols), o.batch};
    if ((int)(d.transa ? a.cols : a.rows) != g->m || (int)(d.transb ? b.rows : b.cols) != g->n || (int)(d.transb ?
        b.cols : b.rows) != g->k || c.rows != o.rows || c.cols != o.cols)
        return "shapes that do not fit together";
    return nullptr;
}
inline size_t extent(const cublasLtMatrixLayoutOpaque_t &l) {   // bytes from the first to the last element of all batches
    return ((size_t)l.stride * (l.batch - 1) + (size_t)l.ld * (l.cols - 1) + l.rows) * (l.type == CUDA_R_32F ? 4 : 2);
}
inline float element(const void *p, cudaDataType_t t, size_t i) {
    return t == CUDA_R_32F ? ((const float *)p)[i] : __uint_as_float((unsigned)((const uint16_t *)p)[i] << 16);
}

// Packs op(X), of `outer` rows and k columns, as panels of `width` rows: panel[k][width], zero-padded.
inline void pack(float *out, const void *p, const cublasLtMatrixLayoutOpaque_t &l, size_t offset, bool k_is_contiguous, int outer,
    int k, int width) {
    const int panels = (outer + width - 1) / width;
#pragma omp parallel for if ((double)outer * k > 1e5) num_threads(settings.threads)
    for (int panel = 0; panel < panels; panel++) {
        float *o = out + (size_t)panel * width * k;
        for (int r = 0; r < width; r++) {
            const size_t row = (size_t)panel * width + r;
            const bool inside = row < (size_t)outer;
            for (int j = 0; j < k; j++) o[(size_t)j * width + r] = inside ? element(p, l.type, offset + (k_is_contiguous ?
                row * l.ld + j : (size_t)j * l.ld + row)) : 0.0f;
        }
    }
}
enum { MR = 8, NR = 4, KB = 256 };
inline void gemm_tile(float out[NR][MR], const float *a, const float *b, int k) {   // out[n][m] = sum_k a[k][m] b[k][n]
    typedef float Four __attribute__((vector_size(16)));
    Four total[NR][2] = {};
    for (int k0 = 0; k0 < k; k0 += KB) {                      // short sums first: less rounding error
        Four sum[NR][2] = {};
        for (int j = k0; j < (k0 + KB < k ? k0 + KB : k); j++) {
            Four lo, hi;
            memcpy(&lo, a + (size_t)j * MR, 16);
            memcpy(&hi, a + (size_t)j * MR + 4, 16);
#pragma GCC unroll 4
            for (int n = 0; n < NR; n++) { sum[n][0] += lo * b[(size_t)j * NR + n]; sum[n][1] += hi * b[(size_t)j * NR + n]; }
        }
        for (int n = 0; n < NR; n++) { total[n][0] += sum[n][0]; total[n][1] += sum[n][1]; }
    }
    memcpy(out, total, sizeof total);
}
inline void gemm_run(const Gemm &g, const cublasLtMatmulDescOpaque_t &d, float alpha, float beta, const void *A, const Layout &a,
                     const void *B, const Layout &b, const void *C, const Layout &c, void *D, const Layout &o) {
    const int mt = (g.m + MR - 1) / MR, nt = (g.n + NR - 1) / NR;
    std::unique_ptr<float[]> pa(new float[(size_t)mt * MR * g.k]), pb(new float[(size_t)nt * NR * g.k]);
    for (int batch = 0; batch < g.batch; batch++) {
        pack(pa.get(), A, a, (size_t)a.stride * batch, d.transa, g.m, g.k, MR);
        pack(pb.get(), B, b, (size_t)b.stride * batch, !d.transb, g.n, g.k, NR);
#pragma omp parallel for if ((double)g.m * g.n * g.k > 3e5) num_threads(settings.threads)
        for (int tile = 0; tile < mt; tile++)
            for (int nb = 0; nb < nt; nb++) {
                float t[NR][MR];
                gemm_tile(t, pa.get() + (size_t)tile * MR * g.k, pb.get() + (size_t)nb * NR * g.k, g.k);
                for (int j = 0; j < NR && nb * NR + j < g.n; j++)
                    for (int i = 0; i < MR && tile * MR + i < g.m; i++) {
                        const size_t m = (size_t)tile * MR + i, n = (size_t)nb * NR + j;
                        const size_t at = (size_t)o.stride * batch + n * o.ld + m;
                        float v = alpha * t[j][i];
                        if (beta != 0) v += beta * element(C, c.type, (size_t)c.stride * batch + n * c.ld + m);
                        if (d.epilogue == CUBLASLT_EPILOGUE_BIAS)
                            v += element(d.bias, d.bias_type < 0 ? o.type : (cudaDataType_t)d.bias_type, m);
                        if (o.type == CUDA_R_32F) ((float *)D)[at] = v;
                        else ((uint16_t *)D)[at] = __float2bfloat16_rn(v).bits;
                    }
            }
    }
}
}  // namespace emu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t o,
                                                     cublasLtMatmulPreference_t p, int want, cublasLtMatmulHeuristicResult_t *r,
                                                     int *found) {
    emu::Gemm g;
    *found = 0;
    const char *wrong = emu::gemm_shape(&g, *d, *a, *b, *c, *o);
    if (wrong) {
        emu::host_error(cudaErrorInvalidValue, "cublasLtMatmulAlgoGetHeuristic: not supported: %s", wrong);
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (want < 1) return CUBLAS_STATUS_INVALID_VALUE;
    memset(r, 0, sizeof *r);
    r->workspaceSize = p->workspace < (1 << 20) ? p->workspace : 1 << 20;
    const uint64_t key[8] = {(uint64_t)g.m, (uint64_t)g.n, (uint64_t)g.k, (uint64_t)(d->transa * 2 + d->transb),
        (uint64_t)a->type, (uint64_t)o->type, r->workspaceSize, 0x6c74};
    memcpy(r->algo.data, key, sizeof key);
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *A,
                                     cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *beta,
                                     const void *C, cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t o,
                                     const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                                     cudaStream_t stream) {
    emu::Gemm g;
    const char *wrong = emu::gemm_shape(&g, *d, *a, *b, *c, *o);
    const float alpha_v = *(const float *)alpha, beta_v = *(const float *)beta;
    if (!wrong && algo && (algo->data[0] != (uint64_t)g.m || algo->data[1] != (uint64_t)g.n || algo->data[2] != (uint64_t)g.k ||
        algo->data[4] != (uint64_t)a->type ||
                           algo->data[5] != (uint64_t)o->type || algo->data[3] != (uint64_t)(d->transa * 2 + d->transb)))
        wrong = "an algorithm found for another problem";
    if (!wrong && algo && algo->data[6] > workspace_bytes) wrong = "a workspace smaller than the algorithm needs";
    if (wrong) {
        emu::host_error(cudaErrorInvalidValue, "cublasLtMatmul: not supported: %s", wrong);
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    struct { const char *name; const void *p; size_t bytes; bool used; } operands[6] = {
        {"A", A, emu::extent(*a), true}, {"B", B, emu::extent(*b), true}, {"C", C, emu::extent(*c), beta_v != 0},
        {"D", D, emu::extent(*o), true},
        {"bias", d->bias, (size_t)g.m * (o->type == CUDA_R_32F ? 4 : 2), d->epilogue == CUBLASLT_EPILOGUE_BIAS},
        {"workspace", workspace, workspace_bytes, workspace_bytes > 0}};
    for (const auto &x : operands) {
        if (!x.used) continue;
        if (!emu::operand_ok("cublasLtMatmul", x.name, x.p, x.bytes, 1)) return CUBLAS_STATUS_INVALID_VALUE;
        if ((uintptr_t)x.p % 16) {
            emu::host_error(cudaErrorMisalignedAddress, "cublasLtMatmul: %s is not aligned to 16 bytes", x.name);
            return CUBLAS_STATUS_NOT_SUPPORTED;
        }
        if (x.p != D && (const char *)x.p < (char *)D + operands[3].bytes && (char *)D < (const char *)x.p + x.bytes) {
            emu::host_error(cudaErrorInvalidValue, "cublasLtMatmul: D overlaps %s", x.name);
            return CUBLAS_STATUS_INVALID_VALUE;
        }
    }
    if (D == A || D == B || (beta_v != 0 && D == C && (c->ld != o->ld || c->stride != o->stride))) {
        emu::host_error(cudaErrorInvalidValue, "cublasLtMatmul: D overlaps an input");
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const cublasLtMatmulDescOpaque_t dv = *d;
    const cublasLtMatrixLayoutOpaque_t av = *a, bv = *b, cv = *c, ov = *o;
    cudaError_t e = emu::submit(stream, [=] {
        emu::gemm_run(g, dv, alpha_v, beta_v, A, av, B, bv, C, cv, D, ov);
        if (workspace_bytes) memset(workspace, emu::POISON, workspace_bytes);
    });
    return e ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
