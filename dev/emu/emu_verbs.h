// emu_verbs.h: the hardware verbs of train_litespark.cu's section 3, in C++. Semantics are those of the PTX instruction
// named at each verb. A warp-wide verb is a struct of the lanes' arguments and one function that the last lane to arrive
// runs for all; add wgmma, TMA and mbarriers the same way.
#pragma once
#include "cuda_bf16.h"

namespace emu {
inline float bf16_low(uint32_t u) { return __uint_as_float(u << 16); }
inline float bf16_high(uint32_t u) { return __uint_as_float(u & 0xFFFF0000u); }

struct MmaArgs { float *d; const uint32_t *a, *b; };
// Fragments of one lane (g = lane / 4, t = lane % 4): a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..],
// a[3] = A[g+8][2t+8..]; b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]; d = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1].
inline void mma_complete(void **args, uint32_t) {
    typedef float Four __attribute__((vector_size(16)));
    float A[16][16];
    alignas(16) float B[16][8], D[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const MmaArgs *x = (const MmaArgs *)args[lane];
        const int g = lane / 4, t = lane % 4 * 2;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            float *row = &A[g + i % 2 * 8][t + i / 2 * 8];
            row[0] = bf16_low(x->a[i]), row[1] = bf16_high(x->a[i]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            B[t + i * 8][g] = bf16_low(x->b[i]), B[t + i * 8 + 1][g] = bf16_high(x->b[i]);
            D[g + i * 8][t] = x->d[i * 2], D[g + i * 8][t + 1] = x->d[i * 2 + 1];
        }
    }
    for (int m = 0; m < 16; m++) {                            // products of bf16 are exact in fp32; sums in order of k
        Four *d = (Four *)D[m], left = d[0], right = d[1];
        for (int k = 0; k < 16; k++) {
            left += A[m][k] * *(const Four *)B[k];
            right += A[m][k] * *(const Four *)(B[k] + 4);
        }
        d[0] = left, d[1] = right;
    }
    for (int lane = 0; lane < 32; lane++) {
        float *d = ((const MmaArgs *)args[lane])->d;
        memcpy(d, &D[lane / 4][lane % 4 * 2], 8);
        memcpy(d + 2, &D[lane / 4 + 8][lane % 4 * 2], 8);
    }
}
struct LdmatrixArgs { const void *row; uint32_t *r; };
// Lane 8i+j holds the address of row j of matrix i (8 rows of 8 bf16). r[i] of a lane = M[g][2t, 2t+1], or transposed
// M[2t][g], M[2t+1][g].
template <bool trans> void ldmatrix_complete(void **args, uint32_t) {
    for (int i = 0; i < 4; i++) {
        uint16_t m[8][8];
        for (int j = 0; j < 8; j++) memcpy(m[j], ((const LdmatrixArgs *)args[8 * i + j])->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t low = trans ? m[t][g] : m[g][t], high = trans ? m[t + 1][g] : m[g][t + 1];
            ((const LdmatrixArgs *)args[lane])->r[i] = low | high << 16;
        }
    }
}
template <bool trans> EMU_INLINE void ldmatrix(uint32_t *r, const void *row) {
    static constexpr Verb verb = {trans ? "ldmatrix.trans" : "ldmatrix", ldmatrix_complete<trans>};
    check_address(verb.name, row, 16, 16, SHARED);
    LdmatrixArgs args = {row, r};
    warp_sync(&verb, ~0u, &args);
}
inline void land(const Copy &c) {
    memcpy(c.dst, c.src, c.valid);
    memset((char *)c.dst + c.valid, 0, c.size - c.valid);
}

// cp.async [dst], [src], size, valid: bytes from `valid` on are zero. The destination is poison until the wait that makes it
// visible; with EMU_SEED some copies land at once and some destinations keep their old contents until then.
EMU_INLINE void cp_async(void *dst, const void *src, int size, int valid) {
    check_address("cp.async destination", dst, size, size, SHARED);
    if (valid < 0 || valid > size) fail(cudaErrorLaunchFailure, "cp.async: %d valid bytes of %d", valid, size);
    if (valid) check_address("cp.async source", src, valid, size, GLOBAL);
    const Copy c = {dst, src, valid, size};
    const int early = settings.seed ? (int)(me->worker->random() % 4) : 1;
    if (early == 0) return land(c);
    if (early < 3) memset(dst, POISON, size);
    me->copies.push_back(c);
}
}  // namespace emu

// aligned to 128 bytes
EMU_INLINE void forget_origin(uint32_t &) {}
template <typename T = unsigned char> EMU_INLINE T *shared_memory() { return (T *)emu::me->worker->smem; }

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d += a * b
EMU_INLINE void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    static constexpr emu::Verb verb = {"mma.m16n8k16", emu::mma_complete};
    emu::MmaArgs args = {d, a, b};
    emu::warp_sync(&verb, ~0u, &args);
}
// ldmatrix.sync.aligned.m8n8.x4{.trans}.shared.b16
EMU_INLINE void ldmatrix_x4(uint32_t r[4], const void *row) { emu::ldmatrix<false>(r, row); }
EMU_INLINE void ldmatrix_x4_trans(uint32_t r[4], const void *row) { emu::ldmatrix<true>(r, row); }

// cp.async.cg, cp.async.ca
EMU_INLINE void cp_async_16(void *dst, const void *src, int valid = 16) { emu::cp_async(dst, src, 16, valid); }
EMU_INLINE void cp_async_4(void *dst, const void *src, int valid = 4) { emu::cp_async(dst, src, 4, valid); }
inline void cp_async_commit() { emu::me->groups.push_back(emu::me->copies.size()); }   // cp.async.commit_group
template <int n> inline void cp_async_wait() {               // cp.async.wait_group n: at most n groups stay in flight
    emu::Thread *t = emu::me;
    if (t->groups.size() <= n) return;
    const size_t done = t->groups.size() - n, copies = t->groups[done - 1];
    for (size_t i = 0; i < copies; i++) emu::land(t->copies[i]);
    t->copies.erase(t->copies.begin(), t->copies.begin() + copies);
    t->groups.erase(t->groups.begin(), t->groups.begin() + done);
    for (size_t &g : t->groups) g -= copies;
    t->worker->yield();
}
// bar.sync id, threads; bar.arrive id, threads: named barriers 1..15 for a multiple of 32 threads
EMU_INLINE void barrier_sync(int id, int threads) {
    emu::barrier(id, threads, 0, 0, true, "bar.sync");
    asm volatile("");
}
EMU_INLINE void barrier_arrive(int id, int threads) {
    emu::barrier(id, threads, 0, 0, false, "bar.arrive");
    asm volatile("");
}

inline float exp2_approx(float x) {                           // ex2.approx.ftz.f32
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;                    // results below the normal range flush to zero
}
EMU_INLINE uint4 load_16B(const void *p) {
    emu::check_address("16-byte load", p, 16, 16, emu::ANYWHERE);
    emu::me->worker->yield();
    return *(const uint4 *)p;
}
EMU_INLINE void store_16B(void *p, uint4 v) {
    emu::check_address("16-byte store", p, 16, 16, emu::ANYWHERE);
    emu::me->worker->yield();
    *(uint4 *)p = v;
}
