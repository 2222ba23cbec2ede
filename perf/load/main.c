/* The loop, and the commands on stdin. Each command is answered with one line of JSON; `connect` when all
 * connections are live or have failed. */
#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#define EVENTS 512
#define STDIN_EVENT UINT64_MAX

static void command(struct load *l, char *text)
{
    char name[16] = "";
    unsigned long long a = 0, b = 0, c = 0, d = 0, e = 0;
    sscanf(text, "%15s %llu %llu %llu %llu %llu", name, &a, &b, &c, &d, &e);
    l->now = clock_ns(CLOCK_MONOTONIC);
    if (!strcmp(name, "connect")) { /* resume? spread_ms handshakes first count */
        l->handshakes_max = (unsigned)c;
        connect_all(l, a != 0, b * 1000000, (unsigned)d, (unsigned)e);
        return;
    }
    if (!strcmp(name, "stats")) {
        stats_close_window(l);
        report_stats(l, "stats", &l->window_stats);
        return;
    }
    if (!strcmp(name, "totals")) {
        stats_reset(l);
        report_stats(l, "totals", &l->total);
        return;
    }
    if (!strcmp(name, "cut")) /* first count */
        cut_all(l, (unsigned)a, (unsigned)b);
    else if (!strcmp(name, "reset"))
        stats_reset(l);
    else if (!strcmp(name, "idle"))
        mode_set(l, MODE_IDLE);
    else if (!strcmp(name, "paced")) { /* interval_ns */
        l->interval_ns = a ? a : 1;
        mode_set(l, MODE_PACED);
    } else if (!strcmp(name, "flood")) { /* window */
        l->window = (unsigned)(a < SENT_RING ? a : SENT_RING - 1);
        mode_set(l, MODE_FLOOD);
    } else if (!strcmp(name, "random")) { /* mean interval_ns of each sender */
        l->interval_ns = a ? a : 1;
        mode_set(l, MODE_RANDOM);
    } else if (!strcmp(name, "churn")) { /* interval_ns; 0: off */
        l->churn_ns = a;
        l->next_churn = l->now;
    } else if (!strcmp(name, "once"))
        send_once(l);
    else if (!strcmp(name, "body")) { /* bytes */
        l->body = (size_t)(a < 48 ? 48 : a > BODY_MAX ? BODY_MAX : a);
    } else if (!strcmp(name, "retry")) /* mean ns; 0: never */
        l->retry_ns = a;
    else if (!strcmp(name, "quit"))
        l->quit = true;
    else
        die("unknown command", text);
    printf("{\"event\":\"%s\"}\n", name);
    fflush(stdout);
}

static void read_commands(struct load *l)
{
    static char buffer[4096];
    static size_t have;
    /* What is begun now is not begun when the wait did: it would have to catch up. */
    l->now = clock_ns(CLOCK_MONOTONIC);
    ssize_t n = read(0, buffer + have, sizeof buffer - 1 - have);
    if (n <= 0) { /* the parent process is gone */
        l->quit = true;
        return;
    }
    have += (size_t)n;
    buffer[have] = 0;
    char *at = buffer, *newline;
    while ((newline = strchr(at, '\n'))) {
        *newline = 0;
        command(l, at);
        at = newline + 1;
    }
    have -= (size_t)(at - buffer);
    memmove(buffer, at, have);
}

static int wait_events(struct load *l, struct epoll_event *events)
{
    static bool coarse; /* the kernel has no epoll_pwait2: whole ms */
    uint64_t next = mode_next(l), before = clock_ns(CLOCK_MONOTONIC), left = next > before ? next - before : 0;
    int n = -1;
    if (next == UINT64_MAX || left > 1000000000)
        left = 1000000000;
    if (!coarse) {
        struct timespec t = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
        n = epoll_pwait2(l->epoll, events, EVENTS, &t, NULL);
        coarse = n < 0 && errno == ENOSYS;
    }
    if (coarse)
        n = epoll_wait(l->epoll, events, EVENTS, (int)(left / 1000000));
    l->window_stats.wakeups++;
    l->window_stats.wait_ns += clock_ns(CLOCK_MONOTONIC) - before;
    return n;
}

int main(int argc, char **argv)
{
    static struct load load;
    struct load *l = &load;
    struct epoll_event events[EVENTS];
    struct rlimit files;
    if (argc != 2)
        die("usage", "load PLAN");
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    plan_read(l, argv[1]);
    l->random = (clock_ns(CLOCK_REALTIME) ^ (uint64_t)getpid() << 40) | 1;
    l->rx = malloc(RX_BUFFER + RX_ONCE + 64);
    l->tx = malloc(TX_BUFFER + 64);
    l->waiting = calloc(l->n + 1, sizeof *l->waiting);
    l->epoll = epoll_create1(EPOLL_CLOEXEC);
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    struct epoll_event in = {.events = EPOLLIN, .data.u64 = STDIN_EVENT};
    if (epoll_ctl(l->epoll, EPOLL_CTL_ADD, 0, &in))
        die("stdin", "must be a pipe");
    stats_reset(l);
    printf("{\"event\":\"ready\",\"conns\":%u,\"files\":%llu}\n", l->n, (unsigned long long)files.rlim_cur);
    fflush(stdout);
    while (!l->quit) {
        int n = wait_events(l, events);
        for (int i = 0; i < n; i++) {
            if (events[i].data.u64 == STDIN_EVENT) {
                read_commands(l);
                continue;
            }
            struct conn *c = &l->conns[(uint32_t)events[i].data.u64];
            /* An event of a descriptor that was closed meanwhile is none of the next one's. */
            if (c->timer_epoch == (uint32_t)(events[i].data.u64 >> 32) && c->fd >= 0)
                conn_event(l, c, events[i].events);
            /* Sending in time goes before reading all that is there. */
            if (i % 32 == 31)
                mode_due(l);
        }
        mode_due(l);
    }
    return 0;
}
