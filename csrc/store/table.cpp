#include "store/table.h"

#include <algorithm>
#include <string>

#include "base/error.h"
#include "store/format.h"

namespace csd {
namespace {

constexpr int64_t kRunBytesMax = int64_t{8} << 20;  // given back only as a whole: see extents.cpp
constexpr int64_t kLengthMax = int64_t{1} << 48;

template <typename T>
T load(const uint8_t* bytes, int count = sizeof(T)) {
  uint64_t value = 0;
  for (int i = count; i-- > 0;) value = value << 8 | bytes[i];
  return static_cast<T>(value);
}

void store(uint64_t value, int count, uint8_t* bytes) {
  for (int i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(value >> (8 * i));
}

std::string text(int64_t value) { return std::to_string(value); }

[[noreturn]] void corrupt(const std::string& what) {
  throw Error(ErrorKind::kCorrupt,
              "a page table is damaged: " + what +
                  "; the sequence cannot be used: remove it (torch-csd rm) and prefill it anew");
}

}  // namespace

int64_t page_count(const RowTable& row) {
  if (row.length < 0 || row.length > kLengthMax) corrupt("a row of " + text(row.length) + " tokens");
  const int64_t end = (row.length + kPageTokens - 1) / kPageTokens;
  if (row.first_page < 0 || row.first_page > end) {
    corrupt("a row of " + text(row.length) + " tokens begins with page " + text(row.first_page));
  }
  return end - row.first_page;
}

std::vector<PageEntry> parse_entries(const uint8_t* bytes, int64_t byte_count, int64_t file_bytes) {
  if (byte_count % kEntryBytes != 0) corrupt(text(byte_count) + " bytes are no whole number of entries");
  std::vector<PageEntry> entries;
  entries.reserve(static_cast<size_t>(byte_count / kEntryBytes));
  for (const uint8_t* at = bytes; at != bytes + byte_count; at += kEntryBytes) {
    const auto offset = load<uint64_t>(at);
    const auto page_bytes = load<int64_t>(at + 12, 2) * kBlockBytes;
    const uint8_t kind = at[14];
    const uint8_t reserved = at[15];
    if (page_bytes == 0) corrupt("a page of 0 bytes");
    if (kind > 1 || reserved != 0) corrupt("a page of kind " + text(kind) + " (" + text(reserved) + ")");
    // Compared without adding, which might overflow.
    const bool inside = offset >= static_cast<uint64_t>(kDataOffset) && file_bytes >= page_bytes &&
                        offset <= static_cast<uint64_t>(file_bytes - page_bytes);
    if (!inside || offset % static_cast<uint64_t>(kBlockBytes) != 0) {
      corrupt("a page of " + text(page_bytes) + " bytes at byte " + std::to_string(offset) +
              " of a file of " + text(file_bytes) + " bytes, whose pages begin at byte " + text(kDataOffset) +
              " on blocks of " + text(kBlockBytes));
    }
    entries.push_back({static_cast<int64_t>(offset), page_bytes, load<uint32_t>(at + 8), kind == 1});
  }
  return entries;
}

void write_entry(const PageEntry& entry, uint8_t* bytes) {
  store(static_cast<uint64_t>(entry.file_offset), 8, bytes);
  store(entry.checksum, 4, bytes + 8);
  store(static_cast<uint64_t>(entry.page_bytes / kBlockBytes), 2, bytes + 12);
  bytes[14] = entry.quantised ? 1 : 0;
  bytes[15] = 0;
}

void check_layer(const Geometry& geometry, int64_t begin, const std::vector<RowTable>& rows,
                 const std::vector<PageEntry>& entries) {
  int64_t wanted = 0;
  for (const RowTable& row : rows) {
    wanted += page_count(row);
    if (begin < row.first_page * kPageTokens || begin > row.length) {
      corrupt("tokens can be read from position " + text(begin) + " on, of a row of " + text(row.length) +
              " that begins with page " + text(row.first_page));
    }
  }
  if (wanted != static_cast<int64_t>(entries.size())) {
    corrupt("rows of " + text(wanted) + " pages, and entries of " +
            text(static_cast<int64_t>(entries.size())));
  }
  for (const PageEntry& entry : entries) {
    if (entry.quantised && !geometry.quantised()) corrupt("a quantised page in a layer that has none");
    const PageLayout layout = entry.quantised ? geometry.stored() : geometry.full_precision();
    if (entry.page_bytes != layout.page_bytes()) {
      corrupt("a page of " + text(entry.page_bytes) + " bytes, where the layer's are of " +
              text(layout.page_bytes()));
    }
  }
}

std::vector<PageRun> find_runs(const std::vector<std::vector<PageEntry>>& tables, std::set<size_t>* damaged) {
  struct Use {
    PageEntry entry;
    size_t table;
  };
  std::vector<Use> uses;
  for (size_t table = 0; table < tables.size(); ++table) {
    for (const PageEntry& entry : tables[table]) uses.push_back({entry, table});
  }
  std::sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) {
    return a.entry.file_offset != b.entry.file_offset ? a.entry.file_offset < b.entry.file_offset
                                                      : a.table < b.table;
  });
  std::vector<PageRun> runs;
  std::vector<size_t> owners, previous_owners;  // tables that have the page, and the run before it
  for (size_t i = 0; i < uses.size();) {
    const PageEntry& page = uses[i].entry;
    int64_t page_bytes = page.page_bytes;
    bool same = true;
    owners.clear();
    for (; i < uses.size() && uses[i].entry.file_offset == page.file_offset; ++i) {
      const PageEntry& other = uses[i].entry;
      same = same && other.page_bytes == page.page_bytes && other.checksum == page.checksum &&
             other.quantised == page.quantised;
      page_bytes = std::max(page_bytes, other.page_bytes);
      if (owners.empty() || owners.back() != uses[i].table) owners.push_back(uses[i].table);
    }
    if (!same) damaged->insert(owners.begin(), owners.end());
    const int64_t end =
        runs.empty() ? 0 : runs.back().file_offset + runs.back().page_bytes * runs.back().page_count;
    if (page.file_offset < end) {  // one run of all that overlaps, as if it were one page
      damaged->insert(owners.begin(), owners.end());
      damaged->insert(previous_owners.begin(), previous_owners.end());
      PageRun& run = runs.back();
      run.page_bytes = std::max(end, page.file_offset + page_bytes) - run.file_offset;
      run.page_count = 1;
      previous_owners.insert(previous_owners.end(), owners.begin(), owners.end());
      continue;
    }
    const bool adjacent = !runs.empty() && page.file_offset == end && runs.back().page_bytes == page_bytes &&
                          (runs.back().page_count + 1) * page_bytes <= kRunBytesMax &&
                          owners == previous_owners;
    if (adjacent) {
      runs.back().page_count++;
    } else {
      runs.push_back({page.file_offset, page_bytes, 1});
    }
    owners.swap(previous_owners);
  }
  return runs;
}

}  // namespace csd
