// Every fault below a Drive, in the middle of every operation of it: the answer is right, or an Error that
// says what happened where; afterwards the drive is as it was before, and works. What is right is known from
// a second drive that has memory enough never to write and suffers nothing.
//
// Plain program: prints a table, exits non-zero on the first failure. argv[1]: a directory. argv[2], ...:
// only cases with one of these in their names, which are printed as they begin.
//
// In one line, from the repository's root (all of csrc but ops.cpp, module.cpp and io/engine.cpp, whose
// make_io_engine() is replaced here by one that makes engines to inject faults into), or by the Makefile
// here:
//
//   g++ -std=c++17 -O1 -g -DCSD_HAVE_LIBURING -Icsrc tests/native/test_faults.cpp csrc/base/*.cpp
//   csrc/executor/*.cpp csrc/io/{open,pread_engine,uring_engine}.cpp csrc/kernels/*.cpp csrc/store/*.cpp
//   -luring -ldl -pthread -o test_faults
//
// Below the engines, system calls are those of this file, as in test_io.cpp.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef CSD_HAVE_LIBURING
#include <liburing.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/types.h"
#include "executor/drive.h"
#include "io/engines.h"
#include "io/io.h"

using namespace csd;

static std::string current_case;

#define CHECK(condition)                                                                                     \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      std::fprintf(stderr, "%s:%d: %s: failed: %s\n", __FILE__, __LINE__, current_case.c_str(), #condition); \
      std::abort();                                                                                          \
    }                                                                                                        \
  } while (0)

// ---- faults ----

enum class Fault {
  kNone,
  // Of requests, in the engine.
  kReadError,
  kWriteError,
  kWriteNoSpace,
  kSlow,             // one takes 30 ms more
  kReordered,        // completions come in reverse, one at a time
  kNeverDone,        // one does not complete while the fault lasts; who waits for it alone gets an error
  kReadRetryThrows,  // one fails, and so does submitting the next
  kWriteRetryThrows,
  kQueueFails,
  kSubmitThrows,
  kReapThrows,
  // Of system calls, below it.
  kCalls,  // short transfers, EINTR, EAGAIN
  kUringRefused,
  kGrowNoSpace,
  kGrowError,
  kGrowInterrupted,
  kGrowUnsupported,
  kGrowUnsupportedNoSpace,
  kSyncError,
};

struct Injection {
  Fault fault;
  const char* name;
  bool always;               // from a request on, else only that one
  std::vector<int64_t> ats;  // which one: counted from 0 for each kind of request or call
  ErrorKind kind;            // that it may lead to
  const char* text;          // in the error, or the other behind a bar; null: no error at all
  bool fresh;                // wants a drive that has not grown, or has no queues yet
};

static std::atomic<Fault> fault{Fault::kNone};
static std::atomic<bool> fault_always{false};
static std::atomic<int64_t> fault_at{0};
static std::atomic<int64_t> fault_seen{0};
static std::atomic<int64_t> fault_hits{0};

static void arm(const Injection& injection, int64_t at) {
  fault_always = injection.always;
  fault_at = at;
  fault_seen = 0;
  fault_hits = 0;
  fault = injection.fault;
}

// Whether it is the turn of a request or call that this fault may hit.
static bool hits(Fault kind) {
  if (fault != kind) return false;
  const int64_t number = fault_seen++;
  const bool hit = fault_always ? number >= fault_at : number == fault_at;
  if (hit) fault_hits++;
  return hit;
}

class FaultyQueue : public IoQueue {
 public:
  explicit FaultyQueue(std::unique_ptr<IoQueue> inner) : inner_(std::move(inner)) {}

  ~FaultyQueue() override {
    for (const IoRequest& request : held_) inner_->submit(request);
  }

  void submit(const IoRequest& request) override {
    CHECK(in_flight() < depth());
    check_aligned(request);
    const bool retried = next_throws_.exchange(false) && fault != Fault::kNone;
    if (retried || hits(Fault::kSubmitThrows)) {
      throw Error(ErrorKind::kStore, "injected: a queue that takes nothing");
    }
    int error = 0;
    if (hits(request.op == IoOp::kRead ? Fault::kReadRetryThrows : Fault::kWriteRetryThrows)) {
      error = EIO;
      next_throws_ = true;
    }
    if (request.op == IoOp::kRead) {
      if (hits(Fault::kReadError)) error = EIO;
    } else {
      if (hits(Fault::kWriteError)) error = EIO;
      if (hits(Fault::kWriteNoSpace)) error = ENOSPC;
      CHECK(sums_.emplace(request.tag, std::make_pair(request, sum(request))).second);
    }
    if (error != 0) {
      if (request.op == IoOp::kRead) scribble(request);
      arrive({request.tag, error});
    } else if (hits(Fault::kNeverDone)) {
      held_.push_back(request);
    } else {
      if (hits(Fault::kSlow)) slow_.push_back(request.tag);
      inner_->submit(request);
    }
  }

  void reap(bool wait, std::vector<IoCompletion>* completions) override {
    CHECK(!wait || in_flight() > 0);
    if (hits(Fault::kReapThrows)) throw Error(ErrorKind::kStore, "injected: a queue that tells nothing");
    if (fault != Fault::kNeverDone) {
      for (const IoRequest& request : held_) inner_->submit(request);
      held_.clear();
    }
    const size_t count_before = completions->size();
    for (;;) {
      gather(false);
      // With others, that what befalls one of them must not lose.
      while (fault == Fault::kReadRetryThrows && inner_->in_flight() > 0) gather(true);
      if (fault == Fault::kReordered) {
        while (wait && inner_->in_flight() > 0) gather(true);
        if (!finished_.empty()) {
          fault_hits++;
          completions->push_back(finished_.back());
          finished_.pop_back();
        }
      } else {
        completions->insert(completions->end(), finished_.begin(), finished_.end());
        finished_.clear();
      }
      if (!wait || completions->size() > count_before) return;
      if (inner_->in_flight() > 0) {
        gather(true);
      } else if (!late_.empty()) {
        std::this_thread::sleep_until(late_.front().first);
      } else {
        throw Error(ErrorKind::kStore, "injected: requests that do not complete");
      }
    }
  }

  int in_flight() const override {
    return inner_->in_flight() + static_cast<int>(finished_.size() + late_.size() + held_.size());
  }
  int depth() const override { return inner_->depth(); }

 private:
  using Clock = std::chrono::steady_clock;

  // What O_DIRECT wants, on any drive.
  static void check_aligned(const IoRequest& request) {
    CHECK(request.file_offset % kBlockBytes == 0 && request.segment_count > 0);
    for (int i = 0; i < request.segment_count; i++) {
      CHECK(reinterpret_cast<uintptr_t>(request.segments[i].iov_base) % kBlockBytes == 0);
      CHECK(request.segments[i].iov_len > 0 && request.segments[i].iov_len % kBlockBytes == 0);
    }
  }

  static void scribble(const IoRequest& request) {
    for (int i = 0; i < request.segment_count; i++)
      std::memset(request.segments[i].iov_base, 0xee, request.segments[i].iov_len);
  }

  static uint64_t sum(const IoRequest& request) {
    uint64_t sum = 0;
    for (int i = 0; i < request.segment_count; i++) {
      const auto* words = static_cast<const uint64_t*>(request.segments[i].iov_base);
      for (size_t word = 0; word < request.segments[i].iov_len / 8; word++) sum = sum * 31 + words[word];
    }
    return sum;
  }

  void arrive(const IoCompletion& completion) {
    const auto written = sums_.find(completion.tag);
    if (written != sums_.end()) {
      CHECK(sum(written->second.first) == written->second.second);  // nobody changed what was being written
      sums_.erase(written);
    }
    finished_.push_back(completion);
  }

  void gather(bool wait) {
    arrived_.clear();
    inner_->reap(wait, &arrived_);
    for (const IoCompletion& completion : arrived_) {
      const auto slow = std::find(slow_.begin(), slow_.end(), completion.tag);
      if (slow == slow_.end()) {
        arrive(completion);
      } else {
        slow_.erase(slow);
        late_.push_back({Clock::now() + std::chrono::milliseconds(30), completion});
      }
    }
    while (!late_.empty() && late_.front().first <= Clock::now()) {
      arrive(late_.front().second);
      late_.erase(late_.begin());
    }
  }

  const std::unique_ptr<IoQueue> inner_;
  std::atomic<bool> next_throws_{false};
  std::vector<IoCompletion> arrived_;
  std::vector<IoCompletion> finished_;
  std::vector<std::pair<Clock::time_point, IoCompletion>> late_;
  std::vector<uint64_t> slow_;
  std::vector<IoRequest> held_;
  std::map<uint64_t, std::pair<IoRequest, uint64_t>> sums_;  // of writes in flight, by tag
};

class FaultyEngine : public IoEngine {
 public:
  explicit FaultyEngine(std::unique_ptr<IoEngine> inner) : inner_(std::move(inner)) {}

  const char* name() const override { return inner_->name(); }
  const char* fallback_reason() const override { return inner_->fallback_reason(); }

  std::unique_ptr<IoQueue> make_queue(int fd, int depth, const std::vector<iovec>& buffers) override {
    if (hits(Fault::kQueueFails)) throw Error(ErrorKind::kStore, "injected: no queue can be made");
    return std::make_unique<FaultyQueue>(inner_->make_queue(fd, depth, buffers));
  }

 private:
  const std::unique_ptr<IoEngine> inner_;
};

bool csd::io_uring_compiled() {
#ifdef CSD_HAVE_LIBURING
  return true;
#else
  return false;
#endif
}

std::unique_ptr<IoEngine> csd::make_io_engine(const std::string& name, int thread_count) {
#ifdef CSD_HAVE_LIBURING
  if (name == "io_uring") return std::make_unique<FaultyEngine>(make_uring_engine(thread_count));
#endif
  CHECK(name == "pread");
  return std::make_unique<FaultyEngine>(make_pread_engine(thread_count));
}

// 0 nothing, -1 a short transfer, else an errno value.
static int next_call_fault() {
  if (fault != Fault::kCalls) return 0;
  const int cycle[] = {-1, 0, EINTR, -1, EAGAIN, 0, -1};
  const int chosen = cycle[static_cast<size_t>(fault_seen++) % (sizeof(cycle) / sizeof(cycle[0]))];
  if (chosen != 0) fault_hits++;
  return chosen;
}

// All of it moves, and less of it is reported: a direct transfer cannot really end off a block of this drive.
static ssize_t faulty_transfer(long number, int fd, const iovec* segments, int count, off_t offset) {
  const int injected = next_call_fault();
  if (injected > 0) {
    errno = injected;
    return -1;
  }
  const ssize_t result = syscall(number, fd, segments, static_cast<long>(count), offset, 0L);
  return injected < 0 && result >= 2 * kBlockBytes ? result / 2 / kBlockBytes * kBlockBytes + 512 : result;
}

extern "C" ssize_t preadv(int fd, const iovec* segments, int count, off_t offset) {
  return faulty_transfer(SYS_preadv, fd, segments, count, offset);
}

extern "C" ssize_t pwritev(int fd, const iovec* segments, int count, off_t offset) {
  return faulty_transfer(SYS_pwritev, fd, segments, count, offset);
}

static int fails(int errno_value) {
  errno = errno_value;
  return -1;
}

extern "C" int fallocate(int fd, int mode, off_t offset, off_t bytes) {
  if (hits(Fault::kGrowNoSpace)) return fails(ENOSPC);
  if (hits(Fault::kGrowError)) return fails(EIO);
  if (hits(Fault::kGrowInterrupted)) return fails(EINTR);
  if (hits(Fault::kGrowUnsupported)) return fails(EOPNOTSUPP);
  if (fault == Fault::kGrowUnsupportedNoSpace) return fails(EOPNOTSUPP);
  return static_cast<int>(syscall(SYS_fallocate, fd, mode, offset, bytes));
}

extern "C" int ftruncate(int fd, off_t bytes) {
  if (hits(Fault::kGrowUnsupportedNoSpace)) return fails(ENOSPC);
  return static_cast<int>(syscall(SYS_ftruncate, fd, bytes));
}

extern "C" int fdatasync(int fd) {
  return hits(Fault::kSyncError) ? fails(EIO) : static_cast<int>(syscall(SYS_fdatasync, fd));
}

#ifdef CSD_HAVE_LIBURING
// A read from this says EAGAIN.
static int empty_socket() {
  static const int socket = [] {
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    return pair[0];
  }();
  return socket;
}

extern "C" int io_uring_submit(io_uring* ring) {
  static const auto real = reinterpret_cast<int (*)(io_uring*)>(dlsym(RTLD_NEXT, "io_uring_submit"));
  static char received;
  if (hits(Fault::kUringRefused)) return -EPERM;
  for (unsigned i = ring->sq.sqe_head; i != ring->sq.sqe_tail; i++) {
    io_uring_sqe* sqe = &ring->sq.sqes[i & *ring->sq.kring_mask];
    const int injected = sqe->opcode == IORING_OP_ASYNC_CANCEL ? 0 : next_call_fault();
    const bool fixed = sqe->opcode == IORING_OP_READ_FIXED || sqe->opcode == IORING_OP_WRITE_FIXED;
    if (injected > 0) {
      const uint64_t user_data = sqe->user_data;
      io_uring_prep_recv(sqe, empty_socket(), &received, 1, MSG_DONTWAIT);
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
  return hits(Fault::kUringRefused) ? -EPERM : real(ring, cqe, timeout);
}
#endif

// ---- two drives that are told the same ----

constexpr int64_t kHeads = 2;
constexpr int64_t kQueryHeads = 4;
constexpr int64_t kDimK = 32;
constexpr int64_t kDimV = 40;

struct Setting {
  std::string name;
  std::string engine;
  int code_bits;
  bool resident;
  bool durable;
};

static std::vector<float> random_values(size_t count, uint64_t seed) {
  static const std::vector<float> pool = [] {
    std::vector<float> values(65521);
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(random);
    return values;
  }();
  std::vector<float> values(count);
  size_t at = static_cast<size_t>(seed * 2654435761u % pool.size());
  for (float& value : values) {
    value = pool[at];
    if (++at == pool.size()) at = 0;
  }
  return values;
}

// What is done to a drive. Those that compute put what came out into *out.
using Step = std::function<void(Drive& drive, std::vector<float>* out)>;

// generation: other tokens than those of other generations.
static Step append(int64_t layer, int64_t row_count, int64_t tokens, uint64_t generation) {
  return [=](Drive& drive, std::vector<float>*) {
    const std::vector<float> k = random_values(static_cast<size_t>(row_count * kHeads * tokens * kDimK),
                                               generation * 1000 + static_cast<uint64_t>(layer) * 2);
    const std::vector<float> v = random_values(static_cast<size_t>(row_count * kHeads * tokens * kDimV),
                                               generation * 1000 + static_cast<uint64_t>(layer) * 2 + 1);
    AppendRequest request;
    request.row_count = row_count;
    request.q_len = tokens;
    request.k = k.data();
    request.v = v.data();
    const int64_t k_strides[3] = {kHeads * tokens * kDimK, tokens * kDimK, kDimK};
    const int64_t v_strides[3] = {kHeads * tokens * kDimV, tokens * kDimV, kDimV};
    std::copy_n(k_strides, 3, request.k_strides);
    std::copy_n(v_strides, 3, request.v_strides);
    drive.append(layer, request);
  };
}

static QueryView query_view(const std::vector<float>& values, int64_t q_len, int64_t width) {
  QueryView view;
  view.data = values.data();
  view.strides[0] = kQueryHeads * q_len * width;
  view.strides[1] = q_len * width;
  view.strides[2] = width;
  return view;
}

static Step attend(int64_t layer, int64_t q_len) {
  return [=](Drive& drive, std::vector<float>* out) {
    const auto rows = static_cast<int64_t>(drive.info(layer).lengths.size());
    if (rows == 0) return;
    const std::vector<float> q = random_values(static_cast<size_t>(rows * kQueryHeads * q_len * kDimK), 5);
    out->assign(static_cast<size_t>(rows * kQueryHeads * q_len * (kDimV + 1)), -1.0f);
    AttendRequest request;
    request.span = {0, rows, -1, -1};
    request.num_heads = kQueryHeads;
    request.q_len = q_len;
    request.q = query_view(q, q_len, kDimK);
    request.scale = 0.2f;
    request.causal = Causal::kLowerRight;
    request.out = out->data();
    request.lse = out->data() + rows * kQueryHeads * q_len * kDimV;
    drive.attend(layer, -1, request);
  };
}

enum class Guess : uint8_t { kNone, kFirst, kOnly };

// Half of the pages by their bounds, or half of the tokens: what is chosen is the same on both drives. Guess:
// whether it is guessed at first, or nothing else is done.
static Step attend_sparse(int64_t layer, SparseKind kind, Guess guess = Guess::kNone) {
  return [=](Drive& drive, std::vector<float>* out) {
    const auto rows = static_cast<int64_t>(drive.info(layer).lengths.size());
    if (rows == 0) return;
    const std::vector<float> q = random_values(static_cast<size_t>(rows * kQueryHeads * kDimK), 5);
    std::vector<float> missing(static_cast<size_t>(rows * kQueryHeads));
    out->assign(static_cast<size_t>(rows * kQueryHeads * (kDimV + 1)), -1.0f);
    AttendRequest request;
    request.span = {0, rows, -1, -1};
    request.num_heads = kQueryHeads;
    request.q_len = 1;
    request.q = query_view(q, 1, kDimK);
    request.scale = 0.2f;
    request.out = out->data();
    request.lse = out->data() + rows * kQueryHeads * kDimV;
    SparseRequest sparse;
    sparse.kind = kind;
    sparse.fraction = 0.5;
    sparse.tokens = 500;
    sparse.local_tokens = 64;
    sparse.mass = 0.9;
    sparse.channels = 16;
    sparse.mean_value = true;
    sparse.missing = missing.data();
    if (guess != Guess::kNone) drive.prefetch(layer, -1, request, sparse);
    if (guess == Guess::kOnly) {
      out->clear();
      return;
    }
    drive.attend_sparse(layer, -1, request, sparse);
  };
}

static Step keep_summary(int64_t layer, SummaryKind kind) {
  return [=](Drive& drive, std::vector<float>*) { drive.keep_summary(layer, kind); };
}

// The other passes go over rows of one length, from the first token that can be read.
static Span whole_span(Drive& drive, int64_t layer) {
  const LayerInfo info = drive.info(layer);
  return {0, static_cast<int64_t>(info.lengths.size()), info.begin, info.lengths.at(0)};
}

static Step scores(int64_t layer) {
  return [=](Drive& drive, std::vector<float>* out) {
    const Span span = whole_span(drive, layer);
    const std::vector<float> q = random_values(static_cast<size_t>(span.row_count * kQueryHeads * kDimK), 6);
    out->assign(static_cast<size_t>(span.row_count * kQueryHeads * (span.kv_end - span.kv_begin)), -1.0f);
    ScoresRequest request;
    request.span = span;
    request.num_heads = kQueryHeads;
    request.q_len = 1;
    request.q = query_view(q, 1, kDimK);
    request.out = out->data();
    drive.scores(layer, -1, request);
  };
}

static Step weighted_sum(int64_t layer) {
  return [=](Drive& drive, std::vector<float>* out) {
    const Span span = whole_span(drive, layer);
    const int64_t kv_len = span.kv_end - span.kv_begin;
    std::vector<float> p = random_values(static_cast<size_t>(span.row_count * kQueryHeads * kv_len), 8);
    for (float& weight : p) weight = std::fabs(weight) / static_cast<float>(kv_len);
    out->assign(static_cast<size_t>(span.row_count * kQueryHeads * kDimV), -1.0f);
    WeightedSumRequest request;
    request.span = span;
    request.num_heads = kQueryHeads;
    request.q_len = 1;
    request.p = query_view(p, 1, kv_len);
    request.out = out->data();
    drive.weighted_sum(layer, -1, request);
  };
}

static Step read_back(int64_t layer) {
  return [=](Drive& drive, std::vector<float>* out) {
    const Span span = whole_span(drive, layer);
    const int64_t tokens = span.row_count * kHeads * (span.kv_end - span.kv_begin);
    out->assign(static_cast<size_t>(tokens * (kDimK + kDimV)), -1.0f);
    ReadRequest request;
    request.span = span;
    request.k = out->data();
    request.v = out->data() + tokens * kDimK;
    drive.read(layer, -1, request);
  };
}

static Step crop(int64_t layer, int64_t length) {
  return [=](Drive& drive, std::vector<float>*) { drive.truncate(layer, {length}); };
}

static Step trim(int64_t layer, int64_t begin) {
  return [=](Drive& drive, std::vector<float>*) { drive.trim(layer, begin); };
}

static Step reorder(int64_t layer, const std::vector<int64_t>& index) {
  return [=](Drive& drive, std::vector<float>*) { drive.reorder(layer, index); };
}

static Step fork_layer(int64_t layer, int64_t source) {
  return [=](Drive& drive, std::vector<float>*) { drive.fork_layer(layer, source); };
}

static Step create(const Geometry& geometry, int64_t layer) {
  return [=](Drive& drive, std::vector<float>*) { drive.create_layer(layer, geometry, layer); };
}

static Step flush() {
  return [](Drive& drive, std::vector<float>*) { drive.flush(); };
}

static int64_t stat(Drive& drive, const std::string& name) {
  const std::string json = drive.stats_json();
  const size_t at = json.find("\"" + name + "\": ");
  CHECK(at != std::string::npos);
  return std::strtoll(json.c_str() + at + name.size() + 4, nullptr, 10);
}

static void check_equal(const std::vector<float>& got, const std::vector<float>& wanted, float tolerance) {
  CHECK(got.size() == wanted.size());
  for (size_t i = 0; i < got.size(); i++) {
    if (!(std::fabs(got[i] - wanted[i]) <= tolerance)) {
      std::fprintf(stderr, "element %zu of %zu: got %g, wanted %g\n", i, got.size(),
                   static_cast<double>(got[i]), static_cast<double>(wanted[i]));
      CHECK(!"a wrong answer");
    }
  }
}

class Pair {
 public:
  Pair(const std::string& directory, const Setting& setting)
      : directory_(directory), setting_(setting), sound_(options(false)) {
    renew();
  }
  ~Pair() {
    faulty_.reset();
    if (setting_.durable) unlink(durable_path().c_str());
  }

  void renew() {
    faulty_.reset();
    if (setting_.durable) unlink(durable_path().c_str());
    faulty_ = std::make_unique<Drive>(options(true));
    metadata_bytes_ = stat(*faulty_, "metadata_bytes");
  }

  Drive& faulty() { return *faulty_; }

  // On the drive that suffers first: what it throws, the other is never told.
  void run(const Step& step) {
    std::vector<float> got, wanted;
    step(*faulty_, &got);
    step(sound_, &wanted);
    check_equal(got, wanted, 2e-4f);  // pages are merged in the order in which they come
  }

  void check_layers(const std::vector<int64_t>& layers) {
    for (const int64_t layer : layers) {
      const LayerInfo is = faulty_->info(layer), wanted = sound_.info(layer);
      CHECK(is.lengths == wanted.lengths && is.begin == wanted.begin);
      if (wanted.lengths.empty() || wanted.lengths[0] == wanted.begin) continue;
      std::vector<float> got_tokens, wanted_tokens;
      read_back(layer)(*faulty_, &got_tokens);
      read_back(layer)(sound_, &wanted_tokens);
      check_equal(got_tokens, wanted_tokens, 0.0f);
      run(attend(layer, 1));
    }
  }

  void forget(const std::vector<int64_t>& layers) {
    for (const int64_t layer : layers) sound_.drop_layer(layer);
  }

  // What a drive must be like when nothing is stored in it any more.
  void drop(const std::vector<int64_t>& layers) {
    for (const int64_t layer : layers) faulty_->drop_layer(layer);
    forget(layers);
    faulty_->flush();
    // What was read ahead may have kept space of pages that were still being written then.
    faulty_->create_layer(layers[0], {kHeads, kDimK, kDimV, DType::kBFloat16, 0}, 0);
    faulty_->drop_layer(layers[0]);
    CHECK(stat(*faulty_, "pages_on_drive") == 0 && stat(*faulty_, "pages_resident") == 0);
    CHECK(stat(*faulty_, "stored_bytes") == 0 && stat(*faulty_, "drive_pending_bytes") == 0);
    CHECK(stat(*faulty_, "memory_used_bytes") <= stat(*faulty_, "memory_budget_bytes"));
    // Nothing is lost of the page tables' memory, nor of the file's space: that all fits in what the first
    // case needed, give or take.
    if (stat(*faulty_, "metadata_bytes") != metadata_bytes_)
      std::fprintf(stderr, "metadata_bytes %lld, were %lld\n",
                   static_cast<long long>(stat(*faulty_, "metadata_bytes")),
                   static_cast<long long>(metadata_bytes_));
    CHECK(stat(*faulty_, "metadata_bytes") == metadata_bytes_);
    CHECK(stat(*faulty_, "file_bytes") <= 24 << 20);
  }

 private:
  std::string durable_path() const { return directory_ + "/pages"; }

  DriveOptions options(bool faulty) const {
    DriveOptions options;
    options.directory = directory_;
    options.io_engine = faulty ? setting_.engine : "pread";
    options.memory_budget_bytes = int64_t{faulty ? 1 : 96} << 20;
    options.threads = 2;
    options.queue_depth = 8;
    options.resident = !faulty || setting_.resident;
    if (faulty && setting_.durable) {
      options.durable_path = durable_path();
      options.durable_mode = DurableMode::kCreate;
    }
    return options;
  }

  const std::string directory_;
  const Setting setting_;
  Drive sound_;
  std::unique_ptr<Drive> faulty_;
  int64_t metadata_bytes_ = 0;
};

// ---- operations ----

struct Operation {
  std::string name;
  std::vector<int64_t> layers;  // that there are when it is over
  std::vector<Step> before;     // nothing goes wrong yet
  std::vector<Step> steps;      // one after another, each again if it fails
};

static std::vector<Operation> all_operations(const Geometry& geometry) {
  std::vector<Operation> operations;
  const auto created = [&](int64_t count) {
    std::vector<Step> steps;
    for (int64_t layer = 0; layer < count; layer++) steps.push_back(create(geometry, layer));
    return steps;
  };
  const auto filled = [&](int64_t count, int64_t tokens) {
    std::vector<Step> steps = created(count);
    for (int64_t layer = 0; layer < count; layer++) steps.push_back(append(layer, 2, tokens, 1));
    return steps;
  };
  const auto numbers = [](int64_t count) {
    std::vector<int64_t> layers;
    for (int64_t layer = 0; layer < count; layer++) layers.push_back(layer);
    return layers;
  };
  operations.push_back({"append a token", {0}, filled(1, 100), {append(0, 2, 1, 2), append(0, 2, 1, 3)}});
  operations.push_back(
      {"append a prompt", {0, 1}, created(2), {append(0, 2, 1500, 2), append(1, 2, 700, 2)}});
  {
    Operation pieces{"append in pieces", {0}, filled(1, 900), {}};
    for (uint64_t i = 2; i < 7; i++) pieces.steps.push_back(append(0, 2, 150, i));
    operations.push_back(pieces);
  }
  {  // more tails than there is memory
    Operation spilled{"append to spilled tails", numbers(36), filled(36, 37), {}};
    for (int64_t layer = 0; layer < 8; layer++) spilled.steps.push_back(append(layer, 2, 30, 2));
    operations.push_back(spilled);
  }
  operations.push_back({"flush", {0}, filled(1, 1500), {append(0, 2, 64, 2), flush()}});
  operations.push_back(
      {"attend", {0, 1}, filled(2, 1000), {attend(0, 1), attend(1, 1), attend(0, 1), attend(1, 1)}});
  operations.push_back({"attend with many queries", {0}, filled(1, 1500), {attend(0, 40)}});
  {  // each layer's summaries are made by the first step, and go on with what is appended; tiles are kept
    Operation sparse{"sparse attend", {0, 1}, filled(2, 1000), {}};
    for (uint64_t token = 2; token < 4; token++) {
      sparse.steps.push_back(attend_sparse(0, SparseKind::kPageTopK));
      sparse.steps.push_back(append(0, 2, 65, token));
      sparse.steps.push_back(attend_sparse(1, SparseKind::kAdaptive));
      sparse.steps.push_back(attend_sparse(0, SparseKind::kPageTopK));
    }
    sparse.steps.push_back(crop(0, 777));
    sparse.steps.push_back(append(0, 2, 90, 4));
    sparse.steps.push_back(attend_sparse(0, SparseKind::kPageTopK));
    operations.push_back(sparse);
    Operation guessed{"sparse attend that was guessed at", {0, 1}, filled(2, 1000), {}};
    guessed.before.push_back(attend_sparse(0, SparseKind::kPageTopK));
    guessed.before.push_back(attend_sparse(1, SparseKind::kPageTopK));
    guessed.steps = {attend_sparse(0, SparseKind::kPageTopK, Guess::kFirst),
                     attend_sparse(1, SparseKind::kPageTopK, Guess::kOnly),
                     attend_sparse(0, SparseKind::kPageTopK),
                     attend_sparse(1, SparseKind::kAdaptive, Guess::kOnly),
                     append(1, 2, 65, 2),
                     attend_sparse(1, SparseKind::kAdaptive),
                     attend_sparse(0, SparseKind::kPageTopK, Guess::kOnly),
                     crop(0, 300),
                     append(0, 2, 90, 4),
                     attend_sparse(0, SparseKind::kPageTopK)};
    operations.push_back(guessed);
    Operation kept{"sparse attend to what is summarised as it comes", {0}, created(1), {}};
    kept.before.push_back(keep_summary(0, SummaryKind::kBounds));
    kept.before.push_back(keep_summary(0, SummaryKind::kValues));
    kept.steps = {append(0, 2, 900, 2),
                  attend_sparse(0, SparseKind::kSparF),
                  append(0, 2, 150, 3),
                  reorder(0, {1, 1, 0}),
                  append(0, 3, 90, 4),
                  attend_sparse(0, SparseKind::kPageTopK),
                  attend_sparse(0, SparseKind::kSparF)};
    operations.push_back(kept);
  }
  operations.push_back({"scores", {0}, filled(1, 1500), {scores(0), scores(0)}});
  operations.push_back({"weighted_sum", {0}, filled(1, 1500), {weighted_sum(0), weighted_sum(0)}});
  operations.push_back({"read", {0}, filled(1, 1500), {read_back(0)}});
  operations.push_back(
      {"truncate, append", {0}, filled(1, 1500), {crop(0, 777), append(0, 2, 300, 2), attend(0, 1)}});
  operations.push_back(
      {"truncate to a page, append", {0}, filled(1, 1500), {crop(0, 640), append(0, 2, 1, 2)}});
  operations.push_back(
      {"trim, append", {0}, filled(1, 1500), {trim(0, 700), append(0, 2, 600, 2), attend(0, 1)}});
  operations.push_back({"reorder, append",
                        {0},
                        filled(1, 1300),
                        {reorder(0, {1, 1, 0}), append(0, 3, 50, 2), append(0, 3, 90, 3)}});
  operations.push_back({"fork, append",
                        {0, 1},
                        filled(1, 1300),
                        {fork_layer(1, 0), append(1, 2, 90, 2), append(0, 2, 30, 3), attend(1, 1)}});
  {  // reads ahead of each pass, by two workers: a pass of less than 512 KiB has one
    Operation decode{"decode", {0, 1, 2}, filled(3, 1000), {}};
    for (uint64_t token = 2; token < 6; token++) {
      for (int64_t layer = 0; layer < 3; layer++) {
        decode.steps.push_back(append(layer, 2, 1, token));
        decode.steps.push_back(attend(layer, 1));
      }
    }
    operations.push_back(decode);
  }
  {  // with reads ahead and writes of what is gone
    Operation replace{"free, fill again", {0, 1, 2}, filled(3, 1000), {}};
    for (int64_t layer = 0; layer < 3; layer++) replace.before.push_back(attend(layer, 1));
    for (int64_t layer = 0; layer < 3; layer++) replace.before.push_back(attend(layer, 1));
    replace.steps = {attend(0, 1), append(2, 2, 200, 2), create(geometry, 1), append(1, 2, 900, 3),
                     attend(1, 1)};
    operations.push_back(replace);
  }
  return operations;
}

// What a catalogue would name, and what has to be read there.
struct Committed {
  std::string path;
  Geometry geometry;
  std::vector<LayerTable> tables;
  std::vector<std::vector<float>> tokens;  // of each layer
};

// As another process finds it.
static void check_committed(const Committed& committed) {
  const Fault suspended = fault.exchange(Fault::kNone);
  DriveOptions options;
  options.directory = "unused";
  options.memory_budget_bytes = 8 << 20;
  options.durable_path = committed.path;
  options.durable_mode = DurableMode::kReadOnly;
  Drive reader(options);
  std::vector<PageEntry> entries;
  for (const LayerTable& table : committed.tables)
    entries.insert(entries.end(), table.entries.begin(), table.entries.end());
  reader.adopt({1}, {entries});
  for (size_t i = 0; i < committed.tables.size(); i++) {
    const auto layer = static_cast<int64_t>(i);
    reader.restore_layer(layer, committed.geometry, layer, committed.tables[i], 1);
    CHECK(reader.verify(layer).empty());
    std::vector<float> tokens;
    read_back(layer)(reader, &tokens);
    check_equal(tokens, committed.tokens[i], 0.0f);
  }
  fault = suspended;
}

// *last: the last that succeeded; it must be there when one fails.
static Step commit(const std::vector<int64_t>& layers, int64_t snapshot, const std::string& path,
                   const Geometry& geometry, const std::shared_ptr<Committed>& last) {
  return [=](Drive& drive, std::vector<float>*) {
    if (stat(drive, "memory_budget_bytes") != 1 << 20) return;  // not the one that is only in memory
    std::vector<LayerTable> tables;
    try {
      tables = drive.commit(snapshot, layers);
    } catch (const Error&) {
      if (!last->tables.empty()) check_committed(*last);
      throw;
    }
    *last = {path, geometry, std::move(tables), {}};
    const Fault suspended = fault.exchange(Fault::kNone);
    for (const int64_t layer : layers) {
      last->tokens.emplace_back();
      read_back(layer)(drive, &last->tokens.back());
    }
    fault = suspended;
    check_committed(*last);
  };
}

static Step check_last(const std::shared_ptr<Committed>& last) {
  return [=](Drive&, std::vector<float>*) { check_committed(*last); };
}

static Step release(int64_t snapshot) {
  return [=](Drive& drive, std::vector<float>*) { drive.release(snapshot); };
}

// ---- every one in the middle of every other ----

static const std::vector<Injection>& all_injections() {
  constexpr ErrorKind kStore = ErrorKind::kStore, kNoSpace = ErrorKind::kNoSpace;
  static const std::vector<Injection> injections = {
      {Fault::kNone, "nothing", false, {0}, kStore, nullptr, true},
      {Fault::kReadError, "a read fails", false, {0, 1, 6}, kStore, "reading", false},
      {Fault::kReadError, "reads fail", true, {0, 3}, kStore, "reading", false},
      {Fault::kWriteError, "a write fails", false, {0, 1, 5}, kStore, "writing KV pages", false},
      {Fault::kWriteError, "writes fail", true, {0, 3}, kStore, "writing KV pages", false},
      {Fault::kWriteNoSpace, "a write finds no space", false, {0, 2}, kNoSpace, "writing KV pages", false},
      {Fault::kWriteNoSpace, "writes find no space", true, {0, 3}, kNoSpace, "writing KV pages", false},
      {Fault::kReadRetryThrows, "a read, then submit throws", false, {0, 1, 6}, kStore, "injected", false},
      {Fault::kWriteRetryThrows,
       "a write, then submit throws",
       false,
       {0, 1, 5},
       kStore,
       "injected|writing KV pages",
       false},
      {Fault::kSlow, "one is slow", false, {0, 4}, kStore, nullptr, false},
      {Fault::kReordered, "all in reverse", true, {0}, kStore, nullptr, false},
      {Fault::kNeverDone, "one is never done", false, {0, 3}, kStore, "injected", false},
      {Fault::kQueueFails, "no queue", false, {0, 1}, kStore, "injected", true},
      {Fault::kQueueFails, "no queues", true, {0}, kStore, "injected", true},
      {Fault::kSubmitThrows, "submit throws", false, {0, 1, 5}, kStore, "injected", false},
      {Fault::kSubmitThrows, "submit always throws", true, {0, 3}, kStore, "injected", false},
      {Fault::kReapThrows, "reap throws", false, {0, 1, 5}, kStore, "injected", false},
      {Fault::kReapThrows, "reap always throws", true, {0, 3}, kStore, "injected", false},
      {Fault::kCalls, "short, EINTR, EAGAIN", true, {0}, kStore, nullptr, false},
      {Fault::kUringRefused, "io_uring refused", true, {0, 2, 9}, kStore, nullptr, true},
      {Fault::kGrowNoSpace, "full", true, {0, 1}, kNoSpace, "growing the file", true},
      {Fault::kGrowNoSpace, "full for a moment", false, {0, 1}, kNoSpace, "growing the file", true},
      {Fault::kGrowError, "cannot grow", true, {0, 1}, kStore, "growing the file", true},
      {Fault::kGrowInterrupted, "growing is interrupted", false, {0}, kStore, nullptr, true},
      {Fault::kGrowUnsupported, "no fallocate", true, {0}, kStore, nullptr, true},
      {Fault::kGrowUnsupportedNoSpace,
       "no fallocate, full",
       true,
       {0, 1},
       kNoSpace,
       "growing the file",
       true},
      {Fault::kSyncError, "fdatasync fails", false, {0}, kStore, "fdatasync", false},
  };
  return injections;
}

// An error that this fault may lead to.
static void check_error(const Error& error, const Injection& injection) {
  const std::string text = error.what();
  bool expected = false;
  bool placed = injection.fault == Fault::kSyncError || text.find("injected") != std::string::npos ||
                (text.find("/") != std::string::npos && text.find("byte") != std::string::npos);
  if (injection.text != nullptr) {
    const std::string texts = injection.text;
    const size_t bar = texts.find('|');
    expected = error.kind() == injection.kind &&
               (text.find(texts.substr(0, bar)) != std::string::npos ||
                (bar != std::string::npos && text.find(texts.substr(bar + 1)) != std::string::npos));
  }
  if (!expected || !placed) std::fprintf(stderr, "%s: unexpected: %s\n", current_case.c_str(), error.what());
  CHECK(expected && placed);
}

static bool throws(ErrorKind kind, const std::string& text, const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    return error.kind() == kind && std::strstr(error.what(), text.c_str()) != nullptr;
  }
  return false;
}

static int64_t error_count = 0;

// Whether the fault came about.
static bool run_case(Pair* pair, const Operation& operation, const Injection& injection, int64_t at) {
  if (injection.fresh) pair->renew();
  for (const Step& step : operation.before) pair->run(step);
  arm(injection, at);
  size_t done = 0;
  bool failed = false;
  try {
    for (; done < operation.steps.size(); done++) pair->run(operation.steps[done]);
  } catch (const Error& error) {
    failed = true;
    check_error(error, injection);
  }
  const bool came = fault_hits > 0;
  if (failed && injection.fault == Fault::kNeverDone) {
    // It may still be done at any moment: nobody else has been given its memory or its place meanwhile.
    const auto try_to = [&](const Step& step) {
      try {
        pair->run(step);
        return true;
      } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::kClosed || std::strstr(error.what(), "injected") != nullptr);
        return false;
      }
    };
    for (int round = 0; round < 2; round++) {
      for (const int64_t layer : operation.layers) try_to(attend(layer, 1));
      if (done < operation.steps.size() && try_to(operation.steps[done])) done++;
    }
  }
  fault = Fault::kNone;
  if (failed) {
    CHECK(came);
    error_count++;
  }
  // Writes that failed behind somebody's back are told of once.
  for (int told = 0;; told++) {
    try {
      pair->faulty().flush();
      break;
    } catch (const Error& error) {
      CHECK(told == 0);
      check_error(error, injection);
    }
  }
  if (!failed) {
    pair->check_layers(operation.layers);
  } else {
    std::vector<int64_t> there;  // already, or still
    for (const int64_t layer : operation.layers) {
      try {
        pair->faulty().info(layer);
        there.push_back(layer);
      } catch (const Error&) {
        CHECK(done < operation.steps.size());
      }
    }
    pair->check_layers(there);
    if (injection.fault == Fault::kSyncError) {  // what is lost is not known, so commits go on failing
      CHECK(throws(ErrorKind::kStore, "an earlier fdatasync failed",
                   [&] { pair->run(operation.steps[done]); }));
      pair->renew();
      pair->forget(operation.layers);
      return came;
    }
    for (; done < operation.steps.size(); done++) pair->run(operation.steps[done]);
    pair->check_layers(operation.layers);
  }
  pair->drop(operation.layers);
  return came;
}

static int64_t run_all(const std::string& directory, const Setting& setting,
                       const std::vector<std::string>& only, std::map<std::string, int64_t>* came) {
  Geometry geometry;
  geometry.num_kv_heads = kHeads;
  geometry.head_dim_k = kDimK;
  geometry.head_dim_v = kDimV;
  geometry.dtype = DType::kBFloat16;
  geometry.code_bits = setting.code_bits;
  std::vector<Operation> operations = all_operations(geometry);
  if (setting.durable) {
    operations.clear();
    const std::string path = directory + "/pages";
    const auto last = std::make_shared<Committed>();
    const auto none = [last](Drive&, std::vector<float>*) { last->tables.clear(); };
    Operation commits{"commit", {0, 1}, {none, create(geometry, 0), create(geometry, 1)}, {}};
    commits.before.push_back(append(0, 2, 300, 1));
    commits.before.push_back(append(1, 2, 900, 1));
    const auto commit_both = [&](int64_t snapshot) { return commit({0, 1}, snapshot, path, geometry, last); };
    commits.steps = {
        commit_both(1), append(0, 2, 500, 2), check_last(last),    commit_both(2),   release(1),
        crop(1, 200),   append(1, 2, 900, 3), append(0, 2, 30, 3), check_last(last), commit_both(3),
        release(2),     append(1, 2, 300, 4), check_last(last),    release(3)};
    operations.push_back(commits);
  }
  Pair pair(directory, setting);
  int64_t count = 0;
  for (const Operation& operation : operations) {
    for (const Injection& injection : all_injections()) {
      if (injection.fault == Fault::kUringRefused && setting.engine != "io_uring") continue;
      for (const int64_t at : injection.ats) {
        current_case =
            setting.name + ", " + operation.name + ", " + injection.name + " (" + std::to_string(at) + ")";
        const bool wanted = std::any_of(only.begin(), only.end(), [](const std::string& part) {
          return current_case.find(part) != std::string::npos;
        });
        if (!only.empty() && !wanted) continue;
        if (!only.empty()) std::fprintf(stderr, "%s\n", current_case.c_str());
        try {
          if (run_case(&pair, operation, injection, at)) (*came)[injection.name]++;
        } catch (const Error& error) {
          std::fprintf(stderr, "%s: %s\n", current_case.c_str(), error.what());
          CHECK(!"an error although nothing is wrong any more");
        }
        count++;
      }
    }
  }
  return count;
}

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: test_faults DIRECTORY [CASES]...\n");
    return 2;
  }
  const std::string directory = argv[1];
  const std::vector<std::string> only(argv + 2, argv + argc);
  std::vector<std::string> engines = {"pread"};
  try {
    if (io_uring_compiled()) {
      make_io_engine("io_uring", 1);
      engines.push_back("io_uring");
    }
  } catch (const Error& refused) {
    std::printf("io_uring not tested: %s\n", refused.what());
  }
  std::map<std::string, int64_t> came;
  for (const std::string& engine : engines) {
    for (const Setting& setting : {Setting{engine + ", bf16", engine, 0, true, false},
                                   Setting{engine + ", int4", engine, 4, true, false},
                                   Setting{engine + ", int4, not resident", engine, 4, false, false},
                                   Setting{engine + ", bf16, durable", engine, 0, true, true}}) {
      const auto start = std::chrono::steady_clock::now();
      const int64_t count = run_all(directory, setting, only, &came);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      std::printf("%-32s %5lld cases, %.1f s\n", setting.name.c_str(), static_cast<long long>(count),
                  seconds.count());
      std::fflush(stdout);
    }
  }
  for (const auto& [name, count] : came)
    std::printf("  %-26s came about in %lld cases\n", name.c_str(), static_cast<long long>(count));
  if (only.empty()) {
    for (const Injection& injection : all_injections()) {
      const bool possible =
          injection.fault != Fault::kNone && (injection.fault != Fault::kUringRefused || engines.size() == 2);
      current_case = injection.name;
      CHECK(!possible || came[injection.name] > 0);
    }
  }
  std::printf("%lld ended in an error, and went well when it was over\nok\n",
              static_cast<long long>(error_count));
  return 0;
}
