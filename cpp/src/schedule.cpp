#include "schedule.h"

#include <algorithm>

namespace ktt {
namespace {

// A task takes this part of what is left for each thread.
constexpr size_t kSharesPerThread = 3;
// The smallest tasks are this part of a thread's work, or what it takes to be worth the jump: where
// a thread begins to read, memory is slow at first.
constexpr size_t kLeastSharesPerThread = 16;
constexpr size_t kLeastTaskBytes = 128 * 1024;
// Below this, handing a task to another thread costs more than it evens out.
constexpr size_t kSerialBytes = 32 * 1024;
// A panel costs as if it had so many rows more: reading its weights.
constexpr size_t kRowsWorthOfReading = 4;

class Shares {
 public:
  Shares(const Cut& cut, size_t total_cost) : cut_(cut), cost_left_(total_cost) {
    const auto cost_of = [&](size_t bytes) {
      return bytes * kRowsWorthOfReading / std::max<size_t>(cut.panel_bytes, 1);
    };
    const size_t even = total_cost / (kLeastSharesPerThread * cut.num_threads);
    least_cost_ = std::max(std::min(even, cost_of(kLeastTaskBytes)), cost_of(kSerialBytes));
  }

  // How many of `available` panels the next task takes.
  size_t take(size_t available, size_t cost_of_panel) {
    const size_t count = std::min(wanted(cost_of_panel), available);
    cost_left_ -= count * cost_of_panel;
    return count;
  }

 private:
  size_t wanted(size_t cost_of_panel) const {
    if (cut_.num_threads == 1) return cut_.most;
    const size_t share = cost_left_ / (kSharesPerThread * cut_.num_threads);
    const size_t count = std::max(share, least_cost_) / cost_of_panel;
    return std::clamp(count / cut_.unit * cut_.unit, cut_.unit, cut_.most);
  }

  const Cut& cut_;
  size_t least_cost_;
  size_t cost_left_;
};

size_t cost_of_panel(const Grouping::Chunk& chunk) { return chunk.num_rows + kRowsWorthOfReading; }

}  // namespace

size_t unit_of(size_t num_threads, size_t num_panels, size_t most) {
  const size_t even = num_panels / (2 * kLeastSharesPerThread * num_threads);
  size_t unit = 1;
  while (2 * unit <= std::min(even, most)) unit *= 2;
  return unit;
}

void cut_by_chunks(const Cut& cut, const std::vector<Grouping::Chunk>& chunks,
                   std::vector<PanelRange>& tasks) {
  tasks.clear();
  size_t total = 0;
  for (const auto& chunk : chunks) total += cost_of_panel(chunk) * cut.num_panels;
  Shares shares(cut, total);
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (size_t first = 0, count; first < cut.num_panels; first += count) {
      count = shares.take(cut.num_panels - first, cost_of_panel(chunks[c]));
      tasks.push_back(
          {static_cast<uint32_t>(c), static_cast<uint32_t>(first), static_cast<uint32_t>(count)});
    }
  }
}

void cut_by_panels(const Cut& cut, const std::vector<Grouping::Chunk>& chunks,
                   std::vector<PanelRange>& tasks) {
  tasks.clear();
  size_t cost = 0;
  for (const auto& chunk : chunks) cost += cost_of_panel(chunk);
  Shares shares(cut, cost * cut.num_panels);
  for (size_t first = 0, count; first < cut.num_panels; first += count) {
    count = shares.take(cut.num_panels - first, cost);
    tasks.push_back({0, static_cast<uint32_t>(first), static_cast<uint32_t>(count)});
  }
}

}  // namespace ktt
