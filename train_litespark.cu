// ==== 1. Map ===============================================================================================
/*
litespark: train Llama-family language models on a GPU. The twin train_litespark.c is the same program on the
CPU and the reference for every gradient here: same sections, same names; read them side by side.

    make train DEVICE=cuda && mpirun -np 8 ./train_litespark        one rank per GPU
    make train DEVICE=emu  && mpirun -np 2 ./train_litespark        the same source on the CPU (dev/emu)
    ./train_litespark --help                                        every option

Letters. B sequences in a micro-step, T tokens in a sequence, N = B*T rows. V vocabulary (Vp: rounded up
to 128, rows in memory, never in files), L layers, C hidden size, H query heads, K key/value heads, D head
size, F MLP width. All matrices are row-major, last index fastest; a weight w is (out, in).

The model: the embedding, L layers, a last norm, the head; then loss = cross-entropy. One layer:

    x ----+-- norm1 -- Wqkv -- qk_norm, rope -- attention -- Wo --(+)-- x_mid
          +-------------------------------------------------------+
    kept for backward:     x  rstd1   qkv (qk_raw qk_rstd)   att lse        rebuilt there:  norm1(x)

    x_mid +-- norm2 -- Wgate_up -- silu(g) u -- Wdown --(+)-- x of l+1
          +---------------------------------------------+
    kept for backward:     x_mid  rstd2   gate_up                           rebuilt there:  norm2(x_mid)  h

Precision map (--precision bf16; with fp32 every floatX is a float)
    weights, activations and their gradients, attention probabilities    bf16, rounded once per op
    master weights, m, v, gradients of parameters, rstd, LSE             fp32
    sums inside kernels, matmuls                                         fp32
    loss, norms of gradients                                             double
Rules
- floatX is a template parameter: bf16 or float. Gradients of parameters are += (fp32, over micro-steps), of
  activations =, except the residual stream dx. Every op says which.
- What is trained enters as a weight per target (section 5): d objective / d loss of that target.
- Every sum has a fixed order: no float atomics, so two runs give the same bits.
- Memory: one arena each for weights, gradients, optimizer, activations and workspace, allocated before step
  0; nothing is allocated in a step.
- Kernels start only through launch(), on gpu.stream; inline PTX stands once, at the head of section 3; no
  architecture #ifdef outside it.
- The text between SHARED BEGIN and SHARED END is the twin's, copied by `make sync`.
Not here: tensor and pipeline parallelism, mixture of experts, serving, training of tokenizers.

Read 3 (ops), 4 (model), 5 (objectives), 6 (training) from top to bottom; 2 tells the words. The rest is
plumbing, for when you need it: 7 ranks, 8 errors, numbers, options, 9 JSON, 10 safetensors, 11 models,
12 tokenizer, 13 data, 14 schedule and log, 15 checkpoints.
*/

// ==== 2. Vocabulary: types, options, and what the plumbing offers ================================================
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <algorithm>
#include <type_traits>
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

typedef __nv_bfloat16 bf16;
#ifndef LITESPARK_COMMIT
#define LITESPARK_COMMIT "unknown"
#endif

enum { ENOUGH_ROWS = 32768 };           // of a micro-step: more are no faster
enum { GPU_ALLOWANCE = 800 << 20 };     // bytes outside our arenas: CUDA context, cuBLASLt, NCCL buffers
static const char device_peak_is[] = "datasheet, dense";
static const char device_also_takes[] = ", and about 800 MiB for context, cuBLASLt and NCCL";

// Sums of gradients over ranks, section 7
void comm_reduce_start(float *x, size_t n);
void comm_reduce_finish(void);

// What this trainer does not do: an option with this value (NULL: with any), and why.
static const struct { const char *option, *value, *why; } refused[] = {
    {"--stage", "sft", "is not in this version; it trains on plain text"},
    {"--stage", "dpo", "is not in this version; it trains on plain text"},
    {"--zero", "1", "is not in this version of the CUDA trainer; it keeps whole copies on every GPU"},
    {"--zero", "2", "is not in this version of the CUDA trainer; it keeps whole copies on every GPU"},
    {"--zero", "3", "is not in this version of the CUDA trainer; it keeps whole copies on every GPU"},
    {"--shard-size", NULL, "is not in this version of the CUDA trainer; it keeps whole copies on every GPU"},
    {"--reduce-dtype", "bf16", "is not in this version"},
    {"--deterministic", "off", ": there are only deterministic kernels"},
    {"--gpus", NULL, "is not in this version; without ZeRO the memory per GPU does not depend on it"},
    {"--nodes", NULL, "is not in this version; without ZeRO the memory per GPU does not depend on it"},
    {"--device", NULL, "is not in this version; without ZeRO the memory per GPU does not depend on it"},
};

// SHARED BEGIN
#define CEIL_DIV(n, d) (((n) + (d) - 1) / (d))
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

// ---- options: one table feeds parser, --help, the log and resume ------------------------------------------
enum { STAGE_PRETRAIN, STAGE_SFT, STAGE_DPO };
enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT };
enum { FP32, BF16 };
enum { RECOMPUTE_NONE, RECOMPUTE_MLP, RECOMPUTE_BLOCK };
enum { MLP_AUTO, MLP_PASSES, MLP_PRODUCTS };

// Three kinds. FIXED: what a run is; a resume that gives another value is refused. GIVEN: saved as the user
// gave it (or left it open) and resolved anew at every start, so that another number of ranks or a lower --lr
// works. START: of this start only, never saved.
enum { START, GIVEN, FIXED };

// X(type, name, field of opt, kind, initial value (NULL: not set), range of numbers, help; a choice's begins
// with its words). A GROUP is a headline of --help.
#define OPTIONS(X, GROUP) \
    GROUP("Model") \
    X(TEXT, "--preset", preset, START, NULL, 0, 0, "a model by name, random weights (list: --preset help)") \
    X(TEXT, "--config", config, START, NULL, 0, 0, "a model by Hugging Face's config.json, random weights") \
    X(TEXT, "--init-from", init_from, START, NULL, 0, 0, \
      "start from the weights of a Hugging Face checkpoint folder") \
    X(TEXT, "--resume", resume, START, NULL, 0, 0, \
      "continue this checkpoint folder; auto: the newest whole one in --out") \
    GROUP("Data") \
    X(TEXT, "--train-data", train_data, GIVEN, NULL, 0, 0, \
      "token shards, as a quoted pattern (default: generated stories)") \
    X(TEXT, "--val-data", val_data, GIVEN, NULL, 0, 0, \
      "shards to evaluate on (default: those of the stories, with the default --train-data)") \
    X(TEXT, "--tokenizer", tokenizer, GIVEN, NULL, 0, 0, \
      "tokenizer.bin, for text (default: the one beside model or data)") \
    X(CHOICE, "--document-mask", document_mask, FIXED, "off", 0, 0, \
      "off|on: on: a token sees only its own document") \
    GROUP("Objective") \
    X(CHOICE, "--stage", stage, FIXED, "pretrain", 0, 0, \
      "pretrain|sft|dpo: next tokens of text, answers, preferences") \
    X(REAL, "--dpo-beta", dpo_beta, GIVEN, "0.1", 0, 1e3, "dpo: how strongly the reference model holds") \
    GROUP("Batch") \
    X(INT, "--seq-len", seq_len, GIVEN, "0", 0, 1 << 24, \
      "tokens of a sequence, 0 = the model's, at most 1024") \
    X(INT, "--batch-size", batch_size, GIVEN, "0", 0, 1 << 20, \
      "sequences per rank at a time, 0 = as many as fit") \
    X(INT, "--total-batch-tokens", total_batch_tokens, GIVEN, "0", 0, 1e12, \
      "tokens of an update over all ranks, 0 = by the size of the model") \
    GROUP("Schedule") \
    X(INT, "--steps", steps, GIVEN, "-1", -1, 1e12, "updates in all, -1 = by the size of the model") \
    X(REAL, "--lr", lr, GIVEN, "-1", -1, 1e3, "highest learning rate, -1 = by the size of the model") \
    X(REAL, "--min-lr", min_lr, GIVEN, "-1", -1, 1e3, "learning rate at the end, -1 = lr/10") \
    X(INT, "--warmup-steps", warmup_steps, GIVEN, "-1", -1, 1e12, \
      "updates until the highest rate, -1 = min(100, steps/10)") \
    X(CHOICE, "--schedule", schedule, GIVEN, "cosine", 0, 0, \
      "cosine|linear|wsd|constant: how it falls (wsd: over the last fifth)") \
    GROUP("Optimizer (AdamW)") \
    X(REAL, "--beta1", beta1, GIVEN, "0.9", 0, 0.999999, "memory of the mean of gradients") \
    X(REAL, "--beta2", beta2, GIVEN, "0.95", 0, 0.999999999, "memory of the mean of their squares") \
    X(REAL, "--eps", eps, GIVEN, "1e-8", 1e-30, 1, "added to the root of that mean") \
    X(REAL, "--weight-decay", weight_decay, GIVEN, "0.01", 0, 1e3, \
      "pull of matrices (not of norms and biases) to zero") \
    X(REAL, "--grad-clip", grad_clip, GIVEN, "1", 0, 1e9, "longer gradients are cut to this, 0 = never") \
    X(REAL, "--skip-spikes", skip_spikes, GIVEN, "0", 0, 1e6, \
      "skip updates whose loss or norm is this many standard deviations off, 0 = never") \
    X(CHOICE, "--optimizer-dtype", optimizer_dtype, GIVEN, "fp32", 0, 0, \
      "fp32|bf16: storage of both means (bf16: rounded at random)") \
    GROUP("Looking") \
    X(INT, "--val-every", val_every, GIVEN, "-1", -1, 1e12, \
      "updates between evaluations, 0 = never, -1 = steps/10") \
    X(INT, "--val-batches", val_batches, GIVEN, "0", 0, 1e12, \
      "micro-steps of an evaluation, 0 = all of --val-data") \
    X(INT, "--sample-every", sample_every, GIVEN, "-1", -1, 1e12, \
      "updates between samples of text, 0 = never, -1 = one at the end") \
    X(INT, "--sample-tokens", sample_tokens, GIVEN, "200", 0, 1e9, "length of a sample") \
    X(TEXT, "--prompt", prompt, GIVEN, "", 0, 0, "text that a sample begins with") \
    X(REAL, "--temperature", temperature, GIVEN, "0.8", 0, 100, \
      "of samples: 0 = always the likeliest token, 1 = as the model says") \
    X(INT, "--log-every", log_every, GIVEN, "1", 1, 1e12, \
      "updates between lines on the screen (log.jsonl has all)") \
    X(FLAG, "--eval-only", eval_only, START, NULL, 0, 0, "print the loss on --val-data and stop") \
    X(FLAG, "--generate", generate, START, NULL, 0, 0, "print a sample of text and stop") \
    GROUP("Output") \
    X(TEXT, "--out", out, START, "out", 0, 0, "folder of checkpoints and log.jsonl") \
    X(INT, "--checkpoint-every", checkpoint_every, GIVEN, "-1", -1, 1e12, \
      "updates between checkpoints, 0 = none, not even at the end, -1 = steps/5 and at the end") \
    X(INT, "--keep", keep, GIVEN, "2", 1, 1e9, "checkpoints to keep") \
    GROUP("System") \
    X(INT, "--seed", seed, FIXED, "1", 0, 9e15, "of random weights, the order of data, and samples") \
    X(CHOICE, "--precision", precision, GIVEN, "fp32", 0, 0, "fp32|bf16: of weights and activations") \
    X(INT, "--threads", threads, START, "0", 0, 4096, "per rank, 0 = cores / ranks of this machine") \
    X(CHOICE, "--recompute", recompute, START, "none", 0, 0, \
      "none|mlp|block: what backward computes again, to save memory") \
    X(INT, "--logits-chunk", logits_chunk, START, "0", 0, 1 << 24, \
      "rows of logits in memory at a time, 0 = what is fast here") \
    X(INT, "--zero", zero, START, "0", 0, 3, "ZeRO: ranks share 1 optimizer state, 2 gradients, 3 weights") \
    X(INT, "--shard-size", shard_size, START, "0", 0, 1e6, "ranks that share among themselves, 0 = all") \
    X(CHOICE, "--reduce-dtype", reduce_dtype, START, "fp32", 0, 0, "fp32|bf16: gradients between ranks") \
    X(CHOICE, "--mlp", mlp, START, "auto", 0, 0, \
      "auto|passes|products: SwiGLU as passes of its own or inside our products") \
    X(CHOICE, "--deterministic", deterministic, START, "on", 0, 0, "off|on: two runs give the same bits") \
    X(INT, "--timeout", timeout, START, "600", 1, 1e6, "seconds to wait for another rank before giving up") \
    GROUP("Tools") \
    X(FLAG, "--dry-run", dry_run, START, NULL, 0, 0, "print the memory that this run needs and stop") \
    X(INT, "--gpus", gpus, START, "0", 0, 1e6, "with --dry-run: GPUs to plan for") \
    X(INT, "--nodes", nodes, START, "0", 0, 1e6, "with --dry-run: machines to plan for") \
    X(TEXT, "--device", device, START, NULL, 0, 0, "with --dry-run: GPU to plan for") \
    X(TEXT, "--dump-grads", dump_grads, START, NULL, 0, 0, \
      "write the first update's gradients to this safetensors file and stop") \
    X(FLAG, "--help", help, START, NULL, 0, 0, "this list")

enum { OPT_GROUP, OPT_TEXT, OPT_INT, OPT_REAL, OPT_CHOICE, OPT_FLAG };
typedef const char *TEXT_value;
typedef int64_t INT_value, CHOICE_value, FLAG_value;
typedef double REAL_value;
#define FIELD(type, name, field, ...) type##_value field;
#define NO_FIELD(title)
typedef struct Options { OPTIONS(FIELD, NO_FIELD) } Options;
#undef FIELD
#undef NO_FIELD
static Options opt;             // resolved: what the user left open is decided by resolve_options
typedef struct Option Option;

// ---- a model ----------------------------------------------------------------------------------------------
typedef struct Family { const char *name, *class_name; int qkv_bias, qk_norm, window_switch; } Family;
typedef struct Config {         // Hugging Face's config.json
    const Family *family;
    // vocabulary; the same rounded up to a multiple of 128: rows in memory, never in files
    int V, Vp;
    int L, C, H, K, D, F;       // layers, hidden size, query heads, key/value heads, head_dim, MLP width
    int max_T;                  // positions the model is made for
    int tied;                   // lm_head is the embedding
    // Qwen2: q, k, v have a bias; Qwen3: RMSNorm on each head of q and k, before RoPE
    int qkv_bias, qk_norm;
    double eps, rope_theta, init_std;
    double rope_factor;         // 0: plain RoPE, else type "llama3": long wavelengths are stretched by it
    double rope_low, rope_high;
    int rope_original_T;
    // 0 = none, else how far layers >= window_layer look back; a longer seq-len is refused
    int sliding_window;
    int window_layer;           // Qwen's max_window_layers
    int bos, eos;               // token ids, -1 = none
} Config;

enum { INIT_NORMAL, INIT_ONE, INIT_ZERO };
typedef struct Tensor {
    char name[80];              // Hugging Face's
    int unit;
    size_t at, n;               // first element in its unit, number of elements
    int rows, cols;             // cols 0: a vector
    int init, decay;
} Tensor;

// what is reduced, sharded and saved together: the embedding, a layer, final norm and head
typedef struct Unit {
    char name[24];              // "embed", "layers.7", "head"
    // place in the flat buffer, elements; n_padded: a multiple of UNIT_ALIGN * ranks
    size_t at, n, n_padded;
    size_t vocab_padding;       // elements, for the rows V .. Vp-1
    int first_tensor, n_tensors;
} Unit;

enum { UNIT_EMBED, UNIT_LAYER };// the first units; then come the other layers and the head
typedef struct ParamTable {     // every tensor's name, place, shape, initial value and decay, once
    Tensor *tensors;
    Unit *units;
    int n_tensors, n_units;
    size_t n, n_params;         // elements of a flat buffer; parameters without padding
    size_t unit_align;
} ParamTable;

// ---- data -------------------------------------------------------------------------------------------------
#define IGNORED (-100)          // a target that is no target (PyTorch's ignore_index)
typedef struct Batch {          // of one micro-step
    int B, T;
    int n_rows;                 // rows with data; the others are padding: inputs 0, targets IGNORED
    int *inputs, *targets;      // (B, T)
    int *doc_start;             // (B, T) first position of the document of t; NULL without document mask
    // (B, T) evaluation: true -ln p of each target; 0 when the data has none, or NULL
    float *floor;
} Batch;

typedef struct LoaderState {
    uint64_t seed;
    int64_t epoch, position;    // position = windows that all ranks together have drawn in this epoch
} LoaderState;

enum { MAX_OPEN_SHARDS = 256 }; // of thousands; a process often may have 1024 descriptors
typedef struct DataLoader {
    struct Shard *shards;
    int n_shards;
    int64_t n_windows, n_tokens, n_dropped;     // dropped: tokens that are in no window
    int B, T, rank, world, shuffle, vocab_size, document_mask;
    int has_floor;              // evaluation: every shard has its .nll
    LoaderState state;
    void *buffer;               // one window as it lies in the file
    struct Shard *open_shard[MAX_OPEN_SHARDS];  // who has the descriptor of this place, NULL = none
} DataLoader;

typedef struct Tokenizer {
    int kind, V, bos, eos, prefix_space;        // bos and eos: -1 = none
    struct Piece *piece;        // (V)
    int byte_id[256];           // the piece that stands for a byte: "<0xHH>", else the byte itself, else -1
    uint32_t slots;             // power of two >= 2V
    int *slot;                  // (slots) hash table of the ids that text can become; -1 = empty
    char *path, *file;
} Tokenizer;

// ---- a run ------------------------------------------------------------------------------------------------
enum { SPIKE_WINDOW = 128 };
typedef struct TrainState {     // with the weights and the optimizer: all that a run is
    int64_t step, updates;      // updates: steps that changed the weights
    int64_t tokens;
    double seconds, joules;     // spent in steps; joules NAN: unavailable
    LoaderState loader;         // where the data of the next update begin
    double losses[SPIKE_WINDOW], norms[SPIKE_WINDOW];   // of the last healthy updates, for --skip-spikes
    int64_t n_healthy;
} TrainState;

// memory: bytes that a rank may use
typedef struct Machine { int ranks, ranks_per_node; double memory; } Machine;

enum { ARENA_WEIGHTS, ARENA_GRADIENTS, ARENA_OPTIMIZER, ARENA_ACTIVATIONS, ARENA_WORKSPACE, N_ARENAS };
static const char *const arena_names[] = {"weights", "gradients", "optimizer", "activations", "workspace"};
typedef struct Model Model;     // section 4

typedef struct Plan {           // what decides the size of every array of a rank
    int ranks, rank, zero;
    int B, T, chunk;            // micro-step of B sequences of T tokens; rows of logits that exist at a time
    int bf16, bf16_state, recompute;
    int training;               // 0: evaluation and samples; weights and activations are all there is
} Plan;

// ---- what the plumbing (sections 8 to 15) offers the story ------------------------------------------------
typedef struct Str { char s[4096]; } Str;               // a short text as a value, with nothing to free
// a growing text: start from zero, text_add, free(t.s)
typedef struct Text { char *s; int n, max; } Text;
typedef struct Json Json;
typedef struct StSet StSet;                             // the tensors of a checkpoint, for reading
typedef struct StWriter StWriter;                       // a safetensors file that is being written
enum { ST_F32, ST_BF16, ST_F16, ST_I32 };
enum { IO_CHUNK = 1 << 18, IO_THREADS = 16 };           // values between disk and model, per thread

// 8. die: one line, all ranks end with status 1. Random numbers are functions of (seed, stream, index)
__attribute__((noreturn, format(printf, 1, 2))) void die(const char *fmt, ...);
__attribute__((format(printf, 1, 2))) Str str(const char *fmt, ...);
void *xmalloc(size_t bytes);
void *xcalloc(size_t n, size_t size);
char *xstrdup(const char *s);
double now_seconds(void);
uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index);
double random_uniform(uint64_t seed, uint64_t stream, uint64_t index);
void random_normals(float *out, double scale, uint64_t seed, uint64_t stream, uint64_t first, size_t n);
uint64_t hash_string(const char *s);
void options_parse(int argc, char **argv);
void options_check(void);
void options_help(void);
Option *option_find(const char *name);
int option_given(const char *name);
const char *option_text(const Option *o);
// 9, 10
void text_add(Text *t, const char *fmt, ...);
void text_add_string(Text *t, const char *s);
void text_add_field(Text *t, const char *key, double x);
StWriter *st_create(const char *path, const char *metadata);
void st_declare(StWriter *w, const char *name, int dtype, int n_dims, const int64_t *shape);
void st_declare_table(StWriter *w, const ParamTable *p, int dtype);
void st_begin(StWriter *w);
size_t st_take(StWriter *w, size_t count);
void st_write_at(StWriter *w, size_t place, const float *values, size_t count);
void st_write(StWriter *w, const float *values, size_t count);
int st_finish(StWriter *w, uint32_t *crc, size_t *file_bytes);
// 11
Config choose_config(const char *resume_dir);
void config_set_vocab(Config *c, int V);
double config_params(const Config *c);
void param_table_build(ParamTable *p, const Config *c, int world);
const Tensor *table_find(const ParamTable *p, int unit, const char *suffix);
// 12, 13
Tokenizer *tokenizer_choose(const Config *c, const char *model_dir, const char **side_folder);
int tokenizer_encode(const Tokenizer *t, const char *text, size_t n, int **ids);
void tokenizer_print(const Tokenizer *t, int previous_id, int id, FILE *f);
int data_vocabulary(const char *pattern);
void loader_open(DataLoader *dl, const char *pattern, int B, int T, int rank, int world, uint64_t seed,
                 int shuffle, int vocab_size, int document_mask);
void loader_log(const DataLoader *dl, const char *name, FILE *f);
void loader_rewind(DataLoader *dl);
int64_t loader_eval_batches(const DataLoader *dl);
void loader_next(DataLoader *dl, Batch *batch);
void batch_alloc(Batch *batch, int B, int T, int document_mask, int with_floor);
// 14
double learning_rate(const Options *o, int64_t step);
double flops_per_token(const Config *c, int T, int causal);
void log_open(const char *out);
void log_record(Text *t);
void text_add_options(Text *t, int as_given);
Str duration_text(double seconds);
Str measured_text(double x, const char *format);
Str flops_text(double x);
// 15
char *checkpoint_choose(const char *resume, const char *out);
int checkpoint_list(const char *out, int64_t **steps);
void checkpoint_read_state(const char *dir, TrainState *t, Options *was);
void checkpoint_read_model(const char *dir, Model *m, int state);
void save_values(StWriter *w, const Model *m, int kind, int u, size_t at, size_t n);
void weights_read(const char *dir, Model *m, const Config *c);
void weights_random(Model *m, const Config *c, uint64_t seed);
void checkpoint_save(const Model *m, const TrainState *t, const Config *c, const Options *o,
                     const char *side_folder);

// ---- what each trainer has of its own: ranks and device (section 7), model (section 4) --------------------
int comm_rank(void);
int comm_world(void);
void comm_init(int *argc, char ***argv);
void comm_finish(void);
void comm_abort(void);                                  // ends all ranks with exit status 1
void comm_barrier(void);
void comm_broadcast(void *data, size_t bytes);          // from rank 0
void comm_sum(double *x, int n);                        // over ranks, in place
double comm_max(double x);
void device_open(void);                                 // this rank's part of the machine
void device_wait(void);                                 // until it has done what it was given
Machine device_machine(void);                           // what there is to plan with, the same on all ranks
const char *device_name(void);
double device_peak(int bf16);                           // FLOP/s of a rank; NAN: unknown
// joules of this rank's part since some moment; NAN: unavailable
double energy_read(void);
int device_logits_chunk(int V);                         // rows of logits at a time that are fast here
void device_check_sizes(const Config *c);               // dies if the kernels cannot take them

Model *model_plan(const Config *c, const Plan *plan);   // sizes only, nothing is taken
double model_bytes(const Model *m, int arena);          // of one arena
void model_alloc(Model *m);
void model_free(Model *m);
const ParamTable *model_table(const Model *m);
enum { STATE_WEIGHTS, STATE_MASTER, STATE_M, STATE_V, STATE_GRADS };
// at most IO_CHUNK values, by up to IO_THREADS threads at a time
void model_read(const Model *m, int what, int u, size_t at, size_t n, float *host);
void model_write(Model *m, int what, int u, size_t at, size_t n, const float *host);
float *model_floats(const Model *m, int what, int u, size_t at);    // NULL: they are no floats on the CPU
void state_share(const Model *m, int u, size_t *first, size_t *n);
void model_set_master(Model *m);

void llama_forward(Model *m, const Batch *batch);
void llama_head(Model *m, const Batch *batch, const double *weight);
void llama_backward(Model *m, const Batch *batch, void (*unit_done)(Model *, int));
double model_loss(Model *m);
void next_logits(Model *m, const int *ids, int n, float *logits);
void model_zero_grads(Model *m);
void model_reduce_unit(Model *m, int u);
void model_reduce_finish(Model *m);
double gradient_norm(Model *m, const char **bad, int *n_bad);
void model_update(Model *m, double lr, double grad_scale, int64_t step, const Options *o);
// SHARED END

// ==== 3. Ops: forward order, each backward below its forward =====================================================
// ---- the GPU, and the verbs: error checks, the one way to launch a kernel, all inline PTX of this file, reductions ----------
// A plain C++ compiler reads dev/emu/emu_verbs.h instead of the PTX: same names, same meaning, on the CPU.
typedef struct Gpu {
    cudaDeviceProp device;
    cudaStream_t stream;                // everything but communication
    cublasLtHandle_t lt;
    void *workspace;                    // cuBLASLt's
    float *scratch;                     // partial sums of kernels
    float *staging;                     // pinned: IO_CHUNK floats of each thread on their way from or to the device
    int number;                         // of the device
    cudaStream_t comm_stream;           // sums of gradients over ranks, under the compute of `stream`
    cudaEvent_t ready, summed;
    void *nccl;                         // ncclComm_t, NULL with one rank
} Gpu;
static Gpu gpu;                         // this rank's; every op works on gpu.stream

#define cudaCheck(call) cuda_check((call), #call, __FILE__, __LINE__)
static inline void cuda_check(cudaError_t e, const char *call, const char *file, int line) {
    if (e != cudaSuccess) die("%s:%d: %s: %s", file, line, call, cudaGetErrorString(e));
}

#define cublasCheck(call) do { \
    cublasStatus_t s_ = (call); \
    if (s_ != CUBLAS_STATUS_SUCCESS) die("%s:%d: %s: cuBLAS status %d", __FILE__, __LINE__, #call, (int)s_); \
} while (0)

// launch(kernel, grid, block, smem_bytes, stream, args...) starts a kernel and checks the launch. More than 48 KiB of shared
// memory, static and dynamic together, is opted in to (no kernel here has more than 17 KiB of static). Errors inside the kernel
// show at the next synchronising call (CUDA_LAUNCH_BLOCKING=1 moves that to the launch).
#define launch(...) launch_kernel("launch(" #__VA_ARGS__ ")", __FILE__, __LINE__, __VA_ARGS__)
template <typename... P, typename... A>
void launch_kernel(const char *call, const char *file, int line, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, A... args) {
    if (smem_bytes > 31 << 10)
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_bytes), call, file, line);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), call, file, line);
}

#ifdef __CUDACC__
// The block's dynamic shared memory, aligned to 128 bytes.
template <typename T = unsigned char> __device__ __forceinline__ T *shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<T *>(dynamic_shared_memory);
}
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// d (16,8) += a (16,16) b (16,8) for the warp; bf16 in, fp32 sums. With g = lane/4, t = lane%4:
//   a[0] = a(g, 2t..2t+1)   a[1] = a(g+8, 2t..)   a[2] = a(g, 2t+8..)   a[3] = a(g+8, 2t+8..)
//   b[0] = b(2t..2t+1, g)   b[1] = b(2t+8.., g)   d = d(g, 2t), d(g, 2t+1), d(g+8, 2t), d(g+8, 2t+1)
__device__ __forceinline__ void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 4 matrices of 8x8 bf16 from shared memory. Lane 8i+j passes the address of row j of matrix i (16-byte aligned);
// every lane gets r[i] = m_i(g, 2t..2t+1), transposed: m_i(2t, g), m_i(2t+1, g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Asynchronous copy of 16 bytes, global -> shared; bytes from `valid` on become zero and are not read (0: src is not touched).
// Visible to this thread after commit and wait, to the block after a barrier that follows.
__device__ __forceinline__ void cp_async_16(void *dst, const void *src, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async_4(void *dst, const void *src, int valid = 4) {      // the same for 4 bytes
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> __device__ __forceinline__ void cp_async_wait() {      // at most n committed groups are still in flight
    asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}

// Named barriers 1..15 for `threads` (a multiple of 32) of the block: wait, or arrive without waiting.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {                 // 2^x, relative error 2^-22; results below 2^-126 are 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint4 load_16B(const void *p) { return *(const uint4 *)p; }
__device__ __forceinline__ void store_16B(void *p, uint4 v) { *(uint4 *)p = v; }
#else
#include "emu_verbs.h"
#endif

// e^x, relative error 2^-22 + |x| 2^-24
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * 1.44269504f); }

// ---- conversions: to fp32 exact, from fp32 one rounding to nearest even ---------------------------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {  // two values as one mma operand register
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// ---- reductions: every lane or thread gets the result, in an order that depends only on the block size ---------------------
template <typename T> __device__ __forceinline__ T warp_sum(T x, int lanes = 32) {  // of each 2^n lanes
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x, int lanes = 32) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}
__device__ __forceinline__ int thread_in_block() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
__device__ __forceinline__ int threads_in_block() { return blockDim.x * blockDim.y * blockDim.z; }  // a multiple of 32 below
template <typename T> __device__ T block_sum(T x) {
    __shared__ T part[32];
    const int lane = thread_in_block() % 32, warp = thread_in_block() / 32;
    x = warp_sum(x);
    if (lane == 0) part[warp] = x;
    __syncthreads();
    x = warp_sum(lane < threads_in_block() / 32 ? part[lane] : T(0));
    __syncthreads();                                                    // part is free for the next call
    return x;
}

// ---- small things of the host ------------------------------------------------------------------------------------------------
// Counting sort of a batch's rows by token: rows order[starts[i]] .. order[starts[i+1]-1] have token tokens[i]; tokens ascend.
static void sort_rows(int *order, int *starts, int *tokens, int *n_distinct, const int *ids, int N, int V) {
    static int *count, room;
    if (room < V + 1) {
        free(count);
        count = (int *)xmalloc((size_t)(room = V + 1) * sizeof(int));
    }
    memset(count, 0, (size_t)(V + 1) * sizeof(int));
    for (int n = 0; n < N; n++) count[ids[n] + 1]++;
    *n_distinct = 0;
    for (int v = 0; v < V; v++) {
        if (count[v + 1]) {
            tokens[*n_distinct] = v;
            starts[(*n_distinct)++] = count[v];
        }
        count[v + 1] += count[v];
    }
    starts[*n_distinct] = N;
    for (int n = 0; n < N; n++) order[count[ids[n]]++] = n;
}

// cos and sin (T, D/2) on the device of t * theta^(-2i/D), for Llama 3 stretched: see the twin.
static void rope_table(float *cosine, float *sine, const Config *c, int T) {
    const double PI = 3.14159265358979323846;
    size_t n = (size_t)T * (c->D / 2);
    float *host = (float *)xmalloc(2 * n * sizeof(float));
    for (int i = 0; i < c->D / 2; i++) {
        double freq = pow(c->rope_theta, -2.0 * i / c->D);
        if (c->rope_factor > 0) {
            double turns = c->rope_original_T * freq / (2 * PI);
            double keep = fmin(fmax((turns - c->rope_low) / (c->rope_high - c->rope_low), 0), 1);
            freq *= keep + (1 - keep) / c->rope_factor;
        }
        for (int t = 0; t < T; t++) {
            host[(size_t)t * (c->D / 2) + i] = (float)cos(t * freq);
            host[n + (size_t)t * (c->D / 2) + i] = (float)sin(t * freq);
        }
    }
    cudaCheck(cudaMemcpy(cosine, host, n * sizeof(float), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(sine, host + n, n * sizeof(float), cudaMemcpyHostToDevice));
    free(host);
}

// *sum += x (n), each times its weight (n) unless that is NULL, in double and in a fixed order. One block: what is summed so is
// little beside a step.
template <typename T> __global__ void add_sum_kernel1(double *sum, const T *x, const double *weight, int n) {
    double mine = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine += weight ? weight[i] * x[i] : (double)x[i];
    mine = block_sum(mine);
    if (threadIdx.x == 0) *sum += mine;
}

template <typename T> void add_sum(double *sum, const T *x, const double *weight, int n) {
    launch(add_sum_kernel1<T>, 1, 1024, 0, gpu.stream, sum, x, weight, n);
}

// ---- what the kernels of this section share -----------------------------------------------------------------------------
// floatX is X here. Sums over rows go through partial sums of blocks, which column_sums adds in a fixed order. Arrays of
// constant size live in registers if every loop over them unrolls: the compiler sees to short ones, the pragma to others.

// N neighbouring elements as they lie in memory: one 16-byte (8 bf16, 4 fp32) or 8-byte (4 bf16) access. Kernels where fp32 sums
// lie beside bf16 values take 4 elements per lane: both sides of the access are then contiguous over the warp.
template <typename T, int N> struct __align__(N * sizeof(T)) Vec { uint32_t word[N * sizeof(T) / 4]; };

template <int N, typename T> __device__ __forceinline__ Vec<T, N> load(const T *p) {
    Vec<T, N> v;
    if constexpr (sizeof v == 16) { uint4 bits = load_16B(p); memcpy(&v, &bits, sizeof v); }
    else { uint2 bits = *(const uint2 *)p; memcpy(&v, &bits, sizeof v); }
    return v;
}
template <int N, typename T> __device__ __forceinline__ void store(T *p, const Vec<T, N> &v) {
    if constexpr (sizeof v == 16) store_16B(p, make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
    else *(uint2 *)p = make_uint2(v.word[0], v.word[1]);
}
template <int N, typename T> __device__ __forceinline__ Vec<T, N> load_if(bool condition, const T *p) {     // else zeros
    Vec<T, N> v = {};
    if (condition) v = load<N>(p);
    return v;
}
template <int N> __device__ __forceinline__ void widen(float (&x)[N], const Vec<float, N> &v) {
    for (int k = 0; k < N; k++) x[k] = __uint_as_float(v.word[k]);
}
template <int N> __device__ __forceinline__ void widen(float (&x)[N], const Vec<bf16, N> &v) {
    for (int k = 0; k < N; k += 2) {
        x[k] = __uint_as_float(v.word[k / 2] << 16);
        x[k + 1] = __uint_as_float(v.word[k / 2] & 0xFFFF0000u);
    }
}
template <typename T, int N> __device__ __forceinline__ Vec<T, N> narrow(const float (&x)[N]) {     // rounds to nearest even
    Vec<T, N> v;
    if constexpr (sizeof(T) == 4) for (int k = 0; k < N; k++) v.word[k] = __float_as_uint(x[k]);
    else for (int k = 0; k < N; k += 2) v.word[k / 2] = pack_bf16(x[k], x[k + 1]);
    return v;
}

template <int N, typename T> __device__ __forceinline__ void accumulate(float (&sum)[N], const T *p) {  // sum += p[0..N-1]
    float x[N];
    widen(x, load<N>(p));
    for (int k = 0; k < N; k++) sum[k] += x[k];
}

// Hides from the compiler where the bits of a row came from. Else it keeps the fp32 copies that a first pass over the row made,
// twice the registers of the bf16 values, for the second pass after the reduction.
template <typename T, int N, int n> __device__ __forceinline__ void keep_packed(Vec<T, N> (&row)[n]) {
    for (int j = 0; j < n; j++) for (uint32_t &word : row[j].word) asm volatile("" : "+r"(word));
}

enum { MAX_PARTIALS = 264 };        // blocks that write partial sums, a row of `scratch` each: two per SM of an H100

static int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// Blocks for kernels that keep partial sums in registers over many rows: each handles about two groups of `rows` rows or more.
static int partial_blocks(int N, int rows) {
    static int sm_count = device_attribute(cudaDevAttrMultiProcessorCount);
    return min(CEIL_DIV(N, 2 * rows), min(2 * sm_count, (int)MAX_PARTIALS));
}

// out (cols) += column sums of x (rows, stride)       one warp row of 32 columns, 32 warps share out the rows
__global__ void column_sums_kernel1(float *out, const float *x, int rows, int cols, int stride) {
    __shared__ float part[32][32];
    const int c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (c < cols) for (int r = threadIdx.y; r < rows; r += 32) sum += x[(size_t)r * stride + c];
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= cols) return;
    float total = 0;
    for (int w = 0; w < 32; w++) total += part[w][threadIdx.x];
    out[c] += total;
}

void column_sums(float *out, const float *x, int rows, int cols, int stride) {
    launch(column_sums_kernel1, CEIL_DIV(cols, 32), dim3(32, 32), 0, gpu.stream, out, x, rows, cols, stride);
}

// Sum over the threads with this threadIdx.y (whole warps); all of them get it. The one barrier inside is enough if calls
// alternate `turn` between 0 and 1: a warp can be at most one call ahead of another.
__device__ __forceinline__ float row_sum(float x, int turn) {
    __shared__ float part[2][32];
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32, first = threadIdx.y * warps;
    x = warp_sum(x);
    if (lane == 0) part[turn][first + threadIdx.x / 32] = x;
    __syncthreads();
    return warps == 1 ? x : warp_sum(lane < warps ? part[turn][first + lane] : 0);
}

// ---- embedding_forward_kernel1: rows in the order of their tokens -----------------------------------------------------------
// x (N,C) = w[ids]     w (V,C), ids (N), order (N): the rows sorted by token
// bytes   2·N·C out + 2·C per distinct token in;  N 16384, C 2048, 4000 distinct: 83 MB       floor 25 us (memory)
// idea    a warp has 32 neighbours of the order and 512 columns, and keeps the token's columns in registers until the token
//         changes: a comma that is 5% of the rows is read 26 times, not 800
// limits  C % 8 == 0 in bf16, C % 4 == 0 in fp32
enum { EMBED_WARPS = 8, EMBED_QUADS = 4, EMBED_COLUMNS = EMBED_QUADS * 128, EMBED_RUN = 32 };

template <typename X>
__global__ void embedding_forward_kernel1(X *__restrict__ x, const int *ids, const int *order, const X *__restrict__ w,
                                          int N, int C) {
    constexpr int E = 16 / sizeof(X), STEP = 32 * E, PACKS = EMBED_COLUMNS / STEP;
    const int c0 = blockIdx.y * EMBED_COLUMNS + threadIdx.x * E;
    const int first = (blockIdx.x * EMBED_WARPS + threadIdx.y) * EMBED_RUN, last = min(first + EMBED_RUN, N);
    Vec<X, E> row[PACKS] = {};
    for (int j = first, held = -1; j < last; j++) {
        const int n = order[j], token = ids[n];
        if (token != held) {
            held = token;
            for (int i = 0; i < PACKS; i++) row[i] = load_if<E>(c0 + i * STEP < C, w + (size_t)token * C + c0 + i * STEP);
        }
        for (int i = 0; i < PACKS; i++) if (c0 + i * STEP < C) store(x + (size_t)n * C + c0 + i * STEP, row[i]);
    }
}

template <typename X>
void embedding_forward(X *x, const int *ids, const int *order, const X *w, int N, int C) {
    assert(C % (16 / sizeof(X)) == 0);
    const dim3 grid(CEIL_DIV(N, EMBED_WARPS * EMBED_RUN), CEIL_DIV(C, EMBED_COLUMNS));
    launch(embedding_forward_kernel1<X>, grid, dim3(32, EMBED_WARPS), 0, gpu.stream, x, ids, order, w, N, C);
}

// ---- embedding_backward_kernel1: the rows of a token are one sum ----------------------------------------------------------
// dw (Vp,C) += for each token the sum of its rows of dx (N,C): rows order[starts[i]] .. order[starts[i+1]-1] have token tokens[i]
// bytes   2·N·C in + 8·C per distinct token (dw read and written);  N 16384, C 2048, 4000 distinct: 133 MB     floor 40 us
// idea    rows sorted by token on the host: every row of dw has one writer, no atomics. A warp owns a token and 512 columns;
//         tokens with more than LONG rows (a comma can be 5% of a batch) are summed by all warps of the block together
// limits  C % 4 == 0
enum { EMBED_LONG = 16 };

template <typename X>
__device__ __forceinline__ void add_rows(float (&sum)[EMBED_QUADS][4], const X *dx, const int *order, int first, int last,
                                         int step, int c0, int C) {
    for (int q = 0; q < EMBED_QUADS; q++) for (int k = 0; k < 4; k++) sum[q][k] = 0;
    #pragma unroll 2
    for (int j = first; j < last; j += step) {
        const X *dx_n = dx + (size_t)order[j] * C;
        for (int q = 0; q < EMBED_QUADS; q++) if (c0 + q * 128 < C) accumulate(sum[q], dx_n + c0 + q * 128);
    }
}

template <typename X>
__global__ void embedding_backward_kernel1(float *dw, const int *order, const int *starts, const int *tokens, int n_distinct,
                                           const X *dx, int C) {
    __shared__ int first[EMBED_WARPS + 1];                      // rows first[i] .. first[i+1]-1 are those of the block's token i
    __shared__ __align__(16) float part[EMBED_WARPS][EMBED_QUADS][32][4];
    const int lane = threadIdx.x, warp = threadIdx.y, token0 = blockIdx.x * EMBED_WARPS;
    const int c0 = blockIdx.y * EMBED_COLUMNS + lane * 4;
    if (warp == 0 && lane <= EMBED_WARPS) first[lane] = starts[token0 + lane < n_distinct ? token0 + lane : n_distinct];
    __syncthreads();
    float sum[EMBED_QUADS][4];
    int rows = first[warp + 1] - first[warp];
    if (rows > 0 && rows <= EMBED_LONG) {
        float *dw_i = dw + (size_t)tokens[token0 + warp] * C;
        add_rows(sum, dx, order, first[warp], first[warp + 1], 1, c0, C);
        for (int q = 0; q < EMBED_QUADS; q++) {
            if (c0 + q * 128 >= C) continue;
            accumulate(sum[q], dw_i + c0 + q * 128);
            store(dw_i + c0 + q * 128, narrow<float>(sum[q]));
        }
    }
    for (int i = 0; i < EMBED_WARPS; i++) {
        if (first[i + 1] - first[i] <= EMBED_LONG) continue;    // the same for the whole block
        add_rows(sum, dx, order, first[i] + warp, first[i + 1], EMBED_WARPS, c0, C);
        for (int q = 0; q < EMBED_QUADS; q++) store(part[warp][q][lane], narrow<float>(sum[q]));
        __syncthreads();
        int c = c0 + warp * 128;
        if (warp < EMBED_QUADS && c < C) {
            float *dw_i = dw + (size_t)tokens[token0 + i] * C + c, total[4] = {};
            for (int w = 0; w < EMBED_WARPS; w++) accumulate(total, part[w][warp][lane]);
            accumulate(total, dw_i);
            store(dw_i, narrow<float>(total));
        }
        __syncthreads();
    }
}

template <typename X>
void embedding_backward(float *dw, const int *order, const int *starts, const int *tokens, int n_distinct, const X *dx,
                        int N, int C) {
    assert(C % 4 == 0 && n_distinct > 0 && n_distinct <= N);
    const dim3 grid(CEIL_DIV(n_distinct, EMBED_WARPS), CEIL_DIV(C, EMBED_COLUMNS));
    launch(embedding_backward_kernel1<X>, grid, dim3(32, EMBED_WARPS), 0, gpu.stream, dw, order, starts, tokens, n_distinct, dx, C);
}

// ---- rmsnorm_forward_kernel1: the row stays in registers --------------------------------------------------------------------
// out (N,C) = x_c r w_c,  rstd (N) = r = (mean_c x_c^2 + eps)^(-1/2)      (Zhang & Sennrich 2019)
// bytes   2·N·C in + 2·N·C out = 134 MB for N 16384, C 2048        floor 40 us (memory). x already holds the residual sum:
//         the product before it has added it (matmul_forward's `add`), for one read of x there and none here
// idea    a row is read once and kept as bf16 in registers (4 packs per thread); w is copied once per block to shared memory,
//         asynchronously under the first rows, and serves at least 8 rows
// limits  C % 8 == 0 (fp32: C % 4 == 0), C <= 16384 (1024 threads x 4 packs of fp32)
enum { ROW_PACKS = 4, ROW_THREADS = 512 };

template <typename X>
__global__ void __launch_bounds__(1024) rmsnorm_forward_kernel1(X *out, float *rstd, const X *x, const X *w, float eps,
                                                                int N, int C) {
    constexpr int E = 16 / sizeof(X), STEP = 32 * E;            // a warp has ROW_PACKS * STEP columns next to each other
    X *w_shared = shared_memory<X>();                           // (C)
    const int c0 = threadIdx.x / 32 * ROW_PACKS * STEP + threadIdx.x % 32 * E;
    for (int c = thread_in_block() * E; c < C; c += threads_in_block() * E) cp_async_16(w_shared + c, w + c);
    cp_async_commit();
    int turn = 0;
    for (int n0 = blockIdx.x * blockDim.y; n0 < N; n0 += gridDim.x * blockDim.y, turn ^= 1) {
        const int n = n0 + threadIdx.y, end = n < N ? C : 0;
        const size_t at = (size_t)n * C + c0;
        Vec<X, E> row[ROW_PACKS];
        for (int j = 0; j < ROW_PACKS; j++) row[j] = load_if<E>(c0 + j * STEP < end, x + at + j * STEP);
        float squares = 0;
        #pragma unroll
        for (int j = 0; j < ROW_PACKS; j++) {
            float a[E];
            widen(a, row[j]);
            for (int k = 0; k < E; k++) squares += a[k] * a[k];
        }
        keep_packed(row);
        cp_async_wait<0>();                                     // w is visible after the barrier in row_sum
        const float r = rsqrtf(row_sum(squares, turn) / C + eps);
        if (threadIdx.x == 0 && n < N) rstd[n] = r;
        #pragma unroll
        for (int j = 0; j < ROW_PACKS; j++) {
            if (c0 + j * STEP >= end) continue;
            float a[E], w_j[E];
            widen(a, row[j]);
            widen(w_j, load<E>(w_shared + c0 + j * STEP));
            for (int k = 0; k < E; k++) a[k] = a[k] * r * w_j[k];     // in this order in rmsnorm_backward too: the same bits
            store(out + at + j * STEP, narrow<X>(a));
        }
    }
}

template <typename X>
void rmsnorm_forward(X *out, float *rstd, const X *x, const X *w, float eps, int N, int C) {
    const int E = 16 / sizeof(X), threads = CEIL_DIV(C, 32 * ROW_PACKS * E) * 32;
    const int rows = max(ROW_THREADS / threads, 1), turns = CEIL_DIV(8, rows);
    assert(C % E == 0 && threads <= 1024);
    launch(rmsnorm_forward_kernel1<X>, CEIL_DIV(N, rows * turns), dim3(threads, rows), C * sizeof(X), gpu.stream,
           out, rstd, x, w, eps, N, C);
}

// ---- rmsnorm_backward_kernel1: dout, x and dx are read once ---------------------------------------------------------------
// With g_c = dout_c w_c and n_c = x_c r:   dx_c += r (g_c - n_c mean_j(g_j n_j))      dw_c += sum over rows of dout_c n_c
// dx (N,C) += (the residual path), dw (C) +=, norm_out (N,C) = n_c w_c (the forward's output again, for the weight gradient;
// or NULL)
// bytes   3·N·C in + 1·N·C (norm_out: 2·N·C) out, 2 bytes each = 268 MB (336 MB) for N 16384, C 2048   floor 80 us (100 us)
//         partial sums of dw: 264·C·4 bytes written, then read by column_sums: 2 x 2.2 MB
// idea    16 elements per thread of each operand stay in registers over the reduction. A thread adds its share of dw over all its
//         rows in shared memory (its own place: no barrier); the rows of a block are added there, the blocks by column_sums
// limits  C % 4 == 0, C <= 16384 (fp32 on devices with 99 KiB of shared memory per block: 12640)
enum { ROW_QUADS = 4 };

template <typename X>
__global__ void __launch_bounds__(1024) rmsnorm_backward_kernel1(X *dx, float *partials, X *norm_out, const X *dout, const X *x,
                                                                 const float *rstd, const X *w, int N, int C) {
    constexpr bool early = sizeof(X) == 2;                      // fp32 has no registers left to hold dx over the reduction
    constexpr int STEP = 32 * 4;                                // a warp has ROW_QUADS * STEP columns next to each other
    float *sums = shared_memory<float>(), *dw = sums + threadIdx.y * C;     // (blockDim.y,C): what this block's rows add to dw
    X *w_shared = (X *)(sums + blockDim.y * C);                 // (C)
    const int c0 = threadIdx.x / 32 * ROW_QUADS * STEP + threadIdx.x % 32 * 4;
    for (int c = thread_in_block() * 4; c < C; c += threads_in_block() * 4) store(w_shared + c, load<4>(w + c));
    for (int j = 0; j < ROW_QUADS; j++) if (c0 + j * STEP < C) store(dw + c0 + j * STEP, Vec<float, 4>{});
    __syncthreads();
    int turn = 0;
    for (int n0 = blockIdx.x * blockDim.y; n0 < N; n0 += gridDim.x * blockDim.y, turn ^= 1) {
        const int n = n0 + threadIdx.y, end = n < N ? C : 0;
        const size_t at = (size_t)n * C + c0;
        Vec<X, 4> dout_r[ROW_QUADS], x_r[ROW_QUADS], dx_r[ROW_QUADS];
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            dout_r[j] = load_if<4>(c0 + j * STEP < end, dout + at + j * STEP);
            x_r[j] = load_if<4>(c0 + j * STEP < end, x + at + j * STEP);
            if (early) dx_r[j] = load_if<4>(c0 + j * STEP < end, dx + at + j * STEP);
        }
        float gn = 0;
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            if (c0 + j * STEP >= end) continue;
            float d[4], v[4], w_j[4];
            widen(d, dout_r[j]);
            widen(v, x_r[j]);
            widen(w_j, load<4>(w_shared + c0 + j * STEP));
            for (int k = 0; k < 4; k++) gn += d[k] * w_j[k] * v[k];
        }
        keep_packed(dout_r);
        keep_packed(x_r);
        const float r = n < N ? rstd[n] : 0, mean = row_sum(gn, turn) * r / C;
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            if (c0 + j * STEP >= end) continue;
            if (!early) dx_r[j] = load<4>(dx + at + j * STEP);
            float d[4], v[4], w_j[4], dx_j[4], dw_j[4];
            widen(d, dout_r[j]);
            widen(v, x_r[j]);
            widen(w_j, load<4>(w_shared + c0 + j * STEP));
            widen(dx_j, dx_r[j]);
            widen(dw_j, load<4>(dw + c0 + j * STEP));
            for (int k = 0; k < 4; k++) {
                v[k] *= r;                                      // n_c
                dw_j[k] += d[k] * v[k];
                dx_j[k] += r * (d[k] * w_j[k] - v[k] * mean);
                v[k] *= w_j[k];
            }
            store(dw + c0 + j * STEP, narrow<float>(dw_j));
            store(dx + at + j * STEP, narrow<X>(dx_j));
            if (norm_out) store(norm_out + at + j * STEP, narrow<X>(v));
        }
    }
    __syncthreads();
    for (int c = thread_in_block() * 4; c < C; c += threads_in_block() * 4) {
        float total[4] = {};
        for (int y = 0; y < (int)blockDim.y; y++) accumulate(total, sums + y * C + c);
        store(partials + (size_t)blockIdx.x * C + c, narrow<float>(total));
    }
}

template <typename X>
void rmsnorm_backward(X *dx, float *dw, X *norm_out, const X *dout, const X *x, const float *rstd, const X *w,
                      int N, int C) {
    const int threads = CEIL_DIV(C, 32 * 4 * ROW_QUADS) * 32, rows = max(ROW_THREADS / threads, 1);
    const int blocks = partial_blocks(N, rows);
    assert(C % 4 == 0 && threads <= 1024);
    launch(rmsnorm_backward_kernel1<X>, blocks, dim3(threads, rows), C * (rows * sizeof(float) + sizeof(X)), gpu.stream,
           dx, gpu.scratch, norm_out, dout, x, rstd, w, N, C);
    column_sums(dw, gpu.scratch, blocks, C, C);
}

// ---- qk_norm_rope_forward_kernel1: one warp per row, angles in registers --------------------------------------------------
// The q and k heads y of qkv (N,(H+2K)D), in place:  qk_raw (N,(H+K)D) = y, qk_rstd (N,H+K) = r = (mean y^2 + eps)^(-1/2),
// y *= r w (w = q_norm or k_norm (D)); then the pair (y_i, y_{i+D/2}) turns by the angle of position n % T (cosine, sine
// (T,D/2)). q_norm NULL: no norm, qk_raw and qk_rstd are not written.
// bytes   2·N·(H+K)·D in + out + 4·N·D of angles (norm: + 2·N·(H+K)·D raw) = 160 MB for N 16384, H 16, K 2, D 128
//         floor 48 us
// idea    lane l of a head holds elements 4l..4l+3 of both halves, so that a pair meets in one lane and any D % 8 == 0 works
//         (D 104: 13 of 16 lanes). The angles of those elements are the same for every head: read once per row.
//         Norm weights are in shared memory, once per block
// limits  D % 8 == 0, D <= 256
enum { ROPE_WARPS = 8 };                                        // rows of a block

static int lanes_per_head(int D) {                              // a power of two, so that a head's sum is a butterfly
    int lanes = 1;
    while (lanes * 8 < D) lanes *= 2;
    assert(D % 8 == 0 && lanes <= 32);
    return lanes;
}

template <typename X, bool NORM>
__global__ void qk_norm_rope_forward_kernel1(X *qkv, X *qk_raw, float *qk_rstd, const X *q_norm, const X *k_norm,
                                              const float *cosine, const float *sine, float eps, int H, int K, int D, int lanes,
                                              int N, int T) {
    constexpr int AHEAD = NORM || sizeof(X) == 4 ? 2 : 4;       // heads that a lane reads at a time
    X *w_shared = shared_memory<X>();                           // (2,D) if NORM
    const int lane = threadIdx.x % 32, head = lane / lanes, heads = 32 / lanes, i = lane % lanes * 4, half = D / 2;
    const bool active = i < half;
    if (NORM) {
        for (int d = threadIdx.x * 4; d < 2 * D; d += blockDim.x * 4)
            store(w_shared + d, load<4>(d < D ? q_norm + d : k_norm + d - D));
        __syncthreads();
    }
    for (int n = blockIdx.x * ROPE_WARPS + threadIdx.x / 32; n < N; n += gridDim.x * ROPE_WARPS) {
        X *x = qkv + (size_t)n * (H + 2 * K) * D + i;
        const size_t angle = (size_t)(n % T) * half + i;
        float c[4], s[4];
        widen(c, load_if<4>(active, cosine + angle));
        widen(s, load_if<4>(active, sine + angle));
        for (int h0 = 0; h0 < H + K; h0 += AHEAD * heads) {
            Vec<X, 4> lo[AHEAD], hi[AHEAD];
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int h = h0 + u * heads + head;
                lo[u] = load_if<4>(active && h < H + K, x + h * D);
                hi[u] = load_if<4>(active && h < H + K, x + h * D + half);
            }
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int h = h0 + u * heads + head;
                const bool here = active && h < H + K;
                float a[4], b[4], w_lo[4], w_hi[4];
                widen(a, lo[u]);
                widen(b, hi[u]);
                if (NORM) {
                    float squares = 0;
                    for (int k = 0; k < 4; k++) squares += a[k] * a[k] + b[k] * b[k];
                    const float r = rsqrtf(warp_sum(squares, lanes) / D + eps);
                    if (here) {
                        const size_t at = (size_t)n * (H + K) + h;
                        const X *w = w_shared + (h < H ? 0 : D) + i;
                        store(qk_raw + at * D + i, lo[u]);
                        store(qk_raw + at * D + i + half, hi[u]);
                        if (i == 0) qk_rstd[at] = r;
                        widen(w_lo, load<4>(w));
                        widen(w_hi, load<4>(w + half));
                        for (int k = 0; k < 4; k++) a[k] *= r * w_lo[k], b[k] *= r * w_hi[k];
                    }
                }
                if (!here) continue;
                for (int k = 0; k < 4; k++) {
                    float turned = a[k] * c[k] - b[k] * s[k];
                    b[k] = b[k] * c[k] + a[k] * s[k];
                    a[k] = turned;
                }
                store(x + h * D, narrow<X>(a));
                store(x + h * D + half, narrow<X>(b));
            }
        }
    }
}

template <typename X>
void qk_norm_rope_forward(X *qkv, X *qk_raw, float *qk_rstd, const X *q_norm, const X *k_norm, const float *cosine,
                           const float *sine, float eps, int H, int K, int D, int N, int T) {
    launch(q_norm ? qk_norm_rope_forward_kernel1<X, true> : qk_norm_rope_forward_kernel1<X, false>, CEIL_DIV(N, ROPE_WARPS),
           32 * ROPE_WARPS, 2 * D * sizeof(X), gpu.stream, qkv, qk_raw, qk_rstd, q_norm, k_norm, cosine, sine, eps, H, K, D,
           lanes_per_head(D), N, T);
}

// ---- qk_norm_rope_backward_kernel1: the forward's layout, turned back -----------------------------------------------------
// dqkv (N,(H+2K)D) in place: gradients after the rotation become gradients before norm and rotation; v is not touched.
// e = dqkv turned by minus the angle;  without norm dqkv = e.  With norm, y = qk_raw, n_d = y_d r, g_d = e_d w_d:
//   dqkv_d = r (g_d - n_d mean_j(g_j n_j))        dq_norm, dk_norm (D) += sum over rows and heads of e_d n_d
// bytes   2·N·(H+K)·D in + out + 4·N·D of angles (norm: + 2·N·(H+K)·D raw) = 160 MB for N 16384, H 16, K 2, D 128
//         floor 48 us
// idea    as in the forward; a lane sees the same 8 elements of every head, so it keeps their weight gradients in registers
template <typename X, bool NORM>
__global__ void qk_norm_rope_backward_kernel1(X *dqkv, float *partials, const X *qk_raw, const float *qk_rstd, const X *q_norm,
                                               const X *k_norm, const float *cosine, const float *sine, int H, int K, int D,
                                               int lanes, int N, int T) {
    constexpr int AHEAD = NORM || sizeof(X) == 4 ? 2 : 4;       // heads that a lane reads at a time
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = lane / lanes, heads = 32 / lanes, i = lane % lanes * 4, half = D / 2;
    const bool active = i < half;
    float dw[4][4] = {};                                        // q: lower half, upper half; k: the same
    for (int n = blockIdx.x * ROPE_WARPS + warp; n < N; n += gridDim.x * ROPE_WARPS) {
        const size_t angle = (size_t)(n % T) * half + i;
        float c[4], s[4];
        widen(c, load_if<4>(active, cosine + angle));
        widen(s, load_if<4>(active, sine + angle));
        #pragma unroll
        for (int part = 0; part < 2; part++) {                  // q, k
            const int count = part == 0 ? H : K, first = part == 0 ? 0 : H;
            const size_t at = (size_t)n * (H + K) + first;
            X *dx = dqkv + ((size_t)n * (H + 2 * K) + first) * D + i;
            float w_lo[4], w_hi[4];
            if (NORM) widen(w_lo, load_if<4>(active, (part == 0 ? q_norm : k_norm) + i));
            if (NORM) widen(w_hi, load_if<4>(active, (part == 0 ? q_norm : k_norm) + half + i));
            for (int h0 = 0; h0 < count; h0 += AHEAD * heads) {
                Vec<X, 4> lo[AHEAD], hi[AHEAD], raw_lo[AHEAD], raw_hi[AHEAD];
                float rstd[AHEAD];
                #pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const int h = h0 + u * heads + head;
                    const bool here = active && h < count;
                    lo[u] = load_if<4>(here, dx + h * D);
                    hi[u] = load_if<4>(here, dx + h * D + half);
                    if (!NORM) continue;
                    raw_lo[u] = load_if<4>(here, qk_raw + (at + h) * D + i);
                    raw_hi[u] = load_if<4>(here, qk_raw + (at + h) * D + i + half);
                    rstd[u] = here ? qk_rstd[at + h] : 0;
                }
                #pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const int h = h0 + u * heads + head;
                    float a[4], b[4], norm_a[4], norm_b[4];
                    widen(a, lo[u]);
                    widen(b, hi[u]);
                    for (int k = 0; k < 4; k++) {
                        float turned = a[k] * c[k] + b[k] * s[k];
                        b[k] = b[k] * c[k] - a[k] * s[k];
                        a[k] = turned;
                    }
                    if (NORM) {
                        float gn = 0, r = rstd[u];
                        widen(norm_a, raw_lo[u]);
                        widen(norm_b, raw_hi[u]);
                        for (int k = 0; k < 4; k++) {
                            norm_a[k] *= r, norm_b[k] *= r;
                            dw[2 * part][k] += a[k] * norm_a[k], dw[2 * part + 1][k] += b[k] * norm_b[k];
                            a[k] *= w_lo[k], b[k] *= w_hi[k];
                            gn += a[k] * norm_a[k] + b[k] * norm_b[k];
                        }
                        const float mean = warp_sum(gn, lanes) / D;
                        for (int k = 0; k < 4; k++) a[k] = r * (a[k] - norm_a[k] * mean), b[k] = r * (b[k] - norm_b[k] * mean);
                    }
                    if (!active || h >= count) continue;
                    store(dx + h * D, narrow<X>(a));
                    store(dx + h * D + half, narrow<X>(b));
                }
            }
        }
    }
    if constexpr (NORM) {
        for (int q = 0; q < 4; q++) for (int k = 0; k < 4; k++)             // over the heads that the warp has at a time
            for (int offset = lanes; offset < 32; offset *= 2) dw[q][k] += __shfl_xor_sync(0xFFFFFFFFu, dw[q][k], offset);
        __shared__ __align__(16) float sums[ROPE_WARPS][4][128];
        if (active && head == 0) for (int q = 0; q < 4; q++) store(sums[warp][q] + i, narrow<float>(dw[q]));
        __syncthreads();
        for (int d = threadIdx.x; d < 4 * 128; d += blockDim.x) {
            if (d % 128 >= half) continue;
            float total = 0;
            for (int w = 0; w < ROPE_WARPS; w++) total += sums[w][d / 128][d % 128];
            partials[(size_t)blockIdx.x * 2 * D + d / 128 * half + d % 128] = total;
        }
    }
}

template <typename X>
void qk_norm_rope_backward(X *dqkv, float *dq_norm, float *dk_norm, const X *qk_raw, const float *qk_rstd, const X *q_norm,
                            const X *k_norm, const float *cosine, const float *sine, int H, int K, int D,
                            int N, int T) {
    const int lanes = lanes_per_head(D), blocks = q_norm ? partial_blocks(N, ROPE_WARPS) : CEIL_DIV(N, ROPE_WARPS);
    launch(q_norm ? qk_norm_rope_backward_kernel1<X, true> : qk_norm_rope_backward_kernel1<X, false>, blocks,
           32 * ROPE_WARPS, 0, gpu.stream, dqkv, gpu.scratch, qk_raw, qk_rstd, q_norm, k_norm, cosine, sine, H, K, D, lanes, N, T);
    if (!q_norm) return;
    column_sums(dq_norm, gpu.scratch, blocks, D, 2 * D);
    column_sums(dk_norm, gpu.scratch + D, blocks, D, 2 * D);
}

// ---- bias_backward_kernel1 -------------------------------------------------------------------------------------------------
// dbias (OC) += column sums of dqkv (N,OC)
// bytes   2·N·OC in + partial sums 2·4·chunks·OC;  N 16384, OC 2560: 84 + 1 MB        floor 25 us (memory)
// idea    a block sums 128 columns of a chunk of rows, a lane four columns; column_sums adds the chunks
enum { BIAS_WARPS = 8, BIAS_ROWS = 64 };                        // a chunk has about BIAS_ROWS rows or more

template <typename X> __global__ void bias_backward_kernel1(float *partials, const X *dqkv, int N, int OC) {
    __shared__ __align__(16) float part[BIAS_WARPS][32][4];
    const int c = (blockIdx.x * 32 + threadIdx.x) * 4;
    float sum[4] = {};
    #pragma unroll 8
    for (int n = blockIdx.y * BIAS_WARPS + threadIdx.y; c < OC && n < N; n += gridDim.y * BIAS_WARPS)
        accumulate(sum, dqkv + (size_t)n * OC + c);
    store(part[threadIdx.y][threadIdx.x], narrow<float>(sum));
    __syncthreads();
    if (threadIdx.y > 0 || c >= OC) return;
    for (int w = 1; w < BIAS_WARPS; w++) accumulate(sum, part[w][threadIdx.x]);
    store(partials + (size_t)blockIdx.y * OC + c, narrow<float>(sum));
}

template <typename X> void bias_backward(float *dbias, const X *dqkv, int N, int OC) {
    const int columns = CEIL_DIV(OC, 128), most = min(CEIL_DIV(4 * MAX_PARTIALS, columns), (int)MAX_PARTIALS);
    const int chunks = min(CEIL_DIV(N, BIAS_ROWS), most);               // `most` blocks fill the device
    assert(OC % 4 == 0);
    launch(bias_backward_kernel1<X>, dim3(columns, chunks), dim3(32, BIAS_WARPS), 0, gpu.stream, gpu.scratch, dqkv, N, OC);
    column_sums(dbias, gpu.scratch, chunks, OC, OC);
}

// ---- matmul: cuBLASLt ----------------------------------------------------------------------------------------------------
// cuBLASLt is column-major, so a row-major out (M,N) is its (N,M) matrix: out^T = op(b)^T op(a)^T. The algorithm of each shape is
// the first that the heuristic names, never the fastest of a trial: two runs multiply alike. Sums are fp32; TF32 is off.
enum { MAX_PLANS = 256 };
static const size_t LT_WORKSPACE = (size_t)32 << 20;    // what cuBLAS recommends for Hopper

typedef struct MatmulPlan {
    int M, N, K, trans_a, trans_b, in_bf16, out_bf16, has_bias;         // the key
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, out;
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;

static MatmulPlan matmul_plans[MAX_PLANS];
static int n_matmul_plans;

static cublasLtMatrixLayout_t matrix_layout(int bf16_type, int rows, int cols) {   // row-major (rows, cols), contiguous
    cublasLtMatrixLayout_t layout;
    cublasCheck(cublasLtMatrixLayoutCreate(&layout, bf16_type ? CUDA_R_16BF : CUDA_R_32F, (uint64_t)cols, (uint64_t)rows, cols));
    return layout;
}

static const MatmulPlan *matmul_plan(cublasLtHandle_t lt, const MatmulPlan *key) {
    for (int i = 0; i < n_matmul_plans; i++)
        if (!memcmp(&matmul_plans[i], key, offsetof(MatmulPlan, op))) return &matmul_plans[i];
    if (n_matmul_plans == MAX_PLANS) die("more than %d shapes of matrix products", MAX_PLANS);
    MatmulPlan *p = &matmul_plans[n_matmul_plans++];
    *p = *key;
    cublasLtMatmulPreference_t preference;
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
        cublasCheck(cublasLtMatmulDescSetAttribute(p->op, attribute, &value, sizeof value));
    };
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
    };
    cublasCheck(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, p->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, p->has_bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
    p->a = p->trans_a ? matrix_layout(p->in_bf16, p->K, p->M) : matrix_layout(p->in_bf16, p->M, p->K);
    p->b = p->trans_b ? matrix_layout(p->in_bf16, p->N, p->K) : matrix_layout(p->in_bf16, p->K, p->N);
    p->out = matrix_layout(p->out_bf16, p->M, p->N);
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, LT_WORKSPACE);
    // if it splits K: partial sums in fp32
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    for (cublasLtMatmulPreferenceAttributes_t operand : {
             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        prefer(operand, (uint32_t)16);                                  // what every one has; cuBLASLt would assume 256
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt, p->op, p->b, p->a, p->out, p->out, preference, 1, &found,
                                                           &n_found);
    if (status != CUBLAS_STATUS_SUCCESS || !n_found || found.state != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt has no algorithm for a matrix product of %d x %d x %d (cuBLAS status %d); choose sizes that are "
            "multiples of 8", p->M, p->N, p->K, (int)status);
    p->algo = found.algo;
    cublasLtMatmulPreferenceDestroy(preference);
    return p;
}

// A pointer to const T that the compiler does not deduce T from, so that a call may say NULL
template <typename T> using or_null = const std::common_type_t<T> *;

// out (M,N) = op(a) op(b) + add (M,N) + bias (N), each sum rounded once; add (may be out itself: +=) and bias may be NULL.
// a is (M,K), or (K,M) if trans_a; b is (K,N), or (N,K) if trans_b. Types: bf16 or float.
template <typename Out, typename In>
void matmul(Out *out, const In *a, int trans_a, const In *b, int trans_b, int M, int N, int K,
            or_null<Out> add, or_null<Out> bias) {
    const MatmulPlan key = {M, N, K, trans_a, trans_b, sizeof(In) == 2, sizeof(Out) == 2, bias != NULL};
    const MatmulPlan *p = matmul_plan(gpu.lt, &key);
    if (bias) cublasCheck(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    float alpha = 1, beta = add ? 1.0f : 0.0f;
    cublasCheck(cublasLtMatmul(gpu.lt, p->op, &alpha, b, p->b, a, p->a, &beta, add ? add : out, p->out, out, p->out, &p->algo,
                               gpu.workspace, LT_WORKSPACE, gpu.stream));
}

// out (N,OC) = x (N,C) w (OC,C)^T + add (N,OC) + bias (OC); add: the residual stream, or NULL; bias may be NULL
template <typename floatX>
void matmul_forward(floatX *out, const floatX *x, const floatX *w, int N, int C, int OC, or_null<floatX> add,
                    or_null<floatX> bias) {
    matmul(out, x, 0, w, 1, N, OC, C, add, bias);
}

// dx (N,C) = dout (N,OC) w (OC,C)
template <typename floatX>
void matmul_backward_x(floatX *dx, const floatX *dout, const floatX *w, int N, int C, int OC) {
    matmul(dx, dout, 0, w, 0, N, C, OC, NULL, NULL);
}

// dw (OC,C), fp32 += dout (N,OC)^T x (N,C)
template <typename floatX>
void matmul_backward_w(float *dw, const floatX *dout, const floatX *x, int N, int C, int OC) {
    matmul(dw, dout, 1, x, 0, OC, C, N, dw, NULL);
}

// ---- causal attention with grouped heads, O(T) memory (Dao et al. 2022; Dao 2023) -----------------------------------------
// out_t = sum_s p_ts v_s,  p_ts = exp(q_t k_s / sqrt(D) - lse_t) for doc_start_t <= s <= t.  H/K query heads share a k/v head.
//
// One warp owns 16*MT rows of a score tile and sees all of its columns, so a row's maximum and sum never leave four lanes,
// and the accumulators of one matrix product are, lane for lane, the left operand of the next: scores become probabilities
// and are multiplied by V without touching shared memory. mma.m16n8k16 holds D[g][2t,2t+1] and D[g+8][2t,2t+1] in lane 4g+t.
//
// Tiles lie in shared memory as rows of WIDTH + 8 bf16, D padded with zeros to WIDTH. A row is then an odd number of 16-byte
// units, so the 8 rows that ldmatrix reads at a time fall on 8 different bank groups: no conflicts, and no index arithmetic.
enum { ATT_THREADS = 128, ATT_WARPS = 4 };

// Starts copying rows of D elements, `stride` apart in memory, to a tile. Rows past `rows` and columns past D become zero:
// a zero adds nothing to a product, where stale bits (perhaps NaN) times a zero probability would.
template <int WIDTH, int ROWS, int THREADS = ATT_THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *src, size_t stride, int rows, int D) {
    constexpr int LANES = WIDTH > 64 ? 16 : WIDTH / 8, STEP = THREADS / LANES;      // 16 bytes per thread, LANES threads per row
    const int row = threadIdx.x / LANES, col = threadIdx.x % LANES * 8, valid = col < D ? 16 : 0;
    if (col >= WIDTH) return;
    src += row * stride + (valid ? col : 0);
    tile += row * (WIDTH + 8) + col;
    if (rows >= ROWS) {
        #pragma unroll
        for (int i = 0; i < ROWS; i += STEP, src += STEP * stride) cp_async_16(tile + i * (WIDTH + 8), src, valid);
    } else {
        #pragma unroll 1
        for (int i = 0; i < ROWS; i += STEP) {
            const bool inside = row + i < rows;
            cp_async_16(tile + i * (WIDTH + 8), inside ? src + i * stride : src - row * stride, inside ? valid : 0);
        }
    }
}

// s (16*MT, 8*NT) += a (16*MT, 16) b (16, 8*NT). B: this lane's row of b in shared memory, rows STRIDE apart; BY_COLUMNS: of b^T,
// whose rows are what mma wants of b, so that only the other case is transposed on the way.
template <int STRIDE, bool BY_COLUMNS, int MT, int NT>
__device__ __forceinline__ void multiply_step(float (&s)[MT][NT][4], const uint32_t (&a)[MT][4], const bf16 *B) {
    uint32_t b[4];
    #pragma unroll
    for (int n = 0; n < NT; n += 2) {
        if (BY_COLUMNS) ldmatrix_x4(b, B + n * 8 * STRIDE);
        else ldmatrix_x4_trans(b, B + n * 8);
        for (int m = 0; m < MT; m++) {
            mma_bf16(s[m][n], a[m], b);
            mma_bf16(s[m][n + 1], a[m], b + 2);
        }
    }
}

// s (16*MT, 8*NT) += A B^T: A holds this warp's 16*MT rows, B 8*NT rows, both WIDTH long in shared memory.
// UNROLL steps of 16 are scheduled together: more hide more latency, until fetching ahead costs registers that the sums need.
template <int WIDTH, int UNROLL, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&s)[MT][NT][4], const bf16 *A, const bf16 *B) {
    const int lane = threadIdx.x % 32;
    A += lane % 16 * (WIDTH + 8) + lane / 16 * 8;                           // 16 x 16: four 8 x 8 matrices, down then right
    B += (lane / 16 * 8 + lane % 8) * (WIDTH + 8) + lane / 8 % 2 * 8;       // 16 rows x 16: right, then down
    #pragma unroll UNROLL
    for (int k = 0; k < WIDTH; k += 16) {
        uint32_t a[MT][4];
        for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], A + m * 16 * (WIDTH + 8) + k);
        multiply_step<WIDTH + 8, true>(s, a, B + k);
    }
}

// s (16*MT, 8*NT) += A B: A holds this warp's 16*MT rows, DEPTH long, B DEPTH rows, WIDTH long, from this warp's first column on.
template <int DEPTH, int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply_columns(float (&s)[MT][NT][4], const bf16 *A, const bf16 *B) {
    const int lane = threadIdx.x % 32;
    A += lane % 16 * (DEPTH + 8) + lane / 16 * 8;
    B += lane % 16 * (WIDTH + 8) + lane / 16 * 8;
    #pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32_t a[MT][4];
        for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], A + m * 16 * (DEPTH + 8) + k);
        multiply_step<WIDTH + 8, false>(s, a, B + k * (WIDTH + 8));
    }
}

// o (16*MT, WIDTH) += bf16(p) (16*MT, 8*NT) B (8*NT, WIDTH): p in registers as multiply_rows left it, B in shared memory.
template <int WIDTH, int MT, int NT>
__device__ __forceinline__ void multiply_probabilities(float (&o)[MT][WIDTH / 8][4], const float (&p)[MT][NT][4],
                                                       const bf16 *B) {
    const int lane = threadIdx.x % 32;
    B += lane % 16 * (WIDTH + 8) + lane / 16 * 8;
    #pragma unroll
    for (int k = 0; k < NT; k += 2) {                                       // 16 columns of p, 16 rows of B
        uint32_t a[MT][4];
        for (int m = 0; m < MT; m++)
            for (int i = 0; i < 4; i++) a[m][i] = pack_bf16(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1]);
        multiply_step<WIDTH + 8, false>(o, a, B + k * 8 * (WIDTH + 8));
    }
}

template <int MT, int NT>
__device__ __forceinline__ void fill(float (&x)[MT][NT][4], float value) {
    #pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) x[i / 4 / NT][i / 4 % NT][i % 4] = value;
}

// tile (16*MT, 8*NT) = o * scale, rounded to bf16 once. The warp turns its fragments into rows in shared memory that only
// this warp still uses, so that what follows can move 16 bytes at a time.
template <int MT, int NT>
__device__ __forceinline__ void fragments_to_rows(bf16 *tile, const float (&o)[MT][NT][4], float scale) {
    const int lane = threadIdx.x % 32;
    __syncwarp();                                                           // the warp's last ldmatrix from the tile is over
    #pragma unroll
    for (int m = 0; m < MT; m++)
        for (int n = 0; n < NT; n++)
            for (int r = 0; r < 2; r++)
                *(uint32_t *)(tile + (m * 16 + r * 8 + lane / 4) * (8 * NT + 8) + n * 8 + lane % 4 * 2) =
                    pack_bf16(o[m][n][r * 2] * scale, o[m][n][r * 2 + 1] * scale);
    __syncwarp();
}

// The first `rows` of 16*MT rows and D columns of o * scale, to memory.
template <int WIDTH, int MT>
__device__ __forceinline__ void store_rows(bf16 *out, size_t stride, const float (&o)[MT][WIDTH / 8][4], float scale,
                                           bf16 *tile, int rows, int D) {
    const int lane = threadIdx.x % 32;
    fragments_to_rows(tile, o, scale);
    constexpr int LANES = WIDTH > 64 ? 16 : WIDTH / 8;
    const int col = lane % LANES * 8;
    if (col >= D) return;
    for (int row = lane / LANES; row < 16 * MT && row < rows; row += 32 / LANES)
        store_16B(out + row * stride + col, load_16B(tile + row * (WIDTH + 8) + col));
}

// Scores that the mask hides become -inf: query t sees keys first..t. The tile's corner is (t0, s0); its rows are queries,
// or keys if it lies ON_SIDE.
template <bool ON_SIDE, int MT, int NT>
__device__ __forceinline__ void mask_scores(float (&s)[MT][NT][4], int t0, int s0, const int *doc_start, int row0, int T) {
    const int lane = threadIdx.x % 32;
    auto row = [=](int i) { return i * 8 + lane / 4; };                     // of the lane's 2*MT rows and 2*NT columns
    auto col = [=](int i) { return i / 2 * 8 + lane % 4 * 2 + i % 2; };
    #pragma unroll
    for (int q = 0; q < 2 * (ON_SIDE ? NT : MT); q++) {                     // its queries: each looks up its document once
        const int t = t0 + (ON_SIDE ? col(q) : row(q)), first = doc_start ? doc_start[row0 + min(t, T - 1)] : 0;
        for (int k = 0; k < 2 * (ON_SIDE ? MT : NT); k++) {                 // its keys
            const int key = s0 + (ON_SIDE ? row(k) : col(k)), r = ON_SIDE ? k : q, c = ON_SIDE ? q : k;
            if (key > t || key < first) s[r / 2][c / 2][r % 2 * 2 + c % 2] = -INFINITY;
        }
    }
}

// The softmax of a row while its scores pass by tile after tile: p = 2^(c*score - base), sum = all p so far. Any base gives the
// same out = sum p v / sum p; only overflow asks for the maximum. So base moves only when a score exceeds it by 2^8, which is
// rare after the first tile, and then all that was summed shrinks. (p up to 2^8 costs nothing: bf16 and fp32 are floating.)
template <int MT> struct Softmax {
    float base[MT][2], sum[MT][2];      // rows lane/4 and lane/4 + 8 of each 16; sum: this lane's columns only, until finish()

    __device__ __forceinline__ void init() {
        for (int i = 0; i < MT * 2; i++) base[i / 2][i % 2] = -1e30f, sum[i / 2][i % 2] = 0;     // not -inf: -inf - -inf is NaN
    }
    // s: scores -> probabilities; o: what was accumulated so far. c = log2(e) / sqrt(D): one FFMA and one 2^x per score.
    template <int NT, int OT>
    __device__ __forceinline__ void update(float (&s)[MT][NT][4], float (&o)[MT][OT][4], float c) {
        float top[MT][2];
        bool move = false;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            for (int r = 0; r < 2; r++) {
                top[m][r] = -INFINITY;
                for (int n = 0; n < NT; n++) top[m][r] = fmaxf(top[m][r], fmaxf(s[m][n][r * 2], s[m][n][r * 2 + 1]));
                move |= top[m][r] * c > base[m][r] + 8;
            }
        if (__any_sync(~0u, move)) {
            #pragma unroll
            for (int m = 0; m < MT; m++)
                for (int r = 0; r < 2; r++) {
                    const float x = warp_max(top[m][r], 4);                 // the four lanes of a row agree on its base
                    const float higher = fmaxf(base[m][r], x * c), shrink = exp2_approx(base[m][r] - higher);
                    base[m][r] = higher;
                    sum[m][r] *= shrink;
                    for (int n = 0; n < OT; n++) o[m][n][r * 2] *= shrink, o[m][n][r * 2 + 1] *= shrink;
                }
        }
        #pragma unroll
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < 4; i++) {
                    s[m][n][i] = exp2_approx(s[m][n][i] * c - base[m][i / 2]);
                    sum[m][i / 2] += s[m][n][i];
                }
    }
    // sum becomes the whole row's, in every lane of the row, and o the means.
    template <int OT> __device__ __forceinline__ void finish(float (&o)[MT][OT][4]) {
        #pragma unroll
        for (int i = 0; i < MT * 2; i++) {
            float &x = sum[i / 2][i % 2];
            x = warp_sum(x, 4);
            const float inverse = 1 / x;
            for (int n = 0; n < OT; n++) o[i / 2][n][i % 2 * 2] *= inverse, o[i / 2][n][i % 2 * 2 + 1] *= inverse;
        }
    }
};

// ---- attention_forward_kernel1: a block has 128 queries of a head, a warp 32 of them and all of their keys ------------------
// out (N,HD) = softmax(q k^T / sqrt(D)) v,  lse (N,H) = log sum_s exp(q_t k_s / sqrt(D)) over s = first..t,
// first = doc_start (N) or 0
// bytes   2·N·(H+2K)·D in + 2·N·H·D + 4·N·H out = 152 MB: 45 us for N 16384, H 16, K 2, D 128.
//         K, V again per 128 queries, from L2: 1.1 GB
// FLOPs   2·N·(T+1)·H·D (two products) = 137 G at T 2048   floor 139 us (tensor; mma.sync: 224 us; 269 M exponentials: 72 us)
// idea    scores never leave registers: the accumulators of Q K^T are the left operand of P V. K and V take turns, one buffer
//         each: one lands while the other is used. 192 bytes of shared memory per mma, level with the 198 that mma.sync leaves
//         time for
// limits  D % 8 == 0, D <= 128 (widths 32, 64, 96, 112, 128), H % K == 0. At D 128 69,632 bytes of shared memory and 255
//         registers: two blocks per SM (one on sm_86, sm_89, sm_120)
template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS) attention_forward_kernel1(bf16 *__restrict__ out, float *__restrict__ lse,
        const bf16 *__restrict__ qkv, const int *__restrict__ doc_start, int T, int H, int K, int D, float c) {
    constexpr int MT = 2, ROWS = 16 * MT, QUERIES = ROWS * ATT_WARPS, KEYS = 64, STRIDE = WIDTH + 8;
    bf16 *q_tile = shared_memory<bf16>(), *k_tile = q_tile + QUERIES * STRIDE, *v_tile = k_tile + KEYS * STRIDE;
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;     // long rows first
    const int row0 = blockIdx.x / H * T, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row, lane = threadIdx.x % 32;
    // where the last of this warp's rows t..t+31 begins to look
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0;
    const int end = min(t0 + QUERIES, T), doc_first = doc_start ? doc_start[row0 + min(t, T - 1)] : 0;

    float s[MT][KEYS / 8][4], o[MT][WIDTH / 8][4] = {};
    Softmax<MT> softmax;
    softmax.init();
    int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;     // walks from tile to tile; v = k + K*D
    load_tile<WIDTH, QUERIES>(q_tile, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<WIDTH, KEYS>(k_tile, k, W, T - s0, D);
    cp_async_commit();
    for (; s0 < end; s0 += KEYS) {
        // K and V take turns: one is being computed with while the other lands.
        cp_async_wait<0>();
        __syncthreads();                                    // K is here, and every warp has left the previous V
        load_tile<WIDTH, KEYS>(v_tile, k + K * D, W, T - s0, D);
        cp_async_commit();
        k += (size_t)KEYS * W;
        const bool visible = s0 < t + ROWS && t < T && s0 + KEYS > doc_first;   // else above the diagonal or before its documents
        if (visible) {
            fill(s, 0);
            multiply_rows<WIDTH, WIDTH / 16>(s, q_tile + warp_row * STRIDE, k_tile);
        }
        cp_async_wait<0>();
        __syncthreads();                                    // V is here, and every warp has left K
        if (s0 + KEYS < end) load_tile<WIDTH, KEYS>(k_tile, k, W, T - s0 - KEYS, D);
        cp_async_commit();
        if (visible) {
            if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(s, t, s0, doc_start, row0, T);
            softmax.update(s, o, c);
            multiply_probabilities<WIDTH>(o, s, v_tile);
        }
    }
    softmax.finish(o);
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int row = t + i * 8 + lane / 4;
        const float log2_sum = softmax.base[i / 2][i % 2] + log2f(softmax.sum[i / 2][i % 2]);
        if (lane % 4 == 0 && row < T) lse[(size_t)(row0 + row) * H + h] = log2_sum * (float)M_LN2;
    }
    store_rows<WIDTH>(out + ((size_t)(row0 + t) * H + h) * D, (size_t)H * D, o, 1, q_tile + warp_row * STRIDE, T - t, D);
}

// ---- fp32: the formulas by plain loops; --precision bf16 is the fast one ------------------------------------------------
// One warp per row and head, the mask is the range of its loop. Lane l has elements 4l..4l+3 of every row of D, so a dot
// product is a sum over the warp. A block's warps have neighbouring rows of one head and find in L1 what others have read.
enum { F32_WARPS = 16 };

__device__ __forceinline__ void load_row(float (&x)[4], const float *row, int D) {          // zeros past D
    widen(x, load_if<4>((int)threadIdx.x * 4 < D, row + threadIdx.x * 4));
}
__device__ __forceinline__ void store_row(float *row, const float (&x)[4], int D) {
    if ((int)threadIdx.x * 4 < D) store(row + threadIdx.x * 4, narrow<float>(x));
}
__device__ __forceinline__ float dot(const float (&a)[4], const float (&b)[4]) {
    return warp_sum(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]);
}

// out (N,H*D) =, lse (N,H) =, the softmax running: when a larger score appears, what was summed shrinks
__global__ void attention_forward_f32_kernel1(float *__restrict__ out, float *__restrict__ lse,
        const float *__restrict__ qkv, const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    const int h = blockIdx.x % H, t = (gridDim.y - 1 - blockIdx.y) * F32_WARPS + threadIdx.y, W = (H + 2 * K) * D;
    if (t >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / H) * T, at = (row0 + t) * H + h;
    const float *k = qkv + row0 * W + (H + h / (H / K)) * D, *v = k + K * D;
    float q[4], k_s[4], v_s[4], o[4] = {}, top = -INFINITY, sum = 0;
    load_row(q, qkv + (row0 + t) * W + h * D, D);
    for (int s = doc_start ? doc_start[row0 + t] : 0; s <= t; s++) {
        load_row(k_s, k + (size_t)s * W, D);
        load_row(v_s, v + (size_t)s * W, D);
        const float score = dot(q, k_s) * scale, higher = fmaxf(top, score);
        const float shrink = expf(top - higher), p = expf(score - higher);
        top = higher;
        sum = sum * shrink + p;
        for (int j = 0; j < 4; j++) o[j] = o[j] * shrink + p * v_s[j];
    }
    for (int j = 0; j < 4; j++) o[j] /= sum;
    store_row(out + at * D, o, D);
    if (threadIdx.x == 0) lse[at] = top + logf(sum);
}

// f(std::integral_constant<int, WIDTH>()) with the narrowest compiled WIDTH that holds D
template <typename F> static void with_width(int D, F f) {
    if (D <= 32) f(std::integral_constant<int, 32>());
    else if (D <= 64) f(std::integral_constant<int, 64>());
    else if (D <= 96) f(std::integral_constant<int, 96>());
    else if (D <= 112) f(std::integral_constant<int, 112>());
    else f(std::integral_constant<int, 128>());
}

template <typename X>
void attention_forward(X *out, float *lse, const X *qkv, const int *doc_start, int B, int T, int H, int K, int D) {
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    if constexpr (sizeof(X) == 4)
        launch(attention_forward_f32_kernel1, dim3(B * H, CEIL_DIV(T, F32_WARPS)), dim3(32, F32_WARPS), 0, gpu.stream,
               out, lse, qkv, doc_start, T, H, K, D, (float)(1 / sqrt((double)D)));
    else with_width(D, [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        launch(attention_forward_kernel1<WIDTH>, dim3(B * H, CEIL_DIV(T, 128)), ATT_THREADS,
               (128 + 2 * 64) * (WIDTH + 8) * sizeof(X), gpu.stream,
               out, lse, qkv, doc_start, T, H, K, D, (float)(M_LOG2E / sqrt((double)D)));
    });
}

// ---- attention backward ------------------------------------------------------------------------------------------------------
// With P_ts = exp(scale q_t k_s - lse_t), delta_t = dout_t . out_t:
//   dv_s = sum_t P_ts dout_t      dS_ts = P_ts (dout_t v_s - delta_t)
//   dq_t = scale sum_s dS_ts k_s      dk_s = scale sum_t dS_ts q_t.     dqkv (N,(H+2K)D) =, each element written once.
// Two kernels and no atomics: dq runs first, owns whole rows of dout and out, and leaves delta for dk dv.

// ---- attention_backward_dq_kernel1: the walk of the forward, with P known from lse and dS in P's place ------------------------
// dq (in dqkv) =, delta (N,H) =
// bytes   2·N·(H+2K)·D + 4·N·H·D + 4·N·H in + 2·N·H·D + 4·N·H out = 287 MB: 86 us for N 16384, H 16, K 2, D 128.
//         K and V from L2: 1.1 GB
// FLOPs   3·N·(T+1)·H·D (three products) = 206 G at T 2048      floor 208 us (tensor; mma.sync: 336 us)
// idea    the product dO V^T starts from -delta, so dS needs no subtraction. It is the second time that Q K^T and dO V^T are
//         computed (7 products in all instead of 5): the price of sums without atomics
// limits  as the forward; 95,744 bytes at D 128: two blocks per SM on sm_90, one on sm_80
template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS, 2) attention_backward_dq_kernel1(bf16 *__restrict__ dqkv,
        float *__restrict__ delta, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv, const bf16 *__restrict__ out,
        const float *__restrict__ lse, const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    constexpr int MT = 2, NT = 4, ROWS = 16 * MT, QUERIES = ROWS * ATT_WARPS, KEYS = 8 * NT, STRIDE = WIDTH + 8;
    bf16 *q_tile = shared_memory<bf16>(), *do_tile = q_tile + QUERIES * STRIDE;
    bf16 *k_tiles = do_tile + QUERIES * STRIDE, *v_tile = k_tiles + 2 * KEYS * STRIDE;
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D, lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int row0 = blockIdx.x / H * T, end = min(t0 + QUERIES, T);
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0;
    const float c = scale * (float)M_LOG2E;

    int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;         // walks; v = k + K*D
    load_tile<WIDTH, QUERIES>(q_tile, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<WIDTH, QUERIES>(do_tile, dout + ((size_t)(row0 + t0) * H + h) * D, (size_t)H * D, T - t0, D);
    load_tile<WIDTH, KEYS>(k_tiles, k, W, T - s0, D);
    load_tile<WIDTH, KEYS>(v_tile, k + K * D, W, T - s0, D);
    cp_async_commit();
    float row_lse[MT][2], row_delta[MT][2], s[MT][NT][4], ds[MT][NT][4], dq[MT][WIDTH / 8][4] = {};
    cp_async_wait<0>();
    __syncthreads();                                        // dO is here
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {                      // the four lanes of a row share out its D
        const int row = t + i * 8 + lane / 4;
        const size_t at = (size_t)(row0 + row) * H + h;
        float sum = 0;
        for (int d = lane % 4 * 8; row < T && d < D; d += 32) {
            float a[8], b[8];
            widen(a, load<8>(do_tile + (warp_row + i * 8 + lane / 4) * STRIDE + d));
            widen(b, load<8>(out + at * D + d));
            for (int j = 0; j < 8; j++) sum += a[j] * b[j];
        }
        sum = warp_sum(sum, 4);
        row_delta[i / 2][i % 2] = sum;
        row_lse[i / 2][i % 2] = row < T ? lse[at] * (float)M_LOG2E : INFINITY;      // past the end p = 0
        if (lane % 4 == 0 && row < T) delta[at] = sum;
    }
    for (int buffer = 0; s0 < end; s0 += KEYS, buffer ^= 1) {
        const bf16 *k_tile = k_tiles + buffer * KEYS * STRIDE;
        const int next = s0 + KEYS;
        k += (size_t)KEYS * W;
        cp_async_wait<0>();
        __syncthreads();                                    // K, V are here; every warp has left the other K
        if (next < end) load_tile<WIDTH, KEYS>(k_tiles + (buffer ^ 1) * KEYS * STRIDE, k, W, T - next, D);
        cp_async_commit();
        const bool visible = s0 < t + ROWS && t < T && (!doc_start || s0 + KEYS > doc_start[row0 + t]);
        if (visible) {
            fill(s, 0);
            multiply_rows<WIDTH, 2>(s, q_tile + warp_row * STRIDE, k_tile);
            #pragma unroll
            for (int i = 0; i < MT * NT * 4; i++) ds[i / 4 / NT][i / 4 % NT][i % 4] = -row_delta[i / 4 / NT][i % 4 / 2];
            multiply_rows<WIDTH, 2>(ds, do_tile + warp_row * STRIDE, v_tile);
        }
        __syncthreads();                                    // every warp has left V
        if (next < end) load_tile<WIDTH, KEYS>(v_tile, k + K * D, W, T - next, D);
        cp_async_commit();
        if (visible) {
            if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(s, t, s0, doc_start, row0, T);
            #pragma unroll
            for (int m = 0; m < MT; m++)
                for (int n = 0; n < NT; n++)
                    for (int i = 0; i < 4; i++) ds[m][n][i] *= exp2_approx(s[m][n][i] * c - row_lse[m][i / 2]);
            multiply_probabilities<WIDTH>(dq, ds, k_tile);
        }
    }
    store_rows<WIDTH>(dqkv + (size_t)(row0 + t) * W + h * D, W, dq, scale, q_tile + warp_row * STRIDE, T - t, D);
}

// ---- attention_backward_dkdv_kernel1: a block has up to 128 keys and walks all queries that see them, head after head --------
// dk, dv (in dqkv) =: sums over the H/K query heads that share them, in that order
// bytes   2·N·(H+2K)·D + 2·N·H·D + 8·N·H in + 4·N·K·D out = 170 MB: 51 us for N 16384, H 16, K 2, D 128.
//         q and dO again per block, from L2
// FLOPs   4·N·(T+1)·H·D (four products) = 275 G at T 2048        floor 278 us (tensor; mma.sync: 448 us)
// idea    the score tile stands on its side, rows are keys: P^T and dS^T are left operands in registers, and no sum crosses
//         warps. A pair of warps shares 16*MT keys: one computes P and owns dV, the other computes dP and owns dK, so each holds
//         one accumulator of twice the rows, and an operand from shared memory serves twice the products: 227 bytes per mma at
//         D 128 instead of 348 with a warp for both (mma.sync leaves time for 198 on H100, 256 on A100). P crosses in fp32, so
//         that dS is rounded once, and a named barrier of the pair says when
// limits  as the forward. 147,200 bytes of shared memory at D 128 with 4 pairs; devices with less get 2 pairs and 100,096
template <int WIDTH, int PAIRS> struct DkdvTile {
    static constexpr int MT = WIDTH <= 64 ? 4 : 2, NT = WIDTH <= 64 ? 4 : 6;
    static constexpr int ROWS = 16 * MT, KEYS = ROWS * PAIRS, QUERIES = 8 * NT;
    static constexpr int THREADS = 64 * PAIRS, EXCHANGE = MT * NT * 32;     // float4s of a pair's P
    static constexpr int SMEM = (2 * KEYS + 4 * QUERIES) * (WIDTH + 8) * 2 + PAIRS * EXCHANGE * 16 + 4 * QUERIES * 4;
};

template <int WIDTH, int PAIRS>
__global__ void __launch_bounds__(64 * PAIRS, 4 / PAIRS) attention_backward_dkdv_kernel1(bf16 *__restrict__ dqkv,
        const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv, const float *__restrict__ lse,
        const float *__restrict__ delta, const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    typedef DkdvTile<WIDTH, PAIRS> Tile;
    constexpr int MT = Tile::MT, NT = Tile::NT, KEYS = Tile::KEYS, QUERIES = Tile::QUERIES, THREADS = Tile::THREADS;
    constexpr int STRIDE = WIDTH + 8;
    float4 *exchanges = shared_memory<float4>();
    float *stats = (float *)(exchanges + PAIRS * Tile::EXCHANGE);           // (2, 2, QUERIES): lse and delta of two tiles
    bf16 *k_tile = (bf16 *)(stats + 4 * QUERIES), *v_tile = k_tile + KEYS * STRIDE;
    bf16 *q_tiles = v_tile + KEYS * STRIDE, *do_tiles = q_tiles + 2 * QUERIES * STRIDE;
    const int kv = blockIdx.x % K, s0 = blockIdx.y * KEYS;                  // early keys have most queries
    const int W = (H + 2 * K) * D, lane = threadIdx.x % 32;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);                 // tells the compiler it is uniform: fewer registers
    const int pair = warp % PAIRS, owns_dk = warp / PAIRS;                  // with 4 pairs a pair is on one scheduler
    const int pair_row = pair * Tile::ROWS, key = s0 + pair_row, row0 = blockIdx.x / K * T;
    const float c = scale * (float)M_LOG2E;
    float4 *exchange = exchanges + pair * Tile::EXCHANGE + lane;
    bf16 *left = (owns_dk ? v_tile : k_tile) + pair_row * STRIDE;  // only this warp's

    // Queries that see this tile: from the diagonal to the last document that begins before the tile ends. Then the next head.
    const int t_first = s0 / QUERIES * QUERIES;
    int t_end = T;
    if (doc_start) {
        int seen = 0;
        for (int i = 0; t_first + i * QUERIES < T; i += THREADS) {
            const int t = t_first + (i + (int)threadIdx.x) * QUERIES;
            seen += __syncthreads_count(t < T && doc_start[row0 + t] < s0 + KEYS);
        }
        t_end = t_first + seen * QUERIES;
    }
    auto load_queries = [&](int h, int t, int buffer) {
        load_tile<WIDTH, QUERIES, THREADS>(q_tiles + buffer * QUERIES * STRIDE, qkv + (size_t)(row0 + t) * W + h * D, W,
                                           T - t, D);
        load_tile<WIDTH, QUERIES, THREADS>(do_tiles + buffer * QUERIES * STRIDE, dout + ((size_t)(row0 + t) * H + h) * D,
                                           (size_t)H * D, T - t, D);
        if (threadIdx.x >= 2 * QUERIES) return;
        const int row = t + (int)threadIdx.x % QUERIES;     // past the end all is zero, and then dv += 1 * 0, dS = 1 * (0 - 0)
        const float *stat = threadIdx.x < QUERIES ? lse : delta;
        cp_async_4(stats + buffer * 2 * QUERIES + threadIdx.x, row < T ? stat + (size_t)(row0 + row) * H + h : stat,
                   row < T ? 4 : 0);
    };

    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + kv) * D;
    load_tile<WIDTH, KEYS, THREADS>(k_tile, k, W, T - s0, D);
    load_tile<WIDTH, KEYS, THREADS>(v_tile, k + K * D, W, T - s0, D);
    int h = kv * (H / K), t = t_first;
    const int h_end = h + H / K;
    load_queries(h, t, 0);
    cp_async_commit();

    float sum[MT][WIDTH / 8][4] = {}, s[MT][NT][4];                              // of dV or dK; scores, or dP
    for (int buffer = 0; h < h_end; buffer ^= 1) {
        const float *lse_tile = stats + buffer * 2 * QUERIES, *delta_tile = lse_tile + QUERIES;
        cp_async_wait<0>();
        __syncthreads();                                                    // this tile is here, every warp has left the last one
        const bf16 *q_tile = q_tiles + buffer * QUERIES * STRIDE, *do_tile = do_tiles + buffer * QUERIES * STRIDE;
        const int t0 = t;
        t += QUERIES;
        if (t >= t_end) t = t_first, h++;
        if (h < h_end) load_queries(h, t, buffer ^ 1);
        cp_async_commit();
        if (t0 + QUERIES <= key || key >= T || (doc_start && doc_start[row0 + t0] >= key + Tile::ROWS))
            continue;                                                       // nothing to see
        #pragma unroll
        for (int n = 0; n < NT; n++) {                                      // dP starts from -delta
            const float2 two = *(const float2 *)(delta_tile + n * 8 + lane % 4 * 2);
            for (int m = 0; m < MT; m++)
                for (int j = 0; j < 4; j++) s[m][n][j] = !owns_dk ? 0 : j % 2 ? -two.y : -two.x;
        }
        multiply_rows<WIDTH, 1>(s, left, owns_dk ? do_tile : q_tile);
        if (!owns_dk) {
            if (t0 < key + Tile::ROWS - 1 || (doc_start && doc_start[row0 + min(t0 + QUERIES, T) - 1] > key))
                mask_scores<true>(s, t0, key, doc_start, row0, T);
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                const float2 two = *(const float2 *)(lse_tile + n * 8 + lane % 4 * 2);
                const float even = two.x * (float)M_LOG2E, odd = two.y * (float)M_LOG2E;
                for (int m = 0; m < MT; m++)
                    for (int j = 0; j < 4; j++) s[m][n][j] = exp2_approx(s[m][n][j] * c - (j % 2 ? odd : even));
            }
            #pragma unroll
            for (int i = 0; i < MT * NT; i++) store((float *)(exchange + i * 32), narrow<float>(s[i / NT][i % NT]));
            barrier_arrive(1 + pair, 64);
        } else {
            barrier_sync(1 + pair, 64);                                     // P is here
            #pragma unroll
            for (int i = 0; i < MT * NT; i++) {
                float p[4];
                widen(p, load<4>((const float *)(exchange + i * 32)));
                for (int j = 0; j < 4; j++) s[i / NT][i % NT][j] *= p[j];   // dS
            }
        }
        multiply_probabilities<WIDTH>(sum, s, owns_dk ? q_tile : do_tile);
    }
    bf16 *out = dqkv + (size_t)(row0 + key) * W + (H + kv + (owns_dk ? 0 : K)) * D;
    store_rows<WIDTH>(out, W, sum, owns_dk ? scale : 1, left, T - key, D);
}

// ---- fp32: a warp per query, then a warp per key ------------------------------------------------------------------------
__global__ void attention_backward_dq_f32_kernel1(float *__restrict__ dqkv, float *__restrict__ delta,
        const float *__restrict__ dout, const float *__restrict__ qkv, const float *__restrict__ out,
        const float *__restrict__ lse, const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    const int h = blockIdx.x % H, t = (gridDim.y - 1 - blockIdx.y) * F32_WARPS + threadIdx.y, W = (H + 2 * K) * D;
    if (t >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / H) * T, at = (row0 + t) * H + h;
    const float *k = qkv + row0 * W + (H + h / (H / K)) * D, *v = k + K * D;
    float q[4], dout_t[4], out_t[4], k_s[4], v_s[4], dq[4] = {};
    load_row(q, qkv + (row0 + t) * W + h * D, D);
    load_row(dout_t, dout + at * D, D);
    load_row(out_t, out + at * D, D);
    const float delta_t = dot(dout_t, out_t), lse_t = lse[at];
    for (int s = doc_start ? doc_start[row0 + t] : 0; s <= t; s++) {
        load_row(k_s, k + (size_t)s * W, D);
        load_row(v_s, v + (size_t)s * W, D);
        const float p = expf(dot(q, k_s) * scale - lse_t), ds = p * (dot(dout_t, v_s) - delta_t);
        for (int j = 0; j < 4; j++) dq[j] += ds * scale * k_s[j];
    }
    store_row(dqkv + (row0 + t) * W + h * D, dq, D);
    if (threadIdx.x == 0) delta[at] = delta_t;
}

__global__ void attention_backward_dkdv_f32_kernel1(float *__restrict__ dqkv, const float *__restrict__ dout,
        const float *__restrict__ qkv, const float *__restrict__ lse, const float *__restrict__ delta,
        const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    const int kv = blockIdx.x % K, s = blockIdx.y * F32_WARPS + threadIdx.y, W = (H + 2 * K) * D;
    if (s >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / K) * T, at_k = (row0 + s) * W + (H + kv) * D;
    float k[4], v[4], q_t[4], dout_t[4], dk[4] = {}, dv[4] = {};
    load_row(k, qkv + at_k, D);
    load_row(v, qkv + at_k + K * D, D);
    for (int h = kv * (H / K); h < (kv + 1) * (H / K); h++)
        for (int t = s; t < T && (!doc_start || doc_start[row0 + t] <= s); t++) {
            const size_t at = (row0 + t) * H + h;
            load_row(q_t, qkv + (row0 + t) * W + h * D, D);
            load_row(dout_t, dout + at * D, D);
            const float p = expf(dot(q_t, k) * scale - lse[at]), ds = p * (dot(dout_t, v) - delta[at]);
            for (int j = 0; j < 4; j++) dk[j] += ds * scale * q_t[j], dv[j] += p * dout_t[j];
        }
    store_row(dqkv + at_k, dk, D);
    store_row(dqkv + at_k + K * D, dv, D);
}

template <typename X>
void attention_backward(X *dqkv, const X *dout, const X *qkv, const X *out, const float *lse, const int *doc_start,
                        int B, int T, int H, int K, int D) {
    const float scale = (float)(1 / sqrt((double)D));
    float *delta = gpu.scratch;             // (N,H)
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    if constexpr (sizeof(X) == 4) {
        launch(attention_backward_dq_f32_kernel1, dim3(B * H, CEIL_DIV(T, F32_WARPS)), dim3(32, F32_WARPS), 0, gpu.stream,
               dqkv, delta, dout, qkv, out, lse, doc_start, T, H, K, D, scale);
        launch(attention_backward_dkdv_f32_kernel1, dim3(B * K, CEIL_DIV(T, F32_WARPS)), dim3(32, F32_WARPS), 0, gpu.stream,
               dqkv, dout, qkv, lse, delta, doc_start, T, H, K, D, scale);
    } else with_width(D, [&](auto width) {
        constexpr int WIDTH = decltype(width)::value, PAIRS = WIDTH <= 64 ? 2 : 4;
        static int smem_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        launch(attention_backward_dq_kernel1<WIDTH>, dim3(B * H, CEIL_DIV(T, 128)), ATT_THREADS,
               (2 * 128 + 3 * 32) * (WIDTH + 8) * sizeof(X), gpu.stream,
               dqkv, delta, dout, qkv, out, lse, doc_start, T, H, K, D, scale);
        const auto dkdv = [&](auto pairs) {
            typedef DkdvTile<WIDTH, decltype(pairs)::value> Tile;
            launch(attention_backward_dkdv_kernel1<WIDTH, decltype(pairs)::value>, dim3(B * K, CEIL_DIV(T, Tile::KEYS)),
                   Tile::THREADS, Tile::SMEM, gpu.stream, dqkv, dout, qkv, lse, delta, doc_start, T, H, K, D, scale);
        };
        if (DkdvTile<WIDTH, PAIRS>::SMEM <= smem_limit) dkdv(std::integral_constant<int, PAIRS>());
        else dkdv(std::integral_constant<int, 2>());
    });
}

// ---- MLP: h = silu(gate) up ---------------------------------------------------------------------------------------------------
// h (N,F) = silu(g) u,  silu(g) = g / (1 + e^-g),   gate_up (N,2F) = g | u = x (N,C) w (2F,C)^T      (Shazeer 2020)
// backward, with s = 1 / (1 + e^-g):  dg = dh u s (1 + g (1 - s)),  du = dh g s,  and h once more for the gradient of w_down.
// Two forms: passes of their own between cuBLASLt's products, or the epilogues of products of our own. See mlp_forward.
template <int E> __device__ __forceinline__ void swiglu(float (&u)[E], const float (&g)[E]) {                   // u becomes h
    for (int k = 0; k < E; k++) u[k] *= __fdividef(g[k], 1 + exp_approx(-g[k]));
}
// E columns in memory: g, u become dg, du, and h =; dh may be h
template <int E, typename X> __device__ __forceinline__ void swiglu_backward_pack(X *gate, X *up, X *h, const X *dh) {
    float g[E], u[E], d[E];
    widen(g, load<E>(gate));
    widen(u, load<E>(up));
    widen(d, load<E>(dh));
    for (int k = 0; k < E; k++) {
        const float s = __fdividef(1, 1 + exp_approx(-g[k])), silu = g[k] * s, dsilu = d[k] * u[k];
        u[k] *= silu;
        d[k] *= silu;
        g[k] = dsilu * s * (1 + g[k] * (1 - s));
    }
    store(h, narrow<X>(u));
    store(gate, narrow<X>(g));
    store(up, narrow<X>(d));
}

// ---- swiglu_forward_kernel1 ------------------------------------------------------------------------------------------------
// bytes   2·2·N·F in + 2·N·F out = 1.08 GB for N 16384, F 11008
//         floor 323 us (memory; two SFU operations per element: 98 us)
// idea    a block per row, so that no division finds the row; 16-byte packs
template <typename X> __global__ void swiglu_forward_kernel1(X *h, const X *gate_up, int F) {
    constexpr int E = 16 / sizeof(X);
    const X *g = gate_up + (size_t)blockIdx.x * 2 * F, *u = g + F;
    X *h_n = h + (size_t)blockIdx.x * F;
    for (int f = threadIdx.x * E; f < F; f += blockDim.x * E) {
        float g_f[E], u_f[E];
        widen(g_f, load<E>(g + f));
        widen(u_f, load<E>(u + f));
        swiglu(u_f, g_f);
        store(h_n + f, narrow<X>(u_f));
    }
}

template <typename X> void swiglu_forward(X *h, const X *gate_up, int N, int F) {
    const int E = 16 / sizeof(X);
    assert(F % E == 0);
    launch(swiglu_forward_kernel1<X>, N, min(CEIL_DIV(F, 32 * E) * 32, 256), 0, gpu.stream, h, gate_up, F);
}

// ---- swiglu_backward_kernel1 -----------------------------------------------------------------------------------------------
// gate_up (N,2F) becomes its gradient, h (N,F) =; dh (N,F) may be h
// bytes   2·3·N·F in + 2·3·N·F out = 2.16 GB for N 16384, F 11008       floor 646 us (memory)
template <typename X> __global__ void swiglu_backward_kernel1(X *gate_up, X *h, const X *dh, int F) {
    constexpr int E = 16 / sizeof(X);
    const size_t row = (size_t)blockIdx.x * F;
    X *gate = gate_up + 2 * row, *up = gate + F;
    for (int f = threadIdx.x * E; f < F; f += blockDim.x * E)
        swiglu_backward_pack<E>(gate + f, up + f, h + row + f, dh + row + f);
}

template <typename X> void swiglu_backward(X *gate_up, X *h, const X *dh, int N, int F) {
    const int E = 16 / sizeof(X);
    assert(F % E == 0);
    launch(swiglu_backward_kernel1<X>, N, min(CEIL_DIV(F, 32 * E) * 32, 256), 0, gpu.stream, gate_up, h, dh, F);
}

// ---- gate_up_swiglu_kernel1, swiglu_down_backward_kernel1: products with SwiGLU as their epilogue -----------------------------
// forward    gate_up (N,2F) = x (N,C) w (2F,C)^T,  h (N,F) = silu(gate) up; h may be NULL
// backward   dh = dx (N,C) w (C,F) stays on the chip; gate_up (N,2F) becomes its gradient, h (N,F) =
// bytes   forward 2·N·C + 4·C·F in, 2·3·N·F out; backward 2·N·C + 2·C·F + 4·N·F in, 2·3·N·F out:
//         of 2·5·N·F and 2·7·N·F with the passes above 4·N·F less each way (N 16384, F 11008: 1.44 GB less in all)
// FLOPs   4·N·C·F = 1.48 T forward, 2·N·C·F backward: 4.7 and 2.4 ms at the 312 TFLOP/s of an A100
// idea    a block of 4 warps owns 128 x 128 sums, a warp 64 x 64 of them in registers: 192 bytes of shared memory per mma, 64 of
//         them the copies', where an A100 leaves time for 256. Two stages of 32 columns are in flight (cp.async) while one is
//         used. A warp's 64 columns are 32 of gate and the same 32 of up, so that both meet in one warp. The numbers are rounded
//         where the passes round them
// limits  C % 8 == 0, F % 8 == 0; 61,440 bytes of shared memory: two blocks per SM on sm_80 and sm_90, one with 99 KiB
enum { MLP_ROWS = 128, MLP_COLS = 128, MLP_DEPTH = 32, MLP_STAGES = 3, MLP_STAGE = (MLP_ROWS + MLP_COLS) * (MLP_DEPTH + 8),
       MLP_WARP = 64, MLP_SMEM = MLP_STAGES * MLP_STAGE * 2, MLP_GROUP = 16 };

// The block's tile of (tile_rows, tile_cols). Blocks in flight have neighbouring numbers: 16 x 16 tiles at a time share what they
// read in L2.
__device__ __forceinline__ int2 mlp_tile(int tile_rows, int tile_cols) {
    const int first = blockIdx.x / (MLP_GROUP * tile_cols) * MLP_GROUP, height = min(tile_rows - first, (int)MLP_GROUP);
    const int i = blockIdx.x % (MLP_GROUP * tile_cols);
    return make_int2(first + i % height, i / height);
}

// load(i, stage) starts the copies of step i, multiply(stage) uses them.
template <typename Load, typename Multiply>
__device__ __forceinline__ void mlp_pipeline(int steps, bf16 *stages, Load load, Multiply multiply) {
    #pragma unroll
    for (int i = 0; i < MLP_STAGES - 1; i++) {
        if (i < steps) load(i, stages + i * MLP_STAGE);
        cp_async_commit();
    }
    for (int i = 0, now = 0, then = MLP_STAGES - 1; i < steps; i++) {
        cp_async_wait<MLP_STAGES - 2>();
        __syncthreads();                                    // step i is here, and every warp has left step i - 1
        if (i + MLP_STAGES - 1 < steps) load(i + MLP_STAGES - 1, stages + then * MLP_STAGE);
        cp_async_commit();
        multiply(stages + now * MLP_STAGE);
        now = now == MLP_STAGES - 1 ? 0 : now + 1;
        then = then == MLP_STAGES - 1 ? 0 : then + 1;
    }
    cp_async_wait<0>();
    __syncthreads();                                        // the stages are free
}

__global__ void __launch_bounds__(ATT_THREADS, 2) gate_up_swiglu_kernel1(bf16 *__restrict__ h,
        bf16 *__restrict__ gate_up, const bf16 *__restrict__ x, const bf16 *__restrict__ w, int N, int C, int F) {
    constexpr int HALF = MLP_WARP / 2, STRIDE = MLP_DEPTH + 8;
    bf16 *stages = shared_memory<bf16>();
    const int2 tile = mlp_tile(CEIL_DIV(N, MLP_ROWS), CEIL_DIV(F, MLP_COLS / 2));
    const int n0 = tile.x * MLP_ROWS, f0 = tile.y * (MLP_COLS / 2), lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 64 * MLP_WARP, warp_half = threadIdx.x / 32 % 2;     // warps 0 1 above 2 3
    float s[MLP_WARP / 16][MLP_WARP / 8][4] = {};
    // A thread copies 16 bytes of 8 rows: 4 of x; 1 each of 32 rows of gate, of up, the next 32 of gate, of up. Rows past the end
    // repeat the last: their sums are never stored.
    const int row = threadIdx.x / 4, col = threadIdx.x % 4 * 8;
    const bf16 *src[8];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        src[i] = x + (size_t)min(n0 + 32 * i + row, N - 1) * C + col;
        src[4 + i] = w + ((size_t)(i % 2) * F + min(f0 + i / 2 * HALF + row, F - 1)) * C + col;
    }
    auto load_stage = [&](int i, bf16 *stage) {
        const int valid = i * MLP_DEPTH + col < C ? 16 : 0;
        #pragma unroll
        for (int j = 0; j < 8; j++) cp_async_16(stage + (32 * j + row) * STRIDE + col, src[j] + i * MLP_DEPTH, valid);
    };
    mlp_pipeline(CEIL_DIV(C, MLP_DEPTH), stages, load_stage, [&](const bf16 *a) {
        multiply_rows<MLP_DEPTH, 2>(s, a + warp_row * STRIDE, a + (MLP_ROWS + warp_half * MLP_WARP) * STRIDE);
    });
    bf16 *rows = stages + threadIdx.x / 32 * MLP_WARP * (MLP_WARP + 8);
    fragments_to_rows(rows, s, 1);
    const int f = lane % 4 * 8, out_f = f0 + warp_half * HALF + f;
    if (out_f >= F) return;
    for (int r = lane / 8 + lane / 4 % 2 * 4; r < MLP_WARP && n0 + warp_row + r < N; r += 8) {     // rows 4 apart: other banks
        const size_t n = n0 + warp_row + r;
        const bf16 *at = rows + r * (MLP_WARP + 8) + f;
        const Vec<bf16, 8> gate = load<8>(at), up = load<8>(at + HALF);
        store(gate_up + n * 2 * F + out_f, gate);
        store(gate_up + n * 2 * F + F + out_f, up);
        if (!h) continue;
        float g[8], u[8];
        widen(g, gate);
        widen(u, up);
        swiglu(u, g);
        store(h + n * F + out_f, narrow<bf16>(u));
    }
}

__global__ void __launch_bounds__(ATT_THREADS, 2) swiglu_down_backward_kernel1(bf16 *__restrict__ gate_up,
        bf16 *__restrict__ h, const bf16 *__restrict__ dx, const bf16 *__restrict__ w, int N, int C, int F) {
    bf16 *stages = shared_memory<bf16>();
    const int2 tile = mlp_tile(CEIL_DIV(N, MLP_ROWS), CEIL_DIV(F, MLP_COLS));
    const int n0 = tile.x * MLP_ROWS, f0 = tile.y * MLP_COLS, lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 64 * MLP_WARP, warp_col = threadIdx.x / 32 % 2 * MLP_WARP;
    float s[MLP_WARP / 16][MLP_WARP / 8][4] = {};
    const int row = threadIdx.x / 4, col = threadIdx.x % 4 * 8, w_row = threadIdx.x / 16, w_col = threadIdx.x % 16 * 8;
    const bf16 *src[4], *w_src = w + (size_t)w_row * F + min(f0 + w_col, F - 8);
    for (int i = 0; i < 4; i++) src[i] = dx + (size_t)min(n0 + 32 * i + row, N - 1) * C + col;
    auto load_stage = [&](int i, bf16 *stage) {
        const int c = i * MLP_DEPTH;
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            cp_async_16(stage + (32 * j + row) * (MLP_DEPTH + 8) + col, src[j] + c, c + col < C ? 16 : 0);
            bf16 *w_tile = stage + MLP_ROWS * (MLP_DEPTH + 8) + (8 * j + w_row) * (MLP_COLS + 8) + w_col;
            cp_async_16(w_tile, w_src + (size_t)(c + 8 * j) * F, c + 8 * j + w_row < C ? 16 : 0);
        }
    };
    mlp_pipeline(CEIL_DIV(C, MLP_DEPTH), stages, load_stage, [&](const bf16 *a) {
        multiply_columns<MLP_DEPTH, MLP_COLS>(s, a + warp_row * (MLP_DEPTH + 8), a + MLP_ROWS * (MLP_DEPTH + 8) + warp_col);
    });
    bf16 *rows = stages + threadIdx.x / 32 * MLP_WARP * (MLP_WARP + 8);
    fragments_to_rows(rows, s, 1);
    const int f = lane % 8 * 8, out_f = f0 + warp_col + f;
    if (out_f >= F) return;
    for (int r = lane / 8; r < MLP_WARP && n0 + warp_row + r < N; r += 4) {
        const size_t n = n0 + warp_row + r;
        bf16 *gate = gate_up + n * 2 * F + out_f;
        swiglu_backward_pack<8>(gate, gate + F, h + n * F + out_f, rows + r * (MLP_WARP + 8) + f);
    }
}

// ---- the two forms, and which one a device gets -----------------------------------------------------------------
// gate_up (N,2F), h (N,F) = of x (N,C), w (2F,C); h may be NULL
template <typename floatX>
void mlp_forward_passes(floatX *h, floatX *gate_up, const floatX *x, const floatX *w, int N, int C, int F) {
    matmul_forward(gate_up, x, w, N, C, 2 * F, NULL, NULL);
    if (h) swiglu_forward(h, gate_up, N, F);
}
static void mlp_forward_products(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int N, int C, int F) {
    assert(C % 8 == 0 && F % 8 == 0);
    launch(gate_up_swiglu_kernel1, CEIL_DIV(N, MLP_ROWS) * CEIL_DIV(F, MLP_COLS / 2), ATT_THREADS, MLP_SMEM, gpu.stream,
           h, gate_up, x, w, N, C, F);
}

// gate_up (N,2F) becomes its gradient, h (N,F) =; dx (N,C) is the gradient of the MLP's output, w (C,F)
template <typename floatX>
void mlp_backward_passes(floatX *gate_up, floatX *h, const floatX *dx, const floatX *w, int N, int C, int F) {
    matmul_backward_x(h, dx, w, N, F, C);                   // dh, in h's place
    swiglu_backward(gate_up, h, (const floatX *)h, N, F);
}
static void mlp_backward_products(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int N, int C, int F) {
    assert(C % 8 == 0 && F % 8 == 0);
    launch(swiglu_down_backward_kernel1, CEIL_DIV(N, MLP_ROWS) * CEIL_DIV(F, MLP_COLS), ATT_THREADS, MLP_SMEM, gpu.stream,
           gate_up, h, dx, w, N, C, F);
}

// The bf16 kernels that differ between devices: by compute capability, the last row that is not above it. Products of our own
// run on mma.sync: all that 8.x and 12.x have, but 0.62 of the tensor cores' rate on 9.0, where cuBLASLt and a pass over its
// result are faster (dev/SPEED.md 6). --mlp overrides the table.
typedef void MlpForward(bf16 *, bf16 *, const bf16 *, const bf16 *, int, int, int);
typedef struct Kernels { int capability; MlpForward *mlp_forward, *mlp_backward; } Kernels;
static const Kernels kernel_table[] = {
    {80, mlp_forward_products, mlp_backward_products},
    {90, mlp_forward_passes<bf16>, mlp_backward_passes<bf16>},
    {120, mlp_forward_products, mlp_backward_products},
};
static Kernels kernels;

static void choose_kernels(int capability) {
    for (const Kernels &row : kernel_table) if (row.capability <= capability) kernels = row;
    if (opt.mlp == MLP_PASSES) kernels.mlp_forward = mlp_forward_passes<bf16>, kernels.mlp_backward = mlp_backward_passes<bf16>;
    if (opt.mlp == MLP_PRODUCTS) kernels.mlp_forward = mlp_forward_products, kernels.mlp_backward = mlp_backward_products;
}

// As mlp_forward_passes and mlp_backward_passes
static void mlp_forward(float *h, float *gate_up, const float *x, const float *w, int N, int C, int F) {
    mlp_forward_passes(h, gate_up, x, w, N, C, F);
}
static void mlp_forward(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int N, int C, int F) {
    kernels.mlp_forward(h, gate_up, x, w, N, C, F);
}
static void mlp_backward_gate_up(float *gate_up, float *h, const float *dx, const float *w, int N, int C, int F) {
    mlp_backward_passes(gate_up, h, dx, w, N, C, F);
}
static void mlp_backward_gate_up(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int N, int C, int F) {
    kernels.mlp_backward(gate_up, h, dx, w, N, C, F);
}

// ---- cross_entropy_kernel1: a block per row, the row stays in shared memory ------------------------------------------------
// nll (N) = log(sum_v e^x_v) - x_target, 0 where the target is IGNORED.  weight (N) = d objective / d nll of each row: the logits
// (N,Vp) become the objective's gradient weight (softmax - onehot), 0 where ignored; weight NULL: losses only.
// Columns V..Vp-1 are padding: no part of the softmax, gradient 0.
// bytes   2·N·Vp in + 2·N·Vp out = 2.10 GB for N 16384, V 32000
//         floor 626 us (memory; two SFU operations per element: 283 us)
// idea    asynchronous copies put the whole row in flight (64 KB for V 32000: three blocks per SM); each thread reads back only
//         what it copied and has its own maximum and sum, so the block meets at one barrier. It also orders the read of x_target
//         before any write. What does not fit (V 151,936: a quarter of the row) is read a second time, and the block, then
//         alone on its SM, has twice the threads
enum { CLASSIFIER_THREADS = 512 };

// Columns v.. of a row in fp32; padding becomes -inf: e^-inf = 0 is both its share of the sum and its gradient.
template <int E, typename X> __device__ __forceinline__ void load_logits(float (&x)[E], const X *row, int v, int V) {
    widen(x, load<E>(row + v));
    if (v + E > V) for (int k = 0; k < E; k++) if (v + k >= V) x[k] = -INFINITY;
}

template <typename X>
__global__ void __launch_bounds__(2 * CLASSIFIER_THREADS) cross_entropy_kernel1(float *nll, X *logits, const int *targets,
                                                                            const double *weight, int V, int Vp, int cached) {
    constexpr int E = 16 / sizeof(X);
    __shared__ float tops[32], sums[32];
    X *cache = shared_memory<X>(), *row = logits + (size_t)blockIdx.x * Vp;     // the first `cached` columns; the others in place
    const int target = targets[blockIdx.x], lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int first = threadIdx.x * E, step = blockDim.x * E;
    if (target == IGNORED) {
        if (threadIdx.x == 0) nll[blockIdx.x] = 0;
        if (weight) for (int v = first; v < Vp; v += step) store(row + v, Vec<X, E>{});
        return;
    }
    for (int v = first; v < cached; v += step) cp_async_16(cache + v, row + v);
    cp_async_commit();
    const float at_target = threadIdx.x == 0 ? to_float(row[target]) : 0;
    cp_async_wait<0>();
    float top = -FLT_MAX, sum = 0;                              // of this thread's columns: sum of e^(x - top)
    auto add = [&](const X *from, int v) {
        float x[E], higher = top;
        load_logits(x, from, v, V);
        for (int k = 0; k < E; k++) higher = fmaxf(higher, x[k]);
        sum *= exp_approx(top - higher);
        for (int k = 0; k < E; k++) sum += exp_approx(x[k] - higher);
        top = higher;
    };
    int v = first;
    for (; v < cached; v += step) add(cache, v);
    #pragma unroll 4
    for (; v < Vp; v += step) add(row, v);
    const float warp_top = warp_max(top), warp_total = warp_sum(sum * exp_approx(top - warp_top));
    if (lane == 0) tops[threadIdx.x / 32] = warp_top, sums[threadIdx.x / 32] = warp_total;
    __syncthreads();
    const float some_top = lane < warps ? tops[lane] : -FLT_MAX, row_top = warp_max(some_top);
    const float total = warp_sum(lane < warps ? sums[lane] * exp_approx(some_top - row_top) : 0);
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(total) + row_top - at_target;
    if (!weight) return;
    const float weight_n = (float)weight[blockIdx.x], factor = weight_n / total;
    auto differentiate = [&](const X *from, int v) {
        float x[E];
        load_logits(x, from, v, V);
        for (int k = 0; k < E; k++) x[k] = exp_approx(x[k] - row_top) * factor;
        if (v <= target && target < v + E) for (int k = 0; k < E; k++) if (v + k == target) x[k] -= weight_n;
        store(row + v, narrow<X>(x));
    };
    v = first;
    for (; v < cached; v += step) differentiate(cache, v);
    for (; v < Vp; v += step) differentiate(row, v);
}

template <typename X>
void cross_entropy(float *nll, X *logits, const int *targets, const double *weight, int N, int V, int Vp) {
    static int smem_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
    const int E = 16 / sizeof(X), cached = min(Vp, smem_limit / 16 * E);
    const int threads = min(CEIL_DIV(Vp, 32 * E) * 32, CLASSIFIER_THREADS * (cached < Vp ? 2 : 1));
    assert(Vp % E == 0 && V <= Vp);
    launch(cross_entropy_kernel1<X>, N, threads, cached * sizeof(X), gpu.stream, nll, logits, targets, weight, V, Vp, cached);
}

// ---- sum_of_squares_kernel1: global norm ---------------------------------------------------------------------------------
// out (1) += sum of x (n)^2, in double; not finite if any x is not (or beyond 1e19)
// bytes   4·n in;  1 G gradients: 4 GB, floor 1.2 ms (memory). 16 products are added in fp32, then in double
enum { SQUARES_BLOCKS = 1024, SQUARES_THREADS = 256 };

__global__ void sum_of_squares_kernel1(double *partials, const float *x, size_t n) {
    const size_t quads = n / 4, step = (size_t)gridDim.x * SQUARES_THREADS * 4;
    double sum = 0;
    for (size_t i0 = (size_t)blockIdx.x * SQUARES_THREADS * 4 + threadIdx.x; i0 < quads; i0 += step) {
        float squares = 0, q[4][4];
        for (int j = 0; j < 4; j++) widen(q[j], load_if<4>(i0 + j * SQUARES_THREADS < quads, x + 4 * (i0 + j * SQUARES_THREADS)));
        for (int j = 0; j < 4; j++) squares += (q[j][0] * q[j][0] + q[j][1] * q[j][1]) + (q[j][2] * q[j][2] + q[j][3] * q[j][3]);
        sum += squares;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

void sum_of_squares(double *out, const float *x, size_t n) {
    const int blocks = (int)min(CEIL_DIV(n, (size_t)SQUARES_THREADS * 16), (size_t)SQUARES_BLOCKS);
    assert(n % 4 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)gpu.scratch % 8 == 0);
    launch(sum_of_squares_kernel1, blocks, SQUARES_THREADS, 0, gpu.stream, (double *)gpu.scratch, x, n);
    add_sum(out, (const double *)gpu.scratch, NULL, blocks);
}

// ---- adamw_update_kernel1 ----------------------------------------------------------------------------------------------------
// AdamW (Loshchilov & Hutter 2019), decoupled decay:  g = grad gscale,  m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,
// master = master shrink - rate m / (sqrt(v vscale) + eps),
//     with shrink = 1 - lr decay, rate = lr / (1-b1^step), vscale = 1 / (1-b2^step).
// master, m, v (n) are updated, w (n) = master rounded to X (fp32: may be master itself). M = float or bf16 stores m and v; bf16
// ones are rounded at random with the bits of (key, first + i), i in the n: to the nearest, v would stand still where 1 - b2 is
// below half a unit in the last place.
// bytes   per parameter 4 (grad) + 8 (master) + 16 (m, v; bf16: 8) + 2 (w) = 30 (22);  1 G parameters: 9.0 ms (6.6 ms)
typedef struct AdamW { float b1, b2, eps, rate, vscale, shrink, gscale; uint32_t key; size_t first; } AdamW;

// x, finite, rounded to one of its two neighbours in bf16 by 16 random bits, with probabilities such that the mean is x.
__device__ __forceinline__ float round_bf16_randomly(float x, uint32_t random) {
    return __uint_as_float((__float_as_uint(x) + (random & 0xffff)) & 0xffff0000u);
}

// 32 random bits for element `index` of an update; the mixer is a 32-bit one by C. Wellons (hash-prospector).
__device__ __forceinline__ uint32_t update_bits(uint32_t key, uint64_t index) {
    uint32_t h = ((uint32_t)index ^ (uint32_t)(index >> 32) * 0x9E3779B9u) ^ key;
    h = (h ^ h >> 16) * 0x21F0AAADu;
    h = (h ^ h >> 15) * 0x735A2D97u;
    return h ^ h >> 15;
}

// Parameter i of the n. m and v come back as numbers that M holds exactly.
template <typename M>
__device__ __forceinline__ void adamw_step(float &p, float &m, float &v, float grad, const AdamW &a, size_t i) {
    const float g = grad * a.gscale;
    m = a.b1 * m + (1 - a.b1) * g;
    v = a.b2 * v + (1 - a.b2) * g * g;
    p = p * a.shrink - a.rate * m / (sqrtf(v * a.vscale) + a.eps);
    if constexpr (sizeof(M) == 2) {
        const uint32_t random = update_bits(a.key, a.first + i);
        m = round_bf16_randomly(m, random), v = round_bf16_randomly(v, random >> 16);
    }
}

template <typename X, typename M>
__global__ void adamw_update_kernel1(X *w, float *master, M *m, M *v, const float *grad, size_t n, AdamW a) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float g[4], p[4], m_i[4], v_i[4];
    widen(g, load<4>(grad + i));
    widen(p, load<4>(master + i));
    widen(m_i, load<4>(m + i));
    widen(v_i, load<4>(v + i));
    for (int k = 0; k < 4; k++) adamw_step<M>(p[k], m_i[k], v_i[k], g[k], a, i + k);
    store(master + i, narrow<float>(p));
    store(m + i, narrow<M>(m_i));
    store(v + i, narrow<M>(v_i));
    if ((const void *)w != (const void *)master) store(w + i, narrow<X>(p));
}

template <typename X, typename M>
void adamw_update(X *w, float *master, M *m, M *v, const float *grad, size_t n, double lr, double beta1, double beta2, double eps,
                  double decay, double grad_scale, int64_t step, uint32_t key, size_t first) {
    const AdamW a = {(float)beta1, (float)beta2, (float)eps, (float)(lr / (1 - pow(beta1, (double)step))),
                     (float)(1 / (1 - pow(beta2, (double)step))), (float)(1 - lr * decay), (float)grad_scale, key, first};
    assert(n % 4 == 0 && ((uintptr_t)master | (uintptr_t)grad) % 16 == 0 && (uintptr_t)w % (4 * sizeof(X)) == 0);
    assert(((uintptr_t)m | (uintptr_t)v) % (4 * sizeof(M)) == 0);
    launch(adamw_update_kernel1<X, M>, (unsigned)CEIL_DIV(n, 4 * 256), 256, 0, gpu.stream, w, master, m, v, grad, n, a);
}

// ==== 4. Model: layout, forward, head and loss, backward, update ===========================================
// ---- parameters: pointers into one unit of the weights or of the gradients, wherever the unit lies --------
template <typename T> struct LayerParams {
    T *norm1;               // (C)
    T *qkv;                 // ((H+2K)D, C)
    T *qkv_bias;            // ((H+2K)D)        Qwen2, else NULL
    T *q_norm, *k_norm;     // (D)              Qwen3, else NULL
    T *o;                   // (C, HD)
    T *norm2;               // (C)
    T *gate_up;             // (2F, C)
    T *down;                // (C, F)
};

// The tensor whose name ends so; NULL: this model has none
template <typename T> T *param(T *unit, const ParamTable *p, int u, const char *suffix) {
    const Tensor *t = table_find(p, u, suffix);
    return t ? unit + t->at : NULL;
}

template <typename T> LayerParams<T> layer_params(T *unit, const ParamTable *p, int l) {
    const int u = UNIT_LAYER + l;
    return {param(unit, p, u, "input_layernorm.weight"),
            param(unit, p, u, "q_proj.weight"), param(unit, p, u, "q_proj.bias"),
            param(unit, p, u, "q_norm.weight"), param(unit, p, u, "k_norm.weight"),
            param(unit, p, u, "o_proj.weight"), param(unit, p, u, "post_attention_layernorm.weight"),
            param(unit, p, u, "gate_proj.weight"), param(unit, p, u, "down_proj.weight")};
}

template <typename T> struct HeadParams {
    T *norm;                // (C)              the final norm
    T *head;                // (Vp, C)          the embedding once more, if they are tied
};

template <typename T> HeadParams<T> head_params(T *unit, T *embed, const ParamTable *p) {
    T *own = param(unit, p, p->n_units - 1, "lm_head.weight");
    return {unit, own ? own : embed};
}

// ---- activations ------------------------------------------------------------------------------------------
// What backward needs of one layer. With --recompute mlp gate_up, with block all but x, lie in one buffer
// that each layer reuses; without training all layers share one of each, and two of x.
template <typename floatX> struct LayerActs {
    floatX *x;                          // (N,C)        the layer's input
    float *rstd1, *rstd2;               // (N)
    floatX *qkv;                        // (N,(H+2K)D)  after norm and rotation
    floatX *qk_raw;                     // (N,(H+K)D)   Qwen3: before the head norm
    float *qk_rstd;                     // (N,H+K)
    floatX *att;                        // (N,HD)
    float *lse;                         // (N,H)
    floatX *x_mid;                      // (N,C)        after attention
    floatX *gate_up;                    // (N,2F)       backward overwrites it with its gradient
};

// A batch on the device, and its rows sorted by token.
typedef struct Feed {
    int B, T, n_distinct;
    int *inputs, *targets;              // (N)
    int *doc_start;                     // (N), NULL: one document
    int *order, *tokens, *starts;       // (N), (N), (N+1)      of sort_rows
} Feed;

typedef struct Arena { char *base; size_t used; } Arena;       // used: bytes

struct Model {                          // what does not depend on the precision
    Config c;
    ParamTable p;
    Plan plan;
    int B, T, N;                        // micro-step: N = B*T rows
    // rows of logits that exist at a time; N_chunks*chunk >= N rows of norm and nll
    int chunk, N_chunks;
    float *grads, *master;              // flat, (p.n); in fp32 the weights are their own master
    void *m, *v;                        // flat, float or bf16
    float *nll;                         // (N_chunks*chunk) loss of each target
    float *cosine, *sine;               // (T,D/2)
    double *sums;                       // (n_tensors + 1) on the device: loss, squares of gradients
    Feed feed;                          // the batch of the last llama_forward
    // (6N+1)       of a Feed's arrays: one after the other, the same on both
    int *feed_host, *feed_device;
    double *weight_host, *weight;       // (N)          of targets
    cudaEvent_t fed, weighed;           // the last copy of either has left the host
    Arena arena[N_ARENAS];
};

template <typename floatX> struct ModelOf : Model {
    floatX *weights;                    // flat, (p.n)
    LayerActs<floatX> *acts;            // (L)
    floatX *x_last;                     // (N,C)        input of the final norm
    float *rstd_last;                   // (N)
    floatX *norm;                       // (N,C)        a norm's output; rebuilt in backward
    floatX *dnorm;                      // (N,C)        gradient of a norm's output
    floatX *h;                          // (N,F)        SwiGLU's product
    floatX *dx;                         // (N,C)        gradient of the residual stream
    floatX *datt, *dqkv;                // (N,HD), (N,(H+2K)D)
    floatX *logits;                     // (chunk,Vp)
};

// f(m) with m of its precision
template <typename F> static void with_precision(const Model *m, F f) {
    if (m->plan.bf16) f((ModelOf<bf16> *)m);
    else f((ModelOf<float> *)m);
}

const ParamTable *model_table(const Model *m) { return &m->p; }
double model_bytes(const Model *m, int arena) { return (double)m->arena[arena].used; }

// Where unit u lies
template <typename floatX> static floatX *unit_weights(const ModelOf<floatX> *m, int u) {
    return m->weights + m->p.units[u].at;
}
static float *unit_grads(const Model *m, int u) { return m->grads + m->p.units[u].at; }
template <typename floatX> static HeadParams<floatX> head_weights(const ModelOf<floatX> *m) {
    return head_params(unit_weights(m, m->p.n_units - 1), unit_weights(m, UNIT_EMBED), &m->p);
}
static HeadParams<float> head_grads(const Model *m) {
    return head_params(unit_grads(m, m->p.n_units - 1), unit_grads(m, UNIT_EMBED), &m->p);
}

// The arenas are laid out by the same calls twice: first with base NULL to learn their sizes, then to hand
// out the pointers.
template <typename T> static void take(Arena *a, T **at, size_t n) {
    *at = a->base ? (T *)(a->base + a->used) : NULL;
    a->used += CEIL_DIV(n * sizeof(T), 256) * 256;
}

template <typename floatX>
static void layout_layer(ModelOf<floatX> *m, LayerActs<floatX> *y, Arena *a, int keep_block, int keep_mlp) {
    const Config *c = &m->c;
    const size_t N = m->N, HD = (size_t)c->H * c->D, KD = (size_t)c->K * c->D;
    if (keep_block) {
        take(a, &y->rstd1, N);
        take(a, &y->qkv, N * (HD + 2 * KD));
        if (c->qk_norm) take(a, &y->qk_raw, N * (HD + KD));
        if (c->qk_norm) take(a, &y->qk_rstd, N * (c->H + c->K));
        take(a, &y->att, N * HD);
        take(a, &y->lse, N * c->H);
        take(a, &y->x_mid, N * c->C);
        take(a, &y->rstd2, N);
    }
    if (keep_mlp) take(a, &y->gate_up, N * 2 * c->F);
}

template <typename floatX> static void layout(ModelOf<floatX> *m) {
    const Config *c = &m->c;
    const Plan *plan = &m->plan;
    const size_t n = m->p.n, N = m->N, padded = (size_t)m->chunk * m->N_chunks;
    const size_t HD = (size_t)c->H * c->D, KD = (size_t)c->K * c->D;
    take(&m->arena[ARENA_WEIGHTS], &m->weights, n);
    m->master = (float *)m->weights;
    if (plan->training) {
        const size_t state_bytes = n * (plan->bf16_state ? sizeof(bf16) : sizeof(float));
        take(&m->arena[ARENA_GRADIENTS], &m->grads, n);
        Arena *o = &m->arena[ARENA_OPTIMIZER];
        take(o, (char **)&m->m, state_bytes);
        take(o, (char **)&m->v, state_bytes);
        if (plan->bf16) take(o, &m->master, n);
    }
    Arena *a = &m->arena[ARENA_ACTIVATIONS];
    const int keep_block = plan->training && plan->recompute != RECOMPUTE_BLOCK;
    const int keep_mlp = plan->training && plan->recompute == RECOMPUTE_NONE;
    // what every layer writes again: laid out once, the rest per layer
    LayerActs<floatX> shared = {};
    layout_layer(m, &shared, a, !keep_block, !keep_mlp);
    for (int l = 0; l < c->L; l++) {
        LayerActs<floatX> *y = &m->acts[l];
        *y = shared;
        if (plan->training || l < 2) take(a, &y->x, N * c->C);
        else y->x = m->acts[l - 2].x;
        layout_layer(m, y, a, keep_block, keep_mlp);
    }
    take(a, &m->x_last, N * c->C);
    take(a, &m->rstd_last, N);
    Arena *w = &m->arena[ARENA_WORKSPACE];
    take(w, &m->norm, padded * c->C);
    take(w, &m->h, N * c->F);
    if (plan->training) {
        take(w, &m->dnorm, padded * c->C);
        take(w, &m->dx, N * c->C);
        take(w, &m->datt, N * HD);
        take(w, &m->dqkv, N * (HD + 2 * KD));
        take(w, &gpu.scratch, std::max({MAX_PARTIALS * (size_t)c->C, MAX_PARTIALS * (HD + 2 * KD),
                                        // the last: attention_backward's delta
                                        (size_t)2 * SQUARES_BLOCKS, N * c->H}));
    }
    take(w, &m->logits, (size_t)m->chunk * c->Vp);
    take(w, &m->cosine, (size_t)m->T * c->D / 2);
    take(w, &m->sine, (size_t)m->T * c->D / 2);
    take(w, &m->nll, padded);
    take(w, &m->weight, N);
    take(w, &m->sums, (size_t)m->p.n_tensors + 1);
    take(w, (char **)&gpu.workspace, LT_WORKSPACE);
    take(w, &m->feed_device, 6 * N + 1);
}

// Sizes only, no memory is taken: of every arena, and the table of the model.
Model *model_plan(const Config *c, const Plan *plan) {
    Model *m = (Model *)xcalloc(1, sizeof(ModelOf<float>));
    m->c = *c;
    m->plan = *plan;
    m->B = plan->B;
    m->T = plan->T;
    m->N = m->B * m->T;
    m->chunk = plan->chunk < m->N ? plan->chunk : m->N;
    m->N_chunks = CEIL_DIV(m->N, m->chunk);
    param_table_build(&m->p, c, plan->ranks);
    with_precision(m, [&](auto *m) {
        m->acts = (decltype(m->acts))xcalloc((size_t)c->L, sizeof *m->acts);
        layout(m);
    });
    return m;
}

// Takes the memory. Weights, m and v start as zeros: the padding of the vocabulary has no other value, ever;
// so do the sums. The rest is written before it is read, and is not cleared, so that tools which look for
// such reads see them.
void model_alloc(Model *m) {
    for (int i = 0; i < N_ARENAS; i++) {
        Arena *a = &m->arena[i];
        const size_t bytes = a->used;
        a->used = 0;
        if (!bytes) continue;
        if (cudaMalloc((void **)&a->base, bytes) != cudaSuccess)
            die("out of GPU memory for %.0f MiB of %s; use a smaller --batch-size or --logits-chunk, "
                "--recompute block, or --optimizer-dtype bf16", (double)bytes / 1048576, arena_names[i]);
        if (i == ARENA_WEIGHTS || i == ARENA_OPTIMIZER) cudaCheck(cudaMemset(a->base, 0, bytes));
    }
    with_precision(m, [](auto *m) { layout(m); });
    cudaCheck(cudaMemset(m->sums, 0, ((size_t)m->p.n_tensors + 1) * sizeof(double)));
    cudaCheck(cudaMallocHost((void **)&m->feed_host, ((size_t)6 * m->N + 1) * sizeof(int)));
    cudaCheck(cudaMallocHost((void **)&m->weight_host, (size_t)m->N * sizeof(double)));
    cudaCheck(cudaEventCreateWithFlags(&m->fed, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&m->weighed, cudaEventDisableTiming));
    rope_table(m->cosine, m->sine, &m->c, m->T);
    cudaCheck(cudaGetDevice(&gpu.number));
    if (!gpu.staging)
        cudaCheck(cudaMallocHost((void **)&gpu.staging, (size_t)IO_THREADS * IO_CHUNK * sizeof(float)));
}

// Frees what model_plan took; the GPU's memory goes with the process.
void model_free(Model *m) {
    with_precision(m, [](auto *m) { free(m->acts); });
    free(m->p.tensors);
    free(m->p.units);
    free(m);
}

// ---- weights and state ------------------------------------------------------------------------------------
// The part of unit u whose optimizer state this rank holds: its elements [*first, *first + *n).
void state_share(const Model *m, int u, size_t *first, size_t *n) {
    *first = 0;
    *n = m->p.units[u].n_padded;
}

// Threads convert at the same time, each in its part of gpu.staging; their copies take turns on gpu.stream,
// behind the kernels.
static void copy_staged(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    #pragma omp critical(copy_staged)
    {
        cudaCheck(cudaSetDevice(gpu.number));   // a thread begins with the first
        cudaCheck(cudaMemcpyAsync(to, from, bytes, kind, gpu.stream));
        cudaCheck(cudaStreamSynchronize(gpu.stream));
    }
}

template <typename T> static void copy_to_host(const T *x, size_t n, float *host) {
    T *staging = (T *)(gpu.staging + (size_t)omp_get_thread_num() * IO_CHUNK);
    for (size_t k; n; n -= k, x += k, host += k) {
        k = min_size(n, IO_CHUNK);
        copy_staged(staging, x, k * sizeof(T), cudaMemcpyDeviceToHost);
        for (size_t i = 0; i < k; i++) host[i] = (float)staging[i];
    }
}

template <typename T> static void copy_from_host(T *x, size_t n, const float *host) {
    T *staging = (T *)(gpu.staging + (size_t)omp_get_thread_num() * IO_CHUNK);
    for (size_t k; n; n -= k, x += k, host += k) {
        k = min_size(n, IO_CHUNK);
        for (size_t i = 0; i < k; i++) staging[i] = (T)host[i];
        copy_staged(x, staging, k * sizeof(T), cudaMemcpyHostToDevice);
    }
}

// One kind of state: a flat buffer of floats or of bf16.
typedef struct State { void *x; int bf16; } State;
static State state_of(const Model *m, int what) {
    State weights = {NULL, m->plan.bf16};
    with_precision(m, [&](auto *m) { weights.x = m->weights; });
    const State by_kind[] = {weights, {m->master, 0}, {m->m, m->plan.bf16_state}, {m->v, m->plan.bf16_state},
                             {m->grads, 0}};
    return by_kind[what];                       // STATE_*
}

// Host access for checkpoints: elements [at, at+n) of unit u as fp32; of master, m and v those of this rank's
// share.
void model_read(const Model *m, int what, int u, size_t at, size_t n, float *host) {
    const State s = state_of(m, what);
    at += m->p.units[u].at;
    if (s.bf16) copy_to_host((bf16 *)s.x + at, n, host);
    else copy_to_host((float *)s.x + at, n, host);
}

// Weights go to the master too, so that nothing is lost on the way through bf16.
void model_write(Model *m, int what, int u, size_t at, size_t n, const float *host) {
    const State s = state_of(m, what);
    at += m->p.units[u].at;
    if (s.bf16) copy_from_host((bf16 *)s.x + at, n, host);
    else copy_from_host((float *)s.x + at, n, host);
    if (what == STATE_WEIGHTS && m->plan.bf16 && m->plan.training) copy_from_host(m->master + at, n, host);
}

float *model_floats(const Model *, int, int, size_t) { return NULL; }
void model_set_master(Model *) {}               // model_write has done it

// ---- data to the device -----------------------------------------------------------------------------------
static Feed feed_at(int *x, size_t N) {
    return {0, 0, 0, x, x + N, x + 2 * N, x + 3 * N, x + 4 * N, x + 5 * N};
}

// Copies a batch to the device and sorts its rows by token (for the embedding). The next call waits for this
// copy alone, so the device computes with one batch while the host prepares the next.
static Feed feed_batch(Model *m, const Batch *batch) {
    const size_t N = m->N, rows = (size_t)batch->B * batch->T, bytes = rows * sizeof(int);
    const Feed host = feed_at(m->feed_host, N);
    Feed f = feed_at(m->feed_device, N);
    f.B = batch->B, f.T = batch->T;
    if (!batch->doc_start) f.doc_start = NULL;
    cudaCheck(cudaEventSynchronize(m->fed));
    memcpy(host.inputs, batch->inputs, bytes);
    if (batch->targets) memcpy(host.targets, batch->targets, bytes);
    if (batch->doc_start) memcpy(host.doc_start, batch->doc_start, bytes);
    sort_rows(host.order, host.starts, host.tokens, &f.n_distinct, batch->inputs, (int)rows, m->c.V);
    cudaCheck(cudaMemcpyAsync(m->feed_device, m->feed_host, (6 * N + 1) * sizeof(int), cudaMemcpyHostToDevice,
                              gpu.stream));
    cudaCheck(cudaEventRecord(m->fed, gpu.stream));
    return f;
}

// weight (N) to m->weight, likewise
static void feed_weights(Model *m, const double *weight, int N) {
    const size_t bytes = (size_t)N * sizeof(double);
    cudaCheck(cudaEventSynchronize(m->weighed));
    memcpy(m->weight_host, weight, bytes);
    cudaCheck(cudaMemcpyAsync(m->weight, m->weight_host, bytes, cudaMemcpyHostToDevice, gpu.stream));
    cudaCheck(cudaEventRecord(m->weighed, gpu.stream));
}

// ---- forward ----------------------------------------------------------------------------------------------
// x_mid = x + attention(q,k,v) Wo^T with q,k,v = rope(norm1(x) Wqkv^T): y->rstd1, qkv, att, lse, x_mid
template <typename floatX>
static void attention_block_forward(ModelOf<floatX> *m, const LayerParams<floatX> *w, LayerActs<floatX> *y,
                                    const Feed *batch) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, HD = c->H * c->D, W = HD + 2 * c->K * c->D;
    rmsnorm_forward(m->norm, y->rstd1, y->x, w->norm1, c->eps, N, c->C);
    matmul_forward(y->qkv, m->norm, w->qkv, N, c->C, W, NULL, w->qkv_bias);
    qk_norm_rope_forward(y->qkv, y->qk_raw, y->qk_rstd, w->q_norm, w->k_norm, m->cosine, m->sine, c->eps,
                         c->H, c->K, c->D, N, batch->T);
    attention_forward(y->att, y->lse, y->qkv, batch->doc_start, batch->B, batch->T, c->H, c->K, c->D);
    matmul_forward(y->x_mid, y->att, w->o, N, HD, c->C, y->x, NULL);
}

// Runs all layers on the batch's inputs; leaves the final norm's output (N,C) in m->norm.
template <typename floatX> void llama_forward(ModelOf<floatX> *m, const Feed *batch) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T;
    embedding_forward(m->acts[0].x, batch->inputs, batch->order, unit_weights(m, UNIT_EMBED), N, c->C);
    for (int l = 0; l < c->L; l++) {
        const LayerParams<floatX> w = layer_params(unit_weights(m, UNIT_LAYER + l), &m->p, l);
        LayerActs<floatX> *y = &m->acts[l];
        floatX *x_next = l + 1 < c->L ? m->acts[l + 1].x : m->x_last;
        attention_block_forward(m, &w, y, batch);
        rmsnorm_forward(m->norm, y->rstd2, y->x_mid, w.norm2, c->eps, N, c->C);
        mlp_forward(m->h, y->gate_up, m->norm, w.gate_up, N, c->C, c->F);
        matmul_forward(x_next, m->h, w.down, N, c->F, c->C, y->x_mid, NULL);
    }
    rmsnorm_forward(m->norm, m->rstd_last, m->x_last, head_weights(m).norm, c->eps, N, c->C);
}

void llama_forward(Model *model, const Batch *batch) {
    model->feed = feed_batch(model, batch);
    with_precision(model, [&](auto *m) { llama_forward(m, &m->feed); });
}

// ---- head and loss ----------------------------------------------------------------------------------------
// Loss of each target into m->nll; their sum goes to what model_loss returns, each times its weight. weight
// (N) = d objective / d nll: also m->dnorm (N,C) = gradient of the final norm's output, and the head's
// gradient +=. weight NULL: losses only. Logits exist for `chunk` rows at a time; rows beyond N have gradient
// zero, so that one shape of matmul serves every chunk.
template <typename floatX> void llama_head(ModelOf<floatX> *m, const Feed *batch, const double *weight) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T;
    const floatX *head = head_weights(m).head;
    for (int n = 0; n < N; n += m->chunk) {
        const int rows = N - n < m->chunk ? N - n : m->chunk;
        floatX *norm = m->norm + (size_t)n * c->C;
        const size_t rest = m->chunk - rows;
        cudaCheck(cudaMemsetAsync(norm + (size_t)rows * c->C, 0, rest * c->C * sizeof(floatX), gpu.stream));
        matmul_forward(m->logits, norm, head, m->chunk, c->C, c->Vp, NULL, NULL);
        cross_entropy(m->nll + n, m->logits, batch->targets + n, weight ? weight + n : NULL, rows, c->V,
                      c->Vp);
        if (!weight) continue;
        cudaCheck(cudaMemsetAsync(m->logits + (size_t)rows * c->Vp, 0, rest * c->Vp * sizeof(floatX),
                                  gpu.stream));
        matmul_backward_x(m->dnorm + (size_t)n * c->C, m->logits, head, m->chunk, c->C, c->Vp);
        matmul_backward_w(head_grads(m).head, m->logits, norm, m->chunk, c->C, c->Vp);
    }
    add_sum(m->sums, m->nll, weight, N);
}

void llama_head(Model *model, const Batch *batch, const double *weight) {
    if (weight) feed_weights(model, weight, batch->B * batch->T);
    with_precision(model, [&](auto *m) { llama_head(m, &m->feed, weight ? m->weight : NULL); });
}

// m->sums[first .. first+n) to the host, and zero on the device; waits for the GPU.
static void take_sums(const Model *m, int first, int n, double *host) {
    const size_t bytes = (size_t)n * sizeof(double);
    device_wait();
    cudaCheck(cudaMemcpyAsync(host, m->sums + first, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    cudaCheck(cudaMemsetAsync(m->sums + first, 0, bytes, gpu.stream));
    cudaCheck(cudaStreamSynchronize(gpu.stream));
}

// Sum of the losses since the last call.
double model_loss(Model *m) {
    double loss;
    take_sums(m, 0, 1, &loss);
    return loss;
}

// Logits (V) of the token after ids (n), n <= N and T, as fp32 on the host. What comes after the last id does
// not matter, so a power of two of rows runs: few shapes of matrix products.
void next_logits(Model *model, const int *ids, int n, float *logits) {
    // row: in the chunk
    const int room = model->N < model->T ? model->N : model->T, row = (n - 1) % model->chunk;
    Batch b = {};
    b.B = 1;
    for (b.T = 16; b.T < n; b.T *= 2) {}
    if (b.T > room) b.T = room;
    b.inputs = (int *)xcalloc((size_t)b.T, sizeof(int));
    memcpy(b.inputs, ids, (size_t)n * sizeof(int));
    llama_forward(model, &b);
    free(b.inputs);
    with_precision(model, [&](auto *m) {
        auto *norm = m->norm + (size_t)(n - 1 - row) * m->c.C;
        matmul_forward(m->logits, norm, head_weights(m).head, m->chunk, m->c.C, m->c.Vp, NULL, NULL);
        copy_to_host(m->logits + (size_t)row * m->c.Vp, (size_t)m->c.V, logits);
    });
}

// ---- backward ---------------------------------------------------------------------------------------------
// From m->dnorm, which llama_head left, to the gradients of all parameters, +=. unit_done(u), if given, is
// called when the work of unit u is enqueued.
template <typename floatX> void llama_backward(ModelOf<floatX> *m, const Feed *batch,
                                               void (*unit_done)(Model *, int)) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, C = c->C, F = c->F, HD = c->H * c->D, W = HD + 2 * c->K * c->D;
    floatX *none = NULL;
    cudaCheck(cudaMemsetAsync(m->dx, 0, (size_t)N * C * sizeof(floatX), gpu.stream));
    rmsnorm_backward(m->dx, head_grads(m).norm, none, m->dnorm, m->x_last, m->rstd_last, head_weights(m).norm,
                     N, C);
    if (unit_done) unit_done(m, UNIT_LAYER + c->L);
    for (int l = c->L - 1; l >= 0; l--) {
        const LayerParams<floatX> w = layer_params(unit_weights(m, UNIT_LAYER + l), &m->p, l);
        const LayerParams<float> dw = layer_params(unit_grads(m, UNIT_LAYER + l), &m->p, l);
        LayerActs<floatX> *y = &m->acts[l];
        // the last layer's are still there
        const int again = l == c->L - 1 ? RECOMPUTE_NONE : m->plan.recompute;
        if (again == RECOMPUTE_BLOCK) attention_block_forward(m, &w, y, batch);
        if (again != RECOMPUTE_NONE) {
            rmsnorm_forward(m->norm, y->rstd2, y->x_mid, w.norm2, c->eps, N, C);
            mlp_forward(none, y->gate_up, m->norm, w.gate_up, N, C, F);
        }

        // x' = x_mid + (silu(g) * u) Wdown^T
        floatX *dgate_up = y->gate_up;          // in place; h is rebuilt in the same pass
        mlp_backward_gate_up(dgate_up, m->h, m->dx, w.down, N, C, F);
        matmul_backward_w(dw.down, m->dx, m->h, N, F, C);
        // g | u = norm2(x_mid) Wgate_up^T; the norm's output is rebuilt by its backward, so the weight
        // gradient follows that
        matmul_backward_x(m->dnorm, dgate_up, w.gate_up, N, C, 2 * F);
        rmsnorm_backward(m->dx, dw.norm2, m->norm, m->dnorm, y->x_mid, y->rstd2, w.norm2, N, C);
        matmul_backward_w(dw.gate_up, dgate_up, m->norm, N, C, 2 * F);

        // x_mid = x + attention(q, k, v) Wo^T
        matmul_backward_w(dw.o, m->dx, y->att, N, HD, C);
        matmul_backward_x(m->datt, m->dx, w.o, N, HD, C);
        attention_backward(m->dqkv, m->datt, y->qkv, y->att, y->lse, batch->doc_start, batch->B, batch->T,
                           c->H, c->K, c->D);
        qk_norm_rope_backward(m->dqkv, dw.q_norm, dw.k_norm, y->qk_raw, y->qk_rstd, w.q_norm, w.k_norm,
                              m->cosine, m->sine, c->H, c->K, c->D, N, batch->T);
        if (w.qkv_bias) bias_backward(dw.qkv_bias, m->dqkv, N, W);
        // q | k | v = norm1(x) Wqkv^T
        matmul_backward_x(m->dnorm, m->dqkv, w.qkv, N, C, W);
        rmsnorm_backward(m->dx, dw.norm1, m->norm, m->dnorm, y->x, y->rstd1, w.norm1, N, C);
        matmul_backward_w(dw.qkv, m->dqkv, m->norm, N, C, W);
        if (unit_done) unit_done(m, UNIT_LAYER + l);
    }
    embedding_backward(unit_grads(m, UNIT_EMBED), batch->order, batch->starts, batch->tokens,
                       batch->n_distinct, m->dx, N, C);
    if (unit_done) unit_done(m, UNIT_EMBED);
}

void llama_backward(Model *model, const Batch *, void (*unit_done)(Model *, int)) {
    with_precision(model, [&](auto *m) { llama_backward(m, &m->feed, unit_done); });
}

// ---- update -----------------------------------------------------------------------------------------------
void model_zero_grads(Model *m) {
    cudaCheck(cudaMemsetAsync(m->grads, 0, m->p.n * sizeof(float), gpu.stream));
}

// Starts to add up unit u's gradients over the ranks; model_reduce_finish waits for all.
void model_reduce_unit(Model *m, int u) { comm_reduce_start(unit_grads(m, u), m->p.units[u].n_padded); }
void model_reduce_finish(Model *) { comm_reduce_finish(); }

// Global L2 norm of the gradients; not finite: *bad names the first tensor at fault and *n_bad counts them.
double gradient_norm(Model *m, const char **bad, int *n_bad) {
    const int n = m->p.n_tensors;
    double total = 0, *squares = (double *)xmalloc((size_t)n * sizeof(double));
    for (int i = 0; i < n; i++) {
        const Tensor *t = &m->p.tensors[i];
        sum_of_squares(m->sums + 1 + i, unit_grads(m, t->unit) + t->at, t->n);
    }
    take_sums(m, 1, n, squares);
    *bad = NULL;
    *n_bad = 0;
    for (int i = 0; i < n; i++) {
        if (!isfinite(squares[i]) && !(*n_bad)++) *bad = m->p.tensors[i].name;
        total += squares[i];
    }
    free(squares);
    return sqrt(total);
}

template <typename State, typename floatX>
static void update_tensors(ModelOf<floatX> *m, double lr, double grad_scale, int64_t step, const Options *o) {
    const uint32_t key = (uint32_t)random_bits((uint64_t)o->seed, hash_string("update"), (uint64_t)step);
    for (const Tensor *t = m->p.tensors; t < m->p.tensors + m->p.n_tensors; t++) {
        const size_t at = m->p.units[t->unit].at + t->at;
        adamw_update(m->weights + at, m->master + at, (State *)m->m + at, (State *)m->v + at, m->grads + at,
                     t->n, lr, o->beta1, o->beta2, o->eps, t->decay ? o->weight_decay : 0, grad_scale, step,
                     key, at);
    }
}

// One AdamW update with gradients * grad_scale (clipping); step counts from 1.
void model_update(Model *model, double lr, double grad_scale, int64_t step, const Options *o) {
    with_precision(model, [&](auto *m) {
        if (m->plan.bf16_state) update_tensors<bf16>(m, lr, grad_scale, step, o);
        else update_tensors<float>(m, lr, grad_scale, step, o);
    });
}

// SHARED BEGIN
// ==== 5. Objectives: what is trained, as a loss and a weight per target ====================================
// Every target t of a micro-step has a loss nll_t = -log p(target). An objective says with what weight each
// enters the update: weight_t = d objective / d nll_t. Everything before (forward) and after (backward) is
// the same for all objectives.
typedef struct Objective {
    const char *name;
    // what a micro-batch adds to the sum that the update's mean is divided by
    double (*mass)(const Batch *batch);
    // weight (N) =; mass: of the whole update
    void (*weigh)(double *weight, const Batch *batch, double mass);
} Objective;

// ---- next tokens: the mean over all targets of the update, whatever micro-step or rank they are on
static double count_targets(const Batch *batch) {
    double n = 0;
    for (int i = 0; i < batch->B * batch->T; i++) n += batch->targets[i] != IGNORED;
    return n;
}

static void weigh_targets(double *weight, const Batch *batch, double mass) {
    for (int i = 0; i < batch->B * batch->T; i++) weight[i] = batch->targets[i] == IGNORED ? 0 : 1 / mass;
}

static const Objective objectives[] = {{"pretrain", count_targets, weigh_targets}};     // by --stage

// ==== 6. Training: an update, looking, saving, set-up, main ================================================
typedef struct Trainer {
    Model *m;
    Config c;
    const Objective *objective;
    DataLoader train, val;
    LoaderState next;                       // where the data after the batches below begin
    Batch *batches, val_batch;              // (micro_steps) of the next update
    int batches_read;
    double *weight;                         // (N) of a micro-step's targets
    Tokenizer *tokenizer;
    const char *side_folder;                // where tokenizer files are copied from, or NULL
    TrainState state;
    double peak;                            // FLOP/s of a rank; NAN: unknown
    int64_t micro_steps;                    // per update
    int64_t bad_in_a_row, saved_step;
    double val_loss, floor;                 // of the last evaluation, NAN: none
    // of energy; NAN: none yet
    struct { double start, joules, joules_per_token, watts; int64_t tokens; } window;
} Trainer;

static volatile sig_atomic_t signals;       // how many arrived

static void on_signal(int number) {
    if (++signals > 1) _exit(128 + number);
}

// 1 on all ranks once any has got SIGINT, SIGTERM or SIGUSR1.
static int stop_requested(void) { return comm_max((double)signals) > 0; }

// ---- one update -------------------------------------------------------------------------------------------
static void read_batches(Trainer *tr) {
    for (int64_t i = 0; i < tr->micro_steps; i++) loader_next(&tr->train, &tr->batches[i]);
    tr->batches_read = 1;
}

// Gradients of one update, over all ranks. 0 if a signal came between micro-steps: nothing has changed then.
// *loss: the objective.
static int update_gradients(Trainer *tr, double *loss) {
    Model *m = tr->m;
    double mass = 0;
    if (!tr->batches_read) read_batches(tr);
    for (int64_t i = 0; i < tr->micro_steps; i++) mass += tr->objective->mass(&tr->batches[i]);
    // known before the first backward, so that nothing is scaled afterwards
    comm_sum(&mass, 1);
    model_zero_grads(m);
    for (int64_t i = 0; i < tr->micro_steps; i++) {
        if (stop_requested()) return 0;
        const Batch *batch = &tr->batches[i];
        llama_forward(m, batch);
        tr->objective->weigh(tr->weight, batch, mass);
        llama_head(m, batch, tr->weight);
        llama_backward(m, batch, i + 1 == tr->micro_steps ? model_reduce_unit : NULL);
    }
    tr->next = tr->train.state;
    tr->batches_read = 0;
    if (tr->state.step + 1 < opt.steps && !opt.dump_grads) read_batches(tr);     // while a GPU computes
    model_reduce_finish(m);
    *loss = model_loss(m);
    comm_sum(loss, 1);
    return 1;
}

// How many standard deviations x lies above the mean of the last n values (0 until the window is full).
static double z_score(const double *window, int64_t n, double x) {
    if (n < SPIKE_WINDOW) return 0;
    double mean = 0, var = 0;
    for (int i = 0; i < SPIKE_WINDOW; i++) mean += window[i] / SPIKE_WINDOW;
    for (int i = 0; i < SPIKE_WINDOW; i++) var += (window[i] - mean) * (window[i] - mean) / SPIKE_WINDOW;
    return var > 0 ? (x - mean) / sqrt(var) : 0;
}

// Empty: healthy. Otherwise why this update must not reach the weights.
static Str update_verdict(const Trainer *tr, double loss, double norm, const char *bad, int n_bad) {
    const double z_loss = z_score(tr->state.losses, tr->state.n_healthy, loss);
    const double z_norm = z_score(tr->state.norms, tr->state.n_healthy, norm);
    if (!isfinite(loss) || !isfinite(norm))
        return str("loss %g, gradient not finite in %d of %d tensors, first %s", loss, n_bad,
                   model_table(tr->m)->n_tensors, bad ? bad : "none");
    if (opt.skip_spikes > 0 && (z_loss > opt.skip_spikes || z_norm > opt.skip_spikes))
        return str("spike: loss %.4f (%.1f standard deviations), grad_norm %.3f (%.1f)", loss, z_loss, norm,
                   z_norm);
    return str("%s", "");
}

// Energy is read over windows of at least 2 s, with the device idle at both ends: a GPU's counter moves every
// 0.1 s. This ends a window, which counts if it was of updates, and begins the next. All ranks call it
// together.
enum { ENERGY_SECONDS = 2 };
static void window_turn(Trainer *tr, int of_updates) {
    device_wait();
    comm_barrier();                                         // rank 0 alone may have been sampling
    tr->peak = device_peak(opt.precision == BF16);          // a CPU's is measured, and may be higher now
    double now = now_seconds(), energy = energy_read(), joules = energy - tr->window.joules;
    comm_sum(&joules, 1);                                   // each rank reads its own counters
    if (of_updates) tr->state.joules += joules;
    // cut short by an evaluation or the end: too coarse
    if (of_updates && now - tr->window.start >= ENERGY_SECONDS) {
        tr->window.joules_per_token = joules / (double)(tr->state.tokens - tr->window.tokens);
        tr->window.watts = joules / (now - tr->window.start);
    }
    tr->window.start = now;
    tr->window.joules = energy;
    tr->window.tokens = tr->state.tokens;
}

static void log_step(const Trainer *tr, double loss, double lr, double norm, double seconds,
                     const char *skipped) {
    const int64_t step = tr->state.step;
    const double tokens = (double)opt.total_batch_tokens, speed = tokens / seconds, world = comm_world();
    const double report = flops_per_token(&tr->c, (int)opt.seq_len, /*causal=*/0) * speed / world;
    const double causal = flops_per_token(&tr->c, (int)opt.seq_len, /*causal=*/1) * speed / world;
    const double peak = report <= tr->peak ? tr->peak : NAN;    // more: measured on a busy machine
    if (*skipped) printf("step %" PRId64 " | skipped | %s\n", step, skipped);
    if (step % opt.log_every == 0 || step == opt.steps || step == 1) {
        const double left = (double)(opt.steps - step) * tr->state.seconds / (double)step;
        printf("step %" PRId64 "/%" PRId64 " | loss %.4f | lr %.2e | grad_norm %.3f | %.1f ms | %.0f tok/s | "
               "mfu %s (causal %s) | %s J/token | eta %s\n", step, opt.steps, loss, lr, norm, seconds * 1e3,
               speed, measured_text(100 * report / peak, "%.1f%%").s,
               measured_text(100 * causal / peak, "%.1f%%").s,
               measured_text(tr->window.joules_per_token, "%.3g").s, duration_text(left).s);
        fflush(stdout);
    }
    const struct { const char *key; double x; } row[] = {
        {"loss", loss}, {"lr", lr}, {"grad_norm", norm}, {"tokens", (double)tr->state.tokens},
        {"tokens_per_sec", speed}, {"tokens_per_sec_per_gpu", speed / world},
        {"model_tflops_per_gpu", report * 1e-12}, {"mfu", report / peak},
        {"mfu_causal", causal / peak}, {"time_per_iteration", seconds},
        {"joules_per_token", tr->window.joules_per_token}, {"watts", tr->window.watts}};
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"step\", \"step\": %" PRId64, step);
    for (int i = 0; i < COUNT(row); i++) text_add_field(&r, row[i].key, row[i].x);
    text_add(&r, ", \"skipped\": %s", *skipped ? "true" : "false");
    log_record(&r);
}

enum { MOST_BAD_IN_A_ROW = 5 };

// One update: gradients, verdict, AdamW, log. 0 if a signal came before it was complete.
static int train_step(Trainer *tr) {
    TrainState *s = &tr->state;
    const double start = now_seconds();
    const char *bad;
    double loss;
    int n_bad;
    if (!update_gradients(tr, &loss)) return 0;
    double facts[3] = {loss, gradient_norm(tr->m, &bad, &n_bad), now_seconds() - tr->window.start};
    comm_broadcast(facts, sizeof facts);                    // all ranks decide alike
    loss = facts[0];
    const double norm = facts[1], lr = learning_rate(&opt, s->step);
    const Str skipped = update_verdict(tr, loss, norm, bad, n_bad);
    s->step++;
    s->tokens += opt.total_batch_tokens;
    s->loader = tr->next;
    if (!*skipped.s) {
        const double clip = opt.grad_clip > 0 && norm > opt.grad_clip ? opt.grad_clip / norm : 1;
        model_update(tr->m, lr, clip, ++s->updates, &opt);
        s->losses[s->n_healthy % SPIKE_WINDOW] = loss;
        s->norms[s->n_healthy++ % SPIKE_WINDOW] = norm;
    }
    tr->bad_in_a_row = *skipped.s ? tr->bad_in_a_row + 1 : 0;
    if (facts[2] > ENERGY_SECONDS) window_turn(tr, /*of_updates=*/1);
    const double seconds = now_seconds() - start;
    s->seconds += seconds;
    log_step(tr, loss, lr, norm, seconds, skipped.s);
    if (tr->bad_in_a_row >= MOST_BAD_IN_A_ROW)
        die("step %" PRId64 ": %d updates in a row were unusable (%s); the newest checkpoint in %s is from "
            "before: lower --lr or look at the data, then --resume auto", s->step, MOST_BAD_IN_A_ROW,
            skipped.s, opt.out);
    return 1;
}

// ---- looking ----------------------------------------------------------------------------------------------
// Mean loss over --val-data into tr->val_loss (and tr->floor); NAN if a signal came.
static void evaluate(Trainer *tr) {
    DataLoader *dl = &tr->val;
    const Batch *batch = &tr->val_batch;
    int64_t batches = loader_eval_batches(dl);
    if (opt.val_batches && opt.val_batches < batches) batches = opt.val_batches;
    double sums[3] = {0, 0, 0};             // loss, targets, floor
    loader_rewind(dl);
    tr->val_loss = tr->floor = NAN;
    for (int64_t i = 0; i < batches; i++) {
        if (stop_requested()) return;
        loader_next(dl, &tr->val_batch);
        llama_forward(tr->m, batch);
        llama_head(tr->m, batch, /*weight=*/NULL);
        sums[1] += count_targets(batch);
        for (int j = 0; j < batch->B * batch->T; j++)
            if (batch->targets[j] != IGNORED) sums[2] += batch->floor[j];
    }
    sums[0] = model_loss(tr->m);
    comm_sum(sums, 3);
    tr->val_loss = sums[0] / sums[1];
    if (dl->has_floor) tr->floor = sums[2] / sums[1];
    printf("step %" PRId64 " | val loss %.4f", tr->state.step, tr->val_loss);
    if (dl->has_floor) printf(", floor %.4f", tr->floor);
    printf(" nats/token | %.0f targets\n", sums[1]);
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"val\", \"step\": %" PRId64, tr->state.step);
    text_add_field(&r, "val_loss", tr->val_loss);
    text_add_field(&r, "floor", tr->floor);
    log_record(&r);
}

// The next token by temperature (0: the most likely) and a coin in [0,1).
static int sample_token(const float *logits, int V, double temperature, double coin) {
    int best = 0;
    for (int v = 1; v < V; v++) if (logits[v] > logits[best]) best = v;
    if (temperature == 0) return best;
    double sum = 0, seen = 0;
    for (int v = 0; v < V; v++) sum += exp((logits[v] - logits[best]) / temperature);
    for (int v = 0; v < V; v++) {
        seen += exp((logits[v] - logits[best]) / temperature);
        if (seen > coin * sum) return v;
    }
    return best;
}

// Prints --prompt and up to --sample-tokens more; rank 0 only, the others wait at their next exchange.
static void generate(Trainer *tr) {
    if (comm_rank() || !opt.sample_tokens) return;
    const Tokenizer *tok = tr->tokenizer;
    const int bos = tok && tok->bos >= 0 ? tok->bos : tr->c.bos;
    const int eos = tok && tok->eos >= 0 ? tok->eos : tr->c.eos;
    const int room = (int)opt.seq_len;
    int *prompt = NULL, n = 0;
    const int n_prompt = tok ? tokenizer_encode(tok, opt.prompt, strlen(opt.prompt), &prompt) : 0;
    int *ids = (int *)xmalloc((size_t)(n_prompt + opt.sample_tokens + 2) * sizeof(int));
    float *logits = (float *)xmalloc((size_t)tr->c.V * sizeof(float));
    if (bos >= 0 || !n_prompt) ids[n++] = bos >= 0 ? bos : 0;
    for (int i = 0; i < n_prompt; i++) {
        if (prompt[i] >= tr->c.V)
            die("--prompt: token %d is outside the model's vocabulary of %d; name the model's --tokenizer",
                prompt[i], tr->c.V);
        tokenizer_print(tok, n ? ids[n - 1] : -1, prompt[i], stdout);
        ids[n++] = prompt[i];
    }
    for (int64_t i = 0; i < opt.sample_tokens && !signals; i++) {
        const int window = n < room ? n : room;             // the last tokens that the model can see
        const uint64_t draw = ((uint64_t)tr->state.step << 20) + (uint64_t)i;
        next_logits(tr->m, ids + n - window, window, logits);
        ids[n] = sample_token(logits, tr->c.V, opt.temperature,
                              random_uniform((uint64_t)opt.seed, hash_string("sample"), draw));
        if (ids[n] == eos) break;
        if (tok && ids[n] < tok->V) tokenizer_print(tok, ids[n - 1], ids[n], stdout);
        else printf(" %d", ids[n]);
        fflush(stdout);
        n++;
    }
    printf("\n");
    free(prompt);
    free(logits);
    free(ids);
}

// ---- the loop ---------------------------------------------------------------------------------------------
static void save(Trainer *tr) {
    if (tr->saved_step == tr->state.step) return;
    const double start = now_seconds();
    checkpoint_save(tr->m, &tr->state, &tr->c, &opt, tr->side_folder);
    tr->saved_step = tr->state.step;
    printf("step %" PRId64 " | saved %s/step_%08" PRId64 " in %.1f s\n", tr->state.step, opt.out,
           tr->state.step, now_seconds() - start);
}

static void report_end(const Trainer *tr) {
    const TrainState *s = &tr->state;
    if (!s->step || s->seconds <= 0) return;
    const double speed = (double)s->tokens / s->seconds;
    const double flops = flops_per_token(&tr->c, (int)opt.seq_len, /*causal=*/0) * speed / comm_world();
    printf("end | %" PRId64 " steps | %" PRId64 " tokens | %s in steps | %.0f tok/s | mfu %s of %s per rank "
           "(%s) | energy %s kWh, %s W, %s J/token\n", s->step, s->tokens, duration_text(s->seconds).s, speed,
           measured_text(100 * flops / (flops <= tr->peak ? tr->peak : NAN), "%.1f%%").s,
           flops_text(tr->peak).s, device_peak_is,
           measured_text(s->joules / 3.6e6, "%.3g").s, measured_text(s->joules / s->seconds, "%.1f").s,
           measured_text(s->joules / (double)s->tokens, "%.3g").s);
    if (isfinite(tr->val_loss) && isfinite(tr->floor))
        printf("end | val loss %.4f, floor %.4f nats/token: %.4f above what can be known\n", tr->val_loss,
               tr->floor, tr->val_loss - tr->floor);
}

static void train(Trainer *tr) {
    window_turn(tr, /*of_updates=*/0);
    while (tr->state.step < opt.steps && train_step(tr)) {
        const int64_t step = tr->state.step;
        const int last = step == opt.steps;
        const int evaluating = opt.val_data && opt.val_every && (step % opt.val_every == 0 || last);
        const int saving = opt.checkpoint_every && step % opt.checkpoint_every == 0 && !tr->bad_in_a_row;
        const int sampling = opt.sample_every && step % opt.sample_every == 0 && !last;
        if (!evaluating && !saving && !sampling) continue;
        window_turn(tr, /*of_updates=*/1);
        if (evaluating) evaluate(tr);
        if (saving) save(tr);
        if (sampling) generate(tr);
        window_turn(tr, /*of_updates=*/0);                  // energy per token is that of updates
    }
    window_turn(tr, /*of_updates=*/1);
    const int stopped = stop_requested();
    if ((opt.checkpoint_every || stopped) && !tr->bad_in_a_row) save(tr);
    if (stopped)
        printf("stopped by a signal at step %" PRId64 "; --resume auto --out %s continues\n", tr->state.step,
               opt.out);
    else report_end(tr);
    if (!stopped && opt.sample_every) generate(tr);
}

// The gradients of the first update as a safetensors file, under Hugging Face's names.
static void dump_grads(Trainer *tr) {
    double mean_loss;
    if (!update_gradients(tr, &mean_loss)) die("--dump-grads: stopped by a signal");
    if (comm_rank()) return;
    const ParamTable *p = model_table(tr->m);
    const float loss = (float)mean_loss;
    const int64_t one = 1;
    StWriter *w = st_create(opt.dump_grads, "{\"format\":\"pt\"}");
    st_declare(w, "loss", ST_F32, 1, &one);
    st_declare_table(w, p, ST_F32);
    st_begin(w);
    st_write(w, &loss, 1);
    for (const Tensor *t = p->tensors; t < p->tensors + p->n_tensors; t++)
        save_values(w, tr->m, STATE_GRADS, t->unit, t->at, t->n);
    const int failed = st_finish(w, NULL, NULL);
    if (failed) die("--dump-grads: %s: cannot write: %s", opt.dump_grads, strerror(failed));
    printf("loss %.6f | gradients of %d tensors in %s\n", loss, p->n_tensors, opt.dump_grads);
}

// ---- set-up: everything that can go wrong goes wrong here, before any work --------------------------------
static const char DEFAULT_TRAIN[] = "data/stories/train/train_*.ds";
static const char DEFAULT_VAL[] = "data/stories/val/val_*.ds";

static int is_training(void) { return !opt.eval_only && !opt.generate && !opt.dry_run && !opt.dump_grads; }

// What this trainer does not do is refused by name.
static void refuse(void) {
    for (int i = 0; i < COUNT(refused); i++) {
        const char *value = option_text(option_find(refused[i].option));
        if (refused[i].value ? !strcmp(value, refused[i].value) : option_given(refused[i].option))
            die("%s%s%s %s", refused[i].option, refused[i].value ? " " : "", refused[i].value ? value : "",
                refused[i].why);
    }
}

// What the user left open of schedule and output. Small models (below 5 M parameters) get the defaults of
// `tiny`.
static void resolve_schedule(Options *o, const Config *c) {
    const int small = config_params(c) < 5e6;
    if (o->steps < 0) o->steps = small ? 2400 : 1000;
    if (o->lr < 0) o->lr = small ? 4e-3 : 3e-4;
    if (o->min_lr < 0) o->min_lr = o->lr / 10;
    if (o->warmup_steps < 0) o->warmup_steps = o->steps / 10 < 100 ? o->steps / 10 : 100;
    if (o->val_every < 0) o->val_every = o->steps / 10 > 1 ? o->steps / 10 : 1;
    if (o->sample_every < 0) o->sample_every = o->steps > 0 ? o->steps : 1;
    if (o->checkpoint_every < 0) o->checkpoint_every = o->steps / 5 > 1 ? o->steps / 5 : 1;
}

// Sizes of a rank of `machine` with a micro-step of B sequences.
static Plan plan_of(const Machine *machine, int64_t B) {
    const int training = !opt.eval_only && !opt.generate;
    Plan plan = {machine->ranks, comm_rank(), (int)opt.zero, (int)B, (int)opt.seq_len, (int)opt.logits_chunk,
                 opt.precision == BF16, opt.optimizer_dtype == BF16, (int)opt.recompute, training};
    return plan;
}

static double plan_bytes(const Config *c, const Plan *plan) {
    Model *m = model_plan(c, plan);
    double bytes = 0;
    for (int i = 0; i < N_ARENAS; i++) bytes += model_bytes(m, i);
    model_free(m);
    return bytes;
}

// What the user left open of sequence, update and micro-step, for `machine`.
static void resolve_batch(const Config *c, const Machine *machine) {
    const int small = config_params(c) < 5e6, open = !opt.batch_size;
    if (!opt.seq_len) opt.seq_len = c->max_T < 1024 ? c->max_T : 1024;
    if (opt.seq_len > c->max_T)
        die("--seq-len %" PRId64 " is beyond the model's max_position_embeddings %d", opt.seq_len, c->max_T);
    if (c->sliding_window && opt.seq_len > c->sliding_window)
        die("--seq-len %" PRId64 " is beyond the model's sliding window %d, which litespark does not "
            "compute; use at most that", opt.seq_len, c->sliding_window);
    if (!opt.logits_chunk) opt.logits_chunk = device_logits_chunk(c->V);
    if (opt.generate) opt.batch_size = opt.logits_chunk = 1;                // a sample has one row at a time
    if (opt.generate) return;
    const int64_t row = opt.seq_len * machine->ranks;
    const int64_t wanted = opt.batch_size ? opt.batch_size * row : small ? 2048 : 524288;
    if (!opt.total_batch_tokens) opt.total_batch_tokens = CEIL_DIV(wanted, row) * row;
    const int64_t rows = opt.total_batch_tokens / row;
    if (opt.total_batch_tokens % row)
        die("--total-batch-tokens %" PRId64 " is not a multiple of --seq-len x ranks = %" PRId64 "; %" PRId64
            " is", opt.total_batch_tokens, row, CEIL_DIV(opt.total_batch_tokens, row) * row);
    for (int64_t b = 1; open && b <= rows; b++) {           // the largest divisor that fits;
        // beyond ENOUGH_ROWS nothing gets faster
        if (rows % b || (b > 1 && b * opt.seq_len > ENOUGH_ROWS)) continue;
        const Plan plan = plan_of(machine, b);
        if (b == 1 || plan_bytes(c, &plan) < machine->memory) opt.batch_size = b;
    }
    if (rows % opt.batch_size)
        die("--total-batch-tokens %" PRId64 " is not a multiple of --batch-size x --seq-len x ranks = %"
            PRId64, opt.total_batch_tokens, opt.batch_size * row);
    if (opt.batch_size * opt.seq_len > INT_MAX / 2)
        die("--batch-size %" PRId64 " x --seq-len %" PRId64 " is more than fits; use smaller ones",
            opt.batch_size, opt.seq_len);
}

// What a resumed run does otherwise than the run that was saved (its options: was) would have done.
static void say_what_changed(const Trainer *tr, Options *was) {
    const int64_t step = tr->state.step;
    resolve_schedule(was, &tr->c);
    const double then = learning_rate(was, step), now = learning_rate(&opt, step);
    if (then != now || was->steps != opt.steps)
        printf("resume: learning rate | step %" PRId64 ": was %.3g, is now %.3g | end: was %.3g at step %"
               PRId64 ", is now %.3g at step %" PRId64 "\n", step + 1, then, now,
               learning_rate(was, was->steps - 1), was->steps, learning_rate(&opt, opt.steps - 1), opt.steps);
    if (step && tr->state.tokens / step != opt.total_batch_tokens)
        printf("resume: tokens per update | were %" PRId64 ", are now %" PRId64 "\n", tr->state.tokens / step,
               opt.total_batch_tokens);
}

// The checkpoint to continue, or NULL; its options (*was) are taken up where the command line gives no
// others.
static char *setup_resume(Trainer *tr, Options *was) {
    if (!opt.resume) return NULL;
    char *dir = checkpoint_choose(opt.resume, opt.out);
    if (!dir) printf("--resume auto: no checkpoint in %s, starting from the beginning\n", opt.out);
    if (!dir) return NULL;
    checkpoint_read_state(dir, &tr->state, was);
    if (!strcmp(opt.resume, "auto")) tr->saved_step = tr->state.step;
    return dir;
}

// Model and tokenizer. `tiny` takes its vocabulary from the data.
static void setup_model(Trainer *tr, const char *resume_dir) {
    Config *c = &tr->c;
    const int needs_data = is_training() || opt.dump_grads;
    if (!opt.train_data && !opt.val_data) opt.val_data = DEFAULT_VAL;
    if (!opt.train_data) opt.train_data = DEFAULT_TRAIN;
    if (needs_data && !strcmp(opt.train_data, DEFAULT_TRAIN) && data_vocabulary(opt.train_data) < 0)
        die("the default data is not here; `make data` writes it to data/stories, or name your own with "
            "--train-data");
    *c = choose_config(resume_dir);
    tr->tokenizer = tokenizer_choose(c, resume_dir ? resume_dir : opt.init_from, &tr->side_folder);
    if (c->V) return;
    c->V = tr->tokenizer ? tr->tokenizer->V : data_vocabulary(opt.train_data);
    if (c->V <= 0 && opt.dry_run) c->V = 1024;
    if (c->V <= 0)
        die("%s does not say how large its vocabulary is and no tokenizer.bin lies beside it; name a "
            "--tokenizer", opt.train_data);
    config_set_vocab(c, c->V);
    c->bos = tr->tokenizer ? tr->tokenizer->bos : -1;
    c->eos = tr->tokenizer ? tr->tokenizer->eos : -1;
}

// Sizes of everything; nothing is allocated yet.
static void setup_sizes(Trainer *tr, const char *resume_dir) {
    const Machine machine = device_machine();
    int64_t *steps;
    device_check_sizes(&tr->c);
    resolve_schedule(&opt, &tr->c);
    if (opt.min_lr > opt.lr) die("--min-lr %g is above --lr %g", opt.min_lr, opt.lr);
    resolve_batch(&tr->c, &machine);
    const int n_steps = is_training() && !resume_dir ? checkpoint_list(opt.out, &steps) : 0;
    if (n_steps)
        die("%s holds step %" PRId64 ": --resume auto continues it, --out NAME starts another", opt.out,
            steps[n_steps - 1]);
    const Plan plan = plan_of(&machine, opt.batch_size);
    tr->m = model_plan(&tr->c, &plan);
    if (!opt.generate)
        tr->micro_steps = opt.total_batch_tokens / (opt.batch_size * opt.seq_len * machine.ranks);
}

static void setup_data(Trainer *tr, const char *resume_dir) {
    const int B = (int)opt.batch_size, T = (int)opt.seq_len, masked = (int)opt.document_mask;
    tr->weight = (double *)xcalloc((size_t)B * T, sizeof(double));
    if (is_training() || opt.dump_grads) {
        loader_open(&tr->train, opt.train_data, B, T, comm_rank(), comm_world(), (uint64_t)opt.seed,
                    /*shuffle=*/1, tr->c.V, masked);
        tr->batches = (Batch *)xcalloc((size_t)tr->micro_steps, sizeof(Batch));
        for (int64_t i = 0; i < tr->micro_steps; i++)
            batch_alloc(&tr->batches[i], B, T, masked, /*with_floor=*/0);
        if (resume_dir) {
            tr->train.state = tr->state.loader;
            tr->train.state.position %= tr->train.n_windows;
        }
        tr->state.loader = tr->train.state;
        loader_log(&tr->train, "train", stdout);
    }
    if (opt.eval_only && !opt.val_data) die("--eval-only needs --val-data");
    if (!opt.val_data || !(is_training() || opt.eval_only)) return;
    loader_open(&tr->val, opt.val_data, B, T, comm_rank(), comm_world(), 0, /*shuffle=*/0, tr->c.V, masked);
    batch_alloc(&tr->val_batch, B, T, masked, /*with_floor=*/1);
    loader_log(&tr->val, "val", stdout);
}

static void print_model(const Trainer *tr) {
    const Config *c = &tr->c;
    double total = 0;
    printf("model | %s | %.2f M parameters | L %d | C %d | H %d | K %d | D %d | F %d | V %d | %s head\n",
           c->family->name, (double)model_table(tr->m)->n_params / 1e6, c->L, c->C, c->H, c->K, c->D, c->F,
           c->V, c->tied ? "tied" : "own");
    printf("batch | %" PRId64 " tokens per update = %" PRId64 " sequences x %" PRId64 " tokens x %d ranks x %"
           PRId64 " micro-steps | %s | recompute %s\n", opt.total_batch_tokens, opt.batch_size, opt.seq_len,
           comm_world(), tr->micro_steps, opt.precision == BF16 ? "bf16" : "fp32",
           option_text(option_find("--recompute")));
    printf("memory");
    for (int i = 0; i < N_ARENAS; i++) {
        const double bytes = model_bytes(tr->m, i);
        total += bytes;
        if (bytes > 0) printf(" | %s %.1f MiB", arena_names[i], bytes / 1048576);
    }
    printf(" | total %.1f MiB per rank%s\n", total / 1048576, device_also_takes);
}

static void setup_weights(Trainer *tr, const char *resume_dir) {
    model_alloc(tr->m);
    if (resume_dir) checkpoint_read_model(resume_dir, tr->m, /*state=*/is_training());
    else if (opt.init_from) weights_read(opt.init_from, tr->m, &tr->c);
    else weights_random(tr->m, &tr->c, (uint64_t)opt.seed);
    model_set_master(tr->m);
}

static void log_header(const Trainer *tr) {
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"header\", \"program\": \"litespark\", \"commit\": \"%s\", \"device\": ",
             LITESPARK_COMMIT);
    text_add_string(&r, device_name());
    text_add(&r, ", \"host\": ");
    text_add_string(&r, host);
    text_add(&r, ", \"ranks\": %d, \"parameters\": %zu", comm_world(), model_table(tr->m)->n_params);
    text_add_field(&r, "peak_tflops_per_gpu", tr->peak * 1e-12);
    text_add(&r, ", \"step\": %" PRId64 ", \"options\": ", tr->state.step);
    text_add_options(&r, /*as_given=*/0);
    log_record(&r);
}

// After all checks, so that a refused run leaves nothing behind.
static void setup_output(Trainer *tr, const char *resume_dir) {
    if (comm_rank() == 0 && mkdir(opt.out, 0777) && errno != EEXIST)
        die("cannot make --out %s: %s", opt.out, strerror(errno));
    comm_barrier();
    if (access(opt.out, W_OK | X_OK)) die("--out %s is not writable: %s", opt.out, strerror(errno));
    log_open(opt.out);
    if (!is_training()) return;
    tr->peak = device_peak(opt.precision == BF16);
    printf("device | %s | peak %s per rank (%s) | energy counters %s\n", device_name(),
           flops_text(tr->peak).s, device_peak_is, isfinite(energy_read()) ? "found" : "unavailable");
    log_header(tr);
    if (resume_dir)
        printf("resume | %s | step %" PRId64 " of %" PRId64 "%s\n", resume_dir, tr->state.step, opt.steps,
               tr->state.step >= opt.steps ? ": nothing left to do, raise --steps to go on" : "");
}

static void setup(Trainer *tr) {
    Options was;
    tr->saved_step = -1;                    // nothing yet
    tr->val_loss = tr->floor = tr->window.joules_per_token = tr->window.watts = NAN;
    tr->objective = &objectives[opt.stage];
    char *resume_dir = setup_resume(tr, &was);
    setup_model(tr, resume_dir);
    setup_sizes(tr, resume_dir);
    if (resume_dir) say_what_changed(tr, &was);
    if (opt.dry_run) return;
    setup_data(tr, resume_dir);
    if (!opt.generate) print_model(tr);
    setup_weights(tr, resume_dir);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    signal(SIGUSR1, on_signal);
    if (is_training() || opt.eval_only) setup_output(tr, resume_dir);
}

#ifndef LITESPARK_NO_MAIN
int main(int argc, char **argv) {
    static Trainer trainer, *tr = &trainer;
    comm_init(&argc, &argv);
    options_parse(argc, argv);
    if (opt.help) options_help();
    else {
        options_check();
        refuse();
        device_open();
        setup(tr);
        if (opt.dry_run) print_model(tr);
        else if (opt.eval_only) evaluate(tr);
        else if (opt.generate) generate(tr);
        else if (opt.dump_grads) dump_grads(tr);
        else train(tr);
        comm_barrier();
    }
    comm_finish();
    return 0;
}
#endif
// SHARED END

// ==== 7. Ranks, and the GPU under each =====================================================================
// Without MPI there is one rank and every function is the identity, so callers have no special case. Host
// values travel by MPI, always in a loop of MPI_Test with a time limit, gradients by NCCL on a stream of
// their own, and gpu_wait has the same limit: a dead or stuck peer ends the job with a message. (NCCL's own
// start has no limit; a broadcast just before it has.)
static struct { int rank, world, local_rank, local_ranks; } comm = {0, 1, 0, 1};    // local: on this machine

int comm_rank(void) { return comm.rank; }
int comm_world(void) { return comm.world; }

// Loops that wait for other ranks call it: after --timeout seconds the job ends.
static void comm_check_time(double start, const char *what) {
    double waited = now_seconds() - start;
    if (waited > (double)opt.timeout)
        die("waited %.0f s for the other ranks in %s: one is dead or stuck; resume with --resume auto "
            "(or raise --timeout)", waited, what);
}

#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1          // the C interface is enough
#include <mpi.h>
#include <nccl.h>
enum { BUCKET = 1 << 22 };          // bytes of one broadcast
#define ncclCheck(call) do { \
    ncclResult_t r_ = (call); \
    if (r_ != ncclSuccess) die("%s:%d: %s: %s", __FILE__, __LINE__, #call, ncclGetErrorString(r_)); \
} while (0)

void comm_abort(void) {
    int up = 0, down = 0;
    MPI_Initialized(&up);
    MPI_Finalized(&down);
    if (up && !down && comm.world > 1) MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

void comm_init(int *argc, char ***argv) {
    MPI_Init(argc, argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm.world);
    MPI_Comm local;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &comm.local_rank);
    MPI_Comm_size(local, &comm.local_ranks);
    MPI_Comm_free(&local);
    if (comm.rank && !freopen("/dev/null", "w", stdout))            // rank 0 speaks for all
        die("cannot write to /dev/null: %s", strerror(errno));
    setenv("NCCL_DEBUG_FILE", "/dev/stderr", 0);                    // where errors of all ranks go
}

void comm_finish(void) { MPI_Finalize(); }

static void comm_wait(MPI_Request *request, const char *what) {
    double start = now_seconds();
    for (int done = 0; !done;) {
        MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (done) return;
        comm_check_time(start, what);
        usleep(50);
    }
}

void comm_broadcast(void *data, size_t bytes) {     // from rank 0
    for (size_t at = 0; at < bytes; at += BUCKET) {
        MPI_Request r;
        MPI_Ibcast((char *)data + at, (int)min_size(bytes - at, BUCKET), MPI_BYTE, 0, MPI_COMM_WORLD, &r);
        comm_wait(&r, "a broadcast");
    }
}

void comm_sum(double *x, int n) {
    MPI_Request r;
    MPI_Iallreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD, &r);
    comm_wait(&r, "a sum");
}

double comm_max(double x) {
    MPI_Request r;
    MPI_Iallreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, &r);
    comm_wait(&r, "a maximum or barrier");
    return x;
}

#else
void comm_abort(void) {}
void comm_init(int *, char ***) {
    const char *size = getenv("OMPI_COMM_WORLD_SIZE");
    if (size && strcmp(size, "1"))
        die("this build has no MPI, so mpirun would start %s separate runs; install Open MPI and run make "
            "train again", size);
}
void comm_finish(void) {}
void comm_broadcast(void *, size_t) {}
void comm_sum(double *, int) {}
double comm_max(double x) { return x; }
#endif
void comm_barrier(void) { comm_max(0); }            // no rank knows a maximum before all have come

// ---- the GPU ----------------------------------------------------------------------------------------------
// Dense peaks, 10^12 FLOP/s, of NVIDIA's datasheets: bf16 tensor cores; fp32 without TF32. Names as
// cudaGetDeviceProperties gives them.
static const struct { const char *name; double bf16_tflops, fp32_tflops; } gpu_peaks[] = {
    {"H100 NVL", 835, 60},          // H100 datasheet, sparse figures halved
    {"H100 PCIe", 756, 51},
    {"H100", 989.4, 67},            // SXM
    {"H200 NVL", 835, 60},
    {"H200", 989.4, 67},
    {"GH200", 989.4, 67},
    {"A100", 312, 19.5},            // A100 datasheet
    {"A800", 312, 19.5},
    {"L40S", 362, 91.6},            // L40S datasheet
    {"RTX 4090", 165.2, 82.6},      // Ada whitepaper, fp32 accumulate
    {"RTX 3090", 71, 35.6},         // GA102 whitepaper, fp32 accumulate
};

// FLOP/s of the device at this precision; NAN: not in the table, and then MFU is not printed.
double device_peak(int bf16) {
    const char *name = gpu.device.name;
    for (size_t i = 0; i < sizeof gpu_peaks / sizeof *gpu_peaks; i++)
        if (strstr(name, gpu_peaks[i].name) && !strstr(name, "MIG") && !strstr(name, "Laptop"))
            return 1e12 * (bf16 ? gpu_peaks[i].bf16_tflops : gpu_peaks[i].fp32_tflops);
    return NAN;
}

const char *device_name(void) { return gpu.device.name; }

// To plan with: what is free on the fullest GPU, less the allowance. Without a GPU (--dry-run): an 80 GB
// card.
Machine device_machine(void) {
    size_t free_bytes = 0, total = 0;
    if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) free_bytes = (size_t)79 << 30;
    const double memory = -comm_max(-((double)free_bytes - GPU_ALLOWANCE));     // all ranks must choose alike
    return {comm.world, comm.local_ranks, memory};
}

int device_logits_chunk(int) { return 2048; }   // smaller ones read and write the head's gradient too often

void device_check_sizes(const Config *c) {
    const int pack = opt.precision == BF16 ? 8 : 4;
    if (opt.seq_len > F32_WARPS * 65535)
        die("--seq-len %" PRId64 ": the CUDA trainer takes at most %d", opt.seq_len, F32_WARPS * 65535);
    if (c->C % pack || c->F % pack || c->C > 16384)
        die("hidden_size %d, intermediate_size %d: the CUDA trainer wants multiples of %d in %s, and a "
            "hidden_size of at most 16384", c->C, c->F, pack, pack == 8 ? "bf16" : "fp32");
}

// ---- energy: NVML's total-energy counter, in mJ since the driver loaded; opened at run time ---------------
static struct { void *device; int (*total)(void *device, unsigned long long *mj); } nvml;

static void energy_open(void) {
    void *lib = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!lib) return;
    auto init = (int (*)(void))dlsym(lib, "nvmlInit_v2");
    auto by_bus = (int (*)(const char *, void **))dlsym(lib, "nvmlDeviceGetHandleByPciBusId_v2");
    auto total = (int (*)(void *, unsigned long long *))dlsym(lib, "nvmlDeviceGetTotalEnergyConsumption");
    char bus[32];
    if (!init || !by_bus || !total || init()) return;
    if (cudaDeviceGetPCIBusId(bus, sizeof bus, comm.local_rank) != cudaSuccess) return;
    if (by_bus(bus, &nvml.device)) return;
    nvml.total = total;
}

double energy_read(void) {
    static double joules = NAN;             // as last read
    unsigned long long mj;
    if (nvml.total && !nvml.total(nvml.device, &mj)) joules = (double)mj * 1e-3;
    return joules;
}

// ---- sums over ranks, and waiting for them ----------------------------------------------------------------
// x (n) of all ranks is summed on the communication stream once the compute stream has come this far.
void comm_reduce_start(float *x, size_t n) {
    if (comm.world == 1) return;
#ifdef USE_MPI
    cudaCheck(cudaEventRecord(gpu.ready, gpu.stream));
    cudaCheck(cudaStreamWaitEvent(gpu.comm_stream, gpu.ready, 0));
    ncclCheck(ncclAllReduce(x, x, n, ncclFloat32, ncclSum, (ncclComm_t)gpu.nccl, gpu.comm_stream));
#endif
}

// Waits for the compute stream and so for the sums it waits for. An error of NCCL, or a peer that does not
// come, ends the job.
void device_wait(void) {
    double start = now_seconds();
    for (cudaError_t e; (e = cudaStreamQuery(gpu.stream)) != cudaSuccess;) {
        if (e != cudaErrorNotReady)
            die("the GPU stopped: %s; with CUDA_LAUNCH_BLOCKING=1 the kernel is named",
                cudaGetErrorString(e));
#ifdef USE_MPI
        ncclResult_t state = ncclSuccess;
        if (gpu.nccl) ncclCheck(ncclCommGetAsyncError((ncclComm_t)gpu.nccl, &state));
        if (state != ncclSuccess && state != ncclInProgress)
            die("NCCL: %s; resume with --resume auto", ncclGetErrorString(state));
#endif
        if (comm.world > 1) comm_check_time(start, "the sums of gradients");
    }
}

// The compute stream goes on when all sums are complete.
void comm_reduce_finish(void) {
    if (comm.world == 1) return;
    cudaCheck(cudaEventRecord(gpu.summed, gpu.comm_stream));
    cudaCheck(cudaStreamWaitEvent(gpu.stream, gpu.summed, 0));
}

// One GPU per rank of the machine; the NCCL id travels by MPI. --dry-run needs none.
void device_open(void) {
    int n = 0;
    if (opt.dry_run) return;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0)
        die("no CUDA device answers (%s); `make train DEVICE=cpu` builds the CPU trainer",
            cudaGetErrorString(e));
    if (comm.local_ranks > n)
        die("%d ranks on a machine with %d GPUs; start one rank per GPU", comm.local_ranks, n);
    cudaCheck(cudaSetDevice(comm.local_rank));
    cudaDeviceProp *device = &gpu.device;
    cudaCheck(cudaGetDeviceProperties(device, comm.local_rank));
    if (device->major < 8)
        die("%s has compute capability %d.%d; litespark needs 8.0 or newer", device->name, device->major,
            device->minor);
    choose_kernels(device->major * 10 + device->minor);
    cudaCheck(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    cublasCheck(cublasLtCreate(&gpu.lt));
    energy_open();
    if (comm.world == 1) return;
    int least, greatest;                    // the sums' few blocks go before the many of a product
    cudaCheck(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    cudaCheck(cudaStreamCreateWithPriority(&gpu.comm_stream, cudaStreamNonBlocking, greatest));
    cudaCheck(cudaEventCreateWithFlags(&gpu.ready, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&gpu.summed, cudaEventDisableTiming));
#ifdef USE_MPI
    ncclUniqueId id;
    if (comm.rank == 0) ncclCheck(ncclGetUniqueId(&id));
    comm_broadcast(&id, sizeof id);
    ncclCheck(ncclCommInitRank((ncclComm_t *)&gpu.nccl, comm.world, id, comm.rank));
#endif
}

// ---- plumbing: read it when you need it -------------------------------------------------------------------
// SHARED BEGIN
// ==== 8. Errors, numbers, options ==========================================================================
static void (*die_hook)(const char *message);   // tests leave die() through it

// A mistake of the user's or the machine's: what, where, what to do. One line; all ranks end with status 1.
void die(const char *fmt, ...) {
    char message[2048];
    va_list args;
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    if (die_hook) die_hook(message);
    if (comm_rank() > 0) usleep(500000);        // what all ranks see, rank 0 alone should say
    fflush(stdout);
    if (comm_world() > 1) fprintf(stderr, "error: rank %d: %s\n", comm_rank(), message);
    else fprintf(stderr, "error: %s\n", message);
    comm_abort();
    exit(EXIT_FAILURE);
}

static void *memory_or_die(void *p, size_t n, size_t size) {
    if (!p) die("out of memory: %zu x %zu bytes more are needed; use a smaller batch or model", n, size);
    return p;
}

void *xmalloc(size_t bytes) { return memory_or_die(malloc(bytes ? bytes : 1), 1, bytes); }

void *xcalloc(size_t n, size_t size) {          // calloc itself refuses an n * size that overflows
    return memory_or_die(calloc(n ? n : 1, size ? size : 1), n, size);
}

// Room for `need` items of `size` bytes in the array p, which has room for *max; doubles: appending is O(1).
static void *array_room(void *p, int need, int *max, size_t size) {
    if (need <= *max) return p;
    *max = need < 2 * *max ? 2 * *max : need < 16 ? 16 : need;
    return memory_or_die(realloc(p, (size_t)*max * size), (size_t)*max, size);
}

// For qsort and bsearch: compares two strings, or two structs by the string that each begins with.
static int compare_names(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

char *xstrdup(const char *s) {
    size_t n = strlen(s) + 1;
    return (char *)memcpy(xmalloc(n), s, n);
}

// A path (the system takes no longer ones), a name, a message.
Str str(const char *fmt, ...) {
    Str text;
    va_list args;
    va_start(args, fmt);
    if (vsnprintf(text.s, sizeof text.s, fmt, args) >= (int)sizeof text.s)
        die("%.80s... is too long", text.s);
    va_end(args);
    return text;
}

double now_seconds(void) {          // differences only: the zero is arbitrary, and the clock never jumps
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// CRC-32, zlib's. crc_table[k][b] is that of byte b and k zero bytes after: 16 bytes become 16 independent
// lookups instead of a chain of 16. (Little endian, as are all our formats.)
#define CRC_POLYNOMIAL 0xEDB88320u              // bit 31 is x^0
static uint32_t crc_table[16][256];

__attribute__((constructor)) static void crc_fill_table(void) {     // before main, and so before any thread
    for (uint32_t b = 0; b < 256; b++) {
        crc_table[0][b] = b;
        for (int bit = 0; bit < 8; bit++)
            crc_table[0][b] = (crc_table[0][b] >> 1) ^ (crc_table[0][b] & 1 ? CRC_POLYNOMIAL : 0);
    }
    for (int k = 1; k < 16; k++)
        for (int b = 0; b < 256; b++)
            crc_table[k][b] = (crc_table[k-1][b] >> 8) ^ crc_table[0][crc_table[k-1][b] & 255];
}

static uint32_t crc_16_bytes(uint32_t crc, const void *p) {
    uint32_t w[4], next = 0;
    memcpy(w, p, 16);
    w[0] ^= crc;
    for (int i = 0; i < 4; i++)
        next ^= crc_table[15 - 4*i][w[i] & 255] ^ crc_table[14 - 4*i][w[i] >> 8 & 255]
              ^ crc_table[13 - 4*i][w[i] >> 16 & 255] ^ crc_table[12 - 4*i][w[i] >> 24];
    return next;
}

// Where an x86 multiplies without carries, five times as fast: 64 bytes fold into the next 64, for as long as
// there are more; what is left, 16 bytes, has the CRC of all of them. (Gopal et al., "Fast CRC Computation
// Using PCLMULQDQ", Intel 2009; the constants, powers of x modulo the polynomial, are its k1 to k4.)
#ifdef __x86_64__
typedef long long Int128 __attribute__((vector_size(16)));
#define CRC_FOLD(x, k) (__builtin_ia32_pclmulqdq128(x, k, 0) ^ __builtin_ia32_pclmulqdq128(x, k, 17))
__attribute__((target("pclmul")))
static const unsigned char *crc_fold(uint32_t *crc, const unsigned char *p, const unsigned char *end) {
    const Int128 by_64 = {0x154442BD4, 0x1C6E41596}, by_16 = {0x1751997D0, 0xCCAA009E};
    Int128 x[4], next[4], first = {*crc, 0};
    memcpy(x, p, 64);
    x[0] ^= first;
    for (p += 64; end - p >= 64; p += 64) {
        memcpy(next, p, 64);
        for (int i = 0; i < 4; i++) x[i] = CRC_FOLD(x[i], by_64) ^ next[i];
    }
    for (int i = 1; i < 4; i++) x[i] ^= CRC_FOLD(x[i-1], by_16);
    *crc = crc_16_bytes(0, &x[3]);
    return p;
}
static int crc_can_fold(void) { return __builtin_cpu_supports("pclmul"); }
#else
static const unsigned char *crc_fold(uint32_t *crc, const unsigned char *p, const unsigned char *end) {
    (void)crc; (void)end;
    return p;
}
static int crc_can_fold(void) { return 0; }
#endif

// The CRC-32 of n more bytes; start with crc = 0.
uint32_t crc32_update(uint32_t crc, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data, *end = p + n;
    crc = ~crc;
    if (n >= 64 && crc_can_fold()) p = crc_fold(&crc, p, end);
    for (; end - p >= 16; p += 16) crc = crc_16_bytes(crc, p);
    while (p < end) crc = (crc >> 8) ^ crc_table[0][(crc ^ *p++) & 255];
    return ~crc;
}

static uint32_t crc_product(uint32_t a, uint32_t b) {           // of two polynomials, modulo the third
    uint32_t product = 0;
    for (; a; a <<= 1, b = (b >> 1) ^ (b & 1 ? CRC_POLYNOMIAL : 0)) if (a >> 31) product ^= b;
    return product;
}

// What a piece adds (^) to the CRC-32 of a file if n bytes come after it: with that, threads may take the
// pieces in any order.
static uint32_t crc32_before(uint32_t crc, size_t n) {
    uint32_t power = 1u << 23;                                  // x^8: one byte
    for (; n; n >>= 1, power = crc_product(power, power)) if (n & 1) crc = crc_product(crc, power);
    return crc;
}

// Random numbers without a state: element `index` of `stream` is a pure function, in integers only, so a GPU
// thread, another rank count or a resumed run computes the same bits. The mixer: SplitMix64's.
#define GOLDEN 0x9E3779B97F4A7C15u              // odd: a different point for each index
static uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint64_t random_key(uint64_t seed, uint64_t stream) {
    return mix64(mix64(seed + GOLDEN) ^ (stream * GOLDEN + 1));
}

static inline uint64_t random_of_key(uint64_t key, uint64_t index) {
    return mix64(mix64(key + index * GOLDEN) ^ key);            // twice: streams are no shifts of each other
}

uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    return random_of_key(random_key(seed, stream), index);
}

double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {     // [0, 1): the top 53 bits
    return (double)(random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

// The double with these low 52 bits as a whole number. No conversion, which not every CPU has as vector code.
static inline double from_52_bits(uint64_t x) {
    union { uint64_t u; double f; } bits = {x | 0x4330000000000000u};
    return bits.f - 0x1p52;
}

// x to 24 bits. What is added below is a product of such numbers, exact in double: so a compiler may fuse it
// into the sum or not, and every build and machine gives the same bits.
static inline double short_of(double x) {
    union { double f; uint64_t u; } bits = {x};
    bits.u &= ~UINT64_C(0) << 29;
    return bits.f;
}

// Two independent normal numbers from 64 random bits, times scale: Box and Muller's pair r cos(a), r sin(a),
// r^2 = -2 log(u), u in (0,1). It has |a| < pi/2, and r any sign instead of half the circle: no branches, and
// loops over it become vector code. Within 2^-21 of |r|. The largest is 6.8 standard deviations off.
static inline __attribute__((always_inline)) void normal_pair(float *out, double scale, uint64_t random) {
    // 2^32 u = 2^exponent m, 0.7 < m < 1.42; log(m) = s (2 + 2/3 s^2 + 2/5 s^4 + ...), s = (m - 1) / (m + 1)
    union { double f; uint64_t u; } u = {from_52_bits(random >> 32) + 0.5}, m;
    const uint64_t exponent_64 = (u.u - 0x3FE6A09E667F3BCDu + (UINT64_C(64) << 52)) >> 52;      // + 64
    m.u = u.u - ((exponent_64 - 64) << 52);
    const double s = short_of((m.f - 1) / (m.f + 1)), s2 = short_of(s * s);
    double p = short_of(2./9 + s2 * (2.f/11));
    p = short_of(2./7 + s2 * p);
    p = short_of(2./5 + s2 * p);
    p = short_of(2./3 + s2 * p);
    p = short_of(2 + s2 * p);
    const double log_u = (from_52_bits(exponent_64) - 96) * 0x1.62e42fefa38p-1 + s * p;         // log(2)
    const double sign = 1 - 2 * from_52_bits(random & 1), r = sqrt(-2 * log_u) * sign * scale;
    // 24 bits become the angle; Taylor's series
    const double steps = from_52_bits(random >> 8 & 0xFFFFFF) - 8388607.5;
    const double a = short_of(steps * (3.14159265358979324 / 0x1p24)), a2 = short_of(a * a);
    double c = short_of(-1./3628800 + a2 * (1.f/479001600));
    double d = short_of(-1./39916800 + a2 * (1.f/6227020800));
    c = short_of(1./40320 + a2 * c), d = short_of(1./362880 + a2 * d);
    c = short_of(-1./720 + a2 * c),  d = short_of(-1./5040 + a2 * d);
    c = short_of(1./24 + a2 * c),    d = short_of(1./120 + a2 * d);
    c = short_of(-1./2 + a2 * c),    d = short_of(-1./6 + a2 * d);
    out[0] = (float)(r * (1 + a2 * c));
    out[1] = (float)(r * (a * (1 + a2 * d)));
}

// Normal numbers first .. first+n-1 of a stream, mean 0, standard deviation `scale`; `first` is even.
void random_normals(float *out, double scale, uint64_t seed, uint64_t stream, uint64_t first, size_t n) {
    const uint64_t key = random_key(seed, stream);
    assert(first % 2 == 0);
    #pragma omp simd
    for (size_t i = 0; i < n / 2; i++) normal_pair(out + 2 * i, scale, random_of_key(key, first / 2 + i));
    if (n % 2) {
        float last[2];
        normal_pair(last, scale, random_of_key(key, (first + n) / 2));
        out[n - 1] = last[0];
    }
}

static uint64_t hash_bytes(const char *s, size_t n) {       // FNV-1a, then mixed
    uint64_t h = 0xCBF29CE484222325u;
    while (n--) h = (h ^ (unsigned char)*s++) * 0x100000001B3u;
    return mix64(h);
}

uint64_t hash_string(const char *s) { return hash_bytes(s, strlen(s)); }    // a stream number for random_bits

// Strict numbers: 1 and *out when the whole of s is one decimal number that fits, else 0 and *out as it was.
int parse_int(const char *s, int64_t *out) {
    const char *digits = s + (*s == '-' || *s == '+');
    if (!*digits || digits[strspn(digits, "0123456789")]) return 0;
    errno = 0;
    long long value = strtoll(s, NULL, 10);
    if (errno) return 0;
    *out = value;
    return 1;
}

int parse_double(const char *s, double *out) {
    if (!*s || s[strspn(s, "0123456789+-.eE")]) return 0;       // no blanks, hexadecimal, inf or nan
    char *end;
    errno = 0;
    double value = strtod(s, &end);
    if (end == s || *end || (errno == ERANGE && fabs(value) > 1)) return 0;     // a tiny number may become 0
    *out = value;
    return 1;
}

// The shortest decimal that reads back as x; valid until the fourth call after this one.
static const char *shortest(double x) {
    static char text[4][40];
    static int next;
    char *s = text[next++ % 4];
    int digits = 1;
    do snprintf(s, sizeof text[0], "%.*g", digits, x);
    while (digits++ < 17 && strtod(s, NULL) != x);
    return s;
}

// A descriptor and the size (bytes NULL: not asked for) of a regular file. Dies naming `what` and the path:
// missing, a folder, not readable.
static int open_regular(const char *path, const char *what, size_t *bytes) {
    struct stat st;
    if (stat(path, &st) != 0) die("cannot open %s '%s': %s", what, path, strerror(errno));
    if (!S_ISREG(st.st_mode)) die("%s '%s' is not a file; name the file itself", what, path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) die("cannot open %s '%s': %s", what, path, strerror(errno));
    if (bytes) *bytes = (size_t)st.st_size;
    return fd;
}

// Up to n bytes at `offset`; fewer only at the end of the file (returns how many). Dies on a read error.
static size_t read_at(int fd, const char *path, void *out, size_t n, size_t offset) {
    size_t done = 0;
    while (done < n) {
        ssize_t got = pread(fd, (char *)out + done, n - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) die("cannot read '%s' at byte %zu: %s", path, offset + done, strerror(errno));
        if (got == 0) break;
        done += (size_t)got;
    }
    return done;
}

static void read_exactly(int fd, const char *path, void *out, size_t n, size_t offset) {
    if (read_at(fd, path, out, n, offset) != n) die("'%s' became shorter while it was read", path);
}

char *read_text_file(const char *path, size_t max_bytes, size_t *n) {       // the caller frees
    int fd = open_regular(path, "file", n);
    if (*n > max_bytes)
        die("'%s' has %zu bytes, more than the %zu that such a file may have", path, *n, max_bytes);
    char *text = (char *)xmalloc(*n + 1);
    read_exactly(fd, path, text, *n, 0);
    close(fd);
    text[*n] = 0;
    return text;
}

// ---- options ----------------------------------------------------------------------------------------------
struct Option {
    const char *name;
    int type, kind;
    void *value;
    const char *initial;
    double lo, hi;
    const char *help, *text;        // text: the value as given, before what it leaves open is decided
    int given;                      // on the command line
};

#define ROW(type, name, field, kind, initial, lo, hi, help) \
    {name, OPT_##type, kind, &opt.field, initial, lo, hi, help, NULL, 0},
#define HEADLINE(title) {title, OPT_GROUP, START, NULL, NULL, 0, 0, NULL, NULL, 0},
static Option option_table[] = {OPTIONS(ROW, HEADLINE)};
#undef ROW
#undef HEADLINE

// Word `index` of a choice: its help begins with them, "WORD|WORD: ...". NULL: no such. In a static buffer.
static const char *choice_word(const Option *o, int64_t index) {
    static char word[16];
    const char *at = o->help;
    for (; index > 0; index--, at++) if (*(at += strcspn(at, "|:")) != '|') return NULL;
    snprintf(word, sizeof word, "%.*s", (int)strcspn(at, "|:"), at);
    return word;
}

static const char *choice_name(const Option *o) { return choice_word(o, *(int64_t *)o->value); }

Option *option_find(const char *name) {
    for (Option *o = option_table; o < option_table + COUNT(option_table); o++)
        if (!strcmp(o->name, name)) return o;
    return NULL;
}

int option_given(const char *name) { return option_find(name)->given; }

// Parses text into the option's variable; dies naming the option and what it wants.
void option_set(Option *o, const char *text) {
    text = o->text = xstrdup(text);
    if (o->type == OPT_TEXT) {
        *(const char **)o->value = text;
    } else if (o->type == OPT_CHOICE) {
        const char *word;
        int64_t index = 0;
        while ((word = choice_word(o, index)) && strcmp(word, text)) index++;
        if (!word) die("%s %s: choose one of %.*s", o->name, text, (int)strcspn(o->help, ":"), o->help);
        *(int64_t *)o->value = index;
    } else if (o->type == OPT_REAL) {
        double x;
        if (!parse_double(text, &x)) die("%s %s: not a number", o->name, text);
        if (!(x >= o->lo && x <= o->hi)) die("%s %s: out of range %g .. %g", o->name, text, o->lo, o->hi);
        *(double *)o->value = x;
    } else {
        int64_t x;
        if (!parse_int(text, &x)) die("%s %s: not a whole number", o->name, text);
        if (!((double)x >= o->lo && (double)x <= o->hi))
            die("%s %s: out of range %.0f .. %.0f", o->name, text, o->lo, o->hi);
        *(int64_t *)o->value = x;
    }
}

// The option's value as text, as option_set reads it (NULL: not set).
const char *option_text(const Option *o) {
    static char text[64];
    if (o->type == OPT_GROUP) return NULL;
    if (o->type == OPT_TEXT) return *(const char **)o->value;
    if (o->type == OPT_CHOICE) return choice_name(o);
    if (o->type == OPT_REAL) return shortest(*(double *)o->value);
    snprintf(text, sizeof text, "%" PRId64, *(int64_t *)o->value);
    return text;
}

void options_default(void) {
    memset(&opt, 0, sizeof opt);
    for (Option *o = option_table; o < option_table + COUNT(option_table); o++) {
        o->given = 0;
        o->text = NULL;
        if (o->initial) option_set(o, o->initial);
    }
}

void options_help(void) {
    printf("litespark trains Llama-family language models. "
           "With no options: a small model on generated stories.\n");
    static const char *const wants[] = {"", " TEXT", " N", " N", " WORD", ""};  // by type
    for (const Option *o = option_table; o < option_table + COUNT(option_table); o++) {
        if (o->type == OPT_GROUP) {
            printf("\n%s\n", o->name);
            continue;
        }
        printf("  %-24s %s", str("%s%s", o->name, wants[o->type]).s, o->help);
        printf(o->initial && *o->initial ? " (default %s)\n" : "\n", o->initial);
    }
}

// argv -> opt. Unknown names, missing and malformed values die.
void options_parse(int argc, char **argv) {
    options_default();
    for (int i = 1; i < argc; i++) {
        Option *o = option_find(argv[i]);
        if (!o || o->type == OPT_GROUP) die("unknown option %s; --help lists them all", argv[i]);
        if (o->given) die("%s is given twice", o->name);
        o->given = 1;
        if (o->type == OPT_FLAG) { *(int64_t *)o->value = 1; continue; }
        if (i + 1 == argc || !strncmp(argv[i + 1], "--", 2))
            die("%s needs a value; --help describes it", o->name);
        option_set(o, argv[++i]);
    }
}

// What can be said against the options without looking at any file.
void options_check(void) {
    if (!!opt.preset + !!opt.config + !!opt.init_from > 1)
        die("choose one of --preset, --config and --init-from");
    if (opt.resume && opt.init_from)
        die("--resume continues a run with its weights; it excludes --init-from");
    if (opt.eval_only + opt.generate + opt.dry_run + !!opt.dump_grads > 1)
        die("choose one of --eval-only, --generate, --dry-run and --dump-grads");
    if ((opt.generate || opt.eval_only) && !opt.init_from && !opt.resume)
        die("--generate and --eval-only need a trained model: name one with --init-from or --resume");
    if (opt.val_data && !*opt.val_data) die("--val-data is empty; name a file or leave it out");
    if (!*opt.out) die("--out is empty; name a folder");
    if ((option_given("--gpus") || option_given("--nodes") || option_given("--device")) && !opt.dry_run)
        die("--gpus, --nodes and --device go with --dry-run");
    if (option_given("--dpo-beta") && opt.stage != STAGE_DPO) die("--dpo-beta goes with --stage dpo");
}

// ==== 9. JSON: a strict reader (RFC 8259) and the few verbs that write it ==================================
// A node of a parsed text. Strings are decoded to UTF-8 and NUL-terminated; a number's digits are in str.
struct Json {
    char type;             // 'o'bject, 'a'rray, 's'tring, 'n'umber, 't'rue, 'f'alse, '0' null
    const char *key, *str; // name inside the parent object; text of a string or (not terminated) of a number
    size_t str_len;
    double num;
    int64_t inum;          // valid when is_int: written without '.' and exponent, and it fits
    int is_int, n;         // n = number of children
    struct Json *child, *next;
};

enum { JSON_MAX_DEPTH = 64 };
#define JSON_REQUIRED INT64_MIN // the fallback of json_int for a key that must be there

typedef struct JsonParser {
    char *text, *at, *end; // *end is NUL, so looking one byte ahead is always safe
    Json *unused;          // the next free node
    const char *where;
} JsonParser;

static void json_fail(const JsonParser *p, const char *expected) {
    unsigned char c = (unsigned char)*p->at;
    Str found = p->at == p->end ? str("the end of the text")
                                : str(c > 32 && c < 127 ? "'%c'" : "byte 0x%02x", c);
    die("%s: JSON byte %zu: expected %s, found %s", p->where, (size_t)(p->at - p->text), expected, found.s);
}

static void json_space(JsonParser *p) { p->at += strspn(p->at, " \n\r\t"); }

static void json_digits(JsonParser *p, int skip) {      // at least one, after `skip` other bytes
    p->at += skip;
    size_t n = strspn(p->at, "0123456789");
    if (!n) json_fail(p, "a digit");
    p->at += n;
}

// Bytes of the UTF-8 code point at s, of n bytes there; 0: malformed, as overlong forms and surrogates are.
static int utf8_length(const char *s, size_t n) {
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) return 1;
    size_t k = u[0] >= 0xF0 ? 4 : u[0] >= 0xE0 ? 3 : 2;
    uint32_t code = u[0] & (0x7Fu >> k);
    if (u[0] < 0xC2 || u[0] > 0xF4 || k > n) return 0;
    for (size_t i = 1; i < k; i++) {
        if ((u[i] & 0xC0) != 0x80) return 0;
        code = code << 6 | (u[i] & 0x3Fu);
    }
    if ((k == 3 && code < 0x800) || (k == 4 && code < 0x10000)) return 0;
    return code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF) ? 0 : (int)k;
}

// The value of "\uXXXX" at s, or -1.
static int json_hex4(const char *s) {
    char digits[5] = "";
    if (s[0] != '\\' || s[1] != 'u' || strspn(s + 2, "0123456789abcdefABCDEF") < 4) return -1;
    memcpy(digits, s + 2, 4);
    return (int)strtol(digits, NULL, 16);
}

// Decodes the escape at p->at into `out`; returns the end of what it wrote (at most as long as the escape).
static char *json_escape(JsonParser *p, char *out) {
    const char *from = "\"\\/bfnrt", *to = "\"\\/\b\f\n\r\t";
    const char *simple = p->at[1] ? strchr(from, p->at[1]) : NULL;
    if (simple) { p->at += 2; *out = to[simple - from]; return out + 1; }
    int code = json_hex4(p->at);
    int low = code >= 0xD800 && code <= 0xDBFF ? json_hex4(p->at + 6) : 0;  // a pair is one code point
    if (code < 0 || (code >= 0xDC00 && code <= 0xDFFF) || (low && (low < 0xDC00 || low > 0xDFFF)))
        json_fail(p, "an escape: \\\" \\\\ \\/ \\b \\f \\n \\r \\t, or \\uXXXX with surrogates in pairs");
    p->at += low ? 12 : 6;
    if (low) code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    int n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)(n == 1 ? code : (0xF00 >> n & 0xFF) | code);
    return out + n;
}

// Decodes the string at p->at in place: the text it stands for is never longer than its source.
static char *json_chars(JsonParser *p, size_t *length) {
    char *start = ++p->at, *out = start;
    while (*p->at != '"') {
        unsigned char c = (unsigned char)*p->at;
        int n = utf8_length(p->at, (size_t)(p->end - p->at));
        if (c < 0x20) json_fail(p, "the rest of a string (control characters must be escaped)");
        if (!n) json_fail(p, "valid UTF-8");
        if (c == '\\') out = json_escape(p, out);
        else while (n--) *out++ = *p->at++;
    }
    *length = (size_t)(out - start);
    *out = 0;
    p->at++;
    return start;
}

static void json_scan_number(JsonParser *p, Json *v) {
    char *start = p->at;
    v->type = 'n';
    if (*p->at == '-') p->at++;
    if (*p->at == '0') p->at++; // no further digit may follow a leading zero
    else json_digits(p, 0);
    v->is_int = *p->at != '.' && (*p->at | 32) != 'e';
    if (*p->at == '.') json_digits(p, 1);
    if ((*p->at | 32) == 'e') json_digits(p, p->at[1] == '+' || p->at[1] == '-' ? 2 : 1);
    v->str = start;
    v->str_len = (size_t)(p->at - start);
    v->num = strtod(start, NULL);
    if (!isfinite(v->num)) { p->at = start; json_fail(p, "a number within the range of a double"); }
    errno = 0;
    if (v->is_int) v->inum = strtoll(start, NULL, 10);
    if (errno) v->is_int = 0;
}

// Dies when two children have one key: readers disagree on which of them counts.
static void json_check_keys(const JsonParser *p, const Json *object) {
    const char **keys = (const char **)xmalloc((size_t)object->n * sizeof *keys);
    int n = 0;
    for (const Json *e = object->child; e; e = e->next) keys[n++] = e->key;
    qsort(keys, (size_t)n, sizeof *keys, compare_names);
    for (int i = 1; i < n; i++)
        if (!strcmp(keys[i - 1], keys[i])) die("%s: the key \"%s\" appears twice", p->where, keys[i]);
    free(keys);
}

static void json_value(JsonParser *p, Json *v, int depth);

static void json_container(JsonParser *p, Json *v, int depth) {
    int is_object = *p->at == '{';
    char close = is_object ? '}' : ']';
    Json **link = &v->child;
    if (depth > JSON_MAX_DEPTH) json_fail(p, "at most 64 levels of nesting");
    v->type = is_object ? 'o' : 'a';
    p->at++;
    json_space(p);
    while (*p->at != close || v->n) {
        Json *e = p->unused++;
        json_space(p);
        if (is_object) {
            size_t length;
            if (*p->at != '"') json_fail(p, "a key in double quotes");
            e->key = json_chars(p, &length);
            if (strlen(e->key) != length) json_fail(p, "a key without \\u0000");
            json_space(p);
            if (*p->at != ':') json_fail(p, "':'");
            p->at++;
        }
        json_value(p, e, depth);
        *link = e;
        link = &e->next;
        v->n++;
        json_space(p);
        if (*p->at == close) break;
        if (*p->at != ',') json_fail(p, is_object ? "',' or '}'" : "',' or ']'");
        p->at++;
    }
    p->at++;
    if (is_object && v->n > 1) json_check_keys(p, v);
}

static void json_value(JsonParser *p, Json *v, int depth) {
    static const char *const words[] = {"true", "false", "null"};
    json_space(p);
    if (*p->at == '{' || *p->at == '[') json_container(p, v, depth + 1);
    else if (*p->at == '-' || isdigit((unsigned char)*p->at)) json_scan_number(p, v);
    else if (*p->at == '"') {
        v->type = 's';
        v->str = json_chars(p, &v->str_len);
    } else {
        int i = 0;
        while (i < 3 && strncmp(p->at, words[i], strlen(words[i]))) i++;
        if (i == 3) json_fail(p, "a value");
        v->type = "tf0"[i];
        p->at += strlen(words[i]);
    }
}

// Parses n bytes; dies with `where`, the byte and what was expected there. One block of memory has the nodes
// and the text: free(root) releases it.
Json *json_parse(const char *text, size_t n, const char *where) {
    if (n >= INT_MAX) die("%s: %zu bytes of JSON are too many", where, n);
    size_t n_nodes = 1;                 // at most: all but the root come after one of these
    for (size_t i = 0; i < n; i++) n_nodes += text[i] == '{' || text[i] == '[' || text[i] == ',';
    Json *root = (Json *)xcalloc(1, n_nodes * sizeof *root + n + 1);
    char *copy = (char *)memcpy(root + n_nodes, text, n);
    JsonParser p = {copy, copy, copy + n, root + 1, where};
    json_value(&p, root, 0);
    json_space(&p);
    if (p.at != p.end) json_fail(&p, "the end of the text");
    return root;
}

Json *json_read_file(const char *path, size_t max_bytes) {
    size_t n;
    char *text = read_text_file(path, max_bytes, &n);
    Json *root = json_parse(text, n, path);
    free(text);
    return root;
}

// The value of `key`; NULL when obj is not an object, or when the key is absent or null.
const Json *json_get(const Json *obj, const char *key) {
    if (!obj || obj->type != 'o') return NULL;
    for (const Json *e = obj->child; e; e = e->next)
        if (!strcmp(e->key, key)) return e->type == '0' ? NULL : e;
    return NULL;
}

// Dies: `where`: "key" is VALUE; expected ... (on one line, whatever the value holds).
static void json_refuse(const Json *v, const char *key, const char *where, const char *expected) {
    static const char *const types = "oatf0";
    static const char *const words[] = {"an object", "a list", "true", "false", "null"};
    Str shown = v && strchr("sn", v->type)
        ? str(v->type == 's' ? "\"%.*s%s\"" : "%.*s%s",
              (int)min_size(v->str_len, 40), v->str, v->str_len > 40 ? "..." : "")
        : str("%s", v ? words[strchr(types, v->type) - types] : "missing");
    for (char *c = shown.s; *c; c++)
        if (iscntrl((unsigned char)*c)) *c = '?';
    die("%s: \"%s\" is %s; expected %s", where, key, shown.s, expected);
}

// Typed getters: the value of `key` in obj, or `fallback` when it is absent or null. They die naming `where`,
// the key, the value and what was expected. A required key has the fallback JSON_REQUIRED, NAN or NULL.
int64_t json_int(const Json *obj, const char *key, const char *where, int64_t lo, int64_t hi,
                 int64_t fallback) {
    const Json *v = json_get(obj, key);
    if (!v && fallback != JSON_REQUIRED) return fallback;
    if (!v || v->type != 'n' || !v->is_int || v->inum < lo || v->inum > hi)
        json_refuse(v, key, where, str("an integer from %" PRId64 " to %" PRId64, lo, hi).s);
    return v->inum;
}

double json_number(const Json *obj, const char *key, const char *where, double lo, double hi,
                   double fallback) {
    const Json *v = json_get(obj, key);
    if (!v && !isnan(fallback)) return fallback;
    if (!v || v->type != 'n' || !(v->num >= lo && v->num <= hi))
        json_refuse(v, key, where, str("a number from %g to %g", lo, hi).s);
    return v->num;
}

static int json_bool(const Json *obj, const char *key, const char *where, int fallback) {
    const Json *v = json_get(obj, key);
    if (v && v->type != 't' && v->type != 'f') json_refuse(v, key, where, "true or false");
    return v ? v->type == 't' : fallback;
}

const char *json_string(const Json *obj, const char *key, const char *where, const char *fallback) {
    const Json *v = json_get(obj, key);
    if (!v && fallback) return fallback;
    if (!v || v->type != 's' || strlen(v->str) != v->str_len) json_refuse(v, key, where, "a string");
    return v->str;
}

// Appends like printf.
void text_add(Text *t, const char *fmt, ...) {
    va_list args;
    for (int pass = 0, n = 0; pass < 2; pass++) { // measure, then print
        va_start(args, fmt);
        n = vsnprintf(pass ? t->s + t->n : NULL, pass ? (size_t)n + 1 : 0, fmt, args);
        va_end(args);
        assert(n >= 0 && t->n < INT_MAX / 4 - n);
        if (pass) t->n += n;
        else t->s = (char *)array_room(t->s, t->n + n + 1, &t->max, 1);
    }
}

// Appends s as a JSON string, quotes included (s is UTF-8).
void text_add_string(Text *t, const char *s) {
    text_add(t, "\"");
    for (; *s; s++)
        if (*s == '"' || *s == '\\') text_add(t, "\\%c", *s);
        else text_add(t, (unsigned char)*s < 0x20 ? "\\u%04x" : "%c", *s);
    text_add(t, "\"");
}

// The shortest decimal that reads back as x, for JSON: marked as a float (8.0, not 8); there is no NaN: null.
const char *json_decimal(double x) {
    char *s = (char *)shortest(x);
    return !isfinite(x) ? "null" : strpbrk(s, ".e") ? s : strcat(s, ".0");
}

// ==== 10. safetensors: reading and writing Hugging Face weight files =======================================
// OFFSET  SIZE  MEANING (https://github.com/huggingface/safetensors#format)
// 0       8     N, the header's length in bytes, little-endian (as is everything; so must this machine be)
// 8       N     JSON, padded with spaces:
//               {"__metadata__": {string: string},
//                NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
// 8 + N   -     the tensors, row-major; offsets count from here, and together they cover the rest exactly

// the first rows are ST_F32 .. ST_I32
static const struct { const char *name; size_t bytes; } st_dtypes[] = {
    {"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I32", 4}, {"F64", 8}, {"I64", 8}, {"I16", 2}, {"I8", 1},
    {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
enum { ST_MAX_HEADER = 100000000, /* the library's limit, too */ ST_MAX_DIMS = 4, ST_MAX_FILES = 1024,
       ST_PIECE = 1 << 16 /* 16-bit values on a thread's stack */ };

typedef struct StTensor {
    const char *name;
    int dtype, n_dims, file;        // file: index into StSet.paths
    int64_t shape[ST_MAX_DIMS];     // 0 beyond n_dims
    size_t offset, n_bytes, n;      // offset from the start of the file; n = elements
} StTensor;

struct StSet {                      // the tensors of one checkpoint, sorted by name
    StTensor *tensors;
    int n_tensors, max_tensors, n_files;
    char *paths[ST_MAX_FILES];
    int fds[ST_MAX_FILES];
    Json *headers[ST_MAX_FILES];    // own the names
};

// Appends the tensor of one header entry; checks all but how tensors lie next to each other.
static void st_add_tensor(StSet *s, const Json *e, const char *path, size_t data_start, size_t data_bytes) {
    const Json *dtype = json_get(e, "dtype"), *shape = json_get(e, "shape");
    const Json *span = json_get(e, "data_offsets");
    StTensor t = {e->key, 0, 0, s->n_files - 1, {0}, 0, 0, 1};
    if (!dtype || dtype->type != 's' || !shape || shape->type != 'a'
        || !span || span->type != 'a' || span->n != 2)
        die("%s: tensor %s: expected an object with \"dtype\", \"shape\" and two \"data_offsets\"",
            path, t.name);
    while (t.dtype < COUNT(st_dtypes) && strcmp(dtype->str, st_dtypes[t.dtype].name)) t.dtype++;
    if (t.dtype == COUNT(st_dtypes))
        die("%s: tensor %s has the unknown dtype \"%s\"", path, t.name, dtype->str);
    if (shape->n > ST_MAX_DIMS)
        die("%s: tensor %s has %d dimensions; at most %d are supported", path, t.name, shape->n, ST_MAX_DIMS);
    for (const Json *d = shape->child; d; d = d->next) {
        if (!d->is_int || d->inum < 0 || (d->inum && t.n > (size_t)INT64_MAX / 8 / (size_t)d->inum))
            die("%s: tensor %s: dimension %d of its shape is no size", path, t.name, t.n_dims);
        t.shape[t.n_dims++] = d->inum;
        t.n *= (size_t)d->inum;
    }
    const Json *begin = span->child, *end = begin->next;
    if (!begin->is_int || !end->is_int || begin->inum < 0 || end->inum < begin->inum
        || (size_t)end->inum > data_bytes)
        die("%s: tensor %s: its data_offsets lie outside of the %zu data bytes", path, t.name, data_bytes);
    t.offset = data_start + (size_t)begin->inum;
    t.n_bytes = (size_t)(end->inum - begin->inum);
    size_t needed = t.n * st_dtypes[t.dtype].bytes;
    if (t.n_bytes != needed)
        die("%s: tensor %s has %zu bytes of data, but its shape and dtype need %zu",
            path, t.name, t.n_bytes, needed);
    s->tensors = (StTensor *)array_room(s->tensors, s->n_tensors + 1, &s->max_tensors, sizeof t);
    s->tensors[s->n_tensors++] = t;
}

static int st_compare_offsets(const void *a, const void *b) {
    const StTensor *x = (const StTensor *)a, *y = (const StTensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes); // empty tensors first
}

// Opens a file, takes over its header and adds its tensors.
static void st_add_file(StSet *s, const char *path) {
    size_t size;
    uint64_t n_header;
    int f = s->n_files++, first = s->n_tensors;
    if (f == ST_MAX_FILES) die("%s: more than %d weight files", path, ST_MAX_FILES);
    // room for one even where there is none: qsort wants no NULL
    s->tensors = (StTensor *)array_room(s->tensors, first + 1, &s->max_tensors, sizeof *s->tensors);
    s->fds[f] = open_regular(path, "weights", &size);
    s->paths[f] = xstrdup(path);
    if (size < 8) die("%s: %zu bytes are too few for a safetensors file", path, size);
    read_exactly(s->fds[f], path, &n_header, 8, 0);
    if (n_header > size - 8 || n_header > ST_MAX_HEADER)
        die("%s: a header of %" PRIu64 " bytes in a file of %zu: truncated, or no safetensors file",
            path, n_header, size);
    char *text = (char *)xmalloc((size_t)n_header + 1);
    read_exactly(s->fds[f], path, text, (size_t)n_header, 8);
    Json *header = s->headers[f] = json_parse(text, (size_t)n_header, path);
    free(text);
    if (header->type != 'o') die("%s: the header is no JSON object", path);
    size_t start = 8 + (size_t)n_header, at = start;
    for (const Json *e = header->child; e; e = e->next) {
        if (strcmp(e->key, "__metadata__")) st_add_tensor(s, e, path, start, size - start);
        else if (e->type != 'o') die("%s: __metadata__ is no JSON object", path);
    }
    qsort(s->tensors + first, (size_t)(s->n_tensors - first), sizeof *s->tensors, st_compare_offsets);
    for (const StTensor *t = s->tensors + first; t < s->tensors + s->n_tensors; at += t++->n_bytes)
        if (t->offset != at)
            die("%s: tensor %s begins at byte %zu, but the one before it ends at %zu",
                path, t->name, t->offset, at);
    if (at != size) die("%s: the tensors end at byte %zu, but the file has %zu", path, at, size);
}

// The tensor of that name, or NULL.
const StTensor *st_find(const StSet *s, const char *name) {
    return (const StTensor *)bsearch(&name, s->tensors, (size_t)s->n_tensors, sizeof *s->tensors,
                                     compare_names);
}

static void st_sort_names(StSet *s) {
    qsort(s->tensors, (size_t)s->n_tensors, sizeof *s->tensors, compare_names);
    for (const StTensor *t = s->tensors; t + 1 < s->tensors + s->n_tensors; t++)
        if (!strcmp(t[0].name, t[1].name))
            die("%s and %s both hold tensor %s", s->paths[t[0].file], s->paths[t[1].file], t->name);
}

// Opens every file that the index names; index and files must agree on where each tensor is.
static void st_open_index(StSet *s, const char *folder, const char *index_path) {
    Json *index = json_read_file(index_path, ST_MAX_HEADER);
    const Json *map = json_get(index, "weight_map");
    if (!map || map->type != 'o') die("%s: \"weight_map\" is no JSON object", index_path);
    for (const Json *e = map->child; e; e = e->next) {
        int f = s->n_files - 1;
        if (e->type != 's' || !*e->str || strlen(e->str) != e->str_len || strchr(e->str, '/'))
            die("%s: tensor %s: expected the name of a file in the same directory", index_path, e->key);
        Str path = str("%s/%s", folder, e->str);
        while (f >= 0 && strcmp(s->paths[f], path.s)) f--;
        if (f < 0) st_add_file(s, path.s);
    }
    if (!s->n_files) die("%s: \"weight_map\" names no file", index_path);
    st_sort_names(s);
    for (const Json *e = map->child; e; e = e->next) {
        const StTensor *t = st_find(s, e->key);
        if (!t || strcmp(strrchr(s->paths[t->file], '/') + 1, e->str))
            die("%s: tensor %s is not in %s", index_path, e->key, e->str);
    }
    for (const StTensor *t = s->tensors; s->n_tensors > map->n; t++)    // names are unique: one is not listed
        if (!json_get(map, t->name))
            die("%s does not list tensor %s of %s", index_path, t->name, s->paths[t->file]);
    free(index);
}

// Opens all files that match the pattern as one set; NULL when none does.
static StSet *st_open_all(const char *pattern) {
    StSet *s = (StSet *)xcalloc(1, sizeof *s);
    glob_t found;
    if (glob(pattern, 0, NULL, &found)) return NULL;
    for (size_t i = 0; i < found.gl_pathc; i++) st_add_file(s, found.gl_pathv[i]);
    globfree(&found);
    st_sort_names(s);
    return s;
}

// Opens a Hugging Face checkpoint: a folder with model.safetensors, or model.safetensors.index.json and its
// shards; or one file. Checked here, before any weight is read: lengths, offsets, shapes, names, index.
StSet *st_open(const char *dir_or_file) {
    StSet *s = (StSet *)xcalloc(1, sizeof *s);
    struct stat info;
    Str one = str("%s/model.safetensors", dir_or_file), index = str("%s.index.json", one.s);
    if (stat(dir_or_file, &info)) die("%s: %s", dir_or_file, strerror(errno));
    if (!S_ISDIR(info.st_mode)) st_add_file(s, dir_or_file);
    else if (!access(one.s, F_OK)) st_add_file(s, one.s);
    else if (!access(index.s, F_OK)) st_open_index(s, dir_or_file, index.s);
    else die("%s holds neither model.safetensors nor its .index.json; save the model as safetensors",
             dir_or_file);
    st_sort_names(s);
    return s;
}

// IEEE half to float: exact, subnormals included.
static float st_f16_to_float(uint32_t h) {
    uint32_t exponent = h >> 10 & 31, fraction = h & 1023, bits;
    float x = (float)fraction * 0x1p-24f;   // exponent 0
    memcpy(&bits, &x, 4);
    if (exponent) bits = (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    bits |= h >> 15 << 31;
    memcpy(&x, &bits, 4);
    return x;
}

// Elements first .. first+count-1 of a tensor as float, from F32, BF16 or F16; dies for another dtype, naming
// file and tensor. Threads may call it at the same time.
void st_read(const StSet *s, const StTensor *t, size_t first, size_t count, float *out) {
    const char *path = s->paths[t->file];
    const size_t size = st_dtypes[t->dtype].bytes;
    assert(first <= t->n && count <= t->n - first);
    if (t->dtype > ST_F16)
        die("%s: tensor %s has dtype %s; expected F32, BF16 or F16", path, t->name, st_dtypes[t->dtype].name);
    size_t offset = t->offset + first * size;
    if (t->dtype == ST_F32) {
        read_exactly(s->fds[t->file], path, out, count * size, offset);
        return;
    }
    uint16_t half[ST_PIECE];
    for (size_t n; count; count -= n, offset += n * size, out += n) {
        n = min_size(count, ST_PIECE);
        read_exactly(s->fds[t->file], path, half, n * size, offset);
        for (size_t i = 0; i < n && t->dtype == ST_F16; i++) out[i] = st_f16_to_float(half[i]);
        for (size_t i = 0; i < n && t->dtype == ST_BF16; i++) {
            union { uint32_t u; float f; } bits = {(uint32_t)half[i] << 16};
            out[i] = bits.f;
        }
    }
}

void st_close(StSet *s) {
    if (!s) return;
    for (int f = 0; f < s->n_files; f++) {
        close(s->fds[f]);
        free(s->paths[f]);
        free(s->headers[f]);
    }
    free(s->tensors);
    free(s);
}

// Writes one file in constant memory: create, declare every tensor (all of one dtype), begin, write the
// values in that order, finish. Threads may write at the same time, each to a place that was taken (st_take).
// A failing disk does not end the program: later writes do nothing, and the caller, who learns the error from
// st_finish, removes the new folder and keeps the old checkpoint.
struct StWriter {
    int fd, failed, dtype;      // failed: the first errno
    Text header;
    size_t data_bytes;          // declared
    size_t taken, end;          // of the file, from its start: what has a writer, all
    uint32_t crc;
};

static void st_put_at(StWriter *w, size_t place, const void *bytes, size_t n) {
    const char *p = (const char *)bytes;
    while (n && !w->failed) {
        const ssize_t put = pwrite(w->fd, p, n, (off_t)place);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) w->failed = put ? errno : ENOSPC;
        else p += put, place += (size_t)put, n -= (size_t)put;
    }
}

// Bytes at the end of what is there, of a file that has no other end yet.
static void st_put(StWriter *w, const void *bytes, size_t n) {
    w->crc = crc32_update(w->crc, bytes, n);
    st_put_at(w, w->taken, bytes, n);
    w->taken += n;
}

// Creates (or empties) the file. metadata: a JSON object of strings such as {"format":"pt"}, or NULL.
StWriter *st_create(const char *path, const char *metadata) {
    StWriter *w = (StWriter *)xcalloc(1, sizeof *w);
    w->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->fd < 0) w->failed = errno;
    text_add(&w->header, metadata ? "{\"__metadata__\":%s" : "{", metadata);
    return w;
}

// Announces the next tensor: dtype ST_F32 or ST_BF16.
void st_declare(StWriter *w, const char *name, int dtype, int n_dims, const int64_t *shape) {
    size_t begin = w->data_bytes, n = 1;
    assert((dtype == ST_F32 || dtype == ST_BF16) && (!begin || dtype == w->dtype) && n_dims <= ST_MAX_DIMS);
    w->dtype = dtype;
    text_add(&w->header, w->header.n > 1 ? "," : "");
    text_add_string(&w->header, name);
    text_add(&w->header, ":{\"dtype\":\"%s\",\"shape\":[", st_dtypes[dtype].name);
    for (int d = 0; d < n_dims; d++) {
        text_add(&w->header, d ? ",%" PRId64 : "%" PRId64, shape[d]);
        n *= (size_t)shape[d];
    }
    w->data_bytes += n * st_dtypes[dtype].bytes;
    text_add(&w->header, "],\"data_offsets\":[%zu,%zu]}", begin, w->data_bytes);
}

// Writes the header; no st_declare after it. Spaces bring the data to a multiple of 8, as the library does.
void st_begin(StWriter *w) {
    text_add(&w->header, "}");
    text_add(&w->header, "%*s", (8 - w->header.n % 8) % 8, "");
    uint64_t length = (uint64_t)w->header.n;
    st_put(w, &length, 8);
    st_put(w, w->header.s, (size_t)length);
    w->end = w->taken + w->data_bytes;
    w->crc = crc32_before(w->crc, w->data_bytes);
}

// float to bf16, round to nearest even; NaN stays NaN (rounding could carry it to infinity).
static inline uint16_t st_float_to_bf16(float x) {
    union { float f; uint32_t u; } bits = {x};
    const uint32_t rounded = (bits.u + 0x7FFF + (bits.u >> 16 & 1)) >> 16;
    return (uint16_t)((bits.u << 1) > 0xFF000000u ? bits.u >> 16 | 0x40 : rounded);
}

// The place of the next elements in the order of declaration; they may span several tensors.
size_t st_take(StWriter *w, size_t count) {
    const size_t place = w->taken;
    w->taken += count * st_dtypes[w->dtype].bytes;
    return place;
}

void st_write_at(StWriter *w, size_t place, const float *values, size_t count) {
    uint16_t half[ST_PIECE];
    uint32_t crc = 0;
    for (size_t n; count; count -= n, values += n) {
        const void *bytes = w->dtype == ST_F32 ? (const void *)values : half;
        n = min_size(count, ST_PIECE);
        for (size_t i = 0; i < n && w->dtype == ST_BF16; i++) half[i] = st_float_to_bf16(values[i]);
        const size_t n_bytes = n * st_dtypes[w->dtype].bytes;
        crc = crc32_update(crc, bytes, n_bytes);
        st_put_at(w, place, bytes, n_bytes);
        place += n_bytes;
    }
    crc = crc32_before(crc, w->end - place);
    #pragma omp atomic
    w->crc ^= crc;
}

// The next elements.
void st_write(StWriter *w, const float *values, size_t count) {
    st_write_at(w, st_take(w, count), values, count);
}

// Fsyncs, closes, frees; all declared values must have come. Returns 0 or the errno of the first failure.
// With 0, *crc (of the whole file) and *file_bytes are known; NULL: not asked for.
int st_finish(StWriter *w, uint32_t *crc, size_t *file_bytes) {
    assert(!w->end || w->taken == w->end);
    if (!w->failed && fsync(w->fd)) w->failed = errno;
    if (w->fd >= 0 && close(w->fd) && !w->failed) w->failed = errno;
    int failed = w->failed;
    if (crc) *crc = w->crc;
    if (file_bytes) *file_bytes = w->taken;
    free(w->header.s); free(w);
    return failed;
}

// ==== 11. Model configuration: Hugging Face's config.json and the presets ==================================
// The integers of a model: field, key in config.json, smallest and largest value, what an absent key means.
#define CONFIG_INTS(X) \
    X(V,     "vocab_size",              2, 1 << 24, JSON_REQUIRED) \
    X(L,     "num_hidden_layers",       1, 1 << 12, JSON_REQUIRED) \
    X(C,     "hidden_size",             1, 1 << 20, JSON_REQUIRED) \
    X(H,     "num_attention_heads",     1, 1 << 14, JSON_REQUIRED) \
    X(K,     "num_key_value_heads",     1, 1 << 14, 0 /* = H */)   \
    X(D,     "head_dim",                1, 1 << 14, 0 /* = C/H */) \
    X(F,     "intermediate_size",       1, 1 << 22, JSON_REQUIRED) \
    X(max_T, "max_position_embeddings", 1, 1 << 28, JSON_REQUIRED)
#define CONFIG_NUMBERS(X) \
    X(eps,      "rms_norm_eps",      0, 1, 1e-6) \
    X(init_std, "initializer_range", 0, 1, 0.02)

// window_switch: sliding_window counts only if use_sliding_window says so
static const Family config_families[] = {
    {"llama",   "LlamaForCausalLM",   0, 0, 0},
    {"mistral", "MistralForCausalLM", 0, 0, 0},
    {"qwen2",   "Qwen2ForCausalLM",   1, 0, 1},
    {"qwen3",   "Qwen3ForCausalLM",   0, 1, 1},
};

// Keys that would change the computation, and the one value that we compute.
static const struct { const char *key, *only; } config_fixed[] = {
    {"hidden_act", "silu"}, {"attention_bias", "false"}, {"mlp_bias", "false"}, {"attention_dropout", "0"},
    {"partial_rotary_factor", "1"}, {"quantization_config", "null"}, {"quantization", "null"},
    {"num_experts", "0"}, {"num_local_experts", "0"}, {"n_routed_experts", "0"},
    {"num_experts_per_tok", "0"}, {"moe_intermediate_size", "0"},
};

// The presets; rope factor 0 = plain RoPE, else "llama3" with low 1, high 4, original length 8192.
static const struct {
    const char *name, *family;
    int V, L, C, H, K, D, F, max_T, tied;
    double eps, rope_theta, init_std, rope_factor;
    int sliding_window, bos, eos;
} config_presets[] = {
    {"tiny",         "qwen3",      640,  2,  192,  6,  6,  32,   512,    256, 1,
        1e-6, 1e4,  0.10,  0,    0,     -1,     -1},
    {"15M",          "llama",    32000,  6,  288,  6,  6,  48,   768,   1024, 1,
        1e-5, 1e4,  0.02,  0,    0,      1,      2},
    {"100M",         "llama",    32000, 12,  768, 12,  4,  64,  2048,   2048, 1,
        1e-5, 1e4,  0.02,  0,    0,      1,      2},
    {"3B",           "llama",    32000, 28, 2048, 16,  2, 128, 11008,   4096, 0,
        1e-5, 1e4,  0.02,  0,    0,      1,      2},
    {"30B",          "llama",    32000, 60, 6656, 64, 64, 104, 17920,   4096, 0,
        1e-5, 1e4,  0.02,  0,    0,      1,      2},
    {"llama3.2-1B",  "llama",   128256, 16, 2048, 32,  8,  64,  8192, 131072, 1,
        1e-5, 5e5,  0.02, 32,    0, 128000, 128001},
    {"llama3.1-8B",  "llama",   128256, 32, 4096, 32,  8, 128, 14336, 131072, 0,
        1e-5, 5e5,  0.02,  8,    0, 128000, 128001},
    {"qwen2.5-0.5B", "qwen2",   151936, 24,  896, 14,  2,  64,  4864,  32768, 1,
        1e-6, 1e6,  0.02,  0,    0, 151643, 151643},
    {"qwen2.5-3B",   "qwen2",   151936, 36, 2048, 16,  2, 128, 11008,  32768, 1,
        1e-6, 1e6,  0.02,  0,    0, 151643, 151643},
    {"qwen3-0.6B",   "qwen3",   151936, 28, 1024, 16,  8, 128,  3072,  40960, 1,
        1e-6, 1e6,  0.02,  0,    0, 151643, 151645},
    {"mistral-7B",   "mistral",  32000, 32, 4096, 32,  8, 128, 14336,  32768, 0,
        1e-5, 1e4,  0.02,  0, 4096,      1,      2},
    {"smollm2-135M", "llama",    49152, 30,  576,  9,  3,  64,  1536,   8192, 1,
        1e-5, 1e5, 1./24,  0,    0,      0,      0},
};

// Sets the family and what depends on it; 0 when the name is unknown.
static int config_set_family(Config *c, const char *name) {
    int i = 0;
    while (i < COUNT(config_families) && strcmp(name, config_families[i].name)) i++;
    if (i == COUNT(config_families)) return 0;
    c->family = &config_families[i];
    c->qkv_bias = c->family->qkv_bias;
    c->qk_norm = c->family->qk_norm;
    return 1;
}

// Sets V and with it Vp: GEMMs and shards like the padded size.
void config_set_vocab(Config *c, int V) {
    c->V = V;
    c->Vp = CEIL_DIV(V, 128) * 128;
}

// Parameters of the model, as Hugging Face counts them (a tied head once).
double config_params(const Config *c) {
    double C = c->C, q = (double)c->H * c->D, kv = (double)c->K * c->D;
    double block = 2 * C * q + 2 * C * kv + 3 * C * c->F + 2 * C;      // q o, k v, gate up down, two norms
    block += (c->qkv_bias ? q + 2 * kv : 0) + (c->qk_norm ? 2 * c->D : 0);
    return (c->tied ? 1 : 2) * (double)c->V * C + c->L * block + C;
}

// Dies when the numbers make no model that we can train; `where` names their source.
void config_check(const Config *c, const char *where) {
#define CHECK(field, key, lo, hi, fallback) \
    if (c->field < (lo) || c->field > (hi)) \
        die("%s: \"%s\" is %d; expected an integer from %d to %d", where, key, c->field, lo, hi);
    CONFIG_INTS(CHECK)
#undef CHECK
    if (c->H % c->K)
        die("%s: \"num_attention_heads\" is %d; expected a multiple of \"num_key_value_heads\", %d",
            where, c->H, c->K);
    if (c->D % 8 || c->D > 128)
        die("%s: \"head_dim\" is %d; expected a multiple of 8 up to 128", where, c->D);
    if (c->rope_factor > 0 && !(c->rope_low < c->rope_high))
        die("%s: \"high_freq_factor\" is %g; expected more than \"low_freq_factor\", %g",
            where, c->rope_high, c->rope_low);
    if (c->bos >= c->V || c->eos >= c->V)
        die("%s: \"%s\" is %d; expected a token id below \"vocab_size\", %d", where,
            c->bos >= c->V ? "bos_token_id" : "eos_token_id", c->bos >= c->V ? c->bos : c->eos, c->V);
    if (config_params(c) >= 0x1p40)
        die("%s: the model has %.3g parameters; expected fewer than %.3g", where, config_params(c), 0x1p40);
}

// RoPE: transformers 4 writes rope_theta and, unless plain, rope_scaling; transformers 5 puts all into
// rope_parameters. As there, rope_scaling wins over rope_parameters, and rope_theta inside over one outside.
static void config_read_rope(Config *c, const Json *j, const char *where) {
    const Json *rope = json_get(j, "rope_scaling");
    if (!rope || (rope->type == 'o' && !rope->n)) rope = json_get(j, "rope_parameters");
    if (rope && rope->type != 'o') json_refuse(rope, rope->key, where, "an object or null");
    const char *type_key = json_get(rope, "rope_type") ? "rope_type" : "type";  // before transformers 4.43
    const char *type = json_string(rope, type_key, where, "default");
    if (strcmp(type, "default") && strcmp(type, "llama3"))
        json_refuse(json_get(rope, type_key), "rope_type", where,
                    "\"default\" or \"llama3\", the supported kinds of RoPE");
    const Json *part = json_get(rope, "partial_rotary_factor");
    if (part && !(part->type == 'n' && part->num == 1)) json_refuse(part, part->key, where, "1");
    for (const Json *e = rope ? rope->child : NULL; e; e = e->next)
        if (e->type == 'o') json_refuse(e, e->key, where, "one set of RoPE parameters for all layers");
    c->rope_theta = json_number(json_get(rope, "rope_theta") ? rope : j, "rope_theta", where, 1, 1e12, 10000);
    if (strcmp(type, "llama3")) return;
    c->rope_factor = json_number(rope, "factor", where, 1, 1e6, NAN);
    c->rope_low = json_number(rope, "low_freq_factor", where, 1e-6, 1e6, NAN);
    c->rope_high = json_number(rope, "high_freq_factor", where, 1e-6, 1e6, NAN);
    c->rope_original_T = (int)json_int(rope, "original_max_position_embeddings", where, 1, 1 << 28, c->max_T);
}

// Sliding windows: Qwen's count only when switched on, and only from layer max_window_layers on.
static void config_read_window(Config *c, const Json *j, const char *where) {
    int has_switch = c->family->window_switch, l = 0;
    const Json *types = has_switch ? json_get(j, "layer_types") : NULL;
    c->sliding_window = (int)json_int(j, "sliding_window", where, 0, INT_MAX, 0);
    if (!json_bool(j, "use_sliding_window", where, !has_switch)) c->sliding_window = 0;
    c->window_layer = has_switch ? (int)json_int(j, "max_window_layers", where, 0, INT_MAX, 28) : 0;
    if (types && types->type != 'a') json_refuse(types, "layer_types", where, "a list");
    for (const Json *e = types ? types->child : NULL; e; e = e->next) {
        int slides = c->sliding_window && l++ >= c->window_layer;
        const char *want = slides ? "sliding_attention" : "full_attention";
        if (e->type != 's' || strcmp(e->str, want)) json_refuse(e, "layer_types", where, want);
    }
}

// Reads and checks config.json of transformers 4 or 5; dies naming `where`, the key, its value and what was
// expected. null means absent; keys that do not change the computation are ignored.
void config_from_json(Config *c, const char *text, size_t n, const char *where) {
    Json *j = json_parse(text, n, where);
    memset(c, 0, sizeof *c);
    if (j->type != 'o') die("%s: expected a JSON object", where);
    if (!config_set_family(c, json_string(j, "model_type", where, NULL)))
        json_refuse(json_get(j, "model_type"), "model_type", where, "llama, mistral, qwen2 or qwen3");
    for (int i = 0; i < COUNT(config_fixed); i++) {
        const Json *v = json_get(j, config_fixed[i].key);
        const char *only = config_fixed[i].only;
        int same = !v || (v->type == 's' ? !strcmp(v->str, only) : v->type == 'f' ? !strcmp(only, "false") :
                          v->type == 'n' && isdigit((unsigned char)*only) && v->num == atof(only));
        if (!same) json_refuse(v, config_fixed[i].key, where, only);
    }
#define READ_INT(field, key, lo, hi, fallback) c->field = (int)json_int(j, key, where, lo, hi, fallback);
#define READ_NUMBER(field, key, lo, hi, fallback) c->field = json_number(j, key, where, lo, hi, fallback);
    CONFIG_INTS(READ_INT) CONFIG_NUMBERS(READ_NUMBER)
    config_set_vocab(c, c->V);
    if (!c->K) c->K = c->H;
    if (!c->D && c->C % c->H)
        die("%s: \"hidden_size\" is %d; without \"head_dim\" expected a multiple of "
            "\"num_attention_heads\", %d", where, c->C, c->H);
    if (!c->D) c->D = c->C / c->H;
    c->tied = json_bool(j, "tie_word_embeddings", where, 0);
    config_read_rope(c, j, where);
    config_read_window(c, j, where);
    c->bos = (int)json_int(j, "bos_token_id", where, -1, INT_MAX, -1);
    const Json *eos = json_get(j, "eos_token_id");       // chat models list several: the first
    if (eos && eos->type == 'a') {
        if (!eos->child || !eos->child->is_int || eos->child->inum < 0 || eos->child->inum > INT_MAX)
            json_refuse(eos->child, "eos_token_id", where, "token ids");
        c->eos = (int)eos->child->inum;
    } else c->eos = (int)json_int(j, "eos_token_id", where, -1, INT_MAX, -1);
    free(j);
    config_check(c, where);
}

// " tiny 15M ...": for messages
const char *config_preset_names(void) {
    static char names[512];
    names[0] = 0;
    for (int i = 0; i < COUNT(config_presets); i++) strcat(strcat(names, " "), config_presets[i].name);
    return names;
}

// Fills c from the preset table; 0 when the name is unknown.
int config_preset(Config *c, const char *name) {
    int i = 0;
    while (i < COUNT(config_presets) && strcmp(name, config_presets[i].name)) i++;
    if (i == COUNT(config_presets)) return 0;
    memset(c, 0, sizeof *c);
    config_set_family(c, config_presets[i].family);
#define COPY(field, ...) c->field = config_presets[i].field;
    CONFIG_INTS(COPY) CONFIG_NUMBERS(COPY)
    COPY(tied) COPY(rope_theta) COPY(rope_factor) COPY(sliding_window) COPY(bos) COPY(eos)
#undef COPY
    config_set_vocab(c, c->V);
    if (c->rope_factor > 0) { c->rope_low = 1; c->rope_high = 4; c->rope_original_T = 8192; }
    config_check(c, name);
    return 1;
}

static void config_add_id(Text *t, const char *key, int id) {
    text_add(t, id < 0 ? "  \"%s\": null,\n" : "  \"%s\": %d,\n", key, id);
}

// The members of rope_scaling, and with rope_theta those of rope_parameters.
static void config_add_rope(Text *t, const Config *c, int with_theta) {
    text_add(t, "{\n    \"rope_type\": \"%s\"", c->rope_factor > 0 ? "llama3" : "default");
    if (with_theta) text_add(t, ",\n    \"rope_theta\": %s", json_decimal(c->rope_theta));
    if (c->rope_factor > 0)
        text_add(t, ",\n    \"factor\": %s,\n    \"low_freq_factor\": %s,\n    \"high_freq_factor\": %s"
                 ",\n    \"original_max_position_embeddings\": %d",
                 json_decimal(c->rope_factor), json_decimal(c->rope_low), json_decimal(c->rope_high),
                 c->rope_original_T);
    text_add(t, "\n  }");
}

// config.json with the keys of transformers 4 and of 5; dtype: "float32" or "bfloat16". The caller frees it.
char *config_to_json(const Config *c, const char *dtype) {
    Text t = {NULL, 0, 0};
    int llama = !strcmp(c->family->name, "llama");
    text_add(&t, "{\n  \"architectures\": [\n    \"%s\"\n  ],\n", c->family->class_name);
    text_add(&t, "  \"model_type\": \"%s\",\n  \"hidden_act\": \"silu\",\n", c->family->name);
#define WRITE_INT(field, key, lo, hi, fallback) text_add(&t, "  \"" key "\": %d,\n", c->field);
#define WRITE_NUMBER(field, key, lo, hi, fallback) \
    text_add(&t, "  \"" key "\": %s,\n", json_decimal(c->field));
    CONFIG_INTS(WRITE_INT) CONFIG_NUMBERS(WRITE_NUMBER)
    text_add(&t, "  \"tie_word_embeddings\": %s,\n", c->tied ? "true" : "false");
    if (llama) text_add(&t, "  \"attention_bias\": false,\n  \"mlp_bias\": false,\n");
    if (c->family->window_switch)
        text_add(&t, "  \"use_sliding_window\": %s,\n  \"max_window_layers\": %d,\n",
                 c->sliding_window ? "true" : "false", c->window_layer);
    if (c->sliding_window || !llama)
        config_add_id(&t, "sliding_window", c->sliding_window ? c->sliding_window : -1);
    text_add(&t, "  \"rope_theta\": %s,\n  \"rope_scaling\": ", json_decimal(c->rope_theta));
    if (c->rope_factor > 0) config_add_rope(&t, c, /*with_theta=*/0);
    else text_add(&t, "null");
    text_add(&t, ",\n  \"rope_parameters\": ");
    config_add_rope(&t, c, /*with_theta=*/1);
    text_add(&t, ",\n");
    config_add_id(&t, "bos_token_id", c->bos);
    config_add_id(&t, "eos_token_id", c->eos);
    text_add(&t, "  \"dtype\": \"%s\",\n  \"torch_dtype\": \"%s\"\n}\n", dtype, dtype);
    return t.s;
}

// ---- the parameter table: every tensor's name, place, shape, initial value and decay, once ----------------
// Parameters lie in flat buffers, unit after unit: the embedding, each layer, the final norm with the head. A
// unit is what is reduced, sharded and saved together. In it q|k|v (and their biases) and gate|up are
// neighbours: each group is one matrix for the matmul. Other tensors start at multiples of 64 elements.
enum { MAX_TENSORS_PER_UNIT = 14, TENSOR_ALIGN = 64, UNIT_ALIGN = 128 };
static void table_unit(ParamTable *p, const char *name, size_t vocab_padding) {
    Unit *u = &p->units[p->n_units++];
    snprintf(u->name, sizeof u->name, "%s", name);
    u->at = p->n;
    u->vocab_padding = vocab_padding;
    u->first_tensor = p->n_tensors;
}

// Appends a tensor to the last unit. joined: starts right after the previous one, as part of the same matrix.
static void table_tensor(ParamTable *p, const char *prefix, const char *name, int rows, int cols,
                         int init, int joined) {
    Tensor *t = &p->tensors[p->n_tensors++];
    Unit *u = &p->units[p->n_units - 1];
    snprintf(t->name, sizeof t->name, "%s%s", prefix, name);
    t->unit = p->n_units - 1;
    if (!joined) u->n = CEIL_DIV(u->n, TENSOR_ALIGN) * TENSOR_ALIGN;
    t->at = u->n;
    t->n = (size_t)rows * (cols ? cols : 1);
    t->rows = rows;
    t->cols = cols;
    t->init = init;
    t->decay = cols > 0;    // matrices decay, norms and biases do not
    u->n += t->n;
    u->n_tensors++;
    u->n_padded = CEIL_DIV(u->n + u->vocab_padding, p->unit_align) * p->unit_align;
    p->n = u->at + u->n_padded;
    p->n_params += t->n;
}

// The table of a model; unit sizes are divisible by the number of ranks.
void param_table_build(ParamTable *p, const Config *c, int world) {
    memset(p, 0, sizeof *p);
    p->units = (Unit *)xcalloc((size_t)c->L + 2, sizeof(Unit));
    p->tensors = (Tensor *)xcalloc(((size_t)c->L + 2) * MAX_TENSORS_PER_UNIT, sizeof(Tensor));
    p->unit_align = (size_t)UNIT_ALIGN * world;
    size_t vocab_padding = (size_t)(c->Vp - c->V) * c->C;
    table_unit(p, "embed", vocab_padding);
    table_tensor(p, "model.", "embed_tokens.weight", c->V, c->C, INIT_NORMAL, 0);
    for (int l = 0; l < c->L; l++) {
        char unit[24], x[40];
        snprintf(unit, sizeof unit, "layers.%d", l);
        snprintf(x, sizeof x, "model.layers.%d.", l);
        table_unit(p, unit, 0);
        table_tensor(p, x, "input_layernorm.weight", c->C, 0, INIT_ONE, 0);
        table_tensor(p, x, "self_attn.q_proj.weight", c->H * c->D, c->C, INIT_NORMAL, 0);
        table_tensor(p, x, "self_attn.k_proj.weight", c->K * c->D, c->C, INIT_NORMAL, 1);
        table_tensor(p, x, "self_attn.v_proj.weight", c->K * c->D, c->C, INIT_NORMAL, 1);
        if (c->qkv_bias) {
            table_tensor(p, x, "self_attn.q_proj.bias", c->H * c->D, 0, INIT_ZERO, 0);
            table_tensor(p, x, "self_attn.k_proj.bias", c->K * c->D, 0, INIT_ZERO, 1);
            table_tensor(p, x, "self_attn.v_proj.bias", c->K * c->D, 0, INIT_ZERO, 1);
        }
        if (c->qk_norm) {
            table_tensor(p, x, "self_attn.q_norm.weight", c->D, 0, INIT_ONE, 0);
            table_tensor(p, x, "self_attn.k_norm.weight", c->D, 0, INIT_ONE, 0);
        }
        table_tensor(p, x, "self_attn.o_proj.weight", c->C, c->H * c->D, INIT_NORMAL, 0);
        table_tensor(p, x, "post_attention_layernorm.weight", c->C, 0, INIT_ONE, 0);
        table_tensor(p, x, "mlp.gate_proj.weight", c->F, c->C, INIT_NORMAL, 0);
        table_tensor(p, x, "mlp.up_proj.weight", c->F, c->C, INIT_NORMAL, 1);
        table_tensor(p, x, "mlp.down_proj.weight", c->C, c->F, INIT_NORMAL, 0);
    }
    table_unit(p, "head", c->tied ? 0 : vocab_padding);
    table_tensor(p, "model.", "norm.weight", c->C, 0, INIT_ONE, 0);
    if (!c->tied) table_tensor(p, "", "lm_head.weight", c->V, c->C, INIT_NORMAL, 0);
}

// The tensor of a unit whose name ends in `suffix`, or NULL.
const Tensor *table_find(const ParamTable *p, int unit, const char *suffix) {
    const Tensor *t = p->tensors + p->units[unit].first_tensor;
    for (int i = p->units[unit].n_tensors; i > 0; i--, t++) {
        size_t n = strlen(t->name), m = strlen(suffix);
        if (n >= m && !strcmp(t->name + n - m, suffix)) return t;
    }
    return NULL;
}

// ---- which model ------------------------------------------------------------------------------------------
static Config read_config(const char *dir_or_file, int is_dir) {
    Config c;
    Str path = str(is_dir ? "%s/config.json" : "%s", dir_or_file);
    size_t n;
    char *text = read_text_file(path.s, 1 << 24, &n);
    config_from_json(&c, text, n, path.s);
    free(text);
    return c;
}

// The model of --preset, --config, --init-from or the checkpoint resume_dir (or NULL). V 0: the data decides.
Config choose_config(const char *resume_dir) {
    Config c;
    const char *preset = opt.preset ? opt.preset : "tiny";
    if (opt.init_from) return read_config(opt.init_from, 1);
    if (opt.config) c = read_config(opt.config, 0);
    else if (!config_preset(&c, preset))
        die("--preset %s is unknown; choose one of%s", preset, config_preset_names());
    if (!opt.config && !strcmp(preset, "tiny")) c.V = 0;
    if (!resume_dir) return c;
    Config saved = read_config(resume_dir, 1);
    if (opt.preset || opt.config) {
        if (!c.V) c.V = saved.V, c.Vp = saved.Vp, c.bos = saved.bos, c.eos = saved.eos;
        char *a = config_to_json(&c, "float32"), *b = config_to_json(&saved, "float32");
        if (strcmp(a, b))
            die("--resume %s: the checkpoint holds another model than %s; leave that option out "
                "or name another --out", resume_dir, opt.preset ? "--preset" : "--config");
        free(a), free(b);
    }
    return saved;
}

// ==== 12. Tokenizer: text -> ids for prompts, ids -> bytes for samples =====================================
// Two file formats, both little endian (ours: data/README.md; the other is llama2.c's tokenizer.bin):
//   ours      words of 4 bytes: 0 magic 20251002 | 1 version 1 | 2 kind: 0 BPE, 1 greedy | 3 vocabulary V
//             | 4 BOS or -1 | 5 EOS or -1 | 6 a space goes before the text: 0, 1 | 7 zero;
//             then V records: float32 score, int32 length, bytes
//   llama2.c  int32 longest piece; then such records until the file ends. BPE with a space before the text;
//             ids 0 <unk>, 1 BOS, 2 EOS, 3..258 the bytes <0x00>..<0xFF>
// Kind 0 takes the code points of the text that are pieces, the bytes of those that are not, and then joins,
// again and again, the adjacent pair whose union is the piece with the highest score, the leftmost of equals.
// Kind 1 takes the longest piece at each position. Text never becomes BOS, EOS, or a piece with score -1e30
// (other special tokens).
#define TOKENIZER_MAGIC 20251002
#define NO_MERGE (-1e30f)

typedef struct Piece { const char *s; int n; float score; } Piece;     // n bytes in the file, may be 0

// The slot where the piece with these bytes is, or where it would go.
static int *tokenizer_slot(const Tokenizer *t, const char *s, size_t n) {
    for (uint64_t h = hash_bytes(s, n); ; h++) {
        int *id = &t->slot[h & (t->slots - 1)];
        if (*id < 0 || ((size_t)t->piece[*id].n == n && memcmp(t->piece[*id].s, s, n) == 0)) return id;
    }
}

// The byte that a piece of the form <0xHH> stands for, else -1.
static int piece_byte(const Piece *piece) {
    const char *hex = "0123456789ABCDEF", *s = piece->s;
    if (piece->n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>' || !s[3] || !s[4]) return -1;
    const char *high = strchr(hex, s[3]), *low = strchr(hex, s[4]);
    return high && low ? (int)(high - hex) * 16 + (int)(low - hex) : -1;
}

// Points t at the V records that fill the file from `at` to its end; V = 0: as many as there are.
static void tokenizer_records(Tokenizer *t, size_t at, size_t file_bytes) {
    // a record has at least 8 bytes
    size_t room = (file_bytes - at) / 8, n = t->V ? (size_t)t->V : room, id = 0;
    if (n > room) die("tokenizer '%s' is truncated: its %zu pieces do not fit; make it again", t->path, n);
    t->piece = (Piece *)xmalloc(n * sizeof(Piece));
    for (; id < n && file_bytes - at >= 8; id++) {
        Piece *p = &t->piece[id];
        memcpy(&p->score, t->file + at, 4);
        memcpy(&p->n, t->file + at + 4, 4);
        p->s = t->file + (at += 8);
        if (p->n < 0 || (size_t)p->n > file_bytes - at || !(fabsf(p->score) < 1e38f))
            die("tokenizer '%s' is damaged or truncated: piece %zu has length %d and score %g; make it again",
                t->path, id, p->n, (double)p->score);
        at += (size_t)p->n;
    }
    if (at < file_bytes || id == 0 || (t->V && id < n))
        die("tokenizer '%s' is damaged or truncated: %zu pieces end at byte %zu of %zu; make it again",
            t->path, id, at, file_bytes);
    t->V = (int)id;
}

// Fills the hash table with what text can become, and byte_id.
static void tokenizer_index(Tokenizer *t) {
    memset(t->byte_id, 255, sizeof t->byte_id);             // all -1, as is the table
    for (t->slots = 2; t->slots < 2 * (uint32_t)t->V; ) t->slots *= 2;
    t->slot = (int *)xmalloc(t->slots * sizeof(int));
    memset(t->slot, 255, t->slots * sizeof(int));
    for (int id = 0; id < t->V; id++) {
        const Piece *p = &t->piece[id];
        int byte = piece_byte(p);
        if (p->n == 0 || id == t->bos || id == t->eos) continue;
        if (byte >= 0) t->byte_id[byte] = id;
        else if (p->n == 1 && t->byte_id[(unsigned char)*p->s] < 0) t->byte_id[(unsigned char)*p->s] = id;
        if (byte >= 0 || p->score <= NO_MERGE) continue;
        int *slot = tokenizer_slot(t, p->s, (size_t)p->n);
        if (*slot < 0 || p->score > t->piece[*slot].score) *slot = id;  // the better one of two equal pieces
    }
}

// Reads a tokenizer of either format; dies naming the file when it is neither, or damaged.
Tokenizer *tokenizer_open(const char *path) {
    Tokenizer *t = (Tokenizer *)xcalloc(1, sizeof(Tokenizer));
    size_t n;
    int32_t h[8] = {0};
    t->path = xstrdup(path);
    t->file = read_text_file(path, (size_t)1 << 28, &n);
    memcpy(h, t->file, n < sizeof h ? n : sizeof h);
    if (n >= 4 && h[0] == TOKENIZER_MAGIC) {
        if (n < sizeof h) die("tokenizer '%s' is truncated inside its header; make it again", path);
        if (h[1] != 1) die("tokenizer '%s' has version %d, this program reads version 1", path, h[1]);
        if (h[2] < 0 || h[2] > 1 || h[3] < 1 || h[4] < -1 || h[4] >= h[3] || h[5] < -1 || h[5] >= h[3]
            || h[6] < 0 || h[6] > 1 || h[7] != 0)
            die("tokenizer '%s' has a damaged header: kind %d, %d pieces, BOS %d, EOS %d, space %d, %d; "
                "make it again", path, h[2], h[3], h[4], h[5], h[6], h[7]);
        t->kind = h[2]; t->V = h[3]; t->bos = h[4]; t->eos = h[5]; t->prefix_space = h[6];
        tokenizer_records(t, sizeof h, n);
    } else {
        if (n < 12 || h[0] < 1 || h[0] > 4096 || h[2] < 0 || h[2] > h[0])
            die("'%s' is no tokenizer: neither litespark's (make it with data/tokens.py) nor llama2.c's",
                path);
        t->bos = 1; t->eos = 2; t->prefix_space = 1;
        tokenizer_records(t, 4, n);
        for (int id = 0; id < (t->V < 259 ? 259 : t->V); id++)
            if (id >= t->V || t->piece[id].n > h[0]
                || (id >= 3 && id < 259 && piece_byte(&t->piece[id]) != id - 3))
                die("tokenizer '%s' is damaged, or not llama2.c's: piece %d is too long, or not its byte",
                    path, id);
        t->piece[0].score = NO_MERGE;           // <unk> is not text; bytes, BOS and EOS are left out anyway
    }
    tokenizer_index(t);
    return t;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    free(t->piece); free(t->slot); free(t->path); free(t->file);
    free(t);
}

static int tokenizer_byte(const Tokenizer *t, char byte) {
    int id = t->byte_id[(unsigned char)byte];
    if (id < 0)
        die("the text has byte 0x%02X, for which tokenizer '%s' has no piece; "
            "change the text or the tokenizer", (unsigned char)byte, t->path);
    return id;
}

// A symbol of the text being joined, at the index of its first byte. bytes 0: none begins here (any more).
// join: the piece that it and the next symbol make, -1 = none.
typedef struct Symbol { int bytes, id, previous, join; float score; } Symbol;

// Sets the join of symbol i and what follows from it in the tree `best` over the n symbols: node k is above
// 2k and 2k+1, node n + i is symbol i, best[k] is the symbol below k whose join has the highest score, the
// leftmost of equals.
static void propose_join(const Tokenizer *t, const char *text, int n, Symbol *s, int *best, int i) {
    int right = i + s[i].bytes;
    s[i].join = s[i].bytes && right < n
              ? *tokenizer_slot(t, text + i, (size_t)(s[i].bytes + s[right].bytes)) : -1;
    s[i].score = s[i].join < 0 ? -INFINITY : t->piece[s[i].join].score;
    for (int k = (n + i) / 2; k > 0; k /= 2) {
        int a = best[2*k], b = best[2*k + 1];
        best[k] = s[a].score > s[b].score || (!(s[a].score < s[b].score) && a < b) ? a : b;
    }
}

// Kind 0. At most n joins, each with at most three walks up the tree: O(n log n) time.
static int encode_bpe(const Tokenizer *t, const char *text, int n, int *ids) {
    Symbol *s = (Symbol *)xcalloc((size_t)n, sizeof(Symbol));
    int *best = (int *)xcalloc(2 * (size_t)n, sizeof(int)), previous = -1, count = 0;
    for (int at = 0; at < n; ) {
        // a stray byte stands for itself
        int k = utf8_length(text + at, (size_t)(n - at)), bytes = k ? k : 1;
        int id = *tokenizer_slot(t, text + at, (size_t)bytes);
        for (int end = at + bytes; at < end; at += s[at].bytes) {
            Symbol symbol = {id < 0 ? 1 : bytes, id < 0 ? tokenizer_byte(t, text[at]) : id, previous, -1, 0};
            s[at] = symbol;
            previous = at;
        }
    }
    for (int i = 0; i < n; i++) best[n + i] = i;
    for (int i = 0; i < n; i++) propose_join(t, text, n, s, best, i);
    while (n && s[best[1]].join >= 0) {
        int left = best[1], right = left + s[left].bytes, next = right + s[right].bytes;
        s[left].id = s[left].join;
        s[left].bytes = next - left;
        s[right].bytes = 0;
        if (next < n) s[next].previous = left;
        propose_join(t, text, n, s, best, right);
        propose_join(t, text, n, s, best, left);
        if (s[left].previous >= 0) propose_join(t, text, n, s, best, s[left].previous);
    }
    for (int i = 0; i < n; i += s[i].bytes) ids[count++] = s[i].id;
    free(s); free(best);
    return count;
}

// Kind 1.
static int encode_greedy(const Tokenizer *t, const char *text, size_t n, int *ids) {
    size_t longest = 1;
    int count = 0;
    for (int id = 0; id < t->V; id++) if ((size_t)t->piece[id].n > longest) longest = (size_t)t->piece[id].n;
    for (size_t at = 0, k; at < n; at += k) {
        int id = -1;
        for (k = min_size(n - at, longest); k > 0 && (id = *tokenizer_slot(t, text + at, k)) < 0; ) k--;
        if (id < 0) { id = tokenizer_byte(t, text[at]); k = 1; }
        ids[count++] = id;
    }
    return count;
}

// The ids of n bytes of text, without BOS, in *ids (the caller frees); returns how many.
int tokenizer_encode(const Tokenizer *t, const char *text, size_t n, int **ids) {
    if (n >= (size_t)1 << 28) die("a text of %zu bytes is too long for one prompt", n);
    int space = t->prefix_space && n > 0;
    char *spaced = (char *)xmalloc(n + 1);
    spaced[0] = ' ';
    memcpy(spaced + 1, text, n);
    text = spaced + 1 - space;
    n += (size_t)space;
    *ids = (int *)xmalloc(n * sizeof(int));                 // a token is at least one byte
    int count = t->kind == 0 ? encode_bpe(t, text, (int)n, *ids) : encode_greedy(t, text, n, *ids);
    free(spaced);
    return count;
}

// The bytes of one id as they are; BOS, EOS and ids without a piece print nothing. previous_id: the id before
// it, BOS at the start (-1 without BOS): there the space that encoding put in front is dropped.
void tokenizer_print(const Tokenizer *t, int previous_id, int id, FILE *f) {
    if (id < 0 || id >= t->V || id == t->bos || id == t->eos) return;
    const Piece *p = &t->piece[id];
    int byte = piece_byte(p), skip = t->prefix_space && previous_id == t->bos && p->n > 0 && p->s[0] == ' ';
    if (byte >= 0) fputc(byte, f);
    else fwrite(p->s + skip, 1, (size_t)(p->n - skip), f);
}

// Opens --tokenizer, or else a tokenizer.bin beside the model, in the folder of the data or above it; NULL:
// none fits c. *side_folder: where tokenizer files of checkpoints come from, or NULL.
Tokenizer *tokenizer_choose(const Config *c, const char *model_dir, const char **side_folder) {
    const char *slash = strrchr(opt.train_data, '/');
    const Str data = str("%.*s", slash ? (int)(slash - opt.train_data) : 1, slash ? opt.train_data : ".");
    const Str above = str("%s/..", data.s);
    const char *folders[3] = {model_dir, data.s, above.s}, *found = opt.tokenizer;
    Str path;
    for (int i = 0; i < 3 && !found; i++) if (folders[i]) {
        path = str("%s/tokenizer.bin", folders[i]);
        if (!access(path.s, R_OK)) found = path.s;
    }
    Tokenizer *t = found ? tokenizer_open(found) : NULL;
    const int spare = t ? c->V - t->V : 0;      // a model may have rows to spare, never too few
    if (t && c->V && (spare < 0 || spare > c->V / 100)) {
        if (opt.tokenizer)
            die("--tokenizer %s has %d tokens, the model %d; name the model's own", found, t->V, c->V);
        tokenizer_free(t);                      // beside the data by chance
        t = NULL;
    }
    slash = t ? strrchr(t->path, '/') : NULL;
    *side_folder = model_dir ? model_dir : !t ? NULL
                 : slash ? xstrdup(str("%.*s", (int)(slash - t->path), t->path).s) : ".";
    return t;
}

// ==== 13. Token shards and the DataLoader ==================================================================
// .bin (llm.c's), little endian: 256 words of 4 bytes, then n tokens. All formats in full: data/README.md.
//   word 0  magic: 20240520 = uint16 tokens, 20240801 = uint32    word 3  vocabulary size, 0 = unknown
//   word 1  version: 1 with uint16, 7 with uint32                 word 4  CRC-32 of the tokens, 0 = unknown
//   word 2  n                                                     word 5  end-of-document id + 1, 0 = unknown
// .ds (Litespark's): rows of S+1 tokens, no header; metadata.json beside or above has S and the width.
// .nll (optional, beside evaluation shards): float32 -ln p of each target under the process that made them.
//
// Window w of a .bin is tokens wT .. wT+T: T inputs and, one further, their T targets. So neighbours share a
// token, each token is a target once, a shard has floor((n-1)/T) windows, none spans two shards, and the tail
// is dropped. Window w of a .ds is the first T+1 tokens of row w. The windows of all shards, sorted by name,
// count 0 .. n_windows-1.
//
// Position p of an epoch draws window permute(p), a bijection that (seed, epoch) select; a micro-step draws
// the next world*B positions, rank r has r*B .. r*B+B-1 of them. So all the state is (seed, epoch, position),
// the same on all ranks: any split of one world*B sees the same batches; a resumed run may have another one.
#define FULL_SCAN_BYTES ((size_t)4 << 30)

typedef struct Shard {
    char *path;
    int fd;                             // -1 = closed at the moment
    size_t n_tokens, n_windows, header_bytes;
    int64_t first_window;               // number of its first window among those of all shards
    int width;                          // bytes per token: 2 or 4
    int row;                            // .ds: S+1 tokens per row; .bin: 0
    int eod;                            // id of the end-of-document token, -1 = unknown
    uint32_t crc;                       // of the token bytes, 0 = unknown
    char *floor_path;                   // evaluation: its .nll file, NULL = it has none
} Shard;

// The shard's vocabulary against the model's, which may have up to 1% more: Qwen2 pads 151,665 to 151,936.
static void check_vocab(const char *path, int64_t shard_vocab, int vocab_size) {
    if (shard_vocab > vocab_size || vocab_size - shard_vocab > vocab_size / 100)
        die("token shard '%s' was tokenized for a vocabulary of %" PRId64 ", the model has %d; "
            "use the tokenizer of the model, or a model for this vocabulary", path, shard_vocab, vocab_size);
}

static void shard_open_bin(Shard *s, size_t bytes, int vocab_size) {
    int32_t h[256];
    if (read_at(s->fd, s->path, h, sizeof h, 0) != sizeof h)
        die("token shard '%s' is truncated: %zu bytes, shorter than its header; write it again",
            s->path, bytes);
    if (h[0] != 20240520 && h[0] != 20240801)
        die("'%s' is not a token shard: no llm.c header (magic 20240520 or 20240801); "
            "make one with data/tokens.py", s->path);
    s->width = h[0] == 20240520 ? 2 : 4;
    s->header_bytes = sizeof h;
    const int version = s->width == 2 ? 1 : 7;
    if (h[1] != version)
        die("token shard '%s' has version %d, this program reads %d; write it again", s->path, h[1], version);
    if (h[2] <= 0 || h[3] < 0 || h[5] < 0)
        die("token shard '%s' has a damaged header: %d tokens, vocabulary %d, end-of-document word %d; "
            "write it again", s->path, h[2], h[3], h[5]);
    s->n_tokens = (size_t)h[2];
    size_t expected = s->header_bytes + s->n_tokens * (size_t)s->width;
    if (bytes != expected)
        die("token shard '%s' %s: %zu bytes, its header promises %zu; write it again", s->path,
            bytes < expected ? "is truncated" : "has extra bytes", bytes, expected);
    if (h[3]) check_vocab(s->path, h[3], vocab_size);
    s->crc = (uint32_t)h[4];
    s->eod = h[5] - 1;
}

static void shard_open_ds(Shard *s, size_t bytes, int vocab_size) {
    const char *slash = strrchr(s->path, '/');
    const int folder = slash ? (int)(slash + 1 - s->path) : 0;
    Str here = str("%.*smetadata.json", folder, s->path);
    Str above = str("%.*s../metadata.json", folder, s->path);
    const char *where = access(here.s, F_OK) ? above.s : here.s;
    if (access(where, F_OK))
        die("'%s' has no metadata.json in its folder or the one above, so its row length is unknown; "
            "put it there, or write the shard again", s->path);
    Json *meta = json_read_file(where, 1 << 20);
    if (meta->type != 'o') die("'%s' must hold one JSON object", where);
    check_vocab(s->path, json_int(meta, "vocab_size", where, 1, INT_MAX, JSON_REQUIRED), vocab_size);
    s->row = (int)json_int(meta, "sequence_length", where, 1, 1 << 28, JSON_REQUIRED) + 1;
    s->width = (int)json_int(meta, "token_size_bytes", where, 2, 4, JSON_REQUIRED);
    s->eod = (int)json_int(meta, "eos_token_id", where, -1, INT_MAX, -1);
    if (s->width == 3) die("'%s': \"token_size_bytes\" must be 2 or 4", where);
    size_t row_bytes = (size_t)s->row * (size_t)s->width;
    if (bytes % row_bytes)
        die("token shard '%s' is truncated or of another kind: %zu bytes are not whole rows of %d tokens "
            "of %d bytes as '%s' says; write it again", s->path, bytes, s->row, s->width, where);
    s->n_tokens = bytes / (size_t)s->width;
    free(meta);
}

// The .nll of an evaluation shard, if there: a float per target, that is n-1 for a .bin, S per row for a .ds.
static void shard_find_floor(Shard *s) {
    const char *dot = strrchr(s->path, '.'), *slash = strrchr(s->path, '/');
    size_t stem = dot && (!slash || dot > slash) ? (size_t)(dot - s->path) : strlen(s->path);
    size_t bytes, expected = 4 * (s->n_tokens - (s->row ? s->n_windows : 1));
    Str path = str("%.*s.nll", (int)stem, s->path);
    if (access(path.s, F_OK)) return;
    close(open_regular(path.s, "true loss", &bytes));
    if (bytes != expected)
        die("true loss '%s' has %zu bytes, '%s' needs %zu; remove it or make it again",
            path.s, bytes, s->path, expected);
    s->floor_path = xstrdup(path.s);
}

static void shard_open(DataLoader *dl, Shard *s) {
    size_t bytes;
    s->fd = open_regular(s->path, "token shard", &bytes);
    if (bytes == 0) die("token shard '%s' is empty; write it again", s->path);
    const char *dot = strrchr(s->path, '.');
    if (dot && strcmp(dot, ".ds") == 0) shard_open_ds(s, bytes, dl->vocab_size);
    else shard_open_bin(s, bytes, dl->vocab_size);
    if (s->eod >= dl->vocab_size)
        die("token shard '%s': end-of-document id %d is outside the vocabulary of %d; write it again",
            s->path, s->eod, dl->vocab_size);
    if (s->eod < 0 && dl->document_mask)
        die("token shard '%s' does not say which token ends a document; write it again with data/tokens.py, "
            "or train with --document-mask off", s->path);
    if (s->row && s->row < dl->T + 1)
        die("token shard '%s' has rows for --seq-len %d or less, not %d", s->path, s->row - 1, dl->T);
    const size_t T = (size_t)dl->T;
    s->n_windows = s->row ? s->n_tokens / (size_t)s->row : (s->n_tokens - 1) / T;
    size_t used = s->row ? s->n_windows * (T + 1) : s->n_windows ? s->n_windows * T + 1 : 0;
    dl->n_windows += (int64_t)s->n_windows;
    dl->n_tokens += (int64_t)s->n_tokens;
    dl->n_dropped += (int64_t)(s->n_tokens - used);
    close(s->fd);
    s->fd = -1;
    if (!dl->shuffle) shard_find_floor(s);
}

// Token i of n packed tokens.
static uint32_t packed_token(const void *data, int width, size_t i) {
    return width == 2 ? ((const uint16_t *)data)[i] : ((const uint32_t *)data)[i];
}

// The descriptor of a shard, which it keeps until another one needs its place.
static int shard_fd(DataLoader *dl, int index) {
    Shard *s = &dl->shards[index], **place = &dl->open_shard[index % MAX_OPEN_SHARDS];
    if (s->fd >= 0) return s->fd;
    if (*place) { close((*place)->fd); (*place)->fd = -1; }
    *place = NULL;
    s->fd = open_regular(s->path, "token shard", NULL);
    *place = s;
    return s->fd;
}

// Reads a whole shard once: its CRC-32 and its largest id.
static void shard_scan(DataLoader *dl, int index) {
    Shard *s = &dl->shards[index];
    const size_t block = (size_t)1 << 20;
    void *data = xmalloc(block);
    uint32_t crc = 0, largest = 0;
    size_t bytes = s->n_tokens * (size_t)s->width;
    int fd = shard_fd(dl, index);
    for (size_t at = 0; at < bytes; at += block) {
        size_t n = min_size(bytes - at, block);
        read_exactly(fd, s->path, data, n, s->header_bytes + at);
        if (s->crc) crc = crc32_update(crc, data, n);
        for (size_t i = 0; i < n / (size_t)s->width; i++) {
            uint32_t id = packed_token(data, s->width, i);
            largest = id > largest ? id : largest;
        }
    }
    free(data);
    if (crc != s->crc)
        die("token shard '%s' is damaged: CRC-32 %08x, its header promises %08x; write it again",
            s->path, crc, s->crc);
    if (largest >= (uint32_t)dl->vocab_size)
        die("token shard '%s' has token id %u, outside the vocabulary of %d; use the tokenizer of the model",
            s->path, largest, dl->vocab_size);
}

// Opens the shards that match `pattern`; dies with one line that names the file unless all can be trained on:
// headers, sizes, vocabulary, and (up to 4 GiB in all; the ranks share the shards) checksums and largest ids.
// B rows of T tokens per rank and micro-step. shuffle 0: an evaluation, one pass in order.
void loader_open(DataLoader *dl, const char *pattern, int B, int T, int rank, int world, uint64_t seed,
                 int shuffle, int vocab_size, int document_mask) {
    glob_t found;
    size_t bytes = 0;
    int n_floors = 0;
    memset(dl, 0, sizeof *dl);
    dl->B = B; dl->T = T; dl->rank = rank; dl->world = world; dl->shuffle = shuffle;
    dl->vocab_size = vocab_size; dl->document_mask = document_mask; dl->state.seed = seed;
    if (glob(pattern, 0, NULL, &found) != 0)                // sorted by name
        die("no token shard matches '%s'; make them with `make data` or data/tokens.py, or name others",
            pattern);
    dl->n_shards = (int)found.gl_pathc;
    dl->shards = (Shard *)xcalloc(found.gl_pathc, sizeof(Shard));
    for (int i = 0; i < dl->n_shards; i++) {
        Shard *s = &dl->shards[i];
        s->path = xstrdup(found.gl_pathv[i]);
        s->first_window = dl->n_windows;
        shard_open(dl, s);
        bytes += s->n_tokens * (size_t)s->width;
        n_floors += s->floor_path != NULL;
    }
    globfree(&found);
    if (dl->n_windows == 0)
        die("'%s' is too short: %" PRId64 " tokens in all, no shard has one window of %d + 1; "
            "use more text or a smaller --seq-len", pattern, dl->n_tokens, T);
    for (int i = rank; i < dl->n_shards && bytes <= FULL_SCAN_BYTES; i += world) shard_scan(dl, i);
    dl->has_floor = n_floors == dl->n_shards;
    dl->buffer = xmalloc(((size_t)T + 1) * 4);
}

// One line for the log; name: "train" or "val".
void loader_log(const DataLoader *dl, const char *name, FILE *f) {
    fprintf(f, "%s data | shards %d from %s | %" PRId64 " tokens | %" PRId64 " windows of %d | "
            "%" PRId64 " tokens dropped%s\n", name, dl->n_shards, dl->shards[0].path, dl->n_tokens,
            dl->n_windows, dl->T, dl->n_dropped, dl->has_floor ? " | true loss known" : "");
}

void loader_rewind(DataLoader *dl) { dl->state.epoch = dl->state.position = 0; }

// Micro-steps that show each window of an evaluation once.
int64_t loader_eval_batches(const DataLoader *dl) {
    return CEIL_DIV(dl->n_windows, (int64_t)dl->world * dl->B);
}

void batch_alloc(Batch *batch, int B, int T, int document_mask, int with_floor) {
    size_t n = (size_t)B * (size_t)T;
    memset(batch, 0, sizeof *batch);
    batch->B = B; batch->T = T;
    batch->inputs = (int *)xcalloc(n, sizeof(int));
    batch->targets = (int *)xcalloc(n, sizeof(int));
    batch->doc_start = document_mask ? (int *)xcalloc(n, sizeof(int)) : NULL;
    batch->floor = with_floor ? (float *)xcalloc(n, sizeof(float)) : NULL;
}

// A pseudo-random permutation of 0 .. n-1, without a table. A Feistel network on 2h bits is a bijection: each
// round can be undone. Walking along its cycle until the result is below n is one again, in at most 4
// steps on average, as 4^h >= n > 4^(h-1) (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
// 12 rounds: with 8 or fewer, the orders of a handful of windows are measurably uneven over many epochs.
static int64_t permute(uint64_t seed, int64_t epoch, int64_t position, int64_t n) {
    int h = 0;
    while (((uint64_t)1 << 2*h) < (uint64_t)n) h++;
    const uint64_t mask = ((uint64_t)1 << h) - 1;
    const uint64_t key = random_bits(seed, hash_string("loader"), (uint64_t)epoch);
    uint64_t x = (uint64_t)position;
    do {
        uint64_t left = x >> h, right = x & mask;
        for (uint64_t round = 0; round < 12; round++) {
            uint64_t next = left ^ (random_bits(key, round, right) >> 32 & mask);
            left = right;
            right = next;
        }
        x = left << h | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

static void read_floor(const Shard *s, size_t first_target, int T, float *floor) {
    int fd = open_regular(s->floor_path, "true loss", NULL);
    read_exactly(fd, s->floor_path, floor, (size_t)T * sizeof(float), first_target * sizeof(float));
    for (int t = 0; t < T; t++)
        if (!(floor[t] >= 0 && floor[t] < 1e6f))
            die("true loss '%s' is damaged: target %zu has %g; remove it or make it again", s->floor_path,
                first_target + (size_t)t, (double)floor[t]);
    close(fd);
}

// Window `window` of all shards into row b.
static void read_window(DataLoader *dl, int64_t window, Batch *batch, int b) {
    int low = 0, high = dl->n_shards, T = dl->T;        // its shard: the last one with first_window <= window
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (dl->shards[middle].first_window <= window) low = middle; else high = middle;
    }
    const Shard *s = &dl->shards[low];
    size_t w = (size_t)(window - s->first_window), width = (size_t)s->width, n = (size_t)T + 1;
    size_t first = s->row ? w * (size_t)s->row : w * (size_t)T;
    if (read_at(shard_fd(dl, low), s->path, dl->buffer, n * width, s->header_bytes + first * width)
        != n * width)
        die("token shard '%s' ends inside window %zu: it became shorter since the run began", s->path, w);
    size_t at = (size_t)b * (size_t)T;
    // With a document mask no document sees another: its first token is not a target of the one before.
    for (int t = 0, start = 0; t <= T; t++) {
        uint32_t id = packed_token(dl->buffer, s->width, (size_t)t);
        if (id >= (uint32_t)dl->vocab_size)
            die("token shard '%s' has token id %u in window %zu, outside the vocabulary of %d; "
                "use the tokenizer of the model", s->path, id, w, dl->vocab_size);
        if (t > 0) batch->targets[at + (size_t)t - 1] = batch->doc_start && start == t ? IGNORED : (int)id;
        if (t == T) break;
        batch->inputs[at + (size_t)t] = (int)id;
        if (batch->doc_start) batch->doc_start[at + (size_t)t] = start;
        if (s->eod >= 0 && (int)id == s->eod) start = t + 1;
    }
    if (dl->has_floor && batch->floor)
        read_floor(s, s->row ? w * (size_t)(s->row - 1) : first, T, batch->floor + at);
}

// The next B rows of this rank. Training: where an epoch ends inside the batch, the rest comes from the start
// of the next. Evaluation: where the windows end, the rest is padding. Dies if a file has changed.
void loader_next(DataLoader *dl, Batch *batch) {
    assert(batch->B == dl->B && batch->T == dl->T && (!dl->document_mask || batch->doc_start));
    LoaderState *state = &dl->state;
    batch->n_rows = 0;
    for (int b = 0; b < dl->B; b++) {
        int64_t p = state->position + (int64_t)dl->rank * dl->B + b, epoch = state->epoch + p / dl->n_windows;
        if (dl->shuffle) p = permute(state->seed, epoch, p % dl->n_windows, dl->n_windows);
        if (p < dl->n_windows) {
            read_window(dl, p, batch, b);
            batch->n_rows++;
            continue;
        }
        for (size_t i = (size_t)b * (size_t)dl->T, end = i + (size_t)dl->T; i < end; i++) {
            batch->inputs[i] = 0;
            batch->targets[i] = IGNORED;
            if (batch->floor) batch->floor[i] = 0;
            if (batch->doc_start) batch->doc_start[i] = 0;
        }
    }
    state->position += (int64_t)dl->world * dl->B;
    if (dl->shuffle) {
        state->epoch += state->position / dl->n_windows;
        state->position %= dl->n_windows;
    }
}

// Vocabulary that the first shard of `pattern` declares; 0: it says nothing, -1: there is no shard.
int data_vocabulary(const char *pattern) {
    glob_t found;
    if (glob(pattern, 0, NULL, &found)) return -1;
    int words[4] = {0, 0, 0, 0};
    FILE *f = fopen(found.gl_pathv[0], "rb");
    if (!f || fread(words, sizeof words, 1, f) != 1) words[3] = 0;
    if (f) fclose(f);
    globfree(&found);
    return words[3] > 0 && (words[0] == 20240520 || words[0] == 20240801) ? words[3] : 0;
}

// ==== 14. Schedule, FLOPs, log =============================================================================
// Learning rate of update `step` (0, 1, ...): linear warm-up, then lr to min_lr (wsd: over the last fifth).
double learning_rate(const Options *o, int64_t step) {
    if (step < o->warmup_steps) return o->lr * (double)(step + 1) / (double)o->warmup_steps;
    int64_t rest = o->steps - o->warmup_steps;
    double done = rest > 1 ? fmin(1, (double)(step - o->warmup_steps) / (double)(rest - 1)) : 1;
    switch (o->schedule) {
    case SCHEDULE_COSINE: return o->min_lr + (o->lr - o->min_lr) * 0.5 * (1 + cos(3.141592653589793 * done));
    case SCHEDULE_LINEAR: return o->lr + (o->min_lr - o->lr) * done;
    case SCHEDULE_WSD: return done < 0.8 ? o->lr : o->lr + (o->min_lr - o->lr) * (done - 0.8) / 0.2;
    default: return o->lr;
    }
}

// FLOPs of forward and backward per token: 6 per parameter of a matmul (a tied head, too) + 12 L H D T for
// attention, as the Litespark report, Megatron-LM and nanotron count; causal: half of that for attention.
double flops_per_token(const Config *c, int T, int causal) {
    double C = c->C, HD = (double)c->H * c->D, KD = (double)c->K * c->D;
    double block = C * (HD + 2 * KD) + HD * C + 3 * C * c->F;
    return 6 * (c->L * block + C * c->V) + (causal ? 6.0 : 12.0) * c->L * HD * T;
}

// ---- log.jsonl: one JSON object per line, only rank 0 writes ----------------------------------------------
static FILE *log_file;

void log_open(const char *out) {
    if (comm_rank() != 0) return;
    Str path = str("%s/log.jsonl", out);
    log_file = fopen(path.s, "a");
    if (!log_file) die("cannot write %s: %s; choose another --out", path.s, strerror(errno));
}

// Appends "key": x after a comma; what is not finite (unknown, unavailable) is null.
void text_add_field(Text *t, const char *key, double x) { text_add(t, ", \"%s\": %s", key, json_decimal(x)); }

// Appends the options as an object of strings: what they came to; as_given: as given, without START ones.
void text_add_options(Text *t, int as_given) {
    const char *before = "{";
    for (const Option *o = option_table; o < option_table + COUNT(option_table); o++) {
        if (o->type == OPT_FLAG || (as_given && o->kind == START)) continue;
        const char *value = as_given ? o->text : option_text(o);
        if (!value) continue;
        text_add(t, "%s\"%s\": ", before, o->name + 2);
        text_add_string(t, value);
        before = ", ";
    }
    text_add(t, "}");
}

// Writes the record t as one line and frees it.
void log_record(Text *t) {
    if (log_file) {
        fprintf(log_file, "%s}\n", t->s);
        fflush(log_file);
    }
    free(t->s);
}

// "15 s" .. "3 h 20 min": for people
Str duration_text(double s) {
    if (s < 60) return str("%.0f s", s);
    if (s < 3600) return str("%.0f min %02.0f s", floor(s / 60), fmod(s, 60));
    return str("%.0f h %02.0f min", floor(s / 3600), fmod(s / 60, 60));
}

// "unavailable" rather than a wrong number
Str measured_text(double x, const char *format) { return isfinite(x) ? str(format, x) : str("unavailable"); }

// FLOP/s with a unit
Str flops_text(double x) {
    if (!isfinite(x)) return str("unavailable");
    return x < 1e12 ? str("%.1f GFLOP/s", x * 1e-9) : str("%.1f TFLOP/s", x * 1e-12);
}

// ==== 15. Checkpoints: Hugging Face directories ============================================================
// OUT/step_00000120/
//   config.json, generation_config.json, model.safetensors in the compute precision, tokenizer files: what
//       Hugging Face loads
//   optimizer-RRRRR-of-NNNNN.safetensors: fp32 tensors UNIT.KIND.OFFSET, KIND master, m or v: elements from
//       OFFSET on of the flat unit
//   trainer_state.json: step, options, data position, sums of the run
//   checksums.txt: a line "CRC-32 bytes name" per file; the last line is the CRC-32 of those lines
// Written as OUT/tmp.step_..., fsynced, renamed; only then are old ones removed: a kill leaves a whole one.
static float io_values[IO_THREADS][IO_CHUNK];   // what passes between disk and model at a time, per thread

__attribute__((unused)) static int io_threads(void) {           // nvcc does not look for uses in pragmas
    return (int)min_size((size_t)omp_get_max_threads(), IO_THREADS);
}

static const char *const side_files[] = {"tokenizer.bin", "tokenizer.json", "tokenizer.model",
                                         "tokenizer_config.json", "special_tokens_map.json"};

static void remove_folder(const char *dir) {        // one level, which is all a checkpoint has
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink(str("%s/%s", dir, e->d_name).s);
    if (d) closedir(d);
    rmdir(dir);
}

static void sync_folder(const char *dir) {
    int fd = open(dir, O_RDONLY | O_DIRECTORY);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

// Steps of the checkpoints in OUT, ascending; the caller frees *steps.
int checkpoint_list(const char *out, int64_t **steps) {
    int n = 0, room = 0;
    *steps = NULL;
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));) {
        int64_t step;
        if (strncmp(e->d_name, "step_", 5) || !parse_int(e->d_name + 5, &step)) continue;
        *steps = (int64_t *)array_room(*steps, n + 1, &room, sizeof step);
        int at = n++;
        for (; at > 0 && (*steps)[at - 1] > step; at--) (*steps)[at] = (*steps)[at - 1];
        (*steps)[at] = step;
    }
    if (d) closedir(d);
    return n;
}

static Str checkpoint_path(const char *out, int64_t step) { return str("%s/step_%08" PRId64, out, step); }

// ---- writing ----------------------------------------------------------------------------------------------
// The first failure ends the saving; nothing dies while a half-written folder lies there.
typedef struct Saving {
    const char *dir;
    Text checksums;
    uint32_t crc;                       // of the file that was written last, and
    size_t bytes;                       // its size
    Text error;                         // empty while all is well
} Saving;

static StWriter *save_begin(const Saving *s, const char *name, const char *metadata) {
    return st_create(str("%s/%s", s->dir, name).s, metadata);
}

// Ends w: its file joins the checksums, its error becomes the saving's.
static void save_end(Saving *s, StWriter *w, const char *name) {
    int failed = st_finish(w, &s->crc, &s->bytes);
    if (failed && !s->error.n) text_add(&s->error, "%s/%s: cannot write: %s", s->dir, name, strerror(failed));
    text_add(&s->checksums, "%08x %zu %s\n", s->crc, s->bytes, name);
}

static void save_file(Saving *s, const char *name, const void *data, size_t n) {
    if (s->error.n) return;
    StWriter *w = save_begin(s, name, NULL);
    st_put(w, data, n);
    save_end(s, w, name);
}

// Elements [at, at+n) of unit u in one kind of state are the next values of w.
void save_values(StWriter *w, const Model *m, int kind, int u, size_t at, size_t n) {
    const size_t place = st_take(w, n), size = st_dtypes[w->dtype].bytes;
    #pragma omp parallel for schedule(dynamic) num_threads(io_threads())
    for (size_t done = 0; done < n; done += IO_CHUNK) {
        const size_t k = min_size(n - done, IO_CHUNK);
        const float *values = model_floats(m, kind, u, at + done);
        if (!values) {
            float *copy = io_values[omp_get_thread_num()];
            model_read(m, kind, u, at + done, k, copy);
            values = copy;
        }
        st_write_at(w, place + done * size, values, k);
    }
}

// Announces every tensor of the table.
void st_declare_table(StWriter *w, const ParamTable *p, int dtype) {
    for (const Tensor *t = p->tensors; t < p->tensors + p->n_tensors; t++) {
        int64_t shape[2] = {t->rows, t->cols};
        st_declare(w, t->name, dtype, t->cols ? 2 : 1, shape);
    }
}

static void save_weights(Saving *s, const Model *m, int dtype) {
    const ParamTable *p = model_table(m);
    StWriter *w = save_begin(s, "model.safetensors", "{\"format\":\"pt\"}");
    st_declare_table(w, p, dtype);
    st_begin(w);
    for (const Tensor *t = p->tensors; t < p->tensors + p->n_tensors; t++)
        save_values(w, m, STATE_WEIGHTS, t->unit, t->at, t->n);
    save_end(s, w, "model.safetensors");
}

static const char *const state_kinds[] = {"weights", "master", "m", "v"};

// This rank's share of unit u without vocabulary padding: elements [*first, *first + *n) of the unit.
static void unit_share(const Model *m, int u, size_t *first, size_t *n) {
    const Unit *unit = &model_table(m)->units[u];
    state_share(m, u, first, n);
    *n = *first < unit->n ? min_size(*n, unit->n - *first) : 0;
}

static void save_optimizer(Saving *s, const Model *m, const char *name) {
    const ParamTable *p = model_table(m);
    StWriter *w = save_begin(s, name, NULL);
    for (int pass = 0; pass < 2; pass++) {          // declare, then write
        for (int u = 0; u < p->n_units; u++) for (int kind = STATE_MASTER; kind <= STATE_V; kind++) {
            size_t first, n;
            unit_share(m, u, &first, &n);
            int64_t shape = (int64_t)n;
            if (pass) save_values(w, m, kind, u, first, n);
            else if (n)
                st_declare(w, str("%s.%s.%zu", p->units[u].name, state_kinds[kind], first).s, ST_F32, 1,
                           &shape);
        }
        if (pass == 0) st_begin(w);
    }
    save_end(s, w, name);
}

static void text_add_series(Text *t, const char *key, const double *x) {
    text_add(t, ",\n \"%s\": [%s", key, json_decimal(x[0]));
    for (int i = 1; i < SPIKE_WINDOW; i++) text_add(t, ", %s", json_decimal(x[i]));
    text_add(t, "]");
}

static void save_trainer_state(Saving *s, const TrainState *t) {
    Text j = {NULL, 0, 0};
    text_add(&j, "{\"format\": 2, \"step\": %" PRId64 ", \"updates\": %" PRId64 ", \"tokens\": %" PRId64
             ", \"world\": %d", t->step, t->updates, t->tokens, comm_world());
    text_add_field(&j, "seconds", t->seconds);
    text_add_field(&j, "joules", t->joules);
    text_add(&j, ",\n \"loader\": {\"seed\": %" PRIu64 ", \"epoch\": %" PRId64 ", \"position\": %" PRId64
             "},\n \"options\": ", t->loader.seed, t->loader.epoch, t->loader.position);
    text_add_options(&j, /*as_given=*/1);
    text_add(&j, ",\n \"n_healthy\": %" PRId64, t->n_healthy);
    text_add_series(&j, "losses", t->losses);
    text_add_series(&j, "norms", t->norms);
    text_add(&j, "}\n");
    save_file(s, "trainer_state.json", j.s, (size_t)j.n);
    free(j.s);
}

// What Hugging Face wants beside the weights; side files come from `from` (a folder) where they exist.
static void save_side_files(Saving *s, const Config *c, const Options *o, const char *from) {
    char *config = config_to_json(c, o->precision == BF16 ? "bfloat16" : "float32");
    save_file(s, "config.json", config, strlen(config));
    free(config);
    Text g = {NULL, 0, 0};
    text_add(&g, "{");
    if (c->bos >= 0) text_add(&g, "\"bos_token_id\": %d, ", c->bos);
    if (c->eos >= 0) text_add(&g, "\"eos_token_id\": %d, ", c->eos);
    text_add(&g, "\"do_sample\": true}\n");
    save_file(s, "generation_config.json", g.s, (size_t)g.n);
    free(g.s);
    for (int i = 0; from && i < COUNT(side_files); i++) {
        Str path = str("%s/%s", from, side_files[i]);
        if (access(path.s, R_OK)) continue;
        size_t n;
        char *data = read_text_file(path.s, (size_t)1 << 30, &n);
        save_file(s, side_files[i], data, n);
        free(data);
    }
}

static void checkpoint_prune(const char *out, int64_t keep) {
    int64_t *steps;
    int n = checkpoint_list(out, &steps);
    Str gone = str("%s/tmp.old", out);
    for (int i = 0; i < n - keep; i++)      // renamed first: a kill in between leaves no half checkpoint
        if (!rename(checkpoint_path(out, steps[i]).s, gone.s)) remove_folder(gone.s);
    free(steps);
}

static void remove_leftovers(const char *out) {         // of a killed run
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));)
        if (!strncmp(e->d_name, "tmp.", 4)) remove_folder(str("%s/%s", out, e->d_name).s);
    if (d) closedir(d);
}

// Saves everything as OUT/step_N; all ranks call it. Dies if the disk refuses, after removing what it began.
void checkpoint_save(const Model *m, const TrainState *t, const Config *c, const Options *o,
                     const char *side_folder) {
    int rank = comm_rank(), parts = o->zero ? comm_world() : 1;
    Str final = checkpoint_path(o->out, t->step), tmp = str("%s/tmp.step_%08" PRId64, o->out, t->step);
    Str old = str("%s/tmp.old", o->out);
    Saving s = {tmp.s, {NULL, 0, 0}, 0, 0, {NULL, 0, 0}};
    // CRC-32 and bytes of each optimizer file; failures
    double *sums = (double *)xcalloc((size_t)parts * 2 + 1, sizeof(double));
    if (rank == 0) {
        remove_leftovers(o->out);
        if (mkdir(tmp.s, 0777)) text_add(&s.error, "%s: %s", tmp.s, strerror(errno));
    }
    comm_barrier();
    if (rank < parts && !s.error.n) {
        save_optimizer(&s, m, str("optimizer-%05d-of-%05d.safetensors", rank, parts).s);
        sums[2 * rank] = s.crc;
        sums[2 * rank + 1] = (double)s.bytes;
    }
    if (rank == 0 && !s.error.n) {
        save_weights(&s, m, o->precision == BF16 ? ST_BF16 : ST_F32);
        save_side_files(&s, c, o, side_folder);
        save_trainer_state(&s, t);
    }
    sums[2 * parts] = s.error.n != 0;
    comm_sum(sums, 2 * parts + 1);
    int failed = sums[2 * parts] > 0;
    if (rank == 0 && !failed) {
        for (int i = 1; i < parts; i++)             // rank 0's own is there
            text_add(&s.checksums, "%08x %.0f optimizer-%05d-of-%05d.safetensors\n",
                     (uint32_t)sums[2 * i], sums[2 * i + 1], i, parts);
        text_add(&s.checksums, "%08x\n", crc32_update(0, s.checksums.s, (size_t)s.checksums.n));
        save_file(&s, "checksums.txt", s.checksums.s, (size_t)s.checksums.n);
        sync_folder(tmp.s);
        rename(final.s, old.s);                         // a damaged one of the same step
        if (!s.error.n && rename(tmp.s, final.s)) text_add(&s.error, "%s: %s", final.s, strerror(errno));
        remove_folder(old.s);
        sync_folder(o->out);
        if (!s.error.n) checkpoint_prune(o->out, o->keep);
    }
    if (s.error.n) {
        if (rank == 0) remove_folder(tmp.s);
        die("cannot save step %" PRId64 ": %s; older checkpoints are whole: make room, then --resume auto",
            t->step, s.error.s);
    }
    comm_barrier();
    if (failed) die("cannot save step %" PRId64 ": another rank could not write its part", t->step);
    free(s.checksums.s); free(sums);
}

// ---- reading ----------------------------------------------------------------------------------------------
static int file_crc(const char *path, uint32_t *crc, size_t *bytes) {         // 0: not there, or not readable
    struct stat info;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    int ok = fd >= 0 && !fstat(fd, &info) && S_ISREG(info.st_mode);
    const size_t n = ok ? (size_t)info.st_size : 0, piece = sizeof io_values[0];
    uint32_t sum = 0;
    #pragma omp parallel for schedule(dynamic) num_threads(io_threads()) reduction(^ : sum) reduction(& : ok)
    for (size_t at = 0; at < n; at += piece) {
        const size_t k = min_size(n - at, piece);
        char *data = (char *)io_values[omp_get_thread_num()];
        ssize_t got = 1;
        for (size_t done = 0; done < k && got > 0; done += (size_t)got)
            got = pread(fd, data + done, k - done, (off_t)(at + done));
        ok &= got > 0;
        sum ^= crc32_before(crc32_update(0, data, k), n - at - k);
    }
    if (fd >= 0) close(fd);
    *crc = sum;
    *bytes = n;
    return ok;
}

// Empty if every file of the checkpoint is there with the recorded bytes; else what is wrong.
Str checkpoint_whole(const char *dir) {
    Str path = str("%s/checksums.txt", dir), why = {""};
    struct stat info;
    size_t size;
    if (stat(path.s, &info) || info.st_size < 9 || info.st_size > 1 << 24)
        return str("%s is missing or empty", path.s);
    char *text = read_text_file(path.s, 1 << 24, &size);
    if (strcmp(text + size - 9, str("%08x\n", crc32_update(0, text, size - 9)).s))
        why = str("%s does not match its own checksum", path.s);
    text[size - 9] = 0;
    for (char *line = text, *next; !why.s[0] && *line; line = next) {
        uint32_t crc, found_crc;
        size_t bytes, found;
        int name = 0;
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        int fields = sscanf(line, "%" SCNx32 " %zu %n", &crc, &bytes, &name);
        Str file = str("%s/%.255s", dir, line + name);
        if (fields != 2 || !name) why = str("%s has a bad line", path.s);
        else if (!file_crc(file.s, &found_crc, &found)) why = str("%s is missing", file.s);
        else if (found != bytes) why = str("%s has %zu bytes, not %zu", file.s, found, bytes);
        else if (found_crc != crc) why = str("%s is damaged (checksum differs)", file.s);
    }
    free(text);
    return why;
}

// --resume: the folder to continue, whole; NULL: auto found none. It names damaged ones and tries older ones.
char *checkpoint_choose(const char *resume, const char *out) {
    Str why = {""};
    if (strcmp(resume, "auto")) {
        if (!comm_rank()) why = checkpoint_whole(resume);
        if (why.s[0]) die("--resume %s: %s; resume an older checkpoint", resume, why.s);
        return xstrdup(resume);
    }
    int64_t *steps, chosen = -1;
    int n = checkpoint_list(out, &steps);
    for (int i = n - 1; i >= 0 && chosen < 0 && comm_rank() == 0; i--) {
        why = checkpoint_whole(checkpoint_path(out, steps[i]).s);
        if (!why.s[0]) chosen = steps[i];
        else fprintf(stderr, "warning: %s; trying an older checkpoint\n", why.s);
    }
    free(steps);
    if (n && chosen < 0 && comm_rank() == 0)
        die("--resume auto: no whole checkpoint in %s (%s); remove the folder or name another --out",
            out, why.s);
    comm_broadcast(&chosen, sizeof chosen);
    return chosen < 0 ? NULL : xstrdup(checkpoint_path(out, chosen).s);
}

static void read_series(const Json *root, const char *key, const char *where, double *x) {
    const Json *list = json_get(root, key);
    if (!list || list->type != 'a' || list->n != SPIKE_WINDOW)
        die("%s: \"%s\" is not a list of %d numbers", where, key, SPIKE_WINDOW);
    for (const Json *e = list->child; e; e = e->next) *x++ = e->num;
}

// The options of a saved run become those of this one, except what the command line gives; that is said, and
// refused where it would make another run. *was: as they were saved. Format 1 saved what they came to: there
// lr/10 was most likely left open.
static void options_resume(const Json *saved, const char *where, int64_t format, Options *was) {
    const char *given[COUNT(option_table)] = {NULL};
    for (const Json *e = saved ? saved->child : NULL; e; e = e->next) {
        Option *o = option_find(str("--%s", e->key).s);
        if (!o || e->type != 's')
            die("%s: option \"%s\" is not known; this checkpoint is of another version", where, e->key);
        if (o->kind == START) continue;
        const Str wish = str("%s", o->given ? option_text(o) : "");
        const char *text = o->text;
        option_set(o, e->str);
        if (!o->given || !strcmp(wish.s, option_text(o))) continue;
        if (o->kind == FIXED)
            die("%s %s: the run was begun with %s, which cannot change; leave it out, or start another run "
                "with --init-from", o->name, wish.s, option_text(o));
        if (comm_rank() == 0) printf("resume: %s was %s, is now %s\n", o->name, option_text(o), wish.s);
        given[o - option_table] = text;
    }
    if (format == 1 && fabs(opt.min_lr - opt.lr / 10) <= 1e-9 * opt.lr)
        option_set(option_find("--min-lr"), "-1");
    *was = opt;
    for (int i = 0; i < COUNT(option_table); i++) if (given[i]) option_set(&option_table[i], given[i]);
}

// trainer_state.json -> t, and the options of that run.
void checkpoint_read_state(const char *dir, TrainState *t, Options *was) {
    Str path = str("%s/trainer_state.json", dir);
    const char *where = path.s;
    Json *root = json_read_file(where, 1 << 24);
    const int64_t MOST = INT64_C(1) << 53;
    memset(t, 0, sizeof *t);
    const int64_t format = json_int(root, "format", where, 1, 2, JSON_REQUIRED);
    t->step = json_int(root, "step", where, 0, MOST, JSON_REQUIRED);
    t->updates = json_int(root, "updates", where, 0, t->step, JSON_REQUIRED);
    t->tokens = json_int(root, "tokens", where, 0, INT64_MAX, JSON_REQUIRED);
    t->seconds = json_number(root, "seconds", where, 0, 1e18, NAN);
    t->joules = json_get(root, "joules") ? json_number(root, "joules", where, 0, 1e30, NAN) : NAN;
    t->n_healthy = json_int(root, "n_healthy", where, 0, MOST, JSON_REQUIRED);
    read_series(root, "losses", where, t->losses);
    read_series(root, "norms", where, t->norms);
    const Json *loader = json_get(root, "loader");
    t->loader.seed = (uint64_t)json_int(loader, "seed", where, 0, INT64_MAX, JSON_REQUIRED);
    t->loader.epoch = json_int(loader, "epoch", where, 0, MOST, JSON_REQUIRED);
    t->loader.position = json_int(loader, "position", where, 0, MOST, JSON_REQUIRED);
    options_resume(json_get(root, "options"), where, format, was);
    free(root);
}

// Elements [first, first+n) of a tensor become elements at, at+1, ... of unit u in one kind of state.
static void read_values(const StSet *s, const StTensor *t, size_t first, size_t n,
                        Model *m, int kind, int u, size_t at) {
    st_read(s, t, first, 0, io_values[0]);          // dies here, not in every thread, of a wrong dtype
    #pragma omp parallel for schedule(dynamic) num_threads(io_threads())
    for (size_t done = 0; done < n; done += IO_CHUNK) {
        const size_t k = min_size(n - done, IO_CHUNK);
        float *own = model_floats(m, kind, u, at + done);
        float *values = own ? own : io_values[omp_get_thread_num()];
        st_read(s, t, first + done, k, values);
        if (!own) model_write(m, kind, u, at + done, k, values);
    }
}

// Elements [first, first+n) of unit u in one kind of state become its elements in kind `to`, from whichever
// tensors hold them; dies if any is missing.
static void optimizer_read(const StSet *s, Model *m, int u, int kind, size_t first, size_t n, int to) {
    const Unit *unit = &model_table(m)->units[u];
    Str text = str("%s.%s.", unit->name, state_kinds[kind]);
    const char *prefix = text.s;
    size_t found = 0;
    for (const StTensor *t = s->tensors; t < s->tensors + s->n_tensors; t++) {
        int64_t offset;
        if (strncmp(t->name, prefix, strlen(prefix))) continue;
        if (!parse_int(t->name + strlen(prefix), &offset) || offset < 0) continue;
        size_t begin = (size_t)offset > first ? (size_t)offset : first;
        size_t end = min_size((size_t)offset + t->n, first + n);
        if (begin >= end) continue;
        read_values(s, t, begin - (size_t)offset, end - begin, m, to, u, begin);
        found += end - begin;
    }
    if (found != n)
        die("%s: the optimizer files hold %zu of %zu values of %s of %s; this checkpoint is of another model",
            s->paths[0], found, n, state_kinds[kind], unit->name);
}

// Weights and, for training (state), m and v of a checkpoint written on any number of ranks. The weights come
// from the masters; model_set_master then derives what is computed with.
void checkpoint_read_model(const char *dir, Model *m, int state) {
    const ParamTable *p = model_table(m);
    StSet *s = st_open_all(str("%s/optimizer-*-of-*.safetensors", dir).s);
    if (!s) die("%s: no optimizer state here; --init-from %s starts a new run from its weights", dir, dir);
    for (int u = 0; u < p->n_units; u++) {
        size_t at, n;
        optimizer_read(s, m, u, STATE_MASTER, 0, p->units[u].n, STATE_WEIGHTS);
        unit_share(m, u, &at, &n);
        for (int kind = STATE_M; state && kind <= STATE_V; kind++) optimizer_read(s, m, u, kind, at, n, kind);
    }
    st_close(s);
}

// Weights of any Hugging Face directory into m; every tensor must be there with its shape, and none too many.
void weights_read(const char *dir, Model *m, const Config *c) {
    const ParamTable *p = model_table(m);
    StSet *s = st_open(dir);
    for (int i = 0; i < p->n_tensors; i++) {
        const Tensor *t = &p->tensors[i];
        const StTensor *from = st_find(s, t->name);
        if (!from)
            die("%s: tensor %s is missing; config.json and weights do not belong together", dir, t->name);
        if (from->n_dims != (t->cols ? 2 : 1) || from->shape[0] != t->rows || from->shape[1] != t->cols)
            die("%s: tensor %s has shape [%" PRId64 ", %" PRId64 "], config.json asks for [%d, %d]",
                dir, t->name, from->shape[0], from->shape[1], t->rows, t->cols);
        read_values(s, from, 0, t->n, m, STATE_WEIGHTS, t->unit, t->at);
    }
    for (int j = 0; j < s->n_tensors; j++) {
        const char *name = s->tensors[j].name;
        int known = strstr(name, "rotary_emb.inv_freq") || (c->tied && !strcmp(name, "lm_head.weight"));
        for (int i = 0; i < p->n_tensors && !known; i++) known = !strcmp(p->tensors[i].name, name);
        if (!known)
            die("%s: tensor %s has no place in a %s model; config.json and weights do not belong together",
                dir, name, c->family->name);
    }
    st_close(s);
}

// Hugging Face's initialisation. Keyed by (seed, tensor name, index), so it does not depend on ranks.
void weights_random(Model *m, const Config *c, uint64_t seed) {
    const ParamTable *p = model_table(m);
    for (const Tensor *t = p->tensors; t < p->tensors + p->n_tensors; t++) {
        #pragma omp parallel for schedule(dynamic) num_threads(io_threads())
        for (size_t at = 0; at < t->n; at += IO_CHUNK) {
            const size_t n = min_size(t->n - at, IO_CHUNK);
            float *own = model_floats(m, STATE_WEIGHTS, t->unit, t->at + at);
            float *x = own ? own : io_values[omp_get_thread_num()];
            if (t->init == INIT_NORMAL) random_normals(x, c->init_std, seed, hash_string(t->name), at, n);
            else for (size_t i = 0; i < n; i++) x[i] = t->init == INIT_ONE;
            if (!own) model_write(m, STATE_WEIGHTS, t->unit, t->at + at, n, x);
        }
    }
}
// SHARED END
