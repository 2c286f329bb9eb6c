# A guest without a kernel, for machines of which there are to be many: an ELF file that PVH enters, which says bench-idle
# on the first serial port and waits for an interrupt for ever. It has none of a kernel's instructions that a host without
# VT-x or SVM cannot emulate.
.code32
.globl _start
_start:
    movb $0xff, %al         # no interrupt from the two PICs
    outb %al, $0x21
    outb %al, $0xa1
    movl $text, %esi
    movw $0x3f8, %dx
1:  lodsb
    testb %al, %al
    jz 2f
    outb %al, %dx
    jmp 1b
2:  sti
3:  hlt
    jmp 3b
text: .asciz "bench-idle\n"
.section .note.PVH, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long _start
