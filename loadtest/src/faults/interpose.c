/* Faults of the machine, inside one process: slow and failing fsync, a wall clock that jumps.
 *
 * martlet-loadtest compiles this with `cc -shared` and names it in LD_PRELOAD. What it does is read from a page that the load
 * generator writes (the file in MARTLET_INTERPOSE, mapped shared), so that it changes while the process runs; what it did is
 * counted in the same page, so that a fault that met nobody is seen. All fields are 64 bits, in the machine's byte order.
 * Monotonic time is left alone: machines do not jump that. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct page {
    uint64_t delay_us; /* added to each fsync */
    uint64_t error;    /* errno of each fsync; 0: none */
    int64_t clock_s;   /* added to the wall clock */
    uint64_t loads;    /* processes that mapped this page */
    uint64_t delayed;  /* fsyncs that were delayed */
    uint64_t failed;   /* fsyncs that were failed */
    uint64_t shifted;  /* readings of a clock that was not 0 away */
};

static volatile struct page idle;
static volatile struct page *page = &idle;

static void count(volatile uint64_t *counter) { __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED); }

__attribute__((constructor)) static void map_page(void) {
    const char *path = getenv("MARTLET_INTERPOSE");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED) return;
    page = mapped;
    count(&page->loads);
}

/* 0: go on; else what errno was set to. */
static int meddle(void) {
    uint64_t delay = page->delay_us;
    if (delay) {
        count(&page->delayed);
        struct timespec rest = {(time_t)(delay / 1000000), (long)(delay % 1000000) * 1000};
        while (nanosleep(&rest, &rest) != 0 && errno == EINTR) {
        }
    }
    int error = (int)page->error;
    if (error) {
        count(&page->failed);
        errno = error;
    }
    return error;
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return meddle() ? -1 : real(fd);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return meddle() ? -1 : real(fd);
}

static int64_t shift(void) {
    int64_t by = page->clock_s;
    if (by) count(&page->shifted);
    return by;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(now, zone);
    if (result == 0 && now) now->tv_sec += shift();
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
