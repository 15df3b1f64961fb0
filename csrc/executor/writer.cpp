#include "executor/writer.h"

#include <cerrno>
#include <utility>

#include "base/checksum.h"
#include "base/error.h"

namespace csd {
namespace {

constexpr int64_t kWriteBytes = int64_t{1} << 20;
constexpr size_t kSegmentsMax = 256;  // well under IOV_MAX

}  // namespace

Writer::Writer(std::unique_ptr<IoQueue> queue, std::string path)
    : queue_(std::move(queue)), path_(std::move(path)) {
  requests_.resize(static_cast<size_t>(queue_->depth()));
  for (size_t tag = requests_.size(); tag-- > 0;) free_tags_.push_back(tag);
}

Writer::~Writer() { queue_.reset(); }  // waits for what is in flight, before the pages go

void Writer::add(const Ref<Page>& page, After after) {
  // A tail comes back soon: an extent of its own is free again at once.
  auto [offset, extent] =
      page->sealed ? page->home->stream.take() : page->home->stream.take_alone(page->page_bytes());
  begin(offset, page->page_bytes(), after);
  page->checksum = crc32c(page->memory, page->page_bytes());
  page->file_offset = offset;
  page->extent = std::move(extent);
  push(page);
}

void Writer::add_image(const Ref<Page>& page, int64_t file_offset, const Ref<Extent>& extent) {
  begin(file_offset, page->page_bytes(), After::kIsImage);
  batch_.extents.push_back(extent);
  push(page);
}

// Makes the batch one that a page at this place can join.
void Writer::begin(int64_t file_offset, int64_t page_bytes, After after) {
  const bool adjacent = batch_.page_bytes == page_bytes && batch_.file_offset + batch_.bytes == file_offset &&
                        batch_.after == after;
  if (!batch_.pages.empty() &&
      (!adjacent || batch_.bytes + page_bytes > kWriteBytes || batch_.segments.size() == kSegmentsMax)) {
    flush();
  }
  if (batch_.pages.empty()) {
    batch_.after = after;
    batch_.file_offset = file_offset;
    batch_.page_bytes = page_bytes;
  }
}

void Writer::push(const Ref<Page>& page) {
  batch_.pages.push_back(page);
  batch_.segments.push_back({page->memory, static_cast<size_t>(page->page_bytes())});
  batch_.bytes += page->page_bytes();
  pending_bytes_ += page->page_bytes();
  if (batch_.bytes >= kWriteBytes) flush();
}

void Writer::flush() {
  if (batch_.pages.empty()) return;
  while (free_tags_.empty()) reap(true);
  const uint64_t tag = free_tags_.back();
  free_tags_.pop_back();
  requests_[tag] = std::exchange(batch_, Batch{});
  try {
    submit(tag);
  } catch (...) {
    batch_ = std::exchange(requests_[tag], Batch{});  // for the next flush
    free_tags_.push_back(tag);
    throw;
  }
}

void Writer::submit(uint64_t tag) {
  const Batch& request = requests_[tag];
  IoRequest io;
  io.op = IoOp::kWrite;
  io.file_offset = request.file_offset;
  io.segments = request.segments.data();
  io.segment_count = static_cast<int>(request.segments.size());
  io.tag = tag;
  queue_->submit(io);
}

void Writer::reap(bool wait) {
  if (wait && queue_->in_flight() == 0) flush();
  if (queue_->in_flight() == 0) return;
  completions_.clear();
  queue_->reap(wait, &completions_);
  for (const IoCompletion& completion : completions_) {
    if (completion.error == EIO && !std::exchange(requests_[completion.tag].retried, true)) {
      try {
        submit(completion.tag);  // the medium may take it the second time
        continue;
      } catch (const Error&) {
        // Not even asked: as if it had not.
      }
    }
    Batch request = std::exchange(requests_[completion.tag], Batch{});
    free_tags_.push_back(completion.tag);
    pending_bytes_ -= request.bytes;
    if (completion.error == 0) written_bytes_ += request.bytes;
    settle(&request, completion.error);
    if (completion.error != 0 && error_ == 0) {
      error_ = completion.error;
      error_offset_ = request.file_offset;
    }
  }
}

void Writer::settle(Batch* request, int error) {
  if (request->after == After::kIsImage) return;
  for (Ref<Page>& page : request->pages) {
    if (error != 0) {
      page->file_offset = -1;
      page->extent.reset();
      failed_.push_back(std::move(page));
      continue;
    }
    page->written = true;
    if (request->after == After::kLeaves) {
      page->home->arena->release(std::exchange(page->memory, nullptr));
    } else {
      page->home->candidates->add(page.get());
    }
  }
}

void Writer::drain() {
  while (!idle()) reap(true);
}

void Writer::throw_error() {
  const int error = std::exchange(error_, 0);
  if (error == 0) return;
  throw io_error(path_,
                 "writing KV pages at byte " + std::to_string(error_offset_) +
                     " failed (they are kept in memory; the append that needed the room is undone)",
                 error);
}

std::vector<Ref<Page>> Writer::take_failed() { return std::exchange(failed_, {}); }

}  // namespace csd
