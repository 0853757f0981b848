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
#include <strings.h>
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
                                        "val/metadata.json", "sft/train/train_000.ds",
                                        "sft/train/metadata.json", "sft/train/tokenizer.bin",
                                        "sft/validation/val_000.ds", "sft/validation/metadata.json",
                                        "sft/validation/tokenizer.bin", "dpo/train/train_000.ds",
                                        "dpo/train/metadata.json", "dpo/train/tokenizer.bin",
                                        "dpo/validation/val_000.ds", "dpo/validation/metadata.json",
                                        "dpo/validation/tokenizer.bin", "dpo/choices/val_000.ds",
                                        "dpo/choices/val_000.choices", "dpo/choices/metadata.json",
                                        "sft/train/chat_template.jinja", "stories.json"};
    int same = 1;
    for (int i = 0; i < COUNT(names); i++) {
        size_t n, m;
        unsigned char *x = slurp(a, names[i], &n), *y = slurp(b, names[i], &m);
        same = same && n == m && x && y && ( memcmp(x, y, n) == 0);
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

// ---- questions and pairs ----------------------------------------------------------------------------------
// A reader who knows English sentences and no grammar: for each form of a question, a sentence of the story that tells
// the answer. #1 is a word of the question, @1 a word that the story tells, @1:class one of that class, % any word.
// In answers ? is a word that this sentence does not tell (him or her). Questions for colours, places, pursuits and foods,
// which a small model learns late, are not asked: they have no reading.
static const struct { const char *question, *story, *answer; } readings[] = {
    {"Who is the story about ?", "named @1 .", "The story is about @1 ."},
    {"Who was the friend of #1 ?", "@2:pronoun friend @1:name", "@2 friend was @1 ."},
    {"Who was the friend of #1 ?", "@2:pronoun % friend @1:name", "@2 friend was @1 ."},
    {"Who was the friend of #1 ?", "wished for a friend , and there was a % % named @1 !", "? friend was @1 ."},
    {"What could #1 not find ?", "could not find % % @1 .", "#1 could not find the @1 ."},
    {"Who helped #1 ?", "@2:pronoun % friend @1:name came by", "@2 friend @1 helped ? ."},
    {"Who helped #1 ?", "said @2 friend @1:name . \" You played", "@2 friend @1 helped ? ."},
    {"What did #1 buy ?", "#1 bought a % @1 for", "#1 bought the @1 ."},
    {"Who was the #1 for ?", "bought a % #1 for % friend @1", "The #1 was for @1 ."},
    {"What did #1 have to buy ?", "bring me some % , some % and a % @1 ,", "#1 had to buy the @1 ."},
    {"Who wanted to play ?", "Come and play % with me , \" % the @1", "The @1 wanted to play ."},
    {"Who was #1 ?", "met a #1 @1", "The @1 was #1 ."},
    {"What did #1 have to do ?", "if you @1 @2 @3 ,", "#1 had to @1 @2 @3 ."},
    {"What did the #1 give to #2 ?", "Take my % @1 , \" % the #1", "The #1 gave #2 the @1 ."},
    {"What did the #1 give to #2 ?", "This % @1 is for you", "The #1 gave #2 the @1 ."},
    {"What was the prize ?", "The prize was a % @1 .", "The prize was the @1 ."},
    {"What was #1 ?", "friend #1 the @1 wanted", "#1 was a @1 ."},
    {"What did #1 hurt ?", "and hurt @1 @2 .", "#1 hurt @1 @2 ."},
    {"What was #1 afraid of ?", "I am afraid of the @1 ,", "#1 was afraid of the @1 ."},
    {"Who lost a #1 ?", "@1 once lost a % #1", "The @1 lost a #1 ."},
    {"What did the #1 lose ?", "#1 once lost a % @1 .", "The #1 lost a @1 ."},
    {"What did #1 build ?", "began to build a % @1 out of", "#1 built a @1 ."},
    {"What was the #1 made of at first ?", "a % #1 out of @1 .", "At first the #1 was made of @1 ."},
    {"Who painted the #1 ?", "built the #1 again , and @1 painted", "@1 painted the #1 ."},
    {"Who had the idea ?", "and @1 had the idea", "@1 had the idea ."},
    {"What did #1 find ?", "found a magic @1", "#1 found the @1 ."},
    {"Who came out of the #1 ?", "a % @1 came out", "A @1 came out of the #1 ."},
    {"Who came by ?", "Then a % @1 came by", "A @1 came by ."},
    {"Who knew the word ?", "The word is % , \" % the @1", "The @1 knew the word ."},
    {"Who sat there ?", "there sat a % @1 .", "A @1 sat there ."},
    {"What did #1 play ?", "#1 got a % @1 from", "#1 played the @1 ."},
    {"Who laughed ?", "friend @1 laughed", "@1 laughed ."},
};

enum { MAX_TEXT_WORDS = 512, WORD = 24 };
typedef struct Text { int n; char word[MAX_TEXT_WORDS][WORD]; } Text;
typedef struct Bound { char question[10][WORD], story[10][WORD]; } Bound;   // #i, @i

static void split_words(Text *t, const char *text, size_t length) {   // words and marks; in patterns also @1:class
    t->n = 0;
    for (size_t i = 0; i < length && t->n < MAX_TEXT_WORDS;) {
        if (text[i] == ' ') { i++; continue; }
        size_t end = i;
        while (end < length && (isalnum((unsigned char)text[end]) || strchr("#@:", text[end]))) end++;
        if (end == i) end++;
        snprintf(t->word[t->n++], WORD, "%.*s", (int)(end - i), text + i);
        i = end;
    }
}

static int is_of_class(const char *word, const char *class_name) {
    if (strcmp(class_name, "pronoun") == 0) return strcasecmp(word, "his") == 0 || strcasecmp(word, "her") == 0;
    const int c = class_of(class_name, strlen(class_name));
    for (int k = 0; k < n_entries[c]; k++) if (strcmp(entries[c][k].text + 1, word) == 0) return 1;
    return 0;
}

// Does the pattern from word p on fit the text from word t on, to its end if `whole`? It binds what it meets.
static int fits(const Text *pattern, int p, const Text *text, int t, Bound *b, int whole) {
    for (; p < pattern->n; p++, t++) {
        const char *want = pattern->word[p];
        if (*want == '*') {
            for (int to = t; to < text->n; to++) {
                Bound copy = *b;
                if (fits(pattern, p + 1, text, to, &copy, whole)) { *b = copy; return 1; }
            }
            return 0;
        }
        if (t >= text->n) return 0;
        const char *have = text->word[t];
        const int is_word = isalpha((unsigned char)*have);
        if (*want == '%' || *want == '?') { if (!is_word && strcmp(want, have) != 0) return 0; continue; }
        if (*want == '#' || *want == '@') {
            char *slot = *want == '#' ? b->question[want[1] - '0'] : b->story[want[1] - '0'];
            if (!is_word || (want[2] == ':' && !is_of_class(have, want + 3))) return 0;
            if (*slot && strcasecmp(slot, have) != 0) return 0;
            if (!*slot) strcpy(slot, have);
            continue;
        }
        if (strcasecmp(want, have) != 0) return 0;
    }
    return !whole || t == text->n;
}

// Does the answer say what the pattern says with what is bound?
static int says(const char *pattern, const Text *answer, const Bound *b) {
    Text p;
    Bound copy = *b;
    split_words(&p, pattern, strlen(pattern));
    return fits(&p, 0, answer, 0, &copy, 1);
}

// All that a reader finds in the story must be the answer, and there must be something to find. 1: so it is.
// fact: the answer without the words of the question, for those who guess.
static int is_right(const Text *story, const Text *question, const Text *answer, char *fact, int *form) {
    int n_found = 0, n_wrong = 0;
    for (int r = 0; r < COUNT(readings); r++) {
        Text pattern;
        Bound asked;
        memset(&asked, 0, sizeof asked);
        split_words(&pattern, readings[r].question, strlen(readings[r].question));
        if (!fits(&pattern, 0, question, 0, &asked, 1)) continue;
        split_words(&pattern, readings[r].story, strlen(readings[r].story));
        for (int at = 0; at < story->n; at++) {
            Bound b = asked;
            if (!fits(&pattern, 0, story, at, &b, 0)) continue;
            n_found++;
            if (!says(readings[r].answer, answer, &b)) { n_wrong++; continue; }
            *form = r;
            while (*form > 0 && strcmp(readings[*form - 1].question, readings[r].question) == 0) --*form;
            *fact = 0;
            for (int i = 1; i < 10; i++) if (*b.story[i] && !is_of_class(b.story[i], "pronoun"))
                snprintf(fact + strlen(fact), 120 - strlen(fact), " %s", b.story[i]);
        }
    }
    return n_found > 0 && n_wrong == 0;
}

// ---- the rows of a set, from their bytes
typedef struct Doc { const uint32_t *words; int n, row; } Doc;
typedef struct Docs { unsigned char *bytes; Doc *doc; int n, n_rows, most, n_bad; int64_t n_targets, n_padding; } Docs;

static int json_says(const unsigned char *json, const char *key, int64_t value) {
    char text[100];
    snprintf(text, sizeof text, "\"%s\": %lld,", key, (long long)value);
    return json && strstr((const char *)json, text) != NULL;
}

// Reads DIR/STAGE/SPLIT and checks all that a reader of any flagged rows relies on.
static Docs read_docs(const char *dir, const char *stage, const char *split, const char *shard) {
    char folder[300], name[64];
    size_t n, m, k, l;
    Docs d = {0};
    snprintf(folder, sizeof folder, "%s/%s/%s", dir, stage, split);
    d.bytes = slurp(folder, shard, &n);
    unsigned char *json = slurp(folder, "metadata.json", &m);
    unsigned char *tokenizer = slurp(folder, "tokenizer.bin", &k), *same = slurp(dir, "tokenizer.bin", &l);
    int ok = d.bytes && n > 0 && n % (257 * 4) == 0 && tokenizer && k == l && memcmp(tokenizer, same, k) == 0;
    d.n_rows = (int)(n / (257 * 4));
    d.doc = (Doc *)malloc((n / 4 + 1) * sizeof(Doc));
    for (int r = 0; ok && r < d.n_rows; r++) {
        const uint32_t *row = (const uint32_t *)(const void *)d.bytes + r * 257;
        const int first = d.n;
        int is_padding = 0, has_target = 1;
        ok = row[0] == (0x40000000u | 256);
        for (int t = 0; t < 257; t++) {
            const uint32_t w = row[t];
            if (w == 0x40000000u) { is_padding = 1; d.n_padding++; continue; }
            const int is_start = (w >> 30 & 1) != 0, is_target = w >> 31;
            ok = ok && !is_padding && (w & 0x3F000000u) == 0 && (w & 0xFFFFFF) < (uint32_t)V && !(is_start && is_target);
            if (is_start) {
                ok = ok && has_target && (w & 0xFFFFFF) == 256;
                has_target = 0;
                d.doc[d.n].words = row + t;
                d.doc[d.n].row = r;
                d.doc[d.n++].n = 0;
            }
            has_target |= is_target;
            d.n_targets += is_target;
            d.doc[d.n - 1].n++;
        }
        ok = ok && has_target;
        if (d.n - first > d.most) d.most = d.n - first;
    }
    ok = ok && json_says(json, "token_size_bytes", 4) && json_says(json, "sequence_length", 256)
         && json_says(json, "vocab_size", V) && json_says(json, "eos_token_id", 256)
         && json_says(json, "documents", d.n) && json_says(json, "documents_per_row", d.most)
         && json_says(json, "total_sequences", d.n_rows) && json_says(json, "total_tokens", d.n_rows * 257)
         && json_says(json, "targets", d.n_targets)
         && (strcmp(stage, "dpo") != 0 || json_says(json, "pairs", d.n / 2));
    snprintf(name, sizeof name, "\"stage\": \"%s\"", stage);
    ok = ok && strstr((char *)json, name);
    const double fill = 1 - (double)d.n_padding / (d.n_rows * 257.0);
    snprintf(name, sizeof name, "rows of %s/%s", stage, split);
    report(name, ok && fill >= 0.99, "%d documents in %d rows, %lld targets, %.2f%% full", d.n, d.n_rows,
           (long long)d.n_targets, 100 * fill);
    free(json); free(tokenizer); free(same);
    return d;
}

static void docs_free(Docs *d) { free(d->bytes); free(d->doc); }

// The text of words at..end; -1 where greedy longest match of the text gives other tokens. EOS ends a text.
static int text_of(const Doc *d, int at, int end, char *text, size_t room) {
    size_t n = 0;
    for (int i = at; i < end; i++) {
        const int id = (int)(d->words[i] & 0xFFFFFF);
        if (id < 256) n += (size_t)snprintf(text + n, room - n, "%c", id);
        else n += (size_t)snprintf(text + n, room - n, "%s", pieces[id]);
    }
    for (const char *p = text; at < end; at++) {
        int id = longest_piece(p);
        const size_t length = id < 0 ? 1 : strlen(pieces[id]);
        if (id < 0) id = (unsigned char)*p;
        if ((d->words[at] & 0xFFFFFF) != (uint32_t)id) return -1;
        p += length;
    }
    return 0;
}

// How many of the n tokens some derivation of the grammar tells, as the scorer knows it.
static int derivable(const uint32_t *words, int n) {
    before.n = 1;
    memset(&before.c[0], 0, sizeof(Config));
    before.c[0].w = 1;
    before.c[0].depth = 1;
    before.c[0].stack[0].text = "[story]";
    for (int t = 0; t < n; t++) {
        after.n = 0;
        for (int i = 0; i < before.n; i++) unfold(before.c[i], &after);
        before.n = 0;
        for (int i = 0; i < after.n; i++) {
            Config *c = &after.c[i];
            const int id = c->is_end ? 256 : longest_piece(c->pending + c->at);
            if ((uint32_t)id != (words[t] & 0xFFFFFF)) continue;
            c->at += c->is_end ? 0 : (int)strlen(pieces[id]);
            before.c[before.n++] = *c;
        }
        if (before.n == 0) return t;
    }
    return n;
}

// A chat is <|endoftext|>, a story, and turns of " Q: question A:", answer, <|endoftext|>. Answers are targets, no more.
typedef struct Guess { int form, n; char fact[120]; } Guess;

static int compare_guesses(const void *a, const void *b) {
    const Guess *x = (const Guess *)a, *y = (const Guess *)b;
    return x->form != y->form ? x->form - y->form : strcmp(x->fact, y->fact);
}

static int is_text(const Doc *d, int at, const char *text) {   // do words from at on spell it
    for (; *text; at++) {
        if (at >= d->n) return 0;
        const int id = (int)(d->words[at] & 0xFFFFFF);
        const char byte[2] = {(char)id, 0}, *piece = id < 256 ? byte : pieces[id];
        if (strncmp(text, piece, strlen(piece)) != 0) return 0;
        text += strlen(piece);
    }
    return 1;
}

static void check_chats(const Docs *docs, const char *split, int most_turns, int n_scored, Guess *guesses, int *n_guesses) {
    int n_wrong = 0, n_flags = 0, n_text = 0, n_turns = 0, n_lost = 0, n_missed = 0, most = 0, shown = 0;
    Guess planted;
    static Text story, question, answer;
    for (const Doc *d = docs->doc; d < docs->doc + docs->n; d++) {
        char told[4096], asked[400], said[400];
        int end = 1, turns = 0;
        while (end < d->n && !is_text(d, end, " Q:")) end++;
        n_text += text_of(d, 1, end, told, sizeof told) != 0;
        split_words(&story, told, strlen(told));
        if (d - docs->doc < n_scored) n_lost += derivable(d->words + 1, end - 1) != end - 1;
        for (int at = 1; at < end; at++) n_flags += d->words[at] >> 31 != 0;
        for (int at = end; at < d->n; turns++) {
            int a = at, e;
            while (a < d->n && !is_text(d, a, " A:")) a++;
            a += 2;                                        // " A" and ":"
            for (e = a; e < d->n && (d->words[e] & 0xFFFFFF) != 256; ) e++;
            if (e >= d->n) { n_text++; break; }
            n_text += !is_text(d, at, " Q:") || text_of(d, at, a, asked, sizeof asked) != 0
                      || text_of(d, a, e, said, sizeof said) != 0;
            for (int i = at; i <= e; i++) n_flags += d->words[i] >> 31 != (uint32_t)(i >= a);
            asked[strlen(asked) - 3] = 0;                  // " A:"
            split_words(&question, asked + 3, strlen(asked + 3));
            split_words(&answer, said, strlen(said));
            Guess *g = &guesses[*n_guesses];
            if (is_right(&story, &question, &answer, g->fact, &g->form)) {
                ++*n_guesses;
                const char *fact = strrchr(g->fact, ' ');   // planted: another word for the last thing that was told
                for (int i = 0; fact && i < answer.n; i++)
                    if (strcasecmp(answer.word[i], fact + 1) == 0) strcpy(answer.word[i], "zebra");
                n_missed += fact && is_right(&story, &question, &answer, planted.fact, &planted.form);
            } else { n_wrong++; if (shown++ < 3) printf("       %s |%s |%s\n", told, asked, said); }
            at = e + 1;
        }
        n_turns += turns;
        if (turns > most) most = turns;
    }
    char name[80];
    snprintf(name, sizeof name, "questions of %s have the answer that one reads in the story", split);
    report(name, n_wrong == 0 && n_text == 0 && n_lost == 0 && n_missed == 0 && most <= most_turns,
           "%d questions, %d wrong, %d planted errors missed, %d texts with other tokens, "
           "%d of %d stories not of the grammar", n_turns, n_wrong, n_missed, n_text, n_lost, n_scored);
    snprintf(name, sizeof name, "answers and their ends are the targets of %s, nothing else", split);
    report(name, n_flags == 0, "%d words with another flag", n_flags);
}

// Who knows all questions and answers of train, and guesses without a story.
static double guess_rate(Guess *train, int n_train, const Guess *val, int n_val) {
    int n_right = 0, best = 0;
    qsort(train, (size_t)n_train, sizeof *train, compare_guesses);
    for (int i = 0, n = 0, most = 0; i < n_train; i++) {
        n = i && compare_guesses(&train[i - 1], &train[i]) == 0 ? n + 1 : 1;
        if (i == 0 || train[i].form != train[i - 1].form) most = 0;
        if (n > most) { most = n; best = i; }
        if (i + 1 < n_train && train[i + 1].form == train[i].form) continue;
        for (int j = 0; j < n_val; j++) n_right += compare_guesses(&train[best], &val[j]) == 0;
    }
    return (double)n_right / n_val;
}

static int is_one_class(int a, int b) {   // some class has words of which the pieces are a part
    for (int c = 0; c < COUNT(class_texts); c++) {
        int has_a = 0, has_b = 0;
        for (int k = 0; k < n_entries[c]; k++) {
            has_a |= strstr(entries[c][k].text, pieces[a]) != NULL;
            has_b |= strstr(entries[c][k].text, pieces[b]) != NULL;
        }
        if (has_a && has_b) return 1;
    }
    return 0;
}

static void check_pairs(const Docs *docs, const char *split, int n_scored) {
    int n_apart = 0, n_prompt = 0, n_right = 0, n_wrong = 0, n_class = 0, n_facts = 0, n_compared = 0;
    for (int i = 0; i + 1 < docs->n; i += 2) {
        const Doc *c = &docs->doc[i], *r = c + 1;
        int cut = 0;
        n_apart += c->row != r->row || c->words + c->n != r->words;
        while (cut < c->n && !(c->words[cut] >> 31)) cut++;
        n_prompt += cut >= r->n || memcmp(c->words, r->words, (size_t)cut * 4) != 0;
        for (int t = cut; t < c->n; t++) n_prompt += !(c->words[t] >> 31);
        for (int t = cut; t < r->n; t++) n_prompt += !(r->words[t] >> 31);
        if (c->n == r->n) {
            int differ = 0;
            n_compared++;
            for (int t = cut; t < c->n; t++) {
                if (c->words[t] == r->words[t]) continue;
                differ++;
                n_class += !is_one_class((int)(c->words[t] & 0xFFFFFF), (int)(r->words[t] & 0xFFFFFF));
            }
            n_facts += differ;
            n_class += differ == 0;
        }
        if (i / 2 >= n_scored) continue;
        n_wrong += derivable(c->words + 1, c->n - 1) != c->n - 1;
        n_right += derivable(r->words + 1, r->n - 1) == r->n - 1 || derivable(r->words + 1, cut - 1) != cut - 1;
    }
    char name[80];
    snprintf(name, sizeof name, "pairs of %s lie side by side, with one beginning", split);
    report(name, docs->n % 2 == 0 && n_apart == 0 && n_prompt == 0, "%d pairs, %d apart, %d other beginnings or flags",
           docs->n / 2, n_apart, n_prompt);
    snprintf(name, sizeof name, "the grammar tells the chosen ending of %s, and never the rejected one", split);
    report(name, n_right == 0 && n_wrong == 0, "%d pairs, %d chosen not told, %d rejected told", n_scored, n_wrong, n_right);
    snprintf(name, sizeof name, "rejected endings of %s are as well formed", split);
    report(name, n_class == 0, "%.1f words of %d pairs replaced, %d by one of no common class",
           (double)n_facts / n_compared, n_compared, n_class);
}

static int share_a_story(const Docs *a, const Docs *b) {   // documents that agree in the first 24 tokens
    int n = 0;
    for (int i = 0; i < a->n; i++)
        for (int j = 0; j < b->n; j++) n += memcmp(a->doc[i].words, b->doc[j].words, 25 * 4) == 0;
    return n;
}

// The held-out pairs once more, as tasks of two choices: .choices says which document is the right one.
static void check_choices(const char *dir, const Docs *pairs) {
    size_t n, m, k;
    unsigned char *rows = slurp(dir, "dpo/choices/val_000.ds", &n), *list = slurp(dir, "dpo/choices/val_000.choices", &m);
    unsigned char *json = slurp(dir, "dpo/choices/metadata.json", &k);
    int n_wrong = 0, n_second = 0;
    int ok = rows && n == (size_t)pairs->n_rows * 257 * 4 && memcmp(rows, pairs->bytes, n) == 0 && list
             && m == (size_t)pairs->n * 16 && json_says(json, "tasks", pairs->n / 2)
             && json && strstr((char *)json, "\"stage\": \"choice\"");
    for (int i = 0; ok && i < pairs->n; i++) {
        const int32_t *is = (const int32_t *)(const void *)(list + 16 * i), *first = is - i % 2 * 4;
        const Doc *d = &pairs->doc[i];
        char text[4096] = "";
        int cut = 0;
        while (cut < d->n && !(d->words[cut] >> 31)) cut++;
        text_of(d, cut, d->n, text, sizeof text);
        n_wrong += is[0] != i / 2 || is[2] != first[2] || (is[1] == is[2]) != (i % 2 == 0) || is[1] < 0 || is[1] > 1
                   || (i % 2 && is[1] == first[1]) || is[3] != (int)strlen(text) - 1;
        n_second += i % 2 == 0 && is[2] == 1;
    }
    report("the pairs of validation are tasks of two choices, too", ok && n_wrong == 0 && abs(4 * n_second - pairs->n) <= 2,
           "%d tasks, %d with the right one second, %d wrong", pairs->n / 2, n_second, n_wrong);
    free(rows); free(list); free(json);
}

static void test_sets(const char *dir, int n_scored) {
    Docs train = read_docs(dir, "sft", "train", "train_000.ds"), val = read_docs(dir, "sft", "validation", "val_000.ds");
    Guess *train_guesses = (Guess *)calloc((size_t)train.n_targets, sizeof(Guess));
    Guess *val_guesses = (Guess *)calloc((size_t)val.n_targets, sizeof(Guess));
    int n_train = 0, n_val = 0;
    check_chats(&train, "train", MOST_QUESTIONS, n_scored, train_guesses, &n_train);
    check_chats(&val, "validation", 1, n_scored, val_guesses, &n_val);
    int n_shared = share_a_story(&val, &train);
    size_t n;
    unsigned char *json = slurp(dir, "sft/validation/metadata.json", &n);
    const char *stated = json ? strstr((char *)json, "\"guess_accuracy\": ") : NULL;
    const double rate = guess_rate(train_guesses, n_train, val_guesses, n_val), said = stated ? atof(stated + 18) : -1;
    report("who has not read the stories is right as rarely as metadata.json says", fabs(rate - said) < 0.03 && rate < 0.2,
           "%.4f, stated %.4f", rate, said);
    free(train_guesses); free(val_guesses); free(json);
    docs_free(&train); docs_free(&val);
    train = read_docs(dir, "dpo", "train", "train_000.ds");
    val = read_docs(dir, "dpo", "validation", "val_000.ds");
    check_pairs(&train, "train", n_scored);
    check_pairs(&val, "validation", n_scored);
    check_choices(dir, &val);
    n_shared += share_a_story(&val, &train);
    report("no validation story of questions or pairs is in training", n_shared == 0, "%d shared beginnings", n_shared);
    docs_free(&train); docs_free(&val);
}

static Totals small_set(const Grammar *g) {
    Totals t = {.longest = longest_story(g), .questions = 3000, .val_questions = 500, .pairs = 1200, .val_pairs = 300};
    return t;
}

static void test_files(const Grammar *g, int n_scored) {
    Totals totals = small_set(g);
    write_stories(g, "build/out_test/a", 1, 256000, 40, &totals);
    read_tokenizer("build/out_test/a/tokenizer.bin");
    double floor_of_val = check_rows("build/out_test/a", "val", 40, 40);
    check_rows("build/out_test/a", "train", 1000, 40);
    report("the floor is the mean of the validation rows",
           fabs(floor_of_val - totals.floor) < 1e-6 && totals.tokens == 256000, "%.6f", totals.floor);
    test_sets("build/out_test/a", n_scored);
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

    Totals again = small_set(g), third = again;
    write_stories(g, "build/out_test/b", 1, 256000, 40, &again);
    ok = same_dirs("build/out_test/a", "build/out_test/b");
    write_stories(g, "build/out_test/b", 1, 1000, 40, &third);
    third.stories = 0;
    write_stories(g, "build/out_test/b", 1, 256000, 40, &third);
    report("a rerun gives the same bytes, also after another run",
           ok && same_dirs("build/out_test/a", "build/out_test/b"), "yes");

    static const char *const names[] = {"an interrupted run leaves no marker", "one run at a time"};
    for (int i = 0; i < COUNT(names); i++) {
        // the disk is full while the shards are written; another run writes them: one error line, exit 1, no marker
        const int fd = i ? open("build/out_test/b/train/train_000.ds.tmp", O_RDWR | O_CREAT, 0666) : -1;
        if (i) flock(fd, LOCK_EX);
        pid_t pid = fork();
        if (pid == 0) {
            struct rlimit limit = {100000, 100000};
            signal(SIGXFSZ, SIG_IGN);
            if (!i) setrlimit(RLIMIT_FSIZE, &limit);
            if (!freopen("build/out_test/stderr.txt", "w", stderr)) _exit(9);
            third.tokens = third.stories = 0;
            write_stories(g, "build/out_test/b", 1, 256000, 40, &third);
            _exit(0);
        }
        int status = 0;
        waitpid(pid, &status, 0);
        if (fd >= 0) close(fd);
        unsigned char *message = slurp("build/out_test", "stderr.txt", &n);
        if (message && strchr((char *)message, '\n')) *strchr((char *)message, '\n') = 0;
        ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && access("build/out_test/b/stories.json", F_OK) != 0
             && message && strncmp((char *)message, "error: ", 7) == 0
             && (!i || strstr((char *)message, "another run"));
        report(names[i], ok, "%s", message ? (char *)message : "");
        free(message);
    }
}

static void test_options(const char *program) {
    static const char *const bad[] = {"--what 1", "--out", "--train-tokens x", "--train-tokens 0",
                                      "--val-rows -1", "--seed", "--print 0", "--print 5x", "stray",
                                      "--stage sft", "--stage all --print 2", "--questions 0", "--pairs 1e3",
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
             "%s --print 3 --stage sft | sed 's/^.* Q: .* A: .*<|endoftext|>$/turn/' | sort -u | tr -d '\\n' "
             "| grep -qx turn && "
             "%s --print 3 --stage dpo | grep -c '^rejected: ' | grep -qx 3 && "
             "%s --out build/out_test/a --train-tokens 300000 --val-rows 8 | grep -q 'floor 0'",
             program, program, program, program);
    report("--print and --out work", system(command) == 0, "%s", program);
}

int main(int argc, char **argv) {
    Grammar *g = grammar_create();
    before.c = (Config *)malloc(MAX_CONFIGS * sizeof(Config));
    after.c = (Config *)malloc(MAX_CONFIGS * sizeof(Config));
    for (int i = 0; i < COUNT(class_texts); i++) scorer_class(i, i);
    make_dirs("build/out_test");
    test_files(g, argc > 2 ? atoi(argv[2]) / 4 : 1000);
    test_scores(g, argc > 2 ? atoi(argv[2]) : 4000);
    test_prefixes(g, 200000);
    if (argc > 1) test_options(argv[1]);
    printf("%d passed, %d failed\n", n_tests - n_failed, n_failed);
    return n_failed != 0;
}
