/* A disk that fails: loaded with LD_PRELOAD, write(2) and its kin fail below the folder FAILING_DISK, with the error number
   FAILING_DISK_ERRNO, as soon as the file FAILING_DISK_WHEN exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(int descriptor) {
  const char *folder = getenv("FAILING_DISK"), *when = getenv("FAILING_DISK_WHEN"), *number = getenv("FAILING_DISK_ERRNO");
  char link[64], path[4096];
  if (!folder || !when || !number || access(when, F_OK)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder))) return 0;
  errno = atoi(number);
  return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *bytes, size_t count) {
  return fails(descriptor) ? -1 : NEXT(write)(descriptor, bytes, count);
}
ssize_t pwrite64(int descriptor, const void *bytes, size_t count, off64_t offset) {
  return fails(descriptor) ? -1 : NEXT(pwrite64)(descriptor, bytes, count, offset);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  return fails(descriptor) ? -1 : NEXT(writev)(descriptor, parts, count);
}
int fsync(int descriptor) { return fails(descriptor) ? -1 : NEXT(fsync)(descriptor); }
