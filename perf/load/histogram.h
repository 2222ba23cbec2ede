/* Durations in ns, in 128 buckets for each power of two: an error below 0.8 %, and constant cost. */
#ifndef HISTOGRAM_H
#define HISTOGRAM_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define HIST_SUB_BITS 7
#define HIST_SUB (1u << HIST_SUB_BITS)
#define HIST_BUCKETS ((44 - HIST_SUB_BITS) * HIST_SUB) /* up to 2^43 ns, some two hours */

struct histogram {
    uint64_t count[HIST_BUCKETS];
    uint64_t n, max;
};

static inline unsigned hist_index(uint64_t ns)
{
    if (ns < HIST_SUB)
        return (unsigned)ns;
    unsigned shift = (unsigned)(63 - __builtin_clzll(ns)) - HIST_SUB_BITS;
    unsigned index = (shift + 1) * HIST_SUB + (unsigned)((ns >> shift) - HIST_SUB);
    return index < HIST_BUCKETS ? index : HIST_BUCKETS - 1;
}

static inline void hist_add(struct histogram *h, int64_t ns)
{
    uint64_t value = ns > 0 ? (uint64_t)ns : 0;
    h->count[hist_index(value)]++;
    h->n++;
    if (value > h->max)
        h->max = value;
}

static inline void hist_merge(struct histogram *into, const struct histogram *from)
{
    for (unsigned i = 0; i < HIST_BUCKETS; i++)
        into->count[i] += from->count[i];
    into->n += from->n;
    if (from->max > into->max)
        into->max = from->max;
}

/* As JSON: {"n":…,"max":…,"counts":[index,count,index,count,…]} */
static inline void hist_print(FILE *out, const char *name, const struct histogram *h)
{
    const char *comma = "";
    fprintf(out, "\"%s\":{\"n\":%llu,\"max\":%llu,\"counts\":[", name, (unsigned long long)h->n,
            (unsigned long long)h->max);
    for (unsigned i = 0; i < HIST_BUCKETS; i++)
        if (h->count[i]) {
            fprintf(out, "%s%u,%llu", comma, i, (unsigned long long)h->count[i]);
            comma = ",";
        }
    fputs("]}", out);
}

#endif
