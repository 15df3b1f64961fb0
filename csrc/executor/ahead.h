// Foresees which pages the passes to come will read: models go over their layers in the same order at every
// step. Pure: no I/O, no threads; a wrong guess only wastes reads.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "executor/plan.h"
#include "store/layer.h"

namespace csd {

// An eager attention goes over a layer twice: its products are passes of their own. Reading back belongs to
// no order.
enum class PassKind : uint8_t { kAttend, kScores, kWeightedSum, kRead };

struct PassKey {
  int64_t layer_id = 0;
  PassKind kind = PassKind::kAttend;

  bool operator<(const PassKey& other) const {
    return std::tie(layer_id, kind) < std::tie(other.layer_id, other.kind);
  }
  bool operator==(const PassKey& other) const { return layer_id == other.layer_id && kind == other.kind; }
};

class ReadAhead {
 public:
  explicit ReadAhead(const std::map<int64_t, Layer>* layers) : layers_(*layers) {}

  // A pass that needs pages of the drive begins with these uses (by row, then by index).
  void note(PassKey pass, const std::vector<PageUse>& uses);
  // What the passes after this one will need of the drive, the next pass first: one list for each, until they
  // are bytes_max or more together. No page is larger than page_bytes_max. Pages that are still being filled
  // are left out: they will have changed.
  std::vector<std::vector<PageUse>> after(PassKey pass, int64_t bytes_max, int64_t page_bytes_max) const;
  void forget(int64_t layer_id);
  // How much of a window is worth reading ahead: less when most guesses were wrong.
  int64_t worthwhile_bytes(int64_t window_bytes) const;

 private:
  // Pages [begin, end) of a row; grows: to the end that the row has by then.
  struct Range {
    int64_t row;
    int64_t begin;
    int64_t end;
    bool grows;
  };
  struct Known {
    std::vector<Range> ranges;    // of the last time
    std::optional<PassKey> next;  // what came after it
    int misses = 0;               // in a row; one may be a passing disturbance
  };

  const std::map<int64_t, Layer>& layers_;
  std::map<PassKey, Known> known_;
  std::optional<PassKey> last_;
  int misses_ = 0;  // over all, less the hits: callers that take turns at random are not worth much reading
};

}  // namespace csd
