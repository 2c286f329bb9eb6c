/*
 * For LD_PRELOAD: of what a disk's thread asks for with pread(2), preadv(2), pwrite(2) and pwritev(2), the first read fails, and
 * the third write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int reads, writes;

static ssize_t read_by(long number, int fd, const void *what, size_t count, off_t offset)
{
    if (++reads == 1) {
        errno = EIO;
        return -1;
    }
    return syscall(number, fd, what, count, offset, 0L);
}

static ssize_t write_by(long number, int fd, const void *what, size_t count, off_t offset)
{
    if (++writes == 3) {
        errno = ENOSPC;
        return -1;
    }
    return syscall(number, fd, what, count, offset, 0L);
}

ssize_t pread(int fd, void *buffer, size_t len, off_t offset) { return read_by(SYS_pread64, fd, buffer, len, offset); }
ssize_t pwrite(int fd, const void *buffer, size_t len, off_t offset) { return write_by(SYS_pwrite64, fd, buffer, len, offset); }
ssize_t preadv(int fd, const struct iovec *list, int count, off_t offset) { return read_by(SYS_preadv, fd, list, count, offset); }
ssize_t pwritev(int fd, const struct iovec *list, int count, off_t offset) { return write_by(SYS_pwritev, fd, list, count, offset); }
