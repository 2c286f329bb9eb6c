/*
 * Writes what can be looked for when the machine was killed, and says what of it is safe: each number is printed when
 * fdatasync or fsync has returned, not before.
 *     journal SEED DISK [COUNT]           records, one after the other, with O_DIRECT
 *     journal SEED DIRECTORY files        files, each written beside its place, flushed and renamed, until it is killed
 * What is in them depends on SEED and their number alone (tests/crash/journal.rs has the same).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SECTOR = 512, WORDS = SECTOR / 8, SECTORS_MAX = 32, SLOTS = 8 };

static uint64_t seed;

/* The output function of SplitMix64. */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* What decides about number: word 0 its length, 1 what comes next, 2 the file's name; those of its data come after. */
static uint64_t word(uint64_t number, uint64_t index)
{
    return mix(mix(mix(seed) ^ number) ^ index);
}

/* Fills the buffer with the data of number; its sectors. */
static unsigned fill(uint64_t *buffer, uint64_t number)
{
    unsigned sectors = 1 + word(number, 0) % SECTORS_MAX;
    for (unsigned i = 0; i < sectors * WORDS; i++)
        buffer[i] = word(number, 3 + i);
    return sectors;
}

/* One write for each line: two programs may be printing. */
static void say(const char *what, uint64_t number)
{
    char line[64];
    int length = snprintf(line, sizeof line, "%s=%llu end\n", what, (unsigned long long)number);
    if (write(1, line, length) != length)
        exit(2);
}

static void fail(const char *what, uint64_t number)
{
    int error = errno;
    char line[128];
    int length = snprintf(line, sizeof line, "failed=%s %llu errno %d end\n", what, (unsigned long long)number, error);
    if (write(1, line, length) != length)
        exit(2);
    exit(1);
}

static void records(const char *disk, uint64_t count)
{
    uint64_t *buffer;
    off_t at = 0;
    int fd = open(disk, O_RDWR | O_DIRECT);
    if (fd < 0 || posix_memalign((void **)&buffer, 4096, SECTORS_MAX * SECTOR))
        fail("open", 0);
    for (uint64_t number = 0; number < count; number++) {
        size_t length = fill(buffer, number) * SECTOR;
        ssize_t written = pwrite(fd, buffer, length, at);
        if (written != (ssize_t)length)
            fail("write", number);
        at += length;
        /* Some are flushed together. */
        if (word(number, 1) % 4 && number != count - 1)
            continue;
        if (fdatasync(fd))
            fail("flush", number);
        say("record", number);
    }
}

static void files(const char *folder)
{
    uint64_t *buffer = malloc(SECTORS_MAX * SECTOR);
    char name[16], noise[16];
    int here = open(folder, O_RDONLY | O_DIRECTORY);
    if (!buffer || here < 0 || fchdir(here))
        fail("open", 0);
    for (uint64_t number = 0;; number++) {
        size_t length = fill(buffer, number) * SECTOR;
        int fd = open("next", O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd < 0 || write(fd, buffer, length) != (ssize_t)length || fsync(fd) || close(fd))
            fail("file", number);
        /* What nobody waits for. */
        snprintf(noise, sizeof noise, "noise%llu", (unsigned long long)word(number, 1) % SLOTS);
        fd = open(noise, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (fd < 0 || write(fd, buffer, length) != (ssize_t)length || close(fd))
            fail("noise", number);
        if (word(number, 1) % 3 == 0 && unlink(noise))
            fail("unlink", number);
        snprintf(name, sizeof name, "file%llu", (unsigned long long)word(number, 2) % SLOTS);
        if (rename("next", name) || fsync(here))
            fail("rename", number);
        say("file", number);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    seed = strtoull(argv[1], NULL, 0);
    if (argc > 3 && !strcmp(argv[3], "files"))
        files(argv[2]);
    else
        records(argv[2], argc > 3 ? strtoull(argv[3], NULL, 0) : UINT64_MAX);
    return 0;
}
