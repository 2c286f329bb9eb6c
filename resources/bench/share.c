// Uses a folder, and says how fast: one large file, then many small ones, each read again with cold caches.
//     share FOLDER MEBIBYTES FILES
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

#define LARGE (1 << 20)
#define SMALL 1024

static char buffer[LARGE];

static void forget_caches(void) {
    sync();
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    require(fd >= 0 && write(fd, "3", 1) == 1, "drop_caches");
    close(fd);
}

static int open_file(const char *name, int flags) {
    int fd = open(name, flags, 0644);
    require(fd >= 0, name);
    return fd;
}

static const char *small(int number) {
    static char name[32];
    snprintf(name, sizeof name, "small/%d", number);
    return name;
}

// Every measured part starts with cold caches, and ends when the host has what was written.
#define MEASURE(count, what)                                                                                           \
    for (double start = (forget_caches(), now()), once = 1; once;                                                      \
         printf("bench: %f %s\n", (count) / (now() - start), what), fflush(stdout), once = 0)

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int mebibytes = atoi(argv[2]), files = atoi(argv[3]);
    require(!chdir(argv[1]), argv[1]);
    memset(buffer, 'b', sizeof buffer);

    MEASURE(mebibytes, "share: 1 MiB writes, MiB/s") {
        int fd = open_file("large", O_WRONLY | O_CREAT | O_TRUNC);
        for (int i = 0; i < mebibytes; i++) require(write(fd, buffer, LARGE) == LARGE, "write");
        require(!fsync(fd), "fsync");
        close(fd);
    }
    MEASURE(mebibytes, "share: 1 MiB reads, MiB/s") {
        int fd = open_file("large", O_RDONLY);
        for (int i = 0; i < mebibytes; i++) require(read(fd, buffer, LARGE) == LARGE, "read");
        close(fd);
    }
    require(!mkdir("small", 0755), "small");
    MEASURE(files, "share: files of 1 KiB made, 1/s") for (int i = 0; i < files; i++) {
        int fd = open_file(small(i), O_WRONLY | O_CREAT | O_EXCL);
        require(write(fd, buffer, SMALL) == SMALL, "write");
        close(fd);
    }
    MEASURE(files, "share: files of 1 KiB read, 1/s") for (int i = 0; i < files; i++) {
        int fd = open_file(small(i), O_RDONLY);
        require(read(fd, buffer, SMALL) == SMALL, "read");
        close(fd);
    }
    MEASURE(files, "share: files listed and looked at, 1/s") {
        DIR *folder = opendir("small");
        struct stat stat;
        require(!!folder, "opendir");
        for (struct dirent *entry; (entry = readdir(folder));)
            require(!fstatat(dirfd(folder), entry->d_name, &stat, 0), entry->d_name);
        closedir(folder);
    }
    MEASURE(files, "share: files removed, 1/s") for (int i = 0; i < files; i++) require(!unlink(small(i)), "unlink");
    require(!rmdir("small") && !unlink("large"), "rmdir");
    return 0;
}
