// Stands for libcufile.so.0 where there is no GPU: the memory of tests/native/stub_cuda.c is read and written
// by pread and pwrite on the descriptor that was registered, which has O_DIRECT.
//
// STUB_CUFILE_HANG set: the driver never opens, as the real one where there is none.
// STUB_CUFILE_PATH=nvfs, p2p or posix: what the statistics say of how the bytes went.
// STUB_CUFILE_FLIP set: a byte of what is read comes back changed. STUB_CUFILE_SHORT: bytes of one call, at
// most. STUB_CUFILE_REFUSE: the status with which no file can be registered. STUB_CUFILE_CRASH set: a crash
// instead.
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

typedef struct {
  int error;
  int cuda_error;
} Status;

typedef struct {
  int type;
  union {
    int fd;
    void* handle;
  } handle;
  const void* operations;
} Description;

static const Status kDone = {0, 0};

static long limit_bytes;   // of one call; 0: all that is asked for
static long failing_call;  // counted from 1; 0: none; -n: the first n
static long failure;       // errno, or a negative cuFile status
static long pause_us;      // before each call
static long calls;
static long running, running_max;
static long registered_bytes, registered_count, files_open;
static long read_count, write_count;

// ---- for the tests ----

void stub_limit_bytes(long value) { limit_bytes = value; }
void stub_fail(long at_call, long how) {
  __atomic_store_n(&calls, 0, __ATOMIC_SEQ_CST);
  failure = how;
  failing_call = at_call;
}
void stub_pause_us(long value) { pause_us = value; }
long stub_running_max(void) { return running_max; }
long stub_registered_count(void) { return registered_count; }
long stub_registered_bytes(void) { return registered_bytes; }
long stub_files_open(void) { return files_open; }

// ---- the library ----

static Status open_driver(void) {
  while (getenv("STUB_CUFILE_HANG") != NULL) pause();
  return kDone;
}
Status cuFileDriverOpen(void) { return open_driver(); }
Status cuFileDriverClose_v2(void) { return kDone; }
Status cuFileDriverClose(void) { return kDone; }
Status cuFileGetVersion(int* version) {
  *version = 1200;
  return kDone;
}
Status cuFileDriverGetProperties(void* properties) {
  memset(properties, 0, 64);
  return kDone;
}
Status cuFileDriverSetPollMode(_Bool poll, size_t bytes) {
  (void)poll, (void)bytes;
  return kDone;
}
Status cuFileDriverSetMaxCacheSize(size_t bytes) {
  (void)bytes;
  return kDone;
}
Status cuFileDriverSetMaxPinnedMemSize(size_t bytes) {
  (void)bytes;
  return kDone;
}

Status cuFileHandleRegister(void** handle, const Description* description) {
  open_driver();
  if (getenv("STUB_CUFILE_CRASH") != NULL) raise(SIGSEGV);
  const char* refused = getenv("STUB_CUFILE_REFUSE");
  if (refused != NULL) return (Status){atoi(refused), 0};
  *handle = (void*)(intptr_t)(description->handle.fd + 1);
  __atomic_add_fetch(&files_open, 1, __ATOMIC_SEQ_CST);
  return kDone;
}
void cuFileHandleDeregister(void* handle) {
  (void)handle;
  __atomic_sub_fetch(&files_open, 1, __ATOMIC_SEQ_CST);
}
Status cuFileBufRegister(const void* memory, size_t bytes, int flags) {
  (void)memory, (void)flags;
  __atomic_add_fetch(&registered_bytes, (long)bytes, __ATOMIC_SEQ_CST);
  __atomic_add_fetch(&registered_count, 1, __ATOMIC_SEQ_CST);
  return kDone;
}
Status cuFileBufDeregister(const void* memory) {
  (void)memory;
  __atomic_sub_fetch(&registered_count, 1, __ATOMIC_SEQ_CST);
  return kDone;
}

static ssize_t move(int write, void* handle, char* memory, size_t bytes, off_t file_offset,
                    off_t memory_offset) {
  const int fd = (int)(intptr_t)handle - 1;
  const long call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  const long now = __atomic_add_fetch(&running, 1, __ATOMIC_SEQ_CST);
  if (now > running_max) running_max = now;
  if (pause_us > 0) usleep((useconds_t)pause_us);
  __atomic_sub_fetch(&running, 1, __ATOMIC_SEQ_CST);
  if (call == failing_call || call <= -failing_call) {
    if (failure < 0) return failure;
    errno = (int)failure;
    return -1;
  }
  const char* limit = getenv("STUB_CUFILE_SHORT");
  if (limit != NULL) limit_bytes = atol(limit);
  if (limit_bytes > 0 && bytes > (size_t)limit_bytes) bytes = (size_t)limit_bytes;
  memory += memory_offset;
  __atomic_add_fetch(write ? &write_count : &read_count, 1, __ATOMIC_SEQ_CST);
  // In whole blocks, as O_DIRECT wants them: a last part that is none is moved, and its rest not told of.
  const size_t blocks = (bytes + 4095) / 4096 * 4096;
  const ssize_t moved =
      write ? pwrite(fd, memory, blocks, file_offset) : pread(fd, memory, blocks, file_offset);
  if (!write && moved > 0 && getenv("STUB_CUFILE_FLIP") != NULL) memory[moved / 2] ^= 1;
  return moved > (ssize_t)bytes ? (ssize_t)bytes : moved;
}
ssize_t cuFileRead(void* handle, void* memory, size_t bytes, off_t file_offset, off_t memory_offset) {
  return move(0, handle, memory, bytes, file_offset, memory_offset);
}
ssize_t cuFileWrite(void* handle, const void* memory, size_t bytes, off_t file_offset, off_t memory_offset) {
  return move(1, handle, (char*)memory, bytes, file_offset, memory_offset);
}

// ---- statistics, as cuda.bindings.cufile reads them (CUfileStatsLevel3_t) ----

enum { kStatsBytes = 5112, kFirstGpu = 1144, kUuidBytes = 16 };
enum {
  kTotalReads = 4,
  kP2pReads,
  kNvfsReads,
  kPosixReads,
  kTotalWrites = 17,
  kP2pWrites,
  kNvfsWrites,
  kPosixWrites
};

Status cuFileSetStatsLevel(int level) {
  (void)level;
  return kDone;
}
Status cuFileGetStatsLevel(int* level) {
  *level = 3;
  return kDone;
}
Status cuFileStatsStart(void) { return kDone; }
Status cuFileStatsStop(void) { return kDone; }
Status cuFileStatsReset(void) { return kDone; }
Status cuFileGetStatsL3(void* stats) {
  const char* path = getenv("STUB_CUFILE_PATH");
  uint64_t* gpu = (uint64_t*)((char*)stats + kFirstGpu + kUuidBytes);
  memset(stats, 0, kStatsBytes);
  const int way = path == NULL || strcmp(path, "posix") == 0 ? 2 : strcmp(path, "nvfs") == 0 ? 1 : 0;
  gpu[kTotalReads] = gpu[kP2pReads + way] = (uint64_t)read_count;
  gpu[kTotalWrites] = gpu[kP2pWrites + way] = (uint64_t)write_count;
  return kDone;
}

// Looked up, never called.
#define UNUSED(name)       \
  Status name(void) {      \
    Status no = {5000, 0}; \
    return no;             \
  }
UNUSED(cuFileBatchIOSetUp)
UNUSED(cuFileBatchIOSubmit)
UNUSED(cuFileBatchIOGetStatus)
UNUSED(cuFileBatchIOCancel)
void cuFileBatchIODestroy(void* batch) { (void)batch; }
UNUSED(cuFileReadAsync)
UNUSED(cuFileWriteAsync)
UNUSED(cuFileStreamRegister)
UNUSED(cuFileStreamDeregister)
