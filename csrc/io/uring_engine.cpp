// io_uring through liburing: one ring per queue, no thread of our own. When the kernel stops taking our
// calls, the pread engine carries on.
#ifdef CSD_HAVE_LIBURING

#include <liburing.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/own_descriptors.h"
#include "io/engines.h"
#include "io/transfer.h"

namespace csd {
namespace {

// No IORING_SETUP_SINGLE_ISSUER: it ties the ring to the thread that made it, and ours may change threads
// between calls (EEXIST then). No IORING_SETUP_COOP_TASKRUN: a completion would wait until the thread that
// submitted enters the kernel, although another one may be waiting for it. Both save interrupts that 1 MiB
// requests do not notice.
constexpr unsigned kSetupFlags = 0;

// With nothing completed for so long, what the kernel has not begun is taken back and asked for again: Linux
// 6.18 was seen to keep a write in its work queue with no thread left to take it, for good. (Since then the
// threads exit when a task has closed its last ring, see liburing's pull request 1529.) A drive that is only
// slow loses nothing by it.
constexpr __kernel_timespec kPatience{1, 0};

// How long requests are awaited that a ring holds which we can no longer ask (io.h says what happens then).
// Longer than the kernel gives an NVMe drive to answer (nvme_core.io_timeout, 30 s).
constexpr std::chrono::seconds kHeldPatience{60};

// user_data of a request to take others back; theirs are slots.
constexpr uint64_t kNoSlot = uint64_t{1} << 32;

// One READ_FIXED moves at most this; the rest follows as after a short transfer.
constexpr size_t kFixedBytesMax = size_t{1} << 30;

// Why the kernel refused a ring, and what can be done about it.
std::string setup_failure_text(int errno_value) {
  std::string text = std::string("io_uring_setup: ") + std::strerror(errno_value);
  if (errno_value == ENOSYS) {
    text += " (a kernel before 5.1, or a container that hides the call)";
  } else if (errno_value == EPERM || errno_value == EACCES) {
    std::string disabled = "0";
    std::ifstream("/proc/sys/kernel/io_uring_disabled") >> disabled;
    text += disabled == "0"
                ? " (a seccomp filter, as containers have it: allow io_uring_setup, io_uring_enter and "
                  "io_uring_register)"
                : " (sysctl kernel.io_uring_disabled=" + disabled + ")";
  } else if (errno_value == ENOMEM) {
    text += " (locked memory, which kernels before 5.12 charge rings to: raise ulimit -l)";
  }
  return text;
}

std::string enter_failure_text(const std::string& what, int errno_value) {
  std::string text = "io_uring_enter, " + what + ": " + std::strerror(errno_value);
  if (errno_value == EPERM || errno_value == EACCES || errno_value == ENOSYS) {
    text += " (a seccomp filter?)";
  }
  return text;
}

struct Refused {
  std::string why;
};

void open_ring(int depth, io_uring* ring) {
  const int result = io_uring_queue_init(static_cast<unsigned>(depth), ring, kSetupFlags);
  if (result < 0) throw Refused{setup_failure_text(-result)};
  // A ring keeps the file that is registered with it. In a forked child neither descriptor nor mapping stays.
  keep_from_children(ring->ring_fd);
  io_uring_ring_dontfork(ring);
}

void close_ring(io_uring* ring) {
  forget_descriptor(ring->ring_fd);
  io_uring_queue_exit(ring);
}

bool passing(int errno_value) {
  return errno_value == EINTR || errno_value == EAGAIN || errno_value == EBUSY;
}

// The pread engine, made when the first queue of an io_uring engine is refused, and why. Thread-safe.
class Successor {
 public:
  explicit Successor(int thread_count) : thread_count_(thread_count) {}

  // Null while io_uring works.
  const char* reason() const { return reason_.load(std::memory_order_acquire); }

  // The first reason is the one that is kept.
  IoEngine* take_over(const std::string& why) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (engine_ == nullptr) {
      engine_ = make_pread_engine(thread_count_);
      why_ = why;
      reason_.store(why_.c_str(), std::memory_order_release);
    }
    return engine_.get();
  }

 private:
  const int thread_count_;
  std::mutex mutex_;
  std::unique_ptr<IoEngine> engine_;
  std::string why_;
  std::atomic<const char*> reason_{nullptr};
};

class UringQueue : public IoQueue {
 public:
  // Throws Refused.
  UringQueue(Successor* successor, int fd, int depth, const std::vector<iovec>& buffers)
      : successor_(*successor),
        fd_(fd),
        alignment_bytes_(resume_alignment_bytes(fd)),
        transfers_(static_cast<size_t>(depth)) {
    for (int slot = depth - 1; slot >= 0; slot--) free_slots_.push_back(slot);
    open_ring(2 * depth, &ring_);  // for a request of each slot, and one that takes it back
    file_registered_ = fd_ >= 0 && io_uring_register_files(&ring_, &fd_, 1) == 0;
    // ENOMEM where RLIMIT_MEMLOCK is small (8 MiB for ordinary users): requests then name their memory.
    if (!buffers.empty() &&
        io_uring_register_buffers(&ring_, buffers.data(), static_cast<unsigned>(buffers.size())) == 0) {
      registered_ = buffers;
    }
  }

  ~UringQueue() override {
    bool refused = moved_to_ != nullptr;
    while (held_by_kernel() > 0) {
      if (!refused) {
        const int result = wait_for_one();
        refused = result < 0 && !passing(-result);
        if (refused) give_up_at_ = std::chrono::steady_clock::now() + kHeldPatience;
      } else if (std::chrono::steady_clock::now() < give_up_at_) {
        Transfer::nap();
      } else {
        break;
      }
      io_uring_cqe* cqe = nullptr;
      while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
        const uint64_t tag = io_uring_cqe_get_data64(cqe);
        if (tag != kNoSlot) free_slots_.push_back(static_cast<int>(tag));
        io_uring_cqe_seen(&ring_, cqe);
      }
    }
    // Closing a ring leaves this to a kernel thread: the file's space and the locked memory would come back
    // late. (It waits for requests that use them, so not where those were given up.)
    if (held_by_kernel() == 0) {
      if (!registered_.empty()) io_uring_unregister_buffers(&ring_);
      if (file_registered_) io_uring_unregister_files(&ring_);
    }
    close_ring(&ring_);
  }

  void submit(const IoRequest& request) override {
    CSD_CHECK(in_flight() < depth(), "I/O queue: more than depth() requests in flight");
    if (is_refused()) {
      moved_to_->submit(request);
      return;
    }
    const int slot = free_slots_.back();
    transfers_[static_cast<size_t>(slot)].start(
        request, request.fd < 0 ? alignment_bytes_ : resume_alignment_bytes(request.fd));
    prepare(slot, 0);
    free_slots_.pop_back();
    push();  // if that is refused, the next reap moves it
  }

  void reap(bool wait, std::vector<IoCompletion>* completions) override {
    CSD_CHECK(!wait || in_flight() > 0, "I/O queue: waiting for a completion with nothing in flight");
    const size_t count_before = completions->size();
    int refusals = 0;
    if (!is_refused()) push_or_move();
    collect(completions);
    while (wait && completions->size() == count_before && moved_to_ == nullptr) {
      push_or_move();
      if (moved_to_ != nullptr) break;
      if (held_by_kernel() == 0) {  // it takes none at the moment (EAGAIN): a passing shortage of memory
        if (++refusals > kRefusalsMax) move(enter_failure_text("for one second", EAGAIN));
        Transfer::nap();
        continue;
      }
      const int result = wait_for_one();
      if (result < 0 && !passing(-result)) move(enter_failure_text("waiting for a completion", -result));
      collect(completions);
    }
    if (moved_to_ != nullptr) reap_moved(wait && completions->size() == count_before, completions);
  }

  int in_flight() const override {
    return slots_in_use() + (moved_to_ != nullptr ? moved_to_->in_flight() : 0);
  }
  int depth() const override { return static_cast<int>(transfers_.size()); }

 private:
  static constexpr int kRefusalsMax = 1000;  // of one millisecond each

  int slots_in_use() const { return depth() - static_cast<int>(free_slots_.size()); }

  int held_by_kernel() const {
    if (moved_to_ != nullptr) return slots_in_use();
    return slots_in_use() - (static_cast<int>(io_uring_sq_ready(&ring_)) - unsent_cancels_);
  }

  // Whether requests go to pread: because this queue was refused, or another one of the engine.
  bool is_refused() {
    if (moved_to_ == nullptr && successor_.reason() != nullptr) move({});
    return moved_to_ != nullptr;
  }

  // From now on requests go to pread, and first of all those that stand in the submission ring: the kernel
  // has not taken them, and will not, since nobody enters it for this ring again.
  void move(const std::string& why) {
    moved_to_ = successor_.take_over(why)->make_queue(fd_, depth(), {});
    give_up_at_ = std::chrono::steady_clock::now() + kHeldPatience;
    const unsigned mask = *ring_.sq.kring_mask;
    for (unsigned i = *ring_.sq.khead; i != ring_.sq.sqe_tail; i++) {
      const uint64_t tag = ring_.sq.sqes[i & mask].user_data;
      if (tag != kNoSlot) hand_over(static_cast<int>(tag));
    }
  }

  void hand_over(int slot) {
    moved_to_->submit(transfers_[static_cast<size_t>(slot)].rest());
    free_slots_.push_back(slot);
  }

  // What the kernel holds comes to the completion ring without a call, at worst by an interrupt to the thread
  // that submitted it; and nothing tells when, so it is looked at once a millisecond.
  void reap_moved(bool wait, std::vector<IoCompletion>* completions) {
    const size_t count_before = completions->size();
    for (;;) {
      const bool given_up = slots_in_use() > 0 && std::chrono::steady_clock::now() >= give_up_at_;
      const bool none_else = slots_in_use() == 0 || given_up;
      moved_to_->reap(wait && none_else && moved_to_->in_flight() > 0, completions);
      if (!wait || completions->size() > count_before) return;
      if (given_up) {
        throw Error(ErrorKind::kStore,
                    "io_uring: " + std::to_string(slots_in_use()) + " requests did not complete within " +
                        std::to_string(kHeldPatience.count()) +
                        " s after the kernel refused to be asked for them (" + successor_.reason() +
                        "); their memory cannot be used again: close the store");
      }
      Transfer::nap();
      collect(completions);
      if (completions->size() > count_before) return;
    }
  }

  // The index of the registered buffer that holds all of the segment, or -1.
  int registered_index(const iovec& segment) const {
    const char* begin = static_cast<const char*>(segment.iov_base);
    for (size_t i = 0; i < registered_.size(); i++) {
      const char* base = static_cast<const char*>(registered_[i].iov_base);
      if (begin >= base && begin + segment.iov_len <= base + registered_[i].iov_len)
        return static_cast<int>(i);
    }
    return -1;
  }

  // A slot has at most one entry in the ring, and the ring has an entry for each slot.
  void prepare(int slot, unsigned sqe_flags) {
    const Transfer& transfer = transfers_[slot];
    const bool reads = transfer.op() == IoOp::kRead;
    const bool registered = file_registered_ && transfer.fd() < 0;
    const int fd = registered ? 0 : transfer.fd() < 0 ? fd_ : transfer.fd();
    const uint64_t offset = static_cast<uint64_t>(transfer.file_offset());
    const int buffer = transfer.segment_count() == 1 ? registered_index(*transfer.segments()) : -1;
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    CSD_CHECK(sqe != nullptr, "io_uring: the submission ring is full");
    if (buffer >= 0) {
      const iovec& segment = *transfer.segments();
      const unsigned bytes = static_cast<unsigned>(std::min(segment.iov_len, kFixedBytesMax));
      if (reads) {
        io_uring_prep_read_fixed(sqe, fd, segment.iov_base, bytes, offset, buffer);
      } else {
        io_uring_prep_write_fixed(sqe, fd, segment.iov_base, bytes, offset, buffer);
      }
    } else {
      const unsigned count = static_cast<unsigned>(transfer.segment_count());
      if (reads) {
        io_uring_prep_readv(sqe, fd, transfer.segments(), count, offset);
      } else {
        io_uring_prep_writev(sqe, fd, transfer.segments(), count, offset);
      }
    }
    io_uring_sqe_set_flags(sqe, sqe_flags | (registered ? IOSQE_FIXED_FILE : 0));
    io_uring_sqe_set_data64(sqe, static_cast<uint64_t>(slot));
  }

  // Hands the kernel all prepared entries. What it does not take now stays in the ring for the next push. A
  // negative errno value when it will never take any.
  int push() {
    while (io_uring_sq_ready(&ring_) > 0) {
      const int result = io_uring_submit(&ring_);
      if (result < 0 && !passing(-result)) return result;
      unsent_cancels_ = std::max(0, unsent_cancels_ - std::max(0, result));  // they are the first in the ring
      if (result <= 0 && result != -EINTR) break;
    }
    return 0;
  }

  void push_or_move() {
    const int result = push();
    if (result < 0) move(enter_failure_text("submitting a request", -result));
  }

  // Returns when there may be a completion, or a negative errno value.
  int wait_for_one() {
    io_uring_cqe* cqe = nullptr;
    if ((ring_.features & IORING_FEAT_EXT_ARG) == 0) return io_uring_wait_cqe(&ring_, &cqe);  // before 5.11
    __kernel_timespec patience = kPatience;
    const int result = io_uring_wait_cqe_timeout(&ring_, &cqe, &patience);
    return result == -ETIME ? take_back_unbegun() : result;
  }

  // Each comes back as ECANCELED, after which a transfer tries again; what has begun goes on.
  int take_back_unbegun() {
    if (io_uring_sq_ready(&ring_) > 0) return 0;  // the kernel takes none at the moment
    std::vector<uint8_t> is_free(transfers_.size(), 0);
    for (const int slot : free_slots_) is_free[static_cast<size_t>(slot)] = 1;
    for (size_t slot = 0; slot < transfers_.size(); slot++) {
      if (is_free[slot] != 0) continue;
      io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
      // io_uring_prep_cancel() takes its argument as a pointer or as a number, depending on the version.
      io_uring_prep_rw(IORING_OP_ASYNC_CANCEL, sqe, -1, reinterpret_cast<const void*>(slot), 0, 0);
      io_uring_sqe_set_data64(sqe, kNoSlot);
      unsent_cancels_++;
    }
    return push();
  }

  // Takes all completions that are there; what is not finished goes back to the kernel, or to pread.
  void collect(std::vector<IoCompletion>* completions) {
    bool wants_nap = false;
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      if (io_uring_cqe_get_data64(cqe) == kNoSlot) {
        io_uring_cqe_seen(&ring_, cqe);
        continue;
      }
      const int slot = static_cast<int>(io_uring_cqe_get_data64(cqe));
      Transfer& transfer = transfers_[static_cast<size_t>(slot)];
      const Transfer::Step step = transfer.advance(cqe->res);
      io_uring_cqe_seen(&ring_, cqe);
      if (step == Transfer::Step::kFinished) {
        completions->push_back({transfer.tag(), transfer.error()});
        free_slots_.push_back(slot);
      } else if (moved_to_ != nullptr) {
        hand_over(slot);
      } else if (step == Transfer::Step::kResume) {
        prepare(slot, 0);
      } else {
        // From the kernel's work queue the request may block, and has no reason to say EAGAIN again.
        prepare(slot, IOSQE_ASYNC);
        wants_nap |= transfer.wants_nap();
      }
    }
    if (moved_to_ != nullptr) return;
    if (wants_nap) Transfer::nap();  // one for all of them
    push_or_move();
  }

  Successor& successor_;
  const int fd_;
  const int64_t alignment_bytes_;
  io_uring ring_{};
  bool file_registered_ = false;
  std::vector<iovec> registered_;    // empty where registering failed
  std::vector<Transfer> transfers_;  // one per slot, as many as the depth
  std::vector<int> free_slots_;
  int unsent_cancels_ = 0;  // prepared, not handed to the kernel yet
  // Null while io_uring works; afterwards slots are only those of requests that the kernel holds.
  std::unique_ptr<IoQueue> moved_to_;
  std::chrono::steady_clock::time_point give_up_at_;  // on those
};

class UringEngine : public IoEngine {
 public:
  explicit UringEngine(int thread_count) : successor_(thread_count) {
    // A trial ring, so that a refusal is known here and not at the first queue.
    io_uring ring;
    try {
      open_ring(1, &ring);
    } catch (const Refused& refused) {
      throw Error(ErrorKind::kStore, refused.why);
    }
    close_ring(&ring);
  }

  const char* name() const override { return successor_.reason() == nullptr ? "io_uring" : "pread"; }
  const char* fallback_reason() const override { return successor_.reason(); }

  std::unique_ptr<IoQueue> make_queue(int fd, int depth, const std::vector<iovec>& buffers) override {
    CSD_CHECK(depth > 0, "I/O queue: depth must be positive");
    try {
      if (successor_.reason() == nullptr)
        return std::make_unique<UringQueue>(&successor_, fd, depth, buffers);
    } catch (const Refused& refused) {
      return successor_.take_over(refused.why)->make_queue(fd, depth, buffers);
    }
    return successor_.take_over({})->make_queue(fd, depth, buffers);
  }

 private:
  Successor successor_;
};

}  // namespace

std::unique_ptr<IoEngine> make_uring_engine(int thread_count) {
  return std::make_unique<UringEngine>(thread_count);
}

}  // namespace csd

#endif  // CSD_HAVE_LIBURING
