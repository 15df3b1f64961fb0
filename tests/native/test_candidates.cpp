// Candidates against a plain model of two lists: pages come, fill, fail to be written, are pinned, and go, in
// any order. Plain program: prints what it did, exits non-zero on the first failure.
//
// In one line, from the repository's root:
//
//   g++ -std=c++17 -O1 -g -Wall -Wextra -Icsrc tests/native/test_candidates.cpp csrc/store/candidates.cpp
//   csrc/store/arena.cpp csrc/store/extents.cpp csrc/base/*.cpp -pthread -o test_candidates

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "store/layer.h"

using namespace csd;

namespace {

constexpr int kSteps = 200000;
constexpr PageLayout kLayout{1, 8, 8, DType::kFloat32, 0};

void check(bool fact, const char* what) {
  if (fact) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void forget(std::vector<Page*>* list, const Page* page) {
  list->erase(std::remove(list->begin(), list->end(), page), list->end());
}

}  // namespace

int main() {
  MemoryPool pool;
  Candidates candidates(&pool);
  Arena arena(int64_t{64} << 20);
  FileSpace space(-1, "nowhere", 0, &pool);
  const auto home = Ref<Home>::make(&pool, &arena, &candidates, &space, kLayout.page_bytes());
  const int64_t empty_bytes = pool.bytes();
  std::vector<Ref<Page>> pages;
  std::vector<Page*> sealed;  // the last leaves first
  std::vector<Page*> tails;
  std::mt19937 random(7);
  const auto below = [&random](size_t count) {
    return std::uniform_int_distribution<size_t>(0, count - 1)(random);
  };
  const auto unlist = [&](const Page* page) {
    forget(&sealed, page);
    forget(&tails, page);
  };
  size_t most = 0;
  for (int step = 0; step < kSteps; ++step) {
    const bool grows = step / 20000 % 2 == 0;  // and shrinks, so that gaps are swept out of long lists
    if (pages.empty() || below(100) < (grows ? 60 : 30)) {
      pages.push_back(Ref<Page>::make(&pool, home, kLayout));
      pages.back()->memory = arena.allocate(kLayout.page_bytes());
      if (pages.back()->memory == nullptr) {
        pages.pop_back();
        continue;
      }
      pages.back()->sealed = below(4) != 0;
      candidates.add(pages.back().get());
      (pages.back()->sealed ? sealed : tails).push_back(pages.back().get());
      most = std::max(most, pages.size());
      continue;
    }
    const size_t index = below(pages.size());
    const Ref<Page>& page = pages[index];
    switch (below(8)) {
      case 0:
        candidates.remove(page.get());
        unlist(page.get());
        break;
      case 1:
        candidates.add_last(page.get());
        unlist(page.get());
        (page->sealed ? sealed : tails).insert((page->sealed ? sealed : tails).begin(), page.get());
        break;
      case 2: {  // again, or for the first time as a full page
        const bool moves = !page->sealed || page->listed != Listed::kSealed;
        page->sealed = true;
        candidates.add(page.get());
        if (moves) {
          unlist(page.get());
          sealed.push_back(page.get());
        }
        break;
      }
      default:
        unlist(page.get());
        std::swap(pages[index], pages.back());
        pages.pop_back();
    }
    const Page* expected = !sealed.empty() ? sealed.back() : !tails.empty() ? tails.back() : nullptr;
    check(candidates.next() == expected, "another page is the next to leave");
  }
  check(most > 3000, "no list was long enough to be swept");
  while (Page* next = candidates.next()) {
    std::vector<Page*>& list = sealed.empty() ? tails : sealed;
    check(next == list.back(), "pages leave in another order");
    list.pop_back();
    candidates.remove(next);
  }
  check(sealed.empty() && tails.empty(), "a page was lost");
  pages.clear();
  // A std::deque keeps its index: 8 bytes for every 64 entries that it had.
  check(pool.bytes() <= empty_bytes + static_cast<int64_t>(most), "memory is kept of pages that are gone");
  std::printf("%zu pages at once: ok\n", most);
}
