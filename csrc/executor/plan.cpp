#include "executor/plan.h"

#include <algorithm>

namespace csd {

void extend_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max, std::vector<StagedRun>* staged,
                 Plan* plan, int64_t gap_bytes_max) {
  if (plan->memory_uses.empty()) plan->memory_uses.reserve(uses.size());
  const auto first = static_cast<int64_t>(plan->drive_uses.size());
  const size_t first_read = plan->reads.size();  // a run serves one pass
  for (const PageUse& use : uses) {
    if (!use.in_memory()) {
      plan->drive_uses.push_back(use);
    } else {
      plan->memory_uses.push_back(use);
      plan->memory_bytes += use.bytes();
    }
  }
  // By place on the drive, not by token: rows interleave there, and evicted pages may lie in any order.
  const auto by_offset = [](const PageUse& a, const PageUse& b) { return a.file_begin() < b.file_begin(); };
  if (!std::is_sorted(plan->drive_uses.begin() + first, plan->drive_uses.end(), by_offset)) {
    std::stable_sort(plan->drive_uses.begin() + first, plan->drive_uses.end(), by_offset);
  }
  const auto count = static_cast<int64_t>(plan->drive_uses.size());
  const size_t staged_count = staged != nullptr ? staged->size() : 0;
  size_t next_staged = 0;
  bool serving = false;    // by (*staged)[next_staged], which is the last of plan->staged
  int64_t staged_end = 0;  // of what was counted of it
  for (int64_t i = first; i < count; ++i) {
    const PageUse& use = plan->drive_uses[static_cast<size_t>(i)];
    const int64_t begin = use.file_begin();
    const int64_t end = use.file_end();
    // The same bytes may be staged for several passes: the next that is free serves this one.
    for (; next_staged < staged_count; ++next_staged, serving = false) {
      const StagedRun& run = (*staged)[next_staged];
      if (run.file_offset + run.bytes > begin && (serving || !run.taken)) break;
    }
    if (next_staged < staged_count) {
      StagedRun& run = (*staged)[next_staged];
      const bool follows = !serving || plan->staged.back().use_end == i;
      if (follows && run.file_offset <= begin && end <= run.file_offset + run.bytes) {
        if (!serving) plan->staged.push_back({run.slot, i, i, 0});
        serving = true;
        run.taken = true;
        plan->staged.back().use_end = i + 1;
        plan->staged.back().bytes += std::max<int64_t>(0, end - std::max(begin, staged_end));
        staged_end = std::max(staged_end, end);
        continue;
      }
    }
    // A run has all uses from its first to its last: none that something staged serves lies between them.
    if (plan->reads.size() > first_read && plan->reads.back().use_end == i) {
      ReadRun& run = plan->reads.back();
      const int64_t run_end = run.file_offset + run.bytes;
      if (end <= run_end) {  // the same bytes, for another row or head
        run.use_end = i + 1;
        continue;
      }
      if (begin <= run_end + gap_bytes_max && end - run.file_offset <= read_bytes_max) {
        run.bytes = end - run.file_offset;
        run.use_end = i + 1;
        plan->read_bytes += end - run_end;
        continue;
      }
    }
    plan->reads.push_back({begin, end - begin, i, i + 1});
    plan->read_bytes += end - begin;
  }
}

void limit_plan(int64_t bytes_max, Plan* plan) {
  for (const StagedUse& use : plan->staged) bytes_max -= use.bytes;
  while (!plan->reads.empty() && plan->read_bytes > bytes_max) {
    plan->read_bytes -= plan->reads.back().bytes;
    plan->reads.pop_back();
  }
}

Plan make_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max, std::vector<StagedRun>* staged,
               int64_t gap_bytes_max) {
  Plan plan;
  extend_plan(uses, read_bytes_max, staged, &plan, gap_bytes_max);
  return plan;
}

}  // namespace csd
