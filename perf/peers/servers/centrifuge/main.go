// Centrifuge: the real-time library of Centrifugo, JSON protocol over WebSocket, one node in memory.
//
//	centrifuge --port N [--workers N] [--write-delay DURATION]
//
// Configured after the comments of its Config, ConnectReply and WebsocketConfig, its own benchmark server
// (_examples/benchmark/bench_server) and centrifugal.dev, "WebSocket" and "Message batching control": no history,
// presence or compression, pooled write buffers and small read buffers. It merges what waits for a client into one
// frame by itself; a write delay makes it wait for more, with a timer instead of a goroutine, and with replies
// outside of the queue so that they need not wait.
//
// Workers are the processors that Go may use. Limits that only floods reach are raised; settings() of centrifuge.py
// tells them.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/centrifugal/centrifuge"
)

const (
	queueBytes     = 64 << 20         // of one client; 1 MiB unless set
	writeTimeout   = 30 * time.Second // 1 s unless set
	readBufferSize = 512              // the figure of its documentation
	channels       = 1024             // of one client; 128 unless set
	pongTimeout    = -1               // never; 10 s unless set, and a client may miss a ping among 16 messages
	queueCapacity  = 16               // with a write delay: a frame of its usual 16 messages without growing
)

func main() {
	port := flag.Int("port", 0, "listen on 127.0.0.1:`PORT`")
	workers := flag.Int("workers", 1, "processors to use")
	delay := flag.Duration("write-delay", 0, "collect messages of one client for so long")
	flag.Parse()
	runtime.GOMAXPROCS(*workers)

	node, err := centrifuge.New(centrifuge.Config{
		LogLevel:           centrifuge.LogLevelError,
		LogHandler:         func(e centrifuge.LogEntry) { log.Printf("%s: %v", e.Message, e.Fields) },
		ClientQueueMaxSize: queueBytes,
		ClientChannelLimit: channels,
	})
	if err != nil {
		log.Fatal(err)
	}
	node.OnConnecting(func(context.Context, centrifuge.ConnectEvent) (centrifuge.ConnectReply, error) {
		reply := centrifuge.ConnectReply{Credentials: &centrifuge.Credentials{UserID: "bench"}}
		if *delay > 0 {
			reply.WriteDelay = *delay
			reply.WriteWithTimer = true
			reply.ReplyWithoutQueue = true
			reply.QueueInitialCap = queueCapacity
			reply.MaxMessagesInFrame = -1
		}
		return reply, nil
	})
	node.OnConnect(func(client *centrifuge.Client) {
		client.OnSubscribe(func(_ centrifuge.SubscribeEvent, cb centrifuge.SubscribeCallback) {
			cb(centrifuge.SubscribeReply{}, nil)
		})
		client.OnPublish(func(e centrifuge.PublishEvent, cb centrifuge.PublishCallback) {
			// Published from here, it does not carry the publisher, which no client asks for: a third fewer bytes.
			result, err := node.Publish(e.Channel, e.Data)
			cb(centrifuge.PublishReply{Result: &result}, err)
		})
	})
	if err := node.Run(); err != nil {
		log.Fatal(err)
	}
	http.Handle("/connection/websocket", centrifuge.NewWebsocketHandler(node, centrifuge.WebsocketConfig{
		WriteTimeout:       writeTimeout,
		ReadBufferSize:     readBufferSize,
		UseWriteBufferPool: true,
		PingPongConfig:     centrifuge.PingPongConfig{PongTimeout: pongTimeout},
	}))
	go func() { log.Fatal(http.ListenAndServe(fmt.Sprintf("127.0.0.1:%d", *port), nil)) }()

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	<-stop
}
