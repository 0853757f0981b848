// Ranges for profilers (NVTX), without a profiler: EMU_NVTX=file gets a line per call, "push NAME" or "pop", each behind a space per
// range that is open; a pop too many is "pop of nothing", what is open at the end "left open NAME". Rank N > 0 writes file.rankN.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace emu {
struct Ranges {
    FILE *file = nullptr;
    std::vector<std::string> open;
    Ranges() {
        const char *path = getenv("EMU_NVTX"), *rank = getenv("OMPI_COMM_WORLD_RANK");
        if (!path || !*path) return;
        file = fopen((path + (rank && strcmp(rank, "0") ? std::string(".rank") + rank : "")).c_str(), "w");
        if (!file) fprintf(stderr, "emu: cannot write EMU_NVTX=%s\n", path);
    }
    ~Ranges() {
        for (const std::string &name : open) if (file) fprintf(file, "left open %s\n", name.c_str());
        if (file) fclose(file);
    }
};
inline Ranges ranges;
}  // namespace emu

inline int nvtxRangePushA(const char *name) {
    if (emu::ranges.file) fprintf(emu::ranges.file, "%*spush %s\n", (int)emu::ranges.open.size(), "", name);
    emu::ranges.open.push_back(name);
    return (int)emu::ranges.open.size() - 1;
}
inline int nvtxRangePop() {
    if (emu::ranges.open.empty()) {
        if (emu::ranges.file) fprintf(emu::ranges.file, "pop of nothing\n");
        return -2;
    }
    emu::ranges.open.pop_back();
    if (emu::ranges.file) fprintf(emu::ranges.file, "%*spop\n", (int)emu::ranges.open.size(), "");
    return (int)emu::ranges.open.size();
}
