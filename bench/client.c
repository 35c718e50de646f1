/* The client of the load generator: thousands of WebSocket connections and one publisher.
 *
 * It is as cheap as it can be, so that the server is what gets measured: one thread, one epoll,
 * one recv per readiness, no allocation per message, and it looks at no more of a message than its
 * type and its number. What it says and what it understands is described in client.py; the same
 * client in Python, for machines without a compiler, is slow_client.py.
 *
 *     client PORT REDIS_PORT TOKENS_FILE PATIENCE_MS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

enum {
    EVENTS = 512,
    READ_BYTES = 256 << 10,
    LARGEST_FRAME = 128 << 10,
    LARGEST_BODY = 60000,
    LARGEST_WINDOW = 1024,
    LARGEST_TEMPLATE = 4000,
    LARGEST_REPLY = 1000,
    PARTITIONS = 64,
    ADDRESSES = 8, /* One client address has 28,000 ports towards one server. */
};

static const int64_t SECOND = 1000000000;
static const long NAP = 100000;

/* The pair of RFC 6455, 1.3. */
static const char KEY[] = "dGhlIHNhbXBsZSBub25jZQ==";
static const char ACCEPT[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
static const uint8_t MASK[4] = {0x37, 0xfa, 0x21, 0x3d};

struct peer {
    int fd;         /* -1 once it is gone */
    uint32_t place; /* its number, and its user's: u0, u1, ... */
    bool upgraded;
    uint8_t *rest; /* the beginning of a frame whose end has not come yet */
    size_t rest_size;
    int64_t answered; /* by the end of the last phase */
    int64_t newest;   /* highest index of this phase, -1 before the first */
    int64_t seqs;     /* what the seq of a durable notification is ahead of its index; 0: unknown */
};

enum kind { NOTHING, FANOUT, UNICAST, DURABLE, ECHO, PACED };

/* A phase is one command's worth of messages. Each has an index for each peer that is to get it;
 * a bit per peer and index tells what has come, so that the counts are exact. */
static struct {
    enum kind kind;
    int64_t first;    /* number of its first message; numbers go on from phase to phase */
    int64_t messages; /* how many numbers it has */
    int64_t each;     /* indices per peer */
    int64_t expected, received;
    int64_t replied; /* publishes that Redis has answered */
    uint64_t *seen;
    int64_t start, interval; /* message k of an open loop is due at start + k * interval */
    int64_t *latency;        /* of each message of an open loop, -1 until it has come */
    char topic[160];         /* what each message of a topic says of itself; empty otherwise */
} phase;

/* Since the last reply. */
static struct {
    int64_t lost, doubled, reordered, failed, greeted, joined, pings, heartbeats;
    char trouble[200];
} tally;

static struct peer *peers;
static uint32_t peer_count, peer_limit;
static int64_t alive, upgraded, departed;
static char **tokens;
static int epoll_fd, timer_fd, redis_fd;
static uint16_t port, redis_port;
static struct peer publisher = {.fd = -1}; /* a connection to Redis that reads the replies */
static int64_t patience; /* ns without progress after which the rest is lost */
static uint8_t buffer[READ_BYTES + LARGEST_FRAME];

static int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static void die(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory)
        die("memory");
    return memory;
}

/* Count one failure; the first one's words are kept for the reply. */
static void failed(const struct peer *peer, const char *what, const uint8_t *bytes, size_t size)
{
    tally.failed++;
    if (*tally.trouble)
        return;
    if (size > 100)
        size = 100;
    snprintf(tally.trouble, sizeof tally.trouble, "connection %d: %s %.*s",
             peer ? (int)peer->place : -1, what, (int)size, bytes ? (const char *)bytes : "");
    for (char *at = tally.trouble; *at; at++)
        if (*at < ' ' || *at > '~' || *at == '"' || *at == '\\')
            *at = '\''; /* It becomes a string in JSON. */
}

static void gone(struct peer *peer, const char *why, const uint8_t *bytes, size_t size)
{
    failed(peer, why, bytes, size);
    alive--;
    departed++;
    close(peer->fd);
    peer->fd = -1;
    free(peer->rest);
    peer->rest = NULL;
    peer->rest_size = 0;
}

/* Sending */

static bool send_frame(struct peer *peer, uint8_t opcode, const void *payload, size_t size)
{
    uint8_t frame[6 + 125];
    frame[0] = 0x80 | opcode;
    frame[1] = 0x80 | (uint8_t)size;
    memcpy(frame + 2, MASK, 4);
    for (size_t i = 0; i < size; i++)
        frame[6 + i] = ((const uint8_t *)payload)[i] ^ MASK[i & 3];
    if (send(peer->fd, frame, 6 + size, MSG_NOSIGNAL) == (ssize_t)(6 + size))
        return true;
    gone(peer, "cannot send", NULL, 0);
    return false;
}

static void send_echo(struct peer *peer, int64_t index)
{
    char text[100];
    int size = snprintf(text, sizeof text, "{\"type\":\"message\",\"payload\":{\"n\":%" PRId64 "}}",
                        peer->answered + index + 1);
    send_frame(peer, 1, text, (size_t)size);
}

static void send_redis(int fd, const char *bytes, size_t size)
{
    while (size) {
        ssize_t sent = send(fd, bytes, size, MSG_NOSIGNAL);
        if (sent < 0)
            die("Redis");
        bytes += sent;
        size -= (size_t)sent;
    }
}

static const char BEFORE_PAYLOAD[] = "{\"type\":\"notification\",\"payload\":";

/* Write message `number` into `body`; a JSON of exactly `size` bytes, if it fits. */
static size_t message(char *body, int64_t number, size_t size)
{
    int head = sprintf(body, "%s{\"n\":%" PRId64 ",\"pad\":\"", BEFORE_PAYLOAD, number);
    size_t length = (size_t)head;
    while (length + 3 < size)
        body[length++] = 'x';
    memcpy(body + length, "\"}}", 4);
    return length + 3;
}

/* Write one PUBLISH of message `number` into `at`. */
static size_t publication(char *at, const char *channel, int64_t number, size_t size)
{
    char body[LARGEST_BODY + 100];
    size_t length = message(body, number, size);
    return (size_t)sprintf(at, "*3\r\n$7\r\nPUBLISH\r\n$%zu\r\n%s\r\n$%zu\r\n%s\r\n",
                           strlen(channel), channel, length, body);
}

static size_t publication_to_user(char *at, int64_t user, int64_t number, size_t size)
{
    char channel[40];
    snprintf(channel, sizeof channel, "user_noti:u%" PRId64, user);
    return publication(at, channel, number, size);
}

/* Publishing into the ledger, as a back end does it: one script per notification, and its reply is
 * read. What to say is in a template: a command as Redis reads it, with \1K, \1I and \1P where key,
 * id and payload go. Whoever wrote it has seen to it that Redis has the script. */

static struct {
    char text[LARGEST_TEMPLATE];
    size_t size;
} template;

static void read_template(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        die(path);
    template.size = fread(template.text, 1, sizeof template.text, file);
    fclose(file);
    if (template.size == sizeof template.text) {
        fprintf(stderr, "client: %s: too long\n", path);
        exit(2);
    }
}

/* The CRC-32 of zlib. */
static uint32_t crc32(const char *text)
{
    uint32_t crc = ~(uint32_t)0;
    for (; *text; text++) {
        crc ^= (uint8_t)*text;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return ~crc;
}

/* Random enough for ids that nobody guesses at (splitmix64). */
static uint64_t random64(void)
{
    static uint64_t state;
    if (!state)
        state = (uint64_t)clock_ns(CLOCK_REALTIME) ^ (uint64_t)getpid() << 48;
    uint64_t mixed = state += 0x9e3779b97f4a7c15;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
    return mixed ^ mixed >> 31;
}

/* Write the id of a notification: the partition of its user, and a UUID of version 7. */
static void make_id(char *at, uint32_t partition, uint64_t milliseconds)
{
    uint64_t random = random64();
    sprintf(at, "p%02u-%08x-%04x-7%03x-%04x-%012" PRIx64, partition,
            (uint32_t)(milliseconds >> 16), (uint32_t)(milliseconds & 0xffff),
            (uint32_t)(random & 0xfff), 0x8000 | (uint32_t)(random >> 12 & 0x3fff),
            random64() >> 16);
}

static size_t bulk(char *at, const char *text, size_t size)
{
    int head = sprintf(at, "$%zu\r\n", size);
    memcpy(at + head, text, size);
    return (size_t)head + size;
}

/* Write the command that publishes message `number` durably into `at`. */
static size_t durable_publication(char *at, int64_t user, int64_t number, size_t size)
{
    const size_t before = sizeof BEFORE_PAYLOAD - 1;
    char name[24], key[60], id[48], body[LARGEST_BODY + 100];
    size_t length = message(body, number, size), filled = 0;
    sprintf(name, "u%" PRId64, user);
    uint32_t partition = crc32(name) % PARTITIONS;
    sprintf(key, "ts:{p%02u}:meta:%s", partition, name);
    make_id(id, partition, (uint64_t)(clock_ns(CLOCK_REALTIME) / 1000000));
    for (const char *from = template.text; from < template.text + template.size; from++) {
        if (*from != 1)
            at[filled++] = *from;
        else if (*++from == 'K')
            filled += bulk(at + filled, key, strlen(key));
        else if (*from == 'I')
            filled += bulk(at + filled, id, strlen(id));
        else /* Without what says the same as the arguments, and the brace at its end. */
            filled += bulk(at + filled, body + before, length - before - 1);
    }
    return filled;
}

/* Process the reply at the beginning of `data`; return its length, 0 if it is not complete. A good
 * one is an array whose last element is "accepted". */
static size_t take_reply(const uint8_t *data, size_t size)
{
    const uint8_t *end = memmem(data, size, "\r\n", 2), *last = end;
    int64_t elements = 0;
    if (!end)
        return 0;
    if (*data == '*')
        elements = atoi((const char *)data + 1);
    for (int64_t i = 0; i < elements; i++) {
        const uint8_t *start = end + 2;
        end = memmem(start, size - (size_t)(start - data), "\r\n", 2);
        if (!end)
            return 0;
        if (*start != '$')
            continue;
        last = end + 2;
        end = last + atoi((const char *)start + 1);
        if (end + 2 > data + size)
            return 0;
    }
    if (!elements || end - last != 8 || memcmp(last, "accepted", 8))
        failed(NULL, "not accepted:", data, (size_t)(end - data));
    phase.replied++;
    return (size_t)(end - data) + 2;
}

static void take_replies(void)
{
    static uint8_t replies[READ_BYTES + LARGEST_REPLY];
    static size_t kept;
    ssize_t got = recv(publisher.fd, replies + kept, READ_BYTES, MSG_DONTWAIT);
    size_t size = kept, taken = 0, step;
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0)
        die("Redis");
    size += (size_t)got;
    while ((step = take_reply(replies + taken, size - taken)))
        taken += step;
    kept = size - taken;
    if (kept > LARGEST_REPLY) {
        fprintf(stderr, "client: not understood: a reply of Redis\n");
        exit(2);
    }
    memmove(replies, replies + taken, kept);
}

/* Receiving */

/* Account for index `index` of the phase at `peer`; whether it is new. */
static bool record(struct peer *peer, int64_t index)
{
    int64_t bit = (int64_t)peer->place * phase.each + index;
    uint64_t flag = (uint64_t)1 << (bit & 63);
    if (phase.seen[bit >> 6] & flag) {
        tally.doubled++;
        return false;
    }
    phase.seen[bit >> 6] |= flag;
    phase.received++;
    if (index < peer->newest)
        tally.reordered++;
    else
        peer->newest = index;
    return true;
}

/* Keep how long message `place` of an open loop took, from when it was due. */
static void measure(int64_t place)
{
    phase.latency[place] = now_ns() - (phase.start + place * phase.interval);
}

/* Return the number behind `name` in `text`, -1 if it is not there. */
static int64_t number_after(const uint8_t *text, size_t size, const char *name)
{
    const uint8_t *at = memmem(text, size, name, strlen(name));
    if (!at)
        return -1;
    int64_t number = 0;
    at += strlen(name);
    if (at >= text + size || *at < '0' || *at > '9')
        return -1;
    while (at < text + size && *at >= '0' && *at <= '9')
        number = number * 10 + (*at++ - '0');
    return number;
}

/* The ledger counts what it accepts for a user, without a hole and in the order of publishing; so
 * the first seq that comes says all the others. */
static void check_seq(struct peer *peer, int64_t index, const uint8_t *text, size_t size)
{
    int64_t seq = number_after(text, size, "\"seq\":");
    if (!peer->seqs && seq > index)
        peer->seqs = seq - index;
    if (seq != peer->seqs + index)
        failed(peer, "not its seq:", text, size);
}

static void take_notification(struct peer *peer, const uint8_t *text, size_t size)
{
    int64_t place = number_after(text, size, "\"n\":") - phase.first;
    if (place < -phase.first || place >= phase.messages) {
        failed(peer, "never published:", text, size);
    } else if (place < 0) {
        tally.doubled++; /* Of an earlier phase. */
    } else if (phase.kind == FANOUT) {
        if (*phase.topic && !memmem(text, size, phase.topic, strlen(phase.topic)))
            failed(peer, "not of this topic:", text, size);
        record(peer, place);
    } else if (place % peer_count != peer->place) {
        failed(peer, "not for this user:", text, size);
    } else if (record(peer, place / peer_count)) {
        if (phase.latency)
            measure(place);
        if (phase.kind == DURABLE)
            check_seq(peer, place / peer_count, text, size);
    }
}

/* How many messages this peer sends in this phase; it knows none beyond them. */
static int64_t asked_of(const struct peer *peer)
{
    if (phase.kind == PACED)
        return (phase.expected - peer->place + peer_count - 1) / peer_count;
    return phase.kind == ECHO ? phase.each : 0;
}

static void take_answer(struct peer *peer, const uint8_t *text, size_t size)
{
    int64_t count = number_after(text, size, "\"count\":");
    int64_t echoed = number_after(text, size, "\"n\":");
    int64_t index = count - 1 - peer->answered;
    if (count < 1 || (echoed >= 0 && echoed != count) || index >= asked_of(peer)) {
        failed(peer, "never asked for:", text, size);
    } else if (index < 0) {
        tally.doubled++;
    } else if (record(peer, index)) {
        if (phase.kind == PACED)
            measure(index * peer_count + peer->place);
        else if (index + 1 < phase.each)
            send_echo(peer, index + 1);
    }
}

#define STARTS(text, size, words) ((size) >= sizeof(words) - 1 && !memcmp(text, words, sizeof(words) - 1))

static void take_text(struct peer *peer, const uint8_t *text, size_t size)
{
    if (STARTS(text, size, "{\"type\":\"notification\""))
        take_notification(peer, text, size);
    else if (STARTS(text, size, "{\"type\":\"message_response\""))
        take_answer(peer, text, size);
    else if (STARTS(text, size, "{\"type\":\"connection_established\""))
        tally.greeted++;
    else if (STARTS(text, size, "{\"type\":\"subscribed\""))
        tally.joined++;
    else if (STARTS(text, size, "{\"type\":\"heartbeat\""))
        tally.heartbeats++;
    else
        failed(peer, "not expected:", text, size);
}

/* Process the frame at the beginning of `data`; return its length, 0 if it is not complete. */
static size_t take_frame(struct peer *peer, const uint8_t *data, size_t size)
{
    size_t head = 2, length;
    if (size < head)
        return 0;
    length = data[1];
    if (length == 126)
        head = 4;
    else if (length >= 127)
        head = 10;
    if (size < head)
        return 0;
    if (head > 2) {
        length = 0;
        for (size_t i = 2; i < head; i++)
            length = length << 8 | data[i];
    }
    if (length > LARGEST_FRAME - 10) {
        gone(peer, "no frame of ours", NULL, 0);
        return 0;
    }
    if (size < head + length)
        return 0;
    if (data[0] == 0x81) {
        take_text(peer, data + head, length);
    } else if (data[0] == 0x89) {
        tally.pings++;
        send_frame(peer, 10, data + head, length);
    } else {
        gone(peer, data[0] == 0x88 ? "closed by the server" : "no frame of ours",
             data + head + (length > 2 ? 2 : length), length > 2 ? length - 2 : 0);
    }
    return head + length;
}

/* Return the length of the answer to the handshake, 0 if it is not complete. */
static size_t take_head(struct peer *peer, const uint8_t *data, size_t size)
{
    const uint8_t *end = memmem(data, size, "\r\n\r\n", 4);
    if (!end)
        return 0;
    size_t length = (size_t)(end - data) + 4;
    if (!STARTS(data, size, "HTTP/1.1 101 ") || !memmem(data, length, ACCEPT, strlen(ACCEPT))) {
        gone(peer, "refused:", data, length);
        return length;
    }
    peer->upgraded = true;
    upgraded++;
    return length;
}

static void keep_rest(struct peer *peer, const uint8_t *data, size_t size)
{
    uint8_t *kept = NULL;
    if (size) {
        kept = allocate(size, 1);
        memcpy(kept, data, size);
    }
    free(peer->rest);
    peer->rest = kept;
    peer->rest_size = size;
}

static void readable(struct peer *peer)
{
    size_t size = peer->rest_size, taken = 0, step;
    if (size)
        memcpy(buffer, peer->rest, size);
    ssize_t got = recv(peer->fd, buffer + size, READ_BYTES, 0);
    if (got <= 0) {
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        gone(peer, "connection lost", NULL, 0);
        return;
    }
    size += (size_t)got;
    do {
        const uint8_t *data = buffer + taken;
        step = peer->upgraded ? take_frame(peer, data, size - taken)
                              : take_head(peer, data, size - taken);
        taken += step;
    } while (step && peer->fd >= 0);
    if (peer->fd < 0)
        return;
    if (size - taken > LARGEST_FRAME)
        gone(peer, "no frame of ours", NULL, 0);
    else if (peer->rest_size || taken < size)
        keep_rest(peer, buffer + taken, size - taken);
}

/* Process what has come; wait for it for at most `milliseconds`. */
static void turn(int milliseconds)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll_fd, events, EVENTS, milliseconds);
    for (int i = 0; i < count; i++) {
        struct peer *peer = events[i].data.ptr;
        uint64_t expirations;
        if (peer == &publisher) {
            take_replies();
        } else if (peer) {
            if (peer->fd >= 0)
                readable(peer);
        } else if (read(timer_fd, &expirations, sizeof expirations) < 0 && errno != EAGAIN) {
            die("timer");
        }
    }
}

/* Let something come together. A client that looks at every message at once must be woken for
 * every message, and the one who wakes it pays: on the loopback that is the server in its send, for
 * half of its time; over a network it would be nobody. */
static void nap(void)
{
    struct timespec time = {.tv_nsec = NAP};
    nanosleep(&time, NULL);
}

/* Turn until `*progress` has reached `goal`; false if nothing moves any more. */
static bool reach(const int64_t *progress, int64_t goal)
{
    int64_t seen = *progress, deadline = now_ns() + patience;
    while (*progress < goal) {
        turn(100);
        nap();
        if (*progress != seen) {
            seen = *progress;
            deadline = now_ns() + patience;
        } else if (now_ns() > deadline) {
            return false;
        }
    }
    return true;
}

/* Commands */

static void reply(int64_t units, int64_t wall, int64_t cpu)
{
    printf("{\"units\":%" PRId64 ",\"wall_ns\":%" PRId64 ",\"cpu_ns\":%" PRId64
           ",\"lost\":%" PRId64 ",\"doubled\":%" PRId64 ",\"reordered\":%" PRId64
           ",\"failed\":%" PRId64 ",\"greeted\":%" PRId64 ",\"joined\":%" PRId64
           ",\"pings\":%" PRId64 ",\"heartbeats\":%" PRId64 ",\"trouble\":\"%s\"}\n",
           units, now_ns() - wall, clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu, tally.lost,
           tally.doubled, tally.reordered, tally.failed, tally.greeted, tally.joined, tally.pings,
           tally.heartbeats, tally.trouble);
    fflush(stdout);
    memset(&tally, 0, sizeof tally);
}

static void begin(enum kind kind, int64_t messages, int64_t each, int64_t expected)
{
    phase.kind = kind;
    phase.messages = messages;
    phase.each = each;
    phase.expected = expected;
    phase.received = phase.replied = 0;
    phase.seen = allocate((size_t)(peer_count * each + 63) / 64, sizeof *phase.seen);
    for (uint32_t i = 0; i < peer_count; i++)
        peers[i].newest = -1;
}

static void end(void)
{
    tally.lost += phase.expected - phase.received;
    for (uint32_t i = 0; i < peer_count; i++) {
        peers[i].answered += asked_of(&peers[i]);
        if (phase.kind == DURABLE && peers[i].seqs)
            peers[i].seqs += (phase.messages - i + peer_count - 1) / peer_count;
    }
    phase.first += phase.messages;
    phase.kind = NOTHING;
    phase.messages = phase.each = 0;
    *phase.topic = 0;
    free(phase.seen);
    phase.seen = NULL;
}

static void connect_peer(const char *path)
{
    struct peer *peer = &peers[peer_count];
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET};
    struct linger abort_at_close = {.l_onoff = 1, .l_linger = 0};
    struct timeval five = {.tv_sec = 5};
    int on = 1;
    char request[4096];
    peer->place = peer_count++;
    alive++;
    peer->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer->fd < 0)
        die("socket");
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + peer->place % ADDRESSES);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(port);
    setsockopt(peer->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    setsockopt(peer->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(peer->fd, SOL_SOCKET, SO_SNDTIMEO, &five, sizeof five);
    /* No TIME_WAIT: the next run needs the ports. */
    setsockopt(peer->fd, SOL_SOCKET, SO_LINGER, &abort_at_close, sizeof abort_at_close);
    int size = snprintf(request, sizeof request,
                        "GET %s?token=%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                        "Connection: Upgrade\r\nSec-WebSocket-Key: %s\r\n"
                        "Sec-WebSocket-Version: 13\r\n\r\n",
                        path, tokens[peer->place], port, KEY);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
    /* On the loopback connect returns at once, as long as the queue of the listener has room. */
    if (bind(peer->fd, (struct sockaddr *)&from, sizeof from) ||
        connect(peer->fd, (struct sockaddr *)&to, sizeof to) ||
        send(peer->fd, request, (size_t)size, MSG_NOSIGNAL) != size ||
        fcntl(peer->fd, F_SETFL, O_NONBLOCK) ||
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, peer->fd, &event))
        gone(peer, "cannot connect", NULL, 0);
}

/* What `open` waits for. */
enum { GREETINGS = 1, JOINED = 2 };

static void open_peers(int64_t count, int64_t concurrency, int64_t awaited, const char *path)
{
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    int64_t opened = 0, settled = 0, started = 0, deadline = wall + patience;
    const int64_t upgraded_before = upgraded, departed_before = departed;
    if (peer_count + count > peer_limit)
        count = peer_limit - peer_count;
    while (settled < count && now_ns() < deadline) {
        for (; started < count && started - settled < concurrency; started++)
            connect_peer(path);
        turn(100);
        nap();
        if (settled != (upgraded - upgraded_before) + (departed - departed_before)) {
            settled = (upgraded - upgraded_before) + (departed - departed_before);
            deadline = now_ns() + patience;
        }
    }
    opened = upgraded - upgraded_before;
    tally.failed += settled < count ? count - settled : 0;
    if (awaited & GREETINGS && !reach(&tally.greeted, opened))
        tally.lost += opened - tally.greeted;
    if (awaited & JOINED && !reach(&tally.joined, opened))
        tally.lost += opened - tally.joined;
    reply(opened, wall, cpu);
}

static void fanout(int64_t messages, int64_t size, const char *topic)
{
    static char out[LARGEST_BODY + 500];
    char channel[140] = "channels:broadcast";
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    int64_t receivers = alive;
    begin(FANOUT, messages, messages, messages * receivers);
    if (*topic) {
        snprintf(channel, sizeof channel, "topic:%.128s", topic);
        snprintf(phase.topic, sizeof phase.topic, "\"topic\":\"%.128s\"", topic);
    }
    for (int64_t i = 0; i < messages; i++) {
        send_redis(redis_fd, out, publication(out, channel, phase.first + i, (size_t)size));
        if (!reach(&phase.received, (i + 1) * receivers))
            break;
    }
    end();
    reply(phase.received, wall, cpu);
}

static void unicast(int64_t messages, int64_t size, int64_t window)
{
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    char *out = allocate((size_t)window, (size_t)size + 500);
    begin(UNICAST, messages, (messages + peer_count - 1) / peer_count, messages);
    for (int64_t sent = 0; sent < messages;) {
        size_t filled = 0;
        int64_t stop = sent + window < messages ? sent + window : messages;
        for (; sent < stop; sent++)
            filled += publication_to_user(out + filled, sent % peer_count,
                                          phase.first + sent, (size_t)size);
        send_redis(redis_fd, out, filled);
        if (!reach(&phase.received, sent))
            break;
    }
    end();
    free(out);
    reply(phase.received, wall, cpu);
}

static int connect_redis(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(redis_port)};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
        die("Redis");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static void open_publisher(void)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &publisher};
    if (publisher.fd >= 0)
        return;
    publisher.fd = connect_redis();
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, publisher.fd, &event))
        die("epoll");
}

static void durable(int64_t messages, int64_t size, int64_t window, const char *path)
{
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    char *out = allocate((size_t)window, (size_t)size + LARGEST_TEMPLATE + 500);
    open_publisher();
    read_template(path);
    begin(DURABLE, messages, (messages + peer_count - 1) / peer_count, messages);
    for (int64_t sent = 0; sent < messages;) {
        size_t filled = 0;
        int64_t stop = sent + window < messages ? sent + window : messages;
        for (; sent < stop; sent++)
            filled += durable_publication(out + filled, sent % peer_count, phase.first + sent,
                                          (size_t)size);
        send_redis(publisher.fd, out, filled);
        if (!reach(&phase.received, sent) || !reach(&phase.replied, sent))
            break;
    }
    end();
    free(out);
    reply(phase.received, wall, cpu);
}

static void echo(int64_t each)
{
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    begin(ECHO, 0, each, each * alive);
    for (uint32_t i = 0; each && i < peer_count; i++)
        if (peers[i].fd >= 0)
            send_echo(&peers[i], 0);
    reach(&phase.received, phase.expected);
    end();
    reply(phase.received, wall, cpu);
}

static void wake_at(int64_t moment)
{
    struct itimerspec timer = {.it_value = {moment / SECOND, moment % SECOND}};
    if (timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &timer, NULL))
        die("timer");
}

/* Write for each message, in order: how late it was published, and its latency (-1 if lost). */
static void write_times(const char *path, const int64_t *late, int64_t messages)
{
    FILE *file = fopen(path, "wb");
    if (!file)
        die(path);
    for (int64_t i = 0; i < messages; i++) {
        fwrite(&late[i], sizeof *late, 1, file);
        fwrite(&phase.latency[i], sizeof *phase.latency, 1, file);
    }
    if (fclose(file))
        die(path);
}

/* The messages of an open loop from `first` up to before `stop` are due: publish them. */
static char *batch;
static size_t batch_size;

static void publish_batch(int64_t first, int64_t stop)
{
    size_t filled = 0;
    for (int64_t i = first; i < stop; i++)
        filled += publication_to_user(batch + filled, i % peer_count, phase.first + i, batch_size);
    send_redis(redis_fd, batch, filled);
}

/* The same for messages of the connections themselves, one after the other. */
static void say_batch(int64_t first, int64_t stop)
{
    for (int64_t i = first; i < stop; i++)
        if (peers[i % peer_count].fd >= 0)
            send_echo(&peers[i % peer_count], i / peer_count);
}

/* Start `messages` of the phase that has begun, `rate` per second, each when it is due. */
static void open_loop(int64_t messages, int64_t rate, const char *path,
                      void (*start)(int64_t first, int64_t stop))
{
    int64_t *late = allocate((size_t)messages, sizeof *late);
    int64_t sent = 0, seen = -1, deadline = 0;
    phase.latency = allocate((size_t)messages, sizeof *phase.latency);
    for (int64_t i = 0; i < messages; i++)
        late[i] = phase.latency[i] = -1;
    phase.interval = SECOND / rate;
    phase.start = now_ns() + SECOND / 1000;
    while (phase.received < messages) {
        int64_t now = now_ns(), first = sent;
        int64_t stop = sent + LARGEST_WINDOW < messages ? sent + LARGEST_WINDOW : messages;
        for (; sent < stop && phase.start + sent * phase.interval <= now; sent++)
            late[sent] = now - (phase.start + sent * phase.interval);
        start(first, sent);
        if (sent + phase.received != seen) {
            seen = sent + phase.received;
            deadline = now + patience;
        } else if (now > deadline) {
            break;
        }
        if (sent < messages)
            wake_at(phase.start + sent * phase.interval);
        turn(100);
        /* Thousands of answers per second would wake this client for each, see nap(). */
        if (phase.kind == PACED)
            nap();
    }
    end();
    write_times(path, late, messages);
    free(phase.latency);
    phase.latency = NULL;
    free(late);
}

static void latency(int64_t messages, int64_t rate, int64_t size, const char *path)
{
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    batch = allocate(LARGEST_WINDOW, (size_t)size + 500);
    batch_size = (size_t)size;
    begin(UNICAST, messages, (messages + peer_count - 1) / peer_count, messages);
    open_loop(messages, rate, path, publish_batch);
    free(batch);
    reply(phase.received, wall, cpu);
}

static void paced(int64_t messages, int64_t rate, const char *path)
{
    int64_t wall = now_ns(), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    begin(PACED, 0, (messages + peer_count - 1) / peer_count, messages);
    open_loop(messages, rate, path, say_batch);
    reply(phase.received, wall, cpu);
}

/* A line is a name, up to three numbers, and the rest of it, which may be a path. */
static void perform(const char *line)
{
    char name[20] = "", rest[1000] = "";
    long long numbers[3] = {0, 0, 0};
    int taken = 0, step;
    sscanf(line, "%19s%n", name, &taken);
    for (int i = 0; i < 3 && sscanf(line + taken, "%lld%n", &numbers[i], &step) == 1; i++)
        taken += step;
    sscanf(line + taken, " %999[^\n]", rest);
    const long long a = numbers[0], b = numbers[1], c = numbers[2];
    if (!strcmp(name, "open") && a >= 0 && b > 0 && *rest == '/')
        open_peers(a, b, c, rest);
    else if (!strcmp(name, "fanout") && a >= 0 && b <= LARGEST_BODY)
        fanout(a, b, rest);
    else if (!strcmp(name, "unicast") && a >= 0 && b <= LARGEST_BODY && c > 0 && peer_count)
        unicast(a, b, c);
    else if (!strcmp(name, "durable") && a >= 0 && b <= LARGEST_BODY && c > 0 && peer_count)
        durable(a, b, c, rest);
    else if (!strcmp(name, "echo") && a >= 0)
        echo(a);
    else if (!strcmp(name, "latency") && a >= 0 && b > 0 && c <= LARGEST_BODY && peer_count)
        latency(a, b, c, rest);
    else if (!strcmp(name, "paced") && a >= 0 && b > 0 && peer_count)
        paced(a, b, rest);
    else if (!strcmp(name, "counts"))
        reply(0, now_ns(), clock_ns(CLOCK_PROCESS_CPUTIME_ID));
    else {
        fprintf(stderr, "client: not understood: %s\n", line);
        exit(2);
    }
}

/* Start */

static void read_tokens(const char *path)
{
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t room = 0, limit = 0;
    ssize_t size;
    if (!file)
        die(path);
    while ((size = getline(&line, &room, file)) > 0) {
        if (peer_limit == limit) {
            limit = limit ? 2 * limit : 1024;
            tokens = realloc(tokens, limit * sizeof *tokens);
            if (!tokens)
                die("memory");
        }
        line[strcspn(line, "\n")] = 0;
        tokens[peer_limit++] = strdup(line);
    }
    free(line);
    fclose(file);
    peers = allocate(peer_limit, sizeof *peers);
}

static void serve(void)
{
    static char line[2000];
    size_t filled = 0;
    struct pollfd waiting[2] = {{.fd = 0, .events = POLLIN}, {.fd = epoll_fd, .events = POLLIN}};
    for (;;) {
        if (poll(waiting, 2, -1) < 0 && errno != EINTR)
            die("poll");
        if (waiting[1].revents)
            turn(0);
        if (!waiting[0].revents)
            continue;
        ssize_t got = read(0, line + filled, sizeof line - 1 - filled);
        if (got <= 0)
            return; /* Whoever started this has no more to ask. */
        filled += (size_t)got;
        line[filled] = 0;
        if (line[filled - 1] == '\n') {
            perform(line);
            filled = 0;
        }
    }
}

int main(int argc, char **argv)
{
    static const char quiet[] = "*3\r\n$6\r\nCLIENT\r\n$5\r\nREPLY\r\n$3\r\nOFF\r\n";
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (argc != 5) {
        fprintf(stderr, "usage: client PORT REDIS_PORT TOKENS_FILE PATIENCE_MS\n");
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1);
    port = (uint16_t)atoi(argv[1]);
    patience = atoll(argv[4]) * 1000000;
    read_tokens(argv[3]);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (epoll_fd < 0 || timer_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &event))
        die("epoll");
    redis_port = (uint16_t)atoi(argv[2]);
    redis_fd = connect_redis();
    send_redis(redis_fd, quiet, sizeof quiet - 1);
    serve();
    return 0;
}
