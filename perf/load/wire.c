/* WebSocket frames (RFC 6455), as a client: masked out, unmasked in. */
#include "load.h"

long frame_parse(const char *data, size_t n, struct frame *out)
{
    const unsigned char *b = (const unsigned char *)data;
    if (n < 2)
        return FRAME_MORE;
    size_t header = 2;
    uint64_t length = b[1];
    if (length > 127) /* a server must not mask */
        return FRAME_BAD;
    if (length == 126) {
        if (n < 4)
            return FRAME_MORE;
        length = (uint64_t)b[2] << 8 | b[3];
        header = 4;
    } else if (length == 127) {
        if (n < 10)
            return FRAME_MORE;
        length = 0;
        for (int i = 2; i < 10; i++)
            length = length << 8 | b[i];
        header = 10;
    }
    if (length > RX_BUFFER - 16)
        return FRAME_BAD;
    if (n < header + length)
        return FRAME_MORE;
    out->opcode = b[0] & 15;
    out->payload = data + header;
    out->n = length;
    return (long)(header + length);
}

size_t frame_header(char *out, unsigned opcode, size_t n, uint32_t mask)
{
    unsigned char *b = (unsigned char *)out;
    size_t at = 2;
    b[0] = (unsigned char)(0x80 | opcode);
    if (n < 126) {
        b[1] = (unsigned char)(0x80 | n);
    } else if (n < 65536) {
        b[1] = 0x80 | 126;
        b[2] = (unsigned char)(n >> 8);
        b[3] = (unsigned char)n;
        at = 4;
    } else {
        b[1] = 0x80 | 127;
        for (int i = 0; i < 8; i++)
            b[2 + i] = (unsigned char)((uint64_t)n >> (56 - 8 * i));
        at = 10;
    }
    memcpy(out + at, &mask, 4);
    return at + 4;
}

void frame_mask(char *data, size_t n, uint32_t mask)
{
    uint64_t wide = (uint64_t)mask << 32 | mask;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, data + i, 8);
        word ^= wide;
        memcpy(data + i, &word, 8);
    }
    for (; i < n; i++)
        data[i] ^= (char)(mask >> (8 * (i & 3)));
}
