// preadv and pwritev on a pool of threads that all queues of an engine share. The pool's size bounds how many
// requests the drive sees at once, so it wants more threads than there are cores: they only wait.

#include <pthread.h>
#include <signal.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "base/error.h"
#include "io/engines.h"
#include "io/transfer.h"

namespace csd {
namespace {

void carry_out(int fd, Transfer* transfer) {
  for (;;) {
    const ssize_t bytes =
        transfer->op() == IoOp::kRead
            ? preadv(fd, transfer->segments(), transfer->segment_count(), transfer->file_offset())
            : pwritev(fd, transfer->segments(), transfer->segment_count(), transfer->file_offset());
    const Transfer::Step step = transfer->advance(bytes >= 0 ? bytes : -errno);
    if (step == Transfer::Step::kFinished) return;
    if (step == Transfer::Step::kRetry && transfer->wants_nap()) Transfer::nap();
  }
}

// Where one queue's finished requests wait to be reaped.
struct Outbox {
  std::mutex mutex;
  std::condition_variable arrived;
  std::vector<Transfer*> finished;
};

// First in, first out over all queues, but for requests in the background, which come last. Its bound is the
// sum of the queues' depths.
class WorkerPool {
 public:
  explicit WorkerPool(int thread_count) {
    // Signals are for the program's own threads: one that lands on a worker would interrupt nobody who waits.
    sigset_t all_signals, previous;
    sigfillset(&all_signals);
    pthread_sigmask(SIG_SETMASK, &all_signals, &previous);
    int error = 0;
    try {
      for (int i = 0; i < thread_count; i++) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error& refused) {
      error = refused.code().value();
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
    // Fewer threads than asked for are slower, none is a failure.
    if (threads_.empty()) throw io_error("pread engine", "starting a thread", error);
  }

  ~WorkerPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void add(int fd, Transfer* transfer, Outbox* outbox, bool background) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      (background ? background_jobs_ : jobs_).push_back({fd, transfer, outbox});
    }
    wake_.notify_one();
  }

 private:
  struct Job {
    int fd;
    Transfer* transfer;
    Outbox* outbox;
  };

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !jobs_.empty() || !background_jobs_.empty(); });
      std::deque<Job>& jobs = jobs_.empty() ? background_jobs_ : jobs_;
      if (jobs.empty()) return;
      const Job job = jobs.front();
      jobs.pop_front();
      lock.unlock();
      carry_out(job.fd, job.transfer);
      {
        // Notified under the lock: the queue's destructor frees the outbox as soon as it can take it.
        std::lock_guard<std::mutex> outbox_lock(job.outbox->mutex);
        job.outbox->finished.push_back(job.transfer);
        job.outbox->arrived.notify_one();
      }
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  std::deque<Job> background_jobs_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

class PreadQueue : public IoQueue {
 public:
  PreadQueue(WorkerPool* pool, int fd, int depth)
      : pool_(pool), fd_(fd), alignment_bytes_(resume_alignment_bytes(fd)), transfers_(depth) {
    for (Transfer& transfer : transfers_) free_.push_back(&transfer);
    outbox_.finished.reserve(depth);
  }

  ~PreadQueue() override {
    std::unique_lock<std::mutex> lock(outbox_.mutex);
    outbox_.arrived.wait(lock, [this] { return static_cast<int>(outbox_.finished.size()) == in_flight(); });
  }

  void submit(const IoRequest& request) override {
    CSD_CHECK(!free_.empty(), "I/O queue: more than depth() requests in flight");
    Transfer* transfer = free_.back();
    const bool own = request.fd < 0;
    transfer->start(request, own ? alignment_bytes_ : resume_alignment_bytes(request.fd));
    pool_->add(own ? fd_ : request.fd, transfer, &outbox_, request.background);
    free_.pop_back();
  }

  void reap(bool wait, std::vector<IoCompletion>* completions) override {
    std::unique_lock<std::mutex> lock(outbox_.mutex);
    if (wait) {
      CSD_CHECK(in_flight() > 0, "I/O queue: waiting for a completion with nothing in flight");
      outbox_.arrived.wait(lock, [this] { return !outbox_.finished.empty(); });
    }
    for (Transfer* transfer : outbox_.finished) {
      completions->push_back({transfer->tag(), transfer->error()});
      free_.push_back(transfer);
    }
    outbox_.finished.clear();
  }

  int in_flight() const override { return depth() - static_cast<int>(free_.size()); }
  int depth() const override { return static_cast<int>(transfers_.size()); }

 private:
  WorkerPool* const pool_;
  const int fd_;
  const int64_t alignment_bytes_;
  std::vector<Transfer> transfers_;  // as many as the depth
  std::vector<Transfer*> free_;
  Outbox outbox_;
};

class PreadEngine : public IoEngine {
 public:
  explicit PreadEngine(int thread_count) : pool_(std::max(thread_count, 1)) {}

  const char* name() const override { return "pread"; }

  std::unique_ptr<IoQueue> make_queue(int fd, int depth, const std::vector<iovec>&) override {
    CSD_CHECK(depth > 0, "I/O queue: depth must be positive");
    return std::make_unique<PreadQueue>(&pool_, fd, depth);
  }

 private:
  WorkerPool pool_;
};

}  // namespace

std::unique_ptr<IoEngine> make_pread_engine(int thread_count) {
  return std::make_unique<PreadEngine>(thread_count);
}

}  // namespace csd
