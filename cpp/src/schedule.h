// How a region's work is cut into tasks: by expert, by rows and by panels. Large tasks come first,
// for long reads; small ones last, so that all threads end together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "grouping.h"

namespace ktt {

// [begin, end) of `count` things that fall to part i of n.
inline std::pair<size_t, size_t> share(size_t count, size_t part, size_t num_parts) {
  return {count * part / num_parts, count * (part + 1) / num_parts};
}

// What of a matrix falls to a task.
struct PanelRange {
  uint32_t chunk;  // of the grouping's; of no meaning to tasks that take all experts
  uint32_t first;
  uint32_t count;
};

struct Cut {
  size_t num_threads;
  size_t num_panels;   // of each matrix
  size_t panel_bytes;  // of one expert
  size_t unit;         // panels that are not parted
  size_t most;         // panels of a task, a multiple of the unit
};

// A unit small enough to even out among the threads, of at most `most` panels; a power of two.
size_t unit_of(size_t num_threads, size_t num_panels, size_t most);

// Tasks of some panels each for every chunk of the grouping.
void cut_by_chunks(const Cut& cut, const std::vector<Grouping::Chunk>& chunks,
                   std::vector<PanelRange>& tasks);
// Tasks of some panels each, for all chunks together.
void cut_by_panels(const Cut& cut, const std::vector<Grouping::Chunk>& chunks,
                   std::vector<PanelRange>& tasks);

}  // namespace ktt
