/* What was counted, as one line of JSON. */
#include "load.h"

void report_stats(struct load *l, const char *event, const struct stats *s)
{
    FILE *out = stdout;
    const struct {
        const char *name;
        uint64_t value;
    } counts[] = {
        {"sent", s->sent},         {"acked", s->acked},         {"abandoned", s->abandoned}, {"delivered", s->delivered}, {"expected", s->expected},
        {"replayed", s->replayed}, {"errors", s->errors},       {"closed", s->closed},       {"failed", s->failed},
        {"joined", s->joined},     {"frames", s->frames},       {"other", s->other},         {"bytes_in", s->bytes_in},
        {"reads", s->reads},       {"bytes_out", s->bytes_out}, {"writes", s->writes},       {"wakeups", s->wakeups},
        {"wait_ns", s->wait_ns},   {"cpu_ns", s->cpu_ns},       {"wall_ns", s->wall_ns},     {"live", l->live},
    };
    fprintf(out, "{\"event\":\"%s\",", event);
    for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++)
        fprintf(out, "\"%s\":%llu,", counts[i].name, (unsigned long long)counts[i].value);
    hist_print(out, "ack", &s->ack);
    fputc(',', out);
    hist_print(out, "delivery", &s->delivery);
    fputc(',', out);
    hist_print(out, "join", &s->join);
    fputc(',', out);
    hist_print(out, "late", &s->late);
    fputs(",\"last_error\":\"", out);
    for (const char *at = l->last_error; *at; at++)
        if (*at == '"' || *at == '\\')
            fprintf(out, "\\%c", *at);
        else
            fputc(*at < ' ' ? ' ' : *at, out);
    fputs("\"}\n", out);
    fflush(out);
}

/* All connections of the last `connect` are live, or have failed. */
void report_joined(struct load *l)
{
    printf("{\"event\":\"joined\",\"live\":%u,\"wall_ns\":%llu}\n", l->live,
           (unsigned long long)(clock_ns(CLOCK_MONOTONIC) - l->connect_began));
    fflush(stdout);
}

/* What is measured at the end of a window: its duration, and the processor time that it took. */
void stats_close_window(struct load *l)
{
    l->window_stats.wall_ns = clock_ns(CLOCK_MONOTONIC) - l->window_began;
    l->window_stats.cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - l->window_cpu;
}

/* Begin a new window; the old one goes into the total. */
void stats_reset(struct load *l)
{
    struct stats *t = &l->total, *w = &l->window_stats;
    stats_close_window(l);
    hist_merge(&t->ack, &w->ack);
    hist_merge(&t->delivery, &w->delivery);
    hist_merge(&t->join, &w->join);
    hist_merge(&t->late, &w->late);
    /* The counters stand behind the histograms, one after the other. */
    uint64_t *into = &t->sent, *from = &w->sent;
    for (; from <= &w->wall_ns; from++, into++)
        *into += *from;
    memset(w, 0, sizeof *w);
    l->window_began = clock_ns(CLOCK_MONOTONIC);
    l->window_cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
}
