// A FerretDB for tests: it serves the MongoDB wire protocol on one TCP address until SIGTERM, or until its
// standard input ends, so that it never outlives the test run that started it.
//
// Why not FerretDB's own command: built from its module without its repository it panics for lack of a
// generated version.txt. The package that it offers for embedding does not; it has no telemetry and no
// debug listener either.
package main

import (
	"context"
	"flag"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/FerretDB/FerretDB/ferretdb"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:27017", "TCP address")
	sqlite := flag.String("sqlite-url", "file:data/", "folder of the data")
	stdin := flag.Bool("stop-with-stdin", false, "stop when the standard input ends")
	flag.Parse()

	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if *stdin {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			stop()
		}()
	}

	server, err := ferretdb.New(&ferretdb.Config{
		Listener:  ferretdb.ListenerConfig{TCP: *listen},
		Handler:   "sqlite",
		SQLiteURL: *sqlite,
	})
	if err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
	go func() {
		<-ctx.Done()
		// It would wait 3 s for clients that stay connected.
		time.Sleep(200 * time.Millisecond)
		os.Exit(0)
	}()
	_ = server.Run(ctx)
}
