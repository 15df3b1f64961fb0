// The drive's I/O engine, lent to others: reads and writes between the drive's file and memory that is not
// the drive's. Knows nothing of pages.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io/io.h"

namespace csd {

// One range of the file and one of memory. Offset, address and count are multiples of kBlockBytes.
struct SlabRequest {
  bool write = false;
  int64_t file_offset = 0;
  void* memory = nullptr;
  int64_t byte_count = 0;
  int64_t tag = 0;  // comes back in the completion
};

struct SlabCompletion {
  int64_t tag = 0;
  int error = 0;  // 0, or an errno value; EIO was tried twice
};

// A queue of a drive's own engine, without the drive's lock: attention runs while a caller waits here.
// Thread-safe: one call at a time. The drive closes it before it goes itself; every call after that throws
// kClosed, and every call in a forked child kForked.
class SlabQueue {
 public:
  // owner: what a request's memory belongs to; let go of when the request is reaped.
  using Owner = std::shared_ptr<const void>;

  SlabQueue(std::unique_ptr<IoQueue> queue, int fd, std::string path, bool writable);
  ~SlabQueue();  // as close()
  SlabQueue(const SlabQueue&) = delete;
  SlabQueue& operator=(const SlabQueue&) = delete;

  // Throws kValue for what is not aligned or lies outside of [data offset, end of the file), kStore for a
  // write where the drive only reads, kInternal with as many requests in flight as the queue is deep. The
  // request is not in flight then.
  void submit(const SlabRequest& request, Owner owner);
  // wait: until at least one request is done, unless none is in flight.
  std::vector<SlabCompletion> reap(bool wait);
  // Waits for what is in flight: no memory is touched afterwards. Its completions are lost. Idempotent; does
  // nothing in a forked child, where the queue is the parent's.
  void close();

 private:
  struct Flight {
    SlabRequest request;
    iovec segment{};
    Owner owner;
    bool retried = false;
  };

  void check_open() const;
  void check_range(const SlabRequest& request) const;
  void begin(uint64_t slot);

  const pid_t process_;
  const int fd_;
  const std::string path_;
  const bool writable_;
  std::mutex mutex_;                // of everything below
  std::unique_ptr<IoQueue> queue_;  // null: closed
  std::vector<Flight> flights_;     // as many as the queue is deep
  std::vector<uint64_t> free_slots_;
  std::vector<IoCompletion> completions_;
};

}  // namespace csd
