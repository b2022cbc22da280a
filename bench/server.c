/* Law: the far end of every measurement, and the floor. It allocates nothing, logs nothing, and waits in one epoll.
 *
 *   server serve HOLD_FD HTTP_FD
 *       serves two listening sockets until its parent dies. HOLD_FD: each connection is held until the client closes it;
 *       HTTP_FD: each request is answered with two bytes, and the connection closed where the request says so
 *   server connect DEVICE SOURCE TARGET PORT
 *       the worker of a C loop: for each "COUNT AT_ONCE" on standard input it connects and closes so often, so many at
 *       the same time, and prints the seconds of CPU and of wall time that this took
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 256

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void watch(int epoll, int fd, unsigned events, unsigned long long tag)
{
    struct epoll_event event = {.events = events, .data.u64 = tag};
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

/* --- the server: a tag is the descriptor, and where it came from --- */

enum { LISTENER = 1, HTTP = 2 };
#define TAG(fd, flags) ((unsigned long long)(fd) << 2 | (flags))

static void accept_all(int epoll, int listener, int flags)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        int one = 1;
        if (flags & HTTP)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        watch(epoll, fd, EPOLLIN, TAG(fd, flags & HTTP));
    }
}

/* Every client here sends a request in one piece and waits for the answer. */
static void answer(int fd)
{
    static const char kept[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok";
    static const char last[] =
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
    char request[4096];
    ssize_t length = read(fd, request, sizeof request - 1);
    if (length < 0 && errno == EAGAIN)
        return;
    if (length <= 0) {
        close(fd);
        return;
    }
    request[length] = 0;
    int closes = strcasestr(request, "\r\nConnection: close") != NULL;
    ssize_t sent = closes ? write(fd, last, sizeof last - 1) : write(fd, kept, sizeof kept - 1);
    if (closes || sent < 0)
        close(fd);
}

static void serve(int hold, int http)
{
    struct epoll_event events[EVENTS];
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    fcntl(hold, F_SETFL, O_NONBLOCK);
    fcntl(http, F_SETFL, O_NONBLOCK);
    watch(epoll, hold, EPOLLIN, TAG(hold, LISTENER));
    watch(epoll, http, EPOLLIN, TAG(http, LISTENER | HTTP));
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int at = 0; at < count; at++) {
            int fd = events[at].data.u64 >> 2, flags = events[at].data.u64 & 3;
            if (flags & LISTENER)
                accept_all(epoll, fd, flags);
            else if (flags & HTTP)
                answer(fd);
            else
                close(fd);
        }
    }
}

/* --- the client --- */

static struct sockaddr_in source = {.sin_family = AF_INET}, target = {.sin_family = AF_INET};
static const char *device;

static void begin(int epoll)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    check(fd, "socket");
    check(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device, strlen(device)), "SO_BINDTODEVICE");
    check(setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one), "IP_BIND_ADDRESS_NO_PORT");
    check(bind(fd, (struct sockaddr *)&source, sizeof source), "bind");
    if (connect(fd, (struct sockaddr *)&target, sizeof target) < 0 && errno != EINPROGRESS)
        check(-1, "connect");
    watch(epoll, fd, EPOLLOUT, fd);
}

static void end(int fd)
{
    int error = 0;
    socklen_t size = sizeof error;
    check(getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size), "SO_ERROR");
    errno = error;
    check(error ? -1 : 0, "connect");
    close(fd);
}

static void connects(int epoll, int count, int at_once)
{
    struct epoll_event events[EVENTS];
    int begun = 0, ended = 0;
    for (; begun < count && begun < at_once; begun++)
        begin(epoll);
    while (ended < count) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int at = 0; at < ready; at++, ended++) {
            end(events[at].data.u64);
            if (begun < count) {
                begin(epoll);
                begun++;
            }
        }
    }
}

static double seconds(struct timeval time) { return time.tv_sec + time.tv_usec / 1e6; }

static double cpu(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

static double wall(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void work(void)
{
    int count, at_once, epoll = epoll_create1(EPOLL_CLOEXEC);
    while (scanf("%d %d", &count, &at_once) == 2) {
        double cpu_before = cpu(), wall_before = wall();
        connects(epoll, count, at_once);
        printf("%.6f %.6f\n", cpu() - cpu_before, wall() - wall_before);
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "serve") == 0)
        serve(atoi(argv[2]), atoi(argv[3]));
    if (argc != 6 || strcmp(argv[1], "connect") != 0)
        return 2;
    device = argv[2];
    inet_pton(AF_INET, argv[3], &source.sin_addr);
    inet_pton(AF_INET, argv[4], &target.sin_addr);
    target.sin_port = htons(atoi(argv[5]));
    work();
    return 0;
}
