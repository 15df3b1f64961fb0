// LD_PRELOAD: writes down what a process does to the files below a directory, in order and with the data, for
// test_power_loss.py to play back in part. Knows nothing of what the files are for.
//
// RECORD_IO_ROOT is the directory, RECORD_IO_LOG the log. One lock is held across each call and its record,
// so that the log has the order in which the calls took effect. Calls that fail, or change nothing, are left
// out.
//
// A record: u32 operation, u32 path bytes, u64 inode, i64 offset, u64 data bytes, then path and data.
// Integers are the machine's own.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
  kCreate = 1,         // path, inode of the new file
  kWrite = 2,          // inode, offset, data
  kTruncate = 3,       // inode, offset: the new size
  kAllocate = 4,       // inode, offset: the new size, larger than before
  kSync = 5,           // inode (of a directory too), offset: 1 for fdatasync
  kRename = 6,         // path, data: the new path
  kUnlink = 7,         // path
  kMakeDirectory = 8,  // path, inode
  kMark = 9,           // data: the process's own words
};

struct Header {
  uint32_t operation;
  uint32_t path_bytes;
  uint64_t inode;
  int64_t offset;
  uint64_t data_bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_bytes;
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))real(#name))

static void* real(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (found == NULL) {
    fprintf(stderr, "record_io: no %s\n", name);
    abort();
  }
  return found;
}

static void fail(const char* what) {
  fprintf(stderr, "record_io: %s: %s\n", what, strerror(errno));
  abort();
}

__attribute__((constructor)) static void start(void) {
  const char* directory = getenv("RECORD_IO_ROOT");
  const char* path = getenv("RECORD_IO_LOG");
  if (directory == NULL || path == NULL) return;
  if (realpath(directory, root) == NULL) fail(directory);
  root_bytes = strlen(root);
  log_fd = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (log_fd < 0) fail(path);
}

static int below_root(const char* path) {
  return log_fd >= 0 && strncmp(path, root, root_bytes) == 0 &&
         (path[root_bytes] == '/' || path[root_bytes] == 0);
}

// Whether the descriptor is of something that has, or had, a name below the root.
static int is_ours(int fd, struct stat* info) {
  if (log_fd < 0) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const int error = errno;
  const ssize_t bytes = readlink(link, path, sizeof(path) - 1);
  const int ours = bytes > 0 && (path[bytes] = 0, below_root(path)) && fstat(fd, info) == 0 &&
                   (S_ISREG(info->st_mode) || S_ISDIR(info->st_mode)) && info->st_nlink > 0;
  errno = error;
  return ours;
}

// Absolute and without links in the directory part; 0 if it is not below the root.
static int resolve(int directory_fd, const char* path, char* out) {
  if (log_fd < 0 || path == NULL) return 0;
  const int error = errno;
  char whole[PATH_MAX], parent[PATH_MAX], link[64];
  if (path[0] == '/') {
    snprintf(whole, sizeof(whole), "%s", path);
  } else if (directory_fd == AT_FDCWD) {
    if (getcwd(parent, sizeof(parent)) == NULL) fail("getcwd");
    if (snprintf(whole, sizeof(whole), "%s/%s", parent, path) >= PATH_MAX) return 0;
  } else {
    snprintf(link, sizeof(link), "/proc/self/fd/%d", directory_fd);
    const ssize_t bytes = readlink(link, parent, sizeof(parent) - 1);
    if (bytes <= 0) return 0;
    parent[bytes] = 0;
    if (snprintf(whole, sizeof(whole), "%s/%s", parent, path) >= PATH_MAX) return 0;
  }
  int ours = 0;
  char* name = strrchr(whole, '/');
  if (name != NULL && name != whole) {
    *name++ = 0;
    ours = realpath(whole, parent) != NULL && snprintf(out, PATH_MAX, "%s/%s", parent, name) < PATH_MAX &&
           below_root(out);
  }
  errno = error;
  return ours;
}

static void put(const void* bytes, size_t count) {
  const char* at = bytes;
  while (count > 0) {
    const ssize_t written = REAL(write)(log_fd, at, count);
    if (written < 0) fail("writing the log");
    at += written;
    count -= (size_t)written;
  }
}

static void record(uint32_t operation, const char* path, uint64_t inode, int64_t offset,
                   const struct iovec* data, int data_count, size_t data_bytes) {
  const int error = errno;
  const struct Header header = {operation, (uint32_t)strlen(path), inode, offset, data_bytes};
  put(&header, sizeof(header));
  put(path, header.path_bytes);
  for (int i = 0; i < data_count && data_bytes > 0; i++) {
    const size_t bytes = data[i].iov_len < data_bytes ? data[i].iov_len : data_bytes;
    put(data[i].iov_base, bytes);
    data_bytes -= bytes;
  }
  errno = error;
}

// For the process itself, by ctypes.
void record_io_mark(const char* text, size_t bytes) {
  const struct iovec data = {(void*)text, bytes};
  pthread_mutex_lock(&lock);
  record(kMark, "", 0, 0, &data, 1, bytes);
  pthread_mutex_unlock(&lock);
}

// ---- data ----

static ssize_t written(int fd, const struct iovec* data, int count, int64_t offset, ssize_t result,
                       const struct stat* info) {
  if (result > 0) {
    const int64_t at = offset >= 0 ? offset : lseek(fd, 0, SEEK_CUR) - result;
    record(kWrite, "", info->st_ino, at, data, count, (size_t)result);
  }
  return result;
}

#define WRITES(call, data, count, offset)                               \
  struct stat info;                                                     \
  if (!is_ours(fd, &info)) return call;                                 \
  pthread_mutex_lock(&lock);                                            \
  const ssize_t result = written(fd, data, count, offset, call, &info); \
  pthread_mutex_unlock(&lock);                                          \
  return result

ssize_t write(int fd, const void* bytes, size_t count) {
  const struct iovec data = {(void*)bytes, count};
  WRITES(REAL(write)(fd, bytes, count), &data, 1, -1);
}

ssize_t pwrite(int fd, const void* bytes, size_t count, off_t offset) {
  const struct iovec data = {(void*)bytes, count};
  WRITES(REAL(pwrite)(fd, bytes, count, offset), &data, 1, offset);
}

ssize_t pwrite64(int fd, const void* bytes, size_t count, off64_t offset) {
  const struct iovec data = {(void*)bytes, count};
  WRITES(REAL(pwrite64)(fd, bytes, count, offset), &data, 1, offset);
}

ssize_t writev(int fd, const struct iovec* data, int count) {
  WRITES(REAL(writev)(fd, data, count), data, count, -1);
}

ssize_t pwritev(int fd, const struct iovec* data, int count, off_t offset) {
  WRITES(REAL(pwritev)(fd, data, count, offset), data, count, offset);
}

ssize_t pwritev64(int fd, const struct iovec* data, int count, off64_t offset) {
  WRITES(REAL(pwritev64)(fd, data, count, offset), data, count, offset);
}

ssize_t pwritev2(int fd, const struct iovec* data, int count, off_t offset, int flags) {
  WRITES(REAL(pwritev2)(fd, data, count, offset, flags), data, count, offset);
}

// ---- sizes and syncs ----

static int noted(int result, uint32_t operation, const struct stat* info, int64_t offset) {
  if (result == 0) record(operation, "", info->st_ino, offset, NULL, 0, 0);
  return result;
}

#define CHANGES(call, operation, offset)                    \
  struct stat info;                                         \
  if (!is_ours(fd, &info)) return call;                     \
  pthread_mutex_lock(&lock);                                \
  const int result = noted(call, operation, &info, offset); \
  pthread_mutex_unlock(&lock);                              \
  return result

int ftruncate(int fd, off_t size) { CHANGES(REAL(ftruncate)(fd, size), kTruncate, size); }
int ftruncate64(int fd, off64_t size) { CHANGES(REAL(ftruncate64)(fd, size), kTruncate, size); }
int fsync(int fd) { CHANGES(REAL(fsync)(fd), kSync, 0); }
int fdatasync(int fd) { CHANGES(REAL(fdatasync)(fd), kSync, 1); }

static int allocated(int mode, int64_t offset, int64_t bytes, int result, const struct stat* before) {
  if (result != 0) return result;
  if (mode != 0) fail("fallocate with a mode");
  if (offset + bytes > before->st_size) record(kAllocate, "", before->st_ino, offset + bytes, NULL, 0, 0);
  return result;
}

#define ALLOCATES(call, mode)                                     \
  struct stat info;                                               \
  if (!is_ours(fd, &info)) return call;                           \
  pthread_mutex_lock(&lock);                                      \
  if (fstat(fd, &info) != 0) fail("fstat");                       \
  const int result = allocated(mode, offset, bytes, call, &info); \
  pthread_mutex_unlock(&lock);                                    \
  return result

int fallocate(int fd, int mode, off_t offset, off_t bytes) {
  ALLOCATES(REAL(fallocate)(fd, mode, offset, bytes), mode);
}
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes) {
  ALLOCATES(REAL(fallocate64)(fd, mode, offset, bytes), mode);
}
int posix_fallocate(int fd, off_t offset, off_t bytes) {
  ALLOCATES(REAL(posix_fallocate)(fd, offset, bytes), 0);
}
int posix_fallocate64(int fd, off64_t offset, off64_t bytes) {
  ALLOCATES(REAL(posix_fallocate64)(fd, offset, bytes), 0);
}

// ---- names ----

static int is_there(const char* path) {
  struct stat info;
  return lstat(path, &info) == 0;
}

static int opened(int directory_fd, const char* path, int flags, mode_t mode) {
  char whole[PATH_MAX];
  const int nameless = (flags & O_TMPFILE) == O_TMPFILE;
  if (nameless || !resolve(directory_fd, path, whole)) return REAL(openat)(directory_fd, path, flags, mode);
  pthread_mutex_lock(&lock);
  const int was_there = is_there(whole);
  const int fd = REAL(openat)(directory_fd, path, flags, mode);
  struct stat info;
  if (fd >= 0 && (flags & O_CREAT) != 0 && !was_there && fstat(fd, &info) == 0) {
    record(kCreate, whole, info.st_ino, 0, NULL, 0, 0);
  } else if (fd >= 0 && (flags & O_TRUNC) != 0 && fstat(fd, &info) == 0) {
    record(kTruncate, "", info.st_ino, 0, NULL, 0, 0);
  }
  pthread_mutex_unlock(&lock);
  return fd;
}

#define MODE(flags)                                            \
  mode_t mode = 0;                                             \
  if (((flags)&O_CREAT) || ((flags)&O_TMPFILE) == O_TMPFILE) { \
    va_list more;                                              \
    va_start(more, flags);                                     \
    mode = va_arg(more, mode_t);                               \
    va_end(more);                                              \
  }

int open(const char* path, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int directory_fd, const char* path, int flags, ...) {
  MODE(flags)
  return opened(directory_fd, path, flags, mode);
}
int openat64(int directory_fd, const char* path, int flags, ...) {
  MODE(flags)
  return opened(directory_fd, path, flags | O_LARGEFILE, mode);
}
int __open_2(const char* path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char* path, int flags) { return opened(AT_FDCWD, path, flags | O_LARGEFILE, 0); }
int creat(const char* path, mode_t mode) {
  return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

static int unlinked(int directory_fd, const char* path, int flags, int (*call)(int, const char*, int)) {
  char whole[PATH_MAX];
  if (!resolve(directory_fd, path, whole)) return call(directory_fd, path, flags);
  pthread_mutex_lock(&lock);
  const int result = call(directory_fd, path, flags);
  if (result == 0) record(kUnlink, whole, 0, 0, NULL, 0, 0);
  pthread_mutex_unlock(&lock);
  return result;
}

int unlink(const char* path) { return unlinked(AT_FDCWD, path, 0, REAL(unlinkat)); }
int unlinkat(int directory_fd, const char* path, int flags) {
  return unlinked(directory_fd, path, flags, REAL(unlinkat));
}
int remove(const char* path) {
  struct stat info;
  const int is_directory = lstat(path, &info) == 0 && S_ISDIR(info.st_mode);
  return unlinked(AT_FDCWD, path, is_directory ? AT_REMOVEDIR : 0, REAL(unlinkat));
}

static int renamed(int from_fd, const char* from, int to_fd, const char* to) {
  char old_path[PATH_MAX], new_path[PATH_MAX];
  const int from_ours = resolve(from_fd, from, old_path), to_ours = resolve(to_fd, to, new_path);
  if (!from_ours && !to_ours) return REAL(renameat)(from_fd, from, to_fd, to);
  if (!from_ours || !to_ours) fail("rename across the root");
  pthread_mutex_lock(&lock);
  const int result = REAL(renameat)(from_fd, from, to_fd, to);
  const struct iovec data = {new_path, strlen(new_path)};
  if (result == 0) record(kRename, old_path, 0, 0, &data, 1, data.iov_len);
  pthread_mutex_unlock(&lock);
  return result;
}

int rename(const char* from, const char* to) { return renamed(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int from_fd, const char* from, int to_fd, const char* to) {
  return renamed(from_fd, from, to_fd, to);
}

static int made_directory(int directory_fd, const char* path, mode_t mode) {
  char whole[PATH_MAX];
  if (!resolve(directory_fd, path, whole)) return REAL(mkdirat)(directory_fd, path, mode);
  pthread_mutex_lock(&lock);
  const int result = REAL(mkdirat)(directory_fd, path, mode);
  struct stat info;
  if (result == 0 && lstat(whole, &info) == 0) record(kMakeDirectory, whole, info.st_ino, 0, NULL, 0, 0);
  pthread_mutex_unlock(&lock);
  return result;
}

int mkdir(const char* path, mode_t mode) { return made_directory(AT_FDCWD, path, mode); }
int mkdirat(int directory_fd, const char* path, mode_t mode) {
  return made_directory(directory_fd, path, mode);
}
