// What is left of one request while an engine carries it out. Pure bookkeeping: both engines ask the kernel
// for segments() at file_offset() and hand the kernel's answer to advance(), until it says that the request
// is over.
#pragma once

#include <fcntl.h>
#include <limits.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "base/types.h"
#include "io/io.h"

namespace csd {

class Transfer {
 public:
  enum class Step {
    kFinished,  // error() says how
    kResume,    // part of it moved: ask for the rest
    kRetry,     // nothing moved, for a passing reason: ask again; patience() says whether to nap first
  };

  // alignment_bytes: where a transfer may be resumed, see resume_alignment_bytes().
  void start(const IoRequest& request, int64_t alignment_bytes) {
    op_ = request.op;
    tag_ = request.tag;
    background_ = request.background;
    fd_ = request.fd;
    file_offset_ = request.file_offset;
    alignment_bytes_ = alignment_bytes;
    segments_.assign(request.segments, request.segments + request.segment_count);
    first_segment_ = 0;
    remaining_bytes_ = 0;
    for (const iovec& segment : segments_) remaining_bytes_ += static_cast<int64_t>(segment.iov_len);
    least_bytes_ =
        request.least_bytes > 0 ? std::min(request.least_bytes, remaining_bytes_) : remaining_bytes_;
    unaligned_bytes_ = 0;
    retry_count_ = 0;
    error_ = 0;
  }

  IoOp op() const { return op_; }
  uint64_t tag() const { return tag_; }
  int error() const { return error_; }
  int fd() const { return fd_; }  // -1: the queue's own
  int64_t file_offset() const { return file_offset_; }
  const iovec* segments() const { return segments_.data() + first_segment_; }
  // The kernel takes IOV_MAX segments at once; the others follow as after a short transfer.
  int segment_count() const {
    return static_cast<int>(std::min<size_t>(segments_.size() - first_segment_, IOV_MAX));
  }

  // What is left of the request, for another queue: valid while this is neither started anew nor advanced.
  IoRequest rest() const {
    IoRequest request;
    request.op = op_;
    request.file_offset = file_offset_;
    request.segments = segments();
    request.segment_count = static_cast<int>(segments_.size() - first_segment_);
    request.tag = tag_;
    request.background = background_;
    request.fd = fd_;
    request.least_bytes = least_bytes_;
    return request;
  }

  // result: bytes moved by the last call, or a negative errno value.
  Step advance(int64_t result) {
    if (result < 0) {
      const int errno_value = static_cast<int>(-result);
      // ECANCELED: io_uring drops what a thread left in the kernel's work queue when that thread exits, and
      // what was taken back from there.
      const bool passing = errno_value == EINTR || errno_value == EAGAIN || errno_value == ECANCELED;
      if (passing && ++retry_count_ <= kRetryLimit) return Step::kRetry;
      error_ = errno_value;
      return Step::kFinished;
    }
    if (result >= least_bytes_) return Step::kFinished;
    // The bytes beyond the last boundary were moved before and nothing came after them: a file that ends
    // inside a block answers the same however often it is asked.
    if (result <= unaligned_bytes_) {
      error_ = EIO;
      return Step::kFinished;
    }
    // Re-align each round: a short O_DIRECT transfer may end mid-block, and a request that starts there is
    // EINVAL.
    unaligned_bytes_ = result % alignment_bytes_;
    drop_front(result - unaligned_bytes_);
    retry_count_ = 0;
    return Step::kResume;
  }

  // False for the first few retries; after those a nap, so that a queue that is refused never spins.
  bool wants_nap() const { return retry_count_ > kEagerRetries; }

  static void nap() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

 private:
  static constexpr int kEagerRetries = 8;
  static constexpr int kRetryLimit = 1000;  // with the naps about one second without progress

  void drop_front(int64_t bytes) {
    file_offset_ += bytes;
    remaining_bytes_ -= bytes;
    least_bytes_ -= bytes;
    while (bytes > 0) {
      iovec& segment = segments_[first_segment_];
      const int64_t step = std::min<int64_t>(bytes, static_cast<int64_t>(segment.iov_len));
      segment.iov_base = static_cast<char*>(segment.iov_base) + step;
      segment.iov_len -= static_cast<size_t>(step);
      bytes -= step;
      if (segment.iov_len == 0) first_segment_++;
    }
  }

  IoOp op_ = IoOp::kRead;
  uint64_t tag_ = 0;
  bool background_ = false;
  int error_ = 0;
  int fd_ = -1;
  int64_t file_offset_ = 0;
  int64_t alignment_bytes_ = 1;
  int64_t remaining_bytes_ = 0;
  int64_t least_bytes_ = 0;      // of those, what must still come
  int64_t unaligned_bytes_ = 0;  // moved beyond file_offset() by the last call, to be moved again
  int retry_count_ = 0;          // since something moved
  std::vector<iovec> segments_;  // a copy: the caller's are never changed
  size_t first_segment_ = 0;
};

// A request on a direct file must start on a block, so it is resumed on one; any byte will do otherwise.
inline int64_t resume_alignment_bytes(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && (flags & O_DIRECT) != 0 ? kBlockBytes : 1;
}

}  // namespace csd
