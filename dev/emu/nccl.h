// nccl.h of dev/emu: the collectives of a trainer, over MPI when built with -DUSE_MPI, else for one rank. Device memory is
// host memory here. Sums run in rank order, so results do not depend on timing; those of bf16 are rounded at each addition,
// as in a ring. Before data moves, the ranks of a communicator compare their calls: a difference is a report, no hang.
//
// A collective runs when its stream does: at once and while the host waits, or, with EMU_ASYNC, in steps between other
// work. From its first step to its last the receive buffer is NaN and both buffers belong to it: a write by other work in
// that time is a report, a read of the result gives NaN. The calls of one communicator keep their order on all streams.
// A communicator that does not block (ncclConfig_t) answers ncclInProgress, and a call has not reached its stream before
// ncclCommGetAsyncError says ncclSuccess; another call before that is an error.
#pragma once
#include "cuda_runtime.h"
#include <limits.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1          // the C interface is enough
#include <mpi.h>
#endif

enum ncclResult_t {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4,
    ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7
};
enum ncclDataType_t { ncclFloat32 = 7, ncclFloat = 7, ncclBfloat16 = 9 };
enum ncclRedOp_t { ncclSum = 0 };
struct ncclUniqueId { char internal[128]; };
struct ncclConfig_t { size_t size; unsigned magic; int blocking; };
#define NCCL_CONFIG_INITIALIZER {sizeof(ncclConfig_t), 0xcafebeef, INT_MIN}
#define NCCL_SPLIT_NOCOLOR (-1)
struct ncclComm {
    int size, rank;
    bool blocking, aborted;
    uint64_t issued, complete;                                // calls
    int polls;                                                // until it answers no more "in progress"
    std::vector<std::function<bool()>> late;                  // work of such a call, done at the last poll; false: not yet
#ifdef USE_MPI
    MPI_Comm mpi;
    MPI_Request starting;
#endif
};
typedef ncclComm *ncclComm_t;

inline const char *ncclGetErrorString(ncclResult_t r) {
    return r == ncclSuccess ? "no error" : r == ncclInvalidArgument ? "invalid argument" : r == ncclInvalidUsage ?
        "invalid usage" : r == ncclInProgress ? "operation in progress" : "unhandled error";
}

namespace emu {
inline ncclResult_t nccl_error(ncclResult_t r, const char *call, const char *why) {
    host_error(cudaErrorUnknown, "nccl: %s: %s", call, why);
    return r;
}
// A call on a communicator may begin.
inline ncclResult_t nccl_ready(const char *call, const ncclComm *c) {
    return !c ? nccl_error(ncclInvalidArgument, call, "no communicator") :
        c->aborted ? nccl_error(ncclInvalidUsage, call, "the communicator was aborted") :
        c->polls ? nccl_error(ncclInvalidUsage, call, "the call before is in progress (ncclCommGetAsyncError)") : ncclSuccess;
}
// Work of a call: now, or at the last of some polls.
inline ncclResult_t nccl_begin(ncclComm *c, std::function<bool()> work) {
    if (c->blocking) {
        while (!work()) meanwhile();
        return ncclSuccess;
    }
    c->late.push_back(std::move(work));
    c->polls = 3;
    return ncclInProgress;
}
}  // namespace emu

// ---- communicators ------------------------------------------------------------------------------------------------------
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {      // a number that the ranks of a communicator share
    static int count = 0;
    memset(id, 0, sizeof *id);
    ++count;
    memcpy(id->internal, &count, sizeof count);
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank, ncclConfig_t *config) {
    if (size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
    if (config && config->magic != 0xcafebeef)
        return emu::nccl_error(ncclInvalidArgument, "ncclCommInitRankConfig", "no NCCL_CONFIG_INITIALIZER");
    ncclComm *c = *out = new ncclComm();
    int ranks = 1, number;
    memcpy(&number, id.internal, sizeof number);
    c->size = size, c->rank = rank, c->blocking = !config || config->blocking;
#ifdef USE_MPI
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    c->starting = MPI_REQUEST_NULL;
    if (ranks == size) MPI_Comm_idup(MPI_COMM_WORLD, &c->mpi, &c->starting);
    else {
        MPI_Comm_split(MPI_COMM_WORLD, number, rank, &c->mpi);
        MPI_Comm_size(c->mpi, &ranks);
    }
#endif
    if (ranks != size) {
        emu::host_error(cudaErrorNotSupported, "nccl: %d ranks expected, %d have this id (several need a build with "
                        "-DUSE_MPI)", size, ranks);
        return ncclInvalidUsage;
    }
    return emu::nccl_begin(c, [c] {
        int there = 1;
#ifdef USE_MPI
        PMPI_Test(&c->starting, &there, MPI_STATUS_IGNORE);
#endif
        return there && !emu::hangs("nccl");
    });
}
inline ncclResult_t ncclCommInitRank(ncclComm_t *c, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(c, size, id, rank, nullptr);
}
// The ranks with the same colour get a communicator of their own, in the order of their keys. All ranks must call.
inline ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t *out, ncclConfig_t *config) {
    if (ncclResult_t r = emu::nccl_ready("ncclCommSplit", parent)) return r;
    if (color < 0 && color != NCCL_SPLIT_NOCOLOR) return emu::nccl_error(ncclInvalidArgument, "ncclCommSplit", "its color");
    ncclComm *c = color == NCCL_SPLIT_NOCOLOR ? nullptr : new ncclComm();
    *out = c;
    if (c) c->size = 1, c->blocking = config && config->blocking != INT_MIN ? config->blocking : parent->blocking;
#ifdef USE_MPI
    MPI_Comm mpi;
    MPI_Comm_split(parent->mpi, color < 0 ? MPI_UNDEFINED : color, key, &mpi);
    if (c) {
        c->mpi = mpi, c->starting = MPI_REQUEST_NULL;
        MPI_Comm_size(mpi, &c->size);
        MPI_Comm_rank(mpi, &c->rank);
    }
#endif
    if (c && !c->blocking) c->polls = 3;
    return emu::nccl_begin(parent, [] { return true; });
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *r) {
    if (!c || c->aborted) return emu::nccl_error(ncclInvalidArgument, "ncclCommGetAsyncError", "no communicator");
    emu::progress();
    while (c->polls == 1 && !c->late.empty() && c->late.front()()) c->late.erase(c->late.begin());
    if (c->polls > 1 || (c->polls && c->late.empty())) c->polls--;
    *r = c->polls ? ncclInProgress : ncclSuccess;
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (ncclResult_t r = emu::nccl_ready("ncclCommDestroy", c)) return r;
    cudaDeviceSynchronize();
#ifdef USE_MPI
    MPI_Comm_free(&c->mpi);
#endif
    delete c;
    return ncclSuccess;
}
// Without the other ranks: calls that have not ended never will, and their streams go on.
inline ncclResult_t ncclCommAbort(ncclComm_t c) {
    if (!c || c->aborted) return emu::nccl_error(ncclInvalidArgument, "ncclCommAbort", "no communicator");
    c->aborted = true;
    return ncclSuccess;
}

// ---- collectives --------------------------------------------------------------------------------------------------------
namespace emu {
enum Kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER };
inline const char *const kind_names[] = {"AllReduce", "ReduceScatter", "AllGather"};
struct Call {                                                 // what the ranks compare; count: elements of one rank's part
    uint64_t kind, type, count;
    size_t bytes() const { return count * (type == ncclBfloat16 ? 2 : 4); }
};

// sum += part (n elements)
inline void add(ncclDataType_t type, void *sum, const void *part, size_t n) {
    if (type == ncclFloat32) for (size_t i = 0; i < n; i++) ((float *)sum)[i] += ((const float *)part)[i];
    else for (size_t i = 0; i < n; i++) {
        const float x = __uint_as_float((unsigned)((const uint16_t *)sum)[i] << 16);
        const unsigned u = __float_as_uint(x + __uint_as_float((unsigned)((const uint16_t *)part)[i] << 16));
        ((uint16_t *)sum)[i] = (u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
}

struct Collective {
    ncclComm *comm;
    Call call;
    const char *send;
    char *recv;
    uint64_t number;                                          // among those of the communicator
    std::vector<char> sent;                                   // the send buffer when it began
    std::vector<char> parts;                                  // one segment of all ranks
    std::vector<Call> calls;
    size_t at = 0;                                            // bytes of a part that have been exchanged
    enum { WAITING, COMPARING, MOVING } state = WAITING;
#ifdef USE_MPI
    MPI_Request request = MPI_REQUEST_NULL;
#endif
    size_t part() const { return call.bytes(); }
    size_t send_bytes() const { return part() * (call.kind == REDUCE_SCATTER ? comm->size : 1); }
    size_t recv_bytes() const { return part() * (call.kind == ALL_GATHER ? comm->size : 1); }
    const char *in_place() const {                            // the send buffer, if the call is one in place
        return call.kind == ALL_GATHER ? recv + comm->rank * part() : call.kind == REDUCE_SCATTER ?
            recv - comm->rank * part() : recv;
    }
    void touched(const char *which) {
        host_error(cudaErrorUnknown, "nccl: nccl%s: other work wrote to its %s buffer before it was complete",
                   kind_names[call.kind], which);
        sticky = cudaErrorUnknown;
    }
    size_t segment() const { return std::min(part() - at, (size_t)4 << 20); }
    void exchange() {                                         // begins to send the segment at `at`
        const size_t n = segment(), ranks = comm->size;
        parts.resize(n * ranks);
#ifdef USE_MPI
        if (call.kind == REDUCE_SCATTER) {
            outgoing.resize(n * ranks);
            for (size_t r = 0; r < ranks; r++) memcpy(&outgoing[r * n], &sent[r * part() + at], n);
            MPI_Ialltoall(outgoing.data(), (int)n, MPI_BYTE, parts.data(), (int)n, MPI_BYTE, comm->mpi, &request);
        } else MPI_Iallgather(&sent[at], (int)n, MPI_BYTE, parts.data(), (int)n, MPI_BYTE, comm->mpi, &request);
#else
        memcpy(parts.data(), &sent[at], n);
#endif
    }
#ifdef USE_MPI
    std::vector<char> outgoing;
#endif
    void write_back(size_t n) {                               // the segment, into the receive buffer
        const size_t ranks = comm->size, element = call.type == ncclBfloat16 ? 2 : 4;
        const bool gathers = call.kind == ALL_GATHER;
        for (size_t r = 1; r < ranks && !gathers; r++)
            add((ncclDataType_t)call.type, parts.data(), &parts[r * n], n / element);
        for (size_t r = 0; r < (gathers ? ranks : 1); r++) {
            char *to = recv + r * part() + at;
            const bool own = gathers && send == in_place() && (int)r == comm->rank;
            if (own) continue;
            if (std::any_of(to, to + n, [](char b) { return (unsigned char)b != POISON; })) touched("receive");
            memcpy(to, &parts[r * n], n);
        }
    }
    void check_sent() {                                       // outside the receive buffer it is as it was
        const size_t n = send_bytes();
        const bool inside = send == in_place();
        for (size_t i = 0; i < n; i++) {
            if (inside && call.kind != ALL_GATHER && send + i == recv) i += recv_bytes();
            if (i < n && send[i] != sent[i]) return touched("send");
        }
    }
    void end() {
        check_sent();
        comm->complete++;
    }
    // One step; true: the collective is complete.
    bool step() {
        if (comm->aborted) return true;
        if (state == WAITING) {
            if (comm->complete != number) return false;       // an earlier one of another stream
            sent.assign(send, send + send_bytes());
            const char *own = call.kind == ALL_GATHER && send == in_place() ? send : nullptr;
            for (size_t r = 0; r < recv_bytes() / std::max(part(), (size_t)1); r++)
                if (recv + r * part() != own) memset(recv + r * part(), POISON, part());
            calls.assign(comm->size, call);
#ifdef USE_MPI
            MPI_Iallgather(&call, sizeof call, MPI_BYTE, calls.data(), sizeof call, MPI_BYTE, comm->mpi, &request);
#endif
            state = COMPARING;
            if (settings.async) return false;
        }
#ifdef USE_MPI
        int there;
        PMPI_Test(&request, &there, MPI_STATUS_IGNORE);
        if (!there) return false;
#endif
        if (state == COMPARING) {
            for (int r = 0; r < comm->size; r++) if (memcmp(&calls[r], &call, sizeof call)) {
                host_error(cudaErrorUnknown, "nccl: nccl%s of %llu elements here, nccl%s of %llu in rank %d of %d",
                           kind_names[call.kind], (unsigned long long)call.count, kind_names[calls[r].kind],
                           (unsigned long long)calls[r].count, r, comm->size);
#ifdef USE_MPI
                MPI_Abort(MPI_COMM_WORLD, 86);
#endif
            }
            state = MOVING;
        } else {
            const size_t n = segment();
            write_back(n);
            at += n;
        }
        if (at == part()) { end(); return true; }
        exchange();
        return false;
    }
};

inline thread_local int group_depth = 0;                      // ncclGroupStart: calls are held until its ncclGroupEnd
inline thread_local std::vector<std::pair<ncclComm *, std::function<bool()>>> group;

inline ncclResult_t collective(Kind kind, const void *send, void *recv, size_t n, ncclDataType_t type, ncclComm *c,
                               cudaStream_t s) {
    const std::string name = std::string("nccl") + kind_names[kind];
    if (group_depth == 0 || !c) if (ncclResult_t r = nccl_ready(name.c_str(), c)) return r;
    const Call call = {(uint64_t)kind, (uint64_t)type, n};
    if (!n) return ncclSuccess;
    std::shared_ptr<Collective> work(new Collective{c, call, (const char *)send, (char *)recv, 0});
    const size_t out = work->send_bytes(), in = work->recv_bytes();
    if (!operand_ok(name.c_str(), "send buffer", send, out, DEVICE) ||
        !operand_ok(name.c_str(), "receive buffer", recv, in, DEVICE)) return ncclInvalidArgument;
    if (send != work->in_place() && work->send < work->recv + in && work->recv < work->send + out)
        return nccl_error(ncclInvalidUsage, name.c_str(), "buffers overlap, and not as in a call in place");
    if ((type != ncclFloat32 && type != ncclBfloat16) || ((uintptr_t)send | (uintptr_t)recv) % (call.bytes() / n))
        return nccl_error(ncclInvalidArgument, name.c_str(), "a type that is not here, or a misaligned buffer");
    const uint64_t bytes = std::max(in, out), ranks = c->size;
    Traffic &t = traffic[std::string("\"call\": \"") + kind_names[kind] + "\", \"type\": \"" +
        (type == ncclBfloat16 ? "bf16" : "float32") + "\", \"ranks\": " + std::to_string(ranks)];
    t.calls++;
    t.bytes += bytes;
    t.ring_bytes_sent += (kind == ALL_REDUCE ? 2 : 1) * (ranks - 1) * bytes / ranks;
    const auto begin = [=] {
        work->number = c->issued++;
        submit_steps(s, [work] { return work->step(); });
        return true;
    };
    if (group_depth) { group.emplace_back(c, begin); return ncclSuccess; }
    const ncclResult_t r = nccl_begin(c, begin);
    return sticky ? ncclUnhandledCudaError : r;
}
}  // namespace emu

inline ncclResult_t ncclAllReduce(const void *send, void *recv, size_t n, ncclDataType_t type, ncclRedOp_t, ncclComm_t c,
                                  cudaStream_t s) {
    return emu::collective(emu::ALL_REDUCE, send, recv, n, type, c, s);
}
// n elements for each rank: send has n of all ranks, recv n, in place at send + rank * n.
inline ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t n, ncclDataType_t type, ncclRedOp_t, ncclComm_t c,
                                      cudaStream_t s) {
    return emu::collective(emu::REDUCE_SCATTER, send, recv, n, type, c, s);
}
// n elements from each rank: recv has n of all ranks, send n, in place at recv + rank * n.
inline ncclResult_t ncclAllGather(const void *send, void *recv, size_t n, ncclDataType_t type, ncclComm_t c, cudaStream_t s) {
    return emu::collective(emu::ALL_GATHER, send, recv, n, type, c, s);
}
inline ncclResult_t ncclGroupStart() { emu::group_depth++; return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    if (!emu::group_depth) return emu::nccl_error(ncclInvalidUsage, "ncclGroupEnd", "no group has begun");
    if (--emu::group_depth) return ncclSuccess;
    auto calls = std::move(emu::group);
    emu::group.clear();
    ncclResult_t result = ncclSuccess;
    for (auto &it : calls) if (ncclResult_t r = emu::nccl_ready("ncclGroupEnd", it.first)) return r;
    for (auto &it : calls) if (emu::nccl_begin(it.first, it.second)) result = ncclInProgress;
    return emu::sticky ? ncclUnhandledCudaError : result;
}

#ifdef USE_MPI
// The device goes on while the host waits in MPI for its peers, whose collectives may need this rank's.
extern "C" inline int MPI_Test(MPI_Request *request, int *flag, MPI_Status *status) {
    emu::progress();
    return PMPI_Test(request, flag, status);
}
#endif
