// Attention over a choice of the stored tokens: pages by the bounds of their keys (Quest, 2406.10774), in a
// fixed number or until little is left out, and SparF (InstInfer, 2409.04992, after SparQ, 2312.04985). The
// choice is made in memory; what is chosen is read, and attended to exactly.
#pragma once

#include <cstdint>
#include <vector>

#include "executor/attend.h"
#include "executor/attend_pass.h"
#include "store/summary.h"

namespace csd {

enum class SparseKind : uint8_t { kPageTopK, kAdaptive, kSparF };

struct SparseRequest {
  SparseKind kind = SparseKind::kPageTopK;
  double fraction = 0.0;  // of a row's pages; 0: `tokens` of them. SparF has `tokens` only
  int64_t tokens = 0;
  int64_t local_tokens = 0;  // the newest, always attended to
  int64_t sink_tokens = 0;   // the first, likewise
  int64_t heads_per_choice = 1;
  double mass = 1.0;      // adaptive: of the softmax that is to be attended to
  bool provable = false;  // by bounds, not by estimate
  int64_t channels = 0;   // SparF
  bool mean_value = false;
  bool sketch = false;
  // [row_count, num_heads, q_len]: the estimated probability mass of what was left out.
  float* missing = nullptr;
};

// What a layer has to keep for it.
std::vector<SummaryKind> summary_kinds(const SparseRequest& sparse);

// Every full page of the rows is summarised already; pages that are not are attended to by all.
void attend_sparse(const PassContext& context, const Layer& layer, const AttendRequest& request,
                   const SparseRequest& sparse);

// Begins to read what attend_sparse() would choose for these queries, which are a guess; the pass that comes
// uses of it what it wants, too. Pages only: for SparF nothing is read. Waits for no read, and computes no
// output. All rows together, so it needs the scratch memory that they take. Returns how many bytes of what it
// chose are on their way.
int64_t read_ahead_sparse(const PassContext& context, const Layer& layer, const AttendRequest& request,
                          const SparseRequest& sparse);

// Of a block of rows, with all queries: SparF (sparf.cpp).
void attend_sparf(const PassContext& context, const Layer& layer, const AttendRequest& request,
                  const SparseRequest& sparse, const Block& block, int worker_count);

// Brings chosen bytes to a pass. Reads of those that are added may go on while others are still being chosen.
// Not thread-safe.
class ChosenUses {
 public:
  ChosenUses(const PassContext& context, const Layer& layer)
      : context_(context), layer_(layer), page_bytes_(layer.geometry.full_precision().page_bytes()) {}

  void add(std::vector<PageUse> uses);
  // The same for a guess: run() is not called.
  void guess(const std::vector<PageUse>& uses);
  // Begins as many reads of what was added as there is room for, and waits for none; nothing where nothing is
  // to be read ahead.
  void read_on();
  // Of what was added, what reads have begun for.
  int64_t begun_bytes() const { return begun_bytes_; }
  // Once, when everything is added.
  void run(int worker_count, int64_t weight, PageConsumer* pass);

 private:
  const PassContext& context_;
  const Layer& layer_;
  const int64_t page_bytes_;
  std::vector<PageUse> uses_;
  std::vector<PageUse> added_;  // of uses_, since the plan was made
  Plan plan_;                   // of what had not been begun then
  int64_t next_read_ = 0;       // of it
  int64_t begun_bytes_ = 0;
};

}  // namespace csd
