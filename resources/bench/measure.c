// Runs a command and says, in seconds since its execve(2), when each marker appeared on its standard output, and when
// it ended. With -r it ends the command at its first KVM_RUN, with -l at its first listen(2), and says when that was; with -m
// it ends it at the last marker.
//     measure [-r|-l|-m] SECONDS [MARKER...] -- COMMAND [ARGUMENT...]
// What the command writes goes to standard error. After SECONDS it is killed, and the status is 1.
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void fail(const char *what) {
    perror(what);
    exit(2);
}

// A descriptor that is readable when a process started from now on makes its first ioctl(fd, KVM_RUN), or its first
// listen. The kernel looks at every other system call for some nanoseconds, and lets it be.
static int watch(int listens) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, listens ? SYS_listen : SYS_ioctl, listens ? 2 : 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, KVM_RUN, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof(code) / sizeof(*code), code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) fail("PR_SET_NO_NEW_PRIVS");
    int fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
    if (fd < 0) fail("seccomp");
    return fd;
}

int main(int argc, char **argv) {
    static char output[1 << 20];
    size_t length = 0;
    int listens = argc > 1 && !strcmp(argv[1], "-l");
    int run = listens || (argc > 1 && !strcmp(argv[1], "-r"));
    int marked = argc > 1 && !strcmp(argv[1], "-m");
    argv += 1 + (run || marked);
    double limit = *argv ? atof(*argv++) : 0;
    char **marker = argv;
    while (*argv && strcmp(*argv, "--")) argv++;
    if (!*argv || !argv[1]) {
        fputs("usage: measure [-r|-l|-m] SECONDS [MARKER...] -- COMMAND [ARGUMENT...]\n", stderr);
        return 2;
    }
    *argv++ = NULL;

    double *start = mmap(NULL, sizeof(double), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int ends[2];
    if (start == MAP_FAILED || pipe2(ends, 0)) fail("pipe");
    *start = now();
    double deadline = *start + limit;
    int kvm_run = run ? watch(listens) : -1;
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        setpgid(0, 0);
        dup2(ends[1], 1);
        close(ends[0]);
        close(ends[1]);
        *start = now();
        execvp(*argv, argv);
        perror(*argv);
        _exit(127);
    }
    close(ends[1]);

    struct pollfd fds[] = {{ends[0], POLLIN, 0}, {kvm_run, POLLIN, 0}};
    for (;;) {
        double left = deadline - now();
        if (left <= 0 || poll(fds, 2, left * 1e3 + 1) <= 0) {
            fprintf(stderr, "measure: time limit\n");
            kill(-child, SIGKILL);
            return 1;
        }
        double time = now() - *start;
        if (run && fds[1].revents & POLLIN) {
            printf("%s %.6f\n", listens ? "listen" : "kvm-run", time);
            kill(-child, SIGKILL);
            return 0;
        }
        if (!fds[0].revents) continue;
        if (length == sizeof(output)) length = 0;
        ssize_t count = read(ends[0], output + length, sizeof(output) - length);
        if (count <= 0) break;
        if (write(2, output + length, count) < 0) fail("write");
        length += count;
        while (*marker && memmem(output, length, *marker, strlen(*marker))) printf("%s %.6f\n", *marker++, time);
        if (marked && !*marker) {
            kill(-child, SIGKILL);
            waitpid(child, NULL, 0);
            return 0;
        }
    }
    int status;
    waitpid(child, &status, 0);
    printf("exit %.6f\n", now() - *start);
    return *marker || run;
}
