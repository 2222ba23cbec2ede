/* The life of a connection: connect, upgrade, script, live, closed. */
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

#define HANDSHAKE_NS 30000000000ull /* from connect to live; a server that takes longer is broken */
#define PER_ADDRESS 250

static void watch(struct load *l, struct conn *c, int op, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.u64 = (uint64_t)c->timer_epoch << 32 | conn_index(l, c)};
    epoll_ctl(l->epoll, op, c->fd, &e);
}

void conn_open(struct load *l, struct conn *c)
{
    unsigned i = conn_index(l, c);
    int one = 1;
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)l->port)};
    from.sin_addr.s_addr = htonl(127u << 24 | l->net << 16 | (i / PER_ADDRESS + 1) << 8 | (i % PER_ADDRESS + 1));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->timer_epoch++;
    c->step = c->in_flight = 0;
    l->handshakes++;
    c->state = CONNECTING;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        snprintf(l->last_error, sizeof l->last_error, "socket: %s", strerror(errno));
        conn_close(l, c, false);
        return;
    }
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(c->fd, (struct sockaddr *)&from, sizeof from) ||
        (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS)) {
        snprintf(l->last_error, sizeof l->last_error, "connect: %s", strerror(errno));
        conn_close(l, c, false);
        return;
    }
    watch(l, c, EPOLL_CTL_ADD, EPOLLOUT);
    timer_add(l, l->now + HANDSHAKE_NS, c, TIMER_CONNECT);
}

void conn_close(struct load *l, struct conn *c, bool meant)
{
    enum state was = c->state;
    if (was == CLOSED)
        return;
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->state = CLOSED;
    c->timer_epoch++;
    if (meant) /* this client leaves before its answers: not an error of the server */
        l->window_stats.abandoned += c->in_flight;
    c->in_flight = 0;
    c->listens = false;
    free(c->rx);
    free(c->tx);
    c->rx = c->tx = NULL;
    c->rx_n = c->tx_n = c->tx_done = 0;
    if (l->corked == c)
        l->corked = NULL;
    if (was == LIVE)
        l->live--;
    else if (was != WAITING)
        l->handshakes--;
    if (!meant) {
        if (was == LIVE)
            l->window_stats.closed++;
        else
            l->window_stats.failed++;
        if (l->retry_ns) {
            c->resume = c->resume || was == LIVE;
            c->state = WAITING;
            c->due = l->now + l->retry_ns / 2 + random_below(l, l->retry_ns);
            timer_add(l, c->due, c, TIMER_CONNECT);
            return;
        }
    }
    if (c->counted) {
        c->counted = false;
        if (!--l->pending)
            report_joined(l);
    }
}

void conn_live(struct load *l, struct conn *c)
{
    c->state = LIVE;
    l->handshakes--;
    l->live++;
    l->window_stats.joined++;
    hist_add(&l->window_stats.join, (int64_t)(l->now - c->due));
    if (c->counted) {
        c->counted = false;
        if (!--l->pending)
            report_joined(l);
    }
    mode_live(l, c);
}

/* Write, and keep what does not fit into the socket's buffer. */
static void write_out(struct load *l, struct conn *c, const char *data, size_t n)
{
    ssize_t done = 0;
    if (!c->tx_n) {
        done = send(c->fd, data, n, MSG_NOSIGNAL);
        l->window_stats.writes++;
        if (done < 0 && errno != EAGAIN) {
            snprintf(l->last_error, sizeof l->last_error, "send: %s", strerror(errno));
            conn_close(l, c, false);
            return;
        }
        if (done < 0)
            done = 0;
        l->window_stats.bytes_out += (uint64_t)done;
    }
    if ((size_t)done == n)
        return;
    c->tx = realloc(c->tx, c->tx_n + n - (size_t)done);
    memcpy(c->tx + c->tx_n, data + done, n - (size_t)done);
    c->tx_n += n - (size_t)done;
    if (!c->listens) {
        c->listens = true;
        watch(l, c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

static void write_more(struct load *l, struct conn *c)
{
    ssize_t done = send(c->fd, c->tx + c->tx_done, c->tx_n - c->tx_done, MSG_NOSIGNAL);
    l->window_stats.writes++;
    if (done < 0) {
        if (errno != EAGAIN)
            conn_close(l, c, false);
        return;
    }
    l->window_stats.bytes_out += (uint64_t)done;
    c->tx_done += (size_t)done;
    if (c->tx_done < c->tx_n)
        return;
    free(c->tx);
    c->tx = NULL;
    c->tx_n = c->tx_done = 0;
    c->listens = false;
    watch(l, c, EPOLL_CTL_MOD, EPOLLIN);
}

/* While a connection is corked, its frames gather, and one write takes them all. */
void cork(struct load *l, struct conn *c)
{
    l->corked = c;
    l->tx_n = 0;
}

void uncork(struct load *l)
{
    struct conn *c = l->corked;
    l->corked = NULL;
    if (c && l->tx_n && c->fd >= 0)
        write_out(l, c, l->tx, l->tx_n);
    l->tx_n = 0;
}

void conn_send(struct load *l, struct conn *c, unsigned opcode, const char *data, size_t n)
{
    bool alone = l->corked != c;
    if (c->fd < 0 || n + 14 > TX_BUFFER)
        return;
    if (alone)
        cork(l, c);
    else if (l->tx_n + n + 14 > TX_BUFFER) {
        write_out(l, c, l->tx, l->tx_n);
        l->tx_n = 0;
        if (c->fd < 0)
            return;
    }
    uint32_t mask = (uint32_t)random_u64(l) | 1;
    char *at = l->tx + l->tx_n;
    size_t header = frame_header(at, opcode, n, mask);
    memcpy(at + header, data, n);
    frame_mask(at + header, n, mask);
    l->tx_n += header + n;
    if (alone)
        uncork(l);
}

static void upgrade(struct load *l, struct conn *c)
{
    char request[4096];
    int n = snprintf(request, sizeof request,
                     "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%s\r\n",
                     l->path.at ? l->path.at : "/", l->port, l->headers.at ? l->headers.at : "");
    c->state = UPGRADING;
    watch(l, c, EPOLL_CTL_MOD, EPOLLIN);
    write_out(l, c, request, (size_t)n);
}

/* The end of the response's header, or 0. */
static size_t upgraded(struct load *l, struct conn *c, const char *data, size_t n)
{
    const char *end = memmem(data, n, "\r\n\r\n", 4);
    if (!end)
        return 0;
    if (n < 12 || memcmp(data, "HTTP/1.1 101", 12)) {
        snprintf(l->last_error, sizeof l->last_error, "upgrade: %.*s", (int)(n < 100 ? n : 100), data);
        conn_close(l, c, false);
        return 0;
    }
    c->state = SCRIPT;
    script_run(l, c);
    return (size_t)(end + 4 - data);
}

static void got_close(struct load *l, struct conn *c, struct frame *f)
{
    unsigned code = f->n >= 2 ? (unsigned)((unsigned char)f->payload[0] << 8 | (unsigned char)f->payload[1]) : 1005;
    snprintf(l->last_error, sizeof l->last_error, "closed with %u %.*s", code, f->n > 2 ? (int)f->n - 2 : 0,
             f->payload + 2);
    conn_send(l, c, 8, f->payload, f->n < 125 ? f->n : 2);
    uncork(l);
    conn_close(l, c, false);
}

static void read_in(struct load *l, struct conn *c)
{
    char *at = l->rx, *end;
    if (c->rx_n) {
        memcpy(at, c->rx, c->rx_n);
        free(c->rx);
        c->rx = NULL;
    }
    ssize_t n = recv(c->fd, at + c->rx_n, RX_ONCE, 0);
    l->window_stats.reads++;
    l->now = clock_ns(CLOCK_MONOTONIC);
    if (n <= 0 && !(n < 0 && errno == EAGAIN)) {
        snprintf(l->last_error, sizeof l->last_error, "%s", n ? strerror(errno) : "end of stream");
        c->rx_n = 0;
        conn_close(l, c, false);
        return;
    }
    end = at + c->rx_n + (n > 0 ? n : 0);
    c->rx_n = 0;
    l->window_stats.bytes_in += (uint64_t)(n > 0 ? n : 0);
    cork(l, c);
    if (c->state == UPGRADING)
        at += upgraded(l, c, at, (size_t)(end - at));
    while (c->fd >= 0 && c->state != UPGRADING && at < end) {
        struct frame f;
        long taken = frame_parse(at, (size_t)(end - at), &f);
        if (taken == FRAME_MORE)
            break;
        if (taken == FRAME_BAD) {
            snprintf(l->last_error, sizeof l->last_error, "bad frame");
            conn_close(l, c, false);
            break;
        }
        at += taken;
        l->window_stats.frames++;
        if (f.opcode == 9)
            conn_send(l, c, 10, f.payload, f.n);
        else if (f.opcode == 8)
            got_close(l, c, &f);
        else if (f.opcode < 3)
            inbox_text(l, c, f.payload, f.n);
    }
    uncork(l);
    if (c->fd >= 0 && at < end) {
        c->rx_n = (size_t)(end - at);
        if (c->rx_n > RX_BUFFER) {
            c->rx_n = 0;
            conn_close(l, c, false);
            return;
        }
        c->rx = malloc(c->rx_n);
        memcpy(c->rx, at, c->rx_n);
    }
}

void conn_event(struct load *l, struct conn *c, uint32_t events)
{
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            snprintf(l->last_error, sizeof l->last_error, "connect: %s", strerror(error));
            conn_close(l, c, false);
        } else
            upgrade(l, c);
        return;
    }
    if (events & EPOLLOUT && c->tx_n)
        write_more(l, c);
    if (c->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        read_in(l, c);
}
