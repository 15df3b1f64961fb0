// A mutex that is taken in the order in which it was asked for. With the others, threads that attend one call
// after another keep a thread that appends waiting for seconds.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace csd {

class FairMutex {
 public:
  void lock() {
    std::unique_lock<std::mutex> guard(mutex_);
    const uint64_t ticket = next_ticket_++;
    turn_.wait(guard, [&] { return serving_ == ticket; });
  }
  void unlock() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      serving_++;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  uint64_t next_ticket_ = 0;
  uint64_t serving_ = 0;
};

}  // namespace csd
