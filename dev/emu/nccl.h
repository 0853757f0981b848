// nccl.h of dev/emu: the all-reduce a trainer uses, over MPI when built with -DUSE_MPI, else for one rank. Device memory is
// host memory here, so buffers go to MPI as they are. Sums run in rank order, so results do not depend on timing. Every call
// first compares the number of elements over the ranks: a mismatch is a report, no hang. A collective runs when its stream
// does (at once, without EMU_ASYNC) and blocks the host until all ranks are there.
#pragma once
#include "cuda_runtime.h"
#ifdef USE_MPI
#include <mpi.h>
#endif

enum ncclResult_t {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclInvalidArgument = 4, ncclInvalidUsage = 5, ncclInProgress = 7
};
enum ncclDataType_t { ncclFloat32 = 7 };
enum ncclRedOp_t { ncclSum = 0 };
struct ncclUniqueId { char internal[128]; };
struct ncclComm {
    int size;
#ifdef USE_MPI
    MPI_Comm mpi;
#endif
};
typedef ncclComm *ncclComm_t;

inline const char *ncclGetErrorString(ncclResult_t r) {
    return r == ncclSuccess ? "no error" : r == ncclInvalidArgument ? "invalid argument" : r == ncclInvalidUsage ?
        "invalid usage" : "unhandled error";
}
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {      // a number that the ranks of a communicator share
    static int count = 0;
    memset(id, 0, sizeof *id);
    ++count;
    memcpy(id->internal, &count, sizeof count);
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t *c, int size, ncclUniqueId id, int rank) {
    if (size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
    while (emu::hangs("nccl")) usleep(100000);
    *c = new ncclComm();
    int number, ranks = 1;
    memcpy(&number, id.internal, sizeof number);
#ifdef USE_MPI
    MPI_Comm_split(MPI_COMM_WORLD, number, rank, &(*c)->mpi);
    MPI_Comm_size((*c)->mpi, &ranks);
#endif
    (*c)->size = ranks;
    if (ranks == size) return ncclSuccess;
    emu::host_error(cudaErrorNotSupported, "nccl: %d ranks expected, %d have this id (several need a build with -DUSE_MPI)",
                    size, ranks);
    return ncclInvalidUsage;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t c) {
    cudaDeviceSynchronize();
#ifdef USE_MPI
    MPI_Comm_free(&c->mpi);
#endif
    delete c;
    return ncclSuccess;
}
inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *r) { *r = ncclSuccess; return ncclSuccess; }

namespace emu {
#ifdef USE_MPI
inline void all_reduce(const float *send, float *recv, size_t n, ncclComm *c) {
    std::vector<unsigned long long> counts(c->size);
    const unsigned long long mine = n;
    MPI_Allgather(&mine, 1, MPI_UNSIGNED_LONG_LONG, counts.data(), 1, MPI_UNSIGNED_LONG_LONG, c->mpi);
    for (int r = 0; r < c->size; r++)
        if (counts[r] != n) {
            host_error(cudaErrorUnknown, "nccl: ncclAllReduce of %zu elements here, of %llu in rank %d", n, counts[r], r);
            MPI_Abort(MPI_COMM_WORLD, 86);
        }
    const size_t segment = 1 << 20;                           // elements per MPI message
    std::vector<float> parts(c->size * (n < segment ? n : segment));
    for (size_t at = 0; at < n; at += segment) {
        const size_t k = n - at < segment ? n - at : segment;
        MPI_Allgather(send + at, (int)k, MPI_FLOAT, parts.data(), (int)k, MPI_FLOAT, c->mpi);
        for (size_t i = 0; i < k; i++) {
            float sum = parts[i];
            for (int r = 1; r < c->size; r++) sum += parts[r * k + i];
            recv[at + i] = sum;
        }
    }
}
#else
inline void all_reduce(const float *send, float *recv, size_t n, ncclComm *) { memmove(recv, send, n * sizeof *send); }
#endif
}  // namespace emu
inline ncclResult_t ncclAllReduce(const void *send, void *recv, size_t n, ncclDataType_t, ncclRedOp_t, ncclComm_t c,
                                  cudaStream_t s) {
    const size_t bytes = n * sizeof(float);
    if (!emu::operand_ok("ncclAllReduce", "send buffer", send, bytes, emu::DEVICE) ||
        !emu::operand_ok("ncclAllReduce", "receive buffer", recv, bytes, emu::DEVICE)) return ncclInvalidArgument;
    const cudaError_t e = emu::submit(s, [=] { emu::all_reduce((const float *)send, (float *)recv, n, c); });
    return e ? ncclUnhandledCudaError : ncclSuccess;
}
