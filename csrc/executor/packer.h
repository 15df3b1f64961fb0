// Fills pages: with new tokens, or from a page stored another way. Many at once, on the drive's threads.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "kernels/kernels.h"
#include "store/layer.h"

namespace csd {

// Tokens of one row of an append that go to one page. Strides of kv heads and tokens, in elements.
struct NewTokens {
  DType dtype = DType::kFloat32;
  const uint8_t* k = nullptr;
  const uint8_t* v = nullptr;
  int64_t k_strides[2] = {0, 0};
  int64_t v_strides[2] = {0, 0};
  int64_t slot = 0;  // of the page, where the first goes
  int64_t count = 0;
};

class Packer {
 public:
  Packer(const Kernels* kernels, ThreadPool* pool) : kernels_(*kernels), pool_(*pool) {}

  struct Job {
    Ref<Page> page;
    PageLayout layout;
    bool completes = false;  // the page is then full and as it will stay
    NewTokens tokens;
    Ref<Page> source;  // in memory; null: tokens
    PageLayout source_layout;
  };

  // Queued until run(); until then its pages are pinned. Into a quantised page go whole pages of tokens only.
  void add(Job job);
  // Does what is queued, calls `packed` while all of it is still in memory, and hands each job to `done`, in
  // order; if that throws, those that are left to `undone`. Nothing else runs on the pool meanwhile.
  template <typename Packed, typename Done, typename Undone>
  void run(const Packed& packed, const Done& done, const Undone& undone) {
    pack_all();
    packed();
    finish(done, undone);
  }
  // Forgets what is queued, and hands it to `undone`.
  template <typename Undone>
  void cancel(const Undone& undone) {
    finish(undone, undone);
  }

  int64_t queued_bytes() const { return queued_bytes_; }
  bool empty() const { return jobs_.empty(); }

  // At once, on this thread: from one image of a page to another of the same tokens. Either may be quantised.
  void convert(const uint8_t* source, const PageLayout& source_layout, uint8_t* target,
               const PageLayout& layout);

 private:
  template <typename Each, typename Rest>
  void finish(const Each& each, const Rest& rest) {
    for (Job& job : jobs_) {
      job.page->pinned = false;
      if (job.source != nullptr) job.source->pinned = false;
    }
    queued_bytes_ = 0;
    done_.clear();
    std::swap(done_, jobs_);  // `each` may queue anew
    for (size_t i = 0; i < done_.size(); ++i) {
      try {
        each(done_[i]);
      } catch (...) {
        for (; i < done_.size(); ++i) rest(done_[i]);
        done_.clear();
        throw;
      }
    }
    done_.clear();
  }
  void pack_all();
  void pack(const Job& job, float* scratch) const;
  void pack_tokens(const Job& job) const;
  void convert_page(const uint8_t* source, const PageLayout& source_layout, uint8_t* target,
                    const PageLayout& layout, float* scratch) const;

  const Kernels& kernels_;
  ThreadPool& pool_;
  std::vector<Job> jobs_;
  std::vector<Job> done_;  // kept for its memory
  int64_t queued_bytes_ = 0;
  std::deque<AlignedBuffer> scratch_;  // by worker
};

}  // namespace csd
