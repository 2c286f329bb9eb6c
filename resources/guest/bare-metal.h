/*
 * What kernels that are none have in common: the serial port, numbers of the command line, and what virtio devices understand.
 */
#include <stdint.h>

enum { COM1 = 0x3f8 };

/* Virtio 1.2: 4.2.2, 2.1, 2.7.5, 5. */
enum {
    VERSION = 0x4,
    DEVICE_ID = 0x8,
    DEVICE_FEATURES = 0x10,
    DEVICE_FEATURES_SEL = 0x14,
    DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30,
    QUEUE_NUM_MAX = 0x34,
    QUEUE_NUM = 0x38,
    QUEUE_READY = 0x44,
    QUEUE_NOTIFY = 0x50,
    INTERRUPT_STATUS = 0x60,
    INTERRUPT_ACK = 0x64,
    STATUS = 0x70,
    QUEUE_DESC = 0x80,
    QUEUE_DRIVER = 0x90,
    QUEUE_DEVICE = 0xa0,
    CONFIG = 0x100,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64 };
enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { FLUSH = 9 }; /* VIRTIO_BLK_F_FLUSH */
enum { NET = 1, BLK = 2, RNG = 4, BALLOON = 5, VSOCK = 19, FS = 26 };

static inline void outb(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port) {
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void print(const char *text) {
    for (; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20))
            ;
        outb(COM1, *text);
    }
}
static inline void print_number(uint64_t number) {
    char text[21], *at = text + 20;
    *at = 0;
    do
        *--at = '0' + number % 10;
    while (number /= 10);
    print(at);
}
/* What follows `name` on the line; 0 if it is not there. */
static inline uint64_t number(const char *line, const char *name) {
    for (; *line; line++) {
        const char *a = line, *b = name;
        while (*b && *a == *b)
            a++, b++;
        if (!*b) {
            uint64_t value = 0;
            for (; *a >= '0' && *a <= '9'; a++)
                value = 10 * value + (*a - '0');
            return value;
        }
    }
    return 0;
}
