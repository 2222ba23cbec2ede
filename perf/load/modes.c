/* When messages are sent, and when connections come and go. */
#include "load.h"

#include <stdlib.h>

static char *put(char *at, struct text text)
{
    memcpy(at, text.at, text.n);
    return at + text.n;
}

static char *put_hex(char *at, uint64_t value, unsigned digits)
{
    for (unsigned i = digits; i--; value >>= 4)
        at[i] = "0123456789abcdef"[value & 15];
    return at + digits;
}

/* One message, which counts as sent at `intended`: a generator that is late makes nothing look faster. */
static void send_message(struct load *l, struct conn *c, uint64_t intended)
{
    static char scratch[128 << 10];
    char *at = scratch;
    unsigned id = c->next_id++;
    const struct template *t = &c->sends[c->send_turn++ % c->sends_n];
    for (unsigned i = 0;; i++) {
        at = put(at, t->literal[i]);
        if (t->then[i] == PIECE_END)
            break;
        if (t->then[i] == PIECE_ID)
            at += sprintf(at, "%u", id);
        else if (t->then[i] == PIECE_CID)
            at = put_hex(put_hex(at, random_u64(l), 16), (uint64_t)(l->base + conn_index(l, c)) << 12 ^ id, 8);
        else {
            char *body = at;
            at = put_hex(put_hex(put(at, (struct text){MARKER, 2}), intended, 16), l->base + conn_index(l, c), 8);
            at = put(at, (struct text){l->filler, l->body - (size_t)(at - body)});
        }
    }
    c->sent[id % SENT_RING] = intended;
    c->in_flight++;
    l->window_stats.sent++;
    l->window_stats.expected += c->fan;
    conn_send(l, c, 1, scratch, (size_t)(at - scratch));
}

void timer_add(struct load *l, uint64_t due, struct conn *c, int kind)
{
    if (l->heap_n == l->heap_cap) {
        l->heap_cap = l->heap_cap ? 2 * l->heap_cap : 1024;
        l->heap = realloc(l->heap, l->heap_cap * sizeof *l->heap);
    }
    unsigned i = l->heap_n++;
    while (i && l->heap[(i - 1) / 2].due > due) {
        l->heap[i] = l->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    /* Of a connection, or of the mode: what belongs to an earlier one is ignored when its time comes. */
    unsigned epoch = kind == TIMER_SEND ? l->mode_epoch : c->timer_epoch;
    l->heap[i] = (struct timer){due, conn_index(l, c), epoch, kind};
}

static struct timer timer_pop(struct load *l)
{
    struct timer first = l->heap[0], last = l->heap[--l->heap_n];
    unsigned i = 0, child;
    while ((child = 2 * i + 1) < l->heap_n) {
        if (child + 1 < l->heap_n && l->heap[child + 1].due < l->heap[child].due)
            child++;
        if (l->heap[child].due >= last.due)
            break;
        l->heap[i] = l->heap[child];
        i = child;
    }
    l->heap[i] = last;
    return first;
}

static void fill_window(struct load *l, struct conn *c)
{
    bool alone = l->corked != c;
    if (alone)
        cork(l, c);
    while (c->fd >= 0 && c->in_flight < l->window)
        send_message(l, c, clock_ns(CLOCK_MONOTONIC));
    if (alone)
        uncork(l);
}

void mode_live(struct load *l, struct conn *c)
{
    if (!c->sends_n)
        return;
    if (l->mode == MODE_FLOOD)
        fill_window(l, c);
    else if (l->mode == MODE_RANDOM)
        timer_add(l, l->now + random_below(l, l->interval_ns), c, TIMER_SEND);
}

void mode_set(struct load *l, enum mode mode)
{
    l->mode = mode;
    l->mode_epoch++;
    l->next_due = l->now;
    l->turn = 0;
    for (unsigned i = 0; i < l->senders_n; i++)
        if (l->conns[l->senders[i]].state == LIVE)
            mode_live(l, &l->conns[l->senders[i]]);
}

/* One message of each sender. */
void send_once(struct load *l)
{
    for (unsigned i = 0; i < l->senders_n; i++)
        if (l->conns[l->senders[i]].state == LIVE)
            send_message(l, &l->conns[l->senders[i]], clock_ns(CLOCK_MONOTONIC));
}

void mode_answered(struct load *l, struct conn *c)
{
    if (c->in_flight)
        c->in_flight--;
    if (l->mode == MODE_FLOOD && c->sends_n)
        fill_window(l, c);
}

static void paced(struct load *l)
{
    for (unsigned tries = 0; tries < l->senders_n; tries++) {
        struct conn *c = &l->conns[l->senders[l->turn++ % l->senders_n]];
        if (c->state == LIVE) {
            hist_add(&l->window_stats.late, (int64_t)(clock_ns(CLOCK_MONOTONIC) - l->next_due));
            send_message(l, c, l->next_due);
            break;
        }
    }
    /* Jittered, as the kernel's clock ticks in step with whole milliseconds. */
    l->next_due += l->interval_ns - l->interval_ns / 5 + random_below(l, l->interval_ns * 2 / 5);
}

static void open_waiting(struct load *l)
{
    while (l->waiting_n && (!l->handshakes_max || l->handshakes < l->handshakes_max)) {
        struct conn *c = &l->conns[l->waiting[l->waiting_at++]];
        if (l->waiting_at == l->n)
            l->waiting_at = 0;
        l->waiting_n--;
        if (c->state == WAITING)
            conn_open(l, c);
    }
}

static void timer_due(struct load *l, struct timer t)
{
    struct conn *c = &l->conns[t.conn];
    if (t.kind == TIMER_SEND) {
        if (t.epoch != l->mode_epoch || c->state != LIVE)
            return; /* a client that comes back begins anew */
        hist_add(&l->window_stats.late, (int64_t)(clock_ns(CLOCK_MONOTONIC) - t.due));
        send_message(l, c, t.due);
        timer_add(l, t.due + l->interval_ns / 2 + random_below(l, l->interval_ns), c, TIMER_SEND);
    } else if (t.epoch == c->timer_epoch) {
        if (c->state == WAITING) {
            l->waiting[(l->waiting_at + l->waiting_n++) % l->n] = t.conn;
        } else if (c->state != LIVE && c->state != CLOSED) {
            snprintf(l->last_error, sizeof l->last_error, "not live in time");
            conn_close(l, c, false);
        }
    }
}

static void churn(struct load *l)
{
    for (unsigned tries = 0; tries < 64; tries++) {
        struct conn *c = &l->conns[random_below(l, l->n)];
        if (c->state != LIVE)
            continue;
        conn_close(l, c, true);
        c->resume = true;
        c->state = WAITING;
        c->due = l->now;
        conn_open(l, c);
        return;
    }
}

/* Everything whose time has come. */
void mode_due(struct load *l)
{
    l->now = clock_ns(CLOCK_MONOTONIC);
    /* An open loop: what should have been sent is sent, all of it. */
    for (unsigned n = 0; l->mode == MODE_PACED && l->senders_n && l->next_due <= l->now && n < 1000; n++)
        paced(l);
    for (unsigned n = 0; l->heap_n && l->heap[0].due <= l->now && n < 1000; n++)
        timer_due(l, timer_pop(l));
    for (; l->churn_ns && l->next_churn <= l->now; l->next_churn += l->churn_ns)
        churn(l);
    open_waiting(l);
}

/* When mode_due has to be called next (UINT64_MAX: nothing is planned). */
uint64_t mode_next(struct load *l)
{
    uint64_t next = UINT64_MAX;
    if (l->mode == MODE_PACED && l->senders_n)
        next = l->next_due;
    if (l->heap_n && l->heap[0].due < next)
        next = l->heap[0].due;
    if (l->churn_ns && l->next_churn < next)
        next = l->next_churn;
    return next;
}

void connect_all(struct load *l, bool resume, uint64_t spread_ns, unsigned first, unsigned count)
{
    l->connect_began = l->now;
    for (unsigned i = first; i < l->n && i < first + count; i++) {
        struct conn *c = &l->conns[i];
        if (c->state != CLOSED)
            continue;
        c->state = WAITING;
        c->resume = resume;
        c->counted = true;
        c->due = l->now + (spread_ns ? random_below(l, spread_ns) : 0);
        l->pending++;
        timer_add(l, c->due, c, TIMER_CONNECT);
    }
    if (!l->pending)
        report_joined(l);
}

void cut_all(struct load *l, unsigned first, unsigned count)
{
    for (unsigned i = first; i < l->n && i < first + count; i++)
        conn_close(l, &l->conns[i], true);
}
