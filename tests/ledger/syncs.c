/* Before libc: counts fsync and fdatasync, and fails at them while the file SYNC_FAILS exists; with MAPS_FAIL no file
 * can be mapped to be written. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
static volatile int count;
int syncs(void) { return count; }
static int sync_by(const char *name, int fd) {
    if (access(getenv("SYNC_FAILS"), F_OK) == 0) { errno = EIO; return -1; }
    __sync_fetch_and_add(&count, 1);
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return sync_by("fsync", fd); }
int fdatasync(int fd) { return sync_by("fdatasync", fd); }
void *mmap64(void *at, size_t size, int access, int flags, int fd, off64_t offset) {
    if (getenv("MAPS_FAIL") && (flags & MAP_SHARED) && (access & PROT_WRITE) && fd >= 0) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return ((void *(*)(void *, size_t, int, int, int, off64_t))dlsym(RTLD_NEXT, "mmap64"))(
        at, size, access, flags, fd, offset);
}
void *mmap(void *at, size_t size, int access, int flags, int fd, off_t offset) {
    return mmap64(at, size, access, flags, fd, offset);
}
