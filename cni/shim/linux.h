/*
 * As much of Linux as the shim needs, without a C library: it starts in a third of the time that glibc takes, is some
 * 10 KB, and any gcc builds it for amd64 and arm64, with no headers or libraries of the target.
 *
 * Layouts and numbers are the kernel's (include/uapi) for 64-bit little-endian machines; calls return -errno.
 */
#include <stddef.h>
#include <stdint.h>

enum { EINTR = 4, EEXIST = 17, EPIPE = 32, ECONNRESET = 104 };
enum { O_RDONLY = 0, O_WRONLY = 1, O_CREAT = 0100, O_TRUNC = 01000, O_CLOEXEC = 02000000 };
enum { AF_UNIX = 1, SOCK_STREAM = 1, SOCK_CLOEXEC = 02000000, SOL_SOCKET = 1, SCM_RIGHTS = 1, MSG_NOSIGNAL = 0x4000 };
enum { SO_RCVTIMEO = 20, SO_SNDTIMEO = 21, CLOCK_REALTIME = 0, CLOCK_MONOTONIC = 1, AT_FDCWD = -100 };

struct time { int64_t seconds, fraction; }; /* of a second: nano in a timespec, micro in a timeval */
struct unix_address { uint16_t family; char path[108]; };
struct part { const void *base; size_t length; };
struct descriptor { size_t length; int level, kind, fd, none; }; /* a control message with one */
struct message {
    void *name;
    int name_length;
    struct part *parts;
    size_t count;
    void *control;
    size_t control_length;
    int flags;
};

#if defined __x86_64__
enum {
    READ = 0, WRITE = 1, CLOSE = 3, NANOSLEEP = 35, GETPID = 39, SOCKET = 41, CONNECT = 42, SENDMSG = 46,
    SETSOCKOPT = 54, CLOCK_GETTIME = 228, EXIT_GROUP = 231, OPENAT = 257, MKDIRAT = 258, UNLINKAT = 263, RENAMEAT = 264
};
enum { O_NOFOLLOW = 0400000 };
__asm__(".globl _start\n_start:\n xor %ebp,%ebp\n mov %rsp,%rdi\n and $-16,%rsp\n call begin\n");

static long call(long number, long a, long b, long c, long d, long e)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined __aarch64__
enum {
    READ = 63, WRITE = 64, CLOSE = 57, NANOSLEEP = 101, GETPID = 172, SOCKET = 198, CONNECT = 203, SENDMSG = 211,
    SETSOCKOPT = 208, CLOCK_GETTIME = 113, EXIT_GROUP = 94, OPENAT = 56, MKDIRAT = 34, UNLINKAT = 35, RENAMEAT = 38
};
enum { O_NOFOLLOW = 0100000 };
__asm__(".globl _start\n_start:\n mov x29,#0\n mov x30,#0\n mov x0,sp\n bl begin\n");

static long call(long number, long a, long b, long c, long d, long e)
{
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c,
                  x3 __asm__("x3") = d, x4 __asm__("x4") = e;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory", "cc");
    return x0;
}
#else
#error "shim.c is for amd64 and arm64; elsewhere use shim.py"
#endif

static char **environ;
static int run(void);

/* The kernel leaves argc, argv and the environment on the stack. */
__attribute__((used)) static _Noreturn void begin(long *stack)
{
    environ = (char **)(stack + stack[0] + 2);
    call(EXIT_GROUP, run(), 0, 0, 0, 0);
    __builtin_unreachable();
}

/* gcc calls these by itself, too. */
__attribute__((used)) void *memcpy(void *to, const void *from, size_t length)
{
    for (size_t i = 0; i < length; i++)
        ((char *)to)[i] = ((const char *)from)[i];
    return to;
}

__attribute__((used)) void *memset(void *to, int value, size_t length)
{
    for (size_t i = 0; i < length; i++)
        ((char *)to)[i] = (char)value;
    return to;
}

static size_t length_of(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

static int begins(const char *text, const char *with)
{
    while (*with)
        if (*text++ != *with++)
            return 0;
    return 1;
}

static int same(const char *a, const char *b)
{
    return begins(a, b) && length_of(a) == length_of(b);
}

/* The value of a variable, NULL where it is not set or empty; the first one counts. */
static const char *variable(const char *name)
{
    for (char **pair = environ; *pair; pair++)
        if (begins(*pair, name) && (*pair)[length_of(name)] == '=')
            return (*pair)[length_of(name) + 1] ? *pair + length_of(name) + 1 : NULL;
    return NULL;
}

/* What strerror(3) says of those that a user meets. */
static const char *reason_of(long number)
{
    switch (number < 0 ? -number : number) {
    case 1: return "Operation not permitted";
    case 2: return "No such file or directory";
    case 5: return "Input/output error";
    case 9: return "Bad file descriptor";
    case 12: return "Cannot allocate memory";
    case 13: return "Permission denied";
    case 17: return "File exists";
    case 20: return "Not a directory";
    case 21: return "Is a directory";
    case 23: return "Too many open files in system";
    case 24: return "Too many open files";
    case 27: return "File too large";
    case 28: return "No space left on device";
    case 30: return "Read-only file system";
    case 36: return "File name too long";
    case 40: return "Too many levels of symbolic links";
    case 122: return "Disk quota exceeded";
    default: return "the kernel refuses it";
    }
}
