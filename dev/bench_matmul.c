// Matrix multiplication of train_litespark.c against the FMA peak of this machine and against OpenBLAS.
//   make build/bench_matmul && build/bench_matmul [max_threads] [libmkl_rt.so.3 | libopenblas.so ...]
// MKL: python3 -m venv v && v/bin/pip install mkl, then v/lib/libmkl_rt.so.*; OpenBLAS: apt-get install libopenblas0-openmp.
// Prints one markdown table: GFLOP/s as median (best) of interleaved runs, so that a change of clock or load meets all
// columns alike. One thread is timed in CPU time, which other programs on the machine disturb little; several threads in
// wall time, which they do disturb: look at the load printed above the table. `skipped`: the library is not there.
#define LITESPARK_NO_MAIN
#include "../train_litespark.c"
#include <dlfcn.h>

enum { MAX_LIBS = 4, MAX_RUNS = 101 };
typedef void Sgemm(int order, int ta, int tb, int M, int N, int K, float alpha, const float *a, int lda, const float *b,
                   int ldb, float beta, float *out, int ldo);
typedef struct { char name[64]; Sgemm *sgemm; void (*set_threads)(int); } Library;
typedef struct { const char *name; int M, N, K, trans_a, trans_b, accumulate; } Shape;

static const Shape shapes[] = {                 // name                       M      N     K    ta tb accumulate
    {"square NN",                               1024,  1024, 1024, 0, 0, 0},
    {"square NT",                               1024,  1024, 1024, 0, 1, 0},
    {"square TN",                               1024,  1024, 1024, 1, 0, 0},
    {"square NN",                               2048,  2048, 2048, 0, 0, 0},
    {"square NT",                               2048,  2048, 2048, 0, 1, 0},
    {"square TN",                               2048,  2048, 2048, 1, 0, 0},
    {"logits = x w^T, C 288",                   1024, 32000,  288, 0, 1, 0},
    {"dx = dlogits w",                          1024,   288, 32000, 0, 0, 0},
    {"dw += dlogits^T x",                      32000,   288, 1024, 1, 0, 1},
    {"dw += dlogits^T x, 256 tokens",          32000,   288,  256, 1, 0, 1},
    {"mlp up, C 768",                           1024,  2048,  768, 0, 1, 0},
    {"mlp down, C 768",                         1024,   768, 2048, 0, 1, 0},
    {"qkv, C 288",                              1024,   864,  288, 0, 1, 0},
    {"dw qkv",                                   864,   288, 1024, 1, 0, 1},
    {"32 tokens, C 64",                           32,    64,   64, 0, 1, 0},
};
static const Shape tiles[] = {
    {"matmul_tile S = Q K^T, D 64",               64,    64,   64, 0, 1, 0},
    {"matmul_tile O += P V, D 64",                64,    64,   64, 0, 0, 1},
    {"matmul_tile dK += dS^T Q, D 64",            64,    64,   64, 1, 0, 1},
    {"matmul_tile S = Q K^T, D 128",              64,    64,  128, 0, 1, 0},
    {"matmul_tile O += P V, D 128",               64,   128,   64, 0, 0, 1},
    {"matmul_tile S = Q K^T, D 48",              384,   128,   48, 0, 1, 0},
    {"matmul_tile O += P V, D 48",               384,    48,  128, 0, 0, 1},
    {"matmul_tile dK += dS^T Q, D 48",           128,    48,  384, 1, 0, 1},
    {"matmul_tile S = Q K^T, D 16",               64,    64,   16, 0, 1, 0},
    {"matmul_tile O += P V, D 16",                64,    16,   64, 0, 0, 1},
};

static double seconds(int n_threads) {
    struct timespec t;
    clock_gettime(n_threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Multiply-adds in 12 independent registers per thread, the most a core can do; GFLOP/s of all threads.
static double fma_peak(int n_threads) {
    const int n = 2000000;
    double start = seconds(n_threads);
#pragma omp parallel num_threads(n_threads)
    {
        Vec sum[12], x = (Vec){0} + (floatX)0.5, y = (Vec){0} + (floatX)1;
        for (int j = 0; j < 12; j++) sum[j] = (Vec){0} + (floatX)j;
        __asm__ volatile("" : "+m"(sum), "+m"(x), "+m"(y));     // the compiler no longer knows that results are unused
        for (int i = 0; i < n; i++) {
            UNROLL
            for (int j = 0; j < 12; j++) sum[j] = sum[j] * x + y;
        }
        __asm__ volatile("" : "+m"(sum));
    }
    return 2e-9 * 12 * LANES * n * n_threads / (seconds(n_threads) - start);
}

static floatX *random_matrix(size_t n) {
    void *p_void;
    if (posix_memalign(&p_void, 1 << 21, n * sizeof(floatX))) exit(1);
#ifdef MADV_HUGEPAGE
    madvise(p_void, n * sizeof(floatX), MADV_HUGEPAGE);         // as the trainer's arenas
#endif
    floatX *p = (floatX *)p_void;
    for (size_t i = 0; i < n; i++) p[i] = (floatX)rand() / (floatX)RAND_MAX - (floatX)0.5;
    return p;
}

static int open_library(Library *lib, const char *path) {
    void *h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!h || sizeof(floatX) != 4) return 0;
    const char *prefix = dlsym(h, "scipy_cblas_sgemm") ? "scipy_" : "";
    char symbol[64], version[256] = "";
#define SYMBOL(name) (snprintf(symbol, sizeof symbol, "%s%s", prefix, name), dlsym(h, symbol))
    lib->sgemm = (Sgemm *)SYMBOL("cblas_sgemm");
    int (*threading_layer)(int) = (int (*)(int))dlsym(h, "MKL_Set_Threading_Layer");
    if (lib->sgemm && threading_layer) {
        threading_layer(3);                     // the threads of libgomp, which are ours: no second pool spins beside them
        lib->set_threads = (void (*)(int))dlsym(h, "MKL_Set_Num_Threads");
        ((void (*)(char *, int))dlsym(h, "MKL_Get_Version_String"))(version, sizeof version);
        char *number = strstr(version, "Version ");
        if (number) snprintf(lib->name, sizeof lib->name, "MKL %.*s", (int)strcspn(number + 8, " -"), number + 8);
        return number && lib->set_threads;
    }
    lib->set_threads = (void (*)(int))SYMBOL("openblas_set_num_threads");
    char *(*config)(void) = (char *(*)(void))SYMBOL("openblas_get_config");
    char *(*core)(void) = (char *(*)(void))SYMBOL("openblas_get_corename");
    if (!lib->sgemm || !lib->set_threads || !config || !core) return 0;
    int version_end = (int)strcspn(config() + 9, " ");
    snprintf(lib->name, sizeof lib->name, "OpenBLAS %.*s (%s)", version_end, config() + 9, core());
    return 1;
}

// One row of the table. Column 0 is ours, the others are the libraries; `repeat` calls make one measurement.
static void bench(const Shape *s, int tile, int n_threads, const Library *libs, int n_libs) {
    const double gflop = 2e-9 * s->M * s->N * s->K;
    const int repeat = gflop < 0.01 ? (int)(0.01 / gflop) + 1 : 1, n_runs = gflop > 5 ? 9 : gflop > 1 ? 15 : 41;
    const int lda = s->trans_a ? s->M : s->K, ldb = s->trans_b ? s->K : s->N;
    floatX *a = random_matrix((size_t)s->M*s->K), *b = random_matrix((size_t)s->K*s->N), *out = random_matrix((size_t)s->M*s->N);
    static double time[1 + MAX_LIBS][MAX_RUNS], peak[MAX_RUNS];
    omp_set_num_threads(n_threads);
    for (int run = -1; run < n_runs; run++) {   // run -1 warms up
        for (int v = 0; v <= n_libs; v++) {
            if (v) libs[v - 1].set_threads(n_threads);
            double start = seconds(n_threads);
            for (int r = 0; r < repeat; r++)
                if (v) libs[v - 1].sgemm(101, 111 + s->trans_a, 111 + s->trans_b, s->M, s->N, s->K, 1, (const float *)a, lda,
                                         (const float *)b, ldb, (float)s->accumulate, (float *)out, s->N);
                else (tile ? matmul_tile : matmul)(out, s->N, a, lda, s->trans_a, b, ldb, s->trans_b, s->M, s->N, s->K, s->accumulate);
            if (run >= 0) time[v][run] = (seconds(n_threads) - start) / repeat;
        }
        if (run >= 0) peak[run] = -fma_peak(n_threads);
    }
    qsort(peak, n_runs, sizeof(double), by_value);
    printf("| %s | %d x %d x %d | %d | %.0f |", s->name, s->M, s->N, s->K, n_threads, -peak[n_runs/2]);
    for (int v = 0; v <= n_libs; v++) {
        qsort(time[v], n_runs, sizeof(double), by_value);
        printf(" %.1f (%.1f) |", gflop / time[v][n_runs/2], gflop / time[v][0]);
        if (!v) printf(" %.0f%% |", 100 * gflop / time[v][n_runs/2] / -peak[n_runs/2]);
    }
    printf(n_libs ? "\n" : " skipped |\n");
    fflush(stdout);
    free(a), free(b), free(out);
}

int main(int argc, char **argv) {
    static const char *const debian = "/usr/lib/x86_64-linux-gnu/openblas-openmp/libopenblas.so.0";
    const int max_threads = argc > 1 ? atoi(argv[1]) : omp_get_num_procs();
    Library libs[MAX_LIBS];
    int n_libs = 0;
    if (argc <= 2) n_libs += open_library(&libs[0], debian);
    for (int i = 2; i < argc && n_libs < MAX_LIBS; i++) n_libs += open_library(&libs[n_libs], argv[i]);
    double load[1] = {0};
    if (getloadavg(load, 1) != 1) load[0] = -1;
    printf("micro-kernel %d x %d, %s, load average %.1f\n\n", MR, NR, sizeof(floatX) == 4 ? "float" : "double", load[0]);
    printf("| product | M x N x K | threads | FMA peak | ours | ours/peak |");
    for (int v = 0; v < n_libs; v++) printf(" %s |", libs[v].name);
    printf("%s\n|---|---|---|---|---|---|", n_libs ? "" : " OpenBLAS |");
    for (int v = 0; v < (n_libs ? n_libs : 1); v++) printf("---|");
    printf("\n");
    for (int threads = 1; threads <= max_threads; threads *= 2)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) bench(&shapes[i], 0, threads, libs, n_libs);
    for (size_t i = 0; i < sizeof tiles / sizeof *tiles; i++) bench(&tiles[i], 1, 1, libs, n_libs);
    return 0;
}
