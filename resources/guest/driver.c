/*
 * A driver of a virtio disk with no kernel around it: what it takes to have a request done is the device's own cost, and that of
 * reaching it. It keeps `depth=N` requests of 4 KiB under way until `requests=N` are done, reads or, with `write=1`, writes, of blocks
 * all over the disk, none next to the last one, and looks at the used ring all the time. With `interrupts=1` it asks for interrupts as a driver does that sleeps, and
 * ignores them. The serial port has `bench-begin` and `bench-end`.
 *
 * It is entered by PVH and runs at CPL 3 with the first 4 GiB mapped one to one, as a host without VT-x and SVM emulates what
 * runs at CPL 0. By SYSEXIT, which such a host knows and IRET it does not; an AMD CPU has none in long mode, and goes
 * on at CPL 0 by the exception.
 */
#include "bare-metal.h"

asm(".section .note.PVH, \"a\", @note\n"
    ".long 4, 4, 18\n"
    ".asciz \"Xen\"\n"
    ".long _start\n"
    ".text\n"
    ".code32\n"
    ".globl _start\n_start:\n"
    "movl %ebx, start_info\n"
    /* A table of each level, present, writable and for users; then four of 2 MiB pages. */
    "movl $tables + 0x1007, tables\n"
    "movl $tables + 0x2007, %eax\n"
    "xorl %ecx, %ecx\n"
    "1: movl %eax, tables + 0x1000(,%ecx,8)\n"
    "addl $0x1000, %eax\n"
    "incl %ecx\n"
    "cmpl $4, %ecx\n"
    "jne 1b\n"
    "movl $0xe7, %eax\n"
    "xorl %ecx, %ecx\n"
    "2: movl %eax, tables + 0x2000(,%ecx,8)\n"
    "addl $0x200000, %eax\n"
    "incl %ecx\n"
    "cmpl $2048, %ecx\n"
    "jne 2b\n"
    /* Long mode: CR4.PAE, CR3, EFER.LME, CR0 with PG, AM, WP, NE, ET, MP and PE. */
    "movl $0x20, %eax\n"
    "movl %eax, %cr4\n"
    "movl $tables, %eax\n"
    "movl %eax, %cr3\n"
    "movl $0xc0000080, %ecx\n"
    "movl $0x100, %eax\n"
    "xorl %edx, %edx\n"
    "wrmsr\n"
    "movl $0x80050033, %eax\n"
    "movl %eax, %cr0\n"
    "lgdt gdt_pointer\n"
    "ljmp $8, $long_mode\n"
    ".code64\n"
    "long_mode:\n"
    "leaq stack + 65536(%rip), %rsp\n"
    /* Vector 6, no such instruction, leads to where SYSEXIT would. */
    "movl $user, %eax\n"
    "movw %ax, idt + 6 * 16\n"
    "shrl $16, %eax\n"
    "movw %ax, idt + 6 * 16 + 6\n"
    "movl $0x8e000008, %eax\n"
    "movw %ax, idt + 6 * 16 + 2\n"
    "shrl $16, %eax\n"
    "movw %ax, idt + 6 * 16 + 4\n"
    "lidt idt_pointer\n"
    /* The ports are for CPL 3, too, by an empty bitmap behind the TSS: such a host does not look at IOPL. */
    "movl $tss, %eax\n"
    "movl $104 + 8192, gdt + 16\n"
    "movw %ax, gdt + 18\n"
    "shrl $16, %eax\n"
    "movb %al, gdt + 20\n"
    "movb $0x89, gdt + 21\n"
    "movw $104, tss + 102\n"
    "movb $0xff, tss + 104 + 8192\n"
    "movl $16, %eax\n"
    "ltr %ax\n"
    /* CS and SS of CPL 3 are those 32 and 40 behind IA32_SYSENTER_CS. */
    "movl $0x174, %ecx\n"
    "movl $8, %eax\n"
    "xorl %edx, %edx\n"
    "wrmsr\n"
    "movq %rsp, %rcx\n"
    "leaq user(%rip), %rdx\n"
    "sysexitq\n"
    "user:\n"
    "leaq stack + 65536(%rip), %rsp\n"
    "call run\n"
    ".data\n"
    ".balign 8\n"
    "gdt: .quad 0, 0x00af9b000000ffff, 0, 0\n"
    "gdt_pointer: .word 31\n.long gdt, 0\n"
    "idt_pointer: .word 7 * 16 - 1\n.long idt, 0\n"
    ".text\n");

enum { SECTORS = 8, DEPTH_MAX = 32, SIZE = 128, EVENT_IDX = 1 << 29 };

struct descriptor {
    uint64_t address;
    uint32_t len;
    uint16_t flags, next;
};
struct header {
    uint32_t type, reserved;
    uint64_t sector;
};
struct avail {
    uint16_t flags, idx, ring[SIZE], used_event;
};
struct used {
    uint16_t flags, idx;
    struct {
        uint32_t id, len;
    } ring[SIZE];
    uint16_t avail_event;
};

uint64_t tables[6 * 512] __attribute__((aligned(4096)));
uint8_t stack[64 << 10] __attribute__((aligned(16)));
uint64_t idt[7 * 2];
uint8_t tss[104 + 8192 + 1] __attribute__((aligned(8)));
uint32_t start_info;
static struct descriptor table[SIZE] __attribute__((aligned(16)));
static volatile struct avail avail __attribute__((aligned(4)));
static volatile struct used used __attribute__((aligned(4)));
static struct header headers[DEPTH_MAX];
static volatile uint8_t statuses[DEPTH_MAX], data[DEPTH_MAX][4096] __attribute__((aligned(4096)));

static uint64_t window;
static void set(unsigned offset, uint32_t value) { *(volatile uint32_t *)(window + offset) = value; }
static uint32_t get(unsigned offset) { return *(volatile uint32_t *)(window + offset); }
static void set_wide(unsigned offset, uint64_t value) {
    set(offset, value);
    set(offset + 4, value >> 32);
}

/* Resets the machine, or ends QEMU, by its isa-debug-exit. */
static void end(void) {
    outb(0x64, 0xfe);
    for (;;)
        outb(0x501, 0);
}
static void require(int good, const char *what) {
    if (good)
        return;
    print("failed: ");
    print(what);
    print("\r\n");
    end();
}

/* bantam's devices, then QEMU's. */
static int find_disk(void) {
    for (unsigned i = 0; i < 17 + 32; i++) {
        window = i < 17 ? 0xd0000000 + i * 0x1000 : 0xfeb00000 + (i - 17) * 0x200;
        if (get(0) == 0x74726976 && get(VERSION) == 2 && get(DEVICE_ID) == BLK)
            return 1;
    }
    return 0;
}

static void set_up(void) {
    set(STATUS, 0);
    set(STATUS, ACKNOWLEDGE);
    set(STATUS, ACKNOWLEDGE | DRIVER);
    set(DRIVER_FEATURES_SEL, 0);
    set(DRIVER_FEATURES, EVENT_IDX | 1 << FLUSH);
    set(DRIVER_FEATURES_SEL, 1);
    set(DRIVER_FEATURES, 1); /* VERSION_1 */
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    require(get(STATUS) & FEATURES_OK, "features are refused");
    set(QUEUE_SEL, 0);
    require(get(QUEUE_NUM_MAX) >= SIZE, "the queue is too small");
    set(QUEUE_NUM, SIZE);
    set_wide(QUEUE_DESC, (uint64_t)table);
    set_wide(QUEUE_DRIVER, (uint64_t)&avail);
    set_wide(QUEUE_DEVICE, (uint64_t)&used);
    set(QUEUE_READY, 1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

static uint64_t blocks;
static uint16_t added;
static void add(unsigned slot, uint64_t request) {
    /* A prime: all blocks have their turn. */
    headers[slot].sector = request * 7919 % blocks * SECTORS;
    statuses[slot] = 0xff;
    avail.ring[added++ % SIZE] = 3 * slot;
}
/* Has the device see what was added, and notifies it if it wants to be; whether it did. */
static unsigned publish(void) {
    uint16_t before = avail.idx;
    asm volatile("" ::: "memory");
    avail.idx = added;
    asm volatile("mfence" ::: "memory");
    unsigned wanted = (uint16_t)(added - used.avail_event - 1) < (uint16_t)(added - before);
    if (wanted)
        set(QUEUE_NOTIFY, 0);
    return wanted;
}

void run(void) {
    const char *line = (const char *)*(uint64_t *)(uint64_t)(start_info + 24); /* cmdline_paddr */
    uint64_t depth = number(line, "depth="), requests = number(line, "requests="), write = number(line, "write=");
    uint64_t interrupts = number(line, "interrupts="), begun = 0, done = 0, kicks = 0;
    require(depth && depth <= DEPTH_MAX && depth <= requests, "depth= or requests= is missing");
    require(find_disk(), "there is no disk");
    set_up();
    blocks = (get(CONFIG) | (uint64_t)get(CONFIG + 4) << 32) / SECTORS;
    for (unsigned slot = 0; slot < depth; slot++) {
        struct descriptor *at = table + 3 * slot;
        headers[slot].type = write;
        at[0] = (struct descriptor){(uint64_t)&headers[slot], sizeof *headers, NEXT, 3 * slot + 1};
        at[1] = (struct descriptor){(uint64_t)data[slot], sizeof *data, NEXT | (write ? 0 : WRITE), 3 * slot + 2};
        at[2] = (struct descriptor){(uint64_t)&statuses[slot], 1, WRITE, 0};
    }
    print("bench-begin\r\n");
    uint16_t seen = 0;
    while (begun < depth)
        add(begun, begun), begun++;
    avail.used_event = interrupts ? seen : seen - 1;
    kicks += publish();
    while (done < requests) {
        uint16_t now = used.idx;
        if (now == seen) {
            asm volatile("pause");
            continue;
        }
        for (; seen != now; seen++, done++) {
            unsigned slot = used.ring[seen % SIZE].id / 3;
            require(slot < depth && statuses[slot] == 0, "a request failed");
            if (begun < requests)
                add(slot, begun), begun++;
        }
        avail.used_event = interrupts ? seen : seen - 1;
        if (added != avail.idx)
            kicks += publish();
    }
    print("bench-end\r\nnotifications=");
    print_number(kicks);
    print("\r\n");
    end();
}
