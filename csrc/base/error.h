// Errors that cross into Python. The text says what was wanted, what came and what to do; the kind picks the
// Python class (ops.py reads the "[csd:kind]" prefix, the only thing that survives the stable ABI besides the
// text).
#pragma once

#include <stdexcept>
#include <string>

namespace csd {

enum class ErrorKind {
  kValue,     // ValueError: an argument is wrong
  kStore,     // StoreError: the files or the drive
  kClosed,    // StoreClosedError: used after close
  kForked,    // StoreClosedError: used from a forked child
  kStale,     // StaleTensorError: a view of tokens that are gone
  kNoSpace,   // StoreFullError: the drive is full
  kBudget,    // MemoryBudgetError: memory_budget cannot hold the minimum
  kCorrupt,   // StoreCorruptError: bytes on the drive are not what was written
  kInternal,  // RuntimeError: a broken invariant of ours
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& text);
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// "path: what: strerror(errno_value)"; ENOSPC and EDQUOT become kNoSpace.
Error io_error(const std::string& path, const std::string& what, int errno_value);

// An error's text as part of another text, without the "[csd:kind] " that leads it.
std::string untagged(const Error& error);

// A check of our own invariants; user mistakes are validated in Python before they get here.
#define CSD_CHECK(condition, text)                                                             \
  do {                                                                                         \
    if (!(condition)) throw ::csd::Error(::csd::ErrorKind::kInternal, std::string("") + text); \
  } while (0)

}  // namespace csd
