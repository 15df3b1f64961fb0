// Both I/O engines, direct and buffered, against the same tests; then the opening of scratch files. Plain
// program: prints what it did, exits non-zero on the first failure. argv[1]: a directory on a drive; tmpfs is
// tested in /dev/shm besides.
//
// In one line, from the repository's root:
//
//   g++ -std=c++17 -O1 -g -Wall -Wextra -Werror -DCSD_HAVE_LIBURING -Icsrc
//   tests/native/test_io.cpp csrc/io/*.cpp csrc/base/error.cpp csrc/base/own_descriptors.cpp -luring -ldl
//   -pthread -o test_io
//
// Without liburing: the same without -DCSD_HAVE_LIBURING, -luring and -ldl. liburing is linked dynamically
// here so that this file's io_uring_submit comes before the library's: faults are injected there and in
// preadv and pwritev below, and the product needs no hook.

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef CSD_HAVE_LIBURING
#include <liburing.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/types.h"
#include "io/io.h"
#include "io/transfer.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

using namespace csd;

// ---- faults
// ----------------------------------------------------------------------------------------------------

enum class Fault { kNone, kMixed, kAlwaysEagain, kLost };
static std::atomic<Fault> fault{Fault::kNone};
static std::atomic<uint64_t> fault_calls{0};
static std::atomic<uint64_t> faults_injected{0};

constexpr int kLostRequest = -2;
constexpr uint64_t kLostRequests = 3;

// What the next call suffers: 0 nothing, -1 a short transfer, kLostRequest no answer ever, else an errno
// value.
static int next_fault() {
  const uint64_t call = fault_calls++;
  switch (fault.load()) {
    case Fault::kNone:
      return 0;
    case Fault::kAlwaysEagain:
      faults_injected++;
      return EAGAIN;
    case Fault::kLost:
      if (faults_injected == kLostRequests) return 0;
      faults_injected++;
      return kLostRequest;
    case Fault::kMixed:
      break;
  }
  const int cycle[] = {-1, 0, EINTR, -1, EAGAIN, 0, -1};
  const int chosen = cycle[call % (sizeof(cycle) / sizeof(cycle[0]))];
  if (chosen != 0) faults_injected++;
  return chosen;
}

// Ends off every block boundary, as a transfer cut by a signal or a device's 512-byte sectors may.
static int64_t shortened(int64_t bytes) {
  return bytes >= 2 * kBlockBytes ? bytes / 2 / kBlockBytes * kBlockBytes + 512 : bytes;
}

// A direct transfer cannot really end off a block of this drive, so the whole is moved and less of it
// reported.
static ssize_t faulty_call(long number, int fd, const iovec* segments, int count, off_t offset) {
  const int injected = next_fault();
  if (injected > 0) {
    errno = injected;
    return -1;
  }
  const ssize_t result = syscall(number, fd, segments, static_cast<long>(count), offset, 0L);
  return injected < 0 && result > 0 ? static_cast<ssize_t>(shortened(result)) : result;
}

extern "C" ssize_t preadv(int fd, const iovec* segments, int count, off_t offset) {
  return faulty_call(SYS_preadv, fd, segments, count, offset);
}

extern "C" ssize_t pwritev(int fd, const iovec* segments, int count, off_t offset) {
  return faulty_call(SYS_pwritev, fd, segments, count, offset);
}

// What fdatasync and fsync fail with, once each; and what statx says of direct I/O, if anything else than the
// kernel.
static std::atomic<int> sync_error{0};
static std::atomic<int> sync_calls{0};
static std::atomic<uint32_t> told_alignment{0xffffffff};

static int faulty_sync(long number, int fd) {
  sync_calls++;
  const int injected = sync_error.exchange(0);
  if (injected == 0) return static_cast<int>(syscall(number, fd));
  errno = injected;
  return -1;
}

extern "C" int fdatasync(int fd) { return faulty_sync(SYS_fdatasync, fd); }
extern "C" int fsync(int fd) { return faulty_sync(SYS_fsync, fd); }

extern "C" int statx(int fd, const char* path, int flags, unsigned mask, struct statx* info) {
  const int result = static_cast<int>(syscall(SYS_statx, fd, path, flags, mask, info));
  if (result == 0 && told_alignment != 0xffffffff) {
    info->stx_mask |= 0x2000;
    const uint32_t aligns[2] = {512, told_alignment};
    std::memcpy(reinterpret_cast<char*>(info) + 0x98, aligns, sizeof(aligns));
  }
  return result;
}

static std::atomic<bool> refuse_rings{false};

// What time has passed that nobody waited for.
static std::atomic<int64_t> clock_ahead_s{0};

extern "C" int clock_gettime(clockid_t clock, timespec* now) {
  const int result = static_cast<int>(syscall(SYS_clock_gettime, clock, now));
  if (clock == CLOCK_MONOTONIC) now->tv_sec += clock_ahead_s;
  return result;
}

#ifdef CSD_HAVE_LIBURING
// A read from the first says EAGAIN, until something is sent to the second.
static const int* empty_sockets() {
  static int pair[2];
  static const bool made = socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0;
  CHECK(made);
  return pair;
}

// io_uring_enter fails with this error once so many calls were let through: what a seccomp filter does that
// is installed in the middle of a run. -1: never.
static std::atomic<int> enter_error{EPERM};
static std::atomic<int64_t> enters_left{-1};
static std::atomic<int64_t> enters_refused{0};

static bool refuses_enter() {
  if (enters_left < 0) return false;
  if (enters_left > 0) {
    enters_left--;
    return false;
  }
  enters_refused++;
  return true;
}

// The kernel answers a shorter READ_FIXED or WRITE_FIXED as it would a short transfer: in whole blocks here,
// as the drive wants them. EAGAIN comes from a request of another kind in the place of the real one, and so
// does a request that is lost: one that waits for what never comes.
extern "C" int io_uring_submit(io_uring* ring) {
  static const auto real = reinterpret_cast<int (*)(io_uring*)>(dlsym(RTLD_NEXT, "io_uring_submit"));
  static char received;
  if (refuses_enter()) return -enter_error;
  for (unsigned i = ring->sq.sqe_head; i != ring->sq.sqe_tail; i++) {
    io_uring_sqe* sqe = &ring->sq.sqes[i & *ring->sq.kring_mask];
    const int injected = sqe->opcode == IORING_OP_ASYNC_CANCEL ? 0 : next_fault();
    const bool fixed = sqe->opcode == IORING_OP_READ_FIXED || sqe->opcode == IORING_OP_WRITE_FIXED;
    if (injected > 0 || injected == kLostRequest) {
      const uint64_t user_data = sqe->user_data;
      io_uring_prep_recv(sqe, empty_sockets()[0], &received, 1, injected > 0 ? MSG_DONTWAIT : 0);
      sqe->user_data = user_data;
    } else if (injected < 0 && fixed && sqe->len >= 2 * kBlockBytes) {
      sqe->len = static_cast<unsigned>(sqe->len / 2 / kBlockBytes * kBlockBytes);
    }
  }
  return real(ring);
}

extern "C" int io_uring_wait_cqe_timeout(io_uring* ring, io_uring_cqe** cqe, __kernel_timespec* timeout) {
  static const auto real = reinterpret_cast<int (*)(io_uring*, io_uring_cqe**, __kernel_timespec*)>(
      dlsym(RTLD_NEXT, "io_uring_wait_cqe_timeout"));
  return refuses_enter() ? -enter_error : real(ring, cqe, timeout);
}

extern "C" int io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags) {
  static const auto real =
      reinterpret_cast<int (*)(unsigned, io_uring*, unsigned)>(dlsym(RTLD_NEXT, "io_uring_queue_init"));
  return refuse_rings ? -EPERM : real(entries, ring, flags);
}
#endif

// ---- helpers
// ---------------------------------------------------------------------------------------------------

class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(kBlockBytes, round_up(bytes, kBlockBytes)))),
        bytes_(bytes) {
    CHECK(data_ != nullptr);
    std::memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() { return data_; }
  iovec all() { return {data_, static_cast<size_t>(bytes_)}; }

 private:
  char* data_;
  int64_t bytes_;
};

// The byte that belongs at a file offset: position-dependent in every block.
static char expected_byte(int64_t offset) {
  return static_cast<char>((offset * 131 + offset / 4096 * 7) >> 2);
}

static void fill_expected(char* data, int64_t offset, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i++) data[i] = expected_byte(offset + i);
}

static bool is_expected(const char* data, int64_t offset, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i++) {
    if (data[i] != expected_byte(offset + i)) return false;
  }
  return true;
}

static int open_file(const std::string& directory, bool direct) {
  const int fd = open(directory.c_str(), O_TMPFILE | O_RDWR | (direct ? O_DIRECT : 0), 0600);
  CHECK(fd >= 0);
  return fd;
}

static IoRequest make_request(IoOp op, int64_t offset, const std::vector<iovec>& segments, uint64_t tag) {
  IoRequest request;
  request.op = op;
  request.file_offset = offset;
  request.segments = segments.data();
  request.segment_count = static_cast<int>(segments.size());
  request.tag = tag;
  return request;
}

// One request through the queue; its error.
static int carry_out(IoQueue* queue, IoOp op, int64_t offset, const std::vector<iovec>& segments) {
  std::vector<IoCompletion> done;
  queue->submit(make_request(op, offset, segments, 77));
  CHECK(queue->in_flight() == 1);
  queue->reap(true, &done);
  CHECK(done.size() == 1 && done[0].tag == 77 && queue->in_flight() == 0);
  return done[0].error;
}

static bool throws(ErrorKind kind, const std::string& text, const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    if (error.kind() == kind && std::strstr(error.what(), text.c_str()) != nullptr) return true;
    std::fprintf(stderr, "wanted \"%s\", got: %s\n", text.c_str(), error.what());
  }
  return false;
}

static int entry_count(const std::string& directory) {
  DIR* dir = opendir(directory.c_str());
  CHECK(dir != nullptr);
  int count = 0;
  while (readdir(dir) != nullptr) count++;
  closedir(dir);
  return count;
}

static std::string file_of(const std::string& directory, const std::string& name, const std::string& bytes) {
  const std::string path = directory + "/" + name;
  const int fd = open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
  CHECK(fd >= 0 && write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  close(fd);
  return path;
}

static std::string bytes_of(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY);
  CHECK(fd >= 0);
  std::string bytes(1 << 16, 0);
  bytes.resize(static_cast<size_t>(read(fd, bytes.data(), bytes.size())));
  close(fd);
  return bytes;
}

// ---- one request's bookkeeping
// ---------------------------------------------------------------------------------

static void test_transfer() {
  using Step = Transfer::Step;
  char memory[4 * 4096];
  std::vector<iovec> segments = {{memory, 4096}, {memory + 4096, 8192}};
  const IoRequest request = make_request(IoOp::kRead, 8192, segments, 5);
  Transfer transfer;

  // A short direct transfer is resumed at the last block boundary, into the right place of the right segment.
  transfer.start(request, 4096);
  CHECK(transfer.advance(4096 + 4096 + 512) == Step::kResume);
  CHECK(transfer.file_offset() == 8192 + 8192 && transfer.segment_count() == 1);
  CHECK(transfer.segments()->iov_base == memory + 8192 && transfer.segments()->iov_len == 4096);
  CHECK(transfer.advance(4096) == Step::kFinished && transfer.error() == 0);
  CHECK(segments[0].iov_len == 4096 &&
        segments[1].iov_base == memory + 4096);  // the caller's stay as they were

  // One that ends inside the first block moves nothing forward, and is not yet the end.
  transfer.start(request, 4096);
  CHECK(transfer.advance(512) == Step::kResume && transfer.file_offset() == 8192);
  CHECK(transfer.advance(1024) == Step::kResume && transfer.file_offset() == 8192);
  CHECK(transfer.advance(12288) == Step::kFinished && transfer.error() == 0);

  // The same bytes twice, or none: end of file.
  transfer.start(request, 4096);
  CHECK(transfer.advance(4096 + 900) == Step::kResume);
  CHECK(transfer.advance(900) == Step::kFinished && transfer.error() == EIO);
  transfer.start(request, 4096);
  CHECK(transfer.advance(0) == Step::kFinished && transfer.error() == EIO);

  // Buffered: resumed at the byte.
  transfer.start(request, 1);
  CHECK(transfer.advance(4097) == Step::kResume);
  CHECK(transfer.file_offset() == 8192 + 4097 && transfer.segments()->iov_base == memory + 4097);

  // Passing errors are retried, with naps after the first few, but not for ever; others are final.
  transfer.start(request, 4096);
  CHECK(transfer.advance(-EINTR) == Step::kRetry && !transfer.wants_nap());
  int retries = 0;
  while (transfer.advance(-EAGAIN) == Step::kRetry) retries++;
  CHECK(retries > 100 && retries < 10000 && transfer.wants_nap() && transfer.error() == EAGAIN);
  transfer.start(request, 4096);
  CHECK(transfer.error() == 0 && transfer.advance(-ENOSPC) == Step::kFinished && transfer.error() == ENOSPC);

  // What must come at least has come: whole. What has been moved counts, and what was given to another queue.
  IoRequest tail = request;
  tail.least_bytes = 8192 + 100;
  transfer.start(tail, 4096);
  CHECK(transfer.advance(8192 + 100) == Step::kFinished && transfer.error() == 0);
  transfer.start(tail, 4096);
  CHECK(transfer.advance(4096 + 512) == Step::kResume && transfer.file_offset() == 8192 + 4096);
  CHECK(transfer.rest().least_bytes == 4096 + 100 && transfer.rest().fd == -1);
  CHECK(transfer.advance(4096 + 100) == Step::kFinished && transfer.error() == 0);
  transfer.start(tail, 4096);
  CHECK(transfer.advance(8192 + 99) == Step::kResume);
  CHECK(transfer.advance(99) == Step::kFinished && transfer.error() == EIO);
  tail.fd = 7;
  tail.least_bytes = 1 << 20;  // more than there is to move
  transfer.start(tail, 4096);
  CHECK(transfer.rest().fd == 7 && transfer.rest().least_bytes == 12288);
  CHECK(transfer.advance(12288) == Step::kFinished && transfer.error() == 0);

  // Nothing to move is done at once.
  transfer.start(make_request(IoOp::kRead, 0, {}, 0), 4096);
  CHECK(transfer.segment_count() == 0 && transfer.advance(0) == Step::kFinished && transfer.error() == 0);
}

// ---- one engine in one mode
// ------------------------------------------------------------------------------------

struct Case {
  std::string engine;
  bool direct;
  std::string directory;
  bool registered;  // the buffers are named to make_queue
  int64_t grain() const { return direct ? kBlockBytes : 1; }
};

static std::vector<iovec> named(const Case& c, std::vector<iovec> buffers) {
  return c.registered ? buffers : std::vector<iovec>{};
}

static void test_random_writes_then_reads(const Case& c, int round_count) {
  constexpr int64_t kFileBytes = 16 << 20;
  constexpr int64_t kSlotBytes = 512 << 10;
  constexpr int kDepth = 8;
  const int fd = open_file(c.directory, c.direct);
  const auto engine = make_io_engine(c.engine, 4);
  CHECK(c.engine == engine->name());
  Buffer arena(kDepth * kSlotBytes);
  const auto queue = engine->make_queue(fd, kDepth, named(c, {arena.all()}));
  std::mt19937_64 random(1);

  // The whole file is written once, in pieces of random size and of one to five segments.
  std::vector<std::vector<iovec>> segments(kDepth);
  std::vector<int64_t> offsets(kDepth), sizes(kDepth);
  std::vector<int> free_slots;
  for (int slot = 0; slot < kDepth; slot++) free_slots.push_back(slot);
  std::vector<IoCompletion> done;
  const auto submit = [&](IoOp op, int64_t offset, int64_t bytes) {
    const int slot = free_slots.back();
    free_slots.pop_back();
    char* base = arena.data() + slot * kSlotBytes;
    if (op == IoOp::kWrite) {
      fill_expected(base, offset, bytes);
    } else {
      std::memset(base, 0x55, bytes);
    }
    offsets[slot] = offset;
    sizes[slot] = bytes;
    segments[slot].clear();
    const int64_t wanted_segments = 1 + static_cast<int64_t>(random() % 5);
    for (int64_t at = 0; at < bytes;) {
      const int64_t left_segments = wanted_segments - static_cast<int64_t>(segments[slot].size());
      const int64_t step = left_segments <= 1
                               ? bytes - at
                               : std::min(bytes - at, round_up(bytes / wanted_segments + 1, c.grain()));
      segments[slot].push_back({base + at, static_cast<size_t>(step)});
      at += step;
    }
    queue->submit(make_request(op, offset, segments[slot], slot));
  };
  const auto reap = [&](IoOp op, bool wait) {
    const size_t before = done.size();
    queue->reap(wait, &done);
    CHECK(!wait || done.size() > before);  // what is in *completions already does not count
    for (size_t i = before; i < done.size(); i++) {
      const int slot = static_cast<int>(done[i].tag);
      CHECK(done[i].error == 0);
      if (op == IoOp::kRead) CHECK(is_expected(arena.data() + slot * kSlotBytes, offsets[slot], sizes[slot]));
      free_slots.push_back(slot);
    }
  };
  const auto random_bytes = [&] {
    const int64_t bytes = 1 + static_cast<int64_t>(random() % kSlotBytes);
    return std::min(round_up(bytes, c.grain()), kSlotBytes);
  };
  for (int64_t offset = 0; offset < kFileBytes;) {
    if (free_slots.empty()) reap(IoOp::kWrite, true);
    const int64_t bytes = std::min(random_bytes(), kFileBytes - offset);
    submit(IoOp::kWrite, offset, bytes);
    offset += bytes;
  }
  while (queue->in_flight() > 0) reap(IoOp::kWrite, true);
  for (int round = 0; round < round_count; round++) {
    if (free_slots.empty()) reap(IoOp::kRead, true);
    const int64_t bytes = random_bytes();
    submit(IoOp::kRead, static_cast<int64_t>(random() % (kFileBytes - bytes)) / c.grain() * c.grain(), bytes);
    reap(IoOp::kRead, false);
  }
  while (queue->in_flight() > 0) reap(IoOp::kRead, true);
  queue->reap(false, &done);
  CHECK(static_cast<int>(free_slots.size()) == kDepth);
  close(fd);
}

static void test_faults_are_resumed(const Case& c) {
  faults_injected = 0;
  fault = Fault::kMixed;
  test_random_writes_then_reads(c, 100);
  fault = Fault::kNone;
  CHECK(faults_injected > 20);
}

static void test_endless_eagain_ends(const Case& c) {
  const int fd = open_file(c.directory, c.direct);
  Buffer block(kBlockBytes);
  const auto engine = make_io_engine(c.engine, 1);
  const auto queue = engine->make_queue(fd, 1, {});
  const clock_t cpu_before = clock();
  fault = Fault::kAlwaysEagain;
  CHECK(carry_out(queue.get(), IoOp::kRead, 0, {block.all()}) == EAGAIN);
  fault = Fault::kNone;
  CHECK(static_cast<double>(clock() - cpu_before) / CLOCKS_PER_SEC <
        0.5);  // it naps: about one second of wall time
  close(fd);
}

// More segments than the kernel takes at once.
static void test_many_segments(const Case& c) {
  constexpr int64_t kSegments = 2500;
  const int fd = open_file(c.directory, c.direct);
  Buffer buffer(kSegments * kBlockBytes);
  const auto engine = make_io_engine(c.engine, 2);
  const auto queue = engine->make_queue(fd, 1, named(c, {buffer.all()}));
  std::vector<iovec> segments;
  for (int64_t i = 0; i < kSegments; i++) {
    segments.push_back({buffer.data() + i * kBlockBytes, static_cast<size_t>(kBlockBytes)});
  }
  fill_expected(buffer.data(), 0, kSegments * kBlockBytes);
  CHECK(carry_out(queue.get(), IoOp::kWrite, 0, segments) == 0);
  std::memset(buffer.data(), 0, kSegments * kBlockBytes);
  CHECK(carry_out(queue.get(), IoOp::kRead, 0, segments) == 0);
  CHECK(is_expected(buffer.data(), 0, kSegments * kBlockBytes));
  close(fd);
}

static void test_limits_and_errors(const Case& c) {
  constexpr int kDepth = 3;
  const int fd = open_file(c.directory, c.direct);
  Buffer buffer(4 * kBlockBytes);
  const auto engine = make_io_engine(c.engine, 2);
  const auto queue = engine->make_queue(fd, kDepth, named(c, {buffer.all()}));
  CHECK(queue->depth() == kDepth && queue->in_flight() == 0);
  std::vector<IoCompletion> done;
  queue->reap(false, &done);
  CHECK(done.empty());
  CHECK(throws(ErrorKind::kInternal, "nothing in flight", [&] { queue->reap(true, &done); }));

  // The file ends in the middle of its second block.
  CHECK(ftruncate(fd, kBlockBytes + 900) == 0);
  CHECK(carry_out(queue.get(), IoOp::kRead, 0, {{buffer.data(), kBlockBytes}}) == 0);
  CHECK(carry_out(queue.get(), IoOp::kRead, 0, {{buffer.data(), 2 * kBlockBytes}}) == EIO);
  CHECK(carry_out(queue.get(), IoOp::kRead, kBlockBytes, {{buffer.data(), kBlockBytes}}) == EIO);
  CHECK(carry_out(queue.get(), IoOp::kRead, 1 << 20, {{buffer.data(), kBlockBytes}}) == EIO);
  CHECK(carry_out(queue.get(), IoOp::kRead, 0, {}) == 0);
  const auto read_least = [&](int64_t offset, int64_t bytes, int64_t least) {
    const std::vector<iovec> segments = {{buffer.data(), static_cast<size_t>(bytes)}};
    IoRequest request = make_request(IoOp::kRead, offset, segments, 0);
    request.least_bytes = least;
    std::vector<IoCompletion> completions;
    queue->submit(request);
    queue->reap(true, &completions);
    return completions.at(0).error;
  };
  CHECK(read_least(0, 2 * kBlockBytes, kBlockBytes + 900) == 0 &&
        read_least(kBlockBytes, kBlockBytes, 900) == 0);
  CHECK(read_least(0, 4 * kBlockBytes, 1) == 0 && read_least(0, 2 * kBlockBytes, kBlockBytes + 901) == EIO);
  CHECK(read_least(0, 2 * kBlockBytes, 0) == EIO && read_least(1 << 20, kBlockBytes, 1) == EIO);

  const std::vector<iovec> segment = {{buffer.data(), static_cast<size_t>(kBlockBytes)}};
  for (int i = 0; i < kDepth; i++) queue->submit(make_request(IoOp::kRead, 0, segment, i));
  CHECK(queue->in_flight() == kDepth);
  CHECK(throws(ErrorKind::kInternal, "depth()",
               [&] { queue->submit(make_request(IoOp::kRead, 0, segment, 9)); }));
  while (queue->in_flight() > 0) queue->reap(true, &done);
  CHECK(done.size() == kDepth);
  uint64_t tag_sum = 0;
  for (const IoCompletion& completion : done) tag_sum += completion.tag;
  CHECK(tag_sum == 0 + 1 + 2);

  // The kernel's errors come through.
  const int write_only = open(c.directory.c_str(), O_TMPFILE | O_WRONLY, 0600);
  CHECK(write_only >= 0);
  CHECK(carry_out(engine->make_queue(write_only, 1, {}).get(), IoOp::kRead, 0, segment) == EBADF);
  close(write_only);
  close(fd);
}

// After the destructor nothing is written to the buffers any more.
static void test_destructor_waits(const Case& c) {
  constexpr int64_t kBytes = 1 << 20;
  constexpr int kDepth = 8;
  const int fd = open_file(c.directory, c.direct);
  Buffer buffer(kDepth * kBytes);
  const auto engine = make_io_engine(c.engine, 2);
  fill_expected(buffer.data(), 0, kDepth * kBytes);
  CHECK(carry_out(engine->make_queue(fd, 1, {}).get(), IoOp::kWrite, 0, {buffer.all()}) == 0);
  for (int round = 0; round < 10; round++) {
    std::vector<std::vector<iovec>> segments;
    for (int i = 0; i < kDepth; i++)
      segments.push_back({{buffer.data() + i * kBytes, static_cast<size_t>(kBytes)}});
    {
      const auto queue = engine->make_queue(fd, kDepth, named(c, {buffer.all()}));
      for (int i = 0; i < kDepth; i++) queue->submit(make_request(IoOp::kRead, i * kBytes, segments[i], i));
    }
    std::memset(buffer.data(), 0x33, kDepth * kBytes);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    for (int64_t i = 0; i < kDepth * kBytes; i++) CHECK(buffer.data()[i] == 0x33);
  }
  close(fd);
}

// One queue, with a file of its own or without, reads others: each as its own mode wants it, and to its end,
// which is inside a block.
static void test_requests_of_other_files(const Case& c, bool own_file, bool other_mode) {
  constexpr int64_t kFileBytes = (3 << 20) + 900;
  constexpr int64_t kBytes = 128 << 10;
  constexpr int kDepth = 5;
  const bool direct_here = c.directory != "/dev/shm";
  std::vector<int> fds;
  for (int i = 0; i < 3; i++) {
    const int fd = open_file(c.directory, false);
    std::string bytes(kFileBytes, 0);
    fill_expected(bytes.data(), i * kBlockBytes * 77, kFileBytes);
    CHECK(write(fd, bytes.data(), kFileBytes) == kFileBytes);
    const bool direct = direct_here && (other_mode ? i % 2 == 0 : c.direct);
    CHECK(fcntl(fd, F_SETFL, direct ? O_DIRECT : 0) == 0);
    fds.push_back(fd);
  }
  Buffer arena(kDepth * kBytes);
  const auto engine = make_io_engine(c.engine, 2);
  const auto queue = engine->make_queue(own_file ? fds[0] : -1, kDepth, named(c, {arena.all()}));
  struct Place {
    int file;
    int64_t offset;
    int64_t bytes;
    iovec segment;
  } places[kDepth];
  std::vector<int> free_slots = {0, 1, 2, 3, 4};
  const auto reap = [&] {
    std::vector<IoCompletion> done;
    queue->reap(true, &done);
    for (const IoCompletion& completion : done) {
      const Place& place = places[completion.tag];
      CHECK(completion.error == 0);
      CHECK(is_expected(arena.data() + static_cast<int64_t>(completion.tag) * kBytes,
                        place.file * kBlockBytes * 77 + place.offset, place.bytes));
      free_slots.push_back(static_cast<int>(completion.tag));
    }
  };
  for (int64_t offset = 0; offset < kFileBytes; offset += kBytes) {
    for (int file = 0; file < 3; file++) {
      if (free_slots.empty()) reap();
      const int slot = free_slots.back();
      free_slots.pop_back();
      char* base = arena.data() + slot * kBytes;
      std::memset(base, 0x55, kBytes);
      places[slot] = {
          file, offset, std::min(kBytes, kFileBytes - offset), {base, static_cast<size_t>(kBytes)}};
      IoRequest request;
      request.file_offset = offset;
      request.segments = &places[slot].segment;
      request.segment_count = 1;
      request.tag = static_cast<uint64_t>(slot);
      if (!own_file || file != 0) request.fd = fds[static_cast<size_t>(file)];
      request.least_bytes = places[slot].bytes;
      queue->submit(request);
    }
  }
  while (queue->in_flight() > 0) reap();
  for (const int fd : fds) close(fd);
}

static void test_other_files(const Case& c) {
  for (const bool own_file : {true, false}) {
    for (const bool other_mode : {true, false}) {
      test_requests_of_other_files(c, own_file, other_mode);
      fault = Fault::kMixed;
      test_requests_of_other_files(c, own_file, other_mode);
      fault = Fault::kNone;
    }
  }
}

// Linux 6.18 was seen to keep a write in its work queue with no thread to take it.
static void test_lost_requests_are_asked_for_again(const Case& c) {
  if (c.engine != "io_uring") return;
  fault = Fault::kLost;
  faults_injected = 0;
  test_random_writes_then_reads(c, 1);
  CHECK(faults_injected == kLostRequests);
  faults_injected = 0;
  test_destructor_waits(c);
  fault = Fault::kNone;
  CHECK(faults_injected == kLostRequests);
}

// ---- io_uring refused in the middle of a run
// -------------------------------------------------------------------

#ifdef CSD_HAVE_LIBURING
static void allow_enter() {
  enters_left = -1;
  enters_refused = 0;
  enter_error = EPERM;
}

// Whichever call is the first that the kernel refuses, a submission or a wait, of whole requests or the rest
// of one: nothing is lost, and nothing moves twice to another place.
static void test_refused_in_the_middle(const Case& c) {
  for (const Fault beside : {Fault::kNone, Fault::kMixed}) {
    for (const int64_t calls : {0, 1, 2, 5, 8, 20, 47}) {
      enter_error = calls % 2 == 0 ? EPERM : EBADF;
      for (const bool others : {false, true}) {
        enters_left = calls;
        fault = beside;
        if (others) {
          test_requests_of_other_files(c, calls % 3 == 0, true);
        } else {
          test_random_writes_then_reads(c, 20);
        }
        fault = Fault::kNone;
        CHECK(enters_refused > 0);
        allow_enter();
      }
    }
  }
}

// One queue is refused: the others of its engine, and those it makes later, ask io_uring for nothing more.
static void test_all_queues_go_over_to_pread(const Case& c) {
  constexpr int kDepth = 4;
  const int fd = open_file(c.directory, c.direct);
  Buffer buffer(2 * kDepth * kBlockBytes);
  const auto engine = make_io_engine(c.engine, 2);
  CHECK(std::string(engine->name()) == "io_uring" && engine->fallback_reason() == nullptr);
  fill_expected(buffer.data(), 0, 2 * kDepth * kBlockBytes);
  CHECK(carry_out(engine->make_queue(fd, 1, {}).get(), IoOp::kWrite, 0, {buffer.all()}) == 0);
  std::memset(buffer.data(), 0, 2 * kDepth * kBlockBytes);

  std::vector<iovec> blocks;
  for (int i = 0; i < 2 * kDepth; i++)
    blocks.push_back({buffer.data() + i * kBlockBytes, static_cast<size_t>(kBlockBytes)});
  const auto queue = engine->make_queue(fd, kDepth, named(c, {buffer.all()}));
  const auto other = engine->make_queue(fd, kDepth, named(c, {buffer.all()}));
  const auto submit = [&](IoQueue* to, int block) {
    IoRequest request;
    request.file_offset = block * kBlockBytes;
    request.segments = &blocks[static_cast<size_t>(block)];
    request.segment_count = 1;
    request.tag = static_cast<uint64_t>(block);
    to->submit(request);
  };
  const auto reap_all = [&](IoQueue* from, int count, int first) {
    std::vector<IoCompletion> done;
    while (from->in_flight() > 0) from->reap(true, &done);
    CHECK(static_cast<int>(done.size()) == count);
    uint64_t seen = 0;
    for (const IoCompletion& completion : done) {
      CHECK(completion.error == 0);
      seen |= uint64_t{1} << completion.tag;
    }
    CHECK(seen == ((uint64_t{1} << count) - 1) << first);
    CHECK(is_expected(buffer.data() + first * kBlockBytes, first * kBlockBytes, count * kBlockBytes));
    std::memset(buffer.data() + first * kBlockBytes, 0, static_cast<size_t>(count * kBlockBytes));
  };
  for (int i = 0; i < kDepth; i++) submit(other.get(), kDepth + i);  // the kernel has these
  submit(queue.get(), 0);
  enters_left = 0;
  for (int i = 1; i < kDepth; i++) submit(queue.get(), i);  // and none of these
  CHECK(queue->in_flight() == kDepth);
  CHECK(throws(ErrorKind::kInternal, "depth()", [&] { submit(queue.get(), 0); }));
  reap_all(queue.get(), kDepth, 0);
  CHECK(std::string(engine->name()) == "pread");
  CHECK(std::strstr(engine->fallback_reason(), "io_uring_enter") != nullptr);
  CHECK(std::strstr(engine->fallback_reason(), "Operation not permitted") != nullptr);
  const int64_t refused = enters_refused;
  reap_all(other.get(), kDepth, kDepth);
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < kDepth; i++) submit(other.get(), kDepth + i);
    CHECK(throws(ErrorKind::kInternal, "depth()", [&] { submit(other.get(), 0); }));
    std::vector<IoCompletion> none;
    CHECK(other->in_flight() == kDepth && other->depth() == kDepth);
    reap_all(other.get(), kDepth, kDepth);
    CHECK(throws(ErrorKind::kInternal, "nothing in flight", [&] { other->reap(true, &none); }));
  }
  const auto later = engine->make_queue(fd, kDepth, named(c, {buffer.all()}));
  submit(later.get(), 2);
  reap_all(later.get(), 1, 2);
  CHECK(enters_refused == refused);
  allow_enter();
  close(fd);
}

// A queue that is destroyed while the kernel refuses to be asked still waits for what the kernel holds.
static void test_destructor_waits_although_refused(const Case& c) {
  const auto starts_refusing = [&](int64_t calls) {
    enters_left = calls;
    test_destructor_waits(c);
    CHECK(enters_refused > 0);
    allow_enter();
  };
  starts_refusing(1 + 8);  // the first write, then one queue's submissions: its destructor is refused
  starts_refusing(1 + 4);
}

static void test_endless_refusal_goes_over_to_pread(const Case& c) {
  const int fd = open_file(c.directory, c.direct);
  Buffer block(kBlockBytes);
  const auto engine = make_io_engine(c.engine, 1);
  const auto queue = engine->make_queue(fd, 1, {});
  enter_error = EAGAIN;
  enters_left = 0;
  CHECK(carry_out(queue.get(), IoOp::kWrite, 0, {block.all()}) == 0);
  CHECK(std::strstr(engine->fallback_reason(), "for one second") != nullptr);
  allow_enter();
  close(fd);
}

static void test_refused_rings_in_the_middle(const Case& c) {
  const int fd = open_file(c.directory, c.direct);
  Buffer block(kBlockBytes);
  const auto engine = make_io_engine(c.engine, 1);
  const auto queue = engine->make_queue(fd, 1, {});
  refuse_rings = true;
  CHECK(carry_out(engine->make_queue(fd, 1, {}).get(), IoOp::kWrite, 0, {block.all()}) == 0);
  refuse_rings = false;
  CHECK(std::strstr(engine->fallback_reason(), "io_uring_setup: Operation not permitted") != nullptr);
  CHECK(carry_out(queue.get(), IoOp::kRead, 0, {block.all()}) == 0);
  close(fd);
}

// A request that the kernel holds when it refuses to be asked: taken to its end when it comes back, and never
// reported, so that nobody uses its memory, when it does not.
static void test_requests_held_when_refused(const Case& c) {
  if (!c.direct) return;  // a byte from the socket is one too few there, not the whole block again
  const int fd = open_file(c.directory, c.direct);
  Buffer buffer(2 * kBlockBytes);
  const iovec whole = buffer.all();
  const iovec second{buffer.data() + kBlockBytes, static_cast<size_t>(kBlockBytes)};
  fill_expected(buffer.data(), 0, 2 * kBlockBytes);
  {
    const auto engine = make_io_engine(c.engine, 1);
    const auto queue = engine->make_queue(fd, 2, {});
    CHECK(carry_out(queue.get(), IoOp::kWrite, 0, {whole}) == 0);
    std::memset(buffer.data(), 0, 2 * kBlockBytes);
    fault = Fault::kLost;
    faults_injected = kLostRequests - 1;
    queue->submit(make_request(IoOp::kRead, 0, {whole}, 7));
    fault = Fault::kNone;
    enters_left = 0;
    std::thread sender([] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      CHECK(send(empty_sockets()[1], "x", 1, 0) == 1);
    });
    std::vector<IoCompletion> done;
    queue->reap(true, &done);
    sender.join();
    CHECK(done.size() == 1 && done[0].tag == 7 && done[0].error == 0 && queue->in_flight() == 0);
    CHECK(is_expected(buffer.data(), 0, 2 * kBlockBytes));
    allow_enter();
  }
  {
    const auto engine = make_io_engine(c.engine, 1);
    auto queue = engine->make_queue(fd, 2, {});
    fault = Fault::kLost;
    faults_injected = kLostRequests - 1;
    const std::vector<iovec> lost = {{buffer.data(), static_cast<size_t>(kBlockBytes)}};
    queue->submit(make_request(IoOp::kRead, 0, lost, 8));
    fault = Fault::kNone;
    enters_left = 0;
    std::thread later([] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      clock_ahead_s = 61;
    });
    std::vector<IoCompletion> done;
    CHECK(throws(ErrorKind::kStore, "1 requests did not complete within 60 s",
                 [&] { queue->reap(true, &done); }));
    later.join();
    CHECK(queue->in_flight() == 1 && done.empty());
    CHECK(throws(ErrorKind::kStore, "did not complete", [&] { queue->reap(true, &done); }));
    // The rest of the queue goes on.
    const std::vector<iovec> another = {second};
    queue->submit(make_request(IoOp::kRead, kBlockBytes, another, 9));
    queue->reap(true, &done);
    CHECK(done.size() == 1 && done[0].tag == 9 && done[0].error == 0 && queue->in_flight() == 1);
    queue->reap(false, &done);
    CHECK(done.size() == 1);
    const auto start = std::chrono::steady_clock::now();
    queue.reset();  // does not wait for it again
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(1));
  }
  clock_ahead_s = 0;
  allow_enter();
  close(fd);
}
#endif

// Two queues of one engine, each made here and used in a thread of its own; then one queue that changes
// threads.
static void test_threads(const Case& c) {
  constexpr int64_t kFileBytes = 8 << 20;
  constexpr int64_t kBytes = 256 << 10;
  const int fd = open_file(c.directory, c.direct);
  Buffer whole(kFileBytes);
  fill_expected(whole.data(), 0, kFileBytes);
  const auto engine = make_io_engine(c.engine, 3);
  CHECK(carry_out(engine->make_queue(fd, 1, {}).get(), IoOp::kWrite, 0, {whole.all()}) == 0);
  std::memset(whole.data(), 0, kFileBytes);

  std::vector<std::unique_ptr<IoQueue>> queues;
  for (int i = 0; i < 2; i++) queues.push_back(engine->make_queue(fd, 4, named(c, {whole.all()})));
  std::atomic<int64_t> next_offset{0};
  std::vector<std::thread> threads;
  for (const auto& queue : queues) {
    threads.emplace_back([&, q = queue.get()] {
      std::vector<iovec> segments(kFileBytes / kBytes);
      std::vector<IoCompletion> done;
      for (;;) {
        const int64_t offset = next_offset.fetch_add(kBytes);
        if (offset >= kFileBytes) break;
        if (q->in_flight() == q->depth()) q->reap(true, &done);
        iovec& segment = segments[offset / kBytes];
        segment = {whole.data() + offset, static_cast<size_t>(kBytes)};
        IoRequest request;
        request.file_offset = offset;
        request.segments = &segment;
        request.segment_count = 1;
        q->submit(request);
      }
      while (q->in_flight() > 0) q->reap(true, &done);
      for (const IoCompletion& completion : done) CHECK(completion.error == 0);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(is_expected(whole.data(), 0, kFileBytes));

  // Submitted by a thread that has ended when this one reaps.
  std::memset(whole.data(), 0, kFileBytes);
  const std::vector<iovec> all = {whole.all()};
  std::thread([&] { queues[0]->submit(make_request(IoOp::kRead, 0, all, 1)); }).join();
  std::vector<IoCompletion> done;
  queues[0]->reap(true, &done);
  CHECK(done.size() == 1 && done[0].error == 0 && is_expected(whole.data(), 0, kFileBytes));
  close(fd);
}

// ---- scratch files
// ---------------------------------------------------------------------------------------------

static void check_scratch_file(const std::string& directory, const std::string& io_engine,
                               bool wants_direct) {
  const int entries_before = entry_count(directory);
  const OpenedFile file = open_scratch_file(directory, io_engine);
  std::printf("  %s\n", file.reason.c_str());
  CHECK(file.fd >= 0 && file.direct_io == wants_direct && file.path == directory + "/(scratch)");
  CHECK(io_engine == "auto" || io_engine == file.engine);
  CHECK(((fcntl(file.fd, F_GETFL) & O_DIRECT) != 0) == wants_direct);
  CHECK((fcntl(file.fd, F_GETFD) & FD_CLOEXEC) != 0);
  CHECK(file.reason.find(file.engine) == 0 &&
        file.reason.find("wrote and read back 4096 bytes") != std::string::npos);
  struct stat info;
  CHECK(fstat(file.fd, &info) == 0 && info.st_nlink == 0 && (info.st_mode & 0777) == 0600);
  CHECK(entry_count(directory) == entries_before);
  close(file.fd);
}

static void check_probe(const std::string& directory) {
  const int entries_before = entry_count(directory);
  const ProbeResult probe = probe_directory(directory, "auto");
  std::printf("  %s: %s, %s\n", directory.c_str(), probe.file_system.c_str(), probe.device.c_str());
  for (const std::string& verdict : probe.verdicts) std::printf("    %s\n", verdict.c_str());
  CHECK(probe.verdicts.size() == 4 && probe.chosen.fd == -1 && !probe.chosen.engine.empty());
  CHECK(!probe.file_system.empty() && probe.device.find(':') != std::string::npos);
  CHECK(entry_count(directory) == entries_before);
}

// What a container's seccomp filter does.
static void test_refused_rings(const std::string& directory) {
  refuse_rings = true;
  CHECK(throws(ErrorKind::kStore, "Operation not permitted", [&] { make_io_engine("io_uring", 1); }));
  CHECK(throws(ErrorKind::kStore, "io_uring_setup", [&] { open_scratch_file(directory, "io_uring"); }));
  const OpenedFile file = open_scratch_file(directory, "auto");
  std::printf("  %s\n", file.reason.c_str());
  CHECK(file.engine == "pread" && file.reason.find("Operation not permitted") != std::string::npos);
  close(file.fd);
  refuse_rings = false;
#ifdef CSD_HAVE_LIBURING
  // A ring may be had, but not used: pread moves the block, and must not be taken for io_uring.
  enters_left = 0;
  CHECK(throws(ErrorKind::kStore, "io_uring_enter", [&] { open_scratch_file(directory, "io_uring"); }));
  const OpenedFile without = open_scratch_file(directory, "auto");
  std::printf("  %s\n", without.reason.c_str());
  CHECK(without.engine == "pread" && without.reason.find("io_uring_enter") != std::string::npos);
  close(without.fd);
  allow_enter();
#endif
}

static void test_bad_directories(const std::string& directory) {
  CHECK(throws(ErrorKind::kStore, "no such directory",
               [&] { open_scratch_file(directory + "/missing", "auto"); }));
  CHECK(throws(ErrorKind::kValue, "io_engine must be", [&] { open_scratch_file(directory, "uring"); }));
  CHECK(throws(ErrorKind::kValue, "io_engine must be", [&] { make_io_engine("auto", 1); }));
  const std::string file = directory + "/a-file";
  const int fd = open(file.c_str(), O_CREAT | O_WRONLY, 0600);
  CHECK(fd >= 0);
  close(fd);
  CHECK(throws(ErrorKind::kStore, "wanted a directory", [&] { open_scratch_file(file, "auto"); }));
  unlink(file.c_str());
  if (!io_uring_compiled()) {
    CHECK(throws(ErrorKind::kStore, "not in this build", [&] { open_scratch_file(directory, "io_uring"); }));
  }
  if (geteuid() != 0) {
    const std::string closed = directory + "/closed";
    CHECK(mkdir(closed.c_str(), 0500) == 0);
    CHECK(throws(ErrorKind::kStore, "may write", [&] { open_scratch_file(closed, "auto"); }));
    rmdir(closed.c_str());
  }
}

// A tmpfs of one MiB, filled and then made read-only.
static void test_full_and_read_only(const std::string& directory) {
  const std::string small = directory + "/small";
  CHECK(mkdir(small.c_str(), 0700) == 0);
  if (mount("tmpfs", small.c_str(), "tmpfs", 0, "size=1m") != 0) {
    std::printf("  skipped: cannot mount a tmpfs: %s\n", std::strerror(errno));
    rmdir(small.c_str());
    return;
  }
  for (const char* engine_name : {"io_uring", "pread"}) {
    if (std::string(engine_name) == "io_uring" && !io_uring_compiled()) continue;
    const int fd = open_file(small, false);
    Buffer buffer(2 << 20);
    const auto engine = make_io_engine(engine_name, 1);
    CHECK(carry_out(engine->make_queue(fd, 1, {}).get(), IoOp::kWrite, 0, {buffer.all()}) == ENOSPC);
    CHECK(throws(ErrorKind::kNoSpace, small, [&] { open_scratch_file(small, engine_name); }));
    CHECK(throws(ErrorKind::kNoSpace, "0 bytes free", [&] { open_scratch_file(small, "auto"); }));
    close(fd);
  }
  {  // What is there can be opened all the same.
    const std::string path = file_of(small, "pages", std::string(kBlockBytes, 'x'));
    const int fd = open_file(small, false);
    Buffer buffer(2 << 20);
    CHECK(carry_out(make_io_engine("pread", 1)->make_queue(fd, 1, {}).get(), IoOp::kWrite, 0,
                    {buffer.all()}) == ENOSPC);
    for (const DurableMode mode : {DurableMode::kWrite, DurableMode::kReadOnly}) {
      const OpenedFile file = open_durable_file(path, "auto", mode);
      CHECK(file.reason.find("read 4096 bytes") != std::string::npos);
      close(file.fd);
    }
    CHECK(throws(ErrorKind::kNoSpace, "0 bytes free",
                 [&] { open_durable_file(small + "/new", "auto", DurableMode::kCreate); }));
    CHECK(access((small + "/new").c_str(), F_OK) != 0);
    close(fd);
  }
  CHECK(mount(nullptr, small.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr) == 0);
  CHECK(throws(ErrorKind::kStore, "Read-only file system", [&] { open_scratch_file(small, "auto"); }));
  close(open_durable_file(small + "/pages", "auto", DurableMode::kReadOnly).fd);
  CHECK(throws(ErrorKind::kStore, "Read-only file system; open it to read only",
               [&] { open_durable_file(small + "/pages", "auto", DurableMode::kWrite); }));
  CHECK(umount(small.c_str()) == 0);
  rmdir(small.c_str());
}

// ---- durable files
// ---------------------------------------------------------------------------------------------

static void test_durable_files(const std::string& directory, const std::string& engine, bool wants_direct) {
  const std::string path = directory + "/pages";
  const int entries_before = entry_count(directory);
  const mode_t mask = umask(0777);  // even so its owner may use it
  const OpenedFile made = open_durable_file(path, engine, DurableMode::kCreate);
  umask(mask);
  std::printf("  %s\n", made.reason.c_str());
  const auto is_right = [&](const OpenedFile& file, int access) {
    const int flags = fcntl(file.fd, F_GETFL);
    CHECK((flags & O_ACCMODE) == access && (flags & O_NONBLOCK) == 0 &&
          ((flags & O_DIRECT) != 0) == wants_direct);
    CHECK((fcntl(file.fd, F_GETFD) & FD_CLOEXEC) != 0);
    CHECK(file.path == path && file.direct_io == wants_direct && file.reason.find(file.engine) == 0);
    CHECK(engine == "auto" || engine == file.engine);
  };
  is_right(made, O_RDWR);
  struct stat info;
  CHECK(fstat(made.fd, &info) == 0 && info.st_nlink == 1 && info.st_size == 0 &&
        (info.st_mode & 0777) == 0600);
  CHECK(entry_count(directory) == entries_before + 1);
  CHECK(throws(ErrorKind::kStore, "File exists; open that one",
               [&] { open_durable_file(path, engine, DurableMode::kCreate); }));
  CHECK(throws(ErrorKind::kCorrupt, "ends at byte 0",
               [&] { open_durable_file(path, engine, DurableMode::kReadOnly); }));

  // What it holds is not touched by opening it, and can be reached.
  Buffer block(kBlockBytes);
  fill_expected(block.data(), 0, kBlockBytes);
  const auto io = make_io_engine(made.engine, 1);
  CHECK(carry_out(io->make_queue(made.fd, 1, {}).get(), IoOp::kWrite, 0, {block.all()}) == 0);
  close(made.fd);
  for (const DurableMode mode : {DurableMode::kWrite, DurableMode::kReadOnly}) {
    const OpenedFile file = open_durable_file(path, engine, mode);
    std::printf("  %s\n", file.reason.c_str());
    is_right(file, mode == DurableMode::kWrite ? O_RDWR : O_RDONLY);
    CHECK(file.reason.find(mode == DurableMode::kWrite ? "bytes beside it" : "read 4096 bytes") !=
          std::string::npos);
    std::memset(block.data(), 0, kBlockBytes);
    CHECK(carry_out(io->make_queue(file.fd, 1, {}).get(), IoOp::kRead, 0, {block.all()}) == 0);
    CHECK(is_expected(block.data(), 0, kBlockBytes));
    CHECK(entry_count(directory) == entries_before + 1);
    close(file.fd);
  }
  CHECK(bytes_of(path).size() == kBlockBytes);
  unlink(path.c_str());
}

static void check_refused(const std::string& path, const std::string& text) {
  for (const DurableMode mode : {DurableMode::kWrite, DurableMode::kReadOnly}) {
    CHECK(throws(ErrorKind::kStore, path + ": ", [&] { open_durable_file(path, "auto", mode); }));
    CHECK(throws(ErrorKind::kStore, text, [&] { open_durable_file(path, "auto", mode); }));
  }
}

// Whatever lies where a store's file should, nothing but a file of our own is opened, and nothing waits.
static void test_what_is_not_a_file_of_ours_is_refused(const std::string& directory) {
  const std::string content(2 * kBlockBytes, 'x');
  const std::string path = directory + "/there";
  CHECK(throws(ErrorKind::kStore, "no such directory",
               [&] { open_durable_file(directory + "/missing/pages", "auto", DurableMode::kCreate); }));
  CHECK(throws(ErrorKind::kValue, "io_engine must be",
               [&] { open_durable_file(path, "uring", DurableMode::kCreate); }));
  check_refused(path, "No such file or directory; create a store here first");

  const std::string other = file_of(directory, "other", content);
  CHECK(symlink(other.c_str(), path.c_str()) == 0);
  check_refused(path, "wanted a regular file, this is a symbolic link");
  CHECK(throws(ErrorKind::kStore, "File exists",
               [&] { open_durable_file(path, "auto", DurableMode::kCreate); }));
  unlink(path.c_str());
  CHECK(symlink("/nowhere", path.c_str()) == 0);  // and one that leads nowhere does not make a file there
  check_refused(path, "this is a symbolic link");
  CHECK(throws(ErrorKind::kStore, "File exists",
               [&] { open_durable_file(path, "auto", DurableMode::kCreate); }));
  unlink(path.c_str());
  CHECK(mkfifo(path.c_str(), 0600) == 0);
  check_refused(path, "this is a FIFO");
  unlink(path.c_str());
  CHECK(mkdir(path.c_str(), 0700) == 0);
  check_refused(path, "this is a directory");
  rmdir(path.c_str());
  const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string short_path = "/tmp/torch_csd-" + std::to_string(getpid());  // of at most 107 characters
  std::strcpy(address.sun_path, short_path.c_str());
  CHECK(bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
  check_refused(short_path, "this is a socket");
  unlink(short_path.c_str());
  close(listener);
  check_refused("/dev/null", "this is a device");

  file_of(directory, "there", content);
  for (const mode_t mode : {0640, 0606, 0601}) {
    CHECK(chmod(path.c_str(), mode) == 0);
    check_refused(path, "wanted a file that only its owner may touch (0600), this has 06");
  }
  CHECK(chmod(path.c_str(), 0600) == 0);
  CHECK(link(path.c_str(), (directory + "/again").c_str()) == 0);
  check_refused(path, "this has 2 hard links");
  unlink((directory + "/again").c_str());
  if (geteuid() == 0) {
    CHECK(chown(path.c_str(), 65534, 65534) == 0);
    check_refused(path, "wanted a file of user 0, this belongs to user 65534");
    CHECK(chown(path.c_str(), 0, 0) == 0);
  } else {
    std::printf("  not tested: another user's file (that takes root)\n");
    CHECK(chmod(path.c_str(), 0000) == 0);
    check_refused(path, "Permission denied; let user");
    CHECK(chmod(path.c_str(), 0600) == 0);
  }
  CHECK(bytes_of(path) == content);
  unlink(path.c_str());
  unlink(other.c_str());
}

// As another user than root, in a directory that this user may not write: reading needs no scratch file.
static void test_reading_from_a_directory_that_cannot_be_written(const std::string& directory) {
  const std::string closed = directory + "/closed";
  CHECK(mkdir(closed.c_str(), 0700) == 0);
  const std::string path = file_of(closed, "pages", std::string(2 * kBlockBytes, 'x'));
  const auto act = [&] {
    const OpenedFile file = open_durable_file(path, "auto", DurableMode::kReadOnly);
    std::printf("  %s\n", file.reason.c_str());
    CHECK(file.reason.find("read 4096 bytes") != std::string::npos);
    close(file.fd);
    CHECK(throws(ErrorKind::kStore, "may write",
                 [&] { open_durable_file(path, "auto", DurableMode::kWrite); }));
    CHECK(throws(ErrorKind::kStore, "may write",
                 [&] { open_durable_file(closed + "/new", "auto", DurableMode::kCreate); }));
    CHECK(chmod(path.c_str(), 0000) == 0);
    CHECK(throws(ErrorKind::kStore, "Permission denied; let user",
                 [&] { open_durable_file(path, "auto", DurableMode::kReadOnly); }));
  };
  CHECK(chmod(closed.c_str(), 0500) == 0);
  if (geteuid() != 0) {
    act();
  } else {
    CHECK(chown(path.c_str(), 65534, 65534) == 0 && chown(closed.c_str(), 65534, 65534) == 0);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      CHECK(setuid(65534) == 0);
      // The way here may be closed to that user.
      if (access(path.c_str(), R_OK) != 0) {
        std::printf("  not tested: user 65534 cannot come to %s\n", closed.c_str());
      } else {
        act();
      }
      std::fflush(stdout);
      _exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
  }
  CHECK(chmod(closed.c_str(), 0700) == 0);
  unlink(path.c_str());
  rmdir(closed.c_str());
}

// ---- files of others
// ---------------------------------------------------------------------------------------------

static void test_input_files(const std::string& directory, const std::string& engine, bool wants_direct) {
  const std::string path = directory + "/input";
  const std::string link = directory + "/link";
  CHECK(symlink("input", link.c_str()) == 0);
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4095}, size_t{4096}, size_t{10000}}) {
    file_of(directory, "input", std::string(bytes, 'x'));
    CHECK(chmod(path.c_str(), 0444) == 0);  // whoever may read it
    CHECK(::link(path.c_str(), (directory + "/again").c_str()) == 0);
    struct stat before, after;
    CHECK(stat(path.c_str(), &before) == 0);
    for (const std::string& name : {path, link}) {
      const OpenedFile file = open_input_file(name, engine);
      if (bytes != 10000) std::printf("  %s\n", file.reason.c_str());
      const int flags = fcntl(file.fd, F_GETFL);
      CHECK((flags & O_ACCMODE) == O_RDONLY && (flags & O_NONBLOCK) == 0);
      CHECK(((flags & O_DIRECT) != 0) == wants_direct && file.direct_io == wants_direct);
      CHECK((fcntl(file.fd, F_GETFD) & FD_CLOEXEC) != 0 && file.path == name);
      CHECK(engine == "auto" || engine == file.engine);
      const std::string what = "read " + std::to_string(std::min<size_t>(bytes, 4096)) + " bytes";
      CHECK(file.reason.find(file.engine) == 0 && file.reason.find(what) != std::string::npos);
      std::fflush(stdout);
      const pid_t child = fork();
      if (child == 0)
        _exit((fcntl(file.fd, F_GETFL) & O_ACCMODE) == O_RDONLY && lseek(file.fd, 0, SEEK_END) == 0);
      int status = 0;  // there it is /dev/null
      CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 1);
      close_file(file.fd);
    }
    CHECK(stat(path.c_str(), &after) == 0 && after.st_mtim.tv_nsec == before.st_mtim.tv_nsec);
    unlink((directory + "/again").c_str());
    unlink(path.c_str());
  }
  unlink(link.c_str());
}

static void test_what_cannot_be_an_input_is_refused(const std::string& directory) {
  const std::string path = directory + "/there";
  const auto refused = [](const std::string& name, const std::string& why) {
    return throws(ErrorKind::kStore, name + ": " + why, [&] { open_input_file(name, "auto"); });
  };
  CHECK(refused(path, "opening the file to read: No such file or directory; name a file that is there"));
  CHECK(refused(path + "/deeper", "opening the file to read: No such file or directory"));
  CHECK(throws(ErrorKind::kValue, "io_engine must be", [&] { open_input_file(path, "uring"); }));
  CHECK(symlink("there", path.c_str()) == 0);
  CHECK(
      refused(path, "opening the file to read: Too many levels of symbolic links; name a file, not a ring"));
  unlink(path.c_str());
  CHECK(symlink("nowhere", path.c_str()) == 0);
  CHECK(refused(path, "opening the file to read: No such file or directory"));
  unlink(path.c_str());
  CHECK(mkfifo(path.c_str(), 0600) == 0);
  CHECK(refused(path, "wanted a regular file, this is a FIFO; name a file"));
  unlink(path.c_str());
  CHECK(refused(directory, "wanted a regular file, this is a directory"));
  CHECK(refused("/dev/null", "wanted a regular file, this is a device"));
  file_of(directory, "there", "x");
  CHECK(refused(path + "/deeper", "opening the file to read: Not a directory"));
  std::fflush(stdout);
  CHECK(chmod(path.c_str(), 0000) == 0);
  const pid_t child = fork();
  if (child == 0) {
    if (geteuid() == 0) CHECK(setuid(65534) == 0);
    // The way here may be closed to that user.
    if (access(path.c_str(), F_OK) == 0) {
      CHECK(refused(path, "opening the file to read: Permission denied; let user"));
    } else {
      std::printf("  not tested: user 65534 cannot come to %s\n", path.c_str());
    }
    std::fflush(stdout);
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  unlink(path.c_str());
}

// Everything of ours is aligned to 4096 bytes: enough for drives that want 512 or 4096, and told where not.
static void test_alignments(const std::string& directory) {
  for (const uint32_t enough : {512u, 4096u}) {
    told_alignment = enough;
    const OpenedFile file = open_scratch_file(directory, "auto");
    CHECK(file.direct_io);
    close(file.fd);
  }
  const std::string path = file_of(directory, "pages", std::string(kBlockBytes, 'x'));
  told_alignment = 8192;
  for (const bool durable : {false, true}) {
    const OpenedFile file = durable ? open_durable_file(path, "pread", DurableMode::kReadOnly)
                                    : open_scratch_file(directory, "auto");
    std::printf("  %s\n", file.reason.c_str());
    CHECK(!file.direct_io && (fcntl(file.fd, F_GETFL) & O_DIRECT) == 0);
    CHECK(file.reason.find("aligned to 8192 bytes") != std::string::npos);
    close(file.fd);
  }
  told_alignment = 0xffffffff;
  unlink(path.c_str());
}

static void test_sync(const std::string& directory) {
  const std::string path = file_of(directory, "pages", "x");
  const int fd = open(path.c_str(), O_RDWR);
  const std::function<void()> syncs[] = {[&] { sync_data(fd, path); }, [&] { sync_directory(directory); }};
  for (const auto& sync : syncs) {
    sync_calls = 0;
    sync_error = EINTR;
    sync();
    CHECK(sync_calls == 2);
    sync_error = EIO;
    CHECK(throws(ErrorKind::kStore, "Input/output error", sync));
    sync_error = ENOSPC;
    CHECK(throws(ErrorKind::kNoSpace, directory, sync));
    sync();
  }
  sync_error = EINVAL;  // not an error of a directory's
  sync_directory(directory);
  sync_error = EINVAL;
  CHECK(throws(ErrorKind::kStore, path + ": fdatasync", syncs[0]));
  CHECK(throws(ErrorKind::kStore, "No such file", [&] { sync_directory(directory + "/missing"); }));
  CHECK(throws(ErrorKind::kStore, "Not a directory", [&] { sync_directory(path); }));
  CHECK(throws(ErrorKind::kStore, "Bad file descriptor", [&] { sync_data(-1, path); }));
  close(fd);
  unlink(path.c_str());
}

static bool takes_direct(const std::string& directory) {
  const int fd = open(directory.c_str(), O_TMPFILE | O_RDWR | O_DIRECT, 0600);
  if (fd >= 0) close(fd);
  return fd >= 0;
}

static bool is_tmpfs(const std::string& directory) {
  struct statfs info;
  CHECK(statfs(directory.c_str(), &info) == 0);
  return info.f_type == 0x01021994;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: test_io DIRECTORY\n");
    return 2;
  }
  const std::string directory = argv[1];
  const bool direct_works = takes_direct(directory);
  if (!direct_works) std::printf("O_DIRECT not tested: %s refuses it\n", directory.c_str());
  std::vector<std::string> engines = {"pread"};
  if (io_uring_compiled()) {
    try {
      make_io_engine("io_uring", 1);
      engines.push_back("io_uring");
    } catch (const Error& refused) {
      std::printf("io_uring not tested: %s\n", refused.what());
    }
  } else {
    std::printf("io_uring not tested: not compiled in\n");
  }
  test_transfer();
  for (const std::string& engine : engines) {
    std::vector<Case> cases = {{engine, false, directory, false}, {engine, false, "/dev/shm", true}};
    if (direct_works) {
      cases.push_back({engine, true, directory, false});
      cases.push_back({engine, true, directory, true});
    }
    for (const Case& c : cases) {
      std::printf("%s, %s, %s buffers, %s\n", c.engine.c_str(), c.direct ? "O_DIRECT" : "buffered",
                  c.registered ? "registered" : "unregistered", c.directory.c_str());
      std::fflush(stdout);
      test_random_writes_then_reads(c, 200);
      test_faults_are_resumed(c);
      test_many_segments(c);
      test_other_files(c);
      test_limits_and_errors(c);
      test_destructor_waits(c);
      test_threads(c);
    }
    test_endless_eagain_ends(cases[0]);
    test_lost_requests_are_asked_for_again(cases.back());
#ifdef CSD_HAVE_LIBURING
    if (engine == "io_uring") {
      std::printf("io_uring refused in the middle of a run\n");
      std::fflush(stdout);
      for (const Case& c : cases) {
        test_refused_in_the_middle(c);
        test_all_queues_go_over_to_pread(c);
        test_destructor_waits_although_refused(c);
        test_refused_rings_in_the_middle(c);
        test_requests_held_when_refused(c);
      }
      test_endless_refusal_goes_over_to_pread(cases[0]);
    }
#endif
  }
  std::printf("scratch files\n");
  for (const std::string& engine : engines)
    check_scratch_file(directory, engine, direct_works && !is_tmpfs(directory));
  check_scratch_file(directory, "auto", direct_works && !is_tmpfs(directory));
  check_scratch_file("/dev/shm", "auto", false);
  check_probe(directory);
  check_probe("/dev/shm");
  if (engines.size() == 2) test_refused_rings(directory);
  test_bad_directories(directory);
  std::printf("durable files\n");
  for (const std::string& engine : engines)
    test_durable_files(directory, engine, direct_works && !is_tmpfs(directory));
  test_durable_files("/dev/shm", "auto", false);
  test_what_is_not_a_file_of_ours_is_refused(directory);
  std::printf("files of others\n");
  for (const std::string& engine : engines)
    test_input_files(directory, engine, direct_works && !is_tmpfs(directory));
  test_input_files("/dev/shm", "auto", false);
  test_what_cannot_be_an_input_is_refused(directory);
  test_reading_from_a_directory_that_cannot_be_written(directory);
  test_reading_from_a_directory_that_cannot_be_written("/dev/shm");
  if (direct_works && !is_tmpfs(directory)) test_alignments(directory);
  test_sync(directory);
  test_full_and_read_only(directory);
  std::printf("ok\n");
  return 0;
}
