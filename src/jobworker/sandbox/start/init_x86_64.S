# The init in front of a job's program. init_program.py has the assembled bytes.
# System calls: number in rax, arguments in rdi, rsi, rdx, r10, r8; -errno comes back in rax.

.equ TRAMPOLINE, 5
.equ REPORT, 6

.globl _start
_start:
        sub     $64, %rsp               # (rsp) a set of signals, 8(rsp) a status, 16(rsp) arguments
        mov     $157, %eax              # prctl(PR_SET_DUMPABLE, 0)
        mov     $4, %edi
        xor     %esi, %esi
        syscall
        mov     $72, %eax               # fcntl(TRAMPOLINE, F_SETFD, FD_CLOEXEC)
        mov     $TRAMPOLINE, %edi
        mov     $2, %esi
        mov     $1, %edx
        syscall
        test    %rax, %rax
        js      die
        mov     $72, %eax               # fcntl(REPORT, F_SETFD, FD_CLOEXEC)
        mov     $REPORT, %edi
        syscall
        test    %rax, %rax
        js      die
        movq    $-1, (%rsp)             # rt_sigprocmask(SIG_BLOCK, all)
        mov     $14, %eax
        xor     %edi, %edi
        mov     %rsp, %rsi
        xor     %edx, %edx
        mov     $8, %r10d
        syscall
        mov     $56, %eax               # clone(SIGCHLD), as fork(2)
        mov     $17, %edi
        xor     %esi, %esi
        xor     %edx, %edx
        xor     %r10d, %r10d
        xor     %r8d, %r8d
        syscall
        test    %rax, %rax
        js      die
        jz      child
        mov     %eax, %ebx              # ebx: the program's process
        mov     $436, %eax              # close_range(0, TRAMPOLINE)
        xor     %edi, %edi
        mov     $TRAMPOLINE, %esi
        xor     %edx, %edx
        syscall
wait:
        mov     $128, %eax              # rt_sigtimedwait(all, no information, no time-out)
        mov     %rsp, %rdi
        xor     %esi, %esi
        xor     %edx, %edx
        mov     $8, %r10d
        syscall
        cmp     $17, %eax               # SIGCHLD
        je      reap
        test    %eax, %eax
        jle     wait
        mov     %eax, %esi              # kill(the program, the signal)
        mov     $62, %eax
        mov     %ebx, %edi
        syscall
        jmp     wait
reap:
        mov     $61, %eax               # wait4(any, status, WNOHANG)
        mov     $-1, %rdi
        lea     8(%rsp), %rsi
        mov     $1, %edx
        xor     %r10d, %r10d
        syscall
        test    %eax, %eax
        jle     wait
        cmp     %ebx, %eax
        jne     reap
        mov     $1, %eax                # write(REPORT, status)
        mov     $REPORT, %edi
        lea     8(%rsp), %rsi
        mov     $4, %edx
        syscall
        mov     8(%rsp), %edi           # exit code: the program's, or 128 + its signal
        mov     %edi, %eax
        and     $0x7f, %eax
        jz      exited
        lea     128(%rax), %edi
        jmp     leave
exited:
        shr     $8, %edi
        and     $0xff, %edi
leave:
        mov     $231, %eax              # exit_group
        syscall
die:
        mov     $127, %edi
        jmp     leave
child:
        mov     $112, %eax              # setsid: signals to its group do not come here
        syscall
        movq    $0, (%rsp)              # rt_sigprocmask(SIG_SETMASK, none)
        mov     $14, %eax
        mov     $2, %edi
        mov     %rsp, %rsi
        xor     %edx, %edx
        mov     $8, %r10d
        syscall
        lea     name(%rip), %rax        # execveat(TRAMPOLINE, "", {name}, {}, AT_EMPTY_PATH)
        mov     %rax, 16(%rsp)
        movq    $0, 24(%rsp)
        mov     $322, %eax
        mov     $TRAMPOLINE, %edi
        lea     empty(%rip), %rsi
        lea     16(%rsp), %rdx
        lea     24(%rsp), %r10
        mov     $0x1000, %r8d
        syscall
        jmp     die

name:   .ascii  "trampoline"
empty:  .byte   0
