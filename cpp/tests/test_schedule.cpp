// Tasks cover every panel of every chunk once; large ones first, small ones to even out the end.
#include <algorithm>
#include <vector>

#include "check.h"
#include "schedule.h"

namespace ktt {
namespace {

using Chunk = Grouping::Chunk;

void check_cover(const std::vector<PanelRange>& tasks, size_t num_chunks, const Cut& cut) {
  std::vector<int> hits(num_chunks * cut.num_panels);
  for (const PanelRange& task : tasks) {
    CHECK(task.count >= 1 && task.count <= cut.most);
    for (size_t i = 0; i < task.count; ++i) ++hits[task.chunk * cut.num_panels + task.first + i];
  }
  CHECK(std::all_of(hits.begin(), hits.end(), [](int count) { return count == 1; }));
}

TEST(every_panel_falls_to_one_task) {
  const std::vector<Chunk> chunks = {{3, 10, 200}, {3, 210, 190}, {0, 0, 7}, {8, 400, 1}};
  std::vector<PanelRange> tasks;
  for (const size_t num_threads : {1, 2, 7, 200}) {
    for (const size_t num_panels : {1, 2, 31, 128}) {
      for (const size_t unit : {1, 4}) {
        const Cut cut = {num_threads, num_panels, 4096, unit, 128};
        cut_by_chunks(cut, chunks, tasks);
        check_cover(tasks, chunks.size(), cut);
        cut_by_panels(cut, chunks, tasks);
        check_cover(tasks, 1, cut);
      }
    }
  }
}

TEST(units_are_not_parted) {
  std::vector<PanelRange> tasks;
  cut_by_chunks({3, 30, 4096, 4, 32}, {{0, 0, 1}, {1, 1, 90}}, tasks);
  for (const PanelRange& task : tasks) {
    CHECK_EQUAL(task.first % 4, uint32_t{0});
    CHECK(task.count % 4 == 0 || task.first + task.count == 30);
  }
}

TEST(units_even_out_among_the_threads) {
  CHECK_EQUAL(unit_of(1, 640, 8), size_t{8});
  CHECK_EQUAL(unit_of(2, 320, 8), size_t{4});
  CHECK_EQUAL(unit_of(64, 640, 8), size_t{1});
  CHECK_EQUAL(unit_of(2, 100000, 5), size_t{4});
}

TEST(one_thread_takes_matrices_whole) {
  std::vector<PanelRange> tasks;
  cut_by_chunks({1, 64, 1 << 20, 2, 64}, {{0, 0, 1}, {1, 1, 1}}, tasks);
  CHECK_EQUAL(tasks.size(), size_t{2});
}

TEST(tasks_are_worth_their_handing_over) {
  std::vector<PanelRange> tasks;
  cut_by_chunks({8, 16, 4096, 1, 16}, {{0, 0, 1}}, tasks);
  CHECK_EQUAL(tasks.size(), size_t{3});
  cut_by_chunks({8, 16, 4096, 1, 16}, {{0, 0, 60}}, tasks);
  CHECK_EQUAL(tasks.size(), size_t{16});
}

TEST(the_last_tasks_are_small) {
  std::vector<PanelRange> tasks;
  cut_by_panels({4, 1000, 1 << 20, 1, 1000}, {{0, 0, 1}}, tasks);
  CHECK(tasks.front().count >= 80);
  CHECK(tasks.back().count <= 15);
  CHECK(std::is_sorted(tasks.begin(), tasks.end() - 1,
                       [](const PanelRange& a, const PanelRange& b) { return a.count > b.count; }));
}

TEST(a_matrix_without_panels_has_no_task) {
  std::vector<PanelRange> tasks;
  cut_by_chunks({2, 0, 0, 1, 1}, {{0, 0, 1}}, tasks);
  CHECK(tasks.empty());
  cut_by_panels({2, 0, 0, 1, 1}, {{0, 0, 1}}, tasks);
  CHECK(tasks.empty());
}

}  // namespace
}  // namespace ktt
