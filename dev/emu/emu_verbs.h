// emu_verbs.h: the hardware verbs of train_litespark.cu's section 3, in C++. Semantics are those of the PTX instruction
// named at each verb. A warp-wide verb is a struct of the lanes' arguments and one function that the last lane to arrive
// runs for all.
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
// stmatrix: ldmatrix backwards
inline void ordinary_store(Thread *t, const void *p);
inline void stmatrix_complete(void **args, uint32_t) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 8; j++) {
            char *row = (char *)((const LdmatrixArgs *)args[8 * i + j])->row;
            for (int t = 0; t < 4; t++) memcpy(row + 4 * t, &((const LdmatrixArgs *)args[4 * j + t])->r[i], 4);
            ordinary_store(&me->worker->threads[me->warp * 32 + 8 * i + j], row);
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

// ---- sm_90a: mbarriers, TMA, wgmma --------------------------------------------------------------------------------------
inline int has_wgmma() { return emu::settings.cc == 90; }
#define __grid_constant__
// aligned to 1024 bytes, as is the end of shared memory: give it a multiple of 1024
template <typename T> EMU_INLINE T *swizzled_shared_memory() {
    emu::check_address("swizzled_shared_memory", emu::me->worker->smem, 1, 1024, emu::SHARED);
    return (T *)emu::me->worker->smem;
}
using emu::TensorMap;
inline TensorMap tensor_map(const void *base, const uint64_t (&dim)[4], const uint64_t (&stride)[3],
                            const uint32_t (&box)[4]) {
    TensorMap map = {(const char *)base, {}, {2, stride[0], stride[1], stride[2]}, {}};
    bool ok = (uintptr_t)base % 16 == 0 && box[0] == 64;
    for (int i = 0; i < 4; i++) {
        map.dim[i] = dim[i], map.box[i] = box[i];
        ok = ok && dim[i] > 0 && dim[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256;
        ok = ok && (i == 0 || (map.stride[i] % 16 == 0 && map.stride[i] < 1ull << 40));
    }
    if (!ok) {
        emu::host_error(cudaErrorInvalidValue, "tensor_map: base and strides are multiples of 16 bytes, boxes 64,1..256,...");
        exit(EXIT_FAILURE);
    }
    return map;
}

namespace emu {
inline void *swizzled(const void *p) { return (void *)((uintptr_t)p ^ ((uintptr_t)p >> 7 & 7) << 4); }   // bits 4-6 ^= 7-9
EMU_NOINLINE inline Mbarrier &mbarrier(const char *name, uint64_t *barrier) {
    check_address(name, barrier, 8, 8, SHARED);
    me->where = __builtin_return_address(0);
    const auto it = me->worker->mbarriers.find(barrier);
    if (it == me->worker->mbarriers.end()) fail(cudaErrorLaunchFailure, "%s: this mbarrier was never initialised", name);
    return it->second;
}
inline Thread *mbarrier_step(Mbarrier &m) {                   // does the phase end? Then one of those who waited for it
    if (m.arrived < m.expected || m.bytes) return nullptr;
    Thread *one = nullptr;
    m.phase ^= 1;
    m.arrived = 0;
    for (int w = 0; w < MAX_WARPS; w++) {
        if (m.waiting[w]) one = &me->worker->threads[w * 32 + __builtin_ctz(m.waiting[w])];
        me->worker->wake(w, m.waiting[w]), m.waiting[w] = 0;
    }
    return one;
}
EMU_NOINLINE inline void mbarrier_arrive(const char *name, uint64_t *barrier, int bytes) {
    Mbarrier &m = mbarrier(name, barrier);
    me->where = __builtin_return_address(0);
    if (bytes < 0 || bytes >= 1 << 20) fail(cudaErrorLaunchFailure, "%s: %d bytes", name, bytes);
    if (m.arrived == m.expected) fail(cudaErrorLaunchFailure, "%s: all %d arrivals of this phase are there", name, m.expected);
    m.bytes += bytes;
    m.arrived++;
    Thread *one = mbarrier_step(m);                           // often runs at once: did the arrival come too early?
    if (one && settings.seed && me->worker->random() % 2) me->worker->hand_over(one);
    else me->worker->yield();
}
// A block has at first what an SM's 65,536 registers leave each of its threads; more than that waits for what others give.
EMU_NOINLINE inline void set_registers(const char *name, int n) {
    Thread *t = me;
    Worker *w = t->worker;
    while (w->spare_registers < n - t->registers) {
        w->registers_waiting[t->warp] |= 1u << t->lane;
        w->sleep(name, __builtin_return_address(0));
    }
    w->spare_registers -= n - t->registers;
    t->registers = n;
    for (int i = 0; i < MAX_WARPS; i++) w->wake(i, w->registers_waiting[i]), w->registers_waiting[i] = 0;
    w->yield();
}
// The proxies. What stmatrix and store_16B write to shared memory is marked with the thread that wrote it, until that thread
// calls async_proxy_fence or an asynchronous copy overwrites it. wgmma and bulk copies may read unmarked bytes only.
inline uint16_t *marks(const void *p) { return me->worker->unfenced + ((const char *)p - me->worker->smem) / 16; }
inline void ordinary_store(Thread *t, const void *p) {
    const Worker *w = t->worker;
    const uint16_t mark = (uint16_t)(t - w->threads + 1);
    if (!in_range(p, 16, w->smem, w->smem_bytes) || *marks(p) == mark) return;
    *marks(p) = mark;
    t->unfenced.push_back((uint32_t)(marks(p) - w->unfenced));
}
EMU_NOINLINE inline void check_proxy(const char *name, const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 16)
        if (const int mark = *marks((const char *)p + i))
            fail(cudaErrorLaunchFailure, "%s reads what thread %d wrote by ordinary stores, without async_proxy_fence since",
                 name, mark - 1);
}
inline void tensor_land(const TensorCopy &c) {                // one box; zeros outside the tensor
    const TensorMap &map = c.map;
    char *dst = c.dst;
    memset(marks(dst), 0, c.bytes / 16 * sizeof *marks(dst));
    if (c.flat) {
        memcpy(dst, c.flat, c.bytes);
        Mbarrier &m = me->worker->mbarriers[c.barrier];
        m.bytes -= c.bytes;
        mbarrier_step(m);
        return;
    }
    for (uint32_t z = 0; z < map.box[3]; z++)
        for (uint32_t y = 0; y < map.box[2]; y++)
            for (uint32_t x = 0; x < map.box[1]; x++, dst += 128) {
                const int64_t at[4] = {c.corner[0], c.corner[1] + x, c.corner[2] + y, c.corner[3] + z};
                bool inside = true;
                const char *src = map.base + at[0] * 2;
                for (int i = 1; i < 4; i++) {
                    inside = inside && at[i] >= 0 && (uint64_t)at[i] < map.dim[i];
                    src += at[i] * (int64_t)map.stride[i];
                }
                for (int e = 0; e < 64; e++) {
                    const bool in = inside && at[0] + e >= 0 && (uint64_t)(at[0] + e) < map.dim[0];
                    if (in) memcpy(swizzled(dst + 2 * e), src + 2 * e, 2);
                    else memset(swizzled(dst + 2 * e), 0, 2);
                }
            }
    Mbarrier &m = me->worker->mbarriers[c.barrier];
    m.bytes -= dst - c.dst;
    mbarrier_step(m);
}
// Whatever was to land with this barrier lands now.
inline void tensor_land_all(uint64_t *barrier) {
    std::vector<TensorCopy> &copies = me->worker->tensor_copies;
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].barrier != barrier) { i++; continue; }
        const TensorCopy c = copies[i];
        copies.erase(copies.begin() + i);
        tensor_land(c);
    }
}
EMU_NOINLINE inline void mbarrier_wait(uint64_t *barrier, int parity) {
    Mbarrier &m = mbarrier("mbarrier.try_wait", barrier);
    Thread *t = me;
    const void *where = __builtin_return_address(0);
    while (m.phase == parity) {
        tensor_land_all(barrier);
        if (m.phase != parity) break;
        m.waiting[t->warp] |= 1u << t->lane;
        t->worker->sleep("mbarrier.try_wait", where);
    }
    t->worker->yield();
}
// The destination is poison until the wait that makes it visible; with EMU_SEED some boxes land at once and some
// destinations keep their old contents until then.
inline void start_load(const TensorCopy &c, Mbarrier &m) {
    Worker *w = me->worker;
    const int early = settings.seed ? (int)(w->random() % 4) : 1;
    if (early == 0) return tensor_land(c);
    if (early < 3) memset(c.dst, POISON, c.bytes);
    w->tensor_copies.push_back(c);
    for (int i = 0; i < MAX_WARPS; i++) w->wake(i, m.waiting[i]), m.waiting[i] = 0;     // who waits lets it land
    w->yield();
}
inline void check_bulk(const char *name, const void *shared, const void *global, int bytes) {
    if (bytes <= 0 || bytes % 16) fail(cudaErrorLaunchFailure, "%s: %d bytes", name, bytes);
    check_address(name, shared, bytes, 16, SHARED);
    check_address(name, global, bytes, 16, GLOBAL);
}
EMU_NOINLINE inline void tensor_load(void *dst, const TensorMap *map, uint64_t *barrier, int x0, int x1, int x2,
                                     int x3) {
    Worker *w = me->worker;
    const size_t bytes = (size_t)128 * map->box[1] * map->box[2] * map->box[3];
    check_address("TMA destination", dst, bytes, 128, SHARED);
    uint64_t last = 2 * map->dim[0];
    for (int i = 1; i < 4; i++) last += (map->dim[i] - 1) * map->stride[i];
    check_address("TMA source", map->base, last, 16, GLOBAL);
    Mbarrier &m = mbarrier("TMA barrier", barrier);
    me->where = __builtin_return_address(0);
    if (!w->mbarriers_fenced) fail(cudaErrorLaunchFailure, "TMA: no fence after the initialisation of an mbarrier");
    start_load({(char *)dst, *map, {x0, x1, x2, x3}, barrier, nullptr, bytes}, m);
}
EMU_NOINLINE inline void bulk_load(void *dst, const void *src, int bytes, uint64_t *barrier) {
    check_bulk("bulk copy", dst, src, bytes);
    Mbarrier &m = mbarrier("barrier of a bulk copy", barrier);
    me->where = __builtin_return_address(0);
    if (!me->worker->mbarriers_fenced)
        fail(cudaErrorLaunchFailure, "bulk copy: no fence after the initialisation of an mbarrier");
    start_load({(char *)dst, {}, {}, barrier, (const char *)src, (size_t)bytes}, m);
}

// To global memory: the source is read at bulk_wait_read, the result written at bulk_wait; with EMU_SEED one or both at once,
// or when all others wait.
inline void bulk_read(BulkCopy &c) { if (c.data.empty()) c.data.assign(c.src, c.src + c.bytes); }
inline void bulk_land(BulkCopy &c) {
    bulk_read(c);
    if (!c.add) memcpy(c.dst, c.data.data(), c.bytes);
    for (size_t i = 0; i < c.bytes && c.add; i += 4) {
        uint32_t *word = (uint32_t *)(c.dst + i), old = __atomic_load_n(word, __ATOMIC_RELAXED), sum;
        float x;
        memcpy(&x, &c.data[i], 4);
        do sum = __float_as_uint(__uint_as_float(old) + x);
        while (!__atomic_compare_exchange_n(word, &old, sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }
}
EMU_NOINLINE inline void bulk_out(const char *name, void *dst, const void *src, int bytes, bool add) {
    check_bulk(name, src, dst, bytes);
    check_proxy(name, src, bytes);
    BulkCopy c = {(char *)dst, (const char *)src, (size_t)bytes, add, {}};
    const int early = settings.seed ? (int)(me->worker->random() % 4) : 3;
    if (early < 2) bulk_read(c);
    if (early == 0) bulk_land(c);
    else me->bulk.push_back(c);
    me->worker->yield();
}
EMU_NOINLINE inline void bulk_wait(int n, bool read) {        // at most n groups stay in flight
    Thread *t = me;
    t->worker->linger();
    const size_t groups = t->bulk_groups.size(), done = groups > (size_t)n ? groups - n : 0;
    const size_t copies = done ? t->bulk_groups[done - 1] : 0;
    for (size_t i = 0; i < copies; i++) read ? bulk_read(t->bulk[i]) : bulk_land(t->bulk[i]);
    if (!read) {
        t->bulk.erase(t->bulk.begin(), t->bulk.begin() + copies);
        t->bulk_groups.erase(t->bulk_groups.begin(), t->bulk_groups.begin() + done);
        for (size_t &g : t->bulk_groups) g -= copies;
    }
    t->worker->yield();
}

// A turn is waited for by spinning: it comes from a block on another OS thread. When all of these spin and none has seen its
// turn since the last pass, nobody will pass one.
EMU_NOINLINE inline void turn_wait(const int *counter, int turn) {
    check_address("turn_wait", counter, 4, 4, GLOBAL);
    Launch *l = me->worker->launch;
    me->where = __builtin_return_address(0);
    for (uint64_t seen = ~0ull; !l->failed; sched_yield()) {
        const uint64_t passed = l->passed;
        if (__atomic_load_n(counter, __ATOMIC_ACQUIRE) == turn) return me->worker->yield();
        std::lock_guard<std::mutex> guard(l->turns);
        if (passed != l->passed) continue;
        if (passed != seen) seen = passed, l->stuck++;
        if (l->stuck >= l->workers) break;
    }
    fail(cudaErrorLaunchFailure, "turn_wait: no running block can pass turn %d on, the counter is %d", turn, *counter);
}
EMU_NOINLINE inline void turn_pass(int *counter, int turn) {
    check_address("turn_pass", counter, 4, 4, GLOBAL);
    Launch *l = me->worker->launch;
    me->where = __builtin_return_address(0);
    if (!me->bulk.empty()) fail(cudaErrorLaunchFailure, "turn_pass: a bulk copy of this thread is still in flight");
    if (__atomic_load_n(counter, __ATOMIC_RELAXED) != turn - 1)
        fail(cudaErrorLaunchFailure, "turn_pass to %d, but the counter is %d", turn, *counter);
    {
        std::lock_guard<std::mutex> guard(l->turns);
        __atomic_store_n(counter, turn, __ATOMIC_RELEASE);
        l->passed++;
        l->stuck = 0;
    }
    me->worker->yield();
}

// The registers of a wgmma are arrays on the thread's stack; what they were at the fence is what they must be at the wgmma.
EMU_NOINLINE inline void wgmma_fence() {
    Thread *t = me;
    t->fenced = true;
    t->fence_from = (const char *)__builtin_frame_address(0);
    if (!EMU_ASAN) t->fence_stack.assign(t->fence_from, (const char *)t->stack + settings.stack);
}
inline bool written_since_fence(const void *p, size_t n) {
    const size_t at = (size_t)((const char *)p - me->fence_from), have = me->fence_stack.size();
    return at < have && at + n <= have && memcmp(&me->fence_stack[at], p, n);
}

// wgmma: a thread's sums are poison from the call to the wait. There the warpgroup meets, and then each warp
// computes its rows, with shared memory as it is when the warp goes on.
EMU_NOINLINE inline void wgmma(const char *name, float *sum, int columns, bool add, const uint32_t *a_registers, uint64_t a,
                               uint64_t b, bool by_columns = false, bool left_by_columns = false) {
    Thread *t = me;
    t->where = __builtin_return_address(0);
    bool chained = false;
    for (const Wgmma &p : t->products) chained = chained || p.sum == sum;
    if (!chained && !t->fenced) fail(cudaErrorLaunchFailure, "%s without a wgmma.fence since its registers were written", name);
    if ((!chained && written_since_fence(sum, columns / 2 * sizeof *sum)) ||
        (a_registers && written_since_fence(a_registers, 4 * sizeof *a_registers)))
        fail(cudaErrorLaunchFailure, "%s: its registers were written after the wgmma.fence", name);
    Wgmma p = {name, sum, columns, add, a_registers, !a_registers && !by_columns, left_by_columns, a, b, {}, !chained, {}};
    if (a_registers) memcpy(p.a_registers, a_registers, sizeof p.a_registers);
    if (!chained) memcpy(p.start, sum, columns / 2 * sizeof *sum);
    memset(sum, POISON, columns / 2 * sizeof *sum);
    t->products.push_back(p);
    t->worker->yield();
}
// Element (row, k) of an operand whose rows are k's, and (k, column) of one whose columns are: 128-byte swizzled rows, atoms
// of 8 rows 1024 bytes apart, panels of 64 columns `panel` bytes apart.
inline float wgmma_element(uint64_t operand, int row, int column) {
    const Worker *w = me->worker;
    const size_t at = (operand & 0x3FFF) << 4, panel = (operand >> 16 & 0x3FFF) << 4, atom = (operand >> 32 & 0x3FFF) << 4;
    const size_t byte = at + (size_t)row / 8 * atom + row % 8 * 128 + (size_t)column / 64 * panel + column % 64 * 2;
    if (byte + 2 > w->smem_bytes)
        fail(cudaErrorIllegalAddress, "wgmma: operand at byte %zu of %zu of shared memory", byte, w->smem_bytes);
    uint16_t bits;
    const char *p = (const char *)swizzled(w->smem + byte);
    if (*marks(p)) check_proxy("wgmma", p, 2);
    memcpy(&bits, p, 2);
    return bf16_low(bits);
}
inline void wgmma_complete(Thread *first, size_t index) {     // product `index` of a warp's 32 threads: its 16 rows
    static thread_local float A[16][16], B[16][256];
    const Wgmma &x = first->products[index];
    for (int i = 0, row = first->warp % 4 * 16; i < 16 && !x.left; i++)
        for (int k = 0; k < 16; k++)
            A[i][k] = x.left_by_columns ? wgmma_element(x.a, k, row + i) : wgmma_element(x.a, row + i, k);
    for (int lane = 0; lane < 32 && x.left; lane++) {
        const Wgmma &p = first[lane].products[index];
        const int g = lane / 4, k = lane % 4 * 2;
        if (memcmp(p.a_registers, p.left, sizeof p.a_registers))
            fail(cudaErrorLaunchFailure, "wgmma.wait_group: registers of an operand were overwritten before it");
        for (int i = 0; i < 4; i++) {
            A[g + i % 2 * 8][k + i / 2 * 8] = bf16_low(p.a_registers[i]);
            A[g + i % 2 * 8][k + i / 2 * 8 + 1] = bf16_high(p.a_registers[i]);
        }
    }
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < x.columns; n++) B[k][n] = x.by_rows ? wgmma_element(x.b, n, k) : wgmma_element(x.b, k, n);
    for (int lane = 0; lane < 32; lane++) {
        Wgmma &p = first[lane].products[index];
        if (p.first) memcpy(p.sum, p.start, p.columns / 2 * sizeof *p.sum);
        const int g = lane / 4, t = lane % 4 * 2;
        for (int e = 0; e < p.columns / 2; e++) {             // e = 4j + 2i + c: row g + 8i, column 8j + t + c
            const float *a = A[g + e / 2 % 2 * 8];
            const int n = e / 4 * 8 + t + e % 2;
            float s = p.add ? p.sum[e] : 0;
            for (int k = 0; k < 16; k++) s += a[k] * B[k][n];
            p.sum[e] = s;
        }
    }
}
// What the warpgroup has waited for is over for a warp when its first thread goes on, for the others perhaps later.
inline void wgmma_go_on(Worker *w, int warp) {
    const size_t done = w->groups_over[warp];
    if (!done) return;
    w->groups_over[warp] = 0;
    Thread *first = &w->threads[warp * 32];
    const size_t products = first->product_groups[done - 1];
    for (size_t i = 0; i < products; i++) wgmma_complete(first, i);
    for (int i = 0; i < 32; i++) {
        Thread &o = first[i];
        o.products.erase(o.products.begin(), o.products.begin() + products);
        o.product_groups.erase(o.product_groups.begin(), o.product_groups.begin() + done);
        for (size_t &g : o.product_groups) g -= products;
        for (size_t j = 0; products && j < o.products.size(); j++) {        // the same sums, still added to
            Wgmma &p = o.products[j];
            bool oldest = !p.first;
            for (size_t k = 0; k < j; k++) oldest = oldest && o.products[k].sum != p.sum;
            if (!oldest) continue;
            p.first = true;
            memcpy(p.start, p.sum, p.columns / 2 * sizeof *p.sum);
            memset(p.sum, POISON, p.columns / 2 * sizeof *p.sum);
        }
    }
}
EMU_NOINLINE inline void wgmma_wait(int n) {                  // at most n groups stay in flight
    Thread *t = me;
    Worker *w = t->worker;
    Barrier &b = w->warpgroups[t->warp / 4];
    t->where = __builtin_return_address(0);
    if (t->warp / 4 * 128 + 128 > w->n_threads) fail(cudaErrorLaunchFailure, "wgmma.wait_group: a warpgroup has 128 threads");
    if (b.arrived && b.expected != n)
        fail(cudaErrorLaunchFailure, "wgmma.wait_group %d, others wait there for %d", n, b.expected);
    b.expected = n;
    t->fenced = false;
    if (++b.arrived < 128) {
        b.waiting[t->warp] |= 1u << t->lane;
        w->sleep("wgmma.wait_group", t->where);
        return wgmma_go_on(w, t->warp);
    }
    Thread *first = &w->threads[t->warp / 4 * 128];
    for (int i = 0; i < 128; i++) {
        if (first[i].products.size() != t->products.size() || first[i].product_groups != t->product_groups)
            fail(cudaErrorLaunchFailure, "the threads of a warpgroup issued different numbers of wgmma");
        for (size_t j = 0; j < t->products.size(); j++) {
            const Wgmma &p = first[i].products[j], &x = t->products[j];
            if (p.name != x.name || p.a != x.a || p.b != x.b || p.add != x.add)
                fail(cudaErrorLaunchFailure, "the threads of a warpgroup issued different wgmma, or with different operands");
        }
    }
    const size_t groups = t->product_groups.size(), done = groups > (size_t)n ? groups - n : 0;
    for (int i = 0; i < 4; i++) w->groups_over[t->warp / 4 * 4 + i] = done;
    b.arrived = 0;
    for (int i = 0; i < MAX_WARPS; i++) w->wake(i, b.waiting[i]), b.waiting[i] = 0;
    w->yield();
    wgmma_go_on(w, t->warp);
}
}  // namespace emu

// mbarrier.init, fence.mbarrier_init, mbarrier.arrive, mbarrier.arrive.expect_tx, mbarrier.try_wait.parity in a loop
EMU_INLINE void mbarrier_init(uint64_t *barrier, int arrivals) {
    emu::check_address("mbarrier.init", barrier, 8, 8, emu::SHARED);
    emu::me->worker->mbarriers[barrier] = emu::Mbarrier{arrivals, 0, 0, 0, {}};
    emu::me->worker->mbarriers_fenced = false;
}
EMU_INLINE void mbarrier_init_fence() { emu::me->worker->mbarriers_fenced = true; }
EMU_INLINE void mbarrier_arrive(uint64_t *barrier) {
    emu::mbarrier_arrive("mbarrier.arrive", barrier, 0);
    asm volatile("");
}
EMU_INLINE void mbarrier_expect(uint64_t *barrier, int bytes) {
    emu::mbarrier_arrive("mbarrier.arrive.expect_tx", barrier, bytes);
    asm volatile("");
}
EMU_INLINE void mbarrier_wait(uint64_t *barrier, int parity) {
    emu::mbarrier_wait(barrier, parity);
    asm volatile("");
}
// cp.async.bulk.tensor.4d
EMU_INLINE void tma_load(void *dst, const TensorMap *map, uint64_t *barrier, int x0, int x1, int x2, int x3) {
    emu::tensor_load(dst, map, barrier, x0, x1, x2, x3);
    asm volatile("");
}
// fence.proxy.async; stmatrix.sync.aligned.m8n8.x4.shared.b16
inline void async_proxy_fence() {
    emu::Thread *t = emu::me;
    for (uint32_t unit : t->unfenced) {
        uint16_t &mark = t->worker->unfenced[unit];
        if (mark == t - t->worker->threads + 1) mark = 0;
    }
    t->unfenced.clear();
}
EMU_INLINE void stmatrix_x4(void *row, const uint32_t (&r)[4]) {
    static constexpr emu::Verb verb = {"stmatrix", emu::stmatrix_complete};
    emu::check_address(verb.name, row, 16, 16, emu::SHARED);
    emu::LdmatrixArgs args = {row, (uint32_t *)r};
    emu::warp_sync(&verb, ~0u, &args);
}
// cp.async.bulk to shared memory, from shared memory, cp.reduce.async.bulk.add.f32, .commit_group, .wait_group{.read}
EMU_INLINE void bulk_load(void *dst, const void *src, int bytes, uint64_t *barrier) {
    emu::bulk_load(dst, src, bytes, barrier);
    asm volatile("");
}
EMU_INLINE void bulk_store(void *dst, const void *src, int bytes) {
    emu::bulk_out("bulk_store", dst, src, bytes, false);
    asm volatile("");
}
EMU_INLINE void bulk_add(float *dst, const void *src, int bytes) {
    emu::bulk_out("bulk_add", dst, src, bytes, true);
    asm volatile("");
}
EMU_INLINE void bulk_commit() { emu::me->bulk_groups.push_back(emu::me->bulk.size()); }
template <int n> EMU_INLINE void bulk_wait_read() {
    emu::bulk_wait(n, true);
    asm volatile("");
}
template <int n> EMU_INLINE void bulk_wait() {
    emu::bulk_wait(n, false);
    asm volatile("");
}
// ld.acquire.gpu in a loop; st.release.gpu
EMU_INLINE void turn_wait(const int *counter, int turn) {
    emu::turn_wait(counter, turn);
    asm volatile("");
}
EMU_INLINE void turn_pass(int *counter, int turn) {
    emu::turn_pass(counter, turn);
    asm volatile("");
}
template <int n> EMU_INLINE void registers_give() {          // setmaxnreg.dec
    static_assert(n >= 24 && n <= 256 && n % 8 == 0);
    emu::set_registers("setmaxnreg.dec", n);
}
template <int n> EMU_INLINE void registers_take() {          // setmaxnreg.inc
    static_assert(n >= 24 && n <= 256 && n % 8 == 0);
    emu::set_registers("setmaxnreg.inc", n);
}

// wgmma.fence, .mma_async, .commit_group, .wait_group; shapes m64n64k16, m64n128k16, with a and b by rows, and, these
// two and m64n96k16, m64n104k16, with a in registers and b by columns
EMU_INLINE uint64_t wgmma_operand(const void *corner, int panel_bytes) {
    const uint64_t at = (const char *)corner - emu::me->worker->smem;
    return at >> 4 | (uint64_t)panel_bytes >> 4 << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}
EMU_INLINE void wgmma_fence() {
    emu::wgmma_fence();
    asm volatile("" ::: "memory");
}
EMU_INLINE void wgmma_commit() { emu::me->product_groups.push_back(emu::me->products.size()); }
template <int n, int NT> EMU_INLINE void wgmma_wait(float (&)[1][NT][4]) {
    emu::wgmma_wait(n);
    asm volatile("");
}
template <int n, int NT, int STEPS> EMU_INLINE void wgmma_wait(float (&sum)[1][NT][4], const uint32_t (&)[STEPS][4]) {
    wgmma_wait<n>(sum);
}
template <int NT> EMU_INLINE void wgmma_rows(float (&sum)[1][NT][4], uint64_t a, uint64_t b, int add) {
    emu::wgmma("wgmma by rows", sum[0][0], NT * 8, add, nullptr, a, b);
    asm volatile("");
}
template <int NT> EMU_INLINE void wgmma_columns(float (&sum)[1][NT][4], const uint32_t (&a)[4], uint64_t b) {
    emu::wgmma("wgmma by columns", sum[0][0], NT * 8, true, a, 0, b);
    asm volatile("");
}
// m64n192k16, a in shared memory by rows; b by rows, b by columns
EMU_INLINE void wgmma_rows(float (&sum)[1][24][4], uint64_t a, uint64_t b) {
    emu::wgmma("wgmma by rows", sum[0][0], 192, true, nullptr, a, b);
    asm volatile("");
}
EMU_INLINE void wgmma_columns(float (&sum)[1][24][4], uint64_t a, uint64_t b) {
    emu::wgmma("wgmma by columns", sum[0][0], 192, true, nullptr, a, b, true);
    asm volatile("");
}
// m64n64k16, both in shared memory by columns
EMU_INLINE void wgmma_transposed(float (&sum)[1][8][4], uint64_t a, uint64_t b, int add) {
    emu::wgmma("wgmma by columns", sum[0][0], 64, add, nullptr, a, b, true, true);
    asm volatile("");
}
template <int n> EMU_INLINE void wgmma_wait() {
    emu::wgmma_wait(n);
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
    emu::ordinary_store(emu::me, p);
}
