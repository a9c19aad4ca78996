// The init in front of a job's program. init_program.py has the assembled bytes.
// System calls: number in x8, arguments in x0 to x5; -errno comes back in x0.

.equ TRAMPOLINE, 5
.equ REPORT, 6

.globl _start
_start:
        sub     sp, sp, #64             // [sp] a set of signals, [sp, 8] a status, [sp, 16] arguments
        mov     x8, #167                // prctl(PR_SET_DUMPABLE, 0)
        mov     x0, #4
        mov     x1, #0
        svc     #0
        mov     x8, #25                 // fcntl(TRAMPOLINE, F_SETFD, FD_CLOEXEC)
        mov     x0, #TRAMPOLINE
        mov     x1, #2
        mov     x2, #1
        svc     #0
        tbnz    x0, #63, die
        mov     x8, #25                 // fcntl(REPORT, F_SETFD, FD_CLOEXEC)
        mov     x0, #REPORT
        mov     x1, #2
        mov     x2, #1
        svc     #0
        tbnz    x0, #63, die
        mov     x9, #-1                 // rt_sigprocmask(SIG_BLOCK, all)
        str     x9, [sp]
        mov     x8, #135
        mov     x0, #0
        mov     x1, sp
        mov     x2, #0
        mov     x3, #8
        svc     #0
        mov     x8, #220                // clone(SIGCHLD), as fork(2)
        mov     x0, #17
        mov     x1, #0
        mov     x2, #0
        mov     x3, #0
        mov     x4, #0
        svc     #0
        tbnz    x0, #63, die
        cbz     x0, child
        mov     w19, w0                 // w19: the program's process
        mov     x8, #436                // close_range(0, TRAMPOLINE)
        mov     x0, #0
        mov     x1, #TRAMPOLINE
        mov     x2, #0
        svc     #0
wait:
        mov     x8, #137                // rt_sigtimedwait(all, no information, no time-out)
        mov     x0, sp
        mov     x1, #0
        mov     x2, #0
        mov     x3, #8
        svc     #0
        cmp     w0, #17                 // SIGCHLD
        b.eq    reap
        cmp     w0, #0
        b.le    wait
        mov     w1, w0                  // kill(the program, the signal)
        mov     x8, #129
        mov     w0, w19
        svc     #0
        b       wait
reap:
        mov     x8, #260                // wait4(any, status, WNOHANG)
        mov     x0, #-1
        add     x1, sp, #8
        mov     x2, #1
        mov     x3, #0
        svc     #0
        cmp     w0, #0
        b.le    wait
        cmp     w0, w19
        b.ne    reap
        mov     x8, #64                 // write(REPORT, status)
        mov     x0, #REPORT
        add     x1, sp, #8
        mov     x2, #4
        svc     #0
        ldr     w9, [sp, #8]            // exit code: the program's, or 128 + its signal
        ands    w0, w9, #0x7f
        b.eq    exited
        add     w0, w0, #128
        b       leave
exited:
        ubfx    w0, w9, #8, #8
leave:
        mov     x8, #94                 // exit_group
        svc     #0
die:
        mov     x0, #127
        b       leave
child:
        mov     x8, #157                // setsid: signals to its group do not come here
        svc     #0
        str     xzr, [sp]               // rt_sigprocmask(SIG_SETMASK, none)
        mov     x8, #135
        mov     x0, #2
        mov     x1, sp
        mov     x2, #0
        mov     x3, #8
        svc     #0
        adr     x9, name                // execveat(TRAMPOLINE, "", {name}, {}, AT_EMPTY_PATH)
        str     x9, [sp, #16]
        str     xzr, [sp, #24]
        mov     x8, #281
        mov     x0, #TRAMPOLINE
        adr     x1, empty
        add     x2, sp, #16
        add     x3, sp, #24
        mov     x4, #0x1000
        svc     #0
        b       die

name:   .ascii  "trampoline"
empty:  .byte   0
