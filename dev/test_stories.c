// test_stories.c: proves that the floor of data/stories.c is exact. No code of the storyteller is trusted:
// the scorer reads the text of the grammar tables itself, keeps every derivation that fits the story so far
// with its probability (the forward algorithm, no LL(1) assumed), and recomputes p of each token.
//
//     cc -O2 -o test_stories test_stories.c -lm && ./test_stories [path of the stories program]
#define STORIES_NO_MAIN
#ifndef STORIES_C
#define STORIES_C "../data/stories.c"
#endif
#include STORIES_C
#include <dirent.h>
#include <sys/resource.h>
#include <sys/wait.h>

static int n_failed, n_tests;

static void report(const char *name, int ok, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    printf("%s %s: ", ok ? "ok    " : "FAILED", name);
    vprintf(fmt, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
    n_failed += !ok;
    n_tests++;
}

// ---- the scorer: grammar text -> all derivations ----------------------------------------------------------
enum { MAX_CONFIGS = 20000, DEPTH = 12, VARS = 24 };
typedef struct Frame { const char *text; char param[12]; } Frame;
typedef struct Entry { char text[32]; double weight; const char *feature; } Entry;
typedef struct Config {
    double w;
    int depth, n_vars, is_end, at;      // at: characters of pending already told
    Frame stack[DEPTH];
    struct { char name[12]; const Entry *word; } vars[VARS];
    char pending[40];
} Config;
typedef struct ConfigList { int n; Config *c; } ConfigList;

static Entry entries[64][64];
static int n_entries[64];

static int class_of(const char *name, size_t n) {
    for (int i = 0; i < COUNT(class_texts); i++)
        if (strlen(class_texts[i].name) == n && strncmp(class_texts[i].name, name, n) == 0) return i;
    printf("no class %.*s\n", (int)n, name);
    exit(1);
}

static void scorer_class(int to, int from) {
    char *copy = strdup(class_texts[from].words), *save = NULL;
    for (char *t = strtok_r(copy, " ", &save); t; t = strtok_r(NULL, " ", &save)) {
        if (*t == '@') { scorer_class(to, class_of(t + 1, strlen(t + 1))); continue; }
        Entry *e = &entries[to][n_entries[to]++];
        char *star = strchr(t, '*');
        e->weight = star ? strtod(star + 1, NULL) : 1;
        if (star) *star = 0;
        e->feature = class_texts[from].feature;
        snprintf(e->text, sizeof e->text, " %.30s", t);
        for (char *u = e->text; *u; u++) if (*u == '_') *u = ' ';
    }
    free(copy);
}

static void set_pending(Config *c, const char *text) {
    snprintf(c->pending, sizeof c->pending, "%s", text);
    c->at = 0;
}

static const Entry *value_of(const Config *c, const char *name) {
    for (int i = 0; i < c->n_vars; i++) if (strcmp(c->vars[i].name, name) == 0) return c->vars[i].word;
    printf("unbound variable %s\n", name);
    exit(1);
}

// Follows c until it has text to tell; every way to do so is appended to out.
static void unfold(Config c, ConfigList *out) {
    while (!c.pending[c.at] && !c.is_end) {
        if (c.depth == 0) { c.is_end = 1; break; }
        Frame *f = &c.stack[c.depth - 1];
        const char *p = f->text;
        if (!*p) { c.depth--; continue; }
        const char *open = *p == ' ' && (p[1] == '<' || p[1] == '{') ? p + 1 : p;
        if (*open == '[') {
            char rule[32], param[12] = "";
            size_t n = strcspn(open + 1, " ]");
            memcpy(rule, open + 1, n); rule[n] = 0;
            const char *close = strchr(open, ']');
            if (open[1 + n] == ' ')
                snprintf(param, sizeof param, "%.*s", (int)(close - open - 2 - (long)n), open + 2 + n);
            if (!*param || strcmp(param, "$") == 0) strcpy(param, f->param);
            double total = 0;
            f->text = close + 1;
            for (int i = 0; i < COUNT(grammar_texts); i++)
                if (strcmp(grammar_texts[i].rule, rule) == 0) total += grammar_texts[i].weight;
            for (int i = 0; i < COUNT(grammar_texts); i++) {
                if (strcmp(grammar_texts[i].rule, rule) != 0) continue;
                Config d = c;
                d.w *= grammar_texts[i].weight / total;
                d.stack[d.depth].text = grammar_texts[i].text;
                strcpy(d.stack[d.depth++].param, param);
                unfold(d, out);
            }
            return;
        }
        if (*open == '<' || *open == '{') {
            const char *close = strpbrk(open, ">}"), *inside = open + 1;
            const char *mark = (const char *)memchr(inside, '=', (size_t)(close - inside));
            char var[12] = "";
            f->text = close + 1;
            if (*open == '{') {
                size_t n = strcspn(inside, "=.}");
                memcpy(var, inside, n); var[n] = 0;
                if (strcmp(var, "$") == 0) strcpy(var, f->param);
                if (inside[n] != '=') {
                    const Entry *e = value_of(&c, var);
                    if (inside[n] == '}') { set_pending(&c, e->text); continue; }
                    const size_t m = (size_t)(close - inside) - n - 1;
                    for (int i = 0; i < COUNT(forms); i++)
                        if (strncmp(forms[i].form, inside + n + 1, m) == 0 && strlen(forms[i].form) == m
                            && strcmp(forms[i].feature, e->feature) == 0) {
                            char text[40];
                            snprintf(text, sizeof text, "%s", forms[i].text);
                            set_pending(&c, text);
                        }
                    continue;
                }
                inside = mark + 1;
            }
            int k = class_of(inside, (size_t)(close - inside));
            double total = 0;
            for (int pass = 0; pass < 2; pass++)
                for (int i = 0; i < n_entries[k]; i++) {
                    int used = 0;
                    for (int v = 0; v < c.n_vars; v++)
                        used |= strcmp(c.vars[v].word->text, entries[k][i].text) == 0;
                    if (*var && used) continue;
                    if (pass == 0) { total += entries[k][i].weight; continue; }
                    Config d = c;
                    d.w *= entries[k][i].weight / total;
                    set_pending(&d, entries[k][i].text);
                    if (*var) {
                        int v = 0;
                        while (v < d.n_vars && strcmp(d.vars[v].name, var) != 0) v++;
                        if (v == d.n_vars) strcpy(d.vars[d.n_vars++].name, var);
                        d.vars[v].word = &entries[k][i];
                    }
                    unfold(d, out);
                }
            return;
        }
        char unit[40];   // a literal unit
        int n = 0;
        if (*p == ' ') unit[n++] = *p++;
        if ((*p | 32) >= 'a' && (*p | 32) <= 'z')
            while ((*p | 32) >= 'a' && (*p | 32) <= 'z') unit[n++] = *p++;
        else unit[n++] = *p == '`' ? '"' : *p, p++;
        unit[n] = 0;
        f->text = p;
        set_pending(&c, unit);
    }
    if (out->n == MAX_CONFIGS) { printf("too many derivations\n"); exit(1); }
    out->c[out->n++] = c;
}

// ---- the tokenizer, from the bytes of tokenizer.bin -------------------------------------------------------
static char (*pieces)[40];
static int V;

static void read_tokenizer(const char *path) {
    FILE *f = fopen(path, "rb");
    int32_t h[8], length;
    float score;
    int ok = f && fread(h, 4, 8, f) == 8 && h[0] == 20251002 && h[1] == 1 && h[2] == 1 && h[4] == 256
             && h[5] == 256 && h[6] == 0 && h[7] == 0;
    V = ok ? h[3] : 0;
    pieces = (char (*)[40])calloc((size_t)V + 1, 40);
    for (int i = 0; ok && i < V; i++)
        ok = fread(&score, 4, 1, f) == 1 && fread(&length, 4, 1, f) == 1 && length > 0 && length < 40
             && fread(pieces[i], 1, (size_t)length, f) == (size_t)length;
    ok = ok && fgetc(f) == EOF;
    if (f) fclose(f);
    int repeated = 0;
    for (int i = 0; i < V; i++) for (int j = 0; j < i; j++) repeated += strcmp(pieces[i], pieces[j]) == 0;
    ok = ok && !repeated && strcmp(pieces[65], "<0x41>") == 0 && strcmp(pieces[256], "<|endoftext|>") == 0;
    report("tokenizer.bin reads back", ok, "%d pieces, %d repeated", V, repeated);
}

static int longest_piece(const char *text) {   // -1: no piece, a byte
    int best = -1;
    size_t length = 0;
    static int first[256][2], ready;   // pieces are sorted: those with the same first byte are neighbours
    if (!ready) {
        ready = 1;
        for (int i = 257; i < V; i++) {
            int b = (unsigned char)pieces[i][0];
            if (!first[b][1]) first[b][0] = i;
            first[b][1] = i + 1;
        }
    }
    int b = (unsigned char)text[0];
    for (int i = first[b][0]; i < first[b][1]; i++) {
        size_t n = strlen(pieces[i]);
        if (n > length && strncmp(text, pieces[i], n) == 0) { best = i; length = n; }
    }
    return best;
}

// ---- scoring a story --------------------------------------------------------------------------------------
typedef struct Check {
    double max_error, sum_nll, sum_entropy, sum_var, chi_sum;
    int64_t n_tokens;
    int max_alive, n_lost;
    double *seen, *p, *var;
} Check;

static ConfigList before, after;

// Recomputes -ln p of the n tokens of a story (the last may be <|endoftext|>) from its text, against nll.
static void score(const uint16_t *tokens, const float *nll, int n, Check *ck) {
    double p_of[2048];
    before.n = 1;
    memset(&before.c[0], 0, sizeof(Config));
    before.c[0].w = 1;
    before.c[0].depth = 1;
    before.c[0].stack[0].text = "[story]";
    for (int t = 0; t < n; t++) {
        after.n = 0;
        double total = 0, matched = 0, entropy = 0, entropy2 = 0;
        for (int i = 0; i < before.n; i++) { total += before.c[i].w; unfold(before.c[i], &after); }
        before.n = 0;
        memset(p_of, 0, sizeof p_of);
        for (int i = 0; i < after.n; i++) {
            Config *c = &after.c[i];
            int id = c->is_end ? 256 : longest_piece(c->pending + c->at);
            p_of[id] += c->w / total;
            if (id != tokens[t]) continue;
            matched += c->w;
            c->at += c->is_end ? 0 : (int)strlen(pieces[id]);
            before.c[before.n++] = *c;
        }
        if (before.n == 0) { ck->n_lost++; return; }
        if (before.n > ck->max_alive) ck->max_alive = before.n;
        for (int i = 0; i < before.n; i++) before.c[i].w /= matched;   // keep the scale
        double mine = -log(matched / total), error = fabs(mine - nll[t]);
        if (!(error <= ck->max_error)) ck->max_error = error;
        for (int v = 256; v < V; v++) {
            double p = p_of[v];
            if (p <= 0) continue;
            entropy -= p * log(p);
            entropy2 += p * log(p) * log(p);
            ck->p[v] += p;
            ck->var[v] += p * (1 - p);
        }
        ck->seen[tokens[t]]++;
        ck->sum_nll += mine;
        ck->sum_entropy += entropy;
        ck->sum_var += entropy2 - entropy * entropy;
        ck->n_tokens++;
    }
}

static void check_init(Check *ck) {
    memset(ck, 0, sizeof *ck);
    ck->seen = (double *)calloc(2048, 8);
    ck->p = (double *)calloc(2048, 8);
    ck->var = (double *)calloc(2048, 8);
}

static void test_scores(const Grammar *g, int n_stories) {
    Check ck;
    Story s;
    int longest_seen = 0, n_broken = 0;
    check_init(&ck);
    for (int i = 0; i < n_stories; i++) {
        char text[4096] = "";
        story_tell(&s, g, 99, TRAIN_STREAM, (uint64_t)i);
        size_t n = 0;
        for (int t = 0; t < s.n - 1; t++)
            n += (size_t)snprintf(text + n, sizeof text - n, "%s", pieces[s.tokens[t]]);
        uint16_t ids[512];
        int m = 0;   // the text alone gives the tokens
        for (const char *p = text; *p && m < 511;) {
            int id = longest_piece(p);
            ids[m++] = (uint16_t)(id < 0 ? (unsigned char)*p : id);
            p += id < 0 ? 1 : strlen(pieces[id]);
        }
        ids[m++] = 256;
        n_broken += m != s.n || memcmp(ids, s.tokens, (size_t)m * 2) != 0;
        if (s.n > longest_seen) longest_seen = s.n;
        score(ids, s.nll, m, &ck);
    }
    report("greedy longest match of the text gives the storyteller's tokens", n_broken == 0,
           "%d of %d stories differ", n_broken, n_stories);
    report("an independent scorer of the text finds the same -ln p", ck.n_lost == 0 && ck.max_error < 2e-6,
           "%lld tokens, largest difference %.1e, %d stories without derivation",
           (long long)ck.n_tokens, ck.max_error, ck.n_lost);
    report("the grammar is unambiguous and LL(1)", ck.max_alive == 1,
           "at most %d derivation(s) fit after each token", ck.max_alive);
    double z = (ck.sum_nll - ck.sum_entropy) / sqrt(ck.sum_var);
    report("the mean of -ln p is the entropy", fabs(z) < 4.5, "mean %.5f, entropy %.5f, z = %.2f",
           ck.sum_nll / (double)ck.n_tokens, ck.sum_entropy / (double)ck.n_tokens, z);
    double worst = 0, chi = 0;
    int df = 0, at = 0, never = 0;
    for (int v = 256; v < V; v++) {
        if (ck.var[v] < 5) { never += ck.seen[v] == 0; continue; }
        double zv = (ck.seen[v] - ck.p[v]) / sqrt(ck.var[v]);
        chi += zv * zv; df++;
        if (fabs(zv) > worst) { worst = fabs(zv); at = v; }
    }
    report("every token comes as often as its p says", worst < 5,
           "%d tokens, largest |z| = %.2f (%s), mean z^2 = %.2f, %d never seen",
           df, worst, pieces[at], chi / df, never);
    report("the longest story fits the window", longest_seen <= longest_story(g) && longest_story(g) <= 255,
           "%d tokens seen, %d possible", longest_seen, longest_story(g));
}

// Prefixes of story 0: the frequencies of the next token among n stories, against p.
static void test_prefixes(const Grammar *g, int n_stories) {
    enum { DEPTHS = 40 };
    Story ref, s;
    static double count[DEPTHS][2048], p[DEPTHS][2048], n_at[DEPTHS];
    story_tell(&ref, g, 7, TRAIN_STREAM, 0);
    for (int i = 0; i < n_stories; i++) {
        story_tell(&s, g, 7, TRAIN_STREAM, (uint64_t)i);
        for (int k = 0; k < DEPTHS; k++) {
            n_at[k]++;
            count[k][s.tokens[k]]++;
            p[k][s.tokens[k]] = exp(-(double)s.nll[k]);
            if (s.tokens[k] != ref.tokens[k]) break;
        }
    }
    double worst = 0, worst_sum = 0;
    int n_choices = 0;
    for (int k = 0; k < DEPTHS; k++) {
        double chi = 0, sum = 0;
        int df = -1;
        if (n_at[k] < 1000) break;
        for (int v = 0; v < V; v++) {
            if (p[k][v] <= 0) continue;
            double expected = n_at[k] * p[k][v];
            chi += (count[k][v] - expected) * (count[k][v] - expected) / expected;
            sum += p[k][v];
            df++;
        }
        if (fabs(sum - 1) > worst_sum) worst_sum = fabs(sum - 1);
        if (df < 1) continue;
        double z = (chi - df) / sqrt(2.0 * df);
        n_choices++;
        if (z > worst) worst = z;
    }
    report("next-token frequencies after short prefixes match p (chi-square)",
           worst < 4.5 && worst_sum < 1e-5 && n_choices >= 4,
           "%d stories, %d choices, largest z = %.2f, |sum of p - 1| <= %.0e",
           n_stories, n_choices, worst, worst_sum);
}

// ---- the files --------------------------------------------------------------------------------------------
static unsigned char *slurp(const char *dir, const char *name, size_t *n) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    *n = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    *n = (size_t)ftell(f);
    rewind(f);
    unsigned char *data = (unsigned char *)malloc(*n + 1);
    if (fread(data, 1, *n, f) != *n) *n = 0;
    data[*n] = 0;
    fclose(f);
    return data;
}

static int same_dirs(const char *a, const char *b) {
    static const char *const names[] = {"tokenizer.bin", "train/train_000.ds", "train/train_000.nll",
                                        "train/metadata.json", "val/val_000.ds", "val/val_000.nll",
                                        "val/metadata.json", "stories.json"};
    int same = 1;
    for (int i = 0; i < COUNT(names); i++) {
        size_t n, m;
        unsigned char *x = slurp(a, names[i], &n), *y = slurp(b, names[i], &m);
        same = same && n == m && (!x) == (!y) && (!x || memcmp(x, y, n) == 0);
        free(x);
        free(y);
    }
    return same;
}

// n_rows rows of DIR/SPLIT: each begins with <|endoftext|>, and the scorer finds the recorded loss of each
// target in the text. Returns the mean loss.
static double check_rows(const char *dir, const char *split, int n_rows, int n_scored) {
    char name[64];
    size_t n, m, k;
    snprintf(name, sizeof name, "%s/%s_000.ds", split, split);
    unsigned char *rows = slurp(dir, name, &n);
    snprintf(name, sizeof name, "%s/%s_000.nll", split, split);
    unsigned char *nll = slurp(dir, name, &m);
    snprintf(name, sizeof name, "%s/metadata.json", split);
    unsigned char *json = slurp(dir, name, &k);
    int ok = n == (size_t)n_rows * 257 * 2 && m == (size_t)n_rows * 256 * 4
             && json && strstr((char *)json, "\"sequence_length\": 256,")
             && strstr((char *)json, "\"token_size_bytes\": 2,");
    Check ck;
    check_init(&ck);
    double sum = 0;
    for (int r = 0; ok && r < n_rows; r++) {
        const uint16_t *row = (const uint16_t *)(const void *)rows + r * 257;
        const float *f = (const float *)(const void *)nll + r * 256;
        ok = row[0] == 256;
        for (int t = 0; t < 256; t++) sum += f[t];
        for (int t = 0; t < 256 && r < n_scored;) {
            int end = t;
            while (end < 255 && row[end + 1] != 256) end++;
            score(row + 1 + t, f + t, end - t + 1, &ck);
            t = end + 1;
        }
    }
    ok = ok && ck.n_tokens == n_scored * 256 && ck.max_error < 2e-6 && ck.n_lost == 0;
    report("rows and their .nll", ok, "%s: mean %.6f over %d rows", split, sum / (n_rows * 256), n_rows);
    free(rows); free(nll); free(json);
    return sum / (n_rows * 256);
}

static void test_files(const Grammar *g) {
    Totals totals = {0, 0, 0, 0, longest_story(g)};
    write_stories(g, "build/out_test/a", 1, 256000, 40, &totals);
    read_tokenizer("build/out_test/a/tokenizer.bin");
    double floor_of_val = check_rows("build/out_test/a", "val", 40, 40);
    check_rows("build/out_test/a", "train", 1000, 40);
    report("the floor is the mean of the validation rows",
           fabs(floor_of_val - totals.floor) < 1e-6 && totals.tokens == 256000, "%.6f", totals.floor);
    size_t n;
    int ok;

    Story a, b;
    int n_same = 0;
    for (int i = 0; i < 2000; i++) {
        story_tell(&a, g, 1, TRAIN_STREAM, (uint64_t)i);
        story_tell(&b, g, 1, VAL_STREAM, (uint64_t)i);
        n_same += a.n == b.n && memcmp(a.tokens, b.tokens, (size_t)a.n * 2) == 0;
    }
    report("training and validation stories differ", n_same == 0, "%d of 2000 equal", n_same);

    Totals again = {0, 0, 0, 0, longest_story(g)}, third = again;
    write_stories(g, "build/out_test/b", 1, 256000, 40, &again);
    ok = same_dirs("build/out_test/a", "build/out_test/b");
    write_stories(g, "build/out_test/b", 1, 1000, 40, &third);
    third.stories = 0;
    write_stories(g, "build/out_test/b", 1, 256000, 40, &third);
    report("a rerun gives the same bytes, also after another run",
           ok && same_dirs("build/out_test/a", "build/out_test/b"), "yes");

    pid_t pid = fork();
    if (pid == 0) {   // disk full while the shards are written: one error line, exit 1, no marker
        struct rlimit limit = {100000, 100000};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
        if (!freopen("build/out_test/stderr.txt", "w", stderr)) _exit(9);
        third.tokens = third.stories = 0;
        write_stories(g, "build/out_test/b", 1, 256000, 40, &third);
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    unsigned char *message = slurp("build/out_test", "stderr.txt", &n);
    if (message && strchr((char *)message, '\n')) *strchr((char *)message, '\n') = 0;
    ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && access("build/out_test/b/stories.json", F_OK) != 0
         && message && strncmp((char *)message, "error: ", 7) == 0;
    report("an interrupted run leaves no marker", ok, "%s", message ? (char *)message : "");
    free(message);
}

static void test_options(const char *program) {
    static const char *const bad[] = {"--what 1", "--out", "--train-tokens x", "--train-tokens 0",
                                      "--val-rows -1", "--seed", "--print 0", "--print 5x", "stray",
                                      "--out /dev/null/x"};
    int n_ok = 0;
    for (int i = 0; i < COUNT(bad); i++) {
        char command[700];
        size_t n;
        snprintf(command, sizeof command, "%s %s >build/out_test/o 2>build/out_test/e", program, bad[i]);
        int rc = system(command);
        unsigned char *e = slurp("build/out_test", "e", &n);
        int lines = 0;
        for (size_t k = 0; k < n; k++) lines += e[k] == '\n';
        int good = WIFEXITED(rc) && WEXITSTATUS(rc) == 1 && lines == 1
                   && strncmp((char *)e, "error: ", 7) == 0;
        if (!good) printf("       %s: status %d, %s\n", bad[i], rc, e);
        n_ok += good;
        free(e);
    }
    report("bad options end with one error line and exit 1", n_ok == COUNT(bad),
           "%d of %d", n_ok, COUNT(bad));
    char command[700];
    snprintf(command, sizeof command,
             "%s --print 3 | grep -c . | grep -qx 3 && "
             "%s --out build/out_test/a --train-tokens 300000 --val-rows 8 | grep -q 'floor 0'",
             program, program);
    report("--print and --out work", system(command) == 0, "%s", program);
}

int main(int argc, char **argv) {
    Grammar *g = grammar_create();
    before.c = (Config *)malloc(MAX_CONFIGS * sizeof(Config));
    after.c = (Config *)malloc(MAX_CONFIGS * sizeof(Config));
    for (int i = 0; i < COUNT(class_texts); i++) scorer_class(i, i);
    make_dirs("build/out_test");
    test_files(g);
    test_scores(g, argc > 2 ? atoi(argv[2]) : 4000);
    test_prefixes(g, 200000);
    if (argc > 1) test_options(argv[1]);
    printf("%d passed, %d failed\n", n_tests - n_failed, n_failed);
    return n_failed != 0;
}
