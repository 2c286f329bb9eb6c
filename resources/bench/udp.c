// The network's small packets, one at a time: how long the way there and back takes.
//     udp echo PORT                    sends back what comes
//     udp ADDRESS PORT SECONDS
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

// With the headers of UDP, IP and Ethernet, and its checksum, 64 bytes.
#define SIZE 18

static int compare(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    int echo = !strcmp(argv[1], "echo"), fd = socket(AF_INET, SOCK_DGRAM, 0);
    char packet[SIZE] = "";
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
    require(fd >= 0, "socket");
    if (echo) {
        require(!bind(fd, (struct sockaddr *)&address, sizeof address), "bind");
        for (;;) {
            socklen_t size = sizeof address;
            ssize_t length = recvfrom(fd, packet, SIZE, 0, (struct sockaddr *)&address, &size);
            if (length > 0) sendto(fd, packet, length, 0, (struct sockaddr *)&address, size);
        }
    }
    if (argc != 4) return 2;
    require(inet_pton(AF_INET, argv[1], &address.sin_addr) == 1, argv[1]);
    require(!connect(fd, (struct sockaddr *)&address, sizeof address), "connect");
    // What is lost is sent again.
    struct timeval patience = {.tv_sec = 1};
    require(!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), "SO_RCVTIMEO");
    static double times[1 << 20];
    int count = 0;
    for (double end = now() + atof(argv[3]), start; (start = now()) < end && count < 1 << 20;)
        if (send(fd, packet, SIZE, 0) == SIZE && recv(fd, packet, SIZE, 0) == SIZE) times[count++] = now() - start;
    require(count > 0, "recv");
    qsort(times, count, sizeof *times, compare);
    printf("bench: %f UDP, 64 bytes there and back, us\n", times[count / 2] * 1e6);
    return 0;
}
