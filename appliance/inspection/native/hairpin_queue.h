/* What the two halves of the preloaded library share: reading a packet, and the shortcut's two doors. */

#ifndef HAIRPIN_QUEUE_H
#define HAIRPIN_QUEUE_H

#include <stddef.h>
#include <stdint.h>

enum { TCP = 6, UDP = 17, TCP_CHECKSUM = 16, UDP_CHECKSUM = 6 };
enum { IPV4_HEADER = 20, IPV6_HEADER = 40, TCP_HEADER = 20, UDP_HEADER = 8 };

/*
 * Where a whole packet's TCP or UDP header is: 0 where there is none, or only a part of one. `pseudo` becomes
 * the sum of the pseudo header but for the length (RFC 793, RFC 8200 section 8.1).
 */
size_t find_transport(const unsigned char *packet, size_t length, size_t *end, int *protocol,
                      uint64_t *pseudo);

/*
 * A packet comes from the queue. Returns the length of what the engine is to see, and where in `*data`: the
 * packet itself, or a copy of it under another identity, valid until this thread's next call.
 */
int hairpin_take_packet(uint32_t mark, uint32_t id, unsigned char **data, int length, int64_t now);

/* Computes the checksum of a whole TCP or UDP packet; 1 when it did. */
int hairpin_write_checksum(unsigned char *packet, size_t length);

/*
 * Which of the packets that an accepting verdict is about the engine saw without what they carry, to be queued
 * again: their ids, at most HAIRPIN_WAITING. To be asked before hairpin_decide() or hairpin_forget().
 */
enum { HAIRPIN_WAITING = 64 };
unsigned int hairpin_find_first(uint32_t id, int batch, uint32_t *ids);

/* A verdict with a mark goes to the kernel, for one packet or for all up to `id`. Returns the mark to send. */
uint32_t hairpin_decide(uint32_t id, uint32_t verdict, uint32_t mark, int batch, int64_t now);

/* A verdict without a mark, for one packet or for all up to `id`. */
void hairpin_forget(uint32_t id, uint32_t verdict, int batch);

int64_t hairpin_now(void);

#endif
