// The trampoline: a prepared child waits in it for its order. trampoline.py has the assembled bytes.
// System calls: number in x8, arguments in x0 to x5; -errno comes back in x0.

.equ STATUS, 3
.equ ORDER, 4
.equ IMAGE, 0x10000000
.equ IMAGE_BYTES, 0x1000000

.globl _start
_start:
        mov     x8, #25                 // fcntl(STATUS, F_SETFD, FD_CLOEXEC)
        mov     x0, #STATUS
        mov     x1, #2
        mov     x2, #1
        svc     #0
        mov     x8, #25                 // fcntl(ORDER, F_SETFD, FD_CLOEXEC)
        mov     x0, #ORDER
        mov     x1, #2
        mov     x2, #1
        svc     #0
        mov     x8, #64                 // write(STATUS, ready)
        mov     x0, #STATUS
        adr     x1, ready
        mov     x2, #ready_bytes
        svc     #0
        sub     sp, sp, #128
        mov     x8, #63                 // read(STATUS): b"go", or the end of the stream
        mov     x0, #STATUS
        mov     x1, sp
        mov     x2, #64
        svc     #0
        cmp     x0, #0
        b.le    die
        mov     x8, #222                // mmap(IMAGE, PROT_READ, MAP_PRIVATE|MAP_FIXED_NOREPLACE)
        mov     x0, #IMAGE
        mov     x1, #IMAGE_BYTES
        mov     x2, #1
        mov     w3, #2
        movk    w3, #0x10, lsl #16
        mov     x4, #ORDER
        mov     x5, #0
        svc     #0
        mov     x19, #IMAGE
        mov     x20, #0                 // x20: the path that is tried
        mov     w21, #-1                // w21: the first path that may not be executed, or -1
        mov     w22, #0                 // w22: 1 if the program exists and its interpreter does not
        mov     w23, #0                 // w23: 0 take the order, 1 go to the directory, 2 execute
        cmp     x0, x19
        b.ne    failed
        mov     w23, #1
        mov     x8, #49                 // chdir
        ldr     x0, [x19]
        svc     #0
        cbnz    x0, failed
        mov     w23, #2
next:
        ldr     x9, [x19, #24]
        cmp     x20, x9
        b.hs    none
        add     x24, x19, #32
        mov     x8, #221                // execve
        ldr     x0, [x24, x20, lsl #3]
        ldr     x1, [x19, #8]
        ldr     x2, [x19, #16]
        svc     #0
        cmn     w0, #2                  // ENOENT: no such file, or no such interpreter
        b.eq    missing
        cmn     w0, #20                 // ENOTDIR
        b.eq    missing
        cmn     w0, #13                 // EACCES: another directory of PATH may have it
        b.ne    failed
        cmn     w21, #1
        csel    w21, w20, w21, eq
        add     x20, x20, #1
        b       next
missing:
        mov     w25, w0
        mov     x8, #48                 // faccessat(AT_FDCWD, F_OK)
        mov     x0, #-100
        ldr     x1, [x24, x20, lsl #3]
        mov     x2, #0
        svc     #0
        mov     x9, x0
        mov     w0, w25
        cbz     x9, interpreter
        add     x20, x20, #1
        b       next
interpreter:
        mov     w22, #1
        b       failed
none:
        mov     w0, #-13
        mov     w20, w21
        cmn     w21, #1
        b.ne    failed
        mov     w0, #-2
failed:                                 // write(STATUS, {tag, step, -errno, path, interpreter})
        mov     w9, #0x74
        stp     w9, w23, [sp]
        stp     w0, w20, [sp, #8]
        str     w22, [sp, #16]
        mov     x8, #64
        mov     x0, #STATUS
        mov     x1, sp
        mov     x2, #20
        svc     #0
die:
        mov     x8, #94                 // exit_group(127)
        mov     x0, #127
        svc     #0

ready:  .ascii  "i{\"ready\":true}"
.equ ready_bytes, . - ready
