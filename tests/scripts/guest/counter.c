/* Counts in order across two disks: n to the first, durably, then n to the second, then n + 1. So at every moment the first
 * holds what the second does, or one more; a copy of both disks that shows anything else mixes two moments.
 *
 * Says on the console how far it is, so that whoever watches sees that the guest goes on. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Within one sector, which a disk writes as a whole. */
#define DIGITS 20

static void fail(const char *what)
{
    fprintf(stderr, "counter: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_file(const char *path, unsigned long long *count)
{
    char text[DIGITS + 2] = "";
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0 || pread(fd, text, DIGITS, 0) < 0)
        fail(path);
    *count = strtoull(text, NULL, 10);
    return fd;
}

static void put(int fd, unsigned long long count)
{
    char text[DIGITS + 2];
    snprintf(text, sizeof text, "%0*llu\n", DIGITS, count);
    if (pwrite(fd, text, DIGITS + 1, 0) != DIGITS + 1 || fsync(fd))
        fail("write");
}

/* Opened each time: the login prompt hangs up whoever had it open. */
static void say(unsigned long long count)
{
    int console = open("/dev/ttyS0", O_WRONLY | O_NOCTTY);
    if (console >= 0) {
        dprintf(console, "counter %llu\n", count);
        close(console);
    }
}

static long long now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

int main(void)
{
    unsigned long long first, second;
    int a = open_file("/var/lib/counter", &first), b = open_file("/data/counter", &second);
    long long said = 0;
    if (second > first || first > second + 1) {
        fprintf(stderr, "counter: %llu on the first disk, %llu on the second\n", first, second);
        return 1;
    }
    for (;; first++) {
        put(a, first);
        put(b, first);
        if (now_ms() - said >= 250) {
            said = now_ms();
            say(first);
        }
    }
}
