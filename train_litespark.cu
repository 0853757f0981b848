// ==== 1. Map ===============================================================================================
/*
litespark: train Llama-family language models on a GPU. The twin train_litespark.c is the same program on the
CPU and the reference for every gradient here: same sections, same names; read them side by side.

    make train DEVICE=cuda && dev/run.sh -np 8 ./train_litespark    one rank per GPU
    make train DEVICE=emu  && dev/run.sh -np 2 ./train_litespark    the same source on the CPU (dev/emu)
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
    master weights, gradients of parameters, rstd, LSE                   fp32
    m, v                                                                 fp32, or bf16: --optimizer-dtype
    sums inside kernels, matmuls                                         fp32
    loss, norms of gradients                                             double
Rules
- floatX is a template parameter: bf16 or float. Gradients of parameters are += (fp32, over micro-steps), of
  activations =, except the residual stream dx. Every op says which.
- What is trained enters as a weight per target (section 5): d objective / d loss of that target.
- Every sum has a fixed order: no float atomics, so two runs give the same bits.
- Memory: one arena each for weights, gradients, optimizer, activations and workspace, allocated before step
  0; no GPU memory is allocated in a step.
- Kernels start only through launch(), on gpu.stream, and those of sums over ranks through launch_on(), on
  gpu.comm_stream; inline PTX stands once, at the head of section 3; no
  architecture #ifdef outside it.
- The text between SHARED BEGIN and SHARED END is the twin's, copied by `make sync`.
Not here: tensor and pipeline parallelism, mixture of experts, serving, training of tokenizers.

Read 3 (ops), 4 (model), 5 (objectives), 6 (training) from top to bottom; 2 tells the words. The rest is
plumbing, for when you need it: 7 ranks, 8 errors, numbers, options, 9 JSON, 10 safetensors, 11 models,
12 tokenizer, 13 data, 14 schedule and log, 15 checkpoints, 16 planning.
*/

// ==== 2. Vocabulary: types, options, and what the plumbing offers ==========================================
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
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <algorithm>
#include <type_traits>
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
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
typedef float LogProb;                  // of an answer: the sum over its tokens, rounded
static const char device_kind[] = "gpu";
static const char device_peak_is[] = "datasheet, dense";
static const char device_also_takes[] = ", and about 800 MiB for context, cuBLASLt and NCCL";

// Sums and copies over ranks, section 7. They run on gpu.comm_stream once gpu.stream has come this far
template <typename T> void comm_all_reduce(T *x, size_t n, int among_copies, const char *unit);
template <typename T> void comm_reduce_scatter(T *x, size_t n, const char *unit);
template <typename T> void comm_all_gather(T *x, const T *own, size_t n, const char *unit);
void comm_follow(void);
void comm_join(cudaEvent_t event);
void gpu_wait(cudaEvent_t event);

// What this trainer does not do: an option with this value (NULL: with any), and why.
static const struct { const char *option, *value, *why; } refused[] = {
    {"--deterministic", "off", ": there are only deterministic kernels"},
};

// SHARED BEGIN
#define CEIL_DIV(n, d) (((n) + (d) - 1) / (d))
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

// ---- options: one table feeds parser, --help, the log and resume ------------------------------------------
enum { STAGE_PRETRAIN, STAGE_SFT, STAGE_DPO, STAGE_CHOICE };    // the last: of data alone, for evaluation
static const char *const stage_names[] = {"pretrain", "sft", "dpo", "choice"};
enum { DPO_SIGMOID, DPO_NORM, DPO_IPO, DPO_ROBUST };
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
      "continue this checkpoint folder; auto: the newest whole one in --out, if any") \
    GROUP("Data") \
    X(TEXT, "--train-data", train_data, GIVEN, NULL, 0, 0, \
      "token shards, as a quoted pattern (default: generated stories)") \
    X(TEXT, "--val-data", val_data, GIVEN, NULL, 0, 0, \
      "shards to evaluate on (default: those of the stories, with the default --train-data)") \
    X(TEXT, "--eval-tasks", eval_tasks, GIVEN, NULL, 0, 0, \
      "multiple choice tasks of data/choices.py to solve at each evaluation, as a quoted pattern") \
    X(TEXT, "--tokenizer", tokenizer, GIVEN, NULL, 0, 0, \
      "tokenizer.bin, for text (default: the one beside model or data)") \
    X(CHOICE, "--document-mask", document_mask, FIXED, "off", 0, 0, \
      "off|on: on: a token sees only its own document (always with sft and dpo)") \
    GROUP("Objective") \
    X(CHOICE, "--stage", stage, FIXED, "pretrain", 0, 0, \
      "pretrain|sft|dpo: next tokens of text, answers, preferences") \
    X(CHOICE, "--dpo-loss", dpo_loss, FIXED, "sigmoid", 0, 0, \
      "sigmoid|norm|ipo|robust: of a pair; the formulas stand below") \
    X(REAL, "--dpo-beta", dpo_beta, GIVEN, "0", 0, 1e3, \
      "dpo: how strongly the reference holds, 0 = 0.1, with norm 5") \
    X(REAL, "--dpo-label-smoothing", dpo_label_smoothing, GIVEN, "0", 0, 0.499, \
      "dpo: e, the share of pairs whose labels may be swapped (sigmoid, norm, robust)") \
    X(REAL, "--dpo-sft-weight", dpo_sft_weight, GIVEN, "0", 0, 1e3, \
      "dpo: a, adds a times the mean nll of all targets of the update's chosen answers") \
    X(TEXT, "--dpo-reference", dpo_reference, START, NULL, 0, 0, \
      "dpo: checkpoint folder of the reference model (default: the model that training starts from)") \
    GROUP("Batch") \
    X(INT, "--seq-len", seq_len, GIVEN, "0", 0, 1 << 24, \
      "tokens of a sequence, 0 = a row of .ds data, else 1024; at most the model's") \
    X(INT, "--batch-size", batch_size, GIVEN, "0", 0, 1 << 20, \
      "sequences per rank at a time, 0 = as many as fit") \
    X(INT, "--total-batch-tokens", total_batch_tokens, GIVEN, "0", 0, 1e12, \
      "tokens of an update over all ranks, 0 = by the size of the model") \
    GROUP("Schedule") \
    X(INT, "--steps", steps, GIVEN, "-1", -1, 1e12, \
      "updates in all, -1 = by --epochs, else by the size of the model (sft, dpo: one epoch)") \
    X(REAL, "--epochs", epochs, GIVEN, "0", 0, 1e6, "passes over the training data, in place of --steps") \
    X(REAL, "--lr", lr, GIVEN, "-1", -1, 1e3, "highest learning rate, -1 = by stage and size of the model") \
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
      "skip updates whose loss or norm is so many standard deviations too high, 0 = never") \
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
    X(FLAG, "--eval-only", eval_only, START, NULL, 0, 0, \
      "evaluate on --val-data and --eval-tasks and stop; with --out also into its eval.jsonl") \
    X(FLAG, "--generate", generate, START, NULL, 0, 0, "print a sample of text and stop") \
    GROUP("Output") \
    X(TEXT, "--out", out, START, "out", 0, 0, \
      "folder of checkpoints and log.jsonl, of one run; --resume DIR: the folder around DIR") \
    X(INT, "--checkpoint-every", checkpoint_every, GIVEN, "-1", -1, 1e12, \
      "updates between checkpoints, 0 = none, not even at the end, -1 = steps/5 and at the end") \
    X(INT, "--keep", keep, GIVEN, "2", 1, 1e9, "checkpoints to keep") \
    X(TEXT, "--power-log", power_log, START, NULL, 0, 0, \
      "file to append power, clock and temperature to, each second; of rank N: FILE.N") \
    GROUP("System") \
    X(INT, "--seed", seed, FIXED, "1", 0, 9e15, "of random weights, the order of data, and samples") \
    X(CHOICE, "--precision", precision, GIVEN, "fp32", 0, 0, "fp32|bf16: of weights and activations") \
    X(INT, "--threads", threads, START, "0", 0, 4096, \
      "per rank, 0 = $OMP_NUM_THREADS, else cores / ranks of this machine") \
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
    X(INT, "--timeout", timeout, START, "600", 1, 1e6, \
      "seconds to wait for a sign of life of another rank or the GPU") \
    GROUP("Tools") \
    X(FLAG, "--dry-run", dry_run, START, NULL, 0, 0, "print the memory that this run needs and stop") \
    X(TEXT, "--dump-grads", dump_grads, START, NULL, 0, 0, \
      "write the first update's gradients to this safetensors file and stop") \
    X(TEXT, "--profile", profile, START, NULL, 0, 0, \
      "FIRST:LAST: in these steps NVTX ranges around each part, for Nsight Systems (CUDA trainer)") \
    X(FLAG, "--help", help, START, NULL, 0, 0, "this list") \
    GROUP("Planning (--dry-run; the CUDA trainer, which needs no GPU for it)") \
    X(TEXT, "--device", device, START, NULL, 0, 0, \
      "what a run would take on h100, h200, b200, a100, l40s or 4090: memory, time, energy (modelled)") \
    X(TEXT, "--gpus", gpus, START, "1", 0, 0, "how many of them; auto: list layouts, the cheapest first") \
    X(INT, "--nodes", nodes, START, "0", 0, 1e6, "machines that they are in, 0 = of 8 GPUs each") \
    X(REAL, "--tokens", tokens, START, "0", 0, 1e18, "tokens of the run, 0 = --steps updates") \
    X(REAL, "--carbon-intensity", carbon_intensity, START, "350", 0, 1e5, \
      "g of CO2 per kWh; the report's is 350, the average of the USA") \
    X(REAL, "--pue", pue, START, "1", 1, 10, \
      "power of the building over that of the GPUs, 1 = of the GPUs alone, as in the report")

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
static int64_t running_step;    // for messages of a stuck job
typedef struct Option Option;

// ---- a model ----------------------------------------------------------------------------------------------
enum { WINDOW_IGNORED, WINDOW_COUNTS, WINDOW_SWITCHED };  // sliding_window; the last: if use_sliding_window
typedef struct Family {         // a class of transformers, and what keys mean there that config.json lacks
    const char *name, *class_name;
    int qkv_bias, qk_norm, windows;
    int V, L, C, H, K, D, F, max_T, sliding_window, bos, eos;
} Family;
enum { MAX_STOPS = 16 };
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
    // 0 = in no layer, else how far some layers look back; a longer seq-len is refused
    int sliding_window;
    int bos, pad;               // token ids, -1 = none
    // ids that end a text: n_eos of config.json, then those that generation_config.json adds
    int n_eos, n_stops, stops[MAX_STOPS];
    // members of config.json for checkpoints only, and the names of those that mean nothing here; NULL: none
    char *rest, *rest_keys;
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
    // place in the flat buffer, elements; n_padded: a multiple of UNIT_ALIGN * ranks that share
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
    int64_t *window;            // (B) number of each row's window among those of all shards, -1: padding
    float *reference;           // (B, pairs, 2) DPO: log p of the row's answers under the reference; or NULL
    int pairs;                  // at most, in a row
    int past, keep;             // samples: tokens before these; how many keys and values to keep of these
} Batch;

typedef struct Document { int first, end, n_targets; } Document;    // positions in a batch's (B, T)

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
    // evaluation: where the text is from, by the names of the shards: val_web_000.bin is from "web"
    char **sources;
    int n_sources;
    int stage;                  // what the shards were made for; beyond STAGE_PRETRAIN: rows with flags
    int most_documents;         // in a row with flags
    float *reference;           // (n_windows, most_documents/2, 2) DPO: see Batch; or NULL
    uint32_t crc;               // of the size and the first bytes of each shard: tells data from other data
    uint32_t tokens_crc;        // of all tokens of all shards; 0: too many to be read beforehand
    LoaderState state;
    void *buffer;               // one window as it lies in the file
    struct Shard *open_shard[MAX_OPEN_SHARDS];  // who has the descriptor of this place, NULL = none
} DataLoader;

typedef struct Task {           // a question
    int64_t first;              // the place of its first choice
    int choices, gold;          // gold: the right one
    int source;
} Task;
typedef struct Tasks {          // multiple choice: each document is a question and one of its choices
    DataLoader data;
    Batch batch;
    int64_t n, n_documents;
    int64_t *first_document;    // (n_windows + 1) of each window, among those of all shards
    Task *task;                 // (n)
    // (n_documents) by task, then choice: which document; its length, by which acc_norm divides
    int64_t *document;
    int32_t *length;
} Tasks;

typedef struct Tokenizer {
    int kind, V, bos, eos, prefix_space;        // bos and eos: -1 = none
    int words, whole_words;     // how a text is cut into words, 0 = not; a word that is a piece is taken
    int classes;
    uint32_t *class_from;       // (classes) ascending: class << 24 | the first code point of that class
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
    int64_t tokens, targets;    // processed; trained, that is, with a loss
    double seconds, joules;     // spent in steps; joules NAN: unavailable
    uint32_t reference_crc;     // DPO: of the reference's weights; 0: none yet
    LoaderState loader;         // where the data of the next update begin
    // the data that loader.position counts in (0: not known): windows of seq_len tokens, DataLoader.crc and
    // tokens_crc
    int64_t n_windows, seq_len, data_crc, tokens_crc;
    uint64_t run;               // a random number from the first start on, so that no run prunes another's
    double losses[SPIKE_WINDOW], norms[SPIKE_WINDOW];   // of the last healthy updates, for --skip-spikes
    int64_t n_healthy;
} TrainState;

// Where the time of an update goes. data: the wait for its tokens; backward: also what --recompute repeats;
// optimizer: gradients cleared and measured, AdamW; communication: the wait for other ranks, as far as no
// compute hides it; other: all else between the update's begin and end on the host's clock.
enum { PART_DATA, PART_FORWARD, PART_BACKWARD, PART_OPTIMIZER, PART_COMMUNICATION, PART_OTHER, N_PARTS };
static const char *const part_names[] = {"data", "forward", "backward", "optimizer", "communication",
                                         "other"};

// memory: bytes that a rank may use
typedef struct Machine { int ranks, ranks_per_node; double memory; } Machine;
enum { GPU_ALLOWANCE = 800 << 20 };     // bytes outside our arenas: CUDA context, cuBLASLt, NCCL buffers

enum { ARENA_WEIGHTS, ARENA_GRADIENTS, ARENA_OPTIMIZER, ARENA_ACTIVATIONS, ARENA_WORKSPACE, N_ARENAS };
static const char *const arena_names[] = {"weights", "gradients", "optimizer", "activations", "workspace"};
typedef struct Model Model;     // section 4

typedef struct Plan {           // what decides the size of every array of a rank
    int ranks, rank, zero;
    int shard;                  // S ranks hold the shares of one copy, S*k .. S*k+S-1; 1: nothing is shared
    int B, T, chunk;            // micro-step of B sequences of T tokens; rows of logits that exist at a time
    int bf16, bf16_state, recompute;
    int training;               // 0: evaluation and samples; weights and activations are all there is
    int sample;                 // tokens of a sample whose keys and values are kept (S); 0: no samples
} Plan;

// On a GPU dk and dv are sums over a group, the H/K query heads of a key head; a block has 128 keys. Where
// these are too few blocks, parts of a group are blocks of their own. Returns how many: the least divisor of
// H/K with which the longest block, of n = T/128 tiles of queries, takes at most a quarter more than an SM's
// share of all, parts*B*K*(1 + 2 + .. + n) / SMs; else H/K. Their sums need memory, so more than PARTS_SMS
// SMs do not count.
enum { PARTS_SMS = 132 };       // of an H100
static inline int attention_parts(int B, int T, int H, int K, int SMs) {
    const int group = H / K, n = CEIL_DIV(T, 128), wanted = 8 * (SMs < PARTS_SMS ? SMs : PARTS_SMS);
    int parts = 1;
    while (parts < group && (group % parts || (int64_t)5 * parts * B * K * (n + 1) < wanted)) parts++;
    return parts;
}

// ---- what the plumbing offers ops and model; what it offers the training loop stands before that ----------
typedef struct Str { char s[4096]; } Str;               // a short text as a value, with nothing to free
// a growing text: start from zero, text_add, free(t.s)
typedef struct Text { char *s; int n, max; } Text;
enum { IO_CHUNK = 1 << 18, IO_THREADS = 16 };           // values between disk and model, per thread

// 8. die: one line, all ranks end with status 1. Random numbers are functions of (seed, stream, index)
__attribute__((noreturn, format(printf, 1, 2))) void die(const char *fmt, ...);
__attribute__((format(printf, 1, 2))) Str str(const char *fmt, ...);
void *xmalloc(size_t bytes);
void *xcalloc(size_t n, size_t size);
void *array_room(void *p, int need, int *max, size_t size);
char *xstrdup(const char *s);
double now_seconds(void);
int read_number(const char *path, double *x);           // that a file begins with; 0: there is none
void take_limit(double *limit, double x);
void cgroup_limits(const char *groups, const char *folder, double *cores, double *memory);
// seconds that a loop has waited; it calls wait_more at least once a second
typedef struct Wait { double seconds, last; } Wait;
double wait_more(Wait *w);
void wait_limit(const char *what);
uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index);
double random_uniform(uint64_t seed, uint64_t stream, uint64_t index);
void random_normals(float *out, double scale, uint64_t seed, uint64_t stream, uint64_t first, size_t n);
uint64_t hash_string(const char *s);
static int live_shown;                                  // a live line stands on the terminal
// 11
void param_table_build(ParamTable *p, const Config *c, int shard);
const Tensor *table_find(const ParamTable *p, int unit, const char *suffix);
size_t slot_at(const ParamTable *p, int u);
size_t slots_size(const ParamTable *p);
// 16
double gpu_peak(const char *name, int bf16);

// ---- what each trainer has of its own: ranks and device (section 7), model (section 4) --------------------
int comm_rank(void);
int comm_world(void);
void comm_init(int *argc, char ***argv);
void comm_finish(void);
void comm_abort(void);                                  // ends all ranks with exit status 1
void comm_barrier(void);
void comm_busy(void);                                   // to those in comm_barrier: this rank works, alone
void comm_share(int shard);                             // which ranks hold the shares of one copy
void comm_broadcast(void *data, size_t bytes);          // from rank 0
void comm_sum(double *x, int n);                        // over ranks, in place
double comm_max(double x);
// The parts of an update, between these two: what comes next is `part`; returns what was. Elsewhere it does
// nothing. seconds (N_PARTS) =: what this rank's device has done since the last call; OTHER: not measured.
void split_begin(int profiled);                         // profiled: with ranges for a profiler
int part_begin(int part);
void split_end(double *seconds);
void device_open(void);                                 // this rank's part of the machine
void device_wait(void);                                 // until it has done what it was given
Machine device_machine(void);                           // what there is to plan with, the same on all ranks
const char *device_name(void);
double device_peak(int bf16);                           // FLOP/s of a rank; NAN: unknown
// This rank's part of the machine. NAN: unavailable. Joules since some moment; the power it may take, in W
double energy_read(void);
double power_limit(void);
// For a thread of its own: joules, clock in MHz, temperature in C. 0: another rank counts for this one
int power_sample(double *joules, double *mhz, double *celsius);
int device_logits_chunk(int V);                         // rows of logits at a time that are fast here
void device_check_sizes(const Config *c);               // dies if the kernels cannot take them
void *device_host_memory(const Model *m, size_t bytes); // for a copy of the state; NULL: there is not so much
void device_host_memory_free(void *p);

// model_*, llama_*, next_logits, gradient_norm, state_share: section 4. next_document: section 5
int next_document(const Batch *batch, int b, int *t, Document *d);
enum { STATE_WEIGHTS, STATE_MASTER, STATE_M, STATE_V, STATE_GRADS };
// SHARED END

// ==== 3. Ops: forward order, each backward below its forward ===============================================
// Outputs first, then inputs, then sizes; of each output it is said whether it is = or +=. floatX is bf16 or
// float. A kernel's letters are those of the formula above it: dout_c, n_c and g_c are elements c of a row.
// `_kernel3` says how far the climb in dev/ went; the last line of its header names the steps.

// ---- the GPU of this rank, and checks of what its libraries say -------------------------------------------
typedef struct Gpu {
    cudaDeviceProp device;
    cudaStream_t stream;                // everything but communication
    cublasLtHandle_t lt;
    void *workspace;                    // cuBLASLt's
    float *scratch;                     // partial sums of kernels
    float *staging;                     // pinned: IO_CHUNK floats per thread, to or from the device
    int number;                         // of the device
    cudaStream_t comm_stream;           // sums and copies over ranks, under the compute of `stream`
    cudaEvent_t ready, summed;
    // ncclComm_t, NULL with one rank: all ranks; those that share a copy; those with this rank's shares
    void *nccl, *group, *copies;
    char bus[32];                       // PCI address: which one it is
} Gpu;
static Gpu gpu;                         // every op works on gpu.stream

#define cudaCheck(call) cuda_check((call), #call, __FILE__, __LINE__)
static inline void cuda_check(cudaError_t e, const char *call, const char *file, int line) {
    if (e != cudaSuccess) die("%s:%d: %s: %s", file, line, call, cudaGetErrorString(e));
}

#define cublasCheck(call) do { \
    cublasStatus_t s_ = (call); \
    if (s_ != CUBLAS_STATUS_SUCCESS) die("%s:%d: %s: cuBLAS status %d", __FILE__, __LINE__, #call, (int)s_); \
} while (0)

static int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// ---- launch: the one way to start a kernel ----------------------------------------------------------------
// launch(kernel, grid, block, shared_bytes, args...) starts a kernel on gpu.stream and checks the launch.
// More than 48 KiB of shared memory, static and dynamic together, is opted in to (no kernel here has more
// than 17 KiB of static). Errors inside the kernel show at the next synchronising call
// (CUDA_LAUNCH_BLOCKING=1 moves that to the launch).
#define launch(...) launch_on(gpu.stream, __VA_ARGS__)
#define launch_on(stream, ...) \
    launch_kernel(stream, "launch(" #__VA_ARGS__ ")", __FILE__, __LINE__, __VA_ARGS__)
template <typename... P, typename... A>
void launch_kernel(cudaStream_t stream, const char *call, const char *file, int line, void (*kernel)(P...),
                   dim3 grid, dim3 block, size_t shared_bytes, A... args) {
    if (shared_bytes > 31 << 10)
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                   (int)shared_bytes), call, file, line);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), call, file, line);
}

// ---- hardware verbs: all inline PTX of this file ----------------------------------------------------------
// A plain C++ compiler reads dev/emu/emu_verbs.h instead: same names, same meaning, on the CPU.
#ifdef __CUDACC__
#include <cuda.h>
// The block's dynamic shared memory, aligned to 128 bytes.
template <typename Element> __device__ __forceinline__ Element *shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<Element *>(dynamic_shared_memory);
}
__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// d (16,8) += a (16,16) b (16,8) for the warp; bf16 in, fp32 sums. With g = lane/4, t = lane%4:
//   a[0] = a(g, 2t..2t+1)   a[1] = a(g+8, 2t..)   a[2] = a(g, 2t+8..)   a[3] = a(g+8, 2t+8..)
//   b[0] = b(2t..2t+1, g)   b[1] = b(2t+8.., g)   d = d(g, 2t), d(g, 2t+1), d(g+8, 2t), d(g+8, 2t+1)
__device__ __forceinline__ void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 4 matrices of 8x8 bf16 from shared memory. Lane 8i+j passes the address of row j of matrix i (16-byte
// aligned); every lane gets r[i] = m_i(g, 2t..2t+1), transposed: m_i(2t, g), m_i(2t+1, g).
__device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Asynchronous copy of 16 bytes, global -> shared; bytes from `valid` on become zero and are not read (0: src
// is not touched). Visible to this thread after commit and wait, to the block after a barrier that follows.
__device__ __forceinline__ void cp_async_16(void *dst, const void *src, int valid = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(valid) : "memory");
}
// the same for 4 bytes
__device__ __forceinline__ void cp_async_4(void *dst, const void *src, int valid = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(valid) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// at most n committed groups are still in flight
template <int n> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}

// Named barriers 1..15 for `threads` (a multiple of 32) of the block: wait, or arrive without waiting.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Hopper's own: tensor cores that 128 threads feed from shared memory (wgmma), copies of whole tiles by one
// thread (TMA), barriers in shared memory that count bytes. They exist in code for sm_90a alone; whatever
// else this file is compiled for gets a trap in their place, and the host asks has_wgmma().
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SM90A(...) asm volatile(__VA_ARGS__)
__device__ int wgmma_compiled = 1;
#else
#define SM90A(...) (__trap(), __builtin_unreachable())
__device__ int wgmma_compiled = 0;
#endif  // sm_90a
// The code that this device loads is for sm_90a.
inline int has_wgmma(void) {
    int yes = 0;
    if (cudaMemcpyFromSymbol(&yes, wgmma_compiled, sizeof yes) != cudaSuccess) return 0;
    return yes;
}

// Dynamic shared memory of a kernel that has no other. It begins at 1024 bytes, the period of the swizzle; to
// declare that alignment would round the static shared memory of all kernels up.
template <typename Element> __device__ __forceinline__ Element *swizzled_shared_memory() {
    Element *memory = shared_memory<Element>();
    if (shared_address(memory) % 1024) __trap();
    return memory;
}

// A tensor of bf16 in global memory as TMA sees it: dim[0] elements lie side by side, the other dimensions
// are stride[] bytes apart (multiples of 16). A copy moves a box; what of it lies outside the tensor becomes
// zero. box[0] is 64: rows of 128 bytes, their 16-byte units swizzled, unit ^= row % 8.
typedef CUtensorMap TensorMap;
static inline TensorMap tensor_map(const void *base, const uint64_t (&dim)[4], const uint64_t (&stride)[3],
                                   const uint32_t (&box)[4]) {
    static decltype(&cuTensorMapEncodeTiled) encode;
    const uint32_t every[4] = {1, 1, 1, 1};
    TensorMap map;
    void *driver = encode ? NULL : dlopen("libcuda.so.1", RTLD_NOW);
    if (driver) encode = (decltype(encode))dlsym(driver, "cuTensorMapEncodeTiled");
    if (!encode) die("libcuda.so.1 has no cuTensorMapEncodeTiled: it needs a driver for CUDA 12 or newer");
    const int e = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)base, dim, stride, box, every,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e) die("cuTensorMapEncodeTiled: CUDA driver error %d", e);
    return map;
}

// An mbarrier is in phase 0, 1, 0, ... A phase ends when `arrivals` threads have arrived and the bytes that
// were announced have landed. mbarrier_wait(b, x) returns once the last phase of parity x has ended: of a
// fresh barrier that is so for 1, not for 0. After the inits a fence, then a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int arrivals) {
    SM90A("mbarrier.init.shared::cta.b64 [%0], %1;"
          :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
    SM90A("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    SM90A("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// arrives, and announces that `bytes` will land in this phase
__device__ __forceinline__ void mbarrier_expect(uint64_t *barrier, int bytes) {
    SM90A("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
          :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, int parity) {
    SM90A("{\n.reg .pred ended;\nAGAIN:\n"
          "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@!ended bra AGAIN;\n}"
          :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}
// One thread starts the copy of a box with this corner (dimension 0 first); its bytes count on the barrier.
__device__ __forceinline__ void tma_load(void *dst, const TensorMap *map, uint64_t *barrier, int x0, int x1,
                                         int x2, int x3) {
    SM90A("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
          "[%1, {%3, %4, %5, %6}], [%2];" :: "r"(shared_address(dst)), "l"(map), "r"(shared_address(barrier)),
          "r"(x0), "r"(x1), "r"(x2), "r"(x3) : "memory");
}

// The warps of a warpgroup give registers back, or take what others gave: from now on n per thread.
template <int n> __device__ __forceinline__ void registers_give() {
    SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(n));
}
template <int n> __device__ __forceinline__ void registers_take() {
    SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(n));
}

// wgmma. The four warps of a warpgroup call together; warp w gets rows 16w..16w+15 of a sum of 64 rows, in
// the fragments of mma_bf16. Operands in shared memory are swizzled rows of 128 bytes, panels of 64 columns
// panel_bytes apart. The products run while the threads go on: fence (registers are ready), products, commit
// (a group of them), wait. Until then nobody may touch their sums, nor overwrite their operands.
__device__ __forceinline__ uint64_t wgmma_operand(const void *corner, int panel_bytes) {
    return (uint64_t)(shared_address(corner) & 0x3FFFF) >> 4 | (uint64_t)panel_bytes >> 4 << 16 |
           1024ull >> 4 << 32 | 1ull << 62;                                 // 8 rows are 1024 bytes
}
__device__ __forceinline__ void wgmma_fence() { SM90A("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { SM90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }
#define SUMS_4(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
#define SUMS_16(x, n) SUMS_4(x[n]), SUMS_4(x[n + 1]), SUMS_4(x[n + 2]), SUMS_4(x[n + 3])
#define SUMS_32(x, n) SUMS_16(x, n), SUMS_16(x, n + 4)
#define REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_48 REGISTERS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_52 REGISTERS_48 ", %48, %49, %50, %51"
#define REGISTERS_64 REGISTERS_52 ", %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// at most n groups are still in flight; `sum` can be read: the compiler keeps its uses below this line
template <int n, int NT> __device__ __forceinline__ void wgmma_wait(float (&sum)[1][NT][4]) {
    SM90A("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory");
    for (int i = 0; i < NT; i++) asm volatile("" : SUMS_4(sum[0][i]) :: "memory");
}
// the same; `left`, operands of what is then over, keep their registers until this line
template <int n, int NT, int STEPS>
__device__ __forceinline__ void wgmma_wait(float (&sum)[1][NT][4], const uint32_t (&left)[STEPS][4]) {
    wgmma_wait<n>(sum);
    for (int i = 0; i < STEPS; i++)
        asm volatile("" :: "r"(left[i][0]), "r"(left[i][1]), "r"(left[i][2]), "r"(left[i][3]) : "memory");
}
// sum (64,64) = a (64,16) b^T (64,16); add: +=. Then the same with 128 rows of b
__device__ __forceinline__ void wgmma_rows(float (&sum)[1][8][4], uint64_t a, uint64_t b, int add) {
    SM90A("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32
          "}, %32, %33, add, 1, 1, 0, 0;\n}"
          : SUMS_32(sum[0], 0) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_rows(float (&sum)[1][16][4], uint64_t a, uint64_t b, int add) {
    SM90A("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
          "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64
          "}, %64, %65, add, 1, 1, 0, 0;\n}"
          : SUMS_32(sum[0], 0), SUMS_32(sum[0], 8) : "l"(a), "l"(b), "r"(add));
}
// sum (64,columns) += a (64,16) b (16,columns); a in registers, in the fragments of mma_bf16
#define WGMMA_COLUMNS(columns, registers, left, right, ...) \
    SM90A("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" registers "}, {" left "}, " \
          right ", 1, 1, 1, 1;" : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
__device__ __forceinline__ void wgmma_columns(float (&sum)[1][8][4], const uint32_t (&a)[4], uint64_t b) {
    WGMMA_COLUMNS(64, REGISTERS_32, "%32, %33, %34, %35", "%36", SUMS_32(sum[0], 0));
}
__device__ __forceinline__ void wgmma_columns(float (&sum)[1][12][4], const uint32_t (&a)[4], uint64_t b) {
    WGMMA_COLUMNS(96, REGISTERS_48, "%48, %49, %50, %51", "%52", SUMS_32(sum[0], 0), SUMS_16(sum[0], 8));
}
__device__ __forceinline__ void wgmma_columns(float (&sum)[1][13][4], const uint32_t (&a)[4], uint64_t b) {
    WGMMA_COLUMNS(104, REGISTERS_52, "%52, %53, %54, %55", "%56", SUMS_32(sum[0], 0), SUMS_16(sum[0], 8),
                  SUMS_4(sum[0][12]));
}
__device__ __forceinline__ void wgmma_columns(float (&sum)[1][16][4], const uint32_t (&a)[4], uint64_t b) {
    WGMMA_COLUMNS(128, REGISTERS_64, "%64, %65, %66, %67", "%68", SUMS_32(sum[0], 0), SUMS_32(sum[0], 8));
}

// Sums of 192 columns, both operands in shared memory: sum (64,192) += a (64,16) b^T (192,16), a (64,16) b
// (16,192). And the wait that names no sums: while they are added to, the compiler must see no use of them.
#define REGISTERS_96 REGISTERS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_192(by_columns) \
    SM90A("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" REGISTERS_96 \
          "}, %96, %97, 1, 1, 1, 0, " by_columns ";" \
          : SUMS_32(sum[0], 0), SUMS_32(sum[0], 8), SUMS_32(sum[0], 16) : "l"(a), "l"(b))
__device__ __forceinline__ void wgmma_rows(float (&sum)[1][24][4], uint64_t a, uint64_t b) { WGMMA_192("0"); }
__device__ __forceinline__ void wgmma_columns(float (&sum)[1][24][4], uint64_t a, uint64_t b) {
    WGMMA_192("1");
}
template <int n> __device__ __forceinline__ void wgmma_wait() {
    SM90A("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory");
}

// 2^x, relative error 2^-22; results below 2^-126 are 0
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Hides from the compiler where the bits of a word came from.
__device__ __forceinline__ void forget_origin(uint32_t &word) { asm volatile("" : "+r"(word)); }

__device__ __forceinline__ uint4 load_16B(const void *p) { return *(const uint4 *)p; }
__device__ __forceinline__ void store_16B(void *p, uint4 v) { *(uint4 *)p = v; }
#else
#include "emu_verbs.h"
#endif

// e^x, relative error 2^-22 + |x| 2^-24
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * 1.44269504f); }

// ---- conversions: to fp32 exact, from fp32 one rounding to nearest even -----------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
// two values as one mma operand register
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// ---- reductions: all lanes or threads get the result, in an order that depends only on the block size -----
// of each 2^n lanes
template <typename Real> __device__ __forceinline__ Real warp_sum(Real x, int lanes = 32) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x, int lanes = 32) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}
__device__ __forceinline__ int thread_in_block() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ int threads_in_block() {     // a multiple of 32 below
    return blockDim.x * blockDim.y * blockDim.z;
}
template <typename Real> __device__ Real block_sum(Real x) {
    __shared__ Real part[32];
    const int lane = thread_in_block() % 32, warp = thread_in_block() / 32;
    x = warp_sum(x);
    if (lane == 0) part[warp] = x;
    __syncthreads();
    x = warp_sum(lane < threads_in_block() / 32 ? part[lane] : Real(0));
    __syncthreads();                                                        // part is free for the next call
    return x;
}

// Sum over the threads with this threadIdx.y (whole warps); all of them get it. The one barrier inside is
// enough if calls alternate `turn` between 0 and 1: a warp can be at most one call ahead of another.
__device__ __forceinline__ float row_sum(float x, int turn) {
    __shared__ float part[2][32];
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32, first = threadIdx.y * warps;
    x = warp_sum(x);
    if (lane == 0) part[turn][first + threadIdx.x / 32] = x;
    __syncthreads();
    return warps == 1 ? x : warp_sum(lane < warps ? part[turn][first + lane] : 0);
}

// ---- packs: E neighbouring elements as they lie in memory -------------------------------------------------
// One access of 16 bytes (8 bf16, 4 fp32) or of 8 (4 bf16). Kernels where fp32 sums lie beside bf16 values
// take 4 elements per lane: both sides of the access are then contiguous over the warp. Arrays of constant
// size live in registers if every loop over them unrolls: the compiler sees to short ones, the pragma to
// others.
template <typename floatX, int E> struct __align__(E * sizeof(floatX)) Pack {
    uint32_t word[E * sizeof(floatX) / 4];
};

template <int E, typename floatX> __device__ __forceinline__ Pack<floatX, E> load(const floatX *p) {
    Pack<floatX, E> pack;
    if constexpr (sizeof pack == 16) { uint4 bits = load_16B(p); memcpy(&pack, &bits, sizeof pack); }
    else { uint2 bits = *(const uint2 *)p; memcpy(&pack, &bits, sizeof pack); }
    return pack;
}
template <int E, typename floatX>
__device__ __forceinline__ void store(floatX *p, const Pack<floatX, E> &pack) {
    if constexpr (sizeof pack == 16)
        store_16B(p, make_uint4(pack.word[0], pack.word[1], pack.word[2], pack.word[3]));
    else *(uint2 *)p = make_uint2(pack.word[0], pack.word[1]);
}
template <int E, typename floatX>                                           // else zeros
__device__ __forceinline__ Pack<floatX, E> load_if(bool condition, const floatX *p) {
    Pack<floatX, E> pack = {};
    if (condition) pack = load<E>(p);
    return pack;
}
template <int E> __device__ __forceinline__ void widen(float (&x)[E], const Pack<float, E> &pack) {
    for (int k = 0; k < E; k++) x[k] = __uint_as_float(pack.word[k]);
}
template <int E> __device__ __forceinline__ void widen(float (&x)[E], const Pack<bf16, E> &pack) {
    for (int k = 0; k < E; k += 2) {
        x[k] = __uint_as_float(pack.word[k / 2] << 16);
        x[k + 1] = __uint_as_float(pack.word[k / 2] & 0xFFFF0000u);
    }
}
template <typename floatX, int E>                                           // rounds to nearest even
__device__ __forceinline__ Pack<floatX, E> narrow(const float (&x)[E]) {
    Pack<floatX, E> pack;
    if constexpr (sizeof(floatX) == 4) for (int k = 0; k < E; k++) pack.word[k] = __float_as_uint(x[k]);
    else for (int k = 0; k < E; k += 2) pack.word[k / 2] = pack_bf16(x[k], x[k + 1]);
    return pack;
}

template <int E, typename floatX>                                           // sum += p[0..E-1]
__device__ __forceinline__ void accumulate(float (&sum)[E], const floatX *p) {
    float x[E];
    widen(x, load<E>(p));
    for (int k = 0; k < E; k++) sum[k] += x[k];
}

// For a row that is used again after a reduction. Else the compiler keeps the fp32 copies that the first pass
// made, twice the registers of the bf16 values.
template <typename floatX, int E, int PACKS>
__device__ __forceinline__ void keep_packed(Pack<floatX, E> (&row)[PACKS]) {
    for (int j = 0; j < PACKS; j++) for (uint32_t &word : row[j].word) forget_origin(word);
}

// ---- sums over rows go through partial sums of blocks -----------------------------------------------------
// blocks that write partial sums, a row of gpu.scratch each: two per SM of an H100
enum { MAX_PARTIALS = 264 };

// Blocks for kernels that keep partial sums over many rows: each handles about two groups of `rows` rows or
// more.
static int partial_blocks(int N, int rows) {
    static int sm_count = device_attribute(cudaDevAttrMultiProcessorCount);
    return min(CEIL_DIV(N, 2 * rows), min(2 * sm_count, (int)MAX_PARTIALS));
}

// ---- column_sums_kernel1: the blocks, in a fixed order ----------------------------------------------------
// out (cols) += column sums of x (rows, stride)
// bytes   4·rows·cols + 8·cols = 2.2 MB for 264 rows of 2048: a launch, not a throughput, is its cost
// idea    32 columns per block, its 32 warps share out the rows
// variants dev/bias_backward.cu: 0 a thread per column, 1 this
__global__ void column_sums_kernel1(float *out, const float *x, int rows, int cols, int stride) {
    __shared__ float part[32][32];
    const int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (column < cols)
        for (int row = threadIdx.y; row < rows; row += 32) sum += x[(size_t)row * stride + column];
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= cols) return;
    float total = 0;
    for (int warp = 0; warp < 32; warp++) total += part[warp][threadIdx.x];
    out[column] += total;
}

void column_sums(float *out, const float *x, int rows, int cols, int stride) {
    launch(column_sums_kernel1, CEIL_DIV(cols, 32), dim3(32, 32), 0, out, x, rows, cols, stride);
}

// ---- add_sum_kernel1: one number --------------------------------------------------------------------------
// sum (1) += x (n), each times its weight (n) unless that is NULL, in double and in a fixed order
// idea    one block: what is summed so (losses, partial sums) is little beside a step
// variants dev/cross_entropy.cu: 0 one thread, 1 this
template <typename Real>
__global__ void add_sum_kernel1(double *sum, const Real *x, const double *weight, int n) {
    double mine = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine += weight ? weight[i] * x[i] : (double)x[i];
    mine = block_sum(mine);
    if (threadIdx.x == 0) *sum += mine;
}

template <typename Real> void add_sum(double *sum, const Real *x, const double *weight, int n) {
    launch(add_sum_kernel1<Real>, 1, 1024, 0, sum, x, weight, n);
}

// ---- the rows of a batch by token: both directions of the embedding go through them in this order ---------
// Counting sort: rows order[starts[i]] .. order[starts[i+1]-1] have token tokens[i]; tokens ascend.
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

// ---- embedding_forward_kernel3: rows in the order of their tokens -----------------------------------------
// x (N,C) = w[ids]     w (V,C), ids (N), order (N): the rows sorted by token
// bytes   2·N·C out + 2·C per distinct token in; N 16384, C 2048, 4000 distinct: 83 MB   floor 25 us (memory)
// idea    a warp has 32 neighbours of the order and 512 columns, and keeps the token's columns in registers
//         until the token changes: a comma that is 5% of the rows is read 26 times, not 800
// limits  C % 8 == 0 in bf16, C % 4 == 0 in fp32
// variants dev/embedding.cu: 0 a thread per element, 1 16 bytes per thread, 2 a warp per row, 3 this
enum { EMBED_WARPS = 8, EMBED_QUADS = 4, EMBED_COLUMNS = EMBED_QUADS * 128, EMBED_RUN = 32 };

template <typename floatX>
__global__ void embedding_forward_kernel3(floatX *__restrict__ x, const int *ids, const int *order,
                                          const floatX *__restrict__ w, int N, int C) {
    constexpr int E = 16 / sizeof(floatX), STEP = 32 * E, PACKS = EMBED_COLUMNS / STEP;
    const int c0 = blockIdx.y * EMBED_COLUMNS + threadIdx.x * E;
    const int first = (blockIdx.x * EMBED_WARPS + threadIdx.y) * EMBED_RUN, last = min(first + EMBED_RUN, N);
    Pack<floatX, E> row[PACKS] = {};
    for (int j = first, held = -1; j < last; j++) {
        const int n = order[j], token = ids[n];
        if (token != held) {
            held = token;
            for (int i = 0; i < PACKS; i++)
                row[i] = load_if<E>(c0 + i * STEP < C, w + (size_t)token * C + c0 + i * STEP);
        }
        for (int i = 0; i < PACKS; i++)
            if (c0 + i * STEP < C) store(x + (size_t)n * C + c0 + i * STEP, row[i]);
    }
}

template <typename floatX>
void embedding_forward(floatX *x, const int *ids, const int *order, const floatX *w, int N, int C) {
    assert(C % (16 / sizeof(floatX)) == 0);
    const dim3 grid(CEIL_DIV(N, EMBED_WARPS * EMBED_RUN), CEIL_DIV(C, EMBED_COLUMNS));
    launch(embedding_forward_kernel3<floatX>, grid, dim3(32, EMBED_WARPS), 0, x, ids, order, w, N, C);
}

// ---- embedding_backward_kernel3: the rows of a token are one sum ------------------------------------------
// dw (Vp,C) += for each token the sum of its rows of dx (N,C), those of sort_rows' order, starts and tokens
// bytes   2·N·C in + 8·C per distinct token (dw read and written);  N 16384, C 2048, 4000 distinct: 133 MB
//         floor 40 us (memory)
// idea    rows sorted by token: every row of dw has one writer, no atomics. A warp owns a token and 512
//         columns; tokens with more than LONG rows (a comma can be 5% of a batch) are summed by all warps of
//         the block together
// limits  C % 4 == 0
// variants dev/embedding.cu: 0 a thread per column, 1 atomics, 2 rows sorted, a warp per token, 3 this
enum { EMBED_LONG = 16 };

template <typename floatX>
__device__ __forceinline__ void add_rows(float (&sum)[EMBED_QUADS][4], const floatX *dx, const int *order,
                                         int first, int last, int step, int c0, int C) {
    for (int q = 0; q < EMBED_QUADS; q++) for (int k = 0; k < 4; k++) sum[q][k] = 0;
    #pragma unroll 2
    for (int j = first; j < last; j += step) {
        const floatX *dx_n = dx + (size_t)order[j] * C;
        for (int q = 0; q < EMBED_QUADS; q++) if (c0 + q * 128 < C) accumulate(sum[q], dx_n + c0 + q * 128);
    }
}

template <typename floatX>
__global__ void embedding_backward_kernel3(float *dw, const int *order, const int *starts, const int *tokens,
                                           int n_distinct, const floatX *dx, int C) {
    __shared__ int first[EMBED_WARPS + 1];  // rows first[i] .. first[i+1]-1 are those of the block's token i
    __shared__ __align__(16) float part[EMBED_WARPS][EMBED_QUADS][32][4];
    const int lane = threadIdx.x, warp = threadIdx.y, token0 = blockIdx.x * EMBED_WARPS;
    const int c0 = blockIdx.y * EMBED_COLUMNS + lane * 4;
    if (warp == 0 && lane <= EMBED_WARPS)
        first[lane] = starts[token0 + lane < n_distinct ? token0 + lane : n_distinct];
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
            for (int j = 0; j < EMBED_WARPS; j++) accumulate(total, part[j][warp][lane]);
            accumulate(total, dw_i);
            store(dw_i, narrow<float>(total));
        }
        __syncthreads();
    }
}

template <typename floatX>
void embedding_backward(float *dw, const int *order, const int *starts, const int *tokens, int n_distinct,
                        const floatX *dx, int N, int C) {
    assert(C % 4 == 0 && n_distinct > 0 && n_distinct <= N);
    const dim3 grid(CEIL_DIV(n_distinct, EMBED_WARPS), CEIL_DIV(C, EMBED_COLUMNS));
    launch(embedding_backward_kernel3<floatX>, grid, dim3(32, EMBED_WARPS), 0, dw, order, starts, tokens,
           n_distinct, dx, C);
}

// ---- rmsnorm_forward_kernel3: the row stays in registers --------------------------------------------------
// out (N,C) = x_c r w_c,  rstd (N) = r = (mean_c x_c^2 + eps)^(-1/2)      (Zhang & Sennrich 2019)
// bytes   2·N·C in + 2·N·C out = 134 MB for N 16384, C 2048        floor 40 us (memory). x already holds the
//         residual sum: the product before it has added it (matmul_forward's `add`), for one read of x there
//         and none here
// idea    a row is read once and kept as bf16 in registers (4 packs per thread); w is copied once per block
//         to shared memory, asynchronously under the first rows, and serves at least 8 rows
// limits  C % 8 == 0 (fp32: C % 4 == 0), C <= 16384 (1024 threads x 4 packs of fp32)
// variants dev/rmsnorm_forward.cu: 0 a thread per row, 1 a warp per row, 2 16-byte accesses, 3 this
enum { ROW_PACKS = 4, ROW_THREADS = 512 };

template <typename floatX>
__global__ void __launch_bounds__(1024) rmsnorm_forward_kernel3(floatX *out, float *rstd, const floatX *x,
                                                                const floatX *w, float eps, int N, int C) {
    // a warp has ROW_PACKS * STEP columns next to each other
    constexpr int E = 16 / sizeof(floatX), STEP = 32 * E;
    floatX *w_shared = shared_memory<floatX>();             // (C)
    const int c0 = threadIdx.x / 32 * ROW_PACKS * STEP + threadIdx.x % 32 * E;
    for (int c = thread_in_block() * E; c < C; c += threads_in_block() * E) cp_async_16(w_shared + c, w + c);
    cp_async_commit();
    int turn = 0;
    for (int n0 = blockIdx.x * blockDim.y; n0 < N; n0 += gridDim.x * blockDim.y, turn ^= 1) {
        const int n = n0 + threadIdx.y, end = n < N ? C : 0;
        const size_t at = (size_t)n * C + c0;
        Pack<floatX, E> row[ROW_PACKS];
        for (int j = 0; j < ROW_PACKS; j++) row[j] = load_if<E>(c0 + j * STEP < end, x + at + j * STEP);
        float squares = 0;
        #pragma unroll
        for (int j = 0; j < ROW_PACKS; j++) {
            float x_c[E];
            widen(x_c, row[j]);
            for (int k = 0; k < E; k++) squares += x_c[k] * x_c[k];
        }
        keep_packed(row);
        cp_async_wait<0>();                                 // w is visible after the barrier in row_sum
        const float r = rsqrtf(row_sum(squares, turn) / C + eps);
        if (threadIdx.x == 0 && n < N) rstd[n] = r;
        #pragma unroll
        for (int j = 0; j < ROW_PACKS; j++) {
            if (c0 + j * STEP >= end) continue;
            float x_c[E], w_c[E], out_c[E];
            widen(x_c, row[j]);
            widen(w_c, load<E>(w_shared + c0 + j * STEP));
            // backward in this order: the same bits
            for (int k = 0; k < E; k++) out_c[k] = x_c[k] * r * w_c[k];
            store(out + at + j * STEP, narrow<floatX>(out_c));
        }
    }
}

template <typename floatX>
void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const floatX *w, float eps, int N, int C) {
    const int E = 16 / sizeof(floatX), threads = CEIL_DIV(C, 32 * ROW_PACKS * E) * 32;
    const int rows = max(ROW_THREADS / threads, 1), turns = CEIL_DIV(8, rows);
    assert(C % E == 0 && threads <= 1024);
    launch(rmsnorm_forward_kernel3<floatX>, CEIL_DIV(N, rows * turns), dim3(threads, rows),
           C * sizeof(floatX), out, rstd, x, w, eps, N, C);
}

// ---- rmsnorm_backward_kernel3: dout, x and dx are read once -----------------------------------------------
// With g_c = dout_c w_c and n_c = x_c r:   dx_c += r (g_c - n_c mean_j(g_j n_j)),   dw_c += sum dout_c n_c
// dx (N,C) += (the residual path), dw (C) += (over rows), norm_out (N,C) = n_c w_c (the forward's output
// again, for the weight gradient; or NULL)
// bytes   3·N·C in + 1·N·C (norm_out: 2·N·C) out, 2 bytes each = 268 MB (336 MB) for N 16384, C 2048
//         floor 80 us (100 us). Partial sums of dw: 264·C·4 bytes written, then read by column_sums: 2.2 MB
//         each
// idea    16 elements per thread of each operand stay in registers over the reduction. A thread adds its
//         share of dw over all its rows in shared memory (its own place: no barrier); the rows of a block are
//         added there, the blocks by column_sums
// limits  C % 4 == 0, C <= 16384 (fp32 on devices with 99 KiB of shared memory per block: 12640)
// variants dev/rmsnorm_backward.cu: 0 a thread per row, 1 a warp per row, 2 dw on the way, 3 this
enum { ROW_QUADS = 4 };

template <typename floatX>
__global__ void __launch_bounds__(1024) rmsnorm_backward_kernel3(floatX *dx, float *partials,
        floatX *norm_out, const floatX *dout, const floatX *x, const float *rstd, const floatX *w, int N,
        int C) {
    constexpr bool early = sizeof(floatX) == 2;  // fp32 has no registers left to hold dx over the reduction
    constexpr int STEP = 32 * 4;  // a warp has ROW_QUADS * STEP columns next to each other
    // (blockDim.y,C): of this block's rows
    float *sums = shared_memory<float>(), *dw = sums + threadIdx.y * C;
    floatX *w_shared = (floatX *)(sums + blockDim.y * C);   // (C)
    const int c0 = threadIdx.x / 32 * ROW_QUADS * STEP + threadIdx.x % 32 * 4;
    for (int c = thread_in_block() * 4; c < C; c += threads_in_block() * 4)
        store(w_shared + c, load<4>(w + c));
    for (int j = 0; j < ROW_QUADS; j++) if (c0 + j * STEP < C) store(dw + c0 + j * STEP, Pack<float, 4>{});
    __syncthreads();
    int turn = 0;
    for (int n0 = blockIdx.x * blockDim.y; n0 < N; n0 += gridDim.x * blockDim.y, turn ^= 1) {
        const int n = n0 + threadIdx.y, end = n < N ? C : 0;
        const size_t at = (size_t)n * C + c0;
        Pack<floatX, 4> dout_row[ROW_QUADS], x_row[ROW_QUADS], dx_row[ROW_QUADS];
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            dout_row[j] = load_if<4>(c0 + j * STEP < end, dout + at + j * STEP);
            x_row[j] = load_if<4>(c0 + j * STEP < end, x + at + j * STEP);
            if (early) dx_row[j] = load_if<4>(c0 + j * STEP < end, dx + at + j * STEP);
        }
        float gn = 0;
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            if (c0 + j * STEP >= end) continue;
            float dout_c[4], x_c[4], w_c[4];
            widen(dout_c, dout_row[j]);
            widen(x_c, x_row[j]);
            widen(w_c, load<4>(w_shared + c0 + j * STEP));
            for (int k = 0; k < 4; k++) gn += dout_c[k] * w_c[k] * x_c[k];
        }
        keep_packed(dout_row);
        keep_packed(x_row);
        const float r = n < N ? rstd[n] : 0, mean = row_sum(gn, turn) * r / C;
        #pragma unroll
        for (int j = 0; j < ROW_QUADS; j++) {
            if (c0 + j * STEP >= end) continue;
            if (!early) dx_row[j] = load<4>(dx + at + j * STEP);
            float dout_c[4], x_c[4], w_c[4], dx_c[4], dw_c[4], norm_c[4];
            widen(dout_c, dout_row[j]);
            widen(x_c, x_row[j]);
            widen(w_c, load<4>(w_shared + c0 + j * STEP));
            widen(dx_c, dx_row[j]);
            widen(dw_c, load<4>(dw + c0 + j * STEP));
            for (int k = 0; k < 4; k++) {
                const float n_c = x_c[k] * r, g_c = dout_c[k] * w_c[k];
                dw_c[k] += dout_c[k] * n_c;
                dx_c[k] += r * (g_c - n_c * mean);
                norm_c[k] = n_c * w_c[k];
            }
            store(dw + c0 + j * STEP, narrow<float>(dw_c));
            store(dx + at + j * STEP, narrow<floatX>(dx_c));
            if (norm_out) store(norm_out + at + j * STEP, narrow<floatX>(norm_c));
        }
    }
    __syncthreads();
    for (int c = thread_in_block() * 4; c < C; c += threads_in_block() * 4) {
        float total[4] = {};
        for (int y = 0; y < (int)blockDim.y; y++) accumulate(total, sums + y * C + c);
        store(partials + (size_t)blockIdx.x * C + c, narrow<float>(total));
    }
}

template <typename floatX>
void rmsnorm_backward(floatX *dx, float *dw, floatX *norm_out, const floatX *dout, const floatX *x,
                      const float *rstd, const floatX *w, int N, int C) {
    const int threads = CEIL_DIV(C, 32 * 4 * ROW_QUADS) * 32, rows = max(ROW_THREADS / threads, 1);
    const int blocks = partial_blocks(N, rows);
    assert(C % 4 == 0 && threads <= 1024);
    launch(rmsnorm_backward_kernel3<floatX>, blocks, dim3(threads, rows),
           C * (rows * sizeof(float) + sizeof(floatX)), dx, gpu.scratch, norm_out, dout, x, rstd, w, N, C);
    column_sums(dw, gpu.scratch, blocks, C, C);
}

// ---- matmul: cuBLASLt -------------------------------------------------------------------------------------
// cuBLASLt is column-major, so a row-major out (M,N) is its (N,M) matrix: out^T = op(b)^T op(a)^T. The
// algorithm of each shape is the first that the heuristic names, never the fastest of a trial: two runs
// multiply alike. Sums are fp32; TF32 is off.
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

static cublasLtMatrixLayout_t matrix_layout(int is_bf16, int rows, int cols) {      // row-major, contiguous
    cublasLtMatrixLayout_t layout;
    cublasCheck(cublasLtMatrixLayoutCreate(&layout, is_bf16 ? CUDA_R_16BF : CUDA_R_32F, (uint64_t)cols,
                                           (uint64_t)rows, cols));
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
        prefer(operand, (uint32_t)16);                      // what every one has; cuBLASLt would assume 256
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt, p->op, p->b, p->a, p->out, p->out, preference,
                                                           1, &found, &n_found);
    if (status != CUBLAS_STATUS_SUCCESS || !n_found || found.state != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt has no algorithm for a matrix product of %d x %d x %d (cuBLAS status %d); choose sizes "
            "that are multiples of 8", p->M, p->N, p->K, (int)status);
    p->algo = found.algo;
    cublasLtMatmulPreferenceDestroy(preference);
    return p;
}

// A pointer that the compiler does not deduce floatX from, so that a call may say NULL
template <typename floatX> using or_null = const std::common_type_t<floatX> *;

// out (M,N) = op(a) op(b) + add (M,N) + bias (N), each sum rounded once; add (may be out itself: +=) and bias
// may be NULL. a is (M,K), or (K,M) if trans_a; b is (K,N), or (N,K) if trans_b. Types: bf16 or float.
template <typename Out, typename In>
void matmul(Out *out, const In *a, int trans_a, const In *b, int trans_b, int M, int N, int K,
            or_null<Out> add, or_null<Out> bias) {
    const MatmulPlan key = {M, N, K, trans_a, trans_b, sizeof(In) == 2, sizeof(Out) == 2, bias != NULL};
    const MatmulPlan *p = matmul_plan(gpu.lt, &key);
    const auto pointer = CUBLASLT_MATMUL_DESC_BIAS_POINTER;
    if (bias) cublasCheck(cublasLtMatmulDescSetAttribute(p->op, pointer, &bias, sizeof bias));
    const float alpha = 1, beta = add ? 1.0f : 0.0f;
    cublasCheck(cublasLtMatmul(gpu.lt, p->op, &alpha, b, p->b, a, p->a, &beta, add ? add : out, p->out, out,
                               p->out, &p->algo, gpu.workspace, LT_WORKSPACE, gpu.stream));
}

// out (N,OC) = x (N,C) w (OC,C)^T + add (N,OC) + bias (OC); add: the residual stream; either may be NULL
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

// ---- bias_backward_kernel2: the bias of q, k and v (Qwen2); the product above adds it ---------------------
// dbias (OC) += column sums of dqkv (N,OC)
// bytes   2·N·OC in + partial sums 2·4·chunks·OC;  N 16384, OC 2560: 84 + 1 MB        floor 25 us (memory)
// idea    a block sums 128 columns of a chunk of rows, a lane four columns; column_sums adds the chunks
// limits  OC % 4 == 0
// variants dev/bias_backward.cu: 0 a thread per column, 1 chunks of rows, 2 this
enum { BIAS_WARPS = 8, BIAS_ROWS = 64 };                    // a chunk has about BIAS_ROWS rows or more

template <typename floatX>
__global__ void bias_backward_kernel2(float *partials, const floatX *dqkv, int N, int OC) {
    __shared__ __align__(16) float part[BIAS_WARPS][32][4];
    const int column = (blockIdx.x * 32 + threadIdx.x) * 4;
    float sum[4] = {};
    #pragma unroll 8
    for (int n = blockIdx.y * BIAS_WARPS + threadIdx.y; column < OC && n < N; n += gridDim.y * BIAS_WARPS)
        accumulate(sum, dqkv + (size_t)n * OC + column);
    store(part[threadIdx.y][threadIdx.x], narrow<float>(sum));
    __syncthreads();
    if (threadIdx.y > 0 || column >= OC) return;
    for (int warp = 1; warp < BIAS_WARPS; warp++) accumulate(sum, part[warp][threadIdx.x]);
    store(partials + (size_t)blockIdx.y * OC + column, narrow<float>(sum));
}

template <typename floatX> void bias_backward(float *dbias, const floatX *dqkv, int N, int OC) {
    const int columns = CEIL_DIV(OC, 128), most = min(CEIL_DIV(4 * MAX_PARTIALS, columns), (int)MAX_PARTIALS);
    const int chunks = min(CEIL_DIV(N, BIAS_ROWS), most);   // `most` blocks fill the device
    assert(OC % 4 == 0);
    launch(bias_backward_kernel2<floatX>, dim3(columns, chunks), dim3(32, BIAS_WARPS), 0, gpu.scratch, dqkv,
           N, OC);
    column_sums(dbias, gpu.scratch, chunks, OC, OC);
}

// ---- rotary embedding (Su et al. 2021): the angles --------------------------------------------------------
// cosine, sine (T,D/2) on the device, of t * theta^(-2i/D), for Llama 3 stretched: see the twin.
static void rope_table(float *cosine, float *sine, const Config *config, int T) {
    const double PI = 3.14159265358979323846;
    const int D = config->D;
    size_t n = (size_t)T * (D / 2);
    float *host = (float *)xmalloc(2 * n * sizeof(float));
    for (int i = 0; i < D / 2; i++) {
        double freq = pow(config->rope_theta, -2.0 * i / D);
        if (config->rope_factor > 0) {
            double turns = config->rope_original_T * freq / (2 * PI);
            double keep = (turns - config->rope_low) / (config->rope_high - config->rope_low);
            keep = fmin(fmax(keep, 0), 1);
            freq *= keep + (1 - keep) / config->rope_factor;
        }
        for (int t = 0; t < T; t++) {
            host[(size_t)t * (D / 2) + i] = (float)cos(t * freq);
            host[n + (size_t)t * (D / 2) + i] = (float)sin(t * freq);
        }
    }
    cudaCheck(cudaMemcpyAsync(cosine, host, n * sizeof(float), cudaMemcpyHostToDevice, gpu.stream));
    cudaCheck(cudaMemcpyAsync(sine, host + n, n * sizeof(float), cudaMemcpyHostToDevice, gpu.stream));
    cudaCheck(cudaStreamSynchronize(gpu.stream));
    free(host);
}

// ---- qk_norm_rope_forward_kernel2: one warp per row, angles in registers ----------------------------------
// The q and k heads y of qkv (N,(H+2K)D), in place.  With norm (Qwen3): qk_raw (N,(H+K)D) = y, qk_rstd
// (N,H+K) = r = (mean y^2 + eps)^(-1/2), y *= r w (w = q_norm or k_norm (D)); then the pair (y_i, y_{i+D/2})
// turns by the angle of position n % T (cosine, sine (T,D/2)). q_norm NULL: no norm, qk_raw and qk_rstd are
// not written.
// bytes   2·N·(H+K)·D in + out + 4·N·D of angles (norm: + 2·N·(H+K)·D raw) = 160 MB for N 16384, H 16, K 2,
//         D 128        floor 48 us (memory)
// idea    lane l of a head holds elements 4l..4l+3 of both halves, so that a pair meets in one lane and any
//         D % 8 == 0 works (D 104: 13 of 16 lanes). The angles of those elements are the same for every head:
//         read once per row. Norm weights are in shared memory, once per block
// limits  D % 8 == 0, D <= 256
// variants dev/rope.cu: 0 a thread per head, 1 a warp per head, 2 this
enum { ROPE_WARPS = 8 };                                    // rows of a block

static int lanes_per_head(int D) {  // a power of two, so that a head's sum is a butterfly
    int lanes = 1;
    while (lanes * 8 < D) lanes *= 2;
    assert(D % 8 == 0 && lanes <= 32);
    return lanes;
}

template <typename floatX, bool NORM>
__global__ void qk_norm_rope_forward_kernel2(floatX *qkv, floatX *qk_raw, float *qk_rstd,
        const floatX *q_norm, const floatX *k_norm, const float *cosine, const float *sine, float eps, int H,
        int K, int D, int lanes,
        int N, int T) {
    constexpr int AHEAD = NORM || sizeof(floatX) == 4 ? 2 : 4;  // heads that a lane reads at a time
    floatX *w_shared = shared_memory<floatX>();                 // (2,D) if NORM
    const int lane = threadIdx.x % 32, head = lane / lanes, heads = 32 / lanes, i = lane % lanes * 4;
    const int half = D / 2;
    const bool active = i < half;
    if (NORM) {
        for (int d = threadIdx.x * 4; d < 2 * D; d += blockDim.x * 4)
            store(w_shared + d, load<4>(d < D ? q_norm + d : k_norm + d - D));
        __syncthreads();
    }
    for (int n = blockIdx.x * ROPE_WARPS + threadIdx.x / 32; n < N; n += gridDim.x * ROPE_WARPS) {
        floatX *y = qkv + (size_t)n * (H + 2 * K) * D + i;
        const size_t angle = (size_t)(n % T) * half + i;
        float cosine_i[4], sine_i[4];
        widen(cosine_i, load_if<4>(active, cosine + angle));
        widen(sine_i, load_if<4>(active, sine + angle));
        for (int h0 = 0; h0 < H + K; h0 += AHEAD * heads) {
            Pack<floatX, 4> lo[AHEAD], hi[AHEAD];
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int h = h0 + u * heads + head;
                lo[u] = load_if<4>(active && h < H + K, y + h * D);
                hi[u] = load_if<4>(active && h < H + K, y + h * D + half);
            }
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int h = h0 + u * heads + head;
                const bool here = active && h < H + K;
                float y_lo[4], y_hi[4], w_lo[4], w_hi[4];
                widen(y_lo, lo[u]);
                widen(y_hi, hi[u]);
                if (NORM) {
                    float squares = 0;
                    for (int k = 0; k < 4; k++) squares += y_lo[k] * y_lo[k] + y_hi[k] * y_hi[k];
                    const float r = rsqrtf(warp_sum(squares, lanes) / D + eps);
                    if (here) {
                        const size_t at = (size_t)n * (H + K) + h;
                        const floatX *w = w_shared + (h < H ? 0 : D) + i;
                        store(qk_raw + at * D + i, lo[u]);
                        store(qk_raw + at * D + i + half, hi[u]);
                        if (i == 0) qk_rstd[at] = r;
                        widen(w_lo, load<4>(w));
                        widen(w_hi, load<4>(w + half));
                        for (int k = 0; k < 4; k++) y_lo[k] *= r * w_lo[k], y_hi[k] *= r * w_hi[k];
                    }
                }
                if (!here) continue;
                for (int k = 0; k < 4; k++) {
                    const float turned = y_lo[k] * cosine_i[k] - y_hi[k] * sine_i[k];
                    y_hi[k] = y_hi[k] * cosine_i[k] + y_lo[k] * sine_i[k];
                    y_lo[k] = turned;
                }
                store(y + h * D, narrow<floatX>(y_lo));
                store(y + h * D + half, narrow<floatX>(y_hi));
            }
        }
    }
}

template <typename floatX>
void qk_norm_rope_forward(floatX *qkv, floatX *qk_raw, float *qk_rstd, const floatX *q_norm,
                          const floatX *k_norm, const float *cosine, const float *sine, float eps, int H,
                          int K, int D, int N, int T) {
    const auto kernel = q_norm ? qk_norm_rope_forward_kernel2<floatX, true>
                               : qk_norm_rope_forward_kernel2<floatX, false>;
    launch(kernel, CEIL_DIV(N, ROPE_WARPS), 32 * ROPE_WARPS, 2 * D * sizeof(floatX), qkv, qk_raw, qk_rstd,
           q_norm, k_norm, cosine, sine, eps, H, K, D, lanes_per_head(D), N, T);
}

// ---- qk_norm_rope_backward_kernel2: the forward's layout, turned back -------------------------------------
// dqkv (N,(H+2K)D) in place: gradients after the rotation become gradients before norm and rotation; v is not
// touched.
// e = dqkv turned by minus the angle; without norm dqkv = e. With norm, y = qk_raw, n_d = y_d r,
// g_d = e_d w_d:
//   dqkv_d = r (g_d - n_d mean_j(g_j n_j))        dq_norm, dk_norm (D) += sum over rows and heads of e_d n_d
// bytes   2·N·(H+K)·D in + out + 4·N·D of angles (norm: + 2·N·(H+K)·D raw) = 160 MB for N 16384, H 16, K 2,
//         D 128        floor 48 us (memory)
// idea    as in the forward; a lane sees the same 8 elements of every head, so it keeps their weight
//         gradients in registers
// limits  as the forward
// variants dev/rope.cu: 0 a thread per head, 1 a warp per head, 2 this
template <typename floatX, bool NORM>
__global__ void qk_norm_rope_backward_kernel2(floatX *dqkv, float *partials, const floatX *qk_raw,
        const float *qk_rstd, const floatX *q_norm, const floatX *k_norm, const float *cosine,
        const float *sine,
        int H, int K, int D, int lanes, int N, int T) {
    constexpr int AHEAD = NORM || sizeof(floatX) == 4 ? 2 : 4;  // heads that a lane reads at a time
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int head = lane / lanes, heads = 32 / lanes, i = lane % lanes * 4, half = D / 2;
    const bool active = i < half;
    float dw[4][4] = {};                                        // q: lower half, upper half; k: the same
    for (int n = blockIdx.x * ROPE_WARPS + warp; n < N; n += gridDim.x * ROPE_WARPS) {
        const size_t angle = (size_t)(n % T) * half + i;
        float cosine_i[4], sine_i[4];
        widen(cosine_i, load_if<4>(active, cosine + angle));
        widen(sine_i, load_if<4>(active, sine + angle));
        #pragma unroll
        for (int part = 0; part < 2; part++) {                  // q, k
            const int count = part == 0 ? H : K, first = part == 0 ? 0 : H;
            const size_t at = (size_t)n * (H + K) + first;
            const floatX *w = part == 0 ? q_norm : k_norm;
            floatX *dy = dqkv + ((size_t)n * (H + 2 * K) + first) * D + i;
            float w_lo[4], w_hi[4];
            if (NORM) widen(w_lo, load_if<4>(active, w + i));
            if (NORM) widen(w_hi, load_if<4>(active, w + half + i));
            for (int h0 = 0; h0 < count; h0 += AHEAD * heads) {
                Pack<floatX, 4> lo[AHEAD], hi[AHEAD], raw_lo[AHEAD], raw_hi[AHEAD];
                float rstd[AHEAD];
                #pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const int h = h0 + u * heads + head;
                    const bool here = active && h < count;
                    lo[u] = load_if<4>(here, dy + h * D);
                    hi[u] = load_if<4>(here, dy + h * D + half);
                    if (!NORM) continue;
                    raw_lo[u] = load_if<4>(here, qk_raw + (at + h) * D + i);
                    raw_hi[u] = load_if<4>(here, qk_raw + (at + h) * D + i + half);
                    rstd[u] = here ? qk_rstd[at + h] : 0;
                }
                #pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    const int h = h0 + u * heads + head;
                    float e_lo[4], e_hi[4];
                    widen(e_lo, lo[u]);
                    widen(e_hi, hi[u]);
                    for (int k = 0; k < 4; k++) {
                        const float turned = e_lo[k] * cosine_i[k] + e_hi[k] * sine_i[k];
                        e_hi[k] = e_hi[k] * cosine_i[k] - e_lo[k] * sine_i[k];
                        e_lo[k] = turned;
                    }
                    if (NORM) {
                        float n_lo[4], n_hi[4], g_lo[4], g_hi[4], gn = 0, r = rstd[u];
                        widen(n_lo, raw_lo[u]);
                        widen(n_hi, raw_hi[u]);
                        for (int k = 0; k < 4; k++) {
                            n_lo[k] *= r, n_hi[k] *= r;
                            dw[2 * part][k] += e_lo[k] * n_lo[k], dw[2 * part + 1][k] += e_hi[k] * n_hi[k];
                            g_lo[k] = e_lo[k] * w_lo[k], g_hi[k] = e_hi[k] * w_hi[k];
                            gn += g_lo[k] * n_lo[k] + g_hi[k] * n_hi[k];
                        }
                        const float mean = warp_sum(gn, lanes) / D;
                        for (int k = 0; k < 4; k++) {
                            e_lo[k] = r * (g_lo[k] - n_lo[k] * mean);
                            e_hi[k] = r * (g_hi[k] - n_hi[k] * mean);
                        }
                    }
                    if (!active || h >= count) continue;
                    store(dy + h * D, narrow<floatX>(e_lo));
                    store(dy + h * D + half, narrow<floatX>(e_hi));
                }
            }
        }
    }
    if constexpr (NORM) {
        for (int q = 0; q < 4; q++) for (int k = 0; k < 4; k++)  // over the heads that the warp has at a time
            for (int offset = lanes; offset < 32; offset *= 2)
                dw[q][k] += __shfl_xor_sync(0xFFFFFFFFu, dw[q][k], offset);
        __shared__ __align__(16) float sums[ROPE_WARPS][4][128];
        if (active && head == 0) for (int q = 0; q < 4; q++) store(sums[warp][q] + i, narrow<float>(dw[q]));
        __syncthreads();
        for (int d = threadIdx.x; d < 4 * 128; d += blockDim.x) {
            if (d % 128 >= half) continue;
            float total = 0;
            for (int j = 0; j < ROPE_WARPS; j++) total += sums[j][d / 128][d % 128];
            partials[(size_t)blockIdx.x * 2 * D + d / 128 * half + d % 128] = total;
        }
    }
}

template <typename floatX>
void qk_norm_rope_backward(floatX *dqkv, float *dq_norm, float *dk_norm, const floatX *qk_raw,
                           const float *qk_rstd, const floatX *q_norm, const floatX *k_norm,
                           const float *cosine, const float *sine,
                           int H, int K, int D, int N, int T) {
    const auto kernel = q_norm ? qk_norm_rope_backward_kernel2<floatX, true>
                               : qk_norm_rope_backward_kernel2<floatX, false>;
    const int blocks = q_norm ? partial_blocks(N, ROPE_WARPS) : CEIL_DIV(N, ROPE_WARPS);
    launch(kernel, blocks, 32 * ROPE_WARPS, 0, dqkv, gpu.scratch, qk_raw, qk_rstd, q_norm, k_norm, cosine,
           sine, H, K, D, lanes_per_head(D), N, T);
    if (!q_norm) return;
    column_sums(dq_norm, gpu.scratch, blocks, D, 2 * D);
    column_sums(dk_norm, gpu.scratch + D, blocks, D, 2 * D);
}

// ---- tiles: matrices of bf16 in shared memory, and their products on tensor cores -------------------------
// A warp owns 16*MT rows and 8*NT columns of a product as MT x NT fragments: mma.m16n8k16 holds
// sum[g][2t,2t+1] and sum[g+8][2t,2t+1] in lane 4g+t.

// A row has 8 elements more than COLUMNS (a multiple of 16). It is then an odd number of 16-byte units, so
// the 8 rows that ldmatrix reads at a time fall on 8 different bank groups: no conflicts, and no index
// arithmetic.
template <int ROWS, int COLUMNS> struct __align__(16) Tile {
    static constexpr int STRIDE = COLUMNS + 8;
    bf16 element[ROWS * STRIDE];
    __device__ __forceinline__ bf16 *at(int row, int column) { return element + (row * STRIDE + column); }
    __device__ __forceinline__ const bf16 *at(int row, int column) const {
        return element + (row * STRIDE + column);
    }
};

// The HEIGHT rows from `first` on
template <int HEIGHT, int ROWS, int COLUMNS>
__device__ __forceinline__ Tile<HEIGHT, COLUMNS> &rows_of(Tile<ROWS, COLUMNS> &tile, int first) {
    return reinterpret_cast<Tile<HEIGHT, COLUMNS> &>(*tile.at(first, 0));
}

// Starts copying rows of D elements, `stride` apart in memory, to a tile; THREADS: of the block. Rows past
// `rows` and columns past D become zero: a zero adds nothing to a product, where stale bits (perhaps NaN)
// times a zero probability would.
template <int THREADS, int ROWS, int WIDTH>
__device__ __forceinline__ void load_tile(Tile<ROWS, WIDTH> &tile, const bf16 *src, size_t stride, int rows,
                                          int D) {
    // 16 bytes per thread, LANES per row
    constexpr int LANES = WIDTH > 64 ? 16 : WIDTH / 8, STEP = THREADS / LANES;
    const int row = threadIdx.x / LANES, column = threadIdx.x % LANES * 8, valid = column < D ? 16 : 0;
    if (column >= WIDTH) return;
    src += row * stride + (valid ? column : 0);
    bf16 *dst = tile.at(row, column);
    if (rows >= ROWS) {
        #pragma unroll
        for (int i = 0; i < ROWS; i += STEP, src += STEP * stride)
            cp_async_16(dst + i * tile.STRIDE, src, valid);
    } else {
        #pragma unroll 1
        for (int i = 0; i < ROWS; i += STEP) {
            const bool inside = row + i < rows;
            const bf16 *from = inside ? src + i * stride : src - row * stride;
            cp_async_16(dst + i * tile.STRIDE, from, inside ? valid : 0);
        }
    }
}

// sum (16*MT, 8*NT) += a (16*MT, 16) b (16, 8*NT). b_lane: this lane's row of b in shared memory, rows STRIDE
// apart; BY_COLUMNS: of b^T, whose rows are what mma wants of b, so that only the other case is transposed on
// the way.
template <int STRIDE, bool BY_COLUMNS, int MT, int NT>
__device__ __forceinline__ void multiply_step(float (&sum)[MT][NT][4], const uint32_t (&a)[MT][4],
                                              const bf16 *b_lane) {
    uint32_t b[4];
    #pragma unroll
    for (int n = 0; n < NT; n += 2) {
        if (BY_COLUMNS) ldmatrix_x4(b, b_lane + n * 8 * STRIDE);
        else ldmatrix_x4_trans(b, b_lane + n * 8);
        for (int m = 0; m < MT; m++) {
            mma_bf16(sum[m][n], a[m], b);
            mma_bf16(sum[m][n + 1], a[m], b + 2);
        }
    }
}

// sum += A B^T. UNROLL steps of 16 are scheduled together: more hide more latency, until fetching ahead costs
// registers that the sums need.
template <int UNROLL, int MT, int NT, int WIDTH>
__device__ __forceinline__ void multiply_rows(float (&sum)[MT][NT][4], const Tile<16 * MT, WIDTH> &A,
                                              const Tile<8 * NT, WIDTH> &B) {
    const int lane = threadIdx.x % 32;
    const bf16 *a_lane = A.at(lane % 16, lane / 16 * 8);  // 16 x 16: four 8 x 8 matrices, down then right
    const bf16 *b_lane = B.at(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);  // 16 rows x 16: right, then down
    #pragma unroll UNROLL
    for (int k = 0; k < WIDTH; k += 16) {
        uint32_t a[MT][4];
        for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], a_lane + m * 16 * A.STRIDE + k);
        multiply_step<Tile<8 * NT, WIDTH>::STRIDE, true>(sum, a, b_lane + k);
    }
}

// sum += A B, of B the 8*NT columns from `column` on
template <int MT, int NT, int DEPTH, int WIDTH>
__device__ __forceinline__ void multiply_columns(float (&sum)[MT][NT][4], const Tile<16 * MT, DEPTH> &A,
                                                 const Tile<DEPTH, WIDTH> &B, int column) {
    const int lane = threadIdx.x % 32;
    const bf16 *a_lane = A.at(lane % 16, lane / 16 * 8), *b_lane = B.at(lane % 16, column + lane / 16 * 8);
    #pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32_t a[MT][4];
        for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], a_lane + m * 16 * A.STRIDE + k);
        multiply_step<Tile<DEPTH, WIDTH>::STRIDE, false>(sum, a, b_lane + k * B.STRIDE);
    }
}

// sum (16*MT, WIDTH) += bf16(p) (16*MT, 8*NT) B: p in registers as multiply_rows left it. The accumulators of
// one product are, lane for lane, the left operand of the next.
template <int MT, int NT, int WIDTH>
__device__ __forceinline__ void multiply_probabilities(float (&sum)[MT][WIDTH / 8][4],
                                                       const float (&p)[MT][NT][4],
                                                       const Tile<8 * NT, WIDTH> &B) {
    const int lane = threadIdx.x % 32;
    const bf16 *b_lane = B.at(lane % 16, lane / 16 * 8);
    #pragma unroll
    for (int k = 0; k < NT; k += 2) {                               // 16 columns of p, 16 rows of B
        uint32_t a[MT][4];
        for (int m = 0; m < MT; m++)
            for (int i = 0; i < 4; i++)
                a[m][i] = pack_bf16(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1]);
        multiply_step<Tile<8 * NT, WIDTH>::STRIDE, false>(sum, a, b_lane + k * 8 * B.STRIDE);
    }
}

template <int MT, int NT>
__device__ __forceinline__ void fill(float (&sum)[MT][NT][4], float value) {
    #pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) sum[i / 4 / NT][i / 4 % NT][i % 4] = value;
}

// tile = sum * scale, rounded to bf16 once. The warp turns its fragments into rows in shared memory that only
// this warp still uses, so that what follows can move 16 bytes at a time.
template <int MT, int NT>
__device__ __forceinline__ void fragments_to_rows(Tile<16 * MT, 8 * NT> &tile, const float (&sum)[MT][NT][4],
                                                  float scale) {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // the warp's last ldmatrix from the tile is over
    #pragma unroll
    for (int m = 0; m < MT; m++)
        for (int n = 0; n < NT; n++)
            for (int r = 0; r < 2; r++)
                *(uint32_t *)tile.at(m * 16 + r * 8 + lane / 4, n * 8 + lane % 4 * 2) =
                    pack_bf16(sum[m][n][r * 2] * scale, sum[m][n][r * 2 + 1] * scale);
    __syncwarp();
}

// The first `rows` rows and D columns of sum * scale to memory, by way of a tile of the warp
template <int MT, int NT>
__device__ __forceinline__ void store_rows(bf16 *out, size_t stride, const float (&sum)[MT][NT][4],
                                           float scale, Tile<16 * MT, 8 * NT> &tile, int rows, int D) {
    constexpr int WIDTH = 8 * NT, LANES = WIDTH > 64 ? 16 : WIDTH / 8;
    const int lane = threadIdx.x % 32, column = lane % LANES * 8;
    fragments_to_rows(tile, sum, scale);
    if (column >= D) return;
    for (int row = lane / LANES; row < 16 * MT && row < rows; row += 32 / LANES)
        store_16B(out + row * stride + column, load_16B(tile.at(row, column)));
}

// The same as fp32, for sums that are added to others before they are rounded
template <int NT, int MT>
__device__ __forceinline__ void store_sums(float *out, size_t stride, const float (&sum)[MT][NT][4],
                                           float scale, int rows, int D) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    #pragma unroll
    for (int i = 0; i < 2 * MT; i++)
        for (int n = 0; n < NT; n++)
            if (row + i * 8 < rows && column + n * 8 < D)
                *(float2 *)(out + (row + i * 8) * stride + column + n * 8) =
                    make_float2(sum[i / 2][n][i % 2 * 2] * scale, sum[i / 2][n][i % 2 * 2 + 1] * scale);
}

// ---- causal attention with grouped heads, O(T) memory (Dao et al. 2022; Dao 2023) -------------------------
// out_t = sum_s p_ts v_s,  p_ts = exp(q_t k_s / sqrt(D) - lse_t) for doc_start_t <= s <= t.  H/K query heads
// share a k/v head. One warp owns whole rows of a tile of scores, so a row's maximum and sum never leave four
// lanes, and scores become probabilities and are multiplied by V without touching shared memory. D is padded
// with zeros to WIDTH.
enum { ATT_THREADS = 128, ATT_WARPS = 4 };

// Scores that the mask hides become -inf: query t sees keys first..t. The tile's corner is (t0, s0); its rows
// are queries, or keys if it lies ON_SIDE.
template <bool ON_SIDE, int MT, int NT>
__device__ __forceinline__ void mask_scores(float (&score)[MT][NT][4], int t0, int s0, const int *doc_start,
                                            int row0, int T) {
    const int lane = threadIdx.x % 32;
    auto row = [=](int i) { return i * 8 + lane / 4; };  // of the lane's 2*MT rows and 2*NT columns
    auto column = [=](int j) { return j / 2 * 8 + lane % 4 * 2 + j % 2; };
    #pragma unroll
    for (int q = 0; q < 2 * (ON_SIDE ? NT : MT); q++) {  // its queries: each looks up its document once
        const int t = t0 + (ON_SIDE ? column(q) : row(q));
        const int first = doc_start ? doc_start[row0 + min(t, T - 1)] : 0;
        for (int k = 0; k < 2 * (ON_SIDE ? MT : NT); k++) {         // its keys
            const int key = s0 + (ON_SIDE ? row(k) : column(k)), i = ON_SIDE ? k : q, j = ON_SIDE ? q : k;
            if (key > t || key < first) score[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
        }
    }
}

// The softmax of a row while its scores pass by tile after tile: p = 2^(log2_scale*score - base), sum = all p
// so far. Any base gives the same out = sum p v / sum p; only overflow asks for the maximum. So base moves
// only when a score exceeds it by 2^8, which is rare after the first tile, and then all that was summed
// shrinks. (p up to 2^8 costs nothing: bf16 and fp32 are floating.)
template <int MT> struct Softmax {
    // rows lane/4 and lane/4 + 8 of each 16; sum: this lane's columns, until finish()
    float base[MT][2], sum[MT][2];

    __device__ __forceinline__ void init() {
        for (int i = 0; i < MT * 2; i++) {
            base[i / 2][i % 2] = -1e30f;                            // not -inf: -inf - -inf is NaN
            sum[i / 2][i % 2] = 0;
        }
    }
    // p: scores -> probabilities; out: what was accumulated so far. log2_scale = log2(e) / sqrt(D): one FFMA
    // and one 2^x per score.
    template <int NT, int OT>
    __device__ __forceinline__ void update(float (&p)[MT][NT][4], float (&out)[MT][OT][4], float log2_scale) {
        float top[MT][2];
        bool move = false;
        #pragma unroll
        for (int m = 0; m < MT; m++)
            for (int r = 0; r < 2; r++) {
                top[m][r] = -INFINITY;
                for (int n = 0; n < NT; n++)
                    top[m][r] = fmaxf(top[m][r], fmaxf(p[m][n][r * 2], p[m][n][r * 2 + 1]));
                move |= top[m][r] * log2_scale > base[m][r] + 8;
            }
        if (__any_sync(~0u, move)) {
            #pragma unroll
            for (int m = 0; m < MT; m++)
                for (int r = 0; r < 2; r++) {
                    // the four lanes of a row agree on its base
                    const float row_top = warp_max(top[m][r], 4);
                    const float higher = fmaxf(base[m][r], row_top * log2_scale);
                    const float shrink = exp2_approx(base[m][r] - higher);
                    base[m][r] = higher;
                    sum[m][r] *= shrink;
                    for (int n = 0; n < OT; n++) out[m][n][r * 2] *= shrink, out[m][n][r * 2 + 1] *= shrink;
                }
        }
        #pragma unroll
        for (int m = 0; m < MT; m++)
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < 4; i++) {
                    p[m][n][i] = exp2_approx(p[m][n][i] * log2_scale - base[m][i / 2]);
                    sum[m][i / 2] += p[m][n][i];
                }
    }
    // sum becomes the whole row's, in every lane of the row, and out the means.
    template <int OT> __device__ __forceinline__ void finish(float (&out)[MT][OT][4]) {
        #pragma unroll
        for (int i = 0; i < MT * 2; i++) {
            float &total = sum[i / 2][i % 2];
            total = warp_sum(total, 4);
            const float inverse = 1 / total;
            for (int n = 0; n < OT; n++)
                out[i / 2][n][i % 2 * 2] *= inverse, out[i / 2][n][i % 2 * 2 + 1] *= inverse;
        }
    }
};

// ---- attention_forward_kernel3: a block has 128 queries of a head, a warp 32 and all of their keys --------
// out (N,HD) = softmax(q k^T / sqrt(D)) v,  lse (N,H) = log sum_s exp(q_t k_s / sqrt(D)) over s = first..t,
// first = doc_start (N) or 0
// bytes   2·N·(H+2K)·D in + 2·N·H·D + 4·N·H out = 152 MB: 45 us for N 16384, H 16, K 2, D 128.
//         K, V again per 128 queries, from L2: 1.1 GB
// FLOPs   2·N·(T+1)·H·D (two products) = 137 G at T 2048   floor 139 us (tensor; mma.sync: 224 us; 269 M
//         exponentials: 72 us)
// idea    scores never leave registers: the accumulators of Q K^T are the left operand of P V. K and V take
//         turns, one buffer each: one lands while the other is used. 192 bytes of shared memory per mma,
//         level with the 198 that mma.sync leaves time for
// limits  D % 8 == 0, D <= 128 (widths 32, 64, 96, 112, 128), H % K == 0. At D 128 69,632 bytes of shared
//         memory and 255 registers: two blocks per SM (one on sm_86, sm_89, sm_120)
// variants dev/attention_forward.cu: 0 a thread per query, 1 fp32 tiles, 2 tensor cores, no overlap, 3 this,
//         4 below
template <int WIDTH> struct ForwardTiles {                  // of a block, in shared memory
    static constexpr int MT = 2, ROWS = 16 * MT, QUERIES = ROWS * ATT_WARPS, KEYS = 64;
    Tile<QUERIES, WIDTH> q;
    Tile<KEYS, WIDTH> k, v;
};

template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS) attention_forward_kernel3(bf16 *__restrict__ out,
        float *__restrict__ lse, const bf16 *__restrict__ qkv, const int *__restrict__ doc_start,
        int T, int H, int K, int D, float log2_scale) {
    typedef ForwardTiles<WIDTH> Tiles;
    constexpr int MT = Tiles::MT, ROWS = Tiles::ROWS, QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *shared_memory<Tiles>();
    // long rows first
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;
    const int row0 = blockIdx.x / H * T, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int lane = threadIdx.x % 32;
    // where the last of this warp's rows t..t+31 begins to look
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0;
    const int end = min(t0 + QUERIES, T), doc_first = doc_start ? doc_start[row0 + min(t, T - 1)] : 0;

    float p[MT][KEYS / 8][4], out_t[MT][WIDTH / 8][4] = {};         // p: scores, then probabilities
    Softmax<MT> softmax;
    softmax.init();
    int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    // walks from tile to tile; v = k + K*D
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;
    load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<ATT_THREADS>(tile.k, k, W, T - s0, D);
    cp_async_commit();
    Tile<ROWS, WIDTH> &warp_q = rows_of<ROWS>(tile.q, warp_row);
    for (; s0 < end; s0 += KEYS) {
        // K and V take turns: one is being computed with while the other lands.
        cp_async_wait<0>();
        __syncthreads();  // K is here, and every warp has left the previous V
        load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
        cp_async_commit();
        k += (size_t)KEYS * W;
        // else above the diagonal or before its documents
        const bool visible = s0 < t + ROWS && t < T && s0 + KEYS > doc_first;
        if (visible) {
            fill(p, 0);
            multiply_rows<WIDTH / 16>(p, warp_q, tile.k);
        }
        cp_async_wait<0>();
        __syncthreads();                                            // V is here, and every warp has left K
        if (s0 + KEYS < end) load_tile<ATT_THREADS>(tile.k, k, W, T - s0 - KEYS, D);
        cp_async_commit();
        if (visible) {
            if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(p, t, s0, doc_start, row0, T);
            softmax.update(p, out_t, log2_scale);
            multiply_probabilities(out_t, p, tile.v);
        }
    }
    softmax.finish(out_t);
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        const int row = t + i * 8 + lane / 4;
        const float log2_sum = softmax.base[i / 2][i % 2] + log2f(softmax.sum[i / 2][i % 2]);
        if (lane % 4 == 0 && row < T) lse[(size_t)(row0 + row) * H + h] = log2_sum * (float)M_LN2;
    }
    store_rows(out + ((size_t)(row0 + t) * H + h) * D, (size_t)H * D, out_t, 1, warp_q, T - t, D);
}

// ---- attention_forward_kernel4: sm_90a; wgmma and TMA -----------------------------------------------------
// As kernel 3. A block has 128 queries of a head and walks over tiles of 128 keys.
// floor   139 us for the shape above: wgmma has the whole rate of the tensor cores; the exponentials' 72 us
//         are under it
// idea    One thread does nothing but copy: tile i of K and of V lies in half i % 2, which is free again when
//         both warpgroups say so. Each of these has 64 queries: it starts the scores of tile i and P V of
//         tile i - 1 together, and the softmax of i runs under the latter. And the two take turns: one's
//         products fill the tensor cores during the other's softmax (Shah et al. 2024)
// limits  as kernel 3, widths 64, 96, 104, 128: what of the rows is computed. TMA pads them to 64 or 128 with
//         zeros. At D 128 199,680 bytes of shared memory, one block per SM; 240 registers for those who
//         compute, 24 for who copies
// ROWS rows of WIDTH bf16 as wgmma takes them: panels of 64 columns, the last of which may reach past WIDTH
template <int ROWS, int WIDTH> struct SwizzledTile {
    static constexpr int PANELS = CEIL_DIV(WIDTH, 64), PANEL_BYTES = ROWS * 128;
    bf16 element[PANELS][ROWS][64];

    // wgmma's operand from this row (a multiple of 8) and column on, as steps of 16 bytes from the corner's:
    // known beforehand, where those of a pointer are computed (that it is a multiple of 16, nobody told)
    __device__ __forceinline__ uint64_t operand(int row, int column) const {
        const int steps = column / 64 * (PANEL_BYTES / 16) + row * 8 + column % 64 / 8;
        return wgmma_operand(this, PANEL_BYTES) + steps;
    }
};

// One thread starts the copy of the rows t.. of a head, of sequence b; `landed` gets the bytes.
template <int ROWS, int WIDTH>
__device__ __forceinline__ void tma_load_tile(SwizzledTile<ROWS, WIDTH> &tile, uint64_t *landed,
                                              const TensorMap *heads, int head, int t, int b) {
    mbarrier_expect(landed, sizeof tile);
    for (int panel = 0; panel < tile.PANELS; panel++)
        tma_load(tile.element[panel], heads, landed, panel * 64, head, t, b);
}

// score (64,KEYS) = rows row..row+63 of q times k^T, for a warpgroup; runs until wgmma_wait. Of width 104 the
// last step takes 8 columns of zeros along.
template <int QUERIES, int KEYS, int WIDTH>
__device__ __forceinline__ void wgmma_scores(float (&score)[1][KEYS / 8][4],
                                             const SwizzledTile<QUERIES, WIDTH> &q, int row,
                                             const SwizzledTile<KEYS, WIDTH> &k) {
    #pragma unroll
    for (int c = 0; c < WIDTH; c += 16)
        wgmma_rows(score, q.operand(row, c), k.operand(0, c), c > 0);
    wgmma_commit();
}

// out (64,WIDTH) += p v; p has the fragments of 16 keys at a time
template <int KEYS, int WIDTH>
__device__ __forceinline__ void wgmma_values(float (&out)[1][WIDTH / 8][4], const uint32_t (&p)[KEYS / 16][4],
                                             const SwizzledTile<KEYS, WIDTH> &v) {
    #pragma unroll
    for (int k = 0; k < KEYS; k += 16)
        wgmma_columns(out, p[k / 16], v.operand(k, 0));
    wgmma_commit();
}

// p: the sums of one product, rounded, as wgmma_values takes them: no lane needs what another has.
template <int NT>
__device__ __forceinline__ void pack_left(uint32_t (&p)[NT / 2][4], const float (&sum)[1][NT][4]) {
    #pragma unroll
    for (int i = 0; i < NT * 2; i++)
        p[i / 4][i % 4] = pack_bf16(sum[0][i / 2][i % 2 * 2], sum[0][i / 2][i % 2 * 2 + 1]);
}

// three warpgroups, of 4 warps each: two compute, a thread of the third copies
enum { WGMMA_THREADS = 384, GROUP_WARPS = 4 };
// A stage of a ring is empty when each warp that computes with it has arrived here: after its own wgmma_wait,
// for what is over by then PTX tells only those who waited, and after what its lanes have read themselves.
__device__ __forceinline__ void release(uint64_t *empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}
// x, on which the lanes of a warp agree. From the shuffle the compiler knows it too: what follows from x,
// such as operands of wgmma, it then computes once per warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
// (b H + head, tile of rows) of a block. Blocks start in the order of their numbers: `together` heads at a
// time, of these the long rows first. Counted from the end: the last heads, after which SMs fall idle, are no
// rest
__device__ __forceinline__ int2 attention_place(int together) {
    const int heads = gridDim.x, rows = gridDim.y, number = blockIdx.y * heads + blockIdx.x;
    const int after = heads * rows - 1 - number, first = after / (together * rows) * together;
    const int width = min(together, heads - first);
    const int i = after - first * rows;
    return make_int2(first + i % width, i / width);
}
template <int WIDTH> struct __align__(1024) WgmmaTiles {    // of a block, in shared memory
    static constexpr int QUERIES = 128, KEYS = 128;
    SwizzledTile<QUERIES, WIDTH> q;
    SwizzledTile<KEYS, WIDTH> k[2], v[2];
    Tile<16, WIDTH> out[QUERIES / 16];
    uint64_t q_full, k_full[2], k_empty[2], v_full[2], v_empty[2];          // mbarriers
};

template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_forward_kernel4(bf16 *__restrict__ out,
        float *__restrict__ lse, const __grid_constant__ TensorMap qkv, const int *__restrict__ doc_start,
        int T, int H, int K, int D, int together, float log2_scale) {
    typedef WgmmaTiles<WIDTH> Tiles;
    constexpr int QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    const int2 place = attention_place(together);
    const int h = place.x % H, b = place.x / H, t0 = place.y * QUERIES;
    const int row0 = b * T, group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    const int first = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const int n = CEIL_DIV(min(t0 + QUERIES, T) - first, KEYS);             // tiles of keys
    if (threadIdx.x == 0) {
        mbarrier_init(&tile.q_full, 1);
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&tile.k_full[i], 1), mbarrier_init(&tile.k_empty[i], 2 * GROUP_WARPS);
            mbarrier_init(&tile.v_full[i], 1), mbarrier_init(&tile.v_empty[i], 2 * GROUP_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {                                       // the copies; V comes one tile behind K
        registers_give<24>();
        if (threadIdx.x % 128 > 0) return;
        const int head = H + h / (H / K);
        tma_load_tile(tile.q, &tile.q_full, &qkv, h, t0, b);
        for (int i = 0; i <= n; i++) {
            const int j = i - 1;
            if (i < n) {
                mbarrier_wait(&tile.k_empty[i % 2], i / 2 % 2 ^ 1);
                tma_load_tile(tile.k[i % 2], &tile.k_full[i % 2], &qkv, head, first + i * KEYS, b);
            }
            if (j < 0) continue;
            mbarrier_wait(&tile.v_empty[j % 2], j / 2 % 2 ^ 1);
            tma_load_tile(tile.v[j % 2], &tile.v_full[j % 2], &qkv, head + K, first + j * KEYS, b);
        }
        return;
    }
    registers_take<240>();
    const int warp = threadIdx.x / 32, t = t0 + warp * 16;                  // the warp's 16 rows
    const int doc_last = doc_start ? doc_start[row0 + min(t + 16, T) - 1] : 0;
    float score[1][KEYS / 8][4] = {}, out_t[1][WIDTH / 8][4] = {}, shrink[1][1][4];
    uint32_t p[KEYS / 16][4];
    Softmax<1> softmax;
    softmax.init();
    // in place of the scores of the tile at s0; out_t is still being added to, so it shrinks later
    auto probabilities = [&](int s0) {
        if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(score, t, s0, doc_start, row0, T);
        fill(shrink, 1);
        softmax.update(score, shrink, log2_scale);
    };
    mbarrier_wait(&tile.q_full, 0);
    mbarrier_wait(&tile.k_full[0], 0);
    wgmma_fence();
    wgmma_scores(score, tile.q, group * 64, tile.k[0]);
    wgmma_wait<0>(score);
    release(&tile.k_empty[0]);
    probabilities(first);
    pack_left(p, score);
    if (group == 1 && n > 1) barrier_arrive(1, 256);        // group 0 begins
    for (int i = 1; i < n; i++) {
        const int j = i - 1;
        mbarrier_wait(&tile.k_full[i % 2], i / 2 % 2);
        mbarrier_wait(&tile.v_full[j % 2], j / 2 % 2);
        // The groups take turns: one has its products computed while the other is at its softmax.
        barrier_sync(1 + group, 256);
        wgmma_fence();
        wgmma_scores(score, tile.q, group * 64, tile.k[i % 2]);
        wgmma_values(out_t, p, tile.v[j % 2]);
        if (group == 0 || i + 1 < n) barrier_arrive(2 - group, 256);
        wgmma_wait<1>(score);
        release(&tile.k_empty[i % 2]);
        probabilities(first + i * KEYS);                // while the product with V goes on
        wgmma_wait<0>(out_t, p);
        release(&tile.v_empty[j % 2]);
        if (__any_sync(~0u, shrink[0][0][0] != 1 || shrink[0][0][2] != 1)) {
            #pragma unroll
            for (int c = 0; c < WIDTH / 2; c++) out_t[0][c / 4][c % 4] *= shrink[0][0][c % 4];
        }
        pack_left(p, score);
    }
    mbarrier_wait(&tile.v_full[(n - 1) % 2], (n - 1) / 2 % 2);
    wgmma_fence();
    wgmma_values(out_t, p, tile.v[(n - 1) % 2]);
    wgmma_wait<0>(out_t);
    softmax.finish(out_t);
    for (int i = 0; i < 2; i++) {
        const int row = t + i * 8 + lane / 4;
        const float log2_sum = softmax.base[0][i] + log2f(softmax.sum[0][i]);
        if (lane % 4 == 0 && row < T) lse[(size_t)(row0 + row) * H + h] = log2_sum * (float)M_LN2;
    }
    store_rows(out + ((size_t)(row0 + t) * H + h) * D, (size_t)H * D, out_t, 1, tile.out[warp], T - t, D);
}

// ---- attention_forward_f32_kernel1: the formula by plain loops; --precision bf16 is the fast one ----------
// out (N,H*D) =, lse (N,H) =, the softmax running: when a larger score appears, what was summed shrinks
// idea    one warp per row and head, the mask is the range of its loop. Lane l has elements 4l..4l+3 of every
//         row of D, so a dot product is a sum over the warp. A block's warps have neighbouring rows of one
//         head and find in L1 what others have read
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

__global__ void attention_forward_f32_kernel1(float *__restrict__ out, float *__restrict__ lse,
        const float *__restrict__ qkv, const int *__restrict__ doc_start, int T, int H, int K, int D,
        float scale) {
    const int h = blockIdx.x % H, t = (gridDim.y - 1 - blockIdx.y) * F32_WARPS + threadIdx.y;
    const int W = (H + 2 * K) * D;
    if (t >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / H) * T, at = (row0 + t) * H + h;
    const float *k = qkv + row0 * W + (H + h / (H / K)) * D, *v = k + K * D;
    float q_t[4], k_s[4], v_s[4], out_t[4] = {}, top = -INFINITY, sum = 0;
    load_row(q_t, qkv + (row0 + t) * W + h * D, D);
    for (int s = doc_start ? doc_start[row0 + t] : 0; s <= t; s++) {
        load_row(k_s, k + (size_t)s * W, D);
        load_row(v_s, v + (size_t)s * W, D);
        const float score = dot(q_t, k_s) * scale, higher = fmaxf(top, score);
        const float shrink = expf(top - higher), p = expf(score - higher);
        top = higher;
        sum = sum * shrink + p;
        for (int j = 0; j < 4; j++) out_t[j] = out_t[j] * shrink + p * v_s[j];
    }
    for (int j = 0; j < 4; j++) out_t[j] /= sum;
    store_row(out + at * D, out_t, D);
    if (threadIdx.x == 0) lse[at] = top + logf(sum);
}

// ---- attention_forward: the kernel for a precision and a head size ----------------------------------------
// f(std::integral_constant<int, WIDTH>()) with the narrowest compiled WIDTH that holds D
template <typename F> static void with_width(int D, F f) {
    if (D <= 32) f(std::integral_constant<int, 32>());
    else if (D <= 64) f(std::integral_constant<int, 64>());
    else if (D <= 96) f(std::integral_constant<int, 96>());
    else if (D <= 112) f(std::integral_constant<int, 112>());
    else f(std::integral_constant<int, 128>());
}

// The same for the kernels of sm_90a
template <typename F> static void with_wgmma_width(int D, F f) {
    if (D <= 64) f(std::integral_constant<int, 64>());
    else if (D <= 96) f(std::integral_constant<int, 96>());
    else if (D <= 104) f(std::integral_constant<int, 104>());
    else f(std::integral_constant<int, 128>());
}

static void attention_forward_f32(float *out, float *lse, const float *qkv, const int *doc_start, int B,
                                  int T, int H, int K, int D) {
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    launch(attention_forward_f32_kernel1, dim3(B * H, CEIL_DIV(T, F32_WARPS)), dim3(32, F32_WARPS), 0, out,
           lse, qkv, doc_start, T, H, K, D, (float)(1 / sqrt((double)D)));
}

static void attention_forward_mma(bf16 *out, float *lse, const bf16 *qkv, const int *doc_start, int B, int T,
                                  int H, int K, int D) {
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    with_width(D, [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        typedef ForwardTiles<WIDTH> Tiles;
        launch(attention_forward_kernel3<WIDTH>, dim3(B * H, CEIL_DIV(T, Tiles::QUERIES)), ATT_THREADS,
               sizeof(Tiles), out, lse, qkv, doc_start, T, H, K, D, (float)(M_LOG2E / sqrt((double)D)));
    });
}

// The heads of x (B,T,heads,D), which TMA copies as boxes of `rows` rows of one head
static TensorMap head_map(const bf16 *x, int B, int T, int heads, int D, int rows) {
    const uint64_t row_bytes = (uint64_t)heads * D * 2;
    return tensor_map(x, {(uint64_t)D, (uint64_t)heads, (uint64_t)T, (uint64_t)B},
                      {(uint64_t)D * 2, row_bytes, row_bytes * T}, {64, 1, (uint32_t)rows, 1});
}

// How many heads of queries have their K and V, 4·T·D bytes per head of these, in L2 together, beside what
// else passes through it. All heads in step, too many for it, would read K and V from DRAM per 128 queries
static int heads_together(int B, int T, int H, int K, int D) {
    static int l2 = device_attribute(cudaDevAttrL2CacheSize);
    const size_t fit = (size_t)l2 / 8 * 5 / ((size_t)4 * T * D);
    return (int)min((size_t)B * K, max(fit, (size_t)1)) * (H / K);
}

static void attention_forward_wgmma(bf16 *out, float *lse, const bf16 *qkv, const int *doc_start, int B,
                                    int T, int H, int K, int D) {
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    with_wgmma_width(D, [&](auto width) {
        typedef WgmmaTiles<decltype(width)::value> Tiles;
        static_assert(Tiles::QUERIES == Tiles::KEYS);                       // one map serves q, k and v
        const TensorMap map = head_map(qkv, B, T, H + 2 * K, D, Tiles::KEYS);
        launch(attention_forward_kernel4<decltype(width)::value>, dim3(B * H, CEIL_DIV(T, Tiles::QUERIES)),
               WGMMA_THREADS, sizeof(Tiles), out, lse, map, doc_start, T, H, K, D,
               heads_together(B, T, H, K, D), (float)(M_LOG2E / sqrt((double)D)));
    });
}

// ---- attention_decode_kernel2: samples --------------------------------------------------------------------
// T tokens of one text after `past` others: out (T,HD) =
// qkv (T,(H+2K)D) of these, kv (past+T,2KD) keys and values of all
// bytes   4·(past+T)·K·D for T 1: 2.1 MB at past 2047, K 2, D 128, floor 0.6 us: less than a launch takes
// idea    a block per token and head; its warps take keys in turn, each with a running softmax of its own,
//         and the first adds up what they have. Lane l holds elements 4l..4l+3: any D % 4 == 0 up to 128
// limits  D % 4 == 0, D <= 128, H % K == 0
// variants dev/attention_decode.cu: 1 one warp, 2 this
enum { DECODE_WARPS = 8 };

template <typename floatX>
__global__ void attention_decode_kernel2(floatX *out, const floatX *kv, const floatX *qkv, int past, int H,
                                         int K, int D, float scale) {
    __shared__ float tops[DECODE_WARPS], sums[DECODE_WARPS], outs[DECODE_WARPS][128];
    const int h = blockIdx.x, t = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
    const bool active = lane * 4 < D;
    const floatX *k = kv + h / (H / K) * D + lane * 4, *v = k + K * D;
    float q[4], k_s[4], v_s[4], o[4] = {}, top = -1e30f, sum = 0;
    widen(q, load_if<4>(active, qkv + ((size_t)t * (H + 2 * K) + h) * D + lane * 4));
    for (int s = warp; s <= past + t; s += DECODE_WARPS) {
        widen(k_s, load_if<4>(active, k + (size_t)s * 2 * K * D));
        widen(v_s, load_if<4>(active, v + (size_t)s * 2 * K * D));
        const float score = warp_sum(q[0] * k_s[0] + q[1] * k_s[1] + q[2] * k_s[2] + q[3] * k_s[3]) * scale;
        const float higher = fmaxf(top, score), shrink = exp_approx(top - higher);
        const float p = exp_approx(score - higher);
        top = higher;
        sum = sum * shrink + p;
        for (int j = 0; j < 4; j++) o[j] = o[j] * shrink + p * v_s[j];
    }
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
    for (int j = 0; j < 4; j++) outs[warp][lane * 4 + j] = o[j];
    __syncthreads();
    if (warp > 0 || !active) return;
    float total = 0, mean[4] = {};
    for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, tops[w]);
    for (int w = 0; w < DECODE_WARPS; w++) {
        const float share = exp_approx(tops[w] - top);          // 0 of a warp without keys
        total += sums[w] * share;
        for (int j = 0; j < 4; j++) mean[j] += outs[w][lane * 4 + j] * share;
    }
    for (int j = 0; j < 4; j++) mean[j] /= total;
    store(out + ((size_t)t * H + h) * D + lane * 4, narrow<floatX>(mean));
}

template <typename floatX>
void attention_decode(floatX *out, const floatX *kv, const floatX *qkv, int past, int T, int H, int K,
                      int D) {
    assert(D % 4 == 0 && D <= 128 && H % K == 0);
    launch(attention_decode_kernel2<floatX>, dim3(H, T), dim3(32, DECODE_WARPS), 0,
           out, kv, qkv, past, H, K, D, (float)(1 / sqrt((double)D)));
}

// kv (T,2KD) = the keys and values of T tokens
template <typename floatX> void keep_keys_values(floatX *kv, const floatX *qkv, int T, int H, int K, int D) {
    const size_t W = (size_t)(H + 2 * K) * D, n = (size_t)2 * K * D;
    for (int t = 0; t < T; t++)                 // one, but for a prompt and for a text longer than T
        cudaCheck(cudaMemcpyAsync(kv + t * n, qkv + t * W + H * D, n * sizeof(floatX),
                                  cudaMemcpyDeviceToDevice, gpu.stream));
}

// ---- attention backward -----------------------------------------------------------------------------------
// With P_ts = exp(scale q_t k_s - lse_t), delta_t = dout_t . out_t:
//   dv_s = sum_t P_ts dout_t      dS_ts = P_ts (dout_t v_s - delta_t)
//   dq_t = scale sum_s dS_ts k_s      dk_s = scale sum_t dS_ts q_t
// dqkv (N,(H+2K)D) =, each element written once. Two kernels and no atomics: dq runs first, owns whole rows
// of dout and out, and leaves delta for dk dv. Where a block per key head would leave SMs idle, dk dv splits
// the group of query heads that share it into parts, and a third kernel adds up what these found.

// ---- attention_backward_dq_kernel2: the walk of the forward, with P known from lse and dS in P's place ----
// dq (in dqkv) =, delta (N,H) =
// bytes   2·N·(H+2K)·D + 4·N·H·D + 4·N·H in + 2·N·H·D + 4·N·H out = 287 MB: 86 us for N 16384, H 16, K 2,
//         D 128. K and V from L2: 1.1 GB
// FLOPs   3·N·(T+1)·H·D (three products) = 206 G at T 2048      floor 208 us (tensor; mma.sync: 336 us)
// idea    the product dO V^T starts from -delta, so dS needs no subtraction. It is the second time that Q K^T
//         and dO V^T are computed (7 products in all instead of 5): the price of sums without atomics
// limits  as the forward; 95,744 bytes at D 128: two blocks per SM on sm_90, one on sm_80
// variants dev/attention_backward.cu: 0 a thread per query, 1 tensor cores, no overlap, 2 this, 3 below
template <int WIDTH> struct DqTiles {
    static constexpr int MT = 2, NT = 4, ROWS = 16 * MT, QUERIES = ROWS * ATT_WARPS, KEYS = 8 * NT;
    Tile<QUERIES, WIDTH> q, dout;
    Tile<KEYS, WIDTH> k[2], v;
};

template <int WIDTH>
__global__ void __launch_bounds__(ATT_THREADS, 2) attention_backward_dq_kernel2(bf16 *__restrict__ dqkv,
        float *__restrict__ delta, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv,
        const bf16 *__restrict__ out, const float *__restrict__ lse, const int *__restrict__ doc_start,
        int T, int H, int K, int D, float scale) {
    typedef DqTiles<WIDTH> Tiles;
    constexpr int MT = Tiles::MT, NT = Tiles::NT, ROWS = Tiles::ROWS, QUERIES = Tiles::QUERIES;
    constexpr int KEYS = Tiles::KEYS;
    Tiles &tile = *shared_memory<Tiles>();
    const int h = blockIdx.x % H, t0 = (gridDim.y - 1 - blockIdx.y) * QUERIES, W = (H + 2 * K) * D;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * ROWS, t = t0 + warp_row;
    const int row0 = blockIdx.x / H * T, end = min(t0 + QUERIES, T);
    const int doc_last = doc_start ? doc_start[row0 + min(t + ROWS, T) - 1] : 0;
    const float log2_scale = scale * (float)M_LOG2E;

    int s0 = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + h / (H / K)) * D;      // walks; v = k + K*D
    load_tile<ATT_THREADS>(tile.q, qkv + (size_t)(row0 + t0) * W + h * D, W, T - t0, D);
    load_tile<ATT_THREADS>(tile.dout, dout + ((size_t)(row0 + t0) * H + h) * D, (size_t)H * D, T - t0, D);
    load_tile<ATT_THREADS>(tile.k[0], k, W, T - s0, D);
    load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - s0, D);
    cp_async_commit();
    Tile<ROWS, WIDTH> &warp_q = rows_of<ROWS>(tile.q, warp_row);
    Tile<ROWS, WIDTH> &warp_dout = rows_of<ROWS>(tile.dout, warp_row);
    float row_lse[MT][2], row_delta[MT][2], score[MT][NT][4], ds[MT][NT][4], dq[MT][WIDTH / 8][4] = {};
    cp_async_wait<0>();
    __syncthreads();                                                // dO is here
    #pragma unroll
    for (int i = 0; i < MT * 2; i++) {                              // the four lanes of a row share out its D
        const int row = t + i * 8 + lane / 4;
        const size_t at = (size_t)(row0 + row) * H + h;
        float sum = 0;
        for (int d = lane % 4 * 8; row < T && d < D; d += 32) {
            float dout_d[8], out_d[8];
            widen(dout_d, load<8>(warp_dout.at(i * 8 + lane / 4, d)));
            widen(out_d, load<8>(out + at * D + d));
            for (int j = 0; j < 8; j++) sum += dout_d[j] * out_d[j];
        }
        sum = warp_sum(sum, 4);
        row_delta[i / 2][i % 2] = sum;
        row_lse[i / 2][i % 2] = row < T ? lse[at] * (float)M_LOG2E : INFINITY;  // past the end p = 0
        if (lane % 4 == 0 && row < T) delta[at] = sum;
    }
    for (int buffer = 0; s0 < end; s0 += KEYS, buffer ^= 1) {
        const int next = s0 + KEYS;
        k += (size_t)KEYS * W;
        cp_async_wait<0>();
        __syncthreads();  // K, V are here; every warp has left the other K
        if (next < end) load_tile<ATT_THREADS>(tile.k[buffer ^ 1], k, W, T - next, D);
        cp_async_commit();
        const bool visible = s0 < t + ROWS && t < T && (!doc_start || s0 + KEYS > doc_start[row0 + t]);
        if (visible) {
            fill(score, 0);
            multiply_rows<2>(score, warp_q, tile.k[buffer]);
            #pragma unroll
            for (int i = 0; i < MT * NT * 4; i++)
                ds[i / 4 / NT][i / 4 % NT][i % 4] = -row_delta[i / 4 / NT][i % 4 / 2];
            multiply_rows<2>(ds, warp_dout, tile.v);
        }
        __syncthreads();                                            // every warp has left V
        if (next < end) load_tile<ATT_THREADS>(tile.v, k + K * D, W, T - next, D);
        cp_async_commit();
        if (visible) {
            if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(score, t, s0, doc_start, row0, T);
            #pragma unroll
            for (int m = 0; m < MT; m++)
                for (int n = 0; n < NT; n++)
                    for (int i = 0; i < 4; i++)
                        ds[m][n][i] *= exp2_approx(score[m][n][i] * log2_scale - row_lse[m][i / 2]);
            multiply_probabilities(dq, ds, tile.k[buffer]);
        }
    }
    store_rows(dqkv + (size_t)(row0 + t) * W + h * D, W, dq, scale, warp_q, T - t, D);
}

// Queries see no keys before their document: of the tiles of queries from t_first on, the end of those in
// which some query sees keys before s_end. All threads of the block call.
template <int THREADS, int QUERIES>
__device__ __forceinline__ int queries_end(int t_first, int s_end, const int *doc_start, int row0, int T) {
    if (!doc_start) return T;
    int seen = 0;
    for (int i = 0; t_first + i * QUERIES < T; i += THREADS) {
        const int t = t_first + (i + (int)threadIdx.x) * QUERIES;
        seen += __syncthreads_count(t < T && doc_start[row0 + t] < s_end);
    }
    return t_first + seen * QUERIES;
}

// ---- attention_backward_dkdv_kernel2: a block has up to 128 keys and walks all queries that see them ------
// dk, dv (in dqkv) =: sums over the H/K query heads that share them, head after head. With parts > 1 a block
// has H/K/parts of these, and its sums go to sums (N,parts,2KD) = instead, for attention_backward_add
// bytes   2·N·(H+2K)·D + 2·N·H·D + 8·N·H in + 4·N·K·D out = 170 MB: 51 us for N 16384, H 16, K 2, D 128.
//         q and dO again per block, from L2
// FLOPs   4·N·(T+1)·H·D (four products) = 275 G at T 2048        floor 278 us (tensor; mma.sync: 448 us)
// idea    the score tile stands on its side, rows are keys: P^T and dS^T are left operands in registers, and
//         no sum crosses warps. A pair of warps shares 16*MT keys: one computes P and owns dV, the other
//         computes dP and owns dK, so each holds one accumulator of twice the rows, and an operand from
//         shared memory serves twice the products: 227 bytes per mma at D 128 instead of 348 with a warp for
//         both (mma.sync leaves time for 198 on H100, 256 on A100). P crosses in fp32, so that dS is rounded
//         once, and a named barrier of the pair says when
// limits  as the forward. 147,200 bytes of shared memory at D 128 with 4 pairs; devices with less get 2 pairs
//         and 100,096
// variants dev/attention_backward.cu: 0 a thread per key, 1 tensor cores, a warp for both, 2 this, 3 below
template <int WIDTH, int PAIRS> struct DkdvTiles {
    static constexpr int MT = WIDTH <= 64 ? 4 : 2, NT = WIDTH <= 64 ? 4 : 6;
    static constexpr int ROWS = 16 * MT, KEYS = ROWS * PAIRS, QUERIES = 8 * NT, THREADS = 64 * PAIRS;
    float4 exchange[PAIRS][MT * NT][32];                    // P of a pair: each lane's fragments
    float stats[2][2 * QUERIES];                            // of two tiles of queries: lse, then delta
    Tile<KEYS, WIDTH> k, v;
    Tile<QUERIES, WIDTH> q[2], dout[2];
};

template <int WIDTH, int PAIRS>
__global__ void __launch_bounds__(64 * PAIRS, 4 / PAIRS) attention_backward_dkdv_kernel2(
        bf16 *__restrict__ dqkv, const bf16 *__restrict__ dout, const bf16 *__restrict__ qkv,
        const float *__restrict__ lse, const float *__restrict__ delta, const int *__restrict__ doc_start,
        float *__restrict__ sums, int parts, int T, int H, int K, int D, float scale) {
    typedef DkdvTiles<WIDTH, PAIRS> Tiles;
    constexpr int MT = Tiles::MT, NT = Tiles::NT, ROWS = Tiles::ROWS, KEYS = Tiles::KEYS;
    constexpr int QUERIES = Tiles::QUERIES, THREADS = Tiles::THREADS;
    Tiles &tile = *shared_memory<Tiles>();
    const int part = blockIdx.x % parts, kv = blockIdx.x / parts % K, b = blockIdx.x / parts / K;
    const int s0 = blockIdx.y * KEYS;                               // early keys have most queries
    const int W = (H + 2 * K) * D, lane = threadIdx.x % 32;
    // tells the compiler it is uniform: fewer registers
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int pair = warp % PAIRS, owns_dk = warp / PAIRS;          // with 4 pairs a pair is on one scheduler
    const int pair_row = pair * ROWS, key = s0 + pair_row, row0 = b * T;
    const float log2_scale = scale * (float)M_LOG2E;
    float4 *exchange = &tile.exchange[pair][0][lane];
    Tile<ROWS, WIDTH> &left = rows_of<ROWS>(owns_dk ? tile.v : tile.k, pair_row);   // only this warp's

    // Queries that see this tile: from the diagonal on. Then the next head.
    const int t_first = s0 / QUERIES * QUERIES;
    const int t_end = queries_end<THREADS, QUERIES>(t_first, s0 + KEYS, doc_start, row0, T);
    auto load_queries = [&](int h, int t, int buffer) {
        load_tile<THREADS>(tile.q[buffer], qkv + (size_t)(row0 + t) * W + h * D, W, T - t, D);
        const bf16 *dout_t = dout + ((size_t)(row0 + t) * H + h) * D;
        load_tile<THREADS>(tile.dout[buffer], dout_t, (size_t)H * D, T - t, D);
        if (threadIdx.x >= 2 * QUERIES) return;
        // past the end all is 0, and then dv += 1 * 0, dS = 1 * (0 - 0)
        const int row = t + (int)threadIdx.x % QUERIES;
        const float *stat = threadIdx.x < QUERIES ? lse : delta;
        cp_async_4(&tile.stats[buffer][threadIdx.x], row < T ? stat + (size_t)(row0 + row) * H + h : stat,
                   row < T ? 4 : 0);
    };

    const bf16 *k = qkv + (size_t)(row0 + s0) * W + (H + kv) * D;
    load_tile<THREADS>(tile.k, k, W, T - s0, D);
    load_tile<THREADS>(tile.v, k + K * D, W, T - s0, D);
    int h = (kv * parts + part) * (H / K / parts), t = t_first;
    const int h_end = h + H / K / parts;
    load_queries(h, t, 0);
    cp_async_commit();

    float sum[MT][WIDTH / 8][4] = {}, p[MT][NT][4];  // sum: dV or dK. p: scores, then P; or dP, then dS
    for (int buffer = 0; h < h_end; buffer ^= 1) {
        const float *lse_tile = tile.stats[buffer], *delta_tile = lse_tile + QUERIES;
        cp_async_wait<0>();
        __syncthreads();  // this tile is here, every warp has left the last one
        Tile<QUERIES, WIDTH> &q_tile = tile.q[buffer], &dout_tile = tile.dout[buffer];
        const int t0 = t;
        t += QUERIES;
        if (t >= t_end) t = t_first, h++;
        if (h < h_end) load_queries(h, t, buffer ^ 1);
        cp_async_commit();
        if (t0 + QUERIES <= key || key >= T || (doc_start && doc_start[row0 + t0] >= key + ROWS))
            continue;                                               // nothing to see
        #pragma unroll
        for (int n = 0; n < NT; n++) {                              // dP starts from -delta
            const float2 two = *(const float2 *)(delta_tile + n * 8 + lane % 4 * 2);
            for (int m = 0; m < MT; m++)
                for (int j = 0; j < 4; j++) p[m][n][j] = !owns_dk ? 0 : j % 2 ? -two.y : -two.x;
        }
        multiply_rows<1>(p, left, owns_dk ? dout_tile : q_tile);
        if (!owns_dk) {
            if (t0 < key + ROWS - 1 || (doc_start && doc_start[row0 + min(t0 + QUERIES, T) - 1] > key))
                mask_scores<true>(p, t0, key, doc_start, row0, T);
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                const float2 two = *(const float2 *)(lse_tile + n * 8 + lane % 4 * 2);
                const float even = two.x * (float)M_LOG2E, odd = two.y * (float)M_LOG2E;
                for (int m = 0; m < MT; m++)
                    for (int j = 0; j < 4; j++)
                        p[m][n][j] = exp2_approx(p[m][n][j] * log2_scale - (j % 2 ? odd : even));
            }
            #pragma unroll
            for (int i = 0; i < MT * NT; i++)
                store((float *)(exchange + i * 32), narrow<float>(p[i / NT][i % NT]));
            barrier_arrive(1 + pair, 64);
        } else {
            barrier_sync(1 + pair, 64);                             // P is here
            #pragma unroll
            for (int i = 0; i < MT * NT; i++) {
                float other[4];
                widen(other, load<4>((const float *)(exchange + i * 32)));
                for (int j = 0; j < 4; j++) p[i / NT][i % NT][j] *= other[j];
            }
        }
        multiply_probabilities(sum, p, owns_dk ? q_tile : dout_tile);
    }
    const int out_head = kv + (owns_dk ? 0 : K);
    const size_t row = row0 + key;
    if (parts > 1)
        store_sums(sums + ((row * parts + part) * 2 * K + out_head) * D, (size_t)parts * 2 * K * D, sum,
                   owns_dk ? scale : 1, T - key, D);
    else store_rows(dqkv + row * W + (H + out_head) * D, W, sum, owns_dk ? scale : 1, left, T - key, D);
}

// ---- attention_backward_dq_kernel3: sm_90a; wgmma and TMA -------------------------------------------------
// As kernel 2. A block has 128 queries of a head and walks over tiles of 128 keys.
// floor   208 us for the shape above: wgmma has the whole rate of the tensor cores
// idea    the roles of attention_forward_kernel4: one thread copies, two warpgroups have 64 queries each and
//         compute. P comes from the scores while dO V^T is being computed. What dS costs besides, one group
//         spends under the other's products: nothing holds the two in step
// limits  as attention_forward_kernel4; all 232,448 bytes of shared memory at D 128
template <int WIDTH> struct __align__(1024) WgmmaDqTiles {  // of a block, in shared memory
    static constexpr int QUERIES = 128, KEYS = 128;
    SwizzledTile<QUERIES, WIDTH> q, dout;
    SwizzledTile<KEYS, WIDTH> k[2], v[2];
    Tile<16, WIDTH> dq[QUERIES / 16];
    uint64_t rows_full, full[2], empty[2];                  // mbarriers: q and dout; k and v
};

template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_backward_dq_kernel3(bf16 *__restrict__ dqkv,
        float *__restrict__ delta, const __grid_constant__ TensorMap qkv_map,
        const __grid_constant__ TensorMap dout_map, const bf16 *__restrict__ dout,
        const bf16 *__restrict__ out, const float *__restrict__ lse, const int *__restrict__ doc_start,
        int T, int H, int K, int D, int together, float scale) {
    typedef WgmmaDqTiles<WIDTH> Tiles;
    constexpr int QUERIES = Tiles::QUERIES, KEYS = Tiles::KEYS;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    const int2 place = attention_place(together);
    const int h = place.x % H, b = place.x / H, t0 = place.y * QUERIES;
    const int row0 = b * T, group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
    const int first = doc_start ? doc_start[row0 + t0] / KEYS * KEYS : 0;
    const int n = CEIL_DIV(min(t0 + QUERIES, T) - first, KEYS);             // tiles of keys
    if (threadIdx.x == 0) {
        mbarrier_init(&tile.rows_full, 2);
        for (int i = 0; i < 2; i++)
            mbarrier_init(&tile.full[i], 2), mbarrier_init(&tile.empty[i], 2 * GROUP_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {                                                       // the copies
        registers_give<24>();
        if (threadIdx.x % 128 > 0) return;
        const int head = H + h / (H / K);
        tma_load_tile(tile.q, &tile.rows_full, &qkv_map, h, t0, b);
        tma_load_tile(tile.dout, &tile.rows_full, &dout_map, h, t0, b);
        for (int i = 0; i < n; i++) {
            mbarrier_wait(&tile.empty[i % 2], i / 2 % 2 ^ 1);
            tma_load_tile(tile.k[i % 2], &tile.full[i % 2], &qkv_map, head, first + i * KEYS, b);
            tma_load_tile(tile.v[i % 2], &tile.full[i % 2], &qkv_map, head + K, first + i * KEYS, b);
        }
        return;
    }
    registers_take<240>();
    const int warp = threadIdx.x / 32, t = t0 + warp * 16;                  // the warp's 16 rows
    const int doc_last = doc_start ? doc_start[row0 + min(t + 16, T) - 1] : 0;
    const float log2_scale = scale * (float)M_LOG2E;
    float row_lse[2], row_delta[2], p[1][KEYS / 8][4] = {}, ds[1][KEYS / 8][4] = {};
    float dq[1][WIDTH / 8][4] = {};
    uint32_t left[KEYS / 16][4];
    for (int i = 0; i < 2; i++) {                           // the four lanes of a row share out its D
        const int row = t + i * 8 + lane / 4;
        const size_t at = (size_t)(row0 + row) * H + h;
        float sum = 0;
        for (int d = lane % 4 * 8; row < T && d < D; d += 32) {
            float dout_d[8], out_d[8];
            widen(dout_d, load<8>(dout + at * D + d));
            widen(out_d, load<8>(out + at * D + d));
            for (int j = 0; j < 8; j++) sum += dout_d[j] * out_d[j];
        }
        row_delta[i] = warp_sum(sum, 4);
        row_lse[i] = row < T ? lse[at] * (float)M_LOG2E : INFINITY;         // past the end p = 0
        if (lane % 4 == 0 && row < T) delta[at] = row_delta[i];
    }
    mbarrier_wait(&tile.rows_full, 0);
    for (int i = 0; i < n; i++) {
        const int s0 = first + i * KEYS;
        mbarrier_wait(&tile.full[i % 2], i / 2 % 2);
        wgmma_fence();
        wgmma_scores(p, tile.q, group * 64, tile.k[i % 2]);
        wgmma_scores(ds, tile.dout, group * 64, tile.v[i % 2]);
        wgmma_wait<1>(p);
        uint32_t t_here = t;
        forget_origin(t_here);                      // or what masking makes of t would stay in registers
        if (s0 + KEYS - 1 > t || doc_last > s0) mask_scores<false>(p, t_here, s0, doc_start, row0, T);
        #pragma unroll
        for (int j = 0; j < KEYS / 2; j++)
            p[0][j / 4][j % 4] = exp2_approx(p[0][j / 4][j % 4] * log2_scale - row_lse[j % 4 / 2]);
        wgmma_wait<0>(ds);
        #pragma unroll
        for (int j = 0; j < KEYS / 2; j++)
            ds[0][j / 4][j % 4] = p[0][j / 4][j % 4] * (ds[0][j / 4][j % 4] - row_delta[j % 4 / 2]);
        pack_left(left, ds);
        wgmma_fence();
        wgmma_values(dq, left, tile.k[i % 2]);
        wgmma_wait<0>(dq, left);
        release(&tile.empty[i % 2]);
    }
    const int W = (H + 2 * K) * D;
    store_rows(dqkv + (size_t)(row0 + t) * W + h * D, W, dq, scale, tile.dq[warp], T - t, D);
}

// ---- attention_backward_dkdv_kernel3: sm_90a; wgmma and TMA -----------------------------------------------
// As kernel 2. A block has 128 keys and walks over tiles of 64 queries, head after head.
// floor   278 us for the shape above
// idea    the tiles of scores stand on their sides, keys are rows: P^T and dS^T become left operands without
//         leaving their registers. A warpgroup has 64 keys and both of their sums, 128 registers per thread
//         at D 128, which leaves room for tiles of 64 queries. P comes while dP is being computed, dS while
//         dV is. One thread copies; two warps beside it bring lse and delta, which lie H apart in memory:
//         nothing for TMA
// limits  as attention_forward_kernel4; 200,704 bytes of shared memory at D 128
template <int WIDTH> struct __align__(1024) WgmmaDkdvTiles {        // of a block, in shared memory
    static constexpr int KEYS = 64, QUERIES = 64, STAGES = 3;       // keys of a warpgroup; queries of a stage
    SwizzledTile<KEYS, WIDTH> k[2], v[2];
    SwizzledTile<QUERIES, WIDTH> q[STAGES], dout[STAGES];
    Tile<16, WIDTH> out[2 * KEYS / 16];
    float lse[STAGES][QUERIES], delta[STAGES][QUERIES];
    uint64_t keys_full, full[STAGES], empty[STAGES];                // mbarriers
};

template <int WIDTH>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) attention_backward_dkdv_kernel3(bf16 *__restrict__ dqkv,
        const __grid_constant__ TensorMap qkv_map, const __grid_constant__ TensorMap dout_map,
        const float *__restrict__ lse, const float *__restrict__ delta, const int *__restrict__ doc_start,
        float *__restrict__ sums, int parts, int T, int H, int K, int D, float scale) {
    typedef WgmmaDkdvTiles<WIDTH> Tiles;
    constexpr int KEYS = Tiles::KEYS, QUERIES = Tiles::QUERIES, STAGES = Tiles::STAGES;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    const int part = blockIdx.x % parts, kv = blockIdx.x / parts % K, b = blockIdx.x / parts / K;
    const int group = uniform(threadIdx.x / 128), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = b * T, s0 = blockIdx.y * 2 * KEYS;                             // most queries first
    const int h_first = (kv * parts + part) * (H / K / parts), h_end = h_first + H / K / parts;
    if (threadIdx.x == 0) {
        mbarrier_init(&tile.keys_full, 4);
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(&tile.full[i], 2 + QUERIES), mbarrier_init(&tile.empty[i], 2 * GROUP_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    const int t_end = queries_end<WGMMA_THREADS, QUERIES>(s0, s0 + 2 * KEYS, doc_start, row0, T);
    if (group == 2) {
        registers_give<24>();
        // its first thread copies; its last ones, each for a query, bring lse and delta
        const int j = (int)threadIdx.x - (WGMMA_THREADS - QUERIES);
        if (j < 0 && threadIdx.x % 128 > 0) return;
        for (int i = 0; j < 0 && i < 2; i++) {
            tma_load_tile(tile.k[i], &tile.keys_full, &qkv_map, H + kv, s0 + i * KEYS, b);
            tma_load_tile(tile.v[i], &tile.keys_full, &qkv_map, H + K + kv, s0 + i * KEYS, b);
        }
        for (int h = h_first, i = 0; h < h_end; h++)
            for (int t = s0; t < t_end; t += QUERIES, i++) {
                const int stage = i % STAGES;
                mbarrier_wait(&tile.empty[stage], i / STAGES % 2 ^ 1);
                if (j < 0) {
                    tma_load_tile(tile.q[stage], &tile.full[stage], &qkv_map, h, t, b);
                    tma_load_tile(tile.dout[stage], &tile.full[stage], &dout_map, h, t, b);
                } else {                                    // past the end all is 0: dv += 1 * 0, dS = 1 * 0
                    const unsigned at = (unsigned)(row0 + t + j) * H + h;   // 24 registers must do
                    tile.lse[stage][j] = t + j < T ? lse[at] * (float)M_LOG2E : 0;
                    tile.delta[stage][j] = t + j < T ? delta[at] : 0;
                    mbarrier_arrive(&tile.full[stage]);
                }
            }
        return;
    }
    registers_take<240>();
    const int group_key = s0 + group * KEYS, key = s0 + warp * 16;          // 64 rows; of them the warp's 16
    const float log2_scale = scale * (float)M_LOG2E;
    float dk[1][WIDTH / 8][4] = {}, dv[1][WIDTH / 8][4] = {};
    float p[1][QUERIES / 8][4] = {}, ds[1][QUERIES / 8][4] = {};
    uint32_t p_left[QUERIES / 16][4], ds_left[QUERIES / 16][4];
    mbarrier_wait(&tile.keys_full, 0);
    for (int h = h_first, i = 0; h < h_end; h++)
        for (int t = s0; t < t_end; t += QUERIES, i++) {
            const int stage = uniform(i % STAGES), t_last = min(t + QUERIES, T) - 1;
            mbarrier_wait(&tile.full[stage], i / STAGES % 2);
            // else hidden
            if (t_last >= group_key && (!doc_start || doc_start[row0 + t] < group_key + KEYS)) {
                wgmma_fence();
                wgmma_scores(p, tile.k[group], 0, tile.q[stage]);
                wgmma_scores(ds, tile.v[group], 0, tile.dout[stage]);
                wgmma_wait<1>(p);
                if (t < key + 15 || (doc_start && doc_start[row0 + t_last] > key))
                    mask_scores<true>(p, t, key, doc_start, row0, T);
                #pragma unroll
                for (int j = 0; j < QUERIES / 2; j++)
                    p[0][j / 4][j % 4] = exp2_approx(p[0][j / 4][j % 4] * log2_scale -
                                                     tile.lse[stage][j / 4 * 8 + lane % 4 * 2 + j % 2]);
                pack_left(p_left, p);
                wgmma_fence();
                wgmma_values(dv, p_left, tile.dout[stage]);
                wgmma_wait<1>(ds);
                #pragma unroll
                for (int j = 0; j < QUERIES / 2; j++)
                    ds[0][j / 4][j % 4] = p[0][j / 4][j % 4] * (ds[0][j / 4][j % 4] -
                                          tile.delta[stage][j / 4 * 8 + lane % 4 * 2 + j % 2]);
                pack_left(ds_left, ds);
                wgmma_fence();
                wgmma_values(dk, ds_left, tile.q[stage]);
                wgmma_wait<0>(dv, p_left);
                wgmma_wait<0>(dk, ds_left);
            }
            release(&tile.empty[stage]);
        }
    const size_t row = row0 + key;
    if (parts > 1) {
        float *out = sums + ((row * parts + part) * 2 * K + kv) * D;
        store_sums(out, (size_t)parts * 2 * K * D, dk, scale, T - key, D);
        store_sums(out + K * D, (size_t)parts * 2 * K * D, dv, 1, T - key, D);
        return;
    }
    const int W = (H + 2 * K) * D;
    bf16 *out = dqkv + row * W + (H + kv) * D;
    store_rows(out, W, dk, scale, tile.out[warp], T - key, D);
    store_rows(out + K * D, W, dv, 1, tile.out[warp], T - key, D);
}

// ---- attention_backward_add_kernel1: the parts of a group, in a fixed order -------------------------------
// dk, dv (in dqkv) = sums (N,parts,2KD) over the parts
// bytes   8·N·parts·K·D in + 4·N·K·D out = 38 MB for N 4096, parts 4, K 2, D 128        floor 11 us (memory),
//         less where L2 still has the sums
// idea    fp32 until here, and rounded once, as with one part
// variants dev/attention_backward.cu: 1 this
__global__ void attention_backward_add_kernel1(bf16 *__restrict__ dqkv, const float *__restrict__ sums,
                                               int parts, int N, int H, int K, int D) {
    const int columns = 2 * K * D, i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    const int row = i / columns, column = i % columns;
    if (row >= N) return;
    float sum[4] = {};
    for (int part = 0; part < parts; part++)
        accumulate(sum, sums + ((size_t)row * parts + part) * columns + column);
    store(dqkv + (size_t)row * (H + 2 * K) * D + H * D + column, narrow<bf16>(sum));
}

// ---- attention_backward_dq_f32_kernel1, attention_backward_dkdv_f32_kernel1: a warp per query, per key ----
__global__ void attention_backward_dq_f32_kernel1(float *__restrict__ dqkv, float *__restrict__ delta,
        const float *__restrict__ dout, const float *__restrict__ qkv, const float *__restrict__ out,
        const float *__restrict__ lse, const int *__restrict__ doc_start, int T, int H, int K, int D,
        float scale) {
    const int h = blockIdx.x % H, t = (gridDim.y - 1 - blockIdx.y) * F32_WARPS + threadIdx.y;
    const int W = (H + 2 * K) * D;
    if (t >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / H) * T, at = (row0 + t) * H + h;
    const float *k = qkv + row0 * W + (H + h / (H / K)) * D, *v = k + K * D;
    float q_t[4], dout_t[4], out_t[4], k_s[4], v_s[4], dq_t[4] = {};
    load_row(q_t, qkv + (row0 + t) * W + h * D, D);
    load_row(dout_t, dout + at * D, D);
    load_row(out_t, out + at * D, D);
    const float delta_t = dot(dout_t, out_t), lse_t = lse[at];
    for (int s = doc_start ? doc_start[row0 + t] : 0; s <= t; s++) {
        load_row(k_s, k + (size_t)s * W, D);
        load_row(v_s, v + (size_t)s * W, D);
        const float p = expf(dot(q_t, k_s) * scale - lse_t), ds = p * (dot(dout_t, v_s) - delta_t);
        for (int j = 0; j < 4; j++) dq_t[j] += ds * scale * k_s[j];
    }
    store_row(dqkv + (row0 + t) * W + h * D, dq_t, D);
    if (threadIdx.x == 0) delta[at] = delta_t;
}

__global__ void attention_backward_dkdv_f32_kernel1(float *__restrict__ dqkv, const float *__restrict__ dout,
        const float *__restrict__ qkv, const float *__restrict__ lse, const float *__restrict__ delta,
        const int *__restrict__ doc_start, int T, int H, int K, int D, float scale) {
    const int kv = blockIdx.x % K, s = blockIdx.y * F32_WARPS + threadIdx.y, W = (H + 2 * K) * D;
    if (s >= T) return;
    const size_t row0 = (size_t)(blockIdx.x / K) * T, at_k = (row0 + s) * W + (H + kv) * D;
    float k_s[4], v_s[4], q_t[4], dout_t[4], dk_s[4] = {}, dv_s[4] = {};
    load_row(k_s, qkv + at_k, D);
    load_row(v_s, qkv + at_k + K * D, D);
    for (int h = kv * (H / K); h < (kv + 1) * (H / K); h++)
        for (int t = s; t < T && (!doc_start || doc_start[row0 + t] <= s); t++) {
            const size_t at = (row0 + t) * H + h;
            load_row(q_t, qkv + (row0 + t) * W + h * D, D);
            load_row(dout_t, dout + at * D, D);
            const float p = expf(dot(q_t, k_s) * scale - lse[at]), ds = p * (dot(dout_t, v_s) - delta[at]);
            for (int j = 0; j < 4; j++) dk_s[j] += ds * scale * q_t[j], dv_s[j] += p * dout_t[j];
        }
    store_row(dqkv + at_k, dk_s, D);
    store_row(dqkv + at_k + K * D, dv_s, D);
}

// ---- attention_backward: the kernels for a precision, a head size and a device ----------------------------
static void attention_backward_f32(float *dqkv, const float *dout, const float *qkv, const float *out,
                                   const float *lse, const int *doc_start, int B, int T, int H, int K,
                                   int D) {
    const float scale = (float)(1 / sqrt((double)D));
    float *delta = gpu.scratch;             // (N,H)
    const dim3 rows(32, F32_WARPS);
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    launch(attention_backward_dq_f32_kernel1, dim3(B * H, CEIL_DIV(T, F32_WARPS)), rows, 0,
           dqkv, delta, dout, qkv, out, lse, doc_start, T, H, K, D, scale);
    launch(attention_backward_dkdv_f32_kernel1, dim3(B * K, CEIL_DIV(T, F32_WARPS)), rows, 0,
           dqkv, dout, qkv, lse, delta, doc_start, T, H, K, D, scale);
}

// Parts of a group on this device; floats of gpu.scratch that hold their sums, 2·128·D for each block
static int group_parts(int B, int T, int H, int K) {
    static int sm_count = device_attribute(cudaDevAttrMultiProcessorCount);
    return attention_parts(B, T, H, K, sm_count);
}
static size_t part_sums(size_t N, int K, int D, int parts) { return parts > 1 ? N * parts * 2 * K * D : 0; }

static void add_parts(bf16 *dqkv, const float *sums, int parts, int N, int H, int K, int D) {
    if (parts > 1)
        launch(attention_backward_add_kernel1, CEIL_DIV(N * 2 * K * D, 4 * 256), 256, 0, dqkv, sums, parts, N,
               H, K, D);
}

static void attention_backward_mma(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const bf16 *out,
                                   const float *lse, const int *doc_start, int B, int T, int H, int K,
                                   int D) {
    const float scale = (float)(1 / sqrt((double)D));
    const int parts = group_parts(B, T, H, K);
    // (N,parts,2KD), (N,H)
    float *sums = gpu.scratch, *delta = sums + part_sums((size_t)B * T, K, D, parts);
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    with_width(D, [&](auto width) {
        constexpr int WIDTH = decltype(width)::value, PAIRS = WIDTH <= 64 ? 2 : 4;
        static int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        typedef DqTiles<WIDTH> Tiles;
        launch(attention_backward_dq_kernel2<WIDTH>, dim3(B * H, CEIL_DIV(T, Tiles::QUERIES)), ATT_THREADS,
               sizeof(Tiles), dqkv, delta, dout, qkv, out, lse, doc_start, T, H, K, D, scale);
        const auto dkdv = [&](auto pairs) {
            typedef DkdvTiles<WIDTH, decltype(pairs)::value> Tiles;
            launch(attention_backward_dkdv_kernel2<WIDTH, decltype(pairs)::value>,
                   dim3(B * K * parts, CEIL_DIV(T, Tiles::KEYS)), Tiles::THREADS, sizeof(Tiles),
                   dqkv, dout, qkv, lse, delta, doc_start, sums, parts, T, H, K, D, scale);
        };
        if ((int)sizeof(DkdvTiles<WIDTH, PAIRS>) <= shared_limit) dkdv(std::integral_constant<int, PAIRS>());
        else dkdv(std::integral_constant<int, 2>());
    });
    add_parts(dqkv, sums, parts, B * T, H, K, D);
}

static void attention_backward_wgmma(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const bf16 *out,
                                     const float *lse, const int *doc_start, int B, int T, int H, int K,
                                     int D) {
    const float scale = (float)(1 / sqrt((double)D));
    const int parts = group_parts(B, T, H, K);
    // (N,parts,2KD), (N,H)
    float *sums = gpu.scratch, *delta = sums + part_sums((size_t)B * T, K, D, parts);
    assert(D % 8 == 0 && D <= 128 && H % K == 0);
    with_wgmma_width(D, [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        typedef WgmmaDqTiles<WIDTH> Dq;
        typedef WgmmaDkdvTiles<WIDTH> Dkdv;
        static_assert(Dq::QUERIES == Dq::KEYS && Dkdv::QUERIES == Dkdv::KEYS);      // a map of qkv for each
        launch(attention_backward_dq_kernel3<WIDTH>, dim3(B * H, CEIL_DIV(T, Dq::QUERIES)), WGMMA_THREADS,
               sizeof(Dq), dqkv, delta, head_map(qkv, B, T, H + 2 * K, D, Dq::KEYS),
               head_map(dout, B, T, H, D, Dq::QUERIES), dout, out, lse, doc_start, T, H, K, D,
               heads_together(B, T, H, K, D), scale);
        launch(attention_backward_dkdv_kernel3<WIDTH>, dim3(B * K * parts, CEIL_DIV(T, 2 * Dkdv::KEYS)),
               WGMMA_THREADS, sizeof(Dkdv), dqkv, head_map(qkv, B, T, H + 2 * K, D, Dkdv::KEYS),
               head_map(dout, B, T, H, D, Dkdv::QUERIES), lse, delta, doc_start, sums, parts, T, H, K, D,
               scale);
    });
    add_parts(dqkv, sums, parts, B * T, H, K, D);
}

// ---- MLP: h = silu(gate) up (SwiGLU, Shazeer 2020) --------------------------------------------------------
// h (N,F) = silu(g) u,  silu(g) = g / (1 + e^-g),   gate_up (N,2F) = g | u = x (N,C) w (2F,C)^T
// backward, with s = 1 / (1 + e^-g):  dg = dh u s (1 + g (1 - s)),  du = dh g s,  and h once more for the
// gradient of w_down. Two forms: passes of their own between cuBLASLt's products, or the epilogues of
// products of our own.

// of E elements; h may be u
template <int E>
__device__ __forceinline__ void swiglu(float (&h)[E], const float (&g)[E], const float (&u)[E]) {
    for (int k = 0; k < E; k++) h[k] = u[k] * __fdividef(g[k], 1 + exp_approx(-g[k]));
}

// E columns: gate, up become dg, du; h is returned
template <int E, typename floatX>
__device__ __forceinline__ Pack<floatX, E> swiglu_backward_pack(Pack<floatX, E> &gate, Pack<floatX, E> &up,
                                                                const Pack<floatX, E> &dh) {
    float g[E], u[E], dh_f[E], dg[E], du[E], h_f[E];
    widen(g, gate);
    widen(u, up);
    widen(dh_f, dh);
    for (int k = 0; k < E; k++) {
        const float s = __fdividef(1, 1 + exp_approx(-g[k])), silu = g[k] * s, dsilu = dh_f[k] * u[k];
        h_f[k] = u[k] * silu;
        du[k] = dh_f[k] * silu;
        dg[k] = dsilu * s * (1 + g[k] * (1 - s));
    }
    gate = narrow<floatX>(dg);
    up = narrow<floatX>(du);
    return narrow<floatX>(h_f);
}
// the same in memory; dh may be h
template <int E, typename floatX>
__device__ __forceinline__ void swiglu_backward_pack(floatX *gate, floatX *up, floatX *h, const floatX *dh) {
    Pack<floatX, E> dg = load<E>(gate), du = load<E>(up);
    store(h, swiglu_backward_pack(dg, du, load<E>(dh)));
    store(gate, dg);
    store(up, du);
}

// ---- swiglu_forward_kernel2: a block per row --------------------------------------------------------------
// bytes   2·2·N·F in + 2·N·F out = 1.08 GB for N 16384, F 11008
//         floor 323 us (memory; two SFU operations per element: 98 us)
// idea    no division finds the row; 16-byte packs
// limits  F % 8 == 0 (fp32: 4)
// variants dev/swiglu.cu: 0 a thread per element, 1 16 bytes per thread, 2 this
template <typename floatX> __global__ void swiglu_forward_kernel2(floatX *h, const floatX *gate_up, int F) {
    constexpr int E = 16 / sizeof(floatX);
    const floatX *gate = gate_up + (size_t)blockIdx.x * 2 * F, *up = gate + F;
    floatX *h_n = h + (size_t)blockIdx.x * F;
    for (int f = threadIdx.x * E; f < F; f += blockDim.x * E) {
        float g[E], u[E], h_f[E];
        widen(g, load<E>(gate + f));
        widen(u, load<E>(up + f));
        swiglu(h_f, g, u);
        store(h_n + f, narrow<floatX>(h_f));
    }
}

template <typename floatX> void swiglu_forward(floatX *h, const floatX *gate_up, int N, int F) {
    const int E = 16 / sizeof(floatX);
    assert(F % E == 0);
    launch(swiglu_forward_kernel2<floatX>, N, min(CEIL_DIV(F, 32 * E) * 32, 256), 0, h, gate_up, F);
}

// ---- swiglu_backward_kernel1: a block per row -------------------------------------------------------------
// gate_up (N,2F) becomes its gradient, h (N,F) =; dh (N,F) may be h
// bytes   2·3·N·F in + 2·3·N·F out = 2.16 GB for N 16384, F 11008       floor 646 us (memory)
// limits  F % 8 == 0 (fp32: 4)
// variants dev/swiglu.cu: 0 a thread per element, 1 this
template <typename floatX>
__global__ void swiglu_backward_kernel1(floatX *gate_up, floatX *h, const floatX *dh, int F) {
    constexpr int E = 16 / sizeof(floatX);
    const size_t row = (size_t)blockIdx.x * F;
    floatX *gate = gate_up + 2 * row, *up = gate + F;
    for (int f = threadIdx.x * E; f < F; f += blockDim.x * E)
        swiglu_backward_pack<E>(gate + f, up + f, h + row + f, dh + row + f);
}

template <typename floatX> void swiglu_backward(floatX *gate_up, floatX *h, const floatX *dh, int N, int F) {
    const int E = 16 / sizeof(floatX);
    assert(F % E == 0);
    launch(swiglu_backward_kernel1<floatX>, N, min(CEIL_DIV(F, 32 * E) * 32, 256), 0, gate_up, h, dh, F);
}

// ---- products of our own for the MLP: what both directions share ------------------------------------------
// FLOPs   4·N·C·F = 1.48 T forward, 2·N·C·F backward: 4.7 and 2.4 ms at the 312 TFLOP/s of an A100
// idea    a block of 4 warps owns 128 x 128 sums, a warp 64 x 64 of them in registers: 192 bytes of shared
//         memory per mma, 64 of them the copies', where an A100 leaves time for 256. Two stages of 32 columns
//         are in flight (cp.async) while one is used. The numbers are rounded where the passes round them
enum { MLP_THREADS = 128, MLP_ROWS = 128, MLP_COLUMNS = 128, MLP_DEPTH = 32, MLP_STAGES = 3, MLP_WARP = 64,
       MLP_GROUP = 16 };
typedef Tile<MLP_WARP, MLP_WARP> MlpWarpTile;               // a warp's result, on its way to memory

// The place of tile `number` among (rows, columns) of them. Those in flight have neighbouring numbers:
// 16 x 16 at a time share what they read in L2.
__device__ __forceinline__ int2 mlp_place(int number, int rows, int columns) {
    const int first = number / (MLP_GROUP * columns) * MLP_GROUP;
    const int height = min(rows - first, (int)MLP_GROUP);
    const int i = number % (MLP_GROUP * columns);
    return make_int2(first + i % height, i / height);
}

// 8 columns of row n of gate, up and, unless it is NULL, h
__device__ __forceinline__ void store_gate_up(bf16 *gate_up, bf16 *h, size_t n, int f, int F,
                                              const Pack<bf16, 8> &gate, const Pack<bf16, 8> &up) {
    store(gate_up + n * 2 * F + f, gate);
    store(gate_up + n * 2 * F + F + f, up);
    if (!h) return;
    float g[8], u[8], h_f[8];
    widen(g, gate);
    widen(u, up);
    swiglu(h_f, g, u);
    store(h + n * F + f, narrow<bf16>(h_f));
}

// start(i, stage) starts the copies of step i, use(stage) multiplies them.
template <typename Stage, typename Start, typename Use>
__device__ __forceinline__ void mlp_pipeline(int steps, Stage *stages, Start start, Use use) {
    #pragma unroll
    for (int i = 0; i < MLP_STAGES - 1; i++) {
        if (i < steps) start(i, stages[i]);
        cp_async_commit();
    }
    for (int i = 0, now = 0, then = MLP_STAGES - 1; i < steps; i++) {
        cp_async_wait<MLP_STAGES - 2>();
        __syncthreads();  // step i is here, and every warp has left step i - 1
        if (i + MLP_STAGES - 1 < steps) start(i + MLP_STAGES - 1, stages[then]);
        cp_async_commit();
        use(stages[now]);
        now = now == MLP_STAGES - 1 ? 0 : now + 1;
        then = then == MLP_STAGES - 1 ? 0 : then + 1;
    }
    cp_async_wait<0>();
    __syncthreads();                                        // the stages are free
}

// ---- gate_up_swiglu_kernel3: the product with SwiGLU as its epilogue --------------------------------------
// gate_up (N,2F) = x (N,C) w (2F,C)^T,  h (N,F) = silu(gate) up; h may be NULL
// bytes   2·N·C + 4·C·F in, 2·3·N·F out: of 2·5·N·F with the passes above 4·N·F less (0.72 GB for
//         N 16384, F 11008)
// idea    a warp's 64 columns are 32 of gate and the same 32 of up, so that both meet in one warp
// limits  C % 8 == 0, F % 8 == 0; 61,440 bytes of shared memory: two blocks per SM on sm_80 and sm_90, one
//         with 99 KiB
// variants dev/mlp.cu: 0 a thread per element, 1 fp32 tiles, 2 tensor cores, 64 x 64 sums, one buffer, 3 this
struct GateUpStage {
    Tile<MLP_ROWS, MLP_DEPTH> x;
    Tile<MLP_COLUMNS, MLP_DEPTH> w;  // 32 rows of gate, 32 of up, the next 32 of gate, of up
};

__global__ void __launch_bounds__(MLP_THREADS, 2) gate_up_swiglu_kernel3(bf16 *__restrict__ h,
        bf16 *__restrict__ gate_up, const bf16 *__restrict__ x, const bf16 *__restrict__ w, int N, int C,
        int F) {
    constexpr int HALF = MLP_WARP / 2;
    GateUpStage *stages = shared_memory<GateUpStage>();
    const int2 place = mlp_place(blockIdx.x, CEIL_DIV(N, MLP_ROWS), CEIL_DIV(F, MLP_COLUMNS / 2));
    const int n0 = place.x * MLP_ROWS, f0 = place.y * (MLP_COLUMNS / 2), lane = threadIdx.x % 32;
    // warps 0 1 above 2 3
    const int warp_row = threadIdx.x / 64 * MLP_WARP, warp_half = threadIdx.x / 32 % 2;
    float sum[MLP_WARP / 16][MLP_WARP / 8][4] = {};
    // A thread copies 16 bytes of 4 rows each of x and of w. Rows past the end repeat the last: their sums
    // are never stored.
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const bf16 *x_src[4], *w_src[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        x_src[i] = x + (size_t)min(n0 + 32 * i + row, N - 1) * C + column;
        w_src[i] = w + ((size_t)(i % 2) * F + min(f0 + i / 2 * HALF + row, F - 1)) * C + column;
    }
    auto load_stage = [&](int i, GateUpStage &stage) {
        const int valid = i * MLP_DEPTH + column < C ? 16 : 0;
        #pragma unroll
        for (int j = 0; j < 4; j++)
            cp_async_16(stage.x.at(32 * j + row, column), x_src[j] + i * MLP_DEPTH, valid);
        #pragma unroll
        for (int j = 0; j < 4; j++)
            cp_async_16(stage.w.at(32 * j + row, column), w_src[j] + i * MLP_DEPTH, valid);
    };
    mlp_pipeline(CEIL_DIV(C, MLP_DEPTH), stages, load_stage, [&](GateUpStage &stage) {
        multiply_rows<2>(sum, rows_of<MLP_WARP>(stage.x, warp_row),
                         rows_of<MLP_WARP>(stage.w, warp_half * MLP_WARP));
    });
    MlpWarpTile &rows = reinterpret_cast<MlpWarpTile *>(stages)[threadIdx.x / 32];
    fragments_to_rows(rows, sum, 1);
    const int f = lane % 4 * 8, out_f = f0 + warp_half * HALF + f;
    if (out_f >= F) return;
    // rows 4 apart: other banks
    for (int r = lane / 8 + lane / 4 % 2 * 4; r < MLP_WARP && n0 + warp_row + r < N; r += 8)
        store_gate_up(gate_up, h, n0 + warp_row + r, out_f, F, load<8>(rows.at(r, f)),
                      load<8>(rows.at(r, f + HALF)));
}

// ---- swiglu_down_backward_kernel2: the gradient of h stays on the chip ------------------------------------
// dh = dx (N,C) w (C,F); gate_up (N,2F) becomes its gradient, h (N,F) =
// bytes   2·N·C + 2·C·F + 4·N·F in, 2·3·N·F out: of 2·7·N·F with the passes above 4·N·F less
// limits  C % 8 == 0, F % 8 == 0; 56,832 bytes of shared memory: two blocks per SM on sm_80 and sm_90, one
//         with 99 KiB
// variants dev/mlp.cu: 0 a thread per element, 1 fp32 tiles, 2 this
struct DownStage {
    Tile<MLP_ROWS, MLP_DEPTH> dx;
    Tile<MLP_DEPTH, MLP_COLUMNS> w;
};

__global__ void __launch_bounds__(MLP_THREADS, 2) swiglu_down_backward_kernel2(bf16 *__restrict__ gate_up,
        bf16 *__restrict__ h, const bf16 *__restrict__ dx, const bf16 *__restrict__ w, int N, int C, int F) {
    DownStage *stages = shared_memory<DownStage>();
    const int2 place = mlp_place(blockIdx.x, CEIL_DIV(N, MLP_ROWS), CEIL_DIV(F, MLP_COLUMNS));
    const int n0 = place.x * MLP_ROWS, f0 = place.y * MLP_COLUMNS, lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 64 * MLP_WARP, warp_column = threadIdx.x / 32 % 2 * MLP_WARP;
    float sum[MLP_WARP / 16][MLP_WARP / 8][4] = {};
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const int w_row = threadIdx.x / 16, w_column = threadIdx.x % 16 * 8;
    const bf16 *dx_src[4], *w_src = w + (size_t)w_row * F + min(f0 + w_column, F - 8);
    for (int i = 0; i < 4; i++) dx_src[i] = dx + (size_t)min(n0 + 32 * i + row, N - 1) * C + column;
    auto load_stage = [&](int i, DownStage &stage) {
        const int c = i * MLP_DEPTH;
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            cp_async_16(stage.dx.at(32 * j + row, column), dx_src[j] + c, c + column < C ? 16 : 0);
            cp_async_16(stage.w.at(8 * j + w_row, w_column), w_src + (size_t)(c + 8 * j) * F,
                        c + 8 * j + w_row < C ? 16 : 0);
        }
    };
    mlp_pipeline(CEIL_DIV(C, MLP_DEPTH), stages, load_stage, [&](DownStage &stage) {
        multiply_columns(sum, rows_of<MLP_WARP>(stage.dx, warp_row), stage.w, warp_column);
    });
    MlpWarpTile &rows = reinterpret_cast<MlpWarpTile *>(stages)[threadIdx.x / 32];
    fragments_to_rows(rows, sum, 1);
    const int f = lane % 8 * 8, out_f = f0 + warp_column + f;
    if (out_f >= F) return;
    for (int r = lane / 8; r < MLP_WARP && n0 + warp_row + r < N; r += 4) {
        const size_t n = n0 + warp_row + r;
        bf16 *gate = gate_up + n * 2 * F + out_f;
        swiglu_backward_pack<8>(gate, gate + F, h + n * F + out_f, rows.at(r, f));
    }
}

// ---- the same products with wgmma and TMA (sm_90a): what both directions share ----------------------------
// FLOPs   as above: 1.49 and 0.75 ms at the 989 TFLOP/s of an H100
// idea    A block walks over many tiles of 128 x 192 sums. One thread does nothing but copy: 64 columns of
//         both operands at a time, into a ring of four stages. Two warpgroups take the tiles in turns: while
//         one rounds its sums, computes SwiGLU and stores, the tensor cores work for the other. Per stage
//         they take 768 clocks and shared memory 832: operands read 512, copies written 320
// limits  C % 8 == 0, F % 8 == 0: TMA writes zeros past the end of rows and columns. 216,064 bytes of shared
//         memory; 240 registers for those who compute, 24 for who copies
struct ProductSums { float half[2][1][24][4]; };            // of a warpgroup: 64 rows, then 64 more

template <typename Left, typename Right> struct __align__(1024) ProductTiles {      // of a block
    static constexpr int ROWS = 128, COLUMNS = 192, DEPTH = 64, STAGES = 4;
    struct { Left left; Right right; } stage[STAGES];
    Tile<16, COLUMNS> rows[ROWS / 16];                      // of a warp, on their way to memory
    uint64_t full[STAGES], empty[STAGES];                   // mbarriers
};

// The block's share of (rows, columns) tiles, each of them `steps` stages deep. load(place, k, stage, landed)
// starts the copies of step k, multiply(sum, stage) adds its products, finish(place, sum) takes the sums off.
template <typename Tiles, typename Load, typename Multiply, typename Finish>
__device__ __forceinline__ void product_pipeline(Tiles &tile, int rows, int columns, int steps, Load load,
                                                 Multiply multiply, Finish finish) {
    constexpr int STAGES = Tiles::STAGES;
    const int group = uniform(threadIdx.x / 128), tiles = rows * columns, blocks = gridDim.x;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++)
            mbarrier_init(&tile.full[s], 1), mbarrier_init(&tile.empty[s], GROUP_WARPS);    // of either group
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 2) {                                       // the copies
        registers_give<24>();
        if (threadIdx.x % 128 > 0) return;
        for (int number = blockIdx.x, i = 0; number < tiles; number += blocks) {
            const int2 place = mlp_place(number, rows, columns);
            for (int k = 0; k < steps; k++, i++) {
                const int s = i % STAGES;
                mbarrier_wait(&tile.empty[s], i / STAGES % 2 ^ 1);
                mbarrier_expect(&tile.full[s], sizeof tile.stage[s]);
                load(place, k, tile.stage[s], &tile.full[s]);
            }
        }
        return;
    }
    registers_take<240>();
    int i = group * steps;                                  // counts the steps of both groups
    for (int number = blockIdx.x + group * blocks; number < tiles; number += 2 * blocks, i += steps) {
        ProductSums sum = {};
        if (number >= blocks) barrier_sync(1 + group, 256); // the other has started all of its products
        for (int k = 0; k < steps; k++, i++) {
            mbarrier_wait(&tile.full[i % STAGES], i / STAGES % 2);
            wgmma_fence();
            multiply(sum, tile.stage[i % STAGES]);
            wgmma_commit();
            wgmma_wait<1>();                                // those of step k go on, those before are over
            if (k > 0) release(&tile.empty[(i - 1) % STAGES]);
        }
        if (number + blocks < tiles) barrier_arrive(2 - group, 256);
        for (int m = 0; m < 2; m++) wgmma_wait<0>(sum.half[m]);
        release(&tile.empty[(i - 1) % STAGES]);
        finish(mlp_place(number, rows, columns), sum);
    }
}

// ---- gate_up_swiglu_kernel4: sm_90a; 8 rows of gate, 8 of up ----------------------------------------------
// As kernel 3
// idea    TMA sees w as (F/8, gate or up, 8, C): a box has 8 rows of gate, the same 8 of up, the next 8 of
//         gate ... So in a row of sums 8 columns of gate lie beside the same 8 of up
typedef ProductTiles<SwizzledTile<128, 64>, SwizzledTile<192, 64>> GateUpTiles;

__global__ void __launch_bounds__(WGMMA_THREADS, 1) gate_up_swiglu_kernel4(bf16 *__restrict__ h,
        bf16 *__restrict__ gate_up, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
        int N, int C, int F) {
    typedef GateUpTiles Tiles;
    constexpr int ROWS = Tiles::ROWS, COLUMNS = Tiles::COLUMNS, DEPTH = Tiles::DEPTH;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    auto load_stage = [&](int2 place, int k, auto &stage, uint64_t *landed) {
        tma_load(&stage.left, &x, landed, k * DEPTH, 0, place.x * ROWS, 0);
        tma_load(&stage.right, &w, landed, k * DEPTH, 0, 0, place.y * (COLUMNS / 16));
    };
    auto multiply = [&](ProductSums &sum, const auto &stage) {
        #pragma unroll
        for (int c = 0; c < DEPTH; c += 16)
            for (int m = 0; m < 2; m++)
                wgmma_rows(sum.half[m], stage.left.operand(m * 64, c), stage.right.operand(0, c));
    };
    auto finish = [&](int2 place, const ProductSums &sum) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Tile<16, COLUMNS> &rows = tile.rows[warp];
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            fragments_to_rows(rows, sum.half[m], 1);
            for (int j = 0; j < COLUMNS / 16; j += 4)
                for (int r = lane / 4; r < 16; r += 8) {    // 4 lanes to a row: 8 of them have all banks
                    const int n = place.x * ROWS + m * 64 + warp % 4 * 16 + r, f8 = j + lane % 4;
                    const int f = place.y * (COLUMNS / 2) + f8 * 8;
                    if (n < N && f < F)
                        store_gate_up(gate_up, h, n, f, F, load<8>(rows.at(r, f8 * 16)),
                                      load<8>(rows.at(r, f8 * 16 + 8)));
                }
        }
    };
    product_pipeline(tile, CEIL_DIV(N, ROWS), CEIL_DIV(F, COLUMNS / 2), CEIL_DIV(C, DEPTH), load_stage,
                     multiply, finish);
}

// ---- swiglu_down_backward_kernel3: sm_90a -----------------------------------------------------------------
// As kernel 2. w stays as it lies, summed over its rows: wgmma transposes on the way
typedef ProductTiles<SwizzledTile<128, 64>, SwizzledTile<64, 192>> DownTiles;

__global__ void __launch_bounds__(WGMMA_THREADS, 1) swiglu_down_backward_kernel3(bf16 *__restrict__ gate_up,
        bf16 *__restrict__ h, const __grid_constant__ TensorMap dx, const __grid_constant__ TensorMap w,
        int N, int C, int F) {
    typedef DownTiles Tiles;
    constexpr int ROWS = Tiles::ROWS, COLUMNS = Tiles::COLUMNS, DEPTH = Tiles::DEPTH;
    Tiles &tile = *swizzled_shared_memory<Tiles>();
    auto load_stage = [&](int2 place, int k, auto &stage, uint64_t *landed) {
        tma_load(&stage.left, &dx, landed, k * DEPTH, 0, place.x * ROWS, 0);
        for (int panel = 0; panel < stage.right.PANELS; panel++)
            tma_load(stage.right.element[panel], &w, landed, place.y * COLUMNS + panel * 64, 0, k * DEPTH, 0);
    };
    auto multiply = [&](ProductSums &sum, const auto &stage) {
        #pragma unroll
        for (int c = 0; c < DEPTH; c += 16)
            for (int m = 0; m < 2; m++)
                wgmma_columns(sum.half[m], stage.left.operand(m * 64, c), stage.right.operand(c, 0));
    };
    auto finish = [&](int2 place, const ProductSums &sum) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Tile<16, COLUMNS> &rows = tile.rows[warp];
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            fragments_to_rows(rows, sum.half[m], 1);
            const int n0 = place.x * ROWS + m * 64 + warp % 4 * 16 + lane / 8;
            #pragma unroll 1
            for (int c = lane % 8 * 8; c < COLUMNS; c += 64) {
                const int f = place.y * COLUMNS + c;
                if (f >= F) continue;
                Pack<bf16, 8> gate[4], up[4];               // of rows 4 apart, all on their way together
                for (int j = 0; j < 4; j++) {
                    const bf16 *gate_n = gate_up + (size_t)(n0 + 4 * j) * 2 * F + f;
                    gate[j] = load_if<8>(n0 + 4 * j < N, gate_n);
                    up[j] = load_if<8>(n0 + 4 * j < N, gate_n + F);
                }
                for (int j = 0, n = n0; j < 4 && n < N; j++, n += 4) {
                    bf16 *gate_n = gate_up + (size_t)n * 2 * F + f;
                    const Pack<bf16, 8> dh = load<8>(rows.at(lane / 8 + 4 * j, c));
                    store(h + (size_t)n * F + f, swiglu_backward_pack(gate[j], up[j], dh));
                    store(gate_n, gate[j]);
                    store(gate_n + F, up[j]);
                }
            }
        }
    };
    product_pipeline(tile, CEIL_DIV(N, ROWS), CEIL_DIV(F, COLUMNS), CEIL_DIV(C, DEPTH), load_stage, multiply,
                     finish);
}

// ---- mlp_forward, mlp_backward_gate_up: the forms, and which one a device gets ----------------------------
// gate_up (N,2F), h (N,F) = of x (N,C), w (2F,C); h may be NULL
template <typename floatX>
void mlp_forward_passes(floatX *h, floatX *gate_up, const floatX *x, const floatX *w, int N, int C, int F) {
    matmul_forward(gate_up, x, w, N, C, 2 * F, NULL, NULL);
    if (h) swiglu_forward(h, gate_up, N, F);
}
static void mlp_forward_products(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int N, int C, int F) {
    static_assert(MLP_STAGES * sizeof(GateUpStage) >= MLP_THREADS / 32 * sizeof(MlpWarpTile));
    assert(C % 8 == 0 && F % 8 == 0);
    launch(gate_up_swiglu_kernel3, CEIL_DIV(N, MLP_ROWS) * CEIL_DIV(F, MLP_COLUMNS / 2), MLP_THREADS,
           MLP_STAGES * sizeof(GateUpStage), h, gate_up, x, w, N, C, F);
}
// rows (N,C) in boxes of `height` rows and 64 columns
static TensorMap rows_map(const bf16 *x, int N, int C, uint32_t height) {
    const uint64_t row = (uint64_t)C * 2;
    return tensor_map(x, {(uint64_t)C, 1, (uint64_t)N, 1}, {row, row, row * N}, {64, 1, height, 1});
}
// A block per SM, fewer if there are fewer tiles. Sums over ranks hold SMs for themselves meanwhile: so that
// no block waits for one of those with all of its tiles, it then has eight.
static int product_blocks(int N, int rows, int F, int columns) {
    static int sm_count = device_attribute(cudaDevAttrMultiProcessorCount);
    const int tiles = CEIL_DIV(N, rows) * CEIL_DIV(F, columns);
    return min(tiles, max(sm_count, gpu.nccl ? CEIL_DIV(tiles, 8) : 0));
}
static void mlp_forward_wgmma(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int N, int C, int F) {
    typedef GateUpTiles Tiles;
    assert(C % 8 == 0 && F % 8 == 0);
    const uint64_t row = (uint64_t)C * 2;
    const TensorMap w_map = tensor_map(w, {(uint64_t)C, 8, 2, (uint64_t)F / 8}, {row, row * F, row * 8},
                                       {64, 8, 2, Tiles::COLUMNS / 16});
    launch(gate_up_swiglu_kernel4, product_blocks(N, Tiles::ROWS, F, Tiles::COLUMNS / 2), WGMMA_THREADS,
           sizeof(Tiles), h, gate_up, rows_map(x, N, C, Tiles::ROWS), w_map, N, C, F);
}

// gate_up (N,2F) becomes its gradient, h (N,F) =; dx (N,C) is the gradient of the MLP's output, w (C,F)
template <typename floatX>
void mlp_backward_passes(floatX *gate_up, floatX *h, const floatX *dx, const floatX *w, int N, int C, int F) {
    matmul_backward_x(h, dx, w, N, F, C);                   // dh, in h's place
    swiglu_backward(gate_up, h, (const floatX *)h, N, F);
}
static void mlp_backward_products(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int N, int C,
                                  int F) {
    static_assert(MLP_STAGES * sizeof(DownStage) >= MLP_THREADS / 32 * sizeof(MlpWarpTile));
    assert(C % 8 == 0 && F % 8 == 0);
    launch(swiglu_down_backward_kernel2, CEIL_DIV(N, MLP_ROWS) * CEIL_DIV(F, MLP_COLUMNS), MLP_THREADS,
           MLP_STAGES * sizeof(DownStage), gate_up, h, dx, w, N, C, F);
}
static void mlp_backward_wgmma(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int N, int C, int F) {
    typedef DownTiles Tiles;
    assert(C % 8 == 0 && F % 8 == 0);
    launch(swiglu_down_backward_kernel3, product_blocks(N, Tiles::ROWS, F, Tiles::COLUMNS), WGMMA_THREADS,
           sizeof(Tiles), gate_up, h, rows_map(dx, N, C, Tiles::ROWS), rows_map(w, C, F, Tiles::DEPTH), N, C,
           F);
}

// The bf16 kernels that differ between devices: by compute capability, the last row that is not above it and
// whose wgmma the code has. mma.sync is all that 8.x and 12.x have, but 0.62 of the tensor cores' rate on
// 9.0: without wgmma, cuBLASLt and a pass over its result are faster there (dev/SPEED.md 6), and on 10.x too,
// we assume. --mlp overrides the table.
typedef void MlpForward(bf16 *, bf16 *, const bf16 *, const bf16 *, int, int, int);
typedef void AttentionForward(bf16 *, float *, const bf16 *, const int *, int, int, int, int, int);
typedef void AttentionBackward(bf16 *, const bf16 *, const bf16 *, const bf16 *, const float *, const int *,
                               int, int, int, int, int);
typedef struct Kernels {
    int capability, wgmma;
    MlpForward *mlp_forward, *mlp_backward;
    AttentionForward *attention_forward;
    AttentionBackward *attention_backward;
} Kernels;
static const Kernels kernel_table[] = {
    {80, 0, mlp_forward_products, mlp_backward_products, attention_forward_mma, attention_backward_mma},
    {90, 0, mlp_forward_passes<bf16>, mlp_backward_passes<bf16>, attention_forward_mma,
     attention_backward_mma},
    {90, 1, mlp_forward_wgmma, mlp_backward_wgmma, attention_forward_wgmma, attention_backward_wgmma},
    {120, 0, mlp_forward_products, mlp_backward_products, attention_forward_mma, attention_backward_mma},
};
static Kernels kernels;

static void choose_kernels(int capability) {
    for (const Kernels &row : kernel_table)
        if (row.capability <= capability && row.wgmma <= has_wgmma()) kernels = row;
    if (opt.mlp == MLP_PASSES)
        kernels.mlp_forward = mlp_forward_passes<bf16>, kernels.mlp_backward = mlp_backward_passes<bf16>;
    if (opt.mlp == MLP_PRODUCTS && !kernels.wgmma)
        kernels.mlp_forward = mlp_forward_products, kernels.mlp_backward = mlp_backward_products;
}

static void attention_forward(float *out, float *lse, const float *qkv, const int *doc_start, int B, int T,
                              int H, int K, int D) {
    attention_forward_f32(out, lse, qkv, doc_start, B, T, H, K, D);
}
static void attention_forward(bf16 *out, float *lse, const bf16 *qkv, const int *doc_start, int B, int T,
                              int H, int K, int D) {
    kernels.attention_forward(out, lse, qkv, doc_start, B, T, H, K, D);
}
static void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out,
                               const float *lse, const int *doc_start, int B, int T, int H, int K, int D) {
    attention_backward_f32(dqkv, dout, qkv, out, lse, doc_start, B, T, H, K, D);
}
static void attention_backward(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const bf16 *out,
                               const float *lse, const int *doc_start, int B, int T, int H, int K, int D) {
    kernels.attention_backward(dqkv, dout, qkv, out, lse, doc_start, B, T, H, K, D);
}
// As mlp_forward_passes and mlp_backward_passes
static void mlp_forward(float *h, float *gate_up, const float *x, const float *w, int N, int C, int F) {
    mlp_forward_passes(h, gate_up, x, w, N, C, F);
}
static void mlp_forward(bf16 *h, bf16 *gate_up, const bf16 *x, const bf16 *w, int N, int C, int F) {
    kernels.mlp_forward(h, gate_up, x, w, N, C, F);
}
static void mlp_backward_gate_up(float *gate_up, float *h, const float *dx, const float *w, int N, int C,
                                 int F) {
    mlp_backward_passes(gate_up, h, dx, w, N, C, F);
}
static void mlp_backward_gate_up(bf16 *gate_up, bf16 *h, const bf16 *dx, const bf16 *w, int N, int C, int F) {
    kernels.mlp_backward(gate_up, h, dx, w, N, C, F);
}

// ---- cross_entropy_kernel3: a block per row, the row stays in shared memory -------------------------------
// nll (N) = log(sum_v e^x_v) - x_target, 0 where the target is IGNORED.  weight (N) = d objective / d nll of
// each row: the logits x (N,Vp) become the objective's gradient weight (softmax - onehot), 0 where ignored;
// weight NULL: losses only. Columns V..Vp-1 are padding: no part of the softmax, gradient 0.
// is_top (N), unless NULL: 1 where no logit of the row is above the target's, 0 where ignored.
// bytes   2·N·Vp in + 2·N·Vp out = 2.10 GB for N 16384, V 32000
//         floor 626 us (memory; two SFU operations per element: 283 us)
// idea    asynchronous copies put the whole row in flight (64 KB for V 32000: three blocks per SM); each
//         thread reads back only what it copied and has its own maximum and sum, so the block meets at one
//         barrier. It also orders the read of x_target before any write. What does not fit (V 151,936: a
//         quarter of the row) is read a second time, and the block, then alone on its SM, has twice the
//         threads
// limits  Vp % 8 == 0 (fp32: 4)
// variants dev/cross_entropy.cu: 0 a thread per row, 1 a block per row, three walks, 2 two walks, 3 this
enum { CLASSIFIER_THREADS = 512 };

// Columns v.. of a row in fp32; padding becomes -inf: e^-inf = 0 is both its share of the sum and its
// gradient.
template <int E, typename floatX>
__device__ __forceinline__ void load_logits(float (&x)[E], const floatX *row, int v, int V) {
    widen(x, load<E>(row + v));
    if (v + E > V) for (int k = 0; k < E; k++) if (v + k >= V) x[k] = -INFINITY;
}

template <typename floatX>
__global__ void __launch_bounds__(2 * CLASSIFIER_THREADS) cross_entropy_kernel3(float *nll, uint8_t *is_top,
        floatX *logits, const int *targets, const double *weight, int V, int Vp, int cached) {
    constexpr int E = 16 / sizeof(floatX);
    __shared__ float tops[32], sums[32];
    // the first `cached` columns; the others in place
    floatX *cache = shared_memory<floatX>(), *row = logits + (size_t)blockIdx.x * Vp;
    const int target = targets[blockIdx.x], lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int first = threadIdx.x * E, step = blockDim.x * E;
    if (target == IGNORED) {
        if (threadIdx.x == 0) nll[blockIdx.x] = 0;
        if (threadIdx.x == 0 && is_top) is_top[blockIdx.x] = 0;
        if (weight) for (int v = first; v < Vp; v += step) store(row + v, Pack<floatX, E>{});
        return;
    }
    for (int v = first; v < cached; v += step) cp_async_16(cache + v, row + v);
    cp_async_commit();
    const float x_target = threadIdx.x == 0 ? to_float(row[target]) : 0;
    cp_async_wait<0>();
    float top = -FLT_MAX, sum = 0;                          // of this thread's columns: sum of e^(x - top)
    auto add = [&](const floatX *from, int v) {
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
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(total) + row_top - x_target;
    if (threadIdx.x == 0 && is_top) is_top[blockIdx.x] = x_target >= row_top;
    if (!weight) return;
    const float weight_n = (float)weight[blockIdx.x], factor = weight_n / total;
    auto differentiate = [&](const floatX *from, int v) {
        float x[E];
        load_logits(x, from, v, V);
        for (int k = 0; k < E; k++) x[k] = exp_approx(x[k] - row_top) * factor;
        if (v <= target && target < v + E) for (int k = 0; k < E; k++) if (v + k == target) x[k] -= weight_n;
        store(row + v, narrow<floatX>(x));
    };
    v = first;
    for (; v < cached; v += step) differentiate(cache, v);
    for (; v < Vp; v += step) differentiate(row, v);
}

template <typename floatX>
void cross_entropy(float *nll, uint8_t *is_top, floatX *logits, const int *targets, const double *weight,
                   int N, int V, int Vp) {
    static int shared_limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
    const int E = 16 / sizeof(floatX), cached = min(Vp, shared_limit / 16 * E);
    const int threads = min(CEIL_DIV(Vp, 32 * E) * 32, CLASSIFIER_THREADS * (cached < Vp ? 2 : 1));
    assert(Vp % E == 0 && V <= Vp);
    launch(cross_entropy_kernel3<floatX>, N, threads, cached * sizeof(floatX), nll, is_top, logits, targets,
           weight, V, Vp, cached);
}

// ---- sum_of_squares_kernel2: global norm ------------------------------------------------------------------
// out (1) += sum of x (n)^2, in double; not finite if any x is not (or beyond 1e19)
// bytes   4·n in;  1 G gradients: 4 GB, floor 1.2 ms (memory)
// idea    16 products are added in fp32, then in double; the blocks' sums by add_sum
// limits  n % 4 == 0, x aligned to 16 bytes
// variants dev/global_norm.cu: 0 one block, 1 many blocks, each square in double, 2 this
enum { SQUARES_BLOCKS = 1024, SQUARES_THREADS = 256 };

__global__ void sum_of_squares_kernel2(double *partials, const float *x, size_t n) {
    const size_t quads = n / 4, step = (size_t)gridDim.x * SQUARES_THREADS * 4;
    double sum = 0;
    for (size_t i0 = (size_t)blockIdx.x * SQUARES_THREADS * 4 + threadIdx.x; i0 < quads; i0 += step) {
        float squares = 0, q[4][4];
        for (int j = 0; j < 4; j++) {
            const size_t i = i0 + j * SQUARES_THREADS;
            widen(q[j], load_if<4>(i < quads, x + 4 * i));
        }
        for (int j = 0; j < 4; j++)
            squares += (q[j][0] * q[j][0] + q[j][1] * q[j][1]) + (q[j][2] * q[j][2] + q[j][3] * q[j][3]);
        sum += squares;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

void sum_of_squares(double *out, const float *x, size_t n) {
    const int blocks = (int)min(CEIL_DIV(n, (size_t)SQUARES_THREADS * 16), (size_t)SQUARES_BLOCKS);
    double *partials = (double *)gpu.scratch;
    assert(n % 4 == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)partials % 8 == 0);
    launch(sum_of_squares_kernel2, blocks, SQUARES_THREADS, 0, partials, x, n);
    add_sum(out, (const double *)partials, NULL, blocks);
}

// ---- adamw_update_kernel2: four parameters per thread -----------------------------------------------------
// AdamW (Loshchilov & Hutter 2019), decoupled decay:
//   g = grad gscale,  m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,
//   master = master shrink - rate m / (sqrt(v vscale) + eps)
//   with shrink = 1 - lr decay, rate = lr / (1-b1^step), vscale = 1 / (1-b2^step).
// master, m, v (n) are updated, w (n) = master rounded to floatX (fp32: may be master itself). floatM = float
// or bf16 stores m and v; bf16 ones are rounded at random with the bits of (key, first + i), i in the n: to
// the nearest, v would stand still where 1 - b2 is below half a unit in the last place.
// bytes   per parameter 4 (grad) + 8 (master) + 16 (m, v; bf16: 8) + 2 (w) = 30 (22);  1 G: 9.0 ms (6.6 ms)
// limits  n % 4 == 0, all aligned to 4 elements
// variants dev/adamw.cu: 0 a parameter per thread, 1 eight, 2 this
typedef struct AdamW { float b1, b2, eps, rate, vscale, shrink, gscale; uint32_t key; size_t first; } AdamW;

// x, finite, rounded to one of its two neighbours in bf16 by 16 random bits, with probabilities such that the
// mean is x.
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

// Parameter i of the n. m and v come back as numbers that floatM holds exactly.
template <typename floatM>
__device__ __forceinline__ void adamw_step(float &master, float &m, float &v, float grad, const AdamW &a,
                                           size_t i) {
    const float g = grad * a.gscale;
    m = a.b1 * m + (1 - a.b1) * g;
    v = a.b2 * v + (1 - a.b2) * g * g;
    master = master * a.shrink - a.rate * m / (sqrtf(v * a.vscale) + a.eps);
    if constexpr (sizeof(floatM) == 2) {
        const uint32_t random = update_bits(a.key, a.first + i);
        m = round_bf16_randomly(m, random), v = round_bf16_randomly(v, random >> 16);
    }
}

template <typename floatX, typename floatM>
__global__ void adamw_update_kernel2(floatX *w, float *master, floatM *m, floatM *v, const float *grad,
                                     size_t n, AdamW a) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float grad_i[4], master_i[4], m_i[4], v_i[4];
    widen(grad_i, load<4>(grad + i));
    widen(master_i, load<4>(master + i));
    widen(m_i, load<4>(m + i));
    widen(v_i, load<4>(v + i));
    for (int k = 0; k < 4; k++) adamw_step<floatM>(master_i[k], m_i[k], v_i[k], grad_i[k], a, i + k);
    store(master + i, narrow<float>(master_i));
    store(m + i, narrow<floatM>(m_i));
    store(v + i, narrow<floatM>(v_i));
    if ((const void *)w != (const void *)master) store(w + i, narrow<floatX>(master_i));
}

template <typename floatX, typename floatM>
void adamw_update(floatX *w, float *master, floatM *m, floatM *v, const float *grad, size_t n, double lr,
                  double beta1, double beta2, double eps, double decay, double grad_scale, int64_t step,
                  uint32_t key,
                  size_t first) {
    const AdamW a = {(float)beta1, (float)beta2, (float)eps, (float)(lr / (1 - pow(beta1, (double)step))),
                     (float)(1 / (1 - pow(beta2, (double)step))), (float)(1 - lr * decay), (float)grad_scale,
                     key, first};
    assert(n % 4 == 0 && ((uintptr_t)master | (uintptr_t)grad) % 16 == 0);
    assert((uintptr_t)w % (4 * sizeof(floatX)) == 0);
    assert(((uintptr_t)m | (uintptr_t)v) % (4 * sizeof(floatM)) == 0);
    launch(adamw_update_kernel2<floatX, floatM>, (unsigned)CEIL_DIV(n, 4 * 256), 256, 0, w, master, m, v,
           grad, n, a);
}

// ---- convert_kernel1: gradients on their way between ranks ------------------------------------------------
// to (n) = from (n), rounded to T; ADD: +=. On the stream of communication
// bytes   n·(4 + 2); a unit of 80 M: 480 MB, 0.14 ms of an H100's memory under the products of the next unit
// limits  n % 4 == 0, both aligned to 4 elements
template <int ADD, typename T, typename From>
__global__ void convert_kernel1(T *to, const From *from, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float x[4];
    widen(x, load<4>(from + i));
    if constexpr (ADD) accumulate(x, to + i);
    store(to + i, narrow<T>(x));
}

template <int ADD, typename T, typename From> void convert(T *to, const From *from, size_t n) {
    assert(n % 4 == 0);
    launch_on(gpu.comm_stream, convert_kernel1<ADD, T, From>, (unsigned)CEIL_DIV(n, 4 * 256), 256, 0, to,
              from, n);
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
// What backward needs of one layer. --recompute mlp: all layers share one gate_up; block: one of everything
// but x. Without training they share one of everything and use two x in turn. kv is each layer's own.
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
    floatX *kv;                         // (S,2KD)      samples: keys and values of the text so far
};

// A batch on the device, and its rows sorted by token.
typedef struct Feed {
    int B, T, past, keep, n_distinct;
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
    // Flat: of all units, (p.n), or this rank's shares of them, (p.n / S): master, m and v from ZeRO 1 on,
    // gradients from 2 on, weights with 3. In fp32 the weights are their own master.
    float *grads, *master;
    void *m, *v;                        // float or bf16
    float *whole_grads;                 // (slots_size) shared units, whole while they are used
    bf16 *wire;                         // --reduce-dtype bf16: a unit's gradients on their way
    // (n_units) weights are gathered, or will be by these events of gpu.comm_stream; 2: gpu.stream has waited
    uint8_t *is_whole;
    cudaEvent_t *gathered, *reduced;
    float *nll;                         // (N_chunks*chunk) loss of each target
    uint8_t *is_top;                    // (N)          whether it is the likeliest token; of losses only
    float *cosine, *sine;               // (T,D/2)
    double *sums;                       // (n_tensors + 1) on the device: loss, squares of gradients
    Feed feed;                          // the batch of the last llama_forward
    // (6N+1)       of a Feed's arrays: one after the other, the same on both
    int *feed_host, *feed_device;
    double *weight_host, *weight;       // (N)          of targets
    cudaEvent_t fed, weighed;           // the last copy of either has left the host
    int *kept, n_kept;                  // (S) tokens whose keys and values are in kv
    Arena arena[N_ARENAS];
};

template <typename floatX> struct ModelOf : Model {
    floatX *weights, *whole_weights;    // as grads and whole_grads
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

// The part of unit u whose optimizer state this rank holds: its elements [*first, *first + *n).
void state_share(const Model *m, int u, size_t *first, size_t *n) {
    *n = m->p.units[u].n_padded / m->plan.shard;
    *first = *n * (m->plan.rank % m->plan.shard);
}

// x of this rank's part of unit u, in a flat buffer of shares or of units
template <typename T> static T *own(const Model *m, T *x, int of_shares, int u) {
    size_t first, n;
    state_share(m, u, &first, &n);
    return x + (of_shares ? m->p.units[u].at / m->plan.shard : m->p.units[u].at + first);
}
template <typename floatX> static floatX *own_weights(const ModelOf<floatX> *m, int u) {
    return own(m, m->weights, m->plan.zero == 3, u);
}
static float *own_grads(const Model *m, int u) { return own(m, m->grads, m->plan.zero >= 2, u); }

// Where unit u lies, whole
template <typename floatX> static floatX *unit_weights(const ModelOf<floatX> *m, int u) {
    return m->plan.zero == 3 ? m->whole_weights + slot_at(&m->p, u) : m->weights + m->p.units[u].at;
}
static float *unit_grads(const Model *m, int u) {
    return m->plan.zero >= 2 ? m->whole_grads + slot_at(&m->p, u) : m->grads + m->p.units[u].at;
}
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
    const size_t n_state = n / plan->shard, slots = slots_size(&m->p);
    take(&m->arena[ARENA_WEIGHTS], &m->weights, plan->zero == 3 ? n_state : n);
    if (plan->zero == 3) take(&m->arena[ARENA_WEIGHTS], &m->whole_weights, slots);
    m->master = (float *)m->weights;
    if (plan->training) {
        const size_t state_bytes = n_state * (plan->bf16_state ? sizeof(bf16) : sizeof(float));
        take(&m->arena[ARENA_GRADIENTS], &m->grads, plan->zero >= 2 ? n_state : n);
        if (plan->zero >= 2) take(&m->arena[ARENA_GRADIENTS], &m->whole_grads, slots);
        Arena *o = &m->arena[ARENA_OPTIMIZER];
        take(o, (char **)&m->m, state_bytes);
        take(o, (char **)&m->v, state_bytes);
        if (plan->bf16) take(o, &m->master, n_state);
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
        take(a, &y->kv, plan->sample * 2 * KD);
    }
    take(a, &m->x_last, N * c->C);
    take(a, &m->rstd_last, N);
    Arena *w = &m->arena[ARENA_WORKSPACE];
    take(w, &m->norm, padded * c->C);
    take(w, &m->h, N * c->F);
    if (plan->training) {
        if (plan->ranks > 1 && opt.reduce_dtype == BF16) {
            size_t longest = 0;
            for (int u = 0; u < m->p.n_units; u++) longest = std::max(longest, m->p.units[u].n_padded);
            take(w, &m->wire, longest);
        }
        take(w, &m->dnorm, padded * c->C);
        take(w, &m->dx, N * c->C);
        take(w, &m->datt, N * HD);
        take(w, &m->dqkv, N * (HD + 2 * KD));
        // attention_backward's is the last: sums of parts, delta. With fewer SMs than these it has no more
        const int parts = plan->bf16 ? attention_parts(m->B, m->T, c->H, c->K, PARTS_SMS) : 1;
        take(w, &gpu.scratch, std::max({MAX_PARTIALS * (size_t)c->C, MAX_PARTIALS * (HD + 2 * KD),
                                        (size_t)2 * SQUARES_BLOCKS,
                                        part_sums(N, c->K, c->D, parts) + N * c->H}));
    }
    take(w, &m->logits, (size_t)m->chunk * c->Vp);
    take(w, &m->cosine, (size_t)m->T * c->D / 2);
    take(w, &m->sine, (size_t)m->T * c->D / 2);
    take(w, &m->nll, padded);
    take(w, &m->is_top, N);
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
    param_table_build(&m->p, c, plan->shard);
    const size_t n_units = m->p.n_units;
    m->is_whole = (uint8_t *)xcalloc(n_units, 1);
    m->gathered = (cudaEvent_t *)xcalloc(2 * n_units, sizeof(cudaEvent_t));
    m->reduced = m->gathered + n_units;
    m->kept = (int *)xcalloc((size_t)plan->sample, sizeof(int));
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
        if (i == ARENA_WEIGHTS
            || i == ARENA_OPTIMIZER) cudaCheck(cudaMemsetAsync(a->base, 0, bytes, gpu.stream));
    }
    with_precision(m, [](auto *m) { layout(m); });
    cudaCheck(cudaMemsetAsync(m->sums, 0, ((size_t)m->p.n_tensors + 1) * sizeof(double), gpu.stream));
    cudaCheck(cudaMallocHost((void **)&m->feed_host, ((size_t)6 * m->N + 1) * sizeof(int)));
    cudaCheck(cudaMallocHost((void **)&m->weight_host, (size_t)m->N * sizeof(double)));
    cudaCheck(cudaEventCreateWithFlags(&m->fed, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&m->weighed, cudaEventDisableTiming));
    for (int i = 0; i < 2 * m->p.n_units && m->plan.zero; i++)
        cudaCheck(cudaEventCreateWithFlags(&m->gathered[i], cudaEventDisableTiming));
    memset(m->is_whole, m->plan.zero < 3, (size_t)m->p.n_units);
    rope_table(m->cosine, m->sine, &m->c, m->T);
    if (!gpu.staging)
        cudaCheck(cudaMallocHost((void **)&gpu.staging, (size_t)IO_THREADS * IO_CHUNK * sizeof(float)));
}

// Frees what model_plan took; the GPU's memory goes with the process.
void model_free(Model *m) {
    with_precision(m, [](auto *m) { free(m->acts); });
    free(m->kept);
    free(m->is_whole);
    free(m->gathered);
    free(m->p.tensors);
    free(m->p.units);
    free(m);
}

// ---- units between ranks: ZeRO (Rajbhandari et al. 2020) --------------------------------------------------
// S ranks share one copy of the state, each unit in S equal parts: from ZeRO 1 on the optimizer's, from 2 on
// the gradients, with 3 the weights. Nothing but these verbs knows of it:
//     unit_gather(m, u, next)     before use: unit u's weights are whole; begins with the unit used next
//     grads_open(m, u)            before backward adds to unit u's gradients
//     unit_reduce(m, u, last)     after backward: begins to add them up over ranks; last: of an update
//     reduce_finish(m)            all sums are complete
// A shared unit is whole in its slot. The embedding and the head stay in theirs until the next update; layers
// have two in turn, so that a unit can be on its way while another is in use: to gather one releases the one
// before. All collectives run on gpu.comm_stream, in the order of these calls, which is that of all ranks.

// Whoever used its slot before is behind gpu.stream's present end.
template <typename floatX> static void gather_start(ModelOf<floatX> *m, int u) {
    if (m->is_whole[u]) return;
    for (int v = 0; v < m->p.n_units && m->plan.zero == 3; v++)
        if (slot_at(&m->p, v) == slot_at(&m->p, u)) m->is_whole[v] = 0;
    comm_follow();
    comm_all_gather(unit_weights(m, u), own_weights(m, u), m->p.units[u].n_padded / m->plan.shard,
                    m->p.units[u].name);
    cudaCheck(cudaEventRecord(m->gathered[u], gpu.comm_stream));
    m->is_whole[u] = 1;
}

template <typename floatX> static void unit_gather(ModelOf<floatX> *m, int u, int next) {
    if (!m->plan.zero) return;
    gather_start(m, u);
    gather_start(m, next);
    if (m->is_whole[u] == 1) comm_join(m->gathered[u]);
    m->is_whole[u] = 2;
}

// All weights are others than before. Those that stay whole are (ZeRO 1, 2: will be, in the order of their
// use) gathered at once.
static void weights_changed(Model *m) {
    memset(m->is_whole, m->plan.zero < 3, (size_t)m->p.n_units);
    m->n_kept = 0;
}

static void grads_open(Model *m, int u) {
    if (m->plan.zero < 2) return;
    for (int v = 0; v < m->p.n_units; v++)
        if (slot_at(&m->p, v) == slot_at(&m->p, u)) comm_join(m->reduced[v]);
    cudaCheck(cudaMemsetAsync(unit_grads(m, u), 0, m->p.units[u].n_padded * sizeof(float), gpu.stream));
}

// x (n), of unit u, = its sum over all ranks, or over the copies of this share, by way of the wire's type
static void sum_over_ranks(Model *m, int u, float *x, size_t n, int among_copies) {
    if (!m->wire) return comm_all_reduce(x, n, among_copies, m->p.units[u].name);
    convert<0>(m->wire, x, n);
    comm_all_reduce(m->wire, n, among_copies, m->p.units[u].name);
    convert<0>(x, m->wire, n);
}

static void unit_reduce(Model *m, int u, int last) {
    size_t first, n;
    float *x = unit_grads(m, u);
    if (m->plan.ranks == 1) return;
    if (m->plan.zero < 2 && !last) return;      // whole gradients add up here until then
    state_share(m, u, &first, &n);
    comm_follow();
    if (!m->plan.zero) return sum_over_ranks(m, u, x, n, /*among_copies=*/0);
    if (m->wire) {
        convert<0>(m->wire, x, n * m->plan.shard);
        comm_reduce_scatter(m->wire, n, m->p.units[u].name);
        if (m->plan.zero == 1) convert<0>(own_grads(m, u), m->wire + first, n);
        else convert<1>(own_grads(m, u), m->wire + first, n);
    } else {
        comm_reduce_scatter(x, n, m->p.units[u].name);
        if (m->plan.zero >= 2) convert<1>(own_grads(m, u), x + first, n);
    }
    cudaCheck(cudaEventRecord(m->reduced[u], gpu.comm_stream));
    if (last && m->plan.shard < m->plan.ranks) sum_over_ranks(m, u, own_grads(m, u), n, /*among_copies=*/1);
}

// gpu.stream goes on when all sums are complete.
void reduce_finish(Model *) { comm_join(NULL); }

// Unit u's weights or gradients are whole, for model_read; all ranks call it.
void model_gather(Model *m, int what, int u) {
    size_t first, n;
    with_precision(m, [&](auto *m) { unit_gather(m, u, u); });
    if (what != STATE_GRADS || !m->plan.zero) return;
    state_share(m, u, &first, &n);
    comm_follow();
    comm_all_gather(unit_grads(m, u), own_grads(m, u), n, m->p.units[u].name);
    comm_join(NULL);
}

// ---- weights and state ------------------------------------------------------------------------------------
// Threads convert at the same time, each in its part of gpu.staging; their copies take turns on gpu.stream,
// behind the kernels.
static void copy_staged(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    #pragma omp critical(copy_staged)
    {
        cudaCheck(cudaSetDevice(gpu.number));   // a thread begins with the first
        cudaCheck(cudaMemcpyAsync(to, from, bytes, kind, gpu.stream));
        device_wait();                          // has the time limit
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

// Element `at` of unit u in one kind of state: master, m and v only of this rank's share, weights and
// gradients of any that is whole.
typedef struct State { void *x; int bf16; size_t at; } State;
static State state_of(const Model *m, int what, int u, size_t at) {
    State s = {NULL, m->plan.bf16, at};
    size_t first, n;
    state_share(m, u, &first, &n);
    if (what == STATE_GRADS) s = {unit_grads(m, u), 0, at};
    else if (what == STATE_WEIGHTS) with_precision(m, [&](auto *m) { s.x = unit_weights(m, u); });
    else if (what == STATE_MASTER && !m->plan.bf16)
        with_precision(m, [&](auto *m) { s = {own_weights(m, u), 0, at - first}; });
    else {
        void *const by_kind[] = {NULL, m->master, m->m, m->v};
        s = {by_kind[what], what != STATE_MASTER && m->plan.bf16_state, 0};
        s.at = m->p.units[u].at / m->plan.shard + (at - first);
    }
    return s;
}

// Host access for checkpoints: elements [at, at+n) of unit u as fp32; of master, m and v those of this rank's
// share, of weights and gradients after model_gather.
void model_read(const Model *m, int what, int u, size_t at, size_t n, float *host) {
    const State s = state_of(m, what, u, at);
    if (s.bf16) copy_to_host((bf16 *)s.x + s.at, n, host);
    else copy_to_host((float *)s.x + s.at, n, host);
}

static void write_state(const State &s, size_t n, const float *host) {
    if (s.bf16) copy_from_host((bf16 *)s.x + s.at, n, host);
    else copy_from_host((float *)s.x + s.at, n, host);
}

// Weights go to the master too, so that nothing is lost on the way through bf16; of it, and of shared
// weights, what is not in this rank's share is left out.
void model_write(Model *m, int what, int u, size_t at, size_t n, const float *host) {
    size_t first, share;
    state_share(m, u, &first, &share);
    const size_t begin = std::max(at, first), end = std::min(at + n, first + share);
    if (what != STATE_WEIGHTS || m->plan.zero < 3) write_state(state_of(m, what, u, at), n, host);
    if (what != STATE_WEIGHTS || begin >= end) return;
    if (m->plan.zero == 3) with_precision(m, [&](auto *m) {
        copy_from_host(own_weights(m, u) + (begin - first), end - begin, host + (begin - at));
    });
    if (m->plan.bf16 && m->plan.training)
        write_state(state_of(m, STATE_MASTER, u, begin), end - begin, host + (begin - at));
}

float *model_floats(const Model *, int, int, size_t) { return NULL; }

// Starts to copy elements as they lie there to `host`, pinned, if that is in bf16 (bf16: wanted) or fp32;
// device_wait ends it. 0: not done, they lie there in another form.
int model_copy_start(const Model *m, int what, int u, size_t at, size_t n, int wants_bf16, void *host) {
    const State s = state_of(m, what, u, at);
    const size_t size = s.bf16 ? sizeof(bf16) : sizeof(float);
    if (s.bf16 != wants_bf16) return 0;
    const char *from = (const char *)s.x + s.at * size;
    #pragma omp critical(copy_staged)
    {
        cudaCheck(cudaSetDevice(gpu.number));
        cudaCheck(cudaMemcpyAsync(host, from, n * size, cudaMemcpyDeviceToHost, gpu.stream));
    }
    return 1;
}

void model_set_master(Model *m) { weights_changed(m); }     // model_write has written it

// ---- data to the device -----------------------------------------------------------------------------------
static Feed feed_at(int *x, size_t N) {
    return {0, 0, 0, 0, 0, x, x + N, x + 2 * N, x + 3 * N, x + 4 * N, x + 5 * N};
}

// Copies a batch to the device and sorts its rows by token (for the embedding). The next call waits for this
// copy alone, so the device computes with one batch while the host prepares the next.
static Feed feed_batch(Model *m, const Batch *batch) {
    const size_t N = m->N, rows = (size_t)batch->B * batch->T, bytes = rows * sizeof(int);
    assert(rows <= N);
    const Feed host = feed_at(m->feed_host, N);
    Feed f = feed_at(m->feed_device, N);
    f.B = batch->B, f.T = batch->T, f.past = batch->past, f.keep = batch->keep;
    if (!batch->doc_start) f.doc_start = NULL;
    gpu_wait(m->fed);
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
    gpu_wait(m->weighed);
    memcpy(m->weight_host, weight, bytes);
    cudaCheck(cudaMemcpyAsync(m->weight, m->weight_host, bytes, cudaMemcpyHostToDevice, gpu.stream));
    cudaCheck(cudaEventRecord(m->weighed, gpu.stream));
}

// ---- forward ----------------------------------------------------------------------------------------------
// q | k | v = norm1(x) Wqkv^T + bias;  q, k = rope(qk_norm(q, k));  x_mid = x + attention(q, k, v) Wo^T.
// y->rstd1, qkv, att, lse, x_mid =; for Qwen3 qk_raw, qk_rstd. Samples: positions begin at batch->past
template <typename floatX>
static void attention_block_forward(ModelOf<floatX> *m, const LayerParams<floatX> *w, LayerActs<floatX> *y,
                                    const Feed *batch) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, HD = c->H * c->D, W = HD + 2 * c->K * c->D;
    rmsnorm_forward(m->norm, y->rstd1, y->x, w->norm1, c->eps, N, c->C);
    matmul_forward(y->qkv, m->norm, w->qkv, N, c->C, W, NULL, w->qkv_bias);
    const size_t angles = (size_t)batch->past * (c->D / 2), kept = (size_t)batch->past * 2 * c->K * c->D;
    qk_norm_rope_forward(y->qkv, y->qk_raw, y->qk_rstd, w->q_norm, w->k_norm, m->cosine + angles,
                         m->sine + angles, c->eps, c->H, c->K, c->D, N, batch->T);
    if (batch->keep) keep_keys_values(y->kv + kept, y->qkv, batch->keep, c->H, c->K, c->D);
    if (batch->past) attention_decode(y->att, y->kv, y->qkv, batch->past, batch->T, c->H, c->K, c->D);
    else attention_forward(y->att, y->lse, y->qkv, batch->doc_start, batch->B, batch->T, c->H, c->K, c->D);
    matmul_forward(y->x_mid, y->att, w->o, N, HD, c->C, y->x, NULL);
}

// Runs all layers on the batch's inputs; leaves the final norm's output (N,C) in m->norm.
template <typename floatX> void llama_forward(ModelOf<floatX> *m, const Feed *batch) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, head = UNIT_LAYER + c->L;
    unit_gather(m, UNIT_EMBED, UNIT_LAYER);
    embedding_forward(m->acts[0].x, batch->inputs, batch->order, unit_weights(m, UNIT_EMBED), N, c->C);
    for (int l = 0; l < c->L; l++) {
        unit_gather(m, UNIT_LAYER + l, UNIT_LAYER + l + 1);
        const LayerParams<floatX> w = layer_params(unit_weights(m, UNIT_LAYER + l), &m->p, l);
        LayerActs<floatX> *y = &m->acts[l];
        floatX *x_next = l + 1 < c->L ? m->acts[l + 1].x : m->x_last;
        attention_block_forward(m, &w, y, batch);
        rmsnorm_forward(m->norm, y->rstd2, y->x_mid, w.norm2, c->eps, N, c->C);
        mlp_forward(m->h, y->gate_up, m->norm, w.gate_up, N, c->C, c->F);
        matmul_forward(x_next, m->h, w.down, N, c->F, c->C, y->x_mid, NULL);
    }
    unit_gather(m, head, head);
    rmsnorm_forward(m->norm, m->rstd_last, m->x_last, head_weights(m).norm, c->eps, N, c->C);
}

void llama_forward(Model *model, const Batch *batch) {
    model->feed = feed_batch(model, batch);
    with_precision(model, [&](auto *m) { llama_forward(m, &m->feed); });
}

// ---- head and loss ----------------------------------------------------------------------------------------
// Loss of each target into m->nll; their sum goes to what model_loss returns, each times its weight. weight
// (N) = d objective / d nll: also m->dnorm (N,C) = gradient of the final norm's output, and the head's
// gradient +=. weight NULL: losses, and m->is_top. Logits exist for `chunk` rows at a time, so that one shape
// of matmul serves every chunk. Rows beyond N are zero in norm and in the logits' gradient: stale bits
// (perhaps NaN) times zero would reach the head's gradient.
template <typename floatX> void llama_head(ModelOf<floatX> *m, const Feed *batch, const double *weight) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T;
    const floatX *head = head_weights(m).head;
    if (weight) grads_open(m, UNIT_LAYER + c->L);
    if (weight) grads_open(m, UNIT_EMBED);
    for (int n = 0; n < N; n += m->chunk) {
        const int rows = N - n < m->chunk ? N - n : m->chunk;
        floatX *norm = m->norm + (size_t)n * c->C;
        const size_t rest = m->chunk - rows;
        part_begin(PART_FORWARD);
        cudaCheck(cudaMemsetAsync(norm + (size_t)rows * c->C, 0, rest * c->C * sizeof(floatX), gpu.stream));
        matmul_forward(m->logits, norm, head, m->chunk, c->C, c->Vp, NULL, NULL);
        cross_entropy(m->nll + n, weight ? NULL : m->is_top + n, m->logits, batch->targets + n,
                      weight ? weight + n : NULL, rows, c->V, c->Vp);
        if (!weight) continue;
        part_begin(PART_BACKWARD);
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

// nll (n) = the losses of the first n rows that the last llama_head had; waits for the GPU, so that the
// staging of weights is free.
void model_losses(Model *m, double *nll, int n) {
    float *staging = (float *)m->weight_host;
    device_wait();
    const size_t bytes = (size_t)n * sizeof(float);
    cudaCheck(cudaMemcpyAsync(staging, m->nll, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    cudaCheck(cudaStreamSynchronize(gpu.stream));
    for (int i = 0; i < n; i++) nll[i] = staging[i];
}

// is_top (n) = of the first n rows that the last llama_head had, which was one without weights.
void model_tops(Model *m, uint8_t *is_top, int n) {
    device_wait();
    cudaCheck(cudaMemcpyAsync(is_top, m->is_top, (size_t)n, cudaMemcpyDeviceToHost, gpu.stream));
    cudaCheck(cudaStreamSynchronize(gpu.stream));
}

// Logits (V) of the token after ids (n), n <= T, as fp32 on the host. Of a text that is one token longer than
// what the last call saw only that token runs: keys and values of the others are there. Else, and beyond S,
// the text runs as a whole, as a power of two of rows: few shapes of matrix products. (What comes after the
// last id does not matter.)
void next_logits(Model *model, const int *ids, int n, float *logits) {
    const int keep = n <= model->plan.sample;
    Batch b = {};
    while (keep && b.past < model->n_kept && b.past < n - 1 && model->kept[b.past] == ids[b.past]) b.past++;
    if (b.past < n - 1) b.past = 0;
    model->n_kept = keep ? n : 0;
    if (keep) memcpy(model->kept, ids, (size_t)n * sizeof(int));
    const int fresh = n - b.past;
    b.B = b.T = 1;
    while (b.T < fresh) b.T *= 2;
    if (b.T > model->T) b.T = model->T;
    b.keep = keep ? fresh : 0;
    b.inputs = (int *)xcalloc((size_t)b.T, sizeof(int));
    memcpy(b.inputs, ids + b.past, (size_t)fresh * sizeof(int));
    llama_forward(model, &b);
    free(b.inputs);
    with_precision(model, [&](auto *m) {
        const auto *last = m->norm + (size_t)(fresh - 1) * m->c.C;
        matmul_forward(m->logits, last, head_weights(m).head, 1, m->c.C, m->c.Vp, NULL, NULL);
        copy_to_host(m->logits, (size_t)m->c.V, logits);
    });
}

// ---- backward ---------------------------------------------------------------------------------------------
// From m->dnorm, which llama_head left, to the gradients of all parameters, +=. last: of an update's
// micro-steps.
template <typename floatX> void llama_backward(ModelOf<floatX> *m, const Feed *batch, int last) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, C = c->C, F = c->F, HD = c->H * c->D, W = HD + 2 * c->K * c->D;
    floatX *none = NULL;
    assert(batch->B == m->B && batch->T == m->T);           // which attention's scratch was laid out for
    cudaCheck(cudaMemsetAsync(m->dx, 0, (size_t)N * C * sizeof(floatX), gpu.stream));
    rmsnorm_backward(m->dx, head_grads(m).norm, none, m->dnorm, m->x_last, m->rstd_last, head_weights(m).norm,
                     N, C);
    unit_reduce(m, UNIT_LAYER + c->L, last);
    for (int l = c->L - 1; l >= 0; l--) {
        unit_gather(m, UNIT_LAYER + l, l ? UNIT_LAYER + l - 1 : UNIT_LAYER);
        grads_open(m, UNIT_LAYER + l);
        const LayerParams<floatX> w = layer_params(unit_weights(m, UNIT_LAYER + l), &m->p, l);
        const LayerParams<float> dw = layer_params(unit_grads(m, UNIT_LAYER + l), &m->p, l);
        LayerActs<floatX> *y = &m->acts[l];
        // the shared buffers still hold what the last layer's forward wrote
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
        unit_reduce(m, UNIT_LAYER + l, last);
    }
    embedding_backward(unit_grads(m, UNIT_EMBED), batch->order, batch->starts, batch->tokens,
                       batch->n_distinct, m->dx, N, C);
    unit_reduce(m, UNIT_EMBED, last);
}

void llama_backward(Model *model, const Batch *, int last) {
    with_precision(model, [&](auto *m) { llama_backward(m, &m->feed, last); });
}

// ---- update -----------------------------------------------------------------------------------------------
void model_zero_grads(Model *m) {
    const size_t n = m->plan.zero >= 2 ? m->p.n / m->plan.shard : m->p.n;
    cudaCheck(cudaMemsetAsync(m->grads, 0, n * sizeof(float), gpu.stream));
}

// The part of a tensor that lies in this rank's share of its unit: the unit's elements [*at, *at + n); n.
static size_t own_part(const Model *m, const Tensor *t, size_t *at) {
    size_t first, n;
    state_share(m, t->unit, &first, &n);
    *at = t->at > first ? t->at : first;
    const size_t end = min_size(t->at + t->n, first + n);
    return end > *at ? end - *at : 0;
}

// Global L2 norm of the gradients; not finite: *bad names the first tensor at fault and *n_bad counts them.
double gradient_norm(Model *m, const char **bad, int *n_bad) {
    const int n = m->p.n_tensors, is_copy = m->plan.rank >= m->plan.shard;
    double total = 0, *squares = (double *)xmalloc((size_t)n * sizeof(double));
    for (int i = 0; i < n && !(m->plan.zero && is_copy); i++) {
        const Tensor *t = &m->p.tensors[i];
        size_t at, first, share, k = own_part(m, t, &at);
        state_share(m, t->unit, &first, &share);
        if (k) sum_of_squares(m->sums + 1 + i, own_grads(m, t->unit) + (at - first), k);
    }
    take_sums(m, 1, n, squares);
    if (m->plan.zero) comm_sum(squares, n);
    *bad = NULL;
    *n_bad = 0;
    for (int i = 0; i < n; i++) {
        if (!isfinite(squares[i]) && !(*n_bad)++) *bad = m->p.tensors[i].name;
        total += squares[i];
    }
    free(squares);
    return sqrt(total);
}

// Each rank updates its shares; weights that it has whole are gathered at once, while the next are updated.
template <typename floatM, typename floatX>
static void update_units(ModelOf<floatX> *m, double lr, double grad_scale, int64_t step, const Options *o) {
    const uint32_t key = (uint32_t)random_bits((uint64_t)o->seed, hash_string("update"), (uint64_t)step);
    for (int u = 0; u < m->p.n_units; u++) {
        const Tensor *t = m->p.tensors + m->p.units[u].first_tensor, *end = t + m->p.units[u].n_tensors;
        size_t first, share;
        state_share(m, u, &first, &share);
        for (; t < end; t++) {
            size_t at, n = own_part(m, t, &at);
            if (!n) continue;
            const State master = state_of(m, STATE_MASTER, u, at);
            const size_t i = m->p.units[u].at / m->plan.shard + (at - first);       // place among the shares
            adamw_update(own_weights(m, u) + (at - first), (float *)master.x + master.at, (floatM *)m->m + i,
                         (floatM *)m->v + i, own_grads(m, u) + (at - first), n, lr, o->beta1, o->beta2,
                         o->eps, t->decay ? o->weight_decay : 0, grad_scale, step, key,
                         m->p.units[u].at + at);
        }
        m->is_whole[u] = 0;
        if (m->plan.zero == 1 || m->plan.zero == 2) gather_start(m, u);
    }
    weights_changed(m);
}

// One AdamW update with gradients * grad_scale (clipping); step counts from 1.
void model_update(Model *model, double lr, double grad_scale, int64_t step, const Options *o) {
    with_precision(model, [&](auto *m) {
        if (m->plan.bf16_state) update_units<bf16>(m, lr, grad_scale, step, o);
        else update_units<float>(m, lr, grad_scale, step, o);
    });
}

// SHARED BEGIN
// ==== 5. Objectives: what is trained, as a loss and a weight per target ====================================
// Every target t of a micro-step has a loss nll_t = -log p(target). An objective says with what weight each
// enters the update: weight_t = d objective / d nll_t. Everything before (forward) and after (backward) is
// the same for all objectives. What the update's means are divided by is known before the first backward,
// over all micro-steps and ranks, so that it does not matter how rows are split.
enum { MASS_TARGETS, MASS_PAIRS, MASS_CHOSEN, N_MASSES };   // CHOSEN: targets in chosen answers
// sums over pairs, but for the loss of chosen answers, which is one over their targets
enum { DPO_LOSS, REWARDS_CHOSEN, REWARDS_REJECTED, REWARDS_MARGINS, REWARDS_ACCURACIES, LOGPS_CHOSEN,
       LOGPS_REJECTED, SFT_LOSS, DPO_Z, N_SUMS };           // Z: z of dpo_loss

typedef struct Objective {
    const char *name;
    int from_losses;        // weigh needs nll: the head runs for the losses first, then with the weights
    // weight (N) =, the gradient; mass: of the whole update. nll (N). sums += what weights do not tell
    void (*weigh)(double *weight, const Batch *batch, const double *mass, const double *nll, double *sums);
} Objective;

// ---- documents: rows with flags and rows under the document mask hold several
// The next document of row b that has targets, from position *t of the row on. 0: there is none.
int next_document(const Batch *batch, int b, int *t, Document *d) {
    const int row = b * batch->T;
    while (*t < batch->T) {
        const int start = *t;
        d->first = row + start;
        d->n_targets = 0;
        do d->n_targets += batch->targets[row + *t] != IGNORED;
        while (++*t < batch->T && batch->doc_start[row + *t] == start);
        d->end = row + *t;
        if (d->n_targets) return 1;
    }
    return 0;
}

// A row's pairs lie one after the other, the chosen answer before the rejected one. 0: there is no further.
static int next_pair(const Batch *batch, int b, int *t, Document *chosen, Document *rejected) {
    return next_document(batch, b, t, chosen) && next_document(batch, b, t, rejected);
}

// mass += what a micro-step has.
static void add_mass(double *mass, const Batch *batch) {
    Document chosen, rejected;
    for (int i = 0; i < batch->B * batch->T; i++) mass[MASS_TARGETS] += batch->targets[i] != IGNORED;
    for (int b = 0; b < batch->B && batch->pairs; b++)
        for (int t = 0; next_pair(batch, b, &t, &chosen, &rejected);) {
            mass[MASS_PAIRS]++;
            mass[MASS_CHOSEN] += chosen.n_targets;
        }
}

// ---- next tokens (pretrain) and answers (sft): the mean over all targets of the update
static void weigh_targets(double *weight, const Batch *batch, const double *mass, const double *nll,
                          double *sums) {
    (void)nll, (void)sums;
    for (int i = 0; i < batch->B * batch->T; i++)
        weight[i] = batch->targets[i] == IGNORED ? 0 : 1 / mass[MASS_TARGETS];
}

// ---- preferences (dpo: Rafailov et al. 2023): the mean over all pairs of the update
static double log_sigmoid(double z) { return z < 0 ? z - log1p(exp(z)) : -log1p(exp(-z)); }

static int dpo_per_token(const Options *o) { return o->dpo_loss == DPO_NORM || o->dpo_loss == DPO_IPO; }

// Loss of a pair, and its derivatives. c, r: log p of the chosen and the rejected answer, policy minus
// reference, sums over their n_c and n_r tokens. s = log sigmoid, b = --dpo-beta, e = --dpo-label-smoothing:
//   sigmoid  z = b (c - r):           -(1-e) s(z) - e s(-z)                 e > 0: conservative DPO
//   norm     z = b (c/n_c - r/n_r):   the same
//   robust   z = b (c - r):           (-(1-e) s(z) + e s(-z)) / (1 - 2e)    Chowdhury et al. 2024
//   ipo      (c/n_c - r/n_r - 1/(2b))^2                                     Azar et al. 2023
double dpo_loss(const Options *o, double c, int n_c, double r, int n_r, double *dc, double *dr) {
    const double u_c = dpo_per_token(o) ? 1.0 / n_c : 1, u_r = dpo_per_token(o) ? 1.0 / n_r : 1;
    const double b = o->dpo_beta, e = o->dpo_label_smoothing, d = c * u_c - r * u_r, z = b * d;
    const int robust = o->dpo_loss == DPO_ROBUST;
    const double flip = robust ? -e : e, scale = robust ? 1 - 2*e : 1;
    double loss = (-(1 - e) * log_sigmoid(z) - flip * log_sigmoid(-z)) / scale;
    // d loss / d d
    double slope = b * (flip * exp(log_sigmoid(z)) - (1 - e) * exp(log_sigmoid(-z))) / scale;
    if (o->dpo_loss == DPO_IPO) {
        slope = 2 * (d - 1 / (2 * b));
        loss = slope * slope / 4;
    }
    *dc = slope * u_c;
    *dr = -slope * u_r;
    return loss;
}

// log p of an answer: the sum in order. Rounded as the reference's are kept: then policy = reference gives
// 0 exactly.
static LogProb answer_log_prob(const double *nll, Document d) {
    double sum = 0;
    for (int i = d.first; i < d.end; i++) sum -= nll[i];
    return (LogProb)sum;
}

static void weigh_pairs(double *weight, const Batch *batch, const double *mass, const double *nll,
                        double *sums) {
    const double share = 1 / mass[MASS_PAIRS], sft = opt.dpo_sft_weight / mass[MASS_CHOSEN];
    Document chosen, rejected;
    memset(weight, 0, (size_t)batch->B * batch->T * sizeof(double));
    for (int b = 0; b < batch->B; b++) {
        const float *reference = batch->reference + (size_t)b * batch->pairs * 2;
        for (int t = 0; next_pair(batch, b, &t, &chosen, &rejected); reference += 2) {
            const LogProb lp_c = answer_log_prob(nll, chosen), lp_r = answer_log_prob(nll, rejected);
            const double c = (double)lp_c - reference[0], r = (double)lp_r - reference[1];
            double dc, dr;
            sums[DPO_LOSS] += dpo_loss(&opt, c, chosen.n_targets, r, rejected.n_targets, &dc, &dr);
            sums[REWARDS_CHOSEN] += opt.dpo_beta * c;
            sums[REWARDS_REJECTED] += opt.dpo_beta * r;
            sums[REWARDS_MARGINS] += opt.dpo_beta * (c - r);
            sums[REWARDS_ACCURACIES] += c > r;
            sums[DPO_Z] += opt.dpo_beta * (dpo_per_token(&opt) ? c / chosen.n_targets - r / rejected.n_targets
                                                               : c - r);
            sums[LOGPS_CHOSEN] += lp_c;
            sums[LOGPS_REJECTED] += lp_r;
            for (int i = chosen.first; i < chosen.end; i++) {
                if (batch->targets[i] == IGNORED) continue;
                weight[i] = sft - dc * share;               // nll = -log p
                sums[SFT_LOSS] += nll[i];
            }
            for (int i = rejected.first; i < rejected.end; i++)
                if (batch->targets[i] != IGNORED) weight[i] = -dr * share;
        }
    }
}

// The objective's mean over pairs from its sums and masses.
static double dpo_mean(const double *sums, const double *mass) {
    return sums[DPO_LOSS] / fmax(mass[MASS_PAIRS], 1)
         + opt.dpo_sft_weight * (sums[SFT_LOSS] / fmax(mass[MASS_CHOSEN], 1));
}

static const Objective objectives[] = {                     // by --stage
    {"pretrain", 0, weigh_targets}, {"sft", 0, weigh_targets}, {"dpo", 1, weigh_pairs}};

// ==== 6. Training: an update, looking, saving, set-up, main ================================================
// ---- what the plumbing (sections 8 to 16) offers ----------------------------------------------------------
typedef struct Json Json;
typedef struct StSet StSet;                             // the tensors of a checkpoint, for reading
typedef struct StWriter StWriter;                       // a safetensors file that is being written
enum { ST_F32, ST_BF16, ST_F16, ST_I32 };

// 8
uint32_t crc32_update(uint32_t crc, const void *data, size_t n);
char *read_text_file(const char *path, size_t max_bytes, size_t *n);
void options_parse_timeout(int argc, char **argv);
void options_parse(int argc, char **argv);
void options_text(Text *t);
void options_check(void);
void options_check_texts(void);
void options_help(void);
Option *option_find(const char *name);
void option_set(Option *o, const char *text);
int option_given(const char *name);
const char *option_text(const Option *o);
int profile_has(int64_t step);
int live_wanted(void);
void live_show(double done, const char *left, const char *right);
void live_end(void);
// 9, 10
void text_add(Text *t, const char *fmt, ...);
void text_add_string(Text *t, const char *s);
void text_add_field(Text *t, const char *key, double x);
const char *json_decimal(double x);
StWriter *st_create(const char *path, const char *metadata);
void st_declare(StWriter *w, const char *name, int dtype, int n_dims, const int64_t *shape);
void st_declare_table(StWriter *w, const ParamTable *p, int dtype);
void st_begin(StWriter *w);
size_t st_take(StWriter *w, size_t count);
void st_write_at(StWriter *w, size_t place, const float *values, size_t count);
void st_write(StWriter *w, const float *values, size_t count);
int st_finish(StWriter *w, uint32_t *crc, size_t *file_bytes);
uint32_t weights_crc(const char *dir);
// 11
char *config_to_json(const Config *c, const char *dtype);
const char *config_preset_names(void);
int config_preset(Config *c, const char *name);
void config_presets_help(void);                                 // --preset help
Config choose_config(const char *resume_dir);
Str config_arithmetic(const Config *c);
void config_check_reference(const Config *c, const char *dir);
void config_set_vocab(Config *c, int V);
double config_params(const Config *c);
// 12, 13
Tokenizer *tokenizer_choose(const Config *c, const char *model_dir);
int tokenizer_encode(const Tokenizer *t, const char *text, size_t n, int **ids);
void tokenizer_print(const Tokenizer *t, int previous_id, int id, FILE *f);
double tokenizer_bytes(const Tokenizer *t, int previous_id, int id);
int data_declares(const char *pattern, int *V, int *S);
void loader_open(DataLoader *dl, const char *pattern, int B, int T, int rank, int world, uint64_t seed,
                 int shuffle, int vocab_size, int document_mask);
void loader_log(const DataLoader *dl, const char *name, FILE *f);
void loaders_warn_of_shared(const DataLoader *train, const DataLoader *val, FILE *f);
void loader_rewind(DataLoader *dl);
int64_t loader_eval_batches(const DataLoader *dl);
void loader_next(DataLoader *dl, Batch *batch);
void batch_alloc(Batch *batch, int B, int T, int document_mask, int with_floor);
void batch_alloc_pairs(Batch *batch, DataLoader *dl);
int64_t data_windows(const char *pattern, int T);
int data_stage(const char *pattern, Str *path);
int loader_source(const DataLoader *dl, int64_t window);
void tasks_open(Tasks *tasks, const char *pattern, int B, int T, int vocab_size);
const char *loader_path(const DataLoader *dl);
// 14
double learning_rate(const Options *o, int64_t step);
double flops_per_token(const Config *c, double T, int causal);
void log_open(const char *path);
void log_record(Text *t);
void log_close(void);
void power_log_start(const char *path);
void text_add_options(Text *t, int as_given);
Str duration_text(double seconds);
Str measured_text(double x, const char *format);
Str flops_text(double x);
// 15
void out_check(const char *out);
void out_make(const char *out);
void out_lock(const char *out, int make);
void out_check_run(const char *out, const TrainState *t, int continued, int later_are_damaged);
void out_remove_leftovers(const char *out);
Str folder_above(const char *path);
const char *without_link(const char *path);
int same_folder(const char *a, const char *b);
char *checkpoint_choose(const char *resume, const char *out);
int checkpoint_list(const char *out, int64_t **steps);
Str checkpoint_path(const char *out, int64_t step);
void checkpoint_read_state(const char *dir, TrainState *t, Options *was);
void checkpoint_read_model(const char *dir, Model *m, int state);
Str checkpoint_whole(const char *dir, int weights_only);
void save_values(StWriter *w, const Model *m, int kind, int u, size_t at, size_t n);
void save_table(StWriter *w, Model *m, int kind);
void weights_read(const char *dir, Model *m, const Config *c);
void side_files_read(const char *model_dir, const Tokenizer *t, const char *chats);
void weights_random(Model *m, const Config *c, uint64_t seed);
double checkpoint_copy_bytes(const Model *m, const Options *o, int rank, int world);
void checkpoint_reserve(const Model *m, const Options *o);
void checkpoint_save(Model *m, const TrainState *t, const Config *c, const Options *o, int goes_on);
int checkpoint_writing(void);
void checkpoint_turn(double writing);
void checkpoint_wait(void);
uint32_t model_crc(Model *m, const Config *c);
int reference_read(DataLoader *dl, uint32_t weights);
void reference_check_folders(const DataLoader *dl, uint32_t weights);
void reference_write(const DataLoader *dl, uint32_t weights);
// 16
double plan_seconds(const char *name, const Config *c, const Plan *plan, const Machine *machine);
void plan_check(void);
Machine plan_machine(void);
void plan_report(const Config *c, const Machine *machine);

// ---- what a run holds -------------------------------------------------------------------------------------
enum { SPENT_UPDATES, SPENT_EVALUATION, SPENT_CHECKPOINT, SPENT_SAMPLE, N_SPENT };
static const char *const spent_names[] = {"updates", "evaluation", "checkpoint", "sample"};
typedef struct Trainer {
    Model *m;
    Machine machine;                        // the sizes are for this one
    Config c;
    double writing;                         // ranks that wrote a checkpoint when the last update began
    const Objective *objective;
    DataLoader train, val;
    Tasks tasks;
    LoaderState next;                       // where the data after the batches below begin
    Batch *batches, val_batch;              // (micro_steps) of the next update
    int batches_read;
    double *weight, *nll;                   // (N) of a micro-step's targets
    uint8_t *is_top;                        // (N) whether each is the likeliest token
    const char *start;                      // folder of the weights that training starts from, NULL: random
    double mass[N_MASSES], sums[N_SUMS];    // of the last update, over all ranks
    // (ranks + 2) seconds that each rank had to do in the update before, without waiting for others
    double *rank_seconds, slowest_ratio;    // slowest rank over median
    int slowest, slow_updates;              // the same rank, so many in a row
    double span, spans;                     // tokens of a token's document, on average over the last update;
    int64_t n_spans;                        // the sum of that over n_spans updates
    // seconds of the last update by parts, and of all since this start; what the model of speed says of one,
    // NAN: unavailable
    double parts[N_PARTS], all_parts[N_PARTS], modelled;
    Tokenizer *tokenizer;
    TrainState state;
    double peak;                            // FLOP/s of a rank; NAN: unknown
    int64_t micro_steps;                    // per update
    int64_t bad_in_a_row, saved_step;
    double val_loss, floor;                 // of the last evaluation, NAN: none
    double epoch;                           // updates of a pass over the training data
    // of energy; NAN: none yet
    struct {
        double start, joules, joules_per_token, joules_per_target, watts;
        int64_t tokens, targets;
    } window;
    // since this start, over all ranks; NAN: unavailable
    struct { double seconds, joules; } spent[N_SPENT];
    struct { int64_t step, tokens, targets; } begun;
    double idle, limit;                     // W: taken before training; that may be taken
} Trainer;

static volatile sig_atomic_t signals;       // 1 once one has come

// Launchers, time limits and closing terminals send several signals at once: they only repeat the request.
// A second SIGINT over a second after the first is a hand that does not want to wait.
static void on_signal(int number) {
    static double interrupted;              // when the first SIGINT came
    if (number == SIGINT && interrupted > 0 && now_seconds() - interrupted > 1) {
        if (live_shown && write(STDOUT_FILENO, "\n", 1)) {}
        _exit(128 + SIGINT);
    }
    if (number == SIGINT && interrupted == 0) interrupted = now_seconds();
    signals = 1;
}

// Save and stop: Ctrl-C, a time limit, a launcher, a closed terminal (not after nohup), a closed pipe.
static void catch_signals(void) {
    const int numbers[] = {SIGINT, SIGTERM, SIGUSR1, SIGHUP, SIGPIPE};
    for (int i = 0; i < COUNT(numbers); i++)
        if (signal(numbers[i], on_signal) == SIG_IGN && numbers[i] == SIGHUP) signal(SIGHUP, SIG_IGN);
}

// 1 on all ranks once any has got a signal to stop.
static int stop_requested(void) { return comm_max((double)signals) > 0; }

// ---- one update -------------------------------------------------------------------------------------------
static void read_batches(Trainer *tr) {
    const int before = part_begin(PART_DATA);
    for (int64_t i = 0; i < tr->micro_steps; i++) loader_next(&tr->train, &tr->batches[i]);
    part_begin(before);
    tr->batches_read = 1;
}

// Forward, and the weight of each target by the objective; sums += what the objective counts.
static void forward_and_weigh(Trainer *tr, const Batch *batch, const double *mass, double *sums) {
    part_begin(PART_FORWARD);
    llama_forward(tr->m, batch);
    if (tr->objective->from_losses) {
        llama_head(tr->m, batch, /*weight=*/NULL);
        model_losses(tr->m, tr->nll, batch->B * batch->T);
    }
    tr->objective->weigh(tr->weight, batch, mass, tr->nll, sums);
}

// Average number of tokens in the document of a token of this rank: what attention costs grows with it.
static double mean_span(const Trainer *tr) {
    double squares = 0;
    const int T = (int)opt.seq_len, N = (int)opt.batch_size * T;
    if (!opt.document_mask) return T;
    for (int64_t k = 0; k < tr->micro_steps; k++)
        for (int i = 0, end; i < N; i = end) {
            const int *start = tr->batches[k].doc_start;
            for (end = i + 1; end < N && end % T && start[end] == start[i];) end++;
            squares += (double)(end - i) * (end - i);
        }
    return squares / ((double)N * (double)tr->micro_steps);
}

// Gradients of one update, over all ranks. 0 if a signal came between micro-steps: nothing has changed then.
// *loss: the objective.
static int update_gradients(Trainer *tr, double *loss) {
    Model *m = tr->m;
    double *mass = tr->mass, *sums = tr->sums;
    memset(mass, 0, sizeof tr->mass);
    memset(sums, 0, sizeof tr->sums);
    if (!tr->batches_read) read_batches(tr);
    for (int64_t i = 0; i < tr->micro_steps; i++) add_mass(mass, &tr->batches[i]);
    const int world = comm_world();
    double *facts = tr->rank_seconds;                       // which travel with a sum that is needed anyway
    for (int r = 0; r < world; r++) if (r != comm_rank()) facts[r] = 0;
    facts[world] = mean_span(tr);
    facts[world + 1] = (double)checkpoint_writing();
    comm_sum(facts, world + 2);
    tr->span = facts[world] / world;
    tr->writing = facts[world + 1];
    tr->spans += tr->span;
    tr->n_spans++;
    // known before the first backward, so that nothing is scaled afterwards
    comm_sum(mass, N_MASSES);
    part_begin(PART_OPTIMIZER);
    model_zero_grads(m);
    for (int64_t i = 0; i < tr->micro_steps; i++) {
        if (stop_requested()) return 0;
        const Batch *batch = &tr->batches[i];
        forward_and_weigh(tr, batch, mass, sums);
        llama_head(m, batch, tr->weight);
        llama_backward(m, batch, /*last=*/i + 1 == tr->micro_steps);
    }
    part_begin(PART_OTHER);
    tr->next = tr->train.state;
    tr->batches_read = 0;
    if (tr->state.step + 1 < opt.steps && !opt.dump_grads) read_batches(tr);     // while a GPU computes
    reduce_finish(m);
    *loss = model_loss(m);
    comm_sum(loss, 1);
    comm_sum(sums, N_SUMS);
    if (opt.stage == STAGE_DPO) *loss = dpo_mean(sums, mass);
    return 1;
}

// How many standard deviations x lies above the mean of the last SPIKE_WINDOW of n values; 0 while n is less.
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
    if (!tr->mass[MASS_TARGETS])                            // momentum and weight decay alone would move them
        return str("no target among %" PRId64 " tokens", opt.total_batch_tokens);
    if (opt.skip_spikes > 0 && (z_loss > opt.skip_spikes || z_norm > opt.skip_spikes))
        return str("spike: loss %.4f (%.1f standard deviations), grad_norm %.3f (%.1f)", loss, z_loss, norm,
                   z_norm);
    return str("%s", "");
}

// Energy is read over windows of at least 2 s, with the device idle at both ends: a GPU's counter moves every
// 0.1 s. This ends a window, in which the energy went into `what`, and begins the next. All ranks call it
// together.
enum { ENERGY_SECONDS = 2 };
static void window_turn(Trainer *tr, int what) {
    device_wait();
    comm_barrier();                                         // rank 0 alone may have been sampling
    tr->peak = device_peak(opt.precision == BF16);          // a CPU's is measured, and may be higher now
    double now = now_seconds(), energy = energy_read(), joules = energy - tr->window.joules;
    const double seconds = now - tr->window.start;
    comm_sum(&joules, 1);                                   // each rank reads its own counters
    tr->spent[what].seconds += seconds;
    tr->spent[what].joules += joules;
    if (what == SPENT_UPDATES) {
        tr->state.joules += joules;
        if (seconds >= ENERGY_SECONDS) {                    // else cut short, and too coarse
            tr->window.joules_per_token = joules / (double)(tr->state.tokens - tr->window.tokens);
            tr->window.joules_per_target = joules / (double)(tr->state.targets - tr->window.targets);
            tr->window.watts = joules / seconds;
        }
    } else {
        Text r = {NULL, 0, 0};
        text_add(&r, "{\"type\": \"look\", \"step\": %" PRId64, tr->state.step);
        text_add_field(&r, str("%s_seconds", spent_names[what]).s, seconds);
        text_add_field(&r, str("%s_joules", spent_names[what]).s, joules);
        log_record(&r);
    }
    tr->window.start = now;
    tr->window.joules = energy;
    tr->window.tokens = tr->state.tokens;
    tr->window.targets = tr->state.targets;
}

// The first window. Where there are counters, the two seconds before show what the machine takes anyway: this
// rank's part is set up and waits. Where there are none, that costs no time.
static void window_first(Trainer *tr) {
    double facts[2] = {energy_read(), power_limit()}, start = now_seconds();
    tr->idle = NAN;
    if (comm_max(!isfinite(facts[0])) == 0) {
        while (!signals && now_seconds() - start < ENERGY_SECONDS) usleep(50000);
        facts[0] = (energy_read() - facts[0]) / (now_seconds() - start);
        comm_sum(facts, 2);
        tr->idle = stop_requested() ? NAN : facts[0];
        tr->limit = facts[1];
        printf("energy | idle %s W | limit %s W | of all ranks\n", measured_text(tr->idle, "%.1f").s,
               measured_text(tr->limit, "%.1f").s);
    } else tr->limit = tr->state.joules = NAN;
    tr->begun.step = tr->state.step;
    tr->begun.tokens = tr->window.tokens = tr->state.tokens;
    tr->begun.targets = tr->window.targets = tr->state.targets;
    tr->window.start = now_seconds();
    tr->window.joules = energy_read();
}

// What the update's preferences were, under TRL's names: means over its pairs.
static const struct { const char *key; int sum; } dpo_metrics[] = {
    {"rewards/chosen", REWARDS_CHOSEN}, {"rewards/rejected", REWARDS_REJECTED},
    {"rewards/margins", REWARDS_MARGINS}, {"rewards/accuracies", REWARDS_ACCURACIES},
    {"logps/chosen", LOGPS_CHOSEN}, {"logps/rejected", LOGPS_REJECTED}};

static void text_add_dpo(Text *r, const char *prefix, const double *sums, const double *mass) {
    for (int i = 0; i < COUNT(dpo_metrics) && opt.stage == STAGE_DPO; i++)
        text_add_field(r, str("%s%s", prefix, dpo_metrics[i].key).s,
                       sums[dpo_metrics[i].sum] / mass[MASS_PAIRS]);
}

static Str dpo_text(const double *sums, const double *mass) {
    const double n = mass[MASS_PAIRS];
    if (opt.stage != STAGE_DPO || !n) return str("%s", "");
    return str(" | margin %.4f (chosen %+.4f, rejected %+.4f) | accuracy %.1f%%", sums[REWARDS_MARGINS] / n,
               sums[REWARDS_CHOSEN] / n, sums[REWARDS_REJECTED] / n, 100 * sums[REWARDS_ACCURACIES] / n);
}

// Speed and energy count the tokens that are processed; where not each of them is a target, the trained ones
// stand beside them.
static void log_step(const Trainer *tr, double loss, double lr, double norm, double seconds,
                     const char *skipped) {
    const int64_t step = tr->state.step;
    const double tokens = (double)opt.total_batch_tokens, speed = tokens / seconds, world = comm_world();
    const double trained = tr->mass[MASS_TARGETS] / seconds;
    const double report = flops_per_token(&tr->c, tr->span, /*causal=*/0) * speed / world;
    const double causal = flops_per_token(&tr->c, tr->span, /*causal=*/1) * speed / world;
    const double peak = report <= tr->peak ? tr->peak : NAN;    // more: measured on a busy machine
    if (*skipped) {
        live_end();
        printf("step %" PRId64 " | skipped | %s\n", step, skipped);
    }
    const int due = step % opt.log_every == 0 || step == opt.steps || step == 1;
    const double left = (double)(opt.steps - step) * tr->state.seconds / (double)step;
    if (due && live_wanted()) {
        const Str mfu = report <= tr->peak ? str(" | mfu %.0f%%", 100 * report / peak) : str("%s", "");
        live_show((double)step / (double)opt.steps, str("step %" PRId64 "/%" PRId64, step, opt.steps).s,
                  str("loss %.4f | %.0f tok/s%s | eta %s", loss, speed, mfu.s, duration_text(left).s).s);
    } else if (due) {
        const Str of_them = opt.stage == STAGE_PRETRAIN ? str("%s", "") : str(", %.0f trained", trained);
        const Str joules = opt.stage == STAGE_PRETRAIN ? str("%s", "")
                         : str(", %s trained", measured_text(tr->window.joules_per_target, "%.3g").s);
        printf("step %" PRId64 "/%" PRId64 " | loss %.4f%s | lr %.2e | grad_norm %.3f | %.1f ms | "
               "%.0f tok/s%s | mfu %s (causal %s) | %s J/token%s | eta %s\n", step, opt.steps, loss,
               dpo_text(tr->sums, tr->mass).s, lr, norm, seconds * 1e3, speed, of_them.s,
               measured_text(100 * report / peak, "%.1f%%").s,
               measured_text(100 * causal / peak, "%.1f%%").s,
               measured_text(tr->window.joules_per_token, "%.3g").s, joules.s, duration_text(left).s);
        fflush(stdout);
    }
    const double z = tr->sums[DPO_Z] / tr->mass[MASS_PAIRS];        // log sigmoid is a straight line there
    if (opt.stage == STAGE_DPO && fabs(z) > 20) {
        live_end();
        printf("step %" PRId64 " | warning: rewards/margins %s%.1f: the policy is far from its reference; a "
               "lower --lr or a higher --dpo-beta holds it\n", step,
               dpo_per_token(&opt) ? "per token " : "", z);
    }
    const struct { const char *key; double x; } row[] = {
        {"loss", loss}, {"lr", lr}, {"grad_norm", norm}, {"tokens", (double)tr->state.tokens},
        {"trained_tokens", (double)tr->state.targets},
        {"tokens_per_sec", speed}, {"tokens_per_sec_per_gpu", speed / world},
        {"trained_tokens_per_sec", trained},
        {"model_tflops_per_gpu", report * 1e-12}, {"mfu", report / peak},
        {"mfu_causal", causal / peak}, {"time_per_iteration", seconds},
        {"joules_per_token", tr->window.joules_per_token},
        {"joules_per_trained_token", tr->window.joules_per_target}, {"watts", tr->window.watts},
        {"joules", tr->state.joules > 0 ? tr->state.joules : NAN}};     // 0: no window has ended
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"step\", \"step\": %" PRId64, step);
    for (int i = 0; i < COUNT(row); i++) text_add_field(&r, row[i].key, row[i].x);
    for (int i = 0; i < N_PARTS; i++)
        text_add(&r, ", \"%s_seconds\": %s", part_names[i], json_decimal(tr->parts[i]));
    text_add_field(&r, "of_modelled_speed", tr->modelled / seconds);
    text_add_dpo(&r, "", tr->sums, tr->mass);
    if (comm_world() > 1) text_add(&r, ", \"slowest_rank\": %d", tr->slowest);
    if (comm_world() > 1) text_add_field(&r, "slowest_over_median", tr->slowest_ratio);
    text_add(&r, ", \"skipped\": %s", *skipped ? "true" : "false");
    log_record(&r);
}

static int compare_numbers(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// All wait for the slowest rank: who it was in the update before, and a line if it is the same one for long.
enum { SLOW_UPDATES = 20, HOST_NAME = 64 };
static void watch_ranks(Trainer *tr) {
    const int world = comm_world(), before = tr->slowest;
    double *sorted = (double *)xmalloc((size_t)world * sizeof(double)), host[HOST_NAME] = {0};
    char name[HOST_NAME] = "";
    memcpy(sorted, tr->rank_seconds, (size_t)world * sizeof(double));
    qsort(sorted, (size_t)world, sizeof(double), compare_numbers);
    const double median = sorted[(world - 1) / 2];
    free(sorted);
    tr->slowest = 0;
    for (int r = 1; r < world; r++)
        if (tr->rank_seconds[r] > tr->rank_seconds[tr->slowest]) tr->slowest = r;
    tr->slowest_ratio = median > 0 ? tr->rank_seconds[tr->slowest] / median : NAN;
    const double late = tr->rank_seconds[tr->slowest] - median;     // a few ms are chance
    if (!(tr->slowest_ratio > 1.5 && late > 0.05)) tr->slow_updates = 0;
    else tr->slow_updates = tr->slowest == before ? tr->slow_updates + 1 : 1;
    if (tr->slow_updates != SLOW_UPDATES) return;
    if (comm_rank() == tr->slowest) gethostname(name, sizeof name - 1);
    for (int i = 0; i < HOST_NAME; i++) host[i] = name[i];
    comm_sum(host, HOST_NAME);
    for (int i = 0; i < HOST_NAME; i++) name[i] = (char)host[i];
    printf("note | step %" PRId64 ": rank %d on %s is slow: %d updates in a row its work took over 1.5 "
           "times, now %.1f times, that of the median rank; all wait for it\n", tr->state.step, tr->slowest,
           name, SLOW_UPDATES, tr->slowest_ratio);
}

enum { MOST_BAD_IN_A_ROW = 5 };

// One update: gradients, verdict, AdamW, log. 0 if a signal came before it was complete.
static int train_step(Trainer *tr) {
    TrainState *s = &tr->state;
    const double start = now_seconds();
    const char *bad;
    double loss;
    int n_bad;
    running_step = s->step + 1;
    split_begin(profile_has(running_step));
    if (!update_gradients(tr, &loss)) {
        split_end(tr->parts);
        return 0;
    }
    if (comm_world() > 1) watch_ranks(tr);
    part_begin(PART_OPTIMIZER);
    double facts[3] = {loss, gradient_norm(tr->m, &bad, &n_bad), now_seconds() - tr->window.start};
    part_begin(PART_OTHER);
    comm_broadcast(facts, sizeof facts);                    // all ranks decide alike
    loss = facts[0];
    const double norm = facts[1], lr = learning_rate(&opt, s->step);
    const Str skipped = update_verdict(tr, loss, norm, bad, n_bad);
    s->step++;
    s->tokens += opt.total_batch_tokens;
    s->targets += (int64_t)tr->mass[MASS_TARGETS];
    s->loader = tr->next;
    if (!*skipped.s) {
        const double clip = opt.grad_clip > 0 && norm > opt.grad_clip ? opt.grad_clip / norm : 1;
        part_begin(PART_OPTIMIZER);
        model_update(tr->m, lr, clip, ++s->updates, &opt);
        part_begin(PART_OTHER);
        s->losses[s->n_healthy % SPIKE_WINDOW] = loss;
        s->norms[s->n_healthy++ % SPIKE_WINDOW] = norm;
    }
    tr->bad_in_a_row = *skipped.s ? tr->bad_in_a_row + 1 : 0;
    if (facts[2] > ENERGY_SECONDS) window_turn(tr, SPENT_UPDATES);
    const double seconds = now_seconds() - start;
    s->seconds += seconds;
    split_end(tr->parts);
    tr->parts[PART_OTHER] = seconds;        // less than 0 by what a GPU had begun of what is read only now
    for (int i = 0; i < PART_OTHER; i++) tr->parts[PART_OTHER] -= tr->parts[i];
    for (int i = 0; i < N_PARTS; i++) tr->all_parts[i] += tr->parts[i];
    tr->rank_seconds[comm_rank()] = seconds - tr->parts[PART_COMMUNICATION];
    log_step(tr, loss, lr, norm, seconds, skipped.s);
    checkpoint_turn(tr->writing);
    if (tr->bad_in_a_row < MOST_BAD_IN_A_ROW) return 1;
    checkpoint_wait();
    die("step %" PRId64 ": %d updates in a row were unusable (%s); the newest checkpoint in %s is from "
        "before: lower --lr or look at the data, then --resume auto", s->step, MOST_BAD_IN_A_ROW, skipped.s,
        opt.out);
}

// ---- looking: evaluation and samples ----------------------------------------------------------------------
// What an evaluation adds up over targets and, of stage sft, over answers: RIGHT if all their targets are.
enum { EVAL_LOSS, EVAL_FLOOR, EVAL_TARGETS, EVAL_RIGHT, EVAL_BYTES, EVAL_ANSWERS, EVAL_RIGHT_ANSWERS,
       N_EVAL };

// sums += row b of the micro-step that nll and is_top are of.
static void add_row(const Trainer *tr, const Batch *batch, int b, double *sums) {
    const int first = b * batch->T;
    Document d;
    for (int i = first; i < first + batch->T; i++) {
        const int target = batch->targets[i];
        if (target == IGNORED) continue;
        sums[EVAL_LOSS] += tr->nll[i];
        sums[EVAL_FLOOR] += batch->floor[i];
        sums[EVAL_TARGETS]++;
        sums[EVAL_RIGHT] += tr->is_top[i];
        sums[EVAL_BYTES] += tr->tokenizer ? tokenizer_bytes(tr->tokenizer, batch->inputs[i], target) : NAN;
    }
    for (int t = 0; opt.stage == STAGE_SFT && next_document(batch, b, &t, &d);) {
        int right = 1;
        for (int i = d.first; i < d.end; i++) right &= batch->targets[i] == IGNORED || tr->is_top[i];
        sums[EVAL_ANSWERS]++;
        sums[EVAL_RIGHT_ANSWERS] += right;
    }
}

// Special tokens are of 0 bytes; their loss counts.
static double bits_per_byte(const double *sums) { return sums[EVAL_LOSS] / log(2) / sums[EVAL_BYTES]; }

static Str eval_text(const double *sums) {
    const double n = sums[EVAL_TARGETS], answers = sums[EVAL_ANSWERS];
    const Str of_answers = answers ? str(" | answer accuracy %.2f%% of %.0f",
                                         100 * sums[EVAL_RIGHT_ANSWERS] / answers, answers) : str("%s", "");
    return str(" | perplexity %.4g | bits/byte %s | token accuracy %.2f%%%s | %.0f targets",
               exp(sums[EVAL_LOSS] / n), measured_text(bits_per_byte(sums), "%.4f").s,
               100 * sums[EVAL_RIGHT] / n, of_answers.s, n);
}

static void text_add_eval(Text *r, const double *sums) {
    text_add_field(r, "perplexity", exp(sums[EVAL_LOSS] / sums[EVAL_TARGETS]));
    text_add_field(r, "bits_per_byte", bits_per_byte(sums));
    text_add_field(r, "token_accuracy", sums[EVAL_RIGHT] / sums[EVAL_TARGETS]);
    if (sums[EVAL_ANSWERS])
        text_add_field(r, "answer_accuracy", sums[EVAL_RIGHT_ANSWERS] / sums[EVAL_ANSWERS]);
    text_add(r, ", \"targets\": %.0f", sums[EVAL_TARGETS]);
}

// Of more than one source: a line each. source (n, N_EVAL)
static void report_sources(const Trainer *tr, Text *r, const double *source) {
    const DataLoader *dl = &tr->val;
    if (dl->n_sources < 2) return;
    text_add(r, ", \"sources\": {");
    for (int i = 0; i < dl->n_sources; i++) {
        const double *sums = source + (size_t)i * N_EVAL, loss = sums[EVAL_LOSS] / sums[EVAL_TARGETS];
        if (sums[EVAL_TARGETS])                             // --val-batches may end before a source
            printf("step %" PRId64 " | val %s | loss %.4f%s\n", tr->state.step, dl->sources[i], loss,
                   eval_text(sums).s);
        if (i) text_add(r, ", ");
        text_add_string(r, dl->sources[i]);
        text_add(r, ": {\"loss\": %s", json_decimal(loss));
        text_add_eval(r, sums);
        text_add(r, "}");
    }
    text_add(r, "}");
}

// Mean of the objective over --val-data into tr->val_loss (and tr->floor). 0 if a signal came first: they are
// NAN then.
static int evaluate(Trainer *tr) {
    DataLoader *dl = &tr->val;
    const Batch *batch = &tr->val_batch;
    const int dpo = opt.stage == STAGE_DPO, N = batch->B * batch->T;
    int64_t batches = loader_eval_batches(dl);
    if (opt.val_batches && opt.val_batches < batches) batches = opt.val_batches;
    const double one[N_MASSES] = {1, 1, 1};
    double mass[N_MASSES] = {0}, sums[N_SUMS] = {0}, total[N_EVAL] = {0};
    double *source = (double *)xcalloc((size_t)dl->n_sources * N_EVAL, sizeof(double));
    loader_rewind(dl);
    tr->val_loss = tr->floor = NAN;
    for (int64_t i = 0; i < batches; i++) {
        if (stop_requested()) {
            free(source);
            return 0;
        }
        loader_next(dl, &tr->val_batch);
        add_mass(mass, batch);
        llama_forward(tr->m, batch);
        llama_head(tr->m, batch, /*weight=*/NULL);
        model_losses(tr->m, tr->nll, N);
        model_tops(tr->m, tr->is_top, N);
        if (dpo) tr->objective->weigh(tr->weight, batch, one, tr->nll, sums);       // for the sums
        for (int b = 0; b < batch->n_rows; b++)
            add_row(tr, batch, b, source + (size_t)loader_source(dl, batch->window[b]) * N_EVAL);
    }
    model_loss(tr->m);                                      // the sum is not wanted: the next begins at 0
    comm_sum(source, dl->n_sources * N_EVAL);
    comm_sum(mass, N_MASSES);
    comm_sum(sums, N_SUMS);
    for (int i = 0; i < dl->n_sources * N_EVAL; i++) total[i % N_EVAL] += source[i];
    tr->val_loss = !dpo ? total[EVAL_LOSS] / total[EVAL_TARGETS]
                 : mass[MASS_PAIRS] ? dpo_mean(sums, mass) : NAN;
    if (dl->has_floor && !dpo) tr->floor = total[EVAL_FLOOR] / total[EVAL_TARGETS];
    printf("step %" PRId64 " | val loss %.4f", tr->state.step, tr->val_loss);
    if (isfinite(tr->floor)) printf(", floor %.4f", tr->floor);
    if (dpo) printf("%s | %.0f pairs\n", dpo_text(sums, mass).s, mass[MASS_PAIRS]);
    else printf(" nats/token%s\n", eval_text(total).s);
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"val\", \"step\": %" PRId64, tr->state.step);
    text_add_field(&r, "val_loss", tr->val_loss);
    text_add_field(&r, "floor", tr->floor);
    text_add_dpo(&r, "val_", sums, mass);
    if (!dpo) {
        text_add_eval(&r, total);
        report_sources(tr, &r, source);
    }
    log_record(&r);
    free(source);
    return 1;
}

// ---- multiple choice: log p of each choice after its question; the highest is the model's choice
// score (n_documents) = the sum of log p over the targets of each document, the same on all ranks. 0 if a
// signal came first.
static int score_documents(Trainer *tr, double *score) {
    Tasks *tasks = &tr->tasks;
    const Batch *batch = &tasks->batch;
    Document d;
    loader_rewind(&tasks->data);
    for (int64_t i = 0, batches = loader_eval_batches(&tasks->data); i < batches; i++) {
        if (stop_requested()) return 0;
        loader_next(&tasks->data, &tasks->batch);
        llama_forward(tr->m, batch);
        llama_head(tr->m, batch, /*weight=*/NULL);
        model_losses(tr->m, tr->nll, batch->B * batch->T);
        for (int b = 0; b < batch->n_rows; b++) {
            double *of_row = score + tasks->first_document[batch->window[b]];
            for (int t = 0; next_document(batch, b, &t, &d); of_row++)
                for (int j = d.first; j < d.end; j++) *of_row -= tr->nll[j];        // 0 where no target
        }
    }
    model_loss(tr->m);
    for (int64_t at = 0, n; at < tasks->n_documents; at += n) {     // each has its score on one rank, else 0
        n = tasks->n_documents - at < 1 << 20 ? tasks->n_documents - at : 1 << 20;
        comm_sum(score + at, (int)n);
    }
    return 1;
}

// The choice with the highest score, the first of equals; by_length: score per character.
static int best_choice(const Tasks *tasks, const Task *task, const double *score, int by_length) {
    double highest = -INFINITY;
    int best = 0;
    for (int i = 0; i < task->choices; i++) {
        const int64_t at = task->first + i;
        const double x = score[tasks->document[at]] / (by_length ? tasks->length[at] : 1);
        if (x > highest) highest = x, best = i;
    }
    return best;
}

// A line per source of --eval-tasks: the share of right choices by log p (acc) and by log p per character
// (acc_norm), each with its standard error, as EleutherAI's lm-evaluation-harness has them.
static int evaluate_tasks(Trainer *tr) {
    const Tasks *tasks = &tr->tasks;
    const DataLoader *dl = &tasks->data;
    double *score = (double *)xcalloc((size_t)tasks->n_documents, sizeof(double));
    const int scored = score_documents(tr, score);
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"tasks\", \"step\": %" PRId64 ", \"tasks\": {", tr->state.step);
    for (int s = 0; s < dl->n_sources && scored; s++) {
        double n = 0, right[2] = {0, 0}, all = 0, share[2], error[2];
        for (int64_t i = 0; i < tasks->n; i++) {
            const Task *task = &tasks->task[i];
            if (task->source != s) continue;
            n++;
            for (int k = 0; k < 2; k++) right[k] += best_choice(tasks, task, score, k) == task->gold;
            for (int k = 0; k < task->choices; k++) all += score[tasks->document[task->first + k]];
        }
        for (int k = 0; k < 2; k++) {
            share[k] = isfinite(all) ? right[k] / n : NAN;  // a model that gives no numbers has no choice
            error[k] = n > 1 ? sqrt(share[k] * (1 - share[k]) / (n - 1)) : NAN;
        }
        printf("step %" PRId64 " | %s | acc %.4f +- %s | acc_norm %.4f +- %s | %.0f tasks\n", tr->state.step,
               dl->sources[s], share[0], measured_text(error[0], "%.4f").s, share[1],
               measured_text(error[1], "%.4f").s, n);
        if (s) text_add(&r, ", ");
        text_add_string(&r, dl->sources[s]);
        text_add(&r, ": {\"acc\": %s", json_decimal(share[0]));
        text_add_field(&r, "acc_stderr", error[0]);
        text_add_field(&r, "acc_norm", share[1]);
        text_add_field(&r, "acc_norm_stderr", error[1]);
        text_add(&r, ", \"tasks\": %.0f}", n);
    }
    text_add(&r, "}");
    if (scored) log_record(&r);
    else free(r.s);
    free(score);
    return scored;
}

// All there is to evaluate on. 0 if a signal came first.
static int evaluate_all(Trainer *tr) {
    return (!opt.val_data || evaluate(tr)) && (!opt.eval_tasks || evaluate_tasks(tr));
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

// Prints --prompt and up to --sample-tokens more. Rank 0 alone, the others wait in their next comm_barrier;
// with shared weights no rank can do without the others, and all do the same (but print nothing).
static void generate(Trainer *tr) {
    const int together = tr->m->plan.zero == 3;
    if ((comm_rank() && !together) || !opt.sample_tokens) return;
    const Tokenizer *tok = tr->tokenizer;
    const int bos = tok && tok->bos >= 0 ? tok->bos : tr->c.bos;
    const int room = (int)opt.seq_len;
    int *prompt = NULL, n = 0;
    const int n_prompt = tok ? tokenizer_encode(tok, opt.prompt, strlen(opt.prompt), &prompt) : 0;
    int *ids = (int *)xmalloc((size_t)(n_prompt + opt.sample_tokens + 2) * sizeof(int));
    float *logits = (float *)xmalloc((size_t)tr->c.V * sizeof(float));
    if (bos >= 0 || !n_prompt) ids[n++] = bos >= 0 ? bos : 0;
    for (int i = 0; i < n_prompt; i++) {
        tokenizer_print(tok, n ? ids[n - 1] : -1, prompt[i], stdout);
        ids[n++] = prompt[i];
    }
    for (int64_t i = 0; i < opt.sample_tokens && !(together ? stop_requested() : signals); i++) {
        const int window = n < room ? n : room;             // the last tokens that the model can see
        const uint64_t draw = ((uint64_t)tr->state.step << 20) + (uint64_t)i;
        comm_busy();
        next_logits(tr->m, ids + n - window, window, logits);
        ids[n] = sample_token(logits, tr->c.V, opt.temperature,
                              random_uniform((uint64_t)opt.seed, hash_string("sample"), draw));
        int stop = tok && ids[n] == tok->eos;
        for (int k = 0; k < tr->c.n_stops; k++) stop |= ids[n] == tr->c.stops[k];
        if (stop) break;
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
static void save(Trainer *tr, int goes_on) {
    if (tr->saved_step == tr->state.step) return;
    checkpoint_save(tr->m, &tr->state, &tr->c, &opt, goes_on);
    tr->saved_step = tr->state.step;
    window_turn(tr, SPENT_CHECKPOINT);
}

static void report_end(const Trainer *tr) {
    const TrainState *s = &tr->state;
    if (!s->step || s->seconds <= 0) return;
    const double speed = (double)s->tokens / s->seconds;
    const double span = tr->n_spans ? tr->spans / (double)tr->n_spans : tr->span;
    const double flops = flops_per_token(&tr->c, span, /*causal=*/0) * speed / comm_world();
    const Str trained = opt.stage == STAGE_PRETRAIN ? str("%s", "")
                      : str(" (%" PRId64 " trained)", s->targets);
    printf("end | %" PRId64 " steps | %" PRId64 " tokens%s | %s in steps | %.0f tok/s | mfu %s of %s per "
           "rank (%s) | energy %s kWh, %s W, %s J/token\n", s->step, s->tokens, trained.s,
           duration_text(s->seconds).s, speed,
           measured_text(100 * flops / (flops <= tr->peak ? tr->peak : NAN), "%.1f%%").s,
           flops_text(tr->peak).s, device_peak_is,
           measured_text(s->joules / 3.6e6, "%.3g").s, measured_text(s->joules / s->seconds, "%.1f").s,
           measured_text(s->joules / (double)s->tokens, "%.3g").s);
    if (isfinite(tr->val_loss) && isfinite(tr->floor))
        printf("end | val loss %.4f, floor %.4f nats/token: %.4f above what can be known\n", tr->val_loss,
               tr->floor, tr->val_loss - tr->floor);
}

// Where the time of the updates since this start went, on average.
static void report_split(const Trainer *tr) {
    const double steps = (double)(tr->state.step - tr->begun.step);
    double seconds = 0;
    if (!steps) return;
    for (int i = 0; i < N_PARTS; i++) seconds += tr->all_parts[i] / steps;
    printf("split |");
    for (int i = 0; i < N_PARTS; i++)
        printf(" %s %.1f%% |", part_names[i], 100 * tr->all_parts[i] / steps / seconds);
    printf(" of %.1f ms per step%s | %s\n", 1e3 * seconds, comm_world() > 1 ? " of rank 0" : "",
           isfinite(tr->modelled) ? str("%.1f%% of the modelled speed", 100 * tr->modelled / seconds).s
                                  : "modelled speed unavailable");
}

// What the updates since this start took, apart from all else, on the screen and as the last record.
static void report_energy(const Trainer *tr) {
    const double seconds = tr->spent[SPENT_UPDATES].seconds, joules = tr->spent[SPENT_UPDATES].joules;
    const double steps = (double)(tr->state.step - tr->begun.step), world = comm_world();
    const double tokens = (double)(tr->state.tokens - tr->begun.tokens);
    const double targets = (double)(tr->state.targets - tr->begun.targets);
    const double span = tr->n_spans ? tr->spans / (double)tr->n_spans : tr->span;
    const double gflop = flops_per_token(&tr->c, span, /*causal=*/0) * tokens * 1e-9;
    const double watts = joules / seconds, above = joules - tr->idle * seconds, limit = tr->limit;
    if (!steps) return;
    const struct { const char *key; double x; } row[] = {
        {"tokens", (double)tr->state.tokens}, {"joules", tr->state.joules},     // from the first start on
        {"updates_joules_above_idle", above}, {"kwh", joules / 3.6e6}, {"watts", watts},
        {"watts_per_gpu", watts / world}, {"idle_watts", tr->idle}, {"power_limit_watts", limit},
        {"joules_per_token", joules / tokens}, {"joules_per_trained_token", joules / targets},
        {"joules_per_update", joules / steps}, {"tokens_per_joule", tokens / joules},
        {"gflop_per_joule", gflop / joules}};
    Text r = {NULL, 0, 0}, others = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"end\", \"step\": %" PRId64, tr->state.step);
    for (int i = 0; i < COUNT(row); i++) text_add_field(&r, row[i].key, row[i].x);
    text_add(&others, "%s", "");
    for (int i = 0; i < N_SPENT; i++) {
        if (tr->spent[i].seconds <= 0) continue;
        text_add_field(&r, str("%s_seconds", spent_names[i]).s, tr->spent[i].seconds);
        text_add_field(&r, str("%s_joules", spent_names[i]).s, tr->spent[i].joules);
        if (i != SPENT_UPDATES)
            text_add(&others, " | %s %.3g kWh", spent_names[i], tr->spent[i].joules / 3.6e6);
    }
    log_record(&r);
    if (isfinite(joules)) {
        const Str trained = opt.stage == STAGE_PRETRAIN ? str("%s", "")
                          : str(" (%.3g trained)", joules / targets);
        printf("energy | updates %.3g kWh, above idle %s kWh | %.1f W per rank | %.3g J/token%s | "
               "%.3g tokens/J | %.3g J/update | %.3g GFLOP/J%s\n", joules / 3.6e6,
               measured_text(above / 3.6e6, "%.3g").s, watts / world, joules / tokens, trained.s,
               tokens / joules, joules / steps, gflop / joules, others.s);
    }
    free(others.s);
    // a device at its limit swings about it; 5% more is another unit, another device or a broken counter
    const int too_much = watts > 1.05 * limit, too_little = seconds >= ENERGY_SECONDS && watts < tr->idle;
    if (too_much || too_little)
        printf("warning: updates took %.1f W, %s %.1f W: do not trust the energy of this run\n", watts,
               too_much ? "more than the limit of" : "less than idle before them,",
               too_much ? limit : tr->idle);
}

static void train(Trainer *tr) {
    int due = 0;                                            // a checkpoint
    while (tr->state.step < opt.steps && train_step(tr)) {
        const int64_t step = tr->state.step;
        const int last = step == opt.steps;
        const int looks = opt.val_every && (step % opt.val_every == 0 || last);
        const int evaluating = looks && (opt.val_data || opt.eval_tasks);
        due |= opt.checkpoint_every && step % opt.checkpoint_every == 0;
        const int saving = due && !tr->bad_in_a_row;        // five bad ones must not push out a good one
        const int sampling = opt.sample_every && step % opt.sample_every == 0 && !last;
        if (!evaluating && !saving && !sampling) continue;
        live_end();
        window_turn(tr, SPENT_UPDATES);                     // energy per token is that of updates
        if (evaluating) {
            evaluate_all(tr);
            window_turn(tr, SPENT_EVALUATION);
        }
        if (saving) save(tr, /*goes_on=*/!last);
        if (saving) due = 0;
        if (sampling) {
            generate(tr);
            window_turn(tr, SPENT_SAMPLE);
        }
    }
    live_end();
    window_turn(tr, SPENT_UPDATES);
    const int stopped = stop_requested();
    // skipped updates at the end changed no weight
    if (opt.checkpoint_every || stopped) save(tr, /*goes_on=*/0);
    checkpoint_wait();
    report_split(tr);
    if (stopped)
        printf("stopped by a signal at step %" PRId64 "; --resume auto --out %s continues\n", tr->state.step,
               opt.out);
    else report_end(tr);
    if (!stopped && opt.sample_every) {
        generate(tr);
        window_turn(tr, SPENT_SAMPLE);
    }
    report_energy(tr);
    log_close();
}

// The gradients of the first update as a safetensors file, under Hugging Face's names.
static void dump_grads(Trainer *tr) {
    double mean_loss;
    if (!update_gradients(tr, &mean_loss)) die("--dump-grads: stopped by a signal");
    const ParamTable *p = model_table(tr->m);
    const float loss = (float)mean_loss;
    const int64_t one = 1;
    StWriter *w = comm_rank() ? NULL : st_create(opt.dump_grads, "{\"format\":\"pt\"}");
    if (w) {
        st_declare(w, "loss", ST_F32, 1, &one);
        st_declare_table(w, p, ST_F32);
        st_begin(w);
        st_write(w, &loss, 1);
    }
    save_table(w, tr->m, STATE_GRADS);
    const int failed = w ? st_finish(w, NULL, NULL) : 0;
    if (failed) die("--dump-grads: %s: cannot write: %s", opt.dump_grads, strerror(failed));
    printf("loss %.6f | gradients of %d tensors in %s\n", loss, p->n_tensors, opt.dump_grads);
}

// ---- set-up: everything that can go wrong goes wrong here, before any work --------------------------------
static const char *const default_train[] = {                // by --stage
    "data/stories/train/train_*.ds", "data/stories/sft/train/train_*.ds",
    "data/stories/dpo/train/train_*.ds"};
static const char *const default_val[] = {
    "data/stories/val/val_*.ds", "data/stories/sft/validation/val_*.ds",
    "data/stories/dpo/validation/val_*.ds"};

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
// `tiny`. epoch: updates of a pass over the data, 0: not known.
static void resolve_schedule(Options *o, const Config *c, double epoch) {
    const int small = config_params(c) < 5e6, tuning = o->stage != STAGE_PRETRAIN;
    static const double rates[2][3] = {{3e-4, 2e-5, 1e-6}, {4e-3, 1e-3, 1e-4}};    // [small][stage]
    const double epochs = o->epochs > 0 ? o->epochs : 1;
    if (o->steps < 0) o->steps = epoch > 0 && (o->epochs > 0 || tuning) ? (int64_t)ceil(epochs * epoch)
                               : small ? 2400 : 1000;
    if (o->lr < 0) o->lr = rates[small][o->stage];
    if (o->min_lr < 0) o->min_lr = o->lr / 10;
    if (o->warmup_steps < 0) o->warmup_steps = o->steps / 10 < 100 ? o->steps / 10 : 100;
    if (o->val_every < 0) o->val_every = o->steps / 10 > 1 ? o->steps / 10 : 1;
    if (o->sample_every < 0) o->sample_every = o->steps > 0 ? o->steps : 1;
    if (o->checkpoint_every < 0) o->checkpoint_every = o->steps / 5 > 1 ? o->steps / 5 : 1;
}

// Sizes of a rank of `machine` with a micro-step of B sequences.
static Plan plan_of(const Machine *machine, int64_t B) {
    // unlike is_training, also for --dry-run and --dump-grads: they plan or need the gradients
    const int training = !opt.eval_only && !opt.generate;
    const int samples = opt.generate || (training && opt.sample_every);
    const int64_t text = (int64_t)strlen(opt.prompt) + opt.sample_tokens + 2;  // at most, with BOS and EOS
    const int shard = !opt.zero ? 1 : opt.shard_size ? (int)opt.shard_size : machine->ranks;
    Plan plan = {machine->ranks, comm_rank(), shard > 1 ? (int)opt.zero : 0, shard, (int)B, (int)opt.seq_len,
                 (int)opt.logits_chunk, opt.precision == BF16, opt.optimizer_dtype == BF16,
                 (int)opt.recompute, training,
                 samples ? (int)(text < opt.seq_len ? text : opt.seq_len) : 0};
    return plan;
}

static double plan_bytes(const Config *c, const Plan *plan) {
    Model *m = model_plan(c, plan);
    double bytes = 0;
    for (int i = 0; i < N_ARENAS; i++) bytes += model_bytes(m, i);
    model_free(m);
    return bytes;
}

// A row of .ds data, else 1024; at most what the model is made for.
static int default_seq_len(const Config *c) {
    const char *looked_at = opt.val_data ? opt.val_data : opt.eval_tasks;
    const char *data = opt.generate ? NULL : opt.eval_only ? looked_at : opt.train_data;
    int V, T = 0;
    if (data) data_declares(data, &V, &T);
    if (!T) T = 1024;
    if (T > c->max_T) T = c->max_T;
    return c->sliding_window && T > c->sliding_window ? c->sliding_window : T;
}

// What the user left open of sequence, update and micro-step, for `machine`.
static void resolve_batch(const Config *c, const Machine *machine) {
    const int small = config_params(c) < 5e6, open = !opt.batch_size;
    if (!opt.seq_len) opt.seq_len = default_seq_len(c);
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
    resolve_schedule(was, &tr->c, tr->epoch);
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
// others. OUT is that of one run: what it holds must be what this run saved before.
static char *setup_resume(Trainer *tr, Options *was) {
    const char *resume = opt.resume, *folder = opt.out;     // folder: where auto looks
    if (resume && strcmp(resume, "auto")) {
        int64_t *steps;
        const int is_out = checkpoint_list(resume, &steps) && access(str("%s/checksums.txt", resume).s, F_OK);
        free(steps);
        if (!is_out) resume = without_link(resume);         // its folder is the run's, not that of the link
        if (!option_given("--out")) opt.out = is_out ? resume : xstrdup(folder_above(resume).s);
        if (is_out) folder = resume;
        if (is_out) resume = "auto";
    }
    const int is_auto = resume && !strcmp(resume, "auto");
    if (is_training() && !comm_rank()) {
        out_check(opt.out);
        out_lock(opt.out, /*make=*/0);
    }
    char *dir = resume ? checkpoint_choose(resume, folder) : NULL;
    if (resume && !dir) {
        if (!is_training() && !opt.init_from) die("--resume auto: no checkpoint in %s", folder);
        printf("--resume auto: no checkpoint in %s, starting from the beginning\n", folder);
    }
    if (dir) {
        tr->start = opt.init_from;                          // it was for the first start
        opt.init_from = NULL;
        checkpoint_read_state(dir, &tr->state, was);
        if (same_folder(dir, checkpoint_path(opt.out, tr->state.step).s)) tr->saved_step = tr->state.step;
    }
    const int continued = tr->saved_step >= 0;
    if (!continued || !tr->state.run) {                     // a new run, or a branch in a folder of its own
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        tr->state.run = random_bits((uint64_t)now.tv_sec, (uint64_t)now.tv_nsec, (uint64_t)getpid());
    }
    if (is_training() && !comm_rank()) out_check_run(opt.out, &tr->state, continued, is_auto);
    return dir;
}

// The options of the stage, which a resume takes from the checkpoint.
static void setup_objective(Trainer *tr) {
    static const char *const of_dpo[] = {"--dpo-loss", "--dpo-beta", "--dpo-label-smoothing",
                                         "--dpo-sft-weight", "--dpo-reference"};
    if (opt.epochs > 0 && option_given("--steps") && option_given("--epochs"))
        die("choose one of --steps and --epochs");
    // a resumed run may have been given steps before
    if (option_given("--epochs") && !option_given("--steps")) option_set(option_find("--steps"), "-1");
    tr->objective = &objectives[opt.stage];
    for (int i = 0; i < COUNT(of_dpo) && opt.stage != STAGE_DPO; i++)
        if (option_given(of_dpo[i])) die("%s goes with --stage dpo", of_dpo[i]);
    if (opt.stage == STAGE_PRETRAIN) return;
    if (option_given("--document-mask") && !opt.document_mask)
        die("--document-mask off does not go with --stage %s: a row holds several documents",
            tr->objective->name);
    opt.document_mask = 1;
    if (opt.dpo_beta == 0) opt.dpo_beta = opt.dpo_loss == DPO_NORM ? 5 : 0.1;
    if (opt.dpo_label_smoothing > 0 && opt.dpo_loss == DPO_IPO)
        die("--dpo-label-smoothing does not go with --dpo-loss ipo, which has no sigmoid");
}

// What a sample begins with is checked before the run, not at its end.
static void check_prompt(const Trainer *tr) {
    const Tokenizer *tok = tr->tokenizer;
    int *ids, n;
    if (!opt.sample_tokens || !(opt.generate || (is_training() && opt.sample_every))) return;
    if (!tok && opt.prompt[0])
        die("--prompt needs a tokenizer, and none lies beside model or data; name one with --tokenizer");
    if (tok && tok->bos >= tr->c.V)
        die("tokenizer '%s' begins a text with token %d, outside the model's vocabulary of %d; "
            "name the model's with --tokenizer", tok->path, tok->bos, tr->c.V);
    if (!tok) return;
    for (n = tokenizer_encode(tok, opt.prompt, strlen(opt.prompt), &ids); n > 0; n--)
        if (ids[n - 1] >= tr->c.V)
            die("--prompt: token %d is outside the model's vocabulary of %d; name the model's --tokenizer",
                ids[n - 1], tr->c.V);
    free(ids);
}

// Model and tokenizer. `tiny` takes its vocabulary from tokenizer or data.
static void setup_model(Trainer *tr, const char *resume_dir) {
    Config *c = &tr->c;
    const char *model_dir = resume_dir ? resume_dir : opt.init_from;
    const int needs_data = is_training() || opt.dump_grads;
    int V = 0, S;
    const int only_tasks = opt.eval_only && opt.eval_tasks;
    const char *usual = default_train[opt.stage];
    if (!opt.train_data && !opt.val_data && !only_tasks) opt.val_data = default_val[opt.stage];
    if (!opt.train_data) opt.train_data = usual;
    if (needs_data && !strcmp(opt.train_data, usual) && !data_declares(opt.train_data, &V, &S))
        die("the default data is not here; `make data` writes it to data/stories, or name your own with "
            "--train-data");
    *c = choose_config(resume_dir);
    if (c->rest_keys && !resume_dir) printf("config.json | passed on, not used: %s\n", c->rest_keys);
    const Tokenizer *tok = tr->tokenizer = tokenizer_choose(c, model_dir);
    side_files_read(model_dir, tok, opt.stage && !resume_dir ? opt.train_data : NULL);
    if (!c->V) {
        if (tok) V = tok->V;
        else data_declares(opt.train_data, &V, &S);
        if (V <= 0 && opt.dry_run) V = 1024;
        if (V <= 0)
            die("%s does not say how large its vocabulary is and no tokenizer.bin lies beside it; name a "
                "--tokenizer", opt.train_data);
        config_set_vocab(c, V);
        c->bos = tok ? tok->bos : -1;
        c->n_eos = c->n_stops = tok && tok->eos >= 0;
        if (c->n_eos) c->stops[0] = tok->eos;
    }
    check_prompt(tr);
}

// Sizes of everything; nothing is allocated yet.
static void setup_sizes(Trainer *tr) {
    const Machine machine = tr->machine = opt.device ? plan_machine() : device_machine();
    if (opt.shard_size && !opt.zero) die("--shard-size %" PRId64 " is for --zero 1, 2 or 3", opt.shard_size);
    if (opt.shard_size && machine.ranks % opt.shard_size)
        die("--shard-size %" PRId64 " does not divide %d ranks", opt.shard_size, machine.ranks);
    resolve_batch(&tr->c, &machine);
    if ((is_training() || opt.dry_run) && opt.total_batch_tokens)
        tr->epoch = (double)data_windows(opt.train_data, (int)opt.seq_len) * (double)opt.seq_len
                  / (double)opt.total_batch_tokens;
    resolve_schedule(&opt, &tr->c, tr->epoch);
    if (opt.min_lr > opt.lr) die("--min-lr %g is above --lr %g", opt.min_lr, opt.lr);
    device_check_sizes(&tr->c);
    const Plan plan = plan_of(&machine, opt.batch_size);
    // before the model itself is laid out
    tr->modelled = is_training() ? plan_seconds(device_name(), &tr->c, &plan, &machine) : NAN;
    tr->m = model_plan(&tr->c, &plan);
    if (!opt.generate)
        tr->micro_steps = opt.total_batch_tokens / (opt.batch_size * opt.seq_len * machine.ranks);
}

// Goes on where the checkpoint was in its data; in other data that place means nothing.
static void resume_data(Trainer *tr) {
    TrainState *s = &tr->state;
    const DataLoader *dl = &tr->train;
    const int same_tokens = s->data_crc == dl->crc
                         && (!s->tokens_crc || !dl->tokens_crc || s->tokens_crc == dl->tokens_crc);
    const int same = !s->n_windows
                  || (s->n_windows == dl->n_windows && s->seq_len == dl->T && same_tokens);
    tr->train.state = tr->state.loader;
    if (same && s->loader.position < dl->n_windows) return;
    tr->train.state.position = 0;
    Str were = {""};
    if (s->n_windows)
        were = str("were %" PRId64 " windows of %" PRId64 " tokens, ", s->n_windows, s->seq_len);
    printf("resume: data | %sare %" PRId64 " windows of %d tokens%s: their order begins anew\n", were.s,
           dl->n_windows, dl->T, same_tokens ? "" : ", from other shards");
}

// Shards are made for a stage.
static void check_stage(int stage, const char *path) {
    if (stage == opt.stage) return;
    die("token shard '%s' was made for --stage %s, this run is --stage %s; %s", path,
        stage_names[stage], stage_names[opt.stage],
        stage == STAGE_CHOICE ? "multiple choice goes with --eval-tasks"
        : opt.stage == STAGE_PRETRAIN ? "make shards of text with data/tokens.py"
                                    : "make rows with data/chat.py");
}

// A dry run does without data, but what is there must do.
static void check_stages_of_files(void) {
    const char *const patterns[] = {opt.train_data, opt.val_data};
    for (int i = 0; i < COUNT(patterns); i++) {
        Str path;
        const int stage = patterns[i] ? data_stage(patterns[i], &path) : -1;
        if (stage >= 0) check_stage(stage, path.s);
    }
}

// A pass over the data in updates. Nothing is left over: the last update takes rows of the next pass.
static void say_epoch(const Trainer *tr) {
    const int64_t rows = opt.total_batch_tokens / opt.seq_len, n = tr->train.n_windows, odd = n % rows;
    printf("epoch | %" PRId64 " rows = %.2f updates of %" PRId64, n, tr->epoch, rows);
    if (odd)
        printf("; its last update has %" PRId64 " rows of it and %" PRId64 " of the next", odd, rows - odd);
    printf(" | %.2f epochs in %" PRId64 " steps\n", (double)opt.steps / tr->epoch, opt.steps);
}

static void setup_data(Trainer *tr, const char *resume_dir) {
    const int B = (int)opt.batch_size, T = (int)opt.seq_len, masked = (int)opt.document_mask;
    tr->weight = (double *)xcalloc((size_t)B * T, sizeof(double));
    tr->nll = (double *)xcalloc((size_t)B * T, sizeof(double));
    tr->span = T;
    if (is_training() || opt.dump_grads) {
        loader_open(&tr->train, opt.train_data, B, T, comm_rank(), comm_world(), (uint64_t)opt.seed,
                    /*shuffle=*/1, tr->c.V, masked);
        tr->batches = (Batch *)xcalloc((size_t)tr->micro_steps, sizeof(Batch));
        tr->rank_seconds = (double *)xcalloc((size_t)comm_world() + 2, sizeof(double));
        for (int64_t i = 0; i < tr->micro_steps; i++)
            batch_alloc(&tr->batches[i], B, T, masked, /*with_floor=*/0);
        for (int64_t i = 0; i < tr->micro_steps && opt.stage == STAGE_DPO; i++)
            batch_alloc_pairs(&tr->batches[i], &tr->train);
        check_stage(tr->train.stage, loader_path(&tr->train));
        if (resume_dir) resume_data(tr);
        tr->state.loader = tr->train.state;
        tr->state.n_windows = tr->train.n_windows;
        tr->state.seq_len = T;
        tr->state.data_crc = tr->train.crc;
        tr->state.tokens_crc = tr->train.tokens_crc;
        loader_log(&tr->train, "train", stdout);
        if (opt.stage != STAGE_PRETRAIN) say_epoch(tr);
    }
    if (opt.eval_only && !opt.val_data && !opt.eval_tasks)
        die("--eval-only needs --val-data or --eval-tasks");
    if (!(is_training() || opt.eval_only)) return;
    tr->is_top = (uint8_t *)xcalloc((size_t)B * T, 1);
    if (opt.eval_tasks) {
        tasks_open(&tr->tasks, opt.eval_tasks, B, T, tr->c.V);
        loader_log(&tr->tasks.data, "tasks", stdout);
    }
    if (!opt.val_data) return;
    loader_open(&tr->val, opt.val_data, B, T, comm_rank(), comm_world(), 0, /*shuffle=*/0, tr->c.V, masked);
    check_stage(tr->val.stage, loader_path(&tr->val));
    batch_alloc(&tr->val_batch, B, T, masked, /*with_floor=*/1);
    if (opt.stage == STAGE_DPO) batch_alloc_pairs(&tr->val_batch, &tr->val);
    loader_log(&tr->val, "val", stdout);
    if (is_training()) loaders_warn_of_shared(&tr->train, &tr->val, stdout);
}

static void print_model(const Trainer *tr) {
    const Config *c = &tr->c;
    double total = 0;
    printf("model | %s | %.2f M parameters | L %d | C %d | H %d | K %d | D %d | F %d | V %d | %s head\n",
           c->family->name, (double)model_table(tr->m)->n_params / 1e6, c->L, c->C, c->H, c->K, c->D, c->F,
           c->V, c->tied ? "tied" : "own");
    printf("batch | %" PRId64 " tokens per update = %" PRId64 " sequences x %" PRId64 " tokens x %d ranks x %"
           PRId64 " micro-steps | %s | recompute %s\n", opt.total_batch_tokens, opt.batch_size, opt.seq_len,
           tr->machine.ranks, tr->micro_steps, opt.precision == BF16 ? "bf16" : "fp32",
           option_text(option_find("--recompute")));
    printf("memory");
    for (int i = 0; i < N_ARENAS; i++) {
        const double bytes = model_bytes(tr->m, i);
        total += bytes;
        if (bytes > 0) printf(" | %s %.1f MiB", arena_names[i], bytes / 1048576);
    }
    printf(" | total %.1f MiB per rank%s\n", total / 1048576, device_also_takes);
    if (opt.checkpoint_every && opt.checkpoint_every < opt.steps && (is_training() || opt.dry_run))
        printf("checkpoints | every %" PRId64 " updates | written while training goes on, from a copy of "
               "%.1f MiB in host memory per rank\n", opt.checkpoint_every,
               checkpoint_copy_bytes(tr->m, &opt, comm_rank(), tr->m->plan.ranks) / 1048576);
}

// log p of all answers of dl's pairs under the model's present weights -> dl->reference, on all ranks.
static void reference_pass(Trainer *tr, DataLoader *dl, Batch *batch) {
    const int P = dl->most_documents / 2;
    const size_t n = (size_t)dl->n_windows * P * 2;
    const LoaderState was = dl->state;
    const int shuffle = dl->shuffle;
    double *sums = (double *)xcalloc(n, sizeof(double));
    Document chosen, rejected;
    dl->shuffle = 0;
    loader_rewind(dl);
    for (int64_t i = 0, batches = loader_eval_batches(dl); i < batches; i++) {
        if (stop_requested()) die("stopped by a signal during the reference pass; start again");
        loader_next(dl, batch);
        llama_forward(tr->m, batch);
        llama_head(tr->m, batch, /*weight=*/NULL);
        model_losses(tr->m, tr->nll, batch->B * batch->T);
        for (int b = 0; b < batch->B; b++) {
            double *row = sums + (size_t)batch->window[b] * P * 2;
            for (int t = 0; batch->window[b] >= 0 && next_pair(batch, b, &t, &chosen, &rejected); row += 2) {
                row[0] = answer_log_prob(tr->nll, chosen);
                row[1] = answer_log_prob(tr->nll, rejected);
            }
        }
    }
    model_loss(tr->m);                                      // of no interest
    for (size_t at = 0; at < n; at += INT_MAX / 2) comm_sum(sums + at, (int)min_size(n - at, INT_MAX / 2));
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(sums[i])) die("the reference model's log p of window %zu is not finite", i / P / 2);
        dl->reference[i] = (float)sums[i];
    }
    free(sums);
    dl->state = was;
    dl->shuffle = shuffle;
}

// DPO: log p of all answers under the reference, from files beside the shards or by one pass over the data.
// The reference is the model that training starts from, or --dpo-reference; its weights need no memory later.
static void setup_reference(Trainer *tr, const char *resume_dir) {
    TrainState *s = &tr->state;
    const uint32_t known = resume_dir ? s->reference_crc : 0;
    const char *from = opt.dpo_reference ? opt.dpo_reference : tr->start ? tr->start : opt.init_from;
    DataLoader *const loaders[] = {&tr->train, &tr->val};
    Batch *const batches[] = {tr->batches, &tr->val_batch};
    int missing = 0;
    if (opt.eval_only && opt.val_data && !known && !opt.dpo_reference)
        printf("note | the model is its own reference, so all margins are 0; name another by "
               "--dpo-reference\n");
    if (!known || opt.dpo_reference) {
        if (opt.dpo_reference) config_check_reference(&tr->c, from);
        if (from) weights_read(from, tr->m, &tr->c);
        else weights_random(tr->m, &tr->c, (uint64_t)opt.seed);
        model_set_master(tr->m);
        s->reference_crc = model_crc(tr->m, &tr->c);
        if (known && known != s->reference_crc)
            die("--dpo-reference %s is not the model that this run was begun with, or was in another "
                "--precision; leave out what differs", from);
    }
    for (int i = 0; i < 2; i++)
        if (loaders[i]->n_shards) missing |= !reference_read(loaders[i], s->reference_crc) << i;
    if (missing && known && !opt.dpo_reference) {
        if (!from)
            die("the reference's log p in %s are not beside the shards of %s; name the model that this run "
                "was begun with by --dpo-reference", opt.precision == BF16 ? "bf16" : "fp32",
                loader_path(loaders[missing == 2]));
        config_check_reference(&tr->c, from);
        weights_read(from, tr->m, &tr->c);
        model_set_master(tr->m);
        if (model_crc(tr->m, &tr->c) != known)
            die("--init-from %s is not the model that this run was begun with, or was in another "
                "--precision; name that model by --dpo-reference", from);
    }
    for (int i = 0; i < 2; i++) {
        if (!(missing >> i & 1)) continue;
        reference_check_folders(loaders[i], s->reference_crc);
        printf("reference | one pass over %" PRId64 " rows of %s\n", loaders[i]->n_windows,
               loader_path(loaders[i]));
        fflush(stdout);
        reference_pass(tr, loaders[i], batches[i]);
        reference_write(loaders[i], s->reference_crc);
    }
    comm_barrier();
}

static void setup_weights(Trainer *tr, const char *resume_dir) {
    comm_share(tr->m->plan.shard);
    model_alloc(tr->m);
    if (opt.stage == STAGE_DPO && !opt.generate) setup_reference(tr, resume_dir);
    if (resume_dir) checkpoint_read_model(resume_dir, tr->m, /*state=*/is_training());
    else if (opt.init_from) weights_read(opt.init_from, tr->m, &tr->c);
    else weights_random(tr->m, &tr->c, (uint64_t)opt.seed);
    model_set_master(tr->m);
    comm_barrier();                                         // a slow disk may have kept some ranks longer
}

// mpirun ends its ranks on TERM and Ctrl-C long before a checkpoint is written. dev/run.sh sees to that.
static void warn_of_mpirun(void) {
    char parent[32] = "";
    FILE *f = fopen(str("/proc/%d/comm", (int)getppid()).s, "r");
    if (f && fscanf(f, "%31s", parent) != 1) *parent = 0;
    if (f) fclose(f);
    if (getenv("LITESPARK_RUN") || !strstr(" mpirun orted prterun prted ", str(" %s ", parent).s)) return;
    printf("note | mpirun kills its ranks a second after TERM or Ctrl-C: what was not saved by then is lost; "
           "start by dev/run.sh instead of mpirun, or stop by kill -USR1\n");
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
    text_add_field(&r, "idle_watts", tr->idle);
    text_add_field(&r, "power_limit_watts", tr->limit);
    text_add(&r, ", \"run\": \"%016" PRIx64 "\", \"step\": %" PRId64 ", \"options\": ", tr->state.run,
             tr->state.step);
    text_add_options(&r, /*as_given=*/0);
    log_record(&r);
}

// After all checks, so that a refused run leaves nothing behind.
static void setup_output(Trainer *tr, const char *resume_dir) {
    if (comm_rank() == 0) out_make(opt.out);
    if (comm_rank() == 0 && is_training()) {
        out_lock(opt.out, /*make=*/1);
        // again: another run may have come and gone before there was a lock
        out_check_run(opt.out, &tr->state, tr->saved_step >= 0, /*later_are_damaged=*/1);
        out_remove_leftovers(opt.out);
    }
    comm_barrier();
    if (access(opt.out, W_OK | X_OK)) die("--out %s is not writable: %s", opt.out, strerror(errno));
    log_open(str("%s/%s", opt.out, is_training() ? "log.jsonl" : "eval.jsonl").s);
    if (!is_training()) return;
    tr->peak = device_peak(opt.precision == BF16);
    printf("device | %s | peak %s per rank (%s) | energy counters %s\n", device_name(),
           flops_text(tr->peak).s, device_peak_is, isfinite(energy_read()) ? "found" : "unavailable");
    warn_of_mpirun();
    window_first(tr);
    log_header(tr);
    if (resume_dir)
        printf("resume | %s | step %" PRId64 " of %" PRId64 "%s\n", resume_dir, tr->state.step, opt.steps,
               tr->state.step >= opt.steps ? ": nothing left to do, raise --steps to go on" : "");
}

// ---- all ranks alike: each host may have files and a build of its own -------------------------------------
// Frees `mine`, lines that should be those of rank 0. Dies naming the first that is not.
static void check_alike(const char *what, Text *mine) {
    int n = mine->n;
    comm_broadcast(&n, sizeof n);
    char *theirs = (char *)xcalloc((size_t)(n > mine->n ? n : mine->n) + 1, 1);
    if (!comm_rank()) memcpy(theirs, mine->s, (size_t)n);
    comm_broadcast(theirs, (size_t)n);
    for (const char *a = mine->s, *b = theirs; *a || *b;) {
        const int m = (int)strcspn(a, "\n"), k = (int)strcspn(b, "\n");
        if (m != k || memcmp(a, b, (size_t)m))
            die("%s: %.*s here, %.*s on rank 0; start all ranks with the same options, data, model and build",
                what, m, a, k, b);
        a += m + (a[m] != 0);
        b += k + (b[k] != 0);
    }
    comm_barrier();                                         // until all have found so
    free(theirs);
    free(mine->s);
}

static void check_same_start(void) {
    Text build = {NULL, 0, 0}, options = {NULL, 0, 0};
    if (comm_world() == 1) return;
    size_t n = 0;
    char *program = read_text_file("/proc/self/exe", (size_t)1 << 31, &n);
    text_add(&build, "commit %s, CRC %08x\n", LITESPARK_COMMIT, crc32_update(0, program, n));
    free(program);
    check_alike("build", &build);
    options_text(&options);
    check_alike("options", &options);
}

static void check_same_input(const Trainer *tr, const char *resume_dir) {
    Text model = {NULL, 0, 0}, data = {NULL, 0, 0};
    if (comm_world() == 1) return;
    char *config = config_to_json(&tr->c, "float32");
    const char *weights = resume_dir ? resume_dir : opt.init_from;
    text_add(&model, "config.json with CRC %08x\nweights with CRC %08x\n",
             crc32_update(0, config, strlen(config)), weights ? weights_crc(weights) : 0);
    free(config);
    check_alike("model", &model);
    const DataLoader *const loaders[] = {&tr->train, &tr->val, &tr->tasks.data};
    for (int i = 0; i < COUNT(loaders); i++)
        if (loaders[i]->n_shards)
            text_add(&data, "%s and on with %" PRId64 " windows, CRC %08x\n", loader_path(loaders[i]),
                     loaders[i]->n_windows, loaders[i]->crc);
    text_add(&data, "\n");
    check_alike("data", &data);
}

static void setup(Trainer *tr) {
    Options was;
    tr->saved_step = -1;                    // nothing yet
    tr->val_loss = tr->floor = NAN;
    tr->window.joules_per_token = tr->window.joules_per_target = tr->window.watts = NAN;
    char *resume_dir = setup_resume(tr, &was);
    setup_objective(tr);
    setup_model(tr, resume_dir);
    setup_sizes(tr);
    if (resume_dir) say_what_changed(tr, &was);
    if (opt.dry_run) {
        check_stages_of_files();
        return;
    }
    setup_data(tr, resume_dir);
    check_same_input(tr, resume_dir);
    if (!opt.generate) print_model(tr);
    catch_signals();                        // the reference pass of DPO may take long
    setup_weights(tr, resume_dir);
    if (is_training()) checkpoint_reserve(tr->m, &opt);
    if (opt.power_log) power_log_start(opt.power_log);
    // an evaluation leaves something only where it is told to
    if (is_training() || (opt.eval_only && option_given("--out"))) setup_output(tr, resume_dir);
}

#ifndef LITESPARK_NO_MAIN
int main(int argc, char **argv) {
    static Trainer trainer, *tr = &trainer;
    options_parse_timeout(argc, argv);
    comm_init(&argc, &argv);
    options_parse(argc, argv);
    check_same_start();
    if (opt.help) options_help();
    else if (opt.preset && !strcmp(opt.preset, "help")) config_presets_help();
    else {
        options_check();
        refuse();
        device_open();
        setup(tr);
        if (opt.dry_run) {
            if (!opt.device || strcmp(opt.gpus, "auto")) print_model(tr);
            if (opt.device) plan_report(&tr->c, &tr->machine);
        } else if (opt.eval_only) {
            if (!evaluate_all(tr)) die("--eval-only: stopped by a signal");
            if (opt.val_data && !isfinite(tr->val_loss)) die("--eval-only: the loss is not finite");
        } else if (opt.generate) generate(tr);
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
// values travel by MPI, always in a loop of MPI_Test with a time limit, weights and gradients by NCCL on a
// stream of their own, and gpu_wait and NCCL's start have the same limit: a dead or stuck peer or GPU ends
// the job with a message.
// local: on this machine; shard: ranks that share a copy
static struct { int rank, world, local_rank, local_ranks, shard; } comm = {0, 1, 0, 1, 1};

int comm_rank(void) { return comm.rank; }
int comm_world(void) { return comm.world; }

// ---- the parts of an update, by events on gpu.stream ------------------------------------------------------
// From a mark to the next one the stream has computed, or waited, for that part: for tokens and for other
// ranks as long as it had nothing else to do. Nobody waits for a mark; those that the stream has not passed
// when an update ends on the host (AdamW is on its way) are read at the end of the next.
typedef struct Mark { cudaEvent_t at; int part; } Mark;
static struct {
    Mark *mark;                             // (room) the first n are in use, in the order of the stream
    int n, room;
    int part, profiled;                     // part: now; N_PARTS: outside of an update
} timer = {NULL, 0, 0, N_PARTS, 0};

static void split_turn(int part) {
    if (timer.n == timer.room) {
        timer.mark = (Mark *)array_room(timer.mark, timer.n + 1, &timer.room, sizeof(Mark));
        for (int i = timer.n; i < timer.room; i++) cudaCheck(cudaEventCreate(&timer.mark[i].at));
    }
    timer.mark[timer.n].part = part;
    cudaCheck(cudaEventRecord(timer.mark[timer.n++].at, gpu.stream));
    if (timer.profiled && timer.part < N_PARTS) nvtxRangePop();
    if (timer.profiled && part < N_PARTS) nvtxRangePushA(part_names[part]);
    timer.part = part;
}

int part_begin(int part) {
    const int before = timer.part;
    const int alone = part == PART_COMMUNICATION && comm.world == 1;
    if (before < N_PARTS && part != before && !alone) split_turn(part);
    return before;
}

void split_begin(int profiled) {
    timer.profiled = profiled;
    if (profiled) nvtxRangePushA(str("step %" PRId64, running_step).s);
    split_turn(PART_OTHER);
}

void split_end(double *seconds) {
    cudaError_t e = cudaSuccess;
    int i = 0;
    float ms;
    split_turn(N_PARTS);
    if (timer.profiled) nvtxRangePop();
    memset(seconds, 0, N_PARTS * sizeof(double));
    for (; i + 1 < timer.n; i++) {
        if ((e = cudaEventElapsedTime(&ms, timer.mark[i].at, timer.mark[i + 1].at)) != cudaSuccess) break;
        if (timer.mark[i].part < PART_OTHER) seconds[timer.mark[i].part] += ms * 1e-3;
    }
    if (e == cudaErrorNotReady) cudaGetLastError();     // it is no error of a later call
    else cudaCheck(e);
    std::rotate(timer.mark, timer.mark + i, timer.mark + timer.n);
    timer.n -= i;
}

// Collectives on their way, the newest at n - 1: of a stuck job the first that is not done is named.
enum { MAX_COLLECTIVES = 64 };
static struct { const char *what, *unit; cudaEvent_t done; } collectives[MAX_COLLECTIVES];
static int64_t n_collectives;

static Str stuck_collective(void) {
    for (int64_t i = std::max<int64_t>(0, n_collectives - MAX_COLLECTIVES); i < n_collectives; i++) {
        const auto *c = &collectives[i % MAX_COLLECTIVES];
        if (cudaEventQuery(c->done) == cudaErrorNotReady) return str("the %s of %s", c->what, c->unit);
    }
    return str("what the GPU computes");
}

// Loops that wait for other ranks call it: after --timeout seconds the job ends. what: NULL: for the GPU
static void comm_check_time(Wait *w, const char *what) {
    const double waited = wait_more(w);
    if (waited > (double)opt.timeout && comm.world == 1)
        die("waited %.0f s for the GPU: it hangs; resume with --resume auto (or raise --timeout)", waited);
    if (waited > (double)opt.timeout)
        die("waited %.0f s for the other ranks in %s, step %" PRId64 ": one is dead or stuck; resume with "
            "--resume auto (or raise --timeout)", waited, what ? what : stuck_collective().s, running_step);
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

static MPI_Comm local, rounds;      // the ranks of this machine; all ranks, for barriers

void comm_abort(void) {
    int up = 0, down = 0;
    MPI_Initialized(&up);
    MPI_Finalized(&down);
    if (up && !down && comm.world > 1) MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

void comm_init(int *argc, char ***argv) {
    const char *rank = getenv("PMIX_RANK");                         // to say who waits, before MPI knows
    comm.rank = rank ? atoi(rank) : 0;
    wait_limit("the start of MPI");
    int level;                              // of threads: only the main one calls MPI
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_dup(MPI_COMM_WORLD, &rounds);
    MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm.world);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &comm.local_rank);
    MPI_Comm_size(local, &comm.local_ranks);
    wait_limit(NULL);
    if (comm.rank && !freopen("/dev/null", "w", stdout))            // rank 0 speaks for all
        die("cannot write to /dev/null: %s", strerror(errno));
    setenv("NCCL_DEBUG_FILE", "/dev/stderr", 0);                    // where errors of all ranks go
}

void comm_finish(void) {
    wait_limit("the end of MPI");
    MPI_Finalize();
    wait_limit(NULL);
}

static void comm_wait(MPI_Request *request, const char *what) {
    Wait w = {0, 0};
    const int before = part_begin(PART_COMMUNICATION);
    for (int done = 0;;) {
        MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (done) break;
        comm_check_time(&w, what);
        usleep(50);
    }
    part_begin(before);
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
    comm_wait(&r, "a maximum");
    return x;
}

// A rank that works alone (verifies, samples, writes) says so to those that wait for it in comm_barrier: a
// barrier is rounds of a maximum, until a round finds nobody busy, each with --timeout seconds of its own.
static MPI_Request round_open = MPI_REQUEST_NULL;
static int anybody_busy;

static void round_start(int busy) {
    anybody_busy = busy;
    MPI_Iallreduce(MPI_IN_PLACE, &anybody_busy, 1, MPI_INT, MPI_MAX, rounds, &round_open);
}

void comm_busy(void) {
    int heard = 0;                          // by all, and so nobody is busy elsewhere
    if (comm.world == 1 || omp_get_thread_num()) return;     // the first of several threads says it for all
    MPI_Test(&round_open, &heard, MPI_STATUS_IGNORE);
    if (heard) round_start(1);
}

void comm_barrier(void) {
    do {
        comm_wait(&round_open, "a barrier");      // the one that this rank's comm_busy has begun
        round_start(0);
        comm_wait(&round_open, "a barrier");
    } while (anybody_busy);
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
void comm_busy(void) {}
void comm_barrier(void) {}
#endif

// ---- the GPU ----------------------------------------------------------------------------------------------
// FLOP/s of the device at this precision; NAN: not in section 16's table, and then MFU is not printed.
double device_peak(int bf16) { return gpu_peak(gpu.device.name, bf16); }

const char *device_name(void) { return gpu.device.name; }

// To plan with: what is free on the fullest GPU, less the allowance. Without a GPU (--dry-run): an 80 GB
// card.
Machine device_machine(void) {
    size_t free_bytes = 0, total = 0;
    if (cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) free_bytes = (size_t)79 << 30;
    const double memory = -comm_max(-((double)free_bytes - GPU_ALLOWANCE));     // all ranks must choose alike
    return {comm.world, comm.local_ranks, memory};
}

// Pinned, so that copies run at the speed of the bus: of 80% of what is free, this rank's part.
void *device_host_memory(const Model *, size_t bytes) {
    double cores, memory, available = INFINITY;
    void *p = NULL;
    cgroup_limits("/proc/self/cgroup", "/sys/fs/cgroup", &cores, &memory);
    FILE *f = fopen("/proc/meminfo", "r");
    for (char line[256]; f && fgets(line, sizeof line, f);)
        if (sscanf(line, "MemAvailable: %lf kB", &available) == 1) take_limit(&memory, available * 1024);
    if (f) fclose(f);
    if (bytes > 0.8 * memory / comm.local_ranks) return NULL;
    if (cudaMallocHost(&p, bytes) == cudaSuccess) return p;
    cudaGetLastError();                         // it is no error of a later call
    return NULL;
}

void device_host_memory_free(void *p) { if (p) cudaCheck(cudaFreeHost(p)); }

int device_logits_chunk(int) { return 2048; }   // smaller ones read and write the head's gradient too often

void device_check_sizes(const Config *c) {
    const int pack = opt.precision == BF16 ? 8 : 4;
    if (opt.seq_len > F32_WARPS * 65535)
        die("--seq-len %" PRId64 ": the CUDA trainer takes at most %d", opt.seq_len, F32_WARPS * 65535);
    if (c->C % pack || c->F % pack || c->C > 16384)
        die("hidden_size %d, intermediate_size %d: the CUDA trainer wants multiples of %d in %s, and a "
            "hidden_size of at most 16384", c->C, c->F, pack, pack == 8 ? "bf16" : "fp32");
}

// ---- energy: NVML, opened at run time: a counter of mJ since the driver loaded, and what goes with it -----
static struct {
    void *device;
    int (*total)(void *device, unsigned long long *mj);
    int (*limit)(void *device, unsigned *mw);
    int (*clock)(void *device, int of, unsigned *mhz);
    int (*temperature)(void *device, int of, unsigned *celsius);
} nvml;

static void energy_open(void) {
    if (strstr(gpu.device.name, "MIG")) {
        printf("note | %s is a part of a GPU, and energy is counted for the whole\n", gpu.device.name);
        return;
    }
    void *lib = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!lib) return;
    auto init = (int (*)(void))dlsym(lib, "nvmlInit_v2");
    auto by_bus = (int (*)(const char *, void **))dlsym(lib, "nvmlDeviceGetHandleByPciBusId_v2");
    auto total = (decltype(nvml.total))dlsym(lib, "nvmlDeviceGetTotalEnergyConsumption");
    if (!init || !by_bus || !total || init() || by_bus(gpu.bus, &nvml.device)) return;
    nvml.total = total;
    nvml.limit = (decltype(nvml.limit))dlsym(lib, "nvmlDeviceGetEnforcedPowerLimit");
    nvml.clock = (decltype(nvml.clock))dlsym(lib, "nvmlDeviceGetClockInfo");
    nvml.temperature = (decltype(nvml.temperature))dlsym(lib, "nvmlDeviceGetTemperature");
}

static double energy_now(double otherwise) {
    unsigned long long mj;
    return nvml.total && !nvml.total(nvml.device, &mj) ? (double)mj * 1e-3 : otherwise;
}

double energy_read(void) {
    static double joules = NAN;             // as last read
    return joules = energy_now(joules);
}

double power_limit(void) {
    unsigned mw;
    return nvml.limit && !nvml.limit(nvml.device, &mw) ? mw * 1e-3 : NAN;
}

int power_sample(double *joules, double *mhz, double *celsius) {
    enum { CLOCK_SM = 1, SENSOR_GPU = 0 };
    unsigned x;
    *joules = energy_now(NAN);
    *mhz = nvml.clock && !nvml.clock(nvml.device, CLOCK_SM, &x) ? x : NAN;
    *celsius = nvml.temperature && !nvml.temperature(nvml.device, SENSOR_GPU, &x) ? x : NAN;
    return 1;
}

// ---- sums over ranks, and waiting for them ----------------------------------------------------------------
// What comes next on gpu.comm_stream begins when gpu.stream has come this far.
void comm_follow(void) {
    if (comm.world == 1) return;
    cudaCheck(cudaEventRecord(gpu.ready, gpu.stream));
    cudaCheck(cudaStreamWaitEvent(gpu.comm_stream, gpu.ready, 0));
}

// gpu.stream goes on when gpu.comm_stream has come to this event of it, or (NULL) as far as it goes now.
void comm_join(cudaEvent_t event) {
    if (comm.world == 1) return;
    const int before = part_begin(PART_COMMUNICATION);
    if (!event) cudaCheck(cudaEventRecord(gpu.summed, gpu.comm_stream));
    cudaCheck(cudaStreamWaitEvent(gpu.stream, event ? event : gpu.summed, 0));
    part_begin(before);
}

#ifdef USE_MPI
// Our communicators do not block: a call that still runs is asked after, within --timeout. *nccl is the
// communicator.
static void nccl_done(ncclResult_t r, void *const *nccl, const char *what) {
    Wait w = {0, 0};
    for (; r == ncclInProgress; usleep(50)) {
        comm_check_time(&w, what);
        if (*nccl && ncclCommGetAsyncError((ncclComm_t)*nccl, &r) != ncclSuccess) r = ncclInternalError;
    }
    if (r != ncclSuccess) die("NCCL: %s: %s; NCCL_DEBUG=INFO says more", what, ncclGetErrorString(r));
}

template <typename T> static ncclDataType_t nccl_type(T *) {
    return sizeof(T) == sizeof(bf16) ? ncclBfloat16 : ncclFloat32;
}

// A collective of a unit is on its way.
static void sent(ncclResult_t r, void *const *nccl, const char *what, const char *unit) {
    auto *c = &collectives[n_collectives++ % MAX_COLLECTIVES];
    nccl_done(r, nccl, what);
    if (!c->done) cudaCheck(cudaEventCreateWithFlags(&c->done, cudaEventDisableTiming));
    c->what = what, c->unit = unit;
    cudaCheck(cudaEventRecord(c->done, gpu.comm_stream));
}

// x (n) = its sum over all ranks, or over those with the same share
template <typename T> void comm_all_reduce(T *x, size_t n, int among_copies, const char *unit) {
    void *const *among = among_copies ? &gpu.copies : &gpu.nccl;
    sent(ncclAllReduce(x, x, n, nccl_type(x), ncclSum, (ncclComm_t)*among, gpu.comm_stream), among,
         "all-reduce", unit);
}

// x (S*n), its r-th n elements being of rank r of those that share: this rank's = their sum over these ranks.
template <typename T> void comm_reduce_scatter(T *x, size_t n, const char *unit) {
    T *own = x + n * (comm.rank % comm.shard);
    sent(ncclReduceScatter(x, own, n, nccl_type(x), ncclSum, (ncclComm_t)gpu.group, gpu.comm_stream),
         &gpu.group, "reduce-scatter", unit);
}

// x (S*n) = own (n) of each rank of those that share, one after another; own may lie in its place of x.
template <typename T> void comm_all_gather(T *x, const T *own, size_t n, const char *unit) {
    sent(ncclAllGather(own, x, n, nccl_type(x), (ncclComm_t)gpu.group, gpu.comm_stream), &gpu.group,
         "all-gather", unit);
}
#else
template <typename T> void comm_all_reduce(T *, size_t, int, const char *) {}
template <typename T> void comm_reduce_scatter(T *, size_t, const char *) {}
template <typename T> void comm_all_gather(T *, const T *, size_t, const char *) {}
#endif

// Waits for an event of the compute stream, or for all of it (NULL) and so for the sums it waits for. An
// error of NCCL, a peer that does not come, or a GPU that hangs ends the job.
void gpu_wait(cudaEvent_t event) {
    Wait w = {0, 0};
    for (cudaError_t e; (e = event ? cudaEventQuery(event) : cudaStreamQuery(gpu.stream)) != cudaSuccess;) {
        if (e != cudaErrorNotReady)
            die("the GPU stopped: %s; with CUDA_LAUNCH_BLOCKING=1 the kernel is named",
                cudaGetErrorString(e));
#ifdef USE_MPI
        for (void *nccl : {gpu.nccl, gpu.group, gpu.copies}) {
            ncclResult_t state = ncclSuccess;
            if (nccl) ncclCheck(ncclCommGetAsyncError((ncclComm_t)nccl, &state));
            if (state != ncclSuccess && state != ncclInProgress)
                die("NCCL: %s; resume with --resume auto", ncclGetErrorString(state));
        }
#endif
        comm_check_time(&w, NULL);
    }
}

void device_wait(void) { gpu_wait(NULL); }

// Ranks S*k .. S*k+S-1 share copy k.
void comm_share(int shard) {
    comm.shard = shard;
    if (comm.world == 1) return;
#ifdef USE_MPI
    gpu.group = gpu.nccl;
    if (shard == 1 || shard == comm.world) return;
    const ncclComm_t all = (ncclComm_t)gpu.nccl;
    gpu.group = NULL;
    nccl_done(ncclCommSplit(all, comm.rank / shard, comm.rank, (ncclComm_t *)&gpu.group, NULL), &gpu.nccl,
              "splitting the ranks");
    nccl_done(ncclInProgress, &gpu.group, "splitting the ranks");
    nccl_done(ncclCommSplit(all, comm.rank % shard, comm.rank, (ncclComm_t *)&gpu.copies, NULL), &gpu.nccl,
              "splitting the ranks");
    nccl_done(ncclInProgress, &gpu.copies, "splitting the ranks");
#endif
}

#ifdef USE_MPI
// Two ranks on one GPU: NCCL refuses that, also between parts of it (MIG).
static void refuse_shared_gpu(int visible) {
    char (*bus)[sizeof gpu.bus] = (char (*)[sizeof gpu.bus])xcalloc((size_t)comm.local_ranks, sizeof *bus);
    MPI_Request r;
    MPI_Iallgather(gpu.bus, sizeof *bus, MPI_CHAR, bus, sizeof *bus, MPI_CHAR, local, &r);
    comm_wait(&r, "the names of GPUs");
    for (int i = 0; i < comm.local_ranks; i++) for (int j = 0; j < i; j++) if (!strcmp(bus[i], bus[j]))
        die("ranks %d and %d of %d on this machine have the same GPU, %s (%s; %d GPUs visible); start "
            "one rank per GPU", j, i, comm.local_ranks, bus[i], gpu.device.name, visible);
    free(bus);
}
#else
static void refuse_shared_gpu(int) {}
#endif

// One GPU per rank of the machine; the NCCL id travels by MPI. --dry-run needs none.
void device_open(void) {
    int n = 0;
    if (opt.dry_run) return;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n == 0)
        die("no CUDA device answers (%s); `make train DEVICE=cpu` builds the CPU trainer",
            cudaGetErrorString(e));
    const int number = gpu.number = comm.local_rank % n;    // launchers may show each rank a GPU, as 0
    cudaCheck(cudaSetDevice(number));
    cudaDeviceProp *device = &gpu.device;
    cudaCheck(cudaGetDeviceProperties(device, number));
    cudaCheck(cudaDeviceGetPCIBusId(gpu.bus, sizeof gpu.bus, number));
    refuse_shared_gpu(n);
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
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    nccl_done(ncclCommInitRankConfig((ncclComm_t *)&gpu.nccl, comm.world, id, comm.rank, &config), &gpu.nccl,
              "NCCL's start (is the network between machines open to it?)");
#endif
}

// ---- plumbing: read it when you need it -------------------------------------------------------------------
// SHARED BEGIN
// ==== 8. Errors, numbers, options ==========================================================================
static void (*die_hook)(const char *message);   // tests leave die() through it

// A mistake of the user's or the machine's: what, where, what to do. One line; all ranks end with status 1.
// What several ranks see one should say, the lowest: the later ones hear the launcher's signal before.
void die(const char *fmt, ...) {
    char message[2048];
    va_list args;
    va_start(args, fmt);
    vsnprintf(message, sizeof message, fmt, args);
    va_end(args);
    if (die_hook) die_hook(message);
    for (int r = comm_rank(); r > 0; r >>= 1) if (usleep(500000)) _exit(EXIT_FAILURE);
    fflush(stdout);
    if (live_shown) fputs("\r\033[K", stderr);
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
void *array_room(void *p, int need, int *max, size_t size) {
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

// ---- the live line: on a terminal it stands in place of the lines of steps, below all others --------------
// mpirun puts a terminal of its own between us and the user; dev/run.sh says what the user has.
int live_wanted(void) {
    const char *run = getenv("LITESPARK_RUN"), *kind = getenv("TERM");
    const int under_mpirun = getenv("OMPI_COMM_WORLD_SIZE") != NULL;
    return (under_mpirun ? run && !strcmp(run, "terminal") : isatty(STDOUT_FILENO))
        && kind && strcmp(kind, "dumb");
}

// left [====>   ] right, over the line before, at most ten times a second: 79 columns (some terminals wrap
// after the last of 80), fewer where the terminal is narrower. done: 0 .. 1
void live_show(double done, const char *left, const char *right) {
    static double shown_at;
    struct winsize size = {0, 0, 0, 0};
    char bar[80] = "";
    const int known = !ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) && size.ws_col > 0 && size.ws_col < 80;
    const int columns = (known ? size.ws_col : 80) - 1;
    const int room = columns - (int)strlen(left) - (int)strlen(right) - 4, full = (int)(done * room);
    if (live_shown && now_seconds() - shown_at < 0.1) return;
    for (int i = 0; i < room; i++) bar[i] = i < full ? '=' : i == full ? '>' : ' ';
    const Str line = room > 2 ? str("%s [%s] %s", left, bar, right) : str("%s | %s", left, right);
    printf("\r%.*s\033[K", columns, line.s);
    fflush(stdout);
    shown_at = now_seconds();
    live_shown = 1;
}

void live_end(void) {
    if (live_shown) fputs("\r\033[K", stdout);
    live_shown = 0;
    fflush(stdout);
}

double now_seconds(void) {          // differences only: the zero is arbitrary, and the clock never jumps
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Time in which this process was itself stopped, as batch systems do with a job, is no waiting for others.
double wait_more(Wait *w) {
    const double now = now_seconds();
    if (w->last > 0 && now - w->last < 1) w->seconds += now - w->last;
    w->last = now;
    return w->seconds;
}

// The start and the end of MPI wait for all ranks, without a limit; a clock that ticks each second sets one.
// A stopped process hears no ticks.
static volatile sig_atomic_t ticks_left;
static char too_late[200];

static void on_tick(int number) {   // a signal handler: no die
    (void)number;
    if (--ticks_left > 0) return;
    if (write(STDERR_FILENO, too_late, strlen(too_late))) {}
    _exit(EXIT_FAILURE);
}

// From here on the job ends after --timeout seconds, unless wait_limit(NULL) comes before.
void wait_limit(const char *what) {
    const struct itimerval ticks = {{what != NULL, 0}, {what != NULL, 0}};
    snprintf(too_late, sizeof too_late, "error: rank %d: waited %d s for the other ranks in %s: one is dead "
             "or stuck; resume with --resume auto (or raise --timeout)\n", comm_rank(), (int)opt.timeout,
             what ? what : "");
    ticks_left = (int)opt.timeout;
    for (int r = comm_rank(); r > 0; r >>= 1) ticks_left++;     // as in die
    if (what) signal(SIGALRM, on_tick);
    setitimer(ITIMER_REAL, &ticks, NULL);
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

// ---- what the system lets a process have ------------------------------------------------------------------
int read_number(const char *path, double *x) {
    FILE *f = fopen(path, "r");
    int ok = f && fscanf(f, "%lf", x) == 1;
    if (f) fclose(f);
    return ok;
}

// *limit becomes x if that is less. A file that says "max" (version 2) has no number, -1 (version 1) is none.
void take_limit(double *limit, double x) { if (x > 0 && x < *limit) *limit = x; }

// What control groups let this process have, in cores and bytes: the least of its group and those above it.
// Version 2 has one tree of groups, version 1 one for each kind of resource.
void cgroup_limits(const char *groups, const char *folder, double *cores, double *memory) {
    *cores = *memory = INFINITY;
    FILE *f = fopen(groups, "r");
    for (char line[1200]; f && fgets(line, sizeof line, f);) {
        char kinds[102] = ",", path[1001] = "";
        if (sscanf(line, "%*d::%1000[^\n]", path) != 1 &&
            sscanf(line, "%*d:%99[^:]:%1000[^\n]", kinds + 1, path) != 2) continue;
        strcat(kinds, ",");
        for (char *end = path + strlen(path); end; end = strrchr(path, '/')) {
            double bytes, quota, period;
            *end = 0;
            if (!kinds[2]) {
                FILE *max = fopen(str("%s%s/cpu.max", folder, path).s, "r");
                if (max && fscanf(max, "%lf %lf", &quota, &period) == 2) take_limit(cores, quota / period);
                if (max) fclose(max);
                if (read_number(str("%s%s/memory.max", folder, path).s, &bytes)) take_limit(memory, bytes);
            }
            if (strstr(kinds, ",cpu,") &&
                read_number(str("%s/cpu%s/cpu.cfs_quota_us", folder, path).s, &quota) &&
                read_number(str("%s/cpu%s/cpu.cfs_period_us", folder, path).s, &period))
                take_limit(cores, quota / period);
            if (strstr(kinds, ",memory,") &&
                read_number(str("%s/memory%s/memory.limit_in_bytes", folder, path).s, &bytes))
                take_limit(memory, bytes);
        }
    }
    if (f) fclose(f);
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
// missing, a folder, not readable, the pointer that Git LFS leaves for a file it has not fetched.
static int open_regular(const char *path, const char *what, size_t *bytes) {
    struct stat st;
    if (stat(path, &st) != 0) die("cannot open %s '%s': %s", what, path, strerror(errno));
    if (S_ISDIR(st.st_mode)) die("%s '%s' is a folder; name a file in it", what, path);
    if (!S_ISREG(st.st_mode)) die("%s '%s' is not a file; name the file itself", what, path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) die("cannot open %s '%s': %s", what, path, strerror(errno));
    static const char lfs[] = "version https://git-lfs";
    char head[sizeof lfs - 1];
    if (st.st_size < 1024 && pread(fd, head, sizeof head, 0) == sizeof head
        && !memcmp(head, lfs, sizeof head))
        die("%s '%s' is a Git LFS pointer, not the file it stands for; `git lfs pull` fetches that",
            what, path);
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

// The files that `pattern` means, sorted by name; 0: none. As much of its front as is there under exactly
// that name is no pattern: the folder 'run[1]' of 'run[1]/*.bin'. The caller calls globfree.
static int find_files(const char *pattern, glob_t *found) {
    size_t n = strlen(pattern);
    while (n && access(str("%.*s", (int)n, pattern).s, F_OK))
        for (n--; n && pattern[n - 1] != '/'; n--) {}
    Text escaped = {NULL, 0, 0};
    for (size_t i = 0; i < n; i++) text_add(&escaped, "\\%c", pattern[i]);
    text_add(&escaped, "%s", pattern + n);
    const int failed = glob(escaped.s, GLOB_ERR, NULL, found);
    const int absent = failed == GLOB_NOMATCH || (failed && errno == ENOENT);   // no file, or no such folder
    if (failed && !absent) die("cannot look for '%s': %s", pattern, strerror(errno));
    free(escaped.s);
    return !failed;
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

static const char dpo_formulas[] =
    "Loss of a pair (--stage dpo). c and r are log p of the chosen and the rejected answer, policy minus\n"
    "reference, sums over their n_c and n_r tokens; s = log sigmoid, b = --dpo-beta,\n"
    "e = --dpo-label-smoothing.\n"
    "  sigmoid  z = b (c - r)          -(1-e) s(z) - e s(-z)   e > 0: conservative DPO (TRL ignores e here)\n"
    "  norm     z = b (c/n_c - r/n_r)  -(1-e) s(z) - e s(-z)   TRL's sigmoid_norm\n"
    "  robust   z = b (c - r)          (-(1-e) s(z) + e s(-z)) / (1 - 2e)\n"
    "  ipo      (c/n_c - r/n_r - 1/(2b))^2\n"
    "The objective is the mean over all pairs of the update, plus --dpo-sft-weight times the mean nll over\n"
    "all targets of its chosen answers (TRL takes that mean per micro-batch).\n";

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
        for (int i = 0; i < COUNT(refused); i++) if (!strcmp(refused[i].option, o->name))
            printf("  %-24s   %s%s%s\n", "", refused[i].value ? refused[i].value : "",
                   refused[i].value ? " " : "", refused[i].why);
    }
    printf("\n%s", dpo_formulas);
}

// --timeout alone, before all: the start of MPI waits already. What is wrong with it, options_parse says.
void options_parse_timeout(int argc, char **argv) {
    options_default();
    const Option *o = option_find("--timeout");
    int64_t x;
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], o->name) || !parse_int(argv[i + 1], &x)) continue;
        if ((double)x >= o->lo && (double)x <= o->hi) opt.timeout = x;
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

// A line per option that is given; not --threads, for results do not depend on it.
void options_text(Text *t) {
    for (const Option *o = option_table; o < option_table + COUNT(option_table); o++)
        if (o->given && strcmp(o->name, "--threads"))
            text_add(t, "%s %s\n", o->name, o->type == OPT_FLAG ? "" : o->text);
    text_add(t, "no more\n");
}

// Whether --profile names this step; dies if it is no range of steps.
int profile_has(int64_t step) {
    int64_t first = 0, last = 0;
    char more;
    if (!opt.profile) return 0;
    const int n = sscanf(opt.profile, "%" SCNd64 ":%" SCNd64 "%c", &first, &last, &more);
    if (n != 2 || first < 1 || last < first)
        die("--profile %s: write FIRST:LAST, two steps, such as 10:12", opt.profile);
    return step >= first && step <= last;
}

// What can be said against the options without looking at any file.
void options_check(void) {
    if (!!opt.preset + !!opt.config + !!opt.init_from > 1)
        die("choose one of --preset, --config and --init-from");
    Config c;
    if (opt.preset && !config_preset(&c, opt.preset))
        die("--preset %s is unknown; choose one of%s", opt.preset, config_preset_names());
    if (opt.resume && strcmp(opt.resume, "auto") && opt.init_from)
        die("--resume DIR continues a run with its weights, without --init-from; --resume auto may have "
            "--init-from, for its first start");
    if (opt.eval_only + opt.generate + opt.dry_run + !!opt.dump_grads > 1)
        die("choose one of --eval-only, --generate, --dry-run and --dump-grads");
    if ((opt.generate || opt.eval_only) && !opt.init_from && !opt.resume)
        die("--generate and --eval-only need a trained model: name one with --init-from or --resume");
    if (opt.val_data && !*opt.val_data) die("--val-data is empty; name a file or leave it out");
    if (opt.eval_tasks && !*opt.eval_tasks) die("--eval-tasks is empty; name a file or leave it out");
    if (!*opt.out) die("--out is empty; name a folder");
    if (!opt.generate) options_check_texts();
    profile_has(0);
    plan_check();
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
    size_t begin, end;     // its bytes in the source
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
    const int pair = code >= 0xD800 && code <= 0xDBFF, low = pair ? json_hex4(p->at + 6) : 0xDC00;
    if (code < 0 || (code >= 0xDC00 && code <= 0xDFFF) || low < 0xDC00 || low > 0xDFFF)
        json_fail(p, "an escape: \\\" \\\\ \\/ \\b \\f \\n \\r \\t, or \\uXXXX with surrogates in pairs");
    p->at += pair ? 12 : 6;
    if (pair) code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
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
    v->begin = (size_t)(p->at - p->text);
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
    v->end = (size_t)(p->at - p->text);
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

// The member `key`, be it null; NULL when obj is not an object or has none.
static const Json *json_member(const Json *obj, const char *key) {
    if (!obj || obj->type != 'o') return NULL;
    for (const Json *e = obj->child; e; e = e->next) if (!strcmp(e->key, key)) return e;
    return NULL;
}

// The value of `key`; NULL when obj is not an object, or when the key is absent or null.
const Json *json_get(const Json *obj, const char *key) {
    const Json *e = json_member(obj, key);
    return e && e->type != '0' ? e : NULL;
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

// Appends s as a JSON string, quotes included. Bytes that are not UTF-8 (names of files may have such) become
// U+FFFD.
void text_add_string(Text *t, const char *s) {
    text_add(t, "\"");
    for (const char *end = s + strlen(s); s < end;) {
        const int n = utf8_length(s, (size_t)(end - s));
        if (*s == '"' || *s == '\\') text_add(t, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) text_add(t, "\\u%04x", *s);
        else if (n) text_add(t, "%.*s", n, s);
        else text_add(t, "\\ufffd");
        s += n ? n : 1;
    }
    text_add(t, "\"");
}

// All text that goes into log and checkpoints; dies of an option that could not be read from there again.
void options_check_texts(void) {
    for (const Option *o = option_table; o < option_table + COUNT(option_table); o++) {
        if (o->type != OPT_TEXT || !o->given) continue;
        const char *s = option_text(o), *end = s + strlen(s);
        for (int n; s < end; s += n)
            if (!(n = utf8_length(s, (size_t)(end - s))))
                die("%s: this is not UTF-8, as log and checkpoints are; give the file or folder another name",
                    o->name);
    }
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
enum { ST_MAX_HEADER = 100000000, /* the library's limit, too */ ST_MAX_DIMS = 4,
       ST_PIECE = 1 << 16 /* 16-bit values on a thread's stack */,
       ST_PART = 1 << 20 /* bytes that a thread writes at a time */ };

typedef struct StTensor {
    const char *name;
    int dtype, n_dims, file;        // file: index into StSet.files
    int64_t shape[ST_MAX_DIMS];     // 0 beyond n_dims
    size_t offset, n_bytes, n;      // offset from the start of the file; n = elements
} StTensor;

typedef struct StFile {
    char *path;
    int fd;
    Json *header;                   // owns the names
} StFile;

struct StSet {                      // the tensors of one checkpoint, sorted by name
    StTensor *tensors;
    int n_tensors, max_tensors;
    StFile *files;
    int n_files, max_files;
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
    int first = s->n_tensors;
    struct rlimit open_files;       // thousands of ranks write as many files, and all stay open
    if (s->n_files == 64 && !getrlimit(RLIMIT_NOFILE, &open_files)) {
        open_files.rlim_cur = open_files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &open_files);
    }
    s->files = (StFile *)array_room(s->files, s->n_files + 1, &s->max_files, sizeof *s->files);
    StFile *f = &s->files[s->n_files++];
    // room for one even where there is none: qsort wants no NULL
    s->tensors = (StTensor *)array_room(s->tensors, first + 1, &s->max_tensors, sizeof *s->tensors);
    f->fd = open_regular(path, "weights", &size);
    f->path = xstrdup(path);
    if (size < 8) die("%s: %zu bytes are too few for a safetensors file", path, size);
    read_exactly(f->fd, path, &n_header, 8, 0);
    if (n_header > size - 8 || n_header > ST_MAX_HEADER)
        die("%s: a header of %" PRIu64 " bytes in a file of %zu: truncated, or no safetensors file",
            path, n_header, size);
    char *text = (char *)xmalloc((size_t)n_header + 1);
    read_exactly(f->fd, path, text, (size_t)n_header, 8);
    Json *header = f->header = json_parse(text, (size_t)n_header, path);
    free(text);
    if (header->type != 'o') die("%s: the header is no JSON object", path);
    size_t start = 8 + (size_t)n_header, at = start;
    for (const Json *e = header->child; e; e = e->next) {
        if (strcmp(e->key, "__metadata__")) st_add_tensor(s, e, path, start, size - start);
        else if (e->type != 'o' && e->type != '0') die("%s: __metadata__ is no JSON object", path);
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
            die("%s and %s both hold tensor %s", s->files[t[0].file].path, s->files[t[1].file].path, t->name);
}

// Opens every file that the index names. Which tensors there are, the files say: some indexes list tensors
// that are in none, or leave some out.
static void st_open_index(StSet *s, const char *folder, const char *index_path) {
    Json *index = json_read_file(index_path, ST_MAX_HEADER);
    const Json *map = json_get(index, "weight_map");
    if (!map || map->type != 'o') die("%s: \"weight_map\" is no JSON object", index_path);
    for (const Json *e = map->child; e; e = e->next) {
        int f = s->n_files - 1;
        if (e->type != 's' || !*e->str || strlen(e->str) != e->str_len || strchr(e->str, '/'))
            die("%s: tensor %s: expected the name of a file in the same directory", index_path, e->key);
        Str path = str("%s/%s", folder, e->str);
        while (f >= 0 && strcmp(s->files[f].path, path.s)) f--;
        if (f < 0) st_add_file(s, path.s);
    }
    if (!s->n_files) die("%s: \"weight_map\" names no file", index_path);
    free(index);
}

// Opens all files that match the pattern as one set; NULL when none does.
static StSet *st_open_all(const char *pattern) {
    StSet *s = (StSet *)xcalloc(1, sizeof *s);
    glob_t found;
    if (!find_files(pattern, &found)) return NULL;
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
    const char *path = s->files[t->file].path;
    const size_t size = st_dtypes[t->dtype].bytes;
    assert(first <= t->n && count <= t->n - first);
    if (t->dtype > ST_F16)
        die("%s: tensor %s has dtype %s; expected F32, BF16 or F16", path, t->name, st_dtypes[t->dtype].name);
    size_t offset = t->offset + first * size;
    if (t->dtype == ST_F32) {
        read_exactly(s->files[t->file].fd, path, out, count * size, offset);
        return;
    }
    uint16_t half[ST_PIECE];
    for (size_t n; count; count -= n, offset += n * size, out += n) {
        n = min_size(count, ST_PIECE);
        read_exactly(s->files[t->file].fd, path, half, n * size, offset);
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
        close(s->files[f].fd);
        free(s->files[f].path);
        free(s->files[f].header);
    }
    free(s->files);
    free(s->tensors);
    free(s);
}

// Tells the weights in a folder from others without reading them all: the CRC-32 of the size and the first
// bytes of checksums.txt, where there is one, else of each file.
uint32_t weights_crc(const char *dir) {
    const Str sums = str("%s/checksums.txt", dir);
    const int ours = !access(sums.s, F_OK);
    StSet *s = ours ? NULL : st_open(dir);
    uint32_t crc = 0;
    for (int i = 0; i < (ours ? 1 : s->n_files); i++) {
        char start[4096];
        size_t bytes;
        const char *path = ours ? sums.s : s->files[i].path;
        const int fd = open_regular(path, "file", &bytes);
        const size_t n = read_at(fd, path, start, sizeof start, 0);
        crc = crc32_update(crc32_update(crc, &bytes, sizeof bytes), start, n);
        close(fd);
    }
    if (s) st_close(s);
    return crc;
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
    char *image;                // not NULL: memory that the bytes go to instead of a file
};

// MPI is the main thread's; a checkpoint may be written by another one (section 15), whose signs of life the
// main thread passes on.
static __thread int is_writer;
static int64_t writer_signs;

static void say_busy(void) {
    if (is_writer) __atomic_add_fetch(&writer_signs, 1, __ATOMIC_RELAXED);
    else comm_busy();
}

static void st_put_at(StWriter *w, size_t place, const void *bytes, size_t n) {
    const char *p = (const char *)bytes;
    if (w->image) memcpy(w->image + place, p, n), n = 0;
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

// Creates (or empties) the file.
static void st_create_file(StWriter *w, const char *path) {
    w->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->fd < 0) w->failed = errno;
}

// path NULL: no file yet. metadata: a JSON object of strings such as {"format":"pt"}, or NULL.
StWriter *st_create(const char *path, const char *metadata) {
    StWriter *w = (StWriter *)xcalloc(1, sizeof *w);
    w->fd = -1;
    if (path) st_create_file(w, path);
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

// Bytes of the file, once all tensors are declared and before st_begin.
static size_t st_bytes(const StWriter *w) {
    return 8 + CEIL_DIV((size_t)w->header.n + 1, 8) * 8 + w->data_bytes;
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

static void st_put_part(StWriter *w, size_t place, const void *bytes, size_t n) {
    st_put_at(w, place, bytes, n);
    if (w->image) return;
    say_busy();
    // a GiB at a time, for the last fsync of a large file would take minutes without a sign of life
    if (place >> 30 != (place + n) >> 30 && fdatasync(w->fd) && !w->failed) w->failed = errno;
}

// crc: of bytes that end at `place`, which some thread has written.
static void st_add_crc(StWriter *w, size_t place, uint32_t crc) {
    crc = crc32_before(crc, w->end - place);
    #pragma omp atomic
    w->crc ^= crc;
}

void st_write_at(StWriter *w, size_t place, const float *values, size_t count) {
    uint16_t half[ST_PIECE];
    uint32_t crc = 0;
    for (size_t n; count; count -= n, values += n) {
        const void *bytes = w->dtype == ST_F32 ? (const void *)values : half;
        n = min_size(count, ST_PIECE);
        for (size_t i = 0; i < n && w->dtype == ST_BF16; i++) half[i] = st_float_to_bf16(values[i]);
        const size_t n_bytes = n * st_dtypes[w->dtype].bytes;
        if (!w->image) crc = crc32_update(crc, bytes, n_bytes);
        st_put_part(w, place, bytes, n_bytes);
        place += n_bytes;
    }
    st_add_crc(w, place, crc);
}

// A file of n bytes that lie in memory, by n_threads. Returns 0 or an errno.
static int st_write_file(const char *path, const char *data, size_t n, int n_threads, uint32_t *crc) {
    StWriter *w = st_create(path, NULL);
    w->end = w->taken = n;
    (void)n_threads;                            // without OpenMP
    #pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (size_t at = 0; at < n; at += ST_PART) {
        const size_t k = min_size(n - at, ST_PART);
        st_put_part(w, at, data + at, k);
        st_add_crc(w, at + k, crc32_update(0, data + at, k));
    }
    return st_finish(w, crc, NULL);
}

// The next elements.
void st_write(StWriter *w, const float *values, size_t count) {
    st_write_at(w, st_take(w, count), values, count);
}

// Fsyncs, closes, frees; all declared values must have come. Returns 0 or the errno of the first failure.
// With 0, *crc (of the whole file) and *file_bytes are known; NULL: not asked for.
int st_finish(StWriter *w, uint32_t *crc, size_t *file_bytes) {
    assert(!w->end || w->taken == w->end);
    if (!w->failed && !w->image && fsync(w->fd)) w->failed = errno;
    if (w->fd >= 0 && close(w->fd) && !w->failed) w->failed = errno;
    int failed = w->failed;
    if (crc) *crc = w->crc;
    if (file_bytes) *file_bytes = w->taken;
    free(w->header.s); free(w);
    return failed;
}

// ==== 11. Model configuration: Hugging Face's config.json and the presets ==================================
// The integers of a model: field, key in config.json, smallest and largest value, what null means.
#define CONFIG_INTS(X) \
    X(V,     "vocab_size",              2, 1 << 24, JSON_REQUIRED) \
    X(L,     "num_hidden_layers",       1, 1 << 12, JSON_REQUIRED) \
    X(C,     "hidden_size",             1, 1 << 20, JSON_REQUIRED) \
    X(H,     "num_attention_heads",     1, 1 << 14, JSON_REQUIRED) \
    X(K,     "num_key_value_heads",     1, 1 << 14, 0 /* = H */)   \
    X(D,     "head_dim",                1, 1 << 14, 0 /* = C/H */) \
    X(F,     "intermediate_size",       1, 1 << 22, JSON_REQUIRED) \
    X(max_T, "max_position_embeddings", 1, 1 << 28, JSON_REQUIRED)
// The numbers, and what null or an absent key means.
#define CONFIG_NUMBERS(X) \
    X(eps,      "rms_norm_eps",      0, 1, 1e-6) \
    X(init_std, "initializer_range", 0, 1, 0.02)

// Absent keys mean the defaults of these classes in transformers 5.24.0 (configuration_llama.py and such),
// so do the numbers above, rope_theta 10000 and tie_word_embeddings false. dev/test_hf.py compares them all.
static const Family config_families[] = {
    // bias of q, k, v; norm of q, k; sliding_window;
    //     V, L, C, H, K (0: H), D (0: C/H), F, max_T, sliding_window, bos, eos
    {"llama",   "LlamaForCausalLM",   0, 0, WINDOW_IGNORED,
         32000, 32, 4096, 32,  0,   0, 11008,   2048,    0,  1,  2},
    {"mistral", "MistralForCausalLM", 0, 0, WINDOW_COUNTS,
         32000, 32, 4096, 32,  8,   0, 14336, 131072, 4096,  1,  2},
    {"qwen2",   "Qwen2ForCausalLM",   1, 0, WINDOW_SWITCHED,
        151936, 32, 4096, 32, 32,   0, 22016,  32768, 4096, -1, -1},
    {"qwen3",   "Qwen3ForCausalLM",   0, 1, WINDOW_SWITCHED,
        151936, 32, 4096, 32, 32, 128, 22016,  32768, 4096, -1, -1},
};

// Keys that would change the computation, the one value that we compute, and the families that have the key.
static const struct { const char *key, *only, *families; } config_fixed[] = {
    {"hidden_act", "silu", NULL}, {"attention_bias", "false", "llama qwen3"}, {"mlp_bias", "false", "llama"},
    {"attention_dropout", "0", NULL}, {"partial_rotary_factor", "1", NULL},
    {"quantization_config", "null", NULL}, {"quantization", "null", NULL}, {"num_experts", "0", NULL},
    {"num_local_experts", "0", NULL}, {"n_routed_experts", "0", NULL}, {"num_experts_per_tok", "0", NULL},
    {"moe_intermediate_size", "0", NULL}, {"is_causal", "true", NULL}, {"per_layer_config", "null", NULL},
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
    if (!strcmp(c->family->name, "llama") && c->C % c->H)       // its class insists, with a head_dim, too
        die("%s: \"hidden_size\" is %d; expected a multiple of \"num_attention_heads\", %d",
            where, c->C, c->H);
    if (c->D % 8 || c->D > 128)
        die("%s: \"head_dim\" is %d; expected a multiple of 8 up to 128", where, c->D);
    if (c->rope_factor > 0 && !(c->rope_low < c->rope_high))
        die("%s: \"high_freq_factor\" is %g; expected more than \"low_freq_factor\", %g",
            where, c->rope_high, c->rope_low);
    if (c->bos >= c->V || c->pad >= c->V)
        die("%s: \"%s\" is %d; expected a token id below \"vocab_size\", %d", where,
            c->bos >= c->V ? "bos_token_id" : "pad_token_id", c->bos >= c->V ? c->bos : c->pad, c->V);
    if (config_params(c) >= 0x1p40)
        die("%s: the model has %.3g parameters; expected fewer than %.3g", where, config_params(c), 0x1p40);
}

static void text_add_id(Text *t, int id) { text_add(t, id < 0 ? "null" : "%d", id); }

// null, a number or a list of them
static void config_add_eos(Text *t, const Config *c) {
    text_add(t, c->n_eos > 1 ? "[" : "");
    for (int i = 0; i < c->n_eos || i == 0; i++) {
        text_add(t, i ? ", " : "");
        text_add_id(t, i < c->n_eos ? c->stops[i] : -1);
    }
    text_add(t, c->n_eos > 1 ? "]" : "");
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
    if (c->family->windows == WINDOW_COUNTS) {
        text_add(&t, "  \"sliding_window\": ");
        text_add_id(&t, c->sliding_window ? c->sliding_window : -1);
        text_add(&t, ",\n");
    }
    text_add(&t, "  \"rope_theta\": %s,\n  \"rope_scaling\": ", json_decimal(c->rope_theta));
    if (c->rope_factor > 0) config_add_rope(&t, c, /*with_theta=*/0);
    else text_add(&t, "null");
    text_add(&t, ",\n  \"rope_parameters\": ");
    config_add_rope(&t, c, /*with_theta=*/1);
    text_add(&t, ",\n  \"bos_token_id\": ");
    text_add_id(&t, c->bos);
    text_add(&t, ",\n  \"eos_token_id\": ");
    config_add_eos(&t, c);
    text_add(&t, ",\n%s  \"dtype\": \"%s\",\n  \"torch_dtype\": \"%s\"\n}\n", c->rest ? c->rest : "",
             dtype, dtype);
    return t.s;
}

// RoPE: transformers 4 writes rope_theta and, unless plain, rope_scaling; transformers 5 puts all into
// rope_parameters. As there, rope_scaling wins over rope_parameters, rope_theta inside over one outside, but
// original_max_position_embeddings outside over one inside (when 5.24.0 builds the model; AutoConfig alone
// still shows the one inside).
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
    const char *original = "original_max_position_embeddings";
    if (json_get(j, original)) rope = j;
    c->rope_original_T = (int)json_int(rope, original, where, 1, 1 << 28, c->max_T);
}

// Sliding windows: Llama's class ignores them, Mistral's has them in all layers, Qwen's in those that
// layer_types names, else from max_window_layers on, if use_sliding_window says so.
static void config_read_window(Config *c, const Json *j, const char *where) {
    const Json *types = json_get(j, "layer_types");
    int sliding = 0;
    if (types && (types->type != 'a' || types->n != c->L))
        json_refuse(types, "layer_types", where, str("a list of \"num_hidden_layers\", %d, words", c->L).s);
    if (c->family->windows == WINDOW_IGNORED) return;
    if (c->family->windows == WINDOW_SWITCHED) {
        const int most = (int)json_int(j, "max_window_layers", where, 0, INT_MAX, 28);
        const int on = json_bool(j, "use_sliding_window", where, 0) && (types || c->L > most);
        for (const Json *e = types ? types->child : NULL; e; e = e->next) {
            int slides = e->type == 's' && !strcmp(e->str, "sliding_attention");
            if (!slides && (e->type != 's' || strcmp(e->str, "full_attention")))
                json_refuse(e, "layer_types", where, "\"full_attention\" or \"sliding_attention\"");
            sliding += slides;
        }
        if (sliding && (!on || (json_member(j, "sliding_window") && !json_get(j, "sliding_window"))))
            die("%s: \"layer_types\" has \"sliding_attention\"; expected \"use_sliding_window\" true and "
                "a \"sliding_window\" with it", where);
        if (!on || (types && !sliding)) return;
    }
    if (!json_member(j, "sliding_window") || json_get(j, "sliding_window"))     // null: none
        c->sliding_window = (int)json_int(j, "sliding_window", where, 1, INT_MAX, c->family->sliding_window);
}

// The id of `key`; absent: the class's; null and negative numbers: -1, none.
static int config_read_id(const Json *j, const char *key, const char *where, int absent) {
    int id = (int)json_int(j, key, where, INT_MIN, INT_MAX, json_member(j, key) ? -1 : absent);
    return id < 0 ? -1 : id;
}

// Adds "eos_token_id", one or a list, to the ids that end a text.
static void config_read_eos(Config *c, const Json *j, const char *where) {
    const Json *eos = json_get(j, "eos_token_id"), *list = eos && eos->type == 'a' ? eos->child : NULL;
    for (const Json *e = list ? list : eos && eos->type != 'a' ? eos : NULL; e; e = list ? e->next : NULL) {
        int known = e->inum < 0;                // none
        for (int i = 0; i < c->n_stops; i++) known |= c->stops[i] == e->inum;
        if (!e->is_int || e->inum >= c->V || (!known && c->n_stops == MAX_STOPS))
            json_refuse(e, "eos_token_id", where,
                        str("at most %d token ids below \"vocab_size\", %d", MAX_STOPS, c->V).s);
        if (!known) c->stops[c->n_stops++] = (int)e->inum;
    }
}

// Whether a key that config_to_json does not write means something to us.
static int config_reads(const Config *c, const char *key) {
    static const char *const windows[] = {"use_sliding_window", "sliding_window", "max_window_layers",
                                          "layer_types"};
    for (int i = 0; i < COUNT(windows); i++)
        if (!strcmp(key, windows[i])) return c->family->windows == WINDOW_SWITCHED;
    for (int i = 0; i < COUNT(config_fixed); i++) if (!strcmp(key, config_fixed[i].key))
        return !config_fixed[i].families || strstr(config_fixed[i].families, c->family->name) != NULL;
    return !strcmp(key, "pad_token_id");
}

// Collects the members that config_to_json would not write: what we do not know must still reach checkpoints.
static void config_keep_rest(Config *c, const Json *j, const char *text) {
    Text rest = {NULL, 0, 0}, keys = {NULL, 0, 0};
    char *written = config_to_json(c, "");
    Json *known = json_parse(written, strlen(written), "config.json");
    for (const Json *e = j->child; e; e = e->next) {
        int in_rope = c->rope_factor > 0 && !strcmp(e->key, "original_max_position_embeddings");
        if (json_member(known, e->key) || in_rope) continue;
        text_add(&rest, "  ");
        text_add_string(&rest, e->key);
        text_add(&rest, ": %.*s,\n", (int)(e->end - e->begin), text + e->begin);
        if (config_reads(c, e->key)) continue;
        text_add(&keys, "%s", keys.n ? ", " : "");
        text_add_string(&keys, e->key);
    }
    c->rest = rest.s, c->rest_keys = keys.s;
    free(known);
    free(written);
}

// Reads and checks config.json of transformers 4 or 5; dies naming `where`, the key, its value and what was
// expected. Where nothing else is said null means absent.
void config_from_json(Config *c, const char *text, size_t n, const char *where) {
    Json *j = json_parse(text, n, where);
    memset(c, 0, sizeof *c);
    if (j->type != 'o') die("%s: expected a JSON object", where);
    if (!config_set_family(c, json_string(j, "model_type", where, NULL)))
        json_refuse(json_get(j, "model_type"), "model_type", where, "llama, mistral, qwen2 or qwen3");
    for (int i = 0; i < COUNT(config_fixed); i++) {
        const Json *v = json_get(j, config_fixed[i].key);
        const char *only = config_fixed[i].only, *families = config_fixed[i].families;
        int same = !v || (families && !strstr(families, c->family->name)) ||
                   (v->type == 's' ? !strcmp(v->str, only) : v->type == 'f' ? !strcmp(only, "false") :
                    v->type == 't' ? !strcmp(only, "true") :
                          v->type == 'n' && isdigit((unsigned char)*only) && v->num == atof(only));
        if (!same) json_refuse(v, config_fixed[i].key, where, only);
    }
#define READ_INT(field, key, lo, hi, null) \
    c->field = (int)json_int(j, key, where, lo, hi, json_member(j, key) ? null : c->family->field);
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
    c->bos = config_read_id(j, "bos_token_id", where, c->family->bos);
    c->pad = config_read_id(j, "pad_token_id", where, -1);
    config_read_eos(c, j, where);
    const int eos = json_member(j, "eos_token_id") ? -1 : c->family->eos;
    if (eos >= 0 && eos < c->V) c->stops[c->n_stops++] = eos;
    c->n_eos = c->n_stops;
    config_check(c, where);
    config_keep_rest(c, j, text);
    free(j);
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
    COPY(tied) COPY(rope_theta) COPY(rope_factor) COPY(sliding_window) COPY(bos)
#undef COPY
    c->pad = -1;
    c->n_eos = c->n_stops = config_presets[i].eos >= 0;
    if (c->n_eos) c->stops[0] = config_presets[i].eos;
    config_set_vocab(c, c->V);
    if (c->rope_factor > 0) { c->rope_low = 1; c->rope_high = 4; c->rope_original_T = 8192; }
    config_check(c, name);
    return 1;
}

void config_presets_help(void) {
    printf("%-14s %-8s %12s %10s %7s %6s\n", "preset", "family", "M parameters", "vocabulary", "layers",
           "hidden");
    for (int i = 0; i < COUNT(config_presets); i++) {
        Config c;
        config_preset(&c, config_presets[i].name);
        printf("%-14s %-8s %12.1f %10d %7d %6d\n", config_presets[i].name, c.family->name,
               config_params(&c) / 1e6, c.V, c.L, c.C);
    }
    printf("tiny takes the vocabulary of its data\n");
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

// The table of a model whose units are shared by `shard` ranks.
void param_table_build(ParamTable *p, const Config *c, int shard) {
    memset(p, 0, sizeof *p);
    p->units = (Unit *)xcalloc((size_t)c->L + 2, sizeof(Unit));
    p->tensors = (Tensor *)xcalloc(((size_t)c->L + 2) * MAX_TENSORS_PER_UNIT, sizeof(Tensor));
    p->unit_align = (size_t)UNIT_ALIGN * shard;
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

// Where a shared unit is whole, in elements from the first slot on: one slot for the embedding, one for the
// head, two in turn for the layers, which are of one size.
size_t slot_at(const ParamTable *p, int u) {
    const Unit *embed = &p->units[UNIT_EMBED], *head = &p->units[p->n_units - 1];
    if (u == UNIT_EMBED) return 0;
    if (u == p->n_units - 1) return embed->n_padded;
    return embed->n_padded + head->n_padded + (size_t)((u - UNIT_LAYER) % 2) * p->units[u].n_padded;
}

size_t slots_size(const ParamTable *p) {
    const int layers = p->n_units - 2;
    return p->units[UNIT_EMBED].n_padded + p->units[p->n_units - 1].n_padded
         + (size_t)(layers < 2 ? layers : 2) * p->units[UNIT_LAYER].n_padded;
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
    Str generation = str("%s/generation_config.json", dir_or_file);
    size_t n;
    char *text = read_text_file(path.s, 1 << 24, &n);
    config_from_json(&c, text, n, path.s);
    free(text);
    if (!is_dir || access(generation.s, F_OK)) return c;
    Json *j = json_read_file(generation.s, 1 << 24);
    config_read_eos(&c, j, generation.s);
    free(j);
    return c;
}

// What a model computes, as far as names and shapes of its weights do not tell.
Str config_arithmetic(const Config *c) {
    return str("%d query heads, %d key heads, head_dim %d, rms_norm_eps %.9g, rope_theta %.9g, rope_scaling "
               "%.9g %.9g %.9g %d", c->H, c->K, c->D, c->eps, c->rope_theta, c->rope_factor,
               c->rope_factor > 0 ? c->rope_low : 0, c->rope_factor > 0 ? c->rope_high : 0,
               c->rope_factor > 0 ? c->rope_original_T : 0);
}

// The weights of `dir` are to run as the model c: dies if its own config.json has them run otherwise.
void config_check_reference(const Config *c, const char *dir) {
    const Config its = read_config(dir, 1);
    const Str a = config_arithmetic(&its), b = config_arithmetic(c);
    if (strcmp(a.s, b.s))
        die("%s is another model than the one in training: %s, not %s; a reference may differ in its weights "
            "alone", dir, a.s, b.s);
}

// The model of --preset, --config, --init-from or the checkpoint resume_dir (or NULL). V 0: the data decides.
Config choose_config(const char *resume_dir) {
    Config c;
    const char *preset = opt.preset ? opt.preset : "tiny";
    if (opt.init_from) return read_config(opt.init_from, 1);
    if (opt.config) c = read_config(opt.config, 0);
    else config_preset(&c, preset);
    if (!opt.config && !strcmp(preset, "tiny")) c.V = 0;
    if (!resume_dir) return c;
    Config saved = read_config(resume_dir, 1);
    if (opt.preset || opt.config) {
        Config d = saved;
        if (!c.V) {
            config_set_vocab(&c, d.V);
            c.bos = d.bos, c.n_eos = d.n_eos;
            memcpy(c.stops, d.stops, sizeof c.stops);
        }
        c.rest = d.rest = NULL;
        char *a = config_to_json(&c, "float32"), *b = config_to_json(&d, "float32");
        if (strcmp(a, b))
            die("--resume %s: the checkpoint holds another model than %s; leave that option out "
                "or name another --out", resume_dir, opt.preset ? "--preset" : "--config");
        free(a), free(b);
    }
    return saved;
}

// ==== 12. Tokenizer: text -> ids for prompts, ids -> bytes for samples =====================================
// Two file formats, both little endian (ours: data/README.md; the other is llama2.c's tokenizer.bin):
//   ours      words of 4 bytes: 0 magic 20251002 | 1 version 1, 2 | 2 kind: 0 BPE, 1 greedy | 3 vocabulary V
//             | 4 BOS or -1 | 5 EOS or -1 | 6 a space goes before the text: 0, 1, 2 unless one is there
//             | 7 word rule, + 256: a word that is a piece is taken; in version 2 the number of character
//             classes and those; then V records: float32 score, int32 length, bytes
//   llama2.c  int32 longest piece; then such records until the file ends. BPE with a space before the text;
//             ids 0 <unk>, 1 BOS, 2 EOS, 3..258 the bytes <0x00>..<0xFF>
// Kind 0 takes the code points of the text that are pieces, the bytes of those that are not, and then joins,
// again and again, the adjacent pair whose union is the piece with the highest score, the leftmost of equals;
// with a word rule it takes bytes only, and joins within each word. Kind 1 takes the longest piece at each
// position. Text never becomes BOS, EOS, or a piece with score -1e30 (other special tokens).
#define TOKENIZER_MAGIC 20251002
#define NO_MERGE (-1e30f)

typedef struct Piece { const char *s; int n; float score; } Piece;     // n bytes in the file, may be 0

// The classes of characters; INSIDE: a later byte of the same one; TEXT_END: after the text.
enum { OTHER, UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, INSIDE, TEXT_END };
enum { OWN_WORD = 1, AT_END, ANY_CASE = 4 };
// What the word patterns of byte-level tokenizers differ in; data/tokens.py has them as regular expressions.
typedef struct WordRule {
    int contraction;            // 's 't 're 've 'm 'll 'd: a word, or the end of one
    int letters;                // 0: a space and letters; 1: any sign and letters; 2: so, a capital begins
    int digits;                 // so many at most, 0: a space and any number
    const char *after;          // what else a word of punctuation takes; "" also: newlines are not apart
    int end_whole;              // white space at the end of the text is one word
} WordRule;
static const WordRule word_rules[] = {
    {0, 0, 0, "", 0},
    {OWN_WORD, 0, 0, "", 0},                            // gpt2
    {OWN_WORD | ANY_CASE, 1, 3, "\r\n", 1},             // cl100k
    {OWN_WORD | ANY_CASE, 1, 3, "\r\n", 0},             // llama3
    {OWN_WORD | ANY_CASE, 1, 1, "\r\n", 0},             // qwen2
    {AT_END | ANY_CASE, 2, 3, "\r\n/", 0},              // o200k
    {0, 2, 1, "\r\n/", 0},                              // tekken
    {OWN_WORD, 0, 1, "", 0},                            // gpt2-digits: each digit is cut out before the rest
    {0, 0, 0, NULL, 0},                                 // whole: the text is one word
};

// The slot where the piece with these bytes is, or where it would go.
static int *tokenizer_slot(const Tokenizer *t, const char *s, size_t n) {
    for (uint64_t h = hash_bytes(s, n); ; h++) {
        int *id = &t->slot[h & (t->slots - 1)];
        if (*id < 0 || ((size_t)t->piece[*id].n == n && memcmp(t->piece[*id].s, s, n) == 0)) return id;
    }
}

// The byte that a piece of the form <0xHH> stands for, else -1.
static int piece_byte(const Tokenizer *t, const Piece *piece) {
    const char *hex = "0123456789ABCDEF", *s = piece->s;
    if (t->words || piece->n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>' || !s[3] || !s[4]) return -1;
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

// Reads the character classes at `at`; returns where they end.
static size_t tokenizer_classes(Tokenizer *t, size_t at, size_t file_bytes) {
    int32_t count = -1;
    if (file_bytes - at >= 4) memcpy(&count, t->file + at, 4);
    if (count < (t->words > 0) || (size_t)count > (file_bytes - at) / 4 - 1)
        die("tokenizer '%s' is damaged or truncated: %d character classes; make it again", t->path, count);
    t->classes = count;
    t->class_from = (uint32_t *)xmalloc((size_t)count * 4 + 4);
    memcpy(t->class_from, t->file + at + 4, (size_t)count * 4);
    for (int i = 0; i < count; i++)
        if (t->class_from[i] >> 24 > SPACE
            || (i ? (t->class_from[i] & 0xFFFFFF) <= (t->class_from[i-1] & 0xFFFFFF) : t->class_from[i] << 8))
            die("tokenizer '%s' is damaged: character class %d begins at the wrong place; make it again",
                t->path, i);
    return at + 4 + (size_t)count * 4;
}

// Fills the hash table with what text can become, and byte_id.
static void tokenizer_index(Tokenizer *t) {
    memset(t->byte_id, 255, sizeof t->byte_id);             // all -1, as is the table
    for (t->slots = 2; t->slots < 2 * (uint32_t)t->V; ) t->slots *= 2;
    t->slot = (int *)xmalloc(t->slots * sizeof(int));
    memset(t->slot, 255, t->slots * sizeof(int));
    for (int id = 0; id < t->V; id++) {
        const Piece *p = &t->piece[id];
        int byte = piece_byte(t, p);
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
        if (h[1] < 1 || h[1] > 2)
            die("tokenizer '%s' has version %d, this program reads versions 1 and 2", path, h[1]);
        if (h[2] < 0 || h[2] > 1 || h[3] < 1 || h[4] < -1 || h[4] >= h[3] || h[5] < -1 || h[5] >= h[3]
            || h[6] < 0 || h[6] > h[1] || h[7] < 0 || (h[7] & 255) >= COUNT(word_rules) || h[7] > 511
            || (h[1] == 1 && h[7]))
            die("tokenizer '%s' has a damaged header: kind %d, %d pieces, BOS %d, EOS %d, space %d, %d; "
                "make it again", path, h[2], h[3], h[4], h[5], h[6], h[7]);
        t->kind = h[2]; t->V = h[3]; t->bos = h[4]; t->eos = h[5]; t->prefix_space = h[6];
        t->words = h[7] & 255; t->whole_words = h[7] >> 8;
        tokenizer_records(t, h[1] == 1 ? sizeof h : tokenizer_classes(t, sizeof h, n), n);
    } else {
        if (n < 12 || h[0] < 1 || h[0] > 4096 || h[2] < 0 || h[2] > h[0])
            die("'%s' is no tokenizer: neither litespark's (make it with data/tokens.py) nor llama2.c's",
                path);
        t->bos = 1; t->eos = 2; t->prefix_space = 1;
        tokenizer_records(t, 4, n);
        for (int id = 0; id < (t->V < 259 ? 259 : t->V); id++)
            if (id >= t->V || t->piece[id].n > h[0]
                || (id >= 3 && id < 259 && piece_byte(t, &t->piece[id]) != id - 3))
                die("tokenizer '%s' is damaged, or not llama2.c's: piece %d is too long, or not its byte",
                    path, id);
        t->piece[0].score = NO_MERGE;           // <unk> is not text; bytes, BOS and EOS are left out anyway
    }
    tokenizer_index(t);
    return t;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    free(t->piece); free(t->slot); free(t->class_from); free(t->path); free(t->file);
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
        int k = t->words ? 1 : utf8_length(text + at, (size_t)(n - at)), bytes = k ? k : 1;
        int id = t->words ? -1 : *tokenizer_slot(t, text + at, (size_t)bytes);
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

// ---- words
static int char_class(const Tokenizer *t, const char *s, int bytes) {
    uint32_t code = (unsigned char)s[0];
    int low = 0, high = t->classes;
    if (bytes > 1) code &= 0x7Fu >> bytes;
    for (int i = 1; i < bytes; i++) code = code << 6 | ((unsigned char)s[i] & 0x3Fu);
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if ((t->class_from[middle] & 0xFFFFFF) <= code) low = middle;
        else high = middle;
    }
    return (int)(t->class_from[low] >> 24);
}

// Where the run of characters of these classes that begins at `at` ends.
static int run_end(const uint8_t *class_of, int at, unsigned classes) {
    if (classes >> class_of[at] & 1) while ((classes | 1u << INSIDE) >> class_of[at] & 1) at++;
    return at;
}

static int char_end(const uint8_t *class_of, int at) {
    do at++; while (class_of[at] == INSIDE);
    return at;
}

// Where the contraction at `at` ends, or `at`. The long s is an s to patterns that ignore case.
static int contraction_end(const char *text, int n, int at, int any_case) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    if (at >= n || text[at] != '\'') return at;
    if (any_case && n - at >= 3 && !memcmp(text + at, "'\xC5\xBF", 3)) return at + 3;
    for (int i = 0; i < COUNT(endings); i++) {
        int k = (int)strlen(endings[i]);
        if (n - at > k && !(any_case ? strncasecmp : strncmp)(text + at + 1, endings[i], (size_t)k))
            return at + 1 + k;
    }
    return at;
}

// Capitals, then small letters, at least one; what has no case is both. -1: not so.
static int cased_end(const uint8_t *class_of, int at) {
    const unsigned both = 1u << LETTER | 1u << MARK;
    int capitals = run_end(class_of, at, both | 1u << UPPER);
    int end = run_end(class_of, capitals, both | 1u << LOWER);
    if (end > capitals) return end;
    while (capitals > at && !(both >> class_of[--capitals] & 1)) {}
    return both >> class_of[capitals] & 1 ? char_end(class_of, capitals) : -1;
}

// Where the word at `at` ends: the alternatives of the pattern in their order.
static int word_end(const WordRule *w, const char *text, const uint8_t *class_of, int n, int at) {
    const unsigned letters = 1u << UPPER | 1u << LOWER | 1u << LETTER;
    const int first = class_of[at], space = at + (text[at] == ' ');
    int from = space, end = at;
    if (!w->after) return n;
    if (w->contraction & OWN_WORD) end = contraction_end(text, n, at, w->contraction & ANY_CASE);
    if (end > at) return end;
    if (w->letters)
        from = (letters | 1u << NUMBER) >> first & 1 || text[at] == '\r' || text[at] == '\n'
             ? at : char_end(class_of, at);
    if (w->letters < 2) end = run_end(class_of, from, letters);
    else {
        end = cased_end(class_of, from);
        if (end < 0 && first == MARK) end = cased_end(class_of, from = at);
        if (end < 0) end = run_end(class_of, from, 1u << UPPER);
    }
    if (end > from) return w->contraction & AT_END ? contraction_end(text, n, end, 1) : end;
    if (w->digits) {
        end = at;
        for (int i = 0; i < w->digits && class_of[end] == NUMBER; i++) end = char_end(class_of, end);
        if (end > at) return end;
    } else if ((end = run_end(class_of, space, 1u << NUMBER)) > space) return end;
    end = run_end(class_of, space, 1u << OTHER | 1u << MARK);
    if (end > space) {
        while (end < n && text[end] && strchr(w->after, text[end])) end++;
        return end;
    }
    end = run_end(class_of, at, 1u << SPACE);
    if (end == n && w->end_whole) return end;
    for (int i = end; *w->after && i > at; i--) if (text[i-1] == '\n' || text[i-1] == '\r') return i;
    if (end == n || (w->digits && !*w->after && class_of[end] == NUMBER)) return end;
    int last = end;                             // the last one goes with what follows, if it is not alone
    do last--; while (class_of[last] == INSIDE);
    return last > at ? last : end;
}

// The class of each character at its first byte; the caller frees.
static uint8_t *text_classes(const Tokenizer *t, const char *text, int n) {
    uint8_t *class_of = (uint8_t *)xmalloc((size_t)n + 1);
    for (int at = 0, bytes; at < n; at += bytes) {
        bytes = utf8_length(text + at, (size_t)(n - at));
        memset(class_of + at, INSIDE, (size_t)(bytes ? bytes : 1));
        class_of[at] = (uint8_t)(bytes ? char_class(t, text + at, bytes) : OTHER);
        if (!bytes) bytes = 1;
    }
    class_of[n] = TEXT_END;
    return class_of;
}

static int encode_words(const Tokenizer *t, const char *text, int n, int *ids) {
    uint8_t *class_of = text_classes(t, text, n);
    int count = 0;
    for (int at = 0, end; at < n; at = end) {
        end = word_end(&word_rules[t->words], text, class_of, n, at);
        int id = t->whole_words ? *tokenizer_slot(t, text + at, (size_t)(end - at)) : -1;
        if (id >= 0) ids[count++] = id;
        else count += encode_bpe(t, text + at, end - at, ids + count);
    }
    free(class_of);
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
    int space = n > 0 && (t->prefix_space == 1 || (t->prefix_space == 2 && text[0] != ' '));
    char *spaced = (char *)xmalloc(n + 1);
    spaced[0] = ' ';
    memcpy(spaced + 1, text, n);
    text = spaced + 1 - space;
    n += (size_t)space;
    *ids = (int *)xmalloc(n * sizeof(int));                 // a token is at least one byte
    int count = t->kind == 1 ? encode_greedy(t, text, n, *ids)
              : (t->words ? encode_words : encode_bpe)(t, text, (int)n, *ids);
    free(spaced);
    return count;
}

// The bytes of one id as they are; BOS, EOS and ids without a piece print nothing. previous_id: the id before
// it, BOS at the start (-1 without BOS): there the space that encoding put in front is dropped.
void tokenizer_print(const Tokenizer *t, int previous_id, int id, FILE *f) {
    if (id < 0 || id >= t->V || id == t->bos || id == t->eos) return;
    const Piece *p = &t->piece[id];
    int byte = piece_byte(t, p);
    int skip = t->prefix_space && previous_id == t->bos && p->n > 0 && p->s[0] == ' ';
    if (byte >= 0) fputc(byte, f);
    else fwrite(p->s + skip, 1, (size_t)(p->n - skip), f);
}

// How many bytes of text an id stands for: those that tokenizer_print prints, but a document's first token
// has EOS before it where there is no BOS. Special tokens, which no text becomes: 0. NAN: not a piece.
double tokenizer_bytes(const Tokenizer *t, int previous_id, int id) {
    if (id < 0 || id >= t->V) return NAN;
    const Piece *p = &t->piece[id];
    if (id == t->bos || id == t->eos) return 0;
    if (piece_byte(t, p) >= 0) return 1;
    const int is_byte = p->n == 1 && t->byte_id[(unsigned char)*p->s] == id;
    if (p->score <= NO_MERGE && !is_byte) return 0;
    const int begins = previous_id < 0 || previous_id == t->bos || previous_id == t->eos;
    return p->n - (t->prefix_space && begins && p->n > 0 && p->s[0] == ' ');
}

// Opens --tokenizer, or else a tokenizer.bin beside the model, in the folder of the data or above it; NULL:
// there is none. It may have more pieces than the model has rows, or fewer: what counts are the ids in use.
Tokenizer *tokenizer_choose(const Config *c, const char *model_dir) {
    const char *file = opt.eval_only && opt.val_data ? opt.val_data : opt.train_data;
    const char *slash = strrchr(file, '/');
    const Str data = str("%.*s", slash ? (int)(slash - file) : 1, slash ? file : ".");
    const Str above = str("%s/..", data.s);
    const char *folders[3] = {model_dir, data.s, above.s}, *found = opt.tokenizer;
    int i = 0;
    Str path;
    for (; i < 3 && !found; i++) if (folders[i]) {
        path = str("%s/tokenizer.bin", folders[i]);
        if (!access(path.s, R_OK)) found = path.s;
    }
    Tokenizer *t = found ? tokenizer_open(found) : NULL;
    if (!t || !c->V || t->V == c->V) return t;
    // beside data that this run does not read: by chance
    const int chance = i > 1 && opt.generate && !option_given("--train-data");
    if (!opt.eval_only) printf("tokenizer | %s has %d tokens, the model %d%s\n", found, t->V, c->V,
           chance ? ": not used; name the model's with --tokenizer" : "");
    if (!chance) return t;
    tokenizer_free(t);
    return NULL;
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
// Rows with flags (stages sft and dpo): what a token is, besides its id.
#define FLAG_TARGET 0x80000000u // a target of training
#define FLAG_START  0x40000000u // the first token of a document
#define FLAGS       (FLAG_TARGET | FLAG_START)

typedef struct Shard {
    char *path;
    int fd;                             // -1 = closed at the moment
    size_t n_tokens, n_windows, header_bytes;
    int64_t first_window;               // number of its first window among those of all shards
    int width;                          // bytes per token: 2 or 4
    int row;                            // .ds: S+1 tokens per row; .bin: 0
    int vocab;                          // of the tokenizer that made it, 0 = unknown
    int eod;                            // id of the end-of-document token, -1 = unknown
    int stage, most_documents;          // rows with flags: what for; documents in a row, at most
    char made[160];                     // rows with flags: which tokens are trained, how chats became text
    int source;                         // evaluation: DataLoader.sources
    uint32_t crc;                       // of the token bytes, 0 = unknown
    uint32_t begin_crc;                 // of its size and its first bytes
    char *floor_path;                   // evaluation: its .nll file, NULL = it has none
} Shard;

static void shard_open_bin(Shard *s, size_t bytes) {
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
    s->vocab = h[3];
    s->crc = (uint32_t)h[4];
    s->eod = h[5] - 1;
}

static void shard_open_ds(Shard *s, size_t bytes) {
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
    s->vocab = (int)json_int(meta, "vocab_size", where, 1, INT_MAX, JSON_REQUIRED);
    s->row = (int)json_int(meta, "sequence_length", where, 1, 1 << 28, JSON_REQUIRED) + 1;
    s->width = (int)json_int(meta, "token_size_bytes", where, 2, 4, JSON_REQUIRED);
    s->eod = (int)json_int(meta, "eos_token_id", where, -1, INT_MAX, -1);
    if (s->width == 3) die("'%s': \"token_size_bytes\" must be 2 or 4", where);
    const char *stage = json_string(meta, "stage", where, "pretrain");
    while (s->stage < COUNT(stage_names) && strcmp(stage, stage_names[s->stage])) s->stage++;
    if (s->stage == COUNT(stage_names)) die("'%s': stage \"%s\" is not known", where, stage);
    if (s->stage) {
        s->most_documents = (int)json_int(meta, "documents_per_row", where, 1, s->row, JSON_REQUIRED);
        if (s->width != 4) die("'%s': rows of stage %s have tokens of 4 bytes", where, stage);
        const Json *mask = json_get(meta, "mask"), *chat = json_get(meta, "template");
        snprintf(s->made, sizeof s->made, "%s rows, trained: %s, template: %s", stage,
                 mask && mask->type == 's' ? mask->str : "?", chat && chat->type == 's' ? chat->str : "none");
        if (s->stage == STAGE_DPO && s->most_documents % 2)
            die("'%s': \"documents_per_row\" %d is odd, but answers come in pairs", where, s->most_documents);
    }
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

static uint32_t begin_crc(int fd, const char *path, size_t bytes) {
    char start[4096];
    const size_t n = read_at(fd, path, start, sizeof start, 0);
    return crc32_update(crc32_update(0, &bytes, sizeof bytes), start, n);
}

// What a shard says of itself; its length is checked, its tokens are not read.
static void shard_describe(Shard *s) {
    size_t bytes;
    s->fd = open_regular(s->path, "token shard", &bytes);
    if (bytes == 0) die("token shard '%s' is empty; write it again", s->path);
    s->begin_crc = begin_crc(s->fd, s->path, bytes);
    const char *dot = strrchr(s->path, '.');
    if (dot && strcmp(dot, ".ds") == 0) shard_open_ds(s, bytes);
    else shard_open_bin(s, bytes);
    close(s->fd);
    s->fd = -1;
}

static size_t shard_windows(const Shard *s, int T) {
    return s->row ? s->n_tokens / (size_t)s->row : (s->n_tokens - 1) / (size_t)T;
}

static void shard_open(DataLoader *dl, Shard *s) {
    shard_describe(s);
    dl->crc = crc32_update(dl->crc, &s->begin_crc, sizeof s->begin_crc);
    if (s->eod >= dl->vocab_size)
        die("token shard '%s': end-of-document id %d is outside the vocabulary of %d; write it again",
            s->path, s->eod, dl->vocab_size);
    if (dl->n_windows == 0) dl->stage = s->stage;
    if (s->stage != dl->stage)
        die("token shard '%s' was made for another stage than '%s'; name shards of one", s->path,
            dl->shards[0].path);
    if (s->stage > STAGE_PRETRAIN && s->row != dl->T + 1)
        die("token shard '%s' has rows for --seq-len %d, not %d; make it again for that", s->path,
            s->row - 1, dl->T);
    if (s->most_documents > dl->most_documents) dl->most_documents = s->most_documents;
    if (s->eod < 0 && dl->document_mask && !s->stage && opt.stage == STAGE_PRETRAIN)
        die("token shard '%s' does not say which token ends a document; write it again with data/tokens.py, "
            "or train with --document-mask off", s->path);
    if (s->row && s->row < dl->T + 1)
        die("token shard '%s' has rows for --seq-len %d or less, not %d", s->path, s->row - 1, dl->T);
    const size_t T = (size_t)dl->T;
    s->n_windows = shard_windows(s, dl->T);
    size_t used = s->row ? s->n_windows * (T + 1) : s->n_windows ? s->n_windows * T + 1 : 0;
    dl->n_windows += (int64_t)s->n_windows;
    dl->n_tokens += (int64_t)s->n_tokens;
    dl->n_dropped += (int64_t)(s->n_tokens - used);
    if (!dl->shuffle) shard_find_floor(s);
}

// Token i of n packed tokens.
static uint32_t packed_token(const void *data, int width, size_t i) {
    return width == 2 ? ((const uint16_t *)data)[i] : ((const uint32_t *)data)[i];
}

// The descriptor of a shard, which it keeps until another one needs its place.
static int shard_fd(DataLoader *dl, int index) {
    Shard *s = &dl->shards[index], **place = &dl->open_shard[index % MAX_OPEN_SHARDS];
    size_t bytes;
    if (s->fd >= 0) return s->fd;
    if (*place) { close((*place)->fd); (*place)->fd = -1; }
    *place = NULL;
    s->fd = open_regular(s->path, "token shard", &bytes);
    *place = s;
    if (begin_crc(s->fd, s->path, bytes) != s->begin_crc)
        die("token shard '%s' is not the one that the run began with; start again, with --resume auto",
            s->path);
    return s->fd;
}

// Dies unless row w with flags is as data/README.md has it: it begins with a document, and those that have
// targets are as many as promised, for DPO an even number. A document without a target is harmless in SFT,
// elsewhere it would move those after it to another place.
static void row_check(const Shard *s, size_t w, const uint32_t *row) {
    int documents = 0, counted = 0, first = 0;
    const char *why = row[0] & FLAG_START ? NULL : "does not begin with a document";
    for (int t = 0; t <= s->row && !why; t++) {
        if (t < s->row && !(row[t] & FLAG_START)) {
            if (row[t] & FLAG_TARGET && !counted) documents += counted = 1;
            continue;
        }
        const int padding = t - first == 1 && row[first] == FLAG_START;
        if (t > 0 && !counted && !padding && s->stage != STAGE_SFT) why = "has a document without a target";
        first = t;
        counted = 0;
    }
    if (why) die("token shard '%s' is damaged: row %zu %s; write it again", s->path, w, why);
    if (documents > s->most_documents || (s->stage == STAGE_DPO && documents % 2))
        die("token shard '%s' is damaged: row %zu has %d documents, %s; write it again", s->path, w,
            documents, documents > s->most_documents ? "more than metadata.json promises"
                                                     : "but answers come in pairs");
}

// Reads a whole shard once: its CRC-32, which it returns, its largest id, and rows with flags.
static uint32_t shard_scan(DataLoader *dl, int index) {
    Shard *s = &dl->shards[index];
    // rows with flags are looked at whole
    const size_t of_row = (size_t)s->row * (size_t)s->width, some = (size_t)1 << 20;
    const size_t block = s->stage ? (some / of_row + 1) * of_row : some;
    void *data = xmalloc(block);
    uint32_t crc = 0, largest = 0;
    size_t bytes = s->n_tokens * (size_t)s->width;
    int fd = shard_fd(dl, index);
    for (size_t at = 0; at < bytes; at += block) {
        size_t n = min_size(bytes - at, block);
        read_exactly(fd, s->path, data, n, s->header_bytes + at);
        crc = crc32_update(crc, data, n);
        for (size_t i = 0; i < n / (size_t)s->width; i++) {
            uint32_t id = packed_token(data, s->width, i) & (s->stage ? ~FLAGS : ~0u);
            largest = id > largest ? id : largest;
        }
        for (size_t i = 0; s->stage && i < n; i += of_row)
            row_check(s, (at + i) / of_row, (const uint32_t *)((const char *)data + i));
    }
    free(data);
    if (s->crc && crc != s->crc)
        die("token shard '%s' is damaged: CRC-32 %08x, its header promises %08x; write it again",
            s->path, crc, s->crc);
    if (largest >= (uint32_t)dl->vocab_size)
        die("token shard '%s' has token id %u, outside the vocabulary of %d; use the tokenizer of the model",
            s->path, largest, dl->vocab_size);
    return crc;
}

// All shards, which the ranks share -> dl->tokens_crc.
static void loader_scan(DataLoader *dl) {
    double *crc = (double *)xcalloc((size_t)dl->n_shards, sizeof(double));
    for (int i = dl->rank; i < dl->n_shards; i += dl->world) crc[i] = shard_scan(dl, i);
    comm_sum(crc, dl->n_shards);
    dl->tokens_crc = crc32_update(0, crc, (size_t)dl->n_shards * sizeof(double));
    free(crc);
}

// The number of a shard's source: its name without folder, "val_", number and extension.
static int source_of(DataLoader *dl, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path, *dot = strrchr(name, '.');
    int n = dot ? (int)(dot - name) : (int)strlen(name), stem = n, i = 0;
    while (stem > 0 && isdigit((unsigned char)name[stem - 1])) stem--;
    if (stem > 1 && stem < n && name[stem - 1] == '_') n = stem - 1;
    if (n > 4 && !strncmp(name, "val_", 4)) name += 4, n -= 4;
    const Str source = str("%.*s", n, name);
    while (i < dl->n_sources && strcmp(dl->sources[i], source.s)) i++;
    if (i == dl->n_sources) dl->sources[dl->n_sources++] = xstrdup(source.s);
    return i;
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
    if (!find_files(pattern, &found))
        die("no token shard matches '%s'; make them with `make data` or data/tokens.py, or name others",
            pattern);
    dl->n_shards = (int)found.gl_pathc;
    dl->shards = (Shard *)xcalloc(found.gl_pathc, sizeof(Shard));
    dl->sources = (char **)xcalloc(found.gl_pathc, sizeof(char *));
    for (int i = 0; i < dl->n_shards; i++) {
        Shard *s = &dl->shards[i];
        s->path = xstrdup(found.gl_pathv[i]);
        s->first_window = dl->n_windows;
        shard_open(dl, s);
        if (!shuffle) s->source = source_of(dl, s->path);
        bytes += s->n_tokens * (size_t)s->width;
        n_floors += s->floor_path != NULL;
    }
    globfree(&found);
    if (dl->n_windows == 0)
        die("'%s' is too short: %" PRId64 " tokens in all, no shard has one window of %d + 1; "
            "use more text or a smaller --seq-len", pattern, dl->n_tokens, T);
    if (bytes <= FULL_SCAN_BYTES) loader_scan(dl);
    dl->has_floor = n_floors == dl->n_shards;
    dl->buffer = xmalloc(((size_t)T + 1) * 4);
}

// Windows of all shards that match.
int64_t data_windows(const char *pattern, int T) {
    glob_t found;
    int64_t n = 0;
    if (!find_files(pattern, &found)) return 0;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        Shard s;
        memset(&s, 0, sizeof s);
        s.path = found.gl_pathv[i];
        shard_describe(&s);
        n += (int64_t)shard_windows(&s, T);
    }
    globfree(&found);
    return n;
}

// The first shard, for messages.
const char *loader_path(const DataLoader *dl) { return dl->shards[0].path; }

// data/tokens.py was at work there, or was stopped: its shards are whole, but not all that there will be.
static int is_incomplete(const Shard *s) {
    char text[1 << 16] = "";
    const int folder = (int)(strrchr(s->path, '/') ? strrchr(s->path, '/') + 1 - s->path : 0);
    FILE *f = fopen(str("%.*stokens.json", folder, s->path).s, "r");
    if (f && !fread(text, 1, sizeof text - 1, f)) *text = 0;
    if (f) fclose(f);
    return strstr(text, "\"complete\": false") != NULL;
}

// What is no error, but most likely one of the user's: a line for the first of each kind.
static void loader_warn(const DataLoader *dl, const char *name, FILE *f) {
    const Shard *s = dl->shards, *known = s;
    int other = 0, part = 0, made = 0;
    for (int i = 0; i < dl->n_shards; i++) {
        if (strcmp(s[i].made, s->made) && !made++)
            fprintf(f, "warning: %s data: '%s' has %s; '%s' has %s\n", name, s[i].path, s[i].made, s->path,
                    s->made);
        if (!known->vocab) known = &s[i];
        if (s[i].vocab && s[i].vocab != known->vocab && !other++)
            fprintf(f, "warning: %s data: '%s' was made for a vocabulary of %d, '%s' for one of %d: is that "
                    "one tokenizer?\n", name, s[i].path, s[i].vocab, known->path, known->vocab);
        if (!s[i].row && is_incomplete(&s[i]) && !part++)
            fprintf(f, "warning: %s data: '%s' is from a preparation that is not complete (tokens.json "
                    "beside it); the same command of data/tokens.py goes on with it\n", name, s[i].path);
    }
}

// Of shards to evaluate on that are among those to train on, as their size and first bytes tell.
void loaders_warn_of_shared(const DataLoader *train, const DataLoader *val, FILE *f) {
    const Shard *first = NULL;
    int n = 0;
    for (const Shard *v = val->shards; v < val->shards + val->n_shards; v++)
        for (const Shard *t = train->shards; t < train->shards + train->n_shards; t++) {
            if (v->begin_crc != t->begin_crc || v->n_tokens != t->n_tokens) continue;
            if (!n++) first = v;
            break;
        }
    if (n) fprintf(f, "warning: %d of %d shards to evaluate on are trained on, too: '%s'%s\n", n,
                   val->n_shards, first->path, n > 1 ? " and others" : "");
}

// One line for the log; name: "train" or "val".
void loader_log(const DataLoader *dl, const char *name, FILE *f) {
    const int vocab = dl->shards[0].vocab;
    fprintf(f, "%s data | shards %d from %s | %" PRId64 " tokens | %" PRId64 " windows of %d | "
            "%" PRId64 " tokens dropped%s%s%s%s\n", name, dl->n_shards, dl->shards[0].path, dl->n_tokens,
            dl->n_windows, dl->T, dl->n_dropped, dl->has_floor ? " | true loss known" : "",
            dl->stage ? " | " : "", dl->shards[0].made,
            vocab && vocab != dl->vocab_size ? str(" | made for a vocabulary of %d", vocab).s : "");
    const double share = 100.0 * (double)dl->n_dropped / (double)dl->n_tokens;
    if (share > 1)
        fprintf(f, "warning: %.0f%% of the %s tokens are in no window of %d; another --seq-len may take more"
                "\n", share, name, dl->T);
    loader_warn(dl, name, f);
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
    batch->window = (int64_t *)xcalloc((size_t)B, sizeof(int64_t));
}

// Room for the pairs of dl's rows in a batch, and for all of them in dl.
void batch_alloc_pairs(Batch *batch, DataLoader *dl) {
    batch->pairs = dl->most_documents / 2;
    batch->reference = (float *)xcalloc((size_t)batch->B * batch->pairs * 2, sizeof(float));
    if (!dl->reference)
        dl->reference = (float *)xcalloc((size_t)dl->n_windows * batch->pairs * 2, sizeof(float));
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

// The shard of a window: the last one with first_window <= window.
static int shard_of(const DataLoader *dl, int64_t window) {
    int low = 0, high = dl->n_shards;
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (dl->shards[middle].first_window <= window) low = middle; else high = middle;
    }
    return low;
}

int loader_source(const DataLoader *dl, int64_t window) { return dl->shards[shard_of(dl, window)].source; }

// Window `window` of all shards into row b.
static void read_window(DataLoader *dl, int64_t window, Batch *batch, int b) {
    const int index = shard_of(dl, window), T = dl->T;
    const Shard *s = &dl->shards[index];
    size_t w = (size_t)(window - s->first_window), width = (size_t)s->width, n = (size_t)T + 1;
    size_t first = s->row ? w * (size_t)s->row : w * (size_t)T;
    if (read_at(shard_fd(dl, index), s->path, dl->buffer, n * width, s->header_bytes + first * width)
        != n * width)
        die("token shard '%s' ends inside window %zu: it became shorter since the run began", s->path, w);
    const size_t at = (size_t)b * (size_t)T;
    const uint32_t id_bits = s->stage ? ~FLAGS : ~0u;
    int start = 0;
    batch->window[b] = window;
    // With a document mask no document sees another: its first token is not a target of the one before.
    for (int t = 0; t <= T; t++) {
        const uint32_t word = packed_token(dl->buffer, s->width, (size_t)t), id = word & id_bits;
        if (id >= (uint32_t)dl->vocab_size)
            die("token shard '%s' has token id %u in window %zu, outside the vocabulary of %d; "
                "use the tokenizer of the model", s->path, id, w, dl->vocab_size);
        if (s->stage && (word & FLAG_START)) start = t;
        const int target = s->stage ? (word & FLAG_TARGET) && start < t : !batch->doc_start || start < t;
        if (t > 0) batch->targets[at + (size_t)t - 1] = target ? (int)id : IGNORED;
        if (t == T) break;
        batch->inputs[at + (size_t)t] = (int)id;
        if (batch->doc_start) batch->doc_start[at + (size_t)t] = start;
        if (!s->stage && s->eod >= 0 && (int)id == s->eod) start = t + 1;
    }
    if (s->stage) row_check(s, w, (const uint32_t *)dl->buffer);
    if (batch->reference && dl->reference)
        memcpy(batch->reference + (size_t)b * batch->pairs * 2,
               dl->reference + (size_t)window * batch->pairs * 2, (size_t)batch->pairs * 2 * sizeof(float));
    if (dl->has_floor && batch->floor)
        read_floor(s, s->row ? w * (size_t)(s->row - 1) : first, T, batch->floor + at);
}

// The next B rows of this rank. Training: where an epoch ends inside the batch, the rest comes from the start
// of the next. Evaluation: where the windows end, the rest is padding. Dies if a file has changed.
void loader_next(DataLoader *dl, Batch *batch) {
    assert(batch->B == dl->B && batch->T == dl->T);
    assert(batch->doc_start || !(dl->document_mask || dl->stage));
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
        batch->window[b] = -1;
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

// ---- multiple choice --------------------------------------------------------------------------------------
// Beside rows X.ds of stage choice lies X.choices. For each document, in the order of the rows, four int32:
// its task (0 .. in this shard), which of the task's choices it is (0 ..), which is right, and its length.

// Of shard s: fills tasks->document and length where its documents are, and appends its tasks.
static void choices_read(Tasks *tasks, const Shard *s) {
    const int64_t from = tasks->first_document[s->first_window], first_task = tasks->n;
    const int64_t n = tasks->first_document[s->first_window + (int64_t)s->n_windows] - from;
    const char *dot = strrchr(s->path, '.');
    const Str path = str("%.*s.choices", (int)(dot - s->path), s->path);
    size_t bytes, expected = (size_t)n * 4 * sizeof(int32_t);
    if (access(path.s, F_OK))
        die("'%s' is missing, which says what the documents of '%s' are; make both again with "
            "data/choices.py", path.s, s->path);
    int fd = open_regular(path.s, "list of choices", &bytes);
    if (bytes != expected)
        die("'%s' has %zu bytes, but '%s' has %" PRId64 " documents, for %zu bytes; make both again with "
            "data/choices.py", path.s, bytes, s->path, n, expected);
    int32_t (*row)[4] = (int32_t (*)[4])xmalloc(expected + 1);
    read_exactly(fd, path.s, row, expected, 0);
    close(fd);
    Task *task = tasks->task + first_task;
    for (int64_t i = 0; i < n; i++) {
        const int32_t *r = row[i];
        if (r[0] < 0 || r[0] >= n || r[1] < 0 || r[1] >= n || r[2] < 0 || r[3] < 1)
            die("'%s' is damaged: document %" PRId64 " has task %d, choice %d, right choice %d, length %d; "
                "make it again with data/choices.py", path.s, i, r[0], r[1], r[2], r[3]);
        if (r[0] >= tasks->n - first_task) tasks->n = first_task + r[0] + 1;
        task[r[0]].choices++;
        task[r[0]].gold = r[2];
        task[r[0]].source = s->source;
    }
    for (int64_t k = 0, at = from; first_task + k < tasks->n; at += task[k++].choices) {
        task[k].first = at;
        if (task[k].choices < 2 || task[k].gold >= task[k].choices)
            die("'%s' is damaged: task %" PRId64 " has %d choices, the right one is %d; make it again with "
                "data/choices.py", path.s, k, task[k].choices, task[k].gold);
    }
    for (int64_t i = 0; i < n; i++) {
        const int32_t *r = row[i];
        const Task *its = &task[r[0]];
        const int64_t at = its->first + r[1];
        if (r[1] >= its->choices || r[2] != its->gold || tasks->document[at] >= 0)
            die("'%s' is damaged: choice %d of task %d, which has %d, is there twice or says another right "
                "choice; make it again with data/choices.py", path.s, r[1], r[0], its->choices);
        tasks->document[at] = from + i;
        tasks->length[at] = r[3];
    }
    free(row);
}

// Opens the tasks of all shards that match; dies with one line unless every task is complete.
void tasks_open(Tasks *tasks, const char *pattern, int B, int T, int vocab_size) {
    DataLoader *dl = &tasks->data;
    Document d;
    memset(tasks, 0, sizeof *tasks);
    loader_open(dl, pattern, B, T, comm_rank(), comm_world(), 0, /*shuffle=*/0, vocab_size,
                /*document_mask=*/1);
    if (dl->stage != STAGE_CHOICE)
        die("token shard '%s' holds no multiple choice tasks; make them with data/choices.py",
            loader_path(dl));
    batch_alloc(&tasks->batch, B, T, /*document_mask=*/1, /*with_floor=*/0);
    tasks->first_document = (int64_t *)xcalloc((size_t)dl->n_windows + 1, sizeof(int64_t));
    for (int64_t w = 0; w < dl->n_windows; w++) {
        read_window(dl, w, &tasks->batch, 0);
        for (int t = 0; next_document(&tasks->batch, 0, &t, &d);) tasks->n_documents++;
        tasks->first_document[w + 1] = tasks->n_documents;
    }
    const size_t n = (size_t)tasks->n_documents;
    tasks->task = (Task *)xcalloc(n, sizeof(Task));
    tasks->document = (int64_t *)xmalloc(n * sizeof(int64_t));
    tasks->length = (int32_t *)xcalloc(n, sizeof(int32_t));
    memset(tasks->document, 255, n * sizeof(int64_t));      // all -1
    for (int i = 0; i < dl->n_shards; i++) choices_read(tasks, &dl->shards[i]);
}

// The first shard that matches, described; returns 0 when there is none.
static int data_first(const char *pattern, Shard *s, Str *path) {
    glob_t found;
    if (!find_files(pattern, &found)) return 0;
    *path = str("%s", found.gl_pathv[0]);
    globfree(&found);
    memset(s, 0, sizeof *s);
    s->path = path->s;
    shard_describe(s);
    return 1;
}

// What it says of the vocabulary (*V) and the tokens per row (*S), 0 = nothing.
int data_declares(const char *pattern, int *V, int *S) {
    Shard s;
    Str path;
    if (!data_first(pattern, &s, &path)) return 0;
    *V = s.vocab;
    *S = s.row ? s.row - 1 : 0;
    return 1;
}

// The stage that it was made for, and its path; -1: there is none.
int data_stage(const char *pattern, Str *path) {
    Shard s;
    return data_first(pattern, &s, path) ? s.stage : -1;
}

// ==== 14. Schedule, FLOPs, log =============================================================================
// Learning rate of update `step` (0, 1, ...): linear warm-up, then lr to min_lr (wsd: over the last fifth).
double learning_rate(const Options *o, int64_t step) {
    if (step < o->warmup_steps) return o->lr * (double)(step + 1) / (double)o->warmup_steps;
    // the first update after the warm-up has lr, the last min_lr; a run of one has lr
    const double intervals = fmax(1, (double)(o->steps - o->warmup_steps - 1));
    const double done = fmin(1, (double)(step - o->warmup_steps) / intervals);
    switch (o->schedule) {
    case SCHEDULE_COSINE: return o->min_lr + (o->lr - o->min_lr) * 0.5 * (1 + cos(3.141592653589793 * done));
    case SCHEDULE_LINEAR: return o->lr + (o->min_lr - o->lr) * done;
    case SCHEDULE_WSD: return done < 0.8 ? o->lr : o->lr + (o->min_lr - o->lr) * (done - 0.8) / 0.2;
    default: return o->lr;
    }
}

// FLOPs of forward and backward per token: 6 per parameter of a matmul (a tied head, too) + 12 L H D T for
// attention, as the Litespark report, Megatron-LM and nanotron count; causal: half of that for attention.
double flops_per_token(const Config *c, double T, int causal) {
    double C = c->C, HD = (double)c->H * c->D, KD = (double)c->K * c->D;
    double block = C * (HD + 2 * KD) + HD * C + 3 * C * c->F;
    return 6 * (c->L * block + C * c->V) + (causal ? 6.0 : 12.0) * c->L * HD * T;
}

// ---- log.jsonl: one JSON object per line, only rank 0 writes ----------------------------------------------
typedef struct RecordFile { int fd; int64_t lost; Str path; } RecordFile;
static RecordFile log_file = {-1, 0, {""}}, power_file = {-1, 0, {""}};

// Opens a file to append to; what a crash left of its last line stays a line of its own. 0: it cannot be.
static int records_open(RecordFile *file, const char *path) {
    char last = '\n';
    file->path = str("%s", path);
    file->fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    const off_t end = file->fd < 0 ? 0 : lseek(file->fd, 0, SEEK_END);
    if (end > 0 && pread(file->fd, &last, 1, end - 1) == 1 && last != '\n' && write(file->fd, "\n", 1) < 0) {}
    return file->fd >= 0;
}

// Appends the line t and frees it. On a full disk it is lost, whole: a half line would spoil the next one.
static void records_add(RecordFile *file, Text *t) {
    const off_t end = lseek(file->fd, 0, SEEK_END);
    errno = 0;
    if (write(file->fd, t->s, (size_t)t->n) != t->n) {
        const char *why = strerror(errno ? errno : ENOSPC);
        if (!file->lost++) {
            live_end();
            fprintf(stderr, "warning: cannot write %s: %s; training goes on without these records\n",
                    file->path.s, why);
        }
        if (ftruncate(file->fd, end)) {}
    }
    free(t->s);
}

void log_open(const char *path) {
    if (comm_rank() != 0) return;
    if (!records_open(&log_file, path))
        die("cannot write %s: %s; choose another --out", path, strerror(errno));
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

// Writes the record t as one line and frees it. A full disk ends no training.
void log_record(Text *t) {
    text_add(t, "}\n");
    if (log_file.fd >= 0) records_add(&log_file, t);
    else free(t->s);
}

void log_close(void) {
    if (log_file.lost)
        fprintf(stderr, "warning: %" PRId64 " records are missing in %s\n", log_file.lost, log_file.path.s);
    if (log_file.fd >= 0) close(log_file.fd);
    log_file.fd = -1;
}

// ---- --power-log: a thread that writes what this rank's part of the machine does each second --------------
static void *power_log_thread(void *unused) {
    (void)unused;
    double joules, before = NAN, then = 0, mhz, celsius;
    for (;;) {
        if (!power_sample(&joules, &mhz, &celsius)) return NULL;
        const double now = now_seconds();
        struct timespec date;
        clock_gettime(CLOCK_REALTIME, &date);
        if (then > 0) {
            Text r = {NULL, 0, 0};
            text_add(&r, "{\"time\": %" PRId64 ".%03d", (int64_t)date.tv_sec, (int)(date.tv_nsec / 1000000));
            text_add_field(&r, "watts", (joules - before) / (now - then));
            text_add_field(&r, "mhz", mhz);
            text_add_field(&r, "celsius", celsius);
            text_add(&r, "}\n");
            records_add(&power_file, &r);
        }
        before = joules;
        then = now;
        usleep(1000000 - (useconds_t)(date.tv_nsec / 1000));        // until the next full second
    }
}

void power_log_start(const char *path) {
    const Str name = comm_rank() ? str("%s.%d", path, comm_rank()) : str("%s", path);
    pthread_t thread;
    sigset_t all, before;
    double joules, mhz, celsius;
    if (!power_sample(&joules, &mhz, &celsius)) return;
    if (!records_open(&power_file, name.s))
        die("--power-log: cannot write %s: %s", name.s, strerror(errno));
    sigfillset(&all);                           // signals are for the thread that trains
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, power_log_thread, NULL)) die("--power-log: there is no thread for it");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_detach(thread);
}

// "15 s" .. "3 h 20 min": for people
Str duration_text(double seconds) {
    const int64_t s = (int64_t)(seconds + 0.5), min = (s + 30) / 60;
    if (s < 60) return str("%d s", (int)s);
    if (s < 3600) return str("%d min %02d s", (int)(s / 60), (int)(s % 60));
    return str("%" PRId64 " h %02d min", min / 60, (int)(min % 60));
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
//   config.json, generation_config.json, tokenizer files and, in the compute precision, model.safetensors or
//       model-IIIII-of-NNNNN.safetensors (from 1) with model.safetensors.index.json: what Hugging Face loads
//   optimizer-RRRRR-of-NNNNN.safetensors, of rank R of N (from 0): fp32 tensors UNIT.KIND.OFFSET, KIND
//       master, m or v: elements from OFFSET on of the flat unit
//   trainer_state.json: step, options, data position, sums of the run
//   checksums.txt: a line "CRC-32 bytes name" per file; the last line is the CRC-32 of those lines
// Every rank writes its part, and reads what it needs from whichever files hold it, so that the number of
// ranks, the ZeRO stage and the trainer may change.
// Written as OUT/tmp.step_N, fsynced, renamed; only then are old ones removed: a kill leaves a whole one.
// OUT/lock: held by the run that trains here.
static float io_values[IO_THREADS][IO_CHUNK];   // what passes between disk and model at a time, per thread

__attribute__((unused)) static int io_threads(void) {           // nvcc does not look for uses in pragmas
    return is_writer ? 1 : (int)min_size((size_t)omp_get_max_threads(), IO_THREADS);
}

// What a checkpoint takes over unchanged from where the run began. It is read then: that may be a checkpoint
// which the run itself removes.
static const char *const side_names[] = {"tokenizer.bin", "generation_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json"};
enum { SIDE_TOKENIZER, SIDE_GENERATION };                       // the first names
static struct { char *data; size_t n; } side_files[COUNT(side_names)];  // NULL: there is none

static Str optimizer_file(int part, int parts) {
    return str("optimizer-%05d-of-%05d.safetensors", part, parts);
}

static Str model_file(int file, int files) {
    return files == 1 ? str("model.safetensors") : str("model-%05d-of-%05d.safetensors", file + 1, files);
}

static int is_checkpoint_file(const char *name) {
    static const char *const files[] = {"config.json", "generation_config.json", "model.safetensors",
        "model.safetensors.index.json", "trainer_state.json", "checksums.txt"};
    int part, parts;
    for (int i = 0; i < COUNT(files); i++) if (!strcmp(name, files[i])) return 1;
    for (int i = 0; i < COUNT(side_names); i++) if (!strcmp(name, side_names[i])) return 1;
    if (sscanf(name, "model-%d-of-%d.", &part, &parts) == 2)
        return !strcmp(name, model_file(part - 1, parts).s);
    return sscanf(name, "optimizer-%d-of-%d.", &part, &parts) == 2
        && !strcmp(name, optimizer_file(part, parts).s);
}

// Removes a folder of a checkpoint and the files that such a folder has. What else lies there stays and is
// said; nothing is removed through a link.
static void remove_folder(const char *dir) {
    Str left = {""};
    DIR *d = fdopendir(open(dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        if (!is_checkpoint_file(e->d_name) || unlinkat(dirfd(d), e->d_name, 0)) left = str("%s", e->d_name);
    }
    if (d) closedir(d);
    if (rmdir(dir) && errno != ENOENT)
        fprintf(stderr, *left.s ? "warning: %s stays: it holds %s, which litespark did not write or cannot "
                "remove\n" : "warning: %s stays: %s\n", dir, *left.s ? left.s : strerror(errno));
}

static void sync_folder(const char *dir) {
    int fd = open(dir, O_RDONLY | O_DIRECTORY);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

// How many characters at s are a step as these names have it: %08d.
static size_t step_digits(const char *s) {
    const size_t n = strspn(s, "0123456789");
    return n == 8 || (n > 8 && *s != '0') ? n : 0;
}

// Steps of the checkpoints in OUT, ascending; the caller frees *steps.
int checkpoint_list(const char *out, int64_t **steps) {
    int n = 0, room = 0;
    *steps = NULL;
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));) {
        int64_t step;
        if (strncmp(e->d_name, "step_", 5) || !step_digits(e->d_name + 5)
            || !parse_int(e->d_name + 5, &step)) continue;
        *steps = (int64_t *)array_room(*steps, n + 1, &room, sizeof step);
        int at = n++;
        for (; at > 0 && (*steps)[at - 1] > step; at--) (*steps)[at] = (*steps)[at - 1];
        (*steps)[at] = step;
    }
    if (d) closedir(d);
    return n;
}

Str checkpoint_path(const char *out, int64_t step) { return str("%s/step_%08" PRId64, out, step); }

// A name for the folder of a step that is being written or removed: OUT/tmp.step_N, or where something is in
// the way OUT/tmp.step_N.1 and so on.
static Str free_name(const char *out, int64_t step) {
    struct stat info;
    const Str first = str("%s/tmp.step_%08" PRId64, out, step);
    Str name = first;
    for (int i = 1; !lstat(name.s, &info); i++) name = str("%s.%d", first.s, i);
    return name;
}

static int is_free_name(const char *name) {             // "tmp.old": of an earlier version
    const size_t n = strncmp(name, "tmp.step_", 9) ? 0 : step_digits(name + 9);
    const char *rest = name + 9 + n;
    if (n && *rest == '.' && rest[1]) rest += 1 + strspn(rest + 1, "0123456789");
    return !strcmp(name, "tmp.old") || (n && !*rest);
}

static int is_real_folder(const char *path) {           // and no link to one
    struct stat info;
    return !lstat(path, &info) && S_ISDIR(info.st_mode);
}

// Of a killed run; the caller has the lock.
void out_remove_leftovers(const char *out) {
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));) {
        const Str path = str("%s/%s", out, e->d_name);
        if (is_free_name(e->d_name) && is_real_folder(path.s)) remove_folder(path.s);
    }
    if (d) closedir(d);
}

// ---- OUT --------------------------------------------------------------------------------------------------
Str folder_above(const char *path) {                    // "a/b/" -> "a", "b" -> "."
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    char *real = path[n - 1] == '.' ? realpath(path, NULL) : NULL;      // "a/..": of the folder that it means
    if (real) path = real, n = strlen(real);
    while (n && path[n - 1] != '/') n--;
    while (n > 1 && path[n - 1] == '/') n--;
    const Str above = n ? str("%.*s", (int)n, path) : str(".");
    free(real);
    return above;
}

// "latest" -> "/runs/out/step_00000100", where that is a link; else path.
const char *without_link(const char *path) {
    struct stat info;
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    const int is_link = !lstat(str("%.*s", (int)n, path).s, &info) && S_ISLNK(info.st_mode);
    const char *real = is_link ? realpath(path, NULL) : NULL;
    return real ? real : path;
}

int same_folder(const char *a, const char *b) {
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// mkdir -p
void out_make(const char *out) {
    if (mkdir(out, 0777) && errno == ENOENT && strchr(out, '/')) {
        out_make(folder_above(out).s);
        mkdir(out, 0777);
    }
    const int failed = errno;
    struct stat info;
    if (stat(out, &info) || !S_ISDIR(info.st_mode)) die("cannot make --out %s: %s", out, strerror(failed));
}

// Dies unless OUT is a writable folder or can become one; leaves nothing behind.
void out_check(const char *out) {
    struct stat info;
    Str at = str("%s", out), missing = {""};
    while (stat(at.s, &info) && (errno == ENOENT || errno == ENOTDIR) && strcmp(at.s, ".")) {
        missing = at;
        at = folder_above(at.s);
    }
    if (stat(at.s, &info)) die("cannot make --out %s: %s: %s", out, at.s, strerror(errno));
    if (!S_ISDIR(info.st_mode)) die("--out %s: %s is a file; name a folder", out, at.s);
    if (!*missing.s && access(out, W_OK | X_OK)) die("--out %s is not writable: %s", out, strerror(errno));
    if (!*missing.s) return;
    if (!mkdir(missing.s, 0777)) rmdir(missing.s);      // the only way to know
    else if (errno != EEXIST) die("cannot make --out %s: %s: %s", out, missing.s, strerror(errno));
}

// One run at a time trains in OUT. The kernel takes the lock back however the process ends. Not make: only
// if the file is there, as it is after the first run. One that says something else is not ours.
void out_lock(const char *out, int make) {
    static int fd = -1;
    const Str path = str("%s/lock", out);
    char host[256] = "", holder[512] = "another run";
    if (fd >= 0) return;
    fd = open(path.s, O_RDWR | O_CLOEXEC | O_NOFOLLOW | (make ? O_CREAT : 0), 0666);
    if (fd < 0 && !make && errno == ENOENT) return;
    if (fd < 0) die("cannot write %s: %s; choose another --out", path.s, strerror(errno));
    const ssize_t n = pread(fd, holder, sizeof holder - 1, 0);
    if (n > 0) holder[n] = 0, holder[strcspn(holder, "\n")] = 0;
    if (n > 0 && *holder && strncmp(holder, "process ", 8))     // zeros: what a power failure may leave
        die("%s is not a file of litespark's; move it away, or choose another --out", path.s);
    if (!flock(fd, LOCK_EX | LOCK_NB)) {
        gethostname(host, sizeof host - 1);
        // only a hint: that it fails is no harm
        if (ftruncate(fd, 0) || dprintf(fd, "process %d on %s\n", (int)getpid(), host) < 0) {}
    } else if (errno == EWOULDBLOCK)
        die("--out %s is in use by %s: wait for its end, or name another --out", out, holder);
    else
        fprintf(stderr, "warning: cannot lock %s: %s; see to it that no other run uses this --out\n", path.s,
                strerror(errno));
}

// trainer_state.json names a run, and it is not this one. (Only its first line is looked at: damaged ones and
// those of earlier versions name none.)
static int is_of_another_run(const char *dir, uint64_t run) {
    char line[256] = "";
    FILE *f = fopen(str("%s/trainer_state.json", dir).s, "r");
    if (f && !fgets(line, sizeof line, f)) *line = 0;
    if (f) fclose(f);
    return strstr(line, "\"run\": \"") && !strstr(line, str("\"run\": \"%016" PRIx64 "\"", run).s);
}

// Dies unless what OUT holds is what this run saved before. continued: the run was read from a folder of OUT;
// later_are_damaged: as auto found them.
void out_check_run(const char *out, const TrainState *t, int continued, int later_are_damaged) {
    int64_t *steps;
    const int n = checkpoint_list(out, &steps);
    if (n && !continued)
        die("%s holds step %" PRId64 ": --resume auto continues it, --out NAME starts another", out,
            steps[n - 1]);
    for (int i = 0; i < n; i++) {
        const Str dir = checkpoint_path(out, steps[i]);
        if (is_of_another_run(dir.s, t->run))
            die("%s is of another run: move it away, or name another --out", dir.s);
        if (steps[i] > t->step && !later_are_damaged && !checkpoint_whole(dir.s, /*weights_only=*/0).s[0])
            die("%s is later than step %" PRId64 ": --resume auto continues it; to go another way from here, "
                "name another --out, or move the later steps away", dir.s, t->step);
    }
    free(steps);
}

// Folders of checkpoints that this process wrote or has read: whole, without reading them again.
static struct { char **dir; int n, room; } trusted;

static void trust(const char *dir) {
    trusted.dir = (char **)array_room(trusted.dir, trusted.n + 1, &trusted.room, sizeof *trusted.dir);
    trusted.dir[trusted.n++] = xstrdup(dir);
}

static int is_whole(const char *dir) {
    for (int i = 0; i < trusted.n; i++) if (!strcmp(trusted.dir[i], dir)) return 1;
    if (checkpoint_whole(dir, /*weights_only=*/0).s[0]) return 0;
    trust(dir);
    return 1;
}

// ---- writing ----------------------------------------------------------------------------------------------
// A save in three stages, of which training waits for the first:
// - Each rank copies what it writes to host memory, as the bytes that its files will have (save_copy).
// - A thread of each rank writes and fsyncs its files, with their CRC-32. That all are done, the ranks learn
//   from a sum that each update has anyway.
// - Rank 0 gathers the CRCs; its thread writes checksums.txt, gives the folder its name and removes old ones.
// Without memory for the copy, and at the end of a run, the first call does it all.
// The first failure ends the saving; nothing dies while a half-written folder lies there.
enum { SAVE_NONE, SAVE_WRITES, SAVE_PLACES };   // the same on all ranks, but only rank 0 comes to the last
typedef struct SaveFile {
    char *name;
    StWriter *w;                        // NULL: a small file, `data` is its own
    char *data;                         // (bytes) what is to be written; NULL: it is written
    size_t bytes;
    uint32_t crc;
    int line;                           // of `lines` in checksums.txt; -1: a small file of rank 0
} SaveFile;

static struct Saving {
    int stage;
    int64_t step, keep;
    const char *out;
    Str folder;                         // where it is written
    SaveFile *files;                    // of this rank
    int n_files, room;
    // safetensors files of all ranks: the optimizer's, one of each rank, then n_model of the model
    int lines, n_model;
    Text error;                         // empty while all is well
    double bytes, begin, held;          // of all ranks; when it began; seconds that training was held up
    pthread_t thread;                   // the writer, while has_thread
    int has_thread, done;               // done: it is
} saving;
static struct { char *base; size_t bytes; } save_copy;  // base NULL: none

static int has_failed(void) { return saving.error.n != 0; }

static void save_error(const char *name, int failed) {
    if (!has_failed())
        text_add(&saving.error, "%s/%s: cannot write: %s", saving.folder.s, name, strerror(failed));
}

static SaveFile *save_add(const char *name, StWriter *w, int line) {
    saving.files = (SaveFile *)array_room(saving.files, saving.n_files + 1, &saving.room, sizeof(SaveFile));
    SaveFile f = {xstrdup(name), w, NULL, 0, 0, line};
    saving.files[saving.n_files] = f;
    return &saving.files[saving.n_files++];
}

static void save_small(const char *name, const void *data, size_t n) {
    SaveFile *f = save_add(name, NULL, -1);
    f->data = (char *)memcpy(xmalloc(n), data, n);
    f->bytes = n;
}

static void save_forget(void) {
    for (SaveFile *f = saving.files; f < saving.files + saving.n_files; f++) {
        if (f->w) st_finish(f->w, NULL, NULL);
        else free(f->data);
        free(f->name);
    }
    saving.n_files = 0;
}

// Elements [at, at+n) of unit u in one kind of state are the next values of w.
void save_values(StWriter *w, const Model *m, int kind, int u, size_t at, size_t n) {
    const size_t place = st_take(w, n), size = st_dtypes[w->dtype].bytes;
    #pragma omp parallel for schedule(dynamic) num_threads(io_threads())
    for (size_t done = 0; done < n; done += IO_CHUNK) {
        const size_t k = min_size(n - done, IO_CHUNK), to = place + done * size;
        if (w->image && model_copy_start(m, kind, u, at + done, k, w->dtype == ST_BF16, w->image + to))
            continue;
        const float *values = model_floats(m, kind, u, at + done);
        if (!values) {
            float *copy = io_values[omp_get_thread_num()];
            model_read(m, kind, u, at + done, k, copy);
            values = copy;
        }
        st_write_at(w, to, values, k);
    }
}

static void st_declare_tensor(StWriter *w, const Tensor *t, int dtype) {
    int64_t shape[2] = {t->rows, t->cols};
    st_declare(w, t->name, dtype, t->cols ? 2 : 1, shape);
}

// Announces every tensor of the table.
void st_declare_table(StWriter *w, const ParamTable *p, int dtype) {
    for (const Tensor *t = p->tensors; t < p->tensors + p->n_tensors; t++) st_declare_tensor(w, t, dtype);
}

// The tensors of the table in one kind of state, weights or gradients, are the next values of w. All ranks
// call it, for a unit may have to be gathered; those that do not write have no w.
void save_table(StWriter *w, Model *m, int kind) {
    const ParamTable *p = model_table(m);
    for (int u = 0; u < p->n_units; u++) {
        model_gather(m, kind, u);
        const Tensor *t = p->tensors + p->units[u].first_tensor;
        for (int i = 0; w && i < p->units[u].n_tensors; i++) save_values(w, m, kind, u, t[i].at, t[i].n);
    }
}

static int model_dtype(const Options *o) { return o->precision == BF16 ? ST_BF16 : ST_F32; }

// Unit u's tensors are in file of_unit[u] of the model; returns the number of files. As many as ranks, but of
// at least about 64 MiB and at most about 40 GB each: units in order, each where the middle of it falls when
// the bytes are divided evenly.
static int model_files(const ParamTable *p, int dtype, int world, int *of_unit) {
    const double size = (double)st_dtypes[dtype].bytes;
    double total = 0, before = 0;
    for (int u = 0; u < p->n_units; u++) total += (double)p->units[u].n * size;
    double n = fmin(world, floor(total / (64 << 20)));
    n = fmax(fmax(n, 1), ceil(total / 40e9));
    int files = 0, last = -1;
    for (int u = 0; u < p->n_units; u++) {
        const double bytes = (double)p->units[u].n * size;
        const int place = (int)((before + bytes / 2) * n / total);
        before += bytes;
        files += place != last;                 // none falls into the parts that a large unit spans
        last = place;
        of_unit[u] = files - 1;
    }
    return files;
}

static int model_file_rank(int file, int files, int world) { return (int)((int64_t)file * world / files); }

static const char *const state_kinds[] = {"weights", "master", "m", "v"};

// This rank's share of unit u without vocabulary padding: elements [*first, *first + *n) of the unit.
static void unit_share(const Model *m, int u, size_t *first, size_t *n) {
    const Unit *unit = &model_table(m)->units[u];
    state_share(m, u, first, n);
    *n = *first < unit->n ? min_size(*n, unit->n - *first) : 0;
}

// What rank `rank` writes of it: those with the same share (world / S of them, if S ranks share a unit) write
// a part each.
static void unit_part(const Model *m, int u, int rank, int world, size_t *first, size_t *n) {
    const Unit *unit = &model_table(m)->units[u];
    state_share(m, u, first, n);
    const size_t S = unit->n_padded / *n, part = CEIL_DIV(*n, (size_t)world / S);
    const size_t begin = min_size((size_t)rank / S * part, *n);
    *n = min_size(part, *n - begin);
    *first += begin;
    *n = *first < unit->n ? min_size(*n, unit->n - *first) : 0;
}

// The safetensors files of a rank, declared: its part of the optimizer state, then its files of the model.
static void save_declare(const Model *m, const Options *o, int rank, int world) {
    const ParamTable *p = model_table(m);
    int *of_unit = (int *)xcalloc((size_t)p->n_units, sizeof(int));
    StWriter *w = st_create(NULL, NULL);
    save_add(optimizer_file(rank, world).s, w, rank);
    for (int u = 0; u < p->n_units; u++) for (int kind = STATE_MASTER; kind <= STATE_V; kind++) {
        size_t first, n;
        unit_part(m, u, rank, world, &first, &n);
        const int64_t shape = (int64_t)n;
        const Str name = str("%s.%s.%zu", p->units[u].name, state_kinds[kind], first);
        if (n) st_declare(w, name.s, ST_F32, 1, &shape);
    }
    saving.n_model = model_files(p, model_dtype(o), world, of_unit);
    saving.lines = world + saving.n_model;
    for (int f = 0; f < saving.n_model; f++) {
        if (model_file_rank(f, saving.n_model, world) != rank) continue;
        w = st_create(NULL, "{\"format\":\"pt\"}");
        save_add(model_file(f, saving.n_model).s, w, world + f);
        for (int i = 0; i < p->n_tensors; i++)
            if (of_unit[p->tensors[i].unit] == f) st_declare_tensor(w, &p->tensors[i], model_dtype(o));
    }
    free(of_unit);
}

// Host memory that the copy of a rank takes.
double checkpoint_copy_bytes(const Model *m, const Options *o, int rank, int world) {
    double bytes = 0;
    save_declare(m, o, rank, world);
    for (int i = 0; i < saving.n_files; i++) bytes += (double)st_bytes(saving.files[i].w);
    save_forget();
    return bytes;
}

// Takes that memory, for a run that saves before its end; all ranks call it. Where one has not so much, all
// write without a copy.
void checkpoint_reserve(const Model *m, const Options *o) {
    if (!o->checkpoint_every || o->checkpoint_every >= o->steps) return;
    const double bytes = checkpoint_copy_bytes(m, o, comm_rank(), comm_world());
    save_copy.base = (char *)device_host_memory(m, (size_t)bytes);
    save_copy.bytes = (size_t)bytes;
    if (comm_max(!save_copy.base) == 0) return;
    device_host_memory_free(save_copy.base);
    save_copy.base = NULL;
    printf("note | no %.1f MiB of host memory for a copy of the state: training waits while a checkpoint is "
           "written\n", bytes / 1048576);
}

static void text_add_series(Text *t, const char *key, const double *x) {
    text_add(t, ",\n \"%s\": [%s", key, json_decimal(x[0]));
    for (int i = 1; i < SPIKE_WINDOW; i++) text_add(t, ", %s", json_decimal(x[i]));
    text_add(t, "]");
}

static void save_trainer_state(const TrainState *t) {
    Text j = {NULL, 0, 0};
    text_add(&j, "{\"format\": 2, \"run\": \"%016" PRIx64 "\",\n \"step\": %" PRId64 ", \"updates\": %"
             PRId64 ", \"tokens\": %" PRId64 ", \"world\": %d", t->run, t->step, t->updates, t->tokens,
             comm_world());
    text_add_field(&j, "seconds", t->seconds);
    text_add_field(&j, "joules", t->joules);
    text_add(&j, ", \"targets\": %" PRId64 ", \"reference_crc\": %u", t->targets, t->reference_crc);
    text_add(&j, ",\n \"loader\": {\"seed\": %" PRIu64 ", \"epoch\": %" PRId64 ", \"position\": %" PRId64
             ", \"windows\": %" PRId64 ", \"seq_len\": %" PRId64 ", \"crc\": %" PRId64 ", \"tokens_crc\": %"
             PRId64 "},\n \"options\": ", t->loader.seed, t->loader.epoch, t->loader.position, t->n_windows,
             t->seq_len, t->data_crc, t->tokens_crc);
    text_add_options(&j, /*as_given=*/1);
    text_add(&j, ",\n \"n_healthy\": %" PRId64, t->n_healthy);
    text_add_series(&j, "losses", t->losses);
    text_add_series(&j, "norms", t->norms);
    text_add(&j, "}\n");
    save_small("trainer_state.json", j.s, (size_t)j.n);
    free(j.s);
}

// Reads the side files of the folder model_dir or, where that is NULL, of the tokenizer's; tokenizer.bin is
// t, if there is one. chats (or NULL): data of sft or dpo; the chat template beside them is what was trained,
// and that tokenizer_config.json goes with it.
void side_files_read(const char *model_dir, const Tokenizer *t, const char *chats) {
    const char *end = chats ? strrchr(chats, '/') : NULL;
    const Str data = str("%.*s", end ? (int)(end - chats) : 1, end ? chats : ".");
    const int templates = chats && !access(str("%s/chat_template.jinja", data.s).s, R_OK);
    const char *slash = t ? strrchr(t->path, '/') : NULL;
    const Str beside = str("%.*s", slash ? (int)(slash - t->path) : 1, slash ? t->path : ".");
    for (int i = 0; i < COUNT(side_names) && (model_dir || t) && !comm_rank(); i++) {
        Str path = str("%s/%s", model_dir ? model_dir : beside.s, side_names[i]);
        if (i == SIDE_GENERATION && !model_dir) continue;       // that of another model
        if (i == SIDE_TOKENIZER && t) path = str("%s", t->path);
        if (templates && strstr("tokenizer_config.json chat_template.jinja", side_names[i])
            && !access(str("%s/%s", data.s, side_names[i]).s, R_OK))
            path = str("%s/%s", data.s, side_names[i]);
        if (access(path.s, F_OK)) continue;
        side_files[i].data = read_text_file(path.s, (size_t)1 << 30, &side_files[i].n);
    }
}

// What Hugging Face wants beside the weights.
static void save_side_files(const Config *c, const Options *o) {
    char *config = config_to_json(c, o->precision == BF16 ? "bfloat16" : "float32");
    save_small("config.json", config, strlen(config));
    free(config);
    Text g = {NULL, 0, 0};
    text_add(&g, "{");
    if (c->bos >= 0) text_add(&g, "\"bos_token_id\": %d, ", c->bos);
    if (c->pad >= 0) text_add(&g, "\"pad_token_id\": %d, ", c->pad);
    text_add(&g, "\"eos_token_id\": ");
    config_add_eos(&g, c);
    text_add(&g, ", \"do_sample\": true}\n");
    if (!side_files[SIDE_GENERATION].data) save_small("generation_config.json", g.s, (size_t)g.n);
    free(g.s);
    for (int i = 0; i < COUNT(side_names); i++)
        if (side_files[i].data) save_small(side_names[i], side_files[i].data, side_files[i].n);
}

// model.safetensors.index.json, where the model is in several files: as transformers writes it.
typedef struct IndexRow { const char *name; int unit; } IndexRow;

static void save_index(const ParamTable *p, int dtype, int world) {
    int *of_unit = (int *)xcalloc((size_t)p->n_units, sizeof(int));
    const int files = model_files(p, dtype, world, of_unit);
    IndexRow *row = (IndexRow *)xcalloc((size_t)p->n_tensors, sizeof *row);
    Text t = {NULL, 0, 0};
    for (int i = 0; i < p->n_tensors; i++) row[i].name = p->tensors[i].name, row[i].unit = p->tensors[i].unit;
    qsort(row, (size_t)p->n_tensors, sizeof *row, compare_names);
    text_add(&t, "{\n  \"metadata\": {\n    \"total_parameters\": %zu,\n    \"total_size\": %zu\n  },\n"
             "  \"weight_map\": {", p->n_params, p->n_params * st_dtypes[dtype].bytes);
    for (int i = 0; i < p->n_tensors; i++)
        text_add(&t, "%s\n    \"%s\": \"%s\"", i ? "," : "", row[i].name,
                 model_file(of_unit[row[i].unit], files).s);
    text_add(&t, "\n  }\n}\n");
    save_small("model.safetensors.index.json", t.s, (size_t)t.n);
    free(t.s);
    free(row);
    free(of_unit);
}

// The copy, or where there is no room for one the files themselves; all ranks walk over the units together.
static void save_copy_state(Model *m, const Options *o) {
    const ParamTable *p = model_table(m);
    const int world = comm_world(), rank = comm_rank();
    size_t room = 0;
    save_declare(m, o, rank, world);
    SaveFile *const first_file = saving.files, *const end = first_file + saving.n_files;
    for (SaveFile *f = first_file; f < end; f++) room += st_bytes(f->w);
    const int in_memory = save_copy.base && room <= save_copy.bytes;
    char *at = save_copy.base;
    for (SaveFile *f = first_file; f < end; at += f++->bytes) {
        f->bytes = st_bytes(f->w);
        if (in_memory) f->w->image = f->data = at;
        else st_create_file(f->w, str("%s/%s", saving.folder.s, f->name).s);
        st_begin(f->w);
    }
    int *of_unit = (int *)xcalloc((size_t)p->n_units, sizeof(int));
    model_files(p, model_dtype(o), world, of_unit);
    for (int u = 0; u < p->n_units; u++) {
        model_gather(m, STATE_WEIGHTS, u);
        for (SaveFile *f = first_file + 1; f < end; f++)
            for (int i = 0; i < p->units[u].n_tensors && f->line == world + of_unit[u]; i++) {
                const Tensor *t = &p->tensors[p->units[u].first_tensor + i];
                save_values(f->w, m, STATE_WEIGHTS, u, t->at, t->n);
            }
        for (int kind = STATE_MASTER; kind <= STATE_V; kind++) {
            size_t first, n;
            unit_part(m, u, rank, world, &first, &n);
            if (n) save_values(first_file->w, m, kind, u, first, n);
        }
    }
    free(of_unit);
    device_wait();
    for (SaveFile *f = first_file; f < end && !in_memory; f++) {
        const int failed = st_finish(f->w, &f->crc, NULL);
        f->w = NULL;
        if (failed) save_error(f->name, failed);
    }
}

// Removes all but the `keep` newest whole checkpoints up to step `saved`. Later ones can only be damaged ones
// that a resume went back behind.
static void checkpoint_prune(const char *out, int64_t saved, int64_t keep) {
    int64_t *steps, kept = 0;
    for (int i = checkpoint_list(out, &steps) - 1; i >= 0; i--) {
        const Str dir = checkpoint_path(out, steps[i]), gone = free_name(out, steps[i]);
        if (steps[i] > saved || !is_real_folder(dir.s)) continue;
        if (kept < keep) kept += is_whole(dir.s);
        // renamed first: a kill in between leaves no half checkpoint
        else if (!rename(dir.s, gone.s)) remove_folder(gone.s);
        else fprintf(stderr, "warning: cannot remove %s: %s\n", dir.s, strerror(errno));
    }
    free(steps);
}

// The folder, which is whole, becomes OUT/step_N, in the place of a damaged one if need be.
static void checkpoint_place(void) {
    const Str final = checkpoint_path(saving.out, saving.step), old = free_name(saving.out, saving.step);
    const int replaces = !rename(final.s, old.s);
    if (rename(saving.folder.s, final.s)) {
        text_add(&saving.error, "%s: %s", final.s, strerror(errno));
        if (replaces) rename(old.s, final.s);
        return;
    }
    sync_folder(saving.out);
    if (replaces) remove_folder(old.s);
    trust(final.s);
    checkpoint_prune(saving.out, saving.step, saving.keep);
}

// What is to be written at this stage, by n_threads. In the end nothing but checksums.txt is missing, then
// nothing.
static void save_write(int n_threads) {
    for (SaveFile *f = saving.files; f < saving.files + saving.n_files && !has_failed(); f++) {
        if (!f->data) continue;
        const int failed = st_write_file(str("%s/%s", saving.folder.s, f->name).s, f->data, f->bytes,
                                         n_threads, &f->crc);
        if (failed) save_error(f->name, failed);
    }
    if (saving.stage != SAVE_PLACES || has_failed()) return;
    sync_folder(saving.folder.s);
    checkpoint_place();
}

static void *writer_main(void *unused) {
    (void)unused;
    is_writer = 1;
    save_write(1);
    __atomic_store_n(&saving.done, 1, __ATOMIC_RELEASE);
    return NULL;
}

// save_write in a thread, or here: with several, or because there can be no other. Signals stay with the main
// thread.
static void save_start(int in_thread) {
    sigset_t all, before;
    sigfillset(&all);
    saving.done = 0;
    if (in_thread) pthread_sigmask(SIG_BLOCK, &all, &before);
    saving.has_thread = in_thread && !pthread_create(&saving.thread, NULL, writer_main, NULL);
    if (in_thread) pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (saving.has_thread) return;
    save_write(io_threads());
    saving.done = 1;
}

static int save_done(void) { return __atomic_load_n(&saving.done, __ATOMIC_ACQUIRE); }

// Until this rank's writer is done; the others, in comm_barrier, are told that it works.
static void save_join(void) {
    int64_t seen = 0;
    while (!save_done()) {
        const int64_t signs = __atomic_load_n(&writer_signs, __ATOMIC_RELAXED);
        if (signs != seen) comm_busy();
        seen = signs;
        usleep(500);
    }
    if (saving.has_thread) pthread_join(saving.thread, NULL);
    saving.has_thread = 0;
}

// Removes what was begun and ends the run. together: all ranks are here.
static void save_die(int together) {
    const int known = has_failed();
    const Str why = known ? str("%s; older checkpoints are whole: make room, then --resume auto",
                                saving.error.s) : str("another rank could not write its part");
    save_forget();
    free(saving.error.s);
    memset(&saving.error, 0, sizeof saving.error);
    saving.stage = SAVE_NONE;
    if (comm_rank() == 0) remove_folder(saving.folder.s);
    if (together) comm_barrier();
    // the lowest of those who know says it; its end is a signal to the others
    const int turn = comm_world() - comm_rank(), first = together ? (int)comm_max(known ? turn : 0) : turn;
    for (int i = 0; i < 40 && turn != first; i++) if (usleep(500000)) _exit(EXIT_FAILURE);
    die("cannot save step %" PRId64 ": %s", saving.step, why.s);
}

// All ranks have written. Rank 0 gets their CRCs, and the rest is its own.
static void save_collect(void) {
    double *sums = (double *)xcalloc((size_t)saving.lines * 2 + 1, sizeof(double));
    const int rank = comm_rank();
    Text list = {NULL, 0, 0};
    for (SaveFile *f = saving.files; f < saving.files + saving.n_files; f++) {
        if (f->line < 0) text_add(&list, "%08x %zu %s\n", f->crc, f->bytes, f->name);
        else sums[2 * f->line] = f->crc, sums[2 * f->line + 1] = (double)f->bytes;
    }
    sums[2 * saving.lines] = has_failed();
    comm_sum(sums, saving.lines * 2 + 1);
    const int failed = sums[2 * saving.lines] > 0, world = comm_world();
    saving.bytes = 0;
    for (int i = 0; i < saving.lines; i++) {
        saving.bytes += sums[2 * i + 1];
        text_add(&list, "%08x %.0f %s\n", (uint32_t)sums[2 * i], sums[2 * i + 1],
                 i < world ? optimizer_file(i, world).s : model_file(i - world, saving.n_model).s);
    }
    text_add(&list, "%08x\n", crc32_update(0, list.s, (size_t)list.n));
    free(sums);
    if (failed) free(list.s), save_die(/*together=*/1);
    save_forget();
    saving.stage = rank == 0 ? SAVE_PLACES : SAVE_NONE;
    if (rank == 0) save_small("checksums.txt", list.s, (size_t)list.n);
    free(list.s);
}

// Rank 0: the checkpoint has its name.
static void save_end(void) {
    if (has_failed()) save_die(/*together=*/0);
    save_forget();
    saving.stage = SAVE_NONE;
    const double all = now_seconds() - saving.begin;
    live_end();
    printf("step %" PRId64 " | saved %s in %.1f s, training held up %.1f s\n", saving.step,
           checkpoint_path(saving.out, saving.step).s, all, saving.held);
    fflush(stdout);
    Text r = {NULL, 0, 0};
    text_add(&r, "{\"type\": \"save\", \"step\": %" PRId64, saving.step);
    text_add_field(&r, "seconds_held_up", saving.held);
    text_add_field(&r, "seconds_in_background", all - saving.held);
    text_add_field(&r, "bytes", saving.bytes);
    log_record(&r);
}

// 1 while this rank writes what others wait for.
int checkpoint_writing(void) { return saving.stage == SAVE_WRITES && !save_done(); }

// After each update, with the number of ranks that were writing when it began: a save's next stage.
void checkpoint_turn(double writing) {
    const double start = now_seconds();
    if (saving.stage == SAVE_WRITES && writing == 0) {
        save_join();
        save_collect();
        if (saving.stage == SAVE_PLACES) save_start(/*in_thread=*/1);
        saving.held += now_seconds() - start;
    } else if (saving.stage == SAVE_PLACES && save_done()) {
        save_join();
        save_end();
    }
}

// Until the checkpoint that is being written, if there is one, is whole; all ranks call it.
void checkpoint_wait(void) {
    const double start = now_seconds();
    const int writes = saving.stage == SAVE_WRITES;
    if (writes) {
        save_join();
        comm_barrier();
        save_collect();
        if (saving.stage == SAVE_PLACES) save_start(/*in_thread=*/0);
    }
    if (saving.stage == SAVE_PLACES) {
        save_join();
        saving.held += now_seconds() - start;
        save_end();
    }
    comm_barrier();
}

// Saves everything as OUT/step_N; all ranks call it. goes_on: training does, while the rest is written; else,
// or without memory for a copy, this returns when the checkpoint is whole. Dies if the disk refuses, after
// removing what it began.
void checkpoint_save(Model *m, const TrainState *t, const Config *c, const Options *o, int goes_on) {
    static int said;
    if (goes_on && (checkpoint_writing() || saving.stage == SAVE_PLACES) && !said++)
        printf("note | step %" PRId64 ": training waits for the checkpoint of step %" PRId64 ", which is "
               "still being written; a larger --checkpoint-every avoids that\n", t->step, saving.step);
    checkpoint_wait();
    saving.begin = now_seconds();
    saving.step = t->step;
    saving.out = o->out;
    saving.keep = o->keep;
    Str tmp = free_name(o->out, t->step);
    int failed = comm_rank() == 0 && mkdir(tmp.s, 0777) ? errno : 0;
    comm_broadcast(&failed, sizeof failed);
    comm_broadcast(&tmp, sizeof tmp);                   // of rank 0; now it is there
    saving.folder = tmp;
    if (failed) {
        text_add(&saving.error, "%s: %s", tmp.s, strerror(failed));
        save_die(/*together=*/1);
    }
    save_copy_state(m, o);
    if (comm_rank() == 0) {
        if (saving.n_model > 1) save_index(model_table(m), model_dtype(o), comm_world());
        save_side_files(c, o);
        save_trainer_state(t);
    }
    goes_on &= save_copy.base != NULL;
    saving.stage = SAVE_WRITES;
    save_start(goes_on);
    saving.held = now_seconds() - saving.begin;
    if (!goes_on) checkpoint_wait();
}

// ---- reading ----------------------------------------------------------------------------------------------
// What bytes [begin, end) of a file of n bytes add (^) to its CRC-32. 0: they cannot be read.
static int file_crc_part(const char *path, size_t begin, size_t end, size_t n, uint32_t *crc) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    int ok = fd >= 0;
    const size_t piece = sizeof io_values[0];
    uint32_t sum = 0;
    #pragma omp parallel for schedule(dynamic) num_threads(io_threads()) reduction(^ : sum) reduction(& : ok)
    for (size_t at = begin; at < end; at += piece) {
        const size_t k = min_size(end - at, piece);
        say_busy();
        char *data = (char *)io_values[omp_get_thread_num()];
        ssize_t got = 1;
        for (size_t done = 0; done < k && got > 0; done += (size_t)got)
            got = pread(fd, data + done, k - done, (off_t)(at + done));
        ok &= got > 0;
        sum ^= crc32_before(crc32_update(0, data, k), n - at - k);
    }
    if (fd >= 0) close(fd);
    *crc = sum;
    return ok;
}

static int file_crc(const char *path, uint32_t *crc, size_t *bytes) {         // 0: not there, or not readable
    struct stat info;
    if (stat(path, &info) || !S_ISREG(info.st_mode)) return 0;
    *bytes = (size_t)info.st_size;
    return file_crc_part(path, 0, *bytes, *bytes, crc);
}

// The text of checksums.txt without its last line, if that fits it; else why is not empty.
static char *list_read(const char *path, size_t *size, Str *why) {
    struct stat info;
    *size = 0;
    if (stat(path, &info) || info.st_size < 9 || info.st_size > 1 << 26) {
        *why = str("%s is missing or empty", path);
        return NULL;
    }
    char *text = read_text_file(path, 1 << 26, size);
    *size -= 9;
    if (strcmp(text + *size, str("%08x\n", crc32_update(0, text, *size)).s))
        *why = str("%s does not match its own checksum", path);
    text[*size] = 0;
    return text;
}

typedef struct Listed { char *name; uint32_t crc; size_t bytes; } Listed;       // a line of it

// The n files that it names. weights_only: of the model's files, which --init-from reads.
static Listed *list_parse(char *text, const char *path, int weights_only, int *n, Str *why) {
    Listed *list = NULL;
    int room = *n = 0;
    for (char *line = text, *next; *line; line = next) {
        Listed f = {NULL, 0, 0};
        int name = 0;
        next = line + strcspn(line, "\n");
        if (*next) *next++ = 0;
        const int fields = sscanf(line, "%" SCNx32 " %zu %n", &f.crc, &f.bytes, &name);
        f.name = line + name;
        if (fields != 2 || !name || strlen(f.name) > 255) *why = str("%s has a bad line", path);
        if (weights_only && strncmp(f.name, "model", 5) && strcmp(f.name, "config.json")) continue;
        list = (Listed *)array_room(list, *n + 1, &room, sizeof f);
        list[(*n)++] = f;
    }
    return list;
}

static Str file_in(const char *dir, const Listed *f) { return str("%s/%s", dir, f->name); }

// Of rank 0, which looks first. Without reading the files: are they there, with their bytes?
static void list_check_sizes(const char *dir, const Listed *list, int n, Str *why) {
    struct stat info;
    for (int i = n - 1; i >= 0; i--) {
        const Str file = file_in(dir, &list[i]);
        if (stat(file.s, &info) || !S_ISREG(info.st_mode)) *why = str("%s is missing", file.s);
        else if ((size_t)info.st_size != list[i].bytes)
            *why = str("%s has %zu bytes, not %zu", file.s, (size_t)info.st_size, list[i].bytes);
    }
}

// checkpoint_whole by `world` ranks together, each of which reads its part of all bytes. The CRC-32 of a file
// is the exclusive or of what its parts add: in each bit whether the sum over the ranks is odd.
static Str verify(const char *dir, int weights_only, int rank, int world) {
    enum { SUMS = 33 };                         // of a file: 32 bits, and ranks that could not read it
    const Str path = str("%s/checksums.txt", dir);
    Str why = {""};
    size_t size = 0, total = 0, at = 0;
    int n = 0;
    char *text = rank ? NULL : list_read(path.s, &size, &why);
    if (world > 1) comm_broadcast(&size, sizeof size);
    if (rank) text = (char *)xcalloc(size + 1, 1);
    if (world > 1) comm_broadcast(text, size);
    Listed *list = text && !why.s[0] ? list_parse(text, path.s, weights_only, &n, &why) : NULL;
    if (rank == 0 && !why.s[0]) list_check_sizes(dir, list, n, &why);
    if (world > 1) comm_broadcast(&why, sizeof why);
    double *sums = (double *)xcalloc((size_t)n * SUMS, sizeof(double));
    for (int i = 0; i < n; i++) total += list[i].bytes;
    const size_t begin = total / (size_t)world * (size_t)rank;
    const size_t end = rank + 1 < world ? begin + total / (size_t)world : total;
    for (int i = 0; i < n && !why.s[0]; at += list[i++].bytes) {
        const size_t from = begin > at ? begin - at : 0;
        const size_t to = end > at ? min_size(end - at, list[i].bytes) : 0;
        uint32_t crc = 0;
        if (from < to)
            sums[i * SUMS + 32] = !file_crc_part(file_in(dir, &list[i]).s, from, to, list[i].bytes, &crc);
        for (int b = 0; b < 32; b++) sums[i * SUMS + b] = crc >> b & 1;
    }
    if (world > 1 && !why.s[0]) {
        comm_barrier();                         // which takes a while
        comm_sum(sums, n * SUMS);
    }
    for (int i = 0; i < n && !why.s[0]; i++) {
        uint32_t crc = 0;
        for (int b = 0; b < 32; b++) crc |= (uint32_t)((int)sums[i * SUMS + b] & 1) << b;
        if (sums[i * SUMS + 32] > 0) why = str("%s cannot be read", file_in(dir, &list[i]).s);
        else if (crc != list[i].crc) why = str("%s is damaged (checksum differs)", file_in(dir, &list[i]).s);
    }
    free(sums);
    free(list);
    free(text);
    return why;
}

// Empty if every file of the checkpoint is there with the recorded bytes; else what is wrong. weights_only:
// of the model's files, which --init-from reads.
Str checkpoint_whole(const char *dir, int weights_only) { return verify(dir, weights_only, 0, 1); }

// The same, by all ranks together.
static Str checkpoint_whole_together(const char *dir, int weights_only) {
    return verify(dir, weights_only, comm_rank(), comm_world());
}

// --resume: the folder to continue, whole; NULL: auto found none. It names damaged ones and tries older ones.
char *checkpoint_choose(const char *resume, const char *out) {
    Str why = {""};
    if (strcmp(resume, "auto")) {
        why = checkpoint_whole_together(resume, /*weights_only=*/0);
        if (why.s[0] && access(str("%s/checksums.txt", resume).s, F_OK))
            die("--resume %s: no checkpoint is there (no checksums.txt); name a folder such as "
                "OUT/step_00000100, or OUT", resume);
        if (why.s[0]) die("--resume %s: %s; resume an older checkpoint", resume, why.s);
        trust(resume);
        return xstrdup(resume);
    }
    int64_t *steps, chosen = -1;
    int n = checkpoint_list(out, &steps);
    comm_broadcast(&n, sizeof n);                       // what rank 0 sees, all look at
    for (int i = n - 1; i >= 0 && chosen < 0; i--) {
        int64_t step = comm_rank() ? 0 : steps[i];
        comm_broadcast(&step, sizeof step);
        const Str dir = checkpoint_path(out, step);
        why = checkpoint_whole_together(dir.s, /*weights_only=*/0);
        if (!why.s[0]) chosen = step, trust(dir.s);
        else if (comm_rank() == 0) fprintf(stderr, "warning: %s; trying an older checkpoint\n", why.s);
    }
    free(steps);
    if (n && chosen < 0)
        die("--resume auto: no whole checkpoint in %s (%s); remove the folder or name another --out",
            out, why.s);
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
        const char *wish = xstrdup(o->given ? option_text(o) : "");
        const char *text = o->text;
        option_set(o, e->str);
        if (!o->given || !strcmp(wish, option_text(o))) continue;
        if (o->kind == FIXED)
            die("%s %s: the run was begun with %s, which cannot change; leave it out, or start another run "
                "with --init-from", o->name, wish, option_text(o));
        if (comm_rank() == 0) printf("resume: %s was %s, is now %s\n", o->name, option_text(o), wish);
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
    t->targets = json_int(root, "targets", where, 0, INT64_MAX, t->tokens);
    t->reference_crc = (uint32_t)json_int(root, "reference_crc", where, 0, UINT32_MAX, 0);
    t->n_healthy = json_int(root, "n_healthy", where, 0, MOST, JSON_REQUIRED);
    read_series(root, "losses", where, t->losses);
    read_series(root, "norms", where, t->norms);
    const Json *loader = json_get(root, "loader");
    t->loader.seed = (uint64_t)json_int(loader, "seed", where, 0, INT64_MAX, JSON_REQUIRED);
    t->loader.epoch = json_int(loader, "epoch", where, 0, MOST, JSON_REQUIRED);
    t->loader.position = json_int(loader, "position", where, 0, MOST, JSON_REQUIRED);
    t->n_windows = json_int(loader, "windows", where, 0, MOST, 0);
    t->seq_len = json_int(loader, "seq_len", where, 0, INT_MAX, 0);
    t->data_crc = json_int(loader, "crc", where, 0, UINT32_MAX, 0);
    t->tokens_crc = json_int(loader, "tokens_crc", where, 0, UINT32_MAX, 0);
    t->run = strtoull(json_string(root, "run", where, "0"), NULL, 16);
    options_resume(json_get(root, "options"), where, format, was);
    free(root);
}

// Elements [first, first+n) of a tensor become elements at, at+1, ... of unit u in one kind of state.
static void read_values(const StSet *s, const StTensor *t, size_t first, size_t n,
                        Model *m, int kind, int u, size_t at) {
    st_read(s, t, first, 0, io_values[0]);          // dies here, not in every thread, of a wrong dtype
    int bad = 0;
    #pragma omp parallel for schedule(dynamic) num_threads(io_threads()) reduction(| : bad)
    for (size_t done = 0; done < n; done += IO_CHUNK) {
        const size_t k = min_size(n - done, IO_CHUNK);
        comm_busy();
        float *own = model_floats(m, kind, u, at + done);
        float *values = own ? own : io_values[omp_get_thread_num()];
        st_read(s, t, first + done, k, values);
        for (size_t i = 0; i < k; i++) bad |= !isfinite(values[i]);
        if (!own) model_write(m, kind, u, at + done, k, values);
    }
    if (bad)
        die("%s: tensor %s holds a value that is not finite; use the weights from before",
            s->files[t->file].path, t->name);
}

// Elements [first, first+n) of unit u in one kind of state become its elements in kind `to`, from whichever
// tensors hold them; dies if any is missing.
static void optimizer_read(const StSet *s, Model *m, int u, int kind, size_t first, size_t n, int to) {
    const Unit *unit = &model_table(m)->units[u];
    Str text = str("%s.%s.", unit->name, state_kinds[kind]);
    const char *prefix = text.s;
    size_t found = 0;
    int first_tensor = 0, above = s->n_tensors;         // sorted: the first that is not before prefix
    while (first_tensor < above) {
        const int middle = (first_tensor + above) / 2;
        if (strcmp(s->tensors[middle].name, prefix) < 0) first_tensor = middle + 1;
        else above = middle;
    }
    for (const StTensor *t = s->tensors + first_tensor; t < s->tensors + s->n_tensors; t++) {
        int64_t offset;
        if (strncmp(t->name, prefix, strlen(prefix))) break;
        if (!parse_int(t->name + strlen(prefix), &offset) || offset < 0) continue;
        size_t begin = (size_t)offset > first ? (size_t)offset : first;
        size_t end = min_size((size_t)offset + t->n, first + n);
        if (begin >= end) continue;
        read_values(s, t, begin - (size_t)offset, end - begin, m, to, u, begin);
        found += end - begin;
    }
    if (found != n)
        die("%s: the optimizer files hold %zu of %zu values of %s of %s; this checkpoint is of another model",
            s->files[0].path, found, n, state_kinds[kind], unit->name);
}

// Weights and, for training (state), m and v of a checkpoint written on any number of ranks; only what this
// rank keeps is read. The weights come from the masters; model_set_master then derives what is computed with.
void checkpoint_read_model(const char *dir, Model *m, int state) {
    const ParamTable *p = model_table(m);
    StSet *s = st_open_all(str("%s/optimizer-*-of-*.safetensors", dir).s);
    if (!s) die("%s: no optimizer state here; --init-from %s starts a new run from its weights", dir, dir);
    for (int u = 0; u < p->n_units; u++) {
        size_t at, n;
        unit_share(m, u, &at, &n);
        if (opt.zero == 3) optimizer_read(s, m, u, STATE_MASTER, at, n, STATE_WEIGHTS);
        else optimizer_read(s, m, u, STATE_MASTER, 0, p->units[u].n, STATE_WEIGHTS);
        for (int kind = STATE_M; state && kind <= STATE_V; kind++) optimizer_read(s, m, u, kind, at, n, kind);
    }
    st_close(s);
}

static Str shape_text(int n_dims, int64_t rows, int64_t cols) {
    if (n_dims == 1) return str("[%" PRId64 "]", rows);
    return n_dims == 2 ? str("[%" PRId64 ", %" PRId64 "]", rows, cols) : str("of %d dimensions", n_dims);
}

static int same_values(const StSet *s, const StTensor *a, const StTensor *b) {
    int same = a->n_dims == b->n_dims && !memcmp(a->shape, b->shape, sizeof a->shape);
    float *other = (float *)xmalloc(IO_CHUNK * sizeof(float));
    for (size_t done = 0; same && done < a->n; done += IO_CHUNK) {
        size_t k = min_size(a->n - done, IO_CHUNK);
        st_read(s, a, done, k, io_values[0]);
        st_read(s, b, done, k, other);
        same = !memcmp(io_values[0], other, k * sizeof(float));
    }
    free(other);
    return same;
}

// Weights of any Hugging Face directory into m. Every tensor must be there with its shape; those without a
// place in the model are said and left out, as in transformers.
void weights_read(const char *dir, Model *m, const Config *c) {
    const ParamTable *p = model_table(m);
    int ours = !access(str("%s/checksums.txt", dir).s, F_OK);
    comm_broadcast(&ours, sizeof ours);
    if (ours) {
        const Str why = checkpoint_whole_together(dir, /*weights_only=*/1);
        if (why.s[0])
            die("--init-from %s: %s; if it was changed on purpose, remove checksums.txt", dir, why.s);
    }
    StSet *s = st_open(dir);
    char *used = (char *)xcalloc((size_t)s->n_tensors + 1, 1);
    const StTensor *head = st_find(s, "lm_head.weight");
    for (int i = 0; i < p->n_tensors; i++) {
        const Tensor *t = &p->tensors[i];
        const StTensor *from = st_find(s, t->name);
        if (!from && !strncmp(t->name, "model.", 6)) from = st_find(s, t->name + 6);    // without a head
        if (c->tied && head && t->unit == UNIT_EMBED) {     // one of the two may be absent, or both are equal
            if (from && !same_values(s, from, head))
                die("%s: lm_head.weight is not %s, but config.json says that they are one; set "
                    "\"tie_word_embeddings\" to false there to train both", dir, t->name);
            from = from ? from : head;
            used[head - s->tensors] = 1;
        }
        if (!from)
            die("%s: tensor %s is missing; config.json and weights do not belong together", dir, t->name);
        if (from->n_dims != (t->cols ? 2 : 1) || from->shape[0] != t->rows || from->shape[1] != t->cols)
            die("%s: tensor %s has shape %s, config.json asks for %s", dir, t->name,
                shape_text(from->n_dims, from->shape[0], from->shape[1]).s,
                shape_text(t->cols ? 2 : 1, t->rows, t->cols).s);
        read_values(s, from, 0, t->n, m, STATE_WEIGHTS, t->unit, t->at);
        used[from - s->tensors] = 1;
    }
    Text left = {NULL, 0, 0};
    int n_left = 0;
    for (int j = 0; j < s->n_tensors; j++)
        if (!used[j] && n_left++ < 8) text_add(&left, n_left > 1 ? ", %s" : "%s", s->tensors[j].name);
    if (n_left) printf("weights | left out, no place in the model: %s%s\n", left.s,
                       n_left > 8 ? str(" and %d more", n_left - 8).s : "");
    free(left.s);
    free(used);
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

// ---- DPO: the reference's log p, beside the shards --------------------------------------------------------
// X.ds has X.DEVICE-PRECISION-CRC.ref, CRC being that of the reference: of what its config.json says beyond
// the shapes of its weights, and of those (as their names and values are in memory). Little endian: 16 words
// of 4 bytes, then float32 (rows, pairs, 2): log p of the chosen and of the rejected answer of each pair of
// each row; 0 where a row has fewer.
enum { REFERENCE_MAGIC = 20261129, REFERENCE_WORDS = 16 };
static const char *const reference_words[] = {"magic", "version", "CRC of the reference", "CRC of the shard",
    "sequence length", "precision", "rows", "pairs per row", "CRC of the values"};

uint32_t model_crc(Model *m, const Config *c) {
    const ParamTable *p = model_table(m);
    const Str arithmetic = config_arithmetic(c);
    uint32_t crc = crc32_update(0, arithmetic.s, strlen(arithmetic.s));
    for (const Tensor *t = p->tensors; t < p->tensors + p->n_tensors; t++) {
        crc = crc32_update(crc, t->name, strlen(t->name));
        model_gather(m, STATE_WEIGHTS, t->unit);
        for (size_t at = 0; at < t->n; at += IO_CHUNK) {
            const size_t n = min_size(t->n - at, IO_CHUNK);
            model_read(m, STATE_WEIGHTS, t->unit, t->at + at, n, io_values[0]);
            crc = crc32_update(crc, io_values[0], n * sizeof(float));
            comm_busy();
        }
    }
    return crc ? crc : 1;                                   // 0: not known
}

static Str reference_path(const Shard *s, uint32_t weights) {
    return str("%.*s.%s-%s-%08x.ref", (int)(strlen(s->path) - 3), s->path, device_kind,
               opt.precision == BF16 ? "bf16" : "fp32", weights);
}

static void reference_header(const DataLoader *dl, const Shard *s, uint32_t weights, uint32_t *words) {
    uint32_t crc;
    size_t bytes;
    if (!file_crc(s->path, &crc, &bytes))
        die("token shard '%s' cannot be read: %s", s->path, strerror(errno));
    const uint32_t all[REFERENCE_WORDS] = {REFERENCE_MAGIC, 1, weights, crc, (uint32_t)dl->T,
        (uint32_t)opt.precision, (uint32_t)s->n_windows, (uint32_t)s->most_documents / 2};
    memcpy(words, all, sizeof all);
}

static size_t reference_values(const Shard *s) { return s->n_windows * (size_t)(s->most_documents / 2) * 2; }

// The values of shard s, to its rows in dl->reference or from them. Rows of other shards may hold more pairs.
static void reference_copy(const DataLoader *dl, const Shard *s, float *values, int to_rows) {
    const size_t n = (size_t)(s->most_documents / 2) * 2, of_row = (size_t)(dl->most_documents / 2) * 2;
    for (size_t w = 0; w < s->n_windows; w++, values += n) {
        float *row = dl->reference + ((size_t)s->first_window + w) * of_row;
        memcpy(to_rows ? row : values, to_rows ? values : row, n * sizeof(float));
    }
}

// reference_write writes X.ref as this and keeps it locked meanwhile.
static Str reference_part(const char *path, int pid) { return str("%s.%d.part", path, pid); }

// Those whose process is gone: from this host, and from others, as nobody holds the lock.
static void reference_remove_parts(const char *path) {
    DIR *d = opendir(folder_above(path).s);
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    for (struct dirent *e; d && (e = readdir(d));) {
        int pid = 0;
        if (strncmp(e->d_name, name, strlen(name)) || sscanf(e->d_name + strlen(name), ".%d.", &pid) != 1
            || pid <= 0 || strcmp(e->d_name, reference_part(name, pid).s) || !kill(pid, 0) || errno != ESRCH)
            continue;
        const Str part = reference_part(path, pid);
        const int fd = open(part.s, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
        if (fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB)) unlink(part.s);
        if (fd >= 0) close(fd);
    }
    if (d) closedir(d);
}

// dl->reference from the files beside its shards. 0: one is not there. Dies of one that is there and is not
// of this shard and this reference. All ranks read.
int reference_read(DataLoader *dl, uint32_t weights) {
    int all = 1;
    for (Shard *s = dl->shards; s < dl->shards + dl->n_shards; s++) {
        const Str path = reference_path(s, weights);
        if (comm_rank() == 0) reference_remove_parts(path.s);
        uint32_t want[REFERENCE_WORDS], found[REFERENCE_WORDS];
        size_t bytes;
        const size_t n = reference_values(s);
        if (access(path.s, F_OK)) {
            all = 0;
            continue;
        }
        const int fd = open_regular(path.s, "reference", &bytes);
        if (bytes != sizeof found + n * sizeof(float))
            die("'%s' has %zu bytes, '%s' needs %zu; remove it, and it is made again", path.s, bytes, s->path,
                sizeof found + n * sizeof(float));
        float *values = (float *)xmalloc(n * sizeof(float) + 1);
        read_exactly(fd, path.s, found, sizeof found, 0);
        read_exactly(fd, path.s, values, n * sizeof(float), sizeof found);
        close(fd);
        reference_header(dl, s, weights, want);
        want[8] = crc32_update(0, values, n * sizeof(float));
        for (int i = 0; i < COUNT(reference_words); i++)
            if (want[i] != found[i])
                die("'%s': %s is %u, not %u as '%s' and this run have it; remove it, and it is made again",
                    path.s, reference_words[i], found[i], want[i], s->path);
        reference_copy(dl, s, values, /*to_rows=*/1);
        free(values);
    }
    return comm_max(!all) == 0;
}

static void reference_cannot_write(const char *path, const char *why) {
    die("cannot write the reference's log p to %s: %s; copy the shards to a folder that can be written", path,
        why);
}

// Dies unless reference_write can make its files: what is to be kept takes a pass over the data.
void reference_check_folders(const DataLoader *dl, uint32_t weights) {
    for (const Shard *s = dl->shards; s < dl->shards + dl->n_shards && comm_rank() == 0; s++)
        if (access(folder_above(s->path).s, W_OK | X_OK))
            reference_cannot_write(reference_path(s, weights).s, strerror(errno));
}

// Writes the files of reference_read, on rank 0. A file is whole once it has its name.
void reference_write(const DataLoader *dl, uint32_t weights) {
    for (const Shard *s = dl->shards; s < dl->shards + dl->n_shards && comm_rank() == 0; s++) {
        const Str path = reference_path(s, weights), part = reference_part(path.s, (int)getpid());
        uint32_t words[REFERENCE_WORDS];
        const size_t n = reference_values(s);
        float *values = (float *)xmalloc(n * sizeof(float) + 1);
        reference_copy(dl, s, values, /*to_rows=*/0);
        reference_header(dl, s, weights, words);
        words[8] = crc32_update(0, values, n * sizeof(float));
        FILE *f = fopen(part.s, "wb");
        if (f) flock(fileno(f), LOCK_EX | LOCK_NB);             // until it has its name
        const int failed = !f || fwrite(words, sizeof words, 1, f) != 1
                        || fwrite(values, sizeof(float), n, f) != n || fflush(f) || fsync(fileno(f))
                        || rename(part.s, path.s);
        if (failed) {
            const char *why = strerror(errno);
            unlink(part.s);
            reference_cannot_write(path.s, why);
        }
        fclose(f);
        free(values);
    }
}

// ==== 16. Planning: what a run on other GPUs would take ====================================================
// --dry-run --device NAME says of a layout (GPUs, machines, ZeRO, micro-step) whether it fits and what it
// costs, without a GPU. Memory is exact: model_plan lays out the arenas as for a run. Time is MODELLED:
//   compute  a kernel takes the bytes it touches over DRAM's speed; a product its FLOPs over what cuBLASLt
//            reaches, or its bytes; attention and our own products tensor cores plus instructions, on Hopper
//            (wgmma) the largest term of a tile. The counts are of an emulator that ran the kernels, those of
//            Hopper's tiles by hand (dev/speed_model.py, dev/SPEED.md)
//   volume   a ring over n ranks: each sends (n-1)/n of the bytes of a gather or a reduce-scatter, twice that
//            of an all-reduce; of m ranks in a machine, 1/m of it goes over the network
//   latency  as NCCL's own model has it (src/graph/tuning.cc: ring and tree, protocol Simple)
//   overlap  a unit's gradients are summed, and the next unit's weights gathered, while a layer computes:
//            exposed is what takes longer than the layer. Nothing hides an update's last sums (first layer,
//            embedding) nor its first gathers (embedding, first layer)
//   energy   0.9 of the power limit (published pre-training, OLMo 3: 620 to 650 W per H100) x --pue
// Left out: gaps between kernels, the host, SMs that NCCL takes, contention in the network, power limits,
// biases and head norms of Qwen, the second head of dpo; data, evaluation, checkpoints, failures.
typedef struct GpuKind {
    const char *option, *name;      // of --device, NULL: cannot be planned for; of cudaGetDeviceProperties
    double bf16, fp32;              // peaks, dense, 10^12 FLOP/s: tensor cores; without TF32
    double products, dram;          // what cuBLASLt reaches, 10^12 FLOP/s; DRAM, 10^12 B/s
    double sms, clock, mma_sync;    // GHz; mma.sync's share of the peak, 1: all that the tensor cores have
    double memory;                  // GiB of an idle GPU
    double link, network;           // what NCCL reaches per GPU and direction, 10^9 B/s
    double watts;                   // power limit
} GpuKind;
// Peaks, memory, watts: NVIDIA's datasheets, sparse figures halved (4090, 3090: whitepapers, fp32 sums).
// products: 0.7 of the peak on Hopper, where the best shapes reach 0.80 (ml-engineering's MAMF); assumed 0.8
// on A100, 0.9 on 4090, 0.7 else. dram: 0.9 of the datasheet. mma_sync: FlashAttention-2's share on Hopper;
// assumed the same per SM and clock on B200. link: NVLink 0.78 of the datasheet (NCCL issue 1281: 350 of 450
// on H100), PCIe 4.0 0.6, without peer access 0.4 (assumed). network: 400 Gb/s per GPU (nccl-tests issue 290:
// 46 to 48 of 50 GB/s); A100 200; assumed 100 on L40S and, for a machine of eight, on 4090.
static const GpuKind gpu_kinds[] = {
//  --device  name         bf16   fp32  prod. dram   SMs  clock  mma   GiB  link  netw. watts
    {NULL,   "H100 NVL",    835,   60,    0, 0,      0,    0,    0,    0,    0,    0,    0},
    {NULL,   "H100 PCIe",   756,   51,    0, 0,      0,    0,    0,    0,    0,    0,    0},
    {NULL,   "H200 NVL",    835,   60,    0, 0,      0,    0,    0,    0,    0,    0,    0},
    {"h100", "H100",      989.4,   67,  700, 3.0,  132, 1.755, 0.62,  79,  350,   46,  700},
    {"h200", "H200",      989.4,   67,  700, 4.3,  132, 1.755, 0.62, 139,  350,   46,  700},
    {"b200", "B200",       2250,   75, 1575, 7.2,  148,  1.85, 0.32, 178,  700,   46, 1000},
    {"a100", "A100",        312, 19.5,  250, 1.8,  108,  1.41,  1.0,  79,  235,   23,  400},
    {NULL,   "A800",        312, 19.5,    0, 0,      0,    0,    0,    0,    0,    0,    0},
    {"l40s", "L40S",        362, 91.6,  250, 0.78, 142,  2.52,  1.0,  44,   19, 11.5,  350},
    {"4090", "RTX 4090",  165.2, 82.6,  150, 0.9,  128,  2.52,  1.0,  23,   13,  1.4,  450},
    {NULL,   "RTX 3090",     71, 35.6,    0, 0,      0,    0,    0,    0,    0,    0,    0},
};
enum { GPUS_PER_NODE = 8, MOST_GPUS = 4096 };
static const double HOP_NVLINK = 3.4e-6, HOP_PCIE = 5.7e-6, HOP_NETWORK = 14e-6, CALL = 8.4e-6;  // NCCL's
static const double POWER_SHARE = 0.9, WAITING_WANTED = 8 /* percent */, GIB = 1 << 30;

static const GpuKind *gpu_of_option(const char *option) {
    for (const GpuKind *g = gpu_kinds; g < gpu_kinds + COUNT(gpu_kinds); g++)
        if (g->option && !strcmp(g->option, option)) return g;
    return NULL;
}

static int is_kind(const GpuKind *g, const char *name) {
    return strstr(name, g->name) && !strstr(name, "MIG") && !strstr(name, "Laptop");
}

// Dense peak in FLOP/s of the GPU with this name; NAN: not in the table.
double gpu_peak(const char *name, int bf16) {
    for (const GpuKind *g = gpu_kinds; g < gpu_kinds + COUNT(gpu_kinds); g++)
        if (is_kind(g, name)) return 1e12 * (bf16 ? g->bf16 : g->fp32);
    return NAN;
}

// ---- compute: one op after the other, as section 4 runs them ----------------------------------------------
enum { EMBED_FORWARD, EMBED_BACKWARD, NORM_FORWARD, NORM_BACKWARD, LAST_NORM_BACKWARD, NORM_SUMS,
       ROPE_FORWARD, ROPE_BACKWARD, SWIGLU_FORWARD, SWIGLU_BACKWARD, CROSS_ENTROPY, CLEAR_GRADS,
       SUM_OF_SQUARES, ADAMW };
enum { ATTENTION_FORWARD, ATTENTION_BACKWARD, GATE_UP_SWIGLU, DOWN_SWIGLU_BACKWARD, GATE_UP_WGMMA,
       DOWN_WGMMA };
// us on an H100, a + b x + c x^2: of a query head (G share a key) and x = T; of an element of h and x = C
typedef struct MmaKernel { int kernel, D, G; double tensor[3], other[3]; } MmaKernel;
// Attention with wgmma, of heads up to this width, clocks: of a block besides its tiles (start and end, which
// nothing hides), and of a tile, its largest term of tensor cores, shared memory, exponentials, instructions.
// Both times 1.44 forward and 1.65 backward: what the same model of cuDNN's kernels has to be multiplied with
// to give their published speed (H200, T 4096, 64 heads of 128)
typedef struct WgmmaAttention { int width; double forward[2], dq[2], dkdv[2]; } WgmmaAttention;
// counted, written by dev/speed_model.py --planner sync
static const struct { double fixed, per_row; } passes[] = {         // bytes per column
    {588, 2.26562},             // embedding forward
    {2415.4, 2.39753},          // embedding backward
    {0, 4.26562},               // RMSNorm forward
    {1688.73, 10.017},          // RMSNorm backward
    {1374.55, 8.15341},         // the final one's
    {1064, 0},                  // sums of its partials
    {0, 4.22222},               // RoPE forward
    {0, 4.22222},               // RoPE backward
    {0, 6},                     // SwiGLU forward
    {0, 12},                    // SwiGLU backward
    {0, 4.018},                 // cross-entropy
    {0, 4},                     // clear gradients
    {0, 4.00782},               // sum of squares
    {0, 30},                    // AdamW
};
static const MmaKernel mma_kernels[] = {        // tensor cores; instructions and exponentials
    {ATTENTION_FORWARD, 64, 4, {-9.974e-05, 1.278e-05, 1.972e-07}, {0.000101, 5.466e-05, 3.146e-07}},
    {ATTENTION_BACKWARD, 64, 4, {-8.42e-05, 3.978e-05, 7.881e-07}, {-0.0001239, 0.0001075, 9.422e-07}},
    {ATTENTION_FORWARD, 104, 1, {-8.415e-05, 2.218e-05, 3.452e-07}, {-1.662e-05, 7.059e-05, 3.622e-07}},
    {ATTENTION_BACKWARD, 104, 1, {0.06116, -3.7e-05, 1.414e-06}, {0.06476, 9.811e-05, 1.349e-06}},
    {ATTENTION_FORWARD, 128, 4, {4.234e-05, 2.52e-05, 3.946e-07}, {-0.0001332, 7.314e-05, 3.726e-07}},
    {ATTENTION_BACKWARD, 128, 4, {0.07014, -4.251e-05, 1.616e-06}, {0.06862, 4.476e-05, 1.348e-06}},
    {ATTENTION_FORWARD, 128, 8, {5.714e-05, 2.52e-05, 3.946e-07}, {-7.221e-05, 7.304e-05, 3.726e-07}},
    {ATTENTION_BACKWARD, 128, 8, {0.07006, -4.24e-05, 1.616e-06}, {0.06866, 3.66e-05, 1.348e-06}},
    {GATE_UP_SWIGLU, 0, 0, {0, 6.165e-09, 0}, {1.083e-06, 2.835e-09, 0}},
    {DOWN_SWIGLU_BACKWARD, 0, 0, {0, 3.082e-09, 0}, {1.321e-06, 1.622e-09, 0}},
    {GATE_UP_WGMMA, 0, 0, {3.186e-07, 5.392e-09, 0}, {0, 0, 0}},
    {DOWN_WGMMA, 0, 0, {1.593e-07, 2.696e-09, 0}, {0, 0, 0}},
};
static const WgmmaAttention wgmma_attention[] = {   // clocks: start and end of a block, a tile
    {64, {3635, 1475}, {4172, 2539}, {3326, 1693}},
    {96, {3635, 2212}, {4172, 3808}, {3326, 2539}},
    {104, {3635, 2489}, {4172, 4337}, {3326, 2856}},
    {128, {3635, 2950}, {4172, 5078}, {3326, 3385}},
};
// end of what is counted

static double pass(const GpuKind *g, int kernel, double rows, double columns) {
    return columns * (passes[kernel].fixed + passes[kernel].per_row * rows) / (g->dram * 1e12);
}

// M x N sums over K in bf16; out_bytes of a result; add: the result is read, too
static double product(const GpuKind *g, double M, double N, double K, int out_bytes, int add) {
    const double bytes = 2 * (M * K + N * K) + M * N * out_bytes * (1 + add);
    return fmax(2 * M * N * K / (g->products * 1e12), bytes / (g->dram * 1e12));
}

// Of the counted head sizes the nearest; what its tensor cores do grows with the head size.
static double mma_kernel(const GpuKind *g, int kernel, int D, int G, double x) {
    const GpuKind *h100 = gpu_of_option("h100");
    const MmaKernel *best = NULL;
    for (const MmaKernel *k = mma_kernels; k < mma_kernels + COUNT(mma_kernels); k++)
        if (k->kernel == kernel && (!best || abs(k->D - D) < abs(best->D - D)
                                    || (k->D == best->D && abs(k->G - G) < abs(best->G - G))))
            best = k;
    const double *t = best->tensor, *o = best->other, wider = D ? (double)D / best->D : 1;
    const double tensor = h100->bf16 * h100->mma_sync / (g->bf16 * g->mma_sync) * wider;
    const double other = h100->sms * h100->clock / (g->sms * g->clock);
    return 1e-6 * ((t[0] + (t[1] + t[2] * x) * x) * tensor + (o[0] + (o[1] + o[2] * x) * x) * other);
}

// Products with SwiGLU as their epilogue. With wgmma a tile of 128 rows takes the larger of the chip's time
// and of memory's, which reads the right operand anew for 2048 rows; all SMs wait for the one with most
// tiles. The first loads (1500 clocks) and the last epilogue have nothing beside them.
static int is_hopper(const GpuKind *g) { return g->option[0] == 'h'; }
static double swiglu_product(const GpuKind *g, int backward, double N, double C, double F) {
    const int mma = backward ? DOWN_SWIGLU_BACKWARD : GATE_UP_SWIGLU;
    const int wgmma = backward ? DOWN_WGMMA : GATE_UP_WGMMA;
    const double columns = backward ? 192 : 96, tiles = ceil(N / 128) * ceil(F / columns);
    const double operands = 2 * N * C + 2 * C * F * (backward ? 1 : 2) * fmax(1, N / 2048);
    const double bytes = 128 * columns * (backward ? 10 : 6) + operands / tiles;
    const double memory = bytes * g->sms / (g->dram * 1e12);
    if (!is_hopper(g)) return N * F * mma_kernel(g, mma, 0, 0, C);
    const double chip = 128 * columns * g->sms * mma_kernel(g, wgmma, 0, 0, C);
    return ceil(tiles / g->sms) * fmax(chip, memory) + 1500 / (g->clock * 1e9) + memory;
}

// Seconds of `heads` blocks each of 1, 2, .. rows units of so many tiles. Long ones start first, each on the
// SM that is free first: then all SMs end within the last block, a shortest one; half of it is added to the
// mean. Or the longest block is the limit. Against all blocks played through (dev/speed_model.py): within 2%
// where an SM has six or more, and in 76 of 100 shapes; at most 17% off, with texts of a few blocks.
static double attention_blocks(const GpuKind *g, const double clocks[2], double heads, double rows,
                               double tiles) {
    const double unit = tiles * clocks[1], longest = clocks[0] + rows * unit, shortest = clocks[0] + unit;
    const double mean = heads * rows * (longest + shortest) / 2 / g->sms;
    return fmax(longest, mean + (heads * rows > g->sms) * shortest / 2) / (g->clock * 1e9);
}

// Seconds of a layer's causal attention. On Hopper a block of the forward and of dq has 128 queries of a head
// and takes 128 keys a time; one of dk dv has 128 keys and takes 64 queries a time, of each head of its part
// of a group. The sums of parts are written, and read to be added, in DRAM, though L2 may hold them.
static double attention_seconds(const GpuKind *g, int backward, const Config *c, int B, int T) {
    const int G = c->H / c->K, parts = attention_parts(B, T, c->H, c->K, (int)g->sms);
    const double rows = CEIL_DIV(T, 128), H = (double)B * c->H, K = (double)B * c->K * parts;
    const double added = parts > 1 ? (16.0 * parts + 4) * B * T * c->K * c->D / (g->dram * 1e12) : 0;
    const WgmmaAttention *w = wgmma_attention;
    if (!is_hopper(g))
        return H * mma_kernel(g, backward ? ATTENTION_BACKWARD : ATTENTION_FORWARD, c->D, G, T)
             + backward * added;
    while (w->width < c->D) w++;
    if (!backward) return attention_blocks(g, w->forward, H, rows, 1);
    return attention_blocks(g, w->dq, H, rows, 1)
         + attention_blocks(g, w->dkdv, K, rows, 2 * G / parts) + added;
}

enum { OF_EMBEDDING, OF_ATTENTION, OF_PROJECTIONS, OF_MLP, OF_NORMS, OF_HEAD, OF_OPTIMIZER, N_GROUPS };
static const char *const group_names[] = {"embedding", "attention, RoPE", "matmuls q k v o", "MLP", "norms",
                                          "head, loss", "optimizer, clearing"};
enum { MICRO_STEP, FORWARD, AGAIN, BACKWARD, UPDATE, N_PHASES };    // FORWARD to BACKWARD: of one layer

// t (N_PHASES, N_GROUPS) = seconds; n: parameters
static void compute_times(double t[N_PHASES][N_GROUPS], const GpuKind *g, const Config *c, const Plan *p,
                          double n) {
    const double N = (double)p->B * p->T, C = c->C, F = c->F, HD = (double)c->H * c->D;
    const double W = HD + 2.0 * c->K * c->D, qk = (double)(c->H + c->K) * c->D;
    const double chunk = fmin(p->chunk, N), chunks = ceil(N / chunk), norm = pass(g, NORM_FORWARD, N, C);
    const double own = n / p->shard, dram = g->dram * 1e12;
    const int by_default = g->mma_sync == 1 || is_hopper(g);
    const int products = opt.mlp == MLP_PRODUCTS || (!opt.mlp && by_default);
    double *s = t[MICRO_STEP], *f = t[FORWARD], *a = t[AGAIN], *b = t[BACKWARD];
    memset(t, 0, sizeof(double) * N_PHASES * N_GROUPS);
    s[OF_EMBEDDING] = pass(g, EMBED_FORWARD, N, C) + pass(g, EMBED_BACKWARD, N, C);
    s[OF_NORMS] = norm + pass(g, LAST_NORM_BACKWARD, N, C) + pass(g, NORM_SUMS, 0, C);
    s[OF_HEAD] = chunks * (product(g, chunk, c->Vp, C, 2, 0) + product(g, chunk, C, c->Vp, 2, 0)
                           + product(g, c->Vp, C, chunk, 4, 1) + pass(g, CROSS_ENTROPY, chunk, c->V))
               + 2 * N * C / dram;                                      // dx is cleared
    s[OF_OPTIMIZER] = p->zero >= 2 ? pass(g, CLEAR_GRADS, n, 1) : 0;    // what a unit adds to before the sum
    const double gate_up = products ? swiglu_product(g, 0, N, C, F) : product(g, N, 2 * F, C, 2, 0);
    f[OF_NORMS] = 2 * norm;
    f[OF_PROJECTIONS] = product(g, N, W, C, 2, 0) + product(g, N, C, HD, 2, 1);
    f[OF_ATTENTION] = pass(g, ROPE_FORWARD, N, qk) + attention_seconds(g, 0, c, p->B, p->T);
    f[OF_MLP] = gate_up + (products ? 0 : pass(g, SWIGLU_FORWARD, N, F)) + product(g, N, C, F, 2, 1);
    a[OF_PROJECTIONS] = p->recompute == RECOMPUTE_BLOCK ? f[OF_PROJECTIONS] : 0;
    a[OF_ATTENTION] = p->recompute == RECOMPUTE_BLOCK ? f[OF_ATTENTION] : 0;
    a[OF_MLP] = p->recompute != RECOMPUTE_NONE ? gate_up : 0;
    a[OF_NORMS] = p->recompute * norm;                                  // none 0, mlp 1, block 2
    b[OF_MLP] = (products ? swiglu_product(g, 1, N, C, F)
                          : product(g, N, F, C, 2, 0) + pass(g, SWIGLU_BACKWARD, N, F))
              + product(g, C, F, N, 4, 1) + product(g, N, C, 2 * F, 2, 0) + product(g, 2 * F, C, N, 4, 1);
    b[OF_NORMS] = 2 * (pass(g, NORM_BACKWARD, N, C) + pass(g, NORM_SUMS, 0, C));
    b[OF_PROJECTIONS] = product(g, C, HD, N, 4, 1) + product(g, N, HD, C, 2, 0) + product(g, N, C, W, 2, 0)
                      + product(g, W, C, N, 4, 1);
    b[OF_ATTENTION] = pass(g, ROPE_BACKWARD, N, qk) + attention_seconds(g, 1, c, p->B, p->T);
    t[UPDATE][OF_OPTIMIZER] = pass(g, CLEAR_GRADS, p->zero >= 2 ? own : n, 1)
                            + pass(g, SUM_OF_SQUARES, own, 1) + pass(g, ADAMW, own, 1)
                            - (p->bf16_state ? 8 * own / dram : 0);
}

// ---- communication ----------------------------------------------------------------------------------------
typedef struct Traffic {            // of one GPU: collectives, bytes inside its machine and over the network,
    double count, inside, across;
    double seconds, exposed;        // the time, and how much of it nothing hides
} Traffic;
enum { SUMS, GATHERS, GROUP_SUMS, N_TRAFFIC };

// One over n ranks, `stride` apart, of `bytes` (a gather's result); laps of the ring: 1, of an all-reduce 2
static Traffic collective(const GpuKind *g, int per_node, int n, int stride, double bytes, int laps) {
    const double m = fmin(n, fmax(1, per_node / stride)), nodes = ceil(n / m);      // m: in one machine
    const double volume = laps * (n - 1.0) / n * bytes, hop = g->link < 100 ? HOP_PCIE : HOP_NVLINK;
    const double across = nodes > 1 ? volume / m : 0, inside = volume - across;
    const double ring = laps * ((n - nodes) * hop + (nodes - 1) * HOP_NETWORK);
    const double tree = 2 * ((m - 1) * hop + log2(nodes) * HOP_NETWORK);            // all-reduce only
    const double moving = fmax((m > 1 ? volume : 0) / g->link, across / g->network) * 1e-9;
    const double seconds = CALL + (laps == 2 ? fmin(ring, tree) : ring) + moving;
    const Traffic t = {1, inside, across, seconds, seconds};
    return t;
}

// *t += `count` of `one`, each of which has so many seconds of compute to hide under
static void add(Traffic *t, double count, Traffic one, double hides_under) {
    t->count += count * one.count;
    t->inside += count * one.inside;
    t->across += count * one.across;
    t->seconds += count * one.seconds;
    t->exposed += count * fmax(0, one.seconds - hides_under);
}

// t (N_TRAFFIC) = what an update of `micro` micro-steps sends, unit by unit, as section 4 does it: embedding
// and head are gathered once per update; two layers stay whole where the order turns. forward, backward:
// seconds of a layer
static void communication(Traffic *t, const GpuKind *g, const Plan *p, const ParamTable *table, int per_node,
                          double micro, double forward, double backward) {
    const int zero = p->zero, S = zero ? p->shard : p->ranks, groups = p->ranks / S, L = table->n_units - 2;
    const int bytes = opt.reduce_dtype == BF16 ? 2 : 4;
    const double sums = zero >= 2 ? micro : 1, turns = L > 2 ? L - 2 : 0;
    for (int i = 0; i < 3 && p->ranks > 1; i++) {
        const int is_layer = i == 1, is_head = i == 2;
        const double n = (double)table->units[is_head ? L + 1 : i].n_padded;
        const double rounded = bytes == 2 ? (zero ? 6 : 12) * n : 0, added = zero >= 2 ? 12 * n / S : 0;
        Traffic sum = collective(g, per_node, S, 1, n * bytes, zero ? 1 : 2);
        const Traffic gather = collective(g, per_node, S, 1, n * (p->bf16 ? 2 : 4), 1);
        const Traffic of_groups = collective(g, per_node, groups, S, n / S * bytes, 2);
        sum.seconds += (rounded + added) / (g->dram * 1e12);
        add(&t[SUMS], 1, sum, is_head ? backward : 0);
        add(&t[SUMS], sums - 1, sum, is_head ? backward : forward);         // of the next micro-step
        if (is_layer) add(&t[SUMS], sums * (L - 1), sum, backward);
        const double left = fmax(0, backward - sum.seconds - (zero == 3 ? gather.seconds : 0));
        if (zero && groups > 1) add(&t[GROUP_SUMS], 1, of_groups, is_head ? left : 0);
        if (zero && groups > 1 && is_layer) add(&t[GROUP_SUMS], L - 1, of_groups, left);
        if (zero) add(&t[GATHERS], 1, gather, is_head ? forward : 0);
        if (zero && is_layer) add(&t[GATHERS], L - 1, gather, forward);
        if (zero == 3 && is_layer) add(&t[GATHERS], (micro - 1) * turns, gather, forward);
        if (zero == 3 && is_layer) add(&t[GATHERS], micro * turns, gather, fmax(0, backward - sum.seconds));
    }
}

// ---- a layout, and what it would cost ---------------------------------------------------------------------
typedef struct Forecast {
    Plan plan;
    int nodes, fits;
    double bytes, micro;            // of a rank; micro-steps
    double group[N_GROUPS];         // seconds of an update
    Traffic traffic[N_TRAFFIC], all;
    double step;                    // seconds
    double speed, mfu, mfu_causal;  // tokens/s of a GPU; percent
    double seconds, hours, kwh;     // of the run: seconds, GPU-hours
} Forecast;

// tokens: of an update
static Forecast forecast(const GpuKind *g, const Config *c, const Plan *plan, const Machine *machine,
                         double tokens) {
    Forecast f;
    double t[N_PHASES][N_GROUPS], phase[N_PHASES] = {0};
    memset(&f, 0, sizeof f);
    f.plan = *plan;
    f.nodes = machine->ranks / machine->ranks_per_node;
    f.micro = tokens / ((double)plan->B * plan->T * plan->ranks);
    Model *m = model_plan(c, plan);
    for (int i = 0; i < N_ARENAS; i++) f.bytes += model_bytes(m, i);
    f.fits = f.bytes < machine->memory;
    compute_times(t, g, c, plan, config_params(c));
    const double times[N_PHASES] = {f.micro, f.micro * c->L, f.micro * (c->L - 1), f.micro * c->L, 1};
    for (int i = 0; i < N_PHASES; i++) for (int k = 0; k < N_GROUPS; k++) {
        f.group[k] += times[i] * t[i][k];
        f.step += times[i] * t[i][k];
        phase[i] += t[i][k];
    }
    communication(f.traffic, g, plan, model_table(m), machine->ranks_per_node, f.micro, phase[FORWARD],
                  phase[AGAIN] + phase[BACKWARD]);
    for (int i = 0; i < N_TRAFFIC; i++)
        add(&f.all, 1, f.traffic[i], f.traffic[i].seconds - f.traffic[i].exposed);
    f.step += f.all.exposed;
    f.speed = tokens / f.step / plan->ranks;
    f.mfu = 100 * flops_per_token(c, plan->T, /*causal=*/0) * f.speed / (g->bf16 * 1e12);
    f.mfu_causal = 100 * flops_per_token(c, plan->T, /*causal=*/1) * f.speed / (g->bf16 * 1e12);
    f.seconds = opt.tokens / (f.speed * plan->ranks);
    f.hours = f.seconds / 3600 * plan->ranks;
    f.kwh = f.hours * g->watts * POWER_SHARE * opt.pue * 1e-3;
    model_free(m);
    return f;
}

// Seconds of an update of the run at hand on the GPU with this name, by this model; NAN: not modelled.
double plan_seconds(const char *name, const Config *c, const Plan *plan, const Machine *machine) {
    for (const GpuKind *g = gpu_kinds; g < gpu_kinds + COUNT(gpu_kinds); g++)
        if (is_kind(g, name))
            return g->option && plan->bf16 && !opt.document_mask
                 ? forecast(g, c, plan, machine, (double)opt.total_batch_tokens).step : NAN;
    return NAN;
}

static Machine machine_of(const GpuKind *g, int ranks, int nodes) {         // nodes 0: of eight GPUs
    const int n = nodes ? nodes : CEIL_DIV(ranks, GPUS_PER_NODE);
    const Machine m = {ranks, ranks / n, g->memory * GIB - GPU_ALLOWANCE};
    return m;
}

// What --device plans for; --gpus auto: one, to begin with.
Machine plan_machine(void) {
    const int ranks = strcmp(opt.gpus, "auto") ? atoi(opt.gpus) : 1;
    return machine_of(gpu_of_option(opt.device), ranks, (int)opt.nodes);
}

// *f = the layout of `ranks` GPUs that is fastest among those that fit: stage of ZeRO, halvings of the ranks
// that share, recomputation, micro-step. as_given: what the command line gives stays. 0: none fits.
static int best_layout(Forecast *f, const GpuKind *g, const Config *c, int ranks, double tokens,
                       int as_given) {
    const Machine machine = machine_of(g, ranks, 0);
    const double rows = tokens / ((double)opt.seq_len * ranks);         // sequences of a GPU in an update
    int found = 0;
    for (int i = 0; i < 4 * 16 * 3 && rows == floor(rows); i++) {
        Plan p = plan_of(&machine, 1);
        p.zero = i / 48;
        p.shard = p.zero ? ranks >> i / 3 % 16 : 1;
        p.recompute = i % 3;
        if (p.zero ? p.shard < 2 || (p.shard < ranks && p.shard < GPUS_PER_NODE) : i > 2) continue;
        if (as_given && ((option_given("--zero") && p.zero != opt.zero)
                         || (opt.shard_size && p.zero && p.shard != opt.shard_size)
                         || (option_given("--recompute") && p.recompute != opt.recompute))) continue;
        for (; p.B <= rows && (p.B == 1 || p.B * p.T <= ENOUGH_ROWS); p.B++) {
            if (fmod(rows, p.B)) continue;
            if (as_given && option_given("--batch-size") && p.B != opt.batch_size) continue;
            const Forecast it = forecast(g, c, &p, &machine, tokens);
            if (it.fits && (!found || it.speed > f->speed)) *f = it, found = 1;
        }
    }
    return found;
}

// ---- reports ----------------------------------------------------------------------------------------------
// What can be said against the options of planning without the model.
void plan_check(void) {
    static const char *const with_device[] = {"--gpus", "--nodes", "--tokens", "--carbon-intensity", "--pue"};
    const int list = !strcmp(opt.gpus, "auto");
    int64_t n = 1;
    for (int i = 0; i < COUNT(with_device); i++)
        if (!opt.device && option_given(with_device[i]))
            die("%s goes with --dry-run --device", with_device[i]);
    if (!opt.device) return;
    if (!opt.dry_run) die("--device goes with --dry-run: it plans, and trains nothing");
    Text names = {NULL, 0, 0};
    for (int i = 0; i < COUNT(gpu_kinds); i++)
        if (gpu_kinds[i].option) text_add(&names, " %s", gpu_kinds[i].option);
    if (!gpu_of_option(opt.device)) die("--device %s: choose one of%s", opt.device, names.s);
    free(names.s);
    if (!list && (!parse_int(opt.gpus, &n) || n < 1 || n > MOST_GPUS))
        die("--gpus %s: neither auto nor a number from 1 to %d", opt.gpus, MOST_GPUS);
    if (opt.nodes && list) die("--nodes goes with a number of --gpus, not with auto");
    const int64_t nodes = opt.nodes ? opt.nodes : CEIL_DIV(n, GPUS_PER_NODE);
    if (n % nodes)
        die("--gpus %s: not the same number in each of %" PRId64 " machines; say --nodes", opt.gpus, nodes);
    if (opt.precision != BF16) die("--device %s: only --precision bf16 is modelled", opt.device);
}

// As options: "--zero 3 --shard-size 8 --batch-size 2 --recompute none"
static Str layout_text(const Plan *p) {
    static const char *const words[] = {"none", "mlp", "block"};
    const int is_part = p->shard > 1 && p->shard < p->ranks;
    const Str shard = str(is_part ? " --shard-size %d" : "%.0d", is_part ? p->shard : 0);
    return str("--zero %d%s --batch-size %d --recompute %s", p->zero, shard.s, p->B, words[p->recompute]);
}

static double waiting(const Forecast *f) { return 100 * f->all.exposed / f->step; }    // percent

// What to change: a layout that fits, or is faster; more work per GPU; fewer GPUs.
static void advise(const GpuKind *g, const Config *c, const Machine *machine, const Forecast *now,
                   double tokens) {
    Forecast f;
    int n = machine->ranks, found = best_layout(&f, g, c, n, tokens, 0);
    while (!found && !now->fits && (n *= 2) <= MOST_GPUS) found = best_layout(&f, g, c, n, tokens, 0);
    if (!found && !now->fits) printf("advice | no layout of up to %d of these GPUs holds it\n", MOST_GPUS);
    if (found && (!now->fits || f.speed > 1.02 * now->speed))
        printf("advice | --gpus %d %s %s: %.1f GiB, %.0f tokens/s per GPU\n", n, layout_text(&f.plan).s,
               now->fits ? "is faster" : "fits", f.bytes / GIB, f.speed);
    if (!now->fits || waiting(now) <= WAITING_WANTED) return;
    printf("advice | %.1f%% of the step waits for other GPUs; sequences per GPU in an update: %.0f\n",
           waiting(now), now->micro * now->plan.B);
    double more = 1;
    do f = forecast(g, c, &now->plan, machine, (more *= 2) * tokens);
    while (more < 64 && waiting(&f) > WAITING_WANTED);
    printf("advice | --total-batch-tokens %.0f: %.1f%%, %.0f tokens/s per GPU; --lr may need to change\n",
           more * tokens, waiting(&f), f.speed);
    do found = best_layout(&f, g, c, n /= 2, tokens, 0);
    while (found && n > 1 && waiting(&f) > WAITING_WANTED);
    if (found) printf("advice | --gpus %d %s: %.1f%%, %.0f tokens/s per GPU, the run takes %s\n", n,
                      layout_text(&f.plan).s, waiting(&f), f.speed, duration_text(f.seconds).s);
}

// One layout, in full
static void plan_print(const GpuKind *g, const Config *c, const Machine *machine, double tokens) {
    Plan plan = plan_of(machine, opt.batch_size);
    const Forecast f = forecast(g, c, &plan, machine, tokens);
    const char *const rows[] = {plan.zero ? "gradients, reduce-scatter" : "gradients, all-reduce",
                                "weights, all-gather", "gradients, between groups"};
    printf("plan | %d x %s, %d per machine | %s | modelled, not measured\n", plan.ranks, g->option,
           machine->ranks_per_node, layout_text(&plan).s);
    int B = 0;
    for (int bit = 1 << 20; bit; bit /= 2) {
        plan.B = B + bit;
        if ((double)plan.B * plan.T < INT_MAX / 2 && plan_bytes(c, &plan) < machine->memory) B = plan.B;
    }
    printf("fits | %s: %.1f of %.1f GiB | largest micro-step that fits: --batch-size %d\n",
           f.fits ? "yes" : "NO", f.bytes / GIB, machine->memory / GIB, B);
    printf("%-28s %10s %8s\n", "time of an update", "ms", "share");
    for (int i = 0; i < N_GROUPS; i++)
        printf("  %-26s %10.1f %7.1f%%\n", group_names[i], 1e3 * f.group[i], 100 * f.group[i] / f.step);
    printf("  %-26s %10.1f %7.1f%%\n", "communication, exposed", 1e3 * f.all.exposed, waiting(&f));
    printf("%-28s %10s %8s %10s %10s %10s\n", "between GPUs, per GPU", "ms", "exposed", "times",
           g->link < 100 ? "GB PCIe" : "GB NVLink", "GB network");
    for (int i = 0; i <= N_TRAFFIC; i++) {
        const Traffic *t = i < N_TRAFFIC ? &f.traffic[i] : &f.all;
        if (t->count || i == N_TRAFFIC)
            printf("  %-26s %10.1f %8.1f %10.0f %10.3f %10.3f\n",
                   i < N_TRAFFIC ? rows[i] : "communication, all", 1e3 * t->seconds, 1e3 * t->exposed,
                   t->count, 1e-9 * t->inside, 1e-9 * t->across);
    }
    printf("speed | %.3f s per update | %.0f tokens/s per GPU, %.0f in all | mfu %.1f%% (causal %.1f%%)\n",
           f.step, f.speed, f.speed * plan.ranks, f.mfu, f.mfu_causal);
    printf("run | %.4g tokens | %s | %.1f GPU-hours | %.1f kWh, %.4f J/token | %.1f kg CO2\n", opt.tokens,
           duration_text(f.seconds).s, f.hours, f.kwh, f.kwh * 3.6e6 / opt.tokens,
           f.kwh * opt.carbon_intensity * 1e-3);
    advise(g, c, machine, &f, tokens);
}

static int by_cost(const void *a, const void *b) {
    const double x = ((const Forecast *)a)->hours, y = ((const Forecast *)b)->hours;
    return (x > y) - (x < y);
}

// --gpus auto: of each power of two of GPUs the fastest layout that fits, the cheapest first
static void plan_list(const GpuKind *g, const Config *c, double tokens) {
    Forecast found[16], *f = found;
    for (int n = 1; n <= MOST_GPUS; n *= 2) f += best_layout(f, g, c, n, tokens, 1);
    if (f == found)
        die("--gpus auto: no layout of up to %d x %s holds this model and batch", MOST_GPUS, g->option);
    qsort(found, (size_t)(f - found), sizeof *found, by_cost);
    printf("plans | %s | %.4g tokens in updates of %.0f | modelled, not measured\n", g->option, opt.tokens,
           tokens);
    printf("%5s %5s %9s %8s %8s %7s %7s %7s  %s\n", "gpus", "nodes", "GPU-hours", "days", "MWh", "t CO2",
           "exposed", "mfu", "layout");
    for (const Forecast *i = found; i < f; i++)
        printf("%5d %5d %9.0f %8.2f %8.2f %7.2f %6.1f%% %6.1f%%  %s: %.1f GiB, %.0f tokens/s per GPU\n",
               i->plan.ranks, i->nodes, i->hours, i->seconds / 86400, i->kwh * 1e-3,
               i->kwh * opt.carbon_intensity * 1e-6, waiting(i), i->mfu, layout_text(&i->plan).s,
               i->bytes / GIB, i->speed);
}

void plan_report(const Config *c, const Machine *machine) {
    const GpuKind *g = gpu_of_option(opt.device);
    const double tokens = (double)opt.total_batch_tokens;
    if (opt.tokens == 0) opt.tokens = (double)opt.steps * tokens;
    if (strcmp(opt.gpus, "auto")) plan_print(g, c, machine, tokens);
    else plan_list(g, c, tokens);
}
// SHARED END
