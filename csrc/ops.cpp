// Op schemas, and the only file that includes torch: tensors in, raw pointers on, to a Drive. Stable ABI
// only.
//
// A handle is an int64 tensor {drive, layer, epoch}: graphs can carry it without being tied to one store. The
// numbers are the caller's (ops.py counts them): ops that open or create take the handle under which the
// thing will be known. layer is -1 in a drive's own handle; epoch is -1 for "as the layer is now", else the
// state that a StorageTensor stands for. Ops that change a store take the handle as Tensor(a!), so that
// graphs keep their order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "executor/drive.h"
#include "executor/file_reader.h"
#include "executor/linear.h"
#include "kernels/weights.h"
#include "module.h"

namespace csd::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHandleSize = 3;

// ---- handles ----

std::mutex registry_mutex;

std::map<int64_t, std::shared_ptr<Drive>>& registry() {
  // Never destroyed: stores left open at exit would otherwise race with the destruction of other statics.
  static auto* drives = new std::map<int64_t, std::shared_ptr<Drive>>();
  return *drives;
}

// An I/O queue of a drive, under its number.
struct OpenQueue {
  int64_t drive;
  std::shared_ptr<SlabQueue> queue;
};

std::map<int64_t, OpenQueue>& queue_registry() {
  static auto* queues = new std::map<int64_t, OpenQueue>();
  return *queues;
}

std::map<int64_t, std::shared_ptr<FileReader>>& reader_registry() {
  static auto* readers = new std::map<int64_t, std::shared_ptr<FileReader>>();
  return *readers;
}

std::string text(int64_t value) { return std::to_string(value); }

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorKind::kValue, message); }

struct Handle {
  std::shared_ptr<Drive> drive;
  int64_t layer;
  int64_t epoch;
};

const int64_t* handle_values(const Tensor& handle) {
  if (handle.scalar_type() != ScalarType::Long || handle.numel() != kHandleSize || !handle.is_cpu()) {
    fail("a store handle must be an int64 CPU tensor of 3 elements");
  }
  return static_cast<const int64_t*>(handle.const_data_ptr());
}

Handle open_handle(const Tensor& handle) {
  const int64_t* values = handle_values(handle);
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(values[0]);
  if (found == registry().end()) throw Error(ErrorKind::kClosed, "this store is closed; open a new one");
  return {found->second, values[1], values[2]};
}

// At the end of every op that moves bytes.
template <typename DriveOrReader>
void warn_about(DriveOrReader* source) {
  const std::string warning = source->take_warning();
  if (!warning.empty()) warn_in_python(warning);
}

// ---- tensors ----

DType to_dtype(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(std::string(what) + " must be float32, bfloat16 or float16; convert it with .to()");
  }
}

void check_rank4(const Tensor& tensor, const char* what, const char* shape) {
  if (tensor.dim() != 4) {
    fail(std::string(what) + " must be " + shape + ", got " + text(tensor.dim()) + " dimensions");
  }
  if (!tensor.is_cpu()) fail(std::string(what) + " must be on the CPU here; ops.py moves it");
}

Tensor dense_last(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) <= 1
             ? tensor
             : torch::stable::contiguous(tensor);
}

QueryView query_view(const Tensor& q) {
  QueryView view;
  view.dtype = to_dtype(q.scalar_type(), "q");
  view.data = q.const_data_ptr();
  for (int64_t i = 0; i < 3; ++i) view.strides[i] = q.stride(i);
  return view;
}

Span make_span(const Tensor& q, int64_t row_begin, int64_t kv_begin, int64_t kv_end) {
  Span span;
  span.row_begin = row_begin;
  span.row_count = q.size(0);
  span.kv_begin = kv_begin;
  span.kv_end = kv_end;
  return span;
}

void check_heads(int64_t num_heads, const Geometry& geometry, const char* what) {
  if (num_heads == 0 || num_heads % geometry.num_kv_heads != 0) {
    fail(std::string(what) + " must have a multiple of the layer's " + text(geometry.num_kv_heads) +
         " kv heads, got " + text(num_heads));
  }
}

void check_width(int64_t width, int64_t wanted, const char* what) {
  if (width != wanted) {
    fail(std::string(what) + " must be " + text(wanted) + " as in the layer, got " + text(width));
  }
}

// Per-head float32 values: sinks, ALiBi slopes.
const float* head_values(const std::optional<Tensor>& tensor, int64_t num_heads, const char* what) {
  if (!tensor.has_value()) return nullptr;
  if (tensor->scalar_type() != ScalarType::Float || tensor->numel() != num_heads ||
      !tensor->is_contiguous() || !tensor->is_cpu()) {
    fail(std::string(what) + " must be a contiguous float32 CPU tensor of " + text(num_heads) +
         " elements (one per query head), got " + text(tensor->numel()));
  }
  return static_cast<const float*>(tensor->const_data_ptr());
}

MaskView mask_view(const std::optional<Tensor>& mask, int64_t batch, int64_t num_heads, int64_t q_len) {
  MaskView view;
  if (!mask.has_value()) return view;
  check_rank4(*mask, "mask", "[batch, num_heads, q_len, kv_len]");
  switch (mask->scalar_type()) {
    case ScalarType::Bool:
      view.kind = MaskKind::kBool;
      break;
    case ScalarType::Float:
      view.kind = MaskKind::kFloat32;
      break;
    case ScalarType::BFloat16:
      view.kind = MaskKind::kBFloat16;
      break;
    case ScalarType::Half:
      view.kind = MaskKind::kFloat16;
      break;
    default:
      fail("mask must be bool (True: attend) or float32, bfloat16 or float16 (added to the scores)");
  }
  const int64_t wanted[3] = {batch, num_heads, q_len};
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t size = mask->size(i);
    if (i < 3 && size != wanted[i] && size != 1) {
      fail("mask must be broadcastable to [" + text(batch) + ", " + text(num_heads) + ", " + text(q_len) +
           ", kv_len], got size " + text(size) + " in dimension " + text(i));
    }
    view.strides[i] = size == 1 ? 0 : mask->stride(i);
  }
  view.kv_len = mask->size(3);  // the drive compares it, when it knows how long the rows are
  view.data = mask->const_data_ptr();
  return view;
}

// As torch::stable::empty, which looks the op up by name and boxes its arguments: twice the time.
template <size_t kDim>
Tensor new_tensor(const int64_t (&sizes)[kDim], ScalarType dtype) {
  int64_t strides[kDim];
  int64_t stride = 1;
  for (size_t i = kDim; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDim, sizes, strides, static_cast<int32_t>(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// ---- stores ----

// torch's own threads: between two ops of a model they spin, waiting for the next.
bool lend_torch_threads(int count, void (*call)(void* context, int index), void* context) {
  if (static_cast<uint32_t>(count) > torch::stable::get_num_threads()) return false;
  torch::stable::parallel_for(0, count, 1, [call, context](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) call(context, static_cast<int>(index));
  });
  return true;
}

void close(const Tensor& drive) {
  const int64_t number = handle_values(drive)[0];
  std::shared_ptr<Drive> closing;  // its destructor waits for I/O: outside of the lock
  std::vector<std::shared_ptr<SlabQueue>> queues;
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = registry().find(number);
    if (found == registry().end()) return;
    closing = std::move(found->second);
    registry().erase(found);
    for (auto open = queue_registry().begin(); open != queue_registry().end();) {
      if (open->second.drive != number) {
        ++open;
        continue;
      }
      queues.push_back(std::move(open->second.queue));
      open = queue_registry().erase(open);
    }
  }
  for (const std::shared_ptr<SlabQueue>& queue : queues) queue->close();
}

DurableMode durable_mode(const std::string& name) {
  if (name == "create") return DurableMode::kCreate;
  if (name == "read") return DurableMode::kReadOnly;
  if (name != "write") fail("durable_mode must be create, write or read, got " + name);
  return DurableMode::kWrite;
}

StoreId to_store_id(const Tensor& bytes) {
  StoreId id{};
  if (bytes.scalar_type() != ScalarType::Byte || !bytes.is_contiguous() ||
      bytes.numel() != static_cast<int64_t>(id.size())) {
    fail("a store id is a uint8 tensor of 16 elements");
  }
  std::copy_n(static_cast<const uint8_t*>(bytes.const_data_ptr()), id.size(), id.begin());
  return id;
}

// durable_path: empty for a scratch file; the two after it are then not looked at.
void open(const Tensor& drive, std::string directory, std::string io_engine, std::string simd,
          int64_t memory_budget, int64_t threads, int64_t queue_depth, int64_t read_ahead, bool resident,
          bool checksums, int64_t bytes_max, std::string durable_path, std::string mode,
          const Tensor& store_id) {
  DriveOptions options;
  options.directory = std::move(directory);
  options.io_engine = std::move(io_engine);
  options.simd = std::move(simd);
  options.memory_budget_bytes = memory_budget;
  options.threads = threads;
  options.queue_depth = queue_depth;
  options.read_ahead_bytes = read_ahead;
  options.resident = resident;
  options.bytes_max = bytes_max;
  options.durable_path = std::move(durable_path);
  if (!options.durable_path.empty()) {
    options.durable_mode = durable_mode(mode);
    options.store_id = to_store_id(store_id);
  }
  options.checksums = checksums;
  options.lend_threads = &lend_torch_threads;
  close(drive);
  auto opened = std::make_shared<Drive>(options);
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[handle_values(drive)[0]] = std::move(opened);
}

Geometry make_geometry(int64_t num_kv_heads, int64_t head_dim_k, int64_t head_dim_v, ScalarType dtype,
                       int64_t code_bits) {
  if (num_kv_heads < 1) fail("num_kv_heads must be at least 1, got " + text(num_kv_heads));
  for (const int64_t head_dim : {head_dim_k, head_dim_v}) {
    if (head_dim < kHeadDimMultiple || head_dim > kHeadDimMax || head_dim % kHeadDimMultiple != 0) {
      fail("head_dim must be a multiple of " + text(kHeadDimMultiple) + " from " + text(kHeadDimMultiple) +
           " to " + text(kHeadDimMax) + ", got " + text(head_dim) + "; pad the heads");
    }
  }
  Geometry geometry;
  geometry.num_kv_heads = num_kv_heads;
  geometry.head_dim_k = head_dim_k;
  geometry.head_dim_v = head_dim_v;
  geometry.dtype = to_dtype(dtype, "dtype");
  if (code_bits != 0 && code_bits != 8 && code_bits != 4) {
    fail("code_bits must be 8, 4 or 0 (not quantised), got " + text(code_bits));
  }
  geometry.code_bits = static_cast<int>(code_bits);
  return geometry;
}

void create_layer(const Tensor& handle, int64_t num_kv_heads, int64_t head_dim_k, int64_t head_dim_v,
                  ScalarType dtype, int64_t code_bits, int64_t number) {
  const Geometry geometry = make_geometry(num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits);
  const Handle target = open_handle(handle);
  target.drive->create_layer(target.layer, geometry, number);
}

void fork_layer(const Tensor& handle, const Tensor& source) {
  const Handle target = open_handle(handle);
  if (handle_values(source)[0] != handle_values(handle)[0]) fail("a fork lies on the drive of its source");
  target.drive->fork_layer(target.layer, handle_values(source)[1]);
}

// kind: as SummaryKind counts them.
SummaryKind to_summary_kind(int64_t kind) {
  if (kind < 0 || kind >= kSummaryKinds) fail("kind must be 0 (values), 1 (bounds) or 2 (sketch)");
  return static_cast<SummaryKind>(kind);
}

void keep_summary(const Tensor& handle, int64_t kind) {
  const Handle target = open_handle(handle);
  target.drive->keep_summary(target.layer, to_summary_kind(kind));
}

void drop_layer(const Tensor& handle) {
  const Handle target = open_handle(handle);
  target.drive->drop_layer(target.layer);
}

// [epoch, begin, length of each row]
Tensor info_tensor(const LayerInfo& info) {
  Tensor result = new_tensor({2 + static_cast<int64_t>(info.lengths.size())}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(result.mutable_data_ptr());
  values[0] = info.epoch;
  values[1] = info.begin;
  std::copy(info.lengths.begin(), info.lengths.end(), values + 2);
  return result;
}

Tensor layer_info(const Tensor& handle) {
  const Handle source = open_handle(handle);
  return info_tensor(source.drive->info(source.layer));
}

// New tokens for a layer: k and v are dense in their last dimension, and what the request points into.
struct AppendArguments {
  Tensor k;
  Tensor v;
  AppendRequest request;
};

AppendArguments append_arguments(const Handle& target, const Tensor& k_any, const Tensor& v_any) {
  check_rank4(k_any, "k", "[batch, num_kv_heads, q_len, head_dim]");
  check_rank4(v_any, "v", "[batch, num_kv_heads, q_len, head_dim]");
  const Geometry geometry = target.drive->geometry(target.layer);
  for (const Tensor* tensor : {&k_any, &v_any}) {
    const char* what = tensor == &k_any ? "k's num_kv_heads" : "v's num_kv_heads";
    check_width(tensor->size(1), geometry.num_kv_heads, what);
  }
  check_width(k_any.size(3), geometry.head_dim_k, "k's head_dim");
  check_width(v_any.size(3), geometry.head_dim_v, "v's head_dim");
  if (k_any.size(0) != v_any.size(0) || k_any.size(2) != v_any.size(2) ||
      k_any.scalar_type() != v_any.scalar_type()) {
    fail("k and v must agree in batch, tokens and dtype, got batch " + text(k_any.size(0)) + " and " +
         text(v_any.size(0)) + ", tokens " + text(k_any.size(2)) + " and " + text(v_any.size(2)));
  }
  AppendArguments arguments{dense_last(k_any), dense_last(v_any), {}};
  AppendRequest& request = arguments.request;
  request.dtype = to_dtype(k_any.scalar_type(), "k");
  request.row_count = k_any.size(0);
  request.q_len = k_any.size(2);
  request.k = arguments.k.const_data_ptr();
  request.v = arguments.v.const_data_ptr();
  for (int64_t i = 0; i < 3; ++i) {
    request.k_strides[i] = arguments.k.stride(i);
    request.v_strides[i] = arguments.v.stride(i);
  }
  if (request.row_count < 1) fail("append: the batch must have at least one row");
  return arguments;
}

// Returns what layer_info would at the moment of the append, so that no call of it is needed after.
Tensor append(const Tensor& handle, const Tensor& k_any, const Tensor& v_any,
              std::optional<std::vector<int64_t>> lengths) {
  const Handle target = open_handle(handle);
  AppendArguments arguments = append_arguments(target, k_any, v_any);
  AppendRequest& request = arguments.request;
  if (lengths.has_value()) {
    if (static_cast<int64_t>(lengths->size()) != request.row_count) {
      fail("lengths must have one entry per row (" + text(request.row_count) + "), got " +
           text(static_cast<int64_t>(lengths->size())));
    }
    for (const int64_t length : *lengths) {
      if (length < 0 || length > request.q_len) {
        fail("lengths must be between 0 and k's " + text(request.q_len) + " tokens, got " + text(length));
      }
    }
    request.lengths = lengths->data();
  }
  const LayerInfo info = target.drive->append(target.layer, request);
  warn_about(target.drive.get());
  return info_tensor(info);
}

void truncate(const Tensor& handle, std::vector<int64_t> lengths) {
  const Handle target = open_handle(handle);
  target.drive->truncate(target.layer, lengths);
}

void trim(const Tensor& handle, int64_t begin) {
  const Handle target = open_handle(handle);
  target.drive->trim(target.layer, begin);
}

void reorder(const Tensor& handle, std::vector<int64_t> index) {
  if (index.empty()) fail("reorder: index must name at least one row; free the layer to drop them all");
  const Handle target = open_handle(handle);
  target.drive->reorder(target.layer, index);
}

void flush(const Tensor& drive) {
  const Handle target = open_handle(drive);
  target.drive->flush();
  warn_about(target.drive.get());
}

void check_bytes(const Tensor& bytes, const char* what) {
  if (bytes.scalar_type() != ScalarType::Byte || !bytes.is_contiguous() || !bytes.is_cpu()) {
    fail(std::string(what) + " must be a contiguous uint8 CPU tensor");
  }
}

// ---- pages that somebody outside works with ----

// [pages, 5]: page (a number that tells it from others while it is leased), row, index, file offset or -1,
// checksum
Tensor uses_tensor(const std::vector<LeasedUse>& uses) {
  Tensor result = new_tensor({static_cast<int64_t>(uses.size()), 5}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const LeasedUse& use : uses) {
    *values++ = reinterpret_cast<int64_t>(use.where.page);
    *values++ = use.row;
    *values++ = use.index;
    *values++ = use.where.file_offset;
    *values++ = use.where.checksum;
  }
  return result;
}

Tensor lease(const Tensor& lease, const Tensor& handle, int64_t row_begin, int64_t row_count,
             int64_t kv_begin, int64_t kv_end) {
  const Handle source = open_handle(handle);
  Span span;
  span.row_begin = row_begin;
  span.row_count = row_count;
  span.kv_begin = kv_begin;
  span.kv_end = kv_end;
  return uses_tensor(source.drive->lease(handle_values(lease)[1], source.layer, source.epoch, span));
}

// Memory for `count` pages of page_bytes each, from a byte on.
uint8_t* pages_at(const Tensor& memory, int64_t offset, size_t count, int64_t page_bytes) {
  check_bytes(memory, "memory");
  const auto bytes = static_cast<int64_t>(count) * page_bytes;
  if (offset < 0 || page_bytes < 0 || bytes > memory.numel() - offset) {
    fail("wanted " + text(bytes) + " bytes of memory from byte " + text(offset) + " on, it has " +
         text(memory.numel()));
  }
  return static_cast<uint8_t*>(memory.mutable_data_ptr()) + offset;
}

// [pages, 2]: file offset, or -1 for those that were copied, and checksum
Tensor copy_leased(const Tensor& lease, std::vector<int64_t> places, const Tensor& target, int64_t offset) {
  const Handle handle = open_handle(lease);
  uint8_t* memory = pages_at(target, offset, places.size(), handle.drive->leased_page_bytes(handle.layer));
  const std::vector<LeasedPage> found = handle.drive->copy_leased(handle.layer, places, memory);
  Tensor result = new_tensor({static_cast<int64_t>(found.size()), 2}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const LeasedPage& page : found) {
    *values++ = page.file_offset;
    *values++ = page.checksum;
  }
  return result;
}

std::tuple<Tensor, Tensor> append_reserved(const Tensor& lease, const Tensor& handle, const Tensor& k_any,
                                           const Tensor& v_any, int64_t reserved_begin,
                                           int64_t reserved_count) {
  const Handle target = open_handle(handle);
  AppendArguments arguments = append_arguments(target, k_any, v_any);
  AppendRequest& request = arguments.request;
  if (reserved_begin < 0 || reserved_begin > request.q_len || reserved_count < 0) {
    fail("append: reserved tokens must begin within k's " + text(request.q_len) + ", got " +
         text(reserved_begin));
  }
  request.reserved_begin = reserved_begin;
  request.reserved_count = reserved_count;
  const auto [info, uses] = target.drive->append_reserved(handle_values(lease)[1], target.layer, request);
  warn_about(target.drive.get());
  return {info_tensor(info), uses_tensor(uses)};
}

void fill_reserved(const Tensor& lease, std::vector<int64_t> places, const Tensor& source, int64_t offset) {
  const Handle handle = open_handle(lease);
  const int64_t page_bytes = handle.drive->leased_page_bytes(handle.layer);
  handle.drive->fill_reserved(handle.layer, places, pages_at(source, offset, places.size(), page_bytes));
}

void finish_reserved(const Tensor& lease, std::vector<int64_t> places, std::vector<int64_t> checksums) {
  const Handle handle = open_handle(lease);
  handle.drive->finish_reserved(handle.layer, places, checksums);
}

void end_lease(const Tensor& lease) {
  const Handle handle = open_handle(lease);
  handle.drive->end_lease(handle.layer);
}

// ---- what outlives the process ----

std::vector<PageEntry> entries_of(const Tensor& bytes, int64_t file_bytes) {
  check_bytes(bytes, "entries");
  return parse_entries(static_cast<const uint8_t*>(bytes.const_data_ptr()), bytes.numel(), file_bytes);
}

// entries: those of all snapshots, one after another; counts: how many each has. Returns the snapshots whose
// tables are damaged: what can be made out of them keeps its space.
Tensor adopt(const Tensor& drive, std::vector<int64_t> snapshots, std::vector<int64_t> counts,
             const Tensor& entries) {
  const Handle target = open_handle(drive);
  check_bytes(entries, "entries");
  const auto* next = static_cast<const uint8_t*>(entries.const_data_ptr());
  int64_t left = entries.numel() / kEntryBytes;
  std::vector<std::vector<PageEntry>> tables;
  std::set<int64_t> damaged;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 0 || counts[i] > left) fail("adopt: counts must be of as many entries as there are");
    std::vector<PageEntry> table;
    for (int64_t entry = 0; entry < counts[i]; ++entry, next += kEntryBytes, --left) {
      try {
        table.push_back(parse_entries(next, kEntryBytes, target.drive->durable_file_bytes()).front());
      } catch (const Error&) {
        damaged.insert(snapshots[i]);
      }
    }
    tables.push_back(std::move(table));
  }
  for (const int64_t snapshot : target.drive->adopt(snapshots, tables)) damaged.insert(snapshot);
  Tensor result = new_tensor({static_cast<int64_t>(damaged.size())}, ScalarType::Long);
  std::copy(damaged.begin(), damaged.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

void restore_layer(const Tensor& handle, int64_t num_kv_heads, int64_t head_dim_k, int64_t head_dim_v,
                   ScalarType dtype, int64_t code_bits, int64_t number, int64_t begin,
                   std::vector<int64_t> first_pages, std::vector<int64_t> lengths, const Tensor& entries,
                   int64_t snapshot) {
  const Geometry geometry = make_geometry(num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits);
  const Handle target = open_handle(handle);
  if (first_pages.size() != lengths.size()) fail("restore_layer: a first page for each length");
  LayerTable table;
  table.begin = begin;
  for (size_t i = 0; i < lengths.size(); ++i) table.rows.push_back({first_pages[i], lengths[i]});
  table.entries = entries_of(entries, target.drive->file_bytes());
  target.drive->restore_layer(target.layer, geometry, number, table, snapshot);
}

// For each layer: begin, the number of its rows, and for each row its first page and its length; and the
// entries of all.
std::tuple<Tensor, Tensor> commit(const Tensor& drive, int64_t snapshot, std::vector<int64_t> layers) {
  const Handle target = open_handle(drive);
  const std::vector<LayerTable> tables = target.drive->commit(snapshot, layers);
  warn_about(target.drive.get());
  std::vector<int64_t> numbers;
  int64_t entry_count = 0;
  for (const LayerTable& table : tables) {
    numbers.push_back(table.begin);
    numbers.push_back(static_cast<int64_t>(table.rows.size()));
    for (const RowTable& row : table.rows) {
      numbers.push_back(row.first_page);
      numbers.push_back(row.length);
    }
    entry_count += static_cast<int64_t>(table.entries.size());
  }
  Tensor rows = new_tensor({static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), static_cast<int64_t*>(rows.mutable_data_ptr()));
  Tensor entries = new_tensor({entry_count * kEntryBytes}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(entries.mutable_data_ptr());
  for (const LayerTable& table : tables) {
    for (const PageEntry& entry : table.entries) {
      write_entry(entry, bytes);
      bytes += kEntryBytes;
    }
  }
  return {rows, entries};
}

void release(const Tensor& drive, int64_t snapshot) { open_handle(drive).drive->release(snapshot); }

// [pages, 4]: row, page index, file offset, and the errno value of a read that failed, or 0
Tensor verify(const Tensor& handle) {
  const Handle source = open_handle(handle);
  const std::vector<BadPage> bad = source.drive->verify(source.layer);
  warn_about(source.drive.get());
  Tensor result = new_tensor({static_cast<int64_t>(bad.size()), 4}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const BadPage& page : bad) {
    for (const int64_t value : {page.row, page.index, page.file_offset, int64_t{page.error}})
      *values++ = value;
  }
  return result;
}

Tensor shrink(const Tensor& drive) {
  Tensor result = new_tensor({1}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = open_handle(drive).drive->shrink();
  return result;
}

void check_room(const Tensor& drive, int64_t bytes) { open_handle(drive).drive->check_room(bytes); }

void check_summary_room(const Tensor& drive, int64_t num_kv_heads, int64_t head_dim_k, int64_t head_dim_v,
                        ScalarType dtype, int64_t code_bits, std::vector<int64_t> kinds,
                        std::vector<int64_t> layers, int64_t layer_count, int64_t row_count, int64_t q_len) {
  SummaryRequest request;
  request.geometry = make_geometry(num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits);
  for (const int64_t kind : kinds) request.kinds.push_back(to_summary_kind(kind));
  request.layer_ids = std::move(layers);
  request.layer_count = layer_count;
  request.row_count = row_count;
  request.q_len = q_len;
  open_handle(drive).drive->check_summary_room(request);
}

// ---- computing ----

// What an attention is about, from its arguments; q is dense in its last dimension.
AttendRequest attend_request(const Handle& source, const Tensor& q, const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
                             double scale, int64_t causal, int64_t window, double softcap, int64_t row_begin,
                             int64_t kv_begin, int64_t kv_end, int64_t head_dim_v) {
  const Geometry geometry = source.drive->geometry(source.layer);
  check_rank4(q, "q", "[batch, num_heads, q_len, head_dim]");
  check_heads(q.size(1), geometry, "q");
  check_width(q.size(3), geometry.head_dim_k, "q's head_dim");
  check_width(head_dim_v, geometry.head_dim_v, "head_dim_v");
  if (causal < 0 || causal > 2) fail("causal must be 0 (none), 1 (lower right) or 2 (upper left)");
  if (window < 0) fail("window must be positive, or 0 for none, got " + text(window));
  AttendRequest request;
  request.span = make_span(q, row_begin, kv_begin, kv_end);
  request.num_heads = q.size(1);
  request.q_len = q.size(2);
  request.q = query_view(q);
  request.scale = static_cast<float>(scale);
  request.causal = static_cast<Causal>(causal);
  request.window = window;
  request.softcap = static_cast<float>(softcap);
  request.mask = mask_view(mask, request.span.row_count, request.num_heads, request.q_len);
  request.sinks = head_values(sinks, request.num_heads, "sinks");
  request.alibi_slopes = head_values(alibi_slopes, request.num_heads, "alibi_slopes");
  return request;
}

std::tuple<Tensor, Tensor> attend(const Tensor& handle, const Tensor& q_any, std::optional<Tensor> mask,
                                  std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                                  double scale, int64_t causal, int64_t window, double softcap,
                                  int64_t row_begin, int64_t kv_begin, int64_t kv_end, int64_t head_dim_v) {
  const Handle source = open_handle(handle);
  const Tensor q = q_any.dim() == 4 ? dense_last(q_any) : q_any;
  AttendRequest request = attend_request(source, q, mask, sinks, alibi_slopes, scale, causal, window, softcap,
                                         row_begin, kv_begin, kv_end, head_dim_v);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), head_dim_v}, q.scalar_type());
  Tensor lse = new_tensor({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  request.out = out.mutable_data_ptr();
  request.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (q.numel() > 0) source.drive->attend(source.layer, source.epoch, request);
  warn_about(source.drive.get());
  return {out, lse};
}

// kind: 0 page top-k, 1 adaptive, 2 SparF; the settings that a kind does not have are not looked at.
SparseRequest sparse_request(int64_t kind, double fraction, int64_t tokens, int64_t local, int64_t sink,
                             int64_t heads_per_choice, double mass, bool provable, int64_t channels,
                             bool mean_value, bool sketch) {
  if (kind < 0 || kind > 2) fail("kind must be 0 (page top-k), 1 (adaptive) or 2 (SparF)");
  SparseRequest sparse;
  sparse.kind = static_cast<SparseKind>(kind);
  sparse.fraction = fraction;
  sparse.tokens = tokens;
  sparse.local_tokens = local;
  sparse.sink_tokens = sink;
  sparse.heads_per_choice = std::max<int64_t>(1, heads_per_choice);
  sparse.mass = mass;
  sparse.provable = provable;
  sparse.channels = channels;
  sparse.mean_value = mean_value;
  sparse.sketch = sketch;
  return sparse;
}

std::tuple<Tensor, Tensor, Tensor> attend_sparse(
    const Tensor& handle, const Tensor& q_any, std::optional<Tensor> mask, std::optional<Tensor> sinks,
    std::optional<Tensor> alibi_slopes, double scale, int64_t causal, int64_t window, double softcap,
    int64_t row_begin, int64_t kv_begin, int64_t kv_end, int64_t head_dim_v, int64_t kind, double fraction,
    int64_t tokens, int64_t local, int64_t sink, int64_t heads_per_choice, double mass, bool provable,
    int64_t channels, bool mean_value, bool sketch) {
  const Handle source = open_handle(handle);
  const Tensor q = q_any.dim() == 4 ? dense_last(q_any) : q_any;
  AttendRequest request = attend_request(source, q, mask, sinks, alibi_slopes, scale, causal, window, softcap,
                                         row_begin, kv_begin, kv_end, head_dim_v);
  SparseRequest sparse = sparse_request(kind, fraction, tokens, local, sink, heads_per_choice, mass, provable,
                                        channels, mean_value, sketch);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), head_dim_v}, q.scalar_type());
  Tensor lse = new_tensor({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  Tensor missing = new_tensor({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  request.out = out.mutable_data_ptr();
  request.lse = static_cast<float*>(lse.mutable_data_ptr());
  sparse.missing = static_cast<float*>(missing.mutable_data_ptr());
  std::fill_n(sparse.missing, missing.numel(), 0.0f);
  if (q.numel() > 0) source.drive->attend_sparse(source.layer, source.epoch, request, sparse);
  warn_about(source.drive.get());
  return {out, lse, missing};
}

void prefetch(const Tensor& handle, const Tensor& q_any, double scale, double softcap, int64_t row_begin,
              int64_t kv_begin, int64_t kv_end, int64_t kind, double fraction, int64_t tokens, int64_t local,
              int64_t sink, int64_t heads_per_choice, double mass, bool provable, int64_t channels,
              bool mean_value, bool sketch) {
  const Handle source = open_handle(handle);
  const Tensor q = q_any.dim() == 4 ? dense_last(q_any) : q_any;
  const Geometry geometry = source.drive->geometry(source.layer);
  const AttendRequest request = attend_request(source, q, {}, {}, {}, scale, 0, 0, softcap, row_begin,
                                               kv_begin, kv_end, geometry.head_dim_v);
  const SparseRequest sparse = sparse_request(kind, fraction, tokens, local, sink, heads_per_choice, mass,
                                              provable, channels, mean_value, sketch);
  if (q.numel() > 0) source.drive->prefetch(source.layer, source.epoch, request, sparse);
  warn_about(source.drive.get());
}

Tensor scores(const Tensor& handle, const Tensor& q_any, int64_t row_begin, int64_t kv_begin,
              int64_t kv_end) {
  const Handle source = open_handle(handle);
  const Geometry geometry = source.drive->geometry(source.layer);
  check_rank4(q_any, "q", "[batch, num_heads, q_len, head_dim]");
  check_heads(q_any.size(1), geometry, "q");
  check_width(q_any.size(3), geometry.head_dim_k, "q's head_dim");
  const Tensor q = dense_last(q_any);
  ScoresRequest request;
  request.span = make_span(q, row_begin, kv_begin, kv_end);
  request.num_heads = q.size(1);
  request.q_len = q.size(2);
  request.q = query_view(q);
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2), kv_end - kv_begin}, q.scalar_type());
  request.out = out.mutable_data_ptr();
  if (out.numel() > 0) source.drive->scores(source.layer, source.epoch, request);
  warn_about(source.drive.get());
  return out;
}

Tensor weighted_sum(const Tensor& handle, const Tensor& p_any, int64_t row_begin, int64_t kv_begin,
                    int64_t kv_end, int64_t head_dim_v) {
  const Handle source = open_handle(handle);
  const Geometry geometry = source.drive->geometry(source.layer);
  check_rank4(p_any, "p", "[batch, num_heads, q_len, kv_len]");
  check_heads(p_any.size(1), geometry, "p");
  check_width(p_any.size(3), kv_end - kv_begin, "p's kv_len");
  check_width(head_dim_v, geometry.head_dim_v, "head_dim_v");
  const Tensor p = dense_last(p_any);
  WeightedSumRequest request;
  request.span = make_span(p, row_begin, kv_begin, kv_end);
  request.num_heads = p.size(1);
  request.q_len = p.size(2);
  request.p = query_view(p);
  Tensor out = new_tensor({p.size(0), p.size(1), p.size(2), head_dim_v}, p.scalar_type());
  request.out = out.mutable_data_ptr();
  if (out.numel() > 0) source.drive->weighted_sum(source.layer, source.epoch, request);
  warn_about(source.drive.get());
  return out;
}

Tensor read(const Tensor& handle, bool values, ScalarType dtype, int64_t row_begin, int64_t row_count,
            int64_t kv_begin, int64_t kv_end, int64_t num_kv_heads, int64_t head_dim) {
  const Handle source = open_handle(handle);
  const Geometry geometry = source.drive->geometry(source.layer);
  check_width(num_kv_heads, geometry.num_kv_heads, "num_kv_heads");
  check_width(head_dim, values ? geometry.head_dim_v : geometry.head_dim_k, "head_dim");
  ReadRequest request;
  request.span.row_begin = row_begin;
  request.span.row_count = row_count;
  request.span.kv_begin = kv_begin;
  request.span.kv_end = kv_end;
  request.dtype = to_dtype(dtype, "dtype");
  Tensor out = new_tensor({row_count, num_kv_heads, kv_end - kv_begin, head_dim}, dtype);
  (values ? request.v : request.k) = out.mutable_data_ptr();
  if (out.numel() > 0) source.drive->read(source.layer, source.epoch, request);
  warn_about(source.drive.get());
  return out;
}

// ---- quantised weights of linear layers (kernels/weights.h) ----

LinearContext linear_context(const std::string& simd) {
  return {select_kernels(simd.c_str()), static_cast<int>(torch::stable::get_num_threads()),
          &lend_torch_threads};
}

int to_code_bits(int64_t bits) {
  if (bits != 8 && bits != 4) fail("bits must be 8 or 4, got " + text(bits));
  return static_cast<int>(bits);
}

// in_features decides how a row is read, so it must fit the bytes.
void check_rows(const Tensor& rows, int code_bits, int64_t in_features) {
  check_bytes(rows, "rows");
  if (rows.dim() != 2)
    fail("rows must be [out_features, row_bytes], got " + text(rows.dim()) + " dimensions");
  if (in_features < 1) fail("in_features must be at least 1, got " + text(in_features));
  const int64_t row_bytes = weight_row_bytes(code_bits, in_features);
  if (rows.size(1) != row_bytes) {
    fail("rows must have " + text(row_bytes) + " bytes each (" + text(code_bits) + " bits, " +
         text(in_features) + " features), got " + text(rows.size(1)));
  }
}

int64_t weight_row_bytes(int64_t bits, int64_t in_features) {
  if (in_features < 1) fail("in_features must be at least 1, got " + text(in_features));
  return csd::weight_row_bytes(to_code_bits(bits), in_features);
}

Tensor quantise_rows(const Tensor& weight_any, int64_t bits, std::string simd) {
  const int code_bits = to_code_bits(bits);
  if (weight_any.dim() != 2 || weight_any.size(1) < 1) {
    fail("weight must be [out_features, in_features], with features, got " + text(weight_any.dim()) +
         " dimensions");
  }
  const DType dtype = to_dtype(weight_any.scalar_type(), "weight");
  const Tensor weight = dense_last(weight_any);
  Tensor rows =
      new_tensor({weight.size(0), csd::weight_row_bytes(code_bits, weight.size(1))}, ScalarType::Byte);
  csd::quantise_rows(linear_context(simd), code_bits, dtype, weight.const_data_ptr(), weight.stride(0),
                     weight.size(0), weight.size(1), static_cast<uint8_t*>(rows.mutable_data_ptr()));
  return rows;
}

Tensor dequantise_rows(const Tensor& rows, int64_t bits, int64_t in_features, ScalarType dtype,
                       std::string simd) {
  const int code_bits = to_code_bits(bits);
  check_rows(rows, code_bits, in_features);
  const DType target_dtype = to_dtype(dtype, "dtype");
  Tensor weight = new_tensor({rows.size(0), in_features}, dtype);
  csd::dequantise_rows(linear_context(simd), code_bits, static_cast<const uint8_t*>(rows.const_data_ptr()),
                       rows.size(0), in_features, target_dtype, weight.mutable_data_ptr());
  return weight;
}

// x: [rows of x, in_features]; ops.py brings it there.
Tensor quantised_linear(const Tensor& x_any, const Tensor& rows, int64_t bits, std::optional<Tensor> bias,
                        std::string simd) {
  if (x_any.dim() != 2 || !x_any.is_cpu()) {
    fail("x must be a CPU tensor of 2 dimensions here, got " + text(x_any.dim()) + "; ops.py folds others");
  }
  const Tensor x = dense_last(x_any);
  QuantisedLinear linear;
  linear.code_bits = to_code_bits(bits);
  linear.in_features = x.size(1);
  check_rows(rows, linear.code_bits, linear.in_features);
  linear.rows = static_cast<const uint8_t*>(rows.const_data_ptr());
  linear.row_count = rows.size(0);
  linear.dtype = to_dtype(x.scalar_type(), "x");
  linear.x = x.const_data_ptr();
  linear.x_count = x.size(0);
  linear.x_stride = x.stride(0);
  linear.bias = nullptr;
  if (bias.has_value()) {
    if (bias->dim() != 1 || bias->numel() != linear.row_count || bias->scalar_type() != x.scalar_type() ||
        !bias->is_contiguous() || !bias->is_cpu()) {
      fail("bias must be a contiguous CPU tensor of " + text(linear.row_count) +
           " elements (one per row) in x's dtype, got " + text(bias->numel()));
    }
    linear.bias = bias->const_data_ptr();
  }
  Tensor out = new_tensor({linear.x_count, linear.row_count}, x.scalar_type());
  linear.out = out.mutable_data_ptr();
  if (out.numel() > 0) csd::quantised_linear(linear_context(simd), linear);
  return out;
}

// ---- the drive's I/O, for memory of others ----

// queue: {drive, the queue's number, -1}, the caller's as other handles are.
void io_open(const Tensor& queue, const Tensor& drive, int64_t depth) {
  const Handle source = open_handle(drive);
  const int64_t drive_number = handle_values(drive)[0];
  const int64_t queue_number = handle_values(queue)[1];
  // Closed on every way out but the last.
  std::shared_ptr<SlabQueue> replaced;
  std::shared_ptr<SlabQueue> opened = source.drive->make_slab_queue(depth);
  std::lock_guard<std::mutex> lock(registry_mutex);
  if (registry().find(drive_number) == registry().end()) {
    throw Error(ErrorKind::kClosed, "this store was closed; open a new one");
  }
  OpenQueue& entry = queue_registry()[queue_number];
  replaced = std::move(entry.queue);
  entry = {drive_number, std::move(opened)};
}

std::shared_ptr<SlabQueue> find_queue(const Tensor& queue) {
  const int64_t number = handle_values(queue)[1];
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = queue_registry().find(number);
  if (found == queue_registry().end()) {
    throw Error(ErrorKind::kClosed, "this I/O queue, or its store, is closed; open a new one");
  }
  return found->second.queue;
}

void io_submit(const Tensor& queue, bool write, int64_t file_offset, const Tensor& memory, int64_t offset,
               int64_t byte_count, int64_t tag) {
  const std::shared_ptr<SlabQueue> target = find_queue(queue);
  if (memory.scalar_type() != ScalarType::Byte || !memory.is_contiguous() || !memory.is_cpu()) {
    fail("memory must be a contiguous uint8 CPU tensor");
  }
  if (offset < 0 || byte_count < 0 || byte_count > memory.numel() - offset) {
    fail("offset and byte_count must lie in memory's " + text(memory.numel()) + " bytes, got " +
         text(byte_count) + " bytes from " + text(offset) + " on");
  }
  SlabRequest request;
  request.write = write;
  request.file_offset = file_offset;
  request.memory = static_cast<uint8_t*>(memory.mutable_data_ptr()) + offset;
  request.byte_count = byte_count;
  request.tag = tag;
  target->submit(request, std::make_shared<Tensor>(memory));
}

// [m, 2]: tag, errno
Tensor io_reap(const Tensor& queue, bool wait) {
  const std::vector<SlabCompletion> done = find_queue(queue)->reap(wait);
  Tensor result = new_tensor({static_cast<int64_t>(done.size()), 2}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const SlabCompletion& completion : done) {
    *values++ = completion.tag;
    *values++ = completion.error;
  }
  std::shared_ptr<Drive> drive;
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = registry().find(handle_values(queue)[0]);
    if (found != registry().end()) drive = found->second;
  }
  if (drive != nullptr) warn_about(drive.get());
  return result;
}

void io_close(const Tensor& queue) {
  std::shared_ptr<SlabQueue> closing;
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = queue_registry().find(handle_values(queue)[1]);
    if (found == queue_registry().end()) return;
    closing = std::move(found->second.queue);
    queue_registry().erase(found);
  }
  closing->close();
}

// ---- files that are not ours ----

// Null: closed.
std::shared_ptr<FileReader> look_for_reader(const Tensor& reader) {
  const int64_t number = handle_values(reader)[0];
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = reader_registry().find(number);
  return found == reader_registry().end() ? nullptr : found->second;
}

std::shared_ptr<FileReader> find_reader(const Tensor& reader) {
  std::shared_ptr<FileReader> found = look_for_reader(reader);
  if (found == nullptr) throw Error(ErrorKind::kClosed, "this reader of files is closed; open a new one");
  return found;
}

// reader: {its number, -1, -1}, the caller's as other handles are. staging: kept until the reader is closed.
void reader_open(const Tensor& reader, std::string io_engine, int64_t queue_depth,
                 std::optional<Tensor> staging) {
  FileReaderOptions options;
  options.io_engine = std::move(io_engine);
  options.queue_depth = queue_depth;
  if (staging.has_value()) {
    check_bytes(*staging, "staging");
    options.staging = {staging->mutable_data_ptr(), static_cast<size_t>(staging->numel())};
    options.staging_owner = std::make_shared<Tensor>(*staging);
  }
  // Closed on every way out but the last.
  std::shared_ptr<FileReader> replaced;
  auto opened = std::make_shared<FileReader>(std::move(options));
  std::lock_guard<std::mutex> lock(registry_mutex);
  std::shared_ptr<FileReader>& entry = reader_registry()[handle_values(reader)[0]];
  replaced = std::move(entry);
  entry = std::move(opened);
}

// number, size in bytes, mtime in ns, whether by direct I/O, device, inode
Tensor file_values(const InputFile& file) {
  Tensor result = new_tensor({6}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(result.mutable_data_ptr());
  for (const int64_t value : {file.number, file.size_bytes, file.mtime_ns, int64_t{file.direct_io},
                              static_cast<int64_t>(file.device), static_cast<int64_t>(file.inode)})
    *values++ = value;
  return result;
}

Tensor reader_add_file(const Tensor& reader, std::string path) {
  return file_values(find_reader(reader)->add_file(path));
}

Tensor reader_refresh_file(const Tensor& reader, int64_t number) {
  return file_values(find_reader(reader)->refresh_file(number));
}

int64_t reader_read(const Tensor& reader, std::vector<int64_t> files, std::vector<int64_t> offsets,
                    std::vector<int64_t> byte_counts, const Tensor& memory,
                    std::vector<int64_t> memory_offsets, bool background) {
  const std::shared_ptr<FileReader> source = find_reader(reader);
  if (offsets.size() != files.size() || byte_counts.size() != files.size() ||
      memory_offsets.size() != files.size()) {
    fail("offsets, byte_counts and memory_offsets must have one entry for each of " +
         text(static_cast<int64_t>(files.size())) + " files");
  }
  check_bytes(memory, "memory");
  auto* data = static_cast<char*>(memory.mutable_data_ptr());
  std::vector<FileRange> ranges(files.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    FileRange& range = ranges[i];
    range.file = files[i];
    range.offset = offsets[i];
    range.byte_count = byte_counts[i];
    // The reader says what is wrong with those that are not in their file, before it uses their memory.
    constexpr int64_t kFileBytesMax = int64_t{1} << 60;
    const bool sane = range.offset >= 0 && range.offset < kFileBytesMax && range.byte_count >= 0 &&
                      range.byte_count < kFileBytesMax;
    const int64_t bytes = sane ? range.covering_bytes() : 0;
    const int64_t at = memory_offsets[i];
    if (at < 0 || bytes > memory.numel() - at) {
      fail("the blocks that cover a range must lie in memory's " + text(memory.numel()) + " bytes, got " +
           text(bytes) + " bytes from " + text(at) + " on");
    }
    range.memory = data + at;
  }
  const int64_t ticket = source->read(ranges, background, std::make_shared<Tensor>(memory));
  warn_about(source.get());
  return ticket;
}

void reader_wait(const Tensor& reader, int64_t ticket) {
  const std::shared_ptr<FileReader> source = find_reader(reader);
  source->wait(ticket);
  warn_about(source.get());
}

bool reader_is_done(const Tensor& reader, int64_t ticket) { return find_reader(reader)->is_done(ticket); }

void reader_drop(const Tensor& reader, int64_t ticket) {
  const std::shared_ptr<FileReader> source = look_for_reader(reader);
  if (source != nullptr) source->drop(ticket);
}

void reader_close(const Tensor& reader) {
  std::shared_ptr<FileReader> closing;
  {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto found = reader_registry().find(handle_values(reader)[0]);
    if (found == reader_registry().end()) return;
    closing = std::move(found->second);
    reader_registry().erase(found);
  }
  closing->close();
}

// ---- reporting ----

// Text travels as its UTF-8 bytes in a uint8 tensor: ops that return str cannot be traced.
Tensor text_tensor(const std::string& value) {
  Tensor result = new_tensor({static_cast<int64_t>(value.size())}, ScalarType::Byte);
  std::copy(value.begin(), value.end(), static_cast<uint8_t*>(result.mutable_data_ptr()));
  return result;
}

Tensor stats(const Tensor& drive) {
  const Handle source = open_handle(drive);
  const std::string json = source.drive->stats_json();
  warn_about(source.drive.get());
  return text_tensor(json);
}

Tensor reader_stats(const Tensor& reader) {
  const std::shared_ptr<FileReader> source = find_reader(reader);
  const std::string json = source->stats_json();
  warn_about(source.get());
  return text_tensor(json);
}

Tensor file_path(const Tensor& drive) { return text_tensor(open_handle(drive).drive->reopen_path()); }

Tensor probe(std::string directory, std::string io_engine) {
  const ProbeResult result = probe_directory(directory, io_engine);
  std::string lines = result.file_system + "\n" + result.device + "\n" + result.chosen.engine + "\n" +
                      (result.chosen.direct_io ? "1" : "0") + "\n" + result.chosen.reason;
  for (const std::string& verdict : result.verdicts) lines += "\n" + verdict;
  return text_tensor(lines);
}

// Lifetime, then the store id.
Tensor read_header(std::string path) {
  const Header header = csd::read_header(path);
  Tensor result = new_tensor({1 + static_cast<int64_t>(header.store_id.size())}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(result.mutable_data_ptr());
  bytes[0] = static_cast<uint8_t>(header.lifetime);
  std::copy(header.store_id.begin(), header.store_id.end(), bytes + 1);
  return result;
}

Tensor supported_simd() { return text_tensor(supported_kernels()); }

}  // namespace
}  // namespace csd::ops

STABLE_TORCH_LIBRARY(torch_csd, m) {
  m.def(
      "open(Tensor(a!) drive, str directory, str io_engine, str simd, int memory_budget, int threads, "
      "int queue_depth, int read_ahead, bool resident, bool checksums, int bytes_max, str durable_path, "
      "str durable_mode, Tensor store_id) -> ()");
  m.def("close(Tensor(a!) drive) -> ()");
  m.def(
      "create_layer(Tensor(a!) handle, int num_kv_heads, int head_dim_k, int head_dim_v, ScalarType dtype, "
      "int code_bits, int number) -> ()");
  m.def("fork_layer(Tensor(a!) handle, Tensor source) -> ()");
  m.def("drop_layer(Tensor(a!) handle) -> ()");
  m.def("keep_summary(Tensor(a!) handle, int kind) -> ()");
  m.def("layer_info(Tensor handle) -> Tensor");
  m.def("append(Tensor(a!) handle, Tensor k, Tensor v, int[]? lengths=None) -> Tensor");
  m.def(
      "lease(Tensor(a!) lease, Tensor handle, int row_begin, int row_count, int kv_begin, int kv_end) -> "
      "Tensor");
  m.def("copy_leased(Tensor lease, int[] places, Tensor(a!) target, int offset) -> Tensor");
  m.def(
      "append_reserved(Tensor(a!) lease, Tensor(b!) handle, Tensor k, Tensor v, int reserved_begin, int "
      "reserved_count) -> (Tensor, Tensor)");
  m.def("fill_reserved(Tensor(a!) lease, int[] places, Tensor source, int offset) -> ()");
  m.def("finish_reserved(Tensor(a!) lease, int[] places, int[] checksums) -> ()");
  m.def("end_lease(Tensor(a!) lease) -> ()");
  m.def("truncate(Tensor(a!) handle, int[] lengths) -> ()");
  m.def("trim(Tensor(a!) handle, int begin) -> ()");
  m.def("reorder(Tensor(a!) handle, int[] index) -> ()");
  m.def("flush(Tensor(a!) drive) -> ()");
  m.def("adopt(Tensor(a!) drive, int[] snapshots, int[] counts, Tensor entries) -> Tensor");
  m.def(
      "restore_layer(Tensor(a!) handle, int num_kv_heads, int head_dim_k, int head_dim_v, ScalarType dtype, "
      "int code_bits, int number, int begin, int[] first_pages, int[] lengths, Tensor entries, int snapshot) "
      "-> ()");
  m.def("commit(Tensor(a!) drive, int snapshot, int[] layers) -> (Tensor, Tensor)");
  m.def("release(Tensor(a!) drive, int snapshot) -> ()");
  m.def("verify(Tensor handle) -> Tensor");
  m.def("shrink(Tensor(a!) drive) -> Tensor");
  m.def("check_room(Tensor drive, int bytes) -> ()");
  m.def(
      "check_summary_room(Tensor drive, int num_kv_heads, int head_dim_k, int head_dim_v, ScalarType dtype, "
      "int code_bits, int[] kinds, int[] layers, int layer_count, int row_count, int q_len) -> ()");
  m.def(
      "attend(Tensor handle, Tensor q, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, float scale, int "
      "causal, "
      "int window, float softcap, SymInt row_begin, SymInt kv_begin, SymInt kv_end, SymInt head_dim_v) "
      "-> (Tensor, Tensor)");
  m.def(
      "attend_sparse(Tensor handle, Tensor q, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, float "
      "scale, "
      "int causal, int window, float softcap, SymInt row_begin, SymInt kv_begin, SymInt kv_end, SymInt "
      "head_dim_v, int kind, float fraction, int tokens, int local, int sink, int heads_per_choice, float "
      "mass, bool provable, int channels, bool mean_value, bool sketch) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prefetch(Tensor handle, Tensor q, float scale, float softcap, SymInt row_begin, SymInt kv_begin, "
      "SymInt kv_end, int kind, float fraction, int tokens, int local, int sink, int heads_per_choice, float "
      "mass, bool provable, int channels, bool mean_value, bool sketch) -> ()");
  m.def("scores(Tensor handle, Tensor q, SymInt row_begin, SymInt kv_begin, SymInt kv_end) -> Tensor");
  m.def(
      "weighted_sum(Tensor handle, Tensor p, SymInt row_begin, SymInt kv_begin, SymInt kv_end, SymInt "
      "head_dim_v) "
      "-> Tensor");
  m.def(
      "read(Tensor handle, bool values, ScalarType dtype, SymInt row_begin, SymInt row_count, SymInt "
      "kv_begin, "
      "SymInt kv_end, SymInt num_kv_heads, SymInt head_dim) -> Tensor");
  m.def("weight_row_bytes(int bits, int in_features) -> int");
  m.def("quantise_rows(Tensor weight, int bits, str simd) -> Tensor");
  m.def("dequantise_rows(Tensor rows, int bits, SymInt in_features, ScalarType dtype, str simd) -> Tensor");
  m.def("quantised_linear(Tensor x, Tensor rows, int bits, Tensor? bias, str simd) -> Tensor");
  m.def("io_open(Tensor(a!) queue, Tensor drive, int depth) -> ()");
  m.def(
      "io_submit(Tensor(a!) queue, bool write, int file_offset, Tensor(b!) memory, int offset, int "
      "byte_count, "
      "int tag) -> ()");
  m.def("io_reap(Tensor(a!) queue, bool wait) -> Tensor");
  m.def("io_close(Tensor(a!) queue) -> ()");
  m.def("reader_open(Tensor(a!) reader, str io_engine, int queue_depth, Tensor(b!)? staging) -> ()");
  m.def("reader_add_file(Tensor(a!) reader, str path) -> Tensor");
  m.def("reader_refresh_file(Tensor(a!) reader, int number) -> Tensor");
  m.def(
      "reader_read(Tensor(a!) reader, int[] files, int[] offsets, int[] byte_counts, Tensor(b!) memory, "
      "int[] "
      "memory_offsets, bool background) -> int");
  m.def("reader_wait(Tensor(a!) reader, int ticket) -> ()");
  m.def("reader_is_done(Tensor reader, int ticket) -> bool");
  m.def("reader_drop(Tensor(a!) reader, int ticket) -> ()");
  m.def("reader_close(Tensor(a!) reader) -> ()");
  m.def("reader_stats(Tensor reader) -> Tensor");
  m.def("file_path(Tensor drive) -> Tensor");
  m.def("stats(Tensor drive) -> Tensor");
  m.def("probe(str directory, str io_engine) -> Tensor");
  m.def("read_header(str path) -> Tensor");
  m.def("supported_simd() -> Tensor");
}

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(torch_csd, BackendSelect, m) {
  m.impl("probe", TORCH_BOX(&csd::ops::probe));
  m.impl("read_header", TORCH_BOX(&csd::ops::read_header));
  m.impl("supported_simd", TORCH_BOX(&csd::ops::supported_simd));
  m.impl("weight_row_bytes", TORCH_BOX(&csd::ops::weight_row_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(torch_csd, CPU, m) {
  m.impl("open", TORCH_BOX(&csd::ops::open));
  m.impl("close", TORCH_BOX(&csd::ops::close));
  m.impl("create_layer", TORCH_BOX(&csd::ops::create_layer));
  m.impl("fork_layer", TORCH_BOX(&csd::ops::fork_layer));
  m.impl("drop_layer", TORCH_BOX(&csd::ops::drop_layer));
  m.impl("keep_summary", TORCH_BOX(&csd::ops::keep_summary));
  m.impl("layer_info", TORCH_BOX(&csd::ops::layer_info));
  m.impl("append", TORCH_BOX(&csd::ops::append));
  m.impl("lease", TORCH_BOX(&csd::ops::lease));
  m.impl("copy_leased", TORCH_BOX(&csd::ops::copy_leased));
  m.impl("append_reserved", TORCH_BOX(&csd::ops::append_reserved));
  m.impl("fill_reserved", TORCH_BOX(&csd::ops::fill_reserved));
  m.impl("finish_reserved", TORCH_BOX(&csd::ops::finish_reserved));
  m.impl("end_lease", TORCH_BOX(&csd::ops::end_lease));
  m.impl("truncate", TORCH_BOX(&csd::ops::truncate));
  m.impl("trim", TORCH_BOX(&csd::ops::trim));
  m.impl("reorder", TORCH_BOX(&csd::ops::reorder));
  m.impl("flush", TORCH_BOX(&csd::ops::flush));
  m.impl("adopt", TORCH_BOX(&csd::ops::adopt));
  m.impl("restore_layer", TORCH_BOX(&csd::ops::restore_layer));
  m.impl("commit", TORCH_BOX(&csd::ops::commit));
  m.impl("release", TORCH_BOX(&csd::ops::release));
  m.impl("verify", TORCH_BOX(&csd::ops::verify));
  m.impl("shrink", TORCH_BOX(&csd::ops::shrink));
  m.impl("check_room", TORCH_BOX(&csd::ops::check_room));
  m.impl("check_summary_room", TORCH_BOX(&csd::ops::check_summary_room));
  m.impl("attend", TORCH_BOX(&csd::ops::attend));
  m.impl("attend_sparse", TORCH_BOX(&csd::ops::attend_sparse));
  m.impl("prefetch", TORCH_BOX(&csd::ops::prefetch));
  m.impl("scores", TORCH_BOX(&csd::ops::scores));
  m.impl("weighted_sum", TORCH_BOX(&csd::ops::weighted_sum));
  m.impl("read", TORCH_BOX(&csd::ops::read));
  m.impl("quantise_rows", TORCH_BOX(&csd::ops::quantise_rows));
  m.impl("dequantise_rows", TORCH_BOX(&csd::ops::dequantise_rows));
  m.impl("quantised_linear", TORCH_BOX(&csd::ops::quantised_linear));
  m.impl("io_open", TORCH_BOX(&csd::ops::io_open));
  m.impl("io_submit", TORCH_BOX(&csd::ops::io_submit));
  m.impl("io_reap", TORCH_BOX(&csd::ops::io_reap));
  m.impl("io_close", TORCH_BOX(&csd::ops::io_close));
  m.impl("reader_open", TORCH_BOX(&csd::ops::reader_open));
  m.impl("reader_add_file", TORCH_BOX(&csd::ops::reader_add_file));
  m.impl("reader_refresh_file", TORCH_BOX(&csd::ops::reader_refresh_file));
  m.impl("reader_read", TORCH_BOX(&csd::ops::reader_read));
  m.impl("reader_wait", TORCH_BOX(&csd::ops::reader_wait));
  m.impl("reader_is_done", TORCH_BOX(&csd::ops::reader_is_done));
  m.impl("reader_drop", TORCH_BOX(&csd::ops::reader_drop));
  m.impl("reader_close", TORCH_BOX(&csd::ops::reader_close));
  m.impl("reader_stats", TORCH_BOX(&csd::ops::reader_stats));
  m.impl("file_path", TORCH_BOX(&csd::ops::file_path));
  m.impl("stats", TORCH_BOX(&csd::ops::stats));
}
