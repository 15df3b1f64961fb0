// io_uring through liburing: one ring per queue, no thread of our own.
#ifdef CSD_HAVE_LIBURING

#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
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

void open_ring(int depth, io_uring* ring) {
  const int result = io_uring_queue_init(static_cast<unsigned>(depth), ring, kSetupFlags);
  if (result < 0) throw Error(ErrorKind::kStore, setup_failure_text(-result));
}

bool passing(int errno_value) {
  return errno_value == EINTR || errno_value == EAGAIN || errno_value == EBUSY;
}

class UringQueue : public IoQueue {
 public:
  UringQueue(int fd, int depth, const std::vector<iovec>& buffers)
      : fd_(fd), alignment_bytes_(resume_alignment_bytes(fd)), transfers_(depth) {
    for (int slot = depth - 1; slot >= 0; slot--) free_slots_.push_back(slot);
    open_ring(2 * depth, &ring_);  // for a request of each slot, and one that takes it back
    file_registered_ = io_uring_register_files(&ring_, &fd_, 1) == 0;
    // ENOMEM where RLIMIT_MEMLOCK is small (8 MiB for ordinary users): requests then name their memory.
    if (!buffers.empty() &&
        io_uring_register_buffers(&ring_, buffers.data(), static_cast<unsigned>(buffers.size())) == 0) {
      registered_ = buffers;
    }
  }

  ~UringQueue() override {
    while (held_by_kernel() > 0) {
      const int result = wait_for_one();
      if (result < 0 && !passing(-result)) break;
      io_uring_cqe* cqe = nullptr;
      while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
        const uint64_t tag = io_uring_cqe_get_data64(cqe);
        if (tag != kNoSlot) free_slots_.push_back(static_cast<int>(tag));
        io_uring_cqe_seen(&ring_, cqe);
      }
    }
    // Closing a ring leaves this to a kernel thread: the file's space and the locked memory would come back
    // late.
    if (!registered_.empty()) io_uring_unregister_buffers(&ring_);
    if (file_registered_) io_uring_unregister_files(&ring_);
    io_uring_queue_exit(&ring_);
  }

  void submit(const IoRequest& request) override {
    CSD_CHECK(!free_slots_.empty(), "I/O queue: more than depth() requests in flight");
    const int slot = free_slots_.back();
    transfers_[slot].start(request, alignment_bytes_);
    prepare(slot, 0);
    free_slots_.pop_back();
    push();
  }

  void reap(bool wait, std::vector<IoCompletion>* completions) override {
    CSD_CHECK(!wait || in_flight() > 0, "I/O queue: waiting for a completion with nothing in flight");
    const size_t count_before = completions->size();
    int refusals = 0;
    push();
    collect(completions);
    while (wait && completions->size() == count_before) {
      push();
      if (held_by_kernel() == 0) {  // it takes none at the moment (EAGAIN): a passing shortage of memory
        if (++refusals > kRefusalsMax) throw io_error("io_uring", "io_uring_enter, for one second", EAGAIN);
        Transfer::nap();
        continue;
      }
      const int result = wait_for_one();
      if (result < 0 && !passing(-result)) throw io_error("io_uring", "waiting for a completion", -result);
      collect(completions);
    }
  }

  int in_flight() const override { return depth() - static_cast<int>(free_slots_.size()); }
  int depth() const override { return static_cast<int>(transfers_.size()); }

 private:
  static constexpr int kRefusalsMax = 1000;  // of one millisecond each

  int held_by_kernel() const {
    return in_flight() - (static_cast<int>(io_uring_sq_ready(&ring_)) - unsent_cancels_);
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
    const int fd = file_registered_ ? 0 : fd_;
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
    io_uring_sqe_set_flags(sqe, sqe_flags | (file_registered_ ? IOSQE_FIXED_FILE : 0));
    io_uring_sqe_set_data64(sqe, static_cast<uint64_t>(slot));
  }

  // Hands the kernel all prepared entries. What it does not take now stays in the ring for the next push.
  void push() {
    while (io_uring_sq_ready(&ring_) > 0) {
      const int result = io_uring_submit(&ring_);
      if (result < 0 && !passing(-result)) throw io_error("io_uring", "submitting a request", -result);
      unsent_cancels_ = std::max(0, unsent_cancels_ - std::max(0, result));  // they are the first in the ring
      if (result <= 0 && result != -EINTR) return;
    }
  }

  // Returns when there may be a completion, or a negative errno value.
  int wait_for_one() {
    io_uring_cqe* cqe = nullptr;
    if ((ring_.features & IORING_FEAT_EXT_ARG) == 0) return io_uring_wait_cqe(&ring_, &cqe);  // before 5.11
    __kernel_timespec patience = kPatience;
    const int result = io_uring_wait_cqe_timeout(&ring_, &cqe, &patience);
    if (result != -ETIME) return result;
    take_back_unbegun();
    return 0;
  }

  // Each comes back as ECANCELED, after which a transfer tries again; what has begun goes on.
  void take_back_unbegun() {
    if (io_uring_sq_ready(&ring_) > 0) return;  // the kernel takes none at the moment
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
    push();
  }

  // Takes all completions that are there; what is not finished goes back to the kernel.
  void collect(std::vector<IoCompletion>* completions) {
    bool wants_nap = false;
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
      if (io_uring_cqe_get_data64(cqe) == kNoSlot) {
        io_uring_cqe_seen(&ring_, cqe);
        continue;
      }
      const int slot = static_cast<int>(io_uring_cqe_get_data64(cqe));
      Transfer& transfer = transfers_[slot];
      const Transfer::Step step = transfer.advance(cqe->res);
      io_uring_cqe_seen(&ring_, cqe);
      if (step == Transfer::Step::kFinished) {
        completions->push_back({transfer.tag(), transfer.error()});
        free_slots_.push_back(slot);
      } else if (step == Transfer::Step::kResume) {
        prepare(slot, 0);
      } else {
        // From the kernel's work queue the request may block, and has no reason to say EAGAIN again.
        prepare(slot, IOSQE_ASYNC);
        wants_nap |= transfer.wants_nap();
      }
    }
    if (wants_nap) Transfer::nap();  // one for all of them
    push();
  }

  const int fd_;
  const int64_t alignment_bytes_;
  io_uring ring_{};
  bool file_registered_ = false;
  std::vector<iovec> registered_;    // empty where registering failed
  std::vector<Transfer> transfers_;  // one per slot, as many as the depth
  std::vector<int> free_slots_;
  int unsent_cancels_ = 0;  // prepared, not handed to the kernel yet
};

class UringEngine : public IoEngine {
 public:
  UringEngine() {
    // A trial ring, so that a refusal is known here and not at the first queue.
    io_uring ring;
    open_ring(1, &ring);
    io_uring_queue_exit(&ring);
  }

  const char* name() const override { return "io_uring"; }

  std::unique_ptr<IoQueue> make_queue(int fd, int depth, const std::vector<iovec>& buffers) override {
    CSD_CHECK(depth > 0, "I/O queue: depth must be positive");
    return std::make_unique<UringQueue>(fd, depth, buffers);
  }
};

}  // namespace

std::unique_ptr<IoEngine> make_uring_engine() { return std::make_unique<UringEngine>(); }

}  // namespace csd

#endif  // CSD_HAVE_LIBURING
