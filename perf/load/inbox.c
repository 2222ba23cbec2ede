/* What a received text frame is: a ping, what a script waits for, deliveries, acknowledgements, an error. */
#include "load.h"

#include <stdlib.h>

#define CAPTURE_MAX 250

static bool contains(const char *data, size_t n, struct text what)
{
    return what.n && memmem(data, n, what.at, what.n);
}

static void note_error(struct load *l, const char *data, size_t n)
{
    l->window_stats.errors++;
    snprintf(l->last_error, sizeof l->last_error, "%.*s", (int)(n < 200 ? n : 200), data);
}

static void capture(struct conn *c, struct text before, const char *data, size_t n)
{
    const char *at = before.n ? memmem(data, n, before.at, before.n) : NULL;
    if (!at)
        return;
    at += before.n;
    const char *end = memchr(at, '"', (size_t)(data + n - at));
    if (!end || end - at > CAPTURE_MAX)
        return;
    free(c->captured);
    c->captured = strndup(at, (size_t)(end - at));
}

static void send_step(struct load *l, struct conn *c, struct text text)
{
    static const char place[] = "@CAPTURED@";
    const char *at = strstr(text.at, place);
    if (!at) {
        conn_send(l, c, 1, text.at, text.n);
        return;
    }
    const char *value = c->captured ? c->captured : "", *rest = at + sizeof place - 1;
    size_t head = (size_t)(at - text.at), n = strlen(value), tail = text.n - head - (sizeof place - 1);
    char *full = malloc(head + n + tail + 1);
    memcpy(full, text.at, head);
    memcpy(full + head, value, n);
    memcpy(full + head + n, rest, tail);
    conn_send(l, c, 1, full, head + n + tail);
    free(full);
}

/* Go on with the script until it waits or is over. */
void script_run(struct load *l, struct conn *c)
{
    struct script *s = &c->scripts[c->resume && c->scripts[1].n];
    while (c->fd >= 0) {
        if (c->step == s->n) {
            conn_live(l, c);
            return;
        }
        struct step *step = &s->steps[c->step];
        if (step->kind == STEP_WAIT) {
            c->left = step->count;
            return;
        }
        c->step++;
        send_step(l, c, step->text);
    }
}

static void script_frame(struct load *l, struct conn *c, const char *data, size_t n)
{
    struct step *step = &c->scripts[c->resume && c->scripts[1].n].steps[c->step];
    if (contains(data, n, step->text) && !--c->left) {
        capture(c, step->capture, data, n);
        c->step++;
        script_run(l, c);
        return;
    }
    if (memmem(data, n, MARKER, 2))
        l->window_stats.replayed++;
    else if (contains(data, n, l->error))
        note_error(l, data, n);
}

static int hex(unsigned char ch)
{
    return ch <= '9' ? ch - '0' : ch - 'a' + 10;
}

static uint64_t read_hex(const char *at, unsigned digits)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < digits; i++)
        value = value << 4 | (uint64_t)(hex((unsigned char)at[i]) & 15);
    return value;
}

/* Another copy of a message; without acknowledgements, the sender's own is one. */
static void delivery(struct load *l, struct conn *c, const char *marker)
{
    uint64_t sent = read_hex(marker + 2, 16);
    l->window_stats.delivered++;
    hist_add(&l->window_stats.delivery, (int64_t)(l->now - sent));
    if (!l->ack.n && read_hex(marker + 18, 8) == l->base + conn_index(l, c)) {
        l->window_stats.acked++;
        hist_add(&l->window_stats.ack, (int64_t)(l->now - sent));
        mode_answered(l, c);
    }
}

static void acknowledgement(struct load *l, struct conn *c, const char *at, const char *end)
{
    unsigned id = 0;
    while (at < end && *at >= '0' && *at <= '9')
        id = id * 10 + (unsigned)(*at++ - '0');
    if (!c->sent || id < 1000)
        return;
    l->window_stats.acked++;
    hist_add(&l->window_stats.ack, (int64_t)(l->now - c->sent[id % SENT_RING]));
    mode_answered(l, c);
}

static void line(struct load *l, struct conn *c, const char *data, size_t n)
{
    const char *end = data + n, *at = data;
    while ((at = memchr(at, '~', (size_t)(end - at)))) {
        if (end - at >= MARKER_BYTES && at[1] == 'T') {
            delivery(l, c, at);
            return;
        }
        at++;
    }
    if (contains(data, n, l->error)) {
        note_error(l, data, n);
        mode_answered(l, c); /* a refused message is answered, too */
    } else if (l->ack.n && n > l->ack.n && !memcmp(data, l->ack.at, l->ack.n))
        acknowledgement(l, c, data + l->ack.n, end);
    else
        l->window_stats.other++;
}

void inbox_text(struct load *l, struct conn *c, const char *data, size_t n)
{
    if (l->ping.n && n == l->ping.n && !memcmp(data, l->ping.at, n)) {
        conn_send(l, c, 1, l->pong.at, l->pong.n);
        return;
    }
    if (c->state == SCRIPT) {
        script_frame(l, c, data, n);
        return;
    }
    while (n && c->fd >= 0) {
        const char *newline = memchr(data, '\n', n);
        size_t here = newline ? (size_t)(newline - data) : n;
        if (here)
            line(l, c, data, here);
        if (!newline)
            return;
        data += here + 1;
        n -= here + 1;
    }
}
