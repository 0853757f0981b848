// nccl.h of dev/emu: the collectives a trainer uses, over MPI when built with -DUSE_MPI, else for one rank. Device memory is host
// memory here, so buffers go to MPI as they are. Sums run in rank order in fp32 (bf16 is rounded once, at the end), so results
// do not depend on timing. Every call first compares operation, count and type over the ranks: a mismatch is a report, no hang.
// Collectives run when the stream runs them (at once, without EMU_ASYNC) and block the host until all ranks are there.
#pragma once
#include "cuda_bf16.h"
#ifdef USE_MPI
#include <mpi.h>
#endif

#define NCCL_MAJOR 2
#define NCCL_MINOR 27
#define NCCL_PATCH 0
#define NCCL_VERSION_CODE 22700
#define NCCL_UNIQUE_ID_BYTES 128
enum ncclResult_t {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4,
    ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7
};
enum ncclDataType_t {
    ncclInt8 = 0, ncclChar = 0, ncclUint8 = 1, ncclInt32 = 2, ncclInt = 2, ncclUint32 = 3, ncclInt64 = 4, ncclUint64 = 5,
    ncclFloat16 = 6, ncclHalf = 6, ncclFloat32 = 7, ncclFloat = 7, ncclFloat64 = 8, ncclDouble = 8, ncclBfloat16 = 9
};
enum ncclRedOp_t { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 };
struct ncclUniqueId { char internal[NCCL_UNIQUE_ID_BYTES]; };
struct ncclConfig_t { int blocking; };
#define NCCL_CONFIG_INITIALIZER {1}
struct ncclComm {
    int rank, size;
#ifdef USE_MPI
    MPI_Comm mpi;
#endif
};
typedef ncclComm *ncclComm_t;

namespace emu {
inline size_t nccl_size(ncclDataType_t t) {
    return t <= ncclUint8 ? 1 : t <= ncclUint32 || t == ncclFloat32 ? 4 : t == ncclFloat16 || t == ncclBfloat16 ? 2 : 8;
}
// out[i] = reduction over ranks r = 0, 1, ... of parts[r * n + i]
template <typename T, typename S> inline void nccl_reduce(void *out, const void *parts, size_t n, int ranks, ncclRedOp_t op) {
    for (size_t i = 0; i < n; i++) {
        S s = (S)((const T *)parts)[i];
        for (int r = 1; r < ranks; r++) {
            const S v = (S)((const T *)parts)[(size_t)r * n + i];
            s = op == ncclMax ? (v > s ? v : s) : op == ncclMin ? (v < s ? v : s) : op == ncclProd ? s * v : s + v;
        }
        ((T *)out)[i] = (T)(op == ncclAvg ? s / (S)ranks : s);
    }
}
inline void nccl_reduce_any(void *out, const void *parts, size_t n, int ranks, ncclDataType_t t, ncclRedOp_t op) {
    switch (t) {
    case ncclFloat32: nccl_reduce<float, float>(out, parts, n, ranks, op); break;
    case ncclBfloat16: nccl_reduce<__nv_bfloat16, float>(out, parts, n, ranks, op); break;
    case ncclFloat64: nccl_reduce<double, double>(out, parts, n, ranks, op); break;
    case ncclInt32: nccl_reduce<int, int>(out, parts, n, ranks, op); break;
    case ncclUint32: nccl_reduce<unsigned, unsigned>(out, parts, n, ranks, op); break;
    case ncclInt64: nccl_reduce<int64_t, int64_t>(out, parts, n, ranks, op); break;
    case ncclUint64: nccl_reduce<uint64_t, uint64_t>(out, parts, n, ranks, op); break;
    case ncclUint8: nccl_reduce<uint8_t, unsigned>(out, parts, n, ranks, op); break;
    default: host_error(cudaErrorNotSupported, "nccl: reduction of data type %d", (int)t);
    }
}
enum { NCCL_SEGMENT = 1 << 20 };                              // elements per MPI message
inline bool nccl_agree(ncclComm *c, const char *what, size_t n, int type, int op) {
#ifdef USE_MPI
    std::vector<uint64_t> all(4 * (size_t)c->size);
    uint64_t mine[4] = {(uint64_t)what[0] << 16 | (uint64_t)what[3] << 8 | (uint64_t)what[6], n, (uint64_t)type, (uint64_t)op};
    MPI_Allgather(mine, 4, MPI_UINT64_T, all.data(), 4, MPI_UINT64_T, c->mpi);
    for (int r = 0; r < c->size; r++)
        if (memcmp(&all[4 * (size_t)r], mine, sizeof mine)) {
            host_error(cudaErrorUnknown, "nccl: rank %d calls nccl%s of %zu elements, rank %d calls another one (%llu elements)",
                c->rank, what, n, r, (unsigned long long)all[4 * (size_t)r + 1]);
            MPI_Abort(MPI_COMM_WORLD, 86);
        }
#else
    (void)c; (void)what; (void)n; (void)type; (void)op;
#endif
    return true;
}
// recv (n) = reduction of the ranks' send[rank * n ...]; send holds size * n elements
inline void nccl_scatter_now(const char *send, char *recv, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm *c) {
    const size_t e = nccl_size(t);
#ifdef USE_MPI
    std::vector<char> out((size_t)c->size * NCCL_SEGMENT * e), in(out.size());
    for (size_t at = 0; at < n; at += NCCL_SEGMENT) {
        const size_t k = n - at < (size_t)NCCL_SEGMENT ? n - at : (size_t)NCCL_SEGMENT;
        for (int r = 0; r < c->size; r++) memcpy(&out[(size_t)r * k * e], send + ((size_t)r * n + at) * e, k * e);
        MPI_Alltoall(out.data(), (int)(k * e), MPI_BYTE, in.data(), (int)(k * e), MPI_BYTE, c->mpi);
        nccl_reduce_any(recv + at * e, in.data(), k, c->size, t, op);
    }
#else
    (void)op; (void)c;
    memmove(recv, send, n * e);
#endif
}
inline void nccl_gather_now(const char *send, char *recv, size_t bytes, ncclComm *c) {
    memmove(recv + (size_t)c->rank * bytes, send, bytes);
#ifdef USE_MPI
    for (int r = 0; r < c->size; r++)
        for (size_t at = 0; at < bytes; at += (size_t)NCCL_SEGMENT * 4)
            MPI_Bcast(recv + (size_t)r * bytes + at, (int)(bytes - at < (size_t)NCCL_SEGMENT * 4 ?
                bytes - at : (size_t)NCCL_SEGMENT * 4), MPI_BYTE, r, c->mpi);
#endif
}
inline ncclResult_t nccl_submit(const char *what, const void *send, size_t send_bytes, void *recv, size_t recv_bytes,
    cudaStream_t s, std::function<void()> run) {
    if (!operand_ok(what, "send buffer", send, send_bytes, 1) || !operand_ok(what, "receive buffer", recv, recv_bytes,
        1)) return ncclInvalidArgument;
    return submit(s, std::move(run)) ? ncclUnhandledCudaError : ncclSuccess;
}
}  // namespace emu

inline const char *ncclGetErrorString(ncclResult_t r) {
    return r == ncclSuccess ? "no error" : r == ncclInvalidArgument ? "invalid argument" : r == ncclInvalidUsage ?
        "invalid usage" : "unhandled error";
}
inline const char *ncclGetLastError(ncclComm_t) { return ""; }
inline ncclResult_t ncclGetVersion(int *v) { *v = NCCL_VERSION_CODE; return ncclSuccess; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {      // holds the world rank of its maker and a number
    static int count = 0;
    int tag[2] = {0, ++count};
    memset(id, 0, sizeof *id);
#ifdef USE_MPI
    MPI_Comm_rank(MPI_COMM_WORLD, &tag[0]);
#endif
    memcpy(id->internal, tag, sizeof tag);
    return ncclSuccess;
}
// The maker of the id must be one of the ranks: it collects the world ranks of the others and tells them all.
inline ncclResult_t ncclCommInitRank(ncclComm_t *c, int size, ncclUniqueId id, int rank) {
    if (size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
    *c = new ncclComm();
    (*c)->rank = rank;
    (*c)->size = size;
#ifdef USE_MPI
    int maker[2], me[2] = {rank, 0};
    memcpy(maker, id.internal, sizeof maker);
    const int tag = 20000 + maker[1];
    std::vector<int> members(size);
    MPI_Comm_rank(MPI_COMM_WORLD, &me[1]);
    if (me[1] != maker[0]) {
        MPI_Send(me, 2, MPI_INT, maker[0], tag, MPI_COMM_WORLD);
        MPI_Recv(members.data(), size, MPI_INT, maker[0], tag + 10000, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    } else {
        members[rank] = me[1];
        for (int i = 1, other[2]; i < size; i++) {
            MPI_Recv(other, 2, MPI_INT, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
            members[other[0]] = other[1];
        }
        for (int r = 0; r < size; r++)
            if (r != rank) MPI_Send(members.data(), size, MPI_INT, members[r], tag + 10000, MPI_COMM_WORLD);
    }
    MPI_Group world, group;
    MPI_Comm_group(MPI_COMM_WORLD, &world);
    MPI_Group_incl(world, size, members.data(), &group);
    MPI_Comm_create_group(MPI_COMM_WORLD, group, tag, &(*c)->mpi);
    MPI_Group_free(&group);
    MPI_Group_free(&world);
#else
    (void)id;
    if (size > 1) {
        emu::host_error(cudaErrorNotSupported, "nccl: %d ranks need a build with -DUSE_MPI", size);
        return ncclInvalidUsage;
    }
#endif
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int size, ncclUniqueId id, int rank, ncclConfig_t *) {
    return ncclCommInitRank(c, size, id, rank);
}
inline ncclResult_t ncclCommSplit(ncclComm_t c, int color, int key, ncclComm_t *out, ncclConfig_t *) {
    *out = new ncclComm(*c);
#ifdef USE_MPI
    MPI_Comm_split(c->mpi, color < 0 ? MPI_UNDEFINED : color, key, &(*out)->mpi);
    if (color >= 0) { MPI_Comm_rank((*out)->mpi, &(*out)->rank); MPI_Comm_size((*out)->mpi, &(*out)->size); }
#else
    (void)key;
#endif
    if (color < 0) { delete *out; *out = nullptr; }
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    cudaDeviceSynchronize();
#ifdef USE_MPI
    int over = 0;
    MPI_Finalized(&over);
    if (!over) MPI_Comm_free(&c->mpi);
#endif
    delete c;
    return ncclSuccess;
}
inline ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
inline ncclResult_t ncclCommAbort(ncclComm_t c) { delete c; return ncclSuccess; }     // MPI's side stays: peers may be dead
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *r) { *r = ncclSuccess; return ncclSuccess; }
inline ncclResult_t ncclCommCount(ncclComm_t c, int *n) { *n = c->size; return ncclSuccess; }
inline ncclResult_t ncclCommUserRank(ncclComm_t c, int *r) { *r = c->rank; return ncclSuccess; }
inline ncclResult_t ncclGroupStart() { return ncclSuccess; }                          // calls of a group run one after the other
inline ncclResult_t ncclGroupEnd() { return ncclSuccess; }

inline ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
    cudaStream_t s) {
    const size_t bytes = n * emu::nccl_size(t);
    return emu::nccl_submit("ncclReduceScatter", send, bytes * c->size, recv, bytes, s, [=] {
        emu::nccl_agree(c, "ReduceScatter", n, t, op);
        emu::nccl_scatter_now((const char *)send, (char *)recv, n, t, op, c);
    });
}
inline ncclResult_t ncclAllGather(const void *send, void *recv, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
    const size_t bytes = n * emu::nccl_size(t);
    return emu::nccl_submit("ncclAllGather", send, bytes, recv, bytes * c->size, s, [=] {
        emu::nccl_agree(c, "AllGather", n, t, 0);
        emu::nccl_gather_now((const char *)send, (char *)recv, bytes, c);
    });
}
inline ncclResult_t ncclAllReduce(const void *send, void *recv, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                                  cudaStream_t s) {
    const size_t e = emu::nccl_size(t);
    return emu::nccl_submit("ncclAllReduce", send, n * e, recv, n * e, s, [=] {
        const size_t chunk = (n + c->size - 1) / c->size;     // reduce-scatter of equal chunks, then gather
        std::vector<char> padded(chunk * e * c->size), mine(chunk * e);
        memcpy(padded.data(), send, n * e);
        emu::nccl_agree(c, "AllReduce", n, t, op);
        emu::nccl_scatter_now(padded.data(), mine.data(), chunk, t, op, c);
        emu::nccl_gather_now(mine.data(), padded.data(), chunk * e, c);
        memcpy(recv, padded.data(), n * e);
    });
}
inline ncclResult_t ncclBroadcast(const void *send, void *recv, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                                  cudaStream_t s) {
    const size_t bytes = n * emu::nccl_size(t);
    return emu::nccl_submit("ncclBroadcast", c->rank == root ? send : recv, bytes, recv, bytes, s, [=] {
        emu::nccl_agree(c, "Broadcast", n, t, root);
        if (c->rank == root) memmove(recv, send, bytes);
#ifdef USE_MPI
        for (size_t at = 0; at < bytes; at += (size_t)emu::NCCL_SEGMENT * 4)
            MPI_Bcast((char *)recv + at, (int)(bytes - at < (size_t)emu::NCCL_SEGMENT * 4 ?
                bytes - at : (size_t)emu::NCCL_SEGMENT * 4), MPI_BYTE, root, c->mpi);
#endif
    });
}
inline ncclResult_t ncclBcast(void *buffer, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
    return ncclBroadcast(buffer, buffer, n, t, root, c, s);
}
