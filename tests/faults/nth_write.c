/* A disk that fills: from the n-th request for room below a folder on, each fails (LD_PRELOAD).

   A request is whatever a file system may refuse for want of room: bytes, a new name, the fsync that
   finds no room for what was promised, a rename. Deleting always works, as on a real disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long first = -1, failures = 0;
static int reason = ENOSPC;
static atomic_long asked;

/* The requests `n` to `n + count - 1` from now on fail with `error`. */
void fault_arm(const char *place, long n, long count, int error)
{
    strncpy(folder, place, sizeof folder - 1);
    first = n, failures = count, reason = error;
    atomic_store(&asked, 0);
}

long fault_count(void) { return atomic_load(&asked); }

static int refused(const char *path)
{
    if (first < 0 || !path || strncmp(path, folder, strlen(folder)))
        return 0;
    long n = atomic_fetch_add(&asked, 1);
    if (n < first || n - first >= failures)
        return 0;
    errno = reason;
    return 1;
}

static int refused_file(int file)
{
    char link[64], path[PATH_MAX];
    if (first < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return refused(path);
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *data, size_t size)
{ NEXT(write); return refused_file(file) ? -1 : next(file, data, size); }

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place)
{ NEXT(pwrite64); return refused_file(file) ? -1 : next(file, data, size, place); }

ssize_t writev(int file, const struct iovec *parts, int count)
{ NEXT(writev); return refused_file(file) ? -1 : next(file, parts, count); }

ssize_t sendfile64(int out, int in, off64_t *place, size_t size)
{ NEXT(sendfile64); return refused_file(out) ? -1 : next(out, in, place, size); }

int fsync(int file)
{ NEXT(fsync); return refused_file(file) ? -1 : next(file); }

int ftruncate64(int file, off64_t size)
{ NEXT(ftruncate64); return refused_file(file) ? -1 : next(file, size); }

int mkdir(const char *path, mode_t mode)
{ NEXT(mkdir); return refused(path) ? -1 : next(path, mode); }

int rename(const char *from, const char *to)
{ NEXT(rename); return refused(to) ? -1 : next(from, to); }

int link(const char *from, const char *to)
{ NEXT(link); return refused(to) ? -1 : next(from, to); }

int linkat(int a, const char *from, int b, const char *to, int flags)
{ NEXT(linkat); return refused(to) ? -1 : next(a, from, b, to, flags); }

int open64(const char *path, int flags, ...)
{
    NEXT(open64);
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    struct stat state;
    if ((flags & O_CREAT) && stat(path, &state) && refused(path))
        return -1;
    return next(path, flags, mode);
}

int open(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return open64(path, flags, mode);
}
