/*
 * Checks what a shell cannot of a file system: locks, mappings, holes, extended attributes, times, changing directories.
 *     files DIRECTORY [attributes]
 *     files DIRECTORY read-only       of one with what the above made, which cannot be written to
 * Ends with 1 at the first thing that is not as POSIX or Linux has it, and says which.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define REQUIRE(so)                                                                                                    \
    do {                                                                                                               \
        if (!(so)) {                                                                                                   \
            fprintf(stderr, "line %d: %s: %s\n", __LINE__, #so, strerror(errno));                                      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
#define FAILS(call, error) REQUIRE((call) == -1 && errno == (error))

enum { PAGE = 4096, MANY = 1000 };

static int make(const char *name)
{
    int fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0644);
    REQUIRE(fd >= 0);
    return fd;
}

/* Runs a check in another process. */
static void elsewhere(void (*check)(void))
{
    int status;
    pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        check();
        exit(0);
    }
    REQUIRE(waitpid(child, &status, 0) == child && status == 0);
}

static struct flock range(short type, off_t start)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = 10};
}

static void find_locks(void)
{
    struct flock taken = range(F_WRLCK, 0), free = range(F_WRLCK, 20);
    int fd = open("locked", O_RDWR);
    REQUIRE(fd >= 0);
    FAILS(flock(fd, LOCK_EX | LOCK_NB), EWOULDBLOCK);
    FAILS(fcntl(fd, F_SETLK, &taken), EAGAIN);
    REQUIRE(fcntl(fd, F_SETLK, &free) == 0);
    REQUIRE(fcntl(fd, F_GETLK, &taken) == 0 && taken.l_type == F_WRLCK && taken.l_pid == getppid());
}

static void find_none(void)
{
    struct flock free = range(F_WRLCK, 0);
    int fd = open("locked", O_RDWR);
    REQUIRE(flock(fd, LOCK_EX | LOCK_NB) == 0);
    REQUIRE(fcntl(fd, F_SETLK, &free) == 0);
}

static void locks(void)
{
    struct flock mine = range(F_WRLCK, 0);
    int fd = make("locked");
    REQUIRE(flock(fd, LOCK_EX) == 0);
    REQUIRE(fcntl(fd, F_SETLK, &mine) == 0);
    elsewhere(find_locks);
    close(fd);
    elsewhere(find_none);
}

static void mapping(void)
{
    char byte;
    int fd = make("mapped");
    REQUIRE(ftruncate(fd, 3 * PAGE) == 0);
    char *shared = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *private = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    REQUIRE(shared != MAP_FAILED && private != MAP_FAILED);
    private[0] = 'p';
    shared[PAGE] = 's';
    REQUIRE(pread(fd, &byte, 1, PAGE) == 1 && byte == 's');
    REQUIRE(pwrite(fd, "w", 1, 2 * PAGE) == 1 && shared[2 * PAGE] == 'w');
    REQUIRE(msync(shared, 3 * PAGE, MS_SYNC) == 0);
    REQUIRE(munmap(shared, 3 * PAGE) == 0 && close(fd) == 0);
    fd = open("mapped", O_RDONLY);
    REQUIRE(pread(fd, &byte, 1, 0) == 1 && byte == 0);
    REQUIRE(pread(fd, &byte, 1, PAGE) == 1 && byte == 's');
    close(fd);
}

static void holes(void)
{
    struct stat before, after;
    char data[64 << 10];
    int fd = make("sparse");
    memset(data, 'd', sizeof data);
    REQUIRE(pwrite(fd, data, sizeof data, 1 << 20) == sizeof data);
    REQUIRE(ftruncate(fd, 4 << 20) == 0);
    REQUIRE(lseek(fd, 0, SEEK_DATA) == 1 << 20);
    REQUIRE(lseek(fd, 1 << 20, SEEK_HOLE) == (1 << 20) + (off_t)sizeof data);
    FAILS(lseek(fd, 2 << 20, SEEK_DATA), ENXIO);
    REQUIRE(fstat(fd, &before) == 0 && before.st_size == 4 << 20 && before.st_blocks * 512 < 1 << 20);
    REQUIRE(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 32 << 10) == 0);
    REQUIRE(fstat(fd, &after) == 0 && after.st_size == before.st_size && after.st_blocks < before.st_blocks);
    REQUIRE(pread(fd, data, sizeof data, 1 << 20) == sizeof data && data[0] == 0 && data[32 << 10] == 'd');
    REQUIRE(fallocate(fd, 0, 4 << 20, PAGE) == 0);
    REQUIRE(fstat(fd, &after) == 0 && after.st_size == (4 << 20) + PAGE);
    REQUIRE(fallocate(fd, FALLOC_FL_KEEP_SIZE, 8 << 20, PAGE) == 0);
    REQUIRE(fstat(fd, &after) == 0 && after.st_size == (4 << 20) + PAGE);
    close(fd);
}

static void attributes(void)
{
    static char large[(64 << 10) + 1];
    char value[100], name[257] = "user.";
    const int most = 64 << 10;
    close(make("attributes"));
    REQUIRE(setxattr("attributes", "user.one", "1\0one", 5, XATTR_CREATE) == 0);
    FAILS(setxattr("attributes", "user.one", "x", 1, XATTR_CREATE), EEXIST);
    FAILS(setxattr("attributes", "user.two", "x", 1, XATTR_REPLACE), ENODATA);
    REQUIRE(setxattr("attributes", "user.two", "", 0, 0) == 0);
    REQUIRE(getxattr("attributes", "user.one", NULL, 0) == 5);
    FAILS(getxattr("attributes", "user.one", value, 4), ERANGE);
    REQUIRE(getxattr("attributes", "user.one", value, sizeof value) == 5 && memcmp(value, "1\0one", 5) == 0);
    REQUIRE(getxattr("attributes", "user.two", value, sizeof value) == 0);
    REQUIRE(listxattr("attributes", value, sizeof value) == 18);
    REQUIRE(removexattr("attributes", "user.one") == 0);
    FAILS(getxattr("attributes", "user.one", value, sizeof value), ENODATA);
    FAILS(setxattr("attributes", "trusted.one", "x", 1, 0), EOPNOTSUPP);
    memset(large, 'l', most);
    /* Not every file system has room for it; then nothing changes. */
    if (setxattr("attributes", "user.large", large, most, 0) == 0)
        REQUIRE(getxattr("attributes", "user.large", large, most) == most && large[1] == 'l');
    else
        REQUIRE((errno == ENOSPC || errno == E2BIG) && listxattr("attributes", NULL, 0) == 9);
    FAILS(setxattr("attributes", "user.larger", large, most + 1, 0), E2BIG);
    memset(name + 5, 'n', 251);
    FAILS(setxattr("attributes", name, "x", 1, 0), ERANGE);
    name[255] = '\0';
    REQUIRE(setxattr("attributes", name, "x", 1, 0) == 0 && removexattr("attributes", name) == 0);
    FAILS(removexattr("attributes", "user.none"), ENODATA);
    REQUIRE(mkdir("folder", 0755) == 0 && setxattr("folder", "user.folder", "x", 1, 0) == 0);
    REQUIRE(getxattr("folder", "user.folder", value, sizeof value) == 1 && value[0] == 'x');
}

static void read_only(void)
{
    char value[100];
    REQUIRE(getxattr("attributes", "user.two", value, sizeof value) == 0);
    REQUIRE(getxattr("folder", "user.folder", value, sizeof value) == 1 && value[0] == 'x');
    REQUIRE(listxattr("folder", value, sizeof value) == 12);
    FAILS(setxattr("folder", "user.folder", "y", 1, 0), EROFS);
    FAILS(setxattr("folder", "user.new", "x", 1, 0), EROFS);
    FAILS(removexattr("folder", "user.folder"), EROFS);
}

static void times(void)
{
    struct stat stat;
    struct timespec set[2] = {{.tv_sec = 1000000000, .tv_nsec = 123456789}, {.tv_sec = 2000000000, .tv_nsec = 1}};
    struct timespec part[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 5, .tv_nsec = 999999999}};
    close(make("times"));
    REQUIRE(utimensat(AT_FDCWD, "times", set, 0) == 0);
    REQUIRE(lstat("times", &stat) == 0);
    REQUIRE(stat.st_atim.tv_sec == 1000000000 && stat.st_atim.tv_nsec == 123456789);
    REQUIRE(stat.st_mtim.tv_sec == 2000000000 && stat.st_mtim.tv_nsec == 1);
    REQUIRE(utimensat(AT_FDCWD, "times", part, 0) == 0 && lstat("times", &stat) == 0);
    REQUIRE(stat.st_atim.tv_nsec == 123456789 && stat.st_mtim.tv_sec == 5 && stat.st_mtim.tv_nsec == 999999999);
    REQUIRE(symlink("times", "link") == 0 && utimensat(AT_FDCWD, "link", set, AT_SYMLINK_NOFOLLOW) == 0);
    REQUIRE(lstat("link", &stat) == 0 && S_ISLNK(stat.st_mode) && stat.st_mtim.tv_nsec == 1);
}

static void many(void)
{
    static char seen[MANY];
    char name[32];
    int found = 0;
    REQUIRE(mkdir("many", 0755) == 0);
    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof name, "many/file-%d", i);
        close(make(name));
    }
    DIR *directory = opendir("many");
    REQUIRE(directory);
    for (struct dirent *entry; (entry = readdir(directory));) {
        int number;
        if (sscanf(entry->d_name, "file-%d", &number) != 1)
            continue;
        REQUIRE(!seen[number] && entry->d_type == DT_REG);
        seen[number] = 1;
        found++;
        /* Those that are removed meanwhile leave no other out. */
        snprintf(name, sizeof name, "many/file-%d", number);
        REQUIRE(unlink(name) == 0);
    }
    REQUIRE(found == MANY);
    closedir(directory);
    REQUIRE(rmdir("many") == 0);
}

static void removed(void)
{
    char text[5];
    int fd = make("removed");
    REQUIRE(unlink("removed") == 0 && write(fd, "still", 5) == 5 && pread(fd, text, 5, 0) == 5);
    REQUIRE(memcmp(text, "still", 5) == 0 && ftruncate(fd, 2) == 0 && fchmod(fd, 0600) == 0);
    struct stat found;
    REQUIRE(fstat(fd, &found) == 0 && found.st_nlink == 0 && found.st_size == 2 && (found.st_mode & 0777) == 0600);
    close(fd);
    FAILS(open("removed", O_RDONLY), ENOENT);

    fd = make("kept");
    REQUIRE(write(fd, "new", 3) == 3 && rename("kept", "renamed") == 0 && write(fd, "er", 2) == 2);
    close(make("kept"));
    REQUIRE(renameat2(AT_FDCWD, "kept", AT_FDCWD, "renamed", RENAME_EXCHANGE) == 0);
    REQUIRE(stat("kept", &found) == 0 && found.st_size == 5);
    FAILS(renameat2(AT_FDCWD, "kept", AT_FDCWD, "renamed", RENAME_NOREPLACE), EEXIST);
    close(fd);
}

static void appending(void)
{
    struct stat stat;
    int one = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644), other = open("log", O_WRONLY | O_APPEND);
    for (int i = 0; i < 100; i++)
        REQUIRE(write(i % 2 ? one : other, "line\n", 5) == 5);
    REQUIRE(fstat(one, &stat) == 0 && stat.st_size == 500);
}

int main(int count, char **arguments)
{
    REQUIRE(count >= 2 && chdir(arguments[1]) == 0);
    if (count > 2 && strcmp(arguments[2], "read-only") == 0) {
        read_only();
        return 0;
    }
    locks();
    mapping();
    holes();
    if (count > 2)
        attributes();
    times();
    removed();
    appending();
    many();
    puts("all is as it has to be");
    return 0;
}
