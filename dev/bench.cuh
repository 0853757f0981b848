/*
The harness of the benches in dev/, one bench per op. A bench file holds kernels and a main; everything else is here:

    template <typename X> static void shape(int when, int N, int C) {
        if (!bench_shape<X>(when, "op", bytes, flops, "N %d C %d", N, C)) return;
        Tensor<X> x("x", n), out("out", n);                     // values on the host, their copy on the device
        x.normal(1);                                            // inputs are random numbers that X can hold
        for (int b = 0; b < precisions<X>(); b++)               // the reference: the twin in fp32, and rounding to bf16 where bf16 does
            twin::op(out.twin(b), x.host, N, C, b);             // what has a twin is an output, and is checked
        const Variant variants[] = {
            {0, "one thread per element", [&] { launch(op_kernel0<X>, CEIL_DIV(n, 256), 256, 0, 0, out, x, n); }},
            {1, "16-byte packs", [&] { op<X>(out, x, N, C, 0); }, SHIPPED},     // the trainer's own launcher
        };
        bench(variants);
    }

An output starts as NaN, or as the values it was given (+=), before every run. Its error is |out - twin| / |twin| over the tensor with the twin
in fp32; allowed are 1e-5, in bf16 twice the error of the twin's bf16 form. NaN fails. The checks are themselves checked with planted errors.

    op_bench [--time] [--quiet] [--model N] [numbers]           --time also measures (a GPU); --model N runs row N once, for ptxcpu's counters
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

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *fmt, ...) {     // the trainer's asks other ranks
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "error: ");
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(EXIT_FAILURE);
}

// Every launch passes here, so that a row of the table can say what its kernels take.
struct Footprint { int registers; size_t shared, local; };      // the most of any kernel of a variant; local memory: spills and arrays
static Footprint footprint;

template <typename... P> static void note_launch(void (*kernel)(P...), const cudaLaunchConfig_t &config) {
    cudaFuncAttributes a;
    if (cudaFuncGetAttributes(&a, kernel) != cudaSuccess) return;
    footprint.registers = std::max(footprint.registers, a.numRegs);
    footprint.shared = std::max(footprint.shared, a.sharedSizeBytes + config.dynamicSmemBytes);
    footprint.local = std::max(footprint.local, a.localSizeBytes);
}
#define cudaLaunchKernelEx(config, kernel, ...) (note_launch(kernel, *(config)), cudaLaunchKernelEx(config, kernel, __VA_ARGS__))
#include "trainer.cuh"          // what this bench needs of train_litespark.cu: dev/kernels.py extract
#include "twin.h"

// ---- tensors -----------------------------------------------------------------------------------------------------------
template <typename X> constexpr bool is_bf16() { return sizeof(X) == 2; }
template <typename X> constexpr int precisions() { return is_bf16<X>() ? 2 : 1; }

struct Part { const char *name; size_t first, end; };           // columns of a tensor that are judged by themselves

struct AnyTensor {
    size_t n, width;                    // width: columns of a row
    std::vector<Part> parts;            // by default one, the whole
    double limit = -1;                  // allowed error; -1: see above
    virtual ~AnyTensor() {}
    virtual bool is_output() const = 0;
    virtual void reset() = 0;           // the device gets the start values
    virtual void fetch() = 0;
    virtual double error(const Part &part, double *allowed) const = 0;      // of what was fetched
    virtual void plant(const Part &part, double how_much) = 0;              // a wrong element into what was fetched
};
static std::vector<AnyTensor *> bench_tensors;                  // of the current shape

template <typename X> struct HostType { typedef float type; };
template <> struct HostType<int> { typedef int type; };
template <> struct HostType<double> { typedef double type; };

template <typename X> struct Storage : AnyTensor {
    typedef typename HostType<X>::type H;
    std::vector<H> start, got, reference[2];
    X *device, *device_start = NULL;
    Storage(const char *name, size_t n_) {
        n = width = n_;
        parts.push_back({name, 0, n});
        start.assign(n, (H)NAN);
        cudaCheck(cudaMalloc((void **)&device, n * sizeof(X) + 16));
    }
    ~Storage() {
        cudaCheck(cudaFree(device));
        if (device_start) cudaCheck(cudaFree(device_start));
    }
    bool is_output() const { return !reference[0].empty(); }
    void reset() {
        if (!device_start) {
            std::vector<X> values(n);
            for (size_t i = 0; i < n; i++) values[i] = X(start[i]);
            cudaCheck(cudaMalloc((void **)&device_start, n * sizeof(X) + 16));
            cudaCheck(cudaMemcpy(device_start, values.data(), n * sizeof(X), cudaMemcpyHostToDevice));
        }
        cudaCheck(cudaMemcpyAsync(device, device_start, n * sizeof(X), cudaMemcpyDeviceToDevice, 0));
    }
    void fetch() {
        std::vector<X> values(n);
        cudaCheck(cudaDeviceSynchronize());
        cudaCheck(cudaMemcpy(values.data(), device, n * sizeof(X), cudaMemcpyDeviceToHost));
        got.resize(n);
        for (size_t i = 0; i < n; i++) got[i] = (H)values[i];
    }
    double norm(const Part &part, const std::vector<H> &a, const std::vector<H> *b) const {     // |a - b|, or |a|
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
        if (limit < 0 && !reference[1].empty()) *allowed = fmax(1e-5, 2 * norm(part, reference[1], &reference[0]) / whole);
        return norm(part, got, &reference[0]) / whole;
    }
    void plant(const Part &part, double how_much) {
        const size_t i = n / width / 2 * width + (part.first + part.end) / 2;
        const double size = norm(part, reference[0], NULL);
        got[i] = (H)((double)reference[0][i] + how_much * (size > 0 ? size : 1));
    }
};

template <typename X> struct Tensor {   // a handle: copies name the same tensor. Passes as X * to kernels
    typedef typename Storage<X>::H H;
    Storage<X> *s;
    H *host;
    Tensor(const char *name, size_t n) {
        bench_tensors.push_back(s = new Storage<X>(name, n));
        host = s->start.data();
    }
    operator X *() const { return s->device; }
    void normal(float amplitude, float mean = 0) {              // normal enough: the sum of four uniform numbers
        static uint32_t state = 1;
        for (size_t i = 0; i < s->n; i++) {
            float sum = -2;
            for (int k = 0; k < 4; k++) sum += ((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f;
            host[i] = (H)(X)(sum * 1.7320508f * amplitude + mean);
        }
    }
    void set(float x) { for (size_t i = 0; i < s->n; i++) host[i] = (H)(X)x; }
    H *twin(int b) const {              // where the twin writes (b 1: in its bf16 form); starts as the tensor starts
        if (s->reference[b].empty()) s->reference[b] = s->start;
        return s->reference[b].data();
    }
    void allow(double limit) const { s->limit = limit; }
    void judge_apart(size_t width, std::vector<Part> parts) const { s->width = width, s->parts = parts; }
};

// ---- what to run ---------------------------------------------------------------------------------------------------------
enum { CHECK = 1, MODEL = 2, TIME = 4, SHIPPED = 1 };
struct Variant { int number; const char *idea; std::function<void()> run; int shipped = 0; };    // without run: not of this type

struct Summary { std::string op; int number, shipped, shapes, failed; const char *idea; double worst; std::string text; };

static struct {
    const char *file;
    std::string op;                     // of the current table
    int run, now, quiet, passed, failed;    // run: CHECK, TIME, MODEL bits; now: those of the current shape
    int row, model_row;                 // --model: the row to run, counted over all tables of the file
    std::vector<Summary> summary;       // of the checks, in the order of the table
    std::vector<int> only;
    double bytes, flops, floor_us, bandwidth, peak_bf16, peak_fp32;
    char device[300], shape[300];
} bench_state;

static void bench_begin(const char *file, int argc, char **argv) {
    // Dense peaks of the data sheets (SXM): bytes/s, bf16 FLOP/s by tensor cores, fp32 FLOP/s outside them
    static const struct { const char *name; double bandwidth, bf16, fp32; } peaks[] = {
        {"H200", 4.8e12, 989e12, 67e12}, {"H100", 3.35e12, 989e12, 67e12}, {"A100-SXM4-80", 2.039e12, 312e12, 19.5e12}, {"A100", 1.555e12, 312e12, 19.5e12}};
    bench_state.file = file, bench_state.run = CHECK;
    bench_state.bandwidth = 3.35e12, bench_state.peak_bf16 = 989e12, bench_state.peak_fp32 = 67e12;     // an H100's, where no GPU answers
    cudaDeviceProp p;
    int driver = 0;
    cudaCheck(cudaGetDeviceProperties(&p, 0));
    int i = 0;
    for (i = 0; i < 4 && !strstr(p.name, peaks[i].name); i++) {}
    if (i < 4) bench_state.bandwidth = peaks[i].bandwidth, bench_state.peak_bf16 = peaks[i].bf16, bench_state.peak_fp32 = peaks[i].fp32;
    else snprintf(bench_state.device, sizeof bench_state.device, "peaks of an H100; ");
#ifdef __CUDACC__
    cudaDriverGetVersion(&driver);
#endif
    snprintf(bench_state.device + strlen(bench_state.device), 280, "%s, driver %d", p.name, driver);
    for (int a = 1; a < argc; a++) {
        if (!strcmp(argv[a], "--time")) bench_state.run |= TIME;
        else if (!strcmp(argv[a], "--quiet")) bench_state.quiet = 1;
        else if (!strcmp(argv[a], "--model") && a + 1 < argc) bench_state.run = MODEL, bench_state.model_row = atoi(argv[++a]);
        else if (argv[a][0] >= '0' && argv[a][0] <= '9') bench_state.only.push_back(atoi(argv[a]));
        else die("unknown argument '%s': [--time] [--quiet] [--model N] [numbers of variants]", argv[a]);
    }
}

// 0: nothing to do for this shape now. bytes: compulsory traffic, each tensor once.
template <typename X> __attribute__((format(printf, 5, 6))) static int bench_shape(int when, const char *op, double bytes,
                                                                                                  double flops, const char *fmt, ...) {
    if (!(when & bench_state.run)) return 0;
    const double peak = is_bf16<X>() ? bench_state.peak_bf16 : bench_state.peak_fp32;
    va_list args;
    va_start(args, fmt);
    vsnprintf(bench_state.shape, 280, fmt, args);
    va_end(args);
    bench_state.op = op;
    strcat(bench_state.shape, is_bf16<X>() ? " bf16" : " fp32");
    bench_state.bytes = bytes, bench_state.flops = flops, bench_state.floor_us = 1e6 * fmax(bytes / bench_state.bandwidth, flops / peak);
    if (when & bench_state.run & TIME)
        printf("\n%s  %s   floor %.2f us (%s-bound)   %s\n", op, bench_state.shape, bench_state.floor_us,
               bytes / bench_state.bandwidth > flops / peak ? "memory" : "FLOP", bench_state.device);
    return bench_state.now = when & bench_state.run;
}

// ---- checking and timing -------------------------------------------------------------------------------------------------
static void reset_outputs(void) { for (AnyTensor *t : bench_tensors) if (t->is_output()) t->reset(); }

// Runs a variant once. 1 if all its outputs are right; text: the one closest to (or beyond) what is allowed.
static int check_variant(const Variant &v, char *text, size_t room) {
    double worst = -1;
    int ok = 1;
    reset_outputs();
    footprint = Footprint();
    v.run();
    for (AnyTensor *t : bench_tensors) {
        if (!t->is_output()) continue;
        t->fetch();
        for (const Part &part : t->parts) {
            double allowed, error = t->error(part, &allowed), share = error <= allowed ? allowed > 0 ? error / allowed : 0 : INFINITY;
            if (share > worst) snprintf(text, room, "%s %.1e of %.1e", part.name, error, allowed), worst = share;
            ok &= error <= allowed;
        }
    }
    for (Summary &s : bench_state.summary) {
        if (s.number != v.number || s.op != bench_state.op) continue;
        s.shapes++, s.failed += !ok;
        if (worst > s.worst) s.worst = worst, s.text = text;
        return ok;
    }
    bench_state.summary.push_back({bench_state.op, v.number, v.shipped, 1, !ok, v.idea, worst, text});
    return ok;
}

// How many planted errors, four times what is allowed or NaN, the check would not see. Uses what the last variant left.
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
                    printf("FAIL %s: the check of %s accepts a planted error\n", bench_state.op.c_str(), part.name);
                }
                t->fetch();
            }
        }
    }
    return blind;
}

static double quantile(std::vector<float> x, double q) {
    std::sort(x.begin(), x.end());
    return x[(size_t)(q * (x.size() - 1) + 0.5)];
}

// us of each variant: 50 samples in turns, 10 of those that take more than 20 ms. The L2 cache is overwritten before each, outside the events.
static std::vector<std::vector<float>> time_variants(const std::vector<const Variant *> &variants) {
    const int WARM_UP = 3, SAMPLES = 50;
    std::vector<std::vector<float>> times(variants.size());
    cudaEvent_t start, stop;
    cudaCheck(cudaEventCreate(&start));
    cudaCheck(cudaEventCreate(&stop));
    int l2 = 0;
    cudaCheck(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0));
    void *flush;
    cudaCheck(cudaMalloc(&flush, (size_t)2 * l2 + 16));
    for (int s = -WARM_UP; s < SAMPLES; s++)
        for (size_t i = 0; i < variants.size(); i++) {
            float ms = 0;
            if (s >= 10 && quantile(times[i], 0.5) > 20000) continue;
            reset_outputs();
            cudaCheck(cudaMemsetAsync(flush, s & 255, (size_t)2 * l2, 0));
            cudaCheck(cudaEventRecord(start, 0));
            variants[i]->run();
            cudaCheck(cudaEventRecord(stop, 0));
            cudaCheck(cudaEventSynchronize(stop));
            cudaCheck(cudaEventElapsedTime(&ms, start, stop));
            if (s >= 0) times[i].push_back(ms * 1000);
        }
    cudaCheck(cudaFree(flush));
    cudaCheck(cudaEventDestroy(start));
    cudaCheck(cudaEventDestroy(stop));
    return times;
}

template <int n> static void bench(const Variant (&variants)[n]) {
    std::vector<const Variant *> good;
    std::vector<Footprint> footprints;
    std::vector<std::string> errors;
    for (AnyTensor *t : bench_tensors) t->reset();
    for (const Variant &v : variants) {
        if (!v.run || (!bench_state.only.empty() && std::find(bench_state.only.begin(), bench_state.only.end(), v.number) == bench_state.only.end())) continue;
        if (bench_state.run == MODEL) {
            if (bench_state.row++ != bench_state.model_row) continue;
            printf("model|%d%s|%s|%s  %s|%g|%g\n", v.number, v.shipped ? "*" : "", v.idea, bench_state.op.c_str(), bench_state.shape, bench_state.bytes / 1e6,
                   bench_state.floor_us);
            v.run();
            cudaCheck(cudaDeviceSynchronize());
            continue;
        }
        char text[200] = "";
        const int ok = check_variant(v, text, sizeof text);
        bench_state.passed += ok;
        bench_state.failed += !ok;
        if (ok && good.empty()) bench_state.failed += check_the_check();
        if (ok) good.push_back(&v), footprints.push_back(footprint), errors.push_back(text);
        else printf("%2d  %-60s FAIL %s (%s)\n", v.number, v.idea, text, bench_state.shape);
    }
    if (bench_state.now & TIME && !good.empty()) {
        std::vector<std::vector<float>> times = time_variants(good);
        size_t best = 0;
        for (size_t i = 1; i < good.size(); i++) if (quantile(times[i], 0.5) < quantile(times[best], 0.5)) best = i;
        printf(" #  %-60s %-28s %10s %10s..%-10s %8s %8s %7s %5s %7s %6s\n", "idea", "rel err (allowed)", "median us", "p10", "p90", "GB/s", "TFLOP/s", "% floor",
               "regs", "smem", "spill");
        for (size_t i = 0; i < good.size(); i++) {
            const double us = quantile(times[i], 0.5);
            printf("%2d  %-60s %-28s %10.2f %10.2f..%-10.2f %8.1f %8.2f %7.1f %5d %7zu %6zu%s%s\n", good[i]->number, good[i]->idea, errors[i].c_str(), us,
                   quantile(times[i], 0.1), quantile(times[i], 0.9), bench_state.bytes / us / 1e3, bench_state.flops / us / 1e6,
                   100 * bench_state.floor_us / us, footprints[i].registers, footprints[i].shared, footprints[i].local,
                   good[i]->shipped ? "  <- shipped" : "", i == best ? "  <- best" : "");
        }
    }
    for (AnyTensor *t : bench_tensors) delete t;
    bench_tensors.clear();
    fflush(stdout);
}

static int bench_end(void) {
    const char *op = "";
    for (const Summary &s : bench_state.summary) {
        if (bench_state.quiet) break;
        if (s.op != op) printf("\n #  %-60s error of allowed: the worst of its shapes\n", (op = s.op.c_str(), s.op + ": idea").c_str());
        printf("%2d  %-60s %-30s %d shapes%s%s\n", s.number, s.idea, s.text.c_str(), s.shapes, s.failed ? ", FAIL" : "", s.shipped ? "  <- shipped" : "");
    }
    if (bench_state.run != MODEL) printf("%s%s: %d passed, %d failed\n", bench_state.quiet ? "" : "\n", bench_state.file, bench_state.passed, bench_state.failed);
    return bench_state.failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
