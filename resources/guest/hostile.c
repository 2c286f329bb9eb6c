/*
 * A kernel that is no kernel: it does to every device what no driver would. It is entered by the 64-bit boot protocol, with the
 * first 4 GiB mapped one to one, takes `seed=N` and `rounds=N` from its command line, and has no interrupts. What it has
 * survived it says on the serial port; it waits there for a byte, and resets the machine by the keyboard controller.
 *
 *     2 MiB   this program, its data and stack
 *     4 MiB   CANARY, which no device was given
 *     16 MiB  ARENA: rings, then buffers; what devices may write to lies above it, up to the end of memory
 */
#include "bare-metal.h"

enum {
    CANARY = 4 << 20,
    CANARY_END = 8 << 20,
    ARENA = 16 << 20,
    BUFFERS = ARENA + (64 << 10),
    ARENA_END = 24 << 20,
    MEMORY_END = 64 << 20,
    WINDOWS = 24,
};
#define WINDOW(n) (0xd0000000ull + 0x1000ull * (n))

enum { SIZE = 128, QUEUES = 5 };

struct descriptor {
    uint64_t address;
    uint32_t len;
    uint16_t flags, next;
};
struct avail {
    uint16_t flags, idx, ring[SIZE], event;
};
struct used {
    uint16_t flags, idx;
    struct {
        uint32_t id, len;
    } ring[SIZE];
    uint16_t event;
};
/* 8 KiB for each queue. */
struct ring {
    struct descriptor table[SIZE];
    struct avail avail;
    struct used used __attribute__((aligned(4096)));
};
static volatile struct ring *const rings = (void *)ARENA;

static uint64_t state;
static unsigned types[WINDOWS], devices;

static uint64_t rnd(void) {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dull;
}
static uint64_t below(uint64_t limit) { return rnd() % limit; }

static void outw(uint16_t port, uint16_t value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void outl(uint16_t port, uint32_t value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static void in_wide(uint16_t port, unsigned wide) {
    uint32_t value;
    if (wide)
        asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    else
        asm volatile("inw %1, %w0" : "=a"(value) : "Nd"(port));
}

/* Accesses of one instruction each, at any address. */
static void poke(uint64_t at, unsigned size, uint64_t value) {
    switch (size) {
    case 1: asm volatile("movb %b0, (%1)" ::"q"(value), "r"(at) : "memory"); break;
    case 2: asm volatile("movw %w0, (%1)" ::"r"(value), "r"(at) : "memory"); break;
    case 4: asm volatile("movl %k0, (%1)" ::"r"(value), "r"(at) : "memory"); break;
    default: asm volatile("movq %0, (%1)" ::"r"(value), "r"(at) : "memory");
    }
}
static uint64_t peek(uint64_t at, unsigned size) {
    uint64_t value = 0;
    switch (size) {
    case 1: asm volatile("movb (%1), %b0" : "+q"(value) : "r"(at) : "memory"); break;
    case 2: asm volatile("movw (%1), %w0" : "+r"(value) : "r"(at) : "memory"); break;
    case 4: asm volatile("movl (%1), %k0" : "=r"(value) : "r"(at) : "memory"); break;
    default: asm volatile("movq (%1), %0" : "=r"(value) : "r"(at) : "memory");
    }
    return value;
}
static void set(unsigned n, unsigned offset, uint32_t value) { poke(WINDOW(n) + offset, 4, value); }
static uint32_t get(unsigned n, unsigned offset) { return peek(WINDOW(n) + offset, 4); }
static void set_wide(unsigned n, unsigned offset, uint64_t value) {
    set(n, offset, value);
    set(n, offset + 4, value >> 32);
}

/* Says what is wrong, and ends. */
static void fail(const char *what, unsigned n) {
    print("\r\nfailed: ");
    print(what);
    print(" of window ");
    print_number(n);
    print("\r\n");
    for (;;)
        outb(0x64, 0xfe);
}

static uint64_t any_value(void) {
    static const uint64_t values[] = {0, 1, 2, 3, 4, 8, 0x0b, 0x0f, 0x40, 0x80, 0xff, 0x100, 0x1000, 0x7fff, 0x8000, 0xffff,
        0x10000, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, 0x7fffffffffffffff, 0xffffffffffffffff};
    return below(3) ? values[below(sizeof values / sizeof *values)] : rnd();
}

/* An address outside memory, or one that leads there. None of memory below the arena, which a device could be told to write. */
static uint64_t bad_address(void) {
    switch (below(9)) {
    case 0: return MEMORY_END - below(64);
    case 1: return MEMORY_END;
    case 2: return WINDOW(below(WINDOWS)) + below(0x1000);
    case 3: return 0xc0000000;
    case 4: return 0xfee00000 + below(0x1000);
    case 5: return 1ull << 32;
    case 6: return ~0ull - below(1 << 16);
    case 7: return 1ull << 63;
    default: return rnd() | 1ull << 40;
    }
}
static uint64_t any_buffer(void) {
    uint64_t at = BUFFERS + below(ARENA_END - BUFFERS);
    return below(2) ? at & ~0xfffull : at;
}

/* Leads the device up to FEATURES_OK; whether it came along. */
static int negotiate(unsigned n, uint64_t mask) {
    set(n, STATUS, 0);
    set(n, STATUS, ACKNOWLEDGE);
    set(n, STATUS, ACKNOWLEDGE | DRIVER);
    for (unsigned half = 0; half < 2; half++) {
        set(n, DEVICE_FEATURES_SEL, half);
        set(n, DRIVER_FEATURES_SEL, half);
        set(n, DRIVER_FEATURES, get(n, DEVICE_FEATURES) & (mask >> (32 * half)));
    }
    set(n, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return get(n, STATUS) & FEATURES_OK;
}
static unsigned sizes(unsigned n, unsigned queue) {
    set(n, QUEUE_SEL, queue);
    unsigned max = get(n, QUEUE_NUM_MAX);
    return max < SIZE ? max : SIZE;
}
/* A queue as it should be. */
static void set_up(unsigned n, unsigned queue) {
    unsigned size = sizes(n, queue);
    volatile struct ring *ring = &rings[queue];
    for (unsigned i = 0; i < sizeof *ring; i += 8)
        poke((uint64_t)ring + i, 8, 0);
    set(n, QUEUE_NUM, size);
    set_wide(n, QUEUE_DESC, (uint64_t)ring->table);
    set_wide(n, QUEUE_DRIVER, (uint64_t)&ring->avail);
    set_wide(n, QUEUE_DEVICE, (uint64_t)&ring->used);
    set(n, QUEUE_READY, 1);
}
static void start(unsigned n) { set(n, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK); }

/* Registers: every size, aligned and not, in any order. */
static void registers(unsigned n, unsigned count) {
    static const unsigned known[] = {DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_NUM, QUEUE_READY,
        QUEUE_NOTIFY, INTERRUPT_ACK, STATUS, QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE, 0xac, 0xb0, 0xc0, CONFIG};
    while (count--) {
        unsigned at = below(2) ? known[below(sizeof known / sizeof *known)] : below(0x1000);
        unsigned size = below(2) ? 4 : 1u << below(4);
        if (below(3))
            poke(WINDOW(n) + at, size, any_value());
        else
            peek(WINDOW(n) + at, size);
    }
}

/* Memory where there is none, from the end of memory to 4 GiB, but for the interrupt controllers, which are KVM's. */
static void holes(unsigned count) {
    while (count--) {
        uint64_t at = MEMORY_END + below((1ull << 32) - 8 - MEMORY_END);
        if (at >= 0xfebffff0)
            continue;
        unsigned size = 1u << below(4);
        if (below(2))
            poke(at, size, any_value());
        else
            peek(at, size);
    }
}

/* What these do is end the machine, or tell of a panic. */
static int is_end(unsigned port) {
    return (port >= 0x5d && port <= 0x64) || (port >= 0x502 && port <= 0x505) || (port >= 0x5fd && port <= 0x602);
}
static void ports(unsigned count) {
    for (unsigned port = 0; port < 0x10000; port += 1 + below(8))
        inb(port);
    while (count--) {
        unsigned port = below(2) ? below(0x1000) : below(0x10000);
        if (is_end(port))
            continue;
        switch (below(5)) {
        case 0: outb(port, any_value()); break;
        case 1: outw(port, any_value()); break;
        case 2: outl(port, any_value()); break;
        default: in_wide(port, below(2));
        }
    }
}
static void serial(unsigned count) {
    while (count--) {
        unsigned port = COM1 + below(8);
        if (below(2))
            outb(port, any_value());
        else
            inb(port);
    }
    /* As it was: 8 bits, no interrupts, no loop. */
    outb(COM1 + 3, 3), outb(COM1 + 1, 0), outb(COM1 + 4, 3);
}

/* Rings at addresses that cannot be, or on top of one another. */
static void queues(unsigned n) {
    if (!negotiate(n, below(2) ? ~0ull : rnd() | 1ull << 32))
        return;
    for (unsigned queue = 0; queue < QUEUES; queue++) {
        uint64_t place[3];
        for (unsigned i = 0; i < 3; i++)
            switch (below(4)) {
            case 0: place[i] = bad_address(); break;
            case 1: place[i] = ARENA + below(4) * 0x1000; break;
            /* The page tables, for what the device only reads. */
            case 2: place[i] = i < 2 ? 0x9000 : MEMORY_END - 16 * below(512); break;
            default: place[i] = any_buffer();
            }
        set(n, QUEUE_SEL, below(8) ? queue : any_value());
        set(n, QUEUE_NUM, below(2) ? 1u << below(16) : any_value());
        set_wide(n, QUEUE_DESC, place[0]);
        set_wide(n, QUEUE_DRIVER, place[1]);
        set_wide(n, QUEUE_DEVICE, place[2]);
        set(n, QUEUE_READY, below(8) ? 1 : any_value());
    }
    start(n);
    for (unsigned kicks = below(8); kicks--;)
        set(n, QUEUE_NOTIFY, below(QUEUES));
    get(n, STATUS);
}

/* What the device might take for a request of its kind. */
static void header(unsigned type, volatile uint8_t *at) {
    volatile uint32_t *words = (void *)at;
    volatile uint64_t *longs = (void *)at;
    static const uint32_t requests[] = {0, 1, 4, 8, 11, 13};
    switch (type) {
    case BLK:
        words[0] = below(8) ? requests[below(6)] : any_value();
        words[1] = 0;
        longs[1] = below(4) ? below(4096) : any_value();
        break;
    case VSOCK:
        longs[0] = below(8) ? 3 : any_value();
        longs[1] = below(8) ? 2 : any_value();
        words[4] = below(4) + 1024, words[5] = below(2) ? 1024 : any_value();
        words[6] = below(2) ? below(4096) : any_value();
        words[7] = (below(8) ? 1 : any_value()) | below(9) << 16;
        words[8] = below(4), words[9] = any_value(), words[10] = any_value();
        break;
    case FS:
        words[0] = below(2) ? 40 + below(4096) : any_value();
        words[1] = below(8) ? below(56) : any_value();
        longs[1] = rnd();
        longs[2] = below(2) ? 1 : any_value();
        words[6] = words[7] = 0, words[8] = 1, words[9] = 0;
        /* Version 7.31, of FUSE_INIT. */
        words[10] = 7, words[11] = 31;
        for (unsigned i = 12; i < 32; i++)
            words[i] = below(2) ? below(4096) : any_value();
        break;
    case NET:
        for (unsigned i = 0; i < 3; i++)
            words[i] = any_value();
        break;
    case BALLOON:
        /* Pages of the arena, or none. */
        for (unsigned i = 0; i < 64; i++)
            words[i] = below(2) ? any_buffer() >> 12 : rnd() | 1 << 20;
        break;
    }
}

/* A part of a request that is well made, in four parts, but for what it asks for. */
static void tame_descriptor(unsigned type, unsigned queue, volatile struct ring *ring, unsigned i) {
    static enum { NOTHING, EVERYTHING, ALL_BUT_THE_FIRST } writable;
    volatile struct descriptor *at = &ring->table[i];
    unsigned part = i % 4;
    if (part == 0 && !below(32))
        writable = below(3);
    else if (part == 0 && (type == BLK || type == FS))
        writable = type == FS || below(2) ? ALL_BUT_THE_FIRST : NOTHING;
    else if (part == 0)
        writable = type == RNG || (type == BALLOON ? queue > 2 : queue == 0) ? EVERYTHING : NOTHING;
    at->address = any_buffer() & ~7ull;
    at->len = part == 3 ? 1 : below(4) ? 512 << below(4) : below(8192);
    int is_writable = writable == EVERYTHING || (writable == ALL_BUT_THE_FIRST && part) || (type == BLK && part == 3);
    at->flags = (part == 3 ? 0 : NEXT) | (is_writable ? WRITE : 0);
    at->next = i + 1;
    if (part == 0) {
        header(type, (void *)at->address);
        at->len = type == BLK ? 16 : type == VSOCK ? 44 : type == FS ? 40 + below(128) : 256;
    }
}
static void wild_descriptor(unsigned type, volatile struct ring *ring, unsigned i, unsigned size, unsigned wild) {
    volatile struct descriptor *at = &ring->table[i];
    int good = !(wild & 1) || below(4);
    at->address = good ? any_buffer() & ~7ull : bad_address();
    at->len = !(wild & 1) || below(4) ? below(8192) : any_value();
    at->flags = below(8) ? below(4) : any_value();
    at->next = !(wild & 2) || below(8) ? (i + 1) % size : any_value();
    if (good && below(2)) {
        header(type, (void *)at->address);
        at->flags = NEXT;
        at->len = type == BLK ? 16 : type == VSOCK ? 44 : type == FS ? 40 + below(128) : 256;
    } else if (type != BALLOON && !below(8)) {
        /* A table of its own, in a buffer, with an indirect one in it at times. */
        uint64_t table = any_buffer() & ~0xfull;
        for (unsigned j = 0; j < 16; j++) {
            volatile struct descriptor *inner = (volatile struct descriptor *)table + j;
            inner->address = below(8) ? any_buffer() : bad_address();
            inner->len = below(4) ? below(8192) : any_value();
            inner->flags = below(8) ? below(4) : below(8);
            inner->next = below(8) ? j + 1 : any_value();
        }
        at->address = table;
        at->len = below(4) ? 16 * 16 : any_value();
        at->flags = INDIRECT;
    }
}

/* Chains that loop, lead nowhere, are too long, too short, or of the wrong kind; in one go in `wild` kinds of ways, as a
 * device looks no further than the first that it cannot bear. */
static void descriptors(unsigned n) {
    unsigned type = types[n], wild = below(4);
    if (!negotiate(n, below(2) ? ~0ull : rnd() | 1ull << 32))
        fail("features are refused", n);
    unsigned count = 0;
    while (count < QUEUES && sizes(n, count))
        set_up(n, count++);
    if (type == BALLOON)
        for (uint64_t at = BUFFERS; at < ARENA_END; at += 8)
            poke(at, 8, ~0ull);
    start(n);
    for (unsigned round = 0; round < 4; round++) {
        for (unsigned queue = 0; queue < count; queue++) {
            unsigned size = sizes(n, queue);
            volatile struct ring *ring = &rings[queue];
            for (unsigned i = 0; i < size; i++)
                if (wild)
                    wild_descriptor(type, ring, i, size, wild);
                else
                    tame_descriptor(type, queue, ring, i);
            for (unsigned i = 0; i < size; i++)
                ring->avail.ring[i] = !wild ? i * 4 % size : !(wild & 2) || below(64) ? below(size) : any_value();
            ring->avail.flags = below(2);
            ring->avail.event = any_value();
            asm volatile("" ::: "memory");
            ring->avail.idx += !wild ? size / 4 : !(wild & 2) || below(8) ? below(size) : any_value();
            set(n, QUEUE_NOTIFY, queue);
        }
        /* While the device is at it, all of that becomes something else. */
        for (unsigned i = wild ? below(20000) : 0; i--;) {
            volatile struct ring *ring = &rings[below(count)];
            ring->table[below(SIZE)].len = any_value();
            ring->table[below(SIZE)].next = below(SIZE);
            ring->used.idx = below(64) ? ring->used.idx : any_value();
        }
        for (unsigned i = 0; !wild && i < 20; i++)
            get(n, STATUS);
        if (below(4) == 0)
            poke(WINDOW(n) + CONFIG + below(64), 1u << below(4), any_value());
        set(n, INTERRUPT_ACK, get(n, INTERRUPT_STATUS));
        if (get(n, STATUS) & NEEDS_RESET)
            break;
    }
    /* In the middle of it. */
    set(n, STATUS, 0);
    if (get(n, STATUS))
        fail("a reset leaves the status", n);
}

static void kicks(unsigned n, unsigned count) {
    negotiate(n, ~0ull);
    unsigned queues = 0;
    while (queues < QUEUES && sizes(n, queues))
        set_up(n, queues++);
    start(n);
    while (count--)
        set(n, QUEUE_NOTIFY, below(queues + 1));
    set(n, STATUS, 0);
}

/* A block device still reads what it was told to write. */
static void works(unsigned n) {
    uint64_t value = rnd();
    for (unsigned type = 2; type--;) { /* write, then read */
        if (!negotiate(n, 1ull << 32))
            fail("features are refused", n);
        set_up(n, 0);
        start(n);
        volatile struct ring *ring = &rings[0];
        volatile uint64_t *data = (void *)(BUFFERS + 4096);
        volatile uint32_t *request = (void *)BUFFERS;
        volatile uint8_t *status = (void *)(BUFFERS + 1024);
        request[0] = type, request[1] = 0, request[2] = 7, request[3] = 0;
        *status = 0xff;
        for (unsigned i = 0; i < 64; i++)
            data[i] = type ? value + i : 0;
        ring->table[0] = (struct descriptor){(uint64_t)request, 16, NEXT, 1};
        ring->table[1] = (struct descriptor){(uint64_t)data, 512, NEXT | (type ? 0 : WRITE), 2};
        ring->table[2] = (struct descriptor){(uint64_t)status, 1, WRITE, 0};
        ring->avail.ring[0] = 0;
        asm volatile("" ::: "memory");
        ring->avail.idx = 1;
        set(n, QUEUE_NOTIFY, 0);
        while (ring->used.idx != 1)
            if (get(n, STATUS) & NEEDS_RESET)
                fail("a good request breaks the device", n);
        if (*status)
            fail("a good request fails", n);
        if (ring->used.ring[0].len != (type ? 1 : 513))
            fail("a used length is wrong", n);
        for (unsigned i = 0; i < 64; i++)
            if (data[i] != value + i)
                fail("other data comes back", n);
        set(n, STATUS, 0);
    }
}

static void run(const char *line) {
    uint64_t seed = number(line, "seed="), rounds = number(line, "rounds=");
    state = seed * 0x9e3779b97f4a7c15ull + 1;
    for (uint64_t at = CANARY; at < CANARY_END; at += 8)
        *(volatile uint64_t *)at = at * 0x9e3779b97f4a7c15ull;
    while (devices < WINDOWS && get(devices, 0) == 0x74726976) {
        types[devices] = get(devices, DEVICE_ID);
        devices++;
    }
    print("\r\ndevices:");
    for (unsigned n = 0; n < devices; n++)
        print(" "), print_number(types[n]);
    print("\r\n");
    ports(20000);
    serial(4000);
    holes(2000);
    for (uint64_t round = 0; round < rounds; round++)
        for (unsigned n = 0; n < devices; n++) {
            registers(n, 200);
            queues(n);
            descriptors(n);
            if (round % 8 == 0)
                kicks(n, 2000);
        }
    for (unsigned n = 0; n < devices; n++) {
        set(n, STATUS, 0);
        /* Of block devices the first is not one for reading only. */
        if (types[n] == BLK) {
            works(n);
            break;
        }
    }
    for (uint64_t at = CANARY; at < CANARY_END; at += 8)
        if (*(volatile uint64_t *)at != at * 0x9e3779b97f4a7c15ull)
            fail("memory was written that no device was given, and not", 0);
    /* Input comes to who listens; what this has sent itself is not the byte that it waits for. */
    outb(COM1 + 1, 1);
    while (inb(COM1 + 5) & 1)
        inb(COM1);
    print("\r\nsurvived seed ");
    print_number(seed);
    print("\r\n");
    while (!(inb(COM1 + 5) & 1))
        ;
    for (;;)
        outb(0x64, 0xfe);
}

static uint8_t stack[64 << 10] __attribute__((aligned(16), used));

/* The zero page has the command line's address at 0x228 (Documentation/arch/x86/zero-page.rst). */
asm(".globl _start\n_start:\n"
    "leaq stack+65536(%rip), %rsp\n"
    "movl 0x228(%rsi), %edi\n"
    "call start_c\n");
void start_c(const char *line) { run(line); }
