/*
 * What root of a Linux guest can do to its machine past the drivers: registers of all virtio-mmio windows by /dev/mem, and ports.
 *     devmem SEED ROUNDS [wild]
 * Where queues are is only changed when `wild`: then devices may be made to write anywhere in the guest's memory.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>

enum { WINDOWS = 24, PAGE = 4096 };
#define FIRST 0xd0000000

/* Virtio 1.2, 4.2.2. */
enum { MAGIC = 0, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, STATUS = 0x70, QUEUE_DESC = 0x80, QUEUE_END = 0xa8, CONFIG = 0x100 };

static uint64_t state;

static uint64_t rnd(void)
{
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
}
static uint64_t below(uint64_t limit) { return rnd() % limit; }

static uint64_t any_value(void)
{
    static const uint64_t values[] = {0, 1, 2, 4, 8, 0xf, 0x40, 0x80, 0xff, 0xffff, 0x80000000, 0xffffffff};
    return below(3) ? values[below(sizeof values / sizeof *values)] : rnd();
}

static void touch(volatile uint8_t *window, int wild)
{
    /* As a driver does, and where the drivers' own registers are; the rest of the window at times. */
    unsigned at = below(4) ? below(CONFIG + 64) : below(PAGE - 8), size = below(2) ? 4 : 1u << below(4);
    int moves = at + size > QUEUE_READY && at < QUEUE_END && !(at >= QUEUE_NOTIFY && at + size <= QUEUE_DESC);
    uint64_t value = any_value();
    if (below(2) || (moves && !wild))
        switch (size) {
        case 1: (void)*(volatile uint8_t *)(window + at); break;
        case 2: (void)*(volatile uint16_t *)(window + at); break;
        case 4: (void)*(volatile uint32_t *)(window + at); break;
        default: (void)*(volatile uint64_t *)(window + at);
        }
    else
        switch (size) {
        case 1: *(volatile uint8_t *)(window + at) = value; break;
        case 2: *(volatile uint16_t *)(window + at) = value; break;
        case 4: *(volatile uint32_t *)(window + at) = value; break;
        default: *(volatile uint64_t *)(window + at) = value;
        }
}

/* What these do is end the machine, tell of a panic, or speak to whoever reads the console. */
static int is_left(unsigned port)
{
    return (port >= 0x5d && port <= 0x64) || (port >= 0x502 && port <= 0x505) || (port >= 0x5fd && port <= 0x602) ||
           (port >= 0x3f5 && port <= 0x3ff);
}
/* Those of KVM's own interrupt controllers and timer are the guest's to spoil. */
static int is_kvm(unsigned port)
{
    return (port >= 0x1d && port <= 0x21) || (port >= 0x3d && port <= 0x43) || (port >= 0x9d && port <= 0xa1) ||
           (port >= 0x4cd && port <= 0x4d1);
}
static void ports(unsigned count, int wild)
{
    while (count--) {
        unsigned port = below(2) ? below(0x1000) : below(0x10000);
        if (is_left(port) || (!wild && is_kvm(port)))
            continue;
        switch (below(6)) {
        case 0: outb(any_value(), port); break;
        case 1: outw(any_value(), port); break;
        case 2: outl(any_value(), port); break;
        case 3: inb(port); break;
        case 4: inw(port); break;
        default: inl(port);
        }
    }
}

int main(int count, char **words)
{
    if (count < 3) {
        fprintf(stderr, "usage: devmem SEED ROUNDS [wild]\n");
        return 2;
    }
    state = strtoull(words[1], NULL, 10) * 0x9e3779b97f4a7c15ull | 1;
    unsigned rounds = atoi(words[2]);
    int wild = count > 3, memory = open("/dev/mem", O_RDWR | O_SYNC);
    uint8_t *windows = mmap(NULL, WINDOWS * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, FIRST);
    if (memory < 0 || windows == MAP_FAILED || iopl(3)) {
        perror("devmem");
        return 1;
    }
    unsigned devices = 0;
    for (unsigned n = 0; n < WINDOWS; n++)
        devices += *(volatile uint32_t *)(windows + n * PAGE + MAGIC) == 0x74726976;
    printf("devices=%u\n", devices);
    for (unsigned round = 0; round < rounds; round++) {
        volatile uint8_t *window = windows + PAGE * below(devices);
        for (unsigned i = 0; i < 64; i++)
            touch(window, wild);
        /* A storm. */
        for (unsigned i = 0; i < 256; i++)
            *(volatile uint32_t *)(window + QUEUE_NOTIFY) = below(8);
        ports(64, wild);
        if (wild)
            printf("round=%u\n", round);
    }
    for (unsigned n = 0; n < devices && !wild; n++)
        *(volatile uint32_t *)(windows + n * PAGE + STATUS) = 0;
    printf("touched=%u\n", rounds);
    return 0;
}
