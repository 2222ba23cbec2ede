/* The floor: no server that calls send() once per delivery can be faster.
 *
 * A loop over epoll that does only what every delivery needs: one send() of a frame that was built
 * once per message. The handshake is checked for its key alone, frames only for what the load generator sends; no
 * queues, no limits, no timers. A member that reads slowly stops all others, which is fair for a floor only.
 *
 *     floor --port N
 *
 * Says the protocol of relay.py: "J1 2" joins the rooms 1 and 2 and is answered "joined", "M1 text" goes to all in
 * room 1 as it came.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    BACKLOG = 4096,
    EVENTS = 1024,     /* per epoll_wait */
    IN_BYTES = 16384,  /* of one connection, unparsed: the largest message */
    STUCK_MS = 10000,  /* a member that takes nothing for so long is cut off */
};

struct conn {
    int fd;
    int open;          /* upgraded */
    uint32_t have;     /* bytes in `in` */
    int *rooms;
    int rooms_n;
    uint8_t in[IN_BYTES];
};

struct room {
    struct conn **members;
    int n, size;
};

static struct room *rooms;
static int rooms_size;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void *grown(void *old, size_t bytes) {
    void *p = realloc(old, bytes);
    if (!p)
        die("realloc");
    return p;
}

/* -- SHA-1 (RFC 3174) of a handshake key, in base64 (RFC 6455, 4.2.2) */

static uint32_t rol(uint32_t x, int n) { return x << n | x >> (32 - n); }

static void sha1_block(uint32_t h[5], const uint8_t *p) {
    uint32_t w[80], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 80; i++)
        w[i] = rol(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    for (int i = 0; i < 80; i++) {
        uint32_t f, k;
        if (i < 20)
            f = (b & c) | (~b & d), k = 0x5a827999;
        else if (i < 40)
            f = b ^ c ^ d, k = 0x6ed9eba1;
        else if (i < 60)
            f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdc;
        else
            f = b ^ c ^ d, k = 0xca62c1d6;
        uint32_t t = rol(a, 5) + f + e + k + w[i];
        e = d, d = c, c = rol(b, 30), b = a, a = t;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
}

/* key: 24 characters; out: 28 and a zero. */
static void accept_key(const char *key, char *out) {
    uint8_t block[128] = {0}, digest[21] = {0};
    uint32_t h[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    memcpy(block, key, 24);
    memcpy(block + 24, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    block[60] = 0x80;
    block[126] = 60 * 8 >> 8;
    block[127] = (60 * 8) & 255;
    sha1_block(h, block);
    sha1_block(h, block + 64);
    for (int i = 0; i < 20; i++)
        digest[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
    static const char code[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 7; i++) {
        uint32_t v = (uint32_t)digest[3 * i] << 16 | (uint32_t)digest[3 * i + 1] << 8 | digest[3 * i + 2];
        for (int j = 0; j < 4; j++)
            *out++ = code[v >> (18 - 6 * j) & 63];
    }
    out[-1] = '=';
    *out = 0;
}

/* -- sending */

static void send_all(struct conn *c, const uint8_t *p, size_t n) {
    while (n) {
        ssize_t sent = send(c->fd, p, n, MSG_NOSIGNAL);
        if (sent >= 0) {
            p += sent;
            n -= (size_t)sent;
            continue;
        }
        struct pollfd wait = {.fd = c->fd, .events = POLLOUT};
        if (errno != EAGAIN || poll(&wait, 1, STUCK_MS) != 1) {
            shutdown(c->fd, SHUT_RDWR); /* its end is then read, and cleaned up after, in its turn */
            return;
        }
    }
}

static size_t header(uint8_t *out, uint8_t opcode, size_t n) {
    out[0] = 0x80 | opcode;
    if (n < 126) {
        out[1] = (uint8_t)n;
        return 2;
    }
    out[1] = 126;
    out[2] = (uint8_t)(n >> 8);
    out[3] = (uint8_t)n;
    return 4;
}

static size_t frame(uint8_t *out, uint8_t opcode, const uint8_t *p, size_t n) {
    size_t head = header(out, opcode, n);
    memcpy(out + head, p, n);
    return head + n;
}

/* -- rooms */

static struct room *room(int number) {
    if (number >= rooms_size) {
        int size = number * 2 + 16;
        rooms = grown(rooms, sizeof *rooms * (size_t)size);
        memset(rooms + rooms_size, 0, sizeof *rooms * (size_t)(size - rooms_size));
        rooms_size = size;
    }
    return &rooms[number];
}

static void join(struct conn *c, int number) {
    struct room *r = room(number);
    if (r->n == r->size) {
        r->size = r->size * 2 + 16;
        r->members = grown(r->members, sizeof *r->members * (size_t)r->size);
    }
    r->members[r->n++] = c;
    c->rooms = grown(c->rooms, sizeof *c->rooms * (size_t)(c->rooms_n + 1));
    c->rooms[c->rooms_n++] = number;
}

static void leave_all(struct conn *c) {
    for (int i = 0; i < c->rooms_n; i++) {
        struct room *r = &rooms[c->rooms[i]];
        for (int j = 0; j < r->n; j++)
            if (r->members[j] == c) {
                r->members[j] = r->members[--r->n];
                break;
            }
    }
    free(c->rooms);
}

/* -- receiving */

static void message(struct conn *c, const uint8_t *p, size_t n) {
    static uint8_t out[IN_BYTES + 4];
    if (n && *p == 'M') {
        struct room *r = room(atoi((const char *)p + 1));
        size_t size = frame(out, 1, p, n);
        for (int i = 0; i < r->n; i++)
            send_all(r->members[i], out, size);
    } else if (n && *p == 'J') {
        char list[IN_BYTES], *rest = NULL;
        memcpy(list, p + 1, n - 1);
        list[n - 1] = 0;
        for (char *word = strtok_r(list, " ", &rest); word; word = strtok_r(NULL, " ", &rest))
            join(c, atoi(word));
        send_all(c, out, frame(out, 1, (const uint8_t *)"joined", 6));
    }
}

/* How many bytes of `in` are done with; -1: close. */
static ssize_t upgrade(struct conn *c) {
    uint8_t *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end)
        return c->have == IN_BYTES ? -1 : 0;
    *end = 0;
    char *key = strcasestr((char *)c->in, "\r\nsec-websocket-key:");
    if (!key)
        return -1;
    key += 20;
    key += strspn(key, " ");
    if (strlen(key) < 24)
        return -1;
    char accepted[32], reply[160];
    accept_key(key, accepted);
    int n = snprintf(reply, sizeof reply,
                     "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Accept: %s\r\n\r\n",
                     accepted);
    send_all(c, (uint8_t *)reply, (size_t)n);
    c->open = 1;
    return end + 4 - c->in;
}

static ssize_t one_frame(struct conn *c, uint8_t *p, size_t have) {
    if (have < 6)
        return 0;
    size_t n = p[1] & 127, head = 6;
    if (!(p[1] & 0x80) || n == 127)
        return -1;
    if (n == 126) {
        if (have < 8)
            return 0;
        n = (size_t)p[2] << 8 | p[3];
        head = 8;
    }
    if (head + n > IN_BYTES)
        return -1;
    if (have < head + n)
        return 0;
    uint8_t *body = p + head, *mask = body - 4, out[256];
    for (size_t i = 0; i < n; i++)
        body[i] ^= mask[i & 3];
    switch (p[0] & 15) {
    case 1:
        message(c, body, n);
        break;
    case 8:
        return -1;
    case 9:
        if (n > 125)
            return -1;
        send_all(c, out, frame(out, 10, body, n));
    }
    return (ssize_t)(head + n);
}

/* 0: it is over. */
static int readable(struct conn *c) {
    ssize_t got = recv(c->fd, c->in + c->have, IN_BYTES - c->have, 0);
    if (got < 0 && errno == EAGAIN)
        return 1;
    if (got <= 0)
        return 0;
    c->have += (uint32_t)got;
    size_t at = 0;
    for (;;) {
        ssize_t done = c->open ? one_frame(c, c->in + at, c->have - at) : upgrade(c);
        if (done < 0)
            return 0;
        if (done == 0)
            break;
        at += (size_t)done;
    }
    c->have -= (uint32_t)at;
    memmove(c->in, c->in + at, c->have);
    return 1;
}

int main(int argc, char **argv) {
    int port = 0, one = 1;
    for (int i = 1; i + 1 < argc; i += 2)
        if (!strcmp(argv[i], "--port"))
            port = atoi(argv[i + 1]);
    if (!port) {
        fprintf(stderr, "usage: %s --port N\n", argv[0]);
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), ready = epoll_create1(0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, BACKLOG))
        die("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    epoll_ctl(ready, EPOLL_CTL_ADD, listener, &event);

    for (;;) {
        int n = epoll_wait(ready, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            if (c) {
                if (!readable(c)) {
                    leave_all(c);
                    close(c->fd);
                    free(c);
                }
                continue;
            }
            int fd;
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                c = grown(NULL, sizeof *c);
                c->fd = fd;
                c->open = 0;
                c->have = 0;
                c->rooms = NULL;
                c->rooms_n = 0;
                event.data.ptr = c;
                epoll_ctl(ready, EPOLL_CTL_ADD, fd, &event);
            }
        }
    }
}
