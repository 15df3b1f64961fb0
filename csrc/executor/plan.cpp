#include "executor/plan.h"

#include <algorithm>

namespace csd {

Plan make_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max) {
  Plan plan;
  for (const PageUse& use : uses) {
    if (use.page->memory == nullptr) {
      plan.drive_uses.push_back(use);
    } else {
      plan.memory_uses.push_back(use);
      plan.memory_bytes += use.page->page_bytes;
    }
  }
  // By place on the drive, not by token: rows interleave there, and evicted pages may lie in any order.
  const auto by_offset = [](const PageUse& a, const PageUse& b) {
    return a.page->file_offset < b.page->file_offset;
  };
  if (!std::is_sorted(plan.drive_uses.begin(), plan.drive_uses.end(), by_offset)) {
    std::stable_sort(plan.drive_uses.begin(), plan.drive_uses.end(), by_offset);
  }
  const auto count = static_cast<int64_t>(plan.drive_uses.size());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = plan.drive_uses[static_cast<size_t>(i)].page->file_offset;
    const int64_t page_bytes = plan.drive_uses[static_cast<size_t>(i)].page->page_bytes;
    if (!plan.reads.empty()) {
      ReadRun& run = plan.reads.back();
      const int64_t run_end = run.file_offset + run.bytes;
      if (offset + page_bytes == run_end) {  // the same page, for another row
        run.use_end = i + 1;
        continue;
      }
      if (offset == run_end && run.bytes + page_bytes <= read_bytes_max) {
        run.bytes += page_bytes;
        run.use_end = i + 1;
        plan.read_bytes += page_bytes;
        continue;
      }
    }
    plan.reads.push_back({offset, page_bytes, i, i + 1});
    plan.read_bytes += page_bytes;
  }
  return plan;
}

}  // namespace csd
