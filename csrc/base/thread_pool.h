// A fixed set of worker threads for one drive. run() uses the calling thread too, so a pool of one never
// switches.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace csd {

class ThreadPool {
 public:
  explicit ThreadPool(int worker_count);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int worker_count() const { return worker_count_; }

  // Runs task(0) .. task(count - 1), each on its own thread, and returns when all are done. count <=
  // worker_count(). The first exception is rethrown here. One run at a time.
  void run(int count, const std::function<void(int)>& task);

 private:
  void work(int index);

  const int worker_count_;
  std::vector<std::thread> threads_;  // started by the first run that needs them
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const std::function<void(int)>* task_ = nullptr;
  uint64_t round_ = 0;
  int active_ = 0;     // workers of this round, the caller not counted
  int remaining_ = 0;  // of those, not done yet
  bool stopping_ = false;
  std::exception_ptr error_;
};

}  // namespace csd
