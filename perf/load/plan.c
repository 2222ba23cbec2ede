/* The plan: a text file, one "key value" per line. First what all connections share, then each connection. */
#include "load.h"

#include <errno.h>
#include <stdlib.h>

void die(const char *what, const char *detail)
{
    fprintf(stderr, "load generator: %s: %s\n", what, detail);
    exit(2);
}

static struct text keep(const char *at, size_t n)
{
    char *copy = malloc(n + 1);
    if (!copy)
        die("memory", "none");
    memcpy(copy, at, n);
    copy[n] = 0;
    return (struct text){copy, n};
}

static void add_step(struct script *s, struct step step)
{
    s->steps = realloc(s->steps, (s->n + 1) * sizeof step);
    s->steps[s->n++] = step;
}

/* "COUNT TAB TEXT TAB CAPTURE" */
static struct step wait_step(const char *value)
{
    struct step step = {.kind = STEP_WAIT, .count = (unsigned)strtoul(value, NULL, 10)};
    const char *text = strchr(value, '\t');
    const char *capture = text ? strchr(text + 1, '\t') : NULL;
    if (!capture)
        die("plan", value);
    step.text = keep(text + 1, (size_t)(capture - text - 1));
    step.capture = keep(capture + 1, strlen(capture + 1));
    return step;
}

static struct template parse_template(struct text text)
{
    static const char *const names[] = {"@ID@", "@CID@", "@BODY@"};
    struct template t = {0};
    const char *at = text.at;
    for (unsigned i = 0;; i++) {
        if (i == 8)
            die("plan: too many placeholders", text.at);
        const char *nearest = NULL;
        for (unsigned k = 0; k < 3; k++) {
            const char *found = strstr(at, names[k]);
            if (found && (!nearest || found < nearest)) {
                nearest = found;
                t.then[i] = (enum piece)(PIECE_ID + k);
            }
        }
        if (!nearest) {
            t.literal[i] = (struct text){at, strlen(at)};
            t.then[i] = PIECE_END;
            return t;
        }
        t.literal[i] = (struct text){at, (size_t)(nearest - at)};
        at = nearest + strlen(names[t.then[i] - PIECE_ID]);
    }
}

static void conn_line(struct load *l, struct conn *c, const char *key, const char *value)
{
    size_t n = strlen(value);
    if (!strcmp(key, "send"))
        add_step(&c->scripts[0], (struct step){.kind = STEP_SEND, .text = keep(value, n)});
    else if (!strcmp(key, "wait"))
        add_step(&c->scripts[0], wait_step(value));
    else if (!strcmp(key, "rsend"))
        add_step(&c->scripts[1], (struct step){.kind = STEP_SEND, .text = keep(value, n)});
    else if (!strcmp(key, "rwait"))
        add_step(&c->scripts[1], wait_step(value));
    else if (!strcmp(key, "fan"))
        c->fan = (unsigned)strtoul(value, NULL, 10);
    else if (!strcmp(key, "template")) {
        c->sends = realloc(c->sends, (c->sends_n + 1) * sizeof *c->sends);
        c->sends[c->sends_n++] = parse_template(keep(value, n));
        if (c->sends_n > 1)
            return;
        c->sent = calloc(SENT_RING, sizeof *c->sent);
        l->senders = realloc(l->senders, (l->senders_n + 1) * sizeof *l->senders);
        l->senders[l->senders_n++] = conn_index(l, c);
    } else
        die("plan: unknown key", key);
}

static void shared_line(struct load *l, const char *key, const char *value)
{
    struct text text = keep(value, strlen(value));
    if (!strcmp(key, "port"))
        l->port = (unsigned)atoi(value);
    else if (!strcmp(key, "net"))
        l->net = (unsigned)atoi(value);
    else if (!strcmp(key, "base"))
        l->base = (unsigned)atoi(value);
    else if (!strcmp(key, "body"))
        l->body = (size_t)atoi(value) < BODY_MAX ? (size_t)atoi(value) : BODY_MAX;
    else if (!strcmp(key, "conns")) {
        l->conns = calloc((size_t)atoi(value) + 1, sizeof *l->conns);
        if (!l->conns)
            die("memory", "none");
    } else if (!strcmp(key, "path"))
        l->path = text;
    else if (!strcmp(key, "header")) {
        char *all = malloc(l->headers.n + text.n + 3);
        memcpy(all, l->headers.at ? l->headers.at : "", l->headers.n);
        memcpy(all + l->headers.n, text.at, text.n);
        strcpy(all + l->headers.n + text.n, "\r\n");
        l->headers = (struct text){all, l->headers.n + text.n + 2};
    } else if (!strcmp(key, "ack"))
        l->ack = text;
    else if (!strcmp(key, "error"))
        l->error = text;
    else if (!strcmp(key, "ping"))
        l->ping = text;
    else if (!strcmp(key, "pong"))
        l->pong = text;
    else
        die("plan: unknown key", key);
}

void plan_read(struct load *l, const char *path)
{
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    if (!file)
        die(path, strerror(errno));
    while ((n = getline(&line, &cap, file)) > 0) {
        if (line[n - 1] == '\n')
            line[n - 1] = 0;
        char *value = strchr(line, ' ');
        if (value)
            *value++ = 0;
        if (!strcmp(line, "conn")) {
            struct conn *c = &l->conns[l->n++];
            c->fd = -1;
            c->next_id = 1000; /* above the ids of scripts */
        } else if (l->n)
            conn_line(l, &l->conns[l->n - 1], line, value ? value : "");
        else
            shared_line(l, line, value ? value : "");
    }
    free(line);
    fclose(file);
    l->filler = malloc(BODY_MAX);
    memset(l->filler, 'x', BODY_MAX);
}
