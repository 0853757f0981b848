// cublasLt.h of dev/emu: the part of cuBLASLt a trainer uses. D = alpha op(A) op(B) + beta C (+ bias), column-major, fp32 or
// bf16 matrices, fp32 sums. Deterministic: sums of 256 terms in order, then in order.
// Checked: shapes, types, 16-byte alignment, every operand inside one live allocation, D not overlapping A or B.
// The workspace is filled with poison, as the contents after a call are undefined.
#pragma once
#include "cuda_bf16.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

struct cublasLtMatmulDescOpaque_t { cudaDataType_t scale; int32_t transa, transb; uint32_t epilogue; const void *bias; };
struct cublasLtMatrixLayoutOpaque_t { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
struct cublasLtMatmulPreferenceOpaque_t { uint64_t workspace; };
struct cublasLtContext {};
typedef cublasLtContext *cublasLtHandle_t;
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };            // what it was made for: emu::algorithm
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; };

namespace emu {
template <typename T, typename... A> cublasStatus_t create(T **out, A... fields) {
    *out = new T{fields...};
    return CUBLAS_STATUS_SUCCESS;
}
template <typename T> cublasStatus_t destroy(T *object) { delete object; return CUBLAS_STATUS_SUCCESS; }
template <typename T> cublasStatus_t set_attribute(T *field, const void *v, size_t n) {
    if (n != sizeof *field) {
        host_error(cudaErrorInvalidValue, "cublasLt attribute of %zu bytes, expected %zu", n, sizeof *field);
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    memcpy(field, v, n);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace emu
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { return emu::create(h); }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return emu::destroy(h); }
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t, cudaDataType_t scale) {
    return emu::create(d, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr);
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return emu::destroy(d); }
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type, uint64_t rows,
                                                 uint64_t cols, int64_t ld) {
    return emu::create(l, type, rows, cols, ld);
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return emu::destroy(l); }
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { return emu::create(p); }
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return emu::destroy(p); }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *v,
                                                     size_t n) {
    switch (a) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return emu::set_attribute(&d->transa, v, n);
    case CUBLASLT_MATMUL_DESC_TRANSB: return emu::set_attribute(&d->transb, v, n);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return emu::set_attribute(&d->epilogue, v, n);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return emu::set_attribute(&d->bias, v, n);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t a, const void *v, size_t n) {
    // the others are hints
    return a == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? emu::set_attribute(&p->workspace, v, n) : CUBLAS_STATUS_SUCCESS;
}

namespace emu {
struct Gemm { int m, n, k; };
typedef cublasLtMatmulDescOpaque_t MatmulDesc;
typedef cublasLtMatrixLayoutOpaque_t Layout;
// Returns null, or what is wrong.
inline const char *gemm_shape(Gemm *g, const MatmulDesc &d, const Layout &a, const Layout &b, const Layout &c,
                              const Layout &o) {
    for (const Layout *l : {&a, &b, &c, &o}) {
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16BF) return "a matrix type other than CUDA_R_32F or CUDA_R_16BF";
        if (!l->rows || !l->cols || l->ld < (int64_t)l->rows) return "an empty matrix, or ld smaller than the rows";
    }
    if (d.scale != CUDA_R_32F) return "alpha and beta other than fp32 on the host";
    if (d.epilogue != CUBLASLT_EPILOGUE_DEFAULT && d.epilogue != CUBLASLT_EPILOGUE_BIAS)
        return "an epilogue other than DEFAULT or BIAS";
    if (a.type != b.type || c.type != o.type || (a.type == CUDA_R_32F && o.type == CUDA_R_16BF))
        return "this combination of types";
    *g = Gemm{(int)o.rows, (int)o.cols, (int)(d.transa ? a.rows : a.cols)};
    if ((int)(d.transa ? a.cols : a.rows) != g->m || (int)(d.transb ? b.rows : b.cols) != g->n ||
        (int)(d.transb ? b.cols : b.rows) != g->k || c.rows != o.rows || c.cols != o.cols)
        return "shapes that do not fit together";
    return nullptr;
}
inline cublasStatus_t not_supported(const char *call, const char *what) {
    host_error(cudaErrorInvalidValue, "%s: not supported: %s", call, what);
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasLtMatmulAlgo_t algorithm(const Gemm &g, const MatmulDesc &d, const Layout &a, const Layout &o,
                                      size_t workspace) {
    return {{(uint64_t)g.m, (uint64_t)g.n, (uint64_t)g.k, (uint64_t)(d.transa * 2 + d.transb), (uint64_t)a.type,
             (uint64_t)o.type, workspace}};
}
inline size_t element_bytes(cudaDataType_t t) { return t == CUDA_R_32F ? 4 : 2; }
inline size_t extent(const Layout &l) { return ((size_t)l.ld * (l.cols - 1) + l.rows) * element_bytes(l.type); }
inline float element(const void *p, cudaDataType_t t, size_t i) {
    return t == CUDA_R_32F ? ((const float *)p)[i] : (float)((const __nv_bfloat16 *)p)[i];
}

// Packs op(X), of `outer` rows and k columns, as panels of `width` rows: panel[k][width], zero-padded.
inline void pack(float *out, const void *p, const Layout &l, bool k_is_contiguous, int outer, int k, int width) {
    const int panels = (outer + width - 1) / width;
#pragma omp parallel for if ((double)outer * k > 1e5) num_threads(settings.threads)
    for (int panel = 0; panel < panels; panel++) {
        float *o = out + (size_t)panel * width * k;
        for (int r = 0; r < width; r++) {
            const size_t row = (size_t)panel * width + r;
            const bool inside = row < (size_t)outer;
            for (int j = 0; j < k; j++) {
                const size_t at = k_is_contiguous ? row * l.ld + j : (size_t)j * l.ld + row;
                o[(size_t)j * width + r] = inside ? element(p, l.type, at) : 0;
            }
        }
    }
}
enum { MR = 8, NR = 4, KB = 256 };
inline void gemm_tile(float out[NR][MR], const float *a, const float *b, int k) {   // out[n][m] = sum_k a[k][m] b[k][n]
    typedef float Four __attribute__((vector_size(16), aligned(4)));
    Four total[NR][2] = {};
    for (int k0 = 0; k0 < k; k0 += KB) {                      // short sums first: less rounding error
        Four sum[NR][2] = {};
        for (int j = k0; j < (k0 + KB < k ? k0 + KB : k); j++) {
            const Four *row = (const Four *)(a + (size_t)j * MR), lo = row[0], hi = row[1];
#pragma GCC unroll 4
            for (int n = 0; n < NR; n++) sum[n][0] += lo * b[(size_t)j * NR + n], sum[n][1] += hi * b[(size_t)j * NR + n];
        }
        for (int n = 0; n < NR; n++) total[n][0] += sum[n][0], total[n][1] += sum[n][1];
    }
    memcpy(out, total, sizeof total);
}
inline void gemm_run(const Gemm &g, const MatmulDesc &d, float alpha, float beta, const void *A, const Layout &a,
                     const void *B, const Layout &b, const void *C, const Layout &c, void *D, const Layout &o) {
    const int mt = (g.m + MR - 1) / MR, nt = (g.n + NR - 1) / NR;
    std::unique_ptr<float[]> pa(new float[(size_t)mt * MR * g.k]), pb(new float[(size_t)nt * NR * g.k]);
    pack(pa.get(), A, a, d.transa, g.m, g.k, MR);
    pack(pb.get(), B, b, !d.transb, g.n, g.k, NR);
#pragma omp parallel for if ((double)g.m * g.n * g.k > 3e5) num_threads(settings.threads)
    for (int tile = 0; tile < mt; tile++)
        for (int nb = 0; nb < nt; nb++) {
            float t[NR][MR];
            gemm_tile(t, pa.get() + (size_t)tile * MR * g.k, pb.get() + (size_t)nb * NR * g.k, g.k);
            for (int j = 0; j < NR && nb * NR + j < g.n; j++)
                for (int i = 0; i < MR && tile * MR + i < g.m; i++) {
                    const size_t m = (size_t)tile * MR + i, n = (size_t)nb * NR + j;
                    float v = alpha * t[j][i];
                    if (beta != 0) v += beta * element(C, c.type, n * c.ld + m);
                    if (d.epilogue == CUBLASLT_EPILOGUE_BIAS) v += element(d.bias, o.type, m);
                    if (o.type == CUDA_R_32F) ((float *)D)[n * o.ld + m] = v;
                    else ((__nv_bfloat16 *)D)[n * o.ld + m] = v;
                }
        }
}
}  // namespace emu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
    cublasLtMatrixLayout_t o, cublasLtMatmulPreference_t p, int want, cublasLtMatmulHeuristicResult_t *r, int *found) {
    emu::Gemm g;
    *found = 0;
    const char *wrong = emu::gemm_shape(&g, *d, *a, *b, *c, *o);
    if (wrong) return emu::not_supported("cublasLtMatmulAlgoGetHeuristic", wrong);
    if (want < 1) return CUBLAS_STATUS_INVALID_VALUE;
    r->workspaceSize = p->workspace < (1 << 20) ? p->workspace : 1 << 20;
    r->algo = emu::algorithm(g, *d, *a, *o, r->workspaceSize);
    r->state = CUBLAS_STATUS_SUCCESS;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha_p, const void *A, cublasLtMatrixLayout_t a, const void *B,
    cublasLtMatrixLayout_t b, const void *beta_p, const void *C, cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t o,
    const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    emu::Gemm g;
    const char *wrong = emu::gemm_shape(&g, *d, *a, *b, *c, *o);
    const float alpha = *(const float *)alpha_p, beta = *(const float *)beta_p;
    if (!wrong && algo) {
        const cublasLtMatmulAlgo_t expected = emu::algorithm(g, *d, *a, *o, algo->data[6]);
        if (memcmp(algo, &expected, sizeof expected)) wrong = "an algorithm found for another problem";
        else if (algo->data[6] > workspace_bytes) wrong = "a workspace smaller than the algorithm needs";
    }
    if (wrong) return emu::not_supported("cublasLtMatmul", wrong);
    const size_t d_bytes = emu::extent(*o);
    struct { const char *name; const void *p; size_t bytes; bool used, may_be_d; } operands[] = {
        {"A", A, emu::extent(*a), true, false}, {"B", B, emu::extent(*b), true, false},
        {"C", C, emu::extent(*c), beta != 0, c->ld == o->ld}, {"D", D, d_bytes, true, true},
        {"bias", d->bias, g.m * emu::element_bytes(o->type), d->epilogue == CUBLASLT_EPILOGUE_BIAS, false},
        {"workspace", workspace, workspace_bytes, workspace_bytes > 0, false}};
    for (const auto &x : operands) {
        if (!x.used) continue;
        if (!emu::operand_ok("cublasLtMatmul", x.name, x.p, x.bytes, emu::DEVICE)) return CUBLAS_STATUS_INVALID_VALUE;
        if ((uintptr_t)x.p % 16) {
            emu::host_error(cudaErrorMisalignedAddress, "cublasLtMatmul: %s is not aligned to 16 bytes", x.name);
            return CUBLAS_STATUS_NOT_SUPPORTED;
        }
        if ((char *)x.p < (char *)D + d_bytes && (char *)D < (char *)x.p + x.bytes && !(x.p == D && x.may_be_d)) {
            emu::host_error(cudaErrorInvalidValue, "cublasLtMatmul: D overlaps %s", x.name);
            return CUBLAS_STATUS_INVALID_VALUE;
        }
    }
    const cudaError_t e = emu::submit(stream, [=, d = *d, a = *a, b = *b, c = *c, o = *o] {
        emu::gemm_run(g, d, alpha, beta, A, a, B, b, C, c, D, o);
        if (workspace_bytes) memset(workspace, emu::POISON, workspace_bytes);
    });
    return e ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
