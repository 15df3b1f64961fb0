// A fixed number of workers for one drive. run() uses the calling thread too, so a pool of one never
// switches.
//
// The others may be lent by whoever has threads that wait for work already: a second set would compete with
// them for the cores, and be slower to wake.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace csd {

// Calls call(context, 0) .. call(context, count - 1), on several threads at once where it can, and returns
// when all are done. False, and nothing was called: it has fewer threads than that. call() does not throw.
using LendThreads = bool (*)(int count, void (*call)(void* context, int index), void* context);

class ThreadPool {
 public:
  // lend: null for threads of the pool's own only.
  ThreadPool(int worker_count, LendThreads lend);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int worker_count() const { return worker_count_; }

  // Runs task(0) .. task(count - 1), each on its own thread, and returns when all are done. count <=
  // worker_count(). The first exception is rethrown here. One run at a time.
  void run(int count, const std::function<void(int)>& task);
  // The same for tasks that only compute, on lent threads if there are any; those may be fewer: no task may
  // wait for another. What waits for a drive does so on own threads, which sleep: spinning at the end of the
  // run beside one that waits cost 10 % of the drive's rate on two cores.
  void compute(int count, const std::function<void(int)>& task);

 private:
  bool run_lent(int count, const std::function<void(int)>& task);
  void work(int index);

  const int worker_count_;
  const LendThreads lend_;
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
