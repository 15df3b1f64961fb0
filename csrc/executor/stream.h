// Runs a plan: reads many runs at once and hands each page to a consumer as it lands, on several threads.
// What is left of the staging memory goes to reads for the passes that will follow; they go on after the
// pass.
#pragma once

#include <algorithm>
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
// number. bytes: those of the page that the use is of.
class PageConsumer {
 public:
  virtual ~PageConsumer() = default;
  virtual void consume(int worker, const PageUse& use, const uint8_t* bytes) = 0;
};

struct StreamCounters {
  std::atomic<int64_t> drive_read_bytes{0};  // asked of the drive
  std::atomic<int64_t> resident_read_bytes{0};
  std::atomic<int64_t> read_ahead_bytes{0};         // of drive_read_bytes: there before it was asked for
  std::atomic<int64_t> read_ahead_wasted_bytes{0};  // of drive_read_bytes: never used
  std::atomic<int64_t> io_wait_ns{0};               // summed over workers
  std::atomic<int64_t> compute_ns{0};               // summed over workers
};

// Not thread-safe: one call at a time.
class PageStream {
 public:
  // staging_bytes: memory for reads, all workers together; page_bytes of any pass must fit twice.
  // queue_depth: reads in flight during a pass; those ahead of the next pass may fill the staging memory.
  // checksums: pages that were read are compared with theirs before a consumer sees them.
  PageStream(IoEngine* engine, int fd, std::string path, ThreadPool* pool, int queue_depth,
             int64_t staging_bytes, bool checksums);
  ~PageStream();

  // Makes slots large enough for pages of this size; what was staged in smaller ones is lost.
  void fit(int64_t page_bytes);
  // Another amount of staging memory, for the passes to come; what was staged is lost.
  void resize(int64_t staging_bytes);
  // The length of reads that suits a page size, and the longest that fits a slot.
  int64_t read_bytes_max(int64_t page_bytes) const;
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t staging_bytes() const { return staging_bytes_; }
  int64_t staging_bytes_touched() const { return staging_ == nullptr ? 0 : staging_bytes_; }

  // What was read ahead, by file offset: for the plan of the pass that comes now. Valid until then.
  std::vector<StagedRun>* staged();

  // Feeds every use of the plan to the consumer; workers are numbered below worker_count_max. compute_weight:
  // the arithmetic on a page relative to one query's, so that small passes stay on the calling thread. next:
  // what to read after the plan's own reads, as far as the staging memory goes; null: nothing. When the plan
  // needs the drive, staged runs that are in neither plan are let go. Throws kStore for a failed read and
  // kCorrupt for a damaged page: nothing of the pass is then valid.
  void run(const Plan& plan, const Plan* next, int64_t page_bytes, int64_t compute_weight,
           int worker_count_max, PageConsumer* consumer);

  // Begins reads of what a pass that is still being chosen will need, from plan.reads[first] on: as many as
  // the drive takes at once, and as there is room for; waits for none. Returns the first that it did not
  // begin. What is staged stays.
  int64_t read_ahead(const Plan& plan, int64_t first);

  // Lets go of what was read ahead from extents that nobody else keeps, so that their space is free.
  void release_unused();

  // What the pass that needed most of the drive needed of it.
  int64_t widest_pass_bytes() const { return widest_pass_bytes_; }
  // None can be wider any more.
  void limit_widest_pass(int64_t bytes) { widest_pass_bytes_ = std::min(widest_pass_bytes_, bytes); }

  int worker_limit() const { return pool_.worker_count(); }
  const StreamCounters& counters() const { return counters_; }

 private:
  struct Slot;
  struct Worker;
  struct Pass;

  void divide(int64_t slot_bytes);
  void prepare(int worker_count);
  void begin(Pass* pass);
  void end(Pass* pass);
  void work(int number, Pass* pass);
  void fill(Worker* worker, Pass* pass, int in_flight_max);
  bool start_one(Worker* worker, Pass* pass);
  void start_ahead(Pass* pass, int in_flight_max);
  void start(Worker* worker, int slot, const ReadRun& run);
  void reap(Worker* worker, bool wait, Pass* pass);
  void land(Worker* worker, int slot, int error, Pass* pass);
  void consume(int number, int slot, Pass* pass);
  bool intact(const PageUse& use, const uint8_t* bytes, Pass* pass) const;
  void release(int slot);
  void discard(int slot);
  int take_free(int64_t bytes);
  int take_landed();
  int take_parts(int whole, int count);
  void drain();

  int64_t whole_count() const { return staging_bytes_ / slot_bytes_; }
  int whole_of(int slot) const;
  int first_slot_of(int whole) const;
  uint8_t* memory_of(int slot) const;

  IoEngine* const engine_;
  const int fd_;
  const std::string path_;
  const int queue_depth_;
  const bool checksums_;
  int64_t staging_bytes_;
  ThreadPool& pool_;
  uint8_t* staging_ = nullptr;  // mapped by the first pass that reads
  int64_t slot_bytes_ = 0;
  int64_t part_bytes_ = 0;  // of one that is split for small reads; 0: none is
  int64_t widest_pass_bytes_ = 0;
  std::vector<Slot> slots_;  // by first part: see whole_of()
  std::vector<std::unique_ptr<Worker>> workers_;
  std::mutex mutex_;              // of what follows, during a pass
  std::vector<int> free_;         // whole slots, by number
  std::vector<int> partly_free_;  // likewise: some parts are free
  std::vector<uint32_t>
      free_parts_;           // of each of the first whole slots, which may be split: a bit for each part
  std::vector<int> landed_;  // slots that the pass has to compute on
  std::vector<StagedRun> staged_;
  StreamCounters counters_;
};

}  // namespace csd
