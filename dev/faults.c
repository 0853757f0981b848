// Preloaded into each rank by dev/faults.py: strikes at a chosen call of a chosen rank. In the environment:
//     FAULT_DIR    a folder: rank R leaves its process id in FAULT_DIR/R, and a strike leaves FAULT_DIR/struck
//     FAULT_OUT    the run's --out, with a / at its end
//     FAULT        "RANK WHEN N DELAY WHAT VICTIM": at the N-th call of kind WHEN in rank RANK, DELAY microseconds later,
//                  signal WHAT goes to VICTIM: rank 0, 1, ..., -1 all ranks, -2 mpirun, -3 the process in FAULT_DIR/launcher;
//                  or, with a negative WHAT, this call fails by errno -WHAT, and with VICTIM 1 every later one of its kind;
//                  or, with WHAT 0, this call and every later one of its kind takes DELAY microseconds more.
// Kinds of calls are told by what they do and where, not by names of files: checkpoints may change theirs.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const kinds[] = {"load", "train", "val", "log", "read", "create", "write", "sync", "rename", "remove"};
enum { LOAD, TRAIN, VAL, LOG, READ, CREATE, WRITE, SYNC, RENAME, REMOVE, NONE };
static struct { int on, rank, when, n, delay, what, victim; } fault;
static const char *fault_dir, *out;
static int calls;

static int number_in(const char *name) {
    char path[PATH_MAX];
    int number = 0;
    snprintf(path, sizeof path, "%s/%s", fault_dir, name);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%d", &number) != 1) number = 0;
    if (f) fclose(f);
    return number;
}

static void leave_number(const char *name, int number) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", fault_dir, name);
    FILE *f = fopen(path, "w");
    if (!f) return;
    fprintf(f, "%d\n", number);
    fclose(f);
}

static int send_to(int pid) { return pid > 1 && !kill(pid, fault.what); }

static void *strike(void *unused) {
    char name[16];
    int struck = 0, world = getenv("OMPI_COMM_WORLD_SIZE") ? atoi(getenv("OMPI_COMM_WORLD_SIZE")) : 1;
    usleep((useconds_t)fault.delay);
    leave_number("struck", 1);                  // first: what follows may end this process
    if (fault.victim == -2) struck = send_to(getppid());
    if (fault.victim == -3) struck = send_to(number_in("launcher"));
    for (int r = 0; r < world; r++) {           // this rank last
        snprintf(name, sizeof name, "%d", (fault.rank + 1 + r) % world);
        if (fault.victim == -1 || fault.victim == atoi(name)) struck += send_to(number_in(name));
    }
    if (!struck) leave_number("struck", 0);     // nobody was there yet
    return unused;
}

// A call of this kind: errno that it has to fail with, 0 = let it go on.
static int call_is(int kind) {
    if (!fault.on || kind != fault.when) return 0;
    const int n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (!fault.what) {
        if (n >= fault.n) usleep((useconds_t)fault.delay);
        return 0;
    }
    if (fault.what < 0) {
        if (n == fault.n) leave_number("struck", 1);
        return n == fault.n || (n > fault.n && fault.victim) ? -fault.what : 0;
    }
    pthread_t thread;
    if (n == fault.n && !fault.delay) strike(NULL);
    else if (n == fault.n && !pthread_create(&thread, NULL, strike, NULL)) pthread_detach(thread);
    return 0;
}

static int is_in_out(const char *path) { return out && path && !strncmp(path, out, strlen(out)); }

static int kind_of_fd(int fd, int writes) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return NONE;
    path[n] = 0;
    if (strstr(path, "/train_")) return TRAIN;
    if (strstr(path, "/val_")) return VAL;
    if (!is_in_out(path) || strstr(path, "/lock")) return NONE;
    return strstr(path, "/log.jsonl") ? LOG : writes ? WRITE : READ;
}

static int is_fd_in_out(int fd) { return kind_of_fd(fd, 0) == READ; }

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("FAULT"), *rank = getenv("OMPI_COMM_WORLD_RANK"), *now = rank ? rank : "0";
    char when[16] = "";
    fault_dir = getenv("FAULT_DIR");
    out = getenv("FAULT_OUT");
    if (!fault_dir) return;
    leave_number(now, getpid());
    if (!text || sscanf(text, "%d %15s %d %d %d %d", &fault.rank, when, &fault.n, &fault.delay, &fault.what,
                        &fault.victim) != 6) return;
    while (fault.when < NONE && strcmp(kinds[fault.when], when)) fault.when++;
    fault.on = fault.rank == atoi(now);
    call_is(LOAD);
}

// Each function of the C library as before, but for `kind`.
#define REAL(name, type, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define WRAP(name, type, kind, types, names, ...) \
    type name types { \
        const int failed = call_is(kind); \
        if (failed) { errno = failed; return -1; } \
        return REAL(name, type, __VA_ARGS__) names; \
    }
WRAP(pread, ssize_t, kind_of_fd(fd, 0), (int fd, void *p, size_t n, off_t at), (fd, p, n, at), int, void *, size_t, off_t)
WRAP(pwrite, ssize_t, kind_of_fd(fd, 1), (int fd, const void *p, size_t n, off_t at), (fd, p, n, at),
     int, const void *, size_t, off_t)
WRAP(write, ssize_t, kind_of_fd(fd, 1), (int fd, const void *p, size_t n), (fd, p, n), int, const void *, size_t)
WRAP(fsync, int, is_fd_in_out(fd) ? SYNC : NONE, (int fd), (fd), int)
WRAP(fdatasync, int, is_fd_in_out(fd) ? SYNC : NONE, (int fd), (fd), int)
WRAP(mkdir, int, is_in_out(path) ? CREATE : NONE, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
WRAP(rename, int, is_in_out(from) ? RENAME : NONE, (const char *from, const char *to), (from, to), const char *, const char *)
WRAP(unlinkat, int, is_fd_in_out(fd) ? REMOVE : NONE, (int fd, const char *path, int flags), (fd, path, flags),
     int, const char *, int)
WRAP(rmdir, int, is_in_out(path) ? REMOVE : NONE, (const char *path), (path), const char *)

static int open_with(const char *path, int flags, mode_t mode) {
    const int creates = is_in_out(path) && flags & O_CREAT && !strstr(path, "/lock") && !strstr(path, "/log.jsonl");
    const int failed = creates ? call_is(CREATE) : 0;
    if (failed) { errno = failed; return -1; }
    return REAL(open, int, const char *, int, ...)(path, flags, mode);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        return open_with(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
