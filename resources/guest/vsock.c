/*
 * Connects standard input and output to a vsock port, for guests that have no program for it.
 *     vsock PORT       connects to the host
 *     vsock -l PORT    waits for one connection
 */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Moves what there is; 0 at the end. */
static int move(int from, int to)
{
    static char buffer[1 << 16];
    ssize_t count = read(from, buffer, sizeof buffer);
    if (count < 0)
        fail("read");
    for (ssize_t done = 0; done < count;) {
        ssize_t now = write(to, buffer + done, count - done);
        if (now < 0)
            fail("write");
        done += now;
    }
    return count > 0;
}

int main(int count, char **arguments)
{
    int listens = count == 3;
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK,
        .svm_cid = listens ? VMADDR_CID_ANY : VMADDR_CID_HOST,
        .svm_port = strtoul(arguments[count - 1], NULL, 10),
    };
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    if (listens) {
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
            fail("listen");
        fputs("listening\n", stderr);
        fd = accept(fd, NULL, NULL);
        if (fd < 0)
            fail("accept");
    } else if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        fail("connect");
    }
    struct pollfd ends[2] = { { .fd = 0, .events = POLLIN }, { .fd = fd, .events = POLLIN } };
    while (ends[0].fd >= 0 || ends[1].fd >= 0) {
        if (poll(ends, 2, -1) < 0)
            fail("poll");
        if (ends[0].revents && !move(0, fd)) {
            shutdown(fd, SHUT_WR);
            ends[0].fd = -1;
        }
        if (ends[1].revents && !move(fd, 1))
            ends[1].fd = -1;
    }
    return 0;
}
