# The trampoline: a prepared child waits in it for its order. trampoline.py has the assembled bytes.
# System calls: number in rax, arguments in rdi, rsi, rdx, r10, r8, r9; -errno comes back in rax.

.equ STATUS, 3
.equ ORDER, 4
.equ IMAGE, 0x10000000
.equ IMAGE_BYTES, 0x1000000
.equ CWD, IMAGE
.equ ARGV, IMAGE + 8
.equ ENVP, IMAGE + 16
.equ COUNT, IMAGE + 24
.equ PATHS, IMAGE + 32

.globl _start
_start:
        mov     $72, %eax               # fcntl(STATUS, F_SETFD, FD_CLOEXEC)
        mov     $STATUS, %edi
        mov     $2, %esi
        mov     $1, %edx
        syscall
        mov     $72, %eax               # fcntl(ORDER, F_SETFD, FD_CLOEXEC)
        mov     $ORDER, %edi
        syscall
        mov     $1, %eax                # write(STATUS, ready)
        mov     $STATUS, %edi
        lea     ready(%rip), %rsi
        mov     $ready_bytes, %edx
        syscall
        xor     %eax, %eax              # read(STATUS): b"go", or the end of the stream
        mov     $STATUS, %edi
        lea     -128(%rsp), %rsi
        mov     $64, %edx
        syscall
        test    %rax, %rax
        jle     die
        mov     $9, %eax                # mmap(IMAGE, PROT_READ, MAP_PRIVATE|MAP_FIXED_NOREPLACE)
        mov     $IMAGE, %edi
        mov     $IMAGE_BYTES, %esi
        mov     $1, %edx
        mov     $0x100002, %r10d
        mov     $ORDER, %r8d
        xor     %r9d, %r9d
        syscall
        xor     %ebx, %ebx              # rbx: the path that is tried
        mov     $-1, %r12d              # r12: the first path that may not be executed, or -1
        xor     %r14d, %r14d            # r14: 1 if the program exists and its interpreter does not
        xor     %r15d, %r15d            # r15: 0 take the order, 1 go to the directory, 2 execute
        cmp     $IMAGE, %rax
        jne     failed
        inc     %r15d
        mov     $80, %eax               # chdir
        mov     CWD, %rdi
        syscall
        test    %rax, %rax
        jnz     failed
        inc     %r15d
next:
        cmp     COUNT, %rbx
        jae     none
        mov     $59, %eax               # execve
        mov     PATHS(,%rbx,8), %rdi
        mov     ARGV, %rsi
        mov     ENVP, %rdx
        syscall
        cmp     $-2, %eax               # ENOENT: no such file, or no such interpreter
        je      missing
        cmp     $-20, %eax              # ENOTDIR
        je      missing
        cmp     $-13, %eax              # EACCES: another directory of PATH may have it
        jne     failed
        cmp     $-1, %r12d
        cmove   %ebx, %r12d
        inc     %rbx
        jmp     next
missing:
        mov     %eax, %r13d
        mov     $21, %eax               # access(F_OK)
        mov     PATHS(,%rbx,8), %rdi
        xor     %esi, %esi
        syscall
        test    %rax, %rax
        mov     %r13d, %eax
        jz      interpreter
        inc     %rbx
        jmp     next
interpreter:
        inc     %r14d
        jmp     failed
none:
        mov     $-13, %eax
        mov     %r12d, %ebx
        cmp     $-1, %r12d
        jne     failed
        mov     $-2, %eax
failed:                                 # write(STATUS, {tag, step, -errno, path, interpreter})
        movl    $0x74, -128(%rsp)
        mov     %r15d, -124(%rsp)
        mov     %eax, -120(%rsp)
        mov     %ebx, -116(%rsp)
        mov     %r14d, -112(%rsp)
        mov     $1, %eax
        mov     $STATUS, %edi
        lea     -128(%rsp), %rsi
        mov     $20, %edx
        syscall
die:
        mov     $231, %eax              # exit_group(127)
        mov     $127, %edi
        syscall

ready:  .ascii  "i{\"ready\":true}"
.equ ready_bytes, . - ready
