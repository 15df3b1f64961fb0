// Runs a plan: reads many runs at once and hands each page to a consumer as it lands, on several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "executor/plan.h"
#include "io/io.h"

namespace csd {

// Arithmetic on pages. consume() is called from worker threads, never twice at once with the same worker
// number.
class PageConsumer {
 public:
  virtual ~PageConsumer() = default;
  virtual void consume(int worker, const PageUse& use, const uint8_t* page) = 0;
};

struct StreamCounters {
  std::atomic<int64_t> drive_read_bytes{0};
  std::atomic<int64_t> resident_read_bytes{0};
  std::atomic<int64_t> io_wait_ns{0};  // summed over workers
  std::atomic<int64_t> compute_ns{0};  // summed over workers
};

class PageStream {
 public:
  // staging_bytes: memory for reads in flight, all workers together; page_bytes of any pass must fit twice.
  PageStream(IoEngine* engine, int fd, std::string path, int worker_count, int queue_depth,
             int64_t staging_bytes);
  ~PageStream();

  // The length of reads that suits a page size.
  int64_t read_bytes_max(int64_t page_bytes) const;
  int64_t staging_bytes_touched() const;

  // Feeds every use of the plan to the consumer; workers are numbered below worker_count_max. compute_weight:
  // the arithmetic on a page relative to one query's, so that small passes stay on the calling thread. Throws
  // kStore for a failed read: nothing of the pass is then valid. One pass at a time.
  void run(const Plan& plan, int64_t page_bytes, int64_t compute_weight, int worker_count_max,
           PageConsumer* consumer);
  int worker_limit() const { return pool_.worker_count(); }
  ThreadPool& pool() { return pool_; }  // for other work between passes
  const StreamCounters& counters() const { return counters_; }

 private:
  struct Worker;
  struct Pass;

  void work(Worker* worker, int number, Pass* pass);
  void prepare(int worker_count);

  IoEngine* const engine_;
  const int fd_;
  const std::string path_;
  const int queue_depth_;
  const int64_t staging_bytes_;
  ThreadPool pool_;
  uint8_t* staging_ = nullptr;  // mapped by the first pass that reads
  std::vector<std::unique_ptr<Worker>> workers_;
  StreamCounters counters_;
};

}  // namespace csd
