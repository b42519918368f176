/*
 * Lets an unmodified Suricata take super-packets from its NFQUEUE (docs/inspection.md, "Super-packets").
 *
 * Preloaded into the engine (LD_PRELOAD, ld.so(8)), it stands before two functions of libnetfilter_queue:
 *
 * - nfq_set_mode(): afterwards the queue is asked to hand on packets as they are (NFQA_CFG_F_GSO), where
 *   the kernel otherwise cuts them into segments and gives a verdict's cost to each.
 * - nfq_get_payload(): such a packet's TCP or UDP checksum is not computed yet (NFQA_SKB_CSUMNOTREADY); the
 *   sender's card, or the last link, was to do it. The engine must go on checking checksums, since a segment with
 *   a wrong one is dropped by its target and must not be believed. So it is computed here, in the engine's
 *   copy. The packet itself stays as it is, and leaves with the checksum that its link computes.
 *
 * Nothing here is needed for a packet to be inspected: without it the engine gets packets of up to an MTU.
 * Every length is checked: packets are hostile. Sources: linux/netfilter/nfnetlink_queue.h, RFC 1071.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hairpin_queue.h"

struct nfq_q_handle;
struct nfq_data;
struct packet_header { /* struct nfqnl_msg_packet_hdr */
    uint32_t id;
    uint16_t protocol;
    uint8_t hook;
} __attribute__((packed));

enum { COPY_PACKET = 2, QUEUE_GSO = 1 << 2 };
enum { ACCEPT = 1, REPEAT = 4 }; /* linux/netfilter.h */
enum { CHECKSUM_NOT_READY = 1 << 0 };

/* The sum of 16 bit words, folded to 16 bits; in the memory's own byte order (RFC 1071, section 2). */
static uint16_t fold(uint64_t sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)((sum & 0xffff) + (sum >> 16));
}

static uint64_t add(uint64_t sum, const unsigned char *data, size_t length)
{
    uint32_t word;
    uint16_t last = 0;

    /* 16,384 words of 32 bits fit into 64 bits many times over: no carry is lost. */
    for (; length >= 4; data += 4, length -= 4) {
        memcpy(&word, data, 4);
        sum += word;
    }
    if (length >= 2) {
        memcpy(&last, data, 2);
        sum += last;
        data += 2;
        length -= 2;
        last = 0;
    }
    if (length) {
        memcpy(&last, data, 1);
        sum += last;
    }
    return sum;
}

size_t find_transport(const unsigned char *packet, size_t length, size_t *end, int *protocol,
                      uint64_t *pseudo)
{
    size_t at;

    if (length >= IPV4_HEADER && packet[0] >> 4 == 4) {
        at = (size_t)(packet[0] & 0xf) * 4;
        *end = (size_t)packet[2] << 8 | packet[3];
        if (at < IPV4_HEADER || *end > length || *end < at)
            return 0;
        if ((packet[6] & 0x3f) != 0 || packet[7] != 0)
            return 0; /* a fragment: its checksum is of more than is here */
        *protocol = packet[9];
        *pseudo = add(0, packet + 12, 8);
        return at;
    }
    if (length >= IPV6_HEADER && packet[0] >> 4 == 6) {
        int headers;

        at = IPV6_HEADER;
        *end = at + ((size_t)packet[4] << 8 | packet[5]);
        if (*end > length)
            return 0;
        *protocol = packet[6];
        /* Hop-by-hop, routing and destination options; a card computes nothing behind others. */
        for (headers = 0; headers < 8; headers++) {
            if (*protocol != 0 && *protocol != 43 && *protocol != 60)
                break;
            if (*protocol == 43)
                return 0; /* the final destination is another one than the header's */
            if (at + 8 > *end)
                return 0;
            *protocol = packet[at];
            at += ((size_t)packet[at + 1] + 1) * 8;
            if (at > *end)
                return 0;
        }
        *pseudo = add(0, packet + 8, 32);
        return at;
    }
    return 0;
}

/* Where the checksum of a whole TCP or UDP packet is, 0 without one; `sum` becomes that of its pseudo header. */
static size_t find_checksum(const unsigned char *packet, size_t length, size_t *at, size_t *size,
                            int *protocol, uint64_t *sum)
{
    size_t end = 0;

    *at = find_transport(packet, length, &end, protocol, sum);
    if (*at == 0)
        return 0;
    *size = end - *at;
    *sum += htons((uint16_t)*protocol);
    if (*protocol == TCP && *size >= TCP_HEADER)
        return *at + TCP_CHECKSUM;
    if (*protocol == UDP && *size >= UDP_HEADER)
        return *at + UDP_CHECKSUM;
    return 0;
}

int hairpin_write_checksum(unsigned char *packet, size_t length)
{
    size_t at = 0, size = 0, field;
    int protocol = 0;
    uint64_t pseudo = 0;
    uint16_t sum;

    field = find_checksum(packet, length, &at, &size, &protocol, &pseudo);
    if (field == 0)
        return 0;
    memset(packet + field, 0, 2);
    sum = (uint16_t)~fold(add(pseudo + htons((uint16_t)size), packet + at, size));
    if (sum == 0 && protocol == UDP)
        sum = 0xffff;
    memcpy(packet + field, &sum, 2);
    return 1;
}

/*
 * Computes the checksum of a packet whose checksum is not ready; 1 when it did. A field that does not hold the
 * pseudo header's sum, with which every sender prepares it, is left as it is: then something else was to be
 * computed, and the target sees this field as it stands.
 */
int hairpin_fill_checksum(unsigned char *packet, size_t length)
{
    size_t at = 0, size = 0, field;
    int protocol = 0;
    uint64_t pseudo = 0;
    uint16_t found, wanted;

    field = find_checksum(packet, length, &at, &size, &protocol, &pseudo);
    if (field == 0)
        return 0;
    memcpy(&found, packet + field, 2);
    wanted = fold(pseudo + htons((uint16_t)size));
    if (found != wanted && found != fold(pseudo))
        return 0;
    return hairpin_write_checksum(packet, length);
}

int nfq_set_mode(struct nfq_q_handle *queue, uint8_t mode, uint32_t range)
{
    int (*real)(struct nfq_q_handle *, uint8_t, uint32_t);
    int (*set_flags)(struct nfq_q_handle *, uint32_t, uint32_t);
    int status;

    *(void **)&real = dlsym(RTLD_NEXT, "nfq_set_mode");
    *(void **)&set_flags = dlsym(RTLD_NEXT, "nfq_set_queue_flags");
    if (real == NULL)
        return -1;
    status = real(queue, mode, range);
    if (status < 0 || mode != COPY_PACKET || getenv("HAIRPIN_NO_SUPER_PACKETS") != NULL)
        return status;
    if (set_flags != NULL && dlsym(RTLD_NEXT, "nfq_get_skbinfo") != NULL &&
        set_flags(queue, QUEUE_GSO, QUEUE_GSO) >= 0)
        fputs("hairpin: super-packets accepted\n", stderr);
    else
        fputs("hairpin: super-packets refused by the kernel or libnetfilter_queue\n", stderr);
    return status;
}

int nfq_get_payload(struct nfq_data *packet, unsigned char **data)
{
    static int (*real)(struct nfq_data *, unsigned char **);
    static uint32_t (*read_info)(struct nfq_data *);
    static uint32_t (*read_mark)(struct nfq_data *);
    static struct packet_header *(*read_header)(struct nfq_data *);
    struct packet_header *header;
    int length;

    /* Several threads may find the same pointers at once, and all write the same. */
    if (real == NULL) {
        *(void **)&read_info = dlsym(RTLD_NEXT, "nfq_get_skbinfo");
        *(void **)&read_mark = dlsym(RTLD_NEXT, "nfq_get_nfmark");
        *(void **)&read_header = dlsym(RTLD_NEXT, "nfq_get_msg_packet_hdr");
        *(void **)&real = dlsym(RTLD_NEXT, "nfq_get_payload");
    }
    if (real == NULL)
        return -1;
    length = real(packet, data);
    if (length <= 0)
        return length;
    if (read_info != NULL && (read_info(packet) & CHECKSUM_NOT_READY))
        hairpin_fill_checksum(*data, (size_t)length);
    if (read_mark == NULL || read_header == NULL || (header = read_header(packet)) == NULL)
        return length;
    return hairpin_take_packet(read_mark(packet), ntohl(header->id), data, length, hairpin_now());
}

/*
 * Queues those packets again that the engine accepted but saw without what they carry (see hairpin_shortcut.c).
 * Whether `id` is one of them, so that it has its verdict.
 */
static int queue_again(struct nfq_q_handle *queue, uint32_t id, uint32_t verdict, int batch)
{
    static int (*give)(struct nfq_q_handle *, uint32_t, uint32_t, uint32_t, const unsigned char *);
    uint32_t ids[HAIRPIN_WAITING];
    unsigned int number, at;
    int itself = 0;

    if (verdict != ACCEPT)
        return 0;
    number = hairpin_find_first(id, batch, ids);
    if (number == 0)
        return 0;
    if (give == NULL)
        *(void **)&give = dlsym(RTLD_NEXT, "nfq_set_verdict");
    for (at = 0; at < number; at++) {
        if (give != NULL)
            give(queue, ids[at], REPEAT, 0, NULL);
        itself |= ids[at] == id;
    }
    return itself;
}

/* The four ways to give a verdict; with a mark, it may be the one by which a connection is let go. */

int nfq_set_verdict2(struct nfq_q_handle *queue, uint32_t id, uint32_t verdict, uint32_t mark,
                     uint32_t length, const unsigned char *data)
{
    static int (*real)(struct nfq_q_handle *, uint32_t, uint32_t, uint32_t, uint32_t,
                       const unsigned char *);

    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "nfq_set_verdict2");
    if (real == NULL)
        return -1;
    if (queue_again(queue, id, verdict, 0)) {
        hairpin_forget(id, verdict, 0);
        return 0;
    }
    return real(queue, id, verdict, hairpin_decide(id, verdict, mark, 0, hairpin_now()), length, data);
}

int nfq_set_verdict_batch2(struct nfq_q_handle *queue, uint32_t id, uint32_t verdict, uint32_t mark)
{
    static int (*real)(struct nfq_q_handle *, uint32_t, uint32_t, uint32_t);

    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "nfq_set_verdict_batch2");
    if (real == NULL)
        return -1;
    queue_again(queue, id, verdict, 1);
    return real(queue, id, verdict, hairpin_decide(id, verdict, mark, 1, hairpin_now()));
}

int nfq_set_verdict(struct nfq_q_handle *queue, uint32_t id, uint32_t verdict, uint32_t length,
                    const unsigned char *data)
{
    static int (*real)(struct nfq_q_handle *, uint32_t, uint32_t, uint32_t, const unsigned char *);

    int again;

    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "nfq_set_verdict");
    if (real == NULL)
        return -1;
    again = queue_again(queue, id, verdict, 0);
    hairpin_forget(id, verdict, 0);
    return again ? 0 : real(queue, id, verdict, length, data);
}

int nfq_set_verdict_batch(struct nfq_q_handle *queue, uint32_t id, uint32_t verdict)
{
    static int (*real)(struct nfq_q_handle *, uint32_t, uint32_t);

    if (real == NULL)
        *(void **)&real = dlsym(RTLD_NEXT, "nfq_set_verdict_batch");
    if (real == NULL)
        return -1;
    queue_again(queue, id, verdict, 1);
    hairpin_forget(id, verdict, 1);
    return real(queue, id, verdict);
}
