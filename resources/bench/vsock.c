// Sockets between a guest and its host (AF_VSOCK): bytes each way, and how long a small message takes there and back.
//     vsock serve PATH|PORT    on the host: at a Unix socket, as bantam has it, or at a port of vhost-vsock's
//     vsock PORT SECONDS       in the guest
// The first byte of a connection says what is to be done: `i`n, `o`ut or `e`cho.
#include <linux/vm_sockets.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "clock.h"

#define MESSAGE 64

static char data[64 << 10];

static int compare(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static void serve(int fd) {
    char what = 0;
    double total = 0;
    ssize_t count = read(fd, &what, 1);
    if (what == 'i') {
        while ((count = read(fd, data, sizeof data)) > 0) total += count;
        if (write(fd, &total, sizeof total) < 0) return;
    } else if (what == 'o') {
        while (write(fd, data, sizeof data) > 0) continue;
    } else {
        while (count > 0 && (count = recv(fd, data, MESSAGE, MSG_WAITALL)) == MESSAGE) count = write(fd, data, MESSAGE);
    }
}

static int listen_at(const char *where) {
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    struct sockaddr_vm port = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = atoi(where)};
    int is_path = strchr(where, '/') != NULL, fd = socket(is_path ? AF_UNIX : AF_VSOCK, SOCK_STREAM, 0);
    require(fd >= 0, "socket");
    strncpy(path.sun_path, where, sizeof path.sun_path - 1);
    if (is_path) require(!bind(fd, (struct sockaddr *)&path, sizeof path), where);
    else require(!bind(fd, (struct sockaddr *)&port, sizeof port), where);
    require(!listen(fd, 8), "listen");
    return fd;
}

static int ask(const char *port, char what) {
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = atoi(port)};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    require(fd >= 0 && !connect(fd, (struct sockaddr *)&host, sizeof host), "connect");
    require(write(fd, &what, 1) == 1, "write");
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(argv[1], "serve")) {
        signal(SIGCHLD, SIG_IGN);
        for (int fd = listen_at(argv[2]), client; (client = accept(fd, NULL, NULL)) >= 0; close(client))
            if (fork() == 0) {
                serve(client);
                _exit(0);
            }
        return 1;
    }
    double seconds = atof(argv[2]), start = now(), total = 0;
    ssize_t count = 1;
    int fd = ask(argv[1], 'i');
    while (now() < start + seconds) require(write(fd, data, sizeof data) > 0, "write");
    // What has arrived counts, and until then.
    require(!shutdown(fd, SHUT_WR) && recv(fd, &total, sizeof total, MSG_WAITALL) == sizeof total, "recv");
    printf("bench: %.1f vsock, guest to host, MiB/s\n", total / (1 << 20) / (now() - start));
    close(fd);

    fd = ask(argv[1], 'o');
    for (start = now(), total = 0; now() < start + seconds; total += count)
        require((count = read(fd, data, sizeof data)) > 0, "read");
    printf("bench: %.1f vsock, host to guest, MiB/s\n", total / (1 << 20) / (now() - start));
    close(fd);

    static double times[1 << 20];
    int rounds = 0;
    fd = ask(argv[1], 'e');
    for (double end = now() + seconds; (start = now()) < end && rounds < 1 << 20; times[rounds++] = now() - start)
        require(write(fd, data, MESSAGE) == MESSAGE && recv(fd, data, MESSAGE, MSG_WAITALL) == MESSAGE, "echo");
    require(rounds > 0, "echo");
    qsort(times, rounds, sizeof *times, compare);
    printf("bench: %f vsock, %d bytes there and back, us\n", times[rounds / 2] * 1e6, MESSAGE);
    return 0;
}
