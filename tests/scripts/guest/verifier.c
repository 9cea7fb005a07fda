/* Writes blocks of a file at random places, past the page cache, and reads them back. Which block a write goes to, and what it
 * fills it with, follows from the write's number; so whoever has the file later, and knows a number up to which all was durable,
 * sees whether anything is missing, old or torn (src/verifier.rs).
 *
 * Says on the console up to which write all is durable. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define BLOCKS 4096
/* Writes between two flushes. */
#define BATCH 32

static uint64_t last[BLOCKS];

/* The finalizer of SplitMix64. */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

/* Opened each time: the login prompt hangs up whoever had it open. */
static void say(const char *what, unsigned long long number)
{
    int console = open("/dev/ttyS0", O_WRONLY | O_NOCTTY);
    if (console >= 0) {
        dprintf(console, "%s %llu\n", what, number);
        close(console);
    }
}

static void fail(const char *what)
{
    fprintf(stderr, "verifier: %s: %s\n", what, strerror(errno));
    say("verifier-failed", errno);
    exit(1);
}

static void fill(uint64_t *words, uint64_t number)
{
    words[0] = number;
    for (uint64_t nth = 1; nth < WORDS; nth++)
        words[nth] = mix(number * WORDS + nth);
}

static long long now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

int main(int count, char **arguments)
{
    uint64_t *words, *read_back;
    long long said = 0;
    int file = count == 2 ? open(arguments[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600) : -1;
    if (file < 0 || posix_memalign((void **)&words, BLOCK, BLOCK) || posix_memalign((void **)&read_back, BLOCK, BLOCK))
        fail("begin");
    for (uint64_t number = 0;; number++) {
        /* First each block once, in order. */
        uint64_t block = number < BLOCKS ? number : mix(number) % BLOCKS;
        fill(words, number);
        if (pwrite(file, words, BLOCK, block * BLOCK) != BLOCK)
            fail("write");
        last[block] = number;
        if (number % BATCH != BATCH - 1)
            continue;
        if (fsync(file))
            fail("fsync");
        if (number >= BLOCKS) {
            block = mix(~number) % BLOCKS;
            fill(words, last[block]);
            if (pread(file, read_back, BLOCK, block * BLOCK) != BLOCK)
                fail("read");
            if (memcmp(words, read_back, BLOCK)) {
                errno = 0;
                fail("a block is not as it was written");
            }
            if (now_ms() - said >= 250) {
                said = now_ms();
                say("verified", number);
            }
        }
    }
}
