"""What the reactor uses of Linux and of C. Declarations and a few one-line helpers; no state."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #ifndef CHATCORE_SYS_H
    #define CHATCORE_SYS_H
    #include <stdio.h>
    #include <stdlib.h>
    #include <time.h>
    #include <stdint.h>
    /* Invariants: checked in a debug build (CHATCORE_DEBUG=1), free otherwise. */
    #ifdef CHATCORE_DEBUG
    #define CC_CHECK(c) do { if (!(c)) { \\
        fprintf(stderr, "%s:%d: invariant broken: %s\\n", __FILE__, __LINE__, #c); abort(); } } while (0)
    #else
    #define CC_CHECK(c) ((void)0)
    #endif
    static inline int64_t cc_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    #endif
    """
    void CC_CHECK(bint)
    int64_t cc_now_ns()

cdef extern from "errno.h" nogil:
    int errno
    enum:
        EAGAIN
        EBADF
        EINVAL
        ENOTSOCK
        EINTR
        EIO
        EMFILE
        ENFILE
        ENOBUFS
        ENOMEM
        ECONNABORTED

cdef extern from "sys/uio.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "sys/socket.h" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        unsigned short sa_family
    struct sockaddr_storage:
        unsigned short ss_family
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct linger:
        int l_onoff
        int l_linger
    enum:
        AF_INET
        AF_INET6
        MSG_DONTWAIT
        MSG_NOSIGNAL
        SHUT_WR
        SOL_SOCKET
        SO_LINGER
        SOCK_NONBLOCK
        SOCK_CLOEXEC
    int accept4(int fd, sockaddr *addr, socklen_t *size, int flags)
    ssize_t recv(int fd, void *buf, size_t size, int flags)
    ssize_t send(int fd, const void *buf, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr *msg, int flags)
    int shutdown(int fd, int how)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
    int getpeername(int fd, sockaddr *addr, socklen_t *size)
    int getsockname(int fd, sockaddr *addr, socklen_t *size)

cdef extern from "netinet/in.h" nogil:
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        unsigned short sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        unsigned short sin6_port
        in6_addr sin6_addr
    enum:
        IPPROTO_TCP
    unsigned short ntohs(unsigned short)

cdef extern from "netinet/tcp.h" nogil:
    enum:
        TCP_NODELAY

cdef extern from "arpa/inet.h" nogil:
    const char *inet_ntop(int family, const void *src, char *dst, socklen_t size)

cdef extern from "sys/epoll.h" nogil:
    union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLHUP
        EPOLLERR
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLL_CTL_MOD
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "unistd.h" nogil:
    int c_close "close" (int fd)

cdef extern from "fcntl.h" nogil:
    int c_open "open" (const char *path, int flags)
    enum:
        O_RDONLY
        O_CLOEXEC
