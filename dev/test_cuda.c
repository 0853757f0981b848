/*
Proof of a CUDA build of litespark against the twin, from the outside: both programs read the same weights and data, and what
they write (--dump-grads, log.jsonl, checkpoints, text) must agree.

    build/test_cuda --twin build/train_litespark --cuda 'PREFIX build/train_litespark_emu' [--double build/train_litespark_double]
                    [--level quick|ptx|long] [words of check names]

--cuda is a command: `build/train_litespark_emu` (dev/emu), `ptxcpu --race -- build/train_litespark_ptx`, or the trainer on a GPU.
One line per check; the last line is "N passed, N failed[, N skipped]". NaN fails everywhere.

Criteria, e(x) = |x - twin| / |twin| of one tensor's gradient, twin = its --precision fp32:
    fp32   e(cuda) <= 1e-5, or 4 times the distance between the twin and its build in doubles where that is more (ill-conditioned)
    bf16   e(cuda) <= 2 e(twin --precision bf16) =: 2e, cosine >= 1 - (2e)^2; the loss: see loss_tolerance. Weights
           are bf16 numbers, so both read the same.
Planted errors: a copy of train_litespark.cu in which PLANTED=i swaps one text for a wrong one must fail these criteria, or be
reported.
*/
#define LITESPARK_NO_MAIN
#include "../train_litespark.c"
#include <ftw.h>
#include <sys/wait.h>

// printf into a fresh string of any length
__attribute__((format(printf, 1, 2))) static char *path_text(const char *fmt, ...) {
    char *s = NULL;
    va_list args;
    va_start(args, fmt);
    if (vasprintf(&s, fmt, args) < 0) die("out of memory");
    va_end(args);
    return s;
}

enum { QUICK = 1, PTX = 2, LONG = 4, ALL_LEVELS = 7, HOPPER = 8 };    // HOPPER: planted, on an emulated one
static int level = QUICK;
static const char *twin = "build/train_litespark", *cuda, *doubles = "build/train_litespark_double";
static char top[256];                       // folder of this run
static int passed, failed, skipped, n_filters;
static const char *filters[64];
static double timeout = 240;                // seconds for one process
static uint64_t seed = 11;                  // of weights and data

// ==== 1. Results ========================================================================================================
static int wanted(const char *name) {
    for (int i = 0; i < n_filters; i++) if (strstr(name, filters[i])) return 1;
    return n_filters == 0;
}

static double last_result;

__attribute__((format(printf, 3, 4))) static void result(const char *name, int ok, const char *fmt, ...) {
    va_list args;
    if (ok) passed++;
    else failed++;
    printf("%s  %s: ", ok ? "ok  " : "FAIL", name);
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf(" (%.1f s)\n", now_seconds() - last_result);
    last_result = now_seconds();
    fflush(stdout);
}

static void skip(const char *name, const char *why) {
    skipped++;
    printf("skipped: %s: %s\n", name, why);
    fflush(stdout);
}

// ==== 2. Processes ======================================================================================================
typedef struct Run {
    pid_t pid;
    int code;                               // exit status; 128 + signal; -1 after the timeout
    double start;
    char out_path[320], err_path[320], *out, *err;
} Run;

// Starts a command of the shell.
__attribute__((format(printf, 1, 2))) static Run start(const char *fmt, ...) {
    static int count;
    char line[6000];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    Run r;
    memset(&r, 0, sizeof r);
    snprintf(r.out_path, sizeof r.out_path, "%s/run%d.out", top, ++count);
    snprintf(r.err_path, sizeof r.err_path, "%s/run%d.err", top, count);
    if (getenv("VERBOSE")) printf("run: %s\n", line);
    fflush(stdout);
    r.start = now_seconds();
    r.pid = fork();
    if (r.pid == 0) {
        setpgid(0, 0);
        int in = open("/dev/null", O_RDONLY), out = open(r.out_path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        int err = open(r.err_path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        dup2(in, 0);
        dup2(out, 1);
        dup2(err, 2);
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(127);
    }
    setpgid(r.pid, r.pid);
    return r;
}

static char *slurp(const char *path) {
    size_t n;
    return access(path, R_OK) ? xstrdup("") : read_text_file(path, (size_t)1 << 30, &n);
}

static int finish_in(Run *r, double seconds) {
    int status = 0, ended = 0;
    while (!(ended = waitpid(r->pid, &status, WNOHANG) == r->pid) && now_seconds() - r->start < seconds) usleep(2000);
    if (!ended) {
        kill(-r->pid, SIGKILL);
        waitpid(r->pid, &status, 0);
    }
    r->code = !ended ? -1 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    r->out = slurp(r->out_path);
    r->err = slurp(r->err_path);
    return r->code;
}
static int finish(Run *r) { return finish_in(r, timeout); }

// What a failed run said last, on one line.
static const char *complaint(const Run *r) {
    static char text[4][420];
    static int next;
    char *t = text[next++ % 4];
    const char *s = r->err, *at = strstr(s, "error: ");
    if (!at) at = strstr(s, "emu: ");
    if (!at) at = strlen(s) > 300 ? s + strlen(s) - 300 : s;
    snprintf(t, sizeof text[0], "exit status %d: %.380s", r->code, at);
    for (char *c = t; *c; c++) if (*c == '\n') *c = ' ';
    return t;
}

static int same_files(const char *a, const char *b) {
    struct stat x, y;
    if (stat(a, &x) || stat(b, &y) || x.st_size != y.st_size || x.st_size == 0) return 0;
    char *p = slurp(a), *q = slurp(b);
    int same = !memcmp(p, q, (size_t)x.st_size);
    free(p);
    free(q);
    return same;
}

static int remove_one(const char *path, const struct stat *info, int type, struct FTW *ftw) {
    (void)info; (void)type; (void)ftw;
    return remove(path);
}

static int is_emu(void) { return strstr(cuda, "emu") && !strstr(cuda, "ptxcpu"); }

// ==== 3. Models and data ================================================================================================
typedef struct Case {
    const char *name, *family;
    int tied, V, L, C, H, K, D, F, B, T, chunk;
    int document;                           // mean length of a document, with the document mask; 0: no mask
    int levels;
    const char *more;                       // of config.json
} Case;

#define LLAMA3 "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4, " \
               "\"original_max_position_embeddings\": 64}"
static const Case cases[] = {
//   name          family     tied    V  L     C  H  K    D    F  B    T chunk doc levels
    {"llama",      "llama",   0,    203, 2,   48, 4, 2,  16,  40, 2,  37,  29,  0, ALL_LEVELS, LLAMA3},
    {"mistral",    "mistral", 0,    130, 1,   64, 2, 2,  64,  72, 1, 133,  64,  0, ALL_LEVELS, ""},
    {"qwen2",      "qwen2",   1,     99, 2,   56, 6, 1,   8,  64, 3,  33,  50,  0, ALL_LEVELS, ""},
    {"qwen3",      "qwen3",   1,    150, 2,   40, 2, 1,  48,  56, 3,  29,  87,  0, ALL_LEVELS, ""},
    {"d104",       "llama",   0,    128, 1,   32, 2, 2, 104,  24, 1, 131, 200,  0, ALL_LEVELS, ""},
    {"d128",       "qwen3",   0,     77, 1,   24, 4, 2, 128,  16, 1,  70,  33,  0, QUICK | LONG, ""},
    {"documents",  "llama",   0,     61, 1,   32, 4, 2,  16,  24, 2, 150, 300, 23, ALL_LEVELS, ""},
    {"wide",       "llama",   0,     50, 1, 1032, 2, 1,   8,  24, 1,   9,   5,  0, QUICK | LONG, ""},
    {"doc64",      "qwen2",   0,    300, 1,   40, 4, 1,  64,  40, 1, 260, 100, 40, LONG, ""},
    {"doc104",     "qwen3",   0,    200, 1,   32, 3, 3, 104,  24, 3, 140,  64, 15, LONG, ""},
    {"d24",        "llama",   0,    129, 1,   40, 5, 5,  24,  40, 3,  65,  64,  0, LONG, ""},
    {"d80",        "qwen2",   0,    127, 1,   48, 4, 2,  80,  40, 2, 129, 128,  0, LONG, ""},
    {"d96",        "qwen3",   0,    255, 1,   48, 2, 1,  96,  40, 1, 128, 128,  0, LONG, ""},
    {"d112",       "llama",   1,    257, 1,   48, 2, 2, 112,  40, 1, 100,  99,  0, LONG, ""},
    {"d120",       "qwen2",   1,    111, 1,   48, 3, 1, 120,  40, 1, 193, 100,  0, LONG, ""},
    {"t1",         "llama",   0,     64, 2,   32, 4, 2,   8,  24, 5,   1,   3,  0, LONG, ""},
    {"long",       "llama",   0,     64, 1,   16, 2, 1,  32,  16, 1, 517, 500,  0, LONG, ""},
    {"vocabulary", "llama",   1,  50001, 1,   16, 2, 1,   8,  16, 1,   7,   4,  0, LONG, ""},
    {"deep",       "qwen3",   1,     90, 6,   32, 4, 2,  16,  48, 2,  40,  64,  0, LONG, ""},
    {"group4",     "llama",   0,     70, 1,   40, 4, 1,  96,  24, 1, 141, 100,  0, LONG, ""},
    {"group8",     "qwen3",   0,     90, 1,   40, 8, 1, 128,  24, 1, 203,  64, 31, LONG, ""},
};

static const Case *case_named(const char *name) {
    for (int i = 0; i < COUNT(cases); i++) if (!strcmp(cases[i].name, name)) return &cases[i];
    die("test: no case %s", name);
}

static void write_text(const char *path, const char *text, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(text, 1, n, f) != n || fclose(f)) die("test: cannot write %s", path);
}

// Token shard of n tokens in which every second is 7 (embedding_backward's long sums), and 1 ends a document.
static void write_shard(const char *path, int n, int V, int document, uint64_t stream) {
    int32_t *d = (int32_t *)xcalloc(256 + (size_t)n, 4), head[6] = {20240801, 7, n, V, 0, 2};
    for (int i = 0; i < n; i++) {
        uint64_t coin = random_bits(stream, 5, (uint64_t)i);
        int any = 2 + (int)((coin >> 24) % (uint64_t)(V - 2));
        d[256 + i] = document && coin % (uint64_t)document == 0 ? 1 : coin >> 20 & 1 ? 7 : any;
    }
    memcpy(d, head, sizeof head);
    write_text(path, (const char *)d, 1024 + (size_t)n * 4);
    free(d);
}

// The folder of a case: config.json, random bf16 weights in which nothing is trivial, shards. Made once.
static const char *case_folder(const Case *c) {
    static char dir[320];
    snprintf(dir, sizeof dir, "%s/%s", top, c->name);
    if (!mkdir(dir, 0777)) {
        char *text = path_text(
            "{\"model_type\": \"%s\", \"vocab_size\": %d, \"num_hidden_layers\": %d, \"hidden_size\": %d, "
            "\"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": %d, \"intermediate_size\": %d, "
            "\"max_position_embeddings\": 1024, \"tie_word_embeddings\": %s, \"rms_norm_eps\": 1e-5, "
            "\"rope_theta\": 100.0, \"bos_token_id\": null, \"eos_token_id\": null%s%s}\n",
            c->family, c->V, c->L, c->C, c->H, c->K, c->D, c->F, c->tied ? "true" : "false", *c->more ? ", " : "", c->more);
        char *path = path_text("%s/config.json", dir);
        write_text(path, text, strlen(text));
        Config config;
        ParamTable p;
        config_from_json(&config, text, strlen(text), c->name);
        param_table_build(&p, &config, 1);
        StWriter *w = st_create(path_text("%s/model.safetensors", dir), "{\"format\":\"pt\"}");
        st_declare_table(w, &p, ST_BF16);
        st_begin(w);
        for (int i = 0; i < p.n_tensors; i++) {
            const Tensor *t = &p.tensors[i];
            double scale = !t->cols ? 0.3 : strstr(t->name, "embed") ? 0.3 : 1.2 / sqrt((double)t->cols);
            float *x = (float *)xmalloc(t->n * 4);
            random_normals(x, scale, seed, hash_string(t->name), 0, t->n);
            for (size_t j = 0; j < t->n; j++) x[j] += (float)(t->init == INIT_ONE);
            st_write(w, x, t->n);
            free(x);
        }
        int error = st_finish(w, NULL, NULL);
        if (error) die("test: cannot write %s/model.safetensors: %s", dir, strerror(error));
        write_shard(path_text("%s/train.bin", dir), 8 * c->B * c->T + 1, c->V, c->document, seed ^ hash_string(c->name));
        write_shard(path_text("%s/val.bin", dir), (3 * c->B + 1) * c->T + 1, c->V, c->document, ~seed ^ hash_string(c->name));
        free(path);
        free(text);
    }
    return dir;
}

// Options that read a case's weights and one of its shards.
static const char *case_options_on(const char *shard, const Case *c, const char *precision) {
    static char text[4][1200];
    static int next;
    const char *dir = case_folder(c);
    char *t = text[next++ % 4];
    snprintf(t, sizeof text[0], "--init-from %s --train-data %s/%s.bin --seq-len %d --logits-chunk %d "
             "--precision %s --document-mask %s --threads 1", dir, dir, shard, c->T, c->chunk, precision,
             c->document ? "on" : "off");
    return t;
}

static const char *case_options(const Case *c, const char *precision) {
    return case_options_on("train", c, precision);
}

// ==== 4. Comparing dumps ================================================================================================
typedef struct Error { double error, cosine; } Error;

// Of tensor `t` of a against the one of that name in b.
static Error tensor_error(const StSet *a, const StSet *b, const char *name) {
    Error e = {NAN, NAN};
    const StTensor *s = st_find(a, name), *t = st_find(b, name);
    if (!s || !t || s->n != t->n) return e;
    float *x = (float *)xmalloc(s->n * 4), *y = (float *)xmalloc(s->n * 4);
    st_read(a, s, 0, s->n, x);
    st_read(b, t, 0, t->n, y);
    double difference = 0, xx = 0, yy = 0, xy = 0;
    for (size_t i = 0; i < s->n; i++) {
        difference += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        xx += (double)x[i] * x[i], yy += (double)y[i] * y[i], xy += (double)x[i] * y[i];
    }
    e.error = yy > 0 ? sqrt(difference / yy) : sqrt(xx);
    e.cosine = xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : difference == 0 ? 1 : isnan(difference) ? NAN : 0;   // of a zero vector: 0
    free(x);
    free(y);
    return e;
}

// 1 when the dump meets the criterion; the summary names the worst tensor. paths: of the dump to test, of the
// twin's fp32, of the twin's bf16 (NULL: the fp32 criterion), of the twin's in doubles (where there is one).
// bf16_loss: the loss's tolerance in bf16.
static int compare(char *const paths[4], double bf16_loss, char *summary, size_t room) {
    StSet *sets[4] = {NULL};
    for (int i = 0; i < 4; i++) {
        if (paths[i] && !access(paths[i], R_OK)) sets[i] = st_open(paths[i]);
        else if (paths[i] && i < 3) {
            snprintf(summary, room, "%s was not written", paths[i]);
            return 0;
        }
    }
    int bad = sets[0]->n_tensors != sets[1]->n_tensors;
    double worst = -1;
    snprintf(summary, room, "%d tensors, the twin has %d", sets[0]->n_tensors, sets[1]->n_tensors);
    for (int i = 0; i < sets[1]->n_tensors && !bad; i++) {
        const char *name = sets[1]->tensors[i].name;
        int is_loss = !strcmp(name, "loss");
        Error e = tensor_error(sets[0], sets[1], name);
        double tol = is_loss ? 1e-6 : 1e-5, ratio;
        if (sets[2]) tol = is_loss ? bf16_loss : 2 * tensor_error(sets[2], sets[1], name).error + 1e-6;
        else if (!(e.error <= tol) && sets[3]) {        // where doubles give 0 (T 1: dq and dk), sizes, not ratios
            tol = fmax(tol, 4 * tensor_error(sets[1], sets[3], name).error);
            const Error exact = tensor_error(sets[0], sets[3], name);
            if (exact.error < e.error) e = exact;
        }
        ratio = e.error / tol;
        if (sets[2] && !is_loss) ratio = fmax(ratio, isnan(e.cosine) ? NAN : (1 - e.cosine) / (tol * tol));
        if (isnan(e.error) || isnan(e.cosine) || isnan(tol)) ratio = INFINITY;
        if (ratio <= worst) continue;
        worst = ratio;
        snprintf(summary, room, "worst %s %.2e, tolerance %.2e, cosine %.6f", name, e.error, tol, e.cosine);
    }
    for (int i = 0; i < 4; i++) st_close(sets[i]);
    return !bad && worst <= 1;
}

// ==== 5. Gradients ======================================================================================================
static char *dump_path(const Case *c, const char *who, const char *precision) {
    return path_text("%s/%s_%s_%s.st", top, c->name, who, precision);
}

static Run start_dump(const char *command, const char *who, const Case *c, const char *precision, const char *more) {
    return start("exec %s %s --batch-size %d --total-batch-tokens %d --dump-grads %s %s", command, case_options(c, precision),
                 c->B, c->B * c->T, dump_path(c, who, precision), more);
}

static const char *const precisions[2] = {"fp32", "bf16"};

// The values of `key` in the records of a type in OUT/log.jsonl; returns their number.
static int log_values(const char *out, const char *type, const char *key, double *x, int most) {
    char *path = path_text("%s/log.jsonl", out);
    if (access(path, F_OK)) free(path), path = path_text("%s/eval.jsonl", out);     // of --eval-only
    char *text = slurp(path), *save = NULL;
    int n = 0;
    for (char *line = strtok_r(text, "\n", &save); line && n < most; line = strtok_r(NULL, "\n", &save)) {
        Json *j = json_parse(line, strlen(line), "log.jsonl");
        const Json *value = json_get(j, key);
        if (!strcmp(json_string(j, "type", "log.jsonl", ""), type)) x[n++] = value && value->type == 'n' ? value->num : NAN;
        free(j);
    }
    free(text);
    free(path);
    return n;
}

// How far the loss of a batch may be off in bf16, relatively. A loss is one number: on the batch at hand the
// twin's error may be 0 by chance, so twice that error is no tolerance. As the mean over targets of errors of
// either sign it is nearly a normal number around 0; its standard deviation s is estimated by the root mean
// square of the twin's errors in other batches of this shape (a run with --lr 0 logs the loss of each). The
// CUDA trainer rounds the same values after other sums, so its error has the same s. Tolerance: 4 s. Were the
// batches independent, Student's t with LOSS_BATCHES degrees of freedom would put right code beyond it in 4
// of 10000 checks. They share the weights and the most frequent token: the part of the error that all have in
// common was 0.1 to 0.9 s, and if the twin's is 0 by chance, 4 s is 3 standard deviations of the CUDA
// trainer's. Measured in 95 cases (long level, seeds 4 to 7 and 11), error / s: the CUDA trainer's root mean
// square is 1.05 and the largest 2.5, the twin's 1.16 and 3.7.
static double loss_tolerance(const Case *c) {
    enum { LOSS_BATCHES = 32 };
    static double known[COUNT(cases)];      // 0: not yet
    double *tol = &known[c - cases], x[2][LOSS_BATCHES], squares = 0;
    if (*tol > 0) return *tol;
    char *data = path_text("%s/loss.bin", case_folder(c)), *out[2];
    write_shard(data, LOSS_BATCHES * c->B * c->T + 1, c->V, c->document, seed ^ ~hash_string(c->name));
    Run r[2];
    for (int p = 0; p < 2; p++) {
        out[p] = path_text("%s/loss_%s", case_folder(c), precisions[p]);
        r[p] = start("exec %s %s --batch-size %d --total-batch-tokens %d --steps %d --lr 0 --min-lr 0 "
                     "--checkpoint-every 0 --sample-every 0 --log-every 1000 --out %s", twin,
                     case_options_on("loss", c, precisions[p]), c->B, c->B * c->T, LOSS_BATCHES, out[p]);
    }
    for (int p = 0; p < 2; p++) {
        if (finish(&r[p])) die("test: the twin fails on %s: %s", c->name, complaint(&r[p]));
        int n = log_values(out[p], "step", "loss", x[p], LOSS_BATCHES);
        if (n != LOSS_BATCHES) die("test: %s: %d losses are logged", c->name, n);
        free(out[p]);
    }
    for (int i = 0; i < LOSS_BATCHES; i++) squares += pow(x[1][i] / x[0][i] - 1, 2) / LOSS_BATCHES;
    free(data);
    return *tol = 4 * sqrt(squares);
}

// The twin's three dumps of a case, once.
static void twin_dumps(const Case *c) {
    if (!access(dump_path(c, "twin", "bf16"), R_OK)) return;
    Run r[3] = {start_dump(twin, "twin", c, "fp32", ""), start_dump(twin, "twin", c, "bf16", "")};
    if (!access(doubles, X_OK)) r[2] = start_dump(doubles, "double", c, "fp32", "");
    for (int i = 0; i < 3; i++) if (r[i].pid && finish(&r[i])) die("test: the twin fails on %s: %s", c->name, complaint(&r[i]));
}

// Does the dump `who` meet the criterion? `text` says how well.
static int dump_is_right(const Case *c, const char *who, const char *precision, char *text, size_t room) {
    twin_dumps(c);
    char *paths[4] = {dump_path(c, who, precision), dump_path(c, "twin", "fp32"),
                      strcmp(precision, "bf16") ? NULL : dump_path(c, "twin", "bf16"), dump_path(c, "double", "fp32")};
    return compare(paths, paths[2] ? loss_tolerance(c) : NAN, text, room);
}

// A few at a time: processes are single-threaded here, and ptxcpu translates one kernel at a time.
static void check_gradients(void) {
    enum { AT_ONCE = 3, JOBS = 2 * COUNT(cases) };
    Run run[JOBS];
    char name[JOBS][100];
    int job[JOBS], n = 0;
    for (int i = 0; i < JOBS; i++) {                        // bf16 first: its attention takes ptxcpu longest
        const Case *c = &cases[i % COUNT(cases)];
        snprintf(name[n], sizeof name[n], "gradients %s %s", c->name, precisions[i < COUNT(cases)]);
        if ((c->levels & level) && wanted(name[n])) job[n++] = i;
    }
    for (int next = 0, i = 0; i < n; i++) {
        for (; next < n && next < i + AT_ONCE; next++)
            run[next] = start_dump(cuda, "cuda", &cases[job[next] % COUNT(cases)], precisions[job[next] < COUNT(cases)], "");
        const Case *c = &cases[job[i] % COUNT(cases)];
        char text[400];
        if (finish(&run[i])) {
            result(name[i], 0, "%s", complaint(&run[i]));
            continue;
        }
        int ok = dump_is_right(c, "cuda", precisions[job[i] < COUNT(cases)], text, sizeof text);
        result(name[i], ok, "%s", text);
    }
}

// The MLP in both of its forms: products with SwiGLU as their epilogue, and a pass between cuBLASLt's products.
static void check_mlp_forms(void) {
    const char *const forms[2] = {"passes", "products"}, *const options[2] = {"--mlp passes", "--mlp products"};
    for (int i = 0; i < COUNT(cases); i++) for (int fused = 0; fused < 2; fused++) {
        const Case *c = &cases[i];
        char name[100], text[400];
        snprintf(name, sizeof name, "MLP in %s %s bf16", forms[fused], c->name);
        int few = !strcmp(c->name, "llama") || !strcmp(c->name, "wide");
        if (!(c->levels & level) || (level != LONG && !few) || (level == QUICK && fused) || (level == PTX && !fused) ||
            !wanted(name)) continue;
        Run r = start_dump(cuda, forms[fused], c, "bf16", options[fused]);
        if (finish(&r)) { result(name, 0, "%s", complaint(&r)); continue; }
        int ok = dump_is_right(c, forms[fused], "bf16", text, sizeof text);
        result(name, ok, "%s", text);
    }
}

// Kernels of sm_90a alone (wgmma, TMA): attention and MLP on an emulated device of compute capability 9.0, in two schedules.
static void check_hopper(void) {
    for (int i = 0; i < COUNT(cases) && is_emu(); i++) for (int order = 0; order < 2; order++) {
        const Case *c = &cases[i];
        char name[100], who[20], text[400];
        snprintf(name, sizeof name, "gradients %s bf16 on 9.0%s", c->name, order ? ", another schedule" : "");
        int few = !strcmp(c->name, "mistral") || !strcmp(c->name, "d104") || !strcmp(c->name, "documents") ||
                  !strcmp(c->name, "wide");
        if ((level != LONG && (order || !few)) || !wanted(name)) continue;
        snprintf(who, sizeof who, "hopper%d", order);
        char *command = path_text("env EMU_CC=9.0 EMU_SEED=%d %s", order, cuda);
        Run r = start_dump(command, who, c, "bf16", "");
        int ok = !finish(&r) && dump_is_right(c, who, "bf16", text, sizeof text);
        if (ok && order && !same_files(dump_path(c, "hopper0", "bf16"), dump_path(c, who, "bf16")))
            ok = 0, snprintf(text, sizeof text, "right, but not the bits of the first schedule");
        result(name, ok, "%s", r.code ? complaint(&r) : text);
        free(command);
    }
}

// Attention's backward for keys and values, by the number of SMs: 1, a block for all heads of a group; 132, one for each head,
// whose sums are added. Both are right, and alike but for the order of fp32 sums, from which few values of dk and dv round to a
// neighbour.
static void check_parts(void) {
    const char *const names[] = {"qwen2", "d96", "doc64", "group4", "group8"}, *const devices[] = {"8.0", "9.0"};
    const int SMs[] = {1, 132};
    for (int i = 0; i < COUNT(names); i++) for (int device = 0; device < 2 && is_emu(); device++) {
        const Case *c = case_named(names[i]);
        char name[100], who[2][20], text[400];
        snprintf(name, sizeof name, "parts of a group %s bf16 on %s", c->name, devices[device]);
        if (!(c->levels & level) || !wanted(name)) continue;
        int bad = 0;
        for (int k = 0; k < 2 && !bad; k++) {
            char *command = path_text("env EMU_CC=%s EMU_SMS=%d %s", devices[device], SMs[k], cuda);
            snprintf(who[k], sizeof who[k], "parts%d", k);
            Run r = start_dump(command, who[k], c, "bf16", "");
            bad = finish(&r) || !dump_is_right(c, who[k], "bf16", text, sizeof text);
            if (r.code) snprintf(text, sizeof text, "%s", complaint(&r));
            free(command);
        }
        if (!bad) {
            StSet *a = st_open(dump_path(c, who[0], "bf16")), *b = st_open(dump_path(c, who[1], "bf16"));
            double worst = 0;
            for (int t = 0; t < a->n_tensors; t++) worst = fmax(worst, tensor_error(a, b, a->tensors[t].name).error);
            bad = !(worst < 0x1p-9);                        // half a step of bf16
            snprintf(text, sizeof text, "%.1e apart", worst);
            st_close(a);
            st_close(b);
        }
        result(name, !bad, "%s", text);
    }
}

// Other schedules of threads, blocks and copies must give the same bits.
static void check_seeds(void) {
    const int n_orders = level == LONG ? 3 : 1;
    for (int i = 0; i < COUNT(cases); i++) for (int p = 0; p < 2; p++) for (int order = 1; order <= n_orders; order++) {
        const Case *c = &cases[i];
        char name[100], who[20];
        snprintf(name, sizeof name, "schedule %d %s %s", order, c->name, precisions[p]);
        if (!(c->levels & level) || (level != LONG && (strcmp(c->name, "llama") || p == 0)) || !wanted(name)) continue;
        if (access(dump_path(c, "cuda", precisions[p]), R_OK)) {
            Run base = start_dump(cuda, "cuda", c, precisions[p], "");
            finish(&base);
        }
        snprintf(who, sizeof who, "order%d", order);
        char *command = path_text("env EMU_SEED=%d EMU_ASYNC=%d PTXCPU_SEED=%d PTXCPU_ASYNC=%d %s", order, order, order, order,
                                  cuda);
        Run r = start_dump(command, who, c, precisions[p], "");
        if (finish(&r)) result(name, 0, "%s", complaint(&r));
        else result(name, same_files(dump_path(c, who, precisions[p]), dump_path(c, "cuda", precisions[p])), "the same bits");
    }
}

static void check_recompute(void) {
    const char *const names[] = {"llama", "mistral", "qwen2", "qwen3", "documents"};
    for (int i = 0; i < COUNT(names); i++) for (int p = 0; p < 2; p++) {
        const Case *c = case_named(names[i]);
        char name[100];
        snprintf(name, sizeof name, "recompute %s %s", c->name, precisions[p]);
        if (!(c->levels & level) || (level != LONG && i % 2 != p) || (level == PTX && i > 1) || !wanted(name)) continue;
        Run r[3];
        for (int k = 0; k < 3; k++) {
            const char *const how[3] = {"none", "mlp", "block"};
            char *more = path_text("--recompute %s", how[k]);
            r[k] = start_dump(cuda, how[k], c, precisions[p], more);
        }
        int bad = 0;
        for (int k = 0; k < 3; k++) if (finish(&r[k])) bad = 1 + k;
        if (bad) result(name, 0, "%s", complaint(&r[bad - 1]));
        else result(name, same_files(dump_path(c, "none", precisions[p]), dump_path(c, "mlp", precisions[p])) &&
                          same_files(dump_path(c, "none", precisions[p]), dump_path(c, "block", precisions[p])),
                    "none, mlp and block give the same bits");
    }
}

// Two micro-steps, or two ranks, are one batch of twice the size.
static void check_splits(void) {
    const char *const names[] = {"llama", "qwen2", "qwen3", "documents"};
    for (int i = 0; i < COUNT(names); i++) for (int ranks = 1; ranks <= 2; ranks++) {
        const Case *c = case_named(names[i]);
        char name[100], text[400];
        snprintf(name, sizeof name, "%s %s", ranks == 1 ? "accumulation" : "ranks", c->name);
        if (!(c->levels & level) || (level != LONG && i != 1) || !wanted(name)) continue;
        if (ranks == 2) {
            Run probe = start("mpirun -np 2 --oversubscribe %s --help", cuda);
            if (!is_emu()) { skip(name, "ranks are tested in the emulation"); continue; }
            if (finish(&probe)) {
                skip(name, "no mpirun, or a build without MPI (apt-get install openmpi-bin libopenmpi-dev)");
                continue;
            }
        }
        char *a = dump_path(c, "whole", "fp32"), *b = dump_path(c, ranks == 1 ? "split" : "ranks", "fp32");
        const char *options = case_options(c, "fp32"), *mpirun = ranks == 2 ? "mpirun -np 2 --oversubscribe" : "";
        int tokens = 2 * c->B * c->T;
        Run r[2] = {start("exec %s %s --batch-size %d --total-batch-tokens %d --dump-grads %s", cuda, options, 2 * c->B,
                          tokens, a),
                    start("exec %s %s %s --batch-size %d --total-batch-tokens %d --dump-grads %s", mpirun, cuda, options, c->B,
                          tokens, b)};
        int bad = finish(&r[0]) ? 1 : 0;
        if (finish(&r[1])) bad = 2;
        if (bad) { result(name, 0, "%s", complaint(&r[bad - 1])); continue; }
        char *paths[4] = {b, a, NULL, NULL};                                    // the same sums in another order
        int ok = compare(paths, NAN, text, sizeof text);
        result(name, ok, "%s", text);
    }
}

// ==== 6. Training, checkpoints, text ====================================================================================
static const Case trained = {"trained", "llama", 0, 120, 2, 64, 4, 2, 16, 96, 2, 24, 40, 0, 0, LLAMA3};

static Run start_training(const char *command, const char *out, const char *precision, int steps, const char *more) {
    const char *dir = case_folder(&trained);
    const char *from = strstr(more, "--resume") ? "" : path_text("--init-from %s", dir);
    return start("exec %s %s --train-data %s/train.bin --seq-len %d --batch-size %d --total-batch-tokens %d --logits-chunk %d "
                 "--precision %s --threads 1 --steps %d --lr 2e-3 --weight-decay 0.1 --warmup-steps 2 --sample-every 0 "
                 "--log-every 1000 --out %s %s", command, from, dir, trained.T, trained.B, 2 * trained.B * trained.T,
                 trained.chunk, precision, steps, out, more);
}

static double largest_difference(const double *a, const double *b, int n) {
    double worst = 0;
    for (int i = 0; i < n; i++) {
        double d = fabs(a[i] / b[i] - 1);
        if (!(d <= worst)) worst = d;
        if (isnan(d)) return d;
    }
    return worst;
}

static void check_training(void) {
    int steps = level == QUICK ? 5 : 50;
    for (int p = 0; p < 2; p++) for (int state = 0; state < (level == LONG ? 2 : 1); state++) {
        char name[100];
        snprintf(name, sizeof name, "training %s%s", precisions[p], state ? " with bf16 m and v" : "");
        if (!wanted(name)) continue;
        char *out[2] = {path_text("%s/train_twin%d%d", top, p, state), path_text("%s/train_cuda%d%d", top, p, state)};
        const char *more = state ? "--checkpoint-every 0 --optimizer-dtype bf16" : "--checkpoint-every 0";
        Run r[2] = {start_training(twin, out[0], "fp32", steps, more), start_training(cuda, out[1], precisions[p], steps, more)};
        double loss[2][64], norm[2][64];
        int bad = finish(&r[0]) ? 1 : 0;
        if (finish_in(&r[1], 4 * timeout)) bad = 2;
        if (bad) { result(name, 0, "%s", complaint(&r[bad - 1])); continue; }
        int n = 0;
        for (int i = 0; i < 2; i++) {
            n += log_values(out[i], "step", "loss", loss[i], 64);
            log_values(out[i], "step", "grad_norm", norm[i], 64);
        }
        double d = n == 2 * steps ? largest_difference(loss[1], loss[0], steps) : NAN, tol = p || state ? 2e-2 : 1e-3;
        result(name, d <= tol, "loss %.4f -> %.4f in %d steps, largest difference %.1e, at most %.0e", loss[1][0],
               loss[1][steps - 1], n / 2, d, tol);
    }
}

// A checkpoint of one trainer continues in the other as in itself: loss of the next step (weights), and of the one after (m, v).
static void check_resume(void) {
    for (int p = 0; p < 2; p++) for (int way = 0; way < 2; way++) {
        char name[100];
        snprintf(name, sizeof name, "resume %s %s", way ? "cuda -> twin" : "twin -> cuda", precisions[p]);
        if (!wanted(name)) continue;
        char *a = path_text("%s/whole%d%d", top, p, way), *b = path_text("%s/resumed%d%d", top, p, way);
        Run r = start_training(way ? cuda : twin, a, precisions[p], 5, "--checkpoint-every 3 --keep 5");
        if (finish(&r)) { result(name, 0, "first run: %s", complaint(&r)); continue; }
        char *more = path_text("--checkpoint-every 0 --resume %s/step_00000003", a);
        Run s = start_training(way ? twin : cuda, b, precisions[p], 5, more);
        if (finish(&s)) { result(name, 0, "resumed: %s", complaint(&s)); continue; }
        double x[8], y[8];
        int n = log_values(a, "step", "loss", x, 8), m = log_values(b, "step", "loss", y, 8);
        double d = n == 5 && m == 2 ? largest_difference(y, x + 3, 2) : NAN, tol = p ? 2e-3 : 2e-6;
        result(name, d <= tol, "losses %.6f %.6f, were %.6f %.6f", y[0], y[1], x[3], x[4]);
    }
}

// A stand-in for NVML whose counter rises by 100 W: the log must say 100 W with one rank and 200 W with two, each on a GPU of
// its own.
static void check_energy(void) {
    if (!wanted("energy")) return;
    if (!is_emu()) { skip("energy", "tested in the emulation, with a stand-in for NVML"); return; }
    const char *cxx = getenv("CXX") && *getenv("CXX") ? getenv("CXX") : "g++";
    char *source = path_text("%s/nvml.cpp", top);
    const char *text = "#include <time.h>\n"
        "extern \"C\" int nvmlInit_v2() { return 0; }\n"
        "extern \"C\" int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **d) { *d = 0; return 0; }\n"
        "extern \"C\" int nvmlDeviceGetTotalEnergyConsumption(void *, unsigned long long *mj) {\n"
        "    timespec t;\n    clock_gettime(CLOCK_MONOTONIC, &t);\n"
        "    *mj = t.tv_sec * 100000ull + t.tv_nsec / 10000;\n    return 0;\n}\n";
    write_text(source, text, strlen(text));
    Run lib = start("exec %s -shared -fPIC %s -o %s/libnvidia-ml.so.1", cxx, source, top);
    if (finish(&lib)) { result("energy", 0, "%s", complaint(&lib)); return; }
    Run probe = start("mpirun -np 2 --oversubscribe %s --help", cuda);
    int most_ranks = finish(&probe) ? 1 : 2;
    for (int ranks = 1; ranks <= most_ranks; ranks++) {
        char *out = path_text("%s/energy%d", top, ranks), name[40];
        char *command = path_text("%s env LD_LIBRARY_PATH=%s:$LD_LIBRARY_PATH %s", ranks == 2 ? "mpirun -np 2 --oversubscribe" : "", top, cuda);
        double watts[2000], joules[2000];
        int n = 0;
        snprintf(name, sizeof name, "energy of %d", ranks);
        for (int steps = 40; steps <= 1280; steps *= 2) {   // until a window of 2 s has closed
            Run rm = start("rm -rf %s", out);
            finish(&rm);
            Run r = start_training(command, out, "bf16", steps, "--checkpoint-every 0");
            if (finish(&r)) { result(name, 0, "%s", complaint(&r)); return; }
            n = log_values(out, "step", "watts", watts, 2000);
            log_values(out, "step", "joules_per_token", joules, 2000);
            if (n && !isnan(watts[n - 1])) break;
        }
        // the counter's window and the wall clock's agree but for the time of a reading
        int ok = n && fabs(watts[n - 1] / (100 * ranks) - 1) < 0.02 && joules[n - 1] > 0;
        result(name, ok, "%.1f W, %.3g J/token after %d steps", n ? watts[n - 1] : NAN, n ? joules[n - 1] : NAN, n);
    }
}

// What the host reads must be finished: the work of streams runs at any moment that the program allows.
static void check_order(void) {
    const char *const files[2] = {"model.safetensors", "optimizer-00000-of-00001.safetensors"};
    char *out[3];
    if (!wanted("checkpoints in any order of work")) return;
    if (!is_emu()) { skip("checkpoints in any order of work", "tested in the emulation"); return; }
    int bad = 0;
    for (int i = 0; i < 3; i++) {
        out[i] = path_text("%s/order%d", top, i);
        char *command = path_text("env EMU_ASYNC=%d %s", i, cuda);
        Run r = start_training(command, out[i], "bf16", 3, "--checkpoint-every 1 --val-every 0 --keep 5");
        if (finish(&r)) { result("checkpoints in any order of work", 0, "%s", complaint(&r)); return; }
    }
    for (int i = 1; i < 3; i++) for (int step = 1; step <= 3; step++) for (int f = 0; f < 2; f++) {
        char *a = path_text("%s/step_%08d/%s", out[0], step, files[f]), *b = path_text("%s/step_%08d/%s", out[i], step, files[f]);
        bad += !same_files(a, b);
    }
    result("checkpoints in any order of work", !bad, "%d of 12 files differ", bad);
}

// Multiple choice in rows with flags: three choices per task, each document a random text whose last tokens are targets.
static void write_tasks(const char *folder, const Case *c) {
    enum { TASKS = 12, ROWS = 30 };
    const int S = c->T;
    uint32_t *words = (uint32_t *)xmalloc((size_t)ROWS * (size_t)(S + 1) * 4);
    int32_t choices[3 * TASKS][4];
    int at = 0, most = 0, in_row = 0;
    for (int i = 0; i < ROWS * (S + 1); i++) words[i] = FLAG_START;
    for (int d = 0; d < 3 * TASKS; d++) {
        const uint64_t coin = random_bits(seed, 77, (uint64_t)d);
        const int n = 4 + (int)(coin % 8), n_targets = 1 + (int)((coin >> 8) % 3), left = S + 1 - at % (S + 1);
        if (left < n) at += left, in_row = 0;
        if (at + n > ROWS * (S + 1)) die("test: tasks need more rows");
        for (int i = 0; i < n; i++)
            words[at++] = (uint32_t)(random_bits(seed, 78 + (uint64_t)d, (uint64_t)i) % (uint64_t)c->V)
                        | (i == 0 ? FLAG_START : 0) | (i >= n - n_targets ? FLAG_TARGET : 0);
        if (at % (S + 1) == 0) in_row--;
        if (++in_row + 1 > most) most = in_row + 1;
        const int32_t row[4] = {d / 3, (d + d / 3) % 3, (d / 3) % 3, n_targets};
        memcpy(choices[d], row, sizeof row);
    }
    char *meta = path_text("{\"vocab_size\": %d, \"sequence_length\": %d, \"token_size_bytes\": 4, \"stage\": \"choice\", "
                           "\"documents_per_row\": %d}", c->V, S, most);
    write_text(path_text("%s/val_mine_000.ds", folder), (const char *)words, (size_t)ROWS * (size_t)(S + 1) * 4);
    write_text(path_text("%s/val_mine_000.choices", folder), (const char *)choices, sizeof choices);
    write_text(path_text("%s/metadata.json", folder), meta, strlen(meta));
    free(meta);
    free(words);
}

// A tokenizer whose pieces have 0 (special) to 5 bytes.
static void write_pieces(const char *path, int V) {
    int32_t head[8] = {20251002, 1, 1, V, 0, 1, 0, 0};
    char *data = (char *)xcalloc(32 + (size_t)V, 16), *at = data + 32;
    memcpy(data, head, sizeof head);
    for (int v = 0; v < V; v++) {
        const float score = v % 7 == 3 ? -1e30f : 0;
        const int32_t n = 1 + v % 5;
        memcpy(at, &score, 4);
        memcpy(at + 4, &n, 4);
        memcpy(at + 8, str("%05d", v).s, (size_t)n);
        at += 8 + n;
    }
    write_text(path, data, (size_t)(at - data));
    free(data);
}

// Everything that an evaluation logs, of two sources and of multiple choice.
static void check_evaluation(void) {
    static const char *const keys[] = {"val_loss", "perplexity", "bits_per_byte", "token_accuracy", "targets"};
    static const double tolerance[2][5] = {{1e-6, 1e-5, 1e-6, 0, 0}, {5e-3, 5e-2, 5e-3, 0.1, 0}};
    for (int p = 0; p < 2; p++) {
        const Case *c = case_named(p ? "qwen3" : "llama");          // the last batch is not full
        char name[100], *data = path_text("%s/evaluation%d", top, p), *tail[2] = {NULL, NULL};
        snprintf(name, sizeof name, "evaluation %s %s", c->name, precisions[p]);
        if (!wanted(name)) continue;
        double x[2][5];
        int bad = 0, worst = 0;
        if (mkdir(data, 0777)) die("test: cannot make %s", data);
        write_shard(path_text("%s/val_a_000.bin", data), (2 * c->B + 1) * c->T + 1, c->V, c->document, seed + 3);
        write_shard(path_text("%s/val_b_000.bin", data), c->B * c->T + 1, c->V, c->document, seed + 4);
        write_tasks(data, c);
        write_pieces(path_text("%s/pieces.bin", data), c->V);
        for (int i = 0; i < 2; i++) {
            char *out = path_text("%s/eval%d%d", top, p, i);
            Run r = start("exec %s %s --batch-size %d --eval-only --val-data '%s/val_*.bin' --eval-tasks '%s/*.ds' "
                          "--tokenizer %s/pieces.bin --out %s", i ? cuda : twin, case_options(c, precisions[p]), c->B, data,
                          data, data, out);
            if (finish(&r)) { bad++, result(name, 0, "%s", complaint(&r)); continue; }
            for (int k = 0; k < 5; k++) if (log_values(out, "val", keys[k], &x[i][k], 1) != 1) x[i][k] = NAN;
            char *log = slurp(path_text("%s/eval.jsonl", out)), *tasks = strstr(log, "{\"type\": \"tasks\"");
            tail[i] = tasks && strstr(log, "\"sources\": {\"a\": {\"loss\"") ? tasks : xstrdup("");
        }
        if (bad) continue;
        for (int k = 0; k < 5; k++) {
            const double d = fabs(x[1][k] / x[0][k] - 1);
            if (!(d <= tolerance[p][k]) && !bad++) worst = k;
        }
        // in bf16 a close choice may be another
        const int same = *tail[0] && *tail[1] && (p || !strcmp(tail[0], tail[1]));
        result(name, !bad && same, "%s %.7f, the twin %.7f%s", keys[worst], x[1][worst], x[0][worst],
               same ? "" : str("; tasks %s, the twin %s", tail[1], tail[0]).s);
    }
}

static void check_generation(void) {
    const char *const names[] = {"llama", "qwen2", "qwen3"};
    for (int i = 0; i < COUNT(names); i++) {
        const Case *c = case_named(names[i]);
        char name[100];
        snprintf(name, sizeof name, "greedy text %s", c->name);
        if ((level != LONG && i) || !wanted(name)) continue;
        Run r[2];
        int length = level == PTX ? 6 : 40;         // 40: the window of T slides
        for (int k = 0; k < 2; k++)
            r[k] = start("exec %s %s --batch-size 1 --total-batch-tokens %d --generate --temperature 0 --sample-tokens %d",
                         k ? cuda : twin, case_options(c, "fp32"), c->T, length);
        int bad = finish(&r[0]) ? 1 : 0;
        if (finish(&r[1])) bad = 2;
        if (bad) { result(name, 0, "%s", complaint(&r[bad - 1])); continue; }
        const char *text[2] = {r[0].out, r[1].out};
        result(name, strlen(text[0]) > 10 && !strcmp(text[0], text[1]), "%.*s ...", 30, text[1]);
    }
    // every length from 1 to 80: a product's shape must not depend on it
    if (level == PTX || !wanted("long sample")) return;
    const Case *c = case_named("llama");
    Run r = start("exec %s --init-from %s --generate --temperature 5 --sample-tokens 80 --batch-size 1 --seq-len %d "
                  "--total-batch-tokens %d", cuda, case_folder(c), 128, 128);
    finish(&r);
    int words = 0;
    for (const char *p = r.out; *p; p++) words += *p == ' ';
    result("long sample", r.code == 0 && words > 60, "exit status %d: %s", r.code, r.code ? complaint(&r) : "80 tokens");
}

// ==== 7. Memory and machines ============================================================================================
static void check_memory(void) {
    const char *const more[] = {"", "--recompute block", "--recompute mlp --optimizer-dtype bf16"};
    for (int i = 0; i < COUNT(more); i++) {
        const Case *c = case_named(i ? "qwen3" : "llama");
        char name[100];
        snprintf(name, sizeof name, "memory table %d", i);
        if ((level == PTX && i) || !wanted(name)) continue;
        Run dry = start("exec %s %s --batch-size %d --total-batch-tokens %d --dry-run %s", cuda,
                        case_options(c, precisions[i % 2]), c->B, c->B * c->T, more[i]);
        Run real = start_dump(cuda, "memory", c, precisions[i % 2], more[i]);
        int bad = finish(&dry) ? 1 : 0;
        if (finish(&real)) bad = 2;
        if (bad) { result(name, 0, "%s", complaint(bad == 1 ? &dry : &real)); continue; }
        const char *a = strstr(dry.out, "memory |"), *b = strstr(real.out, "memory |");
        result(name, a && b && !strncmp(a, b, strcspn(a, "\n") + 1), "%.*s", a ? (int)strcspn(a, "\n") : 0, a ? a : "");
    }
    for (int i = 0; i < 3; i++) {
        const char *const names[] = {"out of memory", "no device", "no device --dry-run"};
        const char *const env[] = {"EMU_MEM=20M", "EMU_DEVICES=0", "EMU_DEVICES=0"};
        const char *const part[][2] = {{"out of GPU memory", "--batch-size"}, {"no CUDA device", "make train DEVICE=cpu"},
                                       {"", ""}};
        const Case *c = case_named("llama");
        if (!wanted(names[i])) continue;
        if (!is_emu()) { skip(names[i], "tested in the emulation"); continue; }
        char *command = path_text("env %s %s", env[i], cuda);
        Run r = i < 2 ? start_dump(command, "machine", c, "bf16", "")
                      : start("exec %s %s --batch-size 1 --total-batch-tokens %d --dry-run", command,
                              case_options(c, "bf16"), c->T);
        finish(&r);
        if (i == 2) {
            result(names[i], r.code == 0 && strstr(r.out, "memory |"), "%s", r.code ? complaint(&r) : "a table");
            continue;
        }
        const char *line = strchr(r.err, '\n');
        int one_line = line && !line[1] && !strncmp(r.err, "error: ", 7);
        result(names[i], r.code == 1 && one_line && strstr(r.err, part[i][0]) && strstr(r.err, part[i][1]), "%s", complaint(&r));
    }
}

// --dry-run --device: the memory of a rank among others, by hand; what does not fit; lists by cost; refusals. No GPU is used.
static void check_plan(void) {
    if (level == PTX) return;
    const char *base = path_text("%s --preset 3B --precision bf16 --seq-len 4096 --total-batch-tokens 1048576 "
                                 "--train-data none --dry-run", cuda);
    Config c;
    config_preset(&c, "3B");
    for (int zero = 0; zero <= 3 && wanted("plan memory"); zero++) for (int S = 4; S <= 8; S *= 2) {
        char name[100];
        snprintf(name, sizeof name, "plan memory: ZeRO %d over %d", zero, S);
        if (!zero && S == 4) continue;
        ParamTable p;
        param_table_build(&p, &c, zero ? S : 1);
        const double n = (double)p.n, share = zero ? n / S : n, MiB = 1048576;
        const double slots = (double)(p.units[UNIT_EMBED].n_padded + 2 * p.units[UNIT_LAYER].n_padded + p.units[c.L + 1].n_padded);
        const double want[] = {2 * (zero == 3 ? share + slots : n) / MiB, 4 * (zero >= 2 ? share + slots : n) / MiB, 12 * share / MiB};
        double has[3] = {0, 0, 0};
        Run r = start("exec %s --device h100 --gpus 8 --zero %d %s --batch-size 1", base, zero, zero && S == 4 ? "--shard-size 4" : "");
        finish(&r);
        const char *a = strstr(r.out, "memory |");
        int ok = a && sscanf(a, "memory | weights %lf MiB | gradients %lf MiB | optimizer %lf MiB", &has[0], &has[1], &has[2]) == 3;
        for (int i = 0; i < 3; i++) ok &= fabs(has[i] - want[i]) < 0.06;
        result(name, ok && strstr(r.out, "fits | yes"), "weights, gradients, optimizer %.1f %.1f %.1f MiB, by hand %.1f %.1f %.1f",
               has[0], has[1], has[2], want[0], want[1], want[2]);
        free(p.tensors);
        free(p.units);
    }
    const struct { const char *name, *options, *out; } says[] = {
        {"does not fit", "--device 4090", "fits | NO"}, {"advice that fits", "--device 4090", "advice | --gpus "},
        {"advice that is faster", "--device h100 --gpus 256 --zero 3 --shard-size 8", "is faster"},
        {"too little work", "--device h100 --gpus 256 --zero 1", "of the step waits for other GPUs"},
        {"3B as in SPEED.md", "--device h100", "| 42243 tokens/s per GPU"}};
    for (int i = 0; i < COUNT(says); i++) {
        char name[100];
        snprintf(name, sizeof name, "plan: %s", says[i].name);
        if (!wanted(name)) continue;
        Run r = start("exec %s %s", base, says[i].options);
        finish(&r);
        const int ok = r.code == 0 && strstr(r.out, says[i].out);
        result(name, ok, "%s%s", says[i].out, ok ? "" : r.code ? complaint(&r) : str(": not in %s", r.out).s);
    }
    if (wanted("plans by cost")) {
        Run r = start("exec %s --device h100 --gpus auto", base);
        finish(&r);
        int rows = 0, ok = 1, gpus, nodes;
        double hours, before = 0;
        for (const char *line = strstr(r.out, "\n gpus"); line && (line = strchr(line + 1, '\n')) && line[1]; before = hours, rows++)
            ok &= sscanf(line, "%d %d %lf", &gpus, &nodes, &hours) == 3 && hours >= before && nodes == (gpus + 7) / 8;
        ok &= r.code == 0 && rows == 9;
        result("plans by cost", ok, "%d rows%s", rows, ok ? "" : r.code ? complaint(&r) : str(": %s", r.out).s);
    }
    const char *const refusals[][2] = {{"--gpus 8", "--dry-run --device"}, {"--device h300", "choose one of h100 h200"},
        {"--device h100 --gpus many", "neither auto nor"}, {"--device h100 --gpus 0", "neither auto nor"},
        {"--device h100 --gpus 9", "say --nodes"}, {"--device h100 --gpus 8 --nodes 3", "in each of 3 machines"},
        {"--device h100 --gpus auto --nodes 2", "--nodes"}, {"--device h100 --pue 0.5", "--pue"},
        {"--device h100 --tokens -1", "--tokens"}, {"--device h100 --carbon-intensity x", "--carbon-intensity"},
        {"--device h100 --gpus 512", "--total-batch-tokens"}, {"--device 4090 --gpus auto --zero 0", "no layout"},
        {"--device h100 --gpus 8 --zero 1 --shard-size 3", "--shard-size"}};
    for (int i = 0; i < COUNT(refusals); i++) {
        char name[200];
        snprintf(name, sizeof name, "plan refused: %s", refusals[i][0]);
        if (!wanted(name)) continue;
        Run r = start("exec %s %s", base, refusals[i][0]);
        finish(&r);
        const char *line = strchr(r.err, '\n');
        result(name, r.code == 1 && line && !line[1] && strstr(r.err, refusals[i][1]), "%s", r.code ? complaint(&r) : r.out);
    }
}

// One GPU per rank, however the launcher shows them; a GPU that hangs ends the run within --timeout.
static void check_ranks_and_gpus(void) {
    const Case *c = case_named("llama");
    const struct { const char *name, *env[2], *err, *out; } row[] = {       // env[1]: of a second rank; err NULL: trains
        {"ranks see one gpu each", {"EMU_DEVICES=1 EMU_BUS=3", "EMU_DEVICES=1 EMU_BUS=4"}, NULL, "step 1/1"},
        {"ranks on one gpu", {"EMU_DEVICES=1 EMU_BUS=5", "EMU_DEVICES=1 EMU_BUS=5"}, "have the same GPU, 0000:05:00.0", NULL},
        {"part of a gpu", {"EMU_MIG=1"}, NULL, "MIG 1g is a part of a GPU, and energy is counted for the whole"},
        {"gpu hangs", {"EMU_HANG=stream"}, "for the GPU: it hangs", NULL},
        {"gpu hangs between micro-steps", {"EMU_HANG=event"}, "for the GPU: it hangs", NULL},
        {"nccl hangs", {"EMU_HANG=nccl", "EMU_HANG=nccl"}, "in NCCL's start", NULL}};
    Run probe = start("mpirun -np 2 --oversubscribe %s --help", cuda);
    const int have_mpi = !finish(&probe);
    for (int i = 0; i < COUNT(row); i++) {
        if (!wanted(row[i].name)) continue;
        if (row[i].env[1] && !have_mpi) {
            skip(row[i].name, "no mpirun, or a build without MPI (apt-get install openmpi-bin libopenmpi-dev)");
            continue;
        }
        char *run = path_text("%s %s --batch-size 1 --total-batch-tokens %d --steps 1 --checkpoint-every 0 --sample-every 0 --timeout %d "
                              "--out %s/gpus%d", cuda, case_options(c, "bf16"), 4 * c->T, row[i].err ? 2 : 60, top, i);
        Run r = row[i].env[1] ? start("exec mpirun --oversubscribe -np 1 env %s %s : -np 1 env %s %s", row[i].env[0], run,
                                      row[i].env[1], run)
                              : start("exec env %s %s", row[i].env[0], run);
        finish(&r);
        result(row[i].name, (r.code == 0) == !row[i].err && strstr(row[i].err ? r.err : r.out, row[i].err ? row[i].err : row[i].out),
               "%s", r.code ? complaint(&r) : "trains");
        free(run);
    }
}

// Ranks on unequal GPUs choose one batch size; sizes that the kernels do not take are refused before any work.
static void check_refusals(void) {
    const Case *c = case_named("llama");
    if (is_emu() && wanted("unequal memory")) {
        Run probe = start("mpirun -np 2 --oversubscribe %s --help", cuda);
        if (finish(&probe))
            skip("unequal memory", "no mpirun, or a build without MPI (apt-get install openmpi-bin libopenmpi-dev)");
        else {
            char *out = path_text("%s/unequal", top);
            char *options = path_text("%s --total-batch-tokens %d --steps 1 --timeout 20 --checkpoint-every 0 --sample-every 0 "
                                      "--out %s", case_options(c, "bf16"), 32 * c->T, out);
            Run r = start("exec mpirun --oversubscribe -np 1 %s %s : -np 1 env EMU_MEM=834M %s %s", cuda, options, cuda, options);
            finish(&r);
            result("unequal memory", r.code == 0, "exit status %d%s%s", r.code, r.code ? ": " : "", r.code ? complaint(&r) : "");
        }
    }
    if (is_emu()) check_ranks_and_gpus();
    if (!wanted("refused sizes")) return;
    char *config = path_text("%s/odd.json", top);
    const char *text = "{\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 64, "
                       "\"intermediate_size\": 172, \"num_hidden_layers\": 1, \"num_attention_heads\": 4, \"vocab_size\": 512, "
                       "\"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\"}";
    write_text(config, text, strlen(text));
    Run r = start("exec %s --config %s --train-data %s/%s/train.bin --precision bf16 --dry-run", cuda, config, top, c->name);
    finish(&r);
    const char *line = strchr(r.err, '\n');
    int named = strstr(r.err, "intermediate_size 172") && strstr(r.err, "multiples of 8");
    result("refused sizes", r.code == 1 && line && !line[1] && named, "%s", complaint(&r));
}

// ==== 8. Planted errors =================================================================================================
// In a copy of train_litespark.cu the first `from` after `anchor` becomes `to` when the environment has PLANTED=row.
static const struct Planted {
    const char *name, *anchor, *from, *to;
    int statement;
    const char *name_of_case, *precision;
    int levels;
} planted[] = {
    {"no __syncthreads in attention", "(ATT_THREADS) attention_forward_kernel3(",
     "__syncthreads();", "", 1, "mistral", "bf16", QUICK | LONG},
    {"swapped fragment", "void multiply_step(",
     "mma_bf16(sum[m][n + 1], a[m], b + 2);", "mma_bf16(sum[m][n + 1], a[m], b);", 1, "llama", "bf16", LONG},
    {"no cp.async wait", "attention_backward_dkdv_kernel2(",
     "cp_async_wait<0>();", "", 1, "llama", "bf16", LONG},
    {"wrong scale in attention backward", "void attention_backward_mma(",
     "(float)(1 / sqrt((double)D))", "(float)(1 / sqrt((double)D + 4))", 0, "llama", "bf16", QUICK | LONG},
    {"dropped term in rmsnorm backward", "rmsnorm_backward_kernel3(floatX *dx",
     "(g_c - n_c * mean)", "g_c", 0, "llama", "fp32", LONG},
    {"wrong sign in rope backward", "void qk_norm_rope_backward_kernel2(",
     "e_hi[k] * cosine_i[k] - e_lo[k] * sine_i[k]", "e_hi[k] * cosine_i[k] + e_lo[k] * sine_i[k]", 0, "llama", "fp32", LONG},
    {"= instead of += in dw", "dout, 1, x, 0, OC, C, N,",
     "dw", "(const float *)NULL", 0, "llama", "fp32", QUICK | LONG},
    {"a row lost in embedding backward", "add_rows(sum, dx, order, first[i] + warp,",
     "first[i + 1]", "(first[i + 1] - 1)", 0, "llama", "fp32", LONG},
    {"no gradient of biases", "void llama_backward(",
     "if (w.qkv_bias) bias_backward(dw.qkv_bias, m->dqkv, N, W);", "", 1, "qwen2", "fp32", LONG},
    {"cross entropy without the onehot", "cross_entropy_kernel3(float *nll",
     "x[k] -= weight_n", "(x[k] -= 0)", 0, "llama", "fp32", LONG},
    {"document mask ignored in backward", "void mask_scores(",
     "key > t || key < first", "key > t || (key < first && !ON_SIDE)", 0, "documents", "bf16", LONG},
    {"wrong key head in dq", "attention_backward_dq_kernel2(",
     "h / (H / K)", "h % K", 0, "llama", "bf16", LONG},
    {"no cp.async wait in the products of the MLP", "void mlp_pipeline(",
     "cp_async_wait<MLP_STAGES - 2>();", "", 1, "wide", "bf16", LONG},
    {"gate for up in the products of the MLP", "gate_up_swiglu_kernel3(bf16",
     "(i % 2)", "((i + 1) % 2)", 0, "llama", "bf16", QUICK | LONG},
    {"no wait for wgmma in attention", "attention_forward_kernel4(",
     "wgmma_wait<1>(score);", "", 1, "mistral", "bf16", LONG | HOPPER},
    {"no fence before wgmma", "attention_backward_dkdv_kernel3(",
     "wgmma_fence();", "", 1, "mistral", "bf16", LONG | HOPPER},
    {"tiles overwritten while wgmma reads them", "attention_backward_dq_kernel3(",
     "wgmma_wait<0>(dq, left);\n        release(&tile.empty[i % 2]);", "release(&tile.empty[i % 2]); wgmma_wait<0>(dq, left);", 1,
     "long", "bf16", LONG | HOPPER},
    {"wrong parity of an mbarrier", "attention_backward_dkdv_kernel3(",
     "mbarrier_wait(&tile.full[stage], i / STAGES % 2)", "mbarrier_wait(&tile.full[stage], 1 - i / STAGES % 2)", 0,
     "mistral", "bf16", QUICK | LONG | HOPPER},
    {"16 keys lost in wgmma", "attention_backward_dq_kernel3(",
     "wgmma_values(dq, left, tile.k[i % 2]);", "left[0][0] = left[0][1] = left[0][2] = left[0][3] = 0; "
     "wgmma_values(dq, left, tile.k[i % 2]);", 1, "documents", "bf16", LONG | HOPPER},
    {"no wgmma_fence before products", "void product_pipeline(",
     "wgmma_fence();", "", 1, "wide", "bf16", LONG | HOPPER},
    {"wrong parity in the ring of products", "void product_pipeline(",
     "mbarrier_wait(&tile.full[i % STAGES], i / STAGES % 2);", "mbarrier_wait(&tile.full[i % STAGES], 1 ^ i / STAGES % 2);",
     1, "wide", "bf16", LONG | HOPPER},
    {"a stage of the ring released under its products", "void product_pipeline(",
     "if (k > 0) release(&tile.empty[(i - 1) % STAGES]);", "if (k + 1 < steps) release(&tile.empty[i % STAGES]);", 1, "wide", "bf16",
     LONG | HOPPER},
    {"sums read before wgmma_wait", "void product_pipeline(",
     "for (int m = 0; m < 2; m++) wgmma_wait<0>(sum.half[m]);", "", 1, "wide", "bf16", LONG | HOPPER},
    {"a step of 16 lost in gate and up", "gate_up_swiglu_kernel4(bf16",
     "c < DEPTH", "c < DEPTH - 16", 0, "wide", "bf16", LONG | HOPPER},
    {"wrong distance of panels in wgmma", "struct SwizzledTile {",
     "wgmma_operand(this, PANEL_BYTES)", "wgmma_operand(this, PANEL_BYTES / 2)", 0, "mistral", "bf16", LONG | HOPPER},
    {"wgmma from a wrong row", "struct SwizzledTile {", "row * 8", "row * 4", 0, "mistral", "bf16", LONG | HOPPER},
    {"wgmma from a wrong column", "struct SwizzledTile {", "column % 64 / 8", "column % 64 / 16", 0, "mistral", "bf16",
     LONG | HOPPER},
    {"a stage released by one thread for its warpgroup", "void release(",
     "if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);",
     "for (int i = 0; i < 4 && threadIdx.x % 128 == 0; i++) mbarrier_arrive(empty);", 1, "long", "bf16", LONG | HOPPER},
    {"registers written after wgmma_fence", "attention_backward_dq_kernel3(",
     "pack_left(left, ds);\n        wgmma_fence();", "wgmma_fence(); pack_left(left, ds);", 1, "mistral", "bf16", LONG | HOPPER},
    {"registers of P written before wgmma_wait", "attention_forward_kernel4(",
     "wgmma_wait<0>(out_t, p);", "pack_left(p, score); wgmma_wait<0>(out_t, p);", 1, "long", "bf16", LONG | HOPPER},
    {"an arrival before delta is written", "attention_backward_dkdv_kernel3(",
     "tile.delta[stage][j] = t + j < T ? delta[at] : 0;\n                    mbarrier_arrive(&tile.full[stage]);",
     "mbarrier_arrive(&tile.full[stage]); tile.delta[stage][j] = t + j < T ? delta[at] : 0;", 1, "long", "bf16", LONG | HOPPER},
    {"a part of a group not added", "attention_backward_add_kernel1(",
     "part < parts", "part < parts - 1", 0, "qwen2", "bf16", QUICK | LONG | HOPPER},
    {"heads of another part of a group", "attention_backward_dkdv_kernel2(",
     "(kv * parts + part)", "(kv * parts)", 0, "qwen2", "bf16", LONG},
    {"heads of another part of a group with wgmma", "attention_backward_dkdv_kernel3(",
     "(kv * parts + part)", "(kv * parts)", 0, "doc64", "bf16", LONG | HOPPER},
    {"a row's sums in another's place", "attention_backward_dkdv_kernel3(",
     "(row * parts + part)", "(row + part * T)", 0, "doc64", "bf16", LONG | HOPPER},
    {"a step of 16 lost in the scores of wgmma", "void wgmma_scores(", "c < WIDTH", "c < WIDTH - 8", 0, "d104", "bf16",
     QUICK | LONG | HOPPER},
    {"fewer columns than D in wgmma", "void with_wgmma_width(", "D <= 96", "D <= 104", 0, "d104", "bf16", LONG | HOPPER},
    {"dropped term in qk-norm backward", "void qk_norm_rope_backward_kernel2(",
     "n_lo[k] * mean", "0", 0, "qwen3", "fp32", LONG},
};

static Run compile;
static char *planted_program;
static int planted_applies[COUNT(planted)];

static void text_splice(char **text, char *at, size_t n_old, const char *replacement) {
    size_t before = (size_t)(at - *text);
    char *changed = path_text("%.*s%s%s", (int)before, *text, replacement, at + n_old);
    free(*text);
    *text = changed;
}

// Starts to build the copy; the other checks go on meanwhile.
static void plant_errors(void) {
    const char *cxx = getenv("CXX") && *getenv("CXX") ? getenv("CXX") : "g++";
    int any = 0;
    for (int i = 0; i < COUNT(planted); i++) {
        char name[120];
        snprintf(name, sizeof name, "planted: %s", planted[i].name);
        any |= wanted(name);
    }
    if (!any) return;
    char *text = slurp("train_litespark.cu"), *at = strstr(text, "#define CEIL_DIV");
    if (!at) die("test: train_litespark.cu is not here; run in the project's folder");
    text_splice(&text, at, 0, "static const int planted = getenv(\"PLANTED\") ? atoi(getenv(\"PLANTED\")) : -1;\n");
    for (int i = 0; i < COUNT(planted); i++) {
        char *anchor = strstr(text, planted[i].anchor), *from = anchor ? strstr(anchor, planted[i].from) : NULL;
        planted_applies[i] = from != NULL;
        if (!from) continue;
        char *swap = planted[i].statement ? path_text("if (planted == %d) { %s } else { %s }", i, planted[i].to, planted[i].from)
                                          : path_text("(planted == %d ? %s : %s)", i, planted[i].to, planted[i].from);
        text_splice(&text, from, strlen(planted[i].from), swap);
        free(swap);
    }
    char *source = path_text("%s/planted.cu", top);
    planted_program = path_text("%s/planted", top);
    write_text(source, text, strlen(text));
    compile = start("exec %s -x c++ -std=c++17 -O1 -w -fopenmp -Idev/emu %s -o %s -ldl", cxx, source, planted_program);
}

static void check_planted(void) {
    if (!compile.pid) return;
    if (finish_in(&compile, 4 * timeout)) {
        result("planted", 0, "the copy does not compile: %s", complaint(&compile));
        return;
    }
    for (int i = -1; i < COUNT(planted); i++) {             // -1: nothing is planted, and all must be well
        char name[120], text[400], who[20];
        snprintf(name, sizeof name, "planted: %s", i < 0 ? "nothing" : planted[i].name);
        if ((i >= 0 && !(planted[i].levels & level)) || (!wanted(name) && i >= 0)) continue;
        if (i >= 0 && !planted_applies[i]) { result(name, 0, "its text is not in train_litespark.cu: mend its row"); continue; }
        int wrong = 0;
        for (int k = 0; k < (i < 0 ? 2 : 1); k++) {
            const Case *c = case_named(i < 0 ? "llama" : planted[i].name_of_case);
            const char *precision = i < 0 ? precisions[k] : planted[i].precision;
            const char *device = i >= 0 && planted[i].levels & HOPPER ? "EMU_CC=9.0 EMU_SEED=1" : "";
            char *command = path_text("env PLANTED=%d EMU_TIMEOUT=60 %s %s", i, device, planted_program);
            snprintf(who, sizeof who, "planted%d", i);
            Run r = start_dump(command, who, c, precision, "");
            if (finish(&r)) wrong++, snprintf(text, sizeof text, "%s", complaint(&r));
            else wrong += !dump_is_right(c, who, precision, text, sizeof text);
        }
        if (i < 0) result(name, !wrong, "%s", text);
        else result(name, wrong > 0, "%s: %s", wrong ? "caught" : "NOT caught", text);
    }
}

// ==== 9. main ===========================================================================================================
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--twin") && i + 1 < argc) twin = argv[++i];
        else if (!strcmp(argv[i], "--cuda") && i + 1 < argc) cuda = argv[++i];
        else if (!strcmp(argv[i], "--double") && i + 1 < argc) doubles = argv[++i];
        else if (!strcmp(argv[i], "--seed") && i + 1 < argc) seed = (uint64_t)atoll(argv[++i]);
        else if (!strcmp(argv[i], "--timeout") && i + 1 < argc) timeout = atof(argv[++i]);
        else if (!strcmp(argv[i], "--level") && i + 1 < argc) {
            const char *word = argv[++i];
            level = !strcmp(word, "quick") ? QUICK : !strcmp(word, "ptx") ? PTX : !strcmp(word, "long") ? LONG : 0;
            if (!level) die("--level %s: choose quick, ptx or long", word);
        } else if (argv[i][0] == '-' || n_filters == 64) {
            die("usage: %s --cuda 'COMMAND' [--twin FILE] [--double FILE] [--level quick|ptx|long] [--seed N] "
                "[--timeout SECONDS] [words of check names]", argv[0]);
        } else filters[n_filters++] = argv[i];
    }
    if (!cuda) die("--cuda 'COMMAND' names the trainer to test, such as build/train_litespark_emu");
    const char *const settings[][2] = {
        {"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}, {"OMPI_MCA_hwloc_base_binding_policy", "none"},
        {"OMP_WAIT_POLICY", "passive"}, {"OMPI_MCA_mpi_yield_when_idle", "1"}, {"OMPI_MCA_ess_singleton_isolated", "1"},
        {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"}, {"EMU_THREADS", "1"}, {"ASAN_OPTIONS", "detect_leaks=0"}};
    for (int i = 0; i < COUNT(settings); i++) setenv(settings[i][0], settings[i][1], 0);
    snprintf(top, sizeof top, "%s/litespark_cuda.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(top)) die("cannot make %s: %s", top, strerror(errno));
    double begin = last_result = now_seconds();
    if (is_emu()) plant_errors();
    check_gradients();
    check_recompute();
    check_mlp_forms();
    check_hopper();
    check_parts();
    check_seeds();
    check_splits();
    check_training();
    check_resume();
    check_order();
    check_energy();
    check_evaluation();
    check_generation();
    check_memory();
    check_plan();
    check_refusals();
    check_planted();
    if (!getenv("KEEP")) nftw(top, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    else printf("kept: %s\n", top);
    if (passed + failed + skipped == 0) failed++, printf("FAIL  no check has such a name\n");
    printf("%.0f s\n", now_seconds() - begin);
    printf(skipped ? "%d passed, %d failed, %d skipped\n" : "%d passed, %d failed\n", passed, failed, skipped);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
