/* The least that a backup of an RBD image can cost: a snapshot, the bytes read through librbd, and
 * the same bytes written to a file. Nothing is compared, mapped, hashed or described.
 *
 *   floor POOL IMAGE SNAPSHOT [FILE] < EXTENTS
 *
 * Takes the snapshot (a name of "-" means: read the image as it is), reads the extents ("OFFSET LENGTH"
 * in bytes, a line each) by 16 threads in pieces of at most 4 MiB, each into the same place again and
 * again, and writes all pages that are not zeroes to FILE, past the page cache, one behind the other.
 * The cluster is that of CEPH_CONF. Whatever fails ends the program with a message and a status of 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <rados/librados.h>
#include <rbd/librbd.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { THREADS = 16, PIECE = 4 << 20, PAGE = 4096 };

struct piece {
    uint64_t offset;
    size_t length;
};

static struct piece *pieces;
static size_t count;
static atomic_size_t next_piece;
static atomic_uint_fast64_t file_end;
static rbd_image_t image;
static int file = -1;

static void check(int code, const char *what) {
    if (code < 0) {
        fprintf(stderr, "floor: cannot %s: %s\n", what, strerror(-code));
        exit(1);
    }
}

static void add(uint64_t offset, uint64_t length) {
    static size_t room;
    while (length > 0) {
        /* Cut at multiples of PIECE, so that no piece lies in two objects of the usual size. */
        uint64_t part = PIECE - offset % PIECE;
        if (part > length)
            part = length;
        if (count == room) {
            room = room ? room * 2 : 1024;
            pieces = realloc(pieces, room * sizeof *pieces);
            if (!pieces)
                check(-ENOMEM, "hold the list of extents");
        }
        pieces[count++] = (struct piece){offset, part};
        offset += part;
        length -= part;
    }
}

static int is_zero(const char *page) { return !page[0] && !memcmp(page, page + 1, PAGE - 1); }

/* Writes the runs of pages that are not zeroes. */
static void store(const char *bytes, size_t length) {
    for (size_t start = 0; start < length;) {
        size_t end = start;
        while (end < length && !is_zero(bytes + end))
            end += PAGE;
        if (end > start) {
            off_t at = (off_t)atomic_fetch_add(&file_end, end - start);
            if (pwrite(file, bytes + start, end - start, at) != (ssize_t)(end - start))
                check(-errno, "write the file");
        }
        start = end + PAGE;
    }
}

static void *work(void *arg) {
    char *place = arg;
    for (size_t i; (i = atomic_fetch_add(&next_piece, 1)) < count;) {
        size_t length = pieces[i].length;
        ssize_t got = rbd_read2(image, pieces[i].offset, length, place, 0x8 | 0x40);
        check(got < 0 ? (int)got : got == (ssize_t)length ? 0 : -EIO, "read the image");
        if (file >= 0) {
            size_t whole = (length + PAGE - 1) / PAGE * PAGE;
            memset(place + length, 0, whole - length);
            store(place, whole);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    rados_t cluster;
    rados_ioctx_t pool;
    pthread_t threads[THREADS];
    uint64_t offset, length, all = 0;
    char *buffer;

    if (argc < 4 || argc > 5) {
        fprintf(stderr, "usage: floor POOL IMAGE SNAPSHOT [FILE] < EXTENTS\n");
        return 2;
    }
    while (scanf("%" SCNu64 " %" SCNu64, &offset, &length) == 2) {
        add(offset, length);
        all += length;
    }
    const char *snapshot = strcmp(argv[3], "-") ? argv[3] : NULL;
    check(rados_create(&cluster, NULL), "make a handle");
    check(rados_conf_read_file(cluster, NULL), "read the configuration");
    check(rados_connect(cluster), "connect");
    check(rados_ioctx_create(cluster, argv[1], &pool), "open the pool");
    if (snapshot) {
        check(rbd_open(pool, argv[2], &image, NULL), "open the image");
        check(rbd_snap_create(image, snapshot), "take the snapshot");
        check(rbd_close(image), "close the image");
    }
    check(rbd_open_read_only(pool, argv[2], &image, snapshot), "open the snapshot");
    if (argc == 5) {
        file = open(argv[4], O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0600);
        check(file < 0 ? -errno : 0, "create the file");
        /* Writes that make a file longer exclude each other. */
        check(ftruncate(file, (off_t)(all + PAGE)) ? -errno : 0, "size the file");
    }
    if (posix_memalign((void **)&buffer, 2 << 20, (size_t)THREADS * PIECE))
        check(-ENOMEM, "allocate the buffer");
    for (int i = 0; i < THREADS; i++)
        check(-pthread_create(&threads[i], NULL, work, buffer + (size_t)i * PIECE), "start a thread");
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (file >= 0) {
        check(ftruncate(file, (off_t)file_end) ? -errno : 0, "cut the file");
        check(fsync(file) ? -errno : 0, "sync the file");
    }
    rbd_close(image);
    rados_ioctx_destroy(pool);
    rados_shutdown(cluster);
    return 0;
}
