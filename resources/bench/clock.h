// What the programs that run in guests have in common: time, and the end when something fails.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static inline double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static inline void require(int good, const char *what) {
    if (good) return;
    perror(what);
    exit(1);
}
