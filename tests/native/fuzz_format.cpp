// What is read from files that anybody may have written: the header of a file of pages, and page tables. For
// libFuzzer (make fuzz), and with -DCSD_REPLAY a program that runs the files it is given (the corpus, in the
// ordinary tests).
//
// The first byte says what the rest is: 0 a header block, 1 one whose checksum is put right, else a layer and
// its page tables as a catalogue has them. Whatever comes, the answer is an Error of a kind that says so, or
// values that hold what FORMAT.md promises; nothing is read beside the input and nothing overflows (build
// with the sanitizers).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "base/checksum.h"
#include "base/error.h"
#include "base/types.h"
#include "store/format.h"
#include "store/table.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (0)

using namespace csd;

namespace {

// Takes values off the front of the input; zeros when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  template <typename T>
  T take() {
    T value{};
    const size_t count = size_ < sizeof(value) ? size_ : sizeof(value);
    std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  void skip(size_t count) {
    data_ += count;
    size_ -= count;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

void check_refusal(const Error& error) {
  CHECK(error.kind() == ErrorKind::kCorrupt || error.kind() == ErrorKind::kStore);
  CHECK(std::strlen(error.what()) > 20);
}

void fuzz_header(const uint8_t* data, size_t size) {
  try {
    const Header header = parse_header(data, static_cast<int64_t>(size), "pages.csd");
    CHECK(header.lifetime == Lifetime::kScratch || header.lifetime == Lifetime::kDurable);
    CHECK(size >= 64 && std::memcmp(data + 40, header.store_id.data(), 16) == 0);
  } catch (const Error& error) {
    check_refusal(error);
  }
}

void fuzz_tables(Input input) {
  Geometry geometry;
  geometry.num_kv_heads = 1 + input.take<uint8_t>() % 64;
  geometry.head_dim_k = kHeadDimMultiple * (1 + input.take<uint8_t>() % 72);
  geometry.head_dim_v = kHeadDimMultiple * (1 + input.take<uint8_t>() % 72);
  const auto kind = input.take<uint8_t>();
  geometry.dtype = static_cast<DType>(kind % 3);
  geometry.code_bits = kind / 3 % 3 * 4;
  const auto begin = input.take<int64_t>();
  const auto file_bytes = input.take<int64_t>();
  std::vector<RowTable> rows(input.take<uint8_t>() % 4);
  for (RowTable& row : rows) {
    row.first_page = input.take<int64_t>();
    row.length = input.take<int64_t>();
  }
  const size_t split = input.take<uint8_t>() * kEntryBytes;
  try {
    const auto entries = parse_entries(input.data(), static_cast<int64_t>(input.size()), file_bytes);
    for (const PageEntry& entry : entries) {
      CHECK(entry.file_offset >= kDataOffset && entry.page_bytes > 0);
      CHECK(entry.file_offset % kBlockBytes == 0 && entry.page_bytes % kBlockBytes == 0);
      CHECK(entry.file_offset <= file_bytes - entry.page_bytes);
      uint8_t bytes[kEntryBytes];
      write_entry(entry, bytes);
      const auto again = parse_entries(bytes, kEntryBytes, file_bytes);
      CHECK(again[0].file_offset == entry.file_offset && again[0].checksum == entry.checksum);
    }
    const size_t middle = entries.size() < split / kEntryBytes ? entries.size() : split / kEntryBytes;
    const auto cut = entries.begin() + static_cast<int64_t>(middle);
    std::set<size_t> damaged;
    const auto runs = find_runs({{entries.begin(), cut}, {cut, entries.end()}}, &damaged);
    int64_t end = kDataOffset;
    for (const PageRun& run : runs) {
      CHECK(run.file_offset >= end && run.page_count > 0 && run.page_bytes > 0);
      end = run.file_offset + run.page_bytes * run.page_count;
    }
    CHECK(runs.empty() || end <= file_bytes);
    for (const PageEntry& entry : entries) {  // every page lies in one run
      size_t holders = 0;
      for (const PageRun& run : runs) {
        const int64_t run_end = run.file_offset + run.page_bytes * run.page_count;
        holders += run.file_offset <= entry.file_offset && entry.file_offset + entry.page_bytes <= run_end;
      }
      CHECK(holders == 1);
    }
    check_layer(geometry, begin, rows, entries);
    size_t pages = 0;
    for (const RowTable& row : rows) {
      pages += static_cast<size_t>(page_count(row));
      CHECK(begin >= row.first_page * kPageTokens && begin <= row.length);
    }
    CHECK(pages == entries.size());
  } catch (const Error& error) {
    check_refusal(error);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  if (data[0] == 0) {
    fuzz_header(data + 1, size - 1);
  } else if (data[0] == 1) {
    // No fuzzer guesses a checksum, and what comes after it is checked as well.
    std::vector<uint8_t> fixed(data + 1, data + size);
    if (fixed.size() >= 64) {
      const uint32_t checksum = crc32c(fixed.data(), 60);
      std::memcpy(fixed.data() + 60, &checksum, sizeof(checksum));
    }
    fuzz_header(fixed.data(), fixed.size());
  } else {
    fuzz_tables(Input(data + 1, size - 1));
  }
  return 0;
}

#ifdef CSD_REPLAY
int main(int count, char** paths) {
  for (int i = 1; i < count; ++i) {
    std::FILE* file = std::fopen(paths[i], "rb");
    CHECK(file != nullptr);
    std::vector<uint8_t> bytes(1 << 20);
    bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
    std::fclose(file);
    // Every prefix too, and in memory of its own size, so that reading past its end is seen.
    for (size_t size = 0; size <= bytes.size(); ++size) {
      const std::vector<uint8_t> part(bytes.begin(), bytes.begin() + static_cast<int64_t>(size));
      LLVMFuzzerTestOneInput(part.data(), part.size());
    }
  }
  std::printf("%d inputs\n", count - 1);
}
#endif
