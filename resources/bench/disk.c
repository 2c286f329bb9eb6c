// Reads and writes a disk past the page cache, for some seconds each way, and says how fast.
//     disk DEVICE SECONDS
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define DEPTH 16
#define LARGE (1 << 20)

struct job {
    size_t size;
    int write, random;
    uint64_t seed, done;
    char *buffer;
};

static const char *device;
static double seconds;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void *run(void *argument) {
    struct job *job = argument;
    int fd = open(device, (job->write ? O_WRONLY : O_RDONLY) | O_DIRECT);
    off_t blocks = lseek(fd, 0, SEEK_END) / (off_t)job->size, block = 0;
    if (fd < 0 || blocks <= 0) return NULL;
    for (double end = now() + seconds; now() < end; job->done++) {
        if (job->random) {
            job->seed = job->seed * 6364136223846793005 + 1442695040888963407;
            block = (job->seed >> 33) % blocks;
        } else {
            block = job->done % blocks;
        }
        off_t offset = block * job->size;
        ssize_t count = job->write ? pwrite(fd, job->buffer, job->size, offset) : pread(fd, job->buffer, job->size, offset);
        if (count != (ssize_t)job->size) return NULL;
    }
    close(fd);
    return job;
}

int main(int argc, char **argv) {
    static char buffers[DEPTH][LARGE] __attribute__((aligned(4096)));
    if (argc != 3) return 2;
    device = argv[1];
    seconds = atof(argv[2]);
    for (int depth = 1; depth <= DEPTH; depth *= DEPTH)
        for (int large = 0; large <= (depth == 1); large++)
            for (int random = depth > 1; random < 2; random++)
                for (int write = 0; write < 2; write++) {
                    struct job jobs[DEPTH];
                    pthread_t threads[DEPTH];
                    double start = now(), done = 0;
                    int failed = 0;
                    for (int i = 0; i < depth; i++) {
                        jobs[i] = (struct job){large ? LARGE : 4096, write, random, i + 1, 0, buffers[i]};
                        if (pthread_create(&threads[i], NULL, run, &jobs[i])) return 1;
                    }
                    for (int i = 0; i < depth; i++) {
                        void *ended;
                        pthread_join(threads[i], &ended);
                        failed |= !ended;
                        done += jobs[i].done;
                    }
                    const char *size = large ? "1 MiB" : "4 KiB";
                    const char *order = random ? "random" : "sequential", *way = write ? "writes" : "reads";
                    if (failed) printf("disk: %s %s %s failed\n", size, order, way);
                    else if (large) printf("bench: %.1f %s %s %s, MiB/s\n", done / (now() - start), size, order, way);
                    else printf("bench: %.0f %s %s %s, %d at once, 1/s\n", done / (now() - start), size, order, way, depth);
                    fflush(stdout);
                }
}
