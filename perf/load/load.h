/* The load generator: many WebSocket clients in one thread over epoll. What is where:
 *   plan.c    reads which connections there are and what they say
 *   wire.c    bytes to frames and back
 *   conn.c    the life of a connection: connect, upgrade, script, live, closed
 *   inbox.c   what a received frame is: ping, delivery, acknowledgement, error, what a script waits for
 *   modes.c   when messages are sent, and when connections come and go
 *   report.c  what was counted, as JSON
 *   main.c    the loop, and the commands on stdin
 * One `struct load` holds everything; all times are CLOCK_MONOTONIC in ns. */
#ifndef LOAD_H
#define LOAD_H

#include "histogram.h"

#include <stdbool.h>
#include <stddef.h>
#include <time.h>

#define RX_BUFFER (1u << 20) /* larger than any frame that a server under test sends */
#define RX_ONCE (256u << 10) /* one read */
#define TX_BUFFER (1u << 20) /* what one connection answers to one read */
#define SENT_RING 256        /* send times by request id; more are never in flight in one connection */
#define MARKER "~T"          /* in a body, then 16 hex digits of send time and 8 of the sender */
#define MARKER_BYTES 26
#define BODY_MAX (64u << 10)

struct text {
    const char *at;
    size_t n;
};

enum step_kind { STEP_SEND, STEP_WAIT };

struct step {
    enum step_kind kind;
    unsigned count;
    struct text text, capture;
};

struct script {
    struct step *steps;
    unsigned n;
};

enum piece { PIECE_END, PIECE_ID, PIECE_CID, PIECE_BODY };

/* A template, cut at its placeholders: each literal text is followed by a piece. */
struct template {
    struct text literal[8];
    enum piece then[8];
};

enum state { CLOSED, WAITING, CONNECTING, UPGRADING, SCRIPT, LIVE };

struct conn {
    int fd;
    enum state state;
    bool resume;   /* which script */
    bool listens;  /* EPOLLOUT is asked for */
    bool counted;  /* among those that the current `connect` or `reconnect` waits for */
    unsigned step, left; /* of the script; frames that the step still waits for */
    unsigned fan;  /* deliveries that one message of this connection is expected to cause */
    unsigned next_id, in_flight;
    unsigned timer_epoch; /* timers of an older epoch are ignored */
    uint64_t due;  /* when it was meant to connect */
    uint64_t *sent; /* SENT_RING, of senders */
    char *rx, *tx; /* an incomplete frame; what could not be written */
    size_t rx_n, tx_n, tx_done;
    char *captured;
    struct script scripts[2];
    struct template *sends; /* in turn; without any it only listens */
    unsigned sends_n, send_turn;
};

struct stats {
    struct histogram ack, delivery, join, late;
    /* counters, one after the other: see stats_reset */
    uint64_t sent, acked, abandoned, delivered, expected, replayed, errors, closed, failed, joined, frames, other, bytes_in,
        bytes_out, reads, writes, wakeups, wait_ns, cpu_ns, wall_ns;
};

enum mode { MODE_IDLE, MODE_PACED, MODE_FLOOD, MODE_RANDOM };

struct timer {
    uint64_t due;
    unsigned conn, epoch;
    enum { TIMER_SEND, TIMER_CONNECT } kind;
};

struct load {
    /* the plan */
    struct text path, headers, ack, error, ping, pong;
    unsigned port, net, base; /* of source addresses; number of the first connection among all processes */
    size_t body;
    struct conn *conns;
    unsigned n, senders_n, *senders;
    /* the run */
    int epoll;
    enum mode mode;
    uint64_t interval_ns, next_due, churn_ns, next_churn, retry_ns, now, random, connect_began, window_began, window_cpu;
    unsigned window, turn, mode_epoch, pending, handshakes, handshakes_max, live;
    struct timer *heap;
    unsigned heap_n, heap_cap;
    unsigned *waiting, waiting_at, waiting_n; /* due to connect, when fewer handshakes are under way */
    struct stats window_stats, total;
    bool quit;
    /* one of each for all connections */
    char *rx, *tx;
    size_t tx_n;
    struct conn *corked; /* whose frames gather in tx */
    char *filler;
    char last_error[256];
};

static inline uint64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* xorshift64*: jitter and masks need nothing better */
static inline uint64_t random_u64(struct load *l)
{
    l->random ^= l->random >> 12;
    l->random ^= l->random << 25;
    l->random ^= l->random >> 27;
    return l->random * 2685821657736338717ull;
}

static inline uint64_t random_below(struct load *l, uint64_t limit)
{
    return limit ? random_u64(l) % limit : 0;
}

static inline unsigned conn_index(struct load *l, struct conn *c)
{
    return (unsigned)(c - l->conns);
}

/* plan.c */
void plan_read(struct load *l, const char *path);
void die(const char *what, const char *detail) __attribute__((noreturn));

/* wire.c */
#define FRAME_MORE 0
#define FRAME_BAD (-1)
struct frame {
    unsigned opcode;
    const char *payload;
    size_t n;
};
long frame_parse(const char *data, size_t n, struct frame *out); /* bytes taken, or FRAME_… */
size_t frame_header(char *out, unsigned opcode, size_t n, uint32_t mask); /* at most 14 bytes */
void frame_mask(char *data, size_t n, uint32_t mask);

/* conn.c */
void conn_open(struct load *l, struct conn *c);
void conn_event(struct load *l, struct conn *c, uint32_t events);
void conn_close(struct load *l, struct conn *c, bool meant);
void conn_send(struct load *l, struct conn *c, unsigned opcode, const char *data, size_t n);
void conn_live(struct load *l, struct conn *c);
void cork(struct load *l, struct conn *c);
void uncork(struct load *l);

/* inbox.c */
void script_run(struct load *l, struct conn *c);
void inbox_text(struct load *l, struct conn *c, const char *data, size_t n);

/* modes.c */
void mode_set(struct load *l, enum mode mode);
void send_once(struct load *l);
void mode_live(struct load *l, struct conn *c);
void mode_answered(struct load *l, struct conn *c);
void mode_due(struct load *l);
uint64_t mode_next(struct load *l);
void timer_add(struct load *l, uint64_t due, struct conn *c, int kind);
void connect_all(struct load *l, bool resume, uint64_t spread_ns, unsigned first, unsigned count);
void cut_all(struct load *l, unsigned first, unsigned count);

/* report.c */
void report_stats(struct load *l, const char *event, const struct stats *s);
void report_joined(struct load *l);
void stats_reset(struct load *l);
void stats_close_window(struct load *l); /* fills in what is measured at its end */

#endif
