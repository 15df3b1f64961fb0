// Page tables as a catalogue keeps them (FORMAT.md), and what has to hold of them before a page is trusted.
// Pure: bytes in, checked values out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <vector>

#include "base/types.h"

namespace csd {

constexpr int64_t kEntryBytes = 16;

// Where one page is.
struct PageEntry {
  int64_t file_offset = 0;
  int64_t page_bytes = 0;
  uint32_t checksum = 0;
  bool quantised = false;
};

// [begin, begin + bytes) of the file: adjacent pages of one size that come and go together.
struct PageRun {
  int64_t file_offset = 0;
  int64_t page_bytes = 0;
  int64_t page_count = 0;
};

// One row of a layer.
struct RowTable {
  int64_t first_page = 0;
  int64_t length = 0;  // tokens
};

// Pages of a row of so many tokens that begins with so manieth page. Throws kCorrupt for what no row has.
int64_t page_count(const RowTable& row);

// bytes: a whole number of entries. Throws kCorrupt for an entry that lies outside [kDataOffset, file_bytes),
// off a block, or is of no page.
std::vector<PageEntry> parse_entries(const uint8_t* bytes, int64_t byte_count, int64_t file_bytes);

void write_entry(const PageEntry& entry, uint8_t* bytes);

// The pages of one layer's rows must be of its layouts. Throws kCorrupt.
void check_layer(const Geometry& geometry, int64_t begin, const std::vector<RowTable>& rows,
                 const std::vector<PageEntry>& entries);

// The space that page tables take: tables[i] are all entries of one sequence. Runs are by offset; pages of a
// run lie in the same sequences. Tables whose pages overlap others without being the same are no one's to
// trust: their numbers are added to *damaged, and their space is a run of its own all the same.
std::vector<PageRun> find_runs(const std::vector<std::vector<PageEntry>>& tables,
                               std::set<std::size_t>* damaged);

}  // namespace csd
