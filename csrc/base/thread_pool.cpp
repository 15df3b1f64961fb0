#include "base/thread_pool.h"

#include <algorithm>
#include <exception>

namespace csd {

ThreadPool::ThreadPool(int worker_count, LendThreads lend)
    : worker_count_(std::max(worker_count, 1)), lend_(lend) {}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::compute(int count, const std::function<void(int)>& task) {
  count = std::min(count, worker_count_);
  if (count <= 1 || lend_ == nullptr || !run_lent(count, task)) run(count, task);
}

void ThreadPool::run(int count, const std::function<void(int)>& task) {
  count = std::min(count, worker_count_);
  if (count <= 1) {
    task(0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int>(threads_.size()) < count - 1) {
      const int index = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, index] { work(index); });
    }
    task_ = &task;
    active_ = count - 1;
    remaining_ = count - 1;
    error_ = nullptr;
    round_++;
  }
  start_.notify_all();
  std::exception_ptr own_error;
  try {
    task(0);
  } catch (...) {
    own_error = std::current_exception();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return remaining_ == 0; });
  task_ = nullptr;
  if (own_error) std::rethrow_exception(own_error);
  if (error_) std::rethrow_exception(error_);
}

bool ThreadPool::run_lent(int count, const std::function<void(int)>& task) {
  struct Run {
    const std::function<void(int)>& task;
    std::mutex mutex;
    std::exception_ptr error;
  };
  Run run{task, {}, nullptr};
  const auto call = [](void* context, int index) {
    auto* run = static_cast<Run*>(context);
    try {
      run->task(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(run->mutex);
      if (!run->error) run->error = std::current_exception();
    }
  };
  if (!lend_(count, call, &run)) return false;
  if (run.error) std::rethrow_exception(run.error);
  return true;
}

void ThreadPool::work(int index) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    start_.wait(lock, [&] { return stopping_ || (round_ != seen && index <= active_ && remaining_ > 0); });
    if (stopping_) return;
    seen = round_;
    const std::function<void(int)>* task = task_;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*task)(index);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) error_ = error;
    if (--remaining_ == 0) done_.notify_one();
  }
}

}  // namespace csd
