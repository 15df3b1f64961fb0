// The plan of one pass over stored pages: which are in memory, and how the others are read in few, large,
// sequential reads. Pure: no I/O, no threads.
#pragma once

#include <cstdint>
#include <vector>

#include "store/layer.h"

namespace csd {

// One page, or a part of it, that a pass needs for one row. Rows that share a page (beams, forks) each have a
// use of it; it is read once.
struct PageUse {
  const Page* page = nullptr;
  int64_t row = 0;    // index into the layer's rows
  int64_t index = 0;  // page index: its first token is at position index * kPageTokens
  // Bytes of the page, [begin, end), that are needed; end 0: all of it.
  int32_t begin = 0;
  int32_t end = 0;
  // Of a part that is made of whole tiles: their checksums, and how many they are. Null: nothing to compare.
  const uint32_t* checksums = nullptr;
  int32_t tile_count = 0;
  int32_t slot = 0;  // the consumer's number for it
  // In memory outside of the page, or to be put there by whoever reads it.
  const uint8_t* kept = nullptr;
  uint8_t* keep_at = nullptr;

  bool whole() const { return end == 0; }
  bool in_memory() const { return kept != nullptr || page->memory != nullptr; }
  const uint8_t* memory() const { return kept != nullptr ? kept : page->memory + begin; }
  int64_t bytes() const { return whole() ? page->page_bytes() : end - begin; }
  // Where it lies on the drive: whole blocks.
  int64_t file_begin() const { return page->file_offset + begin / kBlockBytes * kBlockBytes; }
  int64_t file_end() const {
    return page->file_offset + (whole() ? page->page_bytes() : round_up(end, kBlockBytes));
  }
};

// What lies side by side on the drive, read at once.
struct ReadRun {
  int64_t file_offset = 0;
  int64_t bytes = 0;
  int64_t use_begin = 0;  // Plan::drive_uses
  int64_t use_end = 0;
};

// Bytes of the drive that were read ahead: they are in a staging slot, or on their way to it.
struct StagedRun {
  int64_t file_offset = 0;
  int64_t bytes = 0;
  int slot = 0;
  bool taken = false;  // by a plan; it serves one
};

// Uses that a staged run serves.
struct StagedUse {
  int slot = 0;
  int64_t use_begin = 0;  // Plan::drive_uses
  int64_t use_end = 0;
  int64_t bytes = 0;  // of the run that are used
};

struct Plan {
  std::vector<PageUse> memory_uses;
  std::vector<PageUse> drive_uses;  // by file offset
  std::vector<ReadRun> reads;       // of what is not staged
  std::vector<StagedUse> staged;
  int64_t read_bytes = 0;
  int64_t memory_bytes = 0;  // of memory_uses
  int64_t layer = -1;        // the caller's number for it, for errors to name
};

// read_bytes_max: no run is longer, except that it holds at least one use. staged: by file offset; what the
// plan uses of it is marked as taken. gap_bytes_max: runs so near to one another are read as one.
Plan make_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max,
               std::vector<StagedRun>* staged = nullptr, int64_t gap_bytes_max = 0);

// Plans further uses behind those that the plan has, in runs of their own.
void extend_plan(const std::vector<PageUse>& uses, int64_t read_bytes_max, std::vector<StagedRun>* staged,
                 Plan* plan, int64_t gap_bytes_max = 0);

// Takes the last reads off a plan, until staged runs and reads are bytes_max together.
void limit_plan(int64_t bytes_max, Plan* plan);

}  // namespace csd
