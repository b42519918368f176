/*
 * Lets a connection leave the engine for a shortcut, and come back (docs/inspection.md, "The shortcut in the
 * service host"). Preloaded with hairpin_queue.c, which calls the functions of hairpin_queue.h.
 *
 * A packet's mark has its class (bits 16 to 18, from the tag that it came with). The engine's own rules set
 * bit 24 + class in the marks of connections that may go for this class's reason. Where that is so of a packet,
 * it gets the final bit (31), by which the kernel sends it to the switch's third leg, and its connection is
 * noted here as *gone*: from now on the switch may pass it without the engine seeing it.
 *
 * Suricata keeps what it knew of such a connection. What comes later, after a gap of megabytes, would be out of
 * its window, and be dropped. So a packet of a gone connection that does not go on where the engine left off is
 * taken as *returned*: from then on the engine sees the connection's packets inside of GRE and two VLAN
 * tags that carry a number of their own. VLANs are a part of what Suricata knows flows by, so this is a connection
 * which it never saw, and picks up in the middle (`stream.midstream`). Rules see the inner packet. In a
 * tunnel Suricata sets no mark, so a returned connection stays inspected for the rest of its life.
 *
 * Of a connection's first packet Suricata does not say yet that it is of an established one, and most rules ask for
 * that. So the packet that begins an epoch is seen without what it carries, and when that is accepted, it
 * is queued again (NF_REPEAT) and seen whole.
 *
 * The packets in the kernel are not touched. The table is bounded; where it is full, a connection stays inspected.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "hairpin_queue.h"

/* appliance/inspection/shortcut.py has the same numbers; a test compares them. */
enum { CLASS_SHIFT = 16, CLASS_MASK = 7, TRIGGER_SHIFT = 24 };
static const uint32_t FINAL = UINT32_C(1) << 31;
enum { ACCEPT = 1 };

enum { FIN = 1, SYN = 2, RST = 4, PUSH = 8, ACK = 16 };
enum { TAKEN_MS = 1000, STRAGGLER_BYTES = 1000000 };
enum { SETS = 8192, WAYS = 8, LOCKS = 64, WAITING = HAIRPIN_WAITING };
enum { WRAP = IPV4_HEADER + 4 + 4 + 4, LONGEST = 65535, LONGEST_HEADERS = 512 };
/* Packets of an engine's flow may be timed by another clock, whole seconds: kept a little longer than it. */
enum { MARGIN_MS = 30000, DEFAULT_IDLE_S = 300, STATE_SIZE = 4096 };

/* The state file: 64 bit words. The first three are written by `hairpin inspect`, the others here. */
enum word {
    MAGIC,   /* "HAIRPIN1" */
    UNTIL,   /* no connection is let go after this time, CLOCK_MONOTONIC in ns */
    IDLE,    /* seconds after which the engine forgets a connection */
    PID,     /* whose figures these are */
    PRESENT, /* connections in the table */
    ENTERED, /* connections let go */
    RETURNED,
    RENEWED,       /* a SYN on the ports of a connection in the table */
    TURNED,        /* another epoch for a returned connection, as the other side began to speak */
    REFUSED_FULL,  /* let not go: no room in the table */
    REFUSED_MIXED, /* a batch of packets of which not all may go */
    TOO_LONG,      /* packets that could not be wrapped, and were seen as they are */
    WRAPPED,       /* packets that were */
    REPEATED,      /* packets that began an epoch, and were queued again to be seen whole */
};

struct tuple {
    uint64_t words[5]; /* both ends in their order, 16 bytes of address and 2 of port each, then the version */
};

struct entry {
    struct tuple tuple;
    uint32_t next[2]; /* by direction: the sequence number after the last byte that the engine saw */
    uint32_t epoch;   /* 0: the engine sees it as it is */
    uint8_t used, gone;
    uint8_t speaker, settled; /* see find_identity() */
    int64_t last, since; /* ms; of the last packet, and since when it is gone */
};

struct waiting {
    struct tuple tuple;
    uint32_t id, end, ack;
    uint8_t class, direction, whole, first, fit;
};

struct segment {
    struct tuple tuple;
    size_t start, payload; /* where the TCP header begins, and what it carries */
    uint32_t seq, end, ack;
    uint8_t flags, direction, data;
};

static struct entry table[SETS][WAYS];
static pthread_mutex_t locks[LOCKS];
static uint64_t seed[2];
static _Atomic uint32_t present, epochs;
static _Atomic uint64_t scratch[STATE_SIZE / 8];
static _Atomic uint64_t *state = scratch;

/* Packets of this thread's queue that wait for a verdict, oldest first; `lost`: there were more. */
static _Thread_local struct waiting waiting[WAITING];
static _Thread_local unsigned int waiting_count;
static _Thread_local int lost;
static _Thread_local unsigned char wrapped[LONGEST + 1];

static void count(enum word what)
{
    atomic_fetch_add_explicit(&state[what], 1, memory_order_relaxed);
}

int64_t hairpin_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Maps the state file; 1 when it did. Without one no connection is ever let go. */
int hairpin_open_state(const char *path)
{
    struct stat seen;
    void *mapped;
    int descriptor = open(path, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);

    if (descriptor < 0)
        return 0;
    mapped = MAP_FAILED;
    if (fstat(descriptor, &seen) == 0 && S_ISREG(seen.st_mode) && seen.st_size >= STATE_SIZE)
        mapped = mmap(NULL, STATE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (mapped == MAP_FAILED)
        return 0;
    if (memcmp(mapped, "HAIRPIN1", 8) != 0) {
        munmap(mapped, STATE_SIZE);
        return 0;
    }
    state = mapped;
    for (int word = PRESENT; word <= REPEATED; word++)
        atomic_store(&state[word], 0);
    atomic_store(&state[PID], (uint64_t)getpid());
    return 1;
}

__attribute__((constructor)) static void prepare(void)
{
    const char *path = getenv("HAIRPIN_SHORTCUT");

    for (int lock = 0; lock < LOCKS; lock++)
        pthread_mutex_init(&locks[lock], NULL);
    /* So that nobody can choose addresses that all fall into one set. */
    if (getrandom(seed, sizeof seed, GRND_NONBLOCK) != (ssize_t)sizeof seed) {
        seed[0] = (uint64_t)hairpin_now() * UINT64_C(0x9e3779b97f4a7c15);
        seed[1] = (uint64_t)(uintptr_t)&path ^ (uint64_t)getpid();
    }
    if (path != NULL && !hairpin_open_state(path))
        fputs("hairpin: no shortcut: its state file can't be mapped\n", stderr);
}

static int64_t find_limit(void)
{
    uint64_t idle = atomic_load_explicit(&state[IDLE], memory_order_relaxed);

    if (idle == 0 || idle > 86400)
        idle = DEFAULT_IDLE_S;
    return (int64_t)idle * 1000 + MARGIN_MS;
}

static int is_open(int64_t now)
{
    return (uint64_t)now * 1000000 < atomic_load_explicit(&state[UNTIL], memory_order_relaxed);
}

static unsigned int find_set(const struct tuple *tuple)
{
    uint64_t hash = seed[0];

    for (int word = 0; word < 5; word++) {
        unsigned __int128 product =
            (unsigned __int128)(hash ^ tuple->words[word]) * (seed[1] | 1);
        hash = (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    return (unsigned int)(hash >> 13) % SETS;
}

static uint32_t read32(const unsigned char *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

/* Reads a whole TCP segment; 0 when it is none. */
static int read_segment(const unsigned char *packet, size_t length, struct segment *segment)
{
    unsigned char ends[2][18];
    size_t end = 0, at, header, address;
    int protocol = 0, swapped;
    uint64_t pseudo = 0;

    at = find_transport(packet, length, &end, &protocol, &pseudo);
    if (at == 0 || protocol != TCP || end - at < TCP_HEADER)
        return 0;
    header = (size_t)(packet[at + 12] >> 4) * 4;
    if (header < TCP_HEADER || header > end - at)
        return 0;
    segment->seq = read32(packet + at + 4);
    segment->ack = read32(packet + at + 8);
    segment->flags = packet[at + 13];
    segment->end = segment->seq + (uint32_t)(end - at - header) + (segment->flags & SYN ? 1 : 0) +
                   (segment->flags & FIN ? 1 : 0);
    segment->data = end - at > header;
    segment->start = at;
    segment->payload = at + header;
    memset(ends, 0, sizeof ends);
    address = packet[0] >> 4 == 4 ? 4 : 16;
    memcpy(ends[0], packet + (address == 4 ? 12 : 8), address);
    memcpy(ends[1], packet + (address == 4 ? 16 : 24), address);
    memcpy(ends[0] + 16, packet + at, 2);
    memcpy(ends[1] + 16, packet + at + 2, 2);
    swapped = memcmp(ends[0], ends[1], sizeof ends[0]) > 0;
    segment->direction = (uint8_t)swapped;
    memset(&segment->tuple, 0, sizeof segment->tuple);
    memcpy(segment->tuple.words, ends[swapped], sizeof ends[0]);
    memcpy((unsigned char *)segment->tuple.words + sizeof ends[0], ends[!swapped], sizeof ends[0]);
    ((unsigned char *)segment->tuple.words)[36] = packet[0] >> 4;
    return 1;
}

static struct entry *find_entry(struct entry *set, const struct tuple *tuple)
{
    for (int way = 0; way < WAYS; way++)
        if (set[way].used && memcmp(&set[way].tuple, tuple, sizeof *tuple) == 0)
            return &set[way];
    return NULL;
}

static void remove_entry(struct entry *entry)
{
    entry->used = 0;
    atomic_fetch_sub(&present, 1);
    atomic_fetch_sub_explicit(&state[PRESENT], 1, memory_order_relaxed);
}

static uint32_t find_epoch(void)
{
    uint32_t epoch;

    do
        epoch = (atomic_fetch_add(&epochs, 1) + 1) & 0xffffff;
    while (epoch == 0);
    return epoch;
}

/* The packet as Suricata's flow table has never seen it: IPv4, GRE, two tags with the epoch, the packet. */
static int wrap(const unsigned char *packet, size_t length, uint32_t epoch, unsigned char *into)
{
    static const unsigned char outer[WRAP] = {
        0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 47, 0, 0, 127, 72, 80, 1, 127, 72, 80, 2,
        0, 0, 0x81, 0, 0, 0, 0x81, 0, 0, 0, 0, 0,
    };
    size_t total = length + WRAP;
    uint32_t sum = 0;

    if (total > LONGEST)
        return 0;
    memcpy(into, outer, WRAP);
    into[2] = (unsigned char)(total >> 8);
    into[3] = (unsigned char)total;
    for (int at = 0; at < IPV4_HEADER; at += 2)
        sum += (uint32_t)into[at] << 8 | into[at + 1];
    sum = (sum & 0xffff) + (sum >> 16);
    sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
    into[10] = (unsigned char)(sum >> 8);
    into[11] = (unsigned char)sum;
    into[24] = (unsigned char)(epoch >> 8 & 0xf);
    into[25] = (unsigned char)epoch;
    into[28] = (unsigned char)(epoch >> 20 & 0xf);
    into[29] = (unsigned char)(epoch >> 12);
    into[30] = packet[0] >> 4 == 4 ? 0x08 : 0x86;
    into[31] = packet[0] >> 4 == 4 ? 0x00 : 0xdd;
    memcpy(into + WRAP, packet, length);
    return (int)total;
}

static void advance(uint32_t *next, uint32_t to)
{
    if ((int32_t)(to - *next) > 0)
        *next = to;
}

/*
 * Whether a segment goes on where the engine was, or is sent again: then the engine missed nothing, however long
 * ago that was. (One in 4,000 that come back after 4 GiB looks so; the next one does not.)
 */
static int is_straggler(const struct entry *entry, const struct segment *segment)
{
    uint32_t behind = entry->next[segment->direction] - segment->seq;

    if (behind > STRAGGLER_BYTES)
        return 0;
    return !(segment->flags & ACK) ||
           (int32_t)(entry->next[!segment->direction] - segment->ack) >= 0;
}

static void renew(struct entry *entry, enum word why)
{
    entry->epoch = find_epoch();
    entry->gone = entry->speaker = 0;
    entry->settled = why != RETURNED;
    count(why);
}

/*
 * A connection returns in the middle of something, and where that is a body of which the head was not seen, Suricata
 * finds no protocol in it, or the wrong one, and gives up for good. What the other side says next is mostly
 * where a request or an answer begins. So there, once, the connection gets another epoch: that side
 * had said nothing in the one before, so nothing that it says is torn apart.
 */
static int is_turn(struct entry *entry, const struct segment *segment)
{
    if (entry->epoch == 0 || entry->settled || !segment->data)
        return 0;
    if (entry->speaker == 0)
        entry->speaker = (uint8_t)(segment->direction + 1);
    return entry->speaker != segment->direction + 1;
}

/*
 * As what the engine is to see a segment: `epoch`, 0 for as it is; `first`: it begins that epoch, in the middle of
 * its connection. Whether the connection is in the table.
 */
static int find_identity(const struct segment *segment, int64_t now, uint32_t *epoch, int *first)
{
    unsigned int set = find_set(&segment->tuple);
    pthread_mutex_t *lock = &locks[set % LOCKS];
    struct entry *entry;

    *epoch = 0;
    *first = 0;
    pthread_mutex_lock(lock);
    entry = find_entry(table[set], &segment->tuple);
    if (entry != NULL && now - entry->last > find_limit()) {
        remove_entry(entry);
        entry = NULL;
    }
    if (entry != NULL) {
        if ((segment->flags & (SYN | ACK)) == SYN && entry->gone) {
            /* Only of one that is gone: else whoever sends a SYN could tear what the engine sees in two. */
            renew(entry, RENEWED);
        } else if (entry->gone && !is_straggler(entry, segment)) {
            renew(entry, RETURNED);
            is_turn(entry, segment);
            *first = 1;
        } else if (is_turn(entry, segment)) {
            renew(entry, TURNED);
            *first = 1;
        } else {
            advance(&entry->next[segment->direction], segment->end);
        }
        entry->last = now;
        *epoch = entry->epoch;
    }
    pthread_mutex_unlock(lock);
    return entry != NULL;
}

/* Notes a connection as gone. 0: there is no room, or it returned. 2: it was not noted before. */
static int enter(const struct waiting *packet, int64_t now)
{
    unsigned int set = find_set(&packet->tuple);
    pthread_mutex_t *lock = &locks[set % LOCKS];
    struct entry *entry;
    int done = 0;

    pthread_mutex_lock(lock);
    entry = find_entry(table[set], &packet->tuple);
    if (entry != NULL) {
        /* Of one verdict's packets the engine saw all, before the first of them was noted. */
        /*
         * What the switch did not take within that time it will not: it is full, or was told to send all back,
         * or the third leg leads nowhere. So the connection goes on as it did before, for good.
         */
        if (now - entry->since > TAKEN_MS)
            entry->gone = 0;
        done = entry->gone;
        advance(&entry->next[packet->direction], packet->end);
        advance(&entry->next[!packet->direction], packet->ack);
    } else {
        for (int way = 0; way < WAYS && !done; way++) {
            entry = &table[set][way];
            if (entry->used && now - entry->last > find_limit())
                remove_entry(entry);
            done = entry->used ? 0 : 2;
        }
        if (done) {
            memset(entry, 0, sizeof *entry);
            entry->tuple = packet->tuple;
            entry->next[packet->direction] = packet->end;
            entry->next[!packet->direction] = packet->ack;
            entry->last = entry->since = now;
            entry->used = entry->gone = 1;
            atomic_fetch_add(&present, 1);
            atomic_fetch_add_explicit(&state[PRESENT], 1, memory_order_relaxed);
            count(ENTERED);
        } else {
            count(REFUSED_FULL);
        }
    }
    pthread_mutex_unlock(lock);
    return done;
}

static void leave(const struct waiting *packet)
{
    unsigned int set = find_set(&packet->tuple);
    pthread_mutex_t *lock = &locks[set % LOCKS];
    struct entry *entry;

    pthread_mutex_lock(lock);
    entry = find_entry(table[set], &packet->tuple);
    if (entry != NULL && entry->gone) {
        remove_entry(entry);
        atomic_fetch_sub_explicit(&state[ENTERED], 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(lock);
}

/*
 * The engine dropped a packet of a connection: mostly for good, and it knows that by this identity. Under another
 * one the packet, sent again, might pass. So it keeps this one, and does not go (again).
 */
static void pin(const struct waiting *packet)
{
    unsigned int set = find_set(&packet->tuple);
    pthread_mutex_t *lock = &locks[set % LOCKS];
    struct entry *entry;

    pthread_mutex_lock(lock);
    entry = find_entry(table[set], &packet->tuple);
    if (entry != NULL) {
        entry->gone = 0;
        entry->settled = 1;
    }
    pthread_mutex_unlock(lock);
}

/* A packet's headers alone, as those of a packet that carries nothing; their length. */
static size_t cut_payload(const unsigned char *packet, const struct segment *segment,
                          unsigned char *into)
{
    size_t length = segment->payload, header = (size_t)(packet[0] & 0xf) * 4;
    uint32_t sum = 0;

    memcpy(into, packet, length);
    into[segment->start + 13] &= (unsigned char)~(FIN | PUSH);
    if (packet[0] >> 4 == 4) {
        into[2] = (unsigned char)(length >> 8);
        into[3] = (unsigned char)length;
        into[10] = into[11] = 0;
        for (size_t at = 0; at < header; at += 2)
            sum += (uint32_t)into[at] << 8 | into[at + 1];
        sum = (sum & 0xffff) + (sum >> 16);
        sum = ~((sum & 0xffff) + (sum >> 16)) & 0xffff;
        into[10] = (unsigned char)(sum >> 8);
        into[11] = (unsigned char)sum;
    } else {
        into[4] = (unsigned char)((length - IPV6_HEADER) >> 8);
        into[5] = (unsigned char)(length - IPV6_HEADER);
    }
    hairpin_write_checksum(into, length);
    return length;
}

int hairpin_take_packet(uint32_t mark, uint32_t id, unsigned char **data, int length, int64_t now)
{
    uint8_t class = mark >> CLASS_SHIFT & CLASS_MASK;
    struct segment segment;
    struct waiting *packet;
    uint32_t epoch = 0;
    int whole, known = 0, first = 0, total;
    const unsigned char *seen = *data;
    size_t size = (size_t)length;
    unsigned char headers[LONGEST_HEADERS];

    /* A class that was taken from a policy leaves connections that returned: then all are looked for. */
    if (class == 0 && atomic_load_explicit(&present, memory_order_relaxed) == 0)
        return length;
    whole = read_segment(*data, (size_t)length, &segment);
    if (whole && atomic_load_explicit(&present, memory_order_relaxed) != 0)
        known = find_identity(&segment, now, &epoch, &first);
    first = first && segment.data && segment.payload <= sizeof headers;
    if (class != 0 || known) {
        if (waiting_count == WAITING) {
            waiting_count = 0;
            lost = 1;
        }
        packet = &waiting[waiting_count++];
        memset(packet, 0, sizeof *packet);
        packet->id = id;
        packet->class = class;
        packet->whole = (uint8_t)whole;
        packet->first = (uint8_t)first;
        if (whole) {
            packet->tuple = segment.tuple;
            packet->end = segment.end;
            packet->ack = segment.ack;
            packet->direction = segment.direction;
            packet->fit = epoch == 0 && (segment.flags & (SYN | FIN | RST | ACK)) == ACK;
        }
    }
    if (epoch == 0)
        return length;
    if (first) {
        size = cut_payload(*data, &segment, headers);
        seen = headers;
    }
    total = wrap(seen, size, epoch, wrapped);
    if (total == 0) {
        count(TOO_LONG);
        return length;
    }
    count(WRAPPED);
    *data = wrapped;
    return total;
}

/* Takes the packets that a verdict is about from those that wait, into `taken`; how many. */
static unsigned int take_waiting(uint32_t id, int batch, struct waiting *taken)
{
    unsigned int found = 0, kept = 0;

    for (unsigned int at = 0; at < waiting_count; at++) {
        if (batch ? (int32_t)(id - waiting[at].id) >= 0 : waiting[at].id == id)
            taken[found++] = waiting[at];
        else
            waiting[kept++] = waiting[at];
    }
    waiting_count = kept;
    return found;
}

unsigned int hairpin_find_first(uint32_t id, int batch, uint32_t *ids)
{
    unsigned int found = 0;

    for (unsigned int at = 0; at < waiting_count; at++) {
        if (waiting[at].first &&
            (batch ? (int32_t)(id - waiting[at].id) >= 0 : waiting[at].id == id)) {
            ids[found++] = waiting[at].id;
            count(REPEATED);
        }
    }
    return found;
}

static void pin_all(const struct waiting *taken, unsigned int number)
{
    for (unsigned int at = 0; at < number; at++)
        if (taken[at].whole)
            pin(&taken[at]);
}

void hairpin_forget(uint32_t id, uint32_t verdict, int batch)
{
    struct waiting taken[WAITING];
    unsigned int number = waiting_count == 0 ? 0 : take_waiting(id, batch, taken);

    if (verdict != ACCEPT)
        pin_all(taken, number);
    if (batch || waiting_count == 0)
        lost = 0;
}

uint32_t hairpin_decide(uint32_t id, uint32_t verdict, uint32_t mark, int batch, int64_t now)
{
    struct waiting taken[WAITING];
    uint8_t class = mark >> CLASS_SHIFT & CLASS_MASK, fresh[WAITING];
    unsigned int number = waiting_count == 0 ? 0 : take_waiting(id, batch, taken), at;
    int may = !lost;

    /* Nobody but this library may say so. */
    mark &= ~FINAL;
    if (batch || waiting_count == 0)
        lost = 0;
    if (verdict != ACCEPT)
        pin_all(taken, number);
    if (class == 0 || number == 0 || verdict != ACCEPT || !(mark >> (TRIGGER_SHIFT + class) & 1))
        return mark;
    if (!is_open(now))
        return mark;
    for (at = 0; at < number; at++)
        may = may && taken[at].fit && taken[at].class == class;
    if (!may) {
        count(REFUSED_MIXED);
        return mark;
    }
    for (at = 0; at < number; at++) {
        fresh[at] = (uint8_t)enter(&taken[at], now);
        if (fresh[at] == 0) {
            while (at-- > 0)
                if (fresh[at] == 2)
                    leave(&taken[at]);
            return mark;
        }
    }
    return mark | FINAL;
}
