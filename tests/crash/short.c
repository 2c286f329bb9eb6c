/*
 * For LD_PRELOAD: pread(2), preadv(2), pwrite(2) and pwritev(2) that move fewer bytes than they were asked to, which need not be sectors, and that
 * a signal interrupts now and then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LONGEST = 1500 };

static ssize_t some(long number, int fd, const struct iovec *list, int count, off_t offset)
{
    static __thread unsigned calls;
    struct iovec first = {0};
    if (++calls % 3 == 0) {
        errno = EINTR;
        return -1;
    }
    for (int i = 0; i < count && !first.iov_len; i++)
        first = list[i];
    if (first.iov_len > LONGEST)
        first.iov_len = LONGEST;
    return syscall(number, fd, &first, 1, offset, 0L);
}

static ssize_t some_of_one(long number, int fd, const void *buffer, size_t len, off_t offset)
{
    struct iovec one = {(void *)buffer, len};
    return some(number, fd, &one, 1, offset);
}

ssize_t pread(int fd, void *buffer, size_t len, off_t offset)
{
    return some_of_one(SYS_preadv, fd, buffer, len, offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t len, off_t offset)
{
    return some_of_one(SYS_pwritev, fd, buffer, len, offset);
}

ssize_t preadv(int fd, const struct iovec *list, int count, off_t offset)
{
    return some(SYS_preadv, fd, list, count, offset);
}

ssize_t pwritev(int fd, const struct iovec *list, int count, off_t offset)
{
    return some(SYS_pwritev, fd, list, count, offset);
}
