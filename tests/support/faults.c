/* Makes calls of one process on chosen files fail, as a failing or a full disk would: preloaded by
 * tests/support/faulty.rs, which says how it is told what is to fail. The file that
 * TIDELOG_FAULTS names holds lines of `CALL ERRNO PART`: every CALL (write, sync, create or read)
 * on a path that contains PART fails with the number ERRNO and does nothing; where that is below 0,
 * the call is done after so many milliseconds. It is read again at every call. Reads through
 * io_uring are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Whether a call on a path is to fail; errno is then set. */
static int fails(const char *call, const char *path) {
    const char *rules = getenv("TIDELOG_FAULTS");
    char text[4096], named[16], part[256];
    int number, used, saved = errno;
    if (!rules) return 0;
    long fd = syscall(SYS_openat, AT_FDCWD, rules, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno = saved, 0;
    long length = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    text[length > 0 ? length : 0] = 0;
    for (char *line = text; sscanf(line, "%15s %d %255s%n", named, &number, part, &used) == 3;
         line += used)
        if (!strcmp(named, call) && strstr(path, part)) {
            if (number > 0) return errno = number, 1;
            usleep(-number * 1000);
        }
    return errno = saved, 0;
}

/* The same for an open file. */
static int fails_fd(const char *call, int fd) {
    char link[64], path[4096];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length <= 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARDED(call, type, name, parameters, ...)                                                \
    type name parameters { return fails_fd(call, fd) ? -1 : NEXT(name)(fd, ##__VA_ARGS__); }

GUARDED("write", ssize_t, write, (int fd, const void *from, size_t bytes), from, bytes)
GUARDED("write", ssize_t, pwrite, (int fd, const void *from, size_t bytes, off_t at), from, bytes, at)
GUARDED("write", ssize_t, pwrite64, (int fd, const void *from, size_t bytes, off64_t at), from, bytes, at)
GUARDED("write", ssize_t, pwritev, (int fd, const struct iovec *from, int count, off_t at), from, count, at)
GUARDED("write", ssize_t, pwritev64, (int fd, const struct iovec *from, int count, off64_t at), from, count, at)
GUARDED("write", int, ftruncate, (int fd, off_t bytes), bytes)
GUARDED("write", int, ftruncate64, (int fd, off64_t bytes), bytes)
GUARDED("read", ssize_t, pread, (int fd, void *to, size_t bytes, off_t at), to, bytes, at)
GUARDED("read", ssize_t, pread64, (int fd, void *to, size_t bytes, off64_t at), to, bytes, at)
GUARDED("sync", int, fsync, (int fd))
GUARDED("sync", int, fdatasync, (int fd))

#define OPEN(name)                                                                                \
    int name(const char *path, int flags, ...) {                                                  \
        mode_t mode = 0;                                                                          \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                      \
            va_list more;                                                                         \
            va_start(more, flags);                                                                \
            mode = va_arg(more, mode_t);                                                          \
            va_end(more);                                                                         \
        }                                                                                         \
        if ((flags & O_CREAT) && access(path, F_OK) != 0 && fails("create", path)) return -1;     \
        return NEXT(name)(path, flags, mode);                                                     \
    }

OPEN(open)
OPEN(open64)
