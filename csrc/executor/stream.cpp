#include "executor/stream.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>

#include "base/error.h"

namespace csd {
namespace {

constexpr int64_t kReadBytes = int64_t{1} << 20;         // where this class of drives reaches its rate, see bench_io
constexpr int64_t kWakeBytes = int64_t{512} << 10;       // arithmetic on less than this is over before a thread wakes
constexpr int64_t kPagesPerClaim = 4;                    // of memory pages, so that workers seldom meet at the counter

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

struct PageStream::Worker {
  std::unique_ptr<IoQueue> queue;
  uint8_t* staging = nullptr;  // this pass's share
  std::vector<iovec> segments;     // by slot
  std::vector<int64_t> slot_run;   // by slot: index into Plan::reads
  std::vector<int> free_slots;
  std::vector<IoCompletion> completions;
};

struct PageStream::Pass {
  const Plan* plan;
  int64_t page_bytes;
  int64_t slot_bytes;
  int64_t slot_count;  // per worker
  PageConsumer* consumer;
  std::atomic<int64_t> next_read{0};
  std::atomic<int64_t> next_memory_use{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  int error = 0;  // the first read error
  int64_t error_offset = 0;
};

PageStream::PageStream(IoEngine* engine, int fd, std::string path, int worker_count, int queue_depth,
                       int64_t staging_bytes)
    : engine_(engine),
      fd_(fd),
      path_(std::move(path)),
      queue_depth_(queue_depth),
      staging_bytes_(staging_bytes),
      pool_(worker_count) {}

PageStream::~PageStream() {
  workers_.clear();  // their queues wait for reads in flight before the staging memory goes
  if (staging_ != nullptr) munmap(staging_, static_cast<size_t>(staging_bytes_));
}

int64_t PageStream::read_bytes_max(int64_t page_bytes) const {
  const int64_t share = staging_bytes_ / pool_.worker_count() / 2;
  return std::max(page_bytes, std::min(kReadBytes, share) / page_bytes * page_bytes);
}

int64_t PageStream::staging_bytes_touched() const { return staging_ == nullptr ? 0 : staging_bytes_; }

void PageStream::prepare(int worker_count) {
  if (staging_ == nullptr) {
    void* mapped = mmap(nullptr, static_cast<size_t>(staging_bytes_), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
      throw Error(ErrorKind::kBudget, "mmap of " + std::to_string(staging_bytes_) +
                                          " bytes to stage reads failed; lower memory_budget or raise the limit");
    }
    staging_ = static_cast<uint8_t*>(mapped);
    madvise(staging_, static_cast<size_t>(staging_bytes_), MADV_HUGEPAGE);
  }
  const int depth = std::max(2, queue_depth_ / pool_.worker_count());
  while (static_cast<int>(workers_.size()) < worker_count) {
    auto worker = std::make_unique<Worker>();
    worker->queue = engine_->make_queue(fd_, depth, {iovec{staging_, static_cast<size_t>(staging_bytes_)}});
    workers_.push_back(std::move(worker));
  }
  const int64_t share = staging_bytes_ / worker_count / kBlockBytes * kBlockBytes;
  for (int i = 0; i < worker_count; ++i) workers_[static_cast<size_t>(i)]->staging = staging_ + share * i;
}

void PageStream::run(const Plan& plan, int64_t page_bytes, int64_t compute_weight, PageConsumer* consumer) {
  const auto memory_uses = static_cast<int64_t>(plan.memory_uses.size());
  const auto read_count = static_cast<int64_t>(plan.reads.size());
  if (memory_uses == 0 && read_count == 0) return;
  const int64_t weight = (memory_uses + static_cast<int64_t>(plan.drive_uses.size())) * page_bytes * compute_weight;
  auto worker_count =
      static_cast<int>(std::clamp<int64_t>(1 + weight / kWakeBytes, 1, static_cast<int64_t>(pool_.worker_count())));
  // A worker needs two slots, so that the drive works while it computes.
  while (worker_count > 1 && staging_bytes_ / worker_count < 2 * read_bytes_max(page_bytes)) worker_count--;
  Pass pass;
  pass.plan = &plan;
  pass.page_bytes = page_bytes;
  pass.slot_bytes = read_bytes_max(page_bytes);
  pass.slot_count = std::min(static_cast<int64_t>(std::max(2, queue_depth_ / pool_.worker_count())),
                             staging_bytes_ / worker_count / pass.slot_bytes);
  pass.consumer = consumer;
  if (read_count > 0) prepare(worker_count);
  pool_.run(worker_count, [&](int number) {
    this->work(read_count > 0 ? workers_[static_cast<size_t>(number)].get() : nullptr, number, &pass);
  });
  if (pass.error != 0) {
    throw io_error(path_, "reading KV pages at byte " + std::to_string(pass.error_offset) + " failed", pass.error);
  }
  counters_.drive_read_bytes += plan.read_bytes;
  counters_.resident_read_bytes += memory_uses * page_bytes;
}

void PageStream::work(Worker* worker, int number, Pass* pass) {
  const Plan& plan = *pass->plan;
  const auto read_count = static_cast<int64_t>(plan.reads.size());
  const auto memory_count = static_cast<int64_t>(plan.memory_uses.size());
  const int64_t start_ns = now_ns();
  int64_t wait_ns = 0;
  if (worker != nullptr) {
    CSD_CHECK(pass->slot_count > 0, "the staging memory does not hold a page");
    worker->segments.resize(static_cast<size_t>(pass->slot_count));
    worker->slot_run.resize(static_cast<size_t>(pass->slot_count));
    worker->free_slots.clear();
    for (int64_t slot = pass->slot_count; slot-- > 0;) worker->free_slots.push_back(static_cast<int>(slot));
  }
  bool reads_left = worker != nullptr;
  try {
    for (;;) {
      while (reads_left && !worker->free_slots.empty() && !pass->failed.load(std::memory_order_relaxed)) {
        const int64_t run = pass->next_read.fetch_add(1, std::memory_order_relaxed);
        if (run >= read_count) {
          reads_left = false;
          break;
        }
        const int slot = worker->free_slots.back();
        worker->free_slots.pop_back();
        const auto s = static_cast<size_t>(slot);
        worker->slot_run[s] = run;
        worker->segments[s] = {worker->staging + pass->slot_bytes * slot,
                               static_cast<size_t>(plan.reads[static_cast<size_t>(run)].bytes)};
        IoRequest request;
        request.file_offset = plan.reads[static_cast<size_t>(run)].file_offset;
        request.segments = &worker->segments[s];
        request.segment_count = 1;
        request.tag = static_cast<uint64_t>(slot);
        worker->queue->submit(request);
      }
      const bool in_flight = worker != nullptr && worker->queue->in_flight() > 0;
      if (pass->failed.load(std::memory_order_relaxed) && !in_flight) break;
      // Pages in memory fill the time in which the drive works; wait only when there are none left.
      const int64_t memory_use = pass->next_memory_use.fetch_add(kPagesPerClaim, std::memory_order_relaxed);
      const bool has_memory_work = memory_use < memory_count && !pass->failed.load(std::memory_order_relaxed);
      if (has_memory_work) {
        for (int64_t i = memory_use; i < std::min(memory_use + kPagesPerClaim, memory_count); ++i) {
          const PageUse& use = plan.memory_uses[static_cast<size_t>(i)];
          pass->consumer->consume(number, use, use.page->memory);
        }
      }
      if (in_flight) {
        worker->completions.clear();
        const int64_t wait_start_ns = now_ns();
        worker->queue->reap(!has_memory_work, &worker->completions);
        wait_ns += now_ns() - wait_start_ns;
        for (const IoCompletion& completion : worker->completions) {
          const ReadRun& run = plan.reads[static_cast<size_t>(worker->slot_run[completion.tag])];
          if (completion.error != 0) {
            std::lock_guard<std::mutex> lock(pass->mutex);
            if (pass->error == 0) {
              pass->error = completion.error;
              pass->error_offset = run.file_offset;
            }
            pass->failed = true;
          }
          if (!pass->failed.load(std::memory_order_relaxed)) {
            const uint8_t* bytes = worker->staging + pass->slot_bytes * static_cast<int64_t>(completion.tag);
            for (int64_t i = run.use_begin; i < run.use_end; ++i) {
              const PageUse& use = plan.drive_uses[static_cast<size_t>(i)];
              pass->consumer->consume(number, use, bytes + (use.page->file_offset - run.file_offset));
            }
          }
          worker->free_slots.push_back(static_cast<int>(completion.tag));
        }
      } else if (!has_memory_work && !reads_left) {
        break;
      }
    }
  } catch (...) {
    pass->failed = true;
    while (worker != nullptr && worker->queue->in_flight() > 0) worker->queue->reap(true, &worker->completions);
    throw;
  }
  counters_.io_wait_ns += wait_ns;
  counters_.compute_ns += now_ns() - start_ns - wait_ns;
}

}  // namespace csd
