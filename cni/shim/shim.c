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
 * Build: musl-gcc -static -Os -s -std=c11 -Wall -Wextra -Werror -o build/underlay-shim cni/shim/shim.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define ENVIRONMENT_LIMIT (64 << 10)
#define CONFIG_LIMIT (1 << 20)
#define ANSWER_LIMIT (1 << 20)
#define WAIT_FOR_SERVER_MS 5000
#define RETRY_MS 20
#define ANSWER_LIMIT_S 60

/* CNI specification, section 5, "Error". */
enum { BAD_ENVIRONMENT = 4, IO_FAILURE = 5, BAD_CONFIG = 7, TRY_AGAIN = 11, NOT_AVAILABLE = 50 };

extern char **environ;

/* The request, laid out as it travels: head, environment, configuration. One byte more, to see that there is too much. */
static unsigned char request[12 + ENVIRONMENT_LIMIT + CONFIG_LIMIT + 1];
static size_t request_length;
static const unsigned char *config;
static size_t config_length;
static int pod_ns = -1;
static struct sockaddr_un server = {.sun_family = AF_UNIX};
static char queue[sizeof server.sun_path];

/* -- errors --------------------------------------------------------------------------------------------------------- */

/* The value of the first "cniVersion" in the configuration: errors carry the version that was asked for. */
static void find_version(char version[16])
{
    static const char key[] = "\"cniVersion\"";
    strcpy(version, "1.1.0");
    const unsigned char *end = config + config_length;
    const unsigned char *at = config ? memmem(config, config_length, key, sizeof key - 1) : NULL;
    if (!at)
        return;
    at += sizeof key - 1;
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r' || *at == ':'))
        at++;
    if (at == end || *at++ != '"')
        return;
    char found[16];
    size_t n = 0;
    while (at < end && n < sizeof found - 1 && (*at == '.' || (*at >= '0' && *at <= '9')))
        found[n++] = (char)*at++;
    if (n > 0 && at < end && *at == '"') {
        found[n] = 0;
        strcpy(version, found);
    }
}

static void print_json_string(const char *text)
{
    putchar('"');
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        if (*c == '"' || *c == '\\')
            printf("\\%c", *c);
        else if (*c < 0x20 || *c >= 0x7f)
            printf("\\u%04x", *c);
        else
            putchar(*c);
    putchar('"');
}

/* Prints an error as the specification wants it, and exits. */
static _Noreturn void fail(int code, const char *message, const char *format, ...)
{
    char details[512], version[16];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(details, sizeof details, format, arguments);
    va_end(arguments);
    find_version(version);
    printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":", version, code);
    print_json_string(message);
    printf(",\"details\":");
    print_json_string(details);
    puts("}");
    fflush(stdout);
    _exit(1);
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

/* Adds a variable to the request, which has that length; returns the new one. */
static size_t put_variable(size_t length, const char *variable)
{
    size_t size = strlen(variable) + 1;
    if (length + size > 12 + ENVIRONMENT_LIMIT)
        fail(BAD_ENVIRONMENT, "the environment is too large", "the CNI_ variables have more than %d B",
             ENVIRONMENT_LIMIT);
    memcpy(request + length, variable, size);
    return length + size;
}

static void build_request(void)
{
    /* By this the server tells an ADD that its DEL has overtaken from one that was asked for after it. */
    char asked[48];
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    snprintf(asked, sizeof asked, "UNDERLAY_ASKED=%lld", (long long)now.tv_sec * 1000000000LL + now.tv_nsec);
    size_t length = put_variable(12, asked);
    for (char **variable = environ; *variable; variable++)
        if (strncmp(*variable, "CNI_", 4) == 0)
            length = put_variable(length, *variable);
    size_t environment_length = length - 12;

    config = request + length;
    for (;;) {
        ssize_t n = read(STDIN_FILENO, request + length, CONFIG_LIMIT + 1 - config_length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            fail(IO_FAILURE, "the network configuration cannot be read", "standard input: %s", strerror(errno));
        if (n == 0)
            break;
        length += (size_t)n;
        config_length += (size_t)n;
        if (config_length > CONFIG_LIMIT)
            fail(BAD_CONFIG, "the network configuration is too large", "standard input has more than %d B",
                 CONFIG_LIMIT);
    }
    memcpy(request, "ULC1", 4);
    put_u32(request + 4, (uint32_t)environment_length);
    put_u32(request + 8, (uint32_t)config_length);
    request_length = length;
}

/* -- the server ----------------------------------------------------------------------------------------------------- */

/* Sends the request, the namespace's descriptor with its first byte. A server that refuses it early closes its end: then
 * the answer is there to be read, so a broken pipe is no failure here. */
static int send_request(int connection)
{
    size_t sent = 0;
    while (sent < request_length) {
        struct iovec part = {request + sent, request_length - sent};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        union {
            char space[CMSG_SPACE(sizeof(int))];
            struct cmsghdr align;
        } control = {{0}};
        if (sent == 0 && pod_ns >= 0) {
            message.msg_control = control.space;
            message.msg_controllen = sizeof control.space;
            struct cmsghdr *header = CMSG_FIRSTHDR(&message);
            header->cmsg_level = SOL_SOCKET;
            header->cmsg_type = SCM_RIGHTS;
            header->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(header), &pod_ns, sizeof(int));
        }
        ssize_t n = sendmsg(connection, &message, MSG_NOSIGNAL);
        if (n >= 0)
            sent += (size_t)n;
        else if (errno == EPIPE)
            return 0;
        else if (errno != EINTR)
            return -1;
    }
    return 0;
}

static int read_all(int connection, unsigned char *to, size_t length)
{
    while (length > 0) {
        ssize_t n = read(connection, to, length);
        if (n < 0 && errno == EINTR)
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
    int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0)
        return -1;
    struct timeval limit = {ANSWER_LIMIT_S, 0};
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (connect(connection, (struct sockaddr *)&server, sizeof server) == 0 && send_request(connection) == 0 &&
        read_all(connection, head, sizeof head) == 0 && memcmp(head, "ULR1", 4) == 0) {
        uint32_t size = get_u32(head + 8);
        if (size <= ANSWER_LIMIT && read_all(connection, answer, size) == 0) {
            code = (int)(get_u32(head + 4) & 0xff);
            fwrite(answer, 1, size, stdout);
            if (fflush(stdout) != 0)
                code = 1;
        }
    }
    close(connection);
    return code;
}

/* -- the queue ------------------------------------------------------------------------------------------------------ */

/* Leaves the request for the next server: whole or not at all. Gives the file's path. */
static void leave(const char *run, char path[4096])
{
    char temporary[4096];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    mkdir(run, 0755);
    mkdir(queue, 0700);
    snprintf(path, 4096, "%s/%020lld-%d.del", queue, (long long)now.tv_sec * 1000000000LL + now.tv_nsec, (int)getpid());
    snprintf(temporary, sizeof temporary, "%s/.%d.tmp", queue, (int)getpid());
    int file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    size_t written = 0;
    while (file >= 0 && written < request_length) {
        ssize_t n = write(file, request + written, request_length - written);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            break;
        written += (size_t)n;
    }
    if (file < 0 || written < request_length || close(file) != 0 || rename(temporary, path) != 0) {
        int reason = errno;
        unlink(temporary);
        fail(TRY_AGAIN, "no server, and DEL cannot be queued", "%s: %s; make room there or start underlay-cni", queue,
             strerror(reason));
    }
}

/* -- main ----------------------------------------------------------------------------------------------------------- */

static long long milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int main(void)
{
    const char *command = getenv("CNI_COMMAND");
    const char *run = getenv("UNDERLAY_RUN");
    if (!command || !*command)
        fail(BAD_ENVIRONMENT, "invalid CNI_COMMAND", "CNI_COMMAND is not set; this program is run by a container runtime");
    if (strcmp(command, "VERSION") == 0) {
        puts("{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}");
        return 0;
    }
    if (!run || !*run)
        run = "/run/underlay";
    if (snprintf(server.sun_path, sizeof server.sun_path, "%s/cni.sock", run) >= (int)sizeof server.sun_path ||
        snprintf(queue, sizeof queue, "%s/queue", run) >= (int)sizeof queue)
        fail(BAD_ENVIRONMENT, "invalid UNDERLAY_RUN", "UNDERLAY_RUN: %s is too long for a socket's path", run);
    build_request();

    const char *netns = getenv("CNI_NETNS");
    if (netns && *netns)
        pod_ns = open(netns, O_RDONLY | O_CLOEXEC);

    int is_del = strcmp(command, "DEL") == 0;
    long long end = milliseconds() + WAIT_FOR_SERVER_MS;
    for (;;) {
        int code = ask();
        if (code >= 0)
            return code;
        if (is_del) {
            /* A server that came up meanwhile may have looked into the queue before: it is asked once more. */
            char path[4096];
            leave(run, path);
            code = ask();
            if (code >= 0)
                unlink(path);
            return code >= 0 ? code : 0;
        }
        if (milliseconds() > end)
            break;
        struct timespec pause = {0, RETRY_MS * 1000000L};
        nanosleep(&pause, NULL);
    }
    fail(strcmp(command, "STATUS") == 0 ? NOT_AVAILABLE : TRY_AGAIN, "no server",
         "%s: nobody answered for %d s; is underlay-cni running on this node?", server.sun_path,
         WAIT_FOR_SERVER_MS / 1000);
}
