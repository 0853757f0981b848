/*
The harness of the benches in dev/, one bench per op. A bench file holds kernels and a main; everything else
is here:

    template <typename floatX> static void shape(int when, int N, int C) {
        if (!bench_shape<floatX>(when, "op", bytes, flops, "N %d C %d", N, C)) return;
        Tensor<floatX> x("x", n), out("out", n);        // values on the host, their copy on the device
        x.normal(1);                                    // inputs are random numbers that floatX can hold
        reference<floatX>([&](int b) {                  // the twin in fp32, then (b 1) rounding as bf16 does
            twin::op(out.twin(b), x.host, N, C);        // what has a twin is an output, and is checked
        });
        const Variant variants[] = {
            {0, "plain", [&] { launch(op_kernel0<floatX>, CEIL_DIV(n, 256), 256, 0, out, x, n); }},
            {1, "16-byte packs", [&] { op<floatX>(out, x, N, C); }, SHIPPED},   // the trainer's launcher
        };
        bench(variants);
    }

An output starts as NaN, or as the values it was given (+=), before every run. Its error is |out - twin| /
|twin| over the tensor, with the twin in fp32; allowed are 1e-5, in bf16 twice the error of the twin's bf16
form. NaN fails. Planted errors check the checks.

    OP [--time] [--quiet] [--model ROW] [numbers of variants]
        --time also measures (a GPU); --model runs one row of the tables once, for ptxcpu's counters
*/
#pragma once
#include <algorithm>
#include <functional>
#include <string>
#include <vector>
#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

// the trainer's asks other ranks
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "error: ");
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(EXIT_FAILURE);
}

// Every launch passes here, so that a row of the table can say what its kernels take.
// the most of any kernel of a variant; local memory: spills and arrays
struct Footprint { int registers; size_t shared, local; };
static Footprint footprint;

template <typename... P> static void note_launch(void (*kernel)(P...), const cudaLaunchConfig_t &config) {
    cudaFuncAttributes a;
    if (cudaFuncGetAttributes(&a, kernel) != cudaSuccess) return;
    footprint.registers = std::max(footprint.registers, a.numRegs);
    footprint.shared = std::max(footprint.shared, a.sharedSizeBytes + config.dynamicSmemBytes);
    footprint.local = std::max(footprint.local, a.localSizeBytes);
}
#define cudaLaunchKernelEx(config, kernel, ...) \
    (note_launch(kernel, *(config)), cudaLaunchKernelEx(config, kernel, __VA_ARGS__))
#include "trainer.cuh"          // what this bench needs of train_litespark.cu: dev/kernels.py extract
#include "twin.h"

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// ---- tensors ----------------------------------------------------------------------------------------------
template <typename floatX> constexpr bool is_bf16() { return sizeof(floatX) == 2; }
// f(0): the reference in fp32; for bf16 then f(1), in which the twin's ops round what they store
template <typename floatX, typename F> static void reference(F f) {
    for (int b = 0; b < (is_bf16<floatX>() ? 2 : 1); b++) {
        twin::precision(b);
        f(b);
    }
    twin::precision(0);
}

struct Part { const char *name; size_t first, end; };  // columns of a tensor that are judged by themselves

struct AnyTensor {
    size_t n, width;                    // width: columns of a row
    std::vector<Part> parts;            // by default one, the whole
    double limit = -1;                  // allowed error; -1: see above
    virtual ~AnyTensor() {}
    virtual bool is_output() const = 0;
    virtual void reset() = 0;           // the device gets the start values
    virtual void fetch() = 0;
    virtual bool fetch_same() = 0;      // fetches, too: are the bits those fetched before?
    virtual double error(const Part &part, double *allowed) const = 0;      // of what was fetched
    virtual void plant(const Part &part, double how_much) = 0;  // a wrong element into what was fetched
};
static std::vector<AnyTensor *> bench_tensors;                  // of the current shape

template <typename Element> struct HostType { typedef float type; };
template <> struct HostType<int> { typedef int type; };
template <> struct HostType<double> { typedef double type; };

template <typename Element> struct Storage : AnyTensor {
    typedef typename HostType<Element>::type H;
    std::vector<H> start, got, reference[2];
    Element *device, *device_start = NULL;
    Storage(const char *name, size_t n_) {
        n = width = n_;
        parts.push_back({name, 0, n});
        start.assign(n, (H)NAN);
        cudaCheck(cudaMalloc((void **)&device, n * sizeof(Element) + 16));
    }
    ~Storage() {
        cudaCheck(cudaFree(device));
        if (device_start) cudaCheck(cudaFree(device_start));
    }
    bool is_output() const { return !reference[0].empty(); }
    void reset() {
        if (!device_start) {
            std::vector<Element> values(n);
            for (size_t i = 0; i < n; i++) values[i] = Element(start[i]);
            cudaCheck(cudaMalloc((void **)&device_start, n * sizeof(Element) + 16));
            cudaCheck(cudaMemcpy(device_start, values.data(), n * sizeof(Element), cudaMemcpyHostToDevice));
        }
        cudaCheck(cudaMemcpyAsync(device, device_start, n * sizeof(Element), cudaMemcpyDeviceToDevice, 0));
    }
    void fetch() {
        std::vector<Element> values(n);
        cudaCheck(cudaDeviceSynchronize());
        cudaCheck(cudaMemcpy(values.data(), device, n * sizeof(Element), cudaMemcpyDeviceToHost));
        got.resize(n);
        for (size_t i = 0; i < n; i++) got[i] = (H)values[i];
    }
    bool fetch_same() {
        const std::vector<H> before = got;
        fetch();
        return !memcmp(got.data(), before.data(), n * sizeof(H));
    }
    // |a - b|, or |a|
    double norm(const Part &part, const std::vector<H> &a, const std::vector<H> *b) const {
        double sum = 0;
        for (size_t row = 0; row < n; row += width)
            for (size_t i = row + part.first; i < row + part.end; i++) {
                double d = (double)a[i] - (b ? (double)(*b)[i] : 0);
                sum += d * d;
            }
        return sqrt(sum);
    }
    double error(const Part &part, double *allowed) const {
        const double size = norm(part, reference[0], NULL), whole = size > 0 ? size : 1;
        *allowed = limit >= 0 ? limit : 1e-5;
        if (limit < 0 && !reference[1].empty())
            *allowed = fmax(1e-5, 2 * norm(part, reference[1], &reference[0]) / whole);
        return norm(part, got, &reference[0]) / whole;
    }
    void plant(const Part &part, double how_much) {
        const size_t i = n / width / 2 * width + (part.first + part.end) / 2;
        const double size = norm(part, reference[0], NULL);
        got[i] = (H)((double)reference[0][i] + how_much * (size > 0 ? size : 1));
    }
};

// a handle: copies name the same tensor. Passes as Element * to kernels
template <typename Element> struct Tensor {
    typedef typename Storage<Element>::H H;
    Storage<Element> *s;
    H *host;
    Tensor(const char *name, size_t n) {
        bench_tensors.push_back(s = new Storage<Element>(name, n));
        host = s->start.data();
    }
    operator Element *() const { return s->device; }
    void normal(float amplitude, float mean = 0) {  // normal enough: the sum of four uniform numbers
        static uint32_t state = 1;
        for (size_t i = 0; i < s->n; i++) {
            float sum = -2;
            for (int k = 0; k < 4; k++) sum += ((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f;
            host[i] = (H)(Element)(sum * 1.7320508f * amplitude + mean);
        }
    }
    void set(float x) { for (size_t i = 0; i < s->n; i++) host[i] = (H)(Element)x; }
    H *twin(int b) const {  // where the twin writes (b 1: in its bf16 form); starts as the tensor starts
        if (s->reference[b].empty()) s->reference[b] = s->start;
        return s->reference[b].data();
    }
    void allow(double limit) const { s->limit = limit; }
    void judge_apart(size_t width, std::vector<Part> parts) const { s->width = width, s->parts = parts; }
};

// ---- what to run ------------------------------------------------------------------------------------------
// when a shape is run: over dev/emu, under ptxcpu, on a GPU
enum { CHECK = 1, MODEL = 2, TIME = 4, SHIPPED = 1, SAME_BITS = 1 };
// without run: not of this type. repeats: SAME_BITS if a second run must have them, for whose blocks meet
struct Variant { int number; const char *idea; std::function<void()> run; int shipped = 0, repeats = 0; };
struct Summary {
    std::string op;
    int number, shipped, shapes, failed;
    const char *idea;
    double worst;
    std::string text;
};

static struct {
    const char *file;
    // run: CHECK, MODEL, TIME bits; row: counts over all tables
    int run, quiet, row, model_row, passed, failed;
    double bandwidth, peak_bf16, peak_fp32;
    char device[400];
    std::vector<int> only;
    std::vector<Summary> summary;                               // of the checks, in the order of the tables
} harness;

static struct {
    int when;
    std::string op;
    char text[300];
    double bytes, flops, floor_us;
} current;                                                      // the shape that is being run

static void bench_begin(const char *file, int argc, char **argv) {
    // Dense peaks of the data sheets (SXM): bytes/s; FLOP/s of bf16 by tensor cores, of fp32 outside them.
    // The last: an unknown GPU
    static const struct { const char *name; double bandwidth, bf16, fp32; } peaks[] = {
        {"H200", 4.8e12, 989e12, 67e12},
        {"H100", 3.35e12, 989e12, 67e12},
        {"A100-SXM4-80", 2.039e12, 312e12, 19.5e12},
        {"A100", 1.555e12, 312e12, 19.5e12},
        {"", 3.35e12, 989e12, 67e12},
    };
    cudaDeviceProp p;
    cudaCheck(cudaGetDeviceProperties(&p, 0));
    int i = 0, driver = 0;
    while (!strstr(p.name, peaks[i].name)) i++;
#ifdef __CUDACC__
    cudaDriverGetVersion(&driver);
#endif
    snprintf(harness.device, sizeof harness.device, "%s, driver %d%s", p.name, driver,
             *peaks[i].name ? "" : ", floors of an H100");
    harness.bandwidth = peaks[i].bandwidth;
    harness.peak_bf16 = peaks[i].bf16, harness.peak_fp32 = peaks[i].fp32;
    harness.file = file, harness.run = CHECK;
    for (int a = 1; a < argc; a++) {
        if (!strcmp(argv[a], "--time")) harness.run |= TIME;
        else if (!strcmp(argv[a], "--quiet")) harness.quiet = 1;
        else if (!strcmp(argv[a], "--model") && a + 1 < argc)
            harness.run = MODEL, harness.model_row = atoi(argv[++a]);
        else if (argv[a][0] >= '0' && argv[a][0] <= '9') harness.only.push_back(atoi(argv[a]));
        else die("unknown argument '%s': [--time] [--quiet] [--model ROW] [numbers of variants]", argv[a]);
    }
}

// 0: nothing to do for this shape now. bytes: compulsory traffic, each tensor once.
template <typename floatX> __attribute__((format(printf, 5, 6)))
static int bench_shape(int when, const char *op, double bytes, double flops, const char *fmt, ...) {
    if (!(when & harness.run)) return 0;
    const double peak = is_bf16<floatX>() ? harness.peak_bf16 : harness.peak_fp32;
    va_list args;
    va_start(args, fmt);
    vsnprintf(current.text, 280, fmt, args);
    va_end(args);
    strcat(current.text, is_bf16<floatX>() ? " bf16" : " fp32");
    current.when = when & harness.run, current.op = op, current.bytes = bytes, current.flops = flops;
    current.floor_us = 1e6 * fmax(bytes / harness.bandwidth, flops / peak);
    if (current.when & TIME)
        printf("\n%s  %s   floor %.2f us (%s-bound)   %s\n", op, current.text, current.floor_us,
               bytes / harness.bandwidth > flops / peak ? "memory" : "FLOP", harness.device);
    return 1;
}

// ---- documents of the attention benches: none, random, one per token, at tile borders ---------------------
enum { NO_DOCS, SOME_DOCS, OWN_DOCS, TILE_DOCS };
static const char *const document_kinds[] = {"", " documents", " documents of one token",
                                             " documents of a tile"};

// first (N): where the document of each row begins. Returns the number of visible pairs.
static double document_starts(int *first, int kind, int N, int T) {
    double pairs = 0;
    for (int n = 0, start = 0; n < N; n++) {
        const int t = n % T;
        const bool random = n * 2654435761u % 64 == 0, border = t % 64 == 0;
        if (t == 0 || kind == OWN_DOCS || (kind == SOME_DOCS && random) || (kind == TILE_DOCS && border))
            start = t;
        first[n] = start;
        pairs += t - start + 1;
    }
    return pairs;
}

// ---- checking ---------------------------------------------------------------------------------------------
static void reset_outputs(void) { for (AnyTensor *t : bench_tensors) if (t->is_output()) t->reset(); }

// Runs a variant once. 1 if all its outputs are right; text: the one closest to (or beyond) what is allowed.
static int check_variant(const Variant &v, std::string *text) {
    double worst = -1;
    int ok = 1;
    reset_outputs();
    footprint = Footprint();
    v.run();
    for (AnyTensor *t : bench_tensors) {
        if (!t->is_output()) continue;
        t->fetch();
        for (const Part &part : t->parts) {
            double allowed, error = t->error(part, &allowed), share = INFINITY;
            if (error <= allowed) share = allowed > 0 ? error / allowed : 0;
            else ok = 0;
            if (share <= worst) continue;
            char line[200];
            snprintf(line, sizeof line, "%s %.1e of %.1e", part.name, error, allowed);
            worst = share, *text = line;
        }
    }
    if (v.repeats) {
        reset_outputs();
        v.run();
        for (AnyTensor *t : bench_tensors)
            if (t->is_output() && !t->fetch_same()) {
                ok = 0, worst = INFINITY;
                *text = std::string(t->parts[0].name) + "...: other bits in a second run";
            }
    }
    for (Summary &s : harness.summary) {
        if (s.number != v.number || s.op != current.op) continue;
        s.shapes++, s.failed += !ok;
        if (worst > s.worst) s.worst = worst, s.text = *text;
        return ok;
    }
    harness.summary.push_back({current.op, v.number, v.shipped, 1, !ok, v.idea, worst, *text});
    return ok;
}

// How many planted errors, four times what is allowed or NaN, the check would not see. Uses what the last
// variant left.
static int check_the_check(void) {
    int blind = 0;
    for (AnyTensor *t : bench_tensors) {
        if (!t->is_output()) continue;
        for (const Part &part : t->parts) {
            double allowed;
            t->error(part, &allowed);
            const double planted[2] = {allowed > 0 ? 4 * allowed : 1, NAN};
            for (double p : planted) {
                t->plant(part, p);
                if (t->error(part, &allowed) <= allowed) {
                    blind++;
                    printf("FAIL %s: the check of %s accepts a planted error\n", current.op.c_str(),
                           part.name);
                }
                t->fetch();
            }
        }
    }
    return blind;
}

// ---- timing -----------------------------------------------------------------------------------------------
struct Row { const Variant *variant; Footprint footprint; std::string error; std::vector<float> us; };

static double quantile(std::vector<float> x, double q) {
    std::sort(x.begin(), x.end());
    return x[(size_t)(q * (x.size() - 1) + 0.5)];
}

// 50 samples of each row in turns, so that a drift of the clocks hits all alike; 10 of rows that take more
// than 20 ms. Before each, outside the events, the outputs get their start values and the L2 cache is
// overwritten.
static void time_rows(std::vector<Row> &rows) {
    const int WARM_UP = 3, SAMPLES = 50;
    cudaEvent_t start, stop;
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&stop));
    int l2 = 0;
    cudaCheck(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0));
    const size_t flush_bytes = (size_t)2 * l2 + 16;
    void *flush;
    cudaCheck(cudaMalloc(&flush, flush_bytes));
    for (int s = -WARM_UP; s < SAMPLES; s++)
        for (Row &row : rows) {
            float ms = 0;
            if (s >= 10 && quantile(row.us, 0.5) > 20000) continue;
            reset_outputs();
            cudaCheck(cudaMemsetAsync(flush, s & 255, flush_bytes, 0));
            cudaCheck(cudaEventRecord(start, 0));
            row.variant->run();
            cudaCheck(cudaEventRecord(stop, 0));
            cudaCheck(cudaEventSynchronize(stop));
            cudaCheck(cudaEventElapsedTime(&ms, start, stop));
            if (s >= 0) row.us.push_back(ms * 1000);
        }
    cudaCheck(cudaFree(flush));
    cudaCheck(cudaEventDestroy(start));
    cudaCheck(cudaEventDestroy(stop));
}

static void print_times(const std::vector<Row> &rows) {
    double best = INFINITY;
    for (const Row &r : rows) best = fmin(best, quantile(r.us, 0.5));
    printf(" #  %-60s %-28s %10s %10s..%-10s %8s %8s %7s %5s %7s %6s\n", "idea", "error of allowed",
           "median us", "p10", "p90", "GB/s", "TFLOP/s", "% floor", "regs", "smem", "spill");
    for (const Row &r : rows) {
        const double us = quantile(r.us, 0.5);
        printf("%2d  %-60s %-28s %10.2f %10.2f..%-10.2f %8.1f %8.2f %7.1f", r.variant->number,
               r.variant->idea, r.error.c_str(), us, quantile(r.us, 0.1), quantile(r.us, 0.9),
               current.bytes / us / 1e3, current.flops / us / 1e6, 100 * current.floor_us / us);
        printf(" %5d %7zu %6zu%s%s\n", r.footprint.registers, r.footprint.shared, r.footprint.local,
               r.variant->shipped ? "  <- shipped" : "", us == best ? "  <- best" : "");
    }
}

// ---- putting it together ----------------------------------------------------------------------------------
static void model_row(const Variant &v) {
    if (harness.row++ != harness.model_row) return;
    printf("model|%d%s|%s|%s  %s|%g|%g\n", v.number, v.shipped ? "*" : "", v.idea, current.op.c_str(),
           current.text, current.bytes / 1e6, current.floor_us);
    v.run();
    cudaCheck(cudaDeviceSynchronize());
}

template <int n> static void bench(const Variant (&variants)[n]) {
    std::vector<Row> good;
    for (AnyTensor *t : bench_tensors) t->reset();
    for (const Variant &v : variants) {
        const std::vector<int> &only = harness.only;
        if (!v.run || (!only.empty() && std::find(only.begin(), only.end(), v.number) == only.end()))
            continue;
        if (harness.run == MODEL) {
            model_row(v);
            continue;
        }
        std::string text;
        if (check_variant(v, &text)) {
            harness.passed++;
            if (good.empty()) harness.failed += check_the_check();
            good.push_back({&v, footprint, text, {}});
        } else {
            harness.failed++;
            printf("%2d  %-60s FAIL %s (%s)\n", v.number, v.idea, text.c_str(), current.text);
        }
    }
    if (current.when & TIME && !good.empty()) {
        time_rows(good);
        print_times(good);
    }
    for (AnyTensor *t : bench_tensors) delete t;
    bench_tensors.clear();
    fflush(stdout);
}

static int bench_end(void) {
    std::string op;
    if (harness.run == MODEL) return EXIT_SUCCESS;
    if (harness.passed + harness.failed == 0) die("%s has no such variant", harness.file);
    for (const Summary &s : harness.summary) {
        if (harness.quiet) break;
        if (s.op != op)
            printf("\n #  %-60s error of allowed: the worst of its shapes\n", (s.op + ": idea").c_str());
        op = s.op;
        printf("%2d  %-60s %-30s %d shapes%s%s\n", s.number, s.idea, s.text.c_str(), s.shapes,
               s.failed ? ", FAIL" : "", s.shipped ? "  <- shipped" : "");
    }
    printf("%s%s: %d passed, %d failed\n", harness.quiet ? "" : "\n", harness.file, harness.passed,
           harness.failed);
    return harness.failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
