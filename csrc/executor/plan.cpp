#include "executor/plan.h"

#include <algorithm>

namespace csd {

void extend_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max, std::vector<StagedRun>* staged,
                 Plan* plan) {
  if (plan->memory_uses.empty()) plan->memory_uses.reserve(uses.size());
  const auto first = static_cast<int64_t>(plan->drive_uses.size());
  const size_t first_read = plan->reads.size();  // a run serves one pass
  for (const PageUse& use : uses) {
    if (use.page->memory == nullptr) {
      plan->drive_uses.push_back(use);
    } else {
      plan->memory_uses.push_back(use);
      plan->memory_bytes += use.page->page_bytes();
    }
  }
  // By place on the drive, not by token: rows interleave there, and evicted pages may lie in any order.
  const auto by_offset = [](const PageUse& a, const PageUse& b) {
    return a.page->file_offset < b.page->file_offset;
  };
  if (!std::is_sorted(plan->drive_uses.begin() + first, plan->drive_uses.end(), by_offset)) {
    std::stable_sort(plan->drive_uses.begin() + first, plan->drive_uses.end(), by_offset);
  }
  const auto count = static_cast<int64_t>(plan->drive_uses.size());
  const size_t staged_count = staged != nullptr ? staged->size() : 0;
  size_t next_staged = 0;
  bool serving = false;  // by (*staged)[next_staged], which is the last of plan->staged
  int64_t offset_before = -1;
  for (int64_t i = first; i < count; ++i) {
    const Page& page = *plan->drive_uses[static_cast<size_t>(i)].page;
    const int64_t offset = page.file_offset;
    // The same bytes may be staged for several passes: the next that is free serves this one.
    for (; next_staged < staged_count; ++next_staged, serving = false) {
      const StagedRun& run = (*staged)[next_staged];
      if (run.file_offset + run.bytes > offset && (serving || !run.taken)) break;
    }
    if (next_staged < staged_count) {
      StagedRun& run = (*staged)[next_staged];
      const bool holds =
          run.file_offset <= offset && offset + page.page_bytes() <= run.file_offset + run.bytes;
      if (holds) {
        if (!serving) plan->staged.push_back({run.slot, i, i, 0});
        serving = true;
        run.taken = true;
        plan->staged.back().use_end = i + 1;
        if (offset != offset_before) plan->staged.back().bytes += page.page_bytes();
        offset_before = offset;
        continue;
      }
    }
    offset_before = offset;
    if (plan->reads.size() > first_read) {
      ReadRun& run = plan->reads.back();
      const int64_t run_end = run.file_offset + run.bytes;
      if (offset + page.page_bytes() == run_end) {  // the same page, for another row
        run.use_end = i + 1;
        continue;
      }
      if (offset == run_end && run.bytes + page.page_bytes() <= read_bytes_max) {
        run.bytes += page.page_bytes();
        run.use_end = i + 1;
        plan->read_bytes += page.page_bytes();
        continue;
      }
    }
    plan->reads.push_back({offset, page.page_bytes(), i, i + 1});
    plan->read_bytes += page.page_bytes();
  }
}

void limit_plan(int64_t bytes_max, Plan* plan) {
  for (const StagedUse& use : plan->staged) bytes_max -= use.bytes;
  while (!plan->reads.empty() && plan->read_bytes > bytes_max) {
    plan->read_bytes -= plan->reads.back().bytes;
    plan->reads.pop_back();
  }
}

Plan make_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max, std::vector<StagedRun>* staged) {
  Plan plan;
  extend_plan(uses, read_bytes_max, staged, &plan);
  return plan;
}

}  // namespace csd
