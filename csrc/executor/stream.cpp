#include "executor/stream.h"

#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "base/mapped_memory.h"

namespace csd {
namespace {

constexpr int64_t kReadBytes = int64_t{1} << 20;  // where this class of drives reaches its rate, see bench_io
constexpr int64_t kWakeBytes = int64_t{512}
                               << 10;  // arithmetic on less than this is over before a thread wakes

// Memory pages a worker takes at once. What is fetched ahead ends with them, so the first tile of every claim
// comes from memory at a fifth of the rate; the last claims bound how long workers wait for one another.
constexpr int64_t kPagesPerClaim = 4;  // at least; and beside reads from the drive, reaped between claims
constexpr int64_t kPagesPerClaimMax = 16;
constexpr int64_t kClaimsPerWorker = 16;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

struct PageStream::Pass {
  const Plan* plan;
  int64_t page_bytes;
  int64_t slot_bytes;
  int64_t slot_count;  // per worker
  int64_t pages_per_claim;
  PageConsumer* consumer;
  std::atomic<int64_t> next_read{0};
  std::atomic<int64_t> next_memory_use{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  int error = 0;  // the first read error
  int64_t error_offset = 0;

  void fail(int errno_value, int64_t file_offset) {
    std::lock_guard<std::mutex> lock(mutex);
    if (error == 0) {
      error = errno_value;
      error_offset = file_offset;
    }
    failed = true;
  }
};

struct PageStream::Worker {
  std::unique_ptr<IoQueue> queue;
  uint8_t* staging = nullptr;     // this pass's share
  std::vector<iovec> segments;    // by slot
  std::vector<int64_t> slot_run;  // by slot: index into Plan::reads
  std::vector<int> free_slots;
  std::vector<IoCompletion> completions;

  void begin(int64_t slot_count) {
    CSD_CHECK(slot_count > 0, "the staging memory does not hold a page");
    segments.resize(static_cast<size_t>(slot_count));
    slot_run.resize(static_cast<size_t>(slot_count));
    free_slots.clear();
    for (int64_t slot = slot_count; slot-- > 0;) free_slots.push_back(static_cast<int>(slot));
  }

  // Starts reads until no slot is free or nothing is left to read.
  void fill(Pass* pass) {
    const auto read_count = static_cast<int64_t>(pass->plan->reads.size());
    while (!free_slots.empty() && !pass->failed) {
      const int64_t index = pass->next_read.fetch_add(1, std::memory_order_relaxed);
      if (index >= read_count) return;
      const ReadRun& run = pass->plan->reads[static_cast<size_t>(index)];
      const int slot = free_slots.back();
      free_slots.pop_back();
      iovec& segment = segments[static_cast<size_t>(slot)];
      segment = {staging + pass->slot_bytes * slot, static_cast<size_t>(run.bytes)};
      slot_run[static_cast<size_t>(slot)] = index;
      IoRequest request;
      request.file_offset = run.file_offset;
      request.segments = &segment;
      request.segment_count = 1;
      request.tag = static_cast<uint64_t>(slot);
      queue->submit(request);
    }
  }
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
  if (staging_ != nullptr) unmap_memory(staging_, staging_bytes_);
}

int64_t PageStream::read_bytes_max(int64_t page_bytes) const {
  const int64_t share = staging_bytes_ / pool_.worker_count() / 2;
  return std::max(page_bytes, std::min(kReadBytes, share) / page_bytes * page_bytes);
}

int64_t PageStream::staging_bytes_touched() const { return staging_ == nullptr ? 0 : staging_bytes_; }

void PageStream::prepare(int worker_count) {
  if (staging_ == nullptr) {
    staging_ = map_memory(staging_bytes_, "reads in flight");
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

void PageStream::run(const Plan& plan, int64_t page_bytes, int64_t compute_weight, int worker_count_max,
                     PageConsumer* consumer) {
  const auto memory_uses = static_cast<int64_t>(plan.memory_uses.size());
  const auto read_count = static_cast<int64_t>(plan.reads.size());
  if (memory_uses == 0 && read_count == 0) return;
  const int64_t weight =
      (memory_uses + static_cast<int64_t>(plan.drive_uses.size())) * page_bytes * compute_weight;
  auto worker_count = static_cast<int>(std::clamp<int64_t>(1 + weight / kWakeBytes, 1, worker_count_max));
  // A worker needs two slots, so that the drive works while it computes.
  while (worker_count > 1 && staging_bytes_ / worker_count < 2 * read_bytes_max(page_bytes)) worker_count--;
  Pass pass;
  pass.plan = &plan;
  pass.page_bytes = page_bytes;
  pass.slot_bytes = read_bytes_max(page_bytes);
  pass.slot_count = std::min(static_cast<int64_t>(std::max(2, queue_depth_ / pool_.worker_count())),
                             staging_bytes_ / worker_count / pass.slot_bytes);
  pass.pages_per_claim = read_count > 0 ? kPagesPerClaim
                                        : std::clamp<int64_t>(memory_uses / (worker_count * kClaimsPerWorker),
                                                              kPagesPerClaim, kPagesPerClaimMax);
  pass.consumer = consumer;
  if (read_count > 0) prepare(worker_count);
  pool_.run(worker_count, [&](int number) {
    this->work(read_count > 0 ? workers_[static_cast<size_t>(number)].get() : nullptr, number, &pass);
  });
  if (pass.error != 0) {
    throw io_error(path_, "reading KV pages at byte " + std::to_string(pass.error_offset) + " failed",
                   pass.error);
  }
  counters_.drive_read_bytes += plan.read_bytes;
  counters_.resident_read_bytes += plan.memory_bytes;
}

// One worker of a pass. It keeps its slots reading, and computes on pages in memory, or on what has landed.
void PageStream::work(Worker* worker, int number, Pass* pass) {
  const Plan& plan = *pass->plan;
  const auto memory_count = static_cast<int64_t>(plan.memory_uses.size());
  const int64_t start_ns = now_ns();
  int64_t wait_ns = 0;
  if (worker != nullptr) worker->begin(pass->slot_count);
  try {
    for (;;) {
      if (worker != nullptr) worker->fill(pass);
      const bool in_flight = worker != nullptr && worker->queue->in_flight() > 0;
      // Pages in memory fill the time in which the drive works; wait only when there are none left.
      const int64_t memory_use =
          pass->failed ? memory_count
                       : pass->next_memory_use.fetch_add(pass->pages_per_claim, std::memory_order_relaxed);
      const bool has_memory_work = memory_use < memory_count;
      for (int64_t i = memory_use; i < std::min(memory_use + pass->pages_per_claim, memory_count); ++i) {
        const PageUse& use = plan.memory_uses[static_cast<size_t>(i)];
        pass->consumer->consume(number, use, use.page->memory);
      }
      if (!in_flight) {
        if (has_memory_work) continue;
        break;
      }
      worker->completions.clear();
      const int64_t wait_start_ns = now_ns();
      worker->queue->reap(!has_memory_work, &worker->completions);
      wait_ns += now_ns() - wait_start_ns;
      for (const IoCompletion& completion : worker->completions) {
        const ReadRun& run = plan.reads[static_cast<size_t>(worker->slot_run[completion.tag])];
        if (completion.error != 0) pass->fail(completion.error, run.file_offset);
        if (!pass->failed) {
          const uint8_t* bytes = worker->staging + pass->slot_bytes * static_cast<int64_t>(completion.tag);
          for (int64_t i = run.use_begin; i < run.use_end; ++i) {
            const PageUse& use = plan.drive_uses[static_cast<size_t>(i)];
            pass->consumer->consume(number, use, bytes + (use.page->file_offset - run.file_offset));
          }
        }
        worker->free_slots.push_back(static_cast<int>(completion.tag));
        worker->fill(pass);  // before computing on the next: the drive must not wait for arithmetic
      }
    }
  } catch (...) {
    pass->failed = true;
    while (worker != nullptr && worker->queue->in_flight() > 0)
      worker->queue->reap(true, &worker->completions);
    throw;
  }
  counters_.io_wait_ns += wait_ns;
  counters_.compute_ns += now_ns() - start_ns - wait_ns;
}

}  // namespace csd
