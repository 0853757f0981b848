// The reference of the benches: the twin's ops as an object, called as they are (twin.h).
#define LITESPARK_NO_MAIN
#include "../train_litespark.c"

void precision(int bf16) { storing_bf16 = bf16; }

void rope_table_sizes(float *cosine, float *sine, int D, int T) {
    Config c;
    memset(&c, 0, sizeof c);
    c.D = D, c.rope_theta = 10000;
    rope_table(cosine, sine, &c, T);
}
