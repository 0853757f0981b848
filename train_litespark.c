// ==== 1. Map ===============================================================================================
/*
litespark: train Llama-family language models. This file is the CPU trainer and the reference ("twin") that
proves every gradient of the CUDA trainer train_litespark.cu: same sections, same names, same options.

    make run                                            build, make the default data, train on all cores
    make train && dev/run.sh -np 2 ./train_litespark    the same by hand, two ranks
    ./train_litespark --help                            every option

Letters. B sequences in a micro-step, T tokens in a sequence, N = B*T rows. V vocabulary, L layers, C hidden
size, H query heads, K key/value heads, D head size, F MLP width. All matrices are row-major, last index
fastest; a weight w is (out, in) as in Hugging Face's files, and a row of activations x gives x w^T.
Words. A rank is one process; the ranks share the data of each update. An update (a step of --steps) moves the
weights once; its tokens run as micro-steps: forward and backward of B sequences on every rank.
rstd = 1 / root mean square of a row; lse = log of the softmax's denominator.

The model: the embedding, L layers, a last norm, the head; then loss = cross-entropy. One layer:

    x ----+-- norm1 -- Wqkv -- qk_norm, rope -- attention -- Wo --(+)-- x_mid
          +-------------------------------------------------------+
    kept for backward:     x  rstd1   qkv (qk_raw qk_rstd)   att lse        rebuilt there:  norm1(x)

    x_mid +-- norm2 -- Wgate_up -- silu(g) u -- Wdown --(+)-- x of l+1
          +---------------------------------------------+
    kept for backward:     x_mid  rstd2   gate_up                           rebuilt there:  norm2(x_mid)  h

Llama, Mistral, Qwen2 (biases on q, k, v), Qwen3 (RMSNorm on each head of q and k: qk_norm).

Rules
- Gradients of parameters are +=: they add up over micro-steps and are cleared once per update. Gradients of
  activations are =, except the residual stream `dx`, where each block adds its share. Every op says which.
- What is trained enters as a weight per target (section 5): d objective / d loss of that target.
- Memory: one arena each for weights, gradients, optimizer, activations and workspace, allocated before step
  0; nothing is allocated inside a step. Norm outputs and the SwiGLU product are never kept: backward
  rebuilds them.
- Precision: fp32 (or double, -DfloatX=double, for the gradient checks). Norms, losses and global sums add in
  double. --precision bf16 rounds to bf16 whatever the CUDA trainer stores in bf16 (weights, activations and
  their gradients, the attention probabilities) and keeps sums, master weights, m, v, rstd and LSE in fp32:
  the naive bf16 computation that the CUDA trainer's error is measured with.
- Every sum has a fixed order that does not depend on the number of threads: two runs give the same bits.
- The text between SHARED BEGIN and SHARED END stands in both trainers (`make sync` copies it).
Not here: tensor and pipeline parallelism, mixture of experts, serving, training of tokenizers.

Read 3 (ops), 4 (model), 5 (objectives), 6 (training) from top to bottom; skim 2, it tells the words; 7 is
the ranks and the machine under each. The rest is
plumbing, for when you need it: 8 errors, numbers, options, 9 JSON, 10 safetensors, 11 models,
12 tokenizer, 13 data, 14 schedule and log, 15 checkpoints, 16 planning. 17 is section 3's matrix product,
fast.
*/

// ==== 2. Vocabulary: types, options, and what the plumbing offers ==========================================
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
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
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_procs(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static void omp_set_num_threads(int n) { (void)n; }
#endif

#ifndef floatX
#define floatX float        // of parameters and activations; the gradient checks build with double
#endif
#ifndef LITESPARK_COMMIT
#define LITESPARK_COMMIT "unknown"
#endif

enum { ENOUGH_ROWS = 4096 };            // of a micro-step: more are no faster here
typedef floatX LogProb;                 // of an answer: the sum over its tokens, rounded
static const char device_kind[] = "cpu";
static const char device_peak_is[] = "measured FMA peak", device_also_takes[] = "";

// Sums and copies over ranks, section 7
void comm_all_reduce(floatX *x, size_t n, int among_copies);
void comm_reduce_scatter(floatX *x, size_t n);
void comm_all_gather(floatX *x, size_t n);

// What this trainer does not do: an option with this value (NULL: with any), and why.
static const struct { const char *option, *value, *why; } refused[] = {
    {"--reduce-dtype", NULL, "is for the CUDA trainer; this is the CPU trainer"},
    {"--mlp", "products", "is for the CUDA trainer; this is the CPU trainer"},
    {"--deterministic", "off", "is for the CUDA trainer; the CPU trainer has deterministic kernels only"},
    {"--profile", NULL, "is for the CUDA trainer: it marks ranges for NVIDIA's profilers"},
    {"--device", NULL, "is for the CUDA trainer, which needs no GPU to plan: `make train DEVICE=emu` "
                       "builds it with g++ alone"},
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
// Outputs first, then inputs, then sizes. An op says of each output whether it is = or +=. (size_t) in a
// product of sizes: an int ends at 2^31. #pragma omp parallel for: all threads share the iterations; simd:
// several at once in one thread; reduction(+ : s): each of those has its own s, added up after the loop.
static inline int min_int(int a, int b) { return a < b ? a : b; }

// ---- token embedding --------------------------------------------------------------------------------------
// x (N,C) = w[ids]     w (V,C), ids (N)
void embedding_forward(floatX *x, const int *ids, const floatX *w, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) memcpy(x + (size_t)n * C, w + (size_t)ids[n] * C, (size_t)C * sizeof(floatX));
}

// dw (V,C) += dx rows of each token. Threads share out the columns, so equal tokens never race.
void embedding_backward(floatX *dw, const int *ids, const floatX *dx, int N, int C) {
    const int BLOCK = 16;
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += BLOCK) {
        int width = C - c0 < BLOCK ? C - c0 : BLOCK;
        for (int n = 0; n < N; n++) {
            floatX *dw_n = dw + (size_t)ids[n] * C + c0;
            const floatX *dx_n = dx + (size_t)n * C + c0;
            for (int c = 0; c < width; c++) dw_n[c] += dx_n[c];
        }
    }
}

// ---- what storing means -----------------------------------------------------------------------------------
// --precision bf16: what the CUDA trainer stores in bf16 is rounded here to what bf16 holds; sums stay fp32.
static int storing_bf16;

// x rounded to bf16, ties to even. The NaNs of arithmetic become NaN or Inf: not finite either way.
static inline floatX round_bf16(floatX x) {
    union { float f; uint32_t u; } bits;
    bits.f = (float)x;
    bits.u = (bits.u + 0x7fff + ((bits.u >> 16) & 1)) & 0xffff0000u;
    return bits.f;
}

// Stores x (n), that is, with --precision bf16 rounds it in place: a row, by one thread
static inline void store(floatX *x, size_t n) {
    if (storing_bf16) for (size_t i = 0; i < n; i++) x[i] = round_bf16(x[i]);
}

// The same for a matrix, by all threads
void store_matrix(floatX *x, size_t n) {
    if (!storing_bf16) return;
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) x[i] = round_bf16(x[i]);
}

// e^x, branch-free so that loops over it become vector code: 2^n times Cephes' polynomial on |r| <= ln(2)/2,
// within 1.5 ulp. x > 88 saturates, x < -87 gives 0, NaN stays NaN. In double: the C library's.
static inline floatX exp_x(floatX x) {
    if (sizeof(floatX) == sizeof(double)) return (floatX)exp((double)x);
    float f = (float)x;
    f = f < -87.0f ? -87.0f : f;
    f = f > 88.0f ? 88.0f : f;
    union { float f; uint32_t u; } n, scale;
    n.f = f * 1.44269504f + 12582912.0f;        // 1.5 * 2^23: the integer part lands in the low bits
    float whole = n.f - 12582912.0f;
    float r = f - whole * 0.693359375f - whole * -2.12194440e-4f;
    float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r
               + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    scale.u = (n.u + 127) << 23;
    return x < (floatX)-87 ? (floatX)0 : (p * r * r + r + 1.0f) * scale.f;
}

static inline floatX sqrt_x(floatX x) {
    return sizeof(floatX) == sizeof(double) ? (floatX)sqrt((double)x) : (floatX)sqrtf((float)x);
}

// ---- RMSNorm (Zhang & Sennrich 2019) ----------------------------------------------------------------------
// out (N,C) = x_c r w_c,  rstd (N) = r = (mean_c x_c^2 + eps)^(-1/2)
void rmsnorm_forward(floatX *out, floatX *rstd, const floatX *x, const floatX *w, double eps, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const floatX *x_n = x + (size_t)n * C;
        floatX *out_n = out + (size_t)n * C;
        double squares = 0;
        #pragma omp simd reduction(+ : squares)
        for (int c = 0; c < C; c++) squares += (double)x_n[c] * x_n[c];
        const floatX r = (floatX)(1 / sqrt(squares / C + eps));
        rstd[n] = r;
        for (int c = 0; c < C; c++) out_n[c] = x_n[c] * r * w[c];
        store(out_n, C);
    }
}

// With g_c = dout_c w_c and n_c = x_c r:
//   dx_c += r (g_c - n_c mean_j(g_j n_j))      dw_c += sum over rows of dout_c n_c
// dx (N,C) += (the residual path), dw (C) +=, norm_out (N,C) = n_c w_c: the forward's output again, for the
// weight gradient of the product that read it; or NULL
void rmsnorm_backward(floatX *dx, floatX *dw, floatX *norm_out, const floatX *dout, const floatX *x,
                      const floatX *rstd, const floatX *w, int N, int C) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const floatX *dout_n = dout + (size_t)n * C, *x_n = x + (size_t)n * C, r = rstd[n];
        floatX *dx_n = dx + (size_t)n * C;
        double gn = 0;
        #pragma omp simd reduction(+ : gn)
        for (int c = 0; c < C; c++) gn += (double)dout_n[c] * w[c] * x_n[c];
        const floatX mean = (floatX)(gn * r / C);
        for (int c = 0; c < C; c++) dx_n[c] += r * (dout_n[c] * w[c] - x_n[c] * r * mean);
        store(dx_n, C);
        if (!norm_out) continue;
        floatX *out_n = norm_out + (size_t)n * C;
        for (int c = 0; c < C; c++) out_n[c] = x_n[c] * r * w[c];           // the same bits as in the forward
        store(out_n, C);
    }
    enum { COLUMNS = 32 };          // a thread owns columns: the order of the sum over rows is fixed
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += COLUMNS) {
        double sum[COLUMNS] = {0};
        const int width = C - c0 < COLUMNS ? C - c0 : COLUMNS;
        for (int n = 0; n < N; n++) {
            const size_t at = (size_t)n * C + c0;
            for (int c = 0; c < width; c++) sum[c] += (double)dout[at + c] * (x[at + c] * rstd[n]);
        }
        for (int c = 0; c < width; c++) dw[c0 + c] += (floatX)sum[c];
    }
}

// ---- matrix products --------------------------------------------------------------------------------------
// Nine tenths of a training step. This is what they mean; section 17 computes the same near a core's peak.
// out (M,N) = or += op(a) op(b). a is (M,K), or stored as (K,M) if trans_a; b is (K,N), or (N,K) if trans_b.
// Row-major; ldo, lda and ldb are the distances of rows in memory, in elements. K = 0 writes (or adds) zeros.
void matmul_naive(floatX *out, int ldo, const floatX *a, int lda, int trans_a,
                  const floatX *b, int ldb, int trans_b, int M, int N, int K, int accumulate) {
    for (int i = 0; i < M; i++) for (int j = 0; j < N; j++) {
        floatX sum = 0, *o = out + (size_t)i * ldo + j;
        for (int k = 0; k < K; k++) {
            const floatX a_ik = trans_a ? a[(size_t)k * lda + i] : a[(size_t)i * lda + k];
            const floatX b_kj = trans_b ? b[(size_t)j * ldb + k] : b[(size_t)k * ldb + j];
            sum += a_ik * b_kj;
        }
        *o = accumulate ? *o + sum : sum;
    }
}
// The same, fast, with all threads; and for small blocks inside a parallel region
void matmul(floatX *out, int ldo, const floatX *a, int lda, int trans_a,
            const floatX *b, int ldb, int trans_b, int M, int N, int K, int accumulate);
void matmul_tile(floatX *out, int ldo, const floatX *a, int lda, int trans_a,
                 const floatX *b, int ldb, int trans_b, int M, int N, int K, int accumulate);

// The three products of a linear layer out = x w^T: x (N,C), w (OC,C) as Hugging Face stores it, out (N,OC).
// out (N,OC) = x w^T + add (N,OC), the residual stream, + bias (OC), stored once; add and bias may be NULL
void matmul_forward(floatX *out, const floatX *x, const floatX *w, int N, int C, int OC, const floatX *add,
                    const floatX *bias) {
    if (N == 1) {                                               // packing w would cost more than the product
        #pragma omp parallel for
        for (int o = 0; o < OC; o++) {
            floatX sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int k = 0; k < C; k++) sum += x[k] * w[(size_t)o * C + k];
            out[o] = sum + (add ? add[o] : 0) + (bias ? bias[o] : 0);
        }
        store_matrix(out, OC);
        return;
    }
    const int accumulate = add || bias;                         // the product is added to what it finds
    #pragma omp parallel for if (accumulate)
    for (int n = 0; n < (accumulate ? N : 0); n++) {
        floatX *out_n = out + (size_t)n * OC;
        for (int o = 0; o < OC; o++) out_n[o] = (add ? add[(size_t)n * OC + o] : 0) + (bias ? bias[o] : 0);
    }
    matmul(out, OC, x, C, /*trans_a=*/0, w, C, /*trans_b=*/1, N, OC, C, accumulate);
    store_matrix(out, (size_t)N * OC);
}

// dx (N,C) = dout (N,OC) w
void matmul_backward_x(floatX *dx, const floatX *dout, const floatX *w, int N, int C, int OC) {
    matmul(dx, C, dout, OC, /*trans_a=*/0, w, C, /*trans_b=*/0, N, C, OC, /*accumulate=*/0);
    store_matrix(dx, (size_t)N * C);
}

// dw (OC,C) += dout^T x
void matmul_backward_w(floatX *dw, const floatX *dout, const floatX *x, int N, int C, int OC) {
    matmul(dw, C, dout, OC, /*trans_a=*/1, x, C, /*trans_b=*/0, OC, C, N, /*accumulate=*/1);
}

// ---- bias on q, k, v (Qwen2): the product above adds it ---------------------------------------------------
// dbias (OC) += column sums of dout (N,OC)
void bias_backward(floatX *dbias, const floatX *dout, int N, int OC) {
    enum { COLUMNS = 32 };
    #pragma omp parallel for
    for (int c0 = 0; c0 < OC; c0 += COLUMNS) {
        double sum[COLUMNS] = {0};
        int width = OC - c0 < COLUMNS ? OC - c0 : COLUMNS;
        for (int n = 0; n < N; n++) for (int c = 0; c < width; c++) sum[c] += dout[(size_t)n * OC + c0 + c];
        for (int c = 0; c < width; c++) dbias[c0 + c] += (floatX)sum[c];
    }
}

// ---- norm of each q and k head (Qwen3), rotary embedding (Su et al. 2021; Hugging Face's rotate_half) -----
// Angles of position t and pair i < D/2: t * theta^(-2i/D). Llama 3 stretches: wavelengths longer than the
// original context / low grow by `factor`, those shorter than context / high stay; between, a linear ramp.
void rope_table(floatX *cosine, floatX *sine, const Config *c, int T) {     // (T, D/2) each
    const double PI = 3.14159265358979323846;
    for (int i = 0; i < c->D / 2; i++) {
        double freq = pow(c->rope_theta, -2.0 * i / c->D);
        if (c->rope_factor > 0) {
            double turns = c->rope_original_T * freq / (2 * PI);
            double keep = fmin(fmax((turns - c->rope_low) / (c->rope_high - c->rope_low), 0), 1);
            freq *= keep + (1 - keep) / c->rope_factor;
        }
        for (int t = 0; t < T; t++) {
            cosine[(size_t)t * (c->D / 2) + i] = (floatX)cos(t * freq);
            sine[(size_t)t * (c->D / 2) + i] = (floatX)sin(t * freq);
        }
    }
}

// The pair (i, i + D/2) of x (D) turns by its position's angle; sign -1 turns back (the transpose: backward).
static inline void rotate_head(floatX *x, const floatX *cosine, const floatX *sine, int D, floatX sign) {
    for (int i = 0; i < D / 2; i++) {
        floatX a = x[i], b = x[i + D / 2], s = sign * sine[i];
        x[i] = a * cosine[i] - b * s;
        x[i + D / 2] = b * cosine[i] + a * s;
    }
}

// qkv (N,(H+2K)D) in place: q and k heads normed (if q_norm), then rotated; v as it is. For the backward of
// the norm, qk_raw (N,(H+K)D) = the heads before it and qk_rstd (N,H+K). q_norm, k_norm (D) or NULL.
void qk_norm_rope_forward(floatX *qkv, floatX *qk_raw, floatX *qk_rstd, const floatX *q_norm,
                          const floatX *k_norm, const floatX *cosine, const floatX *sine,
                          double eps, int H, int K, int D, int N, int T) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        size_t angle = (size_t)(n % T) * (D / 2);
        for (int h = 0; h < H + K; h++) {
            floatX *x = qkv + ((size_t)n * (H + 2 * K) + h) * D;
            if (q_norm) {
                const floatX *w = h < H ? q_norm : k_norm;
                double squares = 0;
                for (int d = 0; d < D; d++) squares += (double)x[d] * x[d];
                floatX r = (floatX)(1 / sqrt(squares / D + eps));
                memcpy(qk_raw + ((size_t)n * (H + K) + h) * D, x, (size_t)D * sizeof(floatX));
                qk_rstd[(size_t)n * (H + K) + h] = r;
                for (int d = 0; d < D; d++) x[d] *= r * w[d];
            }
            rotate_head(x, cosine + angle, sine + angle, D, 1);
            store(x, D);
        }
    }
}

// dqkv (N,(H+2K)D) in place: gradients after the rotation become those before norm and rotation.
// dq_norm, dk_norm (D) +=
void qk_norm_rope_backward(floatX *dqkv, floatX *dq_norm, floatX *dk_norm, const floatX *qk_raw,
                           const floatX *qk_rstd, const floatX *q_norm, const floatX *k_norm,
                           const floatX *cosine, const floatX *sine, int H, int K, int D, int N, int T) {
    enum { ROWS = 64, LANE = 16 };     // ROWS have a sum of their own, whatever the threads
    const int heads = H + K;
    double sum[2][D];
    memset(sum, 0, sizeof sum);
    #pragma omp parallel for ordered schedule(static, 1)
    for (int n0 = 0; n0 < N; n0 += ROWS) {
        double part[2][D];
        memset(part, 0, sizeof part);
        for (int n = n0; n < N && n < n0 + ROWS; n++) for (int h = 0; h < heads; h++) {
            const size_t angle = (size_t)(n % T) * (D / 2), at = (size_t)n * heads + h;
            floatX *dx = dqkv + ((size_t)n * (H + 2 * K) + h) * D;
            rotate_head(dx, cosine + angle, sine + angle, D, -1);
            if (!q_norm) continue;
            const floatX *x = qk_raw + at * D, *w = h < H ? q_norm : k_norm, r = qk_rstd[at];
            floatX lane[LANE] = {0};            // of D/16 terms each
            double *dw = part[h >= H], gn = 0;
            int d0 = 0;
            for (; d0 + LANE <= D; d0 += LANE) for (int d = d0, i = 0; i < LANE; i++, d++) {
                lane[i] += dx[d] * x[d] * w[d];
                dw[d] += dx[d] * x[d] * r;
            }
            for (int d = d0; d < D; d++) {
                gn += dx[d] * x[d] * w[d];
                dw[d] += dx[d] * x[d] * r;
            }
            for (int i = 0; i < LANE / 2; i++) lane[i] += lane[i + LANE / 2];
            for (int i = 0; i < LANE / 4; i++) gn += lane[i] + lane[i + LANE / 4];
            const floatX mean = (floatX)(gn * r / D);
            #pragma omp simd
            for (int d = 0; d < D; d++) dx[d] = r * (dx[d] * w[d] - x[d] * r * mean);
        }
        #pragma omp ordered
        for (int d = 0; d < D && q_norm; d++) for (int i = 0; i < 2; i++) sum[i][d] += part[i][d];
    }
    for (int d = 0; d < D && q_norm; d++) {
        dq_norm[d] += (floatX)sum[0][d];
        dk_norm[d] += (floatX)sum[1][d];
    }
    store_matrix(dqkv, (size_t)N * (H + 2 * K) * D);
}

// ---- causal attention with grouped heads, blocked so that memory is O(T) (Dao et al. 2022) ----------------
// out_t = sum_s p_ts v_s,  p_ts = exp(q_t k_s / sqrt(D) - lse_t) for doc_start_t <= s <= t.
// H/K query heads share a k/v head.
// Rows of q and of k at a time: scores stay in L2, a packed tile of k serves many queries, sums are long.
enum { TILE_Q = 384, TILE_K = 128 };

// Scores of q rows t0.. against k rows s0.. become scaled, masked ones: -inf where the query may not look.
static void attention_mask(floatX *s, int rows, int cols, int t0, int s0, const int *doc_start,
                           floatX scale) {
    for (int i = 0; i < rows; i++) {
        floatX *s_i = s + i * TILE_K;
        for (int j = 0; j < cols; j++) s_i[j] *= scale;
        int first = doc_start ? doc_start[t0 + i] - s0 : 0, last = t0 + i - s0;
        for (int j = 0; j < cols && j < first; j++) s_i[j] = -INFINITY;
        for (int j = last < 0 ? 0 : last + 1; j < TILE_K; j++) s_i[j] = -INFINITY;      // beyond cols too
    }
}

// Sum or maximum of x (TILE_K), by halves: vector code, and the same order everywhere
static inline floatX fold_row(const floatX *x, int want_max) {
    floatX y[TILE_K / 2];
    #pragma GCC unroll 8
    for (int n = TILE_K / 2; n > 0; n /= 2, x = y)
        for (int i = 0; i < n; i++)
            y[i] = !want_max ? x[i] + x[i + n] : x[i] > x[i + n] ? x[i] : x[i + n];
    return y[0];
}

// out (N,H*D) =, lse (N,H) = log of the softmax's denominator.  qkv (N,(H+2K)D), doc_start (N) or NULL
void attention_forward(floatX *out, floatX *lse, const floatX *qkv, const int *doc_start,
                       int B, int T, int H, int K, int D) {
    const int W = (H + 2 * K) * D, tiles = CEIL_DIV(T, TILE_Q);
    const floatX scale = (floatX)(1 / sqrt((double)D));
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int bh = 0; bh < B * H; bh++) for (int tile = 0; tile < tiles; tile++) {
        int b = bh / H, h = bh % H;
        int t0 = (tiles - 1 - tile) * TILE_Q, rows = min_int(T - t0, TILE_Q);       // long ones first
        const floatX *q = qkv + ((size_t)b * T + t0) * W + h * D;
        const floatX *k = qkv + (size_t)b * T * W + (H + h / (H / K)) * D, *v = k + K * D;
        const int *doc_b = doc_start ? doc_start + (size_t)b * T : NULL;
        floatX *out_t = out + ((size_t)b * T + t0) * H * D + h * D;
        floatX s[TILE_Q * TILE_K], highest[TILE_Q];
        double total[TILE_Q];
        for (int i = 0; i < rows; i++) {
            highest[i] = -INFINITY;
            total[i] = 0;
            memset(out_t + (size_t)i * H * D, 0, (size_t)D * sizeof(floatX));
        }
        for (int s0 = doc_b ? doc_b[t0] / TILE_K * TILE_K : 0; s0 < t0 + rows; s0 += TILE_K) {
            const int cols = min_int(T - s0, TILE_K), r0 = s0 > t0 ? s0 - t0 : 0;   // rows before r0 see none
            matmul_tile(s + r0 * TILE_K, TILE_K, q + (size_t)r0 * W, W, 0, k + (size_t)s0 * W, W, 1,
                        rows - r0, cols, D, 0);
            attention_mask(s + r0 * TILE_K, rows - r0, cols, t0 + r0, s0, doc_b, scale);
            // online softmax: what was summed so far shrinks when a larger score appears
            for (int i = r0; i < rows; i++) {
                floatX *s_i = s + i * TILE_K, top = fold_row(s_i, /*want_max=*/1);
                if (top < highest[i]) top = highest[i];
                floatX base = top == -INFINITY ? 0 : top;       // nothing visible yet: all exp are 0
                floatX shrink = exp_x(highest[i] - base);
                for (int j = 0; j < TILE_K; j++) s_i[j] = exp_x(s_i[j] - base);
                total[i] = total[i] * shrink + fold_row(s_i, /*want_max=*/0);
                store(s_i, cols);
                highest[i] = top;
                floatX *out_i = out_t + (size_t)i * H * D;
                if (shrink != 1) for (int d = 0; d < D; d++) out_i[d] *= shrink;
            }
            matmul_tile(out_t + (size_t)r0 * H * D, H * D, s + r0 * TILE_K, TILE_K, 0, v + (size_t)s0 * W, W,
                        0, rows - r0, D, cols, 1);
        }
        for (int i = 0; i < rows; i++) {
            floatX *out_i = out_t + (size_t)i * H * D, inverse = (floatX)(1 / total[i]);
            for (int d = 0; d < D; d++) out_i[d] *= inverse;
            store(out_i, D);
            lse[((size_t)b * T + t0 + i) * H + h] = highest[i] + (floatX)log(total[i]);
        }
    }
}

// Samples: T tokens of one text after `past` others. kv (past+T,2KD) holds all their keys and values.
// out (T,H*D) =
void attention_decode(floatX *out, const floatX *kv, const floatX *qkv, int past, int T, int H, int K,
                      int D) {
    const floatX scale = (floatX)(1 / sqrt((double)D));
    #pragma omp parallel for collapse(2)
    for (int t = 0; t < T; t++) for (int h = 0; h < H; h++) {
        const floatX *q = qkv + ((size_t)t * (H + 2 * K) + h) * D, *k = kv + h / (H / K) * D;
        floatX *out_t = out + ((size_t)t * H + h) * D, top = -INFINITY;
        double sum = 0;
        memset(out_t, 0, (size_t)D * sizeof(floatX));
        for (int s = 0; s <= past + t; s++, k += 2 * K * D) {
            floatX score = 0;
            #pragma omp simd reduction(+ : score)
            for (int d = 0; d < D; d++) score += q[d] * k[d];
            const floatX higher = score * scale > top ? score * scale : top, shrink = exp_x(top - higher);
            const floatX p = exp_x(score * scale - higher);
            top = higher;
            sum = sum * shrink + p;
            for (int d = 0; d < D; d++) out_t[d] = out_t[d] * shrink + p * k[K * D + d];
        }
        for (int d = 0; d < D; d++) out_t[d] /= (floatX)sum;
        store(out_t, D);
    }
}

// kv (T,2KD) = the keys and values of T tokens
void keep_keys_values(floatX *kv, const floatX *qkv, int T, int H, int K, int D) {
    const size_t W = (size_t)(H + 2 * K) * D, n = (size_t)2 * K * D;
    for (int t = 0; t < T; t++) memcpy(kv + t * n, qkv + t * W + H * D, n * sizeof(floatX));
}

// With P_ts = exp(scale q_t k_s - lse_t), delta_t = dout_t . out_t:
//   dv_s = sum_t P_ts dout_t          dS_ts = scale P_ts (dout_t v_s - delta_t)
//   dq_t = sum_s dS_ts k_s            dk_s = sum_t dS_ts q_t.     dqkv (N,(H+2K)D) =
// A task computes what it alone writes: all gradients of a k/v head and its query heads, by five products per
// pair of tiles. Where that leaves threads idle, tasks are tiles of queries of a head for dq, then tiles of
// keys for dk and dv: seven products, by all threads. The order of each sum, and so its bits, is the same.
void attention_backward(floatX *dqkv, const floatX *dout, const floatX *qkv, const floatX *out,
                        const floatX *lse, const int *doc_start, int B, int T, int H, int K, int D) {
    const int W = (H + 2 * K) * D, threads = omp_get_max_threads();
    const int whole = 5 * CEIL_DIV(B * K, threads) * threads <= 7 * B * K, span = whole ? T : TILE_Q;
    // whole: 5 products, in rounds of `threads` tasks, cost no more than 7 products spread evenly; one pass
    // then does all. Else the first pass does dq (want_dq 1), the second dk and dv (want_dq 0)
    const floatX scale = (floatX)(1 / sqrt((double)D));
    for (int want_dq = 1; want_dq >= whole; want_dq--) {
        const int want_dkdv = whole || !want_dq, group = want_dkdv ? H / K : 1, spans = CEIL_DIV(T, span);
        #pragma omp parallel for collapse(2) schedule(dynamic)
        for (int task = 0; task < B * H / group; task++) for (int i_span = 0; i_span < spans; i_span++) {
            const int b = task / (H / group), h0 = task % (H / group) * group, kv = h0 / (H / K);
            // the last queries and the first keys, which take longest, go first
            const int t_begin = whole ? 0 : (want_dq ? spans - 1 - i_span : i_span) * span;
            const int t_end = want_dkdv ? T : min_int(t_begin + span, T);
            const int s_begin = want_dq ? 0 : t_begin, s_end = min_int(want_dq ? T : s_begin + span, T);
            const size_t row = (size_t)b * T;
            const floatX *k = qkv + row * W + (H + kv) * D, *v = k + K * D;
            floatX *dk = dqkv + row * W + (H + kv) * D, *dv = dk + K * D;
            const int *doc_b = doc_start ? doc_start + row : NULL;
            floatX p[TILE_Q * TILE_K], ds[TILE_Q * TILE_K];
            for (int t = t_begin; t < t_end && want_dq; t++)
                memset(dqkv + (row + t) * W + h0 * D, 0, (size_t)group * D * sizeof(floatX));
            for (int s = s_begin; s < s_end && want_dkdv; s++) {
                memset(dk + (size_t)s * W, 0, (size_t)D * sizeof(floatX));
                memset(dv + (size_t)s * W, 0, (size_t)D * sizeof(floatX));
            }
            for (int h = h0; h < h0 + group; h++) for (int t0 = t_begin; t0 < t_end; t0 += TILE_Q) {
                const int rows = min_int(T - t0, TILE_Q);
                const floatX *q = qkv + (row + t0) * W + h * D, *dout_t = dout + (row + t0) * H * D + h * D;
                floatX *dq = dqkv + (row + t0) * W + h * D, delta[TILE_Q];
                for (int i = 0; i < rows; i++) {
                    const floatX *do_i = dout_t + (size_t)i * H * D;
                    const floatX *o_i = out + (row + t0 + i) * H * D + h * D;
                    double sum = 0;
                    for (int d = 0; d < D; d++) sum += (double)do_i[d] * o_i[d];
                    delta[i] = (floatX)sum;
                }
                const int seen = doc_b ? doc_b[t0] / TILE_K * TILE_K : 0;
                for (int s0 = seen > s_begin ? seen : s_begin; s0 < min_int(t0 + rows, s_end); s0 += TILE_K) {
                    const int cols = min_int(T - s0, TILE_K), r0 = s0 > t0 ? s0 - t0 : 0;
                    const int n = rows - r0;                    // rows that see a part of this tile of keys
                    const size_t at = (size_t)s0 * W;
                    const floatX *q_r = q + (size_t)r0 * W, *dout_r = dout_t + (size_t)r0 * H * D;
                    matmul_tile(p, TILE_K, q_r, W, 0, k + at, W, 1, n, cols, D, 0);
                    attention_mask(p, n, cols, t0 + r0, s0, doc_b, scale);
                    matmul_tile(ds, TILE_K, dout_r, H * D, 0, v + at, W, 1, n, cols, D, 0);
                    for (int i = 0; i < n; i++) {
                        floatX *p_i = p + i * TILE_K, *ds_i = ds + i * TILE_K;
                        const floatX lse_i = lse[(row + t0 + r0 + i) * H + h], delta_i = delta[r0 + i];
                        for (int j = 0; j < cols; j++) {
                            p_i[j] = exp_x(p_i[j] - lse_i);
                            ds_i[j] = p_i[j] * (ds_i[j] - delta_i) * scale;
                        }
                        store(p_i, cols);
                        store(ds_i, cols);
                    }
                    if (want_dkdv) {
                        matmul_tile(dv + at, W, p, TILE_K, 1, dout_r, H * D, 0, cols, D, n, 1);
                        matmul_tile(dk + at, W, ds, TILE_K, 1, q_r, W, 0, cols, D, n, 1);
                    }
                    if (want_dq)
                        matmul_tile(dq + (size_t)r0 * W, W, ds, TILE_K, 0, k + at, W, 0, n, D, cols, 1);
                }
            }
        }
    }
    store_matrix(dqkv, (size_t)B * T * W);
}

// ---- MLP: h = silu(gate) up (SwiGLU, Shazeer 2020) --------------------------------------------------------
// h (N,F) = silu(g) u,  silu(g) = g / (1 + e^-g),   gate_up (N,2F) = g | u
void swiglu_forward(floatX *h, const floatX *gate_up, int N, int F) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        const floatX *g = gate_up + (size_t)n * 2 * F, *u = g + F;
        floatX *h_n = h + (size_t)n * F;
        #pragma omp simd
        for (int f = 0; f < F; f++) h_n[f] = g[f] / (1 + exp_x(-g[f])) * u[f];
        store(h_n, F);
    }
}

// With s = sigmoid(g):  dg = dh u s (1 + g (1 - s)),  du = dh g s.
// gate_up (N,2F) becomes its gradient, h (N,F) = once more, for the gradient of w_down; dh (N,F) may be h
void swiglu_backward(floatX *gate_up, floatX *h, const floatX *dh, int N, int F) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        floatX *g_n = gate_up + (size_t)n * 2 * F, *u_n = g_n + F, *h_n = h + (size_t)n * F;
        const floatX *dh_n = dh + (size_t)n * F;
        #pragma omp simd
        for (int f = 0; f < F; f++) {
            const floatX g = g_n[f], u = u_n[f], d = dh_n[f], s = 1 / (1 + exp_x(-g));
            h_n[f] = g * s * u;
            g_n[f] = d * u * s * (1 + g * (1 - s));
            u_n[f] = d * g * s;
        }
        store(h_n, F);
        store(g_n, 2 * (size_t)F);
    }
}

// gate_up (N,2F), h (N,F) = of x (N,C), w (2F,C); h may be NULL
void mlp_forward(floatX *h, floatX *gate_up, const floatX *x, const floatX *w, int N, int C, int F) {
    matmul_forward(gate_up, x, w, N, C, 2 * F, NULL, NULL);
    if (h) swiglu_forward(h, gate_up, N, F);
}

// gate_up (N,2F) becomes its gradient, h (N,F) =; dx (N,C) is the gradient of the MLP's output, w (C,F)
void mlp_backward_gate_up(floatX *gate_up, floatX *h, const floatX *dx, const floatX *w,
                          int N, int C, int F) {
    matmul_backward_x(h, dx, w, N, F, C);                       // dh, in h's place
    swiglu_backward(gate_up, h, h, N, F);
}

// ---- softmax + cross-entropy on rows of logits ------------------------------------------------------------
// nll (N) = -log softmax(logits)[target], 0 where the target is IGNORED.  weight (N) = d objective / d nll of
// each row: the logits (N,V) become the objective's gradient weight (softmax - onehot), 0 where ignored; the
// two never exist at once. weight NULL: losses only.  is_top (N), unless NULL: 1 where no logit of the row is
// above the target's, 0 where ignored
void cross_entropy(double *nll, uint8_t *is_top, floatX *logits, const int *targets, const double *weight,
                   int N, int V) {
    #pragma omp parallel for
    for (int n = 0; n < N; n++) {
        floatX *row = logits + (size_t)n * V, top = -INFINITY;
        nll[n] = 0;
        if (is_top) is_top[n] = 0;
        if (targets[n] == IGNORED) {
            if (weight) memset(row, 0, (size_t)V * sizeof(floatX));
            continue;
        }
        #pragma omp simd reduction(max : top)
        for (int v = 0; v < V; v++) top = row[v] > top ? row[v] : top;
        const floatX at_target = row[targets[n]];
        double sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) {
            floatX e = exp_x(row[v] - top);
            sum += e;
            row[v] = e;
        }
        nll[n] = log(sum) + top - at_target;
        if (is_top) is_top[n] = at_target >= top;
        if (!weight) continue;
        const floatX factor = (floatX)(weight[n] / sum);
        for (int v = 0; v < V; v++) row[v] *= factor;
        row[targets[n]] -= (floatX)weight[n];
        store(row, V);
    }
}

// ---- global norm, AdamW -----------------------------------------------------------------------------------
// sum of squares of x (n), in double, in blocks of fixed size so that the order does not depend on threads
double sum_of_squares(const floatX *x, size_t n) {
    enum { BLOCK = 1 << 14, MOST = 1024 };
    double total = 0;
    for (size_t start = 0; start < n; start += (size_t)BLOCK * MOST) {
        double part[MOST];
        int blocks = (int)min_size(CEIL_DIV(n - start, BLOCK), MOST);
        #pragma omp parallel for
        for (int i = 0; i < blocks; i++) {
            size_t first = start + (size_t)i * BLOCK, end = min_size(first + BLOCK, n);
            double sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (size_t j = first; j < end; j++) sum += (double)x[j] * x[j];
            part[i] = sum;
        }
        for (int i = 0; i < blocks; i++) total += part[i];
    }
    return total;
}

// x, finite, rounded to one of its two neighbours in bf16 by 16 random bits, such that the mean is x.
static inline floatX round_bf16_randomly(floatX x, uint32_t random) {
    union { float f; uint32_t u; } bits;
    bits.f = (float)x;
    bits.u = (bits.u + (random & 0xffff)) & 0xffff0000u;
    return bits.f;
}

// 32 random bits for element `index` of an update; the mixer is a 32-bit one by C. Wellons (hash-prospector).
static inline uint32_t update_bits(uint32_t key, uint64_t index) {
    uint32_t h = ((uint32_t)index ^ (uint32_t)(index >> 32) * 0x9E3779B9u) ^ key;
    h = (h ^ h >> 16) * 0x21F0AAADu;
    h = (h ^ h >> 15) * 0x735A2D97u;
    return h ^ h >> 15;
}

// AdamW (Loshchilov & Hutter 2019), decoupled decay:
//   g = grad grad_scale,  m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,
//   master = master (1 - lr decay) - lr / (1-b1^step) m / (sqrt(v / (1-b2^step)) + eps).
// master, m, v (n) are updated, w (n) = master stored (fp32: may be master itself). bf16_state: m and v are
// stored in bf16, element i rounded with the random bits of (key, first + i): to the nearest, v would stand
// still where 1 - b2 is below half a unit in the last place.
void adamw_update(floatX *w, floatX *master, floatX *m, floatX *v, const floatX *grad, size_t n,
                  double lr, double beta1, double beta2, double eps, double decay, double grad_scale,
                  int64_t step, int bf16_state, uint32_t key, size_t first) {
    floatX b1 = (floatX)beta1, b2 = (floatX)beta2;
    floatX shrink = (floatX)(1 - lr * decay), gscale = (floatX)grad_scale;
    floatX rate = (floatX)(lr / (1 - pow(beta1, (double)step))), e = (floatX)eps;
    floatX vscale = (floatX)(1 / (1 - pow(beta2, (double)step)));
    const int bf16 = storing_bf16;
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) {
        floatX g = grad[i] * gscale;
        floatX mi = b1 * m[i] + (1 - b1) * g, vi = b2 * v[i] + (1 - b2) * g * g;
        master[i] = master[i] * shrink - rate * mi / (sqrt_x(vi * vscale) + e);
        uint32_t random = bf16_state ? update_bits(key, first + i) : 0;
        m[i] = bf16_state ? round_bf16_randomly(mi, random) : mi;
        v[i] = bf16_state ? round_bf16_randomly(vi, random >> 16) : vi;
        w[i] = bf16 ? round_bf16(master[i]) : master[i];
    }
}

// ==== 4. Model: layout, forward, head and loss, backward, update ===========================================
// ---- parameters: pointers into one unit of the weights or of the gradients, wherever the unit lies --------
typedef struct LayerParams {
    floatX *norm1;          // (C)
    floatX *qkv;            // ((H+2K)D, C)
    floatX *qkv_bias;       // ((H+2K)D)        Qwen2, else NULL
    floatX *q_norm, *k_norm;// (D)              Qwen3, else NULL
    floatX *o;              // (C, HD)
    floatX *norm2;          // (C)
    floatX *gate_up;        // (2F, C)
    floatX *down;           // (C, F)
} LayerParams;

// The tensor whose name ends so; NULL: this model has none
static floatX *param(floatX *unit, const ParamTable *p, int u, const char *suffix) {
    const Tensor *t = table_find(p, u, suffix);
    return t ? unit + t->at : NULL;
}

// The table (section 11) puts q, k, v side by side, and gate, up: q_proj's address is that of the stacked
// matrix Wqkv, q_proj.bias that of its bias, gate_proj's that of Wgate_up.
LayerParams layer_params(floatX *unit, const ParamTable *p, int l) {
    const int u = UNIT_LAYER + l;
    LayerParams w = {
        param(unit, p, u, "input_layernorm.weight"),
        param(unit, p, u, "q_proj.weight"), param(unit, p, u, "q_proj.bias"),
        param(unit, p, u, "q_norm.weight"), param(unit, p, u, "k_norm.weight"),
        param(unit, p, u, "o_proj.weight"), param(unit, p, u, "post_attention_layernorm.weight"),
        param(unit, p, u, "gate_proj.weight"), param(unit, p, u, "down_proj.weight")};
    return w;
}

typedef struct HeadParams {
    floatX *norm;           // (C)              the final norm
    floatX *head;           // (V, C)           the embedding once more, if they are tied
} HeadParams;

HeadParams head_params(floatX *unit, floatX *embed, const ParamTable *p) {
    floatX *own = param(unit, p, p->n_units - 1, "lm_head.weight");
    HeadParams w = {unit, own ? own : embed};
    return w;
}

// ---- activations ------------------------------------------------------------------------------------------
// What backward needs of one layer. --recompute mlp: all layers share one gate_up; block: one of everything
// but x. Without training they share one of everything and use two x in turn. kv is each layer's own.
typedef struct LayerActs {
    floatX *x;                          // (N,C)        the layer's input
    floatX *rstd1, *rstd2;              // (N)
    floatX *qkv;                        // (N,(H+2K)D)  after norm and rotation
    floatX *qk_raw, *qk_rstd;           // (N,(H+K)D), (N,H+K)      Qwen3: before the head norm
    floatX *att, *lse;                  // (N,HD), (N,H)
    floatX *x_mid;                      // (N,C)        after attention
    floatX *gate_up;                    // (N,2F)       backward overwrites it with its gradient
    floatX *kv;                         // (S,2KD)      samples: keys and values of the text so far
} LayerActs;

typedef struct Arena { char *base; size_t used; void *memory; } Arena;     // used: bytes; memory: holds base

struct Model {
    Config c;
    ParamTable p;
    Plan plan;
    int B, T, N;                        // micro-step: N = B*T rows
    int chunk;                          // rows of logits that exist at a time
    // Flat: of all units, (p.n), or this rank's shares of them, (p.n / S): master, m and v from ZeRO 1 on,
    // gradients from 2 on, weights with 3. In fp32 the weights are their own master.
    floatX *weights, *grads, *master, *m, *v;
    floatX *whole_weights, *whole_grads;// (slots_size) shared units, whole while they are used
    uint8_t *is_whole;                  // (n_units) weights gathered
    LayerActs *acts;                    // (L)
    floatX *x_last, *rstd_last;         // (N,C), (N)   input of the final norm
    floatX *norm;                       // (N,C)        a norm's output; rebuilt in backward
    floatX *h;                          // (N,F)        SwiGLU's product
    floatX *dx, *dnorm;                 // (N,C)        gradient of the residual stream; of a norm's output
    floatX *datt, *dqkv;                // (N,HD), (N,(H+2K)D)
    floatX *logits;                     // (chunk,V)
    double *nll;                        // (N)          loss of each target
    uint8_t *is_top;                    // (N)          whether it is the likeliest token; of losses only
    double loss;                        // sum since model_loss was asked
    int *kept, n_kept;                  // (S) tokens whose keys and values are in kv
    floatX *cosine, *sine;              // (T,D/2)
    Arena arena[N_ARENAS];
};

const ParamTable *model_table(const Model *m) { return &m->p; }
double model_bytes(const Model *m, int arena) { return (double)m->arena[arena].used; }

// The part of unit u whose optimizer state this rank holds: its elements [*first, *first + *n).
void state_share(const Model *m, int u, size_t *first, size_t *n) {
    *n = m->p.units[u].n_padded / m->plan.shard;
    *first = *n * (m->plan.rank % m->plan.shard);
}

// x of this rank's part of unit u, in a flat buffer of shares or of units
static floatX *own(const Model *m, floatX *x, int of_shares, int u) {
    size_t first, n;
    state_share(m, u, &first, &n);
    return x + (of_shares ? m->p.units[u].at / m->plan.shard : m->p.units[u].at + first);
}
static floatX *own_weights(const Model *m, int u) { return own(m, m->weights, m->plan.zero == 3, u); }
static floatX *own_grads(const Model *m, int u) { return own(m, m->grads, m->plan.zero >= 2, u); }

// Where unit u lies, whole
static floatX *unit_weights(const Model *m, int u) {
    return m->plan.zero == 3 ? m->whole_weights + slot_at(&m->p, u) : m->weights + m->p.units[u].at;
}
static floatX *unit_grads(const Model *m, int u) {
    return m->plan.zero >= 2 ? m->whole_grads + slot_at(&m->p, u) : m->grads + m->p.units[u].at;
}
static HeadParams head_weights(const Model *m) {
    return head_params(unit_weights(m, m->p.n_units - 1), unit_weights(m, UNIT_EMBED), &m->p);
}
static HeadParams head_grads(const Model *m) {
    return head_params(unit_grads(m, m->p.n_units - 1), unit_grads(m, UNIT_EMBED), &m->p);
}

// The arenas are laid out by the same calls twice: first with base NULL to learn their sizes, then to hand
// out the pointers.
static void *take(Arena *a, size_t bytes) {
    void *at = a->base ? a->base + a->used : NULL;
    a->used += CEIL_DIV(bytes, 64) * 64;
    return at;
}
static floatX *take_x(Arena *a, size_t n) { return (floatX *)take(a, n * sizeof(floatX)); }

static void layout_layer(Model *m, LayerActs *y, Arena *a, int keep_block, int keep_mlp) {
    const Config *c = &m->c;
    const size_t N = m->N, HD = (size_t)c->H * c->D, KD = (size_t)c->K * c->D;
    if (keep_block) {
        y->rstd1 = take_x(a, N);
        y->qkv = take_x(a, N * (HD + 2 * KD));
        if (c->qk_norm) y->qk_raw = take_x(a, N * (HD + KD));
        if (c->qk_norm) y->qk_rstd = take_x(a, N * (c->H + c->K));
        y->att = take_x(a, N * HD);
        y->lse = take_x(a, N * c->H);
        y->x_mid = take_x(a, N * c->C);
        y->rstd2 = take_x(a, N);
    }
    if (keep_mlp) y->gate_up = take_x(a, N * 2 * c->F);
}

static void layout(Model *m) {
    const Config *c = &m->c;
    const Plan *plan = &m->plan;
    const size_t n = m->p.n, N = m->N, HD = (size_t)c->H * c->D, KD = (size_t)c->K * c->D;
    const size_t n_state = n / plan->shard, slots = slots_size(&m->p);
    m->weights = take_x(&m->arena[ARENA_WEIGHTS], plan->zero == 3 ? n_state : n);
    if (plan->zero == 3) m->whole_weights = take_x(&m->arena[ARENA_WEIGHTS], slots);
    m->master = m->weights;
    if (plan->training) {
        m->grads = take_x(&m->arena[ARENA_GRADIENTS], plan->zero >= 2 ? n_state : n);
        if (plan->zero >= 2) m->whole_grads = take_x(&m->arena[ARENA_GRADIENTS], slots);
        Arena *o = &m->arena[ARENA_OPTIMIZER];
        m->m = take_x(o, n_state);
        m->v = take_x(o, n_state);
        if (plan->bf16) m->master = take_x(o, n_state);
    }
    Arena *a = &m->arena[ARENA_ACTIVATIONS];
    const int keep_block = plan->training && plan->recompute != RECOMPUTE_BLOCK;
    const int keep_mlp = plan->training && plan->recompute == RECOMPUTE_NONE;
    // what every layer writes again: laid out once, the rest per layer
    LayerActs shared;
    memset(&shared, 0, sizeof shared);
    layout_layer(m, &shared, a, !keep_block, !keep_mlp);
    for (int l = 0; l < c->L; l++) {
        LayerActs *y = &m->acts[l];
        *y = shared;
        y->x = plan->training || l < 2 ? take_x(a, N * c->C) : m->acts[l - 2].x;
        layout_layer(m, y, a, keep_block, keep_mlp);
        y->kv = take_x(a, plan->sample * 2 * KD);
    }
    m->x_last = take_x(a, N * c->C);
    m->rstd_last = take_x(a, N);
    Arena *w = &m->arena[ARENA_WORKSPACE];
    m->norm = take_x(w, N * c->C);
    m->h = take_x(w, N * c->F);
    if (plan->training) {
        m->dnorm = take_x(w, N * c->C);
        m->dx = take_x(w, N * c->C);
        m->datt = take_x(w, N * HD);
        m->dqkv = take_x(w, N * (HD + 2 * KD));
    }
    m->logits = take_x(w, (size_t)m->chunk * c->V);
    m->cosine = take_x(w, (size_t)m->T * c->D / 2);
    m->sine = take_x(w, (size_t)m->T * c->D / 2);
    m->nll = (double *)take(w, N * sizeof(double));
    m->is_top = (uint8_t *)take(w, N);
}

// Sizes only, no memory is taken: of every arena, and the table of the model.
Model *model_plan(const Config *c, const Plan *plan) {
    Model *m = (Model *)xcalloc(1, sizeof *m);
    m->c = *c;
    m->plan = *plan;
    m->B = plan->B;
    m->T = plan->T;
    m->N = m->B * m->T;
    m->chunk = plan->chunk < m->N ? plan->chunk : m->N;
    param_table_build(&m->p, c, plan->shard);
    m->is_whole = (uint8_t *)xcalloc((size_t)m->p.n_units, 1);
    m->acts = (LayerActs *)xcalloc((size_t)c->L, sizeof(LayerActs));
    m->kept = (int *)xcalloc((size_t)plan->sample, sizeof(int));
    layout(m);
    return m;
}

// Takes the memory, as zeros, for the padding of the vocabulary has no other value in weights, m and v, ever.
// calloc's large blocks are fresh pages, zeros that cost nothing before their first use. All the rest is
// written before it is read; test builds (POISON) fill it with NaN to prove that.
void model_alloc(Model *m) {
    for (int i = 0; i < N_ARENAS; i++) {
        Arena *a = &m->arena[i];
        const size_t bytes = a->used;
        a->used = 0;
        if (!bytes) continue;
        enum { PAGE = 4096 };
        if (!(a->memory = calloc(bytes + PAGE, 1)))
            die("out of memory for %.0f MiB of %s; use a smaller --batch-size or --recompute block",
                (double)bytes / 1048576, arena_names[i]);
        a->base = (char *)a->memory + (PAGE - (uintptr_t)a->memory % PAGE) % PAGE;
#ifdef MADV_HUGEPAGE
        madvise(a->base, bytes, MADV_HUGEPAGE);         // a step is some 3% faster; for speed only: may fail
#endif
#ifdef POISON
        for (size_t j = 0; i != ARENA_WEIGHTS && i != ARENA_OPTIMIZER && j < bytes / sizeof(floatX); j++)
            ((floatX *)a->base)[j] = (floatX)NAN;
#endif
    }
    layout(m);
    memset(m->is_whole, m->plan.zero < 3, (size_t)m->p.n_units);
    storing_bf16 = m->plan.bf16;
    rope_table(m->cosine, m->sine, &m->c, m->T);
}

void model_free(Model *m) {
    for (int i = 0; i < N_ARENAS; i++) free(m->arena[i].memory);
    free(m->acts);
    free(m->kept);
    free(m->is_whole);
    free(m->p.tensors);
    free(m->p.units);
    free(m);
}

// ---- units between ranks: ZeRO (Rajbhandari et al. 2020) --------------------------------------------------
// S ranks share one copy of the state, each unit in S equal parts: from ZeRO 1 on the optimizer's, from 2 on
// the gradients, with 3 the weights. Nothing but these verbs knows of it:
//     unit_gather(m, u, next)     before use: unit u's weights are whole; may begin with the unit used next
//     grads_open(m, u)            before backward adds to unit u's gradients
//     unit_reduce(m, u, last)     after backward: adds them up over ranks; last: of an update
//     reduce_finish(m)            all sums are complete
// A shared unit is whole in its slot. The embedding and the head stay in theirs until the next update; layers
// have two in turn, as on GPUs, where one is on its way while another is in use: to gather one releases the
// one before.
void unit_gather(Model *m, int u, int next) {
    size_t first, n;
    (void)next;                                 // nobody here could fetch it meanwhile
    if (m->is_whole[u]) return;
    for (int v = 0; v < m->p.n_units; v++) if (slot_at(&m->p, v) == slot_at(&m->p, u)) m->is_whole[v] = 0;
    state_share(m, u, &first, &n);
    memcpy(unit_weights(m, u) + first, own_weights(m, u), n * sizeof(floatX));
    comm_all_gather(unit_weights(m, u), n);
    m->is_whole[u] = 1;
}

// All weights are others than before.
static void weights_changed(Model *m) {
    memset(m->is_whole, m->plan.zero < 3, (size_t)m->p.n_units);
    m->n_kept = 0;
}

static void grads_open(Model *m, int u) {
    if (m->plan.zero >= 2) memset(unit_grads(m, u), 0, m->p.units[u].n_padded * sizeof(floatX));
}

static void unit_reduce(Model *m, int u, int last) {
    size_t first, n;
    if (m->plan.zero < 2 && !last) return;      // whole gradients add up here until then
    state_share(m, u, &first, &n);
    if (m->plan.zero) comm_reduce_scatter(unit_grads(m, u), n);
    else comm_all_reduce(unit_grads(m, u), n, /*among_copies=*/0);
    if (m->plan.zero < 2) return;
    floatX *to = own_grads(m, u), *sum = unit_grads(m, u) + first;
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) to[i] += sum[i];
}

void reduce_finish(Model *m) {
    if (!m->plan.zero || m->plan.shard == m->plan.ranks) return;
    for (int u = 0; u < m->p.n_units; u++)
        comm_all_reduce(own_grads(m, u), m->p.units[u].n_padded / m->plan.shard, /*among_copies=*/1);
}

// Unit u's weights or gradients are whole, for model_read; all ranks call it.
void model_gather(Model *m, int what, int u) {
    size_t first, n;
    unit_gather(m, u, u);
    if (what != STATE_GRADS || !m->plan.zero) return;
    state_share(m, u, &first, &n);
    memmove(unit_grads(m, u) + first, own_grads(m, u), n * sizeof(floatX));
    comm_all_gather(unit_grads(m, u), n);
}

// ---- weights and state ------------------------------------------------------------------------------------
// Element `at` of unit u in one kind of state: master, m and v only of this rank's share, weights and
// gradients of any that is whole. Without a master of its own: the weights.
static floatX *state_of(const Model *m, int what, int u, size_t at) {
    size_t first, n;
    state_share(m, u, &first, &n);
    const int has_master = m->master != m->weights;
    if (what == STATE_M || what == STATE_V || (what == STATE_MASTER && has_master))
        return own(m, what == STATE_M ? m->m : what == STATE_V ? m->v : m->master, 1, u) + (at - first);
    if (what == STATE_MASTER) return own_weights(m, u) + (at - first);
    return (what == STATE_GRADS ? unit_grads(m, u) : unit_weights(m, u)) + at;
}

// Host access for checkpoints: elements [at, at+n) of unit u as fp32; of master, m and v those of this rank's
// share, of weights and gradients after model_gather.
void model_read(const Model *m, int what, int u, size_t at, size_t n, float *host) {
    const floatX *x = state_of(m, what, u, at);
    for (size_t i = 0; i < n; i++) host[i] = (float)x[i];
}

// Of shared weights what is not in this rank's share is left out.
void model_write(Model *m, int what, int u, size_t at, size_t n, const float *host) {
    floatX *x = what == STATE_WEIGHTS && m->plan.zero == 3 ? NULL : state_of(m, what, u, at);
    size_t first = at, own_n = n;
    if (!x) {
        state_share(m, u, &first, &own_n);
        x = own_weights(m, u) - first + at;
    }
    for (size_t i = 0; i < n; i++) if (at + i >= first && at + i < first + own_n) x[i] = host[i];
}

// Where they lie, to be read and written without a copy; NULL: they lie elsewhere or are no floats.
float *model_floats(const Model *m, int what, int u, size_t at) {
    const int shared = what == STATE_WEIGHTS && m->plan.zero == 3;
    return sizeof(floatX) == sizeof(float) && !shared ? (float *)state_of(m, what, u, at) : NULL;
}

// Starts to copy elements as they lie there to `host`, if that is in bf16 (bf16: wanted) or fp32; device_wait
// ends it. 0: not done, read them. Here they can be read in place.
int model_copy_start(const Model *m, int what, int u, size_t at, size_t n, int bf16, void *host) {
    (void)m; (void)what; (void)u; (void)at; (void)n; (void)bf16; (void)host;
    return 0;
}

// Master weights from the weights (of this rank's shares), then the weights rounded to what they are computed
// in.
void model_set_master(Model *m) {
    for (int u = 0; u < m->p.n_units && m->master != m->weights; u++) {
        size_t first, n;
        state_share(m, u, &first, &n);
        memcpy(state_of(m, STATE_MASTER, u, first), own_weights(m, u), n * sizeof(floatX));
    }
    store_matrix(m->weights, m->plan.zero == 3 ? m->p.n / m->plan.shard : m->p.n);
    weights_changed(m);
}

// ---- forward ----------------------------------------------------------------------------------------------
// q | k | v = norm1(x) Wqkv^T + bias;  q, k = rope(qk_norm(q, k));  x_mid = x + attention(q, k, v) Wo^T.
// y->rstd1, qkv, att, lse, x_mid =; for Qwen3 qk_raw, qk_rstd. Samples: positions begin at batch->past
static void attention_block_forward(Model *m, const LayerParams *w, LayerActs *y, const Batch *batch) {
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
void llama_forward(Model *m, const Batch *batch) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, head = UNIT_LAYER + c->L;
    unit_gather(m, UNIT_EMBED, UNIT_LAYER);
    embedding_forward(m->acts[0].x, batch->inputs, unit_weights(m, UNIT_EMBED), N, c->C);
    for (int l = 0; l < c->L; l++) {
        unit_gather(m, UNIT_LAYER + l, UNIT_LAYER + l + 1);
        const LayerParams w = layer_params(unit_weights(m, UNIT_LAYER + l), &m->p, l);
        LayerActs *y = &m->acts[l];
        floatX *x_next = l + 1 < c->L ? m->acts[l + 1].x : m->x_last;
        attention_block_forward(m, &w, y, batch);
        rmsnorm_forward(m->norm, y->rstd2, y->x_mid, w.norm2, c->eps, N, c->C);
        mlp_forward(m->h, y->gate_up, m->norm, w.gate_up, N, c->C, c->F);
        matmul_forward(x_next, m->h, w.down, N, c->F, c->C, y->x_mid, NULL);
    }
    unit_gather(m, head, head);
    rmsnorm_forward(m->norm, m->rstd_last, m->x_last, head_weights(m).norm, c->eps, N, c->C);
}

// ---- head and loss ----------------------------------------------------------------------------------------
// Loss of each target into m->nll (N); their sum goes to what model_loss returns, each times its weight.
// weight (N) = d objective / d nll: also m->dnorm (N,C) = gradient of the final norm's output, and the head's
// gradient +=. weight NULL: losses, and m->is_top. Logits exist for `chunk` rows at a time.
void llama_head(Model *m, const Batch *batch, const double *weight) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T;
    const floatX *head = head_weights(m).head;
    if (weight) grads_open(m, UNIT_LAYER + c->L);
    if (weight) grads_open(m, UNIT_EMBED);
    for (int n = 0; n < N; n += m->chunk) {
        const int rows = N - n < m->chunk ? N - n : m->chunk;
        const floatX *norm = m->norm + (size_t)n * c->C;
        part_begin(PART_FORWARD);
        matmul_forward(m->logits, norm, head, rows, c->C, c->V, NULL, NULL);
        cross_entropy(m->nll + n, weight ? NULL : m->is_top + n, m->logits, batch->targets + n,
                      weight ? weight + n : NULL, rows, c->V);
        if (!weight) continue;
        part_begin(PART_BACKWARD);
        matmul_backward_x(m->dnorm + (size_t)n * c->C, m->logits, head, rows, c->C, c->V);
        matmul_backward_w(head_grads(m).head, m->logits, norm, rows, c->C, c->V);
    }
    // in the order of the rows, so that the sum does not depend on chunk or threads
    for (int n = 0; n < N; n++) m->loss += weight ? weight[n] * m->nll[n] : m->nll[n];
}

// Sum of the losses since the last call.
double model_loss(Model *m) {
    const double loss = m->loss;
    m->loss = 0;
    return loss;
}

// nll (n) = the losses of the first n rows that the last llama_head had.
void model_losses(Model *m, double *nll, int n) { memcpy(nll, m->nll, (size_t)n * sizeof(double)); }

// is_top (n) = of the first n rows that the last llama_head had, which was one without weights.
void model_tops(Model *m, uint8_t *is_top, int n) { memcpy(is_top, m->is_top, (size_t)n); }

// Logits (V) of the token after ids (n), n <= N and T, as fp32 on the host. Of a text that went on since the
// last call only the new tokens run: keys and values of the others are there. A text longer than S runs as a
// whole.
void next_logits(Model *m, const int *ids, int n, float *logits) {
    const int keep = n <= m->plan.sample;
    Batch b;
    memset(&b, 0, sizeof b);
    while (keep && b.past < m->n_kept && b.past < n - 1 && m->kept[b.past] == ids[b.past]) b.past++;
    m->n_kept = keep ? n : 0;
    if (keep) memcpy(m->kept, ids, (size_t)n * sizeof(int));
    b.B = 1;
    b.T = n - b.past;
    b.keep = keep ? b.T : 0;
    b.inputs = (int *)ids + b.past;
    llama_forward(m, &b);
    const floatX *last = m->norm + (size_t)(b.T - 1) * m->c.C;
    matmul_forward(m->logits, last, head_weights(m).head, 1, m->c.C, m->c.V, NULL, NULL);
    for (int v = 0; v < m->c.V; v++) logits[v] = (float)m->logits[v];
}

// ---- backward ---------------------------------------------------------------------------------------------
// From m->dnorm, which llama_head left, to the gradients of all parameters, +=. last: of an update's
// micro-steps.
void llama_backward(Model *m, const Batch *batch, int last) {
    const Config *c = &m->c;
    const int N = batch->B * batch->T, C = c->C, F = c->F, HD = c->H * c->D, W = HD + 2 * c->K * c->D;
    memset(m->dx, 0, (size_t)N * C * sizeof(floatX));
    rmsnorm_backward(m->dx, head_grads(m).norm, NULL, m->dnorm, m->x_last, m->rstd_last,
                     head_weights(m).norm, N, C);
    unit_reduce(m, UNIT_LAYER + c->L, last);
    for (int l = c->L - 1; l >= 0; l--) {
        unit_gather(m, UNIT_LAYER + l, l ? UNIT_LAYER + l - 1 : UNIT_LAYER);
        grads_open(m, UNIT_LAYER + l);
        const LayerParams w = layer_params(unit_weights(m, UNIT_LAYER + l), &m->p, l);
        const LayerParams dw = layer_params(unit_grads(m, UNIT_LAYER + l), &m->p, l);
        LayerActs *y = &m->acts[l];
        // the shared buffers still hold what the last layer's forward wrote
        const int again = l == c->L - 1 ? RECOMPUTE_NONE : m->plan.recompute;
        if (again == RECOMPUTE_BLOCK) attention_block_forward(m, &w, y, batch);
        if (again != RECOMPUTE_NONE) {
            rmsnorm_forward(m->norm, y->rstd2, y->x_mid, w.norm2, c->eps, N, C);
            mlp_forward(NULL, y->gate_up, m->norm, w.gate_up, N, C, F);
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
    embedding_backward(unit_grads(m, UNIT_EMBED), batch->inputs, m->dx, N, C);
    unit_reduce(m, UNIT_EMBED, last);
}

// ---- update -----------------------------------------------------------------------------------------------
void model_zero_grads(Model *m) {
    memset(m->grads, 0, (m->plan.zero >= 2 ? m->p.n / m->plan.shard : m->p.n) * sizeof(floatX));
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
    double total = 0, *squares = (double *)xcalloc((size_t)n, sizeof(double));
    for (int i = 0; i < n && !(m->plan.zero && is_copy); i++) {
        const Tensor *t = &m->p.tensors[i];
        size_t at, first, share, k = own_part(m, t, &at);
        state_share(m, t->unit, &first, &share);
        if (k) squares[i] = sum_of_squares(own_grads(m, t->unit) + (at - first), k);
    }
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

// One AdamW update with gradients * grad_scale (clipping); step counts from 1. Each rank updates its shares;
// weights that it has whole are gathered at once.
void model_update(Model *m, double lr, double grad_scale, int64_t step, const Options *o) {
    const uint32_t key = (uint32_t)random_bits((uint64_t)o->seed, hash_string("update"), (uint64_t)step);
    for (const Tensor *t = m->p.tensors; t < m->p.tensors + m->p.n_tensors; t++) {
        const int u = t->unit;
        size_t at, first, share, n = own_part(m, t, &at);
        state_share(m, u, &first, &share);
        if (!n) continue;
        adamw_update(own_weights(m, u) + (at - first), state_of(m, STATE_MASTER, u, at),
                     state_of(m, STATE_M, u, at), state_of(m, STATE_V, u, at),
                     own_grads(m, u) + (at - first), n, lr, o->beta1, o->beta2, o->eps,
                     t->decay ? o->weight_decay : 0, grad_scale, step, m->plan.bf16_state, key,
                     m->p.units[u].at + at);
    }
    for (int u = 0; u < m->p.n_units && m->plan.zero && m->plan.zero < 3; u++)
        comm_all_gather(unit_weights(m, u), m->p.units[u].n_padded / m->plan.shard);
    weights_changed(m);
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

// ==== 7. Ranks, and the machine under each =================================================================
// Without MPI there is one rank and every function is the identity, so callers have no special case. Waiting
// is always a loop of MPI_Test with a time limit: a dead or stuck peer ends the job with a message. Sums run
// in MPI's fixed order for a number of ranks.
static struct {
    int rank, world, local_rank, local_ranks;       // local: on this machine
    double cores;           // this rank's: a core that k ranks may run on counts 1/k
} comm = {0, 1, 0, 1, 0};
static void spin_less(char **argv);

// Into share: 1 for each core that process pid (0: this one) may run on. Returns their number.
static int cores_of(pid_t pid, int share[CPU_SETSIZE]) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(pid, sizeof set, &set)) return 0;
    for (int i = 0; share && i < CPU_SETSIZE; i++) share[i] = CPU_ISSET(i, &set);
    return CPU_COUNT(&set);
}

int comm_rank(void) { return comm.rank; }
int comm_world(void) { return comm.world; }

// ---- the parts of an update, by the clock
static struct { int part; double since, seconds[N_PARTS]; } timer = {N_PARTS, 0, {0}};  // N_PARTS: no update

int part_begin(int part) {
    const int before = timer.part;
    if (before == N_PARTS || part == before) return before;
    const double now = now_seconds();
    timer.seconds[before] += now - timer.since;
    timer.since = now;
    timer.part = part;
    return before;
}

void split_begin(int profiled) {
    (void)profiled;
    memset(timer.seconds, 0, sizeof timer.seconds);
    timer.since = now_seconds();
    timer.part = PART_OTHER;
}

void split_end(double *seconds) {
    part_begin(N_PARTS);
    memcpy(seconds, timer.seconds, sizeof timer.seconds);
}

#ifdef USE_MPI
#include <mpi.h>
static MPI_Comm rounds;                     // all ranks, for barriers
static MPI_Comm group, copies;              // ranks that share a copy; those with this rank's shares
#define MPI_FLOATX (sizeof(floatX) == sizeof(double) ? MPI_DOUBLE : MPI_FLOAT)

void comm_abort(void) {
    int up = 0, down = 0;
    MPI_Initialized(&up);
    MPI_Finalized(&down);
    if (up && !down && comm.world > 1) MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

void comm_init(int *argc, char ***argv) {
    spin_less(*argv);
    const char *rank = getenv("PMIX_RANK");                         // to say who waits, before MPI knows
    comm.rank = rank ? atoi(rank) : 0;
    wait_limit("the start of MPI");
    int level;                              // of threads: only the main one calls MPI
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_dup(MPI_COMM_WORLD, &rounds);
    MPI_Comm_rank(MPI_COMM_WORLD, &comm.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &comm.world);
    MPI_Comm local;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, comm.rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &comm.local_rank);
    MPI_Comm_size(local, &comm.local_ranks);
    int mine[CPU_SETSIZE] = {0}, ranks_on[CPU_SETSIZE];
    cores_of(0, mine);
    MPI_Allreduce(mine, ranks_on, CPU_SETSIZE, MPI_INT, MPI_SUM, local);
    for (int i = 0; i < CPU_SETSIZE; i++) if (mine[i]) comm.cores += 1.0 / ranks_on[i];
    MPI_Comm_free(&local);
    wait_limit(NULL);
    if (comm.rank && !freopen("/dev/null", "w", stdout))            // rank 0 speaks for all
        die("cannot write to /dev/null: %s", strerror(errno));
}

void comm_finish(void) {
    wait_limit("the end of MPI");
    MPI_Finalize();
    wait_limit(NULL);
}

// Waits for n requests; after --timeout seconds the job ends.
static void comm_wait(MPI_Request *requests, int n, const char *what) {
    Wait w = {0, 0};
    const int before = part_begin(PART_COMMUNICATION);
    for (int done = 0;;) {
        MPI_Testall(n, requests, &done, MPI_STATUSES_IGNORE);
        if (done) break;
        if (wait_more(&w) > (double)opt.timeout)
            die("waited %.0f s for the other ranks in %s, step %" PRId64 ": one is dead or stuck; resume "
                "with --resume auto (or raise --timeout)", w.seconds, what, running_step);
        usleep(50);
    }
    part_begin(before);
}

void comm_broadcast(void *data, size_t bytes) {     // from rank 0
    enum { BUCKET = 1 << 22 };
    for (size_t at = 0; at < bytes; at += BUCKET) {
        MPI_Request r;
        MPI_Ibcast((char *)data + at, (int)min_size(bytes - at, BUCKET), MPI_BYTE, 0, MPI_COMM_WORLD, &r);
        comm_wait(&r, 1, "a broadcast");
    }
}

void comm_sum(double *x, int n) {
    MPI_Request r;
    MPI_Iallreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD, &r);
    comm_wait(&r, 1, "a sum");
}

double comm_max(double x) {
    MPI_Request r;
    MPI_Iallreduce(MPI_IN_PLACE, &x, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD, &r);
    comm_wait(&r, 1, "a maximum");
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
        comm_wait(&round_open, 1, "a barrier");      // the one that this rank's comm_busy has begun
        round_start(0);
        comm_wait(&round_open, 1, "a barrier");
    } while (anybody_busy);
}

void comm_share(int shard) {
    if (comm.world == 1) return;
    wait_limit("the grouping of ranks");
    MPI_Comm_split(MPI_COMM_WORLD, comm.rank / shard, comm.rank, &group);
    MPI_Comm_split(MPI_COMM_WORLD, comm.rank % shard, comm.rank, &copies);
    wait_limit(NULL);
}

// The sums are ours, and each is complete on return. Of Open MPI's own, which go on meanwhile only inside its
// calls, the reduce-scatter and the all-reduce in place send whole units to one rank and back; here each rank
// of S sends and receives (S-1)/S of them, in pieces that stay in the cache (steps of two ranks: 0.92 of the
// time, with ZeRO 0.89 to 0.93). A sum's order depends on the share alone: runs repeat bit by bit.

// Sends n elements to rank `to` of c while n_from arrive from rank `from`.
static void exchange(MPI_Comm c, const floatX *x, size_t n, int to, floatX *y, size_t n_from, int from,
                     const char *what) {
    MPI_Request r[2];
    MPI_Irecv(y, (int)n_from, MPI_FLOATX, from, 0, c, &r[0]);
    MPI_Isend(x, (int)n, MPI_FLOATX, to, 0, c, &r[1]);
    comm_wait(r, 2, what);
}

// x (n) is cut into shares of `share` elements, the last ones shorter or empty: rank r of c adds up the r-th.
static void sum_shares(MPI_Comm c, floatX *x, size_t n, size_t share) {
    enum { PIECE = 1 << 20 };
    static floatX piece[PIECE];
    int size, me;
    MPI_Comm_size(c, &size);
    MPI_Comm_rank(c, &me);
    for (int step = 1; step < size; step++) {
        const int to = (me + step) % size, from = (me - step + size) % size;
        for (size_t at = 0; at < share; at += PIECE) {
            const size_t mine = min_size(me*share + at, n), theirs = min_size(to*share + at, n);
            const size_t k = min_size(PIECE, share - at), n_mine = min_size(k, n - mine);
            exchange(c, x + theirs, min_size(k, n - theirs), to, piece, n_mine, from, "sums of gradients");
            #pragma omp parallel for simd
            for (size_t i = 0; i < n_mine; i++) x[mine + i] += piece[i];
        }
    }
}

// Each rank of c has its share of x; afterwards all have all.
static void gather_shares(MPI_Comm c, floatX *x, size_t n, size_t share, const char *what) {
    enum { PIECE = 1 << 28 };                   // MPI counts in int
    int size, me;
    MPI_Comm_size(c, &size);
    MPI_Comm_rank(c, &me);
    for (int step = 1; step < size; step++) {
        const int to = (me + step) % size, from = (me - step + size) % size;
        for (size_t at = 0; at < share; at += PIECE) {
            const size_t mine = min_size(me*share + at, n), theirs = min_size(from*share + at, n);
            const size_t k = min_size(PIECE, share - at);
            exchange(c, x + mine, min_size(k, n - mine), to, x + theirs, min_size(k, n - theirs), from, what);
        }
    }
}

// x (n) becomes its sum over all ranks, or over the copies of this share.
void comm_all_reduce(floatX *x, size_t n, int among_copies) {
    if (comm.world == 1) return;
    MPI_Comm c = among_copies ? copies : MPI_COMM_WORLD;
    int size;
    MPI_Comm_size(c, &size);
    const size_t share = CEIL_DIV(n, size);
    sum_shares(c, x, n, share);
    gather_shares(c, x, n, share, "sums of gradients");
}

// x (S*n), its r-th n elements being of rank r of those that share: this rank's become their sum over these
// ranks.
void comm_reduce_scatter(floatX *x, size_t n) {
    int size;
    MPI_Comm_size(group, &size);
    sum_shares(group, x, size * n, n);
}

// Rank r of those that share holds elements [r*n, (r+1)*n) of x; afterwards all of these ranks hold all.
void comm_all_gather(floatX *x, size_t n) {
    int size;
    MPI_Comm_size(group, &size);
    gather_shares(group, x, size * n, n, "the all-gather of weights");
}
#else
void comm_abort(void) {}
void comm_init(int *argc, char ***argv) {
    (void)argc;
    spin_less(*argv);
    const char *size = getenv("OMPI_COMM_WORLD_SIZE");
    if (size && strcmp(size, "1"))
        die("this build has no MPI, so mpirun would start %s separate runs; install Open MPI and run make "
            "train again", size);
}
void comm_finish(void) {}
void comm_broadcast(void *data, size_t bytes) { (void)data; (void)bytes; }
void comm_sum(double *x, int n) { (void)x; (void)n; }
double comm_max(double x) { return x; }
void comm_share(int shard) { (void)shard; }
void comm_all_reduce(floatX *x, size_t n, int among_copies) { (void)x; (void)n; (void)among_copies; }
void comm_reduce_scatter(floatX *x, size_t n) { (void)x; (void)n; }
void comm_all_gather(floatX *x, size_t n) { (void)x; (void)n; }
void comm_busy(void) {}
void comm_barrier(void) {}
#endif

// ---- energy: counters of the processor package and its memory (RAPL), read where the system lets us -------
enum { MAX_COUNTERS = 32 };
typedef struct Energy {
    char path[MAX_COUNTERS][128];
    double last[MAX_COUNTERS], wrap[MAX_COUNTERS];
    double limit[MAX_COUNTERS], spent[MAX_COUNTERS];    // W over long times, NAN: none; J since energy_open
    int n;
    double opened;
} Energy;

// Where Linux shows its devices; a container may have the machine's elsewhere.
static Str sys_path(const char *path) {
    const char *sys = getenv("LITESPARK_SYS");
    return str("%.100s/%s", sys ? sys : "/sys", path);
}

// Packages are intel-rapl:N, their memory intel-rapl:N:M with the name "dram" (AMD's packages have the same
// names).
void energy_open(Energy *e, const char *folder) {
    memset(e, 0, sizeof *e);
    e->opened = now_seconds();
    glob_t found;
    char pattern[160];
    snprintf(pattern, sizeof pattern, "%.100s/intel-rapl:*", folder);
    if (!glob(pattern, 0, NULL, &found)) {
        for (size_t i = 0; i < found.gl_pathc && e->n < MAX_COUNTERS; i++) {
            char path[160], name[32] = "";
            double uw;
            snprintf(path, sizeof path, "%s/name", found.gl_pathv[i]);
            FILE *f = fopen(path, "r");
            if (!f || fscanf(f, "%31s", name) != 1) name[0] = 0;
            if (f) fclose(f);
            if (strncmp(name, "package", 7) && strcmp(name, "dram")) continue;
            snprintf(path, sizeof path, "%s/max_energy_range_uj", found.gl_pathv[i]);
            if (!read_number(path, &e->wrap[e->n])) continue;
            snprintf(path, sizeof path, "%s/constraint_0_power_limit_uw", found.gl_pathv[i]);
            e->limit[e->n] = read_number(path, &uw) && uw > 0 ? uw * 1e-6 : NAN;
            snprintf(e->path[e->n], sizeof e->path[0], "%.100s/energy_uj", found.gl_pathv[i]);
            if (read_number(e->path[e->n], &e->last[e->n])) e->n++;
        }
        globfree(&found);
    }
}

// Joules since energy_open; NAN: unavailable. The counters wrap, so read at least once an hour.
double energy_sum(Energy *e) {
    double sum = e->n ? 0 : NAN;
    for (int i = 0; i < e->n; i++) {
        double now;
        if (read_number(e->path[i], &now)) {
            const double spent = now - e->last[i];
            e->spent[i] += (spent < 0 ? spent + e->wrap[i] : spent) * 1e-6;
            e->last[i] = now;
        }
        sum += e->spent[i];
    }
    return sum;
}

// W that all counters together may show: of one without a limit (often memory), what it has taken so far.
// NAN: none has a limit.
double energy_limit(const Energy *e) {
    double sum = 0, limited = 0;
    for (int i = 0; i < e->n; i++) {
        limited += isfinite(e->limit[i]);
        sum += isfinite(e->limit[i]) ? e->limit[i] : e->spent[i] / (now_seconds() - e->opened);
    }
    return limited ? sum : NAN;
}

static Energy energy;
double energy_read(void) {
    const double joules = energy_sum(&energy);
    return comm.local_rank ? 0 : joules;        // one rank counts for all of this machine
}

double power_limit(void) { return comm.local_rank ? 0 : energy_limit(&energy); }

// Mean (or largest) of the numbers in the files of a pattern; NAN: none is readable.
static double numbers_of(const char *pattern, int largest) {
    double sum = 0, most = NAN, x;
    int n = 0;
    glob_t found;
    if (glob(pattern, 0, NULL, &found)) return NAN;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        if (!read_number(found.gl_pathv[i], &x)) continue;
        most = n && most > x ? most : x;
        sum += x;
        n++;
    }
    globfree(&found);
    return largest ? most : n ? sum / n : NAN;
}

int power_sample(double *joules, double *mhz, double *celsius) {
    static Energy sampled;                      // energy is the training thread's
    if (comm.local_rank) return 0;
    if (!sampled.opened) energy_open(&sampled, sys_path("class/powercap").s);
    *joules = energy_sum(&sampled);
    *mhz = 1e-3 * numbers_of(sys_path("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq").s, 0);
    *celsius = 1e-3 * numbers_of(sys_path("class/thermal/thermal_zone*/temp").s, 1);
    return 1;
}

// ---- the device: this rank's threads ----------------------------------------------------------------------
// By default a thread of libgomp that waits spins for milliseconds: 300,000 rounds of the pause instruction,
// which takes 10 times the cycles it took when that number was chosen. Another process on that core, a second
// run or a rank, stands still meanwhile. 1000 rounds, some 50 us, bridge the gaps between our loops: the 15M
// model on two cores of a Xeon takes 77 ms a step, 75 by default, 88 without spinning or with 300 rounds.
// libgomp reads the variable before main, hence the new start.
static void spin_less(char **argv) {
#ifdef _OPENMP
    char self[PATH_MAX];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n < 0 || getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    self[n] = 0;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv(self, argv);          // where this fails, waiting spins
#else
    (void)argv;
#endif
}

static double memory_limit;     // bytes that the ranks of this machine may have together
void device_open(void) {
    double cores = comm.cores > 0 ? comm.cores : (double)omp_get_num_procs() / comm.local_ranks, limit;
    const double before = cores, of_launcher = (double)cores_of(getppid(), NULL) / comm.local_ranks;
    cgroup_limits("/proc/self/cgroup", "/sys/fs/cgroup", &limit, &memory_limit);
    take_limit(&cores, limit / comm.local_ranks);
    if (opt.threads || !getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(opt.threads ? (int)opt.threads : cores > 1 ? (int)(cores + 1e-6) : 1);
    if (getenv("OMPI_COMM_WORLD_SIZE") && before + 0.5 < of_launcher)
        printf("note | mpirun binds this rank to %g of the %g cores that it could have: start by dev/run.sh, "
               "or with mpirun --bind-to none\n", before, of_launcher);
    energy_open(&energy, sys_path("class/powercap").s);
}

void device_wait(void) {}

static double machine_memory(void) {            // this rank's part; of the control group's, if that is less
    double bytes = (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    take_limit(&bytes, memory_limit);
    return bytes / comm.local_ranks;
}

Machine device_machine(void) {                  // to plan with 70% of that
    Machine machine = {comm.world, comm.local_ranks, 0.7 * machine_memory()};
    return machine;
}

// Of 90% of it, what the arenas leave. The first save touches it.
void *device_host_memory(const Model *m, size_t bytes) {
    double arenas = 0;
    void *p;
    for (int i = 0; i < N_ARENAS; i++) arenas += model_bytes(m, i);
    if (arenas + (double)bytes > 0.9 * machine_memory() || posix_memalign(&p, 1 << 21, bytes)) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return p;
}

void device_host_memory_free(void *p) { free(p); }

const char *device_name(void) {
    static char name[320];
    FILE *f = fopen("/proc/cpuinfo", "r");
    for (char line[256]; f && fgets(line, sizeof line, f);) if (!strncmp(line, "model name", 10)) {
        snprintf(name, sizeof name, "%s", strchr(line, ':') ? strchr(line, ':') + 2 : "");
        name[strcspn(name, "\n")] = 0;
        break;
    }
    if (f) fclose(f);
    snprintf(name + strlen(name), sizeof name - strlen(name), "%s%d threads per rank", *name ? ", " : "",
             omp_get_max_threads());
    return name;
}

int device_logits_chunk(int V) {                // 32 MiB of logits, at least 64 rows
    const int rows = (int)((32 << 20) / (sizeof(float) * (size_t)V));
    return rows > 64 ? rows : 64;
}

void device_check_sizes(const Config *c) { (void)c; }   // any will do

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

// ---- faster versions of section 3 -------------------------------------------------------------------------
// ==== 17. The packed matmul ================================================================================
// How section 3's out = op(a) op(b) comes close to a core's arithmetic peak (Goto and van de Geijn 2008,
// "Anatomy of High-Performance Matrix Multiplication"; Van Zee and van de Geijn 2015, "BLIS"):
//   micro-kernel  MR x NR sums stay in registers while k runs. A step of k loads NR values of b and MR of a
//                 for MR*NR multiply-adds, so the loads keep up with the multipliers.
//   packing       panels of a (MR rows) and of b (NR columns) that do not lie well are copied into the order
//                 in which the micro-kernel reads: contiguous, no conflicts of pages or cache sets, and zeros
//                 instead of what lies beyond the last column.
//   blocking      k is cut into slices of at most KC. Where b is packed, a panel of a stays in the L1 cache
//                 and a block of b in L2 while tiles go along the columns; where b is read in place, MC rows
//                 of a and a panel of b stay in L2 while tiles go down the rows.
//   prefetch      what comes from memory is asked for a tile or 16 steps of k before it is needed, a line or
//                 two at a time: many at once would hold up the loads of the micro-kernel.
//   threads       out is cut into blocks of rows and columns. A thread takes a block from packing to the last
//                 slice, so there is no barrier but the last, and a thread that the system holds up holds up
//                 nobody else.
// An element of out is a sum over k in order within a slice, then over slices in order: neither blocks nor
// threads change a bit. Vectors are an extension of GCC and Clang: one source for all CPUs.
#if defined(__AVX512F__)
enum { VEC_BYTES = 64, MR = 12 };               // 32 registers: 12*2 sums, 2 of b, 1 of a (14 were no faster)
#define MATMUL_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define WIDE_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)        // of tiles of three vectors: 8*3 sums
#elif defined(__AVX__)
enum { VEC_BYTES = 32, MR = 6 };                // 16 registers: 6*2 sums, 2 of b, 1 of a
#define MATMUL_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define WIDE_ROWS(X)
#else
enum { VEC_BYTES = 16, MR = 6 };                // SSE (16 registers) and NEON (32)
#define MATMUL_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define WIDE_ROWS(X)
#endif
enum {
    LANES = VEC_BYTES / (int)sizeof(floatX), NR = 2 * LANES,
    CACHE_LINE = 64 / (int)sizeof(floatX),
    WIDE = VEC_BYTES == 64 ? 8 : 0,         // rows of tiles of three vectors; 0: there are none
    KC = 512, MC = 144,                     // multiples of MR and NR; fp32 sums of 512 terms stay accurate
    B_BLOCK = 192*1024,                     // packed elements of b: 768 KiB, three quarters of an L2 of 1 MiB
    KC_BOTH = 384,                          // where both are packed: more columns for each packing of a
    AHEAD = 16,                             // steps of k from the prefetch of b to its use
    PACK_CHUNK = 128,                       // steps of k that transposing takes at a time: output stays in L1
    PACK_AHEAD = 8,                         // rows from packing's prefetch to its use: memory is slow
    TILE_KC = 128,                          // slice of matmul_tile: its panel of b lies on the stack
    PACK_SIZE = MC*KC + B_BLOCK             // one thread's scratch, in elements
};
// Vec lives in a register; the _mem types lie at any address, over elements that other code reads as floatX.
typedef floatX Vec __attribute__((vector_size(VEC_BYTES)));
typedef floatX Vec_mem __attribute__((vector_size(VEC_BYTES), aligned(sizeof(floatX)), may_alias));
typedef floatX Quad __attribute__((vector_size(4*sizeof(floatX))));
typedef floatX Quad_mem __attribute__((vector_size(4*sizeof(floatX)), aligned(sizeof(floatX)), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
typedef __typeof__((Quad){0} < (Quad){0}) QuadIndex;    // integers as wide as floatX
#define SHUFFLE(x, y, i, j, k, l) __builtin_shuffle(x, y, (QuadIndex){i, j, k, l})
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

static inline int div_up(int a, int b) { return (a + b - 1) / b; }

// An operand as the loops see it: element (i, k) is p[i*row + k*col]. Transposition swaps the two strides.
typedef struct { const floatX *p; size_t row, col; } Operand;

static inline Operand operand(const floatX *p, int ld, int trans) {
    Operand x = {p, trans ? 1 : (size_t)ld, trans ? (size_t)ld : 1};
    return x;
}
static inline const floatX *at(Operand x, int i, int k) { return x.p + (size_t)i*x.row + (size_t)k*x.col; }

// out (rows,vecs*LANES) = or += a (rows,K) b (K,vecs*LANES). `rows` and `vecs` are constants wherever this is
// inlined: loops over them unroll and `sum` is registers. Two rows share one pointer: x86 has 16 of them. a's
// strides are numbers, not an Operand: that goes through the stack, written in pieces and read in others, and
// such a read waits until all stores before it, those of the last tile, are in the cache (up to 15% slower).
// What comes next: with `later` NULL b goes on behind its K rows, for the next tile; else that tile has the
// same b, and the lines at later, later + ldb, ... (K of them) are for tiles after it.
static inline __attribute__((always_inline))
void micro_kernel(const int rows, const int vecs, floatX *out, size_t ldo, const floatX *a, size_t row,
                  size_t col, const floatX *b, size_t ldb, int K, int accumulate, const floatX *later) {
    Vec sum[MR][3];
    const floatX *a_row[(MR + 1) / 2], *const first = b;
    UNROLL
    for (int i = 0; i < rows; i++) {
        sum[i][0] = sum[i][1] = sum[i][2] = (Vec){0};
        if (i % 2 == 0) a_row[i/2] = a + i*row;
    }
    size_t offset = 0;
    for (int k = 0; k < K; k += AHEAD) {
        if (k / AHEAD < rows) {                 // a row of out per AHEAD steps
            __builtin_prefetch(out + k/AHEAD*ldo);
            __builtin_prefetch(out + k/AHEAD*ldo + vecs*LANES - 1);
        }
        const int64_t soon = later && k + AHEAD >= K ? first - b : (int64_t)(AHEAD*ldb);
        for (const floatX *end = b + min_int(AHEAD, K - k)*ldb; b != end; b += ldb, offset += col) {
            const Vec_mem *b_k = (const Vec_mem *)b;
            const Vec b0 = b_k[0], b1 = b_k[vecs > 1], b2 = b_k[vecs - 1];
            for (int j = 0; j < vecs*LANES; j += CACHE_LINE) __builtin_prefetch(b + soon + j);
            if (later) {
                __builtin_prefetch(later, 0, 2);                // to L2
                later += ldb;
            }
            UNROLL
            for (int i = 0; i < rows; i++) {
                const floatX a_ik = a_row[i/2][offset + (i % 2)*row];
                sum[i][0] += a_ik * b0;
                if (vecs > 1) sum[i][1] += a_ik * b1;
                if (vecs > 2) sum[i][2] += a_ik * b2;
            }
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++, out += ldo)
        UNROLL
        for (int v = 0; v < vecs; v++) {
            Vec_mem *o = (Vec_mem *)out + v;
            *o = accumulate ? (Vec)(*o + sum[i][v]) : sum[i][v];
        }
}

// Full tiles: of a packed panel of a, whose strides are constants inside the instructions; of both in place.
static __attribute__((noinline))
void micro_kernel_packed(floatX *out, size_t ldo, const floatX *a, const floatX *b, size_t ldb, int K,
                         int accumulate, const floatX *later) {
    micro_kernel(MR, 2, out, ldo, a, 1, MR, b, ldb, K, accumulate, later);
}
static __attribute__((noinline))
void micro_kernel_in_place(floatX *out, size_t ldo, const floatX *a, size_t row, const floatX *b, size_t ldb,
                           int K, int accumulate, const floatX *later) {
    micro_kernel(MR, 2, out, ldo, a, row, 1, b, ldb, K, accumulate, later);
}

// Any strides, any number of rows, one to three vectors of columns.
static void micro_kernel_rows(int rows, int vecs, floatX *out, size_t ldo, const floatX *a, size_t row,
                              size_t col, const floatX *b, size_t ldb, int K, int accumulate) {
    switch (3*rows + vecs) {
#define CASE(n) \
        case 3*n + 1: micro_kernel(n, 1, out, ldo, a, row, col, b, ldb, K, accumulate, NULL); break; \
        case 3*n + 2: micro_kernel(n, 2, out, ldo, a, row, col, b, ldb, K, accumulate, NULL); break;
        MATMUL_ROWS(CASE)
#undef CASE
#define CASE(n) case 3*n + 3: micro_kernel(n, 3, out, ldo, a, row, col, b, ldb, K, accumulate, NULL); break;
        WIDE_ROWS(CASE)
#undef CASE
    }
}

// Any block of out up to MR x NR, or WIDE x 3 vectors. The last columns go through a tile of whole vectors:
// there b is padded.
static void micro_tile(floatX *out, size_t ldo, const floatX *a, size_t row, size_t col, const floatX *b,
                       size_t ldb, int rows, int cols, int K, int accumulate) {
    const int vecs = div_up(cols, LANES);
    if (cols % LANES == 0) {
        micro_kernel_rows(rows, vecs, out, ldo, a, row, col, b, ldb, K, accumulate);
        return;
    }
    floatX tile[MR * NR] __attribute__((aligned(VEC_BYTES)));
    micro_kernel_rows(rows, vecs, tile, NR, a, row, col, b, ldb, K, 0);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++)
            out[i*ldo + j] = accumulate ? out[i*ldo + j] + tile[i*NR + j] : tile[i*NR + j];
}

// dst (K,width) = the transpose of src (n,K), columns n .. width-1 zero. Where src's rows are contiguous,
// blocks of 4 x 4 are loaded, transposed in registers and stored as four vectors.
static void pack_panel(floatX *dst, int width, Operand src, int n, int K) {
    int i = 0;                                  // columns done
    for (; src.col == 1 && i + 4 <= n; i += 4) {
        const floatX *s = at(src, i, 0);
        floatX *d = dst + i;
        int k = 0;
        for (; k + 4 <= K; k += 4, s += 4, d += 4*width) {
            for (int j = 0; k % CACHE_LINE == 0 && j < 4; j++)
                __builtin_prefetch(s + (PACK_AHEAD + j)*src.row);
            const Quad r0 = *(const Quad_mem *)s, r1 = *(const Quad_mem *)(s + src.row);
            const Quad r2 = *(const Quad_mem *)(s + 2*src.row), r3 = *(const Quad_mem *)(s + 3*src.row);
            const Quad lo01 = SHUFFLE(r0, r1, 0, 4, 1, 5), hi01 = SHUFFLE(r0, r1, 2, 6, 3, 7);
            const Quad lo23 = SHUFFLE(r2, r3, 0, 4, 1, 5), hi23 = SHUFFLE(r2, r3, 2, 6, 3, 7);
            *(Quad_mem *)d             = SHUFFLE(lo01, lo23, 0, 1, 4, 5);
            *(Quad_mem *)(d + width)   = SHUFFLE(lo01, lo23, 2, 3, 6, 7);
            *(Quad_mem *)(d + 2*width) = SHUFFLE(hi01, hi23, 0, 1, 4, 5);
            *(Quad_mem *)(d + 3*width) = SHUFFLE(hi01, hi23, 2, 3, 6, 7);
        }
        for (; k < K; k++, s++, d += width)
            for (int j = 0; j < 4; j++) d[j] = s[j*src.row];
    }
    for (; i < width; i++)
        for (int k = 0; k < K; k++) dst[(size_t)k*width + i] = i < n ? *at(src, i, k) : 0;
}

// dst (K,width), (K,width), ... = rows of src (n,K) whose columns are contiguous, `width` each: for every
// k all of them, so that memory is read in long runs. `width` is a constant where this is inlined.
static inline __attribute__((always_inline))
void pack_in_order(floatX *dst, const int width, Operand src, int n, int K) {
    for (int k = 0; k < K; k++, dst += width) {
        for (int i = 0; k + PACK_AHEAD < K && i < n; i += CACHE_LINE)
            __builtin_prefetch(at(src, i, k + PACK_AHEAD));
        for (int i = 0; i < n; i += width) memcpy(dst + (size_t)i*K, at(src, i, k), width * sizeof(floatX));
    }
}

// dst = panels of `width` rows of src (n,K), width NR or MR; one of src's strides is 1. Where it is k's, many
// k of a panel at a time, for all panels: what is written stays in L1.
static void pack(floatX *dst, int width, Operand src, int n, int K) {
    const int in_order = src.row == 1 ? n / width * width : 0;
    if (in_order > 0 && width == NR) pack_in_order(dst, NR, src, in_order, K);
    else if (in_order > 0) pack_in_order(dst, MR, src, in_order, K);
    for (int k = 0; k < K && in_order < n; k += PACK_CHUNK)
        for (int i = in_order; i < n; i += width) {
            const Operand panel = {at(src, i, k), src.row, src.col};
            pack_panel(dst + (size_t)i*K + (size_t)k*width, width, panel, min_int(width, n - i),
                       min_int(PACK_CHUNK, K - k));
        }
}

// k in slices of equal size <= max, at least one, so that K = 0 still writes its zeros.
static inline int slice_size(int K, int max) { return K > 0 ? div_up(K, div_up(K, max)) : 1; }

// Rows at multiples of 4096 bytes fall into one set of L1. Are there more of them than the set has places?
static int rows_collide(size_t stride, int rows) {
#ifdef _SC_LEVEL1_DCACHE_ASSOC
    static long ways;
    if (!ways) ways = sysconf(_SC_LEVEL1_DCACHE_ASSOC);
#else
    const long ways = 8;
#endif
    return stride * sizeof(floatX) % 4096 == 0 && rows > ways;
}

// One thread's block: out (M,N) = or += a (M,K) b (K,N), packing into scratch (PACK_SIZE). a is read where it
// lies if its rows are contiguous, b if its columns are neighbours: only transposed operands are packed, and
// those whose rows collide in L1.
static void matmul_block(floatX *out, size_t ldo, Operand a, Operand b, int M, int N, int K, int accumulate,
                         floatX *scratch) {
    floatX *packed_a = scratch, *packed_b = scratch + MC*KC;
    const int a_in_place = a.col == 1 && !rows_collide(a.row, MR);
    const int b_in_place = b.col == 1 && b.row * sizeof(floatX) % 2048 != 0;
    const size_t a_row = a_in_place ? a.row : 1, a_col = a_in_place ? a.col : (size_t)MR;
    const int slice = slice_size(K, a_in_place || b_in_place ? KC : KC_BOTH);
    const int nc = b_in_place ? N : B_BLOCK / slice / NR * NR;
    for (int k0 = 0; k0 == 0 || k0 < K; k0 += slice)
        for (int j0 = 0; j0 < N; j0 += nc) {
            const int nk = min_int(slice, K - k0), nj = min_int(nc, N - j0), panels_j = div_up(nj, NR);
            // columns of b read where they lie; a tile that ends inside a vector is packed as a whole, so
            // that no load passes the end of b
            const int own = !b_in_place ? 0 : nj % LANES == 0 ? nj : nj / NR * NR;
            const Operand columns = {at(b, k0, j0 + own), b.col, b.row};        // transposed: pack's (n,K)
            pack(packed_b, NR, columns, nj - own, nk);
            for (int i0 = 0; i0 < M; i0 += MC) {
                const int ni = min_int(MC, M - i0), panels_i = div_up(ni, MR);
                const Operand block = {at(a, i0, k0), a.row, a.col};
                if (!a_in_place) pack(packed_a, MR, block, ni, nk);
                for (int t = 0; t < panels_i * panels_j; t++) {
                    const int i = MR * (b_in_place ? t % panels_i : t / panels_j);
                    const int j = NR * (b_in_place ? t / panels_i : t % panels_j);
                    floatX *o = out + (i0 + i)*ldo + j0 + j;
                    const floatX *panel = a_in_place ? at(block, i, 0) : packed_a + (size_t)i*nk;
                    const floatX *panel_b = j < own ? at(b, k0, j0 + j) : packed_b + (size_t)(j - own)*nk;
                    const size_t ldb = j < own ? b.row : (size_t)NR;
                    const int rows = min_int(MR, ni - i), cols = min_int(NR, nj - j);
                    const int add = accumulate || k0 > 0;
                    const floatX *later = b_in_place ? panel_b : NULL;
                    // b's next panel comes from memory: the first tiles ask for it, a line per row and tile
                    if (b_in_place && i0 == 0 && i/MR < NR/CACHE_LINE && j + 2*NR <= own)
                        later += NR + i/MR*CACHE_LINE;
                    if (rows == MR && cols == NR && !a_in_place)
                        micro_kernel_packed(o, ldo, panel, panel_b, ldb, nk, add, later);
                    else if (rows == MR && cols == NR && later)
                        micro_kernel_in_place(o, ldo, panel, a_row, panel_b, ldb, nk, add, later);
                    else micro_tile(o, ldo, panel, a_row, a_col, panel_b, ldb, rows, cols, nk, add);
                }
            }
        }
}

// Scratch for n threads, kept for the next call; grows with the number of threads. Aligned, because a vector
// across two cache lines costs two loads; in huge pages where Linux offers them (about 2% in one run).
static floatX *matmul_scratch(int n) {
    static char *scratch, *aligned;
    static int n_ready;
    if (n > n_ready) {
        const size_t page = (size_t)2 << 20, bytes = (size_t)n * PACK_SIZE * sizeof(floatX);
        free(scratch);
        scratch = (char *)xmalloc(bytes + 2*page);
        aligned = scratch + (page - (uintptr_t)scratch % page) % page;
        n_ready = n;
#ifdef MADV_HUGEPAGE
        madvise(aligned, (bytes + page - 1) / page * page, MADV_HUGEPAGE);  // for speed only: may fail
#endif
    }
    return (floatX *)aligned;
}

// As matmul_naive, rounding apart. Not in parallel regions: it starts threads, its scratch is shared.
void matmul(floatX *out, int ldo, const floatX *a, int lda, int trans_a,
            const floatX *b, int ldb, int trans_b, int M, int N, int K, int accumulate) {
    if (M <= 0 || N <= 0) return;
    const Operand x = operand(a, lda, trans_a), y = operand(b, ldb, trans_b);
    const int n_threads = (double)M*N*K < 1e6 ? 1 : omp_get_max_threads();  // less: waking costs more
    floatX *scratch = matmul_scratch(n_threads);
    if (n_threads == 1) {
        matmul_block(out, (size_t)ldo, x, y, M, N, K, accumulate, scratch);
        return;
    }
    int block_m = M, block_n = N;
    double least = 1e300;
    // up to four blocks per thread, least work for the thread that has the most. To pack an element, which
    // every block does for itself, costs about 16 multiply-adds, to read it where it lies about 2
    for (int m = 1; m <= 4*n_threads; m++)
        for (int n = 1; m*n <= 4*n_threads; n++) {
            const int rows = div_up(div_up(M, MR), m) * MR, cols = div_up(div_up(N, NR), n) * NR;
            const double each = (double)rows*cols + (trans_a ? 16.0 : 2.0)*rows + (trans_b ? 16.0 : 2.0)*cols;
            const double work = each * div_up(div_up(M, rows) * div_up(N, cols), n_threads);
            if (work < least) least = work, block_m = rows, block_n = cols;
        }
    const int grid_m = div_up(M, block_m), grid_n = div_up(N, block_n);
#pragma omp parallel for schedule(dynamic) num_threads(n_threads)
    for (int t = 0; t < grid_m * grid_n; t++) {
        const int i = t % grid_m * block_m, j = t / grid_m * block_n;
        const Operand rows = {at(x, i, 0), x.row, x.col}, cols = {at(y, 0, j), y.row, y.col};
        floatX *mine = scratch + (size_t)omp_get_thread_num()*PACK_SIZE;
        matmul_block(out + (size_t)i*ldo + j, (size_t)ldo, rows, cols,
                     min_int(block_m, M - i), min_int(block_n, N - j), K, accumulate, mine);
    }
}

// As matmul_naive, for small blocks in a parallel region: one thread, no memory but the stack. a is read in
// place; b too, except for transposed or incomplete panels, which are packed.
void matmul_tile(floatX *out, int ldo, const floatX *a, int lda, int trans_a,
                 const floatX *b, int ldb, int trans_b, int M, int N, int K, int accumulate) {
    floatX packed[TILE_KC * NR] __attribute__((aligned(VEC_BYTES)));
    const Operand x = operand(a, lda, trans_a), y = operand(b, ldb, trans_b);
    const int slice = slice_size(K, TILE_KC);
    for (int k0 = 0; k0 == 0 || k0 < K; k0 += slice)
        for (int j = 0, cols; j < N; j += cols) {
            // three vectors as one tile: of two and one, the last would have too few sums (D 48: 88 to 96%)
            const int wide = WIDE > 0 && !trans_b && N - j == 3*LANES, step = wide ? (int)WIDE : (int)MR;
            const int nk = min_int(slice, K - k0);
            cols = wide ? 3*LANES : min_int(NR, N - j);
            const int pack = trans_b || cols % LANES != 0;
            const Operand columns = {at(y, k0, j), y.col, y.row};
            if (pack) pack_panel(packed, NR, columns, cols, nk);
            for (int i = 0; i < M; i += step)
                micro_tile(out + (size_t)i*ldo + j, (size_t)ldo, at(x, i, k0), x.row, x.col,
                           pack ? packed : columns.p, pack ? (size_t)NR : y.row, min_int(step, M - i), cols,
                           nk, accumulate || k0 > 0);
        }
}

// FMA peak of all threads: twelve independent chains of vectors in registers. The fastest of many short runs,
// of this call and of all before it: other programs only make a run slower.
double device_peak(int bf16) {
    enum { CHAINS = 12, ROUNDS = 50000, RUNS = 20 };
    static double best;
    double sink = 0;
    (void)bf16;                                 // bf16 is computed in fp32
    for (int run = 0; run < RUNS; run++) {
        double start = now_seconds();
        int threads = 0;
        #pragma omp parallel reduction(+ : sink, threads)
        {
            Vec x[CHAINS], a = (Vec){0} + (floatX)0.999, b = (Vec){0} + (floatX)1e-3;
            #pragma GCC unroll 12
            for (int k = 0; k < CHAINS; k++) x[k] = b * (floatX)k;
            for (int r = 0; r < ROUNDS; r++) {
                #pragma GCC unroll 12
                for (int k = 0; k < CHAINS; k++) x[k] = x[k] * a + b;
            }
            #pragma GCC unroll 12
            for (int k = 1; k < CHAINS; k++) x[0] += x[k];
            sink += (double)x[0][0];            // keeps the loop alive
            threads += 1;
        }
        double flops = 2.0 * LANES * CHAINS * ROUNDS * threads / (now_seconds() - start);
        best = flops > best ? flops : best;
    }
    return isfinite(sink) ? best : 0;
}
