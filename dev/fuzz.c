/*
Fuzzing of everything that litespark parses, with libFuzzer (clang). One program, the target chosen by name:

    make fuzz SECONDS_EACH=60                                   all targets
    FUZZ_SEEDS=1 FUZZ_TARGET=shard build/fuzz build/corpus/shard    writes small valid inputs into that folder
    FUZZ_TARGET=shard build/fuzz build/corpus/shard                 fuzzes from there
    FUZZ_TARGET=shard build/fuzz CRASH_FILE                         repeats one

An input is either refused by die() (which comes back here) or used, and what is then promised is checked.
Sanitizers watch for the rest. Memory that a die() leaves behind is freed here; what a success leaves behind
is a leak and aborts (but for loaders, which the trainer keeps). So does an allocation much larger than the
input: no field of a file may decide how much memory is taken.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <glob.h>

// ---- allocations of the trainer, tracked
static void *tracked[1 << 16];
static int n_tracked, tracking;
static size_t largest_request;

static void *track(void *p, size_t n) {
    if (!tracking || !p) return p;
    if (n > largest_request) largest_request = n;
    if (n_tracked == (int)(sizeof tracked / sizeof *tracked)) abort();
    return tracked[n_tracked++] = p;
}
static void untrack(void *p) {
    for (int i = n_tracked - 1; tracking && p && i >= 0; i--)
        if (tracked[i] == p) { tracked[i] = tracked[--n_tracked]; return; }
}
static void *tracked_malloc(size_t n) { return track(malloc(n), n); }
static void *tracked_calloc(size_t n, size_t size) { return track(calloc(n, size), n * size); }
static void *tracked_realloc(void *p, size_t n) { untrack(p); return track(realloc(p, n), n); }
static void tracked_free(void *p) { untrack(p); free(p); }
#define malloc tracked_malloc
#define calloc tracked_calloc
#define realloc tracked_realloc
#define free tracked_free
#define LITESPARK_NO_MAIN
#include "../train_litespark.c"
#undef malloc
#undef calloc
#undef realloc
#undef free
#include <setjmp.h>

static char dir[64];
static void put(const char *name, const void *data, size_t n) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) abort();
}
static const char *in_dir(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

// An input of two files: the first ends at a NUL byte.
static size_t first_part(const uint8_t *data, size_t n) {
    const uint8_t *zero = (const uint8_t *)memchr(data, 0, n);
    return zero ? (size_t)(zero - data) : n;
}
static void put_two(const char *a, const char *b, const uint8_t *data, size_t n) {
    size_t k = first_part(data, n);
    put(a, data, k);
    put(b, k < n ? data + k + 1 : data, k < n ? n - k - 1 : 0);
}

// ---- targets
static void fuzz_json(const uint8_t *data, size_t n) {
    Json *j = json_parse((const char *)data, n, "fuzz");
    json_get(j, "a");
    tracked_free(j);
}

static void fuzz_config(const uint8_t *data, size_t n) {        // what is accepted survives a round trip
    Config c, d;
    config_from_json(&c, (const char *)data, n, "fuzz");
    char *text = config_to_json(&c, "float32");
    memset(&d, 0, sizeof d);
    config_from_json(&d, text, strlen(text), "round trip");
    char *again = config_to_json(&d, "float32");
    if (strcmp(text, again) || c.D % 8 || c.H % c.K || c.Vp < c.V) abort();
    char *const made[] = {text, again, c.rest, c.rest_keys, d.rest, d.rest_keys};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) tracked_free(made[i]);
}

static void fuzz_safetensors(const uint8_t *data, size_t n) {
    put("x.safetensors", data, n);
    StSet *s = st_open(in_dir("x.safetensors"));
    for (int i = 0; i < s->n_tensors; i++) {
        const StTensor *t = &s->tensors[i];
        if (st_find(s, t->name) != t || t->offset + t->n_bytes > n) abort();
        if (t->dtype > ST_F16) continue;
        float *x = (float *)xmalloc(t->n * 4);
        st_read(s, t, 0, t->n, x);
        tracked_free(x);
    }
    st_close(s);
}

static void fuzz_index(const uint8_t *data, size_t n) {
    static int ready;
    static const char *const files[][2] = {
        {"m1", "{\"a\":{\"dtype\":\"I8\",\"shape\":[3],\"data_offsets\":[0,3]},"
               "\"b\":{\"dtype\":\"I8\",\"shape\":[5],\"data_offsets\":[3,8]}}"},
        {"m2", "{\"c\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]}}"}};
    for (int i = 0; i < 2 && !ready; i++) {
        unsigned char file[300] = {0};
        size_t k = strlen(files[i][1]);
        file[0] = (unsigned char)k;
        memcpy(file + 8, files[i][1], k);
        put(files[i][0], file, 8 + k + 8);
    }
    ready = 1;
    put("model.safetensors.index.json", data, n);
    st_close(st_open(dir));
}

// The first byte chooses T, B, rank, shuffle, document mask; bit 7: metadata.json and a .ds, else a .bin.
static void fuzz_shard(const uint8_t *data, size_t n) {
    if (n < 1) return;
    int how = *data++, T = 1 + (how & 7), B = 1 + (how >> 3 & 1), masked = how >> 6 & 1, vocab = 1000;
    if (how & 128) put_two("metadata.json", "a.ds", data, n - 1);
    else put("a.bin", data, n - 1);
    DataLoader dl;
    Batch batch;
    const char *data_path = in_dir(how & 128 ? "a.ds" : "a.bin");
    loader_open(&dl, data_path, B, T, how >> 4 & 1, 2, 1, how >> 5 & 1, vocab, masked);
    batch_alloc(&batch, B, T, masked, /*with_floor=*/1);
    for (int s = 0; s < 5; s++) {
        loader_next(&dl, &batch);
        for (int i = 0; i < B * T; i++) {
            int x = batch.inputs[i], y = batch.targets[i];
            if (x < 0 || x >= vocab || y >= vocab || (y < 0 && y != IGNORED)) abort();
            if (masked && (batch.doc_start[i] < 0 || batch.doc_start[i] > i % T)) abort();
        }
    }
    tracking = 0;                                               // loader and batch are kept on purpose
    while (n_tracked) free(tracked[--n_tracked]);
}

// The first byte says how many of the last bytes are a text to encode; the rest is a tokenizer file.
static void fuzz_tokenizer(const uint8_t *data, size_t n) {
    static FILE *sink;
    if (n < 1) return;
    size_t text = *data++ < n - 1 ? data[-1] : n - 1, bytes = 0;
    n--;
    if (!sink) sink = fopen("/dev/null", "w");
    put("t.bin", data, n - text);
    Tokenizer *t = tokenizer_open(in_dir("t.bin"));
    for (int id = -1; id <= t->V; id++) tokenizer_print(t, id & 1 ? t->bos : -1, id, sink);
    int *ids, count = tokenizer_encode(t, (const char *)data + n - text, text, &ids);
    for (int i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= t->V) abort();
        bytes += piece_byte(t, &t->piece[ids[i]]) >= 0 ? 1 : (size_t)t->piece[ids[i]].n;
    }
    if (bytes != text + (t->prefix_space && text ? 1 : 0)) abort();     // the pieces cover the text exactly
    tracked_free(ids);
    tokenizer_free(t);
}

static void fuzz_options(const uint8_t *data, size_t n) {       // a word per line
    static char words[1 << 13];
    char *argv[257];
    int argc = 1;
    if (n >= sizeof words) return;
    memcpy(words, data, n);
    words[n] = 0;
    argv[0] = words;
    for (char *w = words, *end; w && argc < 256; w = end) {
        end = strchr(w, '\n');
        if (end) *end++ = 0;
        argv[argc++] = w;
    }
    options_parse(argc, argv);
    options_check();
    for (int i = 0; i < COUNT(option_table); i++) {             // a value's text reads back as that value
        Option *o = &option_table[i];
        if (o->type == OPT_GROUP || o->type == OPT_FLAG || o->type == OPT_TEXT) continue;
        const char *value = option_text(o);
        char copy[80];
        snprintf(copy, sizeof copy, "%s", value);
        option_set(o, copy);
        if (strcmp(option_text(o), copy)) abort();
    }
    tracking = 0;                                               // values of text options are kept on purpose
    while (n_tracked) free(tracked[--n_tracked]);
}

static void fuzz_state(const uint8_t *data, size_t n) {         // trainer_state.json, then checksums.txt
    TrainState t;
    Options was;
    put_two("checksums.txt", "trainer_state.json", data, n);
    if (strchr(checkpoint_whole(dir, 0).s, '\n')) abort();
    options_default();
    checkpoint_read_state(dir, &t, &was);
    if (t.step < 0 || t.updates > t.step || t.loader.position < 0) abort();
    tracking = 0;
    while (n_tracked) free(tracked[--n_tracked]);
}

static const char CONFIG[] =
    "{\"model_type\": \"qwen3\", \"vocab_size\": 57, \"hidden_size\": 24, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 8, \"intermediate_size\": 24, "
    "\"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-06, \"tie_word_embeddings\": true, "
    "\"rope_scaling\": {\"rope_type\": \"llama3\", \"rope_theta\": 500.0, \"factor\": 8.0, "
    "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 32}, "
    "\"eos_token_id\": [1, 2], \"sliding_window\": 64, \"use_sliding_window\": false, "
    "\"hidden_act\": \"silu\", \"x\": {\"y\": [1, null]}}";
static const char JSON[] =
    "{\"a\": [1, -2.5e3, true, null, \"\\u20ac\\ud834\\udd1e\\n\"], \"b\": {\"c\": {}}}";
static const char INDEX[] =
    "{\"metadata\":{\"total_size\":16},\"weight_map\":{\"a\":\"m1\",\"b\":\"m1\",\"c\":\"m2\"}}";
static const char OPTIONS[] = "--steps\n100\n--lr\n3e-4\n--schedule\nwsd\n--train-data\nx_*.bin\n"
                              "--eval-only\n--init-from\ndir\n--precision\nbf16";

// Small valid inputs of a target, for libFuzzer to start from.
static void write_seeds(const char *target, const char *folder) {
    static uint8_t s[1 << 14];
    size_t n = 0;
    char path[512];
    for (int variant = 0; variant < 3; variant++) {
        memset(s, 0, sizeof s);
        if (!strcmp(target, "json")) n = (size_t)sprintf((char *)s, "%s", variant ? CONFIG : JSON);
        if (!strcmp(target, "config")) n = (size_t)sprintf((char *)s, "%s", CONFIG);
        if (!strcmp(target, "index")) n = (size_t)sprintf((char *)s, "%s", INDEX);
        if (!strcmp(target, "options")) n = (size_t)sprintf((char *)s, "%s", OPTIONS + (variant ? 12 : 0));
        if (!strcmp(target, "state")) {
            Text t = {NULL, 0, 0};
            text_add(&t, "{\"format\": 1, \"step\": 12, \"updates\": 12, \"tokens\": 384, \"world\": 1, "
                         "\"seconds\": 0.5, \"joules\": null, \"loader\": {\"seed\": 1, \"epoch\": 0, "
                         "\"position\": 3}, \"options\": {\"lr\": \"0.001\", \"steps\": \"20\"}, "
                         "\"n_healthy\": 12");
            for (int k = 0; k < 2; k++) {
                text_add(&t, k ? "], \"norms\": [" : ", \"losses\": [");
                for (int i = 0; i < SPIKE_WINDOW; i++) text_add(&t, i ? ",0" : "4.25");
            }
            text_add(&t, "]}\n");
            Text sums = {NULL, 0, 0};
            text_add(&sums, "%08x %d trainer_state.json\n", crc32_update(0, t.s, (size_t)t.n), t.n);
            text_add(&sums, "%08x\n", crc32_update(0, sums.s, (size_t)sums.n));
            memcpy(s, sums.s, (size_t)sums.n);
            memcpy(s + sums.n + 1, t.s, (size_t)t.n);
            n = (size_t)(sums.n + 1 + t.n);
        }
        if (!strcmp(target, "safetensors")) {
            const char *header =
                "{\"__metadata__\":{\"format\":\"pt\"},"
                "\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
                "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[16,22]},"
                "\"c\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[22,24]}}";
            n = strlen(header);
            s[0] = (uint8_t)n;
            s[1] = (uint8_t)(n >> 8);
            memcpy(s + 8, header, n);
            n += 8 + 24;
        }
        if (!strcmp(target, "shard") && variant == 2) {
            s[0] = 0xC2;
            n = 2 + (size_t)sprintf((char *)s + 1, "{\"vocab_size\": 1000, \"sequence_length\": 8, "
                                    "\"token_size_bytes\": 2, \"eos_token_id\": 3}");
            for (int i = 0; i < 36; i++, n += 2) s[n] = (uint8_t)i;
        } else if (!strcmp(target, "shard")) {
            int32_t h[6] = {variant ? 20240801 : 20240520, variant ? 7 : 1, 40, variant ? 1000 : 0, 0, 4};
            s[0] = variant ? 0x62 : 0x2A;
            memcpy(s + 1, h, sizeof h);
            for (int i = 0; i < 40; i++) s[1 + 1024 + i * (variant ? 4 : 2)] = (uint8_t)(i * 5);
            n = 1 + 1024 + 40 * (variant ? 4 : 2);
        }
        if (!strcmp(target, "tokenizer")) {
            int V = variant == 2 ? 259 : 260;
            int32_t h[8] = {TOKENIZER_MAGIC, 1, variant, V, 259, -1, variant, 0}, longest = 8;
            s[0] = 9;
            n = 1;
            if (variant == 2) memcpy(s + n, &longest, 4), n += 4;   // llama2.c's: <unk> BOS EOS, then bytes
            else memcpy(s + n, h, 32), n += 32;
            for (int i = 0; i < V; i++) {
                char piece[8] = {(char)i, 0};
                int32_t k = 1;
                float score = (float)-i;
                if (variant == 2) k = i < 3 ? sprintf(piece, "<%d>", i) : sprintf(piece, "<0x%02X>", i - 3);
                else if (i >= 256) k = sprintf(piece, "%.*s", i - 254, "the tea");
                memcpy(s + n, &score, 4);
                memcpy(s + n + 4, &k, 4);
                memcpy(s + n + 8, piece, (size_t)k);
                n += 8 + (size_t)k;
            }
            n += (size_t)sprintf((char *)s + n, "the the t");
        }
        snprintf(path, sizeof path, "%s/seed%d", folder, variant);
        FILE *f = fopen(path, "wb");
        if (!f || fwrite(s, 1, n, f) != n || fclose(f)) abort();
    }
}

// ---- libFuzzer
static const struct { const char *name; void (*run)(const uint8_t *, size_t); } targets[] = {
    {"json", fuzz_json}, {"config", fuzz_config}, {"safetensors", fuzz_safetensors}, {"index", fuzz_index},
    {"shard", fuzz_shard}, {"tokenizer", fuzz_tokenizer}, {"options", fuzz_options}, {"state", fuzz_state}};
static void (*target)(const uint8_t *, size_t);
static jmp_buf escape;
static void on_die(const char *message) {
    if (!*message) abort();
    longjmp(escape, 1);
}
static void remove_dir(void) { remove_folder(dir); }

const char *__asan_default_options(void);
// libc's own, of a glob or vasprintf that a die() interrupts
const char *__asan_default_options(void) { return "detect_leaks=0"; }

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *name = getenv("FUZZ_TARGET") ? getenv("FUZZ_TARGET") : "json";
    for (int i = 0; i < COUNT(targets); i++) if (!strcmp(name, targets[i].name)) target = targets[i].run;
    if (!target) die("FUZZ_TARGET=%s: no such target", name);
    if (getenv("FUZZ_SEEDS")) {
        write_seeds(name, (*argv)[*argc - 1]);
        exit(0);
    }
    snprintf(dir, sizeof dir, "%s/litespark_fuzz.XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(dir)) abort();
    atexit(remove_dir);
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    largest_request = 0;
    tracking = 1;
    die_hook = on_die;
    if (!setjmp(escape)) {
        target(data, n);
        if (n_tracked) abort();
    }
    tracking = 0;
    while (n_tracked) free(tracked[--n_tracked]);
    for (int fd = 3; fd < 24; fd++) {                           // what a die() or a loader left open
        char link[40], path[256] = "";
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (readlink(link, path, sizeof path - 1) > 0 && !strncmp(path, dir, strlen(dir))) close(fd);
    }
    if (largest_request > 200 * n + (4 << 20)) abort();         // 4 MiB: fixed buffers
    return 0;
}
