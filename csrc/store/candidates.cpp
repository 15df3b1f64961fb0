#include "store/candidates.h"

#include <algorithm>

#include "store/layer.h"

namespace csd {
namespace {

constexpr size_t kSweepMin = 1024;

Listed list_for(const Page& page) { return page.sealed ? Listed::kSealed : Listed::kTail; }

}  // namespace

void Candidates::add(Page* page) {
  const Listed wanted = list_for(*page);
  const bool leaves = page->memory != nullptr && (page->file_offset < 0 || page->written);
  if (page->listed == wanted || !leaves) return;
  remove(page);
  List& list = list_of(wanted);
  list.pages.push_back(page);
  page->place = list.first_place + static_cast<uint32_t>(list.pages.size() - 1);
  page->listed = wanted;
}

void Candidates::add_last(Page* page) {
  remove(page);
  const Listed wanted = list_for(*page);
  List& list = list_of(wanted);
  list.pages.push_front(page);
  page->place = --list.first_place;
  page->listed = wanted;
}

void Candidates::remove(Page* page) {
  if (page->listed == Listed::kNo) return;
  List& list = list_of(page->listed);
  page->listed = Listed::kNo;
  list.pages[static_cast<uint32_t>(page->place - list.first_place)] = nullptr;
  list.gaps++;
  List::Pages& pages = list.pages;
  for (; !pages.empty() && pages.back() == nullptr; list.gaps--) pages.pop_back();
  for (; !pages.empty() && pages.front() == nullptr; list.gaps--, list.first_place++) pages.pop_front();
  if (list.gaps < kSweepMin || list.gaps < pages.size() / 2) return;
  pages.erase(std::remove(pages.begin(), pages.end(), nullptr), pages.end());
  list.gaps = 0;
  uint32_t place = list.first_place;
  for (Page* other : pages) other->place = place++;
}

Page* Candidates::next() const {
  for (const List* list : {&sealed_, &tails_}) {
    if (!list->pages.empty()) return list->pages.back();
  }
  return nullptr;
}

}  // namespace csd
