// emu.h: the engine of "CUDA on the CPU". Included by our cuda_runtime.h; nothing here is CUDA's own interface.
//
// A block runs on one OS thread; its CUDA threads are fibers that switch only at barriers and warp operations, so every
// other instruction sequence is atomic and a missing barrier shows as an order of execution no device would forbid.
// Blocks are spread over OS threads (OpenMP). EMU_SEED shuffles the order of blocks, warps and lanes at every switch.
// Contents: settings, symbols, errors, device memory, fibers, one block, reports, barriers and warp operations, address
// checks, launch.
#pragma once
#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_threads() { return 1; }
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define EMU_ASAN 0
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
inline void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
inline void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
#endif
#define EMU_NOINLINE __attribute__((noinline))

extern "C" void emu_switch(void **save_sp, void *load_sp);   // in assembly below

namespace emu {

// ---- settings (environment) ---------------------------------------------------------------------------------------
inline size_t setting(const char *name, size_t fallback) {    // "8G", "512M", "64K" or a number
    const char *s = getenv(name);
    if (!s || !*s) return fallback;
    char *end;
    const double v = strtod(s, &end);
    return (size_t)(v * (*end == 'G' ? 0x1p30 : *end == 'M' ? 0x1p20 : *end == 'K' ? 0x1p10 : 1));
}
struct Settings {
    uint64_t seed = setting("EMU_SEED", 0);                   // 0: natural order
    uint64_t async = setting("EMU_ASYNC", 0);                 // 0: streams run at once; else a seed for their interleaving
    int threads = (int)setting("EMU_THREADS", omp_get_max_threads() < 16 ? omp_get_max_threads() : 16);
    size_t memory = setting("EMU_MEM", (size_t)8 << 30);      // bytes of the virtual device
    int cc = getenv("EMU_CC") ? (int)(atof(getenv("EMU_CC")) * 10 + 0.5) : 80;
    int sms = (int)setting("EMU_SMS", 4);                     // streaming multiprocessors, for what goes by their number
    size_t bus = setting("EMU_BUS", 0);                       // PCI bus of device 0; the next have the next
    int mig = (int)setting("EMU_MIG", 0);                     // 1: the devices are parts of GPUs, by name
    int hostcheck = (int)setting("EMU_HOSTCHECK", 0);         // 1: host code that touches device memory faults
    unsigned timeout = (unsigned)setting("EMU_TIMEOUT", 0);   // seconds one launch may take; 0: no limit
    int poison = (int)setting("EMU_POISON", 1);               // 0: do not touch fresh memory (large runs)
    size_t stack = setting("EMU_STACK", (EMU_ASAN ? 256 : 128) << 10);   // bytes of stack per CUDA thread
};
inline Settings settings;
inline bool hangs(const char *what) {                         // EMU_HANG=stream, event or nccl: never ready
    const char *s = getenv("EMU_HANG");
    return s && !strcmp(s, what);
}

struct Thread;
inline thread_local Thread *me = nullptr;                     // the running CUDA thread; null in host code

// ---- symbols of this program: kernel names, and the static __shared__ variables to poison ---------------------------
// A static __shared__ variable is a function-local thread_local, i.e. a TLS symbol whose mangled name starts with _ZZ.
struct TlsRange { size_t offset, bytes; };
struct Symbols {
    std::map<uintptr_t, std::string> functions;             // by link address
    std::vector<TlsRange> shared;
    size_t tls_bytes = 0, tls_me = 0;                         // size of the program's TLS block, offset of emu::me in it
    uintptr_t bias = 0;                                       // load address minus link address
    Symbols() {
        int fd = open("/proc/self/exe", O_RDONLY);
        struct stat st;
        if (fd < 0 || fstat(fd, &st)) return;
        const char *p = (const char *)mmap(nullptr, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        close(fd);
        if (p == MAP_FAILED) return;
        const Elf64_Ehdr *h = (const Elf64_Ehdr *)p;
        const Elf64_Phdr *ph = (const Elf64_Phdr *)(p + h->e_phoff);
        for (int i = 0; i < h->e_phnum; i++) if (ph[i].p_type == PT_TLS) tls_bytes = ph[i].p_memsz;
        const Elf64_Shdr *sh = (const Elf64_Shdr *)(p + h->e_shoff);
        for (int i = 0; i < h->e_shnum; i++) if (sh[i].sh_type == SHT_SYMTAB) read(p, sh, sh[i]);
        munmap((void *)p, st.st_size);
    }
    void read(const char *p, const Elf64_Shdr *sections, const Elf64_Shdr &table) {
        const Elf64_Sym *sym = (const Elf64_Sym *)(p + table.sh_offset);
        for (size_t i = 0; i < table.sh_size / sizeof *sym; i++) {
            const char *name = p + sections[table.sh_link].sh_offset + sym[i].st_name;
            const int type = ELF64_ST_TYPE(sym[i].st_info);
            if (type == STT_FUNC) functions[sym[i].st_value] = name;
            if (type == STT_FUNC && !strcmp(name, "emu_switch")) bias = (uintptr_t)&emu_switch - sym[i].st_value;
            if (type == STT_TLS && !strcmp(name, "_ZN3emu2meE")) tls_me = sym[i].st_value;
            if (type == STT_TLS && !strncmp(name, "_ZZ", 3)) shared.push_back(TlsRange{sym[i].st_value, sym[i].st_size});
        }
    }
    char *tls_base() const { return (char *)&me - tls_me; }  // of the calling OS thread
};
inline Symbols &symbols() { static Symbols s; return s; }

inline std::string function_name(const void *f) {            // demangled, without the parameter list
    const auto it = symbols().functions.find((uintptr_t)f - symbols().bias);
    if (it == symbols().functions.end()) return "kernel";
    int status;
    char *text = abi::__cxa_demangle(it->second.c_str(), nullptr, nullptr, &status);
    std::string s = text ? text : it->second;
    free(text);
    for (size_t i = s.size(), depth = 0; i-- > 0;) {          // cut at the parenthesis that matches the last one
        if (s[i] == ')') depth++;
        if (s[i] == '(' && --depth == 0) { s.resize(i); break; }
    }
    if (!s.compare(0, 5, "void ")) s.erase(0, 5);
    return s;
}

// Source lines of a return address through addr2line (binutils), frames inside dev/emu left out.
inline std::string source_line(const void *where) {
    char command[128], line[512];
    snprintf(command, sizeof command, "addr2line -Cips -e /proc/%d/exe %#lx 2>/dev/null", (int)getpid(),
        (unsigned long)((uintptr_t)where - 1 - symbols().bias));
    std::string out, inner;                                   // inner: a frame of dev/emu, shown when there is no other
    FILE *f = popen(command, "r");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        if (inner.empty() && !strstr(line, "??")) inner = line;
        if (strstr(line, "emu.h:") || strstr(line, "emu_verbs.h:") || strstr(line, "cuda_runtime.h:") || strstr(line, "??"))
            continue;
        const char *text = strstr(line, "(inlined by) ");
        out += (out.empty() ? "" : " < ") + std::string(text ? text + 13 : line);
    }
    if (f) pclose(f);
    snprintf(line, sizeof line, "%p", where);
    return !out.empty() ? out : !inner.empty() ? inner : line;
}

// ---- errors ---------------------------------------------------------------------------------------------------------
inline std::atomic<int> sticky{0};                            // first device-side error; only cudaDeviceReset clears it
inline thread_local int last_error = 0;
inline std::mutex report_lock;
struct ExitStatus {
    ~ExitStatus() {
        if (!sticky) return;
        fprintf(stderr, "emu: exit with a device error\n");
        fflush(nullptr);
        _exit(86);
    }
};
inline ExitStatus exit_status;

// EMU_REPORT=file: what a run took of the device and sent to other ranks, as JSON; rank N > 0 writes file.rankN.
inline std::vector<size_t> &allocated = *new std::vector<size_t>;    // bytes of each cudaMalloc
struct Traffic { uint64_t calls, bytes, ring_bytes_sent; };
inline size_t memory_used = 0, memory_peak = 0;               // bytes of device memory, as cudaMalloc was asked for
inline std::map<std::string, Traffic> &traffic = *new std::map<std::string, Traffic>;   // by call, type and ranks: nccl.h
struct Report {
    ~Report() {
        const char *path = getenv("EMU_REPORT"), *rank = getenv("OMPI_COMM_WORLD_RANK");
        if (!path || !*path) return;
        const bool first = !rank || !strcmp(rank, "0");
        FILE *f = fopen((std::string(path) + (first ? "" : std::string(".rank") + rank)).c_str(), "w");
        if (!f) { fprintf(stderr, "emu: cannot write EMU_REPORT=%s\n", path); return; }
        fprintf(f, "{\"rank\": %s, \"memory_peak\": %zu, \"allocations\": [", rank ? rank : "0", memory_peak);
        for (size_t i = 0; i < allocated.size(); i++) fprintf(f, "%s%zu", i ? ", " : "", allocated[i]);
        fprintf(f, "], \"calls\": [");
        const char *separator = "\n";
        for (const auto &it : traffic) {
            fprintf(f, "%s  {%s, \"calls\": %llu, \"bytes\": %llu, \"ring_bytes_sent\": %llu}", separator, it.first.c_str(),
                    (unsigned long long)it.second.calls, (unsigned long long)it.second.bytes,
                    (unsigned long long)it.second.ring_bytes_sent);
            separator = ",\n";
        }
        fprintf(f, "\n]}\n");
        fclose(f);
    }
};
inline Report report_at_exit;

// What a successful call returns.
inline cudaError_t done() { return (cudaError_t)(sticky ? (int)(last_error = sticky) : 0); }

// Host-side misuse: one line, and the CUDA error code.
EMU_NOINLINE inline cudaError_t host_error(cudaError_t code, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    std::lock_guard<std::mutex> guard(report_lock);
    fprintf(stderr, "emu: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    last_error = code;
    return code;
}
[[noreturn]] inline void fail(cudaError_t code, const char *fmt, ...);   // the same from inside a kernel

// Text of a report; an abandoned fiber cannot free it.
inline std::deque<std::string> &kept = *new std::deque<std::string>;
inline const char *keep(const std::string &text) {
    std::lock_guard<std::mutex> guard(report_lock);
    return kept.emplace_back(text).c_str();
}

// ---- device memory: page mapping with guard pages, 0xFF at first, never reused after cudaFree --------------------------
struct Allocation {
    char *base; size_t bytes; char *pages; size_t page_bytes;
    const void *site; int id; char kind; bool live;           // kind: 'd'evice, 'h'ost pinned
};
enum { PAGE = 4096, GUARD = 4 * PAGE, ALIGN = 256, FENCE = 64, POISON = 0xFF };  // cudaMalloc aligns to 256 bytes
inline std::map<uintptr_t, Allocation> allocations;           // by base; freed ones stay, their pages inaccessible
inline std::recursive_mutex memory_lock;
extern "C" char __executable_start, _end;                     // bounds of the program

inline bool in_range(const void *p, size_t n, const void *base, size_t bytes) {
    return (const char *)p >= (const char *)base && (const char *)p + n <= (const char *)base + bytes;
}
inline bool in_program(const void *p, size_t n) {             // where __device__ variables are
    return in_range(p, n, &__executable_start, &_end - &__executable_start);
}
inline Allocation *find_allocation(const void *p) {           // the live allocation that holds p, or null
    std::map<uintptr_t, Allocation>::iterator it = allocations.upper_bound((uintptr_t)p);
    if (it == allocations.begin()) return nullptr;
    Allocation &a = (--it)->second;
    return a.live && (char *)p < a.base + a.bytes ? &a : nullptr;
}
inline const char *describe_address(const void *p) {          // by its place in or near the nearest allocation
    auto beyond = [p](const Allocation *a) { return (char *)p - (a->base + a->bytes); };
    auto distance = [&](const Allocation *a) { return (char *)p < a->base ? a->base - (char *)p : beyond(a); };
    const Allocation *a = nullptr;
    for (const auto &it : allocations) if (!a || distance(&it.second) < distance(a)) a = &it.second;
    char place[80], text[120];
    if (!a) { snprintf(text, sizeof text, "%p (no device allocation near)", p); return keep(text); }
    if ((char *)p < a->base) snprintf(place, sizeof place, "%ld bytes before", (long)distance(a));
    else if (beyond(a) >= 0) snprintf(place, sizeof place, "%ld bytes after the end of", (long)beyond(a));
    else snprintf(place, sizeof place, "byte %ld of", (long)((char *)p - a->base));
    snprintf(text, sizeof text, "%p: %s %sallocation #%d (%zu bytes, allocated at ", p, place, a->live ? "" : "FREED ",
             a->id, a->bytes);
    return keep(text + source_line(a->site) + ")");
}
// With EMU_HOSTCHECK device memory is accessible only while device work runs.
inline int access_depth = 0;
struct DeviceAccess {
    DeviceAccess() { if (settings.hostcheck && access_depth++ == 0) protect(PROT_READ | PROT_WRITE); }
    ~DeviceAccess() { if (settings.hostcheck && --access_depth == 0) protect(PROT_NONE); }
    static void protect(int mode) {
        for (auto &it : allocations)
            if (it.second.live && it.second.kind == 'd') mprotect(it.second.pages, it.second.page_bytes, mode);
    }
};
inline cudaError_t allocate(void **out, size_t bytes, char kind, const void *site) {
    std::lock_guard<std::recursive_mutex> guard(memory_lock);
    DeviceAccess access;
    if (!out) return host_error(cudaErrorInvalidValue, "cudaMalloc: null pointer");
    *out = nullptr;
    if (!bytes) return done();
    const size_t n = (bytes + ALIGN - 1) / ALIGN * ALIGN, page_bytes = (n + PAGE - 1) / PAGE * PAGE;
    void *map = MAP_FAILED;
    if (kind != 'd' || memory_used + bytes <= settings.memory)
        map = mmap(nullptr, page_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect((char *)map + PAGE, page_bytes, PROT_READ | PROT_WRITE))
        return (cudaError_t)(last_error = cudaErrorMemoryAllocation);
    char *pages = (char *)map + PAGE;
    static int count = 0;
    const Allocation a = {pages + page_bytes - n, bytes, pages, page_bytes, site, ++count, kind, true};
    if (settings.poison) memset(pages, POISON, page_bytes);
    else { memset(pages, POISON, a.base - pages); memset(a.base + bytes, POISON, n - bytes); }
    ASAN_POISON_MEMORY_REGION(pages, a.base - pages);
    ASAN_POISON_MEMORY_REGION(a.base + bytes, n - bytes);
    allocations[(uintptr_t)a.base] = a;
    if (kind == 'd') memory_peak = std::max(memory_peak, memory_used += bytes), allocated.push_back(bytes);
    *out = a.base;
    return done();
}
// The first byte of a range that no longer holds the poison, or null. ASan watches poisoned ranges itself.
inline const char *overwritten(const char *p, const char *end) {
    while (!EMU_ASAN && p < end) if ((unsigned char)*p++ != POISON) return p - 1;
    return nullptr;
}
inline bool fences_intact(const Allocation &a) {              // the padding around an allocation
    const char *start = a.base - a.pages < FENCE ? a.pages : a.base - FENCE;
    return !overwritten(start, a.base) && !overwritten(a.base + a.bytes, a.pages + a.page_bytes);
}
inline cudaError_t release(void *p, char kind) {
    std::lock_guard<std::recursive_mutex> guard(memory_lock);
    DeviceAccess access;
    if (!p) return done();
    Allocation *a = find_allocation(p);
    if (!a || a->base != p || a->kind != kind)
        return host_error(cudaErrorInvalidValue, "free of %s, which is not the start of a live allocation of that kind",
            describe_address(p));
    if (!fences_intact(*a)) host_error(cudaErrorIllegalAddress, "written past the bounds: %s", describe_address(p));
    ASAN_UNPOISON_MEMORY_REGION(a->pages, a->page_bytes);
    mprotect(a->pages, a->page_bytes, PROT_NONE);
    madvise(a->pages, a->page_bytes, MADV_DONTNEED);
    a->live = false;
    if (kind == 'd') memory_used -= a->bytes;
    return done();
}

// ---- fibers -----------------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
asm(".text\n.weak emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size emu_switch,.-emu_switch\n");
inline void *first_frame(char *top, void (*entry)()) {       // a stack that emu_switch can load: it "returns" into entry
    void **sp = (void **)((uintptr_t)top & ~(uintptr_t)63);
    *--sp = nullptr;                                         // entry's own return address: none; keeps the ABI's alignment
    *--sp = (void *)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__)
asm(".text\n.weak emu_switch\n.type emu_switch,%function\nemu_switch:\n"
    "sub sp,sp,#160\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\n"
    "stp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#160\nret\n.size emu_switch,.-emu_switch\n");
inline void *first_frame(char *top, void (*entry)()) {
    void **sp = (void **)((uintptr_t)top & ~(uintptr_t)63) - 20;
    memset(sp, 0, 160);
    sp[11] = (void *)entry;                                  // x30, the link register
    return sp;
}
#else
#error "emu_switch is written for x86-64 and aarch64; add a few lines for this processor"
#endif

// ---- one block: threads, warps, barriers, run order -------------------------------------------------------------------
enum { MAX_THREADS = 1024, MAX_WARPS = 32, BARRIERS = 16, SMEM_MAX = 256 << 10, SMEM_ALIGN = 128, FAULT_STACK = 256 << 10 };

struct Copy { void *dst; const void *src; int valid, size; };       // one cp.async in flight
struct Verb { const char *name; void (*complete)(void **args, uint32_t lanes); };  // args[lane] of each lane of the mask

struct Wgmma {                                                // one in flight; operands are registers or descriptors
    const char *name; float *sum; int columns; bool add; const uint32_t *left; bool by_rows;     // left: of a, or null
    bool left_by_columns; uint64_t a, b; uint32_t a_registers[4];
    bool first; float start[96];                              // the sums before it, if none in flight has the same
};
struct BulkCopy {                                             // to global memory, in flight
    char *dst; const char *src; size_t bytes; bool add; std::vector<char> data;     // data: once the source has been read
};
struct Worker;
struct Thread {
    void *sp; char *stack; Worker *worker;                    // stack is null before the first run and after the last
    void *fake;                                               // of ASan
    uint3 idx; int warp, lane;
    const char *waits_at; const void *where;                  // for reports; waits_at is null while not waiting
    std::vector<Copy> copies;                                 // cp.async not landed yet, oldest first
    std::vector<size_t> groups;                               // copies.size() at each commit not waited for yet
    std::vector<Wgmma> products;                              // wgmma not complete yet, oldest first
    std::vector<size_t> product_groups;                       // products.size() at each commit not waited for yet
    bool fenced;                                              // by wgmma.fence, since the last wait
    std::vector<char> fence_stack; const char *fence_from;    // the thread's stack at that fence: its registers
    int registers;                                            // as setmaxnreg has it
    std::vector<BulkCopy> bulk;                               // not complete yet, oldest first
    std::vector<size_t> bulk_groups;                          // bulk.size() at each commit not waited for yet
    std::vector<uint32_t> unfenced;                           // units of shared memory: see Worker
};
struct Warp {
    uint32_t alive, ready, waiting;                           // lane masks: not exited; can run; inside a warp operation
    const Verb *verb[32]; uint32_t mask[32]; void *args[32];  // of the waiting lanes
};
struct Barrier { int expected, arrived, line, sum; uint32_t waiting[MAX_WARPS]; int result; };
struct Mbarrier { int expected, arrived, phase; long bytes; uint32_t waiting[MAX_WARPS]; };   // bytes: announced, to land
struct TensorMap { const char *base; uint64_t dim[4], stride[4]; uint32_t box[4]; };
struct TensorCopy {                                           // one TMA load in flight, or a bulk copy: `bytes` from `flat`
    char *dst; TensorMap map; int corner[4]; uint64_t *barrier; const char *flat; size_t bytes;
};
struct Launch {
    const void *kernel; std::function<void()> body;
    dim3 grid, block; size_t smem; uint64_t number;
    std::atomic<uint64_t> next{0}; std::atomic<bool> failed{false};
    std::mutex turns; std::atomic<uint64_t> passed{0}; std::atomic<int> workers{0}, stuck{0};    // see turn_wait
};

struct Worker {                                              // one per OS thread
    Launch *launch; uint3 block; int n_threads, alive;
    uint64_t rng; uint32_t ready_warps; int last_warp, last_lane, starved;
    Thread host{}; size_t host_bytes;                  // the stack that run_block was called on; its place: for ASan
    char *smem; size_t smem_bytes;
    Warp warps[MAX_WARPS]; Barrier barriers[BARRIERS]; Thread threads[MAX_THREADS];
    Barrier warpgroups[MAX_WARPS / 4];                        // where the 128 threads of each meet: wgmma
    size_t groups_over[MAX_WARPS];                            // of wgmma, that each warp has waited for and not yet seen
    int spare_registers; uint32_t registers_waiting[MAX_WARPS];      // setmaxnreg
    std::map<const uint64_t *, Mbarrier> mbarriers; bool mbarriers_fenced; std::vector<TensorCopy> tensor_copies;
    uint16_t unfenced[SMEM_MAX / 16];                         // who wrote 16 bytes without the asynchronous proxy's fence since
    char *stacks, *smem_pages, *fault_stack; std::vector<char *> free_stacks;
    Worker();
    size_t stack_stride() const { return settings.stack + GUARD; }        // inaccessible pages below each stack
    uint64_t random() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return rng >> 11; }
    void wake(int warp, uint32_t lanes) { warps[warp].ready |= lanes; if (lanes) ready_warps |= 1u << warp; }
    Thread *pick();
    void run_as(Thread *next) { me = next; threadIdx = next->idx; }
    void switch_to(Thread *next, bool for_good);
    void resume(Thread *next);
    void sleep(const char *waits_at, const void *where);     // until somebody wakes this thread
    void yield();                                            // with EMU_SEED: perhaps let others run first
    void hand_over(Thread *next);                            // let one that is ready run now
    void linger();                                           // the same, perhaps until all of them wait
    Thread *finish(Thread *t);
    void run_block(Launch *l, uint64_t number);
    void reset_stacks();
    const char *waiting_list();
};
inline thread_local Worker *my_worker = nullptr;

inline void fiber_main();
inline void on_fault(int sig, siginfo_t *info, void *context);

inline char *map_pages(size_t n) {
    void *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) { perror("emu: stacks"); _exit(86); }
    return (char *)p;
}
inline Worker::Worker() {
    stacks = map_pages(stack_stride() * MAX_THREADS);
    for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * stack_stride(), GUARD, PROT_NONE);
    smem_pages = map_pages(SMEM_MAX + 2 * PAGE);
    mprotect(smem_pages, PAGE, PROT_NONE);
    mprotect(smem_pages + PAGE + SMEM_MAX, PAGE, PROT_NONE);
    stack_t alt = {};
    alt.ss_size = FAULT_STACK;
    alt.ss_sp = fault_stack = map_pages(FAULT_STACK);
    sigaltstack(&alt, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGALRM}) sigaction(s, &action, nullptr);
    reset_stacks();
}
inline void Worker::reset_stacks() {                         // the next stack to use is the last of the list
    free_stacks.clear();
    for (int i = MAX_THREADS - 1; i >= 0; i--) free_stacks.push_back(stacks + i * stack_stride() + GUARD);
    ASAN_UNPOISON_MEMORY_REGION(stacks, stack_stride() * MAX_THREADS);
    ASAN_UNPOISON_MEMORY_REGION(fault_stack, FAULT_STACK);
    for (Thread &t : threads) {
        t.stack = nullptr;
        t.copies.clear(), t.groups.clear(), t.products.clear(), t.product_groups.clear();
        t.bulk.clear(), t.bulk_groups.clear(), t.unfenced.clear();
    }
}

inline int next_bit(uint32_t m, int after) {                 // the first set bit above `after`, else the lowest
    uint32_t high = after >= 31 ? 0 : m & (~0u << (after + 1));
    return __builtin_ctz(high ? high : m);
}
inline int random_bit(uint32_t m, uint64_t r) {
    for (int k = (int)(r % __builtin_popcount(m)); k; k--) m &= m - 1;
    return __builtin_ctz(m);
}
// Natural order: the other lanes of the same warp, then the next warp.
inline Thread *Worker::pick() {
    if (!ready_warps) fail(cudaErrorLaunchFailure, "deadlock: no thread of the block can run\n%s", waiting_list());
    int w, lane;
    if (settings.seed) {
        w = starved >= 0 && random() % 1024 ? next_bit(ready_warps, starved) : random_bit(ready_warps, random());
        lane = random_bit(warps[w].ready, random());
    } else {
        w = ready_warps >> last_warp & 1 ? last_warp : next_bit(ready_warps, last_warp);
        lane = next_bit(warps[w].ready, w == last_warp ? last_lane : 31);
    }
    warps[w].ready &= ~(1u << lane);
    if (!warps[w].ready) ready_warps &= ~(1u << w);
    last_warp = w;
    last_lane = lane;
    return &threads[w * 32 + lane];
}
inline void Worker::switch_to(Thread *next, bool for_good) {
    Thread *prev = me;
    const size_t stack_bytes = next == &host ? host_bytes : settings.stack;
    run_as(next);
    __sanitizer_start_switch_fiber(for_good ? nullptr : &prev->fake, next->stack, stack_bytes);
    emu_switch(&prev->sp, next->sp);
    __sanitizer_finish_switch_fiber(prev->fake, nullptr, nullptr);
}
inline void Worker::resume(Thread *next) {
    if (next == me) return;
    if (!next->stack) {
        next->stack = free_stacks.back();
        free_stacks.pop_back();
        size_t stagger = (next->lane * 5 + next->warp * 3) % 32 * 64;      // keep stack tops out of the same cache set
        // the last user's outermost frames never returned
        ASAN_UNPOISON_MEMORY_REGION(next->stack + settings.stack - 8192, 8192);
        next->sp = first_frame(next->stack + settings.stack - stagger, fiber_main);
    }
    switch_to(next, false);
}
inline void Worker::sleep(const char *waits_at, const void *where) {
    Thread *self = me;
    self->waits_at = waits_at;
    self->where = where;
    resume(pick());
    self->waits_at = nullptr;
}
inline void Worker::hand_over(Thread *next) {                // to one that is ready
    wake(me->warp, 1u << me->lane);
    Warp &w = warps[next->warp];
    w.ready &= ~(1u << next->lane);
    if (!w.ready) ready_warps &= ~(1u << next->warp);
    resume(next);
}
inline void Worker::yield() {
    if (!settings.seed || random() % 4) return;
    wake(me->warp, 1u << me->lane);
    resume(pick());
}
inline void Worker::linger() {
    const bool last = settings.seed && random() % 4 == 0;
    for (int i = 0; last && i < 100000 && ready_warps; i++) {
        wake(me->warp, 1u << me->lane);
        resume(pick());
    }
}
// t returned from the kernel: who runs next? `host` when all are done.
inline Thread *Worker::finish(Thread *t) {
    Warp &w = warps[t->warp];
    w.alive &= ~(1u << t->lane);
    alive--;
    t->copies.clear();
    t->groups.clear();
    t->products.clear();
    t->product_groups.clear();
    if (!t->bulk.empty()) fail(cudaErrorLaunchFailure, "the thread left the kernel with a bulk copy in flight");
    t->bulk_groups.clear();
    t->unfenced.clear();
    if (barriers[0].arrived)
        fail(cudaErrorLaunchFailure, "the thread left the kernel while others wait at __syncthreads\n%s", waiting_list());
    for (uint32_t m = w.waiting; m; m &= m - 1) {
        const int other = __builtin_ctz(m);
        if (w.mask[other] >> t->lane & 1)
            fail(cudaErrorLaunchFailure, "lane %d left the kernel, but lane %d waits for it at %s with mask %08x\n%s",
                 t->lane, other, w.verb[other]->name, w.mask[other], waiting_list());
    }
    return alive ? pick() : &host;
}
inline void fiber_main() {
    Worker *w = me->worker;
    const void *from = nullptr;
    size_t from_bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &from, &from_bytes);
    if (!w->host.stack) { w->host.stack = (char *)from; w->host_bytes = from_bytes; }     // the first fiber comes from there
    for (;;) {
        Thread *t = me;
        w->launch->body();
        Thread *next = w->finish(t);
        if (next == &w->host || next->stack) {
            w->free_stacks.push_back(t->stack);
            t->stack = nullptr;
            w->switch_to(next, true);
        } else {                                             // not started yet: it runs on this very stack
            next->stack = t->stack;
            t->stack = nullptr;
            w->run_as(next);
        }
    }
}
inline void Worker::run_block(Launch *l, uint64_t number) {
    launch = l;
    block = uint3{(unsigned)(number % l->grid.x), (unsigned)(number / l->grid.x % l->grid.y),
                  (unsigned)(number / l->grid.x / l->grid.y)};
    blockIdx = block;
    blockDim = l->block;
    gridDim = l->grid;
    n_threads = alive = l->block.x * l->block.y * l->block.z;
    rng = (settings.seed + 1) * 0x9E3779B97F4A7C15ull ^ (l->number << 40) ^ (number + 1) * 0xD1342543DE82EF95ull;
    starved = settings.seed && random() % 2 ? (int)(random() % ((n_threads + 31) / 32)) : -1;    // runs where no other warp can
    ready_warps = 0;
    last_warp = last_lane = 31;
    for (int w = 0; w * 32 < n_threads; w++) {
        int lanes = n_threads - w * 32 < 32 ? n_threads - w * 32 : 32;
        warps[w].alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warps[w].ready = warps[w].waiting = 0;
        wake(w, warps[w].alive);
    }
    memset(barriers, 0, sizeof barriers);
    memset(warpgroups, 0, sizeof warpgroups);
    memset(registers_waiting, 0, sizeof registers_waiting);
    memset(groups_over, 0, sizeof groups_over);
    spare_registers = 0;
    mbarriers.clear();
    tensor_copies.clear();
    memset(unfenced, 0, sizeof unfenced);
    uint3 idx = {0, 0, 0};
    for (int i = 0; i < n_threads; i++) {
        Thread &t = threads[i];
        t.worker = this; t.idx = idx; t.warp = i / 32; t.lane = i % 32; t.waits_at = nullptr; t.fenced = false;
        t.registers = (65536 / n_threads < 256 ? 65536 / n_threads : 255) / 8 * 8;
        if (++idx.x == l->block.x) { idx.x = 0; if (++idx.y == l->block.y) { idx.y = 0; idx.z++; } }
    }
    smem_bytes = l->smem;
    char *top = smem_pages + PAGE + SMEM_MAX;
    smem = top - (smem_bytes + SMEM_ALIGN - 1) / SMEM_ALIGN * SMEM_ALIGN;
    ASAN_UNPOISON_MEMORY_REGION(smem_pages + PAGE, SMEM_MAX);
    memset(smem, POISON, top - smem);
    ASAN_POISON_MEMORY_REGION(smem_pages + PAGE, smem - smem_pages - PAGE);
    ASAN_POISON_MEMORY_REGION(smem + smem_bytes, top - smem - smem_bytes);
    for (const TlsRange &r : symbols().shared) memset(symbols().tls_base() + r.offset, POISON, r.bytes);
    me = &host;
    resume(pick());
    me = nullptr;
    const char *past = l->failed ? nullptr : overwritten(smem + smem_bytes, top);
    if (past) {
        host_error(cudaErrorIllegalAddress, "%s block (%u,%u,%u): shared memory written %d bytes past its %zu bytes",
                   function_name(l->kernel).c_str(), block.x, block.y, block.z, (int)(past - smem - smem_bytes), smem_bytes);
        sticky = cudaErrorIllegalAddress;
        l->failed = true;
    }
    for (int i = 0; i < BARRIERS && !l->failed; i++) {
        if (!barriers[i].arrived) continue;
        host_error(cudaErrorLaunchFailure, "%s block (%u,%u,%u): at its end named barrier %d has %d of %d threads",
                   function_name(l->kernel).c_str(), block.x, block.y, block.z, i, barriers[i].arrived, barriers[i].expected);
        sticky = cudaErrorLaunchFailure;
        l->failed = true;
    }
    if (!l->failed && !tensor_copies.empty()) {
        host_error(cudaErrorLaunchFailure, "%s block (%u,%u,%u): a TMA load is still in flight at the end of the block",
                   function_name(l->kernel).c_str(), block.x, block.y, block.z);
        sticky = cudaErrorLaunchFailure;
        l->failed = true;
    }
    if (l->failed) reset_stacks();
}

// ---- reports from inside a kernel -------------------------------------------------------------------------------------
inline void print_where(const Thread *t) {
    const Worker *w = t->worker;
    fprintf(stderr, "emu: %s block (%u,%u,%u) thread (%u,%u,%u): ", function_name(w->launch->kernel).c_str(),
            w->block.x, w->block.y, w->block.z, t->idx.x, t->idx.y, t->idx.z);
}
// Prints a report, the first of a launch (the rest are echo), makes the error sticky and gives the block up.
[[noreturn]] inline void fail(cudaError_t code, const char *fmt, ...) {
    {
        std::lock_guard<std::mutex> guard(report_lock);
        int none = 0;
        if (sticky.compare_exchange_strong(none, code)) {
            fflush(stdout);
            print_where(me);
            va_list ap;
            va_start(ap, fmt);
            vfprintf(stderr, fmt, ap);
            va_end(ap);
            fprintf(stderr, "\n");
            if (me->where) fprintf(stderr, "     at %s\n", source_line(me->where).c_str());
            if (settings.seed) fprintf(stderr, "     with EMU_SEED=%llu\n", (unsigned long long)settings.seed);
        }
    }
    me->worker->launch->failed = true;
    me->worker->switch_to(&me->worker->host, true);          // back to run_block; the fiber is abandoned
    __builtin_unreachable();
}
inline const char *Worker::waiting_list() {                  // threads that wait, grouped by what and where
    std::map<std::pair<std::string, const void *>, std::vector<int> > groups;
    for (int i = 0; i < n_threads; i++) {
        Thread &t = threads[i];
        if (t.waits_at) groups[{t.waits_at, t.where}].push_back(i);
        else if (!(warps[t.warp].alive >> t.lane & 1)) groups[{"left the kernel", nullptr}].push_back(i);
    }
    std::string out;
    for (const auto &g : groups) {
        out += out.empty() ? "     threads" : "\n     threads";
        for (size_t i = 0, j; i < g.second.size(); i = j) {   // linear thread numbers as ranges
            for (j = i + 1; j < g.second.size() && g.second[j] == g.second[j - 1] + 1;) j++;
            out += " " + std::to_string(g.second[i]) + (j > i + 1 ? "-" + std::to_string(g.second[j - 1]) : "");
            if (out.size() > 3000) { out += " ..."; break; }
        }
        out += ": " + g.first.first + (g.first.second ? " at " + source_line(g.first.second) : "");
    }
    return keep(out);
}

// SIGSEGV and friends: inside a kernel a report and a sticky error; in host code the default action.
inline void on_fault(int sig, siginfo_t *info, void *context) {
    const char *p = (const char *)info->si_addr;
    if (!me || !me->worker) {
        if (sig == SIGSEGV || sig == SIGBUS) fprintf(stderr, "emu: host code touched %s\n", describe_address(p));
        if (sig == SIGALRM) {
            fprintf(stderr, "emu: a kernel is still running after %u s (EMU_TIMEOUT)\n", settings.timeout);
            _exit(86);
        }
        signal(sig, SIG_DFL);
        raise(sig);
        return;
    }
#if defined(__x86_64__)
    me->where = (const void *)(((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] + 1);
#else
    me->where = (const void *)(((ucontext_t *)context)->uc_mcontext.pc + 1);
#endif
    const Worker *w = me->worker;
    if (sig == SIGABRT) me->where = nullptr;
    if (sig == SIGABRT) fail(cudaErrorAssert, "abort or assert");
    if (sig == SIGALRM) fail(cudaErrorLaunchFailure, "still running after %u s (EMU_TIMEOUT)", settings.timeout);
    if (sig == SIGFPE) fail(cudaErrorIllegalAddress, "integer division by zero");
    if (in_range(p, 1, w->stacks, w->stack_stride() * MAX_THREADS))
        fail(cudaErrorIllegalAddress, "stack overflow (EMU_STACK sets the bytes per thread)");
    if (in_range(p, 1, w->smem_pages, SMEM_MAX + 2 * PAGE))
        fail(cudaErrorIllegalAddress, "access %ld bytes from the start of the block's %zu bytes of shared memory",
             (long)(p - w->smem), w->smem_bytes);
    fail(cudaErrorIllegalAddress, "illegal access to %s", describe_address(p));
}
#if EMU_ASAN
extern "C" inline __attribute__((used)) void __asan_on_error() {
    if (!me || !me->worker) return;
    print_where(me);
    fprintf(stderr, "AddressSanitizer report follows\n");
}
#endif

// ---- barriers and warp operations -------------------------------------------------------------------------------------
// Barrier 0 is __syncthreads: all threads of the block, from one source line (line != 0). Returns the sum of `value`.
EMU_NOINLINE inline int barrier(int id, int expected, int line, int value, bool wait, const char *name) {
    Thread *t = me;
    Worker *w = t->worker;
    t->where = __builtin_return_address(0);
    if (id < 0 || id >= BARRIERS) fail(cudaErrorLaunchFailure, "%s: barrier %d, there are %d", name, id, BARRIERS);
    Barrier &b = w->barriers[id];
    if (!expected) expected = w->n_threads;
    else if (expected % 32 || expected > w->n_threads)
        fail(cudaErrorLaunchFailure, "%s(%d, %d): the count must be a multiple of 32 within the block", name, id, expected);
    if (line && w->alive < w->n_threads)
        fail(cudaErrorLaunchFailure, "__syncthreads after %d threads left the kernel\n%s", w->n_threads - w->alive,
             w->waiting_list());
    if (b.arrived && b.expected != expected)
        fail(cudaErrorLaunchFailure, "%s(%d, %d): others wait there for %d threads", name, id, expected, b.expected);
    if (b.arrived && b.line != line) {
        t->waits_at = name;
        fail(cudaErrorLaunchFailure, "barrier divergence: __syncthreads on lines %d and %d\n%s", b.line, line,
             w->waiting_list());
    }
    b.expected = expected;
    b.line = line;
    b.sum += value;
    if (++b.arrived == expected) {
        for (int i = 0; i < MAX_WARPS; i++) { w->wake(i, b.waiting[i]); b.waiting[i] = 0; }
        const int result = b.result = b.sum;
        b.arrived = b.sum = 0;
        w->yield();
        return result;
    }
    if (!wait) return 0;
    b.waiting[t->warp] |= 1u << t->lane;
    w->sleep(name, t->where);
    return b.result;                                          // the next phase cannot end before this thread arrives again
}

// All lanes of `mask` meet in the same verb with the same mask; the last one completes it for all.
EMU_NOINLINE inline void warp_op(const Verb *verb, uint32_t mask, void *args) {
    Thread *t = me;
    Worker *w = t->worker;
    Warp &warp = w->warps[t->warp];
    uint32_t bit = 1u << t->lane;
    t->where = __builtin_return_address(0);
    if (!(mask & bit)) fail(cudaErrorLaunchFailure, "%s: lane %d is not in its own mask %08x", verb->name, t->lane, mask);
    if (mask & ~warp.alive) fail(cudaErrorLaunchFailure,
        "%s: mask %08x names lanes %08x, which have left the kernel or never existed", verb->name, mask, mask & ~warp.alive);
    uint32_t there = warp.waiting & mask;
    if (there) {
        int other = __builtin_ctz(there);
        if ((warp.mask[other] & bit) && (warp.mask[other] != mask || warp.verb[other] != verb)) {
            t->waits_at = verb->name;
            fail(cudaErrorLaunchFailure, "%s with mask %08x, but lane %d waits at %s with mask %08x\n%s", verb->name, mask,
                 other, warp.verb[other]->name, warp.mask[other], w->waiting_list());
        }
    }
    warp.verb[t->lane] = verb;
    warp.mask[t->lane] = mask;
    warp.args[t->lane] = args;
    warp.waiting |= bit;
    bool complete = (warp.waiting & mask) == mask;
    for (uint32_t m = mask; complete && m; m &= m - 1)
        complete = warp.verb[__builtin_ctz(m)] == verb && warp.mask[__builtin_ctz(m)] == mask;
    if (!complete) return w->sleep(verb->name, t->where);
    verb->complete(warp.args, mask);
    warp.waiting &= ~mask;
    w->wake(t->warp, mask & ~bit);
    w->yield();
}

// ---- address checks of the verbs --------------------------------------------------------------------------------------
enum Space { GLOBAL, SHARED, ANYWHERE };
EMU_NOINLINE inline void check_address(const char *name, const void *p, size_t n, size_t align, Space space) {
    const Worker *w = me->worker;
    me->where = __builtin_return_address(0);
    if ((uintptr_t)p % align) fail(cudaErrorMisalignedAddress, "%s: address %p is not aligned to %zu bytes", name, p, align);
    if (space != SHARED) {
        const Allocation *a = find_allocation(p);
        if ((a && in_range(p, n, a->base, a->bytes)) || in_program(p, n)) return;
    }
    if (space != GLOBAL && (in_range(p, n, w->smem, w->smem_bytes) ||
                            in_range(p, n, symbols().tls_base(), symbols().tls_bytes))) return;
    if (space == ANYWHERE && in_range(p, n, w->stacks, w->stack_stride() * MAX_THREADS)) return;
    if (space == SHARED || in_range(p, 1, w->smem_pages, SMEM_MAX + 2 * PAGE))
        fail(cudaErrorIllegalAddress, "%s: %s%ld bytes from the start of the block's %zu bytes of shared memory", name,
             space == SHARED ? "not shared memory: " : "", (long)((const char *)p - w->smem), w->smem_bytes);
    fail(cudaErrorIllegalAddress, "%s of %zu bytes: %s", name, n, describe_address(p));
}

// ---- launch -----------------------------------------------------------------------------------------------------------
inline void run_launch(Launch &l) {
    if (sticky) return;
    uint64_t n = (uint64_t)l.grid.x * l.grid.y * l.grid.z, step = 1, first = 0;
    if (settings.seed && n > 2) {                             // an affine permutation of the blocks
        step = (settings.seed * 0x9E3779B97F4A7C15ull + l.number) % n | 1;
        while (std::gcd(step, n) != 1) step += 2;
        first = (settings.seed ^ l.number * 0xD1342543DE82EF95ull) % n;
    }
    [[maybe_unused]] int threads = (uint64_t)settings.threads < n ? settings.threads : (int)n;
    if (settings.timeout) alarm(settings.timeout);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!my_worker) my_worker = new Worker();             // lives as long as its OS thread
#pragma omp single
        l.workers = omp_get_num_threads();
        for (uint64_t i; !l.failed && (i = l.next++) < n;)
            my_worker->run_block(&l, (uint64_t)(((unsigned __int128)i * step + first) % n));
        l.workers--;
    }
    if (settings.timeout) alarm(0);
    for (const auto &it : allocations)
        if (it.second.live && it.second.kind == 'd' && !fences_intact(it.second)) {
            host_error(cudaErrorIllegalAddress, "%s wrote outside its memory, beside allocation %s",
                       function_name(l.kernel).c_str(), describe_address(it.second.base));
            int none = 0;
            sticky.compare_exchange_strong(none, cudaErrorIllegalAddress);
        }
}
}  // namespace emu
