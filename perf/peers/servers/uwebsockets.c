/* uWebSockets: its native publish and subscribe, called through its C interface.
 *
 * The library is the one that the PyPI package socketify ships (uWebSockets itself is on no registry). It is called
 * from C: socketify's Python loop polls without a pause while there is traffic, which would be charged to
 * uWebSockets.
 *
 *     uwebsockets --port N
 *
 * As the documentation advises (uWebSockets' user manual and docs.socketify.dev/websockets-backpressure.html, on
 * pub/sub and on settings): topics instead of own loops over sockets, no compression, a limit of backpressure.
 * That limit, over which messages are dropped without a word, is raised for floods.
 *
 * Says the protocol of relay.py.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>

enum {
    BACKLOG = 4096,                 /* the library's own is 512 */
    MAX_PAYLOAD = 64 * 1024,
    MAX_BACKPRESSURE = 64 << 20,    /* its default is 64 KiB; settings() of native.py tells it */
    IDLE_S = 120,                   /* the default; it pings in time */
    TEXT = 1,
    TOPIC_BYTES = 32,
};

/* What is used of the library's interface (its names and layout). */
typedef struct uws_app_s uws_app_t;
typedef struct uws_websocket_s uws_websocket_t;
struct us_poll_t;
struct us_socket_context_options_t {
    const char *key_file_name, *cert_file_name, *passphrase, *dh_params_file_name, *ca_file_name, *ssl_ciphers;
    int ssl_prefer_low_memory_usage;
};
typedef struct {
    int port;
    const char *host;
    int options;
} uws_app_listen_config_t;
typedef void (*uws_websocket_handler)(uws_websocket_t *, void *);
typedef void (*uws_websocket_message_handler)(uws_websocket_t *, const char *, size_t, int, void *);
typedef struct {
    int compression;
    unsigned int maxPayloadLength;
    unsigned short idleTimeout;
    unsigned int maxBackpressure;
    bool closeOnBackpressureLimit, resetIdleTimeoutOnSend, sendPingsAutomatically;
    unsigned short maxLifetime;
    void *upgrade;
    uws_websocket_handler open;
    uws_websocket_message_handler message;
    uws_websocket_handler drain;
    void *ping, *pong, *close, *subscription;
} uws_socket_behavior_t;

uws_app_t *uws_create_app(int ssl, struct us_socket_context_options_t);
void uws_ws(int ssl, uws_app_t *, const char *pattern, uws_socket_behavior_t, void *);
void uws_app_listen_with_config(int ssl, uws_app_t *, uws_app_listen_config_t,
                                void (*)(void *, uws_app_listen_config_t, void *), void *);
void uws_app_run(int ssl, uws_app_t *);
bool uws_ws_subscribe(int ssl, uws_websocket_t *, const char *topic, size_t);
int uws_ws_send(int ssl, uws_websocket_t *, const char *, size_t, int opcode);
bool uws_publish(int ssl, uws_app_t *, const char *topic, size_t, const char *, size_t, int opcode, bool compress);
int us_poll_fd(struct us_poll_t *);

static uws_app_t *app;

static void on_open(uws_websocket_t *ws, void *unused) {
    (void)ws, (void)unused;
}

static void on_message(uws_websocket_t *ws, const char *p, size_t n, int opcode, void *unused) {
    (void)unused;
    if (n < 2 || opcode != TEXT)
        return;
    const char *end = p + n, *at = p + 1;
    if (*p == 'M') {
        const char *space = memchr(at, ' ', (size_t)(end - at));
        if (space)
            uws_publish(0, app, at, (size_t)(space - at), p, n, TEXT, false);
    } else if (*p == 'J') {
        while (at < end) {
            const char *space = memchr(at, ' ', (size_t)(end - at));
            size_t length = (size_t)((space ? space : end) - at);
            uws_ws_subscribe(0, ws, at, length);
            at += length + 1;
        }
        uws_ws_send(0, ws, "joined", 6, TEXT);
    }
}

static void on_listen(void *socket, uws_app_listen_config_t config, void *unused) {
    (void)config, (void)unused;
    if (!socket || listen(us_poll_fd(socket), BACKLOG)) {
        fprintf(stderr, "cannot listen\n");
        exit(1);
    }
}

int main(int argc, char **argv) {
    int port = 0;
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

    app = uws_create_app(0, (struct us_socket_context_options_t){0});
    uws_ws(0, app, "/*",
           (uws_socket_behavior_t){
               .compression = 0,
               .maxPayloadLength = MAX_PAYLOAD,
               .idleTimeout = IDLE_S,
               .maxBackpressure = MAX_BACKPRESSURE,
               .sendPingsAutomatically = true,
               .open = on_open,
               .message = on_message,
           },
           NULL);
    uws_app_listen_with_config(0, app, (uws_app_listen_config_t){.port = port, .host = "127.0.0.1"}, on_listen, NULL);
    uws_app_run(0, app);
    return 0;
}
