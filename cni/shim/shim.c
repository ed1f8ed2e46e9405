/*
 * What the container runtime executes as the CNI plugin "underlay".
 *
 * It passes its CNI_ environment, its standard input and an open descriptor of the pod's network namespace to the server
 * behind $UNDERLAY_RUN/cni.sock, and prints what that answers. cni/message.py describes the protocol; shim.py behaves
 * the same where no compiler is.
 *
 *   VERSION                  is answered here
 *   ADD CHECK GC STATUS      wait up to 5 s for a server, which may be on its way up (an upgrade)
 *   DEL                      is left in $UNDERLAY_RUN/queue when no server answers, and succeeds
 *
 * A request is sent again when the server ends before it has answered: every verb may be repeated.
 *
 * Build: gcc @cni/shim/flags -o build/underlay-shim cni/shim/shim.c      (make shim; make shim-arm64)
 */
#include <stdarg.h>

#include "linux.h"

#define ENVIRONMENT_LIMIT (64 << 10)
#define CONFIG_LIMIT (1 << 20)
#define ANSWER_LIMIT (1 << 20)
#define WAIT_FOR_SERVER_S 5
#define RETRY_MS 20
#define ANSWER_LIMIT_S 60
#define PATH_LIMIT 160 /* of texts that we put together: a socket's path, and what a queued DEL adds to it */

/* CNI specification, section 5, "Error". */
enum { BAD_ENVIRONMENT = 4, IO_FAILURE = 5, BAD_CONFIG = 7, TRY_AGAIN = 11, NOT_AVAILABLE = 50 };

/* The request, laid out as it travels: head, environment, configuration. One byte more, to see that there is too much. */
static unsigned char request[12 + ENVIRONMENT_LIMIT + CONFIG_LIMIT + 1];
static size_t request_length;
static const unsigned char *config;
static size_t config_length;
static long pod_ns = -1;
static struct unix_address server = {.family = AF_UNIX};
static char queue[sizeof server.path];

/* -- text ----------------------------------------------------------------------------------------------------------- */

static char out[4096];
static size_t out_length;

static int write_all(long file, const void *data, size_t length, long *problem)
{
    for (size_t written = 0; written < length;) {
        long n = call(WRITE, file, (long)((const char *)data + written), (long)(length - written), 0, 0);
        if (n < 0 && n != -EINTR) {
            *problem = n;
            return -1;
        }
        written += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static void put(const char *text)
{
    for (; *text && out_length < sizeof out; text++)
        out[out_length++] = *text;
}

static void put_json(const char *text)
{
    static const char hex[] = "0123456789abcdef";
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        char as_is[] = {(char)*c, 0}, quoted[] = {'\\', (char)*c, 0};
        char code[] = {'\\', 'u', '0', '0', hex[*c >> 4], hex[*c & 15], 0};
        if (out_length + 64 > sizeof out)
            return; /* a path as long as this helps nobody; the end of the object has its room */
        put(*c >= 0x80 ? "\\ufffd" : *c < 0x20 || *c == 0x7f ? code : *c == '"' || *c == '\\' ? quoted : as_is);
    }
}

/* Appends to ``text``, which has PATH_LIMIT bytes; what has no room is not written, and no path of ours is that long. */
static void append(char *text, const char *more)
{
    size_t length = length_of(text);
    while (*more && length < PATH_LIMIT - 1)
        text[length++] = *more++;
    text[length] = 0;
}

static void append_number(char *text, long number, int digits)
{
    char found[21];
    int at = 20;
    found[20] = 0;
    for (; number > 0 || digits > 0; number /= 10, digits--)
        found[--at] = (char)('0' + number % 10);
    append(text, found + at);
}

static long nanoseconds(int clock)
{
    struct time now;
    call(CLOCK_GETTIME, clock, (long)&now, 0, 0, 0);
    return now.seconds * 1000000000L + now.fraction;
}

/* -- errors --------------------------------------------------------------------------------------------------------- */

/* The value of the first "cniVersion" that has a version for a value: errors carry the one that was asked for. */
static const char *asked_version(void)
{
    static const char key[] = "\"cniVersion\"";
    static char found[16];
    const unsigned char *end = config + config_length;
    for (const unsigned char *start = config; start && start + sizeof key - 1 < end; start++) {
        if (!begins((const char *)start, key))
            continue;
        const unsigned char *at = start + sizeof key - 1;
        while (at < end && (*at == ' ' || (*at >= '\t' && *at <= '\r') || *at == ':'))
            at++;
        if (at == end || *at++ != '"')
            continue;
        size_t n = 0;
        while (at < end && n < sizeof found - 1 && (*at == '.' || (*at >= '0' && *at <= '9')))
            found[n++] = (char)*at++;
        found[n] = 0;
        if (n > 0 && at < end && *at == '"')
            return found;
    }
    return "1.1.0";
}

/* Prints an error as the specification wants it, its details in pieces up to NULL, and exits. */
static _Noreturn void fail(int code, const char *message, ...)
{
    char number[PATH_LIMIT] = "";
    long ignored;
    append_number(number, code, 0);
    put("{\"cniVersion\":\"");
    put(asked_version());
    put("\",\"code\":");
    put(number);
    put(",\"msg\":\"");
    put(message);
    put("\",\"details\":\"");
    va_list pieces;
    va_start(pieces, message);
    for (const char *piece; (piece = va_arg(pieces, const char *));)
        put_json(piece);
    va_end(pieces);
    put("\"}\n");
    write_all(1, out, out_length, &ignored);
    call(EXIT_GROUP, 1, 0, 0, 0, 0);
    __builtin_unreachable();
}

/* -- the request ---------------------------------------------------------------------------------------------------- */

static void put_u32(unsigned char *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

static uint32_t get_u32(const unsigned char *at)
{
    return at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static int has_value(const char *pair)
{
    while (*pair && *pair != '=')
        pair++;
    return *pair == '=';
}

/* Adds a variable to the request, which has that length; returns the new one. */
static size_t put_variable(size_t length, const char *pair)
{
    size_t size = length_of(pair) + 1;
    if (length + size > 12 + ENVIRONMENT_LIMIT)
        fail(BAD_ENVIRONMENT, "the environment is too large", "the CNI_ variables have more than 65536 B", NULL);
    memcpy(request + length, pair, size);
    return length + size;
}

static void build_request(void)
{
    /* By this the server tells an ADD that its DEL has overtaken from one that was asked for after it. */
    char asked[PATH_LIMIT] = "UNDERLAY_ASKED=";
    append_number(asked, nanoseconds(CLOCK_MONOTONIC), 1);
    size_t length = put_variable(12, asked);
    for (char **pair = environ; *pair; pair++)
        if (begins(*pair, "CNI_") && has_value(*pair))
            length = put_variable(length, *pair);
    size_t environment_length = length - 12;

    const unsigned char *text = request + length;
    for (;;) {
        long n = call(READ, 0, (long)(request + length), (long)(CONFIG_LIMIT + 1 - config_length), 0, 0);
        if (n == -EINTR)
            continue;
        if (n < 0)
            fail(IO_FAILURE, "the network configuration cannot be read", "standard input: ", reason_of(n), NULL);
        if (n == 0)
            break;
        config = text;
        length += (size_t)n;
        config_length += (size_t)n;
        if (config_length > CONFIG_LIMIT)
            fail(BAD_CONFIG, "the network configuration is too large", "standard input has more than 1048576 B", NULL);
    }
    memcpy(request, "ULC1", 4);
    put_u32(request + 4, (uint32_t)environment_length);
    put_u32(request + 8, (uint32_t)config_length);
    request_length = length;
}

/* -- the server ----------------------------------------------------------------------------------------------------- */

/* Sends the request, the namespace's descriptor with its first byte. A server that refuses it early closes its end: then
 * the answer is there to be read, so that is no failure here. */
static int send_request(long connection)
{
    size_t sent = 0;
    while (sent < request_length) {
        struct part part = {request + sent, request_length - sent};
        struct descriptor control = {sizeof control - sizeof control.none, SOL_SOCKET, SCM_RIGHTS, (int)pod_ns, 0};
        struct message message = {.parts = &part, .count = 1};
        if (sent == 0 && pod_ns >= 0) {
            message.control = &control;
            message.control_length = sizeof control;
        }
        long n = call(SENDMSG, connection, (long)&message, MSG_NOSIGNAL, 0, 0);
        if (n >= 0)
            sent += (size_t)n;
        else if (n == -EPIPE || n == -ECONNRESET)
            return 0;
        else if (n != -EINTR)
            return -1;
    }
    return 0;
}

static int read_all(long connection, unsigned char *to, size_t length)
{
    while (length > 0) {
        long n = call(READ, connection, (long)to, (long)length, 0, 0);
        if (n == -EINTR)
            continue;
        if (n <= 0)
            return -1;
        to += n;
        length -= (size_t)n;
    }
    return 0;
}

/* Asks once. Prints what the server answers and returns its exit code; -1, and nothing is printed, without a whole
 * answer. */
static int ask(void)
{
    static unsigned char answer[ANSWER_LIMIT];
    unsigned char head[12];
    int code = -1;
    long problem, connection = call(SOCKET, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, 0, 0);
    if (connection < 0)
        return -1;
    struct time limit = {ANSWER_LIMIT_S, 0};
    call(SETSOCKOPT, connection, SOL_SOCKET, SO_RCVTIMEO, (long)&limit, sizeof limit);
    call(SETSOCKOPT, connection, SOL_SOCKET, SO_SNDTIMEO, (long)&limit, sizeof limit);
    if (call(CONNECT, connection, (long)&server, sizeof server, 0, 0) == 0 && send_request(connection) == 0 &&
        read_all(connection, head, sizeof head) == 0 && begins((const char *)head, "ULR1")) {
        uint32_t size = get_u32(head + 8);
        if (size <= ANSWER_LIMIT && read_all(connection, answer, size) == 0)
            code = write_all(1, answer, size, &problem) == 0 ? (int)(get_u32(head + 4) & 0xff) : 1;
    }
    call(CLOSE, connection, 0, 0, 0, 0);
    return code;
}

/* -- the queue ------------------------------------------------------------------------------------------------------ */

static long make_folder(const char *path, int mode)
{
    long result = call(MKDIRAT, AT_FDCWD, (long)path, mode, 0, 0);
    return result == -EEXIST ? 0 : result;
}

static long save(const char *run, const char *temporary, const char *path)
{
    long problem = make_folder(run, 0755);
    if (problem || (problem = make_folder(queue, 0700)))
        return problem;
    long file = call(OPENAT, AT_FDCWD, (long)temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600, 0);
    if (file < 0)
        return file;
    write_all(file, request, request_length, &problem);
    long closed = call(CLOSE, file, 0, 0, 0, 0);
    if (!problem && !(problem = closed))
        problem = call(RENAMEAT, AT_FDCWD, (long)temporary, AT_FDCWD, (long)path, 0);
    if (problem)
        call(UNLINKAT, AT_FDCWD, (long)temporary, 0, 0, 0);
    return problem;
}

/* Leaves the request for the next server: whole or not at all. Gives the file's path. */
static void leave(const char *run, char path[PATH_LIMIT])
{
    char temporary[PATH_LIMIT] = "";
    long pid = call(GETPID, 0, 0, 0, 0, 0);
    path[0] = 0;
    append(path, queue);
    append(path, "/");
    append_number(path, nanoseconds(CLOCK_REALTIME), 20);
    append(path, "-");
    append_number(path, pid, 0);
    append(path, ".del");
    append(temporary, queue);
    append(temporary, "/.");
    append_number(temporary, pid, 0);
    append(temporary, ".tmp");
    long problem = save(run, temporary, path);
    if (problem)
        fail(TRY_AGAIN, "no server, and DEL cannot be queued", queue, ": ", reason_of(problem),
             "; make room there or start underlay-cni", NULL);
}

/* -- main ----------------------------------------------------------------------------------------------------------- */

static int run(void)
{
    static const char versions[] =
        "{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n";
    const char *command = variable("CNI_COMMAND"), *folder = variable("UNDERLAY_RUN"), *netns = variable("CNI_NETNS");
    long problem;
    if (!command)
        fail(BAD_ENVIRONMENT, "invalid CNI_COMMAND",
             "CNI_COMMAND is not set; this program is run by a container runtime", NULL);
    if (same(command, "VERSION"))
        return write_all(1, versions, sizeof versions - 1, &problem) ? 1 : 0;
    if (!folder)
        folder = "/run/underlay";
    if (length_of(folder) + sizeof "/cni.sock" > sizeof server.path)
        fail(BAD_ENVIRONMENT, "invalid UNDERLAY_RUN", "UNDERLAY_RUN: ", folder, " is too long for a socket's path",
             NULL);
    append(server.path, folder);
    append(server.path, "/cni.sock");
    append(queue, folder);
    append(queue, "/queue");
    build_request();
    if (netns)
        pod_ns = call(OPENAT, AT_FDCWD, (long)netns, O_RDONLY | O_CLOEXEC, 0, 0);

    long end = nanoseconds(CLOCK_MONOTONIC) + WAIT_FOR_SERVER_S * 1000000000L;
    for (;;) {
        int code = ask();
        if (code >= 0)
            return code;
        if (same(command, "DEL")) {
            /* A server that came up meanwhile may have looked into the queue before: it is asked once more. */
            char path[PATH_LIMIT];
            leave(folder, path);
            code = ask();
            if (code >= 0)
                call(UNLINKAT, AT_FDCWD, (long)path, 0, 0, 0);
            return code >= 0 ? code : 0;
        }
        if (nanoseconds(CLOCK_MONOTONIC) > end)
            break;
        struct time pause = {0, RETRY_MS * 1000000L};
        call(NANOSLEEP, (long)&pause, 0, 0, 0, 0);
    }
    fail(same(command, "STATUS") ? NOT_AVAILABLE : TRY_AGAIN, "no server", server.path,
         ": nobody answered for 5 s; is underlay-cni running on this node?", NULL);
}
